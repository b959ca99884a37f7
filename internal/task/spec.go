package task

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
	"unicode/utf8"
)

// Spec is what a caller asks for: the call to make and the rules for making it.
type Spec struct {
	// URL is kept as it was given; [ParseURL] says how it is sent.
	URL    string
	Method string
	// Headers are sent as they are, names in the case that they have here; [New]
	// admits no name twice, in whichever case.
	Headers map[string]string
	// Body is sent as it is; nil is no body.
	Body []byte
	// ContentType goes with Body where Headers names none.
	ContentType string
	// Timeout bounds a whole attempt, from dialling to the end of the response's body.
	Timeout time.Duration
	Retry   RetryPolicy
	// Labels are for finding tasks again; they are not sent.
	Labels map[string]string
	// ExpiresAt: no attempt starts after it. Zero is never.
	ExpiresAt time.Time
	// OnSuccess is called after the task has succeeded, OnFailure after it has failed; nil
	// is no callback.
	OnSuccess, OnFailure *Callback
	// OIDCAudience is for whom an ID token goes with the call, in its header
	// Authorization; empty is no token.
	OIDCAudience string
	// JWT is what a token of the platform says that goes with the call instead; nil is
	// no token.
	JWT *JWT
	// Queue and FlowKey say which limits the task waits for. Both are empty in a plain
	// task; a task with a FlowKey has a Queue.
	Queue, FlowKey string
	// Priority orders the tasks of a queue; empty in a plain task.
	Priority Priority
	// Completion lets the target take the task and report its end later; nil: its answer is
	// the end.
	Completion *Completion
}

// Callback is whom to tell how a task ended: a task of its own, which POSTs the
// result and has no callbacks itself.
type Callback struct {
	URL     string            `json:"url"`
	Headers map[string]string `json:"headers,omitempty"`
}

// JWT is what a task asks of the token that is made for each of its calls, by which
// services of the platform know each other.
type JWT struct {
	// Role is the token's role; empty is the settings' first.
	Role string `json:"role,omitempty"`
	// Audience is for whom the token is; empty makes one without the claim.
	Audience string `json:"audience,omitempty"`
}

// Limits of a task request. Texts are counted in bytes of UTF-8, not in characters.
const (
	MaxURLBytes    = 2048
	MaxHeaders     = 50
	MaxHeaderBytes = 8 << 10 // all names and values together
	MaxAudience    = 512     // bytes
	MaxRole        = 64      // bytes
	MaxLabels      = 16
	MaxLabelName   = 64   // bytes
	MaxLabelValue  = 256  // bytes
	MaxBatch       = 1000 // tasks that are stored together
	MinTimeout     = 100 * time.Millisecond
	MaxTimeout     = 30 * time.Minute
	// Horizon is how far ahead a task may be scheduled.
	Horizon = 10 * 365 * 24 * time.Hour
)

// methods are the request methods that a task may use.
var methods = []string{"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"}

// FieldError says what is wrong with one field of a request. It never holds
// the value that was sent, nor a name that the rules do not allow: it may be a
// value in the wrong place.
type FieldError struct {
	// Path leads to the field: "retry", "max_attempts".
	Path []string
	// Message completes "<field> …" and says what to do.
	Message string
	// Kind is a stable word for programs: "out_of_range", "conflict", "invalid", …
	Kind string
}

// Errors is everything that is wrong with one request.
type Errors []FieldError

// Error joins the messages, each behind its field's path.
func (e Errors) Error() string {
	parts := make([]string, len(e))
	for i, f := range e {
		parts[i] = strings.Join(f.Path, ".") + " " + f.Message
	}
	return strings.Join(parts, "; ")
}

// When says when a task is due: at a moment, or a delay after it is stored.
// The zero When is at once.
type When struct {
	At    time.Time
	Delay time.Duration
}

// New makes a pending task out of a request, or returns [Errors] with every
// rule that the request breaks. now is only compared with the [Horizon]; what
// is due is the database's to say.
func New(id ID, spec Spec, when When, now time.Time) (*Task, error) {
	var errs Errors
	add := func(message, kind string, path ...string) {
		errs = append(errs, FieldError{Path: path, Message: message, Kind: kind})
	}
	spec.completeFlow()
	spec.check(add)
	checkWhen(when, spec.ExpiresAt, now, add)
	if errs != nil {
		return nil, errs
	}
	return &Task{ID: id, Spec: spec, State: Pending, RunAt: when.At, Delay: when.Delay, BodyBytes: len(spec.Body)}, nil
}

func checkWhen(when When, expiresAt, now time.Time, add func(message, kind string, path ...string)) {
	switch {
	case when.Delay < 0:
		add("must not be negative", "out_of_range", "delay_seconds")
	case when.Delay > Horizon:
		add("must be at most 10 years (315360000)", "out_of_range", "delay_seconds")
	case when.At.After(now.Add(Horizon)):
		add("must be at most 10 years ahead", "out_of_range", "run_at")
	}
	if !expiresAt.IsZero() && (expiresAt.Year() < 1970 || expiresAt.Year() > 9998) {
		add("must be between the years 1970 and 9998", "out_of_range", "expires_at")
	}
	if !expiresAt.IsZero() && expiresAt.Before(when.At) {
		add("must not be before run_at: the task would expire before its first attempt", "conflict", "expires_at")
	}
}

// CheckDelay returns [Errors] where t, which is not stored yet, would expire before
// its first attempt: it is due a delay from now, by the store's clock. Of a task
// that is due at a moment [New] and [Task.Change] say so; one that is due at once
// is taken, and ends as expired.
func (t *Task) CheckDelay(now time.Time) error {
	if t.Delay == 0 || t.ExpiresAt.IsZero() || !t.ExpiresAt.Before(now.Add(t.Delay)) {
		return nil
	}
	return Errors{{
		Path: []string{"expires_at"}, Kind: "conflict",
		Message: "must not be before delay_seconds from now: the task would expire before its first attempt",
	}}
}

// check reports every rule that s breaks.
func (s *Spec) check(add func(message, kind string, path ...string)) {
	if message := checkURL(s.URL); message != "" {
		add(message, "invalid", "url")
	}
	if !slices.Contains(methods, s.Method) {
		add("must be one of "+strings.Join(methods, ", "), "invalid", "method")
	}
	if s.Body != nil && s.carriesNone() {
		add("GET and HEAD calls carry no payload or body; use another method or leave it out", "conflict", "method")
	}
	checkHeaders(s.Headers, add)
	s.checkAuth(add)
	s.checkFlow(add)
	s.OnSuccess.check("on_success", add)
	s.OnFailure.check("on_failure", add)
	s.Completion.check(add)
	checkLabels(s.Labels, add)
	if s.Timeout < MinTimeout || s.Timeout > MaxTimeout {
		add("must be between 0.1 and 1800", "out_of_range", "timeout_seconds")
	}
	s.Retry.check(add)
}

// check reports every rule that c, if there is one, breaks in its field.
func (c *Callback) check(field string, add func(message, kind string, path ...string)) {
	if c == nil {
		return
	}
	add = within(field, add)
	if message := checkURL(c.URL); message != "" {
		add(message, "invalid", "url")
	}
	checkHeaders(c.Headers, add)
}

// carriesNone reports that calls of this method have no body.
func (s *Spec) carriesNone() bool { return s.Method == "GET" || s.Method == "HEAD" }

func checkHeaders(headers map[string]string, add func(message, kind string, path ...string)) {
	if len(headers) == 0 {
		return // which spares most tasks what follows
	}
	size := 0
	for name, value := range headers {
		size += len(name) + len(value)
	}
	switch {
	case len(headers) > MaxHeaders:
		add("must have at most 50 entries", "too_long", "headers")
		return
	case size > MaxHeaderBytes:
		add("must be at most 8192 bytes in all, names and values together", "too_long", "headers")
		return
	}
	seen := make(map[string]bool, len(headers))
	for _, name := range slices.Sorted(maps.Keys(headers)) {
		lower := strings.ToLower(name)
		switch {
		case !isToken(name):
			add("has a name that RFC 9110 does not allow", "invalid", "headers")
		case isReserved(lower):
			add("is reserved: the service or the connection sets it", "reserved", "headers", name)
		case seen[lower]:
			add("is there twice; header names are the same in either case", "duplicate", "headers", name)
		case !IsFieldValue(headers[name]):
			add("has a value that RFC 9110 does not allow: no control characters, no space at either end", "invalid", "headers", name)
		case !areSecretReferences(headers[name]):
			add("has a reference to a secret that is not of the form ${secret:name}, with 1 to 64 letters, digits, hyphens and underscores", "invalid", "headers", name)
		}
		seen[lower] = true
	}
}

// IsRole reports whether a token may have the role: one word of text.
func IsRole(role string) bool { return role != "" && isWord(role, MaxRole) }

// isWord reports whether s is text without spaces, of at most so many bytes.
func isWord(s string, most int) bool {
	return len(s) <= most && isPlainText(s) && !strings.Contains(s, " ")
}

// checkAuth demands one word of text as the audience, and no form such as a URL: each issuer
// of tokens and each target has names of its own for audiences.
func (s *Spec) checkAuth(add func(message, kind string, path ...string)) {
	audience := s.OIDCAudience
	switch {
	case s.JWT != nil:
		audience = s.JWT.Audience
		if !isWord(s.JWT.Role, MaxRole) {
			add("must be at most 64 bytes without spaces and control characters", "invalid", "auth", "role")
		}
	case audience == "":
		return
	}
	if !isWord(audience, MaxAudience) {
		add("must be at most 512 bytes without spaces and control characters", "invalid", "auth", "audience")
	}
	for _, name := range slices.Sorted(maps.Keys(s.Headers)) {
		if strings.EqualFold(name, "Authorization") {
			add("must not be there together with auth, which sets it", "conflict", "headers", name)
		}
	}
}

func checkLabels(labels map[string]string, add func(message, kind string, path ...string)) {
	if len(labels) == 0 {
		return
	}
	if len(labels) > MaxLabels {
		add("must have at most 16 entries", "too_long", "labels")
		return
	}
	for _, name := range slices.Sorted(maps.Keys(labels)) {
		value := labels[name]
		switch {
		case name == "" || len(name) > MaxLabelName || !isPlainText(name):
			add(fmt.Sprintf("must have a name of 1 to %d bytes without control characters", MaxLabelName), "invalid", "labels")
		case len(value) > MaxLabelValue || !isPlainText(value):
			add(fmt.Sprintf("must have a value of at most %d bytes without control characters", MaxLabelValue), "invalid", "labels", name)
		}
	}
}

func isPlainText(s string) bool {
	return utf8.ValidString(s) && !strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f })
}

// isToken follows RFC 9110 §5.6.2.
func isToken(s string) bool {
	return s != "" && !strings.ContainsFunc(s, func(r rune) bool {
		return !isAlphanumeric(r) && !strings.ContainsRune("!#$%&'*+-.^_`|~", r)
	})
}

func isAlphanumeric(r rune) bool {
	return 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9'
}

// IsFieldValue follows RFC 9110 §5.5: visible characters, obs-text, and spaces
// and tabs between them.
func IsFieldValue(s string) bool {
	if strings.Trim(s, " \t") != s {
		return false
	}
	for i := range len(s) {
		if c := s[i]; c < ' ' && c != '\t' || c == 0x7f {
			return false
		}
	}
	return utf8.ValidString(s)
}

// reservedHeaders are set by the service, belong to the connection (RFC 9110
// §7.6.1) or mark a caller as trusted on Google Cloud. In lower case.
var reservedHeaders = map[string]bool{
	"host": true, "content-length": true, "transfer-encoding": true, "connection": true,
	"keep-alive": true, "te": true, "trailer": true, "upgrade": true, "http2-settings": true,
	"expect": true, "forwarded": true, "metadata-flavor": true, "x-serverless-authorization": true,
	"traceparent": true, "tracestate": true,
	// Signed or not: what is stored today may be called when signing is on.
	"webhook-id": true, "webhook-timestamp": true, "webhook-signature": true,
}

var reservedPrefixes = []string{"proxy-", "x-forwarded-", "x-goog-", "orchestrator-"}

// isReserved also counts spellings with other marks for a hyphen: targets behind
// CGI, WSGI or PHP see X_Forwarded_For and X-Forwarded-For under one name
// (RFC 3875 §4.1.18), and some servers map every mark to the underscore.
func isReserved(lower string) bool {
	name := strings.Map(func(r rune) rune {
		if isAlphanumeric(r) {
			return r
		}
		return '-'
	}, lower)
	return reservedHeaders[name] || slices.ContainsFunc(reservedPrefixes, func(prefix string) bool {
		return strings.HasPrefix(name, prefix)
	})
}

// secretWords mark a header whose value is a credential. In lower case.
var secretWords = []string{
	"auth", "cookie", "token", "secret", "pass", "key", "jwt", "credential", "signature", "session",
}

// IsSecretHeader reports whether the values of headers of this name are kept
// out of every answer, log and error. It errs on the side of silence.
func IsSecretHeader(name string) bool {
	lower := strings.ToLower(name)
	return lower != "idempotency-key" && slices.ContainsFunc(secretWords, func(word string) bool {
		return strings.Contains(lower, word)
	})
}
