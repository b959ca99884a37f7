package httpapi

import (
	"bytes"
	"io"
	"net/http"
	"sync"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/adapters/humachi"
)

const (
	// maxAnswers bounds all answers that are being written. One is for as long as
	// its caller does not read it, up to the server's WriteTimeout.
	maxAnswers = 64 << 20
	// smallAnswer is what is written whatever the others take. So much of each of
	// the connections that there may be fits into the service's memory.
	smallAnswer = 16 << 10
	// assetAnswer is what net/http takes to write a file, however large it is.
	assetAnswer = 40 << 10
)

func tooManyAnswers() *Problem {
	return newProblem(http.StatusServiceUnavailable, "Callers have not read their answers, which take 64 MiB already. Nothing was changed; try again after the time in Retry-After.").retryLater()
}

// reserve counts n bytes of an answer, and reports whether they may be written.
// Either way they count until they are given to release.
func (a *API) reserve(n int) bool {
	return a.answers.Add(int64(n)) <= maxAnswers || n <= smallAnswer
}

func (a *API) release(n int) { a.answers.Add(-int64(n)) }

// holdAnswer keeps an operation's answer until it is whole, so that what it was
// made from is not kept for as long as its caller takes to read it, and so that
// its size is known. Where answers take too much, reading is answered 503. So is
// what would change something, before it does; one who changed something is
// answered in any case.
func (a *API) holdAnswer(ctx huma.Context, next func(huma.Context)) {
	r, w := humachi.Unwrap(ctx)
	reads := r.Method == http.MethodGet || r.Method == http.MethodHead
	if a.answers.Load() > maxAnswers && !reads && !smallAnswers[ctx.Operation().Path] {
		a.write(w, r, tooManyAnswers())
		return
	}
	held := heldAnswers.Get().(*heldAnswer)
	held.humaContext = ctx
	next(held)
	if held.status != 0 {
		n := held.body.Cap()
		if a.reserve(n) || !reads || held.body.Len() <= smallAnswer {
			ctx.SetStatus(held.status)
			_, _ = ctx.BodyWriter().Write(held.body.Bytes()) // the caller is gone
		} else {
			w.Header().Del("ETag")
			a.write(w, r, tooManyAnswers())
		}
		a.release(n)
	}
	if held.body.Cap() <= smallAnswer {
		held.humaContext, held.status = nil, 0
		held.body.Reset()
		heldAnswers.Put(held)
	}
}

// awaitAnswers refuses what would change something while answers take too much,
// before it does; one who changed something is answered in any case.
func (a *API) awaitAnswers(operation *huma.Operation, next http.Handler) http.Handler {
	if smallAnswers[operation.Path] {
		return next
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !onlyReads(r) && a.answers.Load() > maxAnswers {
			a.write(w, r, tooManyAnswers())
			return
		}
		next.ServeHTTP(w, r)
	})
}

func onlyReads(r *http.Request) bool {
	return r.Method == http.MethodGet || r.Method == http.MethodHead
}

// smallAnswers are operations whose answers do not grow with what is stored.
var smallAnswers = map[string]bool{"/enqueue": true, "/schedule": true, "/worker-endpoint": true}

var heldAnswers = sync.Pool{New: func() any { return new(heldAnswer) }}

type humaContext = huma.Context // its name as a field would hide its method Context

// heldAnswer is the context of an operation whose answer is held.
type heldAnswer struct {
	humaContext
	status int
	body   bytes.Buffer
}

// Unwrap leads to the context of humachi.
func (h *heldAnswer) Unwrap() huma.Context { return h.humaContext }

// SetStatus is where the answer begins.
func (h *heldAnswer) SetStatus(code int) { h.status = code }

// Status is part of huma.Context.
func (h *heldAnswer) Status() int { return h.status }

// BodyWriter is part of huma.Context.
func (h *heldAnswer) BodyWriter() io.Writer { return &h.body }
