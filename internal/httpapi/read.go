package httpapi

import (
	"net/http"
	"reflect"

	"github.com/danielgtaylor/huma/v2"

	"github.com/melodia/orchestrator/internal/task"
)

// submitInput is a body as it was sent, which the handler makes sense of.
type submitInput struct {
	ContentType string `header:"Content-Type" hidden:"true"`
	RawBody     []byte
}

// request is a body that asks for a task, in the domain's terms.
type request interface {
	spec(defaults task.Spec) (task.Spec, task.Errors)
	when() (task.When, task.Errors)
}

// read makes a task out of a body of type R.
//
// To check a body against the schema it must be made into a tree, which costs
// more than all else that is done for a request. What the type takes and the
// domain admits breaks no rule of the schema either, but for what is not plain;
// so the schema is only asked to name mistakes.
func read[R any, P interface {
	*R
	request
}](a *API, in *submitInput) (*task.Task, error) {
	if err := in.check(); err != nil {
		return nil, err
	}
	if quick := P(new(R)); isPlain(in.RawBody) && decode(in.RawBody, quick) == nil {
		if t, err := a.newTask(quick); err == nil {
			return t, nil
		}
	}
	thorough := P(new(R))
	if err := a.readThorough(in.RawBody, thorough); err != nil {
		return nil, err
	}
	return a.newTask(thorough)
}

// check returns an error unless there is a body that claims to be JSON.
func (in *submitInput) check() error {
	switch {
	case len(in.RawBody) == 0:
		return newProblem(http.StatusBadRequest, "The request must have a JSON body.")
	case in.ContentType != "" && !isJSON(in.ContentType):
		return newProblem(http.StatusUnsupportedMediaType, "The body must be JSON. Send it with the header Content-Type: application/json.")
	}
	return nil
}

// readThorough checks a body against the schema of into, and fills into from it.
func (a *API) readThorough(body []byte, into any) error {
	var tree any
	if err := decode(body, &tree); err != nil {
		return newProblem(http.StatusBadRequest, err.Error())
	}
	return a.validate(Loc{"body"}, tree, body, into)
}

// isPlain reports that a JSON text holds no null, which types take for absent,
// and no number with an exponent or of hundreds of digits, which might not fit
// a float64, or with so many digits behind the point that a limit could be
// missed by less than a nanosecond.
func isPlain(text []byte) bool {
	const mostDigits, mostDecimals = 300, 9
	digits, point := 0, 0 // of the number, so far; where its point is
	for i := 0; i < len(text); i++ {
		switch c := text[i]; {
		case c == '"':
			for i++; i < len(text) && text[i] != '"'; i++ {
				if text[i] == '\\' {
					i++
				}
			}
			digits, point = 0, 0
		case '0' <= c && c <= '9':
			if digits++; digits > mostDigits || point > 0 && digits-point > mostDecimals {
				return false
			}
		case c == 'n', (c == 'e' || c == 'E') && digits > 0:
			return false
		case c == '.':
			point = digits
		default:
			digits, point = 0, 0
		}
	}
	return true
}

// validate checks parsed against the schema of into, and fills into from body. at
// is where that was sent.
func (a *API) validate(at Loc, parsed any, body []byte, into any) error {
	if found := a.mistakes(pathOf(at), a.schemaOf(into), parsed); found != nil {
		return invalid(found)
	}
	if err := decode(body, into); err != nil {
		return invalid([]FieldProblem{{Loc: at, Msg: err.Error(), Type: "invalid"}})
	}
	return nil
}

// mistakes checks what path leads to against a schema; nil is none.
func (a *API) mistakes(path *huma.PathBuffer, schema *huma.Schema, parsed any) []FieldProblem {
	var found huma.ValidateResult
	huma.Validate(a.registry, schema, path, huma.ModeWriteToServer, parsed, &found)
	if len(found.Errors) == 0 {
		return nil
	}
	return humaFields(found.Errors)
}

func bodyPath() *huma.PathBuffer { return pathOf(Loc{"body"}) }

// pathOf is a way of names alone, as huma takes it.
func pathOf(at Loc) *huma.PathBuffer {
	path := huma.NewPathBuffer(nil, 0)
	for _, name := range at {
		path.Push(name.(string))
	}
	return path
}

// schemaOf returns a reference to the schema of v's type.
func (a *API) schemaOf(v any) *huma.Schema {
	return a.registry.Schema(reflect.TypeOf(v), true, "")
}
