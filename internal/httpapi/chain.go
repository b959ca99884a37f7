package httpapi

import (
	"context"
	"net/http"
	"strconv"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/adapters/humachi"

	"github.com/melodia/orchestrator/internal/task"
)

// Headers of calls that a request carries which comes from a task, directly or
// because the task's target passed them on.
const (
	hopsHeader    = "Orchestrator-Hops"
	parentHeader  = "Orchestrator-Task-Id"
	attemptHeader = "Orchestrator-Attempt"
)

// link is a request's place in a chain of tasks that call this service.
type link struct {
	// hops is how many calls led to the request.
	hops int
	// parent is the task that the request comes from; zero: none.
	parent task.ID
	// isCall: the request is a call of parent itself.
	isCall bool
}

type linkKey struct{}

// linkOf returns what chained found out about the request; zero where it comes
// from no task.
func linkOf(ctx context.Context) link {
	l, _ := ctx.Value(linkKey{}).(link)
	return l
}

// chained is before operations that store, redrive or carry out tasks. It lets a
// request pass to which not too many calls have led.
func (a *API) chained(ctx huma.Context, next func(huma.Context)) {
	r, w := humachi.Unwrap(ctx)
	l, err := readLink(r.Header)
	if err == nil && a.MaxHops > 0 && l.hops > a.MaxHops {
		err = newProblem(http.StatusLoopDetected, "More calls of tasks led to this request than MAX_HOPS allows, which is "+strconv.Itoa(a.MaxHops)+
			". Nothing was stored or carried out. Look for tasks that call this service again and again; if the chain has an end, raise MAX_HOPS.").neverAgain()
	}
	if err != nil {
		a.write(w, r, err)
		return
	}
	if l != (link{}) {
		ctx = huma.WithValue(ctx, linkKey{}, l)
	}
	next(ctx)
}

// readLink reads where a request comes from, or says what is wrong with that.
func readLink(h http.Header) (l link, err error) {
	var found []FieldProblem
	mistake := func(name, kind, message string) {
		found = append(found, FieldProblem{Loc: Loc{"header", name}, Msg: message, Type: kind})
	}
	read := func(name, rule string, parse func(string) bool) {
		switch values := h[name]; {
		case len(values) > 1:
			mistake(name, "duplicate", "must not be there twice")
		case len(values) == 1 && !parse(values[0]):
			mistake(name, "string_pattern_mismatch", "must be "+rule+"; leave it out where the request comes from no task")
		}
	}
	read(hopsHeader, "a whole number of digits alone, as the call had it", func(s string) (ok bool) {
		l.hops, ok = task.ParseHops(s)
		return ok
	})
	read(parentHeader, "a UUID, as the call had it", func(s string) bool {
		id, err := task.ParseID(s)
		l.parent = id
		return err == nil
	})
	if found != nil {
		return link{}, invalid(found)
	}
	l.isCall = l.parent != task.ID{} && h[attemptHeader] != nil
	return l, nil
}

// linkParameters document the headers that chained reads, Orchestrator-Hops first.
func linkParameters() []*huma.Param {
	return []*huma.Param{
		{
			Name: hopsHeader, In: "header",
			Description: "How many calls of tasks led to this request. Every call of a task carries it: pass it on where a call makes you use this service. Above the service's MAX_HOPS the answer is 508.",
			Schema:      &huma.Schema{Type: huma.TypeString, Pattern: "^[0-9]+$", Examples: []any{"1"}},
		},
		{
			Name: parentHeader, In: "header",
			Description: "The task whose call led to this request: it becomes parent_id of what is stored. Every call of a task carries it; pass it on. " +
				"Where Orchestrator-Attempt is there too, the request is taken for the task's own call: the same request again, by the same task, is answered as under an Idempotency-Key of its own.",
			Schema: &huma.Schema{Type: huma.TypeString, Format: "uuid", Examples: []any{"01939e0c-5c1e-7cc1-b1a6-9d8a4d6c1a2a"}},
		},
	}
}
