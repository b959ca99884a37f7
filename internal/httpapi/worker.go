package httpapi

import (
	"context"
	"encoding/base64"
	"errors"
	"math"
	"net/http"
	"strconv"
	"strings"

	"github.com/danielgtaylor/huma/v2"

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

// WorkResult is what came of a call.
type WorkResult struct {
	Outcome         task.Kind `json:"outcome" enum:"succeeded,retryable,permanent,snoozed,interrupted" example:"succeeded" doc:"What the call came to."`
	StatusCode      *int      `json:"status_code" example:"204" doc:"The target's answer. Null when none came."`
	DurationSeconds float64   `json:"duration_seconds" example:"0.084" doc:"How long the call took."`
	ResponseExcerpt *string   `json:"response_excerpt" example:"done" doc:"The first 4 KiB of the response's body. Null when it was empty."`
	SnoozeSeconds   *float64  `json:"snooze_seconds" example:"30" doc:"After how long the target wants the call, where outcome is snoozed. A stored task waits for so long; of a task in the request Retry-After tells the engine. Null otherwise."`
}

// The content type is not looked at: Cloud Scheduler sends application/octet-stream.
type workInput struct {
	// Via marks calls that a request to /worker-endpoint caused. Tasks cannot
	// set it: Orchestrator-* is reserved.
	Via     string `header:"Orchestrator-Via" hidden:"true"`
	RawBody []byte
}

type workOutput struct {
	Body WorkResult
}

func (a *API) workerOperation() huma.Operation {
	schema := &huma.Schema{OneOf: []*huma.Schema{a.schemaOf(TaskRequest{}), a.schemaOf(TaskReference{}), a.schemaOf(PubSubPush{})}}
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
		Middlewares: huma.Middlewares{a.chained, lateAnswer}, Parameters: linkParameters()[:1],
		RequestBody: body, SkipValidateBody: true, MaxBodyBytes: -1, BodyReadTimeout: -1,
		Errors: []int{
			http.StatusBadRequest, http.StatusForbidden, http.StatusNotFound, http.StatusRequestTimeout, http.StatusConflict,
			http.StatusRequestEntityTooLarge, http.StatusUnsupportedMediaType, http.StatusUnprocessableEntity, http.StatusTooManyRequests, http.StatusBadGateway,
			http.StatusServiceUnavailable, http.StatusGatewayTimeout, http.StatusLoopDetected,
		},
	}
}

func (a *API) work(ctx context.Context, in *workInput) (*workOutput, error) {
	if in.Via != "" {
		return nil, a.fail(ctx, newProblem(http.StatusLoopDetected, "This call was made by /worker-endpoint itself; carrying it out would never end.").neverAgain())
	}
	w, err := a.readWork(in.RawBody)
	if err != nil {
		return nil, a.fail(ctx, err)
	}
	if reference := w.reference; reference != nil {
		if err := a.holdForCall(ctx); err != nil {
			return nil, a.fail(ctx, err)
		}
		id, err := task.ParseID(reference.TaskID)
		if err != nil {
			return nil, a.fail(ctx, task.ErrNotFound) // the pattern lets no such id through
		}
		outcome, decision, err := a.Dispatcher.Execute(ctx, id)
		if err == nil {
			a.Log.InfoContext(ctx, "task carried out at /worker-endpoint", "task_id", id.String(), "outcome", string(outcome.Kind), "caller", caller(ctx))
		}
		return a.answerWork(ctx, outcome, decision, err)
	}
	outcome, err := a.callOnce(ctx, w.request)
	if errs, ok := errors.AsType[task.Errors](err); ok {
		err = invalid(fieldProblems(errs, w.at))
	}
	return a.answerWork(ctx, outcome, task.Decision{}, err)
}

// work is what a body asks for: a call, or that of a stored task.
type work struct {
	request   *TaskRequest
	at        Loc // where the request was sent
	reference *TaskReference
}

// readWork reads each form of the body. It is chosen by the presence of task_id or
// message, so that a mistake in one form is not reported as one in another.
func (a *API) readWork(body []byte) (w work, err error) {
	w.at = Loc{"body"}
	var tree any
	if err := decode(body, &tree); err != nil {
		return w, newProblem(http.StatusBadRequest, err.Error())
	}
	object, _ := tree.(map[string]any)
	if _, ok := object["task_id"]; ok {
		w.reference = new(TaskReference)
		return w, a.validate(w.at, tree, body, w.reference)
	}
	if _, ok := object["message"]; ok {
		if found := a.mistakes(bodyPath(), a.schemaOf(PubSubPush{}), tree); found != nil {
			return w, invalid(found)
		}
		w.at = Loc{"body", "message", "data"}
		data := object["message"].(map[string]any)["data"].(string) // the schema saw to that
		if body, tree, err = openData(data); err != nil {
			return w, invalid([]FieldProblem{{Loc: w.at, Msg: err.Error(), Type: "invalid"}})
		}
	}
	w.request = new(TaskRequest)
	return w, a.validate(w.at, tree, body, w.request)
}

// openData returns the JSON that a message's data holds.
func openData(data string) (body []byte, tree any, err error) {
	if body, err = decodeBase64(data); err != nil {
		return nil, nil, err
	}
	if err := decode(body, &tree); err != nil {
		return nil, nil, errors.New("must hold a task request in JSON: " + strings.Replace(err.Error(), "The body ", "what it holds ", 1))
	}
	return body, tree, nil
}

// callOnce carries out a task that is not stored.
func (a *API) callOnce(ctx context.Context, r *TaskRequest) (task.Outcome, error) {
	t, err := a.newTask(r)
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
	if errs != nil {
		return task.Outcome{}, errs
	}
	if err := a.Intake.Unstored(ctx, originOf(ctx), t); err != nil {
		return task.Outcome{}, err
	}
	if err := a.holdForCall(ctx); err != nil {
		return task.Outcome{}, err
	}
	return a.Dispatcher.ExecuteUnstored(ctx, t)
}

// answerWork maps an outcome to a status that makes an engine do the right thing.
func (a *API) answerWork(ctx context.Context, o task.Outcome, decision task.Decision, err error) (*workOutput, error) {
	if err != nil {
		return nil, a.fail(ctx, err)
	}
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
		return &workOutput{Body: result}, nil
	case decision.State == task.Cancelled:
		return nil, a.fail(ctx, newProblem(http.StatusConflict, "The task was cancelled before its call had ended."))
	case o.Shortage != "": // the target was not called, so that trying again repeats nothing
		p = newProblem(http.StatusServiceUnavailable, "The call was not made: "+o.Error+".").retryLater()
	case o.Kind == task.OutcomeInterrupted:
		return nil, a.fail(ctx, task.ErrUnavailable)
	case o.Kind == "": // the task could not start any more
		return nil, a.fail(ctx, newProblem(http.StatusBadGateway, "The task was not carried out and has failed: "+string(decision.Reason)+"."))
	case o.TimedOut && o.Kind == task.OutcomeRetryable:
		p = newProblem(http.StatusGatewayTimeout, "The call timed out: "+o.Error+".")
	default:
		p = newProblem(http.StatusBadGateway, "The call failed: "+o.Error+".")
	}
	if s := result.SnoozeSeconds; s != nil {
		p.header = http.Header{"Retry-After": {strconv.Itoa(int(math.Ceil(*s)))}}
	}
	p.Result = &result
	return nil, a.fail(ctx, p)
}
