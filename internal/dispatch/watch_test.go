package dispatch

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/melodia/orchestrator/internal/task"
)

// watch watches a task until the test ends.
func (r *rig) watch(id task.ID) <-chan struct{} {
	r.t.Helper()
	ended, leave, err := r.Watch(id)
	if err != nil {
		r.t.Fatalf("Watch: %v", err)
	}
	r.t.Cleanup(leave)
	return ended
}

// wantEnd waits for what is watched and checks how long that takes.
func (r *rig) wantEnd(ended <-chan struct{}, shortest, longest time.Duration) {
	r.t.Helper()
	start := time.Now()
	select {
	case <-ended:
	case <-time.After(time.Hour):
		r.t.Fatal("the watch did not end within an hour")
	}
	if took := time.Since(start); took < shortest || took > longest {
		r.t.Errorf("the watch ended after %v, want %v to %v", took, shortest, longest)
	}
}

func TestWatch(t *testing.T) {
	t.Parallel()
	t.Run("what ends here is known at once", func(t *testing.T) {
		t.Parallel()
		synctest.Test(t, func(t *testing.T) {
			m := newMemory()
			id := m.store(1, 3*time.Second)
			r := start(t, options(), m, takes(2*time.Second, succeeded))
			r.wantEnd(r.watch(id), 5*time.Second, 5*time.Second)
		})
	})
	t.Run("a retry is no end", func(t *testing.T) {
		t.Parallel()
		synctest.Test(t, func(t *testing.T) {
			m := newMemory()
			id := m.store(1, 0, func(tk *task.Task) { tk.Retry.MaxAttempts, tk.Retry.MinBackoff = 2, time.Minute })
			r := start(t, options(), m, takes(time.Second, broken))
			r.wantEnd(r.watch(id), 50*time.Second, 75*time.Second)
		})
	})
	t.Run("what ends elsewhere is known soon", func(t *testing.T) {
		t.Parallel()
		synctest.Test(t, func(t *testing.T) {
			m := newMemory()
			id := m.store(1, time.Hour)
			r := start(t, options(), m, takes(0, succeeded))
			ended := r.watch(id)
			time.Sleep(time.Minute)
			m.change(id, func(row *row) { row.State = task.Cancelled })
			r.wantEnd(ended, 0, 600*time.Millisecond)
		})
	})
	t.Run("also after the store was away", func(t *testing.T) {
		t.Parallel()
		synctest.Test(t, func(t *testing.T) {
			m := newMemory()
			id := m.store(1, time.Hour)
			r := start(t, options(), m, takes(0, succeeded))
			ended := r.watch(id)
			time.Sleep(time.Second)
			m.breaks(failing("Unfinished"))
			m.change(id, func(row *row) { row.State = task.Cancelled })
			time.Sleep(time.Minute)
			select {
			case <-ended:
				t.Error("the watch ended although nobody can know")
			default:
			}
			m.breaks(nil)
			r.wantEnd(ended, 0, 600*time.Millisecond)
		})
	})
	t.Run("what ended before, or never was, counts as ended", func(t *testing.T) {
		t.Parallel()
		synctest.Test(t, func(t *testing.T) {
			m := newMemory()
			id := m.store(1, 0)
			r := start(t, options(), m, takes(0, succeeded))
			time.Sleep(time.Second)
			r.wantEnd(r.watch(id), 0, 600*time.Millisecond)
			r.wantEnd(r.watch(taskID(99)), 0, 600*time.Millisecond)
		})
	})
	t.Run("all are told when the instance is stopped, and whoever comes later", func(t *testing.T) {
		t.Parallel()
		synctest.Test(t, func(t *testing.T) {
			m := newMemory()
			id := m.store(1, time.Hour)
			r := start(t, options(), m, takes(0, succeeded))
			ended := r.watch(id)
			time.Sleep(time.Minute)
			if took := r.stop(); took != 0 {
				t.Errorf("Run took %v to stop, want 0: watches keep nobody waiting", took)
			}
			r.wantEnd(ended, 0, 0)
			r.wantEnd(r.watch(id), 0, 0)
		})
	})
}

// However many watch, the store is asked for all of them together, and only
// while somebody does.
func TestWatchesAskTogether(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		r := start(t, options(), m, takes(0, succeeded))
		var leaves []func()
		for n := range maxWatches {
			_, leave, err := r.Watch(m.store(n%100, time.Hour))
			if err != nil {
				t.Fatalf("watch %d: %v", n, err)
			}
			leaves = append(leaves, leave)
		}
		if _, _, err := r.Watch(taskID(1)); !errors.Is(err, task.ErrOverloaded) {
			t.Errorf("one watch too many: %v, want ErrOverloaded", err)
		}
		time.Sleep(10 * time.Second)
		asked := m.calls("Unfinished")
		if len(asked) < 16 || len(asked) > 26 { // every half second, jittered
			t.Errorf("the store was asked %d times in 10 s, want some 20", len(asked))
		}
		for _, a := range asked {
			if a.limit != 100 {
				t.Errorf("asked for %d tasks, want the 100 that are watched", a.limit)
			}
		}
		for _, leave := range leaves {
			leave()
			leave() // changes nothing
		}
		time.Sleep(time.Second)
		before := len(m.calls("Unfinished"))
		time.Sleep(time.Minute)
		if after := len(m.calls("Unfinished")); after != before {
			t.Errorf("the store was asked %d times while nobody watched", after-before)
		}
		if _, leave, err := r.Watch(taskID(1)); err != nil {
			t.Errorf("after all have left: %v", err)
		} else {
			leave()
		}
	})
}
