package postgres_test

import (
	"encoding/json"
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

// withCallbacks makes a new task that tells of either end.
func withCallbacks(change ...func(*task.Task)) *task.Task {
	return newTask(append([]func(*task.Task){func(tk *task.Task) {
		tk.Labels, tk.CreatedBy = map[string]string{"kind": "play"}, "plays"
		tk.OnSuccess = &task.Callback{URL: "https://ends.melodia.app/yes", Headers: map[string]string{"X-Tenant": "melodia"}}
		tk.OnFailure = &task.Callback{URL: "https://ends.melodia.app/no?q=1"}
	}}, change...)...)
}

// callbacksOf returns the callbacks of a task that are stored, in the order of
// their ids.
func callbacksOf(t *testing.T, s *postgres.Store, pool *pgxpool.Pool, id task.ID) (callbacks []*task.Task) {
	t.Helper()
	ids := query[[][16]byte](t, pool, `SELECT coalesce(array_agg(id ORDER BY id), '{}')
		FROM (SELECT id, labels FROM tasks UNION ALL SELECT id, labels FROM task_history) every WHERE labels ->> 'callback_of' = $1`, id.String())
	for _, id := range ids {
		callbacks = append(callbacks, get(t, s, id))
	}
	return callbacks
}

func urls(tasks []*task.Task) (urls []string) {
	for _, tk := range tasks {
		urls = append(urls, tk.URL)
	}
	return urls
}

// A callback is a task like others, which holds the result.
func TestCallback(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		decide  func(*task.Claim) task.Decision
		url     string
		headers map[string]string
		told    map[string]any
	}{
		"success": {
			decide: succeeded, url: "https://ends.melodia.app/yes", headers: map[string]string{"X-Tenant": "melodia"},
			told: map[string]any{"state": "succeeded", "reason": nil, "attempt_count": 1.0, "last_status_code": 200.0, "last_error": nil, "last_response_excerpt": "ok"},
		},
		"success with something to tell": {
			decide: func(c *task.Claim) task.Decision {
				return c.Next(task.Outcome{Kind: task.OutcomeSucceeded, StatusCode: 200, Error: "cut short"}, c.At, 0)
			},
			url: "https://ends.melodia.app/yes", headers: map[string]string{"X-Tenant": "melodia"},
			told: map[string]any{"state": "succeeded", "reason": nil, "attempt_count": 1.0, "last_status_code": 200.0, "last_error": "cut short", "last_response_excerpt": nil},
		},
		"failure": {
			decide: func(c *task.Claim) task.Decision {
				return c.Next(task.Outcome{Kind: task.OutcomePermanent, StatusCode: 404, Error: `the "target" answered 404`, ResponseExcerpt: "nø\n"}, c.At, 0)
			},
			url:  "https://ends.melodia.app/no?q=1",
			told: map[string]any{"state": "failed", "reason": "client_error", "attempt_count": 1.0, "last_status_code": 404.0, "last_error": `the "target" answered 404`, "last_response_excerpt": "nø\n"},
		},
		"failure before any attempt": {
			decide: func(*task.Claim) task.Decision { return task.Decision{State: task.Failed, Reason: task.Expired} },
			url:    "https://ends.melodia.app/no?q=1",
			told:   map[string]any{"state": "failed", "reason": "expired", "attempt_count": 0.0, "last_status_code": nil, "last_error": nil, "last_response_excerpt": nil},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, pool := newStore(t)
			worker := register(t, s)
			tk := withCallbacks()
			insert(t, s, tk)
			c := claimOne(t, s, worker)
			if matched, calledBack, err := write(s, c, tt.decide(c)); !matched || !calledBack || err != nil {
				t.Fatalf("Finish = %v, %v, %v, want it matched and called back", matched, calledBack, err)
			}
			parent := get(t, s, tk.ID)
			callbacks := callbacksOf(t, s, pool, tk.ID)
			if len(callbacks) != 1 {
				t.Fatalf("%d callbacks, want 1", len(callbacks))
			}
			got := callbacks[0]
			want := &task.Task{
				ID: got.ID, State: task.Pending, RunAt: parent.FinishedAt, CreatedAt: parent.FinishedAt, CreatedBy: "plays", BodyBytes: len(got.Body),
				ParentID: tk.ID, RootID: tk.ID, Hops: 1,
				Spec: task.Spec{
					URL: tt.url, Method: "POST", Headers: tt.headers, Body: got.Body, ContentType: "application/json",
					Timeout: callbackRules.Timeout, Retry: callbackRules.Retry, Labels: map[string]string{"callback_of": tk.ID.String()},
				},
			}
			if diff := cmp.Diff(want, got, cmpopts.EquateEmpty(), cmpopts.EquateApproxTime(0)); diff != "" {
				t.Errorf("the callback (-want +got):\n%s", diff)
			}
			var told map[string]any
			if err := json.Unmarshal(got.Body, &told); err != nil {
				t.Fatalf("the callback tells %s: %v", got.Body, err)
			}
			tt.told["id"], tt.told["result"], tt.told["labels"] = tk.ID.String(), nil, map[string]any{"kind": "play"}
			tt.told["finished_at"] = parent.FinishedAt.UTC().Format("2006-01-02T15:04:05.000000Z")
			if diff := cmp.Diff(tt.told, told); diff != "" {
				t.Errorf("what it tells (-want +got):\n%s", diff)
			}
			if got.ID[6]>>4 != 7 || slices.Compare(got.ID[:], tk.ID[:]) <= 0 {
				t.Errorf("its id is %s, want one of version 7 behind %s", got.ID, tk.ID)
			}
			// It has none itself.
			c = claimOne(t, s, worker)
			if matched, calledBack, err := write(s, c, succeeded(c)); c.Task.ID != got.ID || !matched || calledBack || err != nil {
				t.Errorf("Finish of the callback = %v, %v, %v, want it matched without another", matched, calledBack, err)
			}
		})
	}
}

// Whichever way a task ends, its callback for that end is stored, and no other.
func TestWhichEndsAreTold(t *testing.T) {
	t.Parallel()
	const yes, no = "https://ends.melodia.app/yes", "https://ends.melodia.app/no?q=1"
	cancel := func(t *testing.T, s *postgres.Store, id task.ID) {
		t.Helper()
		if _, err := s.Cancel(t.Context(), id); err != nil {
			t.Fatal(err)
		}
	}
	refused := func(c *task.Claim) task.Decision {
		return c.Next(task.Outcome{Kind: task.OutcomePermanent, Refused: true, Error: "refused"}, c.At, 0)
	}
	admitted := func(t *testing.T, c *task.Claim) task.Decision {
		t.Helper()
		d, ok := c.MayStart(c.At)
		if ok {
			t.Fatal("an attempt is admitted, want the end")
		}
		return d
	}
	lose := func(t *testing.T, s *postgres.Store, pool *pgxpool.Pool) {
		t.Helper()
		silent := register(t, s)
		claimOne(t, s, silent)
		silence(t, pool, silent)
		if lost, err := s.Reap(t.Context(), register(t, s), nil, lease); len(lost) != 1 || err != nil {
			t.Fatalf("Reap = %v, %v, want 1", lost, err)
		}
	}
	for name, tt := range map[string]struct {
		change func(*task.Task)
		end    func(t *testing.T, s *postgres.Store, pool *pgxpool.Pool, worker task.ID, tk *task.Task)
		state  task.State
		want   []string
	}{
		"it succeeds": {end: func(t *testing.T, s *postgres.Store, _ *pgxpool.Pool, worker task.ID, _ *task.Task) {
			c := claimOne(t, s, worker)
			finish(t, s, c, succeeded(c))
		}, state: task.Succeeded, want: []string{yes}},
		"it succeeds, run by hand": {end: func(t *testing.T, s *postgres.Store, _ *pgxpool.Pool, worker task.ID, tk *task.Task) {
			c, err := s.ClaimOne(t.Context(), worker, tk.ID)
			if err != nil {
				t.Fatal(err)
			}
			finish(t, s, c, succeeded(c))
		}, state: task.Succeeded, want: []string{yes}},
		"it succeeds, and has no callback for that": {
			change: func(tk *task.Task) { tk.OnSuccess = nil },
			end: func(t *testing.T, s *postgres.Store, _ *pgxpool.Pool, worker task.ID, _ *task.Task) {
				c := claimOne(t, s, worker)
				finish(t, s, c, succeeded(c))
			}, state: task.Succeeded},
		"it fails, and has no callback for that": {
			change: func(tk *task.Task) { tk.OnFailure = nil },
			end: func(t *testing.T, s *postgres.Store, _ *pgxpool.Pool, worker task.ID, tk *task.Task) {
				failAtOnce(t, s, tk, worker)
			}, state: task.Failed},
		"it is to be tried again": {end: func(t *testing.T, s *postgres.Store, _ *pgxpool.Pool, worker task.ID, _ *task.Task) {
			c := claimOne(t, s, worker)
			finish(t, s, c, failedOnce(c))
		}, state: task.Pending},
		"the target is refused": {end: func(t *testing.T, s *postgres.Store, _ *pgxpool.Pool, worker task.ID, _ *task.Task) {
			c := claimOne(t, s, worker)
			finish(t, s, c, refused(c))
		}, state: task.Failed, want: []string{no}},
		"it expires": {
			change: func(tk *task.Task) { tk.ExpiresAt = time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC) },
			end: func(t *testing.T, s *postgres.Store, _ *pgxpool.Pool, worker task.ID, _ *task.Task) {
				c := claimOne(t, s, worker)
				finish(t, s, c, admitted(t, c))
			}, state: task.Failed, want: []string{no}},
		"its last attempt is lost": {
			change: func(tk *task.Task) { tk.Retry.MaxAttempts = 1 },
			end: func(t *testing.T, s *postgres.Store, pool *pgxpool.Pool, worker task.ID, _ *task.Task) {
				lose(t, s, pool)
				c := claimOne(t, s, worker)
				finish(t, s, c, admitted(t, c))
			}, state: task.Failed, want: []string{no}},
		"it is cancelled": {end: func(t *testing.T, s *postgres.Store, _ *pgxpool.Pool, _ task.ID, tk *task.Task) {
			cancel(t, s, tk.ID)
		}, state: task.Cancelled},
		"it is cancelled among others": {end: func(t *testing.T, s *postgres.Store, _ *pgxpool.Pool, _ task.ID, tk *task.Task) {
			if n, _, err := s.CancelMany(t.Context(), []task.ID{tk.ID}); n != 1 || err != nil {
				t.Fatalf("CancelMany = %d, %v", n, err)
			}
		}, state: task.Cancelled},
		"its call is cut off": {end: func(t *testing.T, s *postgres.Store, _ *pgxpool.Pool, worker task.ID, tk *task.Task) {
			c := claimOne(t, s, worker)
			cancel(t, s, tk.ID)
			finish(t, s, c, c.Next(task.Outcome{Kind: task.OutcomeInterrupted, Cancelled: true}, c.At, 0))
		}, state: task.Cancelled},
		"it would be tried again and is cancelled": {end: func(t *testing.T, s *postgres.Store, _ *pgxpool.Pool, worker task.ID, tk *task.Task) {
			c := claimOne(t, s, worker)
			cancel(t, s, tk.ID)
			finish(t, s, c, failedOnce(c))
		}, state: task.Cancelled},
		"it is cancelled and succeeds all the same": {end: func(t *testing.T, s *postgres.Store, _ *pgxpool.Pool, worker task.ID, tk *task.Task) {
			c := claimOne(t, s, worker)
			cancel(t, s, tk.ID)
			finish(t, s, c, succeeded(c))
		}, state: task.Succeeded, want: []string{yes}},
		"it is lost and cancelled": {end: func(t *testing.T, s *postgres.Store, pool *pgxpool.Pool, worker task.ID, tk *task.Task) {
			exec(t, pool, "UPDATE tasks SET cancel_requested_at = now()")
			lose(t, s, pool)
			c := claimOne(t, s, worker)
			finish(t, s, c, admitted(t, c))
		}, state: task.Cancelled},
		"it fails, is redriven and succeeds": {end: func(t *testing.T, s *postgres.Store, _ *pgxpool.Pool, worker task.ID, tk *task.Task) {
			failAtOnce(t, s, tk, worker)
			if _, err := s.Redrive(t.Context(), tk.ID, 0); err != nil {
				t.Fatal(err)
			}
			c, err := s.ClaimOne(t.Context(), worker, tk.ID)
			if err != nil {
				t.Fatal(err)
			}
			finish(t, s, c, succeeded(c))
		}, state: task.Succeeded, want: []string{no, yes}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, pool := newStore(t)
			worker := register(t, s)
			tk := withCallbacks()
			if tt.change != nil {
				tt.change(tk)
			}
			insert(t, s, tk)
			tt.end(t, s, pool, worker, tk)
			if got := get(t, s, tk.ID); got.State != tt.state {
				t.Errorf("the task is %s, want %s", got.State, tt.state)
			}
			if diff := cmp.Diff(tt.want, urls(callbacksOf(t, s, pool, tk.ID))); diff != "" {
				t.Errorf("callbacks (-want +got):\n%s", diff)
			}
		})
	}
}

// A result that comes late makes no callback, whether the task is pending again,
// held by others, or has ended; nor does one whose answer was lost and that is
// written again.
func TestLateResultsAreNotTold(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	stalled, healthy := register(t, s), register(t, s)
	tk := withCallbacks()
	insert(t, s, tk)
	wantNothing := func(when string, c *task.Claim, d task.Decision) {
		t.Helper()
		before := callbacksOf(t, s, pool, tk.ID)
		matched, calledBack, err := write(s, c, d)
		if matched || calledBack || err != nil {
			t.Errorf("%s: Finish = %v, %v, %v, want nothing", when, matched, calledBack, err)
		}
		if after := callbacksOf(t, s, pool, tk.ID); len(after) != len(before) {
			t.Errorf("%s: the late result stored a callback", when)
		}
	}
	old := claimOne(t, s, stalled)
	failure := old.Next(task.Outcome{Kind: task.OutcomePermanent, StatusCode: 404}, old.At, 0)
	silence(t, pool, stalled)
	if lost, err := s.Reap(t.Context(), healthy, nil, lease); len(lost) != 1 || err != nil {
		t.Fatalf("Reap = %v, %v, want 1 task", lost, err)
	}
	wantNothing("while it is pending", old, succeeded(old))
	current := claimOne(t, s, healthy)
	wantNothing("while others hold it", old, succeeded(old))
	// So many that the one that counts shares its batch with others.
	var finishes sync.WaitGroup
	for i := range 40 {
		c, d := old, failure
		if i == 20 {
			c, d = current, succeeded(current)
		}
		finishes.Go(func() {
			matched, calledBack, err := write(s, c, d)
			if want := c == current; matched != want || calledBack != want || err != nil {
				t.Errorf("Finish under claim %d = %v, %v, %v, want %v", c.Number, matched, calledBack, err, want)
			}
		})
	}
	finishes.Wait()
	wantNothing("when it has ended", old, failure)
	wantNothing("once more", current, succeeded(current))
	if diff := cmp.Diff([]string{"https://ends.melodia.app/yes"}, urls(callbacksOf(t, s, pool, tk.ID))); diff != "" {
		t.Errorf("callbacks (-want +got):\n%s", diff)
	}
}

// There is a callback exactly where the task ended by itself, and it can be
// claimed at once.
func TestCallbackAgainstCancel(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	worker := register(t, s)
	var ends seen
	for name, decide := range map[string]func(*task.Claim) task.Decision{"succeeded": succeeded, "retry": failedOnce} {
		race(t, pool, func() (task.ID, []func(), func()) {
			tk := withCallbacks()
			insert(t, s, tk)
			c, err := s.ClaimOne(t.Context(), worker, tk.ID)
			if err != nil {
				t.Fatal(err)
			}
			var matched, calledBack bool
			var finishErr, cancelErr error
			return tk.ID, []func(){
					func() { matched, calledBack, finishErr = write(s, c, decide(c)) },
					func() { _, cancelErr = s.Cancel(t.Context(), tk.ID) },
				}, func() {
					if !matched || finishErr != nil {
						t.Errorf("Finish = %v, %v", matched, finishErr)
					}
					if cancelErr != nil && (name == "retry" || !errors.Is(cancelErr, task.ErrEnded)) {
						t.Errorf("Cancel: %v", cancelErr)
					}
					state, callbacks := get(t, s, tk.ID).State, 0
					for _, callback := range callbacksOf(t, s, pool, tk.ID) {
						callbacks++
						if _, err := s.ClaimOne(t.Context(), worker, callback.ID); err != nil {
							t.Errorf("claim the callback: %v", err)
						}
					}
					want := 0
					if state == task.Succeeded {
						want = 1
					}
					if callbacks != want || calledBack != (want == 1) || state != map[string]task.State{"succeeded": task.Succeeded, "retry": task.Cancelled}[name] {
						t.Errorf("%s: it is %s with %d callbacks, called back: %v", name, state, callbacks, calledBack)
					}
					if cancelErr != nil {
						ends.note(name + " first")
					} else {
						ends.note(name + ", and cancelled")
					}
				}
		})
	}
	t.Log(ends.times)
}
