package dispatch

import (
	"context"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/melodia/orchestrator/internal/task"
)

func short(kind task.Shortage) task.Outcome {
	return task.Outcome{Kind: task.OutcomeInterrupted, Shortage: kind, Error: string(kind)}
}

func TestCeiling(t *testing.T) {
	t.Parallel()
	const slots = 200
	now := time.Unix(1_000_000, 0)
	var c ceiling
	after := func(d time.Duration, want int) {
		t.Helper()
		if now = now.Add(d); c.at(now, slots) != want {
			t.Errorf("the ceiling is %d, want %d", c.at(now, slots), want)
		}
	}
	after(0, 200) // before any shortage
	c.lower(now, 120, slots)
	after(0, 90)
	c.lower(now, 100, slots) // met by a call that began with the other
	after(0, 75)
	c.lower(now, 120, slots) // never raises it
	after(ceilingHold, 75)
	after(ceilingRise/4, 125)
	c.lower(now, 99, slots)
	after(ceilingHold+ceilingRise/2, 174)
	after(ceilingRise/2-1, 200)
	after(1, 200)
	c.lower(now, 0, slots) // none was under way beside it
	after(ceilingHold, 1)
	after(ceilingRise, 200)
	if c != (ceiling{}) {
		t.Errorf("after its time it is %+v, want the zero value", c)
	}
}

func TestCeilingProperties(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		slots := rapid.IntRange(1, 10_000).Draw(t, "slots")
		now := time.Unix(1_000_000, 0)
		var c ceiling
		for range rapid.IntRange(1, 20).Draw(t, "steps") {
			now = now.Add(time.Duration(rapid.Int64Range(0, int64(2*ceilingRise)).Draw(t, "pause")))
			before := c.at(now, slots)
			others := rapid.IntRange(-1, slots-1).Draw(t, "others")
			c.lower(now, others, slots)
			got := c.at(now, slots)
			if got < 1 || got > before || got > max(others, 1) {
				t.Fatalf("lowered to %d from %d with %d others, want 1 to %d", got, before, others, min(before, max(others, 1)))
			}
			if end := c.at(now.Add(ceilingHold+ceilingRise), slots); end != slots {
				t.Fatalf("it rises to %d, want %d", end, slots)
			}
			c.lower(now, others, slots) // at has taken it away
		}
	})
}

// TestTotalShortage has an instance that can make no call for a while, with ten times as
// many tasks due as it has slots.
func TestTotalShortage(t *testing.T) {
	t.Parallel()
	for _, kind := range []task.Shortage{task.ShortageDescriptors, task.ShortageMemory, task.ShortagePorts, task.ShortageResolver} {
		synctest.Test(t, func(t *testing.T) {
			const lasts = 30 * time.Second
			m := newMemory()
			for n := range 100 {
				m.store(n, 0)
			}
			var over atomic.Bool
			r := start(t, options(), m, func(ctx context.Context, c task.Call) task.Outcome {
				if !over.Load() {
					return short(kind)
				}
				return takes(10*time.Millisecond, succeeded)(ctx, c)
			})
			time.Sleep(lasts)
			synctest.Wait()
			// Each slot about once a second, and before that the prefetched tasks.
			if got, most := len(r.delivered()), 10*(30*5/4+3); got > most {
				t.Errorf("%q: %d calls were tried in 30 s, want %d at most", kind, got, most)
			}
			if got := r.Shortage(); got != kind {
				t.Errorf("Shortage() = %q, want %q", got, kind)
			}
			if got := len(r.log.lines(t, "the instance lacks something and claims less")); got < 2 || got > 31 {
				t.Errorf("%q: %d lines in 30 s, want one a second at most", kind, got)
			}
			over.Store(true)
			time.Sleep(15 * time.Second)
			synctest.Wait()
			for n := range 100 {
				r.wantState(taskID(n), task.Succeeded, "", 1)
			}
			if got := r.Shortage(); got != "" {
				t.Errorf("15 s after its end Shortage() = %q", got)
			}
		})
	}
}

// TestScarceDescriptors has descriptors for 6 calls, and slots for 10.
func TestScarceDescriptors(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		for n := range 200 {
			m.store(n, 0)
		}
		var open, refused atomic.Int32
		r := start(t, options(), m, func(ctx context.Context, c task.Call) task.Outcome {
			defer open.Add(-1)
			if open.Add(1) > 6 {
				refused.Add(1)
				return short(task.ShortageDescriptors)
			}
			return takes(500*time.Millisecond, succeeded)(ctx, c)
		})
		time.Sleep(30 * time.Second)
		synctest.Wait()
		// At 4 to 6 a time: 240 to 360 calls would have been possible.
		for n := range 200 {
			r.wantState(taskID(n), task.Succeeded, "", 1)
		}
		if got := refused.Load(); got > 60 {
			t.Errorf("%d calls met the shortage in 30 s, want 60 at most", got)
		}
		time.Sleep(shortageShown)
	})
}

// TestShortageForSomeTargets has many tasks, due first, whose target cannot be reached for
// lack of ports, and others behind them.
func TestShortageForSomeTargets(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		for n := range 60 {
			m.store(n, 0)
		}
		for n := range 40 {
			m.store(100+n, time.Millisecond)
		}
		r := start(t, options(), m, func(ctx context.Context, c task.Call) task.Outcome {
			if c.Task.ID[15] < 100 {
				return short(task.ShortagePorts)
			}
			return takes(100*time.Millisecond, succeeded)(ctx, c)
		})
		time.Sleep(20 * time.Second)
		synctest.Wait()
		for n := range 40 {
			r.wantState(taskID(100+n), task.Succeeded, "", 1)
		}
		for n := range 60 {
			r.wantState(taskID(n), task.Pending, "", 0)
		}
	})
}

func TestShortageOfADirectCall(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		later := m.store(1, time.Hour)
		r := start(t, options(), m, func(context.Context, task.Call) task.Outcome { return short(task.ShortageResolver) })
		synctest.Wait()
		o, d, err := r.Execute(t.Context(), later)
		if err != nil || o.Shortage != task.ShortageResolver || d.State != task.Pending || d.Counted {
			t.Errorf("Execute: %+v, %+v, %v, want it pending again and not counted", o, d, err)
		}
		if got := r.Shortage(); got != task.ShortageResolver {
			t.Errorf("Shortage() = %q", got)
		}
	})
}
