package postgres

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/melodia/orchestrator/internal/task"
)

const registerSQL = `-- name: register worker
INSERT INTO workers (id, name, concurrency) VALUES ($1, $2, $3) ON CONFLICT (id) DO UPDATE SET heartbeat_at = now()`

// Register makes a worker known, with a fresh heartbeat. name is shown, and so is
// concurrency: how many tasks it carries out at a time, 0 if it takes none
// by itself. It may be repeated when an answer was lost.
func (s *Store) Register(ctx context.Context, worker task.ID, name string, concurrency int) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if _, err := s.leases.Exec(ctx, registerSQL, [16]byte(worker), name, concurrency); err != nil {
		return fmt.Errorf("register worker %s: %w", worker, classify(err))
	}
	return nil
}

const heartbeatSQL = `-- name: heartbeat
UPDATE workers SET heartbeat_at = now() WHERE id = $1`

// Heartbeat renews the worker's lease on all it runs. It reports false when the
// worker is not known any more: it was silent too long, and others may carry
// out its tasks by now. Nothing that happens to tasks can delay it.
func (s *Store) Heartbeat(ctx context.Context, worker task.ID) (known bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	tag, err := s.leases.Exec(ctx, heartbeatSQL, [16]byte(worker))
	renewIfReadOnly(s.leases, err)
	if failed := s.beatFailed.Swap(err != nil); failed && err == nil {
		s.pool.Reset() // after an outage: some of its connections may be read-only still
	}
	if err != nil {
		return false, fmt.Errorf("heartbeat of worker %s: %w", worker, classify(err))
	}
	return tag.RowsAffected() > 0, nil
}

const cancelledSQL = `-- name: list tasks to be cancelled
SELECT id, claim FROM tasks WHERE worker_id = $1 AND cancel_requested_at IS NOT NULL`

// Cancelled returns the tasks that the worker runs and whose cancellation
// was requested, with the numbers of their claims.
func (s *Store) Cancelled(ctx context.Context, worker task.ID) (claims map[task.ID]int64, err error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	rows, err := s.pool.Query(ctx, cancelledSQL, [16]byte(worker))
	if err == nil {
		claims = make(map[task.ID]int64)
		var id task.ID
		var claim int64
		_, err = pgx.ForEachRow(rows, []any{(*[16]byte)(&id), &claim}, func() error { claims[id] = claim; return nil })
	}
	if err != nil {
		return nil, fmt.Errorf("list the tasks of worker %s to be cancelled: %w", worker, classify(err))
	}
	return claims, nil
}

// renewIfReadOnly has a pool make new connections after a write that was refused:
// those to a server that was demoted, or made while the database took no writes,
// stay read-only, and new ones may not be. It is for what is done now and then.
func renewIfReadOnly(pool *pool, err error) {
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) && pgErr.Code == "25006" {
		pool.Reset()
	}
}

const unregisterSQL = `-- name: unregister worker
DELETE FROM workers WHERE id = $1`

// Unregister makes the worker unknown. What it still holds is lost: the next
// Reap of any instance takes it.
func (s *Store) Unregister(ctx context.Context, worker task.ID) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if _, err := s.pool.Exec(ctx, unregisterSQL, [16]byte(worker)); err != nil {
		return fmt.Errorf("unregister worker %s: %w", worker, classify(err))
	}
	return nil
}

// Whether a worker is silent is decided when its row is deleted: a heartbeat that commits
// just before keeps the row and the worker's tasks. Where the worker claims a task while its
// row is being deleted, the task's worker has no row, and the next reap takes the task. A
// heartbeat in the future is from before the database's clock was set back: the worker then
// has a whole lease from now on.
var reapSQL = `-- name: reap
WITH ahead AS (
    UPDATE workers SET heartbeat_at = now() WHERE heartbeat_at > now() + make_interval(secs => $1)
), gone AS (
    DELETE FROM workers WHERE heartbeat_at < now() - make_interval(secs => $1) RETURNING id
), lost AS MATERIALIZED (
    SELECT t.id FROM tasks t
    WHERE t.state = 'running' AND (
        t.worker_id IN (SELECT id FROM gone)
        OR NOT EXISTS (SELECT FROM workers w WHERE w.id = t.worker_id)
        OR t.worker_id = $2 AND t.id <> ALL ($3::uuid[]) AND t.claimed_at < now() - make_interval(secs => $4))
    ORDER BY t.id
    FOR UPDATE SKIP LOCKED
)
UPDATE tasks t SET state = ` + waitingState("t.lane") + `, run_at = now(), worker_id = NULL, claimed_at = NULL,
    attempt_count = LEAST(t.attempt_count + 1, t.max_attempts),
    attempts = ` + withAttempt("lost", "no result of this attempt was recorded: its instance died, stalled or lost track of it; the call may not have been made") + `
WHERE t.id = ANY (ARRAY(SELECT id FROM lost))
RETURNING t.id`

// Reap takes running tasks from workers that cannot finish them: every worker that
// has been silent for lease, and the calling worker itself where the answer to
// its claim was lost, so that it does not know of the task (it is not among
// held, and was claimed longer ago than lease). They are pending and due at
// once; the attempt counts, as lost, so that a task which brings down its
// process ends some day. Reap returns their ids. Any instance may reap at
// any time.
func (s *Store) Reap(ctx context.Context, worker task.ID, held []task.ID, lease time.Duration) (lost []task.ID, err error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	// An answer can be under way for as long as a call may take.
	unanswered := max(lease, 2*callTimeout)
	rows, err := s.pool.Query(ctx, reapSQL, seconds(lease), [16]byte(worker), uuids(held), seconds(unanswered))
	if err == nil {
		lost, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (id task.ID, err error) {
			return id, row.Scan((*[16]byte)(&id))
		})
	}
	renewIfReadOnly(s.pool, err)
	if err != nil {
		return nil, fmt.Errorf("reap: %w", classify(err))
	}
	return lost, nil
}
