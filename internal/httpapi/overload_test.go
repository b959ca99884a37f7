package httpapi

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/melodia/orchestrator/internal/task"
)

// All bodies together are bounded, and nothing of one that does not fit is kept.
func TestTooManyBodies(t *testing.T) {
	t.Parallel()
	s := newService(t)
	for _, path := range submissions {
		body := with("payload", `"`+marker+strings.Repeat("x", smallBody)+`"`)
		fill(s.Guard.Bodies(), maxBodies-len(body)+1)
		a := s.post(path, body)
		s.refused(a, http.StatusTooManyRequests)
		if a.detail() != overloadedDetail || a.header.Get("Retry-After") == "" {
			t.Errorf("%s: got %q, Retry-After %q, want that of an overload", path, a.detail(), a.header.Get("Retry-After"))
		}
		fill(s.Guard.Bodies(), maxBodies-len(body))
		if a := s.post(path, body); a.status == http.StatusTooManyRequests {
			t.Errorf("%s: a body that just fits is refused", path)
		}
		s.store.taken()
		s.dispatcher.taken()
	}
}

// Bodies of calls under way are bounded on their own: calls may take long, and
// keep out neither small ones nor what is to be stored.
func TestTooManyBodiesOfCalls(t *testing.T) {
	t.Parallel()
	s := newService(t)
	large := with("payload", `"`+marker+strings.Repeat("x", smallBody)+`"`)
	reference := `{"task_id":"` + storedID + `"` + strings.Repeat(" ", smallBody) + `}`
	for _, body := range []string{large, reference} {
		fill(s.Guard.CallBodies(), maxBodies-len(body)+1)
		a := s.post("/worker-endpoint", body)
		s.refused(a, http.StatusTooManyRequests)
		if a.detail() != overloadedDetail || a.header.Get("Retry-After") == "" {
			t.Errorf("got %q, Retry-After %q, want that of an overload", a.detail(), a.header.Get("Retry-After"))
		}
		if a := s.post("/worker-endpoint", with("payload", "1")); a.status != http.StatusOK {
			t.Errorf("a small body: got status %d, want 200: %s", a.status, a.text)
		}
		if a := s.post("/enqueue", large); a.status != http.StatusAccepted {
			t.Errorf("what is to be stored: got status %d, want 202: %s", a.status, a.text)
		}
		s.Guard.CallBodies().Release(1)
		if a := s.post("/worker-endpoint", body); a.status != http.StatusOK {
			t.Errorf("a body that just fits: got status %d, want 200: %s", a.status, a.text)
		}
		if got, want := s.Guard.CallBodies().Used(), int64(maxBodies-len(body)); got != want {
			t.Errorf("%d bytes are counted afterwards, want %d", got, want)
		}
		s.store.taken()
		s.dispatcher.taken()
	}
}

// Naming each of tens of thousands of wrong fields would take seconds.
func TestTooManyMembers(t *testing.T) {
	t.Parallel()
	s := newService(t)
	var members strings.Builder
	for i := range maxMembers {
		fmt.Fprintf(&members, `"k%d":1,`, i)
	}
	for _, path := range submissions {
		a := s.post(path, "{"+members.String()+`"url":"`+target+`"}`)
		s.refused(a, http.StatusBadRequest)
		if want := "The body has more members than any request has fields."; a.detail() != want {
			t.Errorf("%s: got %q, want %q", path, a.detail(), want)
		}
	}
}

// A body counts for as long as its request is worked on, whatever comes of it.
func TestBodiesAreGivenBack(t *testing.T) {
	t.Parallel()
	body := with("payload", "1")
	whole := func() io.Reader { return strings.NewReader(body) }
	for name, tt := range map[string]struct {
		path   string
		body   func() io.Reader
		insert func() error
		status int
	}{
		"stored":          {"/enqueue", whole, func() error { return nil }, http.StatusAccepted},
		"carried out":     {"/worker-endpoint", whole, nil, http.StatusOK},
		"no JSON":         {"/enqueue", func() io.Reader { return strings.NewReader("{") }, nil, http.StatusBadRequest},
		"breaks rules":    {"/enqueue", func() io.Reader { return strings.NewReader("{}") }, nil, http.StatusUnprocessableEntity},
		"no such path":    {"/nowhere", whole, nil, http.StatusNotFound},
		"wrong method":    {"/health", whole, nil, http.StatusMethodNotAllowed},
		"too large":       {"/enqueue", func() io.Reader { return strings.NewReader(filled("/enqueue", maxBody+1)) }, nil, http.StatusRequestEntityTooLarge},
		"breaks off":      {"/enqueue", func() io.Reader { return iotest.TimeoutReader(iotest.OneByteReader(strings.NewReader(body))) }, nil, http.StatusBadRequest},
		"no database":     {"/enqueue", whole, func() error { return task.ErrUnavailable }, http.StatusServiceUnavailable},
		"panics":          {"/enqueue", whole, func() error { panic("insert went wrong") }, http.StatusInternalServerError},
		"cuts the caller": {"/enqueue", whole, func() error { panic(http.ErrAbortHandler) }, 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newService(t)
			s.store.insert = func(context.Context, *task.Task) error {
				if got := s.Guard.Bodies().Used(); got != int64(len(body)) {
					t.Errorf("%d bytes are counted while the task is stored, want %d", got, len(body))
				}
				return tt.insert()
			}
			s.dispatcher.runOnce = func(context.Context, *task.Task) (task.Outcome, error) {
				if got := s.Guard.CallBodies().Used(); got != int64(len(body)) || s.Guard.Bodies().Used() != 0 {
					t.Errorf("%d bytes are counted during the call, %d among the others; want %d, 0", got, s.Guard.Bodies().Used(), len(body))
				}
				return task.Outcome{Kind: task.OutcomeSucceeded, StatusCode: 200}, nil
			}
			r := httptest.NewRequestWithContext(t.Context(), http.MethodPost, tt.path, tt.body())
			r.Header.Set("Content-Type", "application/json")
			w := httptest.NewRecorder()
			func() {
				defer func() {
					if p := recover(); (p != nil) != (tt.status == 0) {
						t.Errorf("got panic %v", p)
					}
				}()
				s.ServeHTTP(w, r)
			}()
			if tt.status != 0 && w.Code != tt.status {
				t.Errorf("got status %d, want %d: %s", w.Code, tt.status, w.Body)
			}
			if got := s.Guard.Bodies().Used() + s.Guard.CallBodies().Used(); got != 0 {
				t.Errorf("%d bytes are still counted, want 0", got)
			}
		})
	}
}

// Callers who announce large bodies and do not send them keep nobody out.
func TestAnnouncedBodies(t *testing.T) {
	t.Parallel()
	onPipes(t, func(t *testing.T, s *service, dial func() net.Conn) {
		s = s.on(t)
		for range 2 * maxBodies / maxBody {
			if _, err := io.WriteString(dial(), head("/enqueue", maxBody)+"{"); err != nil {
				t.Fatal(err)
			}
		}
		body := with("payload", "1")
		conn := dial()
		if _, err := io.WriteString(conn, head("/enqueue", len(body))+body); err != nil {
			t.Fatal(err)
		}
		if a := s.response(conn, "/enqueue"); a.status != http.StatusAccepted {
			t.Errorf("got status %d, want 202: %s", a.status, a.text)
		}
	})
}

// An outage does not fill the log: one line a second counts who was turned away.
func TestTurnedAwayInTheLog(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newService(t)
		var err error
		s.store.insert = func(context.Context, *task.Task) error { return err }
		type line struct {
			Count, Status int
			Error, ID     string
		}
		var want []line
		// turnAway is answered n times; the last answer is logged where count is not 0.
		turnAway := func(n int, cause error, status, count int) {
			t.Helper()
			err = cause
			var a *answer
			for range n {
				r := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/enqueue", strings.NewReader(with("payload", "1")))
				r.Header.Set("Content-Type", "application/json")
				if a = s.serve(r); a.status != status {
					t.Errorf("got status %d, want %d", a.status, status)
				}
			}
			if count > 0 {
				want = append(want, line{count, status, cause.Error(), a.at("instance").(string)})
			}
		}
		away, full := fmt.Errorf("%w: it is gone", task.ErrUnavailable), fmt.Errorf("%w: it is full", task.ErrOverloaded)
		turnAway(1, away, http.StatusServiceUnavailable, 1)
		turnAway(500, away, http.StatusServiceUnavailable, 0)
		<-time.After(999 * time.Millisecond)
		turnAway(7, full, http.StatusTooManyRequests, 0)
		<-time.After(time.Millisecond)
		turnAway(1, full, http.StatusTooManyRequests, 508)
		turnAway(1, away, http.StatusServiceUnavailable, 0)
		<-time.After(time.Hour)
		turnAway(1, away, http.StatusServiceUnavailable, 2)

		// What is wrong in the service is logged each time.
		broken := errors.New("it is broken")
		for range 3 {
			turnAway(1, broken, http.StatusInternalServerError, 0)
		}
		var got []line
		failed := 0
		decoder := json.NewDecoder(bytes.NewBufferString(s.log.String()))
		for decoder.More() {
			var l struct {
				Msg string
				line
				ID string `json:"request_id"`
			}
			if err := decoder.Decode(&l); err != nil {
				t.Fatal(err)
			}
			switch l.Msg {
			case "requests turned away":
				l.line.ID = l.ID
				got = append(got, l.line)
			case "request failed":
				failed++
			}
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("lines (-want +got):\n%s", diff)
		}
		if failed != 3 {
			t.Errorf("%d of 3 internal errors are in the log", failed)
		}
	})
}

// narrowListener accepts connections that take little before somebody reads.
type narrowListener struct{ net.Listener }

func (l narrowListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err == nil {
		err = conn.(*net.TCPConn).SetWriteBuffer(4096)
	}
	return conn, err
}

// A caller that never reads what it is answered does not keep its connection
// and its goroutine.
func TestCallerThatNeverReads(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("x", 1<<20)
	for name, request := range map[string]string{
		"a task":          "GET /tasks/" + storedID + " HTTP/1.1\r\nHost: x\r\n\r\n",
		"worker-endpoint": head("/worker-endpoint", len(with("payload", "1"))) + with("payload", "1"),
		"docs":            "GET /docs/swagger-ui-bundle.js HTTP/1.1\r\nHost: x\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newService(t)
			s.store.get = func(context.Context, task.ID) (*task.Task, error) {
				return &task.Task{State: task.Pending, Attempts: []task.Attempt{{Number: 1, Outcome: task.OutcomeRetryable, ResponseExcerpt: long}}}, nil
			}
			s.dispatcher.runOnce = func(context.Context, *task.Task) (task.Outcome, error) {
				return task.Outcome{Kind: task.OutcomeSucceeded, ResponseExcerpt: long}, nil
			}
			closed := make(chan struct{})
			server := httptest.NewUnstartedServer(s)
			server.Listener = narrowListener{server.Listener}
			server.Config.WriteTimeout = 100 * time.Millisecond
			server.Config.ConnState = func(_ net.Conn, state http.ConnState) {
				if state == http.StateClosed {
					close(closed)
				}
			}
			server.Start()
			conn, err := net.Dial("tcp", server.Listener.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				_ = conn.Close()
				server.Close()
			})
			if err := conn.(*net.TCPConn).SetReadBuffer(4096); err != nil {
				t.Fatal(err)
			}
			if _, err := io.WriteString(conn, request); err != nil {
				t.Fatal(err)
			}
			select {
			case <-closed:
			case <-time.After(30 * time.Second):
				t.Error("the connection is still held")
			}
			if strings.Contains(s.log.String(), `"level":"ERROR"`) {
				t.Errorf("a caller's deafness is logged as an error: %s", s.log)
			}
		})
	}
}

// /worker-endpoint may take longer than the bound for answers, which is
// counted from the answer on; it is answered after a panic too.
func TestLateAnswer(t *testing.T) {
	t.Parallel()
	const bound = 30 * time.Second
	body := with("payload", "1")
	for name, tt := range map[string]struct {
		reads  bool
		panics bool
		status int
	}{
		"is read":       {reads: true, status: http.StatusOK},
		"after a panic": {reads: true, panics: true, status: http.StatusInternalServerError},
		"is not read":   {},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var closed chan time.Duration // how long after the answer began
			var answered time.Time
			onPipes(t, func(t *testing.T, s *service, dial func() net.Conn) {
				s = s.on(t)
				s.dispatcher.runOnce = func(context.Context, *task.Task) (task.Outcome, error) {
					<-time.After(task.MaxTimeout)
					answered = time.Now()
					if tt.panics {
						panic("call went wrong")
					}
					return task.Outcome{Kind: task.OutcomeSucceeded, StatusCode: 200}, nil
				}
				conn := dial()
				if _, err := io.WriteString(conn, head("/worker-endpoint", len(body))+body); err != nil {
					t.Fatal(err)
				}
				if tt.reads {
					if a := s.response(conn, "/worker-endpoint"); a.status != tt.status {
						t.Errorf("got status %d, want %d: %s", a.status, tt.status, a.text)
					}
					return
				}
				if took := <-closed; took != bound {
					t.Errorf("the connection was held for %v after the answer began, want %v", took, bound)
				}
			}, func(server *http.Server) {
				closed = make(chan time.Duration, 1)
				server.ConnState = func(_ net.Conn, state http.ConnState) {
					if state == http.StateClosed {
						closed <- time.Since(answered)
					}
				}
			})
		})
	}
}
