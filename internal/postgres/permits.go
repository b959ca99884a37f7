package postgres

import (
	"cmp"
	"math"
	"slices"
	"time"

	"github.com/melodia/orchestrator/internal/task"
)

// permits is what the limits of a queue, a flow key or a host leave to one claim. nil is
// no limit.
type permits struct {
	// slots is how many tasks more may run at a time; unlimited where there is no such limit.
	slots int
	// rate is in tasks a second, 0 where there is no such limit. It fills a bucket of the
	// size burst, of which used is used up at the moment of the claim.
	rate, burst, used float64
	// taken is how many tasks the claim takes.
	taken int
}

const unlimited = math.MaxInt

// newPermits returns what limits leave while running tasks run. used of the burst was used up at
// a moment, and the claim is made at now.
func newPermits(l task.Limits, running int, used float64, at, now time.Time) *permits {
	p := &permits{slots: unlimited}
	if l.MaxConcurrent > 0 {
		p.slots = l.MaxConcurrent - running
	}
	if l.MaxPerSecond > 0 {
		p.rate, p.burst, p.used = l.MaxPerSecond, float64(l.EffectiveBurst()), leaked(used, l.MaxPerSecond, at, now)
	}
	return p
}

// clockSlack is by how much the database's clock may be behind a moment that it showed before:
// what a statement takes. Beyond it the clock was set back.
const clockSlack = 5 * time.Second

// leaked is what is left at now of a burst of which used was used up at a moment. A clock that was
// set back finds an empty bucket.
func leaked(used, rate float64, at, now time.Time) float64 {
	elapsed := now.Sub(at)
	if elapsed < -clockSlack {
		return 0
	}
	return max(used-max(elapsed.Seconds(), 0)*rate, 0)
}

// claimedAt is the moment to keep with what is used up of a burst after a claim at now, beside at of
// the claim before: it goes back only where the clock was set back.
func claimedAt(at, now time.Time) time.Time {
	if at.After(now) && at.Sub(now) <= clockSlack {
		return at
	}
	return now
}

// free is how many tasks more the claim may take; it may be below zero.
func (p *permits) free() int {
	if p == nil {
		return unlimited
	}
	n := p.slots - p.taken
	if p.rate > 0 {
		n = min(n, int(math.Floor(p.burst-p.used))-p.taken)
	}
	return n
}

// wait is how long it takes until there is another permit, where none is free: below zero where
// that is when a task ends.
func (p *permits) wait() time.Duration {
	if p.slots <= p.taken || p.rate == 0 {
		return -1
	}
	return max(duration((p.used+float64(p.taken)+1-p.burst)/p.rate), 0)
}

func (p *permits) take(n int) {
	if p != nil {
		p.taken += n
	}
}

// candidate is a waiting task that a claim may take.
type candidate struct {
	id    [16]byte
	runAt time.Time
	// priority is 1, 0 or -1; 0 where the task has none.
	priority int
	// host is where its call goes, where that is not healthy: the task is not claimed, and goes into
	// the host's lane.
	host string
}

// priorityLead is how much earlier a task counts as due for each step of its priority.
var priorityLead = task.High.Lead()

// rank is when a task counts as due among those of its lane.
func (c *candidate) rank() time.Time {
	return c.runAt.Add(-time.Duration(c.priority) * priorityLead)
}

func byRank(a, b candidate) int {
	return cmp.Or(a.rank().Compare(b.rank()), slices.Compare(a.id[:], b.id[:]))
}

// askedLane is a lane that a claim asks, with what the claim knows of it.
type askedLane struct {
	task.LaneAsk
	// queue, key and host are shared by all asked lanes that have the same one.
	queue, key, host *permits
	// paused is of its queue. others: another claim has its queue or its host.
	paused, others bool
	// blocked: the key is ordered, and its first task waits elsewhere.
	blocked bool
	// due is the tasks that are due, those to be claimed first before the others: more than Most
	// of them where there are more. Of an ordered key it is the first task alone.
	due []candidate
	// next is how long it takes until another task is due, below zero where none is known.
	next time.Duration

	// chosen are to be claimed, and held to be moved.
	chosen, held []candidate
	claimed      int

	// ordered: its key is.
	ordered bool
	// waiting is what a look into the lane that began at from has found.
	from    [3]time.Time
	waiting []waitingTask
}

// waitingTask is one that is due in wait.
type waitingTask struct {
	candidate
	wait time.Duration
}

// seen is for each priority, from the lowest on, the moment before which nothing that was due at now
// is left in the lane. It is not for lanes of ordered keys.
func (l *askedLane) seen(now time.Time) (seen [3]time.Time) {
	var found [3]int
	for i := range seen {
		seen[i] = now
	}
	for _, w := range l.waiting {
		i := w.priority + 1
		found[i]++
		gone := w.wait <= 0 && w.host == "" && l.claimed > 0 && l.claimed == len(l.chosen) && byRank(w.candidate, l.chosen[l.claimed-1]) <= 0
		// Behind the last one there may be more.
		if (!gone || found[i] > l.Most) && w.runAt.Before(seen[i]) {
			seen[i] = w.runAt
		}
	}
	return seen
}

// add adds a task that is due in wait.
func (l *askedLane) add(c candidate, wait time.Duration) {
	switch {
	case wait <= 0:
		l.due = append(l.due, c)
	case l.next < 0 || wait < l.next:
		l.next = wait
	}
}

// choose chooses up to limit tasks. Lanes have turns, a task each, so that those of a queue whose
// permits do not suffice for all have the same of it.
func choose(lanes []*askedLane, limit int) {
	var open []*askedLane
	for _, l := range lanes {
		if l.paused || l.others {
			continue
		}
		l.due = slices.DeleteFunc(l.due, func(c candidate) bool {
			if c.host != "" {
				l.held = append(l.held, c)
			}
			return c.host != ""
		})
		slices.SortFunc(l.due, byRank)
		open = append(open, l)
	}
	for len(open) > 0 && limit > 0 {
		open = slices.DeleteFunc(open, func(l *askedLane) bool {
			n := len(l.chosen)
			if n == l.Most || n == len(l.due) || limit == 0 || min(l.queue.free(), l.key.free(), l.host.free()) <= 0 {
				return true
			}
			l.chosen = l.due[:n+1]
			l.take(1)
			limit--
			return false
		})
	}
}

func (l *askedLane) take(n int) {
	l.queue.take(n)
	l.key.take(n)
	l.host.take(n)
}

// state is what is left in the lane once its tasks were claimed.
func (l *askedLane) state() task.LaneState {
	s := task.LaneState{Lane: l.Lane, Wait: -1}
	for _, c := range l.held {
		if !slices.Contains(s.Held, c.host) {
			s.Held = append(s.Held, c.host)
		}
	}
	switch {
	case l.paused:
		s.Blocked = task.BlockedByPause
	case l.others:
		s.Blocked = task.BlockedByOthers
	case l.queue.free() <= 0:
		s.Blocked, s.Wait = task.BlockedByQueue, l.queue.wait()
	case l.key.free() <= 0:
		s.Blocked, s.Wait = task.BlockedByKey, l.key.wait()
	case l.blocked:
		s.Blocked = task.BlockedByKey
	case l.host.free() <= 0:
		s.Blocked = task.BlockedByHost
	case l.claimed == 0 && len(l.chosen) > 0:
		s.Blocked = task.BlockedByOthers // they are locked, or were changed meanwhile
	case len(l.due) > l.claimed || len(l.held) > 0:
		s.Wait = 0
	default:
		s.Wait = l.next
	}
	return s
}
