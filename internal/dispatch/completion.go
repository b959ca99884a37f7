package dispatch

import (
	"context"
	"crypto/rand"
	"errors"
	mrand "math/rand/v2"
	"time"

	"github.com/melodia/orchestrator/internal/task"
)

// Targets that take a task with a 202 and report its end later. The store keeps such a task
// as running, held by no instance: what reports say is decided by the instance that is asked,
// and each instance looks for targets that have fallen silent. The fence is the claim, as for
// the result of a call; a report gives the claim another number, so that it wins over a look
// that read the task before.

// completionStore keeps tasks that targets have taken.
type completionStore interface {
	// KeepToken stores the hash of the token of the attempt that is about to be made.
	KeepToken(ctx context.Context, claim *task.Claim, hash [32]byte) (matched bool, err error)
	Awaited(ctx context.Context, id task.ID) (*task.Awaited, error)
	// Report stores a report, sets the claim's new number, and returns by when the next one
	// is due. Where the claim is not the latest it returns [task.ErrChanged].
	Report(ctx context.Context, claim *task.Claim, r *task.Report) (until time.Time, err error)
	// Overdue returns tasks whose targets reported nothing for too long, where an instance
	// that has listened for so long could have heard them, and the moment by the store's clock.
	Overdue(ctx context.Context, listening time.Duration, limit int) (overdue []*task.Awaited, now time.Time, err error)
}

// tokenWait is how long a task waits whose token cannot be stored.
const tokenWait = 2 * time.Second

// newToken makes the token of the attempt of j and has its hash stored. ok is false where that
// was not possible: no call is made then, since its target could not report.
func (d *Dispatcher) newToken(j *job) (token task.Token, ok bool) {
	var random [32]byte
	_, _ = rand.Read(random[:]) // it never fails
	token = task.NewToken(random)
	matched, err := d.store.KeepToken(j.session.writes, j.claim, token.Hash())
	if err != nil {
		d.log.Error("a completion token could not be stored", "task_id", j.claim.Task.ID.String(), "error", err)
	}
	return token, matched && err == nil
}

// reportTries is how often a report is tried where another one comes at the same moment.
const reportTries = 5

// Report takes what the target of a task reports with the token of its attempt. It returns the
// task's state then and, while that is running, by when the target must report again: zero
// while the call that gave it the token is still under way. Its errors are
// [task.ErrNotFound], [task.ErrTokenUnknown], [task.ErrTokenOld], [task.ErrEnded],
// [task.ErrChanged] where others report all the time, and the store's. Where the store was away
// the report may or may not count; it may be repeated.
func (d *Dispatcher) Report(ctx context.Context, id task.ID, token task.Token, r *task.Report) (state task.State, until time.Time, err error) {
	for range reportTries {
		a, err := d.store.Awaited(ctx, id)
		if err == nil {
			err = a.Check(token)
		}
		if err != nil {
			return "", time.Time{}, err
		}
		until, err := d.store.Report(ctx, a.Claim, r)
		switch {
		case errors.Is(err, task.ErrChanged):
			continue
		case err != nil:
			return "", time.Time{}, err
		case r.Kind == task.ReportHeartbeat:
			return task.Running, until, nil
		}
		outcome := r.Outcome(a.Claim, a.Now)
		decision, matched, err := d.decide(ctx, a, &outcome)
		if err != nil {
			return "", time.Time{}, err
		}
		if matched {
			return decision.State, time.Time{}, nil
		}
	}
	return "", time.Time{}, task.ErrChanged
}

// decide has the decision written that follows from the outcome of an attempt whose target had
// taken the task. matched is false where the task was changed since it was read.
func (d *Dispatcher) decide(ctx context.Context, a *task.Awaited, o *task.Outcome) (decision task.Decision, matched bool, err error) {
	c := a.Claim
	decision = c.Next(*o, a.Now, mrand.Float64()) //nolint:gosec // not a secret
	type result struct {
		matched, calledBack bool
		err                 error
	}
	written := make(chan result, 1)
	d.store.Finish(c, decision, func(matched, calledBack bool, err error) { written <- result{matched, calledBack, err} })
	var r result
	select {
	case r = <-written:
	case <-ctx.Done():
		return decision, false, context.Cause(ctx)
	}
	if r.err != nil || !r.matched {
		return decision, false, r.err
	}
	if r.calledBack {
		d.notify(0)
	}
	lane := c.Task.Lane()
	if decision.State == task.Pending {
		d.noteDue(lane, decision.Wait)
	} else {
		d.watches.end(c.Task.ID)
	}
	if lane != "" {
		d.lanes.freed(lane)
	}
	o.Kind = decision.Attempt.Outcome
	d.report(&job{session: &session{calls: ctx}, claim: c, outcome: *o, decision: decision})
	return decision, true, nil
}

// maxOverdue is how many silent targets are looked for at a time.
const maxOverdue = 100

// listener knows for how long this instance could have heard targets, by its own clock.
type listener struct {
	since time.Time
	// asked and answered are when the store was looked at last, by this clock and by its own.
	asked, answered time.Time
}

// deaf notes that the store was away, so that no report could come through.
func (l *listener) deaf() { l.since = time.Now() }

// clockStep is how far the store's clock may run from this one's between two looks.
const clockStep = 5 * time.Second

// looked compares the clocks after a look. Where the store's has been set, what it says is
// over may not be: the result is false, and targets have time to report again.
func (l *listener) looked(now time.Time) (steady bool) {
	here := time.Now()
	steady = l.asked.IsZero() || (now.Sub(l.answered)-here.Sub(l.asked)).Abs() <= clockStep
	if !steady {
		l.since = here
	}
	l.asked, l.answered = here, now
	return steady
}

// endSilent ends the attempts of targets that have taken tasks and fallen silent. Where the
// store cannot be asked, that is told to l.
func (d *Dispatcher) endSilent(ctx context.Context, l *listener) {
	overdue, now, err := d.store.Overdue(ctx, time.Since(l.since), maxOverdue)
	if err == nil && l.looked(now) {
		for _, a := range overdue {
			outcome := a.Claim.Silent(a.Now)
			if _, _, err = d.decide(ctx, a, &outcome); err != nil {
				break
			}
		}
	}
	if err != nil && ctx.Err() == nil {
		l.deaf()
		d.log.Error("looking for silent targets failed", "error", err)
	}
}
