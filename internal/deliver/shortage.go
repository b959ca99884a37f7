package deliver

import (
	"context"
	"errors"
	"net"
	"net/http/httptrace"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/melodia/orchestrator/internal/task"
)

// notMade returns the outcome of a call whose request was not sent because of err.
// missing says what had not come when the timeout was over.
func (d *Deliverer) notMade(ctx context.Context, c task.Call, start time.Time, err error, missing string) task.Outcome {
	if ctx.Err() == nil {
		if s := d.shortageOf(ctx, start, start.Add(c.Task.Timeout), err); s != "" {
			return task.Outcome{Kind: task.OutcomeInterrupted, Shortage: s, Error: string(s)}
		}
	}
	o := failed(ctx, c, start, err, missing)
	o.NotSent = true
	return o
}

// shortageOf returns what this instance lacks where that is why a call that began at start
// was not made, and "" where the target or its name is the cause. It blocks until deadline at
// most.
func (d *Deliverer) shortageOf(ctx context.Context, start, deadline time.Time, err error) task.Shortage {
	if s := localShortage(err); s != "" {
		return s
	}
	if dnsErr, ok := errors.AsType[*net.DNSError](err); ok {
		if !answered(dnsErr) && !d.nameServers.answer(ctx, d.resolver, start, deadline) {
			return task.ShortageResolver
		}
		return ""
	}
	if errors.Is(err, syscall.EADDRNOTAVAIL) && hasAddressFor(ctx, err) {
		return task.ShortagePorts
	}
	return ""
}

// localShortage returns the shortage that err tells of, if it is one that concerns every
// connection, and "" else.
func localShortage(err error) task.Shortage {
	for _, known := range []struct {
		errno    syscall.Errno
		shortage task.Shortage
	}{
		{syscall.EMFILE, task.ShortageDescriptors},
		{syscall.ENFILE, task.ShortageDescriptors},
		{syscall.ENOMEM, task.ShortageMemory},
		{syscall.ENOBUFS, task.ShortageMemory},
	} {
		if errors.Is(err, known.errno) {
			return known.shortage
		}
		// A lookup keeps only the text of what kept it from asking, which no name server writes.
		if dnsErr, ok := errors.AsType[*net.DNSError](err); ok && strings.HasSuffix(dnsErr.Err, known.errno.Error()) {
			return known.shortage
		}
	}
	return ""
}

// hasAddressFor reports whether the machine has an address from which the address that err
// is about could be reached. EADDRNOTAVAIL is also the error where it has none, such as where
// IPv6 is off: no later attempt would be better. Connecting a UDP socket sends nothing and
// needs no TCP port.
func hasAddressFor(ctx context.Context, err error) bool {
	dialling, ok := errors.AsType[*net.OpError](err)
	if !ok || dialling.Addr == nil {
		return false
	}
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, "udp", dialling.Addr.String())
	if err != nil {
		return false
	}
	conn.Close()
	return true
}

// answered reports whether a name server answered, though not with an address. Package net
// has no error values for it.
func answered(err *net.DNSError) bool {
	if err.IsNotFound {
		return true
	}
	switch err.Err {
	case "server misbehaving", "lame referral", "invalid DNS response", "no answer from DNS server", "cannot unmarshal DNS message":
		return true
	}
	return false
}

const (
	// slowLookup is how long a lookup takes before the name servers are asked whether any
	// answers; half of the attempt's time where that is shorter. So the reply is known when
	// the attempt's time is over.
	slowLookup = time.Second
	// askTimeout is long enough for a second name server where the first is silent:
	// resolvers wait for 5 s.
	askTimeout = 12 * time.Second
	askedFresh = time.Second
)

// nameServers finds out whether any name server answers at all. Where one does, a name that
// cannot be looked up is itself the cause. The question is for the name servers of the root,
// which every resolver knows.
type nameServers struct {
	mu     sync.Mutex
	last   *question
	giveUp context.CancelFunc // of the last
}

// question is the one that is under way or was asked last. answered may be read when done is
// closed.
type question struct {
	asked    time.Time
	done     chan struct{}
	answered bool
}

// ask asks, unless that is under way or was done within the last second.
func (s *nameServers) ask(ctx context.Context, resolver *net.Resolver) *question {
	s.mu.Lock()
	defer s.mu.Unlock()
	if q := s.last; q != nil {
		select {
		case <-q.done:
			if time.Since(q.asked) < askedFresh {
				return q
			}
		default:
			return q
		}
	}
	q := &question{asked: time.Now(), done: make(chan struct{})}
	// Other calls wait for it too.
	ctx, giveUp := context.WithTimeout(context.WithoutCancel(ctx), askTimeout)
	s.last, s.giveUp = q, giveUp
	go func() { // ends by itself, or soon after stop
		defer close(q.done)
		defer giveUp()
		_, err := resolver.LookupNS(ctx, ".")
		dnsErr, failed := errors.AsType[*net.DNSError](err)
		q.answered = err == nil || failed && answered(dnsErr)
	}()
	return q
}

// stop gives up the question that is under way, if any. It may be called twice.
func (s *nameServers) stop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.giveUp != nil {
		s.giveUp()
	}
}

// answer reports whether a name server answers, or has answered while the call that began at
// start was under way. It waits for that until deadline at most; no answer until then is none.
func (s *nameServers) answer(ctx context.Context, resolver *net.Resolver, start, deadline time.Time) bool {
	s.mu.Lock()
	q := s.last
	s.mu.Unlock()
	if q == nil || q.asked.Before(start) {
		q = s.ask(ctx, resolver)
	}
	timer := time.NewTimer(time.Until(deadline))
	defer timer.Stop()
	select {
	case <-q.done:
		return q.answered
	default:
	}
	select {
	case <-q.done:
		return q.answered
	case <-timer.C:
		return false
	case <-ctx.Done():
		return false
	}
}

// watchLookup returns ctx, which has a deadline, for a dial. Where its lookup takes long
// the name servers are asked meanwhile.
func (s *nameServers) watchLookup(ctx context.Context, resolver *net.Resolver) context.Context {
	deadline, _ := ctx.Deadline()
	var timer *time.Timer
	return httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		DNSStart: func(httptrace.DNSStartInfo) {
			timer = time.AfterFunc(min(slowLookup, time.Until(deadline)/2), func() { s.ask(ctx, resolver) })
		},
		DNSDone: func(httptrace.DNSDoneInfo) { timer.Stop() },
	})
}
