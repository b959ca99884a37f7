package httpserver

import (
	"context"
	"errors"
	"math/rand/v2"
	"net/http"
	"strconv"

	"github.com/melodia/orchestrator/internal/task"
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

// RefusalOf returns how every door answers err: the [*Refusal] in it, or what an error of
// package task means. Any other error is a 500 whose cause is for the log alone.
func RefusalOf(err error) *Refusal {
	if refusal, ok := errors.AsType[*Refusal](err); ok {
		return refusal
	}
	refuse := func(status int, detail string) *Refusal { return &Refusal{Status: status, Detail: detail} }
	later := func(status int, detail string) *Refusal {
		return &Refusal{Status: status, Detail: detail, Header: RetryLater()}
	}
	shortage, short := errors.AsType[task.Shortage](err)
	switch {
	case errors.Is(err, task.ErrNotFound):
		return refuse(http.StatusNotFound, "There is no task with this id, or its retention is over.")
	case errors.Is(err, task.ErrNotPending):
		return refuse(http.StatusConflict, "The task is running or has ended; only a pending task can be carried out or changed.")
	case errors.Is(err, task.ErrEnded):
		return refuse(http.StatusConflict, "The task has ended; only a pending or running task can be cancelled.")
	case errors.Is(err, task.ErrCancelRequested):
		return refuse(http.StatusConflict, "The task is being cancelled already.")
	case errors.Is(err, task.ErrNotRedrivable):
		return refuse(http.StatusConflict, "The task has neither failed nor been cancelled; only such a task can be redriven.")
	case errors.Is(err, task.ErrChanged):
		return refuse(http.StatusConflict, "The task was changed by others at the same moment, and nothing was done. Read it again, and decide anew.")
	case errors.Is(err, task.ErrTooBroad):
		return later(http.StatusServiceUnavailable, "The search took longer than it may. Ask for less.")
	case errors.Is(err, task.ErrOverloaded):
		return later(http.StatusTooManyRequests, "More is under way than the service can take on. Nothing was stored or carried out; try again after the time in Retry-After.")
	case short:
		return later(http.StatusServiceUnavailable, "The request cannot be checked at the moment: "+string(shortage)+". Nothing was stored or carried out; try again after the time in Retry-After.")
	case errors.Is(err, task.ErrUnavailable), errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return later(http.StatusServiceUnavailable, "The service cannot reach its database at the moment, or is shutting down. If this was a submission, the task may or may not have been stored.")
	default:
		return refuse(http.StatusInternalServerError, "Something went wrong inside the service. The instance of this problem leads to the cause in its log.")
	}
}
