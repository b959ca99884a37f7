package httpapi

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"

	"github.com/danielgtaylor/huma/v2"

	"github.com/melodia/orchestrator/internal/httpserver"
	"github.com/melodia/orchestrator/internal/intake"
	"github.com/melodia/orchestrator/internal/task"
)

// Problem is the one shape of every error (RFC 9457 §3). It never holds a
// value that was sent.
type Problem struct {
	Type     string         `json:"type" example:"about:blank" doc:"The kind of problem. about:blank: the status says it."`
	Title    string         `json:"title" example:"Unprocessable Entity" doc:"The name of the status."`
	Status   int            `json:"status" example:"422" doc:"The HTTP status code."`
	Detail   string         `json:"detail" example:"The request breaks 1 rule, see errors." doc:"What is wrong and what to do, in one sentence."`
	Instance string         `json:"instance" example:"01939e0c-5c1e-7cc1-b1a6-9d8a4d6c1a2b" doc:"The id of this answer. On 500 the log has the cause under it. Of the answers 401 and 403, and of 429 and 503, the log has one a second, with their number."`
	Errors   []FieldProblem `json:"errors,omitzero" nullable:"false" doc:"On 422: what is wrong, field by field; at most 50 of it."`
	Result   *WorkResult    `json:"result,omitzero" doc:"On 502 and 504 of /worker-endpoint: the result of the call."`

	header http.Header
}

// FieldProblem is one broken rule, in the form that FastAPI gives it.
type FieldProblem struct {
	Loc  Loc    `json:"loc" nullable:"false" example:"[\"body\",\"tasks\",10,\"url\"]" doc:"The way to the field: where it was sent, then names, and numbers (from 0) in lists."`
	Msg  string `json:"msg" example:"must be at most 100" doc:"What is wrong with it."`
	Type string `json:"type" example:"less_than_equal" doc:"A stable word for programs."`
}

// Loc is a way through a request: strings and ints.
type Loc []any

// Schema is huma.SchemaProvider.
func (Loc) Schema(huma.Registry) *huma.Schema {
	return &huma.Schema{Type: huma.TypeArray, Items: &huma.Schema{AnyOf: []*huma.Schema{{Type: huma.TypeString}, {Type: huma.TypeInteger}}}}
}

// Error returns the detail.
func (p *Problem) Error() string { return p.Detail }

// newProblem returns a problem without an instance; it gets one when it is answered.
func newProblem(status int, detail string) *Problem {
	return &Problem{Type: "about:blank", Title: http.StatusText(status), Status: status, Detail: detail}
}

// retryLater asks the caller to come back in some seconds.
func (p *Problem) retryLater() *Problem {
	p.header = httpserver.RetryLater()
	return p
}

// neverAgain tells a task whose call this answers that it would be answered so
// again.
func (p *Problem) neverAgain() *Problem {
	p.header = http.Header{"Orchestrator-Retry": {"never"}}
	return p
}

// maxFieldProblems keeps the answer to a body full of mistakes smaller than the body.
const maxFieldProblems = 50

func invalid(fields []FieldProblem) *Problem {
	detail := "The request breaks 1 rule, see errors."
	switch n := len(fields); {
	case n > maxFieldProblems: // of a batch not even all are looked for
		detail = fmt.Sprintf("The request breaks more than %[1]d rules, see errors for %[1]d of them.", maxFieldProblems)
		fields = fields[:maxFieldProblems]
	case n > 1:
		detail = fmt.Sprintf("The request breaks %d rules, see errors.", n)
	}
	p := newProblem(http.StatusUnprocessableEntity, detail)
	p.Errors = fields
	return p
}

// The texts about what was submitted before under the same idempotency key.
const (
	storedDetail = "This was submitted before and is stored. Its state cannot be read at the moment: send the same again after Retry-After."
	goneDetail   = "What was submitted under this Idempotency-Key has ended, and its retention is over. Nothing was stored; use another key for something new."
)

// problemOf returns the problem to answer an error with.
func problemOf(err error) *Problem {
	var p *Problem
	var fields task.Errors
	var batch intake.BatchError
	var hops *intake.HopsError
	switch {
	case errors.As(err, &p):
		return p
	case errors.As(err, &fields):
		return invalid(fieldProblems(fields, Loc{"body"}))
	case errors.As(err, &batch):
		return batchProblem(batch)
	case errors.As(err, &hops):
		return newProblem(http.StatusLoopDetected, "More calls of tasks led to this request than MAX_HOPS allows, which is "+strconv.Itoa(hops.Max)+
			". Nothing was stored or carried out. Look for tasks that call this service again and again; if the chain has an end, raise MAX_HOPS.").neverAgain()
	case errors.Is(err, intake.ErrRepeatGone):
		return newProblem(http.StatusConflict, goneDetail)
	case errors.Is(err, intake.ErrRepeatUnread):
		return newProblem(http.StatusServiceUnavailable, storedDetail).retryLater()
	case errors.Is(err, task.ErrQueueNotFound):
		return newProblem(http.StatusNotFound, "There is no queue of this name: no task has named it, and its settings were not written. PUT /queues/{name} writes them.")
	case errors.Is(err, task.ErrQueueKeyNotFound):
		return newProblem(http.StatusNotFound, "The flow key has no limits of its own: those of per_key of its queue hold for it.")
	case errors.Is(err, task.ErrQueueInUse):
		return newProblem(http.StatusConflict, "Tasks of the queue are pending or running. Cancel those that wait with POST /queues/{name}/purge, wait until the calls under way have ended, and delete it then.")
	case errors.Is(err, task.ErrQueueChanged):
		return newProblem(http.StatusConflict, "The settings were written by others at the same moment, and nothing was done. Read them again, and decide anew.")
	case errors.Is(err, task.ErrKeyTaken):
		return newProblem(http.StatusConflict, "Another request was made under this Idempotency-Key. Nothing was stored; use another key for another request. A repeat must have the same path and, byte for byte, the same body.")
	case errors.Is(err, task.ErrTooBroad):
		return newProblem(http.StatusServiceUnavailable, "The search took longer than it may. Ask for less, as with a range of time like created_after, or again later.").retryLater()
	}
	refusal := httpserver.RefusalOf(err)
	p = newProblem(refusal.Status, refusal.Detail)
	p.header = refusal.Header
	return p
}

// fieldProblems are what is wrong with the object that at leads to.
func fieldProblems(fields task.Errors, at Loc) []FieldProblem {
	problems := make([]FieldProblem, len(fields))
	for i, f := range fields {
		loc := slices.Clone(at)
		for _, name := range f.Path {
			loc = append(loc, name)
		}
		problems[i] = FieldProblem{Loc: loc, Msg: f.Message, Type: f.Kind}
	}
	return problems
}

// batchProblem says what is wrong with tasks of a batch.
func batchProblem(wrong intake.BatchError) *Problem {
	var found []FieldProblem
	for _, item := range wrong {
		found = append(found, fieldProblems(item.Errors, Loc{"body", "tasks", item.Index})...)
	}
	return invalid(found)
}
