package httpserver

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"runtime/debug"
	"time"

	"github.com/melodia/orchestrator/internal/logging"
	"github.com/melodia/orchestrator/internal/task"
)

// Options are what a [Guard] works with.
type Options struct {
	Authenticator authenticator
	// Rate is how many requests a second one principal may make; 0: any number.
	// Burst is how many of them at once.
	Rate  float64
	Burst int
	// BasePath is where a gateway serves the service, as [IsPathPrefix] has it; "" is the root.
	BasePath string
	// TrustedProxies are the networks of proxies whose X-Forwarded-Prefix counts.
	TrustedProxies []netip.Prefix
	// NewID makes the ids of requests that are reported.
	NewID func() task.ID
	Log   *slog.Logger
}

// Guard is what all doors stand behind: who may make requests, how many of them, how much
// memory they take, and what the log says of those that fail. Make one with [NewGuard];
// its middleware is that of a [Door].
type Guard struct {
	o     Options
	rates *rates

	bodies     MemoryBudget // of requests that make no call
	callBodies MemoryBudget // of requests whose calls are under way
	answers    MemoryBudget

	turnedAway   logging.Limiter // answers of 429 and 503
	unauthorized logging.Limiter // answers of 401 and 403
}

// NewGuard returns a Guard.
func NewGuard(o Options) *Guard {
	return &Guard{
		o: o, rates: newRates(o.Rate, o.Burst),
		bodies:     MemoryBudget{max: maxBodies, small: smallBody},
		callBodies: MemoryBudget{max: maxBodies, small: smallBody},
		answers:    MemoryBudget{max: maxAnswers, small: smallAnswer},
	}
}

// Bodies counts the bytes of request bodies in memory, but for those of CallBodies.
func (g *Guard) Bodies() *MemoryBudget { return &g.bodies }

// CallBodies counts the bytes of request bodies whose calls are under way.
func (g *Guard) CallBodies() *MemoryBudget { return &g.callBodies }

// Answers counts the bytes of answers, from when they are made until they are written.
func (g *Guard) Answers() *MemoryBudget { return &g.answers }

// Report writes into the log what the caller of a failed request must not see, and returns
// the id of the request, under which it stands there. status is what the request is
// answered with. Answers of 401, 403, 429 and 503 write one line a second.
func (g *Guard) Report(ctx context.Context, status int, err error) (requestID string) {
	requestID = g.o.NewID().String()
	switch status {
	case http.StatusInternalServerError:
		g.o.Log.ErrorContext(ctx, "request failed", "request_id", requestID, "error", err)
	case http.StatusTooManyRequests, http.StatusServiceUnavailable:
		if ctx.Err() != nil {
			break // the caller is gone
		}
		if count := g.turnedAway.Count(); count > 0 {
			g.o.Log.WarnContext(ctx, "requests turned away", "count", count, "status", status, "request_id", requestID, "error", err)
		}
	case http.StatusUnauthorized, http.StatusForbidden:
		if count := g.unauthorized.Count(); count > 0 {
			g.o.Log.WarnContext(ctx, "callers refused", "count", count, "status", status, "request_id", requestID, "error", err)
		}
	}
	return requestID
}

// Door is a [Guard] for the requests of one door.
type Door struct {
	*Guard
	fail func(http.ResponseWriter, *http.Request, error)
}

// Door returns the middleware of a door. fail answers a request in the door's format: err is
// a [*Refusal], or one of package task's errors, or unexpected.
func (g *Guard) Door(fail func(w http.ResponseWriter, r *http.Request, err error)) *Door {
	return &Door{g, fail}
}

// Recover fails a request whose handler panics.
func (d *Door) Recover(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer func() {
			switch p := recover(); p {
			case nil:
			case http.ErrAbortHandler:
				panic(p) // net/http's own way to cut a connection
			default:
				d.fail(w, r, fmt.Errorf("panic: %v\n%s", p, debug.Stack()))
			}
		}()
		next.ServeHTTP(w, r)
	})
}

// RefuseHeads refuses what a [Listener] does not let through.
func (d *Door) RefuseHeads(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if refusal := refusalOfHead(r); refusal != nil {
			d.fail(w, r, refusal)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// RefuseOtherSites keeps web pages of other origins from having calls made by the browser
// of a person who can reach the service. Services and engines send none of the headers by
// which a browser says where a request comes from.
func (d *Door) RefuseOtherSites(next http.Handler) http.Handler {
	protection := http.NewCrossOriginProtection()
	protection.SetDenyHandler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		d.fail(w, r, &Refusal{Status: http.StatusForbidden, Detail: "A web page of another site may not use this service."})
	}))
	return protection.Handler(next)
}

// SecurityHeaders forbids caches to keep answers, and browsers to guess their type. A
// handler may set the headers anew.
func SecurityHeaders(next http.Handler) http.Handler {
	noStore, noSniff := []string{"no-store"}, []string{"nosniff"}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header()["Cache-Control"] = noStore
		w.Header()["X-Content-Type-Options"] = noSniff
		next.ServeHTTP(w, r)
	})
}

const (
	// headTimeout is how long a caller may take to send a request's head, after the
	// connection was made or the head's first byte came.
	headTimeout = 10 * time.Second
	// requestTimeout is the same for the whole request.
	requestTimeout = 20 * time.Second
	// answerTimeout is how long a caller may take to read an answer.
	answerTimeout = 30 * time.Second
)

// NewServer returns a server of h with bounds in time, which is to serve a [Listener].
func NewServer(h http.Handler, log *slog.Logger) *http.Server {
	return &http.Server{
		Handler: h,
		// They hold whether a handler reads the body or net/http passes over it, which
		// lifts them at the body's end: handlers may work for longer.
		ReadHeaderTimeout: headTimeout,
		ReadTimeout:       requestTimeout,
		// An answer that may come late calls RenewWriteDeadline.
		WriteTimeout: answerTimeout,
		IdleTimeout:  2 * time.Minute,
		// The Listener has a smaller bound, on the number of lines too.
		MaxHeaderBytes: MaxHead,
		ErrorLog:       slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
}

// RenewWriteDeadline counts the server's WriteTimeout from now on. net/http counts it from
// the request on, but it is for callers that do not read their answers.
func RenewWriteDeadline(w http.ResponseWriter, r *http.Request) {
	if server, ok := r.Context().Value(http.ServerContextKey).(*http.Server); ok && server.WriteTimeout > 0 {
		_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(server.WriteTimeout))
	}
}
