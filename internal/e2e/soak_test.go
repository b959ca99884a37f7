//go:build faults

package e2e

import (
	"flag"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/melodia/orchestrator/internal/postgres/pgtest"
)

var soakTime = flag.Duration("soak", 20*time.Second, "how long TestSoak keeps its load up")

const soakSQL = `SELECT
    (SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'orchestrator'),
    pg_total_relation_size('tasks'),
    (SELECT n_dead_tup FROM pg_stat_user_tables WHERE relname = 'tasks')`

// A steady load of 200 tasks per second on two instances, some for later, some
// that fail at first or for good: what the instances and their database use is
// the same at the end as at the beginning.
func TestSoak(t *testing.T) {
	const (
		// More than what comes and goes by itself between two samples.
		memoryMargin     = 24 << 20
		descriptorMargin = 10
		callers          = 8                    // of each part of the load; a slow machine has more of them at once
		goroutineMargin  = 2 * descriptorMargin // a connection has two
		// What autovacuum leaves between two of its visits, a minute apart.
		maxTableBytes = 64 << 20
		maxDeadRows   = 100_000
	)
	database := pgtest.URL(t)
	j := newJournal(t)
	j.answer = func(w http.ResponseWriter, r *http.Request, nth int) {
		switch r.Header.Get("X-Target") {
		case "stumbles":
			if nth == 1 {
				w.WriteHeader(http.StatusServiceUnavailable)
			}
		case "refuses":
			w.WriteHeader(http.StatusBadRequest)
		}
	}
	j.audit(database)
	var instances []*process
	var idleDescriptors, idleGoroutines []int
	for range 2 {
		p := start(t, "serve", "DATABASE_URL="+database, profiled(t), "LOG_LEVEL=info")
		instances = append(instances, p)
		idleDescriptors, idleGoroutines = append(idleDescriptors, p.ready()), append(idleGoroutines, p.goroutines())
	}
	var turn atomic.Int64
	anyURL := func() string { return instances[int(turn.Add(1))%len(instances)].url }

	conn, err := pgx.Connect(t.Context(), database)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(t.Context()) })
	var connections, tableBytes, deadRows series
	memory, descriptors := make([]series, len(instances)), make([]series, len(instances))
	sample := func() {
		for i, p := range instances {
			memory[i] = append(memory[i], p.memory("VmRSS"))
			descriptors[i] = append(descriptors[i], p.descriptors())
		}
		var inUse, size, dead int
		if err := conn.QueryRow(t.Context(), soakSQL).Scan(&inUse, &size, &dead); err != nil {
			t.Fatal(err)
		}
		connections, tableBytes, deadRows = append(connections, inUse), append(tableBytes, size), append(deadRows, dead)
	}

	var loading sync.WaitGroup
	load := []struct {
		perSecond int
		extra     string
	}{
		{160, ``},
		{20, `"delay_seconds":1.5`},
		{10, `"headers":{"X-Target":"stumbles"},"retry":{"min_backoff_seconds":0.5}`},
		{10, `"headers":{"X-Target":"refuses"}`},
	}
	for _, part := range load {
		loading.Go(func() {
			j.load(t.Context(), int(soakTime.Seconds()*float64(part.perSecond)), callers, part.perSecond, anyURL, part.extra)
		})
	}
	loaded := make(chan struct{})
	go func() {
		defer close(loaded)
		loading.Wait()
	}()
	tick := time.NewTicker(*soakTime / 200)
	defer tick.Stop()
	for under := true; under; {
		select {
		case <-tick.C:
			sample()
		case <-loaded:
			under = false
		}
	}

	for i := range instances {
		memory[i].wantFlat(t, fmt.Sprintf("memory of instance %d in bytes", i+1), withinReason(memoryMargin))
		descriptors[i].wantFlat(t, fmt.Sprintf("descriptors of instance %d", i+1), descriptorMargin+callers*len(load))
	}
	if most := slices.Max(connections); most > len(instances)*poolSize {
		t.Errorf("%d connections to the database, want at most %d", most, len(instances)*poolSize)
	}
	t.Logf("tasks: at most %d KiB with its indexes, %d dead rows; %d connections", slices.Max(tableBytes)>>10, slices.Max(deadRows), slices.Max(connections))
	if size := slices.Max(tableBytes); size > maxTableBytes {
		t.Errorf("tasks took %d MiB, want at most %d", size>>20, maxTableBytes>>20)
	}
	if dead := slices.Max(deadRows); dead > maxDeadRows {
		t.Errorf("tasks had %d dead rows, want at most %d", dead, maxDeadRows)
	}
	f := j.check(database)
	if f.accepted != f.submitted || f.repeated > 0 {
		t.Errorf("nothing was wrong, and yet: %v", f)
	}
	j.client.CloseIdleConnections()
	for i, p := range instances {
		p.wantDescriptors(idleDescriptors[i] + descriptorMargin)
		p.wantGoroutines(idleGoroutines[i], goroutineMargin)
	}
}

// series is what was measured of one thing, at equal intervals.
type series []int

// wantFlat compares the medians of the last fifth and of the first one after a
// warm-up of another.
func (s series) wantFlat(t *testing.T, name string, margin int) {
	t.Helper()
	if len(s) < 25 {
		t.Fatalf("%s: %d samples are too few", name, len(s))
	}
	fifth := len(s) / 5
	first, last := median(s[fifth:2*fifth]), median(s[len(s)-fifth:])
	t.Logf("%s: %d, at the end %d, at most %d", name, first, last, slices.Max(s))
	if last > first+margin {
		t.Errorf("%s: %d at the beginning, %d at the end", name, first, last)
	}
}

func median(s series) int { return slices.Sorted(slices.Values(s))[len(s)/2] }
