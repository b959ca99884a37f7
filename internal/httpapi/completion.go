package httpapi

import (
	"encoding/json"
	"errors"
	"net/http"

	"github.com/danielgtaylor/huma/v2"

	"github.com/melodia/orchestrator/internal/task"
)

// completionTokenHeader has the proof that a report is that of the target that was called.
const completionTokenHeader = "Orchestrator-Completion-Token"

// holdersOnly is the Security of what the holder of a task's completion token may do.
var holdersOnly = []map[string][]string{{"completion_token": {}}}

// CompletionRequest lets a target take the task and report its end later.
type CompletionRequest struct {
	TimeoutSeconds   float64  `json:"timeout_seconds" minimum:"60" maximum:"86400" example:"3600" doc:"How long the target may take from its 202 on."`
	HeartbeatSeconds *float64 `json:"heartbeat_seconds,omitempty" minimum:"10" maximum:"3600" example:"60" doc:"How long it may report nothing: then the attempt is lost, and the task is tried again. Left out: as long as timeout_seconds. Not above that."`
}

// Completion says how long a target may take that takes the task.
type Completion struct {
	TimeoutSeconds   float64  `json:"timeout_seconds" example:"3600" doc:"How long the target may take from its 202 on."`
	HeartbeatSeconds *float64 `json:"heartbeat_seconds" example:"60" doc:"How long it may report nothing. Null: as long as timeout_seconds."`
}

func completionView(c *task.Completion) *Completion {
	if c == nil {
		return nil
	}
	return &Completion{TimeoutSeconds: c.Timeout.Seconds(), HeartbeatSeconds: present(c.Heartbeat.Seconds())}
}

// domain returns the request in the domain's terms.
func (r *CompletionRequest) domain() *task.Completion {
	if r == nil {
		return nil
	}
	c := new(task.Completion)
	setDuration(&c.Timeout, &r.TimeoutSeconds)
	setDuration(&c.Heartbeat, r.HeartbeatSeconds)
	return c
}

// ReportRequest is what a target reports of a task that it has taken.
type ReportRequest struct {
	Outcome  task.ReportKind `json:"outcome" enum:"succeeded,failed,heartbeat" example:"succeeded" doc:"succeeded and failed end the attempt. heartbeat: the target is still at it."`
	Result   json.RawMessage `json:"result,omitempty" example:"{\"song_id\":42}" doc:"With succeeded: any JSON of up to 64 KiB. It is shown with the task and sent to its callbacks, as the bytes that came."`
	Retry    *bool           `json:"retry,omitempty" example:"true" doc:"With failed: whether another attempt may help. false: the task fails. Default: true."`
	Progress *float64        `json:"progress,omitempty" minimum:"0" maximum:"1" example:"0.4" doc:"How much is done, from 0 to 1. Left out: as it was."`
	Note     *string         `json:"note,omitempty" example:"mixing" doc:"For people, up to 1000 bytes without control characters: shown by explain, and after failed in the attempt's error. Left out: as it was."`
}

// ReportResult is what follows from a report.
type ReportResult struct {
	State    task.State `json:"state" enum:"pending,running,succeeded,failed,cancelled" example:"running" doc:"The task's state from now on."`
	ReportBy Timestamp  `json:"report_by" nullable:"true" example:"2026-11-24T12:01:00.000000Z" doc:"By when the target must report again. Null: it need not, or its call is still under way."`
}

type completeInput struct {
	TaskPath
	Token string `header:"Orchestrator-Completion-Token" example:"oct_Ur7…" doc:"What the call had in this header."`
}

func (a *API) completeOperation() huma.Operation {
	parameters := a.parameters(completeInput{})
	return huma.Operation{
		OperationID: "complete-task", Method: http.MethodPost, Path: "/tasks/{id}/complete", Tags: []string{"tasks"}, Security: holdersOnly,
		Summary: "Report the end of a task, or a heartbeat",
		Description: "For targets of tasks with completion: each call of such a task has this operation's URL in Orchestrator-Completion-Url, and in Orchestrator-Completion-Token a token of this one attempt. " +
			"A target that answers 202 has taken the task, and reports here. It may report before it has answered, too. No API key or ID token is needed. " +
			"401: the token is missing, or is none of the task. 409: its attempt is over, because no heartbeat came in time or the task has ended; the target should stop. " +
			"After 503, or no answer, send the same again.",
		RequestBody: jsonBody(a.body(ReportRequest{}), map[string]*huma.Example{
			"done":   example("Done", `{"outcome":"succeeded","result":{"cover_url":"https://example.com/c/42"}}`),
			"alive":  example("Still at it", `{"outcome":"heartbeat","progress":0.4}`),
			"failed": example("It cannot be done", `{"outcome":"failed","retry":false,"note":"the song has no vocals"}`),
		}),
		Parameters: parameters, Responses: a.responses(http.StatusOK, ReportResult{}),
		Errors: []int{
			http.StatusBadRequest, http.StatusUnauthorized, http.StatusConflict, http.StatusRequestEntityTooLarge, http.StatusUnsupportedMediaType,
			http.StatusTooManyRequests, http.StatusServiceUnavailable,
		},
	}
}

// requireToken refuses requests without anything that could be a token, before their bodies
// are read.
func (a *API) requireToken(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, ok := task.ParseToken(r.Header.Get(completionTokenHeader)); !ok {
			a.fail(w, r, noToken())
			return
		}
		next.ServeHTTP(w, r)
	})
}

// noToken is the same for a token that is missing, for one that never was, and for a task
// that does not exist: who has no token learns nothing of tasks.
func noToken() *Problem {
	p := newProblem(http.StatusUnauthorized, "The header "+completionTokenHeader+" must have the token that this task's call had in the same header.")
	p.header = http.Header{"Www-Authenticate": {completionTokenHeader}}
	return p
}

func (a *API) complete(w http.ResponseWriter, r *http.Request) error {
	var in completeInput
	if err := a.readParams(r, &in); err != nil {
		return err
	}
	id, err := task.ParseID(in.ID)
	if err != nil {
		return err // the pattern lets no such id through
	}
	request := new(ReportRequest)
	if err := a.readBody(r, request); err != nil {
		return err
	}
	report := task.Report{Kind: request.Outcome, Result: request.Result, Retry: request.Retry == nil || *request.Retry, Progress: request.Progress}
	set(&report.Note, request.Note)
	if err := report.Check(); err != nil {
		return err
	}
	state, until, err := a.Dispatcher.Report(r.Context(), id, task.Token(in.Token), &report)
	switch {
	case errors.Is(err, task.ErrNotFound), errors.Is(err, task.ErrTokenUnknown):
		return noToken()
	case errors.Is(err, task.ErrEnded):
		return newProblem(http.StatusConflict, "The task has ended, and this report changed nothing. A report that was sent twice gets this the second time.")
	case errors.Is(err, task.ErrTokenOld):
		return newProblem(http.StatusConflict, "The attempt that this token is of is over, and this report changed nothing: no heartbeat came in time, or its call failed. Another attempt has a token of its own.")
	case err != nil:
		return err
	}
	return a.answer(w, r, http.StatusOK, ReportResult{State: state, ReportBy: Timestamp(until)})
}
