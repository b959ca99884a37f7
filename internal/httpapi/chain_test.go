package httpapi

import (
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/melodia/orchestrator/internal/task"
)

// handIns are requests that store tasks, by path.
func handIns() map[string]string {
	return map[string]string{
		"/enqueue": with("payload", "1"), "/schedule": with("delay_seconds", "60"),
		"/tasks/batch": `{"tasks":[` + with("payload", "1") + `,` + with("payload", "2") + `]}`,
	}
}

func mostHops(n int) func(*settings) { return func(o *settings) { o.MaxHops = n } }

func TestHops(t *testing.T) {
	t.Parallel()
	for path, body := range handIns() {
		t.Run(path, func(t *testing.T) {
			t.Parallel()
			for _, tt := range []struct {
				most   int
				hops   string
				status int
				want   int
			}{
				{10, "0", http.StatusAccepted, 0},
				{10, "1", http.StatusAccepted, 1},
				{10, "10", http.StatusAccepted, 10},
				{10, "11", http.StatusLoopDetected, 0},
				{10, "32768", http.StatusLoopDetected, 0},
				{10, strings.Repeat("9", 400), http.StatusLoopDetected, 0},
				{1, "2", http.StatusLoopDetected, 0},
				{0, "11", http.StatusAccepted, 11}, // off
				{0, strings.Repeat("9", 400), http.StatusAccepted, task.MaxHops},
			} {
				s := newService(t, mostHops(tt.most))
				a := s.post(path, body, "Orchestrator-Hops", tt.hops)
				if a.status != tt.status {
					t.Errorf("%.9s hops of %d: got status %d, want %d", tt.hops, tt.most, a.status, tt.status)
				}
				stored := s.store.taken()
				if (len(stored) > 0) != (tt.status == http.StatusAccepted) {
					t.Errorf("%.9s hops of %d: stored %d tasks", tt.hops, tt.most, len(stored))
				}
				for _, tk := range stored {
					if tk.Hops != tt.want || tk.ParentID != (task.ID{}) {
						t.Errorf("%.9s hops: stored with %d, child of %s", tt.hops, tk.Hops, tk.ParentID)
					}
				}
				if tt.status == http.StatusLoopDetected {
					s.refused(a, http.StatusLoopDetected)
					if a.header.Get("Orchestrator-Retry") != "never" {
						t.Errorf("the task whose call it is is not told to give up: %v", a.header)
					}
				}
			}
		})
	}
}

// A request with its own name is refused as well, and before it is looked up.
func TestHopsOfARepeat(t *testing.T) {
	t.Parallel()
	s := newService(t, mostHops(1))
	keyed(s)
	s.only(s.post("/enqueue", with("payload", "1"), "Idempotency-Key", "k", "Orchestrator-Hops", "1"))
	s.refused(s.post("/enqueue", with("payload", "1"), "Idempotency-Key", "k", "Orchestrator-Hops", "2"), http.StatusLoopDetected)
}

func TestMalformedChain(t *testing.T) {
	t.Parallel()
	s := newService(t)
	paths := handIns()
	paths["/worker-endpoint"] = with("payload", "1")
	paths["/tasks/"+storedID+"/redrive"] = ""
	paths["/tasks/redrive"] = `{"filter":{"state":["failed"]}}`
	for path, body := range paths {
		for _, hops := range []string{"-1", "1.0", "+1", "one", "", "1, 2"} {
			s.refused(s.post(path, body, "Orchestrator-Hops", hops), http.StatusUnprocessableEntity, `["header","Orchestrator-Hops"] string_pattern_mismatch`)
		}
		for _, parent := range []string{"", marker, storedID + "0", "{" + storedID + "}"} {
			s.refused(s.post(path, body, "Orchestrator-Task-Id", parent), http.StatusUnprocessableEntity, `["header","Orchestrator-Task-Id"] string_pattern_mismatch`)
		}
		s.refused(s.post(path, body, "Orchestrator-Task-Id", marker, "Orchestrator-Hops", marker), http.StatusUnprocessableEntity,
			`["header","Orchestrator-Hops"] string_pattern_mismatch`, `["header","Orchestrator-Task-Id"] string_pattern_mismatch`)
	}
	if n := len(s.store.taken()); n > 0 {
		t.Errorf("stored %d tasks", n)
	}
}

func TestParent(t *testing.T) {
	t.Parallel()
	parent, err := task.ParseID(storedID)
	if err != nil {
		t.Fatal(err)
	}
	for path, body := range handIns() {
		s := newService(t)
		a := s.post(path, body, "Orchestrator-Task-Id", strings.ToUpper(storedID), "Orchestrator-Hops", "3")
		if a.status != http.StatusAccepted {
			t.Fatalf("%s: got status %d: %s", path, a.status, a.text)
		}
		for _, tk := range s.store.taken() {
			if tk.ParentID != parent || tk.Hops != 3 || tk.IdempotencyKey != "" {
				t.Errorf("%s: stored as a child of %s with %d hops and the key %q", path, tk.ParentID, tk.Hops, tk.IdempotencyKey)
			}
		}
		got := a.at("parent_id")
		if path == "/tasks/batch" {
			got = a.at("tasks", 1, "parent_id")
		}
		if got != storedID {
			t.Errorf("%s: parent_id = %v, want %s", path, got, storedID)
		}
	}
}

// A call that a task makes to this service, and repeats, hands in once.
func TestCallsOfATaskAreStoredOnce(t *testing.T) {
	t.Parallel()
	const other = "01939e0c-5c1e-7cc1-b1a6-9d8a4d6c1a2c"
	s := newService(t)
	keyed(s)
	call := func(id, body, attempt string) *answer {
		return s.post("/enqueue", body, "Orchestrator-Task-Id", id, "Orchestrator-Hops", "1", "Orchestrator-Attempt", attempt)
	}
	one, two := with("payload", "1"), with("payload", "2")
	s.only(call(storedID, one, "1"))
	for _, attempt := range []string{"1", "2"} {
		if a := call(storedID, one, attempt); a.status != http.StatusOK || a.header.Get("Idempotent-Replayed") != "true" {
			t.Errorf("attempt %s again: got %d %s", attempt, a.status, a.text)
		}
	}
	if n := len(s.store.taken()); n > 0 {
		t.Errorf("a repeated call stored %d tasks", n)
	}
	s.only(call(storedID, two, "1"))
	s.only(call(other, one, "1"))
	s.only(s.post("/enqueue", one, "Orchestrator-Task-Id", storedID, "Orchestrator-Attempt", "1", "X-Test-Caller", "plays"))
	s.only(s.post("/enqueue", one, "Orchestrator-Task-Id", storedID, "Orchestrator-Attempt", "1", "Idempotency-Key", "k"))
	// What the target of a task hands in, it may hand in twice.
	s.only(s.post("/enqueue", one, "Orchestrator-Task-Id", storedID))
	s.only(s.post("/enqueue", one, "Orchestrator-Task-Id", storedID))
	s.only(s.post("/enqueue", one, "Orchestrator-Attempt", "1"))
	s.only(s.post("/enqueue", one, "Orchestrator-Attempt", "1"))
}

func TestHopsAtTheWorkerEndpoint(t *testing.T) {
	t.Parallel()
	s := newService(t, mostHops(10))
	if a := s.post("/worker-endpoint", with("payload", "1"), "Orchestrator-Hops", "10"); a.status != http.StatusOK {
		t.Errorf("got status %d: %s", a.status, a.text)
	}
	if _, once := s.dispatcher.taken(); len(once) != 1 || once[0].Hops != 10 {
		t.Errorf("carried out %d tasks, the first with other hops than 10", len(once))
	}
	for _, body := range []string{with("payload", "1"), `{"task_id":"` + storedID + `"}`} {
		s.refused(s.post("/worker-endpoint", body, "Orchestrator-Hops", "11"), http.StatusLoopDetected)
	}
}

// Tasks that redrive each other come to an end too.
func TestHopsOfARedrive(t *testing.T) {
	t.Parallel()
	s := newService(t, mostHops(10))
	var hops []int
	s.store.redrive = func(n int) { hops = append(hops, n) }
	s.store.act = func(_ string, id task.ID) (*task.Task, error) {
		return &task.Task{ID: id, State: task.Pending, RunAt: storedAt, CreatedAt: storedAt}, nil
	}
	s.store.match = func(*task.Filter, int) ([]task.ID, error) { return []task.ID{{1}}, nil }
	s.store.redriveMany = func([]task.ID, time.Duration, time.Duration) (int, error) { return 1, nil }
	for path, body := range map[string]string{
		"/tasks/" + storedID + "/redrive": "", "/tasks/redrive": `{"filter":{"state":["failed"]},"dry_run":false}`,
	} {
		hops = nil
		for _, header := range [][]string{nil, {"Orchestrator-Hops", "10"}} {
			if a := s.post(path, body, header...); a.status != http.StatusOK {
				t.Errorf("%s: got status %d: %s", path, a.status, a.text)
			}
		}
		s.refused(s.post(path, body, "Orchestrator-Hops", "11"), http.StatusLoopDetected)
		if len(hops) != 2 || hops[0] != 0 || hops[1] != 10 {
			t.Errorf("%s: redriven with %v hops, want 0 and 10", path, hops)
		}
	}
}
