package postgres_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/melodia/orchestrator/internal/postgres"
	"github.com/melodia/orchestrator/internal/postgres/pgtest"
	"github.com/melodia/orchestrator/internal/task"
)

// ask asks for all that a lane has.
func ask(lanes ...task.Lane) []task.LaneAsk {
	asks := make([]task.LaneAsk, len(lanes))
	for i, lane := range lanes {
		asks[i] = task.LaneAsk{Lane: lane, Most: 256}
	}
	return asks
}

// claimLanes claims from lanes; the rows of their hosts were made before.
func claimLanes(t *testing.T, s *postgres.Store, worker task.ID, limit int, asks ...task.LaneAsk) ([]*task.Claim, map[task.Lane]task.LaneState) {
	t.Helper()
	claim := func(worker task.ID) ([]*task.Claim, map[task.Lane]task.LaneState) {
		claims, list, err := s.ClaimLanes(t.Context(), worker, asks, nil, limit)
		if err != nil {
			t.Fatalf("ClaimLanes: %v", err)
		}
		states := make(map[task.Lane]task.LaneState, len(list))
		for _, state := range list {
			states[state.Lane] = state
		}
		if len(list) != len(asks) || len(states) != len(asks) {
			t.Fatalf("ClaimLanes returned the states %v for %d lanes", list, len(asks))
		}
		return claims, states
	}
	claim(newID()) // which claims nothing
	return claim(worker)
}

func ids(claims []*task.Claim) []task.ID {
	out := make([]task.ID, len(claims))
	for i, c := range claims {
		out[i] = c.Task.ID
	}
	slices.SortFunc(out, func(a, b task.ID) int { return slices.Compare(a[:], b[:]) })
	return out
}

var done = task.Decision{State: task.Succeeded}

func TestClaimsFromLanes(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	worker := register(t, s)
	exec(t, pool, `INSERT INTO queues (name, max_concurrent) VALUES ('mail', 3)`)
	for range 5 {
		insert(t, s, newTask(inQueue("mail", "", task.Normal)))
	}
	later := newTask(inQueue("other", "k", task.Normal), func(tk *task.Task) { tk.Delay = time.Hour })
	insert(t, s, later, newTask())

	if got := claim(t, s, worker, 10); len(got) != 1 || got[0].Task.Lane() != "" {
		t.Fatalf("a plain claim got %d tasks, want the plain one alone", len(got))
	}
	if got, _, err := s.ClaimLanes(t.Context(), newID(), ask("mail/"), nil, 10); len(got) != 0 || err != nil {
		t.Errorf("a worker that is not registered got %d tasks, %v", len(got), err)
	}
	got, states := claimLanes(t, s, worker, 10, ask("mail/", "other/k", "nothing/")...)
	if len(got) != 3 {
		t.Fatalf("claimed %d tasks, want the 3 that the queue allows", len(got))
	}
	for _, c := range got {
		if c.Number != 1 || c.Task.Lane() != "mail/" || c.Task.State != task.Running || c.At.IsZero() || c.Task.URL == "" {
			t.Errorf("the claim is %+v of %+v", c, c.Task)
		}
	}
	want := map[task.Lane]task.LaneState{
		"mail/":    {Lane: "mail/", Blocked: task.BlockedByQueue, Wait: -1},
		"nothing/": {Lane: "nothing/", Wait: -1},
	}
	if wait := states["other/k"].Wait; states["other/k"].Blocked != "" || wait > time.Hour || wait < 50*time.Minute {
		t.Errorf("other/k is %+v, want due in an hour", states["other/k"])
	}
	delete(states, "other/k")
	if diff := cmp.Diff(want, states); diff != "" {
		t.Errorf("states (-want +got):\n%s", diff)
	}
	if again, _ := claimLanes(t, s, worker, 10, ask("mail/")...); len(again) != 0 {
		t.Errorf("%d more while 3 of 3 run", len(again))
	}
	if !finish(t, s, got[0], done) {
		t.Error("Finish matched nothing")
	}
	if again, states := claimLanes(t, s, worker, 10, ask("mail/")...); len(again) != 1 || states["mail/"].Blocked != task.BlockedByQueue {
		t.Errorf("%d tasks after one has ended, want 1; the lane is %+v", len(again), states["mail/"])
	}
	// Without the limit the rest is claimed, and the lane is empty.
	exec(t, pool, `UPDATE queues SET max_concurrent = NULL`)
	if again, states := claimLanes(t, s, worker, 10, ask("mail/")...); len(again) != 1 || states["mail/"].Blocked != "" || states["mail/"].Wait != -1 {
		t.Errorf("%d tasks without a limit, want the last one; the lane is %+v", len(again), states["mail/"])
	}
}

// A queue's limit holds over its keys, and a key's own in place of those that all keys have.
func TestLimitsOfKeysAndQueues(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	worker := register(t, s)
	exec(t, pool, `INSERT INTO queues (name, max_concurrent, key_max_concurrent) VALUES ('mail', 5, 2)`)
	exec(t, pool, `INSERT INTO queue_keys (queue, key, version, max_concurrent) VALUES ('mail', 'big', 1, 4), ('mail', 'free', 1, NULL)`)
	for range 10 {
		for _, key := range []string{"a", "b", "big", "free", ""} {
			insert(t, s, newTask(inQueue("mail", key, task.Normal)))
		}
	}
	per := func(claims []*task.Claim) map[task.Lane]int {
		n := map[task.Lane]int{}
		for _, c := range claims {
			n[c.Task.Lane()]++
		}
		return n
	}
	first, states := claimLanes(t, s, worker, 100, ask("mail/a", "mail/b", "mail/big", "mail/free", "mail/")...)
	if diff := cmp.Diff(map[task.Lane]int{"mail/a": 1, "mail/b": 1, "mail/big": 1, "mail/free": 1, "mail/": 1}, per(first)); diff != "" {
		t.Errorf("5 permits for 5 lanes (-want +got):\n%s", diff)
	}
	if states["mail/a"].Blocked != task.BlockedByQueue {
		t.Errorf("mail/a is %+v, want blocked by its queue", states["mail/a"])
	}
	for _, c := range first {
		finish(t, s, c, done)
	}
	exec(t, pool, `UPDATE queues SET max_concurrent = 100`)
	all, states := claimLanes(t, s, worker, 100, ask("mail/a", "mail/b", "mail/big", "mail/free", "mail/")...)
	if diff := cmp.Diff(map[task.Lane]int{"mail/a": 2, "mail/b": 2, "mail/big": 4, "mail/free": 9, "mail/": 9}, per(all)); diff != "" {
		t.Errorf("each key's limit (-want +got):\n%s", diff)
	}
	for lane, want := range map[task.Lane]task.Blocked{"mail/a": task.BlockedByKey, "mail/big": task.BlockedByKey, "mail/free": "", "mail/": ""} {
		if states[lane].Blocked != want {
			t.Errorf("%s is %+v, want blocked by %q", lane, states[lane], want)
		}
	}
	// Names that begin alike are different keys.
	insert(t, s, newTask(inQueue("mail", "a!", task.Normal)), newTask(inQueue("mail", "a1", task.Normal)), newTask(inQueue("mail0", "", task.Normal)))
	if got, _ := claimLanes(t, s, worker, 100, ask("mail/a!", "mail/a1", "mail0/")...); len(got) != 3 {
		t.Errorf("claimed %d tasks of neighbours, want 3", len(got))
	}
}

func TestF3PausedQueuesStartNothing(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	worker := register(t, s)
	exec(t, pool, `INSERT INTO queues (name, paused_at) VALUES ('mail', now())`)
	insert(t, s, newTask(inQueue("mail", "", task.Normal)), newTask(inQueue("mail", "k", task.Normal)))
	got, states := claimLanes(t, s, worker, 10, ask("mail/", "mail/k")...)
	if len(got) != 0 || states["mail/"].Blocked != task.BlockedByPause || states["mail/k"].Blocked != task.BlockedByPause {
		t.Errorf("claimed %d tasks, %v, want none of a paused queue", len(got), states)
	}
	exec(t, pool, `UPDATE queues SET paused_at = NULL`)
	if got, _ := claimLanes(t, s, worker, 10, ask("mail/", "mail/k")...); len(got) != 2 {
		t.Errorf("claimed %d tasks after the pause, want 2", len(got))
	}
}

func TestPrioritiesInALane(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	worker := register(t, s)
	at := func(p task.Priority, ago time.Duration) *task.Task {
		tk := newTask(inQueue("mail", "", p))
		insert(t, s, tk)
		exec(t, pool, "UPDATE tasks SET run_at = now() - $2::interval WHERE id = $1", [16]byte(tk.ID), ago)
		return tk
	}
	old, high, low := at(task.Normal, 14*time.Minute), at(task.High, 0), at(task.Low, 20*time.Minute)
	older, tomorrow := at(task.Normal, 16*time.Minute), at(task.High, -24*time.Hour)
	for i, want := range []*task.Task{older, high, old, low} {
		got, _ := claimLanes(t, s, worker, 1, task.LaneAsk{Lane: "mail/", Most: 1})
		if len(got) != 1 || got[0].Task.ID != want.ID {
			t.Fatalf("claim %d took %v, want %s", i, ids(got), want.ID)
		}
	}
	if got, states := claimLanes(t, s, worker, 10, ask("mail/")...); len(got) != 0 || states["mail/"].Wait < 23*time.Hour {
		t.Errorf("claimed %v, %v, want none: %s is due tomorrow", ids(got), states, tomorrow.ID)
	}
}

// An ordered key has one task at a time, in the order of due times, and waits while its
// first one waits for a retry.
func TestOrderedKeys(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	worker := register(t, s)
	exec(t, pool, `INSERT INTO queues (name, key_ordered) VALUES ('mail', true)`)
	var tasks []*task.Task
	for range 4 {
		tk := newTask(inQueue("mail", "k", task.Normal))
		insert(t, s, tk)
		tasks = append(tasks, tk)
	}
	next := func(want *task.Task) *task.Claim {
		t.Helper()
		got, _ := claimLanes(t, s, worker, 10, ask("mail/k")...)
		if len(got) != 1 || got[0].Task.ID != want.ID {
			t.Fatalf("claimed %v, want %s alone", ids(got), want.ID)
		}
		return got[0]
	}
	none := func(blocked task.Blocked) task.LaneState {
		t.Helper()
		got, states := claimLanes(t, s, worker, 10, ask("mail/k")...)
		if len(got) != 0 || states["mail/k"].Blocked != blocked {
			t.Fatalf("claimed %v, %+v, want none, blocked by %q", ids(got), states, blocked)
		}
		return states["mail/k"]
	}
	c := next(tasks[0])
	none(task.BlockedByKey)
	finish(t, s, c, task.Decision{State: task.Pending, Wait: time.Hour, Counted: true})
	if state := none(""); state.Wait < 50*time.Minute {
		t.Errorf("while its head waits the key is %+v, want an hour", state)
	}
	exec(t, pool, "UPDATE tasks SET run_at = now() WHERE id = $1", [16]byte(tasks[0].ID))
	finish(t, s, next(tasks[0]), done)
	c = next(tasks[1])
	// A host that is not healthy holds the head back, and so the key.
	finish(t, s, c, task.Decision{State: task.Pending, Host: "https://plays.melodia.app"})
	none(task.BlockedByKey)
	got, _ := claimLanes(t, s, worker, 10, ask("mail/k https://plays.melodia.app")...)
	if len(got) != 1 || got[0].Task.ID != tasks[1].ID {
		t.Fatalf("claimed %v from the host's lane, want %s", ids(got), tasks[1].ID)
	}
	finish(t, s, got[0], task.Decision{State: task.Pending, Wait: time.Hour})
	if _, err := s.Cancel(t.Context(), tasks[1].ID); err != nil {
		t.Fatal(err)
	}
	finish(t, s, next(tasks[2]), done)
	finish(t, s, next(tasks[3]), done)
	if state := none(""); state.Wait >= 0 {
		t.Errorf("an empty key is %+v, want nothing to wait for", state)
	}
}

// Callers see a task that waits in a lane as pending, and do with it what they do with others.
func TestF7LanesOnEveryPath(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	worker := register(t, s)
	raw := func(id task.ID) (state string) {
		t.Helper()
		return query[string](t, pool, "SELECT state || ' ' || COALESCE(lane, '') FROM tasks WHERE id = $1", [16]byte(id))
	}
	want := func(where string, id task.ID, state string) {
		t.Helper()
		if got := raw(id); got != state {
			t.Errorf("%s: it is %q, want %q", where, got, state)
		}
	}
	one := newTask(inQueue("mail", "k", task.Normal))
	c, err := s.InsertClaimed(t.Context(), worker, one)
	if c != nil || err != nil {
		t.Fatalf("InsertClaimed = %+v, %v, want no claim of what has limits", c, err)
	}
	want("inserted", one.ID, "waiting mail/k")
	if got := get(t, s, one.ID); got.State != task.Pending {
		t.Errorf("Get: %s, want pending", got.State)
	}
	for name, f := range map[string]task.Filter{"all": {}, "pending": {States: []task.State{task.Pending}}, "of the queue": {Queue: "mail", States: []task.State{task.Pending, task.Running}}} {
		if found, err := s.Find(t.Context(), &f, task.Position{}, 10); err != nil || len(found) != 1 || found[0].State != task.Pending {
			t.Errorf("Find %s: %d tasks, %v, want it, pending", name, len(found), err)
		}
	}
	if counts, _, err := s.Counts(t.Context()); err != nil || counts[task.Pending] != (task.Count{Tasks: 1, Exact: true}) {
		t.Errorf("Counts: %v, %v, want 1 pending", counts, err)
	}
	if explained, _, err := s.Explain(t.Context(), one.ID, lease); err != nil || explained.State != task.Pending {
		t.Errorf("Explain: %v, %v", explained, err)
	}

	moved := get(t, s, one.ID)
	moved.Queue, moved.FlowKey, moved.Priority = "", "", ""
	if _, err := s.Change(t.Context(), moved, nil); err != nil {
		t.Fatal(err)
	}
	want("changed to a plain one", one.ID, "pending ")
	moved = get(t, s, one.ID)
	moved.Queue, moved.FlowKey, moved.Priority = "slow", "k2", task.Low
	if _, err := s.Change(t.Context(), moved, nil); err != nil {
		t.Fatal(err)
	}
	want("changed", one.ID, "waiting slow/k2")
	if _, err := s.MakeDue(t.Context(), one.ID); err != nil {
		t.Errorf("MakeDue: %v", err)
	}
	want("to be run in spite of limits", one.ID, "pending slow/k2")

	got := claim(t, s, worker, 1)
	finish(t, s, got[0], task.Decision{State: task.Pending, Wait: 0, Counted: true})
	want("to be tried again", one.ID, "waiting slow/k2")
	if finish(t, s, got[0], done) {
		t.Error("a second result of the same claim changed the waiting task")
	}
	got, _ = claimLanes(t, s, worker, 1, ask("slow/k2")...)
	other := register(t, s)
	silence(t, pool, worker)
	if lost, err := s.Reap(t.Context(), other, nil, lease); len(lost) != 1 || err != nil {
		t.Fatalf("Reap = %v, %v", lost, err)
	}
	want("reaped", one.ID, "waiting slow/k2")
	if finish(t, s, got[0], done) {
		t.Error("a result of the lost claim changed the waiting task")
	}
	c, err = s.ClaimOne(t.Context(), other, one.ID)
	if err != nil || c.Task.Lane() != "slow/k2" {
		t.Fatalf("ClaimOne = %+v, %v", c, err)
	}
	finish(t, s, c, task.Decision{State: task.Pending, Host: "http://h:1"})
	want("held back with its host", one.ID, "waiting slow/k2 http://h:1")
	if held := get(t, s, one.ID); held.HeldHost != "http://h:1" || held.Queue != "slow" {
		t.Errorf("it waits for %q in %q", held.HeldHost, held.Queue)
	}
	got, _ = claimLanes(t, s, other, 1, ask("slow/k2 http://h:1")...)
	finish(t, s, got[0], task.Decision{State: task.Failed, Reason: task.ClientError})
	if _, err := s.Redrive(t.Context(), one.ID, 0); err != nil {
		t.Fatal(err)
	}
	want("redriven", one.ID, "waiting slow/k2")
	if _, err := s.Cancel(t.Context(), one.ID); err != nil {
		t.Errorf("Cancel: %v", err)
	}

	plain := newTask()
	insert(t, s, plain)
	finish(t, s, claimOne(t, s, other), task.Decision{State: task.Pending, Host: "http://h:1"})
	want("a plain one that is held back", plain.ID, "waiting  http://h:1")
	plain2 := newTask(func(tk *task.Task) { tk.HeldHost = "http://h:1" })
	insert(t, s, plain2)
	want("a plain one that is stored so", plain2.ID, "waiting  http://h:1")
	if got, _ := claimLanes(t, s, other, 10, ask(" http://h:1")...); len(got) != 2 {
		t.Errorf("claimed %d from the host's lane, want 2", len(got))
	}
}

// What may run of a host at a time holds for all lanes in which its tasks wait.
func TestLimitsOfHosts(t *testing.T) {
	t.Parallel()
	s, _ := newStore(t)
	worker := register(t, s)
	held := func(tk *task.Task) { tk.HeldHost = "http://h" }
	for range 5 {
		insert(t, s, newTask(held), newTask(inQueue("mail", "", task.Normal), held), newTask(inQueue("mail", "k", task.Normal), held))
	}
	asks := ask(" http://h", "mail/ http://h", "mail/k http://h")
	for i := range asks {
		asks[i].Running = 4
	}
	got, states := claimLanes(t, s, worker, 100, asks...)
	if len(got) != 4 {
		t.Errorf("claimed %d, want 4", len(got))
	}
	for lane, state := range states {
		if state.Blocked != task.BlockedByHost {
			t.Errorf("%s is %+v, want blocked by its host", lane, state)
		}
	}
	if more, _ := claimLanes(t, s, worker, 100, asks[1]); len(more) != 0 {
		t.Errorf("%d more while 4 of 4 run", len(more))
	}
	finish(t, s, got[0], done)
	if more, _ := claimLanes(t, s, worker, 100, asks[1]); len(more) != 1 {
		t.Errorf("%d after one has ended, want 1", len(more))
	}
}

func TestLookForLanes(t *testing.T) {
	t.Parallel()
	s, _ := newStore(t)
	for _, queue := range []string{"b", "a", "c"} {
		for range 3 {
			insert(t, s, newTask(inQueue(queue, "k", task.Normal)), newTask(inQueue(queue, "", task.High), func(tk *task.Task) { tk.Delay = time.Hour }))
		}
	}
	insert(t, s, newTask(), newTask(func(tk *task.Task) { tk.HeldHost = "http://h" }))
	var names []task.Lane
	for behind := task.Lane(""); ; {
		page, err := s.Lanes(t.Context(), behind, 3)
		if err != nil {
			t.Fatal(err)
		}
		for _, lane := range page {
			names = append(names, lane.Lane)
			behind = lane.Lane
			if later := lane.Lane.Key() == "" && lane.Lane.Queue() != ""; later != (lane.Wait > 0) || lane.Wait > time.Hour {
				t.Errorf("%s is due in %v", lane.Lane, lane.Wait)
			}
		}
		if len(page) < 3 {
			break
		}
	}
	if want := []task.Lane{" http://h", "a/", "a/k", "b/", "b/k", "c/", "c/k"}; !slices.Equal(names, want) {
		t.Errorf("lanes %q, want %q", names, want)
	}
}

// A claim waits for the lock of its queue while another one is made. What it counts then is what
// runs after that one; where it counts before it has the lock, the limit is broken.
func TestF1CountsUnderTheLock(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		countFirst bool
		want       int
	}{
		"counted under the lock":                    {false, 5},
		"negative control: counted before the lock": {true, 10},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			url := pgtest.URL(t)
			s, fast, pool := openStore(t, url), openStore(t, url), openPool(t, url)
			worker := register(t, s)
			exec(t, pool, `INSERT INTO queues (name, max_concurrent) VALUES ('mail', 5)`)
			for range 5 {
				insert(t, s, newTask(inQueue("mail", "a", task.Normal)), newTask(inQueue("mail", "b", task.Normal)))
			}
			s.LockLanesWhen(advisoryLock, tt.countFirst)
			got := 0
			whileLocked(t, pool, func() {
				claims, _, err := s.ClaimLanes(t.Context(), worker, ask("mail/a"), nil, 10)
				if err != nil {
					t.Error(err)
				}
				got += len(claims)
			}, func() {
				claims, _, err := fast.ClaimLanes(t.Context(), worker, ask("mail/b"), nil, 10)
				if len(claims) != 5 || err != nil {
					t.Errorf("the other claim took %d, %v, want 5", len(claims), err)
				}
				got += len(claims)
			})
			if got != tt.want {
				t.Errorf("%d tasks run, want %d", got, tt.want)
			}
		})
	}
}

// advisoryLock is a condition that waits where whileLocked is under way.
const advisoryLock = "pg_advisory_xact_lock_shared(1) IS NOT NULL"

// whileLocked runs slow, which waits at advisoryLock while meanwhile is run.
func whileLocked(t *testing.T, pool *pgxpool.Pool, slow, meanwhile func()) {
	t.Helper()
	gate, err := pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = gate.Rollback(context.WithoutCancel(t.Context())) }()
	if _, err := gate.Exec(t.Context(), "SELECT pg_advisory_xact_lock(1)"); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		slow()
	}()
	for query[int](t, pool, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND database = (SELECT oid FROM pg_database WHERE datname = current_database())") == 0 {
		select {
		case <-done:
			t.Fatal("nothing waits")
		default:
		}
	}
	meanwhile()
	_ = gate.Rollback(t.Context())
	<-done
}

// Four instances claim from the same lanes while tasks end, are tried again, are given
// back and are carried out by request. No snapshot shows more running than a limit allows.
func TestF1LimitsAreExact(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	exec(t, pool, `INSERT INTO queues (name, max_concurrent, key_max_concurrent, key_ordered)
		VALUES ('one', 7, NULL, false), ('two', 9, 2, false), ('three', NULL, NULL, true), ('four', NULL, NULL, false)`)
	lanes := []task.Lane{"one/", "four/"}
	var tasks []*task.Task
	for n := range 1200 {
		queue := []string{"one", "two", "three", "four"}[n%4]
		key := ""
		if queue == "two" || queue == "three" {
			key = fmt.Sprint(n / 4 % 10)
		}
		tasks = append(tasks, newTask(inQueue(queue, key, []task.Priority{task.High, task.Normal, task.Low}[n/4%3])))
		if lane := tasks[n].Lane(); !slices.Contains(lanes, lane) {
			lanes = append(lanes, lane)
		}
	}
	if err := s.InsertBatch(t.Context(), &task.Batch{Tasks: tasks}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var watching, claiming sync.WaitGroup
	watching.Go(func() { watchLimits(ctx, t, pool) })
	var mu sync.Mutex
	ended := 0
	for range 4 {
		worker := register(t, s)
		claiming.Go(func() {
			for {
				asks := ask(lanes...)
				rand.Shuffle(len(asks), func(i, j int) { asks[i], asks[j] = asks[j], asks[i] })
				claims, _, err := s.ClaimLanes(t.Context(), worker, asks, nil, 1+rand.IntN(30))
				if err != nil {
					t.Error(err)
					return
				}
				var finishing sync.WaitGroup
				for _, c := range claims {
					finishing.Go(func() {
						d := done
						if rand.IntN(4) == 0 {
							d = task.Decision{State: task.Pending}
						}
						if matched, _, err := write(s, c, d); !matched || err != nil {
							t.Errorf("Finish: %v, %v", matched, err)
						}
						if d.State == task.Succeeded {
							mu.Lock()
							ended++
							mu.Unlock()
						}
					})
				}
				finishing.Wait()
				mu.Lock()
				over := ended == len(tasks) || t.Failed()
				mu.Unlock()
				if over {
					return
				}
			}
		})
	}
	claiming.Wait()
	cancel()
	watching.Wait()
}

// watchLimits looks for broken limits until ctx ends.
func watchLimits(ctx context.Context, t *testing.T, pool *pgxpool.Pool) {
	limits := map[string]int{"one": 7, "two": 9}
	for ctx.Err() == nil {
		rows, err := pool.Query(ctx, "SELECT lane FROM tasks WHERE state = 'running' AND lane IS NOT NULL")
		if err != nil {
			return
		}
		queues, keys := map[string]int{}, map[task.Lane]int{}
		for rows.Next() {
			var lane task.Lane
			if err := rows.Scan((*string)(&lane)); err != nil {
				t.Error(err)
			}
			queues[lane.Queue()]++
			keys[lane]++
		}
		for queue, n := range queues {
			if most, ok := limits[queue]; ok && n > most {
				t.Errorf("%d of queue %s run, its limit is %d", n, queue, most)
			}
		}
		for lane, n := range keys {
			if most := map[string]int{"two": 2, "three": 1}[lane.Queue()]; most > 0 && n > most {
				t.Errorf("%d of %s run, its limit is %d", n, lane, most)
			}
		}
	}
}

// In no window do more tasks start than the burst and the rate allow: of a queue, and of a key.
func TestF2RatesHold(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	const rate, burst, keyRate = 200, 10, 60
	exec(t, pool, `INSERT INTO queues (name, max_per_second, burst, key_max_per_second, key_burst) VALUES ('mail', $1, $2, $3, 1)`, rate, burst, keyRate)
	var tasks []*task.Task
	for n := range 300 {
		tasks = append(tasks, newTask(inQueue("mail", []string{"a", "b", "", ""}[n%4], task.Normal)))
	}
	if err := s.InsertBatch(t.Context(), &task.Batch{Tasks: tasks}); err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	starts := map[string][]time.Time{}
	n := 0
	var claiming sync.WaitGroup
	for range 4 {
		worker := register(t, s)
		claiming.Go(func() {
			for over := false; !over; {
				claims, states, err := s.ClaimLanes(t.Context(), worker, ask("mail/a", "mail/b", "mail/"), nil, 100)
				if err != nil {
					t.Error(err)
					return
				}
				for _, state := range states {
					if state.Wait > time.Second/keyRate+10*time.Millisecond {
						t.Errorf("%+v: want a permit sooner", state)
					}
				}
				mu.Lock()
				for _, c := range claims {
					starts[""] = append(starts[""], c.At)
					starts[c.Task.FlowKey+"!"] = append(starts[c.Task.FlowKey+"!"], c.At)
				}
				n += len(claims)
				over = n == len(tasks)
				mu.Unlock()
			}
		})
	}
	claiming.Wait()
	delete(starts, "!")
	for key, at := range starts {
		rate, burst := float64(rate), float64(burst)
		if key != "" {
			rate, burst = keyRate, 1
		}
		slices.SortFunc(at, time.Time.Compare)
		for i := range at {
			for j := i; j < len(at); j++ {
				if most := burst + rate*at[j].Sub(at[i]).Seconds(); float64(j-i+1) > most+1e-3 {
					t.Fatalf("%s: %d starts in %v, want at most %.2f", key, j-i+1, at[j].Sub(at[i]), most)
				}
			}
		}
	}
}

// A rate that is changed holds at once, and so does one after the database's clock was set back.
func TestRatesChange(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	worker := register(t, s)
	exec(t, pool, `INSERT INTO queues (name, max_per_second, burst) VALUES ('mail', 0.001, 3)`)
	for range 40 {
		insert(t, s, newTask(inQueue("mail", "", task.Normal)))
	}
	want := func(when string, n int) time.Duration {
		t.Helper()
		got, states := claimLanes(t, s, worker, 100, ask("mail/")...)
		if len(got) != n {
			t.Errorf("%s: %d tasks, want %d", when, len(got), n)
		}
		return states["mail/"].Wait
	}
	if wait := want("at first", 3); wait < 900*time.Second || wait > 1000*time.Second {
		t.Errorf("the next permit comes in %v, want 1000 s", wait)
	}
	want("then", 0)
	exec(t, pool, `UPDATE queues SET max_per_second = 0.01, burst = 5`)
	if wait := want("with a greater burst", 2); wait < 90*time.Second || wait > 100*time.Second {
		t.Errorf("the next permit comes in %v, want 100 s", wait)
	}
	exec(t, pool, `UPDATE lanes SET claimed_at = claimed_at - interval '200 s'`)
	want("200 s later", 2)
	exec(t, pool, `UPDATE lanes SET claimed_at = claimed_at + interval '1 hour'`)
	want("with the clock an hour back", 5)
	want("and then", 0)
	exec(t, pool, `UPDATE queues SET max_per_second = NULL`)
	want("without a rate", 28)
}

func TestLanesAreSwept(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	worker := register(t, s)
	exec(t, pool, `INSERT INTO queues (name, max_per_second, key_ordered) VALUES ('mail', 100, true)`)
	insert(t, s, newTask(inQueue("mail", "a", task.Normal)), newTask(inQueue("mail", "b", task.Normal)), newTask(inQueue("mail", "c", task.Normal)), newTask(inQueue("mail", "c", task.High)))
	claims, _ := claimLanes(t, s, worker, 10, ask("mail/a", "mail/b", "mail/c")...)
	sweep := func(want ...string) {
		t.Helper()
		if err := s.KeepHistory(t.Context(), 24*time.Hour, 0); err != nil {
			t.Fatal(err)
		}
		if got := query[[]string](t, pool, "SELECT array_agg(name ORDER BY name) FROM lanes"); !slices.Equal(got, want) {
			t.Errorf("lanes %q are left, want %q", got, want)
		}
	}
	sweep("mail/", "mail/a", "mail/b", "mail/c")
	// a has ended, b runs for more than an hour, c is to be run by request.
	for _, c := range claims {
		switch c.Task.FlowKey {
		case "a":
			finish(t, s, c, done)
		case "c":
			finish(t, s, c, task.Decision{State: task.Pending, Wait: time.Hour})
			if _, err := s.MakeDue(t.Context(), c.Task.ID); err != nil {
				t.Fatal(err)
			}
		}
	}
	exec(t, pool, "UPDATE lanes SET claimed_at = now() - interval '61 min', burst_used = CASE name WHEN 'mail/' THEN 2 ELSE 0 END")
	sweep("mail/", "mail/b", "mail/c")
	insert(t, s, newTask(inQueue("mail", "a", task.Normal)))
	if got, states := claimLanes(t, s, worker, 10, ask("mail/a", "mail/c")...); len(got) != 1 || states["mail/c"].Blocked != task.BlockedByKey {
		t.Errorf("claimed %v after the sweep, %+v, want one of mail/a", ids(got), states)
	}
}

// A sweep looks at each row once, however many stay.
func TestSweepOfManyLanes(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	exec(t, pool, "INSERT INTO lanes (name, claimed_at) SELECT lpad(n::text, 6, '0'), now() - n % 2 * interval '2 hours' FROM generate_series(1, 50000) n")
	if err := s.KeepHistory(t.Context(), 24*time.Hour, 0); err != nil {
		t.Fatal(err)
	}
	if n := query[int](t, pool, "SELECT count(*) FROM lanes"); n != 25_000 {
		t.Errorf("%d lanes are left, want the half that was used within the hour", n)
	}
}
