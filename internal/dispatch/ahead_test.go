package dispatch

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

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

// suddenly is a target whose calls take 1 ms, and those from number n on take d.
func suddenly(n int, d time.Duration) target {
	return func(ctx context.Context, c task.Call) task.Outcome {
		if int(c.Task.ID[14])<<8|int(c.Task.ID[15]) < n {
			return takes(time.Millisecond, succeeded)(ctx, c)
		}
		return takes(d, succeeded)(ctx, c)
	}
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
func TestClaimsAhead(t *testing.T) {
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
		if r.most != 10 {
			t.Errorf("%d calls were under way at a time, want 10", r.most)
		}
		if got := m.states()[task.Succeeded]; got != 1000 {
			t.Errorf("%d tasks have succeeded, want 1000", got)
		}
	})
}

// Where calls take long, nothing is claimed that would only wait.
func TestSlowCallsAreNotClaimedAhead(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		for n := range 100 {
			m.store(n, 0)
		}
		start(t, options(), m, takes(time.Second, succeeded))
		for range 90 {
			time.Sleep(100 * time.Millisecond)
			if got := m.states()[task.Running]; got > 10 {
				t.Fatalf("%d tasks are claimed while there are 10 slots", got)
			}
		}
	})
}

// Calls that suddenly take long keep nothing from other instances that was
// claimed ahead of them, and it counts no attempt.
func TestGivesBackWhatWaits(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const quick, slow = 500, 100
		m := newMemory()
		for n := range quick + slow {
			m.store(n, 0)
		}
		m.breaks(slowClaims(5 * time.Millisecond))
		o := options()
		r := start(t, o, m, suddenly(quick, time.Hour))
		time.Sleep(time.Second)
		ahead := m.states()[task.Running] - o.Concurrency
		if ahead <= 0 {
			t.Fatalf("%d tasks wait for a slot, want some", ahead)
		}
		time.Sleep(2 * patience)
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
		const quick, slow = 500, 100
		m := newMemory()
		for n := range quick + slow {
			m.store(n, 0)
		}
		m.breaks(slowClaims(5 * time.Millisecond))
		o := options()
		r := start(t, o, m, suddenly(quick, 5*time.Second))
		time.Sleep(800 * time.Millisecond)
		if got := m.states()[task.Running]; got <= o.Concurrency {
			t.Fatalf("%d tasks are claimed, want more than %d", got, o.Concurrency)
		}
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
		const quick, wait, answer = 500, 700 * time.Millisecond, 5 * time.Millisecond
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
		var waiting []task.ID
		called := make(map[task.ID]bool)
		for _, c := range r.delivered() {
			called[c.Task.ID] = true
		}
		for _, id := range r.held() {
			if !called[id] {
				waiting = append(waiting, id)
			}
		}
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
