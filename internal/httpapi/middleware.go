package httpapi

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"runtime/debug"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/go-chi/chi/v5"
)

const (
	maxBody = 1 << 20
	// bodyTimeout is how long a caller may take to send a body.
	bodyTimeout = 10 * time.Second
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

// readBody reads a request's body before its handler runs, within a bound on
// its size and on the time that takes. Handlers may work for longer: net/http
// lifts the bound at the body's end. Where that does not come the bound stays,
// since net/http looks for it once more before it answers.
func (a *API) readBody(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Body == nil || r.Body == http.NoBody {
			next.ServeHTTP(w, r)
			return
		}
		_ = huma.SetReadDeadline(w, time.Now().Add(bodyTimeout)) // a test's recorder has none
		body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
		if err != nil {
			a.write(w, r, bodyProblem(err))
			return
		}
		r.Body = io.NopCloser(bytes.NewReader(body))
		next.ServeHTTP(w, r)
	})
}

func bodyProblem(err error) *Problem {
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &tooLarge):
		return newProblem(http.StatusRequestEntityTooLarge, "The body must be at most 1 MiB (1048576 bytes).")
	case errors.Is(err, os.ErrDeadlineExceeded):
		return newProblem(http.StatusRequestTimeout, "The body did not arrive within 10 seconds.")
	default:
		return newProblem(http.StatusBadRequest, "The body did not arrive as its headers announced it.")
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
