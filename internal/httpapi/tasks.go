package httpapi

import (
	"context"
	"encoding/base64"
	"errors"
	"net/http"
	"slices"
	"time"
	"unicode/utf8"

	"github.com/danielgtaylor/huma/v2"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/melodia/orchestrator/internal/httpserver"
	"github.com/melodia/orchestrator/internal/task"
)

func (a *API) enqueueOperation() huma.Operation {
	return huma.Operation{
		OperationID: "enqueue-task", Method: http.MethodPost, Path: "/enqueue", Tags: []string{"tasks"}, Security: needs(scopeSubmit),
		Summary:     "Carry out a call now",
		Description: "Stores a task that is due at once. 202 is answered after the commit, never before; the call follows within milliseconds, and may be under way already (state running).",
		Parameters:  a.submitParameters(), Responses: a.storedTask(), Errors: submitErrors, Callbacks: a.documentCallbacks("enqueue-task"),
		RequestBody: jsonBody(a.body(TaskRequest{}), map[string]*huma.Example{
			"call": example("Register a play", `{"url":"`+a.ExampleURL+`","payload":{"song_id":42,"user_id":7},"labels":{"kind":"play"}}`),
			"retries": example("With a retry policy of its own",
				`{"url":"`+a.ExampleURL+`","method":"PUT","headers":{"X-Tenant":"melodia"},"payload":{"plays":1},"timeout_seconds":5,"retry":{"max_attempts":5,"min_backoff_seconds":0.5,"max_backoff_seconds":60}}`),
			"callbacks": example("With callbacks", `{"url":"`+a.ExampleURL+`","payload":{"song_id":42},"on_success":{"url":"`+a.ExampleURL+`"},"on_failure":{"url":"`+a.ExampleURL+`","headers":{"X-Tenant":"melodia"}}}`),
		}),
	}
}

func (a *API) enqueue(w http.ResponseWriter, r *http.Request) error {
	return a.submit(w, r, new(TaskRequest))
}

func (a *API) scheduleOperation() huma.Operation {
	return huma.Operation{
		OperationID: "schedule-task", Method: http.MethodPost, Path: "/schedule", Tags: []string{"tasks"}, Security: needs(scopeSubmit),
		Summary:     "Carry out a call later",
		Description: "Stores a task that is due at a given moment: exactly one of run_at and delay_seconds. 202 is answered after the commit, never before.",
		Parameters:  a.submitParameters(), Responses: a.storedTask(), Errors: submitErrors, Callbacks: a.documentCallbacks("schedule-task"),
		RequestBody: jsonBody(a.body(ScheduleRequest{}), map[string]*huma.Example{
			"delay": example("In five seconds", `{"url":"`+a.ExampleURL+`","delay_seconds":5,"payload":{"user_id":7,"text":"Your mix is ready"}}`),
			"local": example("At 21:00 in Buenos Aires", `{"url":"`+a.ExampleURL+`","run_at":"2030-12-24T21:00:00","time_zone":"America/Argentina/Buenos_Aires","payload":{"user_id":7}}`),
			"utc":   example("At a moment in UTC", `{"url":"`+a.ExampleURL+`","run_at":"2030-12-25T00:00:00Z","expires_at":"2030-12-26T00:00:00Z","payload":{"user_id":7}}`),
		}),
	}
}

func (a *API) schedule(w http.ResponseWriter, r *http.Request) error {
	return a.submit(w, r, new(ScheduleRequest))
}

// request is a body that asks for a task, in the domain's terms.
type request interface {
	flow() (queue, flowKey string)
	spec(defaults task.Spec) (task.Spec, task.Errors)
	when() (task.When, task.Errors)
}

// submit stores the task that a request's body asks for, which is read into asked.
func (a *API) submit(w http.ResponseWriter, r *http.Request, asked request) error {
	in, err := a.submission(r)
	if err != nil {
		return err
	}
	var t *task.Task
	if err = a.readBody(r, asked); err == nil {
		t, err = a.newTask(r.Context(), asked, nil)
	}
	if err != nil && !isRefusal(err) {
		return err
	}
	t, repeated, err := a.Intake.Submit(r.Context(), in, t, err)
	if err != nil {
		return err
	}
	v := taskView(t)
	w.Header()["Location"] = []string{httpserver.PrefixOf(r) + "/tasks/" + v.ID}
	w.Header()["Etag"] = []string{etag(t)}
	return a.answer(w, r, statusOf(w, repeated), v)
}

// storedTask documents the answers of submit.
func (a *API) storedTask() map[string]*huma.Response {
	return a.stored(Task{}, etagHeader(`"0-pending-0"`),
		header{"Location", "/tasks/01939e0c-5c1e-7cc1-b1a6-9d8a4d6c1a2b", "Where the task can be looked at: /tasks/{id}, below the path of the gateway that the request came through."})
}

// newTask makes a task of a request, or returns all that is wrong with it. known, unless
// it is nil, keeps the defaults of queues for requests that come along.
func (a *API) newTask(ctx context.Context, r request, known map[string]task.Spec) (*task.Task, error) {
	queue, flowKey := r.flow()
	defaults, ok := known[queue]
	if !ok {
		var err error
		if defaults, err = a.Intake.DefaultsOf(ctx, queue, flowKey); err != nil {
			return nil, err
		}
		if known != nil && queue != "" {
			known[queue] = defaults
		}
	}
	spec, errs := r.spec(defaults)
	when, more := r.when()
	t, err := a.Intake.Task(spec, when)
	found, _ := errors.AsType[task.Errors](err)
	if errs = slices.Concat(errs, more, found); len(errs) > 0 {
		return nil, errs
	}
	return t, err
}

const getTaskID = "get-task"

// includePayload is the value of the query parameter include.
const includePayload = "payload"

// shownGrowth is how many times its size a body takes while it becomes a part of an
// answer: three, or eight where all of it must be escaped.
const shownGrowth = 8

type getTaskInput struct {
	TaskPath
	Include     string  `query:"include" enum:"payload" doc:"payload: also show the body of the call. That needs the scope manage, or just read where SHOW_PAYLOADS is on."`
	WaitSeconds float64 `query:"wait_seconds" minimum:"0" maximum:"60" example:"30" doc:"Answer as soon as the task has ended, or after this long with the task as it is then."`
}

// answerTask answers with a task and its ETag.
func (a *API) answerTask(w http.ResponseWriter, r *http.Request, status int, t *task.Task) error {
	w.Header()["Etag"] = []string{etag(t)}
	return a.answer(w, r, status, taskView(t))
}

// oneTask documents the answer of answerTask.
func (a *API) oneTask() map[string]*huma.Response {
	return a.responses(http.StatusOK, Task{}, etagHeader(`"0-pending-0"`))
}

func etagHeader(example string) header {
	return header{"ETag", example, "The version of the task, for If-Match."}
}

func (a *API) getTaskOperation() huma.Operation {
	return huma.Operation{
		OperationID: getTaskID, Method: http.MethodGet, Path: "/tasks/{id}", Tags: []string{"tasks"}, Security: needs(scopeRead),
		Summary: "See a task and its attempts",
		Description: "Returns the task and every attempt, until its retention ends. With wait_seconds the answer comes when the task has ended. " +
			"With include=payload it holds the body of the call, as payload, body or body_base64. 403: the caller may not see that.",
		Parameters: a.parameters(getTaskInput{}), Responses: a.oneTask(),
		Errors: append([]int{http.StatusNotFound}, readErrors...),
	}
}

func (a *API) getTask(w http.ResponseWriter, r *http.Request) error {
	var in getTaskInput
	if err := a.readParams(r, &in); err != nil {
		return err
	}
	id, err := task.ParseID(in.ID)
	if err != nil {
		return err
	}
	if in.WaitSeconds > 0 {
		if caller, ok := callOf(r.Header); ok {
			a.Dispatcher.CameBack(caller)
		}
		t, err := a.awaitEnd(r.Context(), id, in.WaitSeconds)
		if err != nil {
			return err
		}
		if t != nil && in.Include == "" {
			return a.answerTask(w, r, http.StatusOK, t)
		}
	}
	if in.Include == includePayload {
		return a.answerWithBody(w, r, id)
	}
	t, err := a.Store.Get(r.Context(), id)
	if err != nil {
		return err
	}
	return a.answerTask(w, r, http.StatusOK, t)
}

// awaitEnd returns a task that has ended already. It waits for the end of another
// one, for so many seconds at most, and returns nil.
func (a *API) awaitEnd(ctx context.Context, id task.ID, seconds float64) (*task.Task, error) {
	// Before the first look, so that an end right after it is not missed.
	ended, leave, err := a.Dispatcher.Watch(id)
	if err != nil {
		return nil, err
	}
	defer leave()
	t, err := a.Store.Get(ctx, id) // without its body, which would be held meanwhile
	if err != nil || t.State.Terminal() {
		return t, err
	}
	await(ctx, ended, &seconds)
	return nil, nil
}

// await returns when done is closed, after so many seconds, or when ctx ends.
func await(ctx context.Context, done <-chan struct{}, seconds *float64) {
	var limit time.Duration
	setDuration(&limit, seconds)
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-done:
	case <-timer.C:
	case <-ctx.Done():
	}
}

// answerWithBody answers with a task and the body of its call.
func (a *API) answerWithBody(w http.ResponseWriter, r *http.Request, id task.ID) error {
	b, tag, err := a.encodeWithBody(r.Context(), id)
	if err != nil {
		return err
	}
	answers := a.Guard.Answers()
	defer answers.Release(len(b))
	if !answers.Reserve(len(b), len(b)) {
		return httpserver.TooManyAnswers()
	}
	w.Header()["Etag"] = []string{tag}
	a.send(w, r, http.StatusOK, b)
	return nil
}

// encodeWithBody returns a task with the body of its call, and its ETag. What the answer is
// made of counts among the answers meanwhile.
func (a *API) encodeWithBody(ctx context.Context, id task.ID) (b []byte, tag string, err error) {
	t, err := a.Store.GetWithBody(ctx, id)
	if err != nil {
		return nil, "", err
	}
	answers, reserved := a.Guard.Answers(), shownGrowth*len(t.Body)
	defer answers.Release(reserved)
	if !answers.Reserve(reserved, reserved) {
		return nil, "", httpserver.TooManyAnswers()
	}
	v := taskView(t)
	v.show(t)
	payload := v.Payload
	v.Payload = nil
	b, err = encode(v)
	if payload != nil { // byte for byte: the encoder would drop its white space
		b = slices.Concat(b[:len(b)-1], []byte(`,"payload":`), payload, []byte("}"))
	}
	return b, etag(t), err
}

// show puts the body of t where it came from. Whatever else is stored is shown as
// base64: it can always be read back.
func (v *Task) show(t *task.Task) {
	switch {
	case t.Body == nil:
	case t.ContentType == jsonContent && jsontext.Value(t.Body).IsValid():
		v.Payload = t.Body
	case t.ContentType != bytesContent && utf8.Valid(t.Body):
		text := string(t.Body)
		v.Body = &text
	default:
		encoded := base64.StdEncoding.EncodeToString(t.Body)
		v.BodyBase64 = &encoded
	}
}
