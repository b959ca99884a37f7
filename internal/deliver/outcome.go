package deliver

import (
	"bytes"
	"context"
	"errors"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/melodia/orchestrator/internal/credentials"
	"github.com/melodia/orchestrator/internal/task"
)

// failed returns the outcome of a call that ended with err. missing says what had
// not come when the timeout was over.
func failed(ctx context.Context, c task.Call, start time.Time, err error, missing string) task.Outcome {
	switch {
	// Not asked of err: a dial that meets its deadline says so a little before its context does.
	case time.Since(start) >= c.Task.Timeout:
		seconds := strconv.FormatFloat(c.Task.Timeout.Seconds(), 'f', -1, 64)
		return task.Outcome{Kind: task.OutcomeRetryable, TimedOut: true, Error: missing + " within " + seconds + " s"}
	case ctx.Err() != nil:
		return task.Outcome{Kind: task.OutcomeInterrupted, Error: "the call was called off before it ended"}
	}
	if e, ok := errors.AsType[*credentials.Error](err); ok {
		if e.Refused() {
			return task.Outcome{Kind: task.OutcomePermanent, Refused: true, Error: e.Error()}
		}
		return task.Outcome{Kind: task.OutcomeRetryable, Error: e.Error()}
	}
	if errors.Is(err, errRefused) {
		return task.Outcome{Kind: task.OutcomePermanent, Refused: true, Error: errRefused.Error()}
	}
	return task.Outcome{Kind: task.OutcomeRetryable, Error: describe(err)}
}

// statusError says in words what the target answered; "" for 2xx.
func statusError(resp *http.Response) string {
	code := resp.StatusCode
	switch {
	case code < 100 || code > 999:
		return "the answer is not valid HTTP"
	case code/100 == 2:
		return ""
	}
	// Not resp.Status, whose text is the target's.
	text := strings.TrimSpace("the target answered " + strconv.Itoa(code) + " " + http.StatusText(code))
	if value := resp.Header.Get("Location"); code/100 == 3 && value != "" {
		// Encoded as a URL of ours is, it reads back as it came.
		if location, err := resp.Request.URL.Parse(task.EncodeURL(value)); err == nil {
			location.User, location.RawQuery, location.ForceQuery, location.Fragment, location.RawFragment = nil, "", false, "", ""
			if location.Opaque != "" {
				location.Opaque = "…"
			}
			shown := strings.ReplaceAll(location.String(), url.PathEscape(credentials.Redacted), credentials.Redacted) // the mark is ours
			text += " and points to " + clip(shown) + "; redirects are not followed"
		}
	}
	return text
}

// clip makes s fit for an error: no control characters, at most 200 bytes.
func clip(s string) string {
	const limit = 200
	var b strings.Builder
	for _, r := range s {
		if !strconv.IsPrint(r) {
			r = utf8.RuneError
		}
		if b.Len()+utf8.RuneLen(r) > limit {
			return b.String() + "…"
		}
		b.WriteRune(r)
	}
	return b.String()
}

// retryAfter reads Retry-After (RFC 9110 §10.2.3): seconds, or a date. The date
// is compared with the target's own Date, so that no two clocks are; now, by the
// database's clock, stands in where there is none. What cannot be read is zero.
func retryAfter(h http.Header, now time.Time) time.Duration {
	value := h.Get("Retry-After")
	if value == "" {
		return 0
	}
	if strings.Trim(value, "0123456789") == "" {
		seconds, err := strconv.ParseInt(value, 10, 64)
		if err != nil || seconds > int64(task.MaxRetryAfter/time.Second) {
			return task.MaxRetryAfter
		}
		return time.Duration(seconds) * time.Second
	}
	at, err := http.ParseTime(value)
	if err != nil {
		return 0
	}
	if date, err := http.ParseTime(h.Get("Date")); err == nil {
		now = date
	}
	return min(max(at.Sub(now), 0), task.MaxRetryAfter)
}

// excerpt turns the start of a body into valid UTF-8 without NUL, at most
// [excerptBytes] long; U+FFFD stands where something else was. A full b is
// taken for cut off, so a rune that breaks off at its end is left out.
func excerpt(b []byte) string {
	if len(b) == excerptBytes {
		for i := len(b) - 1; i >= len(b)-utf8.UTFMax; i-- {
			if utf8.RuneStart(b[i]) {
				if !utf8.FullRune(b[i:]) {
					b = b[:i]
				}
				break
			}
		}
	}
	if utf8.Valid(b) && bytes.IndexByte(b, 0) < 0 {
		return string(b)
	}
	var s strings.Builder
	for len(b) > 0 {
		r, size := utf8.DecodeRune(b)
		if r == 0 {
			r = utf8.RuneError
		}
		if s.Len()+utf8.RuneLen(r) > excerptBytes {
			break
		}
		s.WriteRune(r)
		b = b[size:]
	}
	return s.String()
}
