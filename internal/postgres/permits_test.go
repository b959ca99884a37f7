package postgres

import (
	"fmt"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/melodia/orchestrator/internal/task"
)

var noon = time.Date(2026, 11, 30, 12, 0, 0, 0, time.UTC)

func TestPermits(t *testing.T) {
	t.Parallel()
	rate := task.Limits{MaxPerSecond: 10, Burst: 4}
	for name, tt := range map[string]struct {
		limits  task.Limits
		running int
		used    float64
		ago     time.Duration // since used
		taken   int

		free int
		wait time.Duration // where none is free
	}{
		"a slot is left":             {limits: task.Limits{MaxConcurrent: 3}, running: 2, free: 1},
		"no slot is left":            {limits: task.Limits{MaxConcurrent: 3}, running: 3, wait: -1},
		"more run than may":          {limits: task.Limits{MaxConcurrent: 3}, running: 5, free: -2, wait: -1},
		"the claim takes them":       {limits: task.Limits{MaxConcurrent: 3}, running: 1, taken: 2, wait: -1},
		"a burst at first":           {limits: rate, free: 4},
		"a burst that is used":       {limits: rate, used: 4, wait: 100 * time.Millisecond},
		"half of a permit is back":   {limits: rate, used: 4, ago: 50 * time.Millisecond, wait: 50 * time.Millisecond},
		"permits are back":           {limits: rate, used: 4, ago: 250 * time.Millisecond, free: 2},
		"never more than the burst":  {limits: rate, used: 4, ago: time.Hour, free: 4},
		"the claim takes the burst":  {limits: rate, taken: 4, wait: 100 * time.Millisecond},
		"the rate alone says burst":  {limits: task.Limits{MaxPerSecond: 2.5}, free: 3},
		"the burst was lowered":      {limits: rate, used: 9, free: -5, wait: 600 * time.Millisecond},
		"a clock that is a bit back": {limits: rate, used: 4, ago: -time.Second, wait: 100 * time.Millisecond},
		"a clock that was set back":  {limits: rate, used: 4, ago: -time.Hour, free: 4},
		"both, and slots are less":   {limits: task.Limits{MaxConcurrent: 3, MaxPerSecond: 10, Burst: 4}, running: 3, wait: -1},
		"both, and the rate is less": {limits: task.Limits{MaxConcurrent: 3, MaxPerSecond: 10, Burst: 4}, running: 1, used: 4, wait: 100 * time.Millisecond},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newPermits(tt.limits, tt.running, tt.used, noon.Add(-tt.ago), noon)
			p.take(tt.taken)
			if got := p.free(); got != tt.free {
				t.Errorf("free = %d, want %d", got, tt.free)
			}
			if tt.free <= 0 {
				if got := p.wait(); (got - tt.wait).Abs() > time.Microsecond {
					t.Errorf("wait = %v, want %v", got, tt.wait)
				}
			}
		})
	}
	if got := (*permits)(nil).free(); got != unlimited {
		t.Errorf("without limits %d are free", got)
	}
}

// Whatever claims there are and when, in no time do more tasks start than the burst and the rate allow,
// and after the wait that is told there is a permit.
func TestRateOfPermits(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		limits := task.Limits{MaxPerSecond: rapid.Float64Range(0.001, 10_000).Draw(t, "rate"), Burst: rapid.IntRange(1, 50).Draw(t, "burst")}
		var starts []time.Time
		now, at, used := noon, time.Time{}, 0.0
		for range rapid.IntRange(1, 30).Draw(t, "claims") {
			p := newPermits(limits, 0, used, at, now)
			n := min(max(p.free(), 0), rapid.IntRange(0, 60).Draw(t, "asked"))
			p.take(n)
			for range n {
				starts = append(starts, now)
			}
			if n > 0 {
				at, used = claimedAt(at, now), p.used+float64(p.taken)
			}
			step := time.Duration(rapid.Int64Range(0, int64(5*time.Second)).Draw(t, "step"))
			if wait := p.wait(); p.free() <= 0 && rapid.Bool().Draw(t, "waits") {
				if later := newPermits(limits, 0, used, at, now.Add(wait+time.Microsecond)); later.free() < 1 {
					t.Fatalf("no permit %v later", wait)
				}
				step = wait
			}
			now = now.Add(step)
		}
		for i := range starts {
			for j := i; j < len(starts); j++ {
				window := starts[j].Sub(starts[i])
				if most := float64(limits.Burst) + limits.MaxPerSecond*window.Seconds(); float64(j-i+1) > most+1e-6*most {
					t.Fatalf("%d starts in %v, want at most %f", j-i+1, window, most)
				}
			}
		}
	})
}

// What a claim chooses keeps all limits, takes from each lane what comes first, and leaves nothing that
// may be taken.
func TestChoose(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		some := func(name string, n int) (list []*permits, left []int) {
			for i := range n {
				var p *permits
				if rapid.Bool().Draw(t, fmt.Sprint(name, i, " has a limit")) {
					p = newPermits(task.Limits{MaxConcurrent: rapid.IntRange(1, 6).Draw(t, name)}, rapid.IntRange(0, 3).Draw(t, name+" running"), 0, noon, noon)
				}
				list, left = append(list, p), append(left, p.free())
			}
			return list, left
		}
		queues, queueLeft := some("queue", 3)
		keys, keyLeft := some("key", 5)
		hosts, hostLeft := some("host", 2)
		limit := rapid.IntRange(0, 20).Draw(t, "limit")
		var lanes []*askedLane
		type place struct{ queue, key, host int }
		var places []place
		for i := range rapid.IntRange(1, 12).Draw(t, "lanes") {
			key := rapid.IntRange(0, 4).Draw(t, "key of a lane")
			at := place{key % 3, key, rapid.IntRange(0, 1).Draw(t, "host of a lane")}
			l := &askedLane{queue: queues[at.queue], key: keys[at.key], host: hosts[at.host], next: -1}
			l.Most = rapid.IntRange(1, 5).Draw(t, "most")
			l.paused, l.others = rapid.IntRange(0, 9).Draw(t, "paused") == 0, rapid.IntRange(0, 9).Draw(t, "others") == 0
			for n := range rapid.IntRange(0, 6).Draw(t, "due") {
				c := candidate{id: [16]byte{byte(i), byte(n)}, runAt: noon.Add(-time.Duration(rapid.IntRange(0, 60).Draw(t, "ago")) * time.Minute), priority: rapid.IntRange(-1, 1).Draw(t, "priority")}
				if rapid.IntRange(0, 9).Draw(t, "unhealthy") == 0 {
					c.host = "https://h"
				}
				l.add(c, 0)
			}
			lanes, places = append(lanes, l), append(places, at)
		}
		choose(lanes, limit)
		total := 0
		for i, l := range lanes {
			n := len(l.chosen)
			if n > l.Most || n > 0 && (l.paused || l.others) {
				t.Fatalf("lane %d gives %d", i, n)
			}
			for j, c := range l.due {
				if c.host != "" && !l.paused && !l.others {
					t.Fatalf("a task of an unhealthy host may be claimed")
				}
				if j > 0 && !l.paused && !l.others && byRank(l.due[j-1], c) > 0 {
					t.Fatalf("lane %d is not in its order", i)
				}
			}
			total += n
			queueLeft[places[i].queue] -= n
			keyLeft[places[i].key] -= n
			hostLeft[places[i].host] -= n
		}
		for i, l := range lanes {
			n := len(l.chosen)
			at := places[i]
			for _, left := range []int{queueLeft[at.queue], keyLeft[at.key], hostLeft[at.host]} {
				if n > 0 && left < 0 {
					t.Fatalf("lane %d breaks a limit", i)
				}
			}
			if total < limit && n < min(l.Most, len(l.due)) && !l.paused && !l.others && min(queueLeft[at.queue], keyLeft[at.key], hostLeft[at.host]) > 0 {
				t.Fatalf("lane %d gives %d, and could give more", i, n)
			}
		}
		if total > limit {
			t.Fatalf("%d were chosen, want at most %d", total, limit)
		}
	})
}

// The permits of a queue that do not suffice go round its lanes.
func TestChooseGoesRound(t *testing.T) {
	t.Parallel()
	queue := newPermits(task.Limits{MaxConcurrent: 7}, 0, 0, noon, noon)
	var lanes []*askedLane
	for i := range 3 {
		l := &askedLane{queue: queue}
		l.Most = 100
		for n := range 5 {
			l.add(candidate{id: [16]byte{byte(i), byte(n)}, runAt: noon}, 0)
		}
		lanes = append(lanes, l)
	}
	choose(lanes, 100)
	for i, want := range []int{3, 2, 2} {
		if got := len(lanes[i].chosen); got != want {
			t.Errorf("lane %d gives %d, want %d", i, got, want)
		}
	}
}

// A mark moves with what is left, and a look from the beginning comes back after a moment.
func TestLaneMarks(t *testing.T) {
	t.Parallel()
	m := newLaneMarks()
	seen := [3]time.Time{noon, noon.Add(-time.Minute), noon}
	want := func(when time.Duration, begins bool) [3]time.Time {
		t.Helper()
		from := m.waitingFrom("mail/", noon.Add(when))
		if begins != (from == [3]time.Time{}) {
			t.Errorf("after %v a look begins at %v, want at the beginning: %t", when, from, begins)
		}
		return from
	}
	from := want(0, true)
	m.waited("mail/", from, seen, 20*time.Millisecond, noon)
	if from = want(time.Millisecond, false); from[1] != noon.Add(-time.Minute-callTimeout) || from[2] != noon.Add(-callTimeout) {
		t.Errorf("a look begins at %v, want %v before what was left", from, callTimeout)
	}
	m.waited("mail/", from, [3]time.Time{noon, noon, noon}, time.Millisecond, noon.Add(500*time.Millisecond))
	if from = want(999*time.Millisecond, false); from[1] != noon.Add(-callTimeout) {
		t.Errorf("a look begins at %v, want the mark to have moved", from)
	}
	from = want(time.Second, true)
	// One that takes long is not made again soon.
	m.waited("mail/", from, seen, 300*time.Millisecond, noon.Add(time.Second))
	want(6900*time.Millisecond, false)
	want(7*time.Second, true)

	m.ran("mail/", time.Time{}, noon, noon)
	if got := m.runningFrom("mail/", noon.Add(markCounts-1)); got != noon.Add(-claimUnderWay) {
		t.Errorf("counts begin at %v, want %v", got, noon.Add(-claimUnderWay))
	}
	if got := m.runningFrom("mail/", noon.Add(markCounts)); !got.IsZero() {
		t.Errorf("counts begin at %v, want at the beginning where the mark is old", got)
	}
	for n := range 3 * maxMarks {
		m.ran(fmt.Sprint(n), noon, noon, noon)
	}
	if n := len(m.running); n > maxMarks {
		t.Errorf("%d marks are kept, want %d at most", n, maxMarks)
	}
}
