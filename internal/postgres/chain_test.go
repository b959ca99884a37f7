package postgres_test

import (
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/melodia/orchestrator/internal/postgres"
	"github.com/melodia/orchestrator/internal/task"
)

// childOf makes a new task that a call of another one led to.
func childOf(parent task.ID, change ...func(*task.Task)) *task.Task {
	tk := newTask(change...)
	tk.ParentID, tk.Hops = parent, 1
	return tk
}

// wantRoot checks what is stored of a task's chain, and what Insert said of it.
func wantRoot(t *testing.T, s *postgres.Store, tk *task.Task, root task.ID) {
	t.Helper()
	got := get(t, s, tk.ID)
	if got.RootID != root || got.ParentID != tk.ParentID || got.Hops != tk.Hops {
		t.Errorf("stored as child of %s in the chain of %s with %d hops, want %s, %s, %d", got.ParentID, got.RootID, got.Hops, tk.ParentID, root, tk.Hops)
	}
	if tk.RootID != root {
		t.Errorf("Insert set RootID to %s, want %s", tk.RootID, root)
	}
}

func TestRootOfAChain(t *testing.T) {
	t.Parallel()
	s, _ := newStore(t)
	worker := register(t, s)
	first := newTask()
	insert(t, s, first)
	wantRoot(t, s, first, task.ID{})
	second := childOf(first.ID)
	insert(t, s, second)
	wantRoot(t, s, second, first.ID)
	third := childOf(second.ID)
	insert(t, s, third)
	wantRoot(t, s, third, first.ID)

	// They are in the history when the others come.
	for range 3 {
		c := claimOne(t, s, worker)
		finish(t, s, c, succeeded(c))
	}
	ofEnded := childOf(second.ID)
	insert(t, s, ofEnded)
	wantRoot(t, s, ofEnded, first.ID)
	ofRoot := childOf(first.ID)
	insert(t, s, ofRoot)
	wantRoot(t, s, ofRoot, first.ID)
	gone := newID()
	ofStranger := childOf(gone)
	insert(t, s, ofStranger)
	wantRoot(t, s, ofStranger, gone)

	// As it is stored at once as claimed, under a key, and in a batch.
	claimed := childOf(third.ID)
	if c, err := s.InsertClaimed(t.Context(), worker, claimed); err != nil || c == nil || c.Task.RootID != first.ID {
		t.Errorf("InsertClaimed: %+v, %v, want it in the chain of %s", c, err, first.ID)
	}
	wantRoot(t, s, claimed, first.ID)
	keyed := childOf(third.ID, func(tk *task.Task) { tk.IdempotencyKey, tk.Fingerprint = "k", []byte("1") })
	insert(t, s, keyed)
	wantRoot(t, s, keyed, first.ID)
	again := childOf(third.ID, func(tk *task.Task) { tk.IdempotencyKey, tk.Fingerprint = "k", []byte("1") })
	wantRepeat(t, s.Insert(t.Context(), again), keyed.ID)
	for _, key := range []string{"", "b"} {
		batch := &task.Batch{Tasks: []*task.Task{childOf(third.ID), newTask(), childOf(gone)}, IdempotencyKey: key, Fingerprint: []byte{}}
		if err := s.InsertBatch(t.Context(), batch); err != nil {
			t.Fatalf("InsertBatch: %v", err)
		}
		for i, root := range []task.ID{first.ID, {}, gone} {
			wantRoot(t, s, batch.Tasks[i], root)
		}
	}
}

// Children and others in one statement, with keys and without.
func TestChildrenAmongOthers(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	parent := childOf(newID())
	insert(t, s, parent)
	var tasks []*task.Task
	for i := range 200 {
		tk := newTask()
		if i%2 == 0 {
			tk = childOf(parent.ID)
		}
		if i%3 == 0 {
			tk.IdempotencyKey, tk.Fingerprint = tk.ID.String(), []byte{}
		}
		tasks = append(tasks, tk)
	}
	if err := errors.Join(insertTogether(t, s, pool, tasks)...); err != nil {
		t.Fatal(err)
	}
	for i, tk := range tasks {
		root := task.ID{}
		if i%2 == 0 {
			root = parent.RootID
		}
		wantRoot(t, s, tk, root)
	}
}

// What a task costs that has no parent and comes from no call: nothing.
func TestAPlainTaskStoresNoChain(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	insert(t, s, newTask())
	if !query[bool](t, pool, "SELECT num_nulls(hops, parent_id, root_id, round, snooze_count) = 5 FROM tasks") {
		t.Error("a plain task has values for its chain, its round or its snoozes")
	}
}

// A callback is a child of the task that it tells of, one hop further.
func TestChainOfACallback(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct{ hops, want int }{"plain": {0, 1}, "deep": {9, 10}, "as deep as counts": {task.MaxHops, task.MaxHops}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, pool := newStore(t)
			worker := register(t, s)
			tk := withCallbacks()
			root := tk.ID
			if tk.Hops = tt.hops; tt.hops > 0 {
				tk.ParentID = newID()
				root = tk.ParentID
			}
			insert(t, s, tk)
			c := claimOne(t, s, worker)
			finish(t, s, c, succeeded(c))
			callbacks := callbacksOf(t, s, pool, tk.ID)
			if len(callbacks) != 1 {
				t.Fatalf("%d callbacks, want 1", len(callbacks))
			}
			if got := callbacks[0]; got.ParentID != tk.ID || got.RootID != root || got.Hops != tt.want {
				t.Errorf("the callback is a child of %s in the chain of %s with %d hops, want %s, %s, %d", got.ParentID, got.RootID, got.Hops, tk.ID, root, tt.want)
			}
		})
	}
}

// Whatever is done to a task, its place in the chain stays, and a redrive from
// within a chain never leads back.
func TestChainIsKept(t *testing.T) {
	t.Parallel()
	s, _ := newStore(t)
	worker := register(t, s)
	parent := childOf(newID())
	insert(t, s, parent)
	if _, err := s.Cancel(t.Context(), parent.ID); err != nil {
		t.Fatal(err)
	}
	tk := childOf(parent.ID)
	tk.Hops = 5
	insert(t, s, tk)
	same := func(step string, got *task.Task, hops int) {
		t.Helper()
		for what, tk := range map[string]*task.Task{"answered": got, "stored": get(t, s, got.ID)} {
			if tk.ParentID != parent.ID || tk.RootID != parent.RootID || tk.Hops != hops {
				t.Errorf("%s: %s as child of %s in the chain of %s with %d hops, want %s, %s, %d", step, what, tk.ParentID, tk.RootID, tk.Hops, parent.ID, parent.RootID, hops)
			}
		}
	}
	change, err := get(t, s, tk.ID).Change(task.Change{Timeout: new(time.Minute)}, tk.CreatedAt)
	if err != nil {
		t.Fatal(err)
	}
	changed, err := s.Change(t.Context(), change, nil)
	if err != nil {
		t.Fatal(err)
	}
	same("changed", changed, 5)
	for _, step := range []struct{ hops, want int }{{0, 5}, {3, 5}, {9, 9}, {0, 9}, {task.MaxHops, task.MaxHops}} {
		failAtOnce(t, s, tk, worker)
		same("failed", get(t, s, tk.ID), max(get(t, s, tk.ID).Hops, 5))
		got, err := s.Redrive(t.Context(), tk.ID, step.hops)
		if err != nil {
			t.Fatal(err)
		}
		same("redriven", got, step.want)
	}
	failAtOnce(t, s, tk, worker)
	if n, err := s.RedriveMany(t.Context(), []task.ID{tk.ID}, 0, 0, 7); n != 1 || err != nil {
		t.Fatalf("RedriveMany = %d, %v", n, err)
	}
	same("redriven with others", get(t, s, tk.ID), task.MaxHops)
	cancelled, err := s.Cancel(t.Context(), tk.ID)
	if err != nil {
		t.Fatal(err)
	}
	same("cancelled", cancelled, task.MaxHops)
}

func snooze(c *task.Claim) task.Decision {
	return c.Next(task.Outcome{Kind: task.OutcomeRetryable, StatusCode: 503, Error: "the target answered 503", Snooze: 90 * time.Second}, c.At, 0.5)
}

func TestSnooze(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	worker := register(t, s)
	tk := newTask(func(tk *task.Task) { tk.Retry.MaxAttempts = 2 })
	insert(t, s, tk)
	claim := func() *task.Claim {
		t.Helper()
		c, err := s.ClaimOne(t.Context(), worker, tk.ID)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	for i := range task.MaxSnoozes {
		c := claim()
		if c.Task.SnoozeCount != i || c.AttemptNumber() != 1 {
			t.Fatalf("claimed with %d snoozes for attempt %d, want %d for 1", c.Task.SnoozeCount, c.AttemptNumber(), i)
		}
		if !finish(t, s, c, snooze(c)) {
			t.Fatal("Finish did not match")
		}
	}
	got := get(t, s, tk.ID)
	if got.State != task.Pending || got.AttemptCount != 0 || got.SnoozeCount != 100 || len(got.Attempts) != 100 {
		t.Errorf("after 100 snoozes: %s with %d attempts counted and %d kept, %d snoozes", got.State, got.AttemptCount, len(got.Attempts), got.SnoozeCount)
	}
	if a := got.Attempts[99]; a.Outcome != task.OutcomeSnoozed || a.Number != 1 || a.Round != 1 || a.StatusCode != 503 {
		t.Errorf("the last attempt is %+v", a)
	}
	if wait := query[float64](t, pool, "SELECT EXTRACT(EPOCH FROM run_at - now())::float8 FROM tasks"); wait < 60 || wait > 90 {
		t.Errorf("it is due in %v s, want 90 at most", wait)
	}
	c := claim()
	finish(t, s, c, snooze(c))
	if got := get(t, s, tk.ID); got.State != task.Pending || got.AttemptCount != 1 || got.SnoozeCount != 100 {
		t.Errorf("after the 101st: %s with %d attempts counted, %d snoozes", got.State, got.AttemptCount, got.SnoozeCount)
	}
	c = claim()
	finish(t, s, c, snooze(c))
	if got := get(t, s, tk.ID); got.State != task.Failed || got.Reason != task.AttemptsExhausted {
		t.Errorf("after the 102nd: %s, %s", got.State, got.Reason)
	}
	redriven, err := s.Redrive(t.Context(), tk.ID, 0)
	if err != nil || redriven.SnoozeCount != 0 || redriven.Round != 2 {
		t.Fatalf("Redrive: %d snoozes in round %d, %v; want 0 in round 2", redriven.SnoozeCount, redriven.Round, err)
	}
	c = claim()
	finish(t, s, c, snooze(c))
	if got := get(t, s, tk.ID); got.State != task.Pending || got.SnoozeCount != 1 || got.Attempts[len(got.Attempts)-1].Round != 2 {
		t.Errorf("snoozed in round 2: %s, %d snoozes, %+v", got.State, got.SnoozeCount, got.Attempts[len(got.Attempts)-1])
	}
	// It was cancelled meanwhile.
	c = claim()
	if _, err := s.Cancel(t.Context(), tk.ID); err != nil {
		t.Fatal(err)
	}
	finish(t, s, c, snooze(c))
	if got := get(t, s, tk.ID); got.State != task.Cancelled || got.AttemptCount != 0 {
		t.Errorf("snoozed while it was cancelled: %s with %d attempts counted", got.State, got.AttemptCount)
	}
}

// roundsOf returns the rounds of a task's attempts, and checks what a list says of
// the last one.
func roundsOf(t *testing.T, s *postgres.Store, id task.ID) (rounds []int) {
	t.Helper()
	for _, a := range get(t, s, id).Attempts {
		rounds = append(rounds, a.Round)
	}
	listed, err := s.GetMany(t.Context(), []task.ID{id})
	if err != nil {
		t.Fatal(err)
	}
	if last := listed[0].Attempts; len(rounds) > 0 && (len(last) != 1 || last[0].Round != rounds[len(rounds)-1]) {
		t.Errorf("a list shows %+v of the rounds %v", last, rounds)
	}
	return rounds
}

func TestRounds(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		before string // done to the history before the first redrive
		want   []int
	}{
		"all of them kept": {"UPDATE task_history SET url = url", []int{1, 2, 2, 3, 3}},
		"redriven before rounds were kept": {`UPDATE task_history SET attempts = '[{"number": 1, "outcome": "retryable"}, {"number": 2, "outcome": "interrupted"},
			{"number": 2, "outcome": "permanent"}, {"number": 1, "outcome": "lost"}, {"number": 2, "outcome": "permanent"}]'`, []int{1, 1, 1, 2, 2, 3, 3, 4, 4}},
		"redriven before, after one attempt each": {`UPDATE task_history SET attempts = '[{"number": 1, "outcome": "permanent"},
			{"number": 1, "outcome": "permanent"}, {"number": 1, "outcome": "permanent"}]'`, []int{1, 2, 3, 4, 4, 5, 5}},
		"no attempt before": {"UPDATE task_history SET attempts = '[]', attempt_count = 0", []int{2, 2, 3, 3}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, pool := newStore(t)
			worker := register(t, s)
			tk := newTask()
			insert(t, s, tk)
			failAtOnce(t, s, tk, worker)
			exec(t, pool, tt.before)
			for range 2 {
				if _, err := s.Redrive(t.Context(), tk.ID, 0); err != nil {
					t.Fatal(err)
				}
				// A lost attempt, and one that fails.
				if _, err := s.ClaimOne(t.Context(), worker, tk.ID); err != nil {
					t.Fatal(err)
				}
				silence(t, pool, worker)
				if lost, err := s.Reap(t.Context(), newID(), nil, time.Second); len(lost) != 1 || err != nil {
					t.Fatalf("Reap = %v, %v", lost, err)
				}
				worker = register(t, s)
				failAtOnce(t, s, tk, worker)
			}
			if diff := cmp.Diff(tt.want, roundsOf(t, s, tk.ID)); diff != "" {
				t.Errorf("rounds (-want +got):\n%s", diff)
			}
		})
	}
}

// A task that an instance of the version before redrives, which knows no rounds.
func TestRoundsAfterAnOlderVersion(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	worker := register(t, s)
	tk := newTask()
	insert(t, s, tk)
	failAtOnce(t, s, tk, worker)
	if _, err := s.Redrive(t.Context(), tk.ID, 0); err != nil {
		t.Fatal(err)
	}
	exec(t, pool, "UPDATE tasks SET round = NULL")
	failAtOnce(t, s, tk, worker)
	if _, err := s.Redrive(t.Context(), tk.ID, 0); err != nil {
		t.Fatal(err)
	}
	failAtOnce(t, s, tk, worker)
	if got := roundsOf(t, s, tk.ID); !slices.Equal(got, []int{1, 2, 3}) {
		t.Errorf("rounds %v, want 1, 2, 3", got)
	}
}

// The statements of the version before go on beside this one's.
func TestOlderVersionHandlesSnoozedTasks(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	worker := register(t, s)
	tk := childOf(newID())
	insert(t, s, tk)
	c := claimOne(t, s, worker)
	finish(t, s, c, snooze(c))
	exec(t, pool, "UPDATE tasks SET state = 'running', claim = claim + 1, worker_id = $1, claimed_at = now()", [16]byte(worker))
	exec(t, pool, `UPDATE tasks SET state = 'pending', worker_id = NULL, claimed_at = NULL, attempt_count = attempt_count + 1,
		attempts = attempts || '[{"number": 1, "started_at": "2026-01-01T00:00:00Z", "duration_seconds": 1, "outcome": "retryable"}]'`)
	got := get(t, s, tk.ID)
	want := []task.Kind{task.OutcomeSnoozed, task.OutcomeRetryable}
	if got.SnoozeCount != 1 || got.AttemptCount != 1 || !cmp.Equal(want, []task.Kind{got.Attempts[0].Outcome, got.Attempts[1].Outcome}) {
		t.Errorf("got %d snoozes, %d attempts, %+v", got.SnoozeCount, got.AttemptCount, got.Attempts)
	}
}
