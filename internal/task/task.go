// Package task is the domain: what a task is, which requests are legal, when
// a task is due, and what follows from the outcome of an attempt.
//
// Everything in it is a pure function of its arguments. It knows no clock, no
// database and no network: the moment and the random numbers that a decision
// needs are handed in.
//
// One task's way through the package: [New] checks a [Spec] and makes a
// [Task]; a dispatcher holds it under a [Claim]; [Claim.MayStart] says whether an
// attempt may start; [Claim.Next] turns the attempt's [Outcome] into a
// [Decision].
package task

import "time"

// State says where a task is on its way.
//
//	pending → running → succeeded | failed | cancelled
//	   ↑         │                      │
//	   ├─────────┘ retry, snoozed, interrupted, lost
//	   └────────────────────────────────┘ redriven
//
// A pending task can become cancelled too.
type State string

// The states. A task in a terminal state changes only where it is redriven.
const (
	// Pending waits for its run_at, the first time or for a retry.
	Pending State = "pending"
	// Running is held by one dispatcher under a claim, or by its target (see [Completion]).
	Running State = "running"
	// Succeeded ended with a 2xx answer.
	Succeeded State = "succeeded"
	// Failed is the dead letter; the task's Reason says why.
	Failed State = "failed"
	// Cancelled was called off before it could end by itself.
	Cancelled State = "cancelled"
)

// states are all of them, in the order of a task's life.
var states = []State{Pending, Running, Succeeded, Failed, Cancelled}

// Terminal reports whether a task in s stays as it is unless it is redriven.
func (s State) Terminal() bool {
	return s == Succeeded || s == Failed || s == Cancelled
}

// CanBecome reports whether the transition from s to next is legal.
func (s State) CanBecome(next State) bool {
	switch s {
	case Pending:
		return next == Running || next == Cancelled
	case Running:
		return next == Pending || next.Terminal()
	default:
		return next == Pending && (s == Failed || s == Cancelled)
	}
}

// Reason says why a task failed. It is empty in every other state.
type Reason string

// The reasons of a failed task.
const (
	// AttemptsExhausted: max_attempts attempts were made and none succeeded.
	AttemptsExhausted Reason = "attempts_exhausted"
	// RetryDurationExhausted: the next retry would start later than
	// max_retry_duration after the first attempt.
	RetryDurationExhausted Reason = "retry_duration_exhausted"
	// ClientError: the target's answer (3xx, or 4xx other than 408, 425 and
	// 429, or any with Orchestrator-Retry: never) says that the same call would
	// fail again.
	ClientError Reason = "client_error"
	// Expired: expires_at passed, or would pass before the next attempt.
	Expired Reason = "expired"
	// TargetRefused: the settings do not admit the target's address, or not that
	// it is sent the task's ID token or secrets.
	TargetRefused Reason = "target_refused"
)

// reasons are all of them.
var reasons = []Reason{AttemptsExhausted, RetryDurationExhausted, ClientError, Expired, TargetRefused}

// Task is one HTTP call to be carried out, and its story so far.
type Task struct {
	ID ID
	Spec
	State State
	// RunAt is when the task is due. It is zero in a task that is not stored
	// yet and is due Delay from the moment of storing, by the database's clock.
	RunAt time.Time
	// Delay is meaningful only while RunAt is zero.
	Delay time.Duration
	// HeldHost is the host, as [HostOf] returns it, that the task waits for because it is
	// not healthy; mostly empty.
	HeldHost string
	// BodyBytes is the size of the body, also of a task that was read without it.
	BodyBytes int
	CreatedAt time.Time
	// FinishedAt is zero until the task has ended.
	FinishedAt time.Time
	Reason     Reason
	// LastClaim is the number of the latest claim. It also grows when the task is
	// changed while no instance holds it, so that it tells its versions apart.
	LastClaim int64
	// CancelRequestedAt is when a caller asked to stop the running task; zero
	// where none did.
	CancelRequestedAt time.Time
	// CreatedBy names who handed it in; empty where callers are not known.
	CreatedBy string
	// IdempotencyKey names the request that the task came with, until the task is
	// cancelled or the key's window ends; empty is none.
	IdempotencyKey string
	// Fingerprint tells a repeat of that request from another one. It is not kept
	// with the task.
	Fingerprint []byte
	// Hops is how many calls led to the request that handed the task in: 0 where
	// that was no task's call. Its own calls are one hop further. At most [MaxHops].
	Hops int
	// ParentID is the task whose call led to this one, or whose end this one tells.
	// RootID is the first task of that chain: the parent's root, or the parent where
	// it has none or is not known. Both are zero without a parent.
	ParentID, RootID ID
	// Round is 1 more than the number of redrives. Zero is 1.
	Round int
	// SnoozeCount is how many attempts of this round were snoozed.
	SnoozeCount int
	// AttemptCount is the number of ended attempts of this round that count towards
	// MaxAttempts: all but those that were interrupted or snoozed.
	AttemptCount int
	// Attempts is the story, oldest first.
	Attempts []Attempt
	// Awaiting: the task is running, and no dispatcher holds it: its target has taken it.
	// CompletionUntil is by when that must report, and CompletionEndsAt by when it must be
	// done; Progress is what it reported last, nil before.
	Awaiting                          bool
	CompletionUntil, CompletionEndsAt time.Time
	Progress                          *Progress
	// Result is the JSON with which the target completed the task; nil is none.
	Result []byte
}

// Batch is tasks that are stored together, or not at all.
type Batch struct {
	Tasks []*Task
	// IdempotencyKey and Fingerprint are as in a task, for all of them: none has a
	// key of its own, so that cancelling one does not release it.
	IdempotencyKey string
	Fingerprint    []byte
}

// Attempt is the record of one ended attempt.
type Attempt struct {
	// Round is 1 for the attempts before the first redrive, and 1 more after each.
	Round int
	// Number is 1 for the first attempt of a round. An attempt that was interrupted
	// or snoozed does not count, so the next one has the same number.
	Number int
	// StartedAt is when the call began, by the database's clock. A lost one has the
	// moment of its claim.
	StartedAt time.Time
	Duration  time.Duration
	Outcome   Kind
	// StatusCode is zero where no response came.
	StatusCode int
	// Error is one sentence without a query string or a secret; empty after a success.
	Error string
	// ResponseExcerpt is the start of the response's body as valid UTF-8
	// without NUL.
	ResponseExcerpt string
	// RetryAfter is what the target asked for; zero where it did not.
	RetryAfter time.Duration
	// NotSent is as in an [Outcome]. Attempts that were recorded before there was NotSent have it false.
	NotSent bool
}
