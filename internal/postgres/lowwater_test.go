package postgres

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

// world plays a table of tasks, whose writes take their time to commit, and
// those who look for due ones.
type world struct {
	t      *testing.T
	random *rand.Rand
	marks  *lowWater
	back   chan time.Time

	now, lookedBack time.Time
	setBack         time.Duration // how far the database's clock was
	pending         []*row
	unanswered      []*look
}

type row struct {
	runAt       time.Time // by the database's clock
	committed   time.Time // as what follows, by the one that is never set
	lockedUntil time.Time // by a claim that is rolled back then
	promised    bool      // its client was told that it is stored
}

// look is one whose answer is under way.
type look struct {
	from, seen time.Time
	until      time.Time
}

func newWorld(t *testing.T, seed uint64) *world {
	w := &world{t: t, random: rand.New(rand.NewPCG(seed, 1)), back: make(chan time.Time, 1)} //nolint:gosec // not a secret
	w.marks = &lowWater{back: w.back}
	w.now = time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)
	return w
}

func (w *world) clock() time.Time { return w.now.Add(-w.setBack) }

func (w *world) upTo(limit time.Duration) time.Duration {
	return time.Duration(w.random.Int64N(int64(limit)))
}

// write stores n tasks that are due in wait, by a statement that takes so long.
func (w *world) write(n int, wait, took time.Duration) {
	for range n {
		w.pending = append(w.pending, &row{runAt: w.clock().Add(wait), committed: w.now.Add(took), promised: took < callTimeout})
	}
}

// due returns what a statement that begins now may see, in the order of run_at.
func (w *world) due() (rows []*row) {
	for _, r := range w.pending {
		if !r.committed.After(w.now) && !r.runAt.After(w.clock()) {
			rows = append(rows, r)
		}
	}
	slices.SortStableFunc(rows, func(a, b *row) int { return a.runAt.Compare(b.runAt) })
	return rows
}

// claim does what Store.Claim does, or is rolled back after a while.
func (w *world) claim(limit int, rollback time.Duration) {
	from := w.marks.from()
	var free, taken []*row
	for _, r := range w.due() {
		if r.lockedUntil.After(w.now) {
			continue
		}
		free = append(free, r)
		if len(taken) < limit && !r.runAt.Before(from) {
			taken = append(taken, r)
		}
	}
	if w.setBack == 0 {
		for _, r := range free[:min(limit, len(free))] {
			if r.promised && r.lockedUntil.IsZero() && !slices.Contains(taken, r) {
				w.t.Fatalf("a claim passes over a task that was acknowledged and has been due for %v", w.clock().Sub(r.runAt))
			}
		}
	}
	if rollback > 0 {
		for _, r := range taken {
			r.lockedUntil = w.now.Add(rollback)
		}
		return
	}
	w.pending = slices.DeleteFunc(w.pending, func(r *row) bool { return slices.Contains(taken, r) })
	if len(taken) > 0 {
		w.answer(from, taken[len(taken)-1].runAt)
	}
}

// nextDue does what Store.NextDue does.
func (w *world) nextDue() {
	from := w.marks.from()
	for _, r := range w.due() {
		if !r.runAt.Before(from) {
			w.answer(from, r.runAt)
			return
		}
	}
	w.answer(from, w.clock())
}

func (w *world) answer(from, seen time.Time) {
	w.unanswered = append(w.unanswered, &look{from, seen, w.now.Add(w.upTo(100 * time.Millisecond))})
}

// pass lets time pass, while there are looks and step happens too.
func (w *world) pass(total time.Duration, step func()) {
	for end := w.now.Add(total); w.now.Before(end); w.now = w.now.Add(w.upTo(40 * time.Millisecond)) {
		if w.now.Sub(w.lookedBack) >= lookBack {
			w.lookedBack = w.now
			select {
			case w.back <- w.now:
			default:
			}
		}
		step()
		if w.random.IntN(2) == 0 {
			w.nextDue()
		} else {
			w.claim(10, 0)
		}
		w.unanswered = slices.DeleteFunc(w.unanswered, func(l *look) bool {
			answered := !l.until.After(w.now)
			if answered {
				w.marks.saw(l.from, l.seen)
			}
			return answered
		})
	}
}

// However writes and looks fall, the mark hides nothing that was acknowledged.
// What it may hide (writes that commit late, claims that are rolled back,
// everything when the clock is set back) looks from the beginning find.
func TestLowWaterHidesNothing(t *testing.T) {
	t.Parallel()
	const longest = 20 * time.Second
	for name, setBack := range map[string]time.Duration{
		"a clock that goes on":     0,
		"a clock that is set back": longest,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for seed := range uint64(30) {
				w := newWorld(t, seed)
				mixed := func() {
					switch w.random.IntN(100) {
					case 0: // a statement that hangs
						w.write(50, 0, w.upTo(longest))
					case 1:
						w.claim(10, w.upTo(longest))
					case 2, 3, 4:
						w.write(1, w.upTo(longest), w.upTo(callTimeout))
					default:
						w.write(w.random.IntN(5), 0, w.upTo(callTimeout))
					}
				}
				w.pass(w.upTo(time.Minute), mixed)
				w.setBack = setBack
				w.pass(w.upTo(time.Minute), mixed)
				// Last, more at once than one look from the beginning finds. Until all
				// is committed or rolled back, and due:
				w.write(300, 0, longest)
				w.pass(longest+setBack, func() {})
				// A look from the beginning, and the claims that take what it showed.
				w.pass(3*lookBack+2*time.Second, func() {})
				if len(w.pending) > 0 {
					t.Fatalf("seed %d: %d tasks are not found", seed, len(w.pending))
				}
			}
		})
	}
}

// A look that began before others found something below the mark does not know of it.
func TestLowWaterIsNotRaisedFromAbove(t *testing.T) {
	t.Parallel()
	l := &lowWater{}
	old := time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)
	l.saw(time.Time{}, old.Add(time.Hour))
	from := l.from()
	l.saw(time.Time{}, old)
	l.saw(from, old.Add(2*time.Hour))
	if got := l.from(); got.After(old) {
		t.Errorf("looks begin %v after what was left", got.Sub(old))
	}
}
