package httpapi

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"runtime/debug"
	"strings"
	"sync/atomic"
	"time"

	"github.com/go-chi/chi/v5"

	"github.com/melodia/orchestrator/internal/httpserver"
	"github.com/melodia/orchestrator/internal/task"
)

const (
	maxBody = 1 << 20
	// smallBody is what gets in whatever the others take.
	smallBody = 16 << 10
	// maxBodies bounds all bodies that are in memory, but for those of calls under
	// way at /worker-endpoint, which it bounds too. On its way into the database
	// each takes some eight times its size.
	maxBodies = 32 << 20
)

// recoverPanics answers 500 where a handler panicked.
func (a *API) recoverPanics(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer func() {
			switch p := recover(); p {
			case nil:
			case http.ErrAbortHandler:
				panic(p) // net/http's own way to cut a connection
			default:
				a.write(w, r, fmt.Errorf("panic: %v\n%s", p, debug.Stack()))
			}
		}()
		next.ServeHTTP(w, r)
	})
}

// setHeaders forbids caches to keep answers, and browsers to guess their type.
func setHeaders(next http.Handler) http.Handler {
	noStore, noSniff := []string{"no-store"}, []string{"nosniff"}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header()["Cache-Control"] = noStore
		w.Header()["X-Content-Type-Options"] = noSniff
		next.ServeHTTP(w, r)
	})
}

// refuseHeads answers what the server's Listener does not let through.
func (a *API) refuseHeads(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if refusal := httpserver.RefusalOf(r); refusal != nil {
			a.write(w, r, newProblem(refusal.Status, refusal.Detail))
			return
		}
		next.ServeHTTP(w, r)
	})
}

// refuseOtherSites keeps web pages of other origins from using the browser of
// somebody who can reach the service to have calls made. Services and engines
// send none of the headers by which a browser says where a request comes from.
func (a *API) refuseOtherSites(next http.Handler) http.Handler {
	protection := http.NewCrossOriginProtection()
	protection.SetDenyHandler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		a.write(w, r, newProblem(http.StatusForbidden, "A web page of another site may not use this service."))
	}))
	return protection.Handler(next)
}

// keepBody reads a request's body before its handler runs, within a bound on its
// size, and on the size of all that are in memory.
func (a *API) keepBody(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Body == nil || r.Body == http.NoBody {
			next.ServeHTTP(w, r)
			return
		}
		// Before the body is read, that is before 100 Continue.
		if err := checkBody(r); err != nil {
			a.write(w, r, bodyProblem(err))
			return
		}
		b := &requestBody{arriving: http.MaxBytesReader(w, r.Body, maxBody), all: &a.bodies}
		defer func() { b.all.Add(-b.arrived) }()
		whole, err := io.ReadAll((*arrival)(b))
		if err != nil {
			a.write(w, r, bodyProblem(err))
			return
		}
		b.rest = whole
		r.Body = b
		next.ServeHTTP(w, r)
	})
}

// bodyOf returns the body of a request; nil: it has none.
func bodyOf(r *http.Request) []byte {
	if b, ok := r.Body.(*requestBody); ok {
		return b.rest
	}
	return nil
}

// checkBody returns an error where a request's headers tell that its body is not
// one that is read.
func checkBody(r *http.Request) error {
	for _, coding := range r.Header["Content-Encoding"] {
		if !strings.EqualFold(coding, "identity") {
			p := newProblem(http.StatusUnsupportedMediaType, "The body must not be compressed. Send it as it is, without the header Content-Encoding, or with Content-Encoding: identity.")
			p.header = http.Header{"Accept-Encoding": {"identity"}} // RFC 9110 §12.5.3
			return p
		}
	}
	if r.ContentLength > maxBody {
		return &http.MaxBytesError{Limit: maxBody}
	}
	return nil
}

// requestBody is an arrival at first, then read from memory.
type requestBody struct {
	rest     []byte // what has not been read
	arriving io.Reader
	arrived  int64
	all      *atomic.Int64 // what arrived of all bodies that it is counted among
}

// keepForCall counts the body of a request that is about to make a call among
// those of such requests. A call may take half an hour, and keeps no task that
// is to be stored out for so long.
func (a *API) keepForCall(r *http.Request) error {
	b, ok := r.Body.(*requestBody)
	if !ok {
		return nil
	}
	b.rest = nil // it has been read
	b.all.Add(-b.arrived)
	b.all = &a.callBodies
	if b.all.Add(b.arrived) > maxBodies && b.arrived > smallBody {
		return errTooManyBodies
	}
	return nil
}

// Read is part of io.ReadCloser.
func (b *requestBody) Read(p []byte) (int, error) {
	if len(b.rest) == 0 {
		return 0, io.EOF
	}
	n := copy(p, b.rest)
	b.rest = b.rest[n:]
	return n, nil
}

// Close is part of io.ReadCloser.
func (*requestBody) Close() error { return nil }

// arrival counts bytes when they have arrived: who announces many and sends
// none keeps nobody out.
type arrival requestBody

var errTooManyBodies = fmt.Errorf("%w: all request bodies together are larger than 32 MiB", task.ErrOverloaded)

func (b *arrival) Read(p []byte) (int, error) {
	n, err := b.arriving.Read(p)
	b.arrived += int64(n)
	if b.all.Add(int64(n)) > maxBodies && b.arrived > smallBody {
		err = errTooManyBodies
	}
	return n, err
}

func bodyProblem(err error) error {
	var tooLarge *http.MaxBytesError
	var p *Problem
	switch {
	case errors.As(err, &p):
		return p
	case errors.Is(err, task.ErrOverloaded):
		return err
	case errors.As(err, &tooLarge):
		return newProblem(http.StatusRequestEntityTooLarge, "The body must be at most 1 MiB (1048576 bytes).")
	case errors.Is(err, os.ErrDeadlineExceeded):
		return newProblem(http.StatusRequestTimeout, "The request did not arrive within 20 seconds.")
	default:
		return newProblem(http.StatusBadRequest, "The body did not arrive as its headers announced it.")
	}
}

// renewWriteDeadline counts the server's WriteTimeout from now on.
func renewWriteDeadline(w http.ResponseWriter, r *http.Request) {
	if server, ok := r.Context().Value(http.ServerContextKey).(*http.Server); ok && server.WriteTimeout > 0 {
		_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(server.WriteTimeout))
	}
}

// allowedMethods are the methods that the path of r takes.
func (a *API) allowedMethods(r *http.Request) (allowed []string) {
	path := r.URL.RawPath // as chi does
	if path == "" {
		path = r.URL.Path
	}
	for _, method := range []string{http.MethodGet, http.MethodPost, http.MethodPatch, http.MethodPut, http.MethodDelete} {
		if !a.router.Match(chi.NewRouteContext(), method, path) {
			continue
		}
		allowed = append(allowed, method)
		if method == http.MethodGet {
			allowed = append(allowed, http.MethodHead)
		}
	}
	return allowed
}
