//go:build faults

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// What limits cost: a backlog of b.N tasks is carried out, plain, in lanes, and from one queue
// with a limit. One operation is one task. "cpu-µs" is the processor time of the service, or of
// PostgreSQL for a task, "wal-B" what PostgreSQL logs for it.
//
//	go test -tags faults -run '^$' -bench Lanes -benchtime 20000x -count 4 -timeout 60m ./internal/e2e
func BenchmarkLanes(b *testing.B) {
	c := startCluster(b, openDir(b))
	const limited = `INSERT INTO queues (name, max_concurrent) VALUES ('limited', 10)`
	for _, m := range []struct {
		name, queues string
		queue, key   string // of task n
		instances    int
	}{
		{"plain", "", `NULL`, `NULL`, 1},
		{"10-queues", `INSERT INTO queues (name, max_concurrent) SELECT 'q' || n, 1000 FROM generate_series(0, 9) n`, `'q' || n % 10`, `NULL`, 1},
		{"2-a-key", `INSERT INTO queues (name, key_max_concurrent) VALUES ('keys', 2)`, `'keys'`, `n / 2`, 1},
		{"1-a-key", `INSERT INTO queues (name, key_max_concurrent) VALUES ('keys', 2)`, `'keys'`, `n`, 1},
		{"limit-10", limited, `'limited'`, `NULL`, 1},
		{"limit-10-of-4", limited, `'limited'`, `NULL`, 4},
	} {
		b.Run(m.name, func(b *testing.B) { newBench(b, c, m.instances).lanes(c, m.queues, m.queue, m.key) })
	}
}

func (x *bench) lanes(c *cluster, queues, queue, key string) {
	migrated := x.up("DISPATCH=false")
	for _, p := range migrated {
		p.stop(syscall.SIGTERM)
	}
	inside, err := pgx.Connect(x.Context(), x.database)
	if err != nil {
		x.Fatal(err)
	}
	defer func() { _ = inside.Close(x.Context()) }()
	for _, sql := range []string{queues, fmt.Sprintf(`INSERT INTO tasks (id, run_at, created_at, timeout_seconds, max_retry_duration_seconds, min_backoff_seconds,
		max_backoff_seconds, max_attempts, max_doublings, retry_client_errors, method, url, content_type, headers, labels, body, queue, flow_key, priority, lane, state)
	SELECT gen_random_uuid(), now() - interval '1 minute' + n * interval '1 microsecond', now(), 30, 0, 1, 3600, 10, 16, false, 'POST', '%s/hit', 'application/json', '{}', '{}', '{"t":0}',
		queue, key, CASE WHEN queue IS NOT NULL THEN 0 END, queue || '/' || COALESCE(key, ''), CASE WHEN queue IS NULL THEN 'pending' ELSE 'waiting' END
	FROM (SELECT n, (%s)::text AS queue, (%s)::text AS key FROM generate_series(1, %d) n) n`, x.target, queue, key, x.N), "VACUUM ANALYZE", "CHECKPOINT"} {
		if _, err := inside.Exec(x.Context(), sql); err != nil {
			x.Fatal(err)
		}
	}
	var before, after int64
	const lsn = "SELECT (pg_current_wal_lsn() - '0/0')::bigint WHERE $1 <> ''"
	x.query(lsn, &before)
	store := c.cpu()
	instances := x.up()
	x.await(x.N)
	took := time.Since(x.first)
	// Each result is written, and so nothing is left to be paid for.
	eventually(x.B, func() bool {
		var left int
		if err := inside.QueryRow(x.Context(), "SELECT count(*) FROM (SELECT FROM tasks LIMIT 1) t").Scan(&left); err != nil {
			x.Fatal(err)
		}
		return left == 0
	}, func() string { return "tasks are left" })
	store = c.cpu() - store
	x.query(lsn, &after)
	var service time.Duration
	for _, p := range instances {
		service += p.cpu()
	}
	each := func(d time.Duration) float64 { return float64(d.Microseconds()) / float64(x.N) }
	x.reportRate(took)
	x.ReportMetric(each(service), "service-cpu-µs")
	x.ReportMetric(each(store), "store-cpu-µs")
	x.ReportMetric(float64(after-before)/float64(x.N), "wal-B")
}

// cpu is the time that the server's processes have had of the processors, those that ended
// among them.
func (c *cluster) cpu() (sum time.Duration) {
	c.t.Helper()
	server := strconv.Itoa(c.pid())
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		c.t.Fatal(err)
	}
	for _, name := range stats {
		stat, err := os.ReadFile(name)
		if err != nil {
			continue // it has ended
		}
		_, rest, _ := strings.Cut(string(stat), ") ")
		fields := strings.Fields(rest) // from the third on: proc_pid_stat(5)
		times := fields[14-3 : 16-3]
		switch {
		case filepath.Base(filepath.Dir(name)) == server:
			times = fields[14-3 : 18-3] // with those of its children that have ended
		case fields[4-3] != server:
			continue
		}
		for _, ticks := range times {
			n, _ := strconv.Atoi(ticks)
			sum += time.Duration(n) * time.Second / 100 // USER_HZ
		}
	}
	return sum
}
