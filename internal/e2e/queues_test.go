package e2e

import (
	"encoding/json"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/melodia/orchestrator/internal/postgres/pgtest"
)

// A queue from its settings to its end, over two instances, as callers see it.
func TestQueueOverHTTP(t *testing.T) {
	t.Parallel()
	database := "DATABASE_URL=" + pgtest.URL(t)
	one, two := start(t, "serve", database), start(t, "serve", database)
	release := make(chan struct{})
	target := newTarget(t, func(w http.ResponseWriter, r *http.Request, _ int) {
		if strings.HasPrefix(r.URL.Path, "/held") {
			<-release
		}
		w.WriteHeader(http.StatusOK)
	})
	free := sync.OnceFunc(func() { close(release) })
	t.Cleanup(free)
	type queue struct {
		Paused        bool `json:"paused"`
		MaxConcurrent *int `json:"max_concurrent"`
		Waiting       int  `json:"waiting"`
		Running       int  `json:"running"`
		KeysInUse     int  `json:"keys_in_use"`
	}
	see := func(p *process) (q queue) {
		t.Helper()
		a := p.do(http.MethodGet, "/queues/mail", "")
		if err := json.Unmarshal([]byte(a.raw), &q); err != nil || a.status != http.StatusOK {
			t.Fatalf("GET /queues/mail = %d %s", a.status, a.raw)
		}
		return q
	}
	want := func(a answer, status int, says string) answer {
		t.Helper()
		if a.status != status || !strings.Contains(a.raw, says) {
			t.Fatalf("got %d %s; want %d with %s", a.status, a.raw, status, says)
		}
		return a
	}

	// It exists from the first task that names it. Limits that are set later hold.
	want(one.do(http.MethodGet, "/queues/mail", ""), http.StatusNotFound, "")
	first := two.submit("/enqueue", `{"url":"`+target.url+`/held/1","queue":"mail","flow_key":"a"}`)
	want(one.do(http.MethodGet, "/queues/mail", ""), http.StatusOK, `"max_concurrent":null`)
	written := want(one.do(http.MethodPut, "/queues/mail", `{"max_concurrent":1,"defaults":{"timeout_seconds":60}}`), http.StatusOK, `"max_concurrent":1`)
	tag := http.Header{"If-Match": {written.header.Get("ETag")}}
	want(two.send(http.MethodPatch, "/queues/mail", `{"max_per_second":5000}`, tag), http.StatusOK, `"burst":5000`)
	want(one.send(http.MethodPatch, "/queues/mail", `{"max_concurrent":2}`, tag), http.StatusPreconditionFailed, "If-Match")
	one.await(first.ID, func(t taskJSON) bool { return t.State == "running" })

	second := one.submit("/enqueue", `{"url":"`+target.url+`/held/2","queue":"mail","flow_key":"b","priority":"high"}`)
	third := two.submit("/enqueue", `{"url":"`+target.url+`/3","queue":"mail"}`)
	if got := one.do(http.MethodGet, "/tasks/"+third.ID, ""); !strings.Contains(got.raw, `"timeout_seconds":60`) {
		t.Errorf("the task has not the default of its queue: %s", got.raw)
	}
	want(one.do(http.MethodGet, "/tasks/"+third.ID+"/explain", ""), http.StatusOK,
		`"It waits for a permit: the one of queue mail is in use; 1 task of that queue is ahead of it.`)
	if q := see(two); q.Waiting != 2 || q.Running != 1 || q.KeysInUse != 2 {
		t.Errorf("the queue has %+v; want 2 waiting, 1 running, 2 keys", q)
	}
	found := want(one.do(http.MethodGet, "/tasks?queue=mail&flow_key=b", ""), http.StatusOK, second.ID)
	if strings.Contains(found.raw, first.ID) {
		t.Errorf("found by another key: %s", found.raw)
	}

	// In spite of the limit and of a pause, one call by hand; no other.
	want(two.do(http.MethodPost, "/queues/mail/pause", ""), http.StatusOK, `"paused":true`)
	want(one.do(http.MethodPost, "/tasks/"+second.ID+"/run", ""), http.StatusOK, "")
	one.await(second.ID, func(t taskJSON) bool { return t.State == "running" })
	if q := see(one); q.Running != 2 || q.Waiting != 1 || !q.Paused {
		t.Errorf("the queue has %+v; want 2 running in spite of the limit", q)
	}
	want(one.do(http.MethodDelete, "/queues/mail", ""), http.StatusConflict, "purge")
	free()
	for _, id := range []string{first.ID, second.ID} {
		if got := one.await(id, ended); got.State != "succeeded" || got.AttemptCount != 1 {
			t.Errorf("%s", compact(t, got))
		}
	}
	want(one.do(http.MethodGet, "/tasks/"+third.ID+"/explain", ""), http.StatusOK, `"waiting_for":"queue_paused"`)

	want(two.do(http.MethodPost, "/queues/mail/purge", `{"filter":{"flow_key":"b"}}`), http.StatusOK, `"matched":0`)
	want(two.do(http.MethodPost, "/queues/mail/purge", `{}`), http.StatusOK, `"changed":0`)
	want(two.do(http.MethodPost, "/queues/mail/purge", `{"dry_run":false}`), http.StatusOK, `"changed":1`)
	if got := one.do(http.MethodGet, "/tasks/"+third.ID, "").task; got.State != "cancelled" || len(target.got("/3")) != 0 {
		t.Errorf("the purged task: %s, called %d times", compact(t, got), len(target.got("/3")))
	}
	want(one.do(http.MethodDelete, "/queues/mail", ""), http.StatusNoContent, "")
	want(two.do(http.MethodGet, "/queues/mail", ""), http.StatusNotFound, "")

	// Of a queue that is deleted neither limits nor a pause are left.
	start := time.Now()
	fourth := one.submit("/enqueue", `{"url":"`+target.url+`/4","queue":"mail"}`)
	if got := two.await(fourth.ID, ended); got.State != "succeeded" {
		t.Errorf("after %v: %s", time.Since(start), compact(t, got))
	}
}
