package httpapi

import (
	"encoding/json"
	"fmt"
	"maps"
	"math"
	"regexp"
	"slices"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/melodia/orchestrator/internal/task"
)

// A task as callers ask for it, change it and see it. A new field of a task is added
// here, and nowhere else in this package: to TaskRequest and spec, to Task and
// taskView, and to ChangeRequest and change where it may be changed.

// TaskRequest is the call that a caller wants made. Its limits are those of
// package task, which checks what a schema cannot say.
type TaskRequest struct {
	URL            string             `json:"url" minLength:"1" maxLength:"2048" example:"https://example.com/plays" doc:"What to call: an absolute http or https URL without user name, password or fragment, at most 2048 bytes. The target policy must allow it. It is sent as it came: only bytes that RFC 3986 does not allow at their place in path and query are percent-encoded (a % that begins no escape too), escapes stay, and nothing is normalised; Host has no default port."`
	Method         *string            `json:"method,omitempty" enum:"GET,HEAD,POST,PUT,PATCH,DELETE" example:"POST" doc:"The request method."`
	Headers        map[string]string  `json:"headers,omitempty" maxProperties:"50" example:"{\"X-Tenant\":\"melodia\"}" doc:"Headers of the call, at most 50 and 8 KiB in all. Names that the service or the connection sets are refused: Host, Content-Length, Transfer-Encoding, Connection and the other hop-by-hop names, Expect, Proxy-*, Forwarded, X-Forwarded-*, Metadata-Flavor, X-Goog-*, X-Serverless-Authorization, Orchestrator-*, Traceparent, Tracestate, Webhook-Id, Webhook-Timestamp, Webhook-Signature; also with _ or another mark for -. Names go out in the case that they have here, and none may be there twice in different ones. In a value, ${secret:name} stands for a secret that the service has: it is filled in when the call is made, over https and only for hosts that the service's settings name, and is kept nowhere. Prefer it to a secret in the request."`
	Auth           *AuthRequest       `json:"auth,omitempty" doc:"Proves to the target who calls. Only over https and for hosts that the service's settings name. Not together with a header Authorization."`
	Payload        json.RawMessage    `json:"payload,omitempty" example:"{\"song_id\":42}" doc:"The body of the call: any JSON, sent as exactly the bytes that came, with Content-Type: application/json unless headers has one. Not with GET or HEAD, not together with body or body_base64. No member of an object may be there twice. No number is too large. null is the same as leaving it out."`
	Body           *string            `json:"body,omitempty" example:"a line of text" doc:"The body of the call as text, instead of payload; sent as it is, with Content-Type: text/plain; charset=utf-8 unless headers has one."`
	BodyBase64     *string            `json:"body_base64,omitempty" example:"AAEC/w==" doc:"The body of the call as bytes, instead of payload or body: in base64 of the standard or the URL alphabet (RFC 4648 §4, §5), with or without padding, without spaces and line breaks. Its bytes are sent, with Content-Type: application/octet-stream unless headers has one."`
	TimeoutSeconds *float64           `json:"timeout_seconds,omitempty" minimum:"0.1" maximum:"1800" example:"10" doc:"Bounds a whole attempt, from dialling to the end of the response's body."`
	Retry          *RetryRequest      `json:"retry,omitempty" doc:"When a failed attempt is tried again."`
	Labels         map[string]string  `json:"labels,omitempty" maxProperties:"16" example:"{\"kind\":\"play\"}" doc:"Kept with the task and shown with it; not sent to the target. At most 16, names up to 64 and values up to 256 bytes."`
	ExpiresAt      *string            `json:"expires_at,omitempty" format:"date-time" example:"2030-12-31T23:59:59Z" doc:"No attempt starts after this moment: the task then fails with reason expired. It must not be before run_at, or before delay_seconds from now."`
	Queue          *string            `json:"queue,omitempty" maxLength:"100" pattern:"^[A-Za-z0-9._-]+$" patternDescription:"letters, digits, dots, hyphens and underscores" example:"mail" doc:"The queue whose limits the task waits for: 1 to 100 letters, digits, dots, hyphens and underscores. A queue exists from the first task that names it. Left out: no queue, and no limits; default where there is a flow_key."`
	FlowKey        *string            `json:"flow_key,omitempty" maxLength:"200" pattern:"^[!-~]+$" patternDescription:"visible ASCII characters" example:"tenant-42" doc:"Whose limits within the queue the task waits for too, and whose order it keeps: a tenant, a user, a document. 1 to 200 visible ASCII characters."`
	Priority       *task.Priority     `json:"priority,omitempty" enum:"high,normal,low" example:"high" doc:"The order within the queue: high counts as due 15 minutes earlier, low 15 minutes later. normal where it is left out. Only with queue or flow_key."`
	Completion     *CompletionRequest `json:"completion,omitempty" doc:"Lets the target answer 202 and report the end of the task later, for work that takes longer than a call should: see POST /tasks/{id}/complete. Any other 2xx is the end, as always. The task stays running meanwhile, without a slot or a connection; its queue and flow key count it. Only where the service has the setting PUBLIC_URL. Not at /worker-endpoint."`
	OnSuccess      *CallbackRequest   `json:"on_success,omitempty" doc:"Where to report that the task has succeeded. Not at /worker-endpoint."`
	OnFailure      *CallbackRequest   `json:"on_failure,omitempty" doc:"Where to report that the task has failed, for whatever reason. The end of a cancelled task is not reported. Not at /worker-endpoint."`
}

// AuthRequest asks for a token to go with the call.
type AuthRequest struct {
	Type     string  `json:"type" enum:"oidc,jwt" example:"oidc" doc:"What goes with each call, as Authorization: Bearer. oidc: an ID token of the service's own account. jwt: a token of the platform, which is made for each attempt when it begins: sub is orchestrator, and it counts for 5 minutes."`
	Audience *string `json:"audience,omitempty" minLength:"1" maxLength:"512" example:"https://plays-4fk2.run.app" doc:"For whom the token is: what the target expects in its claim aud. At most 512 bytes. Left out: scheme, host and port of url (oidc); no claim aud (jwt)."`
	Role     *string `json:"role,omitempty" minLength:"1" maxLength:"64" example:"admin" doc:"With jwt: the token's claim role. The service's settings name the roles that it may be; left out: the first of them."`
}

// RetryRequest is the retry policy of a TaskRequest; what it leaves out is the
// service's default.
type RetryRequest struct {
	For                     *string  `json:"for,omitempty" maxLength:"32" pattern:"^([0-9]{1,8}[dhms])+$" patternDescription:"a duration such as 6h, 90s, 15m, 2d or 1d12h" example:"6h" doc:"For how long retries go on after the first attempt, whatever their number: 1s to 30d. Instead of max_attempts, which is 100 then, and of max_retry_duration_seconds. max_backoff_seconds is a tenth of it at most then, and a sixtieth at least, unless it is given."`
	MaxAttempts             *int     `json:"max_attempts,omitempty" minimum:"1" maximum:"100" example:"5" doc:"How many calls are made at most, the first included."`
	MaxRetryDurationSeconds *float64 `json:"max_retry_duration_seconds,omitempty" minimum:"0" maximum:"31536000" example:"86400" doc:"No retry starts later than this after the first attempt. 0: no limit. Retrying stops when either limit is reached."`
	MinBackoffSeconds       *float64 `json:"min_backoff_seconds,omitempty" minimum:"0.01" maximum:"86400" example:"2" doc:"The wait before the first retry."`
	MaxBackoffSeconds       *float64 `json:"max_backoff_seconds,omitempty" minimum:"0.01" maximum:"86400" example:"600" doc:"The longest wait; not below min_backoff_seconds. Waits vary by 20 % in either direction."`
	MaxDoublings            *int     `json:"max_doublings,omitempty" minimum:"0" maximum:"30" example:"8" doc:"How often the wait doubles before it grows by equal steps."`
	RetryClientErrors       *bool    `json:"retry_client_errors,omitempty" example:"false" doc:"Also retry answers 400 to 499 that count as permanent otherwise."`
}

// CallbackRequest asks that the end of a task be told.
type CallbackRequest struct {
	URL     string            `json:"url" minLength:"1" maxLength:"2048" example:"https://example.com/ended" doc:"Where to POST the result. The rules are those of the task's url."`
	Headers map[string]string `json:"headers,omitempty" maxProperties:"50" example:"{\"X-Tenant\":\"melodia\"}" doc:"Headers of that call. The rules are those of the task's headers."`
}

// ScheduleRequest is a TaskRequest and a moment: run_at or delay_seconds.
type ScheduleRequest struct {
	TaskRequest
	RunAt        *string  `json:"run_at,omitempty" example:"2030-12-24T21:00:00" doc:"When: RFC 3339 with an offset (2030-12-24T21:00:00-03:00, 2030-12-25T00:00:00Z), or a local time without one together with time_zone. At most 10 years ahead; in the past means now."`
	TimeZone     *string  `json:"time_zone,omitempty" example:"America/Argentina/Buenos_Aires" doc:"The IANA time zone of a local run_at. A local time that the clocks skip means right after the gap; of two equal local times the first is meant."`
	DelaySeconds *float64 `json:"delay_seconds,omitempty" minimum:"0" maximum:"315360000" example:"60" doc:"When: this long from now, instead of run_at."`
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

// flow returns the queue and the flow key that the request names; "" where it names none.
func (r *TaskRequest) flow() (queue, flowKey string) {
	set(&queue, r.Queue)
	set(&flowKey, r.FlowKey)
	return queue, flowKey
}

// spec returns the request in the domain's terms, with defaults for what it leaves out.
func (r *TaskRequest) spec(defaults task.Spec) (s task.Spec, errs task.Errors) {
	s = defaults
	s.URL, s.Headers, s.Labels = r.URL, r.Headers, r.Labels
	s.OnSuccess, s.OnFailure = (*task.Callback)(r.OnSuccess), (*task.Callback)(r.OnFailure) // CallbackRequest is a Callback with texts for callers
	set(&s.Method, r.Method)
	set(&s.Queue, r.Queue)
	set(&s.FlowKey, r.FlowKey)
	set(&s.Priority, r.Priority)
	content, errs := readContent(r.Payload, r.Body, r.BodyBase64)
	s.Body, s.ContentType = content.Body, content.ContentType
	if r.Auth != nil {
		errs = append(errs, r.Auth.spec(&s)...)
	}
	s.Completion = r.Completion.domain()
	setDuration(&s.Timeout, r.TimeoutSeconds)
	if r.ExpiresAt != nil {
		var err error // the schema's format lets some pass that RFC 3339 does not
		if s.ExpiresAt, err = task.ParseRunAt(*r.ExpiresAt, nil); err != nil || s.ExpiresAt.IsZero() {
			errs = append(errs, task.FieldError{Path: []string{"expires_at"}, Message: wantTime, Kind: "datetime_parsing"})
		}
	}
	if p := r.Retry; p != nil {
		change, found := p.change()
		s.Retry = change.In(s.Retry)
		errs = slices.Concat(errs, found, change.CheckFor(s.Retry))
	}
	return s, errs
}

// change returns the request in the domain's terms.
func (r *RetryRequest) change() (c task.RetryChange, errs task.Errors) {
	c.For, errs = retryFor(r.For, r.MaxAttempts != nil, r.MaxRetryDurationSeconds != nil)
	c.MaxAttempts, c.MaxRetryDuration = r.MaxAttempts, duration(r.MaxRetryDurationSeconds)
	c.MinBackoff, c.MaxBackoff = duration(r.MinBackoffSeconds), duration(r.MaxBackoffSeconds)
	c.MaxDoublings, c.RetryClientErrors = r.MaxDoublings, r.RetryClientErrors
	return c, errs
}

// retryFor returns the duration that a member for gives; nil where it is left out or wrong.
// The others say which members are there that it stands in place of.
func retryFor(text *string, maxAttempts, maxDuration bool) (d *time.Duration, errs task.Errors) {
	if text == nil {
		return nil, nil
	}
	mistake := func(message, kind, field string) {
		errs = append(errs, task.FieldError{Path: []string{"retry", field}, Message: message, Kind: kind})
	}
	if maxAttempts {
		mistake("must not be there together with for: the time decides then, and not the number of attempts", "conflict", "max_attempts")
	}
	if maxDuration {
		mistake("must not be there together with for, which says the same", "conflict", "max_retry_duration_seconds")
	}
	length, ok := task.ParseRetryFor(*text)
	if !ok {
		mistake("must be a duration such as 6h, 90s, 15m, 2d or 1d12h", "invalid", "for")
	}
	if errs != nil {
		return nil, errs
	}
	return &length, nil
}

// spec sets what the call of s, whose URL is set, is to carry.
func (a *AuthRequest) spec(s *task.Spec) (errs task.Errors) {
	if a.Type == authJWT {
		s.JWT = new(task.JWT)
		set(&s.JWT.Audience, a.Audience)
		set(&s.JWT.Role, a.Role)
		return nil
	}
	s.OIDCAudience = task.DefaultAudience(s.URL)
	set(&s.OIDCAudience, a.Audience)
	if a.Role != nil {
		errs = append(errs, task.FieldError{Path: []string{"auth", "role"}, Message: "must not be there with type oidc: an ID token has none", Kind: "conflict"})
	}
	return errs
}

// The types of auth.
const (
	authOIDC = "oidc"
	authJWT  = "jwt"
)

// notZone matches what LoadLocation takes but no zone of the IANA database:
// UTC by no name, this machine's own zone, and zones that count leap seconds.
var notZone = regexp.MustCompile(`^(|Local|localtime|posixrules|Factory|(right|posix)/.*)$`)

// when returns the moment that the request names: at once.
func (*TaskRequest) when() (task.When, task.Errors) { return task.When{}, nil }

// when returns the moment that the request names.
func (r *ScheduleRequest) when() (task.When, task.Errors) {
	mistake := func(field, message, kind string) (task.When, task.Errors) {
		return task.When{}, task.Errors{{Path: []string{field}, Message: message, Kind: kind}}
	}
	switch {
	case r.RunAt == nil && r.DelaySeconds == nil:
		return mistake("run_at", "is required, or delay_seconds instead of it", "missing")
	case r.RunAt != nil && r.DelaySeconds != nil:
		return mistake("delay_seconds", "must not be there together with run_at", "conflict")
	case r.TimeZone != nil && r.RunAt == nil:
		return mistake("time_zone", "goes with run_at only", "conflict")
	case r.DelaySeconds != nil:
		var when task.When
		setDuration(&when.Delay, r.DelaySeconds)
		return when, nil
	}
	var zone *time.Location
	if r.TimeZone != nil {
		var err error
		if zone, err = time.LoadLocation(*r.TimeZone); err != nil || notZone.MatchString(*r.TimeZone) {
			return mistake("time_zone", "must be a name of the IANA time zone database, like America/Argentina/Buenos_Aires", "invalid")
		}
	}
	at, err := task.ParseRunAt(*r.RunAt, zone)
	if err != nil {
		return mistake("run_at", err.Error(), "datetime_parsing")
	}
	return task.When{At: at}, nil
}

// ChangeRequest is what is to be different about a pending task; what it leaves
// out stays. A pointer to a nil pointer is null, which clears the field.
type ChangeRequest struct {
	RunAt          *string            `json:"run_at,omitempty" example:"2030-12-24T21:00:00" doc:"When it is due next, as in /schedule."`
	TimeZone       *string            `json:"time_zone,omitempty" example:"America/Argentina/Buenos_Aires" doc:"The IANA time zone of a local run_at."`
	DelaySeconds   *float64           `json:"delay_seconds,omitempty" minimum:"0" maximum:"315360000" example:"60" doc:"When it is due next: this long from now, instead of run_at."`
	Headers        map[string]*string `json:"headers,omitempty" example:"{\"X-Tenant\":\"melodia\",\"X-Old\":null}" doc:"Headers to set, by name in either case; null takes one away, and the others stay. A value that reads back as [redacted] cannot be sent back: leave it out to keep it."`
	Payload        json.RawMessage    `json:"payload,omitempty" example:"{\"song_id\":42}" doc:"The body of the call from now on, whole; its members are not merged. null: none."`
	Body           **string           `json:"body,omitempty" nullable:"true" example:"a line of text" doc:"The body of the call from now on as text, instead of payload. null: none."`
	BodyBase64     **string           `json:"body_base64,omitempty" nullable:"true" example:"AAEC/w==" doc:"The body of the call from now on as bytes in base64, as in /enqueue, instead of payload or body. null: none."`
	TimeoutSeconds *float64           `json:"timeout_seconds,omitempty" minimum:"0.1" maximum:"1800" example:"10" doc:"Bounds a whole attempt."`
	Retry          *RetryChange       `json:"retry,omitempty" doc:"The retry policy; what it leaves out stays."`
	Labels         map[string]*string `json:"labels,omitempty" example:"{\"kind\":\"play\",\"old\":null}" doc:"Labels to set, by name; null takes one away, and the others stay."`
	ExpiresAt      **string           `json:"expires_at,omitempty" format:"date-time" nullable:"true" example:"2030-12-31T23:59:59Z" doc:"No attempt starts after this moment. null: it never expires."`
	Queue          **string           `json:"queue,omitempty" maxLength:"100" pattern:"^[A-Za-z0-9._-]+$" patternDescription:"letters, digits, dots, hyphens and underscores" nullable:"true" example:"mail" doc:"The queue that it waits in from now on. The queue's defaults do not reach it any more. null: none, or default while it has a flow_key."`
	FlowKey        **string           `json:"flow_key,omitempty" maxLength:"200" pattern:"^[!-~]+$" patternDescription:"visible ASCII characters" nullable:"true" example:"tenant-42" doc:"Its flow key from now on. null: none."`
	Priority       *task.Priority     `json:"priority,omitempty" enum:"high,normal,low" example:"high" doc:"The order within the queue."`
}

// RetryChange is what is to be different about a retry policy.
type RetryChange RetryRequest

// change returns the request in the domain's terms.
func (r *ChangeRequest) change() (c task.Change, errs task.Errors) {
	c = task.Change{Headers: r.Headers, Labels: r.Labels, Timeout: duration(r.TimeoutSeconds)}
	for name, value := range r.Headers {
		if value != nil && *value == redacted && task.IsSecretHeader(name) {
			errs = append(errs, task.FieldError{Path: []string{"headers", name}, Kind: "redacted",
				Message: "is shown as [redacted] and cannot be sent back like that: leave it out to keep its value"})
		}
	}
	if r.Payload != nil || r.Body != nil || r.BodyBase64 != nil {
		content, found := readContent(r.Payload, orNull(r.Body), orNull(r.BodyBase64))
		c.Content, errs = &content, append(errs, found...)
	}
	if p := r.Retry; p != nil {
		var found task.Errors
		c.Retry, found = (*RetryRequest)(p).change()
		errs = append(errs, found...)
	}
	if r.RunAt != nil || r.TimeZone != nil || r.DelaySeconds != nil {
		when, found := (&ScheduleRequest{RunAt: r.RunAt, TimeZone: r.TimeZone, DelaySeconds: r.DelaySeconds}).when()
		c.When, errs = &when, append(errs, found...)
	}
	c.Queue, c.FlowKey, c.Priority = orEmpty(r.Queue), orEmpty(r.FlowKey), r.Priority
	if r.ExpiresAt != nil {
		c.ExpiresAt = new(time.Time)
	}
	if text := orNull(r.ExpiresAt); text != nil {
		var err error
		if *c.ExpiresAt, err = task.ParseRunAt(*text, nil); err != nil || c.ExpiresAt.IsZero() {
			errs = append(errs, task.FieldError{Path: []string{"expires_at"}, Message: wantTime, Kind: "datetime_parsing"})
		}
	}
	return c, errs
}

// orNull is the text of a field that null clears; nil where it is null or left out.
func orNull(field **string) *string {
	if field == nil {
		return nil
	}
	return *field
}

// orEmpty is the text of a field, empty where it is null; nil where it is left out.
func orEmpty(field **string) *string {
	if field == nil {
		return nil
	}
	return orZero(field)
}

// duration is seconds in the domain's terms; nil stays nil.
func duration(seconds *float64) *time.Duration {
	if seconds == nil {
		return nil
	}
	d := new(time.Duration)
	setDuration(d, seconds)
	return d
}

// Task is a stored task and its attempts.
type Task struct {
	ID             string            `json:"id" format:"uuid" example:"01939e0c-5c1e-7cc1-b1a6-9d8a4d6c1a2b" doc:"UUID, version 7."`
	State          task.State        `json:"state" enum:"pending,running,succeeded,failed,cancelled" example:"pending" doc:"pending waits for run_at, the first time or for a retry. failed is the dead letter."`
	URL            string            `json:"url" example:"https://example.com/plays" doc:"What is called."`
	Method         string            `json:"method" example:"POST" doc:"The request method."`
	Headers        map[string]string `json:"headers" example:"{\"X-Tenant\":\"melodia\"}" doc:"Headers of the call. Values of secret ones (Authorization, Cookie, X-Api-Key and their like) read [redacted]."`
	Auth           *Auth             `json:"auth" doc:"What goes with the call as Authorization. Null: nothing does."`
	Labels         map[string]string `json:"labels" example:"{\"kind\":\"play\"}" doc:"Labels."`
	RunAt          Timestamp         `json:"run_at" example:"2026-12-25T00:00:00.000000Z" doc:"When it is due next, or was due last."`
	CreatedAt      Timestamp         `json:"created_at" example:"2026-11-24T12:00:00.000000Z" doc:"When it was stored."`
	ExpiresAt      Timestamp         `json:"expires_at" nullable:"true" example:"2026-12-31T23:59:59.000000Z" doc:"No attempt starts after it. Null: never."`
	TimeoutSeconds float64           `json:"timeout_seconds" example:"10" doc:"Bounds a whole attempt."`
	Retry          Retry             `json:"retry" doc:"The retry policy in force."`
	AttemptCount   int               `json:"attempt_count" example:"0" doc:"Ended attempts that count towards max_attempts: all since the last redrive but those that were interrupted or snoozed."`
	FinishedAt     Timestamp         `json:"finished_at" nullable:"true" example:"2026-12-25T00:00:01.000000Z" doc:"When it ended. Null until then."`
	Reason         *task.Reason      `json:"reason" enum:"attempts_exhausted,retry_duration_exhausted,client_error,expired,target_refused" example:"attempts_exhausted" doc:"Why it failed. Null unless it did. client_error is a 4xx that is not retried, a redirect, or any answer with Orchestrator-Retry: never. target_refused: the service's settings do not admit the target, or not that it is sent the task's ID token or secrets."`
	// Null once the task has ended: then the cancellation was carried out, or came too late.
	CancelRequestedAt Timestamp      `json:"cancel_requested_at" nullable:"true" example:"2026-12-25T00:00:00.500000Z" doc:"Since when it is being cancelled while its call is still under way. Null otherwise."`
	OnSuccess         *Callback      `json:"on_success" doc:"Where its success is reported. Null: nowhere."`
	OnFailure         *Callback      `json:"on_failure" doc:"Where its failure is reported. Null: nowhere."`
	CreatedBy         *string        `json:"created_by" example:"plays@melodia.app" doc:"The caller that submitted it: the name of an API key, or an email. Null where callers are not known."`
	PayloadBytes      int            `json:"payload_bytes" example:"14" doc:"The size of the call's body, as payload, body or body_base64 gave it. 0: it is empty, or there is none."`
	ContentType       *string        `json:"content_type" example:"application/json" doc:"The Content-Type of the call's body. Null: it has no body."`
	ParentID          *string        `json:"parent_id" format:"uuid" example:"01939e0c-5c1e-7cc1-b1a6-9d8a4d6c1a2a" doc:"The task whose call led to this one: it was submitted with that task's Orchestrator-Task-Id. Of a callback: the task that ended. Null: none."`
	RootID            *string        `json:"root_id" format:"uuid" example:"01939e0c-5c1e-7cc1-b1a6-9d8a4d6c1a29" doc:"The first task of the chain that parent_id belongs to. Null without a parent."`
	Queue             *string        `json:"queue" example:"mail" doc:"The queue whose limits it waits for. Null: none; the task is a plain one."`
	FlowKey           *string        `json:"flow_key" example:"tenant-42" doc:"Whose limits within the queue it waits for too. Null: none."`
	Priority          *task.Priority `json:"priority" enum:"high,normal,low" example:"normal" doc:"The order within the queue. Null: it has none."`
	Completion        *Completion    `json:"completion,omitzero" doc:"How long its target may take that answers 202. Left out: its answer is the end."`
	// False unless it is running.
	AwaitingCompletion bool            `json:"awaiting_completion,omitzero" example:"false" doc:"Whether its target has taken it with a 202, and has not reported its end yet. Left out: no."`
	Result             json.RawMessage `json:"result,omitzero" example:"{\"song_id\":42}" doc:"With what its target completed it: any JSON, as the bytes that came. Left out: nothing."`
	Attempts           []Attempt       `json:"attempts" nullable:"false" doc:"What was tried, oldest first: the last 200, of a task that was redriven again and again."`
	// At most one of these is there. payload comes last of all: see encodeWithBody.
	Payload    json.RawMessage `json:"payload,omitzero" example:"{\"song_id\":42}" doc:"With include=payload: the body of the call, where it came as payload; the same bytes."`
	Body       *string         `json:"body,omitzero" example:"a line of text" doc:"With include=payload: the body of the call, where it came as body."`
	BodyBase64 *string         `json:"body_base64,omitzero" example:"AAEC/w==" doc:"With include=payload: the body of the call, where it came as body_base64: in the standard alphabet, with padding."`
}

// Auth says which token goes with a task's call.
type Auth struct {
	Type     string  `json:"type" enum:"oidc,jwt" example:"oidc" doc:"oidc: an ID token of the service's own account. jwt: a token of the platform."`
	Audience *string `json:"audience" example:"https://plays-4fk2.run.app" doc:"For whom the token is. Null: it does not say."`
	Role     *string `json:"role" example:"admin" doc:"The role that was asked for. Null: the first one of the settings, and none in an ID token."`
}

// Retry is a retry policy in force.
type Retry struct {
	MaxAttempts             int     `json:"max_attempts" example:"14" doc:"How many calls are made at most, the first included."`
	MaxRetryDurationSeconds float64 `json:"max_retry_duration_seconds" example:"0" doc:"No retry starts later than this after the first attempt. 0: no limit."`
	MinBackoffSeconds       float64 `json:"min_backoff_seconds" example:"1" doc:"The wait before the first retry."`
	MaxBackoffSeconds       float64 `json:"max_backoff_seconds" example:"3600" doc:"The longest wait."`
	MaxDoublings            int     `json:"max_doublings" example:"16" doc:"How often the wait doubles before it grows by equal steps."`
	RetryClientErrors       bool    `json:"retry_client_errors" example:"false" doc:"Whether permanent answers 400 to 499 are retried too."`
}

// Callback is where the end of a task is reported.
type Callback struct {
	URL     string            `json:"url" example:"https://example.com/ended" doc:"Where the result is POSTed."`
	Headers map[string]string `json:"headers" example:"{\"X-Tenant\":\"melodia\"}" doc:"Headers of that call. Values of secret ones read [redacted]."`
}

// Attempt is one ended attempt.
type Attempt struct {
	Round             int       `json:"round" example:"1" doc:"1 until the first redrive, and 1 more after each."`
	Number            int       `json:"number" example:"1" doc:"1 for the first of a round. An attempt that was interrupted or snoozed does not count: the next one has the same number."`
	StartedAt         Timestamp `json:"started_at" example:"2026-12-25T00:00:00.001200Z" doc:"When it began."`
	DurationSeconds   float64   `json:"duration_seconds" example:"0.084" doc:"How long it took."`
	Outcome           task.Kind `json:"outcome" enum:"succeeded,retryable,permanent,snoozed,interrupted,lost" example:"retryable" doc:"What it came to. snoozed: the target asked with Orchestrator-Snooze to be called later. interrupted: a shutdown or a cancellation cut the call off, and the target may have got it; or the service lacked file descriptors, memory, local ports or name servers, and the target was not called. lost: the instance that made it vanished, or the target that had taken the task reported nothing for too long."`
	StatusCode        *int      `json:"status_code" example:"503" doc:"The target's answer. Null when none came."`
	Error             *string   `json:"error" example:"the target answered 503 Service Unavailable" doc:"What went wrong. After a success it is null, or tells what did not change it: the answer's body broke off, or the request was sent twice."`
	ResponseExcerpt   *string   `json:"response_excerpt" example:"try again later" doc:"The first 4 KiB of the response's body. Null when it was empty."`
	RetryAfterSeconds *float64  `json:"retry_after_seconds" example:"30" doc:"The wait that the target asked for with Retry-After. Null when it did not."`
}

// taskView is a task as callers see it.
func taskView(t *task.Task) *Task {
	v := &Task{
		ID:                 t.ID.String(),
		State:              t.State,
		URL:                t.URL,
		Method:             t.Method,
		Headers:            redact(t.Headers),
		Labels:             t.Labels,
		RunAt:              Timestamp(t.RunAt),
		CreatedAt:          Timestamp(t.CreatedAt),
		ExpiresAt:          Timestamp(t.ExpiresAt),
		TimeoutSeconds:     t.Timeout.Seconds(),
		Retry:              retryView(t.Retry),
		Auth:               authView(&t.Spec),
		AttemptCount:       t.AttemptCount,
		FinishedAt:         Timestamp(t.FinishedAt),
		Reason:             present(t.Reason),
		OnSuccess:          callbackView(t.OnSuccess),
		OnFailure:          callbackView(t.OnFailure),
		CreatedBy:          present(t.CreatedBy),
		CancelRequestedAt:  Timestamp(t.CancelRequestedAt),
		PayloadBytes:       t.BodyBytes,
		ContentType:        present(contentType(t)),
		ParentID:           idView(t.ParentID),
		RootID:             idView(t.RootID),
		Queue:              present(t.Queue),
		FlowKey:            present(t.FlowKey),
		Priority:           present(t.Priority),
		Completion:         completionView(t.Completion),
		AwaitingCompletion: t.Awaiting,
		Result:             t.Result,
		Attempts:           make([]Attempt, len(t.Attempts)),
	}
	for i, at := range t.Attempts {
		v.Attempts[i] = Attempt{
			Round:             at.Round,
			Number:            at.Number,
			StartedAt:         Timestamp(at.StartedAt),
			DurationSeconds:   at.Duration.Seconds(),
			Outcome:           at.Outcome,
			StatusCode:        present(at.StatusCode),
			Error:             present(at.Error),
			ResponseExcerpt:   present(at.ResponseExcerpt),
			RetryAfterSeconds: present(at.RetryAfter.Seconds()),
		}
	}
	return v
}

// idView returns the text of id, and nil for the zero ID, which stands for no task.
func idView(id task.ID) *string {
	if id == (task.ID{}) {
		return nil
	}
	text := id.String()
	return &text
}

func authView(s *task.Spec) *Auth {
	switch {
	case s.JWT != nil:
		return &Auth{Type: authJWT, Audience: present(s.JWT.Audience), Role: present(s.JWT.Role)}
	case s.OIDCAudience != "":
		return &Auth{Type: authOIDC, Audience: &s.OIDCAudience}
	}
	return nil
}

func callbackView(c *task.Callback) *Callback {
	if c == nil {
		return nil
	}
	return &Callback{URL: c.URL, Headers: redact(c.Headers)}
}

func retryView(p task.RetryPolicy) Retry {
	return Retry{
		MaxAttempts:             p.MaxAttempts,
		MaxRetryDurationSeconds: p.MaxRetryDuration.Seconds(),
		MinBackoffSeconds:       p.MinBackoff.Seconds(),
		MaxBackoffSeconds:       p.MaxBackoff.Seconds(),
		MaxDoublings:            p.MaxDoublings,
		RetryClientErrors:       p.RetryClientErrors,
	}
}

// present is nil for the zero value, which these fields never have when they mean something.
func present[T comparable](v T) *T {
	var zero T
	if v == zero {
		return nil
	}
	there := v // v itself would be allocated where it is zero, too
	return &there
}

// redacted stands for the value of a secret header.
const redacted = "[redacted]"

// redact returns headers with the values of secret ones hidden: where there are none of these,
// headers itself.
func redact(headers map[string]string) map[string]string {
	shown, copied := headers, false
	for name := range headers {
		if !task.IsSecretHeader(name) {
			continue
		}
		if !copied {
			shown, copied = maps.Clone(headers), true
		}
		shown[name] = redacted
	}
	return shown
}

// Timestamp is a moment as every answer shows it: UTC, with microseconds. The
// zero Timestamp is null.
type Timestamp time.Time

// MarshalJSONTo is json.MarshalerTo.
func (t Timestamp) MarshalJSONTo(e *jsontext.Encoder) error {
	if time.Time(t).IsZero() {
		return e.WriteToken(jsontext.Null)
	}
	b := append(e.AvailableBuffer(), '"')
	return e.WriteValue(append(task.AppendTime(b, time.Time(t)), '"'))
}

// Schema is huma.SchemaProvider.
func (Timestamp) Schema(huma.Registry) *huma.Schema {
	return &huma.Schema{Type: huma.TypeString, Format: "date-time"}
}

// documentTask completes what the document says of tasks.
func (a *API) documentTask() {
	a.documentDefaults()
	callback := Callback{URL: "https://example.com/ended", Headers: map[string]string{"X-Tenant": "melodia"}}
	for property, example := range map[string]any{
		"auth": Auth{Type: authOIDC, Audience: present("https://plays-4fk2.run.app")}, "on_success": callback, "on_failure": callback,
		"completion": Completion{TimeoutSeconds: 3600, HeartbeatSeconds: new(60.0)},
	} {
		p := a.registry.Map()["Task"].Properties[property]
		*p = huma.Schema{
			Description: p.Description,
			OneOf:       []*huma.Schema{{Ref: p.Ref}, {Type: "null"}}, // huma has no word for an object or null
			Examples:    []any{example},
		}
	}
}

// documentDefaults says in words which values the settings give to what a request
// leaves out. The keyword default would have generated clients send those values,
// or demand them of their callers (openapi-typescript 7 makes such a member
// required), although another instance's settings may differ.
func (a *API) documentDefaults() {
	set := func(schema, property string, value any) {
		p := a.registry.Map()[schema].Properties[property]
		p.Description += fmt.Sprintf(" Default: %v.", value)
	}
	for _, schema := range []string{"TaskRequest", "ScheduleRequest", "BatchTask"} {
		set(schema, "timeout_seconds", a.Defaults.Timeout.Seconds())
		set(schema, "method", "POST")
	}
	retry := retryView(a.Defaults.Retry)
	set("RetryRequest", "max_attempts", retry.MaxAttempts)
	set("RetryRequest", "max_retry_duration_seconds", retry.MaxRetryDurationSeconds)
	set("RetryRequest", "min_backoff_seconds", retry.MinBackoffSeconds)
	set("RetryRequest", "max_backoff_seconds", retry.MaxBackoffSeconds)
	set("RetryRequest", "max_doublings", retry.MaxDoublings)
	set("RetryRequest", "retry_client_errors", retry.RetryClientErrors)
}

func set[T any](field *T, value *T) {
	if value != nil {
		*field = *value
	}
}

func setDuration(field *time.Duration, seconds *float64) {
	if seconds != nil {
		*field = time.Duration(math.Round(*seconds * float64(time.Second)))
	}
}
