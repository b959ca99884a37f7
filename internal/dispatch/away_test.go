package dispatch

import (
	"context"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/melodia/orchestrator/internal/task"
)

// A target is away: no task of the default policy is given up within an hour, and each is
// called again when the target is back. The same holds for six hours where the task says so.
func TestTargetAway(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		away   time.Duration
		change task.RetryChange
	}{
		"an hour, by default":     {away: time.Hour},
		"50 minutes, for an hour": {50 * time.Minute, task.RetryChange{For: new(time.Hour)}},
		"five hours, for six":     {5 * time.Hour, task.RetryChange{For: new(6 * time.Hour)}},
	} {
		for _, tasks := range []int{1, 50} { // one alone, and so many that its host counts as broken
			t.Run(fmt.Sprintf("%s, %d tasks", name, tasks), func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) {
					m := newMemory()
					back := time.Now().Add(tt.away)
					r := start(t, options(), m, func(context.Context, task.Call) task.Outcome {
						if time.Now().Before(back) {
							return task.Outcome{Kind: task.OutcomeRetryable, Error: "no connection"}
						}
						return succeeded
					})
					for n := range tasks {
						tk := newTask(n+1, 0)
						tk.Retry = tt.change.In(task.DefaultRetryPolicy())
						if err := r.Submit(t.Context(), tk); err != nil {
							t.Fatal(err)
						}
					}
					time.Sleep(tt.away + tt.away/2 + 2*time.Hour)
					for n := range tasks {
						m.mu.Lock()
						got := m.rows[newTask(n+1, 0).ID].Task
						m.mu.Unlock()
						if got.State != task.Succeeded {
							t.Errorf("task %d of %d is %s (%s) after %d attempts", n, tasks, got.State, got.Reason, got.AttemptCount)
						}
					}
				})
			})
		}
	}
}
