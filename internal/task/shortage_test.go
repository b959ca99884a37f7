package task_test

import (
	"testing"
	"time"

	"github.com/melodia/orchestrator/internal/task"
)

func TestShortageIsNotCounted(t *testing.T) {
	t.Parallel()
	for _, kind := range []task.Shortage{task.ShortageDescriptors, task.ShortageMemory, task.ShortagePorts, task.ShortageResolver} {
		// The last attempt that there may be, under claims of which more and more were not counted.
		for uncounted, want := range seconds(1, 2, 4, 8, 8, 8) {
			c := claimOf(4, func(c *task.Claim) { c.Number = int64(5 + uncounted) })
			d := c.Next(task.Outcome{Kind: task.OutcomeInterrupted, Shortage: kind, Error: string(kind)}, began, middle)
			if got, want := resultOf(d), (result{State: task.Pending, Wait: want}); got != want || d.Counted {
				t.Errorf("%q after %d claims without a count: got %+v, counted %t, want %+v, not counted", kind, uncounted, got, d.Counted, want)
			}
			if a := d.Attempt; a == nil || a.Outcome != task.OutcomeInterrupted || a.Error != string(kind) || a.Number != 5 {
				t.Errorf("%q: the attempt is %+v, want it interrupted, as number 5, with the shortage", kind, a)
			}
		}
	}
}

func firstClaim(c *task.Claim) { c.Number = 1 }

func TestShortageIsJittered(t *testing.T) {
	t.Parallel()
	o := task.Outcome{Kind: task.OutcomeInterrupted, Shortage: task.ShortagePorts}
	for random, want := range map[float64]time.Duration{lowest: 800 * time.Millisecond, middle: time.Second, highest: 1200 * time.Millisecond} {
		if got := claimOf(0, firstClaim).Next(o, began, random).Wait; got != want {
			t.Errorf("random %v: Wait = %v, want %v", random, got, want)
		}
	}
}

// TestShortageEndsNothingButWhatIsBounded has a task that was never called, and whose next
// attempt would begin 11 s after its first claim.
func TestShortageEndsNothingButWhatIsBounded(t *testing.T) {
	t.Parallel()
	const next = 11 * time.Second
	tests := map[string]struct {
		duration, expires time.Duration
		cancelled         bool
		want              result
	}{
		"no bound":           {0, 0, false, result{State: task.Pending, Wait: time.Second}},
		"both just enough":   {next, next, false, result{State: task.Pending, Wait: time.Second}},
		"duration too short": {next - 1, 0, false, result{State: task.Failed, Reason: task.RetryDurationExhausted}},
		"expires too early":  {0, next - 1, false, result{State: task.Failed, Reason: task.Expired}},
		"cancelled":          {next - 1, 0, true, result{State: task.Cancelled}},
	}
	for name, tt := range tests {
		c := claimOf(0, func(c *task.Claim) {
			firstClaim(c)
			c.Task.Retry.MaxRetryDuration = tt.duration
			if tt.expires != 0 {
				c.Task.ExpiresAt = began.Add(tt.expires)
			}
		})
		o := task.Outcome{Kind: task.OutcomeInterrupted, Shortage: task.ShortageDescriptors, Cancelled: tt.cancelled}
		d := c.Next(o, began.Add(next-time.Second), middle)
		if got := resultOf(d); got != tt.want || d.Counted {
			t.Errorf("%s: got %+v, counted %t, want %+v, not counted", name, got, d.Counted, tt.want)
		}
	}
}
