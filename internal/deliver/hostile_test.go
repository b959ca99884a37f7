package deliver

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"unicode"

	"github.com/google/go-cmp/cmp"

	"github.com/melodia/orchestrator/internal/target"
	"github.com/melodia/orchestrator/internal/task"
)

// newCertificate makes a self-signed certificate for 127.0.0.1.
func newCertificate(t testing.TB, notAfter time.Time) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		NotBefore:             notAfter.Add(-48 * time.Hour),
		NotAfter:              notAfter,
		IsCA:                  true,
		BasicConstraintsValid: true,
		IPAddresses:           []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
}

// after takes a request and then does what serve does.
func after(serve func(conn net.Conn)) func(net.Conn) {
	return func(conn net.Conn) {
		if readRequest(bufio.NewReader(conn)) == nil {
			serve(conn)
		}
	}
}

// says takes a request, sends text, and closes.
func says(text string) func(net.Conn) {
	return after(func(conn net.Conn) { io.WriteString(conn, text) })
}

// saysAndHangs takes a request, sends text, and keeps the connection open.
func saysAndHangs(text string) func(net.Conn) {
	return after(func(conn net.Conn) {
		io.WriteString(conn, text)
		hang(conn)
	})
}

// saysAgain takes a request, sends head, and then text until the connection is closed.
func saysAgain(head, text string) func(net.Conn) {
	return after(func(conn net.Conn) {
		io.WriteString(conn, head)
		for {
			if _, err := io.WriteString(conn, text); err != nil {
				return
			}
		}
	})
}

// drips takes a request, sends head, and then text every 10 ms until the connection is closed.
func drips(head, text string) func(net.Conn) {
	return after(func(conn net.Conn) {
		io.WriteString(conn, head)
		for range time.Tick(10 * time.Millisecond) {
			if _, err := io.WriteString(conn, text); err != nil {
				return
			}
		}
	})
}

// resets takes a request, sends text, and cuts the connection with RST.
func resets(text string) func(net.Conn) {
	return after(func(conn net.Conn) {
		io.WriteString(conn, text)
		conn.(*net.TCPConn).SetLinger(0)
	})
}

func bomb(t *testing.T, size int) string {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	if _, err := io.CopyN(w, zeros{}, int64(size)); err != nil {
		t.Fatal(err)
	}
	w.Close()
	return b.String()
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// secrets are planted wherever a caller or a target might put one. No error may show any.
var secrets = []string{"query-s3cret", "header-s3cret", "body-s3cret", "user-s3cret", "fragment-s3cret"}

func plant(c *task.Call) {
	c.Task.URL += "/hook?token=query-s3cret"
	c.Task.Headers = map[string]string{"Authorization": "Bearer header-s3cret", "X-Api-Key": "header-s3cret"}
	c.Task.Body = []byte(`{"key":"body-s3cret"}`)
}

func wantCleanError(t *testing.T, o task.Outcome) {
	t.Helper()
	if o.Error == "" && o.Kind != task.OutcomeSucceeded {
		t.Errorf("outcome %s with error %q", o.Kind, o.Error)
	}
	for _, secret := range secrets {
		if strings.Contains(o.Error, secret) {
			t.Errorf("error %q shows %s", o.Error, secret)
		}
	}
	if len(o.Error) > 400 || strings.Contains(o.Error, "?") || strings.ContainsFunc(o.Error, unicode.IsControl) {
		t.Errorf("error = %q, want one short line without a query", o.Error)
	}
}

// TestHostileTargets does not run beside others: it watches how much memory each call costs,
// the target's own part included.
func TestHostileTargets(t *testing.T) {
	const quick = 200 * time.Millisecond
	const ok = "HTTP/1.1 200 OK\r\n"
	line := strings.Repeat("x", 1000)
	headers := strings.Repeat("X-"+line+": "+line+"\r\n", 50) // 100 KB
	block := strings.Repeat("x", 64<<10)
	gigabyte := func(conn net.Conn) {
		fmt.Fprintf(conn, "%sContent-Length: %d\r\n\r\n", ok, 1<<30)
		for range (1 << 30) / len(block) {
			if _, err := io.WriteString(conn, block); err != nil {
				return
			}
		}
		t.Error("1 GB was taken")
	}
	const (
		retryable = task.OutcomeRetryable
		permanent = task.OutcomePermanent
		succeeded = task.OutcomeSucceeded
		noAnswer  = "no answer within 0.2 s"
		cutShort  = "no complete answer within 0.2 s"
		bodyCut   = "the answer's body was cut short: "
		noEnd     = bodyCut + "no end within 0.2 s"
		badBody   = bodyCut + "the chunked body of the answer is malformed"
		brokenOff = "the target closed the connection before its answer was complete"
		wasReset  = "the target reset the connection"
		notHTTP   = "the answer is not valid HTTP"
		tooLarge  = "response headers larger than 64 KiB"
	)
	tests := []struct {
		name    string
		serve   func(net.Conn)
		timeout time.Duration
		want    task.Outcome // without excerpt and duration
	}{
		{"hangs before the head", saysAndHangs(""), quick, task.Outcome{Kind: retryable, Error: noAnswer, TimedOut: true}},
		{"hangs in the status line", saysAndHangs("HTTP/1."), quick, task.Outcome{Kind: retryable, Error: noAnswer, TimedOut: true}},
		{"hangs in the headers", saysAndHangs(ok + "X-A: b\r\nX-"), quick, task.Outcome{Kind: retryable, Error: noAnswer, TimedOut: true}},
		{"drips headers", drips(ok, "X-A: b\r\n"), quick, task.Outcome{Kind: retryable, Error: noAnswer, TimedOut: true}},
		{"drips 1xx answers", drips("", "HTTP/1.1 103 Early Hints\r\n\r\n"), quick, task.Outcome{Kind: retryable, Error: noAnswer, TimedOut: true}},
		{"hangs before the body", saysAndHangs(ok + "Content-Length: 9\r\n\r\n"), quick, task.Outcome{Kind: succeeded, StatusCode: 200, Error: noEnd}},
		{"hangs in the body", saysAndHangs(ok + "Content-Length: 9\r\n\r\nhalf"), quick, task.Outcome{Kind: succeeded, StatusCode: 200, Error: noEnd}},
		{"hangs in a chunk", saysAndHangs(ok + "Transfer-Encoding: chunked\r\n\r\n9\r\nhalf"), quick, task.Outcome{Kind: succeeded, StatusCode: 200, Error: noEnd}},
		{"hangs in the trailer", saysAndHangs(ok + "Transfer-Encoding: chunked\r\nTrailer: X-A\r\n\r\n0\r\nX-A"), quick, task.Outcome{Kind: succeeded, StatusCode: 200, Error: noEnd}},
		{"hangs after the excerpt", saysAndHangs(ok + "Content-Length: 9000\r\n\r\n" + strings.Repeat("x", 8999)), quick, task.Outcome{Kind: succeeded, StatusCode: 200, Error: noEnd}},
		{"drips a body", drips(ok+"\r\n", "x"), quick, task.Outcome{Kind: succeeded, StatusCode: 200, Error: noEnd}},
		{"hangs in the body of a 404", saysAndHangs("HTTP/1.1 404 Not Found\r\nContent-Length: 9\r\nRetry-After: 3\r\n\r\n"), quick, task.Outcome{Kind: retryable, StatusCode: 404, Error: cutShort, TimedOut: true, RetryAfter: 3 * time.Second}},

		{"closes at once", func(net.Conn) {}, patience, task.Outcome{Kind: retryable, Error: "the target closed or reset"}},
		{"closes before the head", says(""), patience, task.Outcome{Kind: retryable, Error: brokenOff, Severed: true}},
		{"closes in the headers", says(ok + "X-A: b\r\n"), patience, task.Outcome{Kind: retryable, Error: brokenOff, Severed: true}},
		{"closes in the body", says(ok + "Content-Length: 9\r\n\r\nhalf"), patience, task.Outcome{Kind: succeeded, StatusCode: 200, Error: bodyCut + brokenOff}},
		{"closes in a chunk", says(ok + "Transfer-Encoding: chunked\r\n\r\n9\r\nhalf"), patience, task.Outcome{Kind: succeeded, StatusCode: 200, Error: bodyCut + brokenOff}},
		{"closes after the excerpt", says(ok + "Content-Length: 9000\r\n\r\n" + strings.Repeat("x", 8999)), patience, task.Outcome{Kind: succeeded, StatusCode: 200, Error: bodyCut + brokenOff}},
		{"resets before the head", resets(""), patience, task.Outcome{Kind: retryable, Error: wasReset}},
		{"resets in the body", resets(ok + "Content-Length: 9\r\n\r\nhalf"), patience, task.Outcome{Kind: succeeded, StatusCode: 200, Error: bodyCut + wasReset}},
		{"sends a chunk without a size", says(ok + "Transfer-Encoding: chunked\r\n\r\nzz\r\nx"), patience, task.Outcome{Kind: succeeded, StatusCode: 200, Error: badBody}},
		{"sends more than its length", says(ok + "Content-Length: 1\r\n\r\nmore"), patience, task.Outcome{Kind: succeeded, StatusCode: 200}},
		{"closes in the body of a 299", says("HTTP/1.1 299 Odd\r\nContent-Length: 9\r\n\r\nhalf"), patience, task.Outcome{Kind: succeeded, StatusCode: 299, Error: bodyCut + brokenOff}},
		{"closes in the body of a 500", says("HTTP/1.1 500 Oops\r\nContent-Length: 9\r\n\r\nhalf"), patience, task.Outcome{Kind: retryable, StatusCode: 500, Error: brokenOff}},
		{"closes in the body of a 404", says("HTTP/1.1 404 Not Found\r\nContent-Length: 9\r\n\r\nhalf"), patience, task.Outcome{Kind: retryable, StatusCode: 404, Error: brokenOff}},

		{"endless body", saysAgain(ok+"\r\n", block), patience, task.Outcome{Kind: succeeded, StatusCode: 200}},
		{"endless chunks", saysAgain(ok+"Transfer-Encoding: chunked\r\n\r\n", "1\r\nx\r\n"), patience, task.Outcome{Kind: succeeded, StatusCode: 200}},
		{"endless body of a 500", saysAgain("HTTP/1.1 500 Oops\r\n\r\n", block), patience, task.Outcome{Kind: retryable, StatusCode: 500, Error: "the target answered 500 Internal Server Error"}},
		{"endless chunk extension", saysAgain(ok+"Transfer-Encoding: chunked\r\n\r\n1;", block), patience, task.Outcome{Kind: succeeded, StatusCode: 200, Error: badBody}},
		{"endless trailer", saysAgain(ok+"Transfer-Encoding: chunked\r\nTrailer: X-A\r\n\r\n0\r\n", "X-A: "+line+"\r\n"), patience, task.Outcome{Kind: succeeded, StatusCode: 200, Error: badBody}},
		{"1 GB", after(gigabyte), patience, task.Outcome{Kind: succeeded, StatusCode: 200}},
		{"claims 8 EB", saysAgain(ok+"Content-Length: 9223372036854775807\r\n\r\n", block), patience, task.Outcome{Kind: succeeded, StatusCode: 200}},
		{"gzip bomb", says(ok + "Content-Encoding: gzip\r\n\r\n" + bomb(t, 20<<20)), patience, task.Outcome{Kind: succeeded, StatusCode: 200}},
		{"endless headers", saysAgain(ok, headers), patience, task.Outcome{Kind: retryable, Error: tooLarge}},
		{"one endless header", saysAgain(ok+"X-A: ", block), patience, task.Outcome{Kind: retryable, Error: tooLarge}},
		{"endless status line", saysAgain("HTTP/1.1 200 ", block), patience, task.Outcome{Kind: retryable, Error: tooLarge}},
		{"endless 1xx answers", saysAgain("", "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"), patience, task.Outcome{Kind: retryable, Error: tooLarge}},
		{"endless 100 answers", saysAgain("", "HTTP/1.1 100 Continue\r\n\r\n"), patience, task.Outcome{Kind: retryable, Error: tooLarge}},

		{"switches protocols and hangs", saysAndHangs("HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n"), patience, task.Outcome{Kind: retryable, StatusCode: 101, Error: "the target answered 101 Switching Protocols"}},
		{"not HTTP", says("SSH-2.0-OpenSSH_9.2 query-s3cret\r\n"), patience, task.Outcome{Kind: retryable, Error: notHTTP}},
		{"quotes the query in its status", says("HTTP/1.1 query-s3cret OK\r\n\r\n"), patience, task.Outcome{Kind: retryable, Error: notHTTP}},
		{"quotes the query in a header", says(ok + "token=query-s3cret\r\n\r\n"), patience, task.Outcome{Kind: retryable, Error: "the answer has a header line that is not valid HTTP"}},
		{"quotes the query in a length", says(ok + "Content-Length: query-s3cret\r\n\r\n"), patience, task.Outcome{Kind: retryable, Error: "the answer has a Content-Length that is no number of bytes"}},
		{"status 012", says("HTTP/1.1 012 Twelve\r\nContent-Length: 0\r\n\r\n"), patience, task.Outcome{Kind: retryable, Error: notHTTP}},
		{"reason with controls", says("HTTP/1.1 500 \x1b[31mred\x07\r\nContent-Length: 0\r\n\r\n"), patience, task.Outcome{Kind: retryable, StatusCode: 500, Error: "the target answered 500 Internal Server Error"}},
		{
			"location with controls", says("HTTP/1.1 302 Found\r\nLocation: http://x/\u202e\u0085%0d%0aa\r\nContent-Length: 0\r\n\r\n"), patience,
			task.Outcome{Kind: permanent, StatusCode: 302, Error: "the target answered 302 Found and points to http://x/%E2%80%AE%C2%85%0d%0aa; redirects are not followed"},
		},
		{
			"redirects to the metadata server",
			says("HTTP/1.1 307 Temporary Redirect\r\nLocation: http://user-s3cret:user-s3cret@169.254.169.254/computeMetadata/v1/?token=query-s3cret#fragment-s3cret\r\nContent-Length: 0\r\n\r\n"), patience,
			task.Outcome{Kind: permanent, StatusCode: 307, Error: "the target answered 307 Temporary Redirect and points to http://169.254.169.254/computeMetadata/v1/; redirects are not followed"},
		},
	}
	for _, tt := range tests {
		var connections atomic.Int32
		serve := func(conn net.Conn) {
			connections.Add(1)
			tt.serve(conn)
		}
		call := func(t *testing.T, d *Deliverer, address string) {
			c := newCall("POST", "http://"+address, nil)
			plant(&c)
			c.Task.Timeout = tt.timeout

			var before, now runtime.MemStats
			runtime.ReadMemStats(&before)
			got := d.Deliver(t.Context(), c)
			runtime.ReadMemStats(&now)
			if cost := now.TotalAlloc - before.TotalAlloc; cost > 8<<20 {
				t.Errorf("the call cost %d bytes, want at most 8 MiB", cost)
			}
			if tt.timeout == quick && got.Duration != quick {
				t.Errorf("duration = %v, want %v", got.Duration, quick)
			}
			wantCleanError(t, got)
			if len(got.ResponseExcerpt) > excerptBytes {
				t.Errorf("excerpt of %d bytes, want at most %d", len(got.ResponseExcerpt), excerptBytes)
			}
			if n := connections.Load(); n != 1 {
				t.Errorf("connections = %d, want 1", n)
			}
			// How far the answer got before a reset or a close is the kernel's choice.
			if strings.HasPrefix(tt.name, "resets") || strings.HasPrefix(tt.name, "closes at once") {
				if (got.Error == wasReset || got.Error == brokenOff) && got.Kind == retryable {
					return
				}
				if got.Error == bodyCut+brokenOff && got.Kind == succeeded {
					return
				}
			}
			got.Duration, got.ResponseExcerpt = 0, ""
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("outcome (-want +got):\n%s", diff)
			}
		}
		t.Run(tt.name, func(t *testing.T) {
			if tt.timeout == quick { // what the target says must come before
				synctest.Test(t, func(t *testing.T) { call(t, newPiped(t, serve), "127.0.0.1") })
				return
			}
			call(t, newDeliverer(t), newRawServer(t, func(conn net.Conn, _ int) { serve(conn) }))
		})
	}
}

func TestTargetThatReadsNothing(t *testing.T) {
	t.Parallel()
	const timeout = 2 * time.Second
	tests := []struct {
		name, answer string
		want         task.Outcome
	}{
		{"and answers nothing", "", task.Outcome{Kind: task.OutcomeRetryable, Error: "no answer within 2 s", TimedOut: true, Duration: timeout}},
		{"and half answers", "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf", task.Outcome{Kind: task.OutcomeRetryable, StatusCode: 200, Error: "the target answered 200, but it did not take the whole request within 2 s", ResponseExcerpt: "half", TimedOut: true, Duration: timeout}},
		{"and succeeds", answerOK, task.Outcome{Kind: task.OutcomeRetryable, StatusCode: 200, Error: "the target answered 200, but it did not take the whole request within 2 s", ResponseExcerpt: "right", TimedOut: true, Duration: timeout}},
		{"and answers", "HTTP/1.1 413 Content Too Large\r\nContent-Length: 3\r\n\r\nbig", task.Outcome{Kind: task.OutcomePermanent, StatusCode: 413, Error: "the target answered 413 Request Entity Too Large", ResponseExcerpt: "big"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				over := make(chan struct{})
				d := newPiped(t, func(conn net.Conn) {
					conn.Read(make([]byte, 1)) // what is answered before a request is no answer
					io.WriteString(conn, tt.answer)
					<-over
				})
				t.Cleanup(func() { close(over) })
				c := newCall("POST", "http://127.0.0.1", make([]byte, 1<<20))
				c.Task.Timeout = timeout
				if diff := cmp.Diff(tt.want, d.Deliver(t.Context(), c)); diff != "" {
					t.Errorf("outcome (-want +got):\n%s", diff)
				}
			})
		})
	}
}

func TestRedirectLoopIsNotFollowed(t *testing.T) {
	t.Parallel()
	var calls atomic.Int32
	s := newServer(t, func(w http.ResponseWriter, r *http.Request) {
		calls.Add(1)
		http.Redirect(w, r, r.URL.String(), http.StatusPermanentRedirect)
	})
	o := newDeliverer(t).Deliver(t.Context(), newCall("POST", s.URL, nil))
	if o.Kind != task.OutcomePermanent || o.StatusCode != 308 || o.Refused {
		t.Errorf("outcome = %+v, want permanent with status 308", o)
	}
	if n := calls.Load(); n != 1 {
		t.Errorf("calls = %d, want 1", n)
	}
}

func TestNoCompressionIsAskedFor(t *testing.T) {
	t.Parallel()
	s := newServer(t, func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, "accepts:"+r.Header.Get("Accept-Encoding"))
	})
	if o := newDeliverer(t).Deliver(t.Context(), newCall("POST", s.URL, nil)); o.ResponseExcerpt != "accepts:" {
		t.Errorf("the target saw %q, want no Accept-Encoding", o.ResponseExcerpt)
	}
}

func TestConnectionFailures(t *testing.T) {
	t.Parallel()
	refusing, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	refusing.Close()

	tlsServer := func(certificate tls.Certificate) string {
		return "https://" + newRawServer(t, func(conn net.Conn, _ int) {
			tls.Server(conn, &tls.Config{Certificates: []tls.Certificate{certificate}}).Handshake()
		})
	}
	expired := newCertificate(t, time.Now().Add(-time.Hour))
	otherHost, d := newTLSServer(t, answer(200, ""))
	d.tlsConfig.RootCAs.AddCert(expired.Leaf)
	d.resolver = newResolver(t, func(name string) []netip.Addr {
		if name == "plays.melodia.app" {
			return []netip.Addr{netip.MustParseAddr("127.0.0.1")}
		}
		return nil
	})
	const quick = 200 * time.Millisecond
	tests := []struct {
		name    string
		url     string
		timeout time.Duration
		want    string
	}{
		{"connection refused", "http://" + refusing.Addr().String(), patience, "connection refused"},
		{"name not found", "http://nowhere.melodia.app", patience, "the name nowhere.melodia.app was not found"},
		{"certificate expired", tlsServer(expired), patience, "TLS certificate has expired or is not valid yet"},
		{"certificate self-signed", tlsServer(newCertificate(t, time.Now().Add(time.Hour))), patience, "TLS certificate is signed by an unknown authority"},
		{"certificate of another host", strings.Replace(otherHost.URL, "127.0.0.1", "plays.melodia.app", 1), patience, "TLS certificate is for another host name"},
		{"no TLS", "https://" + newRawServer(t, func(conn net.Conn, _ int) { io.WriteString(conn, "220 smtp.melodia.app query-s3cret\r\n"); hang(conn) }), patience, "the target does not speak TLS on this port"},
		{"TLS closed", "https://" + newRawServer(t, func(conn net.Conn, _ int) { readHello(conn) }), patience, "the target closed the connection during the TLS handshake"},
		{"TLS reset", "https://" + newRawServer(t, func(conn net.Conn, _ int) { readHello(conn); conn.(*net.TCPConn).SetLinger(0) }), patience, "the target reset the connection during the TLS handshake"},
		{"TLS hangs", "https://" + newRawServer(t, func(conn net.Conn, _ int) { hang(conn) }), quick, "no answer within 0.2 s"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			c := newCall("POST", tt.url, nil)
			plant(&c)
			c.Task.Timeout = tt.timeout
			got := d.Deliver(t.Context(), c)
			wantCleanError(t, got)
			want := task.Outcome{Kind: task.OutcomeRetryable, Error: tt.want, TimedOut: tt.timeout == quick, NotSent: true, Duration: got.Duration}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("outcome (-want +got):\n%s", diff)
			}
		})
	}
}

// The TLS handshake of net/http would go on behind the call's back.
func TestNothingOutlastsTheCall(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		closed := make(chan struct{})
		d := newPiped(t, func(conn net.Conn) {
			hang(conn)
			close(closed)
		})
		if o := d.Deliver(t.Context(), newCall("POST", "https://127.0.0.1", nil)); !o.TimedOut || o.Duration != patience {
			t.Fatalf("outcome = %+v, want a timeout", o)
		}
		synctest.Wait()
		select {
		case <-closed:
		default:
			t.Error("the connection is still open")
		}
	})
}

func TestGuardAtDialTime(t *testing.T) {
	t.Parallel()
	const refusedText = "the target policy refuses the address that the host name stands for"
	closedPort, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closedPort.Close()
	tests := []struct {
		name     string
		addrs    []string
		networks []string
		dead     bool // nothing listens
		want     task.Outcome
	}{
		{"a closed address", []string{"10.0.0.1"}, nil, false, task.Outcome{Kind: task.OutcomePermanent, Refused: true, NotSent: true, Error: refusedText}},
		{"several closed addresses", []string{"10.0.0.1", "fd00::1", "192.168.1.1", "::1"}, nil, false, task.Outcome{Kind: task.OutcomePermanent, Refused: true, NotSent: true, Error: refusedText}},
		{"a mapped closed address", []string{"::ffff:10.0.0.1"}, nil, false, task.Outcome{Kind: task.OutcomePermanent, Refused: true, NotSent: true, Error: refusedText}},
		{"the metadata server", []string{"169.254.169.254"}, []string{"0.0.0.0/0", "169.254.169.254/32"}, false, task.Outcome{Kind: task.OutcomePermanent, Refused: true, NotSent: true, Error: refusedText}},
		{"the metadata server over IPv6", []string{"fd20:ce::254"}, []string{"::/0", "fd20:ce::254/128"}, false, task.Outcome{Kind: task.OutcomePermanent, Refused: true, NotSent: true, Error: refusedText}},
		{"the metadata server over NAT64", []string{"64:ff9b::a9fe:a9fe"}, []string{"::/0", "0.0.0.0/0"}, false, task.Outcome{Kind: task.OutcomePermanent, Refused: true, NotSent: true, Error: refusedText}},
		{"an open address", []string{"127.0.0.1"}, nil, false, task.Outcome{Kind: task.OutcomeSucceeded, StatusCode: 200}},
		{"closed ones beside an open one", []string{"10.0.0.1", "127.0.0.1", "fd00::1"}, nil, false, task.Outcome{Kind: task.OutcomeSucceeded, StatusCode: 200}},
		{"an open one that is dead", []string{"127.0.0.1"}, nil, true, task.Outcome{Kind: task.OutcomeRetryable, NotSent: true, Error: "connection refused"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			d := newDeliverer(t, tt.networks...)
			d.resolver = newResolver(t, always(tt.addrs...))
			address := closedPort.Addr().String()
			if !tt.dead {
				address = newServer(t, answer(200, "")).Listener.Addr().String()
			}
			got := d.Deliver(t.Context(), newCall("POST", named("plays.melodia.app", address), nil))
			got.Duration = 0
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("outcome (-want +got):\n%s", diff)
			}
		})
	}
	t.Run("closed ones beside an open one that is dead", func(t *testing.T) {
		t.Parallel()
		d := newDeliverer(t)
		d.resolver = newResolver(t, always("10.0.0.1", "127.0.0.1", "fd00::1"))
		got := d.Deliver(t.Context(), newCall("POST", named("plays.melodia.app", closedPort.Addr().String()), nil))
		// The text depends on which address came first.
		if got.Kind != task.OutcomeRetryable || got.Refused || got.Error == "" {
			t.Errorf("outcome = %+v, want retryable", got)
		}
	})
}

// The name is public when it is looked at, and ours when it is called.
func TestDNSAnswerThatChanges(t *testing.T) {
	t.Parallel()
	s := newServer(t, func(http.ResponseWriter, *http.Request) { t.Error("the target was called") })
	var changed atomic.Bool
	d := New(Options{Policy: policy(t, nil), Version: "1.2.3", Concurrency: 10})
	t.Cleanup(d.Close)
	d.resolver = newResolver(t, func(string) []netip.Addr {
		if changed.Load() {
			return []netip.Addr{netip.MustParseAddr("127.0.0.1")}
		}
		return []netip.Addr{netip.MustParseAddr("8.8.8.8")}
	})
	rawURL := named("rebinding.example", s.Listener.Addr().String())

	addrs, err := d.resolver.LookupNetIP(t.Context(), "ip4", "rebinding.example")
	if err != nil || len(addrs) != 1 || !d.policy.Allows(addrs[0]) {
		t.Fatalf("addresses at the check = %v, %v, want one that is allowed", addrs, err)
	}
	if err := d.policy.CheckURL(rawURL); err != nil {
		t.Fatalf("CheckURL = %v, want nil", err)
	}
	changed.Store(true)
	o := d.Deliver(t.Context(), newCall("POST", rawURL, nil))
	if o.Kind != task.OutcomePermanent || !o.Refused {
		t.Errorf("outcome = %+v, want refused", o)
	}
}

// A task may be older than the policy.
func TestPolicyIsAskedAgainAtDelivery(t *testing.T) {
	t.Parallel()
	s := newServer(t, func(http.ResponseWriter, *http.Request) { t.Error("the target was called") })
	https, err := target.NewPolicy(nil, []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}, true)
	if err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name   string
		policy *target.Policy
		url    string
	}{
		{"network", policy(t, nil), s.URL},
		{"host", policy(t, []string{"plays.melodia.app"}, "127.0.0.0/8"), s.URL},
		{"https", https, s.URL},
		{"metadata", policy(t, nil, "0.0.0.0/0"), "http://metadata.google.internal/computeMetadata/v1/"},
		{"no URL", policy(t, nil), "http://[::1"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			d := New(Options{Policy: tt.policy})
			t.Cleanup(d.Close)
			o := d.Deliver(t.Context(), newCall("POST", tt.url, nil))
			if o.Kind != task.OutcomePermanent || !o.Refused || o.Error == "" || strings.Contains(o.Error, tt.url) {
				t.Errorf("outcome = %+v, want refused, without the URL", o)
			}
		})
	}
}

func TestProxyOfTheEnvironmentIsIgnored(t *testing.T) {
	proxy := newServer(t, func(http.ResponseWriter, *http.Request) { t.Error("the proxy was called") })
	for _, name := range []string{"HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"} {
		t.Setenv(name, proxy.URL)
	}
	t.Setenv("NO_PROXY", "")
	t.Setenv("no_proxy", "")
	s := newServer(t, answer(200, "direct"))
	d := newDeliverer(t)
	d.resolver = newResolver(t, always("127.0.0.1"))
	rawURL := named("plays.melodia.app", s.Listener.Addr().String())
	// net/http reads the environment once; had it been read before, this test would show nothing.
	u, err := url.Parse(rawURL)
	if err != nil {
		t.Fatal(err)
	}
	if p, err := http.ProxyFromEnvironment(&http.Request{URL: u}); err != nil || p == nil {
		t.Fatalf("proxy by the environment = %v, %v, want ours", p, err)
	}
	if o := d.Deliver(t.Context(), newCall("POST", rawURL, nil)); o.ResponseExcerpt != "direct" {
		t.Errorf("outcome = %+v, want the target's answer", o)
	}
}

func TestTimeoutCoversTheLookup(t *testing.T) {
	t.Parallel()
	d := newDeliverer(t)
	hangs := make(chan struct{})
	d.resolver = newResolver(t, func(name string) []netip.Addr {
		if name != "" { // the root is asked whether name servers answer at all
			<-hangs
		}
		return nil
	})
	t.Cleanup(func() { close(hangs) })
	c := newCall("POST", "http://plays.melodia.app/", nil)
	c.Task.Timeout = time.Second
	if o := d.Deliver(t.Context(), c); o.Kind != task.OutcomeRetryable || !o.TimedOut || o.Error != "no answer within 1 s" {
		t.Errorf("outcome = %+v, want a timeout", o)
	}
}

func BenchmarkDeliver(b *testing.B) {
	// The target is raw, so that what is counted is the deliverer's part.
	address := newRawServer(b, func(conn net.Conn, _ int) {
		buf := make([]byte, 4<<10)
		for {
			if _, err := conn.Read(buf); err != nil {
				return
			}
			if _, err := io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"); err != nil {
				return
			}
		}
	})
	for _, method := range []string{"GET", "POST"} {
		var body []byte
		if method == "POST" {
			body = []byte(`{"play":"4f1c","listener":17}`)
		}
		b.Run(method, func(b *testing.B) {
			d := newDeliverer(b)
			c := newCall(method, "http://"+address+"/hook", body)
			c.Task.ContentType = "application/json"
			c.Task.Headers = map[string]string{"Authorization": "Bearer x", "X-Request-Id": "1"}
			b.ReportAllocs()
			for b.Loop() {
				if o := d.Deliver(b.Context(), c); o.Kind != task.OutcomeSucceeded {
					b.Fatalf("outcome = %+v, want success", o)
				}
			}
		})
	}
}
