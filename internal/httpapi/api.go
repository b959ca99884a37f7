// Package httpapi is the JSON API: the operations that other services, people and
// probes call, their problems (RFC 9457), and the documentation.
//
// Each operation is registered once: its handler together with what the OpenAPI document
// says of it. huma makes schemas of the Go types and writes the document, and has no part
// in a request: this package reads bodies and parameters, and holds them against the same
// schemas. A handler turns a request into the domain's terms, asks the intake, the store
// or the dispatcher, and turns the answer back.
package httpapi

import (
	"context"
	"log/slog"
	"reflect"
	"sync/atomic"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/go-chi/chi/v5"

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

	// SomeHosts returns up to limit hosts that are not healthy, in the order of their names,
	// from behind one on.
	SomeHosts(ctx context.Context, behind string, limit int) ([]task.Host, error)
	// CloseHost makes a host healthy, or returns [task.ErrNotFound] where it is.
	CloseHost(ctx context.Context, name string) error
	// Now returns the moment by the store's clock.
	Now(ctx context.Context) (time.Time, error)
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
	// Report takes what the target of a task reports that it has taken. until is by when it
	// must report again.
	Report(ctx context.Context, id task.ID, token task.Token, r *task.Report) (state task.State, until time.Time, err error)
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
	// Guard is what the API shares with other doors.
	Guard *httpserver.Guard
	// HideDocs leaves out /docs and the document.
	HideDocs bool
	// ShowPayloads lets callers with the scope read see the bodies of calls too.
	ShowPayloads bool
	// Defaults are what the document says of what a request leaves out: Timeout and Retry.
	Defaults task.Spec
	// Lease is how long an instance may be silent before others take its tasks.
	Lease time.Duration
	// Version is shown in /health and in the OpenAPI document.
	Version string
	// ExampleURL is the target in the examples of the OpenAPI document.
	ExampleURL string
	Log        *slog.Logger
}

// API serves the service's HTTP endpoints. Make one with [New].
type API struct {
	Options
	door     *httpserver.Door
	router   *chi.Mux
	registry huma.Registry
	shapes   map[reflect.Type]*shape   // of what requests send
	params   map[reflect.Type][]*param // of structs that take parameters
	document *huma.OpenAPI

	// notReady says why there is no store yet; nil when there is one.
	notReady atomic.Pointer[string]

	bulkActs  atomic.Bool     // whether an act on many tasks is under way
	unhealthy logging.Limiter // answers of /health
}
