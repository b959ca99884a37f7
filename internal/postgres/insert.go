package postgres

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/melodia/orchestrator/internal/batch"
	"github.com/melodia/orchestrator/internal/task"
)

// inserted is what the database's clock adds to a task.
type inserted struct {
	runAt, createdAt time.Time
}

// Insert stores a new task and sets its RunAt and CreatedAt. A RunAt in the
// past becomes now, so that nobody can jump the queue. When Insert returns nil
// the task is committed. After [task.ErrUnavailable], or when ctx ended, it may
// or may not be. [task.ErrOverloaded] comes at once and says that it is not:
// too many wait to be inserted.
func (s *Store) Insert(ctx context.Context, t *task.Task) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout) // waiting for a batch included
	defer cancel()
	in, err := s.inserts.Do(ctx, t)
	if errors.Is(err, batch.ErrFull) {
		return fmt.Errorf("insert task %s: %w: %w", t.ID, task.ErrOverloaded, err)
	}
	if err != nil {
		return fmt.Errorf("insert task %s: %w", t.ID, classify(err))
	}
	t.RunAt, t.CreatedAt = in.runAt, in.createdAt
	return nil
}

const insertSQL = `-- name: insert tasks
INSERT INTO tasks (
    id, run_at, created_at, expires_at, timeout_seconds, max_retry_duration_seconds,
    min_backoff_seconds, max_backoff_seconds, max_attempts, max_doublings, retry_client_errors,
    method, url, content_type, headers, labels, body)
SELECT id, GREATEST(COALESCE(run_at, now() + make_interval(secs => delay_seconds)), now()), now(),
    expires_at, timeout_seconds, max_retry_duration_seconds,
    min_backoff_seconds, max_backoff_seconds, max_attempts, max_doublings, retry_client_errors,
    method, url, content_type, headers::jsonb, labels::jsonb, body
FROM unnest($1::uuid[], $2::timestamptz[], $3::float8[], $4::timestamptz[], $5::float8[], $6::float8[],
    $7::float8[], $8::float8[], $9::int[], $10::int[], $11::bool[],
    $12::text[], $13::text[], $14::text[], $15::text[], $16::text[], $17::bytea[])
    AS t (id, run_at, delay_seconds, expires_at, timeout_seconds, max_retry_duration_seconds,
    min_backoff_seconds, max_backoff_seconds, max_attempts, max_doublings, retry_client_errors,
    method, url, content_type, headers, labels, body)
RETURNING id, run_at, created_at`

// insert is the flush of Insert.
func (s *Store) insert(ctx context.Context, tasks []*task.Task) (_ []inserted, err error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	defer func() { s.noteRoom(err) }()

	n := len(tasks)
	var (
		ids          = make([][16]byte, n)
		runAts       = make([]*time.Time, n)
		delays       = make([]float64, n)
		expiresAts   = make([]*time.Time, n)
		timeouts     = make([]float64, n)
		maxDurations = make([]float64, n)
		minBackoffs  = make([]float64, n)
		maxBackoffs  = make([]float64, n)
		maxAttempts  = make([]int32, n)
		maxDoublings = make([]int32, n)
		clientErrors = make([]bool, n)
		methods      = make([]string, n)
		urls         = make([]string, n)
		contentTypes = make([]string, n)
		headers      = make([]string, n)
		labels       = make([]string, n)
		bodies       = make([][]byte, n)
	)
	for i, t := range tasks {
		ids[i] = t.ID
		runAts[i] = nullTime(t.RunAt)
		delays[i] = seconds(t.Delay)
		expiresAts[i] = nullTime(t.ExpiresAt)
		timeouts[i] = seconds(t.Timeout)
		maxDurations[i] = seconds(t.Retry.MaxRetryDuration)
		minBackoffs[i] = seconds(t.Retry.MinBackoff)
		maxBackoffs[i] = seconds(t.Retry.MaxBackoff)
		maxAttempts[i] = int32(t.Retry.MaxAttempts)   //nolint:gosec // at most task.MaxAttemptsLimit
		maxDoublings[i] = int32(t.Retry.MaxDoublings) //nolint:gosec // at most task.MaxDoublingsLimit
		clientErrors[i] = t.Retry.RetryClientErrors
		methods[i] = t.Method
		urls[i] = t.URL
		contentTypes[i] = t.ContentType
		headers[i] = encodeMap(t.Headers)
		labels[i] = encodeMap(t.Labels)
		bodies[i] = t.Body
	}
	rows, err := s.pool.Query(ctx, insertSQL, ids, runAts, delays, expiresAts, timeouts, maxDurations,
		minBackoffs, maxBackoffs, maxAttempts, maxDoublings, clientErrors,
		methods, urls, contentTypes, headers, labels, bodies)
	if err != nil {
		return nil, classify(err)
	}
	// Rows come back in no promised order.
	index := make(map[[16]byte]int, n)
	for i, id := range ids {
		index[id] = i
	}
	out := make([]inserted, n)
	var id [16]byte
	var in inserted
	_, err = pgx.ForEachRow(rows, []any{&id, &in.runAt, &in.createdAt}, func() error {
		out[index[id]] = in
		return nil
	})
	if err != nil {
		return nil, classify(err)
	}
	return out, nil
}

// nullTime makes the zero time NULL.
func nullTime(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	return &t
}

func encodeMap(m map[string]string) string {
	if len(m) == 0 {
		return "{}"
	}
	b, err := json.Marshal(m)
	if err != nil {
		panic(err) // a map of strings always encodes
	}
	return string(b)
}

func decodeMap(b []byte) (map[string]string, error) {
	if len(b) <= len("{}") {
		return nil, nil
	}
	var m map[string]string
	err := json.Unmarshal(b, &m)
	return m, err
}
