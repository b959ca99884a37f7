package postgres_test

import (
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/melodia/orchestrator/internal/postgres"
	"github.com/melodia/orchestrator/internal/task"
)

const retention = 30 * 24 * time.Hour

func keepHistory(t *testing.T, s *postgres.Store, retention time.Duration) {
	t.Helper()
	if err := s.KeepHistory(t.Context(), retention, 7); err != nil {
		t.Fatalf("KeepHistory: %v", err)
	}
}

// partitionOf returns the name of the partition that a task is in.
func partitionOf(t *testing.T, pool *pgxpool.Pool, id task.ID) string {
	t.Helper()
	return query[string](t, pool, "SELECT tableoid::regclass::text FROM task_history WHERE id = $1", [16]byte(id))
}

func days(t *testing.T, pool *pgxpool.Pool) []string {
	t.Helper()
	names := query[[]string](t, pool, `SELECT array(SELECT inhrelid::regclass::text FROM pg_inherits
		WHERE inhparent = 'task_history'::regclass ORDER BY 1)`)
	return slices.DeleteFunc(names, func(name string) bool { return name == "task_history_default" })
}

func endOne(t *testing.T, s *postgres.Store) task.ID {
	t.Helper()
	worker := register(t, s)
	insert(t, s, newTask())
	c := claimOne(t, s, worker)
	finish(t, s, c, succeeded(c))
	return c.Task.ID
}

func TestHistoryPartitionsAreMadeAhead(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	today := query[time.Time](t, pool, "SELECT date_trunc('day', now() AT TIME ZONE 'UTC')")
	var want []string
	for day := range 8 {
		want = append(want, "task_history_"+today.AddDate(0, 0, day).Format("20060102"))
	}
	for _, ahead := range []int{1, 2, 2, 7} {
		if err := s.KeepHistory(t.Context(), retention, ahead); err != nil {
			t.Fatalf("KeepHistory: %v", err)
		}
		if got := days(t, pool); !slices.Equal(got, want[:ahead+1]) {
			t.Errorf("%d days ahead the partitions are %v, want %v", ahead, got, want[:ahead+1])
		}
	}
	if got := partitionOf(t, pool, endOne(t, s)); got != want[0] && got != want[1] { // midnight may pass
		t.Errorf("the ended task is in %s, want %s", got, want[0])
	}
}

func TestHistoryIsDroppedAfterItsRetention(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	today := query[time.Time](t, pool, "SELECT date_trunc('day', now() AT TIME ZONE 'UTC')")
	name := func(age int) string { return "task_history_" + today.AddDate(0, 0, -age).Format("20060102") }
	for _, age := range []int{29, 30, 31, 400} {
		from := today.AddDate(0, 0, -age)
		exec(t, pool, "CREATE TABLE "+name(age)+" PARTITION OF task_history FOR VALUES FROM ('"+
			from.Format(time.DateTime)+"+00') TO ('"+from.AddDate(0, 0, 1).Format(time.DateTime)+"+00')")
	}
	keepHistory(t, s, retention)
	got := days(t, pool)
	for age, want := range map[int]bool{29: true, 30: true, 31: false, 400: false} {
		if kept := slices.Contains(got, name(age)); kept != want {
			t.Errorf("partition of %d days ago kept: %v, want %v", age, kept, want)
		}
	}
}

// Where no partition was made in time, ended tasks go to the default one: that
// must neither fail, nor stand in the way later, nor stay for ever.
func TestDefaultPartition(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	id := endOne(t, s)
	if got := partitionOf(t, pool, id); got != "task_history_default" {
		t.Fatalf("the ended task is in %s, want the default partition", got)
	}
	keepHistory(t, s, retention)
	if got := get(t, s, id); got.State != task.Succeeded {
		t.Errorf("task is %s after KeepHistory, want succeeded", got.State)
	}
	if got := days(t, pool); len(got) != 7 {
		t.Errorf("partitions = %v, want those of the seven days that the default one has no rows of", got)
	}
	exec(t, pool, "UPDATE task_history SET finished_at = now() - interval '31 days' WHERE id = $1", [16]byte(id))
	keepHistory(t, s, retention)
	if got := query[int](t, pool, "SELECT count(*) FROM task_history"); got != 0 {
		t.Errorf("%d tasks left after their retention, want none", got)
	}
}

// A task that ends while the partition of its day is being attached waits for
// it: on its way into the default one it would fail.
func TestFinishWhileAPartitionIsAttached(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	worker := register(t, s)
	insert(t, s, newTask())
	c := claimOne(t, s, worker)
	attaching, err := pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	today := query[time.Time](t, pool, "SELECT date_trunc('day', now() AT TIME ZONE 'UTC')")
	for _, sql := range postgres.CreatePartition("task_history_now", today) {
		if _, err := attaching.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	finished := make(chan error, 1)
	go func() {
		matched, _, err := write(s, c, succeeded(c))
		if err == nil && !matched {
			err = errors.New("the result did not match")
		}
		finished <- err
	}()
	for !query[bool](t, pool, "SELECT count(*) > 0 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '-- name: finish%'") {
		select {
		case err := <-finished:
			t.Fatalf("Finish did not wait for the attaching: %v", err)
		default:
		}
	}
	if err := attaching.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := <-finished; err != nil {
		t.Errorf("Finish: %v", err)
	}
	if got := partitionOf(t, pool, c.Task.ID); got != "task_history_now" {
		t.Errorf("the ended task is in %s, want the partition that was attached", got)
	}
}

func TestConcurrentKeepHistory(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	var instances sync.WaitGroup
	for range 4 {
		instances.Go(func() {
			if err := s.KeepHistory(t.Context(), retention, 7); err != nil {
				t.Errorf("KeepHistory: %v", err)
			}
		})
	}
	instances.Wait()
	keepHistory(t, s, retention) // what one left to another that gave way
	if got := days(t, pool); len(got) != 8 {
		t.Errorf("partitions = %v, want 8", strings.Join(got, " "))
	}
}

// A lock on the history that another session holds keeps no instance waiting.
func TestKeepHistoryGivesWay(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	tx := lock(t, pool, "task_history IN SHARE UPDATE EXCLUSIVE MODE")
	if err := s.KeepHistory(t.Context(), retention, 7); err == nil {
		t.Error("KeepHistory reported nothing although it could do nothing")
	}
	if err := tx.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	keepHistory(t, s, retention)
}
