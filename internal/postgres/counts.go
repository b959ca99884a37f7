package postgres

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/melodia/orchestrator/internal/task"
)

// maxCounted is how far tasks are counted one by one.
const maxCounted = 10_000

// What is more than $1 is not counted on: the statistics that VACUUM and ANALYZE
// keep of the indexes and partitions say about how many there are. A
// partitioned table and its indexes have none of their own.
const countsSQL = `-- name: count tasks
WITH estimate AS (
    SELECT whole.name, sum(GREATEST(part.reltuples, 0)) AS count
    FROM unnest('{task_history,task_history_failed,task_history_cancelled}'::text[]) AS whole (name)
    JOIN pg_inherits i ON i.inhparent = to_regclass(whole.name)
    JOIN pg_class part ON part.oid = i.inhrelid
    GROUP BY whole.name
    UNION ALL
    SELECT name, GREATEST(reltuples, 0)
    FROM unnest('{tasks_due,tasks_waiting,tasks_running,tasks_awaiting}'::text[]) AS whole (name)
    JOIN pg_class c ON c.oid = to_regclass(whole.name)
)
SELECT
    (SELECT count(*) FROM (SELECT FROM tasks WHERE state = 'pending' LIMIT $1 + 1) c)
        + (SELECT count(*) FROM (SELECT FROM tasks WHERE state = 'waiting' LIMIT $1 + 1) c),
    (SELECT count(*) FROM (SELECT FROM tasks WHERE state = 'running' LIMIT $1 + 1) c)
        + (SELECT count(*) FROM (SELECT FROM tasks WHERE state = 'awaiting' LIMIT $1 + 1) c),
    (SELECT count(*) FROM (SELECT FROM task_history LIMIT $1 + 1) c),
    (SELECT count(*) FROM (SELECT FROM task_history WHERE state = 'failed' LIMIT $1 + 1) c),
    (SELECT count(*) FROM (SELECT FROM task_history WHERE state = 'cancelled' LIMIT $1 + 1) c),
    COALESCE((SELECT sum(count) FROM estimate WHERE name IN ('tasks_due', 'tasks_waiting')), 0)::bigint,
    COALESCE((SELECT sum(count) FROM estimate WHERE name IN ('tasks_running', 'tasks_awaiting')), 0)::bigint,
    COALESCE((SELECT count FROM estimate WHERE name = 'task_history'), 0)::bigint,
    COALESCE((SELECT count FROM estimate WHERE name = 'task_history_failed'), 0)::bigint,
    COALESCE((SELECT count FROM estimate WHERE name = 'task_history_cancelled'), 0)::bigint`

// Counts returns how many tasks there are in each state, and for how long the
// longest waiting one has been due that waits for no limit. Up to some thousands are counted, more are
// estimated. It is bounded like Find.
func (s *Store) Counts(ctx context.Context) (counts map[task.State]task.Count, overdue time.Duration, err error) {
	var counted, estimated [5]int64
	err = s.search(ctx, func(ctx context.Context, tx pgx.Tx) error {
		return tx.QueryRow(ctx, countsSQL, searchMode, maxCounted).Scan(
			&counted[0], &counted[1], &counted[2], &counted[3], &counted[4],
			&estimated[0], &estimated[1], &estimated[2], &estimated[3], &estimated[4])
	})
	if err != nil {
		return nil, 0, fmt.Errorf("count tasks: %w", err)
	}
	if overdue, err = s.overdue(ctx); err != nil {
		return nil, 0, err
	}
	count := func(i int) task.Count {
		if counted[i] <= maxCounted {
			return task.Count{Tasks: counted[i], Exact: true}
		}
		return task.Count{Tasks: max(estimated[i], counted[i])}
	}
	finished, failed, cancelled := count(2), count(3), count(4)
	return map[task.State]task.Count{
		task.Pending: count(0),
		task.Running: count(1),
		// What is neither of the others. It may be none, as the others are many.
		task.Succeeded: {Tasks: max(finished.Tasks-failed.Tasks-cancelled.Tasks, 0), Exact: finished.Exact},
		task.Failed:    failed,
		task.Cancelled: cancelled,
	}, overdue, nil
}
