package dispatch

import (
	"context"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/melodia/orchestrator/internal/task"
)

func TestClaimsFillTheFreeSlotsAndNoMore(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		o := options()
		o.Concurrency = 5
		for n := range 40 {
			m.store(n, 0)
		}
		var later []task.ID
		for n := range 3 {
			later = append(later, m.store(100+n, time.Hour))
		}
		r := newRig(t, o, m, func(ctx context.Context, c task.Call) task.Outcome {
			if c.ViaWorkerEndpoint {
				return takes(2500*time.Millisecond, succeeded)(ctx, c)
			}
			return takes(time.Second, succeeded)(ctx, c)
		})
		m.breaks(func(_ context.Context, op string, do func()) error {
			if op == "Claim" {
				claims := m.calls("Claim")
				r.mu.Lock()
				free := o.Concurrency - r.under
				r.mu.Unlock()
				if limit := claims[len(claims)-1].limit; limit > free {
					t.Errorf("a claim asks for %d tasks while %d slots are free", limit, free)
				}
			}
			do()
			return nil
		})
		r.run()
		synctest.Wait()
		// Calls that are made by request take no slot and give none back.
		for _, id := range later {
			go func() {
				if _, _, err := r.Execute(t.Context(), id); err != nil {
					t.Errorf("Execute(%s): %v", id, err)
				}
			}()
		}
		synctest.Wait()
		if _, running := r.Health(); running != 8 {
			t.Errorf("%d calls are under way, want 8", running)
		}
		time.Sleep(9 * time.Second)
		if got := len(r.delivered()); got != 43 {
			t.Errorf("%d calls were made, want 43", got)
		}
		if r.most != 5 {
			t.Errorf("%d calls were under way at a time, want 5", r.most)
		}
		// 8 rounds of 5 calls without a pause in between.
		last := slices.MaxFunc(r.delivered(), func(a, b delivered) int { return int(a.after - b.after) })
		if last.after != 7*time.Second {
			t.Errorf("the last call began after %v, want 7s", last.after)
		}
	})
}

func TestClaimsAtOnceWhileThereIsWork(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		o := options()
		o.Concurrency = 1000
		for n := range 350 {
			m.store(n, 0)
		}
		r := newRig(t, o, m, takes(time.Hour, succeeded))
		r.knows()
		r.run()
		synctest.Wait() // no time passes
		if got := len(r.delivered()); got != 350 {
			t.Errorf("%d calls were made at once, want 350", got)
		}
		var limits []int
		for _, a := range m.calls("Claim") {
			limits = append(limits, a.limit)
		}
		if want := []int{maxFetch / 2, maxFetch}; !slices.Equal(limits, want) {
			t.Errorf("claims ask for %v tasks, want %v", limits, want)
		}
		if got := len(m.calls("NextDue")); got > 2 {
			t.Errorf("asked %d times whether there is more, want at the start and at the end only", got)
		}
	})
}

// Work that came while a claim was under way is claimed right after it.
func TestNotifyDuringAClaim(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		m.breaks(func(_ context.Context, op string, do func()) error {
			do()
			if op == "Claim" {
				time.Sleep(100 * time.Millisecond) // on the answer's way back
			}
			return nil
		})
		m.store(1, 0)
		r := start(t, options(), m, takes(0, succeeded))
		time.Sleep(50 * time.Millisecond)
		m.store(2, 0)
		r.notify(0)
		time.Sleep(time.Second)
		r.wantDelivered(100*time.Millisecond, 200*time.Millisecond)
	})
}

func TestWakes(t *testing.T) {
	t.Parallel()
	const ms = time.Millisecond
	tests := map[string]struct {
		play func(*rig)
		want []time.Duration
	}{
		"at once, when told of a task while idle": {
			play: func(r *rig) {
				time.Sleep(333 * ms)
				r.store.store(1, 0)
				r.notify(0)
			},
			want: []time.Duration{333 * ms},
		},
		"at the run_at that the store knows": {
			play: func(r *rig) { r.store.store(1, 90*time.Second+ms) },
			want: []time.Duration{90*time.Second + ms},
		},
		"at the run_at that it is told": {
			play: func(r *rig) {
				time.Sleep(333 * ms)
				r.store.store(1, 100*ms)
				r.notify(100 * ms)
			},
			want: []time.Duration{433 * ms},
		},
		"at an earlier one than the one it waits for": {
			play: func(r *rig) {
				r.store.store(1, 10*time.Second)
				time.Sleep(9500 * ms) // it waits for the first by now
				r.store.store(2, 100*ms)
				r.notify(100 * ms)
			},
			want: []time.Duration{9600 * ms, 10 * time.Second},
		},
		"not later, when told of a later one": {
			play: func(r *rig) {
				r.store.store(1, 300*ms)
				r.notify(300 * ms)
				r.store.store(2, 400*ms)
				r.notify(400 * ms)
			},
			want: []time.Duration{300 * ms, 400 * ms},
		},
		"when a slot is free, for what was due meanwhile": {
			play: func(r *rig) {
				for n := range 11 { // one more than there are slots
					r.store.store(n, 5*ms)
				}
				r.notify(5 * ms)
			},
			want: append(slices.Repeat([]time.Duration{5 * ms}, 10), 6*ms),
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r := start(t, options(), newMemory(), takes(time.Millisecond, succeeded))
				synctest.Wait()
				test.play(r)
				time.Sleep(100 * time.Second)
				r.wantDelivered(test.want...)
			})
		})
	}
}

// The dispatcher need not be told of a retry that it caused itself.
func TestWakesForARetry(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		id := m.store(1, 0, func(t *task.Task) { t.Retry.MinBackoff = 300 * time.Millisecond })
		r := start(t, options(), m, takes(0, broken))
		for attempt := 1; attempt <= 5; attempt++ {
			synctest.Wait()
			if got := len(r.delivered()); got != attempt {
				t.Fatalf("%d calls at the moment that attempt %d is due, want as many", got, attempt)
			}
			time.Sleep(time.Until(m.row(id).RunAt))
		}
	})
}

func TestPollsWithJitter(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		r := start(t, options(), m, takes(0, succeeded))
		time.Sleep(10 * time.Minute)
		polls := m.calls("NextDue")
		gaps := make(map[time.Duration]bool)
		for i := 1; i < len(polls); i++ {
			gap := polls[i].at.Sub(polls[i-1].at)
			gaps[gap] = true
			if gap < 800*time.Millisecond || gap > 1200*time.Millisecond {
				t.Errorf("%v between two polls, want 0.8 s to 1.2 s", gap)
			}
		}
		if len(gaps) < len(polls)/2 {
			t.Errorf("%d different times between %d polls, want jitter", len(gaps), len(polls))
		}
		// What another instance stored is found by the next poll.
		m.store(1, 0)
		stored := time.Since(r.began)
		time.Sleep(2 * time.Second)
		if calls := r.delivered(); len(calls) != 1 || calls[0].after-stored > 1200*time.Millisecond {
			t.Errorf("calls %v for a task that was stored after %v, want one within 1.2 s", calls, stored)
		}
	})
}

func TestIdleAsksLittle(t *testing.T) {
	t.Parallel()
	tests := map[string]func(*memory, *Options){
		"nothing is stored":     func(*memory, *Options) {},
		"something is far away": func(m *memory, _ *Options) { m.store(1, 24*time.Hour) },
		"it takes no tasks":     func(m *memory, o *Options) { o.Concurrency = 0; m.store(1, 0) },
	}
	for name, set := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				m, o := newMemory(), options()
				set(m, &o)
				r := start(t, o, m, takes(0, succeeded))
				time.Sleep(30 * time.Minute)
				perSecond := float64(len(m.calls())) / (30 * 60)
				if perSecond > 2 {
					t.Errorf("%.2f queries a second while idle, want at most 2", perSecond)
				}
				r.wantDelivered()
			})
		})
	}
}

// The dispatcher must not ask in a loop when asking does not help.
func TestNoBusyLoop(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		fault  around
		locked bool
		notify time.Duration // how often somebody says that work has come
	}{
		"nothing can be asked":                {fault: failing()},
		"claims fail (a read-only database)":  {fault: failing("Claim")},
		"the next run_at cannot be asked":     {fault: failing("NextDue")},
		"claims fail and work keeps coming":   {fault: failing("Claim", "NextDue"), notify: 10 * time.Millisecond},
		"everything due is in others' hands":  {locked: true},
		"the store has forgotten this worker": {fault: failing("Register")},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				m := newMemory()
				r := start(t, options(), m, takes(0, succeeded))
				synctest.Wait()
				if !test.locked {
					m.forget(newID('w', 1)) // so that nothing is carried out, whatever happens
				}
				m.store(1, 0)
				m.change(taskID(1), func(r *row) { r.locked = test.locked })
				m.breaks(test.fault)
				for end := time.Now().Add(time.Minute); time.Now().Before(end); {
					if test.notify == 0 {
						time.Sleep(time.Second)
						continue
					}
					time.Sleep(test.notify)
					r.notify(0)
				}
				perSecond := make(map[int]int)
				for _, a := range m.calls() {
					perSecond[int(a.at.Sub(r.began).Seconds())]++
				}
				for second, calls := range perSecond {
					most := 10
					if second < 4 {
						most = 30 // the pauses grow by doubling from 2 ms
					}
					if calls > most {
						t.Errorf("%d queries in second %d, want at most %d", calls, second, most)
					}
				}
			})
		})
	}
}

// What others held is taken within one poll of their letting go, and what comes
// after it at once.
func TestTakesWhatOthersLetGo(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		id := m.store(1, 0)
		m.change(id, func(r *row) { r.locked = true })
		r := start(t, options(), m, takes(0, succeeded))
		time.Sleep(10 * time.Second)
		m.change(id, func(r *row) { r.locked = false })
		var once sync.Once
		m.breaks(func(_ context.Context, _ string, do func()) error {
			do()
			if m.row(id).State == task.Running { // this was the claim
				once.Do(func() { m.store(2, 0) }) // by another instance
			}
			return nil
		})
		time.Sleep(1200 * time.Millisecond)
		synctest.Wait()
		r.wantState(id, task.Succeeded, "", 1)
		if calls := r.delivered(); len(calls) != 2 || calls[0].after != calls[1].after {
			t.Errorf("calls %v, want two at the same moment", calls)
		}
	})
}

// A worker that often came too late is not slower for it when there is work:
// one poll finds it.
func TestPauseEndsWhenNothingIsOverdue(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		r := start(t, options(), m, takes(0, succeeded))
		for n := range 20 {
			m.store(n, 0)
			m.change(taskID(n), func(r *row) { r.locked = true })
			time.Sleep(3 * time.Second)
			m.change(taskID(n), func(r *row) { r.State = task.Succeeded }) // by another instance
			time.Sleep(3 * time.Second)
			stored := time.Since(r.began)
			id := m.store(100+n, 0)
			time.Sleep(1200 * time.Millisecond)
			synctest.Wait()
			if got := m.row(id).State; got != task.Succeeded {
				t.Errorf("a task that another instance stored after %v is %s one poll later, want %s", stored, got, task.Succeeded)
			}
			time.Sleep(3 * time.Second)
		}
	})
}

func TestAlarm(t *testing.T) {
	t.Parallel()
	const limit = time.Minute
	tests := map[string]struct {
		before []time.Duration // set before the wait
		during []time.Duration // set one second into it
		want   time.Duration
	}{
		"not set":                   {want: limit},
		"set":                       {before: []time.Duration{5 * time.Second}, want: 5 * time.Second},
		"the earliest counts":       {before: []time.Duration{7 * time.Second, 5 * time.Second, 9 * time.Second}, want: 5 * time.Second},
		"in the past":               {before: []time.Duration{-time.Hour}, want: 0},
		"beyond the limit":          {before: []time.Duration{time.Hour}, want: limit},
		"set meanwhile":             {during: []time.Duration{2 * time.Second}, want: 3 * time.Second},
		"set to now meanwhile":      {before: []time.Duration{time.Hour}, during: []time.Duration{0}, want: time.Second},
		"set later meanwhile":       {before: []time.Duration{5 * time.Second}, during: []time.Duration{30 * time.Second}, want: 5 * time.Second},
		"set often meanwhile":       {during: []time.Duration{40 * time.Second, 30 * time.Second, 20 * time.Second}, want: 21 * time.Second},
		"set beyond, and the limit": {during: []time.Duration{time.Hour, 2 * time.Hour}, want: limit},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				a := newAlarm()
				begin := time.Now()
				for _, wait := range test.before {
					a.set(begin.Add(wait))
				}
				go func() {
					time.Sleep(time.Second)
					for _, wait := range test.during {
						a.set(time.Now().Add(wait))
					}
				}()
				a.wait(t.Context(), limit)
				if got := time.Since(begin); got != test.want {
					t.Errorf("waited %v, want %v", got, test.want)
				}
				if got, want := a.ringing(), test.want < limit; got != want {
					t.Errorf("ringing = %t, want %t", got, want)
				}
				a.clear()
				if a.ringing() {
					t.Error("ringing after clear")
				}
				time.Sleep(2 * time.Second)
			})
		})
	}
}
