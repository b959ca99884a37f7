package httpapi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/melodia/orchestrator/internal/task"
)

// with is a request that is right but for one member.
func with(name, value string) string {
	return fmt.Sprintf(`{"url":%q,%q:%s}`, target, name, value)
}

func withRetry(name, value string) string {
	return with("retry", fmt.Sprintf(`{%q:%s}`, name, value))
}

// only returns the one task that was stored.
func (s *service) only(a *answer) *task.Task {
	s.t.Helper()
	if a.status != http.StatusAccepted {
		s.t.Fatalf("got status %d, want 202: %s", a.status, clipped(a.text))
	}
	tasks := s.store.taken()
	if len(tasks) != 1 {
		s.t.Fatalf("%d tasks are stored, want 1", len(tasks))
	}
	if got, want := a.header.Get("Location"), "/tasks/"+tasks[0].ID.String(); got != want {
		s.t.Errorf("got Location %q, want %q", got, want)
	}
	if got, want := a.at("id"), any(tasks[0].ID.String()); got != want {
		s.t.Errorf("got id %v, want %v", got, want)
	}
	return tasks[0]
}

func TestEnqueueDefaults(t *testing.T) {
	t.Parallel()
	s := newService(t)
	a := s.post("/enqueue", `{"url":"`+target+`"}`)
	got := s.only(a)
	want := &task.Task{
		ID:    got.ID,
		State: task.Pending,
		Spec: task.Spec{
			URL: target, Method: "POST", Timeout: 30 * time.Second,
			Retry: task.RetryPolicy{MaxAttempts: 14, MinBackoff: time.Second, MaxBackoff: time.Hour, MaxDoublings: 16},
		},
		RunAt: storedAt, CreatedAt: storedAt,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("stored task (-want +got):\n%s", diff)
	}
	wantText := `{"id":"` + got.ID.String() + `","state":"pending","url":"https://example.com/plays","method":"POST",` +
		`"headers":{},"auth":null,"labels":{},"run_at":"2026-11-24T12:00:00.123456Z","created_at":"2026-11-24T12:00:00.123456Z",` +
		`"expires_at":null,"timeout_seconds":30,"retry":{"max_attempts":14,"max_retry_duration_seconds":0,` +
		`"min_backoff_seconds":1,"max_backoff_seconds":3600,"max_doublings":16,"retry_client_errors":false},` +
		`"attempt_count":0,"finished_at":null,"reason":null,"cancel_requested_at":null,"on_success":null,"on_failure":null,"created_by":null,"payload_bytes":0,"content_type":null,"parent_id":null,"root_id":null,"queue":null,"flow_key":null,"priority":null,"attempts":[]}`
	if strings.TrimSpace(a.text) != wantText {
		t.Errorf("got  %s\nwant %s", a.text, wantText)
	}
	if got := a.header.Get("Content-Type"); got != "application/json" {
		t.Errorf("got Content-Type %q, want application/json", got)
	}
}

// The settings' values stand in for what a request leaves out, and the
// document says so.
func TestEnqueueDefaultsOfSettings(t *testing.T) {
	t.Parallel()
	defaults := task.Spec{Timeout: 7500 * time.Millisecond, Retry: task.RetryPolicy{
		MaxAttempts: 3, MaxRetryDuration: 90 * time.Second, MinBackoff: 20 * time.Millisecond,
		MaxBackoff: time.Minute, MaxDoublings: 2, RetryClientErrors: true,
	}}
	s := newService(t, func(o *settings) { o.Defaults = defaults })
	for _, path := range []string{"/enqueue", "/schedule"} {
		got := s.only(s.post(path, strings.Replace(with("delay_seconds", "0"), `,"delay_seconds":0`, map[string]string{"/schedule": `,"delay_seconds":0`}[path], 1)))
		if got.Timeout != defaults.Timeout || got.Retry != defaults.Retry {
			t.Errorf("%s: got %v %+v, want %v %+v", path, got.Timeout, got.Retry, defaults.Timeout, defaults.Retry)
		}
	}
	s.post("/worker-endpoint", with("method", `"PUT"`))
	if _, once := s.dispatcher.taken(); len(once) != 1 || once[0].Timeout != defaults.Timeout {
		t.Errorf("/worker-endpoint: got %+v, want one call with timeout %v", once, defaults.Timeout)
	}
	// One member of retry leaves the others alone.
	want := defaults.Retry
	want.MaxDoublings = 0
	if got := s.only(s.post("/enqueue", withRetry("max_doublings", "0"))).Retry; got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	for property, want := range map[string]any{
		"TaskRequest/timeout_seconds": 7.5, "ScheduleRequest/timeout_seconds": 7.5,
		"TaskRequest/method": "POST", "ScheduleRequest/method": "POST",
		"RetryRequest/max_attempts": 3.0, "RetryRequest/max_retry_duration_seconds": 90.0,
		"RetryRequest/min_backoff_seconds": 0.02, "RetryRequest/max_backoff_seconds": 60.0,
		"RetryRequest/max_doublings": 2.0, "RetryRequest/retry_client_errors": true,
	} {
		schema, name, _ := strings.Cut(property, "/")
		p := member(s.schema.root, "components", "schemas", schema, "properties", name)
		if got, want := p["description"].(string), fmt.Sprintf(" Default: %v.", want); !strings.HasSuffix(got, want) {
			t.Errorf("the description of %s is %q, want it to end with %q", property, got, want)
		}
		if p["default"] != nil {
			t.Errorf("%s has the keyword default, which makes some generated clients demand it", property)
		}
	}
}

// Everything at once, and what is shown of it.
func TestEnqueueEveryField(t *testing.T) {
	t.Parallel()
	s := newService(t)
	a := s.post("/enqueue", `{
		"url": "http://example.com:8080/a?b=c", "method": "PUT",
		"headers": {"X-Tenant": "melodia", "authorization": "Bearer x", "Cookie": "a=b", "X-Api-Key": "k", "Content-Type": "application/vnd.x+json"},
		"payload": {"song_id": 42},
		"timeout_seconds": 2.5,
		"retry": {"max_attempts": 5, "max_retry_duration_seconds": 86400.5, "min_backoff_seconds": 0.29, "max_backoff_seconds": 600, "max_doublings": 8, "retry_client_errors": true},
		"labels": {"kind": "play", "": "x", "a.b[0]": "" },
		"expires_at": "2030-12-31T23:59:59.1234567-03:00"
	}`)
	s.refused(a, http.StatusUnprocessableEntity, `["body","labels"] invalid`)

	a = s.post("/enqueue", `{
		"url": "http://example.com:8080/a?b=c", "method": "PUT",
		"headers": {"X-Tenant": "melodia", "authorization": "Bearer x", "Cookie": "a=b", "X-Api-Key": "k", "Content-Type": "application/vnd.x+json"},
		"payload": {"song_id": 42},
		"timeout_seconds": 2.5,
		"retry": {"max_attempts": 5, "max_retry_duration_seconds": 86400.5, "min_backoff_seconds": 0.29, "max_backoff_seconds": 600, "max_doublings": 8, "retry_client_errors": true},
		"labels": {"kind": "play", "a.b[0]": "" },
		"queue": "mail", "flow_key": "tenant/42", "priority": "low",
		"expires_at": "2030-12-31T23:59:59.1234567-03:00"
	}`)
	got := s.only(a)
	want := task.Spec{
		URL: "http://example.com:8080/a?b=c", Method: "PUT",
		Headers: map[string]string{"X-Tenant": "melodia", "authorization": "Bearer x", "Cookie": "a=b", "X-Api-Key": "k", "Content-Type": "application/vnd.x+json"},
		Body:    []byte(`{"song_id": 42}`), ContentType: "application/json",
		Timeout: 2500 * time.Millisecond,
		Retry: task.RetryPolicy{
			MaxAttempts: 5, MaxRetryDuration: 86400*time.Second + 500*time.Millisecond, MinBackoff: 290 * time.Millisecond,
			MaxBackoff: 10 * time.Minute, MaxDoublings: 8, RetryClientErrors: true,
		},
		Labels:    map[string]string{"kind": "play", "a.b[0]": ""},
		ExpiresAt: time.Date(2031, 1, 1, 2, 59, 59, 123456700, time.UTC),
		Queue:     "mail", FlowKey: "tenant/42", Priority: task.Low,
	}
	if diff := cmp.Diff(want, got.Spec); diff != "" {
		t.Errorf("stored (-want +got):\n%s", diff)
	}
	shown := map[string]any{
		"headers": map[string]any{"X-Tenant": "melodia", "authorization": "[redacted]", "Cookie": "[redacted]", "X-Api-Key": "[redacted]", "Content-Type": "application/vnd.x+json"},
		"labels":  map[string]any{"kind": "play", "a.b[0]": ""}, "expires_at": "2031-01-01T02:59:59.123456Z", "timeout_seconds": 2.5,
		"queue": "mail", "flow_key": "tenant/42", "priority": "low",
		"retry": map[string]any{
			"max_attempts": 5.0, "max_retry_duration_seconds": 86400.5, "min_backoff_seconds": 0.29,
			"max_backoff_seconds": 600.0, "max_doublings": 8.0, "retry_client_errors": true,
		},
	}
	for name, want := range shown {
		if diff := cmp.Diff(want, a.at(name)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
	if a.at("payload") != nil || a.at("body") != nil {
		t.Errorf("the answer shows the body: %s", a.text)
	}
}

// Both edges of every limit: what is right, and what it comes to.
func TestEnqueueAccepts(t *testing.T) {
	t.Parallel()
	longURL := "https://example.com/" + strings.Repeat("a", task.MaxURLBytes-len("https://example.com/"))
	tests := []struct {
		name, body string
		got        func(*task.Task) any
		want       any
	}{
		{"longest url", `{"url":"` + longURL + `"}`, func(t *task.Task) any { return t.URL }, longURL},
		{"GET", with("method", `"GET"`), func(t *task.Task) any { return t.Method }, "GET"},
		{"HEAD", with("method", `"HEAD"`), func(t *task.Task) any { return t.Method }, "HEAD"},
		{"POST", with("method", `"POST"`), func(t *task.Task) any { return t.Method }, "POST"},
		{"PUT", with("method", `"PUT"`), func(t *task.Task) any { return t.Method }, "PUT"},
		{"PATCH", with("method", `"PATCH"`), func(t *task.Task) any { return t.Method }, "PATCH"},
		{"DELETE", with("method", `"DELETE"`), func(t *task.Task) any { return t.Method }, "DELETE"},
		{"most headers", with("headers", object(task.MaxHeaders, "X-", `"v"`)), func(t *task.Task) any { return len(t.Headers) }, task.MaxHeaders},
		{"most header bytes", with("headers", `{"X":"`+strings.Repeat("a", task.MaxHeaderBytes-1)+`"}`), func(t *task.Task) any { return len(t.Headers["X"]) }, task.MaxHeaderBytes - 1},
		{"empty header value", with("headers", `{"X":""}`), func(t *task.Task) any { return t.Headers }, map[string]string{"X": ""}},
		{"header with dots", with("headers", `{"x.y.z":"v"}`), func(t *task.Task) any { return t.Headers }, map[string]string{"x.y.z": "v"}},
		{"no headers", with("headers", `{}`), func(t *task.Task) any { return len(t.Headers) }, 0},
		{"shortest timeout", with("timeout_seconds", "0.1"), func(t *task.Task) any { return t.Timeout }, task.MinTimeout},
		{"longest timeout", with("timeout_seconds", "1800"), func(t *task.Task) any { return t.Timeout }, task.MaxTimeout},
		{"timeout is rounded", with("timeout_seconds", "1.001"), func(t *task.Task) any { return t.Timeout }, 1001 * time.Millisecond},
		{"timeout with an exponent", with("timeout_seconds", "1.5e1"), func(t *task.Task) any { return t.Timeout }, 15 * time.Second},
		{"fewest attempts", withRetry("max_attempts", "1"), func(t *task.Task) any { return t.Retry.MaxAttempts }, 1},
		{"most attempts", withRetry("max_attempts", "100"), func(t *task.Task) any { return t.Retry.MaxAttempts }, task.MaxAttemptsLimit},
		{"attempts 5.0", withRetry("max_attempts", "5.0"), func(t *task.Task) any { return t.Retry.MaxAttempts }, 5},
		{"attempts 1e0", withRetry("max_attempts", "1e0"), func(t *task.Task) any { return t.Retry.MaxAttempts }, 1},
		{"attempts 0.5E1", withRetry("max_attempts", "0.5E1"), func(t *task.Task) any { return t.Retry.MaxAttempts }, 5},
		{"no retry duration", withRetry("max_retry_duration_seconds", "0"), func(t *task.Task) any { return t.Retry.MaxRetryDuration }, time.Duration(0)},
		{"retry duration -0", withRetry("max_retry_duration_seconds", "-0"), func(t *task.Task) any { return t.Retry.MaxRetryDuration }, time.Duration(0)},
		{"longest retry duration", withRetry("max_retry_duration_seconds", "31536000"), func(t *task.Task) any { return t.Retry.MaxRetryDuration }, task.MaxRetryDurationLimit},
		{"shortest min backoff", withRetry("min_backoff_seconds", "0.01"), func(t *task.Task) any { return t.Retry.MinBackoff }, task.MinBackoffLimit},
		{"longest backoffs", with("retry", `{"min_backoff_seconds":86400,"max_backoff_seconds":86400}`), func(t *task.Task) any { return []any{t.Retry.MinBackoff, t.Retry.MaxBackoff} }, []any{task.MaxBackoffLimit, task.MaxBackoffLimit}},
		{"shortest backoffs", with("retry", `{"min_backoff_seconds":0.01,"max_backoff_seconds":0.01}`), func(t *task.Task) any { return []any{t.Retry.MinBackoff, t.Retry.MaxBackoff} }, []any{task.MinBackoffLimit, task.MinBackoffLimit}},
		{"fewest doublings", withRetry("max_doublings", "0"), func(t *task.Task) any { return t.Retry.MaxDoublings }, 0},
		{"most doublings", withRetry("max_doublings", "30"), func(t *task.Task) any { return t.Retry.MaxDoublings }, task.MaxDoublingsLimit},
		{"doublings -0.0", withRetry("max_doublings", "-0.0"), func(t *task.Task) any { return t.Retry.MaxDoublings }, 0},
		{"client errors", withRetry("retry_client_errors", "true"), func(t *task.Task) any { return t.Retry.RetryClientErrors }, true},
		{"no client errors", withRetry("retry_client_errors", "false"), func(t *task.Task) any { return t.Retry.RetryClientErrors }, false},
		{"retries for six hours", withRetry("for", `"6h"`), func(t *task.Task) any { return t.Retry },
			task.RetryPolicy{MaxAttempts: 100, MaxRetryDuration: 6 * time.Hour, MinBackoff: time.Second, MaxBackoff: 36 * time.Minute, MaxDoublings: 16}},
		{"retries for 36 hours, with backoffs", with("retry", `{"for":"1d12h","min_backoff_seconds":60,"max_backoff_seconds":7200,"retry_client_errors":true}`), func(t *task.Task) any { return t.Retry },
			task.RetryPolicy{MaxAttempts: 100, MaxRetryDuration: 36 * time.Hour, MinBackoff: time.Minute, MaxBackoff: 2 * time.Hour, MaxDoublings: 16, RetryClientErrors: true}},
		{"retries for 30 days", with("retry", `{"for":"30d","max_attempts":null,"max_retry_duration_seconds":null}`), func(t *task.Task) any { return t.Retry.MaxBackoff }, 12 * time.Hour},
		{"empty retry", with("retry", `{}`), func(t *task.Task) any { return t.Retry }, task.DefaultRetryPolicy()},
		{"most labels", with("labels", object(task.MaxLabels, "l", `"v"`)), func(t *task.Task) any { return len(t.Labels) }, task.MaxLabels},
		{"longest label name", with("labels", `{"`+strings.Repeat("n", task.MaxLabelName)+`":"v"}`), func(t *task.Task) any { return len(t.Labels) }, 1},
		{"longest label value", with("labels", `{"n":"`+strings.Repeat("v", task.MaxLabelValue)+`"}`), func(t *task.Task) any { return len(t.Labels["n"]) }, task.MaxLabelValue},
		{"labels that differ by case", with("labels", `{"a":"1","A":"2"}`), func(t *task.Task) any { return t.Labels }, map[string]string{"a": "1", "A": "2"}},
		{"label in many scripts", with("labels", `{"Ünïcødé":"日本 \ud83d\ude00"}`), func(t *task.Task) any { return t.Labels }, map[string]string{"Ünïcødé": "日本 😀"}},
		{"expired long ago", with("expires_at", `"1970-01-01T00:00:00Z"`), func(t *task.Task) any { return t.ExpiresAt.Unix() }, int64(0)},
		{"expires at the last", with("expires_at", `"9998-12-31T23:59:59Z"`), func(t *task.Task) any { return t.ExpiresAt.Year() }, 9998},
		{"expires by another offset", with("expires_at", `"2030-01-01T00:00:00+05:30"`), func(t *task.Task) any { return t.ExpiresAt.UTC().Format(time.RFC3339) }, "2029-12-31T18:30:00Z"},
		{"nulls", `{"url":"` + target + `","method":null,"headers":null,"payload":null,"body":null,"timeout_seconds":null,"retry":null,"labels":null,"expires_at":null}`, func(t *task.Task) any { return t.Spec },
			task.Spec{URL: target, Method: "POST", Timeout: 30 * time.Second, Retry: task.DefaultRetryPolicy()}},
		{"nulls in retry", with("retry", `{"max_attempts":null,"max_retry_duration_seconds":null,"min_backoff_seconds":null,"max_backoff_seconds":null,"max_doublings":null,"retry_client_errors":null}`), func(t *task.Task) any { return t.Retry }, task.DefaultRetryPolicy()},
		{"no body", with("method", `"PUT"`), func(t *task.Task) any { return []any{t.Body, t.ContentType} }, []any{[]byte(nil), ""}},
		{"space around the request", " \r\n\t" + with("method", `"PUT"`) + "\n\n ", func(t *task.Task) any { return t.Method }, "PUT"},
	}
	s := newService(t)
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := s.on(t)
			got := tt.got(s.only(s.post("/enqueue", tt.body)))
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

// What a target receives is what the caller wrote, byte for byte.
func TestEnqueueBodies(t *testing.T) {
	t.Parallel()
	tests := []struct{ name, member, body, contentType string }{
		{"object", `"payload":{"b":1,"a":2}`, `{"b":1,"a":2}`, "application/json"},
		{"odd spacing", "\"payload\": \t{ \"b\" :1 ,\r\n \"a\":[ ] }  ", "{ \"b\" :1 ,\r\n \"a\":[ ] }", "application/json"},
		{"big integer", `"payload":123456789012345678901234567890`, `123456789012345678901234567890`, "application/json"},
		{"long fraction", `"payload":[0.1000000000000000055511151231257827,1E+2,-0]`, `[0.1000000000000000055511151231257827,1E+2,-0]`, "application/json"},
		{"string", `"payload":"text"`, `"text"`, "application/json"},
		{"escapes", `"payload":"\u00e9\/\u0000"`, `"\u00e9\/\u0000"`, "application/json"},
		{"false", `"payload":false`, `false`, "application/json"},
		{"zero", `"payload":0`, `0`, "application/json"},
		{"empty string", `"payload":""`, `""`, "application/json"},
		{"empty object", `"payload":{}`, `{}`, "application/json"},
		{"names that differ by case", `"payload":{"a":1,"A":2,"a.b":3,"a[0]":4,"":5}`, `{"a":1,"A":2,"a.b":3,"a[0]":4,"":5}`, "application/json"},
		{"names of the request", `"payload":{"payload":{"url":null}}`, `{"payload":{"url":null}}`, "application/json"},
		{"deep", `"payload":` + strings.Repeat("[", 9000) + strings.Repeat("]", 9000), strings.Repeat("[", 9000) + strings.Repeat("]", 9000), "application/json"},
		{"null", `"payload":null`, "", ""},
		{"text", `"body":"a line\n"`, "a line\n", "text/plain; charset=utf-8"},
		{"text with NUL", `"body":"a\u0000b"`, "a\x00b", "text/plain; charset=utf-8"},
		{"text in many scripts", `"body":"é\ud83d\ude00"`, "é😀", "text/plain; charset=utf-8"},
		{"empty text", `"body":""`, "", "text/plain; charset=utf-8"},
		{"text beside a null payload", `"payload":null,"body":"x"`, "x", "text/plain; charset=utf-8"},
		{"payload beside a null text", `"payload":1,"body":null`, "1", "application/json"},
		{"null text", `"body":null`, "", ""},
	}
	s := newService(t)
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := s.on(t)
			got := s.only(s.post("/enqueue", `{"url":"`+target+`",`+tt.member+`}`))
			if string(got.Body) != tt.body || got.ContentType != tt.contentType {
				t.Errorf("got %q as %q, want %q as %q", got.Body, got.ContentType, tt.body, tt.contentType)
			}
			if (got.Body == nil) != (tt.contentType == "") {
				t.Errorf("got body nil: %t, want %t", got.Body == nil, tt.contentType == "")
			}
		})
	}
}

// The first wrong value on each side of every limit, and every other mistake.
// Whatever can hold a value holds the marker.
var mistakes = []struct {
	name, body string
	errors     []string
}{
	{"nothing", `{}`, []string{`["body","url"] missing`}},
	{"null url", `{"url":null}`, []string{`["body","url"] string_type`}},
	{"url of another type", `{"url":["` + marker + `"]}`, []string{`["body","url"] string_type`}},
	{"empty url", `{"url":""}`, []string{`["body","url"] string_too_short`}},
	{"url too long", `{"url":"https://example.com/` + marker + strings.Repeat("a", task.MaxURLBytes+1-len("https://example.com/"+marker)) + `"}`, []string{`["body","url"] string_too_long`}},
	{"url too long in bytes", `{"url":"https://example.com/` + marker + strings.Repeat("é", 1100) + `"}`, []string{`["body","url"] invalid`}},
	{"url without scheme", `{"url":"` + marker + `.example/x"}`, []string{`["body","url"] invalid`}},
	{"url with another scheme", `{"url":"ftp://` + marker + `.example/x"}`, []string{`["body","url"] invalid`}},
	{"url with a user", `{"url":"https://u:` + marker + `@example.com/"}`, []string{`["body","url"] invalid`}},
	{"url with a fragment", `{"url":"https://example.com/#` + marker + `"}`, []string{`["body","url"] invalid`}},
	{"url that does not parse", `{"url":"https://[` + marker + `"}`, []string{`["body","url"] invalid`}},
	{"url with NUL", `{"url":"https://example.com/` + marker + `\u0000"}`, []string{`["body","url"] invalid`}},
	{"unknown method", with("method", `"`+marker+`"`), []string{`["body","method"] enum`}},
	{"method in lower case", with("method", `"post"`), []string{`["body","method"] enum`}},
	{"queue with a space", with("queue", `"a `+marker+`"`), []string{`["body","queue"] string_pattern_mismatch`}},
	{"queue that a path cannot name", with("queue", `".."`), []string{`["body","queue"] invalid`}},
	{"empty queue", with("queue", `""`), []string{`["body","queue"] string_pattern_mismatch`}},
	{"queue of another type", with("queue", `42`), []string{`["body","queue"] string_type`}},
	{"flow key with a line break", with("flow_key", `"`+marker+`\u000a"`), []string{`["body","flow_key"] string_pattern_mismatch`}},
	{"empty flow key", with("flow_key", `""`), []string{`["body","flow_key"] string_pattern_mismatch`}},
	{"unknown priority", with("priority", `"`+marker+`"`), []string{`["body","priority"] enum`}},
	{"priority without a queue", with("priority", `"high"`), []string{`["body","priority"] conflict`}},
	{"empty method", with("method", `""`), []string{`["body","method"] enum`}},
	{"method of another type", with("method", `{"`+marker+`":1}`), []string{`["body","method"] string_type`}},
	{"CONNECT", with("method", `"CONNECT"`), []string{`["body","method"] enum`}},
	{"too many headers", with("headers", object(task.MaxHeaders+1, "X-", `"`+marker+`"`)), []string{`["body","headers"] too_long`}},
	{"10,000 headers", with("headers", object(10000, "X-", `"`+marker+`"`)), []string{`["body","headers"] too_long`}},
	{"too many header bytes", with("headers", `{"X":"`+marker+strings.Repeat("a", task.MaxHeaderBytes-len(marker))+`"}`), []string{`["body","headers"] too_long`}},
	{"headers of another type", with("headers", `"`+marker+`"`), []string{`["body","headers"] object_type`}},
	{"headers in a list", with("headers", `["`+marker+`"]`), []string{`["body","headers"] object_type`}},
	{"header of another type", with("headers", `{"X":["`+marker+`"]}`), []string{`["body","headers","X"] string_type`}},
	{"null header", with("headers", `{"X":null}`), []string{`["body","headers","X"] string_type`}},
	{"reserved header", with("headers", `{"host":"`+marker+`"}`), []string{`["body","headers","host"] reserved`}},
	{"reserved headers in another spelling", with("headers", `{"x_forwarded-For":"`+marker+`","ORCHESTRATOR_TASK_ID":"1","Content_Length":"1"}`),
		[]string{`["body","headers","x_forwarded-For"] reserved`, `["body","headers","ORCHESTRATOR_TASK_ID"] reserved`, `["body","headers","Content_Length"] reserved`}},
	{"reserved headers", with("headers", `{"X-Forwarded-For":"`+marker+`","Orchestrator-Via":"1","Proxy-Authorization":"`+marker+`"}`),
		[]string{`["body","headers","X-Forwarded-For"] reserved`, `["body","headers","Orchestrator-Via"] reserved`, `["body","headers","Proxy-Authorization"] reserved`}},
	{"header name with a space", with("headers", `{"a b":"`+marker+`"}`), []string{`["body","headers"] invalid`}},
	{"header name with NUL", with("headers", `{"a\u0000":"`+marker+`"}`), []string{`["body","headers"] invalid`}},
	{"empty header name", with("headers", `{"":"`+marker+`"}`), []string{`["body","headers"] invalid`}},
	{"header value with a line break", with("headers", `{"X":"`+marker+`\r\nY: 1"}`), []string{`["body","headers","X"] invalid`}},
	{"header value with NUL", with("headers", `{"X":"`+marker+`\u0000"}`), []string{`["body","headers","X"] invalid`}},
	{"header twice in either case", with("headers", `{"X-A":"`+marker+`","x-a":"`+marker+`"}`), []string{`["body","headers","x-a"] duplicate`}},
	{"header names with dots and brackets", with("headers", `{"x.y[0].z":5,"host.":"`+marker+`","a":6,"..":7}`),
		[]string{`["body","headers","x.y[0].z"] string_type`, `["body","headers","a"] string_type`, `["body","headers",".."] string_type`}},
	{"reference to a secret that is none", with("headers", `{"X":"${secret:`+marker+`/}"}`), []string{`["body","headers","X"] invalid`}},
	{"auth of another type", with("auth", `"`+marker+`"`), []string{`["body","auth"] object_type`}},
	{"auth without a type", with("auth", `{"audience":"`+marker+`"}`), []string{`["body","auth","type"] missing`}},
	{"auth of an unknown type", with("auth", `{"type":"`+marker+`"}`), []string{`["body","auth","type"] enum`}},
	{"auth with an unknown field", with("auth", `{"type":"oidc","aud":"`+marker+`"}`), []string{`["body","auth","aud"] extra_forbidden`}},
	{"empty audience", with("auth", `{"type":"oidc","audience":""}`), []string{`["body","auth","audience"] string_too_short`}},
	{"audience too long", with("auth", `{"type":"oidc","audience":"`+marker+strings.Repeat("a", task.MaxAudience+1-len(marker))+`"}`), []string{`["body","auth","audience"] string_too_long`}},
	{"audience with a space", with("auth", `{"type":"oidc","audience":"`+marker+` "}`), []string{`["body","auth","audience"] invalid`}},
	{"auth and Authorization", `{"url":"` + target + `","auth":{"type":"oidc"},"headers":{"authorization":"` + marker + `"}}`, []string{`["body","headers","authorization"] conflict`}},
	{"a role in an ID token", with("auth", `{"type":"oidc","role":"`+marker+`"}`), []string{`["body","auth","role"] conflict`}},
	{"empty role", with("auth", `{"type":"jwt","role":""}`), []string{`["body","auth","role"] string_too_short`}},
	{"role too long", with("auth", `{"type":"jwt","role":"`+marker+strings.Repeat("a", task.MaxRole+1-len(marker))+`"}`), []string{`["body","auth","role"] string_too_long`}},
	{"role of two words", with("auth", `{"type":"jwt","role":"`+marker+` x"}`), []string{`["body","auth","role"] invalid`}},
	{"roles in a list", with("auth", `{"type":"jwt","role":["`+marker+`"]}`), []string{`["body","auth","role"] string_type`}},
	{"empty audience of the platform", with("auth", `{"type":"jwt","audience":""}`), []string{`["body","auth","audience"] string_too_short`}},
	{"a token of the platform and Authorization", `{"url":"` + target + `","auth":{"type":"jwt"},"headers":{"authorization":"` + marker + `"}}`, []string{`["body","headers","authorization"] conflict`}},
	{"auth and no url", `{"url":"` + marker + `","auth":{"type":"oidc"}}`, []string{`["body","url"] invalid`}},
	{"timeout too short", with("timeout_seconds", "0.09999"), []string{`["body","timeout_seconds"] greater_than_equal`}},
	{"timeout too long", with("timeout_seconds", "1800.0001"), []string{`["body","timeout_seconds"] less_than_equal`}},
	{"no timeout", with("timeout_seconds", "0"), []string{`["body","timeout_seconds"] greater_than_equal`}},
	{"negative timeout", with("timeout_seconds", "-1"), []string{`["body","timeout_seconds"] greater_than_equal`}},
	{"endless timeout", with("timeout_seconds", "1e300"), []string{`["body","timeout_seconds"] less_than_equal`}},
	{"timeout in quotes", with("timeout_seconds", `"`+marker+`"`), []string{`["body","timeout_seconds"] float_type`}},
	{"timeout of another type", with("timeout_seconds", "true"), []string{`["body","timeout_seconds"] float_type`}},
	{"retry of another type", with("retry", `"`+marker+`"`), []string{`["body","retry"] object_type`}},
	{"retries for no duration", withRetry("for", `"6 hours `+marker+`"`), []string{`["body","retry","for"] string_pattern_mismatch`}},
	{"retries for a number", withRetry("for", "3600"), []string{`["body","retry","for"] string_type`}},
	{"retries for no time", withRetry("for", `"0s"`), []string{`["body","retry","for"] out_of_range`}},
	{"retries for too long", withRetry("for", `"31d"`), []string{`["body","retry","for"] out_of_range`}},
	{"retries for ages", withRetry("for", `"99999999d99999999d"`), []string{`["body","retry","for"] out_of_range`}},
	{"retries for a time and a number", with("retry", `{"for":"6h","max_attempts":5}`), []string{`["body","retry","max_attempts"] conflict`}},
	{"retries for two times", with("retry", `{"for":"6h","max_retry_duration_seconds":60}`), []string{`["body","retry","max_retry_duration_seconds"] conflict`}},
	{"retries that 100 attempts do not last for", with("retry", `{"for":"6h","max_backoff_seconds":60}`), []string{`["body","retry","for"] out_of_range`}},
	{"no attempts", withRetry("max_attempts", "0"), []string{`["body","retry","max_attempts"] greater_than_equal`}},
	{"too many attempts", withRetry("max_attempts", "101"), []string{`["body","retry","max_attempts"] less_than_equal`}},
	{"attempts with a fraction", withRetry("max_attempts", "1.5"), []string{`["body","retry","max_attempts"] int_type`}},
	{"attempts in quotes", withRetry("max_attempts", `"`+marker+`"`), []string{`["body","retry","max_attempts"] int_type`}},
	{"endless attempts", withRetry("max_attempts", "1e300"), []string{`["body","retry","max_attempts"] less_than_equal`}},
	{"negative retry duration", withRetry("max_retry_duration_seconds", "-0.001"), []string{`["body","retry","max_retry_duration_seconds"] greater_than_equal`}},
	{"retry duration too long", withRetry("max_retry_duration_seconds", "31536000.01"), []string{`["body","retry","max_retry_duration_seconds"] less_than_equal`}},
	{"min backoff too short", withRetry("min_backoff_seconds", "0.00999"), []string{`["body","retry","min_backoff_seconds"] greater_than_equal`}},
	{"min backoff too long", withRetry("min_backoff_seconds", "86400.01"), []string{`["body","retry","min_backoff_seconds"] less_than_equal`}},
	{"max backoff too short", withRetry("max_backoff_seconds", "0.00999"), []string{`["body","retry","max_backoff_seconds"] greater_than_equal`}},
	{"max backoff too long", withRetry("max_backoff_seconds", "86400.01"), []string{`["body","retry","max_backoff_seconds"] less_than_equal`}},
	{"max backoff below min", with("retry", `{"min_backoff_seconds":2,"max_backoff_seconds":1.999}`), []string{`["body","retry","max_backoff_seconds"] out_of_range`}},
	{"max backoff below the default min", withRetry("max_backoff_seconds", "0.5"), []string{`["body","retry","max_backoff_seconds"] out_of_range`}},
	{"min backoff above the default max", withRetry("min_backoff_seconds", "3600.5"), []string{`["body","retry","max_backoff_seconds"] out_of_range`}},
	{"negative doublings", withRetry("max_doublings", "-1"), []string{`["body","retry","max_doublings"] greater_than_equal`}},
	{"too many doublings", withRetry("max_doublings", "31"), []string{`["body","retry","max_doublings"] less_than_equal`}},
	{"doublings with a fraction", withRetry("max_doublings", "0.1"), []string{`["body","retry","max_doublings"] int_type`}},
	{"client errors of another type", withRetry("retry_client_errors", `"`+marker+`"`), []string{`["body","retry","retry_client_errors"] bool_type`}},
	{"client errors as a number", withRetry("retry_client_errors", `1`), []string{`["body","retry","retry_client_errors"] bool_type`}},
	{"too many labels", with("labels", object(task.MaxLabels+1, "l", `"`+marker+`"`)), []string{`["body","labels"] too_long`}},
	{"label name too long", with("labels", `{"`+strings.Repeat("n", task.MaxLabelName+1)+`":"`+marker+`"}`), []string{`["body","labels"] invalid`}},
	{"label value too long", with("labels", `{"n":"`+marker+strings.Repeat("v", task.MaxLabelValue+1-len(marker))+`"}`), []string{`["body","labels","n"] invalid`}},
	{"label with NUL", with("labels", `{"n":"`+marker+`\u0000"}`), []string{`["body","labels","n"] invalid`}},
	{"label name with NUL", with("labels", `{"\u0000":"`+marker+`"}`), []string{`["body","labels"] invalid`}},
	{"label of another type", with("labels", `{"n":5}`), []string{`["body","labels","n"] string_type`}},
	{"null label", with("labels", `{"n":null}`), []string{`["body","labels","n"] string_type`}},
	{"label names with dots and brackets", with("labels", `{"a.b":1,"a[0]":2,"a[0].b":3,"[":4,".":5,"]":6,"":7,"z":8}`), []string{
		`["body","labels","a.b"] string_type`, `["body","labels","a[0]"] string_type`, `["body","labels","a[0].b"] string_type`, `["body","labels","["] string_type`,
		`["body","labels","."] string_type`, `["body","labels","]"] string_type`, `["body","labels",""] string_type`, `["body","labels","z"] string_type`,
	}},
	{"labels of another type", with("labels", `"`+marker+`"`), []string{`["body","labels"] object_type`}},
	{"expires at no time", with("expires_at", `"`+marker+`"`), []string{`["body","expires_at"] datetime_parsing`}},
	{"expires at a local time", with("expires_at", `"2030-01-01T00:00:00"`), []string{`["body","expires_at"] datetime_parsing`}},
	{"expires at a date", with("expires_at", `"2030-01-01"`), []string{`["body","expires_at"] datetime_parsing`}},
	{"expires at a short hour", with("expires_at", `"2030-01-01T1:00:00Z"`), []string{`["body","expires_at"] datetime_parsing`}},
	{"expires at a comma", with("expires_at", `"2030-01-01T01:00:00,5Z"`), []string{`["body","expires_at"] datetime_parsing`}},
	{"expires at a leap second", with("expires_at", `"2030-12-31T23:59:60Z"`), []string{`["body","expires_at"] datetime_parsing`}},
	{"expires at a number", with("expires_at", `1893456000`), []string{`["body","expires_at"] string_type`}},
	{"empty expires_at", with("expires_at", `""`), []string{`["body","expires_at"] datetime_parsing`}},
	{"expires at Go's zero time", with("expires_at", `"0001-01-01T00:00:00Z"`), []string{`["body","expires_at"] datetime_parsing`}},
	{"expires before 1970", with("expires_at", `"1969-12-31T23:59:59Z"`), []string{`["body","expires_at"] out_of_range`}},
	{"expires after 9998", with("expires_at", `"9999-01-01T00:00:00Z"`), []string{`["body","expires_at"] out_of_range`}},
	{"payload and body", `{"url":"` + target + `","payload":"` + marker + `","body":"` + marker + `"}`, []string{`["body","body"] conflict`}},
	{"payload and an empty body", `{"url":"` + target + `","payload":0,"body":""}`, []string{`["body","body"] conflict`}},
	{"GET with payload", `{"url":"` + target + `","method":"GET","payload":"` + marker + `"}`, []string{`["body","method"] conflict`}},
	{"HEAD with body", `{"url":"` + target + `","method":"HEAD","body":"` + marker + `"}`, []string{`["body","method"] conflict`}},
	{"GET with an empty body", `{"url":"` + target + `","method":"GET","body":""}`, []string{`["body","method"] conflict`}},
	{"body of another type", with("body", `{"`+marker+`":1}`), []string{`["body","body"] string_type`}},
	{"unknown field", with("maxattempts", `"`+marker+`"`), []string{`["body","maxattempts"] extra_forbidden`}},
	{"unknown null field", with("maxattempts", `null`), []string{`["body","maxattempts"] extra_forbidden`}},
	{"unknown field in retry", withRetry("maxattempts", `"`+marker+`"`), []string{`["body","retry","maxattempts"] extra_forbidden`}},
	{"unknown fields with dots and brackets", `{"url":"` + target + `","a.b":"` + marker + `","[0]":1,"":2,"zz":3}`,
		[]string{`["body","a.b"] extra_forbidden`, `["body","[0]"] extra_forbidden`, `["body",""] extra_forbidden`, `["body","zz"] extra_forbidden`}},
	{"field in another case", `{"URL":"` + target + marker + `"}`, []string{`["body","url"] missing`, `["body","URL"] extra_forbidden`}},
	{"field in both cases", `{"url":"` + target + `","Url":"` + marker + `"}`, []string{`["body","Url"] extra_forbidden`}},
	{"retry field in another case", withRetry("Max_Attempts", "5"), []string{`["body","retry","Max_Attempts"] extra_forbidden`}},
	{"the id of a task", with("id", `"`+marker+`"`), []string{`["body","id"] extra_forbidden`}},
	{"many mistakes", `{"url":"` + marker + `","timeout_seconds":0.5,"headers":{"Host":"` + marker + `"},"labels":{"l":"\u0001"},"payload":1,"body":"` + marker + `"}`,
		[]string{`["body","body"] conflict`, `["body","url"] invalid`, `["body","headers","Host"] reserved`, `["body","labels","l"] invalid`}},
	{"a list", `["` + marker + `"]`, []string{`["body"] object_type`}},
	{"a string", `"` + marker + `"`, []string{`["body"] object_type`}},
	{"a number", `5`, []string{`["body"] object_type`}},
	{"null", `null`, []string{`["body"] object_type`}},
	{"true", `true`, []string{`["body"] object_type`}},
}

func TestMistakes(t *testing.T) {
	t.Parallel()
	for _, path := range []string{"/enqueue", "/schedule", "/worker-endpoint"} {
		t.Run(path, func(t *testing.T) {
			t.Parallel()
			s := newService(t)
			for _, tt := range mistakes {
				t.Run(tt.name, func(t *testing.T) {
					body := tt.body
					if path == "/schedule" && strings.HasPrefix(body, "{") {
						body = strings.TrimSuffix(body, "}")
						if body != "{" {
							body += ","
						}
						body += `"delay_seconds":1}`
					}
					s := s.on(t)
					s.refused(s.post(path, body), http.StatusUnprocessableEntity, tt.errors...)
				})
			}
		})
	}
}

// The texts of the errors, where they come from huma.
func TestMistakeTexts(t *testing.T) {
	t.Parallel()
	s := newService(t)
	for _, tt := range []struct{ body, loc, want string }{
		{withRetry("max_retry_duration_seconds", "1e9"), `["body","retry","max_retry_duration_seconds"]`, "must be at most 31536000"},
		{withRetry("max_attempts", "0"), `["body","retry","max_attempts"]`, "must be at least 1"},
		{withRetry("min_backoff_seconds", "0"), `["body","retry","min_backoff_seconds"]`, "must be at least 0.01"},
		{withRetry("max_attempts", "1.5"), `["body","retry","max_attempts"]`, "must be a whole number"},
		{withRetry("retry_client_errors", "1"), `["body","retry","retry_client_errors"]`, "must be true or false"},
		{with("timeout_seconds", `""`), `["body","timeout_seconds"]`, "must be a number"},
		{with("method", `"TRACE"`), `["body","method"]`, "must be one of GET, HEAD, POST, PUT, PATCH, DELETE"},
		{with("headers", object(51, "x", `""`)), `["body","headers"]`, "must have at most 50 properties"},
		{with("expires_at", `"x"`), `["body","expires_at"]`, "must be a time like 2026-12-24T21:00:00Z (RFC 3339 with an offset)"},
		{with("x", `1`), `["body","x"]`, "is not a field of this request; look for a spelling mistake, or in /docs for the request that takes it"},
		{`{}`, `["body","url"]`, "is required"},
		{`{"url":""}`, `["body","url"]`, "must not be empty"},
		{`{"url":"` + strings.Repeat("a", 2049) + `"}`, `["body","url"]`, "must be at most 2048 characters long"},
		{`{"url":5}`, `["body","url"]`, "must be a string"},
		{`[]`, `["body"]`, "must be an object"},
	} {
		a := s.post("/enqueue", tt.body)
		if got := a.message(tt.loc); got != tt.want {
			t.Errorf("%s: got %q, want %q", clipped(tt.body), got, tt.want)
		}
		if want := "The request breaks 1 rule, see errors."; a.detail() != want && len(a.errors()) == 1 {
			t.Errorf("got detail %q, want %q", a.detail(), want)
		}
	}
}

// A body that is full of mistakes does not make for a larger answer.
func TestManyMistakes(t *testing.T) {
	t.Parallel()
	s := newService(t)
	var first string
	for range 3 {
		a := s.post("/enqueue", object(maxMembers, "a", `"`+marker+`"`))
		if a.status != http.StatusUnprocessableEntity || len(a.errors()) != maxFieldProblems {
			t.Errorf("got status %d with %d errors, want 422 with %d", a.status, len(a.errors()), maxFieldProblems)
		}
		if want := "The request breaks more than 50 rules, see errors for 50 of them."; a.detail() != want {
			t.Errorf("got %q, want %q", a.detail(), want)
		}
		if got := fmt.Sprint(a.errors()); first == "" {
			first = got
		} else if got != first {
			t.Errorf("got other errors the second time: %s, want %s", got, first)
		}
		s.nothingHappened(a)
	}
}

func TestPolicyRefuses(t *testing.T) {
	t.Parallel()
	var asked string
	s := newService(t, func(o *settings) {
		o.Policy = fakePolicy(func(url string) error {
			asked = url
			return errors.New("names a host that the target policy does not allow")
		})
	})
	for path, body := range map[string]string{
		"/enqueue": with("labels", `{}`), "/schedule": with("delay_seconds", "1"), "/worker-endpoint": with("labels", `{}`),
	} {
		asked = ""
		a := s.post(path, strings.Replace(body, target, "https://"+marker+".example/", 1))
		s.refused(a, http.StatusUnprocessableEntity, `["body","url"] target_refused`)
		if want := "names a host that the target policy does not allow"; a.message(`["body","url"]`) != want {
			t.Errorf("%s: got %q, want %q", path, a.message(`["body","url"]`), want)
		}
		if want := "https://" + marker + ".example/"; asked != want {
			t.Errorf("%s: the policy was asked about %q, want %q", path, asked, want)
		}
	}
}

// What the settings do not admit, although the domain does.
func TestCredentialsAreRefused(t *testing.T) {
	t.Parallel()
	s := newService(t, func(o *settings) {
		o.Identity = fakePolicy(func(string) error { return errors.New("must not be there") })
		o.Secrets = fakeSecrets(func(name, url string) error {
			if name == "known" && url == target {
				return nil
			}
			return errors.New("refers to a secret that does not exist")
		})
	})
	const headers = `{"X-A":"${secret:known}","X-B":"a ${secret:known} ${secret:` + marker + `}","Authorization":"Bearer ${secret:` + marker + `}"}`
	refusedHeaders := []string{`["body","headers","Authorization"] secret_refused`, `["body","headers","X-B"] secret_refused`}
	for path, more := range map[string]string{"/enqueue": "", "/schedule": `,"delay_seconds":1`, "/worker-endpoint": ""} {
		post := func(members string) *answer { return s.post(path, `{"url":"`+target+`",`+members+more+`}`) }
		a := post(`"headers":` + headers)
		s.refused(a, http.StatusUnprocessableEntity, refusedHeaders...)
		if want := "refers to a secret that does not exist"; a.message(`["body","headers","X-B"]`) != want {
			t.Errorf("%s: got %q, want %q", path, a.message(`["body","headers","X-B"]`), want)
		}
		a = post(`"auth":{"type":"oidc","audience":"` + marker + `"}`)
		s.refused(a, http.StatusUnprocessableEntity, `["body","auth"] target_refused`)
		if want := "must not be there"; a.message(`["body","auth"]`) != want {
			t.Errorf("%s: got %q, want %q", path, a.message(`["body","auth"]`), want)
		}
		if a := post(`"headers":{"X-A":"${secret:known}"}`); a.status/100 != 2 {
			t.Errorf("%s: a secret that is allowed is answered %d: %s", path, a.status, a.text)
		}
		s.store.taken()
		s.dispatcher.taken()
	}
}

// Where the instance cannot look a secret up, nothing is wrong with the request.
func TestSecretsInAShortage(t *testing.T) {
	t.Parallel()
	s := newService(t, func(o *settings) {
		o.Secrets = fakeSecrets(func(string, string) error { return task.ShortageDescriptors })
	})
	body := `{"url":"` + target + `","headers":{"X-A":"${secret:a}"}}`
	for path, body := range map[string]string{
		"/enqueue": body, "/schedule": with("delay_seconds", `1,"headers":{"X-A":"${secret:a}"}`), "/worker-endpoint": body,
		"/tasks/batch": batchOf(with("payload", "1"), body), "/tasks/batch?": batchOf(with("payload", "null"), body),
	} {
		a := s.post(path, body)
		s.refused(a, http.StatusServiceUnavailable)
		if want := "The request cannot be checked at the moment: the service has no file descriptors"; !strings.HasPrefix(a.detail(), want) || a.header.Get("Retry-After") == "" {
			t.Errorf("%s: got %q with Retry-After %q", path, a.detail(), a.header.Get("Retry-After"))
		}
	}
}

// What a task with credentials is stored as, and shows.
func TestCredentialsInTasks(t *testing.T) {
	t.Parallel()
	s := newService(t)
	for _, tt := range []struct{ auth, want string }{
		{`{"type":"oidc"}`, "https://example.com"},
		{`{"type":"oidc","audience":null}`, "https://example.com"},
		{`{"type":"oidc","audience":"plays"}`, "plays"},
		{`{"audience":"` + strings.Repeat("é", task.MaxAudience/2) + `","type":"oidc"}`, strings.Repeat("é", task.MaxAudience/2)},
	} {
		a := s.post("/enqueue", with("auth", tt.auth))
		if got := s.only(a).OIDCAudience; got != tt.want {
			t.Errorf("%s: stored the audience %q, want %q", tt.auth, got, tt.want)
		}
		if diff := cmp.Diff(any(map[string]any{"type": "oidc", "audience": tt.want, "role": nil}), a.at("auth")); diff != "" {
			t.Errorf("%s: shown (-want +got):\n%s", tt.auth, diff)
		}
	}
	longRole, longAudience := strings.Repeat("r", task.MaxRole), strings.Repeat("a", task.MaxAudience)
	for _, tt := range []struct {
		auth           string
		want           task.JWT
		audience, role any
	}{
		{`{"type":"jwt"}`, task.JWT{}, nil, nil},
		{`{"type":"jwt","audience":null,"role":null}`, task.JWT{}, nil, nil},
		{`{"type":"jwt","role":"admin","audience":"catalogue"}`, task.JWT{Role: "admin", Audience: "catalogue"}, "catalogue", "admin"},
		{`{"role":"` + longRole + `","audience":"` + longAudience + `","type":"jwt"}`, task.JWT{Role: longRole, Audience: longAudience}, longAudience, longRole},
	} {
		a := s.post("/enqueue", with("auth", tt.auth))
		stored := s.only(a)
		if diff := cmp.Diff(&tt.want, stored.JWT); diff != "" || stored.OIDCAudience != "" {
			t.Errorf("%s: stored an ID token for %q and (-want +got):\n%s", tt.auth, stored.OIDCAudience, diff)
		}
		if diff := cmp.Diff(any(map[string]any{"type": "jwt", "audience": tt.audience, "role": tt.role}), a.at("auth")); diff != "" {
			t.Errorf("%s: shown (-want +got):\n%s", tt.auth, diff)
		}
	}
	if got := s.only(s.post("/enqueue", with("auth", "null"))).OIDCAudience; got != "" {
		t.Errorf("null: stored the audience %q, want none", got)
	}
	a := s.post("/enqueue", with("headers", `{"X-A":"${secret:a}","Authorization":"Bearer ${secret:b}"}`))
	stored := map[string]string{"X-A": "${secret:a}", "Authorization": "Bearer ${secret:b}"}
	if diff := cmp.Diff(stored, s.only(a).Headers); diff != "" {
		t.Errorf("stored (-want +got):\n%s", diff)
	}
	shown := map[string]any{"X-A": "${secret:a}", "Authorization": "[redacted]"}
	if diff := cmp.Diff(any(shown), a.at("headers")); diff != "" {
		t.Errorf("shown (-want +got):\n%s", diff)
	}
}

func TestScheduleAccepts(t *testing.T) {
	t.Parallel()
	moment := func(s string) time.Time {
		at, err := time.Parse(time.RFC3339Nano, s)
		if err != nil {
			t.Fatal(err)
		}
		return at.UTC()
	}
	soon := time.Now().UTC().Truncate(time.Second).Add(time.Hour)
	nearHorizon := time.Now().UTC().Truncate(time.Second).Add(task.Horizon - time.Minute)
	tests := []struct {
		name, members string
		at            time.Time
		delay         time.Duration
	}{
		{"UTC", `"run_at":"2030-12-25T00:00:00Z"`, moment("2030-12-25T00:00:00Z"), 0},
		{"offset", `"run_at":"2030-12-24T21:00:00.25-03:00"`, moment("2030-12-25T00:00:00.25Z"), 0},
		{"local time", `"run_at":"2030-12-24T21:00:00","time_zone":"America/Argentina/Buenos_Aires"`, moment("2030-12-25T00:00:00Z"), 0},
		{"local time in UTC", `"run_at":"2030-12-24T21:00:00","time_zone":"UTC"`, moment("2030-12-24T21:00:00Z"), 0},
		{"gap", `"run_at":"2030-03-31T02:30:00","time_zone":"Europe/Berlin"`, moment("2030-03-31T01:00:00Z"), 0},
		{"twice", `"run_at":"2030-10-27T02:30:00","time_zone":"Europe/Berlin"`, moment("2030-10-27T00:30:00Z"), 0},
		{"soon", `"run_at":"` + soon.Format(time.RFC3339) + `"`, soon, 0},
		{"past", `"run_at":"2001-02-03T04:05:06Z"`, moment("2001-02-03T04:05:06Z"), 0},
		{"first year", `"run_at":"0000-01-01T00:00:00Z"`, moment("0000-01-01T00:00:00Z"), 0},
		{"before the first year", `"run_at":"0000-01-01T00:00:00+14:00"`, moment("0000-01-01T00:00:00+14:00"), 0},
		{"near the horizon", `"run_at":"` + nearHorizon.Format(time.RFC3339) + `"`, nearHorizon, 0},
		{"expires at once", `"run_at":"2030-12-25T00:00:00Z","expires_at":"2030-12-25T00:00:00Z"`, moment("2030-12-25T00:00:00Z"), 0},
		{"no delay", `"delay_seconds":0`, time.Time{}, 0},
		{"delay", `"delay_seconds":60`, time.Time{}, time.Minute},
		{"delay with a fraction", `"delay_seconds":0.29`, time.Time{}, 290 * time.Millisecond},
		{"longest delay", `"delay_seconds":315360000`, time.Time{}, task.Horizon},
		{"null run_at beside a delay", `"delay_seconds":1,"run_at":null,"time_zone":null`, time.Time{}, time.Second},
		{"null delay beside run_at", `"delay_seconds":null,"run_at":"2030-12-25T00:00:00Z","time_zone":null`, moment("2030-12-25T00:00:00Z"), 0},
	}
	s := newService(t)
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := s.on(t)
			a := s.post("/schedule", `{"url":"`+target+`",`+tt.members+`}`)
			got := s.only(a)
			if got.Delay != tt.delay {
				t.Errorf("got delay %v, want %v", got.Delay, tt.delay)
			}
			want := tt.at // what the fake store makes of it
			if want.IsZero() {
				want = storedAt.Add(tt.delay)
			}
			if want.Before(storedAt) {
				want = storedAt
			}
			if !got.RunAt.Equal(want) {
				t.Errorf("got run_at %v, want %v", got.RunAt, want)
			}
			if got, want := a.at("run_at"), any(want.UTC().Format("2006-01-02T15:04:05.000000Z")); got != want {
				t.Errorf("the answer says %v, want %v", got, want)
			}
		})
	}
}

func TestScheduleRefuses(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name, members string
		errors        []string
		text          string // a part of the first one's
	}{
		{"no moment", `"labels":{}`, []string{`["body","run_at"] missing`}, "or delay_seconds"},
		{"null moments", `"run_at":null,"delay_seconds":null`, []string{`["body","run_at"] missing`}, ""},
		{"zone alone", `"time_zone":"UTC"`, []string{`["body","run_at"] missing`}, ""},
		{"both moments", `"run_at":"2030-12-25T00:00:00Z","delay_seconds":5`, []string{`["body","delay_seconds"] conflict`}, "together with run_at"},
		{"delay with a zone", `"delay_seconds":5,"time_zone":"UTC"`, []string{`["body","time_zone"] conflict`}, "run_at only"},
		{"local time without a zone", `"run_at":"2030-12-24T21:00:00"`, []string{`["body","run_at"] datetime_parsing`}, "has no offset"},
		{"offset and zone", `"run_at":"2030-12-24T21:00:00Z","time_zone":"UTC"`, []string{`["body","run_at"] datetime_parsing`}, "time_zone is given too"},
		{"no time", `"run_at":"` + marker + `"`, []string{`["body","run_at"] datetime_parsing`}, "must be a time like"},
		{"no time in a zone", `"run_at":"` + marker + `","time_zone":"UTC"`, []string{`["body","run_at"] datetime_parsing`}, "must be a time like"},
		{"date", `"run_at":"2030-12-24"`, []string{`["body","run_at"] datetime_parsing`}, ""},
		{"empty", `"run_at":""`, []string{`["body","run_at"] datetime_parsing`}, ""},
		{"number", `"run_at":1893456000`, []string{`["body","run_at"] string_type`}, ""},
		{"a month too many", `"run_at":"2030-13-01T00:00:00Z"`, []string{`["body","run_at"] datetime_parsing`}, ""},
		{"30 February", `"run_at":"2030-02-30T00:00:00","time_zone":"UTC"`, []string{`["body","run_at"] datetime_parsing`}, ""},
		{"unknown zone", `"run_at":"2030-12-24T21:00:00","time_zone":"` + marker + `"`, []string{`["body","time_zone"] invalid`}, "IANA"},
		{"empty zone", `"run_at":"2030-12-24T21:00:00","time_zone":""`, []string{`["body","time_zone"] invalid`}, ""},
		{"the machine's zone", `"run_at":"2030-12-24T21:00:00","time_zone":"Local"`, []string{`["body","time_zone"] invalid`}, ""},
		{"zone with a way out", `"run_at":"2030-12-24T21:00:00","time_zone":"../../etc/passwd"`, []string{`["body","time_zone"] invalid`}, ""},
		{"zone with NUL", `"run_at":"2030-12-24T21:00:00","time_zone":"UTC\u0000"`, []string{`["body","time_zone"] invalid`}, ""},
		{"zone of another type", `"run_at":"2030-12-24T21:00:00","time_zone":3`, []string{`["body","time_zone"] string_type`}, ""},
		{"beyond the horizon", `"run_at":"` + time.Now().UTC().Add(task.Horizon+time.Hour).Format(time.RFC3339) + `"`, []string{`["body","run_at"] out_of_range`}, "10 years"},
		{"last year of all", `"run_at":"9999-12-31T23:59:59Z"`, []string{`["body","run_at"] out_of_range`}, ""},
		{"negative delay", `"delay_seconds":-0.001`, []string{`["body","delay_seconds"] greater_than_equal`}, ""},
		{"delay too long", `"delay_seconds":315360000.1`, []string{`["body","delay_seconds"] less_than_equal`}, "at most 315360000"},
		{"endless delay", `"delay_seconds":1e300`, []string{`["body","delay_seconds"] less_than_equal`}, ""},
		{"delay of another type", `"delay_seconds":"` + marker + `"`, []string{`["body","delay_seconds"] float_type`}, ""},
		{"expires before it runs", `"run_at":"2030-12-25T00:00:00Z","expires_at":"2030-12-24T23:59:59Z"`, []string{`["body","expires_at"] conflict`}, ""},
		{"expires within its delay", `"delay_seconds":60,"expires_at":"` + storedAt.Add(59*time.Second).Format(time.RFC3339) + `"`, []string{`["body","expires_at"] conflict`}, "delay_seconds"},
		{"has expired before its delay", `"delay_seconds":0.001,"expires_at":"1970-01-01T00:00:00Z"`, []string{`["body","expires_at"] conflict`}, "before its first attempt"},
		{"mistakes of both kinds", `"run_at":"` + marker + `","headers":{"Host":"` + marker + `"}`, []string{`["body","run_at"] datetime_parsing`, `["body","headers","Host"] reserved`}, ""},
		{"in another case", `"Run_At":"` + marker + `","delay_seconds":1`, []string{`["body","Run_At"] extra_forbidden`}, ""},
	}
	s := newService(t)
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := s.on(t)
			a := s.post("/schedule", `{"url":"`+target+`",`+tt.members+`}`)
			s.refused(a, http.StatusUnprocessableEntity, tt.errors...)
			msg, _ := a.at("errors", 0, "msg").(string)
			if !strings.Contains(msg, tt.text) {
				t.Errorf("got %q, want it to contain %q", msg, tt.text)
			}
		})
	}
}

// A moment is not a field of /enqueue.
func TestEnqueueTakesNoMoment(t *testing.T) {
	t.Parallel()
	s := newService(t)
	for _, name := range []string{"run_at", "delay_seconds", "time_zone"} {
		s.refused(s.post("/enqueue", with(name, `"`+marker+`"`)), http.StatusUnprocessableEntity, `["body","`+name+`"] extra_forbidden`)
	}
}

func TestGetTask(t *testing.T) {
	t.Parallel()
	zone := time.FixedZone("", -3*3600)
	at := func(second, nano int) time.Time { return time.Date(2026, 12, 24, 21, 0, second, nano, zone) }
	base := task.Task{
		ID: task.ID{1, 2, 3},
		Spec: task.Spec{
			URL: target, Method: "PUT", Headers: map[string]string{"X-Access-Token": marker, "X-Plain": "p"}, Body: []byte(marker), ContentType: "text/plain; charset=utf-8",
			Timeout: 1500 * time.Millisecond, Retry: task.RetryPolicy{MaxAttempts: 2, MaxRetryDuration: time.Minute, MinBackoff: time.Second, MaxBackoff: 2 * time.Second, MaxDoublings: 1},
			OnFailure: &task.Callback{URL: "https://example.com/ended", Headers: map[string]string{"X-Token": marker}},
		},
		State: task.Pending, RunAt: at(0, 1), CreatedAt: at(0, 123456789), CreatedBy: "plays@melodia.app", BodyBytes: len(marker),
		ParentID: task.ID{2}, RootID: task.ID{3},
	}
	base.Queue, base.FlowKey, base.Priority = "mail", "tenant-42", task.High
	fixed := map[string]any{
		"id": "01020300-0000-0000-0000-000000000000", "url": target, "method": "PUT",
		"headers": map[string]any{"X-Access-Token": "[redacted]", "X-Plain": "p"}, "labels": map[string]any{}, "auth": nil,
		"run_at": "2026-12-25T00:00:00.000000Z", "created_at": "2026-12-25T00:00:00.123456Z", "timeout_seconds": 1.5,
		"created_by":          "plays@melodia.app",
		"parent_id":           "02000000-0000-0000-0000-000000000000",
		"root_id":             "03000000-0000-0000-0000-000000000000",
		"queue":               "mail",
		"flow_key":            "tenant-42",
		"priority":            "high",
		"cancel_requested_at": nil, "on_success": nil, "payload_bytes": float64(len(marker)), "content_type": "text/plain; charset=utf-8",
		"on_failure": map[string]any{"url": "https://example.com/ended", "headers": map[string]any{"X-Token": "[redacted]"}},
		"retry": map[string]any{
			"max_attempts": 2.0, "max_retry_duration_seconds": 60.0, "min_backoff_seconds": 1.0,
			"max_backoff_seconds": 2.0, "max_doublings": 1.0, "retry_client_errors": false,
		},
	}
	attempt := func(number float64, outcome string, status, err, excerpt, retryAfter any) map[string]any {
		return map[string]any{
			"round": 1.0, "number": number, "started_at": "2026-12-25T00:00:01.000002Z", "duration_seconds": 0.25, "outcome": outcome,
			"status_code": status, "error": err, "response_excerpt": excerpt, "retry_after_seconds": retryAfter,
		}
	}
	tests := []struct {
		name   string
		change func(*task.Task)
		want   map[string]any
	}{
		{"pending", func(*task.Task) {}, map[string]any{
			"state": "pending", "attempt_count": 0.0, "attempts": []any{}, "expires_at": nil, "finished_at": nil, "reason": nil,
		}},
		{"running", func(t *task.Task) { t.State, t.ExpiresAt = task.Running, at(9, 0) }, map[string]any{
			"state": "running", "attempt_count": 0.0, "attempts": []any{}, "expires_at": "2026-12-25T00:00:09.000000Z", "finished_at": nil, "reason": nil,
		}},
		{"retrying", func(t *task.Task) {
			t.AttemptCount = 1
			t.Attempts = []task.Attempt{
				{Round: 1, Number: 1, StartedAt: at(1, 2999), Duration: 250 * time.Millisecond, Outcome: task.OutcomeInterrupted, Error: "cut short"},
				{Round: 1, Number: 1, StartedAt: at(1, 2000), Duration: 250 * time.Millisecond, Outcome: task.OutcomeRetryable, StatusCode: 503, Error: "answered 503", ResponseExcerpt: "later", RetryAfter: 30 * time.Second},
			}
		}, map[string]any{
			"state": "pending", "attempt_count": 1.0, "expires_at": nil, "finished_at": nil, "reason": nil, "attempts": []any{
				attempt(1, "interrupted", nil, "cut short", nil, nil), attempt(1, "retryable", 503.0, "answered 503", "later", 30.0),
			},
		}},
		{"succeeded", func(t *task.Task) {
			t.State, t.FinishedAt, t.AttemptCount = task.Succeeded, at(2, 0), 2
			t.Attempts = []task.Attempt{
				{Round: 1, Number: 1, StartedAt: at(1, 2000), Duration: 250 * time.Millisecond, Outcome: task.OutcomeLost},
				{Round: 1, Number: 2, StartedAt: at(1, 2000), Duration: 250 * time.Millisecond, Outcome: task.OutcomeSucceeded, StatusCode: 204},
			}
		}, map[string]any{
			"state": "succeeded", "attempt_count": 2.0, "expires_at": nil, "finished_at": "2026-12-25T00:00:02.000000Z", "reason": nil, "attempts": []any{
				attempt(1, "lost", nil, nil, nil, nil), attempt(2, "succeeded", 204.0, nil, nil, nil),
			},
		}},
		{"failed", func(t *task.Task) {
			t.State, t.Reason, t.FinishedAt, t.AttemptCount = task.Failed, task.ClientError, at(2, 0), 1
			t.Attempts = []task.Attempt{{Round: 1, Number: 1, StartedAt: at(1, 2000), Duration: 250 * time.Millisecond, Outcome: task.OutcomePermanent, StatusCode: 404, Error: "answered 404"}}
		}, map[string]any{
			"state": "failed", "attempt_count": 1.0, "expires_at": nil, "finished_at": "2026-12-25T00:00:02.000000Z", "reason": "client_error",
			"attempts": []any{attempt(1, "permanent", 404.0, "answered 404", nil, nil)},
		}},
		{"cancelled", func(t *task.Task) { t.State, t.FinishedAt = task.Cancelled, at(2, 0) }, map[string]any{
			"state": "cancelled", "attempt_count": 0.0, "attempts": []any{}, "expires_at": nil, "finished_at": "2026-12-25T00:00:02.000000Z", "reason": nil,
		}},
		{"text that is not UTF-8", func(t *task.Task) {
			t.Attempts = []task.Attempt{{Round: 1, Number: 1, StartedAt: at(1, 2000), Duration: 250 * time.Millisecond, Outcome: task.OutcomePermanent, Error: "a\xffb", ResponseExcerpt: "\xed\xa0\x80"}}
		}, map[string]any{
			"state": "pending", "attempt_count": 0.0, "expires_at": nil, "finished_at": nil, "reason": nil,
			"attempts": []any{attempt(1, "permanent", nil, "a�b", "���", nil)},
		}},
	}
	for _, reason := range []task.Reason{task.AttemptsExhausted, task.RetryDurationExhausted, task.ClientError, task.Expired, task.TargetRefused} {
		tests = append(tests, struct {
			name   string
			change func(*task.Task)
			want   map[string]any
		}{"failed: " + string(reason), func(t *task.Task) { t.State, t.Reason = task.Failed, reason }, map[string]any{
			"state": "failed", "attempt_count": 0.0, "attempts": []any{}, "expires_at": nil, "finished_at": nil, "reason": string(reason),
		}})
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s := newService(t)
			stored := base
			tt.change(&stored)
			s.store.get = func(_ context.Context, id task.ID) (*task.Task, error) {
				if id != stored.ID {
					return nil, task.ErrNotFound
				}
				return &stored, nil
			}
			want := maps.Clone(tt.want)
			maps.Copy(want, fixed)
			// Ids are the same in either case.
			for _, id := range []string{stored.ID.String(), strings.ToUpper(stored.ID.String())} {
				a := s.get("/tasks/" + id)
				if a.status != http.StatusOK {
					t.Fatalf("got status %d, want 200: %s", a.status, a.text)
				}
				if diff := cmp.Diff(want, a.json); diff != "" {
					t.Errorf("(-want +got):\n%s", diff)
				}
				if strings.Contains(a.text, marker) {
					t.Errorf("a secret or the body is shown: %s", a.text)
				}
			}
		})
	}
}

func TestGetTaskRefuses(t *testing.T) {
	t.Parallel()
	s := newService(t)
	s.refused(s.get("/tasks/01939e0c-5c1e-7cc1-b1a6-9d8a4d6c1a2b"), http.StatusNotFound)
	for _, id := range []string{
		marker, "1", "01939e0c5c1e7cc1b1a69d8a4d6c1a2b", "{01939e0c-5c1e-7cc1-b1a6-9d8a4d6c1a2b}", "01939e0c-5c1e-7cc1-b1a6-9d8a4d6c1a2g",
		"01939e0c-5c1e-7cc1-b1a6-9d8a4d6c1a2b%0a", "%00", "..%2fhealth", "%ff", strings.Repeat("a", 5000),
	} {
		a := s.get("/tasks/" + id)
		s.refused(a, http.StatusUnprocessableEntity, `["path","id"] string_pattern_mismatch`)
		if got, want := a.message(`["path","id"]`), "must be a UUID"; got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	for _, path := range []string{"/tasks/", "/tasks/a/b"} {
		s.refused(s.get(path), http.StatusNotFound)
	}
}

// Errors of the store and of the dispatcher, on every operation that asks one.
func TestStoreErrors(t *testing.T) {
	t.Parallel()
	errs := []struct {
		name   string
		err    error
		status int
	}{
		{"unavailable", fmt.Errorf("insert task: %w: connection refused "+marker, task.ErrUnavailable), http.StatusServiceUnavailable},
		{"overloaded", fmt.Errorf("insert task: %w: full "+marker, task.ErrOverloaded), http.StatusTooManyRequests},
		{"deadline", fmt.Errorf("insert task: %w", http.ErrHandlerTimeout), http.StatusInternalServerError},
		{"unknown", errors.New("relation tasks does not exist " + marker), http.StatusInternalServerError},
	}
	const id = "01939e0c-5c1e-7cc1-b1a6-9d8a4d6c1a2b"
	for _, tt := range errs {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s := newService(t)
			s.store.insert = func(context.Context, *task.Task) error { return tt.err }
			s.store.get = func(context.Context, task.ID) (*task.Task, error) { return nil, tt.err }
			s.store.find = func(*task.Filter, task.Position, int) ([]*task.Task, error) { return nil, tt.err }
			s.store.counts = func() (map[task.State]task.Count, time.Duration, error) { return nil, 0, tt.err }
			s.store.explain = func(task.ID, time.Duration) (*task.Task, task.Facts, error) { return nil, task.Facts{}, tt.err }
			s.dispatcher.watch = func(task.ID) (<-chan struct{}, func(), error) { return nil, nil, tt.err }
			s.dispatcher.runNow = func(context.Context, task.ID) (task.Outcome, task.Decision, error) {
				return task.Outcome{}, task.Decision{}, tt.err
			}
			s.dispatcher.runOnce = func(context.Context, *task.Task) (task.Outcome, error) { return task.Outcome{}, tt.err }
			for i, a := range []*answer{
				s.post("/enqueue", with("labels", "{}")), s.post("/schedule", with("delay_seconds", "1")),
				s.post("/worker-endpoint", `{"task_id":"`+id+`"}`), s.post("/worker-endpoint", with("labels", "{}")), s.get("/tasks/" + id),
				s.get("/tasks/" + id + "?wait_seconds=1"), s.get("/tasks"), s.get("/tasks/counts"), s.get("/tasks/" + id + "/explain"),
			} {
				if a.status != tt.status {
					t.Errorf("got status %d, want %d: %s", a.status, tt.status, a.text)
				}
				refused := tt.status != http.StatusInternalServerError
				if got := a.header.Get("Retry-After"); slices.Contains([]string{"1", "2", "3"}, got) != refused {
					t.Errorf("got Retry-After %q, want 1 to 3 where the caller is turned away: %t", got, refused)
				}
				want := map[int]string{
					http.StatusServiceUnavailable: unavailableDetail, http.StatusTooManyRequests: overloadedDetail, http.StatusInternalServerError: internalDetail,
				}[tt.status]
				if a.detail() != want {
					t.Errorf("got detail %q, want %q", a.detail(), want)
				}
				if strings.Contains(a.text, marker) {
					t.Errorf("the answer tells the cause: %s", a.text)
				}
				if i == 0 || !refused { // of those who are turned away one a second
					s.logged(a, tt.err.Error())
				}
			}
		})
	}
}

// logged fails unless the log has one line under the answer's instance, with this cause.
func (s *service) logged(a *answer, cause string) {
	s.t.Helper()
	found := 0
	for line := range strings.Lines(s.log.String()) {
		var entry map[string]any
		if err := json.Unmarshal([]byte(line), &entry); err != nil {
			s.t.Fatalf("the log is not JSON: %s", line)
		}
		if entry["request_id"] != a.at("instance") {
			continue
		}
		found++
		if text, _ := entry["error"].(string); !strings.Contains(text, cause) {
			s.t.Errorf("the log says %q, want it to contain %q", text, cause)
		}
	}
	if found != 1 {
		s.t.Errorf("%d lines of the log have the answer's instance, want 1:\n%s", found, clipped(s.log.String()))
	}
}

// What is shown is not what is sent: the task keeps the values of its secret headers.
func TestRedactLeavesTheTask(t *testing.T) {
	t.Parallel()
	headers := map[string]string{"X-Tenant": "melodia", "Authorization": "Bearer a", "Cookie": "b"}
	want := maps.Clone(headers)
	shown := redact(headers)
	if diff := cmp.Diff(want, headers); diff != "" {
		t.Errorf("the task's headers changed (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(map[string]string{"X-Tenant": "melodia", "Authorization": redacted, "Cookie": redacted}, shown); diff != "" {
		t.Errorf("shown (-want +got):\n%s", diff)
	}
}

// Most fields of most tasks are empty, and are so in each answer.
func TestPresentDoesNotAllocate(t *testing.T) {
	var shown Task
	kept := &shown // on the heap, as an answer is
	if n := testing.AllocsPerRun(100, func() { kept.Queue, kept.Reason = present(""), present(task.Reason("")) }); n != 0 {
		t.Errorf("fields that are not there take %v allocations, want 0", n)
	}
}
