package postgres

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
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
// waits for nothing; then gets the result, in a goroutine that other results
// need too, so that it must not block. The write is fenced: matched is false, and
// nothing changes, when the claim is not the task's latest or the task is not
// running any more. Unless the error wraps [task.ErrUnavailable] the database
// refuses this very result, and will again.
//
// A decision by which the task stays running leaves it to its target, which has taken it.
//
// Where the task ends and has a callback for that end, the callback is stored in
// the same statement, as a task that is due now; calledBack reports that.
func (s *Store) Finish(claim *task.Claim, d task.Decision, then func(matched, calledBack bool, err error)) {
	id := claim.Task.ID
	batcher := s.finishes
	if d.State == task.Running {
		batcher = s.awaits
	}
	err := batcher.Start(Result{ID: id, Claim: claim.Number, Decision: d}, func(w written, err error) {
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
// planner to search the index of all running tasks: only these, and those that their targets
// have taken, have claimed_at.
func finishSQL(l columns) statement {
	var p parameters
	return p.statement(`-- name: finish tasks
WITH result AS MATERIALIZED (
    SELECT ` + resultColumns(&p) + ` ORDER BY id
), again AS (
    UPDATE tasks t SET state = ` + waitingState("COALESCE(r.host, t.lane)") + `, run_at = now() + make_interval(secs => r.wait_seconds),
        lane = CASE WHEN r.host IS NULL THEN t.lane ELSE ` + laneAt("t.lane", "r.host") + ` END, worker_id = NULL, claimed_at = NULL,
        first_claimed_at = CASE WHEN r.attempts <> '[]' OR ` + triedInRound + ` THEN t.first_claimed_at END,
        attempts = ` + keptAttempts + ` || r.attempts::jsonb, attempt_count = t.attempt_count + r.counted,
        snooze_count = CASE WHEN r.snoozed THEN COALESCE(t.snooze_count, 0) + 1 ELSE t.snooze_count END
    FROM result r WHERE t.id = r.id AND t.claim = r.claim AND t.claimed_at IS NOT NULL AND r.state = 'pending'
        AND t.cancel_requested_at IS NULL
    RETURNING t.id, t.claim
), ` + moveFinished(l, callbackOf+` IS NULL`) + `
SELECT id, claim FROM again UNION ALL SELECT id, claim FROM finished`)
}

// resultColumns is the results that a statement finishes, as write sends them.
func resultColumns(p *parameters) string {
	return `unnest(` + p.of("id") + `::uuid[]) AS id, unnest(` + p.of("claim") + `::bigint[]) AS claim,
        unnest(` + p.of("state") + `::text[]) AS state, unnest(` + p.of("reason") + `::text[]) AS reason,
        unnest(` + p.of("wait_seconds") + `::float8[]) AS wait_seconds, unnest(` + p.of("attempts") + `::text[]) AS attempts,
        unnest(` + p.of("counted") + `::int[]) AS counted, unnest(` + p.of("snoozed") + `::bool[]) AS snoozed,
        unnest(` + p.of("host") + `::text[]) AS host`
}

// callbackOf is t's callback for the end that r is.
const callbackOf = `t.callbacks -> CASE r.state WHEN 'succeeded' THEN 'on_success' ELSE 'on_failure' END`

// moveFinished moves the tasks that end with their results and for which a condition
// is true to the history.
func moveFinished(l columns, condition string) string {
	return `finished AS (
    DELETE FROM tasks t USING result r
    WHERE t.id = r.id AND t.claim = r.claim AND t.claimed_at IS NOT NULL AND r.state NOT IN ('pending', 'cancelled') AND ` + condition + `
    RETURNING ` + l.of(history).instead("t.", finishedAs("r.state", "r.reason")) + `
), moved AS (
    INSERT INTO task_history (` + l.of(history).names() + `)
    SELECT ` + l.of(history).names() + ` FROM finished
)`
}

// finishedAs is what the history gets of t and its result r in place of t's columns.
func finishedAs(state, reason string) map[string]string {
	return map[string]string{
		"finished_at": `now()`, "state": state, "reason": reason,
		"attempt_count": `t.attempt_count + r.counted`, "attempts": keptAttempts + ` || r.attempts::jsonb`,
	}
}

// Its first parameters are those of finishSQL. It ends the tasks that have a
// callback for that end, and stores the callbacks with their ids, timeout and retries.
func finishCallingBackSQL(l columns) statement {
	var p parameters
	callback := map[string]string{
		"id":           `r.callback_id`,
		"run_at":       `now()`,
		"created_at":   `now()`,
		"method":       `'POST'`,
		"url":          `c.callback ->> 'url'`,
		"content_type": `'application/json'`,
		"headers":      `COALESCE(c.callback -> 'headers', '{}')`,
		"labels":       `jsonb_build_object('callback_of', t.id)`,
		"body":         `convert_to(row_to_json(told)::text, 'UTF8')`,
		"parent_id":    `t.id`,
		"root_id":      `COALESCE(t.root_id, t.id)`,
		"hops":         `LEAST(COALESCE(t.hops, 0) + 1, ` + mostHops + `)`,
	}
	result := resultColumns(&p) + `, unnest(` + p.of("callback_id") + `::uuid[]) AS callback_id`
	for _, c := range l {
		switch {
		case c.use&useSetting != 0:
			callback[c.name] = c.stored(p.of(c.name) + "::" + c.sentType())
		case c.use&useInherit != 0:
			callback[c.name] = `t.` + c.name
		}
	}
	into := slices.DeleteFunc(l.of(live), func(c column) bool { return callback[c.name] == "" })
	return p.statement(`-- name: finish tasks and call back
WITH result AS MATERIALIZED (
    SELECT ` + result + ` ORDER BY id
), ` + moveFinished(l, callbackOf+` IS NOT NULL`) + `, called_back AS (
    INSERT INTO tasks (` + into.names() + `)
    SELECT ` + into.instead("t.", callback) + `
    FROM finished t JOIN result r ON r.id = t.id AND r.claim = t.claim,
        LATERAL (SELECT ` + callbackOf + ` AS callback, t.attempts -> -1 AS attempt) c,
        LATERAL (SELECT t.id, t.state, NULLIF(t.reason, '') AS reason, t.attempt_count,
            c.attempt -> 'status_code' AS last_status_code, c.attempt -> 'error' AS last_error,
            c.attempt -> 'response_excerpt' AS last_response_excerpt, convert_from(t.result, 'UTF8')::json AS result, t.labels,
            to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') AS finished_at) told
)
SELECT id, claim FROM finished`)
}

// Its parameters are those of finishSQL. It ends what is not to be tried again
// because its cancellation was requested: the decision says so, or was made before
// the request.
func finishCancelledSQL(l columns) statement {
	var p parameters
	return p.statement(`-- name: finish cancelled tasks
WITH result AS MATERIALIZED (
    SELECT * FROM (SELECT ` + resultColumns(&p) + `) r WHERE state IN ('pending', 'cancelled') ORDER BY id
), gone AS (
    DELETE FROM tasks t USING result r
    WHERE t.id = r.id AND t.claim = r.claim AND t.claimed_at IS NOT NULL
        AND (r.state = 'cancelled' OR t.cancel_requested_at IS NOT NULL)
    RETURNING ` + l.of(history).instead("t.", finishedAs(`'cancelled'`, `''`)) + `
), ` + historyOfGone(l) + `
SELECT id, claim FROM gone`)
}

// keptAttempts is t's story without what is dropped for one more attempt: of a task
// that is redriven again and again the last 200 are kept, so that it can be read and
// written in a moment.
const keptAttempts = `CASE WHEN jsonb_array_length(t.attempts) < 200 THEN t.attempts ELSE t.attempts - 0 END`

// triedInRound says whether t was tried since it was submitted or redriven. Where it was
// not, a claim that made no attempt does not begin the time for retries.
const triedInRound = `t.attempts <> '[]' AND COALESCE((t.attempts -> -1 ->> 'round')::int, 1) = COALESCE(t.round, 1)`

// mostHops is [task.MaxHops].
const mostHops = `32767`

// finish is the flush of Finish. Most results are for its first statement; what
// that does not match may be for another one.
func (s *Store) finish(ctx context.Context, results []Result) ([]written, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	matched, err := s.write(ctx, &s.sql.finish, results, nil)
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
		return s.write(ctx, &s.sql.finishCallingBack, some, s.callbackArguments(len(some)))
	})
	for _, w := range toldAt {
		w.calledBack = w.matched
	}
	writeRest(cancelled, cancelledAt, func(some []Result) ([]bool, error) { return s.write(ctx, &s.sql.finishCancelled, some, nil) })
	return out, nil
}

// writeRest writes results that another statement of their flush did not match. That
// statement is committed, so an error is kept from its results. writeRest halves the
// results until only those at fault have the error.
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

// callbackArguments are those that finishCallingBackSQL has of its own, with the
// ids of n callbacks.
func (s *Store) callbackArguments(n int) map[string]any {
	ids := make([][16]byte, n)
	for i := range ids {
		ids[i] = s.NewID()
	}
	values := map[string]any{"callback_id": ids}
	for _, c := range s.sql.settings {
		values[c.name] = c.value(&task.Task{Spec: s.callbacks})
	}
	return values
}

// write writes results with one of the statements, which may have more arguments,
// and returns which matched.
func (s *Store) write(ctx context.Context, statement *statement, results []Result, more map[string]any) ([]bool, error) {
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
		hosts    []*string
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
		setNullable(&hosts, i, n, null(r.Decision.Host))
	}
	values := map[string]any{
		"id": ids, "claim": claims, "state": states, "reason": reasons, "wait_seconds": waits, "attempts": attempts, "counted": counted, "snoozed": snoozed, "host": hosts,
	}
	maps.Copy(values, more)
	rows, err := s.pool.Query(ctx, statement.sql, statement.arguments(values)...)
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
	NotSent           bool      `json:"not_sent"`
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
	if a.NotSent {
		b = append(b, `,"not_sent":true`...)
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
			NotSent:         r.NotSent,
		}
	}
	task.NumberRounds(attempts)
	return attempts, nil
}
