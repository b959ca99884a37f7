package postgres

import (
	"cmp"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// world is a table of tasks, whose writes may take their time to commit.
type world struct {
	t      *testing.T
	random *rand.Rand

	mu      sync.Mutex
	setBack time.Duration // how far the database's clock was
	rows    []*row        // that are pending
}

type row struct {
	runAt       time.Time // by the database's clock
	committed   time.Time // by the real one, as all that follows
	promised    bool      // its client was told that it is stored
	lockedUntil time.Time // by a claim that is rolled back then
}

func (w *world) now() time.Time { return time.Now().Add(-w.setBack) }

// write stores a task that is due in wait, by a statement that takes so long.
func (w *world) write(wait, took time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.rows = append(w.rows, &row{runAt: w.now().Add(wait), committed: time.Now().Add(took), promised: took < callTimeout})
}

// pending returns what a statement that begins now sees, in the order of run_at.
func (w *world) pending() (rows []*row) {
	for _, r := range w.rows {
		if !r.committed.After(time.Now()) {
			rows = append(rows, r)
		}
	}
	slices.SortFunc(rows, func(a, b *row) int { return cmp.Or(a.runAt.Compare(b.runAt), a.committed.Compare(b.committed)) })
	return rows
}

// claim is what Store.Claim does.
func (w *world) claim(l *lowWater, limit int, answer, rollback time.Duration) {
	from := l.from()
	w.mu.Lock()
	var taken, free []*row
	for _, r := range w.pending() {
		if r.runAt.After(w.now()) || r.lockedUntil.After(time.Now()) {
			continue
		}
		free = append(free, r)
		if len(taken) < limit && !r.runAt.Before(from) {
			taken = append(taken, r)
		}
	}
	if w.setBack == 0 {
		for i, r := range free[:min(limit, len(free))] {
			if r.promised && r.lockedUntil.IsZero() && !slices.Contains(taken, r) {
				w.t.Errorf("a claim passes over a task that was acknowledged: number %d by run_at, %v overdue", i, w.now().Sub(r.runAt))
				r.promised = false // once is enough
			}
		}
	}
	for _, r := range taken {
		r.lockedUntil = time.Now().Add(rollback)
	}
	if rollback == 0 {
		w.rows = slices.DeleteFunc(w.rows, func(r *row) bool { return slices.Contains(taken, r) })
	}
	w.mu.Unlock()
	time.Sleep(answer)
	if len(taken) > 0 && rollback == 0 {
		l.saw(from, taken[len(taken)-1].runAt)
	}
}

// nextDue is what Store.NextDue does.
func (w *world) nextDue(l *lowWater, answer time.Duration) {
	from := l.from()
	w.mu.Lock()
	seen := w.now()
	for _, r := range w.pending() {
		if !r.runAt.Before(from) && r.runAt.Before(seen) {
			seen = r.runAt
		}
	}
	w.mu.Unlock()
	time.Sleep(answer)
	l.saw(from, seen)
}

// upTo returns a random time.
func (w *world) upTo(limit time.Duration) time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	return time.Duration(w.random.Int64N(int64(limit)))
}

func (w *world) oneIn(n int64) bool { return w.upTo(time.Duration(n)) == 0 }

// However writes and looks fall, the mark hides nothing that was acknowledged,
// and what it may hide (writes that commit late, claims that are rolled back,
// everything when the clock is set back) for no longer than until looks have
// begun at the beginning again.
func TestLowWaterHidesNothing(t *testing.T) {
	t.Parallel()
	for name, setBack := range map[string]time.Duration{
		"a clock that goes on":     0,
		"a clock that is set back": 20 * time.Second,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for seed := range uint64(20) {
				synctest.Test(t, func(t *testing.T) { playWorld(t, seed, setBack) })
			}
		})
	}
}

func playWorld(t *testing.T, seed uint64, setBack time.Duration) {
	const busy, longest = time.Minute, 20 * time.Second
	w := &world{t: t, random: rand.New(rand.NewPCG(seed, 1))} //nolint:gosec // not a secret
	l := newLowWater()
	began := time.Now()
	var writing, looking sync.WaitGroup
	for range 3 {
		writing.Go(func() {
			for time.Since(began) < busy {
				switch {
				case w.oneIn(50): // a statement that hangs
					took := w.upTo(longest)
					for range 50 {
						w.write(0, took)
					}
				case w.oneIn(5):
					w.write(w.upTo(longest), w.upTo(callTimeout))
				default:
					w.write(0, w.upTo(callTimeout))
				}
				time.Sleep(w.upTo(300 * time.Millisecond))
			}
		})
	}
	writing.Go(func() {
		time.Sleep(w.upTo(busy))
		w.mu.Lock()
		w.setBack = setBack
		w.mu.Unlock()
	})
	done := make(chan struct{})
	for range 3 {
		looking.Go(func() {
			for {
				select {
				case <-done:
					return
				case <-time.After(w.upTo(200 * time.Millisecond)):
				}
				switch answer := w.upTo(50 * time.Millisecond); {
				case w.oneIn(2):
					w.nextDue(l, answer)
				case w.oneIn(30) && time.Since(began) < busy:
					w.claim(l, 10, answer, w.upTo(longest))
				default:
					w.claim(l, 10, answer, 0)
				}
			}
		})
	}
	writing.Wait()
	// Last comes more at once than one look back can find.
	for range 300 {
		w.write(0, longest)
	}
	// Until all is committed or rolled back and due; then a look back, and the
	// claims that take what it showed.
	time.Sleep(longest + setBack)
	time.Sleep(2*lookBack + 5*time.Second)
	close(done)
	looking.Wait()
	if len(w.rows) > 0 {
		t.Errorf("seed %d: %d tasks are not found", seed, len(w.rows))
	}
}

// A look that began before others found something below the mark does not know of it.
func TestLowWaterIsNotRaisedFromAbove(t *testing.T) {
	t.Parallel()
	l := newLowWater()
	old := time.Now()
	l.saw(time.Time{}, old.Add(time.Hour))
	from := l.from()
	l.saw(time.Time{}, old)
	l.saw(from, old.Add(2*time.Hour))
	if got := l.from(); got.After(old) {
		t.Errorf("looks begin %v after what was left", got.Sub(old))
	}
}
