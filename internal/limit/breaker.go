// Package limit decides how many calls a host may have: a breaker for hosts that are
// broken, holds for hosts that say when to call again, a slow start for hosts that are new, and
// a share for hosts that are slow. It holds no clock: moments are arguments.
package limit

import "time"

const (
	// breakerWindow is for how long a call counts for the breaker, breakerCalls how many calls
	// it takes at least, and brokenPercent how many of 100 have failed when it opens.
	breakerWindow = 30 * time.Second
	breakerCalls  = 10
	brokenPercent = 70
	// burstCalls is how many of the latest calls are judged without the older ones: at 1,000
	// calls a second the window holds 30,000, and a host that breaks would get 21,000 more.
	// At half of the targets broken, 70 of 100 calls fail by chance 4 times in 100,000.
	burstCalls = 100

	openMin = 30 * time.Second
	openMax = 5 * time.Minute
)

const (
	windowBuckets = 10
	bucketTime    = breakerWindow / windowBuckets
)

// Window counts the calls of the last 30 s. Its zero value has none.
type Window struct {
	since   time.Time // when bucket number 0 began
	latest  int64     // number of the latest bucket
	buckets [windowBuckets]struct{ calls, failed uint32 }
}

// Add counts a call that ended at now. It reports whether the host is broken: at least 10
// calls ended in the last 30 s, and at least 70 % of them failed; or of the latest ones,
// where these are 100 or more. Moments must not go back.
func (w *Window) Add(now time.Time, failed bool) (broken bool) {
	w.forget(now)
	b := &w.buckets[w.latest%windowBuckets]
	b.calls++
	if !failed {
		return false
	}
	b.failed++
	var calls, failures uint32
	for i := range int64(windowBuckets) {
		b := &w.buckets[(w.latest+windowBuckets-i)%windowBuckets]
		calls += b.calls
		failures += b.failed
		if calls >= burstCalls && isBroken(calls, failures) {
			return true
		}
	}
	return calls >= breakerCalls && isBroken(calls, failures)
}

// Succeeded reports whether a call of the last 30 s did not fail.
func (w *Window) Succeeded(now time.Time) bool {
	w.forget(now)
	for _, b := range w.buckets {
		if b.calls > b.failed {
			return true
		}
	}
	return false
}

// forget forgets the calls that are too old.
func (w *Window) forget(now time.Time) {
	if w.since.IsZero() {
		w.since = now
	}
	number := int64(now.Sub(w.since) / bucketTime)
	for old := min(number-w.latest, windowBuckets); old > 0; old-- {
		b := &w.buckets[(number-old+1)%windowBuckets]
		b.calls, b.failed = 0, 0
	}
	w.latest = max(number, w.latest)
}

// Reset forgets all calls.
func (w *Window) Reset() { *w = Window{} }

func isBroken(calls, failed uint32) bool { return failed*100 >= calls*brokenPercent }

// OpenFor returns for how long a breaker stays open that opens for the n-th time in a row,
// from 1 on: 30 s, and twice as long each time up to 5 min.
func OpenFor(n int) time.Duration {
	return min(openMin<<min(max(n-1, 0), 10), openMax)
}
