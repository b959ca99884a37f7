package limit

const (
	// recovered is how many calls at a time show that a host needs no limit any more.
	recovered = 64
	// growthRounds is how many rounds of successes let one more call start at a time, where the
	// number does not double. A target that serves n calls and then refuses is refused about
	// sqrt(n/1.5) calls too many each time (the sum of 4a for a from A/2 to A is 1.5 A²): 2 of
	// 12 for n = 10, 26 of 1,026 for n = 1,000.
	growthRounds = 4
)

// Recovery is how a host gets its calls back after it was broken, or held back by a
// Retry-After: Allowed at a time, of all instances together. It doubles with each round of
// successes while it is below Doubled, and then grows by one with every four rounds.
type Recovery struct{ Allowed, Doubled int }

// AfterBreak is the recovery of a host whose breaker was open: 1, 2, 4, … calls at a time.
func AfterBreak() Recovery { return Recovery{Allowed: 1, Doubled: recovered} }

// AfterHold is the recovery of a host that refused a call with a Retry-After while r held,
// zero where the host was healthy. Half of what was too much is tried next.
func (r Recovery) AfterHold() Recovery {
	half := max(r.Allowed/2, 1)
	return Recovery{Allowed: half, Doubled: half}
}

// Grows returns what follows from so many successes since r began to hold, and whether
// anything does; the zero Recovery is that of a host without a limit.
func (r Recovery) Grows(successes int) (next Recovery, grown bool) {
	switch {
	case r.Allowed < r.Doubled && successes >= r.Allowed:
		r.Allowed = min(2*r.Allowed, r.Doubled)
	case r.Allowed >= r.Doubled && successes >= growthRounds*r.Allowed:
		r.Allowed++
	default:
		return r, false
	}
	if r.Allowed >= recovered {
		return Recovery{}, true
	}
	return r, true
}

// Breaks reports whether a host that is recovering is broken again, after so many failed and
// succeeded calls since r began to hold: the first one, or 70 % of as many as were allowed
// at a time, and of 10 at most.
func (r Recovery) Breaks(failed, succeeded int) bool {
	calls := max(failed+succeeded, min(r.Allowed, breakerCalls))
	return failed > 0 && failed*100 >= calls*brokenPercent
}
