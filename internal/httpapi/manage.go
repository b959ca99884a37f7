package httpapi

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/danielgtaylor/huma/v2"

	"github.com/melodia/orchestrator/internal/httpserver"
	"github.com/melodia/orchestrator/internal/task"
)

// manageErrors are the statuses that an act on one task can be answered with,
// besides 422 and 500.
var manageErrors = []int{
	http.StatusForbidden, http.StatusNotFound, http.StatusConflict, http.StatusTooManyRequests, http.StatusServiceUnavailable,
}

func (a *API) cancelOperation() huma.Operation {
	responses := a.responses(http.StatusOK, Task{}, etagHeader(`"1-running-0-cancelling"`))
	accepted := *responses["200"] // all is the same but the status
	responses["200"].Description, accepted.Description = "The task is cancelled.", "The task is running: its call is being cut off."
	responses["202"] = &accepted
	return huma.Operation{
		OperationID: "cancel-task", Method: http.MethodPost, Path: "/tasks/{id}/cancel", Tags: []string{"manage"}, Security: needs(scopeManage),
		Summary: "Cancel a task",
		Description: "A pending task is cancelled at once: 200. Of a running one the call is to be cut off (202): at once where this instance makes it, " +
			"otherwise with the next heartbeat of the one that does. The target may have done the work all the same: a task that succeeds or fails meanwhile stays so, " +
			"but it is never retried. One that its target has taken (completion) is cancelled at once: 200; the target learns it from the 409 to its next report. A cancelled task makes no callback, and its idempotency key is free again; that of a batch is not. 409: it has ended, or is being cancelled already.",
		Parameters: a.parameters(TaskPath{}), Responses: responses, Errors: manageErrors,
	}
}

func (a *API) cancel(w http.ResponseWriter, r *http.Request) error {
	t, err := a.act(r, "task cancelled", a.Store.Cancel)
	if err != nil {
		return err
	}
	status := http.StatusOK
	if t.State == task.Running {
		a.Dispatcher.CutOff(map[task.ID]int64{t.ID: t.LastClaim})
		status = http.StatusAccepted
	}
	if t.Completion != nil && t.Queue != "" {
		a.Dispatcher.Wake() // its target may have had it: others of the queue may start
	}
	return a.answerTask(w, r, status, t)
}

func (a *API) runOperation() huma.Operation {
	return huma.Operation{
		OperationID: "run-task", Method: http.MethodPost, Path: "/tasks/{id}/run", Tags: []string{"manage"}, Security: needs(scopeManage),
		Summary: "Run a task now",
		Description: "Makes a pending task due, whatever it waits for: its run_at, or the time of a retry. One that is due already keeps its place. " +
			"The limits and a pause of its queue do not hold this one call up, which counts there while it is under way; a host that is not healthy does. " +
			"The call itself is made by whichever instance is free. 409: it is running, has ended, or is being cancelled.",
		Parameters: a.parameters(TaskPath{}), Responses: a.oneTask(), Errors: manageErrors,
	}
}

func (a *API) run(w http.ResponseWriter, r *http.Request) error {
	t, err := a.act(r, "task made due", a.Store.MakeDue)
	if err != nil {
		return err
	}
	a.Dispatcher.Wake()
	return a.answerTask(w, r, http.StatusOK, t)
}

func (a *API) redriveOperation() huma.Operation {
	return huma.Operation{
		OperationID: "redrive-task", Method: http.MethodPost, Path: "/tasks/{id}/redrive", Tags: []string{"manage"}, Security: needs(scopeManage),
		Summary: "Redrive a task",
		Description: "A failed or cancelled task becomes pending again, due now, with a fresh budget of attempts. Its story stays, and the new attempts are numbered from 1. " +
			"An expires_at that has passed when it is due is dropped. 409: it has not ended, or it has succeeded.",
		Parameters: append(linkParameters()[:1], a.parameters(TaskPath{})...), Responses: a.oneTask(),
		Errors: append([]int{http.StatusLoopDetected}, manageErrors...),
	}
}

func (a *API) redrive(w http.ResponseWriter, r *http.Request) error {
	from, err := a.origin(r)
	if err != nil {
		return err
	}
	t, err := a.act(r, "task redriven", func(ctx context.Context, id task.ID) (*task.Task, error) {
		return a.Intake.Redrive(ctx, from, id)
	})
	if err != nil {
		return err
	}
	return a.answerTask(w, r, http.StatusOK, t)
}

// act does something to the task that a request names and logs it.
func (a *API) act(r *http.Request, done string, do func(context.Context, task.ID) (*task.Task, error)) (*task.Task, error) {
	id, err := a.taskID(r)
	if err != nil {
		return nil, err
	}
	ctx := r.Context()
	t, err := do(ctx, id)
	if err != nil {
		return nil, err
	}
	a.Log.InfoContext(ctx, done, "task_id", t.ID.String(), "state", string(t.State), "caller", httpserver.Principal(ctx)) //nolint:sloglint // one of a few constants
	return t, nil
}

type changeInput struct {
	TaskPath
	IfMatch string `header:"If-Match" example:"\"0-pending-0\"" doc:"Change the task only in a version that has one of these ETags; * stands for any. Without it whatever others changed meanwhile may be overwritten, field by field."`
}

func (a *API) changeOperation() huma.Operation {
	return huma.Operation{
		OperationID: "change-task", Method: http.MethodPatch, Path: "/tasks/{id}", Tags: []string{"manage"}, Security: needs(scopeManage),
		Summary: "Change a pending task",
		Description: "Changes what is given and nothing else (application/json, or application/merge-patch+json by RFC 7396 with a payload that is replaced as a whole). " +
			"The task must obey all rules for new ones then; its url, method, auth and callbacks stay as they are. In another queue it waits for that one's limits. A task that was changed has another ETag. " +
			"409: it is running, has ended, or is being cancelled. 412: it is not in a version that If-Match names any more; read it again.",
		RequestBody: jsonBody(a.body(ChangeRequest{}), map[string]*huma.Example{
			"later":  example("Later", `{"run_at":"2030-12-25T00:00:00Z"}`),
			"retry":  example("With more attempts and a longer timeout", `{"timeout_seconds":60,"retry":{"max_attempts":20},"expires_at":null}`),
			"tenant": example("With another header", `{"headers":{"X-Tenant":"melodia","X-Old":null},"payload":{"song_id":42}}`),
		}),
		Parameters: a.parameters(changeInput{}), Responses: a.oneTask(),
		Errors: append([]int{http.StatusNotFound, http.StatusConflict, http.StatusPreconditionFailed}, bodyErrors...),
	}
}

func (a *API) change(w http.ResponseWriter, r *http.Request) error {
	var in changeInput
	if err := a.readParams(r, &in); err != nil {
		return err
	}
	request := new(ChangeRequest)
	if err := a.readBody(r, request); err != nil {
		return err
	}
	change, errs := request.change()
	if errs != nil {
		return errs
	}
	t, err := a.act(r, "task changed", func(ctx context.Context, id task.ID) (*task.Task, error) {
		return a.Intake.Change(ctx, id, change, func(t *task.Task) error {
			if !ifMatch(in.IfMatch, etag(t)) {
				return newProblem(http.StatusPreconditionFailed, "The task is not in a version that If-Match names. Read it again, with its ETag, and decide anew.")
			}
			return nil
		})
	})
	if err != nil {
		return err
	}
	return a.answerTask(w, r, http.StatusOK, t)
}

// BulkRequest says which tasks to act on.
type BulkRequest struct {
	Filter Filter `json:"filter" doc:"Which tasks: the parameters of GET /tasks, with state and reason as lists and labels as an object. At least one."`
	DryRun *bool  `json:"dry_run,omitempty" example:"true" doc:"Only say which tasks match. It must be false to do anything. Default: true."`
}

// BulkRedriveRequest says which tasks to redrive, and how fast.
type BulkRedriveRequest struct {
	BulkRequest
	SpreadSeconds float64 `json:"spread_seconds,omitempty" minimum:"0" maximum:"86400" example:"600" doc:"Make the tasks due evenly over so long from now on, so that a target that just came back is not flattened."`
}

// BulkResult is the result of an act on many tasks.
type BulkResult struct {
	Matched int      `json:"matched" example:"812" doc:"How many tasks match; at most 10000, which means that there may be more."`
	Changed int      `json:"changed" example:"812" doc:"How many were cancelled, or redriven; 0 in a dry run. The rest had changed meanwhile and no longer matched."`
	Sample  []string `json:"sample" nullable:"false" example:"[\"01939e0c-5c1e-7cc1-b1a6-9d8a4d6c1a2b\"]" doc:"The ids of up to 10 that match."`
	DryRun  bool     `json:"dry_run" example:"false" doc:"Whether it was only asked which tasks match."`
}

const (
	// maxBulk is the most tasks that one call acts on.
	maxBulk = 10_000
	// bulkStep is how many of them one statement does: they are locked for some
	// ten milliseconds.
	bulkStep  = 250
	maxSample = 10
)

// bulkOperation declares an act on many tasks. Of examples Swagger UI fills in
// the first by name: that one must be a dry run.
func (a *API) bulkOperation(id, path, summary, description string, body any, examples map[string]*huma.Example) huma.Operation {
	return huma.Operation{
		OperationID: id, Method: http.MethodPost, Path: path, Tags: []string{"manage"}, Security: needs(scopeManage),
		Summary: summary,
		Description: description + " Without \"dry_run\": false nothing is done. One call acts on the 10,000 newest that match at most; call again for the rest, until matched is 0. " +
			"It is done in steps, which end when the caller hangs up: after an error some may have been done. One such call at a time is carried out by an instance; 429 to others.",
		RequestBody: jsonBody(a.body(body), examples), Responses: a.responses(http.StatusOK, BulkResult{}), Errors: bodyErrors,
	}
}

func (a *API) cancelManyOperation() huma.Operation {
	return a.bulkOperation("cancel-tasks", "/tasks/cancel", "Cancel many tasks",
		"Cancels the pending and running tasks that match, as /tasks/{id}/cancel does.", BulkRequest{}, map[string]*huma.Example{
			"ask": example("Which tasks would be cancelled?", `{"filter":{"labels":{"kind":"play"},"host":"example.com"}}`),
			"do":  example("Cancel them", `{"filter":{"labels":{"kind":"play"},"host":"example.com"},"dry_run":false}`),
		})
}

func (a *API) cancelMany(w http.ResponseWriter, r *http.Request) error {
	request := new(BulkRequest)
	if err := a.readBody(r, request); err != nil {
		return err
	}
	f, err := request.filter(task.Pending, task.Running)
	if err != nil {
		return err
	}
	result, err := a.bulk(r.Context(), f, request, "tasks cancelled", func(ids []task.ID, _, _ int) (int, error) {
		count, running, err := a.Store.CancelMany(r.Context(), ids)
		a.Dispatcher.CutOff(running)
		return count, err
	})
	if err != nil {
		return err
	}
	return a.answer(w, r, http.StatusOK, result)
}

func (a *API) redriveManyOperation() huma.Operation {
	operation := a.bulkOperation("redrive-tasks", "/tasks/redrive", "Redrive many tasks",
		"Redrives the failed and cancelled tasks that match, as /tasks/{id}/redrive does, the oldest first.", BulkRedriveRequest{}, map[string]*huma.Example{
			"ask": example("Which tasks would be redriven?", `{"filter":{"state":["failed"],"finished_after":"2026-11-24T12:00:00Z"}}`),
			"do":  example("Redrive them over ten minutes", `{"filter":{"state":["failed"],"reason":["attempts_exhausted"]},"dry_run":false,"spread_seconds":600}`),
		})
	operation.Parameters = linkParameters()[:1]
	operation.Errors = append([]int{http.StatusLoopDetected}, operation.Errors...)
	return operation
}

func (a *API) redriveMany(w http.ResponseWriter, r *http.Request) error {
	from, err := a.origin(r)
	if err != nil {
		return err
	}
	request := new(BulkRedriveRequest)
	if err := a.readBody(r, request); err != nil {
		return err
	}
	f, err := request.filter(task.Failed, task.Cancelled)
	if err != nil {
		return err
	}
	var spread time.Duration
	setDuration(&spread, &request.SpreadSeconds)
	result, err := a.bulk(r.Context(), f, &request.BulkRequest, "tasks redriven", func(ids []task.ID, done, all int) (int, error) {
		apart := spread / time.Duration(all)
		return a.Intake.RedriveMany(r.Context(), from, ids, time.Duration(done)*apart, apart)
	})
	if err != nil {
		return err
	}
	return a.answer(w, r, http.StatusOK, result)
}

// filter returns which tasks in one of states are meant, in the domain's terms.
func (r *BulkRequest) filter(states ...task.State) (f task.Filter, err error) {
	f, err = r.Filter.filter()
	errs, _ := err.(task.Errors) //nolint:errorlint // filter wraps nothing
	for i := range errs {
		errs[i].Path = append([]string{"filter"}, errs[i].Path...)
	}
	switch {
	case errs != nil:
		return f, errs
	case f.IsZero():
		return f, task.Errors{{Path: []string{"filter"}, Message: "must not be empty: that would mean all tasks", Kind: "missing"}}
	case f.States == nil:
		f.States = states
	case slices.ContainsFunc(f.States, func(s task.State) bool { return !slices.Contains(states, s) }):
		return f, task.Errors{{Path: []string{"filter", "state"}, Kind: "conflict",
			Message: "must name no other states than " + joinStates(states) + ", or be left out"}}
	}
	return f, nil
}

func joinStates(states []task.State) string {
	words := make([]string, len(states))
	for i, s := range states {
		words[i] = string(s)
	}
	return strings.Join(words, " and ")
}

// bulk acts on the tasks that match f, step by step: act is told the ids, how
// many came before and how many there are, and returns how many it changed.
func (a *API) bulk(ctx context.Context, f task.Filter, r *BulkRequest, done string, act func(ids []task.ID, before, all int) (int, error)) (result BulkResult, err error) {
	if !a.bulkActs.CompareAndSwap(false, true) {
		return result, task.ErrOverloaded
	}
	defer a.bulkActs.Store(false)
	ids, err := a.Store.Match(ctx, &f, maxBulk)
	if err != nil {
		return result, err
	}
	slices.Reverse(ids) // the oldest first
	result = BulkResult{Matched: len(ids), Sample: make([]string, 0, maxSample), DryRun: r.DryRun == nil || *r.DryRun}
	for _, id := range ids[:min(len(ids), maxSample)] {
		result.Sample = append(result.Sample, id.String())
	}
	if result.DryRun {
		return result, nil
	}
	for before := 0; before < len(ids) && err == nil; before += bulkStep {
		var changed int
		if err = ctx.Err(); err == nil {
			changed, err = act(ids[before:min(before+bulkStep, len(ids))], before, len(ids))
		}
		result.Changed += changed
	}
	a.Log.InfoContext(ctx, done, "count", result.Changed, "matched", len(ids), "sample", result.Sample, "caller", httpserver.Principal(ctx)) //nolint:sloglint // one of a few constants
	if errors.Is(err, task.ErrOverloaded) && result.Changed > 0 {                                                                            // whose own text says that nothing was done
		err = newProblem(http.StatusServiceUnavailable, "Some of the tasks were changed; then the service had too much under way. Call again for the rest.").retryLater()
	}
	return result, err
}
