// Package storetest holds a store of tasks against what package dispatch relies on. The
// tests of each store run it: those of the one in PostgreSQL, and those of the one in
// memory that package dispatch is tested with.
package storetest

import (
	"bytes"
	"context"
	"errors"
	"maps"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/melodia/orchestrator/internal/task"
)

// Lease is what the tests reap with.
const Lease = 15 * time.Second

// Store is the part of dispatch's store that moves tasks.
type Store interface {
	Register(ctx context.Context, worker task.ID, name string, concurrency int) error
	Heartbeat(ctx context.Context, worker task.ID) (known bool, err error)
	Cancelled(ctx context.Context, worker task.ID) (claims map[task.ID]int64, err error)
	Unregister(ctx context.Context, worker task.ID) error
	Reap(ctx context.Context, worker task.ID, held []task.ID, lease time.Duration) (lost []task.ID, err error)
	Insert(ctx context.Context, t *task.Task) error
	InsertBatch(ctx context.Context, b *task.Batch) error
	InsertClaimed(ctx context.Context, worker task.ID, t *task.Task) (*task.Claim, error)
	NextDue(ctx context.Context) (wait time.Duration, ok bool, err error)
	Claim(ctx context.Context, worker task.ID, limit int) ([]*task.Claim, error)
	ClaimOne(ctx context.Context, worker, id task.ID) (*task.Claim, error)
	Finish(claim *task.Claim, d task.Decision, then func(matched, calledBack bool, err error))
	Unfinished(ctx context.Context, ids []task.ID) ([]task.ID, error)
	ClaimLanes(ctx context.Context, worker task.ID, asks []task.LaneAsk, unhealthy []string, limit int) ([]*task.Claim, []task.LaneState, error)
	Lanes(ctx context.Context, behind task.Lane, limit int) ([]task.LaneDue, error)
	HoldBack(ctx context.Context, hosts []string) (moved map[string]int, more bool, err error)
	HoldBackInLane(ctx context.Context, lane task.Lane, hosts []string) (moved map[string]int, more bool, err error)
	Expire(ctx context.Context, limit int) (n int, err error)
}

// Subject is an empty store under test, with what a Dispatcher does not do itself.
type Subject struct {
	Store

	// NewID makes ids that the store takes, each later than the ones before.
	NewID func() task.ID
	// Get returns what is stored of a task: its state, reason, attempts and their number.
	Get func(id task.ID) *task.Task
	// Cancel and Redrive are what callers do to a task.
	Cancel, Redrive func(id task.ID)
	// Silence makes the worker's last heartbeat a minute old.
	Silence func(worker task.ID)
	// Age makes the task's claim an hour old.
	Age func(id task.ID)
	// Due makes the pending task due now, in spite of the limits of its queue.
	Due func(id task.ID)
	// SetQueue writes the settings of a queue, and pauses it or not.
	SetQueue func(q task.Queue)
}

// Run runs all tests. Each opens a Subject of its own, which open's t closes.
func Run(t *testing.T, open func(t *testing.T) Subject) {
	tests := map[string]func(s *subject){
		"leases":                           testLeases,
		"claims are of what is due":        testClaim,
		"concurrent claims are disjoint":   testConcurrentClaims,
		"claims of one task":               testClaimOne,
		"tasks that are stored as claimed": testInsertClaimed,
		"results":                          testFinish,
		"a stalled worker's result":        testStalledWorker,
		"reaping":                          testReap,
		"cancelling":                       testCancel,
		"claim numbers only grow":          testNumbersGrow,
	}
	maps.Copy(tests, laneTests)
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(&subject{t, open(t)})
		})
	}
}

// subject is a Subject with the test that it is used in.
type subject struct {
	*testing.T
	Subject
}

func (s *subject) must(err error) {
	s.Helper()
	if err != nil {
		s.Fatal(err)
	}
}

// newTask returns a task that is due in delay; it is not stored yet.
func (s *subject) newTask(delay time.Duration) *task.Task {
	return &task.Task{ID: s.NewID(), State: task.Pending, Delay: delay, Spec: task.Spec{
		URL: "https://plays.melodia.app/register", Method: "POST", Timeout: 30 * time.Second, Retry: task.DefaultRetryPolicy(),
	}}
}

// store stores a task that is due in delay.
func (s *subject) store(delay time.Duration) task.ID {
	s.Helper()
	t := s.newTask(delay)
	s.must(s.Insert(s.Context(), t))
	return t.ID
}

func (s *subject) register() (worker task.ID) {
	s.Helper()
	worker = s.NewID()
	s.must(s.Register(s.Context(), worker, s.Name(), 200))
	return worker
}

func (s *subject) claim(worker task.ID, limit int) []*task.Claim {
	s.Helper()
	claims, err := s.Claim(s.Context(), worker, limit)
	s.must(err)
	return claims
}

// claimNext claims the one task that is due.
func (s *subject) claimNext(worker task.ID) *task.Claim {
	s.Helper()
	claims := s.claim(worker, 10)
	if len(claims) != 1 {
		s.Fatalf("Claim returned %d tasks, want 1", len(claims))
	}
	return claims[0]
}

// finish writes a decision and returns when it is written.
func (s *subject) finish(c *task.Claim, d task.Decision) (matched, calledBack bool) {
	s.Helper()
	written := make(chan error, 1)
	s.Finish(c, d, func(m, b bool, err error) {
		matched, calledBack = m, b
		written <- err
	})
	s.must(<-written)
	return matched, calledBack
}

// reap returns the tasks that were lost, sorted.
func (s *subject) reap(worker task.ID, held ...task.ID) []task.ID {
	s.Helper()
	lost, err := s.Reap(s.Context(), worker, held, Lease)
	s.must(err)
	slices.SortFunc(lost, func(a, b task.ID) int { return bytes.Compare(a[:], b[:]) })
	return lost
}

func (s *subject) wantKnown(worker task.ID, want bool) {
	s.Helper()
	known, err := s.Heartbeat(s.Context(), worker)
	s.must(err)
	if known != want {
		s.Errorf("Heartbeat reports %t, want %t", known, want)
	}
}

// wantTask checks a task's state, how many attempts count, and the outcomes of all.
func (s *subject) wantTask(id task.ID, state task.State, counted int, outcomes ...string) {
	s.Helper()
	t := s.Get(id)
	var got []string
	for _, a := range t.Attempts {
		got = append(got, string(a.Outcome))
	}
	if t.State != state || t.AttemptCount != counted || !slices.Equal(got, outcomes) {
		s.Errorf("the task is %s, %d attempts count, all are %v; want %s, %d, %v", t.State, t.AttemptCount, got, state, counted, outcomes)
	}
}

func succeeded(c *task.Claim) task.Decision {
	return c.Next(task.Outcome{Kind: task.OutcomeSucceeded, StatusCode: 200}, c.At, 0.5)
}

func retried(c *task.Claim) task.Decision {
	return c.Next(task.Outcome{Kind: task.OutcomeRetryable, StatusCode: 503, Error: "the target answered 503", RetryAfter: time.Minute}, c.At, 0.5)
}

func failed(c *task.Claim) task.Decision {
	return c.Next(task.Outcome{Kind: task.OutcomePermanent, StatusCode: 404, Error: "the target answered 404"}, c.At, 0.5)
}

func interrupted(c *task.Claim) task.Decision {
	return c.Next(task.Outcome{Kind: task.OutcomeInterrupted, Error: "shutting down"}, c.At, 0)
}

func testLeases(s *subject) {
	worker, other := s.NewID(), s.register()
	s.wantKnown(worker, false)
	s.must(s.Register(s.Context(), worker, "plays", 200))
	s.wantKnown(worker, true)

	// An answer may get lost, so that Register is repeated: a fresh heartbeat.
	s.store(0)
	c := s.claimNext(worker)
	s.Silence(worker)
	s.must(s.Register(s.Context(), worker, "again", 200))
	if lost := s.reap(other); len(lost) != 0 {
		s.Errorf("%d tasks were taken from a worker that registered again", len(lost))
	}
	s.Silence(worker)
	s.wantKnown(worker, true)
	if lost := s.reap(other); len(lost) != 0 {
		s.Errorf("%d tasks were taken from a worker after its heartbeat", len(lost))
	}
	s.must(s.Unregister(s.Context(), worker))
	s.wantKnown(worker, false)
	if lost := s.reap(other); len(lost) != 1 {
		s.Errorf("%d tasks were taken from a worker that signed off, want 1", len(lost))
	}
	s.wantTask(c.Task.ID, task.Pending, 1, "lost")
}

func testClaim(s *subject) {
	worker := s.register()
	if _, ok, err := s.NextDue(s.Context()); ok || err != nil {
		s.Errorf("NextDue of an empty store: %t, %v, want false", ok, err)
	}
	s.store(time.Hour)
	if wait, ok, err := s.NextDue(s.Context()); err != nil || !ok || wait > time.Hour || wait < 50*time.Minute {
		s.Errorf("NextDue = %v, %t, %v, want about an hour", wait, ok, err)
	}
	// Due in the opposite order of their ids.
	var tasks []*task.Task
	for range 10 {
		tasks = append(tasks, s.newTask(0))
	}
	slices.Reverse(tasks)
	for _, t := range tasks[:8] {
		s.must(s.Insert(s.Context(), t))
	}
	s.must(s.InsertBatch(s.Context(), &task.Batch{Tasks: tasks[8:]}))
	if wait, ok, err := s.NextDue(s.Context()); err != nil || !ok || wait > 0 {
		s.Errorf("NextDue = %v, %t, %v, want overdue", wait, ok, err)
	}
	if got := s.claim(s.NewID(), 10); len(got) != 0 {
		s.Errorf("a worker that is not registered claimed %d tasks", len(got))
	}
	for i := range 8 { // the last two are due at the same moment
		claims := s.claim(worker, 1)
		if len(claims) != 1 || claims[0].Task.ID != tasks[i].ID || claims[0].Number != 1 || claims[0].AttemptNumber() != 1 {
			s.Fatalf("claim %d is %+v, want the task that is due the longest, under number 1", i, claims)
		}
	}
	if got := s.claim(worker, 10); len(got) != 2 {
		s.Errorf("claimed %d tasks, want the 2 that are left and due", len(got))
	}
}

func testConcurrentClaims(s *subject) {
	const n = 400
	var inserts, claiming sync.WaitGroup
	for range n {
		t := s.newTask(0)
		inserts.Go(func() {
			if err := s.Insert(s.Context(), t); err != nil {
				s.Error(err)
			}
		})
	}
	inserts.Wait()
	var mu sync.Mutex
	claimed := map[task.ID]int{}
	for range 4 {
		worker := s.register()
		claiming.Go(func() {
			for done := false; !done; {
				claims, err := s.Claim(s.Context(), worker, 7)
				if err != nil || len(claims) > 7 {
					s.Errorf("Claim returned %d tasks, %v, want 7 at most", len(claims), err)
					return
				}
				mu.Lock()
				for _, c := range claims {
					claimed[c.Task.ID]++
				}
				done = len(claimed) >= n
				mu.Unlock()
			}
		})
	}
	claiming.Wait()
	for id, times := range claimed {
		if times != 1 {
			s.Errorf("task %s was claimed %d times", id, times)
		}
	}
}

func testClaimOne(s *subject) {
	worker := s.register()
	id := s.store(time.Hour)
	wantErr := func(what string, worker, id task.ID, want error) {
		s.Helper()
		if c, err := s.ClaimOne(s.Context(), worker, id); c != nil || !errors.Is(err, want) {
			s.Errorf("ClaimOne of %s: %v, %v, want %v", what, c, err, want)
		}
	}
	wantErr("a worker that is not registered", s.NewID(), id, task.ErrUnavailable)
	wantErr("an unknown task", worker, s.NewID(), task.ErrNotFound)
	c, err := s.ClaimOne(s.Context(), worker, id) // due or not
	s.must(err)
	if c.Number != 1 || c.Task.ID != id {
		s.Errorf("ClaimOne = claim %d of %s, want claim 1 of %s", c.Number, c.Task.ID, id)
	}
	wantErr("a running task", worker, id, task.ErrNotPending)
	s.finish(c, succeeded(c))
	wantErr("a finished task", worker, id, task.ErrNotPending)
}

func testInsertClaimed(s *subject) {
	worker := s.register()
	t := s.newTask(0)
	c, err := s.InsertClaimed(s.Context(), worker, t)
	s.must(err)
	if c == nil || c.Task != t || c.Number != 1 || t.State != task.Running || !c.At.Equal(t.CreatedAt) || !c.FirstAt.Equal(c.At) || !t.RunAt.Equal(t.CreatedAt) {
		s.Fatalf("claim %+v of %+v, want number 1 of a running task, at the moment of its creation", c, t)
	}
	s.wantTask(t.ID, task.Running, 0)
	if got := s.claim(s.register(), 10); len(got) != 0 {
		s.Error("another worker claims it too")
	}
	if matched, _ := s.finish(c, retried(c)); !matched {
		s.Error("Finish matched nothing")
	}
	s.Due(t.ID)
	if again := s.claimNext(worker); again.Number <= c.Number || !again.FirstAt.Equal(c.FirstAt) {
		s.Errorf("its next claim is %+v, want a greater number, and the moment of the first", again)
	}

	// A worker that lost its lease begins nothing.
	t = s.newTask(0)
	if c, err := s.InsertClaimed(s.Context(), s.NewID(), t); c != nil || err != nil || t.State != task.Pending {
		s.Errorf("InsertClaimed of a worker that is not registered = %v, %v, the task is %s, want no claim and pending", c, err, t.State)
	}
	s.wantTask(t.ID, task.Pending, 0)
}

func testFinish(s *subject) {
	worker := s.register()
	id := s.store(0)
	first := s.claimNext(worker)
	if matched, calledBack := s.finish(first, retried(first)); !matched || calledBack {
		s.Errorf("Finish with a retry matched: %t, stored a callback: %t", matched, calledBack)
	}
	s.wantTask(id, task.Pending, 1, "retryable")
	got := s.Get(id)
	if wait := got.RunAt.Sub(first.At); wait < time.Minute {
		s.Errorf("due %v after the claim, want the Retry-After of a minute at least", wait)
	}
	if got.Attempts[0].RetryAfter != time.Minute {
		s.Errorf("RetryAfter = %v, want 1m", got.Attempts[0].RetryAfter)
	}
	if claims := s.claim(worker, 10); len(claims) != 0 {
		s.Error("it is claimed before it is due")
	}

	s.Due(id)
	second := s.claimNext(worker)
	if second.AttemptNumber() != 2 || !second.FirstAt.Equal(first.At) {
		s.Errorf("the second claim has attempt %d, first at %v; want 2, %v", second.AttemptNumber(), second.FirstAt, first.At)
	}
	s.finish(second, interrupted(second))
	third := s.claimNext(worker) // due at once
	if third.AttemptNumber() != 2 {
		s.Errorf("the third claim has attempt %d, want 2: one that was interrupted does not count", third.AttemptNumber())
	}
	other := s.store(time.Hour)
	unfinished := func() []task.ID {
		s.Helper()
		ids, err := s.Unfinished(s.Context(), []task.ID{id, other, s.NewID()})
		s.must(err)
		slices.SortFunc(ids, func(a, b task.ID) int { return slices.Compare(a[:], b[:]) })
		return ids
	}
	if diff := cmp.Diff([]task.ID{id, other}, unfinished()); diff != "" {
		s.Errorf("Unfinished (-want +got):\n%s", diff)
	}
	if matched, _ := s.finish(third, task.Decision{State: task.Failed, Reason: task.Expired}); !matched {
		s.Error("Finish without an attempt did not match")
	}
	s.wantTask(id, task.Failed, 1, "retryable", "interrupted")
	if reason := s.Get(id).Reason; reason != task.Expired {
		s.Errorf("the reason is %q, want %q", reason, task.Expired)
	}
	if diff := cmp.Diff([]task.ID{other}, unfinished()); diff != "" {
		s.Errorf("Unfinished at the end (-want +got):\n%s", diff)
	}

	t := s.newTask(0)
	t.OnFailure = &task.Callback{URL: "https://ends.melodia.app/no"}
	s.must(s.Insert(s.Context(), t))
	c := s.claimNext(worker)
	if matched, calledBack := s.finish(c, failed(c)); !matched || !calledBack {
		s.Errorf("Finish matched: %t, stored a callback: %t, want both", matched, calledBack)
	}
	if callback := s.claimNext(worker).Task; callback.ID == t.ID || callback.URL != t.OnFailure.URL {
		s.Errorf("due is %s for %s, want the callback", callback.ID, callback.URL)
	}
}

// A worker that stalled must not decide about a task that another worker has by now.
func testStalledWorker(s *subject) {
	stalled, healthy := s.register(), s.register()
	id := s.store(0)
	old := s.claimNext(stalled)
	s.Silence(stalled)
	if lost := s.reap(healthy); len(lost) != 1 {
		s.Fatalf("Reap took %d tasks, want 1", len(lost))
	}
	if matched, _ := s.finish(old, succeeded(old)); matched {
		s.Error("Finish matched while the task was pending again")
	}
	current := s.claimNext(healthy)
	for _, late := range []task.Decision{succeeded(old), failed(old), retried(old), interrupted(old)} {
		if matched, calledBack := s.finish(old, late); matched || calledBack {
			s.Errorf("Finish with %s matched while another worker held the task", late.State)
		}
	}
	s.wantTask(id, task.Running, 1, "lost")
	// Both in one batch, or one after the other: each is told of its own.
	var finishes sync.WaitGroup
	for c, want := range map[*task.Claim]bool{old: false, current: true} {
		finishes.Add(1)
		s.Finish(c, retried(c), func(matched, _ bool, err error) {
			defer finishes.Done()
			if matched != want || err != nil {
				s.Errorf("Finish under claim %d matched: %t, %v, want %t", c.Number, matched, err, want)
			}
		})
	}
	finishes.Wait()
	if matched, _ := s.finish(current, succeeded(current)); matched {
		s.Error("a second Finish under the same claim matched")
	}
	s.wantTask(id, task.Pending, 2, "lost", "retryable")
}

func testReap(s *subject) {
	me, alive, silent, gone := s.register(), s.register(), s.register(), s.register()
	hold := func(worker task.ID) task.ID {
		s.store(0)
		id := s.claimNext(worker).Task.ID
		s.Age(id)
		return id
	}
	live, lost, left, held, unheard := hold(alive), hold(silent), hold(gone), hold(me), hold(me)
	s.store(0)
	fresh := s.claimNext(me).Task.ID
	s.Silence(silent)
	s.must(s.Unregister(s.Context(), gone))
	if got, want := s.reap(me, held), []task.ID{lost, left, unheard}; !slices.Equal(got, want) {
		s.Errorf("Reap took %v, want %v", got, want)
	}
	for what, id := range map[string]task.ID{"a live worker's": live, "mine that I know of": held, "mine that was just claimed": fresh} {
		if state := s.Get(id).State; state != task.Running {
			s.Errorf("the task that is %s is %s, want running", what, state)
		}
	}
	for what, id := range map[string]task.ID{"a silent worker's": lost, "that of a worker that signed off": left, "mine whose claim got no answer": unheard} {
		got := s.Get(id)
		if got.State != task.Pending || got.AttemptCount != 1 || len(got.Attempts) != 1 || got.Attempts[0].Outcome != task.OutcomeLost ||
			got.Attempts[0].Number != 1 || got.Attempts[0].Error == "" || got.Attempts[0].Duration < time.Hour {
			s.Errorf("the task that was %s is %s, %d, %+v; want pending, and one lost attempt of an hour, which counts", what, got.State, got.AttemptCount, got.Attempts)
		}
	}
	if wait, _, err := s.NextDue(s.Context()); wait > 0 || err != nil {
		s.Errorf("the lost tasks are due in %v, %v, want at once", wait, err)
	}
	s.wantKnown(silent, false) // so that it learns that it lost its lease
	s.wantKnown(alive, true)
}

func testCancel(s *subject) {
	worker, other := s.register(), s.register()
	id := s.store(0)
	c := s.claimNext(worker)
	s.store(0)
	s.claimNext(worker)
	s.Cancel(id)
	for worker, want := range map[task.ID]map[task.ID]int64{worker: {id: c.Number}, other: {}} {
		got, err := s.Cancelled(s.Context(), worker)
		s.must(err)
		if diff := cmp.Diff(want, got); diff != "" {
			s.Errorf("Cancelled (-want +got):\n%s", diff)
		}
	}
	// What would be tried again is cancelled instead.
	if matched, _ := s.finish(c, retried(c)); !matched {
		s.Error("Finish did not match")
	}
	s.wantTask(id, task.Cancelled, 1, "retryable")
}

// Whatever takes a task from a worker and gives it to another, the number of the claim
// grows: it is what a late result is known by.
func testNumbersGrow(s *subject) {
	worker := s.register()
	id := s.store(0)
	var last int64
	for i, change := range []func(c *task.Claim){
		func(c *task.Claim) { s.finish(c, retried(c)) },
		func(c *task.Claim) { s.finish(c, interrupted(c)) },
		func(*task.Claim) {
			s.Silence(worker)
			s.reap(s.register())
			worker = s.register()
		},
		func(c *task.Claim) {
			s.finish(c, failed(c))
			s.Redrive(id)
		},
		func(c *task.Claim) {
			s.finish(c, retried(c))
			s.Cancel(id)
			s.Redrive(id)
		},
	} {
		s.Due(id)
		c := s.claimNext(worker)
		if c.Number <= last {
			s.Errorf("claim number %d after %d, before change %d: want a greater one", c.Number, last, i)
		}
		last = c.Number
		change(c)
		if matched, _ := s.finish(c, succeeded(c)); matched {
			s.Errorf("a result under claim %d matched after change %d", c.Number, i)
		}
	}
}
