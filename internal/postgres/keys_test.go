package postgres_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/melodia/orchestrator/internal/postgres"
	"github.com/melodia/orchestrator/internal/task"
)

// once makes a new task that was submitted under a key. Its fingerprint is that of the
// request.
func once(key, request string) *task.Task {
	tk := withKey(key)
	tk.Fingerprint = []byte(request)
	return tk
}

// wantRepeat fails unless err names the tasks of the first request.
func wantRepeat(t *testing.T, err error, first ...task.ID) {
	t.Helper()
	var repeat *task.RepeatError
	if !errors.As(err, &repeat) {
		t.Errorf("Insert: %v, want a repeat", err)
	} else if diff := cmp.Diff(first, repeat.Tasks); diff != "" {
		t.Errorf("the tasks of the first request (-want +got):\n%s", diff)
	}
}

func count(t *testing.T, pool *pgxpool.Pool) int {
	t.Helper()
	return query[int](t, pool, "SELECT (SELECT count(*) FROM tasks) + (SELECT count(*) FROM task_history)")
}

func TestInsertOnce(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	worker := register(t, s)
	first, claimed := once("a", "1"), once("claimed", "1")
	insert(t, s, first, once("b", "1"), newTask())
	c, err := s.InsertClaimed(t.Context(), worker, claimed)
	if err != nil || c == nil {
		t.Fatalf("InsertClaimed = %v, %v", c, err)
	}
	if got := get(t, s, first.ID); got.IdempotencyKey != "a" || got.Fingerprint != nil {
		t.Errorf("stored with the key %q and the fingerprint %q, want the key alone", got.IdempotencyKey, got.Fingerprint)
	}
	again := func() {
		t.Helper()
		wantRepeat(t, s.Insert(t.Context(), once("a", "1")), first.ID)
		wantRepeat(t, s.Insert(t.Context(), once("claimed", "1")), claimed.ID)
		if c, err := s.InsertClaimed(t.Context(), worker, once("a", "1")); c != nil {
			t.Errorf("InsertClaimed of a repeat = %v", c)
		} else {
			wantRepeat(t, err, first.ID)
		}
		if err := s.Insert(t.Context(), once("a", "2")); !errors.Is(err, task.ErrKeyTaken) {
			t.Errorf("Insert of another request: %v, want ErrKeyTaken", err)
		}
		wantRepeat(t, s.Repeated(t.Context(), "a", []byte("1")), first.ID)
		if err := s.Repeated(t.Context(), "a", []byte("2")); !errors.Is(err, task.ErrKeyTaken) {
			t.Errorf("Repeated of another request: %v, want ErrKeyTaken", err)
		}
		if err := s.Repeated(t.Context(), "never", []byte("1")); err != nil {
			t.Errorf("Repeated of an unknown key: %v, want nil", err)
		}
		if got := count(t, pool); got != 4 {
			t.Errorf("%d tasks are stored, want 4", got)
		}
	}
	again()
	finish(t, s, c, succeeded(c))
	own := claim(t, s, worker, 10)
	for _, c := range own {
		finish(t, s, c, succeeded(c))
	}
	again() // what has ended was done
}

// Tasks without a key do not even look at the table of keys.
func TestInsertWithoutKeys(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	lock(t, pool, "idempotency_keys")
	insert(t, s, newTask())
}

// insertTogether inserts tasks by as many callers while the database hangs, so
// that most of them are in one statement.
func insertTogether(t *testing.T, s *postgres.Store, pool *pgxpool.Pool, tasks []*task.Task) []error {
	t.Helper()
	tx := lock(t, pool, "tasks IN EXCLUSIVE MODE")
	errs := make([]error, len(tasks))
	var began, inserting sync.WaitGroup
	for i, tk := range tasks {
		began.Add(1)
		inserting.Go(func() {
			began.Done()
			errs[i] = s.Insert(t.Context(), tk)
		})
	}
	began.Wait()
	if err := tx.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	inserting.Wait()
	return errs
}

// Equal keys in one statement, among others and none, and a row that the
// database refuses.
func TestInsertOnceInOneStatement(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	var tasks []*task.Task
	for i := range 200 {
		switch i % 4 {
		case 0, 1:
			tasks = append(tasks, once(fmt.Sprint("key ", i%5), "1"))
		case 2:
			tasks = append(tasks, once(fmt.Sprint("key ", i%5), "2"))
		default:
			tasks = append(tasks, newTask())
		}
	}
	tasks[100].Labels = map[string]string{"nul": "\x00"} // jsonb does not take it
	errs := insertTogether(t, s, pool, tasks)
	winners := map[string]*task.Task{}
	plain := 0
	for i, err := range errs {
		switch {
		case err != nil:
		case tasks[i].IdempotencyKey == "":
			plain++
		case winners[tasks[i].IdempotencyKey] != nil:
			t.Errorf("two tasks are stored under %q", tasks[i].IdempotencyKey)
		default:
			winners[tasks[i].IdempotencyKey] = tasks[i]
		}
	}
	if plain != 50 || len(winners) != 5 {
		t.Errorf("%d tasks without a key are stored, and %d keys have one; want 50 and 5", plain, len(winners))
	}
	for i, err := range errs {
		switch winner := winners[tasks[i].IdempotencyKey]; {
		case err == nil || i == 100:
		case string(winner.Fingerprint) != string(tasks[i].Fingerprint):
			if !errors.Is(err, task.ErrKeyTaken) {
				t.Errorf("another request: %v, want ErrKeyTaken", err)
			}
		default:
			wantRepeat(t, err, winner.ID)
		}
	}
	if got := count(t, pool); got != 55 {
		t.Errorf("%d tasks are stored, want 55", got)
	}
}

// 50 at once, a thousand times, at two instances: one task each time.
func TestInsertOnceRaces(t *testing.T) {
	t.Parallel()
	const rounds, callers = 1000, 50
	s, pool := newStore(t)
	other, err := postgres.Open(t.Context(), postgres.Options{URL: pool.Config().ConnString(), MaxConns: 10, IdempotencyWindow: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(other.Close)
	worker := register(t, s)
	for round := range rounds {
		key := fmt.Sprint("round ", round)
		errs := make([]error, callers)
		tasks := make([]*task.Task, callers)
		var inserting sync.WaitGroup
		for i := range callers {
			tasks[i] = once(key, "1")
			inserting.Go(func() {
				switch i % 3 {
				case 0:
					errs[i] = s.Insert(t.Context(), tasks[i])
				case 1:
					_, errs[i] = s.InsertClaimed(t.Context(), worker, tasks[i])
				default:
					errs[i] = other.Insert(t.Context(), tasks[i])
				}
			})
		}
		inserting.Wait()
		winner := slices.Index(errs, nil)
		if winner < 0 {
			t.Fatalf("round %d: nothing is stored: %v", round, errs)
		}
		for i, err := range errs {
			if i != winner {
				wantRepeat(t, err, tasks[winner].ID)
			}
		}
		if t.Failed() {
			t.Fatalf("in round %d", round)
		}
	}
	if got := count(t, pool); got != rounds {
		t.Errorf("%d tasks are stored, want %d", got, rounds)
	}
}

// A request whose answer got lost has it by asking again.
func TestInsertOnceAgainAfterALostAnswer(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	tx := lock(t, pool, "tasks IN EXCLUSIVE MODE")
	first := once("a", "1")
	ctx, hangUp := context.WithCancel(t.Context())
	lost := make(chan error)
	go func() { lost <- s.Insert(ctx, first) }()
	const waits = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'tasks'::regclass"
	for query[int](t, pool, waits) == 0 { // until the statement is under way
		continue
	}
	hangUp()
	if err := <-lost; !errors.Is(err, task.ErrUnavailable) {
		t.Errorf("Insert whose caller hung up: %v, want ErrUnavailable", err)
	}
	if err := tx.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantRepeat(t, s.Insert(t.Context(), once("a", "1")), first.ID)
}

// An expired key is none, and goes with the next upkeep.
func TestExpiredKeys(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	old, fresh := once("old", "1"), once("fresh", "1")
	insert(t, s, old, fresh)
	exec(t, pool, "UPDATE idempotency_keys SET expires_at = now() - interval '1 s' WHERE key = 'old'")

	// Of those that come at once then one is stored.
	var tasks []*task.Task
	for range 20 {
		tasks = append(tasks, once("old", "2"))
	}
	errs := insertTogether(t, s, pool, tasks)
	winner := slices.Index(errs, nil)
	if winner < 0 {
		t.Fatalf("nothing is stored under an expired key: %v", errs)
	}
	for i, err := range errs {
		if i != winner {
			wantRepeat(t, err, tasks[winner].ID)
		}
	}
	if left := query[time.Duration](t, pool, "SELECT expires_at - now() FROM idempotency_keys WHERE key = 'old'"); left < 50*time.Minute || left > time.Hour {
		t.Errorf("the key counts for %v, want the window of 1 h", left)
	}

	exec(t, pool, `INSERT INTO idempotency_keys SELECT 'many ' || i, '', '{}', now() FROM generate_series(1, 25000) i`)
	exec(t, pool, "UPDATE idempotency_keys SET expires_at = now() WHERE key = 'old'")
	// One that is being taken over is not waited for.
	tx, err := pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tx.Rollback(context.WithoutCancel(t.Context())) }()
	if _, err := tx.Exec(t.Context(), "UPDATE idempotency_keys SET expires_at = now() + interval '1 day' WHERE key = 'old'"); err != nil {
		t.Fatal(err)
	}
	keepHistory(t, s, retention)
	if err := tx.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"fresh", "old"}, keys(t, pool)); diff != "" {
		t.Errorf("keys after the upkeep (-want +got):\n%s", diff)
	}
}

// A cancelled task's key is free, however it was cancelled.
func TestCancelledTasksFreeTheirKeys(t *testing.T) {
	t.Parallel()
	s, _ := newStore(t)
	worker := register(t, s)
	pending := once("pending", "1")
	insert(t, s, pending)
	running, err := s.InsertClaimed(t.Context(), worker, once("running", "1"))
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range []task.ID{pending.ID, running.Task.ID} {
		if _, err := s.Cancel(t.Context(), id); err != nil {
			t.Fatal(err)
		}
	}
	wantRepeat(t, s.Insert(t.Context(), once("running", "1")), running.Task.ID) // it may still succeed
	finish(t, s, running, running.Next(task.Outcome{Kind: task.OutcomeInterrupted, Cancelled: true}, running.At, 0))
	insert(t, s, once("pending", "2"), once("running", "2"))

	// The old task comes back, and goes again: the key is not its own any more.
	if _, err := s.Redrive(t.Context(), pending.ID, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Cancel(t.Context(), pending.ID); err != nil {
		t.Fatal(err)
	}
	if err := s.Insert(t.Context(), once("pending", "1")); !errors.Is(err, task.ErrKeyTaken) {
		t.Errorf("Insert under a key that has been given anew: %v, want ErrKeyTaken", err)
	}
}

// Many keys, taken, released, swept and taken over at once, in any order: each
// stands for one task that is not cancelled, and no statement waits for another
// that waits for it.
func TestKeysUnderFire(t *testing.T) {
	t.Parallel()
	const names, callers, rounds = 20, 16, 60
	s, pool := newStore(t)
	var mu sync.Mutex
	byKey := map[string][]task.ID{}
	var stored []task.ID
	var firing sync.WaitGroup
	for caller := range callers {
		firing.Go(func() {
			random := rand.New(rand.NewPCG(1, uint64(caller))) //nolint:gosec // not a secret
			for range rounds {
				key := fmt.Sprint("key ", random.IntN(names))
				tk := once(key, "1")
				var repeat *task.RepeatError
				switch err := s.Insert(t.Context(), tk); {
				case err == nil:
					mu.Lock()
					byKey[key], stored = append(byKey[key], tk.ID), append(stored, tk.ID)
					mu.Unlock()
				case !errors.As(err, &repeat):
					t.Errorf("Insert: %v", err)
				}
				mu.Lock()
				some := make([]task.ID, 0, 8)
				for range min(8, len(stored)) {
					some = append(some, stored[random.IntN(len(stored))])
				}
				mu.Unlock()
				if _, _, err := s.CancelMany(t.Context(), some); err != nil {
					t.Errorf("CancelMany: %v", err)
				}
			}
		})
	}
	done := make(chan struct{})
	var upkeep sync.WaitGroup
	upkeep.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
				keepHistory(t, s, retention)
			}
		}
	})
	firing.Wait()
	close(done)
	upkeep.Wait()
	if n := query[int](t, pool, "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"); n > 0 {
		t.Errorf("%d deadlocks", n)
	}
	for key, ids := range byKey {
		live := query[[][16]byte](t, pool, "SELECT coalesce(array_agg(id), '{}') FROM tasks WHERE id = ANY ($1)", raw(ids))
		kept := query[[][16]byte](t, pool, "SELECT coalesce((SELECT task_ids FROM idempotency_keys WHERE key = $1), '{}')", key)
		if !slices.Equal(live, kept) {
			t.Errorf("%s stands for %v, and its tasks that are not cancelled are %v", key, kept, live)
		}
	}
	if len(stored) <= names {
		t.Errorf("%d tasks were stored: no key was given anew", len(stored))
	}
}

// A batch is stored as one, or not at all.
func TestInsertBatch(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	batchOf := func(n int) *task.Batch {
		b := &task.Batch{}
		for range n {
			b.Tasks = append(b.Tasks, newTask())
		}
		return b
	}
	b := batchOf(1000)
	b.Tasks[1].Delay, b.Tasks[2].RunAt = time.Hour, time.Date(2199, 12, 31, 0, 0, 0, 0, time.UTC)
	b.Tasks[3].RunAt, b.Tasks[999].Body = time.Date(1999, 12, 31, 0, 0, 0, 0, time.UTC), []byte("last")
	b.Tasks[999].BodyBytes = len("last")
	if err := s.InsertBatch(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	for i, wait := range map[int]time.Duration{0: 0, 1: time.Hour, 2: b.Tasks[2].RunAt.Sub(b.Tasks[0].CreatedAt), 3: 0, 999: 0} {
		if got := b.Tasks[i].RunAt.Sub(b.Tasks[i].CreatedAt); got != wait {
			t.Errorf("task %d is due after %v, want %v", i, got, wait)
		}
		if diff := cmp.Diff(b.Tasks[i], get(t, s, b.Tasks[i].ID), cmpopts.EquateEmpty(), cmpopts.EquateApproxTime(0), cmpopts.IgnoreFields(task.Task{}, "Delay")); diff != "" {
			t.Errorf("Get (-want +got):\n%s", diff)
		}
	}
	many, err := s.GetMany(t.Context(), []task.ID{b.Tasks[999].ID, b.Tasks[0].ID, b.Tasks[1].ID})
	if err != nil || len(many) != 3 || many[0].ID != b.Tasks[999].ID || many[1].ID != b.Tasks[0].ID || many[2].ID != b.Tasks[1].ID {
		t.Errorf("GetMany = %v, %v, want the three in order", many, err)
	}
	if _, err := s.GetMany(t.Context(), []task.ID{b.Tasks[0].ID, newID()}); !errors.Is(err, task.ErrNotFound) {
		t.Errorf("GetMany with an unknown task: %v, want ErrNotFound", err)
	}

	// One row that the database refuses keeps all of its batch out, and no others.
	bad := batchOf(500)
	bad.Tasks[321].Labels = map[string]string{"nul": "\x00"} // jsonb does not take it
	var inserting sync.WaitGroup
	inserting.Go(func() {
		if err := s.InsertBatch(t.Context(), bad); err == nil || errors.Is(err, task.ErrUnavailable) {
			t.Errorf("InsertBatch with a bad row: %v, want an error for good", err)
		}
	})
	inserting.Go(func() {
		if err := s.InsertBatch(t.Context(), batchOf(2)); err != nil {
			t.Errorf("InsertBatch beside one with a bad row: %v", err)
		}
	})
	inserting.Go(func() { insert(t, s, newTask()) })
	inserting.Wait()
	if got := count(t, pool); got != 1003 {
		t.Errorf("%d tasks are stored, want 1003", got)
	}
}

func TestInsertBatchOnce(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	batchOf := func(key, request string) *task.Batch {
		return &task.Batch{IdempotencyKey: key, Fingerprint: []byte(request), Tasks: []*task.Task{newTask(), newTask(), newTask()}}
	}
	// At once, and beside a single task under the same key.
	for round := range 50 {
		key := fmt.Sprint("round ", round)
		batches := make([]*task.Batch, 8)
		errs := make([]error, len(batches))
		var single error
		tk := once(key, "single")
		var inserting sync.WaitGroup
		for i := range batches {
			batches[i] = batchOf(key, "1")
			inserting.Go(func() { errs[i] = s.InsertBatch(t.Context(), batches[i]) })
		}
		inserting.Go(func() { single = s.Insert(t.Context(), tk) })
		inserting.Wait()
		winner := slices.Index(errs, nil)
		if (winner < 0) != (single == nil) {
			t.Fatalf("round %d: a batch and a task under one key: %v, %v", round, errs, single)
		}
		for i, err := range errs {
			switch {
			case winner < 0:
				if !errors.Is(err, task.ErrKeyTaken) {
					t.Errorf("a batch after a task: %v, want ErrKeyTaken", err)
				}
			case i != winner:
				first := batches[winner].Tasks
				wantRepeat(t, err, first[0].ID, first[1].ID, first[2].ID)
			}
		}
	}
	b := batchOf("cancelled", "1")
	if err := s.InsertBatch(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	for _, tk := range b.Tasks {
		if _, err := s.Cancel(t.Context(), tk.ID); err != nil {
			t.Fatal(err)
		}
	}
	wantRepeat(t, s.InsertBatch(t.Context(), batchOf("cancelled", "1")), b.Tasks[0].ID, b.Tasks[1].ID, b.Tasks[2].ID)
	exec(t, pool, "UPDATE idempotency_keys SET expires_at = now() WHERE key = 'cancelled'")
	if err := s.InsertBatch(t.Context(), batchOf("cancelled", "2")); err != nil {
		t.Errorf("InsertBatch under an expired key: %v", err)
	}
	one := &task.Batch{IdempotencyKey: "one", Fingerprint: []byte("1"), Tasks: []*task.Task{newTask()}}
	if err := s.InsertBatch(t.Context(), one); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Cancel(t.Context(), one.Tasks[0].ID); err != nil {
		t.Fatal(err)
	}
	repeated := &task.Batch{IdempotencyKey: "one", Fingerprint: []byte("1"), Tasks: []*task.Task{newTask()}}
	wantRepeat(t, s.InsertBatch(t.Context(), repeated), one.Tasks[0].ID) // a batch's key stays, also of one task
}

// While batches hang in the database one after the other, the rest are turned
// away; what is submitted one by one and heartbeats find their way.
func TestBatchesAreShed(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	worker := register(t, s)
	tx, err := pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tx.Rollback(context.WithoutCancel(t.Context())) }()
	// The batch under way waits for its key.
	if _, err := tx.Exec(t.Context(), "INSERT INTO idempotency_keys VALUES ('k', '', '{}', now())"); err != nil {
		t.Fatal(err)
	}
	const waiting, under, more = 32, 1, 20
	var mu sync.Mutex
	stored, shed := 0, 0
	enough := make(chan struct{})
	var callers sync.WaitGroup
	for range waiting + under + more {
		callers.Go(func() {
			err := s.InsertBatch(t.Context(), &task.Batch{Tasks: []*task.Task{newTask()}, IdempotencyKey: "k", Fingerprint: []byte{}})
			mu.Lock()
			defer mu.Unlock()
			var repeat *task.RepeatError
			switch {
			case err == nil:
				stored++
			case errors.Is(err, task.ErrOverloaded) && !errors.Is(err, task.ErrUnavailable):
				if shed++; shed == more {
					close(enough)
				}
			case !errors.As(err, &repeat) && !errors.Is(err, task.ErrUnavailable): // a machine so slow that the call's time was over
				t.Errorf("InsertBatch: %v", err)
			}
		})
	}
	over := make(chan struct{})
	go func() {
		defer close(over)
		callers.Wait()
	}()
	select {
	case <-enough:
	case <-over:
		t.Errorf("%d were turned away while the database hung, want %d", shed, more)
	}
	insert(t, s, newTask(), newTask())
	if known, err := s.Heartbeat(t.Context(), worker); !known || err != nil {
		t.Errorf("Heartbeat = %v, %v", known, err)
	}
	if err := tx.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	<-over
	if got := query[int](t, pool, "SELECT count(*) FROM tasks"); got != 2+stored || stored > 1 || shed > more+under {
		t.Errorf("%d batches were stored, %d turned away, and there are %d tasks; want 1, %d and 3", stored, shed, got, more)
	}
}

func raw(ids []task.ID) [][16]byte {
	out := make([][16]byte, len(ids))
	for i, id := range ids {
		out[i] = id
	}
	return out
}
