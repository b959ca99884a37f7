package dispatch

import (
	"context"
	"time"

	"github.com/melodia/orchestrator/internal/task"
)

// minPause is the first wait after a claim that came to nothing; each further
// one is twice as long, up to the poll interval.
const minPause = 2 * time.Millisecond

// claimDue claims and starts due tasks until ctx ends. It claims no more than it
// has free slots for, or will have in a moment.
func (d *Dispatcher) claimDue(ctx context.Context) {
	var pause, failing time.Duration
	for d.waitForSlots(ctx) && d.waitForDue(ctx, &pause) {
		limit := d.takeSlots()
		if limit == 0 {
			continue // what was submitted meanwhile has them
		}
		d.due.clear()
		s := d.currentSession()
		// Not cut short by the end of ctx: what was claimed must be known.
		claims, err := d.store.Claim(s.writes, s.worker, limit)
		claimed := time.Now()
		for _, c := range claims {
			d.begin(&job{session: s, claim: c, claimed: claimed})
		}
		d.giveBackSlots(limit - len(claims))
		d.backlog.Store(len(claims) == limit)
		switch {
		case err != nil:
			d.log.Error("claiming failed", "error", err)
			// Whoever hands something in meanwhile rings too, and does not shorten it.
			failing = longer(failing, d.options.PollInterval)
			sleep(ctx, jitter(failing))
			continue
		case len(claims) == 0:
			// What looked due is in other workers' hands.
			pause = longer(pause, d.options.PollInterval)
		default:
			pause = 0
			if len(claims) == limit {
				d.notify(0)
			}
		}
		failing = 0
	}
}

func longer(pause, limit time.Duration) time.Duration {
	return min(max(2*pause, minPause), limit)
}

// waitForSlots waits until a slot is free, or some if there is a backlog to
// fill them with, and reports whether ctx is still going on.
func (d *Dispatcher) waitForSlots(ctx context.Context) bool {
	wanted := d.fill()
	enough := 1 // some are free: from then on others are gathered
	var gathered <-chan time.Time
	stuck := time.NewTicker(patience)
	defer stuck.Stop()
	for {
		free := d.freeSlots(enough)
		if free >= wanted {
			return ctx.Err() == nil
		}
		if free > 0 && gathered == nil {
			timer := time.NewTimer(gatherTime)
			defer timer.Stop()
			gathered, enough = timer.C, wanted
			continue
		}
		select {
		case <-ctx.Done():
			return false
		case <-gathered:
			wanted, enough = 1, 1
		case <-stuck.C:
			d.giveBackWaiting()
		case <-d.freed:
		}
	}
}

// fill is how many tasks are worth a claim.
func (d *Dispatcher) fill() int {
	if !d.backlog.Load() {
		return 1
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return max(min(d.room()/4, claimBatch), 1)
}

// freeSlots is how many tasks may be claimed. When there are enough the claim
// loop is told.
func (d *Dispatcher) freeSlots(enough int) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.enough = enough
	return d.free()
}

// tellFree wakes the claim loop if there are enough free slots for it. d.mu is held.
func (d *Dispatcher) tellFree() {
	if d.free() >= d.enough {
		signal(d.freed)
	}
}

// free is freeSlots. What cannot be written down keeps more from being claimed
// in the end. d.mu is held.
func (d *Dispatcher) free() int {
	reserved := d.slots - d.calls - len(d.waiting)
	return max(min(d.room()-d.slots, maxUnsettled*d.options.Concurrency-d.unsettled-reserved, claimBatch), 0)
}

// room is how many slots there are. Where more is due than those hold, it counts
// some twice: as many as calls should end within aheadTime. d.mu is held.
func (d *Dispatcher) room() int {
	room := d.options.Concurrency
	if d.backlog.Load() {
		room += min(d.pace.within(aheadTime, room), room)
	}
	return d.withinCeiling(room)
}

// pace is how fast calls end, measured for paceTime at a time.
type pace struct {
	since     time.Time
	ended     int
	took      time.Duration // the calls that ended, together
	perSecond float64
}

// within is how many calls of so many slots end in such a time if they go on as
// they did.
func (p *pace) within(d time.Duration, slots int) int {
	if elapsed := time.Since(p.since); elapsed >= paceTime {
		p.perSecond = float64(p.ended) / elapsed.Seconds()
		if p.took > 0 {
			// Calls that began together end together. That is no pace for those that
			// follow: Little's law bounds it.
			p.perSecond = min(p.perSecond, float64(slots*p.ended)/p.took.Seconds())
		}
		p.since, p.ended, p.took = time.Now(), 0, 0
	}
	return int(p.perSecond * d.Seconds())
}

// takeSlots takes slots for a claim: all while there is a backlog, otherwise
// half of them, so that what is submitted meanwhile finds some.
func (d *Dispatcher) takeSlots() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := d.free()
	if !d.backlog.Load() {
		n = (n + 1) / 2
	}
	d.slots += n
	return n
}

// giveBackWaiting leaves to others what waits here for slots: it was claimed and
// no attempt was made. It is due anew, behind what is due already.
func (d *Dispatcher) giveBackWaiting() {
	d.mu.Lock()
	waiting := d.waiting
	d.waiting = nil
	d.slots -= len(waiting)
	d.mu.Unlock()
	if len(waiting) == 0 {
		return
	}
	d.log.Info("claimed tasks were given back, no slot became free for them", "count", len(waiting))
	for _, j := range waiting {
		d.write(&result{session: j.session, claim: j.claim, decision: task.Decision{State: task.Pending}, then: func(bool) { d.settled(j.claim) }})
		d.attempts.Done()
	}
}

func (d *Dispatcher) giveBackSlots(n int) {
	d.mu.Lock()
	d.slots -= n
	d.tellFree()
	d.mu.Unlock()
}

// waitForDue waits until a task is due, as far as is known, and reports
// whether ctx is still going on. It learns of tasks from notify, and from the
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
