package dispatch

import (
	"context"
	"fmt"
	"runtime"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/melodia/orchestrator/internal/task"
)

// in puts a task into a queue.
func in(queue, key string) func(*task.Task) {
	return func(t *task.Task) { t.Queue, t.FlowKey, t.Priority = queue, key, task.Normal }
}

// submitTo submits the nth task, which is due in delay, to a queue.
func (r *rig) submitTo(n int, delay time.Duration, queue, key string) {
	r.t.Helper()
	tk := newTask(n, delay)
	in(queue, key)(tk)
	if err := r.Submit(r.t.Context(), tk); err != nil {
		r.t.Fatal(err)
	}
}

// roughly checks when calls were made, each up to slack later.
func (r *rig) roughly(slack time.Duration, want ...time.Duration) {
	r.t.Helper()
	var got []time.Duration
	for _, c := range r.delivered() {
		got = append(got, c.after)
	}
	slices.Sort(got)
	if !slices.EqualFunc(got, want, func(g, w time.Duration) bool { return g >= w && g <= w+slack }) {
		r.t.Errorf("calls were made after %v, want %v", got, want)
	}
}

func TestQueuesWithALimit(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		m.setQueue(task.Queue{Name: "mail", QueueSettings: task.QueueSettings{Limits: task.Limits{MaxConcurrent: 2}}})
		r := start(t, options(), m, takes(time.Second, succeeded))
		r.knows()
		synctest.Wait()
		for n := range 6 {
			r.submitTo(n, 0, "mail", fmt.Sprint(n%3))
		}
		time.Sleep(4 * time.Second)
		r.roughly(20*time.Millisecond, 0, 0, time.Second, time.Second, 2*time.Second, 2*time.Second)
	})
}

func TestQueuesWithARate(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		m.setQueue(task.Queue{Name: "mail", QueueSettings: task.QueueSettings{Limits: task.Limits{MaxPerSecond: 5, Burst: 1}}})
		r := start(t, options(), m, takes(time.Millisecond, succeeded))
		r.knows()
		synctest.Wait()
		for n := range 4 {
			r.submitTo(n, 0, "mail", "")
		}
		time.Sleep(2 * time.Second)
		r.roughly(20*time.Millisecond, 0, 200*time.Millisecond, 400*time.Millisecond, 600*time.Millisecond)
		if n := len(m.calls("ClaimLanes")); n > 12 {
			t.Errorf("%d claims for 4 tasks", n)
		}
	})
}

func TestF3PausedQueuesWait(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		m.setQueue(task.Queue{Name: "mail", PausedAt: time.Now()})
		r := start(t, options(), m, takes(time.Millisecond, succeeded))
		r.knows()
		synctest.Wait()
		r.submitTo(1, 0, "mail", "")
		r.submitTo(2, 0, "other", "")
		time.Sleep(10 * time.Second)
		r.roughly(10*time.Millisecond, 0)
		m.setQueue(task.Queue{Name: "mail"})
		time.Sleep(2 * time.Second)
		if n := len(r.delivered()); n != 2 {
			t.Errorf("%d calls after the pause, want 2", n)
		}
		if n := len(m.calls("ClaimLanes")); n > 20 {
			t.Errorf("%d claims during a pause of 10 s", n)
		}
	})
}

func TestOrderedKeysWaitForRetries(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		m.setQueue(task.Queue{Name: "mail", QueueSettings: task.QueueSettings{PerKey: task.KeyLimits{Ordered: true}}})
		r := newRig(t, options(), m, func(_ context.Context, c task.Call) task.Outcome {
			if c.Task.ID == taskID(0) && c.Attempt == 1 {
				return broken
			}
			return succeeded
		})
		r.knows()
		r.run()
		synctest.Wait()
		for n := range 3 {
			r.submitTo(n, 0, "mail", "k")
		}
		time.Sleep(5 * time.Second)
		var order []task.ID
		for _, c := range r.delivered() {
			order = append(order, c.Task.ID)
		}
		if want := []task.ID{taskID(0), taskID(0), taskID(1), taskID(2)}; !slices.Equal(order, want) {
			t.Errorf("calls of %v, want %v", order, want)
		}
	})
}

// A look finds what other instances stored, and a claim at the time what is due later.
func TestF7LanesOfOthersAreFound(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		m.store(1, 0, in("early", ""))
		r := start(t, options(), m, takes(time.Millisecond, succeeded))
		r.knows()
		synctest.Wait()
		m.store(2, 0, in("mail", "a"))
		m.store(3, 10*time.Second, in("mail", "b"))
		m.store(4, 2*time.Hour, in("mail", "c"))
		time.Sleep(2 * time.Second)
		if n := len(r.delivered()); n != 2 {
			t.Fatalf("%d calls within 2 s, want 2", n)
		}
		time.Sleep(9 * time.Second)
		if n := len(r.delivered()); n != 3 {
			t.Fatalf("%d calls after 11 s, want 3", n)
		}
		time.Sleep(2 * time.Hour)
		if c := r.delivered(); len(c) != 4 || c[3].after > 2*time.Hour+10*time.Millisecond {
			t.Errorf("%d calls, the last one after %v, want 4, and that 2 h after", len(c), c[len(c)-1].after)
		}
	})
}

// A permit that another instance gives back is used within a poll interval.
func TestPermitsOfOthersAreUsed(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		m.setQueue(task.Queue{Name: "mail", QueueSettings: task.QueueSettings{Limits: task.Limits{MaxConcurrent: 1}}})
		held := m.store(1, 0, in("mail", ""))
		m.change(held, func(r *row) { r.State, r.worker, r.claimedAt = task.Running, newID('o', 1), time.Now() })
		m.workers[newID('o', 1)] = time.Now().Add(time.Hour)
		r := start(t, options(), m, takes(time.Millisecond, succeeded))
		r.knows()
		synctest.Wait()
		r.submitTo(2, 0, "mail", "")
		time.Sleep(10 * time.Second)
		if n := len(r.delivered()); n != 0 {
			t.Fatalf("%d calls while another instance has the only permit", n)
		}
		m.change(held, func(r *row) { r.State = task.Succeeded })
		time.Sleep(time.Second + 300*time.Millisecond)
		if n := len(r.delivered()); n != 1 {
			t.Errorf("%d calls after that, want 1", n)
		}
	})
}

// Neither a queue with many keys, nor a key with many tasks, nor plain tasks keep a lane
// waiting for more than a round.
func TestF5LanesHaveTurns(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		for n := range 3000 {
			m.store(10_000+n, -time.Hour, in("many", fmt.Sprint(n%1000)))
			m.store(20_000+n, -time.Hour, in("deep", ""))
			m.store(30_000+n, -time.Hour)
		}
		o := options()
		o.Concurrency = 50
		r := start(t, o, m, takes(100*time.Millisecond, succeeded))
		r.knows()
		time.Sleep(3 * time.Second)
		began := time.Since(r.began)
		r.submitTo(1, 0, "fresh", "")
		r.submitTo(2, 0, "many", "fresh")
		r.submitTo(3, 0, "", "")
		time.Sleep(3 * time.Second)
		first := map[task.ID]time.Duration{}
		counts := map[string]int{}
		for _, c := range r.delivered() {
			first[c.Task.ID] = c.after - began
			counts[c.Task.Queue]++
		}
		if late := first[taskID(1)]; late == 0 || late > 250*time.Millisecond {
			t.Errorf("the task of a fresh queue began after %v, want some 100 ms", late)
		}
		for _, queue := range []string{"many", "deep"} {
			if n := counts[queue]; n < 500 || n > 900 {
				t.Errorf("%d calls of queue %s in 6 s, want about a quarter of 3000", n, queue)
			}
		}
		if n := counts[""]; n < 1200 || n > 1800 {
			t.Errorf("%d calls of plain tasks in 6 s, want about half of 3000", n)
		}
	})
}

// F5: a limit that is changed holds at once, also where the old one would give the next
// permit much later.
func TestF5ChangedRatesHoldAtOnce(t *testing.T) {
	t.Parallel()
	rare := task.Limits{MaxPerSecond: 0.001, Burst: 1}
	for name, q := range map[string]task.QueueSettings{
		"of a queue": {Limits: rare}, "of a key": {PerKey: task.KeyLimits{Limits: rare}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				m := newMemory()
				m.setQueue(task.Queue{Name: "mail", QueueSettings: q})
				r := start(t, options(), m, takes(time.Millisecond, succeeded))
				r.knows()
				synctest.Wait()
				for n := range 5 {
					r.submitTo(n, 0, "mail", "k")
				}
				time.Sleep(5 * time.Second)
				if n := len(r.delivered()); n != 1 {
					t.Fatalf("%d calls at one in 1,000 s, want 1", n)
				}
				m.setQueue(task.Queue{Name: "mail"})
				time.Sleep(time.Second + 300*time.Millisecond)
				if n := len(r.delivered()); n != 5 {
					t.Errorf("%d calls after the limit was removed, want all 5", n)
				}
			})
		})
	}
}

// Due tasks that cannot be claimed are not asked for again and again.
func TestClaimsOfLanesInVain(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		r := start(t, options(), m, takes(time.Millisecond, succeeded))
		r.knows()
		synctest.Wait()
		m.mu.Lock()
		m.locked = true
		m.mu.Unlock()
		r.submitTo(1, 0, "mail", "")
		time.Sleep(10 * time.Second)
		if n := len(m.calls("ClaimLanes")); n < 10 || n > 30 {
			t.Errorf("%d claims within 10 s, want some 20", n)
		}
		m.mu.Lock()
		m.locked = false
		m.mu.Unlock()
		time.Sleep(time.Second + 300*time.Millisecond)
		if n := len(r.delivered()); n != 1 {
			t.Errorf("%d calls, want 1", n)
		}
	})
}

// F4: what waits for a limit makes no attempt, and is not claimed.
func TestF4WaitingCostsNoAttempt(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		m.setQueue(task.Queue{Name: "mail", QueueSettings: task.QueueSettings{Limits: task.Limits{MaxConcurrent: 1}}})
		r := start(t, options(), m, takes(time.Second, succeeded))
		r.knows()
		synctest.Wait()
		for n := range 20 {
			r.submitTo(n, 0, "mail", fmt.Sprint(n))
		}
		time.Sleep(30 * time.Second)
		for n := range 20 {
			if got := m.row(taskID(n)); got.claims != 1 || got.AttemptCount != 1 || got.State != task.Succeeded {
				t.Errorf("task %d is %s after %d claims and %d attempts, want one of each", n, got.State, got.claims, got.AttemptCount)
			}
		}
	})
}

// The tasks of a broken host go out of the way of others, in a queue too, and none makes an
// attempt while the host is broken.
func TestF9TasksOfABrokenHostAreMoved(t *testing.T) {
	t.Parallel()
	for name, queue := range map[string]string{"plain": "", "in a queue with a limit": "mail"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				m := newMemory()
				m.setQueue(task.Queue{Name: "mail", QueueSettings: task.QueueSettings{Limits: task.Limits{MaxConcurrent: 3}}})
				for n := range 5000 {
					m.store(10_000+n, -time.Hour, in(queue, ""), func(tk *task.Task) { tk.URL = "https://broken.example/" })
				}
				for n := range 3 {
					m.store(n, 0, in(queue, ""))
				}
				refused := task.Outcome{Kind: task.OutcomeRetryable, Error: "connection refused"}
				r := newRig(t, options(), m, func(_ context.Context, c task.Call) task.Outcome {
					if c.Task.URL == "https://broken.example/" {
						return refused
					}
					return succeeded
				})
				r.run()
				time.Sleep(20 * time.Second)
				calls := map[string]int{}
				for _, c := range r.delivered() {
					calls[task.HostOf(c.Task.URL)]++
				}
				if calls[targetHost] != 3 || calls["https://broken.example"] > 40 {
					t.Errorf("calls by host: %v, want all 3 of the healthy one and some few of the broken one", calls)
				}
				attempts := 0
				for n := range 5000 {
					attempts += m.row(taskID(10_000 + n)).AttemptCount
				}
				if attempts != calls["https://broken.example"] {
					t.Errorf("%d attempts for %d calls", attempts, calls["https://broken.example"])
				}
			})
		})
	}
}

// Of many hosts that are not healthy only those are asked of which a lane had tasks: else a thousand lanes of
// keys with a host each become a million that have nothing.
func TestOnlyLanesOfMovedTasksAreAsked(t *testing.T) {
	t.Parallel()
	r := newRig(t, options(), newMemory(), func(context.Context, task.Call) task.Outcome { return succeeded })
	for n := range 50 {
		r.hosts.get(fmt.Sprintf("https://customer%d.example", n)).state.OpenUntil = time.Now().Add(time.Hour)
	}
	r.hosts.unhealthy.Store(50)
	r.move(t.Context(), "mail/7", func(_ context.Context, hosts []string) (map[string]int, bool, error) {
		if len(hosts) != 50 {
			t.Errorf("tasks of %d hosts are moved, want 50", len(hosts))
		}
		return map[string]int{"https://customer7.example": 2}, false, nil
	})
	if asked := r.lanes.byName; len(asked) != 1 || asked["mail/7 https://customer7.example"] == nil {
		t.Errorf("%d lanes are asked, want that of the host whose tasks were moved", len(asked))
	}
}

// askedOf takes lanes and returns those that are asked.
func (l *lanes) askedOf(limit int) (names []task.Lane) {
	for _, a := range l.take(limit, func(task.Lane, bool) (most, running int, again time.Duration) { return limit, 0, 0 }) {
		names = append(names, a.Lane)
	}
	return names
}

// Lanes that got nothing come first again, in their order, and that does not cost more
// where many others are ready. It is not parallel: memory is counted.
func TestLanesThatGotNothingComeFirst(t *testing.T) { //nolint:paralleltest // see above
	l := newLanes()
	for n := range 100_000 {
		l.note(task.Lane(fmt.Sprintf("mail/%06d", n)), 0)
	}
	l.expire()
	first := l.askedOf(100)
	states := make([]task.LaneState, len(first))
	for i, name := range first {
		states[i] = task.LaneState{Lane: name, Blocked: task.BlockedByPause, Wait: -1}
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	l.answer(states, nil, 100, 0)
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > 1<<20 {
		t.Errorf("an answer allocates %d bytes", n)
	}
	l.expire()
	if again := l.askedOf(100); !slices.Equal(again, first) {
		t.Errorf("asked are %v, want again %v", again, first)
	}
}

// F10: one slow host alone has all slots, in however many lanes its tasks wait.
func TestF10LanesOfOneHostAreNoOthers(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		lanes []task.Lane
		want  bool
	}{
		"a lane alone":               {[]task.Lane{" https://h"}, false},
		"queues with the same host":  {[]task.Lane{"q1/ https://h", "q2/ https://h", " https://h"}, false},
		"keys with the same host":    {[]task.Lane{"q/k1 https://h", "q/k2 https://h"}, false},
		"a queue without a host":     {[]task.Lane{"q1/ https://h", "q2/"}, true},
		"another host in that queue": {[]task.Lane{"q/k1 https://h", "q/k2 https://h2"}, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := newLanes()
			for _, lane := range test.lanes {
				l.note(lane, 0)
			}
			l.expire()
			seen := 0
			l.take(10, func(lane task.Lane, othersWait bool) (most, running int, again time.Duration) {
				seen++
				if othersWait != test.want {
					t.Errorf("lane %q: others wait %t, want %t", lane, othersWait, test.want)
				}
				return 1, 0, 0
			})
			if seen == 0 {
				t.Error("no lane of a host had its turn")
			}
		})
	}
}

// The permits of a key go round its lanes: one whose host is unhealthy does not starve behind the
// one without a host, nor the other way round.
func TestPermitsOfAKeyGoRoundItsLanes(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := newLanes()
		names := []task.Lane{"q/k", "q/k https://h", "q/k https://h2"}
		for _, name := range names {
			l.note(name, 0)
		}
		l.expire()
		got := l.askedOf(10)
		slices.Sort(got)
		if !slices.Equal(got, names) {
			t.Fatalf("asked are %v, want all lanes", got)
		}
		full := func(name task.Lane) task.LaneState {
			return task.LaneState{Lane: name, Blocked: task.BlockedByKey, Wait: -1}
		}
		l.answer([]task.LaneState{full(names[0]), full(names[1]), full(names[2])}, nil, 10, time.Hour)
		counts := map[task.Lane]int{}
		// A lane that waits for its host takes no turn of the others.
		l.note("q/k https://broken", 0)
		l.expire()
		l.take(10, func(task.Lane, bool) (most, running int, again time.Duration) { return 0, 0, time.Hour })
		last := names[0]
		for range 9 {
			l.freed(last)
			time.Sleep(gatherTime)
			l.expire()
			asked := l.askedOf(10)
			if len(asked) != 1 {
				t.Fatalf("asked are %v for one permit, want one lane", asked)
			}
			last = asked[0]
			counts[last]++
			l.answer([]task.LaneState{full(last)}, map[task.Lane]int{last: 1}, 10, time.Hour)
		}
		for _, name := range names {
			if counts[name] != 3 {
				t.Errorf("%d of 9 permits went to %q, want 3", counts[name], name)
			}
		}
	})
}

// A queue with many keys and one with many tasks have the same part of a claim, and neither is asked for
// more than the claim may take.
func TestPartsOfAClaim(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		perLane      int
		lanes        int // that the queue with many keys is asked for
		ofKey, ofOne int
	}{
		"at first":                  {1, 100, 1, 100},
		"where keys have more each": {4, 25, 4, 100},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := newLanes()
			l.perLane = tt.perLane
			l.note("deep/", 0)
			for n := range 1000 {
				l.note(task.Lane(fmt.Sprintf("many/%d", n)), 0)
			}
			l.expire()
			asks := l.take(200, func(task.Lane, bool) (most, running int, again time.Duration) { return 200, 0, 0 })
			lanes := map[string]int{}
			for _, a := range asks {
				lanes[a.Lane.Queue()]++
				want := tt.ofKey
				if a.Lane == "deep/" {
					want = tt.ofOne
				}
				if a.Most != want {
					t.Errorf("%s is asked for %d, want %d", a.Lane, a.Most, want)
				}
			}
			if lanes["deep"] != 1 || lanes["many"] != tt.lanes {
				t.Errorf("asked are lanes of %v, want 1 and %d", lanes, tt.lanes)
			}
			if n := l.ready.Load(); n != 1 {
				t.Errorf("%d groups are ready, want the queue with many keys", n)
			}
		})
	}
}

// A claim from lanes that have several tasks each asks fewer of them, and one that got too little asks more.
func TestLanesAskedAreFittedToTheirTasks(t *testing.T) {
	t.Parallel()
	l := newLanes()
	for n := range 5000 {
		l.note(task.Lane(fmt.Sprintf("many/%d", n)), 0)
	}
	l.expire()
	for i, tt := range []struct{ has, asked int }{{9, 200}, {9, 100}, {9, 50}, {1, 50}, {1, 100}, {1, 200}, {1, 200}} {
		asks := l.take(200, func(task.Lane, bool) (most, running int, again time.Duration) { return 200, 0, 0 })
		if len(asks) != tt.asked {
			t.Errorf("claim %d asks %d lanes, want %d", i, len(asks), tt.asked)
		}
		claims := map[task.Lane]int{}
		var states []task.LaneState
		for _, a := range asks {
			claims[a.Lane] = min(a.Most, tt.has)
			state := task.LaneState{Lane: a.Lane, Wait: -1}
			if tt.has > a.Most {
				state.Wait = 0
			}
			states = append(states, state)
		}
		l.answer(states, claims, 200, time.Hour)
	}
}

// The permits of a host go round its lanes: those of one queue do not starve behind those of another.
func TestPermitsOfAHostGoRoundItsLanes(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := newLanes()
		names := []task.Lane{" https://h", "a/ https://h", "b/k https://h"}
		for _, name := range names {
			l.note(name, 0)
		}
		counts := map[task.Lane]int{}
		for range 9 {
			l.expire()
			asks := l.take(10, func(task.Lane, bool) (most, running int, again time.Duration) { return 1, 1, time.Hour })
			if len(asks) != 1 || asks[0].Most != 1 {
				t.Fatalf("asked is %v for one permit, want one task of one lane", asks)
			}
			name := asks[0].Lane
			counts[name]++
			l.answer([]task.LaneState{{Lane: name, Blocked: task.BlockedByHost, Wait: -1}}, map[task.Lane]int{name: 1}, 10, time.Hour)
			l.freed(name)
			time.Sleep(gatherTime)
		}
		for _, name := range names {
			if counts[name] != 3 {
				t.Errorf("%d of 9 permits went to %q, want 3", counts[name], name)
			}
		}
	})
}

// Looks at the store go on while what they find is carried out, and rest where it is not.
func TestLooksFollowTheWork(t *testing.T) {
	t.Parallel()
	const took = 100 * time.Millisecond
	for name, tt := range map[string]struct {
		paused bool
		check  func(calls, looks int) bool
	}{
		"lanes with work":         {false, func(calls, _ int) bool { return calls == 5000 }},
		"lanes of a paused queue": {true, func(calls, looks int) bool { return calls == 0 && looks <= 3 }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				m := newMemory()
				if tt.paused {
					m.setQueue(task.Queue{Name: "many", PausedAt: time.Now()})
				}
				for n := range 5000 {
					m.store(n, -time.Hour, in("many", fmt.Sprint(n)))
				}
				var looks atomic.Int32
				m.fault = func(_ context.Context, op string, do func()) error {
					if op == "Lanes" {
						looks.Add(1)
						time.Sleep(took)
					}
					do()
					return nil
				}
				r := start(t, options(), m, takes(time.Millisecond, succeeded))
				r.knows()
				time.Sleep(5 * time.Second)
				if calls := len(r.delivered()); !tt.check(calls, int(looks.Load())) {
					t.Errorf("%d calls and %d looks within 5 s", calls, looks.Load())
				}
			})
		})
	}
}
