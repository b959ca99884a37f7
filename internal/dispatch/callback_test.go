package dispatch

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/melodia/orchestrator/internal/task"
)

// A callback is made when the task has ended, and not only when the store is
// looked at again; also where the store did not answer that there is one.
func TestCallbacksDoNotWait(t *testing.T) {
	t.Parallel()
	for name, lost := range map[string]bool{"the answer came": false, "the answer was lost": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := newMemory()
				m.breaks(func(_ context.Context, op string, do func()) error {
					do()
					if lost && op == "Finish" && len(m.calls("Finish")) == 1 {
						return errStoreAway
					}
					return nil
				})
				o := options()
				o.PollInterval = time.Hour
				id := m.store(1, 0, func(tk *task.Task) { tk.OnSuccess = &task.Callback{URL: "https://target.example/ended"} })
				r := start(t, o, m, takes(time.Second, succeeded))
				time.Sleep(10 * time.Second)
				r.wantState(id, task.Succeeded, "", 1)
				calls := r.delivered()
				if len(calls) != 2 || calls[1].Task.URL != "https://target.example/ended" {
					t.Fatalf("the calls are %+v, want the task's and its callback's", calls)
				}
				if wait := calls[1].after - calls[0].after - time.Second; wait > 100*time.Millisecond || wait > 0 && !lost {
					t.Errorf("the callback is made %v after the end", wait)
				}
				r.wantState(calls[1].Task.ID, task.Succeeded, "", 1)
			})
		})
	}
}
