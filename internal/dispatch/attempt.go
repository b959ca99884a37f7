package dispatch

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"runtime/debug"
	"time"

	"github.com/melodia/orchestrator/internal/task"
)

// begin carries out a claimed task in a goroutine and a slot of its own.
func (d *Dispatcher) begin(s *session, c *task.Claim) {
	d.mu.Lock()
	d.slots++
	d.running[c] = struct{}{}
	d.mu.Unlock()
	d.attempts.Go(func() {
		d.carryOut(s, task.Call{Task: c.Task, Attempt: c.AttemptNumber()}, c)
		d.mu.Lock()
		d.slots--
		delete(d.running, c)
		d.mu.Unlock()
		signal(d.freed)
	})
}

// carryOut makes one attempt under a claim and writes what follows from it.
func (d *Dispatcher) carryOut(s *session, call task.Call, c *task.Claim) (task.Outcome, task.Decision) {
	// The database's clock, carried on from the claim by a monotonic one.
	claimed := time.Now()
	now := func() time.Time { return c.At.Add(time.Since(claimed)) }

	var outcome task.Outcome
	decision, admitted := c.Admit(now())
	if admitted {
		outcome = d.deliver(s.calls, call)
		decision = c.Next(outcome, now(), rand.Float64()) //nolint:gosec // not a secret
	}
	if errors.Is(context.Cause(s.calls), errLeaseLost) {
		// Others carry the task out by now; the fence would turn the result away.
		d.log.Warn("result dropped, the lease was lost", "task_id", c.Task.ID.String(), "claim", c.Number)
		return outcome, decision
	}
	if d.finish(s, c, decision) {
		d.report(s.calls, c, outcome, decision)
		if decision.State == task.Pending {
			d.Notify(decision.Wait)
		}
	}
	return outcome, decision
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
	return d.deliverer.Deliver(ctx, call)
}

// finish writes a decision, again and again while the store is away and the
// lease holds. It reports whether the decision took effect.
func (d *Dispatcher) finish(s *session, c *task.Claim, decision task.Decision) bool {
	for pause := 50 * time.Millisecond; ; pause = min(2*pause, time.Second) {
		matched, err := d.store.Finish(s.writes, c, decision)
		switch {
		case err == nil && !matched:
			d.log.Warn("late result changed nothing", "task_id", c.Task.ID.String(), "claim", c.Number)
			return false
		case err == nil:
			return true
		case !errors.Is(err, task.ErrUnavailable) || !sleep(s.writes, jitter(pause)):
			d.log.Error("result could not be written", "task_id", c.Task.ID.String(), "claim", c.Number, "error", err)
			return false
		}
	}
}

// report logs one line for an attempt.
func (d *Dispatcher) report(ctx context.Context, c *task.Claim, o task.Outcome, decision task.Decision) {
	level, message := slog.LevelInfo, "task succeeded"
	switch {
	case decision.State == task.Failed:
		level, message = slog.LevelWarn, "task failed"
	case o.Kind == task.OutcomeInterrupted:
		message = "attempt interrupted"
	case decision.State == task.Pending:
		message = "attempt failed, will retry"
	case c.AttemptNumber() == 1:
		level = slog.LevelDebug
	}
	if !d.log.Enabled(ctx, level) {
		return
	}
	attrs := []slog.Attr{
		slog.String("task_id", c.Task.ID.String()),
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
