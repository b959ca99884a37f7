package postgres_test

import (
	"errors"
	"sync"
	"testing"

	"github.com/melodia/orchestrator/internal/task"
)

// While the database hangs, a limited number of tasks waits to be inserted. Further ones
// are refused at once, and none of them is stored.
func TestInsertsAreShed(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	tx := lock(t, pool, "tasks IN EXCLUSIVE MODE")
	// As many as may wait, as can be under way, and some more.
	const waiting, under, more = 2048, 2 * 256, 100
	var mu sync.Mutex
	var stored, shed [][16]byte
	enough := make(chan struct{})
	var callers sync.WaitGroup
	for range waiting + under + more {
		callers.Go(func() {
			tk := newTask()
			err := s.Insert(t.Context(), tk)
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err == nil:
				stored = append(stored, tk.ID)
			case errors.Is(err, task.ErrOverloaded) && !errors.Is(err, task.ErrUnavailable):
				if shed = append(shed, tk.ID); len(shed) == more {
					close(enough)
				}
			case !errors.Is(err, task.ErrUnavailable): // a machine so slow that the call's time was over
				t.Errorf("Insert: %v", err)
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
		t.Errorf("%d were turned away while the database hung, want at least %d", len(shed), more)
	}
	if err := tx.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	<-over
	const count = "SELECT count(*) FROM tasks WHERE id = ANY ($1)"
	if got := query[int](t, pool, count, stored); got != len(stored) {
		t.Errorf("%d of %d tasks are stored, want all", got, len(stored))
	}
	if got := query[int](t, pool, count, shed); got != 0 {
		t.Errorf("%d of %d tasks that were turned away are stored, want none", got, len(shed))
	}
	if len(shed) > under+more {
		t.Errorf("%d were turned away, want at most %d", len(shed), under+more)
	}
}
