package postgres_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/jackc/pgx/v5"

	"github.com/melodia/orchestrator/internal/postgres"
	"github.com/melodia/orchestrator/internal/task"
)

var ignoreVersion = cmp.Options{cmpopts.IgnoreFields(task.Queue{}, "Version"), cmpopts.IgnoreFields(task.QueueKey{}, "Version")}

// full returns settings in which everything is set.
func full(name string) task.Queue {
	return task.Queue{Name: name, QueueSettings: task.QueueSettings{
		Limits: task.Limits{MaxConcurrent: 5, MaxPerSecond: 0.25, Burst: 7},
		PerKey: task.KeyLimits{Limits: task.Limits{MaxConcurrent: 1, MaxPerSecond: 3, Burst: 4}, Ordered: true},
		Defaults: task.QueueDefaults{Timeout: new(1500 * time.Millisecond), Retry: task.RetryChange{
			MaxAttempts: new(3), MaxRetryDuration: new(time.Hour), MinBackoff: new(290 * time.Millisecond), MaxBackoff: new(time.Minute),
			MaxDoublings: new(0), RetryClientErrors: new(false),
		}},
	}}
}

func putQueue(t *testing.T, s *postgres.Store, q task.Queue) task.Queue {
	t.Helper()
	written, err := s.PutQueue(t.Context(), q)
	if err != nil {
		t.Fatal(err)
	}
	return written
}

func TestQueue(t *testing.T) {
	t.Parallel()
	s, _ := newStore(t)
	if _, err := s.Queue(t.Context(), "mail"); !errors.Is(err, task.ErrQueueNotFound) {
		t.Fatalf("Queue = %v, want ErrQueueNotFound", err)
	}
	want := full("mail")
	first := putQueue(t, s, want)
	got, err := s.Queue(t.Context(), "mail")
	if err != nil {
		t.Fatal(err)
	}
	for name, q := range map[string]task.Queue{"written": first, "read": got} {
		if diff := cmp.Diff(want, q, ignoreVersion); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
	if first.Version == 0 || got.Version != first.Version {
		t.Errorf("the version is %d where it was written and %d where it was read", first.Version, got.Version)
	}
	none := task.Queue{Name: "mail", Version: first.Version}
	second := putQueue(t, s, none)
	if diff := cmp.Diff(none, second, ignoreVersion); diff != "" || second.Version <= first.Version {
		t.Errorf("without any limit: version %d after %d; (-want +got):\n%s", second.Version, first.Version, diff)
	}
}

// Of editors who read the same version one writes, and the others are told.
func TestEditorsOfAQueue(t *testing.T) {
	t.Parallel()
	s, _ := newStore(t)
	for round, version := 0, int64(0); round < 5; round++ {
		errs := make([]error, 8)
		written := make([]task.Queue, len(errs))
		var wg sync.WaitGroup
		for i := range errs {
			wg.Go(func() {
				q := task.Queue{Name: "mail", Version: version}
				q.MaxConcurrent = 1 + i
				written[i], errs[i] = s.PutQueue(t.Context(), q)
			})
		}
		wg.Wait()
		winner := -1
		for i, err := range errs {
			switch {
			case err == nil && winner < 0:
				winner = i
			case err == nil:
				t.Errorf("round %d: editors %d and %d have both written", round, winner, i)
			case !errors.Is(err, task.ErrQueueChanged):
				t.Errorf("round %d, editor %d: %v, want ErrQueueChanged", round, i, err)
			}
		}
		if winner < 0 {
			t.Fatalf("round %d: none has written: %v", round, errs)
		}
		got, err := s.Queue(t.Context(), "mail")
		if err != nil || got.MaxConcurrent != 1+winner || got.Version != written[winner].Version {
			t.Errorf("round %d: %+v, %v; want what editor %d has written: %+v", round, got, err, winner, written[winner])
		}
		version = got.Version
	}
}

func TestPauseQueue(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	if _, err := s.PauseQueue(t.Context(), "mail", true); !errors.Is(err, task.ErrQueueNotFound) {
		t.Fatalf("PauseQueue = %v, want ErrQueueNotFound", err)
	}
	q := putQueue(t, s, full("mail"))
	paused, err := s.PauseQueue(t.Context(), "mail", true)
	now := query[time.Time](t, pool, "SELECT now()")
	if err != nil || paused.PausedAt.IsZero() || now.Sub(paused.PausedAt) > time.Minute || paused.Version != q.Version {
		t.Fatalf("PauseQueue = %+v, %v; want it paused a moment ago, in version %d", paused, err, q.Version)
	}
	again, err := s.PauseQueue(t.Context(), "mail", true)
	if err != nil || !again.PausedAt.Equal(paused.PausedAt) {
		t.Errorf("paused since %v, %v; want since %v", again.PausedAt, err, paused.PausedAt)
	}
	// Settings that are written meanwhile end no pause.
	if q = putQueue(t, s, q); !q.PausedAt.Equal(paused.PausedAt) {
		t.Errorf("after its settings were written it is paused since %v, want %v", q.PausedAt, paused.PausedAt)
	}
	for range 2 {
		if q, err = s.PauseQueue(t.Context(), "mail", false); err != nil || !q.PausedAt.IsZero() {
			t.Errorf("resumed: %+v, %v", q, err)
		}
	}
}

func TestQueueDefaults(t *testing.T) {
	t.Parallel()
	s, _ := newStore(t)
	want := full("mail")
	putQueue(t, s, want)
	putQueue(t, s, task.Queue{Name: "none"})
	var wg sync.WaitGroup
	for i := range 40 { // in few statements
		wg.Go(func() {
			name := []string{"mail", "none", "unknown"}[i%3]
			got, err := s.QueueDefaults(t.Context(), name)
			if want := map[string]task.QueueDefaults{"mail": want.Defaults}[name]; err != nil || cmp.Diff(want, got) != "" {
				t.Errorf("%s: %v; (-want +got):\n%s", name, err, cmp.Diff(want, got))
			}
		})
	}
	wg.Wait()
}

// A queue exists from the first task that names it on, in whichever way.
func TestQueuesAreThereByUse(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	exists := func(names ...string) {
		t.Helper()
		for _, name := range names {
			q, err := s.Queue(t.Context(), name)
			if diff := cmp.Diff(task.Queue{Name: name}, q); err != nil || diff != "" {
				t.Errorf("%s: %v; (-want +got):\n%s", name, err, diff)
			}
		}
	}
	var wg sync.WaitGroup
	for i := range 40 { // in few statements, some of which want the same rows
		wg.Go(func() { insert(t, s, newTask(inQueue(fmt.Sprint("queue", i%3), "", task.Normal))) })
	}
	wg.Wait()
	exists("queue0", "queue1", "queue2")
	insert(t, s, newTask(inQueue("once", "", task.Normal), func(tk *task.Task) { tk.IdempotencyKey, tk.Fingerprint = "k", []byte{} }))
	exists("once")
	batch := &task.Batch{IdempotencyKey: "b", Fingerprint: []byte{}}
	for i := range 3 {
		batch.Tasks = append(batch.Tasks, newTask(inQueue(fmt.Sprint("batch", i), "", task.Normal)))
	}
	if err := s.InsertBatch(t.Context(), batch); err != nil {
		t.Fatal(err)
	}
	exists("batch0", "batch1", "batch2")

	tk := newTask()
	insert(t, s, tk)
	tk = get(t, s, tk.ID)
	tk.Queue, tk.Priority = "changed", task.Normal
	stale := *tk
	if _, err := s.Change(t.Context(), tk, nil); err != nil {
		t.Fatal(err)
	}
	exists("changed")
	stale.Queue = "stale"
	if _, err := s.Change(t.Context(), &stale, nil); !errors.Is(err, task.ErrChanged) {
		t.Fatalf("Change = %v, want ErrChanged", err)
	}
	if _, err := s.Queue(t.Context(), "stale"); !errors.Is(err, task.ErrQueueNotFound) {
		t.Errorf("a change that was not made has made its queue: %v", err)
	}
	if _, err := s.Cancel(t.Context(), tk.ID); err != nil {
		t.Fatal(err)
	}
	exec(t, pool, "DELETE FROM queues WHERE name = 'changed'")
	if _, err := s.Redrive(t.Context(), tk.ID, 0); err != nil {
		t.Fatal(err)
	}
	exists("changed")
}

func TestQueueKeys(t *testing.T) {
	t.Parallel()
	s, _ := newStore(t)
	put := func(k task.QueueKey) task.QueueKey {
		t.Helper()
		written, err := s.PutQueueKey(t.Context(), k)
		if err != nil {
			t.Fatal(err)
		}
		return written
	}
	limits := task.KeyLimits{Limits: task.Limits{MaxConcurrent: 1, MaxPerSecond: 0.5, Burst: 3}, Ordered: true}
	first := task.QueueKey{Queue: "mail", Key: "tenant/42", KeyLimits: limits}
	if _, err := s.PutQueueKey(t.Context(), first); !errors.Is(err, task.ErrQueueNotFound) {
		t.Fatalf("PutQueueKey = %v, want ErrQueueNotFound", err)
	}
	if _, err := s.QueueKey(t.Context(), "mail", "tenant/42"); !errors.Is(err, task.ErrQueueKeyNotFound) {
		t.Fatalf("QueueKey = %v, want ErrQueueKeyNotFound", err)
	}
	putQueue(t, s, task.Queue{Name: "mail"})
	putQueue(t, s, task.Queue{Name: "other"})
	written := put(first)
	got, err := s.QueueKey(t.Context(), "mail", "tenant/42")
	if diff := cmp.Diff(first, got, ignoreVersion); err != nil || diff != "" || got.Version == 0 || got.Version != written.Version {
		t.Errorf("%v, version %d; (-want +got):\n%s", err, got.Version, diff)
	}
	// Another editor was first.
	if _, err := s.PutQueueKey(t.Context(), first); !errors.Is(err, task.ErrQueueChanged) {
		t.Errorf("PutQueueKey from version 0 = %v, want ErrQueueChanged", err)
	}
	if _, err := s.PutQueueKey(t.Context(), task.QueueKey{Queue: "mail", Key: "new", Version: 7}); !errors.Is(err, task.ErrQueueChanged) {
		t.Errorf("PutQueueKey of what was deleted = %v, want ErrQueueChanged", err)
	}
	if err := s.DeleteQueueKey(t.Context(), "mail", "tenant/42", written.Version+1); !errors.Is(err, task.ErrQueueChanged) {
		t.Errorf("DeleteQueueKey of another version = %v, want ErrQueueChanged", err)
	}
	none := task.QueueKey{Queue: "mail", Key: "tenant/42", Version: written.Version}
	if second := put(none); second.Version <= written.Version || second.KeyLimits != (task.KeyLimits{}) {
		t.Errorf("written %+v after %+v", second, written)
	}

	for _, key := range []string{"b", "B", "a", "~"} {
		put(task.QueueKey{Queue: "mail", Key: key})
	}
	put(task.QueueKey{Queue: "other", Key: "c"})
	var keys []string
	for behind := ""; ; {
		page, err := s.QueueKeys(t.Context(), "mail", behind, 2)
		if err != nil {
			t.Fatal(err)
		}
		for _, k := range page {
			keys = append(keys, k.Key)
		}
		if len(page) < 2 {
			break
		}
		behind = page[1].Key
	}
	if diff := cmp.Diff([]string{"B", "a", "b", "tenant/42", "~"}, keys); diff != "" {
		t.Errorf("keys (-want +got):\n%s", diff)
	}
	if err := s.DeleteQueueKey(t.Context(), "mail", "a", 0); err != nil {
		t.Error(err)
	}
	if err := s.DeleteQueueKey(t.Context(), "mail", "a", 0); !errors.Is(err, task.ErrQueueKeyNotFound) {
		t.Errorf("DeleteQueueKey = %v, want ErrQueueKeyNotFound", err)
	}
}

func TestQueueLoads(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	worker := register(t, s)
	tasks := []*task.Task{
		newTask(inQueue("mail", "a", task.Normal)), newTask(inQueue("mail", "b", task.High)), newTask(inQueue("mail", "", task.Normal)),
		newTask(inQueue("mail", "b", task.Low), func(tk *task.Task) { tk.Delay = time.Hour }), newTask(inQueue("mail.b", "a", task.Normal)), newTask(),
		newTask(inQueue("later", "", task.Normal), func(tk *task.Task) { tk.Delay = time.Hour }),
	}
	for _, tk := range tasks {
		insert(t, s, tk)
	}
	if _, err := s.ClaimOne(t.Context(), worker, tasks[0].ID); err != nil {
		t.Fatal(err)
	}
	exec(t, pool, "UPDATE tasks SET run_at = now() - interval '1 minute' WHERE id = $1", [16]byte(tasks[1].ID))
	got, err := s.QueueLoads(t.Context(), []string{"none", "mail", "later", "mail.b"})
	if err != nil {
		t.Fatal(err)
	}
	overdue := cmp.FilterPath(func(p cmp.Path) bool { return p.String() == "OldestDue" }, cmp.Comparer(func(a, b time.Duration) bool { return (a - b).Abs() < 30*time.Second }))
	want := []task.QueueLoad{{}, {Waiting: 3, Running: 1, Keys: 2, OldestDue: time.Minute}, {Waiting: 1}, {Waiting: 1, Keys: 1}}
	if diff := cmp.Diff(want, got, overdue); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	queues, err := s.Queues(t.Context(), "", 2)
	if err != nil || len(queues) != 2 || queues[0].Name != "later" || queues[1].Name != "mail" {
		t.Fatalf("Queues = %+v, %v", queues, err)
	}
	if queues, err = s.Queues(t.Context(), "mail", 2); err != nil || len(queues) != 1 || queues[0].Name != "mail.b" {
		t.Errorf("Queues behind mail = %+v, %v", queues, err)
	}
}

func TestDeleteQueue(t *testing.T) {
	t.Parallel()
	s, _ := newStore(t)
	if err := s.DeleteQueue(t.Context(), "mail", 0); !errors.Is(err, task.ErrQueueNotFound) {
		t.Errorf("DeleteQueue = %v, want ErrQueueNotFound", err)
	}
	q := putQueue(t, s, full("mail"))
	if _, err := s.PutQueueKey(t.Context(), task.QueueKey{Queue: "mail", Key: "a"}); err != nil {
		t.Fatal(err)
	}
	tk := newTask(inQueue("mail", "a", task.Normal))
	insert(t, s, tk)
	if err := s.DeleteQueue(t.Context(), "mail", q.Version); !errors.Is(err, task.ErrQueueInUse) {
		t.Errorf("DeleteQueue while a task waits = %v, want ErrQueueInUse", err)
	}
	c, err := s.ClaimOne(t.Context(), register(t, s), tk.ID)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.DeleteQueue(t.Context(), "mail", q.Version); !errors.Is(err, task.ErrQueueInUse) {
		t.Errorf("DeleteQueue while a task runs = %v, want ErrQueueInUse", err)
	}
	if _, err := s.QueueKey(t.Context(), "mail", "a"); err != nil {
		t.Errorf("QueueKey = %v after a queue was not deleted", err)
	}
	finish(t, s, c, succeeded(c))
	if err := s.DeleteQueue(t.Context(), "mail", q.Version+1); !errors.Is(err, task.ErrQueueChanged) {
		t.Errorf("DeleteQueue of another version = %v, want ErrQueueChanged", err)
	}
	if err := s.DeleteQueue(t.Context(), "mail", q.Version); err != nil {
		t.Fatal(err)
	}
	if _, err := s.QueueKey(t.Context(), "mail", "a"); !errors.Is(err, task.ErrQueueKeyNotFound) {
		t.Errorf("QueueKey = %v, want ErrQueueKeyNotFound", err)
	}
	// Who read it before it was deleted does not take what came after it for the same.
	again := putQueue(t, s, task.Queue{Name: "mail"})
	if again.Version == q.Version {
		t.Error("the queue has the version again that it had before it was deleted")
	}
	if got := get(t, s, tk.ID); got.Queue != "mail" {
		t.Errorf("the task that has ended is of queue %q", got.Queue)
	}
}

// Beside tasks that are stored at the same moment: the queue is in use, or is made anew.
func TestDeleteQueueBesideSubmissions(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	ctx, stop := context.WithCancel(t.Context())
	var deleting sync.WaitGroup
	deleted := 0
	deleting.Go(func() {
		for ctx.Err() == nil {
			switch err := s.DeleteQueue(t.Context(), "mail", 0); {
			case err == nil:
				deleted++
			case !errors.Is(err, task.ErrQueueInUse) && !errors.Is(err, task.ErrQueueNotFound):
				t.Error(err)
			}
		}
	})
	const rounds = 300
	for range rounds {
		tk := newTask(inQueue("mail", "", task.Normal))
		insert(t, s, tk)
		if _, err := s.Queue(t.Context(), "mail"); err != nil {
			t.Errorf("a task waits in a queue that does not exist: %v", err)
			break
		}
		exec(t, pool, "DELETE FROM tasks WHERE id = $1", [16]byte(tk.ID))
	}
	stop()
	deleting.Wait()
	t.Logf("%d rounds, %d deletions", rounds, deleted)
}

// A transaction that holds the table up costs the deletion its time, and nothing else.
func TestDeleteQueueThatCannotLock(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	insert(t, s, newTask(inQueue("mail", "", task.Normal)))
	exec(t, pool, "DELETE FROM tasks")
	tx, err := pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tx.Rollback(context.WithoutCancel(t.Context())) }()
	if _, err := tx.Exec(t.Context(), "INSERT INTO queues (name) VALUES ('other')"); err != nil {
		t.Fatal(err)
	}
	if err := s.DeleteQueue(t.Context(), "mail", 0); !errors.Is(err, task.ErrUnavailable) {
		t.Errorf("DeleteQueue = %v, want ErrUnavailable", err)
	}
	insert(t, s, newTask(inQueue("mail", "", task.Normal)))
	if _, err := s.Queue(t.Context(), "mail"); err != nil {
		t.Error(err)
	}
}

// A queue goes with the last of its tasks, unless more than its name is known.
func TestQueuesAreSwept(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	for _, name := range []string{"waits", "runs", "ended", "gone", "fresh", "paused", "limited", "key"} {
		tk := newTask(inQueue(name, "k", task.Normal))
		insert(t, s, tk)
		switch name {
		case "waits":
		case "runs":
			if _, err := s.ClaimOne(t.Context(), register(t, s), tk.ID); err != nil {
				t.Fatal(err)
			}
		case "ended":
			if _, err := s.Cancel(t.Context(), tk.ID); err != nil {
				t.Fatal(err)
			}
		default:
			exec(t, pool, "DELETE FROM tasks WHERE id = $1", [16]byte(tk.ID))
		}
	}
	putQueue(t, s, task.Queue{Name: "limited"})
	if _, err := s.PauseQueue(t.Context(), "paused", true); err != nil {
		t.Fatal(err)
	}
	if _, err := s.PutQueueKey(t.Context(), task.QueueKey{Queue: "key", Key: "k"}); err != nil {
		t.Fatal(err)
	}
	exec(t, pool, "UPDATE queues SET created_at = created_at - interval '2 hours' WHERE name <> 'fresh'")
	if err := s.KeepHistory(t.Context(), 24*time.Hour, 0); err != nil {
		t.Fatal(err)
	}
	want := []string{"ended", "fresh", "key", "limited", "paused", "runs", "waits"}
	if got := query[[]string](t, pool, `SELECT array_agg(name ORDER BY name COLLATE "C") FROM queues`); !slices.Equal(got, want) {
		t.Errorf("queues %q are left, want %q", got, want)
	}
}

// What a queue has to do is known without reading its tasks one by one, nor those of others.
func TestQueueLoadsAmongMany(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	exec(t, pool, backlog)
	exec(t, pool, laned)
	exec(t, pool, `INSERT INTO tasks (`+taskColumns+`, run_at, queue, flow_key, priority, lane, state)
		SELECT `+taskValues+`, now(), 'large', 'k' || n % 100, 0, 'large/k' || n % 100, 'waiting' FROM generate_series(200001, 300000) n`)
	exec(t, pool, "ANALYZE tasks")
	names := []string{"large", "q1", "none"}
	got, err := s.QueueLoads(t.Context(), names)
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []task.QueueLoad{{Waiting: task.MaxCounted, Keys: 100}, {Waiting: 2000, Keys: 100}, {}} {
		if got[i].Waiting != want.Waiting || got[i].Running != want.Running || got[i].Keys != want.Keys {
			t.Errorf("%s: %+v, want %+v", names[i], got[i], want)
		}
	}
	tx, err := pool.BeginTx(t.Context(), pgx.TxOptions{BeginQuery: postgres.BeginSearch})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tx.Rollback(t.Context()) }()
	var plan []struct{ Plan map[string]any }
	if err := tx.QueryRow(t.Context(), "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) "+postgres.QueueLoadsSQL, names, task.MaxCounted).Scan(&plan); err != nil {
		t.Fatal(err)
	}
	pages, _ := plan[0].Plan["Shared Hit Blocks"].(float64)
	read, _ := plan[0].Plan["Shared Read Blocks"].(float64)
	if tables := wholeReads(plan[0].Plan); len(tables) > 0 || pages+read > 8000 {
		t.Errorf("%v are read as a whole, and %v pages: %s", tables, pages+read, indented(plan[0].Plan))
	}
}

// A task that is run by hand does not wait for the limits of its queue, and counts there.
func TestRunInSpiteOfLimits(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	worker := register(t, s)
	exec(t, pool, "INSERT INTO queues (name, max_concurrent, paused_at) VALUES ('mail', 1, now())")
	due, later := newTask(inQueue("mail", "a", task.Normal)), newTask(inQueue("mail", "a", task.Normal), func(tk *task.Task) { tk.Delay = time.Hour })
	held := newTask(inQueue("mail", "a", task.Normal), func(tk *task.Task) { tk.HeldHost = "https://plays.melodia.app" })
	for _, tk := range []*task.Task{due, later, held} {
		insert(t, s, tk)
		exec(t, pool, "UPDATE tasks SET run_at = run_at - interval '10 min' WHERE id = $1", [16]byte(tk.ID))
		before := get(t, s, tk.ID)
		got, err := s.MakeDue(t.Context(), tk.ID)
		if err != nil || got.State != task.Pending || got.Queue != "mail" || got.RunAt.After(query[time.Time](t, pool, "SELECT now()")) {
			t.Fatalf("MakeDue = %+v, %v", got, err)
		}
		if changed := tk != held; changed != (got.LastClaim > before.LastClaim) || changed == got.RunAt.Equal(before.RunAt) {
			t.Errorf("MakeDue made %+v of %+v", got, before)
		}
	}
	claims := claim(t, s, worker, 10)
	if len(claims) != 2 {
		t.Fatalf("claimed %d tasks, want those that wait for no host", len(claims))
	}
	if loads, err := s.QueueLoads(t.Context(), []string{"mail"}); err != nil || loads[0].Running != 2 {
		t.Errorf("QueueLoads = %+v, %v; want both running ones", loads, err)
	}
	// A retry waits as before.
	c := claims[0]
	finish(t, s, c, failedOnce(c))
	exec(t, pool, "UPDATE tasks SET run_at = now() - interval '1 s' WHERE id = $1", [16]byte(c.Task.ID))
	if again := claim(t, s, worker, 10); len(again) != 0 {
		t.Errorf("the retry of a paused queue was claimed: %+v", again[0].Task)
	}
}
