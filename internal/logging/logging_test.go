package logging

import (
	"bytes"
	"encoding/json"
	"log/slog"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

// stalled is a writer that takes nothing until it is released.
type stalled struct {
	released chan struct{}

	mu  sync.Mutex
	got bytes.Buffer
}

func (s *stalled) Write(p []byte) (int, error) {
	<-s.released
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.got.Write(p)
}

func (s *stalled) lines() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return strings.Split(strings.TrimSuffix(s.got.String(), "\n"), "\n")
}

func TestLogDropsAndCounts(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := &stalled{released: make(chan struct{})}
		log, lines := New(w, "json", slog.LevelInfo)
		log.Info("first")
		synctest.Wait() // it is being written
		const dropped = 77
		for n := range queuedLines + dropped {
			log.Info("line", "n", n)
		}

		close(w.released)
		synctest.Wait() // all is written
		log.Info("later")
		lines.Flush()

		var got []struct {
			Level, Msg string
			N, Count   int
		}
		for _, text := range w.lines() {
			entry := struct {
				Level, Msg string
				N, Count   int
			}{N: -1}
			if err := json.Unmarshal([]byte(text), &entry); err != nil {
				t.Fatalf("%v: %s", err, text)
			}
			got = append(got, entry)
		}
		if want := 1 + 1 + queuedLines + 1; len(got) != want {
			t.Fatalf("got %d lines, want %d", len(got), want)
		}
		told, last := got[len(got)-2], got[len(got)-1]
		if got[0].Msg != "first" || told.Count != dropped || told.Level != "WARN" || last.Msg != "later" {
			t.Errorf("got %+v first, and %+v and %+v in the end", got[0], told, last)
		}
		for n, entry := range got[1 : len(got)-2] {
			if entry.N != n {
				t.Fatalf("line %d is %+v, want what was logged as number %d", n, entry, n)
			}
		}
	})
}

// While more come all the time, one line a second says how many were dropped.
func TestLogUnderOverload(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := slow{new(bytes.Buffer)}
		log, lines := New(w, "json", slog.LevelError)
		const seconds, perSecond = 5, 10 * 1000 // of which a reader takes a tenth
		for range seconds * perSecond {
			log.Error("line")
			<-time.After(time.Second / perSecond)
		}
		<-time.After(queuedLines * time.Millisecond)
		lines.Flush()
		written, told, dropped := 0, 0, 0
		for line := range strings.Lines(w.String()) {
			var entry struct {
				Msg   string
				Count int
			}
			if err := json.Unmarshal([]byte(line), &entry); err != nil {
				t.Fatalf("%v: %s", err, line)
			}
			if dropped += entry.Count; entry.Msg == "line" {
				written++
			} else {
				told++
			}
		}
		if written+dropped != seconds*perSecond {
			t.Errorf("%d lines written and %d dropped of %d", written, dropped, seconds*perSecond)
		}
		if told < seconds || told > seconds+2 {
			t.Errorf("it was told %d times in %d seconds", told, seconds)
		}
	})
}

// slow takes a line a millisecond.
type slow struct{ *bytes.Buffer }

func (s slow) Write(p []byte) (int, error) {
	<-time.After(time.Millisecond)
	return s.Buffer.Write(p)
}

// What waits at the end is written while it is taken.
func TestLogIsWrittenAtTheEnd(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := slow{new(bytes.Buffer)}
		log, lines := New(w, "text", slog.LevelInfo)
		const n = 100
		for range n {
			log.Info("line")
		}
		lines.Flush()
		if got := strings.Count(w.String(), "msg=line\n"); got != n {
			t.Errorf("%d lines are written, want %d", got, n)
		}
	})
}

// Who ends does not wait for a reader that never comes.
func TestLogEnds(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := &stalled{released: make(chan struct{})}
		log, lines := New(w, "text", slog.LevelInfo)
		log.Info("first")
		start := time.Now()
		lines.Flush()
		if took := time.Since(start); took != flushTime {
			t.Errorf("flush took %v, want %v", took, flushTime)
		}
		close(w.released)
		synctest.Wait()
		log.Info("too late") // and nothing happens
		if got := w.lines(); len(got) != 1 || !strings.HasSuffix(got[0], "level=INFO msg=first") {
			t.Errorf("got %q", got)
		}
	})
}

// full is a disk that has room for some lines at times.
type full struct {
	room int
	bytes.Buffer
}

func (f *full) Write(p []byte) (int, error) {
	if f.room == 0 {
		return 0, syscall.ENOSPC
	}
	f.room--
	return f.Buffer.Write(p)
}

// What could not be written is counted among what was dropped, and so is the line
// that says so.
func TestLogCountsWhatFails(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := &full{}
		log, lines := New(w, "text", slog.LevelInfo)
		for _, step := range []struct{ room, lines int }{{0, 3}, {1, 1}, {0, 2}, {9, 1}, {9, 1}} {
			w.room = step.room
			for range step.lines {
				log.Info("line")
			}
			synctest.Wait()
		}
		lines.Flush()
		var got []string
		for line := range strings.Lines(w.String()) {
			_, text, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "level=")
			got = append(got, text)
		}
		want := []string{
			"INFO msg=line", "INFO msg=line",
			`WARN msg="lines of this log were dropped, they came faster than they could be written" count=5`, "INFO msg=line",
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("the log (-want +got):\n%s", diff)
		}
	})
}
