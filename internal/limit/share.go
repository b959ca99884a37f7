package limit

import "time"

const (
	// startCalls is how many calls at a time a host may have that is new to the instance.
	startCalls = 10
	// StartWait is how long a call waits for a slow start before twice as many may be under
	// way: a host that answers slowly gets its slots within half a second.
	StartWait = 100 * time.Millisecond
	// SlowAfter is how long a slot may be kept by a host that is not slow: a task of another
	// host then waits for so long at most, even where one host has all slots.
	SlowAfter = 200 * time.Millisecond
	// meanWeight is 1 in so many: how much the latest call counts in the mean.
	meanWeight = 16
)

// Start is the slow start of a host that is new to the instance: 10 calls at a time, one
// more for each that did not fail, and twice as many after each StartWait for which calls
// had to wait. Of a host that refuses all but a few calls, it is refused 20 and not a slot's
// worth each. The zero Start has not begun.
type Start struct{ more int }

// Allowed is how many calls may be under way at a time.
func (s *Start) Allowed() int { return startCalls + s.more }

// Succeeded notes a call that did not fail.
func (s *Start) Succeeded() { s.more++ }

// Waited notes that calls had to wait for StartWait.
func (s *Start) Waited() { s.more += s.Allowed() }

// Pace is how fast a host frees the slots that it holds. Its zero value is a host of which
// nothing is known.
type Pace struct {
	mean  time.Duration // of what calls took, the latest ones most
	calls int
	since time.Time // when the last call ended, or the first of those under way began
	known bool
	slow  bool // mean was above SlowAfter, and not below half of it since
}

// Begin notes that a call began.
func (p *Pace) Begin(now time.Time) {
	if p.calls == 0 {
		p.since = now
	}
	p.calls++
}

// End notes that a call ended which took d.
func (p *Pace) End(now time.Time, d time.Duration) {
	p.calls--
	p.since = now
	if p.known {
		p.mean += (d - p.mean) / meanWeight
	} else {
		p.known, p.mean = true, d
	}
	switch {
	case p.mean > SlowAfter:
		p.slow = true
	case p.mean < SlowAfter/2:
		p.slow = false
	}
}

// Drop notes that a call which began came to an end that says nothing of the host.
func (p *Pace) Drop(now time.Time) {
	p.calls--
	p.since = now
}

// Slow reports whether the host is slow: its calls took more than SlowAfter in the mean,
// and not less than half of it since; or none has ended for SlowAfter though some are under
// way; or none ever did.
func (p *Pace) Slow(now time.Time) bool {
	return !p.known || p.slow || p.calls > 0 && now.Sub(p.since) > SlowAfter
}

// Unknown reports whether a host is slow only because nothing is known of it: no call has
// ended, and none has been under way for longer than SlowAfter.
func (p *Pace) Unknown(now time.Time) bool {
	return !p.known && (p.calls == 0 || now.Sub(p.since) <= SlowAfter)
}

// Share returns how many of so many slots a slow host may hold while others, which are slow
// too, hold some: share of what those leave, and one at least. So each slow host
// leaves something for the next.
func Share(slots int, share float64, heldByOthers int) int {
	return max(int(float64(slots-heldByOthers)*share), 1)
}
