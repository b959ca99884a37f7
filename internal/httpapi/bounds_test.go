package httpapi

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/melodia/orchestrator/internal/httpserver"
	"github.com/melodia/orchestrator/internal/task"
)

// listening serves s as the process does, and returns its address.
func (s *service) listening() string {
	s.t.Helper()
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		s.t.Fatal(err)
	}
	server := httpserver.NewServer(s, s.Log)
	done := make(chan error)
	go func() { done <- httpserver.Bound(tcp, 100, slog.New(slog.DiscardHandler)).Serve(server) }()
	s.t.Cleanup(func() {
		if err := server.Shutdown(context.Background()); err != nil { // waits for connections that are being closed
			s.t.Error(err)
		}
		<-done
	})
	return tcp.Addr().String()
}

// raw sends text, all of it, and then reads one answer, of any operation.
func (s *service) raw(address, text string) *answer {
	s.t.Helper()
	conn, err := net.Dial("tcp", address)
	if err != nil {
		s.t.Fatal(err)
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, text); err != nil {
		s.t.Fatal(err)
	}
	return s.response(conn, "/nowhere")
}

// What the listener refuses is answered as every other problem.
func TestRefusedHeads(t *testing.T) {
	t.Parallel()
	s := newService(t)
	address := s.listening()
	body := with("payload", `"`+marker+`"`)
	for name, tt := range map[string]struct {
		text   string
		status int
	}{
		"too many lines": {"GET /tasks HTTP/1.1\r\nHost: x\r\n" + strings.Repeat(marker+":\r\n", httpserver.MaxHeadLines) + "\r\n", http.StatusRequestHeaderFieldsTooLarge},
		"too long":       {"GET /tasks HTTP/1.1\r\nHost: x\r\nCookie: " + marker + strings.Repeat("x", httpserver.MaxHead) + "\r\n\r\n", http.StatusRequestHeaderFieldsTooLarge},
		"two lengths": {strings.Replace(head("/enqueue", len(body)), "\r\n\r\n", "\r\nTransfer-Encoding: chunked\r\n\r\n", 1) +
			fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", len(body), body), http.StatusBadRequest},
		"length twice": {strings.Replace(head("/enqueue", len(body)), "\r\n\r\n", fmt.Sprintf("\r\nContent-Length: %d\r\n\r\n%s", len(body), body), 1), http.StatusBadRequest},
	} {
		t.Run(name, func(t *testing.T) {
			s := s.on(t)
			s.refused(s.raw(address, tt.text), tt.status)
		})
	}
}

// A caller that sends the whole of a body that is not read can read the answer,
// whether its length is announced or not, and wherever it is sent.
func TestAnswerToUnreadBody(t *testing.T) {
	t.Parallel()
	const size = 3 << 20
	plain := strings.Repeat("x", size)
	chunks := strings.Repeat("10000\r\n"+plain[:1<<16]+"\r\n", size>>16) + "0\r\n\r\n"
	for name, tt := range map[string]struct {
		method, path, header string
		status               int
	}{
		"enqueue":         {"POST", "/enqueue", "", http.StatusRequestEntityTooLarge},
		"schedule":        {"POST", "/schedule", "", http.StatusRequestEntityTooLarge},
		"batch":           {"POST", "/tasks/batch", "", http.StatusRequestEntityTooLarge},
		"change":          {"PATCH", "/tasks/" + storedID, "", http.StatusRequestEntityTooLarge},
		"worker-endpoint": {"POST", "/worker-endpoint", "", http.StatusRequestEntityTooLarge},
		"cancel":          {"POST", "/tasks/" + storedID + "/cancel", "", http.StatusRequestEntityTooLarge},
		"cancel many":     {"POST", "/tasks/cancel", "", http.StatusRequestEntityTooLarge},
		"redrive many":    {"POST", "/tasks/redrive", "", http.StatusRequestEntityTooLarge},
		"nowhere":         {"POST", "/nowhere", "", http.StatusNotFound},
		"wrong method":    {"PUT", "/enqueue", "", http.StatusMethodNotAllowed},
		"other site":      {"POST", "/enqueue", "Sec-Fetch-Site: cross-site\r\n", http.StatusForbidden},
		"stranger":        {"POST", "/enqueue", "X-Test-Stranger: 1\r\n", http.StatusUnauthorized},
		"compressed":      {"POST", "/enqueue", "Content-Encoding: gzip\r\n", http.StatusUnsupportedMediaType},
		"overload":        {"POST", "/enqueue", "X-Test-Overload: 1\r\n", http.StatusTooManyRequests},
	} {
		for how, text := range map[string]string{"Content-Length": fmt.Sprintf("Content-Length: %d\r\n\r\n%s", size, plain), "chunked": "Transfer-Encoding: chunked\r\n\r\n" + chunks} {
			if tt.status == http.StatusTooManyRequests && how == "Content-Length" {
				continue // 413 comes first
			}
			t.Run(name+", "+how, func(t *testing.T) {
				t.Parallel()
				s := newService(t)
				*s.callers = fakeCallers(func(h http.Header) (string, []string, error) {
					if h["X-Test-Stranger"] != nil {
						return "", nil, io.ErrUnexpectedEOF
					}
					return "", Scopes(), nil
				})
				if strings.Contains(tt.header, "Overload") {
					fill(s.Guard.Bodies(), maxBodies)
				}
				a := s.raw(s.listening(), tt.method+" "+tt.path+" HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"+tt.header+text)
				if a.status != tt.status {
					t.Errorf("got %d %s, want %d", a.status, clipped(a.text), tt.status)
				}
				s.nothingHappened(a)
			})
		}
	}
}

// Whoever waits for 100 Continue hears at once what is wrong, and else gets it.
func TestExpectContinue(t *testing.T) {
	t.Parallel()
	body := with("payload", "1")
	expecting := func(length int, more string) string {
		return strings.Replace(head("/enqueue", length), "\r\n\r\n", "\r\nExpect: 100-continue\r\n"+more+"\r\n", 1)
	}
	for name, tt := range map[string]struct {
		text   string
		status int
	}{
		"too large":  {expecting(maxBody+1, ""), http.StatusRequestEntityTooLarge},
		"compressed": {expecting(maxBody, "Content-Encoding: br\r\n"), http.StatusUnsupportedMediaType},
		"fits":       {expecting(len(body), ""), http.StatusContinue},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newService(t)
			conn, err := net.Dial("tcp", s.listening())
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if _, err := io.WriteString(conn, tt.text); err != nil {
				t.Fatal(err)
			}
			r := bufio.NewReader(conn)
			if tt.status != http.StatusContinue {
				if a := s.response(r, "/enqueue"); a.status != tt.status {
					t.Errorf("got status %d, want %d", a.status, tt.status)
				}
				return
			}
			if line, err := r.ReadString('\n'); err != nil || line != "HTTP/1.1 100 Continue\r\n" {
				t.Fatalf("got %q (%v), want 100 Continue", line, err)
			}
			_, _ = r.ReadString('\n')
			if _, err := io.WriteString(conn, body); err != nil {
				t.Fatal(err)
			}
			s.only(s.response(r, "/enqueue"))
		})
	}
}

// A body is taken as it is, or refused by a word on how to send it.
func TestContentEncoding(t *testing.T) {
	t.Parallel()
	s := newService(t)
	for _, path := range append([]string{"/tasks/batch"}, submissions...) {
		for _, coding := range []string{"gzip", "deflate", "br", "zstd", "GZIP", "identity, gzip", "gzip, identity", marker, "aws-chunked", ""} {
			a := s.post(path, with("payload", "1"), "Content-Encoding", coding)
			s.refused(a, http.StatusUnsupportedMediaType)
			if want := "The body must not be compressed. Send it as it is, without the header Content-Encoding, or with Content-Encoding: identity."; a.detail() != want || a.header.Get("Accept-Encoding") != "identity" {
				t.Errorf("%s, %q: got %q, Accept-Encoding %q", path, coding, a.detail(), a.header.Get("Accept-Encoding"))
			}
		}
	}
	for _, coding := range []string{"identity", "Identity"} {
		if a := s.post("/enqueue", with("payload", "1"), "Content-Encoding", coding); a.status != http.StatusAccepted {
			t.Errorf("%q: got status %d, want 202: %s", coding, a.status, a.text)
		}
		s.store.taken()
	}
}

// Answers that are not read are bounded: what reads is refused then, and what
// changes something before it does; small answers get out.
func TestTooManyAnswers(t *testing.T) {
	t.Parallel()
	s := newService(t)
	excerpt := strings.Repeat("x", smallAnswer)
	s.store.get = func(context.Context, task.ID) (*task.Task, error) {
		return &task.Task{State: task.Pending, RunAt: storedAt, CreatedAt: storedAt, Attempts: []task.Attempt{{Number: 1, StartedAt: storedAt, Outcome: task.OutcomeRetryable, ResponseExcerpt: excerpt}}}, nil
	}
	acted := 0
	s.store.act = func(string, task.ID) (*task.Task, error) {
		acted++
		return s.store.get(t.Context(), task.ID{})
	}
	refused := func(a *answer) {
		t.Helper()
		s.refused(a, http.StatusServiceUnavailable)
		if a.header.Get("Retry-After") == "" || a.header.Get("ETag") != "" {
			t.Errorf("got Retry-After %q, ETag %q", a.header.Get("Retry-After"), a.header.Get("ETag"))
		}
	}
	fill(s.Guard.Answers(), maxAnswers)
	refused(s.get("/tasks/" + storedID))
	refused(s.get("/docs/swagger-ui.css"))
	for path, want := range map[string]int{"/health": 200, "/health/live": 200, "/tasks": 200, "/nowhere": 404} {
		if a := s.get(path); a.status != want {
			t.Errorf("%s: got status %d, want %d", path, a.status, want)
		}
	}
	if a := s.post("/enqueue", with("payload", "1")); a.status != http.StatusAccepted {
		t.Errorf("got status %d, want 202: %s", a.status, a.text)
	}
	s.store.taken()
	if a := s.post("/tasks/"+storedID+"/cancel", ""); a.status != http.StatusOK || acted != 1 {
		t.Errorf("got status %d, and it was done %d times; want 200, once: %s", a.status, acted, clipped(a.text))
	}
	s.Guard.Answers().Reserve(1, 0)
	refused(s.post("/tasks/"+storedID+"/cancel", ""))
	if acted != 1 {
		t.Errorf("it was done %d times, want once", acted)
	}
	s.Guard.Answers().Release(1)
	if got := s.Guard.Answers().Used(); got != maxAnswers {
		t.Errorf("%d bytes are counted afterwards, want %d", got, maxAnswers)
	}
	fill(s.Guard.Answers(), 0)
	for _, path := range []string{"/tasks/" + storedID, "/docs/swagger-ui.css"} {
		if a := s.get(path); a.status != http.StatusOK || s.Guard.Answers().Used() != 0 {
			t.Errorf("%s: got status %d, want 200; %d bytes are counted afterwards", path, a.status, s.Guard.Answers().Used())
		}
	}
}

// An answer counts for as long as it is being written.
func TestAnswersAreCounted(t *testing.T) {
	t.Parallel()
	s := newService(t)
	s.store.get = func(context.Context, task.ID) (*task.Task, error) {
		return &task.Task{State: task.Pending, RunAt: storedAt, CreatedAt: storedAt, Attempts: []task.Attempt{{Number: 1, ResponseExcerpt: strings.Repeat("x", 1<<20)}}}, nil
	}
	w := &countedWriter{ResponseRecorder: httptest.NewRecorder(), count: s.Guard.Answers().Used}
	s.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/tasks/"+storedID, nil))
	if w.most < int64(w.Body.Len()) || w.Body.Len() < 1<<20 {
		t.Errorf("%d bytes are counted while %d are written", w.most, w.Body.Len())
	}
}

// countedWriter notes what count says when something is written.
type countedWriter struct {
	*httptest.ResponseRecorder
	count func() int64
	most  int64
}

func (w *countedWriter) Write(b []byte) (int, error) {
	w.most = max(w.most, w.count())
	return w.ResponseRecorder.Write(b)
}
