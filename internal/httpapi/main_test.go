package httpapi

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/melodia/orchestrator/internal/httpserver"
	"github.com/melodia/orchestrator/internal/intake"
	"github.com/melodia/orchestrator/internal/task"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// marker is planted in whatever bad requests send. No problem and no log line
// may contain it.
const marker = "s3cr3t-m4rk3r"

// target is a URL that every rule admits.
const target = "https://example.com/plays"

// storedAt is the fake database's clock.
var storedAt = time.Date(2026, 11, 24, 12, 0, 0, 123456000, time.UTC)

// fakeStore keeps what is inserted. Its functions, where they are set, answer
// instead of it.
type fakeStore struct {
	insert func(context.Context, *task.Task) error
	// insertBatch is asked before the tasks are inserted one by one.
	insertBatch func(context.Context, *task.Batch) error
	get         func(context.Context, task.ID) (*task.Task, error)
	getWithBody func(context.Context, task.ID) (*task.Task, error)
	repeated    func(key string, fingerprint []byte) error
	find        func(f *task.Filter, behind task.Position, limit int) ([]*task.Task, error)
	counts      func() (map[task.State]task.Count, time.Duration, error)
	explain     func(id task.ID, lease time.Duration) (*task.Task, task.Facts, error)
	health      func(context.Context) (time.Duration, error)

	// act answers for "Cancel", "MakeDue" and "Redrive".
	act         func(name string, id task.ID) (*task.Task, error)
	change      func(t *task.Task) (*task.Task, error)
	match       func(f *task.Filter, limit int) ([]task.ID, error)
	cancelMany  func(ids []task.ID) (int, map[task.ID]int64, error)
	redriveMany func(ids []task.ID, wait, apart time.Duration) (int, error)
	// redrive is told with how many hops tasks are redriven.
	redrive func(hops int)
	fakeQueues
	fakeHosts

	mu      sync.Mutex
	tasks   []*task.Task
	content *task.Content // of the last change
	calls   int
}

func (s *fakeStore) called() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls++
}

func (s *fakeStore) Insert(ctx context.Context, t *task.Task) error {
	s.called()
	if s.insert != nil {
		if err := s.insert(ctx, t); err != nil {
			return err
		}
	}
	t.CreatedAt = storedAt
	if t.RunAt.IsZero() {
		t.RunAt = storedAt.Add(t.Delay)
	}
	if t.RunAt.Before(storedAt) {
		t.RunAt = storedAt
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tasks = append(s.tasks, t)
	return nil
}

func (s *fakeStore) Get(ctx context.Context, id task.ID) (*task.Task, error) {
	s.called()
	if s.get == nil {
		return nil, task.ErrNotFound
	}
	return s.get(ctx, id)
}

func (s *fakeStore) GetWithBody(ctx context.Context, id task.ID) (*task.Task, error) {
	s.called()
	if s.getWithBody == nil {
		return nil, task.ErrNotFound
	}
	return s.getWithBody(ctx, id)
}

func (s *fakeStore) GetMany(ctx context.Context, ids []task.ID) ([]*task.Task, error) {
	tasks := make([]*task.Task, len(ids))
	for i, id := range ids {
		var err error
		if tasks[i], err = s.Get(ctx, id); err != nil {
			return nil, err
		}
	}
	return tasks, nil
}

func (s *fakeStore) Repeated(_ context.Context, key string, fingerprint []byte) error {
	s.called()
	if s.repeated == nil {
		return nil
	}
	return s.repeated(key, fingerprint)
}

func (s *fakeStore) Find(_ context.Context, f *task.Filter, behind task.Position, limit int) ([]*task.Task, error) {
	s.called()
	if s.find == nil {
		return nil, nil
	}
	return s.find(f, behind, limit)
}

func (s *fakeStore) Counts(context.Context) (map[task.State]task.Count, time.Duration, error) {
	s.called()
	if s.counts == nil {
		return nil, 0, nil
	}
	return s.counts()
}

func (s *fakeStore) Explain(_ context.Context, id task.ID, lease time.Duration) (*task.Task, task.Facts, error) {
	s.called()
	if s.explain == nil {
		return nil, task.Facts{}, task.ErrNotFound
	}
	return s.explain(id, lease)
}

func (s *fakeStore) Cancel(_ context.Context, id task.ID) (*task.Task, error) {
	return s.doAct("Cancel", id)
}

func (s *fakeStore) MakeDue(_ context.Context, id task.ID) (*task.Task, error) {
	return s.doAct("MakeDue", id)
}

func (s *fakeStore) Redrive(_ context.Context, id task.ID, hops int) (*task.Task, error) {
	if s.redrive != nil {
		s.redrive(hops)
	}
	return s.doAct("Redrive", id)
}

func (s *fakeStore) doAct(name string, id task.ID) (*task.Task, error) {
	s.called()
	if s.act == nil {
		return nil, task.ErrNotFound
	}
	return s.act(name, id)
}

func (s *fakeStore) Change(_ context.Context, t *task.Task, content *task.Content) (*task.Task, error) {
	s.called()
	s.mu.Lock()
	s.content = content
	s.mu.Unlock()
	return s.change(t)
}

func (s *fakeStore) Match(_ context.Context, f *task.Filter, limit int) ([]task.ID, error) {
	s.called()
	if s.match == nil {
		return nil, nil
	}
	return s.match(f, limit)
}

func (s *fakeStore) CancelMany(_ context.Context, ids []task.ID) (int, map[task.ID]int64, error) {
	s.called()
	return s.cancelMany(ids)
}

func (s *fakeStore) RedriveMany(_ context.Context, ids []task.ID, wait, apart time.Duration, hops int) (int, error) {
	s.called()
	if s.redrive != nil {
		s.redrive(hops)
	}
	return s.redriveMany(ids, wait, apart)
}

func (s *fakeStore) Now(context.Context) (time.Time, error) { return storedAt, nil }

func (s *fakeStore) Health(ctx context.Context) (time.Duration, error) {
	s.called()
	if s.health == nil {
		return 0, nil
	}
	return s.health(ctx)
}

// taken returns what was inserted since it was last asked.
func (s *fakeStore) taken() []*task.Task {
	s.mu.Lock()
	defer s.mu.Unlock()
	tasks := s.tasks
	s.tasks = nil
	return tasks
}

func (s *fakeStore) callCount() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.calls
}

type fakeDispatcher struct {
	store   *fakeStore // takes what is submitted
	runNow  func(context.Context, task.ID) (task.Outcome, task.Decision, error)
	runOnce func(context.Context, *task.Task) (task.Outcome, error)
	watch   func(task.ID) (<-chan struct{}, func(), error)
	health  func() (string, int)
	short   task.Shortage

	mu   sync.Mutex
	cut  []map[task.ID]int64
	woke int
	ran  []task.ID
	// cameBack are the tasks whose calls waited here.
	cameBack []task.ID

	once []*task.Task

	report  func(task.ID, task.Token, *task.Report) (task.State, time.Time, error)
	reports []task.Report
}

func (d *fakeDispatcher) Report(_ context.Context, id task.ID, token task.Token, r *task.Report) (task.State, time.Time, error) {
	d.mu.Lock()
	d.reports = append(d.reports, *r)
	d.mu.Unlock()
	if d.report == nil {
		return task.Running, storedAt.Add(time.Minute), nil
	}
	return d.report(id, token, r)
}

func (d *fakeDispatcher) Submit(ctx context.Context, t *task.Task) error {
	return d.store.Insert(ctx, t)
}

func (d *fakeDispatcher) SubmitBatch(ctx context.Context, b *task.Batch) error {
	if d.store.insertBatch != nil {
		if err := d.store.insertBatch(ctx, b); err != nil {
			return err
		}
	}
	for _, t := range b.Tasks {
		if err := d.store.Insert(ctx, t); err != nil {
			return err
		}
	}
	return nil
}

func (d *fakeDispatcher) Execute(ctx context.Context, id task.ID) (task.Outcome, task.Decision, error) {
	d.mu.Lock()
	d.ran = append(d.ran, id)
	d.mu.Unlock()
	if d.runNow == nil {
		return task.Outcome{Kind: task.OutcomeSucceeded, StatusCode: 200}, task.Decision{State: task.Succeeded}, nil
	}
	return d.runNow(ctx, id)
}

func (d *fakeDispatcher) ExecuteUnstored(ctx context.Context, t *task.Task) (task.Outcome, error) {
	d.mu.Lock()
	d.once = append(d.once, t)
	d.mu.Unlock()
	if d.runOnce == nil {
		return task.Outcome{Kind: task.OutcomeSucceeded, StatusCode: 200}, nil
	}
	return d.runOnce(ctx, t)
}

func (d *fakeDispatcher) Watch(id task.ID) (<-chan struct{}, func(), error) {
	if d.watch == nil {
		return nil, func() {}, nil // it never ends
	}
	return d.watch(id)
}

func (d *fakeDispatcher) CutOff(claims map[task.ID]int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.cut = append(d.cut, claims)
}

func (d *fakeDispatcher) CameBack(id task.ID) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.cameBack = append(d.cameBack, id)
}

func (d *fakeDispatcher) Wake() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.woke++
}

func (d *fakeDispatcher) Health() (string, int) {
	if d.health == nil {
		return "ok", 0
	}
	return d.health()
}

func (d *fakeDispatcher) Shortage() task.Shortage { return d.short }

// taken returns what was asked since it was last asked itself.
func (d *fakeDispatcher) taken() (ran []task.ID, once []*task.Task) {
	d.mu.Lock()
	defer d.mu.Unlock()
	ran, once = d.ran, d.once
	d.ran, d.once = nil, nil
	return ran, once
}

type fakePolicy func(string) error

func (p fakePolicy) CheckURL(rawURL string) error {
	if p == nil {
		return nil
	}
	return p(rawURL)
}

// fakeIssuer allows every role and target where it is nil.
type fakeIssuer func(rawURL, role string) error

func (f fakeIssuer) Check(rawURL, role string) error {
	if f == nil {
		return nil
	}
	return f(rawURL, role)
}

type fakeSecrets func(name, rawURL string) error

func (f fakeSecrets) Check(name, rawURL string) error {
	if f == nil {
		return nil
	}
	return f(name, rawURL)
}

// fakeCallers knows everybody as the one who is in the header X-Test-Caller
// and lets them do everything, where it is nil.
type fakeCallers func(http.Header) (name string, scopes []string, err error)

func (c *fakeCallers) Authenticate(_ context.Context, header http.Header) (name string, scopes []string, err error) {
	if *c == nil {
		return header.Get("X-Test-Caller"), Scopes(), nil
	}
	return (*c)(header)
}

// logBuffer is a log that can be read while it is written.
type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// service is an API on fakes. Every answer that goes through it is held
// against the OpenAPI document.
type service struct {
	*API
	t          testing.TB
	store      *fakeStore
	dispatcher *fakeDispatcher
	callers    *fakeCallers // may be changed
	log        *logBuffer
	schema     *document
	// server is started when it is first asked for.
	server func() *httptest.Server
}

// settings are what a service is made of, besides its store and dispatcher.
type settings struct {
	Options
	Policy, Identity fakePolicy
	Issuer           fakeIssuer
	Secrets          fakeSecrets
	Callers          fakeCallers
	BasePath         string
	TrustedProxies   []netip.Prefix
	MaxHops          int
	Rate             float64
	Burst            int
	NewID            func() task.ID
	// noCompletion: the setting PUBLIC_URL is missing.
	noCompletion bool
}

// newGuard is the real one.
func (s *settings) newGuard() *httpserver.Guard {
	return httpserver.NewGuard(httpserver.Options{BasePath: s.BasePath, TrustedProxies: s.TrustedProxies, Authenticator: &s.Callers, Rate: s.Rate, Burst: s.Burst, NewID: s.NewID, Log: s.Log})
}

// What the guard bounds.
const (
	maxBody     = httpserver.MaxBody
	smallBody   = 16 << 10
	maxBodies   = 32 << 20
	smallAnswer = 16 << 10
	maxAnswers  = 64 << 20

	headTimeout    = 10 * time.Second
	requestTimeout = 20 * time.Second
)

// What doors answer an error with.
var (
	unavailableDetail = httpserver.RefusalOf(task.ErrUnavailable).Detail
	overloadedDetail  = httpserver.RefusalOf(task.ErrOverloaded).Detail
	internalDetail    = httpserver.RefusalOf(errors.New("any")).Detail
)

// fill has others take so many bytes of a budget.
func fill(b *httpserver.MemoryBudget, bytes int) { b.Reserve(bytes-int(b.Used()), 0) }

// submitter is what the intake needs of a dispatcher.
type submitter interface {
	Submit(ctx context.Context, t *task.Task) error
	SubmitBatch(ctx context.Context, b *task.Batch) error
	Wake()
}

// newIntake is the real one, on fakes.
func (s *settings) newIntake(store *fakeStore, by submitter) *intake.Intake {
	return intake.New(intake.Options{
		Store: store, Dispatcher: by,
		Policy: s.Policy, Identity: s.Identity, Issuer: s.Issuer, Secrets: s.Secrets, Defaults: s.Defaults, MaxHops: s.MaxHops, NewID: s.NewID, Completes: !s.noCompletion,
	})
}

// newService returns a service after change, if any, has set its fakes' functions.
func newService(t testing.TB, change ...func(*settings)) *service {
	t.Helper()
	s := &service{
		t: t, store: &fakeStore{}, log: &logBuffer{},
	}
	s.dispatcher = &fakeDispatcher{store: s.store}
	o := &settings{Options: Options{
		Store: s.store, Dispatcher: s.dispatcher,
		Lease:      15 * time.Second,
		Defaults:   task.Spec{Timeout: 30 * time.Second, Retry: task.DefaultRetryPolicy()},
		Version:    "1.2.3",
		ExampleURL: target,
		Log:        slog.New(slog.NewJSONHandler(s.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}, NewID: countingIDs()}
	for _, f := range change {
		f(o)
	}
	s.callers = &o.Callers
	o.Intake, o.Guard = o.newIntake(s.store, s.dispatcher), o.newGuard()
	s.API = New(o.Options)
	s.schema = parseDocument(t, s.API)
	s.server = sync.OnceValue(func() *httptest.Server {
		server := httptest.NewServer(s.API)
		t.Cleanup(server.Close)
		return server
	})
	return s
}

// on returns the same service, which reports to a subtest.
func (s *service) on(t testing.TB) *service {
	same := *s
	same.t = t
	return &same
}

// countingIDs makes UUIDs of version 7 that count from 1.
func countingIDs() func() task.ID {
	var n atomic.Uint64
	return func() task.ID {
		var id task.ID
		binary.BigEndian.PutUint64(id[8:], n.Add(1))
		id[0], id[6], id[8] = 1, 0x70, 0x80
		return id
	}
}

func (s *service) post(path, body string, header ...string) *answer {
	s.t.Helper()
	return s.do(http.MethodPost, path, body, header...)
}

func (s *service) get(path string) *answer {
	s.t.Helper()
	return s.do(http.MethodGet, path, "")
}

// do makes a request over the network; header is names and values in turn.
func (s *service) do(method, path, body string, header ...string) *answer {
	s.t.Helper()
	var reader io.Reader
	if body != "" {
		reader = strings.NewReader(body)
	}
	r, err := http.NewRequestWithContext(s.t.Context(), method, s.server().URL+path, reader)
	if err != nil {
		s.t.Fatal(err)
	}
	if body != "" {
		r.Header.Set("Content-Type", "application/json")
	}
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	return s.send(r)
}

func (s *service) send(r *http.Request) *answer {
	s.t.Helper()
	client := s.server().Client()
	client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	resp, err := client.Do(r)
	if err != nil {
		s.t.Fatalf("%s %s: %v", r.Method, r.URL.Path, err)
	}
	defer resp.Body.Close()
	return s.read(r, resp)
}

// read reads an answer and holds it against the document, and against what
// every answer must say to caches and browsers.
func (s *service) read(r *http.Request, resp *http.Response) *answer {
	s.t.Helper()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		s.t.Fatalf("read the answer to %s %s: %v", r.Method, r.URL.Path, err)
	}
	a := &answer{status: resp.StatusCode, header: resp.Header, text: string(b)}
	if strings.Contains(resp.Header.Get("Content-Type"), "json") && r.Method != http.MethodHead {
		if err := json.Unmarshal(b, &a.json); err != nil {
			s.t.Errorf("%s %s: the answer is not JSON: %v\n%s", r.Method, r.URL.Path, err, clipped(a.text))
		}
	}
	caching := "no-store"
	if a.header.Get("Content-Security-Policy") != "" { // Swagger UI's own files
		caching = "no-cache"
	}
	if got := a.header.Get("Cache-Control"); got != caching {
		s.t.Errorf("%s %s: %d with Cache-Control %q, want %s", r.Method, r.URL.Path, a.status, got, caching)
	}
	if got := a.header.Get("X-Content-Type-Options"); got != "nosniff" {
		s.t.Errorf("%s %s: %d with X-Content-Type-Options %q, want nosniff", r.Method, r.URL.Path, a.status, got)
	}
	for _, mistake := range s.schema.check(r.Method, r.URL.Path, a) {
		s.t.Errorf("%s %s: the answer breaks the document: %s\n%d %s", r.Method, r.URL.Path, mistake, a.status, clipped(a.text))
	}
	return a
}

// serve is do without a network.
func (s *service) serve(r *http.Request) *answer {
	s.t.Helper()
	w := httptest.NewRecorder()
	s.ServeHTTP(w, r)
	return s.read(r, w.Result())
}

// nothingHappened fails where a refused request had an effect or left a value.
func (s *service) nothingHappened(a *answer) {
	s.t.Helper()
	if tasks := s.store.taken(); len(tasks) > 0 {
		s.t.Errorf("a request answered %d stored %d tasks, want none", a.status, len(tasks))
	}
	if ran, once := s.dispatcher.taken(); len(ran)+len(once) > 0 {
		s.t.Errorf("a request answered %d ran %d tasks, want none", a.status, len(ran)+len(once))
	}
	if strings.Contains(a.text, marker) || strings.Contains(fmt.Sprint(a.header), marker) {
		s.t.Errorf("a value that was sent comes back: %s\n%v", clipped(a.text), a.header)
	}
	if strings.Contains(s.log.String(), marker) {
		s.t.Errorf("a value that was sent is in the log: %s", clipped(s.log.String()))
	}
}

// refused checks the whole answer to a bad request: its status, and on 422
// its errors as `["body","url"] missing`, in any order.
func (s *service) refused(a *answer, status int, errors ...string) {
	s.t.Helper()
	if a.status != status {
		s.t.Errorf("got status %d, want %d: %s", a.status, status, clipped(a.text))
	}
	if got := a.errors(); !sameStrings(got, errors) {
		s.t.Errorf("got errors %q, want %q", got, errors)
	}
	s.nothingHappened(a)
}

func sameStrings(a, b []string) bool {
	a, b = slices.Sorted(slices.Values(a)), slices.Sorted(slices.Values(b))
	return slices.Equal(a, b)
}

// answer is a response that was read.
type answer struct {
	status int
	header http.Header
	text   string
	json   any
}

// at returns the member at the end of the path, or nil.
func (a *answer) at(path ...any) any {
	v := a.json
	for _, step := range path {
		switch step := step.(type) {
		case string:
			object, _ := v.(map[string]any)
			v = object[step]
		case int:
			list, _ := v.([]any)
			if step >= len(list) {
				return nil
			}
			v = list[step]
		}
	}
	return v
}

func (a *answer) detail() string {
	s, _ := a.at("detail").(string)
	return s
}

// errors is the problem's errors, each as its loc in JSON and its type.
func (a *answer) errors() (out []string) {
	list, _ := a.at("errors").([]any)
	for _, e := range list {
		object, _ := e.(map[string]any)
		loc, _ := json.Marshal(object["loc"])
		out = append(out, fmt.Sprintf("%s %v", loc, object["type"]))
	}
	return out
}

// message is the text of the error at loc.
func (a *answer) message(loc string) string {
	list, _ := a.at("errors").([]any)
	for _, e := range list {
		object, _ := e.(map[string]any)
		if b, _ := json.Marshal(object["loc"]); string(b) == loc {
			s, _ := object["msg"].(string)
			return s
		}
	}
	return ""
}

func clipped(s string) string {
	if len(s) > 1000 {
		return s[:1000] + "…"
	}
	return s
}

// object writes n members name0, name1, … with the same value.
func object(n int, name, value string) string {
	members := make([]string, n)
	for i := range members {
		members[i] = fmt.Sprintf("%q:%s", fmt.Sprint(name, i), value)
	}
	return "{" + strings.Join(members, ",") + "}"
}
