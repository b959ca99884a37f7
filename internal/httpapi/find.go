package httpapi

import (
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/danielgtaylor/huma/v2"

	"github.com/melodia/orchestrator/internal/task"
)

// Filter says which tasks are meant: those that match all that is given. In a
// query a state or reason may be given several times, and labels are
// label.<name>=<value>.
type Filter struct {
	State          []task.State      `query:"state,explode" json:"state,omitempty" enum:"pending,running,succeeded,failed,cancelled" nullable:"false" example:"[\"failed\"]" doc:"In any of these states."`
	Labels         map[string]string `json:"labels,omitempty" maxProperties:"16" example:"{\"kind\":\"play\"}" doc:"With all of these labels."`
	Host           string            `query:"host" json:"host,omitempty" minLength:"1" example:"example.com" doc:"Whose URL has this host, on any port; as it is written there."`
	URL            string            `query:"url" json:"url,omitempty" minLength:"1" example:"https://example.com/plays" doc:"Whose URL begins like this."`
	CreatedAfter   string            `query:"created_after" json:"created_after,omitempty" minLength:"1" format:"date-time" example:"2026-11-24T12:00:00Z" doc:"Stored at this moment or later."`
	CreatedBefore  string            `query:"created_before" json:"created_before,omitempty" minLength:"1" format:"date-time" example:"2026-11-25T12:00:00Z" doc:"Stored before this moment."`
	RunAfter       string            `query:"run_after" json:"run_after,omitempty" minLength:"1" format:"date-time" example:"2026-11-24T12:00:00Z" doc:"Whose run_at is this moment or later."`
	RunBefore      string            `query:"run_before" json:"run_before,omitempty" minLength:"1" format:"date-time" example:"2026-11-25T12:00:00Z" doc:"Whose run_at is before this moment."`
	FinishedAfter  string            `query:"finished_after" json:"finished_after,omitempty" minLength:"1" format:"date-time" example:"2026-11-24T12:00:00Z" doc:"Ended at this moment or later."`
	FinishedBefore string            `query:"finished_before" json:"finished_before,omitempty" minLength:"1" format:"date-time" example:"2026-11-25T12:00:00Z" doc:"Ended before this moment."`
	Reason         []task.Reason     `query:"reason,explode" json:"reason,omitempty" enum:"attempts_exhausted,retry_duration_exhausted,client_error,expired,target_refused" nullable:"false" example:"[\"attempts_exhausted\"]" doc:"Failed for any of these reasons."`
	MinAttempts    int               `query:"min_attempts" json:"min_attempts,omitempty" minimum:"1" maximum:"100" example:"3" doc:"With so many attempts that count, or more."`
	CreatedBy      string            `query:"created_by" json:"created_by,omitempty" minLength:"1" example:"plays@melodia.app" doc:"Submitted by this caller."`
	Queue          string            `query:"queue" json:"queue,omitempty" minLength:"1" example:"mail" doc:"Of this queue."`
	FlowKey        string            `query:"flow_key" json:"flow_key,omitempty" minLength:"1" example:"tenant-42" doc:"With this flow key, in any queue where queue names none."`
}

// filter returns r in the domain's terms, or [task.Errors].
func (r *Filter) filter() (f task.Filter, err error) {
	f = task.Filter{
		States: distinct(r.State), Labels: r.Labels, Host: r.Host, URLPrefix: r.URL,
		Reasons: distinct(r.Reason), MinAttempts: r.MinAttempts, CreatedBy: r.CreatedBy,
		Queue: r.Queue, FlowKey: r.FlowKey,
	}
	var errs task.Errors
	for _, t := range []struct {
		name   string
		text   string
		moment *time.Time
	}{
		{"created_after", r.CreatedAfter, &f.CreatedAfter}, {"created_before", r.CreatedBefore, &f.CreatedBefore},
		{"run_after", r.RunAfter, &f.RunAfter}, {"run_before", r.RunBefore, &f.RunBefore},
		{"finished_after", r.FinishedAfter, &f.FinishedAfter}, {"finished_before", r.FinishedBefore, &f.FinishedBefore},
	} {
		if t.text == "" {
			continue
		}
		if *t.moment, err = task.ParseRunAt(t.text, nil); err != nil || t.moment.IsZero() {
			errs = append(errs, task.FieldError{Path: []string{t.name}, Message: wantTime, Kind: "datetime_parsing"})
		}
	}
	found, _ := f.Check().(task.Errors) //nolint:errorlint // Check wraps nothing
	if errs = append(errs, found...); errs != nil {
		return task.Filter{}, errs
	}
	return f, nil
}

// distinct drops repeats: the store searches once for each value.
func distinct[T ~string](values []T) []T { return slices.Compact(slices.Sorted(slices.Values(values))) }

// maxLimit is the most tasks of one answer.
const maxLimit = 200

type findInput struct {
	Filter
	Limit  int    `query:"limit" minimum:"1" maximum:"200" default:"50" example:"50" doc:"How many tasks to answer with at most."`
	Cursor string `query:"cursor" example:"AQAAAAAAAAAAAZOeDFwefMGxpp2KTWwaK0xlA5M" doc:"The next_cursor of the answer before, with the same filters: goes on behind it."`
}

// TaskList is a page of tasks.
type TaskList struct {
	Tasks      []*Task `json:"tasks" nullable:"false" doc:"The newest first: by run_at where the filter has run_after or run_before, by finished_at where it has finished_after or finished_before, otherwise by creation. Of their attempts each shows the last one only."`
	NextCursor *string `json:"next_cursor" example:"AQAAAAAAAAAAAZOeDFwefMGxpp2KTWwaK0xlA5M" doc:"Send it as cursor, with the same filters, for the tasks behind these. Null when there are none."`
}

// readErrors are the statuses that a look at tasks can be answered with, besides 422 and 500.
var readErrors = []int{http.StatusTooManyRequests, http.StatusServiceUnavailable}

func (a *API) findOperation() huma.Operation {
	explode := true
	// An object in this style is a parameter for each of its members.
	labels := &huma.Param{
		Name: "labels", In: "query", Style: "form", Explode: &explode,
		Description: "With all of these labels, each as a parameter label.<name>: label.kind=play.",
		Schema: &huma.Schema{
			Type: huma.TypeObject, AdditionalProperties: &huma.Schema{Type: huma.TypeString},
			Examples: []any{map[string]any{"label.kind": "play"}},
		},
	}
	return huma.Operation{
		OperationID: "find-tasks", Method: http.MethodGet, Path: "/tasks", Tags: []string{"tasks"}, Security: needs(scopeRead),
		Summary: "Find tasks",
		Description: "Lists the tasks that match all that is given, the newest first. " +
			"state and reason may be given several times, or several values joined by commas; the others once. " +
			"A cursor stays right while tasks end meanwhile. A search that takes longer than 3 seconds is given up with 503: ask for less, by a range of time.",
		Parameters: append([]*huma.Param{labels}, a.parameters(findInput{})...),
		Responses:  a.responses(http.StatusOK, TaskList{}),
		Errors:     readErrors,
	}
}

func (a *API) find(w http.ResponseWriter, r *http.Request) error {
	in := new(findInput)
	f, behind, err := a.readFind(r, in)
	if err != nil {
		return err
	}
	tasks, err := a.Store.Find(r.Context(), &f, behind, in.Limit+1)
	if err != nil {
		return err
	}
	var found TaskList
	if len(tasks) > in.Limit {
		tasks = tasks[:in.Limit]
		cursor := f.Cursor(f.PositionOf(tasks[len(tasks)-1]))
		found.NextCursor = &cursor
	}
	found.Tasks = make([]*Task, len(tasks))
	for i, t := range tasks {
		found.Tasks[i] = taskView(t)
	}
	return a.answer(w, r, http.StatusOK, found)
}

// readFind reads a search: what is searched for, and from where on. The domain says
// what is wrong with it, in words that fit a query.
func (a *API) readFind(r *http.Request, in *findInput) (f task.Filter, behind task.Position, err error) {
	if found := a.parseParams(r, reflect.ValueOf(in).Elem()); found != nil {
		return f, behind, invalid(found)
	}
	var errs task.Errors
	add := func(name, message, kind string) {
		errs = append(errs, task.FieldError{Path: []string{name}, Message: message, Kind: kind})
	}
	query, _ := url.ParseQuery(r.URL.RawQuery) // checkParameters has read it too
	for _, name := range slices.Sorted(maps.Keys(query)) {
		values := query[name]
		switch label, isLabel := strings.CutPrefix(name, labelPrefix); {
		case isLabel:
			if in.Labels == nil {
				in.Labels = make(map[string]string)
			}
			in.Labels[label] = values[0]
		case slices.Contains(values, ""):
			add(name, "must not be empty; leave it out", "string_too_short")
		case name == "min_attempts" && in.MinAttempts == 0:
			add(name, "must be between 1 and 100", "out_of_range")
		}
	}
	in.State, in.Reason = splitCommas(in.State), splitCommas(in.Reason)
	if in.Limit < 1 || in.Limit > maxLimit {
		add("limit", fmt.Sprintf("must be between 1 and %d", maxLimit), "out_of_range")
	}
	f, err = in.filter()
	if found, ok := err.(task.Errors); ok { //nolint:errorlint // filter wraps nothing
		errs = append(errs, found...)
	}
	if errs == nil && in.Cursor != "" {
		behind, err = f.ParseCursor(in.Cursor)
		errs, _ = err.(task.Errors) //nolint:errorlint // ParseCursor wraps nothing
	}
	if errs != nil {
		return f, behind, invalid(queryProblems(errs))
	}
	return f, behind, nil
}

func splitCommas[T ~string](values []T) (words []T) {
	for _, value := range values {
		for word := range strings.SplitSeq(string(value), ",") {
			words = append(words, T(word))
		}
	}
	return words
}

// queryProblems names the parameters as they were sent.
func queryProblems(errs task.Errors) []FieldProblem {
	problems := fieldProblems(errs, Loc{"query"})
	for i, e := range errs {
		if e.Path[0] == "labels" {
			problems[i].Loc = Loc{"query", strings.Join(append([]string{"label"}, e.Path[1:]...), ".")}
		}
	}
	return problems
}

// Counts is how many tasks there are.
type Counts struct {
	States           StateCounts `json:"states" doc:"By state."`
	OldestDueSeconds float64     `json:"oldest_due_seconds" example:"0" doc:"For how long the longest waiting task has been due. Tasks that wait for their host, and those of queues that are paused or have limits, do not count: GET /queues shows how long those have been due."`
}

// StateCounts is how many tasks are in each state.
type StateCounts struct {
	Pending   Count `json:"pending" doc:"They wait for their run_at, the first time or for a retry."`
	Running   Count `json:"running" doc:"They are being carried out."`
	Succeeded Count `json:"succeeded" doc:"They ended with a 2xx answer, within the retention."`
	Failed    Count `json:"failed" doc:"The dead letters, within the retention."`
	Cancelled Count `json:"cancelled" doc:"They were called off, within the retention."`
}

// Count is how many tasks there are of a kind.
type Count struct {
	Count int64 `json:"count" example:"42" doc:"How many."`
	Exact bool  `json:"exact" example:"true" doc:"Whether they were counted. More than 10,000 are estimated from the database's statistics."`
}

func (a *API) countsOperation() huma.Operation {
	return huma.Operation{
		OperationID: "count-tasks", Method: http.MethodGet, Path: "/tasks/counts", Tags: []string{"tasks"}, Security: needs(scopeRead),
		Summary:     "Count tasks",
		Description: "How many tasks there are in each state, and for how long the longest waiting one has been due. It stays cheap however many there are. It takes no parameters: all tasks are counted.",
		Responses:   a.responses(http.StatusOK, Counts{}),
		Errors:      readErrors,
	}
}

func (a *API) counts(w http.ResponseWriter, r *http.Request) error {
	counts, overdue, err := a.Store.Counts(r.Context())
	if err != nil {
		return err
	}
	view := func(s task.State) Count { return Count{Count: counts[s].Tasks, Exact: counts[s].Exact} }
	return a.answer(w, r, http.StatusOK, Counts{
		States: StateCounts{
			Pending: view(task.Pending), Running: view(task.Running),
			Succeeded: view(task.Succeeded), Failed: view(task.Failed), Cancelled: view(task.Cancelled),
		},
		OldestDueSeconds: overdue.Seconds(),
	})
}
