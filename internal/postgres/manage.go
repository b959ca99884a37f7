package postgres

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/melodia/orchestrator/internal/task"
)

// What people do to tasks one by one, or some hundred at a time. A task that
// they change gets the next claim number, so that nobody who saw it before
// takes it for the same.

// manageTries is how often a statement is tried where the task changes its state
// at the very moment.
const manageTries = 3

// historyOfGone moves the rows of the CTE gone to the history as cancelled, and
// releases their idempotency keys, but for such as others have by now. Keys are
// locked in their order (see insertOnceSQL).
const historyOfGone = `moved AS (
    INSERT INTO task_history (finished_at, id, claim, run_at, created_at, state, reason, attempt_count, attempts, ` + specColumns + `)
    SELECT now(), id, claim, run_at, created_at, 'cancelled', '', attempt_count, attempts, ` + specColumns + ` FROM gone
    RETURNING ` + endedColumns + `
), released AS (
    DELETE FROM idempotency_keys WHERE key = ANY (ARRAY(
        SELECT key FROM idempotency_keys
        WHERE key = ANY (ARRAY(SELECT idempotency_key FROM gone WHERE idempotency_key IS NOT NULL))
            AND task_ids <@ ARRAY(SELECT id FROM gone)
        ORDER BY key FOR UPDATE))
)`

// The rows are locked first, in the order of their ids: then their state
// stands, and decides what becomes of them.
const cancel = `WITH locked AS MATERIALIZED (
    SELECT id, state, cancel_requested_at FROM tasks WHERE id = ANY ($1) ORDER BY id FOR UPDATE
), asked AS (
    UPDATE tasks SET cancel_requested_at = now()
    WHERE id = ANY (ARRAY(SELECT id FROM locked WHERE state = 'running' AND cancel_requested_at IS NULL))
    RETURNING ` + liveColumns + `
), gone AS (
    DELETE FROM tasks WHERE id = ANY (ARRAY(SELECT id FROM locked WHERE state = 'pending'))
    RETURNING id, claim + 1 AS claim, run_at, created_at, attempt_count, attempts, ` + specColumns + `
), ` + historyOfGone

const cancelSQL = `-- name: cancel task
` + cancel + `
SELECT * FROM asked UNION ALL SELECT * FROM moved`

const cancelManySQL = `-- name: cancel tasks
` + cancel + `
SELECT id, claim, true FROM asked UNION ALL SELECT id, claim, false FROM moved`

// Cancel ends a pending task as cancelled, and asks for the end of a running
// one: then it has a CancelRequestedAt, its holder is to cut the call off, and
// it is not tried again whatever the call comes to. Cancel returns the task as
// it is then, or [task.ErrNotFound], [task.ErrEnded] or
// [task.ErrCancelRequested].
func (s *Store) Cancel(ctx context.Context, id task.ID) (*task.Task, error) {
	return s.manage(ctx, "cancel", id, (*task.Task).Cancellable, cancelSQL, [][16]byte{id})
}

// CancelMany is Cancel of some hundred tasks in one statement; those that
// cannot be cancelled are left out. It returns how many were, and of the
// running ones among them the numbers of their claims.
func (s *Store) CancelMany(ctx context.Context, ids []task.ID) (count int, running map[task.ID]int64, err error) {
	running = make(map[task.ID]int64)
	var id task.ID
	var claim int64
	var isRunning bool
	count, err = s.manageMany(ctx, []any{(*[16]byte)(&id), &claim, &isRunning}, func() {
		if isRunning {
			running[id] = claim
		}
	}, cancelManySQL, uuids(ids))
	if err != nil {
		return 0, nil, fmt.Errorf("cancel %d tasks: %w", len(ids), err)
	}
	return count, running, nil
}

// An overdue task keeps its place.
const makeDueSQL = `-- name: make task due
WITH due AS (
    UPDATE tasks SET run_at = now(), claim = claim + 1
    WHERE id = $1 AND state = 'pending' AND cancel_requested_at IS NULL AND run_at > now()
    RETURNING ` + liveColumns + `
)
SELECT * FROM due
UNION ALL
SELECT ` + liveColumns + ` FROM tasks
WHERE id = $1 AND state = 'pending' AND cancel_requested_at IS NULL AND run_at <= now()`

// MakeDue makes a pending task due, and returns it; or [task.ErrNotFound],
// [task.ErrNotPending] or [task.ErrCancelRequested].
func (s *Store) MakeDue(ctx context.Context, id task.ID) (*task.Task, error) {
	return s.manage(ctx, "run", id, (*task.Task).Changeable, makeDueSQL, [16]byte(id))
}

// Of a failed or cancelled task its story stays; its attempts, and the time
// for retries, begin anew. Who redrives it from within a chain of calls makes it a
// link of that chain: a task that redrives another must not begin anew.
const redrive = `WITH locked AS MATERIALIZED (
    SELECT id FROM task_history WHERE id = ANY ($1) AND state IN ('failed', 'cancelled') ORDER BY id FOR UPDATE
), gone AS (
    DELETE FROM task_history WHERE id = ANY (ARRAY(SELECT id FROM locked))
    RETURNING id, claim, created_at, attempts, CASE WHEN expires_at > ` + redriveAt + ` THEN expires_at END AS expires_at, ` + keptColumns + `,
        GREATEST(hops, NULLIF($4::int, 0)) AS hops, GREATEST(round, ` + lastRound + `) + 1 AS round
), again AS (
    INSERT INTO tasks (id, claim, run_at, created_at, attempts, ` + specColumns + `)
    SELECT id, claim + 1, ` + redriveAt + `, created_at, attempts, ` + specColumns + `
    FROM gone
    RETURNING ` + liveColumns + `
)`

// redriveAt is when a redriven task is due.
const redriveAt = `now() + make_interval(secs => $2::float8 + $3::float8 * (array_position($1, id) - 1))`

// lastRound is the round of the last one of some attempts: those that were made
// before rounds were kept have none, and [task.NumberRounds] says which it was.
const lastRound = `COALESCE((attempts -> -1 ->> 'round')::int, 1 + (
    SELECT count(*)::int FROM (
        SELECT (a ->> 'number')::int AS number, lag((a ->> 'number')::int
            + CASE WHEN a ->> 'outcome' IN ('interrupted', 'snoozed') THEN 0 ELSE 1 END) OVER (ORDER BY place) AS next
        FROM jsonb_array_elements(attempts) WITH ORDINALITY AS attempt (a, place)) numbers
    WHERE number < next))`

const redriveSQL = `-- name: redrive task
` + redrive + `
SELECT * FROM again`

const redriveManySQL = `-- name: redrive tasks
` + redrive + `
SELECT id FROM again`

// Redrive makes a failed or cancelled task pending again, due at once and with
// no attempt counted; an expires_at before that is dropped. Its Hops become
// hops where they are fewer. It returns the task, or [task.ErrNotFound] or
// [task.ErrNotRedrivable].
func (s *Store) Redrive(ctx context.Context, id task.ID, hops int) (*task.Task, error) {
	return s.manage(ctx, "redrive", id, (*task.Task).Redrivable, redriveSQL, [][16]byte{id}, 0.0, 0.0, hops)
}

// RedriveMany is Redrive of some hundred tasks in one statement; those that
// cannot be redriven are left out. The first is due after wait, each further
// one apart later. It returns their number.
func (s *Store) RedriveMany(ctx context.Context, ids []task.ID, wait, apart time.Duration, hops int) (count int, err error) {
	var id task.ID
	count, err = s.manageMany(ctx, []any{(*[16]byte)(&id)}, func() {}, redriveManySQL, uuids(ids), seconds(wait), seconds(apart), hops)
	if err != nil {
		return 0, fmt.Errorf("redrive %d tasks: %w", len(ids), err)
	}
	return count, nil
}

const changeSQL = `-- name: change task
UPDATE tasks SET claim = claim + 1, run_at = GREATEST(COALESCE($3, now() + make_interval(secs => $4)), LEAST(run_at, now())),
    expires_at = $5, timeout_seconds = $6, max_retry_duration_seconds = $7, min_backoff_seconds = $8, max_backoff_seconds = $9,
    max_attempts = $10, max_doublings = $11, retry_client_errors = $12, headers = $13::text::jsonb, labels = $14::text::jsonb,
    content_type = CASE WHEN $15 THEN $16 ELSE content_type END, body = CASE WHEN $15 THEN $17 ELSE body END
WHERE id = $1 AND claim = $2 AND state = 'pending' AND cancel_requested_at IS NULL
RETURNING ` + liveColumns

// Change writes a pending task that was changed since it was read, and returns
// what is stored then. content is what its call carries from now on; nil leaves
// that as it is, and the body is not touched. Change is fenced: it returns
// [task.ErrChanged], and changes nothing, where the task was claimed or changed
// by others meanwhile.
func (s *Store) Change(ctx context.Context, t *task.Task, content *task.Content) (*task.Task, error) {
	var body []byte
	var contentType string
	if content != nil {
		body, contentType = content.Body, content.ContentType
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	changed, err := s.manageOnce(ctx, changeSQL, [16]byte(t.ID), t.LastClaim, nullTime(t.RunAt), seconds(t.Delay),
		nullTime(t.ExpiresAt), seconds(t.Timeout), seconds(t.Retry.MaxRetryDuration), seconds(t.Retry.MinBackoff),
		seconds(t.Retry.MaxBackoff), t.Retry.MaxAttempts, t.Retry.MaxDoublings, t.Retry.RetryClientErrors,
		encodeMap(t.Headers), encodeMap(t.Labels), content != nil, contentType, body)
	if errors.Is(err, pgx.ErrNoRows) {
		err = task.ErrChanged
	}
	if err != nil {
		return nil, fmt.Errorf("change task %s: %w", t.ID, err)
	}
	return changed, nil
}

// manage runs a statement that does something to one task and returns it. Where
// there is no row, possible says why. A state that allowed it, or a task that
// is nowhere, may have come up after the statement had looked.
func (s *Store) manage(ctx context.Context, act string, id task.ID, possible func(*task.Task) error, sql string, args ...any) (*task.Task, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	for range manageTries {
		t, err := s.manageOnce(ctx, sql, args...)
		if errors.Is(err, pgx.ErrNoRows) {
			if t, err = s.Get(ctx, id); err == nil {
				err = possible(t)
			}
			if err == nil {
				continue
			}
		}
		if err != nil {
			return nil, fmt.Errorf("%s task %s: %w", act, id, err)
		}
		return t, nil
	}
	return nil, fmt.Errorf("%s task %s: %w", act, id, task.ErrChanged)
}

// manageOnce runs a statement that returns one task, or [pgx.ErrNoRows].
func (s *Store) manageOnce(ctx context.Context, sql string, args ...any) (*task.Task, error) {
	if err := s.managing.acquire(ctx); err != nil {
		return nil, err
	}
	defer s.managing.release()
	t, err := s.queryTask(ctx, sql, args...)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil, err
	}
	return t, classify(err)
}

func (s *Store) queryTask(ctx context.Context, sql string, args ...any) (*task.Task, error) {
	rows, err := s.pool.Query(ctx, sql, args...)
	if err != nil {
		return nil, err
	}
	return pgx.CollectExactlyOneRow(rows, scanTaskOnly)
}

// manageMany runs a statement that returns a row for each task that it changed.
func (s *Store) manageMany(ctx context.Context, scan []any, each func(), sql string, args ...any) (count int, err error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if err := s.managing.acquire(ctx); err != nil {
		return 0, err
	}
	defer s.managing.release()
	rows, err := s.pool.Query(ctx, sql, args...)
	if err != nil {
		return 0, classify(err)
	}
	_, err = pgx.ForEachRow(rows, scan, func() error { count++; each(); return nil })
	return count, classify(err)
}

// uuids are ids as the database takes them.
func uuids(ids []task.ID) [][16]byte {
	out := make([][16]byte, len(ids))
	for i, id := range ids {
		out[i] = id
	}
	return out
}
