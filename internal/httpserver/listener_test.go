package httpserver

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// service is a server on a Listener. Its handler answers a refusal by its status
// and detail, /wait once released is closed, and all else at once, without reading a body.
type service struct {
	t        *testing.T
	address  string
	listener *Listener
	waiting  chan struct{} // gets one when /wait has begun
	released chan struct{}
	log      *bytes.Buffer
}

func serve(t *testing.T, most int, configure ...func(*http.Server)) *service {
	t.Helper()
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &service{t: t, address: tcp.Addr().String(), waiting: make(chan struct{}, 100), released: make(chan struct{}), log: new(bytes.Buffer)}
	s.listener = Bound(tcp, most, slog.New(slog.NewTextHandler(s.log, nil)))
	server := &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if refusal := refusalOfHead(r); refusal != nil {
			http.Error(w, refusal.Detail, refusal.Status)
			return
		}
		if r.URL.Path == "/wait" {
			s.waiting <- struct{}{}
			<-s.released
		}
		if r.URL.Path == "/read" {
			b, err := io.ReadAll(r.Body)
			fmt.Fprintf(w, "%d bytes, %v", len(b), err)
			return
		}
		http.Error(w, "no body is read here", http.StatusForbidden)
	})}
	for _, set := range configure {
		set(server)
	}
	done := make(chan error)
	go func() { done <- s.listener.Serve(server) }()
	t.Cleanup(func() {
		select {
		case <-s.released:
		default:
			close(s.released)
		}
		if err := server.Shutdown(context.Background()); err != nil { // waits for connections that are being closed
			t.Error(err)
		}
		<-done
	})
	return s
}

// dial makes a connection and sends text.
func (s *service) dial(text string) *client {
	s.t.Helper()
	nc, err := net.Dial("tcp", s.address)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { _ = nc.Close() })
	c := &client{Conn: nc, t: s.t, r: bufio.NewReader(nc)}
	c.send(text)
	return c
}

// eventually waits until what it looks at, under the listener's lock, is so.
func (s *service) eventually(what string, is func(l *Listener) bool) {
	s.t.Helper()
	look := func() bool {
		s.listener.mu.Lock()
		defer s.listener.mu.Unlock()
		return is(s.listener)
	}
	for end := time.Now().Add(30 * time.Second); !look(); <-time.After(time.Millisecond) {
		if time.Now().After(end) {
			s.t.Fatalf("not so after 30 s: %s", what)
		}
	}
}

// empty waits until nothing of any connection is left.
func (s *service) empty() {
	s.t.Helper()
	s.eventually("nothing is counted", func(l *Listener) bool {
		return l.idle == queue{} && l.answering == queue{} && l.held == 0
	})
}

type client struct {
	net.Conn
	t *testing.T
	r *bufio.Reader
}

func (c *client) send(text string) {
	c.t.Helper()
	if _, err := io.WriteString(c, text); err != nil {
		c.t.Fatal(err)
	}
}

// expect reads an answer, and returns whether the connection stays open after it.
func (c *client) expect(status int, text string) (open bool) {
	c.t.Helper()
	_ = c.SetReadDeadline(time.Now().Add(30 * time.Second))
	response, err := http.ReadResponse(c.r, nil)
	if err != nil {
		c.t.Fatalf("%v, want %d %s", err, status, text)
	}
	defer response.Body.Close()
	b, err := io.ReadAll(response.Body)
	if got := strings.TrimSpace(string(b)); err != nil || response.StatusCode != status || got != text {
		c.t.Fatalf("got %d %s (%v), want %d %s", response.StatusCode, got, err, status, text)
	}
	return !response.Close
}

// expectClosed wants the connection closed without an answer.
func (c *client) expectClosed() {
	c.t.Helper()
	_ = c.SetReadDeadline(time.Now().Add(30 * time.Second))
	if b, err := io.ReadAll(c.r); errors.Is(err, os.ErrDeadlineExceeded) || len(b) > 0 {
		c.t.Fatalf("got %q (%v), want the connection closed", b, err)
	}
}

const (
	get     = "GET / HTTP/1.1\r\nHost: x\r\n"
	wait    = "GET /wait HTTP/1.1\r\nHost: x\r\n\r\n"
	refused = "no body is read here"
)

func TestOldestGoes(t *testing.T) {
	t.Parallel()
	s := serve(t, 3)
	oldest, second, third := s.dial(get), s.dial(""), s.dial("G")
	fourth := s.dial(get + "\r\n")
	fourth.expect(http.StatusForbidden, refused)
	oldest.expectClosed()
	for c, rest := range map[*client]string{second: get + "\r\n", third: strings.TrimPrefix(get, "G") + "\r\n"} {
		c.send(rest)
		c.expect(http.StatusForbidden, refused)
	}
	for _, c := range []*client{second, third, fourth} {
		_ = c.Close()
	}
	s.empty()
	if !strings.Contains(s.log.String(), `"closed connections to make room for others" count=1 max_connections=3`) {
		t.Errorf("the log does not say so: %s", s.log)
	}
}

// A connection that was used is younger than one that came after it.
func TestUsedConnectionIsYounger(t *testing.T) {
	t.Parallel()
	s := serve(t, 2)
	used := s.dial(get + "\r\n")
	used.expect(http.StatusForbidden, refused)
	other := s.dial(get)
	s.eventually("there are two", func(l *Listener) bool { return l.idle.count == 2 })
	used.send(get + "\r\n")
	used.expect(http.StatusForbidden, refused)
	s.eventually("the other is older", func(l *Listener) bool { return l.idle.count == 2 && l.idle.first.next.framing.between() })
	s.dial(get+"\r\n").expect(http.StatusForbidden, refused)
	other.expectClosed()
	used.send(get + "\r\n")
	used.expect(http.StatusForbidden, refused)
}

// Requests that are being answered stay, also where more of them wait behind.
func TestAnsweringStays(t *testing.T) {
	t.Parallel()
	s := serve(t, 3)
	answering := s.dial(wait + wait)
	<-s.waiting
	body := s.dial("POST /read HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nabc")
	idle := s.dial(get + "\r\n")
	idle.expect(http.StatusForbidden, refused)
	s.dial(get+"\r\n").expect(http.StatusForbidden, refused)
	body.expectClosed()
	s.dial(wait)
	idle.expectClosed()
	close(s.released)
	for range 2 {
		answering.expect(http.StatusForbidden, refused)
	}
}

// Where all are being answered, the one goes that has been so for longest.
func TestAllAnswering(t *testing.T) {
	t.Parallel()
	s := serve(t, 2)
	first := s.dial(wait)
	<-s.waiting
	second := s.dial(wait)
	<-s.waiting
	s.dial(get+"\r\n").expect(http.StatusForbidden, refused)
	first.expectClosed()
	close(s.released)
	second.expect(http.StatusForbidden, refused)
}

// Unfinished heads are bounded by their bytes too; others stay.
func TestHeldBytes(t *testing.T) {
	t.Parallel()
	s := serve(t, 100)
	s.listener.mu.Lock()
	s.listener.maxHeld = 5 * minHeld
	s.listener.mu.Unlock()
	idle := s.dial(get)
	s.eventually("one is there", func(l *Listener) bool { return l.idle.count == 1 })
	idle.send("\r\n")
	idle.expect(http.StatusForbidden, refused)
	s.eventually("it is idle", func(l *Listener) bool { return l.idle.count == 1 && l.held == 0 })
	half := get + "X: " + strings.Repeat("x", minHeld)
	var heads []*client
	for i := range 6 {
		heads = append(heads, s.dial(half))
		s.eventually("it is held, or one had to go", func(l *Listener) bool { return l.idle.count == min(i, 1)+2 && l.held <= l.maxHeld })
	}
	for i, c := range heads {
		if i < len(heads)-2 {
			c.expectClosed()
		}
	}
	heads[len(heads)-1].send("\r\n\r\n")
	heads[len(heads)-1].expect(http.StatusForbidden, refused)
	idle.send(get + "\r\n")
	idle.expect(http.StatusForbidden, refused)
	for _, c := range append(heads, idle) {
		_ = c.Close()
	}
	s.empty()
}

// A long head takes the place of as many short ones as it needs.
func TestLongHead(t *testing.T) {
	t.Parallel()
	s := serve(t, 100)
	s.listener.mu.Lock()
	s.listener.maxHeld = 7 * minHeld // fits the long one also where it comes in pieces
	s.listener.mu.Unlock()
	var short []*client
	for i := range 5 {
		short = append(short, s.dial(get))
		s.eventually("it is held", func(l *Listener) bool { return l.held == (i+1)*minHeld })
	}
	long := s.dial(get + "X: " + strings.Repeat("x", 3300))
	short[0].expectClosed()
	short[1].expectClosed()
	s.eventually("the bound holds", func(l *Listener) bool { return l.held > 3300 && l.held <= l.maxHeld })
	long.send("\r\n\r\n")
	long.expect(http.StatusForbidden, refused)
}

// A head that comes in pieces has ReadHeaderTimeout, on a kept connection too.
func TestUnfinishedHead(t *testing.T) {
	t.Parallel()
	s := serve(t, 10, func(server *http.Server) {
		server.ReadHeaderTimeout, server.IdleTimeout = 2*time.Second, time.Hour
	})
	kept := s.dial("")
	kept.send(get + "\r\n")
	kept.expect(http.StatusForbidden, refused)
	kept.send("GET ")
	kept.expect(http.StatusBadRequest, "400 Bad Request") // by net/http, of which the request line's part is a line
	first := s.dial("GET / HTTP/1.1\r\nHost: x\r\n")
	_ = first.SetReadDeadline(time.Now().Add(30 * time.Second))
	if b, err := io.ReadAll(first); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("got %q, want the connection closed", b)
	}
	s.empty()
}

// What is refused is answered, after what came before it, and the answer can be
// read by a caller that sends on.
func TestRefusals(t *testing.T) {
	t.Parallel()
	s := serve(t, 1000)
	tooMany := "\r\n" + lines(MaxHeadLines+1)
	tooLong := "\r\nX: " + strings.Repeat("x", MaxHead)
	for name, tt := range map[string]struct {
		line, rest string
		refusal    *Refusal
	}{
		"too many lines": {"GET / HTTP/1.1", tooMany, errHeadTooLarge},
		"too long":       {"POST /enqueue HTTP/1.1", tooLong, errHeadTooLarge},
		"long path":      {"GET /" + strings.Repeat("x", MaxHead), "", errHeadTooLarge},
		"short method":   {"A /" + strings.Repeat("x", MaxHead), "", errHeadTooLarge},
		"two lengths":    {"POST / HTTP/1.1", "\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + get, errTwoLengths},
		"length twice":   {"POST / HTTP/1.1", "\r\nHost: x\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\nabc" + get, errLengthTwice},
		"folded":         {"POST / HTTP/1.1", "\r\nHost: x\r\nContent-Length:\r\n 3\r\n\r\nabc" + get, errFolded},
		"HTTP/1.0":       {"POST / HTTP/1.0", "\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + get, errOldEncoding},
	} {
		for how, before := range map[string]string{"first": "", "second": get + "\r\n", "behind chunks": "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n"} {
			for _, early := range []int{0, 1, 3, 4, 9} { // so much comes on its own
				t.Run(fmt.Sprintf("%s, %s, %d bytes before", name, how, early), func(t *testing.T) {
					t.Parallel()
					c := s.dial(before + tt.line[:early])
					c.t = t
					if before != "" {
						c.expect(http.StatusForbidden, refused)
					}
					c.send(tt.line[early:] + tt.rest)
					for range 80 {
						c.send(strings.Repeat("x", 1<<16))
					}
					if open := c.expect(tt.refusal.Status, tt.refusal.Detail); open {
						t.Error("the connection stays open")
					}
				})
			}
		}
	}
}

// A caller that sends on and on, or says that it will, is not read for ever.
func TestDiscardEnds(t *testing.T) {
	t.Parallel()
	s := serve(t, 100)
	for name, sends := range map[string]bool{"sends": true, "is silent": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := s.dial("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000000\r\n\r\n")
			c.t = t
			for sends {
				if _, err := c.Write(make([]byte, 1<<16)); err != nil {
					return
				}
			}
			c.expect(http.StatusForbidden, refused)
			c.expectClosed()
		})
	}
	t.Cleanup(s.empty)
}

// An answer that comes before the body can be read by who sends all of it first.
func TestAnswerBeforeBody(t *testing.T) {
	t.Parallel()
	s := serve(t, 100)
	const size = 5 << 20
	for name, text := range map[string]string{
		"Content-Length": fmt.Sprintf("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s", size, strings.Repeat("x", size)),
		"chunked":        "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + strings.Repeat("10000\r\n"+strings.Repeat("x", 1<<16)+"\r\n", size>>16) + "0\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := s.dial(text)
			c.t = t
			if open := c.expect(http.StatusForbidden, refused); open {
				t.Error("the connection stays open")
			}
		})
	}
	t.Cleanup(s.empty)
}

// Whole requests go through as they came, one after another.
func TestRequestsGoThrough(t *testing.T) {
	t.Parallel()
	s := serve(t, 100)
	c := s.dial("")
	for range 3 {
		c.send("POST /read HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nabcde" + "POST /read HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX: y\r\n\r\n")
		c.expect(http.StatusOK, "5 bytes, <nil>")
		c.expect(http.StatusOK, "3 bytes, <nil>")
	}
	c.send("POST /read HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n")
	if line, err := c.r.ReadString('\n'); err != nil || line != "HTTP/1.1 100 Continue\r\n" {
		t.Fatalf("got %q (%v), want 100 Continue", line, err)
	}
	_, _ = c.r.ReadString('\n')
	c.send("abcde")
	c.expect(http.StatusOK, "5 bytes, <nil>")
	_ = c.Close()
	s.empty()
}

// The system keeps little of an answer that is not read.
func TestUnreadAnswer(t *testing.T) {
	t.Parallel()
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer inner.Close()
	caller, err := net.Dial("tcp", inner.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer caller.Close()
	if err := caller.(*net.TCPConn).SetReadBuffer(4 << 10); err != nil {
		t.Fatal(err)
	}
	c, err := Bound(inner, 1, slog.New(slog.DiscardHandler)).Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.SetWriteDeadline(time.Now().Add(time.Second)); err != nil {
		t.Fatal(err)
	}
	n, err := c.Write(make([]byte, 16<<20))
	if !errors.Is(err, os.ErrDeadlineExceeded) || n > 1<<20 {
		t.Errorf("%d bytes were taken (%v), want 1 MiB at most", n, err)
	}
}
