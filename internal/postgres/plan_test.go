package postgres_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/melodia/orchestrator/internal/postgres"
	"github.com/melodia/orchestrator/internal/postgres/pgtest"
)

// The hot statements must stay cheap however many tasks there are, and also
// while the planner's statistics are those of an empty table: that is what
// they are when a backlog comes quickly.
func TestPlans(t *testing.T) {
	t.Parallel()
	const backlog = 20_000
	for name, analyze := range map[string]string{
		"statistics of an empty table": "BEFORE",
		"fresh statistics":             "AFTER",
		"no statistics":                "NEVER",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			conn, err := pgx.Connect(t.Context(), pgtest.URL(t))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = conn.Close(t.Context()) })
			do := func(sql string) {
				t.Helper()
				if _, err := conn.Exec(t.Context(), sql, pgx.QueryExecModeSimpleProtocol); err != nil {
					t.Fatalf("%s: %v", sql, err)
				}
			}
			if analyze == "BEFORE" {
				do("ANALYZE tasks, workers")
			}
			do("ALTER TABLE tasks SET (autovacuum_enabled = off)")
			do("INSERT INTO workers (id, name) VALUES ('00000000-0000-0000-0000-000000000001', 'w')")
			do(fmt.Sprintf(`INSERT INTO tasks (id, run_at, created_at, timeout_seconds, max_retry_duration_seconds, min_backoff_seconds,
				max_backoff_seconds, max_attempts, max_doublings, retry_client_errors, method, url, content_type, headers, labels)
				SELECT gen_random_uuid(), now() + n * interval '1 second' - interval '2 hours', now(), 30, 0, 1, 3600, 10, 16, false,
					'POST', 'https://plays.melodia.app/', '', '{}', '{}' FROM generate_series(1, %d) n`, backlog))
			do(`UPDATE tasks SET state = 'running', claim = 1, claimed_at = now(), worker_id = '00000000-0000-0000-0000-000000000001'
				WHERE id IN (SELECT id FROM tasks ORDER BY run_at LIMIT 200)`)
			if analyze == "AFTER" {
				do("ANALYZE tasks, workers")
			}
			do("SET plan_cache_mode = force_generic_plan") // what a busy connection comes to
			plan := func(sql, arguments string) string {
				t.Helper()
				do("PREPARE statement AS " + sql)
				defer do("DEALLOCATE statement")
				rows, err := conn.Query(t.Context(), "EXPLAIN (COSTS OFF) EXECUTE statement "+arguments, pgx.QueryExecModeSimpleProtocol)
				if err != nil {
					t.Fatal(err)
				}
				lines, err := pgx.CollectRows(rows, pgx.RowTo[string])
				if err != nil {
					t.Fatal(err)
				}
				return strings.Join(lines, "\n")
			}
			ids := "array_fill('00000000-0000-0000-0000-000000000002'::uuid, '{200}')"
			for _, tt := range []struct {
				name, sql, arguments, index string
				sorted                      bool
			}{
				{"claim", postgres.ClaimDueSQL, "('00000000-0000-0000-0000-000000000001', 100)", "tasks_due", false},
				{"next due", postgres.NextDueSQL, "", "tasks_due", false},
				{"finish", postgres.FinishSQL, "(" + ids + ", array_fill(1::bigint, '{200}'), array_fill('succeeded'::text, '{200}'), array_fill(''::text, '{200}'), " +
					"array_fill(0::float8, '{200}'), array_fill('[]'::text, '{200}'), array_fill(1, '{200}'))", "tasks_pkey", true},
			} {
				got := plan(tt.sql, tt.arguments)
				if strings.Contains(got, "Seq Scan on tasks") || strings.Contains(got, "Sort") != tt.sorted || !strings.Contains(got, tt.index) {
					t.Errorf("%s does not go straight by %s:\n%s", tt.name, tt.index, got)
				}
			}
		})
	}
}
