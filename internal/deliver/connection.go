package deliver

import (
	"bufio"
	"container/list"
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"net/url"
	"sync"
	"syscall"
	"time"
)

// connection is an HTTP/1.1 connection to a target. One call at a time has it
// to itself, and reads and writes it in its own goroutine: net/http's transport
// gives each connection two of its own, and handing a small call to them and
// back costs more than the call.
type connection struct {
	net.Conn
	bare    net.Conn        // without TLS, whose farewell may have to wait for the target
	raw     syscall.RawConn // nil where it cannot be looked at
	in      *bufio.Reader
	request []byte    // the head of the one under way; its memory serves the next
	head    int       // how many bytes of an answer's head may still be read; below zero: any number
	sending chan bool // gets whether sending in the background succeeded; nil: there is none

	to    authority
	since time.Time     // when it became idle
	place *list.Element // among the idle ones
}

// authority is where a connection leads.
type authority struct{ scheme, host string }

var errHeadTooLarge = errors.New("response headers larger than 64 KiB")

func newConnection(conn net.Conn, to authority) *connection {
	c := &connection{Conn: conn, bare: conn, to: to}
	c.in = bufio.NewReader(c)
	if t, ok := conn.(*tls.Conn); ok {
		c.bare = t.NetConn()
	}
	if s, ok := c.bare.(syscall.Conn); ok {
		c.raw, _ = s.SyscallConn()
	}
	return c
}

// Read reads no more of an answer's head than it may be long.
func (c *connection) Read(p []byte) (int, error) {
	if c.head < 0 {
		return c.Conn.Read(p)
	}
	if c.head == 0 {
		return 0, errHeadTooLarge
	}
	n, err := c.Conn.Read(p[:min(len(p), c.head)])
	c.head -= n
	return n, err
}

// backgroundBody is from which size on a body is written while the answer is
// awaited already: a target may answer, and read no more, before it has all of
// it. What is shorter fits into the buffers on the way.
const backgroundBody = 32 << 10

// roundTrip sends c.request with body and reads the head of the answer, which is to
// r. Its body must not be closed: net/http would read on to its end.
func (c *connection) roundTrip(r *http.Request, body []byte) (*http.Response, error) {
	var sent error
	if len(body) < backgroundBody {
		c.request = append(c.request, body...)
		_, sent = c.Write(c.request)
	} else {
		sending := make(chan bool, 1)
		c.sending = sending
		go func() {
			request := net.Buffers{c.request, body}
			_, err := request.WriteTo(c)
			sending <- err == nil
		}()
	}
	// Where sending failed the answer may be there all the same, and say why.
	resp, err := c.receive(r)
	if err != nil && sent != nil {
		err = sent
	}
	return resp, err
}

// sent reports whether the request was sent whole. It waits for nothing: who
// has the answer need not see a target take the rest.
func (c *connection) sent() bool {
	if c.sending == nil {
		return true // or there would be no answer
	}
	select {
	case whole := <-c.sending:
		c.sending = nil
		return whole
	default:
		return false
	}
}

// Close closes the connection and waits until nothing uses it any more.
func (c *connection) Close() error {
	err := c.bare.Close()
	if c.sending != nil {
		<-c.sending
	}
	return err
}

// receive reads the head of the answer to r, and those of interim answers (1xx)
// before it: together they may be as long as one.
func (c *connection) receive(r *http.Request) (*http.Response, error) {
	c.head = maxHeaderBytes
	defer func() { c.head = -1 }()
	for {
		resp, err := http.ReadResponse(c.in, r)
		if c.head == 0 && err != nil {
			err = errHeadTooLarge // it broke off there
		}
		if err != nil || resp.StatusCode == http.StatusSwitchingProtocols || resp.StatusCode/100 != 1 {
			return resp, err
		}
	}
}

// connections keeps those that are idle for further calls. Its zero value keeps none.
type connections struct {
	most int // how many are kept in all

	mu    sync.Mutex
	idle  map[authority][]*connection // the latest last
	order list.List                   // all of them, the latest first
	sweep *time.Timer                 // set while any are idle
}

// take returns an idle connection that is still open, or nil.
func (s *connections) take(to authority, now time.Time) *connection {
	for {
		s.mu.Lock()
		idle := s.idle[to]
		if len(idle) == 0 {
			s.mu.Unlock()
			return nil
		}
		c := idle[len(idle)-1]
		s.remove(c)
		s.mu.Unlock()
		if now.Sub(c.since) < idleTimeout && c.quiet() {
			return c
		}
		c.Close()
	}
}

// put keeps c, and closes the one that has been idle for longest where that is
// one too many.
func (s *connections) put(c *connection, now time.Time) {
	c.since = now
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.idle == nil {
		s.idle = make(map[authority][]*connection)
	}
	s.idle[c.to] = append(s.idle[c.to], c)
	c.place = s.order.PushFront(c)
	if s.order.Len() > s.most {
		s.closeOldest()
	}
	if s.sweep == nil && s.order.Len() > 0 {
		s.sweep = time.AfterFunc(idleTimeout, s.closeOld)
	}
}

// remove forgets c. s.mu is held.
func (s *connections) remove(c *connection) {
	idle := s.idle[c.to]
	for i, other := range idle { // the first or the last, nearly always
		if other == c {
			idle = append(idle[:i], idle[i+1:]...)
			break
		}
	}
	if s.idle[c.to] = idle; len(idle) == 0 {
		delete(s.idle, c.to)
	}
	s.order.Remove(c.place)
}

// closeOldest closes the one that has been idle for longest. s.mu is held.
func (s *connections) closeOldest() {
	c := s.order.Back().Value.(*connection)
	s.remove(c)
	c.Close()
}

// closeOld closes those that have been idle for too long.
func (s *connections) closeOld() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for oldest := s.order.Back(); oldest != nil; oldest = s.order.Back() {
		if age := time.Since(oldest.Value.(*connection).since); age < idleTimeout {
			s.sweep.Reset(idleTimeout - age)
			return
		}
		s.closeOldest()
	}
	s.sweep = nil
}

// closeAll closes those that are idle now.
func (s *connections) closeAll() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.order.Len() > 0 {
		s.closeOldest()
	}
	if s.sweep != nil {
		s.sweep.Stop()
		s.sweep = nil
	}
}

// connect returns a connection for a call to u that began at start, kept or new.
func (d *Deliverer) connect(ctx context.Context, start, deadline time.Time, u *url.URL) (*connection, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx) // a kept connection would take the request all the same
	}
	to := authority{u.Scheme, u.Host}
	if c := d.connections.take(to, start); c != nil {
		return c, nil
	}
	ctx, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	port := u.Port()
	dial := d.dial
	switch {
	case u.Scheme == "https":
		dial = d.dialTLS
		if port == "" {
			port = "443"
		}
	case port == "":
		port = "80"
	}
	conn, err := dial(ctx, "tcp", net.JoinHostPort(u.Hostname(), port))
	if err != nil {
		return nil, err
	}
	return newConnection(conn, to), nil
}
