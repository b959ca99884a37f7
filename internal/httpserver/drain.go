package httpserver

import (
	"context"
	"net/http"
	"time"
)

// drainInterval is how often Drain looks whether requests are left.
const drainInterval = 5 * time.Millisecond

// Drain closes the port and returns when every request that had arrived is answered,
// or when ctx ends. A request has arrived when its bytes are with this machine, on a
// connection that need not be accepted yet. From the beginning of Drain each answer closes
// its connection. [http.Server.Shutdown] is to follow: it closes a connection without an
// answer where it finds a request there that was not read before.
//
// Of a head that is not whole, or not read within ctx, there is no answer. Where the system
// is no Unix, requests count from when they are read.
func (l *Listener) Drain(ctx context.Context) {
	l.draining.Store(true)
	accepting := true
	tick := time.NewTicker(drainInterval)
	defer tick.Stop()
	// Between an Accept or a Read and what the Listener counts there is a microsecond in
	// which a request is in neither place. A second look finds it.
	for quiet := 0; quiet < 2; {
		if accepting && !arrived(l.Listener) {
			_ = l.Listener.Close()
			accepting = false
		}
		if !accepting && l.quiet() {
			quiet++
		} else {
			quiet = 0
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			_ = l.Listener.Close()
			return
		}
	}
}

// quiet reports that no request is being answered or received, and that no idle
// connection has bytes that were not read.
func (l *Listener) quiet() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.answering.first != nil {
		return false
	}
	for c := l.idle.first; c != nil; c = c.next {
		if c.active.Load() || arrived(c.Conn) {
			return false
		}
	}
	return true
}

// closeConnections has each answer close its connection once l is draining.
func (l *Listener) closeConnections(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if l.draining.Load() {
			w.Header()["Connection"] = []string{"close"}
		}
		next.ServeHTTP(w, r)
	})
}
