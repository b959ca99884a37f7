package postgres

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/melodia/orchestrator/internal/batch"
	"github.com/melodia/orchestrator/internal/task"
)

// gate bounds how many statements of one kind run at a time, so that the other
// kinds find a connection however many requests of this one come in. All methods
// may be called concurrently.
type gate struct {
	slots      chan struct{}
	maxWaiting int64
	waiting    atomic.Int64
	late       error
	closed     chan struct{}
	closing    sync.Once
}

// newGate returns a gate with that many slots, for which at most maxWaiting requests
// wait. The error of a request that waited in vain wraps late.
func newGate(slots int, maxWaiting int64, late error) *gate {
	return &gate{slots: make(chan struct{}, slots), maxWaiting: maxWaiting, late: late, closed: make(chan struct{})}
}

// acquire takes a slot, which the caller has to release; it waits for one until ctx
// ends. Where acquire returns an error no slot is taken: [task.ErrOverloaded], at
// once, where maxWaiting requests wait already; the gate's late and the cause of ctx
// where ctx ended first; [batch.ErrClosed] after close.
func (g *gate) acquire(ctx context.Context) error {
	select {
	case g.slots <- struct{}{}:
		return nil
	default:
	}
	defer g.waiting.Add(-1)
	if g.waiting.Add(1) > g.maxWaiting {
		return fmt.Errorf("%w: %d requests wait for the database already", task.ErrOverloaded, g.maxWaiting)
	}
	select {
	case g.slots <- struct{}{}:
		return nil
	case <-g.closed:
		return fmt.Errorf("%w: %w", task.ErrUnavailable, batch.ErrClosed)
	case <-ctx.Done():
		return fmt.Errorf("%w: others held the database until the time was over: %w", g.late, context.Cause(ctx))
	}
}

// release gives a slot back.
func (g *gate) release() { <-g.slots }

// close waits until every slot was released; later calls of acquire return an error.
// It may be called twice.
func (g *gate) close() {
	g.closing.Do(func() {
		close(g.closed)
		for range cap(g.slots) {
			g.slots <- struct{}{}
		}
	})
}
