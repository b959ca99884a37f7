package httpapi

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"reflect"
	"slices"
	"strconv"

	"github.com/danielgtaylor/huma/v2"

	"github.com/melodia/orchestrator/internal/httpserver"
)

// WriteDocument writes the OpenAPI 3.1 document as YAML.
func (a *API) WriteDocument(w io.Writer) error {
	b, err := a.document.YAML()
	if err != nil {
		return fmt.Errorf("encode the OpenAPI document: %w", err)
	}
	_, err = w.Write(b)
	return err
}

func describe(version string) *huma.OpenAPI {
	return &huma.OpenAPI{
		OpenAPI: "3.1.0",
		Info: &huma.Info{
			Title:   "Orchestrator Service",
			Version: version,
			Description: "Takes HTTP calls from other services and carries them out, now or later, with retries and timeouts.\n\n" +
				"The promise is **at least once**: a task that was answered with 202 is stored, survives the loss of any instance, " +
				"and is called until it succeeds or its retry policy ends. A target tells a repeat by the header `Orchestrator-Task-Id`.\n\n" +
				"Times are RFC 3339; answers are in UTC with microseconds. Durations are seconds. " +
				"Every error is a problem (RFC 9457, `application/problem+json`). " +
				"Fields and query parameters that an operation does not declare are refused with 422, so that a misspelt one is not silently ignored.",
			License: &huma.License{Name: "MIT", Identifier: "MIT"},
		},
		Tags: []*huma.Tag{
			{Name: "tasks", Description: "Submit tasks, and see their state and attempts."},
			{Name: "manage", Description: "Cancel, run, change and redrive tasks, one by one or many at once."},
			{Name: "queues", Description: "Limits, order and pauses of the tasks of a queue, and of single flow keys."},
			{Name: "hosts", Description: "Hosts that are slow, or fail, or asked not to be called."},
			{Name: "worker", Description: "Carry out a task in the request itself."},
			{Name: "health", Description: "For probes and monitoring."},
		},
		// Where the document came from. A generated client is told the address.
		Servers: []*huma.Server{{URL: "/", Description: "This service"}},
		Components: &huma.Components{
			Examples:        make(map[string]*huma.Example),
			Schemas:         huma.NewMapRegistry("#/components/schemas/", huma.DefaultSchemaNamer),
			SecuritySchemes: securitySchemes(),
		},
	}
}

// meanings say what a problem's status means here.
var meanings = map[string]string{
	"400": "The body is missing, malformed, or not what its headers announce.",
	"401": "The request has no credentials, or none that are valid.",
	"403": "The caller lacks the scope that this operation needs, or the request comes from a web page of another site.",
	"404": "Nothing has this id or name, or its retention is over.",
	"408": "The request did not arrive within 20 seconds.",
	"409": "The task or queue is not in a state for this, or another request was made under the Idempotency-Key; detail says which.",
	"412": "The task, or the settings, are not in a version that If-Match names.",
	"413": "The body is larger than 1 MiB.",
	"415": "The body is not JSON by its Content-Type, or is compressed by its Content-Encoding.",
	"422": "The request breaks rules; errors says which.",
	"431": "The request line and the headers are larger than 16 KiB, or are more than 100 header lines. The connection is closed.",
	"429": "More is under way than the service can take on, or this caller sends more requests than it may. Nothing was stored or carried out. Try again after Retry-After.",
	"500": "Something went wrong inside the service. The log has the cause under the problem's instance.",
	"502": "The target refused, failed, or answered anything but 2xx; or the task could not start any more. Where the target asked for the call later (outcome snoozed), Retry-After says after how many seconds.",
	"503": "The database, or the issuer of tokens, is out of reach; the service is starting or shutting down; answers that callers have not read take too much memory; or the service lacks file descriptors or memory, or, for a call of /worker-endpoint, local ports or name servers. Try again after Retry-After.",
	"504": "The target did not answer within the timeout.",
	"508": "More calls led to this request than MAX_HOPS allows, or it is a call that /worker-endpoint made itself. Orchestrator-Retry: never tells a task that made it to give up.",
}

// completeDocument puts right what huma cannot say.
func (a *API) completeDocument() {
	a.completeSchemas()
	// Swagger UI sends each parameter's example as its value. A filter's would find
	// nothing of what was just stored.
	for _, parameter := range a.document.Paths["/tasks"].Get.Parameters {
		switch parameter.Name {
		case "limit":
		case "labels": // without an example it would make up three of them
			parameter.Schema.Examples = []any{map[string]any{}}
		default:
			parameter.Schema.Examples = nil
		}
	}
	for _, path := range a.document.Paths {
		for _, operation := range operationsOf(path) {
			a.documentProblems(operation, http.StatusRequestHeaderFieldsTooLarge) // refuseHeads
			if scopeOf(operation) != "" {                                         // authorize, awaitReady
				a.documentProblems(operation, http.StatusUnauthorized, http.StatusForbidden, http.StatusTooManyRequests, http.StatusServiceUnavailable)
			}
			for status, response := range operation.Responses {
				for _, header := range response.Headers {
					header.Description = header.Schema.Description
				}
				content := response.Content["application/problem+json"]
				if content == nil {
					continue
				}
				// One example for each status: a page of thirty operations would repeat the schema's hundreds of times.
				name := "problem-" + status
				a.document.Components.Examples[name] = problemExample(status)
				content.Examples = map[string]*huma.Example{"problem": {Ref: "#/components/examples/" + name}}
				response.Description = meanings[status]
				if status == "401" {
					response.Headers = map[string]*huma.Param{"WWW-Authenticate": {
						Description: "How to say who calls.",
						Schema:      &huma.Schema{Type: huma.TypeString, Examples: []any{httpserver.Challenge}},
					}}
				}
				if status == "429" || status == "503" {
					response.Headers = map[string]*huma.Param{"Retry-After": {
						Description: "How many seconds to wait before another try.",
						Schema:      &huma.Schema{Type: huma.TypeInteger, Examples: []any{1}},
					}}
				}
			}
		}
	}
}

// problemExample returns the example of the problems that have a status.
func problemExample(status string) *huma.Example {
	code, _ := strconv.Atoi(status) // meanings has numbers alone
	p := newProblem(code, meanings[status])
	p.Instance = "01939e0c-5c1e-7cc1-b1a6-9d8a4d6c1a2b"
	if code == http.StatusUnprocessableEntity {
		p.Errors = []FieldProblem{{Loc: Loc{"body", "retry", "max_attempts"}, Msg: "must be at most 100", Type: "less_than_equal"}}
	}
	return &huma.Example{Summary: "A problem (RFC 9457)", Value: p}
}

func operationsOf(path *huma.PathItem) []*huma.Operation {
	return slices.DeleteFunc([]*huma.Operation{path.Get, path.Put, path.Post, path.Patch, path.Delete}, func(o *huma.Operation) bool { return o == nil })
}

// completeSchemas puts right what is wrong in any schema: patternDescription is huma's
// own keyword, and a document may have keywords of its own behind x- alone (OpenAPI 3.1 §4.9).
func (a *API) completeSchemas() {
	complete := func(s *huma.Schema) {
		if s.Nullable && s.Enum != nil {
			s.Enum = append(s.Enum, nil) // null must be in an enum, whatever the type allows
		}
		if s.PatternDescription != "" {
			s.Extensions = map[string]any{"x-pattern-description": s.PatternDescription}
			s.PatternDescription = ""
		}
	}
	for _, schema := range a.registry.Map() {
		for _, property := range schema.Properties {
			complete(property)
		}
	}
	for _, path := range a.document.Paths {
		for _, operation := range operationsOf(path) {
			for _, parameter := range operation.Parameters {
				complete(parameter.Schema)
			}
		}
	}
}

// documentProblems adds problems that an operation is answered with before it begins.
func (a *API) documentProblems(operation *huma.Operation, statuses ...int) {
	problem := a.registry.Schema(reflect.TypeFor[Problem](), true, "")
	for _, status := range statuses {
		if code := strconv.Itoa(status); operation.Responses[code] == nil {
			operation.Responses[code] = &huma.Response{Content: map[string]*huma.MediaType{"application/problem+json": {Schema: problem}}}
		}
	}
}

// jsonBody documents a request body with named examples.
func jsonBody(schema *huma.Schema, examples map[string]*huma.Example) *huma.RequestBody {
	return &huma.RequestBody{
		Required: true,
		Content:  map[string]*huma.MediaType{"application/json": {Schema: schema, Examples: examples}},
	}
}

// example is a value in the document, given as JSON so that it can be pasted.
func example(summary, value string) *huma.Example {
	return &huma.Example{Summary: summary, Value: json.RawMessage(value)}
}

// schemaOf returns a reference to the schema of v's type.
func (a *API) schemaOf(v any) *huma.Schema {
	return a.registry.Schema(reflect.TypeOf(v), true, "")
}
