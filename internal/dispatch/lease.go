package dispatch

import (
	"context"
	"math/rand/v2"
	"time"

	"github.com/melodia/orchestrator/internal/task"
)

// session is the time during which a worker is known under one id. Whatever
// it claims is its own until the session's context ends.
type session struct {
	worker task.ID
	ctx    context.Context //nolint:containedctx // it is the session's lifetime, not a call's
	lose   context.CancelCauseFunc
}

// heartbeatInterval leaves room for several lost heartbeats in one lease.
func (d *Dispatcher) heartbeatInterval() time.Duration { return d.options.Lease / 5 }

// register begins a new session and reports whether it could before ctx ended.
// work is the end of all sessions.
func (d *Dispatcher) register(ctx, work context.Context) bool {
	worker := d.options.NewID()
	for {
		err := d.store.Register(ctx, worker, d.options.Name)
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
	s := &session{worker: worker}
	s.ctx, s.lose = context.WithCancelCause(work)
	d.mu.Lock()
	d.session = s
	d.mu.Unlock()
	d.log.Info("registered", "worker_id", worker)
	return true
}

// keepAlive sends heartbeats until ctx ends and begins a new session when the
// old one is lost. It also reaps, but only while its own heartbeats get
// through: after an outage of the database every worker looks silent, and each
// needs the time to say that it is not.
func (d *Dispatcher) keepAlive(ctx, work context.Context) {
	interval := d.heartbeatInterval()
	nextReap := time.Now().Add(2 * interval)
	for sleep(ctx, interval) {
		s := d.currentSession()
		known, err := d.store.Heartbeat(ctx, s.worker)
		if ctx.Err() != nil {
			return
		}
		switch {
		case err != nil:
			d.log.Error("heartbeat failed", "worker_id", s.worker, "error", err)
			nextReap = time.Now().Add(2 * interval)
		case !known:
			d.log.Warn("lease lost, running calls are cut off", "worker_id", s.worker, "count", len(d.held()))
			s.lose(errLeaseLost)
			if !d.register(ctx, work) {
				return
			}
		case !time.Now().Before(nextReap):
			d.reap(ctx, s)
			nextReap = time.Now().Add(jitter(d.options.Lease / 3))
		}
	}
}

// reap makes tasks due again that nobody can finish.
func (d *Dispatcher) reap(ctx context.Context, s *session) {
	count, err := d.store.Reap(ctx, s.worker, d.held(), d.options.Lease)
	switch {
	case err != nil:
		d.log.Error("reaping failed", "error", err)
	case count > 0:
		d.log.Warn("took over lost tasks", "count", count)
		d.Notify(0)
	}
}

// keepHouse looks after the history: at once, then every hour.
func (d *Dispatcher) keepHouse(ctx context.Context) {
	for {
		if err := d.store.KeepHistory(ctx, d.options.Retention); err != nil && ctx.Err() == nil {
			d.log.Error("keeping the history failed", "error", err)
		}
		if !sleep(ctx, jitter(time.Hour)) {
			return
		}
	}
}

// signOff tells the store that the worker is gone, so that nobody has to wait
// for its lease to end.
func (d *Dispatcher) signOff(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), flushTimeout)
	defer cancel()
	if err := d.store.Unregister(ctx, d.currentSession().worker); err != nil {
		d.log.Error("signing off failed", "error", err)
	}
}

func (d *Dispatcher) currentSession() *session {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.session
}

func (d *Dispatcher) held() []task.ID {
	d.mu.Lock()
	defer d.mu.Unlock()
	ids := make([]task.ID, 0, len(d.running))
	for id := range d.running {
		ids = append(ids, id)
	}
	return ids
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
