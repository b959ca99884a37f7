package dispatch

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"runtime/debug"
	"strings"
	"time"

	"github.com/melodia/orchestrator/internal/task"
)

// job is a claimed task that is to be carried out.
type job struct {
	session *session
	claim   *task.Claim
	claimed time.Time // what claim.At is on the monotonic clock

	// Guarded by Dispatcher.mu: what ends its call, while that is under way, and
	// whether it was cancelled before.
	cutOff    context.CancelCauseFunc
	cancelled bool
}

// caller is a goroutine that makes calls, one after the other. Its calls have one
// context until that is ended, with one of them or with the session: to make one
// for each call takes longer than to hand the call on.
type caller struct {
	call   context.Context //nolint:containedctx // that of the call under way
	cutOff context.CancelCauseFunc
}

// prepare sees to it that the context for a call in s has not ended. It is none of
// another session: the calls of one end before the next begins.
func (c *caller) prepare(s *session) {
	if c.call == nil || c.call.Err() != nil {
		c.call, c.cutOff = context.WithCancelCause(s.calls)
	}
}

// begin has a claimed task carried out in a slot that was taken for it: at once,
// or when a call has ended if all slots have one. The slot is free again when its
// call has ended: writing down what came of it needs none.
func (d *Dispatcher) begin(j *job) {
	d.mu.Lock()
	now := d.enrol(j)
	d.mu.Unlock()
	if now {
		d.hand(j)
	}
}

// enrol counts in a task that is to be carried out, and reports whether it is to
// begin now. Otherwise it waits. d.mu is held.
func (d *Dispatcher) enrol(j *job) (now bool) {
	d.unsettled++
	d.running[j.claim] = j
	d.attempts.Add(1)
	if d.calls == d.options.Concurrency {
		d.waiting = append(d.waiting, j)
		return false
	}
	d.calls++
	return true
}

// endCall counts out a call that has ended with o. It returns the task that waited the
// longest, which gets its slot; nil where none waits.
func (d *Dispatcher) endCall(j *job, o *task.Outcome) (next *job) {
	d.mu.Lock()
	defer d.mu.Unlock()
	j.cutOff = nil
	if o.Shortage == "" {
		d.slots--
		d.pace.ended++
		d.pace.took += o.Duration
	} else {
		d.rest()
	}
	if len(d.waiting) > 0 {
		next, d.waiting[0] = d.waiting[0], nil
		d.waiting = d.waiting[1:]
	} else {
		d.calls--
	}
	d.tellFree()
	return next
}

// hand gives a job to an idle goroutine, or to a new one.
func (d *Dispatcher) hand(j *job) {
	select {
	case d.jobs <- j:
	default:
		d.workers.Go(func() { d.carryOutAll(j) })
	}
}

// idleTime is how long a goroutine waits for another task to carry out.
const idleTime = time.Second

// carryOutAll carries out j, what waits for its slot, and then others while some
// come: a goroutine that made a call before has the stack for it.
func (d *Dispatcher) carryOutAll(j *job) {
	var by caller
	defer func() { by.cutOff(nil) }()
	idle := time.NewTimer(idleTime)
	defer idle.Stop()
	for j != nil {
		for j != nil {
			j = d.carryOut(&by, j)
		}
		idle.Reset(idleTime)
		select {
		case j = <-d.jobs:
		case <-idle.C:
		}
	}
}

// carryOut makes a task's call and has what came of it written down. It returns
// what waited for its slot.
func (d *Dispatcher) carryOut(by *caller, j *job) (next *job) {
	defer d.attempts.Done()
	c := j.claim
	by.prepare(j.session)
	d.mu.Lock()
	cancelled := j.cancelled
	j.cutOff = by.cutOff
	d.mu.Unlock()
	var outcome task.Outcome
	var decision task.Decision
	switch {
	case cancelled:
		outcome.Kind, decision.State = task.OutcomeInterrupted, task.Cancelled
	// All calls are being cut off, and those that end first make room for others.
	case j.session.calls.Err() != nil:
		outcome.Kind, decision.State = task.OutcomeInterrupted, task.Pending
	default:
		outcome, decision = d.attempt(by.call, j, task.Call{Task: c.Task, Attempt: c.AttemptNumber()})
	}
	next = d.endCall(j, &outcome)
	d.settle(j.session, c, outcome, decision, d.settled)
	return next
}

// settled counts out a task whose result is written, or never will be.
func (d *Dispatcher) settled(c *task.Claim) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.unsettled--
	delete(d.running, c)
	d.tellFree()
}

// attempt makes one attempt under a claim and decides what follows from it.
func (d *Dispatcher) attempt(ctx context.Context, j *job, call task.Call) (task.Outcome, task.Decision) {
	c := j.claim
	// The database's clock, carried on from the claim by a monotonic one.
	now := func() time.Time { return c.At.Add(time.Since(j.claimed)) }
	call.At = now()
	if decision, admitted := c.Admit(call.At); !admitted {
		return task.Outcome{}, decision
	}
	outcome := d.deliver(ctx, call)
	if context.Cause(ctx) == errCancelled { //nolint:errorlint // it is this very error
		outcome.Cancelled = true
		if outcome.Kind == task.OutcomeInterrupted {
			outcome.Error = "the task was cancelled before the call ended"
		}
	}
	decision := c.Next(outcome, now(), rand.Float64()) //nolint:gosec // not a secret
	outcome.Kind = decision.Attempt.Outcome            // with the target's wishes
	return outcome, decision
}

// settle has what follows from an attempt written down and logged, and then calls
// ended. It waits for none of that.
func (d *Dispatcher) settle(s *session, c *task.Claim, outcome task.Outcome, decision task.Decision, ended func(*task.Claim)) {
	c.Task.Body = nil // large, maybe, and not needed any more
	if errors.Is(context.Cause(s.calls), errLeaseLost) {
		// Others carry the task out by now; the fence would turn the result away.
		d.log.Warn("result dropped, the lease was lost", "task_id", c.Task.ID.String(), "claim", c.Number)
		ended(c)
		return
	}
	d.write(&result{session: s, claim: c, decision: decision, then: func(written bool) {
		if !written {
			ended(c)
			return
		}
		if decision.State == task.Pending {
			d.notify(decision.Wait)
		} else {
			d.watches.end(c.Task.ID)
		}
		d.report(s.calls, c, outcome, decision)
		ended(c)
	}})
}

// deliver makes the call. A panic becomes an outcome: one bad task must not
// take down the instance and everything that runs on it.
func (d *Dispatcher) deliver(ctx context.Context, call task.Call) (outcome task.Outcome) {
	start := time.Now()
	defer func() {
		if p := recover(); p != nil {
			d.log.Error("attempt panicked", "task_id", call.Task.ID.String(), "panic", p, "stack", string(debug.Stack()))
			outcome = task.Outcome{
				Kind:     task.OutcomeRetryable,
				Error:    "the attempt failed inside the orchestrator",
				Duration: time.Since(start),
			}
		}
	}()
	if outcome = d.deliverer.Deliver(ctx, call); outcome.Shortage != "" {
		d.Lacks(outcome.Shortage)
	}
	return outcome
}

// result is a decision that is to be written.
type result struct {
	session  *session
	claim    *task.Claim
	decision task.Decision
	// then is told whether the decision took effect. It must not block.
	then  func(written bool)
	tries int
}

// write has a result written, again and again while the store is away, until
// writes end. It waits for nothing.
func (d *Dispatcher) write(r *result) {
	d.results.Add(1)
	d.try(r)
}

// try writes a result. Others wait until the store has told what came of it.
func (d *Dispatcher) try(r *result) {
	r.tries++
	d.store.Finish(r.claim, r.decision, func(matched, calledBack bool, err error) {
		if !matched {
			go d.notWritten(r, err)
			return
		}
		if calledBack {
			d.notify(0)
		}
		r.then(true)
		d.results.Done()
	})
}

// notWritten tries a result again after a moment, which is longer each time, or
// gives it up.
func (d *Dispatcher) notWritten(r *result, err error) {
	log := d.log.With("task_id", r.claim.Task.ID.String(), "claim", r.claim.Number)
	pause := min(50*time.Millisecond<<min(r.tries-1, 5), time.Second)
	switch {
	case err == nil && r.tries > 1:
		// A write whose answer was lost matches nothing when it is repeated.
		d.notify(r.decision.Wait) // itself, or a callback
		log.Warn("result was written before, or came late")
	case err == nil:
		log.Warn("late result changed nothing")
	case errors.Is(err, task.ErrUnavailable) && sleep(r.session.writes, jitter(pause)):
		d.try(r)
		return
	default:
		log.Error("result could not be written", "error", err)
	}
	r.then(false)
	d.results.Done()
}

// describe says in a word what came of an attempt, and how loud that is to be.
func describe(c *task.Claim, o task.Outcome, decision task.Decision) (slog.Level, string) {
	switch {
	case decision.State == task.Failed:
		return slog.LevelWarn, "task failed"
	case decision.State == task.Cancelled:
		return slog.LevelInfo, "task cancelled"
	case o.Shortage != "":
		return slog.LevelDebug, "attempt interrupted" // Lacks logs for all of them
	case o.Kind == task.OutcomeInterrupted:
		return slog.LevelInfo, "attempt interrupted"
	case decision.State == task.Pending && o.Kind == task.OutcomeSnoozed:
		return slog.LevelInfo, "task snoozed"
	case decision.State == task.Pending:
		return slog.LevelInfo, "attempt failed, will retry"
	case c.AttemptNumber() == 1 && o.Error == "":
		return slog.LevelDebug, "task succeeded"
	}
	return slog.LevelInfo, "task succeeded"
}

// report logs one line for an attempt.
func (d *Dispatcher) report(ctx context.Context, c *task.Claim, o task.Outcome, decision task.Decision) {
	level, message := describe(c, o, decision)
	if !d.log.Enabled(ctx, level) {
		return
	}
	attrs := []slog.Attr{
		slog.String("task_id", c.Task.ID.String()),
	}
	if d.options.LogTargets {
		url, _, _ := strings.Cut(c.Task.URL, "?") // a query may hold secrets
		attrs = append(attrs, slog.String("method", c.Task.Method), slog.String("url", url), slog.Int("max_attempts", c.Task.Retry.MaxAttempts))
	}
	if a := decision.Attempt; a != nil { // none where the task could not start any more
		attrs = append(attrs, slog.Int("attempt", a.Number), slog.Float64("duration_seconds", o.Duration.Seconds()))
	}
	if o.StatusCode != 0 {
		attrs = append(attrs, slog.Int("status_code", o.StatusCode))
	}
	if o.Error != "" {
		attrs = append(attrs, slog.String("error", o.Error))
	}
	if decision.Reason != "" {
		attrs = append(attrs, slog.String("reason", string(decision.Reason)))
	}
	if decision.State == task.Pending {
		attrs = append(attrs, slog.Float64("wait_seconds", decision.Wait.Seconds()))
	}
	d.log.LogAttrs(ctx, level, message, attrs...)
}
