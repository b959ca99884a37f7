package task_test

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"maps"
	"math"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/melodia/orchestrator/internal/task"
)

// submission is what New takes.
type submission struct {
	task.Spec
	task.When
	now time.Time
}

func (s submission) new() (*task.Task, error) {
	return task.New(task.ID{1}, s.Spec, s.When, s.now)
}

// submissionOf returns a legal submission that change has altered.
func submissionOf(change func(*submission)) submission {
	s := submission{
		Spec: task.Spec{
			URL:         "https://api.example.com/v1/jobs?id=7",
			Method:      "POST",
			Headers:     map[string]string{"X-Tenant": "melodia"},
			Body:        []byte(`{"user_id":7}`),
			ContentType: "application/json",
			Timeout:     30 * time.Second,
			Retry:       task.DefaultRetryPolicy(),
			Labels:      map[string]string{"team": "billing"},
		},
		now: began,
	}
	if change != nil {
		change(&s)
	}
	return s
}

// broken returns "path kind" of every rule that s breaks.
func broken(t *testing.T, s submission) (rules []string) {
	t.Helper()
	made, err := s.new()
	if (made == nil) != (err != nil) {
		t.Errorf("New = %v, %v; want either a task or an error", made, err)
	}
	var errs task.Errors
	if err != nil && !errors.As(err, &errs) {
		t.Errorf("New: %v is not of type Errors", err)
	}
	for _, e := range errs {
		rules = append(rules, strings.Join(e.Path, ".")+" "+e.Kind)
	}
	return rules
}

func TestNew(t *testing.T) {
	t.Parallel()
	s := submissionOf(func(s *submission) {
		s.ExpiresAt = began.Add(48 * time.Hour)
		s.At = began.Add(24 * time.Hour)
	})
	got, err := s.new()
	want := &task.Task{ID: task.ID{1}, Spec: s.Spec, State: task.Pending, RunAt: s.At, BodyBytes: len(s.Body)}
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Errorf("New: %v; (-want +got)\n%s", err, diff)
	}
	got, err = submissionOf(func(s *submission) { s.Delay = time.Minute }).new()
	if err != nil || !got.RunAt.IsZero() || got.Delay != time.Minute {
		t.Errorf("New: %v; run_at %v, delay %v; want a delay of 1m", err, got.RunAt, got.Delay)
	}
}

func TestDefaultRetryPolicy(t *testing.T) {
	t.Parallel()
	want := task.RetryPolicy{MaxAttempts: 14, MinBackoff: time.Second, MaxBackoff: time.Hour, MaxDoublings: 16}
	if got := task.DefaultRetryPolicy(); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

func entries(n int) map[string]string {
	m := make(map[string]string, n)
	for i := range n {
		m[fmt.Sprintf("x-%d", i)] = "v"
	}
	return m
}

func TestRules(t *testing.T) {
	t.Parallel()
	const day = 24 * time.Hour
	type change = func(*submission)
	method := func(m string) change { return func(s *submission) { s.Method, s.Body = m, nil } }
	withBody := func(m string, body []byte) change { return func(s *submission) { s.Method, s.Body = m, body } }
	header := func(name, value string) change {
		return func(s *submission) { s.Headers = map[string]string{name: value} }
	}
	headers := func(m map[string]string) change { return func(s *submission) { s.Headers = m } }
	jwt := func(role, audience string) change {
		return func(s *submission) { s.JWT = &task.JWT{Role: role, Audience: audience} }
	}
	audience := func(a string) change { return func(s *submission) { s.OIDCAudience = a } }
	onSuccess := func(url string, headers map[string]string) change {
		return func(s *submission) { s.OnSuccess = &task.Callback{URL: url, Headers: headers} }
	}
	onFailure := func(url string, headers map[string]string) change {
		return func(s *submission) { s.OnFailure = &task.Callback{URL: url, Headers: headers} }
	}
	label := func(name, value string) change {
		return func(s *submission) { s.Labels = map[string]string{name: value} }
	}
	timeout := func(d time.Duration) change { return func(s *submission) { s.Timeout = d } }
	attempts := func(n int) change { return func(s *submission) { s.Retry.MaxAttempts = n } }
	duration := func(d time.Duration) change { return func(s *submission) { s.Retry.MaxRetryDuration = d } }
	backoffs := func(shortest, longest time.Duration) change {
		return func(s *submission) { s.Retry.MinBackoff, s.Retry.MaxBackoff = shortest, longest }
	}
	doublings := func(n int) change { return func(s *submission) { s.Retry.MaxDoublings = n } }
	at := func(moment time.Time) change { return func(s *submission) { s.At = moment } }
	delay := func(d time.Duration) change { return func(s *submission) { s.Delay = d } }
	expires := func(moment time.Time) change { return func(s *submission) { s.ExpiresAt = moment } }
	expiresAndAt := func(expires, at time.Time) change {
		return func(s *submission) { s.ExpiresAt, s.At = expires, at }
	}
	const (
		badMethod    = "method invalid"
		badBody      = "method conflict"
		badHeader    = "headers invalid"
		badValue     = "headers.X-A invalid"
		badAudience  = "auth.audience invalid"
		badRole      = "auth.role invalid"
		badLabel     = "labels invalid"
		badTimeout   = "timeout_seconds out_of_range"
		badAttempts  = "retry.max_attempts out_of_range"
		badDuration  = "retry.max_retry_duration_seconds out_of_range"
		badMin       = "retry.min_backoff_seconds out_of_range"
		badMax       = "retry.max_backoff_seconds out_of_range"
		badDoublings = "retry.max_doublings out_of_range"
		badRunAt     = "run_at out_of_range"
		badDelay     = "delay_seconds out_of_range"
		badExpiry    = "expires_at out_of_range"
	)
	for _, tt := range []struct {
		name   string
		change change
		want   []string // none: accepted
	}{
		{"nothing wrong", nil, nil},
		{"nothing optional", func(s *submission) { s.Headers, s.Body, s.ContentType, s.Labels = nil, nil, "", nil }, nil},

		{"GET", method("GET"), nil},
		{"HEAD", method("HEAD"), nil},
		{"POST", method("POST"), nil},
		{"PUT", method("PUT"), nil},
		{"PATCH", method("PATCH"), nil},
		{"DELETE", method("DELETE"), nil},
		{"no method", method(""), []string{badMethod}},
		{"lower-case method", method("post"), []string{badMethod}},
		{"CONNECT", method("CONNECT"), []string{badMethod}},
		{"OPTIONS", method("OPTIONS"), []string{badMethod}},
		{"TRACE", method("TRACE"), []string{badMethod}},
		{"two lines of a request", method("GET / HTTP/1.1\r\nX: "), []string{badMethod}},
		{"GET with a body", withBody("GET", []byte("x")), []string{badBody}},
		{"HEAD with a body", withBody("HEAD", []byte("x")), []string{badBody}},
		{"GET with an empty body", withBody("GET", []byte{}), []string{badBody}},
		{"DELETE with a body", withBody("DELETE", []byte("x")), nil},
		{"POST with an empty body", withBody("POST", []byte{}), nil},

		{"50 headers", headers(entries(50)), nil},
		{"51 headers", headers(entries(51)), []string{"headers too_long"}},
		{"8 KiB of headers", header("X-A", strings.Repeat("v", 8<<10-3)), nil},
		{"8 KiB of headers and a byte", header("X-A", strings.Repeat("v", 8<<10-2)), []string{"headers too_long"}},
		{"8 KiB in two", headers(map[string]string{"a": strings.Repeat("v", 4<<10), "b": strings.Repeat("v", 4<<10-1)}), []string{"headers too_long"}},
		{"names count towards 8 KiB", header(strings.Repeat("n", 8<<10+1), ""), []string{"headers too_long"}},
		{"every token character", header("!#$%&'*+-.^_`|~09azAZ", "v"), nil},
		{"empty header name", header("", "v"), []string{badHeader}},
		{"header name with a space", header("X A", "v"), []string{badHeader}},
		{"header name with a colon", header("X-A:", "v"), []string{badHeader}},
		{"header name with a line feed", header("X-A\n", "v"), []string{badHeader}},
		{"header name with a slash", header("X/A", "v"), []string{badHeader}},
		{"header name not in ASCII", header("X-Ä", "v"), []string{badHeader}},
		{"header name with NUL", header("X\x00A", "v"), []string{badHeader}},
		{"header name with DEL", header("X\x7fA", "v"), []string{badHeader}},
		{"header name that is not UTF-8", header("X\xffA", "v"), []string{badHeader}},
		{"no header value", header("X-A", ""), nil},
		{"header value with spaces and tabs", header("X-A", "a \t b"), nil},
		{"header value not in ASCII", header("X-A", "Müller"), nil},
		{"least and greatest character", header("X-A", "!~"), nil},
		{"header value with a space before", header("X-A", " v"), []string{badValue}},
		{"header value with a tab after", header("X-A", "v\t"), []string{badValue}},
		{"header value of a space", header("X-A", " "), []string{badValue}},
		{"header value with a carriage return", header("X-A", "a\rb"), []string{badValue}},
		{"header value with a line feed", header("X-A", "a\nX-B: c"), []string{badValue}},
		{"header value with NUL", header("X-A", "a\x00b"), []string{badValue}},
		{"header value with US", header("X-A", "a\x1fb"), []string{badValue}},
		{"header value with DEL", header("X-A", "a\x7fb"), []string{badValue}},
		{"header value that is not UTF-8", header("X-A", "a\xffb"), []string{badValue}},
		{"header twice", headers(map[string]string{"X-A": "1", "x-a": "1"}), []string{"headers.x-a duplicate"}},
		{"header three times", headers(map[string]string{"X-A": "1", "X-a": "1", "x-a": "1"}), []string{"headers.X-a duplicate", "headers.x-a duplicate"}},
		{"several headers", headers(map[string]string{"B": "\n", "A": "\n", "Host": "h"}), []string{"headers.A invalid", "headers.B invalid", "headers.Host reserved"}},

		{"reference to a secret", header("X-A", "Bearer ${secret:billing-2_A}"), nil},
		{"two references", header("X-A", "${secret:a}:${secret:b}"), nil},
		{"other braces", header("X-A", "${a} $secret:a {secret:a} $ {secret:a} ${Secret:a}"), nil},
		{"reference with the longest name", header("X-A", "${secret:"+strings.Repeat("n", 64)+"}"), nil},
		{"reference with a longer name", header("X-A", "${secret:"+strings.Repeat("n", 65)+"}"), []string{badValue}},
		{"reference without a name", header("X-A", "${secret:}"), []string{badValue}},
		{"reference without an end", header("X-A", "${secret:a"), []string{badValue}},
		{"reference to a path", header("X-A", "${secret:../etc/passwd}"), []string{badValue}},
		{"reference to a folder", header("X-A", "${secret:..}"), []string{badValue}},
		{"reference to a hidden file", header("X-A", "${secret:.a}"), []string{badValue}},
		{"reference to a name not in ASCII", header("X-A", "${secret:é}"), []string{badValue}},
		{"reference in a reference", header("X-A", "${secret:${secret:a}}"), []string{badValue}},
		{"second reference without an end", header("X-A", "${secret:a} ${secret:b"), []string{badValue}},

		{"audience", audience("https://plays.melodia.app"), nil},
		{"audience in any script", audience("équipe"), nil},
		{"audience of 512 bytes", audience(strings.Repeat("a", 512)), nil},
		{"audience of 513 bytes", audience(strings.Repeat("a", 513)), []string{badAudience}},
		{"audience with a space", audience("a b"), []string{badAudience}},
		{"audience with a line feed", audience("a\n"), []string{badAudience}},
		{"audience that is not UTF-8", audience("\xff"), []string{badAudience}},
		{"audience with other headers", func(s *submission) { s.OIDCAudience, s.Headers = "a", map[string]string{"X-Authorization": "v"} }, nil},
		{"a token of the platform", jwt("", ""), nil},
		{"role and audience of the platform", jwt(strings.Repeat("é", 32), strings.Repeat("a", 512)), nil},
		{"role of 65 bytes", jwt(strings.Repeat("r", 65), ""), []string{badRole}},
		{"role with a space", jwt("a b", "a"), []string{badRole}},
		{"role with a line feed", jwt("a\n", "a"), []string{badRole}},
		{"role that is not UTF-8", jwt("\xff", "a"), []string{badRole}},
		{"audience of the platform of 513 bytes", jwt("", strings.Repeat("a", 513)), []string{badAudience}},
		{"a token of the platform with Authorization", func(s *submission) { s.JWT, s.Headers = &task.JWT{}, map[string]string{"Authorization": "v"} }, []string{"headers.Authorization conflict"}},
		{"audience with Authorization", func(s *submission) { s.OIDCAudience, s.Headers = "a", map[string]string{"Authorization": "v"} }, []string{"headers.Authorization conflict"}},
		{"audience with authorization", func(s *submission) { s.OIDCAudience, s.Headers = "a", map[string]string{"authoriZation": "v"} }, []string{"headers.authoriZation conflict"}},

		{"16 labels", func(s *submission) { s.Labels = entries(16) }, nil},
		{"17 labels", func(s *submission) { s.Labels = entries(17) }, []string{"labels too_long"}},
		{"label name of 64 bytes", label(strings.Repeat("n", 64), "v"), nil},
		{"label name of 65 bytes", label(strings.Repeat("n", 65), "v"), []string{badLabel}},
		{"label name of 65 bytes in 64 characters", label(strings.Repeat("n", 63)+"é", "v"), []string{badLabel}},
		{"empty label name", label("", "v"), []string{badLabel}},
		{"label name with a control character", label("a\x1f", "v"), []string{badLabel}},
		{"label name with NUL", label("a\x00", "v"), []string{badLabel}},
		{"label name that is not UTF-8", label("a\xff", "v"), []string{badLabel}},
		{"label in any script", label("équipe", "請求 ✓"), nil},
		{"label value of 256 bytes", label("a", strings.Repeat("v", 256)), nil},
		{"label value of 257 bytes", label("a", strings.Repeat("v", 257)), []string{"labels.a invalid"}},
		{"empty label value", label("a", ""), nil},
		{"label value with a line feed", label("a", "v\n"), []string{"labels.a invalid"}},
		{"label value with NUL", label("a", "\x00"), []string{"labels.a invalid"}},
		{"label value with DEL", label("a", "\x7f"), []string{"labels.a invalid"}},
		{"label value that is not UTF-8", label("a", "\xff"), []string{"labels.a invalid"}},

		{"least timeout", timeout(100 * time.Millisecond), nil},
		{"timeout below", timeout(100*time.Millisecond - 1), []string{badTimeout}},
		{"greatest timeout", timeout(1800 * time.Second), nil},
		{"timeout above", timeout(1800*time.Second + 1), []string{badTimeout}},
		{"no timeout", timeout(0), []string{badTimeout}},
		{"negative timeout", timeout(math.MinInt64), []string{badTimeout}},

		{"1 attempt", attempts(1), nil},
		{"0 attempts", attempts(0), []string{badAttempts}},
		{"100 attempts", attempts(100), nil},
		{"101 attempts", attempts(101), []string{badAttempts}},
		{"no retry duration", duration(0), nil},
		{"negative retry duration", duration(-1), []string{badDuration}},
		{"retry duration of a year", duration(31536000 * time.Second), nil},
		{"retry duration above", duration(31536000*time.Second + 1), []string{badDuration}},
		{"least backoffs", backoffs(10*time.Millisecond, 10*time.Millisecond), nil},
		{"greatest backoffs", backoffs(86400*time.Second, 86400*time.Second), nil},
		{"widest backoffs", backoffs(10*time.Millisecond, 86400*time.Second), nil},
		{"min backoff below", backoffs(10*time.Millisecond-1, time.Hour), []string{badMin}},
		{"min backoff above", backoffs(86400*time.Second+1, 86400*time.Second), []string{badMin, badMax}},
		{"max backoff above", backoffs(time.Second, 86400*time.Second+1), []string{badMax}},
		{"max backoff below", backoffs(10*time.Millisecond, 10*time.Millisecond-1), []string{badMax, badMax}},
		{"min backoff above max", backoffs(time.Second, time.Second-1), []string{badMax}},
		{"no doublings", doublings(0), nil},
		{"-1 doublings", doublings(-1), []string{badDoublings}},
		{"30 doublings", doublings(30), nil},
		{"31 doublings", doublings(31), []string{badDoublings}},
		{"no policy", func(s *submission) { s.Retry = task.RetryPolicy{} }, []string{badAttempts, badMin, badMax}},

		{"now", at(began), nil},
		{"long ago", at(time.Date(0, 1, 1, 0, 0, 0, 0, time.UTC)), nil},
		{"at the horizon", at(began.Add(3650 * day)), nil},
		{"beyond the horizon", at(began.Add(3650*day + 1)), []string{badRunAt}},
		{"in the year 9999", at(time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC)), []string{badRunAt}},
		{"no delay", delay(0), nil},
		{"least delay", delay(1), nil},
		{"negative delay", delay(-1), []string{badDelay}},
		{"delay to the horizon", delay(315360000 * time.Second), nil},
		{"delay beyond the horizon", delay(315360000*time.Second + 1), []string{badDelay}},
		{"delay for ever", delay(math.MaxInt64), []string{badDelay}},

		{"expired long ago", expires(time.Date(1970, 1, 1, 0, 0, 0, 0, time.UTC)), nil},
		{"expires before 1970", expires(time.Date(1969, 12, 31, 23, 59, 59, 999_999_999, time.UTC)), []string{badExpiry}},
		{"expires late", expires(time.Date(9998, 12, 31, 23, 59, 59, 0, time.UTC)), nil},
		{"expires too late", expires(time.Date(9999, 1, 1, 0, 0, 0, 0, time.UTC)), []string{badExpiry}},
		{"expires at run_at", expiresAndAt(began.Add(day), began.Add(day)), nil},
		{"expires before run_at", expiresAndAt(began.Add(day-1), began.Add(day)), []string{"expires_at conflict"}},
		{"told of its success", onSuccess("http://ends.example.com/", nil), nil},
		{"told of its failure", onFailure("https://ends.example.com/?q=1", map[string]string{"Authorization": "Bearer ${secret:ends}"}), nil},
		{"told nowhere", onSuccess("", nil), []string{"on_success.url invalid"}},
		{"told by mail", onFailure("mailto:ends@example.com", nil), []string{"on_failure.url invalid"}},
		{"told with reserved headers", onFailure("https://ends.example.com/", map[string]string{"host": "a", "X-A": "\n"}), []string{"on_failure.headers.X-A invalid", "on_failure.headers.host reserved"}},
		{"told with too many headers", onSuccess("https://ends.example.com/", entries(task.MaxHeaders+1)), []string{"on_success.headers too_long"}},

		{"everything wrong", func(s *submission) {
			*s = submission{When: task.When{Delay: -1}, now: began}
		}, []string{"url invalid", badMethod, badTimeout, badAttempts, badMin, badMax, badDelay}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			if got := broken(t, submissionOf(tt.change)); !slices.Equal(got, tt.want) {
				t.Errorf("New breaks %q, want %q", got, tt.want)
			}
		})
	}
}

func TestURLRules(t *testing.T) {
	t.Parallel()
	const base = "https://example.com/"
	for _, u := range []string{
		"http://example.com",
		"https://example.com",
		"HTTPS://EXAMPLE.COM/",
		"https://example.com?q",
		"https://example.com/a?b=c&d=%20%23",
		"https://example.com./",
		"https://sub.example-1.com:8443/",
		"https://xn--bcher-kva.example/",
		"https://under_score.example/",
		"https://example.com/ümläut?ß=✓",
		"https://example.com//double",
		"https://example.com/a@b:c",
		"https://example.com/%zz",
		"https://example.com/?a=100%",
		"https://example.com/a|b?c[]={}",
		"https://example.com:0443/",
		"http://localhost:1/",
		"http://localhost:65535/",
		"http://192.0.2.1/",
		"http://[2001:db8::1]/",
		"http://[2001:db8::1]:8080/",
		"http://[::ffff:192.0.2.1]/",
		"http://0x7f.1/", // the target policy's to judge
		base + strings.Repeat("a", 2048-len(base)),
	} {
		if got := broken(t, submissionOf(func(s *submission) { s.URL = u })); got != nil {
			t.Errorf("URL %q breaks %q, want it accepted", u, got)
		}
	}
	for name, u := range map[string]string{
		"empty":                    "",
		"2049 bytes":               base + strings.Repeat("a", 2049-len(base)),
		"relative":                 "/v1/jobs",
		"no scheme":                "example.com/v1",
		"no scheme, port":          "example.com:80/v1",
		"scheme-relative":          "//example.com/v1",
		"opaque":                   "http:example.com",
		"one slash":                "http:/example.com",
		"ftp":                      "ftp://example.com/",
		"file":                     "file:///etc/passwd",
		"gopher":                   "gopher://example.com/",
		"javascript":               "javascript:alert(1)",
		"unix":                     "http+unix://socket/",
		"no host":                  "http://",
		"no host, path":            "http:///v1",
		"no host, port":            "http://:80/",
		"no host, query":           "http://?q",
		"user":                     "https://user@example.com/",
		"user and password":        "https://user:pass@example.com/",
		"empty user":               "https://@example.com/",
		"fragment":                 "https://example.com/#top",
		"empty fragment":           "https://example.com/#",
		"fragment before a path":   "https://example.com#@internal/",
		"port 0":                   "http://example.com:0/",
		"port 65536":               "http://example.com:65536/",
		"port of many digits":      "http://example.com:99999999999999999999/",
		"port in letters":          "http://example.com:http/",
		"negative port":            "http://example.com:-1/",
		"signed port":              "http://example.com:+80/",
		"no port after the colon":  "http://example.com:/",
		"two ports":                "http://example.com:80:80/",
		"IPv6 without brackets":    "http://2001:db8::1/",
		"IPv6 without port":        "http://[2001:db8::1]:/",
		"IPv6 not closed":          "http://[2001:db8::1/",
		"IPv6 with a zone":         "http://[fe80::1%25eth0]/",
		"IPv6 with a raw zone":     "http://[fe80::1%eth0]/",
		"IPv4 in brackets":         "http://[192.0.2.1]/",
		"name in brackets":         "http://[example.com]/",
		"nothing in brackets":      "http://[]/",
		"future address":           "http://[v1.fe80::a]/",
		"space":                    "https://example.com/a b",
		"space before":             " https://example.com/",
		"space after":              "https://example.com/ ",
		"space in the host":        "https://exam ple.com/",
		"tab":                      "https://example.com/\t",
		"line feed":                "https://example.com/\n",
		"request in the path":      "https://example.com/ HTTP/1.1\r\nHost: internal\r\n\r\n",
		"NUL":                      "https://example.com/\x00",
		"DEL":                      "https://example.com/\x7f",
		"not UTF-8":                "https://example.com/\xff",
		"backslash":                `https://example.com\@internal/`,
		"backslashes":              `https:\\example.com\`,
		"host not in ASCII":        "https://bücher.example/",
		"host of full-width dots":  "http://169。254。169。254/",
		"host of circled digits":   "http://①②⑦.0.0.1/",
		"percent in the host":      "https://example%2ecom/",
		"bytes in the host":        "https://b%C3%BCcher.example/",
		"angle brackets in a host": "http://<script>/",
		"quote in the host":        `http://"example.com"/`,
		"comma in the host":        "http://a,b/",
		"star in the host":         "http://*.example.com/",
	} {
		if got, want := broken(t, submissionOf(func(s *submission) { s.URL = u })), []string{"url invalid"}; !slices.Equal(got, want) {
			t.Errorf("%s: URL %q breaks %q, want %q", name, u, got, want)
		}
	}
}

func TestReservedHeaders(t *testing.T) {
	t.Parallel()
	for _, name := range []string{
		"Host", "Content-Length", "Transfer-Encoding", "Connection", "Keep-Alive", "TE", "Trailer", "Upgrade", "HTTP2-Settings",
		"Expect", "Proxy-Authorization", "Proxy-Authenticate", "Proxy-Connection", "Proxy-", "Forwarded",
		"X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Forwarded-Anything", "Metadata-Flavor",
		"X-Goog-Authenticated-User-Email", "X-Goog-IAP-JWT-Assertion", "X-Serverless-Authorization",
		"Orchestrator-Task-Id", "Orchestrator-Attempt", "Orchestrator-New", "Traceparent", "Tracestate",
		"Webhook-Id", "Webhook-Timestamp", "Webhook-Signature",
	} {
		for _, name := range []string{
			name, strings.ToLower(name), strings.ToUpper(name),
			strings.ReplaceAll(name, "-", "_"), strings.Replace(strings.ToLower(name), "-", "_", 1), strings.ReplaceAll(name, "-", "."),
		} {
			want := []string{"headers." + name + " reserved"}
			if got := broken(t, submissionOf(func(s *submission) { s.Headers = map[string]string{name: "v"} })); !slices.Equal(got, want) {
				t.Errorf("header %s breaks %q, want %q", name, got, want)
			}
		}
	}
	for _, name := range []string{
		"Authorization", "Cookie", "Content-Type", "Accept", "Accept-Encoding", "User-Agent", "Idempotency-Key", "X-Api-Key",
		"X-Host", "Hosts", "Proxy", "X-Forwarded", "Forwarded-For", "X-Google", "Orchestrator", "X-Orchestrator-Task-Id", "Baggage",
		"Webhook", "Webhook-Event", "X-Webhook-Id", "X_Tenant", "Content_Type", "_Host", "Hos_t",
	} {
		if got := broken(t, submissionOf(func(s *submission) { s.Headers = map[string]string{name: "v"} })); got != nil {
			t.Errorf("header %s breaks %q, want it accepted", name, got)
		}
	}
}

func TestIsSecretHeader(t *testing.T) {
	t.Parallel()
	for _, name := range []string{
		"Authorization", "X-Authorization", "X-Auth", "X-Auth-Token", "X-Amz-Security-Token", "Cookie", "Set-Cookie",
		"X-Api-Key", "X-ApiKey", "api_key", "Api-Key", "X-Access-Key", "X-Functions-Key", "Ocp-Apim-Subscription-Key",
		"X-Secret", "CF-Access-Client-Secret", "X-Password", "X-Passwd", "X-Passphrase", "X-User-Pass", "X-JWT-Assertion",
		"X-Hub-Signature-256", "X-Session-Id", "X-Credentials", "X-CSRF-Token", "Private-Token",
	} {
		for _, name := range []string{name, strings.ToLower(name), strings.ToUpper(name)} {
			if !task.IsSecretHeader(name) {
				t.Errorf("IsSecretHeader(%q) = false, want true", name)
			}
		}
	}
	for _, name := range []string{
		"", "Accept", "Accept-Language", "Content-Type", "User-Agent", "X-Tenant", "X-Request-Id", "X-Correlation-Id",
		"Idempotency-Key", "idempotency-key", "If-Match", "Date",
	} {
		if task.IsSecretHeader(name) {
			t.Errorf("IsSecretHeader(%q) = true, want false", name)
		}
	}
}

func TestErrorsText(t *testing.T) {
	t.Parallel()
	errs := task.Errors{
		{Path: []string{"retry", "max_attempts"}, Message: "must be between 1 and 100", Kind: "out_of_range"},
		{Path: []string{"url"}, Message: "must not be empty", Kind: "invalid"},
	}
	const want = "retry.max_attempts must be between 1 and 100; url must not be empty"
	if got := errs.Error(); got != want {
		t.Errorf("Error() = %q, want %q", got, want)
	}
}

func TestCheckDelay(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)
	for name, tt := range map[string]struct {
		delay   time.Duration
		expires time.Time
		early   bool
	}{
		"never expires":           {delay: time.Hour},
		"expires as it is due":    {delay: time.Hour, expires: now.Add(time.Hour)},
		"expires before":          {delay: time.Hour, expires: now.Add(time.Hour - 1), early: true},
		"expired already":         {delay: time.Nanosecond, expires: now.Add(-time.Hour), early: true},
		"expired, due at once":    {expires: now.Add(-time.Hour)},
		"expires long after that": {delay: time.Hour, expires: now.AddDate(1, 0, 0)},
	} {
		made, err := submissionOf(func(s *submission) { s.Delay, s.ExpiresAt = tt.delay, tt.expires }).new()
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		err = made.CheckDelay(now)
		if errs, ok := errors.AsType[task.Errors](err); ok != tt.early || ok && (len(errs) != 1 || errs[0].Kind != "conflict" || errs[0].Path[0] != "expires_at") {
			t.Errorf("%s: CheckDelay = %v, want an error about expires_at: %v", name, err, tt.early)
		}
	}
}

// marker stands in whatever is sent, and in no error.
const marker = "m4rk3r"

func TestErrorsDoNotTellWhatWasSent(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*submission){
		"scheme":              func(s *submission) { s.URL = marker + "://example.com/" },
		"host":                func(s *submission) { s.URL = "http://" + marker + ":99999/" },
		"port":                func(s *submission) { s.URL = "http://example.com:" + marker + "/" },
		"user":                func(s *submission) { s.URL = "http://" + marker + ":" + marker + "@example.com/" },
		"path":                func(s *submission) { s.URL = "http://example.com/" + marker + "%zz\t" },
		"query":               func(s *submission) { s.URL = "http://example.com/?" + marker + " " },
		"fragment":            func(s *submission) { s.URL = "http://example.com/#" + marker },
		"brackets":            func(s *submission) { s.URL = "http://[" + marker + "]/" },
		"long URL":            func(s *submission) { s.URL = "http://example.com/" + strings.Repeat(marker, 400) },
		"method":              func(s *submission) { s.Method = marker },
		"header value":        func(s *submission) { s.Headers = map[string]string{"X-A": marker + "\n"} },
		"reserved header":     func(s *submission) { s.Headers = map[string]string{"Host": marker} },
		"header twice":        func(s *submission) { s.Headers = map[string]string{"X-A": marker, "x-a": marker} },
		"long headers":        func(s *submission) { s.Headers = map[string]string{"X-A": strings.Repeat(marker, 2000)} },
		"header line as name": func(s *submission) { s.Headers = map[string]string{"Authorization: Bearer " + marker: ""} },
		"secret's name":       func(s *submission) { s.Headers = map[string]string{"X-A": "${secret:" + marker + "/}"} },
		"callback": func(s *submission) {
			s.OnSuccess = &task.Callback{URL: marker, Headers: map[string]string{"Host": marker}}
		},
		"role":             func(s *submission) { s.JWT = &task.JWT{Role: marker + "\n"} },
		"audience":         func(s *submission) { s.OIDCAudience = marker + "\n" },
		"label value":      func(s *submission) { s.Labels = map[string]string{"a": marker + "\n"} },
		"long label value": func(s *submission) { s.Labels = map[string]string{"a": strings.Repeat(marker, 100)} },
		"label name":       func(s *submission) { s.Labels = map[string]string{marker + "\n": ""} },
		"long label name":  func(s *submission) { s.Labels = map[string]string{strings.Repeat(marker, 20): ""} },
		"body":             func(s *submission) { s.Method, s.Body = "GET", []byte(marker) },
		"content type":     func(s *submission) { s.Method, s.ContentType = "GET", marker },
	} {
		_, err := submissionOf(change).new()
		if err == nil {
			t.Errorf("%s: accepted, want an error", name)
			continue
		}
		if text := fmt.Sprintf("%v %+v", err, err); strings.Contains(strings.ToLower(text), marker) {
			t.Errorf("%s: %s tells what was sent", name, text)
		}
	}
}

// FuzzNew holds accepted requests against net/http: it must write each of
// them, and whoever reads it must see what was asked for and nothing more.
func FuzzNew(f *testing.F) {
	f.Add("https://example.com/v1?a=b", "POST", "X-Tenant", "melodia", "team", "billing", []byte("{}"))
	f.Add("http://[2001:db8::1]:80/", "GET", "Authorization", "Bearer é", "", "\x00", []byte(nil))
	f.Add("http://example.com\\@[fe80::1%25a]:0/#", "HEAD", "X-A:", "a\r\nHost: b", "a\xff", "", []byte("x"))
	f.Add("http://ex%41mple.com:80:80", "PATCH", "host", " ", "équipe", "請求", []byte{})
	f.Fuzz(func(t *testing.T, rawURL, method, header, value, label, labelValue string, body []byte) {
		s := submissionOf(func(s *submission) {
			s.URL, s.Method, s.Body = rawURL, method, body
			s.Headers = map[string]string{header: marker + value}
			s.Labels = map[string]string{label: marker + labelValue}
		})
		made, err := s.new()
		if err != nil {
			var errs task.Errors
			if !errors.As(err, &errs) || len(errs) == 0 {
				t.Fatalf("New: %#v, want Errors", err)
			}
			for _, e := range errs {
				if len(e.Path) == 0 || e.Message == "" || e.Kind == "" {
					t.Errorf("error %+v lacks something", e)
				}
			}
			if strings.Contains(strings.ToLower(header+label), marker) || !strings.Contains(err.Error(), marker) {
				return
			}
			t.Errorf("%v tells what was sent", err)
			return
		}
		if diff := cmp.Diff(s.Spec, made.Spec); diff != "" {
			t.Errorf("New changed the request (-sent +made)\n%s", diff)
		}

		u, err := task.ParseURL(rawURL)
		if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" || u.User != nil || u.Fragment != "" || len(rawURL) > 2048 {
			t.Fatalf("URL %q accepted; parses to %+v, %v", rawURL, u, err)
		}
		sent, err := http.NewRequestWithContext(t.Context(), method, u.String(), bytes.NewReader(body))
		if err != nil {
			t.Fatalf("request %s %q accepted: %v", method, rawURL, err)
		}
		sent.Header.Set(header, marker+value)
		var wire bytes.Buffer
		if err := sent.Write(&wire); err != nil {
			t.Fatalf("request %s %q accepted, cannot be written: %v", method, rawURL, err)
		}
		read, err := http.ReadRequest(bufio.NewReader(&wire))
		if err != nil {
			t.Fatalf("request %s %q accepted, cannot be read: %v", method, rawURL, err)
		}
		if read.Method != method || read.Host != u.Host || read.RequestURI != u.RequestURI() {
			t.Errorf("sent %s %q, read %s %s %s", method, rawURL, read.Method, read.Host, read.RequestURI)
		}
		if got := read.Header.Values(header); !slices.Equal(got, []string{marker + value}) {
			t.Errorf("header %q: sent %q, read %q", header, marker+value, got)
		}
		for name := range maps.Keys(read.Header) {
			if !strings.EqualFold(name, header) && name != "User-Agent" && name != "Content-Length" {
				t.Errorf("header %q came along with %q", name, header)
			}
		}
	})
}

func BenchmarkNew(b *testing.B) {
	s := submissionOf(func(s *submission) {
		s.Headers = map[string]string{"X-Tenant": "melodia", "Authorization": "Bearer abc", "Accept": "application/json"}
	})
	b.ReportAllocs()
	for b.Loop() {
		if _, err := s.new(); err != nil {
			b.Fatal(err)
		}
	}
}
