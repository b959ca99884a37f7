package dispatch

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/melodia/orchestrator/internal/task"
)

// A call that is to be cancelled ends at once where the instance is told, and
// with the next heartbeat where it is not.
func TestCancelCutsACallOff(t *testing.T) {
	t.Parallel()
	for name, told := range map[string]bool{"told": true, "by the heartbeat": false} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := newMemory()
				id, other := m.store(1, 0), m.store(2, 0)
				r := start(t, options(), m, takes(20*time.Second, succeeded))
				time.Sleep(time.Second)
				claim := m.cancel(id)
				if claim != 1 {
					t.Fatalf("the task runs under claim %d, want 1", claim)
				}
				// Another claim's call is none of its business.
				r.CutOff(map[task.ID]int64{id: claim + 1, other: claim - 1})
				synctest.Wait()
				r.wantState(id, task.Running, "", 0)
				if told {
					r.CutOff(map[task.ID]int64{id: claim})
					synctest.Wait()
				} else {
					time.Sleep(options().Lease / 5)
					synctest.Wait()
				}
				r.wantState(id, task.Cancelled, "", 0)
				r.wantState(other, task.Running, "", 0)
				got := m.row(id).Attempts
				if len(got) != 1 || got[0].Outcome != task.OutcomeInterrupted || got[0].Error != "the task was cancelled before the call ended" {
					t.Errorf("its story is %+v, want one interrupted attempt that says why", got)
				}
				r.wantLine("task cancelled", "INFO")
				time.Sleep(time.Minute)
				r.wantState(id, task.Cancelled, "", 0)
				r.wantState(other, task.Succeeded, "", 1)
				if n := len(r.delivered()); n != 2 {
					t.Errorf("%d calls were made, want 2", n)
				}
			})
		})
	}
}

// A call that was asked for is cut off like any other.
func TestCancelOfATaskThatIsExecute(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		id := m.store(1, time.Hour)
		r := start(t, options(), m, takes(20*time.Second, succeeded))
		synctest.Wait()
		began := time.Now()
		time.AfterFunc(time.Second, func() { r.CutOff(map[task.ID]int64{id: m.cancel(id)}) })
		_, decision, err := r.Execute(t.Context(), id)
		if took := time.Since(began); err != nil || decision.State != task.Cancelled || took != time.Second {
			t.Errorf("Execute = %s, %v after %v, want cancelled after 1 s", decision.State, err, took)
		}
	})
}

// What a task comes to before it is cut off stays, but it is not tried again.
func TestCancelOfACallThatEndsByItself(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		outcome task.Outcome
		state   task.State
		reason  task.Reason
	}{
		"well":          {succeeded, task.Succeeded, ""},
		"for good":      {task.Outcome{Kind: task.OutcomePermanent, StatusCode: 404}, task.Failed, task.ClientError},
		"for the while": {broken, task.Cancelled, ""},
	} {
		for _, told := range []bool{true, false} {
			t.Run(name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					m := newMemory()
					id := m.store(1, 0)
					// A target that cannot be cut off.
					r := start(t, options(), m, func(context.Context, task.Call) task.Outcome {
						time.Sleep(time.Second)
						return tt.outcome
					})
					synctest.Wait()
					if claim := m.cancel(id); told {
						r.CutOff(map[task.ID]int64{id: claim})
					}
					time.Sleep(time.Minute)
					r.wantState(id, tt.state, tt.reason, 1)
					if n := len(r.delivered()); n != 1 {
						t.Errorf("%d calls were made, want 1", n)
					}
				})
			})
		}
	}
}

// Who cuts one call off cuts off no other, though they have a slot, and all that
// goes with it, one after the other.
func TestCutOffIsOfOneCall(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		o := options()
		o.Concurrency = 1
		ended, cancelled, other := m.store(1, 0), m.store(2, 0), m.store(3, 0)
		m.breaks(func(_ context.Context, op string, do func()) error {
			if op == "Finish" && len(m.calls("Finish")) == 1 {
				time.Sleep(3 * time.Second)
			}
			do()
			return nil
		})
		r := start(t, o, m, func(ctx context.Context, c task.Call) task.Outcome {
			if c.Task.ID == ended {
				return succeeded
			}
			return takes(10*time.Second, succeeded)(ctx, c)
		})
		time.Sleep(time.Second) // the second call is under way, and what came of the first is being written
		r.CutOff(map[task.ID]int64{ended: 1})
		time.Sleep(time.Second)
		r.wantState(cancelled, task.Running, "", 0)
		r.CutOff(map[task.ID]int64{cancelled: 1})
		time.Sleep(time.Minute)
		r.wantState(ended, task.Succeeded, "", 1)
		r.wantState(cancelled, task.Cancelled, "", 0)
		r.wantState(other, task.Succeeded, "", 1)
		r.wantDelivered(0, 0, 2*time.Second)
	})
}

// A wish that outlived the instance which should have heard of it ends the
// task without another call.
func TestCancelOfALostTask(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		id := m.store(1, 0)
		m.change(id, func(r *row) { r.CancelRequestedAt = m.now() })
		r := start(t, options(), m, takes(0, succeeded))
		synctest.Wait()
		r.wantState(id, task.Cancelled, "", 0)
		r.wantDelivered()
	})
}

// A task that became due in the store begins when the instance is told.
func TestWake(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		o := options()
		o.PollInterval = time.Hour
		id := m.store(1, 30*time.Minute)
		r := start(t, o, m, takes(0, succeeded))
		time.Sleep(time.Second)
		m.change(id, func(r *row) { r.RunAt = m.now() })
		r.Wake()
		synctest.Wait()
		r.wantState(id, task.Succeeded, "", 1)
		r.wantDelivered(time.Second)
	})
}
