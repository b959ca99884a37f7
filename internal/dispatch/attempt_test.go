package dispatch

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/melodia/orchestrator/internal/task"
)

func TestOutcomes(t *testing.T) {
	t.Parallel()
	const url = "https://target.example/plays?token=hush"
	tests := map[string]struct {
		answers []task.Outcome // of the attempts, the last one over and over
		options func(*task.Task)
		state   task.State
		reason  task.Reason
		kinds   []task.Kind
		logged  []string // level and message of each line about an attempt
	}{
		"success": {
			answers: []task.Outcome{succeeded},
			state:   task.Succeeded,
			kinds:   []task.Kind{task.OutcomeSucceeded},
			logged:  []string{"DEBUG task succeeded"},
		},
		"success with something to tell": {
			answers: []task.Outcome{{Kind: task.OutcomeSucceeded, StatusCode: 200, Error: "the answer's body was cut short: no end within 1 s"}},
			state:   task.Succeeded,
			kinds:   []task.Kind{task.OutcomeSucceeded},
			logged:  []string{"INFO task succeeded"},
		},
		"success after retries": {
			answers: []task.Outcome{broken, {Kind: task.OutcomeRetryable, Error: "no connection"}, succeeded},
			state:   task.Succeeded,
			kinds:   []task.Kind{task.OutcomeRetryable, task.OutcomeRetryable, task.OutcomeSucceeded},
			logged:  []string{"INFO attempt failed, will retry", "INFO attempt failed, will retry", "INFO task succeeded"},
		},
		"attempts exhausted": {
			answers: []task.Outcome{broken},
			options: func(t *task.Task) { t.Retry.MaxAttempts = 3 },
			state:   task.Failed, reason: task.AttemptsExhausted,
			kinds:  []task.Kind{task.OutcomeRetryable, task.OutcomeRetryable, task.OutcomeRetryable},
			logged: []string{"INFO attempt failed, will retry", "INFO attempt failed, will retry", "WARN task failed"},
		},
		"permanent": {
			answers: []task.Outcome{{Kind: task.OutcomePermanent, StatusCode: 404, Error: "the target answered 404"}},
			state:   task.Failed, reason: task.ClientError,
			kinds:  []task.Kind{task.OutcomePermanent},
			logged: []string{"WARN task failed"},
		},
		"refused": {
			answers: []task.Outcome{{Kind: task.OutcomePermanent, Refused: true, Error: "refused"}},
			state:   task.Failed, reason: task.TargetRefused,
			kinds:  []task.Kind{task.OutcomePermanent},
			logged: []string{"WARN task failed"},
		},
		"retry duration exhausted": {
			answers: []task.Outcome{broken},
			options: func(t *task.Task) {
				t.Retry.MinBackoff, t.Retry.MaxBackoff, t.Retry.MaxRetryDuration = 10*time.Second, 10*time.Second, 13*time.Second
			},
			state: task.Failed, reason: task.RetryDurationExhausted,
			kinds:  []task.Kind{task.OutcomeRetryable, task.OutcomeRetryable},
			logged: []string{"INFO attempt failed, will retry", "WARN task failed"},
		},
		"expires before the retry": {
			answers: []task.Outcome{broken},
			options: func(t *task.Task) { t.ExpiresAt = t.CreatedAt.Add(500 * time.Millisecond) },
			state:   task.Failed, reason: task.Expired,
			kinds:  []task.Kind{task.OutcomeRetryable},
			logged: []string{"WARN task failed"},
		},
		"expired before the first attempt": {
			options: func(t *task.Task) { t.ExpiresAt = t.CreatedAt.Add(-time.Second) },
			state:   task.Failed, reason: task.Expired,
			logged: []string{"WARN task failed"},
		},
		"attempts exhausted by lost ones": {
			options: func(t *task.Task) {
				t.Retry.MaxAttempts, t.AttemptCount = 2, 2
				t.Attempts = []task.Attempt{{Number: 1, Outcome: task.OutcomeLost}, {Number: 2, Outcome: task.OutcomeLost}}
			},
			state: task.Failed, reason: task.AttemptsExhausted,
			kinds:  []task.Kind{task.OutcomeLost, task.OutcomeLost},
			logged: []string{"WARN task failed"},
		},
	}
	for name, test := range tests {
		for _, byRequest := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/by request %t", name, byRequest), func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) {
					m := newMemory()
					var calls int
					r := start(t, options(), m, func(ctx context.Context, c task.Call) task.Outcome {
						answer := test.answers[min(calls, len(test.answers)-1)]
						calls++
						return takes(time.Second, answer)(ctx, c)
					})
					synctest.Wait()
					wait := time.Duration(0)
					if byRequest {
						wait = time.Hour
					}
					id := m.store(1, wait, func(t *task.Task) {
						t.URL, t.Body, t.Headers = url, []byte("the payload"), map[string]string{"X-Api-Key": "the key"}
						if test.options != nil {
							test.options(t)
						}
					})
					if byRequest {
						outcome, decision, err := r.Execute(t.Context(), id)
						if err != nil {
							t.Fatalf("Execute: %v", err)
						}
						var want task.Outcome
						if test.answers != nil {
							want = test.answers[0]
							want.Duration = time.Second
						}
						if outcome != want {
							t.Errorf("Execute returned the outcome %+v, want %+v", outcome, want)
						}
						if now := m.row(id); decision.State != now.State || decision.Reason != now.Reason {
							t.Errorf("Execute returned the decision %s (%q), but the task is %s (%q)", decision.State, decision.Reason, now.State, now.Reason)
						}
					} else {
						r.notify(0)
					}
					time.Sleep(time.Minute)

					got := m.row(id)
					if got.State != test.state || got.Reason != test.reason || got.AttemptCount != len(test.kinds) {
						t.Errorf("the task is %s (%q) after %d attempts, want %s (%q) after %d",
							got.State, got.Reason, got.AttemptCount, test.state, test.reason, len(test.kinds))
					}
					var kinds []task.Kind
					for i, a := range got.Attempts {
						kinds = append(kinds, a.Outcome)
						if a.Number != i+1 {
							t.Errorf("attempt %d has the number %d", i+1, a.Number)
						}
					}
					if !slices.Equal(kinds, test.kinds) {
						t.Errorf("attempts %v, want %v", kinds, test.kinds)
					}
					for i, c := range r.delivered() {
						if via := byRequest && i == 0; c.Task.ID != id || c.Attempt != i+1 || c.ViaWorkerEndpoint != via {
							t.Errorf("call %d was for task %s, attempt %d, via /worker-endpoint: %t", i, c.Task.ID, c.Attempt, c.ViaWorkerEndpoint)
						}
					}
					var logged []string
					for _, message := range []string{"attempt failed, will retry", "task succeeded", "task failed"} {
						for _, line := range r.log.lines(t, message) {
							logged = append(logged, fmt.Sprint(line["level"], " ", message))
							if line["task_id"] != id.String() || line["claim"] == nil || message == "task failed" && line["reason"] != string(test.reason) {
								t.Errorf("a line without its task, claim or reason: %v", line)
							}
						}
					}
					if diff := cmp.Diff(test.logged, logged); diff != "" {
						t.Errorf("lines (-want +got):\n%s", diff)
					}
					for _, secret := range []string{"the payload", "the key", "hush", "Api-Key"} {
						if strings.Contains(r.log.text(), secret) {
							t.Errorf("the log tells %q:\n%s", secret, r.log.text())
						}
					}
				})
			})
		}
	}
}

// A retry waits as its policy says, from the moment of writing.
func TestRetryWaits(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		id := m.store(1, 0)
		asking := broken
		asking.RetryAfter = time.Minute
		r := start(t, options(), m, takes(time.Second, asking))
		time.Sleep(time.Second)
		synctest.Wait()
		if got := time.Until(m.row(id).RunAt); got != time.Minute {
			t.Errorf("the retry is due in %v, want the minute that the target asked for", got)
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		r.wantDelivered(0, time.Minute+time.Second)
		line := r.wantLine("attempt failed, will retry", "INFO")
		want := map[string]any{"attempt": 1.0, "status_code": 500.0, "duration_seconds": 1.0, "wait_seconds": 60.0, "error": "the target answered 500"}
		for key, value := range want {
			if line[key] != value {
				t.Errorf("the line has %s = %v, want %v", key, line[key], value)
			}
		}
	})
}

func TestPanicInAnAttempt(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		o := options()
		o.Concurrency = 1
		bad, good, byRequest := m.store(1, 0), m.store(2, 0), m.store(3, time.Hour)
		r := start(t, o, m, func(_ context.Context, c task.Call) task.Outcome {
			if c.Attempt == 1 && c.Task.ID != good {
				time.Sleep(time.Second)
				panic("out of order")
			}
			return succeeded
		})
		synctest.Wait()
		outcome, _, err := r.Execute(t.Context(), byRequest)
		if err != nil || outcome.Kind != task.OutcomeRetryable || outcome.Error == "" || outcome.Duration != time.Second {
			t.Errorf("Execute returned %+v, %v, want a retryable outcome with an error after 1s", outcome, err)
		}
		time.Sleep(time.Minute)
		r.wantState(bad, task.Succeeded, "", 2)
		r.wantState(good, task.Succeeded, "", 1)
		first := m.row(bad).Attempts[0]
		if first.Outcome != task.OutcomeRetryable || first.Error == "" || first.Duration != time.Second {
			t.Errorf("the attempt that panicked is recorded as %+v, want a retryable failure after 1s", first)
		}
		if strings.Contains(first.Error, "out of order") {
			t.Errorf("the attempt's error %q tells of our insides", first.Error)
		}
		lines := r.log.lines(t, "attempt panicked")
		if len(lines) != 2 {
			t.Errorf("%d lines tell of a panic, want 2", len(lines))
		}
		for _, line := range lines {
			if line["level"] != "ERROR" || line["panic"] != "out of order" || line["stack"] == "" {
				t.Errorf("line %v, want an error with the panic and its stack", line)
			}
		}
	})
}

// The fence turned the result away: the task is another's by now.
func TestLateResult(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		id := m.store(1, 0)
		r := start(t, options(), m, takes(2*time.Second, broken))
		time.Sleep(time.Second)
		m.change(id, func(r *row) { r.claim, r.worker = r.claim+1, newID('w', 99) })
		before := m.row(id)
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if diff := cmp.Diff(before.Task, m.row(id).Task); diff != "" {
			t.Errorf("a late result changed the task (-before +after):\n%s", diff)
		}
		line := r.wantLine("late result changed nothing", "WARN")
		if line["task_id"] != id.String() || line["claim"] != 1.0 {
			t.Errorf("the line %v does not name the task and its claim", line)
		}
		if got := r.log.lines(t, "attempt failed, will retry"); len(got) > 0 {
			t.Errorf("a result that did not count was reported: %v", got)
		}
		if _, running := r.Health(); running != 0 {
			t.Errorf("%d tasks are held, want 0", running)
		}
	})
}

// The first writing took effect, but its answer was lost.
func TestResultWrittenTwice(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		id := m.store(1, 0)
		m.breaks(func(_ context.Context, op string, do func()) error {
			do()
			if op == "Finish" && len(m.calls("Finish")) == 1 {
				return errStoreAway
			}
			return nil
		})
		r := start(t, options(), m, takes(0, succeeded))
		time.Sleep(time.Second)
		r.wantState(id, task.Succeeded, "", 1)
		if got := len(m.row(id).Attempts); got != 1 {
			t.Errorf("%d attempts are recorded, want 1", got)
		}
	})
}

// A result that the store cannot take for itself is given up: the slot is
// needed, and reaping will see to the task.
func TestResultThatCannotBeWritten(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		o := options()
		o.Concurrency = 1
		id, next := m.store(1, 0), m.store(2, 0)
		m.breaks(func(_ context.Context, op string, do func()) error {
			if op == "Finish" && len(m.calls("Finish")) == 1 {
				return errors.New("a value is out of range")
			}
			do()
			return nil
		})
		r := start(t, o, m, takes(time.Millisecond, succeeded)) // so that one result is written after the other
		time.Sleep(time.Second)
		r.wantState(id, task.Running, "", 0)
		r.wantState(next, task.Succeeded, "", 1)
		if line := r.wantLine("result could not be written", "ERROR"); line["error"] != "a value is out of range" {
			t.Errorf("the line says %v, want the store's error", line["error"])
		}
		time.Sleep(21 * time.Second)
		r.wantState(id, task.Succeeded, "", 2)
	})
}

// The app's clock may be wrong: only the database's counts.
func TestClockOfTheStore(t *testing.T) {
	t.Parallel()
	for _, ahead := range []time.Duration{-time.Hour, 0, time.Hour} {
		t.Run(ahead.String(), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				m := newMemory()
				m.ahead = ahead
				expires := func(wait time.Duration) func(*task.Task) {
					return func(t *task.Task) { t.ExpiresAt = t.RunAt.Add(wait) }
				}
				ids := []task.ID{
					m.store(1, 10*time.Second, expires(time.Minute)),
					m.store(2, 20*time.Second, func(t *task.Task) { t.Retry.MaxRetryDuration = time.Minute }),
				}
				gone := m.store(3, 0, expires(-time.Second))
				r := start(t, options(), m, takes(time.Second, succeeded))
				time.Sleep(30 * time.Second)
				r.wantDelivered(10*time.Second, 20*time.Second)
				for _, id := range ids {
					r.wantState(id, task.Succeeded, "", 1)
				}
				r.wantState(gone, task.Failed, task.Expired, 0)
				if got, want := m.row(ids[0]).Attempts[0].StartedAt, m.row(ids[0]).RunAt; !got.Equal(want) {
					t.Errorf("the attempt is said to have begun at %v, want %v by the store's clock", got, want)
				}
			})
		})
	}
}

func TestExecuteRefuses(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		running, ended, pending := m.store(1, 0), m.store(2, time.Hour), m.store(3, time.Hour)
		r := start(t, options(), m, takes(time.Minute, succeeded))
		synctest.Wait()
		m.change(ended, func(r *row) { r.State = task.Succeeded })
		errBored := errors.New("bored")
		bored, leave := context.WithCancelCause(t.Context())
		leave(errBored)
		tests := map[string]struct {
			ctx   context.Context
			id    task.ID
			fault around
			want  error
		}{
			"unknown":               {id: taskID(99), want: task.ErrNotFound},
			"running":               {id: running, want: task.ErrNotPending},
			"ended":                 {id: ended, want: task.ErrNotPending},
			"the store is away":     {id: pending, fault: failing("ClaimOne"), want: task.ErrUnavailable},
			"the store hangs":       {id: pending, fault: hanging("ClaimOne"), want: task.ErrUnavailable},
			"the caller has left":   {ctx: bored, id: pending, want: errBored},
			"the lease is lost":     {id: pending, fault: failing("Register"), want: task.ErrUnavailable},
			"told to stop":          {id: pending, want: ErrStopping},
			"stopping is temporary": {id: pending, want: task.ErrUnavailable},
		}
		for _, name := range []string{
			"unknown", "running", "ended", "the store is away", "the store hangs", "the caller has left",
			"the lease is lost", "told to stop", "stopping is temporary",
		} {
			test := tests[name]
			switch name {
			case "the lease is lost":
				m.breaks(test.fault)
				m.forget(newID('w', 1))
				time.Sleep(heartbeatEvery)
				synctest.Wait()
			case "told to stop":
				r.stop()
			}
			m.breaks(test.fault)
			if test.ctx == nil {
				test.ctx = t.Context()
			}
			outcome, decision, err := r.Execute(test.ctx, test.id)
			if !errors.Is(err, test.want) || outcome != (task.Outcome{}) || decision != (task.Decision{}) {
				t.Errorf("%s: Execute = %+v, %+v, %v, want nothing and %v", name, outcome, decision, err, test.want)
			}
		}
		if got := m.row(pending); got.claims != 0 {
			t.Errorf("the task was claimed %d times, want 0", got.claims)
		}
		if got := len(r.delivered()); got != 1 {
			t.Errorf("%d calls were made, want only that of the running task", got)
		}
	})
}

func TestExecuteIsNotCutShort(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		id := m.store(1, time.Hour)
		o := options()
		o.Concurrency = 0 // nor does it need slots
		r := start(t, o, m, takes(10*time.Second, succeeded))
		synctest.Wait()
		if status, running := r.Health(); status != "off" || running != 0 {
			t.Errorf("health %s, %d, want off, 0", status, running)
		}
		m.breaks(func(ctx context.Context, op string, do func()) error {
			if op == "ClaimOne" {
				time.Sleep(2 * time.Second)
				if ctx.Err() != nil {
					return hang(ctx)
				}
			}
			do()
			return nil
		})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second) // ends during the claim
		defer cancel()
		answered := make(chan error)
		go func() {
			outcome, decision, err := r.Execute(ctx, id)
			if outcome.Kind != task.OutcomeSucceeded || decision.State != task.Succeeded {
				err = errors.Join(err, fmt.Errorf("Execute returned %s and %s", outcome.Kind, decision.State))
			}
			answered <- err
		}()
		time.Sleep(5 * time.Second)
		if status, running := r.Health(); status != "off" || running != 1 {
			t.Errorf("health %s, %d, want off, 1", status, running)
		}
		if err := <-answered; err != nil {
			t.Error(err)
		}
		if got := time.Since(r.began); got != 12*time.Second {
			t.Errorf("Execute returned after %v, want 12s", got)
		}
		r.wantState(id, task.Succeeded, "", 1)
		if _, running := r.Health(); running != 0 {
			t.Errorf("%d calls are under way, want 0", running)
		}
	})
}

// What a rush of tasks needed is given back when it is over.
func TestIdleGoroutinesEnd(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		for n := range 10 {
			m.store(n, 0)
		}
		contexts := make(chan context.Context, 10)
		r := start(t, options(), m, func(ctx context.Context, c task.Call) task.Outcome {
			contexts <- ctx
			return takes(time.Second, succeeded)(ctx, c)
		})
		over := make(chan struct{})
		time.Sleep(500 * time.Millisecond)
		synctest.Wait() // all calls are under way
		go func() {
			defer close(over)
			r.Dispatcher.workers.Wait()
		}()
		time.Sleep(500*time.Millisecond + 2*idleTime)
		synctest.Wait()
		select {
		case <-over:
		default:
			t.Error("goroutines are idle long after the last call")
		}
		if got := len(r.delivered()); got != 10 {
			t.Fatalf("%d calls, want 10", got)
		}
		for range 10 {
			if (<-contexts).Err() == nil {
				t.Error("the context of calls goes on when their goroutine has ended")
			}
		}
	})
}

// What a target asks for holds at either door, and is logged as what it came to.
func TestWishesOfATarget(t *testing.T) {
	t.Parallel()
	busy := task.Outcome{Kind: task.OutcomeRetryable, StatusCode: 503, Error: "the target answered 503"}
	snoozing, never := busy, busy
	snoozing.Snooze, never.Never = 10*time.Second, true
	for name, test := range map[string]struct {
		answers []task.Outcome
		kinds   []task.Kind
		numbers []int
		state   task.State
		logged  []string
	}{
		"snoozed": {
			answers: []task.Outcome{snoozing, broken, snoozing, succeeded},
			kinds:   []task.Kind{task.OutcomeSnoozed, task.OutcomeRetryable, task.OutcomeSnoozed, task.OutcomeSucceeded},
			numbers: []int{1, 1, 2, 2}, state: task.Succeeded,
			logged: []string{"INFO task snoozed", "INFO task snoozed", "INFO attempt failed, will retry", "INFO task succeeded"},
		},
		"never again": {
			answers: []task.Outcome{never}, kinds: []task.Kind{task.OutcomePermanent}, numbers: []int{1}, state: task.Failed, logged: []string{"WARN task failed"},
		},
	} {
		for _, byRequest := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/by request %t", name, byRequest), func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) {
					m := newMemory()
					var calls int
					r := start(t, options(), m, func(ctx context.Context, c task.Call) task.Outcome {
						answer := test.answers[calls]
						calls++
						return takes(time.Second, answer)(ctx, c)
					})
					synctest.Wait()
					wait := time.Duration(0)
					if byRequest {
						wait = time.Hour
					}
					id := m.store(1, wait, func(t *task.Task) { t.Retry.MaxAttempts = 2 })
					if byRequest {
						if o, _, err := r.Execute(t.Context(), id); err != nil || o.Kind != test.kinds[0] {
							t.Errorf("Execute returned %s, %v, want %s", o.Kind, err, test.kinds[0])
						}
					} else {
						r.notify(0)
					}
					time.Sleep(2 * time.Minute)

					got := m.row(id)
					var kinds []task.Kind
					for _, a := range got.Attempts {
						kinds = append(kinds, a.Outcome)
					}
					var numbers []int
					for _, c := range r.delivered() {
						numbers = append(numbers, c.Attempt)
					}
					if got.State != test.state || !slices.Equal(kinds, test.kinds) || !slices.Equal(numbers, test.numbers) {
						t.Errorf("the task is %s after %v of the numbers %v, want %s, %v, %v", got.State, kinds, numbers, test.state, test.kinds, test.numbers)
					}
					var logged []string
					for _, message := range []string{"task snoozed", "attempt failed, will retry", "task succeeded", "task failed"} {
						for _, line := range r.log.lines(t, message) {
							logged = append(logged, fmt.Sprint(line["level"], " ", message))
							if message == "task snoozed" && (line["wait_seconds"] != 10.0 || line["task_id"] != id.String()) {
								t.Errorf("a line without its task or wait: %v", line)
							}
						}
					}
					if diff := cmp.Diff(test.logged, logged); diff != "" {
						t.Errorf("lines (-want +got):\n%s", diff)
					}
				})
			})
		}
	}
}

// A call for a task that is not stored has no story in which a snooze could count.
func TestExecuteUnstoredHeedsTheTarget(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := start(t, options(), newMemory(), func(ctx context.Context, c task.Call) task.Outcome {
			return task.Outcome{Kind: task.OutcomeRetryable, StatusCode: 503, Snooze: time.Minute}
		})
		synctest.Wait()
		if o, err := r.ExecuteUnstored(t.Context(), &task.Task{}); err != nil || o.Kind != task.OutcomeSnoozed || o.Snooze != time.Minute {
			t.Errorf("ExecuteUnstored = %+v, %v, want it snoozed for a minute", o, err)
		}
	})
}
