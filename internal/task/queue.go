package task

import (
	"fmt"
	"math"
	"time"
)

// Limits of limits.
const (
	// MaxConcurrentLimit is the highest limit of calls at a time, and MaxBurst of
	// calls that start at once.
	MaxConcurrentLimit = 1_000_000
	MaxBurst           = 1_000_000
	// MinRate and MaxRate bound how many calls a second a limit can allow.
	MinRate = 0.001
	MaxRate = 10_000
)

// Queue is the settings of a queue. Each queue that a task ever named has some, until
// it is deleted: without any limit where they were never written.
type Queue struct {
	Name string
	QueueSettings
	// PausedAt is since when no task of the queue is started; zero: they are.
	PausedAt time.Time
	// Version tells versions of the settings apart: it grows whenever they are written,
	// also anew after they were deleted. It is zero where they never were.
	Version int64
}

// QueueSettings are what a caller sets of a queue.
type QueueSettings struct {
	// Limits are those of all tasks of the queue together.
	Limits
	// PerKey are the limits of each flow key that has none of its own.
	PerKey   KeyLimits
	Defaults QueueDefaults
}

// Limits bound the calls for some tasks, of all instances together. A limit that is zero
// does not exist.
type Limits struct {
	// MaxConcurrent is how many calls are under way at a time.
	MaxConcurrent int
	// MaxPerSecond is how many calls start a second in the long run.
	MaxPerSecond float64
	// Burst is how many calls may start at once after a rest. Where it is zero beside a
	// MaxPerSecond, it is that, rounded up.
	Burst int
}

// EffectiveBurst is how many calls may start at once after a rest; zero where MaxPerSecond
// does not bound them.
func (l Limits) EffectiveBurst() int {
	if l.MaxPerSecond == 0 || l.Burst > 0 {
		return l.Burst
	}
	return int(math.Ceil(l.MaxPerSecond))
}

// KeyLimits are the limits of one flow key.
type KeyLimits struct {
	Limits
	// Ordered: one call at a time, in the order in which the tasks are due; the key
	// waits while its first task is retried.
	Ordered bool
}

// QueueKey is the limits of one flow key that has its own. They stand in place of all of
// [QueueSettings.PerKey].
type QueueKey struct {
	Queue, Key string
	KeyLimits
	// Version is as in a Queue, and never zero.
	Version int64
}

// QueueDefaults are what tasks have that do not say, when they are submitted. What is
// nil is the service's default.
type QueueDefaults struct {
	Timeout *time.Duration
	Retry   RetryChange
}

// IsZero reports whether all is the service's default.
func (d *QueueDefaults) IsZero() bool { return d.Timeout == nil && d.Retry == RetryChange{} }

// In returns a Spec's Timeout and Retry with what d sets of them.
func (d *QueueDefaults) In(s Spec) Spec {
	set(&s.Timeout, d.Timeout)
	s.Retry = d.Retry.In(s.Retry)
	return s
}

// Check returns [Errors] with every rule that s breaks, or nil. service is the service's
// own defaults: what the defaults of the queue leave out.
func (s *QueueSettings) Check(service Spec) error {
	var errs Errors
	add := func(message, kind string, path ...string) {
		errs = append(errs, FieldError{Path: path, Message: message, Kind: kind})
	}
	s.Limits.check(add)
	s.PerKey.check(within("per_key", add))
	d := s.Defaults.In(service)
	if d.Timeout < MinTimeout || d.Timeout > MaxTimeout {
		add("must be between 0.1 and 1800", "out_of_range", "defaults", "timeout_seconds")
	}
	d.Retry.check(within("defaults", add))
	s.Defaults.Retry.checkFor(d.Retry, within("defaults", add))
	if errs == nil {
		return nil
	}
	return errs
}

// Check returns [Errors] with every rule that l breaks, or nil.
func (l *KeyLimits) Check() error {
	var errs Errors
	l.check(func(message, kind string, path ...string) {
		errs = append(errs, FieldError{Path: path, Message: message, Kind: kind})
	})
	if errs == nil {
		return nil
	}
	return errs
}

func (l *KeyLimits) check(add func(message, kind string, path ...string)) {
	l.Limits.check(add)
	if l.Ordered && l.MaxConcurrent > 1 {
		add("must not be above 1 together with ordered, which is one at a time", "conflict", "max_concurrent")
	}
}

func (l *Limits) check(add func(message, kind string, path ...string)) {
	if l.MaxConcurrent < 0 || l.MaxConcurrent > MaxConcurrentLimit {
		add(fmt.Sprintf("must be between 1 and %d", MaxConcurrentLimit), "out_of_range", "max_concurrent")
	}
	if l.MaxPerSecond != 0 && !(l.MaxPerSecond >= MinRate && l.MaxPerSecond <= MaxRate) {
		add(fmt.Sprintf("must be between %v and %d", MinRate, MaxRate), "out_of_range", "max_per_second")
	}
	switch {
	case l.Burst < 0 || l.Burst > MaxBurst:
		add(fmt.Sprintf("must be between 1 and %d", MaxBurst), "out_of_range", "burst")
	case l.Burst > 0 && l.MaxPerSecond == 0:
		add("must not be there without max_per_second: without a rate any number may start at once", "conflict", "burst")
	}
}

// within returns what adds what is wrong with the members of a field.
func within(field string, add func(message, kind string, path ...string)) func(message, kind string, path ...string) {
	return func(message, kind string, path ...string) { add(message, kind, append([]string{field}, path...)...) }
}

// QueueLoad is how much a queue, or a flow key, has to do. Numbers are counted up to
// [MaxCounted].
type QueueLoad struct {
	// Waiting are the tasks that are pending, due or not; Running those that are running.
	Waiting, Running int
	// Keys is how many flow keys those tasks have.
	Keys int
	// OldestDue is for how long the longest waiting one has been due.
	OldestDue time.Duration
}

// MaxCounted is how far the tasks of a queue are counted.
const MaxCounted = 10_000
