package dispatch

import (
	"log/slog"
	"time"

	"github.com/melodia/orchestrator/internal/task"
)

const (
	// shortageRest is how long a slot rests whose call met a shortage. Each slot tries once a
	// second or so then: work that can be done goes on, and the claim loop is never hot.
	shortageRest = time.Second
	// ceilingHold is how long the ceiling stays where the last shortage put it, and
	// ceilingRise how long it takes to rise by all slots from then on.
	ceilingHold = time.Second
	ceilingRise = 4 * time.Second
	// shortageShown is how long a shortage is told after it was met last. It is longer than a
	// task waits after one, so that one task alone keeps it shown while it lasts.
	shortageShown = 10 * time.Second
)

// shortage is what the instance lacks and what follows for its slots. Dispatcher.mu guards it.
type shortage struct {
	ceiling ceiling
	resting int // slots that rest

	kind   task.Shortage // met last
	met    time.Time     // when
	logged time.Time
	count  int // met and not logged
}

// ceiling bounds the calls under way of an instance that can open no more connections. Below
// what is possible it leaves room for callers and the database. Its zero value bounds nothing.
type ceiling struct {
	calls int       // how many were allowed when it was lowered last
	since time.Time // when that was
}

// lower reacts to a shortage that was met while others calls were under way: three
// quarters of them, and one at least, are what may be.
func (c *ceiling) lower(now time.Time, others, slots int) {
	c.calls = min(max(others*3/4, 1), c.at(now, slots))
	c.since = now
}

// at is how many of so many slots may have calls.
func (c *ceiling) at(now time.Time, slots int) int {
	if c.since.IsZero() {
		return slots
	}
	rising := max(now.Sub(c.since)-ceilingHold, 0)
	if rising >= ceilingRise {
		*c = ceiling{}
		return slots
	}
	return min(c.calls+int(int64(slots)*int64(rising)/int64(ceilingRise)), slots)
}

// Lacks says that the instance lacks something, wherever that was met. It never blocks.
func (d *Dispatcher) Lacks(s task.Shortage) {
	now := time.Now()
	d.mu.Lock()
	d.shortage.kind, d.shortage.met = s, now
	if s.Everywhere() && d.options.Concurrency > 0 {
		d.shortage.ceiling.lower(now, d.calls-1, d.options.Concurrency)
	}
	d.shortage.count++
	count := 0
	if now.Sub(d.shortage.logged) >= time.Second {
		count, d.shortage.count = d.shortage.count, 0
		d.shortage.logged = now
	}
	d.mu.Unlock()
	if count > 0 {
		d.log.Warn("the instance lacks something and claims less", slog.Int("count", count), slog.String("shortage", string(s)))
	}
}

// Shortage is what the instance lacks at the moment, as far as calls have met it; mostly empty.
func (d *Dispatcher) Shortage() task.Shortage {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.shortage.met.IsZero() || time.Since(d.shortage.met) >= shortageShown {
		return ""
	}
	return d.shortage.kind
}

// rest keeps the slot of a call that met a shortage from further calls for a while. d.mu is held.
func (d *Dispatcher) rest() {
	d.shortage.resting++
	time.AfterFunc(jitter(shortageRest), func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.shortage.resting--
		d.slots--
		d.tellFree()
	})
}

// withinCeiling is how many of so many slots there are during a shortage: those below the
// ceiling, and those that rest. d.mu is held.
func (d *Dispatcher) withinCeiling(slots int) int {
	if d.shortage.ceiling.since.IsZero() {
		return slots
	}
	return min(d.shortage.ceiling.at(time.Now(), d.options.Concurrency)+d.shortage.resting, slots)
}
