package postgres

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/melodia/orchestrator/internal/task"
)

// Result is what becomes of a claimed task.
type Result struct {
	ID task.ID
	// Claim is the number of the claim under which the decision was made.
	Claim    int64
	Decision task.Decision
}

// Finish writes the decision made under claim. It is fenced: it reports false,
// and changes nothing, when the claim is not the task's latest or the task is
// not running any more. Unless the error wraps [task.ErrUnavailable] the
// database refuses this very result, and will again.
func (s *Store) Finish(ctx context.Context, claim *task.Claim, d task.Decision) (matched bool, err error) {
	matched, err = s.finishes.Do(ctx, Result{ID: claim.Task.ID, Claim: claim.Number, Decision: d})
	if err != nil && !isRowError(err) && !errors.Is(err, task.ErrUnavailable) {
		// A right that was revoked, a table that is being restored: whatever it is,
		// it is not this result's fault and may pass.
		err = fmt.Errorf("%w: %w", task.ErrUnavailable, err)
	}
	if err != nil {
		return false, fmt.Errorf("finish task %s: %w", claim.Task.ID, err)
	}
	return matched, nil
}

// The rows are looked up one by one in the order of their ids, in which they
// are also locked, so that two batches do not wait for each other as a rule; if
// they do, the server ends one of them and it is tried again. The fence is
// tested where a row is locked: a claim that was overtaken meanwhile matches
// nothing. The state is not compared with 'running', which would tempt the
// planner to search the index of all running tasks.
const finishSQL = `-- name: finish tasks
WITH result AS MATERIALIZED (
    SELECT * FROM unnest($1::uuid[], $2::bigint[], $3::text[], $4::text[], $5::float8[], $6::text[], $7::int[])
        AS r (id, claim, state, reason, wait_seconds, attempts, counted)
    ORDER BY id
), again AS (
    UPDATE tasks t SET state = 'pending', run_at = now() + make_interval(secs => r.wait_seconds),
        worker_id = NULL, claimed_at = NULL,
        attempts = t.attempts || r.attempts::jsonb, attempt_count = t.attempt_count + r.counted
    FROM result r WHERE t.id = r.id AND t.claim = r.claim AND t.state <> 'pending' AND r.state = 'pending'
        AND t.cancel_requested_at IS NULL
    RETURNING t.id, t.claim
), ended AS (
    DELETE FROM tasks t USING result r
    WHERE t.id = r.id AND t.claim = r.claim AND t.state <> 'pending' AND r.state NOT IN ('pending', 'cancelled')
    RETURNING t.id, t.claim, t.run_at, t.created_at, r.state, r.reason, t.attempt_count + r.counted AS attempt_count,
        t.attempts || r.attempts::jsonb AS attempts, ` + specColumns + `
), moved AS (
    INSERT INTO task_history (finished_at, id, claim, run_at, created_at, state, reason, attempt_count, attempts, ` + specColumns + `)
    SELECT now(), * FROM ended
)
SELECT id, claim FROM again UNION ALL SELECT id, claim FROM ended`

// Its parameters are those of finishSQL. It ends what is not to be tried again
// because somebody wants it to be cancelled: the decision says so, or was made
// before that was known.
const finishCancelledSQL = `-- name: finish cancelled tasks
WITH result AS MATERIALIZED (
    SELECT * FROM unnest($1::uuid[], $2::bigint[], $3::text[], $4::text[], $5::float8[], $6::text[], $7::int[])
        AS r (id, claim, state, reason, wait_seconds, attempts, counted)
    WHERE state IN ('pending', 'cancelled')
    ORDER BY id
), gone AS (
    DELETE FROM tasks t USING result r
    WHERE t.id = r.id AND t.claim = r.claim AND t.state <> 'pending'
        AND (r.state = 'cancelled' OR t.cancel_requested_at IS NOT NULL)
    RETURNING t.id, t.claim, t.run_at, t.created_at, t.attempt_count + r.counted AS attempt_count,
        t.attempts || r.attempts::jsonb AS attempts, ` + specColumns + `
), ` + historyOfGone + `
SELECT id, claim FROM gone`

// finish is the flush of Finish.
func (s *Store) finish(ctx context.Context, results []Result) ([]bool, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	matched, err := s.write(ctx, finishSQL, results)
	if err != nil {
		return nil, err
	}
	// What was to be tried again and matched nothing may have been cancelled
	// meanwhile: the statement did not see that, or only when it came to the row.
	var again []Result
	var at []int
	for i, r := range results {
		if !matched[i] && (r.Decision.State == task.Pending || r.Decision.State == task.Cancelled) {
			again, at = append(again, r), append(at, i)
		}
	}
	if len(again) == 0 {
		return matched, nil
	}
	cancelled, err := s.write(ctx, finishCancelledSQL, again)
	if err != nil {
		return nil, err
	}
	for i, ok := range cancelled {
		matched[at[i]] = ok
	}
	return matched, nil
}

// write writes results with one of the two statements.
func (s *Store) write(ctx context.Context, sql string, results []Result) ([]bool, error) {
	n := len(results)
	var (
		ids      = make([][16]byte, n)
		claims   = make([]int64, n)
		states   = make([]string, n)
		reasons  = make([]string, n)
		waits    = make([]float64, n)
		attempts = make([]string, n)
		counted  = make([]int32, n)
	)
	for i, r := range results {
		ids[i] = r.ID
		claims[i] = r.Claim
		states[i] = string(r.Decision.State)
		reasons[i] = string(r.Decision.Reason)
		waits[i] = seconds(r.Decision.Wait)
		attempts[i] = encodeAttempt(r.Decision.Attempt)
		if r.Decision.Counted {
			counted[i] = 1
		}
	}
	rows, err := s.pool.Query(ctx, sql, ids, claims, states, reasons, waits, attempts, counted)
	if err != nil {
		return nil, classify(err)
	}
	// A stale claim on a task may ride in the same batch as the current one.
	type key struct {
		id    [16]byte
		claim int64
	}
	written := make(map[key]bool, n)
	var k key
	if _, err := pgx.ForEachRow(rows, []any{&k.id, &k.claim}, func() error { written[k] = true; return nil }); err != nil {
		return nil, classify(err)
	}
	matched := make([]bool, n)
	for i := range ids {
		matched[i] = written[key{ids[i], claims[i]}]
	}
	return matched, nil
}

// attemptRow is an element of the attempts column.
type attemptRow struct {
	Number            int       `json:"number"`
	StartedAt         time.Time `json:"started_at"`
	DurationSeconds   float64   `json:"duration_seconds"`
	Outcome           task.Kind `json:"outcome"`
	StatusCode        int       `json:"status_code,omitempty"`
	Error             string    `json:"error,omitempty"`
	ResponseExcerpt   string    `json:"response_excerpt,omitempty"`
	RetryAfterSeconds float64   `json:"retry_after_seconds,omitempty"`
}

// encodeAttempt returns the array to append to the attempts column.
func encodeAttempt(a *task.Attempt) string {
	if a == nil {
		return "[]"
	}
	b, err := json.Marshal([]attemptRow{{
		Number:            a.Number,
		StartedAt:         a.StartedAt.UTC(),
		DurationSeconds:   seconds(a.Duration),
		Outcome:           a.Outcome,
		StatusCode:        a.StatusCode,
		Error:             a.Error,
		ResponseExcerpt:   a.ResponseExcerpt,
		RetryAfterSeconds: seconds(a.RetryAfter),
	}})
	if err != nil {
		panic(err) // numbers, strings and a time of this century always encode
	}
	return string(b)
}

func decodeAttempts(b []byte) ([]task.Attempt, error) {
	if len(b) <= len("[]") {
		return nil, nil
	}
	var rows []attemptRow
	if err := json.Unmarshal(b, &rows); err != nil {
		return nil, err
	}
	attempts := make([]task.Attempt, len(rows))
	for i, r := range rows {
		attempts[i] = task.Attempt{
			Number:          r.Number,
			StartedAt:       r.StartedAt,
			Duration:        duration(r.DurationSeconds),
			Outcome:         r.Outcome,
			StatusCode:      r.StatusCode,
			Error:           r.Error,
			ResponseExcerpt: r.ResponseExcerpt,
			RetryAfter:      duration(r.RetryAfterSeconds),
		}
	}
	return attempts, nil
}
