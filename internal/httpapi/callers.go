package httpapi

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/danielgtaylor/huma/v2"

	"github.com/melodia/orchestrator/internal/task"
)

// The scopes: what a caller may do. An operation says which one it needs.
const (
	scopeSubmit   = "submit"   // hand in tasks
	scopeRead     = "read"     // find and see tasks
	scopeManage   = "manage"   // cancel, change, run and redrive tasks
	scopeInternal = "internal" // have a call made in the request
)

// Scopes are all that there are.
func Scopes() []string { return []string{scopeSubmit, scopeRead, scopeManage, scopeInternal} }

// callers says who makes a request.
type callers interface {
	// Authenticate returns the caller's name, empty where callers are not known, and
	// scopes. An error is [task.ErrUnavailable] where that cannot be told at
	// the moment; else its text says what is wrong with the credentials, completes
	// a sentence, and holds nothing that was sent.
	Authenticate(ctx context.Context, header http.Header) (name string, scopes []string, err error)
}

// needs is an operation's Security: what the document says, and what admit
// holds requests against.
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
	if len(operation.Security) == 0 {
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
			Description: "An API key (ork_…), or an ID token (OpenID Connect) for this service's audience with a verified email. Each operation names the scope that the caller needs.",
		},
		"api_key": {Type: "apiKey", In: "header", Name: "X-Api-Key", Description: "An API key, for callers whose Authorization header serves something else."},
	}
}

const unknownCaller = `Bearer realm="orchestrator"`

type callerKey struct{}

// caller returns the name of who makes the request, empty where callers are
// not known: for the task's record, and for the log of what was done to it.
func caller(ctx context.Context) string {
	name, _ := ctx.Value(callerKey{}).(string)
	return name
}

// authorize lets a request pass whose caller has one of the scopes that it needs, and
// has not sent too many of late.
func (a *API) authorize(needed func(*http.Request) need, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		name, err := a.identify(r, needed(r))
		if err != nil {
			a.write(w, r, err)
			return
		}
		if name != "" {
			r = r.WithContext(context.WithValue(r.Context(), callerKey{}, name))
		}
		next.ServeHTTP(w, r)
	})
}

// needed returns what a request of an operation needs that has the given scope: to
// see the body of a call more than to see the task.
func (a *API) needed(operation *huma.Operation, scope string) func(*http.Request) need {
	always := need{[]string{scope}, "this operation needs"}
	if operation.OperationID != getTaskID {
		return func(*http.Request) need { return always }
	}
	payload := need{[]string{scopeManage}, "include=payload needs unless SHOW_PAYLOADS is on"}
	if a.ShowPayloads {
		payload = need{[]string{scopeRead, scopeManage}, "include=payload needs"}
	}
	return func(r *http.Request) need {
		if r.URL.RawQuery != "" && r.URL.Query().Get("include") == includePayload {
			return payload
		}
		return always
	}
}

// need is which scopes let a request pass, each of them alone, and what for.
type need struct {
	scopes  []string
	purpose string // completes "the scope X, which …"
}

// identify returns who makes a request, and an error unless they may.
func (a *API) identify(r *http.Request, n need) (name string, err error) {
	name, scopes, err := a.Callers.Authenticate(r.Context(), r.Header)
	switch {
	case errors.Is(err, task.ErrUnavailable):
		p := newProblem(http.StatusServiceUnavailable, "The service cannot reach the issuer of ID tokens at the moment, so that it cannot tell who calls. Nothing was stored or carried out.")
		return "", fmt.Errorf("%w: %w", p.retryLater(), err)
	case err != nil:
		p := newProblem(http.StatusUnauthorized, "It is not known who calls: "+err.Error()+".")
		p.header = http.Header{"Www-Authenticate": {unknownCaller}}
		return "", p
	case !slices.ContainsFunc(n.scopes, func(scope string) bool { return slices.Contains(scopes, scope) }):
		scope := n.scopes[0]
		p := newProblem(http.StatusForbidden, "The caller lacks the scope "+scope+", which "+n.purpose+"; it has "+cmp.Or(strings.Join(scopes, ", "), "none")+".")
		p.header = http.Header{"Www-Authenticate": {unknownCaller + `, error="insufficient_scope", scope="` + scope + `"`}}
		return "", p
	}
	// After that: who has no credentials uses up nothing of those who have.
	if wait := a.rates.take(name, r.RemoteAddr, time.Now()); wait > 0 {
		p := newProblem(http.StatusTooManyRequests, "This caller sends more requests than it may. Nothing was stored or carried out; try again after the time in Retry-After.")
		p.header = http.Header{"Retry-After": {strconv.Itoa(int(math.Ceil(wait.Seconds())))}}
		return "", fmt.Errorf("%w (caller %q)", p, name)
	}
	return name, nil
}
