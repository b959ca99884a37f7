package deliver

import (
	"bufio"
	"container/list"
	"context"
	"crypto/tls"
	"errors"
	"io"
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
	request []byte // the head of the one under way; its memory serves the next
	head    int    // how many bytes of an answer's head may still be read; below zero: any number

	sending  chan bool // gets whether sending in the background succeeded; nil: there is none, or it has ended
	sentAll  bool      // the whole request was handed to the network; known once sending is nil
	lostIdle bool      // it ended before a byte of the answer, as one does that was closed while it was idle

	to      authority
	made    time.Time
	life    time.Duration // how old it may become
	calls   int           // how many were made over it
	idle    time.Duration // how long it may be idle now, by the latest answer
	reused  bool          // the call under way is not its first
	idleFor time.Duration // how long it was idle before that
	since   time.Time     // when it became idle
	until   time.Time     // until when it may be used again, while it is idle
	place   *list.Element // among the idle ones
}

// authority is where a connection leads.
type authority struct{ scheme, host string }

var errHeadTooLarge = errors.New("response headers larger than 64 KiB")

func newConnection(conn net.Conn, to authority) *connection {
	c := &connection{Conn: conn, bare: conn, to: to, made: time.Now(), life: lifetime(), idle: idleTimeout}
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

// maxUnread is how much of an answer is read and thrown away so that the target
// goes on reading the request.
const maxUnread = 16 << 20

// roundTrip sends c.request with body and reads the head of the answer, which is to
// r. Its body must not be closed: net/http would read on to its end.
func (c *connection) roundTrip(r *http.Request, body []byte) (*http.Response, error) {
	var failed error
	if len(body) < backgroundBody {
		c.request = append(c.request, body...)
		_, failed = c.Write(c.request)
		c.sentAll = failed == nil
	} else {
		sending := make(chan bool, 1)
		c.sending, c.sentAll = sending, false
		go func() {
			request := net.Buffers{c.request, body}
			_, err := request.WriteTo(c.Conn)
			sending <- err == nil
		}()
	}
	// Where sending failed the answer may be there all the same, and say why.
	resp, err := c.receive(r)
	if err != nil && failed != nil && remoteAlert(err) == "" {
		err = failed
	}
	c.lostIdle = c.reused && err != nil && c.head == maxHeaderBytes && isEnd(err)
	c.head = -1
	return resp, err
}

// isEnd reports whether err says that the other side ended the connection.
func isEnd(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) ||
		errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNABORTED)
}

// sent reports whether the request was handed to the network whole. It waits for nothing.
func (c *connection) sent() bool {
	if c.sending != nil {
		select {
		case c.sentAll = <-c.sending:
			c.sending = nil
		default:
			return false
		}
	}
	return c.sentAll
}

// finishSending waits until the target has all of the request, and reports whether
// it has: its system has acknowledged the last byte. It waits until deadline, the
// end of ctx or the end of the connection. Closing a connection before throws away
// what is under way, where the target still writes (RFC 9112 §9.6).
//
// readOn says that the answer was not read to its end. What follows is read and
// thrown away meanwhile, since many targets read nothing while they cannot write;
// the connection cannot be used again then.
func (c *connection) finishSending(ctx context.Context, deadline time.Time, readOn bool) bool {
	if c.sent() && c.unacknowledged() == 0 {
		return true
	}
	if readOn {
		var reading sync.WaitGroup
		reading.Go(func() { _, _ = io.CopyN(io.Discard, c.bare, maxUnread) })
		defer reading.Wait()
		defer func() { _ = c.bare.SetReadDeadline(time.Unix(1, 0)) }()
	}
	if c.sending != nil { // until the connection's own deadline at most
		c.sentAll = <-c.sending
		c.sending = nil
	}
	for pause := time.Millisecond; c.sentAll; pause = min(2*pause, 50*time.Millisecond) {
		if c.unacknowledged() == 0 {
			return true
		}
		if c.ended() {
			return false
		}
		select {
		case <-time.After(min(pause, time.Until(deadline))):
			if !time.Now().Before(deadline) {
				return false
			}
		case <-ctx.Done():
			return false
		}
	}
	return false
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
// before it: together they may be as long as one. It leaves in c.head how much longer.
func (c *connection) receive(r *http.Request) (*http.Response, error) {
	c.head = maxHeaderBytes
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

// connect returns a connection for a call to u: a new one where fresh says so, or
// where none is kept.
func (d *Deliverer) connect(ctx context.Context, deadline time.Time, u *url.URL, fresh bool) (*connection, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx) // a kept connection would take the request all the same
	}
	to := authority{u.Scheme, u.Host}
	if !fresh {
		if c := d.connections.take(to); c != nil {
			return c, nil
		}
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
	ctx = d.nameServers.watchLookup(ctx, d.resolver, deadline)
	addr := net.JoinHostPort(u.Hostname(), port)
	conn, err := dial(ctx, "tcp", addr)
	for localShortage(err) != "" && d.connections.closeOne() {
		conn, err = dial(ctx, "tcp", addr)
	}
	if err != nil {
		return nil, err
	}
	return newConnection(conn, to), nil
}
