// Package logging makes a log that delays no task: a slow log reader does not stall the
// service, and a log reader that goes away does not end it.
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
	// queuedLines is how many lines wait to be written. Further ones are dropped and counted.
	queuedLines = 1024
	// flushTime bounds what Flush waits.
	flushTime = 200 * time.Millisecond
)

// New returns a log of lines from level on, in the format "text" or else JSON, and the
// DroppingWriter that takes them to w. From then on SIGPIPE does not end the process.
func New(w io.Writer, format string, level slog.Level) (*slog.Logger, *DroppingWriter) {
	to := func(w io.Writer, level slog.Level) *slog.Logger {
		options := &slog.HandlerOptions{Level: level}
		if format == "text" {
			return slog.New(slog.NewTextHandler(w, options))
		}
		return slog.New(slog.NewJSONHandler(w, options))
	}
	signal.Ignore(syscall.SIGPIPE)
	d := &DroppingWriter{w: w, queue: make(chan []byte, queuedLines), stop: make(chan struct{}), stopped: make(chan struct{})}
	d.log = to(&d.about, slog.LevelWarn)
	go d.run()
	return to(d, level), d
}

// DroppingWriter writes lines in a goroutine of its own. Where its queue is full it drops
// lines, and then writes a line that says how many.
type DroppingWriter struct {
	w             io.Writer
	queue         chan []byte
	dropped       atomic.Int64
	stop, stopped chan struct{}

	// The goroutine's own: a line about those that were dropped, and when it was
	// seen first that some were.
	log   *slog.Logger
	about bytes.Buffer
	since time.Time
}

// Write queues a line, or drops it where the queue is full. It never blocks or fails.
func (d *DroppingWriter) Write(line []byte) (int, error) {
	select {
	case d.queue <- bytes.Clone(line): // slog uses its memory for the next one
	default:
		d.dropped.Add(1)
	}
	return len(line), nil
}

// Flush returns when all that was queued is written, or after 0.2 s. It is called once,
// at the end of the process: lines that come later may be lost.
func (d *DroppingWriter) Flush() {
	close(d.stop)
	select {
	case <-d.stopped:
	case <-time.After(flushTime):
	}
}

// run writes what is queued until it is stopped.
func (d *DroppingWriter) run() {
	defer close(d.stopped)
	for {
		select {
		case line := <-d.queue:
			d.write(line)
		case <-d.stop:
			for range len(d.queue) {
				d.write(<-d.queue)
			}
			return
		}
	}
}

// write writes a line, and then how many were dropped: where the queue is empty, or once a
// second where it never is.
func (d *DroppingWriter) write(line []byte) {
	if _, err := d.w.Write(line); err != nil {
		d.dropped.Add(1)
		return
	}
	count := d.dropped.Load()
	if count > 0 && d.since.IsZero() {
		d.since = time.Now()
	}
	if count == 0 || len(d.queue) > 0 && time.Since(d.since) < time.Second {
		return
	}
	d.since = time.Time{}
	d.about.Reset()
	d.log.Warn("lines of this log were dropped, they came faster than they could be written", "count", count)
	if _, err := d.w.Write(d.about.Bytes()); err == nil {
		d.dropped.Add(-count)
	}
}
