package dispatch

import (
	"context"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/melodia/orchestrator/internal/limit"
	"github.com/melodia/orchestrator/internal/task"
)

// slowClaims is a store whose claims take d to answer.
func slowClaims(d time.Duration) around {
	return func(_ context.Context, op string, do func()) error {
		do()
		if op == "Claim" {
			time.Sleep(d)
		}
		return nil
	}
}

// number is n of taskID(n).
func number(id task.ID) int { return int(id[14])<<8 | int(id[15]) }

// suddenly is a target whose calls take 1 ms, and those from number n on take d.
func suddenly(n int, d time.Duration) target {
	return func(ctx context.Context, c task.Call) task.Outcome {
		if number(c.Task.ID) < n {
			return takes(time.Millisecond, succeeded)(ctx, c)
		}
		return takes(d, succeeded)(ctx, c)
	}
}

// waits are the tasks that were claimed here and not called yet.
func (r *rig) waits() []task.ID {
	called := make(map[task.ID]bool)
	for _, c := range r.delivered() {
		called[c.Task.ID] = true
	}
	return slices.DeleteFunc(r.results.held(), func(id task.ID) bool { return called[id] })
}

func (r *rig) wasCalled(id task.ID) bool {
	return slices.ContainsFunc(r.delivered(), func(c delivered) bool { return c.Task.ID == id })
}

// The tasks of startWithWaiting.
const quick, slow = 500, 100

// startWithWaiting carries out the quick tasks, and has slow ones wait for slots,
// in which their calls take d.
func startWithWaiting(t *testing.T, d time.Duration) *rig {
	t.Helper()
	m := newMemory()
	for n := range quick + slow {
		m.store(n, 0)
	}
	m.breaks(slowClaims(5 * time.Millisecond))
	o := options()
	o.PollInterval = time.Hour // so that nothing is found by chance
	r := start(t, o, m, suddenly(quick, d))
	time.Sleep(400 * time.Millisecond)
	if len(r.waits()) == 0 {
		t.Fatal("no task waits for a slot")
	}
	return r
}

// states counts the tasks in each state.
func (m *tables) states() map[task.State]int {
	m.mu.Lock()
	defer m.mu.Unlock()
	states := make(map[task.State]int)
	for _, r := range m.rows {
		states[r.State]++
	}
	return states
}

// Claiming goes on while calls do, so that it costs a backlog no time.
func TestPrefetch(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		for n := range 1000 {
			m.store(n, 0)
		}
		m.breaks(slowClaims(5 * time.Millisecond))
		r := start(t, options(), m, takes(10*time.Millisecond, succeeded))
		time.Sleep(time.Second)
		// 1 s is what the calls take, ten at a time; waiting for each claim they would
		// take half as long again.
		if got := len(r.delivered()); got < 900 {
			t.Errorf("%d calls were made in a second, want 900 at least", got)
		}
		time.Sleep(time.Second)
		r.stop()
		for i, c := range r.delivered() { // nearly in their turn
			if n := number(c.Task.ID); n > i+30 || n < i-30 {
				t.Errorf("task %d is the %dth to be called", n, i)
			}
		}
		if r.most != 10 {
			t.Errorf("%d calls were under way at a time, want 10", r.most)
		}
		if got := m.states()[task.Succeeded]; got != 1000 {
			t.Errorf("%d tasks have succeeded, want 1000", got)
		}
	})
}

// Where calls take long, nothing is claimed that would only wait.
func TestSlowCallsAreNotPrefetched(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		for n := range 100 {
			m.store(n, 0)
		}
		start(t, options(), m, takes(time.Second, succeeded))
		for range 90 {
			time.Sleep(100 * time.Millisecond)
			synctest.Wait() // calls that have ended are written down at the same moment
			if got := m.states()[task.Running]; got > 10 {
				t.Fatalf("%d tasks are claimed while there are 10 slots", got)
			}
		}
	})
}

// Calls that suddenly take long keep nothing from other instances that was
// prefetched, and it counts no attempt.
func TestGivesBackWhatWaits(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r, o := startWithWaiting(t, time.Hour), options()
		m, ahead := r.store, len(r.waits())
		time.Sleep(2 * prefetchTimeout)
		states := m.states()
		if states[task.Running] != o.Concurrency || states[task.Pending] != slow-o.Concurrency {
			t.Errorf("the tasks are %v, want %d running and the others pending", states, o.Concurrency)
		}
		if line := r.wantLine("claimed tasks were given back, no slot became free for them", "INFO"); line != nil && line["count"] != float64(ahead) {
			t.Errorf("the log says that %v tasks were given back, want %d", line["count"], ahead)
		}
		next := newRig(t, o, m, takes(0, succeeded))
		next.options.NewID = func() task.ID { return newID('x', 1) }
		next.run()
		time.Sleep(time.Minute)
		if got := len(next.delivered()); got != slow-o.Concurrency {
			t.Errorf("another instance made %d calls, want %d", got, slow-o.Concurrency)
		}
		for n := quick + o.Concurrency; n < quick+slow; n++ {
			next.wantState(taskID(n), task.Succeeded, "", 1)
		}
	})
}

// In a shutdown others may have what waits at once, and running calls get their grace.
func TestStopWhileTasksWait(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r, o := startWithWaiting(t, 5*time.Second), options()
		m := r.store
		r.cancel()
		synctest.Wait()
		if got := m.states(); got[task.Running] != o.Concurrency || got[task.Pending] != slow-o.Concurrency {
			t.Errorf("the tasks are %v once it was told to stop, want %d running and the others pending", got, o.Concurrency)
		}
		<-r.ended
		if got := m.states()[task.Succeeded]; got != quick+o.Concurrency {
			t.Errorf("%d tasks have succeeded, want %d", got, quick+o.Concurrency)
		}
	})
}

// The clock goes on while a task waits: it may expire, and its attempt begins
// when its call does.
func TestTimeWhileTasksWait(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const wait, answer = 700 * time.Millisecond, 5 * time.Millisecond
		m := newMemory()
		for n := range quick + 30 {
			m.store(n, 0, func(t *task.Task) {
				if n >= quick && n%2 == 0 {
					t.ExpiresAt = t.RunAt.Add(wait / 2)
				}
			})
		}
		m.breaks(slowClaims(answer))
		r := start(t, options(), m, suddenly(quick, wait))
		time.Sleep(wait / 2)
		waiting := r.waits()
		if len(waiting) < 2 {
			t.Fatalf("%d tasks wait for a slot, want some", len(waiting))
		}
		time.Sleep(5 * time.Second)
		began := make(map[task.ID]time.Duration)
		for _, c := range r.delivered() {
			began[c.Task.ID] = c.after
		}
		for _, id := range waiting {
			if !m.row(id).ExpiresAt.IsZero() {
				r.wantState(id, task.Failed, task.Expired, 0)
				continue
			}
			r.wantState(id, task.Succeeded, "", 1)
			// The store's clock was read when the claim was made, and not when the answer came.
			if got, want := m.row(id).Attempts[0].StartedAt, r.began.Add(began[id]-answer); !got.Equal(want) {
				t.Errorf("the attempt is said to have begun at %v, want %v", got, want)
			}
		}
	})
}

// Calls that began together end together, which is no sign that others follow.
func TestCallsThatEndTogetherAreNoThroughput(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		for n := range 2000 {
			m.store(n, 0)
		}
		m.breaks(slowClaims(5 * time.Millisecond))
		o := options()
		o.Concurrency = 200
		r := newRig(t, o, m, func(ctx context.Context, c task.Call) task.Outcome {
			return takes(3*time.Second+rand.N(15*time.Millisecond), succeeded)(ctx, c)
		})
		r.knows()
		r.run()
		for range 900 {
			time.Sleep(10 * time.Millisecond)
			synctest.Wait()
			if got := len(r.waits()); got > 2 {
				t.Fatalf("%d tasks wait for slots in which calls take 3 s", got)
			}
		}
	})
}

// All slots come back, whatever happened to the tasks that waited for them.
func TestSlotsComeBack(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := startWithWaiting(t, 3*time.Second)
		time.Sleep(45 * time.Second)
		synctest.Wait()
		if got := r.store.states()[task.Succeeded]; got != quick+slow {
			t.Errorf("%d tasks have succeeded, want %d", got, quick+slow)
		}
		r.wantLine("claimed tasks were given back, no slot became free for them", "INFO")
		if held := r.results.held(); len(held) > 0 {
			t.Errorf("%d tasks are held, want none", len(held))
		}
		for n := range 5 * options().Concurrency {
			r.store.store(1000+n, 0)
		}
		r.Wake()
		time.Sleep(2 * time.Second)
		synctest.Wait()
		r.wantRunning(options().Concurrency)
	})
}

// What is given back is found again, though no other task is due.
func TestTheLastThatWereGivenBack(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		for n := range quick + 15 {
			m.store(n, 0)
		}
		m.breaks(slowClaims(5 * time.Millisecond))
		o := options()
		o.PollInterval = time.Hour
		r := start(t, o, m, suddenly(quick, 3*time.Second))
		time.Sleep(400 * time.Millisecond)
		if got := len(r.waits()); got != 5 {
			t.Fatalf("%d tasks wait for a slot, want 5", got)
		}
		time.Sleep(15 * time.Second)
		r.wantLine("claimed tasks were given back, no slot became free for them", "INFO")
		if got := m.states()[task.Succeeded]; got != quick+15 {
			t.Errorf("%d tasks have succeeded, want %d", got, quick+15)
		}
	})
}

// A task that is cancelled while it waits is not called, and counts no attempt.
func TestCancelOfATaskThatWaits(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := startWithWaiting(t, 700*time.Millisecond)
		id := r.waits()[0]
		r.CutOff(map[task.ID]int64{id: r.store.cancel(id)})
		time.Sleep(3 * time.Second)
		r.wantState(id, task.Cancelled, "", 0)
		if n := len(r.store.row(id).Attempts); n != 0 || r.wasCalled(id) {
			t.Errorf("called: %t; %d attempts are recorded, want none", r.wasCalled(id), n)
		}
		r.wantLine("task cancelled", "INFO")
	})
}

// What waits when the lease is lost is in others' hands.
func TestLeaseLostWhileTasksWait(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := startWithWaiting(t, 700*time.Millisecond)
		waiting := r.waits()
		r.session.Load().lose(errLeaseLost)
		synctest.Wait()
		for _, id := range waiting {
			if r.wasCalled(id) {
				t.Errorf("task %s was called after the lease was lost", id)
			}
		}
	})
}

// What waits begins no more once the dispatcher was told to stop, even while a
// claim is still under way.
func TestStopDuringAClaimWhileTasksWait(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		for n := range 2000 {
			m.store(n, 0)
		}
		var r *rig
		hung := make(chan struct{})
		var once sync.Once
		m.breaks(func(_ context.Context, op string, do func()) error {
			do()
			if op != "Claim" {
				return nil
			}
			time.Sleep(time.Millisecond)
			if len(r.waits()) >= 2 {
				once.Do(func() {
					close(hung)
					time.Sleep(3 * time.Second)
				})
			}
			return nil
		})
		r = newRig(t, options(), m, func(ctx context.Context, c task.Call) task.Outcome {
			return takes(10*time.Millisecond+rand.N(10*time.Millisecond), succeeded)(ctx, c)
		})
		r.run()
		<-hung
		r.cancel()
		synctest.Wait()
		before := len(r.delivered())
		time.Sleep(time.Second) // the claim is still under way
		if got := len(r.delivered()) - before; got > 0 {
			t.Errorf("%d calls began after it was told to stop", got)
		}
		<-r.ended
		if got := m.states()[task.Running]; got != 0 {
			t.Errorf("%d tasks are still claimed", got)
		}
	})
}

// Prefetching does not get around the bound on what is not written down.
func TestUnwrittenResultsBoundPrefetch(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		for n := range 600 {
			m.store(n, 0)
		}
		o := options()
		m.breaks(slowClaims(time.Millisecond))
		start(t, o, m, func(ctx context.Context, c task.Call) task.Outcome {
			return takes(5*time.Millisecond+rand.N(15*time.Millisecond), succeeded)(ctx, c)
		})
		time.Sleep(300 * time.Millisecond)
		m.breaks(failing("Finish"))
		time.Sleep(3 * time.Second)
		if got := m.states()[task.Running]; got > maxUnfinished*o.Concurrency {
			t.Errorf("%d tasks are claimed and their results not written, want %d at most", got, maxUnfinished*o.Concurrency)
		}
	})
}

// A fast host stops to answer, with tasks that were claimed in advance. These get none of the
// calls that there are more for others, whose tasks begin as soon as the host is known to hang.
func TestHostHangsWithPrefetchedTasks(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		for n := range quick + slow {
			m.store(n, 0)
		}
		m.breaks(slowClaims(5 * time.Millisecond))
		o := options()
		o.HostShare = 0.75
		o.PollInterval = time.Hour
		r := start(t, o, m, func(ctx context.Context, c task.Call) task.Outcome {
			if task.HostOf(c.Task.URL) != targetHost {
				return takes(time.Millisecond, succeeded)(ctx, c)
			}
			return suddenly(quick, time.Hour)(ctx, c)
		})
		for len(r.delivered()) < quick+o.Concurrency || len(r.waits()) == 0 {
			time.Sleep(time.Millisecond)
			synctest.Wait()
			if time.Since(r.began) > limit.SlowAfter*3 {
				t.Fatal("no task was claimed in advance")
			}
		}
		began := time.Now()
		for n := range 20 {
			other := newTask(quick+slow+n, 0)
			other.URL = fastURL
			if err := r.Submit(t.Context(), other); err != nil {
				t.Fatal(err)
			}
			for !r.wasCalled(other.ID) && time.Since(began) < time.Minute {
				time.Sleep(time.Millisecond)
				synctest.Wait()
			}
		}
		if took := time.Since(began); took > 2*limit.SlowAfter {
			t.Errorf("20 tasks of another host were called after %v, want %v at most", took, 2*limit.SlowAfter)
		}
		hangs := 0
		for _, c := range r.delivered() {
			if task.HostOf(c.Task.URL) == targetHost && number(c.Task.ID) >= quick {
				hangs++
			}
		}
		if hangs != o.Concurrency {
			t.Errorf("%d calls hang, want the %d that had slots", hangs, o.Concurrency)
		}
	})
}
