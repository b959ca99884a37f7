package main

import (
	"context"
	"log/slog"
	"slices"
	"time"
)

// drainTime is what each part of the service gets at least to stop. With
// SHUTDOWN_GRACE, [dispatchTime] and the log's last lines, all of it stays below the
// 10 s after which Cloud Run kills the process.
const drainTime = 200 * time.Millisecond

// teardown stops the parts of the service, those that were started last first.
type teardown struct {
	log   *slog.Logger
	parts []part
}

// part is something that was started and must be stopped.
type part struct {
	name  string
	limit time.Duration
	stop  func(context.Context)
}

// push adds a part. stop returns when it has stopped; its context ends when the
// teardown goes on without it: limit after [teardown.run] began, but [drainTime] after
// the part's turn came at the earliest.
func (t *teardown) push(name string, limit time.Duration, stop func(context.Context)) {
	t.parts = append(t.parts, part{name, limit, stop})
}

// run stops all parts and returns when each has stopped or had its time. The log names
// those that took longer. A second run finds nothing left to stop.
func (t *teardown) run() {
	began := time.Now()
	for _, p := range slices.Backward(t.parts) {
		limit := max(p.limit-time.Since(began), drainTime)
		ctx, cancel := context.WithTimeout(context.Background(), limit)
		stopped := make(chan struct{})
		go func() {
			defer close(stopped)
			p.stop(ctx)
		}()
		select {
		case <-stopped:
		case <-ctx.Done():
		}
		if ctx.Err() != nil {
			t.log.Warn("a part of the service did not stop in time, going on without it", "part", p.name, "limit_seconds", limit.Seconds())
		}
		cancel()
	}
	t.parts = nil
}
