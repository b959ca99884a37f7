package task_test

import (
	"strings"
	"testing"
	"time"

	"github.com/melodia/orchestrator/internal/task"
)

// Where something on the way ended a call, the target goes on with it: another one would run beside it.
func TestHiddenOutcome(t *testing.T) {
	t.Parallel()
	const timeout, backoff = 15 * time.Minute, 8 * time.Second
	answered := func(code int, after time.Duration) task.Outcome {
		return task.Outcome{Kind: task.Classify(code), StatusCode: code, Error: "it failed", Duration: after}
	}
	severed := func(after time.Duration) task.Outcome {
		return task.Outcome{Kind: task.OutcomeRetryable, Severed: true, Error: "it failed", Duration: after}
	}
	with := func(o task.Outcome, change func(*task.Outcome)) task.Outcome { change(&o); return o }
	for name, tt := range map[string]struct {
		outcome task.Outcome
		hidden  bool
		wait    time.Duration
	}{
		"504 of nginx":                 {answered(504, time.Minute), true, 14 * time.Minute},
		"504 of haproxy":               {answered(504, 50*time.Second), true, 14*time.Minute + 10*time.Second},
		"502 of Apache httpd":          {answered(502, time.Minute), true, 14 * time.Minute},
		"524 of Cloudflare":            {answered(524, 100*time.Second), true, 13*time.Minute + 20*time.Second},
		"gunicorn's end":               {severed(30 * time.Second), true, 14*time.Minute + 30*time.Second},
		"just hidden":                  {severed(20*time.Second + 1), true, 14*time.Minute + 40*time.Second - 1},
		"nearly at the timeout":        {severed(timeout - time.Second), true, backoff},
		"beyond the timeout":           {answered(504, timeout+time.Second), true, backoff},
		"504 at once":                  {answered(504, time.Second), false, backoff},
		"504 after 20 s":               {answered(504, 20*time.Second), false, backoff},
		"closed at once":               {severed(time.Millisecond), false, backoff},
		"500, which the target says":   {answered(500, time.Minute), false, backoff},
		"503, which refuses":           {answered(503, time.Minute), false, backoff},
		"no connection":                {task.Outcome{Kind: task.OutcomeRetryable, Error: "it failed", Duration: time.Minute}, false, backoff},
		"a timeout of ours":            {with(severed(time.Minute), func(o *task.Outcome) { o.TimedOut = true }), false, backoff},
		"a longer Retry-After":         {with(answered(504, time.Minute), func(o *task.Outcome) { o.RetryAfter = time.Hour }), true, time.Hour},
		"a shorter Retry-After":        {with(answered(504, time.Minute), func(o *task.Outcome) { o.RetryAfter = time.Minute }), true, 14 * time.Minute},
		"the target asks to be called": {with(answered(502, time.Minute), func(o *task.Outcome) { o.Snooze = time.Second }), true, time.Second},
	} {
		c := claimOf(0, func(c *task.Claim) { c.Task.Timeout = timeout })
		o := tt.outcome
		o.TellHidden()
		d := c.Next(o, began, middle)
		if got, want := resultOf(d), (result{State: task.Pending, Wait: tt.wait}); got != want {
			t.Errorf("%s: got %+v, want %+v", name, got, want)
		}
		says := strings.Contains(o.Error, "a proxy or server on the way has most likely cut the call") && strings.Contains(o.Error, "nginx")
		if !strings.HasPrefix(o.Error, "it failed") || says != tt.hidden || o.Hidden() != tt.hidden {
			t.Errorf("%s: hidden is %t, want %t; its error is %q", name, o.Hidden(), tt.hidden, o.Error)
		}
	}
	if o := (task.Outcome{Kind: task.OutcomeSucceeded, StatusCode: 200, Duration: time.Hour, Severed: true}); o.Hidden() {
		t.Error("a success is hidden")
	}
}
