package dispatch

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/melodia/orchestrator/internal/limit"
	"github.com/melodia/orchestrator/internal/task"
)

const (
	slowURL, fastURL = "https://slow.example/x", "https://fast.example/x"
	slowHost         = "https://slow.example"
)

var (
	away      = task.Outcome{Kind: task.OutcomeRetryable, Error: "connection refused", Duration: time.Millisecond}
	quickly   = task.Outcome{Kind: task.OutcomeSucceeded, StatusCode: 200, Duration: time.Millisecond}
	slowly    = task.Outcome{Kind: task.OutcomeSucceeded, StatusCode: 200, Duration: time.Second}
	overloads = task.Outcome{Kind: task.OutcomeRetryable, StatusCode: 429, RetryAfter: 10 * time.Second, Duration: time.Millisecond}
)

// crowd is hosts under test, with the store that they share with others.
type crowd struct {
	*hosts

	t    *testing.T
	m    *memory
	logs *logs
}

func newCrowd(t *testing.T, m *memory, slots int) *crowd {
	t.Helper()
	c := &crowd{t: t, m: m, logs: new(logs)}
	c.hosts = newHosts(slots, 0.75, slog.New(slog.NewJSONHandler(c.logs, nil)))
	return c
}

// takes takes up to n slots for calls to url, and returns how many it got.
func (c *crowd) takes(url string, n int) (got int) {
	for range n {
		if c.take(url, time.Now()) != nil {
			got++
		}
	}
	return got
}

// calls makes n calls to url, one after the other, whatever is allowed.
func (c *crowd) calls(url string, n int, o task.Outcome) {
	for range n {
		c.endAnyway(c.beginAnyway(url), &o, time.Now())
	}
}

// begins begins n calls to url, for slots that it holds.
func (c *crowd) begins(url string, n int) {
	for range n {
		c.begin(&job{host: c.get(task.HostOf(url))}, time.Now())
	}
}

func (c *crowd) share() {
	c.t.Helper()
	if err := c.exchange(c.t.Context(), c.m); err != nil {
		c.t.Fatal(err)
	}
}

func (c *crowd) wantPermits(url string, free int, othersWait bool, n, running int, again time.Duration) {
	c.t.Helper()
	gotN, gotRunning, gotAgain := c.permits(task.HostOf(url), free, othersWait)
	if gotN != n || gotRunning != running || gotAgain != again {
		c.t.Errorf("permits(%s, %d free, others wait %t) = %d, %d at a time, again in %v; want %d, %d, %v",
			url, free, othersWait, gotN, gotRunning, gotAgain, n, running, again)
	}
}

// A host that is slow leaves slots for others.
func TestSlowHostHasItsShare(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := newCrowd(t, newMemory(), 200)
		c.calls(slowURL, 1, slowly)
		if got := c.takes(slowURL, 200); got != 150 {
			t.Errorf("a slow host got %d of 200 slots, want 150", got)
		}
		if !c.inLane(slowURL) || c.inLane(fastURL) {
			t.Error("its tasks are in no lane, or those of another host are")
		}
		if got := c.lanes(); len(got) != 1 || got[0] != slowHost {
			t.Errorf("hosts with lanes: %v", got)
		}
		// Others wait: it has its share. None waits: it may have the other slots too.
		c.wantPermits(slowURL, 50, true, 0, 0, 0)
		c.wantPermits(slowURL, 50, false, 50, 0, 0)
		for range 50 {
			c.takeAnyway(slowURL)
		}
		// Now it has all of them, and others have as many as it has beyond its share.
		c.look()
		if got := c.spare.Load(); got != 50 {
			t.Errorf("%d more calls may be under way, want 50", got)
		}
		c.wantPermits(slowURL, 50, false, 0, 0, 0)
		if got := c.takes(fastURL, 50); got != 37 { // nothing is known of it either
			t.Errorf("another host got %d of 50 slots, want 37", got)
		}
		c.calls(fastURL, 1, quickly)
		if got := c.takes(fastURL, 13); got != 13 {
			t.Errorf("a host that frees its slots got %d of 13, want all", got)
		}
	})
}

func TestManySlowHostsLeaveSomething(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := newCrowd(t, newMemory(), 200)
		held, c1 := 0, 0
		for n := range 8 {
			url := fmt.Sprintf("https://slow%d.example/", n)
			c.calls(url, 1, slowly)
			held += c.takes(url, 200)
			if n == 3 {
				c1 = held
			}
		}
		if c1 >= 200 || held >= 250 {
			t.Errorf("4 slow hosts hold %d of 200 slots, 8 hold %d; want something left for others, with 50 more then", c1, held)
		}
	})
}

// A backlog of a host that nothing is known of does not go through its lane: it has all slots,
// and leaves those beyond its share to others as soon as it is known to be slow.
func TestNewHostHasAllSlots(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := newCrowd(t, newMemory(), 200)
		for n := range 4 { // of which none ever answers
			url := fmt.Sprintf("https://new%d.example/", n)
			free := 200 + int(c.spare.Load()) - c.total
			got := c.takes(url, free)
			if n == 0 && (got != 200 || c.inLane(url)) {
				t.Errorf("the first new host got %d slots of 200, and is congested: %t; want all, and false", got, c.inLane(url))
			}
			if n > 0 && (got == 0 || got == free) {
				t.Errorf("new host %d got %d of %d slots, want some, and some left for the next", n, got, free)
			}
			c.begins(url, got)
			c.look()
			if spare := c.spare.Load(); n == 0 && spare != 0 {
				t.Errorf("%d more calls may be under way before it is known that a host is slow, want 0", spare)
			}
			time.Sleep(limit.SlowAfter + time.Millisecond)
			c.look()
		}
	})
}

// F10: one fast host alone has all slots; so it does not pay for the protection.
func TestF10FastHostAloneHasAllSlots(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := newCrowd(t, newMemory(), 200)
		c.calls(fastURL, 1, quickly)
		if got := c.takes(fastURL, 400); got != 400 { // prefetched ones too
			t.Errorf("a fast host got %d slots, want all 400 that were free", got)
		}
		if c.inLane(fastURL) || c.spare.Load() != 0 {
			t.Error("a fast host is congested")
		}
	})
}

// A host that was fast and hangs all of a sudden has all slots at that moment.
func TestHostThatStopsToAnswer(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := newCrowd(t, newMemory(), 200)
		c.calls(slowURL, 200, quickly)
		if got := c.takes(slowURL, 200); got != 200 {
			t.Fatalf("a fast host got %d slots of 200", got)
		}
		c.begins(slowURL, 200)
		c.look()
		if got := c.spare.Load(); got != 0 {
			t.Errorf("%d more calls may be under way before it is known to hang, want 0", got)
		}
		time.Sleep(limit.SlowAfter + time.Millisecond)
		c.look()
		if got := c.spare.Load(); got != 50 {
			t.Errorf("%d more calls may be under way, want 50", got)
		}
		if c.take(slowURL, time.Now()) != nil {
			t.Error("a host that hangs got another slot")
		}
		// Tasks of it that were claimed before do not get the calls that are there for others.
		for name, want := range map[string]verdict{slowURL: callNever, fastURL: callNow} {
			one := c.get(task.HostOf(name))
			c.count(one)
			if got := c.begin(&job{host: one, extra: true}, time.Now()); got != want {
				t.Errorf("verdict %d on one more call to %s, want %d", got, name, want)
			}
		}
	})
}

func TestCongestionEnds(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		c, other := newCrowd(t, m, 200), newCrowd(t, m, 200)
		c.calls(slowURL, 1, slowly)
		c.takes(slowURL, 151)
		c.share()
		if got := m.host(slowHost); got.CongestedFor != congestedFor || got.Why == "" {
			t.Errorf("stored is %+v, want a host that is congested for %v", got, congestedFor)
		}
		other.share()
		if !other.inLane(slowURL) {
			t.Error("another instance does not know that the host is congested")
		}
		c.calls(slowURL, 50, quickly)
		if c.inLane(slowURL) {
			t.Error("a host that frees its slots is still congested")
		}
		c.share()
		other.share()
		if got := m.host(slowHost); got.Version != 0 || other.inLane(slowURL) {
			t.Errorf("stored is %+v, want nothing, and all instances to know that", got)
		}

		// Where no instance says so again, it ends by itself.
		c.calls("https://another.example", 1, slowly)
		c.takes("https://another.example", 151)
		c.share()
		time.Sleep(congestedFor + 1)
		c.share()
		if c.inLane("https://another.example") || c.unhealthy.Load() != 0 {
			t.Error("a host is congested for longer than it was said to be")
		}
	})
}

// A host that nothing is known of leaves slots for others, and no instance calls it congested.
func TestUnknownHostIsNotCongested(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := newCrowd(t, newMemory(), 200)
		wantState := func(when string, congested bool) {
			t.Helper()
			if c.inLane(slowURL) != congested {
				t.Errorf("%s: congested %t, want %t", when, !congested, congested)
			}
		}
		c.wantPermits(slowURL, 200, true, 150, 0, 0)
		wantState("it has no slot", false)
		for range 150 {
			c.takeAnyway(slowURL)
		}
		c.begins(slowURL, 10)
		c.wantPermits(slowURL, 50, true, 0, 0, 0)
		wantState("its first calls just began", false)
		time.Sleep(limit.SlowAfter + time.Millisecond)
		c.wantPermits(slowURL, 50, true, 0, 0, 0)
		wantState("none of its calls ends", true)

		c = newCrowd(t, newMemory(), 200)
		c.calls(slowURL, 1, slowly)
		c.wantPermits(slowURL, 200, true, 150, 0, 0)
		wantState("it is slow and has no slot", false)
	})
}

// An instance on which a host is fast does not relieve it where it is congested on another one.
func TestCongestionOfAnotherInstanceStays(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		c, other := newCrowd(t, m, 200), newCrowd(t, m, 200)
		other.calls(slowURL, 1, quickly)
		c.calls(slowURL, 1, slowly)
		c.takes(slowURL, 151)
		c.share()
		other.share()
		saves := m.hosts.saves
		other.wantPermits(slowURL, 50, true, 50, 0, 0)
		other.calls(slowURL, 1, quickly)
		other.share()
		if !other.inLane(slowURL) || m.hosts.saves != saves {
			t.Errorf("congested %t after %d changes, want true after none", other.inLane(slowURL), m.hosts.saves-saves)
		}
		c.calls(slowURL, 50, quickly)
		c.share()
		other.share()
		if c.inLane(slowURL) || other.inLane(slowURL) {
			t.Error("the instance that called the host congested did not relieve it")
		}
	})
}

func TestNewHostStartsSlowly(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := newCrowd(t, newMemory(), 200)
		var launched atomic.Int64
		begin := func(j *job) {
			if c.begin(j, time.Now()) == callNow {
				launched.Add(1)
			}
		}
		c.launch = begin
		started := time.Now()
		for range 100 {
			begin(&job{host: c.take(slowURL, time.Now())})
		}
		if got := launched.Load(); got != 10 {
			t.Errorf("%d calls begin at once, want 10", got)
		}
		// A success is worth one call in its place, and one more.
		for _, j := range c.end(c.get(slowHost), &quickly, time.Now()) {
			begin(j)
		}
		if got := launched.Load(); got != 12 {
			t.Errorf("%d calls began after a success, want 12", got)
		}
		// A failure is worth one in its place.
		for _, j := range c.end(c.get(slowHost), &away, time.Now()) {
			begin(j)
		}
		if got := launched.Load(); got != 13 {
			t.Errorf("%d calls began after a failure, want 13", got)
		}
		for launched.Load() < 100 && time.Since(started) < time.Minute {
			time.Sleep(time.Millisecond)
			synctest.Wait()
		}
		if got := time.Since(started); got < limit.StartWait || got > 500*time.Millisecond {
			t.Errorf("a host that does not answer had all its calls after %v, want within half a second", got)
		}
	})
}

// A refusal while calls wait for the slow start: none of them is made.
func TestQueueGoesBackWhenTheHostIsHeld(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := newCrowd(t, newMemory(), 200)
		var verdicts []verdict
		for range 15 {
			verdicts = append(verdicts, c.begin(&job{host: c.take(slowURL, time.Now())}, time.Now()))
		}
		ready := c.end(c.get(slowHost), &overloads, time.Now())
		if len(ready) != 5 {
			t.Fatalf("%d tasks do not wait any more, want 5; verdicts %v", len(ready), verdicts)
		}
		for _, j := range ready {
			if v := c.begin(j, time.Now()); v != callNever {
				t.Errorf("verdict %d, want that the call is never made", v)
			}
			c.drop(j.host)
		}
		if got := c.get(slowHost); got.held != 9 || got.calls != 9 {
			t.Errorf("the host holds %d slots with %d calls, want 9", got.held, got.calls)
		}
	})
}

func TestRetryAfterHoldsTheHost(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		c, other := newCrowd(t, m, 200), newCrowd(t, m, 200)
		woken := 0
		c.mayStart, other.mayStart = func() { woken++ }, func() { woken++ }
		c.calls(slowURL, 1, overloads)
		if c.take(slowURL, time.Now()) != nil || woken == 0 {
			t.Error("a task of a host that is held back got a slot, or the claim loop was not told")
		}
		c.wantPermits(slowURL, 100, false, 0, 1, 10*time.Second)
		c.share()
		time.Sleep(time.Second)
		other.share()
		other.wantPermits(slowURL, 100, false, 0, 1, 9*time.Second)
		if got := m.host(slowHost); !strings.Contains(got.Why, "429") {
			t.Errorf("stored is why %q, want the answer", got.Why)
		}
		time.Sleep(9 * time.Second)
		for _, c := range []*crowd{c, other} {
			c.wantPermits(slowURL, 100, false, 1, 1, 0)
			if c.take(slowURL, time.Now()) != nil {
				t.Error("a task of a recovering host got a slot beside the lane")
			}
		}
		// It serves 4, and then one more may be called at a time, on all instances.
		other.calls(slowURL, 4, quickly)
		other.share()
		c.share()
		c.wantPermits(slowURL, 100, true, 2, 2, 0)
		// Refused again, one at a time is what is left.
		c.calls(slowURL, 2, overloads)
		c.wantPermits(slowURL, 100, true, 0, 1, 10*time.Second)

		c.m.close(slowHost)
		c.share()
		if c.inLane(slowURL) { // it was not stored before the hand closed it
			time.Sleep(11 * time.Second)
		}
		other.share()
		if other.inLane(slowURL) {
			t.Error("a host that was closed by hand is still held back elsewhere")
		}
	})
}

func TestBreaker(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		outcome task.Outcome
		opens   bool
	}{
		"connect errors":             {away, true},
		"timeouts":                   {task.Outcome{Kind: task.OutcomeRetryable, TimedOut: true, Error: "no answer within 1 s"}, true},
		"timeouts within the answer": {task.Outcome{Kind: task.OutcomeRetryable, StatusCode: 200, TimedOut: true}, true},
		"502":                        {task.Outcome{Kind: task.OutcomeRetryable, StatusCode: 502}, true},
		"503":                        {task.Outcome{Kind: task.OutcomeRetryable, StatusCode: 503}, true},
		"504":                        {task.Outcome{Kind: task.OutcomeRetryable, StatusCode: 504}, true},
		"429":                        {task.Outcome{Kind: task.OutcomeRetryable, StatusCode: 429}, true},
		"500":                        {task.Outcome{Kind: task.OutcomeRetryable, StatusCode: 500}, false},
		"404":                        {task.Outcome{Kind: task.OutcomePermanent, StatusCode: 404}, false},
		"429 with Retry-After":       {task.Outcome{Kind: task.OutcomeRetryable, StatusCode: 429, RetryAfter: time.Nanosecond}, false},
		"503 and a snooze":           {task.Outcome{Kind: task.OutcomeRetryable, StatusCode: 503, Snooze: time.Second}, false},
		"successes":                  {quickly, false},
		"our shutdown":               {task.Outcome{Kind: task.OutcomeInterrupted}, false},
		"our shortage":               {task.Outcome{Kind: task.OutcomeInterrupted, Shortage: task.ShortagePorts}, false},
		"our policy":                 {task.Outcome{Kind: task.OutcomePermanent, Refused: true}, false},
		"our metadata server":        {task.Outcome{Kind: task.OutcomeRetryable, Untried: true, TimedOut: true}, false},
		"tasks that did not start":   {task.Outcome{}, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				c := newCrowd(t, newMemory(), 200)
				c.calls(slowURL, 9, test.outcome)
				if c.get(slowHost).state.Opened != 0 {
					t.Error("the breaker is open after 9 calls")
				}
				c.calls(slowURL, 1, test.outcome)
				if opened := c.get(slowHost).state.Opened != 0; opened != test.opens {
					t.Errorf("open after 10 calls: %t, want %t", opened, test.opens)
				}
			})
		})
	}
}

// A caller with too little patience does not break a host for others.
func TestImpatientCaller(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		for patience, opens := range map[time.Duration]bool{100 * time.Millisecond: false, time.Second: true} {
			c := newCrowd(t, newMemory(), 200)
			c.calls(slowURL, 1, quickly)
			c.calls(slowURL, 50, task.Outcome{Kind: task.OutcomeRetryable, TimedOut: true, Duration: patience})
			if opened := c.get(slowHost).state.Opened > 0; opened != opens {
				t.Errorf("50 timeouts of %v beside a success open the breaker: %t, want %t", patience, opened, opens)
			}
		}
	})
}

func TestBreakerOpensAndCloses(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		c, other := newCrowd(t, m, 200), newCrowd(t, m, 200)
		c.calls(slowURL, 15, away) // 5 were under way
		c.wantPermits(slowURL, 100, false, 0, 1, 30*time.Second)
		c.share()
		other.share()
		time.Sleep(30 * time.Second)
		// One probe, which fails.
		other.wantPermits(slowURL, 100, false, 1, 1, 0)
		other.calls(slowURL, 1, away)
		other.wantPermits(slowURL, 100, false, 0, 1, time.Minute)
		other.share()
		c.share()
		c.wantPermits(slowURL, 100, false, 0, 1, time.Minute)
		time.Sleep(time.Minute)
		for _, allowed := range []int{1, 2, 4, 8, 16, 32} {
			c.wantPermits(slowURL, 100, false, allowed, allowed, 0)
			c.calls(slowURL, allowed, quickly)
		}
		if c.inLane(slowURL) || c.take(slowURL, time.Now()) == nil {
			t.Error("the host is healthy, and its tasks wait")
		}
		c.share()
		other.share()
		if got := m.host(slowHost); got.Version != 0 || other.inLane(slowURL) {
			t.Errorf("stored is %+v, want nothing, and all instances to know that", got)
		}
		for _, message := range []string{"tasks of a host wait", "tasks of a host start again"} {
			lines := c.logs.lines(t, message)
			if len(lines) != 1 || lines[0]["host"] != slowHost {
				t.Errorf("lines %q: %v, want one", message, lines)
			}
		}
	})
}

// What one instance finds out while the store is away is stored afterwards.
func TestHostsWhileTheStoreIsAway(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		c := newCrowd(t, m, 200)
		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan struct{})
		m.breaks(failing("Hosts", "SaveHost"))
		go func() {
			defer close(ended)
			c.follow(ctx, m, time.Second)
		}()
		c.calls(slowURL, 10, away)
		time.Sleep(5 * time.Second)
		if !c.inLane(slowURL) || m.host(slowHost).Version != 0 {
			t.Error("the state is lost, or stored all the same")
		}
		m.breaks(nil)
		time.Sleep(2 * time.Second)
		if got := m.host(slowHost); got.Opened != 1 || got.OpenFor < 22*time.Second || got.OpenFor > 24*time.Second {
			t.Errorf("stored is %+v, want what is left of 30 s", got)
		}
		saves := m.hosts.saves
		time.Sleep(10 * time.Second)
		if m.hosts.saves != saves {
			t.Error("a state that does not change is stored again")
		}
		stop()
		<-ended
	})
}

// No host is forgotten because another one could not be stored.
func TestHostsOfWhichSomeCannotBeStored(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		c := newCrowd(t, m, 200)
		for n := range 5 {
			c.calls(fmt.Sprintf("https://h%d.example/", n), 1, overloads)
		}
		wantHeld := func(stored int) {
			t.Helper()
			if got := c.lanes(); len(got) != 5 || len(m.hosts.byName) != stored {
				t.Errorf("hosts with lanes: %v, %d stored; want all 5, and %d stored", got, len(m.hosts.byName), stored)
			}
		}
		failures := 0
		m.breaks(func(_ context.Context, op string, f func()) error {
			if op == "SaveHost" && failures == 0 {
				failures++
				return task.ErrUnavailable
			}
			f()
			return nil
		})
		if err := c.exchange(t.Context(), m); !errors.Is(err, task.ErrUnavailable) {
			t.Errorf("error %v, want that the store is unavailable", err)
		}
		wantHeld(4)
		c.share()
		wantHeld(5)
		c.share()
		wantHeld(5)
	})
}

// Two instances that find out at the same moment agree.
func TestHostsOfTwoInstancesAtOnce(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		c, other := newCrowd(t, m, 200), newCrowd(t, m, 200)
		c.calls(slowURL, 10, away)
		longer := overloads
		longer.RetryAfter = time.Hour
		other.calls(slowURL, 1, longer)
		for range 2 {
			c.share()
			other.share()
		}
		c.share()
		for name, c := range map[string]*crowd{"one": c, "other": other} {
			if n, _, again := c.permits(slowHost, 100, false); n != 0 || again != time.Hour {
				t.Errorf("instance %s: again in %v, want an hour", name, again)
			}
		}
		if got := m.host(slowHost); got.Opened != 1 || got.HeldFor != time.Hour {
			t.Errorf("stored is %+v, want both", got)
		}
	})
}

// A host that was closed by hand and breaks again is not taken for the one that was closed.
func TestClosedByHand(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		c, other := newCrowd(t, m, 200), newCrowd(t, m, 200)
		c.calls(slowURL, 10, away)
		c.share()
		other.share()
		m.close(slowHost)
		c.share()
		if c.inLane(slowURL) {
			t.Error("the host was closed by hand, and its tasks wait")
		}
		c.calls(slowURL, 9, away)
		if c.inLane(slowURL) {
			t.Error("calls from before count")
		}
		c.calls(slowURL, 1, overloads)
		c.share()
		other.share()
		if got := other.get(slowHost).state; got.Opened != 0 || got.HeldUntil.IsZero() {
			t.Errorf("another instance believes %+v, want it held, and not broken any more", got)
		}
	})
}

// Calls to this service itself may wait for other tasks: they never have the slots that
// those need, whether others are due at the moment or not.
func TestCallsToOurselves(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := newCrowd(t, newMemory(), 200)
		c.calls(slowURL, 10, quickly)
		c.isOurs(slowURL)
		if got := c.takes(slowURL, 200); got != 50 {
			t.Errorf("calls to ourselves got %d of 200 slots, want 50", got)
		}
		c.wantPermits(slowURL, 150, false, 0, 0, 0)
		c.drop(c.get(slowHost))
		c.wantPermits(slowURL, 151, false, 1, 0, 0)
		if got := c.takes(fastURL, 150); got != 150 {
			t.Errorf("others got %d slots, want 150", got)
		}

		// The only slot that there is: the task for which it waits gets one more.
		c = newCrowd(t, newMemory(), 1)
		c.isOurs(slowURL)
		c.takes(slowURL, 1)
		c.look()
		if got := c.spare.Load(); got != 1 {
			t.Errorf("%d more calls may be under way, want 1", got)
		}
	})
}

func TestHostsAreForgotten(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := newCrowd(t, newMemory(), 200)
		busy := c.take(slowURL, time.Now())
		c.calls("https://broken.example", 10, away)
		for n := range 3 * maxIdleHosts {
			c.calls(fmt.Sprintf("https://h%d.example/", n), 1, quickly)
		}
		if got := len(c.byName); got > 2*maxIdleHosts {
			t.Errorf("%d hosts are remembered", got)
		}
		if c.byName[slowHost] != busy || !c.inLane("https://broken.example") {
			t.Error("a host was forgotten that has a call, or is broken")
		}
	})
}

// BenchmarkHosts is what the protection of hosts costs a plain task of a healthy host.
func BenchmarkHosts(b *testing.B) {
	h := newHosts(200, 0.75, slog.New(slog.DiscardHandler))
	j := new(job)
	b.ReportAllocs()
	for b.Loop() {
		now := time.Now()
		j.host = h.take("https://plays.melodia.app/plays/register?id=1", now)
		h.begin(j, now)
		h.end(j.host, &quickly, now)
	}
}
