package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/melodia/orchestrator/internal/config"
	"github.com/melodia/orchestrator/internal/postgres/pgtest"
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
		log, lines := newLogger(&config.Config{LogFormat: "json"}, w)
		log.Info("first")
		synctest.Wait() // it is being written
		const dropped = 77
		for n := range waitingLines + dropped {
			log.Info("line", "n", n)
		}

		close(w.released)
		synctest.Wait() // all is written
		log.Info("later")
		lines.flush()

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
		if want := 1 + 1 + waitingLines + 1; len(got) != want {
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
		log, lines := newLogger(&config.Config{LogFormat: "json", LogLevel: slog.LevelError}, w)
		const seconds, perSecond = 5, 10 * 1000 // of which a reader takes a tenth
		for range seconds * perSecond {
			log.Error("line")
			<-time.After(time.Second / perSecond)
		}
		<-time.After(waitingLines * time.Millisecond)
		lines.flush()
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
		log, lines := newLogger(&config.Config{LogFormat: "text"}, w)
		const n = 100
		for range n {
			log.Info("line")
		}
		lines.flush()
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
		log, lines := newLogger(&config.Config{LogFormat: "text"}, w)
		log.Info("first")
		start := time.Now()
		lines.flush()
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
		log, lines := newLogger(&config.Config{LogFormat: "text"}, w)
		for _, step := range []struct{ room, lines int }{{0, 3}, {1, 1}, {0, 2}, {9, 1}, {9, 1}} {
			w.room = step.room
			for range step.lines {
				log.Info("line")
			}
			synctest.Wait()
		}
		lines.flush()
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

// A reader that stalls, or goes away, keeps no task from being carried out, nor the
// process from ending in order.
func TestLogThatNobodyReads(t *testing.T) {
	t.Parallel()
	for name, stop := range map[string]func(io.Closer) error{
		"stalls":    func(io.Closer) error { return nil },
		"goes away": io.Closer.Close,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			target := newTarget(t, statusOf)
			cmd := newCommand("serve", "DATABASE_URL="+pgtest.URL(t))
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				_ = cmd.Process.Kill() // it has ended already where all went well
				_ = cmd.Wait()
			})
			p := &process{t: t}
			for lines := bufio.NewReader(out); p.url == ""; {
				line, err := lines.ReadBytes('\n')
				if err != nil {
					t.Fatal(err)
				}
				p.url, _ = servingAt(line)
			}
			if err := stop(out); err != nil {
				t.Fatal(err)
			}

			const tasks = 1000 // their lines are more than a pipe holds, which is 64 KiB
			item := fmt.Sprintf(`{"url":%q}`, target.url+"/200")
			if a := p.do(http.MethodPost, "/tasks/batch", `{"tasks":[`+strings.Repeat(item+",", tasks-1)+item+`]}`); a.status != http.StatusAccepted {
				t.Fatalf("got %d %s", a.status, a.raw)
			}
			eventually(t, func() bool {
				return strings.Contains(p.do(http.MethodGet, "/tasks/counts", "").raw, fmt.Sprintf(`"succeeded":{"count":%d,`, tasks))
			}, func() string { return p.do(http.MethodGet, "/tasks/counts", "").raw })
			if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
			ended := make(chan *os.ProcessState, 1)
			go func() {
				state, err := cmd.Process.Wait() // Wait of cmd would close the pipe
				if err != nil {
					t.Error(err)
				}
				ended <- state
			}()
			select {
			case state := <-ended:
				if !state.Success() {
					t.Errorf("it ended with %v", state)
				}
			case <-time.After(patience):
				t.Errorf("it did not end within %v", patience)
			}
		})
	}
}
