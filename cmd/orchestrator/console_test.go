package main

import (
	"bytes"
	"log/slog"
	"regexp"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestConsole(t *testing.T) {
	t.Parallel()
	lines := func(color bool) string {
		var b bytes.Buffer
		log := slog.New(&console{w: &b, color: color, level: slog.LevelInfo})
		const id = "01939e0c-5c1e-7cc1-b1a6-9d8a4d6c1a2b"
		log.Debug("task succeeded", "task_id", id, "method", "POST", "url", "http://x/plays", "max_attempts", 3, "attempt", 1, "duration_seconds", 0.0123, "status_code", 200)
		log.Info("attempt failed, will retry", "task_id", id, "method", "GET", "url", "http://x", "max_attempts", 3, "attempt", 2, "error", "connection refused\x1b[2J", "wait_seconds", 1.2)
		log.Info("task snoozed", "task_id", id, "method", "POST", "url", "http://x", "max_attempts", 3, "attempt", 1, "status_code", 503, "wait_seconds", 30.0)
		log.Debug("something else")
		log.Warn("cannot", "error", "why\nnot")
		return regexp.MustCompile(`\d\d:\d\d:\d\d`).ReplaceAllString(b.String(), "T")
	}
	want := "T ✓ 6c1a2b POST http://x/plays 200 attempt 1/3 12ms\n" +
		"T ↻ 6c1a2b GET http://x attempt 2/3 next try in 1.2 s connection refused [2J\n" +
		"T ↻ 6c1a2b POST http://x 503 attempt 1/3 next try in 30.0 s\n" +
		"T cannot error=why not\n"
	if diff := cmp.Diff(want, lines(false)); diff != "" {
		t.Errorf("without colours (-want +got):\n%s", diff)
	}
	if got := regexp.MustCompile(`\x1b\[\d+m`).ReplaceAllString(lines(true), ""); got != want || got == lines(true) {
		t.Errorf("with colours: %q, want the same in colours", lines(true))
	}
	for name, tt := range map[string]struct {
		env  map[string]string
		want bool
	}{
		"a terminal": {map[string]string{"TERM": "xterm"}, true}, "NO_COLOR": {map[string]string{"NO_COLOR": "1"}, false}, "dumb": {map[string]string{"TERM": "dumb"}, false},
	} {
		if got := wantsColor(func(name string) string { return tt.env[name] }); got != tt.want {
			t.Errorf("%s: colours %t, want %t", name, got, tt.want)
		}
	}
	if isTerminal(&bytes.Buffer{}) {
		t.Error("a buffer passes for a terminal")
	}
}
