package httpapi

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/melodia/orchestrator/internal/task"
)

const (
	anID     = "01939e0c-5c1e-7cc1-b1a6-9d8a4d6c1a2b"
	taskPath = "/tasks/" + anID
)

// stored returns a pending task as the store would.
func stored(change ...func(*task.Task)) *task.Task {
	id, err := task.ParseID(anID)
	if err != nil {
		panic(err)
	}
	t := &task.Task{
		ID: id, State: task.Pending, RunAt: storedAt.Add(time.Hour), CreatedAt: storedAt, LastClaim: 3,
		Spec: task.Spec{
			URL: target, Method: "POST", Body: []byte(`{"song_id":42}`), ContentType: "application/json",
			Headers: map[string]string{"X-Tenant": "melodia", "Authorization": "Bearer " + marker}, Labels: map[string]string{"kind": "play"},
			Timeout: 30 * time.Second, Retry: task.DefaultRetryPolicy(),
		},
	}
	for _, c := range change {
		c(t)
	}
	t.BodyBytes = len(t.Body)
	return t
}

func as(state task.State) func(*task.Task) { return func(t *task.Task) { t.State = state } }

func TestActsOnOneTask(t *testing.T) {
	t.Parallel()
	cancelling := func(t *task.Task) { t.CancelRequestedAt = storedAt }
	for name, tt := range map[string]struct {
		act, path string
		answer    *task.Task
		err       error
		status    int
		cut, woke bool
		log       string
	}{
		"cancel a pending task":            {act: "Cancel", path: "/cancel", answer: stored(as(task.Cancelled)), status: 200, log: "task cancelled"},
		"cancel a running task":            {act: "Cancel", path: "/cancel", answer: stored(as(task.Running), cancelling), status: 202, cut: true, log: "task cancelled"},
		"cancel an ended task":             {act: "Cancel", path: "/cancel", err: task.ErrEnded, status: 409},
		"cancel once more":                 {act: "Cancel", path: "/cancel", err: task.ErrCancelRequested, status: 409},
		"cancel an unknown task":           {act: "Cancel", path: "/cancel", err: task.ErrNotFound, status: 404},
		"cancel without a database":        {act: "Cancel", path: "/cancel", err: task.ErrUnavailable, status: 503},
		"cancel among too many":            {act: "Cancel", path: "/cancel", err: task.ErrOverloaded, status: 429},
		"run a pending task":               {act: "MakeDue", path: "/run", answer: stored(), status: 200, woke: true, log: "task made due"},
		"run a running task":               {act: "MakeDue", path: "/run", err: task.ErrNotPending, status: 409},
		"run a task that is cancelled":     {act: "MakeDue", path: "/run", err: task.ErrCancelRequested, status: 409},
		"redrive a failed task":            {act: "Redrive", path: "/redrive", answer: stored(), status: 200, woke: true, log: "task redriven"},
		"redrive a task that succeeded":    {act: "Redrive", path: "/redrive", err: task.ErrNotRedrivable, status: 409},
		"redrive while others redrive too": {act: "Redrive", path: "/redrive", err: task.ErrChanged, status: 409},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newService(t)
			s.store.act = func(act string, id task.ID) (*task.Task, error) {
				if act != tt.act || id.String() != anID {
					t.Errorf("the store is asked for %s of %s", act, id)
				}
				return tt.answer, tt.err
			}
			a := s.post(taskPath+tt.path, "", "X-Test-Caller", "plays@melodia.app")
			if a.status != tt.status {
				t.Fatalf("got status %d, want %d: %s", a.status, tt.status, a.text)
			}
			if tt.err != nil {
				s.nothingHappened(a)
				if strings.Contains(s.log.String(), "INFO") || s.dispatcher.woke > 0 || s.dispatcher.cut != nil {
					t.Errorf("it had an effect; the log says %s", s.log)
				}
				return
			}
			if a.at("id") != anID || a.at("state") != string(tt.answer.State) || a.header.Get("ETag") != etag(tt.answer) {
				t.Errorf("got %s with ETag %s", a.text, a.header.Get("ETag"))
			}
			if (a.at("cancel_requested_at") != nil) != tt.cut {
				t.Errorf("cancel_requested_at is %v", a.at("cancel_requested_at"))
			}
			var cut []map[task.ID]int64
			if tt.cut {
				cut = []map[task.ID]int64{{tt.answer.ID: 3}}
			}
			if diff := cmp.Diff(cut, s.dispatcher.cut); diff != "" || (s.dispatcher.woke > 0) != tt.woke {
				t.Errorf("woken %d times, cut off (-want +got):\n%s", s.dispatcher.woke, diff)
			}
			s.loggedAct(tt.log, `"task_id":"`+anID+`"`)
		})
	}
}

// loggedAct checks that plays@melodia.app is on record with what was done.
func (s *service) loggedAct(done string, parts ...string) {
	s.t.Helper()
	log := s.log.String()
	for _, part := range append(parts, `"level":"INFO","msg":"`+done+`"`, `"caller":"plays@melodia.app"`) {
		if !strings.Contains(log, part) {
			s.t.Errorf("the log does not say %s: %s", part, log)
		}
	}
	if strings.Contains(log, marker) {
		s.t.Errorf("a value is in the log: %s", log)
	}
}

func TestAnswersWithOneTaskHaveItsETag(t *testing.T) {
	t.Parallel()
	s := newService(t)
	s.store.get = func(context.Context, task.ID) (*task.Task, error) { return stored(), nil }
	for _, a := range []*answer{s.get(taskPath), s.post("/enqueue", `{"url":"`+target+`"}`), s.post("/schedule", `{"url":"`+target+`","delay_seconds":1}`)} {
		if tag := a.header.Get("ETag"); !strings.HasPrefix(tag, `"`) || !strings.HasSuffix(tag, `"`) || len(tag) < 3 {
			t.Errorf("got ETag %s with %s", tag, a.text)
		}
	}
}

func TestChange(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		body string
		want func(*task.Task)
	}{
		"nothing":                    {`{}`, func(*task.Task) {}},
		"run_at":                     {`{"run_at":"2030-12-24T21:00:00-03:00"}`, func(t *task.Task) { t.RunAt = time.Date(2030, 12, 25, 0, 0, 0, 0, time.UTC) }},
		"a local run_at":             {`{"run_at":"2030-12-24T21:00:00","time_zone":"America/Argentina/Buenos_Aires"}`, func(t *task.Task) { t.RunAt = time.Date(2030, 12, 25, 0, 0, 0, 0, time.UTC) }},
		"delay_seconds":              {`{"delay_seconds":60}`, func(t *task.Task) { t.RunAt, t.Delay = time.Time{}, time.Minute }},
		"at once":                    {`{"delay_seconds":0}`, func(t *task.Task) { t.RunAt = time.Time{} }},
		"a header":                   {`{"headers":{"X-Other":"1"}}`, func(t *task.Task) { t.Headers["X-Other"] = "1" }},
		"a header in another case":   {`{"headers":{"x-tenant":"1"}}`, func(t *task.Task) { delete(t.Headers, "X-Tenant"); t.Headers["x-tenant"] = "1" }},
		"a header less":              {`{"headers":{"x-tenant":null,"never-there":null}}`, func(t *task.Task) { delete(t.Headers, "X-Tenant") }},
		"a secret":                   {`{"headers":{"Authorization":"Bearer 2"}}`, func(t *task.Task) { t.Headers["Authorization"] = "Bearer 2" }},
		"a word that is no secret":   {`{"headers":{"X-Tenant":"[redacted]"}}`, func(t *task.Task) { t.Headers["X-Tenant"] = "[redacted]" }},
		"labels":                     {`{"labels":{"kind":null,"Kind":"a.b[0]","x.y[1]":"z"}}`, func(t *task.Task) { t.Labels = map[string]string{"Kind": "a.b[0]", "x.y[1]": "z"} }},
		"a payload":                  {`{"payload":{"n": 1e2}}`, func(t *task.Task) { t.Body = []byte(`{"n": 1e2}`) }},
		"no payload":                 {`{"payload":null}`, func(t *task.Task) { t.Body, t.ContentType = nil, "" }},
		"a body":                     {`{"body":"text"}`, func(t *task.Task) { t.Body, t.ContentType = []byte("text"), "text/plain; charset=utf-8" }},
		"no body":                    {`{"body":null}`, func(t *task.Task) { t.Body, t.ContentType = nil, "" }},
		"a body, no payload":         {`{"body":"text","payload":null}`, func(t *task.Task) { t.Body, t.ContentType = []byte("text"), "text/plain; charset=utf-8" }},
		"a payload, no body":         {`{"body":null,"payload":1}`, func(t *task.Task) { t.Body = []byte("1") }},
		"bytes":                      {`{"body_base64":"_wA"}`, func(t *task.Task) { t.Body, t.ContentType = []byte{0xff, 0}, "application/octet-stream" }},
		"no bytes":                   {`{"body_base64":null}`, func(t *task.Task) { t.Body, t.ContentType = nil, "" }},
		"bytes and nothing else":     {`{"payload":null,"body":null,"body_base64":"AA=="}`, func(t *task.Task) { t.Body, t.ContentType = []byte{0}, "application/octet-stream" }},
		"a payload of any number":    {`{"payload":[1e999,-0,1.0]}`, func(t *task.Task) { t.Body = []byte(`[1e999,-0,1.0]`) }},
		"a timeout":                  {`{"timeout_seconds":0.5}`, func(t *task.Task) { t.Timeout = 500 * time.Millisecond }},
		"a part of the retry policy": {`{"retry":{"max_attempts":20}}`, func(t *task.Task) { t.Retry.MaxAttempts = 20 }},
		"for how long it is retried": {`{"retry":{"for":"2h"}}`, func(t *task.Task) {
			t.Retry.MaxAttempts, t.Retry.MaxRetryDuration, t.Retry.MaxBackoff = 100, 2*time.Hour, 12*time.Minute
		}},
		"the whole retry policy": {`{"retry":{"max_attempts":2,"max_retry_duration_seconds":60,"min_backoff_seconds":0.5,"max_backoff_seconds":5,"max_doublings":3,"retry_client_errors":true}}`, func(t *task.Task) {
			t.Retry = task.RetryPolicy{MaxAttempts: 2, MaxRetryDuration: time.Minute, MinBackoff: 500 * time.Millisecond, MaxBackoff: 5 * time.Second, MaxDoublings: 3, RetryClientErrors: true}
		}},
		"expires_at":    {`{"expires_at":"2030-12-24T21:00:00Z"}`, func(t *task.Task) { t.ExpiresAt = time.Date(2030, 12, 24, 21, 0, 0, 0, time.UTC) }},
		"no expires_at": {`{"expires_at":null}`, func(t *task.Task) { t.ExpiresAt = time.Time{} }},
		"a queue":       {`{"queue":"mail"}`, func(t *task.Task) { t.Queue, t.Priority = "mail", task.Normal }},
		"a flow key":    {`{"flow_key":"tenant-42","priority":"high"}`, func(t *task.Task) { t.Queue, t.FlowKey, t.Priority = "default", "tenant-42", task.High }},
		"no queue":      {`{"queue":null,"flow_key":null}`, func(*task.Task) {}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for _, contentType := range []string{"application/json", "application/merge-patch+json"} {
				s := newService(t)
				before := func() *task.Task { return stored(func(t *task.Task) { t.ExpiresAt = storedAt.AddDate(50, 0, 0) }) }
				s.store.get = func(context.Context, task.ID) (*task.Task, error) { return before(), nil }
				var got *task.Task
				s.store.change = func(t *task.Task) (*task.Task, error) {
					got = t
					after := *t
					after.LastClaim++
					if after.RunAt.IsZero() {
						after.RunAt = storedAt.Add(after.Delay)
					}
					return &after, nil
				}
				a := s.do(http.MethodPatch, taskPath, tt.body, "Content-Type", contentType, "If-Match", etag(before()), "X-Test-Caller", "plays@melodia.app")
				if a.status != http.StatusOK || a.header.Get("ETag") != `"4-pending-0"` || s.dispatcher.woke != 1 {
					t.Fatalf("got %d with ETag %s, woken %d times: %s", a.status, a.header.Get("ETag"), s.dispatcher.woke, a.text)
				}
				want := before()
				tt.want(want)
				want.BodyBytes = len(want.Body)
				if diff := cmp.Diff(want, got); diff != "" {
					t.Errorf("what is written (-want +got):\n%s", diff)
				}
				if given := regexp.MustCompile(`"(payload|body|body_base64)":`).MatchString(tt.body); (s.store.content != nil) != given {
					t.Errorf("the store is to write the body: %v, want %v", s.store.content != nil, given)
				}
				s.loggedAct("task changed", `"task_id":"`+anID+`"`)
				if strings.Contains(a.text, marker) {
					t.Errorf("a secret header is shown: %s", a.text)
				}
			}
		})
	}
}

func TestChangeThatBreaksRules(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		body   string
		stored func(*task.Task)
		errors []string
	}{
		"a field that cannot be changed": {body: `{"url":"` + marker + `"}`, errors: []string{`["body","url"] extra_forbidden`}},
		"its callbacks": {body: `{"on_success":null,"on_failure":{"url":"` + marker + `"}}`,
			errors: []string{`["body","on_success"] extra_forbidden`, `["body","on_failure"] extra_forbidden`}},
		"a misspelt field":            {body: `{"timeout":1}`, errors: []string{`["body","timeout"] extra_forbidden`}},
		"a redacted header":           {body: `{"headers":{"Authorization":"[redacted]"}}`, errors: []string{`["body","headers","Authorization"] redacted`}},
		"a reserved header":           {body: `{"headers":{"Host":"` + marker + `"}}`, errors: []string{`["body","headers","Host"] reserved`}},
		"a reserved header with _":    {body: `{"headers":{"x_goog_iap":"` + marker + `"}}`, errors: []string{`["body","headers","x_goog_iap"] reserved`}},
		"a header of another kind":    {body: `{"headers":{"X-Tenant":1}}`, errors: []string{`["body","headers","X-Tenant"] string_type`}},
		"a secret that is not for it": {body: `{"headers":{"X-A":"${secret:` + marker + `}"}}`, errors: []string{`["body","headers","X-A"] secret_refused`}},
		"a header twice":              {body: `{"headers":{"X-A":"1","x-a":"2"}}`, errors: []string{`["body","headers","x-a"] duplicate`}},
		"too many labels":             {body: `{"labels":` + object(16, "l", `"1"`) + `}`, errors: []string{`["body","labels"] too_long`}},
		"payload and body":            {body: `{"payload":1,"body":"` + marker + `"}`, errors: []string{`["body","body"] conflict`}},
		"payload and bytes":           {body: `{"payload":1,"body_base64":"AA=="}`, errors: []string{`["body","body_base64"] conflict`}},
		"body and bytes":              {body: `{"body":"` + marker + `","body_base64":"AA=="}`, errors: []string{`["body","body_base64"] conflict`}},
		"no base64":                   {body: `{"body_base64":"` + marker + ` "}`, errors: []string{`["body","body_base64"] invalid`}},
		"bytes for a GET":             {body: `{"body_base64":""}`, stored: func(t *task.Task) { t.Method, t.Body = "GET", nil }, errors: []string{`["body","body_base64"] conflict`}},
		"a number beyond a float":     {body: `{"timeout_seconds":1e999}`, errors: []string{`["body","timeout_seconds"] less_than_equal`}},
		"a payload for a GET":         {body: `{"payload":1}`, stored: func(t *task.Task) { t.Method, t.Body = "GET", nil }, errors: []string{`["body","payload"] conflict`}},
		"a run_at without a zone":     {body: `{"run_at":"2030-12-24T21:00:00"}`, errors: []string{`["body","run_at"] datetime_parsing`}},
		"run_at and delay_seconds":    {body: `{"run_at":"2030-12-24T21:00:00Z","delay_seconds":1}`, errors: []string{`["body","delay_seconds"] conflict`}},
		"a zone alone":                {body: `{"time_zone":"America/Argentina/Buenos_Aires"}`, errors: []string{`["body","run_at"] missing`}},
		"an expires_at that is none":  {body: `{"expires_at":"` + marker + `"}`, errors: []string{`["body","expires_at"] datetime_parsing`}},
		"expires before it is due":    {body: `{"expires_at":"2026-11-24T12:30:00Z"}`, errors: []string{`["body","expires_at"] conflict`}},
		"due after it expires": {body: `{"run_at":"2027-12-24T12:30:00Z"}`, stored: func(t *task.Task) { t.ExpiresAt = storedAt.AddDate(1, 0, 0) },
			errors: []string{`["body","expires_at"] conflict`}},
		"delayed until it expires": {body: `{"delay_seconds":61}`, stored: func(t *task.Task) { t.ExpiresAt = storedAt.Add(time.Minute) },
			errors: []string{`["body","expires_at"] conflict`}},
		"expires within its new delay": {body: `{"delay_seconds":61,"expires_at":"` + storedAt.Add(time.Minute).Format(time.RFC3339) + `"}`,
			errors: []string{`["body","expires_at"] conflict`}},
		"a queue without a name": {body: `{"queue":"","flow_key":""}`,
			errors: []string{`["body","queue"] string_pattern_mismatch`, `["body","flow_key"] string_pattern_mismatch`}},
		"no such priority":              {body: `{"priority":"` + marker + `"}`, errors: []string{`["body","priority"] enum`}},
		"no queue's name":               {body: `{"queue":"a b` + marker + `","flow_key":"a b"}`, errors: []string{`["body","queue"] string_pattern_mismatch`, `["body","flow_key"] string_pattern_mismatch`}},
		"a priority of a plain task":    {body: `{"priority":"high"}`, errors: []string{`["body","priority"] conflict`}},
		"a timeout out of range":        {body: `{"timeout_seconds":1801}`, errors: []string{`["body","timeout_seconds"] less_than_equal`}},
		"backoffs in the wrong order":   {body: `{"retry":{"min_backoff_seconds":5000}}`, errors: []string{`["body","retry","max_backoff_seconds"] out_of_range`}},
		"for how long and how often":    {body: `{"retry":{"for":"2h","max_attempts":9}}`, errors: []string{`["body","retry","max_attempts"] conflict`}},
		"for longer than attempts last": {body: `{"retry":{"for":"2h","max_backoff_seconds":2}}`, errors: []string{`["body","retry","for"] out_of_range`}},
		"fewer attempts than were made": {body: `{"retry":{"max_attempts":3}}`, stored: func(t *task.Task) { t.AttemptCount = 3 },
			errors: []string{`["body","retry","max_attempts"] out_of_range`}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newService(t, func(o *settings) {
				o.Secrets = fakeSecrets(func(string, string) error { return errors.New("is not for this target") })
			})
			s.store.get = func(context.Context, task.ID) (*task.Task, error) {
				tk := stored()
				if tt.stored != nil {
					tt.stored(tk)
				}
				return tk, nil
			}
			s.store.change = func(*task.Task) (*task.Task, error) {
				t.Error("it is written")
				return nil, task.ErrChanged
			}
			s.refused(s.do(http.MethodPatch, taskPath, tt.body), http.StatusUnprocessableEntity, tt.errors...)
		})
	}
	s := newService(t)
	s.refused(s.do(http.MethodPatch, taskPath, ""), http.StatusBadRequest)
	s.refused(s.do(http.MethodPatch, taskPath, "{"), http.StatusBadRequest)
	s.refused(s.do(http.MethodPatch, taskPath, "{}", "Content-Type", "text/plain"), http.StatusUnsupportedMediaType)
	s.refused(s.do(http.MethodPatch, taskPath, "{}"), http.StatusNotFound)
}

// Two editors, a dispatcher, and who is told what.
func TestChangeAmongOthers(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		match  string
		reads  []func(*task.Task) // what the task is like each time it is read
		writes []error
		status int
	}{
		"nobody else":                             {reads: []func(*task.Task){as(task.Pending)}, writes: []error{nil}, status: 200},
		"another editor, long before":             {match: `"2-pending-0"`, reads: []func(*task.Task){as(task.Pending)}, status: 412},
		"another editor at the same moment":       {match: "", reads: []func(*task.Task){as(task.Pending), as(task.Pending)}, writes: []error{task.ErrChanged, nil}, status: 200},
		"another editor of whom to beware":        {match: `"3-pending-0"`, reads: []func(*task.Task){as(task.Pending), func(t *task.Task) { t.LastClaim++ }}, writes: []error{task.ErrChanged}, status: 412},
		"any version, and one at the same moment": {match: "*", reads: []func(*task.Task){as(task.Pending), func(t *task.Task) { t.LastClaim++ }}, writes: []error{task.ErrChanged, nil}, status: 200},
		"others all the time": {reads: []func(*task.Task){as(task.Pending), as(task.Pending), as(task.Pending)},
			writes: []error{task.ErrChanged, task.ErrChanged, task.ErrChanged}, status: 409},
		"a dispatcher":                    {reads: []func(*task.Task){as(task.Pending), as(task.Running)}, writes: []error{task.ErrChanged}, status: 409},
		"a dispatcher, long before":       {reads: []func(*task.Task){as(task.Running)}, status: 409},
		"it has ended":                    {reads: []func(*task.Task){as(task.Failed)}, status: 409},
		"it is being cancelled":           {reads: []func(*task.Task){func(t *task.Task) { t.CancelRequestedAt = storedAt }}, status: 409},
		"it has ended, and was not known": {match: `"3-pending-0"`, reads: []func(*task.Task){as(task.Failed)}, status: 412},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newService(t)
			var read, written int
			s.store.get = func(context.Context, task.ID) (*task.Task, error) {
				read++
				return stored(tt.reads[read-1]), nil
			}
			s.store.change = func(t *task.Task) (*task.Task, error) {
				written++
				return t, tt.writes[written-1]
			}
			var header []string
			if tt.match != "" {
				header = []string{"If-Match", tt.match}
			}
			a := s.do(http.MethodPatch, taskPath, `{"timeout_seconds":1}`, header...)
			if a.status != tt.status || read != len(tt.reads) || written != len(tt.writes) {
				t.Errorf("got %d after %d reads and %d writes, want %d after %d and %d: %s", a.status, read, written, tt.status, len(tt.reads), len(tt.writes), a.text)
			}
		})
	}
}

// someIDs returns n ids, the newest first.
func someIDs(n int) []task.ID {
	ids := make([]task.ID, n)
	for i := range ids {
		ids[i] = task.NewID(storedAt.Add(-time.Duration(i)*time.Second), 0)
	}
	return ids
}

func TestBulk(t *testing.T) {
	t.Parallel()
	const many = 1001
	for name, tt := range map[string]struct {
		path, body string
		matched    int
		filter     task.Filter
		steps      []string
		changed    int
	}{
		"a dry run unless said otherwise": {path: "/tasks/cancel", body: `{"filter":{"host":"example.com"}}`, matched: many,
			filter: task.Filter{Host: "example.com", States: []task.State{task.Pending, task.Running}}},
		"a dry run": {path: "/tasks/redrive", body: `{"filter":{"labels":{"kind":"play"}},"dry_run":true}`, matched: many,
			filter: task.Filter{Labels: map[string]string{"kind": "play"}, States: []task.State{task.Failed, task.Cancelled}}},
		"cancel": {path: "/tasks/cancel", body: `{"filter":{"state":["pending"]},"dry_run":false}`, matched: many,
			filter: task.Filter{States: []task.State{task.Pending}}, steps: []string{"250", "250", "250", "250", "1"}, changed: many - 5},
		"redrive": {path: "/tasks/redrive", body: `{"filter":{"state":["failed"],"reason":["expired"]},"dry_run":false}`, matched: 2,
			filter: task.Filter{States: []task.State{task.Failed}, Reasons: []task.Reason{task.Expired}}, steps: []string{"2 from 0s, 0s apart"}, changed: 1},
		"redrive, spread": {path: "/tasks/redrive", body: `{"filter":{"min_attempts":3},"dry_run":false,"spread_seconds":1001}`, matched: many,
			filter: task.Filter{MinAttempts: 3, States: []task.State{task.Failed, task.Cancelled}},
			steps:  []string{"250 from 0s, 1s apart", "250 from 4m10s, 1s apart", "250 from 8m20s, 1s apart", "250 from 12m30s, 1s apart", "1 from 16m40s, 1s apart"}, changed: many - 5},
		"nothing matches": {path: "/tasks/redrive", body: `{"filter":{"min_attempts":3},"dry_run":false,"spread_seconds":1}`,
			filter: task.Filter{MinAttempts: 3, States: []task.State{task.Failed, task.Cancelled}}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newService(t)
			ids := someIDs(tt.matched)
			s.store.match = func(f *task.Filter, limit int) ([]task.ID, error) {
				if diff := cmp.Diff(&tt.filter, f); diff != "" || limit != 10_000 {
					t.Errorf("searched for %d (-want +got):\n%s", limit, diff)
				}
				return slices.Clone(ids), nil
			}
			var steps []string
			var acted []task.ID
			running := map[task.ID]int64{{1}: 2}
			s.store.cancelMany = func(ids []task.ID) (int, map[task.ID]int64, error) {
				steps, acted = append(steps, fmt.Sprint(len(ids))), append(acted, ids...)
				return len(ids) - 1, running, nil
			}
			s.store.redriveMany = func(ids []task.ID, wait, apart time.Duration) (int, error) {
				steps, acted = append(steps, fmt.Sprintf("%d from %v, %v apart", len(ids), wait, apart)), append(acted, ids...)
				return len(ids) - 1, nil
			}
			a := s.post(tt.path, tt.body, "X-Test-Caller", "plays@melodia.app")
			if a.status != http.StatusOK || a.at("matched") != float64(tt.matched) || a.at("changed") != float64(tt.changed) || a.at("dry_run") != (tt.steps == nil && tt.matched > 0) {
				t.Errorf("got %d %s", a.status, a.text)
			}
			if diff := cmp.Diff(tt.steps, steps); diff != "" {
				t.Errorf("steps (-want +got):\n%s", diff)
			}
			for i, id := range acted { // the oldest first
				if id != ids[len(ids)-1-i] {
					t.Fatalf("task %d is %s, want %s", i, id, ids[len(ids)-1-i])
				}
			}
			if sample, _ := a.at("sample").([]any); len(sample) != min(tt.matched, 10) || tt.matched > 0 && sample[0] != ids[tt.matched-1].String() {
				t.Errorf("the sample is %v", sample)
			}
			if a.at("dry_run") == false {
				s.loggedAct("tasks "+map[string]string{"/tasks/cancel": "cancelled", "/tasks/redrive": "redriven"}[tt.path], fmt.Sprintf(`"count":%d,"matched":%d`, tt.changed, tt.matched))
			} else if log := s.log.String(); strings.Contains(log, "INFO") {
				t.Errorf("a dry run is logged as an act: %s", log)
			}
			if cutOff := len(s.dispatcher.cut) > 0; cutOff != (tt.path == "/tasks/cancel" && tt.steps != nil) {
				t.Errorf("calls are cut off: %v", s.dispatcher.cut)
			}
			if woke := s.dispatcher.woke > 0; woke != (tt.path == "/tasks/redrive" && tt.steps != nil) {
				t.Errorf("woken %d times", s.dispatcher.woke)
			}
		})
	}
}

// Whoever just presses Execute in Swagger UI has nothing done.
func TestFirstExampleOfBulkIsADryRun(t *testing.T) {
	t.Parallel()
	s := newService(t)
	for _, path := range []string{"/tasks/cancel", "/tasks/redrive"} {
		examples := s.document.Paths[path].Post.RequestBody.Content["application/json"].Examples
		first := slices.Min(slices.Collect(maps.Keys(examples)))
		if body := fmt.Sprintf("%s", examples[first].Value); len(examples) < 2 || strings.Contains(body, "dry_run") {
			t.Errorf("POST %s: the first of %d examples is %s", path, len(examples), body)
		}
	}
}

func TestBulkThatBreaksRules(t *testing.T) {
	t.Parallel()
	s := newService(t)
	for body, want := range map[string][]string{
		`{}`:                            {`["body","filter"] missing`},
		`{"filter":{},"dry_run":false}`: {`["body","filter"] missing`},
		`{"filter":{"state":[]},"dry_run":false}`:                  {`["body","filter"] missing`},
		`{"filter":{"labels":{}}}`:                                 {`["body","filter"] missing`},
		`{"filter":{"hosts":"` + marker + `"}}`:                    {`["body","filter","hosts"] extra_forbidden`},
		`{"filter":{"host":"` + marker + `/"}}`:                    {`["body","filter","host"] invalid`},
		`{"filter":{"state":["succeeded"]}}`:                       {`["body","filter","state"] conflict`},
		`{"filter":{"created_after":"` + marker + `"}}`:            {`["body","filter","created_after"] datetime_parsing`},
		`{"filter":{"min_attempts":1},"dry_run":"` + marker + `"}`: {`["body","dry_run"] bool_type`},
		`{"filter":{"min_attempts":1},"state":"` + marker + `"}`:   {`["body","state"] extra_forbidden`},
		`{"filter":{"min_attempts":1000}}`:                         {`["body","filter","min_attempts"] less_than_equal`},
	} {
		s.refused(s.post("/tasks/cancel", body), http.StatusUnprocessableEntity, want...)
		s.refused(s.post("/tasks/redrive", body), http.StatusUnprocessableEntity, want...)
	}
	s.refused(s.post("/tasks/cancel", `{"filter":{"state":["failed"]}}`), http.StatusUnprocessableEntity, `["body","filter","state"] conflict`)
	s.refused(s.post("/tasks/redrive", `{"filter":{"state":["pending"]}}`), http.StatusUnprocessableEntity, `["body","filter","state"] conflict`)
	s.refused(s.post("/tasks/cancel", `{"filter":{"min_attempts":1},"spread_seconds":1}`), http.StatusUnprocessableEntity, `["body","spread_seconds"] extra_forbidden`)
	s.refused(s.post("/tasks/redrive", `{"filter":{"min_attempts":1},"spread_seconds":86401}`), http.StatusUnprocessableEntity, `["body","spread_seconds"] less_than_equal`)
	s.refused(s.post("/tasks/redrive", `[`), http.StatusBadRequest)
	// null is as if the field were left out, wherever it stands.
	left := `{"filter":{"host":"example.com","min_attempts":null,"state":null,"labels":null},"dry_run":null,"spread_seconds":null}`
	if a := s.post("/tasks/redrive", left); a.status != http.StatusOK || a.at("dry_run") != true {
		t.Errorf("null for what may be left out: got %d %s, want a dry run", a.status, a.text)
	}
}

// Between two steps it is seen that nobody waits for the answer any more, or
// that the database has gone away; what was done is in the log.
func TestBulkThatStops(t *testing.T) {
	t.Parallel()
	for name, stop := range map[string]func(hangUp func()) error{
		"the caller hangs up":        func(hangUp func()) error { hangUp(); return nil },
		"the database has gone away": func(func()) error { return errors.Join(task.ErrUnavailable) },
		"others have its turn":       func(func()) error { return errors.Join(task.ErrOverloaded) },
	} {
		s := newService(t)
		s.store.match = func(*task.Filter, int) ([]task.ID, error) { return someIDs(1000), nil }
		ctx, hangUp := context.WithCancel(t.Context())
		steps := 0
		s.store.cancelMany = func(ids []task.ID) (int, map[task.ID]int64, error) {
			if steps++; steps == 2 {
				return 7, nil, stop(hangUp)
			}
			return len(ids), nil, nil
		}
		request, err := http.NewRequestWithContext(ctx, http.MethodPost, "/tasks/cancel", strings.NewReader(`{"filter":{"min_attempts":1},"dry_run":false}`))
		if err != nil {
			t.Fatal(err)
		}
		a := s.serve(request)
		if a.status != http.StatusServiceUnavailable || steps != 2 || !strings.Contains(s.log.String(), `"count":257`) {
			t.Errorf("%s: got %d after %d steps: %s", name, a.status, steps, s.log)
		}
		if strings.Contains(a.detail(), "Nothing was") {
			t.Errorf("%s: 257 were changed, and the answer is %q", name, a.detail())
		}
		hangUp()
	}
}

func TestOneBulkAtATime(t *testing.T) {
	t.Parallel()
	s := newService(t)
	entered, release := make(chan struct{}), make(chan struct{})
	s.store.match = func(f *task.Filter, _ int) ([]task.ID, error) {
		if f.MinAttempts == 1 {
			close(entered)
			<-release
		}
		return nil, nil
	}
	first := make(chan int)
	go func() { first <- s.post("/tasks/cancel", `{"filter":{"min_attempts":1}}`).status }()
	<-entered
	if a := s.post("/tasks/redrive", `{"filter":{"min_attempts":2}}`); a.status != http.StatusTooManyRequests || a.header.Get("Retry-After") == "" {
		t.Errorf("got %d beside another one: %s", a.status, a.text)
	}
	close(release)
	if status := <-first; status != http.StatusOK {
		t.Errorf("the first got %d", status)
	}
	if a := s.post("/tasks/redrive", `{"filter":{"min_attempts":2}}`); a.status != http.StatusOK {
		t.Errorf("got %d afterwards: %s", a.status, a.text)
	}
}
