package main

import (
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// echoBodyLimit is how much of a call's body is logged and sent back.
const echoBodyLimit = 4 << 10

// serveEcho answers every call on listener with its own body and logs it, so
// that one can watch what the service does. The path /status/503 answers 503,
// and so on. The returned function stops it.
func serveEcho(listener net.Listener, log *slog.Logger) (stop func()) {
	server := &http.Server{
		ReadHeaderTimeout: 10 * time.Second,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			body, err := io.ReadAll(io.LimitReader(r.Body, echoBodyLimit))
			if err != nil {
				return // the caller gave up
			}
			status := http.StatusOK
			if code, ok := strings.CutPrefix(r.URL.Path, "/status/"); ok {
				if n, err := strconv.Atoi(code); err == nil && n >= 200 && n <= 599 {
					status = n
				}
			}
			log.Info("echo target was called", "method", r.Method, "path", r.URL.Path, "status_code", status,
				"task_id", r.Header.Get("Orchestrator-Task-Id"), "attempt", r.Header.Get("Orchestrator-Attempt"), "body", string(body))
			w.Header().Set("Content-Type", "text/plain; charset=utf-8")
			w.WriteHeader(status)
			_, _ = w.Write(body) // a status without a body refuses it
		}),
	}
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
