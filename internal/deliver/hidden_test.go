package deliver

import (
	"context"
	"errors"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/melodia/orchestrator/internal/task"
)

// piped is a listener that has one connection.
type piped struct {
	conn chan net.Conn
	over chan struct{}
}

func (p *piped) Accept() (net.Conn, error) {
	select {
	case conn := <-p.conn:
		return conn, nil
	case <-p.over:
		return nil, net.ErrClosed
	}
}

func (p *piped) Close() error {
	close(p.over)
	return nil
}

func (p *piped) Addr() net.Addr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 80} }

// told is a connection that says when it is closed.
type told struct {
	net.Conn
	closed chan struct{}
	once   sync.Once
}

func (c *told) Close() error {
	defer c.once.Do(func() { close(c.closed) })
	return c.Conn.Close()
}

// net/http's server, whose WriteTimeout is over before its handler is done, closes the
// connection without an answer, and so does a server that is told to close while a handler
// works: the handler has done its work all the same.
func TestServerClosesBeforeItsAnswer(t *testing.T) {
	t.Parallel()
	const timeout = 5 * time.Minute
	for name, tt := range map[string]struct {
		work, closes time.Duration
		hidden       bool
	}{
		"its timeout, after 40 s": {work: 40 * time.Second, hidden: true},
		"closed after 35 s":       {work: time.Minute, closes: 35 * time.Second, hidden: true},
		"closed after 5 s":        {work: time.Minute, closes: 5 * time.Second},
	} {
		for _, method := range []string{http.MethodPost, http.MethodGet} {
			t.Run(name+"/"+method, func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) {
					var calls atomic.Int64
					d := newPiped(t, func(conn net.Conn) {
						end := &told{Conn: conn, closed: make(chan struct{})}
						l := &piped{make(chan net.Conn, 1), make(chan struct{})}
						l.conn <- end
						server := &http.Server{WriteTimeout: 30 * time.Second, ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
							calls.Add(1)
							time.Sleep(tt.work)
						})}
						go func() {
							<-end.closed
							_ = server.Close()
						}()
						if tt.closes > 0 {
							time.AfterFunc(tt.closes, func() { _ = server.Close() })
						}
						if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, net.ErrClosed) {
							t.Errorf("Serve: %v", err)
						}
					})
					c := newCall(method, "http://127.0.0.1/", nil)
					c.Task.Timeout = timeout
					o := d.Deliver(context.Background(), c)
					if o.Kind != task.OutcomeRetryable || o.StatusCode != 0 || o.Hidden() != tt.hidden || calls.Load() != 1 {
						t.Errorf("got %+v after %d calls, want a retryable one without an answer that is hidden: %t", o, calls.Load(), tt.hidden)
					}
					if strings.Contains(o.Error, "most likely cut the call") != tt.hidden {
						t.Errorf("the error is %q", o.Error)
					}
					time.Sleep(time.Minute) // the handlers end
				})
			})
		}
	}
}

// A kept connection that ends after half a minute was no idle one that the host closed: the
// request is not sent again beside the call that goes on.
func TestMayRepeat(t *testing.T) {
	t.Parallel()
	retryable := task.Outcome{Kind: task.OutcomeRetryable, Severed: true}
	for name, tt := range map[string]struct {
		method string
		o      task.Outcome
		after  time.Duration
		want   bool
	}{
		"at once":                  {http.MethodGet, retryable, 0, true},
		"after 20 s":               {http.MethodPut, retryable, 20 * time.Second, true},
		"after more, cut on a way": {http.MethodGet, retryable, 20*time.Second + 1, false},
		"not idempotent":           {http.MethodPost, retryable, 0, false},
		"timed out":                {http.MethodGet, task.Outcome{Kind: task.OutcomeRetryable, TimedOut: true}, time.Second, false},
		"a stop of ours":           {http.MethodGet, task.Outcome{Kind: task.OutcomeInterrupted}, 0, false},
	} {
		if got := mayRepeat(tt.method, &tt.o, tt.after); got != tt.want {
			t.Errorf("%s: got %t, want %t", name, got, tt.want)
		}
	}
}
