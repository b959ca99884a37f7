// Package http1 sends HTTP/1.1 requests over connections that it keeps, and reads
// the answers (RFC 9110, RFC 9112). It knows nothing of tasks.
//
// It is not net/http's client, for two reasons. That client sends a request again
// where a kept connection ends, POST too where it has an Idempotency-Key; here a
// request is sent once. And it gives each connection two goroutines: handing a small
// request to them and back costs more than the request. Here one goroutine has the
// connection to itself, and reads and writes it. What is written is plain; what comes
// back net/http reads ([http.ReadResponse]).
//
// Only HTTP/1.1 is spoken, so that each request owns its connection. Over HTTP/2
// requests share one, where they wait for each other's writes whatever their
// deadlines are. A kept connection on which bytes arrive before the next request is
// closed: they must not answer it.
//
// Nothing a host does lasts beyond the deadline of its request, and the head of an
// answer is bounded. How much of a body is read is the caller's decision.
package http1

import (
	"net/http"
	"net/url"
	"strconv"
)

// AppendStart appends the start of a request's head: its first line and the field
// Host. Fields follow ([AppendField]), then [AppendEnd]. u's scheme and host lead to the
// host, and the method is a token (RFC 9110 §5.6.2).
func AppendStart(b []byte, method string, u *url.URL) []byte {
	b = append(append(b, method...), ' ')
	b = append(append(b, u.RequestURI()...), " HTTP/1.1\r\n"...)
	return AppendField(b, "Host", u.Host)
}

// AppendField appends a field. Its name is a token, and its value has no control
// characters but tabs (RFC 9110 §5.5): AppendField checks neither.
func AppendField(b []byte, name, value string) []byte {
	b = append(append(b, name...), ": "...)
	return append(append(b, value...), "\r\n"...)
}

// AppendNumber appends a field whose value is a number.
func AppendNumber(b []byte, name string, n int) []byte {
	b = append(append(b, name...), ": "...)
	return append(strconv.AppendInt(b, int64(n), 10), "\r\n"...)
}

// AppendEnd appends the end of a request's head: Content-Length for a body of so many
// bytes, and the empty line. Without a body there is a Content-Length only where the
// method gives content a meaning (RFC 9110 §8.6).
func AppendEnd(b []byte, method string, body int) []byte {
	if body > 0 || method == http.MethodPost || method == http.MethodPut || method == http.MethodPatch {
		b = AppendNumber(b, "Content-Length", body)
	}
	return append(b, "\r\n"...)
}
