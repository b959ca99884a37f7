package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/pprof"
	"net/url"
	"strings"
	"time"

	"github.com/melodia/orchestrator/internal/httpapi"
	"github.com/melodia/orchestrator/internal/task"
)

// serveDebug serves Go's profiles at /debug/pprof/ on a port of the loopback
// address; none where port is 0. They show what the process has in memory, so
// only programs on the machine reach them, and no web page in a browser there
// (see onlyLoopback). The returned function stops it.
func serveDebug(ctx context.Context, port int, log *slog.Logger) (stop func(), err error) {
	if port == 0 {
		return func() {}, nil
	}
	var lc net.ListenConfig
	listener, err := lc.Listen(ctx, "tcp", fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		return nil, fmt.Errorf("DEBUG_PORT: %w", err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	server := &http.Server{Handler: onlyLoopback(mux), ReadHeaderTimeout: 10 * time.Second}
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = server.Serve(listener) // ends by the Close below
	}()
	log.Info("serving profiles", "url", "http://"+listener.Addr().String()+"/debug/pprof/")
	return func() {
		_ = server.Close()
		<-served
	}, nil
}

// onlyLoopback refuses requests that name another host than the loopback
// address. A browser sends such requests for a page whose own name was made to
// lead there (DNS rebinding), and would show that page the answer.
func onlyLoopback(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch host := (&url.URL{Host: r.Host}).Hostname(); strings.ToLower(host) {
		case "127.0.0.1", "localhost", "::1":
			next.ServeHTTP(w, r)
			return
		}
		p := httpapi.Problem{
			Type: "about:blank", Title: http.StatusText(http.StatusMisdirectedRequest), Status: http.StatusMisdirectedRequest,
			Detail:   "Profiles are served only to 127.0.0.1, localhost and [::1]; the request's Host is another name.",
			Instance: task.NewID(time.Now(), rand.Uint64()).String(), //nolint:gosec // not a secret
		}
		w.Header().Set("Content-Type", "application/problem+json")
		w.WriteHeader(p.Status)
		_ = json.NewEncoder(w).Encode(&p) // an error means that the caller is gone
	})
}
