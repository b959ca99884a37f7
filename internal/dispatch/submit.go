package dispatch

import (
	"context"
	"slices"
	"time"

	"github.com/melodia/orchestrator/internal/task"
)

// Submit stores a new task, sets its RunAt and CreatedAt, and has it carried
// out when it is due. It returns nil after the commit only, and the errors of
// the store otherwise: after [task.ErrUnavailable] the task may or may not be
// stored.
//
// A task that is due at once and finds a free slot is stored as claimed already
// and begins without having been looked for, unless others have waited longer.
// Its Body is the Dispatcher's from then on.
func (d *Dispatcher) Submit(ctx context.Context, t *task.Task) error {
	s := d.reserve(t)
	if s == nil {
		if err := d.store.Insert(ctx, t); err != nil {
			return err
		}
		d.notify(t.RunAt.Sub(t.CreatedAt)) // both by the database's clock
		return nil
	}
	defer d.attempts.Done()
	// Not cut short by the end of ctx: what is claimed must be known.
	claim, err := d.store.InsertClaimed(s.writes, s.worker, t)
	if err != nil || claim == nil {
		d.giveBackSlots(1)
		d.notify(0)
		return err // reaping finds what is stored as claimed all the same
	}
	if !d.beginReserved(s, claim) { // the instance is being stopped: others carry it out
		t.State = task.Pending
		d.write(&result{session: s, claim: claim, decision: task.Decision{State: task.Pending}, then: func(bool) {}})
		d.giveBackSlots(1)
	}
	return nil
}

// SubmitBatch is Submit of tasks that are stored together, or not at all. None of
// them begins before it has been claimed.
func (d *Dispatcher) SubmitBatch(ctx context.Context, b *task.Batch) error {
	if err := d.store.InsertBatch(ctx, b); err != nil {
		return err
	}
	first := slices.MinFunc(b.Tasks, func(x, y *task.Task) int { return x.RunAt.Compare(y.RunAt) })
	d.notify(first.RunAt.Sub(first.CreatedAt))
	return nil
}

// reserve takes a slot for a task that can begin at once, and returns the
// session that it begins in; otherwise nil. Run does not end before
// d.attempts.Done.
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
	d.attempts.Add(1)
	return d.session
}

// beginReserved begins to carry out what a slot was reserved for, and reports
// whether it did: not where the instance is being stopped.
func (d *Dispatcher) beginReserved(s *session, c *task.Claim) bool {
	j := &job{session: s, claim: c, claimed: time.Now()}
	d.mu.Lock()
	admitted := d.state.Load() == active
	now := admitted && d.enrol(j)
	d.mu.Unlock()
	if now {
		d.hand(j)
	}
	return admitted
}
