package httpserver

import (
	"math/rand/v2"
	"net/http"
	"strconv"
)

// Refusal is why a request is not carried out. Each door answers it in its own format.
type Refusal struct {
	// Status is the HTTP status to answer with.
	Status int
	// Detail says in a sentence or two what is wrong and what to do. It holds nothing that
	// was sent.
	Detail string
	// Header goes with the answer; nil: nothing.
	Header http.Header
}

// Error returns the detail.
func (r *Refusal) Error() string { return r.Detail }

// RetryLater returns a header that asks the caller to come back in one to three seconds, so
// that those who are turned away together do not come back together.
func RetryLater() http.Header {
	return http.Header{"Retry-After": {strconv.Itoa(1 + rand.IntN(3))}} //nolint:gosec // not a secret
}
