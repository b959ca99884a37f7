package httpapi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/melodia/orchestrator/internal/task"
)

func batchOf(items ...string) string { return `{"tasks":[` + strings.Join(items, ",") + `]}` }

func TestBatch(t *testing.T) {
	t.Parallel()
	s := newService(t)
	batches := 0
	s.store.insertBatch = func(_ context.Context, b *task.Batch) error {
		batches++
		if len(b.Tasks) != 4 || b.IdempotencyKey != "" {
			t.Errorf("got a batch of %d with the key %q, want 4 without", len(b.Tasks), b.IdempotencyKey)
		}
		return nil
	}
	for name, items := range map[string][]string{
		"plain": {
			with("payload", `{"n":1.50,"s":"[,]"}`), with("delay_seconds", "60"),
			`{"url":"https://example.com/local","run_at":"2030-12-24T21:00:00","time_zone":"America/Argentina/Buenos_Aires","labels":{"kind":"play"}}`,
			with("run_at", `"2030-12-24T21:00:00Z"`),
		},
		// What a type takes for absent, and what might not fit it.
		"not plain": {
			with("payload", `{"n":1.50,"s":"[,]"}`), with("delay_seconds", "6e1"),
			`{"url":"https://example.com/local","run_at":"2030-12-24T21:00:00","time_zone":"America/Argentina/Buenos_Aires","labels":{"kind":"play"}}`,
			` {"url":"` + target + `","payload":null,"run_at":"2030-12-24T21:00:00Z"} `,
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := s.on(t)
			batches = 0
			a := s.post("/tasks/batch", batchOf(items...))
			tasks := s.store.taken()
			if a.status != http.StatusAccepted || batches != 1 || len(tasks) != 4 {
				t.Fatalf("got %d, %d batches and %d tasks: %s", a.status, batches, len(tasks), clipped(a.text))
			}
			want := []time.Time{storedAt, storedAt.Add(time.Minute), time.Date(2030, 12, 25, 0, 0, 0, 0, time.UTC), time.Date(2030, 12, 24, 21, 0, 0, 0, time.UTC)}
			for i, stored := range tasks {
				if stored.State != task.Pending || !stored.RunAt.Equal(want[i]) {
					t.Errorf("task %d is %s and due at %v, want pending at %v", i, stored.State, stored.RunAt, want[i])
				}
				// In order, and each as it is shown alone.
				shown, err := json.Marshal(a.at("tasks", i))
				if err != nil {
					t.Fatal(err)
				}
				alone, err := encode(taskView(stored))
				if err != nil {
					t.Fatal(err)
				}
				var v any
				if err := json.Unmarshal(alone, &v); err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(v, a.at("tasks", i)); diff != "" {
					t.Errorf("task %d is shown as %s (-alone +in the batch):\n%s", i, shown, diff)
				}
			}
			if got := string(tasks[0].Body); got != `{"n":1.50,"s":"[,]"}` {
				t.Errorf("got the body %s, want the bytes that were sent", got)
			}
		})
	}
}

// Whatever is wrong with a task is wrong with it in a batch, and is said in the
// same words, with its number. Nothing is stored then.
func TestBatchNamesEveryBadTask(t *testing.T) {
	t.Parallel()
	s := newService(t, func(o *settings) {
		o.Policy = fakePolicy(func(url string) error {
			if strings.Contains(url, "forbidden") {
				return errors.New("names a host that the target policy does not allow")
			}
			return nil
		})
		o.Secrets = fakeSecrets(func(string, string) error { return errors.New("refers to a secret that is not there") })
		o.Identity = fakePolicy(func(string) error { return errors.New("is not admitted for this target") })
	})
	bad := []string{
		`{}`, `[]`, `null`, `"` + marker + `"`, `{"url":""}`, `{"url":5}`, `{"url":"ftp://` + marker + `/"}`, `{"url":"https://forbidden.example/"}`,
		with("x", `1`), with("x.y[0]", `1`), with("method", `"TRACE"`), with("headers", `{"Host":"`+marker+`"}`), with("headers", `{"a.b[0]":1,"c":2}`),
		with("headers", `{"X-A":"${secret:a}"}`), with("auth", `{"type":"oidc"}`), with("auth", `{"type":"`+marker+`","audience":""}`),
		with("payload", `1,"body":"x"`), with("payload", `1,"body_base64":"AA"`), with("body_base64", `"A"`), with("timeout_seconds", `0`), withRetry("max_attempts", `101`), withRetry("max_attempts", `1.5`),
		with("retry", `{"min_backoff_seconds":10,"max_backoff_seconds":1}`), with("labels", object(17, "l", `""`)), with("labels", `{"":"x"}`),
		with("expires_at", `"`+marker+`"`), with("expires_at", `"2020-01-01T00:00:00Z","run_at":"2030-01-01T00:00:00Z"`),
		with("run_at", `"2030-01-01T00:00:00"`), with("run_at", `"2090-01-01T00:00:00Z"`), with("run_at", `"2030-01-01T00:00:00Z","delay_seconds":1`),
		with("delay_seconds", `-1`), with("delay_seconds", `1e12`), with("time_zone", `"UTC","delay_seconds":1`), with("time_zone", `"`+marker+`","run_at":"2030-01-01T00:00:00"`),
		with("time_zone", `"UTC"`), object(maxMembers+1, "a", "1"),
	}
	for _, item := range bad {
		path := "/enqueue"
		if strings.Contains(item, "run_at") || strings.Contains(item, "delay_seconds") || strings.Contains(item, "time_zone") {
			path = "/schedule"
		}
		alone := s.post(path, item)
		s.nothingHappened(alone)
		var want []string
		for _, e := range alone.errors() {
			want = append(want, strings.Replace(e, `["body"`, `["body","tasks",2`, 1))
		}
		if alone.status == http.StatusBadRequest { // it is the whole body there
			want = []string{`["body","tasks",2] invalid`}
		}
		a := s.post("/tasks/batch", batchOf(with("payload", "1"), with("delay_seconds", "1"), item, with("payload", "1")))
		s.refused(a, http.StatusUnprocessableEntity, want...)
		if len(want) == 0 {
			t.Errorf("%s: alone it is answered %d", item, alone.status)
		}
	}

	// All at once.
	items := make([]string, 20)
	for i := range items {
		items[i] = with("payload", "1")
	}
	items[0], items[10], items[19] = `{"url":"ftp://x/"}`, with("headers", `{"Host":"x","Te":"y"}`), `{"payload":1}`
	s.refused(s.post("/tasks/batch", batchOf(items...)), http.StatusUnprocessableEntity,
		`["body","tasks",0,"url"] invalid`, `["body","tasks",10,"headers","Host"] reserved`, `["body","tasks",10,"headers","Te"] reserved`, `["body","tasks",19,"url"] missing`)
}

func TestBatchFrame(t *testing.T) {
	t.Parallel()
	s := newService(t)
	good := with("payload", "1")
	many := func(n int) string { return batchOf(strings.Split(strings.Repeat(good+" ", n-1)+good, " ")...) }
	for name, tt := range map[string]struct {
		body   string
		status int
		errors []string
	}{
		"nothing":          {``, 400, nil},
		"no list":          {`{}`, 422, []string{`["body","tasks"] missing`}},
		"null":             {`{"tasks":null}`, 422, []string{`["body","tasks"] list_type`}},
		"an object":        {`{"tasks":{"url":"` + marker + `"}}`, 422, []string{`["body","tasks"] list_type`}},
		"a string":         {`{"tasks":"` + marker + `"}`, 422, []string{`["body","tasks"] list_type`}},
		"empty":            {`{"tasks":[]}`, 422, []string{`["body","tasks"] too_short`}},
		"too many":         {many(1001), 422, []string{`["body","tasks"] too_long`}},
		"another member":   {`{"tasks":[` + good + `],"x.y":"` + marker + `"}`, 422, []string{`["body","x.y"] extra_forbidden`}},
		"it, and a task":   {`{"tasks":[` + good + `,{}],"x":1}`, 422, []string{`["body","x"] extra_forbidden`, `["body","tasks",1,"url"] missing`}},
		"another name":     {`{"Tasks":[` + good + `]}`, 422, []string{`["body","Tasks"] extra_forbidden`, `["body","tasks"] missing`}},
		"many members":     {object(65, "a", `"`+marker+`"`), 400, nil},
		"a list":           {`[` + good + `]`, 422, []string{`["body"] object_type`}},
		"a task":           {good, 422, []string{`["body","payload"] extra_forbidden`, `["body","tasks"] missing`, `["body","url"] extra_forbidden`}},
		"cut off":          {`{"tasks":[` + good, 400, nil},
		"malformed":        {`{"tasks":[` + good + `,{` + marker + `]}`, 400, nil},
		"a comma too many": {`{"tasks":[` + good + `,]}`, 400, nil},
		"trailing data":    {batchOf(good) + `{}`, 400, nil},
		"twice":            {`{"tasks":[` + good + `],"tasks":[]}`, 400, nil},
		"twice in a task":  {batchOf(good, `{"url":"`+target+`","url":"`+marker+`"}`), 400, nil},
		"not UTF-8":        {batchOf(good, "{\"url\":\""+marker+"\xff\"}"), 400, nil},
		"too large":        {batchOf(with("payload", `"`+strings.Repeat("x", maxBody)+`"`)), 413, nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newService(t)
			s.refused(s.post("/tasks/batch", tt.body), tt.status, tt.errors...)
		})
	}
	a := s.post("/tasks/batch", many(1000))
	if got := len(s.store.taken()); a.status != http.StatusAccepted || got != 1000 {
		t.Errorf("got %d and %d stored tasks, want 202 and 1000", a.status, got)
	}
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "/tasks/batch", strings.NewReader(batchOf(good)))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Content-Type", "text/plain")
	s.refused(s.serve(r), http.StatusUnsupportedMediaType)
}

// A body that is full of mistakes makes neither for a large answer nor for much
// memory. It is alone while it looks at that.
func TestBatchOfMistakes(t *testing.T) { //nolint:paralleltest // memory is counted for all tests together
	s := newService(t)
	for name, tt := range map[string]struct {
		body   string
		named  int
		detail string
	}{
		"tasks":   {batchOf(strings.Split(strings.Repeat("{} ", 999)+"{}", " ")...), 50, "more than 50 rules"},
		"members": {batchOf(object(60, "a", "1"), object(60, "a", "1")), 50, "more than 50 rules"},
		"labels":  {batchOf(with("labels", object(3000, "l", "1")), with("labels", object(3000, "l", "1"))), 50, "more than 50 rules"},
		// Each as many as a tree is made of.
		"many":    {batchOf(slices.Repeat([]string{with("labels", object(6000, "l", "1"))}, 15)...), 50, "more than 50 rules"},
		"empty":   {`{"tasks":[` + strings.Repeat("{},", 340_000) + `{}]}`, 1, "1 rule"},
		"numbers": {`{"tasks":[` + strings.Repeat("1,", 500_000) + `1]}`, 1, "1 rule"},
	} {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		a := s.post("/tasks/batch", tt.body)
		runtime.ReadMemStats(&after)
		if a.status != http.StatusUnprocessableEntity || len(a.errors()) != tt.named || !strings.Contains(a.detail(), tt.detail) {
			t.Errorf("%s: got %d with %d errors: %s", name, a.status, len(a.errors()), a.detail())
		}
		s.nothingHappened(a)
		if used := (after.TotalAlloc - before.TotalAlloc) >> 20; used > 64 {
			t.Errorf("%s: %d MiB were allocated, want at most 64", name, used)
		}
	}
}

func TestBatchOnce(t *testing.T) {
	t.Parallel()
	s := newService(t)
	var first *task.Batch
	s.store.insertBatch = func(_ context.Context, b *task.Batch) error {
		switch {
		case first == nil:
			first = b
		case first.IdempotencyKey != b.IdempotencyKey:
		case string(first.Fingerprint) != string(b.Fingerprint):
			return task.ErrKeyTaken
		default:
			return &task.RepeatError{Tasks: []task.ID{first.Tasks[0].ID, first.Tasks[1].ID}}
		}
		return nil
	}
	gone := false
	s.store.get = func(_ context.Context, id task.ID) (*task.Task, error) {
		for _, t := range first.Tasks {
			if t.ID == id && !gone {
				now := *t
				now.State = task.Succeeded
				return &now, nil
			}
		}
		return nil, task.ErrNotFound
	}
	body := batchOf(with("payload", "1"), with("delay_seconds", "60"))
	a := s.post("/tasks/batch", body, "Idempotency-Key", "k", "X-Test-Caller", "plays")
	stored := s.store.taken()
	if a.status != http.StatusAccepted || a.header["Idempotent-Replayed"] != nil || len(stored) != 2 {
		t.Fatalf("got %d, %v and %d tasks", a.status, a.header, len(stored))
	}
	if first.IdempotencyKey != "plays k" || stored[0].IdempotencyKey != "" || stored[0].CreatedBy != "plays" {
		t.Errorf("got the keys %q and %q, want that of the batch alone", first.IdempotencyKey, stored[0].IdempotencyKey)
	}
	again := s.post("/tasks/batch", body, "Idempotency-Key", "k", "X-Test-Caller", "plays")
	if again.status != http.StatusOK || again.header.Get("Idempotent-Replayed") != "true" {
		t.Errorf("a repeat: got %d, %v", again.status, again.header)
	}
	for i := range 2 {
		if again.at("tasks", i, "id") != a.at("tasks", i, "id") || again.at("tasks", i, "state") != "succeeded" {
			t.Errorf("a repeat: task %d is %v, want %v as it is now", i, again.at("tasks", i), a.at("tasks", i, "id"))
		}
	}
	s.refused(s.post("/tasks/batch", batchOf(with("payload", "1")), "Idempotency-Key", "k", "X-Test-Caller", "plays"), http.StatusConflict)
	gone = true
	if a := s.post("/tasks/batch", body, "Idempotency-Key", "k", "X-Test-Caller", "plays"); a.status != http.StatusConflict || a.detail() != goneDetail {
		t.Errorf("after the retention: got %d %s", a.status, a.detail())
	}
	s.refused(s.post("/tasks/batch", body, "Idempotency-Key", "k k"), http.StatusUnprocessableEntity, `["header","Idempotency-Key"] string_pattern_mismatch`)
}

func TestBatchFails(t *testing.T) {
	t.Parallel()
	for status, err := range map[int]error{
		http.StatusTooManyRequests: task.ErrOverloaded, http.StatusServiceUnavailable: task.ErrUnavailable, http.StatusInternalServerError: errors.New(marker[:3]),
	} {
		s := newService(t)
		s.store.insertBatch = func(context.Context, *task.Batch) error { return fmt.Errorf("insert: %w", err) }
		a := s.post("/tasks/batch", batchOf(with("payload", "1")))
		s.refused(a, status)
		if (status != http.StatusInternalServerError) != (a.header.Get("Retry-After") != "") {
			t.Errorf("%d has Retry-After %q", status, a.header.Get("Retry-After"))
		}
	}
}
