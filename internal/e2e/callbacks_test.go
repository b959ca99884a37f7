package e2e

import (
	"encoding/json"
	"net/http"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/melodia/orchestrator/internal/postgres/pgtest"
)

// From the request to the call that tells the end, without waiting for a look
// for due tasks; and what becomes of the callback itself.
func TestCallbacks(t *testing.T) {
	t.Parallel()
	p := start(t, "serve", "DATABASE_URL="+pgtest.URL(t), "POLL_INTERVAL=1h", "RETRY_MIN_BACKOFF=10ms", "RETRY_MAX_ATTEMPTS=4", "TASK_TIMEOUT=7s")
	target := newTarget(t, func(w http.ResponseWriter, r *http.Request, nth int) {
		switch {
		case r.URL.Path == "/no" && nth == 1:
			w.WriteHeader(http.StatusServiceUnavailable)
		case r.URL.Path == "/again" && nth > 1:
		case r.URL.Path == "/again":
			w.WriteHeader(http.StatusNotFound)
		default:
			statusOf(w, r, nth)
		}
	})
	type told struct {
		ID                  string            `json:"id"`
		State               string            `json:"state"`
		Reason              *string           `json:"reason"`
		AttemptCount        int               `json:"attempt_count"`
		LastStatusCode      *int              `json:"last_status_code"`
		LastError           *string           `json:"last_error"`
		LastResponseExcerpt *string           `json:"last_response_excerpt"`
		Labels              map[string]string `json:"labels"`
		FinishedAt          *time.Time        `json:"finished_at"`
	}
	// ends waits for the nth call of a path and returns what it tells.
	ends := func(path string, nth int) (c call, end told) {
		t.Helper()
		eventually(t, func() bool { return len(target.got(path)) >= nth }, func() string { return "nobody was told at " + path })
		c = target.got(path)[nth-1]
		if err := json.Unmarshal([]byte(c.body), &end); err != nil {
			t.Fatalf("%s was told %s: %v", path, c.body, err)
		}
		return c, end
	}
	text := func(s string) *string { return &s }
	number := func(n int) *int { return &n }
	callbacks := `"labels":{"kind":"play"},"on_success":{"url":"` + target.url + `/yes","headers":{"Authorization":"Bearer s3cret"}},"on_failure":{"url":"` + target.url + `/no"}`

	succeeds := p.submit("/enqueue", `{"url":"`+target.url+`/200",`+callbacks+`}`)
	c, got := ends("/yes", 1)
	succeeds = p.await(succeeds.ID, ended)
	if diff := cmp.Diff(told{succeeds.ID, "succeeded", nil, 1, number(200), nil, text("answered 200"), map[string]string{"kind": "play"}, succeeds.FinishedAt}, got); diff != "" {
		t.Errorf("success (-want +got):\n%s", diff)
	}
	callback := p.await(c.header.Get("Orchestrator-Task-Id"), ended)
	if callback.ID == succeeds.ID || callback.State != "succeeded" || c.method != http.MethodPost ||
		c.header.Get("Content-Type") != "application/json" || c.header.Get("Authorization") != "Bearer s3cret" || c.header.Get("Orchestrator-Max-Attempts") != "4" {
		t.Errorf("the callback is %s, called with %s %v", compact(t, callback), c.method, c.header)
	}

	// The first call of the callback is answered 503: it is tried again.
	fails := p.submit("/schedule", `{"url":"`+target.url+`/404","delay_seconds":0.01,`+callbacks+`}`)
	for nth := range 2 {
		if c, got = ends("/no", nth+1); got.ID != fails.ID || got.State != "failed" || got.Reason == nil || *got.Reason != "client_error" {
			t.Errorf("told of %s, want of a client error of %s", compact(t, got), fails.ID)
		}
	}
	found := p.do(http.MethodGet, "/tasks?label.callback_of="+fails.ID, "")
	var page struct{ Tasks []taskJSON }
	if err := json.Unmarshal([]byte(found.raw), &page); err != nil || len(page.Tasks) != 1 || page.Tasks[0].ID != c.header.Get("Orchestrator-Task-Id") {
		t.Errorf("the label callback_of finds %s, want the callback", found.raw)
	}

	// Each end of a task that is redriven is told.
	again := p.submit("/enqueue", `{"url":"`+target.url+`/again",`+callbacks+`}`)
	if _, got = ends("/no", 3); got.ID != again.ID {
		t.Errorf("told of %s, want of %s", compact(t, got), again.ID)
	}
	p.await(again.ID, ended)
	if a := p.do(http.MethodPost, "/tasks/"+again.ID+"/redrive", ""); a.status != http.StatusOK {
		t.Fatalf("redrive: %d %s", a.status, a.raw)
	}
	if _, got = ends("/yes", 2); got.ID != again.ID || got.State != "succeeded" {
		t.Errorf("told of %s, want of the success of %s", compact(t, got), again.ID)
	}

	// A cancelled task has no callback, nor has any other task here.
	cancelled := p.submit("/schedule", `{"url":"`+target.url+`/200","delay_seconds":3600,`+callbacks+`}`)
	if a := p.do(http.MethodPost, "/tasks/"+cancelled.ID+"/cancel", ""); a.status != http.StatusOK {
		t.Fatalf("cancel: %d %s", a.status, a.raw)
	}
	if found := p.do(http.MethodGet, "/tasks?label.callback_of="+cancelled.ID, ""); found.raw != `{"tasks":[],"next_cursor":null}` {
		t.Errorf("the cancelled task has callbacks: %s", found.raw)
	}
}
