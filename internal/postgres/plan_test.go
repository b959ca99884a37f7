package postgres_test

import (
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/melodia/orchestrator/internal/postgres"
	"github.com/melodia/orchestrator/internal/postgres/pgtest"
)

const (
	somebody = `'00000000-0000-0000-0000-000000000001'::uuid`
	// backlog is 20,000 pending tasks and 200 running ones.
	backlog = `INSERT INTO tasks (id, run_at, created_at, timeout_seconds, max_retry_duration_seconds, min_backoff_seconds,
		max_backoff_seconds, max_attempts, max_doublings, retry_client_errors, method, url, content_type, headers, labels,
		state, claim, claimed_at, worker_id)
	SELECT gen_random_uuid(), now() + n * interval '1 second' - interval '2 hours', now(), 30, 0, 1, 3600, 10, 16, false,
		'POST', 'https://plays.melodia.app/', '', '{}', '{}',
		CASE WHEN n <= 200 THEN 'running' ELSE 'pending' END, 1,
		CASE WHEN n <= 200 THEN now() END, CASE WHEN n <= 200 THEN ` + somebody + ` END
	FROM generate_series(1, 20200) n`
)

// The hot statements must stay cheap however many tasks there are: no matter
// when they were planned, and what the planner knew then.
func TestPlans(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		direct  bool   // with the settings of a direct connection
		planned string // before or after the backlog came
		analyze bool
	}{
		"planned for an empty table":                {direct: true, planned: "before"},
		"planned with statistics of an empty table": {direct: true, planned: "before", analyze: true},
		"planned without statistics":                {direct: true, planned: "after"},
		"planned with fresh statistics":             {direct: true, planned: "after", analyze: true},
		"behind a pooler, without statistics":       {planned: "after"},
		"behind a pooler, with fresh statistics":    {planned: "after", analyze: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			config, err := pgx.ParseConfig(pgtest.URL(t))
			if err != nil {
				t.Fatal(err)
			}
			if tt.direct {
				for name, value := range postgres.SessionSettings {
					config.RuntimeParams[name] = value
				}
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
			do("ALTER TABLE tasks SET (autovacuum_enabled = off)")
			statements := []struct{ name, sql, arguments, index string }{
				{"claim", postgres.ClaimDueSQL, "(" + somebody + ", 100)", "tasks_due"},
				{"due", postgres.NextDueSQL, "", "tasks_due"},
				{"finish", postgres.FinishSQL, "(array_fill(" + somebody + ", '{200}'), array_fill(1::bigint, '{200}'), " +
					"array_fill('succeeded'::text, '{200}'), array_fill(''::text, '{200}'), array_fill(0::float8, '{200}'), " +
					"array_fill('[]'::text, '{200}'), array_fill(1, '{200}'))", "tasks_pkey"},
			}
			prepare := func() {
				do("SET plan_cache_mode = force_generic_plan") // what a busy connection comes to
				for _, s := range statements {
					do("PREPARE " + s.name + " AS " + s.sql)
					do("EXECUTE " + s.name + " " + s.arguments)
				}
			}
			if tt.planned == "before" {
				if tt.analyze {
					do("ANALYZE tasks, workers")
				}
				prepare()
			}
			do("INSERT INTO workers (id, name) VALUES (" + somebody + ", 'w')")
			do(backlog)
			if tt.planned == "after" {
				if tt.analyze {
					do("ANALYZE tasks, workers")
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
				if !strings.Contains(plan, s.index) {
					t.Errorf("%s does not go by %s:\n%s", s.name, s.index, plan)
				}
			}
		})
	}
}
