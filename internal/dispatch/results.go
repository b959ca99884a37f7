package dispatch

import (
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/melodia/orchestrator/internal/task"
)

// finisher is the part of the store that results write to.
type finisher interface {
	Finish(claim *task.Claim, d task.Decision, then func(matched, calledBack bool, err error))
}

// results writes decisions to the store, and knows which tasks the instance holds until then.
// No caller and no goroutine waits for a write: one that waited for each result made
// draining a backlog 4 to 5 % slower.
//
// Whenever mu is free:
//   - unfinished has every job from hold until its write has ended or drop was called;
//   - after write, a job's function is called exactly once, with whether its decision took
//     effect. It did not when the store refused the result or no longer matched the claim,
//     or when the session's writes context ended before;
//   - writing is above zero from write until that call has returned. It grows from zero
//     only while an attempt is under way (see slots.attempts), so that it may be waited for
//     after the last attempt.
type results struct {
	store finisher
	log   *slog.Logger
	// due is told in how long a task is due because of a result: itself, or a callback.
	due     func(wait time.Duration)
	writing sync.WaitGroup

	mu sync.Mutex
	// unfinished is by job and not by task: a task may be claimed again before its last
	// attempt has quite ended.
	unfinished map[*job]struct{}
}

func newResults(s finisher, log *slog.Logger, due func(time.Duration)) *results {
	return &results{store: s, log: log, due: due, unfinished: make(map[*job]struct{})}
}

// hold notes that the instance has claimed the task of j.
func (r *results) hold(j *job) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.unfinished[j] = struct{}{}
}

// drop forgets a job without writing its result.
func (r *results) drop(j *job) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.unfinished, j)
}

// held returns the ids of the tasks that are claimed and not finished.
func (r *results) held() []task.ID {
	r.mu.Lock()
	defer r.mu.Unlock()
	ids := make([]task.ID, 0, len(r.unfinished))
	for j := range r.unfinished {
		ids = append(ids, j.claim.Task.ID)
	}
	return ids
}

// of returns a job by its task's id; nil where the instance does not hold that.
func (r *results) of(id task.ID) *job {
	r.mu.Lock()
	defer r.mu.Unlock()
	for j := range r.unfinished {
		if j.claim.Task.ID == id {
			return j
		}
	}
	return nil
}

// count returns how many tasks are claimed and not finished.
func (r *results) count() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.unfinished)
}

// cancel ends the calls of those jobs whose claims are given, by task.
func (r *results) cancel(claims map[task.ID]int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for j := range r.unfinished {
		if number, ok := claims[j.claim.Task.ID]; ok && number == j.claim.Number {
			j.cutOff(errCancelled)
		}
	}
}

// write writes j.decision, again and again while the store is away, until the session's
// writes context ends. It returns at once. Afterwards it calls then, which must not block:
// other results wait for it. written says whether the decision took effect.
func (r *results) write(j *job, then func(j *job, written bool)) {
	j.then = then
	r.writing.Add(1)
	r.try(j)
}

// try writes a result once. Other results wait while the store calls the function back.
func (r *results) try(j *job) {
	j.tries++
	r.store.Finish(j.claim, j.decision, func(matched, calledBack bool, err error) {
		if !matched {
			go r.notWritten(j, err)
			return
		}
		if calledBack {
			r.due(0)
		}
		r.tell(j, true)
	})
}

// notWritten tries a result again after a pause, which grows from 50 ms to 1 s, or gives it up.
func (r *results) notWritten(j *job, err error) {
	log := r.log.With("task_id", j.claim.Task.ID.String(), "claim", j.claim.Number)
	pause := min(50*time.Millisecond<<min(j.tries-1, 5), time.Second)
	switch {
	case err == nil && j.tries > 1:
		// A write whose answer was lost matches nothing when it is repeated.
		r.due(j.decision.Wait) // itself, or a callback
		log.Warn("result was written before, or came late")
	case err == nil:
		log.Warn("late result changed nothing")
	case errors.Is(err, task.ErrUnavailable) && sleep(j.session.writes, jitter(pause)):
		r.try(j)
		return
	default:
		log.Error("result could not be written", "error", err)
	}
	r.tell(j, false)
}

func (r *results) tell(j *job, written bool) {
	r.drop(j)
	j.then(j, written)
	r.writing.Done()
}
