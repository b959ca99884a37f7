package deliver

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/melodia/orchestrator/internal/deliver/http1"
	"github.com/melodia/orchestrator/internal/task"
)

// early is a target that answers before it reads the request's body. Its system takes
// only a little of the body by itself.
type early struct {
	raw  *net.TCPConn
	conn net.Conn // with TLS, maybe
	body io.Reader
}

// newEarlyServer serves one request on each connection, over TLS where certificate is there.
func newEarlyServer(t *testing.T, certificate *tls.Certificate, serve func(early)) (address string) {
	return newRawServer(t, func(raw net.Conn, _ int) {
		raw.(*net.TCPConn).SetReadBuffer(64 << 10)
		conn := raw
		if certificate != nil {
			conn = tls.Server(raw, &tls.Config{Certificates: []tls.Certificate{*certificate}})
		}
		if r, err := http.ReadRequest(bufio.NewReaderSize(conn, 16)); err == nil {
			serve(early{raw.(*net.TCPConn), conn, r.Body})
		}
	})
}

const (
	kept        = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nright"
	closing     = "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 5\r\n\r\nright"
	untilTheEnd = "HTTP/1.0 200 OK\r\n\r\nright"
	bad         = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxx\r\n"
)

// A target may answer first and read then ("accepted", then work). It gets the body whole.
func TestEarlySuccessGetsTheWholeBody(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("x", 4<<20)
	says := func(answer string) func(early) {
		return func(e early) { io.WriteString(e.conn, answer) }
	}
	answers := []struct {
		name  string
		first func(early) // before the body is read
		error string
	}{
		{"kept", says(kept), ""},
		{"closing", says(closing), ""},
		{"until the end", func(e early) {
			io.WriteString(e.conn, untilTheEnd)
			if c, ok := e.conn.(*tls.Conn); ok {
				c.CloseWrite()
			}
			e.raw.CloseWrite()
		}, ""},
		{"long", says(fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(long), long)), ""},
		{"malformed", says(bad), "the answer's body was cut short: the chunked body of the answer is malformed"},
	}
	sizes := []int{1 << 10, 33 << 10, 300 << 10, 1 << 20, 8 << 20} // the last one is more than the sockets take
	certificate := newCertificate(t, time.Now().Add(time.Hour))
	for _, scheme := range []string{"http", "https"} {
		for _, answer := range answers {
			for _, size := range sizes {
				t.Run(fmt.Sprintf("%s %s %d KiB", scheme, answer.name, size>>10), func(t *testing.T) {
					t.Parallel()
					got := make(chan int64, 1)
					var c *tls.Certificate
					if scheme == "https" {
						c = &certificate
					}
					address := newEarlyServer(t, c, func(e early) {
						answer.first(e)
						n, _ := io.Copy(io.Discard, e.body)
						got <- n
						hang(e.conn)
					})
					d := newDeliverer(t)
					d.tlsConfig.InsecureSkipVerify = true
					o := d.Deliver(t.Context(), newCall("POST", scheme+"://"+address, make([]byte, size)))
					if o.Kind != task.OutcomeSucceeded || o.StatusCode != 200 || o.Error != answer.error {
						t.Errorf("outcome = %s, %d, %q, want success with %q", o.Kind, o.StatusCode, o.Error, answer.error)
					}
					if n := <-got; n != int64(size) {
						t.Errorf("the target got %d bytes of the body, want %d", n, size)
					}
					if kept := d.pool.Idle(); kept != 0 && answer.name != "kept" {
						t.Errorf("%d connections are kept, want none", kept)
					}
				})
			}
		}
	}
}

// regardless writes to a connection that may be closed meanwhile: the service reads of an
// answer no more than it needs.
type regardless struct{ net.Conn }

func (c regardless) Write(p []byte) (int, error) {
	_, _ = c.Conn.Write(p)
	return len(p), nil
}

// A target that streams its answer from what it reads blocks on writing it when that is not read.
func TestEchoGetsTheWholeBody(t *testing.T) {
	t.Parallel()
	const size = 8 << 20
	got := make(chan int64, 1)
	address := newEarlyServer(t, nil, func(e early) {
		fmt.Fprintf(e.conn, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n", size)
		n, _ := io.Copy(regardless{e.conn}, e.body)
		got <- n
	})
	o := newDeliverer(t).Deliver(t.Context(), newCall("POST", "http://"+address, make([]byte, size)))
	if o.Kind != task.OutcomeSucceeded || o.Error != "" {
		t.Errorf("outcome = %s, %q, want success", o.Kind, o.Error)
	}
	if n := <-got; n != size {
		t.Errorf("the target got %d bytes of the body, want %d", n, size)
	}
}

// A 2xx of a target that ends the connection before it has the body is no success.
func TestEarlySuccessThatCutsTheBody(t *testing.T) {
	t.Parallel()
	const wasCut = "the target answered 200, but it ended the connection before it had the whole request"
	answers := map[string]func(early){
		"kept":    func(e early) { io.WriteString(e.conn, kept) },
		"closing": func(e early) { io.WriteString(e.conn, closing) },
		"until the end": func(e early) {
			io.WriteString(e.conn, untilTheEnd)
			e.raw.CloseWrite()
		},
	}
	for name, first := range answers {
		for _, size := range []int{1 << 20, 8 << 20} {
			t.Run(fmt.Sprintf("%s %d KiB", name, size>>10), func(t *testing.T) {
				t.Parallel()
				address := newEarlyServer(t, nil, func(e early) {
					first(e)
					io.CopyN(io.Discard, e.body, 1000)
				})
				o := newDeliverer(t).Deliver(t.Context(), newCall("POST", "http://"+address, make([]byte, size)))
				if o.Kind != task.OutcomeRetryable || o.StatusCode != 200 || o.TimedOut || o.Error != wasCut {
					t.Errorf("outcome = %+v, want retryable with %q", o, wasCut)
				}
			})
		}
	}
}

func TestEarlySuccessIsInterrupted(t *testing.T) {
	t.Parallel()
	for _, size := range []int{1 << 20, 8 << 20} {
		t.Run(fmt.Sprintf("%d KiB", size>>10), func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithCancel(t.Context())
			address := newEarlyServer(t, nil, func(e early) {
				io.WriteString(e.conn, kept)
				<-ctx.Done()
			})
			d := newDeliverer(t)
			d.excerpts.New = func() any { // asked for when the head has come
				cancel()
				return new([excerptBytes]byte)
			}
			o := d.Deliver(ctx, newCall("POST", "http://"+address, make([]byte, size)))
			want := task.Outcome{Kind: task.OutcomeInterrupted, StatusCode: 200, Error: "the target answered 200, but the call was called off before it ended"}
			o.Duration, o.ResponseExcerpt = 0, ""
			if diff := cmp.Diff(want, o); diff != "" {
				t.Errorf("outcome (-want +got):\n%s", diff)
			}
		})
	}
}

// An answer that is no success counts at once: the target need not take what it refuses.
func TestEarlyRefusalCountsAtOnce(t *testing.T) {
	t.Parallel()
	for code, want := range map[int]task.Kind{302: task.OutcomePermanent, 401: task.OutcomePermanent, 413: task.OutcomePermanent, 429: task.OutcomeRetryable, 503: task.OutcomeRetryable} {
		for _, connection := range []string{"keep-alive", "close"} {
			t.Run(fmt.Sprintf("%d %s", code, connection), func(t *testing.T) {
				t.Parallel()
				over := make(chan struct{})
				address := newEarlyServer(t, nil, func(e early) {
					fmt.Fprintf(e.conn, "HTTP/1.1 %d X\r\nConnection: %s\r\nContent-Length: 2\r\n\r\nno", code, connection)
					<-over // it reads no more
				})
				t.Cleanup(func() { close(over) })
				d := newDeliverer(t)
				o := d.Deliver(t.Context(), newCall("POST", "http://"+address, make([]byte, 8<<20)))
				if o.Kind != want || o.StatusCode != code || o.TimedOut || o.ResponseExcerpt != "no" {
					t.Errorf("outcome = %+v, want %s", o, want)
				}
				if d.pool.Idle() != 0 {
					t.Error("the connection is kept, want it closed")
				}
			})
		}
	}
}

// cutWrites is a connection that takes only half of a request.
type cutWrites struct{ *net.TCPConn }

func (c *cutWrites) Write(p []byte) (int, error) {
	n, _ := c.TCPConn.Write(p[:len(p)/2])
	return n, syscall.ECONNRESET
}

// A body that is written before the answer is awaited may be cut too.
func TestSmallBodyThatIsCut(t *testing.T) {
	t.Parallel()
	for code, want := range map[int]task.Outcome{
		200: {Kind: task.OutcomeRetryable, StatusCode: 200, ResponseExcerpt: "right", Error: "the target answered 200, but it ended the connection before it had the whole request"},
		404: {Kind: task.OutcomePermanent, StatusCode: 404, ResponseExcerpt: "right", Error: "the target answered 404 Not Found"},
	} {
		t.Run(fmt.Sprint(code), func(t *testing.T) {
			t.Parallel()
			address := newRawServer(t, func(conn net.Conn, _ int) {
				conn.Read(make([]byte, 1))
				fmt.Fprintf(conn, "HTTP/1.1 %d X\r\nContent-Length: 5\r\n\r\nright", code)
				hang(conn)
			})
			conn, err := net.Dial("tcp", address)
			if err != nil {
				t.Fatal(err)
			}
			d := newDeliverer(t)
			d.pool = http1.NewPool(http1.Options{Dial: func(context.Context, string, string) (net.Conn, error) {
				return &cutWrites{conn.(*net.TCPConn)}, nil
			}})
			o := d.Deliver(t.Context(), newCall("POST", "http://"+address, make([]byte, 20<<10)))
			o.Duration = 0
			if diff := cmp.Diff(want, o); diff != "" {
				t.Errorf("outcome (-want +got):\n%s", diff)
			}
			if d.pool.Idle() != 0 {
				t.Error("the connection is kept, want it closed")
			}
			if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
				t.Errorf("reading from the connection: %v, want it closed", err)
			}
		})
	}
}
