package http1

import (
	"bufio"
	"context"
	"io"
	"log"
	"net"
	"net/http"
	"net/url"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
)

// patience is how long a test waits for what must come; no test depends on its size.
const patience = time.Minute

func TestMain(m *testing.M) {
	log.SetOutput(io.Discard) // net/http prints there what a host sends out of turn
	goleak.VerifyTestMain(m)
}

// newPool makes a pool of plain TCP connections.
func newPool(t testing.TB) *Pool {
	p := NewPool(Options{Dial: new(net.Dialer).DialContext, MaxIdle: 10})
	t.Cleanup(p.Close)
	return p
}

// exchange sends a request, reads the answer to its end, and gives the connection back.
func exchange(t testing.TB, p *Pool, method, rawURL string, body []byte, fields ...string) (status int, answer string, err error) {
	t.Helper()
	resp, answer, err := answered(t, p, method, rawURL, body, fields...)
	if resp == nil {
		return 0, "", err
	}
	return resp.StatusCode, answer, err
}

// answered is exchange with the answer's head. fields are names and values in turn.
func answered(t testing.TB, p *Pool, method, rawURL string, body []byte, fields ...string) (resp *http.Response, answer string, err error) {
	t.Helper()
	u, err := url.Parse(rawURL)
	if err != nil {
		t.Fatal(err)
	}
	c, err := p.Get(t.Context(), time.Now().Add(patience), u, false)
	if err != nil {
		return nil, "", err
	}
	whole := false
	defer func() { c.Finish(whole) }()
	head := AppendStart(c.Buffer(), method, u)
	for i := 0; i < len(fields); i += 2 {
		head = AppendField(head, fields[i], fields[i+1])
	}
	resp, err = c.Send(method, u, AppendEnd(head, method, len(body)), body)
	if err != nil || resp.StatusCode == http.StatusSwitchingProtocols {
		return resp, "", err
	}
	b, err := io.ReadAll(resp.Body)
	whole = err == nil
	return resp, string(b), err
}

// newRawServer hands each connection to serve and closes it when serve returns. n
// counts the connections from 1. The test's end closes them all and waits for serve.
func newRawServer(t testing.TB, serve func(conn net.Conn, n int)) (address string) {
	t.Helper()
	listener, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		for n := 1; ; n++ {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			serving.Go(func() {
				defer conn.Close()
				defer context.AfterFunc(t.Context(), func() { conn.Close() })()
				serve(conn, n)
			})
		}
	})
	t.Cleanup(func() {
		listener.Close()
		serving.Wait()
	})
	return listener.Addr().String()
}

// readRequest takes one whole request off the connection.
func readRequest(r *bufio.Reader) error {
	req, err := http.ReadRequest(r)
	if err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, req.Body)
	return err
}

// hang returns when the peer has closed the connection.
func hang(conn net.Conn) { io.Copy(io.Discard, conn) }

const answerOK = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nright"

// A host that sends more than it was asked for must not answer the next request to
// it, which may be another principal's.
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
			p := newPool(t)
			if _, body, err := exchange(t, p, "POST", "http://"+address, nil); body != "right" {
				t.Fatalf("first answer: %q, %v", body, err)
			}
			if late {
				close(answered)
				<-sent
				idle := p.idle[authority{"http", address}]
				if len(idle) != 1 {
					t.Fatalf("%d idle connections, want 1", len(idle))
				}
				for idle[0].reusable() && t.Context().Err() == nil { // what was sent is about to arrive
				}
			}
			if _, body, err := exchange(t, p, "POST", "http://"+address, nil); body != "right" {
				t.Errorf("second answer: %q, %v, want its own", body, err)
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
	p := newPool(t)
	p.maxIdle = 2
	for server := range 3 {
		if status, _, err := exchange(t, p, "POST", "http://"+serve(server), nil); status != 200 {
			t.Fatalf("request to host %d: %d, %v", server, status, err)
		}
	}
	if got := <-closed; got != 0 {
		t.Errorf("the connection to host %d was closed, want that to host 0", got)
	}
	if got := p.Idle(); got != 2 {
		t.Errorf("%d idle connections, want 2", got)
	}
}

func TestIdleConnectionsAreClosedInTime(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := Pool{maxIdle: 10}
		put := func() (closed func() bool) {
			ours, theirs := net.Pipe()
			s.put(newConn(nil, ours, authority{"http", "plays.melodia.app"}), time.Now())
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
		s.Close()
		if !empty(&s) {
			t.Error("want nothing left after Close")
		}
	})
}

func empty(s *Pool) bool {
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
	p := newPool(t)
	for range 3 {
		if status, body, err := exchange(t, p, http.MethodHead, "http://"+address, nil); status != 200 || body != "" || err != nil {
			t.Fatalf("answer %d, %q, %v, want 200 and no body", status, body, err)
		}
	}
	if got := connections.Load(); got != 1 {
		t.Errorf("%d connections, want 1", got)
	}
}

// panicking is a connection on which a request panics.
type panicking struct {
	*net.TCPConn
	closed int
}

func (*panicking) Read([]byte) (int, error) { panic("a mistake of ours") }

func (c *panicking) Close() error {
	c.closed++
	return c.TCPConn.Close()
}

// A panic between Get and Finish leaves no connection behind.
func TestPanicClosesTheConnection(t *testing.T) {
	t.Parallel()
	address := newRawServer(t, func(conn net.Conn, _ int) { io.Copy(io.Discard, conn) })
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	p, c := newPool(t), &panicking{TCPConn: conn.(*net.TCPConn)}
	p.dial = func(context.Context, string, string) (net.Conn, error) { return c, nil }
	func() {
		defer func() {
			if recover() == nil {
				t.Error("the request did not panic")
			}
		}()
		exchange(t, p, "POST", "http://"+address, nil)
	}()
	if c.closed != 1 || p.Idle() != 0 {
		t.Errorf("closed %d times with %d idle connections, want once and none", c.closed, p.Idle())
	}
}
