package postgres

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/melodia/orchestrator/internal/task"
)

func explainSQL(l columns) string {
	return `-- name: explain a task
WITH t AS (
    SELECT ` + l.shownOf(live) + `, worker_id, claimed_at FROM tasks WHERE id = $1
    UNION ALL
    SELECT ` + l.shownOf(history) + `, NULL, NULL FROM task_history WHERE id = $1
), dispatcher AS (
    SELECT *, heartbeat_at >= now() - make_interval(secs => $2) AS alive FROM workers WHERE concurrency IS DISTINCT FROM 0
)
SELECT t.*, now(), w.name, w.heartbeat_at,
    (SELECT count(*) FROM dispatcher WHERE alive),
    (SELECT CASE WHEN bool_and(concurrency IS NOT NULL) THEN sum(concurrency) END FROM dispatcher WHERE alive),
    (SELECT max(heartbeat_at) FROM dispatcher),
    (SELECT count(*) FROM tasks WHERE state = 'running'),
    CASE WHEN t.state = 'pending' AND t.run_at <= now() THEN (SELECT count(*) FROM (
        SELECT FROM tasks a WHERE a.state = 'pending' AND (a.run_at, a.id) < (t.run_at, t.id) LIMIT $3) ahead) END
FROM t LEFT JOIN workers w ON w.id = t.worker_id`
}

// Explain returns a task, or [task.ErrNotFound], and the facts around it.
// Workers that were silent for lease do not count. It is bounded like Find.
func (s *Store) Explain(ctx context.Context, id task.ID, lease time.Duration) (*task.Task, task.Facts, error) {
	var t *task.Task
	f := task.Facts{Lease: lease}
	err := s.search(ctx, func(ctx context.Context, tx pgx.Tx) error {
		rows, err := tx.Query(ctx, s.sql.explain, searchMode, [16]byte(id), seconds(lease), task.MaxAhead)
		if err != nil {
			return err
		}
		t, err = pgx.CollectExactlyOneRow(rows, func(row pgx.CollectableRow) (*task.Task, error) {
			var (
				worker                            *[16]byte
				holder                            *string
				claimedAt, holderSeen, anyoneSeen *time.Time
				slots, ahead                      *int
			)
			t, err := s.sql.shown.reader(&worker, &claimedAt, &f.Now, &holder, &holderSeen, &f.Instances, &slots, &anyoneSeen, &f.Running, &ahead).read(row)
			f.ClaimedAt, f.HolderSeenAt, f.InstanceSeenAt = zeroNull(claimedAt), zeroNull(holderSeen), zeroNull(anyoneSeen)
			f.Holder, f.Slots, f.Ahead = zeroNull(holder), zeroNull(slots), zeroNull(ahead)
			return t, err
		})
		return err
	})
	if errors.Is(err, pgx.ErrNoRows) {
		err = task.ErrNotFound
	}
	if err != nil {
		return nil, task.Facts{}, fmt.Errorf("explain task %s: %w", id, err)
	}
	return t, f, nil
}

const unfinishedSQL = `-- name: which tasks are not over
SELECT id FROM tasks WHERE id = ANY ($1)`

// Unfinished returns which of some tasks are not over.
func (s *Store) Unfinished(ctx context.Context, ids []task.ID) ([]task.ID, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	wanted := make([][16]byte, len(ids))
	for i, id := range ids {
		wanted[i] = id
	}
	rows, err := s.pool.Query(ctx, unfinishedSQL, wanted)
	if err != nil {
		return nil, fmt.Errorf("ask for %d tasks: %w", len(ids), classify(err))
	}
	unfinished, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (id task.ID, err error) {
		err = row.Scan((*[16]byte)(&id))
		return id, err
	})
	if err != nil {
		return nil, fmt.Errorf("ask for %d tasks: %w", len(ids), classify(err))
	}
	return unfinished, nil
}
