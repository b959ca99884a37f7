package postgres_test

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/melodia/orchestrator/internal/postgres/pgtest"
	"github.com/melodia/orchestrator/internal/task"
)

// While the head of an ordered key is to be run by request, no other task of the key starts.
func TestRunByRequestBlocksItsOrderedKey(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	worker := register(t, s)
	exec(t, pool, `INSERT INTO queues (name, key_ordered) VALUES ('mail', true)`)
	head, next := newTask(inQueue("mail", "k", task.Normal)), newTask(inQueue("mail", "k", task.Normal))
	insert(t, s, head, next)
	got, _ := claimLanes(t, s, worker, 10, ask("mail/k")...)
	if len(got) != 1 || got[0].Task.ID != head.ID {
		t.Fatalf("claimed %v, want the first one", ids(got))
	}
	finish(t, s, got[0], task.Decision{State: task.Pending, Wait: time.Hour, Counted: true})
	if _, err := s.MakeDue(t.Context(), head.ID); err != nil {
		t.Fatal(err)
	}
	if got, states := claimLanes(t, s, worker, 10, ask("mail/k")...); len(got) != 0 || states["mail/k"].Blocked != task.BlockedByKey {
		t.Errorf("claimed %v, %+v, while the head is to be run", ids(got), states["mail/k"])
	}
	if _, facts, err := s.Explain(t.Context(), next.ID, lease); err != nil || facts.Flow.First != head.ID {
		t.Errorf("Explain names %s as the head, %v, want %s", facts.Flow.First, err, head.ID)
	}
	run := claim(t, s, worker, 10)
	if len(run) != 1 || run[0].Task.ID != head.ID {
		t.Fatalf("claimed %v, want the head", ids(run))
	}
	finish(t, s, run[0], done)
	if got, _ := claimLanes(t, s, worker, 10, ask("mail/k")...); len(got) != 1 || got[0].Task.ID != next.ID {
		t.Errorf("claimed %v, want %s", ids(got), next.ID)
	}
}

// A task that is run by request keeps its queue where its host holds it back, and when it is
// claimed; its queue knows of it.
func TestRunByRequestKeepsItsQueue(t *testing.T) {
	t.Parallel()
	s, _ := newStore(t)
	worker := register(t, s)
	held, run := newTask(inQueue("mail", "k", task.Normal)), newTask(inQueue("mail", "k2", task.Normal), func(tk *task.Task) { tk.URL = "https://auth.melodia.app/" })
	insert(t, s, held, run)
	for _, tk := range []*task.Task{held, run} {
		if _, err := s.MakeDue(t.Context(), tk.ID); err != nil {
			t.Fatal(err)
		}
	}
	loads, err := s.QueueLoads(t.Context(), []string{"mail"})
	if err != nil || loads[0].Waiting != 2 || loads[0].Keys != 2 || loads[0].OldestDue == 0 {
		t.Errorf("QueueLoads = %+v, %v; want both tasks and keys", loads, err)
	}
	q, err := s.Queue(t.Context(), "mail")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.DeleteQueue(t.Context(), "mail", q.Version); !errors.Is(err, task.ErrQueueInUse) {
		t.Errorf("DeleteQueue = %v, want ErrQueueInUse", err)
	}
	if moved, _, err := s.HoldBack(t.Context(), []string{playsHost}); moved[playsHost] != 1 || err != nil {
		t.Fatalf("HoldBack = %v, %v, want 1", moved, err)
	}
	if got := claim(t, s, worker, 10); len(got) != 1 || got[0].Task.Lane() != "mail/k2" {
		t.Fatalf("claimed %v, want one of mail/k2", got)
	}
	if got, _ := claimLanes(t, s, worker, 10, ask(task.Lane("mail/k").At(playsHost))...); len(got) != 1 || got[0].Task.ID != held.ID {
		t.Errorf("claimed %v, want %s in the lane of its queue and its host", ids(got), held.ID)
	}
}

// Each running task counts, whatever the clock did, and though its claim began before others.
func TestF1AllRunningTasksCount(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]string{
		"the clock was set back":     `UPDATE tasks SET claimed_at = now() + interval '1 hour' WHERE state = 'running'`,
		"its claim waited for locks": `UPDATE tasks SET claimed_at = now() WHERE state = 'running'`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, pool := newStore(t)
			worker := register(t, s)
			exec(t, pool, `INSERT INTO queues (name, max_concurrent) VALUES ('mail', 3)`)
			var tasks []*task.Task
			for range 5 {
				tasks = append(tasks, newTask(inQueue("mail", "", task.Normal)))
			}
			insert(t, s, tasks...)
			one := task.LaneAsk{Lane: "mail/", Most: 1}
			claimLanes(t, s, worker, 1, one)
			exec(t, pool, change)
			if got, _ := claimLanes(t, s, worker, 1, one); len(got) != 1 {
				t.Fatalf("claimed %d, want 1 of 3", len(got))
			}
			c, err := s.ClaimOne(t.Context(), worker, tasks[4].ID)
			if err != nil {
				t.Fatal(err)
			}
			exec(t, pool, `UPDATE tasks SET claimed_at = claimed_at - interval '4 s' WHERE id = $1`, [16]byte(c.Task.ID))
			exec(t, pool, `UPDATE tasks SET claimed_at = claimed_at - interval '2 hours' WHERE state = 'running'`)
			s.ForgetMarks() // which count for some seconds
			if got, _ := claimLanes(t, s, worker, 10, ask("mail/")...); len(got) != 0 {
				t.Errorf("%d more while 3 of 3 run", len(got))
			}
		})
	}
}

// A claim that the database holds up, as where a standby does not confirm its commit, counts from when it began.
// What others see meanwhile, without the lock, is not taken for all that runs.
func TestF1ClaimIsHeldUp(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		lock string
		ask  task.LaneAsk
	}{
		"queue": {`SELECT FROM queues WHERE name = 'mail' FOR NO KEY UPDATE`, task.LaneAsk{Lane: "mail/", Most: 10}},
		"key":   {`SELECT FROM queues WHERE name = 'plays' FOR NO KEY UPDATE`, task.LaneAsk{Lane: "plays/k", Most: 10}},
		"host":  {`SELECT FROM lanes WHERE name = ' ` + playsHost + `' FOR UPDATE`, task.LaneAsk{Lane: task.Lane("free/").At(playsHost), Most: 10, Running: 3}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, pool := newStore(t)
			worker := register(t, s)
			exec(t, pool, `INSERT INTO queues (name, max_concurrent, key_max_concurrent) VALUES ('mail', 3, NULL), ('plays', NULL, 3), ('free', NULL, NULL)`)
			for range 6 {
				insert(t, s, newTask(inQueue(tt.ask.Lane.Queue(), tt.ask.Lane.Key(), task.Normal)))
			}
			exec(t, pool, `UPDATE tasks SET lane = $1`, string(tt.ask.Lane))
			claimLanes(t, s, newID(), 10, tt.ask) // which makes the row of the host
			s.ForgetMarks()
			other, err := pool.Begin(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = other.Rollback(context.WithoutCancel(t.Context())) }()
			for _, sql := range []string{tt.lock, `UPDATE tasks SET state = 'running', claim = 1, worker_id = (SELECT id FROM workers), claimed_at = now() - interval '10 s', first_claimed_at = now()
				WHERE id IN (SELECT id FROM tasks ORDER BY id LIMIT 3)`} {
				if _, err := other.Exec(t.Context(), sql); err != nil {
					t.Fatal(err)
				}
			}
			if got, states := claimLanes(t, s, worker, 10, tt.ask); len(got) != 0 || states[tt.ask.Lane].Blocked != task.BlockedByOthers {
				t.Fatalf("claimed %d, %+v, while another claim has the lock", len(got), states[tt.ask.Lane])
			}
			if err := other.Commit(t.Context()); err != nil {
				t.Fatal(err)
			}
			if got, _ := claimLanes(t, s, worker, 10, tt.ask); len(got) != 0 {
				t.Errorf("%d more while 3 of 3 run", len(got))
			}
		})
	}
}

// The time for retries begins with the first claim that made an attempt.
func TestGivenBackWithoutAnAttempt(t *testing.T) {
	t.Parallel()
	for name, options := range map[string][]func(*task.Task){"a plain task": nil, "a task of a queue": {inQueue("mail", "", task.Normal)}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, _ := newStore(t)
			worker := register(t, s)
			tk := newTask(options...)
			insert(t, s, tk)
			next := func(first bool) *task.Claim {
				t.Helper()
				c, err := s.ClaimOne(t.Context(), worker, tk.ID)
				if err != nil {
					t.Fatal(err)
				}
				if c.FirstAt.Equal(c.At) != first {
					t.Errorf("claimed at %v, first at %v, want the same: %t", c.At, c.FirstAt, first)
				}
				return c
			}
			back := func(c *task.Claim, d task.Decision) {
				t.Helper()
				d.State = task.Pending
				if !finish(t, s, c, d) {
					t.Fatal("Finish matched nothing")
				}
			}
			back(next(true), task.Decision{})
			c := next(true)
			back(c, failedOnce(c))
			back(next(false), task.Decision{})
			c = next(false)
			finish(t, s, c, c.Next(task.Outcome{Kind: task.OutcomePermanent, StatusCode: 404, Error: "no"}, c.At, 0.5))
			if _, err := s.Redrive(t.Context(), tk.ID, 0); err != nil {
				t.Fatal(err)
			}
			back(next(true), task.Decision{})
			next(true)
		})
	}
}

// Instances that note hosts at the same moment do not wait for the old rows of each other.
func TestHostsThatAreOverAreNotWaitedFor(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	saveHost(t, s, task.Host{Name: "https://a.melodia.app", CongestedFor: time.Minute})
	age(t, pool, "2 minutes")
	tx, err := pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tx.Rollback(t.Context()) }()
	if _, err := tx.Exec(t.Context(), "SELECT FROM hosts FOR UPDATE"); err != nil {
		t.Fatal(err)
	}
	saveHost(t, s, task.Host{Name: playsHost, CongestedFor: time.Minute})
}

// The tasks that would be claimed first are moved first.
func TestHoldBackInLaneGoesByPriority(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	exec(t, pool, `INSERT INTO tasks (`+taskColumns+`, run_at, queue, priority, lane, state)
		SELECT `+taskValues+`, now(), 'mail', -1, 'mail/', 'waiting' FROM generate_series(1, 5001) n`)
	high := newTask(inQueue("mail", "", task.High))
	insert(t, s, high)
	if moved, more, err := s.HoldBackInLane(t.Context(), "mail/", []string{playsHost}); moved[playsHost] != 5000 || !more || err != nil {
		t.Errorf("HoldBackInLane = %v, %t, %v; want 5000 and more", moved, more, err)
	}
	if got := get(t, s, high.ID); got.HeldHost != playsHost {
		t.Error("the task of a high priority was left for later")
	}
}

// The order of a key holds for all lanes in which its tasks wait.
func TestOrderedKeyInTwoLanes(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	worker := register(t, s)
	exec(t, pool, `INSERT INTO queues (name, key_ordered) VALUES ('mail', true)`)
	held := func(tk *task.Task) { tk.HeldHost = playsHost }
	first, second, third := newTask(inQueue("mail", "k", task.Normal), held), newTask(inQueue("mail", "k", task.Normal)), newTask(inQueue("mail", "k", task.High), held)
	insert(t, s, first, second, newTask(inQueue("mail", "k!", task.High), held))
	third.Delay = time.Hour
	insert(t, s, third)
	lane, hosts := task.Lane("mail/k"), task.Lane("mail/k").At(playsHost)
	if got, states := claimLanes(t, s, worker, 10, ask(lane)...); len(got) != 0 || states[lane].Blocked != task.BlockedByKey {
		t.Fatalf("claimed %v, %+v, before the first one that waits for its host", ids(got), states[lane])
	}
	got, _ := claimLanes(t, s, worker, 10, ask(hosts)...)
	if len(got) != 1 || got[0].Task.ID != first.ID {
		t.Fatalf("claimed %v, want %s", ids(got), first.ID)
	}
	finish(t, s, got[0], done)
	got, _ = claimLanes(t, s, worker, 10, ask(lane)...)
	if len(got) != 1 || got[0].Task.ID != second.ID {
		t.Fatalf("claimed %v, want %s, which is due before %s", ids(got), second.ID, third.ID)
	}
	finish(t, s, got[0], done)
	if got, states := claimLanes(t, s, worker, 10, ask(hosts)...); len(got) != 0 || states[hosts].Blocked != "" || states[hosts].Wait < 50*time.Minute {
		t.Errorf("claimed %v, %+v, want an hour to wait", ids(got), states[hosts])
	}
}

// A claim that gets none of the due tasks says so, and is not to be made again at once.
func TestClaimOfLockedTasks(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	worker := register(t, s)
	insert(t, s, newTask(inQueue("mail", "", task.Normal)))
	want := func(why string, worker task.ID) {
		t.Helper()
		got, states := claimLanes(t, s, worker, 10, ask("mail/")...)
		if state := states["mail/"]; len(got) != 0 || state.Blocked != task.BlockedByOthers || state.Wait >= 0 {
			t.Errorf("%s: claimed %d, %+v, want none, blocked by others", why, len(got), state)
		}
	}
	want("a worker that is not registered", newID())
	tx, err := pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tx.Rollback(context.WithoutCancel(t.Context())) }()
	if _, err := tx.Exec(t.Context(), "SELECT FROM tasks FOR UPDATE"); err != nil {
		t.Fatal(err)
	}
	want("a locked task", worker)
	if err := tx.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got, states := claimLanes(t, s, worker, 10, ask("mail/")...); len(got) != 1 || states["mail/"].Blocked != "" {
		t.Errorf("claimed %d, %+v, want it", len(got), states["mail/"])
	}
}

// A claim that waits for the row of a host which another one makes holds no lane itself.
func TestMissingLanesAreMadeWithoutDeadlock(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	worker := register(t, s)
	insert(t, s, newTask(inQueue("mail", "", task.Normal)), newTask(func(tk *task.Task) { tk.HeldHost = playsHost }))
	asks := ask("mail/", " "+playsHost)
	asks[1].Running = 1
	tx, err := pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tx.Rollback(context.WithoutCancel(t.Context())) }()
	if _, err := tx.Exec(t.Context(), "INSERT INTO lanes (name) VALUES ($1)", " "+playsHost); err != nil {
		t.Fatal(err)
	}
	claimed := make(chan int)
	go func() {
		claims, _, err := s.ClaimLanes(t.Context(), worker, asks, nil, 10)
		if err != nil {
			t.Error(err)
		}
		claimed <- len(claims)
	}()
	for query[int](t, pool, "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock' AND query LIKE '%lanes%'") == 0 {
	}
	if _, err := tx.Exec(t.Context(), "UPDATE queues SET max_concurrent = 1 WHERE name = 'mail'"); err != nil {
		t.Error(err)
	}
	if err := tx.Commit(t.Context()); err != nil {
		t.Error(err)
	}
	if n := <-claimed; n != 1 {
		t.Errorf("claimed %d, want the one of the queue", n)
	}
	if got, _ := claimLanes(t, s, worker, 10, asks...); len(got) != 1 {
		t.Errorf("claimed %d, want the one of the host", len(got))
	}
}

// Two lanes of one key, and two of one host, share what the limits of the key and the host leave.
func TestLanesOfOneKeyInAClaim(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	worker := register(t, s)
	exec(t, pool, `INSERT INTO queues (name, key_max_concurrent) VALUES ('mail', 3)`)
	for range 4 {
		insert(t, s, newTask(inQueue("mail", "k", task.Normal)), newTask(inQueue("mail", "k", task.Normal), func(tk *task.Task) { tk.HeldHost = playsHost }))
	}
	lanes := ask("mail/k", task.Lane("mail/k").At(playsHost))
	if got, states := claimLanes(t, s, worker, 10, lanes...); len(got) != 3 || states["mail/k"].Blocked != task.BlockedByKey {
		t.Errorf("claimed %d, %+v, want 3 of both lanes together", len(got), states)
	}
}

// A task of an unhealthy host is moved to the lane of its host, in an ordered key too: it uses up
// no rate, and none of another host is kept.
func TestTasksOfUnhealthyHostsUseNoRate(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	worker := register(t, s)
	exec(t, pool, `INSERT INTO queues (name, max_per_second, burst) VALUES ('mail', 0.001, 2)`)
	exec(t, pool, `INSERT INTO queue_keys (queue, key, version, ordered, max_per_second, burst) VALUES ('mail', 'k', 1, true, 0.001, 1)`)
	elsewhere := func(tk *task.Task) { tk.URL = "https://auth.melodia.app/" }
	for range 3 {
		insert(t, s, newTask(inQueue("mail", "", task.Normal)), newTask(inQueue("mail", "k", task.Normal)))
	}
	well := newTask(inQueue("mail", "", task.Low), elsewhere)
	insert(t, s, well)
	got, states, err := s.ClaimLanes(t.Context(), worker, ask("mail/", "mail/k"), []string{playsHost}, 10)
	if err != nil || len(got) != 1 || got[0].Task.ID != well.ID {
		t.Fatalf("claimed %v, %v, want %s alone", ids(got), err, well.ID)
	}
	for _, state := range states {
		if !slices.Equal(state.Held, []string{playsHost}) {
			t.Errorf("%+v, want that tasks were moved", state)
		}
	}
	want := map[string]int{"mail/ " + playsHost: 3, "mail/k": 2, "mail/k " + playsHost: 1}
	for lane, n := range want {
		if got := query[int](t, pool, "SELECT count(*) FROM tasks WHERE lane = $1 AND state = 'waiting'", lane); got != n {
			t.Errorf("%d tasks wait in %q, want %d", got, lane, n)
		}
	}
	// What the host's lanes get now is what is left of the rates.
	if got, _ := claimLanes(t, s, worker, 10, ask(task.Lane("mail/k").At(playsHost), task.Lane("mail/").At(playsHost))...); len(got) != 1 {
		t.Errorf("claimed %d, want 1: the queue's burst is 2", len(got))
	}
}

// A claim never takes a task before its time, nor one that has left its lane, though it saw it due there.
func TestClaimOfTasksThatChange(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]string{
		"put off":             "UPDATE tasks SET run_at = now() + interval '1 hour'",
		"to be run":           "UPDATE tasks SET state = 'pending'",
		"of another queue":    "UPDATE tasks SET lane = 'other/', queue = 'other'",
		"deleted":             "DELETE FROM tasks",
		"of a worker that is": "DELETE FROM workers",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			url := pgtest.URL(t)
			s, pool := openStore(t, url), openPool(t, url)
			worker := register(t, s)
			exec(t, pool, `INSERT INTO queues (name, max_per_second, burst) VALUES ('mail', 1, 5)`)
			insert(t, s, newTask(inQueue("mail", "", task.Normal)))
			s.LookIntoLanesUntil(advisoryLock)
			var claims []*task.Claim
			var states []task.LaneState
			var err error
			whileLocked(t, pool, func() {
				claims, states, err = s.ClaimLanes(t.Context(), worker, ask("mail/"), nil, 10)
			}, func() { exec(t, pool, change) })
			if len(claims) != 0 || err != nil || states[0].Blocked != task.BlockedByOthers || states[0].Wait >= 0 {
				t.Errorf("claimed %v, %+v, %v, want none", ids(claims), states, err)
			}
		})
	}
}

// The first task of an ordered key that is put off in the midst of a claim does not keep the others waiting.
func TestClaimOfAHeadThatChanges(t *testing.T) {
	t.Parallel()
	url := pgtest.URL(t)
	s, pool := openStore(t, url), openPool(t, url)
	worker := register(t, s)
	exec(t, pool, `INSERT INTO queues (name, key_ordered) VALUES ('mail', true)`)
	head, next := newTask(inQueue("mail", "k", task.Normal)), newTask(inQueue("mail", "k", task.Normal))
	insert(t, s, head, next)
	s.LookIntoLanesUntil(advisoryLock)
	whileLocked(t, pool, func() {
		if claims, _, err := s.ClaimLanes(t.Context(), worker, ask("mail/k"), nil, 10); len(claims) != 0 || err != nil {
			t.Errorf("claimed %v, %v, want none", ids(claims), err)
		}
	}, func() {
		exec(t, pool, `UPDATE tasks SET run_at = now() + interval '1 hour' WHERE id = $1`, [16]byte(head.ID))
	})
	if got, _ := claimLanes(t, s, worker, 10, ask("mail/k")...); len(got) != 1 || got[0].Task.ID != next.ID {
		t.Errorf("claimed %v, want %s", ids(got), next.ID)
	}
}

// What has expired in a lane is claimed as a plain task is; all else stays where it is.
func TestExpire(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	worker := register(t, s)
	exec(t, pool, `INSERT INTO queues (name, paused_at) VALUES ('mail', now())`)
	expires := func(tk *task.Task) { tk.ExpiresAt = time.Now().Add(time.Hour) } //nolint:forbidigo // the test runs beside the database
	paused, ofHost, another := newTask(inQueue("mail", "k", task.Normal), expires), newTask(expires), newTask(inQueue("mail", "k", task.Normal), expires)
	ofHost.HeldHost = playsHost
	fresh, never, plain := newTask(inQueue("mail", "", task.Normal), expires), newTask(inQueue("mail", "", task.Normal)), newTask(expires)
	insert(t, s, paused, ofHost, another, fresh, never, plain)
	for _, tk := range []*task.Task{paused, ofHost, another, plain} {
		exec(t, pool, `UPDATE tasks SET expires_at = now() - interval '1 s' WHERE id = $1`, [16]byte(tk.ID))
	}
	exec(t, pool, `UPDATE tasks SET run_at = now() + interval '1 hour' WHERE id = $1`, [16]byte(plain.ID))
	for _, want := range []int{2, 1, 0} {
		if n, err := s.Expire(t.Context(), 2); n != want || err != nil {
			t.Fatalf("Expire = %d, %v; want %d", n, err, want)
		}
	}
	got := claim(t, s, worker, 10)
	if len(got) != 3 {
		t.Fatalf("claimed %v, want the 3 that expired in a lane", ids(got))
	}
	for _, c := range got {
		if d, may := c.MayStart(c.At); may || d.Reason != task.Expired {
			t.Errorf("task %s may start: %t (%+v)", c.Task.ID, may, d)
		}
		finish(t, s, c, task.Decision{State: task.Failed, Reason: task.Expired})
	}
	if got := query[string](t, pool, `SELECT string_agg(state, ' ' ORDER BY state) FROM tasks`); got != "pending waiting waiting" {
		t.Errorf("the others are %q, want the plain one pending and two waiting", got)
	}
}

// F8: plain tasks write no entry into an index of lanes, from their submission to their end:
// the indexes' pages do not change.
func TestF8PlainTasksAreInNoIndexOfLanes(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	worker := register(t, s)
	indexes := query[[]string](t, pool, `SELECT array_agg(indexrelid::regclass::text ORDER BY 1) FROM pg_index
		WHERE indrelid = 'tasks'::regclass AND pg_get_indexdef(indexrelid) ~ 'lane|waiting'`)
	if len(indexes) == 0 {
		t.Fatal("no index of lanes was found")
	}
	// The bytes of an index grow with its entries, also where those are dead.
	sizes := func() (bytes int64) {
		return query[int64](t, pool, `SELECT sum(pg_relation_size(indexrelid)) FROM pg_index
			WHERE indrelid = 'tasks'::regclass AND pg_get_indexdef(indexrelid) ~ 'lane|waiting'`)
	}
	live := func(n int, change ...func(*task.Task)) {
		t.Helper()
		for range n {
			tk := newTask(change...)
			insert(t, s, tk)
			for range 2 {
				c, err := s.ClaimOne(t.Context(), worker, tk.ID)
				if err != nil {
					t.Fatal(err)
				}
				finish(t, s, c, task.Decision{State: task.Pending, Counted: true})
			}
			if tk.ID[15]%2 == 0 {
				c, err := s.ClaimOne(t.Context(), worker, tk.ID)
				if err != nil {
					t.Fatal(err)
				}
				finish(t, s, c, done)
			}
		}
	}
	before := sizes()
	live(30)
	c, err := s.InsertClaimed(t.Context(), worker, newTask())
	if err != nil {
		t.Fatal(err)
	}
	silence(t, pool, worker)
	if _, err := s.Reap(t.Context(), register(t, s), nil, lease); err != nil {
		t.Fatal(err)
	}
	if _, err := s.MakeDue(t.Context(), c.Task.ID); err != nil {
		t.Fatal(err)
	}
	if after := sizes(); after != before {
		t.Errorf("plain tasks have written %d bytes into %q", after-before, indexes)
	}
	worker = register(t, s)
	live(1, inQueue("mail", "k", task.Normal))
	if after := sizes(); after == before {
		t.Error("a task of a queue has written nothing: the sizes do not show what is written")
	}
}
