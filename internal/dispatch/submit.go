package dispatch

import (
	"context"
	"time"

	"github.com/melodia/orchestrator/internal/task"
)

// Submit stores a new task, sets its RunAt and CreatedAt, and has it carried
// out when it is due. It returns nil after the commit only, and the errors of
// the store otherwise: after [task.ErrUnavailable] the task may or may not be
// stored.
//
// A plain task that is due at once is stored as claimed when a slot is free and there is no
// backlog. It starts without a query for due tasks. Its Body is the Dispatcher's from then on.
func (d *Dispatcher) Submit(ctx context.Context, t *task.Task) error {
	s, host := d.reserve(t)
	if s == nil {
		if d.hosts.inLane(t.URL) {
			t.HeldHost = task.HostOf(t.URL)
		}
		if err := d.store.Insert(ctx, t); err != nil {
			return err
		}
		d.noteDue(t.Lane(), t.RunAt.Sub(t.CreatedAt)) // both by the database's clock
		return nil
	}
	defer d.slots.attempts.Done()
	// Not ctx: when the caller is gone, the instance must still learn whether it has
	// claimed the task.
	claim, err := d.store.InsertClaimed(s.writes, s.worker, t)
	if err != nil || claim == nil {
		d.hosts.drop(host)
		d.slots.giveBack()
		d.notify(0)
		return err // a task that is stored as claimed all the same is reaped
	}
	j := newJob(s, claim, time.Now())
	j.host, j.slot = host, d.slots.plain
	d.results.hold(j)
	start, ok := d.slots.assignReserved(j)
	switch {
	case !ok: // the instance is stopping: others carry the task out
		j.cutOff(nil)
		j.decision.State, t.State = task.Pending, task.Pending
		d.results.write(j, func(*job, bool) {})
		d.hosts.drop(host)
		d.slots.giveBack()
	case start:
		d.launch(j)
	}
	return nil
}

// SubmitBatch is Submit of tasks that are stored together, or not at all. None of
// them begins before it has been claimed.
func (d *Dispatcher) SubmitBatch(ctx context.Context, b *task.Batch) error {
	for _, t := range b.Tasks {
		if d.hosts.inLane(t.URL) {
			t.HeldHost = task.HostOf(t.URL)
		}
	}
	if err := d.store.InsertBatch(ctx, b); err != nil {
		return err
	}
	for _, t := range b.Tasks {
		d.noteDue(t.Lane(), t.RunAt.Sub(t.CreatedAt))
	}
	return nil
}

// reserve takes a slot for a task that can begin at once, also with its host, and returns
// the session that it begins in; otherwise nil. After reserve, Run does not end before
// attempts.Done.
func (d *Dispatcher) reserve(t *task.Task) (*session, *host) {
	if !t.RunAt.IsZero() || t.Delay > 0 || t.Queue != "" {
		return nil, nil
	}
	s := d.session.Load()
	if s == nil || !d.slots.reserve() {
		return nil, nil
	}
	host := d.hosts.take(t.URL, time.Now())
	if host == nil {
		d.slots.giveBack()
		d.slots.attempts.Done()
		return nil, nil
	}
	return s, host
}
