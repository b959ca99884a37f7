package dispatch

import (
	"log/slog"
	"sync"
	"time"

	"github.com/melodia/orchestrator/internal/logging"
	"github.com/melodia/orchestrator/internal/task"
)

const (
	// shortageRest is how long a slot rests whose call met a shortage. Each slot then tries
	// about once a second: calls that are possible go on, and the claim loop is never hot.
	shortageRest = time.Second
	// ceilingHold is how long the ceiling stays where the last shortage put it, and
	// ceilingRise how long it takes to rise by all slots from then on.
	ceilingHold = time.Second
	ceilingRise = 4 * time.Second
	// shortageShown is how long a shortage is told after it was met last. It is longer than a
	// task waits after one, so that one task alone keeps it shown while it lasts.
	shortageShown = 10 * time.Second
)

// shortages is what the instance lacks.
type shortages struct {
	mu   sync.Mutex
	kind task.Shortage // met last
	met  time.Time     // when

	lines logging.Limiter
}

// ceiling bounds the calls under way of an instance that can open no more connections. Below
// what is possible it leaves descriptors for requests and the database. Its zero value bounds nothing.
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

// note notes that a shortage was met. It returns how many are to be logged now.
func (s *shortages) note(kind task.Shortage) (count int) {
	s.mu.Lock()
	s.kind, s.met = kind, time.Now()
	s.mu.Unlock()
	return s.lines.Count()
}

// current returns the kind that was met last, for shortageShown.
func (s *shortages) current() task.Shortage {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.met.IsZero() || time.Since(s.met) >= shortageShown {
		return ""
	}
	return s.kind
}

// Lacks says that the instance lacks something, wherever that was met. It never blocks.
func (d *Dispatcher) Lacks(s task.Shortage) {
	if s.Everywhere() {
		d.slots.lower()
	}
	if count := d.shortages.note(s); count > 0 {
		d.log.Warn("the instance lacks something and claims less", slog.Int("count", count), slog.String("shortage", string(s)))
	}
}

// Shortage is what the instance lacks at the moment, as far as calls have met it; mostly empty.
func (d *Dispatcher) Shortage() task.Shortage { return d.shortages.current() }
