// Package logging makes a log that nobody waits for: a reader that stalls must not
// stall the service, nor one that goes away end it.
package logging

import (
	"bytes"
	"io"
	"log/slog"
	"os/signal"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	// waitingLines is how many lines wait for whoever reads the log. Further ones
	// are dropped and counted.
	waitingLines = 1024
	// flushTime is what the last of them get at the end.
	flushTime = 200 * time.Millisecond
)

// New returns a log of lines from level on, in the format "text" or else JSON, which
// goes to w, and what it writes to. From then on SIGPIPE does not end the process.
func New(w io.Writer, format string, level slog.Level) (*slog.Logger, *Lines) {
	to := func(w io.Writer, level slog.Level) *slog.Logger {
		options := &slog.HandlerOptions{Level: level}
		if format == "text" {
			return slog.New(slog.NewTextHandler(w, options))
		}
		return slog.New(slog.NewJSONHandler(w, options))
	}
	signal.Ignore(syscall.SIGPIPE)
	l := &Lines{w: w, waiting: make(chan []byte, waitingLines), stop: make(chan struct{}), stopped: make(chan struct{})}
	l.log = to(&l.about, slog.LevelWarn)
	go l.pass()
	return to(l, level), l
}

// Lines are on their way to a writer, by a goroutine of their own.
type Lines struct {
	w             io.Writer
	waiting       chan []byte
	dropped       atomic.Int64
	stop, stopped chan struct{}

	// The goroutine's own: a line about those that were dropped, and when it was
	// seen first that some were.
	log   *slog.Logger
	about bytes.Buffer
	since time.Time
}

// Write takes a line, or drops it where too many wait. It never blocks or fails.
func (l *Lines) Write(line []byte) (int, error) {
	select {
	case l.waiting <- bytes.Clone(line): // its memory serves the next one
	default:
		l.dropped.Add(1)
	}
	return len(line), nil
}

// Flush returns when all that was taken is written, or after 0.2 s. It is called
// once, at the end: what is taken afterwards may be lost.
func (l *Lines) Flush() {
	close(l.stop)
	select {
	case <-l.stopped:
	case <-time.After(flushTime):
	}
}

// pass writes what waits until it is stopped.
func (l *Lines) pass() {
	defer close(l.stopped)
	for {
		select {
		case line := <-l.waiting:
			l.write(line)
		case <-l.stop:
			for range len(l.waiting) {
				l.write(<-l.waiting)
			}
			return
		}
	}
}

// write writes a line, and then how many were dropped: after those that waited at
// the time, and while more come all the time once a second.
func (l *Lines) write(line []byte) {
	if _, err := l.w.Write(line); err != nil {
		l.dropped.Add(1)
		return
	}
	count := l.dropped.Load()
	if count > 0 && l.since.IsZero() {
		l.since = time.Now()
	}
	if count == 0 || len(l.waiting) > 0 && time.Since(l.since) < time.Second {
		return
	}
	l.since = time.Time{}
	l.about.Reset()
	l.log.Warn("lines of this log were dropped, they came faster than they could be written", "count", count)
	if _, err := l.w.Write(l.about.Bytes()); err == nil {
		l.dropped.Add(-count)
	}
}
