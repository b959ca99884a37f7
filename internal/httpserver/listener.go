// Package httpserver is what stands between the network and every door of the
// service. It knows nothing of what a door serves.
//
// A [Listener] bounds how many connections there are, and refuses heads of requests
// before net/http parses them.
package httpserver

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/melodia/orchestrator/internal/logging"
)

const (
	// maxHeld bounds the bytes of all unfinished heads together.
	maxHeld = 16 << 20
	// maxDiscard and discardTime bound what is read of a request, and thrown away,
	// after its answer.
	maxDiscard  = 8 << 20
	discardTime = 2 * time.Second
	// writeBuffer is how many bytes the system keeps of an answer that a caller does
	// not read. Linux doubles the number, and without it takes up to 4 MiB for each
	// connection, which counts as the container's memory.
	writeBuffer = 64 << 10
)

// Listener accepts connections for an [http.Server]. A connection is idle while no
// request on it is being answered. When there are too many connections, or when
// unfinished heads take too many bytes, the Listener closes the connection that has
// been idle for longest; where none is idle, the one that has been answering for longest.
//
// A head of more than [MaxHead] bytes or [MaxHeadLines] does not reach the server's
// handler, nor does one that says twice how long its body is: see [Door.RefuseHeads].
type Listener struct {
	net.Listener
	max     int
	maxHeld int
	log     *slog.Logger

	mu        sync.Mutex
	idle      queue
	answering queue
	held      int // bytes of unfinished heads

	evictions logging.Limiter
	draining  atomic.Bool
}

// Bound returns a Listener that has up to most connections of l open.
func Bound(l net.Listener, most int, log *slog.Logger) *Listener {
	return &Listener{Listener: l, max: most, maxHeld: maxHeld, log: log}
}

// Serve is [http.Server.Serve] on l. It sets the server's ConnState and ConnContext, and
// wraps its Handler.
func (l *Listener) Serve(s *http.Server) error {
	s.Handler = l.closeConnections(s.Handler)
	s.ConnState = func(nc net.Conn, state http.ConnState) {
		c, ok := nc.(*conn)
		if !ok {
			return
		}
		c.active.Store(state == http.StateActive)
		if state == http.StateIdle {
			l.answered(c)
		}
	}
	s.ConnContext = func(ctx context.Context, nc net.Conn) context.Context {
		return context.WithValue(ctx, connKey{}, nc)
	}
	return s.Serve(l)
}

type connKey struct{}

// refusedLength is the Content-Length of what a refused head is replaced with. A
// caller who sends it gains nothing: the body would have to be as long.
const refusedLength = 1 << 62

// refusedRest completes a request line that begins with what went on early.
const refusedRest = " HTTP/1.1\r\nHost: refused\r\nContent-Length: 4611686018427387904\r\n\r\n"

// refusalOfHead returns why a request is to be refused at once, nil unless it is.
// What else r holds is not what was sent.
func refusalOfHead(r *http.Request) *Refusal {
	if r.ContentLength != refusedLength { // nearly always
		return nil
	}
	if c, ok := r.Context().Value(connKey{}).(*conn); ok {
		return c.refusal
	}
	return nil
}

// Accept is part of net.Listener.
func (l *Listener) Accept() (net.Conn, error) {
	nc, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	if buffered, ok := nc.(interface{ SetWriteBuffer(bytes int) error }); ok {
		_ = buffered.SetWriteBuffer(writeBuffer) // fails where the caller is gone
	}
	c := &conn{Conn: nc, listener: l}
	l.mu.Lock()
	var victim *conn
	if l.idle.count+l.answering.count >= l.max {
		if victim = l.idle.first; victim == nil {
			victim = l.answering.first
		}
		l.remove(victim)
	}
	l.idle.add(c)
	l.mu.Unlock()
	l.evict(victim)
	return c, nil
}

// hold counts n more bytes of an unfinished head of c.
func (l *Listener) hold(c *conn, n int) {
	l.mu.Lock()
	if c.queue != nil {
		c.counted += n
		l.held += n
	}
	var victims []*conn
	for victim := l.idle.first; victim != nil && l.held > l.maxHeld; {
		next := victim.next
		if victim.counted > 0 {
			l.remove(victim)
			victims = append(victims, victim)
		}
		victim = next
	}
	l.mu.Unlock()
	for _, victim := range victims {
		l.evict(victim)
	}
}

// release says that no bytes of c are held any more.
func (l *Listener) release(c *conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.held -= c.counted
	c.counted = 0
}

// forget says that c is being closed.
func (l *Listener) forget(c *conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.remove(c)
}

// received says that n more requests of c have been received whole.
func (l *Listener) received(c *conn, n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if c.queue == nil {
		return
	}
	c.unanswered += n
	if c.queue != &l.answering {
		c.queue.remove(c)
		l.answering.add(c)
	}
}

// answered says that a request of c was answered, and that c is still open.
func (l *Listener) answered(c *conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if c.queue == nil {
		return
	}
	c.unanswered--
	c.queue.remove(c)
	if c.unanswered > 0 {
		l.answering.add(c)
		return
	}
	c.unanswered = 0
	l.idle.add(c)
}

// remove takes c out of its queue; it may be nil or closed. l.mu must be held.
func (l *Listener) remove(c *conn) {
	if c == nil || c.queue == nil {
		return
	}
	c.queue.remove(c)
	l.held -= c.counted
	c.counted = 0
}

// evict closes a connection in favour of others; nil is none.
func (l *Listener) evict(c *conn) {
	if c == nil {
		return
	}
	_ = c.Conn.Close()
	if count := l.evictions.Count(); count > 0 {
		l.log.Warn("closed connections to make room for others", "count", count, "max_connections", l.max)
	}
}

// queue is connections in the order in which they came into it.
type queue struct {
	first, last *conn
	count       int
}

func (q *queue) add(c *conn) {
	c.queue, c.previous, c.next = q, q.last, nil
	if q.last == nil {
		q.first = c
	} else {
		q.last.next = c
	}
	q.last = c
	q.count++
}

func (q *queue) remove(c *conn) {
	if c.previous == nil {
		q.first = c.next
	} else {
		c.previous.next = c.next
	}
	if c.next == nil {
		q.last = c.previous
	} else {
		c.next.previous = c.previous
	}
	c.queue, c.previous, c.next = nil, nil, nil
	q.count--
}

// conn lets the server read heads of requests when they are whole.
type conn struct {
	net.Conn
	listener *Listener
	active   atomic.Bool // net/http has a request's head, and has not answered it

	// Guarded by listener.mu.
	queue          *queue // nil: it is closed
	previous, next *conn
	unanswered     int // requests that are whole
	counted        int // bytes of the listener's held

	// For the goroutine that reads: net/http lets one at a time.
	framing framing
	held    []byte   // what has come and was not read
	ready   int      // how much of that may be read
	end     error    // what Read returns after that, nil while there may be more
	refusal *Refusal // set before its request is read
}

// Read is part of net.Conn.
func (c *conn) Read(p []byte) (int, error) {
	for c.ready == 0 {
		switch {
		case c.end != nil:
			return 0, c.end
		case len(c.held) > 0:
			if err := c.readHead(); err != nil {
				return 0, err
			}
		default:
			n, err := c.Conn.Read(p)
			if n <= 0 {
				return n, err
			}
			ready := c.follow(p[:n])
			switch {
			case c.end != nil:
				c.held = c.replacement(nil)
				c.ready = len(c.held)
			case ready < n:
				c.held = append(make([]byte, 0, max(n-ready, minHeld)), p[ready:n]...)
				c.listener.hold(c, cap(c.held))
			}
			if ready > 0 {
				return ready, nil
			}
		}
	}
	n := copy(p, c.held[:c.ready])
	c.held = c.held[n:]
	c.ready -= n
	if len(c.held) == 0 {
		c.held = nil
		c.listener.release(c)
	}
	return n, nil
}

const minHeld = 1 << 10

// readHead reads more of a head that is not whole. The error is the connection's,
// and what is held stays there: a timeout may be net/http's way to end a Read.
func (c *conn) readHead() error {
	if len(c.held) == cap(c.held) {
		larger := make([]byte, len(c.held), min(2*cap(c.held), MaxHead+maxEarly))
		copy(larger, c.held)
		c.listener.hold(c, cap(larger)-cap(c.held))
		c.held = larger
	}
	n, err := c.Conn.Read(c.held[len(c.held):cap(c.held)])
	if n <= 0 {
		if errors.Is(err, io.EOF) { // net/http has an answer to a part of a head
			c.end, c.ready = err, len(c.held)
			return nil
		}
		return err
	}
	c.held = c.held[:len(c.held)+n]
	if c.ready = c.follow(c.held); c.end != nil {
		c.held = c.replacement(c.held[:c.ready])
		c.ready = len(c.held)
	}
	return nil
}

// follow returns how much of b may be read.
func (c *conn) follow(b []byte) int {
	ready, whole, err := c.framing.follow(b)
	if whole > 0 {
		c.listener.received(c, whole)
	}
	if err != nil {
		c.end = err
		c.refusal, _ = errors.AsType[*Refusal](err)
	}
	return ready
}

// replacement is what is read behind before, after the end of what may be read: a
// head in the place of one that was refused.
func (c *conn) replacement(before []byte) []byte {
	if c.refusal == nil {
		return before
	}
	early := c.framing.early[:c.framing.earlyCount] // was read
	line := "GET /"
	switch space := bytes.IndexByte(early, ' '); {
	case space >= 0 && space == len(early)-1:
		line = "/"
	case space >= 0:
		line = ""
	case len(early) > 0:
		line = " /"
	}
	return append(append(before[:len(before):len(before)], line...), refusedRest...)
}

// CloseWrite says that nothing will be written any more. net/http calls it after
// the answer to a request whose body it did not read. Some callers read no answer
// before they have sent all of that, and lose it where the connection is closed
// while they send: so this reads on and throws away, up to 8 MiB and for up to 2 s.
func (c *conn) CloseWrite() error {
	var err error
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		err = half.CloseWrite()
	}
	if c.refusal != nil || !c.framing.between() {
		_ = c.Conn.SetReadDeadline(time.Now().Add(discardTime))
		_, _ = io.CopyN(io.Discard, c.Conn, maxDiscard) // the answer is sent
	}
	return err
}

// Close is part of net.Conn.
func (c *conn) Close() error {
	c.listener.forget(c)
	return c.Conn.Close()
}
