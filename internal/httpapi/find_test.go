package httpapi

import (
	"context"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/melodia/orchestrator/internal/task"
)

// found returns n tasks, the newest first.
func found(n int) []*task.Task {
	tasks := make([]*task.Task, n)
	for i := range tasks {
		at := storedAt.Add(-time.Duration(i) * time.Second)
		tasks[i] = &task.Task{ID: task.NewID(at, 1), State: task.Pending, RunAt: at, CreatedAt: at, Spec: task.Spec{URL: target, Method: "POST"}}
	}
	return tasks
}

func TestFind(t *testing.T) {
	t.Parallel()
	at := func(day int) time.Time { return time.Date(2026, 11, day, 12, 0, 0, 0, time.UTC) }
	for query, want := range map[string]task.Filter{
		"":                                      {},
		"?state=failed":                         {States: []task.State{task.Failed}},
		"?state=failed&state=cancelled":         {States: []task.State{task.Cancelled, task.Failed}},
		"?state=failed,cancelled&state=running": {States: []task.State{task.Cancelled, task.Failed, task.Running}},
		"?state=failed,failed&state=failed":     {States: []task.State{task.Failed}},
		"?reason=expired,expired":               {Reasons: []task.Reason{task.Expired}},
		"?label.kind=play&label.a%3Db=c%26d":    {Labels: map[string]string{"kind": "play", "a=b": "c&d"}},
		"?label.kind=":                          {Labels: map[string]string{"kind": ""}},
		"?host=plays.melodia.app":               {Host: "plays.melodia.app"},
		"?url=https://plays.melodia.app/a%3Fb":  {URLPrefix: "https://plays.melodia.app/a?b"},
		"?created_after=2026-11-24T12:00:00Z&created_before=2026-11-25T13:00:00%2B01:00": {CreatedAfter: at(24), CreatedBefore: at(25)},
		"?run_after=2026-11-24T12:00:00Z&run_before=2026-11-25T12:00:00.000Z":            {RunAfter: at(24), RunBefore: at(25)},
		"?finished_after=2026-11-24T12:00:00Z&finished_before=2026-11-25T12:00:00Z":      {FinishedAfter: at(24), FinishedBefore: at(25)},
		"?queue=mail&flow_key=tenant/42":                                                 {Queue: "mail", FlowKey: "tenant/42"},
		"?reason=expired,client_error&min_attempts=3&created_by=plays@melodia.app": {
			Reasons: []task.Reason{task.ClientError, task.Expired}, MinAttempts: 3, CreatedBy: "plays@melodia.app",
		},
	} {
		s := newService(t)
		var got task.Filter
		s.store.find = func(f *task.Filter, behind task.Position, limit int) ([]*task.Task, error) {
			if behind != (task.Position{}) || limit != 51 {
				t.Errorf("%s: asked for %d from %v on, want 50 and one more from the beginning on", query, limit, behind)
			}
			got = *f
			return nil, nil
		}
		a := s.get("/tasks" + query)
		if strings.TrimSpace(a.text) != `{"tasks":[],"next_cursor":null}` {
			t.Errorf("%s: got %s", query, a.text)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", query, diff)
		}
	}
}

// Whoever follows the cursors sees every task once.
func TestFindPages(t *testing.T) {
	t.Parallel()
	s := newService(t)
	all := found(7)
	s.store.find = func(f *task.Filter, behind task.Position, limit int) ([]*task.Task, error) {
		from := 0
		if behind != (task.Position{}) {
			from = 1 + slices.IndexFunc(all, func(t *task.Task) bool { return f.PositionOf(t) == behind })
		}
		return all[from:min(from+limit, len(all))], nil
	}
	for _, filter := range []string{"", "&run_after=2020-01-01T00:00:00Z"} {
		var got []any
		pages := 0
		for cursor := ""; ; pages++ {
			a := s.get("/tasks?limit=3" + filter + cursor)
			tasks, _ := a.at("tasks").([]any)
			for _, one := range tasks {
				got = append(got, one.(map[string]any)["id"])
			}
			next, more := a.at("next_cursor").(string)
			if !more {
				break
			}
			cursor = "&cursor=" + url.QueryEscape(next)
		}
		var want []any
		for _, one := range all {
			want = append(want, one.ID.String())
		}
		if diff := cmp.Diff(want, got); diff != "" || pages != 2 {
			t.Errorf("%d pages before the last, want 2 (-want +got):\n%s", pages, diff)
		}
	}
	// A page that is just full has none behind it.
	if a := s.get("/tasks?limit=7"); a.at("next_cursor") != nil {
		t.Errorf("next_cursor is %v behind the last task, want null", a.at("next_cursor"))
	}
	// A cursor belongs to its filter.
	next, _ := s.get("/tasks?limit=3").at("next_cursor").(string)
	s.refused(s.get("/tasks?state=failed&cursor="+next), http.StatusUnprocessableEntity, `["query","cursor"] invalid`)
}

func TestFindRefuses(t *testing.T) {
	t.Parallel()
	s := newService(t)
	for query, errors := range map[string][]string{
		"stat=failed":                          {`["query","stat"] extra_forbidden`},
		"State=failed":                         {`["query","State"] extra_forbidden`},
		"labels.kind=" + marker:                {`["query","labels.kind"] extra_forbidden`},
		"label[kind]=play":                     {`["query","label[kind]"] extra_forbidden`},
		"state=" + marker:                      {`["query","state"] enum`},
		"state=failed,":                        {`["query","state"] enum`},
		"state=":                               {`["query","state"] string_too_short`},
		"reason=" + marker:                     {`["query","reason"] enum`},
		"host=":                                {`["query","host"] string_too_short`},
		"host=https://" + marker:               {`["query","host"] invalid`},
		"host=a&host=b":                        {`["query","host"] duplicate`},
		"url=a&url=b&cursor=" + marker:         {`["query","url"] duplicate`},
		"url=%00" + marker:                     {`["query","url"] invalid`},
		"created_by=%00" + marker:              {`["query","created_by"] invalid`},
		"queue=":                               {`["query","queue"] string_too_short`},
		"queue=%2F" + marker:                   {`["query","queue"] invalid`},
		"flow_key=%20" + marker:                {`["query","flow_key"] invalid`},
		"created_after=" + marker:              {`["query","created_after"] datetime_parsing`},
		"created_after=2026-11-24T12:00:00":    {`["query","created_after"] datetime_parsing`},
		"run_before=2026-11-24T12:00:00+01:00": {`["query","run_before"] datetime_parsing`}, // + is a space
		"finished_after=0001-01-01T00:00:00Z":  {`["query","finished_after"] datetime_parsing`},
		"finished_after=1969-12-31T23:59:59Z":  {`["query","finished_after"] out_of_range`},
		"run_after=2026-11-24T12:00:00Z&run_before=2026-11-24T12:00:00Z": {`["query","run_before"] conflict`},
		"min_attempts=0":                    {`["query","min_attempts"] out_of_range`},
		"min_attempts=101":                  {`["query","min_attempts"] out_of_range`},
		"min_attempts=" + marker:            {`["query","min_attempts"] int_type`},
		"limit=0":                           {`["query","limit"] out_of_range`},
		"limit=201":                         {`["query","limit"] out_of_range`},
		"limit=1.5":                         {`["query","limit"] int_type`},
		"label.=" + marker:                  {`["query","label"] invalid`},
		"label.kind=a&label.kind=" + marker: {`["query","label.kind"] duplicate`},
		"label.kind=%0a" + marker:           {`["query","label.kind"] invalid`},
		"cursor=" + marker:                  {`["query","cursor"] invalid`},
		"url=%zz" + marker:                  {`["query"] invalid`},
		"a;b":                               {`["query"] invalid`},
	} {
		a := s.get("/tasks?" + query)
		s.refused(a, http.StatusUnprocessableEntity, errors...)
	}
	if n := s.store.callCount(); n != 0 {
		t.Errorf("the store was asked %d times", n)
	}
	long := s.get("/tasks?" + strings.Repeat("x", 20_000) + "=1")
	if long.status != http.StatusUnprocessableEntity || len(long.text) > 1000 {
		t.Errorf("a long name is answered %d with %d bytes", long.status, len(long.text))
	}
}

func TestFindTooBroad(t *testing.T) {
	t.Parallel()
	s := newService(t)
	s.store.find = func(*task.Filter, task.Position, int) ([]*task.Task, error) {
		return nil, fmt.Errorf("find tasks: %w: canceling statement", task.ErrTooBroad)
	}
	a := s.get("/tasks")
	if a.status != http.StatusServiceUnavailable || !strings.Contains(a.detail(), "created_after") {
		t.Errorf("got %d %q, want 503 with what to do", a.status, a.detail())
	}
}

func TestCounts(t *testing.T) {
	t.Parallel()
	s := newService(t)
	s.store.counts = func() (map[task.State]task.Count, time.Duration, error) {
		return map[task.State]task.Count{
			task.Pending: {Tasks: 1_000_000}, task.Running: {Tasks: 2, Exact: true}, task.Succeeded: {Tasks: 5_000_000},
			task.Failed: {Tasks: 4, Exact: true}, task.Cancelled: {Exact: true},
		}, 1500 * time.Millisecond, nil
	}
	want := `{"states":{"pending":{"count":1000000,"exact":false},"running":{"count":2,"exact":true},"succeeded":{"count":5000000,"exact":false},` +
		`"failed":{"count":4,"exact":true},"cancelled":{"count":0,"exact":true}},"oldest_due_seconds":1.5}`
	if a := s.get("/tasks/counts"); strings.TrimSpace(a.text) != want {
		t.Errorf("got  %s\nwant %s", a.text, want)
	}
}

func TestExplain(t *testing.T) {
	t.Parallel()
	s := newService(t)
	id, err := task.ParseID(storedID)
	if err != nil {
		t.Fatal(err)
	}
	tk := &task.Task{ID: id, State: task.Pending, RunAt: storedAt.Add(37 * time.Second), Spec: task.Spec{Retry: task.DefaultRetryPolicy()}}
	facts := task.Facts{Now: storedAt, Lease: 15 * time.Second}
	s.store.explain = func(asked task.ID, lease time.Duration) (*task.Task, task.Facts, error) {
		if asked != id || lease != 15*time.Second {
			t.Errorf("asked for %s with a lease of %v", asked, lease)
		}
		return tk, facts, nil
	}
	want := map[string]any{
		"now": "2026-11-24T12:00:00.123456Z", "state": "pending", "reason": nil, "run_at": "2026-11-24T12:00:37.123456Z", "due_in_seconds": 37.0,
		"expires_at": nil, "attempt_count": 0.0, "max_attempts": 14.0, "last_outcome": nil, "last_status_code": nil, "last_error": nil,
		"running_for_seconds": nil, "holder": nil, "holder_silent_seconds": nil, "lease_seconds": 15.0, "cancel_requested_at": nil,
		"tasks_ahead": nil, "instances": 0.0, "slots": nil, "running_tasks": 0.0, "instance_silent_seconds": nil, "finished_at": nil,
		"parent_id": nil, "root_id": nil, "hops": 0.0, "queue": nil, "flow_key": nil, "waiting_for": nil, "limit": nil, "running": nil, "next_permit_at": nil, "ahead": nil,
	}
	check := func(summary string, changes map[string]any) {
		t.Helper()
		a := s.get("/tasks/" + storedID + "/explain")
		all := maps.Clone(want)
		maps.Copy(all, changes)
		if diff := cmp.Diff(map[string]any{"summary": summary, "facts": all}, a.json); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	}
	check("It is due in 37 s.", nil)
	tk.ParentID, tk.RootID, tk.Hops = task.ID{2}, task.ID{1}, 4
	check("It is due in 37 s. It is a child of the task 02000000-0000-0000-0000-000000000000, in the chain that the task 01000000-0000-0000-0000-000000000000 began.",
		map[string]any{"parent_id": "02000000-0000-0000-0000-000000000000", "root_id": "01000000-0000-0000-0000-000000000000", "hops": 4.0})
	tk.ParentID, tk.RootID, tk.Hops = task.ID{}, task.ID{}, 0
	tk.RunAt, tk.AttemptCount = storedAt.Add(-time.Second), 1
	tk.Attempts = []task.Attempt{{Number: 1, Outcome: task.OutcomeRetryable, StatusCode: 503, Error: "the target answered 503"}}
	facts.Instances, facts.Slots, facts.Running, facts.InstanceSeenAt = 2, 400, 400, storedAt.Add(-time.Second)
	check("It has been due for 1.0 s for attempt 2 of 14, since attempt 1 failed: the target answered 503, "+
		"but all 400 slots of 2 instances are busy; it is the next one.", map[string]any{
		"run_at": "2026-11-24T11:59:59.123456Z", "due_in_seconds": -1.0, "tasks_ahead": 0.0, "attempt_count": 1.0, "last_outcome": "retryable",
		"last_status_code": 503.0, "last_error": "the target answered 503", "instances": 2.0, "slots": 400.0, "running_tasks": 400.0, "instance_silent_seconds": 1.0,
		"waiting_for": "slots", "limit": 400.0, "running": 400.0, "ahead": 0.0,
	})
	plain, busy := *tk, facts
	tk.Attempts, tk.AttemptCount, tk.Queue, tk.FlowKey = nil, 0, "mail", "tenant-42"
	facts.Flow = task.Flow{InLane: true, Key: task.Permits{Limits: task.Limits{MaxConcurrent: 5}, Running: 5}, AheadInLane: 211, AheadInQueue: 300}
	waits := map[string]any{
		"run_at": "2026-11-24T11:59:59.123456Z", "due_in_seconds": -1.0, "tasks_ahead": 211.0, "ahead": 211.0, "queue": "mail", "flow_key": "tenant-42",
		"waiting_for": "key_concurrency", "limit": 5.0, "running": 5.0, "instances": 2.0, "slots": 400.0, "running_tasks": 400.0, "instance_silent_seconds": 1.0,
	}
	check("It waits for a permit: all 5 of key tenant-42 in queue mail are in use; 211 tasks of that key are ahead of it. It has been due for 1.0 s.", waits)
	facts.Flow.Queue = task.Permits{Limits: task.Limits{MaxPerSecond: 2}, Running: 7, Used: 2}
	waits["waiting_for"], waits["limit"], waits["running"], waits["ahead"], waits["tasks_ahead"] = "queue_rate", 2.0, 7.0, 300.0, 300.0
	waits["next_permit_at"] = "2026-11-24T12:00:00.623456Z"
	check("It waits for a permit: queue mail gives 2 a second, the next one in 0.5 s; 300 tasks of that queue are ahead of it. It has been due for 1.0 s.", waits)
	*tk, facts = plain, busy
	tk.State, tk.CancelRequestedAt = task.Running, storedAt
	facts.ClaimedAt, facts.Holder, facts.HolderSeenAt = storedAt.Add(-3*time.Second), "a", storedAt.Add(-2*time.Second)
	check("Cancelling it was asked for 0.0 s ago; attempt 2 has been under way for 3.0 s, held by the instance a, last seen 2.0 s ago.", map[string]any{
		"state": "running", "run_at": "2026-11-24T11:59:59.123456Z", "due_in_seconds": nil, "attempt_count": 1.0, "last_outcome": "retryable",
		"last_status_code": 503.0, "last_error": "the target answered 503", "instances": 2.0, "slots": 400.0, "running_tasks": 400.0, "instance_silent_seconds": 1.0,
		"running_for_seconds": 3.0, "holder": "a", "holder_silent_seconds": 2.0, "cancel_requested_at": "2026-11-24T12:00:00.123456Z",
	})
}

func TestExplainRefuses(t *testing.T) {
	t.Parallel()
	s := newService(t)
	s.refused(s.get("/tasks/"+storedID+"/explain"), http.StatusNotFound)
	s.refused(s.get("/tasks/"+marker+"/explain"), http.StatusUnprocessableEntity, `["path","id"] string_pattern_mismatch`)
}

func TestWaitForTheEnd(t *testing.T) {
	t.Parallel()
	const wait = 40 * time.Second // longer than the server's WriteTimeout
	for name, tt := range map[string]struct {
		query  string
		state  task.State    // at first
		ends   time.Duration // when the watch ends; 0: never
		leaves bool          // the watch ends without the task's end: a shutdown
		took   time.Duration
		want   task.State
		looks  int
	}{
		"no wait":                      {query: "", state: task.Pending, took: 0, want: task.Pending, looks: 1},
		"no wait, in so many words":    {query: "?wait_seconds=0", state: task.Pending, took: 0, want: task.Pending, looks: 1},
		"it has ended":                 {query: "?wait_seconds=40", state: task.Failed, took: 0, want: task.Failed, looks: 1},
		"it ends meanwhile":            {query: "?wait_seconds=40", state: task.Running, ends: 35 * time.Second, took: 35 * time.Second, want: task.Succeeded, looks: 2},
		"it does not end":              {query: "?wait_seconds=40", state: task.Running, took: wait, want: task.Running, looks: 2},
		"the service is being stopped": {query: "?wait_seconds=40", state: task.Running, ends: time.Second, leaves: true, took: time.Second, want: task.Running, looks: 2},
		"a fraction":                   {query: "?wait_seconds=0.25", state: task.Running, took: 250 * time.Millisecond, want: task.Running, looks: 2},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			onPipes(t, func(t *testing.T, s *service, dial func() net.Conn) {
				var mu sync.Mutex
				state, looks, watches := tt.state, 0, 0
				s.store.get = func(_ context.Context, id task.ID) (*task.Task, error) {
					mu.Lock()
					defer mu.Unlock()
					looks++
					return &task.Task{ID: id, State: state}, nil
				}
				s.dispatcher.watch = func(task.ID) (<-chan struct{}, func(), error) {
					mu.Lock()
					defer mu.Unlock()
					watches++
					ended := make(chan struct{})
					if tt.ends > 0 {
						time.AfterFunc(tt.ends, func() {
							mu.Lock()
							defer mu.Unlock()
							if !tt.leaves {
								state = task.Succeeded
							}
							close(ended)
						})
					}
					return ended, func() {
						mu.Lock()
						defer mu.Unlock()
						watches--
					}, nil
				}
				conn := dial()
				start := time.Now()
				if _, err := conn.Write([]byte("GET /tasks/" + storedID + tt.query + " HTTP/1.1\r\nHost: x\r\n\r\n")); err != nil {
					t.Fatal(err)
				}
				a := s.response(conn, "/tasks/"+storedID)
				if got := a.at("state"); got != string(tt.want) || a.status != http.StatusOK {
					t.Errorf("got %d, state %v, want 200, %s", a.status, got, tt.want)
				}
				if took := time.Since(start); took != tt.took {
					t.Errorf("the answer took %v, want %v", took, tt.took)
				}
				mu.Lock()
				defer mu.Unlock()
				if looks != tt.looks || watches != 0 {
					t.Errorf("%d looks and %d watches left, want %d and none", looks, watches, tt.looks)
				}
			})
		})
	}
}

// A task's own call that waits here is told to the dispatcher; a request of its target is not.
func TestWaitsOfOurOwnCalls(t *testing.T) {
	t.Parallel()
	s := newService(t)
	ended := make(chan struct{})
	close(ended)
	s.dispatcher.watch = func(task.ID) (<-chan struct{}, func(), error) { return ended, func() {}, nil }
	s.store.get = func(context.Context, task.ID) (*task.Task, error) { return stored(), nil }
	ours := map[string]string{"Orchestrator-Task-Id": storedID, "Orchestrator-Attempt": "1", "User-Agent": "orchestrator/1.0.0"}
	for name, test := range map[string]struct {
		without, query string
		want           int
	}{
		"our call":                             {query: "?wait_seconds=1", want: 1},
		"our call, which waits for nothing":    {want: 0},
		"a request that passes our headers on": {without: "User-Agent", query: "?wait_seconds=1", want: 0},
		"a request of a task's target":         {without: "Orchestrator-Attempt", query: "?wait_seconds=1", want: 0},
		"a request of no task":                 {without: "Orchestrator-Task-Id", query: "?wait_seconds=1", want: 0},
	} {
		s.dispatcher.cameBack = nil
		var headers []string
		for header, value := range ours {
			if header != test.without {
				headers = append(headers, header, value)
			}
		}
		a := s.do(http.MethodGet, "/tasks/"+storedID+test.query, "", headers...)
		if a.status != http.StatusOK || len(s.dispatcher.cameBack) != test.want {
			t.Errorf("%s: %d, the dispatcher was told of %v, want %d", name, a.status, s.dispatcher.cameBack, test.want)
		}
	}
}

func TestWaitRefuses(t *testing.T) {
	t.Parallel()
	s := newService(t)
	for value, kind := range map[string]string{
		"-1": "greater_than_equal", "60.1": "less_than_equal", "1e99": "less_than_equal", marker: "float_type",
	} {
		s.refused(s.get("/tasks/"+storedID+"?wait_seconds="+value), http.StatusUnprocessableEntity, `["query","wait_seconds"] `+kind)
	}
	// No number is no wait.
	s.refused(s.get("/tasks/"+storedID+"?wait_seconds=NaN"), http.StatusNotFound)
}
