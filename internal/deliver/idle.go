package deliver

import (
	"container/list"
	"math/rand/v2"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	// idleTimeout is how long a connection is kept idle where the target does not
	// say how long it keeps it. It is below the 2 s after which gunicorn closes an
	// idle connection (uvicorn: 5 s, Node.js: 5 or 6): were the target first, a call
	// could meet the closing connection and be lost, and an attempt with it.
	idleTimeout = 1500 * time.Millisecond
	// idleMargin is how much sooner than the target a connection is given up.
	idleMargin = time.Second
	// maxLifetime is the greatest age of a connection, and a sixth of it that of a busy
	// one, over which busyCalls were made. A target that grows behind its name or
	// address gets calls at its new places only over new connections.
	maxLifetime = time.Minute
	busyCalls   = 10
	// minIdleTimeout is the least that is learnt from connections that were closed.
	// A target that restarts closes all of them, of any age: it must not cost a
	// busy one its kept connections.
	minIdleTimeout = 100 * time.Millisecond
	// learntFor is how long an authority's idle timeout is remembered, and maxLearnt
	// of how many authorities.
	learntFor = 10 * time.Minute
	maxLearnt = 1000
)

// lifetime is how long a new connection is used: [maxLifetime] or up to 10 % less, so
// that those made together are not renewed together.
func lifetime() time.Duration {
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

// connections keeps those that are idle for further calls. Its zero value keeps none.
type connections struct {
	most int // how many are kept in all

	mu      sync.Mutex
	idle    map[authority][]*connection // the latest last
	order   list.List                   // all of them, the latest first
	sweep   *time.Timer                 // set while any are idle
	sweepAt time.Time                   // when it is due
	learnt  map[authority]learnt
}

// learnt is what was learnt of an authority that closed an idle connection.
type learnt struct {
	limit time.Duration // connections to it are idle no longer
	until time.Time     // when that is forgotten
}

// take returns an idle connection that is still open, or nil.
func (s *connections) take(to authority) *connection {
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
		if s.usable(c, time.Now()) {
			c.reused = true
			return c
		}
		c.Close()
	}
}

// usable reports whether c may be used again, and learns from it where the target
// closed it.
func (s *connections) usable(c *connection, now time.Time) bool {
	if !now.Before(c.until) {
		return false
	}
	if !c.quiet() {
		s.mu.Lock()
		s.learn(c, now.Sub(c.since), now)
		s.mu.Unlock()
		return false
	}
	c.idleFor = now.Sub(c.since)
	return true
}

// lost takes note that the target ended c before it answered, which was idle before.
func (s *connections) lost(c *connection) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.learn(c, c.idleFor, time.Now())
}

// put keeps c for as long as it may be idle, and closes the one that has been idle
// for longest where that is one too many.
func (s *connections) put(c *connection, now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	limit := c.idle
	if l, ok := s.learnt[c.to]; ok && now.Before(l.until) {
		limit = min(limit, l.limit)
	}
	c.calls++
	life := c.life
	if c.calls >= busyCalls {
		life /= 6
	}
	limit = min(limit, life-now.Sub(c.made))
	c.since, c.until = now, now.Add(limit)
	if limit <= 0 {
		c.Close()
		return
	}
	if s.idle == nil {
		s.idle = make(map[authority][]*connection)
	}
	s.idle[c.to] = append(s.idle[c.to], c)
	c.place = s.order.PushFront(c)
	if s.order.Len() > s.most {
		s.closeOldest()
	}
	s.sweepBy(c.until, now)
}

// learn remembers that c was found closed when it had been idle for age, or with bytes
// on it that were not asked for: connections to its authority are idle for half as
// long at most from now on. s.mu is held.
func (s *connections) learn(c *connection, age time.Duration, now time.Time) {
	if c.raw == nil {
		return // it cannot be looked at
	}
	to := c.to
	limit := max(age/2, minIdleTimeout)
	if old, ok := s.learnt[to]; ok && now.Before(old.until) {
		limit = min(limit, old.limit)
	}
	if s.learnt == nil {
		s.learnt = make(map[authority]learnt)
	}
	if _, ok := s.learnt[to]; !ok && len(s.learnt) >= maxLearnt {
		for other := range s.learnt { // any
			delete(s.learnt, other)
			break
		}
	}
	s.learnt[to] = learnt{limit: limit, until: now.Add(learntFor)}
	for _, other := range s.idle[to] {
		if until := other.since.Add(limit); until.Before(other.until) {
			other.until = until
			s.sweepBy(until, now)
		}
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

// closeOne closes the one that has been idle for longest, and reports whether there was one.
func (s *connections) closeOne() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.order.Len() == 0 {
		return false
	}
	s.closeOldest()
	return true
}

// sweepBy sets the timer to moment, unless it is due before. s.mu is held.
func (s *connections) sweepBy(moment, now time.Time) {
	switch {
	case s.order.Len() == 0:
	case s.sweep == nil:
		s.sweepAt = moment
		s.sweep = time.AfterFunc(moment.Sub(now), s.closeOld)
	case moment.Before(s.sweepAt):
		s.sweepAt = moment
		s.sweep.Reset(moment.Sub(now))
	}
}

// closeOld closes those whose time is over.
func (s *connections) closeOld() {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	s.sweep = nil
	var next time.Time
	for e := s.order.Front(); e != nil; {
		c := e.Value.(*connection)
		e = e.Next()
		if !now.Before(c.until) {
			s.remove(c)
			if !c.quiet() {
				s.learn(c, now.Sub(c.since), now)
			}
			c.Close()
		} else if next.IsZero() || c.until.Before(next) {
			next = c.until
		}
	}
	s.sweepBy(next, now)
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
