package dispatch

import (
	"log/slog"
	"strings"

	"github.com/melodia/orchestrator/internal/task"
)

// describe returns the level and the message of an attempt's log line.
func describe(j *job) (slog.Level, string) {
	o, decision := &j.outcome, &j.decision
	switch {
	case decision.State == task.Failed:
		return slog.LevelWarn, "task failed"
	case decision.State == task.Running:
		return slog.LevelDebug, "task taken by its target"
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
	case j.claim.AttemptNumber() == 1 && o.Error == "":
		return slog.LevelDebug, "task succeeded"
	}
	return slog.LevelInfo, "task succeeded"
}

// report logs one line for an attempt whose decision is written. It runs while the store
// calls back and not in the attempt's goroutine, which would have to wait for the write:
// that made draining a backlog 4 to 5 % slower. At the level Info, a success at the first
// attempt costs one look at the level.
func (d *Dispatcher) report(j *job) {
	ctx, c, o, decision := j.session.calls, j.claim, &j.outcome, &j.decision
	level, message := describe(j)
	if !d.log.Enabled(ctx, level) {
		return
	}
	attrs := []slog.Attr{
		slog.String("task_id", c.Task.ID.String()), slog.Int64("claim", c.Number),
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
