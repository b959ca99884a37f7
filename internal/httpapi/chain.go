package httpapi

import (
	"context"
	"net/http"
	"strings"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/adapters/humachi"

	"github.com/melodia/orchestrator/internal/intake"
	"github.com/melodia/orchestrator/internal/task"
)

// Headers of calls that a request carries which comes from a task, directly or
// because the task's target passed them on.
const (
	hopsHeader    = "Orchestrator-Hops"
	parentHeader  = "Orchestrator-Task-Id"
	attemptHeader = "Orchestrator-Attempt"
)

type originKey struct{}

// originOf returns who makes the request, and what chained found out about what led to it.
func originOf(ctx context.Context) intake.Origin {
	o, _ := ctx.Value(originKey{}).(intake.Origin)
	o.Principal = caller(ctx)
	return o
}

// chained is before operations that store, redrive or carry out tasks. It lets a
// request pass to which not too many calls have led.
func (a *API) chained(ctx huma.Context, next func(huma.Context)) {
	r, w := humachi.Unwrap(ctx)
	origin, err := readOrigin(r.Header)
	if err == nil {
		err = a.Intake.CheckHops(origin.Hops)
	}
	if err != nil {
		a.write(w, r, err)
		return
	}
	if origin != (intake.Origin{}) {
		ctx = huma.WithValue(ctx, originKey{}, origin)
	}
	next(ctx)
}

// readOrigin reads what led to a request, or says what is wrong with that.
func readOrigin(h http.Header) (o intake.Origin, err error) {
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
		o.Hops, ok = task.ParseHops(s)
		return ok
	})
	read(parentHeader, "a UUID, as the call had it", func(s string) bool {
		id, err := task.ParseID(s)
		o.Parent = id
		return err == nil
	})
	if found != nil {
		return intake.Origin{}, invalid(found)
	}
	o.IsCall = o.Parent != task.ID{} && h[attemptHeader] != nil
	return o, nil
}

// callOf returns the task whose call a request is, as far as its headers tell: a target that
// passes the task's id on, as it should, does not pass our User-Agent on.
func callOf(h http.Header) (id task.ID, ok bool) {
	if h[attemptHeader] == nil || !strings.HasPrefix(h.Get("User-Agent"), "orchestrator/") {
		return id, false
	}
	id, err := task.ParseID(h.Get(parentHeader))
	return id, err == nil
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
