package deliver

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/melodia/orchestrator/internal/task"
)

// readHello takes the first record of a TLS connection.
func readHello(conn net.Conn) {
	head := make([]byte, 5)
	if _, err := io.ReadFull(conn, head); err == nil {
		io.CopyN(io.Discard, conn, int64(binary.BigEndian.Uint16(head[3:])))
	}
}

const handshakeFailure = "the target refused the TLS handshake (TLS alert handshake failure): it may have no cipher in common with the service, require a client certificate, or not know the host name"

// TestTLSRefusals has targets, each with a TLS server of its own, that refuse us.
func TestTLSRefusals(t *testing.T) {
	t.Parallel()
	certificate := newCertificate(t, time.Now().Add(time.Hour))
	d := newDeliverer(t)
	_, trusting := newTLSServer(t, answer(200, ""))
	d.tlsConfig.RootCAs = trusting.tlsConfig.RootCAs
	d.tlsConfig.RootCAs.AddCert(certificate.Leaf)

	tests := []struct {
		name   string
		config *tls.Config
		want   string
	}{
		{"client certificate, TLS 1.3", &tls.Config{ClientAuth: tls.RequireAnyClientCert, MinVersion: tls.VersionTLS13}, noCertificate},
		{"client certificate, TLS 1.2", &tls.Config{ClientAuth: tls.RequireAnyClientCert, MaxVersion: tls.VersionTLS12}, handshakeFailure}, // as OpenSSL does
		{"another protocol", &tls.Config{NextProtos: []string{"imap"}}, "the target refused to speak HTTP/1.1 (TLS alert no application protocol): only HTTP/1.1 is spoken here, so the target must offer it"},
		{"TLS 1.1", &tls.Config{MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11}, tlsVersions},
		{"another cipher", &tls.Config{MaxVersion: tls.VersionTLS12, CipherSuites: []uint16{tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256}}, handshakeFailure},
		{"an error of its own", &tls.Config{GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return nil, errors.New("query-s3cret") }}, "the target refused the TLS handshake for an error of its own (TLS alert internal error)"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			tt.config.Certificates = []tls.Certificate{certificate}
			address := newRawServer(t, func(conn net.Conn, _ int) {
				target := tls.Server(conn, tt.config)
				if target.Handshake() == nil {
					io.Copy(io.Discard, target)
					return
				}
				// What is unread when the connection is closed would reset it, and the alert be lost.
				conn.(*net.TCPConn).CloseWrite()
				io.Copy(io.Discard, conn)
			})
			wantFailure(t, d, "https://"+address, tt.want)
		})
	}
}

// TestTLSAlerts has a target that answers with each alert there may be.
func TestTLSAlerts(t *testing.T) {
	t.Parallel()
	known := map[byte]string{
		40:  handshakeFailure,
		42:  noCertificate,
		49:  "the target refused the TLS connection (TLS alert access denied): it does not let the service in",
		70:  tlsVersions,
		71:  "the target refused the TLS handshake for the ciphers that are offered (TLS alert insufficient security)",
		80:  "the target refused the TLS handshake for an error of its own (TLS alert internal error)",
		112: "the target does not know the host name of the url (TLS alert unrecognized name)",
		116: noCertificate,
		120: "the target refused to speak HTTP/1.1 (TLS alert no application protocol): only HTTP/1.1 is spoken here, so the target must offer it",
	}
	d := newDeliverer(t)
	for alert := range 256 {
		if alert == 0 {
			continue // close notify
		}
		address := newRawServer(t, func(conn net.Conn, _ int) {
			readHello(conn)
			conn.Write([]byte{21, 3, 3, 0, 2, 2, byte(alert)}) // RFC 8446 §5.1, §6
		})
		want := known[byte(alert)]
		if want == "" {
			want = "the target refused the TLS connection with an alert"
		}
		wantFailure(t, d, "https://"+address, want)
	}
}

// TestTLSAnswersThatWereNotOffered has targets that choose what was not offered to them.
func TestTLSAnswersThatWereNotOffered(t *testing.T) {
	t.Parallel()
	hello := func(version uint16, extensions ...byte) string {
		b := binary.BigEndian.AppendUint16(nil, version)
		b = append(b, make([]byte, 32)...)              // random
		b = append(b, 0, 0xc0, 0x2b, 0)                 // no session, ECDHE-ECDSA-AES128-GCM-SHA256, no compression
		b = append(b, 0, byte(len(extensions)))         // their length
		b = append(b, extensions...)                    //
		b = append([]byte{2, 0, 0, byte(len(b))}, b...) // ServerHello (RFC 5246 §7.4.1.3)
		return string(append([]byte{22, 3, 3, 0, byte(len(b))}, b...))
	}
	d := newDeliverer(t)
	for _, tt := range []struct{ name, hello, want string }{
		{"SSL 3.0", hello(0x0300), tlsVersions},
		{"TLS 1.1", hello(0x0302), tlsVersions},
		{"ALPN", hello(0x0303, 0, 16, 0, 5, 0, 3, 2, 'h', '2'), "the target insists on another protocol than HTTP/1.1 (ALPN): only HTTP/1.1 is spoken here, so the target must offer it"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			address := newRawServer(t, func(conn net.Conn, _ int) {
				readHello(conn)
				io.WriteString(conn, tt.hello)
				io.Copy(io.Discard, conn)
			})
			wantFailure(t, d, "https://"+address, tt.want)
		})
	}
}

// TestAnswersThatAreNotUnderstood has what net/http refuses to read, with what a target may quote.
func TestAnswersThatAreNotUnderstood(t *testing.T) {
	t.Parallel()
	const (
		ok       = "HTTP/1.1 200 OK\r\n"
		length   = "the answer has a Content-Length that is no number of bytes"
		transfer = "the answer has a Transfer-Encoding that is not supported: HTTP/1.1 targets may send chunked, or none"
	)
	d := newDeliverer(t)
	for _, tt := range []struct{ name, answer, want string }{
		{"negative length", ok + "Content-Length: -1\r\n\r\nok", length},
		{"signed length", ok + "Content-Length: +2\r\n\r\nok", length},
		{"a word for a length", ok + "Content-Length: query-s3cret\r\n\r\nok", length},
		{"a length beyond an int64", ok + "Content-Length: 99999999999999999999\r\n\r\nok", length},
		{"two lengths", ok + "Content-Length: 2\r\nContent-Length: 3\r\n\r\nok", "the answer has several Content-Length headers that differ"},
		{"identity", ok + "Transfer-Encoding: identity\r\nContent-Length: 2\r\n\r\nok", transfer},
		{"gzip, chunked", ok + "Transfer-Encoding: gzip, chunked\r\n\r\nquery-s3cret", transfer},
		{"two encodings", ok + "Transfer-Encoding: chunked\r\nTransfer-Encoding: query-s3cret\r\n\r\n", transfer},
		{"a header without a colon", ok + "query-s3cret\r\n\r\n", "the answer has a header line that is not valid HTTP"},
		{"HTTP/2", "\x00\x00\x12\x04\x00\x00\x00\x00\x00query-s3cret\r\n\r\n", "the target seems to speak HTTP/2 on this port: only HTTP/1.1 is spoken here, so the target must offer it"},
		{"TLS", "\x15\x03\x01\x00\x02\x02\x46\r\n\r\n", "the target speaks TLS on this port: its url must begin with https://"},
		{"one that quotes another", "bad Content-Length query-s3cret\r\n\r\n", "the answer is not valid HTTP"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			address := newRawServer(t, func(conn net.Conn, _ int) { says(tt.answer)(conn) })
			wantFailure(t, d, "http://"+address, tt.want)
		})
	}
}

func wantFailure(t *testing.T, d *Deliverer, url, want string) {
	t.Helper()
	c := newCall("POST", url, nil)
	plant(&c)
	o := d.Deliver(t.Context(), c)
	wantCleanError(t, o)
	if o.Kind != task.OutcomeRetryable || o.Error != want || o.Shortage != "" {
		t.Errorf("outcome = %s, %q, shortage %q\nwant retryable, %q", o.Kind, o.Error, o.Shortage, want)
	}
}

// FuzzDescribe has any answer of a target, and looks whether what is said of it is one of the
// sentences that are known: then nothing of the target's is in it.
func FuzzDescribe(f *testing.F) {
	for _, s := range []string{
		"", "HTTP/1.1 200 OK\r\n", "HTTP/1.1 200 OK\r\nContent-Length: s3cret\r\n\r\n", "HTTP/1.1 s3cret\r\n\r\n", "s3cret\r\n\r\n",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: s3cret\r\n\r\n", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\ns3cret\r\n",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\ns3cret\r\n\r\n", "HTTP/1.1 200 OK\r\ns3cret\r\n\r\n", "\x00\x00\x12\x04s3cret\r\n",
		"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: s3cret\r\n\r\n", "HTTP/s3cret 200 OK\r\n\r\n",
	} {
		f.Add([]byte(s))
	}
	sentences := []string{
		"the answer has a Content-Length that is no number of bytes",
		"the answer has several Content-Length headers that differ",
		"the answer has a Transfer-Encoding that is not supported: HTTP/1.1 targets may send chunked, or none",
		"the answer has a header line that is not valid HTTP",
		"the target seems to speak HTTP/2 on this port: " + onlyHTTP1,
		"the target speaks TLS on this port: its url must begin with https://",
		"the chunked body of the answer is malformed",
		"the answer is not valid HTTP",
		"the target closed the connection before its answer was complete",
		"the connection failed before the answer was complete",
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		resp, err := http.ReadResponse(bufio.NewReader(bytes.NewReader(b)), nil)
		if err == nil {
			_, err = io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
		}
		if err == nil {
			return
		}
		if got := describe(err); !slices.Contains(sentences, got) {
			t.Errorf("describe of %q = %q, want a sentence that is known", err, got)
		}
	})
}

func TestDescribeLookup(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		err  net.DNSError
		want string
	}{
		{net.DNSError{IsNotFound: true}, "was not found"},
		{net.DNSError{IsTimeout: true, Err: "i/o timeout"}, "could not be looked up: its name servers did not answer in time"},
		{net.DNSError{IsTemporary: true, Err: "server misbehaving"}, "could not be looked up: its name servers answered with an error"},
		{net.DNSError{IsTemporary: true, Err: "read udp 127.0.0.1:1->127.0.0.1:53: connection refused"}, "could not be looked up"},
	} {
		tt.err.Name = "plays\x00" + strings.Repeat("x", 300)
		got := describe(fmt.Errorf("dial: %w", &net.OpError{Op: "dial", Err: &tt.err}))
		if !strings.HasPrefix(got, "the name plays\uFFFDxxx") || !strings.HasSuffix(got, "… "+tt.want) || len(got) > 300 {
			t.Errorf("describe = %q, want the name, cut, and %q", got, tt.want)
		}
	}
}
