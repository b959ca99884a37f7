// Package deliver makes the HTTP calls that tasks ask for. It is the only
// package that talks to targets, and it trusts none of them: what a target
// does is bounded in time by the task's timeout and in memory by constants,
// and no call reaches an address that the [Policy] closes.
//
// One attempt is at most one request. net/http sends some requests a second
// time by itself when a kept-alive connection turns out to be dead: GET and
// HEAD, and whatever carries an Idempotency-Key, provided that the body is nil
// or GetBody is set. The target may have carried out the first one, and a
// repeat must be an attempt of its own in the task's story. So GetBody stays
// nil, and calls without a body are watched (see sendOnce).
//
// Only HTTP/1.1 is spoken, so that each call owns its connection. Over HTTP/2
// calls share one, where they wait for each other's writes without regard to
// their timeouts, and net/http repeats requests that the target reset.
// Connections are kept: bytes that a target sends behind an answer may be taken
// for the answer to the next call to the same host and port.
package deliver

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/netip"
	"net/textproto"
	"net/url"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/melodia/orchestrator/internal/task"
)

// Limits of what is taken from a target.
const (
	maxHeaderBytes = 64 << 10
	// excerptBytes of a response's body are kept.
	excerptBytes = 4 << 10
	// drainBytes more are read, so that the connection can be used again.
	drainBytes = 64 << 10
)

// idleTimeout is below the 5 s after which uvicorn and Node.js close a
// connection that is idle: were they first, a call could meet the closing
// connection and be lost, and an attempt with it.
const idleTimeout = 4 * time.Second

// Options are what a [Deliverer] needs to know.
type Options struct {
	// Policy must not be nil.
	Policy *Policy
	// Version goes into the User-Agent.
	Version string
	// Concurrency is how many calls are expected at once. That many
	// connections are kept for reuse; it does not limit Deliver.
	Concurrency int
}

// Deliverer makes calls over one shared pool of connections. Any number of
// goroutines may use it.
type Deliverer struct {
	policy    *Policy
	userAgent string
	transport *http.Transport
	excerpts  sync.Pool // of *[excerptBytes]byte

	// Tests put their own in.
	resolver  *net.Resolver
	tlsConfig *tls.Config
}

// New makes a deliverer. Whoever made it calls Close when no Deliver runs any more.
func New(o Options) *Deliverer {
	d := &Deliverer{
		policy:    o.Policy,
		userAgent: "orchestrator/" + o.Version,
		excerpts:  sync.Pool{New: func() any { return new([excerptBytes]byte) }},
		tlsConfig: &tls.Config{NextProtos: []string{"http/1.1"}},
	}
	connections := max(o.Concurrency, 1)
	d.transport = &http.Transport{
		Proxy:                  nil, // not the environment's: a proxy would dial around the guard
		DialContext:            d.dial,
		DialTLSContext:         d.dialTLS,
		DisableCompression:     true, // a small answer must not unfold into a big one
		MaxIdleConns:           connections,
		MaxIdleConnsPerHost:    connections,
		IdleConnTimeout:        idleTimeout,
		MaxResponseHeaderBytes: maxHeaderBytes,
	}
	return d
}

// Close closes the idle connections. It waits for nothing and may be called twice.
func (d *Deliverer) Close() { d.transport.CloseIdleConnections() }

// Deliver makes the call and says what came of it. It blocks for the task's
// timeout at most, from dialling to the end of the response's body; when ctx is
// done before, the outcome is interrupted.
//
// An answer that breaks off within the part that is read is retryable, whatever
// its status says. Beyond that part the connection is closed and the status counts.
func (d *Deliverer) Deliver(ctx context.Context, c task.Call) task.Outcome {
	start := time.Now()
	o := d.attempt(ctx, c, start)
	o.Duration = time.Since(start)
	return o
}

func (d *Deliverer) attempt(ctx context.Context, c task.Call, start time.Time) task.Outcome {
	u, err := d.policy.parse(c.Task.URL)
	if err != nil {
		// Admitted once, but the policy may have changed since.
		return task.Outcome{Kind: task.OutcomePermanent, Refused: true, Error: "the task's url " + err.Error()}
	}
	callCtx, cancel := context.WithDeadline(ctx, start.Add(c.Task.Timeout))
	defer cancel()
	callCtx = context.WithValue(callCtx, callKey{}, callCtx)
	if len(c.Task.Body) == 0 {
		callCtx = sendOnce(callCtx, cancel)
	}

	resp, err := d.transport.RoundTrip(d.request(callCtx, u, c))
	if err != nil {
		return failed(ctx, c, start, err, "no answer")
	}
	defer resp.Body.Close()
	o := task.Outcome{
		Kind:       task.Classify(resp.StatusCode),
		StatusCode: resp.StatusCode,
		Error:      statusError(resp),
	}
	switch {
	case resp.StatusCode < 100 || resp.StatusCode > 999:
		o.StatusCode = 0
	case resp.StatusCode == http.StatusSwitchingProtocols:
		// Its body is the bare connection, which no deadline guards.
		return o
	}
	if o.Kind == task.OutcomeRetryable || resp.StatusCode/100 == 4 {
		o.RetryAfter = retryAfter(resp.Header, c.At.Add(time.Since(start)))
	}
	o.ResponseExcerpt, err = d.read(resp.Body)
	if err == nil {
		// A target that is cut off may end its answer properly because of that.
		err = callCtx.Err()
	}
	if err != nil {
		broken := failed(ctx, c, start, err, "no complete answer")
		o.Kind, o.Error, o.TimedOut = broken.Kind, broken.Error, broken.TimedOut
	}
	return o
}

// read returns the start of body and reads on for as long as the connection is worth it.
func (d *Deliverer) read(body io.Reader) (string, error) {
	buf := d.excerpts.Get().(*[excerptBytes]byte)
	defer d.excerpts.Put(buf)
	var n int
	var err error
	for n < len(buf) && err == nil {
		var m int
		m, err = body.Read(buf[n:])
		n += m
	}
	text := excerpt(buf[:n])
	if err == nil {
		_, err = io.CopyN(io.Discard, body, drainBytes)
	}
	if err == io.EOF {
		err = nil
	}
	return text, err
}

// request makes the request for c.
func (d *Deliverer) request(ctx context.Context, u *url.URL, c task.Call) *http.Request {
	t := c.Task
	header := make(http.Header, len(t.Headers)+8)
	values := make([]string, 0, len(t.Headers)+8)
	set := func(name, value string) {
		values = append(values, value)
		header[name] = values[len(values)-1 : len(values) : len(values)]
	}
	set("User-Agent", d.userAgent)
	for name, value := range t.Headers {
		set(textproto.CanonicalMIMEHeaderKey(name), value)
	}
	set("Orchestrator-Task-Id", t.ID.String())
	set("Orchestrator-Attempt", strconv.Itoa(c.Attempt))
	set("Orchestrator-Max-Attempts", strconv.Itoa(t.Retry.MaxAttempts))
	if !t.RunAt.IsZero() {
		set("Orchestrator-Run-At", t.RunAt.UTC().Format("2006-01-02T15:04:05.000000Z"))
	}
	if c.ViaWorkerEndpoint {
		set("Orchestrator-Via", "worker-endpoint")
	}
	if t.Body != nil && t.ContentType != "" && header["Content-Type"] == nil {
		set("Content-Type", t.ContentType)
	}
	req := &http.Request{Method: t.Method, URL: u, Header: header}
	if len(t.Body) > 0 {
		req.Body = io.NopCloser(bytes.NewReader(t.Body))
		req.ContentLength = int64(len(t.Body))
	}
	return req.WithContext(ctx)
}

// sendOnce returns a context under which a request goes out once at most:
// before a second try writes anything, its connection is closed and cancel
// called.
func sendOnce(ctx context.Context, cancel context.CancelFunc) context.Context {
	sent := false
	return httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		GotConn: func(info httptrace.GotConnInfo) {
			if sent {
				cancel()
				info.Conn.Close()
			}
			sent = true
		},
	})
}

// callKey leads to a call's context among the values of the context for
// dialling. net/http detaches that one from the call, so that a dial may
// outlast it; a target that never answers would pile up connections.
type callKey struct{}

func callOf(ctx context.Context) context.Context { return ctx.Value(callKey{}).(context.Context) }

var (
	errRefused    = errors.New("refused by the target policy")
	errPassedOver = errors.New("address passed over")
	errHandshake  = errors.New("TLS handshake")
)

// dial connects to addr and guards the address that is really dialled. Where a
// name stands for several addresses, those that the policy closes are passed
// over; the call counts as refused only when no other was there to try.
func (d *Deliverer) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	var refused, admitted atomic.Bool
	dialer := net.Dialer{
		Resolver: d.resolver,
		Control: func(_, address string, _ syscall.RawConn) error {
			a, err := netip.ParseAddrPort(address)
			if err != nil || !d.policy.admits(a.Addr()) {
				refused.Store(true)
				return errPassedOver
			}
			admitted.Store(true)
			return nil
		},
	}
	conn, err := dialer.DialContext(callOf(ctx), network, addr)
	if err != nil && refused.Load() && !admitted.Load() {
		return nil, errRefused
	}
	return conn, err
}

// dialTLS is dial with the handshake within the call's time too.
func (d *Deliverer) dialTLS(ctx context.Context, network, addr string) (net.Conn, error) {
	conn, err := d.dial(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	config := d.tlsConfig.Clone()
	config.ServerName, _, _ = net.SplitHostPort(addr)
	tlsConn := tls.Client(conn, config)
	if err := tlsConn.HandshakeContext(callOf(ctx)); err != nil {
		conn.Close()
		return nil, fmt.Errorf("%w: %w", errHandshake, err)
	}
	return tlsConn, nil
}
