package postgres

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
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

// written is what a statement did with a Result.
type written struct {
	matched bool
	// calledBack: the end of the task stored another one, which tells it.
	calledBack bool
	// err is why this one was not written, while others of the flush were.
	err error
}

// Finish has the decision made under claim written, together with others, and
// waits for nothing; then is told what came of it, in a goroutine that others
// need too, so that it must not block. The write is fenced: matched is false, and
// nothing changes, when the claim is not the task's latest or the task is not
// running any more. Unless the error wraps [task.ErrUnavailable] the database
// refuses this very result, and will again.
//
// Where the task ends and has a callback for that end, the callback is stored in
// the same statement, as a task that is due now; calledBack reports that.
func (s *Store) Finish(claim *task.Claim, d task.Decision, then func(matched, calledBack bool, err error)) {
	id := claim.Task.ID
	err := s.finishes.Start(Result{ID: id, Claim: claim.Number, Decision: d}, func(w written, err error) {
		if err = cmp.Or(err, w.err); err != nil {
			then(false, false, finishError(id, err))
			return
		}
		then(w.matched, w.calledBack, nil)
	})
	if err != nil {
		then(false, false, finishError(id, err))
	}
}

func finishError(id task.ID, err error) error {
	if !isRowError(err) && !errors.Is(err, task.ErrUnavailable) {
		// A right that was revoked, a table that is being restored: whatever it is,
		// it is not this result's fault and may pass.
		err = fmt.Errorf("%w: %w", task.ErrUnavailable, err)
	}
	return fmt.Errorf("finish task %s: %w", id, err)
}

// The rows are looked up one by one in the order of their ids, in which they
// are also locked, so that two batches do not wait for each other as a rule; if
// they do, the server ends one of them and it is tried again. The fence is
// tested where a row is locked: a claim that was overtaken meanwhile matches
// nothing. The state is not compared with 'running', which would tempt the
// planner to search the index of all running tasks.
const (
	finishSQL = `-- name: finish tasks
WITH result AS MATERIALIZED (
    SELECT ` + resultColumns + ` ORDER BY id
), again AS (
    UPDATE tasks t SET state = 'pending', run_at = now() + make_interval(secs => r.wait_seconds),
        worker_id = NULL, claimed_at = NULL,
        attempts = ` + keptAttempts + ` || r.attempts::jsonb, attempt_count = t.attempt_count + r.counted,
        snooze_count = CASE WHEN r.snoozed THEN COALESCE(t.snooze_count, 0) + 1 ELSE t.snooze_count END
    FROM result r WHERE t.id = r.id AND t.claim = r.claim AND t.state <> 'pending' AND r.state = 'pending'
        AND t.cancel_requested_at IS NULL
    RETURNING t.id, t.claim
), ended AS (
    ` + deleteEnded + ` AND ` + callbackOf + ` IS NULL
    ` + returningEnded + `
), ` + historyOfEnded + `
SELECT id, claim FROM again UNION ALL SELECT id, claim FROM ended`

	resultColumns = `unnest($1::uuid[]) AS id, unnest($2::bigint[]) AS claim, unnest($3::text[]) AS state, unnest($4::text[]) AS reason,
        unnest($5::float8[]) AS wait_seconds, unnest($6::text[]) AS attempts, unnest($7::int[]) AS counted,
        unnest($8::bool[]) AS snoozed`

	deleteEnded = `DELETE FROM tasks t USING result r
    WHERE t.id = r.id AND t.claim = r.claim AND t.state <> 'pending' AND r.state NOT IN ('pending', 'cancelled')`

	// callbackOf is t's callback for the end that r is.
	callbackOf = `t.callbacks -> CASE r.state WHEN 'succeeded' THEN 'on_success' ELSE 'on_failure' END`

	returningEnded = `RETURNING t.id, t.claim, t.run_at, t.created_at, r.state, r.reason, t.attempt_count + r.counted AS attempt_count,
        ` + keptAttempts + ` || r.attempts::jsonb AS attempts, ` + specColumns

	historyOfEnded = `moved AS (
    INSERT INTO task_history (finished_at, id, claim, run_at, created_at, state, reason, attempt_count, attempts, ` + specColumns + `)
    SELECT now(), * FROM ended
)`
)

// Its first parameters are those of finishSQL. It ends the tasks that have a
// callback for that end, and stores the callbacks: what $9 names, with the
// timeout and retries that follow.
const finishCallingBackSQL = `-- name: finish tasks and call back
WITH result AS MATERIALIZED (
    SELECT ` + resultColumns + `, unnest($9::uuid[]) AS callback_id ORDER BY id
), ended AS (
    ` + deleteEnded + ` AND ` + callbackOf + ` IS NOT NULL
    ` + returningEnded + `
), ` + historyOfEnded + `, called_back AS (
    INSERT INTO tasks (id, run_at, created_at, timeout_seconds, max_retry_duration_seconds, min_backoff_seconds, max_backoff_seconds,
        max_attempts, max_doublings, retry_client_errors, method, url, content_type, headers, labels, body, created_by,
        parent_id, root_id, hops)
    SELECT r.callback_id, now(), now(), $10, $11, $12, $13, $14, $15, $16, 'POST', c.callback ->> 'url', 'application/json',
        COALESCE(c.callback -> 'headers', '{}'), jsonb_build_object('callback_of', t.id), convert_to(row_to_json(told)::text, 'UTF8'), t.created_by,
        t.id, COALESCE(t.root_id, t.id), LEAST(COALESCE(t.hops, 0) + 1, ` + mostHops + `)
    FROM ended t JOIN result r ON r.id = t.id AND r.claim = t.claim,
        LATERAL (SELECT ` + callbackOf + ` AS callback, t.attempts -> -1 AS attempt) c,
        LATERAL (SELECT t.id, t.state, NULLIF(t.reason, '') AS reason, t.attempt_count,
            c.attempt -> 'status_code' AS last_status_code, c.attempt -> 'error' AS last_error,
            c.attempt -> 'response_excerpt' AS last_response_excerpt, t.labels,
            to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') AS finished_at) told
)
SELECT id, claim FROM ended`

// Its parameters are those of finishSQL. It ends what is not to be tried again
// because somebody wants it to be cancelled: the decision says so, or was made
// before that was known.
const finishCancelledSQL = `-- name: finish cancelled tasks
WITH result AS MATERIALIZED (
    SELECT * FROM (SELECT ` + resultColumns + `) r WHERE state IN ('pending', 'cancelled') ORDER BY id
), gone AS (
    DELETE FROM tasks t USING result r
    WHERE t.id = r.id AND t.claim = r.claim AND t.state <> 'pending'
        AND (r.state = 'cancelled' OR t.cancel_requested_at IS NOT NULL)
    RETURNING t.id, t.claim, t.run_at, t.created_at, t.attempt_count + r.counted AS attempt_count,
        ` + keptAttempts + ` || r.attempts::jsonb AS attempts, ` + specColumns + `
), ` + historyOfGone + `
SELECT id, claim FROM gone`

// keptAttempts is t's story without what is dropped for one more attempt: of a task
// that is redriven again and again the last 200 are kept, so that it can be read and
// written in a moment.
const keptAttempts = `CASE WHEN jsonb_array_length(t.attempts) < 200 THEN t.attempts ELSE t.attempts - 0 END`

// mostHops is [task.MaxHops].
const mostHops = `32767`

// finish is the flush of Finish. Most results are for its first statement; what
// that does not match may be for another one.
func (s *Store) finish(ctx context.Context, results []Result) ([]written, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	matched, err := s.write(ctx, finishSQL, results)
	if err != nil {
		return nil, err
	}
	out := make([]written, len(results))
	// Its end is to be told, or it was to be tried again and was cancelled meanwhile,
	// which this statement did not see, or only when it came to the row.
	var told, cancelled []Result
	var toldAt, cancelledAt []*written
	for i, r := range results {
		switch out[i].matched = matched[i]; {
		case matched[i]:
		case r.Decision.State == task.Pending || r.Decision.State == task.Cancelled:
			cancelled, cancelledAt = append(cancelled, r), append(cancelledAt, &out[i])
		default:
			told, toldAt = append(told, r), append(toldAt, &out[i])
		}
	}
	writeRest(told, toldAt, func(some []Result) ([]bool, error) {
		return s.write(ctx, finishCallingBackSQL, some, s.callbackParameters(len(some))...)
	})
	for _, w := range toldAt {
		w.calledBack = w.matched
	}
	writeRest(cancelled, cancelledAt, func(some []Result) ([]bool, error) { return s.write(ctx, finishCancelledSQL, some) })
	return out, nil
}

// writeRest writes results after others of their flush were written, so that an
// error is theirs alone: of those, in the end, that bring it about.
func writeRest(results []Result, out []*written, write func([]Result) ([]bool, error)) {
	if len(results) == 0 {
		return
	}
	matched, err := write(results)
	if half := len(results) / 2; half > 0 && isRowError(err) {
		writeRest(results[:half], out[:half], write)
		writeRest(results[half:], out[half:], write)
		return
	}
	for i := range results {
		if out[i].err = err; err == nil {
			out[i].matched = matched[i]
		}
	}
}

// callbackParameters are those that finishCallingBackSQL has of its own, with
// the ids of n callbacks.
func (s *Store) callbackParameters(n int) []any {
	ids := make([][16]byte, n)
	for i := range ids {
		ids[i] = s.NewID()
	}
	retry := s.callbacks.Retry
	return []any{ids, seconds(s.callbacks.Timeout), seconds(retry.MaxRetryDuration), seconds(retry.MinBackoff), seconds(retry.MaxBackoff),
		retry.MaxAttempts, retry.MaxDoublings, retry.RetryClientErrors}
}

// write writes results with one of the statements, and returns which matched.
func (s *Store) write(ctx context.Context, sql string, results []Result, more ...any) ([]bool, error) {
	n := len(results)
	var (
		ids      = make([][16]byte, n)
		claims   = make([]int64, n)
		states   = make([]string, n)
		reasons  = make([]string, n)
		waits    = make([]float64, n)
		attempts = make([]string, n)
		counted  = make([]int32, n)
		snoozed  []*bool
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
		if a := r.Decision.Attempt; a != nil && a.Outcome == task.OutcomeSnoozed {
			setNullable(&snoozed, i, n, null(true))
		}
	}
	rows, err := s.pool.Query(ctx, sql, append([]any{ids, claims, states, reasons, waits, attempts, counted, snoozed}, more...)...)
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

// attemptRow is an element of the attempts column, as encodeAttempt writes it.
type attemptRow struct {
	Round             int       `json:"round"`
	Number            int       `json:"number"`
	StartedAt         time.Time `json:"started_at"`
	DurationSeconds   float64   `json:"duration_seconds"`
	Outcome           task.Kind `json:"outcome"`
	StatusCode        int       `json:"status_code"`
	Error             string    `json:"error"`
	ResponseExcerpt   string    `json:"response_excerpt"`
	RetryAfterSeconds float64   `json:"retry_after_seconds"`
}

// encodeAttempt returns the array to append to the attempts column. It is asked
// for each attempt, so it leaves only texts to package json. The first round is not
// named, as it was not when there was no other.
func encodeAttempt(a *task.Attempt) string {
	if a == nil {
		return "[]"
	}
	b := make([]byte, 0, 160)
	b = append(b, `[{"number":`...)
	b = strconv.AppendInt(b, int64(a.Number), 10)
	b = a.StartedAt.UTC().AppendFormat(append(b, `,"started_at":"`...), time.RFC3339Nano)
	b = appendSeconds(append(b, `","duration_seconds":`...), a.Duration)
	b = append(append(b, `,"outcome":"`...), a.Outcome...)
	b = append(b, '"')
	if a.Round > 1 {
		b = strconv.AppendInt(append(b, `,"round":`...), int64(a.Round), 10)
	}
	if a.StatusCode != 0 {
		b = strconv.AppendInt(append(b, `,"status_code":`...), int64(a.StatusCode), 10)
	}
	if a.Error != "" {
		b = appendJSON(append(b, `,"error":`...), a.Error)
	}
	if a.ResponseExcerpt != "" {
		b = appendJSON(append(b, `,"response_excerpt":`...), a.ResponseExcerpt)
	}
	if a.RetryAfter != 0 {
		b = appendSeconds(append(b, `,"retry_after_seconds":`...), a.RetryAfter)
	}
	b = append(b, "}]"...)
	return string(b)
}

func appendSeconds(b []byte, d time.Duration) []byte {
	return strconv.AppendFloat(b, seconds(d), 'f', -1, 64)
}

func appendJSON(b []byte, s string) []byte {
	encoded, err := json.Marshal(s)
	if err != nil {
		panic(err) // a string always encodes
	}
	return append(b, encoded...)
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
			Round:           r.Round,
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
	task.NumberRounds(attempts)
	return attempts, nil
}
