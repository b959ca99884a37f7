package dispatch

import (
	"context"
	"time"
)

// minPause is the first wait after a claim that came to nothing; each further
// one is twice as long, up to the poll interval.
const minPause = 2 * time.Millisecond

// claimDue claims and starts due tasks until ctx ends. It never claims more
// than it has free slots for.
func (d *Dispatcher) claimDue(ctx context.Context) {
	pause := time.Duration(0)
	for d.waitForSlot(ctx) && d.waitForDue(ctx, &pause) {
		limit := d.freeSlots()
		d.due.clear()
		s := d.currentSession()
		// Not cut short by the end of ctx: what was claimed must be known.
		claims, err := d.store.Claim(s.writes, s.worker, limit)
		for _, c := range claims {
			d.begin(s, c)
		}
		switch {
		case err != nil:
			d.log.Error("claiming failed", "error", err)
			pause = longer(pause, d.options.PollInterval)
			sleep(ctx, jitter(pause))
		case len(claims) == 0:
			// What looked due is in other workers' hands.
			pause = longer(pause, d.options.PollInterval)
		default:
			pause = 0
			if len(claims) == limit {
				d.Notify(0) // there may be more
			}
		}
	}
}

func longer(pause, limit time.Duration) time.Duration {
	return min(max(2*pause, minPause), limit)
}

// waitForSlot waits until a slot is free and reports whether ctx is still going on.
func (d *Dispatcher) waitForSlot(ctx context.Context) bool {
	for d.freeSlots() == 0 {
		select {
		case <-ctx.Done():
			return false
		case <-d.freed:
		}
	}
	return ctx.Err() == nil
}

func (d *Dispatcher) freeSlots() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return min(d.options.Concurrency-d.slots, claimBatch)
}

// waitForDue waits until a task is due, as far as is known, and reports
// whether ctx is still going on. It learns of tasks from Notify, and from the
// store at the beginning and then every PollInterval. What the store calls
// overdue is left alone for pause, which ends when the store knows of nothing
// overdue.
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
