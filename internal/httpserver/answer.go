package httpserver

import (
	"net/http"
	"sync"
)

const (
	// maxAnswers bounds all answers that are being written. Each counts until its caller
	// has read it, for up to the server's WriteTimeout.
	maxAnswers = 64 << 20
	// smallAnswer is what is written whatever the others hold. So much of each of
	// the connections that there may be fits into the service's memory.
	smallAnswer = 16 << 10
)

// TooManyAnswers is why a request is refused where the answers of others take too much
// memory. The request has changed nothing.
func TooManyAnswers() *Refusal {
	return &Refusal{Status: http.StatusServiceUnavailable, Header: RetryLater(),
		Detail: "Callers have not read their answers, which take 64 MiB already. Nothing was changed; try again after the time in Retry-After."}
}

// Answer is the body of an answer that is being made. Its memory counts among all answers
// until it is released. Make one with [Guard.NewAnswer].
type Answer struct {
	budget *MemoryBudget
	must   bool
	bytes  []byte
}

// answers are empty ones whose memory serves again.
var answers = sync.Pool{New: func() any { return new(Answer) }}

// NewAnswer returns an empty Answer. Where must is true it is written however much the
// others take: the request has changed something. Release has to be called.
func (g *Guard) NewAnswer(must bool) *Answer {
	a := answers.Get().(*Answer)
	a.budget, a.must = &g.answers, must
	a.budget.Reserve(cap(a.bytes), cap(a.bytes))
	return a
}

// Write adds to the answer. It asks for the memory before it takes it. The error is that of
// [TooManyAnswers].
func (a *Answer) Write(p []byte) (int, error) {
	if n := len(a.bytes) + len(p); n > cap(a.bytes) {
		size := max(n, 2*cap(a.bytes))
		more := size - cap(a.bytes)
		if !a.budget.Reserve(more, size) && !a.must {
			a.budget.Release(more)
			return 0, TooManyAnswers()
		}
		a.bytes = append(make([]byte, 0, size), a.bytes...)
	}
	a.bytes = append(a.bytes, p...)
	return len(p), nil
}

// Bytes returns what was written so far. They are no longer there after Release.
func (a *Answer) Bytes() []byte { return a.bytes }

// Release says that the answer is written, or will not be. It is called once.
func (a *Answer) Release() {
	a.budget.Release(cap(a.bytes))
	if cap(a.bytes) <= smallAnswer {
		*a = Answer{bytes: a.bytes[:0]}
		answers.Put(a)
	}
}
