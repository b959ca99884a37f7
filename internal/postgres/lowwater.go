package postgres

import (
	"sync"
	"time"
)

// lookBack is how often a look for due tasks begins at the very first one. The
// rare task that only this finds waits so long at most.
const lookBack = 5 * time.Second

// lowWater is the run_at below which no task is left to claim, so that looks
// for due tasks can begin there. While a transaction is held open, the
// index entries of all tasks that were claimed since stay; a look from the
// beginning visits each of them, which takes half a second for a million.
//
// A write gives a task no run_at before its own now(), and one that was
// acknowledged was committed within callTimeout of that. So the mark stays
// callTimeout behind what was seen. What can come to lie below it all the same
// (a write whose request had given up, a claim that was rolled back late, all
// tasks when the database's clock is set back) is found by the next look from
// the beginning.
type lowWater struct {
	back <-chan time.Time // when to look from the beginning

	mu   sync.Mutex
	mark time.Time // by the database's clock
}

func newLowWater() *lowWater { return &lowWater{back: time.Tick(lookBack)} }

// from returns where the next look begins.
func (w *lowWater) from() time.Time {
	select {
	case <-w.back:
		return time.Time{}
	default:
		return w.current()
	}
}

// current is the mark, for what reads due tasks and does not tell saw: the look from the
// beginning is for those that do.
func (w *lowWater) current() time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.mark
}

// saw notes that a look which began at from left nothing that is due before seen.
func (w *lowWater) saw(from, seen time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	// A look that began above the mark does not know what lies between them.
	if !from.After(w.mark) {
		w.mark = seen.Add(-callTimeout)
	}
}
