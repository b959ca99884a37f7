package postgres

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/melodia/orchestrator/internal/task"
)

// awaiting is the state of a running task that its target has taken (see [task.Completion]).
// No worker has it, so that it outlives all of them; by its claimed_at its queue and key
// count it like any other running task.
const awaiting task.State = "awaiting"

// completionSQL are the statements about tasks that targets take.
type completionSQL struct {
	keepToken, await, awaited, tokens, overdue string
	withoutBody                                columns
}

func newCompletionSQL(l columns) completionSQL {
	var withoutBody columns
	for _, c := range l.with(useClaim) {
		if c.name != "body" {
			withoutBody = append(withoutBody, c)
		}
	}
	claimed := withoutBody.instead("t.", nil)
	return completionSQL{
		withoutBody: withoutBody,
		// Until it is kept, a claim has no token: that of the attempt before does not count. Of a task that is tried again and again the last 100 are kept.
		keepToken: `-- name: keep the hash of a token
UPDATE tasks SET completion_tokens = CASE WHEN length(completion_tokens) >= 3200 THEN substring(completion_tokens FROM 33) ELSE COALESCE(completion_tokens, '') END || $3,
    completion_until = NULL, completion_ends_at = NULL, completion_report = jsonb_build_object('claim', claim), result = NULL
WHERE id = $1 AND claim = $2 AND worker_id IS NOT NULL`,
		// The connection is free, so the task does not count for its host any more.
		await: `-- name: leave tasks to their targets
WITH result AS MATERIALIZED (SELECT unnest($1::uuid[]) AS id, unnest($2::bigint[]) AS claim ORDER BY id)
UPDATE tasks t SET state = 'awaiting', worker_id = NULL, lane = NULLIF(split_part(t.lane, ' ', 1), ''),
    completion_ends_at = now() + make_interval(secs => (t.completion ->> 'timeout_seconds')::float8),
    completion_until = now() + make_interval(secs => (t.completion ->> 'silence_seconds')::float8)
FROM result r
WHERE t.id = r.id AND t.claim = r.claim AND t.worker_id IS NOT NULL AND t.cancel_requested_at IS NULL AND t.completion IS NOT NULL
RETURNING t.id, t.claim`,
		awaited: `-- name: get a task that its target reports on
SELECT ` + claimed + `, COALESCE(t.claimed_at, now()), COALESCE(t.first_claimed_at, now()), t.lane,
    t.state = 'awaiting' OR t.claimed_at IS NOT NULL AND COALESCE((t.completion_report ->> 'claim')::bigint = t.claim, false), t.state = 'awaiting', t.completion_tokens, t.completion_until, t.completion_ends_at, now()
FROM tasks t WHERE t.id = $1`,
		tokens: `-- name: get the tokens of a task that has ended
SELECT completion_tokens FROM task_history WHERE id = $1`,
		overdue: `-- name: find tasks whose targets are silent
SELECT ` + claimed + `, t.claimed_at, COALESCE(t.first_claimed_at, t.claimed_at), t.lane,
    true, true, NULL::bytea, t.completion_until, t.completion_ends_at, now()
FROM tasks t
WHERE t.state = 'awaiting' AND t.completion_until <= now()
    AND (t.completion ->> 'listen_seconds')::float8 <= $1
ORDER BY t.completion_until LIMIT $2`,
	}
}

const reportSQL = `-- name: keep a report
UPDATE tasks t SET completion_report = COALESCE(t.completion_report, '{}') || $3::jsonb || jsonb_build_object('at', now()), result = COALESCE($4, t.result),
    claim = t.claim + (t.state = 'awaiting')::int,
    completion_until = CASE WHEN t.state = 'awaiting' THEN LEAST(t.completion_ends_at, now() + make_interval(secs => (t.completion ->> 'silence_seconds')::float8)) END
WHERE t.id = $1 AND t.claim = $2 AND t.claimed_at IS NOT NULL
RETURNING t.claim, t.completion_until`

// listenAgain is how long an instance must have heard at least before it takes a target for
// silent whose heartbeats have no interval.
const listenAgain = time.Minute

// completionRow is the column completion. What follows from the two settings stands beside
// them for statements that compare it.
type completionRow struct {
	TimeoutSeconds   float64 `json:"timeout_seconds"`
	HeartbeatSeconds float64 `json:"heartbeat_seconds,omitempty"`
	// SilenceSeconds is how long the target may report nothing, and ListenSeconds how long an
	// instance must have been able to hear it before it is taken for silent.
	SilenceSeconds float64 `json:"silence_seconds"`
	ListenSeconds  float64 `json:"listen_seconds"`
}

var completionField = nullable(func(t *task.Task) *string {
	c := t.Completion
	if c == nil {
		return nil
	}
	return encodeRow(completionRow{
		TimeoutSeconds: seconds(c.Timeout), HeartbeatSeconds: seconds(c.Heartbeat), SilenceSeconds: seconds(c.Silence()),
		ListenSeconds: seconds(cmp.Or(c.Heartbeat, listenAgain)),
	})
}, func(t *task.Task, b []byte) error {
	if b == nil {
		return nil
	}
	var row completionRow
	if err := json.Unmarshal(b, &row); err != nil {
		return err
	}
	t.Completion = &task.Completion{Timeout: duration(row.TimeoutSeconds), Heartbeat: duration(row.HeartbeatSeconds)}
	return nil
})

// reportRow is the column completion_report, which also has the claim under which the latest
// token was kept.
type reportRow struct {
	Progress *float64   `json:"progress,omitempty"`
	Note     string     `json:"note,omitempty"`
	At       *time.Time `json:"at,omitempty"`
}

var reportField = field{dest: scanInto(func(t *task.Task, b []byte) error {
	if b == nil {
		return nil
	}
	var row reportRow
	if err := json.Unmarshal(b, &row); err != nil {
		return err
	}
	if row.At == nil {
		return nil // no report came yet
	}
	t.Progress = &task.Progress{Part: row.Progress, Note: row.Note, At: zeroNull(row.At)}
	return nil
})}

var resultField = field{dest: scanInto(func(t *task.Task, b []byte) error {
	t.Result = b
	return nil
})}

func encodeRow(row any) *string {
	b, err := json.Marshal(row)
	if err != nil {
		panic(err) // texts and finite numbers always encode
	}
	text := string(b)
	return &text
}

// KeepToken stores the hash of the token of the attempt that is about to be made under claim,
// and forgets what was reported of the one before. It reports false where the claim is not
// the task's latest.
func (s *Store) KeepToken(ctx context.Context, claim *task.Claim, hash [32]byte) (matched bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	tag, err := s.pool.Exec(ctx, s.sql.completion.keepToken, [16]byte(claim.Task.ID), claim.Number, hash[:])
	if err != nil {
		return false, fmt.Errorf("keep the token of task %s: %w", claim.Task.ID, classify(err))
	}
	return tag.RowsAffected() > 0, nil
}

// await is the flush of Finish for decisions by which tasks stay running: their targets have
// taken them. Where the cancellation of a task was requested meanwhile, it ends.
func (s *Store) await(ctx context.Context, results []Result) ([]written, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	ids, claims := make([][16]byte, len(results)), make([]int64, len(results))
	for i, r := range results {
		ids[i], claims[i] = r.ID, r.Claim
	}
	rows, err := s.pool.Query(ctx, s.sql.completion.await, ids, claims)
	if err != nil {
		return nil, classify(err)
	}
	type key struct {
		id    [16]byte
		claim int64
	}
	left := make(map[key]bool, len(results))
	var k key
	if _, err := pgx.ForEachRow(rows, []any{&k.id, &k.claim}, func() error { left[k] = true; return nil }); err != nil {
		return nil, classify(err)
	}
	out := make([]written, len(results))
	var cancelled []Result
	var cancelledAt []*written
	for i, r := range results {
		if out[i].matched = left[key{r.ID, r.Claim}]; out[i].matched {
			continue
		}
		r.Decision.State = task.Pending // where it was not cancelled, this matches nothing
		cancelled, cancelledAt = append(cancelled, r), append(cancelledAt, &out[i])
	}
	writeRest(cancelled, cancelledAt, func(some []Result) ([]bool, error) { return s.write(ctx, &s.sql.finishCancelled, some, nil) })
	return out, nil
}

// Awaited returns a task on which its target reports, or [task.ErrNotFound]. The claim comes
// without the task's body.
func (s *Store) Awaited(ctx context.Context, id task.ID) (*task.Awaited, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout) // waiting for a slot included
	defer cancel()
	a, err := s.awaited(ctx, id)
	if errors.Is(err, pgx.ErrNoRows) {
		err = task.ErrNotFound
	}
	if err != nil {
		return nil, fmt.Errorf("get task %s for a report: %w", id, classify(err))
	}
	return a, nil
}

func (s *Store) awaited(ctx context.Context, id task.ID) (*task.Awaited, error) {
	if err := s.managing.acquire(ctx); err != nil {
		return nil, err
	}
	defer s.managing.release()
	rows, err := s.pool.Query(ctx, s.sql.completion.awaited, [16]byte(id))
	if err != nil {
		return nil, err
	}
	a, err := pgx.CollectExactlyOneRow(rows, s.scanAwaited())
	if !errors.Is(err, pgx.ErrNoRows) {
		return a, err
	}
	a = new(task.Awaited)
	return a, s.pool.QueryRow(ctx, s.sql.completion.tokens, [16]byte(id)).Scan(&a.Tokens)
}

func (s *Store) scanAwaited() pgx.RowToFunc[*task.Awaited] {
	return func(row pgx.CollectableRow) (*task.Awaited, error) {
		a := &task.Awaited{Claim: new(task.Claim)}
		var lane *string
		var isAwaiting bool
		var until, endsAt *time.Time
		t, err := s.sql.completion.withoutBody.reader(&a.Claim.At, &a.Claim.FirstAt, &lane, &a.Open, &isAwaiting, &a.Tokens, &until, &endsAt, &a.Now).read(row)
		if err != nil {
			return nil, err
		}
		t.State, t.Awaiting, t.CompletionUntil, t.CompletionEndsAt = task.Running, isAwaiting, zeroNull(until), zeroNull(endsAt)
		if lane != nil {
			setLane(t, *lane)
		}
		a.Claim.Task, a.Claim.Number = t, t.LastClaim
		return a, nil
	}
}

// Report stores what the target of a running task reports, under the claim as it was read.
// It sets the claim's number to what that is from then on, so that a reader of the task from
// before changes nothing any more, and returns by when the target must report again: zero
// while its call is still under way. Where the claim is not the latest the error is
// [task.ErrChanged].
func (s *Store) Report(ctx context.Context, claim *task.Claim, r *task.Report) (until time.Time, err error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout) // waiting for a slot included
	defer cancel()
	fail := func(err error) (time.Time, error) {
		return time.Time{}, fmt.Errorf("keep a report of task %s: %w", claim.Task.ID, err)
	}
	if err := s.managing.acquire(ctx); err != nil {
		return fail(classify(err))
	}
	defer s.managing.release()
	var next *time.Time
	err = s.pool.QueryRow(ctx, reportSQL, [16]byte(claim.Task.ID), claim.Number, encodeRow(reportRow{Progress: r.Progress, Note: r.Note}), r.Result).Scan(&claim.Number, &next)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return fail(task.ErrChanged)
	case err != nil:
		return fail(classify(err))
	}
	return zeroNull(next), nil
}

// Overdue returns up to limit tasks whose targets have reported nothing for too long, where
// an instance that has been listening for so long could have heard them, and the moment.
// After an outage of the service each target has the time of one heartbeat to say that it is there.
func (s *Store) Overdue(ctx context.Context, listening time.Duration, limit int) (overdue []*task.Awaited, now time.Time, err error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	rows, err := s.pool.Query(ctx, s.sql.completion.overdue, seconds(listening), limit)
	if err == nil {
		overdue, err = pgx.CollectRows(rows, s.scanAwaited())
	}
	switch {
	case err != nil:
	case len(overdue) > 0:
		now = overdue[0].Now
	default:
		err = s.pool.QueryRow(ctx, nowSQL).Scan(&now)
	}
	if err != nil {
		return nil, now, fmt.Errorf("find tasks whose targets are silent: %w", classify(err))
	}
	return overdue, now, nil
}
