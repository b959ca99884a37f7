package dispatch

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/melodia/orchestrator/internal/task"
)

const (
	// watchInterval is how often the store is asked for watched tasks: other
	// instances end some of them. What ends here is known at once.
	watchInterval = 500 * time.Millisecond
	// maxWatches is the most that watch at a time. All of them may have to look
	// at their tasks at once, which is as many as may wait to be read.
	maxWatches = 2048
)

var errTooManyWatches = fmt.Errorf("%w: as many wait for the end of a task as may", task.ErrOverloaded)

// Watch returns a channel that is closed soon after the task with the given id has ended
// on any instance, or when Run is told to stop. For a task that ended before, and for an
// unknown id, it is closed soon too. The caller calls leave when it waits no more; leave
// may be called twice. The error wraps [task.ErrOverloaded].
func (d *Dispatcher) Watch(id task.ID) (ended <-chan struct{}, leave func(), err error) {
	return d.watches.add(id)
}

// watches are the tasks whose end requests wait for. A watch costs a channel and no
// connection: all watched tasks are looked up in one statement.
type watches struct {
	count atomic.Int64  // of watchers; where it is zero the lock is not taken
	begun chan struct{} // told of a new watch; buffered

	mu      sync.Mutex
	byID    map[task.ID]*watched
	stopped bool
}

type watched struct {
	ended    chan struct{}
	watchers int64
}

func newWatches() *watches {
	return &watches{begun: make(chan struct{}, 1), byID: make(map[task.ID]*watched)}
}

func (w *watches) add(id task.ID) (ended <-chan struct{}, leave func(), err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.stopped {
		over := make(chan struct{})
		close(over)
		return over, func() {}, nil
	}
	if w.count.Load() >= maxWatches {
		return nil, nil, errTooManyWatches
	}
	one := w.byID[id]
	if one == nil {
		one = &watched{ended: make(chan struct{})}
		w.byID[id] = one
	}
	one.watchers++
	w.count.Add(1)
	signal(w.begun)
	return one.ended, sync.OnceFunc(func() { w.leave(id, one) }), nil
}

func (w *watches) leave(id task.ID, one *watched) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.byID[id] != one {
		return // it has ended
	}
	one.watchers--
	w.count.Add(-1)
	if one.watchers == 0 {
		delete(w.byID, id)
	}
}

// end closes the channel of a task that has ended.
func (w *watches) end(id task.ID) {
	if w.count.Load() == 0 {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.tell(id)
}

// tell is end. w.mu is held.
func (w *watches) tell(id task.ID) {
	if one := w.byID[id]; one != nil {
		close(one.ended)
		w.count.Add(-one.watchers)
		delete(w.byID, id)
	}
}

// stop closes all channels. A watch that is added later is closed at once.
func (w *watches) stop() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.stopped = true
	for id := range w.byID {
		w.tell(id)
	}
}

func (w *watches) ids() []task.ID {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Collect(maps.Keys(w.byID))
}

// followWatched asks the store for the watched tasks until ctx ends.
func (d *Dispatcher) followWatched(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-d.watches.begun:
		}
		for {
			if !sleep(ctx, jitter(watchInterval)) {
				return
			}
			ids := d.watches.ids()
			if len(ids) == 0 {
				break
			}
			unfinished, err := d.store.Unfinished(ctx, ids)
			if err != nil {
				if ctx.Err() == nil {
					d.log.Error("asking for watched tasks failed", "count", len(ids), "error", err)
				}
				continue
			}
			left := make(map[task.ID]bool, len(unfinished))
			for _, id := range unfinished {
				left[id] = true
			}
			for _, id := range ids {
				if !left[id] {
					d.watches.end(id)
				}
			}
		}
	}
}
