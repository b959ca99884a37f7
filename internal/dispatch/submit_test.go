package dispatch

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/melodia/orchestrator/internal/task"
)

// ops are the names of the calls of the store that concern tasks.
func (r *rig) ops() (names []string) {
	for _, a := range r.store.calls("Insert", "InsertClaimed", "Claim", "Finish") {
		names = append(names, a.op)
	}
	return names
}

func (r *rig) wantOps(want ...string) {
	r.t.Helper()
	got := r.ops()
	if len(got) != len(want) {
		r.t.Errorf("the store was asked for %v, want %v", got, want)
		return
	}
	for i := range got {
		if got[i] != want[i] {
			r.t.Errorf("the store was asked for %v, want %v", got, want)
			return
		}
	}
}

func (r *rig) submit(n int, delay time.Duration) task.ID {
	r.t.Helper()
	t := newTask(n, delay)
	if err := r.Submit(r.t.Context(), t); err != nil {
		r.t.Errorf("Submit = %v, want nil", err)
	}
	return t.ID
}

func TestSubmit(t *testing.T) {
	t.Parallel()
	run := func(name string, concurrency int, test func(t *testing.T, r *rig)) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				o := options()
				o.Concurrency = concurrency
				r := start(t, o, newMemory(), takes(10*time.Second, succeeded))
				synctest.Wait()
				test(t, r)
			})
		})
	}
	run("due now, with a free slot", 1, func(t *testing.T, r *rig) {
		id := r.submit(1, 0)
		synctest.Wait()
		r.wantDelivered(0)
		time.Sleep(11 * time.Second)
		r.wantState(id, task.Succeeded, "", 1)
		r.wantOps("InsertClaimed", "Finish")
	})
	run("due now, without a free slot", 1, func(t *testing.T, r *rig) {
		r.submit(1, 0)
		id := r.submit(2, 0)
		time.Sleep(21 * time.Second)
		r.wantDelivered(0, 10*time.Second)
		r.wantState(id, task.Succeeded, "", 1)
	})
	run("due later", 1, func(t *testing.T, r *rig) {
		id := r.submit(1, 3*time.Second)
		time.Sleep(14 * time.Second)
		r.wantDelivered(3 * time.Second)
		r.wantState(id, task.Succeeded, "", 1)
	})
	run("takes its turn behind a backlog", 1, func(t *testing.T, r *rig) {
		for n := range 3 {
			r.store.store(n, 0)
		}
		time.Sleep(5 * time.Second) // the first is under way
		last := r.submit(4, 0)
		time.Sleep(40 * time.Second)
		calls := r.delivered()
		if len(calls) != 4 || calls[3].Task.ID != last {
			t.Errorf("calls %v, want the submitted task's last", calls)
		}
	})
	run("an instance that only takes tasks", 0, func(t *testing.T, r *rig) {
		r.submit(1, 0)
		r.wantOps("Insert")
	})
	run("the lease was lost", 1, func(t *testing.T, r *rig) {
		r.store.forget(newID('w', 1))
		id := r.submit(1, 0)
		r.wantState(id, task.Pending, "", 0)
		time.Sleep(20 * time.Second) // it registers anew
		r.wantState(id, task.Succeeded, "", 1)
	})
	run("the store is away", 1, func(t *testing.T, r *rig) {
		r.store.breaks(failing("InsertClaimed"))
		for n := range 3 { // more often than there are slots
			if err := r.Submit(t.Context(), newTask(n, 0)); !errors.Is(err, task.ErrUnavailable) {
				t.Errorf("Submit = %v, want ErrUnavailable", err)
			}
		}
		r.store.breaks(nil)
		id := r.submit(4, 0)
		time.Sleep(11 * time.Second)
		r.wantState(id, task.Succeeded, "", 1)
	})
	run("the instance is stopped meanwhile", 1, func(t *testing.T, r *rig) {
		stored, goOn := make(chan struct{}), make(chan struct{})
		r.store.breaks(func(_ context.Context, op string, do func()) error {
			do()
			if op == "InsertClaimed" {
				close(stored)
				<-goOn
			}
			return nil
		})
		submitted, stopped := make(chan task.ID), make(chan struct{})
		go func() { submitted <- r.submit(1, 0) }()
		<-stored
		go func() { r.stop(); close(stopped) }()
		synctest.Wait()
		close(goOn)
		id := <-submitted
		<-stopped
		r.wantDelivered()
		r.wantState(id, task.Pending, "", 0) // somebody else's
		if story := r.store.row(id).Attempts; len(story) > 0 {
			t.Errorf("its story has %v, want nothing", story)
		}
	})
	run("the caller gives up", 1, func(t *testing.T, r *rig) {
		r.store.breaks(func(ctx context.Context, op string, do func()) error {
			if op == "InsertClaimed" {
				select {
				case <-time.After(time.Second):
				case <-ctx.Done():
				}
			}
			do() // a flush under way is carried out
			return ctx.Err()
		})
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		tk := newTask(1, 0)
		tk.Retry.MaxAttempts = 1
		_ = r.Submit(ctx, tk)
		time.Sleep(30 * time.Second)
		r.wantState(tk.ID, task.Succeeded, "", 1)
	})
}

// Slots are free again when calls have ended, but not without end while nothing
// can be written down.
func TestUnwrittenResultsAreBounded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		for n := range 100 {
			m.store(n, 0)
		}
		m.breaks(failing("Finish"))
		o := options()
		o.Concurrency = 5
		r := start(t, o, m, takes(time.Second, succeeded))
		time.Sleep(time.Minute)
		if got := len(r.delivered()); got != maxUnfinished*o.Concurrency {
			t.Errorf("%d calls were made while no result could be written, want %d", got, maxUnfinished*o.Concurrency)
		}
		m.breaks(nil)
		time.Sleep(time.Minute)
		if got := len(r.delivered()); got != 100 {
			t.Errorf("%d calls were made, want 100", got)
		}
	})
}

// A batch is claimed in the usual way, when the first of it is due: nobody looks
// for it before, and nobody waits for a poll.
func TestSubmitBatch(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		o := options()
		o.Concurrency, o.PollInterval = 2, time.Hour
		r := start(t, o, newMemory(), takes(10*time.Second, succeeded))
		synctest.Wait()
		submit := func(delays ...time.Duration) {
			b := &task.Batch{}
			for i, delay := range delays {
				b.Tasks = append(b.Tasks, newTask(len(r.store.rows)+i, delay))
			}
			if err := r.SubmitBatch(t.Context(), b); err != nil {
				t.Errorf("SubmitBatch = %v, want nil", err)
			}
		}
		submit(30*time.Second, 3*time.Second, 20*time.Second)
		time.Sleep(60 * time.Second)
		r.wantDelivered(3*time.Second, 20*time.Second, 30*time.Second)
		submit(0, 0, 0)
		time.Sleep(60 * time.Second)
		r.wantDelivered(3*time.Second, 20*time.Second, 30*time.Second, 60*time.Second, 60*time.Second, 70*time.Second)
		if n := len(r.store.calls("InsertBatch")); n != 2 {
			t.Errorf("the store was asked to insert %d batches, want 2", n)
		}
		r.store.breaks(failing("InsertBatch"))
		if err := r.SubmitBatch(t.Context(), &task.Batch{Tasks: []*task.Task{newTask(9, 0)}}); err == nil {
			t.Error("SubmitBatch = nil, though the store failed")
		}
	})
}
