package postgres_test

import (
	"context"
	"errors"
	"fmt"
	"os"
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

// write has a decision written and waits for that.
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
		tk.JWT = &task.JWT{Role: "a\"dmin", Audience: "catálogo"}
		tk.CreatedBy = "plays@melodia.app"
		tk.IdempotencyKey, tk.Fingerprint = "play-42", []byte{}
		tk.ParentID, tk.Hops = newID(), task.MaxHops
	})
	insert(t, s, want)
	if want.RootID != want.ParentID {
		t.Errorf("after Insert RootID = %s, want the parent %s, which is not stored", want.RootID, want.ParentID)
	}
	if want.CreatedAt.IsZero() || !want.RunAt.Equal(want.CreatedAt) {
		t.Errorf("after Insert RunAt = %v, CreatedAt = %v, want the same moment", want.RunAt, want.CreatedAt)
	}
	same := cmp.Options{cmpopts.EquateEmpty(), cmpopts.EquateApproxTime(0)}
	if diff := cmp.Diff(want, get(t, s, want.ID), same); diff != "" {
		t.Errorf("Get (-want +got):\n%s", diff)
	}
	got := claimOne(t, s, worker).Task
	want.State, want.LastClaim = task.Running, 1
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

func TestRequestThatGivesUpEndsNoOther(t *testing.T) {
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
				tk.JWT = &task.JWT{}
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

// The database's clock may be set back: who died before that must not hold tasks
// until it has caught up, and who lives loses none.
func TestReapAfterTheClockWasSetBack(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	me, other := register(t, s), register(t, s)
	insert(t, s, newTask())
	c := claimOne(t, s, other)
	exec(t, pool, "UPDATE workers SET heartbeat_at = now() + interval '1 hour'")
	if lost, err := s.Reap(t.Context(), me, nil, lease); len(lost) != 0 || err != nil {
		t.Errorf("Reap = %v, %v; want none, since it may well live", lost, err)
	}
	if ahead := query[bool](t, pool, "SELECT bool_or(heartbeat_at > now()) FROM workers"); ahead {
		t.Error("a heartbeat is from the future still")
	}
	silence(t, pool, other)
	if lost, err := s.Reap(t.Context(), me, nil, lease); len(lost) != 1 || err != nil || get(t, s, c.Task.ID).State != task.Pending {
		t.Errorf("Reap = %v, %v, want the task of the one that died", lost, err)
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
		if _, ok := c.MayStart(c.At); !ok {
			t.Fatalf("attempt %d may not start, want 3 attempts", i+1)
		}
		silence(t, pool, worker)
		if _, err := s.Reap(t.Context(), reaper, nil, lease); err != nil {
			t.Fatal(err)
		}
	}
	c := claimOne(t, s, reaper)
	d, ok := c.MayStart(c.At)
	if ok || d.Reason != task.AttemptsExhausted {
		t.Fatalf("MayStart = %+v, %v, want attempts_exhausted", d, ok)
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
		"pending with a claim's time":   "UPDATE tasks SET claimed_at = now()",
		"waiting without a lane":        "UPDATE tasks SET state = 'waiting'",
		"waiting with a worker":         "UPDATE tasks SET state = 'waiting', lane = 'mail/', worker_id = id, claimed_at = now(), claim = 1",
		"a claim below zero":            "UPDATE tasks SET claim = -1",
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
					// Without a lease all workers' tasks are taken away.
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
