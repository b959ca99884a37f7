package limit

import (
	"testing"
	"time"

	"pgregory.net/rapid"
)

var start = time.Date(2026, 11, 30, 12, 0, 0, 0, time.UTC)

func TestWindow(t *testing.T) {
	t.Parallel()
	// add adds calls, evenly over a time, of which every one that is not a multiple of good fails.
	type calls struct {
		count int
		over  time.Duration
		good  int // every so many-th succeeds; 0: none, 1: all
	}
	for name, test := range map[string]struct {
		calls []calls
		want  bool // broken at any moment
	}{
		"nine failures":                           {[]calls{{9, time.Second, 0}}, false},
		"ten failures":                            {[]calls{{10, time.Second, 0}}, true},
		"ten failures within half a minute":       {[]calls{{10, 29 * time.Second, 0}}, true},
		"ten failures in more than that":          {[]calls{{10, 40 * time.Second, 0}}, false},
		"a failure every three seconds, for ever": {[]calls{{1000, 50 * time.Minute, 0}}, true},
		"one every four seconds":                  {[]calls{{1000, 4000 * time.Second, 0}}, false},
		"half of them fail":                       {[]calls{{1000, time.Minute, 2}}, false},
		"three of four fail":                      {[]calls{{1000, time.Minute, 4}}, true},
		"none fails":                              {[]calls{{100000, time.Minute, 1}}, false},
		"it breaks after a little traffic":        {[]calls{{5, 10 * time.Second, 1}, {11, time.Second, 0}}, false},
		"and goes on failing":                     {[]calls{{5, 10 * time.Second, 1}, {12, time.Second, 0}}, true},
		"old successes do not count":              {[]calls{{20, 10 * time.Second, 1}, {0, 31 * time.Second, 0}, {10, time.Second, 0}}, true},
		"some calls of a busy host fail":          {[]calls{{30000, 30 * time.Second, 1}, {99, 99 * time.Millisecond, 0}}, false},
		"a busy host breaks":                      {[]calls{{30000, 30 * time.Second, 1}, {10100, 10100 * time.Millisecond, 0}}, true},
	} {
		var w Window
		now, broken := start, false
		for _, c := range test.calls {
			if c.count == 0 {
				now = now.Add(c.over)
			}
			for n := 1; n <= c.count; n++ {
				now = now.Add(c.over / time.Duration(c.count))
				broken = w.Add(now, c.good == 0 || n%c.good != 0) || broken
			}
		}
		if broken != test.want {
			t.Errorf("%s: broken %t, want %t", name, broken, test.want)
		}
	}
}

// How long a busy host is called on after it broke.
func TestWindowOfABusyHost(t *testing.T) {
	t.Parallel()
	for perSecond, want := range map[int]time.Duration{10: 21 * time.Second, 100: 8 * time.Second, 1000: 10 * time.Second} {
		var w Window
		now := start
		for range 60 * perSecond {
			now = now.Add(time.Second / time.Duration(perSecond))
			w.Add(now, false)
		}
		broke := now
		for !w.Add(now, true) {
			now = now.Add(time.Second / time.Duration(perSecond))
		}
		if got := now.Sub(broke); got > want {
			t.Errorf("at %d calls a second it takes %v until the breaker opens, want %v at most", perSecond, got, want)
		}
	}
}

// Whatever came before, a window judges as one that counted all calls by itself would,
// but for the 3 s of its oldest bucket.
func TestWindowForgets(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		var w Window
		type call struct {
			at     time.Time
			failed bool
		}
		var all []call
		now := start
		for range rapid.IntRange(1, 200).Draw(t, "calls") {
			now = now.Add(time.Duration(rapid.IntRange(0, 10_000).Draw(t, "ms")) * time.Millisecond)
			all = append(all, call{now, rapid.Bool().Draw(t, "failed")})
			got := w.Add(now, all[len(all)-1].failed)
			possible := false // that the latest calls, of any age from 27 to 30 s, are broken
			calls, failed := uint32(0), uint32(0)
			for i := len(all) - 1; i >= 0 && now.Sub(all[i].at) < breakerWindow; i-- {
				calls++
				if all[i].failed {
					failed++
				}
				if calls >= breakerCalls && isBroken(calls, failed) {
					possible = true
				}
			}
			if got && !possible {
				t.Fatalf("broken after %d calls within 30 s, %d of which failed", calls, failed)
			}
		}
	})
}

func TestWindowSucceeded(t *testing.T) {
	t.Parallel()
	var w Window
	w.Add(start, true)
	if w.Succeeded(start) {
		t.Error("a failure is taken for a success")
	}
	w.Add(start, false)
	if !w.Succeeded(start.Add(26 * time.Second)) {
		t.Error("a success is forgotten within 26 s")
	}
	if w.Succeeded(start.Add(31 * time.Second)) {
		t.Error("a success is remembered after 31 s")
	}
}

func TestOpenFor(t *testing.T) {
	t.Parallel()
	for n, want := range map[int]time.Duration{
		1: 30 * time.Second, 2: time.Minute, 3: 2 * time.Minute, 4: 4 * time.Minute, 5: 5 * time.Minute, 6: 5 * time.Minute, 1 << 30: 5 * time.Minute,
	} {
		if got := OpenFor(n); got != want {
			t.Errorf("the breaker is open for %v the time number %d, want %v", got, n, want)
		}
	}
}

func TestRecovery(t *testing.T) {
	t.Parallel()
	r, grown := AfterBreak(), true
	var allowed []int
	for grown && r.Allowed > 0 {
		allowed = append(allowed, r.Allowed)
		if _, early := r.Grows(r.Allowed - 1); early {
			t.Errorf("%d calls at a time grow before as many succeeded", r.Allowed)
		}
		r, grown = r.Grows(r.Allowed)
	}
	if want := []int{1, 2, 4, 8, 16, 32}; !equal(allowed, want) {
		t.Errorf("after a break %v calls are allowed at a time, want %v, then all", allowed, want)
	}

	r = Recovery{}.AfterHold()
	if r != (Recovery{1, 1}) {
		t.Errorf("after the first hold %+v, want one call at a time", r)
	}
	if r, _ = r.Grows(3); r.Allowed != 1 {
		t.Errorf("3 successes let %d calls start at a time, want 1", r.Allowed)
	}
	if r, _ = r.Grows(4); r != (Recovery{2, 1}) {
		t.Errorf("4 successes make %+v, want 2 calls at a time", r)
	}
	for name, test := range map[string]struct {
		before, want Recovery
	}{
		"while it doubled": {Recovery{16, 64}, Recovery{8, 8}},
		"while it grew":    {Recovery{27, 8}, Recovery{13, 13}},
		"at one":           {Recovery{1, 1}, Recovery{1, 1}},
	} {
		if got := test.before.AfterHold(); got != test.want {
			t.Errorf("%s: %+v after another hold, want %+v", name, got, test.want)
		}
	}
}

func equal(a, b []int) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i] != b[i] {
			return false
		}
	}
	return true
}

func TestRecoveryBreaks(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		allowed, failed, succeeded int
		want                       bool
	}{
		"nothing yet":               {1, 0, 0, false},
		"the probe fails":           {1, 1, 0, true},
		"one of two":                {2, 1, 0, false},
		"both":                      {2, 2, 0, true},
		"two of four":               {4, 2, 0, false},
		"three of four":             {4, 3, 0, true},
		"six of many":               {32, 6, 0, false},
		"seven of many":             {32, 7, 0, true},
		"seven, and four went well": {32, 7, 4, false},
	} {
		if got := (Recovery{Allowed: test.allowed, Doubled: 64}).Breaks(test.failed, test.succeeded); got != test.want {
			t.Errorf("%s: broken %t, want %t", name, got, test.want)
		}
	}
}

// A target that serves n calls a second and refuses the rest with Retry-After: 1 is called
// 1.3 times at most for each call that it serves, from n = 10 on.
func TestCallsOfARateLimitedTarget(t *testing.T) {
	t.Parallel()
	for _, perSecond := range []int{10, 20, 100, 1000, 10000} {
		var s State
		now := start
		served, refused := 0, 20 // of the slow start
		s = s.Held(now, time.Second)
		for range 30 {
			now = s.Blocked()
			left, succeeded := perSecond, 0
			for s.Allowed > 0 && left > 0 { // one call after the other ends, while Allowed are under way
				left--
				served++
				succeeded++
				if next, changed := s.Recovered(succeeded); changed {
					s, succeeded = next, 0
				}
			}
			late := s.Allowed
			if late == 0 {
				late = 200 // it is thought to be healthy, and has all slots
			}
			refused += late
			for range late {
				s = s.Held(now, time.Second)
			}
		}
		ratio := float64(served+refused) / float64(served)
		t.Logf("%d a second: %.3f calls for each that is served", perSecond, ratio)
		if ratio > 1.3 {
			t.Errorf("%d a second: %.3f calls for each that is served, want 1.3 at most", perSecond, ratio)
		}
	}
}

func TestState(t *testing.T) {
	t.Parallel()
	at := func(d time.Duration) time.Time { return start.Add(d) }
	var s State
	if !s.Healthy(start) || s.Blocked().After(start) {
		t.Error("the zero State is not healthy")
	}
	s = s.Held(start, time.Minute)
	if s.Blocked() != at(time.Minute) || s.Allowed != 1 || s.Healthy(at(2*time.Minute)) {
		t.Errorf("held for a minute: %+v", s)
	}
	if got := s.Held(at(time.Second), time.Second); got != s {
		t.Errorf("a shorter hold meanwhile makes %+v, want %+v", got, s)
	}
	if got := (State{}).Held(start, 1000*time.Hour); got.Blocked() != at(24*time.Hour) {
		t.Errorf("held until %v, want 24 h at most", got.Blocked())
	}
	s = s.Broken(at(2 * time.Minute))
	if s.Blocked() != at(150*time.Second) || s.Opened != 1 {
		t.Errorf("broken: %+v, want 30 s", s)
	}
	if got := s.Broken(at(121 * time.Second)); got != s {
		t.Errorf("a breaker that is open opened again: %+v", got)
	}
	s = s.Broken(at(3 * time.Minute))
	if s.Blocked() != at(4*time.Minute) || s.Opened != 2 {
		t.Errorf("the probe failed: %+v, want 1 min", s)
	}
	for s.Allowed > 0 {
		s, _ = s.Recovered(s.Allowed)
	}
	if s != (State{}) || !s.Healthy(start) {
		t.Errorf("after its recovery the host is %+v, want healthy", s)
	}
	congested := State{CongestedUntil: at(time.Second)}
	if congested.Healthy(start) || !congested.Healthy(at(time.Second)) {
		t.Error("a congested host is so until a moment")
	}
}

// Two instances that merge their states agree, lose nothing, and find nothing new the next time.
func TestStatesOfTwoInstances(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		draw := func(name string) (s State) {
			now := start
			for range rapid.IntRange(0, 10).Draw(t, name) {
				now = now.Add(time.Duration(rapid.IntRange(0, 100).Draw(t, "seconds")) * time.Second)
				switch rapid.IntRange(0, 3).Draw(t, "event") {
				case 0:
					s = s.Held(now, time.Duration(rapid.IntRange(1, 100).Draw(t, "hold"))*time.Second)
				case 1:
					s = s.Broken(now)
				case 2:
					s, _ = s.Recovered(rapid.IntRange(0, 100).Draw(t, "successes"))
				case 3:
					s.CongestedUntil = now.Add(time.Second)
				}
				if s.Allowed < 0 || s.Allowed >= recovered || s.Opened > 0 && s.Allowed == 0 {
					t.Fatalf("illegal state %+v", s)
				}
			}
			return s
		}
		a, b := draw("a"), draw("b")
		ab := a.With(b)
		if ab.With(a) != ab || ab.With(b) != ab {
			t.Fatalf("%+v with %+v is %+v, and changes again", a, b, ab)
		}
		if ab.Blocked().Before(a.Blocked()) || ab.Blocked().Before(b.Blocked()) {
			t.Fatalf("%+v with %+v starts calls too early: %+v", a, b, ab)
		}
	})
}

func TestStart(t *testing.T) {
	t.Parallel()
	var s Start
	if s.Allowed() != 10 {
		t.Errorf("%d calls at first, want 10", s.Allowed())
	}
	for range 10 {
		s.Succeeded()
	}
	if s.Allowed() != 20 {
		t.Errorf("%d calls after 10 successes, want 20", s.Allowed())
	}
	for range 4 {
		s.Waited()
	}
	if s.Allowed() != 320 {
		t.Errorf("%d calls after 4 waits, want 320", s.Allowed())
	}
}

func TestPace(t *testing.T) {
	t.Parallel()
	var p Pace
	if !p.Slow(start) {
		t.Error("a host that was never called is fast")
	}
	p.Begin(start)
	p.End(start.Add(time.Millisecond), time.Millisecond)
	if p.Slow(start.Add(time.Hour)) {
		t.Error("a host that answered in 1 ms and has no calls is slow")
	}
	now := start.Add(time.Hour)
	p.Begin(now)
	p.Begin(now.Add(150 * time.Millisecond))
	if p.Slow(now.Add(SlowAfter)) || !p.Slow(now.Add(SlowAfter+1)) {
		t.Error("a host is slow when none of its calls has ended for SlowAfter, and not before")
	}
	p.End(now.Add(time.Second), time.Millisecond)
	p.End(now.Add(time.Second), time.Second)
	if p.Slow(now.Add(time.Second)) {
		t.Error("one call of a second makes a fast host slow")
	}
	for range 5 {
		p.Begin(now)
		p.End(now.Add(time.Second), time.Second)
	}
	if !p.Slow(now.Add(time.Second)) {
		t.Error("a host whose calls take a second is fast")
	}
	ended := 0
	for p.Slow(now.Add(time.Second)) && ended < 1000 {
		p.Begin(now)
		p.End(now, time.Millisecond)
		ended++
	}
	if ended < 10 || ended > 40 {
		t.Errorf("it takes %d fast calls until the host is not slow any more, want 10 to 40", ended)
	}
}

func TestShare(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		slots  int
		others int
		want   int
	}{
		"alone":                 {200, 0, 150},
		"beside another":        {200, 150, 37},
		"beside others":         {200, 187, 9},
		"where nothing is left": {200, 200, 1},
		"more than all is held": {200, 250, 1},
		"one slot":              {1, 0, 1},
		"two slots":             {2, 0, 1},
		"four slots":            {4, 0, 3},
	} {
		if got := Share(test.slots, 0.75, test.others); got != test.want {
			t.Errorf("%s: %d, want %d", name, got, test.want)
		}
	}
}
