package deliver

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"strings"
	"syscall"

	"github.com/melodia/orchestrator/internal/deliver/http1"
)

// describe says in words of its own why a call failed. The text of err is not used: it
// may quote what the target sent, which may quote what was sent to it.
func describe(err error) string {
	if s := localShortage(err); s != "" {
		return string(s)
	}
	if errors.Is(err, http1.ErrHandshake) {
		return describeTLS(err)
	}
	if alert := http1.RemoteAlert(err); alert != "" { // TLS 1.3 has some behind the handshake
		return describeAlert(alert)
	}
	if dnsErr, ok := errors.AsType[*net.DNSError](err); ok {
		return describeLookup(dnsErr)
	}
	if errors.Is(err, errPassedOver) {
		return "no address that the target policy allows could be reached"
	}
	for _, known := range []struct {
		err  error
		text string
	}{
		{syscall.ECONNREFUSED, "connection refused"},
		{syscall.ECONNRESET, "the target reset the connection"},
		{syscall.EPIPE, "the target reset the connection"},
		{syscall.ETIMEDOUT, "the connection timed out"},
		{syscall.EHOSTUNREACH, "the target's network cannot be reached"},
		{syscall.ENETUNREACH, "the target's network cannot be reached"},
		{syscall.EADDRNOTAVAIL, "the service has no address to connect from to the target's: the machine lacks IPv4 or IPv6, or has no port left"},
		{http1.ErrHeadTooLarge, http1.ErrHeadTooLarge.Error()},
		{errCutRequest, errCutRequest.Error()},
	} {
		if errors.Is(err, known.err) {
			return known.text
		}
	}
	if text := describeAnswer(err.Error()); text != "" {
		return text
	}
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return "the target closed the connection before its answer was complete"
	}
	return "the connection failed before the answer was complete"
}

func describeLookup(err *net.DNSError) string {
	name := "the name " + clip(err.Name)
	switch {
	case err.IsNotFound:
		return name + " was not found"
	case err.IsTimeout:
		return name + " could not be looked up: its name servers did not answer in time"
	case answered(err):
		return name + " could not be looked up: its name servers answered with an error"
	}
	return name + " could not be looked up"
}

const onlyHTTP1 = "only HTTP/1.1 is spoken here, so the target must offer it"

// describeAnswer says what is wrong with an answer that net/http could not read, or "". It has
// no error values for that, but texts that begin with words of its own; what follows them
// may be the target's.
func describeAnswer(text string) string {
	for _, known := range []struct{ prefix, text string }{
		{"bad Content-Length ", "the answer has a Content-Length that is no number of bytes"},
		{"http: message cannot contain multiple Content-Length headers", "the answer has several Content-Length headers that differ"},
		{"unsupported transfer encoding", "the answer has a Transfer-Encoding that is not supported: HTTP/1.1 targets may send chunked, or none"},
		{"too many transfer encodings", "the answer has a Transfer-Encoding that is not supported: HTTP/1.1 targets may send chunked, or none"},
		{"malformed MIME header", "the answer has a header line that is not valid HTTP"},
		// HTTP/2 begins with a frame whose length, in three bytes, is small (RFC 9113 §3.4, §4.1).
		{`malformed HTTP response "\x00\x00`, "the target seems to speak HTTP/2 on this port: " + onlyHTTP1},
		// An alert of TLS (RFC 8446 §5.1).
		{`malformed HTTP response "\x15\x03`, "the target speaks TLS on this port: its url must begin with https://"},
		{"invalid byte in chunk length", "the chunked body of the answer is malformed"},
		{"malformed chunked encoding", "the chunked body of the answer is malformed"},
		{"chunked line ends with bare LF", "the chunked body of the answer is malformed"},
		{"chunked encoding contains too much non-data", "the chunked body of the answer is malformed"},
		{"http chunk length too large", "the chunked body of the answer is malformed"},
		{"header line too long", "the chunked body of the answer is malformed"},
		{"http: suspiciously long trailer after chunked body", "the chunked body of the answer is malformed"},
		{"malformed ", "the answer is not valid HTTP"},
	} {
		if strings.HasPrefix(text, known.prefix) {
			return known.text
		}
	}
	return ""
}

func describeTLS(err error) string {
	if invalid, ok := errors.AsType[x509.CertificateInvalidError](err); ok && invalid.Reason == x509.Expired {
		return "TLS certificate has expired or is not valid yet"
	}
	if _, ok := errors.AsType[x509.UnknownAuthorityError](err); ok {
		return "TLS certificate is signed by an unknown authority"
	}
	if _, ok := errors.AsType[x509.HostnameError](err); ok {
		return "TLS certificate is for another host name"
	}
	if _, ok := errors.AsType[x509.SystemRootsError](err); ok {
		return "TLS certificate cannot be checked: the service has no root certificates (SSL_CERT_FILE)"
	}
	if _, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return "TLS certificate is not valid"
	}
	if _, ok := errors.AsType[tls.RecordHeaderError](err); ok {
		return "the target does not speak TLS on this port"
	}
	if alert := http1.RemoteAlert(err); alert != "" {
		return describeAlert(alert)
	}
	// Package tls has no error values for these. What it quotes stands behind them.
	text := strings.TrimPrefix(err.Error(), http1.ErrHandshake.Error()+": ")
	switch {
	case strings.HasPrefix(text, "tls: server selected unsupported protocol version"):
		return tlsVersions
	case strings.HasPrefix(text, "tls: server selected unadvertised ALPN protocol"):
		return "the target insists on another protocol than HTTP/1.1 (ALPN): " + onlyHTTP1
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return "the target closed the connection during the TLS handshake"
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return "the target reset the connection during the TLS handshake"
	}
	return "the TLS handshake failed"
}

const (
	tlsVersions   = "the target speaks no version of TLS that is spoken here: it must offer 1.2 or 1.3"
	noCertificate = "the target requires a client certificate, and the service has none: let the service in without, or through a proxy that has one"
)

// describeAlert puts a TLS alert into words (RFC 8446 §6.2).
func describeAlert(alert string) string {
	switch alert {
	case "tls: certificate required", "tls: bad certificate": // the latter in TLS 1.2, where the client sent none
		return noCertificate
	case "tls: no application protocol":
		return "the target refused to speak HTTP/1.1 (TLS alert no application protocol): " + onlyHTTP1
	case "tls: protocol version not supported":
		return tlsVersions
	case "tls: unrecognized name":
		return "the target does not know the host name of the url (TLS alert unrecognized name)"
	case "tls: handshake failure":
		return "the target refused the TLS handshake (TLS alert handshake failure): it may have no cipher in common with the service, require a client certificate, or not know the host name"
	case "tls: insufficient security level":
		return "the target refused the TLS handshake for the ciphers that are offered (TLS alert insufficient security)"
	case "tls: internal error":
		return "the target refused the TLS handshake for an error of its own (TLS alert internal error)"
	case "tls: access denied":
		return "the target refused the TLS connection (TLS alert access denied): it does not let the service in"
	}
	return "the target refused the TLS connection with an alert"
}
