package dispatch

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/melodia/orchestrator/internal/task"
)

func (r *rig) wantHealth(want string) {
	r.t.Helper()
	if got, _ := r.Health(); got != want {
		r.t.Errorf("health is %s, want %s", got, want)
	}
}

// wantSignedOff checks that the store knows no worker any more.
func (r *rig) wantSignedOff() {
	r.t.Helper()
	r.store.mu.Lock()
	defer r.store.mu.Unlock()
	if len(r.store.workers) > 0 {
		r.t.Errorf("%d workers are still registered, want 0", len(r.store.workers))
	}
}

func TestStopsAtOnceWhenIdle(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		m.store(1, 5*time.Second)
		r := newRig(t, options(), m, takes(0, succeeded))
		r.wantHealth("starting")
		r.run()
		time.Sleep(4900 * time.Millisecond)
		r.wantHealth("ok")
		if took := r.stop(); took != 0 {
			t.Errorf("Run took %v to stop while idle, want 0", took)
		}
		r.wantHealth("stopped")
		r.wantSignedOff()
		before := len(m.calls())
		r.notify(0)
		time.Sleep(time.Minute)
		if after := len(m.calls()); after != before {
			t.Errorf("%d queries after the end", after-before)
		}
		r.wantDelivered()
	})
}

func TestGraceForRunningCalls(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		o := options()
		o.Concurrency = 2
		quick, slow, waiting := m.store(1, 0), m.store(2, 0), m.store(3, 0)
		byRequest := m.store(4, time.Hour)
		r := start(t, o, m, func(ctx context.Context, c task.Call) task.Outcome {
			switch c.Task.ID {
			case quick:
				return takes(4*time.Second, broken)(ctx, c)
			case byRequest:
				return takes(6*time.Second, succeeded)(ctx, c)
			}
			return takes(time.Hour, succeeded)(ctx, c)
		})
		synctest.Wait()
		outcome := make(chan task.Outcome, 1)
		go func() {
			o, _, err := r.Execute(t.Context(), byRequest)
			if err != nil {
				t.Errorf("Execute: %v", err)
			}
			outcome <- o
		}()
		time.Sleep(time.Second)
		go func() {
			synctest.Wait()
			r.wantHealth("stopped")
			if _, running := r.Health(); running != 3 {
				t.Errorf("%d calls are under way, want 3", running)
			}
		}()
		if took := r.stop(); took != o.Grace {
			t.Errorf("Run took %v to stop, want %v", took, o.Grace)
		}
		// Two ended by themselves, one was cut off: it goes back and does not count.
		r.wantState(quick, task.Pending, "", 1)
		r.wantState(byRequest, task.Succeeded, "", 1)
		if got := <-outcome; got.Kind != task.OutcomeSucceeded {
			t.Errorf("Execute returned %s, want %s", got.Kind, task.OutcomeSucceeded)
		}
		r.wantState(slow, task.Pending, "", 0)
		if got := m.row(slow); got.RunAt.After(time.Now()) || len(got.Attempts) != 1 || got.Attempts[0].Outcome != task.OutcomeInterrupted {
			t.Errorf("the task that was cut off is due in %v after %v, want at once after an interrupted attempt", time.Until(got.RunAt), got.Attempts)
		}
		if got := m.row(waiting); got.claims != 0 {
			t.Errorf("a task was claimed %d times after the stop, want 0", got.claims)
		}
		line := r.wantLine("stopping, calls under way may go on for the grace", "INFO")
		if line["count"] != 3.0 || line["grace_seconds"] != 8.0 {
			t.Errorf("it stops with %v, want 3 calls under way and 8 s", line)
		}
		// Before the grace ends; two of the calls have ended by then.
		line = r.wantLine("calls under way will be cut off unless they end in time", "WARN")
		if line["count"] != 1.0 || line["left_seconds"] != 2.0 {
			t.Errorf("it warns with %v, want 1 call and 2 s", line)
		}
		line = r.wantLine("running calls are cut off", "WARN")
		if line["count"] != 1.0 {
			t.Errorf("%v calls were cut off, want 1", line["count"])
		}
		r.wantLine("attempt interrupted", "INFO")
		// The lease held to the end.
		if got := last(m.calls("Heartbeat")).at.Sub(r.began); got != 9*time.Second {
			t.Errorf("the last heartbeat was sent after %v, want 9s", got)
		}
		r.wantSignedOff()
	})
}

// A claim that is under way when the dispatcher is told to stop.
func TestStopDuringAClaim(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		answer time.Duration // how long the store takes
		grace  time.Duration
		call   time.Duration
		took   time.Duration // from the stop, which comes after one second
		state  task.State
		count  int
	}{
		"its tasks are carried out":             {answer: 3 * time.Second, grace: 8 * time.Second, call: time.Second, took: 3 * time.Second, state: task.Succeeded, count: 1},
		"its tasks are cut off and given back":  {answer: 3 * time.Second, grace: 8 * time.Second, call: time.Hour, took: 8 * time.Second, state: task.Pending},
		"it comes after the grace":              {answer: 3300 * time.Millisecond, grace: 2 * time.Second, call: time.Second, took: 2300 * time.Millisecond, state: task.Pending},
		"without a grace":                       {answer: 1100 * time.Millisecond, call: time.Second, took: 100 * time.Millisecond, state: task.Pending},
		"it never comes, its tasks are reaped":  {answer: time.Hour, grace: 2 * time.Second, took: 2500 * time.Millisecond, state: task.Running},
		"it never comes, and there is no grace": {answer: time.Hour, took: 500 * time.Millisecond, state: task.Running},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				m := newMemory()
				id := m.store(1, 0)
				m.breaks(func(ctx context.Context, op string, do func()) error {
					do()
					if op != "Claim" {
						return nil
					}
					select {
					case <-time.After(test.answer):
						return nil
					case <-ctx.Done():
						return hang(ctx)
					}
				})
				o := options()
				o.Grace = test.grace
				r := start(t, o, m, takes(test.call, succeeded))
				time.Sleep(time.Second)
				if took := r.stop(); took != test.took {
					t.Errorf("Run took %v to stop, want %v", took, test.took)
				}
				r.wantState(id, test.state, "", test.count)
				if got := len(m.calls("Claim")); got != 1 {
					t.Errorf("%d claims, want 1", got)
				}
				r.wantSignedOff()
				if test.state == task.Succeeded {
					return
				}
				// Another instance does the rest.
				m.breaks(nil)
				next := start(t, options(), m, takes(0, succeeded))
				time.Sleep(25 * time.Second)
				want := 1
				if test.state == task.Running {
					want = 2 // it was lost with its claim
				}
				next.wantState(id, task.Succeeded, "", want)
			})
		})
	}
}

// Whatever hangs, the dispatcher stops in time.
func TestStopWhileTheStoreHangs(t *testing.T) {
	t.Parallel()
	ops := []string{"all", "Finish", "Unregister", "Heartbeat", "Reap", "KeepHistory", "NextDue", "Claim", "ClaimOne", "Register"}
	for _, op := range ops {
		for _, lead := range []time.Duration{0, 3100 * time.Millisecond} {
			t.Run(op+" "+lead.String()+" before", func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) {
					m := newMemory()
					o := options()
					o.Grace = 2 * time.Second
					m.store(1, 0)
					m.store(2, 0)
					byRequest, due := m.store(3, time.Hour), 8500*time.Millisecond-lead
					r := start(t, o, m, func(ctx context.Context, c task.Call) task.Outcome {
						if c.Task.ID == taskID(1) {
							return takes(9*time.Second, succeeded)(ctx, c) // ends within the grace
						}
						return takes(time.Hour, succeeded)(ctx, c)
					})
					time.Sleep(due)
					if op == "all" {
						m.breaks(hanging())
					} else {
						m.breaks(hanging(op))
					}
					go func() { _, _, _ = r.Execute(t.Context(), byRequest) }()
					m.store(4, 0)
					r.notify(0)
					synctest.Wait()
					time.Sleep(lead)
					if took, limit := r.stop(), o.Grace+time.Second; took > limit {
						t.Errorf("Run took %v to stop, want at most %v", took, limit)
					}
					r.wantHealth("stopped")
				})
			})
		}
	}
}

// The results of calls that were cut off are written even if the store falters.
func TestLastResultsAreWritten(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		o := options()
		for n := range 5 {
			m.store(n, 0)
		}
		r := start(t, o, m, takes(time.Hour, succeeded))
		synctest.Wait()
		m.breaks(func(ctx context.Context, op string, do func()) error {
			if op == "Finish" {
				if len(m.calls("Finish")) <= 5 {
					return errStoreAway
				}
				select { // a slow one
				case <-time.After(200 * time.Millisecond):
				case <-ctx.Done():
					return hang(ctx)
				}
			}
			do()
			return nil
		})
		if took := r.stop(); took > o.Grace+flushTimeout {
			t.Errorf("Run took %v to stop, want at most %v", took, o.Grace+flushTimeout)
		}
		for n := range 5 {
			r.wantState(taskID(n), task.Pending, "", 0)
		}
		r.wantSignedOff()
	})
}

// Each result has what is left of one last moment, not a moment of its own.
func TestLastResultsShareOneMoment(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		m.store(1, 0)
		o := options()
		r := start(t, o, m, func(ctx context.Context, _ task.Call) task.Outcome {
			<-ctx.Done()
			time.Sleep(400 * time.Millisecond) // slow to notice
			return task.Outcome{Kind: task.OutcomeInterrupted}
		})
		synctest.Wait()
		m.breaks(hanging("Finish", "Unregister"))
		if took, want := r.stop(), o.Grace+2*flushTimeout; took != want {
			t.Errorf("Run took %v to stop, want %v", took, want)
		}
		if got := r.wantLine("results are not written, or it is not known whether they are", "ERROR")["count"]; got != 1.0 {
			t.Errorf("%v results are said not to be written, want 1", got)
		}
		r.wantLine("signing off failed", "ERROR")
	})
}

func TestStopWhileRegistering(t *testing.T) {
	t.Parallel()
	for name, fault := range map[string]around{"failing": failing("Register"), "hanging": hanging("Register")} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				m := newMemory()
				m.breaks(fault)
				id := m.store(1, 0)
				r := start(t, options(), m, takes(0, succeeded))
				time.Sleep(10 * time.Second)
				if took := r.stop(); took != 0 {
					t.Errorf("Run took %v to stop, want 0", took)
				}
				r.wantHealth("stopped")
				if got := m.row(id).claims; got != 0 {
					t.Errorf("the task was claimed %d times, want 0", got)
				}
				if _, _, err := r.Execute(t.Context(), id); !errors.Is(err, ErrStopping) {
					t.Errorf("Execute returned %v, want %v", err, ErrStopping)
				}
			})
		})
	}
}

// The answer to the registration comes when the dispatcher was told to stop.
func TestStopWhenJustRegistered(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		m.store(1, 0)
		m.breaks(func(_ context.Context, op string, do func()) error {
			if op == "Register" {
				time.Sleep(2 * time.Second) // deaf to the end of ctx
			}
			do()
			return nil
		})
		r := start(t, options(), m, takes(0, succeeded))
		time.Sleep(time.Second)
		if took := r.stop(); took != time.Second {
			t.Errorf("Run took %v to stop, want 1s", took)
		}
		r.wantDelivered()
		r.wantSignedOff()
	})
}

func TestStopWithALostLease(t *testing.T) {
	t.Parallel()
	for name, fault := range map[string]around{"": nil, "registering fails": failing("Register"), "registering hangs": hanging("Register")} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				m := newMemory()
				id := m.store(1, 0)
				r := start(t, options(), m, takes(time.Hour, succeeded))
				time.Sleep(4 * time.Second)
				m.forget(newID('w', 1))
				m.breaks(fault)
				if took := r.stop(); took != 2*time.Second {
					t.Errorf("Run took %v to stop, want 2s: until the heartbeat that finds the lease gone", took)
				}
				r.wantState(id, task.Pending, "", 1) // as the reaping left it
				if got := len(m.calls("Finish")); got != 0 {
					t.Errorf("%d results were written under the lost lease, want 0", got)
				}
				if got := m.row(id).claims; got != 1 {
					t.Errorf("the task was claimed %d times, want 1", got)
				}
				r.wantSignedOff()
			})
		})
	}
}

func TestExecuteDuringTheStop(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		first, second := m.store(1, time.Hour), m.store(2, time.Hour)
		r := start(t, options(), m, takes(time.Hour, succeeded))
		synctest.Wait()
		interrupted := make(chan task.Outcome, 1)
		go func() {
			o, _, _ := r.Execute(t.Context(), first)
			interrupted <- o
		}()
		synctest.Wait()
		refused := make(chan error, 1)
		go func() {
			time.Sleep(time.Second)
			_, _, err := r.Execute(t.Context(), second)
			refused <- err
		}()
		r.stop()
		if err := <-refused; !errors.Is(err, ErrStopping) {
			t.Errorf("Execute during the stop returned %v, want %v", err, ErrStopping)
		}
		if got := <-interrupted; got.Kind != task.OutcomeInterrupted {
			t.Errorf("the call that was cut off came to %s, want %s", got.Kind, task.OutcomeInterrupted)
		}
		r.wantState(first, task.Pending, "", 0)
		r.wantState(second, task.Pending, "", 0)
	})
}

// A clean stop is no error.
func TestStopsQuietly(t *testing.T) {
	t.Parallel()
	for at := range 80 {
		synctest.Test(t, func(t *testing.T) {
			m := newMemory()
			m.breaks(func(ctx context.Context, _ string, do func()) error {
				select { // every query takes a while
				case <-time.After(250 * time.Millisecond):
				case <-ctx.Done():
					return hang(ctx)
				}
				do()
				return nil
			})
			r := start(t, options(), m, takes(time.Second, succeeded))
			time.Sleep(time.Duration(at) * 155 * time.Millisecond)
			r.stop()
			for _, level := range []string{`"level":"ERROR"`, `"level":"WARN"`} {
				if text := r.log.text(); strings.Contains(text, level) {
					t.Errorf("stopped after %v, the log has trouble:\n%s", time.Since(r.began), text)
				}
			}
		})
	}
}

// Nobody is signed off while results are being written that can be.
func TestStopWaitsForResults(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		id := m.store(1, 0)
		m.breaks(func(_ context.Context, op string, do func()) error {
			if op == "Finish" {
				time.Sleep(2 * time.Second)
			}
			do()
			return nil
		})
		r := start(t, options(), m, takes(time.Second, succeeded))
		time.Sleep(1500 * time.Millisecond)
		if took, want := r.stop(), 1500*time.Millisecond; took != want {
			t.Errorf("Run took %v to stop, want %v: until the result is written", took, want)
		}
		r.wantState(id, task.Succeeded, "", 1)
	})
}

// Who asked for a call is not told of an outcome that is not written: the task
// will be carried out again.
func TestStopBeforeTheOutcomeOfExecuteIsWritten(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		id := m.store(1, time.Hour)
		r := start(t, options(), m, takes(time.Second, succeeded))
		synctest.Wait()
		m.breaks(hanging("Finish"))
		answered := make(chan error, 1)
		go func() {
			_, _, err := r.Execute(t.Context(), id)
			answered <- err
		}()
		time.Sleep(2 * time.Second)
		r.stop()
		if err := <-answered; !errors.Is(err, ErrStopping) {
			t.Errorf("Execute returned %v, want %v", err, ErrStopping)
		}
		r.wantState(id, task.Running, "", 0)
	})
}
