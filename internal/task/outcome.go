package task

import "time"

// Kind is what an attempt came to.
type Kind string

// The kinds of outcome.
const (
	// OutcomeSucceeded: the target answered 2xx and got the whole request.
	OutcomeSucceeded Kind = "succeeded"
	// OutcomeRetryable: trying the same call again may help.
	OutcomeRetryable Kind = "retryable"
	// OutcomePermanent: trying the same call again cannot help.
	OutcomePermanent Kind = "permanent"
	// OutcomeSnoozed: the target asked for the same call later, without counting
	// this one.
	OutcomeSnoozed Kind = "snoozed"
	// OutcomeInterrupted: our own shutdown, or a request to cancel the task, cut
	// the call short, and the target may have seen it; or a [Shortage] of our own
	// kept the call from being made.
	OutcomeInterrupted Kind = "interrupted"
	// OutcomeLost: the instance that held the task fell silent, or the target that had taken
	// it. The target may have seen the call.
	OutcomeLost Kind = "lost"
)

// Outcome is how one attempt ended, as the deliverer saw it.
type Outcome struct {
	Kind Kind
	// StatusCode is zero where no response came.
	StatusCode int
	// Error is one sentence without a query string or a secret. After a success it is
	// empty, or says what was wrong all the same: a body that broke off, a repeat.
	Error string
	// ResponseExcerpt is the start of the response's body as valid UTF-8 without NUL.
	ResponseExcerpt string
	// RetryAfter is the wait that the target asked for, capped at
	// [MaxRetryAfter]; zero where it did not ask.
	RetryAfter time.Duration
	// Never: the target asked that the call never be tried again.
	Never bool
	// Snooze is the wait after which the target wants the call again, without
	// counting this attempt, at most [MaxSnooze]; zero where it did not ask.
	Snooze   time.Duration
	Duration time.Duration
	// TimedOut: the attempt used up its timeout.
	TimedOut bool
	// Severed: the connection ended, though it could be used, before an answer came. The
	// target may have the request.
	Severed bool
	// Refused: the settings did not allow the call (Kind is permanent).
	Refused bool
	// Untried: the attempt failed before the target was tried, so that it says nothing of
	// the target.
	Untried bool
	// NotSent: the attempt failed before any of the request was sent, so that the target did
	// not get it.
	NotSent bool
	// Completed: the target had taken the task, and reported this, or fell silent.
	Completed bool
	// Cancelled: a caller asked meanwhile that the task be cancelled.
	Cancelled bool
	// Shortage is why no request was sent (Kind is interrupted); mostly empty.
	Shortage Shortage
}

// Classify says what an HTTP status code means for an attempt: 2xx succeeded;
// 3xx and 4xx permanent, but for 408 (Request Timeout), 425 (Too Early) and
// 429 (Too Many Requests); everything else retryable.
func Classify(statusCode int) Kind {
	switch {
	case statusCode >= 200 && statusCode <= 299:
		return OutcomeSucceeded
	case statusCode == 408, statusCode == 425, statusCode == 429:
		return OutcomeRetryable
	case statusCode >= 300 && statusCode <= 499:
		return OutcomePermanent
	default:
		return OutcomeRetryable
	}
}

// Heed returns o with the Kind that it has where the target's wishes count: Never
// makes it permanent, and Snooze snoozed unless the task was snoozed [MaxSnoozes]
// times before. A target that wants both gets the first. A success stays one.
func (o Outcome) Heed(snoozes int) Outcome {
	switch {
	case o.Kind == OutcomeSucceeded:
	case o.Never:
		o.Kind = OutcomePermanent
	case o.Snooze > 0 && snoozes < MaxSnoozes:
		o.Kind = OutcomeSnoozed
	}
	return o
}

// Counts reports whether an attempt of this kind counts towards MaxAttempts.
func (k Kind) Counts() bool { return k != OutcomeInterrupted && k != OutcomeSnoozed }

// Call is one attempt at a task, as it is handed to the deliverer.
type Call struct {
	Task *Task
	// Attempt is 1 for the first attempt.
	Attempt int
	// At is when the call begins, by the database's clock.
	At time.Time
	// ViaWorkerEndpoint marks a call that a request to /worker-endpoint causes,
	// so that one which comes back to us is known for a loop.
	ViaWorkerEndpoint bool
	// Token lets the target report the end of the task; empty unless that has a Completion.
	Token Token
}

// Claim is the right to carry out a task, held by one dispatcher. Only the
// holder of the latest claim can change the task.
type Claim struct {
	Task *Task
	// Number only grows over a task's life. It is the fence: a result that
	// bears an older number changes nothing.
	Number int64
	// At is when the claim was made, by the database's clock.
	At time.Time
	// FirstAt is when the task was claimed for the first time.
	FirstAt time.Time
}

// AttemptNumber is the number of the attempt made under this claim.
func (c *Claim) AttemptNumber() int { return c.Task.AttemptCount + 1 }

// Decision is what happens to a claimed task next: [Running] turns into State.
type Decision struct {
	// State is Pending, Succeeded, Failed or Cancelled; or Running: the target has taken the
	// task, and the dispatcher lets go of it.
	State State
	// Reason is set when State is Failed.
	Reason Reason
	// Wait is how long a Pending task waits from the moment of writing.
	Wait time.Duration
	// Host is the host that a Pending task waits for from now on; empty: it waits where it
	// did before.
	Host string
	// Attempt goes into the task's story; nil when no attempt was made.
	Attempt *Attempt
	// Counted says that Attempt counts towards MaxAttempts.
	Counted bool
}

// MayStart reports whether an attempt may start at now. Where it may not, ok is false and d
// ends the task.
func (c *Claim) MayStart(now time.Time) (d Decision, ok bool) {
	t := c.Task
	switch {
	case !t.CancelRequestedAt.IsZero():
		// It was requested during an attempt that was then lost.
		return Decision{State: Cancelled}, false
	case t.expiredBy(now):
		return Decision{State: Failed, Reason: Expired}, false
	case t.AttemptCount >= t.Retry.MaxAttempts:
		// Reaping counts a lost attempt and never ends a task: this does.
		return Decision{State: Failed, Reason: AttemptsExhausted}, false
	case t.AttemptCount+t.SnoozeCount > 0 && c.retryDurationOver(now):
		return Decision{State: Failed, Reason: RetryDurationExhausted}, false
	}
	return Decision{}, true
}

// Next decides what follows from the outcome of the attempt made under c, at
// now, by the clock of c.At. random, in [0, 1), spreads the wait before a retry.
//
// A target's Retry-After raises the wait and is not jittered downwards; its
// Orchestrator-Snooze is the wait (see [Outcome.Heed]). After an outcome that is hidden the
// next attempt begins no sooner than the task's timeout after this one. A task whose cancellation was
// requested is not tried again; where its call ended it all the same, it ends so.
//
// An attempt that met a shortage is not counted. A shortage that lasts ends the task all
// the same where [RetryPolicy] bounds the time, or ExpiresAt.
func (c *Claim) Next(o Outcome, now time.Time, random float64) Decision {
	t := c.Task
	o = o.Heed(t.SnoozeCount)
	d := Decision{
		Attempt: &Attempt{
			Round:           max(t.Round, 1),
			Number:          c.AttemptNumber(),
			StartedAt:       now.Add(-o.Duration),
			Duration:        o.Duration,
			Outcome:         o.Kind,
			StatusCode:      o.StatusCode,
			Error:           o.Error,
			ResponseExcerpt: o.ResponseExcerpt,
			NotSent:         o.NotSent,
			RetryAfter:      o.RetryAfter,
		},
		Counted: o.Kind.Counts(),
	}
	clientError := o.StatusCode >= 400 && o.StatusCode <= 499
	switch {
	case o.Kind == OutcomeInterrupted && (o.Shortage == "" || o.Cancelled):
		d.State = Pending
		if o.Cancelled {
			d.State = Cancelled
		}
		return d
	case o.Shortage != "":
		d.Wait = jittered(c.shortageWait(), random)
	case o.Kind == OutcomeSucceeded && t.Completion != nil && o.StatusCode == takenStatus && !o.Completed:
		return c.taken(d, &o)
	case o.Kind == OutcomeSucceeded:
		d.State = Succeeded
		return d
	case o.Refused:
		d.State, d.Reason = Failed, TargetRefused
		return d
	case o.Kind == OutcomePermanent && (o.Never || !(clientError && t.Retry.RetryClientErrors)):
		d.State, d.Reason = Failed, ClientError
		return d
	case o.Kind == OutcomeSnoozed:
		d.Wait = min(o.Snooze, MaxSnooze)
	case d.Attempt.Number >= t.Retry.MaxAttempts:
		d.State, d.Reason = Failed, AttemptsExhausted
		return d
	default:
		d.Wait = max(jittered(t.Retry.Backoff(d.Attempt.Number), random), min(o.RetryAfter, MaxRetryAfter), o.hiddenWait(t.Timeout))
	}

	d.State = Pending
	next := now.Add(d.Wait)
	if c.retryDurationOver(next) {
		d.State, d.Reason, d.Wait = Failed, RetryDurationExhausted, 0
	} else if t.expiredBy(next) {
		d.State, d.Reason, d.Wait = Failed, Expired, 0
	} else if o.Cancelled {
		d.State, d.Wait = Cancelled, 0
	}
	return d
}

// retryDurationOver reports whether an attempt at moment would start later
// than MaxRetryDuration after the first.
func (c *Claim) retryDurationOver(moment time.Time) bool {
	limit := c.Task.Retry.MaxRetryDuration
	return limit > 0 && moment.Sub(c.FirstAt) > limit
}

// expiredBy reports whether an attempt at moment would start after ExpiresAt.
func (t *Task) expiredBy(moment time.Time) bool {
	return !t.ExpiresAt.IsZero() && moment.After(t.ExpiresAt)
}
