package postgres

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/melodia/orchestrator/internal/batch"
	"github.com/melodia/orchestrator/internal/task"
)

func TestGate(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		g := newGate(2, 1, task.ErrUnavailable)
		for range 2 {
			if err := g.acquire(t.Context()); err != nil {
				t.Fatalf("acquire a free slot: %v", err)
			}
		}
		// One waits, one more is refused at once.
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		begin := time.Now()
		var waiting error
		var waits sync.WaitGroup
		waits.Go(func() { waiting = g.acquire(ctx) })
		synctest.Wait()
		if err := g.acquire(t.Context()); !errors.Is(err, task.ErrOverloaded) || time.Since(begin) != 0 {
			t.Errorf("acquire where one waits already: %v after %v, want ErrOverloaded at once", err, time.Since(begin))
		}
		waits.Wait()
		if !errors.Is(waiting, task.ErrUnavailable) || !errors.Is(waiting, context.DeadlineExceeded) || time.Since(begin) != time.Second {
			t.Errorf("acquire whose ctx ended: %v after %v, want the gate's error and the cause after 1s", waiting, time.Since(begin))
		}
		// The place of the request that gave up is free, and a released slot goes to the next.
		waits.Go(func() { waiting = g.acquire(t.Context()) })
		synctest.Wait()
		g.release()
		waits.Wait()
		if waiting != nil {
			t.Errorf("acquire a slot that was released: %v", waiting)
		}
		// Closing turns away the request that waits, and waits for the two that hold slots.
		waits.Go(func() { waiting = g.acquire(t.Context()) })
		synctest.Wait()
		closed := make(chan struct{})
		go func() { g.close(); close(closed) }()
		waits.Wait()
		if !errors.Is(waiting, batch.ErrClosed) || !errors.Is(waiting, task.ErrUnavailable) {
			t.Errorf("acquire of a gate that was closed: %v, want ErrClosed and ErrUnavailable", waiting)
		}
		g.release()
		synctest.Wait()
		select {
		case <-closed:
			t.Error("close did not wait for the last slot")
		default:
		}
		g.release()
		<-closed
		g.close()
		if err := g.acquire(t.Context()); !errors.Is(err, batch.ErrClosed) {
			t.Errorf("acquire after close: %v, want ErrClosed", err)
		}
	})
}
