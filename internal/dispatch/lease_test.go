package dispatch

import (
	"context"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/melodia/orchestrator/internal/task"
)

const heartbeatEvery = 3 * time.Second // a fifth of the lease

// last returns the last of calls, or an empty one.
func last(calls []asked) asked {
	if len(calls) == 0 {
		return asked{}
	}
	return calls[len(calls)-1]
}

// gaps returns the times between calls.
func gaps(calls []asked) []time.Duration {
	var found []time.Duration
	for i := 1; i < len(calls); i++ {
		found = append(found, calls[i].at.Sub(calls[i-1].at))
	}
	return found
}

func TestHeartbeats(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		r := start(t, options(), m, takes(0, succeeded))
		const minutes = 10
		time.Sleep(minutes*time.Minute + time.Millisecond)
		// Apart from those that go before a reap they come like clockwork.
		var regular int
		for _, a := range m.calls("Heartbeat") {
			if a.worker != newID('w', 1) {
				t.Errorf("a heartbeat of worker %s, want %s", a.worker, newID('w', 1))
			}
			if a.at.Sub(r.began)%heartbeatEvery == 0 {
				regular++
			}
		}
		if want := int(minutes * time.Minute / heartbeatEvery); regular < want {
			t.Errorf("%d heartbeats in %d minutes, want one every %v: %d", regular, minutes, heartbeatEvery, want)
		}
	})
}

// A heartbeat that gets no answer must not keep the next from being sent.
func TestHeartbeatHangs(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		r := start(t, options(), m, takes(0, succeeded))
		time.Sleep(2 * time.Second)
		m.breaks(hanging("Heartbeat"))
		time.Sleep(9500 * time.Millisecond)
		m.breaks(nil) // what began before stays without an answer
		time.Sleep(3 * time.Second)
		m.mu.Lock()
		silent := time.Since(m.workers[newID('w', 1)])
		m.mu.Unlock()
		if limit := heartbeatEvery; silent > limit {
			t.Errorf("the last heartbeat got through %v ago, want %v at the most", silent, limit)
		}
		if got, want := len(r.log.lines(t, "heartbeat failed")), 3; got != want {
			t.Errorf("%d heartbeats failed in 9.5 s, want %d", got, want)
		}
	})
}

// Reaping may have to wait for a lock that somebody holds. Heartbeats do not.
func TestHeartbeatsWhileReapingHangs(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		o := options()
		o.Lease = 2 * time.Second
		m.breaks(hanging("Reap"))
		start(t, o, m, takes(0, succeeded))
		time.Sleep(20 * time.Second)
		beats, reaps := m.calls("Heartbeat"), m.calls("Reap")
		for i, beat := range beats[1:] {
			if gap := beat.at.Sub(beats[i].at); gap > o.Lease/5 {
				t.Fatalf("a heartbeat came %v after the one before, want %v at the most", gap, o.Lease/5)
			}
		}
		if n := len(reaps); n < 3 || n > 4 { // each hangs for 5 s
			t.Errorf("reaping was tried %d times in 20 s, want one at a time", n)
		}
	})
}

func TestLeaseLost(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		id, byRequest := m.store(1, 0), m.store(2, time.Hour)
		cause := make(chan error, 2)
		r := start(t, options(), m, func(ctx context.Context, c task.Call) task.Outcome {
			if c.Attempt == 2 {
				return takes(time.Second, succeeded)(ctx, c)
			}
			<-ctx.Done()
			cause <- context.Cause(ctx)
			return succeeded // too late to count
		})
		answered := make(chan task.Decision, 1)
		synctest.Wait()
		go func() {
			_, decision, err := r.Execute(t.Context(), byRequest)
			if err != nil {
				t.Errorf("Execute: %v", err)
			}
			answered <- decision
		}()
		time.Sleep(time.Second)
		m.forget(newID('w', 1))
		time.Sleep(2 * time.Second) // the next heartbeat

		synctest.Wait()
		for range 2 {
			if got := <-cause; got != errLeaseLost {
				t.Errorf("the calls were cut off because of %v, want %v", got, errLeaseLost)
			}
		}
		<-answered
		if got := len(m.calls("Finish")); got != 0 {
			t.Errorf("%d results were written under the lost lease, want 0", got)
		}
		if got := len(r.log.lines(t, "result dropped, the lease was lost")); got != 2 {
			t.Errorf("%d lines tell of a dropped result, want 2", got)
		}
		if line := r.wantLine("lease lost, running calls are cut off", "WARN"); line["worker_id"] != newID('w', 1).String() {
			t.Errorf("the line %v does not name the worker", line)
		}

		time.Sleep(10 * time.Second)
		registered := m.calls("Register")
		if len(registered) != 2 || registered[1].worker != newID('w', 2) {
			t.Errorf("registered: %v, want workers 1 and 2", registered)
		}
		for _, id := range []task.ID{id, byRequest} {
			r.wantState(id, task.Succeeded, "", 2)
			if got := m.row(id).Attempts; got[0].Outcome != task.OutcomeLost || got[1].Outcome != task.OutcomeSucceeded {
				t.Errorf("attempts %v, want lost, then succeeded", got)
			}
		}
		if beat := last(m.calls("Heartbeat")); beat.worker != newID('w', 2) {
			t.Error("the last heartbeat is not the new worker's")
		}
	})
}

// A call that is slow to end after its lease was lost must not make the
// worker forget that it carries out the same task again.
func TestHoldsTheSameTaskTwice(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		id := m.store(1, 0)
		r := start(t, options(), m, func(ctx context.Context, c task.Call) task.Outcome {
			if c.Attempt == 1 {
				time.Sleep(10 * time.Second) // deaf to the end of ctx
				return succeeded
			}
			return takes(time.Minute, succeeded)(ctx, c)
		})
		time.Sleep(time.Second)
		m.forget(newID('w', 1))
		time.Sleep(5 * time.Second)
		if _, running := r.Health(); running != 2 {
			t.Errorf("%d calls are under way, want 2: the old one and the new one", running)
		}
		time.Sleep(40 * time.Second)
		if _, running := r.Health(); running != 1 {
			t.Errorf("%d calls are under way, want 1", running)
		}
		if got := last(m.calls("Reap")).held; !slices.Equal(got, []task.ID{id}) {
			t.Errorf("the last reap was told that %v is held, want %s", got, id)
		}
		time.Sleep(time.Minute)
		r.wantState(id, task.Succeeded, "", 2)
		if got := len(r.delivered()); got != 2 {
			t.Errorf("%d calls, want 2", got)
		}
	})
}

// While the store is away, results are kept; they count when it is back and
// nobody had a reason to take the task.
func TestStoreAway(t *testing.T) {
	t.Parallel()
	for name, fault := range map[string]around{"failing": failing(), "hanging": hanging()} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				m := newMemory()
				var ids []task.ID
				for n := range 3 {
					ids = append(ids, m.store(n, 0))
				}
				r := start(t, options(), m, takes(5*time.Second, succeeded))
				time.Sleep(4 * time.Second)
				m.breaks(fault)
				time.Sleep(20*time.Second + 100*time.Millisecond)
				for _, id := range ids {
					r.wantState(id, task.Running, "", 0)
				}
				if held := len(r.results.held()); held != 3 {
					t.Errorf("%d tasks are held while their results cannot be written, want 3", held)
				}
				if _, running := r.Health(); running != 0 {
					t.Errorf("%d calls are under way, want none", running)
				}
				writes := len(m.calls("Finish"))
				if writes < 3 || writes > 3*30 {
					t.Errorf("%d attempts to write 3 results in 19 s, want a few", writes)
				}
				m.breaks(nil)
				back := time.Now()
				time.Sleep(7 * time.Second)
				for _, id := range ids {
					r.wantState(id, task.Succeeded, "", 1)
				}
				if got := len(r.delivered()); got != 3 {
					t.Errorf("%d calls for 3 tasks, want 3", got)
				}

				// Everybody else was cut off too, and gets two intervals to say so.
				time.Sleep(20 * time.Second)
				first := slices.IndexFunc(m.calls("Reap"), func(a asked) bool { return a.at.After(back) })
				if first < 0 {
					t.Fatal("nothing was reaped after the outage")
				}
				var through time.Time // the first heartbeat that did
				for _, a := range m.calls("Heartbeat") {
					if a.at.After(back) && through.IsZero() {
						through = a.at
					}
				}
				if got := m.calls("Reap")[first].at.Sub(through); got < 2*heartbeatEvery {
					t.Errorf("reaped %v after the first heartbeat that got through, want %v at the least", got, 2*heartbeatEvery)
				}
				for _, a := range m.calls("Reap")[:first] {
					if a.at.After(back.Add(-20 * time.Second)) {
						t.Errorf("reaped during the outage, %v before its end", back.Sub(a.at))
					}
				}
			})
		})
	}
}

// After an outage that is longer than the lease, instances do not take each
// other's tasks: nobody was away but the store.
func TestOutageLongerThanTheLease(t *testing.T) {
	t.Parallel()
	for name, fault := range map[string]around{"failing": failing(), "hanging": hanging()} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				m := newMemory()
				for n := range 30 {
					m.store(n, 0)
				}
				var rigs []*rig
				for i := range 3 {
					o := options()
					o.NewID = func() task.ID { return newID('w', 100*i+len(m.calls("Register"))) }
					rigs = append(rigs, start(t, o, m, takes(2*time.Minute, succeeded)))
					time.Sleep(700 * time.Millisecond)
				}
				time.Sleep(10 * time.Second)
				m.breaks(fault)
				time.Sleep(40*time.Second + 100*time.Millisecond)
				m.breaks(nil)
				time.Sleep(3 * time.Minute)
				for n := range 30 {
					if r := m.row(taskID(n)); r.State != task.Succeeded || r.AttemptCount != 1 || r.claims != 1 {
						t.Errorf("task %d is %s after %d claims and %d attempts, want %s after 1 and 1", n, r.State, r.claims, r.AttemptCount, task.Succeeded)
					}
				}
				for i, r := range rigs {
					if got := r.log.lines(t, "lease lost, running calls are cut off"); len(got) > 0 {
						t.Errorf("instance %d lost its lease", i)
					}
				}
			})
		})
	}
}

func TestReaps(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		held := []task.ID{m.store(1, 0), m.store(2, 0)}
		byRequest := m.store(3, 24*time.Hour)
		r := start(t, options(), m, takes(time.Hour, succeeded))
		synctest.Wait()
		go func() { _, _, _ = r.Execute(t.Context(), byRequest) }()
		held = append(held, byRequest)
		time.Sleep(10 * time.Minute)

		reaps := m.calls("Reap")
		if got, want := reaps[0].at.Sub(r.began), 2*heartbeatEvery; got != want {
			t.Errorf("the first reap comes after %v, want %v", got, want)
		}
		different := make(map[time.Duration]bool)
		for _, gap := range gaps(reaps) {
			different[gap] = true
			if gap < 4*time.Second || gap > 6*time.Second {
				t.Errorf("%v between two reaps, want a third of the lease with 20 %% jitter", gap)
			}
		}
		if len(different) < len(reaps)/2 {
			t.Errorf("%d different times between %d reaps, want jitter", len(different), len(reaps))
		}
		for _, a := range reaps {
			slices.SortFunc(a.held, func(a, b task.ID) int { return slices.Compare(a[:], b[:]) })
			if diff := cmp.Diff(held, a.held); diff != "" || a.bound != 15*time.Second || a.worker != newID('w', 1) {
				t.Errorf("a reap by %s with a lease of %v; held (-want +got):\n%s", a.worker, a.bound, diff)
			}
			beaten := slices.ContainsFunc(m.calls("Heartbeat"), func(b asked) bool { return b.at.Equal(a.at) })
			if !beaten {
				t.Errorf("a reap after %v without a heartbeat right before it", a.at.Sub(r.began))
			}
		}
	})
}

// What reaping brings is claimed at once.
func TestTakesOverFromTheSilent(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		id := m.store(1, 0)
		silent := newID('w', 99)
		if err := m.Register(t.Context(), silent, "silent", 1); err != nil {
			t.Fatal(err)
		}
		if claims, err := m.Claim(t.Context(), silent, 1); err != nil || len(claims) != 1 {
			t.Fatalf("Claim = %v, %v", claims, err)
		}
		r := start(t, options(), m, takes(0, succeeded))
		time.Sleep(21 * time.Second) // a lease and the longest time between two reaps
		synctest.Wait()
		r.wantState(id, task.Succeeded, "", 2)
		worker := last(m.calls("Reap")).worker.String()
		if line := r.wantLine("took over lost tasks", "WARN"); line["worker_id"] != worker || line["count"] != 1.0 || !cmp.Equal(line["task_ids"], []any{id.String()}) {
			t.Errorf("the line is %v, want the worker %s and the task %s", line, worker, id)
		}
		if got, reaps := r.delivered()[0].after, m.calls("Reap"); !slices.ContainsFunc(reaps, func(a asked) bool { return a.at.Sub(r.began) == got }) {
			t.Errorf("the lost task was called after %v, want the moment of a reap", got)
		}
	})
}

// The answer to a claim got lost: the tasks run in nobody's hands, but in this
// worker's name. It takes them back itself.
func TestClaimWithoutAnAnswer(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		id := m.store(1, 0)
		m.breaks(func(_ context.Context, op string, do func()) error {
			do()
			if op == "Claim" {
				return errStoreAway
			}
			return nil
		})
		r := start(t, options(), m, takes(0, succeeded))
		synctest.Wait()
		m.breaks(nil)
		r.wantState(id, task.Running, "", 0)
		time.Sleep(15*time.Second + 6*time.Second)
		synctest.Wait()
		r.wantState(id, task.Succeeded, "", 2)
	})
}

func TestRegisteringIsRetried(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		id := m.store(1, 0)
		m.breaks(failing("Register"))
		r := start(t, options(), m, takes(0, succeeded))
		time.Sleep(time.Minute)
		tries := m.calls("Register")
		for _, gap := range gaps(tries) {
			if gap < 2400*time.Millisecond || gap > 3600*time.Millisecond {
				t.Errorf("%v between two tries to register, want %v with 20 %% jitter", gap, heartbeatEvery)
			}
		}
		if got := len(m.calls("Claim", "NextDue", "Heartbeat", "Reap")); got != 0 {
			t.Errorf("%d queries before the worker was registered, want 0", got)
		}
		if _, _, err := r.Execute(t.Context(), id); err != errNotRegistered {
			t.Errorf("Execute before the worker is registered returned %v, want %v", err, errNotRegistered)
		}
		m.breaks(nil)
		time.Sleep(3600 * time.Millisecond)
		r.wantState(id, task.Succeeded, "", 1)
		// Its answer may have been lost: the same worker asks again.
		for _, a := range m.calls("Register") {
			if a.worker != newID('w', 1) {
				t.Errorf("worker %s registered, want %s each time", a.worker, newID('w', 1))
			}
		}
	})
}

func TestKeepsTheHistory(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		o := options()
		o.Concurrency, o.Lease = 0, 24*time.Hour // polls and heartbeats take the test's time
		r := start(t, o, m, takes(0, succeeded))
		synctest.Wait()
		m.breaks(failing("KeepHistory")) // it goes on all the same
		time.Sleep(20 * time.Hour)
		kept := m.calls("KeepHistory")
		if !kept[0].at.Equal(r.began) {
			t.Errorf("the history was first looked after %v after the start, want at once", kept[0].at.Sub(r.began))
		}
		for _, gap := range gaps(kept) {
			if gap < 48*time.Minute || gap > 72*time.Minute {
				t.Errorf("%v between two looks after the history, want an hour with 20 %% jitter", gap)
			}
		}
		if got := len(kept); got < 20*5/6 || got > 20*5/4+1 {
			t.Errorf("looked after the history %d times in 20 hours", got)
		}
		for i, k := range kept {
			if want := min(i+1, 7); k.bound != 720*time.Hour || k.limit != want {
				t.Errorf("look %d: retention %v and %d days ahead, want 720h and %d", i+1, k.bound, k.limit, want)
			}
		}
		if got := len(r.log.lines(t, "keeping the history failed")); got != len(kept)-1 {
			t.Errorf("%d lines tell of %d failures", got, len(kept)-1)
		}
	})
}
