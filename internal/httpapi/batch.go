package httpapi

import (
	"bytes"
	"context"
	"errors"
	"net/http"

	"github.com/danielgtaylor/huma/v2"
	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/melodia/orchestrator/internal/task"
)

// BatchRequest is tasks that are to be stored together.
type BatchRequest struct {
	Tasks batchTasks `json:"tasks" minItems:"1" maxItems:"1000" nullable:"false" doc:"The tasks: all of them are stored, or none."`
}

// batchTasks are at most [task.MaxBatch]: a body has room for far more, which
// would take a hundred times the memory of their text.
type batchTasks []BatchTask

var errTooManyTasks = errors.New("too many tasks")

// UnmarshalJSONFrom is json.UnmarshalerFrom.
func (b *batchTasks) UnmarshalJSONFrom(d *jsontext.Decoder) error {
	return eachItem(d, func() error {
		if len(*b) == task.MaxBatch {
			return errTooManyTasks
		}
		*b = append(*b, BatchTask{})
		return json.UnmarshalDecode(d, &(*b)[len(*b)-1])
	})
}

// eachItem reads a list; read reads the next one of its items.
func eachItem(d *jsontext.Decoder, read func() error) error {
	if token, err := d.ReadToken(); err != nil || token.Kind() != '[' {
		return errors.Join(err, errors.New("not a list"))
	}
	for d.PeekKind() != ']' {
		if err := read(); err != nil {
			return err
		}
	}
	_, err := d.ReadToken()
	return err
}

// BatchTask is a TaskRequest and, perhaps, a moment: run_at or delay_seconds.
type BatchTask struct{ ScheduleRequest }

// when returns the moment that the request names: at once, where it names none.
func (r *BatchTask) when() (task.When, task.Errors) {
	if r.RunAt == nil && r.DelaySeconds == nil && r.TimeZone == nil {
		return task.When{}, nil
	}
	return r.ScheduleRequest.when()
}

// StoredBatch is the tasks of a batch.
type StoredBatch struct {
	Tasks []*Task `json:"tasks" nullable:"false" doc:"The tasks, in the order of the request. In the answer to a repeat each shows the last one of its attempts only."`
}

type batchOutput struct {
	Status   int
	Replayed string `header:"Idempotent-Replayed" example:"true" doc:"true: the same request came before under the Idempotency-Key, and this is what became of it."`
	Body     StoredBatch
}

func (a *API) batchOperation() huma.Operation {
	return huma.Operation{
		OperationID: "submit-batch", Method: http.MethodPost, Path: "/tasks/batch", Tags: []string{"tasks"}, Security: needs(scopeSubmit),
		Summary: "Carry out many calls, now or later",
		Description: "Stores up to 1000 tasks together, each due at its run_at, after its delay_seconds, or at once. Either all are stored, or none: 422 names what is wrong with which of them. " +
			"202 is answered after the commit, never before. The body is at most 1 MiB, as everywhere. It counts as one request towards RATE_LIMIT, and an Idempotency-Key is for the whole of it.",
		DefaultStatus: http.StatusAccepted, Errors: onceErrors, SkipValidateBody: true, MaxBodyBytes: -1, BodyReadTimeout: -1,
		Middlewares: huma.Middlewares{a.chained}, Parameters: linkParameters(),
		RequestBody: jsonBody(a.schemaOf(BatchRequest{}), map[string]*huma.Example{
			"mixed": example("One now, two later", `{"tasks":[{"url":"`+a.ExampleURL+`","payload":{"song_id":42}},`+
				`{"url":"`+a.ExampleURL+`","delay_seconds":60,"payload":{"song_id":43}},`+
				`{"url":"`+a.ExampleURL+`","run_at":"2030-12-24T21:00:00","time_zone":"America/Argentina/Buenos_Aires","labels":{"kind":"play"}}]}`),
		}),
	}
}

func (a *API) submitBatch(ctx context.Context, in *onceInput) (*batchOutput, error) {
	out := &batchOutput{Status: http.StatusAccepted}
	tasks, err := a.readBatch(in.body())
	if err != nil && !isRefusal(err) {
		return nil, a.fail(ctx, err)
	}
	tasks, repeated, err := a.Intake.SubmitBatch(ctx, in.request(ctx, "/tasks/batch"), tasks, err)
	if err != nil {
		return nil, a.fail(ctx, err)
	}
	if repeated {
		out.Status, out.Replayed = http.StatusOK, "true"
	}
	out.Body.Tasks = make([]*Task, len(tasks))
	for i, t := range tasks {
		out.Body.Tasks[i] = taskView(t)
	}
	return out, nil
}

// readBatch makes tasks out of a body as read does, and in the same two ways.
func (a *API) readBatch(in *submitInput) ([]*task.Task, error) {
	if err := in.check(); err != nil {
		return nil, err
	}
	if quick := new(BatchRequest); isPlain(in.RawBody) && decode(in.RawBody, quick) == nil && len(quick.Tasks) > 0 {
		if tasks, err := a.newTasks(quick.Tasks); err == nil {
			return tasks, nil
		}
	}
	items, err := a.splitBatch(in.RawBody)
	if err != nil {
		return nil, err
	}
	tasks := make([]*task.Task, len(items))
	var found []FieldProblem
	for i, item := range items {
		var problems []FieldProblem
		if tasks[i], problems, err = a.readItem(i, item); err != nil {
			return nil, err
		}
		if found = append(found, problems...); len(found) > maxFieldProblems {
			break
		}
	}
	if found != nil {
		return nil, invalid(found)
	}
	return tasks, nil
}

func (a *API) newTasks(requests []BatchTask) ([]*task.Task, error) {
	tasks := make([]*task.Task, len(requests))
	for i := range requests {
		var err error
		if tasks[i], err = a.newTask(&requests[i]); err != nil {
			return nil, err
		}
	}
	return tasks, nil
}

// splitBatch returns the tasks of a body as they were sent, or what is wrong
// around them.
func (a *API) splitBatch(body []byte) ([]jsontext.Value, error) {
	if jsontext.Value(body).Kind() != '{' {
		return nil, a.readThorough(body, new(BatchRequest))
	}
	var members map[string]jsontext.Value
	if err := decode(body, &members); err != nil {
		return nil, newProblem(http.StatusBadRequest, err.Error())
	}
	if len(members) > maxMembers {
		return nil, newProblem(http.StatusBadRequest, errTooManyMembers.Error())
	}
	var items []jsontext.Value
	tree := make(map[string]any, len(members))
	for name, value := range members {
		tree[name] = nil
		if kind := value.Kind(); name == "tasks" && kind == '[' {
			items = splitList(value)
			tree[name] = make([]any, len(items))
		} else if name == "tasks" && kind != 'n' {
			tree[name] = true // anything that is no list
		}
	}
	escapeNames(tree)
	if found := a.mistakes(bodyPath(), a.batchFrame(), tree); found != nil {
		return nil, invalid(found)
	}
	return items, nil
}

// batchFrame is the schema of a BatchRequest whatever its tasks are.
func (a *API) batchFrame() *huma.Schema {
	frame := *a.registry.Map()["BatchRequest"]
	tasks := *frame.Properties["tasks"]
	tasks.Items = &huma.Schema{}
	frame.Properties = map[string]*huma.Schema{"tasks": &tasks}
	return &frame
}

// splitList returns the items of a list, or one more than a batch may have.
func splitList(list jsontext.Value) (items []jsontext.Value) {
	d := jsontext.NewDecoder(bytes.NewReader(list))
	_ = eachItem(d, func() error { // it has been read before
		if len(items) > task.MaxBatch {
			return errTooManyTasks
		}
		item, err := d.ReadValue()
		end := int(d.InputOffset())
		items = append(items, list[end-len(item):end])
		return err
	})
	return items
}

// readItem makes a task out of item i of a batch, or says what is wrong with it. The
// error is not about the item.
func (a *API) readItem(i int, item jsontext.Value) (*task.Task, []FieldProblem, error) {
	at := Loc{"body", "tasks", i}
	unreadable := func(err error) (*task.Task, []FieldProblem, error) {
		return nil, []FieldProblem{{Loc: at, Msg: err.Error(), Type: "invalid"}}, nil
	}
	var tree any
	if err := decode(item, &tree); err != nil {
		return unreadable(err)
	}
	path := bodyPath()
	path.Push("tasks")
	path.PushIndex(i)
	if found := a.mistakes(path, a.schemaOf(BatchTask{}), tree); found != nil {
		return nil, found, nil
	}
	request := new(BatchTask)
	if err := decode(item, request); err != nil {
		return unreadable(err)
	}
	t, err := a.newTask(request)
	if errs, ok := errors.AsType[task.Errors](err); ok {
		return nil, fieldProblems(errs, at), nil
	}
	return t, nil, err
}
