package httpapi

import (
	"bytes"
	"encoding/json"
	"math"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/melodia/orchestrator/internal/task"
)

// FuzzBody sends any bytes to the endpoints that take a body.
func FuzzBody(f *testing.F) {
	for path := range submissions {
		path := byte(path)
		for _, body := range []string{
			``, `{}`, `[]`, `null`, `"x"`, `5`, `{"url":`, `{"url":"` + target + `"}`, `{"task_id":"` + storedID + `"}`, `{"task_id":null,"url":5}`,
			`{"url":"` + target + `","delay_seconds":1}`, `{"url":"` + target + `","run_at":"2030-12-24T21:00:00","time_zone":"Europe/Berlin"}`,
			`{"url":"` + target + `","run_at":"2001-01-01T00:00:00.5-03:00","expires_at":"2030-01-01T00:00:00Z"}`,
			`{"url":"` + target + `","method":"PUT","headers":{"X-A":"b","a.b[0]":"c"},"payload":{ "a":1e5 },"timeout_seconds":1.5e0,"labels":{"k.":"v"}}`,
			`{"url":"` + target + `","retry":{"max_attempts":5.0,"max_retry_duration_seconds":0,"min_backoff_seconds":0.01,"max_backoff_seconds":86400,"max_doublings":3e1,"retry_client_errors":true}}`,
			`{"url":"` + target + `","body":"\u0000\ud83d\ude00"}`, `{"url":"` + target + `","body":"\ud83d"}`, `{"url":"` + target + `","payload":1e400}`,
			`{"url":"` + target + `","url":"x"}`, `{"URL":"` + target + `"}`, `{"a.b":1,"[":2,"":3,"":4}`, "{\"\ue000\":1,\".\":{}}", `{"labels":{"a.b":"","a` + "\ue000" + `b":5},"url":"` + target + `"}`,
			strings.Repeat("[", 10001), `{"url":"` + target + `"} x`, "\xff", "\xef\xbb\xbf{}", `{"url":"\u0000"}`, `{"url":"https://[::1%25a]/"}`, `{"url":"http://a:0/"}`,
		} {
			f.Add(path, []byte(body))
		}
	}
	s := newService(f)
	f.Fuzz(func(t *testing.T, path byte, body []byte) {
		s.on(t).submit(submissions[int(path)%len(submissions)], body)
	})
}

// isLegal fails where the document has something against a body that was accepted. Of
// what it has nothing to say, nulls for what is left out, and the payload, is looked at.
func (s *service) isLegal(path string, body []byte) {
	s.t.Helper()
	var members map[string]json.RawMessage
	if err := json.Unmarshal(body, &members); err != nil {
		s.t.Errorf("accepted, and it is no object: %v", err)
		return
	}
	delete(members, "payload")
	tree := make(map[string]any)
	for name, text := range members {
		var member any
		if err := json.Unmarshal(text, &member); err != nil {
			s.t.Errorf("accepted, and %s does not decode: %v", name, err)
		}
		tree[name] = member
	}
	schema := "TaskRequest"
	if path == "/schedule" {
		schema = "ScheduleRequest"
	}
	if mistakes := s.schema.validate(map[string]any{"$ref": "#/components/schemas/" + schema}, withoutNulls(tree), ""); len(mistakes) > 0 {
		s.t.Errorf("accepted, and the document says %v", mistakes)
	}
}

// withoutNulls drops the members that are null, but for headers and labels.
func withoutNulls(object map[string]any) map[string]any {
	for name, member := range object {
		switch member := member.(type) {
		case nil:
			delete(object, name)
		case map[string]any:
			if name != "headers" && name != "labels" {
				withoutNulls(member)
			}
		}
	}
	return object
}

// submit sends a body that may be anything and checks what must always hold.
func (s *service) submit(path string, body []byte) *answer {
	s.t.Helper()
	r := httptest.NewRequestWithContext(s.t.Context(), http.MethodPost, path, bytes.NewReader(body))
	r.Header.Set("Content-Type", "application/json")
	a := s.serve(r) // holds the answer against the document
	stored := s.store.taken()
	ran, calls := s.dispatcher.taken()
	if a.status >= 400 {
		if a.status >= 500 {
			s.t.Errorf("got status %d: %s", a.status, clipped(a.text))
		}
		if len(stored)+len(calls)+len(ran) > 0 {
			s.t.Errorf("%d, and yet %d tasks were stored, %d calls made, %d ran", a.status, len(stored), len(calls), len(ran))
		}
		return a
	}
	var sent struct {
		URL     string          `json:"url"`
		Payload json.RawMessage `json:"payload"`
		TaskID  *string         `json:"task_id"`
	}
	// The standard library reads what is right in the same way.
	if err := json.Unmarshal(body, &sent); err != nil {
		s.t.Fatalf("%d for what is not JSON: %v", a.status, err)
	}
	var got *task.Task
	switch {
	case a.status == http.StatusAccepted && path != "/worker-endpoint" && len(stored) == 1 && len(calls)+len(ran) == 0:
		got = stored[0]
		s.isLegal(path, body)
	case a.status == http.StatusOK && path == "/worker-endpoint" && len(calls) == 1 && len(stored)+len(ran) == 0:
		got = calls[0]
		if got.Retry.MaxAttempts != 1 {
			s.t.Errorf("a task in the request has %d attempts, want 1", got.Retry.MaxAttempts)
		}
	case a.status == http.StatusOK && path == "/worker-endpoint" && len(ran) == 1 && len(stored)+len(calls) == 0:
		if sent.TaskID == nil || !strings.EqualFold(*sent.TaskID, ran[0].String()) {
			s.t.Errorf("ran %s, which was not asked for", ran[0])
		}
		return a
	default:
		s.t.Fatalf("%d with %d tasks stored, %d calls made, %d ran", a.status, len(stored), len(calls), len(ran))
	}
	now := time.Now()
	if now.Before(storedAt) {
		now = storedAt // what a delay was added to
	}
	if _, err := task.New(got.ID, got.Spec, task.When{At: got.RunAt}, now); err != nil && !got.ExpiresAt.Before(got.RunAt) {
		s.t.Errorf("%d for a task that breaks the domain's rules: %v", a.status, err)
	}
	if got.URL != sent.URL {
		s.t.Errorf("got url %q, want %q", got.URL, sent.URL)
	}
	if payload := string(sent.Payload); payload != "" && payload != "null" && (string(got.Body) != payload || got.ContentType != "application/json") {
		s.t.Errorf("got body %q as %q, want %q as application/json", got.Body, got.ContentType, payload)
	}
	return a
}

// FuzzFields changes the fields of a request that is right.
func FuzzFields(f *testing.F) {
	type seed struct {
		path, fields, wrong                              uint32
		url, method, header, headerValue, text, payload  string
		label, labelValue, runAt, zone, expiresAt        string
		timeout, delay, duration, minBackoff, maxBackoff float64
		attempts, doublings                              float64
	}
	right := seed{
		url: target, method: "PUT", header: "X-A", headerValue: "b", text: "text", payload: `{"a": [1, 2.50]}`, label: "k", labelValue: "v",
		runAt: "2030-12-24T21:00:00", zone: "Europe/Berlin", expiresAt: "2031-01-01T00:00:00Z",
		timeout: 5, delay: 60, duration: 3600, minBackoff: 1, maxBackoff: 60, attempts: 5, doublings: 3,
	}
	add := func(change func(*seed)) {
		v := right
		change(&v)
		f.Add(v.path, v.fields, v.wrong, v.url, v.method, v.header, v.headerValue, v.text, v.payload, v.label, v.labelValue, v.runAt, v.zone, v.expiresAt,
			v.timeout, v.delay, v.duration, v.minBackoff, v.maxBackoff, v.attempts, v.doublings)
	}
	for path := range uint32(3) {
		for field := range uint32(19) {
			add(func(v *seed) { v.path, v.fields = path, 1<<field })
			add(func(v *seed) { v.path, v.fields, v.wrong = path, 1<<field, 1<<field })
		}
		add(func(v *seed) { v.path, v.fields = path, math.MaxUint32 })
		add(func(v *seed) { v.path, v.fields, v.method = path, math.MaxUint32, "GET" })
		add(func(v *seed) { v.path, v.fields, v.header, v.label = path, math.MaxUint32, "a.b[0]", "[.]" })
		add(func(v *seed) {
			v.path, v.fields, v.timeout, v.attempts, v.delay = path, math.MaxUint32, 0.1, 5.5, 315360000
		})
		add(func(v *seed) {
			v.path, v.fields, v.runAt, v.zone = path, 1<<7|1<<8, "2030-03-31T02:30:00", "Europe/Berlin"
		})
		add(func(v *seed) { v.path, v.fields, v.runAt = path, 1<<7, "0000-01-01T00:00:00+14:00" })
		add(func(v *seed) { v.path, v.fields, v.minBackoff, v.maxBackoff = path, math.MaxUint32, 86400, 0.01 })
	}
	s := newService(f)
	f.Fuzz(func(t *testing.T, path, fields, wrong uint32, url, method, header, headerValue, text, payload, label, labelValue, runAt, zone, expiresAt string,
		timeout, delay, duration, minBackoff, maxBackoff, attempts, doublings float64,
	) {
		body := map[string]any{}
		retry := map[string]any{}
		// A field is left out, or has its value, or a wrong one that holds the marker.
		set := func(in map[string]any, bit int, name string, value any) {
			if f, ok := value.(float64); ok && (math.IsNaN(f) || math.IsInf(f, 0)) || fields&(1<<bit) == 0 {
				return
			}
			if wrong&(1<<bit) != 0 {
				value = []any{marker, value}
			}
			in[name] = value
		}
		raw := func(s string) any {
			if !json.Valid([]byte(s)) {
				return s
			}
			return json.RawMessage(s)
		}
		body["url"] = url
		set(body, 0, "method", method)
		set(body, 1, "headers", map[string]any{header: headerValue})
		set(body, 2, "payload", raw(payload))
		set(body, 3, "body", text)
		set(body, 4, "timeout_seconds", timeout)
		set(body, 5, "labels", map[string]any{label: labelValue})
		set(body, 6, "expires_at", expiresAt)
		set(body, 7, "run_at", runAt)
		set(body, 8, "time_zone", zone)
		set(body, 9, "delay_seconds", delay)
		set(retry, 10, "max_attempts", attempts)
		set(retry, 11, "max_retry_duration_seconds", duration)
		set(retry, 12, "min_backoff_seconds", minBackoff)
		set(retry, 13, "max_backoff_seconds", maxBackoff)
		set(retry, 14, "max_doublings", doublings)
		set(retry, 15, "retry_client_errors", fields&(1<<16) != 0)
		set(body, 17, "on_success", map[string]any{"url": url, "headers": map[string]any{header: headerValue}})
		set(body, 18, "on_failure", map[string]any{"url": url})
		if len(retry) > 0 {
			body["retry"] = retry
		}
		var b bytes.Buffer
		e := json.NewEncoder(&b)
		e.SetEscapeHTML(false)
		if err := e.Encode(body); err != nil {
			t.Fatal(err)
		}
		a := s.on(t).submit(submissions[path%uint32(len(submissions))], b.Bytes())
		if a.status >= 400 && strings.Contains(a.text, marker) && !strings.Contains(header+label, marker) {
			t.Errorf("a value that was sent comes back: %s", clipped(a.text))
		}
	})
}
