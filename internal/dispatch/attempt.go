package dispatch

import (
	"context"
	"errors"
	"math/rand/v2"
	"runtime/debug"
	"time"

	"github.com/melodia/orchestrator/internal/task"
)

// One task's way, in the order of the calls: claimDue (or Submit, or Execute) → start →
// work → run → attempt → deliver → complete → completed.

// job is a claimed task on its way. One goroutine at a time uses it; only cutOff is
// called by others.
type job struct {
	session *session
	claim   *task.Claim
	claimed time.Time // what claim.At is on the monotonic clock
	// finished is closed when the result of a direct call is written, or never will be.
	// It is nil where the task has a slot.
	finished chan struct{}
	// slot is whose slot the task has; nil where it has none.
	slot *claimant
	// host is where the task's call goes, once it is counted there.
	host *host
	// fromLane: the task was claimed from the lane of its host.
	fromLane bool
	// extra: its call is one more than there are slots, in place of one that a slow host holds.
	extra bool
	// declined: its host may not be called now. The task goes back without an attempt.
	declined bool

	call   context.Context //nolint:containedctx // ends when the call is to be cut off
	cutOff context.CancelCauseFunc

	outcome  task.Outcome
	decision task.Decision
	then     func(j *job, written bool) // of results.write
	tries    int                        // of writing the decision
}

// newJob returns a job for a claim. claimed is c.At on the monotonic clock.
func newJob(s *session, c *task.Claim, claimed time.Time) *job {
	j := &job{session: s, claim: c, claimed: claimed}
	j.call, j.cutOff = context.WithCancelCause(s.calls)
	return j
}

// now is the time by the store's clock, carried on from the claim by a monotonic one.
func (j *job) now() time.Time { return j.claim.At.Add(time.Since(j.claimed)) }

// claimDue claims and starts due tasks until ctx ends. It claims no more than there are
// free slots, or will be in a moment.
func (d *Dispatcher) claimDue(ctx context.Context) {
	var pause, failing time.Duration
	for d.waitForSlots(ctx, d.slots.plain) && d.waitForDue(ctx, &pause) {
		limit := d.slots.take(d.slots.plain)
		if limit == 0 {
			continue // tasks that were submitted meanwhile have the slots
		}
		d.due.clear()
		s := d.session.Load()
		// Not ctx: when the instance stops meanwhile, it must still learn which tasks it
		// has claimed.
		claims, err := d.store.Claim(s.writes, s.worker, limit)
		claimed, declined := time.Now(), 0
		for _, c := range claims {
			j := newJob(s, c, claimed)
			j.slot = d.slots.plain
			if !d.startClaimed(j) {
				declined++
			}
		}
		d.slots.fetched(d.slots.plain, limit, len(claims), len(claims) == limit)
		switch {
		case err != nil:
			d.log.Error("claiming failed", "error", err)
			// A task that is submitted meanwhile sets the alarm, and does not shorten this.
			failing = longer(failing, d.options.PollInterval)
			sleep(ctx, jitter(failing))
			continue
		case len(claims) == 0:
			// Other workers have the tasks that looked due.
			pause = longer(pause, d.options.PollInterval)
		default:
			pause = 0
			if len(claims) == limit {
				d.notify(0)
			}
		}
		failing = 0
		if declined > 0 {
			// Claiming them one by one would take ten times as long.
			d.holdBackPlain(s.writes)
		}
	}
}

// startClaimed is start of a task that does not wait for its host, unless that may not
// have it: then it does from now on, and started is false.
func (d *Dispatcher) startClaimed(j *job) (started bool) {
	if j.host = d.hosts.take(j.claim.Task.URL, j.claimed); j.host != nil {
		d.start(j)
		return true
	}
	d.results.hold(j)
	d.slots.decline(j)
	d.giveBack(j)
	d.slots.attempts.Done()
	return false
}

// giveBack gives a claimed task back to the store of which no attempt was made.
func (d *Dispatcher) giveBack(j *job) {
	j.cutOff(nil)
	j.decision = d.notNow(j)
	then := d.returned
	if j.decision.State != task.Pending {
		then = d.completed
	}
	d.results.write(j, then)
}

// notNow is the decision on a task whose host may not be called now: it waits for it, unless
// no attempt may start anyway.
func (d *Dispatcher) notNow(j *job) task.Decision {
	if decision, may := j.claim.MayStart(j.now()); !may {
		return decision
	}
	return task.Decision{State: task.Pending, Host: task.HostOf(j.claim.Task.URL)}
}

// start has a claimed task carried out in a slot that was taken for it: at once, or when
// another call has ended if all slots have calls.
func (d *Dispatcher) start(j *job) {
	d.results.hold(j)
	if d.slots.assign(j) {
		d.launch(j)
	}
}

// launch runs a job that has a slot, now or when its host may have one more call.
func (d *Dispatcher) launch(j *job) {
	if d.mayRun(j) {
		d.toWorker(j)
	}
}

// mayRun reports whether a job that has a slot runs now. Where it does not, d.hosts keeps it
// and returns it later, to be launched again.
func (d *Dispatcher) mayRun(j *job) bool {
	switch d.hosts.begin(j, time.Now()) {
	case callLater:
		return false
	case callNever:
		j.declined = true
	}
	return true
}

// toWorker gives a job to an idle goroutine, or to a new one.
func (d *Dispatcher) toWorker(j *job) {
	select {
	case d.jobs <- j:
	default:
		d.workers.Go(func() { d.work(j) })
	}
}

// idleTime is how long a goroutine waits for another job.
const idleTime = time.Second

// work runs j, the jobs that wait for its slot, and then others while some come: a
// goroutine that made a call before has the stack for it.
func (d *Dispatcher) work(j *job) {
	idle := time.NewTimer(idleTime)
	defer idle.Stop()
	for j != nil {
		for j != nil {
			next := d.run(j)
			d.slots.attempts.Done()
			j = next
		}
		idle.Reset(idleTime)
		select {
		case j = <-d.jobs:
		case <-idle.C:
		}
	}
}

// run makes the attempt of a job and has its decision written. It does not wait for the
// write. It returns the job that waited for the slot, or nil.
func (d *Dispatcher) run(j *job) (next *job) {
	if j.declined {
		d.hosts.drop(j.host)
		j.cutOff(nil)
		j.decision = d.notNow(j)
	} else {
		d.attempt(j)
		end := d.hosts.end
		if j.finished != nil {
			end = d.hosts.endAnyway
		}
		for _, ready := range end(j.host, &j.outcome, time.Now()) {
			d.launch(ready)
		}
	}
	if j.finished == nil {
		next = d.slots.release(j)
		if next != nil && !d.mayRun(next) {
			next = nil
		}
	}
	d.complete(j)
	return next
}

// attempt makes one attempt and decides what follows from it.
func (d *Dispatcher) attempt(j *job) {
	defer j.cutOff(nil)
	c := j.claim
	switch cause := context.Cause(j.call); {
	case errors.Is(cause, errCancelled):
		j.outcome.Kind, j.decision.State = task.OutcomeInterrupted, task.Cancelled
		return
	case cause != nil: // all calls are being cut off, and this one took the slot of another
		j.outcome.Kind, j.decision.State = task.OutcomeInterrupted, task.Pending
		return
	}
	at := j.now()
	decision, may := c.MayStart(at)
	if !may {
		j.decision = decision
		return
	}
	call := task.Call{Task: c.Task, Attempt: c.AttemptNumber(), At: at, ViaWorkerEndpoint: j.finished != nil}
	if c.Task.Completion != nil {
		if call.Token, may = d.newToken(j); !may {
			j.outcome.Kind, j.decision = task.OutcomeInterrupted, task.Decision{State: task.Pending, Wait: tokenWait}
			return
		}
	}
	j.outcome = d.deliver(j.call, call)
	if errors.Is(context.Cause(j.call), errCancelled) {
		j.outcome.Cancelled = true
		if j.outcome.Kind == task.OutcomeInterrupted {
			j.outcome.Error = "the task was cancelled before the call ended"
		}
	}
	j.decision = c.Next(j.outcome, j.now(), rand.Float64()) //nolint:gosec // not a secret
	j.outcome.Kind = j.decision.Attempt.Outcome             // with the target's wishes
}

// deliver makes the call. A panic becomes an outcome: one bad task must not take down
// the instance and everything that runs on it.
func (d *Dispatcher) deliver(ctx context.Context, call task.Call) (outcome task.Outcome) {
	start := time.Now()
	defer func() {
		if p := recover(); p != nil {
			d.log.Error("attempt panicked", "task_id", call.Task.ID.String(), "panic", p, "stack", string(debug.Stack()))
			outcome = task.Outcome{
				Kind:     task.OutcomeRetryable,
				Error:    "the attempt failed inside the orchestrator",
				Untried:  true,
				NotSent:  true,
				Duration: time.Since(start),
			}
		}
	}()
	if outcome = d.deliverer.Deliver(ctx, call); outcome.Shortage != "" {
		d.Lacks(outcome.Shortage)
	}
	return outcome
}

// complete has the decision on a job written.
func (d *Dispatcher) complete(j *job) {
	j.claim.Task.Body = nil // large, maybe, and not needed any more
	if errors.Is(context.Cause(j.session.calls), errLeaseLost) {
		// Another instance carries the task out by now. The store would not accept the result.
		d.log.Warn("result dropped, the lease was lost", "task_id", j.claim.Task.ID.String(), "claim", j.claim.Number)
		d.results.drop(j)
		d.finish(j)
		return
	}
	if j.decision.State == task.Pending && d.hosts.inLane(j.claim.Task.URL) {
		j.decision.Host = task.HostOf(j.claim.Task.URL)
	}
	d.results.write(j, d.completed)
}

// completed wakes the claim loop for a retry, or the requests that watch the task, and
// logs the attempt. It does neither when the decision did not take effect.
func (d *Dispatcher) completed(j *job, written bool) {
	if written {
		if j.decision.State.Terminal() {
			d.watches.end(j.claim.Task.ID)
		}
		d.report(j)
	}
	d.returned(j, written)
}

// returned ends a job, whose result is written or never will be: its task may be due again,
// and its lane may start another one.
func (d *Dispatcher) returned(j *job, written bool) {
	was := j.claim.Task.Lane()
	if written && j.decision.State == task.Pending {
		is := was
		if j.decision.Host != "" {
			is = was.At(j.decision.Host)
		}
		d.noteDue(is, j.decision.Wait)
	}
	if was != "" {
		d.lanes.freed(was)
	}
	d.finish(j)
}

// noteDue notes that a task which waits in a lane, or in none, is due in wait.
func (d *Dispatcher) noteDue(lane task.Lane, wait time.Duration) {
	if lane == "" {
		d.notify(wait)
	} else if d.options.Concurrency > 0 {
		d.lanes.note(lane, wait)
	}
}

// finish ends a job, whose result is written or never will be.
func (d *Dispatcher) finish(j *job) {
	if j.finished != nil {
		close(j.finished)
		return
	}
	d.slots.finish()
}

// releaseWaiting gives the tasks that wait for slots back to the store, so that other instances may
// claim them. No attempt of them was made. They are due at once, behind the tasks that are due already.
func (d *Dispatcher) releaseWaiting() {
	waiting := d.slots.takeWaiting()
	for _, j := range waiting {
		d.hosts.drop(j.host)
	}
	if len(waiting) == 0 {
		return
	}
	d.log.Info("claimed tasks were given back, no slot became free for them", "count", len(waiting))
	for _, j := range waiting {
		j.cutOff(nil)
		j.decision.State = task.Pending
		d.results.write(j, d.returned)
		d.slots.attempts.Done()
	}
}

// releaseQueued gives the tasks back that have slots and wait for the slow start of their hosts.
func (d *Dispatcher) releaseQueued() {
	for _, j := range d.hosts.takeQueue() {
		j.declined = true
		d.toWorker(j)
	}
}
