package postgres_test

import (
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/melodia/orchestrator/internal/postgres"
	"github.com/melodia/orchestrator/internal/task"
)

// takes is the decision on a call whose target answered 202.
func takes(c *task.Claim) task.Decision {
	return c.Next(task.Outcome{Kind: task.OutcomeSucceeded, StatusCode: 202}, c.At, 0)
}

// taken stores a task, and has its target take it. It returns the claim of the call and its token.
func taken(t *testing.T, s *postgres.Store, change ...func(*task.Task)) (*task.Claim, task.Token) {
	t.Helper()
	worker := register(t, s)
	tk := newTask(append([]func(*task.Task){func(tk *task.Task) {
		tk.Completion = &task.Completion{Timeout: time.Hour, Heartbeat: time.Minute}
	}}, change...)...)
	insert(t, s, tk)
	c, err := s.ClaimOne(t.Context(), worker, tk.ID)
	if err != nil {
		t.Fatal(err)
	}
	if got := c.Task.Completion; got == nil || *got != *tk.Completion {
		t.Fatalf("the claim has the completion %+v, want %+v", got, tk.Completion)
	}
	token := keepToken(t, s, c, 1)
	if !finish(t, s, c, takes(c)) {
		t.Fatal("the target's 202 changed nothing")
	}
	return c, token
}

func keepToken(t *testing.T, s *postgres.Store, c *task.Claim, n byte) task.Token {
	t.Helper()
	token := task.NewToken([32]byte{n})
	if ok, err := s.KeepToken(t.Context(), c, token.Hash()); err != nil || !ok {
		t.Fatalf("KeepToken: %t, %v", ok, err)
	}
	return token
}

func awaited(t *testing.T, s *postgres.Store, id task.ID) *task.Awaited {
	t.Helper()
	a, err := s.Awaited(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// A task that its target has taken hangs on no instance: neither the end of its own nor reaping touches it.
func TestTakenTaskOutlivesItsWorker(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	c, token := taken(t, s)
	for _, worker := range query[[][16]byte](t, pool, "SELECT array_agg(id) FROM workers") {
		if err := s.Unregister(t.Context(), worker); err != nil {
			t.Fatal(err)
		}
	}
	exec(t, pool, "UPDATE tasks SET claimed_at = now() - interval '30 min'")
	if lost, err := s.Reap(t.Context(), register(t, s), nil, time.Second); err != nil || len(lost) > 0 {
		t.Errorf("reaped %v: %v", lost, err)
	}
	got := get(t, s, c.Task.ID)
	if got.State != task.Running || !got.Awaiting || len(got.Attempts) > 0 {
		t.Errorf("it is %s, awaited %t, after %v", got.State, got.Awaiting, got.Attempts)
	}
	if wait := left(t, pool, got.CompletionUntil); wait < 50*time.Second || wait > 70*time.Second {
		t.Errorf("it must report within %v", wait)
	}
	if err := awaited(t, s, c.Task.ID).Check(token); err != nil {
		t.Error(err)
	}
	if plain := query[bool](t, pool, "SELECT encode(completion_tokens, 'escape') LIKE '%' || $1 || '%' OR tasks::text LIKE '%' || $1 || '%' FROM tasks", string(token)); plain {
		t.Error("the token is stored")
	}
	found, err := s.Find(t.Context(), &task.Filter{States: []task.State{task.Running}}, task.Position{}, 10)
	if err != nil || len(found) != 1 || !found[0].Awaiting {
		t.Errorf("found %v: %v", found, err)
	}
	if counts, _, err := s.Counts(t.Context()); err != nil || counts[task.Running].Tasks != 1 {
		t.Errorf("counts %v: %v", counts, err)
	}
}

// left is how long it is until a moment by the database's clock.
func left(t *testing.T, pool *pgxpool.Pool, at time.Time) time.Duration {
	t.Helper()
	return time.Duration(float64(time.Second) * query[float64](t, pool, "SELECT EXTRACT(EPOCH FROM $1::timestamptz - now())::float8", at))
}

// Reports, the end with its result, the callback that tells it, and what is left of the token.
func TestReportsAreKept(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	c, token := taken(t, s, func(tk *task.Task) {
		tk.OnSuccess = &task.Callback{URL: "https://ends.melodia.app/yes"}
	})
	id := c.Task.ID
	exec(t, pool, "UPDATE tasks SET completion_until = now() + interval '1 second'")
	read := awaited(t, s, id)
	until, err := s.Report(t.Context(), read.Claim, &task.Report{Kind: task.ReportHeartbeat, Progress: new(0.25), Note: "mixing"})
	if wait := left(t, pool, until); err != nil || wait < 50*time.Second || wait > 70*time.Second {
		t.Fatalf("a heartbeat: %v, %v", wait, err)
	}
	if _, err := s.Report(t.Context(), read.Claim, &task.Report{Note: "and mixing"}); err != nil {
		t.Fatal(err)
	}
	if got := get(t, s, id).Progress; got == nil || got.Part == nil || *got.Part != 0.25 || got.Note != "and mixing" || left(t, pool, got.At).Abs() > time.Minute {
		t.Errorf("progress %+v", got)
	}
	// Who read it before changes nothing: neither a report, nor a look for silent targets.
	old := *read.Claim
	old.Number--
	if _, err := s.Report(t.Context(), &old, &task.Report{}); !errors.Is(err, task.ErrChanged) {
		t.Errorf("an old report: %v", err)
	}
	if finish(t, s, &old, old.Next(old.Silent(read.Now), read.Now, 0)) {
		t.Error("it was lost in spite of a heartbeat")
	}
	read = awaited(t, s, id)
	report := task.Report{Kind: task.ReportSucceeded, Result: []byte(`{"b": 1.10, "a": "\u0000"}`)}
	if _, err := s.Report(t.Context(), read.Claim, &report); err != nil {
		t.Fatal(err)
	}
	if !finish(t, s, read.Claim, read.Claim.Next(report.Outcome(read.Claim, read.Now), read.Now, 0)) {
		t.Fatal("its end changed nothing")
	}
	got := get(t, s, id)
	if got.State != task.Succeeded || string(got.Result) != string(report.Result) || len(got.Attempts) != 1 || got.Attempts[0].StatusCode != 202 {
		t.Errorf("it is %s with %s after %+v", got.State, got.Result, got.Attempts)
	}
	if err := awaited(t, s, id).Check(token); !errors.Is(err, task.ErrEnded) {
		t.Errorf("its token: %v", err)
	}
	body := query[string](t, pool, "SELECT convert_from(body, 'UTF8') FROM tasks WHERE labels ->> 'callback_of' = $1", id.String())
	var told map[string]json.RawMessage
	if err := json.Unmarshal([]byte(body), &told); err != nil || string(told["result"]) != string(report.Result) {
		t.Errorf("its callback has %s: %v", body, err)
	}
}

func TestSilentTargets(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	silent, _ := taken(t, s)
	slow, _ := taken(t, s, func(tk *task.Task) { tk.Completion.Heartbeat = 0 })
	taken(t, s)
	overdue := func(listening time.Duration) (ids []task.ID) {
		t.Helper()
		found, now, err := s.Overdue(t.Context(), listening, 10)
		if err != nil || left(t, pool, now).Abs() > time.Minute {
			t.Fatalf("at %v: %v", now, err)
		}
		for _, a := range found {
			ids = append(ids, a.Claim.Task.ID)
		}
		slices.SortFunc(ids, func(a, b task.ID) int { return strings.Compare(a.String(), b.String()) })
		return ids
	}
	if got := overdue(time.Hour); got != nil {
		t.Errorf("overdue at once: %v", got)
	}
	exec(t, pool, "UPDATE tasks SET completion_until = now() - interval '1 second' WHERE id = ANY ($1)", [][16]byte{silent.Task.ID, slow.Task.ID})
	if got := overdue(50 * time.Second); got != nil {
		t.Errorf("overdue for an instance that has listened for less than a heartbeat: %v", got)
	}
	if diff := cmp.Diff([]task.ID{silent.Task.ID, slow.Task.ID}, overdue(61*time.Second)); diff != "" {
		t.Errorf("overdue (-want +got):\n%s", diff)
	}
	found, _, _ := s.Overdue(t.Context(), time.Hour, 1)
	c := found[0].Claim
	if !finish(t, s, c, c.Next(c.Silent(found[0].Now), found[0].Now, 0)) {
		t.Fatal("its loss changed nothing")
	}
	got := get(t, s, c.Task.ID)
	if got.State != task.Pending || got.Awaiting || got.AttemptCount != 1 || len(got.Attempts) != 1 || got.Attempts[0].Outcome != task.OutcomeLost {
		t.Errorf("it is %s after %+v", got.State, got.Attempts)
	}
}

// A token is of one attempt, and a redrive forgets them all.
func TestTokensOfAttempts(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	c, first := taken(t, s)
	id := c.Task.ID
	check := func(token task.Token, want error) {
		t.Helper()
		if err := awaited(t, s, id).Check(token); !errors.Is(err, want) {
			t.Errorf("got %v, want %v", err, want)
		}
	}
	read := awaited(t, s, id).Claim
	finish(t, s, read, read.Next(read.Silent(read.At), read.At, 0))
	check(first, task.ErrTokenOld) // it waits for the next attempt
	next, err := s.ClaimOne(t.Context(), register(t, s), id)
	if err != nil {
		t.Fatal(err)
	}
	check(first, task.ErrTokenOld)
	second := keepToken(t, s, next, 2)
	check(first, task.ErrTokenOld)
	check(second, nil) // while the call is under way
	check(task.NewToken([32]byte{3}), task.ErrTokenUnknown)
	if ok, err := s.KeepToken(t.Context(), c, first.Hash()); ok || err != nil {
		t.Errorf("an old claim keeps a token: %t, %v", ok, err)
	}
	finish(t, s, next, next.Next(task.Outcome{Kind: task.OutcomePermanent, StatusCode: 404}, next.At, 0))
	check(second, task.ErrEnded)
	check(first, task.ErrEnded)
	if _, err := s.Redrive(t.Context(), id, 0); err != nil {
		t.Fatal(err)
	}
	check(second, task.ErrTokenUnknown)
	if got := get(t, s, id).Completion; got == nil {
		t.Error("the redriven task has no completion")
	}
	again, err := s.ClaimOne(t.Context(), register(t, s), id)
	if err != nil {
		t.Fatal(err)
	}
	for n := range 110 {
		keepToken(t, s, again, byte(n))
	}
	if kept := query[int](t, pool, "SELECT length(completion_tokens) FROM tasks"); kept != 100*32 {
		t.Errorf("%d bytes of tokens are kept", kept)
	}
	check(task.NewToken([32]byte{109}), nil)
	if _, err := s.Awaited(t.Context(), newID()); !errors.Is(err, task.ErrNotFound) {
		t.Errorf("an unknown task: %v", err)
	}
}

func TestCancelTakenTask(t *testing.T) {
	t.Parallel()
	s, _ := newStore(t)
	c, token := taken(t, s)
	got, err := s.Cancel(t.Context(), c.Task.ID)
	if err != nil || got.State != task.Cancelled || len(got.Attempts) != 1 || got.Attempts[0].Outcome != task.OutcomeInterrupted {
		t.Fatalf("cancelled: %+v, %v", got, err)
	}
	if err := awaited(t, s, c.Task.ID).Check(token); !errors.Is(err, task.ErrEnded) {
		t.Errorf("its token: %v", err)
	}
	// Many, and one whose call is under way when it is taken.
	other, _ := taken(t, s)
	if n, running, err := s.CancelMany(t.Context(), []task.ID{other.Task.ID}); n != 1 || len(running) != 0 || err != nil {
		t.Errorf("cancelled %d, running %v: %v", n, running, err)
	}
	tk := newTask(func(tk *task.Task) { tk.Completion = &task.Completion{Timeout: time.Hour} })
	insert(t, s, tk)
	call, err := s.ClaimOne(t.Context(), register(t, s), tk.ID)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Cancel(t.Context(), tk.ID); err != nil {
		t.Fatal(err)
	}
	if !finish(t, s, call, takes(call)) {
		t.Error("the 202 changed nothing")
	}
	if got := get(t, s, tk.ID); got.State != task.Cancelled || len(got.Attempts) != 1 {
		t.Errorf("it is %s after %+v", got.State, got.Attempts)
	}
}

// A queue and a key count what targets have taken; a host does not, whose connections are free.
func TestTakenTasksCount(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	c, _ := taken(t, s, func(tk *task.Task) { tk.Queue, tk.FlowKey, tk.Priority = "covers", "user-1", task.Normal })
	loads, err := s.QueueLoads(t.Context(), []string{"covers"})
	if err != nil || loads[0].Running != 1 {
		t.Errorf("the queue has %+v running: %v", loads, err)
	}
	put(t, s, "covers", 1)
	waits := newTask(func(tk *task.Task) { tk.Queue, tk.FlowKey, tk.Priority = "covers", "user-2", task.Normal })
	insert(t, s, waits)
	ask := []task.LaneAsk{{Lane: waits.Lane(), Most: 10}}
	claims, _, err := s.ClaimLanes(t.Context(), register(t, s), ask, nil, 10)
	if err != nil || len(claims) != 0 {
		t.Errorf("claimed %v beside what a target has: %v", claims, err)
	}
	read := awaited(t, s, c.Task.ID).Claim
	finish(t, s, read, read.Next((&task.Report{Kind: task.ReportSucceeded}).Outcome(read, read.At), read.At, 0))
	claims, _, err = s.ClaimLanes(t.Context(), register(t, s), ask, nil, 10)
	if err != nil || len(claims) != 1 {
		t.Errorf("claimed %v after its end: %v", claims, err)
	}
	held, _ := taken(t, s, func(tk *task.Task) { tk.HeldHost = "https://plays.melodia.app" })
	if lane := query[*string](t, pool, "SELECT lane FROM tasks WHERE id = $1", [16]byte(held.Task.ID)); lane != nil {
		t.Errorf("it counts for its host in the lane %q", *lane)
	}
}

func put(t *testing.T, s *postgres.Store, queue string, most int) {
	t.Helper()
	q, err := s.Queue(t.Context(), queue)
	if err != nil {
		t.Fatal(err)
	}
	q.MaxConcurrent = most
	if _, err := s.PutQueue(t.Context(), q); err != nil {
		t.Fatal(err)
	}
}
