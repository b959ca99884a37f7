package main

import (
	"bytes"
	"context"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestTeardown(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		type turn struct {
			Name string
			At   time.Duration
		}
		begins := make(chan turn, 5)
		var log bytes.Buffer
		down := teardown{log: slog.New(slog.NewTextHandler(&log, nil))}
		began := time.Now()
		push := func(name string, limit time.Duration, stop func(context.Context)) {
			down.push(name, limit, func(ctx context.Context) {
				begins <- turn{name, time.Since(began)}
				stop(ctx)
			})
		}
		in := func(d time.Duration) func(context.Context) { return func(context.Context) { <-time.After(d) } }
		never := make(chan struct{})
		defer close(never)
		want := []turn{{"dispatcher", 0}, {"HTTP server", 7 * time.Second}, {"connections", 8 * time.Second},
			{"deliverer", 8001 * time.Millisecond}, {"callers", 8201 * time.Millisecond}}
		push("callers", 0, in(time.Millisecond))
		push("deliverer", 0, func(context.Context) { <-never })
		push("connections", 0, in(time.Millisecond))
		push("HTTP server", 8*time.Second, func(ctx context.Context) { <-ctx.Done() }) // as its Shutdown does
		push("dispatcher", 9*time.Second, in(7*time.Second))
		down.run()
		down.run()
		took := time.Since(began)
		var turns []turn
		for range len(want) {
			turns = append(turns, <-begins)
		}
		if diff := cmp.Diff(want, turns); diff != "" {
			t.Errorf("turns (-want +got):\n%s", diff)
		}
		if want := 8202 * time.Millisecond; took != want {
			t.Errorf("it took %v, want %v", took, want)
		}
		if got := log.String(); strings.Count(got, "\n") != 2 || !strings.Contains(got, `part="HTTP server" limit_seconds=1`+"\n") || !strings.Contains(got, "part=deliverer limit_seconds=0.2\n") {
			t.Errorf("the log is %q, want the HTTP server and the deliverer in it", got)
		}
	})
}
