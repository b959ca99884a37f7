//go:build faults

package e2e

import (
	"sync"
	"sync/atomic"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/melodia/orchestrator/internal/postgres/pgtest"
)

// expansion is what a later version may do to the schema: everything that the
// rule of package migrations admits, under names that no version takes.
var expansion = []string{
	"ALTER TABLE workers ADD COLUMN region text, ADD COLUMN slots integer NOT NULL DEFAULT 0",
	"ALTER TABLE tasks ADD COLUMN later_note text, ADD COLUMN later_number integer NOT NULL DEFAULT 0",
	"ALTER TABLE task_history ADD COLUMN later_number integer NOT NULL DEFAULT 0, ADD COLUMN later_note text",
	"CREATE TABLE later_notes (id uuid PRIMARY KEY, body text NOT NULL)",
	"CREATE INDEX CONCURRENTLY later_tasks_labels ON tasks USING gin (labels)",
	"CREATE INDEX later_history_labels ON ONLY task_history USING gin (labels)",
	`ALTER TABLE tasks DROP CONSTRAINT tasks_state_check,
		ADD CONSTRAINT tasks_state_check CHECK (state IN ('pending', 'running', 'paused')) NOT VALID`,
	"ALTER TABLE tasks VALIDATE CONSTRAINT tasks_state_check",
	`ALTER TABLE task_history DROP CONSTRAINT task_history_state_check,
		ADD CONSTRAINT task_history_state_check CHECK (state IN ('succeeded', 'failed', 'cancelled', 'skipped')) NOT VALID`,
	"INSERT INTO goose_db_version (version_id, is_applied) VALUES (99999, true)",
}

// A deploy of the next version migrates the database while instances of this
// one are at work, and others of this one still start. No task is affected.
func TestOlderVersionBesideNewer(t *testing.T) {
	database := pgtest.URL(t)
	settings := []string{"DATABASE_URL=" + database, "POLL_INTERVAL=100ms", "LOG_LEVEL=info"}
	j := newJournal(t)
	j.answer = afterAMoment
	j.audit(database)
	instances := startFleet(t, 1, settings...)
	join := func(more ...string) {
		p := start(t, "serve", append(settings, more...)...)
		instances.mu.Lock()
		instances.instances = append(instances.instances, p)
		instances.mu.Unlock()
	}
	var submitting sync.WaitGroup
	var stop atomic.Bool
	submitting.Go(func() {
		for !stop.Load() {
			j.load(t.Context(), 50, 8, 200, instances.url, `"labels":{"kind":"play"}`)
		}
	})
	defer submitting.Wait()
	defer stop.Store(true)
	underLoad := func() {
		t.Helper()
		before := j.called()
		eventually(t, func() bool { return j.called() > before+200 }, func() string { return "calls do not get on" })
	}
	underLoad()

	conn, err := pgx.Connect(t.Context(), database)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close(t.Context()) }()
	for _, sql := range expansion {
		if _, err := conn.Exec(t.Context(), sql); err != nil {
			t.Fatalf("%s: %v", sql, err)
		}
	}
	underLoad()
	// The next to start makes it again, from a table that it knows only in part.
	var day string
	if err := conn.QueryRow(t.Context(), `SELECT max(relid::regclass::text) FROM pg_partition_tree('task_history')
		WHERE isleaf AND relid <> 'task_history_default'::regclass`).Scan(&day); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Exec(t.Context(), "DROP TABLE "+day); err != nil {
		t.Fatal(err)
	}
	join() // and finds a schema that is later than its own
	join("MIGRATE_ON_START=false")
	eventually(t, func() (made bool) {
		if err := conn.QueryRow(t.Context(), "SELECT to_regclass($1) IS NOT NULL", day).Scan(&made); err != nil {
			t.Fatal(err)
		}
		return made
	}, func() string { return "the history's partition was not made again" })
	underLoad()

	stop.Store(true)
	submitting.Wait()
	if f := j.check(database); f.accepted != f.submitted {
		t.Errorf("%d tasks of %d were accepted", f.accepted, f.submitted)
	}
	for i, p := range instances.instances {
		if n := p.count(`"level":"ERROR"`); n > 0 {
			t.Errorf("instance %d logged %d errors", i, n)
		}
	}
}
