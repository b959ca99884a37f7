package postgres

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/melodia/orchestrator/internal/batch"
	"github.com/melodia/orchestrator/internal/task"
)

// newTask is a task to be inserted. Unless worker is zero that worker carries it
// out at once.
type newTask struct {
	*task.Task
	worker task.ID
}

// inserted is what the database adds to a task: the moments by its clock, the
// number of the claim, 0 where no worker has it, and the root of its chain.
type inserted struct {
	runAt, createdAt time.Time
	claim            int64
	root             task.ID
	// err is why this one was not stored, because of its idempotency key.
	err error
}

// Insert stores a new task and sets its RunAt and CreatedAt. A RunAt in the
// past becomes now, so that no task jumps the queue. When Insert returns nil
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
// Where the worker is not registered, or the task has a lane, it is stored as pending,
// and the claim is nil.
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

// insertion is a statement that inserts tasks. Where any of them has a queue it takes
// another form, which sends what plain tasks do without. Where any has a parent it
// takes a third one, which also looks the roots of parents up: that locks all
// partitions of the history, for which others need not wait.
type insertion struct{ plain, queued, children statement }

// newInsertion makes one of its name, of a WITH query that comes before INSERT … SELECT,
// "" for none, and of what stands behind that.
func newInsertion(l columns, name string, with func(*parameters) string, after string) insertion {
	form := func(sent use, computed map[string]string, returned string) statement {
		var p parameters
		into := slices.DeleteFunc(l.of(live), func(c column) bool { return c.use&sent == 0 && computed[c.name] == "" })
		before := "-- name: " + name + "\n"
		queries := []string{with(&p)}
		if sent&useQueued != 0 {
			queries = append(queries, `named AS (
    `+nameQueues(`unnest(`+p.of("queue")+`::text[]) n (name)`)+`
)`)
		}
		if queries = slices.DeleteFunc(queries, func(q string) bool { return q == "" }); len(queries) > 0 {
			before += "WITH " + strings.Join(queries, ", ") + "\n"
		}
		return p.statement(before + `INSERT INTO tasks (` + into.names() + `)
SELECT ` + into.exprs(func(c column) string { return cmp.Or(computed[c.name], c.stored("t."+c.name)) }) + `
FROM (SELECT *, CASE WHEN claimed THEN (SELECT id FROM workers WHERE id = ` + p.of("worker") + `) END AS worker_id FROM (
    SELECT ` + l.with(sent).exprs(func(c column) string { return "unnest(" + p.of(c.name) + "::" + c.sentType() + "[])" }) + `,
        unnest(` + p.of("claimed") + `::bool[]) AS claimed) submitted) t` + after + `
RETURNING ` + returned)
	}
	const returned = `id, run_at, created_at, claim`
	queued := maps.Clone(insertedAs)
	queued["state"] = `CASE WHEN t.worker_id IS NOT NULL THEN 'running' WHEN t.lane IS NOT NULL THEN 'waiting' ELSE 'pending' END`
	children := maps.Clone(queued)
	children["root_id"] = rootOfParent
	return insertion{
		plain:    form(useInsert, insertedAs, returned),
		queued:   form(useInsert|useQueued, queued, returned),
		children: form(useInsert|useQueued, children, returned+`, root_id`),
	}
}

// The arrays are taken apart in the select list, side by side. In FROM each would
// be written to a store of its own first: for 30 tasks that takes 125 µs, this 28.
func insertSQL(l columns) insertion {
	return newInsertion(l, "insert tasks", func(*parameters) string { return "" }, "")
}

// insertedAs is what a submission does not send as it is stored. A task that has a
// worker is inserted as claimed.
var insertedAs = map[string]string{
	"worker_id":        `t.worker_id`,
	"state":            `CASE WHEN t.worker_id IS NULL THEN 'pending' ELSE 'running' END`,
	"claim":            `(t.worker_id IS NOT NULL)::int`,
	"claimed_at":       `CASE WHEN t.worker_id IS NOT NULL THEN now() END`,
	"first_claimed_at": `CASE WHEN t.worker_id IS NOT NULL THEN now() END`,
	"run_at":           `GREATEST(COALESCE(t.run_at, now() + make_interval(secs => t.delay_seconds)), now())`,
	"created_at":       `now()`,
}

// rootOfParent is looked up in the history only where the task is none of the others.
const rootOfParent = `CASE WHEN t.parent_id IS NOT NULL THEN COALESCE(
        (SELECT COALESCE(p.root_id, p.id) FROM tasks p WHERE p.id = t.parent_id),
        (SELECT COALESCE(p.root_id, p.id) FROM task_history p WHERE p.id = t.parent_id LIMIT 1),
        t.parent_id) END`

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
	return s.insertRows(ctx, s.sql.insert, tasks, nil)
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
	return s.insertRows(ctx, s.sql.insert, tasks, nil)
}

// insertRows runs one of the statements that insert tasks; more are its further
// arguments. What it did not insert has no createdAt.
func (s *Store) insertRows(ctx context.Context, i insertion, tasks []newTask, more map[string]any) ([]inserted, error) {
	n := len(tasks)
	ids := make([][16]byte, n)
	var claimed []*bool
	var worker task.ID
	queued, children := false, false
	for i, t := range tasks {
		ids[i] = t.ID
		lane := t.Lane()
		queued = queued || lane != "" || t.Completion != nil
		children = children || t.ParentID != task.ID{}
		// There are two workers when one has just lost its lease, and claims nothing. What
		// has limits is claimed from its lane.
		if lane == "" && t.worker != (task.ID{}) && (worker == task.ID{} || worker == t.worker) {
			worker = t.worker
			setNullable(&claimed, i, n, null(true))
		}
	}
	values := make(map[string]any, len(s.sql.inserted)+8)
	for _, c := range s.sql.inserted {
		values[c.name] = c.array(tasks)
	}
	values["claimed"], values["worker"] = claimed, [16]byte(worker)
	maps.Copy(values, more)
	var in inserted
	var root *[16]byte
	statement, columns := &i.plain, []any{nil, &in.runAt, &in.createdAt, &in.claim}
	switch {
	case children:
		statement, columns = &i.children, append(columns, &root)
	case queued:
		statement = &i.queued
	}
	before := localTime()
	rows, err := s.pool.Query(ctx, statement.sql, statement.arguments(values)...)
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
