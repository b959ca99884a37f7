package main

import (
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/melodia/orchestrator/internal/task"
)

const (
	// echoBodyLimit is how much of a call's body is logged and sent back.
	echoBodyLimit = 4 << 10
	// echoMaxDelay is the longest that /delay waits, in seconds.
	echoMaxDelay = 600
	// echoRemembered is how many tasks /fail remembers.
	echoRemembered = 10_000

	echoMessage = "echo target was called"
)

// echo answers every call with its own body and logs it, so that one can watch what
// the service does. Its path says how else:
//
//	/status/503  answers 503, and so on from 200 to 599
//	/delay/2     answers after two seconds, of 600 at most
//	/fail/2      answers 503 twice, then 200, to each task
type echo struct {
	log *slog.Logger

	mu    sync.Mutex
	calls map[string]int // of /fail, by task and path
}

// ServeHTTP is http.Handler.
func (e *echo) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(io.LimitReader(r.Body, echoBodyLimit))
	if err != nil {
		return // the caller gave up
	}
	status := http.StatusOK
	if n, ok := echoNumber(r.URL.Path, "/status/"); ok && n >= 200 && n <= 599 {
		status = n
	}
	if n, ok := echoNumber(r.URL.Path, "/fail/"); ok && e.count(r) <= n {
		status = http.StatusServiceUnavailable
	}
	if n, ok := echoNumber(r.URL.Path, "/delay/"); ok {
		select {
		case <-time.After(time.Duration(min(n, echoMaxDelay)) * time.Second):
		case <-r.Context().Done():
			return // the caller gave up
		}
	}
	e.log.Info(echoMessage, "method", r.Method, "url", r.URL.Path, "status_code", status,
		"task_id", r.Header.Get("Orchestrator-Task-Id"), "attempt", r.Header.Get("Orchestrator-Attempt"),
		"max_attempts", r.Header.Get("Orchestrator-Max-Attempts"), "headers", shownHeaders(r.Header), "body", string(body))
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.WriteHeader(status)
	_, _ = w.Write(body) // a status without a body refuses it
}

// count counts in a call of /fail and returns how many its task has made.
func (e *echo) count(r *http.Request) int {
	key := r.Header.Get("Orchestrator-Task-Id") + r.URL.Path
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.calls == nil || len(e.calls) >= echoRemembered {
		e.calls = map[string]int{}
	}
	e.calls[key]++
	return e.calls[key]
}

// echoNumber returns the number behind prefix, where the path is no more than that.
func echoNumber(path, prefix string) (n int, ok bool) {
	rest, ok := strings.CutPrefix(path, prefix)
	if !ok {
		return 0, false
	}
	n, err := strconv.Atoi(rest)
	return n, err == nil && n >= 0
}

// shownHeaders are those of a call, without the values of secret ones.
func shownHeaders(h http.Header) map[string]string {
	shown := make(map[string]string, len(h))
	for name, values := range h {
		shown[name] = strings.Join(values, ", ")
		if task.IsSecretHeader(name) {
			shown[name] = "[redacted]"
		}
	}
	return shown
}

// serveEcho serves an [echo] on listener. The returned function stops it.
func serveEcho(listener net.Listener, log *slog.Logger) (stop func()) {
	server := &http.Server{ReadHeaderTimeout: 10 * time.Second, Handler: &echo{log: log}}
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = server.Serve(listener) // ends by the Close below
	}()
	return func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if server.Shutdown(ctx) != nil {
			_ = server.Close()
		}
		<-served
	}
}
