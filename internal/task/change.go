package task

import (
	"maps"
	"strings"
	"time"
)

// Change is what a request changes about a pending task. A nil field stays as it is. A pointer
// to the zero value clears the field, where [New] allows a task without it.
type Change struct {
	When *When
	// Headers and Labels are set name by name; a nil value takes the name away.
	// The name of a header is the same in either case.
	Headers, Labels map[string]*string
	Content         *Content
	Timeout         *time.Duration
	Retry           RetryChange
	ExpiresAt       *time.Time
	Queue, FlowKey  *string
	Priority        *Priority
}

// Content is what a call carries, as in [Spec].
type Content struct {
	Body        []byte
	ContentType string
	// Field is the name of the request's field that had the body; errors name it.
	Field string
}

// RetryChange is [Change] of a [RetryPolicy].
type RetryChange struct {
	// For is for how long retries go on after the first attempt, whatever their number. It
	// stands in place of MaxAttempts and MaxRetryDuration, and of MaxBackoff unless that is
	// set: see [RetryChange.Resolved].
	For               *time.Duration
	MaxAttempts       *int
	MaxRetryDuration  *time.Duration
	MinBackoff        *time.Duration
	MaxBackoff        *time.Duration
	MaxDoublings      *int
	RetryClientErrors *bool
}

// Change returns a copy of t with c applied. It returns [Errors] with every rule of [New] that
// the copy would break, or [ErrNotPending] or [ErrCancelRequested]. t may have been read without
// its body. now is only compared with the [Horizon].
func (t *Task) Change(c Change, now time.Time) (*Task, error) {
	if err := t.Changeable(); err != nil {
		return nil, err
	}
	changed := *t
	changed.Headers = merge(t.Headers, c.Headers, strings.EqualFold)
	changed.Labels = merge(t.Labels, c.Labels, func(a, b string) bool { return a == b })
	if c.Content != nil {
		changed.Body, changed.ContentType, changed.BodyBytes = c.Content.Body, c.Content.ContentType, len(c.Content.Body)
	}
	set(&changed.Timeout, c.Timeout)
	set(&changed.ExpiresAt, c.ExpiresAt)
	changed.changeFlow(&c)
	changed.Retry = c.Retry.In(t.Retry)

	var errs Errors
	add := func(message, kind string, path ...string) {
		errs = append(errs, FieldError{Path: path, Message: message, Kind: kind})
	}
	if c.Content != nil && changed.carriesNone() && c.Content.Body != nil {
		add("must not be there: the task's method is GET or HEAD", "conflict", c.Content.Field)
		changed.Body = nil // else check reports the same mistake again, for the method
	}
	changed.check(add)
	c.Retry.checkFor(changed.Retry, add)
	if c.Retry.MaxAttempts != nil && *c.Retry.MaxAttempts <= t.AttemptCount {
		add("must be above the number of attempts that were made already (attempt_count)", "out_of_range", "retry", "max_attempts")
	}
	when := When{At: t.RunAt}
	if c.When != nil {
		when = *c.When
		changed.RunAt, changed.Delay = when.At, when.Delay
	}
	if c.When != nil || c.ExpiresAt != nil {
		checkWhen(when, changed.ExpiresAt, now, add)
	}
	if errs != nil {
		return nil, errs
	}
	return &changed, nil
}

// In returns p with c applied.
func (c *RetryChange) In(p RetryPolicy) RetryPolicy {
	set(&p.MaxAttempts, c.MaxAttempts)
	set(&p.MaxRetryDuration, c.MaxRetryDuration)
	set(&p.MinBackoff, c.MinBackoff)
	set(&p.MaxBackoff, c.MaxBackoff)
	set(&p.MaxDoublings, c.MaxDoublings)
	set(&p.RetryClientErrors, c.RetryClientErrors)
	if c.For != nil {
		p = p.lasting(*c.For, c.MaxBackoff != nil)
	}
	return p
}

// CheckFor returns [Errors] where the policy that c, applied, led to does not last for c.For.
func (c *RetryChange) CheckFor(applied RetryPolicy) (errs Errors) {
	c.checkFor(applied, func(message, kind string, path ...string) {
		errs = append(errs, FieldError{Path: path, Message: message, Kind: kind})
	})
	return errs
}

func (c *RetryChange) checkFor(applied RetryPolicy, add func(message, kind string, path ...string)) {
	if c.For != nil {
		applied.checkLasting(add)
	}
}

// Resolved returns c with what its For stands for in place of it, where it is applied to p.
func (c RetryChange) Resolved(p RetryPolicy) RetryChange {
	if c.For == nil {
		return c
	}
	p = c.In(p)
	c.MaxAttempts, c.MaxRetryDuration, c.MaxBackoff, c.For = &p.MaxAttempts, &p.MaxRetryDuration, &p.MaxBackoff, nil
	return c
}

// merge returns fields with changes made to them, without touching either.
func merge(fields map[string]string, changes map[string]*string, same func(a, b string) bool) map[string]string {
	merged := maps.Clone(fields)
	for name, value := range changes {
		maps.DeleteFunc(merged, func(old, _ string) bool {
			_, given := changes[old] // such a name is merged in a round of its own
			return same(old, name) && (old == name || !given)
		})
		if value == nil {
			continue
		}
		if merged == nil {
			merged = make(map[string]string, len(changes))
		}
		merged[name] = *value
	}
	return merged
}

// changeFlow applies the fields of c for flow control. A task that leaves its queue loses its
// priority, too.
func (s *Spec) changeFlow(c *Change) {
	set(&s.Queue, c.Queue)
	set(&s.FlowKey, c.FlowKey)
	if s.Queue == "" && s.FlowKey == "" {
		s.Priority = ""
	}
	set(&s.Priority, c.Priority)
	s.completeFlow()
}

func set[T any](field *T, value *T) {
	if value != nil {
		*field = *value
	}
}

// Changeable returns nil where t can be changed or made due, otherwise
// [ErrNotPending] or [ErrCancelRequested].
func (t *Task) Changeable() error {
	switch {
	case t.State != Pending:
		return ErrNotPending
	case !t.CancelRequestedAt.IsZero():
		return ErrCancelRequested
	}
	return nil
}

// Cancellable returns nil where t can be cancelled, otherwise [ErrEnded] or
// [ErrCancelRequested].
func (t *Task) Cancellable() error {
	switch {
	case t.State.Terminal():
		return ErrEnded
	case t.State == Running && !t.CancelRequestedAt.IsZero():
		return ErrCancelRequested
	}
	return nil
}

// Redrivable returns nil where t can be redriven, otherwise [ErrNotRedrivable].
func (t *Task) Redrivable() error {
	if t.State != Failed && t.State != Cancelled {
		return ErrNotRedrivable
	}
	return nil
}
