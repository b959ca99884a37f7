package dispatch

import (
	"context"
	"sync"
	"time"

	"github.com/melodia/orchestrator/internal/task"
)

// holdBackRest is the least time between two moves of tasks from the same lane.
const holdBackRest = 100 * time.Millisecond

// holdBackStore is the part of the store that moves many waiting tasks at once to the lanes
// of their hosts: of plain tasks those that are due, and those of a lane. moved is how many of each
// host, and more reports that there may be others.
type holdBackStore interface {
	HoldBack(ctx context.Context, hosts []string) (moved map[string]int, more bool, err error)
	HoldBackInLane(ctx context.Context, lane task.Lane, hosts []string) (moved map[string]int, more bool, err error)
}

// heldBack is the lanes in which tasks of unhealthy hosts were found.
type heldBack struct {
	added chan struct{} // buffered

	// at and moved are of the last move of tasks without a lane: the claim loop's own.
	at    time.Time
	moved bool

	mu    sync.Mutex
	lanes map[task.Lane]struct{}
}

func newHeldBack() *heldBack {
	return &heldBack{added: make(chan struct{}, 1), lanes: make(map[task.Lane]struct{})}
}

// add notes that a task of a lane was found whose host is not healthy.
func (h *heldBack) add(lane task.Lane) {
	h.mu.Lock()
	h.lanes[lane] = struct{}{}
	h.mu.Unlock()
	signal(h.added)
}

func (h *heldBack) take() (lanes []task.Lane) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for lane := range h.lanes {
		lanes = append(lanes, lane)
	}
	clear(h.lanes)
	return lanes
}

// holdBackPlain moves due tasks without a lane after a claim that found some whose hosts
// are not healthy. It is a step of the claim loop, which then finds what was behind them.
func (d *Dispatcher) holdBackPlain(ctx context.Context) {
	if d.heldBack.moved || time.Since(d.heldBack.at) >= holdBackRest {
		d.heldBack.moved = d.move(ctx, "", d.store.HoldBack)
		d.heldBack.at = time.Now()
	}
}

// holdBack moves tasks of lanes until ctx ends.
func (d *Dispatcher) holdBack(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-d.heldBack.added:
		}
		for _, lane := range d.heldBack.take() {
			for d.move(ctx, lane, func(ctx context.Context, hosts []string) (map[string]int, bool, error) {
				return d.store.HoldBackInLane(ctx, lane, hosts)
			}) {
			}
		}
		if !sleep(ctx, holdBackRest) {
			return
		}
	}
}

// move moves tasks of a lane to those of their hosts and reports whether there may be more.
func (d *Dispatcher) move(ctx context.Context, lane task.Lane, f func(context.Context, []string) (map[string]int, bool, error)) (more bool) {
	moved, more, err := f(ctx, d.hosts.lanes())
	if err != nil {
		if ctx.Err() == nil {
			d.log.Error("moving tasks to the lanes of their hosts failed", "error", err)
		}
		return false
	}
	for host := range moved {
		d.lanes.note(lane.At(host), 0)
	}
	return more
}
