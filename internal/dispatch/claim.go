package dispatch

import (
	"context"
	"time"

	"github.com/melodia/orchestrator/internal/limit"
)

const (
	// minPause is the first wait after a claim that returned no task; each further wait is
	// twice as long, up to the poll interval.
	minPause = 2 * time.Millisecond
	// gatherTime is how long slots may stay free in a backlog, so that one claim fills several.
	gatherTime = 2 * time.Millisecond
	// prefetchTimeout is about how long a prefetched task waits for its slot when calls
	// suddenly take longer. Then other instances may claim it.
	prefetchTimeout = time.Second
	// slotLook is how often it is looked, while no slot is free, whether slow hosts have them.
	slotLook = limit.SlowAfter / 2
)

func longer(pause, limit time.Duration) time.Duration {
	return min(max(2*pause, minPause), limit)
}

// waitForSlots waits until a slot is free for c, or in a backlog until enough are free to be worth
// a claim. It reports whether ctx is still going on.
func (d *Dispatcher) waitForSlots(ctx context.Context, c *claimant) bool {
	defer d.slots.free(c, 0)
	minFetch := d.slots.minFetch(c)
	wanted := 1 // once some are free, more are gathered
	var gathered <-chan time.Time
	look := time.NewTicker(slotLook)
	defer look.Stop()
	for looks := 1; ; {
		free := d.slots.free(c, wanted)
		if free >= minFetch {
			return ctx.Err() == nil
		}
		if free > 0 && gathered == nil {
			timer := time.NewTimer(gatherTime)
			defer timer.Stop()
			gathered, wanted = timer.C, minFetch
			continue
		}
		select {
		case <-ctx.Done():
			return false
		case <-gathered:
			minFetch, wanted = 1, 1
		case <-look.C:
			d.hosts.look()
			for j := d.slots.startWaiting(); j != nil; j = d.slots.startWaiting() {
				d.launch(j)
			}
			if looks++; looks > int(prefetchTimeout/slotLook) {
				d.releaseWaiting()
				looks = 1
			}
		case <-c.freed:
		}
	}
}

// waitForDue waits until a task is due, as far as is known, and reports whether ctx is
// still going on. It learns of tasks from notify, and from the store at the beginning and
// then every PollInterval. After a claim that returned no task, tasks that the store calls
// overdue are left alone for pause, which is reset when the store knows of no overdue task.
func (d *Dispatcher) waitForDue(ctx context.Context, pause *time.Duration) bool {
	for !d.due.ringing() {
		wait, ok, err := d.store.NextDue(ctx)
		switch {
		case ctx.Err() != nil:
			return false
		case err != nil:
			d.log.Error("looking for due tasks failed", "error", err)
		case ok && wait <= 0:
			d.due.set(time.Now().Add(jitter(*pause)))
		default:
			*pause = 0
			if ok {
				d.due.set(time.Now().Add(wait))
			}
		}
		d.due.wait(ctx, jitter(d.options.PollInterval))
	}
	return ctx.Err() == nil
}
