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
