package dispatch

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/melodia/orchestrator/internal/task"
)

// A task that waits for a resume, a permit or its host expires when a plain one does, not when
// its turn comes.
func TestWaitingTasksExpire(t *testing.T) {
	t.Parallel()
	const lives = 5 * time.Second
	for name, tt := range map[string]struct {
		queue task.Queue
		host  bool // the host is broken
	}{
		"a paused queue":               {queue: task.Queue{Name: "mail", PausedAt: time.Now()}},
		"a permit that is not free":    {queue: task.Queue{Name: "mail", QueueSettings: task.QueueSettings{Limits: task.Limits{MaxConcurrent: 1}}}},
		"a broken host":                {queue: task.Queue{Name: "mail"}, host: true},
		"an ordered key behind a head": {queue: task.Queue{Name: "mail", QueueSettings: task.QueueSettings{PerKey: task.KeyLimits{Ordered: true}}}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				m := newMemory()
				m.setQueue(tt.queue)
				if tt.host {
					if _, saved, err := m.SaveHost(t.Context(), task.Host{Name: targetHost, OpenFor: time.Hour, Opened: 1, Allowed: 1}); err != nil || !saved {
						t.Fatalf("SaveHost = %t, %v", saved, err)
					}
				}
				head := m.store(1, 0, in("mail", "k"))
				expires := m.store(2, 0, in("mail", "k"), func(tk *task.Task) { tk.ExpiresAt = tk.CreatedAt.Add(lives) })
				stays := m.store(3, 0, in("mail", "k"), func(tk *task.Task) { tk.ExpiresAt = tk.CreatedAt.Add(time.Hour) })
				r := start(t, options(), m, func(ctx context.Context, _ task.Call) task.Outcome {
					<-ctx.Done()
					return task.Outcome{Kind: task.OutcomeInterrupted}
				})
				r.knows()
				time.Sleep(lives - time.Second)
				if got := m.row(expires); got.State != task.Pending {
					t.Errorf("before it expires the task is %s", got.State)
				}
				time.Sleep(4 * time.Second)
				if got := m.row(expires); got.State != task.Failed || got.Reason != task.Expired || len(got.Attempts) > 0 {
					t.Errorf("3 s after it expired the task is %s (%s), with %d attempts; want failed, expired, without any", got.State, got.Reason, len(got.Attempts))
				}
				for _, id := range []task.ID{head, stays} {
					if got := m.row(id); got.State.Terminal() {
						t.Errorf("a task that has not expired is %s", got.State)
					}
				}
			})
		})
	}
}
