package dispatch

import (
	"context"

	"github.com/melodia/orchestrator/internal/task"
)

// Submit stores a new task, sets its RunAt and CreatedAt, and has it carried
// out when it is due. It returns nil after the commit only, and the errors of
// the store otherwise: after [task.ErrUnavailable] the task may or may not be
// stored.
//
// A task that is due at once and finds a free slot is stored as claimed already
// and begins without having been looked for, unless others have waited longer.
func (d *Dispatcher) Submit(ctx context.Context, t *task.Task) error {
	s := d.reserve(t)
	if s == nil {
		if err := d.store.Insert(ctx, t); err != nil {
			return err
		}
		d.notify(t.RunAt.Sub(t.CreatedAt)) // both by the database's clock
		return nil
	}
	claim, err := d.store.InsertClaimed(ctx, s.worker, t)
	switch begun := d.beginReserved(s, claim); {
	case err != nil:
		return err
	case claim == nil:
		d.notify(0)
	case !begun: // the instance is being stopped: others carry it out
		_, err = d.store.Finish(ctx, claim, task.Decision{State: task.Pending})
	}
	return err
}

// reserve takes a slot for a task that can begin at once, and returns the
// session that it begins in; otherwise nil.
func (d *Dispatcher) reserve(t *task.Task) *session {
	if !t.RunAt.IsZero() || t.Delay > 0 || d.backlog.Load() {
		return nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.state.Load() != active || d.free() == 0 {
		return nil
	}
	d.slots++
	return d.session
}

// beginReserved begins to carry out what a slot was reserved for, and reports
// whether it did: not where there is no claim, or the instance is being stopped.
func (d *Dispatcher) beginReserved(s *session, c *task.Claim) bool {
	d.mu.Lock()
	begin := c != nil && d.state.Load() == active
	if begin {
		d.enrol(c)
	} else {
		d.slots--
	}
	d.mu.Unlock()
	if begin {
		d.hand(job{s, c})
	} else {
		signal(d.freed)
	}
	return begin
}
