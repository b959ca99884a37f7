package httpapi

import (
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"github.com/danielgtaylor/huma/v2"

	"github.com/melodia/orchestrator/internal/task"
)

// param is a parameter that an operation declares, and the field that takes it.
type param struct {
	in, name  string
	index     []int
	otherwise string // what it is where it is left out
	*shape
}

// parameters documents the parameters that the fields of a struct take, by their
// tags: path, query, header, and those that huma knows for schemas. readParams
// reads them. A list takes a query parameter that may be there several times.
func (a *API) parameters(of any) (documented []*huma.Param) {
	t := reflect.TypeOf(of)
	var all []*param
	for _, f := range reflect.VisibleFields(t) {
		for _, in := range []string{"path", "query", "header"} {
			name, style, _ := strings.Cut(f.Tag.Get(in), ",")
			if name == "" {
				continue
			}
			if in == "header" && name != http.CanonicalHeaderKey(name) {
				panic(fmt.Sprintf("header %s is not spelt as requests have it", name))
			}
			schema := huma.SchemaFromField(a.registry, f, "")
			p := &huma.Param{Name: name, In: in, Description: schema.Description, Required: in == "path", Schema: schema}
			if in == "query" {
				explode := style == "explode"
				p.Explode = &explode
			}
			documented = append(documented, p)
			all = append(all, &param{in: in, name: name, index: f.Index, otherwise: f.Tag.Get("default"), shape: shapeOf(a.registry, f.Type, schema)})
		}
	}
	a.params[t] = all
	return documented
}

// readParams reads parameters into a pointer to a struct that [API.parameters]
// documented, and holds them against its rules.
func (a *API) readParams(r *http.Request, into any) error {
	v := reflect.ValueOf(into).Elem()
	found := a.parseParams(r, v)
	for _, p := range a.params[v.Type()] {
		mistake := func(message, kind string) {
			found = append(found, FieldProblem{Loc: Loc{p.in, p.name}, Msg: message, Type: kind})
		}
		switch field := v.FieldByIndex(p.index); {
		case field.IsZero(): // it is left out, or wrong
		case p.kind == text:
			p.checkText(field.String(), mistake)
		case p.kind == number:
			p.checkNumber(field.Float(), false, mistake)
		}
	}
	if found != nil {
		return invalid(found)
	}
	return nil
}

// parseParams reads parameters into a struct, and returns those that do not fit
// their fields. An empty one is taken for none, but for a header.
func (a *API) parseParams(r *http.Request, into reflect.Value) (found []FieldProblem) {
	var query url.Values
	if r.URL.RawQuery != "" {
		query, _ = url.ParseQuery(r.URL.RawQuery) // checkParameters has seen to it
	}
	for _, p := range a.params[into.Type()] {
		var values []string
		switch p.in {
		case "path":
			values = []string{pathValue(r, p.name)}
		case "query":
			values = query[p.name]
		case "header":
			values = r.Header[p.name]
		}
		message, kind := p.parse(into.FieldByIndex(p.index), values)
		if message != "" {
			found = append(found, FieldProblem{Loc: Loc{p.in, p.name}, Msg: message, Type: kind})
		}
	}
	return found
}

// TaskPath is the path of an operation on one task.
type TaskPath struct {
	ID string `path:"id" pattern:"^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$" format:"uuid" patternDescription:"a UUID" example:"01939e0c-5c1e-7cc1-b1a6-9d8a4d6c1a2b" doc:"The task's id."`
}

// taskID reads the path of an operation on one task.
func (a *API) taskID(r *http.Request) (task.ID, error) {
	var in TaskPath
	if err := a.readParams(r, &in); err != nil {
		return task.ID{}, err
	}
	return task.ParseID(in.ID) // which has nothing against what the pattern lets through
}

// pathValue is a part of the path, as it is without escapes.
func pathValue(r *http.Request, name string) string {
	value := r.PathValue(name)
	if r.URL.RawPath == "" { // there are no escapes that count
		return value
	}
	if plain, err := url.PathUnescape(value); err == nil {
		return plain
	}
	return value
}

// parse sets v to what was sent, or says why that cannot be.
func (p *param) parse(v reflect.Value, values []string) (message, kind string) {
	switch {
	case p.in == "header" && len(values) > 1:
		return "must not be there twice", "duplicate"
	case p.in == "header" && len(values) == 1 && values[0] == "":
		return "must not be empty", "string_too_short"
	case p.kind == list && values != nil && values[0] == "":
		return "", ""
	case p.kind == list:
		for _, value := range values {
			item := reflect.New(v.Type().Elem()).Elem()
			item.SetString(value)
			v.Set(reflect.Append(v, item))
		}
		return "", ""
	}
	value := p.otherwise
	if len(values) > 0 && values[0] != "" {
		value = values[0]
	}
	if value == "" {
		return "", ""
	}
	switch p.kind {
	case number:
		n, err := strconv.ParseFloat(value, 64)
		if err != nil {
			return "must be a number", "float_type"
		}
		v.SetFloat(n)
	case integer:
		n, err := strconv.ParseInt(value, 10, 64)
		if err != nil {
			return "must be a whole number", "int_type"
		}
		v.SetInt(n)
	default:
		v.SetString(value)
	}
	return "", ""
}

// checkParameters refuses a request whose query holds a parameter that its operation
// does not declare, so that a misspelt one is not silently ignored (a dry_run in
// the query of a cancel), or holds one twice that the operation reads once.
func (a *API) checkParameters(operation *huma.Operation, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.RawQuery != "" {
			if found := queryMistakes(operation, r.URL.RawQuery); found != nil {
				a.fail(w, r, invalid(found))
				return
			}
		}
		next.ServeHTTP(w, r)
	})
}

// queryMistakes returns what is wrong with the names in a query; nil is nothing.
func queryMistakes(operation *huma.Operation, rawQuery string) (found []FieldProblem) {
	query, err := url.ParseQuery(rawQuery)
	if err != nil {
		return []FieldProblem{{Loc: Loc{"query"}, Msg: "must be percent-encoded: % is written %25, and ; is written %3B", Type: "invalid"}}
	}
	for _, name := range slices.Sorted(maps.Keys(query)) {
		switch known, several := declared(operation, name); {
		case !known:
			found = append(found, FieldProblem{Loc: Loc{"query", clipName(name)}, Msg: "is not a parameter of this request; look for a spelling mistake", Type: "extra_forbidden"})
		case len(query[name]) > 1 && !several:
			found = append(found, FieldProblem{Loc: Loc{"query", clipName(name)}, Msg: "must not be there twice", Type: "duplicate"})
		}
	}
	return found
}

// labelPrefix begins the parameters that stand for the members of labels.
const labelPrefix = "label."

// declared reports whether an operation has a query parameter of this name, and
// whether it may be given several times.
func declared(operation *huma.Operation, name string) (known, several bool) {
	for _, p := range operation.Parameters {
		switch {
		case p.In != "query":
		case p.Schema.Type == huma.TypeObject:
			if strings.HasPrefix(name, labelPrefix) {
				return true, false
			}
		case p.Name == name:
			return true, p.Explode != nil && *p.Explode
		}
	}
	return false, false
}

// clipName keeps the answer to a query smaller than the query.
func clipName(name string) string {
	const most = 64
	return strings.ToValidUTF8(name[:min(len(name), most)], "")
}
