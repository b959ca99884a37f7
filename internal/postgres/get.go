package postgres

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/melodia/orchestrator/internal/batch"
	"github.com/melodia/orchestrator/internal/task"
)

// One statement sees one snapshot: a task that ends meanwhile is in exactly
// one of the two tables.
const getSQL = `-- name: get tasks
SELECT ` + liveColumns + ` FROM tasks WHERE id = ANY ($1)
UNION ALL
SELECT ` + endedColumns + ` FROM task_history WHERE id = ANY ($1)`

// liveColumns and endedColumns are a task but for its body, for scanTask.
const (
	liveColumns = `id, claim, run_at, created_at, NULL::timestamptz AS finished_at, cancel_requested_at, state, '' AS reason,
    snooze_count, attempt_count, attempts, ` + shownColumns
	endedColumns = `id, claim, run_at, created_at, finished_at, NULL::timestamptz AS cancel_requested_at, state, reason,
    NULL::smallint AS snooze_count, attempt_count, attempts, ` + shownColumns
)

// shownColumns are specColumns with the body's size in place of the body, which
// may be of 1 MiB and is seldom asked for. The server knows the size without
// fetching what it keeps apart from the row.
const shownColumns = `expires_at, timeout_seconds, max_retry_duration_seconds, min_backoff_seconds, max_backoff_seconds,
    max_attempts, max_doublings, retry_client_errors, method, url, content_type, headers, labels, octet_length(body) AS body_bytes,
    callbacks, oidc_audience, created_by, idempotency_key, parent_id, root_id, hops, round`

// Get returns a task with its whole story and without its body, or
// [task.ErrNotFound]. As with Insert, [task.ErrOverloaded] comes at once when too
// many wait.
func (s *Store) Get(ctx context.Context, id task.ID) (*task.Task, error) {
	t, err := s.gets.Do(ctx, id)
	switch {
	case errors.Is(err, batch.ErrFull):
		return nil, fmt.Errorf("get task %s: %w: %w", id, task.ErrOverloaded, err)
	case err != nil:
		return nil, fmt.Errorf("get task %s: %w", id, classify(err))
	case t == nil:
		return nil, fmt.Errorf("get task %s: %w", id, task.ErrNotFound)
	}
	return t, nil
}

// get is the flush of Get: nil stands for a task that is not there.
func (s *Store) get(ctx context.Context, ids []task.ID) ([]*task.Task, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	rows, err := s.pool.Query(ctx, getSQL, uuids(ids))
	if err != nil {
		return nil, err
	}
	found, err := pgx.CollectRows(rows, scanTaskOnly)
	if err != nil {
		return nil, err
	}
	return inOrder(ids, found), nil
}

const getWithBodySQL = `-- name: get task with its body
SELECT ` + liveColumns + `, body FROM tasks WHERE id = $1
UNION ALL
SELECT ` + endedColumns + `, body FROM task_history WHERE id = $1`

// GetWithBody is Get of a task with its body. One such task is read at a time.
func (s *Store) GetWithBody(ctx context.Context, id task.ID) (*task.Task, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout) // waiting for its turn included
	defer cancel()
	t, err := s.getWithBody(ctx, id)
	if errors.Is(err, pgx.ErrNoRows) {
		err = task.ErrNotFound
	}
	if err != nil {
		return nil, fmt.Errorf("get task %s with its body: %w", id, classify(err))
	}
	return t, nil
}

func (s *Store) getWithBody(ctx context.Context, id task.ID) (*task.Task, error) {
	if err := s.managing.acquire(ctx); err != nil {
		return nil, err
	}
	defer s.managing.release()
	rows, err := s.pool.Query(ctx, getWithBodySQL, [16]byte(id))
	if err != nil {
		return nil, err
	}
	return pgx.CollectExactlyOneRow(rows, func(row pgx.CollectableRow) (*task.Task, error) {
		var body []byte
		t, err := scanTask(row, &body)
		if err == nil {
			t.Body = body
		}
		return t, err
	})
}

var getManySQL = `-- name: get many tasks
SELECT ` + listColumns + ` FROM (
SELECT ` + liveColumns + ` FROM tasks WHERE id = ANY ($1)
UNION ALL
SELECT ` + endedColumns + ` FROM task_history WHERE id = ANY ($1)
) found`

// GetMany returns some hundred tasks in the order of ids, as [Store.Find] does, or
// [task.ErrNotFound] where one of them is not there.
func (s *Store) GetMany(ctx context.Context, ids []task.ID) ([]*task.Task, error) {
	var found []*task.Task
	err := s.search(ctx, func(ctx context.Context, tx pgx.Tx) error {
		rows, err := tx.Query(ctx, getManySQL, uuids(ids))
		if err != nil {
			return err
		}
		found, err = pgx.CollectRows(rows, scanTaskOnly)
		return err
	})
	if err == nil && len(found) < len(ids) {
		err = task.ErrNotFound
	}
	if err != nil {
		return nil, fmt.Errorf("get %d tasks: %w", len(ids), err)
	}
	return inOrder(ids, found), nil
}

// inOrder sorts tasks by ids; nil stands for one that was not found.
func inOrder(ids []task.ID, found []*task.Task) []*task.Task {
	byID := make(map[task.ID]*task.Task, len(found))
	for _, t := range found {
		byID[t.ID] = t
	}
	tasks := make([]*task.Task, len(ids))
	for i, id := range ids {
		tasks[i] = byID[id]
	}
	return tasks
}

func scanTaskOnly(row pgx.CollectableRow) (*task.Task, error) { return scanTask(row) }

// scanTask reads one row of liveColumns or endedColumns, and more behind it. The
// task comes without its body.
func scanTask(row pgx.CollectableRow, more ...any) (*task.Task, error) {
	t := &task.Task{}
	var (
		spec                                 specRow
		finishedAt, cancelRequested          *time.Time
		headers, labels, attempts, callbacks []byte
		audience, creator, key               *string
		bodyBytes                            *int
		parent, root                         *[16]byte
		hops, round, snoozes                 *int
	)
	columns := []any{(*[16]byte)(&t.ID), &t.LastClaim, &t.RunAt, &t.CreatedAt, &finishedAt, &cancelRequested, &t.State, &t.Reason,
		&snoozes, &t.AttemptCount, &attempts, &spec.expiresAt, &spec.timeout, &spec.maxRetryDuration, &spec.minBackoff, &spec.maxBackoff,
		&t.Retry.MaxAttempts, &t.Retry.MaxDoublings, &t.Retry.RetryClientErrors, &t.Method, &t.URL, &t.ContentType,
		&headers, &labels, &bodyBytes, &callbacks, &audience, &creator, &key, &parent, &root, &hops, &round}
	if err := row.Scan(append(columns, more...)...); err != nil {
		return nil, err
	}
	spec.fill(&t.Spec)
	t.FinishedAt, t.CancelRequestedAt = zeroNull(finishedAt), zeroNull(cancelRequested)
	t.BodyBytes = zeroNull(bodyBytes)
	t.OIDCAudience, t.CreatedBy, t.IdempotencyKey = zeroNull(audience), zeroNull(creator), zeroNull(key)
	t.ParentID, t.RootID, t.Hops, t.Round, t.SnoozeCount = zeroNull(parent), zeroNull(root), zeroNull(hops), zeroNull(round), zeroNull(snoozes)
	var errHeaders, errLabels, errAttempts, errCallbacks error
	t.Headers, errHeaders = decodeMap(headers)
	t.Labels, errLabels = decodeMap(labels)
	t.Attempts, errAttempts = decodeAttempts(attempts)
	t.OnSuccess, t.OnFailure, errCallbacks = decodeCallbacks(callbacks)
	return t, errors.Join(errHeaders, errLabels, errAttempts, errCallbacks)
}
