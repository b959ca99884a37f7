package httpserver

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"

	"github.com/melodia/orchestrator/internal/task"
)

const (
	// MaxBody is how many bytes the body of a request may have.
	MaxBody = 1 << 20
	// smallBody is what a request may send whatever the others hold.
	smallBody = 16 << 10
	// maxBodies bounds all bodies that are in memory. On its way into the database
	// each takes some eight times its size. The bodies of requests whose calls are
	// under way have a bound of their own, which is the same.
	maxBodies = 32 << 20
)

var errTooManyBodies = fmt.Errorf("%w: all request bodies together are larger than 32 MiB", task.ErrOverloaded)

// ReadBody reads a request's body into memory before its handler runs, within bounds on its
// size and on the size of all bodies. [Body] returns it; it can be read from the request too.
func (d *Door) ReadBody(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Body == nil || r.Body == http.NoBody {
			next.ServeHTTP(w, r)
			return
		}
		// Before the body is read, that is before 100 Continue.
		if err := checkBody(r); err != nil {
			d.fail(w, r, err)
			return
		}
		b := &body{incoming: http.MaxBytesReader(w, r.Body, MaxBody), budget: &d.bodies}
		defer func() { b.budget.Release(b.size) }()
		whole, err := io.ReadAll((*countingReader)(b))
		if err != nil {
			d.fail(w, r, bodyError(err))
			return
		}
		b.unread = whole
		r.Body = b
		next.ServeHTTP(w, r)
	})
}

// Body returns the body of a request behind [Door.ReadBody]; nil: it has none.
func Body(r *http.Request) []byte {
	if b, ok := r.Body.(*body); ok {
		return b.unread
	}
	return nil
}

// HoldForCall counts the body of a request that is about to make a call among those of such
// requests, and is called once the body has been made sense of: [Body] is nil from then on. A
// call may take half an hour, and must not keep requests that store tasks out for so long.
// The error is [task.ErrOverloaded].
func (g *Guard) HoldForCall(r *http.Request) error {
	b, ok := r.Body.(*body)
	if !ok {
		return nil
	}
	b.unread = nil
	b.budget.Release(b.size)
	b.budget = &g.callBodies
	if !b.budget.Reserve(b.size, b.size) {
		return errTooManyBodies
	}
	return nil
}

// checkBody returns an error where a request's headers tell that its body will not be read.
func checkBody(r *http.Request) error {
	for _, coding := range r.Header["Content-Encoding"] {
		if !strings.EqualFold(coding, "identity") {
			return &Refusal{Status: http.StatusUnsupportedMediaType, Header: http.Header{"Accept-Encoding": {"identity"}}, // RFC 9110 §12.5.3
				Detail: "The body must not be compressed. Send it as it is, without the header Content-Encoding, or with Content-Encoding: identity."}
		}
	}
	if r.ContentLength > MaxBody {
		return errBodyTooLarge
	}
	return nil
}

var errBodyTooLarge = &Refusal{Status: http.StatusRequestEntityTooLarge, Detail: "The body must be at most 1 MiB (1048576 bytes)."}

// bodyError says why a body was not read.
func bodyError(err error) error {
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return errBodyTooLarge
	}
	switch {
	case errors.Is(err, task.ErrOverloaded):
		return err
	case errors.Is(err, os.ErrDeadlineExceeded):
		return &Refusal{Status: http.StatusRequestTimeout, Detail: "The request did not arrive within 20 seconds."}
	default:
		return &Refusal{Status: http.StatusBadRequest, Detail: "The body did not arrive as its headers announced it."}
	}
}

// body is a request's body in memory.
type body struct {
	incoming io.Reader
	size     int
	budget   *MemoryBudget // that size counts in
	unread   []byte
}

// Read is part of io.ReadCloser.
func (b *body) Read(p []byte) (int, error) {
	if len(b.unread) == 0 {
		return 0, io.EOF
	}
	n := copy(p, b.unread)
	b.unread = b.unread[n:]
	return n, nil
}

// Close is part of io.ReadCloser.
func (*body) Close() error { return nil }

// countingReader counts bytes when they have come: a caller that announces many and sends
// none keeps no other out.
type countingReader body

func (b *countingReader) Read(p []byte) (int, error) {
	n, err := b.incoming.Read(p)
	b.size += n
	if !b.budget.Reserve(n, b.size) {
		err = errTooManyBodies
	}
	return n, err
}
