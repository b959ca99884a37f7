package dispatch

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/melodia/orchestrator/internal/task"
)

// long is a rig whose target takes every task with a 202, and keeps the tokens.
type long struct {
	*rig
	tokens []task.Token
}

var took = task.Outcome{Kind: task.OutcomeSucceeded, StatusCode: 202, Duration: time.Second}

func startLong(t *testing.T, o Options, m *memory) *long {
	l := &long{}
	l.rig = start(t, o, m, func(_ context.Context, c task.Call) task.Outcome {
		l.mu.Lock()
		l.tokens = append(l.tokens, c.Token)
		l.mu.Unlock()
		return took
	})
	return l
}

// longTask submits a task that its target may take.
func (l *long) longTask(n int, change func(*task.Task)) task.ID {
	l.t.Helper()
	t := newTask(n, 0)
	t.Completion = &task.Completion{Timeout: time.Hour, Heartbeat: time.Minute}
	if change != nil {
		change(t)
	}
	if err := l.Submit(l.t.Context(), t); err != nil {
		l.t.Fatal(err)
	}
	synctest.Wait()
	return t.ID
}

// token is what the call n, from 1, carried.
func (l *long) token(n int) task.Token {
	l.mu.Lock()
	defer l.mu.Unlock()
	if n > len(l.tokens) {
		l.t.Fatalf("%d calls were made, want %d", len(l.tokens), n)
	}
	return l.tokens[n-1]
}

func (l *long) reports(id task.ID, call int, r task.Report, want error) task.State {
	l.t.Helper()
	state, _, err := l.Report(l.t.Context(), id, l.token(call), &r)
	if !errors.Is(err, want) {
		l.t.Fatalf("the report %s: %v, want %v", r.Kind, err, want)
	}
	return state
}

func TestCompletion(t *testing.T) {
	t.Parallel()
	beat := task.Report{Kind: task.ReportHeartbeat, Progress: new(0.5)}
	done := task.Report{Kind: task.ReportSucceeded, Result: []byte(`{"a":1}`)}
	run := func(name string, test func(t *testing.T, l *long, m *memory)) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				m := newMemory()
				o := options()
				o.Concurrency = 1
				test(t, startLong(t, o, m), m)
			})
		})
	}
	run("takes no slot, and ends with its result", func(t *testing.T, l *long, m *memory) {
		ids := []task.ID{l.longTask(1, nil), l.longTask(2, nil), l.longTask(3, nil)} // with one slot
		time.Sleep(50 * time.Second)
		for n, id := range ids {
			if got := m.row(id); got.State != task.Running || !got.Awaiting || len(got.Attempts) != 0 {
				t.Fatalf("the task is %s, awaited %t after %d attempts, want it running at its target", got.State, got.Awaiting, len(got.Attempts))
			}
			ended := l.watch(id)
			if state := l.reports(id, n+1, done, nil); state != task.Succeeded {
				t.Errorf("the report makes it %s", state)
			}
			synctest.Wait()
			select {
			case <-ended:
			default:
				t.Error("who waits for its end is not told")
			}
			got := m.row(id)
			if a := got.Attempts; got.State != task.Succeeded || string(got.Result) != `{"a":1}` || len(a) != 1 || a[0].Duration < 50*time.Second || a[0].Outcome != task.OutcomeSucceeded {
				t.Errorf("it is %s with %s after %+v", got.State, got.Result, a)
			}
			l.reports(id, n+1, done, task.ErrEnded)
		}
	})
	run("heartbeats keep it, silence loses it", func(t *testing.T, l *long, m *memory) {
		id := l.longTask(1, nil)
		for range 20 {
			time.Sleep(58 * time.Second)
			l.reports(id, 1, beat, nil)
		}
		if got := m.row(id); len(got.Attempts) != 0 || *got.Progress.Part != 0.5 {
			t.Fatalf("after 20 heartbeats: %+v, %+v", got.Attempts, got.Progress)
		}
		time.Sleep(59 * time.Second)
		if got := m.row(id); len(got.Attempts) != 0 {
			t.Fatalf("lost before the minute was over: %+v", got.Attempts)
		}
		time.Sleep(10 * time.Second)
		got := m.row(id)
		if len(got.Attempts) != 1 || got.Attempts[0].Outcome != task.OutcomeLost || got.AttemptCount != 1 {
			t.Fatalf("after a silent minute: %+v", got.Attempts)
		}
		time.Sleep(5 * time.Second) // the next attempt
		l.reports(id, 1, beat, task.ErrTokenOld)
		l.reports(id, 1, done, task.ErrTokenOld)
		if state := l.reports(id, 2, done, nil); state != task.Succeeded {
			t.Errorf("the second attempt makes it %s", state)
		}
	})
	run("the whole time", func(t *testing.T, l *long, m *memory) {
		id := l.longTask(1, func(t *task.Task) { t.Completion.Timeout = 10 * time.Minute })
		for range 12 {
			time.Sleep(50 * time.Second)
			if _, _, err := l.Report(t.Context(), id, l.token(1), &beat); err != nil {
				break
			}
		}
		time.Sleep(15 * time.Second)
		if got := m.row(id); len(got.Attempts) != 1 || got.Attempts[0].Outcome != task.OutcomeLost {
			t.Fatalf("after all of its time: %+v", got.Attempts)
		}
	})
	run("failed, with and without another try", func(t *testing.T, l *long, m *memory) {
		id := l.longTask(1, nil)
		if state := l.reports(id, 1, task.Report{Kind: task.ReportFailed, Retry: true, Note: "no GPU"}, nil); state != task.Pending {
			t.Errorf("the report makes it %s", state)
		}
		time.Sleep(2 * time.Second)
		if state := l.reports(id, 2, task.Report{Kind: task.ReportFailed}, nil); state != task.Failed {
			t.Errorf("the second report makes it %s", state)
		}
		got := m.row(id)
		if got.Reason != task.ClientError || len(got.Attempts) != 2 || got.Attempts[0].Error != "the target reported that it failed: no GPU" {
			t.Errorf("it ended with %s after %+v", got.Reason, got.Attempts)
		}
	})
	run("another's token", func(t *testing.T, l *long, m *memory) {
		one, other := l.longTask(1, nil), l.longTask(2, nil)
		l.reports(one, 2, done, task.ErrTokenUnknown)
		l.reports(other, 1, beat, task.ErrTokenUnknown)
		if _, _, err := l.Report(t.Context(), taskID(9), l.token(1), &done); !errors.Is(err, task.ErrNotFound) {
			t.Errorf("an unknown task: %v", err)
		}
	})
	run("cancelled", func(t *testing.T, l *long, m *memory) {
		id := l.longTask(1, nil)
		m.cancel(id)
		l.reports(id, 1, beat, task.ErrEnded)
	})
	run("the instance goes", func(t *testing.T, l *long, m *memory) {
		id := l.longTask(1, nil)
		l.stop()
		time.Sleep(55 * time.Second)
		next := startLong(t, options(), m)
		time.Sleep(30 * time.Second) // longer than the heartbeat's minute: nothing could be heard
		if got := m.row(id); len(got.Attempts) != 0 {
			t.Fatalf("the restart cost it an attempt: %+v", got.Attempts)
		}
		if _, _, err := next.Report(t.Context(), id, l.token(1), &beat); err != nil {
			t.Fatal(err)
		}
		time.Sleep(55 * time.Second)
		if _, _, err := next.Report(t.Context(), id, l.token(1), &done); err != nil {
			t.Fatal(err)
		}
		if calls := len(next.delivered()); calls != 0 {
			t.Errorf("it was called %d times more", calls)
		}
	})
	run("the database goes", func(t *testing.T, l *long, m *memory) {
		id := l.longTask(1, nil)
		time.Sleep(40 * time.Second)
		m.breaks(failing())
		time.Sleep(2 * time.Minute)
		m.breaks(nil)
		time.Sleep(30 * time.Second)
		if got := m.row(id); len(got.Attempts) != 0 {
			t.Fatalf("the outage cost it an attempt: %+v", got.Attempts)
		}
		l.reports(id, 1, beat, nil)
		l.reports(id, 1, done, nil)
	})
	run("the database's clock is set ahead", func(t *testing.T, l *long, m *memory) {
		id := l.longTask(1, nil)
		for range 4 { // until the instance has listened for longer than a heartbeat's time
			time.Sleep(50 * time.Second)
			l.reports(id, 1, beat, nil)
		}
		time.Sleep(30 * time.Second)
		m.mu.Lock()
		m.ahead += 10 * time.Minute
		m.mu.Unlock()
		time.Sleep(20 * time.Second)
		l.reports(id, 1, beat, nil)
		time.Sleep(50 * time.Second)
		l.reports(id, 1, done, nil)
	})
	run("a token that cannot be kept", func(t *testing.T, l *long, m *memory) {
		m.breaks(failing("KeepToken"))
		id := l.longTask(1, nil)
		time.Sleep(10 * time.Second)
		if calls := len(l.delivered()); calls != 0 {
			t.Fatalf("%d calls without a token that counts", calls)
		}
		m.breaks(nil)
		time.Sleep(5 * time.Second)
		l.reports(id, 1, done, nil)
		if got := m.row(id); len(got.Attempts) != 1 {
			t.Errorf("attempts: %+v", got.Attempts)
		}
	})
}

// A target may report before it has answered.
func TestReportDuringTheCall(t *testing.T) {
	t.Parallel()
	for name, answer := range map[string]task.Outcome{"then 202": took, "then 500": broken} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				m := newMemory()
				var r *rig
				r = start(t, options(), m, func(ctx context.Context, c task.Call) task.Outcome {
					for _, report := range []task.Report{{Kind: task.ReportHeartbeat}, {Kind: task.ReportSucceeded}} {
						if _, _, err := r.Report(ctx, c.Task.ID, c.Token, &report); err != nil {
							t.Errorf("%s during the call: %v", report.Kind, err)
						}
					}
					return answer
				})
				tk := newTask(1, 0)
				tk.Completion = &task.Completion{Timeout: time.Hour}
				if err := r.Submit(t.Context(), tk); err != nil {
					t.Fatal(err)
				}
				time.Sleep(time.Minute)
				if got := m.row(tk.ID); got.State != task.Succeeded || len(got.Attempts) != 1 || len(r.delivered()) != 1 {
					t.Errorf("it is %s after %+v", got.State, got.Attempts)
				}
			})
		})
	}
}
