package postgres_test

import (
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/melodia/orchestrator/internal/postgres"
	"github.com/melodia/orchestrator/internal/postgres/pgtest"
	"github.com/melodia/orchestrator/internal/task"
)

func TestHealth(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	lookBack(s)
	if overdue, err := s.Health(t.Context()); overdue != 0 || err != nil {
		t.Errorf("Health of an empty store = %v, %v, want 0, nil", overdue, err)
	}
	insert(t, s, newTask(func(t *task.Task) { t.RunAt = time.Now().Add(time.Hour) })) //nolint:forbidigo // the test runs beside the database
	if overdue, err := s.Health(t.Context()); overdue != 0 || err != nil {
		t.Errorf("Health with a task for later = %v, %v, want 0, nil", overdue, err)
	}
	exec(t, pool, "UPDATE tasks SET run_at = now() - interval '1 hour'")
	if overdue, err := s.Health(t.Context()); overdue < time.Hour || err != nil {
		t.Errorf("Health with an overdue task = %v, %v, want an hour, nil", overdue, err)
	}
}

// What waits for a permit, a resume or its host is no sign that anything is wrong.
func TestOverdueInQueues(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	lookBack(s)
	for _, q := range []string{"a", "b", "c", "d", "e", "f", "g", "open", "z"} {
		exec(t, pool, "INSERT INTO queues (name) VALUES ($1)", q)
	}
	for queue, setting := range map[string]string{
		"a": "paused_at = now()", "b": "max_concurrent = 1", "c": "max_per_second = 1", "d": "key_max_concurrent = 1",
		"e": "key_max_per_second = 1", "f": "key_ordered = true", "g": "defaults = '{}'",
	} {
		exec(t, pool, "UPDATE queues SET "+setting+" WHERE name = $1", queue)
	}
	exec(t, pool, "INSERT INTO queue_keys (queue, key, version, max_concurrent) VALUES ('z', 'limited', 1, 1)")
	due := func(wait string, change ...func(*task.Task)) {
		t.Helper()
		tk := newTask(change...)
		insert(t, s, tk)
		exec(t, pool, "UPDATE tasks SET run_at = now() - $2::interval WHERE id = $1", [16]byte(tk.ID), wait)
	}
	want := func(hours float64) {
		t.Helper()
		_, counted, countErr := s.Counts(t.Context())
		healthy, healthErr := s.Health(t.Context())
		for _, overdue := range []time.Duration{counted, healthy} {
			if got := overdue.Hours(); got < hours || got > hours+0.9 || countErr != nil || healthErr != nil {
				t.Errorf("the longest waiting task has been due for %.1f hours (%v, %v), want %.0f", got, countErr, healthErr, hours)
			}
		}
	}
	for _, queue := range []string{"a", "b", "c", "d", "e", "f"} {
		for _, key := range []string{"k", "k2"} {
			due("9 hours", inQueue(queue, key, task.High))
		}
	}
	due("9 hours", inQueue("z", "limited", task.Normal))
	due("9 hours", inQueue("z", "held", task.Normal), func(tk *task.Task) { tk.HeldHost = playsHost })
	due("9 hours", func(tk *task.Task) { tk.HeldHost = playsHost })
	due("-1 hour", inQueue("open", "", task.Normal))
	want(0)
	due("1 hour", inQueue("z", "", task.High))
	want(1)
	due("2 hours", inQueue("open", "k", task.Low))
	want(2)
	due("3 hours", inQueue("g", "k", task.Normal))
	want(3)
	due("4 hours")
	want(4)
}

func TestHealthOfAReadOnlyDatabase(t *testing.T) {
	t.Parallel()
	url := pgtest.URL(t)
	_, elsewhere := newStore(t)
	database := url[strings.LastIndex(url, "/")+1 : strings.Index(url, "?")]
	exec(t, elsewhere, "ALTER DATABASE "+database+" SET default_transaction_read_only = on")
	s, err := postgres.Open(t.Context(), postgres.Options{URL: url})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	if _, err := s.Health(t.Context()); !errors.Is(err, task.ErrUnavailable) || !strings.Contains(err.Error(), "read-only") {
		t.Errorf("Health = %v, want ErrUnavailable for a read-only database", err)
	}
}

// The heartbeat of a database whose disk is full may still get through: a task
// that it had no room for is the only sign.
func TestHealthOfAFullDisk(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	exec(t, pool, `CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
		RAISE 'could not extend file' USING ERRCODE = 'disk_full'; END $$`)
	exec(t, pool, "CREATE TRIGGER full_disk BEFORE INSERT ON tasks EXECUTE FUNCTION full_disk()")
	if err := s.Insert(t.Context(), newTask()); !errors.Is(err, task.ErrUnavailable) {
		t.Errorf("Insert = %v, want ErrUnavailable", err)
	}
	if _, err := s.Health(t.Context()); !errors.Is(err, task.ErrUnavailable) {
		t.Errorf("Health after a refused insert = %v, want ErrUnavailable", err)
	}
	exec(t, pool, "DROP TRIGGER full_disk ON tasks")
	if err := s.Insert(t.Context(), newTask()); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Health(t.Context()); err != nil {
		t.Errorf("Health after an insert = %v, want nil", err)
	}
}

// Many reads must not keep the claims from their connections.
func TestConcurrentGets(t *testing.T) {
	t.Parallel()
	s, _ := newStore(t)
	ids := make([]task.ID, 100)
	for i := range ids {
		tk := newTask()
		insert(t, s, tk)
		ids[i] = tk.ID
	}
	var asking sync.WaitGroup
	for _, id := range ids {
		asking.Go(func() {
			if got, err := s.Get(t.Context(), id); err != nil || got.ID != id {
				t.Errorf("Get(%s) = %v, %v, want that task", id, got, err)
			}
			if _, err := s.Get(t.Context(), newID()); !errors.Is(err, task.ErrNotFound) {
				t.Errorf("Get of an unknown id: %v, want ErrNotFound", err)
			}
		})
	}
	asking.Wait()
}

// Finish gives up on nothing but a result that the database refuses for its own sake.
func TestFinishSurvivesARevokedRight(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	w := register(t, s)
	insert(t, s, newTask())
	c := claim(t, s, w, 1)[0]
	exec(t, pool, "ALTER TABLE task_history RENAME TO gone")
	if _, _, err := write(s, c, task.Decision{State: task.Succeeded}); !errors.Is(err, task.ErrUnavailable) {
		t.Errorf("Finish without a table for it = %v, want ErrUnavailable", err)
	}
	exec(t, pool, "ALTER TABLE gone RENAME TO task_history")
	matched, _, err := write(s, c, task.Decision{State: task.Succeeded})
	if !matched || err != nil {
		t.Errorf("Finish when it is back = %v, %v, want true, nil", matched, err)
	}
}
