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
SELECT id, state, '' AS reason, run_at, created_at, NULL::timestamptz AS finished_at, expires_at,
    timeout_seconds, max_retry_duration_seconds, min_backoff_seconds, max_backoff_seconds,
    max_attempts, max_doublings, retry_client_errors, attempt_count,
    method, url, content_type, headers, labels, attempts, body
FROM tasks WHERE id = ANY ($1)
UNION ALL
SELECT id, state, reason, run_at, created_at, finished_at, expires_at,
    timeout_seconds, max_retry_duration_seconds, min_backoff_seconds, max_backoff_seconds,
    max_attempts, max_doublings, retry_client_errors, attempt_count,
    method, url, content_type, headers, labels, attempts, body
FROM task_history WHERE id = ANY ($1)`

// Get returns a task with its whole story, or [task.ErrNotFound]. As with
// Insert, [task.ErrOverloaded] comes at once when too many wait.
func (s *Store) Get(ctx context.Context, id task.ID) (*task.Task, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout) // waiting for a batch included
	defer cancel()
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
	wanted := make([][16]byte, len(ids))
	for i, id := range ids {
		wanted[i] = id
	}
	rows, err := s.pool.Query(ctx, getSQL, wanted)
	if err != nil {
		return nil, err
	}
	found, err := pgx.CollectRows(rows, scanTask)
	if err != nil {
		return nil, err
	}
	byID := make(map[task.ID]*task.Task, len(found))
	for _, t := range found {
		byID[t.ID] = t
	}
	tasks := make([]*task.Task, len(ids))
	for i, id := range ids {
		tasks[i] = byID[id]
	}
	return tasks, nil
}

func scanTask(row pgx.CollectableRow) (*task.Task, error) {
	t := &task.Task{}
	var (
		spec                      specRow
		finishedAt                *time.Time
		headers, labels, attempts []byte
	)
	err := row.Scan((*[16]byte)(&t.ID), &t.State, &t.Reason, &t.RunAt, &t.CreatedAt, &finishedAt, &spec.expiresAt,
		&spec.timeout, &spec.maxRetryDuration, &spec.minBackoff, &spec.maxBackoff,
		&t.Retry.MaxAttempts, &t.Retry.MaxDoublings, &t.Retry.RetryClientErrors, &t.AttemptCount,
		&t.Method, &t.URL, &t.ContentType, &headers, &labels, &attempts, &t.Body)
	if err != nil {
		return nil, err
	}
	spec.fill(&t.Spec)
	if finishedAt != nil {
		t.FinishedAt = *finishedAt
	}
	var errHeaders, errLabels, errAttempts error
	t.Headers, errHeaders = decodeMap(headers)
	t.Labels, errLabels = decodeMap(labels)
	t.Attempts, errAttempts = decodeAttempts(attempts)
	return t, errors.Join(errHeaders, errLabels, errAttempts)
}
