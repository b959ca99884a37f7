package dispatch

import (
	"context"
	"errors"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"github.com/melodia/orchestrator/internal/task"
)

// answers is a store that answers writes with the results in turn, each a second after it was asked.
type answers struct {
	results []answer
	asked   []time.Duration // since began
	began   time.Time
}

type answer struct {
	matched, calledBack bool
	err                 error
}

func (a *answers) Finish(_ *task.Claim, _ task.Decision, then func(matched, calledBack bool, err error)) {
	next := a.results[min(len(a.asked), len(a.results)-1)]
	a.asked = append(a.asked, time.Since(a.began))
	time.AfterFunc(time.Second, func() { then(next.matched, next.calledBack, next.err) })
}

func TestResults(t *testing.T) {
	t.Parallel()
	const wait = time.Minute
	away := answer{err: errStoreAway}
	for name, tt := range map[string]struct {
		answers []answer
		tries   int
		written bool
		due     []time.Duration
		line    string
	}{
		"written":            {answers: []answer{{matched: true}}, tries: 1, written: true},
		"with a callback":    {answers: []answer{{matched: true, calledBack: true}}, tries: 1, written: true, due: []time.Duration{0}},
		"late":               {answers: []answer{{}}, tries: 1, line: "late result changed nothing"},
		"refused":            {answers: []answer{{err: errors.New("out of range")}}, tries: 1, line: "result could not be written"},
		"tried again":        {answers: []answer{away, away, {matched: true}}, tries: 3, written: true},
		"written at first":   {answers: []answer{away, {}}, tries: 2, due: []time.Duration{wait}, line: "result was written before, or came late"},
		"away until the end": {answers: []answer{away}, tries: 15, line: "result could not be written"},
		"refused at last":    {answers: []answer{away, {err: errors.New("out of range")}}, tries: 2, line: "result could not be written"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				store := &answers{results: tt.answers, began: time.Now()}
				var due []time.Duration
				lines := &logs{}
				r := newResults(store, slog.New(slog.NewJSONHandler(lines, nil)), func(wait time.Duration) { due = append(due, wait) })
				writes, stop := context.WithTimeout(t.Context(), 25*time.Second)
				defer stop()
				j := newJob(&session{calls: t.Context(), writes: writes}, &task.Claim{Task: &task.Task{ID: taskID(1)}, Number: 3}, time.Now())
				defer j.cutOff(nil)
				j.decision = task.Decision{State: task.Pending, Wait: wait}
				r.hold(j)
				var told []bool
				r.write(j, func(_ *job, written bool) { told = append(told, written) })
				if time.Since(store.began) != 0 || len(told) > 0 || len(r.held()) != 1 || r.count() != 1 {
					t.Errorf("write waited for %v; told %v, held %v, want it told later and held until then", time.Since(store.began), told, r.held())
				}
				r.writing.Wait()
				if len(told) != 1 || told[0] != tt.written || len(r.held()) > 0 {
					t.Errorf("told %v, held %v, want it told %t once and not held", told, r.held(), tt.written)
				}
				if tt.tries < 15 && len(store.asked) != tt.tries || len(store.asked) > tt.tries {
					t.Errorf("tried after %v, want %d times", store.asked, tt.tries)
				}
				if len(due) != len(tt.due) || len(due) > 0 && due[0] != tt.due[0] {
					t.Errorf("a task is said to be due in %v, want %v", due, tt.due)
				}
				if tt.line != "" && len(lines.lines(t, tt.line)) != 1 || tt.line == "" && lines.text() != "" {
					t.Errorf("the log is %q, want one line with %q", lines.text(), tt.line)
				}
				if last := store.asked[len(store.asked)-1]; last > 25*time.Second {
					t.Errorf("tried %v after the first time, when the session's writes had ended", last)
				}
			})
		})
	}
}

func TestResultsCancel(t *testing.T) {
	t.Parallel()
	r := newResults(&answers{}, slog.New(slog.DiscardHandler), nil)
	claimed := func(n int, number int64) *job {
		j := newJob(&session{calls: t.Context()}, &task.Claim{Task: &task.Task{ID: taskID(n)}, Number: number}, time.Now())
		r.hold(j)
		return j
	}
	earlier, again, other, dropped := claimed(1, 1), claimed(1, 2), claimed(2, 2), claimed(3, 1)
	r.drop(dropped)
	r.cancel(map[task.ID]int64{taskID(1): 2, taskID(3): 1})
	for _, j := range []*job{earlier, again, other, dropped} {
		if got := errors.Is(context.Cause(j.call), errCancelled); got != (j == again) {
			t.Errorf("task %s, claim %d: cancelled %t, want %t", j.claim.Task.ID, j.claim.Number, got, j == again)
		}
		j.cutOff(nil)
	}
	if got := r.count(); got != 3 {
		t.Errorf("%d tasks are held, want 3", got)
	}
}
