package task_test

import (
	"math"
	"math/big"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/melodia/orchestrator/internal/task"
)

func seconds(ss ...float64) []time.Duration {
	ds := make([]time.Duration, len(ss))
	for i, s := range ss {
		ds[i] = time.Duration(s * float64(time.Second))
	}
	return ds
}

func TestBackoff(t *testing.T) {
	t.Parallel()
	policy := func(shortest, longest time.Duration, doublings int) task.RetryPolicy {
		return task.RetryPolicy{MinBackoff: shortest, MaxBackoff: longest, MaxDoublings: doublings}
	}
	tests := map[string]struct {
		policy task.RetryPolicy
		want   []time.Duration // of retries 1, 2, …
	}{
		// https://cloud.google.com/tasks/docs/reference/rest/v2/projects.locations.queues#RetryConfig
		"Google's example":            {policy(10*time.Second, 300*time.Second, 3), seconds(10, 20, 40, 80, 160, 240, 300, 300)},
		"defaults":                    {task.DefaultRetryPolicy(), seconds(1, 2, 4, 8, 16, 32, 64, 128, 256)},
		"no doubling":                 {policy(time.Second, time.Hour, 0), seconds(1, 2, 3, 4, 5)},
		"one doubling":                {policy(time.Second, time.Hour, 1), seconds(1, 2, 4, 6, 8)},
		"shortest legal":              {policy(10*time.Millisecond, time.Second, 30), seconds(.01, .02, .04, .08, .16, .32, .64, 1, 1)},
		"cap met exactly":             {policy(time.Second, 8*time.Second, 30), seconds(1, 2, 4, 8, 8)},
		"cap just missed":             {policy(time.Second, 8*time.Second-1, 30), []time.Duration{time.Second, 2 * time.Second, 4 * time.Second, 8*time.Second - 1}},
		"constant":                    {policy(5*time.Second, 5*time.Second, 16), seconds(5, 5, 5)},
		"min above max":               {policy(time.Minute, time.Second, 3), seconds(1, 1)},
		"nothing set":                 {task.RetryPolicy{}, seconds(0, 0)},
		"no cap is no wait":           {policy(time.Second, 0, 3), seconds(0, 0)},
		"negative min":                {policy(-time.Second, time.Hour, 3), seconds(0, 0, 0, 0, 0, 0)},
		"negative max":                {policy(time.Second, -time.Hour, 3), seconds(0, 0)},
		"negative doublings":          {policy(time.Second, time.Hour, -5), seconds(1, 2, 3)},
		"least doublings":             {policy(time.Second, time.Hour, math.MinInt), seconds(1, 2, 3)},
		"most doublings":              {policy(time.Second, time.Hour, math.MaxInt), seconds(1, 2, 4, 8)},
		"everything at most":          {policy(math.MaxInt64, math.MaxInt64, math.MaxInt), []time.Duration{math.MaxInt64, math.MaxInt64}},
		"everything at least":         {policy(math.MinInt64, math.MinInt64, math.MinInt), seconds(0, 0)},
		"more than a float's 53 bits": {policy(1<<53+1, math.MaxInt64, 0), []time.Duration{1<<53 + 1, 2 * (1<<53 + 1)}},
	}
	for name, tt := range tests {
		for i, want := range tt.want {
			if got := tt.policy.Backoff(i + 1); got != want {
				t.Errorf("%s: Backoff(%d) = %v, want %v", name, i+1, got, want)
			}
		}
	}
}

func TestBackoffOfAbsurdRetry(t *testing.T) {
	t.Parallel()
	p := task.RetryPolicy{MinBackoff: time.Second, MaxBackoff: time.Hour, MaxDoublings: 3}
	for n, want := range map[int]time.Duration{
		math.MinInt: time.Second, -1: time.Second, 0: time.Second, 1: time.Second,
		1 << 30: time.Hour, math.MaxInt: time.Hour,
	} {
		if got := p.Backoff(n); got != want {
			t.Errorf("Backoff(%d) = %v, want %v", n, got, want)
		}
	}
}

// modelBackoff goes from retry to retry in numbers without limit: the wait
// doubles MaxDoublings times, then grows by what it has reached each time.
func modelBackoff(p task.RetryPolicy, n int) time.Duration {
	wait := big.NewInt(int64(max(p.MinBackoff, 0)))
	limit := big.NewInt(int64(max(p.MaxBackoff, 0)))
	step := new(big.Int)
	for i := range n - 1 {
		if i <= max(p.MaxDoublings, 0) {
			step.Set(wait)
		}
		wait.Add(wait, step)
	}
	if wait.Cmp(limit) > 0 {
		wait = limit
	}
	return time.Duration(wait.Int64())
}

func TestBackoffMatchesModel(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		p := rapid.OneOf(legalPolicies, absurdPolicies).Draw(t, "policy")
		n := rapid.IntRange(1, 300).Draw(t, "n")
		if got, want := p.Backoff(n), modelBackoff(p, n); got != want {
			t.Errorf("%+v: Backoff(%d) = %v, want %v", p, n, got, want)
		}
	})
}

// legalPolicies are those that New accepts.
var legalPolicies = rapid.Custom(func(t *rapid.T) task.RetryPolicy {
	backoffs := rapid.Int64Range(int64(task.MinBackoffLimit), int64(task.MaxBackoffLimit))
	a, b := backoffs.Draw(t, "backoff"), backoffs.Draw(t, "backoff")
	return task.RetryPolicy{
		MaxAttempts:       rapid.IntRange(1, task.MaxAttemptsLimit).Draw(t, "max_attempts"),
		MaxRetryDuration:  time.Duration(rapid.Int64Range(0, int64(task.MaxRetryDurationLimit)).Draw(t, "max_retry_duration")),
		MinBackoff:        time.Duration(min(a, b)),
		MaxBackoff:        time.Duration(max(a, b)),
		MaxDoublings:      rapid.IntRange(0, task.MaxDoublingsLimit).Draw(t, "max_doublings"),
		RetryClientErrors: rapid.Bool().Draw(t, "retry_client_errors"),
	}
})

// absurdPolicies hold any numbers at all, the extreme ones often.
var absurdPolicies = rapid.Custom(func(t *rapid.T) task.RetryPolicy {
	return task.RetryPolicy{
		MaxAttempts:       int(absurdNumbers.Draw(t, "max_attempts")),
		MaxRetryDuration:  time.Duration(absurdNumbers.Draw(t, "max_retry_duration")),
		MinBackoff:        time.Duration(absurdNumbers.Draw(t, "min_backoff")),
		MaxBackoff:        time.Duration(absurdNumbers.Draw(t, "max_backoff")),
		MaxDoublings:      int(absurdNumbers.Draw(t, "max_doublings")),
		RetryClientErrors: rapid.Bool().Draw(t, "retry_client_errors"),
	}
})

var absurdNumbers = rapid.OneOf(
	rapid.Int64(),
	rapid.SampledFrom([]int64{math.MinInt64, math.MinInt64 + 1, -1, 0, 1, 2, 63, 64, 1 << 53, 1<<53 + 1, math.MaxInt64 / 2, math.MaxInt64 - 1, math.MaxInt64}),
)

func FuzzBackoff(f *testing.F) {
	f.Add(int64(10*time.Second), int64(300*time.Second), 3, 7)
	f.Add(int64(1), int64(math.MaxInt64), math.MaxInt, 65)
	f.Add(int64(math.MaxInt64), int64(math.MaxInt64), 0, math.MaxInt)
	f.Add(int64(0), int64(math.MaxInt64), math.MaxInt, math.MaxInt)
	f.Fuzz(func(t *testing.T, shortest, longest int64, doublings, n int) {
		p := task.RetryPolicy{MinBackoff: time.Duration(shortest), MaxBackoff: time.Duration(longest), MaxDoublings: doublings}
		got := p.Backoff(n)
		if got < 0 || got > max(p.MaxBackoff, 0) {
			t.Errorf("%+v: Backoff(%d) = %v, want it between 0 and the cap", p, n, got)
		}
		if n < math.MaxInt && p.Backoff(n+1) < got {
			t.Errorf("%+v: Backoff(%d) = %v, less than %v before", p, n+1, p.Backoff(n+1), got)
		}
		if 1 <= n && n <= 1000 && got != modelBackoff(p, n) {
			t.Errorf("%+v: Backoff(%d) = %v, want %v", p, n, got, modelBackoff(p, n))
		}
	})
}

func BenchmarkBackoff(b *testing.B) {
	p := task.DefaultRetryPolicy()
	b.ReportAllocs()
	for b.Loop() {
		_ = p.Backoff(9)
	}
}

func TestParseRetryFor(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]time.Duration{
		"6h": 6 * time.Hour, "90s": 90 * time.Second, "15m": 15 * time.Minute, "2d": 48 * time.Hour, "1d12h": 36 * time.Hour,
		"1h30m": 90 * time.Minute, "007s": 7 * time.Second, "0s": 0, "30m1h": 90 * time.Minute,
		"30d": task.MaxRetryFor, "720h": task.MaxRetryFor,
	} {
		if got, ok := task.ParseRetryFor(text); !ok || got != want {
			t.Errorf("%q: got %v, %t; want %v", text, got, ok, want)
		}
	}
	for _, text := range []string{"31d", "99999999d", "99999999d99999999d", "30d1s", "4294967295h"} {
		if got, ok := task.ParseRetryFor(text); !ok || got <= task.MaxRetryFor {
			t.Errorf("%q: got %v, %t; want more than the most", text, got, ok)
		}
	}
	for _, text := range []string{"", "6", "h", "6 h", "6H", "1.5h", "-1h", "+1h", "1h ", "6hh", "1w", "1ms", "PT6H", "4294967296s", "1h5"} {
		if got, ok := task.ParseRetryFor(text); ok {
			t.Errorf("%q is read as %v, want it refused", text, got)
		}
	}
}

// However failed attempts fall, retries go on for nearly as long as For says, and no longer:
// to within the longest wait, which is a tenth of it, with the most jitter.
func TestRetryForLasts(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		length := time.Duration(rapid.Int64Range(int64(20*time.Second), int64(task.MaxRetryFor)).Draw(t, "for"))
		change := task.RetryChange{For: &length}
		if rapid.Bool().Draw(t, "own backoffs") {
			change.MaxBackoff = new(time.Duration(rapid.Int64Range(int64(time.Second), int64(task.MaxBackoffLimit)).Draw(t, "max_backoff")))
		}
		policy := change.In(task.DefaultRetryPolicy())
		if errs := change.CheckFor(policy); errs != nil {
			if change.MaxBackoff == nil {
				t.Fatalf("the default backoffs do not last for %v: %v", length, errs)
			}
			return
		}
		at := time.Date(2026, 11, 30, 0, 0, 0, 0, time.UTC)
		c := &task.Claim{Task: &task.Task{Spec: task.Spec{Retry: policy}}, At: at, FirstAt: at}
		end := at.Add(length)
		for {
			d := c.Next(task.Outcome{Kind: task.OutcomeRetryable}, at, rapid.Float64Range(0, 0.999).Draw(t, "random"))
			if d.State != task.Pending {
				if d.Reason != task.RetryDurationExhausted {
					t.Fatalf("retries for %v end %v before that: %s", length, end.Sub(at), d.Reason)
				}
				break
			}
			c.Task.AttemptCount++
			at = at.Add(d.Wait)
		}
		longest := policy.MaxBackoff + policy.MaxBackoff/5
		if left := end.Sub(at); left < 0 || left > longest {
			t.Fatalf("the last attempt begins %v before the end of %v, want %v at most", left, length, longest)
		}
		if change.MaxBackoff == nil && policy.MaxBackoff > max(length/10, policy.MinBackoff) {
			t.Fatalf("waits of up to %v in %v", policy.MaxBackoff, length)
		}
	})
}

func TestRetryForThatCannotLast(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		change task.RetryChange
		says   string
	}{
		"too short":          {task.RetryChange{For: new(999 * time.Millisecond)}, "must be between 1s and 30d"},
		"too long":           {task.RetryChange{For: new(task.MaxRetryFor + 1)}, "must be between 1s and 30d"},
		"without a retry":    {task.RetryChange{For: new(time.Minute), MinBackoff: new(time.Minute)}, "must be longer than min_backoff_seconds: else there is no retry"},
		"short waits":        {task.RetryChange{For: new(time.Hour), MaxBackoff: new(10 * time.Second)}, "must be at most 772s with these backoffs, since a task is called 100 times at most: raise max_backoff_seconds, or leave it out"},
		"waits without grow": {task.RetryChange{For: new(24 * time.Hour), MaxDoublings: new(0)}, "must be at most 3960s with these backoffs, since a task is called 100 times at most: raise max_backoff_seconds, or leave it out"},
	} {
		errs := tt.change.CheckFor(tt.change.In(task.DefaultRetryPolicy()))
		if len(errs) != 1 || errs[0].Message != tt.says {
			t.Errorf("%s: got %v, want %q", name, errs, tt.says)
		}
	}
	if errs := (&task.RetryChange{MaxAttempts: new(1)}).CheckFor(task.RetryPolicy{}); errs != nil {
		t.Errorf("without For: got %v", errs)
	}
}
