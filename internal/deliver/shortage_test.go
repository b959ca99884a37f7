package deliver

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/melodia/orchestrator/internal/deliver/http1"
	"github.com/melodia/orchestrator/internal/task"
)

// dialling is what a dial to an address fails with.
func dialling(address string, errno syscall.Errno) error {
	a := netip.MustParseAddrPort(address)
	return &net.OpError{Op: "dial", Net: "tcp", Addr: net.TCPAddrFromAddrPort(a), Err: os.NewSyscallError("connect", errno)}
}

func TestShortageOf(t *testing.T) {
	t.Parallel()
	d := newDeliverer(t)
	const here = "127.0.0.1:9"
	for _, tt := range []struct {
		name string
		err  error
		want task.Shortage
	}{
		{"EMFILE", dialling(here, syscall.EMFILE), task.ShortageDescriptors},
		{"ENFILE", dialling(here, syscall.ENFILE), task.ShortageDescriptors},
		{"ENOMEM", dialling(here, syscall.ENOMEM), task.ShortageMemory},
		{"ENOBUFS", dialling(here, syscall.ENOBUFS), task.ShortageMemory},
		{"no port", dialling(here, syscall.EADDRNOTAVAIL), task.ShortagePorts},
		// A link-local address without a zone can be reached from no address.
		{"no address of the family", dialling("[fe80::1]:9", syscall.EADDRNOTAVAIL), ""},
		{"no address known", os.NewSyscallError("connect", syscall.EADDRNOTAVAIL), ""},
		{"refused", dialling(here, syscall.ECONNREFUSED), ""},
		{"unreachable", dialling(here, syscall.ENETUNREACH), ""},
		{"in a handshake", fmt.Errorf("%w: %w", http1.ErrHandshake, dialling(here, syscall.ENOBUFS)), task.ShortageMemory},
		{"while looking up", &net.OpError{Op: "dial", Err: &net.DNSError{Name: "x", Err: "dial udp 127.0.0.1:53: socket: " + syscall.EMFILE.Error()}}, task.ShortageDescriptors},
		{"a secret's file", fmt.Errorf("the secret a cannot be read: %w", &os.PathError{Op: "open", Path: "/a", Err: syscall.ENFILE}), task.ShortageDescriptors},
		{"a name that says so", &net.DNSError{Name: syscall.EMFILE.Error(), Err: "no such host", IsNotFound: true}, ""},
	} {
		now := time.Now()
		if got := d.shortageOf(t.Context(), now, now.Add(patience), tt.err); got != tt.want {
			t.Errorf("%s: shortage of %q is %q, want %q", tt.name, tt.err, got, tt.want)
		}
	}
}

// TestShortageOfNameServers has lookups that fail, beside name servers that answer others or none.
func TestShortageOfNameServers(t *testing.T) {
	t.Parallel()
	refusing := func(context.Context, string, string) (net.Conn, error) {
		return nil, dialling("127.0.0.1:53", syscall.ECONNREFUSED)
	}
	hanging := func(ctx context.Context, _, _ string) (net.Conn, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	answering := newResolver(t, func(string) []netip.Addr { return nil }).Dial
	// first is for the first dials, which are for the call's own name: A and AAAA, twice.
	after := func(first, others func(context.Context, string, string) (net.Conn, error)) func(context.Context, string, string) (net.Conn, error) {
		var n atomic.Int32
		return func(ctx context.Context, network, address string) (net.Conn, error) {
			if n.Add(1) <= 2 {
				return first(ctx, network, address)
			}
			return others(ctx, network, address)
		}
	}
	for _, tt := range []struct {
		name string
		dial func(context.Context, string, string) (net.Conn, error)
		want task.Shortage
		text string
	}{
		{"all refuse", refusing, task.ShortageResolver, string(task.ShortageResolver)},
		{"all hang", hanging, task.ShortageResolver, string(task.ShortageResolver)},
		{"this name alone hangs", after(hanging, answering), "", "no answer within 4 s"},
		{"the name is not there", answering, "", "the name plays.melodia.app was not found"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			d := newDeliverer(t)
			d.resolver = &net.Resolver{PreferGo: true, Dial: tt.dial}
			c := newCall("POST", "http://plays.melodia.app./", nil)
			c.Task.Timeout = 4 * time.Second // name servers are asked after a second, and must have answered by then
			o := d.Deliver(t.Context(), c)
			kind := task.OutcomeRetryable
			if tt.want != "" {
				kind = task.OutcomeInterrupted
			}
			if o.Kind != kind || o.Shortage != tt.want || strings.Replace(o.Error, "app. ", "app ", 1) != tt.text {
				t.Errorf("outcome = %+v, want %s, %q, shortage %q", o, kind, tt.text, tt.want)
			}
			if o.Duration > c.Task.Timeout+patience/2 {
				t.Errorf("it took %v, want hardly more than 4 s", o.Duration)
			}
		})
	}
}

// TestIdleConnectionsMakeRoom has a lookup that finds no descriptor as long as a connection is idle.
func TestIdleConnectionsMakeRoom(t *testing.T) {
	t.Parallel()
	d := newDeliverer(t)
	s := newServer(t, answer(200, ""))
	for _, other := range []string{"127.0.0.2", "127.0.0.3"} {
		address := newRawServerAt(t, other)
		if o := d.Deliver(t.Context(), newCall("GET", "http://"+address, nil)); o.Kind != task.OutcomeSucceeded {
			t.Fatalf("outcome = %+v, want a success", o)
		}
	}
	names := newResolver(t, always("127.0.0.1"))
	d.resolver = &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
		if d.pool.Idle() > 0 {
			return nil, dialling(address, syscall.EMFILE)
		}
		return names.Dial(ctx, network, address)
	}}
	if o := d.Deliver(t.Context(), newCall("GET", named("plays.melodia.app.", strings.TrimPrefix(s.URL, "http://")), nil)); o.Kind != task.OutcomeSucceeded {
		t.Errorf("outcome = %+v, want a success", o)
	}
}

func newRawServerAt(t *testing.T, host string) (address string) {
	t.Helper()
	listener, err := net.Listen("tcp4", host+":0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan struct{})
	go func() {
		defer close(served)
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		saysAndHangs("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")(conn)
	}()
	t.Cleanup(func() {
		listener.Close()
		<-served
	})
	return listener.Addr().String()
}
