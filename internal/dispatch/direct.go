package dispatch

import (
	"context"
	"time"

	"github.com/melodia/orchestrator/internal/task"
)

// Execute claims the pending task with the given id, whenever it is due, makes one
// attempt and returns its outcome and what was decided. It blocks until the call has ended
// (the task's timeout at most) and the decision is written. Once it has claimed the task
// the end of ctx does not cut it short, since the attempt counts. It returns
// [task.ErrNotFound], [task.ErrNotPending], the cause of a ctx that had ended
// before, or an error that wraps [task.ErrOverloaded] or [task.ErrUnavailable]:
// [ErrStopping] once Run was told to stop, also where the decision could not be
// written any more.
//
// A task that may not start any more (expired, attempts exhausted) ends, with
// a zero outcome and the reason in the decision.
func (d *Dispatcher) Execute(ctx context.Context, id task.ID) (task.Outcome, task.Decision, error) {
	fail := func(err error) (task.Outcome, task.Decision, error) { return task.Outcome{}, task.Decision{}, err }
	if ctx.Err() != nil {
		return fail(context.Cause(ctx))
	}
	s := d.session.Load()
	if _, stopping := d.slots.status(); s == nil && !stopping {
		return fail(errNotRegistered)
	}
	if err := d.slots.startDirect(false); err != nil {
		return fail(err)
	}
	defer d.slots.endDirect()

	c, err := d.store.ClaimOne(s.writes, s.worker, id)
	if err != nil {
		return fail(err)
	}
	j := newJob(s, c, time.Now())
	j.finished = make(chan struct{})
	j.host = d.hosts.beginAnyway(c.Task.URL)
	d.results.hold(j)
	d.run(j)
	select {
	case <-j.finished:
		return j.outcome, j.decision, nil
	case <-s.writes.Done(): // it is not known to be written, and the task may be carried out again
		return j.outcome, j.decision, ErrStopping
	}
}

// ExecuteUnstored makes one call for a task that is not stored and returns its outcome,
// after the task's timeout at most. The store is not asked. Before Run has begun it
// waits for that. It is interrupted by the end of ctx, and in a shutdown like every
// other call. It returns the cause of a ctx that had ended before, or an error that
// wraps [task.ErrOverloaded] or [task.ErrUnavailable]: [ErrStopping] once Run was told
// to stop, unless other calls are still under way, one of which may have come back to us.
func (d *Dispatcher) ExecuteUnstored(ctx context.Context, t *task.Task) (task.Outcome, error) {
	select {
	case <-d.begun:
	case <-ctx.Done():
	}
	if ctx.Err() != nil {
		return task.Outcome{}, context.Cause(ctx)
	}
	if err := d.slots.startDirect(true); err != nil {
		return task.Outcome{}, err
	}
	defer d.slots.endDirect()

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(d.root.calls, cancel)()
	host := d.hosts.beginAnyway(t.URL)
	o := d.deliver(ctx, task.Call{Task: t, Attempt: 1, At: t.RunAt, ViaWorkerEndpoint: true})
	for _, ready := range d.hosts.endAnyway(host, &o, time.Now()) {
		d.launch(ready)
	}
	return o.Heed(0), nil
}
