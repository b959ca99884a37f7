package task

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// RetryPolicy says when a failed attempt is tried again. Names and formula are
// those of Cloud Tasks' RetryConfig
// (https://cloud.google.com/tasks/docs/reference/rest/v2/projects.locations.queues#RetryConfig),
// with one difference: retrying stops when either limit is reached, not both.
type RetryPolicy struct {
	// MaxAttempts counts the first call too.
	MaxAttempts int
	// MaxRetryDuration bounds the time from the start of the first attempt to
	// the start of the last; zero is no limit.
	MaxRetryDuration time.Duration
	MinBackoff       time.Duration
	MaxBackoff       time.Duration
	// MaxDoublings is how often the wait doubles before it grows linearly.
	MaxDoublings int
	// RetryClientErrors makes a 4xx answer retryable that is permanent otherwise.
	RetryClientErrors bool
}

// Limits of a retry policy.
const (
	MaxAttemptsLimit      = 100
	MaxRetryDurationLimit = 365 * 24 * time.Hour
	MinBackoffLimit       = 10 * time.Millisecond
	MaxBackoffLimit       = 24 * time.Hour
	MaxDoublingsLimit     = 30
	// MinRetryFor and MaxRetryFor bound for how long retries go on by [RetryChange.For].
	MinRetryFor = time.Second
	MaxRetryFor = 30 * 24 * time.Hour
	// MaxRetryAfter caps what a target's Retry-After may ask for.
	MaxRetryAfter = 24 * time.Hour
	// MaxSnooze caps what a target's Orchestrator-Snooze may ask for, and MaxSnoozes
	// how often it counts in one round of a task.
	MaxSnooze  = 24 * time.Hour
	MaxSnoozes = 100
	// Jitter is the part of a wait by which it varies in either direction.
	Jitter = 0.2
)

// DefaultRetryPolicy is the policy where neither the request nor the settings
// say otherwise. Its last attempt begins more than an hour after the first, whatever
// the jitter: a target that is away for an hour is called again when it is back.
func DefaultRetryPolicy() RetryPolicy {
	return RetryPolicy{
		MaxAttempts:  14,
		MinBackoff:   time.Second,
		MaxBackoff:   time.Hour,
		MaxDoublings: 16,
	}
}

// Backoff returns the wait before retry n (1 for the first retry) without
// jitter: with D = MaxDoublings, min*2^(n-1) for n <= D+1, then
// min*2^D*(n-D), never above MaxBackoff and never below zero.
func (p RetryPolicy) Backoff(n int) time.Duration {
	n = max(n, 1)
	shortest, longest := max(p.MinBackoff, 0), max(p.MaxBackoff, 0)
	// Up to n = D+1 the factor n-D is 1, so that one formula serves both halves.
	doublings := max(min(n-1, p.MaxDoublings), 0)
	factor := time.Duration(n - doublings)
	// Divided instead of multiplied: the product may be beyond a Duration's range.
	if shortest > longest>>doublings/factor {
		return longest
	}
	return shortest << doublings * factor
}

// jittered spreads wait evenly over ±[Jitter]; random is in [0, 1).
func jittered(wait time.Duration, random float64) time.Duration {
	spread := float64(wait) * (1 - Jitter + 2*Jitter*random)
	if spread >= math.MaxInt64 {
		return math.MaxInt64
	}
	return time.Duration(spread)
}

// check reports every rule that p breaks.
func (p RetryPolicy) check(add func(message, kind string, path ...string)) {
	if p.MaxAttempts < 1 || p.MaxAttempts > MaxAttemptsLimit {
		add("must be between 1 and 100", "out_of_range", "retry", "max_attempts")
	}
	if p.MaxRetryDuration < 0 || p.MaxRetryDuration > MaxRetryDurationLimit {
		add("must be between 0 (no limit) and 31536000", "out_of_range", "retry", "max_retry_duration_seconds")
	}
	if p.MinBackoff < MinBackoffLimit || p.MinBackoff > MaxBackoffLimit {
		add("must be between 0.01 and 86400", "out_of_range", "retry", "min_backoff_seconds")
	}
	if p.MaxBackoff < MinBackoffLimit || p.MaxBackoff > MaxBackoffLimit {
		add("must be between 0.01 and 86400", "out_of_range", "retry", "max_backoff_seconds")
	}
	if p.MinBackoff > p.MaxBackoff {
		add("must not be below min_backoff_seconds", "out_of_range", "retry", "max_backoff_seconds")
	}
	if p.MaxDoublings < 0 || p.MaxDoublings > MaxDoublingsLimit {
		add("must be between 0 and 30", "out_of_range", "retry", "max_doublings")
	}
}

// ParseRetryFor reads for how long retries go on, as people write it: whole numbers of
// days, hours, minutes and seconds, such as "6h", "90s" or "1d12h". ok is false for any
// other text. What is longer than [MaxRetryFor] may be read as any longer duration.
func ParseRetryFor(text string) (d time.Duration, ok bool) {
	for text != "" {
		end := strings.IndexAny(text, "dhms")
		if end < 1 {
			return 0, false
		}
		n, err := strconv.ParseUint(text[:end], 10, 32)
		if err != nil {
			return 0, false
		}
		unit := map[byte]time.Duration{'d': 24 * time.Hour, 'h': time.Hour, 'm': time.Minute, 's': time.Second}[text[end]]
		d += time.Duration(min(n, uint64(MaxRetryFor/unit)+1)) * unit //nolint:gosec // the second is small
		d = min(d, MaxRetryFor+time.Second)
		text, ok = text[end+1:], true
	}
	return d, ok
}

// lasting returns p with retries that go on for d: with the most attempts that there can
// be. Unless keepLongest is true, the longest wait is a tenth of d at most, so that little
// of d is left after the last attempt, and a sixtieth at least, so that the attempts last.
func (p RetryPolicy) lasting(d time.Duration, keepLongest bool) RetryPolicy {
	p.MaxAttempts, p.MaxRetryDuration = MaxAttemptsLimit, d
	if !keepLongest {
		p.MaxBackoff = max(min(p.MaxBackoff, d/10), d/60, p.MinBackoff)
	}
	return p
}

// checkLasting reports why p, made by lasting, does not keep what it promises.
func (p RetryPolicy) checkLasting(add func(message, kind string, path ...string)) {
	switch {
	case p.MaxRetryDuration < MinRetryFor || p.MaxRetryDuration > MaxRetryFor:
		add("must be between 1s and 30d", "out_of_range", "retry", "for")
		return
	case p.MinBackoff >= p.MaxRetryDuration:
		add("must be longer than min_backoff_seconds: else there is no retry", "out_of_range", "retry", "for")
		return
	}
	var lasts time.Duration
	for n := range p.MaxAttempts - 1 {
		lasts += time.Duration(float64(p.Backoff(n+1)) * (1 - Jitter))
	}
	if lasts < p.MaxRetryDuration {
		add(fmt.Sprintf("must be at most %ds with these backoffs, since a task is called 100 times at most: raise max_backoff_seconds, or leave it out", int(lasts.Seconds())), "out_of_range", "retry", "for")
	}
}
