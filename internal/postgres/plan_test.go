package postgres_test

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/melodia/orchestrator/internal/postgres"
	"github.com/melodia/orchestrator/internal/postgres/pgtest"
	"github.com/melodia/orchestrator/internal/task"
)

const (
	aWorker = `'00000000-0000-0000-0000-000000000001'::uuid`
	// taskColumns are those without a default but run_at, and taskValues values for them.
	taskColumns = `id, created_at, timeout_seconds, max_retry_duration_seconds, min_backoff_seconds,
		max_backoff_seconds, max_attempts, max_doublings, retry_client_errors, method, url, content_type, headers, labels`
	taskValues = `lpad(to_hex(n), 32, '0')::uuid, now(), 30, 0, 1, 3600, 10, 16, false,
		'POST', 'https://plays.melodia.app/', '', '{}', '{}'`
	// backlog is 20,000 pending tasks and 200 running ones.
	backlog = `INSERT INTO tasks (` + taskColumns + `, run_at, state, claim, claimed_at, worker_id)
	SELECT ` + taskValues + `, now() + n * interval '1 second' - interval '2 hours',
		CASE WHEN n <= 200 THEN 'running' ELSE 'pending' END, 1,
		CASE WHEN n <= 200 THEN now() END, CASE WHEN n <= 200 THEN ` + aWorker + ` END
	FROM generate_series(1, 20200) n`
	// laned is 20,000 tasks that wait in 1,000 lanes, and 200 of them that run: rows with
	// ids behind those of backlog. Each lane has its row, and as many more are of others.
	laned = `INSERT INTO tasks (` + taskColumns + `, run_at, queue, flow_key, priority, lane, state, claim, claimed_at, worker_id)
	SELECT ` + taskValues + `, now() + n * interval '1 second' - interval '20 hours', 'q' || n % 10, n % 1000, 0, 'q' || n % 10 || '/' || n % 1000,
		CASE WHEN n % 100 = 0 THEN 'running' ELSE 'waiting' END, 1,
		CASE WHEN n % 100 = 0 THEN now() END, CASE WHEN n % 100 = 0 THEN ` + aWorker + ` END
	FROM generate_series(100001, 120000) n;
	INSERT INTO queues (name, max_concurrent, key_max_concurrent) SELECT 'q' || n, 1000, 2 FROM generate_series(0, 9) n;
	INSERT INTO queue_keys (queue, key, version, max_concurrent) SELECT 'q1', n, 1, 3 FROM generate_series(1, 3000) n;
	INSERT INTO lanes (name) SELECT 'q' || n % 10 || '/' || n FROM generate_series(0, 5000) n`
	// manyTexts and what follows it are arguments of the statements of a claim from 100 lanes.
	manyTexts, manyTimes = `array_fill('q1'::text, '{100}')`, `array_fill(now() - interval '1 hour', '{100}')`
	manyIDs              = `array_fill(gen_random_uuid(), '{100}')`
	// scheduled is a million tasks that are due in an hour and later, overdue 200 that are.
	scheduled = `INSERT INTO tasks (` + taskColumns + `, run_at)
	SELECT ` + taskValues + `, now() + interval '1 hour' + n * interval '1 second' FROM generate_series(1, 1000000) n`
	overdue = `INSERT INTO tasks (` + taskColumns + `, run_at)
	SELECT ` + taskValues + `, now() - interval '1 hour' FROM generate_series($1::int, $1 + 199) n`
)

// The hot statements must stay cheap however many tasks there are: no matter
// when they were planned, and what the planner knew then.
func TestPlans(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		direct  bool   // with the settings of a direct connection
		planned string // before or after the backlog came
		analyze bool
		idle    bool // no task ran when the statistics were made
	}{
		"planned for an empty table":                {direct: true, planned: "before"},
		"planned with statistics of an empty table": {direct: true, planned: "before", analyze: true},
		"planned without statistics":                {direct: true, planned: "after"},
		"planned with fresh statistics":             {direct: true, planned: "after", analyze: true},
		"planned with statistics of a quiet moment": {direct: true, planned: "after", analyze: true, idle: true},
		"behind a pooler, at a quiet moment":        {planned: "after", analyze: true, idle: true},
		"behind a pooler, without statistics":       {planned: "after"},
		"behind a pooler, with fresh statistics":    {planned: "after", analyze: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			config, err := pgx.ParseConfig(pgtest.URL(t))
			if err != nil {
				t.Fatal(err)
			}
			config.DefaultQueryExecMode = pgx.QueryExecModeSimpleProtocol
			conn, err := pgx.ConnectConfig(t.Context(), config)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = conn.Close(t.Context()) })
			do := func(sql string) {
				t.Helper()
				if _, err := conn.Exec(t.Context(), sql); err != nil {
					t.Fatalf("%s: %v", sql, err)
				}
			}
			// One transaction, so that a pooler does not come in between.
			do("BEGIN")
			if tt.direct {
				for name, value := range postgres.SessionSettings {
					do("SET LOCAL " + name + " = '" + value + "'")
				}
			}
			do("ALTER TABLE tasks SET (autovacuum_enabled = off)")
			results := "(array_fill(" + aWorker + ", '{200}'), array_fill(1::bigint, '{200}'), " +
				"array_fill('succeeded'::text, '{200}'), array_fill(''::text, '{200}'), array_fill(0::float8, '{200}'), " +
				"array_fill('[]'::text, '{200}'), array_fill(1, '{200}'), NULL, NULL)"
			statements := []struct{ name, sql, arguments, index string }{
				{"claim", postgres.ClaimDueSQL, "(" + aWorker + ", 100, now() - interval '1 hour')", "tasks_due"},
				{"lock_lanes", postgres.LockLanesSQL, "('{q1,q2}', '{}', '30000')", "lanes_pkey"},
				{"queue_limits", postgres.QueueLimitsSQL, "(" + manyTexts + ", " + manyTimes + ")", "tasks_lane_running lanes_pkey"},
				{"key_limits", postgres.KeyLimitsSQL, "(" + manyTexts + ", " + manyTexts + ", " + manyTimes + ", NULL)", "tasks_lane_running tasks_waiting tasks_pkey queue_keys_pkey lanes_pkey"},
				{"host_limits", postgres.HostLimitsSQL, "(" + manyTexts + ", array_fill(2, '{100}'), " + manyTimes + ")", "tasks_host_running lanes_pkey"},
				{"look_into_lanes", postgres.WaitingInLanesSQL, "(array_fill('q1/1'::text, '{100}'), array_fill(2, '{100}'), " + manyTimes + ", " + manyTimes + ", " + manyTimes + ", NULL)", "tasks_waiting"},
				{"claim_lanes", postgres.ClaimLanesSQL, "(" + aWorker + ", " + manyIDs + ", " + manyTexts + ")", "tasks_pkey"},
				{"hold_back_claimed", postgres.HoldBackClaimedSQL, "('{https://plays.melodia.app}', " + manyIDs + ", " + manyTexts + ")", "tasks_pkey hashed"},
				{"keep_lanes", postgres.KeepLanesSQL, "(" + aWorker + ", '{q1/}', '{2026-11-30}', '{1}', '{NULL}')", "workers"},
				{"hold_back", postgres.HoldBackSQL, "('{https://plays.melodia.app}', now() - interval '1 hour', 5000)", "tasks_due hashed"},
				{"hold_back_in_lane", postgres.HoldBackInLaneSQL, "('{https://plays.melodia.app}', 'q1/1', 'q1', '1', 5000)", "tasks_waiting hashed"},
				{"lanes", postgres.LanesSQL, "('', 1000)", "tasks_waiting"},
				{"overdue", postgres.OverdueInLanesSQL, "", "tasks_waiting"},
				{"expire", postgres.ExpireSQL, "(1000)", "tasks_waiting_expiry"},
				{"due", postgres.NextDueSQL, "(now() - interval '1 hour')", "tasks_due"},
				{"cancelled", postgres.CancelledSQL, "(" + aWorker + ")", "tasks_cancel_requested"},
				{"cancel", postgres.CancelManySQL, "(array_fill(" + aWorker + ", '{200}'))", "tasks_pkey"},
				{"finish_cancelled", postgres.FinishCancelledSQL, results, "tasks_pkey"},
				{"silent", postgres.OverdueSQL, "(3600, 100)", "tasks_awaiting"},
				{"await", postgres.AwaitSQL, "(array_fill(" + aWorker + ", '{200}'), array_fill(1::bigint, '{200}'))", "tasks_pkey"},
				{"awaited", postgres.AwaitedSQL, "(" + aWorker + ")", "tasks_pkey"},
				{"report", postgres.ReportSQL, "(" + aWorker + ", 1, '{}', NULL)", "tasks_pkey"},
				{"finish", postgres.FinishSQL, results, "tasks_pkey"},
				{"call_back", postgres.FinishCallingBackSQL, strings.TrimSuffix(results, ")") + ", array_fill(gen_random_uuid(), '{200}'), 30, 0, 1, 3600, 10, 16, false)", "tasks_pkey"},
			}
			prepare := func() {
				do("SET LOCAL plan_cache_mode = force_generic_plan") // what a busy connection comes to
				for _, s := range statements {
					do("PREPARE " + s.name + " AS " + s.sql)
					do("EXECUTE " + s.name + " " + s.arguments)
				}
			}
			if tt.planned == "before" {
				if tt.analyze {
					do("ANALYZE tasks, workers, lanes, queues, queue_keys")
				}
				prepare()
			}
			do("INSERT INTO workers (id, name) VALUES (" + aWorker + ", 'w')")
			do(backlog)
			do(laned)
			if tt.idle {
				do("UPDATE tasks SET state = CASE WHEN lane IS NULL THEN 'pending' ELSE 'waiting' END, worker_id = NULL, claimed_at = NULL WHERE state = 'running'")
			}
			if tt.planned == "after" {
				if tt.analyze {
					do("ANALYZE tasks, workers, lanes, queues, queue_keys")
				}
				prepare()
			}
			for _, s := range statements {
				rows, err := conn.Query(t.Context(), "EXPLAIN (COSTS OFF) EXECUTE "+s.name+" "+s.arguments)
				if err != nil {
					t.Fatal(err)
				}
				lines, err := pgx.CollectRows(rows, pgx.RowTo[string])
				if err != nil {
					t.Fatal(err)
				}
				plan := strings.Join(lines, "\n")
				for _, bad := range []string{"Seq Scan on tasks", "tasks_running", "Merge Join", "Sort Key: tasks.run_at"} {
					if strings.Contains(plan, bad) {
						t.Errorf("%s: %q in its plan:\n%s", s.name, bad, plan)
					}
				}
				for index := range strings.FieldsSeq(s.index) {
					if !strings.Contains(plan, index) {
						t.Errorf("%s does not go by %s:\n%s", s.name, index, plan)
					}
				}
			}
		})
	}
}

// A transaction that is held open keeps what was claimed since in the indexes. A
// look for due tasks that begins at the mark does not walk over it, and neither does a claim from
// lanes.
func TestLooksStepOverTheDead(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	holder, err := pool.BeginTx(t.Context(), pgx.TxOptions{IsoLevel: pgx.RepeatableRead})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = holder.Rollback(context.WithoutCancel(t.Context())) }()
	if _, err := holder.Exec(t.Context(), "SELECT FROM tasks"); err != nil {
		t.Fatal(err)
	}
	exec(t, pool, "INSERT INTO workers (id, name) VALUES ("+aWorker+", 'w')")
	exec(t, pool, backlog)
	exec(t, pool, "UPDATE tasks SET run_at = run_at - interval '1 day'")
	exec(t, pool, laned)
	exec(t, pool, "UPDATE tasks SET lane = 'q1/', run_at = run_at - interval '2 days', claimed_at = claimed_at - interval '1 day' WHERE lane IS NOT NULL")
	exec(t, pool, "UPDATE tasks SET state = 'running', worker_id = "+aWorker+", claimed_at = now() - interval '1 day' WHERE state = 'waiting'")
	exec(t, pool, "DELETE FROM tasks")
	insert(t, s, newTask(), newTask(), newTask(inQueue("q1", "", task.Normal)))
	for name, statement := range map[string]struct{ sql, arguments string }{
		"claim":         {postgres.ClaimDueSQL, aWorker + ", 1, FROM"},
		"due":           {postgres.NextDueSQL, "FROM"},
		"claim, lanes":  {postgres.WaitingInLanesSQL, "'{q1/}', '{100}', ARRAY[FROM], ARRAY[FROM], ARRAY[FROM], NULL"},
		"count, queues": {postgres.QueueLimitsSQL, "'{q1}', ARRAY[FROM]"},
		"count, keys":   {postgres.KeyLimitsSQL, "'{q1}', '{\"\"}', ARRAY[FROM], NULL"},
	} {
		// How many pages a look that begins at from touches.
		pages := func(from string) float64 {
			t.Helper()
			tx, err := pool.Begin(t.Context()) // so that nothing stays claimed
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = tx.Rollback(context.WithoutCancel(t.Context())) }()
			for _, sql := range []string{"SET LOCAL enable_seqscan = off", "PREPARE look AS " + statement.sql} {
				if _, err := tx.Exec(t.Context(), sql); err != nil {
					t.Fatalf("%s: %v", sql, err)
				}
			}
			var explained []struct{ Plan map[string]any }
			err = tx.QueryRow(t.Context(), "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE look ("+strings.ReplaceAll(statement.arguments, "FROM", "("+from+")::timestamptz")+")",
				pgx.QueryExecModeSimpleProtocol).Scan(&explained)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if _, err := tx.Exec(t.Context(), "DEALLOCATE look"); err != nil {
				t.Fatal(err)
			}
			plan := explained[0].Plan
			return plan["Shared Hit Blocks"].(float64) + plan["Shared Read Blocks"].(float64)
		}
		whole, marked := pages("'-infinity'"), pages("now() - interval '1 minute'")
		if whole < 500 {
			t.Errorf("%s: a look from the beginning touches %.0f pages: the dead are not in its way", name, whole)
		}
		if marked > 50 {
			t.Errorf("%s: a look from the mark touches %.0f pages, want some few", name, marked)
		}
	}
}

// Claims and looks for the next task begin where the last ones left nothing,
// and learn from each other; what came to lie below is found by looking back.
func TestLooksBeginAtTheMark(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	back := make(chan time.Time, 1)
	s.LookBack(back)
	worker := register(t, s)
	// hide stores a task whose run_at is one that only a late commit can have.
	hide := func() *task.Task {
		t.Helper()
		tk := newTask()
		insert(t, s, tk)
		exec(t, pool, "UPDATE tasks SET run_at = now() - interval '1 hour' WHERE id = $1", [16]byte(tk.ID))
		return tk
	}
	want := func(who string, found bool) {
		t.Helper()
		wait, ok, err := s.NextDue(t.Context())
		if err != nil || ok != found || ok && wait > -time.Hour {
			t.Errorf("%s: NextDue = %v, %v, %v, want an hour overdue: %v", who, wait, ok, err, found)
		}
		if got := claim(t, s, worker, 1); (len(got) == 1) != found {
			t.Errorf("%s: claimed %d tasks, want one: %v", who, len(got), found)
		}
	}

	hide()
	want("before there is a mark", true)
	if _, ok, err := s.NextDue(t.Context()); ok || err != nil { // from here on
		t.Fatalf("NextDue = %v, %v, want nothing", ok, err)
	}
	hide()
	want("after a look that found nothing", false)
	back <- time.Time{}
	want("a look back", true)

	insert(t, s, newTask())
	claimOne(t, s, worker)
	hide()
	hide()
	want("after a claim", false)
	back <- time.Time{}
	claimOne(t, s, worker)
	want("after a claim that looked back", true)
}

// Among a million tasks that are scheduled for later, a claim of a few hundred
// touches what these take, whether it was planned for an empty table or for
// this one.
func TestClaimAmongAMillion(t *testing.T) {
	t.Parallel()
	const due, most = 200, 20 * 200 // pages: each row, its new version, and the way to both in the indexes
	_, pool := newStore(t)
	tx, err := pool.Begin(t.Context()) // so that a pooler does not come in between
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tx.Rollback(context.WithoutCancel(t.Context())) }()
	do := func(sql string, args ...any) {
		t.Helper()
		if _, err := tx.Exec(t.Context(), sql, append([]any{pgx.QueryExecModeSimpleProtocol}, args...)...); err != nil {
			t.Fatalf("%s: %v", sql, err)
		}
	}
	for name, value := range postgres.SessionSettings {
		do("SET LOCAL " + name + " = '" + value + "'")
	}
	do("ALTER TABLE tasks SET (autovacuum_enabled = off)")
	do("INSERT INTO workers (id, name) VALUES (" + aWorker + ", 'w')")
	do("ANALYZE tasks, workers")
	arguments := " (" + aWorker + ", 200, '-infinity')"
	prepare := func(name string) {
		do("PREPARE " + name + " AS " + postgres.ClaimDueSQL)
		do("EXECUTE " + name + arguments) // makes the plan that is kept
	}
	prepare("stale")
	do("SET LOCAL statement_timeout = 0")
	do(scheduled)
	for i, statement := range []string{"stale", "fresh"} {
		if statement == "fresh" {
			do("ANALYZE tasks") // which also ends the life of stale plans
			prepare("fresh")
		}
		do(overdue, 2_000_000+due*i)
		var explained []struct{ Plan map[string]any }
		err := tx.QueryRow(t.Context(), "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE "+statement+arguments,
			pgx.QueryExecModeSimpleProtocol).Scan(&explained)
		if err != nil {
			t.Fatal(err)
		}
		plan := explained[0].Plan
		if rows := plan["Actual Rows"].(float64); rows != due {
			t.Errorf("%s: %.0f tasks were claimed, want %d", statement, rows, due)
		}
		if pages := plan["Shared Hit Blocks"].(float64) + plan["Shared Read Blocks"].(float64); pages > most {
			t.Errorf("%s: the claim touches %.0f pages, want at most %d", statement, pages, most)
		}
		if text := indented(plan); !strings.Contains(text, `"tasks_due"`) || strings.Contains(text, `"Sort"`) {
			t.Errorf("%s: the claim does not go by tasks_due without a sort:\n%s", statement, text)
		}
	}
}
