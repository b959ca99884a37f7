package httpapi

import (
	"mime"
	"net/http"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"github.com/danielgtaylor/huma/v2"

	"github.com/melodia/orchestrator/internal/httpserver"
)

// handler answers a request of an operation. The error that it returns, having
// answered nothing, is answered as a problem.
type handler func(http.ResponseWriter, *http.Request) error

// handle registers an operation: what the document says of it, and who answers it.
// Requests are held against what the document says of who may make them, and with
// which parameters; huma has no part in that.
func (a *API) handle(operation huma.Operation, answer handler) {
	if operation.Responses == nil {
		operation.Responses = make(map[string]*huma.Response)
	}
	a.documentProblems(&operation, slices.Concat(operation.Errors, []int{http.StatusUnprocessableEntity, http.StatusInternalServerError})...)
	a.document.AddOperation(&operation)

	last := func(w http.ResponseWriter, r *http.Request) {
		if err := answer(w, r); err != nil {
			a.fail(w, r, err)
		}
	}
	// In this order: what callers without a scope send is not kept, and a query is refused when its
	// request has arrived, so that a client that is still sending reads why.
	chain := a.checkParameters(&operation, a.awaitAnswers(&operation, http.HandlerFunc(last)))
	chain = a.door.ReadBody(chain)
	if scope := scopeOf(&operation); scope != "" {
		chain = a.door.Authorize(a.needed(&operation, scope), a.awaitReady(chain))
	} else if len(operation.Security) > 0 {
		chain = a.requireToken(a.awaitReady(chain))
	}
	a.router.Method(operation.Method, operation.Path, chain)
}

// body is the schema of what a request sends: a value of v's type, which readBody
// reads.
func (a *API) body(v any) *huma.Schema {
	schema := a.schemaOf(v)
	a.shapes[reflect.TypeOf(v)] = shapeOf(a.registry, reflect.TypeOf(v), schema)
	return schema
}

// responses documents the answer with a value of v's type, and its headers.
func (a *API) responses(status int, v any, headers ...header) map[string]*huma.Response {
	response := &huma.Response{
		Description: http.StatusText(status),
		Content:     map[string]*huma.MediaType{"application/json": {Schema: a.schemaOf(v)}},
	}
	for _, h := range headers {
		if response.Headers == nil {
			response.Headers = make(map[string]*huma.Param)
		}
		response.Headers[h.name] = &huma.Param{Schema: &huma.Schema{Type: huma.TypeString, Description: h.doc, Examples: []any{h.example}}}
	}
	return map[string]*huma.Response{strconv.Itoa(status): response}
}

// header is one of an answer.
type header struct{ name, example, doc string }

// readBody reads a request's body, which must be JSON, into a pointer to what
// [API.body] documented.
func (a *API) readBody(r *http.Request, into any) error {
	found, err := a.parseBody(r, into)
	if err == nil && found != nil {
		err = invalid(found)
	}
	return err
}

// parseBody is readBody that returns what is wrong with the fields by itself.
func (a *API) parseBody(r *http.Request, into any) ([]FieldProblem, error) {
	body := httpserver.Body(r)
	switch contentType := r.Header.Get("Content-Type"); {
	case len(body) == 0:
		return nil, errNoBody()
	case contentType != "" && !isJSON(contentType):
		return nil, newProblem(http.StatusUnsupportedMediaType, "The body must be JSON. Send it with the header Content-Type: application/json.")
	}
	return a.parseText(body, into, Loc{"body"})
}

func isJSON(contentType string) bool {
	if contentType == "application/json" { // nearly always
		return true
	}
	mediaType, _, _ := mime.ParseMediaType(contentType)
	return mediaType == "application/json" || strings.HasSuffix(mediaType, "+json")
}

func errNoBody() error {
	return newProblem(http.StatusBadRequest, "The request must have a JSON body.")
}

// parseText is parseBody of a text that was sent at a place of its own.
func (a *API) parseText(text []byte, into any, at Loc) ([]FieldProblem, error) {
	found, err := readJSON(text, a.shapes[reflect.TypeOf(into).Elem()], into, at)
	if err != nil {
		return nil, newProblem(http.StatusBadRequest, err.Error())
	}
	return found, nil
}

// bodyErrors are the statuses that a request with a body can be answered with,
// besides 422 and 500.
var bodyErrors = []int{
	http.StatusBadRequest, http.StatusForbidden, http.StatusRequestTimeout, http.StatusRequestEntityTooLarge,
	http.StatusUnsupportedMediaType, http.StatusTooManyRequests, http.StatusServiceUnavailable,
}
