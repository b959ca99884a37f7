package main

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"os/signal"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/melodia/orchestrator/internal/config"
)

const (
	// waitingLines is how many lines of the log wait for whoever reads it. Further
	// ones are dropped and counted.
	waitingLines = 1024
	// flushTime is what the last of them get at the end.
	flushTime = 200 * time.Millisecond
)

// newLogger returns the log that the settings ask for, and what it writes to, which
// is to be flushed at the end. Nobody who logs waits for w: a reader that stalls
// must not stall the service, nor one that goes away end it.
func newLogger(c *config.Config, w io.Writer) (*slog.Logger, *lineWriter) {
	options := &slog.HandlerOptions{Level: c.LogLevel}
	format := func(w io.Writer) slog.Handler { return slog.NewJSONHandler(w, options) }
	if c.LogFormat == "text" {
		format = func(w io.Writer) slog.Handler { return slog.NewTextHandler(w, options) }
	}
	signal.Ignore(syscall.SIGPIPE)
	lines := &lineWriter{waiting: make(chan []byte, waitingLines), stop: make(chan struct{}), stopped: make(chan struct{})}
	go lines.pass(w, format(w))
	return slog.New(format(lines)), lines
}

// lineWriter takes lines for a goroutine that writes them.
type lineWriter struct {
	waiting       chan []byte
	dropped       atomic.Int64
	stop, stopped chan struct{}
}

// Write takes a line, or drops it where too many wait. It never blocks or fails.
func (l *lineWriter) Write(line []byte) (int, error) {
	select {
	case l.waiting <- bytes.Clone(line): // its memory serves the next one
	default:
		l.dropped.Add(1)
	}
	return len(line), nil
}

// pass writes what waits to w until it is stopped. log, which writes to w too, says
// how many lines were dropped: after those that waited at the time, and while more
// come all the time once a second.
func (l *lineWriter) pass(w io.Writer, log slog.Handler) {
	defer close(l.stopped)
	var since time.Time // when it was seen first that lines were dropped
	write := func(line []byte) {
		if _, err := w.Write(line); err != nil {
			l.dropped.Add(1)
			return
		}
		count, now := l.dropped.Load(), time.Now()
		if count > 0 && since.IsZero() {
			since = now
		}
		if count == 0 || len(l.waiting) > 0 && now.Sub(since) < time.Second {
			return
		}
		since = time.Time{}
		r := slog.NewRecord(now, slog.LevelWarn, "lines of this log were dropped, they came faster than they could be written", 0)
		r.Add("count", count)
		if log.Handle(context.Background(), r) == nil {
			l.dropped.Add(-count)
		}
	}
	for {
		select {
		case line := <-l.waiting:
			write(line)
		case <-l.stop:
			for range len(l.waiting) {
				write(<-l.waiting)
			}
			return
		}
	}
}

// flush returns when all that was logged is written, or after flushTime. What is
// logged afterwards may be lost.
func (l *lineWriter) flush() {
	close(l.stop)
	select {
	case <-l.stopped:
	case <-time.After(flushTime):
	}
}
