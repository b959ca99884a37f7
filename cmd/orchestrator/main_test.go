package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"

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
			"Orchestrator-Max-Attempts": "10", "Orchestrator-Run-At": submitted.RunAt.Format("2006-01-02T15:04:05.000000Z"),
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

// SIGTERM with a call in flight: the process is gone in time, the attempt is
// not counted, and another process carries the task out.
func TestShutdownGivesRunningTasksBack(t *testing.T) {
	t.Parallel()
	database := "DATABASE_URL=" + pgtest.URL(t)
	release := make(chan struct{})
	arrived := make(chan struct{}, 1)
	target := newTarget(t, func(w http.ResponseWriter, r *http.Request, nth int) {
		if nth == 1 {
			arrived <- struct{}{}
			select {
			case <-release:
			case <-r.Context().Done():
			}
		}
	})
	t.Cleanup(func() { close(release) })

	first := start(t, "serve", database, "SHUTDOWN_GRACE=1s")
	submitted := first.submit("/enqueue", `{"url":"`+target.url+`/slow"}`)
	<-arrived
	if took := first.stop(syscall.SIGTERM); took > 10*time.Second {
		t.Errorf("stopping took %v, want less than 10 s", took)
	}
	if code := first.cmd.ProcessState.ExitCode(); code != 0 {
		t.Errorf("exit code %d, want 0", code)
	}

	reader := start(t, "serve", database, "DISPATCH=false")
	got := reader.do(http.MethodGet, "/tasks/"+submitted.ID, "").task
	if got.State != "pending" || got.AttemptCount != 0 || len(got.Attempts) != 1 || got.Attempts[0].Outcome != "interrupted" {
		t.Errorf("after the stop: %s, want pending, no attempt counted, one interrupted", compact(t, got))
	}
	second := start(t, "serve", database)
	got = second.await(submitted.ID, ended)
	if got.State != "succeeded" || got.AttemptCount != 1 || got.Attempts[len(got.Attempts)-1].Number != 1 {
		t.Errorf("at the end: %s, want succeeded by attempt number 1", compact(t, got))
	}
	if n := len(target.got("/slow")); n != 2 {
		t.Errorf("the target was called %d times, want 2", n)
	}
}

func TestShutdownLetsQuickCallsEnd(t *testing.T) {
	t.Parallel()
	arrived, release := make(chan struct{}), make(chan struct{})
	target := newTarget(t, func(http.ResponseWriter, *http.Request, int) {
		close(arrived)
		<-release
	})
	database := "DATABASE_URL=" + pgtest.URL(t)
	p := start(t, "serve", database, "SHUTDOWN_GRACE=1m")
	submitted := p.submit("/enqueue", `{"url":"`+target.url+`/quick"}`)
	<-arrived
	var stopping sync.WaitGroup
	stopping.Go(func() { p.stop(syscall.SIGTERM) })
	// It serves until its calls have ended, and says that it is not ready.
	eventually(t, func() bool { return p.do(http.MethodGet, "/health", "").status == http.StatusServiceUnavailable },
		func() string { return "/health does not say 503 while stopping" })
	if a := p.do(http.MethodGet, "/health/live", ""); a.status != http.StatusOK {
		t.Errorf("/health/live = %d while stopping, want 200", a.status)
	}
	close(release)
	stopping.Wait()
	reader := start(t, "serve", database, "DISPATCH=false")
	if got := reader.do(http.MethodGet, "/tasks/"+submitted.ID, "").task; got.State != "succeeded" || len(got.Attempts) != 1 {
		t.Errorf("task is %s, want succeeded", compact(t, got))
	}
}

// A call that /worker-endpoint makes without storing it has the same grace; what
// is cut off is answered all the same.
func TestShutdownWithCallsOfTheWorkerEndpoint(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		grace  string
		ends   bool // the target answers in time
		status int
	}{
		"ends within the grace": {"1m", true, http.StatusOK},
		"is cut off":            {"100ms", false, http.StatusServiceUnavailable},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			arrived, release := make(chan struct{}), make(chan struct{})
			target := newTarget(t, func(_ http.ResponseWriter, r *http.Request, _ int) {
				close(arrived)
				select {
				case <-release:
				case <-r.Context().Done():
				}
			})
			p := start(t, "serve", "DATABASE_URL="+pgtest.URL(t), "SHUTDOWN_GRACE="+tt.grace)
			var calling sync.WaitGroup
			calling.Go(func() {
				if a := p.do(http.MethodPost, "/worker-endpoint", `{"url":"`+target.url+`/adhoc"}`); a.status != tt.status {
					t.Errorf("answer = %d %s, want %d", a.status, a.raw, tt.status)
				}
			})
			<-arrived
			calling.Go(func() { p.stop(syscall.SIGTERM) })
			if tt.ends {
				eventually(t, func() bool { return strings.Contains(strings.Join(p.lines(), "\n"), `"msg":"stopping"`) },
					func() string { return "the process does not stop" })
				close(release)
			}
			calling.Wait()
			if code := p.cmd.ProcessState.ExitCode(); code != 0 {
				t.Errorf("exit code %d, want 0", code)
			}
		})
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

func TestBadSettings(t *testing.T) {
	t.Setenv("DATABASE_URL", "postgres://u:hunter2@127.0.0.1:1/db?sslmode=nonsense")
	t.Setenv("PORT", "0")
	t.Setenv("AUTH", "none")
	for name, tt := range map[string]struct {
		env  map[string]string
		want []string
	}{
		"no database":              {map[string]string{"DATABASE_URL": ""}, []string{"DATABASE_URL is not set"}},
		"several mistakes":         {map[string]string{"PORT": "x", "POLL_INTERVAL": "1"}, []string{"PORT must be a whole number", "POLL_INTERVAL must be a duration"}},
		"nobody said who may call": {map[string]string{"AUTH": ""}, []string{"AUTH is not set", "api_key", "orchestrator dev"}},
		"open to the world":        {map[string]string{"K_SERVICE": "orchestrator"}, []string{"AUTH must not be none on Cloud Run"}},
		"IAM that is not there":    {map[string]string{"AUTH": "iam"}, []string{"AUTH must not be iam outside of Cloud Run"}},
		"keys without entries":     {map[string]string{"AUTH": "api_key"}, []string{"API_KEYS is not set", "orchestrator key NAME SCOPES"}},
		"a key in the wrong place": {map[string]string{"AUTH": "api_key", "API_KEYS": "hunter2"}, []string{"API_KEYS, entry 1: it must be name:scopes:sha256"}},
		"a URL of no sort":         {nil, []string{"DATABASE_URL is not valid"}},
		"a host that is a URL":     {map[string]string{"TARGET_ALLOW_HOSTS": "https://x:1/"}, []string{"TARGET_ALLOW_HOSTS"}},
		"a host for tokens":        {map[string]string{"OIDC_TARGET_HOSTS": "plays.melodia.app,https://hunter2"}, []string{"OIDC_TARGET_HOSTS: entry 2"}},
		"a signing secret":         {map[string]string{"SIGNING_SECRETS": "hunter2"}, []string{"SIGNING_SECRETS: entry 1: must be whsec_"}},
		"no folder":                {map[string]string{"SECRET_HOSTS": "hunter2=.melodia.app"}, []string{"SECRETS_DIR must be a folder, since SECRET_HOSTS is set"}},
		"a host for secrets":       {map[string]string{"SECRET_HOSTS": "hunter2", "SECRETS_DIR": t.TempDir()}, []string{"SECRET_HOSTS: entry 1"}},
	} {
		t.Run(name, func(t *testing.T) {
			for key, value := range tt.env {
				t.Setenv(key, value)
			}
			var stdout, stderr bytes.Buffer
			if code := run(t.Context(), []string{"serve"}, &stdout, &stderr); code != 1 {
				t.Errorf("exit code %d, want 1", code)
			}
			for _, want := range tt.want {
				if !strings.Contains(stderr.String(), want) {
					t.Errorf("stderr = %q, want a line with %q", stderr.String(), want)
				}
			}
			if strings.Contains(stderr.String()+stdout.String(), "hunter2") {
				t.Errorf("the password is shown: %s%s", stdout.String(), stderr.String())
			}
		})
	}
}

func TestCommands(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		args   []string
		code   int
		stdout string
		stderr string
	}{
		"version":            {[]string{"version"}, 0, "dev\n", ""},
		"help":               {[]string{"help"}, 0, usage, ""},
		"help as a flag":     {[]string{"--help"}, 0, usage, ""},
		"an unknown command": {[]string{"srve"}, 2, "", usage},
		"a key for nobody":   {[]string{"key", "plays"}, 2, "", usage},
		"a key for nothing":  {[]string{"key", "plays", "write"}, 1, "", "orchestrator: scopes must be of submit, read, manage, internal, joined by +\n"},
		"too many arguments": {[]string{"version", "now"}, 2, "", usage},
	} {
		var stdout, stderr bytes.Buffer
		if code := run(t.Context(), tt.args, &stdout, &stderr); code != tt.code || stdout.String() != tt.stdout || stderr.String() != tt.stderr {
			t.Errorf("%s: %d, %q, %q; want %d, %q, %q", name, code, stdout.String(), stderr.String(), tt.code, tt.stdout, tt.stderr)
		}
	}
}

func TestMigrate(t *testing.T) {
	t.Setenv("DATABASE_URL", pgtest.EmptyURL(t))
	files, err := filepath.Glob("../../migrations/*.sql")
	if err != nil {
		t.Fatal(err)
	}
	for _, applied := range []int{len(files), 0} {
		want := fmt.Sprintf("migrations applied: %d\n", applied)
		var stdout, stderr bytes.Buffer
		if code := run(t.Context(), []string{"migrate"}, &stdout, &stderr); code != 0 || stdout.String() != want {
			t.Errorf("migrate: %d, %q, %q; want 0, %q", code, stdout.String(), stderr.String(), want)
		}
	}
}

func TestCommittedDocumentIsFresh(t *testing.T) {
	t.Parallel()
	committed, err := os.ReadFile("../../api/openapi.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var stdout, stderr bytes.Buffer
	if code := run(t.Context(), []string{"openapi"}, &stdout, &stderr); code != 0 {
		t.Fatalf("openapi: exit code %d: %s", code, stderr.String())
	}
	if diff := cmp.Diff(string(committed), stdout.String()); diff != "" {
		t.Errorf("api/openapi.yaml is stale; run: go run ./cmd/orchestrator openapi > api/openapi.yaml\n%s", diff)
	}
}

// What dev prints works as it is, with the key that it makes where AUTH wants one.
func TestDev(t *testing.T) {
	t.Parallel()
	for _, auth := range []string{"none", "api_key"} {
		t.Run(auth, func(t *testing.T) {
			t.Parallel()
			p := start(t, "dev", "DATABASE_URL="+pgtest.URL(t), "TARGET_ALLOW_NETWORKS=", "AUTH="+auth, "TARGET_ALOW_HOSTS=hunter2")
			eventually(t, func() bool { return p.count("End with Ctrl-C") > 0 }, func() string { return "dev does not say that it is ready" })
			printed := strings.Join(p.lines(), "\n")
			header := http.Header{}
			argument := ""
			if auth == "api_key" {
				key := regexp.MustCompile(`export ORCHESTRATOR_KEY=(ork_\S{43})\n`).FindStringSubmatch(printed)
				if key == nil {
					t.Fatalf("dev prints no key:\n%s", printed)
				}
				header.Set("Authorization", "Bearer "+key[1])
				argument = ` -H "Authorization: Bearer \$ORCHESTRATOR_KEY"`
			}
			commands := regexp.MustCompile(`curl -i -w '\\n' (\S+)`+argument+` -H 'Content-Type: application/json' \\\n\s+-d '([^']*)'`).FindAllStringSubmatch(printed, -1)
			if len(commands) != 2 {
				t.Fatalf("dev prints %d commands, want 2:\n%s", len(commands), printed)
			}
			for _, c := range commands {
				submitted := p.send(http.MethodPost, strings.TrimPrefix(c[1], p.url), c[2], header)
				if submitted.status != http.StatusAccepted {
					t.Fatalf("%s: %d %s", c[0], submitted.status, submitted.raw)
				}
				got := p.send(http.MethodGet, "/tasks/"+submitted.task.ID+"?wait_seconds=30", "", header)
				if got.task.State != "succeeded" {
					t.Errorf("%s: %s", c[0], got.raw)
				}
			}
			for _, want := range []string{echoMessage, `song_id`, "Your mix is ready", p.url + "/docs", "Ready in ", "echo target", "data ", "TARGET_ALOW_HOSTS", "TARGET_ALLOW_HOSTS"} {
				p.logs(want)
			}
			if p.count("hunter2") > 0 {
				t.Error("the value of a misspelt setting is shown")
			}
			if a := p.do(http.MethodGet, "/docs/index.html", ""); a.status != http.StatusOK || !strings.Contains(a.raw, "swagger-ui") {
				t.Errorf("/docs/index.html = %d", a.status)
			}
			if p.stop(syscall.SIGINT); p.cmd.ProcessState.ExitCode() != 0 {
				t.Errorf("exit code %d after Ctrl-C, want 0", p.cmd.ProcessState.ExitCode())
			}
		})
	}
}

func TestDevRefusesArguments(t *testing.T) {
	t.Setenv("DATABASE_URL", "postgres://127.0.0.1:1/x")
	for name, tt := range map[string]struct {
		args []string
		code int
		want string
	}{
		"an unknown flag":              {[]string{"dev", "--prot", "1"}, 2, usage},
		"an argument":                  {[]string{"dev", "now"}, 2, usage},
		"no port":                      {[]string{"dev", "--port", "70000"}, 1, "--port must be between 0 and 65535"},
		"fresh, with another database": {[]string{"dev", "--fresh"}, 1, "DATABASE_URL is set"},
	} {
		var stdout, stderr bytes.Buffer
		if code := run(t.Context(), tt.args, &stdout, &stderr); code != tt.code || !strings.Contains(stderr.String(), tt.want) {
			t.Errorf("%s: %d, %q, want %d and %q", name, code, stderr.String(), tt.code, tt.want)
		}
	}
}

func TestEcho(t *testing.T) {
	t.Parallel()
	var log bytes.Buffer
	e := &echo{log: slog.New(slog.NewTextHandler(&log, nil))}
	call := func(path, id string) int {
		r := httptest.NewRequest(http.MethodPost, path, strings.NewReader("body"))
		r.Header.Set("Orchestrator-Task-Id", id)
		r.Header.Set("Authorization", "Bearer hunter2")
		r.Header.Set("X-Tenant", "melodia")
		w := httptest.NewRecorder()
		e.ServeHTTP(w, r)
		return w.Code
	}
	for _, tt := range []struct {
		path, id string
		want     int
	}{
		{"/plays", "a", 200}, {"/status/418", "a", 418}, {"/status/99", "a", 200}, {"/status/x", "a", 200}, {"/delay/0", "a", 200}, {"/delay/-1", "a", 200},
		{"/fail/2", "a", 503}, {"/fail/2", "b", 503}, {"/fail/2", "a", 503}, {"/fail/2", "a", 200}, {"/fail/2", "b", 503}, {"/fail/2", "b", 200}, {"/fail/0", "a", 200},
	} {
		if got := call(tt.path, tt.id); got != tt.want {
			t.Errorf("%s of task %s is answered %d, want %d", tt.path, tt.id, got, tt.want)
		}
	}
	if got := log.String(); strings.Contains(got, "hunter2") || !strings.Contains(got, "[redacted]") || !strings.Contains(got, "melodia") {
		t.Errorf("the log has %s, want the headers without secrets", got)
	}
}

func TestEchoDelay(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		w := httptest.NewRecorder()
		(&echo{log: slog.New(slog.DiscardHandler)}).ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/delay/2", nil))
		if took := time.Since(began); took != 2*time.Second || w.Code != http.StatusOK {
			t.Errorf("/delay/2 answered %d after %v, want 200 after 2 s", w.Code, took)
		}
	})
}

func TestConsole(t *testing.T) {
	t.Parallel()
	lines := func(color bool) string {
		var b bytes.Buffer
		log := slog.New(&console{w: &b, color: color, level: slog.LevelInfo})
		const id = "01939e0c-5c1e-7cc1-b1a6-9d8a4d6c1a2b"
		log.Debug("task succeeded", "task_id", id, "method", "POST", "url", "http://x/plays", "max_attempts", 3, "attempt", 1, "duration_seconds", 0.0123, "status_code", 200)
		log.Info("attempt failed, will retry", "task_id", id, "method", "GET", "url", "http://x", "max_attempts", 3, "attempt", 2, "error", "connection refused\x1b[2J", "wait_seconds", 1.2)
		log.Debug("something else")
		log.Warn("cannot", "error", "why\nnot")
		return regexp.MustCompile(`\d\d:\d\d:\d\d`).ReplaceAllString(b.String(), "T")
	}
	want := "T ✓ 6c1a2b POST http://x/plays 200 attempt 1/3 12ms\n" +
		"T ↻ 6c1a2b GET http://x attempt 2/3 next try in 1.2 s connection refused [2J\n" +
		"T cannot error=why not\n"
	if diff := cmp.Diff(want, lines(false)); diff != "" {
		t.Errorf("without colours (-want +got):\n%s", diff)
	}
	if got := regexp.MustCompile(`\x1b\[\d+m`).ReplaceAllString(lines(true), ""); got != want || got == lines(true) {
		t.Errorf("with colours: %q, want the same in colours", lines(true))
	}
	for name, tt := range map[string]struct {
		env  map[string]string
		want bool
	}{
		"a terminal": {map[string]string{"TERM": "xterm"}, true}, "NO_COLOR": {map[string]string{"NO_COLOR": "1"}, false}, "dumb": {map[string]string{"TERM": "dumb"}, false},
	} {
		if got := wantsColor(func(name string) string { return tt.env[name] }); got != tt.want {
			t.Errorf("%s: colours %t, want %t", name, got, tt.want)
		}
	}
	if isTerminal(&bytes.Buffer{}) {
		t.Error("a buffer passes for a terminal")
	}
}

func TestCheck(t *testing.T) {
	t.Setenv("AUTH", "none")
	t.Setenv("PORT", "0")
	t.Setenv("TARGET_ALOW_HOSTS", "hunter2")
	migrated, empty := pgtest.URL(t), pgtest.EmptyURL(t)
	for name, tt := range map[string]struct {
		env  map[string]string
		code int
		want string // regular expression for all of stdout
	}{
		"fine":            {map[string]string{"DATABASE_URL": migrated}, 0, `^warn .*TARGET_ALLOW_HOSTS\?\nok +settings .*\nok +database +PostgreSQL .*\n(warn +database +synchronous_commit.*\n)?ok +rights .*\nok +schema +version \d+ .*nothing to migrate\n$`},
		"empty":           {map[string]string{"DATABASE_URL": empty}, 0, `ok +schema +version 0 .*the next start does\n$`},
		"not migrated":    {map[string]string{"DATABASE_URL": empty, "MIGRATE_ON_START": "false"}, 1, `FAIL +schema .*orchestrator migrate"\n$`},
		"no database":     {map[string]string{"DATABASE_URL": "postgres://u:hunter2@127.0.0.1:1/x"}, 1, `ok +settings .*\nFAIL +database .*connection refused[^\n]*\n$`},
		"wrong settings":  {map[string]string{"DATABASE_URL": migrated, "PORT": "x", "AUTH": ""}, 1, `FAIL +settings +PORT must be a whole number[^\n]*\n$`},
		"nobody may call": {map[string]string{"DATABASE_URL": migrated, "AUTH": ""}, 1, `FAIL +settings +AUTH is not set.*\nok +database`},
	} {
		t.Run(name, func(t *testing.T) {
			for key, value := range tt.env {
				t.Setenv(key, value)
			}
			var stdout, stderr bytes.Buffer
			if code := run(t.Context(), []string{"check"}, &stdout, &stderr); code != tt.code || !regexp.MustCompile(tt.want).MatchString(stdout.String()) {
				t.Errorf("check: %d\n%s%s\nwant %d and %s", code, stdout.String(), stderr.String(), tt.code, tt.want)
			}
			if strings.Contains(stdout.String()+stderr.String(), "hunter2") {
				t.Errorf("a secret is shown: %s%s", stdout.String(), stderr.String())
			}
		})
	}
}

// While migrations wait the port answers, and says for what.
func TestWaitingMigrations(t *testing.T) {
	t.Parallel()
	database := pgtest.EmptyURL(t)
	conn, err := pgx.Connect(t.Context(), database)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(context.WithoutCancel(t.Context())) })
	for _, sql := range []string{"BEGIN ISOLATION LEVEL REPEATABLE READ", "SET LOCAL application_name = 'nightly dump'", "SELECT 1"} {
		if _, err := conn.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := strconv.Itoa(listener.Addr().(*net.TCPAddr).Port)
	if err := listener.Close(); err != nil {
		t.Fatal(err)
	}
	cmd := newCommand("serve", "DATABASE_URL="+database, "PORT="+port)
	var log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	t.Cleanup(func() { _ = cmd.Process.Kill() }) // it has ended already where all went well
	get := func(method, path, body string) (status int, header http.Header, raw string) {
		r, err := http.NewRequestWithContext(t.Context(), method, "http://127.0.0.1:"+port+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Content-Type", "application/json")
		response, err := http.DefaultClient.Do(r)
		if err != nil {
			return 0, nil, err.Error()
		}
		defer func() { _ = response.Body.Close() }()
		b, err := io.ReadAll(response.Body)
		if err != nil {
			t.Fatal(err)
		}
		return response.StatusCode, response.Header, string(b)
	}
	eventually(t, func() bool {
		status, _, raw := get(http.MethodGet, "/health", "")
		return status == http.StatusServiceUnavailable && strings.Contains(raw, `nightly dump`)
	}, func() string {
		_, _, raw := get(http.MethodGet, "/health", "")
		return "/health does not say what it waits for: " + raw
	})
	for path, want := range map[string]int{"/health/live": 200, "/docs/index.html": 200, "/openapi.json": 200, "/nothing": 404, "/tasks": 503} {
		if status, _, raw := get(http.MethodGet, path, ""); status != want {
			t.Errorf("GET %s = %d %.200s, want %d", path, status, raw, want)
		}
	}
	if status, header, raw := get(http.MethodPost, "/enqueue", `{"url":"https://example.com"}`); status != http.StatusServiceUnavailable || header.Get("Retry-After") == "" {
		t.Errorf("POST /enqueue = %d %s, want 503 with Retry-After", status, raw)
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-ended:
		if err != nil {
			t.Errorf("it ended with %v, want exit code 0", err)
		}
	case <-time.After(patience):
		t.Fatal("it does not end while it waits")
	}
	if !regexp.MustCompile(`"msg":"migrating the database","reason":"migrations wait for a lock held by session \d+ \(application_name \\"nightly dump\\"`).Match(log.Bytes()) {
		t.Errorf("the log does not say what it waited for: %s", log.String())
	}
}

// Profiles are for whoever is on the machine, on a port of their own.
func TestProfiles(t *testing.T) {
	t.Parallel()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := strconv.Itoa(listener.Addr().(*net.TCPAddr).Port)
	if err := listener.Close(); err != nil {
		t.Fatal(err)
	}
	p := start(t, "serve", "DATABASE_URL="+pgtest.URL(t), "DEBUG_PORT="+port)
	if a := p.do(http.MethodGet, "/debug/pprof/", ""); a.status != http.StatusNotFound {
		t.Errorf("profiles on the service's own port: %d, want 404", a.status)
	}
	p.url = "http://127.0.0.1:" + port
	if a := p.do(http.MethodGet, "/debug/pprof/goroutine?debug=1", ""); a.status != http.StatusOK || !strings.Contains(a.raw, "goroutine profile") {
		t.Errorf("GET /debug/pprof/goroutine = %d %.100s, want a profile", a.status, a.raw)
	}
}
