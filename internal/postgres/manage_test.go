package postgres_test

import (
	"bytes"
	"errors"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/melodia/orchestrator/internal/postgres"
	"github.com/melodia/orchestrator/internal/task"
)

// keep makes a key stand for tasks.
func keep(t *testing.T, pool *pgxpool.Pool, key string, ids ...task.ID) {
	t.Helper()
	raw := make([][16]byte, len(ids))
	for i, id := range ids {
		raw[i] = id
	}
	exec(t, pool, `INSERT INTO idempotency_keys (key, fingerprint, task_ids, expires_at) VALUES ($1, '', $2, now() + interval '1 day')
		ON CONFLICT (key) DO UPDATE SET task_ids = excluded.task_ids`, key, raw)
}

// withKey makes a new task that was submitted under a key.
func withKey(key string) *task.Task {
	return newTask(func(tk *task.Task) { tk.IdempotencyKey, tk.Fingerprint = key, []byte{} })
}

func keys(t *testing.T, pool *pgxpool.Pool) []string {
	t.Helper()
	return query[[]string](t, pool, "SELECT coalesce(array_agg(key ORDER BY key), '{}') FROM idempotency_keys")
}

// whereabouts is how many rows of a task either table has.
func whereabouts(t *testing.T, pool *pgxpool.Pool, id task.ID) (live, ended int) {
	t.Helper()
	err := pool.QueryRow(t.Context(), "SELECT (SELECT count(*) FROM tasks WHERE id = $1), (SELECT count(*) FROM task_history WHERE id = $1)",
		[16]byte(id)).Scan(&live, &ended)
	if err != nil {
		t.Fatal(err)
	}
	return live, ended
}

func TestCancelEndsAPendingTask(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	tk := withKey("single")
	tk.Labels, tk.OnFailure, tk.CreatedBy = map[string]string{"kind": "play"}, &task.Callback{URL: "https://ends.melodia.app/no"}, "plays"
	insert(t, s, tk)
	keep(t, pool, "single", tk.ID)

	got, err := s.Cancel(t.Context(), tk.ID)
	if err != nil {
		t.Fatalf("Cancel: %v", err)
	}
	want := *tk
	want.State, want.FinishedAt, want.LastClaim = task.Cancelled, got.FinishedAt, 1
	same := cmp.Options{cmpopts.EquateEmpty(), cmpopts.EquateApproxTime(0), withoutBodies}
	if diff := cmp.Diff(&want, got, same); diff != "" {
		t.Errorf("Cancel (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(got, get(t, s, tk.ID), same); diff != "" {
		t.Errorf("what Get says of it then (-cancelled +got):\n%s", diff)
	}
	if live, ended := whereabouts(t, pool, tk.ID); live != 0 || ended != 1 {
		t.Errorf("%d live rows and %d ended ones, want 0 and 1", live, ended)
	}
	if left := keys(t, pool); len(left) > 0 {
		t.Errorf("the keys %q are left, want none", left)
	}
	if _, err := s.Cancel(t.Context(), tk.ID); !errors.Is(err, task.ErrEnded) {
		t.Errorf("Cancel of a cancelled task: %v, want ErrEnded", err)
	}
	if _, err := s.Cancel(t.Context(), newID()); !errors.Is(err, task.ErrNotFound) {
		t.Errorf("Cancel of an unknown task: %v, want ErrNotFound", err)
	}
}

// A key stands for one task only while its row says so: a batch keeps its key,
// and so does another task that got it since.
func TestCancelReleasesItsOwnKeyOnly(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	worker := register(t, s)
	own, batched, former, running := withKey("own"), withKey("batch"), withKey("taken over"), withKey("running")
	insert(t, s, own, batched, former, running)
	keep(t, pool, "own", own.ID)
	keep(t, pool, "batch", batched.ID, newID())
	keep(t, pool, "taken over", newID())
	keep(t, pool, "running", running.ID)
	c, err := s.ClaimOne(t.Context(), worker, running.ID)
	if err != nil {
		t.Fatal(err)
	}
	count, claims, err := s.CancelMany(t.Context(), []task.ID{own.ID, batched.ID, former.ID, running.ID, newID()})
	if err != nil || count != 4 {
		t.Fatalf("CancelMany = %d, %v, want 4", count, err)
	}
	if diff := cmp.Diff(map[task.ID]int64{running.ID: c.Number}, claims); diff != "" {
		t.Errorf("running (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{"batch", "running", "taken over"}, keys(t, pool)); diff != "" {
		t.Errorf("keys after cancelling (-want +got):\n%s", diff)
	}
	finish(t, s, c, c.Next(task.Outcome{Kind: task.OutcomeInterrupted, Cancelled: true}, c.At, 0))
	if diff := cmp.Diff([]string{"batch", "taken over"}, keys(t, pool)); diff != "" {
		t.Errorf("keys when the call was cut off (-want +got):\n%s", diff)
	}
}

// What a running task that is to be cancelled comes to.
func TestCancelOfARunningTask(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		outcome task.Outcome
		state   task.State
		counted int
	}{
		"it was cut off":                  {task.Outcome{Kind: task.OutcomeInterrupted, Cancelled: true, Error: "the task was cancelled"}, task.Cancelled, 0},
		"its instance stopped":            {task.Outcome{Kind: task.OutcomeInterrupted, Error: "shutdown"}, task.Cancelled, 0},
		"it would be retried":             {task.Outcome{Kind: task.OutcomeRetryable, StatusCode: 503, Error: "503"}, task.Cancelled, 1},
		"it would be retried, known here": {task.Outcome{Kind: task.OutcomeRetryable, StatusCode: 503, Error: "503", Cancelled: true}, task.Cancelled, 1},
		"it succeeded":                    {task.Outcome{Kind: task.OutcomeSucceeded, StatusCode: 200}, task.Succeeded, 1},
		"it failed":                       {task.Outcome{Kind: task.OutcomePermanent, StatusCode: 404, Error: "404"}, task.Failed, 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, pool := newStore(t)
			worker := register(t, s)
			tk := newTask()
			insert(t, s, tk)
			c := claimOne(t, s, worker)
			got, err := s.Cancel(t.Context(), tk.ID)
			if err != nil || got.State != task.Running || got.CancelRequestedAt.Before(c.At) || got.LastClaim != c.Number {
				t.Fatalf("Cancel = %+v, %v, want running with a cancel request under claim %d", got, err, c.Number)
			}
			if _, err := s.Cancel(t.Context(), tk.ID); !errors.Is(err, task.ErrCancelRequested) {
				t.Errorf("Cancel once more: %v, want ErrCancelRequested", err)
			}
			for range 2 { // until it has ended
				cancelled, err := s.Cancelled(t.Context(), worker)
				if diff := cmp.Diff(map[task.ID]int64{tk.ID: c.Number}, cancelled); diff != "" || err != nil {
					t.Errorf("Cancelled: %v (-want +got):\n%s", err, diff)
				}
			}
			if cancelled, err := s.Cancelled(t.Context(), register(t, s)); len(cancelled) > 0 || err != nil {
				t.Errorf("another worker is told to cancel %v", cancelled)
			}
			d := c.Next(tt.outcome, c.At, 0)
			if !finish(t, s, c, d) {
				t.Fatal("Finish did not match")
			}
			got = get(t, s, tk.ID)
			if got.State != tt.state || got.AttemptCount != tt.counted || len(got.Attempts) != 1 || got.Attempts[0].Outcome != tt.outcome.Kind {
				t.Errorf("in the end %s after %d counted attempts, %+v; want %s after %d", got.State, got.AttemptCount, got.Attempts, tt.state, tt.counted)
			}
			if live, ended := whereabouts(t, pool, tk.ID); live != 0 || ended != 1 {
				t.Errorf("%d live rows and %d ended ones, want 0 and 1", live, ended)
			}
			if finish(t, s, c, d) {
				t.Error("Finish matched twice")
			}
			if cancelled, err := s.Cancelled(t.Context(), worker); len(cancelled) > 0 || err != nil {
				t.Errorf("Cancelled still has %v, %v", cancelled, err)
			}
		})
	}
}

// The wish outlives the instance that should have heard of it.
func TestCancelOutlivesALostAttempt(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	silent, reaper := register(t, s), register(t, s)
	tk := newTask()
	insert(t, s, tk)
	claimOne(t, s, silent)
	if _, err := s.Cancel(t.Context(), tk.ID); err != nil {
		t.Fatal(err)
	}
	silence(t, pool, silent)
	if lost, err := s.Reap(t.Context(), reaper, nil, lease); len(lost) != 1 || err != nil {
		t.Fatalf("Reap = %v, %v, want 1", lost, err)
	}
	lost := get(t, s, tk.ID)
	if _, err := s.MakeDue(t.Context(), tk.ID); !errors.Is(err, task.ErrCancelRequested) {
		t.Errorf("MakeDue: %v, want ErrCancelRequested", err)
	}
	if _, err := s.Change(t.Context(), lost, nil); !errors.Is(err, task.ErrChanged) {
		t.Errorf("Change: %v, want ErrChanged", err)
	}
	c := claimOne(t, s, reaper)
	d, ok := c.MayStart(c.At)
	if ok || d.State != task.Cancelled {
		t.Fatalf("MayStart = %+v, %v, want cancelled", d, ok)
	}
	if !finish(t, s, c, d) {
		t.Error("Finish did not match")
	}
	if got := get(t, s, tk.ID); got.State != task.Cancelled || len(got.Attempts) != 1 || got.Attempts[0].Outcome != task.OutcomeLost {
		t.Errorf("in the end %s, %+v; want cancelled with one lost attempt", got.State, got.Attempts)
	}
}

func TestMakeDue(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	worker := register(t, s)
	later := newTask(func(tk *task.Task) { tk.Delay = time.Hour })
	insert(t, s, later)
	got, err := s.MakeDue(t.Context(), later.ID)
	if err != nil || got.State != task.Pending || got.RunAt.After(query[time.Time](t, pool, "SELECT now()")) || got.LastClaim != 1 {
		t.Fatalf("MakeDue = %+v, %v, want pending, due, changed once", got, err)
	}
	again, err := s.MakeDue(t.Context(), later.ID)
	if err != nil || !again.RunAt.Equal(got.RunAt) || again.LastClaim != 1 {
		t.Errorf("MakeDue of a due task = %+v, %v, want it to keep its place", again, err)
	}
	c := claimOne(t, s, worker)
	if c.Number != 2 {
		t.Errorf("claim %d, want 2", c.Number)
	}
	if _, err := s.MakeDue(t.Context(), later.ID); !errors.Is(err, task.ErrNotPending) {
		t.Errorf("MakeDue of a running task: %v, want ErrNotPending", err)
	}
	finish(t, s, c, succeeded(c))
	if _, err := s.MakeDue(t.Context(), later.ID); !errors.Is(err, task.ErrNotPending) {
		t.Errorf("MakeDue of an ended task: %v, want ErrNotPending", err)
	}
	if _, err := s.MakeDue(t.Context(), newID()); !errors.Is(err, task.ErrNotFound) {
		t.Errorf("MakeDue of an unknown task: %v, want ErrNotFound", err)
	}
}

func TestChange(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	worker := register(t, s)
	tk := newTask(func(tk *task.Task) {
		tk.Delay = time.Hour
		tk.JWT = &task.JWT{Role: "admin"}
		tk.OnFailure, tk.OIDCAudience, tk.CreatedBy = &task.Callback{URL: "https://ends.melodia.app/no"}, "https://plays.melodia.app", "plays"
	})
	insert(t, s, tk)
	want := get(t, s, tk.ID)
	want.RunAt = query[time.Time](t, pool, "SELECT now() + interval '2 hours'")
	want.ExpiresAt = want.RunAt.Add(time.Hour)
	want.Headers, want.Labels = map[string]string{"X-Tenant": "é"}, map[string]string{"kind": "\"'\\"}
	content := &task.Content{Body: []byte("\x00\xff"), ContentType: "text/plain"}
	want.Body, want.ContentType, want.BodyBytes = nil, content.ContentType, len(content.Body)
	want.Timeout = 1001 * time.Millisecond
	want.Retry = task.RetryPolicy{
		MaxAttempts: 100, MaxRetryDuration: time.Hour, MinBackoff: 10 * time.Millisecond, MaxBackoff: time.Minute, MaxDoublings: 3, RetryClientErrors: true,
	}
	stale := *want
	got, err := s.Change(t.Context(), want, content)
	if err != nil {
		t.Fatalf("Change: %v", err)
	}
	want.LastClaim = 1
	same := cmp.Options{cmpopts.EquateEmpty(), cmpopts.EquateApproxTime(0)}
	if diff := cmp.Diff(want, got, same); diff != "" {
		t.Errorf("Change (-want +got):\n%s", diff)
	}
	want.Body = content.Body
	if diff := cmp.Diff(want, get(t, s, tk.ID), same); diff != "" {
		t.Errorf("Get (-want +got):\n%s", diff)
	}
	if _, err := s.Change(t.Context(), &stale, nil); !errors.Is(err, task.ErrChanged) {
		t.Errorf("Change of what was read before: %v, want ErrChanged", err)
	}
	// With the body that it has.
	if got, err = s.Change(t.Context(), got, nil); err != nil {
		t.Fatal(err)
	}
	if kept := get(t, s, tk.ID); !bytes.Equal(kept.Body, content.Body) || kept.ContentType != content.ContentType || got.BodyBytes != len(content.Body) {
		t.Errorf("after a change of nothing the body is %q as %q, of %d bytes; want it as it was", kept.Body, kept.ContentType, got.BodyBytes)
	}
	// Without a body, never to expire, and due in a while or at once.
	for _, delay := range []time.Duration{time.Minute, 0} {
		got.ExpiresAt, got.RunAt, got.Delay = time.Time{}, time.Time{}, delay
		before := query[time.Time](t, pool, "SELECT now()")
		if got, err = s.Change(t.Context(), got, &task.Content{}); err != nil {
			t.Fatal(err)
		}
		if wait := got.RunAt.Sub(before); get(t, s, tk.ID).Body != nil || got.BodyBytes != 0 || !got.ExpiresAt.IsZero() || wait < delay || wait > delay+time.Minute {
			t.Errorf("got a body of %d bytes, expires at %v, due in %v; want none, never, %v", got.BodyBytes, got.ExpiresAt, wait, delay)
		}
	}
	c := claimOne(t, s, worker)
	if _, err := s.Change(t.Context(), got, nil); !errors.Is(err, task.ErrChanged) {
		t.Errorf("Change of a running task: %v, want ErrChanged", err)
	}
	// Pending again, but not the one that was read.
	finish(t, s, c, failedOnce(c))
	if _, err := s.Change(t.Context(), got, nil); !errors.Is(err, task.ErrChanged) {
		t.Errorf("Change of what was read before an attempt: %v, want ErrChanged", err)
	}
}

func TestRedrive(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		end     func(*testing.T, *postgres.Store, *task.Task, task.ID)
		expires time.Duration // from now, in the database; 0 is never
		told    int
		err     error
	}{
		"a failed task":                      {end: failAtOnce, told: 1},
		"a failed task that has not expired": {end: failAtOnce, told: 1, expires: time.Hour},
		"a failed task that has expired":     {end: failAtOnce, told: 1, expires: -time.Hour},
		"a cancelled task": {end: func(t *testing.T, s *postgres.Store, tk *task.Task, _ task.ID) {
			if _, err := s.Cancel(t.Context(), tk.ID); err != nil {
				t.Fatal(err)
			}
		}},
		"a task that was cancelled while it ran": {end: func(t *testing.T, s *postgres.Store, tk *task.Task, worker task.ID) {
			c := claimOne(t, s, worker)
			if _, err := s.Cancel(t.Context(), tk.ID); err != nil {
				t.Fatal(err)
			}
			finish(t, s, c, failedOnce(c))
		}, told: 1},
		"a task that succeeded": {end: func(t *testing.T, s *postgres.Store, _ *task.Task, worker task.ID) {
			c := claimOne(t, s, worker)
			finish(t, s, c, succeeded(c))
		}, err: task.ErrNotRedrivable},
		"a running task": {end: func(t *testing.T, s *postgres.Store, _ *task.Task, worker task.ID) { claimOne(t, s, worker) }, err: task.ErrNotRedrivable},
		"a pending task": {end: func(*testing.T, *postgres.Store, *task.Task, task.ID) {}, err: task.ErrNotRedrivable},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, pool := newStore(t)
			worker := register(t, s)
			tk := withKey("play-42")
			tk.Labels, tk.CreatedBy = map[string]string{"kind": "play"}, "plays"
			tk.JWT = &task.JWT{Audience: "catalogue"}
			tk.OnFailure, tk.OIDCAudience = &task.Callback{URL: "https://ends.melodia.app/no"}, "https://plays.melodia.app"
			tk.ExpiresAt = time.Date(2199, 12, 31, 0, 0, 0, 0, time.UTC)
			insert(t, s, tk)
			tt.end(t, s, tk, worker)
			exec(t, pool, "UPDATE task_history SET expires_at = now() + make_interval(secs => NULLIF($1::float8, 0))", tt.expires.Seconds())
			before := get(t, s, tk.ID)
			got, err := s.Redrive(t.Context(), tk.ID, 0)
			if !errors.Is(err, tt.err) {
				t.Fatalf("Redrive: %v, want %v", err, tt.err)
			}
			if tt.err != nil {
				if diff := cmp.Diff(before, get(t, s, tk.ID), cmpopts.EquateApproxTime(0)); diff != "" {
					t.Errorf("Redrive changed the task (-before +after):\n%s", diff)
				}
				return
			}
			want := *before
			want.State, want.Reason, want.FinishedAt, want.AttemptCount = task.Pending, "", time.Time{}, 0
			want.LastClaim++
			want.Round = 2
			want.RunAt = got.RunAt
			if tt.expires < 0 {
				want.ExpiresAt = time.Time{}
			}
			same := cmp.Options{cmpopts.EquateEmpty(), cmpopts.EquateApproxTime(0), withoutBodies}
			if diff := cmp.Diff(&want, got, same); diff != "" {
				t.Errorf("Redrive (-want +got):\n%s", diff)
			}
			if len(got.Attempts) != tt.told {
				t.Errorf("its story has %d attempts, want %d", len(got.Attempts), tt.told)
			}
			if diff := cmp.Diff(got, get(t, s, tk.ID), same); diff != "" {
				t.Errorf("what Get says of it then (-redriven +got):\n%s", diff)
			}
			if live, ended := whereabouts(t, pool, tk.ID); live != 1 || ended != 0 {
				t.Errorf("%d live rows and %d ended ones, want 1 and 0", live, ended)
			}
			c, err := s.ClaimOne(t.Context(), worker, tk.ID) // its callback is due before it
			if err != nil {
				t.Fatal(err)
			}
			if c.Number != want.LastClaim+1 || c.AttemptNumber() != 1 || !c.FirstAt.Equal(c.At) {
				t.Errorf("claim %d, attempt %d, first %v before; want claim %d, attempt 1, now", c.Number, c.AttemptNumber(), c.At.Sub(c.FirstAt), want.LastClaim+1)
			}
		})
	}
	s, _ := newStore(t)
	if _, err := s.Redrive(t.Context(), newID(), 0); !errors.Is(err, task.ErrNotFound) {
		t.Errorf("Redrive of an unknown task: %v, want ErrNotFound", err)
	}
}

func failAtOnce(t *testing.T, s *postgres.Store, _ *task.Task, worker task.ID) {
	t.Helper()
	c := claimOne(t, s, worker)
	finish(t, s, c, c.Next(task.Outcome{Kind: task.OutcomePermanent, StatusCode: 404, Error: "404"}, c.At, 0))
}

func TestRedriveManySpreads(t *testing.T) {
	t.Parallel()
	s, _ := newStore(t)
	worker := register(t, s)
	now, err := s.Now(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var ids []task.ID
	for i := range 5 {
		tk := newTask()
		// The last ones of the request, and so the last that are due, expire before.
		tk.ExpiresAt = now.Add(time.Hour)
		if i < 2 {
			tk.ExpiresAt = now.Add(30 * time.Second)
		}
		insert(t, s, tk)
		failAtOnce(t, s, tk, worker)
		ids = append([]task.ID{tk.ID}, ids...)
	}
	pending := newTask()
	insert(t, s, pending)
	n, err := s.RedriveMany(t.Context(), append(ids, pending.ID, newID()), time.Minute, time.Second, 0)
	if n != 5 || err != nil {
		t.Fatalf("RedriveMany = %d, %v, want 5", n, err)
	}
	first := get(t, s, ids[0])
	if wait := first.RunAt.Sub(pending.CreatedAt); wait < time.Minute || wait > 2*time.Minute {
		t.Errorf("the first is due after %v, want a minute", wait)
	}
	for i, id := range ids {
		if got := get(t, s, id).RunAt.Sub(first.RunAt); got != time.Duration(i)*time.Second {
			t.Errorf("task %d is due %v after the first, want %d s", i, got, i)
		}
		if got := get(t, s, id).ExpiresAt; got.IsZero() != (i > 2) {
			t.Errorf("task %d expires at %v; want never where that is before it is due", i, got)
		}
	}
}

// race plays a thousand rounds, some at a time: the acts that begin returns at
// once against each other, in turns the one and the other a little earlier, and
// then check.
func race(t *testing.T, pool *pgxpool.Pool, begin func() (id task.ID, acts []func(), check func())) {
	t.Helper()
	const rounds, atOnce = 1000, 8
	var playing sync.WaitGroup
	for range atOnce {
		playing.Go(func() {
			for round := range rounds / atOnce {
				id, acts, check := begin()
				if round%2 == 1 {
					slices.Reverse(acts)
				}
				var ready, acting sync.WaitGroup
				ready.Add(len(acts))
				for _, act := range acts {
					acting.Go(func() {
						ready.Done()
						ready.Wait()
						act()
					})
				}
				acting.Wait()
				check()
				if live, ended := whereabouts(t, pool, id); live+ended != 1 {
					t.Errorf("task %s has %d live rows and %d ended ones", id, live, ended)
				}
				if t.Failed() {
					return
				}
			}
		})
	}
	playing.Wait()
}

// seen counts which of the legal ends the rounds came to, for the log.
type seen struct {
	mu    sync.Mutex
	times map[string]int
}

func (s *seen) note(what string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.times == nil {
		s.times = make(map[string]int)
	}
	s.times[what]++
}

func TestCancelAgainstClaim(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	worker := register(t, s)
	var ends seen
	race(t, pool, func() (task.ID, []func(), func()) {
		tk := newTask()
		insert(t, s, tk)
		var c *task.Claim
		var cancelled *task.Task
		var claimErr, cancelErr error
		return tk.ID, []func(){
				func() { c, claimErr = s.ClaimOne(t.Context(), worker, tk.ID) },
				func() { cancelled, cancelErr = s.Cancel(t.Context(), tk.ID) },
			}, func() {
				switch {
				case cancelErr != nil:
					t.Errorf("Cancel: %v", cancelErr)
				case cancelled.State == task.Cancelled:
					ends.note("cancelled first")
					if !errors.Is(claimErr, task.ErrNotPending) || cancelled.LastClaim != 1 {
						t.Errorf("cancelled as version %d, and claimed with %v", cancelled.LastClaim, claimErr)
					}
				default:
					ends.note("claimed first")
					if claimErr != nil || cancelled.LastClaim != c.Number || cancelled.CancelRequestedAt.IsZero() {
						t.Fatalf("claimed with %v, and cancelled is %+v", claimErr, cancelled)
					}
					if !finish(t, s, c, failedOnce(c)) {
						t.Error("Finish did not match")
					}
				}
				if got := get(t, s, tk.ID); got.State != task.Cancelled {
					t.Errorf("in the end it is %s", got.State)
				}
			}
	})
	t.Log(ends.times)
}

func TestCancelAgainstFinish(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	worker := register(t, s)
	var ends seen
	for name, decide := range map[string]func(*task.Claim) task.Decision{"succeeded": succeeded, "retry": failedOnce} {
		race(t, pool, func() (task.ID, []func(), func()) {
			tk := newTask()
			insert(t, s, tk)
			c, err := s.ClaimOne(t.Context(), worker, tk.ID)
			if err != nil {
				t.Fatal(err)
			}
			var cancelled *task.Task
			var matched bool
			var finishErr, cancelErr error
			return tk.ID, []func(){
					func() { matched, _, finishErr = write(s, c, decide(c)) },
					func() { cancelled, cancelErr = s.Cancel(t.Context(), tk.ID) },
				}, func() {
					if !matched || finishErr != nil {
						t.Errorf("Finish = %v, %v", matched, finishErr)
					}
					want := task.Cancelled
					if name == "succeeded" {
						want = task.Succeeded
					}
					switch {
					case name == "succeeded" && errors.Is(cancelErr, task.ErrEnded):
						ends.note(name + " first")
					case cancelErr != nil:
						t.Errorf("Cancel: %v", cancelErr)
					case cancelled.State == task.Running:
						ends.note("cancelled first, then " + name)
					case name == "retry" && cancelled.State == task.Cancelled && cancelled.LastClaim == c.Number+1:
						ends.note(name + " first")
					default:
						t.Errorf("Cancel = %+v", cancelled)
					}
					if got := get(t, s, tk.ID); got.State != want || len(got.Attempts) != 1 || got.LastClaim < c.Number {
						t.Errorf("in the end it is %s with %d attempts as version %d, want %s with 1", got.State, len(got.Attempts), got.LastClaim, want)
					}
				}
		})
	}
	t.Log(ends.times)
}

// A change of something else leaves an overdue task its place.
func TestChangeKeepsThePlace(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	tk := newTask()
	insert(t, s, tk)
	exec(t, pool, "UPDATE tasks SET run_at = now() - interval '1 hour'")
	before := get(t, s, tk.ID)
	edited := *before
	edited.Labels = map[string]string{"kind": "play"}
	got, err := s.Change(t.Context(), &edited, nil)
	if err != nil || !got.RunAt.Equal(before.RunAt) {
		t.Errorf("Change = run_at %v, %v, want %v as before", got.RunAt, err, before.RunAt)
	}
	edited = *got
	edited.RunAt = before.RunAt.Add(-time.Hour) // which means now, and no better place
	if got, err = s.Change(t.Context(), &edited, nil); err != nil || got.RunAt.Before(before.RunAt) {
		t.Errorf("Change = run_at %v, %v, want none before %v", got.RunAt, err, before.RunAt)
	}
}

func TestChangeAgainstClaim(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	worker := register(t, s)
	var ends seen
	race(t, pool, func() (task.ID, []func(), func()) {
		tk := newTask()
		insert(t, s, tk)
		edited := get(t, s, tk.ID)
		edited.Timeout = time.Minute
		var c *task.Claim
		var changed *task.Task
		var claimErr, changeErr error
		return tk.ID, []func(){
				func() { c, claimErr = s.ClaimOne(t.Context(), worker, tk.ID) },
				func() { changed, changeErr = s.Change(t.Context(), edited, nil) },
			}, func() {
				switch {
				case claimErr != nil:
					t.Errorf("ClaimOne: %v", claimErr)
				case errors.Is(changeErr, task.ErrChanged):
					ends.note("claimed first")
					if c.Number != 1 || c.Task.Timeout == time.Minute {
						t.Errorf("not changed, and claim %d calls with a timeout of %v", c.Number, c.Task.Timeout)
					}
				case changeErr != nil:
					t.Errorf("Change: %v", changeErr)
				default:
					ends.note("changed first")
					if changed.LastClaim != 1 || c.Number != 2 || c.Task.Timeout != time.Minute {
						t.Errorf("changed as version %d, and claim %d calls with a timeout of %v", changed.LastClaim, c.Number, c.Task.Timeout)
					}
				}
			}
	})
	t.Log(ends.times)
}

func TestMakeDueAgainstClaim(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	worker := register(t, s)
	var ends seen
	race(t, pool, func() (task.ID, []func(), func()) {
		tk := newTask(func(tk *task.Task) { tk.Delay = time.Hour })
		insert(t, s, tk)
		var c *task.Claim
		var run *task.Task
		var claimErr, runErr error
		return tk.ID, []func(){
				func() { c, claimErr = s.ClaimOne(t.Context(), worker, tk.ID) },
				func() { run, runErr = s.MakeDue(t.Context(), tk.ID) },
			}, func() {
				switch {
				case claimErr != nil:
					t.Errorf("ClaimOne: %v", claimErr)
				case errors.Is(runErr, task.ErrNotPending) && c.Number == 1:
					ends.note("claimed first")
				case runErr == nil && run.State == task.Pending && run.LastClaim == 1 && c.Number == 2:
					ends.note("made due first")
				default:
					t.Errorf("MakeDue = %+v, %v, and claim %d", run, runErr, c.Number)
				}
			}
	})
	t.Log(ends.times)
}

// A late result of the attempt that failed, and the result itself.
func TestRedriveAgainstFinish(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	worker := register(t, s)
	var ends seen
	for _, stale := range []bool{true, false} {
		race(t, pool, func() (task.ID, []func(), func()) {
			tk := newTask(func(tk *task.Task) { tk.Retry.MaxAttempts = 1 })
			insert(t, s, tk)
			c, err := s.ClaimOne(t.Context(), worker, tk.ID)
			if err != nil {
				t.Fatal(err)
			}
			result := failedOnce(c)
			if stale {
				finish(t, s, c, result)
				result = succeeded(c)
			}
			var redriven *task.Task
			var matched bool
			var finishErr, redriveErr error
			return tk.ID, []func(){
					func() { matched, _, finishErr = write(s, c, result) },
					func() { redriven, redriveErr = s.Redrive(t.Context(), tk.ID, 0) },
				}, func() {
					if finishErr != nil || matched == stale {
						t.Errorf("Finish = %v, %v; stale: %v", matched, finishErr, stale)
					}
					if !stale && errors.Is(redriveErr, task.ErrNotRedrivable) {
						ends.note("redriven too early")
						return
					}
					if redriveErr != nil || redriven.LastClaim != c.Number+1 {
						t.Fatalf("Redrive = %+v, %v", redriven, redriveErr)
					}
					ends.note("redriven")
					next, err := s.ClaimOne(t.Context(), worker, tk.ID)
					if err != nil || next.Number != c.Number+2 {
						t.Fatalf("claimed with %v as %+v", err, next)
					}
					if finish(t, s, c, result) {
						t.Error("a late result matched the claim after it")
					}
					if !finish(t, s, next, failedOnce(next)) {
						t.Error("Finish of the claim after the redrive did not match")
					}
					if got := get(t, s, tk.ID); got.State != task.Failed || got.AttemptCount != 1 || len(got.Attempts) != 2 {
						t.Errorf("in the end it is %s, %d attempts count of %d told", got.State, got.AttemptCount, len(got.Attempts))
					}
				}
		})
	}
	t.Log(ends.times)
}

func TestCancelManyAgainstClaim(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	worker := register(t, s)
	var ends seen
	for range 25 {
		var ids []task.ID
		for range 40 {
			tk := newTask()
			insert(t, s, tk)
			ids = append(ids, tk.ID)
		}
		claims := map[task.ID]*task.Claim{}
		var running map[task.ID]int64
		var count int
		var acting sync.WaitGroup
		acting.Go(func() {
			for range 8 {
				for _, c := range claim(t, s, worker, 5) {
					claims[c.Task.ID] = c
				}
			}
		})
		acting.Go(func() {
			var err error
			if count, running, err = s.CancelMany(t.Context(), ids); err != nil {
				t.Errorf("CancelMany: %v", err)
			}
		})
		acting.Wait()
		if count != len(ids) {
			t.Errorf("CancelMany = %d, want %d", count, len(ids))
		}
		for _, id := range ids {
			c := claims[id]
			if (c != nil) != (running[id] != 0) || c != nil && running[id] != c.Number {
				t.Errorf("task %s is claimed as %+v and cancelled under claim %d", id, c, running[id])
			}
			if c != nil && !finish(t, s, c, failedOnce(c)) {
				t.Error("Finish did not match")
			}
			ends.note(map[bool]string{true: "claimed first", false: "cancelled first"}[c != nil])
			if live, ended := whereabouts(t, pool, id); live != 0 || ended != 1 {
				t.Errorf("task %s has %d live rows and %d ended ones", id, live, ended)
			}
		}
	}
	t.Log(ends.times)
}
