package httpapi

import (
	"errors"
	"net/http"
	"slices"

	"github.com/danielgtaylor/huma/v2"

	"github.com/melodia/orchestrator/internal/task"
)

// BatchRequest is tasks that are to be stored together.
type BatchRequest struct {
	Tasks []BatchTask `json:"tasks" minItems:"1" maxItems:"1000" nullable:"false" doc:"The tasks: all of them are stored, or none."`
}

// StoredBatch is the tasks of a batch.
type StoredBatch struct {
	Tasks []*Task `json:"tasks" nullable:"false" doc:"The tasks, in the order of the request. In the answer to a repeat each shows the last one of its attempts only."`
}

func (a *API) batchOperation() huma.Operation {
	return huma.Operation{
		OperationID: "submit-batch", Method: http.MethodPost, Path: "/tasks/batch", Tags: []string{"tasks"}, Security: needs(scopeSubmit),
		Summary: "Carry out many calls, now or later",
		Description: "Stores up to 1000 tasks together, each due at its run_at, after its delay_seconds, or at once. Either all are stored, or none: 422 names what is wrong with which of them. " +
			"202 is answered after the commit, never before. The body is at most 1 MiB, as everywhere. It counts as one request towards RATE_LIMIT, and an Idempotency-Key is for the whole of it.",
		Parameters: a.submitParameters(), Responses: a.stored(StoredBatch{}), Errors: submitErrors,
		RequestBody: jsonBody(a.body(BatchRequest{}), map[string]*huma.Example{
			"mixed": example("One now, two later", `{"tasks":[{"url":"`+a.ExampleURL+`","payload":{"song_id":42}},`+
				`{"url":"`+a.ExampleURL+`","delay_seconds":60,"payload":{"song_id":43}},`+
				`{"url":"`+a.ExampleURL+`","run_at":"2030-12-24T21:00:00","time_zone":"America/Argentina/Buenos_Aires","labels":{"kind":"play"}}]}`),
		}),
	}
}

func (a *API) submitBatch(w http.ResponseWriter, r *http.Request) error {
	in, err := a.submission(r)
	if err != nil {
		return err
	}
	tasks, err := a.readBatch(r)
	if err != nil && !isRefusal(err) {
		return err
	}
	tasks, repeated, err := a.Intake.SubmitBatch(r.Context(), in, tasks, err)
	if err != nil {
		return err
	}
	stored := StoredBatch{Tasks: make([]*Task, len(tasks))}
	for i, t := range tasks {
		stored.Tasks[i] = taskView(t)
	}
	return a.answer(w, r, statusOf(w, repeated), stored)
}

// readBatch makes tasks of a request's body. What is wrong with one of them does not
// keep it from naming what is wrong with the others.
func (a *API) readBatch(r *http.Request) ([]*task.Task, error) {
	request := new(BatchRequest)
	found, err := a.parseBody(r, request)
	if err != nil {
		return nil, err
	}
	const index = 2 // in a way like body, tasks, 10
	unreadable := make(map[any]bool)
	for _, f := range found {
		if len(f.Loc) <= index { // it is about the list, or around it
			return nil, invalid(found)
		}
		unreadable[f.Loc[index]] = true
	}
	tasks, known := make([]*task.Task, len(request.Tasks)), make(map[string]task.Spec)
	for i := range request.Tasks {
		if unreadable[i] {
			continue
		}
		if len(found) > maxFieldProblems {
			break
		}
		tasks[i], err = a.newTask(r.Context(), &request.Tasks[i], known)
		if errs, ok := errors.AsType[task.Errors](err); ok {
			found = append(found, fieldProblems(errs, Loc{"body", "tasks", i})...)
		} else if err != nil {
			return nil, err
		}
	}
	if found != nil {
		slices.SortStableFunc(found, func(a, b FieldProblem) int { return a.Loc[index].(int) - b.Loc[index].(int) })
		return nil, invalid(found)
	}
	return tasks, nil
}
