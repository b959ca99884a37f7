package postgres

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/melodia/orchestrator/internal/batch"
	"github.com/melodia/orchestrator/internal/task"
)

// queueColumns are those of a [task.Queue], in the order of scanQueue.
const queueColumns = `name, version, paused_at, max_concurrent, max_per_second, burst,
    key_max_concurrent, key_max_per_second, key_burst, key_ordered, defaults`

// scanQueue reads queueColumns and whatever stands behind them.
func scanQueue(row pgx.CollectableRow, more ...any) (q task.Queue, err error) {
	var (
		paused   *time.Time
		all, key limitsRow
		defaults []byte
	)
	dests := append([]any{&q.Name, &q.Version, &paused}, all.dests()...)
	dests = append(append(dests, key.dests()...), &q.PerKey.Ordered, &defaults)
	if err := row.Scan(append(dests, more...)...); err != nil {
		return q, err
	}
	q.PausedAt, q.Limits, q.PerKey.Limits = zeroNull(paused), all.limits(), key.limits()
	q.Defaults, err = decodeQueueDefaults(defaults)
	return q, err
}

// limitsRow is limits as they are stored: NULL is none.
type limitsRow struct {
	maxConcurrent *int
	maxPerSecond  *float64
	burst         *int
}

func (r *limitsRow) dests() []any { return []any{&r.maxConcurrent, &r.maxPerSecond, &r.burst} }

func (r *limitsRow) limits() task.Limits {
	return task.Limits{MaxConcurrent: zeroNull(r.maxConcurrent), MaxPerSecond: zeroNull(r.maxPerSecond), Burst: zeroNull(r.burst)}
}

func limitArguments(l task.Limits) []any {
	return []any{null(l.MaxConcurrent), null(l.MaxPerSecond), null(l.Burst)}
}

// nextVersion is the version of settings that are written now and had one before: it
// differs from all that settings of the same name ever had.
const nextVersion = `(extract(epoch FROM now()) * 1000000)::bigint`

// A queue whose settings were never written has the version 0, with or without a row.
const putQueueSQL = `-- name: write the settings of a queue
INSERT INTO queues AS q (name, version, max_concurrent, max_per_second, burst, key_max_concurrent, key_max_per_second, key_burst, key_ordered, defaults)
SELECT $1, ` + nextVersion + `, $3::int, $4::float8, $5::int, $6::int, $7::float8, $8::int, $9::bool, $10::text::jsonb
WHERE $2::bigint = 0 OR EXISTS (SELECT FROM queues WHERE name = $1)
ON CONFLICT (name) DO UPDATE SET version = GREATEST(q.version + 1, excluded.version),
    max_concurrent = excluded.max_concurrent, max_per_second = excluded.max_per_second, burst = excluded.burst,
    key_max_concurrent = excluded.key_max_concurrent, key_max_per_second = excluded.key_max_per_second, key_burst = excluded.key_burst,
    key_ordered = excluded.key_ordered, defaults = excluded.defaults
WHERE q.version = $2
RETURNING ` + queueColumns

// PutQueue writes the settings of a queue, which need not exist, and returns it. q.Version
// is the version from which they were changed: PutQueue returns [task.ErrQueueChanged],
// and writes nothing, where the queue has another one by now. A pause stays as it is.
func (s *Store) PutQueue(ctx context.Context, q task.Queue) (task.Queue, error) {
	args := append([]any{q.Name, q.Version}, limitArguments(q.Limits)...)
	args = append(append(args, limitArguments(q.PerKey.Limits)...), q.PerKey.Ordered, encodeQueueDefaults(q.Defaults))
	return s.oneQueue(ctx, "write the settings of queue "+q.Name, task.ErrQueueChanged, putQueueSQL, args...)
}

const getQueueSQL = `-- name: get a queue
SELECT ` + queueColumns + ` FROM queues WHERE name = $1`

// Queue returns a queue, or [task.ErrQueueNotFound].
func (s *Store) Queue(ctx context.Context, name string) (task.Queue, error) {
	return s.oneQueue(ctx, "get queue "+name, task.ErrQueueNotFound, getQueueSQL, name)
}

const queuesSQL = `-- name: list queues
SELECT ` + queueColumns + ` FROM queues WHERE name COLLATE "C" > $1 ORDER BY name COLLATE "C" LIMIT $2`

// Queues returns up to limit queues, in the order of the bytes of their names, from behind
// a name on.
func (s *Store) Queues(ctx context.Context, behind string, limit int) ([]task.Queue, error) {
	var found []task.Queue
	err := s.search(ctx, func(ctx context.Context, tx pgx.Tx) error {
		rows, err := tx.Query(ctx, queuesSQL, behind, limit)
		if err != nil {
			return err
		}
		found, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (task.Queue, error) { return scanQueue(row) })
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list queues: %w", err)
	}
	return found, nil
}

// The lanes of a queue are those from "queue/" up to "queue0", since 0 is the byte behind /.
// Of its waiting tasks each step goes to the next lane, so that the tasks of a lane are not
// read but for the first ones; see lanesSQL.
var queueLoadsSQL = `-- name: what queues have to do
SELECT
    (SELECT count(*) FROM (SELECT FROM tasks t WHERE t.state = 'waiting' AND ` + inQueueLanes + ` UNION ALL SELECT FROM tasks t WHERE ` + runByRequest + ` LIMIT $2) c),
    (SELECT count(*) FROM (SELECT FROM tasks t WHERE ` + runningInQueue + ` LIMIT $2) c),
    w.keys, COALESCE(GREATEST(EXTRACT(EPOCH FROM now() - w.oldest), 0), 0)::float8
FROM (SELECT place, name || '/' AS first, name || '0' AS behind FROM unnest($1::text[]) WITH ORDINALITY n (name, place)) n,
LATERAL (
    WITH RECURSIVE lane AS (
        (SELECT t.lane AS name FROM tasks t WHERE t.state = 'waiting' AND ` + inQueueLanes + ` ORDER BY t.lane LIMIT 1)
        UNION ALL
        SELECT (SELECT t.lane FROM tasks t WHERE t.state = 'waiting' AND t.lane > lane.name AND t.lane < n.behind ORDER BY t.lane LIMIT 1)
        FROM lane WHERE lane.name IS NOT NULL
    ), busy AS MATERIALIZED (SELECT name FROM lane WHERE name IS NOT NULL LIMIT $2)
    SELECT
        (SELECT count(*) FROM (
            SELECT split_part(name, ' ', 1) AS key FROM busy
            UNION
            SELECT split_part(lane, ' ', 1) FROM (SELECT t.lane FROM tasks t WHERE ` + runningInQueue + ` LIMIT $2) r
            UNION
            SELECT lane FROM (SELECT t.lane FROM tasks t WHERE ` + runByRequest + ` LIMIT $2) r
            LIMIT $2) k WHERE key <> n.first) AS keys,
        LEAST((SELECT min(LEAST(` + firstOfLane(`= 1`) + `, ` + firstOfLane(`= 0`) + `, ` + firstOfLane(`= -1`) + `)) FROM busy),
            (SELECT min(run_at) FROM (SELECT t.run_at FROM tasks t WHERE ` + runByRequest + ` LIMIT $2) r)) AS oldest
) w
ORDER BY n.place`

const (
	inQueueLanes   = `t.lane >= n.first AND t.lane < n.behind`
	runningInQueue = `t.claimed_at IS NOT NULL AND t.lane IS NOT NULL AND ` + inQueueLanes
	// runByRequest is the tasks that MakeDue took out of their lanes for a call.
	runByRequest = `t.state = 'pending' AND t.claimed_at IS NULL AND t.lane IS NOT NULL AND ` + inQueueLanes
)

// firstOfLane is when the first waiting task of the lane name is due that has a priority.
func firstOfLane(priority string) string {
	return `(SELECT t.run_at FROM tasks t WHERE t.state = 'waiting' AND t.lane = name AND t.priority ` + priority + ` ORDER BY t.run_at, t.id LIMIT 1)`
}

// QueueLoads returns how much each of some queues has to do, in their order. It is
// bounded like Find.
func (s *Store) QueueLoads(ctx context.Context, names []string) ([]task.QueueLoad, error) {
	var loads []task.QueueLoad
	err := s.search(ctx, func(ctx context.Context, tx pgx.Tx) error {
		rows, err := tx.Query(ctx, queueLoadsSQL, names, task.MaxCounted)
		if err != nil {
			return err
		}
		loads, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (l task.QueueLoad, err error) {
			var overdue float64
			err = row.Scan(&l.Waiting, &l.Running, &l.Keys, &overdue)
			l.OldestDue = duration(overdue)
			return l, err
		})
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("ask what %d queues have to do: %w", len(names), err)
	}
	return loads, nil
}

// noTasks is that no task of the queue q waits or runs.
const noTasks = `NOT EXISTS (SELECT FROM tasks t WHERE t.state = 'waiting' AND t.lane >= q.name || '/' AND t.lane < q.name || '0')
    AND NOT EXISTS (SELECT FROM tasks t WHERE t.claimed_at IS NOT NULL AND t.lane IS NOT NULL AND t.lane >= q.name || '/' AND t.lane < q.name || '0')
    AND NOT EXISTS (SELECT FROM tasks t WHERE t.state = 'pending' AND t.claimed_at IS NULL AND t.lane IS NOT NULL AND t.lane >= q.name || '/' AND t.lane < q.name || '0')`

const deleteQueueSQL = `-- name: delete a queue
DELETE FROM queues q WHERE name = $1 AND version = $2 AND ` + noTasks

// DeleteQueue deletes the settings of a queue and of its flow keys, which were read in a
// version. It returns [task.ErrQueueInUse] where tasks of it are pending or running,
// [task.ErrQueueChanged] where it has another version by now, and [task.ErrQueueNotFound].
// A task that is submitted at the same moment is seen, or makes the queue anew.
func (s *Store) DeleteQueue(ctx context.Context, name string, version int64) error {
	if err := s.managing.acquire(ctx); err != nil {
		return fmt.Errorf("delete queue %s: %w", name, err)
	}
	deleted, err := s.deleteQueues(ctx, deleteQueueSQL, name, version)
	s.managing.release()
	if err != nil {
		return fmt.Errorf("delete queue %s: %w", name, err)
	}
	if deleted > 0 {
		return nil
	}
	switch q, err := s.Queue(ctx, name); {
	case err != nil:
		return err
	case q.Version != version:
		return fmt.Errorf("delete queue %s: %w", name, task.ErrQueueChanged)
	}
	return fmt.Errorf("delete queue %s: %w", name, task.ErrQueueInUse)
}

// deleteQueues runs a statement that deletes queues without tasks. Every statement that
// stores tasks of queues locks the table to name them (nameQueues), until it has committed: so
// none is under way meanwhile, and none that comes later takes the queue for one that exists.
// It waits for them for a moment, and they wait for it. All is sent at once, so that an
// instance which stalls in its midst holds no lock.
func (s *Store) deleteQueues(ctx context.Context, sql string, args ...any) (deleted int64, err error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	var all pgx.Batch
	all.Queue("BEGIN ISOLATION LEVEL READ COMMITTED")
	all.Queue("SET LOCAL lock_timeout = '1500ms'")
	all.Queue("LOCK TABLE queues IN SHARE ROW EXCLUSIVE MODE")
	all.Queue(sql, args...).Exec(func(tag pgconn.CommandTag) error {
		deleted = tag.RowsAffected()
		return nil
	})
	all.Queue("COMMIT")
	return deleted, classify(s.pool.SendBatch(ctx, &all).Close())
}

const (
	unusedQueuesSQL = `-- name: find queues that were only named
SELECT name FROM queues q WHERE ` + onlyNamed + ` AND ` + noTasks + ` AND NOT EXISTS (SELECT FROM task_history h WHERE h.queue = q.name)
ORDER BY name LIMIT 1000`

	sweepQueuesSQL = `-- name: sweep queues
DELETE FROM queues q WHERE name = ANY ($1) AND ` + onlyNamed + ` AND ` + noTasks

	// onlyNamed is a queue of which nothing is known but its name, and not since just now.
	onlyNamed = `version = 0 AND paused_at IS NULL AND created_at < now() - interval '1 hour' AND NOT EXISTS (SELECT FROM queue_keys k WHERE k.queue = q.name)`

	// queuesAtOnce is how many queues one statement sweeps, while new tasks of queues wait.
	queuesAtOnce = 100
)

// sweepQueues deletes up to 1,000 queues that tasks named and that have no settings, once the
// last of their tasks has gone from the history.
func (s *Store) sweepQueues(ctx context.Context) error {
	reading, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	rows, err := s.pool.Query(reading, unusedQueuesSQL)
	if err != nil {
		return fmt.Errorf("sweep the queues: %w", classify(err))
	}
	names, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return fmt.Errorf("sweep the queues: %w", classify(err))
	}
	for some := range slices.Chunk(names, queuesAtOnce) {
		if _, err := s.deleteQueues(ctx, sweepQueuesSQL, some); err != nil {
			return fmt.Errorf("sweep %d queues: %w", len(some), err)
		}
	}
	return nil
}

const pauseQueueSQL = `-- name: pause or resume a queue
UPDATE queues SET paused_at = CASE WHEN $2 THEN COALESCE(paused_at, now()) END WHERE name = $1
RETURNING ` + queueColumns

// PauseQueue pauses a queue, or resumes it, and returns it, or [task.ErrQueueNotFound].
// What is so already stays so. Running calls go on.
func (s *Store) PauseQueue(ctx context.Context, name string, paused bool) (task.Queue, error) {
	return s.oneQueue(ctx, "pause or resume queue "+name, task.ErrQueueNotFound, pauseQueueSQL, name, paused)
}

// oneQueue runs a statement that returns a queue; the error is none where it returns no row.
func (s *Store) oneQueue(ctx context.Context, what string, none error, sql string, args ...any) (task.Queue, error) {
	q, err := managed(ctx, s, sql, func(row pgx.CollectableRow) (task.Queue, error) { return scanQueue(row) }, args...)
	if errors.Is(err, pgx.ErrNoRows) {
		err = none
	}
	if err != nil {
		return task.Queue{}, fmt.Errorf("%s: %w", what, err)
	}
	return q, nil
}

// managed runs a statement that returns one row by request; one such statement at a time.
func managed[T any](ctx context.Context, s *Store, sql string, scan pgx.RowToFunc[T], args ...any) (v T, err error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if err := s.managing.acquire(ctx); err != nil {
		return v, err
	}
	defer s.managing.release()
	rows, err := s.pool.Query(ctx, sql, args...)
	if err != nil {
		return v, classify(err)
	}
	v, err = pgx.CollectExactlyOneRow(rows, scan)
	if errors.Is(err, pgx.ErrNoRows) {
		return v, err
	}
	return v, classify(err)
}

// nameQueues makes rows for queues that have none: a queue exists from the first task that
// names it. Where all have one nothing is written. named is a list FROM that has their
// names, or NULL, as n.name.
func nameQueues(named string) string {
	return `INSERT INTO queues (name)
    SELECT DISTINCT n.name FROM ` + named + ` WHERE n.name IS NOT NULL AND NOT EXISTS (SELECT FROM queues q WHERE q.name = n.name)
    ORDER BY n.name
    ON CONFLICT DO NOTHING`
}

const queueDefaultsSQL = `-- name: defaults of queues
SELECT name, defaults FROM queues WHERE name = ANY ($1) AND defaults IS NOT NULL`

// QueueDefaults returns the defaults of a queue, for a task that names it: none where the
// queue does not exist.
func (s *Store) QueueDefaults(ctx context.Context, name string) (task.QueueDefaults, error) {
	d, err := s.queueDefaults.Do(ctx, name)
	if err != nil {
		if errors.Is(err, batch.ErrFull) {
			err = fmt.Errorf("%w: %w", task.ErrOverloaded, err)
		}
		return task.QueueDefaults{}, fmt.Errorf("get the defaults of queue %s: %w", name, classify(err))
	}
	return d, nil
}

// getQueueDefaults is the flush of QueueDefaults.
func (s *Store) getQueueDefaults(ctx context.Context, names []string) ([]task.QueueDefaults, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	rows, err := s.pool.Query(ctx, queueDefaultsSQL, names)
	if err != nil {
		return nil, err
	}
	found := make(map[string]task.QueueDefaults)
	var name string
	var raw []byte
	if _, err := pgx.ForEachRow(rows, []any{&name, &raw}, func() (err error) {
		found[name], err = decodeQueueDefaults(raw)
		return err
	}); err != nil {
		return nil, err
	}
	out := make([]task.QueueDefaults, len(names))
	for i, name := range names {
		out[i] = found[name]
	}
	return out, nil
}

// queueDefaultsRow is the defaults column.
type queueDefaultsRow struct {
	TimeoutSeconds *float64  `json:"timeout_seconds,omitempty"`
	Retry          *retryRow `json:"retry,omitempty"`
}

type retryRow struct {
	MaxAttempts             *int     `json:"max_attempts,omitempty"`
	MaxRetryDurationSeconds *float64 `json:"max_retry_duration_seconds,omitempty"`
	MinBackoffSeconds       *float64 `json:"min_backoff_seconds,omitempty"`
	MaxBackoffSeconds       *float64 `json:"max_backoff_seconds,omitempty"`
	MaxDoublings            *int     `json:"max_doublings,omitempty"`
	RetryClientErrors       *bool    `json:"retry_client_errors,omitempty"`
}

func encodeQueueDefaults(d task.QueueDefaults) *string {
	if d.IsZero() {
		return nil
	}
	row := queueDefaultsRow{TimeoutSeconds: mapped(d.Timeout, seconds)}
	if r := d.Retry; r != (task.RetryChange{}) {
		row.Retry = &retryRow{
			r.MaxAttempts, mapped(r.MaxRetryDuration, seconds), mapped(r.MinBackoff, seconds), mapped(r.MaxBackoff, seconds), r.MaxDoublings, r.RetryClientErrors,
		}
	}
	b, err := json.Marshal(row)
	if err != nil {
		panic(err) // finite numbers always encode
	}
	text := string(b)
	return &text
}

func decodeQueueDefaults(b []byte) (d task.QueueDefaults, err error) {
	if b == nil {
		return d, nil
	}
	var row queueDefaultsRow
	if err := json.Unmarshal(b, &row); err != nil {
		return d, err
	}
	d.Timeout = mapped(row.TimeoutSeconds, duration)
	if r := row.Retry; r != nil {
		d.Retry = task.RetryChange{
			MaxAttempts: r.MaxAttempts, MaxRetryDuration: mapped(r.MaxRetryDurationSeconds, duration), MinBackoff: mapped(r.MinBackoffSeconds, duration),
			MaxBackoff: mapped(r.MaxBackoffSeconds, duration), MaxDoublings: r.MaxDoublings, RetryClientErrors: r.RetryClientErrors,
		}
	}
	return d, nil
}

// mapped is f of what p points to; nil stays nil.
func mapped[A, B any](p *A, f func(A) B) *B {
	if p == nil {
		return nil
	}
	v := f(*p)
	return &v
}
