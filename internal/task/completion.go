package task

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"
)

// Completion lets a target take a task with the answer 202 and report its end later: the
// call then needs neither slot nor connection. Any other answer counts as always.
type Completion struct {
	// Timeout is how long the target may take from the 202 on.
	Timeout time.Duration
	// Heartbeat is how long it may report nothing; zero: as long as Timeout.
	Heartbeat time.Duration
}

// Limits of long work.
const (
	MinCompletion          = time.Minute
	MaxCompletion          = 24 * time.Hour
	MinCompletionHeartbeat = 10 * time.Second
	MaxCompletionHeartbeat = time.Hour
	MaxResultBytes         = 64 << 10 // of a result
	MaxNoteBytes           = 1000     // of a report's note, in UTF-8
)

// Silence is how long the target may report nothing.
func (c *Completion) Silence() time.Duration {
	if c.Heartbeat > 0 {
		return min(c.Heartbeat, c.Timeout)
	}
	return c.Timeout
}

// check reports every rule that c, if there is one, breaks.
func (c *Completion) check(add func(message, kind string, path ...string)) {
	if c == nil {
		return
	}
	if c.Timeout < MinCompletion || c.Timeout > MaxCompletion {
		add("must be between 60 and 86400", "out_of_range", "completion", "timeout_seconds")
	}
	switch {
	case c.Heartbeat == 0:
	case c.Heartbeat < MinCompletionHeartbeat || c.Heartbeat > MaxCompletionHeartbeat:
		add("must be between 10 and 3600", "out_of_range", "completion", "heartbeat_seconds")
	case c.Heartbeat > c.Timeout:
		add("must not be above timeout_seconds", "out_of_range", "completion", "heartbeat_seconds")
	}
}

// Token is what a target proves with that it was called for a task: of one attempt, and
// stored as its [Token.Hash] alone.
type Token string

// tokenPrefix marks tokens, so that scanners for secrets find them.
const tokenPrefix = "oct_"

// NewToken makes a token of random bytes.
func NewToken(random [32]byte) Token {
	return Token(tokenPrefix + base64.RawURLEncoding.EncodeToString(random[:]))
}

// ParseToken reports whether text has the form of a token.
func ParseToken(text string) (Token, bool) {
	random, found := strings.CutPrefix(text, tokenPrefix)
	b, err := base64.RawURLEncoding.Strict().DecodeString(random)
	return Token(text), found && err == nil && len(b) == 32
}

// Hash is the SHA-256 of the token. It needs no salt: the token is random.
func (t Token) Hash() [sha256.Size]byte { return sha256.Sum256([]byte(t)) }

// Awaited is a task whose target may report, as it is stored.
type Awaited struct {
	// Claim is that of the latest attempt, without the task's body; nil: the task has ended.
	Claim *Claim
	// Tokens are the hashes of its attempts' tokens, one after the other, the latest last.
	Tokens []byte
	// Open: the latest attempt is under way, its call or what follows a 202.
	Open bool
	// Now is when this was so, by the store's clock.
	Now time.Time
}

// Check returns nil where the token is that of the attempt that is under way, and else
// [ErrTokenUnknown], [ErrEnded] or [ErrTokenOld]. How long it takes tells nothing of tokens.
func (a *Awaited) Check(t Token) error {
	hash := t.Hash()
	known, latest := 0, 0
	for i := 0; i+sha256.Size <= len(a.Tokens); i += sha256.Size {
		latest = subtle.ConstantTimeCompare(a.Tokens[i:i+sha256.Size], hash[:])
		known |= latest
	}
	switch {
	case known == 0:
		return ErrTokenUnknown
	case a.Claim == nil:
		return ErrEnded
	case latest == 0 || !a.Open:
		return ErrTokenOld
	}
	return nil
}

// ReportKind is what a target reports.
type ReportKind string

// The kinds of reports.
const (
	ReportSucceeded ReportKind = "succeeded"
	ReportFailed    ReportKind = "failed"
	ReportHeartbeat ReportKind = "heartbeat"
)

// Report is what a target says of a task that it has taken.
type Report struct {
	Kind ReportKind
	// Result is JSON, with ReportSucceeded alone; nil is none.
	Result []byte
	// Retry says whether another attempt may help, after ReportFailed.
	Retry bool
	// Progress is from 0 to 1; nil: as it was.
	Progress *float64
	// Note is a text for people; empty: as it was.
	Note string
}

// Check returns [Errors] with every rule that r breaks, or nil.
func (r *Report) Check() error {
	var errs Errors
	add := func(message, kind, field string) {
		errs = append(errs, FieldError{Path: []string{field}, Message: message, Kind: kind})
	}
	if r.Result != nil && r.Kind != ReportSucceeded {
		add("goes with the outcome succeeded only", "conflict", "result")
	}
	if len(r.Result) > MaxResultBytes {
		add("must be at most 65536 bytes of JSON", "too_long", "result")
	}
	if r.Result != nil && !json.Valid(r.Result) {
		add("must be JSON", "invalid", "result")
	}
	if p := r.Progress; p != nil && !(*p >= 0 && *p <= 1) {
		add("must be between 0 and 1", "out_of_range", "progress")
	}
	if len(r.Note) > MaxNoteBytes || !utf8.ValidString(r.Note) || !isPlainText(r.Note) {
		add("must be at most 1000 bytes without control characters", "invalid", "note")
	}
	if errs == nil {
		return nil
	}
	return errs
}

// Progress is the latest report of a target that has not ended its task.
type Progress struct {
	// Part is from 0 to 1; nil: the target did not say.
	Part *float64
	// Note is the target's text for people.
	Note string
	// At is when the report came.
	At time.Time
}

// Outcome returns what follows for the attempt under c from a report that ends it, at now.
func (r *Report) Outcome(c *Claim, now time.Time) Outcome {
	o := Outcome{Kind: OutcomeSucceeded, StatusCode: takenStatus, Duration: max(now.Sub(c.At), 0), Completed: true, Cancelled: !c.Task.CancelRequestedAt.IsZero()}
	if r.Kind == ReportFailed {
		o.Kind, o.Never, o.Error = OutcomeRetryable, !r.Retry, "the target reported that it failed"
		if r.Note != "" {
			o.Error += ": " + r.Note
		}
	}
	return o
}

// takenStatus is the answer with which a target takes a task.
const takenStatus = 202

// Silent returns the outcome of the attempt under c, which was taken by the target, whose
// time is over at now.
func (c *Claim) Silent(now time.Time) Outcome {
	t := c.Task
	o := Outcome{Kind: OutcomeLost, StatusCode: takenStatus, Duration: max(now.Sub(c.At), 0), Completed: true, Cancelled: !t.CancelRequestedAt.IsZero()}
	o.Error = fmt.Sprintf("the target took the task and did not complete it within completion.timeout_seconds (%s)", span(t.Completion.Timeout))
	if t.CompletionUntil.Before(t.CompletionEndsAt) {
		o.Error = fmt.Sprintf("the target took the task, and then no heartbeat came within completion.heartbeat_seconds (%s)", span(t.Completion.Silence()))
	}
	return o
}

// taken returns the decision on an attempt that the target took with a 202. Its Attempt is for
// a task whose cancellation was requested meanwhile: it ends as cancelled.
func (c *Claim) taken(d Decision, o *Outcome) Decision {
	d.State, d.Counted = Running, false
	d.Attempt.Outcome, d.Attempt.Error = OutcomeInterrupted, "the task was cancelled when the target had taken it"
	if o.Cancelled {
		d.State = Cancelled
	}
	return d
}
