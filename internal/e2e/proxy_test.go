//go:build faults

package e2e

import (
	"bytes"
	"io"
	"net"
	"net/url"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// proxy stands between the service and its database, and does to their
// connections what networks, poolers and failovers do.
type proxy struct {
	t        *testing.T
	url      string // of the database, through the proxy
	listener net.Listener
	running  sync.WaitGroup
	begun    atomic.Int64 // connections that clients began to use

	mu       sync.Mutex
	network  string
	upstream string
	mode     proxyMode
	changed  chan struct{} // closed when the mode changes
	links    map[*link]struct{}
	cut      *cut
}

type proxyMode int

const (
	modePass  proxyMode = iota
	modeHang            // what is sent is held back, and goes on in another mode
	modeDrop            // what is sent is lost: connections of that time are never of use again, nor are they closed
	modeReset           // connections are reset, new ones when they are used
	modeGone            // the test is over
)

// link is a client's connection and its continuation.
type link struct {
	client, server *net.TCPConn // server is nil until it is connected
	dead           bool         // what is sent is lost
	cut            *cut         // the answer of the server is lost
}

// cut is a connection that is reset at a chosen moment: when the client sends
// marker. Either the message is lost, or it goes through and its answer is.
type cut struct {
	marker  []byte
	through bool
	done    chan struct{} // closed when it has happened
}

// readyForQuery is how the server's answer to every request ends
// (https://www.postgresql.org/docs/current/protocol-message-formats.html):
// outside of a transaction, so that it is committed.
var readyForQuery = []byte{'Z', 0, 0, 0, 5, 'I'}

// cancelRequest is how a client's first message goes on after its length where it has
// a statement of another connection cancelled (80877102; source as above).
var cancelRequest = []byte{0x04, 0xd2, 0x16, 0x2e}

func newProxy(t *testing.T, databaseURL string) *proxy {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	through, err := url.Parse(databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	through.Host = listener.Addr().String()
	through.RawQuery = "sslmode=disable" // markers must be readable
	p := &proxy{t: t, url: through.String(), listener: listener, changed: make(chan struct{}), links: map[*link]struct{}{}}
	p.lead(databaseURL)
	p.running.Go(p.accept)
	t.Cleanup(func() {
		_ = listener.Close()
		p.set(modeGone)
		p.running.Wait()
	})
	return p
}

// lead has new connections go to the server of databaseURL.
func (p *proxy) lead(databaseURL string) {
	p.t.Helper()
	config, err := pgx.ParseConfig(databaseURL)
	if err != nil {
		p.t.Fatal(err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.network, p.upstream = pgconn.NetworkAddress(config.Host, config.Port)
}

func (p *proxy) set(mode proxyMode) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.mode = mode
	close(p.changed)
	p.changed = make(chan struct{})
	for l := range p.links {
		switch mode {
		case modeDrop:
			l.dead = true
		case modeReset, modeGone:
			l.reset()
		}
	}
}

// cutAt prepares the cut of one connection and returns what is closed when it
// has happened.
func (p *proxy) cutAt(marker string, through bool) <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cut = &cut{marker: []byte(marker), through: through, done: make(chan struct{})}
	return p.cut.done
}

func (p *proxy) accept() {
	for {
		client, err := p.listener.Accept()
		if err != nil {
			return // closed
		}
		l := &link{client: client.(*net.TCPConn)}
		p.mu.Lock()
		if p.mode == modeGone {
			l.reset()
		} else {
			l.dead = p.mode == modeDrop
			p.links[l] = struct{}{}
			p.running.Go(func() { p.carry(l) })
		}
		p.mu.Unlock()
	}
}

// carry serves one connection until both sides have ended. It begins when the client
// has sent something: where a connection is reset before, net.Dial may take it for one
// to itself and dial again, up to two times (selfConnect in net/tcpsock_posix.go).
func (p *proxy) carry(l *link) {
	defer func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		l.reset()
		delete(p.links, l)
	}()
	first := make([]byte, 64<<10)
	n, err := l.client.Read(first)
	if err != nil {
		return
	}
	if !bytes.HasPrefix(first[min(n, 4):n], cancelRequest) {
		p.begun.Add(1)
	}
	var answering sync.WaitGroup
	if p.connect(l) {
		answering.Go(func() { p.forward(l, l.server, l.client, p.answered) })
	}
	p.forward(l, io.MultiReader(bytes.NewReader(first[:n]), l.client), l.server, p.asked)
	answering.Wait()
}

// connect reports whether l leads to the server. One that does not is dead or reset.
func (p *proxy) connect(l *link) bool {
	if !p.open(l) {
		return false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.mode != modeReset && p.mode != modeGone {
		network, upstream := p.network, p.upstream
		p.mu.Unlock()
		server, err := net.Dial(network, upstream)
		p.mu.Lock()
		if err == nil {
			l.server = server.(*net.TCPConn)
		}
	}
	if l.server == nil || p.mode == modeReset || p.mode == modeGone {
		l.reset()
		return false
	}
	return true
}

// open waits while the proxy hangs, and reports whether l leads anywhere.
func (p *proxy) open(l *link) bool {
	for {
		p.mu.Lock()
		dead, mode, changed := l.dead, p.mode, p.changed
		p.mu.Unlock()
		if dead || mode != modeHang {
			return !dead
		}
		<-changed
	}
}

// forward carries what from sends, as inspect allows, until that ends. Then
// the other side ends too, unless the link is dead.
func (p *proxy) forward(l *link, from io.Reader, to *net.TCPConn, inspect func(*link, []byte) bool) {
	buffer := make([]byte, 64<<10)
	var recent []byte // markers may come in two pieces
	for {
		n, err := from.Read(buffer)
		live := p.open(l)
		if live && n > 0 {
			recent = append(recent[max(0, len(recent)-64):], buffer[:n]...)
			if to != nil && inspect(l, recent) {
				_, _ = to.Write(buffer[:n]) // when that side has ended, so does this one
			}
		}
		if err != nil {
			if live && to != nil {
				_ = to.Close()
			}
			return
		}
	}
}

// asked reports whether what the client sent, recent at its end, goes on.
func (p *proxy) asked(l *link, recent []byte) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	c := p.cut
	if c == nil || !bytes.Contains(recent, c.marker) {
		return true
	}
	p.cut = nil
	if c.through {
		l.cut = c
		return true
	}
	l.reset()
	close(c.done)
	return false
}

// answered reports whether what the server sent goes on.
func (p *proxy) answered(l *link, recent []byte) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if l.cut == nil {
		return true
	}
	if bytes.HasSuffix(recent, readyForQuery) {
		l.reset()
		close(l.cut.done)
		l.cut = nil
	}
	return false
}

// reset ends both sides without the goodbye of TCP.
func (l *link) reset() {
	for _, side := range []*net.TCPConn{l.client, l.server} {
		if side != nil {
			_ = side.SetLinger(0)
			_ = side.Close()
		}
	}
}
