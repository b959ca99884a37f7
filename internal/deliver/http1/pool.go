package http1

import (
	"container/list"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	// idleTimeout is how long a connection is kept idle where the host does not say
	// how long it keeps it. It is below the 2 s after which gunicorn closes an idle
	// connection (uvicorn: 5 s, Node.js: 5 or 6): were the host first, a request
	// could meet the closing connection and be lost.
	idleTimeout = 1500 * time.Millisecond
	// idleMargin is how much sooner than the host a connection is given up.
	idleMargin = time.Second
	// maxLifetime is the greatest age of a connection, and a sixth of it that of a busy
	// one, which has carried busyRequests. A host that grows behind its name or
	// address gets requests at its new places only over new connections.
	maxLifetime  = time.Minute
	busyRequests = 10
	// minIdleTimeout is the least that is learnt from connections that were closed.
	// A host that restarts closes all of them, of any age; requests that follow each
	// other closely must go on sharing connections to it.
	minIdleTimeout = 100 * time.Millisecond
	// learntFor is how long an authority's idle timeout is remembered, and maxLearnt
	// of how many authorities.
	learntFor = 10 * time.Minute
	maxLearnt = 1000
)

// randomLifetime is how long a new connection is used: [maxLifetime] or up to 10 %
// less, so that those made together are not renewed together.
func randomLifetime() time.Duration {
	return maxLifetime - time.Duration(rand.Int64N(int64(maxLifetime/10))) //nolint:gosec // not a secret
}

// idleLimit is how long a connection may be idle after an answer with the header
// fields h: [idleMargin] less than the field Keep-Alive names (`timeout=5, max=100`,
// seconds; RFC 2068 §19.7.1.1), and [idleTimeout] where it names nothing.
func idleLimit(h http.Header) time.Duration {
	for _, line := range h["Keep-Alive"] {
		for parameter := range strings.SplitSeq(line, ",") {
			name, value, _ := strings.Cut(parameter, "=")
			if !strings.EqualFold(strings.TrimSpace(name), "timeout") {
				continue
			}
			value = strings.Trim(strings.TrimSpace(value), `"`)
			if value == "" || strings.Trim(value, "0123456789") != "" {
				continue
			}
			seconds, err := strconv.ParseInt(value, 10, 64)
			if err != nil || seconds > int64(maxLifetime/time.Second) {
				return maxLifetime
			}
			return max(time.Duration(seconds)*time.Second-idleMargin, 0)
		}
	}
	return idleTimeout
}

// Options are what a [Pool] needs to know.
type Options struct {
	// Dial connects to address, a host and its port. It returns when ctx is done. It
	// must not be nil.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// Exhausted reports whether err may come from a lack that closing an idle
	// connection ends, such as that of descriptors. Then one is closed and the dial
	// is repeated. Nil: never.
	Exhausted func(err error) bool
	// TLS is for https; nil is the zero Config.
	TLS *tls.Config
	// MaxIdle is how many idle connections are kept in all, 1 at least. It does not
	// limit how many are in use.
	MaxIdle int
}

// Pool makes connections and keeps those that are idle for further requests to the
// same scheme, host and port. Any number of goroutines may use it.
type Pool struct {
	dial      func(ctx context.Context, network, address string) (net.Conn, error)
	exhausted func(err error) bool
	tls       *tls.Config
	maxIdle   int

	mu      sync.Mutex
	idle    map[authority][]*Conn // the latest last
	order   list.List             // all of them, the latest first
	sweep   *time.Timer           // set while any are idle
	sweepAt time.Time             // when it is due
	learnt  map[authority]learnt
}

// NewPool makes a pool. Close must be called when no connection of it is in use any
// more.
func NewPool(o Options) *Pool {
	p := &Pool{dial: o.Dial, exhausted: o.Exhausted, tls: o.TLS, maxIdle: max(o.MaxIdle, 1)}
	if p.tls == nil {
		p.tls = new(tls.Config)
	}
	if p.exhausted == nil {
		p.exhausted = func(error) bool { return false }
	}
	return p
}

// ErrHandshake is in the errors of [Pool.Get] where the TLS handshake failed; the
// cause follows it.
var ErrHandshake = errors.New("TLS handshake")

// Get returns a connection for one request to u, whose scheme is http or https: one
// that is kept, or a new one where none is kept or fresh is true. Everything that is
// done with it fails once deadline has passed or ctx has ended, until [Conn.Finish],
// which must be called. Get blocks no longer than that. Where ctx has ended already it
// returns the cause and no kept connection, which would take the request all the same.
func (p *Pool) Get(ctx context.Context, deadline time.Time, u *url.URL, fresh bool) (*Conn, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	to := authority{u.Scheme, u.Host}
	var c *Conn
	if !fresh {
		c = p.take(to)
	}
	if c == nil {
		conn, err := p.connect(ctx, deadline, u)
		if err != nil {
			return nil, err
		}
		c = newConn(p, conn, to)
	}
	c.deadline, c.lostIdle = deadline, false
	_ = c.conn.SetDeadline(deadline)
	c.unbind = context.AfterFunc(ctx, func() { _ = c.conn.SetDeadline(time.Unix(1, 0)) })
	return c, nil
}

// connect makes a connection for u.
func (p *Pool) connect(ctx context.Context, deadline time.Time, u *url.URL) (net.Conn, error) {
	ctx, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	dial, port := p.dial, "80"
	if u.Scheme == "https" {
		dial, port = p.dialTLS, "443"
	}
	if given := u.Port(); given != "" {
		port = given
	}
	address := net.JoinHostPort(u.Hostname(), port)
	conn, err := dial(ctx, "tcp", address)
	for err != nil && p.exhausted(err) && p.closeOne() {
		conn, err = dial(ctx, "tcp", address)
	}
	return conn, err
}

// dialTLS dials and makes the handshake.
func (p *Pool) dialTLS(ctx context.Context, network, address string) (net.Conn, error) {
	conn, err := p.dial(ctx, network, address)
	if err != nil {
		return nil, err
	}
	config := p.tls.Clone()
	config.NextProtos = []string{"http/1.1"}
	config.ServerName, _, _ = net.SplitHostPort(address)
	tlsConn := tls.Client(conn, config)
	if err := tlsConn.HandshakeContext(ctx); err != nil {
		conn.Close()
		return nil, fmt.Errorf("%w: %w", ErrHandshake, err)
	}
	return tlsConn, nil
}

// Idle returns how many connections are idle now.
func (p *Pool) Idle() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.order.Len()
}

// learnt is what was learnt of an authority that closed an idle connection.
type learnt struct {
	limit time.Duration // connections to it are idle no longer
	until time.Time     // when that is forgotten
}

// take returns an idle connection that is still open, or nil.
func (p *Pool) take(to authority) *Conn {
	for {
		p.mu.Lock()
		idle := p.idle[to]
		if len(idle) == 0 {
			p.mu.Unlock()
			return nil
		}
		c := idle[len(idle)-1]
		p.remove(c)
		p.mu.Unlock()
		if p.usable(c, time.Now()) {
			c.reused = true
			return c
		}
		c.close()
	}
}

// usable reports whether c may be used again, and learns from it where the host
// closed it.
func (p *Pool) usable(c *Conn, now time.Time) bool {
	if !now.Before(c.until) {
		return false
	}
	if !c.reusable() {
		p.mu.Lock()
		p.learn(c, now.Sub(c.since), now)
		p.mu.Unlock()
		return false
	}
	c.idleFor = now.Sub(c.since)
	return true
}

// learnLost takes note that the host ended c, which had been idle, before it answered.
func (p *Pool) learnLost(c *Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.learn(c, c.idleFor, time.Now())
}

// put keeps c for as long as it may be idle, and closes the one that has been idle
// for longest where that is one too many.
func (p *Pool) put(c *Conn, now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	limit := c.idle
	if l, ok := p.learnt[c.to]; ok && now.Before(l.until) {
		limit = min(limit, l.limit)
	}
	c.requests++
	life := c.lifetime
	if c.requests >= busyRequests {
		life /= 6
	}
	limit = min(limit, life-now.Sub(c.made))
	c.since, c.until = now, now.Add(limit)
	if limit <= 0 {
		c.close()
		return
	}
	if p.idle == nil {
		p.idle = make(map[authority][]*Conn)
	}
	p.idle[c.to] = append(p.idle[c.to], c)
	c.place = p.order.PushFront(c)
	if p.order.Len() > p.maxIdle {
		p.closeOldest()
	}
	p.sweepBy(c.until, now)
}

// learn remembers that c was found closed when it had been idle for age, or with bytes
// on it that were not asked for: connections to its authority are idle for half as
// long at most from now on. p.mu is held.
func (p *Pool) learn(c *Conn, age time.Duration, now time.Time) {
	if c.raw == nil {
		return // it cannot be looked at
	}
	to := c.to
	limit := max(age/2, minIdleTimeout)
	if old, ok := p.learnt[to]; ok && now.Before(old.until) {
		limit = min(limit, old.limit)
	}
	if p.learnt == nil {
		p.learnt = make(map[authority]learnt)
	}
	if _, ok := p.learnt[to]; !ok && len(p.learnt) >= maxLearnt {
		for other := range p.learnt { // any
			delete(p.learnt, other)
			break
		}
	}
	p.learnt[to] = learnt{limit: limit, until: now.Add(learntFor)}
	for _, other := range p.idle[to] {
		if until := other.since.Add(limit); until.Before(other.until) {
			other.until = until
			p.sweepBy(until, now)
		}
	}
}

// remove forgets c. p.mu is held.
func (p *Pool) remove(c *Conn) {
	idle := p.idle[c.to]
	for i, other := range idle { // the first or the last, nearly always
		if other == c {
			idle = append(idle[:i], idle[i+1:]...)
			break
		}
	}
	if p.idle[c.to] = idle; len(idle) == 0 {
		delete(p.idle, c.to)
	}
	p.order.Remove(c.place)
}

// closeOldest closes the one that has been idle for longest. p.mu is held.
func (p *Pool) closeOldest() {
	c := p.order.Back().Value.(*Conn)
	p.remove(c)
	c.close()
}

// closeOne closes the one that has been idle for longest, and reports whether there was one.
func (p *Pool) closeOne() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.order.Len() == 0 {
		return false
	}
	p.closeOldest()
	return true
}

// sweepBy sets the timer to moment, unless it is due before. p.mu is held.
func (p *Pool) sweepBy(moment, now time.Time) {
	switch {
	case p.order.Len() == 0:
	case p.sweep == nil:
		p.sweepAt = moment
		p.sweep = time.AfterFunc(moment.Sub(now), p.closeOld)
	case moment.Before(p.sweepAt):
		p.sweepAt = moment
		p.sweep.Reset(moment.Sub(now))
	}
}

// closeOld closes those whose time is over.
func (p *Pool) closeOld() {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	p.sweep = nil
	var next time.Time
	for e := p.order.Front(); e != nil; {
		c := e.Value.(*Conn)
		e = e.Next()
		if !now.Before(c.until) {
			p.remove(c)
			if !c.reusable() {
				p.learn(c, now.Sub(c.since), now)
			}
			c.close()
		} else if next.IsZero() || c.until.Before(next) {
			next = c.until
		}
	}
	p.sweepBy(next, now)
}

// Close closes the idle connections. It waits for nothing and may be called twice.
func (p *Pool) Close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for p.order.Len() > 0 {
		p.closeOldest()
	}
	if p.sweep != nil {
		p.sweep.Stop()
		p.sweep = nil
	}
}
