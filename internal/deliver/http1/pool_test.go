package http1

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestIdleLimit(t *testing.T) {
	t.Parallel()
	const never, normal = 0, idleTimeout
	tests := []struct {
		lines []string
		want  time.Duration
	}{
		{nil, normal},
		{[]string{"timeout=5"}, 4 * time.Second},
		{[]string{"timeout=2, max=100"}, time.Second},
		{[]string{"max=100,Timeout = 2"}, time.Second},
		{[]string{`timeout="65"`}, maxLifetime},
		{[]string{"max=100", "timeout=3"}, 2 * time.Second},
		{[]string{"timeout=1"}, never},
		{[]string{"timeout=0"}, never},
		{[]string{"timeout=61"}, maxLifetime},
		{[]string{"timeout=99999999999999999999"}, maxLifetime},
		{[]string{"timeout=-1"}, normal},
		{[]string{"timeout"}, normal},
		{[]string{"timeout="}, normal},
		{[]string{"timeout=five"}, normal},
		{[]string{"timeout=2.5"}, normal},
		{[]string{"", ",,="}, normal},
	}
	for _, tt := range tests {
		t.Run(strings.Join(tt.lines, "|"), func(t *testing.T) {
			t.Parallel()
			h := http.Header{}
			for _, line := range tt.lines {
				h.Add("Keep-Alive", line)
			}
			if got := idleLimit(h); got != tt.want {
				t.Errorf("idleLimit(%q) = %v, want %v", tt.lines, got, tt.want)
			}
		})
	}
}

func FuzzIdleLimit(f *testing.F) {
	f.Add("timeout=5, max=100")
	f.Add(`timeout="99999999999999999999"`)
	f.Fuzz(func(t *testing.T, line string) {
		if got := idleLimit(http.Header{"Keep-Alive": {line}}); got < 0 || got > maxLifetime {
			t.Errorf("idleLimit(%q) = %v, want 0 to %v", line, got, maxLifetime)
		}
	})
}

// What a host says of its connections decides whether, and for how long, one is kept.
func TestAnswersThatKeepAConnection(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name, answer string
		want         time.Duration // zero: not at all
	}{
		{"says nothing", "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", idleTimeout},
		{"a failure", "HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n", idleTimeout},
		{"5 s", "HTTP/1.1 200 OK\r\nKeep-Alive: timeout=5\r\nContent-Length: 0\r\n\r\n", 4 * time.Second},
		{"5 s, a failure", "HTTP/1.1 404 No\r\nKeep-Alive: timeout=5\r\nContent-Length: 0\r\n\r\n", 4 * time.Second},
		{"1 s", "HTTP/1.1 200 OK\r\nKeep-Alive: timeout=1\r\nContent-Length: 0\r\n\r\n", 0},
		{"close", "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n", 0},
		{"Close among others", "HTTP/1.1 200 OK\r\nConnection: x, Close\r\nKeep-Alive: timeout=5\r\nContent-Length: 0\r\n\r\n", 0},
		{"HTTP/1.0", "HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n", 0},
		{"HTTP/1.0 keep-alive", "HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nKeep-Alive: timeout=5\r\nContent-Length: 0\r\n\r\n", 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			connections := make(chan int, 2)
			address := newRawServer(t, func(conn net.Conn, n int) {
				for r := bufio.NewReader(conn); readRequest(r) == nil; {
					connections <- n
					io.WriteString(conn, tt.answer)
				}
			})
			p := newPool(t)
			exchange(t, p, "POST", "http://"+address, nil)
			if tt.want == 0 {
				if got := p.Idle(); got != 0 {
					t.Errorf("%d connections are kept, want none", got)
				}
			} else {
				c := p.order.Front().Value.(*Conn)
				if got := c.until.Sub(c.since); got != tt.want {
					t.Errorf("the connection is kept for %v, want %v", got, tt.want)
				}
				c.until = time.Now().Add(time.Hour) // however slow this machine is
			}
			exchange(t, p, "POST", "http://"+address, nil)
			<-connections
			if got := <-connections == 1; got != (tt.want != 0) {
				t.Errorf("the connection was used again: %v, want %v", got, tt.want != 0)
			}
		})
	}
}

// A connection is not used for ever, and a busy one not for long: else new places
// behind a name get no calls.
func TestConnectionsAreRenewed(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		tests := []struct {
			name       string
			age, idle  time.Duration
			requests   int // before this one
			wantAtMost time.Duration
		}{
			{"new", 0, idleTimeout, 0, idleTimeout},
			{"old", 53 * time.Second, idleTimeout, 1, idleTimeout},
			{"near its end", 53 * time.Second, 50 * time.Second, 1, 7 * time.Second},
			{"too old", 60 * time.Second, idleTimeout, 1, 0},
			{"busy", 8 * time.Second, idleTimeout, 1000, idleTimeout},
			{"busy for long", 10 * time.Second, idleTimeout, 1000, 0},
			{"as old but not busy", 10 * time.Second, idleTimeout, 8, idleTimeout},
		}
		for _, tt := range tests {
			ours, theirs := net.Pipe()
			c := newConn(nil, ours, authority{"http", "plays.melodia.app"})
			if c.lifetime <= maxLifetime*9/10-time.Second || c.lifetime > maxLifetime {
				t.Errorf("a connection lives for %v, want 54 to 60 s", c.lifetime)
			}
			c.requests, c.idle = tt.requests, tt.idle
			time.Sleep(tt.age)
			s := Pool{maxIdle: 10}
			s.put(c, time.Now())
			kept := s.order.Len() == 1
			if kept != (tt.wantAtMost > 0) {
				t.Errorf("%s: kept: %v", tt.name, kept)
			}
			if got := c.until.Sub(c.since); kept && (got > tt.wantAtMost || got <= 0) {
				t.Errorf("%s: kept for %v, want %v at most", tt.name, got, tt.wantAtMost)
			}
			s.Close()
			if _, err := theirs.Read(make([]byte, 1)); err != io.EOF {
				t.Errorf("%s: reading at the other end: %v, want the connection closed", tt.name, err)
			}
		}
	})
}

func TestSweepClosesEachAtItsTime(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := Pool{maxIdle: 10}
		start := time.Now()
		ends := make(chan string, 3)
		for _, idle := range []time.Duration{4 * time.Second, time.Second, 2 * time.Second} {
			ours, theirs := net.Pipe()
			c := newConn(nil, ours, authority{"http", idle.String()})
			c.idle = idle
			s.put(c, time.Now())
			go func() {
				theirs.Read(make([]byte, 1))
				ends <- fmt.Sprint(idle, " at ", time.Since(start))
			}()
		}
		for _, want := range []string{"1s at 1s", "2s at 2s", "4s at 4s"} {
			if got := <-ends; got != want {
				t.Errorf("closed %s, want %s", got, want)
			}
		}
		synctest.Wait()
		if !empty(&s) {
			t.Error("want nothing left to look after")
		}
	})
}

// Where a host closed an idle connection, connections to it are idle for less from then on.
func TestIdleTimeoutIsLearnt(t *testing.T) {
	t.Parallel()
	// newIdle makes a connection that has been idle for age, which its host closes on release.
	newIdle := func(t *testing.T, s *Pool, to authority, age time.Duration) (c *Conn, release func()) {
		closing := make(chan struct{})
		address := newRawServer(t, func(net.Conn, int) { <-closing })
		conn, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		c = newConn(s, conn, to)
		c.idle = time.Hour
		c.lifetime = 2 * time.Hour
		s.put(c, time.Now().Add(-age))
		t.Cleanup(func() { s.Close() })
		return c, func() {
			close(closing)
			for c.reusable() && t.Context().Err() == nil { // the end is about to arrive
			}
		}
	}
	const age = 20 * time.Second // far above what this test takes
	a, b := authority{"http", "a"}, authority{"http", "b"}
	for _, how := range []string{"found at take", "met by a request"} {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			s := &Pool{maxIdle: 10}
			_, releaseOlder := newIdle(t, s, a, age/4)
			defer releaseOlder()
			older := s.order.Front().Value.(*Conn)
			c, release := newIdle(t, s, a, age)
			if how == "found at take" {
				release()
				s.order.MoveToFront(older.place)
				if got := s.take(a); got != older {
					t.Fatalf("took %p, want the older one, which is open", got)
				}
				s.put(older, time.Now())
			} else {
				defer release()
				if got := s.take(a); got != c {
					t.Fatalf("took %p, want the newest", got)
				}
				s.learnLost(c)
			}
			limit := s.limitOf(a)
			if limit < age/2 || limit > age/2+patience {
				t.Errorf("learnt %v of a connection closed after %v", limit, age)
			}
			if got := older.until.Sub(older.since); got > limit {
				t.Errorf("the other connection may be idle for %v, want %v at most", got, limit)
			}
			next, releaseNext := newIdle(t, s, a, 0)
			defer releaseNext()
			if got := next.until.Sub(next.since); got != limit {
				t.Errorf("the next connection may be idle for %v, want %v", got, limit)
			}
			other, releaseOther := newIdle(t, s, b, 0)
			defer releaseOther()
			if got := other.until.Sub(other.since); got != time.Hour {
				t.Errorf("a connection to another authority may be idle for %v, want 1 h", got)
			}
			// A close that comes later teaches nothing; one at once does not stop reuse.
			s.teach(c, time.Hour)
			if got := s.limitOf(a); got != limit {
				t.Errorf("learnt %v, want %v still", got, limit)
			}
			s.teach(c, 0)
			if got := s.limitOf(a); got != minIdleTimeout {
				t.Errorf("learnt %v, want %v", got, minIdleTimeout)
			}
			// It is forgotten after a while.
			s.mu.Lock()
			s.learnt[a] = learnt{minIdleTimeout, time.Now()}
			s.mu.Unlock()
			forgotten, releaseForgotten := newIdle(t, s, a, 0)
			defer releaseForgotten()
			if got := forgotten.until.Sub(forgotten.since); got != time.Hour {
				t.Errorf("later a connection may be idle for %v, want 1 h", got)
			}
		})
	}
	t.Run("bounded", func(t *testing.T) {
		t.Parallel()
		s := &Pool{maxIdle: 1}
		c, release := newIdle(t, s, a, 0)
		defer release()
		for i := range 2 * maxLearnt {
			c.to.host = fmt.Sprint(i)
			s.teach(c, time.Second)
		}
		c.to = a
		if got := len(s.learnt); got != maxLearnt {
			t.Errorf("%d authorities are remembered, want %d", got, maxLearnt)
		}
	})
}

// A host that closes idle connections sooner than any guess costs requests only until that is known.
func TestHostThatClosesEarlyIsLearnt(t *testing.T) {
	t.Parallel()
	gone := make(chan struct{})
	address := newRawServer(t, func(conn net.Conn, n int) {
		readRequest(bufio.NewReader(conn))
		io.WriteString(conn, answerOK)
		if n > 1 {
			hang(conn)
			return
		}
		conn.Close()
		close(gone)
	})
	p := newPool(t)
	exchange(t, p, "POST", "http://"+address, nil)
	<-gone
	c := p.order.Front().Value.(*Conn)
	c.until = time.Now().Add(time.Hour)
	for c.reusable() && t.Context().Err() == nil { // the end is about to arrive
	}
	if status, _, err := exchange(t, p, "POST", "http://"+address, nil); status != 200 {
		t.Errorf("answer %d, %v, want 200 over a new connection", status, err)
	}
	c = p.order.Front().Value.(*Conn)
	if got := c.until.Sub(c.since); got >= idleTimeout {
		t.Errorf("the next connection may be idle for %v, want less than %v", got, idleTimeout)
	}
}

// teach is learn under the lock that the sweep takes too.
func (s *Pool) teach(c *Conn, age time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.learn(c, age, time.Now())
}

func (s *Pool) limitOf(to authority) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.learnt[to].limit
}
