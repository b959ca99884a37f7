package postgres_test

import (
	"testing"

	"github.com/melodia/orchestrator/internal/dispatch/storetest"
	"github.com/melodia/orchestrator/internal/task"
)

// Package dispatch can rely on the store.
func TestStoreContract(t *testing.T) {
	t.Parallel()
	storetest.Run(t, func(t *testing.T) storetest.Subject {
		s, pool := newStore(t)
		must := func(_ *task.Task, err error) {
			if err != nil {
				t.Error(err)
			}
		}
		return storetest.Subject{
			Store:   s,
			NewID:   newID,
			Get:     func(id task.ID) *task.Task { return get(t, s, id) },
			Cancel:  func(id task.ID) { must(s.Cancel(t.Context(), id)) },
			Redrive: func(id task.ID) { must(s.Redrive(t.Context(), id, 0)) },
			Silence: func(worker task.ID) { silence(t, pool, worker) },
			Age: func(id task.ID) {
				exec(t, pool, "UPDATE tasks SET claimed_at = now() - interval '1 hour' WHERE id = $1", [16]byte(id))
			},
			Due: func(id task.ID) { must(s.MakeDue(t.Context(), id)) },
			SetQueue: func(q task.Queue) {
				if was, err := s.Queue(t.Context(), q.Name); err == nil {
					q.Version = was.Version
				}
				if _, err := s.PutQueue(t.Context(), q); err != nil {
					t.Error(err)
				}
				if _, err := s.PauseQueue(t.Context(), q.Name, !q.PausedAt.IsZero()); err != nil {
					t.Error(err)
				}
			},
		}
	})
}
