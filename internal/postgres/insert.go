package postgres

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/melodia/orchestrator/internal/batch"
	"github.com/melodia/orchestrator/internal/task"
)

// newTask is a task on its way in. Unless worker is zero it is that worker's to
// carry out at once.
type newTask struct {
	*task.Task
	worker task.ID
}

// inserted is what the database adds to a task: the moments by its clock, the
// number of the claim, 0 where nobody has it, and the root of its chain.
type inserted struct {
	runAt, createdAt time.Time
	claim            int64
	root             task.ID
	// err is why this one was not stored, because of its idempotency key.
	err error
}

// Insert stores a new task and sets its RunAt and CreatedAt. A RunAt in the
// past becomes now, so that nobody can jump the queue. When Insert returns nil
// the task is committed. After [task.ErrUnavailable], or when ctx ended, it may
// or may not be. [task.ErrOverloaded] comes at once and says that it is not:
// too many wait to be inserted. Where the task's idempotency key is taken, the
// error is a [*task.RepeatError] or [task.ErrKeyTaken].
func (s *Store) Insert(ctx context.Context, t *task.Task) error {
	_, err := s.insertOne(ctx, newTask{Task: t})
	return err
}

// InsertClaimed is Insert of a task that is due now and that worker begins to
// carry out at once: it is stored as claimed, which spares a claim of its own.
// Where the worker is not registered the task is stored as pending, and the
// claim is nil.
func (s *Store) InsertClaimed(ctx context.Context, worker task.ID, t *task.Task) (*task.Claim, error) {
	in, err := s.insertOne(ctx, newTask{t, worker})
	if err != nil || in.claim == 0 {
		return nil, err
	}
	t.State = task.Running
	return &task.Claim{Task: t, Number: in.claim, At: in.createdAt, FirstAt: in.createdAt}, nil
}

func (s *Store) insertOne(ctx context.Context, t newTask) (inserted, error) {
	in, err := s.inserts.Do(ctx, t)
	for range insertTries - 1 {
		if !errors.Is(in.err, errKeyReleased) {
			break
		}
		in, err = s.inserts.Do(ctx, t)
	}
	if err == nil {
		err = in.err
	}
	if errors.Is(err, batch.ErrFull) {
		return inserted{}, fmt.Errorf("insert task %s: %w: %w", t.ID, task.ErrOverloaded, err)
	}
	if err != nil {
		return inserted{}, fmt.Errorf("insert task %s: %w", t.ID, classify(err))
	}
	t.RunAt, t.CreatedAt, t.LastClaim, t.RootID = in.runAt, in.createdAt, in.claim, in.root
	return in, nil
}

// insertion is a statement that inserts tasks. Where any of them has a parent it
// takes another form, which looks the roots of parents up: that locks all partitions
// of the history, for which others need not wait.
type insertion struct{ plain, children string }

func newInsertion(before, after string) insertion {
	return insertion{
		plain:    before + insertTasks + `NULL::uuid` + insertTasksFrom + after + insertReturning,
		children: before + insertTasks + rootOfParent + insertTasksFrom + after + insertReturning + `, root_id`,
	}
}

var insertSQL = newInsertion("-- name: insert tasks\n", "")

// The arrays are taken apart in the select list, side by side. In FROM each would
// be written to a store of its own first: for 30 tasks that takes 125 µs, this 28.
const insertTasks = `INSERT INTO tasks (id, worker_id, state, claim, claimed_at, first_claimed_at, run_at, created_at, ` + specColumns + `)
SELECT t.id, t.worker_id, CASE WHEN t.worker_id IS NULL THEN 'pending' ELSE 'running' END, (t.worker_id IS NOT NULL)::int,
    CASE WHEN t.worker_id IS NOT NULL THEN now() END, CASE WHEN t.worker_id IS NOT NULL THEN now() END,
    GREATEST(COALESCE(run_at, now() + make_interval(secs => delay_seconds)), now()), now(),
    expires_at, timeout_seconds, max_retry_duration_seconds, min_backoff_seconds, max_backoff_seconds,
    max_attempts, max_doublings, retry_client_errors, method, url, content_type,
    COALESCE(headers::jsonb, '{}'), COALESCE(labels::jsonb, '{}'), body, callbacks::jsonb, oidc_audience, created_by, idempotency_key,
    parent_id, `

// rootOfParent is looked up in the history only where the task is none of the others.
const rootOfParent = `CASE WHEN parent_id IS NOT NULL THEN COALESCE(
        (SELECT COALESCE(p.root_id, p.id) FROM tasks p WHERE p.id = t.parent_id),
        (SELECT COALESCE(p.root_id, p.id) FROM task_history p WHERE p.id = t.parent_id LIMIT 1),
        parent_id) END`

const insertTasksFrom = `, hops, NULL::int
FROM (SELECT *, CASE WHEN claimed THEN (SELECT id FROM workers WHERE id = $23) END AS worker_id FROM (
    SELECT unnest($1::uuid[]) AS id, unnest($2::bool[]) AS claimed, unnest($3::timestamptz[]) AS run_at,
    unnest($4::float8[]) AS delay_seconds, unnest($5::timestamptz[]) AS expires_at,
    unnest($6::float8[]) AS timeout_seconds, unnest($7::float8[]) AS max_retry_duration_seconds,
    unnest($8::float8[]) AS min_backoff_seconds, unnest($9::float8[]) AS max_backoff_seconds,
    unnest($10::int[]) AS max_attempts, unnest($11::int[]) AS max_doublings,
    unnest($12::bool[]) AS retry_client_errors, unnest($13::text[]) AS method, unnest($14::text[]) AS url,
    unnest($15::text[]) AS content_type, unnest($16::text[]) AS headers, unnest($17::text[]) AS labels,
    unnest($18::bytea[]) AS body, unnest($19::text[]) AS callbacks, unnest($20::text[]) AS oidc_audience,
    unnest($21::text[]) AS created_by, unnest($22::text[]) AS idempotency_key,
    unnest($24::uuid[]) AS parent_id, unnest($25::smallint[]) AS hops) submitted) t`

const insertReturning = `
RETURNING id, run_at, created_at, claim`

// insert is the flush of Insert.
func (s *Store) insert(ctx context.Context, tasks []newTask) (_ []inserted, err error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if err := s.inserting.acquire(ctx); err != nil {
		return nil, err
	}
	defer s.inserting.release()
	defer func() { s.noteRoom(err) }()
	if slices.ContainsFunc(tasks, func(t newTask) bool { return t.IdempotencyKey != "" }) {
		return s.insertOnce(ctx, tasks)
	}
	return s.insertRows(ctx, insertSQL, tasks)
}

// InsertBatch stores tasks in one statement: all, or none of them. It is
// [Store.Insert] otherwise, in all that it sets and returns.
func (s *Store) InsertBatch(ctx context.Context, b *task.Batch) error {
	in, err := s.insertBatch(ctx, b)
	for range insertTries - 1 {
		if !errors.Is(err, errKeyReleased) {
			break
		}
		in, err = s.insertBatch(ctx, b)
	}
	if err != nil {
		return fmt.Errorf("insert a batch of %d tasks: %w", len(b.Tasks), classify(err))
	}
	for i, t := range b.Tasks {
		t.RunAt, t.CreatedAt, t.RootID = in[i].runAt, in[i].createdAt, in[i].root
	}
	return nil
}

// insertBatch waits for the batches before this one, and inserts it whether or not
// ctx ends then: to break a statement off would cost a connection.
func (s *Store) insertBatch(ctx context.Context, b *task.Batch) (_ []inserted, err error) {
	waiting, stopWaiting := context.WithTimeout(ctx, callTimeout)
	defer stopWaiting()
	if err := s.batching.acquire(waiting); err != nil {
		return nil, err
	}
	defer s.batching.release()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), callTimeout)
	defer cancel()
	if err := s.inserting.acquire(ctx); err != nil {
		return nil, err
	}
	defer s.inserting.release()
	defer func() { s.noteRoom(err) }()
	tasks := make([]newTask, len(b.Tasks))
	for i, t := range b.Tasks {
		tasks[i].Task = t
	}
	if b.IdempotencyKey != "" {
		return s.insertBatchOnce(ctx, b, tasks)
	}
	return s.insertRows(ctx, insertSQL, tasks)
}

// insertRows runs one of the statements that insert tasks; more are its further
// arguments. What it did not insert has no createdAt.
func (s *Store) insertRows(ctx context.Context, statement insertion, tasks []newTask, more ...any) ([]inserted, error) {
	n := len(tasks)
	var (
		ids          = make([][16]byte, n)
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
		bodies       = make([][]byte, n)

		// What is for nothing in most tasks. Where it is NULL for all of them the
		// array itself is, and unnest fills it up.
		runAts, expiresAts                                    []*time.Time
		delays                                                []*float64
		headers, labels, callbacks, audiences, creators, keys []*string
		parents                                               []*[16]byte
		hops                                                  []*int16
		claimed                                               []*bool
		worker                                                task.ID
	)
	for i, t := range tasks {
		ids[i] = t.ID
		setNullable(&runAts, i, n, nullTime(t.RunAt))
		setNullable(&delays, i, n, null(seconds(t.Delay)))
		setNullable(&expiresAts, i, n, nullTime(t.ExpiresAt))
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
		bodies[i] = t.Body
		setNullable(&headers, i, n, nullMap(t.Headers))
		setNullable(&labels, i, n, nullMap(t.Labels))
		setNullable(&callbacks, i, n, encodeCallbacks(&t.Spec))
		setNullable(&audiences, i, n, null(t.OIDCAudience))
		setNullable(&creators, i, n, null(t.CreatedBy))
		setNullable(&keys, i, n, null(t.IdempotencyKey))
		setNullable(&parents, i, n, null([16]byte(t.ParentID)))
		setNullable(&hops, i, n, null(int16(t.Hops))) //nolint:gosec // at most task.MaxHops
		// There are two workers when one has just lost its lease, and claims nothing.
		if t.worker != (task.ID{}) && (worker == task.ID{} || worker == t.worker) {
			worker = t.worker
			setNullable(&claimed, i, n, null(true))
		}
	}
	var in inserted
	var root *[16]byte
	sql, columns := statement.plain, []any{nil, &in.runAt, &in.createdAt, &in.claim}
	if parents != nil {
		sql, columns = statement.children, append(columns, &root)
	}
	before := localTime()
	rows, err := s.pool.Query(ctx, sql, append([]any{
		ids, claimed, runAts, delays, expiresAts, timeouts, maxDurations,
		minBackoffs, maxBackoffs, maxAttempts, maxDoublings, clientErrors,
		methods, urls, contentTypes, headers, labels, bodies, callbacks, audiences, creators, keys, [16]byte(worker), parents, hops,
	}, more...)...)
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
	columns[0] = &id
	_, err = pgx.ForEachRow(rows, columns, func() error {
		in.root = zeroNull(root)
		out[index[id]] = in
		return nil
	})
	if err != nil {
		return nil, classify(err)
	}
	if !in.createdAt.IsZero() {
		s.clock.saw(in.createdAt, before, localTime())
	}
	return out, nil
}

// setNullable sets the value of task i of n in a column that is nil while all are NULL.
func setNullable[T any](column *[]*T, i, n int, v *T) {
	if v == nil {
		return
	}
	if *column == nil {
		*column = make([]*T, n)
	}
	(*column)[i] = v
}

// nullTime makes the zero time NULL.
func nullTime(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	return &t
}

// null makes the zero value NULL.
func null[T comparable](v T) *T {
	var zero T
	if v == zero {
		return nil
	}
	return &v
}

// callbacksRow is the callbacks column.
type callbacksRow struct {
	OnSuccess *task.Callback `json:"on_success,omitempty"`
	OnFailure *task.Callback `json:"on_failure,omitempty"`
}

func encodeCallbacks(s *task.Spec) *string {
	if s.OnSuccess == nil && s.OnFailure == nil {
		return nil
	}
	b, err := json.Marshal(callbacksRow{s.OnSuccess, s.OnFailure})
	if err != nil {
		panic(err) // strings always encode
	}
	text := string(b)
	return &text
}

// nullMap makes the empty map NULL.
func nullMap(m map[string]string) *string {
	if len(m) == 0 {
		return nil
	}
	text := encodeMap(m)
	return &text
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

func decodeCallbacks(b []byte) (onSuccess, onFailure *task.Callback, err error) {
	if b == nil {
		return nil, nil, nil
	}
	var c callbacksRow
	err = json.Unmarshal(b, &c)
	return c.OnSuccess, c.OnFailure, err
}

func decodeMap(b []byte) (map[string]string, error) {
	if len(b) <= len("{}") {
		return nil, nil
	}
	var m map[string]string
	err := json.Unmarshal(b, &m)
	return m, err
}
