package dispatch

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/melodia/orchestrator/internal/task"
)

// unstored is a task that the store does not know.
func unstored() *task.Task { return &task.Task{ID: newID('u', 1)} }

// executeUnstored calls ExecuteUnstored in a goroutine.
func (r *rig) executeUnstored(ctx context.Context) <-chan ran {
	done := make(chan ran, 1)
	go func() {
		o, err := r.ExecuteUnstored(ctx, unstored())
		done <- ran{o, err, time.Since(r.began)}
	}()
	synctest.Wait()
	return done
}

type ran struct {
	task.Outcome
	err error
	at  time.Duration // since the rig was started
}

func (r *rig) wantRunning(want int) {
	r.t.Helper()
	if _, got := r.Health(); got != want {
		r.t.Errorf("%d calls are under way, want %d", got, want)
	}
}

func TestExecuteUnstored(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		r := start(t, options(), m, takes(time.Minute, broken))
		synctest.Wait()
		before := len(m.calls("Claim", "ClaimOne", "Finish"))
		done := r.executeUnstored(t.Context())
		r.wantRunning(1)
		if got := <-done; got.err != nil || got.Kind != broken.Kind || got.at != time.Minute {
			t.Errorf("ExecuteUnstored = %+v, %v after %v, want %+v after 1m", got.Outcome, got.err, got.at, broken)
		}
		r.wantRunning(0)
		if got := r.delivered(); len(got) != 1 || got[0].Task.ID != unstored().ID || got[0].Attempt != 1 || !got[0].ViaWorkerEndpoint {
			t.Errorf("got the calls %+v, want the first attempt of the task, via the worker endpoint", got)
		}
		if got := len(m.calls("Claim", "ClaimOne", "Finish")) - before; got != 0 {
			t.Errorf("the store was asked %d times, want never", got)
		}
	})
}

func TestExecuteUnstoredEndsWithItsCaller(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := start(t, options(), newMemory(), takes(time.Hour, succeeded))
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if got := <-r.executeUnstored(ctx); got.err != nil || got.Kind != task.OutcomeInterrupted || got.at != time.Second {
			t.Errorf("ExecuteUnstored = %+v, %v after %v, want it interrupted after 1s", got.Outcome, got.err, got.at)
		}
		errBored := errors.New("bored")
		bored, leave := context.WithCancelCause(t.Context())
		leave(errBored)
		if got := <-r.executeUnstored(bored); !errors.Is(got.err, errBored) {
			t.Errorf("ExecuteUnstored for a caller who has left returned %v, want %v", got.err, errBored)
		}
		if got := len(r.delivered()); got != 1 {
			t.Errorf("%d calls were made, want 1", got)
		}
	})
}

func TestExecuteUnstoredPanics(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := start(t, options(), newMemory(), func(context.Context, task.Call) task.Outcome { panic("oh no") })
		if got := <-r.executeUnstored(t.Context()); got.err != nil || got.Kind != task.OutcomeRetryable {
			t.Errorf("ExecuteUnstored = %+v, %v, want a retryable outcome", got.Outcome, got.err)
		}
		r.wantLine("attempt panicked", "ERROR")
		r.wantRunning(0)
	})
}

// It needs no store, and so neither a registration nor a lease.
func TestExecuteUnstoredWithoutTheStore(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		m.breaks(hanging())
		r := newRig(t, options(), m, takes(time.Minute, succeeded))
		early := r.executeUnstored(t.Context())
		r.run()
		synctest.Wait()
		r.wantHealth("starting")
		if got := <-early; got.err != nil || got.Kind != task.OutcomeSucceeded {
			t.Errorf("ExecuteUnstored without a registration = %+v, %v, want success", got.Outcome, got.err)
		}

		m.breaks(nil)
		time.Sleep(time.Minute)
		r.wantHealth("ok")
		done := r.executeUnstored(t.Context())
		m.forget(newID('w', 1))
		time.Sleep(heartbeatEvery)
		synctest.Wait()
		r.wantLine("lease lost, running calls are cut off", "WARN")
		if got := <-done; got.err != nil || got.Kind != task.OutcomeSucceeded {
			t.Errorf("ExecuteUnstored while the lease got lost = %+v, %v, want success", got.Outcome, got.err)
		}
	})
}

// In a shutdown it has the same grace as every other call, and Run waits for it.
func TestExecuteUnstoredInAShutdown(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		o := options()
		r := start(t, o, newMemory(), takes(o.Grace-time.Second, succeeded))
		synctest.Wait()
		begun := r.executeUnstored(t.Context())
		more := make(chan ran, 2)
		go func() {
			time.Sleep(2 * time.Second)
			more <- <-r.executeUnstored(t.Context()) // the first call may be its caller
			time.Sleep(time.Second)
			more <- <-r.executeUnstored(t.Context())
		}()
		if took := r.stop(); took != o.Grace {
			t.Errorf("Run took %v to stop, want %v", took, o.Grace)
		}
		if got := <-begun; got.err != nil || got.Kind != task.OutcomeSucceeded {
			t.Errorf("the call that was under way = %+v, %v, want success", got.Outcome, got.err)
		}
		if got := <-more; got.err != nil || got.Kind != task.OutcomeInterrupted || got.at != o.Grace {
			t.Errorf("the call that came back = %+v, %v after %v, want it interrupted after %v", got.Outcome, got.err, got.at, o.Grace)
		}
		if line := r.wantLine("running calls are cut off", "WARN"); line["count"] != 1.0 {
			t.Errorf("%v calls were cut off, want 1", line["count"])
		}
		if got := <-more; !errors.Is(got.err, ErrStopping) {
			t.Errorf("ExecuteUnstored after the stop returned %v, want %v", got.err, ErrStopping)
		}
	})
}

// A shutdown before the registration leaves it its grace.
func TestExecuteUnstoredInAShutdownWhileStarting(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		m.breaks(failing("Register"))
		r := start(t, options(), m, takes(5*time.Second, succeeded))
		synctest.Wait()
		done := r.executeUnstored(t.Context())
		if took := r.stop(); took != 5*time.Second {
			t.Errorf("Run took %v to stop, want 5s", took)
		}
		if got := <-done; got.err != nil || got.Kind != task.OutcomeSucceeded {
			t.Errorf("ExecuteUnstored = %+v, %v, want success", got.Outcome, got.err)
		}
	})
}

// When nothing is under way nothing can come back: nobody keeps Run from ending.
func TestExecuteUnstoredWhenIdleInAShutdown(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		r := start(t, options(), m, takes(time.Minute, succeeded))
		synctest.Wait()
		m.breaks(hanging("Unregister"))
		go r.stop()
		synctest.Wait()
		r.wantHealth("stopped")
		if got := <-r.executeUnstored(t.Context()); !errors.Is(got.err, ErrStopping) || got.at != 0 {
			t.Errorf("ExecuteUnstored = %v after %v, want %v at once", got.err, got.at, ErrStopping)
		}
	})
}

// Execute and ExecuteUnstored share a bound of their own: what is beyond it is neither
// claimed nor called, and tasks that are due keep their slots.
func TestDirectCallsAreBounded(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct{ concurrency, limit int }{
		"as many as the concurrency": {3, 3},
		"without a concurrency":      {0, defaultDirect},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				m := newMemory()
				o := options()
				o.Concurrency = tt.concurrency
				due := make([]task.ID, tt.concurrency)
				for i := range due {
					due[i] = m.store(1000+i, 0)
				}
				stored, refused := m.store(1, time.Hour), m.store(2, time.Hour)
				r := start(t, o, m, takes(time.Minute, succeeded))
				synctest.Wait()
				var once []<-chan ran
				for range tt.limit - 1 {
					once = append(once, r.executeUnstored(t.Context()))
				}
				now := make(chan error)
				go func() {
					_, _, err := r.Execute(t.Context(), stored)
					now <- err
				}()
				synctest.Wait()
				r.wantRunning(tt.concurrency + tt.limit)
				if got := <-r.executeUnstored(t.Context()); !errors.Is(got.err, task.ErrOverloaded) || got.at != 0 {
					t.Errorf("ExecuteUnstored = %v after %v, want %v at once", got.err, got.at, task.ErrOverloaded)
				}
				if _, _, err := r.Execute(t.Context(), refused); !errors.Is(err, task.ErrOverloaded) {
					t.Errorf("Execute = %v, want %v", err, task.ErrOverloaded)
				}
				if got := m.row(refused).claims; got != 0 {
					t.Errorf("the task that was refused was claimed %d times", got)
				}
				for _, done := range once {
					if got := <-done; got.err != nil {
						t.Errorf("ExecuteUnstored: %v", got.err)
					}
				}
				if err := <-now; err != nil {
					t.Errorf("Execute: %v", err)
				}
				synctest.Wait()
				for _, id := range due {
					r.wantState(id, task.Succeeded, "", 1)
				}
				if _, _, err := r.Execute(t.Context(), refused); err != nil {
					t.Errorf("Execute when others have ended: %v", err)
				}
				r.wantRunning(0)
			})
		})
	}
}
