package postgres_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"go.uber.org/goleak"

	"github.com/melodia/orchestrator/internal/postgres"
	"github.com/melodia/orchestrator/internal/postgres/pgtest"
	"github.com/melodia/orchestrator/internal/task"
)

const lease = 15 * time.Second

func TestMain(m *testing.M) {
	code := pgtest.Main(m)
	if err := goleak.Find(); code == 0 && err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

// newStore returns a store on a database of its own, and a pool to look behind
// the store's back.
func newStore(t *testing.T) (*postgres.Store, *pgxpool.Pool) {
	t.Helper()
	url := pgtest.URL(t)
	s, err := postgres.Open(t.Context(), postgres.Options{URL: url, MaxConns: 10, Callbacks: callbackRules, IdempotencyWindow: time.Hour})
	if err != nil {
		t.Fatalf("Open: %v", err)
	}
	t.Cleanup(s.Close)
	pool, err := pgxpool.New(t.Context(), url)
	if err != nil {
		t.Fatalf("open a pool: %v", err)
	}
	t.Cleanup(pool.Close)
	return s, pool
}

// lock locks a table, until the transaction that it returns is rolled back or
// the test ends. What needs the table hangs meanwhile.
func lock(t *testing.T, pool *pgxpool.Pool, table string) pgx.Tx {
	t.Helper()
	tx, err := pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = tx.Rollback(context.WithoutCancel(t.Context())) })
	if _, err := tx.Exec(t.Context(), "LOCK TABLE "+table); err != nil {
		t.Fatal(err)
	}
	return tx
}

// lookBack makes each look for due tasks begin at the very first one: for tests
// that change what the store may rely on.
func lookBack(s *postgres.Store) {
	always := make(chan time.Time)
	close(always)
	s.LookBack(always)
}

// callbackRules are the Timeout and Retry of callbacks.
var callbackRules = task.Spec{Timeout: 11 * time.Second, Retry: task.RetryPolicy{
	MaxAttempts: 7, MaxRetryDuration: time.Hour, MinBackoff: 250 * time.Millisecond, MaxBackoff: time.Minute, MaxDoublings: 5, RetryClientErrors: true,
}}

func newID() task.ID { return task.ID(uuid.Must(uuid.NewV7())) }

// newTask returns a valid task that is due at once; change overrides its spec.
func newTask(change ...func(*task.Task)) *task.Task {
	t := &task.Task{
		ID:    newID(),
		State: task.Pending,
		Spec: task.Spec{
			URL: "https://plays.melodia.app/register?x=1", Method: "POST",
			Body: []byte(`{"song_id": 42}`), ContentType: "application/json",
			Timeout: 30 * time.Second, Retry: task.DefaultRetryPolicy(),
		},
	}
	for _, c := range change {
		c(t)
	}
	t.BodyBytes = len(t.Body)
	return t
}

func insert(t *testing.T, s *postgres.Store, tasks ...*task.Task) {
	t.Helper()
	for _, tk := range tasks {
		if err := s.Insert(t.Context(), tk); err != nil {
			t.Fatalf("Insert: %v", err)
		}
	}
}

func register(t *testing.T, s *postgres.Store) task.ID {
	t.Helper()
	worker := newID()
	if err := s.Register(t.Context(), worker, t.Name(), 200); err != nil {
		t.Fatalf("Register: %v", err)
	}
	return worker
}

func claim(t *testing.T, s *postgres.Store, worker task.ID, limit int) []*task.Claim {
	t.Helper()
	claims, err := s.Claim(t.Context(), worker, limit)
	if err != nil {
		t.Fatalf("Claim: %v", err)
	}
	return claims
}

func claimOne(t *testing.T, s *postgres.Store, worker task.ID) *task.Claim {
	t.Helper()
	claims := claim(t, s, worker, 1)
	if len(claims) != 1 {
		t.Fatalf("Claim returned %d tasks, want 1", len(claims))
	}
	return claims[0]
}

func get(t *testing.T, s *postgres.Store, id task.ID) *task.Task {
	t.Helper()
	tk, err := s.GetWithBody(t.Context(), id)
	if err != nil {
		t.Fatalf("GetWithBody: %v", err)
	}
	return tk
}

// withoutBodies compares tasks of which one was read without its body: the size
// counts.
var withoutBodies = cmpopts.IgnoreFields(task.Task{}, "Spec.Body")

// write hands in a decision and waits until it is written.
func write(s *postgres.Store, c *task.Claim, d task.Decision) (matched, calledBack bool, err error) {
	written := make(chan struct{})
	s.Finish(c, d, func(m, b bool, e error) {
		matched, calledBack, err = m, b, e
		close(written)
	})
	<-written
	return matched, calledBack, err
}

func finish(t *testing.T, s *postgres.Store, c *task.Claim, d task.Decision) bool {
	t.Helper()
	matched, _, err := write(s, c, d)
	if err != nil {
		t.Fatalf("Finish: %v", err)
	}
	return matched
}

func exec(t *testing.T, pool *pgxpool.Pool, sql string, args ...any) {
	t.Helper()
	if _, err := pool.Exec(t.Context(), sql, args...); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
}

func query[T any](t *testing.T, pool *pgxpool.Pool, sql string, args ...any) (v T) {
	t.Helper()
	if err := pool.QueryRow(t.Context(), sql, args...).Scan(&v); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return v
}

// silence makes a worker look as if it had been silent for longer than its lease.
func silence(t *testing.T, pool *pgxpool.Pool, worker task.ID) {
	t.Helper()
	exec(t, pool, "UPDATE workers SET heartbeat_at = now() - interval '1 minute' WHERE id = $1", [16]byte(worker))
}

func succeeded(c *task.Claim) task.Decision {
	return c.Next(task.Outcome{Kind: task.OutcomeSucceeded, StatusCode: 200, ResponseExcerpt: "ok"}, c.At, 0.5)
}

func failedOnce(c *task.Claim) task.Decision {
	return c.Next(task.Outcome{
		Kind: task.OutcomeRetryable, StatusCode: 503, Error: "the target answered 503",
		Duration: 20 * time.Millisecond, RetryAfter: time.Minute,
	}, c.At, 0.5)
}

func TestTaskSurvivesTheRoundTrip(t *testing.T) {
	t.Parallel()
	s, _ := newStore(t)
	worker := register(t, s)
	want := newTask(func(tk *task.Task) {
		tk.Method = "PUT"
		tk.Headers = map[string]string{"X-Tenant": "melodia", "Authorization": "Bearer é\t1"}
		tk.Labels = map[string]string{"kind": "play", "weird.name[0]": "\"'\\"}
		tk.Body = []byte("\x00\xff{\"n\": 1e400}")
		tk.Timeout = 1001 * time.Millisecond // 1.001 is no binary fraction
		tk.ExpiresAt = time.Date(2199, 12, 31, 23, 59, 59, 123456000, time.UTC)
		tk.Retry = task.RetryPolicy{
			MaxAttempts: 100, MaxRetryDuration: 365 * 24 * time.Hour, MinBackoff: 10 * time.Millisecond,
			MaxBackoff: 24 * time.Hour, MaxDoublings: 30, RetryClientErrors: true,
		}
		tk.OnSuccess = &task.Callback{URL: "https://ends.melodia.app/ok"}
		tk.OnFailure = &task.Callback{URL: "https://ends.melodia.app/no", Headers: map[string]string{"X-Tenant": "é"}}
		tk.OIDCAudience = "https://plays.melodia.app"
		tk.CreatedBy = "plays@melodia.app"
		tk.IdempotencyKey, tk.Fingerprint = "play-42", []byte{}
		tk.ParentID, tk.Hops = newID(), task.MaxHops
	})
	insert(t, s, want)
	if want.RootID != want.ParentID {
		t.Errorf("after Insert RootID = %s, want the parent %s, which nobody knows", want.RootID, want.ParentID)
	}
	if want.CreatedAt.IsZero() || !want.RunAt.Equal(want.CreatedAt) {
		t.Errorf("after Insert RunAt = %v, CreatedAt = %v, want the same moment", want.RunAt, want.CreatedAt)
	}
	same := cmp.Options{cmpopts.EquateEmpty(), cmpopts.EquateApproxTime(0)}
	if diff := cmp.Diff(want, get(t, s, want.ID), same); diff != "" {
		t.Errorf("Get (-want +got):\n%s", diff)
	}
	got := claimOne(t, s, worker).Task
	want.State = task.Running
	if diff := cmp.Diff(want, got, same, cmpopts.IgnoreFields(task.Task{}, "Spec.Labels", "Spec.OnSuccess", "Spec.OnFailure", "CreatedBy", "IdempotencyKey", "Fingerprint", "ParentID", "RootID")); diff != "" {
		t.Errorf("Claim (-want +got):\n%s", diff)
	}
}

func TestNoBodyIsNotAnEmptyBody(t *testing.T) {
	t.Parallel()
	s, _ := newStore(t)
	for name, body := range map[string][]byte{"none": nil, "empty": {}} {
		tk := newTask(func(tk *task.Task) { tk.Body = body })
		insert(t, s, tk)
		if got := get(t, s, tk.ID).Body; (got == nil) != (body == nil) {
			t.Errorf("%s body reads back as %#v", name, got)
		}
	}
}

func TestRunAtFollowsTheDatabasesClock(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	now := query[time.Time](t, pool, "SELECT now()")
	for name, tt := range map[string]struct {
		change func(*task.Task)
		want   time.Duration // from CreatedAt
	}{
		"at once":               {func(*task.Task) {}, 0},
		"a delay":               {func(tk *task.Task) { tk.Delay = 90 * time.Minute }, 90 * time.Minute},
		"a run_at in the past":  {func(tk *task.Task) { tk.RunAt = now.AddDate(-50, 0, 0) }, 0},
		"a run_at in year 1":    {func(tk *task.Task) { tk.RunAt = time.Date(1, 1, 1, 0, 0, 0, 1000, time.UTC) }, 0},
		"the longest delay":     {func(tk *task.Task) { tk.Delay = task.Horizon }, task.Horizon},
		"a fraction of seconds": {func(tk *task.Task) { tk.Delay = 1500 * time.Microsecond }, 1500 * time.Microsecond},
	} {
		tk := newTask(tt.change)
		insert(t, s, tk)
		if got := tk.RunAt.Sub(tk.CreatedAt); got != tt.want {
			t.Errorf("%s: due %v after it was stored, want %v", name, got, tt.want)
		}
		if tk.CreatedAt.Before(now) {
			t.Errorf("%s: stored at %v, before the test began at %v", name, tk.CreatedAt, now)
		}
	}
	future := newTask(func(tk *task.Task) { tk.RunAt = now.Add(time.Hour) })
	insert(t, s, future)
	if !future.RunAt.Equal(now.Add(time.Hour)) {
		t.Errorf("RunAt = %v, want %v", future.RunAt, now.Add(time.Hour))
	}
}

func TestConcurrentInsertsAreAllStored(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	const n = 500
	var callers sync.WaitGroup
	for i := range n {
		callers.Go(func() {
			tk := newTask(func(tk *task.Task) { tk.Delay = time.Duration(i) * time.Second })
			if err := s.Insert(t.Context(), tk); err != nil {
				t.Errorf("Insert: %v", err)
			}
			// Every caller must get the times of its own row.
			if got := tk.RunAt.Sub(tk.CreatedAt); got != tk.Delay {
				t.Errorf("due after %v, want %v", got, tk.Delay)
			}
		})
	}
	callers.Wait()
	if got := query[int](t, pool, "SELECT count(*) FROM tasks"); got != n {
		t.Errorf("%d tasks stored, want %d", got, n)
	}
}

func TestBadRowFailsAlone(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	taken := newTask()
	insert(t, s, taken)
	const n = 64
	var callers sync.WaitGroup
	failed := make([]error, n)
	for i := range n {
		callers.Go(func() {
			failed[i] = s.Insert(t.Context(), newTask(func(tk *task.Task) {
				switch i {
				case 7:
					tk.ID = taken.ID // breaks the primary key
				case 21:
					tk.Retry.MaxAttempts = -1 // breaks a CHECK
				case 42:
					tk.URL = "http://a/\x00" // cannot be text
				}
			}))
		})
	}
	callers.Wait()
	for i, err := range failed {
		if bad := i == 7 || i == 21 || i == 42; (err != nil) != bad {
			t.Errorf("task %d: error %v, want one: %v", i, err, bad)
		}
		if errors.Is(err, task.ErrUnavailable) {
			t.Errorf("task %d: a bad row is called unavailable: %v", i, err)
		}
	}
	if got := query[int](t, pool, "SELECT count(*) FROM tasks"); got != 1+n-3 {
		t.Errorf("%d tasks stored, want %d", got, 1+n-3)
	}
}

func TestCallerThatGivesUpTakesNobodyAlong(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	// A lock makes every insert wait, so that the callers ride together.
	tx := lock(t, pool, "tasks IN EXCLUSIVE MODE")
	impatient, giveUp := context.WithCancel(t.Context())
	var callers sync.WaitGroup
	for i := range 20 {
		callers.Go(func() {
			ctx := t.Context()
			if i%2 == 0 {
				ctx = impatient
			}
			err := s.Insert(ctx, newTask())
			if i%2 == 0 && !errors.Is(err, context.Canceled) {
				t.Errorf("the impatient got %v, want context.Canceled", err)
			}
			if i%2 == 1 && err != nil {
				t.Errorf("the patient got %v", err)
			}
		})
	}
	giveUp()
	if err := tx.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	callers.Wait()
}

func TestClaimTakesTheLongestDueFirst(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	worker := register(t, s)
	var tasks []*task.Task
	for range 10 {
		tasks = append(tasks, newTask())
	}
	later := newTask(func(tk *task.Task) { tk.Delay = time.Hour })
	insert(t, s, append(tasks, later)...)
	// In the opposite order of their ids.
	for i, tk := range tasks {
		exec(t, pool, "UPDATE tasks SET run_at = now() - make_interval(secs => $2) WHERE id = $1", [16]byte(tk.ID), i)
	}
	var got []task.ID
	for range 5 {
		for _, c := range claim(t, s, worker, 2) {
			got = append(got, c.Task.ID)
		}
		slices.SortFunc(got[len(got)-2:], func(a, b task.ID) int { return -strings.Compare(a.String(), b.String()) })
	}
	var want []task.ID
	for _, tk := range slices.Backward(tasks) {
		want = append(want, tk.ID)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("claimed order (-want +got):\n%s", diff)
	}
	if left := claim(t, s, worker, 10); len(left) != 0 {
		t.Errorf("claimed %d tasks that are not due", len(left))
	}
}

func TestOnlyRegisteredWorkersClaim(t *testing.T) {
	t.Parallel()
	s, _ := newStore(t)
	tk := newTask()
	insert(t, s, tk)
	stranger := newID()
	if got := claim(t, s, stranger, 10); len(got) != 0 {
		t.Errorf("a worker that is not registered claimed %d tasks", len(got))
	}
	if _, err := s.ClaimOne(t.Context(), stranger, tk.ID); !errors.Is(err, task.ErrUnavailable) {
		t.Errorf("ClaimOne of a worker that is not registered: %v, want ErrUnavailable", err)
	}
}

func TestConcurrentClaimsAreDisjoint(t *testing.T) {
	t.Parallel()
	s, _ := newStore(t)
	const n = 400
	var inserts sync.WaitGroup
	for range n {
		inserts.Go(func() {
			if err := s.Insert(t.Context(), newTask()); err != nil {
				t.Errorf("Insert: %v", err)
			}
		})
	}
	inserts.Wait()
	var (
		mu      sync.Mutex
		claimed = map[task.ID]int{}
		workers sync.WaitGroup
	)
	for range 4 {
		worker := register(t, s)
		workers.Go(func() {
			for {
				claims, err := s.Claim(t.Context(), worker, 7)
				if err != nil {
					t.Errorf("Claim: %v", err)
					return
				}
				if len(claims) > 7 {
					t.Errorf("Claim returned %d tasks, want 7 at most", len(claims))
				}
				mu.Lock()
				for _, c := range claims {
					claimed[c.Task.ID]++
				}
				done := len(claimed) >= n
				mu.Unlock()
				if done {
					return
				}
			}
		})
	}
	workers.Wait()
	for id, times := range claimed {
		if times != 1 {
			t.Errorf("task %s was claimed %d times", id, times)
		}
	}
	if len(claimed) != n {
		t.Errorf("%d tasks were claimed, want %d", len(claimed), n)
	}
}

func TestClaimOne(t *testing.T) {
	t.Parallel()
	s, _ := newStore(t)
	worker := register(t, s)
	later := newTask(func(tk *task.Task) { tk.Delay = time.Hour })
	insert(t, s, later)

	c, err := s.ClaimOne(t.Context(), worker, later.ID)
	if err != nil {
		t.Fatalf("ClaimOne of a task that is not due: %v", err)
	}
	if c.Number != 1 || c.Task.ID != later.ID {
		t.Errorf("ClaimOne = claim %d of %s, want claim 1 of %s", c.Number, c.Task.ID, later.ID)
	}
	if _, err := s.ClaimOne(t.Context(), worker, later.ID); !errors.Is(err, task.ErrNotPending) {
		t.Errorf("ClaimOne of a running task: %v, want ErrNotPending", err)
	}
	finish(t, s, c, succeeded(c))
	if _, err := s.ClaimOne(t.Context(), worker, later.ID); !errors.Is(err, task.ErrNotPending) {
		t.Errorf("ClaimOne of an ended task: %v, want ErrNotPending", err)
	}
	if _, err := s.ClaimOne(t.Context(), worker, newID()); !errors.Is(err, task.ErrNotFound) {
		t.Errorf("ClaimOne of an unknown task: %v, want ErrNotFound", err)
	}
}

func TestNextDue(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	lookBack(s)
	if _, ok, err := s.NextDue(t.Context()); ok || err != nil {
		t.Errorf("NextDue of an empty store: %v, %v, want false, nil", ok, err)
	}
	tk := newTask(func(tk *task.Task) { tk.Delay = time.Hour })
	insert(t, s, tk)
	wait, ok, err := s.NextDue(t.Context())
	if err != nil || !ok || wait > time.Hour || wait < 50*time.Minute {
		t.Errorf("NextDue = %v, %v, %v, want about an hour", wait, ok, err)
	}
	exec(t, pool, "UPDATE tasks SET run_at = now() - interval '1 hour'")
	if wait, _, _ := s.NextDue(t.Context()); wait > -time.Hour {
		t.Errorf("NextDue = %v, want at least an hour overdue", wait)
	}
}

func TestFinishEndsATask(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		outcome task.Outcome
		state   task.State
		reason  task.Reason
	}{
		"succeeded": {task.Outcome{Kind: task.OutcomeSucceeded, StatusCode: 204}, task.Succeeded, ""},
		"client error": {task.Outcome{Kind: task.OutcomePermanent, StatusCode: 404, Error: "the target answered 404 Not Found",
			ResponseExcerpt: "nö \"\\ \uFFFD"}, task.Failed, task.ClientError},
		"refused": {task.Outcome{Kind: task.OutcomePermanent, Refused: true, Error: "refused"}, task.Failed, task.TargetRefused},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, pool := newStore(t)
			worker := register(t, s)
			tk := newTask(func(tk *task.Task) {
				tk.Labels = map[string]string{"kind": "play"}
				tk.OnFailure = &task.Callback{URL: "https://ends.melodia.app/no"}
				tk.OIDCAudience, tk.CreatedBy = "https://plays.melodia.app", "plays@melodia.app"
				tk.IdempotencyKey, tk.Fingerprint = "play-42", []byte{}
			})
			insert(t, s, tk)
			c := claimOne(t, s, worker)
			tt.outcome.Duration = 1234 * time.Microsecond
			if !finish(t, s, c, c.Next(tt.outcome, c.At.Add(tt.outcome.Duration), 0)) {
				t.Fatal("Finish did not match")
			}
			got := get(t, s, tk.ID)
			want := *tk
			want.State, want.Reason, want.AttemptCount, want.LastClaim = tt.state, tt.reason, 1, 1
			want.FinishedAt = got.FinishedAt
			want.Attempts = []task.Attempt{{
				Round: 1, Number: 1, StartedAt: c.At, Duration: tt.outcome.Duration, Outcome: tt.outcome.Kind,
				StatusCode: tt.outcome.StatusCode, Error: tt.outcome.Error, ResponseExcerpt: tt.outcome.ResponseExcerpt,
			}}
			if diff := cmp.Diff(&want, got, cmpopts.EquateEmpty(), cmpopts.EquateApproxTime(0)); diff != "" {
				t.Errorf("ended task (-want +got):\n%s", diff)
			}
			if got.FinishedAt.Before(c.At) {
				t.Errorf("FinishedAt = %v, before the claim at %v", got.FinishedAt, c.At)
			}
			if live, ended := whereabouts(t, pool, tk.ID); live != 0 || ended != 1 {
				t.Errorf("%d live rows and %d ended ones, want 0 and 1", live, ended)
			}
		})
	}
}

func TestFinishGivesATaskBack(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	worker := register(t, s)
	tk := newTask()
	insert(t, s, tk)

	first := claimOne(t, s, worker)
	if !finish(t, s, first, failedOnce(first)) {
		t.Fatal("Finish did not match")
	}
	got := get(t, s, tk.ID)
	if got.State != task.Pending || got.AttemptCount != 1 || len(got.Attempts) != 1 {
		t.Fatalf("after a failure: %s, %d attempts counted, %d told; want pending, 1, 1", got.State, got.AttemptCount, len(got.Attempts))
	}
	if wait := got.RunAt.Sub(first.At); wait < time.Minute {
		t.Errorf("due %v after the claim, want the Retry-After of a minute at least", wait)
	}
	if got.Attempts[0].RetryAfter != time.Minute {
		t.Errorf("RetryAfter = %v, want 1m", got.Attempts[0].RetryAfter)
	}

	exec(t, pool, "UPDATE tasks SET run_at = now()")
	second := claimOne(t, s, worker)
	if second.Number != 2 || second.AttemptNumber() != 2 || !second.FirstAt.Equal(first.At) {
		t.Errorf("second claim: number %d, attempt %d, first at %v; want 2, 2, %v", second.Number, second.AttemptNumber(), second.FirstAt, first.At)
	}
	interrupted := second.Next(task.Outcome{Kind: task.OutcomeInterrupted, Error: "shutting down"}, second.At, 0)
	if !finish(t, s, second, interrupted) {
		t.Fatal("Finish did not match")
	}
	third := claimOne(t, s, worker) // due at once
	if third.Number != 3 || third.AttemptNumber() != 2 {
		t.Errorf("third claim: number %d, attempt %d; want 3, and 2 because an interrupted attempt does not count", third.Number, third.AttemptNumber())
	}
	if !finish(t, s, third, task.Decision{State: task.Failed, Reason: task.Expired}) {
		t.Fatal("Finish did not match")
	}
	got = get(t, s, tk.ID)
	if got.State != task.Failed || got.Reason != task.Expired || got.AttemptCount != 1 || len(got.Attempts) != 2 {
		t.Errorf("at the end: %s, %s, %d counted, %d told; want failed, expired, 1, 2", got.State, got.Reason, got.AttemptCount, len(got.Attempts))
	}
}

// A worker that stalled must not decide about a task that others have by now.
func TestStalledWorkersFinishIsANoOp(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	stalled, healthy := register(t, s), register(t, s)
	tk := newTask()
	insert(t, s, tk)

	old := claimOne(t, s, stalled)
	silence(t, pool, stalled)
	if n, err := s.Reap(t.Context(), healthy, nil, lease); n != 1 || err != nil {
		t.Fatalf("Reap = %d, %v, want 1 task", n, err)
	}
	if finish(t, s, old, succeeded(old)) {
		t.Error("Finish matched while the task was pending again")
	}
	current := claimOne(t, s, healthy)
	if current.Number <= old.Number {
		t.Errorf("claim number %d after %d, want a greater one", current.Number, old.Number)
	}
	if finish(t, s, old, succeeded(old)) {
		t.Error("Finish matched while another worker held the task")
	}
	if got := get(t, s, tk.ID); got.State != task.Running || len(got.Attempts) != 1 || got.Attempts[0].Outcome != task.OutcomeLost {
		t.Errorf("task is %s with attempts %+v, want running with one lost attempt", got.State, got.Attempts)
	}
	// Both in one batch, or one after the other: each is told what became of its own.
	var finishes sync.WaitGroup
	for claim, want := range map[*task.Claim]bool{old: false, current: true} {
		finishes.Go(func() {
			if got := finish(t, s, claim, failedOnce(claim)); got != want {
				t.Errorf("Finish under claim %d matched: %v, want %v", claim.Number, got, want)
			}
		})
	}
	finishes.Wait()
	if finish(t, s, current, succeeded(current)) {
		t.Error("a second Finish under the same claim matched")
	}
	if got := get(t, s, tk.ID); got.State != task.Pending || got.AttemptCount != 2 {
		t.Errorf("task is %s after %d attempts, want pending after 2", got.State, got.AttemptCount)
	}
}

func TestReap(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	me, alive, silent, gone := register(t, s), register(t, s), register(t, s), register(t, s)
	holders := map[string]task.ID{}
	hold := func(name string, worker task.ID) *task.Claim {
		insert(t, s, newTask())
		c := claimOne(t, s, worker)
		holders[name] = c.Task.ID
		return c
	}
	hold("of a live worker", alive)
	lost := hold("of a silent worker", silent)
	hold("of a worker that signed off", gone)
	held := hold("of mine that I know", me)
	hold("of mine that I never heard of", me)
	fresh := hold("of mine that was just claimed", me)
	exec(t, pool, "UPDATE tasks SET claimed_at = now() - interval '1 hour' WHERE id <> $1", [16]byte(fresh.Task.ID))
	silence(t, pool, silent)
	if err := s.Unregister(t.Context(), gone); err != nil {
		t.Fatal(err)
	}

	n, err := s.Reap(t.Context(), me, []task.ID{held.Task.ID}, lease)
	if err != nil || n != 3 {
		t.Errorf("Reap = %d, %v, want 3 tasks", n, err)
	}
	states := map[string]task.State{}
	for name, id := range holders {
		states[name] = get(t, s, id).State
	}
	want := map[string]task.State{
		"of a live worker":              task.Running,
		"of a silent worker":            task.Pending,
		"of a worker that signed off":   task.Pending,
		"of mine that I know":           task.Running,
		"of mine that I never heard of": task.Pending,
		"of mine that was just claimed": task.Running,
	}
	if !maps.Equal(states, want) {
		t.Errorf("after Reap (-want +got):\n%s", cmp.Diff(want, states))
	}
	got := get(t, s, lost.Task.ID)
	if got.AttemptCount != 1 || len(got.Attempts) != 1 || got.Attempts[0].Outcome != task.OutcomeLost ||
		got.Attempts[0].Number != 1 || got.Attempts[0].Error == "" || got.Attempts[0].Duration < time.Hour {
		t.Errorf("the lost task tells %d, %+v; want one counted, lost attempt of an hour", got.AttemptCount, got.Attempts)
	}
	if due, _, _ := s.NextDue(t.Context()); due > 0 {
		t.Errorf("the lost tasks are due in %v, want at once", due)
	}
	if known, err := s.Heartbeat(t.Context(), silent); known || err != nil {
		t.Errorf("Heartbeat of the silent worker = %v, %v, want false: it must learn that it lost its lease", known, err)
	}
	if known, err := s.Heartbeat(t.Context(), alive); !known || err != nil {
		t.Errorf("Heartbeat of the live worker = %v, %v, want true", known, err)
	}
}

// The database's clock may be set back: who died before that must not hold tasks
// until it has caught up, and who lives loses none.
func TestReapAfterTheClockWasSetBack(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	me, other := register(t, s), register(t, s)
	insert(t, s, newTask())
	c := claimOne(t, s, other)
	exec(t, pool, "UPDATE workers SET heartbeat_at = now() + interval '1 hour'")
	if n, err := s.Reap(t.Context(), me, nil, lease); n != 0 || err != nil {
		t.Errorf("Reap = %d, %v; want none, since it may well live", n, err)
	}
	if ahead := query[bool](t, pool, "SELECT bool_or(heartbeat_at > now()) FROM workers"); ahead {
		t.Error("a heartbeat is from the future still")
	}
	silence(t, pool, other)
	if n, err := s.Reap(t.Context(), me, nil, lease); n != 1 || err != nil || get(t, s, c.Task.ID).State != task.Pending {
		t.Errorf("Reap = %d, %v, want the task of the one that died", n, err)
	}
}

// A task that is redriven again and again can still be read and written.
func TestStoryIsBounded(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	worker := register(t, s)
	for name, end := range map[string]func(*task.Claim){
		"succeeded": func(c *task.Claim) { finish(t, s, c, succeeded(c)) },
		"retried":   func(c *task.Claim) { finish(t, s, c, failedOnce(c)) },
		"lost": func(*task.Claim) {
			silence(t, pool, worker)
			if _, err := s.Reap(t.Context(), newID(), nil, lease); err != nil {
				t.Error(err)
			}
		},
	} {
		if err := s.Register(t.Context(), worker, "w", 1); err != nil {
			t.Fatal(err)
		}
		tk := newTask()
		insert(t, s, tk)
		c, err := s.ClaimOne(t.Context(), worker, tk.ID)
		if err != nil {
			t.Fatal(err)
		}
		exec(t, pool, `UPDATE tasks SET attempts = (SELECT jsonb_agg(jsonb_build_object('number', n, 'started_at', now(), 'duration_seconds', 1, 'outcome', 'retryable'))
			FROM generate_series(1001, 1200) n) WHERE id = $1`, [16]byte(tk.ID))
		end(c)
		if got := get(t, s, tk.ID).Attempts; len(got) != 200 || got[0].Number != 1002 || got[199].Number != 1 {
			t.Errorf("%s: %d attempts, from %d to %d; want 200, from 1002 to 1", name, len(got), got[0].Number, got[len(got)-1].Number)
		}
		exec(t, pool, "DELETE FROM tasks")
	}
}

// A task that brings down its process again and again must end: each loss
// counts, and the claim after the last one ends it without a call.
func TestLostAttemptsAreBounded(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	reaper := register(t, s)
	tk := newTask(func(tk *task.Task) { tk.Retry.MaxAttempts = 3 })
	insert(t, s, tk)
	for i := range 3 {
		worker := register(t, s)
		c := claimOne(t, s, worker)
		if _, ok := c.Admit(c.At); !ok {
			t.Fatalf("attempt %d is not admitted, want 3 attempts", i+1)
		}
		silence(t, pool, worker)
		if _, err := s.Reap(t.Context(), reaper, nil, lease); err != nil {
			t.Fatal(err)
		}
	}
	c := claimOne(t, s, reaper)
	d, ok := c.Admit(c.At)
	if ok || d.Reason != task.AttemptsExhausted {
		t.Fatalf("Admit = %+v, %v, want attempts_exhausted", d, ok)
	}
	finish(t, s, c, d)
	if got := get(t, s, tk.ID); got.State != task.Failed || got.AttemptCount != 3 || len(got.Attempts) != 3 {
		t.Errorf("task is %s after %d of %d attempts, want failed after 3 of 3", got.State, got.AttemptCount, len(got.Attempts))
	}
}

// A database that is there must not be blamed for what cannot be read of it.
func TestRowThatCannotBeRead(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	tk := newTask()
	insert(t, s, tk)
	exec(t, pool, "UPDATE tasks SET headers = '[1]'")
	if got, err := s.Get(t.Context(), tk.ID); err == nil || errors.Is(err, task.ErrUnavailable) {
		t.Errorf("Get = %v, %v, want an error that is not ErrUnavailable", got, err)
	}
}

func TestRegisterMayBeRepeated(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	worker := register(t, s)
	silence(t, pool, worker)
	if err := s.Register(t.Context(), worker, "again", 200); err != nil {
		t.Errorf("Register again: %v", err)
	}
	if fresh := query[bool](t, pool, "SELECT heartbeat_at > now() - interval '30 seconds' FROM workers"); !fresh {
		t.Error("registering again did not renew the heartbeat")
	}
}

// Whatever the other connections wait for, a lease is renewed.
func TestHeartbeatHasAConnectionOfItsOwn(t *testing.T) {
	t.Parallel()
	s, _ := newStore(t)
	worker := register(t, s)
	release := s.TakeConnections(t)
	defer release()
	if known, err := s.Heartbeat(t.Context(), worker); !known || err != nil {
		t.Errorf("Heartbeat = %v, %v", known, err)
	}
}

func TestGetUnknown(t *testing.T) {
	t.Parallel()
	s, _ := newStore(t)
	if _, err := s.Get(t.Context(), newID()); !errors.Is(err, task.ErrNotFound) {
		t.Errorf("Get = %v, want ErrNotFound", err)
	}
}

// The schema itself refuses what no code may ever write.
func TestSchemaStatesTheStateMachine(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	worker := register(t, s)
	insert(t, s, newTask())
	c := claimOne(t, s, worker)
	finish(t, s, c, succeeded(c))
	insert(t, s, newTask())
	for name, sql := range map[string]string{
		"an ended task in tasks":        "UPDATE tasks SET state = 'succeeded'",
		"running without a worker":      "UPDATE tasks SET state = 'running', claim = 1",
		"running without a claim":       "UPDATE tasks SET state = 'running', worker_id = id, claimed_at = now()",
		"pending with a worker":         "UPDATE tasks SET worker_id = id, claimed_at = now()",
		"more attempts than allowed":    "UPDATE tasks SET attempt_count = max_attempts + 1",
		"attempts that are no list":     "UPDATE tasks SET attempts = '{}'",
		"a live task in history":        "UPDATE task_history SET state = 'running'",
		"failed without a reason":       "UPDATE task_history SET state = 'failed'",
		"failed for an unknown reason":  "UPDATE task_history SET state = 'failed', reason = 'bored'",
		"succeeded for a reason":        "UPDATE task_history SET reason = 'expired'",
		"history with too many retries": "UPDATE task_history SET attempt_count = max_attempts + 1",
	} {
		if _, err := pool.Exec(t.Context(), sql); err == nil {
			t.Errorf("the schema lets pass: %s", name)
		} else if !strings.Contains(err.Error(), "SQLSTATE 23514") {
			t.Errorf("%s: %v, want a broken CHECK", name, err)
		}
	}
}

// Finishing, reaping and claiming lock the same rows; they must not wait for
// each other in a circle, and between them every task ends exactly once.
func TestConcurrentFinishReapAndClaim(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	const n = 300
	for range n {
		// More attempts than the reaping below can use up.
		insert(t, s, newTask(func(tk *task.Task) { tk.Retry.MaxAttempts = 100 }))
	}
	var ended, workers sync.WaitGroup
	ended.Add(n)
	allEnded := make(chan struct{})
	go func() { ended.Wait(); close(allEnded) }()
	for range 3 {
		worker := register(t, s)
		workers.Go(func() {
			for round := 0; !t.Failed(); round++ {
				select {
				case <-allEnded:
					return
				default:
				}
				claims, err := s.Claim(t.Context(), worker, 20)
				if err != nil {
					t.Errorf("Claim: %v", err)
				}
				var finishes sync.WaitGroup
				for _, c := range claims {
					finishes.Go(func() {
						matched, _, err := write(s, c, succeeded(c))
						if err != nil {
							t.Errorf("Finish: %v", err)
						}
						if matched {
							ended.Done()
						}
					})
				}
				if round < 20 { // for ever, and nothing would end
					// Without a lease everybody's tasks are taken away.
					if _, err := s.Reap(t.Context(), worker, nil, 0); err != nil {
						t.Errorf("Reap: %v", err)
					}
				}
				finishes.Wait()
				if err := s.Register(t.Context(), worker, "again", 200); err != nil {
					t.Errorf("Register: %v", err)
				}
			}
		})
	}
	workers.Wait()
	if got := query[int](t, pool, "SELECT count(*) FROM task_history WHERE state = 'succeeded'"); got != n {
		t.Errorf("%d tasks in history, want %d", got, n)
	}
	if got := query[int](t, pool, "SELECT count(*) FROM tasks"); got != 0 {
		t.Errorf("%d tasks left, want none", got)
	}
}

// A task that an instance begins at once is stored as claimed: nobody else
// finds it, and it is finished like any other.
func TestInsertClaimed(t *testing.T) {
	t.Parallel()
	s, _ := newStore(t)
	w := register(t, s)
	tk := newTask()
	c, err := s.InsertClaimed(t.Context(), w, tk)
	if err != nil || c == nil {
		t.Fatalf("InsertClaimed = %v, %v, want a claim", c, err)
	}
	if c.Task != tk || c.Number != 1 || tk.State != task.Running || !c.At.Equal(tk.CreatedAt) || !c.FirstAt.Equal(c.At) || !tk.RunAt.Equal(tk.CreatedAt) {
		t.Errorf("claim %+v of %+v, want number 1 of a running task, at the moment of its creation", c, tk)
	}
	if got := get(t, s, tk.ID); got.State != task.Running {
		t.Errorf("it is stored as %s, want running", got.State)
	}
	if others := claim(t, s, register(t, s), 10); len(others) > 0 {
		t.Errorf("another worker claims it too")
	}
	retry := failedOnce(c)
	retry.Wait = 0
	if !finish(t, s, c, retry) {
		t.Error("Finish matched nothing")
	}
	if again := claimOne(t, s, w); again.Number != 2 || !again.FirstAt.Equal(c.FirstAt) {
		t.Errorf("its next claim is %+v, want number 2 and the first one's moment", again)
	}
}

// A worker whose lease was lost begins nothing.
func TestInsertClaimedByAStranger(t *testing.T) {
	t.Parallel()
	s, _ := newStore(t)
	tk := newTask()
	if c, err := s.InsertClaimed(t.Context(), newID(), tk); c != nil || err != nil {
		t.Errorf("InsertClaimed = %v, %v, want no claim", c, err)
	}
	if got := get(t, s, tk.ID); got.State != task.Pending || tk.State != task.Pending {
		t.Errorf("it is %s and stored as %s, want pending", tk.State, got.State)
	}
}
