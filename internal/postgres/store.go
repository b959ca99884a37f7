// Package postgres keeps tasks in PostgreSQL (14 or later). It is the only
// package with SQL.
//
// Tables: tasks holds the tasks that are not over, task_history those that are,
// workers the instances that hold running tasks, idempotency_keys the requests
// that came under a key, queues and queue_keys what limits tasks wait for, lanes what
// is left of those, and hosts those that are not healthy. The database's now() is the
// only clock: due times, expiry and silence are compared there, and Go sends durations,
// or moments that it read there.
//
// It works behind a pooler in transaction mode: there is no session state, no
// LISTEN, and no lock that outlives a transaction.
package postgres

import (
	"context"
	"fmt"
	"math"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/melodia/orchestrator/internal/batch"
	"github.com/melodia/orchestrator/internal/task"
	"github.com/melodia/orchestrator/migrations"
)

const (
	// callTimeout bounds every call to the database, waiting for a connection included.
	callTimeout = 5 * time.Second
	// maxBatch is the most rows that one statement inserts, claims or finishes.
	maxBatch = 256
	// flushes is how many statements of a kind run at a time: together they leave a
	// connection of the default pool of ten for claims, whatever comes in.
	flushes = 2
	// gatherTime is how long results wait for others while many come in: a statement
	// costs for itself what some ten of its rows cost. Draining is 3 to 6 % faster than
	// with 1 ms for 50 and 200 calls at a time, and no faster with more than this; for
	// 10 calls to targets that answer at once, where what is unwritten keeps more from
	// being claimed, it is 10 % slower.
	gatherTime = 3 * time.Millisecond
	// gatherSlow is what makes a statement that writes a slow one, and the most that
	// the next then waits for more.
	gatherSlow = 5 * time.Millisecond
	// maxWaiting is the most tasks that wait to be inserted, and the most that
	// wait to be read: some rounds of flushes, and so a fraction of a second. More
	// would only get older.
	maxWaiting = 2048
	// maxBatches is the most batches that wait to be inserted: what one holds is
	// inserted within some ten milliseconds.
	maxBatches = 32
)

// Store keeps tasks. Its methods may be called concurrently; each is bounded
// by a few seconds. They return errors that wrap [task.ErrUnavailable] when the
// database cannot be reached, does not answer in time or takes no writes.
type Store struct {
	pool *pool
	// leases has one connection, for heartbeats: whatever waits for the database, or
	// for a lock in it, keeps no lease from being renewed.
	leases *pool
	// beatFailed is whether the last heartbeat did.
	beatFailed atomic.Bool
	inserts    *batch.Batcher[newTask, inserted]
	finishes   *batch.Batcher[Result, written]
	awaits     *batch.Batcher[Result, written]
	gets       *batch.Batcher[task.ID, *task.Task]
	probes     *batch.Batcher[struct{}, time.Duration]
	// queueDefaults are asked for before each task of a queue is inserted.
	queueDefaults *batch.Batcher[string, task.QueueDefaults]
	// inserting bounds the statements that insert tasks, one by one or in batches.
	inserting *gate
	// batching lets one batch at a time go on to inserting, so that tasks which are
	// submitted one by one are inserted beside it.
	batching *gate
	// managing lets one statement at a time read or change a single task by request.
	managing *gate
	// searching lets one search at a time run.
	searching *gate
	lowWater  *lowWater
	laneMarks *laneMarks
	sql       *statements
	clock     clock
	// callbacks is what their Timeout and Retry are.
	callbacks task.Spec
	// keyWindow is for how long an idempotency key counts.
	keyWindow time.Duration
	// noRoom is when the database last refused tasks for want of room; nil when
	// it has taken some since.
	noRoom atomic.Pointer[time.Time]
}

// Options say where the database is.
type Options struct {
	// URL is a connection string as libpq knows them, with pgx's additions.
	URL string
	// MaxConns is the most connections that are open at a time, 4 at least. One of
	// them is for heartbeats. Below 10 claims may have to wait for writes and reads
	// to end.
	MaxConns int
	// Callbacks is the Timeout and Retry of callbacks.
	Callbacks task.Spec
	// IdempotencyWindow is for how long an idempotency key counts.
	IdempotencyWindow time.Duration
}

// Open makes a Store and asks the database for a sign of life. Close it.
//
// It returns a [*LacksError] where the role lacks rights that the service needs, and
// an error that wraps [task.ErrUnavailable] where migrations have not been applied yet.
func Open(ctx context.Context, o Options) (*Store, error) {
	config, err := parse(o)
	if err != nil {
		return nil, err
	}
	pool, err := connect(ctx, config)
	if err != nil {
		return nil, err
	}
	if err := checkReady(ctx, pool); err != nil {
		pool.Close()
		return nil, err
	}
	leases, err := pool.alone(ctx)
	if err != nil {
		pool.Close()
		return nil, fmt.Errorf("set up the connection for heartbeats: %w", err)
	}
	s := &Store{
		pool: pool, leases: leases, lowWater: newLowWater(), laneMarks: newLaneMarks(), sql: taskSQL, callbacks: o.Callbacks, keyWindow: o.IdempotencyWindow,
		inserting: newGate(flushes, maxWaiting, task.ErrUnavailable),
		batching:  newGate(1, maxBatches, task.ErrUnavailable),
		managing:  newGate(1, maxWaiting, task.ErrOverloaded),
		searching: newGate(1, maxSearching, task.ErrUnavailable),
	}
	if _, err := s.Now(ctx); err != nil { // for ids
		leases.Close()
		pool.Close()
		return nil, err
	}
	s.inserts = batch.New(batch.Options{MaxSize: maxBatch, MaxFlushes: flushes, GatherSlow: gatherSlow, MaxWaiting: maxWaiting, Timeout: callTimeout, Isolate: isRowError}, s.insert)
	s.finishes = batch.New(batch.Options{MaxSize: maxBatch, MaxFlushes: flushes, Gather: gatherTime, GatherSlow: gatherSlow, Isolate: isRowError}, s.finish)
	s.awaits = batch.New(batch.Options{MaxSize: maxBatch, MaxFlushes: 1, Isolate: isRowError}, s.await)
	// A task's story may be of some hundred KiB.
	s.gets = batch.New(batch.Options{MaxSize: 16, MaxFlushes: flushes, MaxWaiting: maxWaiting, Timeout: callTimeout}, s.get)
	s.queueDefaults = batch.New(batch.Options{MaxSize: maxBatch, MaxFlushes: flushes, MaxWaiting: maxWaiting, Timeout: callTimeout}, s.getQueueDefaults)
	s.probes = batch.New(batch.Options{MaxSize: 1000, MaxFlushes: 1}, s.probe)
	return s, nil
}

// Close waits for writes under way and closes the connections.
func (s *Store) Close() {
	s.inserts.Close()
	s.finishes.Close()
	s.awaits.Close()
	s.gets.Close()
	s.probes.Close()
	s.queueDefaults.Close()
	for _, g := range []*gate{s.batching, s.inserting, s.managing, s.searching} {
		g.close()
	}
	s.leases.Close()
	s.pool.Close()
}

// MigrationObserver hears how migrations get on.
type MigrationObserver = migrations.Observer

// Migrate brings the database up to this version's schema and returns how many
// migrations it applied. It may take long and is bounded by ctx alone. Where nothing is
// to be done it only reads, so that a role without the rights to migrate may call it.
func Migrate(ctx context.Context, databaseURL string, observer MigrationObserver) (applied int, err error) {
	config, err := parse(Options{URL: databaseURL})
	if err != nil {
		return 0, err
	}
	applied, err = migrations.Up(ctx, config.ConnConfig, observer)
	return applied, classify(err)
}

func parse(o Options) (*pgxpool.Config, error) {
	text, err := connString(o.URL)
	if err != nil {
		return nil, err
	}
	config, err := pgxpool.ParseConfig(text)
	if err != nil {
		return nil, errBadURL // pgx's own text quotes the connection string
	}
	config.MaxConns = int32(max(o.MaxConns, 4)) - 1 //nolint:gosec // a pool's size is far below 2^31
	config.ConnConfig.ConnectTimeout = callTimeout
	// A connection that was idle is tried before it is used. One that is dead
	// without a word must not cost the whole call. What an idle instance asks for
	// once a second needs no trying.
	config.PingTimeout = callTimeout / 5
	config.ShouldPing = func(_ context.Context, p pgxpool.ShouldPingParams) bool { return p.IdleDuration > callTimeout }
	// After a failover some may still lead to the old server.
	config.MaxConnLifetime = 10 * time.Minute
	config.MaxConnLifetimeJitter = time.Minute
	if config.ConnConfig.RuntimeParams["application_name"] == "" {
		config.ConnConfig.RuntimeParams["application_name"] = "orchestrator"
	}
	return config, nil
}

// seconds is how durations are written.
func seconds(d time.Duration) float64 { return d.Seconds() }

// duration is how durations are read.
func duration(seconds float64) time.Duration {
	return time.Duration(math.Round(seconds * float64(time.Second)))
}
