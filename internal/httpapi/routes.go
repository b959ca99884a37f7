package httpapi

import (
	"net/http"
	"reflect"
	"strings"

	"github.com/danielgtaylor/huma/v2"
	"github.com/go-chi/chi/v5"
	"github.com/go-chi/chi/v5/middleware"

	"github.com/melodia/orchestrator/internal/httpserver"
)

// New returns the API with all its routes.
func New(o Options) *API {
	a := &API{Options: o, router: chi.NewMux(), shapes: make(map[reflect.Type]*shape), params: make(map[reflect.Type][]*param)}
	a.door = o.Guard.Door(a.fail)
	if o.Store == nil {
		a.Starting(startingReason)
	}
	a.document = describe(o.Version)
	a.registry = a.document.Components.Schemas
	a.router.NotFound(a.notFound)
	a.router.MethodNotAllowed(a.methodNotAllowed)
	a.router.Use(a.door.Recover, httpserver.SecurityHeaders, a.door.RefuseHeads, a.door.BehindGateway, a.door.RefuseOtherSites, middleware.GetHead)
	a.routes()
	a.documentTask()
	a.completeDocument()
	return a
}

// ServeHTTP serves every endpoint.
func (a *API) ServeHTTP(w http.ResponseWriter, r *http.Request) { a.router.ServeHTTP(w, r) }

// routes is every path of the service, and who calls it.
func (a *API) routes() {
	// Any Melodia service: something to do now, or at a given moment; one, or many.
	a.handle(a.enqueueOperation(), a.enqueue)
	a.handle(a.scheduleOperation(), a.schedule)
	a.handle(a.batchOperation(), a.submitBatch)
	// The caller that submitted a task: its state and attempts (Location of the first two).
	a.handle(a.getTaskOperation(), a.getTask)
	// The target of a task that it has taken.
	a.handle(a.completeOperation(), a.complete)
	// People, and services that look after their own: which tasks are there, how
	// many, and why has one not run?
	a.handle(a.findOperation(), a.find)
	a.handle(a.countsOperation(), a.counts)
	a.handle(a.explainOperation(), a.explain)
	// People, at night: call a task off, make it due, change it, give it another
	// chance; one, or all that match.
	a.handle(a.cancelOperation(), a.cancel)
	a.handle(a.runOperation(), a.run)
	a.handle(a.changeOperation(), a.change)
	a.handle(a.redriveOperation(), a.redrive)
	a.handle(a.cancelManyOperation(), a.cancelMany)
	a.handle(a.redriveManyOperation(), a.redriveMany)
	// People: what tasks wait for.
	a.handle(a.listQueuesOperation(), a.listQueues)
	a.handle(a.getQueueOperation(), a.getQueue)
	a.handle(a.putQueueOperation(), a.putQueue)
	a.handle(a.patchQueueOperation(), a.patchQueue)
	a.handle(a.deleteQueueOperation(), a.deleteQueue)
	a.handle(a.pauseQueueOperation(), a.pauseQueue)
	a.handle(a.resumeQueueOperation(), a.resumeQueue)
	a.handle(a.purgeQueueOperation(), a.purgeQueue)
	a.handle(a.listQueueKeysOperation(), a.listQueueKeys)
	a.handle(a.getQueueKeyOperation(), a.getQueueKey)
	a.handle(a.putQueueKeyOperation(), a.putQueueKey)
	a.handle(a.deleteQueueKeyOperation(), a.deleteQueueKey)
	// People: which hosts do tasks wait for, and why?
	a.handle(a.listHostsOperation(), a.listHosts)
	a.handle(a.closeHostOperation(), a.closeHost)
	// An external engine (Cloud Tasks, Cloud Scheduler, Pub/Sub push) or an
	// operator: carry out one task in this request.
	a.handle(a.workerOperation(), a.work)
	// Cloud Run's startup probe, and monitoring: is it ready?
	a.handle(a.healthOperation(), a.health)
	// Cloud Run's liveness probe: is the process there?
	a.handle(a.liveOperation(), a.live)

	if a.HideDocs {
		return
	}
	// People: Swagger UI. Tools: the document that it shows.
	a.router.Get("/docs", redirectToDocs)
	a.router.Get("/docs/", redirectToDocs)
	a.router.Get("/docs/*", a.docs())
	a.router.Get("/openapi.json", a.serveDocument("application/json", (*huma.OpenAPI).MarshalJSON))
	a.router.Get("/openapi.yaml", a.serveDocument("application/yaml", (*huma.OpenAPI).YAML))
}

// Owns reports whether a path begins as one of the service's own, so that no gateway may
// serve the service there: requests to either could not be told apart.
func (a *API) Owns(path string) bool {
	first, _, _ := strings.Cut(strings.TrimPrefix(path, "/"), "/")
	for own := range a.document.Paths {
		if name, _, _ := strings.Cut(own[1:], "/"); name == first {
			return true
		}
	}
	return first == "docs" || first == "openapi.json" || first == "openapi.yaml"
}

func (a *API) methodNotAllowed(w http.ResponseWriter, r *http.Request) {
	allowed := a.allowedMethods(r)
	if allowed == nil { // chi does not look for a path when it does not know the method
		a.notFound(w, r)
		return
	}
	p := newProblem(http.StatusMethodNotAllowed, "This path does not take this method, only "+strings.Join(allowed, ", ")+".")
	p.header = http.Header{"Allow": {strings.Join(allowed, ", ")}}
	a.fail(w, r, p)
}

// allowedMethods are the methods that the path of r takes.
func (a *API) allowedMethods(r *http.Request) (allowed []string) {
	path := r.URL.RawPath // as chi does
	if path == "" {
		path = r.URL.Path
	}
	for _, method := range []string{http.MethodGet, http.MethodPost, http.MethodPatch, http.MethodPut, http.MethodDelete} {
		if !a.router.Match(chi.NewRouteContext(), method, path) {
			continue
		}
		allowed = append(allowed, method)
		if method == http.MethodGet {
			allowed = append(allowed, http.MethodHead)
		}
	}
	return allowed
}
