package deliver

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"fmt"
	"io"
	"log"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/melodia/orchestrator/internal/deliver/http1"
	"github.com/melodia/orchestrator/internal/target"
	"github.com/melodia/orchestrator/internal/task"
)

func TestMain(m *testing.M) {
	log.SetOutput(io.Discard) // net/http prints there what a target sends out of turn; so does main
	goleak.VerifyTestMain(m)
}

// patience is how long a test waits for what must come; no test depends on its size.
const patience = time.Minute

// policy allows these hosts, or all where there are none, and opens these networks.
func policy(t testing.TB, hosts []string, networks ...string) *target.Policy {
	t.Helper()
	var prefixes []netip.Prefix
	for _, n := range networks {
		prefixes = append(prefixes, netip.MustParsePrefix(n))
	}
	p, err := target.NewPolicy(hosts, prefixes, false)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

const answerOK = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nright"

// newDeliverer makes a deliverer that may call loopback addresses.
func newDeliverer(t testing.TB, networks ...string) *Deliverer {
	t.Helper()
	d := New(Options{Policy: policy(t, nil, append(networks, "127.0.0.0/8")...), Version: "1.2.3", Concurrency: 10})
	t.Cleanup(d.Close)
	return d
}

func newCall(method, url string, body []byte) task.Call {
	return task.Call{
		Attempt: 3,
		Task: &task.Task{
			ID:    task.ID{0x01, 0x93, 0xf0, 15: 0x2a},
			RunAt: time.Date(2026, 12, 24, 18, 0, 0, 1500, time.FixedZone("ART", -3*3600)),
			Spec: task.Spec{
				URL:     url,
				Method:  method,
				Body:    body,
				Timeout: patience,
				Retry:   task.RetryPolicy{MaxAttempts: 7},
			},
		},
	}
}

// newServer serves handler on loopback, quietly.
func newServer(t testing.TB, handler http.HandlerFunc) *httptest.Server {
	s := httptest.NewUnstartedServer(handler)
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.Start()
	t.Cleanup(s.Close)
	return s
}

// newPiped makes a deliverer whose connections are pipes to serve, which closes its end
// when it returns. In a synctest bubble time then passes only where a call waits for it.
func newPiped(t testing.TB, serve func(net.Conn)) *Deliverer {
	t.Helper()
	d := newDeliverer(t)
	var serving sync.WaitGroup
	d.pool = http1.NewPool(http1.Options{TLS: d.tlsConfig, Dial: func(context.Context, string, string) (net.Conn, error) {
		ours, theirs := net.Pipe()
		serving.Go(func() {
			defer theirs.Close()
			serve(theirs)
		})
		return ours, nil
	}})
	t.Cleanup(func() {
		d.pool.Close()
		serving.Wait()
	})
	return d
}

// newRawServer hands each connection to serve, one after the other or at once,
// and closes it when serve returns. n counts the connections from 1. The
// test's end closes them all and waits for serve.
func newRawServer(t testing.TB, serve func(conn net.Conn, n int)) (address string) {
	t.Helper()
	listener, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	var conns []net.Conn
	over := false
	wg.Go(func() {
		for n := 1; ; n++ {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			conns = append(conns, conn)
			if over {
				conn.Close()
			}
			mu.Unlock()
			wg.Go(func() {
				defer conn.Close()
				serve(conn, n)
			})
		}
	})
	t.Cleanup(func() {
		listener.Close()
		mu.Lock()
		over = true
		for _, conn := range conns {
			conn.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
	return listener.Addr().String()
}

// readRequest takes one whole request off the connection.
func readRequest(r *bufio.Reader) error {
	req, err := http.ReadRequest(r)
	if err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, req.Body)
	return err
}

// hang returns when the peer has closed the connection.
func hang(conn net.Conn) { io.Copy(io.Discard, conn) }

// newResolver answers every question out of lookup; nil is "no such name".
func newResolver(t testing.TB, lookup func(name string) []netip.Addr) *net.Resolver {
	var wg sync.WaitGroup
	var mu sync.Mutex
	over := false // a lookup may outlast its call, and dial again
	t.Cleanup(func() {
		mu.Lock()
		over = true
		mu.Unlock()
		wg.Wait()
	})
	return &net.Resolver{
		PreferGo: true,
		Dial: func(context.Context, string, string) (net.Conn, error) {
			mu.Lock()
			defer mu.Unlock()
			if over {
				return nil, net.ErrClosed
			}
			client, server := net.Pipe()
			wg.Go(func() {
				defer server.Close()
				serveDNS(server, lookup)
			})
			return client, nil
		},
	}
}

// serveDNS speaks as much of RFC 1035 as the resolver needs, in its TCP form.
func serveDNS(conn net.Conn, lookup func(name string) []netip.Addr) {
	for {
		var size uint16
		if binary.Read(conn, binary.BigEndian, &size) != nil {
			return
		}
		query := make([]byte, size)
		if _, err := io.ReadFull(conn, query); err != nil {
			return
		}
		var labels []string
		end := 12
		for query[end] != 0 {
			n := int(query[end])
			labels = append(labels, string(query[end+1:end+1+n]))
			end += 1 + n
		}
		end += 5
		qtype := binary.BigEndian.Uint16(query[end-4:])
		addrs := lookup(strings.ToLower(strings.Join(labels, ".")))

		var answers []byte
		count := 0
		for _, a := range addrs {
			if data := a.AsSlice(); qtype == 1 && a.Is4() || qtype == 28 && a.Is6() {
				answers = append(answers, 0xc0, 12, 0, byte(qtype), 0, 1, 0, 0, 0, 0, 0, byte(len(data)))
				answers = append(answers, data...)
				count++
			}
		}
		flags := byte(0x80)
		if addrs == nil {
			flags |= 3 // NXDOMAIN
		}
		reply := append([]byte{query[0], query[1], 0x81, flags, 0, 1, 0, byte(count), 0, 0, 0, 0}, query[12:end]...)
		reply = append(reply, answers...)
		reply = append(binary.BigEndian.AppendUint16(nil, uint16(len(reply))), reply...)
		if _, err := conn.Write(reply); err != nil {
			return
		}
	}
}

func always(addrs ...string) func(string) []netip.Addr {
	var parsed []netip.Addr
	for _, a := range addrs {
		parsed = append(parsed, netip.MustParseAddr(a))
	}
	return func(string) []netip.Addr { return parsed }
}

// named is the URL of a server on loopback under a name.
func named(name, address string) string {
	_, port, _ := net.SplitHostPort(address)
	return "http://" + name + ":" + port + "/hook?token=s3cret"
}

func TestRequestIsSentAsAsked(t *testing.T) {
	t.Parallel()
	type request struct {
		Method, URI, Body string
		Length            int64
		Chunked           bool
		Header            http.Header
	}
	own := http.Header{
		"User-Agent":                {"orchestrator/1.2.3"},
		"Orchestrator-Task-Id":      {"0193f000-0000-0000-0000-00000000002a"},
		"Orchestrator-Attempt":      {"3"},
		"Orchestrator-Max-Attempts": {"7"},
		"Orchestrator-Hops":         {"1"},
		"Orchestrator-Run-At":       {"2026-12-24T21:00:00.000001Z"},
	}
	with := func(pairs ...string) http.Header {
		h := own.Clone()
		for i := 0; i < len(pairs); i += 2 {
			h[pairs[i]] = []string{pairs[i+1]}
		}
		return h
	}
	tests := []struct {
		name   string
		method string
		body   []byte
		change func(*task.Call)
		want   request
	}{
		{
			"POST with a body", "POST", []byte(`{"a":1}`), func(c *task.Call) { c.Task.ContentType = "application/json" },
			request{Method: "POST", Body: `{"a":1}`, Length: 7, Header: with("Content-Length", "7", "Content-Type", "application/json")},
		},
		{
			"POST without a body", "POST", nil, func(c *task.Call) { c.Task.ContentType = "application/json" },
			request{Method: "POST", Header: with("Content-Length", "0")},
		},
		{
			"POST with an empty body", "POST", []byte{}, func(c *task.Call) { c.Task.ContentType = "text/plain" },
			request{Method: "POST", Header: with("Content-Length", "0", "Content-Type", "text/plain")},
		},
		{"PUT without a body", "PUT", nil, nil, request{Method: "PUT", Header: with("Content-Length", "0")}},
		{"PATCH without a body", "PATCH", nil, nil, request{Method: "PATCH", Header: with("Content-Length", "0")}},
		{"DELETE without a body", "DELETE", nil, nil, request{Method: "DELETE", Header: own}},
		{
			"DELETE with a body", "DELETE", []byte("x"), nil,
			request{Method: "DELETE", Body: "x", Length: 1, Header: with("Content-Length", "1")},
		},
		{"GET", "GET", nil, nil, request{Method: "GET", Header: own}},
		{"HEAD", "HEAD", nil, nil, request{Method: "HEAD", Header: own}},
		{
			"the caller's headers", "POST", []byte("x"),
			func(c *task.Call) {
				c.Task.ContentType = "text/plain"
				c.Task.Headers = map[string]string{
					"x-trace": "a, b", "content-TYPE": "application/xml", "USER-agent": "caller/9", "Idempotency-Key": "k", "Accept-Encoding": "gzip", "X-Empty": "",
				}
			},
			request{Method: "POST", Body: "x", Length: 1, Header: with("Content-Length", "1", "X-Trace", "a, b", "Content-Type", "application/xml",
				"User-Agent", "caller/9", "Idempotency-Key", "k", "Accept-Encoding", "gzip", "X-Empty", "")},
		},
		{
			"through the worker endpoint", "GET", nil, func(c *task.Call) { c.ViaWorkerEndpoint = true },
			request{Method: "GET", Header: with("Orchestrator-Via", "worker-endpoint")},
		},
		{
			"not stored", "GET", nil, func(c *task.Call) { c.Task.RunAt = time.Time{} },
			func() request {
				h := own.Clone()
				h.Del("Orchestrator-Run-At")
				return request{Method: "GET", Header: h}
			}(),
		},
	}
	// A raw server: net/http's would tidy up what came.
	got := make(chan request, 1)
	serve := func(conn net.Conn, _ int) {
		for r := bufio.NewReader(conn); ; {
			var head bytes.Buffer
			req, err := http.ReadRequest(bufio.NewReader(io.TeeReader(r, &head)))
			if err != nil {
				return
			}
			body, _ := io.ReadAll(req.Body)
			seen := request{Method: req.Method, URI: req.RequestURI, Body: string(body), Length: req.ContentLength, Chunked: req.TransferEncoding != nil, Header: req.Header}
			for line := range strings.Lines(head.String()) {
				if value, ok := strings.CutPrefix(line, "Content-Length: "); ok {
					seen.Header.Set("Content-Length", strings.TrimSpace(value))
				}
			}
			got <- seen
			io.WriteString(conn, "HTTP/1.1 204 No Content\r\n\r\n")
		}
	}
	d := newDeliverer(t)
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := newCall(tt.method, "http://"+newRawServer(t, serve)+"/a%2Fb/?x=1&y=%20", tt.body)
			if tt.change != nil {
				tt.change(&c)
			}
			headers := maps.Clone(c.Task.Headers)
			o := d.Deliver(t.Context(), c)
			if o.Kind != task.OutcomeSucceeded {
				t.Fatalf("outcome = %+v, want success", o)
			}
			tt.want.URI = "/a%2Fb/?x=1&y=%20"
			if diff := cmp.Diff(tt.want, <-got); diff != "" {
				t.Errorf("request (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(headers, c.Task.Headers); diff != "" {
				t.Errorf("the task's headers were changed (-before +after):\n%s", diff)
			}
		})
	}
}

func TestOutcomes(t *testing.T) {
	t.Parallel()
	const page = "Grüße"
	tests := []struct {
		name   string
		method string
		answer http.HandlerFunc
		want   task.Outcome
	}{
		{"200", "POST", answer(200, page), task.Outcome{Kind: task.OutcomeSucceeded, StatusCode: 200, ResponseExcerpt: page}},
		{"200 with Retry-After", "POST", answer(200, page, "Retry-After", "9"), task.Outcome{Kind: task.OutcomeSucceeded, StatusCode: 200, ResponseExcerpt: page}},
		{"204", "POST", answer(204, ""), task.Outcome{Kind: task.OutcomeSucceeded, StatusCode: 204}},
		{"HEAD", "HEAD", answer(200, "", "Content-Length", "1000000000"), task.Outcome{Kind: task.OutcomeSucceeded, StatusCode: 200}},
		{"304", "GET", answer(304, ""), task.Outcome{Kind: task.OutcomePermanent, StatusCode: 304, Error: "the target answered 304 Not Modified"}},
		{
			"302", "POST", answer(302, page, "Location", "https://other.example/x?secret#y", "Retry-After", "9"),
			task.Outcome{
				Kind: task.OutcomePermanent, StatusCode: 302, ResponseExcerpt: page,
				Error: "the target answered 302 Found and points to https://other.example/x; redirects are not followed",
			},
		},
		{
			"400", "POST", answer(400, page, "Retry-After", "9"),
			task.Outcome{Kind: task.OutcomePermanent, StatusCode: 400, Error: "the target answered 400 Bad Request", ResponseExcerpt: page, RetryAfter: 9 * time.Second},
		},
		{"401", "POST", answer(401, "", "WWW-Authenticate", "Basic"), task.Outcome{Kind: task.OutcomePermanent, StatusCode: 401, Error: "the target answered 401 Unauthorized"}},
		{"408", "POST", answer(408, ""), task.Outcome{Kind: task.OutcomeRetryable, StatusCode: 408, Error: "the target answered 408 Request Timeout"}},
		{"425", "POST", answer(425, ""), task.Outcome{Kind: task.OutcomeRetryable, StatusCode: 425, Error: "the target answered 425 Too Early"}},
		{
			"429", "POST", answer(429, "", "Retry-After", "Thu, 24 Dec 2020 10:00:10 GMT", "Date", "Thu, 24 Dec 2020 10:00:00 GMT"),
			task.Outcome{Kind: task.OutcomeRetryable, StatusCode: 429, Error: "the target answered 429 Too Many Requests", RetryAfter: 10 * time.Second},
		},
		{"500", "POST", answer(500, page), task.Outcome{Kind: task.OutcomeRetryable, StatusCode: 500, Error: "the target answered 500 Internal Server Error", ResponseExcerpt: page}},
		{
			"503", "POST", answer(503, "", "Retry-After", "99999999"),
			task.Outcome{Kind: task.OutcomeRetryable, StatusCode: 503, Error: "the target answered 503 Service Unavailable", RetryAfter: task.MaxRetryAfter},
		},
		{"999", "POST", answer(999, ""), task.Outcome{Kind: task.OutcomeRetryable, StatusCode: 999, Error: "the target answered 999"}},
	}
	for _, scheme := range []string{"http", "https"} {
		d := newDeliverer(t)
		for _, tt := range tests {
			t.Run(scheme+" "+tt.name, func(t *testing.T) {
				t.Parallel()
				var seen atomic.Value
				handler := func(w http.ResponseWriter, r *http.Request) {
					seen.Store(r.Proto)
					tt.answer(w, r)
				}
				s := newServer(t, handler)
				d := d
				if scheme == "https" {
					s, d = newTLSServer(t, handler)
				}
				got := d.Deliver(t.Context(), newCall(tt.method, s.URL, nil))
				if got.Duration <= 0 {
					t.Errorf("duration = %v, want more than 0", got.Duration)
				}
				got.Duration = 0
				if diff := cmp.Diff(tt.want, got); diff != "" {
					t.Errorf("outcome (-want +got):\n%s", diff)
				}
				if seen.Load() != "HTTP/1.1" { // of what the target offers
					t.Errorf("protocol = %v, want HTTP/1.1", seen.Load())
				}
			})
		}
	}
}

func answer(code int, body string, headers ...string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		for i := 0; i < len(headers); i += 2 {
			w.Header().Set(headers[i], headers[i+1])
		}
		w.WriteHeader(code)
		io.WriteString(w, body)
	}
}

// newTLSServer serves handler over TLS, HTTP/2 too, with a deliverer that trusts it.
func newTLSServer(t testing.TB, handler http.HandlerFunc) (*httptest.Server, *Deliverer) {
	s := httptest.NewUnstartedServer(handler)
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.EnableHTTP2 = true
	s.StartTLS()
	t.Cleanup(s.Close)
	d := newDeliverer(t)
	d.tlsConfig.RootCAs = x509.NewCertPool()
	d.tlsConfig.RootCAs.AddCert(s.Certificate())
	return s, d
}

func TestExcerptOfAnswers(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name string
		body string
		want string
	}{
		{"long", strings.Repeat("x", 50_000), strings.Repeat("x", excerptBytes)},
		{"cut at a rune", "x" + strings.Repeat("🎵", 2000), "x" + strings.Repeat("🎵", excerptBytes/4-1)},
		{"binary", "\x00\xff\x01", "\uFFFD\uFFFD\x01"},
	}
	d := newDeliverer(t)
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s := newServer(t, answer(500, tt.body))
			if got := d.Deliver(t.Context(), newCall("POST", s.URL, nil)).ResponseExcerpt; got != tt.want {
				t.Errorf("excerpt = %q (%d bytes), want %q (%d bytes)", got, len(got), tt.want, len(tt.want))
			}
		})
	}
}

func TestConnectionsAreReused(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name  string
		bytes int
		want  int64
	}{
		{"small answers", 100, 1},
		{"an excerpt and some more", excerptBytes + 1, 1},
		{"as much as is read", excerptBytes + drainBytes - 1, 1},
		{"more than is read", excerptBytes + drainBytes + 1, 20},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			var connections atomic.Int64
			s := httptest.NewUnstartedServer(answer(200, strings.Repeat("x", tt.bytes)))
			s.Config.ConnState = func(_ net.Conn, state http.ConnState) {
				if state == http.StateNew {
					connections.Add(1)
				}
			}
			s.Start()
			t.Cleanup(s.Close)
			d := newDeliverer(t)
			for range 20 {
				if o := d.Deliver(t.Context(), newCall("POST", s.URL, []byte("x"))); o.Kind != task.OutcomeSucceeded {
					t.Fatalf("outcome = %+v, want success", o)
				}
			}
			if got := connections.Load(); got != tt.want {
				t.Errorf("connections for 20 calls = %d, want %d", got, tt.want)
			}
		})
	}
}

// Two waves of as many calls as Concurrency says: the second needs no new connection.
func TestConcurrentCallsKeepTheirConnections(t *testing.T) {
	t.Parallel()
	const calls = 10
	var connections atomic.Int64
	arrived := make(chan struct{})
	release := make(chan struct{})
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		arrived <- struct{}{}
		<-release
	}))
	s.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			connections.Add(1)
		}
	}
	s.Start()
	t.Cleanup(s.Close)
	d := newDeliverer(t)
	for range 2 {
		var wg sync.WaitGroup
		for range calls {
			wg.Go(func() {
				if o := d.Deliver(t.Context(), newCall("POST", s.URL, nil)); o.Kind != task.OutcomeSucceeded {
					t.Errorf("outcome = %+v, want success", o)
				}
			})
		}
		for range calls {
			<-arrived
		}
		for range calls {
			release <- struct{}{}
		}
		wg.Wait()
	}
	if got := connections.Load(); got != calls {
		t.Errorf("connections for two waves of %d calls = %d, want %d", calls, got, calls)
	}
}

func TestConcurrentUse(t *testing.T) {
	t.Parallel()
	s := newServer(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		w.Write(body)
	})
	d := newDeliverer(t)
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			for j := range 25 {
				body := fmt.Sprintf("call %d of %d %s", j, i, strings.Repeat("x", i*300))
				o := d.Deliver(t.Context(), newCall("POST", s.URL, []byte(body)))
				if o.Kind != task.OutcomeSucceeded || o.ResponseExcerpt != body[:min(len(body), excerptBytes)] {
					t.Errorf("call %d of %d: outcome = %+v, want its own body back", j, i, o)
				}
			}
		})
	}
	wg.Wait()
}

// A kept connection that dies: the target takes the second request and closes without an
// answer. Idempotent methods are sent once more, over a new connection; net/http's own
// repeat, which an Idempotency-Key brings about for any method, must not happen.
func TestKeptConnectionThatDies(t *testing.T) {
	t.Parallel()
	large := make([]byte, 64<<10) // http1 writes it in the background
	tests := []struct {
		name, method string
		body         []byte
		key          string
		again        bool
	}{
		{"POST with a body", "POST", []byte("x"), "", false},
		{"POST with a large body", "POST", large, "", false},
		{"POST with a body and a key", "POST", []byte("x"), "Idempotency-Key", false},
		{"POST with a body and an X- key", "POST", []byte("x"), "X-Idempotency-Key", false},
		{"POST with a key", "POST", nil, "Idempotency-Key", false},
		{"POST with an empty body and a key", "POST", []byte{}, "X-Idempotency-Key", false},
		{"PATCH with a key", "PATCH", []byte("x"), "Idempotency-Key", false},
		{"PUT", "PUT", []byte("x"), "", true},
		{"PUT with a large body", "PUT", large, "", true},
		{"DELETE", "DELETE", nil, "", true},
		{"GET", "GET", nil, "", true},
		{"HEAD", "HEAD", nil, "", true},
	}
	certificate := newCertificate(t, time.Now().Add(time.Hour))
	for _, scheme := range []string{"http", "https"} {
		for _, tt := range tests {
			for _, end := range []string{"closed", "reset"} {
				t.Run(scheme+" "+tt.name+" "+end, func(t *testing.T) {
					t.Parallel()
					d := newDeliverer(t)
					var mu sync.Mutex
					var requests []int // the connection of each
					address := newRawServer(t, func(raw net.Conn, n int) {
						conn := raw
						if scheme == "https" {
							conn = tls.Server(conn, &tls.Config{Certificates: []tls.Certificate{certificate}})
							defer conn.Close()
						}
						r := bufio.NewReader(conn)
						for i := 1; readRequest(r) == nil; i++ {
							mu.Lock()
							requests = append(requests, n)
							mu.Unlock()
							if n == 1 && i == 2 {
								if end == "reset" {
									raw.(*net.TCPConn).SetLinger(0)
									raw.Close()
								}
								return
							}
							io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
						}
					})
					d.tlsConfig.InsecureSkipVerify = true
					c := newCall(tt.method, scheme+"://"+address, tt.body)
					if tt.key != "" {
						c.Task.Headers = map[string]string{tt.key: "k"}
					}
					if o := d.Deliver(t.Context(), c); o.Kind != task.OutcomeSucceeded || o.Error != "" {
						t.Fatalf("first outcome = %+v, want success", o)
					}
					o := d.Deliver(t.Context(), c)
					want := []int{1, 1}
					if tt.again {
						want = []int{1, 1, 2}
						if o.Kind != task.OutcomeSucceeded || o.StatusCode != 200 || o.Error != sentTwice {
							t.Errorf("second outcome = %+v, want success that tells of the repeat", o)
						}
					} else if o.Kind != task.OutcomeRetryable || o.TimedOut || o.StatusCode != 0 {
						t.Errorf("second outcome = %+v, want retryable without a status", o)
					}
					mu.Lock()
					defer mu.Unlock()
					if diff := cmp.Diff(want, requests); diff != "" {
						t.Errorf("connections on which requests came (-want +got):\n%s", diff)
					}
				})
			}
		}
	}
}

// A request is sent again only where nothing says that the target saw to it: a first
// connection, a byte of an answer and a timeout all speak against it. And it is sent
// again only once.
func TestWhatIsNotSentAgain(t *testing.T) {
	t.Parallel()
	const quick = 200 * time.Millisecond
	tests := []struct {
		name      string
		kept      bool
		timeout   time.Duration
		serve     func(conn net.Conn) // the call in question
		requests  int64               // of that call
		wantError string
	}{
		{"a new connection", false, patience, func(net.Conn) {}, 1, "the target closed the connection before its answer was complete"},
		{"a byte of the answer", true, patience, func(conn net.Conn) { io.WriteString(conn, "H") }, 1, "the answer is not valid HTTP"},
		{"an interim answer", true, patience, func(conn net.Conn) { io.WriteString(conn, "HTTP/1.1 100 Continue\r\n\r\n") }, 1, "the target closed the connection before its answer was complete"},
		{"a timeout", true, quick, hang, 1, "no answer within 0.2 s"},
		{"twice", true, patience, func(net.Conn) {}, 2, "the target closed the connection before its answer was complete; " + sentTwice},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			var requests atomic.Int64
			var last atomic.Bool
			seen := make(chan struct{}, 10)
			address := newRawServer(t, func(conn net.Conn, _ int) {
				for r := bufio.NewReader(conn); readRequest(r) == nil; {
					if last.Load() {
						requests.Add(1)
						seen <- struct{}{}
						tt.serve(conn)
						return
					}
					io.WriteString(conn, answerOK)
				}
			})
			d := newDeliverer(t)
			c := newCall("GET", "http://"+address, nil)
			if tt.kept {
				if o := d.Deliver(t.Context(), c); o.Kind != task.OutcomeSucceeded {
					t.Fatalf("first outcome = %+v, want success", o)
				}
			}
			last.Store(true)
			c.Task.Timeout = tt.timeout
			o := d.Deliver(t.Context(), c)
			if o.Kind != task.OutcomeRetryable || o.Error != tt.wantError || o.TimedOut != (tt.timeout == quick) {
				t.Errorf("outcome = %+v, want retryable with %q", o, tt.wantError)
			}
			for range tt.requests {
				<-seen // the timeout may come before the target has read
			}
			if got := requests.Load(); got != tt.requests {
				t.Errorf("%d requests, want %d", got, tt.requests)
			}
		})
	}
}

// A call whose context has ended before is not sent, even where a connection is kept.
func TestEndedContextSendsNothing(t *testing.T) {
	t.Parallel()
	var seen atomic.Int64
	s := newServer(t, func(http.ResponseWriter, *http.Request) { seen.Add(1) })
	d := newDeliverer(t)
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	for range 50 {
		d.Deliver(t.Context(), newCall("POST", s.URL, []byte("x"))) // leaves an idle connection
		if o := d.Deliver(ended, newCall("POST", s.URL, []byte("x"))); o.Kind != task.OutcomeInterrupted {
			t.Errorf("the outcome is %s, want interrupted", o.Kind)
		}
	}
	s.Close() // waits for what the target still answers
	if got := seen.Load() - 50; got != 0 {
		t.Errorf("the target saw %d of 50 calls whose context had ended before", got)
	}
}

func TestCancellationInterrupts(t *testing.T) {
	t.Parallel()
	hanging := func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() }
	t.Run("from the start", func(t *testing.T) {
		t.Parallel()
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		s := newServer(t, func(http.ResponseWriter, *http.Request) { t.Error("the target was called") })
		wantInterrupted(t, newDeliverer(t).Deliver(ctx, newCall("POST", s.URL, nil)), 0)
	})
	t.Run("before the answer", func(t *testing.T) {
		t.Parallel()
		ctx, cancel := context.WithCancel(t.Context())
		s := newServer(t, func(w http.ResponseWriter, r *http.Request) {
			cancel()
			hanging(w, r)
		})
		wantInterrupted(t, newDeliverer(t).Deliver(ctx, newCall("POST", s.URL, nil)), 0)
	})
	t.Run("by the caller's deadline", func(t *testing.T) {
		t.Parallel()
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		s := newServer(t, hanging)
		wantInterrupted(t, newDeliverer(t).Deliver(ctx, newCall("POST", s.URL, nil)), 0)
	})
	for _, scheme := range []string{"http", "https"} {
		for status, want := range map[int]task.Outcome{
			200: {Kind: task.OutcomeSucceeded, StatusCode: 200, Error: "the answer's body was cut short: the call was called off before it ended"},
			500: {Kind: task.OutcomeInterrupted, StatusCode: 500, Error: "the call was called off before it ended"},
		} {
			t.Run(fmt.Sprintf("within the body of a %d over %s", status, scheme), func(t *testing.T) {
				t.Parallel()
				ctx, cancel := context.WithCancel(t.Context())
				halfway := func(w http.ResponseWriter, r *http.Request) {
					w.WriteHeader(status)
					io.WriteString(w, "half of it")
					w.(http.Flusher).Flush()
					<-r.Context().Done()
				}
				s, d := newTLSServer(t, halfway)
				if scheme == "http" {
					s, d = newServer(t, halfway), newDeliverer(t)
				}
				// The buffer is asked for when the answer's head has come.
				d.excerpts.New = func() any {
					cancel()
					return new([excerptBytes]byte)
				}
				got := d.Deliver(ctx, newCall("POST", s.URL, nil))
				got.Duration, got.ResponseExcerpt = 0, ""
				if diff := cmp.Diff(want, got); diff != "" {
					t.Errorf("outcome (-want +got):\n%s", diff)
				}
			})
		}
	}
}

func wantInterrupted(t *testing.T, o task.Outcome, status int) {
	t.Helper()
	if o.Kind != task.OutcomeInterrupted || o.TimedOut || o.Refused || o.StatusCode != status || o.Error == "" {
		t.Errorf("outcome = %+v, want interrupted with status %d", o, status)
	}
}
