package logging

import (
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

func TestLimiter(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var l Limiter
		for _, step := range []struct {
			wait time.Duration
			want int
		}{{0, 1}, {0, 0}, {limitPeriod - 1, 0}, {1, 3}, {0, 0}, {time.Hour, 2}, {limitPeriod, 1}} {
			time.Sleep(step.wait)
			if got := l.Count(); got != step.want {
				t.Errorf("%v later: got %d, want %d", step.wait, got, step.want)
			}
		}
	})
}

// No event is lost or counted twice.
func TestLimiterOfManyGoroutines(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const goroutines, events = 8, 1000
		var l Limiter
		var logged atomic.Int64
		var group sync.WaitGroup
		for range goroutines {
			group.Go(func() {
				for range events {
					logged.Add(int64(l.Count()))
				}
			})
		}
		group.Wait()
		if got := logged.Load(); got != 1 { // the clock stands still
			t.Errorf("at one moment %d events were logged, want the first one", got)
		}
		time.Sleep(limitPeriod)
		if got := l.Count(); got != goroutines*events {
			t.Errorf("a second later %d events are logged, want %d", got, goroutines*events)
		}
	})
}
