package postgres

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
)

const (
	partitionPrefix = "task_history_"
	partitionDay    = "20060102"
	// historyLockKey serialises the instances' upkeep.
	historyLockKey = 0x68697374 // "hist"
)

// KeepHistory creates the partitions of today and of as many days ahead, where they
// are missing: each takes the database some 10 ms, in which no task can end. It
// drops those that ended longer than retention ago, and forgets the idempotency
// keys that do not count any more, and the queues of which only names were left. Any instance may call it at any time; what
// another one is at, it leaves alone.
//
// Where the role does not own the history, it makes and drops no partitions: tasks
// end in the default one, and rows are deleted instead.
func (s *Store) KeepHistory(ctx context.Context, retention time.Duration, ahead int) error {
	today, existing, owner, err := s.partitions(ctx)
	if err != nil {
		return fmt.Errorf("list history partitions: %w", err)
	}
	if !owner {
		return errors.Join(
			s.trim(ctx, "history", trimHistorySQL, seconds(retention)),
			s.trim(ctx, "idempotency keys", trimKeysSQL),
			s.sweepLanes(ctx),
			s.sweepQueues(ctx),
		)
	}
	return errors.Join(
		s.createAhead(ctx, today, ahead, existing),
		s.dropOld(ctx, today.Add(-retention), existing),
		s.trim(ctx, "default history partition", trimDefaultSQL, seconds(retention)),
		s.trim(ctx, "idempotency keys", trimKeysSQL),
		s.sweepLanes(ctx),
		s.sweepQueues(ctx),
	)
}

func (s *Store) createAhead(ctx context.Context, today time.Time, ahead int, existing []string) error {
	for day := range ahead + 1 {
		start := today.AddDate(0, 0, day)
		name := partitionPrefix + start.Format(partitionDay)
		if slices.Contains(existing, name) {
			continue
		}
		if err := s.alterHistory(ctx, createPartition(name, start)...); err != nil {
			return err
		}
	}
	return nil
}

// dropOld drops the partitions of days that were over by oldest.
func (s *Store) dropOld(ctx context.Context, oldest time.Time, existing []string) error {
	for _, name := range existing {
		start, err := time.Parse(partitionDay, strings.TrimPrefix(name, partitionPrefix))
		if err != nil || start.AddDate(0, 0, 1).After(oldest) {
			continue // the default partition, or not old enough
		}
		if err := s.alterHistory(ctx, "DROP TABLE "+name); err != nil {
			return err
		}
	}
	return nil
}

const partitionsSQL = `-- name: list history partitions
SELECT date_trunc('day', now() AT TIME ZONE 'UTC'),
    array(SELECT c.relname::text FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
        WHERE i.inhparent = 'task_history'::regclass ORDER BY c.relname),
    (SELECT pg_has_role(relowner, 'USAGE') FROM pg_class WHERE oid = 'task_history'::regclass)
        AND has_schema_privilege((SELECT relnamespace FROM pg_class WHERE oid = 'task_history'::regclass), 'CREATE')`

// partitions returns the current day (UTC), the names of all partitions, and whether
// the role may make and drop some.
func (s *Store) partitions(ctx context.Context) (today time.Time, names []string, owner bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	err = s.pool.QueryRow(ctx, partitionsSQL).Scan(&today, &names, &owner)
	return today, names, owner, classify(err)
}

// createPartition returns the statements that make the partition of one day.
// Attaching locks the default partition against all others while it makes sure
// that no row in it belongs to the new one. Writes wait from before that on: one
// that was on its way into the default partition would find that its row belongs
// there no more, and the server's log would quote the row, secrets and all.
func createPartition(name string, start time.Time) []string {
	const bound = "2006-01-02 15:04:05+00"
	return []string{
		"CREATE TABLE " + name + " (LIKE task_history INCLUDING DEFAULTS INCLUDING CONSTRAINTS)",
		"LOCK TABLE ONLY task_history IN SHARE ROW EXCLUSIVE MODE",
		fmt.Sprintf("ALTER TABLE task_history ATTACH PARTITION %s FOR VALUES FROM ('%s') TO ('%s')",
			name, start.Format(bound), start.AddDate(0, 0, 1).Format(bound)),
	}
}

// alterHistory runs statements in one transaction, unless another instance is
// altering the history, and gives up rather than keep others waiting for a lock.
// It is one message to the server: an instance that stalls in its midst must
// not hold locks that all others wait for.
func (s *Store) alterHistory(ctx context.Context, statements ...string) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	_, err := s.pool.Exec(ctx, fmt.Sprintf(`DO $$ BEGIN
    IF pg_try_advisory_xact_lock(%d) THEN
        SET LOCAL lock_timeout = '500ms';
        %s;
    END IF;
END $$`, historyLockKey, strings.Join(statements, "; ")))
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) {
		switch pgErr.Code {
		case "42P07", "42P01", // another instance created or dropped it in between
			"23514": // tasks of that day are in the default partition already: they stay there
			return nil
		}
	}
	if err != nil {
		return fmt.Errorf("alter the history: %w", classify(err))
	}
	return nil
}

// The default partition is never dropped. It is empty in a service that runs daily.
const trimDefaultSQL = `-- name: trim default history partition
DELETE FROM task_history_default WHERE ctid = ANY (ARRAY(
    SELECT ctid FROM task_history_default WHERE finished_at < now() - make_interval(secs => $1) LIMIT 10000))`

const trimHistorySQL = `-- name: trim history
DELETE FROM task_history WHERE (id, finished_at) IN (
    SELECT id, finished_at FROM task_history WHERE finished_at < now() - make_interval(secs => $1) LIMIT 10000)`

// trim deletes what is too old, in the steps that sql takes.
func (s *Store) trim(ctx context.Context, what, sql string, args ...any) error {
	for {
		deleted, err := s.trimSome(ctx, sql, args...)
		if err != nil {
			return fmt.Errorf("trim the %s: %w", what, err)
		}
		if deleted == 0 {
			return nil
		}
	}
}

func (s *Store) trimSome(ctx context.Context, sql string, args ...any) (deleted int64, err error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	tag, err := s.pool.Exec(ctx, sql, args...)
	return tag.RowsAffected(), classify(err)
}
