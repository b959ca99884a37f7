package dispatch

import (
	"sync/atomic"
	"testing"
	"time"

	"github.com/melodia/orchestrator/internal/dispatch/storetest"
	"github.com/melodia/orchestrator/internal/task"
)

// The store that the Dispatcher is tested with keeps the promises of the real one.
func TestStoreContract(t *testing.T) {
	t.Parallel()
	storetest.Run(t, func(*testing.T) storetest.Subject {
		m := newMemory()
		var ids atomic.Int32
		return storetest.Subject{
			Store: m,
			NewID: func() task.ID { return taskID(int(ids.Add(1))) },
			Get: func(id task.ID) *task.Task {
				r := m.row(id)
				return &r.Task
			},
			Cancel:  func(id task.ID) { m.cancel(id) },
			Redrive: func(id task.ID) { m.redrive(id) },
			Silence: func(worker task.ID) {
				m.mu.Lock()
				defer m.mu.Unlock()
				m.workers[worker] = m.now().Add(-time.Minute)
			},
			Age: func(id task.ID) { m.change(id, func(r *row) { r.claimedAt = m.now().Add(-time.Hour) }) },
			Due: func(id task.ID) {
				m.change(id, func(r *row) {
					r.RunAt, r.byRequest = m.now(), r.Lane() != "" && r.HeldHost == ""
					r.claim++
				})
			},
			SetQueue: m.setQueue,
		}
	})
}
