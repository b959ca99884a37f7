package postgres

import (
	"sync"
	"time"
)

const (
	// laneLookBack is how often a claim looks into a lane from its very first task on, if that
	// takes a moment; where it takes longer, it is less often: lookBackPart of the time at most.
	laneLookBack = time.Second
	lookBackPart = 20
	// markCounts is how long a mark counts. It bounds what a clock that was set back and forth can do.
	markCounts = 10 * time.Second
	// maxMarks bounds the memory for marks: that is some 100 bytes each.
	maxMarks = 20_000
)

// claimUnderWay is how long before this moment a claim may have begun of which a count that is
// made now knows nothing yet: its tasks have the claimed_at of its beginning.
const claimUnderWay = callTimeout + time.Second

// laneMarks is what [lowWater] is, for the tasks that wait in lanes and for those of queues,
// keys and hosts that run. It is by the names of lanes, or of their rows.
type laneMarks struct {
	mu      sync.Mutex
	waiting map[string]*laneMark
	running map[string]*laneMark
}

// laneMark is the moment before which there is nothing: of waiting tasks the run_at, for
// the priorities -1, 0 and 1, and of running ones the claimed_at, which is from[0].
type laneMark struct {
	from [3]time.Time
	set  time.Time // when it was set last, by a monotonic clock
	back time.Time // when to look from the beginning
}

func newLaneMarks() *laneMarks {
	return &laneMarks{waiting: make(map[string]*laneMark), running: make(map[string]*laneMark)}
}

// runningFrom is where the count of what runs under a name begins.
func (m *laneMarks) runningFrom(name string, now time.Time) time.Time {
	m.mu.Lock()
	defer m.mu.Unlock()
	if mark := m.running[name]; mark != nil && now.Sub(mark.set) < markCounts {
		return mark.from[0]
	}
	return time.Time{}
}

// ran notes that of all that ran under a name at a moment of the database, the first was claimed
// at oldest; zero is none.
func (m *laneMarks) ran(name string, oldest, moment, now time.Time) {
	if oldest.IsZero() || oldest.After(moment) {
		oldest = moment
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	mark := markOf(m.running, name, now)
	mark.from[0], mark.set = oldest.Add(-claimUnderWay), now
}

// waitingFrom is where the look into a lane begins.
func (m *laneMarks) waitingFrom(lane string, now time.Time) [3]time.Time {
	m.mu.Lock()
	defer m.mu.Unlock()
	if mark := m.waiting[lane]; mark != nil && now.Sub(mark.set) < markCounts && now.Before(mark.back) {
		return mark.from
	}
	return [3]time.Time{}
}

// waited notes that a look into a lane which began at from and took some time left nothing
// that is due before seen.
func (m *laneMarks) waited(lane string, from, seen [3]time.Time, took time.Duration, now time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	mark := markOf(m.waiting, lane, now)
	if from == ([3]time.Time{}) {
		mark.back = now.Add(max(laneLookBack, lookBackPart*took))
	}
	for i := range seen {
		// A look that began above the mark does not know what lies between them.
		if !from[i].After(mark.from[i]) {
			mark.from[i] = seen[i].Add(-callTimeout)
		}
	}
	mark.set = now
}

// markOf returns the mark of a name. mu is held.
func markOf(marks map[string]*laneMark, name string, now time.Time) *laneMark {
	mark := marks[name]
	if mark != nil {
		return mark
	}
	if len(marks) >= maxMarks {
		for other, mark := range marks {
			if now.Sub(mark.set) >= markCounts {
				delete(marks, other)
			}
		}
		if len(marks) >= maxMarks/2 {
			clear(marks)
		}
	}
	mark = new(laneMark)
	marks[name] = mark
	return mark
}
