package dispatch

import (
	"cmp"
	"context"
	"encoding/binary"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/melodia/orchestrator/internal/task"
)

const (
	// callTimeout and unansweredFor are the real store's bounds: of a call, and
	// of the time for which the answer to a claim may be under way.
	callTimeout   = 5 * time.Second
	unansweredFor = 2 * callTimeout
)

var errStoreAway = fmt.Errorf("%w: connection refused", task.ErrUnavailable)

// memory is a store in memory that keeps the promises of the real one: claim
// numbers that only grow, fenced results, leases, one clock of its own. Several
// can share their tables, as instances share a database.
type memory struct {
	*tables
	fault   around
	telling chan struct{} // held by who tells what came of a result
}

type tables struct {
	// ahead is how far the store's clock is ahead of the dispatcher's.
	ahead time.Duration

	mu      sync.Mutex
	rows    map[task.ID]*row
	workers map[task.ID]time.Time // their heartbeats
	claimed map[*task.Task]int64  // the claim number under which a task was handed out
	flow    flow
	locked  bool // others hold the tasks of all lanes
	asked   []asked

	hosts hostRows
}

// around stands between the dispatcher and the store, so that a test can make
// calls wait, fail or lose their answers: only do has an effect, and an error
// hides it.
type around func(ctx context.Context, op string, do func()) error

// failing makes the named ops fail, or all if none is named.
func failing(ops ...string) around {
	return func(_ context.Context, op string, do func()) error {
		if len(ops) == 0 || slices.Contains(ops, op) {
			return errStoreAway
		}
		do()
		return nil
	}
}

// hanging makes the named ops go without an answer, or all if none is named.
func hanging(ops ...string) around {
	return func(ctx context.Context, op string, do func()) error {
		if len(ops) == 0 || slices.Contains(ops, op) {
			return hang(ctx)
		}
		do()
		return nil
	}
}

type row struct {
	task.Task
	claim              int64
	worker             task.ID
	claimedAt, firstAt time.Time
	tokens             []byte
	claims             int  // how often it was claimed
	returned           int  // how often that came to nothing, or ended the task without a call
	told               int  // how many attempts there were when it was last redriven
	locked             bool // by another instance's transaction
	byRequest          bool // it is claimed in spite of the limits of its lane
}

// asked is one call of the store.
type asked struct {
	op     string
	at     time.Time
	worker task.ID
	limit  int       // of Claim; of KeepHistory: the days ahead
	held   []task.ID // of Reap
	bound  time.Duration
}

func newMemory() *memory {
	return (&tables{
		rows:    make(map[task.ID]*row),
		workers: make(map[task.ID]time.Time),
		claimed: make(map[*task.Task]int64),
	}).open()
}

// open returns another store with these tables.
func (m *tables) open() *memory { return &memory{tables: m, telling: make(chan struct{}, 1)} }

// breaks puts a fault between the dispatcher and the store; nil mends it.
func (m *memory) breaks(fault around) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.fault = fault
}

func (m *tables) now() time.Time { return time.Now().Add(m.ahead) }

// newID returns the nth id of a kind.
func newID(kind byte, n int) task.ID {
	id := task.ID{0: kind}
	binary.BigEndian.PutUint32(id[12:], uint32(n)) //nolint:gosec // small numbers
	return id
}

func taskID(n int) task.ID { return newID('t', n) }

// newTask makes a task that is to be submitted.
func newTask(n int, delay time.Duration) *task.Task {
	return &task.Task{
		ID:    taskID(n),
		State: task.Pending,
		Delay: delay,
		Spec: task.Spec{
			URL: "https://target.example/plays", Method: "POST", Timeout: 30 * time.Second, Retry: task.DefaultRetryPolicy(),
		},
	}
}

// has reports whether a task is stored.
func (m *tables) has(id task.ID) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.rows[id] != nil
}

// store puts a task in that is due in wait; options change it before.
func (m *tables) store(n int, wait time.Duration, options ...func(*task.Task)) task.ID {
	t := *newTask(n, 0)
	m.mu.Lock()
	defer m.mu.Unlock()
	t.CreatedAt = m.now()
	t.RunAt = t.CreatedAt.Add(wait)
	for _, option := range options {
		option(&t)
	}
	m.rows[t.ID] = &row{Task: t}
	return t.ID
}

// row returns a copy of what is stored of a task.
func (m *tables) row(id task.ID) row {
	m.mu.Lock()
	defer m.mu.Unlock()
	r := *m.rows[id]
	r.Attempts = slices.Clone(r.Attempts)
	return r
}

// change lets a test be another instance.
func (m *tables) change(id task.ID, f func(*row)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	f(m.rows[id])
}

// forget takes a worker's lease away, as another instance's reaping would.
func (m *tables) forget(worker task.ID) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.workers, worker)
	for _, r := range m.rows {
		if r.State == task.Running && r.worker == worker {
			r.lose(m.now())
		}
	}
}

// calls returns what was asked of the store, only the named ops if any are named.
func (m *tables) calls(ops ...string) []asked {
	m.mu.Lock()
	defer m.mu.Unlock()
	var found []asked
	for _, a := range m.asked {
		if len(ops) == 0 || slices.Contains(ops, a.op) {
			found = append(found, a)
		}
	}
	return found
}

// do carries out one call.
func (m *memory) do(ctx context.Context, a asked, f func()) error {
	a.at = time.Now()
	m.mu.Lock()
	m.asked = append(m.asked, a)
	fault := m.fault
	m.mu.Unlock()
	locked := func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		f()
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("%w: %w", task.ErrUnavailable, err)
	}
	if fault == nil {
		locked()
		return nil
	}
	return fault(ctx, a.op, locked)
}

// hang is the end of a call that gets no answer.
func hang(ctx context.Context) error {
	<-ctx.Done()
	return fmt.Errorf("%w: %w", task.ErrUnavailable, ctx.Err())
}

func (m *memory) Register(ctx context.Context, worker task.ID, _ string, _ int) error {
	return m.do(ctx, asked{op: "Register", worker: worker}, func() { m.workers[worker] = m.now() })
}

func (m *memory) Heartbeat(ctx context.Context, worker task.ID) (known bool, err error) {
	err = m.do(ctx, asked{op: "Heartbeat", worker: worker}, func() {
		if _, known = m.workers[worker]; known {
			m.workers[worker] = m.now()
		}
	})
	return known && err == nil, err
}

func (m *memory) Cancelled(ctx context.Context, worker task.ID) (claims map[task.ID]int64, err error) {
	err = m.do(ctx, asked{op: "Cancelled", worker: worker}, func() {
		claims = make(map[task.ID]int64)
		for id, r := range m.rows {
			if r.worker == worker && !r.CancelRequestedAt.IsZero() {
				claims[id] = r.claim
			}
		}
	})
	return claims, err
}

// cancel is what somebody does to a task, through any instance. It returns the
// number of the claim under which the task runs, 0 where it does not.
func (m *tables) cancel(id task.ID) (claim int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch r := m.rows[id]; {
	case r == nil || r.State.Terminal():
	case r.State == task.Running && !r.Awaiting:
		r.CancelRequestedAt = m.now()
		return r.claim
	default:
		r.State, r.FinishedAt = task.Cancelled, m.now()
		r.claim++
	}
	return 0
}

// redrive is what somebody does to a task that failed or was cancelled. It
// reports whether there was such a task.
func (m *tables) redrive(id task.ID) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	r := m.rows[id]
	if r == nil || !r.State.CanBecome(task.Pending) || r.State == task.Running {
		return false
	}
	r.told = len(r.Attempts)
	r.State, r.Reason, r.RunAt, r.AttemptCount = task.Pending, "", m.now(), 0
	r.FinishedAt, r.CancelRequestedAt, r.firstAt, r.ExpiresAt = time.Time{}, time.Time{}, time.Time{}, time.Time{}
	r.claim++
	return true
}

func (m *memory) Unregister(ctx context.Context, worker task.ID) error {
	return m.do(ctx, asked{op: "Unregister", worker: worker}, func() { delete(m.workers, worker) })
}

func (m *memory) Reap(ctx context.Context, worker task.ID, held []task.ID, lease time.Duration) (lost []task.ID, err error) {
	err = m.do(ctx, asked{op: "Reap", worker: worker, held: held, bound: lease}, func() {
		for id, heartbeat := range m.workers {
			if heartbeat.Before(m.now().Add(-lease)) {
				delete(m.workers, id)
			}
		}
		for id, r := range m.rows {
			_, known := m.workers[r.worker]
			forgotten := r.worker == worker && !slices.Contains(held, id) &&
				r.claimedAt.Before(m.now().Add(-max(lease, unansweredFor)))
			if r.State == task.Running && !r.Awaiting && (!known || forgotten) {
				r.lose(m.now())
				lost = append(lost, id)
			}
		}
	})
	return lost, err
}

// lose is what reaping does to a running task.
func (r *row) lose(now time.Time) {
	r.Attempts = append(r.Attempts, task.Attempt{
		Number: r.AttemptCount + 1, StartedAt: r.claimedAt, Duration: now.Sub(r.claimedAt), Outcome: task.OutcomeLost, Error: "lost",
	})
	r.AttemptCount = min(r.AttemptCount+1, r.Retry.MaxAttempts)
	r.State, r.RunAt, r.worker = task.Pending, now, task.ID{}
}

func (m *memory) KeepHistory(ctx context.Context, retention time.Duration, ahead int) error {
	return m.do(ctx, asked{op: "KeepHistory", bound: retention, limit: ahead}, func() {})
}

func (m *memory) Insert(ctx context.Context, t *task.Task) error {
	return m.do(ctx, asked{op: "Insert"}, func() { m.insert(t) })
}

func (m *memory) InsertBatch(ctx context.Context, b *task.Batch) error {
	return m.do(ctx, asked{op: "InsertBatch"}, func() {
		for _, t := range b.Tasks {
			m.insert(t)
		}
	})
}

func (m *memory) InsertClaimed(ctx context.Context, worker task.ID, t *task.Task) (c *task.Claim, err error) {
	err = m.do(ctx, asked{op: "InsertClaimed", worker: worker}, func() {
		r := m.insert(t)
		if _, known := m.workers[worker]; known && t.Lane() == "" {
			t.State = task.Running
			c = m.take(r, t, worker, t.CreatedAt)
		}
	})
	if err != nil {
		return nil, err
	}
	return c, nil
}

// insert stores a task as a client handed it in.
func (m *tables) insert(t *task.Task) *row {
	t.CreatedAt = m.now()
	t.RunAt = t.CreatedAt.Add(t.Delay)
	r := &row{Task: *t}
	m.rows[t.ID] = r
	return r
}

func (m *memory) NextDue(ctx context.Context) (wait time.Duration, ok bool, err error) {
	err = m.do(ctx, asked{op: "NextDue"}, func() {
		for _, r := range m.rows {
			if in := r.RunAt.Sub(m.now()); r.State == task.Pending && r.isPlain() && (!ok || in < wait) {
				wait, ok = in, true
			}
		}
	})
	if err != nil {
		return 0, false, err
	}
	return wait, ok, nil
}

func (m *memory) Claim(ctx context.Context, worker task.ID, limit int) (claims []*task.Claim, err error) {
	err = m.do(ctx, asked{op: "Claim", worker: worker, limit: limit}, func() {
		if _, known := m.workers[worker]; !known {
			return
		}
		var due []*row
		for _, r := range m.rows {
			if r.State == task.Pending && r.isPlain() && !r.locked && !r.RunAt.After(m.now()) {
				due = append(due, r)
			}
		}
		slices.SortFunc(due, func(a, b *row) int {
			return cmp.Or(a.RunAt.Compare(b.RunAt), slices.Compare(a.ID[:], b.ID[:]))
		})
		for _, r := range due[:min(limit, len(due))] {
			claims = append(claims, m.take(r, r.sent(), worker, m.now()))
		}
	})
	if err != nil {
		return nil, err
	}
	return claims, nil
}

func (m *memory) ClaimOne(ctx context.Context, worker, id task.ID) (c *task.Claim, err error) {
	var refused error
	err = m.do(ctx, asked{op: "ClaimOne", worker: worker}, func() {
		r, ok := m.rows[id]
		_, known := m.workers[worker]
		switch {
		case !ok:
			refused = fmt.Errorf("claim task %s: %w", id, task.ErrNotFound)
		case r.State != task.Pending:
			refused = fmt.Errorf("claim task %s: %w", id, task.ErrNotPending)
		case !known:
			refused = fmt.Errorf("claim task %s: %w: not registered", id, task.ErrUnavailable)
		default:
			c = m.take(r, r.sent(), worker, m.now())
		}
	})
	if err = cmp.Or(err, refused); err != nil {
		return nil, err
	}
	return c, nil
}

// sent returns what a claim carries of a stored task.
func (r *row) sent() *task.Task {
	t := r.Task
	t.State, t.Labels, t.Attempts = task.Running, nil, nil
	return &t
}

// isPlain reports whether a pending task is claimed as a plain one.
func (r *row) isPlain() bool { return r.Lane() == "" || r.byRequest }

// take makes a pending task running. t is handed out of it.
func (m *tables) take(r *row, t *task.Task, worker task.ID, now time.Time) *task.Claim {
	r.State, r.worker, r.claimedAt, r.byRequest = task.Running, worker, now, false
	r.claim++
	r.claims++
	if r.firstAt.IsZero() {
		r.firstAt = now
	}
	m.claimed[t] = r.claim
	return &task.Claim{Task: t, Number: r.claim, At: r.claimedAt, FirstAt: r.firstAt}
}

// Finish tells of one result after the other, as the real store does of those
// that were written together.
func (m *memory) Finish(c *task.Claim, d task.Decision, then func(matched, calledBack bool, err error)) {
	if d.Attempt != nil && c.Task.Body != nil {
		panic("a result waits to be written with the body of its call, which may be large")
	}
	go func() {
		matched, calledBack, err := m.finish(c, d)
		m.telling <- struct{}{}
		began := time.Now()
		then(matched, calledBack, err)
		if took := time.Since(began); took >= minPause {
			panic(fmt.Sprintf("results are held up for %v by what came of one", took))
		}
		<-m.telling
	}()
}

func (m *memory) finish(c *task.Claim, d task.Decision) (matched, calledBack bool, err error) {
	err = m.do(context.Background(), asked{op: "Finish"}, func() {
		r := m.rows[c.Task.ID]
		if matched = r.State == task.Running && r.claim == c.Number; !matched {
			return
		}
		if d.State == task.Running && r.CancelRequestedAt.IsZero() {
			r.await(m.now())
			return
		}
		if d.State == task.Running {
			d.State = task.Pending // and so cancelled
		}
		r.Awaiting = false
		if d.Attempt != nil {
			r.Attempts = append(r.Attempts, *d.Attempt)
		}
		if d.Counted {
			r.AttemptCount++
		}
		if d.Attempt == nil && d.State != task.Succeeded {
			r.returned++
		}
		if d.State == task.Pending && !r.CancelRequestedAt.IsZero() {
			d.State = task.Cancelled
		}
		r.State, r.Reason, r.worker = d.State, d.Reason, task.ID{}
		if d.State == task.Pending {
			r.RunAt = m.now().Add(d.Wait)
			r.HeldHost = cmp.Or(d.Host, r.HeldHost)
		} else {
			r.FinishedAt = m.now()
			calledBack = m.callBack(r)
		}
	})
	return matched && err == nil, calledBack && err == nil, err
}

// callBack stores the callback that an ended task has for its end, and reports
// whether there is one.
func (m *tables) callBack(r *row) bool {
	callback := map[task.State]*task.Callback{task.Succeeded: r.OnSuccess, task.Failed: r.OnFailure}[r.State]
	if callback == nil {
		return false
	}
	t := newTask(0, 0)
	t.ID, t.URL = newID('c', len(m.rows)), callback.URL
	m.insert(t)
	return true
}

func (m *memory) Unfinished(ctx context.Context, ids []task.ID) (unfinished []task.ID, err error) {
	err = m.do(ctx, asked{op: "Unfinished", limit: len(ids)}, func() {
		for _, id := range ids {
			if r := m.rows[id]; r != nil && !r.State.Terminal() {
				unfinished = append(unfinished, id)
			}
		}
	})
	if err != nil {
		return nil, err
	}
	return unfinished, nil
}
