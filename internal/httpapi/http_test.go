package httpapi

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/melodia/orchestrator/internal/httpserver"
	"github.com/melodia/orchestrator/internal/task"
)

// submissions are the endpoints that take a body.
var submissions = []string{"/enqueue", "/schedule", "/worker-endpoint"}

func TestMalformed(t *testing.T) {
	t.Parallel()
	tests := []struct{ name, body, detail string }{
		{"no JSON", marker, "The body is not valid JSON, at byte 0."},
		{"truncated in an object", `{"url":"` + marker + `"`, "The body ends in the middle of its JSON, at byte"},
		{"truncated in a string", `{"url":"` + marker, "The body ends in the middle of its JSON, at byte"},
		{"truncated in a literal", `{"url":nul`, "The body ends in the middle of its JSON, at byte"},
		{"only space", "  \n ", "The body ends in the middle of its JSON"},
		{"trailing data", with("payload", "1") + marker, "The body is not valid JSON, at byte"},
		{"two values", with("payload", "1") + with("payload", "1"), "The body is not valid JSON, at byte"},
		{"trailing comma", `{"url":"` + marker + `",}`, "The body is not valid JSON, at byte"},
		{"single quotes", `{'url':'` + marker + `'}`, "The body is not valid JSON, at byte"},
		{"comment", `{/*` + marker + `*/"url":"x"}`, "The body is not valid JSON, at byte"},
		{"byte order mark", "\ufeff" + with("payload", "1"), "The body is not valid JSON, at byte 0."},
		{"NaN", with("timeout_seconds", "NaN"), "The body is not valid JSON, at byte"},
		{"infinity", with("timeout_seconds", "-Infinity"), "The body is not valid JSON, at byte"},
		{"hexadecimal", with("timeout_seconds", "0x10"), "The body is not valid JSON, at byte"},
		{"leading zero", with("timeout_seconds", "010"), "The body is not valid JSON, at byte"},
		{"leading plus", with("timeout_seconds", "+1"), "The body is not valid JSON, at byte"},
		{"no fraction", with("timeout_seconds", "1."), "The body is not valid JSON, at byte"},
		{"control character in a string", `{"url":"` + marker + "\n" + `"}`, "The body is not valid JSON, at byte"},
		{"unknown escape", `{"url":"` + marker + `\x41"}`, "The body is not valid JSON, at byte"},
		{"member twice", `{"url":"` + marker + `","url":"` + marker + `"}`, "The body has a member twice at /url, at byte"},
		{"member twice by an escape", `{"url":"` + marker + `","\u0075rl":"` + marker + `"}`, "The body has a member twice at /url, at byte"},
		{"member twice in retry", with("retry", `{"max_attempts":1,"max_attempts":2}`), "The body has a member twice at /retry/max_attempts, at byte"},
		{"member twice in the payload", with("payload", `[{"a":{"b":1,"b":2}}]`), "The body has a member twice at /payload/0/a/b, at byte"},
		{"unknown member twice", `{"zz":1,"zz":"` + marker + `"}`, "The body has a member twice at /zz, at byte"},
		{"long member twice", `{"` + strings.Repeat("é", 1000) + `":1,"` + strings.Repeat("é", 1000) + `":2}`, `The body has a member twice at /\u00e9\u00e9`},
		{"invalid UTF-8", `{"url":"` + marker + "\xff" + `"}`, "The body is not valid UTF-8, or has half of a surrogate pair, at byte"},
		{"invalid UTF-8 in the payload", with("payload", "\"\xc3\x28\""), "The body is not valid UTF-8, or has half of a surrogate pair, at byte"},
		{"invalid UTF-8 in a name", "{\"\xff\":1}", "The body is not valid UTF-8, or has half of a surrogate pair, at byte"},
		{"encoded surrogate", "{\"url\":\"\xed\xa0\x80\"}", "The body is not valid UTF-8, or has half of a surrogate pair, at byte"},
		{"lone surrogate", `{"url":"` + marker + `\ud800"}`, "The body is not valid UTF-8, or has half of a surrogate pair, at byte"},
		{"lone surrogate in the payload", with("payload", `"\udc00"`), "The body is not valid UTF-8, or has half of a surrogate pair, at byte"},
		{"surrogates the wrong way round", with("payload", `"\udc00\ud800"`), "The body is not valid UTF-8, or has half of a surrogate pair, at byte"},
		{"UTF-16", "\xff\xfe{\x00}\x00", "The body is not valid"},
		{"nested 10,000 deep", with("payload", strings.Repeat("[", 10000)+strings.Repeat("]", 10000)), "The body is nested too deeply, at byte"},
		{"objects nested 10,000 deep", with("payload", strings.Repeat(`{"a":`, 10000)+"1"+strings.Repeat("}", 10000)), "The body is nested too deeply, at byte"},
		{"nested 500,000 deep and truncated", strings.Repeat("[", 500000), "The body is nested too deeply, at byte"},
		{"gzip", "\x1f\x8b\x08\x00\x00\x00\x00\x00", "The body is not valid"},
		{"a form", "url=https%3A%2F%2F" + marker, "The body is not valid JSON, at byte 0."},
	}
	for _, path := range submissions {
		t.Run(path, func(t *testing.T) {
			t.Parallel()
			s := newService(t)
			for _, tt := range tests {
				t.Run(tt.name, func(t *testing.T) {
					s := s.on(t)
					a := s.post(path, tt.body)
					s.refused(a, http.StatusBadRequest)
					if !strings.HasPrefix(a.detail(), tt.detail) {
						t.Errorf("got %q, want it to begin with %q", a.detail(), tt.detail)
					}
					if len(a.detail()) > 300 {
						t.Errorf("the detail is %d bytes long", len(a.detail()))
					}
				})
			}
		})
	}
}

func TestNoBody(t *testing.T) {
	t.Parallel()
	s := newService(t)
	for _, path := range submissions {
		for _, contentType := range []string{"", "application/json", "text/plain"} {
			a := s.post(path, "", "Content-Type", contentType)
			s.refused(a, http.StatusBadRequest)
			if want := "The request must have a JSON body."; a.detail() != want {
				t.Errorf("%s: got %q, want %q", path, a.detail(), want)
			}
		}
	}
}

// filled is a request to path that is n bytes long.
func filled(path string, n int) string {
	start := `{"url":"` + target + `",`
	if path == "/schedule" {
		start += `"delay_seconds":1,`
	}
	start += `"body":"`
	return start + strings.Repeat("a", n-len(start)-len(`"}`)) + `"}`
}

// A body of 1 MiB is right, one byte more is not; whether its length is
// announced or not.
func TestBodySize(t *testing.T) {
	t.Parallel()
	for _, path := range submissions {
		for _, tt := range []struct {
			size int
			fits bool
		}{{maxBody - 1, true}, {maxBody, true}, {maxBody + 1, false}, {3 * maxBody, false}} {
			for _, chunked := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s, %d bytes, chunked %t", path, tt.size, chunked), func(t *testing.T) {
					t.Parallel()
					onPipes(t, func(t *testing.T, s *service, dial func() net.Conn) {
						s = s.on(t)
						text := head(path, tt.size) + filled(path, tt.size)
						if chunked {
							text = strings.Replace(head(path, 0), "Content-Length: 0", "Transfer-Encoding: chunked", 1) +
								fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", tt.size, filled(path, tt.size))
						}
						conn := dial()
						sent := make(chan struct{})
						go func() {
							defer close(sent)
							_, _ = io.WriteString(conn, text) // the server does not read all of one that is too large
						}()
						a := s.response(conn, path)
						want := http.StatusRequestEntityTooLarge
						switch {
						case tt.fits && path == "/worker-endpoint":
							want = http.StatusOK
						case tt.fits:
							want = http.StatusAccepted
						default:
							s.nothingHappened(a)
						}
						if a.status != want {
							t.Errorf("got status %d, want %d: %s", a.status, want, clipped(a.text))
						}
						_ = conn.Close()
						<-sent
					})
				})
			}
		}
	}
}

func TestContentTypes(t *testing.T) {
	t.Parallel()
	s := newService(t)
	for _, path := range []string{"/enqueue", "/schedule"} {
		body := with("payload", "1")
		if path == "/schedule" {
			body = with("delay_seconds", "1")
		}
		for _, contentType := range []string{
			"", "application/json", "application/json; charset=utf-8", "application/json;charset=UTF-8", "application/json ; charset=utf-8",
			"Application/JSON", "application/json; x=a+b", "application/json; charset", "application/vnd.melodia+json", "application/problem+json; a=b",
		} {
			if a := s.post(path, body, "Content-Type", contentType); a.status != http.StatusAccepted {
				t.Errorf("%s, %q: got status %d, want 202: %s", path, contentType, a.status, a.text)
			}
			s.store.taken()
			s.dispatcher.taken()
		}
		for _, contentType := range []string{
			"text/plain", "text/json", "application/octet-stream", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x",
			"application/xml", "application/" + marker, "json", ";", "+", "application/jsonx", "application/x-ndjson", "a; b+json", marker + "/+;",
		} {
			a := s.post(path, body, "Content-Type", contentType)
			s.refused(a, http.StatusUnsupportedMediaType)
			if want := "The body must be JSON. Send it with the header Content-Type: application/json."; a.detail() != want {
				t.Errorf("%q: got %q, want %q", contentType, a.detail(), want)
			}
		}
	}
}

// Whatever a caller says it accepts, answers are JSON.
func TestAccept(t *testing.T) {
	t.Parallel()
	s := newService(t)
	for _, accept := range []string{
		"", "*/*", "application/json", "text/html", "application/json;q=0", "json", "application/problem+json", "application/cbor",
		"a;,b", ";", ";,", ",;", "a;q", "a;q=", "a ;q=1 , b", ";;;;,,,,", "a;q=x,b", "\ta; ,", "é;,", marker,
	} {
		if a := s.do(http.MethodPost, "/enqueue", with("payload", "1"), "Accept", accept); a.status != http.StatusAccepted || a.header.Get("Content-Type") != "application/json" {
			t.Errorf("%q: got %d %s, want 202 application/json", accept, a.status, a.header.Get("Content-Type"))
		}
		s.store.taken()
		s.dispatcher.taken()
		a := s.do(http.MethodPost, "/enqueue", "{}", "Accept", accept)
		s.refused(a, http.StatusUnprocessableEntity, `["body","url"] missing`)
	}
}

func TestUnknownPaths(t *testing.T) {
	t.Parallel()
	s := newService(t)
	for _, path := range []string{
		"/", "/" + marker, "/enqueue/", "/Enqueue", "/health/", "/health/live/", "/tasks/", "/openapi", "/openapi.json/", "/schemas/Task.json",
		"/enqueue%2f", "/%2e%2e/enqueue", "//enqueue", "/docs.html", "/" + strings.Repeat("a", 3000), "/%ff", "/%00", "/{id}", "/*",
	} {
		for _, method := range []string{"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "FETCH"} {
			if method != "HEAD" {
				a := s.do(method, path, "")
				s.refused(a, http.StatusNotFound)
				if want := "There is nothing at this path. GET /docs lists what there is."; a.detail() != want {
					t.Errorf("%s %s: got %q, want %q", method, path, a.detail(), want)
				}
				continue
			}
			if a := s.do(method, path, ""); a.status != http.StatusNotFound || a.text != "" {
				t.Errorf("HEAD %s: got %d %q, want 404 without a body", path, a.status, a.text)
			}
		}
	}
}

func TestMethodNotAllowed(t *testing.T) {
	t.Parallel()
	s := newService(t)
	for path, allow := range map[string]string{
		"/enqueue": "POST", "/schedule": "POST", "/worker-endpoint": "POST",
		"/tasks/" + storedID: "GET, HEAD, PATCH", "/tasks/a%2Fb": "GET, HEAD, PATCH",
		"/tasks/" + storedID + "/cancel": "POST", "/tasks/" + storedID + "/run": "POST", "/tasks/" + storedID + "/redrive": "POST",
		"/health": "GET, HEAD", "/health/live": "GET, HEAD", "/docs": "GET, HEAD", "/docs/": "GET, HEAD",
		"/docs/index.html": "GET, HEAD", "/openapi.json": "GET, HEAD", "/openapi.yaml": "GET, HEAD",
	} {
		for _, method := range []string{"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "FETCH"} {
			if strings.Contains(allow, method) {
				continue
			}
			a := s.do(method, path, "")
			if a.status != http.StatusMethodNotAllowed {
				t.Errorf("%s %s: got status %d, want 405", method, path, a.status)
			}
			if got := a.header.Get("Allow"); got != allow {
				t.Errorf("%s %s: got Allow %q, want %q", method, path, got, allow)
			}
			if want := "This path does not take this method, only " + allow + "."; method != "HEAD" && a.detail() != want {
				t.Errorf("%s %s: got %q, want %q", method, path, a.detail(), want)
			}
			s.nothingHappened(a)
		}
	}
}

func TestHead(t *testing.T) {
	t.Parallel()
	s := newService(t)
	s.store.get = func(context.Context, task.ID) (*task.Task, error) {
		return &task.Task{State: task.Pending, RunAt: storedAt, CreatedAt: storedAt}, nil
	}
	for _, path := range []string{"/tasks/" + storedID, "/tasks", "/tasks/counts", "/health", "/health/live", "/openapi.json", "/openapi.yaml", "/docs/index.html", "/docs/swagger-ui.css"} {
		a := s.do(http.MethodHead, path, "")
		if a.status != http.StatusOK || a.text != "" {
			t.Errorf("HEAD %s: got %d %q, want 200 without a body", path, a.status, clipped(a.text))
		}
		if got, want := a.header.Get("Content-Type"), s.get(path).header.Get("Content-Type"); got != want {
			t.Errorf("HEAD %s: got Content-Type %q, want that of GET, %q", path, got, want)
		}
	}
}

func TestPanic(t *testing.T) {
	t.Parallel()
	s := newService(t)
	s.store.insert = func(context.Context, *task.Task) error { panic("insert went wrong") }
	s.store.get = func(context.Context, task.ID) (*task.Task, error) { panic("get went wrong") }
	s.store.health = func(context.Context) (time.Duration, error) { panic("look went wrong") }
	s.dispatcher.runOnce = func(context.Context, *task.Task) (task.Outcome, error) { panic("call went wrong") }
	s.dispatcher.runNow = func(context.Context, task.ID) (task.Outcome, task.Decision, error) { panic("run went wrong") }
	for range 2 { // the server goes on
		for cause, a := range map[string]*answer{
			"insert went wrong": s.post("/enqueue", with("payload", `"`+marker+`"`), "Authorization", "Bearer "+marker, "Cookie", marker),
			"get went wrong":    s.get("/tasks/" + storedID),
			"look went wrong":   s.get("/health"),
			"call went wrong":   s.post("/worker-endpoint", with("payload", `"`+marker+`"`), "X-Api-Key", marker),
			"run went wrong":    s.post("/worker-endpoint", `{"task_id":"`+storedID+`"}`),
		} {
			if a.status != http.StatusInternalServerError || a.detail() != internalDetail {
				t.Errorf("%s: got %d %q, want 500 with the fixed text", cause, a.status, a.detail())
			}
			if strings.Contains(a.text, "wrong\"") || strings.Contains(a.text, cause) {
				t.Errorf("the answer tells the cause: %s", a.text)
			}
			s.logged(a, cause)
			s.logged(a, "http_test.go") // where it happened
		}
	}
	if strings.Contains(s.log.String(), marker) {
		t.Errorf("a value that was sent is in the log of panics: %s", clipped(s.log.String()))
	}
	if a := s.get("/health/live"); a.status != http.StatusOK {
		t.Errorf("got status %d after panics, want 200", a.status)
	}
}

// net/http's own way to cut a connection goes through.
func TestAbortHandler(t *testing.T) {
	t.Parallel()
	s := newService(t)
	s.store.get = func(context.Context, task.ID) (*task.Task, error) { panic(http.ErrAbortHandler) }
	defer func() {
		if p := recover(); p != http.ErrAbortHandler {
			t.Errorf("got panic %v, want http.ErrAbortHandler", p)
		}
	}()
	s.ServeHTTP(httptest.NewRecorder(), httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/tasks/"+storedID, nil))
}

// pipeListener accepts connections that exist in memory alone, so that a
// server can live on synctest's clock.
type pipeListener struct{ conns chan net.Conn }

func (l pipeListener) Accept() (net.Conn, error) {
	conn, ok := <-l.conns
	if !ok {
		return nil, net.ErrClosed
	}
	return conn, nil
}

func (l pipeListener) Close() error   { return nil }
func (l pipeListener) Addr() net.Addr { return &net.TCPAddr{} }

// onPipes runs f in a bubble of synctest, with a function that dials a server.
func onPipes(t *testing.T, f func(t *testing.T, s *service, dial func() net.Conn), configure ...func(*http.Server)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		s := newService(t)
		l := pipeListener{make(chan net.Conn)}
		server := httpserver.NewServer(s, s.Log)
		for _, set := range configure {
			set(server)
		}
		done := make(chan error)
		go func() { done <- server.Serve(l) }()
		var clients []net.Conn
		f(t, s, func() net.Conn {
			client, conn := net.Pipe()
			clients = append(clients, client)
			l.conns <- conn
			return client
		})
		for _, client := range clients {
			_ = client.Close()
		}
		close(l.conns)
		<-done
		if err := server.Shutdown(t.Context()); err != nil {
			t.Errorf("shut down the server: %v", err)
		}
	})
}

func head(path string, length int) string {
	return fmt.Sprintf("POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n", path, length)
}

// response reads one answer from a connection.
func (s *service) response(conn io.Reader, path string) *answer {
	s.t.Helper()
	r := &http.Request{Method: http.MethodPost}
	resp, err := http.ReadResponse(bufio.NewReader(conn), r)
	if err != nil {
		s.t.Fatalf("read a response: %v", err)
	}
	defer resp.Body.Close()
	sent := httptest.NewRequestWithContext(s.t.Context(), http.MethodPost, path, nil)
	return s.read(sent, resp)
}

// A caller that is slow with its body gets an answer after a while, and
// does not keep the connection.
func TestSlowBody(t *testing.T) {
	t.Parallel()
	type late struct {
		status int
		detail string
	}
	paths := map[string]late{
		// Nobody asks for the body, and it is waited for no longer.
		"/health": {http.StatusMethodNotAllowed, "only GET"}, "/nowhere": {http.StatusNotFound, "nothing at this path"},
		"/enqueue?stranger": {http.StatusUnauthorized, "cannot tell who calls"},
	}
	for _, path := range submissions {
		paths[path] = late{http.StatusRequestTimeout, "The request did not arrive within 20 seconds."}
	}
	for path, want := range paths {
		for _, sent := range []string{"", `{"url":"` + marker} {
			t.Run(path+" "+sent, func(t *testing.T) {
				t.Parallel()
				onPipes(t, func(t *testing.T, s *service, dial func() net.Conn) {
					s = s.on(t)
					if strings.HasSuffix(path, "stranger") {
						*s.callers = fakeCallers(func(http.Header) (string, []string, error) { return "", nil, errors.New("no") })
					}
					conn := dial()
					start := time.Now()
					if _, err := io.WriteString(conn, head(path, 1000)+sent); err != nil {
						t.Fatal(err)
					}
					r := bufio.NewReader(conn)
					resp, err := http.ReadResponse(r, nil)
					if err != nil {
						t.Fatal(err)
					}
					b, err := io.ReadAll(resp.Body)
					if err != nil || !strings.Contains(string(b), want.detail) {
						t.Errorf("got %s (%v), want %q", b, err, want.detail)
					}
					if took := time.Since(start); resp.StatusCode != want.status || took != requestTimeout {
						t.Errorf("got status %d after %v, want %d after %v", resp.StatusCode, took, want.status, requestTimeout)
					}
					if _, err := r.ReadByte(); !errors.Is(err, io.EOF) {
						t.Errorf("got %v, want the connection closed", err)
					}
					if took := time.Since(start); took > requestTimeout+time.Second {
						t.Errorf("the connection was held for %v", took)
					}
					s.nothingHappened(&answer{status: resp.StatusCode, text: string(b)})
				})
			})
		}
	}
}

// A caller that is slow with its head is not waited for as long.
func TestSlowHead(t *testing.T) {
	t.Parallel()
	onPipes(t, func(t *testing.T, s *service, dial func() net.Conn) {
		conn := dial()
		start := time.Now()
		if _, err := io.WriteString(conn, "POST /enqueue HTTP/1.1\r\nHost: x\r\n"); err != nil {
			t.Fatal(err)
		}
		if b, err := io.ReadAll(conn); err != nil || len(b) > 0 {
			t.Errorf("got %q (%v), want the connection closed without a word", b, err)
		}
		if took := time.Since(start); took != headTimeout {
			t.Errorf("the connection was held for %v, want %v", took, headTimeout)
		}
	})
}

// Some callers make connections in advance, and net/http counts from then on.
func TestConnectionMadeInAdvance(t *testing.T) {
	t.Parallel()
	onPipes(t, func(t *testing.T, s *service, dial func() net.Conn) {
		s = s.on(t)
		body := with("payload", "1")
		conn := dial()
		for _, text := range []string{head("/enqueue", len(body)), body} {
			<-time.After(headTimeout - time.Second)
			if _, err := io.WriteString(conn, text); err != nil {
				t.Fatal(err)
			}
		}
		s.only(s.response(conn, "/enqueue"))
	})
}

// A byte every second is slow too.
func TestDrippingBody(t *testing.T) {
	t.Parallel()
	onPipes(t, func(t *testing.T, s *service, dial func() net.Conn) {
		s = s.on(t)
		conn := dial()
		if _, err := io.WriteString(conn, head("/enqueue", 1000)); err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		dripping := make(chan struct{})
		go func() {
			defer close(dripping)
			for tick := time.NewTicker(time.Second); ; <-tick.C {
				if _, err := io.WriteString(conn, "{"); err != nil {
					tick.Stop()
					return
				}
			}
		}()
		a := s.response(conn, "/enqueue")
		if took := time.Since(start); a.status != http.StatusRequestTimeout || took != requestTimeout {
			t.Errorf("got status %d after %v, want 408 after %v", a.status, took, requestTimeout)
		}
		s.nothingHappened(a)
		_ = conn.Close()
		<-dripping
	})
}

// The bound on the body's time does not bound its handler, and 202 is not
// answered before the store has said so.
func TestSlowStore(t *testing.T) {
	t.Parallel()
	body := with("payload", "1")
	for text, want := range map[string]int{
		head("/enqueue", len(body)) + body:                                              http.StatusAccepted,
		"GET /tasks/" + storedID + " HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\n.": http.StatusNotFound,
	} {
		onPipes(t, func(t *testing.T, s *service, dial func() net.Conn) {
			committed := make(chan struct{})
			wait := func(ctx context.Context) error {
				select {
				case <-ctx.Done():
					return ctx.Err()
				case <-committed:
					return nil
				}
			}
			s.store.insert = func(ctx context.Context, _ *task.Task) error { return wait(ctx) }
			s.store.get = func(ctx context.Context, _ task.ID) (*task.Task, error) {
				return nil, cmp.Or(wait(ctx), task.ErrNotFound)
			}
			conn := dial()
			if _, err := io.WriteString(conn, text); err != nil {
				t.Fatal(err)
			}
			statuses := make(chan int, 1)
			go func() {
				resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
				if err != nil {
					t.Error(err)
					close(statuses)
					return
				}
				statuses <- resp.StatusCode
			}()
			select {
			case status := <-statuses:
				t.Fatalf("got %d before the store was done", status)
			case <-time.After(requestTimeout + time.Second):
			}
			close(committed)
			if status := <-statuses; status != want {
				t.Errorf("got status %d, want %d", status, want)
			}
		})
	}
}

// A connection serves the next request after each kind of answer that leaves
// it open, and the bound on a body does not outlive it.
func TestKeepAlive(t *testing.T) {
	t.Parallel()
	onPipes(t, func(t *testing.T, _ *service, dial func() net.Conn) {
		conn := dial()
		r := bufio.NewReader(conn)
		for range 3 {
			for body, want := range map[string]int{with("payload", "1"): 202, "{}": 422, "{": 400} {
				if _, err := io.WriteString(conn, head("/enqueue", len(body))+body); err != nil {
					t.Fatal(err)
				}
				resp, err := http.ReadResponse(r, nil)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := io.Copy(io.Discard, resp.Body); err != nil || resp.StatusCode != want {
					t.Errorf("got status %d (%v), want %d", resp.StatusCode, err, want)
				}
				<-time.After(3 * requestTimeout)
			}
		}
	})
}

// Callers that give up in the middle of a body, or send it in a broken shape.
func TestAbortedBody(t *testing.T) {
	t.Parallel()
	body := with("payload", `"`+marker+`"`)
	const chunked = "POST /enqueue HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
	tests := []struct {
		name, text string
		status     int
	}{
		// The body is whole, but not all that was announced.
		{"closes early", head("/enqueue", len(body)+1) + body, http.StatusBadRequest},
		{"closes in the middle", head("/enqueue", len(body)) + body[:20], http.StatusBadRequest},
		{"closes before the last chunk", chunked + fmt.Sprintf("%x\r\n%s\r\n", len(body), body), http.StatusBadRequest},
		{"no chunk size", chunked + marker + "\r\n", http.StatusBadRequest},
		{"chunk without an end", chunked + fmt.Sprintf("%x\r\n%sxx0\r\n\r\n", len(body), body), http.StatusBadRequest},
		{"whole", head("/enqueue", len(body)) + body, http.StatusAccepted},
		{"whole in chunks", chunked + fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", len(body), body), http.StatusAccepted},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s := newService(t)
			conn, err := net.Dial("tcp", s.server().Listener.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if _, err := io.WriteString(conn, tt.text); err != nil {
				t.Fatal(err)
			}
			if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
				t.Fatal(err)
			}
			a := s.response(conn, "/enqueue")
			if a.status != tt.status {
				t.Errorf("got status %d, want %d: %s", a.status, tt.status, a.text)
			}
			if a.status != http.StatusAccepted {
				s.nothingHappened(a)
			}
		})
	}
}

// A caller that is gone, answer and all.
func TestGoneCaller(t *testing.T) {
	t.Parallel()
	s := newService(t)
	conn, err := net.Dial("tcp", s.server().Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(conn, head("/enqueue", 1000)+`{"url":"`+target+`"`); err != nil {
		t.Fatal(err)
	}
	if err := conn.(*net.TCPConn).SetLinger(0); err != nil { // a reset
		t.Fatal(err)
	}
	_ = conn.Close()
	if a := s.get("/health/live"); a.status != http.StatusOK {
		t.Errorf("got status %d, want 200", a.status)
	}
	s.server().Close() // waits for the handlers
	if tasks := s.store.taken(); len(tasks) > 0 {
		t.Errorf("%d tasks are stored, want none", len(tasks))
	}
	if strings.Contains(s.log.String(), `"level":"ERROR"`) {
		t.Errorf("a caller's leaving is logged as an error: %s", s.log)
	}
}

// A caller that leaves while its task is being stored is no fault of the service.
func TestCancelledCaller(t *testing.T) {
	t.Parallel()
	s := newService(t)
	ctx, cancel := context.WithCancel(t.Context())
	s.store.insert = func(ctx context.Context, _ *task.Task) error {
		cancel()
		<-ctx.Done()
		return fmt.Errorf("insert task: %w", ctx.Err())
	}
	r := httptest.NewRequestWithContext(ctx, http.MethodPost, "/enqueue", strings.NewReader(with("payload", "1")))
	if a := s.serve(r); a.status != http.StatusServiceUnavailable {
		t.Errorf("got status %d, want 503", a.status)
	}
	if s.log.String() != "" {
		t.Errorf("it is logged: %s", s.log)
	}
}

// Two problems never have the same instance, and every one of a UUID's form.
func TestInstances(t *testing.T) {
	t.Parallel()
	s := newService(t)
	seen := map[any]bool{}
	for _, a := range []*answer{
		s.get("/nowhere"), s.get("/enqueue"), s.post("/enqueue", ""), s.post("/enqueue", "{"), s.post("/enqueue", "{}"),
		s.post("/enqueue", with("headers", `{"Host":"x"}`)), s.post("/enqueue", "{}", "Content-Type", "text/plain"),
		s.post("/worker-endpoint", "{}"), s.get("/tasks/1"), s.get("/tasks/" + storedID), s.post("/enqueue", filled("/enqueue", maxBody+1)),
	} {
		instance, _ := a.at("instance").(string)
		if _, err := task.ParseID(instance); err != nil || seen[instance] {
			t.Errorf("%d: got instance %q, want a new UUID", a.status, instance)
		}
		seen[instance] = true
		if got, want := a.at("title"), http.StatusText(a.status); got != want {
			t.Errorf("got title %v, want %v", got, want)
		}
		if got := a.at("type"); got != "about:blank" {
			t.Errorf("got type %v, want about:blank", got)
		}
		if got := a.header.Get("Content-Type"); got != "application/problem+json" {
			t.Errorf("got Content-Type %q, want application/problem+json", got)
		}
	}
}
