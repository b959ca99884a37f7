package httpapi

import (
	"encoding/base64"
	"errors"
	"math"
	"net/http"
	"strconv"
	"strings"

	"github.com/danielgtaylor/huma/v2"

	"github.com/melodia/orchestrator/internal/httpserver"
	"github.com/melodia/orchestrator/internal/intake"
	"github.com/melodia/orchestrator/internal/task"
)

// TaskReference names a stored task.
type TaskReference struct {
	TaskID string `json:"task_id" pattern:"^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$" format:"uuid" patternDescription:"a UUID" example:"01939e0c-5c1e-7cc1-b1a6-9d8a4d6c1a2b" doc:"A stored task that is pending; carried out whatever its run_at."`
}

// PubSubPush is what Google's Pub/Sub POSTs for each message of a subscription
// that is pushed with its wrapping: a PubsubMessage in JSON, and more around it,
// of which there may be more one day.
// https://cloud.google.com/pubsub/docs/push#receive_push
type PubSubPush struct {
	Message PubSubMessage `json:"message" doc:"The message."`
	_       struct{}      `additionalProperties:"true"`
}

// PubSubMessage is a message of Pub/Sub.
type PubSubMessage struct {
	Data string   `json:"data" minLength:"1" example:"eyJ1cmwiOiJodHRwczovL2V4YW1wbGUuY29tL3BsYXlzIn0=" doc:"What was published: a task request in JSON, here in base64. What else is in the message, and around it, is not looked at: attributes, messageId, publishTime, orderingKey, subscription, deliveryAttempt."`
	_    struct{} `additionalProperties:"true"`
}

// WorkResult is the result of a call.
type WorkResult struct {
	Outcome         task.Kind `json:"outcome" enum:"succeeded,retryable,permanent,snoozed,interrupted" example:"succeeded" doc:"What the call came to."`
	StatusCode      *int      `json:"status_code" example:"204" doc:"The target's answer. Null when none came."`
	DurationSeconds float64   `json:"duration_seconds" example:"0.084" doc:"How long the call took."`
	ResponseExcerpt *string   `json:"response_excerpt" example:"done" doc:"The first 4 KiB of the response's body. Null when it was empty."`
	SnoozeSeconds   *float64  `json:"snooze_seconds" example:"30" doc:"After how long the target wants the call, where outcome is snoozed. A stored task waits for so long; of a task in the request Retry-After tells the engine. Null otherwise."`
}

// viaHeader marks calls that a request to /worker-endpoint caused. Tasks cannot set
// it: Orchestrator-* is reserved.
const viaHeader = "Orchestrator-Via"

func (a *API) workerOperation() huma.Operation {
	schema := &huma.Schema{OneOf: []*huma.Schema{a.body(TaskRequest{}), a.body(TaskReference{}), a.body(PubSubPush{})}}
	body := jsonBody(schema, map[string]*huma.Example{
		"request": example("A task in the request: one attempt, nothing is stored", `{"url":"`+a.ExampleURL+`"}`),
		"stored":  example("A stored task", `{"task_id":"01939e0c-5c1e-7cc1-b1a6-9d8a4d6c1a2b"}`),
		"wrapped": example("What Pub/Sub pushes: a task in the message's data",
			`{"message":{"data":"`+base64.StdEncoding.EncodeToString([]byte(`{"url":"`+a.ExampleURL+`"}`))+`","messageId":"2070443601311540"},"subscription":"projects/melodia/subscriptions/plays"}`),
	})
	return huma.Operation{
		OperationID: "work", Method: http.MethodPost, Path: "/worker-endpoint", Tags: []string{"worker"}, Security: needs(scopeInternal),
		Summary: "Carry out one task in this request",
		Description: "For an external engine (Cloud Tasks, Cloud Scheduler, Pub/Sub push) or an operator. " +
			"The body is a task request, which is carried out at once, with one attempt, and not stored; or the id of a stored task, " +
			"which is carried out now, whatever its run_at; or what Pub/Sub pushes, with a task request in the data of its message. The content type is not looked at. 200 means that the target answered 2xx; every other answer makes an engine try again. " +
			"503 with Retry-After means that the target was not called, or that the call was cut off: the service is shutting down, or lacks file descriptors, memory, local ports or name servers.",
		Parameters: linkParameters()[:1], RequestBody: body, Responses: a.responses(http.StatusOK, WorkResult{}),
		Errors: []int{
			http.StatusBadRequest, http.StatusForbidden, http.StatusNotFound, http.StatusRequestTimeout, http.StatusConflict,
			http.StatusRequestEntityTooLarge, http.StatusUnsupportedMediaType, http.StatusUnprocessableEntity, http.StatusTooManyRequests, http.StatusBadGateway,
			http.StatusServiceUnavailable, http.StatusGatewayTimeout, http.StatusLoopDetected,
		},
	}
}

func (a *API) work(w http.ResponseWriter, r *http.Request) error {
	from, err := a.origin(r)
	if err != nil {
		return err
	}
	if r.Header.Get(viaHeader) != "" {
		return newProblem(http.StatusLoopDetected, "This call was made by /worker-endpoint itself; carrying it out would never end.").neverAgain()
	}
	asked, err := a.readWork(httpserver.Body(r))
	if err != nil {
		return err
	}
	if asked.reference != nil {
		return a.workStored(w, r, asked.reference)
	}
	outcome, err := a.callOnce(r, from, asked.request)
	if errs, ok := errors.AsType[task.Errors](err); ok {
		err = invalid(fieldProblems(errs, asked.at))
	}
	if err != nil {
		return err
	}
	return a.answerWork(w, r, outcome, task.Decision{})
}

// workStored carries out a stored task.
func (a *API) workStored(w http.ResponseWriter, r *http.Request, reference *TaskReference) error {
	if err := a.Guard.HoldForCall(r); err != nil {
		return err
	}
	id, err := task.ParseID(reference.TaskID)
	if err != nil {
		return err // the pattern lets no such id through
	}
	outcome, decision, err := a.Dispatcher.Execute(r.Context(), id)
	if err != nil {
		return err
	}
	a.Log.InfoContext(r.Context(), "task carried out at /worker-endpoint", "task_id", id.String(), "outcome", string(outcome.Kind), "caller", httpserver.Principal(r.Context()))
	return a.answerWork(w, r, outcome, decision)
}

// work is what a body asks for: a call, or that of a stored task.
type work struct {
	request   *TaskRequest
	at        Loc // where the request was sent
	reference *TaskReference
}

// readWork reads each form of the body. It is chosen by the presence of task_id or
// message, so that a mistake in one form is not reported as one in another. The
// content type is not looked at: Cloud Scheduler sends application/octet-stream.
func (a *API) readWork(body []byte) (w work, err error) {
	w.at = Loc{"body"}
	read := func(text []byte, into any) error {
		found, err := a.parseText(text, into, w.at)
		if err == nil && found != nil {
			err = invalid(found)
		}
		return err
	}
	switch names := memberNames(body); {
	case len(body) == 0:
		return w, errNoBody()
	case names["task_id"]:
		w.reference = new(TaskReference)
		return w, read(body, w.reference)
	case names["message"]:
		push := new(PubSubPush)
		if err := read(body, push); err != nil {
			return w, err
		}
		w.at = Loc{"body", "message", "data"}
		if body, err = decodeBase64(push.Message.Data); err != nil {
			return w, invalid([]FieldProblem{{Loc: w.at, Msg: err.Error(), Type: "invalid"}})
		}
	}
	w.request = new(TaskRequest)
	err = read(body, w.request)
	if p, ok := errors.AsType[*Problem](err); ok && p.Status == http.StatusBadRequest && len(w.at) > 1 {
		message := "must hold a task request in JSON: " + strings.Replace(p.Detail, "The body ", "what it holds ", 1)
		err = invalid([]FieldProblem{{Loc: w.at, Msg: message, Type: "invalid"}})
	}
	return w, err
}

// callOnce carries out a task that is not stored.
func (a *API) callOnce(r *http.Request, from intake.Origin, request *TaskRequest) (task.Outcome, error) {
	t, err := a.newTask(r.Context(), request, nil)
	if err != nil {
		return task.Outcome{}, err
	}
	var errs task.Errors
	refuse := func(field string, c *task.Callback) {
		if c != nil {
			errs = append(errs, task.FieldError{Path: []string{field}, Kind: "conflict",
				Message: "must not be there, since nothing is stored here: the answer has the result, and /enqueue has callbacks"})
		}
	}
	refuse("on_success", t.OnSuccess)
	refuse("on_failure", t.OnFailure)
	if t.Completion != nil {
		errs = append(errs, task.FieldError{Path: []string{"completion"}, Kind: "conflict",
			Message: "must not be there, since nothing is stored here that the target could report on: use /enqueue"})
	}
	if errs != nil {
		return task.Outcome{}, errs
	}
	if err := a.Intake.Unstored(r.Context(), from, t); err != nil {
		return task.Outcome{}, err
	}
	if err := a.Guard.HoldForCall(r); err != nil {
		return task.Outcome{}, err
	}
	return a.Dispatcher.ExecuteUnstored(r.Context(), t)
}

// answerWork maps an outcome to a status that makes an engine do the right thing.
func (a *API) answerWork(w http.ResponseWriter, r *http.Request, o task.Outcome, decision task.Decision) error {
	result := WorkResult{
		Outcome:         o.Kind,
		StatusCode:      present(o.StatusCode),
		DurationSeconds: o.Duration.Seconds(),
		ResponseExcerpt: present(o.ResponseExcerpt),
	}
	if o.Kind == task.OutcomeSnoozed {
		result.SnoozeSeconds = present(o.Snooze.Seconds())
	}
	var p *Problem
	switch {
	case o.Kind == task.OutcomeSucceeded:
		return a.answer(w, r, http.StatusOK, result)
	case decision.State == task.Cancelled:
		return newProblem(http.StatusConflict, "The task was cancelled before its call had ended.")
	case o.Shortage != "": // the target was not called, so that trying again repeats nothing
		p = newProblem(http.StatusServiceUnavailable, "The call was not made: "+o.Error+".").retryLater()
	case o.Kind == task.OutcomeInterrupted:
		return task.ErrUnavailable
	case o.Kind == "": // the task could not start any more
		return newProblem(http.StatusBadGateway, "The task was not carried out and has failed: "+string(decision.Reason)+".")
	case o.TimedOut && o.Kind == task.OutcomeRetryable:
		p = newProblem(http.StatusGatewayTimeout, "The call timed out: "+o.Error+".")
	default:
		p = newProblem(http.StatusBadGateway, "The call failed: "+o.Error+".")
	}
	if s := result.SnoozeSeconds; s != nil {
		p.header = http.Header{"Retry-After": {strconv.Itoa(int(math.Ceil(*s)))}}
	}
	p.Result = &result
	return p
}
