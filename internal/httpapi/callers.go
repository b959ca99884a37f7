package httpapi

import (
	"net/http"

	"github.com/danielgtaylor/huma/v2"

	"github.com/melodia/orchestrator/internal/httpserver"
)

// The scopes: what a caller may do. An operation says which one it needs.
const (
	scopeSubmit   = "submit"   // submit tasks
	scopeRead     = "read"     // find and see tasks
	scopeManage   = "manage"   // cancel, change, run and redrive tasks
	scopeInternal = "internal" // have a call made in the request
)

// Scopes are all that there are.
func Scopes() []string { return []string{scopeSubmit, scopeRead, scopeManage, scopeInternal} }

// needs is an operation's Security: what the document says, and what
// requests are held against.
func needs(scope string) []map[string][]string {
	return []map[string][]string{{"bearer": {scope}}, {"api_key": {scope}}}
}

// openToAll is the Security of an operation that needs no credentials. The document
// states it: where it says nothing, some tools assume that credentials are missing.
var openToAll = []map[string][]string{}

// scopeOf returns the scope that an operation needs, empty where it is open to
// all. It panics where the operation says neither.
func scopeOf(operation *huma.Operation) string {
	if operation.Security == nil {
		panic("operation " + operation.OperationID + " names no scope and is not openToAll")
	}
	if len(operation.Security) == 0 || operation.Security[0]["bearer"] == nil {
		return ""
	}
	return operation.Security[0]["bearer"][0]
}

// securitySchemes are the ways in that the document knows. Which of them the
// service takes is a setting.
func securitySchemes() map[string]*huma.SecurityScheme {
	return map[string]*huma.SecurityScheme{
		"bearer": {
			Type: "http", Scheme: "bearer",
			Description: "An API key (ork_…), an ID token (OpenID Connect) for this service's audience with a verified email, or a token of the platform. Each operation names the scope that the caller needs.",
		},
		"completion_token": {Type: "apiKey", In: "header", Name: completionTokenHeader, Description: "What the call of a task with completion had in this header. It is of one attempt, and for its reports alone."},
		"api_key":          {Type: "apiKey", In: "header", Name: "X-Api-Key", Description: "An API key, for callers whose Authorization header serves something else."},
	}
}

// needed returns what a request of an operation needs that has the given scope: to
// see the body of a call more than to see the task.
func (a *API) needed(operation *huma.Operation, scope string) func(*http.Request) httpserver.Need {
	always := httpserver.Need{Scopes: []string{scope}, Purpose: "this operation needs"}
	if operation.OperationID != getTaskID {
		return func(*http.Request) httpserver.Need { return always }
	}
	payload := httpserver.Need{Scopes: []string{scopeManage}, Purpose: "include=payload needs unless SHOW_PAYLOADS is on"}
	if a.ShowPayloads {
		payload = httpserver.Need{Scopes: []string{scopeRead, scopeManage}, Purpose: "include=payload needs"}
	}
	return func(r *http.Request) httpserver.Need {
		if r.URL.RawQuery != "" && r.URL.Query().Get("include") == includePayload {
			return payload
		}
		return always
	}
}
