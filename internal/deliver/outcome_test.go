package deliver

import (
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/melodia/orchestrator/internal/task"
)

func TestRetryAfter(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 12, 24, 21, 0, 0, 0, time.UTC)
	const date = "Thu, 24 Dec 2026 21:00:00 GMT"
	tests := []struct {
		name, value, date string
		want              time.Duration
	}{
		{"absent", "", date, 0},
		{"seconds", "120", date, 2 * time.Minute},
		{"zero", "0", date, 0},
		{"leading zeros", "007", date, 7 * time.Second},
		{"the cap", "86400", date, task.MaxRetryAfter},
		{"above the cap", "86401", date, task.MaxRetryAfter},
		{"beyond a Duration", "9223372036854775807", date, task.MaxRetryAfter},
		{"beyond an int64", strings.Repeat("9", 40), date, task.MaxRetryAfter},
		{"negative", "-5", date, 0},
		{"signed", "+5", date, 0},
		{"fraction", "1.5", date, 0},
		{"a word", "soon", date, 0},
		{"a date", "Thu, 24 Dec 2026 21:01:30 GMT", date, 90 * time.Second},
		{"a date in the old form", "Thursday, 24-Dec-26 21:01:30 GMT", date, 90 * time.Second},
		{"a date in C's form", "Thu Dec 24 21:01:30 2026", date, 90 * time.Second},
		{"a date in the past", "Thu, 24 Dec 2026 20:00:00 GMT", date, 0},
		{"a date far ahead", "Thu, 24 Dec 2099 21:00:00 GMT", date, task.MaxRetryAfter},
		{"measured on the target's clock", "Thu, 24 Dec 2020 10:00:10 GMT", "Thu, 24 Dec 2020 10:00:00 GMT", 10 * time.Second},
		{"a date without Date", "Thu, 24 Dec 2026 21:00:05 GMT", "", 5 * time.Second},
		{"a date with a bad Date", "Thu, 24 Dec 2026 21:00:05 GMT", "yesterday", 5 * time.Second},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			h := http.Header{}
			h.Set("Retry-After", tt.value)
			h.Set("Date", tt.date)
			if got := retryAfter(h, now); got != tt.want {
				t.Errorf("retryAfter(%q, Date %q) = %v, want %v", tt.value, tt.date, got, tt.want)
			}
		})
	}
}

func FuzzRetryAfter(f *testing.F) {
	f.Add("120", "")
	f.Add("Thu, 24 Dec 2026 21:01:30 GMT", "Thu, 24 Dec 2026 21:00:00 GMT")
	f.Add("Fri, 31 Dec 9999 23:59:59 GMT", "Mon, 01 Jan 0001 00:00:00 GMT")
	f.Add("-1", "x")
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	f.Fuzz(func(t *testing.T, value, date string) {
		got := retryAfter(http.Header{"Retry-After": {value}, "Date": {date}}, now)
		if got < 0 || got > task.MaxRetryAfter {
			t.Errorf("retryAfter(%q, Date %q) = %v, want 0 to %v", value, date, got, task.MaxRetryAfter)
		}
	})
}

func TestExcerpt(t *testing.T) {
	t.Parallel()
	fill := strings.Repeat("x", excerptBytes)
	tests := []struct{ name, in, want string }{
		{"empty", "", ""},
		{"text", "Grüße, 世界 🎵", "Grüße, 世界 🎵"},
		{"NUL", "a\x00b", "a\uFFFDb"},
		{"bad bytes", "a\xff\xfeb", "a\uFFFD\uFFFDb"},
		{"lone surrogate", "a\xed\xa0\x80b", "a\uFFFD\uFFFD\uFFFDb"},
		{"ends within a rune", "a\xe4\xb8", "a\uFFFD\uFFFD"},
		{"full", fill, fill},
		{"cut within a rune of two bytes", fill[1:] + "ü"[:1], fill[1:]},
		{"cut within a rune of three bytes", fill[2:] + "世"[:2], fill[2:]},
		{"cut within a rune of four bytes", fill[3:] + "🎵"[:3], fill[3:]},
		{"full, ends with a rune", fill[4:] + "🎵", fill[4:] + "🎵"},
		{"full, ends with a bad byte", fill[1:] + "\xff", fill[1:]},
		{"full of bad bytes", strings.Repeat("\xff", excerptBytes), strings.Repeat("\uFFFD", excerptBytes/3)},
		{"full of continuations", strings.Repeat("\x80", excerptBytes), strings.Repeat("\uFFFD", excerptBytes/3)},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			if got := excerpt([]byte(tt.in)); got != tt.want {
				t.Errorf("excerpt of %d bytes = %q (%d bytes), want %q (%d bytes)", len(tt.in), got, len(got), tt.want, len(tt.want))
			}
		})
	}
}

func FuzzExcerpt(f *testing.F) {
	f.Add([]byte("Grüße, 世界 🎵"))
	f.Add([]byte("a\x00\xffb\xed\xa0\x80"))
	f.Add([]byte(strings.Repeat("🎵", excerptBytes/4)))
	f.Fuzz(func(t *testing.T, b []byte) {
		b = b[:min(len(b), excerptBytes)]
		// The end of a full buffer is where a rune may be cut.
		for _, in := range [][]byte{b, append(make([]byte, excerptBytes-len(b), excerptBytes), b...)} {
			got := excerpt(in)
			if !utf8.ValidString(got) || strings.Contains(got, "\x00") || len(got) > excerptBytes {
				t.Errorf("excerpt(%q) = %q (%d bytes), want at most %d bytes of valid UTF-8 without NUL", in, got, len(got), excerptBytes)
			}
			if len(in) < excerptBytes && utf8.Valid(in) && !strings.Contains(string(in), "\x00") && got != string(in) {
				t.Errorf("excerpt(%q) = %q, want it unchanged", in, got)
			}
		}
	})
}

func TestStatusError(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name     string
		code     int
		location string
		want     string
	}{
		{"200", 200, "", ""},
		{"299", 299, "", ""},
		{"503", 503, "", "the target answered 503 Service Unavailable"},
		{"unknown code", 599, "", "the target answered 599"},
		{"304", 304, "", "the target answered 304 Not Modified"},
		{"absolute", 302, "http://u:p@169.254.169.254/a?b=c#d", "the target answered 302 Found and points to http://169.254.169.254/a; redirects are not followed"},
		{"relative", 308, "../new?b=c", "the target answered 308 Permanent Redirect and points to https://plays.melodia.app/new; redirects are not followed"},
		{"without scheme", 301, "//u:p@other.example/", "the target answered 301 Moved Permanently and points to https://other.example/; redirects are not followed"},
		{"only a query", 303, "?b=c", "the target answered 303 See Other and points to https://plays.melodia.app/a/b; redirects are not followed"},
		{"not for the web", 302, "mailto:me@melodia.app?subject=x", "the target answered 302 Found and points to mailto:…; redirects are not followed"},
		{"not a URL", 302, "http://[::1", "the target answered 302 Found"},
		{"location without redirect", 404, "http://other.example/", "the target answered 404 Not Found"},
		{"codes that are none", 12, "", "the answer is not valid HTTP"},
		{"negative", -7, "", "the answer is not valid HTTP"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			if got := statusError(response(tt.code, tt.location)); got != tt.want {
				t.Errorf("statusError(%d, %q) = %q, want %q", tt.code, tt.location, got, tt.want)
			}
		})
	}
}

func response(code int, location string) *http.Response {
	return &http.Response{
		StatusCode: code,
		Status:     "302 \x1b[31mhacked\r\n",
		Header:     http.Header{"Location": {location}},
		Request:    &http.Request{URL: &url.URL{Scheme: "https", Host: "plays.melodia.app", Path: "/a/b", RawQuery: "token=s3cret"}},
	}
}

func FuzzStatusError(f *testing.F) {
	for _, s := range []string{"http://u:p@h/a?b#c", "\x1b[31m", "javascript:alert(1)", "http://h/%0d%0a", "http://h/\u202e", "//", "?s3cret", strings.Repeat("ü", 300)} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, location string) {
		got := statusError(response(302, location))
		if len(got) > 300 || !utf8.ValidString(got) || strings.ContainsFunc(got, func(r rune) bool { return r < ' ' || r == 0x7f }) {
			t.Errorf("statusError with location %q = %q, want one short printable line", location, got)
		}
		if strings.ContainsAny(got, "?#") || strings.Contains(got, "token") && !strings.Contains(location, "token") {
			t.Errorf("statusError with location %q = %q, want no query and no fragment", location, got)
		}
	})
}
