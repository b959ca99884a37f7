package main

import (
	"bytes"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestEcho(t *testing.T) {
	t.Parallel()
	var log bytes.Buffer
	e := &echo{log: slog.New(slog.NewTextHandler(&log, nil))}
	call := func(path, id string) int {
		r := httptest.NewRequest(http.MethodPost, path, strings.NewReader("body"))
		r.Header.Set("Orchestrator-Task-Id", id)
		r.Header.Set("Authorization", "Bearer hunter2")
		r.Header.Set("X-Tenant", "melodia")
		w := httptest.NewRecorder()
		e.ServeHTTP(w, r)
		return w.Code
	}
	for _, tt := range []struct {
		path, id string
		want     int
	}{
		{"/plays", "a", 200}, {"/status/418", "a", 418}, {"/status/99", "a", 200}, {"/status/x", "a", 200}, {"/delay/0", "a", 200}, {"/delay/-1", "a", 200},
		{"/fail/2", "a", 503}, {"/fail/2", "b", 503}, {"/fail/2", "a", 503}, {"/fail/2", "a", 200}, {"/fail/2", "b", 503}, {"/fail/2", "b", 200}, {"/fail/0", "a", 200},
	} {
		if got := call(tt.path, tt.id); got != tt.want {
			t.Errorf("%s of task %s is answered %d, want %d", tt.path, tt.id, got, tt.want)
		}
	}
	if got := log.String(); strings.Contains(got, "hunter2") || !strings.Contains(got, "[redacted]") || !strings.Contains(got, "melodia") {
		t.Errorf("the log has %s, want the headers without secrets", got)
	}
}

func TestEchoDelay(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		w := httptest.NewRecorder()
		(&echo{log: slog.New(slog.DiscardHandler)}).ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/delay/2", nil))
		if took := time.Since(began); took != 2*time.Second || w.Code != http.StatusOK {
			t.Errorf("/delay/2 answered %d after %v, want 200 after 2 s", w.Code, took)
		}
	})
}
