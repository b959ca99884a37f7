//go:build faults

package e2e

import (
	"context"
	"errors"
	"flag"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/melodia/orchestrator/internal/postgres"
)

var held = flag.Duration("held", 20*time.Second, "how long TestLongTransaction keeps its transaction open")

// burySQL leaves behind what 10 minutes at 500 tasks per second do. The triggers
// of the audit stay out of it.
const (
	buried  = 300_000
	burySQL = `
SET session_replication_role = replica;
INSERT INTO tasks (id, run_at, created_at, timeout_seconds, max_retry_duration_seconds, min_backoff_seconds,
    max_backoff_seconds, max_attempts, max_doublings, retry_client_errors, method, url, content_type, headers, labels)
SELECT gen_random_uuid(), now() - interval '1 hour' + n * interval '1 millisecond', now(), 30, 0, 1, 3600, 10, 16, false,
    'POST', 'https://plays.melodia.app/', '', '{}', '{}'
FROM generate_series(1, 300000) n;
DELETE FROM tasks WHERE run_at < now() - interval '30 minutes';
CHECKPOINT` // so that its writing is over
)

// blocksSQL counts the blocks that statements have read, as far as their connections
// have reported them: after about a second (PGSTAT_MIN_INTERVAL in pgstat.c).
const blocksSQL = `SELECT heap_blks_hit + heap_blks_read + idx_blks_hit + idx_blks_read FROM pg_statio_user_tables WHERE relname = 'tasks'`

// A transaction that is held open, at 500 tasks per second: PostgreSQL cannot
// clear away what is done with, neither rows nor index entries. What had to be
// waited minutes for is buried at its beginning.
func TestLongTransaction(t *testing.T) {
	const (
		perSecond = 500
		sample    = 4 * perSecond
		// Measured: 24 blocks a task before, 79 while a transaction is open, and 5,789 without
		// the low-water mark, where each claim reads all that is buried.
		times = 20
	)
	database := startCluster(t, openDir(t)).url()
	if _, err := postgres.Migrate(t.Context(), database, postgres.MigrationObserver{}); err != nil {
		t.Fatal(err)
	}
	j := newJournal(t)
	j.audit(database)
	// The worst case: few slots, so that each claim takes few tasks, and none is
	// claimed where it is stored.
	service := start(t, "serve", "DATABASE_URL="+database, "DISPATCH_CONCURRENCY=4", "LOG_LEVEL=info")
	ctx, stop := context.WithCancel(t.Context())
	var submitting sync.WaitGroup
	defer submitting.Wait()
	defer stop()
	submitting.Go(func() { j.load(ctx, 1<<30, 32, perSecond, func() string { return service.url }, `"delay_seconds":0.5`) })
	conn, err := pgx.Connect(t.Context(), database)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close(context.WithoutCancel(t.Context())) }()
	// cost is how many blocks of the table and its indexes a task takes, over some tasks
	// and for as long as it is told. How fast the machine is makes no difference.
	cost := func(when string, during time.Duration) float64 {
		t.Helper()
		blocks := func() (n int) {
			if err := conn.QueryRow(t.Context(), blocksSQL).Scan(&n); err != nil {
				t.Fatal(err)
			}
			return n
		}
		first, before, began := j.called(), blocks(), time.Now()
		stuck := func() string { return "tasks do not get on " + when }
		for awaitCount(t, j.called, first+sample, stuck); time.Since(began) < during; {
			awaitCount(t, j.called, j.called()+1, stuck)
		}
		tasks := j.called() - first
		perTask := float64(blocks()-before) / float64(tasks)
		t.Logf("%s: %.0f tasks per second, %.0f blocks each", when, float64(tasks)/time.Since(began).Seconds(), perTask)
		return perTask
	}
	most := times * cost("before", 0)

	other, err := pgx.Connect(t.Context(), database)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = other.Close(context.WithoutCancel(t.Context())) }()
	holder, err := other.BeginTx(t.Context(), pgx.TxOptions{IsoLevel: pgx.RepeatableRead})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := holder.Exec(t.Context(), "SELECT FROM tasks"); err != nil {
		t.Fatal(err)
	}
	grave, err := pgx.Connect(t.Context(), database)
	if err != nil {
		t.Fatal(err)
	}
	_, err = grave.Exec(t.Context(), burySQL)
	if err := errors.Join(err, grave.Close(t.Context())); err != nil {
		t.Fatal(err)
	}
	if got := cost("while a transaction is open", *held); got > most {
		t.Errorf("while a transaction is open a task takes %.0f blocks, want %.0f at most", got, most)
	}
	var dead int
	if err := conn.QueryRow(t.Context(), "SELECT n_dead_tup FROM pg_stat_user_tables WHERE relname = 'tasks'").Scan(&dead); err != nil || dead < buried {
		t.Errorf("%d rows of tasks are dead, want the %d that were buried and more: %v", dead, buried, err)
	}
	if err := holder.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := cost("after it ended", 0); got > most {
		t.Errorf("after a transaction ended a task takes %.0f blocks, want %.0f at most", got, most)
	}
	stop()
	submitting.Wait()
	j.check(database)
}
