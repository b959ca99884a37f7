package httpapi

import (
	"context"
	"encoding/json"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/melodia/orchestrator/internal/task"
)

var completionToken = string(task.NewToken([32]byte{1, 2, 3}))

const completePath = "/tasks/01939e0c-5c1e-7cc1-b1a6-9d8a4d6c1a2b/complete"

// complete reports with a token and without any other credentials.
func (s *service) complete(body string) *answer {
	s.t.Helper()
	return s.do(http.MethodPost, completePath, body, "Orchestrator-Completion-Token", completionToken)
}

func TestEnqueueWithCompletion(t *testing.T) {
	t.Parallel()
	s := newService(t)
	for body, want := range map[string]task.Completion{
		`{"timeout_seconds":60}`:                              {Timeout: time.Minute},
		`{"timeout_seconds":86400,"heartbeat_seconds":3600}`:  {Timeout: 24 * time.Hour, Heartbeat: time.Hour},
		`{"timeout_seconds":3600.5,"heartbeat_seconds":10}`:   {Timeout: time.Hour + 500*time.Millisecond, Heartbeat: 10 * time.Second},
		`{"timeout_seconds":60,"heartbeat_seconds":null}`:     {Timeout: time.Minute},
		`{"timeout_seconds":60.0,"heartbeat_seconds":59.999}`: {Timeout: time.Minute, Heartbeat: 59999 * time.Millisecond},
	} {
		s := s.on(t)
		a := s.post("/enqueue", with("completion", body))
		if got := s.only(a).Completion; got == nil || *got != want {
			t.Errorf("%s: got %+v, want %+v", body, got, want)
		}
		if got := member(a.json, "completion"); got["timeout_seconds"] != want.Timeout.Seconds() {
			t.Errorf("%s is shown as %v", body, got)
		}
	}
	for body, mistake := range map[string]string{
		`{}`:                        `["body","completion","timeout_seconds"] missing`,
		`{"heartbeat_seconds":60}`:  `["body","completion","timeout_seconds"] missing`,
		`{"timeout_seconds":59}`:    `["body","completion","timeout_seconds"] greater_than_equal`,
		`{"timeout_seconds":86401}`: `["body","completion","timeout_seconds"] less_than_equal`,
		`{"timeout_seconds":60,"heartbeat_seconds":9}`:       `["body","completion","heartbeat_seconds"] greater_than_equal`,
		`{"timeout_seconds":86400,"heartbeat_seconds":3601}`: `["body","completion","heartbeat_seconds"] less_than_equal`,
		`{"timeout_seconds":60,"heartbeat_seconds":61}`:      `["body","completion","heartbeat_seconds"] out_of_range`,
		`{"timeout":60}`: `["body","completion","timeout"] extra_forbidden`,
		`true`:           `["body","completion"] object_type`,
	} {
		a := s.post("/enqueue", with("completion", body))
		if a.status != http.StatusUnprocessableEntity || !strings.Contains(a.text, strings.Split(mistake, " ")[0]) || !strings.Contains(a.text, `"`+strings.Split(mistake, " ")[1]+`"`) {
			t.Errorf("%s: got %d %s, want %s", body, a.status, a.text, mistake)
		}
	}
	s.refused(s.post("/worker-endpoint", with("completion", `{"timeout_seconds":60}`)), http.StatusUnprocessableEntity, `["body","completion"] conflict`)
	s = newService(t, func(o *settings) { o.noCompletion = true })
	s.refused(s.post("/enqueue", with("completion", `{"timeout_seconds":60}`)), http.StatusUnprocessableEntity, `["body","completion"] unavailable`)
}

func TestReports(t *testing.T) {
	t.Parallel()
	s := newService(t)
	for body, want := range map[string]task.Report{
		`{"outcome":"heartbeat"}`:                                                               {Kind: task.ReportHeartbeat, Retry: true},
		`{"outcome":"heartbeat","progress":0.4,"note":"mixing"}`:                                {Kind: task.ReportHeartbeat, Retry: true, Progress: new(0.4), Note: "mixing"},
		`{"outcome":"succeeded"}`:                                                               {Kind: task.ReportSucceeded, Retry: true},
		`{"outcome":"succeeded","result":{"b":1.10,"a":"\u0000"}}`:                              {Kind: task.ReportSucceeded, Retry: true, Result: []byte(`{"b":1.10,"a":"\u0000"}`)},
		`{"outcome":"succeeded","result":false,"progress":1}`:                                   {Kind: task.ReportSucceeded, Retry: true, Result: []byte(`false`), Progress: new(1.0)},
		`{"outcome":"failed","retry":false,"note":"no vocals"}`:                                 {Kind: task.ReportFailed, Note: "no vocals"},
		`{"outcome":"failed"}`:                                                                  {Kind: task.ReportFailed, Retry: true},
		`{"outcome":"succeeded","result":"` + strings.Repeat("x", task.MaxResultBytes-2) + `"}`: {Kind: task.ReportSucceeded, Retry: true, Result: []byte(`"` + strings.Repeat("x", task.MaxResultBytes-2) + `"`)},
	} {
		s := s.on(t)
		s.dispatcher.reports = nil
		a := s.complete(body)
		if a.status != http.StatusOK || a.at("state") != "running" || a.at("report_by") == nil {
			t.Fatalf("%.80s: got %d %s", body, a.status, a.text)
		}
		if diff := cmp.Diff([]task.Report{want}, s.dispatcher.reports); diff != "" {
			t.Errorf("%.80s (-want +got):\n%s", body, diff)
		}
	}
	s.dispatcher.reports = nil
	for body, mistake := range map[string]string{
		`{}`:                                      `["body","outcome"] missing`,
		`{"outcome":"done"}`:                      `["body","outcome"] enum`,
		`{"outcome":"failed","result":1}`:         `["body","result"] conflict`,
		`{"outcome":"heartbeat","result":1}`:      `["body","result"] conflict`,
		`{"outcome":"heartbeat","progress":1.01}`: `["body","progress"] less_than_equal`,
		`{"outcome":"heartbeat","progress":-0.1}`: `["body","progress"] greater_than_equal`,
		`{"outcome":"heartbeat","note":"a\nb"}`:   `["body","note"] invalid`,
		`{"outcome":"failed","note":"` + strings.Repeat("x", 1001) + `"}`:                     `["body","note"] invalid`,
		`{"outcome":"succeeded","result":"` + strings.Repeat("x", task.MaxResultBytes) + `"}`: `["body","result"] too_long`,
		`{"outcome":"succeeded","results":1}`:                                                 `["body","results"] extra_forbidden`,
	} {
		s.refused(s.complete(body), http.StatusUnprocessableEntity, mistake)
	}
	s.refused(s.complete(""), http.StatusBadRequest)
	s.refused(s.complete("{"), http.StatusBadRequest)
	if len(s.dispatcher.reports) != 0 {
		t.Errorf("what was refused came through: %+v", s.dispatcher.reports)
	}
}

// Who has no token that counts learns nothing, not even whether there is such a task.
func TestReportsWithoutAToken(t *testing.T) {
	t.Parallel()
	s := newService(t)
	asked := false
	var err error
	s.dispatcher.report = func(task.ID, task.Token, *task.Report) (task.State, time.Time, error) {
		asked = true
		return "", time.Time{}, err
	}
	for _, token := range []string{"", "x", "oct_", completionToken + "A", strings.ToUpper(completionToken), "Bearer " + completionToken} {
		a := s.do(http.MethodPost, completePath, `{"outcome":"succeeded"}`, "Orchestrator-Completion-Token", token)
		s.refused(a, http.StatusUnauthorized)
		if a.header.Get("WWW-Authenticate") == "" || asked {
			t.Errorf("the token %q: asked %t, headers %v", token, asked, a.header)
		}
	}
	var texts []string
	for _, err = range []error{task.ErrTokenUnknown, task.ErrNotFound} {
		a := s.complete(`{"outcome":"succeeded"}`)
		s.refused(a, http.StatusUnauthorized)
		texts = append(texts, a.at("detail").(string))
		if strings.Contains(a.text, completionToken) {
			t.Error("the token is echoed")
		}
	}
	if texts[0] != texts[1] {
		t.Errorf("an unknown task is told from an unknown token: %q", texts)
	}
	for _, err = range []error{task.ErrTokenOld, task.ErrEnded, task.ErrChanged} {
		s.refused(s.complete(`{"outcome":"heartbeat"}`), http.StatusConflict)
	}
	err = task.ErrUnavailable
	if a := s.complete(`{"outcome":"heartbeat"}`); a.status != http.StatusServiceUnavailable || a.header.Get("Retry-After") == "" {
		t.Errorf("without a database: %d %v", a.status, a.header)
	}
}

// What is shown of a task that its target has, and had.
func TestAwaitedTask(t *testing.T) {
	t.Parallel()
	s := newService(t)
	stored := &task.Task{
		ID: task.ID{5}, State: task.Running, RunAt: storedAt, CreatedAt: storedAt, FinishedAt: storedAt, Awaiting: true, CompletionUntil: storedAt.Add(time.Minute), CompletionEndsAt: storedAt.Add(time.Hour),
		Progress: &task.Progress{Part: new(0.4), Note: "mixing", At: storedAt.Add(-5 * time.Second)},
		Spec:     task.Spec{URL: target, Method: "POST", Retry: task.DefaultRetryPolicy(), Completion: &task.Completion{Timeout: time.Hour, Heartbeat: time.Minute}},
	}
	view := func(t *task.Task) *answer {
		s.store.get = func(context.Context, task.ID) (*task.Task, error) { return t, nil }
		return s.get("/tasks/" + t.ID.String())
	}
	got := view(stored)
	if got.at("awaiting_completion") != true || got.at("state") != "running" || member(got.json, "completion")["heartbeat_seconds"] != 60.0 {
		t.Errorf("got %s", got.text)
	}
	stored.State, stored.Awaiting, stored.Result = task.Succeeded, false, []byte(`{"n": 1.10}`)
	a := s.get("/tasks/" + stored.ID.String())
	if !strings.Contains(a.text, `"result":{"n": 1.10}`) && !strings.Contains(a.text, `"result":{"n":1.10}`) {
		t.Errorf("the result is not there: %s", a.text)
	}
	if strings.Contains(a.text, "awaiting_completion") || !json.Valid([]byte(a.text)) {
		t.Errorf("after its end: %s", a.text)
	}

	stored.State, stored.Awaiting = task.Running, true
	text := task.Explain(stored, task.Facts{Now: storedAt, ClaimedAt: storedAt.Add(-3 * time.Minute)})
	const want = "The target took attempt 1 of 14 3 min ago and reported 40 % (mixing) 5.0 s ago. It must send a heartbeat within 60 s, and report its end within 60 min; else the attempt is lost and tried again."
	if text != want {
		t.Errorf("got %q, want %q", text, want)
	}
}
