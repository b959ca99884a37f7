package limit

import "time"

// maxHold is the longest that a Retry-After holds a host back.
const maxHold = 24 * time.Hour

// State is what is known about a host that is not healthy. Its zero value is a healthy host.
type State struct {
	// HeldUntil is until when a Retry-After holds all calls back, OpenUntil until when the
	// breaker does, and CongestedUntil until when the host counts as congested.
	HeldUntil, OpenUntil, CongestedUntil time.Time
	// Opened is how many times the breaker opened without a recovery in between.
	Opened int
	// Recovery is what holds once no call is held back any more; zero: no limit.
	Recovery
}

// Blocked returns until when no call may start; a moment that has passed says that some may.
func (s *State) Blocked() (until time.Time) {
	if s.HeldUntil.After(s.OpenUntil) {
		return s.HeldUntil
	}
	return s.OpenUntil
}

// Healthy reports whether nothing keeps the host's tasks waiting at now.
func (s *State) Healthy(now time.Time) bool {
	return s.Allowed == 0 && !s.Blocked().After(now) && !s.CongestedUntil.After(now)
}

// Held is s after a call that ended at now and was refused with a Retry-After. What was
// under way when the host asked first does not make it more careful.
func (s State) Held(now time.Time, retryAfter time.Duration) State {
	until := now.Add(min(retryAfter, maxHold))
	if !s.Blocked().After(now) {
		s.Recovery = s.AfterHold()
	}
	if until.After(s.HeldUntil) {
		s.HeldUntil = until
	}
	return s
}

// Broken is s after its breaker opened at now.
func (s State) Broken(now time.Time) State {
	if s.OpenUntil.After(now) {
		return s
	}
	s.Opened++
	s.OpenUntil = now.Add(OpenFor(s.Opened))
	s.Recovery = AfterBreak()
	return s
}

// Recovered is s after so many successes since its Recovery began to hold. changed reports
// whether anything followed.
func (s State) Recovered(successes int) (next State, changed bool) {
	if s.Allowed == 0 {
		return s, false
	}
	s.Recovery, changed = s.Grows(successes)
	if s.Allowed == 0 {
		s.Opened, s.OpenUntil, s.HeldUntil = 0, time.Time{}, time.Time{}
	}
	return s, changed
}

// With is what two instances know together that changed the same state: the more careful
// of both in all.
func (s State) With(other State) State {
	later := func(a, b time.Time) time.Time {
		if a.After(b) {
			return a
		}
		return b
	}
	s.HeldUntil = later(s.HeldUntil, other.HeldUntil)
	s.OpenUntil = later(s.OpenUntil, other.OpenUntil)
	s.CongestedUntil = later(s.CongestedUntil, other.CongestedUntil)
	s.Opened = max(s.Opened, other.Opened)
	if s.Allowed == 0 || other.Allowed > 0 && other.Allowed < s.Allowed {
		s.Recovery = other.Recovery
	}
	return s
}
