package httpapi

import (
	"net/http"
	"strings"
	"testing"
)

// Every operation of the document refuses what it does not read of a query,
// before it does anything.
func TestQueriesAreChecked(t *testing.T) {
	t.Parallel()
	s := newService(t)
	operations := 0
	for path, item := range member(s.schema.root["paths"]) {
		for method := range member(item) {
			operations++
			do := func(query string) *answer {
				body := ""
				if method == "post" || method == "patch" || method == "put" {
					body = with("payload", "1")
				}
				return s.do(strings.ToUpper(method), strings.ReplaceAll(path, "{id}", storedID)+"?"+query, body, "Orchestrator-Completion-Token", completionToken)
			}
			s.refused(do("dry_run=true"), http.StatusUnprocessableEntity, `["query","dry_run"] extra_forbidden`)
			s.refused(do("Limit=1&labels="+marker+"&dry_run"), http.StatusUnprocessableEntity,
				`["query","Limit"] extra_forbidden`, `["query","dry_run"] extra_forbidden`, `["query","labels"] extra_forbidden`)
			s.refused(do("="+marker), http.StatusUnprocessableEntity, `["query",""] extra_forbidden`)
			s.refused(do("a=%zz"+marker), http.StatusUnprocessableEntity, `["query"] invalid`)
		}
	}
	if operations < 15 {
		t.Errorf("the document has %d operations", operations)
	}
	s.refused(s.get("/tasks/"+storedID+"?wait_seconds=0&wait_seconds=1"), http.StatusUnprocessableEntity, `["query","wait_seconds"] duplicate`)
	if a := s.do(http.MethodHead, "/health?x=1", ""); a.status != http.StatusUnprocessableEntity {
		t.Errorf("HEAD with a parameter: got %d, want 422", a.status)
	}
	if n := s.store.callCount(); n != 0 {
		t.Errorf("the store was asked %d times", n)
	}
	// A query without parameters is none, and pages are no operations.
	for _, path := range []string{"/health?", "/health/live?&", "/docs/index.html?x=1", "/openapi.json?x=1"} {
		if a := s.get(path); a.status != http.StatusOK {
			t.Errorf("%s: got %d, want 200", path, a.status)
		}
	}
	// Who has no credentials is told that, and nothing of parameters.
	strangers := newService(t, func(o *settings) {
		o.Callers = fakeCallers(func(http.Header) (string, []string, error) { return "", nil, nil })
	})
	if a := strangers.get("/tasks?x=1"); a.status != http.StatusForbidden {
		t.Errorf("a caller without scopes: got %d, want 403", a.status)
	}
}
