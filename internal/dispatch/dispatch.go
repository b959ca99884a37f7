// Package dispatch carries out tasks: it claims due tasks, has each call made, and
// writes its result.
//
// A [Dispatcher] is one worker among the instances that share a store. It claims as
// many tasks as it has free slots. In a backlog it also claims the tasks for which
// slots become free in a moment. It proves by heartbeats that it is alive, and takes
// over the tasks of workers that fell silent. No transaction and no connection is held
// while a call is under way.
//
// attempt.go has one task's way from the claim to the result, in the order of the calls.
package dispatch

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/melodia/orchestrator/internal/task"
)

// store is where tasks are kept. Its errors are logged and survived.
type store interface {
	hostStore
	laneStore
	holdBackStore
	completionStore

	Register(ctx context.Context, worker task.ID, name string, concurrency int) error
	Heartbeat(ctx context.Context, worker task.ID) (known bool, err error)
	// Cancelled returns which of the worker's tasks are to be cancelled, with the
	// numbers of their claims.
	Cancelled(ctx context.Context, worker task.ID) (claims map[task.ID]int64, err error)
	Unregister(ctx context.Context, worker task.ID) error
	Reap(ctx context.Context, worker task.ID, held []task.ID, lease time.Duration) (lost []task.ID, err error)
	KeepHistory(ctx context.Context, retention time.Duration, ahead int) error
	// Expire has up to limit tasks that expired in their lanes claimed in spite of limits.
	Expire(ctx context.Context, limit int) (n int, err error)

	Insert(ctx context.Context, t *task.Task) error
	InsertBatch(ctx context.Context, b *task.Batch) error
	InsertClaimed(ctx context.Context, worker task.ID, t *task.Task) (*task.Claim, error)
	NextDue(ctx context.Context) (wait time.Duration, ok bool, err error)
	Claim(ctx context.Context, worker task.ID, limit int) ([]*task.Claim, error)
	ClaimOne(ctx context.Context, worker, id task.ID) (*task.Claim, error)
	// Finish waits for nothing and calls then in the end, which does not block.
	// calledBack: the end of the task stored a callback, which is due now.
	Finish(claim *task.Claim, d task.Decision, then func(matched, calledBack bool, err error))
	Unfinished(ctx context.Context, ids []task.ID) ([]task.ID, error)
}

// deliverer makes one call and returns its outcome: soon after ctx ends, with
// [task.OutcomeInterrupted].
type deliverer interface {
	Deliver(ctx context.Context, c task.Call) task.Outcome
}

// Options are a Dispatcher's settings. All but NewID, Name and Log are positive
// unless said otherwise.
type Options struct {
	// Name tells people which instance this is.
	Name string
	// Concurrency is the most calls under way at a time. With zero the Dispatcher
	// claims no tasks by itself; Run then only keeps the worker alive for Execute. Execute
	// and ExecuteUnstored together make at most Concurrency calls more, or 200 where it is zero.
	Concurrency int
	// HostShare is the part of the slots that one slow host may hold while tasks of other
	// hosts are due. With 1, or 0, it may hold all.
	HostShare float64
	// PollInterval is the longest time between two looks for due tasks.
	PollInterval time.Duration
	// Lease is how long a worker may be silent before others take its tasks.
	Lease time.Duration
	// Grace is how long running calls may go on after Run was told to stop.
	Grace time.Duration
	// Retention is how long ended tasks are kept.
	Retention time.Duration
	// NewID makes the worker's ids: a new one each time it has to register.
	NewID func() task.ID
	// Log must not block: other results wait while the line of one is logged.
	Log *slog.Logger
	// LogTargets has the log's lines on attempts say where the call went, without the
	// query. Paths may hold secrets too, so it is for trials alone.
	LogTargets bool
}

// flushTimeout bounds the last writes of a shutdown, after Grace, and then the signing off.
const flushTimeout = 500 * time.Millisecond

var (
	errLeaseLost = errors.New("the instance was silent for too long and lost its lease")
	errCancelled = errors.New("the task is being cancelled")
	// ErrStopping says that no task is taken any more.
	ErrStopping = fmt.Errorf("%w: the instance is shutting down", task.ErrUnavailable)

	errNotRegistered = fmt.Errorf("%w: the instance has not registered yet", task.ErrUnavailable)
)

// Dispatcher is a worker. Make one with [New] and run it once with Run; its
// other methods may be called at any time.
type Dispatcher struct {
	options   Options
	store     store
	deliverer deliverer
	log       *slog.Logger

	due       *alarm // when the next task is due, as far as is known here
	slots     *slots
	hosts     *hosts
	lanes     *lanes
	heldBack  *heldBack
	results   *results
	watches   *watches
	shortages shortages

	begun   chan struct{}           // closed when root is set
	root    *session                // what sessions begin in
	session atomic.Pointer[session] // nil until registered

	jobs    chan *job // to goroutines that are idle
	workers sync.WaitGroup
}

// New returns a Dispatcher. It does nothing until Run.
func New(o Options, s store, by deliverer) *Dispatcher {
	d := &Dispatcher{
		options:   o,
		store:     s,
		deliverer: by,
		log:       o.Log,
		due:       newAlarm(),
		slots:     newSlots(o.Concurrency),
		lanes:     newLanes(),
		heldBack:  newHeldBack(),
		watches:   newWatches(),
		begun:     make(chan struct{}),
		jobs:      make(chan *job),
	}
	d.hosts = newHosts(o.Concurrency, cmp.Or(o.HostShare, 1), o.Log)
	d.hosts.mayStart, d.hosts.launch = d.lanes.wakeHosts, d.launch
	d.slots.spare = &d.hosts.spare
	d.slots.plain.wants = func() bool { return d.slots.plain.backlog || d.due.ringing() }
	d.slots.laned.wants = func() bool { return d.lanes.ready.Load() > 0 }
	d.results = newResults(s, o.Log, d.notify)
	return d
}

// Health returns "starting" until it has registered, then "ok", "off" when the
// Dispatcher takes no tasks by itself, or "stopped" from the moment it was told
// to stop, and the number of calls under way.
func (d *Dispatcher) Health() (status string, running int) {
	running, stopping := d.slots.status()
	switch {
	case stopping:
		status = "stopped"
	case d.session.Load() == nil:
		status = "starting"
	case d.options.Concurrency == 0:
		status = "off"
	default:
		status = "ok"
	}
	return status, running
}

// notify says that a task was stored that is due in wait. It never blocks.
func (d *Dispatcher) notify(wait time.Duration) {
	d.due.set(time.Now().Add(wait))
}

// Wake says that a stored task may be due earlier than is known here. It never
// blocks.
func (d *Dispatcher) Wake() {
	d.notify(0)
	d.lanes.look()
}

// CameBack says that the call of a task came to this service itself and waits here, perhaps
// for other tasks: from now on the calls to that host have a share of the slots that is
// theirs alone, so that they leave slots to the tasks for which they wait. It never blocks.
func (d *Dispatcher) CameBack(id task.ID) {
	if j := d.results.of(id); j != nil {
		d.hosts.isOurs(j.claim.Task.URL)
	}
}

// CutOff ends the calls of running tasks that are to be cancelled, as far as
// they are made here: claims are their numbers by task. It never blocks.
func (d *Dispatcher) CutOff(claims map[task.ID]int64) { d.results.cancel(claims) }

// warnOfCutOff says how many calls are under way at a stop, and three quarters of the grace
// later how many will be cut off, until stop is called.
func (d *Dispatcher) warnOfCutOff() (stop func() bool) {
	grace := d.options.Grace
	if _, running := d.Health(); running > 0 {
		d.log.Info("stopping, calls under way may go on for the grace", "count", running, "grace_seconds", grace.Seconds())
	}
	left := grace / 4
	return time.AfterFunc(grace-left, func() {
		if _, running := d.Health(); running > 0 {
			d.log.Warn("calls under way will be cut off unless they end in time", "count", running, "left_seconds", left.Seconds())
		}
	}).Stop
}

// Run works until ctx ends, then stops in order: it claims nothing more, lets
// running calls go on for Grace, cuts off and gives back what is left, and
// signs off. It returns when all its goroutines are gone, Grace plus about a
// second after ctx ended at the latest: then those are left that the store holds up.
func (d *Dispatcher) Run(ctx context.Context) {
	// Three contexts: the end of ctx stops the claiming, then calls are cut off,
	// and what they leave to be written gets a moment more.
	calls, cutOff := context.WithCancelCause(context.WithoutCancel(ctx))
	defer cutOff(ErrStopping)
	writes, stopWriting := context.WithCancelCause(context.WithoutCancel(ctx))
	defer stopWriting(ErrStopping)
	root := &session{calls: calls, writes: writes}
	d.root = root
	close(d.begun)

	var claiming, keeping sync.WaitGroup
	keep, stopKeeping := context.WithCancel(calls)
	defer stopKeeping()
	if err := d.hosts.exchange(ctx, d.store); err != nil && ctx.Err() == nil {
		d.log.Error("asking for unhealthy hosts failed", "error", err) // it is asked again below
	}
	registered := d.register(ctx, root)
	if registered {
		keeping.Go(func() { d.keepAlive(keep, root) })
		keeping.Go(func() { d.maintain(keep) })
		keeping.Go(func() { d.hosts.follow(keep, d.store, d.options.PollInterval) })
		keeping.Go(func() { d.followWatched(keep) })
		claiming.Go(func() { d.claimDue(ctx) })
		if d.options.Concurrency > 0 {
			keeping.Go(func() { d.followLanes(keep) })
			keeping.Go(func() { d.holdBack(keep) })
			keeping.Go(func() { d.expireWaiting(keep) })
			claiming.Go(func() { d.claimLanes(ctx) })
		}
	}

	<-ctx.Done()
	d.slots.stop()
	d.releaseWaiting()
	d.releaseQueued()
	d.watches.stop()
	ended, written := make(chan struct{}), make(chan struct{})
	go func() {
		claiming.Wait()
		d.releaseWaiting() // from the last claim
		d.releaseQueued()
		d.slots.attempts.Wait()
		close(ended)
		d.results.writing.Wait()
		close(written)
	}()
	grace := time.NewTimer(d.options.Grace)
	defer grace.Stop()
	stopWarning := d.warnOfCutOff()
	defer stopWarning()
	select {
	case <-written:
	case <-grace.C:
		_, running := d.Health()
		d.log.Warn("running calls are cut off", "count", running)
		cutOff(ErrStopping)
		defer time.AfterFunc(flushTimeout, func() { stopWriting(ErrStopping) }).Stop()
		<-ended
		select {
		case <-written:
		case <-writes.Done():
			// The store may hang for longer; what it is at is lost to us.
			d.log.Error("results are not written, or it is not known whether they are", "count", d.results.count())
		}
	}

	close(d.jobs)
	d.workers.Wait()
	stopKeeping()
	keeping.Wait()
	if registered {
		d.signOff(ctx)
	}
}
