package httpserver

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"testing"
	"time"
)

// What Drain waits for, and what it does not.
func TestQuiet(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		send  string
		begun bool // a handler takes the request
		quiet bool
	}{
		"new":                {"", false, true},
		"a part of a head":   {get, false, true},
		"answered":           {get + "\r\n", false, true},
		"being answered":     {wait, true, false},
		"body under way":     {"POST /wait HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nabc", true, false},
		"the second of two":  {get + "\r\n" + wait, true, false},
		"answered, and more": {get + "\r\nGET", false, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := serve(t, 10)
			c := s.dial(tt.send)
			if tt.begun {
				<-s.waiting
			} else if len(tt.send) > len(get) {
				c.expect(http.StatusForbidden, refused)
			}
			if !tt.quiet && s.listener.quiet() {
				t.Error("it is quiet")
			}
			if tt.quiet {
				for end := time.Now().Add(30 * time.Second); !s.listener.quiet(); <-time.After(time.Millisecond) {
					if time.Now().After(end) {
						t.Fatal("it is not quiet after 30 s")
					}
				}
			}
		})
	}
}

// A request counts from when its bytes are here, not from when they are read.
func TestQuietUnread(t *testing.T) {
	t.Parallel()
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := Bound(tcp, 10, slog.New(slog.DiscardHandler))
	defer l.Close()
	if arrived(tcp) {
		t.Error("a connection waits to be accepted, want none")
	}
	caller, err := net.Dial("tcp", tcp.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer caller.Close()
	if !arrived(tcp) {
		t.Error("no connection waits to be accepted, want one")
	}
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if !l.quiet() {
		t.Error("a connection without a request is not quiet")
	}
	if _, err := caller.Write([]byte(wait)); err != nil {
		t.Fatal(err)
	}
	if l.quiet() {
		t.Error("a request that is not read is quiet")
	}
}

// A request is answered whose connection was not accepted when Drain began; the port is
// closed then, and so is the connection.
func TestDrain(t *testing.T) {
	t.Parallel()
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &service{t: t, address: tcp.Addr().String()}
	c := s.dial(get + "\r\n")
	l := Bound(tcp, 10, slog.New(slog.DiscardHandler))
	drained, served := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(drained)
		l.Drain(t.Context())
	}()
	for !l.draining.Load() {
		<-time.After(time.Millisecond)
	}
	server := &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, refused, http.StatusForbidden)
	})}
	go func() {
		defer close(served)
		_ = l.Serve(server)
	}()
	if open := c.expect(http.StatusForbidden, refused); open {
		t.Error("the connection stays open")
	}
	<-drained
	<-served
	if err := server.Shutdown(t.Context()); err != nil {
		t.Error(err)
	}
	if conn, err := net.Dial("tcp", s.address); err == nil {
		_ = conn.Close()
		t.Error("the port is open")
	}
}

func TestDrainEnds(t *testing.T) {
	t.Parallel()
	s := serve(t, 10)
	s.dial(wait)
	<-s.waiting
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	s.listener.Drain(ctx)
	if conn, err := net.Dial("tcp", s.address); err == nil {
		_ = conn.Close()
		t.Error("the port is open")
	}
}
