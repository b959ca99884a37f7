package httpapi

import (
	"net/http"
	"strings"

	"github.com/danielgtaylor/huma/v2"

	"github.com/melodia/orchestrator/internal/httpserver"
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

// origin returns who makes a request that stores, redrives or carries out tasks, and
// what led to it, or an error where too many calls have.
func (a *API) origin(r *http.Request) (intake.Origin, error) {
	o, err := readOrigin(r.Header)
	if err != nil {
		return o, err
	}
	o.Principal = httpserver.Principal(r.Context())
	return o, a.Intake.CheckHops(o.Hops)
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

// linkParameters document the headers that origin reads, Orchestrator-Hops first.
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
