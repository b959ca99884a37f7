//go:build faults

package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/melodia/orchestrator/internal/postgres/pgtest"
)

// gateways are proxies that serve the service under /orchestrator, on a socket in their
// folder: what starts each, and its configuration, with DIR and SERVICE to be filled in.
var gateways = map[string]struct {
	command       []string
	configuration string
	settings      []string // of the service behind it
}{
	"nginx strips the path and says so": {
		nginx, nginxConfiguration(`location /orchestrator/ { proxy_pass http://SERVICE/; proxy_set_header Host $host; proxy_set_header X-Forwarded-Prefix /orchestrator; }`),
		[]string{"TRUSTED_PROXIES=127.0.0.1/32"},
	},
	"nginx does not strip the path": {
		nginx, nginxConfiguration(`location /orchestrator { proxy_pass http://SERVICE; proxy_set_header Host $host; }`),
		[]string{"BASE_PATH=/orchestrator"},
	},
	"haproxy strips the path": {
		haproxy, haproxyConfiguration(`http-request replace-path /orchestrator(/.*) \1`), []string{"BASE_PATH=/orchestrator"},
	},
	"haproxy strips the path and says so": {
		haproxy, haproxyConfiguration("http-request replace-path /orchestrator(/.*) \\1\n    http-request set-header X-Forwarded-Prefix /orchestrator/"),
		[]string{"TRUSTED_PROXIES=10.0.0.0/8,127.0.0.0/8", "BASE_PATH=/elsewhere"},
	},
	"haproxy does not strip the path": {haproxy, haproxyConfiguration(""), []string{"BASE_PATH=/orchestrator", "TRUSTED_PROXIES=127.0.0.0/8"}},
}

var (
	nginx   = []string{"nginx", "-e", "stderr", "-p", "DIR", "-c", "DIR/conf"}
	haproxy = []string{"haproxy", "-db", "-f", "DIR/conf"}
)

func nginxConfiguration(location string) string {
	return `daemon off; master_process off; pid DIR/pid; error_log stderr;
events {}
http {
  access_log off;
  client_body_temp_path DIR/1; proxy_temp_path DIR/2; fastcgi_temp_path DIR/3; uwsgi_temp_path DIR/4; scgi_temp_path DIR/5;
  server { listen unix:DIR/socket; ` + location + ` }
}`
}

func haproxyConfiguration(rules string) string {
	return `defaults
    mode http
    timeout client 60s
    timeout server 60s
    timeout connect 10s
frontend gateway
    bind unix@DIR/socket
    http-request deny unless { path_beg /orchestrator/ } or { path /orchestrator/docs }
    ` + rules + `
    default_backend service
backend service
    server one SERVICE
`
}

// startGateway starts a proxy before a service, and returns a client that reaches it
// whatever host a URL names.
func startGateway(t *testing.T, command []string, configuration, service string) *http.Client {
	t.Helper()
	dir, err := os.MkdirTemp("", "") //nolint:usetesting // the path of a socket has at most 107 bytes, and t.TempDir is long
	if err != nil {
		t.Fatal(err)
	}
	fill := strings.NewReplacer("DIR", dir, "SERVICE", strings.TrimPrefix(service, "http://"))
	if err := os.WriteFile(filepath.Join(dir, "conf"), []byte(fill.Replace(configuration)), 0o600); err != nil {
		t.Fatal(err)
	}
	path, err := exec.LookPath(command[0])
	if err != nil {
		path = "/usr/sbin/" + command[0] // Debian's place, which is not in a user's PATH
	}
	var args []string
	for _, arg := range command[1:] {
		args = append(args, fill.Replace(arg))
	}
	proxy := exec.Command(path, args...)
	var log bytes.Buffer
	proxy.Stdout, proxy.Stderr = &log, &log
	if err := proxy.Start(); err != nil {
		t.Fatalf("apt-get install %s: %v", command[0], err)
	}
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(dir, "socket"))
	}}
	client := &http.Client{Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	t.Cleanup(func() {
		transport.CloseIdleConnections()
		_ = proxy.Process.Kill()
		_ = proxy.Wait()
		if t.Failed() {
			t.Logf("output of %s:\n%s", command[0], log.String())
		}
		_ = os.RemoveAll(dir)
	})
	eventually(t, func() bool {
		response, err := client.Get("http://gateway/orchestrator/health")
		if err != nil {
			return false
		}
		_ = response.Body.Close()
		return response.StatusCode == http.StatusOK
	}, func() string { return command[0] + " does not answer" })
	return client
}

// A caller that knows the gateway alone gets along: each link in an answer leads back
// through it.
func TestBehindAGateway(t *testing.T) {
	t.Parallel()
	for name, gateway := range gateways {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			target := newTarget(t, statusOf)
			p := start(t, "serve", append([]string{"DATABASE_URL=" + pgtest.URL(t)}, gateway.settings...)...)
			client := startGateway(t, gateway.command, gateway.configuration, p.url)
			here, err := url.Parse("http://gateway/orchestrator/")
			if err != nil {
				t.Fatal(err)
			}
			// send asks for what a link leads to, from the page at which it stands.
			send := func(method string, from *url.URL, link, body string) (answer, *url.URL) {
				t.Helper()
				to, err := from.Parse(link)
				if err != nil {
					t.Fatalf("the link %q: %v", link, err)
				}
				request, err := http.NewRequestWithContext(t.Context(), method, to.String(), strings.NewReader(body))
				if err != nil {
					t.Fatal(err)
				}
				if body != "" {
					request.Header.Set("Content-Type", "application/json")
				}
				response, err := client.Do(request)
				if err != nil {
					t.Fatal(err)
				}
				defer func() { _ = response.Body.Close() }()
				raw, err := io.ReadAll(response.Body)
				if err != nil {
					t.Fatal(err)
				}
				a := answer{status: response.StatusCode, header: response.Header, raw: string(raw)}
				_ = json.Unmarshal(raw, &a.task)
				return a, to
			}

			submitted, at := send(http.MethodPost, here, "enqueue", `{"url":"`+target.url+`/200"}`)
			if submitted.status != http.StatusAccepted {
				t.Fatalf("enqueue: %d %s", submitted.status, submitted.raw)
			}
			if seen, _ := send(http.MethodGet, at, submitted.header.Get("Location"), ""); seen.status != http.StatusOK || seen.task.ID != submitted.task.ID {
				t.Errorf("Location %q leads to %d %s, want the task", submitted.header.Get("Location"), seen.status, seen.raw)
			}
			if replayed, _ := send(http.MethodGet, here, "tasks/"+submitted.task.ID+"?wait_seconds=10", ""); replayed.status != http.StatusOK || replayed.task.State != "succeeded" {
				t.Errorf("the task: %d %s, want success", replayed.status, replayed.raw)
			}

			// A person opens /docs, the page loads what it refers to, and its script the document.
			moved, at := send(http.MethodGet, here, "docs", "")
			if moved.status != http.StatusMovedPermanently {
				t.Fatalf("docs: %d %s", moved.status, moved.raw)
			}
			page, at := send(http.MethodGet, at, moved.header.Get("Location"), "")
			if page.status != http.StatusOK {
				t.Fatalf("%s: %d %s", at, page.status, page.raw)
			}
			links := regexp.MustCompile(`(?:href|src)="([^"]+)"`).FindAllStringSubmatch(page.raw, -1)
			for _, link := range links {
				if a, to := send(http.MethodGet, at, link[1], ""); a.status != http.StatusOK {
					t.Errorf("the page's %s leads to %s: %d", link[1], to, a.status)
				}
			}
			script, _ := send(http.MethodGet, at, "start.js", "")
			link := regexp.MustCompile(`url: "([^"]+)"`).FindStringSubmatch(script.raw)
			if len(links) < 5 || link == nil {
				t.Fatalf("the page has %d links, its script %q", len(links), link)
			}
			var document struct{ Servers []struct{ URL string } }
			a, at := send(http.MethodGet, at, link[1], "")
			if err := json.Unmarshal([]byte(a.raw), &document); err != nil || len(document.Servers) != 1 {
				t.Fatalf("the document at %s: %d, %v", at, a.status, err)
			}
			// A client that was generated from it puts an operation's path behind the server's.
			server := strings.TrimSuffix(document.Servers[0].URL, "/")
			if a, to := send(http.MethodGet, at, server+"/tasks", ""); a.status != http.StatusOK || !strings.Contains(a.raw, submitted.task.ID) {
				t.Errorf("the server %q leads to %s: %d %s, want the tasks", server, to, a.status, a.raw)
			}

			// Those who reach the service itself are served with and without the path, and
			// cannot say another one.
			direct := p.send(http.MethodPost, "/enqueue", `{"url":"`+target.url+`/200"}`, http.Header{"X-Forwarded-Prefix": {"//evil.example"}})
			if location := direct.header.Get("Location"); direct.status != http.StatusAccepted || strings.Contains(location, "evil") {
				t.Errorf("directly: %d with Location %q", direct.status, location)
			}
			for _, setting := range gateway.settings {
				if base, ok := strings.CutPrefix(setting, "BASE_PATH="); ok {
					if a := p.do(http.MethodGet, fmt.Sprint(base, "/tasks/", submitted.task.ID), ""); a.status != http.StatusOK {
						t.Errorf("directly, below %s: %d %s", base, a.status, a.raw)
					}
				}
			}
		})
	}
}
