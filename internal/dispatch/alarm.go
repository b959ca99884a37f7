package dispatch

import (
	"context"
	"sync"
	"time"
)

// alarm rings at the earliest of the moments it is set to, and goes on ringing
// until it is cleared. One goroutine waits for it; any may set it.
type alarm struct {
	mu      sync.Mutex
	at      time.Time // zero: not set
	changed chan struct{}
}

func newAlarm() *alarm {
	return &alarm{changed: make(chan struct{}, 1)}
}

// set makes the alarm ring at moment, unless it rings before.
func (a *alarm) set(moment time.Time) {
	a.mu.Lock()
	earlier := a.at.IsZero() || moment.Before(a.at)
	if earlier {
		a.at = moment
	}
	a.mu.Unlock()
	if earlier {
		signal(a.changed)
	}
}

func (a *alarm) clear() {
	a.mu.Lock()
	a.at = time.Time{}
	a.mu.Unlock()
}

// remaining is the time until the alarm rings, not positive while it does.
func (a *alarm) remaining() (wait time.Duration, set bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return time.Until(a.at), !a.at.IsZero()
}

func (a *alarm) ringing() bool {
	wait, set := a.remaining()
	return set && wait <= 0
}

// wait returns when the alarm rings, after limit, or when ctx ends.
func (a *alarm) wait(ctx context.Context, limit time.Duration) {
	end := time.NewTimer(limit)
	defer end.Stop()
	for {
		wait, set := a.remaining()
		if !set {
			wait = limit
		} else if wait <= 0 {
			return
		}
		bell := time.NewTimer(wait)
		select {
		case <-a.changed:
			bell.Stop()
			continue
		case <-ctx.Done():
		case <-end.C:
		case <-bell.C:
		}
		bell.Stop()
		return
	}
}

// signal wakes the one who receives from c, which has a buffer of one. Several
// signals before it wakes are one.
func signal(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
