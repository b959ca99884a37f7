//go:build faults

package e2e

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/melodia/orchestrator/internal/postgres/pgtest"
)

// Targets that do everything wrong, all of them at once and several times, next
// to a healthy one: each hostile task ends with the right reason and a readable
// error, the healthy ones do not notice, and the process is as before when all
// is over.
func TestHostileTargetsAtOnce(t *testing.T) {
	const (
		// Each hostile target: its calls are too few for its host to count as broken.
		times = 4
		// Some 60 MiB are usual. What a target sends, taken whole, would be gigabytes.
		maxMemory = 256 << 20
		// Connections come and go, and have two goroutines each.
		descriptorMargin, goroutineMargin = 10, 20

		ok        = "HTTP/1.1 200 OK\r\n"
		chunked   = ok + "Transfer-Encoding: chunked\r\n\r\n"
		exhausted = "attempts_exhausted"
		noAnswer  = "no answer within 0.5 s"
		cutShort  = "the answer's body was cut short: no end within 0.5 s"
		brokenOff = "the answer's body was cut short: the chunked body of the answer is malformed"
		tooLarge  = "response headers larger than 64 KiB"
		redirects = "the target answered 302 Found and points to http://127.0.0.1/again; redirects are not followed"
	)
	line := "X-A: " + strings.Repeat("x", 1000) + "\r\n"
	block := strings.Repeat("x", 64<<10)
	expired := newExpiredTarget(t)
	trusted := []*httptest.Server{expired}
	// Each path is a host of its own.
	secure := func(path string) string {
		target := newTLSTarget(t)
		trusted = append(trusted, target)
		return target.URL + path
	}
	hostile := []struct {
		name, url string
		reason    string // "": the task succeeds
		message   string // of each attempt; a success may have one
	}{
		{"hangs before the head", says(t, ""), exhausted, noAnswer},
		{"hangs in the headers", says(t, ok+"X-A: b\r\nX-"), exhausted, noAnswer},
		{"hangs in the body", says(t, ok+"Content-Length: 9\r\n\r\nhalf"), "", cutShort},
		{"reads nothing", newRawTarget(t, func(_ net.Conn, over <-chan struct{}) { <-over }), exhausted, noAnswer},
		{"resets", newRawTarget(t, afterRequest(func(conn net.Conn) { _ = conn.(*net.TCPConn).SetLinger(0) })), exhausted, "the target reset the connection"},
		{"endless body", saysAgain(t, ok+"\r\n", block), "", ""},
		{"1 GB", saysAgain(t, ok+"Content-Length: 1000000000\r\n\r\n", block), "", ""},
		{"gzip bomb", says(t, ok+"Content-Encoding: gzip\r\n\r\n"+gzipBomb(t, 128<<20)), "", ""},
		{"10 MB of headers", says(t, ok+strings.Repeat(line, 10_000)+"\r\n"), exhausted, tooLarge},
		{"endless headers", saysAgain(t, ok, line), exhausted, tooLarge},
		{"one endless header", saysAgain(t, ok+"X-A: ", block), exhausted, tooLarge},
		{"endless 1xx answers", saysAgain(t, "", "HTTP/1.1 103 Early Hints\r\n\r\n"), exhausted, tooLarge},
		{"endless chunk extension", saysAgain(t, chunked+"1;", block), "", brokenOff},
		{"endless trailer", saysAgain(t, chunked+"0\r\n", line), "", brokenOff},
		{"redirect loop", says(t, "HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1/again\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"), "client_error", redirects},
		{"expired certificate", expired.URL, exhausted, "TLS certificate has expired or is not valid yet"},
		{"hangs before the head over TLS", secure("/hang"), exhausted, noAnswer},
		{"hangs in the body over TLS", secure("/half"), "", cutShort},
		{"endless body over TLS", secure("/body"), "", ""},
		{"large headers over TLS", secure("/headers"), exhausted, tooLarge},
		{"endless 1xx answers over TLS", secure("/hints"), exhausted, tooLarge},
	}

	settings := []string{"DATABASE_URL=" + pgtest.URL(t), "SSL_CERT_FILE=" + certificates(t, trusted...), profiled(t), "LOG_LEVEL=info"}
	p := start(t, "serve", settings...)
	descriptorsBefore, goroutinesBefore := p.ready(), p.goroutines()

	target := newTarget(t, func(http.ResponseWriter, *http.Request, int) {})
	var healthy []string
	submitHealthy := func() {
		healthy = append(healthy, p.submit("/enqueue", `{"url":"`+target.url+`/healthy"}`).ID)
	}
	type submitted struct {
		id   string
		kind int
	}
	var waiting []submitted
	for range times {
		for kind, h := range hostile {
			payload, timeout := "small", 50.0
			if h.message == noAnswer || h.message == cutShort {
				timeout = 0.5
			}
			if h.name == "reads nothing" {
				payload = strings.Repeat("x", 900<<10)
			}
			id := p.submit("/enqueue", fmt.Sprintf(`{"url":%q,"payload":%q,"timeout_seconds":%g,
				"retry":{"max_attempts":2,"min_backoff_seconds":0.01,"max_backoff_seconds":0.01}}`, h.url, payload, timeout)).ID
			waiting = append(waiting, submitted{id, kind})
			submitHealthy()
		}
	}
	longest := 0.0
	eventually(t, func() bool {
		submitHealthy() // for as long as there are hostile ones
		for len(waiting) > 0 {
			h := hostile[waiting[0].kind]
			got := p.do(http.MethodGet, "/tasks/"+waiting[0].id, "").task
			if !ended(got) {
				return false
			}
			attempts := map[string]int{"": 1, "client_error": 1, exhausted: 2}[h.reason]
			if or(got.Reason, "") != h.reason || len(got.Attempts) != attempts {
				t.Errorf("%s: %s, want reason %q after %d attempts", h.name, compact(t, got), h.reason, attempts)
			}
			for _, a := range got.Attempts {
				if message := or(a.Error, ""); message != h.message {
					t.Errorf("%s: error %q, want %q", h.name, message, h.message)
				}
				longest = max(longest, a.DurationSeconds)
			}
			waiting = waiting[1:]
		}
		return true
	}, func() string { return hostile[waiting[0].kind].name + ": the task does not end" })
	// Each hangs for 0.5 s, or is cut off for what it sends: nothing else takes time.
	if longest > (patience / 2).Seconds() {
		t.Errorf("the longest attempt took %.1f s, want hardly more than 0.5 s", longest)
	}

	slowest := time.Duration(0)
	for _, id := range healthy {
		got := p.await(id, ended)
		if got.State != "succeeded" || len(got.Attempts) != 1 {
			t.Errorf("a healthy task ended as %s", compact(t, got))
			continue
		}
		slowest = max(slowest, got.FinishedAt.Sub(got.CreatedAt))
	}
	if calls := len(target.got("/healthy")); calls != len(healthy) || calls == 0 {
		t.Errorf("the healthy target got %d calls for %d tasks", calls, len(healthy))
	}
	if slowest > patience/2 {
		t.Errorf("a healthy task took %v among hostile ones", slowest)
	}

	memory := p.memory("VmHWM")
	if memory > withinReason(maxMemory) {
		t.Errorf("the process took %d MiB at its worst, want at most %d", memory>>20, maxMemory>>20)
	}
	http.DefaultClient.CloseIdleConnections()
	p.wantDescriptors(descriptorsBefore + descriptorMargin)
	p.wantGoroutines(goroutinesBefore, goroutineMargin)
	t.Logf("hostile tasks %d, longest attempt %.2f s; healthy tasks %d, slowest %.2f s; memory %d MiB at its worst; descriptors %d before, %d after; goroutines %d, %d",
		len(hostile)*times, longest, len(healthy), slowest.Seconds(), memory>>20, descriptorsBefore, p.descriptors(), goroutinesBefore, p.goroutines())
}

// newRawTarget hands each connection to serve and closes it when serve returns.
// over is closed when the test ends.
func newRawTarget(t *testing.T, serve func(conn net.Conn, over <-chan struct{})) (url string) {
	t.Helper()
	listener, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	over := make(chan struct{})
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			_ = conn.(*net.TCPConn).SetReadBuffer(4 << 10)
			serving.Go(func() {
				served := make(chan struct{})
				go func() {
					select {
					case <-over:
					case <-served:
					}
					_ = conn.Close()
				}()
				serve(conn, over)
				close(served)
			})
		}
	})
	t.Cleanup(func() {
		_ = listener.Close()
		close(over)
		serving.Wait()
	})
	return "http://" + listener.Addr().String() + "/hostile"
}

// afterRequest takes a request and goes on with serve.
func afterRequest(serve func(net.Conn)) func(net.Conn, <-chan struct{}) {
	return func(conn net.Conn, _ <-chan struct{}) {
		request, err := http.ReadRequest(bufio.NewReader(conn))
		if err != nil {
			return
		}
		_, _ = io.Copy(io.Discard, request.Body)
		serve(conn)
	}
}

// says answers with text and keeps the connection open.
func says(t *testing.T, text string) (url string) {
	return newRawTarget(t, afterRequest(func(conn net.Conn) {
		_, _ = io.WriteString(conn, text)
		_, _ = io.Copy(io.Discard, conn)
	}))
}

// saysAgain answers with head, and then with text for as long as it is taken.
func saysAgain(t *testing.T, head, text string) (url string) {
	return newRawTarget(t, afterRequest(func(conn net.Conn) {
		for _, err := io.WriteString(conn, head); err == nil; {
			_, err = io.WriteString(conn, text)
		}
	}))
}

// gzipBomb is size zeros in little space.
func gzipBomb(t *testing.T, size int) string {
	t.Helper()
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	for block := make([]byte, 1<<20); size > 0; size -= len(block) {
		if _, err := w.Write(block); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func newTLSTarget(t *testing.T) *httptest.Server {
	t.Helper()
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body) // before that the end of the connection is not noticed
		switch r.URL.Path {
		case "/hang":
			<-r.Context().Done()
		case "/half":
			_, _ = io.WriteString(w, "half")
			_ = http.NewResponseController(w).Flush()
			<-r.Context().Done()
		case "/body":
			for block := make([]byte, 64<<10); r.Context().Err() == nil; {
				_, _ = w.Write(block)
			}
		case "/headers":
			for i := range 65 {
				w.Header().Set("X-"+strconv.Itoa(i), strings.Repeat("x", 1000))
			}
		case "/hints":
			w.Header().Set("Link", "</a>")
			for r.Context().Err() == nil {
				w.WriteHeader(http.StatusEarlyHints)
			}
		}
	}))
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.EnableHTTP2 = true
	s.StartTLS()
	t.Cleanup(s.Close)
	return s
}

func newExpiredTarget(t *testing.T) *httptest.Server {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		NotBefore:             time.Now().Add(-48 * time.Hour),
		NotAfter:              time.Now().Add(-time.Hour),
		IsCA:                  true,
		BasicConstraintsValid: true,
		IPAddresses:           []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("a target with an expired certificate was called") }))
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.TLS = &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}
	s.StartTLS()
	t.Cleanup(s.Close)
	return s
}

// certificates is a file of the certificates that the process trusts.
func certificates(t *testing.T, servers ...*httptest.Server) (path string) {
	t.Helper()
	var b bytes.Buffer
	for _, s := range servers {
		if err := pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}); err != nil {
			t.Fatal(err)
		}
	}
	path = filepath.Join(t.TempDir(), "certificates.pem")
	if err := os.WriteFile(path, b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// memory is a line of /proc/<pid>/status in bytes: VmRSS now, VmHWM at its worst.
func (p *process) memory(name string) int {
	p.t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		p.t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(status), name+":")
	fields := strings.Fields(rest)
	kib, err := strconv.Atoi(fields[0])
	if err != nil {
		p.t.Fatal(err)
	}
	return kib << 10
}

// withinReason is a bound on the memory of a process: the race detector takes
// five to ten times as much.
func withinReason(bytes int) int {
	if strings.Contains(os.Getenv("GOFLAGS"), "-race") {
		return 5 * bytes
	}
	return bytes
}

// profiled has a process count its goroutines.
func profiled(t *testing.T) (setting string) {
	t.Helper()
	return fmt.Sprint("DEBUG_PORT=", freePort(t))
}

// goroutines counts those of a profiled process.
func (p *process) goroutines() (count int) {
	p.t.Helper()
	for _, line := range p.lines() {
		var entry struct{ Msg, URL string }
		if json.Unmarshal([]byte(line), &entry) != nil || entry.Msg != "serving profiles" {
			continue
		}
		response, err := http.Get(entry.URL + "goroutine?debug=1")
		if err != nil {
			p.t.Fatal(err)
		}
		defer func() { _ = response.Body.Close() }()
		if _, err := fmt.Fscanf(response.Body, "goroutine profile: total %d", &count); err != nil {
			p.t.Fatal(err)
		}
		return count
	}
	p.t.Fatal("the process serves no profiles")
	return 0
}

// wantGoroutines waits until the process has no more goroutines than before,
// and some that come and go.
func (p *process) wantGoroutines(before, margin int) {
	p.t.Helper()
	eventually(p.t, func() bool { return p.goroutines() <= before+margin }, func() string {
		return fmt.Sprintf("%d goroutines are left, before there were %d", p.goroutines(), before)
	})
}
