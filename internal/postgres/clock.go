package postgres

import (
	"math/rand/v2"
	"sync/atomic"
	"time"

	"github.com/melodia/orchestrator/internal/task"
)

// clock is this machine's, put right by what is seen of the database's. It
// decides nothing: it is for ids, whose order and ranges stand for created_at.
type clock struct {
	offset atomic.Int64 // nanoseconds by which the database's is ahead
}

func (c *clock) now() time.Time { return localTime().Add(time.Duration(c.offset.Load())) }

// saw notes that the database's clock showed at at some time between two
// moments of ours. The zero at is none.
func (c *clock) saw(at, before, after time.Time) {
	if at.IsZero() {
		return
	}
	offset := c.offset.Load()
	if right := min(max(offset, int64(at.Sub(after))), int64(at.Sub(before))); right != offset {
		c.offset.Store(right)
	}
}

// localTime leaves out the monotonic reading: a clock that was set is read as
// it stands.
func localTime() time.Time {
	return time.Now().Round(0) //nolint:forbidigo // put right by the database's
}

// NewID makes an id for a task, a worker or an answer, which begins with the
// moment by the database's clock as far as it is known here.
func (s *Store) NewID() task.ID {
	return task.NewID(s.clock.now(), rand.Uint64()) //nolint:gosec // not a secret
}
