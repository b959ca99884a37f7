package httpapi

import (
	"context"
	"net/http"
	"time"

	"github.com/danielgtaylor/huma/v2"
)

// healthTimeout is how long the database may take to prove that it is there.
const healthTimeout = time.Second

// Health is whether the service can do its work.
type Health struct {
	Status  string       `json:"status" enum:"ok,unavailable" example:"ok" doc:"ok exactly when the answer's status is 200."`
	Version string       `json:"version" example:"1.0.0" doc:"The version of this instance."`
	Reason  string       `json:"reason,omitzero" example:"migrations wait for a lock held by session 4711 (application_name \"pg_dump\", state idle in transaction, since 2026-12-25T00:00:00Z)" doc:"While it starts: what it waits for."`
	Checks  HealthChecks `json:"checks" doc:"What was looked at."`
}

// HealthChecks are the parts of Health.
type HealthChecks struct {
	Database   DatabaseCheck   `json:"database" doc:"Whether the database answers."`
	Dispatcher DispatcherCheck `json:"dispatcher" doc:"Whether tasks are being carried out."`
}

// DatabaseCheck is whether the database answers.
type DatabaseCheck struct {
	Status         string   `json:"status" enum:"ok,unavailable" example:"ok" doc:"unavailable: no answer within 1 s, or it takes no tasks (read-only, disk full)."`
	LatencySeconds *float64 `json:"latency_seconds" example:"0.0011" doc:"How long the database took to answer. Null without an answer."`
}

// DispatcherCheck is whether tasks are being carried out.
type DispatcherCheck struct {
	Status           string   `json:"status" enum:"ok,short,off,starting,stopped" example:"ok" doc:"short: this instance lacks something to make all its calls, the reason says what, and claims less. off: this instance only takes tasks (DISPATCH=false). starting: it has not registered yet. stopped: it is shutting down."`
	Reason           string   `json:"reason,omitempty" example:"no name server answers" doc:"With status short: what this instance lacked within the last 10 s, and what to do."`
	Running          int      `json:"running" example:"3" doc:"Calls under way in this instance."`
	OldestDueSeconds *float64 `json:"oldest_due_seconds" example:"0" doc:"For how long the longest waiting task has been due, over all instances. Tasks that wait for their host, and those of queues that are paused or have limits, do not count. Null when the database did not answer."`
}

func (a *API) healthOperation() huma.Operation {
	responses := a.responses(http.StatusOK, Health{})
	responses["503"] = &huma.Response{Description: "It cannot, the checks say why. The same shape.", Content: responses["200"].Content}
	return huma.Operation{
		OperationID: "get-health", Method: http.MethodGet, Path: "/health", Tags: []string{"health"}, Security: openToAll,
		Summary: "Can it do its work?",
		Description: "Readiness, for startup probes and monitoring: 200, or 503 when the database cannot be reached within 1 s or takes no tasks, while migrations are being applied or wait, while shutting down, or when the dispatcher has stopped. " +
			"An instance that lacks file descriptors, memory, local ports or name servers stays at 200, with checks.dispatcher.status short: it still takes tasks, which others may carry out, and a restart would help no target.",
		Responses: responses,
	}
}

func (a *API) health(w http.ResponseWriter, r *http.Request) error {
	ctx, cancel := context.WithTimeout(r.Context(), healthTimeout)
	defer cancel()
	if reason := a.notReady.Load(); reason != nil {
		return a.answer(w, r, http.StatusServiceUnavailable, a.starting(*reason))
	}
	status, health := http.StatusOK, Health{Status: "ok", Version: a.Version}
	checks := &health.Checks
	checks.Dispatcher.Status, checks.Dispatcher.Running = a.Dispatcher.Health()
	if s := a.Dispatcher.Shortage(); s != "" && checks.Dispatcher.Status == "ok" {
		checks.Dispatcher.Status, checks.Dispatcher.Reason = "short", string(s)
	}

	start := time.Now()
	overdue, err := a.Store.Health(ctx)
	if err == nil {
		latency, seconds := time.Since(start).Seconds(), overdue.Seconds()
		checks.Database = DatabaseCheck{Status: "ok", LatencySeconds: &latency}
		checks.Dispatcher.OldestDueSeconds = &seconds
	} else {
		checks.Database.Status = "unavailable"
		if count := a.unhealthy.Count(); count > 0 {
			a.Log.WarnContext(ctx, "health check failed", "count", count, "error", err)
		}
	}
	if err != nil || checks.Dispatcher.Status == "starting" || checks.Dispatcher.Status == "stopped" {
		status, health.Status = http.StatusServiceUnavailable, "unavailable"
	}
	return a.answer(w, r, status, health)
}

// starting is /health before the API is ready.
func (a *API) starting(reason string) Health {
	return Health{
		Status: "unavailable", Version: a.Version, Reason: reason,
		Checks: HealthChecks{Database: DatabaseCheck{Status: "unavailable"}, Dispatcher: DispatcherCheck{Status: "starting"}},
	}
}

// LiveOutputBody is what GET /health/live answers.
type LiveOutputBody struct {
	Status string `json:"status" enum:"ok" example:"ok" doc:"The process answers."`
}

func (a *API) liveOperation() huma.Operation {
	return huma.Operation{
		OperationID: "get-liveness", Method: http.MethodGet, Path: "/health/live", Tags: []string{"health"}, Security: openToAll,
		Summary:     "Is the process there?",
		Description: "Liveness, for probes that restart the instance. Never touches the database: a restart would not mend that.",
		Responses:   a.responses(http.StatusOK, LiveOutputBody{}),
	}
}

func (a *API) live(w http.ResponseWriter, r *http.Request) error {
	return a.answer(w, r, http.StatusOK, LiveOutputBody{Status: "ok"})
}
