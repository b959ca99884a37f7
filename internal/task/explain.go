package task

import (
	"fmt"
	"math"
	"strings"
	"time"
)

// Facts are what is known around a task at one moment, for [Explain].
type Facts struct {
	// Now is the moment, by the database's clock.
	Now time.Time
	// ClaimedAt is when the attempt under way began; zero unless the task is running.
	ClaimedAt time.Time
	// Holder names the instance that carries the task out, and HolderSeenAt is
	// its last sign of life: zero when it has signed off.
	Holder       string
	HolderSeenAt time.Time
	// Lease is how long an instance may be silent before others take its tasks.
	Lease time.Duration
	// Instances is how many carry out tasks by themselves and were seen within
	// Lease; Slots is how many tasks these carry out at a time, zero when one
	// of them did not say.
	Instances, Slots int
	// InstanceSeenAt is the last sign of life of any of them, however old.
	InstanceSeenAt time.Time
	// Running is how many tasks are running.
	Running int
	// Ahead is how many plain tasks are due before this one; it counts up to [MaxAhead].
	Ahead int
	// Flow is what is known about its limits; zero unless the task is pending.
	Flow Flow
}

// MaxAhead is how far the tasks ahead of another are counted.
const MaxAhead = 10_000

// Explain says in one sentence why a task has not run, or how it ended. Further sentences
// count the attempts without a result that may have reached the target, and those that the
// target snoozed, if there are any.
// A last one names the parent of the task, if it has one, and the first task of the chain.
func Explain(t *Task, f Facts) string {
	return explainState(t, f) + explainRepeats(t) + explainParent(t)
}

// explainRepeats says why a target may have got a task more often than its counted attempts
// show.
func explainRepeats(t *Task) string {
	var interrupted, snoozed, lost, unanswered int
	for i := range t.Attempts {
		switch a := &t.Attempts[i]; {
		case a.Outcome == OutcomeInterrupted && !a.NotSent && !isShortage(a.Error):
			interrupted++
		case a.Outcome == OutcomeSnoozed:
			snoozed++
		case a.Outcome == OutcomeLost:
			lost++
		case a.Outcome == OutcomeRetryable && a.StatusCode == 0 && !a.NotSent:
			unanswered++
		}
	}
	snoozes := ""
	if snoozed > 0 {
		snoozes = fmt.Sprintf(" The target snoozed %s.", count(snoozed, "attempt"))
	}
	var parts []string
	for _, part := range []struct {
		n    int
		what string
	}{{interrupted, "interrupted"}, {lost, "lost"}, {unanswered, "unanswered"}} {
		if part.n > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", part.n, part.what))
		}
	}
	if parts == nil {
		return snoozes
	}
	return " The target may have got " + count(interrupted+lost+unanswered, "attempt") + " without a result: " + strings.Join(parts, ", ") + "." + snoozes
}

func explainParent(t *Task) string {
	switch t.ParentID {
	case ID{}:
		return ""
	case t.RootID:
		return fmt.Sprintf(" It is a child of the task %s.", t.ParentID)
	default:
		return fmt.Sprintf(" It is a child of the task %s, in the chain that the task %s began.", t.ParentID, t.RootID)
	}
}

func explainState(t *Task, f Facts) string {
	switch t.State {
	case Pending:
		return explainPending(t, f)
	case Running:
		return explainRunning(t, f)
	case Succeeded:
		return fmt.Sprintf("It succeeded %s ago at attempt %d of %d%s.", span(f.Now.Sub(t.FinishedAt)), max(t.AttemptCount, 1), t.Retry.MaxAttempts, answered(t))
	case Cancelled:
		return fmt.Sprintf("It was cancelled %s ago, %s.", span(f.Now.Sub(t.FinishedAt)), after(t))
	default:
		return fmt.Sprintf("It failed %s ago: %s.", span(f.Now.Sub(t.FinishedAt)), whyFailed(t))
	}
}

func explainPending(t *Task, f Facts) string {
	wait := t.RunAt.Sub(f.Now)
	next := ""
	switch last := lastAttempt(t); {
	case last == nil:
	case last.Round < t.Round:
		next = fmt.Sprintf(" for attempt %d of %d, since it was redriven", t.AttemptCount+1, t.Retry.MaxAttempts)
	default:
		why := fmt.Sprintf("attempt %d failed", last.Number)
		if last.Outcome == OutcomeSnoozed {
			why = "the target snoozed it (" + count(t.SnoozeCount, "time") + fmt.Sprintf(" of %d)", MaxSnoozes)
		}
		next = fmt.Sprintf(" for attempt %d of %d, since %s%s", t.AttemptCount+1, t.Retry.MaxAttempts, why, because(last))
	}
	switch {
	case t.expiredBy(f.Now):
		return fmt.Sprintf("It expired %s ago: when its turn comes it fails, without another attempt.", span(f.Now.Sub(t.ExpiresAt)))
	case wait > 0:
		return fmt.Sprintf("It is due in %s%s.", span(wait), next)
	}
	due := fmt.Sprintf("It has been due for %s%s", span(-wait), next)
	w := WaitOf(t, f)
	switch {
	case f.Instances == 0 && f.InstanceSeenAt.IsZero():
		return due + ", but no instance carries out tasks."
	case f.Instances == 0:
		return fmt.Sprintf("%s, but no instance carries out tasks: the last one was seen %s ago.", due, span(f.Now.Sub(f.InstanceSeenAt)))
	case w.For == WaitsForSlots:
		return fmt.Sprintf("%s, but all %d slots of %s are busy; %s.", due, f.Slots, count(f.Instances, "instance"), w.ahead())
	case w.For != "":
		return fmt.Sprintf("It waits %s; %s. %s.", w.why, w.ahead(), due)
	default:
		return fmt.Sprintf("%s; %s.", due, w.ahead())
	}
}

func explainAwaiting(t *Task, f Facts) string {
	text := fmt.Sprintf("The target took attempt %d of %d %s ago", t.AttemptCount+1, t.Retry.MaxAttempts, span(f.Now.Sub(f.ClaimedAt)))
	if p := t.Progress; p != nil {
		text += fmt.Sprintf(" and reported%s %s ago", p.text(), span(f.Now.Sub(p.At)))
	} else {
		text += " and has not reported since"
	}
	next := "report its end"
	if t.CompletionUntil.Before(t.CompletionEndsAt) {
		next = fmt.Sprintf("send a heartbeat within %s, and report its end", span(t.CompletionUntil.Sub(f.Now)))
	}
	return fmt.Sprintf("%s. It must %s within %s; else the attempt is lost and tried again.", text, next, span(t.CompletionEndsAt.Sub(f.Now)))
}

// text is what was reported, with a space before it: " 40 % (mixing)".
func (p *Progress) text() string {
	text := ""
	if p.Part != nil {
		text = fmt.Sprintf(" %.0f %%", *p.Part*100)
	}
	if p.Note != "" {
		text += " (" + strings.TrimSuffix(p.Note, ".") + ")"
	}
	return text
}

func explainRunning(t *Task, f Facts) string {
	if t.Awaiting {
		return explainAwaiting(t, f)
	}
	attempt := fmt.Sprintf("Attempt %d of %d has been under way for %s", t.AttemptCount+1, t.Retry.MaxAttempts, span(f.Now.Sub(f.ClaimedAt)))
	if !t.CancelRequestedAt.IsZero() {
		attempt = fmt.Sprintf("Cancelling it was asked for %s ago; attempt %d has been under way for %s",
			span(f.Now.Sub(t.CancelRequestedAt)), t.AttemptCount+1, span(f.Now.Sub(f.ClaimedAt)))
	}
	if f.HolderSeenAt.IsZero() {
		return attempt + ", held by an instance that is gone: another takes it over."
	}
	silent := f.Now.Sub(f.HolderSeenAt)
	held := fmt.Sprintf("%s, held by the instance %s, last seen %s ago", attempt, f.Holder, span(silent))
	if silent > f.Lease {
		return held + ": another takes it over."
	}
	return held + "."
}

func whyFailed(t *Task) string {
	last := lastAttempt(t)
	switch t.Reason {
	case Expired:
		return fmt.Sprintf("%s, expires_at had passed, or would have before the next attempt%s", after(t), because(last))
	case AttemptsExhausted:
		if t.Retry.MaxAttempts == 1 {
			return "its only attempt failed" + because(last)
		}
		return fmt.Sprintf("all %d attempts failed%s", t.Retry.MaxAttempts, because(last))
	case RetryDurationExhausted:
		return fmt.Sprintf("another attempt would have begun later than max_retry_duration_seconds (%s) after the first%s", span(t.Retry.MaxRetryDuration), because(last))
	case TargetRefused:
		return "the service's settings do not allow the call" + because(last)
	default:
		return fmt.Sprintf("after attempt %d it was not tried again, since the same call would fail again%s", max(t.AttemptCount, 1), because(last))
	}
}

func lastAttempt(t *Task) *Attempt {
	if len(t.Attempts) == 0 {
		return nil
	}
	return &t.Attempts[len(t.Attempts)-1]
}

// because is ": …" with what went wrong.
func because(a *Attempt) string {
	if a == nil || a.Error == "" {
		return ""
	}
	return ": " + strings.TrimSuffix(a.Error, ".")
}

func answered(t *Task) string {
	last := lastAttempt(t)
	if last == nil || last.StatusCode == 0 {
		return ""
	}
	text := fmt.Sprintf(": the target answered %d", last.StatusCode)
	if last.Error != "" {
		text += " (" + strings.TrimSuffix(last.Error, ".") + ")"
	}
	return text
}

func after(t *Task) string {
	if t.AttemptCount == 0 {
		return "before any attempt"
	}
	return "after " + count(t.AttemptCount, "attempt")
}

func count(n int, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	return fmt.Sprintf("%d %ss", n, thing)
}

// span is a duration as people say it, in one unit.
func span(d time.Duration) string {
	const day = 24 * time.Hour
	round := func(unit time.Duration) int64 { return int64(math.Round(float64(d) / float64(unit))) }
	switch d = max(d, 0); {
	case d < 10*time.Second:
		return fmt.Sprintf("%.1f s", d.Seconds())
	case d < 2*time.Minute:
		return fmt.Sprintf("%d s", round(time.Second))
	case d < 2*time.Hour:
		return fmt.Sprintf("%d min", round(time.Minute))
	case d < 2*day:
		return fmt.Sprintf("%d h", round(time.Hour))
	default:
		return fmt.Sprintf("%d days", round(day))
	}
}
