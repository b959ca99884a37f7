package httpapi

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/melodia/orchestrator/internal/task"
)

func TestHealth(t *testing.T) {
	t.Parallel()
	due := func(overdue time.Duration, err error) func(context.Context) (time.Duration, error) {
		return func(context.Context) (time.Duration, error) { return overdue, err }
	}
	away := fmt.Errorf("look for the next task: %w: "+marker, task.ErrUnavailable)
	tests := []struct {
		name       string
		health     func(context.Context) (time.Duration, error)
		dispatcher string
		running    int
		status     int
		want       string // latency is cut out
	}{
		{"idle", due(0, nil), "ok", 0, 200, `{"status":"ok","version":"1.2.3","checks":{"database":{"status":"ok","latency_seconds":N},"dispatcher":{"status":"ok","running":0,"oldest_due_seconds":0}}}`},
		{"busy", due(1500*time.Millisecond, nil), "ok", 3, 200, `{"status":"ok","version":"1.2.3","checks":{"database":{"status":"ok","latency_seconds":N},"dispatcher":{"status":"ok","running":3,"oldest_due_seconds":1.5}}}`},
		{"takes tasks only", due(0, nil), "off", 0, 200, `{"status":"ok","version":"1.2.3","checks":{"database":{"status":"ok","latency_seconds":N},"dispatcher":{"status":"off","running":0,"oldest_due_seconds":0}}}`},
		{"stopped", due(0, nil), "stopped", 2, 503, `{"status":"unavailable","version":"1.2.3","checks":{"database":{"status":"ok","latency_seconds":N},"dispatcher":{"status":"stopped","running":2,"oldest_due_seconds":0}}}`},
		{"no database", due(0, away), "ok", 1, 503, `{"status":"unavailable","version":"1.2.3","checks":{"database":{"status":"unavailable","latency_seconds":null},"dispatcher":{"status":"ok","running":1,"oldest_due_seconds":null}}}`},
		{"no database, takes tasks only", due(0, away), "off", 0, 503, `{"status":"unavailable","version":"1.2.3","checks":{"database":{"status":"unavailable","latency_seconds":null},"dispatcher":{"status":"off","running":0,"oldest_due_seconds":null}}}`},
		{"another error", due(time.Second, errors.New(marker)), "stopped", 0, 503, `{"status":"unavailable","version":"1.2.3","checks":{"database":{"status":"unavailable","latency_seconds":null},"dispatcher":{"status":"stopped","running":0,"oldest_due_seconds":null}}}`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s := newService(t)
			s.store.health = tt.health
			s.dispatcher.health = func() (string, int) { return tt.dispatcher, tt.running }
			a := s.get("/health")
			if a.status != tt.status {
				t.Errorf("got status %d, want %d", a.status, tt.status)
			}
			got := a.text
			if latency, ok := a.at("checks", "database", "latency_seconds").(float64); ok {
				if latency < 0 || latency > healthTimeout.Seconds() {
					t.Errorf("got latency %v, want one between 0 and 1", latency)
				}
				before, after, _ := strings.Cut(got, `"latency_seconds":`)
				got = before + `"latency_seconds":N` + after[strings.Index(after, "}"):]
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			if strings.Contains(a.text, marker) {
				t.Errorf("the answer tells the cause: %s", a.text)
			}
			if got := a.header.Get("Content-Type"); got != "application/json" {
				t.Errorf("got Content-Type %q, want application/json", got)
			}
		})
	}
}

// However many ask during an outage, the log has a line a second.
func TestHealthInTheLog(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newService(t)
		s.store.health = func(context.Context) (time.Duration, error) { return 0, task.ErrUnavailable }
		for _, want := range []string{`"count":1,`, `"count":100,`} {
			for range 100 {
				s.serve(httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/health", nil))
			}
			if lines := strings.Count(s.log.String(), "health check failed"); !strings.Contains(s.log.String(), want) || lines > 2 {
				t.Errorf("the log has %d lines, want one a second, with %s: %s", lines, want, s.log)
			}
			<-time.After(time.Second)
		}
	})
}

// A database that accepts and then hangs costs a probe one second.
func TestHealthIsBounded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newService(t)
		s.store.health = func(ctx context.Context) (time.Duration, error) {
			<-ctx.Done()
			return 0, ctx.Err()
		}
		start := time.Now()
		a := s.serve(httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/health", nil))
		if took := time.Since(start); took != time.Second {
			t.Errorf("took %v, want 1s", took)
		}
		if a.status != http.StatusServiceUnavailable || a.at("checks", "database", "status") != "unavailable" {
			t.Errorf("got %d %s, want 503 because of the database", a.status, a.text)
		}
	})
}

// Liveness says nothing about anything but the process.
func TestLiveness(t *testing.T) {
	t.Parallel()
	s := newService(t)
	s.store.health = func(context.Context) (time.Duration, error) { return 0, task.ErrUnavailable }
	s.dispatcher.health = func() (string, int) { panic("asked") }
	a := s.get("/health/live")
	if a.status != http.StatusOK || a.text != `{"status":"ok"}` {
		t.Errorf(`got %d %s, want 200 {"status":"ok"}`, a.status, a.text)
	}
	if n := s.store.callCount(); n != 0 {
		t.Errorf("the store was asked %d times, want never", n)
	}
}

// An instance that can make no calls still takes tasks, and must not be ended for it.
func TestHealthDuringAShortage(t *testing.T) {
	t.Parallel()
	s := newService(t)
	s.dispatcher.short = task.ShortageResolver
	for dispatcher, want := range map[string]struct {
		status        int
		check, reason any
	}{
		"ok":      {http.StatusOK, "short", string(task.ShortageResolver)},
		"off":     {http.StatusOK, "off", nil},
		"stopped": {http.StatusServiceUnavailable, "stopped", nil},
	} {
		s.dispatcher.health = func() (string, int) { return dispatcher, 0 }
		a := s.get("/health")
		if status, reason := a.at("checks", "dispatcher", "status"), a.at("checks", "dispatcher", "reason"); a.status != want.status || status != want.check || reason != want.reason {
			t.Errorf("%s: got %d, %v, %v, want %+v", dispatcher, a.status, status, reason, want)
		}
	}
}
