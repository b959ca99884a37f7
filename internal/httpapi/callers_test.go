package httpapi

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/danielgtaylor/huma/v2"
	"github.com/go-chi/chi/v5"
	"github.com/google/go-cmp/cmp"

	"github.com/melodia/orchestrator/internal/task"
)

// openRoutes are all that answer without credentials. DOCS=off takes away
// those of the documentation.
var openRoutes = []string{
	"GET /health", "GET /health/live",
	"GET /docs", "GET /docs/", "GET /docs/*", "GET /openapi.json", "GET /openapi.yaml",
}

// securedRoutes calls f for each route of the router that is not open.
func securedRoutes(t *testing.T, s *service, f func(method, path, scope string)) {
	t.Helper()
	n := 0
	err := chi.Walk(s.router, func(method, route string, _ http.Handler, _ ...func(http.Handler) http.Handler) error {
		operation := s.schema.operation(method, route)
		security := allOf(operation["security"])
		if slices.Contains(openRoutes, method+" "+route) {
			if said, _ := operation["security"].([]any); operation != nil && (said == nil || len(said) > 0) {
				t.Errorf("%s %s is open, the document says %v", method, route, security)
			}
			return nil
		}
		if way := []any{map[string]any{"completion_token": []any{}}}; cmp.Equal(security, way) {
			return nil // TestReportsWithoutAToken
		}
		n++
		scopes := map[string]bool{}
		for _, way := range security {
			for name, list := range member(way) {
				if s.schema.root["components"].(map[string]any)["securitySchemes"].(map[string]any)[name] == nil {
					t.Errorf("%s %s: the way in %s is not described", method, route, name)
				}
				for _, scope := range allOf(list) {
					scopes[scope.(string)] = true
				}
			}
		}
		if len(security) != 2 || len(scopes) != 1 {
			t.Errorf("%s %s declares %v: every route needs exactly one scope, by key and by token, or a place in the list of open ones", method, route, security)
			return nil
		}
		for scope := range scopes {
			if !slices.Contains(Scopes(), scope) {
				t.Errorf("%s %s needs the scope %s, which is none", method, route, scope)
			}
			f(method, strings.NewReplacer("{id}", "01939e0c-5c1e-7cc1-b1a6-9d8a4d6c1a2b").Replace(route), scope)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if n == 0 {
		t.Error("no route needs a scope")
	}
}

// What the document says of each route is what the route does.
func TestEveryRouteNeedsItsScope(t *testing.T) {
	t.Parallel()
	var scopes []string
	var unknown error
	s := newService(t, func(o *settings) {
		o.Callers = fakeCallers(func(http.Header) (string, []string, error) { return "plays", scopes, unknown })
	})
	// Complete enough for whatever is there.
	body := func(method string) string {
		if method == http.MethodGet || method == http.MethodDelete {
			return ""
		}
		return with("payload", `"`+marker+`"`)
	}
	securedRoutes(t, s, func(method, path, scope string) {
		scopes, unknown = nil, errors.New("no credentials came")
		a := s.do(method, path, body(method))
		s.refused(a, http.StatusUnauthorized)
		if got := a.header.Get("WWW-Authenticate"); got != `Bearer realm="orchestrator"` {
			t.Errorf("%s %s: got WWW-Authenticate %q", method, path, got)
		}
		if got := a.detail(); got != "The service cannot tell who calls: no credentials came." {
			t.Errorf("%s %s: got %q", method, path, got)
		}

		unknown = nil
		scopes = slices.DeleteFunc(Scopes(), func(other string) bool { return other == scope })
		a = s.do(method, path, body(method))
		s.refused(a, http.StatusForbidden)
		if got := a.detail(); !strings.Contains(got, "lacks the scope "+scope+",") {
			t.Errorf("%s %s: got %q, want it to name the scope %s", method, path, got, scope)
		}
		if got, want := a.header.Get("WWW-Authenticate"), `error="insufficient_scope", scope="`+scope+`"`; !strings.Contains(got, want) {
			t.Errorf("%s %s: got WWW-Authenticate %q, want %s in it", method, path, got, want)
		}

		scopes = []string{scope}
		if a := s.do(method, path, body(method)); a.status == http.StatusUnauthorized || a.status == http.StatusForbidden {
			t.Errorf("%s %s with the scope %s: got %d", method, path, scope, a.status)
		}
		s.store.taken()
		s.dispatcher.taken()
	})
}

// Nobody needs credentials for what is open, and nobody is asked there.
func TestOpenRoutesAskNobody(t *testing.T) {
	t.Parallel()
	s := newService(t, func(o *settings) {
		o.Callers = fakeCallers(func(http.Header) (string, []string, error) { panic("asked for credentials") })
		o.Rate, o.Burst = 0.001, 1
	})
	for range 3 {
		for _, path := range []string{"/health", "/health/live", "/docs/index.html", "/openapi.json", "/openapi.yaml"} {
			if a := s.get(path); a.status != http.StatusOK {
				t.Errorf("GET %s: got %d, want 200", path, a.status)
			}
		}
	}
}

// An operation that forgot its scope cannot be registered.
func TestOperationWithoutScopeIsRefused(t *testing.T) {
	t.Parallel()
	s := newService(t)
	defer func() {
		if p, _ := recover().(string); !strings.Contains(p, "names no scope") {
			t.Errorf("got panic %q, want one that asks for the scope", p)
		}
		if a := s.get("/forgotten"); a.status != http.StatusNotFound {
			t.Errorf("got %d, want 404", a.status)
		}
	}()
	s.handle(huma.Operation{OperationID: "forgotten", Method: http.MethodGet, Path: "/forgotten"}, func(http.ResponseWriter, *http.Request) error { return nil })
}

// Whoever cannot be told from a stranger because the issuer is away is told
// so, and not let in.
func TestIssuerAway(t *testing.T) {
	t.Parallel()
	s := newService(t, func(o *settings) {
		o.Callers = fakeCallers(func(http.Header) (string, []string, error) {
			return "", nil, fmt.Errorf("%w: it answered 500", task.ErrUnavailable)
		})
	})
	a := s.post("/enqueue", with("payload", `"`+marker+`"`))
	s.refused(a, http.StatusServiceUnavailable)
	if a.header.Get("Retry-After") == "" || !strings.Contains(a.detail(), "issuer") {
		t.Errorf("got %q, Retry-After %q", a.detail(), a.header.Get("Retry-After"))
	}
	if !strings.Contains(s.log.String(), "it answered 500") {
		t.Errorf("the log does not have the cause: %s", s.log)
	}
}

func TestTasksRecordTheirCreator(t *testing.T) {
	t.Parallel()
	s := newService(t)
	for name, want := range map[string]any{"plays@melodia.app": "plays@melodia.app", "": nil} {
		for path, body := range map[string]string{
			"/enqueue": with("payload", "1"), "/schedule": with("delay_seconds", "1"), "/tasks/batch": batchOf(with("payload", "1")),
		} {
			a := s.post(path, body, "X-Test-Caller", name)
			got := a.at("created_by")
			if path == "/tasks/batch" {
				got = a.at("tasks", 0, "created_by")
			}
			if a.status != http.StatusAccepted || got != want {
				t.Errorf("%s by %q: got %d and created_by %v, want 202 and %v", path, name, a.status, got, want)
			}
			if tasks := s.store.taken(); len(tasks) != 1 || tasks[0].CreatedBy != name {
				t.Errorf("%s by %q: stored %v", path, name, tasks)
			}
		}
	}
}

// A stranger's body is not even read, let alone kept.
func TestStrangersBodiesAreNotRead(t *testing.T) {
	t.Parallel()
	s := newService(t, func(o *settings) {
		o.Callers = fakeCallers(func(http.Header) (string, []string, error) { return "", nil, errors.New("no") })
	})
	body := &neverRead{t: t}
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "/enqueue", body)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/json")
	s.refused(s.serve(r), http.StatusUnauthorized)
}

type neverRead struct{ t *testing.T }

func (b *neverRead) Read([]byte) (int, error) {
	b.t.Error("the body is read")
	return 0, errors.New("read")
}

// One caller's flood costs nobody else anything.
func TestRatePerCaller(t *testing.T) {
	t.Parallel()
	s := newService(t, func(o *settings) { o.Rate, o.Burst = 0.25, 2 })
	// A batch is one request, as large as it may be.
	if a := s.post("/tasks/batch", batchOf(with("payload", "1"), with("payload", "2"), with("payload", "3")), "X-Test-Caller", "batches"); a.status != http.StatusAccepted {
		t.Errorf("a batch: got %d, want 202", a.status)
	}
	if a := s.post("/enqueue", with("payload", "1"), "X-Test-Caller", "batches"); a.status != http.StatusAccepted {
		t.Errorf("after a batch: got %d, want 202", a.status)
	}
	for i, want := range []int{http.StatusAccepted, http.StatusAccepted, http.StatusTooManyRequests, http.StatusTooManyRequests} {
		a := s.post("/enqueue", with("payload", "1"), "X-Test-Caller", "flood")
		if a.status != want {
			t.Fatalf("request %d: got %d, want %d", i+1, a.status, want)
		}
		// Up to 4 s until there is a token; refused requests do not put it off.
		if got := a.header.Get("Retry-After"); a.status == http.StatusTooManyRequests && got != "4" {
			t.Errorf("request %d: got Retry-After %q, want 4", i+1, got)
		}
	}
	s.store.taken()
	s.refused(s.do(http.MethodGet, "/tasks/01939e0c-5c1e-7cc1-b1a6-9d8a4d6c1a2b", "", "X-Test-Caller", "flood"), http.StatusTooManyRequests)
	if a := s.post("/enqueue", with("payload", "1"), "X-Test-Caller", "calm"); a.status != http.StatusAccepted {
		t.Errorf("somebody else: got %d, want 202", a.status)
	}
	if !strings.Contains(s.log.String(), `flood`) {
		t.Errorf("the log does not say who it was: %s", s.log)
	}
}
