package postgres_test

import (
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/melodia/orchestrator/internal/postgres"
	"github.com/melodia/orchestrator/internal/task"
)

// findAll follows a filter's pages to their end.
func findAll(t *testing.T, s *postgres.Store, f task.Filter, limit int) (all []*task.Task) {
	t.Helper()
	for behind := (task.Position{}); ; {
		page, err := s.Find(t.Context(), &f, behind, limit)
		if err != nil {
			t.Fatalf("Find: %v", err)
		}
		all = append(all, page...)
		if len(page) < limit {
			return all
		}
		behind = f.PositionOf(page[limit-1])
	}
}

// matches is what a filter means, said once more.
func matches(f task.Filter, t *task.Task) bool {
	within := func(at, after, before time.Time) bool {
		return (after.IsZero() || !at.Before(after)) && (before.IsZero() || at.Before(before))
	}
	for name, value := range f.Labels {
		if got, ok := t.Labels[name]; !ok || got != value {
			return false
		}
	}
	host := regexp.MustCompile(`^https?://(\[[^]]*\]|[^/:?]*)`).FindStringSubmatch(t.URL)[1]
	return (len(f.States) == 0 || slices.Contains(f.States, t.State)) &&
		(len(f.Reasons) == 0 || slices.Contains(f.Reasons, t.Reason)) &&
		(f.Host == "" || f.Host == host) && strings.HasPrefix(t.URL, f.URLPrefix) &&
		within(t.CreatedAt, f.CreatedAfter, f.CreatedBefore) && within(t.RunAt, f.RunAfter, f.RunBefore) &&
		(t.State.Terminal() && within(t.FinishedAt, f.FinishedAfter, f.FinishedBefore) || f.FinishedAfter.IsZero() && f.FinishedBefore.IsZero()) &&
		t.AttemptCount >= f.MinAttempts && (f.CreatedBy == "" || f.CreatedBy == t.CreatedBy) &&
		(f.Queue == "" || f.Queue == t.Queue) && (f.FlowKey == "" || f.FlowKey == t.FlowKey)
}

// someTasks stores tasks of all kinds, some of them over, and returns them. now
// is the database's; they were created in the two days before.
func someTasks(t *testing.T, s *postgres.Store, pool *pgxpool.Pool, now time.Time) (all []*task.Task) {
	t.Helper()
	keepHistory(t, s, retention)
	worker := register(t, s)
	urls := []string{
		"https://a.example/plays/1", "https://a.example/plays/2?x=/y", "http://a.example:8080/", "https://a.example", "https://a.example?q",
		"https://a.examples/plays/1", "https://a.example.org/plays", "https://a.example-b/", "https://a.example2/", "https://b.example/a.example/",
		"https://[fd00::1]/", "https://[fd00::1]:80/", "https://[fd00::11]/", "https://10.1.2.3/é", "https://10.1.2.3/\U0010ffff",
	}
	for n := range 120 {
		at := now.Add(-time.Duration(n) * 24 * time.Minute)
		tk := newTask(func(tk *task.Task) {
			tk.ID = task.NewID(at.Add(-time.Second), uint64(n)) //nolint:gosec // small
			tk.URL = urls[n%len(urls)]
			tk.Labels = map[string]string{"kind": fmt.Sprint("k", n%3), "n'\"": fmt.Sprint(n % 40)}
			if n%7 == 0 {
				tk.Labels = nil
			}
			if n%2 == 0 {
				tk.CreatedBy = fmt.Sprint("caller", n%4)
			}
			tk.Retry.MaxAttempts = 1 + n%5
			if n%3 == 0 {
				tk.Queue, tk.FlowKey, tk.Priority = fmt.Sprint("queue", n%2), fmt.Sprint("key", n%5), task.Normal
			}
		})
		insert(t, s, tk)
		if n%8 < 6 {
			c, err := s.ClaimOne(t.Context(), worker, tk.ID)
			if err != nil {
				t.Fatal(err)
			}
			d := succeeded(c)
			switch n % 8 {
			case 0:
				d = failedOnce(c)
			case 1:
				d = c.Next(task.Outcome{Kind: task.OutcomePermanent, StatusCode: 404, Error: "no"}, c.At, 0.5)
			case 2:
				d = task.Decision{State: task.Failed, Reason: task.Expired}
			case 3:
				d = task.Decision{State: task.Cancelled}
			case 5:
				all = append(all, tk) // stays running
				continue
			}
			finish(t, s, c, d)
		}
		all = append(all, tk)
	}
	for n, tk := range all {
		created := now.Add(-time.Duration(n) * 24 * time.Minute)
		run, finished := created.Add(time.Duration(n%9)*time.Hour), created.Add(time.Duration(n%5)*time.Hour)
		for _, sql := range []string{
			"UPDATE tasks SET created_at = $2, run_at = $3, attempt_count = LEAST($4, max_attempts) WHERE id = $1 AND $5::timestamptz IS NOT NULL",
			"UPDATE task_history SET created_at = $2, run_at = $3, attempt_count = LEAST($4, max_attempts), finished_at = $5 WHERE id = $1",
		} {
			exec(t, pool, sql, [16]byte(tk.ID), created, run, n%4, finished)
		}
		all[n] = get(t, s, tk.ID)
	}
	return all
}

func TestFind(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	now := query[time.Time](t, pool, "SELECT now()")
	all := someTasks(t, s, pool, now)
	day := 24 * time.Hour
	filters := map[string]task.Filter{
		"all":                {},
		"labels":             {Labels: map[string]string{"kind": "k1"}},
		"two labels":         {Labels: map[string]string{"kind": "k1", "n'\"": "4"}},
		"no such label":      {Labels: map[string]string{"kind": ""}},
		"host":               {Host: "a.example"},
		"host in IPv6":       {Host: "[fd00::1]"},
		"host in IPv4":       {Host: "10.1.2.3"},
		"no such host":       {Host: "a"},
		"url":                {URLPrefix: "https://a.example/plays/"},
		"url of any host":    {URLPrefix: "https://a"},
		"the whole url":      {URLPrefix: "https://a.example/plays/2?x=/y"},
		"url with a letter":  {URLPrefix: "https://10.1.2.3/é"},
		"url with the last":  {URLPrefix: "https://10.1.2.3/\U0010ffff"},
		"url with wildcards": {URLPrefix: "https://a_example%"},
		"created after":      {CreatedAfter: now.Add(-day)},
		"created since 1970": {CreatedAfter: time.Unix(0, 0)},
		"created before":     {CreatedBefore: now.Add(-day)},
		"created between":    {CreatedAfter: all[50].CreatedAt, CreatedBefore: all[20].CreatedAt},
		"run after":          {RunAfter: now.Add(-day)},
		"run before":         {RunBefore: now.Add(-day)},
		"run between":        {RunAfter: all[50].RunAt, RunBefore: all[50].RunAt.Add(5 * time.Hour)},
		"finished after":     {FinishedAfter: now.Add(-day)},
		"finished before":    {FinishedBefore: now.Add(-day)},
		"finished between":   {FinishedAfter: all[50].CreatedAt, FinishedBefore: all[20].CreatedAt},
		"reason":             {Reasons: []task.Reason{task.Expired}},
		"reasons":            {Reasons: []task.Reason{task.Expired, task.ClientError}},
		"no such reason":     {Reasons: []task.Reason{task.TargetRefused}},
		"attempts":           {MinAttempts: 1},
		"more attempts":      {MinAttempts: 3},
		"creator":            {CreatedBy: "caller2"},
		"queue":              {Queue: "queue1"},
		"flow key":           {FlowKey: "key3"},
		"key of a queue":     {Queue: "queue0", FlowKey: "key3"},
		"no such queue":      {Queue: "queue"},
		"everything": {
			States: []task.State{task.Succeeded, task.Failed}, Labels: map[string]string{"kind": "k1"}, URLPrefix: "https://",
			CreatedAfter: now.Add(-2 * day), CreatedBefore: now, RunAfter: now.Add(-2 * day), RunBefore: now.Add(day),
			FinishedAfter: now.Add(-2 * day), FinishedBefore: now.Add(day), MinAttempts: 1,
		},
	}
	states := []task.State{task.Pending, task.Running, task.Succeeded, task.Failed, task.Cancelled}
	// Each filter also with some states: all ways through the two tables.
	for name, f := range maps.Clone(filters) {
		for n, some := range [][]task.State{states[:1], states[1:2], states[2:3], states[3:4], states[4:], states, {task.Failed, task.Pending}} {
			if f.States == nil {
				f.States = some
				filters[fmt.Sprint(name, " in states ", n)] = f
				f.States = nil
			}
		}
	}
	for name, f := range filters {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if err := f.Check(); err != nil {
				t.Fatal(err)
			}
			var want []task.ID
			matching := slices.DeleteFunc(slices.Clone(all), func(tk *task.Task) bool { return !matches(f, tk) })
			slices.SortFunc(matching, func(a, b *task.Task) int {
				x, y := f.PositionOf(a), f.PositionOf(b)
				if c := y.At.Compare(x.At); c != 0 {
					return c
				}
				return slices.Compare(y.ID[:], x.ID[:])
			})
			for _, tk := range matching {
				want = append(want, tk.ID)
			}
			for _, limit := range []int{7, 200} {
				var got []task.ID
				for _, tk := range findAll(t, s, f, limit) {
					got = append(got, tk.ID)
				}
				if diff := cmp.Diff(want, got); diff != "" {
					t.Errorf("in pages of %d (-want +got):\n%s", limit, diff)
				}
			}
		})
	}
}

// A task in a list is the task, but for what is large.
func TestFoundTasks(t *testing.T) {
	t.Parallel()
	s, _ := newStore(t)
	worker := register(t, s)
	insert(t, s, newTask(func(tk *task.Task) {
		tk.Headers, tk.Labels, tk.CreatedBy = map[string]string{"X-Tenant": "melodia"}, map[string]string{"kind": "play"}, "plays@melodia.app"
		tk.OnFailure = &task.Callback{URL: "https://ends.melodia.app/"}
	}))
	check := func() {
		t.Helper()
		found := findAll(t, s, task.Filter{}, 10)
		if len(found) != 1 {
			t.Fatalf("found %d tasks, want 1", len(found))
		}
		want := get(t, s, found[0].ID)
		want.Attempts = want.Attempts[max(len(want.Attempts)-1, 0):]
		if diff := cmp.Diff(want, found[0], withoutBodies); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	}
	check()
	for range 3 {
		c, err := s.ClaimOne(t.Context(), worker, findAll(t, s, task.Filter{}, 10)[0].ID)
		if err != nil {
			t.Fatal(err)
		}
		d := failedOnce(c)
		d.Attempt.Error = fmt.Sprint("in attempt ", d.Attempt.Number)
		finish(t, s, c, d)
		check()
	}
	c, err := s.ClaimOne(t.Context(), worker, findAll(t, s, task.Filter{}, 10)[0].ID)
	if err != nil {
		t.Fatal(err)
	}
	finish(t, s, c, succeeded(c))
	check()
}

// A listing of all tasks, page by page while they are claimed and end, shows each once.
func TestFindWhileTasksEnd(t *testing.T) {
	t.Parallel()
	s, _ := newStore(t)
	worker := register(t, s)
	want := make(map[task.ID]bool)
	for range 300 {
		tk := newTask()
		insert(t, s, tk)
		want[tk.ID] = true
	}
	var ending sync.WaitGroup
	ending.Go(func() {
		for {
			claims, err := s.Claim(t.Context(), worker, 5)
			if err != nil {
				t.Errorf("Claim: %v", err)
			}
			if len(claims) == 0 {
				return
			}
			for _, c := range claims {
				if matched, _, err := write(s, c, succeeded(c)); err != nil || !matched {
					t.Errorf("Finish = %v, %v", matched, err)
				}
			}
		}
	})
	for range 3 {
		got := make(map[task.ID]bool)
		for _, tk := range findAll(t, s, task.Filter{}, 10) {
			if got[tk.ID] {
				t.Errorf("task %s was found twice", tk.ID)
			}
			got[tk.ID] = true
		}
		if !maps.Equal(got, want) {
			t.Errorf("%d tasks were found, want %d", len(got), len(want))
		}
	}
	ending.Wait()
}

// One search runs at a time, and a limited number waits. A further search is refused at
// once, and all other statements go on.
func TestSearchesAreBounded(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	tx := lock(t, pool, "task_history IN ACCESS EXCLUSIVE MODE")
	var searching sync.WaitGroup
	results := make(chan error, 100)
	for range 100 {
		searching.Go(func() {
			_, err := s.Find(t.Context(), &task.Filter{}, task.Position{}, 10)
			results <- err
		})
	}
	count := map[error]int{}
	for range 100 {
		err := <-results
		for _, kind := range []error{task.ErrOverloaded, task.ErrTooBroad, task.ErrUnavailable} {
			if errors.Is(err, kind) {
				count[kind]++
			}
		}
		if count[task.ErrOverloaded] == 1 {
			insert(t, s, newTask())
		}
	}
	searching.Wait()
	// One ran into its limit, those behind it waited for too long, the rest was not let in.
	if count[task.ErrTooBroad] < 1 || count[task.ErrOverloaded] < 80 || len(count) > 3 {
		t.Errorf("the searches ended as %v", count)
	}
	if most := query[int](t, pool, "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND query LIKE '-- name: find%'"); most > 1 {
		t.Errorf("%d connections searched, want 1", most)
	}
	if err := tx.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := findAll(t, s, task.Filter{}, 10); len(got) == 0 {
		t.Error("nothing is found after the lock is gone")
	}
}

func TestCounts(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	check := func(want map[task.State]task.Count) (overdue time.Duration) {
		t.Helper()
		counts, overdue, err := s.Counts(t.Context())
		if err != nil {
			t.Fatalf("Counts: %v", err)
		}
		if diff := cmp.Diff(want, counts); diff != "" {
			t.Errorf("Counts (-want +got):\n%s", diff)
		}
		return overdue
	}
	exact := func(n int64) task.Count { return task.Count{Tasks: n, Exact: true} }
	if overdue := check(map[task.State]task.Count{
		task.Pending: exact(0), task.Running: exact(0), task.Succeeded: exact(0), task.Failed: exact(0), task.Cancelled: exact(0),
	}); overdue != 0 {
		t.Errorf("with no task one is overdue by %v", overdue)
	}
	lookBack(s) // for the run_at of the past that some get
	all := someTasks(t, s, pool, query[time.Time](t, pool, "SELECT now()"))
	want := make(map[task.State]task.Count)
	for _, tk := range all {
		want[tk.State] = exact(want[tk.State].Tasks + 1)
	}
	if overdue := check(want); overdue < 24*time.Hour {
		t.Errorf("the longest waiting task is overdue by %v, want more than a day", overdue)
	}
}

// Many tasks are not counted one by one.
func TestCountsOfMany(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	fill(t, pool, filling{live: 12_000, ended: 60_000, failed: 5, cancelled: 400, days: 3})
	counts, _, err := s.Counts(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for state, want := range map[task.State]task.Count{
		task.Pending: {Tasks: 11_998}, task.Running: {Tasks: 2, Exact: true},
		task.Succeeded: {Tasks: 47_850}, task.Failed: {Tasks: 12_000}, task.Cancelled: {Tasks: 150, Exact: true},
	} {
		got := counts[state]
		if got.Exact != want.Exact || float64(got.Tasks) < 0.9*float64(want.Tasks) || float64(got.Tasks) > 1.1*float64(want.Tasks) {
			t.Errorf("%s: %+v, want about %+v", state, got, want)
		}
		if got.Exact && got != want {
			t.Errorf("%s: %+v, want exactly %+v", state, got, want)
		}
	}
}

func TestExplain(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	explain := func(id task.ID) (*task.Task, task.Facts) {
		t.Helper()
		tk, facts, err := s.Explain(t.Context(), id, lease)
		if err != nil {
			t.Fatalf("Explain: %v", err)
		}
		if diff := cmp.Diff(get(t, s, id), tk, withoutBodies); diff != "" {
			t.Errorf("the task (-want +got):\n%s", diff)
		}
		return tk, facts
	}
	// moments are compared apart; they are the database's.
	check := func(got, want task.Facts) {
		t.Helper()
		if got.Now.IsZero() || got.Lease != lease {
			t.Errorf("facts without a moment or a lease: %+v", got)
		}
		got.Now, got.ClaimedAt, got.HolderSeenAt, got.InstanceSeenAt, got.Lease = want.Now, want.ClaimedAt, want.HolderSeenAt, want.InstanceSeenAt, want.Lease
		if got != want {
			t.Errorf("facts are %+v, want %+v", got, want)
		}
	}
	first, second := newTask(), newTask()
	insert(t, s, first, second)
	_, facts := explain(second.ID)
	check(facts, task.Facts{Ahead: 1})
	if !facts.InstanceSeenAt.IsZero() {
		t.Errorf("an instance was seen at %v although there never was one", facts.InstanceSeenAt)
	}

	silent, off, worker := newID(), newID(), newID()
	for id, concurrency := range map[task.ID]int{silent: 50, off: 0, worker: 200} {
		if err := s.Register(t.Context(), id, fmt.Sprint("instance ", concurrency), concurrency); err != nil {
			t.Fatal(err)
		}
	}
	silence(t, pool, silent)
	c := claimOne(t, s, worker)
	_, facts = explain(second.ID)
	check(facts, task.Facts{Instances: 1, Slots: 200, Running: 1})
	_, facts = explain(first.ID)
	check(facts, task.Facts{Instances: 1, Slots: 200, Running: 1, Holder: "instance 200"})
	if !facts.ClaimedAt.Equal(c.At) || facts.HolderSeenAt.IsZero() {
		t.Errorf("facts of a running task are %+v, want it claimed at %v", facts, c.At)
	}

	// An instance that does not say what it can hides how much all can.
	exec(t, pool, "UPDATE workers SET concurrency = NULL, heartbeat_at = now() WHERE id = $1", [16]byte(silent))
	_, facts = explain(second.ID)
	check(facts, task.Facts{Instances: 2, Running: 1})

	if err := s.Unregister(t.Context(), worker); err != nil {
		t.Fatal(err)
	}
	silence(t, pool, silent)
	tk, facts := explain(first.ID)
	check(facts, task.Facts{Running: 1})
	if !facts.HolderSeenAt.IsZero() || facts.InstanceSeenAt.IsZero() || !strings.Contains(task.Explain(tk, facts), "gone") {
		t.Errorf("facts are %+v after the holder has gone", facts)
	}
	finish(t, s, c, succeeded(c))
	tk, facts = explain(first.ID)
	check(facts, task.Facts{})
	if got := task.Explain(tk, facts); !strings.HasPrefix(got, "It succeeded 0.") {
		t.Errorf("of an ended task it says %q", got)
	}
	if _, _, err := s.Explain(t.Context(), newID(), lease); !errors.Is(err, task.ErrNotFound) || errors.Is(err, task.ErrUnavailable) {
		t.Errorf("Explain of no task: %v, want ErrNotFound", err)
	}
}

func TestUnfinished(t *testing.T) {
	t.Parallel()
	s, _ := newStore(t)
	ended := endOne(t, s)
	pending, running := newTask(), newTask()
	worker := register(t, s)
	insert(t, s, running)
	claimOne(t, s, worker)
	insert(t, s, pending)
	got, err := s.Unfinished(t.Context(), []task.ID{ended, pending.ID, newID(), running.ID})
	want := map[task.ID]bool{running.ID: true, pending.ID: true}
	for _, id := range got {
		if !want[id] {
			t.Errorf("task %s is not over, it says", id)
		}
		delete(want, id)
	}
	if err != nil || len(want) > 0 {
		t.Errorf("Unfinished = %v, %v, which leaves out %v", got, err, want)
	}
}

// Ids begin with the database's moment, so that ranges of created_at are ranges of ids.
func TestIDsFollowTheDatabase(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	for range 10 {
		tk := newTask(func(tk *task.Task) { tk.ID = s.NewID() })
		insert(t, s, tk)
		early, late := task.FirstID(tk.CreatedAt.Add(-10*time.Second)), task.FirstID(tk.CreatedAt.Add(10*time.Second))
		if slices.Compare(tk.ID[:], early[:]) < 0 || slices.Compare(tk.ID[:], late[:]) > 0 {
			t.Errorf("task %s was created at %v", tk.ID, tk.CreatedAt)
		}
	}
	if version := query[string](t, pool, "SELECT string_agg(DISTINCT substr(id::text, 15, 1), '') FROM tasks"); version != "7" {
		t.Errorf("ids are of version %s, want 7", version)
	}
}

// filling is a database that was in use for some days.
type filling struct {
	live, ended       int
	failed, cancelled int // one of so many that ended
	days              int
}

// fill stores tasks as they would be after some days: what ended evenly spread
// over them, what is pending due over the days to come. Some hosts, callers and
// labels are rare.
func fill(tb testing.TB, pool *pgxpool.Pool, f filling) {
	tb.Helper()
	do := func(sql string, args ...any) {
		tb.Helper()
		if _, err := pool.Exec(tb.Context(), sql, append([]any{pgx.QueryExecModeSimpleProtocol}, args...)...); err != nil {
			tb.Fatalf("%s: %v", sql, err)
		}
	}
	do(`DO $$ DECLARE day timestamptz; BEGIN
		FOR n IN 0 .. ` + fmt.Sprint(f.days+1) + ` LOOP
			day := date_trunc('day', now() AT TIME ZONE 'UTC') AT TIME ZONE 'UTC' - (` + fmt.Sprint(f.days) + ` - n) * interval '24 hours';
			EXECUTE format('CREATE TABLE task_history_%s PARTITION OF task_history FOR VALUES FROM (%L) TO (%L)',
				to_char(day AT TIME ZONE 'UTC', 'YYYYMMDD'), day, day + interval '24 hours');
		END LOOP;
	END $$`)
	const (
		// By the milliseconds of a moment and the number of the task.
		id      = `(lpad(to_hex((EXTRACT(EPOCH FROM at) * 1000)::bigint), 12, '0') || '7000' || '8' || lpad(to_hex(n), 15, '0'))::uuid`
		columns = `id, created_at, timeout_seconds, max_retry_duration_seconds, min_backoff_seconds, max_backoff_seconds, max_attempts,
			max_doublings, retry_client_errors, method, url, content_type, headers, labels, body, created_by, claim, queue, flow_key, run_at, attempt_count, state`
		values = id + `, at, 30, 0, 1, 3600, 10, 16, false, 'POST',
			'https://' || CASE WHEN n % ($1 / 20) = 0 THEN 'rare' ELSE 'plays' || n % 20 END || '.melodia.app/songs/' || n * 7919 % 100000 || '/register',
			'application/json', '{}',
			jsonb_build_object('kind', (ARRAY['play', 'notify', 'metric', 'mail'])[1 + n % 4], 'user', (n * 7919 % 100000)::text),
			'{"song_id": 42, "user_id": 7}', CASE WHEN n % ($1 / 20) = 1 THEN 'rare' WHEN n % 2 = 0 THEN 'plays@melodia.app' END, 1,
			CASE WHEN n % ($1 / 20) = 2 THEN 'rare' WHEN n % 3 = 0 THEN 'mail' END, CASE WHEN n % ($1 / 20) = 2 OR n % 3 = 0 THEN 'k' || n % 1000 END`
		rows = ` FROM (SELECT n, now() - ($1 - n) * ($2 * interval '24 hours' / $1) - interval '2 minutes' AS at
			FROM generate_series(1::bigint, $1) n) s`
	)
	do("INSERT INTO workers (id, name) VALUES (" + aWorker + ", 'w')")
	do(`INSERT INTO tasks (`+columns+`, claimed_at, worker_id) SELECT `+values+`,
		now() + ($2 * interval '24 hours' / $1) * n - interval '1 hour', CASE WHEN n % 20 = 0 THEN n / 20 % 9 ELSE 0 END,
		CASE WHEN n % 5000 = 0 THEN 'running' ELSE 'pending' END,
		CASE WHEN n % 5000 = 0 THEN now() END, CASE WHEN n % 5000 = 0 THEN `+aWorker+` END`+rows, f.live, f.days)
	do(`INSERT INTO task_history (`+columns+`, finished_at, reason, attempts) SELECT `+values+`,
		at + n % 100 * interval '1 second', CASE WHEN n % 20 = 0 THEN 2 + n / 20 % 8 ELSE 1 END,
		CASE WHEN n % $3 = 0 THEN 'failed' WHEN n % $4 = 1 THEN 'cancelled' ELSE 'succeeded' END,
		at + n % 100 * interval '1 second' + interval '20 milliseconds',
		CASE WHEN n % $3 <> 0 THEN '' WHEN n % 100 = 0 THEN 'attempts_exhausted' ELSE 'client_error' END,
		'[{"number":1,"outcome":"succeeded","started_at":"2026-11-24T12:00:00.123456Z","duration_seconds":0.0123,"status_code":200,"response_excerpt":"done"}]'`+
		rows, f.ended, f.days, f.failed, f.cancelled)
	do("VACUUM ANALYZE tasks")
	do("VACUUM ANALYZE task_history")
}
