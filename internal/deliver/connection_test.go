package deliver

import (
	"bufio"
	"context"
	"io"
	"net"
	"net/http"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/melodia/orchestrator/internal/task"
)

const answerOK = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nright"

// A target that sends more than it was asked for must not answer the next call
// to it, which may be another caller's.
func TestBytesBehindAnAnswerAnswerNothing(t *testing.T) {
	t.Parallel()
	const smuggled = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nwrong"
	for name, late := range map[string]bool{"with the answer": false, "afterwards": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			answered, sent := make(chan struct{}), make(chan struct{})
			address := newRawServer(t, func(conn net.Conn, n int) {
				r := bufio.NewReader(conn)
				for readRequest(r) == nil {
					switch {
					case n > 1:
						io.WriteString(conn, answerOK)
					case late:
						io.WriteString(conn, answerOK)
						<-answered
						io.WriteString(conn, smuggled)
						close(sent)
					default:
						io.WriteString(conn, answerOK+smuggled)
					}
				}
			})
			d := newDeliverer(t)
			call := newCall("POST", "http://"+address, nil)
			if o := d.Deliver(t.Context(), call); o.ResponseExcerpt != "right" {
				t.Fatalf("first call: %+v", o)
			}
			if late {
				close(answered)
				<-sent
				idle := d.connections.idle[authority{"http", address}]
				if len(idle) != 1 {
					t.Fatalf("%d idle connections, want 1", len(idle))
				}
				for idle[0].quiet() && t.Context().Err() == nil { // what was sent is about to arrive
				}
			}
			if o := d.Deliver(t.Context(), call); o.ResponseExcerpt != "right" {
				t.Errorf("second call: %+v, want its own answer", o)
			}
		})
	}
}

func TestOldestIdleConnectionMakesRoom(t *testing.T) {
	t.Parallel()
	closed := make(chan int, 3)
	serve := func(server int) string {
		return newRawServer(t, func(conn net.Conn, _ int) {
			r := bufio.NewReader(conn)
			for readRequest(r) == nil {
				io.WriteString(conn, answerOK)
			}
			closed <- server
		})
	}
	d := New(Options{Policy: policy(t, nil, "127.0.0.0/8"), Concurrency: 2})
	t.Cleanup(d.Close)
	for server := range 3 {
		if o := d.Deliver(t.Context(), newCall("POST", "http://"+serve(server), nil)); o.Kind != task.OutcomeSucceeded {
			t.Fatalf("call to target %d: %+v", server, o)
		}
	}
	if got := <-closed; got != 0 {
		t.Errorf("the connection to target %d was closed, want that to target 0", got)
	}
	if got := d.connections.order.Len(); got != 2 {
		t.Errorf("%d idle connections, want 2", got)
	}
}

func TestIdleConnectionsAreClosedInTime(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := connections{most: 10}
		put := func() (closed func() bool) {
			ours, theirs := net.Pipe()
			s.put(newConnection(ours, authority{"http", "plays.melodia.app"}), time.Now())
			return func() bool {
				theirs.SetReadDeadline(time.Now().Add(time.Millisecond))
				_, err := theirs.Read(make([]byte, 1))
				return err == io.EOF
			}
		}
		first := put()
		time.Sleep(idleTimeout - time.Second)
		second := put()
		if first() {
			t.Error("closed before its time")
		}
		time.Sleep(time.Second)
		if !first() || second() {
			t.Error("want the first closed, and the second open")
		}
		time.Sleep(idleTimeout)
		if !second() || !empty(&s) {
			t.Error("want nothing left to look after")
		}
		put()
		s.closeAll()
		if !empty(&s) {
			t.Error("want nothing left after closeAll")
		}
	})
}

func empty(s *connections) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.idle) == 0 && s.order.Len() == 0 && s.sweep == nil
}

// The answer to HEAD says how long a body would be, and has none.
func TestAnswerWithoutABodyLeavesTheConnectionUsable(t *testing.T) {
	t.Parallel()
	var connections atomic.Int64
	address := newRawServer(t, func(conn net.Conn, n int) {
		connections.Store(int64(n))
		r := bufio.NewReader(conn)
		for readRequest(r) == nil {
			io.WriteString(conn, "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n")
		}
	})
	d := newDeliverer(t)
	for range 3 {
		if o := d.Deliver(t.Context(), newCall(http.MethodHead, "http://"+address, nil)); o.Kind != task.OutcomeSucceeded || o.ResponseExcerpt != "" {
			t.Fatalf("outcome = %+v, want success and no body", o)
		}
	}
	if got := connections.Load(); got != 1 {
		t.Errorf("%d connections, want 1", got)
	}
}

// A call whose context has ended before is not sent, even where a connection is kept.
func TestEndedContextSendsNothing(t *testing.T) {
	t.Parallel()
	var seen atomic.Int64
	s := newServer(t, func(http.ResponseWriter, *http.Request) { seen.Add(1) })
	d := newDeliverer(t)
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	for range 50 {
		d.Deliver(t.Context(), newCall("POST", s.URL, []byte("x"))) // leaves an idle connection
		if o := d.Deliver(ended, newCall("POST", s.URL, []byte("x"))); o.Kind != task.OutcomeInterrupted {
			t.Errorf("the outcome is %s, want interrupted", o.Kind)
		}
	}
	s.Close() // waits for what the target still answers
	if got := seen.Load() - 50; got != 0 {
		t.Errorf("the target saw %d of 50 calls whose context had ended before", got)
	}
}

// A connection is idle from the end of its call on, however long that took.
func TestIdleFromTheEndOfTheCall(t *testing.T) {
	t.Parallel()
	var answered time.Time
	s := newServer(t, func(http.ResponseWriter, *http.Request) { answered = time.Now() })
	d := newDeliverer(t)
	d.Deliver(t.Context(), newCall("POST", s.URL, nil))
	if since := d.connections.order.Front().Value.(*connection).since; since.Before(answered) {
		t.Errorf("the connection counts as idle since %v before its call was answered", answered.Sub(since))
	}
}

// panicking is a connection on which a call panics.
type panicking struct {
	*net.TCPConn
	closed int
}

func (*panicking) Read([]byte) (int, error) { panic("a mistake of ours") }

func (c *panicking) Close() error {
	c.closed++
	return c.TCPConn.Close()
}

// A panic is the dispatcher's to survive. It leaves nothing behind.
func TestPanicClosesTheConnection(t *testing.T) {
	t.Parallel()
	address := newRawServer(t, func(conn net.Conn, _ int) { io.Copy(io.Discard, conn) })
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	d, c := newDeliverer(t), &panicking{TCPConn: conn.(*net.TCPConn)}
	d.connections.put(newConnection(c, authority{"http", address}), time.Now())
	func() {
		defer func() {
			if recover() == nil {
				t.Error("the call did not panic")
			}
		}()
		d.Deliver(t.Context(), newCall("POST", "http://"+address, nil))
	}()
	if c.closed != 1 || d.connections.order.Len() != 0 {
		t.Errorf("closed %d times with %d idle connections, want once and none", c.closed, d.connections.order.Len())
	}
}
