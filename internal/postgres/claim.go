package postgres

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/melodia/orchestrator/internal/task"
)

// claimSQL returns the statements of Claim and ClaimOne. A worker that was reaped claims
// nothing until its heartbeat has told it so and it has registered anew.
//
// As in the other statements on tasks, UPDATE finds its rows by an array and not by a
// join. The planner expects an array to be short, and uses an index. It knows nothing of a
// join's size, and may read the whole table. The claimed rows are locked, so their places
// (ctid) hold and no index is needed. A row that another transaction changed at this
// moment has another place: the next claim finds it.
func claimSQL(l columns) (due, one string) {
	const set = `UPDATE tasks t SET state = 'running', claim = t.claim + 1, worker_id = $1,
    claimed_at = now(), first_claimed_at = COALESCE(t.first_claimed_at, now())`
	returning := `
RETURNING ` + claimedColumns(l)
	return `-- name: claim due tasks
WITH due AS MATERIALIZED (
    SELECT ctid FROM tasks
    WHERE state = 'pending' AND run_at >= $3 AND run_at <= now() AND EXISTS (SELECT FROM workers WHERE id = $1)
    ORDER BY run_at, id
    LIMIT $2
    FOR UPDATE SKIP LOCKED
)
` + set + `
WHERE t.ctid = ANY (ARRAY(SELECT ctid FROM due))` + returning + `, t.lane`, `-- name: claim one task
` + set + `
WHERE t.id = $2 AND t.state IN ('pending', 'waiting') AND EXISTS (SELECT FROM workers WHERE id = $1)` + returning + `, t.lane`
}

// claimedColumns is what a claim returns of t, in the order of scanClaim.
func claimedColumns(l columns) string {
	return l.with(useClaim).instead("t.", nil) + `, t.claimed_at, t.first_claimed_at`
}

// Claim takes up to limit due tasks that wait for no limit, the longest due first, for
// worker: those without a lane, and those that [Store.MakeDue] takes out of theirs for a
// call. A worker that is not registered gets none. The tasks come without what
// a call does not need (labels, attempts, callbacks, created_by), in no
// particular order. A write that committed after its request had given up may be
// found some seconds later than others (see lowWater).
func (s *Store) Claim(ctx context.Context, worker task.ID, limit int) ([]*task.Claim, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	limit = min(limit, maxBatch)
	from := s.lowWater.from()
	rows, err := s.pool.Query(ctx, s.sql.claimDue, [16]byte(worker), limit, from)
	if err != nil {
		return nil, fmt.Errorf("claim %d tasks: %w", limit, classify(err))
	}
	claims, err := pgx.AppendRows(make([]*task.Claim, 0, limit), rows, s.scanClaimWithLane())
	if err != nil {
		return nil, fmt.Errorf("claim %d tasks: %w", limit, classify(err))
	}
	if len(claims) > 0 {
		latest := slices.MaxFunc(claims, func(a, b *task.Claim) int { return a.Task.RunAt.Compare(b.Task.RunAt) })
		s.lowWater.saw(from, latest.Task.RunAt)
	}
	return claims, nil
}

// ClaimOne takes the pending task with the given id for worker, whenever it is
// due and whatever its lane's limits: it counts for them from then on. It returns [task.ErrNotFound], or [task.ErrNotPending] when the task is
// running or has ended.
func (s *Store) ClaimOne(ctx context.Context, worker, id task.ID) (*task.Claim, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout) // waiting for a slot included
	defer cancel()
	claim, err := s.claimOne(ctx, worker, id)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil, s.whyNotClaimed(ctx, id)
	}
	if err != nil {
		return nil, fmt.Errorf("claim task %s: %w", id, classify(err))
	}
	return claim, nil
}

func (s *Store) claimOne(ctx context.Context, worker, id task.ID) (*task.Claim, error) {
	if err := s.managing.acquire(ctx); err != nil {
		return nil, err
	}
	defer s.managing.release()
	rows, err := s.pool.Query(ctx, s.sql.claimOne, [16]byte(worker), [16]byte(id))
	if err != nil {
		return nil, err
	}
	return pgx.CollectExactlyOneRow(rows, s.scanClaimWithLane())
}

// whyNotClaimed explains a ClaimOne without a row.
func (s *Store) whyNotClaimed(ctx context.Context, id task.ID) error {
	t, err := s.Get(ctx, id)
	switch {
	case err != nil:
		return err
	case t.State == task.Pending:
		return fmt.Errorf("claim task %s: %w: this instance is not registered at the moment", id, task.ErrUnavailable)
	default:
		return fmt.Errorf("claim task %s: %w", id, task.ErrNotPending)
	}
}

// scanClaim returns what reads the rows of a statement that claims. Further values of a
// row go to more.
func (s *Store) scanClaim(more ...any) pgx.RowToFunc[*task.Claim] {
	var at, firstAt time.Time
	r := s.sql.claimed.reader(append([]any{&at, &firstAt}, more...)...)
	return func(row pgx.CollectableRow) (*task.Claim, error) {
		t, err := r.read(row)
		if err != nil {
			return nil, err
		}
		t.State = task.Running
		return &task.Claim{Task: t, Number: t.LastClaim, At: at, FirstAt: firstAt}, nil
	}
}

// scanClaimWithLane is scanClaim of rows that end with the lane.
func (s *Store) scanClaimWithLane() pgx.RowToFunc[*task.Claim] {
	var lane *string
	scan := s.scanClaim(&lane)
	return func(row pgx.CollectableRow) (*task.Claim, error) {
		c, err := scan(row)
		if err == nil && lane != nil {
			setLane(c.Task, *lane)
		}
		return c, err
	}
}

const nextDueSQL = `-- name: when is the next task due
SELECT now(), (SELECT run_at FROM tasks WHERE state = 'pending' AND run_at >= $1 ORDER BY run_at, id LIMIT 1)`

// NextDue returns the time until the next pending task without a lane is due, by the
// database's clock: negative when one is overdue. ok is false when none is
// pending. It sees what Claim sees.
func (s *Store) NextDue(ctx context.Context) (wait time.Duration, ok bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	from := s.lowWater.from()
	var now time.Time
	var next *time.Time
	if err := s.pool.QueryRow(ctx, nextDueSQL, from).Scan(&now, &next); err != nil {
		return 0, false, fmt.Errorf("ask for the next due task: %w", classify(err))
	}
	if next == nil {
		s.lowWater.saw(from, now)
		return 0, false, nil
	}
	wait = next.Sub(now)
	s.lowWater.saw(from, now.Add(min(wait, 0)))
	return wait, true, nil
}

const nowSQL = `-- name: what time is it
SELECT now()`

// Now returns the moment by the database's clock, which decides what is due and
// what has expired.
func (s *Store) Now(ctx context.Context) (now time.Time, err error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout) // waiting for a slot included
	defer cancel()
	if err := s.managing.acquire(ctx); err != nil {
		return time.Time{}, fmt.Errorf("ask for the time: %w", classify(err))
	}
	defer s.managing.release()
	before := localTime()
	if err := s.pool.QueryRow(ctx, nowSQL).Scan(&now); err != nil {
		return time.Time{}, fmt.Errorf("ask for the time: %w", classify(err))
	}
	s.clock.saw(now, before, localTime())
	return now, nil
}
