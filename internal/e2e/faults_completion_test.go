//go:build faults

package e2e

import (
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/melodia/orchestrator/internal/postgres/pgtest"
)

// worker is a target that takes each task with a 202, as a service does whose work takes long.
type worker struct {
	*httptest.Server
	mu    sync.Mutex
	calls []taken
}

// taken is what a call tells its target about how to report.
type taken struct{ task, url, token string }

func startWorker(t *testing.T) *worker {
	w := &worker{}
	w.Server = httptest.NewServer(http.HandlerFunc(func(answer http.ResponseWriter, r *http.Request) {
		w.mu.Lock()
		w.calls = append(w.calls, taken{r.Header.Get("Orchestrator-Task-Id"), r.Header.Get("Orchestrator-Completion-Url"), r.Header.Get("Orchestrator-Completion-Token")})
		w.mu.Unlock()
		answer.WriteHeader(http.StatusAccepted)
		_, _ = io.WriteString(answer, r.Header.Get("Orchestrator-Completion-Token")) // which must not be kept
	}))
	t.Cleanup(w.Close)
	return w
}

func (w *worker) taken() []taken {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.calls
}

// report tells the service something of a task, and returns the answer's status.
func (c taken) report(t *testing.T, body string) (status int, text string) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, c.url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("Orchestrator-Completion-Token", c.token)
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		return 0, err.Error()
	}
	defer resp.Body.Close()
	b, _ := io.ReadAll(resp.Body)
	return resp.StatusCode, string(b)
}

// A task that its target has taken outlives everything of ours: the instance that called it is
// killed, every other one is replaced, the database crashes and comes back. It is completed once.
func TestLongWorkOutlivesTheService(t *testing.T) {
	t.Parallel()
	database := startCluster(t, openDir(t))
	target := startWorker(t)
	var mu sync.Mutex
	var instance *process
	gateway := httptest.NewServer(&httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			mu.Lock()
			defer mu.Unlock()
			to, err := url.Parse(instance.url)
			if err != nil {
				t.Error(err)
			}
			r.SetURL(to)
		},
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, _ error) { w.WriteHeader(http.StatusBadGateway) },
	})
	defer gateway.Close()
	replace := func(signal syscall.Signal) {
		mu.Lock()
		defer mu.Unlock()
		if instance != nil {
			instance.stop(signal)
		}
		instance = start(t, "serve", "DATABASE_URL="+database.url(), "PUBLIC_URL="+gateway.URL+"/", "LEASE_DURATION=1s", "POLL_INTERVAL=100ms", "LOG_LEVEL=debug")
	}
	replace(0)
	ended := make(chan []byte, 10)
	told := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		ended <- body
	}))
	defer told.Close()
	task := instance.submit("/enqueue", `{"url":"`+target.URL+`","payload":1,"completion":{"timeout_seconds":3600,"heartbeat_seconds":600},"on_success":{"url":"`+told.URL+`"}}`)
	eventually(t, func() bool { return len(target.taken()) == 1 }, func() string { return "the target was not called" })
	call := target.taken()[0]
	if call.url != gateway.URL+"/tasks/"+task.ID+"/complete" || call.task != task.ID || len(call.token) < 40 {
		t.Fatalf("the call had %+v", call)
	}
	awaiting := func(when string) {
		t.Helper()
		eventually(t, func() bool {
			a := instance.do(http.MethodGet, "/tasks/"+task.ID, "")
			return a.status == http.StatusOK && strings.Contains(a.raw, `"awaiting_completion":true`)
		}, func() string { return when + ": it is not awaited" })
	}
	awaiting("after the 202")
	for _, signal := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM, syscall.SIGKILL} {
		old := instance
		replace(signal)
		awaiting(signal.String())
		if old.count(call.token) > 0 {
			t.Error("the token is in the log")
		}
		eventually(t, func() bool {
			status, _ := call.report(t, `{"outcome":"heartbeat","progress":0.5,"note":"mixing"}`)
			return status == http.StatusOK
		}, func() string { return "a heartbeat does not come through" })
	}
	database.crash()
	if status, text := call.report(t, `{"outcome":"succeeded"}`); status != http.StatusServiceUnavailable && status != http.StatusBadGateway {
		t.Errorf("without a database a report is answered %d %s", status, text)
	}
	database.start()
	mu.Lock()
	instance.stop(syscall.SIGKILL)
	instance = nil
	mu.Unlock()
	replace(0)
	awaiting("after a crash of the database")
	a := instance.do(http.MethodGet, "/tasks/"+task.ID+"/explain", "")
	if !strings.Contains(a.raw, "reported 50 % (mixing)") {
		t.Errorf("explain says %s", a.raw)
	}
	if status, text := (taken{url: call.url, token: strings.Repeat("x", len(call.token))}).report(t, `{"outcome":"succeeded"}`); status != http.StatusUnauthorized {
		t.Errorf("another token is answered %d %s", status, text)
	}
	waited := make(chan answer, 1)
	go func() { waited <- instance.do(http.MethodGet, "/tasks/"+task.ID+"?wait_seconds=30", "") }()
	if status, text := call.report(t, `{"outcome":"succeeded","result":{"cover": 1.10}}`); status != http.StatusOK {
		t.Fatalf("its end is answered %d %s", status, text)
	}
	if status, _ := call.report(t, `{"outcome":"succeeded","result":{"cover": 2}}`); status != http.StatusConflict {
		t.Errorf("a second end is answered %d", status)
	}
	if got := <-waited; !strings.Contains(got.raw, `"result":{"cover": 1.10}`) && !strings.Contains(got.raw, `"result":{"cover":1.10}`) {
		t.Errorf("who waited got %s", got.raw)
	}
	var body struct {
		ID     string
		Result json.RawMessage
	}
	if err := json.Unmarshal(<-ended, &body); err != nil || body.ID != task.ID || string(body.Result) != `{"cover": 1.10}` {
		t.Errorf("its callback had %s of %s: %v", body.Result, body.ID, err)
	}
	shown := instance.do(http.MethodGet, "/tasks/"+task.ID, "")
	if n := len(target.taken()); n != 1 || strings.Contains(shown.raw, call.token) {
		t.Errorf("the target was called %d times, want once; %s", n, shown.raw)
	}
	mu.Lock()
	defer mu.Unlock()
	if instance.count(call.token) > 0 {
		t.Error("the token is in the log")
	}
}

// Without PUBLIC_URL no target could report.
func TestCompletionNeedsAPublicURL(t *testing.T) {
	t.Parallel()
	p := start(t, "serve", "DATABASE_URL="+pgtest.URL(t))
	if a := p.do(http.MethodPost, "/enqueue", `{"url":"http://127.0.0.1:1/","completion":{"timeout_seconds":60}}`); a.status != http.StatusUnprocessableEntity || !strings.Contains(a.raw, "PUBLIC_URL") {
		t.Errorf("got %d %s", a.status, a.raw)
	}
}
