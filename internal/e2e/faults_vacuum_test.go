//go:build faults

package e2e

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"slices"
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

// A transaction that is held open, at 500 tasks per second: PostgreSQL cannot
// clear away what is done with, neither rows nor index entries. What had to be
// waited minutes for is buried at its beginning.
func TestLongTransaction(t *testing.T) {
	const (
		perSecond = 500
		enough    = 0.7
		sample    = 4 * perSecond
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
	// rate is how many tasks per second reach the target.
	rate := func() float64 {
		before, began := j.called(), time.Now()
		eventually(t, func() bool { return j.called() >= before+sample }, func() string { return fmt.Sprintf("%d tasks got on in %v", j.called()-before, patience) })
		return float64(j.called()-before) / time.Since(began).Seconds()
	}
	// atLeast samples for as long as it is told. The median counts; where the
	// machine was busy with something else, the last few samples may.
	atLeast := func(wanted float64, when string, during time.Duration) {
		t.Helper()
		const last = 5
		var rates []float64
		median := func() float64 {
			recent := rates
			if len(rates) > last {
				recent = rates[len(rates)-last:]
			}
			sorted := slices.Sorted(slices.Values(recent))
			return sorted[len(sorted)/2]
		}
		for began := time.Now(); len(rates) == 0 || time.Since(began) < during || median() < wanted; {
			if time.Since(began) > during+patience {
				t.Fatalf("%.0f tasks per second %s, want %.0f", rates, when, wanted)
			}
			rates = append(rates, rate())
		}
		t.Logf("tasks per second %s: %.0f", when, rates)
	}
	before := rate()
	t.Logf("tasks per second before: %.0f", before)

	conn, err := pgx.Connect(t.Context(), database)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close(context.WithoutCancel(t.Context())) }()
	holder, err := conn.BeginTx(t.Context(), pgx.TxOptions{IsoLevel: pgx.RepeatableRead})
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
	atLeast(enough*before, "while a transaction is open", *held)
	var dead int
	if err := conn.QueryRow(t.Context(), "SELECT n_dead_tup FROM pg_stat_user_tables WHERE relname = 'tasks'").Scan(&dead); err != nil || dead < buried {
		t.Errorf("%d rows of tasks are dead, want the %d that were buried and more: %v", dead, buried, err)
	}
	if err := holder.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	atLeast(enough*before, "after it ended", 0)
	stop()
	submitting.Wait()
	j.check(database)
}
