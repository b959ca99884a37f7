package e2e

import (
	"encoding/base64"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/melodia/orchestrator/internal/postgres/pgtest"
)

// quickly is a retry policy that does not keep a test waiting.
const quickly = `"retry":{"min_backoff_seconds":0.01,"max_backoff_seconds":0.05}`

func TestTasksFromRequestToTarget(t *testing.T) {
	t.Parallel()
	p := start(t, "serve", "DATABASE_URL="+pgtest.URL(t))
	release := make(chan struct{})
	target := newTarget(t, func(w http.ResponseWriter, r *http.Request, nth int) {
		switch {
		case r.URL.Path == "/flaky" && nth <= 2:
			http.Error(w, "not yet", http.StatusInternalServerError)
		case r.URL.Path == "/busy" && nth == 1:
			w.Header().Set("Retry-After", "1")
			w.WriteHeader(http.StatusServiceUnavailable)
		case r.URL.Path == "/hangs":
			<-release
		default:
			statusOf(w, r, nth)
		}
	})
	t.Cleanup(func() { close(release) }) // before the target closes
	attemptsOf := func(tk taskJSON) (outcomes []string) {
		for _, a := range tk.Attempts {
			status := 0
			if a.StatusCode != nil {
				status = *a.StatusCode
			}
			outcomes = append(outcomes, fmt.Sprint(a.Number, " ", a.Outcome, " ", status))
		}
		return outcomes
	}

	for name, tt := range map[string]struct {
		path, body string // BODY in the request: {"url": target.url + path, body}
		endpoint   string
		state      string
		reason     string
		attempts   []string
	}{
		"success": {path: "/200", body: `"payload":{"song_id":42}`, state: "succeeded", attempts: []string{"1 succeeded 200"}},
		"500 twice, then 200": {path: "/flaky", body: quickly, state: "succeeded",
			attempts: []string{"1 retryable 500", "2 retryable 500", "3 succeeded 200"}},
		"a 4xx is final": {path: "/404", body: quickly, state: "failed", reason: "client_error", attempts: []string{"1 permanent 404"}},
		"a 4xx that is retried on request": {path: "/409", body: `"retry":{"min_backoff_seconds":0.01,"max_attempts":2,"retry_client_errors":true}`,
			state: "failed", reason: "attempts_exhausted", attempts: []string{"1 permanent 409", "2 permanent 409"}},
		"a redirect is not followed": {path: "/302", body: quickly, state: "failed", reason: "client_error", attempts: []string{"1 permanent 302"}},
		"attempts run out": {path: "/503", body: `"retry":{"min_backoff_seconds":0.01,"max_attempts":3}`,
			state: "failed", reason: "attempts_exhausted", attempts: []string{"1 retryable 503", "2 retryable 503", "3 retryable 503"}},
		"the retry duration runs out": {path: "/500", body: `"retry":{"min_backoff_seconds":60,"max_retry_duration_seconds":1}`,
			state: "failed", reason: "retry_duration_exhausted", attempts: []string{"1 retryable 500"}},
		"Retry-After raises the wait": {path: "/busy", body: quickly, state: "succeeded", attempts: []string{"1 retryable 503", "2 succeeded 200"}},
		"timeout": {path: "/hangs", body: `"timeout_seconds":0.2,"retry":{"max_attempts":1}`,
			state: "failed", reason: "attempts_exhausted", attempts: []string{"1 retryable 0"}},
		"expired": {path: "/200/expired", body: `"expires_at":"2020-01-01T00:00:00Z"`, state: "failed", reason: "expired"},
		"scheduled for later": {path: "/200/later", body: `"delay_seconds":1`, endpoint: "/schedule", state: "succeeded",
			attempts: []string{"1 succeeded 200"}},
		"scheduled for the past": {path: "/200/past", body: `"run_at":"2020-02-29T00:00:00","time_zone":"Europe/Berlin"`,
			endpoint: "/schedule", state: "succeeded", attempts: []string{"1 succeeded 200"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			endpoint := "/enqueue"
			if tt.endpoint != "" {
				endpoint = tt.endpoint
			}
			submitted := p.submit(endpoint, `{"url":"`+target.url+tt.path+`",`+tt.body+`}`)
			if submitted.State != "pending" && submitted.State != "running" {
				t.Errorf("the answer's state is %s, want pending, or running where a slot was free", submitted.State)
			}
			got := p.await(submitted.ID, ended)
			reason := ""
			if got.Reason != nil {
				reason = *got.Reason
			}
			if got.State != tt.state || reason != tt.reason {
				t.Errorf("ended as %s %q, want %s %q", got.State, reason, tt.state, tt.reason)
			}
			if diff := cmp.Diff(tt.attempts, attemptsOf(got)); diff != "" {
				t.Errorf("attempts (-want +got):\n%s", diff)
			}
			calls := target.got(tt.path)
			if len(calls) != len(tt.attempts) {
				t.Errorf("the target was called %d times, want %d", len(calls), len(tt.attempts))
			}
			for i, c := range calls {
				if id, n := c.header.Get("Orchestrator-Task-Id"), c.header.Get("Orchestrator-Attempt"); id != got.ID || n != fmt.Sprint(i+1) {
					t.Errorf("call %d says task %s, attempt %s; want %s, %d", i, id, n, got.ID, i+1)
				}
			}
			for _, a := range got.Attempts {
				// By the database's clock, all of it: nothing runs before its run_at.
				if a.Number == 1 && a.StartedAt.Before(submitted.RunAt) {
					t.Errorf("started at %v, before its run_at %v", a.StartedAt, submitted.RunAt)
				}
			}
		})
	}
	t.Run("the call is what was asked for", func(t *testing.T) {
		t.Parallel()
		submitted := p.submit("/enqueue", `{"url":"`+target.url+`/200/exact?q=1","method":"PUT","headers":{"X-Tenant":"melodia","Authorization":"Bearer s3cret"},
			"payload": {"n":  12345678901234567890.10, "s":"\u0000"}}`)
		if got := submitted.Headers["Authorization"]; got != "[redacted]" {
			t.Errorf("Authorization reads back as %q, want [redacted]", got)
		}
		p.await(submitted.ID, ended)
		calls := target.got("/200/exact")
		if len(calls) != 1 {
			t.Fatalf("%d calls, want 1", len(calls))
		}
		c := calls[0]
		if want := `{"n":  12345678901234567890.10, "s":"\u0000"}`; c.body != want || c.method != http.MethodPut {
			t.Errorf("call was %s %s, want PUT %s", c.method, c.body, want)
		}
		for name, want := range map[string]string{
			"X-Tenant": "melodia", "Authorization": "Bearer s3cret", "Content-Type": "application/json", "User-Agent": "orchestrator/dev",
			"Orchestrator-Max-Attempts": "14", "Orchestrator-Run-At": submitted.RunAt.Format("2006-01-02T15:04:05.000000Z"),
		} {
			if got := c.header.Get(name); got != want {
				t.Errorf("header %s = %q, want %q", name, got, want)
			}
		}
	})
	t.Run("Retry-After was waited for", func(t *testing.T) {
		t.Parallel()
		eventually(t, func() bool { return len(target.got("/busy")) == 2 }, func() string { return "no second call" })
		calls := target.got("/busy")
		if gap := calls[1].at.Sub(calls[0].at); gap < time.Second {
			t.Errorf("the second call came after %v, want a second at least", gap)
		}
	})
}

// What a call carries reaches the target, is kept through a redrive, and reads back,
// byte for byte.
func TestBodiesFromRequestToTarget(t *testing.T) {
	t.Parallel()
	p := start(t, "serve", "DATABASE_URL="+pgtest.URL(t))
	target := newTarget(t, statusOf)
	for name, tt := range map[string]struct{ field, body, contentType, shown string }{
		"number":  {`"payload":{ "n" : [1e999, -0, 1.0] }`, `{ "n" : [1e999, -0, 1.0] }`, "application/json", `"payload":{ "n" : [1e999, -0, 1.0] }}`},
		"digits":  {`"payload":` + strings.Repeat("7", 10_000), strings.Repeat("7", 10_000), "application/json", `"payload":` + strings.Repeat("7", 10_000) + `}`},
		"text":    {`"body":"a line\n"`, "a line\n", "text/plain; charset=utf-8", `"body":"a line\n"}`},
		"bytes":   {`"body_base64":"AP_-Cg"`, "\x00\xff\xfe\n", "application/octet-stream", `"body_base64":"AP/+Cg=="}`},
		"nothing": {`"body_base64":""`, "", "application/octet-stream", `"body_base64":""}`},
	} {
		path := "/404/" + name
		request := `{"url":"` + target.url + path + `",` + tt.field + `}`
		id := p.submit("/enqueue", request).ID
		p.await(id, ended)
		if a := p.do(http.MethodPost, "/tasks/"+id+"/redrive", ""); a.status != http.StatusOK {
			t.Errorf("%s: redrive: %d %s", name, a.status, a.raw)
		}
		p.await(id, func(got taskJSON) bool { return ended(got) && len(got.Attempts) == 2 })
		if a := p.do(http.MethodPost, "/worker-endpoint", request); a.status != http.StatusBadGateway {
			t.Errorf("%s: at /worker-endpoint: %d %s", name, a.status, a.raw)
		}
		envelope := `{"message":{"data":"` + base64.StdEncoding.EncodeToString([]byte(request)) + `","messageId":"1"},"subscription":"s"}`
		if a := p.do(http.MethodPost, "/worker-endpoint", envelope); a.status != http.StatusBadGateway {
			t.Errorf("%s: pushed by Pub/Sub: %d %s", name, a.status, a.raw)
		}
		calls := target.got(path)
		if len(calls) != 4 {
			t.Errorf("%s: %d calls, want 4", name, len(calls))
		}
		for _, c := range calls {
			if c.body != tt.body || c.header.Get("Content-Type") != tt.contentType {
				t.Errorf("%s: the target got %q as %s, want %q as %s", name, c.body, c.header.Get("Content-Type"), tt.body, tt.contentType)
			}
		}
		if a := p.do(http.MethodGet, "/tasks/"+id+"?include=payload", ""); a.status != http.StatusOK || !strings.HasSuffix(strings.TrimSpace(a.raw), ","+tt.shown) {
			t.Errorf("%s: it reads back as %d %s, want %s at the end", name, a.status, a.raw, tt.shown)
		}
	}
}

func TestWorkerEndpoint(t *testing.T) {
	t.Parallel()
	p := start(t, "serve", "DATABASE_URL="+pgtest.URL(t))
	target := newTarget(t, statusOf)
	post := func(body string) answer { t.Helper(); return p.do(http.MethodPost, "/worker-endpoint", body) }

	if a := post(`{"url":"` + target.url + `/200","payload":1}`); a.status != http.StatusOK ||
		!strings.Contains(a.raw, `"outcome":"succeeded"`) || !strings.Contains(a.raw, `"response_excerpt":"answered 200"`) {
		t.Errorf("a request in the body: %d %s, want 200 and its outcome", a.status, a.raw)
	}
	if a := post(`{"url":"` + target.url + `/404"}`); a.status != http.StatusBadGateway || !strings.Contains(a.raw, `"status_code":404`) {
		t.Errorf("a target that answers 404: %d %s, want 502", a.status, a.raw)
	}
	eventually(t, func() bool { return p.do(http.MethodGet, "/health", "").status == http.StatusOK },
		func() string { return "the instance does not register" })
	later := p.submit("/schedule", `{"url":"`+target.url+`/200/stored","delay_seconds":3600}`)
	if a := post(`{"task_id":"` + later.ID + `"}`); a.status != http.StatusOK {
		t.Errorf("a stored task: %d %s, want 200", a.status, a.raw)
	}
	if got := p.await(later.ID, ended); got.State != "succeeded" || len(target.got("/200/stored")) != 1 {
		t.Errorf("the stored task is %s after %d calls, want succeeded after 1", got.State, len(target.got("/200/stored")))
	}
	if a := post(`{"task_id":"` + later.ID + `"}`); a.status != http.StatusConflict {
		t.Errorf("a task that has ended: %d %s, want 409", a.status, a.raw)
	}
	if a := post(`{"task_id":"01939e0c-5c1e-7cc1-b1a6-9d8a4d6c1a2b"}`); a.status != http.StatusNotFound {
		t.Errorf("an unknown task: %d %s, want 404", a.status, a.raw)
	}
	// A call to ourselves through ourselves; the inner one is refused.
	inner := `{"url":"` + target.url + `/200/inner"}`
	if a := post(`{"url":"` + p.url + `/worker-endpoint","payload":` + inner + `}`); a.status != http.StatusBadGateway ||
		!strings.Contains(a.raw, `"status_code":508`) || len(target.got("/200/inner")) != 0 {
		t.Errorf("a loop: %d %s, want 502 because of 508", a.status, a.raw)
	}
	// A stored task may call our /worker-endpoint once.
	once := p.submit("/enqueue", `{"url":"`+p.url+`/worker-endpoint","payload":`+inner+`}`)
	if got := p.await(once.ID, ended); got.State != "succeeded" || len(target.got("/200/inner")) != 1 {
		t.Errorf("a task for our own /worker-endpoint: %s, want succeeded", compact(t, got))
	}
}

func TestTwoInstancesShareTheWork(t *testing.T) {
	t.Parallel()
	const n = 200
	// Held until more calls are under way than one instance has slots for.
	var arrived sync.WaitGroup
	arrived.Add(3)
	target := newTarget(t, func(w http.ResponseWriter, r *http.Request, nth int) {
		if nth <= 3 {
			arrived.Done()
			arrived.Wait()
		}
		statusOf(w, r, nth)
	})
	database := "DATABASE_URL=" + pgtest.URL(t)
	// Few slots, so that no single instance can take everything at once.
	instances := []*process{
		start(t, "serve", database, "DISPATCH_CONCURRENCY=2", "POLL_INTERVAL=50ms"),
		start(t, "serve", database, "DISPATCH_CONCURRENCY=2", "POLL_INTERVAL=50ms"),
	}
	var callers sync.WaitGroup
	ids := make([]string, n)
	for i := range n {
		callers.Go(func() {
			ids[i] = instances[0].submit("/enqueue", `{"url":"`+target.url+`/200/shared"}`).ID
		})
	}
	callers.Wait()
	for _, id := range ids {
		if got := instances[1].await(id, ended); got.State != "succeeded" || got.AttemptCount != 1 {
			t.Errorf("task %s: %s", id, compact(t, got))
		}
	}
	if calls := len(target.got("/200/shared")); calls != n {
		t.Errorf("the target was called %d times, want %d: each task once", calls, n)
	}
}
