// Package deliver makes the HTTP calls that tasks ask for. It trusts no target: the
// task's timeout bounds what a target does in time, constants bound it in memory, and
// no call reaches an address that the [target.Policy] closes. One call goes through
// package target (may this URL be called), package credentials (what does the call
// carry), package http1 (request and answer), and ends as a [task.Outcome].
//
// One attempt is one request: the target may have carried out one that broke off,
// and a repeat must be an attempt of its own in the task's history. There is one
// exception. A connection kept from an earlier call may be closed by the target
// while a request is on its way. Where such a connection ends before a byte of the
// answer, and the method is idempotent (RFC 9110 §9.2.2: GET, HEAD, PUT, DELETE; the
// effect of several requests is that of one), the request is sent once more, over a
// new connection, within the attempt and its timeout; the attempt's error says so.
// POST and PATCH are not sent again, whatever their headers say.
package deliver

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"sync"
	"time"

	"github.com/melodia/orchestrator/internal/credentials"
	"github.com/melodia/orchestrator/internal/deliver/http1"
	"github.com/melodia/orchestrator/internal/target"
	"github.com/melodia/orchestrator/internal/task"
)

// Limits of what is taken from a target.
const (
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
	// PublicURL is where targets reach this service, without a slash at the end.
	PublicURL string
	// Concurrency is how many calls are expected at once. That many idle
	// connections are kept; it does not limit Deliver.
	Concurrency int
}

// Deliverer makes calls over one shared pool of connections. Any number of
// goroutines may use it.
type Deliverer struct {
	policy      *target.Policy
	credentials credentials.Set
	userAgent   string
	publicURL   string
	pool        *http1.Pool
	nameServers nameServers
	excerpts    sync.Pool // of *[excerptBytes]byte

	// Tests put their own in.
	resolver  *net.Resolver
	tlsConfig *tls.Config
}

// New makes a deliverer. Close must be called when no Deliver runs any more.
func New(o Options) *Deliverer {
	d := &Deliverer{
		policy:      o.Policy,
		credentials: o.Credentials,
		userAgent:   "orchestrator/" + o.Version,
		publicURL:   o.PublicURL,
		excerpts:    sync.Pool{New: func() any { return new([excerptBytes]byte) }},
		tlsConfig:   new(tls.Config),
	}
	d.pool = http1.NewPool(http1.Options{
		Dial:      d.dial,
		Exhausted: func(err error) bool { return localShortage(err) != "" },
		TLS:       d.tlsConfig,
		MaxIdle:   o.Concurrency,
	})
	return d
}

// Close closes the idle connections. It waits for nothing and may be called twice.
func (d *Deliverer) Close() {
	d.nameServers.stop()
	d.pool.Close()
}

// Deliver makes the call and returns its outcome. It blocks for the task's timeout at
// most, from dialling to the end of the answer's body. Where ctx ends before, the
// outcome is interrupted; so it is where a [task.Shortage] of this instance kept the
// request from being sent.
//
// A 2xx counts once its head is there and the target has the whole request; what is
// wrong with the rest of the answer is told in the outcome's Error. Any other answer
// counts at once, even while the request is still being sent; but where it breaks off
// within the part that is read, it is retryable, whatever its status. Beyond that part
// the connection is closed.
func (d *Deliverer) Deliver(ctx context.Context, c task.Call) task.Outcome {
	start := time.Now()
	o := d.attempt(ctx, c, start)
	tellWishes(&o)
	o.Duration = time.Since(start)
	o.TellHidden()
	return o
}

func (d *Deliverer) attempt(ctx context.Context, c task.Call, start time.Time) task.Outcome {
	u, err := d.policy.Parse(c.Task.URL)
	if err != nil {
		// The policy may have changed since the task was submitted.
		return task.Outcome{Kind: task.OutcomePermanent, Refused: true, Error: "the task's url " + err.Error()}
	}
	added, err := d.credentials.For(ctx, u, credentials.Wanted{
		Headers: c.Task.Headers, Audience: c.Task.OIDCAudience, JWT: c.Task.JWT, At: c.At, Retry: c.Attempt > 1, Deadline: start.Add(c.Task.Timeout),
		Token: string(c.Token),
	})
	if err != nil {
		o := d.notMade(ctx, c, start, err, "no ID token")
		o.Untried = true
		return o
	}
	o, connectionEnded := d.send(ctx, c, u, added, start, false)
	if connectionEnded && mayRepeat(c.Task.Method, &o, time.Since(start)) {
		o, _ = d.send(ctx, c, u, added, start, true)
		if o.Shortage != "" {
			return o // it was not sent again
		}
		o.NotSent = false // the first time it was
		if o.Error != "" {
			o.Error += "; "
		}
		o.Error += sentTwice
	}
	return o
}

// mayRepeat reports whether a request is sent again whose kept connection ended with o. A
// host that closes idle connections does so at once: what ends one later has let the target
// begin.
func mayRepeat(method string, o *task.Outcome, after time.Duration) bool {
	return idempotent(method) && o.Kind == task.OutcomeRetryable && !o.TimedOut && after <= task.HiddenAfter
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

// send sends the request once, over a new connection where fresh says so. connectionEnded
// reports that a kept connection ended before a byte of the answer.
func (d *Deliverer) send(ctx context.Context, c task.Call, u *url.URL, added credentials.Added, start time.Time, fresh bool) (o task.Outcome, connectionEnded bool) {
	conn, err := d.pool.Get(ctx, start.Add(c.Task.Timeout), u, fresh)
	if err != nil {
		return d.notMade(ctx, c, start, err, "no answer"), false
	}
	whole := false
	defer func() { conn.Finish(whole) }() // after a panic too
	o, whole = d.exchange(ctx, conn, c, u, added, start)
	return o, conn.LostIdle()
}

var errCutRequest = errors.New("it ended the connection before it had the whole request")

// exchange sends the request and decides about the answer. whole reports that the
// answer was read to its end and nothing broke off.
func (d *Deliverer) exchange(ctx context.Context, conn *http1.Conn, c task.Call, u *url.URL, added credentials.Added, start time.Time) (o task.Outcome, whole bool) {
	head := d.appendHead(conn.Buffer(), u, c, added)
	resp, err := conn.Send(c.Task.Method, u, head, c.Task.Body) //nolint:bodyclose // see there
	if err != nil {
		o := failed(ctx, c, start, err, "no answer")
		o.Severed = http1.IsEnd(err)
		return o, false
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
	o.ResponseExcerpt, whole, err = d.read(resp.Body, added)
	if o.Kind == task.OutcomeSucceeded {
		sent := conn.AwaitSent(ctx, whole)
		switch {
		case !sent:
			cut := failed(ctx, c, start, errCutRequest, "it did not take the whole request")
			o.Kind, o.TimedOut = cut.Kind, cut.TimedOut
			o.Error = "the target answered " + strconv.Itoa(o.StatusCode) + ", but " + cut.Error
		case err != nil:
			o.Error = "the answer's body was cut short: " + failed(ctx, c, start, err, "no end").Error
		}
		return o, whole && sent
	}
	// A target that is cut off may end its answer properly because of that.
	if err != nil || ctx.Err() != nil || time.Since(start) >= c.Task.Timeout {
		broken := failed(ctx, c, start, err, "no complete answer")
		o.Kind, o.Error, o.TimedOut = broken.Kind, broken.Error, broken.TimedOut
		return o, false
	}
	return o, whole
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
