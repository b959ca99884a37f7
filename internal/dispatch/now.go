package dispatch

import (
	"cmp"
	"context"
	"fmt"
	"time"

	"github.com/melodia/orchestrator/internal/task"
)

// defaultDirect bounds RunNow and RunOnce where there is no Concurrency.
const defaultDirect = 200

var errBusy = fmt.Errorf("%w: as many calls as may be are under way", task.ErrOverloaded)

// RunNow claims the pending task with the given id, whenever it is due, carries
// it out and returns what came of it. It blocks until the call has ended (the
// task's timeout at the most) and its outcome is written. Once it has begun it
// is not cut short by the end of ctx, since the attempt counts. It returns
// [task.ErrNotFound], [task.ErrNotPending], the cause of a ctx that had ended
// before, or an error that wraps [task.ErrOverloaded] or [task.ErrUnavailable]:
// [ErrStopping] once Run was told to stop, also where the outcome could not be
// written any more.
//
// A task that may not start any more (expired, attempts exhausted) ends, with
// a zero outcome and the reason in the decision.
func (d *Dispatcher) RunNow(ctx context.Context, id task.ID) (task.Outcome, task.Decision, error) {
	if ctx.Err() != nil {
		return task.Outcome{}, task.Decision{}, context.Cause(ctx)
	}
	var err error
	d.mu.Lock()
	s := d.session
	switch d.state.Load() {
	case active:
		err = d.enter()
	case starting:
		err = errNotRegistered
	default:
		err = ErrStopping
	}
	d.mu.Unlock()
	if err != nil {
		return task.Outcome{}, task.Decision{}, err
	}
	defer d.leave()

	c, err := d.store.ClaimOne(s.writes, s.worker, id)
	if err != nil {
		return task.Outcome{}, task.Decision{}, err
	}
	call, cutOff := context.WithCancelCause(s.calls)
	defer cutOff(nil)
	j := &job{session: s, claim: c, claimed: time.Now(), cutOff: cutOff}
	d.mu.Lock()
	d.running[c] = j
	d.mu.Unlock()
	defer func() {
		d.mu.Lock()
		delete(d.running, c)
		d.mu.Unlock()
	}()
	outcome, decision := d.attempt(call, j, task.Call{Task: c.Task, Attempt: c.AttemptNumber(), ViaWorkerEndpoint: true})
	written := make(chan struct{})
	d.settle(s, c, outcome, decision, func(*task.Claim) { close(written) })
	select {
	case <-written:
		return outcome, decision, nil
	case <-s.writes.Done(): // it is not known to be written, and the task may be carried out again
		return outcome, decision, ErrStopping
	}
}

// RunOnce makes one call for a task that is not stored and returns what came of
// it, after the task's timeout at the most. The store is not asked; before Run
// has begun it waits for that. It is interrupted by the end of ctx, and in a
// shutdown like every other call. It returns the cause of a ctx that had ended
// before, or an error that wraps [task.ErrOverloaded] or [task.ErrUnavailable]:
// [ErrStopping] once Run was told to stop, unless other calls are still under
// way, one of which may have come back to us.
func (d *Dispatcher) RunOnce(ctx context.Context, t *task.Task) (task.Outcome, error) {
	select {
	case <-d.begun:
	case <-ctx.Done():
	}
	if ctx.Err() != nil {
		return task.Outcome{}, context.Cause(ctx)
	}
	var err error
	d.mu.Lock()
	switch state := d.state.Load(); {
	case state == stopped, state == stopping && d.calls+d.direct == 0:
		err = ErrStopping
	default:
		err = d.enter()
	}
	d.mu.Unlock()
	if err != nil {
		return task.Outcome{}, err
	}
	defer d.leave()

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(d.root.calls, cancel)()
	return d.deliver(ctx, task.Call{Task: t, Attempt: 1, At: t.RunAt, ViaWorkerEndpoint: true}).Heed(0), nil
}

// enter admits one more RunNow or RunOnce, which has to leave. d.mu is held.
func (d *Dispatcher) enter() error {
	if d.direct >= cmp.Or(d.options.Concurrency, defaultDirect) {
		return errBusy
	}
	d.direct++
	d.attempts.Add(1)
	return nil
}

func (d *Dispatcher) leave() {
	d.mu.Lock()
	d.direct--
	d.mu.Unlock()
	d.attempts.Done()
}
