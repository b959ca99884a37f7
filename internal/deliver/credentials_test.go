package deliver

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/melodia/orchestrator/internal/credentials"
	"github.com/melodia/orchestrator/internal/task"
)

// listed is the one host that may be sent a token and the secret "billing". It
// is what httptest's certificate is for.
const listed = "example.com"

// planted is the secret "billing", odd and short are two more.
const (
	planted = "pl4nt3d-s3cr3t"
	odd     = `s3cr3t "q" <&> \ é %`
	short   = "~"
)

// newSecrets has the secrets billing, odd and short for these hosts.
func newSecrets(t testing.TB, hosts ...string) *credentials.Secrets {
	t.Helper()
	dir := t.TempDir()
	var entries []string
	for name, content := range map[string]string{"billing": planted + "\n", "odd": odd, "short": short} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		for _, host := range hosts {
			entries = append(entries, name+"="+host)
		}
	}
	s, err := credentials.NewSecrets(dir, entries)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// newArmed makes a deliverer with everything on: the whole loopback network is
// open, and each name stands for a loopback address.
func newArmed(t *testing.T, roots ...*x509.Certificate) *Deliverer {
	t.Helper()
	newMetadata(t)
	o := Options{Policy: policy(t, nil, "127.0.0.0/8", "::1/128"), Concurrency: 10}
	var err error
	if o.Credentials.Identity, err = credentials.NewIdentity([]string{listed, "." + listed}); err != nil {
		t.Fatal(err)
	}
	o.Credentials.Secrets = newSecrets(t, listed, "."+listed)
	o.Credentials.Signer = newSigner(t, signingSecret(1, 24))
	d := New(o)
	t.Cleanup(d.Close)
	d.resolver = newResolver(t, always("127.0.0.1"))
	d.tlsConfig.RootCAs = x509.NewCertPool()
	for _, root := range roots {
		d.tlsConfig.RootCAs.AddCert(root)
	}
	return d
}

// armed are calls to url that carry the token, the secret, and both.
func armed(url string) map[string]task.Call {
	token := identified(url, "https://"+listed, 1, 0)
	secret := newCall("POST", url, []byte("x"))
	secret.Task.Headers = map[string]string{"Authorization": "Bearer ${secret:billing}", "X-Other": "x"}
	both := identified(url, "https://"+listed, 1, 0)
	both.Task.Headers = map[string]string{"X-Other": "a ${secret:billing}"}
	return map[string]task.Call{"token": token, "secret": secret, "both": both}
}

// newEvil is a server that may be sent nothing: neither a token nor a secret.
// It listens with and without TLS on one port, under a certificate of its own.
func newEvil(t *testing.T) (port string, certificate *x509.Certificate) {
	t.Helper()
	c := newCertificate(t, time.Now().Add(time.Hour))
	address := newRawServer(t, func(conn net.Conn, _ int) {
		var seen strings.Builder
		buf := make([]byte, 64<<10)
		n, _ := conn.Read(buf)
		seen.Write(buf[:n])
		if n > 0 && buf[0] == 0x16 { // a TLS handshake
			tlsConn := tls.Server(&replayed{conn, strings.NewReader(seen.String())}, &tls.Config{Certificates: []tls.Certificate{c}})
			seen.Reset()
			n, _ = tlsConn.Read(buf)
			seen.Write(buf[:n])
			io.WriteString(tlsConn, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
		} else {
			io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
		}
		if strings.Contains(seen.String(), planted) || strings.Contains(seen.String(), "s1gn4tur3") {
			t.Errorf("it got out:\n%s", seen.String())
		}
	})
	_, port, _ = net.SplitHostPort(address)
	return port, c.Leaf
}

// replayed is a connection whose first bytes were read before.
type replayed struct {
	net.Conn
	first *strings.Reader
}

func (r *replayed) Read(b []byte) (int, error) {
	if r.first.Len() > 0 {
		return r.first.Read(b)
	}
	return r.Conn.Read(b)
}

// Tokens and secrets reach the hosts that are listed for them, and no other host
// however a URL is written: not at submission, and not where a task is older
// than the settings.
func TestCredentialsReachNoOtherHost(t *testing.T) {
	evil, evilCertificate := newEvil(t)
	d := newArmed(t, evilCertificate)
	for _, tt := range []struct{ name, url string }{
		{"another host", "https://evil.test:PORT/"},
		{"its IP address", "https://127.0.0.1:PORT/"},
		{"its mapped IP address", "https://[::ffff:127.0.0.1]:PORT/"},
		{"its IP address without TLS", "http://127.0.0.1:PORT/"},
		{"an IP address with a dot", "https://127.0.0.1.:PORT/"},
		{"an IP address in one number", "https://2130706433:PORT/"},
		{"the host without TLS", "http://" + listed + ":PORT/"},
		{"the host without TLS in capitals", "HTTP://EXAMPLE.COM:PORT/"},
		{"the host before an @", "https://" + listed + "@evil.test:PORT/"},
		{"the host and its port before an @", "https://" + listed + ":443@evil.test:PORT/"},
		{"the host as a password", "https://a:" + listed + "@127.0.0.1:PORT/"},
		{"the host as a prefix", "https://" + listed + ".evil.test:PORT/"},
		{"the host as a suffix without a dot", "https://evil" + listed + ":PORT/"},
		{"the host with two dots", "https://" + listed + "..:PORT/"},
		{"the host behind a slash", "https://evil.test:PORT/." + listed},
		{"the host behind a backslash", `https://evil.test:PORT\.` + listed},
		{"the host behind an encoded slash", "https://evil.test%2f." + listed + ":PORT/"},
		{"the host behind NUL", "https://evil.test%00." + listed + ":PORT/"},
		{"the host in the query", "https://evil.test:PORT?." + listed},
		{"the host in the fragment", "https://evil.test:PORT#." + listed},
		{"a port that is a host", "https://evil.test:PORT." + listed + "/"},
		{"a zone that is a host", "https://[::1%25." + listed + "]:PORT/"},
		{"localhost", "http://localhost:PORT/"},
		{"a name that looks alike", "https://ехample.com:PORT/"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			rawURL := strings.ReplaceAll(tt.url, "PORT", evil)
			if err := d.credentials.Identity.CheckURL(rawURL); err == nil {
				t.Error("an ID token is allowed")
			}
			if err := d.credentials.Secrets.Check("billing", rawURL); err == nil {
				t.Error("the secret is allowed")
			}
			for name, c := range armed(rawURL) {
				o := d.Deliver(t.Context(), c)
				if o.Kind != task.OutcomePermanent || !o.Refused || o.StatusCode != 0 {
					t.Errorf("%s: outcome = %+v, want refused", name, o)
				}
				wantCleanError(t, o)
			}
		})
	}
	// The server would have noticed: without credentials it is called.
	if o := d.Deliver(t.Context(), newCall("POST", "https://127.0.0.1:"+evil+"/", []byte("x"))); o.Kind != task.OutcomeSucceeded {
		t.Errorf("outcome without credentials = %+v, want success", o)
	}
	// Nor does the metadata server take calls of tasks, whatever its address.
	for _, rawURL := range []string{"http://169.254.169.254/computeMetadata/v1/", "http://metadata.google.internal/computeMetadata/v1/"} {
		if o := d.Deliver(t.Context(), newCall("GET", rawURL, nil)); !o.Refused {
			t.Errorf("outcome of a call to the metadata server = %+v, want refused", o)
		}
	}
}

// newListed serves handler as the listed host.
func newListed(t *testing.T, handler http.HandlerFunc) (rawURL string, certificate *x509.Certificate) {
	t.Helper()
	s := httptest.NewUnstartedServer(handler)
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.StartTLS()
	t.Cleanup(s.Close)
	return "https://" + named(listed, s.Listener.Addr().String())[len("http://"):], s.Certificate()
}

func TestCredentialsReachTheirHost(t *testing.T) {
	var got atomic.Value
	rawURL, certificate := newListed(t, func(_ http.ResponseWriter, r *http.Request) { got.Store(r.Header) })
	d := newArmed(t, certificate)
	for _, rawURL := range []string{rawURL, strings.Replace(rawURL, listed, "EXAMPLE.com.", 1)} {
		if err := d.credentials.Identity.CheckURL(rawURL); err != nil {
			t.Errorf("CheckURL = %v, want nil", err)
		}
		if err := d.credentials.Secrets.Check("billing", rawURL); err != nil {
			t.Errorf("Check = %v, want nil", err)
		}
		token := "Bearer " + jwt(began.Add(time.Hour), 1)
		for name, want := range map[string][2]string{
			"token": {token, ""}, "secret": {"Bearer " + planted, "x"}, "both": {token, "a " + planted},
		} {
			if o := d.Deliver(t.Context(), armed(rawURL)[name]); o.Kind != task.OutcomeSucceeded {
				t.Fatalf("%s: outcome = %+v, want success", name, o)
			}
			h := got.Load().(http.Header)
			if diff := cmp.Diff(want, [2]string{strings.Join(h["Authorization"], "|"), strings.Join(h["X-Other"], "|")}); diff != "" {
				t.Errorf("%s (-want +got):\n%s", name, diff)
			}
		}
	}
}

// The listed host answers with a redirect to another one, which is not called.
func TestCredentialsAreNotRedirected(t *testing.T) {
	evil, evilCertificate := newEvil(t)
	for _, status := range []int{301, 302, 303, 307, 308} {
		rawURL, certificate := newListed(t, func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "https://127.0.0.1:"+evil+"/", status)
		})
		d := newArmed(t, certificate, evilCertificate)
		for name, c := range armed(rawURL) {
			if o := d.Deliver(t.Context(), c); o.Kind != task.OutcomePermanent || o.StatusCode != status {
				t.Errorf("%s: outcome = %+v, want permanent with status %d", name, o, status)
			}
		}
	}
}

// The listed host's name stands for another server now: it cannot prove that it
// is the host, so nothing is sent, also not where a connection to the host is kept.
func TestCredentialsDoNotFollowTheDNS(t *testing.T) {
	evil, evilCertificate := newEvil(t)
	var calls atomic.Int64
	rawURL, certificate := newListed(t, func(http.ResponseWriter, *http.Request) { calls.Add(1) })
	d := newArmed(t, certificate, evilCertificate)
	d.resolver = newResolver(t, func(string) []netip.Addr { return []netip.Addr{netip.MustParseAddr("127.0.0.1")} })
	for range 2 {
		for name, c := range armed(rawURL) {
			if o := d.Deliver(t.Context(), c); o.Kind != task.OutcomeSucceeded {
				t.Errorf("%s: outcome = %+v, want success", name, o)
			}
		}
		for name, c := range armed("https://" + listed + ":" + evil + "/") {
			o := d.Deliver(t.Context(), c)
			if o.Kind != task.OutcomeRetryable || o.Error != "TLS certificate is for another host name" {
				t.Errorf("%s: outcome = %+v, want a refused certificate", name, o)
			}
		}
	}
	if n := calls.Load(); n != 6 {
		t.Errorf("the listed host got %d calls, want 6", n)
	}
}

// What a target repeats of what it was sent is not kept.
func TestEchoedCredentialsAreNotKept(t *testing.T) {
	ways := map[string]http.HandlerFunc{
		"as it is": func(w http.ResponseWriter, r *http.Request) { r.Header.Write(w) },
		"as JSON":  func(w http.ResponseWriter, r *http.Request) { json.NewEncoder(w).Encode(r.Header) },
		"as other JSON": func(w http.ResponseWriter, r *http.Request) {
			e := json.NewEncoder(w)
			e.SetEscapeHTML(false)
			e.Encode(r.Header)
		},
		"as a query": func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, url.Values(r.Header).Encode()) },
		"as a path":  func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, url.PathEscape(r.Header.Get("X-Odd"))) },
		"as an error": func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(http.StatusUnauthorized)
			r.Header.Write(w)
		},
		"in a redirect": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Location", "https://x.test/"+url.PathEscape(r.Header.Get("Authorization"))+"/"+r.Header.Get("X-Key")+"/"+url.PathEscape(r.Header.Get("X-Odd")))
			w.WriteHeader(http.StatusFound)
		},
		"as a host": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Location", "https://"+r.Header.Get("X-Key")+".test/")
			w.WriteHeader(http.StatusFound)
		},
		"where the excerpt ends": func(w http.ResponseWriter, r *http.Request) {
			io.WriteString(w, strings.Repeat("x", excerptBytes-10)+r.Header.Get("X-Key"))
		},
		"where the answer breaks off": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "100")
			io.WriteString(w, "key: "+r.Header.Get("X-Key")[:8])
		},
		"again and again": func(w http.ResponseWriter, r *http.Request) {
			io.WriteString(w, strings.Repeat(r.Header.Get("X-Short"), excerptBytes))
		},
	}
	var mu sync.Mutex
	var way http.HandlerFunc
	rawURL, certificate := newListed(t, func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		way(w, r)
	})
	d := newArmed(t, certificate)
	c := identified(rawURL, "a", 1, 0)
	c.Task.Headers = map[string]string{"X-Key": "${secret:billing}", "X-Odd": "${secret:odd}", "X-Short": "${secret:short}"}
	for name, f := range ways {
		mu.Lock()
		way = f
		mu.Unlock()
		o := d.Deliver(t.Context(), c)
		kept := o.Error + "\n" + o.ResponseExcerpt
		for _, secret := range []string{planted, planted[:8], "s1gn4tur3", `s3cr3t "q"`, `s3cr3t \"q\"`, "s3cr3t+%22", "s3cr3t%20%22", "~"} {
			if strings.Contains(kept, secret) {
				t.Errorf("%s: %q is kept in\n%s", name, secret, kept)
			}
		}
		if !strings.Contains(kept, credentials.Redacted) && !strings.Contains(kept, url.PathEscape(credentials.Redacted)) && !strings.HasPrefix(name, "where") && name != "as a host" {
			t.Errorf("%s: nothing is redacted in\n%s", name, kept)
		}
		if len(o.ResponseExcerpt) > excerptBytes {
			t.Errorf("%s: an excerpt of %d bytes", name, len(o.ResponseExcerpt))
		}
	}
}

// The same goes for secrets that the task holds itself.
func TestEchoedLiteralsAreNotKept(t *testing.T) {
	t.Parallel()
	d := newDeliverer(t)
	server := newServer(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/moved" {
			w.Header().Set("Location", "/"+r.Header.Get("X-Api-Key"))
			w.WriteHeader(http.StatusFound)
		}
		json.NewEncoder(w).Encode(r.Header)
		io.WriteString(w, strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer "))
	})
	c := newCall("POST", "", nil)
	c.Task.Headers = map[string]string{
		"authorization": "Bearer l1t3ral-1", "Cookie": `id="l1t3ral-2"`, "X-Api-Key": "l1t3ral-3",
		"X-Max-Tokens": "5", "X-Token": "", "X-Tenant": "is no secret",
	}
	for _, path := range []string{"", "/moved"} {
		c.Task.URL = server.URL + path
		o := d.Deliver(t.Context(), c)
		kept := o.Error + "\n" + o.ResponseExcerpt
		if strings.Contains(kept, "l1t3ral") || !strings.Contains(kept, `"Authorization":["[redacted]"]`) {
			t.Errorf("kept is\n%s", kept)
		}
		for _, shown := range []string{`"X-Max-Tokens":["5"]`, `"X-Token":[""]`, `"X-Tenant":["is no secret"]`} {
			if !strings.Contains(kept, shown) {
				t.Errorf("%s is not in\n%s", shown, kept)
			}
		}
	}
}

// A caller has its task send a secret to a target that repeats the body, and
// chooses the body. What is kept of the answer tells nothing about the secret
// until the body holds all of it: neither at the end of what is kept, nor where
// the answer breaks off, nor by a literal that begins before the secret.
func TestGuessesTellNothing(t *testing.T) {
	t.Parallel()
	server := newServer(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		if at, err := strconv.Atoi(r.URL.Query().Get("break")); err == nil {
			w.Header().Set("Content-Length", strconv.Itoa(len(body)))
			body = body[:at]
		}
		switch r.URL.Path {
		case "/refuse":
			w.WriteHeader(http.StatusUnprocessableEntity)
		case "/moved":
			w.Header().Set("Location", "/"+string(body))
			w.WriteHeader(http.StatusFound)
		}
		_, _ = w.Write(body)
	})
	d := newDeliverer(t)
	d.credentials.Secrets = newSecrets(t, "127.0.0.1")
	call := func(query, body, literal string) task.Outcome {
		c := newCall("POST", server.URL+query, []byte(body))
		c.Task.Headers = map[string]string{"X-Key": "${secret:billing}", "X-Token": literal}
		o := d.Deliver(t.Context(), c)
		o.Duration = 0
		return o
	}
	for n := 1; n < len(planted); n++ {
		// Wrong guesses differ from the right one in one character, which no secret here has.
		right := planted[:n]
		for _, wrong := range []string{"~" + right[1:], right[:n-1] + "~"} {
			for name, tt := range map[string]struct{ query, before, after string }{
				"where the excerpt ends":             {"/ok", strings.Repeat("x", excerptBytes-n), strings.Repeat("x", 100)},
				"where that of a refusal ends":       {"/refuse", strings.Repeat("x", excerptBytes-n), strings.Repeat("x", 100)},
				"across the end":                     {"/ok", strings.Repeat("x", excerptBytes-1), strings.Repeat("x", 100)},
				"where the answer ends":              {"/ok", strings.Repeat("x", excerptBytes-n), ""},
				"where the answer breaks off":        {"/ok?break=" + strconv.Itoa(1000+n), strings.Repeat("x", 1000), "!"},
				"where a refusal breaks off":         {"/refuse?break=" + strconv.Itoa(1000+n), strings.Repeat("x", 1000), "!"},
				"where it breaks off behind the end": {"/ok?break=" + strconv.Itoa(excerptBytes+10), strings.Repeat("x", excerptBytes+10-n), "!"},
				"in a short answer":                  {"/ok", "", ""},
				"in a redirect":                      {"/moved", "", "/"},
				"in a long redirect":                 {"/moved", strings.Repeat("x", 120-n), strings.Repeat("x", 200)},
			} {
				got := call(tt.query, tt.before+right+tt.after, "")
				want := call(tt.query, tt.before+wrong+tt.after, "")
				want.ResponseExcerpt = strings.ReplaceAll(want.ResponseExcerpt, wrong, right)
				want.Error = strings.ReplaceAll(want.Error, wrong, right)
				// Of a guess that is kept in part, the other part differs.
				if kept, _, found := strings.Cut(want.ResponseExcerpt, "~"); found {
					want.ResponseExcerpt = kept + got.ResponseExcerpt[min(len(kept), len(got.ResponseExcerpt)):]
				}
				if diff := cmp.Diff(want, got); diff != "" {
					t.Fatalf("%s, %d characters (-wrong +right):\n%s", name, n, diff)
				}
			}
			// The secret itself is there, and a literal reaches into it.
			for name, literal := range map[string]func(guess string) string{
				"from the front": func(guess string) string { return "in front:" + guess },
				"from behind":    nil,
			} {
				body, g, w := "in front:"+planted+":behind", right, wrong
				if literal == nil {
					g, w = planted[len(planted)-n:], "~"+planted[len(planted)-n+1:]
					literal = func(guess string) string { return guess + ":behind" }
				}
				for _, at := range []int{0, 1000, excerptBytes - 20, excerptBytes - 12, excerptBytes - 5} {
					inside := at + len("in front:") + len(planted)/2
					for _, query := range []string{"/ok", "/refuse", "/moved", "/ok?break=" + strconv.Itoa(inside), "/ok?break=" + strconv.Itoa(at+len(body)-3)} {
						long := strings.Repeat("x", at) + body + strings.Repeat("x", 200)
						if diff := cmp.Diff(call(query, long, literal(w)), call(query, long, literal(g))); diff != "" {
							t.Fatalf("a literal %s, %d characters at %d, %s (-wrong +right):\n%s", name, n, at, query, diff)
						}
					}
				}
			}
		}
	}
	// All of it is hidden, and nothing else.
	if o := call("/ok", "in front:"+planted+":behind", ""); o.ResponseExcerpt != "in front:[redacted]:behind" {
		t.Errorf("excerpt = %q", o.ResponseExcerpt)
	}
}
