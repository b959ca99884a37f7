// Package deliver makes the HTTP calls that tasks ask for. It is the only
// package that talks to targets, and it trusts none of them: what a target
// does is bounded in time by the task's timeout and in memory by constants,
// and no call reaches an address that the [target.Policy] closes.
//
// One attempt is one request: the target may have carried out one that broke off,
// and a repeat must be an attempt of its own in the task's story. There is one
// exception. A connection kept from an earlier call may be closed by the target
// while a request is on its way. Where such a connection ends before a byte of the
// answer, and the method is idempotent (RFC 9110 §9.2.2: GET, HEAD, PUT, DELETE; the
// effect of several requests is that of one), the request is sent once more, over a
// new connection, within the attempt and its timeout; the attempt's error tells of
// it. POST and PATCH are not sent again, whatever their headers say. net/http's
// client sends those again too where they have an Idempotency-Key, which is one
// reason why calls are made over connections of our own; the other is their cost
// (see connection). What is written is plain, and what comes back net/http reads.
//
// Only HTTP/1.1 is spoken, so that each call owns its connection. Over HTTP/2
// calls share one, where they wait for each other's writes without regard to
// their timeouts. Connections are kept for further calls to the same host and
// port; one on which bytes arrive that nobody asked for is closed.
//
// A call carries what package credentials adds to it.
package deliver

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/melodia/orchestrator/internal/credentials"
	"github.com/melodia/orchestrator/internal/target"
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

// Options are what a [Deliverer] needs to know.
type Options struct {
	// Policy must not be nil.
	Policy *target.Policy
	// Credentials are what calls may carry.
	Credentials credentials.Set
	// Version goes into the User-Agent.
	Version string
	// Concurrency is how many calls are expected at once. That many
	// connections are kept for reuse; it does not limit Deliver.
	Concurrency int
}

// Deliverer makes calls over one shared pool of connections. Any number of
// goroutines may use it.
type Deliverer struct {
	policy      *target.Policy
	credentials credentials.Set
	userAgent   string
	connections connections
	nameServers nameServers
	excerpts    sync.Pool // of *[excerptBytes]byte

	// Tests put their own in.
	resolver  *net.Resolver
	tlsConfig *tls.Config
}

// New makes a deliverer. Whoever made it calls Close when no Deliver runs any more.
func New(o Options) *Deliverer {
	d := &Deliverer{
		policy:      o.Policy,
		credentials: o.Credentials,
		userAgent:   "orchestrator/" + o.Version,
		excerpts:    sync.Pool{New: func() any { return new([excerptBytes]byte) }},
		tlsConfig:   &tls.Config{NextProtos: []string{"http/1.1"}},
	}
	d.connections.most = max(o.Concurrency, 1)
	return d
}

// Close closes the idle connections. It waits for nothing and may be called twice.
func (d *Deliverer) Close() {
	d.nameServers.stop()
	d.connections.closeAll()
}

// Deliver makes the call and says what came of it. It blocks for the task's
// timeout at most, from dialling to the end of the response's body; when ctx is
// done before, the outcome is interrupted. So it is where a [task.Shortage] of this
// instance kept the request from being sent.
//
// A 2xx counts once its head is there and the target has the whole request; what is
// wrong with the rest of the answer is told in the outcome's Error. Any other answer
// counts at once, while the request is still being sent too, but is retryable,
// whatever its status says, where it breaks off within the part that is read. Beyond
// that part the connection is closed.
func (d *Deliverer) Deliver(ctx context.Context, c task.Call) task.Outcome {
	start := time.Now()
	o, conn := d.attempt(ctx, c, start)
	tellWishes(&o)
	end := time.Now()
	o.Duration = end.Sub(start)
	if conn != nil {
		d.connections.put(conn, end)
	}
	return o
}

// attempt also returns the connection if it can be used again.
func (d *Deliverer) attempt(ctx context.Context, c task.Call, start time.Time) (task.Outcome, *connection) {
	u, err := d.policy.Parse(c.Task.URL)
	if err != nil {
		// The policy may have changed since the task was handed in.
		return task.Outcome{Kind: task.OutcomePermanent, Refused: true, Error: "the task's url " + err.Error()}, nil
	}
	added, err := d.credentials.For(ctx, u, credentials.Wanted{
		Headers: c.Task.Headers, Audience: c.Task.OIDCAudience, At: c.At, Retry: c.Attempt > 1, Deadline: start.Add(c.Task.Timeout),
	})
	if err != nil {
		return d.notMade(ctx, c, start, err, "no ID token"), nil
	}
	o, conn, lost := d.send(ctx, c, u, added, start, false)
	if lost && idempotent(c.Task.Method) && o.Kind == task.OutcomeRetryable && !o.TimedOut {
		o, conn, _ = d.send(ctx, c, u, added, start, true)
		if o.Shortage != "" {
			return o, conn // it was not sent again
		}
		if o.Error != "" {
			o.Error += "; "
		}
		o.Error += sentTwice
	}
	return o, conn
}

const sentTwice = "the request was sent twice, since the kept connection ended before an answer"

// idempotent reports whether a request may be sent again though it may have been
// carried out (RFC 9110 §9.2.2).
func idempotent(method string) bool {
	switch method {
	case http.MethodGet, http.MethodHead, http.MethodPut, http.MethodDelete:
		return true
	}
	return false
}

// send sends the request once, over a new connection where fresh says so. lost
// reports that a kept connection ended before a byte of the answer.
func (d *Deliverer) send(ctx context.Context, c task.Call, u *url.URL, added credentials.Added, start time.Time, fresh bool) (o task.Outcome, kept *connection, lost bool) {
	deadline := start.Add(c.Task.Timeout)
	conn, err := d.connect(ctx, deadline, u, fresh)
	if err != nil {
		return d.notMade(ctx, c, start, err, "no answer"), nil, false
	}
	_ = conn.SetDeadline(deadline)
	goOn := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	usable := false
	defer func() {
		if !usable { // after a panic too
			goOn()
			_ = conn.Close()
		}
	}()
	conn.request = d.appendHead(conn.request[:0], u, c, added)
	o, usable = d.exchange(ctx, conn, &http.Request{Method: c.Task.Method, URL: u}, c, added, start)
	if conn.lostIdle {
		d.connections.lost(conn)
	}
	if usable = goOn() && usable; !usable {
		return o, nil, conn.lostIdle
	}
	return o, conn, false
}

var errCutRequest = errors.New("it ended the connection before it had the whole request")

// exchange sends the request that conn holds and says what came back. reusable says that this is all
// there is, so that the connection can be used again.
func (d *Deliverer) exchange(ctx context.Context, conn *connection, r *http.Request, c task.Call, added credentials.Added, start time.Time) (o task.Outcome, reusable bool) {
	resp, err := conn.roundTrip(r, c.Task.Body) //nolint:bodyclose // see there
	if err != nil {
		return failed(ctx, c, start, err, "no answer"), false
	}
	added.RedactHeader(resp.Header, "Location") // statusError quotes it
	o = task.Outcome{
		Kind:       task.Classify(resp.StatusCode),
		StatusCode: resp.StatusCode,
		Error:      statusError(resp),
	}
	readWishes(&o, resp)
	switch {
	case resp.StatusCode < 100 || resp.StatusCode > 999:
		o.StatusCode = 0
	case resp.StatusCode == http.StatusSwitchingProtocols:
		return o, false // what follows is no body
	case resp.StatusCode == http.StatusUnauthorized && d.credentials.TokenRefused(added, c.At):
		o.Kind = task.OutcomeRetryable
		o.Error += "; the next attempt has a new ID token"
	}
	if o.Kind == task.OutcomeRetryable || resp.StatusCode/100 == 4 {
		o.RetryAfter = retryAfter(resp.Header, c.At.Add(time.Since(start)))
	}
	var whole bool
	o.ResponseExcerpt, whole, err = d.read(resp.Body, added)
	reusable = whole && !resp.Close && resp.ProtoAtLeast(1, 1)
	conn.idle = idleLimit(resp.Header)
	if o.Kind == task.OutcomeSucceeded {
		// Where all was sent at once and the connection stays, the system sees to the rest.
		sent := reusable && conn.sending == nil && conn.sentAll || conn.finishSending(ctx, start.Add(c.Task.Timeout), !whole)
		switch {
		case !sent:
			cut := failed(ctx, c, start, errCutRequest, "it did not take the whole request")
			o.Kind, o.TimedOut = cut.Kind, cut.TimedOut
			o.Error = "the target answered " + strconv.Itoa(o.StatusCode) + ", but " + cut.Error
		case err != nil:
			o.Error = "the answer's body was cut short: " + failed(ctx, c, start, err, "no end").Error
		}
		return o, reusable && sent
	}
	// A target that is cut off may end its answer properly because of that.
	if err != nil || ctx.Err() != nil || time.Since(start) >= c.Task.Timeout {
		broken := failed(ctx, c, start, err, "no complete answer")
		o.Kind, o.Error, o.TimedOut = broken.Kind, broken.Error, broken.TimedOut
		return o, false
	}
	return o, reusable && conn.sent()
}

// read returns the start of body, without secrets, and reads on for as long as
// the connection is worth it; whole says that this was to the end.
func (d *Deliverer) read(body io.Reader, added credentials.Added) (text string, whole bool, err error) {
	buf := d.excerpts.Get().(*[excerptBytes]byte)
	defer d.excerpts.Put(buf)
	b, ahead, err := added.Read(body, buf[:], drainBytes)
	text = excerpt(b)
	if err == nil {
		_, err = io.CopyN(io.Discard, body, int64(drainBytes-ahead))
	}
	if err == io.EOF {
		return text, true, nil
	}
	return text, false, err
}

// appendHead appends the head of the request for c: its lines, and the empty one
// behind them. Its fields are legal: the domain's rules saw to that, and are asked
// again of what credentials add.
func (d *Deliverer) appendHead(b []byte, u *url.URL, c task.Call, added credentials.Added) []byte {
	t := c.Task
	b = append(append(b, t.Method...), ' ')
	b = append(append(b, u.RequestURI()...), " HTTP/1.1\r\n"...)
	b = appendField(b, "Host", u.Host)
	hasAgent, hasType := false, t.Body == nil || t.ContentType == ""
	for name, value := range added.Headers {
		if added.Replaces(name) {
			continue
		}
		hasAgent = hasAgent || strings.EqualFold(name, "User-Agent")
		hasType = hasType || strings.EqualFold(name, "Content-Type")
		b = appendField(b, name, value)
	}
	if !hasAgent {
		b = appendField(b, "User-Agent", d.userAgent)
	}
	if !hasType {
		b = appendField(b, "Content-Type", t.ContentType)
	}
	id := t.ID.String()
	b = appendField(b, "Orchestrator-Task-Id", id)
	b = appendNumber(b, "Orchestrator-Attempt", c.Attempt)
	b = appendNumber(b, "Orchestrator-Max-Attempts", t.Retry.MaxAttempts)
	b = appendNumber(b, "Orchestrator-Hops", t.Hops+1)
	if !t.RunAt.IsZero() {
		b = append(b, "Orchestrator-Run-At: "...)
		b = append(task.AppendTime(b, t.RunAt), "\r\n"...)
	}
	if c.ViaWorkerEndpoint {
		b = appendField(b, "Orchestrator-Via", "worker-endpoint")
	}
	if token := added.Token(); token != "" {
		b = appendField(b, "Authorization", "Bearer "+token)
	}
	if timestamp, signature, signed := added.Signature(id, c.At, t.Body); signed {
		b = appendField(b, "Webhook-Id", id)
		b = appendField(b, "Webhook-Timestamp", timestamp)
		b = appendField(b, "Webhook-Signature", signature)
	}
	// RFC 9110 §8.6: where the method gives content a meaning, its absence is said too.
	if len(t.Body) > 0 || t.Method == http.MethodPost || t.Method == http.MethodPut || t.Method == http.MethodPatch {
		b = appendNumber(b, "Content-Length", len(t.Body))
	}
	return append(b, "\r\n"...)
}

func appendField(b []byte, name, value string) []byte {
	b = append(append(b, name...), ": "...)
	return append(append(b, value...), "\r\n"...)
}

func appendNumber(b []byte, name string, n int) []byte {
	b = append(append(b, name...), ": "...)
	return append(strconv.AppendInt(b, int64(n), 10), "\r\n"...)
}

var (
	errRefused    = errors.New("the target policy refuses the address that the host name stands for")
	errPassedOver = errors.New("address passed over")
	errHandshake  = errors.New("TLS handshake")
)

// dial connects to addr and guards the address that is really dialled. Where a
// name stands for several addresses, those that the policy closes are passed
// over; the call counts as refused only when no other was there to try.
func (d *Deliverer) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	var refused, allowed atomic.Bool
	dialer := net.Dialer{
		Resolver: d.resolver,
		Control: func(_, address string, _ syscall.RawConn) error {
			a, err := netip.ParseAddrPort(address)
			if err != nil || !d.policy.Allows(a.Addr()) {
				refused.Store(true)
				return errPassedOver
			}
			allowed.Store(true)
			return nil
		},
	}
	conn, err := dialer.DialContext(ctx, network, addr)
	if err != nil && refused.Load() && !allowed.Load() {
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
	if err := tlsConn.HandshakeContext(ctx); err != nil {
		conn.Close()
		return nil, fmt.Errorf("%w: %w", errHandshake, err)
	}
	return tlsConn, nil
}
