package http1

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// seen is what a host reads of a request.
type seen struct {
	Method, URI, Host string
	Header            http.Header
	Body              string
	Length            int64
}

// pipe dials a host that is served by serve over a connection in memory, so that no
// byte is on its way unread. The host ends the connection when serve returns.
func pipe(serve func(r *bufio.Reader, w io.Writer)) (dial func(context.Context, string, string) (net.Conn, error), served chan struct{}) {
	served = make(chan struct{})
	return func(context.Context, string, string) (net.Conn, error) {
		ours, theirs := net.Pipe()
		go func() {
			defer close(served)
			defer theirs.Close()
			serve(bufio.NewReader(theirs), theirs)
		}()
		return ours, nil
	}, served
}

// byNetHTTP sends a request with net/http's client, which adds nothing of its own.
func byNetHTTP(t testing.TB, dial func(context.Context, string, string) (net.Conn, error), method string, body []byte, fields ...string) (*http.Response, string, error) {
	t.Helper()
	transport := &http.Transport{DialContext: dial, DisableCompression: true, MaxResponseHeaderBytes: maxHeaderBytes}
	defer transport.CloseIdleConnections()
	r, err := http.NewRequestWithContext(t.Context(), method, "http://h.example/a%2Fb?c=d", bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	r.Header["User-Agent"] = nil
	for i := 0; i < len(fields); i += 2 {
		r.Header[fields[i]] = append(r.Header[fields[i]], fields[i+1])
	}
	resp, err := transport.RoundTrip(r)
	if err != nil {
		return nil, "", err
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusSwitchingProtocols {
		return resp, "", nil
	}
	b, err := io.ReadAll(resp.Body)
	return resp, string(b), err
}

// byPool sends the same request over a pool's connection.
func byPool(t testing.TB, dial func(context.Context, string, string) (net.Conn, error), method string, body []byte, fields ...string) (*http.Response, string, error) {
	t.Helper()
	p := NewPool(Options{Dial: dial})
	defer p.Close()
	return answered(t, p, method, "http://h.example/a%2Fb?c=d", body, fields...)
}

type sender func(testing.TB, func(context.Context, string, string) (net.Conn, error), string, []byte, ...string) (*http.Response, string, error)

// A host reads the same request as from net/http's client, whatever its method,
// fields and body are.
func TestRequestsAreNetHTTPs(t *testing.T) {
	t.Parallel()
	read := func(t testing.TB, send sender, method string, body []byte, fields []string) (got seen) {
		dial, served := pipe(func(r *bufio.Reader, w io.Writer) {
			req, err := http.ReadRequest(r)
			if err != nil {
				return
			}
			b, err := io.ReadAll(req.Body)
			if err != nil || r.Buffered() > 0 {
				return
			}
			got = seen{req.Method, req.RequestURI, req.Host, req.Header, string(b), req.ContentLength}
			io.WriteString(w, "HTTP/1.1 204 No Content\r\n\r\n")
		})
		if resp, _, err := send(t, dial, method, body, fields...); err != nil || resp.StatusCode != 204 {
			t.Fatalf("%s with %d bytes and %q: %v", method, len(body), fields, err)
		}
		<-served
		return got
	}
	name := rapid.StringMatching(`X-[!#$%&'*+.^_|~0-9a-zA-Z-]{1,20}`)
	value := rapid.StringMatching("([!-~\u0080-\u00ff]([ \t!-~\u0080-\u00ff]{0,20}[!-~\u0080-\u00ff])?)?")
	rapid.Check(t, func(r *rapid.T) {
		method := rapid.SampledFrom([]string{"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"}).Draw(r, "method")
		body := rapid.SliceOfN(rapid.Byte(), 0, 100).Draw(r, "body")
		if rapid.Bool().Draw(r, "large") {
			body = bytes.Repeat(append(body, 'x'), 2*backgroundBody)
		}
		var fields []string
		for n, v := range rapid.MapOfN(name, value, 0, 5).Draw(r, "fields") {
			fields = append(fields, n, v)
		}
		want := read(t, byNetHTTP, method, body, fields)
		if diff := cmp.Diff(want, read(t, byPool, method, body, fields)); diff != "" {
			r.Errorf("%s with %d bytes and %q (-net/http +ours):\n%s", method, len(body), fields, diff)
		}
	})
}

// compareAnswers has a host answer a request with text and end the connection. What
// comes back must be what net/http's client returns.
func compareAnswers(t *testing.T, method string, text []byte) (status int) {
	t.Helper()
	send := func(send sender) (*http.Response, string, error) {
		dial, served := pipe(func(r *bufio.Reader, w io.Writer) {
			if readRequest(r) == nil {
				_, _ = w.Write(text)
			}
		})
		resp, body, err := send(t, dial, method, nil)
		<-served
		return resp, body, err
	}
	wantResp, wantBody, wantErr := send(byNetHTTP)
	gotResp, gotBody, gotErr := send(byPool)
	switch {
	case (gotResp == nil) != (wantResp == nil), (gotErr == nil) != (wantErr == nil):
		t.Fatalf("%s answered by %.300q: %v, %v; net/http: %v, %v", method, text, gotResp != nil, gotErr, wantResp != nil, wantErr)
	case gotResp == nil:
		return 0
	case gotResp.StatusCode != wantResp.StatusCode, gotResp.Proto != wantResp.Proto, gotResp.ContentLength != wantResp.ContentLength, gotBody != wantBody,
		!maps.EqualFunc(gotResp.Header, wantResp.Header, func(a, b []string) bool { return fmt.Sprint(a) == fmt.Sprint(b) }):
		t.Fatalf("%s answered by %.300q: %d %s %v %d %.100q; net/http: %d %s %v %d %.100q", method, text,
			gotResp.StatusCode, gotResp.Proto, gotResp.Header, gotResp.ContentLength, gotBody,
			wantResp.StatusCode, wantResp.Proto, wantResp.Header, wantResp.ContentLength, wantBody)
	}
	return gotResp.StatusCode
}

// answers are answers of hosts, right and wrong, with the status that counts; 0: none.
var answers = []struct {
	text   string
	status int
}{
	{"", 0},
	{answerOK, 200},
	{"HTTP/1.1 200 OK\r\n\r\nuntil the end", 200},
	{"HTTP/1.0 404 No\r\n\r\nuntil the end", 404},
	{"HTTP/1.1 204 No Content\r\nContent-Length: 3\r\n\r\nabc", 204},
	{"HTTP/1.1 304 Not Modified\r\nContent-Length: 3\r\n\r\n", 304},
	{"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort", 200},
	{"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nlong", 200},
	{"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", 0},
	{"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", 0},
	{"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX: y\r\n\r\n", 200},
	{"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 9\r\n\r\n3\r\nabc\r\n0\r\n\r\n", 200},
	{"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nx\r\nabc", 200},
	{"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 0},
	{"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc", 200},
	{"HTTP/1.1 100 Continue\r\n\r\n" + answerOK, 200},
	{"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 199 X\r\n\r\nHTTP/1.1 500 X\r\nContent-Length: 0\r\n\r\n", 500},
	{"HTTP/1.1 103 Early Hints\r\n\r\n", 0},
	{"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\nraw", 101},
	{"HTTP/1.1 099 X\r\n\r\n", 99},
	{"HTTP/1.1 2000 X\r\n\r\n", 0},
	{"HTTP/1.1 200\r\n\r\n", 200},
	{"HTTP/1.1 200 OK\nContent-Length: 1\n\na", 200},
	{"HTTP/1.1 200 OK\r\nA: b\r\n c\r\nContent-Length: 0\r\n\r\n", 200},
	{"HTTP/1.1 200 OK\r\nA : b\r\n\r\n", 200},
	{"HTTP/1.1 200 OK\r\nnone\r\n\r\n", 0},
	{"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 1\r\n\r\na", 200},
	{"HTTP/2.0 200 OK\r\n\r\na", 200},
	{"220 smtp.example ready\r\n", 0},
	{"\x15\x03\x01\x00\x02\x02\x16", 0},
	{"HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", maxHeaderBytes) + "\r\n\r\n", 0},
	{"HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", maxHeaderBytes-100) + "\r\nContent-Length: 1\r\n\r\na", 200},
}

func TestAnswersAreNetHTTPs(t *testing.T) {
	t.Parallel()
	for _, tt := range answers {
		for _, method := range []string{"GET", "HEAD", "POST"} {
			if got := compareAnswers(t, method, []byte(tt.text)); got != tt.status {
				t.Errorf("%s answered by %.100q: status %d, want %d", method, tt.text, got, tt.status)
			}
		}
	}
}

func FuzzAnswer(f *testing.F) {
	for _, tt := range answers {
		f.Add(false, []byte(tt.text))
	}
	f.Add(true, []byte(answerOK))
	f.Fuzz(func(t *testing.T, head bool, text []byte) {
		if len(text) > maxHeaderBytes/2 {
			return // the table has what is near the bound of a head
		}
		method := http.MethodGet
		if head {
			method = http.MethodHead
		}
		compareAnswers(t, method, text)
	})
}
