package task_test

import (
	"slices"
	"testing"
	"time"

	"github.com/melodia/orchestrator/internal/task"
)

func TestExplain(t *testing.T) {
	t.Parallel()
	tried := func(n int, o task.Kind, status int, err string) []task.Attempt {
		return []task.Attempt{{Number: n, Outcome: o, StatusCode: status, Error: err}}
	}
	ago := func(d time.Duration) time.Time { return noon.Add(-d) }
	const answered503 = "the target answered 503 Service Unavailable"
	alive := task.Facts{Instances: 2, Slots: 400, Running: 17, InstanceSeenAt: ago(time.Second)}
	held := task.Facts{ClaimedAt: ago(3 * time.Second), Holder: "api-1 1.0.0", HolderSeenAt: ago(4 * time.Second)}
	for name, tt := range map[string]struct {
		task  task.Task
		facts task.Facts
		want  string
	}{
		"due later": {
			task.Task{State: task.Pending, RunAt: noon.Add(37 * time.Second)}, alive,
			"It is due in 37 s.",
		},
		"due in days": {
			task.Task{State: task.Pending, RunAt: noon.Add(80 * time.Hour)}, alive,
			"It is due in 3 days.",
		},
		"waiting for a retry": {
			task.Task{State: task.Pending, RunAt: noon.Add(5 * time.Minute), AttemptCount: 2, Attempts: tried(2, task.OutcomeRetryable, 503, answered503)}, alive,
			"It is due in 5 min for attempt 3 of 10, since attempt 2 failed: the target answered 503 Service Unavailable.",
		},
		"redriven, not tried again yet": {
			task.Task{State: task.Pending, RunAt: noon.Add(5 * time.Minute), Round: 2, Attempts: tried(2, task.OutcomeRetryable, 503, answered503)}, alive,
			"It is due in 5 min for attempt 1 of 10, since it was redriven.",
		},
		"expired, not yet failed": {
			task.Task{State: task.Pending, RunAt: ago(time.Minute), Spec: task.Spec{ExpiresAt: ago(3 * time.Hour)}}, alive,
			"It expired 3 h ago: when its turn comes it fails, without another attempt.",
		},
		"due, the next": {
			task.Task{State: task.Pending, RunAt: ago(200 * time.Millisecond)}, alive,
			"It has been due for 0.2 s; it is the next one.",
		},
		"due, behind one": {
			task.Task{State: task.Pending, RunAt: noon}, task.Facts{Instances: 1, Ahead: 1},
			"It has been due for 0.0 s; 1 task is ahead of it.",
		},
		"due, all busy": {
			task.Task{State: task.Pending, RunAt: ago(90 * time.Second)}, task.Facts{Instances: 2, Slots: 400, Running: 400, Ahead: 312},
			"It has been due for 90 s, but all 400 slots of 2 instances are busy; 312 tasks are ahead of it.",
		},
		"due, one instance busy, many ahead": {
			task.Task{State: task.Pending, RunAt: ago(time.Hour)}, task.Facts{Instances: 1, Slots: 200, Running: 200, Ahead: task.MaxAhead},
			"It has been due for 60 min, but all 200 slots of 1 instance are busy; 10000 tasks or more are ahead of it.",
		},
		"due, slots are not known": {
			task.Task{State: task.Pending, RunAt: ago(time.Minute)}, task.Facts{Instances: 2, Running: 400, Ahead: 3},
			"It has been due for 60 s; 3 tasks are ahead of it.",
		},
		"due, nobody there": {
			task.Task{State: task.Pending, RunAt: ago(time.Minute)}, task.Facts{},
			"It has been due for 60 s, but no instance carries out tasks.",
		},
		"due, nobody there any more": {
			task.Task{State: task.Pending, RunAt: ago(time.Minute)}, task.Facts{InstanceSeenAt: ago(2 * time.Hour)},
			"It has been due for 60 s, but no instance carries out tasks: the last one was seen 2 h ago.",
		},
		"after an instance was lost": {
			task.Task{State: task.Pending, RunAt: ago(time.Second), AttemptCount: 1, Attempts: tried(1, task.OutcomeLost, 0, "no result of this attempt was recorded: its instance died, stalled or lost track of it; the call may not have been made")}, alive,
			"It has been due for 1.0 s for attempt 2 of 10, since attempt 1 failed: no result of this attempt was recorded: its instance died, stalled or lost track of it; the call may not have been made; it is the next one. " +
				"The target may have got 1 attempt without a result: 1 lost.",
		},
		"interrupted and snoozed on the way": {
			task.Task{State: task.Succeeded, FinishedAt: ago(3 * time.Hour), AttemptCount: 1, SnoozeCount: 2, Attempts: slices.Concat(
				tried(1, task.OutcomeInterrupted, 0, "the call was called off before it ended"), tried(1, task.OutcomeSnoozed, 503, answered503),
				tried(1, task.OutcomeInterrupted, 0, string(task.ShortagePorts)), tried(1, task.OutcomeSnoozed, 503, answered503), tried(1, task.OutcomeSucceeded, 204, ""))}, alive,
			"It succeeded 3 h ago at attempt 1 of 10: the target answered 204. The target may have got 1 attempt without a result: 1 interrupted. The target snoozed 2 attempts.",
		},
		"calls without an answer, and without a connection": {
			task.Task{State: task.Succeeded, FinishedAt: ago(3 * time.Hour), AttemptCount: 6, Attempts: slices.Concat(
				tried(1, task.OutcomeRetryable, 0, "no answer within 30 s"), tried(2, task.OutcomeRetryable, 0, "the target reset the connection"),
				[]task.Attempt{{Number: 3, Outcome: task.OutcomeRetryable, Error: "connection refused", NotSent: true}}, tried(4, task.OutcomeLost, 0, "no result"),
				tried(5, task.OutcomeRetryable, 503, answered503), tried(6, task.OutcomeSucceeded, 204, ""))}, alive,
			"It succeeded 3 h ago at attempt 6 of 10: the target answered 204. The target may have got 3 attempts without a result: 1 lost, 2 unanswered.",
		},
		"not called for want of descriptors": {
			task.Task{State: task.Pending, RunAt: noon.Add(time.Second), Attempts: tried(1, task.OutcomeInterrupted, 0, string(task.ShortageDescriptors))}, alive,
			"It is due in 1.0 s for attempt 1 of 10, since attempt 1 failed: " + string(task.ShortageDescriptors) + ".",
		},
		"running": {
			task.Task{State: task.Running}, held,
			"Attempt 1 of 10 has been under way for 3.0 s, held by the instance api-1 1.0.0, last seen 4.0 s ago.",
		},
		"running, the holder is silent": {
			task.Task{State: task.Running}, task.Facts{ClaimedAt: ago(time.Minute), Holder: "api-1 1.0.0", HolderSeenAt: ago(20 * time.Second)},
			"Attempt 1 of 10 has been under way for 60 s, held by the instance api-1 1.0.0, last seen 20 s ago: another takes it over.",
		},
		"running, the holder is gone": {
			task.Task{State: task.Running, AttemptCount: 1}, task.Facts{ClaimedAt: ago(time.Second)},
			"Attempt 2 of 10 has been under way for 1.0 s, held by an instance that is gone: another takes it over.",
		},
		"running, to be cancelled": {
			task.Task{State: task.Running, CancelRequestedAt: ago(time.Second)}, held,
			"Cancelling it was asked for 1.0 s ago; attempt 1 has been under way for 3.0 s, held by the instance api-1 1.0.0, last seen 4.0 s ago.",
		},
		"succeeded": {
			task.Task{State: task.Succeeded, FinishedAt: ago(3 * time.Hour), AttemptCount: 2, Attempts: tried(2, task.OutcomeSucceeded, 204, "")}, alive,
			"It succeeded 3 h ago at attempt 2 of 10: the target answered 204.",
		},
		"succeeded, with something to tell": {
			task.Task{State: task.Succeeded, FinishedAt: ago(3 * time.Hour), AttemptCount: 1, Attempts: tried(1, task.OutcomeSucceeded, 200, "the answer's body was cut short: no end within 1 s")}, alive,
			"It succeeded 3 h ago at attempt 1 of 10: the target answered 200 (the answer's body was cut short: no end within 1 s).",
		},
		"attempts exhausted": {
			task.Task{State: task.Failed, Reason: task.AttemptsExhausted, FinishedAt: ago(time.Minute), AttemptCount: 10, Attempts: tried(10, task.OutcomeRetryable, 503, answered503)}, alive,
			"It failed 60 s ago: all 10 attempts failed: the target answered 503 Service Unavailable.",
		},
		"retry duration exhausted": {
			task.Task{State: task.Failed, Reason: task.RetryDurationExhausted, FinishedAt: ago(time.Minute), AttemptCount: 3,
				Spec: task.Spec{Retry: task.RetryPolicy{MaxAttempts: 10, MaxRetryDuration: 3 * time.Hour}}, Attempts: tried(3, task.OutcomeRetryable, 503, answered503)}, alive,
			"It failed 60 s ago: another attempt would have begun later than max_retry_duration_seconds (3 h) after the first: the target answered 503 Service Unavailable.",
		},
		"client error": {
			task.Task{State: task.Failed, Reason: task.ClientError, FinishedAt: ago(time.Minute), AttemptCount: 1, Attempts: tried(1, task.OutcomePermanent, 404, "the target answered 404 Not Found")}, alive,
			"It failed 60 s ago: after attempt 1 it was not tried again, since the same call would fail again: the target answered 404 Not Found.",
		},
		"expired": {
			task.Task{State: task.Failed, Reason: task.Expired, FinishedAt: ago(time.Minute)}, alive,
			"It failed 60 s ago: before any attempt, expires_at had passed, or would have before the next attempt.",
		},
		"refused": {
			task.Task{State: task.Failed, Reason: task.TargetRefused, FinishedAt: ago(time.Minute), AttemptCount: 1, Attempts: tried(1, task.OutcomePermanent, 0, "the address is private")}, alive,
			"It failed 60 s ago: the service's settings do not allow the call: the address is private.",
		},
		"cancelled": {
			task.Task{State: task.Cancelled, FinishedAt: ago(time.Minute), AttemptCount: 1}, alive,
			"It was cancelled 60 s ago, after 1 attempt.",
		},
	} {
		tt.facts.Now, tt.facts.Lease = noon, 15*time.Second
		if tt.task.Retry.MaxAttempts == 0 {
			tt.task.Retry.MaxAttempts = 10
		}
		if got := task.Explain(&tt.task, tt.facts); got != tt.want {
			t.Errorf("%s:\ngot  %s\nwant %s", name, got, tt.want)
		}
	}
}
