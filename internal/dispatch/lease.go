package dispatch

import (
	"context"
	"math/rand/v2"
	"time"

	"github.com/melodia/orchestrator/internal/task"
)

// session is the time during which a worker is known under one id. Whatever
// it claims is its own until the session ends.
type session struct {
	worker task.ID
	// calls ends when calls are to be cut off: with the session, or in a
	// shutdown. writes ends a moment after the latter.
	calls, writes context.Context //nolint:containedctx // the session's lifetime, not a call's
	lose          context.CancelCauseFunc
}

// heartbeatInterval leaves room for several lost heartbeats in one lease.
func (d *Dispatcher) heartbeatInterval() time.Duration { return d.options.Lease / 5 }

// register begins a new session within root and reports whether it could
// before ctx ended.
func (d *Dispatcher) register(ctx context.Context, root *session) bool {
	worker := d.options.NewID()
	for {
		err := d.store.Register(ctx, worker, d.options.Name, d.options.Concurrency)
		if err == nil {
			break
		}
		if ctx.Err() == nil {
			d.log.Error("registering failed, trying again", "error", err)
		}
		if !sleep(ctx, jitter(d.heartbeatInterval())) {
			return false
		}
	}
	calls, lose := context.WithCancelCause(root.calls)
	d.session.Store(&session{worker: worker, calls: calls, writes: root.writes, lose: lose})
	d.log.Info("registered", "worker_id", worker.String())
	return true
}

// keepAlive sends heartbeats until ctx ends and begins a new session when the
// old one is lost. It also has lost tasks reaped, but only right after a heartbeat
// and while they get through: after an outage of the database every worker looks
// silent, and each needs the time to say that it is not. No heartbeat waits for
// that: reaping may have to wait for a lock.
func (d *Dispatcher) keepAlive(ctx context.Context, root *session) {
	interval := d.heartbeatInterval()
	beat := time.NewTicker(interval)
	defer beat.Stop()
	reap := time.NewTimer(2 * interval)
	defer reap.Stop()
	reaped := make(chan struct{}, 1) // not empty while no reaping is under way
	reaped <- struct{}{}
	defer func() { <-reaped }()
	heardAll := true                          // no heartbeat has failed since the last reaping
	listening := &listener{since: time.Now()} // used by one reaping at a time, or in between
	for {
		reaping := false
		select {
		case <-ctx.Done():
			return
		case <-beat.C:
		case <-reap.C:
			reaping = true
		}
		if !d.heartbeat(ctx, root) {
			// One interval until the next heartbeat, and two during which all get through.
			reap.Reset(3 * interval)
			heardAll = false
			continue
		}
		if !reaping {
			continue
		}
		select {
		case <-reaped:
			if !heardAll {
				listening.deaf()
				heardAll = true
			}
			go func() {
				d.reap(ctx)
				d.endSilent(ctx, listening)
				reaped <- struct{}{}
			}()
		default:
		}
		reap.Reset(jitter(d.options.Lease / 3))
	}
}

// heartbeat renews the lease, or begins a new session where it is lost. It
// reports whether the lease was renewed.
func (d *Dispatcher) heartbeat(ctx context.Context, root *session) bool {
	s := d.session.Load()
	// A heartbeat that hangs ends before the next one is due: one alone does not cost the lease.
	beat, cancel := context.WithTimeout(ctx, d.heartbeatInterval())
	defer cancel()
	known, err := d.store.Heartbeat(beat, s.worker)
	switch {
	case ctx.Err() != nil:
		return false
	case err != nil:
		d.log.Error("heartbeat failed", "worker_id", s.worker.String(), "error", err)
		return false
	case !known:
		d.log.Warn("lease lost, running calls are cut off", "worker_id", s.worker.String(), "count", d.results.count())
		s.lose(errLeaseLost)
		d.register(ctx, root)
		return false
	}
	d.cutOffCancelled(beat, s)
	return true
}

// cutOffCancelled ends the calls that are to be cancelled and are made here,
// whichever instance was asked for it.
func (d *Dispatcher) cutOffCancelled(ctx context.Context, s *session) {
	if d.results.count() == 0 {
		return
	}
	claims, err := d.store.Cancelled(ctx, s.worker)
	if err != nil {
		if s.calls.Err() == nil {
			d.log.Error("looking for tasks to be cancelled failed", "error", err)
		}
		return
	}
	d.CutOff(claims)
}

// shownLost is how many lost tasks one line of the log names.
const shownLost = 10

// reap makes tasks due again whose worker is gone.
func (d *Dispatcher) reap(ctx context.Context) {
	worker := d.session.Load().worker
	lost, err := d.store.Reap(ctx, worker, d.results.held(), d.options.Lease)
	switch {
	case ctx.Err() != nil:
	case err != nil:
		d.log.Error("reaping failed", "error", err)
	case len(lost) > 0:
		d.log.Warn("took over lost tasks", "worker_id", worker.String(), "count", len(lost), "task_ids", texts(lost[:min(len(lost), shownLost)]))
		d.Wake()
	}
}

func texts(ids []task.ID) []string {
	out := make([]string, len(ids))
	for i, id := range ids {
		out[i] = id.String()
	}
	return out
}

// historyAhead is for how many days ahead the history has partitions, once an instance has
// run for some hours: they last for a long weekend during which none can be made.
const historyAhead = 7

// maintain makes partitions of the history ahead of time and drops old ones: at once, then every hour. An instance that has
// just started has other things to do than to make room for more than the next day.
func (d *Dispatcher) maintain(ctx context.Context) {
	for ahead := 1; ; ahead = min(ahead+1, historyAhead) {
		if err := d.store.KeepHistory(ctx, d.options.Retention, ahead); err != nil && ctx.Err() == nil {
			d.log.Error("keeping the history failed", "error", err)
		}
		if !sleep(ctx, jitter(time.Hour)) {
			return
		}
	}
}

// signOff tells the store that the worker is gone, so that no task has
// to wait for its lease to end.
func (d *Dispatcher) signOff(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), flushTimeout)
	defer cancel()
	if err := d.store.Unregister(ctx, d.session.Load().worker); err != nil {
		d.log.Error("signing off failed", "error", err)
	}
}

// jitter varies wait by 20 % in either direction, so that instances that
// started together do not ask together.
func jitter(wait time.Duration) time.Duration {
	return time.Duration(float64(wait) * (0.8 + 0.4*rand.Float64())) //nolint:gosec // not a secret
}

// sleep waits and reports whether ctx is still going on.
func sleep(ctx context.Context, wait time.Duration) bool {
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}
