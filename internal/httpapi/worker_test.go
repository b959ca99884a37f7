package httpapi

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/melodia/orchestrator/internal/task"
)

const storedID = "01939e0c-5c1e-7cc1-b1a6-9d8a4d6c1a2b"

// What a call came to, and what an engine is told.
var workOutcomes = []struct {
	name    string
	outcome task.Outcome
	status  int
	result  map[string]any // the answer itself on 200, its member result otherwise
	detail  string
}{
	{"succeeded", task.Outcome{Kind: task.OutcomeSucceeded, StatusCode: 204, Duration: 84 * time.Millisecond}, http.StatusOK,
		map[string]any{"outcome": "succeeded", "status_code": 204.0, "duration_seconds": 0.084, "response_excerpt": nil, "snooze_seconds": nil}, ""},
	{"succeeded with a body", task.Outcome{Kind: task.OutcomeSucceeded, StatusCode: 200, ResponseExcerpt: "done"}, http.StatusOK,
		map[string]any{"outcome": "succeeded", "status_code": 200.0, "duration_seconds": 0.0, "response_excerpt": "done", "snooze_seconds": nil}, ""},
	{"failed", task.Outcome{Kind: task.OutcomeRetryable, StatusCode: 503, Error: "the target answered 503", ResponseExcerpt: "later", Duration: time.Second, RetryAfter: time.Minute}, http.StatusBadGateway,
		map[string]any{"outcome": "retryable", "status_code": 503.0, "duration_seconds": 1.0, "response_excerpt": "later", "snooze_seconds": nil}, "The call failed: the target answered 503."},
	{"not found", task.Outcome{Kind: task.OutcomePermanent, StatusCode: 404, Error: "the target answered 404"}, http.StatusBadGateway,
		map[string]any{"outcome": "permanent", "status_code": 404.0, "duration_seconds": 0.0, "response_excerpt": nil, "snooze_seconds": nil}, "The call failed: the target answered 404."},
	{"redirect", task.Outcome{Kind: task.OutcomePermanent, StatusCode: 302, Error: "the target answered 302 and points to \xff"}, http.StatusBadGateway,
		map[string]any{"outcome": "permanent", "status_code": 302.0, "duration_seconds": 0.0, "response_excerpt": nil, "snooze_seconds": nil}, "The call failed: the target answered 302 and points to �."},
	{"refused", task.Outcome{Kind: task.OutcomePermanent, Refused: true, Error: "the target policy refuses it"}, http.StatusBadGateway,
		map[string]any{"outcome": "permanent", "status_code": nil, "duration_seconds": 0.0, "response_excerpt": nil, "snooze_seconds": nil}, "The call failed: the target policy refuses it."},
	{"no connection", task.Outcome{Kind: task.OutcomeRetryable, Error: "connection refused"}, http.StatusBadGateway,
		map[string]any{"outcome": "retryable", "status_code": nil, "duration_seconds": 0.0, "response_excerpt": nil, "snooze_seconds": nil}, "The call failed: connection refused."},
	{"timeout", task.Outcome{Kind: task.OutcomeRetryable, TimedOut: true, Error: "no answer within 5 s", Duration: 5 * time.Second}, http.StatusGatewayTimeout,
		map[string]any{"outcome": "retryable", "status_code": nil, "duration_seconds": 5.0, "response_excerpt": nil, "snooze_seconds": nil}, "The call timed out: no answer within 5 s."},
	{"timeout in the body", task.Outcome{Kind: task.OutcomeRetryable, StatusCode: 200, TimedOut: true, Error: "the body was not complete within 5 s", ResponseExcerpt: "hal"}, http.StatusGatewayTimeout,
		map[string]any{"outcome": "retryable", "status_code": 200.0, "duration_seconds": 0.0, "response_excerpt": "hal", "snooze_seconds": nil}, "The call timed out: the body was not complete within 5 s."},
	{"snoozed", task.Outcome{Kind: task.OutcomeSnoozed, StatusCode: 503, Snooze: 1500 * time.Millisecond, Error: "the target answered 503"}, http.StatusBadGateway,
		map[string]any{"outcome": "snoozed", "status_code": 503.0, "duration_seconds": 0.0, "response_excerpt": nil, "snooze_seconds": 1.5}, "The call failed: the target answered 503."},
	{"snoozed, and the body timed out", task.Outcome{Kind: task.OutcomeSnoozed, StatusCode: 503, Snooze: time.Minute, TimedOut: true, Error: "no complete answer"}, http.StatusBadGateway,
		map[string]any{"outcome": "snoozed", "status_code": 503.0, "duration_seconds": 0.0, "response_excerpt": nil, "snooze_seconds": 60.0}, "The call failed: no complete answer."},
	{"a snooze that is not heeded", task.Outcome{Kind: task.OutcomePermanent, StatusCode: 503, Snooze: time.Minute, Never: true, Error: "the target answered 503"}, http.StatusBadGateway,
		map[string]any{"outcome": "permanent", "status_code": 503.0, "duration_seconds": 0.0, "response_excerpt": nil, "snooze_seconds": nil}, "The call failed: the target answered 503."},
	{"not made", task.Outcome{Kind: task.OutcomeInterrupted, Shortage: task.ShortagePorts, Error: "no local port is free"}, http.StatusServiceUnavailable, nil, "The call was not made: no local port is free."},
	{"interrupted", task.Outcome{Kind: task.OutcomeInterrupted, Error: "cut short"}, http.StatusServiceUnavailable, nil, unavailableDetail},
}

func TestWorkOutcomes(t *testing.T) {
	t.Parallel()
	for _, tt := range workOutcomes {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s := newService(t)
			s.dispatcher.runOnce = func(context.Context, *task.Task) (task.Outcome, error) { return tt.outcome, nil }
			s.dispatcher.runNow = func(context.Context, task.ID) (task.Outcome, task.Decision, error) {
				return tt.outcome, task.Decision{State: task.Failed, Reason: task.ClientError}, nil
			}
			for form, body := range map[string]string{"request": with("payload", "1"), "stored": `{"task_id":"` + storedID + `"}`} {
				a := s.post("/worker-endpoint", body)
				if a.status != tt.status {
					t.Errorf("%s: got status %d, want %d: %s", form, a.status, tt.status, a.text)
				}
				var result any
				switch a.status {
				case http.StatusOK:
					result = a.json
				case http.StatusServiceUnavailable:
					if got := a.header.Get("Retry-After"); !slices.Contains([]string{"1", "2", "3"}, got) {
						t.Errorf("%s: got Retry-After %q, want 1 to 3", form, got)
					}
				default:
					result = a.at("result")
					want := map[string]string{"snoozed": "2", "snoozed, and the body timed out": "60"}[tt.name]
					if got := a.header.Get("Retry-After"); got != want {
						t.Errorf("%s: got Retry-After %q, want %q", form, got, want)
					}
				}
				var want any
				if tt.result != nil {
					want = tt.result
				}
				if diff := cmp.Diff(want, result); diff != "" {
					t.Errorf("%s: result (-want +got):\n%s", form, diff)
				}
				if a.detail() != tt.detail {
					t.Errorf("%s: got detail %q, want %q", form, a.detail(), tt.detail)
				}
			}
		})
	}
}

// A task in the request is carried out once and leaves no trace.
func TestWorkRequest(t *testing.T) {
	t.Parallel()
	s := newService(t)
	a := s.post("/worker-endpoint", `{"url":"`+target+`","method":"PATCH","headers":{"X-A":"b"},"payload":{ "a" :1},"timeout_seconds":1.5,
		"retry":{"max_attempts":7},"labels":{"k":"v"},"expires_at":"9000-01-01T00:00:00Z"}`)
	if a.status != http.StatusOK {
		t.Fatalf("got status %d, want 200: %s", a.status, a.text)
	}
	_, once := s.dispatcher.taken()
	if len(once) != 1 {
		t.Fatalf("%d calls were made, want 1", len(once))
	}
	got := once[0]
	retry := task.DefaultRetryPolicy()
	retry.MaxAttempts = 1
	want := task.Spec{
		URL: target, Method: "PATCH", Headers: map[string]string{"X-A": "b"}, Body: []byte(`{ "a" :1}`), ContentType: "application/json",
		Timeout: 1500 * time.Millisecond, Retry: retry, Labels: map[string]string{"k": "v"}, ExpiresAt: time.Date(9000, 1, 1, 0, 0, 0, 0, time.UTC),
	}
	if diff := cmp.Diff(want, got.Spec); diff != "" {
		t.Errorf("called (-want +got):\n%s", diff)
	}
	if !got.RunAt.Equal(storedAt) {
		t.Errorf("got run_at %v, want the moment by the store's clock, %v", got.RunAt, storedAt)
	}
	if got.ID == (task.ID{}) {
		t.Error("the task has no id")
	}
	if n := s.store.callCount(); n != 0 {
		t.Errorf("the store was asked %d times, want never", n)
	}
}

// Engines set what content type they like.
func TestWorkContentTypes(t *testing.T) {
	t.Parallel()
	s := newService(t)
	for _, contentType := range []string{"", "application/json", "application/octet-stream", "text/plain", "multipart/form-data", "application/x-www-form-urlencoded", "a+b;c+d", ";;"} {
		for _, body := range []string{with("payload", "1"), `{"task_id":"` + storedID + `"}`} {
			if a := s.post("/worker-endpoint", body, "Content-Type", contentType); a.status != http.StatusOK {
				t.Errorf("%q: got status %d, want 200: %s", contentType, a.status, a.text)
			}
		}
	}
}

func TestWorkStored(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name     string
		outcome  task.Outcome
		decision task.Decision
		err      error
		status   int
		detail   string
	}{
		{"unknown", task.Outcome{}, task.Decision{}, fmt.Errorf("claim task: %w", task.ErrNotFound), http.StatusNotFound, "There is no task with this id, or its retention is over."},
		{"running or over", task.Outcome{}, task.Decision{}, fmt.Errorf("claim task: %w", task.ErrNotPending), http.StatusConflict, "The task is running or has ended; only a pending task can be carried out or changed."},
		{"expired", task.Outcome{}, task.Decision{State: task.Failed, Reason: task.Expired}, nil, http.StatusBadGateway, "The task was not carried out and has failed: expired."},
		{"cancelled before", task.Outcome{}, task.Decision{State: task.Cancelled}, nil, http.StatusConflict, "The task was cancelled before its call had ended."},
		{"cancelled meanwhile", task.Outcome{Kind: task.OutcomeInterrupted, Cancelled: true}, task.Decision{State: task.Cancelled}, nil, http.StatusConflict, "The task was cancelled before its call had ended."},
		{"attempts exhausted", task.Outcome{}, task.Decision{State: task.Failed, Reason: task.AttemptsExhausted}, nil, http.StatusBadGateway, "The task was not carried out and has failed: attempts_exhausted."},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s := newService(t)
			s.dispatcher.runNow = func(context.Context, task.ID) (task.Outcome, task.Decision, error) {
				return tt.outcome, tt.decision, tt.err
			}
			want, _ := task.ParseID(storedID)
			for _, id := range []string{storedID, strings.ToUpper(storedID)} {
				a := s.post("/worker-endpoint", `{"task_id":"`+id+`"}`)
				if a.status != tt.status || a.detail() != tt.detail {
					t.Errorf("got %d %q, want %d %q", a.status, a.detail(), tt.status, tt.detail)
				}
				if tt.err == nil && !strings.Contains(s.log.String(), `"msg":"task carried out at /worker-endpoint","task_id":"`+storedID) {
					t.Errorf("the log does not say that it was carried out: %s", s.log)
				}
				if ran, once := s.dispatcher.taken(); len(ran) != 1 || ran[0] != want || len(once) > 0 {
					t.Errorf("the dispatcher ran %v, want %v once", ran, want)
				}
			}
		})
	}
}

func TestWorkRefuses(t *testing.T) {
	t.Parallel()
	s := newService(t)
	for _, tt := range []struct {
		name, body string
		errors     []string
	}{
		{"no UUID", `{"task_id":"` + marker + `"}`, []string{`["body","task_id"] string_pattern_mismatch`}},
		{"UUID in braces", `{"task_id":"{` + storedID + `}"}`, []string{`["body","task_id"] string_pattern_mismatch`}},
		{"UUID and a line", `{"task_id":"` + storedID + `\n"}`, []string{`["body","task_id"] string_pattern_mismatch`}},
		{"null", `{"task_id":null}`, []string{`["body","task_id"] string_type`}},
		{"number", `{"task_id":5}`, []string{`["body","task_id"] string_type`}},
		{"both forms", `{"task_id":"` + storedID + `","url":"https://` + marker + `.example/"}`, []string{`["body","url"] extra_forbidden`}},
		{"another case", `{"Task_Id":"` + storedID + `"}`, []string{`["body","Task_Id"] extra_forbidden`, `["body","url"] missing`}},
		{"dots and brackets", `{"task_id":5,"a.b[0]":1,"c":2}`, []string{`["body","task_id"] string_type`, `["body","a.b[0]"] extra_forbidden`, `["body","c"] extra_forbidden`}},
		{"expired", with("expires_at", `"2001-01-01T00:00:00Z"`), []string{`["body","expires_at"] expired`}},
		{"a moment", with("run_at", `"2001-01-01T00:00:00Z"`), []string{`["body","run_at"] extra_forbidden`}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := s.on(t)
			s.refused(s.post("/worker-endpoint", tt.body), http.StatusUnprocessableEntity, tt.errors...)
		})
	}
}

// A call that /worker-endpoint made comes back to it.
func TestWorkLoop(t *testing.T) {
	t.Parallel()
	s := newService(t)
	for _, body := range []string{with("payload", "1"), `{"task_id":"` + storedID + `"}`, `{}`, marker} {
		a := s.post("/worker-endpoint", body, "Orchestrator-Via", "worker-endpoint")
		s.refused(a, http.StatusLoopDetected)
		if got := a.header.Get("Orchestrator-Retry"); got != "never" {
			t.Errorf("got Orchestrator-Retry %q, want never", got)
		}
		if want := "This call was made by /worker-endpoint itself; carrying it out would never end."; a.detail() != want {
			t.Errorf("got %q, want %q", a.detail(), want)
		}
	}
	// Submitting a task is no loop.
	for path, body := range map[string]string{"/enqueue": with("payload", "1"), "/schedule": with("delay_seconds", "1")} {
		if a := s.post(path, body, "Orchestrator-Via", "worker-endpoint"); a.status != http.StatusAccepted {
			t.Errorf("%s: got status %d, want 202: %s", path, a.status, a.text)
		}
	}
}
