// Package httpapi is the inbound HTTP: the operations that other services,
// people and probes call, their problems (RFC 9457), and the documentation.
//
// Each operation is declared once, as Go types: huma validates requests
// against the same declarations from which it writes the OpenAPI document.
// A handler turns the request into the domain's terms, asks the store or the
// dispatcher, and turns the answer back.
package httpapi

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"reflect"
	"slices"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/adapters/humachi"
	"github.com/go-chi/chi/v5"
	"github.com/go-chi/chi/v5/middleware"

	"github.com/melodia/orchestrator/internal/httpserver"
	"github.com/melodia/orchestrator/internal/intake"
	"github.com/melodia/orchestrator/internal/logging"
	"github.com/melodia/orchestrator/internal/task"
)

// store is where tasks are kept.
type store interface {
	// Get returns a task without its body, as all do but GetWithBody.
	Get(ctx context.Context, id task.ID) (*task.Task, error)
	GetWithBody(ctx context.Context, id task.ID) (*task.Task, error)
	// Find returns up to limit tasks that match a filter, in its order, from
	// behind a position on.
	Find(ctx context.Context, f *task.Filter, behind task.Position, limit int) ([]*task.Task, error)
	// Counts also returns for how long the longest waiting task has been due.
	Counts(ctx context.Context) (counts map[task.State]task.Count, overdue time.Duration, err error)
	// Explain returns a task and the facts around it, where instances that were
	// silent for lease do not count.
	Explain(ctx context.Context, id task.ID, lease time.Duration) (*task.Task, task.Facts, error)
	// What people do to tasks; each returns the task as it is then.
	Cancel(ctx context.Context, id task.ID) (*task.Task, error)
	// MakeDue makes a pending task due now.
	MakeDue(ctx context.Context, id task.ID) (*task.Task, error)
	// Match returns the ids of up to limit tasks that match a filter, the newest first.
	Match(ctx context.Context, f *task.Filter, limit int) ([]task.ID, error)
	// CancelMany also returns the running tasks among those that it cancelled, with
	// the numbers of their claims.
	CancelMany(ctx context.Context, ids []task.ID) (count int, running map[task.ID]int64, err error)
	// Health returns for how long the longest waiting task has been due.
	Health(ctx context.Context) (overdue time.Duration, err error)

	// Queue returns a queue, or [task.ErrQueueNotFound], as all do that need one.
	Queue(ctx context.Context, name string) (task.Queue, error)
	// Queues returns up to limit queues, in the order of their names, from behind one on.
	Queues(ctx context.Context, behind string, limit int) ([]task.Queue, error)
	// QueueLoads returns how much each of some queues has to do, in their order.
	QueueLoads(ctx context.Context, names []string) ([]task.QueueLoad, error)
	// PutQueue writes a queue whose settings were read in its version, or returns
	// [task.ErrQueueChanged], as all do that take a version.
	PutQueue(ctx context.Context, q task.Queue) (task.Queue, error)
	PauseQueue(ctx context.Context, name string, paused bool) (task.Queue, error)
	// DeleteQueue returns [task.ErrQueueInUse] where tasks of it are pending or running.
	DeleteQueue(ctx context.Context, name string, version int64) error
	// QueueKey returns a flow key's own limits, or [task.ErrQueueKeyNotFound].
	QueueKey(ctx context.Context, queue, key string) (task.QueueKey, error)
	QueueKeys(ctx context.Context, queue, behind string, limit int) ([]task.QueueKey, error)
	PutQueueKey(ctx context.Context, k task.QueueKey) (task.QueueKey, error)
	DeleteQueueKey(ctx context.Context, queue, key string, version int64) error
}

// dispatcher carries out tasks.
type dispatcher interface {
	Execute(ctx context.Context, id task.ID) (task.Outcome, task.Decision, error)
	// ExecuteUnstored makes one call for a task that is not stored.
	ExecuteUnstored(ctx context.Context, t *task.Task) (task.Outcome, error)
	// Watch returns a channel that is closed soon after the task has ended, or
	// when the dispatcher is being stopped. Who watches has to leave.
	Watch(id task.ID) (ended <-chan struct{}, leave func(), err error)
	// CutOff ends the calls of running tasks that are to be cancelled, as far as
	// they are made here: claims are their numbers by task.
	CutOff(claims map[task.ID]int64)
	// CameBack says that a call of the task came to this service itself and waits here.
	CameBack(id task.ID)
	// Wake says that a stored task may be due earlier than before.
	Wake()
	// Health returns "starting", "ok", "off" (takes no tasks by itself) or "stopped".
	Health() (status string, running int)
	// Shortage is what this instance lacks at the moment to make calls; mostly empty.
	Shortage() task.Shortage
}

// Options are what the API works with. To write the OpenAPI document alone,
// Version, Defaults and ExampleURL are enough.
type Options struct {
	// Store, Dispatcher and Intake may be nil until [API.Ready].
	Store      store
	Dispatcher dispatcher
	Intake     *intake.Intake
	Callers    callers
	// Rate is how many requests a second one caller may make; 0: any number.
	// Burst is how many of them at once.
	Rate  float64
	Burst int
	// HideDocs leaves out /docs and the document.
	HideDocs bool
	// ShowPayloads lets callers with the scope read see the bodies of calls too.
	ShowPayloads bool
	// Defaults are what the document says of what a request leaves out: Timeout and Retry.
	Defaults task.Spec
	// Lease is how long an instance may be silent before others take its tasks.
	Lease time.Duration
	// NewID makes the ids of problems.
	NewID func() task.ID
	// Version is shown in /health and in the OpenAPI document.
	Version string
	// ExampleURL is the target in the examples of the OpenAPI document.
	ExampleURL string
	Log        *slog.Logger
}

// API serves the service's HTTP endpoints. Make one with [New].
type API struct {
	Options
	router   *chi.Mux
	registry huma.Registry
	shapes   map[reflect.Type]*shape   // of what requests send
	params   map[reflect.Type][]*param // of structs that take parameters
	document *huma.OpenAPI

	// notReady says why there is no store yet; nil when there is one.
	notReady atomic.Pointer[string]
	newID    atomic.Pointer[func() task.ID]

	rates      *rates
	bodies     atomic.Int64    // bytes of request bodies in memory
	callBodies atomic.Int64    // of those whose calls are under way
	answers    atomic.Int64    // bytes of answers that are being made of bodies of calls, or written
	bulkActs   atomic.Bool     // whether an act on many tasks is under way
	refusals   logging.Limiter // answers of 429 and 503
	strangers  logging.Limiter // answers of 401 and 403
	unhealthy  logging.Limiter // answers of /health
}

// New returns the API with all its routes.
func New(o Options) *API {
	useProblems()
	a := &API{Options: o, router: chi.NewMux(), rates: newRates(o.Rate, o.Burst), shapes: make(map[reflect.Type]*shape), params: make(map[reflect.Type][]*param)}
	a.newID.Store(&o.NewID)
	a.NewID = a.makeID
	if o.Store == nil {
		a.Starting(startingReason)
	}
	config := huma.Config{
		OpenAPI:      describe(o.Version),
		Transformers: []huma.Transformer{a.addInstance},
	}
	a.registry = config.Components.Schemas
	a.router.NotFound(a.notFound)
	a.router.MethodNotAllowed(a.methodNotAllowed)
	a.router.Use(a.recoverPanics, setHeaders, a.refuseHeads, a.refuseOtherSites, middleware.GetHead)
	api := jsonAPI{humachi.New(a.router, config)}
	// In this order: what strangers send is not kept, and a query is refused when its
	// request has arrived, so that a client that is still sending reads why.
	api.UseMiddleware(a.admit, a.waitUntilReady, a.readHumaBody, a.checkQuery, a.holdAnswer)
	a.document = api.OpenAPI()
	a.routes(api)
	a.documentDefaults()
	a.completeDocument()
	return a
}

// ServeHTTP serves every endpoint.
func (a *API) ServeHTTP(w http.ResponseWriter, r *http.Request) { a.router.ServeHTTP(w, r) }

const (
	// headTimeout is how long a caller may take to send a request's head, after the
	// connection was made or the head's first byte came.
	headTimeout = 10 * time.Second
	// requestTimeout is the same for the whole request.
	requestTimeout = 20 * time.Second
)

// Server returns a server of a with the bounds that its handlers rely on. It is
// to serve an [httpserver.Listener].
func (a *API) Server() *http.Server {
	return &http.Server{
		Handler: a,
		// They hold whether anybody reads the body or net/http passes over it, which
		// lifts them at the body's end: handlers may work for longer.
		ReadHeaderTimeout: headTimeout,
		ReadTimeout:       requestTimeout,
		// For answers that nobody reads. Where an answer may come late, it is counted
		// from there on.
		WriteTimeout: 30 * time.Second,
		IdleTimeout:  2 * time.Minute,
		// The server's Listener has a smaller bound, on the number of lines too.
		MaxHeaderBytes: httpserver.MaxHead,
		ErrorLog:       slog.NewLogLogger(a.Log.Handler(), slog.LevelDebug),
	}
}

// routes is every path of the service, and who calls it.
func (a *API) routes(api huma.API) {
	// Any Melodia service: something to do now, or at a given moment; one, or many.
	huma.Register(api, a.enqueueOperation(), a.enqueue)
	huma.Register(api, a.scheduleOperation(), a.schedule)
	huma.Register(api, a.batchOperation(), a.submitBatch)
	// Whoever submitted a task: what became of it (Location of the first two).
	a.handle(a.getTaskOperation(), a.getTask)
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
	a.router.Get("/openapi.json", serveDocument("application/json", a.document.MarshalJSON))
	a.router.Get("/openapi.yaml", serveDocument("application/yaml", a.document.YAML))
}

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
			{Name: "tasks", Description: "Hand in tasks and see what became of them."},
			{Name: "steering", Description: "Cancel, run, change and redrive tasks, one by one or many at once."},
			{Name: "queues", Description: "Limits, order and pauses of the tasks of a queue, and of single flow keys."},
			{Name: "worker", Description: "Carry out a task in the request itself."},
			{Name: "health", Description: "For probes and monitoring."},
		},
		// Where the document came from. A generated client is told the address.
		Servers: []*huma.Server{{URL: "/", Description: "This service"}},
		Components: &huma.Components{
			Examples: map[string]*huma.Example{"problem": example("A problem (RFC 9457)",
				`{"type":"about:blank","title":"Unprocessable Entity","status":422,"detail":"The request breaks rules; errors says which.","instance":"01939e0c-5c1e-7cc1-b1a6-9d8a4d6c1a2b",`+
					`"errors":[{"loc":["body","retry","max_attempts"],"msg":"must be at most 100","type":"less_than_equal"}]}`)},
			Schemas:         huma.NewMapRegistry("#/components/schemas/", huma.DefaultSchemaNamer),
			SecuritySchemes: securitySchemes(),
		},
	}
}

// documentDefaults says in words which values the settings give to what a request
// leaves out. The keyword default would have generated clients send those values,
// or demand them of their callers (openapi-typescript 7 makes such a member
// required), although another instance's settings may differ.
func (a *API) documentDefaults() {
	set := func(schema, property string, value any) {
		p := a.registry.Map()[schema].Properties[property]
		p.Description += fmt.Sprintf(" Default: %v.", value)
	}
	for _, schema := range []string{"TaskRequest", "ScheduleRequest", "BatchTask"} {
		set(schema, "timeout_seconds", a.Defaults.Timeout.Seconds())
		set(schema, "method", "POST")
	}
	retry := retryView(a.Defaults.Retry)
	set("RetryRequest", "max_attempts", retry.MaxAttempts)
	set("RetryRequest", "max_retry_duration_seconds", retry.MaxRetryDurationSeconds)
	set("RetryRequest", "min_backoff_seconds", retry.MinBackoffSeconds)
	set("RetryRequest", "max_backoff_seconds", retry.MaxBackoffSeconds)
	set("RetryRequest", "max_doublings", retry.MaxDoublings)
	set("RetryRequest", "retry_client_errors", retry.RetryClientErrors)
}

// meanings say what a problem's status means here.
var meanings = map[string]string{
	"400": "The body is missing, malformed, or not what its headers announce.",
	"401": "It is not known who calls: no credentials came, or such as are not valid.",
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
	"503": "The database, or the issuer of ID tokens, is out of reach; the service is starting or shutting down; answers that callers have not read take too much memory; or (/worker-endpoint) the service lacks what a call needs. Try again after Retry-After.",
	"504": "The target did not answer within the timeout.",
	"508": "More calls led to this request than MAX_HOPS allows, or it is a call that /worker-endpoint made itself. Orchestrator-Retry: never tells a task that made it to give up.",
}

// completeDocument puts right what huma cannot say.
func (a *API) completeDocument() {
	callback := Callback{URL: "https://example.com/ended", Headers: map[string]string{"X-Tenant": "melodia"}}
	for property, example := range map[string]any{
		"auth": Auth{Type: "oidc", Audience: "https://plays-4fk2.run.app"}, "on_success": callback, "on_failure": callback,
	} {
		p := a.registry.Map()["Task"].Properties[property]
		*p = huma.Schema{
			Description: p.Description,
			OneOf:       []*huma.Schema{{Ref: p.Ref}, {Type: "null"}},
			Examples:    []any{example},
		}
	}
	for _, p := range []*huma.Schema{
		a.registry.Map()["Task"].Properties["reason"],
		a.registry.Map()["Task"].Properties["priority"],
		a.registry.Map()["Facts"].Properties["reason"],
		a.registry.Map()["Facts"].Properties["last_outcome"],
		a.registry.Map()["Ended"].Properties["reason"],
	} {
		p.Enum = append(p.Enum, nil) // null must be in an enum, whatever the type admits
	}
	a.documentRepeats()
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
			if operation.RequestBody != nil {
				delete(operation.RequestBody.Content, "application/octet-stream") // comes with RawBody
			}
			a.documentProblems(operation, http.StatusRequestHeaderFieldsTooLarge) // refuseHeads
			if scopeOf(operation) != "" {                                         // admit, waitUntilReady
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
				// One example for all: a page of sixteen operations would repeat the schema's a hundred times.
				content.Examples = map[string]*huma.Example{"problem": {Ref: "#/components/examples/problem"}}
				response.Description = meanings[status]
				if status == "401" {
					response.Headers = map[string]*huma.Param{"WWW-Authenticate": {
						Description: "How to say who calls.",
						Schema:      &huma.Schema{Type: huma.TypeString, Examples: []any{unknownCaller}},
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

func operationsOf(path *huma.PathItem) []*huma.Operation {
	return slices.DeleteFunc([]*huma.Operation{path.Get, path.Put, path.Post, path.Patch, path.Delete}, func(o *huma.Operation) bool { return o == nil })
}

// completeSchemas puts right what is wrong in any schema: patternDescription is huma's
// own word, and a document may have words of its own behind x- alone (OpenAPI 3.1 §4.9).
func (a *API) completeSchemas() {
	complete := func(s *huma.Schema) {
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

// documentRepeats adds the answer to a repeated submission. It is that to the
// first one, but for its header.
func (a *API) documentRepeats() {
	for _, path := range []string{"/enqueue", "/schedule", "/tasks/batch"} {
		responses := a.document.Paths[path].Post.Responses
		first := responses["202"]
		repeat := *first
		first.Headers = maps.Clone(first.Headers)
		delete(first.Headers, "Idempotent-Replayed")
		first.Description, repeat.Description = "It is stored.", "It was stored before, under the same Idempotency-Key."
		responses["200"] = &repeat
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
