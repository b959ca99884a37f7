package http1

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

const maxHeaderBytes = 64 << 10

// ErrHeadTooLarge is the error of [Conn.Send] where the head of the answer, with the
// heads of interim answers, is larger than 64 KiB.
var ErrHeadTooLarge = errors.New("response headers larger than 64 KiB")

// Conn is a connection to a host, used for one request at a time. The goroutine that
// got it from [Pool.Get] sends the request ([Conn.Send]), reads the answer's body, may
// wait until the host has the request ([Conn.AwaitSent]) and then gives the connection
// back ([Conn.Finish]), whatever happened.
type Conn struct {
	conn    net.Conn
	pool    *Pool
	bare    net.Conn        // without TLS, whose farewell may have to wait for the host
	raw     syscall.RawConn // nil where it cannot be looked at
	in      *bufio.Reader
	request []byte // the head of the one under way; its memory serves the next
	head    int    // how many bytes of an answer's head may still be read; below zero: any number

	deadline time.Time   // of the request under way
	unbind   func() bool // from the context of the request under way

	sending    chan bool // gets whether sending in the background succeeded; nil: there is none, or it has ended
	sentAll    bool      // the whole request was handed to the network; known once sending is nil
	persistent bool      // the latest answer lets the connection stay open
	lostIdle   bool      // it ended before a byte of the answer, as one does that was closed while it was idle

	to       authority
	made     time.Time
	lifetime time.Duration // how old it may become
	requests int           // how many were answered over it
	idle     time.Duration // how long it may be idle now, by the latest answer
	reused   bool          // the request under way is not its first
	idleFor  time.Duration // how long it was idle before that
	since    time.Time     // when it became idle
	until    time.Time     // until when it may be used again, while it is idle
	place    *list.Element // among the idle ones
}

// authority is where a connection leads.
type authority struct{ scheme, host string }

func newConn(p *Pool, conn net.Conn, to authority) *Conn {
	c := &Conn{conn: conn, pool: p, bare: conn, to: to, made: time.Now(), lifetime: randomLifetime(), idle: idleTimeout}
	c.in = bufio.NewReader(source{c})
	if t, ok := conn.(*tls.Conn); ok {
		c.bare = t.NetConn()
	}
	if s, ok := c.bare.(syscall.Conn); ok {
		c.raw, _ = s.SyscallConn()
	}
	return c
}

// source is a connection as answers are read from it.
type source struct{ c *Conn }

// Read reads no more of an answer's head than its bound.
func (s source) Read(p []byte) (int, error) {
	c := s.c
	if c.head < 0 {
		return c.conn.Read(p)
	}
	if c.head == 0 {
		return 0, ErrHeadTooLarge
	}
	n, err := c.conn.Read(p[:min(len(p), c.head)])
	c.head -= n
	return n, err
}

// backgroundBody is the size from which on a body is written while the answer is
// awaited already: a host may answer, and read no more, before it has all of the
// body. What is shorter fits into the buffers on the way.
const backgroundBody = 32 << 10

// maxUnread is how much of an answer is read and thrown away so that the host goes on
// reading the request.
const maxUnread = 16 << 20

// Buffer returns an empty buffer for the head of the next request. Its memory serves
// all requests over the connection.
func (c *Conn) Buffer() []byte { return c.request[:0] }

// Send sends the request for u whose head is head (see [AppendStart]), with body, and
// reads the head of the answer; interim answers (1xx, but for 101) are skipped. It
// keeps head, and body until Finish returns. A large body is still being sent when
// Send returns. Where sending fails but an answer has come, the answer counts.
//
// The answer's Body must not be closed: net/http would read on to its end. It need
// not be read. After 101 there is none.
func (c *Conn) Send(method string, u *url.URL, head, body []byte) (*http.Response, error) {
	c.request, c.persistent = head, false
	resp, err := c.roundTrip(&http.Request{Method: method, URL: u}, body)
	if c.lostIdle {
		c.pool.learnLost(c)
	}
	if err != nil {
		return nil, err
	}
	c.persistent = !resp.Close && resp.ProtoAtLeast(1, 1) && resp.StatusCode != http.StatusSwitchingProtocols
	c.idle = idleLimit(resp.Header)
	return resp, nil
}

// LostIdle reports whether Send failed because a connection that had been idle ended
// before a byte of the answer: the host may have closed it before the request arrived.
func (c *Conn) LostIdle() bool { return c.lostIdle }

// roundTrip sends c.request with body and reads the head of the answer, which is to
// r.
func (c *Conn) roundTrip(r *http.Request, body []byte) (*http.Response, error) {
	var failed error
	if len(body) < backgroundBody {
		c.request = append(c.request, body...)
		_, failed = c.conn.Write(c.request)
		c.sentAll = failed == nil
	} else {
		sending := make(chan bool, 1)
		c.sending, c.sentAll = sending, false
		go func() {
			request := net.Buffers{c.request, body}
			_, err := request.WriteTo(c.conn)
			sending <- err == nil
		}()
	}
	// Where sending failed the answer may be there all the same, and say why.
	resp, err := c.receive(r)
	if err != nil && failed != nil && RemoteAlert(err) == "" {
		err = failed
	}
	c.lostIdle = c.reused && err != nil && c.head == maxHeaderBytes && IsEnd(err)
	c.head = -1
	return resp, err
}

// IsEnd reports whether err says that the other side ended the connection.
func IsEnd(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) ||
		errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNABORTED)
}

// sent reports whether the request was handed to the network whole. It waits for nothing.
func (c *Conn) sent() bool {
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

// AwaitSent waits until the host has the whole request, and reports whether it has:
// its system has acknowledged the last byte. It waits until the request's deadline, the
// end of ctx or the end of the connection. Closing a connection before throws away what
// is under way, where the host still writes (RFC 9112 §9.6). It waits for nothing where
// the connection will stay open and all was sent: then the system sees to the rest.
//
// whole says that the answer's body was read to its end. Where it was not, AwaitSent
// reads and throws away what follows, since many hosts read nothing while they cannot
// write; the connection cannot be used again then.
func (c *Conn) AwaitSent(ctx context.Context, whole bool) bool {
	if whole && c.persistent && c.sending == nil && c.sentAll {
		return true
	}
	return c.finishSending(ctx, !whole)
}

// Finish ends the use of the connection. It is kept for another request where whole
// says that the answer's body was read to its end, the answer lets it stay open and
// the whole request was sent. Else it is closed, and Finish waits until nothing uses
// it or the request's body any more.
func (c *Conn) Finish(whole bool) {
	bound := c.unbind() // ctx has not ended
	if bound && whole && c.persistent && c.sent() {
		c.pool.put(c, time.Now())
		return
	}
	c.close()
}

// finishSending is AwaitSent where there is something to wait for.
func (c *Conn) finishSending(ctx context.Context, readOn bool) bool {
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
		case <-time.After(min(pause, time.Until(c.deadline))):
			if !time.Now().Before(c.deadline) {
				return false
			}
		case <-ctx.Done():
			return false
		}
	}
	return false
}

// close closes the connection and waits until nothing uses it any more.
func (c *Conn) close() {
	_ = c.bare.Close()
	if c.sending != nil {
		<-c.sending
	}
}

// receive reads the head of the answer to r, and those of interim answers (1xx)
// before it: together they may be as long as one. It leaves in c.head how much longer.
func (c *Conn) receive(r *http.Request) (*http.Response, error) {
	c.head = maxHeaderBytes
	for {
		resp, err := http.ReadResponse(c.in, r)
		if c.head == 0 && err != nil {
			err = ErrHeadTooLarge // it broke off there
		}
		if err != nil || resp.StatusCode == http.StatusSwitchingProtocols || resp.StatusCode/100 != 1 {
			return resp, err
		}
	}
}

// RemoteAlert returns the name of the TLS alert by which the host ended the
// connection, or "". Package tls does not export the type of such an error; its text
// is its own.
func RemoteAlert(err error) string {
	if e, ok := errors.AsType[*net.OpError](err); ok && e.Op == "remote error" {
		return e.Err.Error()
	}
	return ""
}
