package httpserver

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/melodia/orchestrator/internal/task"
)

// fakeAuthenticator is asked about the header X-Test.
type fakeAuthenticator func(test string) (principal string, scopes []string, err error)

func (f fakeAuthenticator) Authenticate(_ context.Context, header http.Header) (string, []string, error) {
	return f(header.Get("X-Test"))
}

// door is a Door that answers in plain text.
type door struct {
	*Door
	log bytes.Buffer
}

func newDoor(change ...func(*Options)) *door {
	d := new(door)
	o := Options{NewID: func() task.ID { return task.ID{1} }, Log: slog.New(slog.NewTextHandler(&d.log, nil))}
	for _, c := range change {
		c(&o)
	}
	g := NewGuard(o)
	d.Door = g.Door(func(w http.ResponseWriter, r *http.Request, err error) {
		refusal := RefusalOf(err)
		for name, values := range refusal.Header {
			w.Header()[name] = values
		}
		g.Report(r.Context(), refusal.Status, err)
		w.WriteHeader(refusal.Status)
		_, _ = io.WriteString(w, refusal.Detail)
	})
	return d
}

func post(t testing.TB, body io.Reader) *http.Request {
	t.Helper()
	return httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/", body)
}

func record(h http.Handler, r *http.Request) *httptest.ResponseRecorder {
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w
}

func TestAuthorize(t *testing.T) {
	t.Parallel()
	d := newDoor(func(o *Options) {
		o.Rate, o.Burst = 0.25, 1
		o.Authenticator = fakeAuthenticator(func(test string) (string, []string, error) {
			switch test {
			case "":
				return "", nil, errors.New("no credentials came")
			case "issuer":
				return "", nil, fmt.Errorf("ask: %w", task.ErrUnavailable)
			case "nobody":
				return "", []string{"read"}, nil
			}
			name, scopes, _ := strings.Cut(test, ":")
			return name, strings.Fields(scopes), nil
		})
	})
	need := func(r *http.Request) Need {
		if r.URL.RawQuery != "" {
			return Need{[]string{"manage"}, "a query needs"}
		}
		return Need{[]string{"read", "manage"}, "this needs"}
	}
	var seen []string
	h := d.Authorize(need, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { seen = append(seen, Principal(r.Context())) }))
	for _, tt := range []struct {
		test, query string
		status      int
		text        string
		challenge   string
	}{
		{test: "a:read", status: 200},
		{test: "a:read", status: 429, text: "more requests than it may"},
		{test: "b:submit manage", status: 200},
		{test: "c:submit", status: 403, text: "lacks the scope read, which this needs; it has submit.", challenge: `error="insufficient_scope", scope="read"`},
		{test: "c:submit", status: 403, text: "lacks"}, // it has used up nothing
		{test: "d:read", query: "?x", status: 403, text: "lacks the scope manage, which a query needs; it has read."},
		{test: "d:", status: 403, text: "it has none."},
		{test: "", status: 401, text: "The service cannot tell who calls: no credentials came.", challenge: Challenge},
		{test: "issuer", status: 503, text: "cannot reach the issuer"},
		{test: "nobody", status: 200},
		{test: "nobody", status: 429},
	} {
		r := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/"+tt.query, nil)
		r.Header.Set("X-Test", tt.test)
		w := record(h, r)
		if w.Code != tt.status || !strings.Contains(w.Body.String(), tt.text) || !strings.Contains(w.Header().Get("WWW-Authenticate"), tt.challenge) {
			t.Errorf("%q: got %d %q, challenge %q; want %d %q, %q", tt.test, w.Code, w.Body, w.Header().Get("WWW-Authenticate"), tt.status, tt.text, tt.challenge)
		}
		if retry := w.Header().Get("Retry-After"); (retry != "") != (tt.status == 429 || tt.status == 503) || tt.status == 429 && retry != "4" {
			t.Errorf("%q: got %d with Retry-After %q", tt.test, w.Code, retry)
		}
	}
	if want := []string{"a", "b", ""}; !slices.Equal(seen, want) {
		t.Errorf("let through: %q, want %q", seen, want)
	}
	if !strings.Contains(d.log.String(), `caller \"a\"`) {
		t.Errorf("the log does not say who makes too many requests: %s", d.log.String())
	}
}

func TestReadBody(t *testing.T) {
	t.Parallel()
	const text = "what was sent"
	for name, tt := range map[string]struct {
		body   io.Reader
		header http.Header
		length int64
		handle http.HandlerFunc
		status int
	}{
		"whole":            {body: strings.NewReader(text), status: 200},
		"as large as may":  {body: bytes.NewReader(make([]byte, MaxBody)), status: 200},
		"none":             {body: http.NoBody, status: 200},
		"announced large":  {body: strings.NewReader(text), length: MaxBody + 1, status: 413},
		"large":            {body: bytes.NewReader(make([]byte, MaxBody+1)), length: -1, status: 413},
		"compressed":       {body: strings.NewReader(text), header: http.Header{"Content-Encoding": {"gzip"}}, status: 415},
		"not compressed":   {body: strings.NewReader(text), header: http.Header{"Content-Encoding": {"Identity"}}, status: 200},
		"breaks off":       {body: iotest.TimeoutReader(iotest.OneByteReader(strings.NewReader(text))), length: -1, status: 400},
		"a handler panics": {body: strings.NewReader(text), handle: func(http.ResponseWriter, *http.Request) { panic("broken") }, status: 500},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := newDoor()
			read := false
			h := d.Recover(d.ReadBody(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				read = true
				b := Body(r)
				if d.Bodies().Used() != int64(len(b)) {
					t.Errorf("%d bytes are counted of %d", d.Bodies().Used(), len(b))
				}
				if again, err := io.ReadAll(r.Body); err != nil || !bytes.Equal(again, b) {
					t.Errorf("it reads as %d bytes, %v; want %d", len(again), err, len(b))
				}
				if tt.handle != nil {
					tt.handle(w, r)
				}
			})))
			r := post(t, tt.body)
			if tt.length != 0 {
				r.ContentLength = tt.length
			}
			for name, values := range tt.header {
				r.Header[name] = values
			}
			if w := record(h, r); w.Code != tt.status || read != (tt.status == 200 || tt.status == 500) {
				t.Errorf("got %d %s, want %d", w.Code, w.Body, tt.status)
			}
			if used := d.Bodies().Used(); used != 0 {
				t.Errorf("%d bytes are counted afterwards", used)
			}
		})
	}
}

// All bodies are bounded together, and those of calls under way on their own. Small ones
// always get in.
func TestTooManyBodies(t *testing.T) {
	t.Parallel()
	large := strings.Repeat("x", smallBody+1)
	for name, tt := range map[string]struct {
		stored, calls int64 // what others hold
		text          string
		call          bool
		status        int
	}{
		"fits":                        {stored: maxBodies - int64(len(large)), text: large, status: 200},
		"does not fit":                {stored: maxBodies - int64(len(large)) + 1, text: large, status: 429},
		"small":                       {stored: 2 * maxBodies, text: large[1:], status: 200},
		"calls take all":              {calls: 2 * maxBodies, text: large, status: 200},
		"a call fits":                 {calls: maxBodies - int64(len(large)), text: large, call: true, status: 200},
		"a call does not fit":         {calls: maxBodies - int64(len(large)) + 1, text: large, call: true, status: 429},
		"a small call":                {calls: 2 * maxBodies, text: large[1:], call: true, status: 200},
		"what is stored takes nearly": {stored: maxBodies - int64(len(large)), text: large, call: true, status: 200},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := newDoor()
			d.Bodies().Reserve(int(tt.stored), 0)
			d.CallBodies().Reserve(int(tt.calls), 0)
			w := record(d.ReadBody(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if !tt.call {
					return
				}
				if err := d.HoldForCall(r); err != nil {
					d.fail(w, r, err)
				}
				if Body(r) != nil || d.Bodies().Used() != tt.stored || d.CallBodies().Used() != tt.calls+int64(len(tt.text)) {
					t.Errorf("during the call %d bytes are kept, %d and %d counted", len(Body(r)), d.Bodies().Used(), d.CallBodies().Used())
				}
			})), post(t, strings.NewReader(tt.text)))
			if w.Code != tt.status {
				t.Errorf("got %d %s, want %d", w.Code, w.Body, tt.status)
			}
			if d.Bodies().Used() != tt.stored || d.CallBodies().Used() != tt.calls {
				t.Errorf("%d and %d bytes are counted afterwards, want %d and %d", d.Bodies().Used(), d.CallBodies().Used(), tt.stored, tt.calls)
			}
		})
	}
	if err := newDoor().HoldForCall(post(t, http.NoBody)); err != nil {
		t.Errorf("a request without a body: %v", err)
	}
}

// An answer asks for memory before it takes it, and gives back what it took.
func TestAnswer(t *testing.T) {
	t.Parallel()
	d := newDoor()
	write := func(a *Answer, n int) (err error) {
		t.Helper()
		chunk := bytes.Repeat([]byte("x"), 4<<10)
		for range n / len(chunk) {
			if _, err = a.Write(chunk); err != nil {
				break
			}
		}
		if used, kept := d.Answers().Used(), int64(cap(a.bytes)); used < kept {
			t.Errorf("%d bytes are counted of %d that are kept", used, kept)
		}
		return err
	}
	const some = 1 << 20
	whole := d.NewAnswer(false)
	if err := write(whole, some); err != nil || len(whole.Bytes()) != some || strings.Trim(string(whole.Bytes()), "x") != "" {
		t.Errorf("got %v and %d bytes, want %d", err, len(whole.Bytes()), some)
	}
	whole.Release()
	if used := d.Answers().Used(); used != 0 || d.Answers().Exceeded() {
		t.Errorf("%d bytes are counted afterwards", used)
	}

	d.Answers().Reserve(maxAnswers, 0)
	for _, tt := range []struct {
		must    bool
		size    int
		refused bool
	}{{false, smallAnswer, false}, {false, some, true}, {true, some, false}} {
		a := d.NewAnswer(tt.must)
		err := write(a, tt.size)
		refusal, refused := errors.AsType[*Refusal](err)
		if refused != tt.refused || refused && (refusal.Status != 503 || refusal.Header.Get("Retry-After") == "") {
			t.Errorf("%d bytes, must %v: got %v, want a refusal: %v", tt.size, tt.must, err, tt.refused)
		}
		if refused && len(a.Bytes()) > smallAnswer {
			t.Errorf("%d bytes were taken before it was refused", len(a.Bytes()))
		}
		a.Release()
	}
	if used := d.Answers().Used(); used != maxAnswers || d.Answers().Exceeded() {
		t.Errorf("%d bytes are counted afterwards, want %d", used, maxAnswers)
	}
	if d.Answers().Reserve(1, smallAnswer+1); !d.Answers().Exceeded() {
		t.Error("one byte more is not too much")
	}
}

func TestGuardsOfEveryRequest(t *testing.T) {
	t.Parallel()
	d := newDoor()
	h := d.Recover(SecurityHeaders(d.RefuseOtherSites(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/panic":
			panic("broken")
		case "/abort":
			panic(http.ErrAbortHandler)
		}
	}))))
	for _, tt := range []struct {
		path   string
		header http.Header
		status int
	}{
		{path: "/", status: 200},
		{path: "/", header: http.Header{"Sec-Fetch-Site": {"same-origin"}}, status: 200},
		{path: "/", header: http.Header{"Sec-Fetch-Site": {"cross-site"}}, status: 403},
		{path: "/", header: http.Header{"Origin": {"https://evil.example"}}, status: 403},
		{path: "/panic", status: 500},
	} {
		r := httptest.NewRequestWithContext(t.Context(), http.MethodPost, tt.path, nil)
		r.Header = tt.header
		w := record(h, r)
		if w.Code != tt.status || w.Header().Get("Cache-Control") != "no-store" || w.Header().Get("X-Content-Type-Options") != "nosniff" {
			t.Errorf("%s %v: got %d with %v, want %d", tt.path, tt.header, w.Code, w.Header(), tt.status)
		}
	}
	if !strings.Contains(d.log.String(), "panic: broken") || !strings.Contains(d.log.String(), "guard_test.go") {
		t.Errorf("the log does not say where it panicked: %s", d.log.String())
	}
	defer func() {
		if recover() != http.ErrAbortHandler {
			t.Error("a handler cannot cut its connection")
		}
	}()
	record(h, httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/abort", nil))
}

func TestRefusalOfErrors(t *testing.T) {
	t.Parallel()
	own := &Refusal{Status: http.StatusTeapot}
	for name, tt := range map[string]struct {
		err    error
		status int
		retry  bool
	}{
		"a refusal with a cause": {fmt.Errorf("%w: %w", own, task.ErrUnavailable), http.StatusTeapot, false},
		"not found":              {task.ErrNotFound, 404, false},
		"not pending":            {task.ErrNotPending, 409, false},
		"ended":                  {task.ErrEnded, 409, false},
		"cancelled already":      {task.ErrCancelRequested, 409, false},
		"not redrivable":         {task.ErrNotRedrivable, 409, false},
		"changed":                {task.ErrChanged, 409, false},
		"too broad":              {task.ErrTooBroad, 503, true},
		"overloaded":             {task.ErrOverloaded, 429, true},
		"a shortage":             {task.ShortageDescriptors, 503, true},
		"unavailable":            {task.ErrUnavailable, 503, true},
		"a caller that is gone":  {context.Canceled, 503, true},
		"a deadline":             {context.DeadlineExceeded, 503, true},
		"unexpected":             {errors.New("a secret"), 500, false},
	} {
		got := RefusalOf(fmt.Errorf("do it: %w", tt.err))
		if got.Status != tt.status || (got.Header.Get("Retry-After") != "") != tt.retry || strings.Contains(got.Detail, "a secret") || got.Detail == "" && got != own {
			t.Errorf("%s: got %+v, want %d", name, got, tt.status)
		}
	}
}

func TestReport(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d := newDoor()
		gone, leave := context.WithCancel(t.Context())
		leave()
		broken := errors.New("broken")
		report := func(ctx context.Context, status int) {
			if got := d.Report(ctx, status, broken); got != (task.ID{1}).String() {
				t.Errorf("got the id %q", got)
			}
		}
		for range 3 {
			for _, status := range []int{401, 403, 429, 503, 500, 404, 422, 200} {
				report(t.Context(), status)
			}
		}
		report(gone, 503)
		<-time.After(time.Second)
		report(gone, 503) // a caller that is gone was not turned away
		report(t.Context(), 503)
		report(t.Context(), 401)
		var got []string
		for line := range strings.Lines(d.log.String()) {
			_, line, _ = strings.Cut(strings.TrimSuffix(line, "\n"), "level=")
			got = append(got, line)
		}
		const away, refused, failed = `WARN msg="requests turned away" `, `WARN msg="callers refused" `, `ERROR msg="request failed" `
		end := "request_id=" + (task.ID{1}).String() + " error=broken"
		want := []string{
			refused + "count=1 status=401 " + end, away + "count=1 status=429 " + end, failed + end, failed + end, failed + end,
			away + "count=6 status=503 " + end, refused + "count=6 status=401 " + end,
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("logged (-want +got):\n%s", diff)
		}
	})
}
