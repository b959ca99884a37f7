package postgres

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/melodia/orchestrator/internal/task"
)

// What scope manage does to tasks one by one, or some hundred at a time. A task that
// is changed gets the next claim number, so that no reader of its earlier state
// takes it for the same.

// manageTries is how often a statement is tried where the task changes its state
// at the very moment.
const manageTries = 3

// historyOfGone moves the rows of the CTE gone to the history, and releases their
// idempotency keys, unless another task took the key over. Keys are locked in their
// order (see insertOnceSQL).
func historyOfGone(l columns) string {
	return `moved AS (
    INSERT INTO task_history (` + l.of(history).names() + `)
    SELECT ` + l.of(history).names() + ` FROM gone
    RETURNING ` + l.shownOf(history) + `
), released AS (
    DELETE FROM idempotency_keys WHERE key = ANY (ARRAY(
        SELECT key FROM idempotency_keys
        WHERE key = ANY (ARRAY(SELECT idempotency_key FROM gone WHERE idempotency_key IS NOT NULL))
            AND task_ids <@ ARRAY(SELECT id FROM gone)
        ORDER BY key FOR UPDATE))
)`
}

// The rows are locked first, in the order of their ids: from then on their state
// stands, and decides which are deleted.
func cancelSQL(l columns) (one, many string) {
	cancel := `WITH locked AS MATERIALIZED (
    SELECT id, state, cancel_requested_at FROM tasks WHERE id = ANY ($1) ORDER BY id FOR UPDATE
), asked AS (
    UPDATE tasks SET cancel_requested_at = now()
    WHERE id = ANY (ARRAY(SELECT id FROM locked WHERE state = 'running' AND cancel_requested_at IS NULL))
    RETURNING ` + l.shownOf(live) + `
), gone AS (
    DELETE FROM tasks t WHERE id = ANY (ARRAY(SELECT id FROM locked WHERE state IN ('pending', 'waiting', 'awaiting')))
    RETURNING ` + l.of(history).instead("t.", map[string]string{
		"claim": "t.claim + 1", "state": "'cancelled'", "reason": "''", "finished_at": "now()",
		"attempts": `CASE WHEN t.state = 'awaiting' THEN ` + withAttempt("interrupted", "the task was cancelled while its completion was awaited") + ` ELSE t.attempts END`,
	}) + `
), ` + historyOfGone(l)
	return `-- name: cancel task
` + cancel + `
SELECT * FROM asked UNION ALL SELECT * FROM moved`, `-- name: cancel tasks
` + cancel + `
SELECT id, claim, true FROM asked UNION ALL SELECT id, claim, false FROM moved`
}

// withAttempt is t's story with an attempt that ends now with an outcome and an error of ours.
func withAttempt(outcome, why string) string {
	return keptAttempts + ` || jsonb_build_array(jsonb_build_object(
        'number', t.attempt_count + 1,
        'started_at', to_char(t.claimed_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'),
        'duration_seconds', EXTRACT(EPOCH FROM now() - t.claimed_at)::float8,
        'outcome', '` + outcome + `',
        'error', '` + why + `')
        || CASE WHEN t.round > 1 THEN jsonb_build_object('round', t.round) ELSE '{}' END)`
}

// Cancel ends a pending task as cancelled, or one that its target has taken, and asks for the end of a running
// one: then it has a CancelRequestedAt, its holder is to cut the call off, and
// it is not tried again whatever the outcome of the call. Cancel returns the task as
// it is then, or [task.ErrNotFound], [task.ErrEnded] or
// [task.ErrCancelRequested].
func (s *Store) Cancel(ctx context.Context, id task.ID) (*task.Task, error) {
	return s.manage(ctx, "cancel", id, (*task.Task).Cancellable, s.sql.cancel, [][16]byte{id})
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
	}, s.sql.cancelMany, uuids(ids))
	if err != nil {
		return 0, nil, fmt.Errorf("cancel %d tasks: %w", len(ids), err)
	}
	return count, running, nil
}

// An overdue task keeps its place, unless it waits for the limits of its queue alone: that
// one is claimed like a plain task. It keeps its lane, and so counts there while it runs.
func makeDueSQL(l columns) string {
	const unlimited = `state = 'waiting' AND strpos(lane, ' ') = 0`
	return `-- name: make task due
WITH due AS (
    UPDATE tasks SET run_at = now(), claim = claim + 1, state = CASE WHEN ` + unlimited + ` THEN 'pending' ELSE state END
    WHERE id = $1 AND state IN ('pending', 'waiting') AND cancel_requested_at IS NULL AND (run_at > now() OR ` + unlimited + `)
    RETURNING ` + l.shownOf(live) + `
)
SELECT * FROM due
UNION ALL
SELECT ` + l.shownOf(live) + ` FROM tasks
WHERE id = $1 AND state IN ('pending', 'waiting') AND cancel_requested_at IS NULL AND run_at <= now() AND NOT COALESCE(` + unlimited + `, false)`
}

// MakeDue makes a pending task due, and returns it; or [task.ErrNotFound],
// [task.ErrNotPending] or [task.ErrCancelRequested]. This one call for it does not wait for
// the limits and the pause of its queue; a host that is not healthy it does wait for.
func (s *Store) MakeDue(ctx context.Context, id task.ID) (*task.Task, error) {
	return s.manage(ctx, "run", id, (*task.Task).Changeable, s.sql.makeDue, [16]byte(id))
}

// Of a failed or cancelled task its story stays; its attempts, and the time
// for retries, begin anew. A redrive from within a chain of calls makes it a
// link of that chain: a task that redrives another must not begin anew.
func redriveSQL(l columns) (one, many string) {
	redrive := `WITH locked AS MATERIALIZED (
    SELECT id FROM task_history WHERE id = ANY ($1) AND state IN ('failed', 'cancelled') ORDER BY id FOR UPDATE
), gone AS (
    DELETE FROM task_history WHERE id = ANY (ARRAY(SELECT id FROM locked))
    RETURNING ` + l.with(useRedrive).instead("", map[string]string{
		"claim":      `claim + 1`,
		"run_at":     redriveAt,
		"expires_at": `CASE WHEN expires_at > ` + redriveAt + ` THEN expires_at END`,
		"hops":       `GREATEST(hops, NULLIF($4::int, 0))`,
		"round":      `GREATEST(round, ` + lastRound + `) + 1`,
	}) + `
), again AS (
    INSERT INTO tasks (` + l.with(useRedrive).names() + `, lane, state)
    SELECT ` + l.with(useRedrive).names() + `, ` + flowLane + `, ` + waitingState("queue") + ` FROM gone
    RETURNING ` + l.shownOf(live) + `
), named AS (
    ` + nameQueues(`(SELECT queue AS name FROM gone) n`) + `
)`
	return `-- name: redrive task
` + redrive + `
SELECT * FROM again`, `-- name: redrive tasks
` + redrive + `
SELECT id FROM again`
}

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

// Redrive makes a failed or cancelled task pending again, due at once and with
// no attempt counted; an expires_at before that is dropped. Its Hops become
// hops where they are fewer. It returns the task, or [task.ErrNotFound] or
// [task.ErrNotRedrivable].
func (s *Store) Redrive(ctx context.Context, id task.ID, hops int) (*task.Task, error) {
	return s.manage(ctx, "redrive", id, (*task.Task).Redrivable, s.sql.redrive, [][16]byte{id}, 0.0, 0.0, hops)
}

// RedriveMany is Redrive of some hundred tasks in one statement; those that
// cannot be redriven are left out. The first is due after wait, each further
// one apart later. It returns their number.
func (s *Store) RedriveMany(ctx context.Context, ids []task.ID, wait, apart time.Duration, hops int) (count int, err error) {
	var id task.ID
	count, err = s.manageMany(ctx, []any{(*[16]byte)(&id)}, func() {}, s.sql.redriveMany, uuids(ids), seconds(wait), seconds(apart), hops)
	if err != nil {
		return 0, fmt.Errorf("redrive %d tasks: %w", len(ids), err)
	}
	return count, nil
}

func changeSQL(l columns) statement {
	var p parameters
	set := `UPDATE tasks SET claim = claim + 1, state = ` + waitingState(p.of("lane")+"::text") + `, run_at = GREATEST(
    COALESCE(` + p.of("run_at") + `, now() + make_interval(secs => ` + p.of("delay_seconds") + `)), LEAST(run_at, now()))`
	for _, c := range l.with(useChange | useContent) {
		value := c.stored(p.of(c.name) + "::" + c.sentType())
		if c.use&useContent != 0 {
			value = `CASE WHEN ` + p.of("has_content") + ` THEN ` + value + ` ELSE ` + c.name + ` END`
		}
		set += `,
    ` + c.name + ` = ` + value
	}
	return p.statement(`-- name: change task
WITH changed AS (
    ` + set + `
    WHERE id = ` + p.of("id") + ` AND claim = ` + p.of("claim") + ` AND state IN ('pending', 'waiting') AND cancel_requested_at IS NULL
    RETURNING ` + l.shownOf(live) + `
), named AS (
    ` + nameQueues(`(SELECT queue AS name FROM changed) n`) + `
)
SELECT * FROM changed`)
}

// Change writes a pending task that was changed since it was read, and returns
// what is stored then. content is what its call carries from now on; nil leaves
// that as it is, and the body is not touched. Change is fenced: it returns
// [task.ErrChanged], and changes nothing, where the task was claimed or changed
// by others meanwhile.
func (s *Store) Change(ctx context.Context, t *task.Task, content *task.Content) (*task.Task, error) {
	sent := *t
	if content != nil {
		sent.Body, sent.ContentType = content.Body, content.ContentType
	}
	values := map[string]any{
		"id": [16]byte(t.ID), "claim": t.LastClaim, "run_at": nullTime(t.RunAt), "delay_seconds": seconds(t.Delay), "has_content": content != nil,
	}
	for _, c := range s.sql.changed {
		values[c.name] = c.value(&sent)
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	changed, err := s.manageOnce(ctx, s.sql.change.sql, s.sql.change.arguments(values)...)
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
	return pgx.CollectExactlyOneRow(rows, s.scanTask())
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
