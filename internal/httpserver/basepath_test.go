package httpserver

import (
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
)

func TestBehindGateway(t *testing.T) {
	t.Parallel()
	const peer, stranger = "10.0.0.7:1234", "10.0.1.7:1234"
	proxies := []netip.Prefix{netip.MustParsePrefix("10.0.0.0/24"), netip.MustParsePrefix("fd00::/8")}
	long := "/" + strings.Repeat("x", maxPrefix)
	for name, tt := range map[string]struct {
		base    string
		proxies []netip.Prefix
		peer    string
		said    []string // X-Forwarded-Prefix
		target  string
		path    string // what handlers see
		prefix  string // what links begin with
	}{
		"nothing set":                   {"", nil, peer, []string{"/x"}, "/tasks/1", "/tasks/1", ""},
		"as it is":                      {"/orchestrator", nil, peer, nil, "/tasks/1", "/tasks/1", "/orchestrator"},
		"with the path":                 {"/orchestrator", nil, peer, nil, "/orchestrator/tasks/1?a=/orchestrator/b", "/tasks/1", "/orchestrator"},
		"the path alone":                {"/orchestrator", nil, peer, nil, "/orchestrator", "/", "/orchestrator"},
		"the path and a slash":          {"/orchestrator", nil, peer, nil, "/orchestrator/", "/", "/orchestrator"},
		"two segments":                  {"/api/v1.2", nil, peer, nil, "/api/v1.2/tasks", "/tasks", "/api/v1.2"},
		"a path that begins alike":      {"/orchestrator", nil, peer, nil, "/orchestrators/tasks", "/orchestrators/tasks", "/orchestrator"},
		"in other letters":              {"/orchestrator", nil, peer, nil, "/Orchestrator/tasks", "/Orchestrator/tasks", "/orchestrator"},
		"twice":                         {"/orchestrator", nil, peer, nil, "/orchestrator/orchestrator/tasks", "/orchestrator/tasks", "/orchestrator"},
		"an escape behind it":           {"/orchestrator", nil, peer, nil, "/orchestrator/hosts/a%2Fb", "/hosts/a%2Fb", "/orchestrator"},
		"an escape in it":               {"/orchestrator", nil, peer, nil, "/%6Frchestrator/hosts/a%2Fb", "/%6Frchestrator/hosts/a%2Fb", "/orchestrator"},
		"a proxy that took it away":     {"", proxies, peer, []string{"/orchestrator"}, "/tasks/1", "/tasks/1", "/orchestrator"},
		"a proxy, with a slash":         {"", proxies, peer, []string{"/orchestrator/"}, "/tasks/1", "/tasks/1", "/orchestrator"},
		"a proxy at the root":           {"/orchestrator", proxies, peer, []string{"/"}, "/tasks/1", "/tasks/1", ""},
		"a proxy that knows better":     {"/orchestrator", proxies, peer, []string{"/v2"}, "/orchestrator/tasks", "/tasks", "/v2"},
		"a proxy by IPv6":               {"", proxies, "[fd00::1%eth0]:1", []string{"/a"}, "/tasks", "/tasks", "/a"},
		"a proxy by IPv4 in IPv6":       {"", proxies, "[::ffff:10.0.0.7]:1", []string{"/a"}, "/tasks", "/tasks", "/a"},
		"a proxy that says nothing":     {"/orchestrator", proxies, peer, nil, "/tasks", "/tasks", "/orchestrator"},
		"a stranger":                    {"", proxies, stranger, []string{"/evil"}, "/tasks", "/tasks", ""},
		"a stranger, with the setting":  {"/orchestrator", proxies, stranger, []string{"/evil"}, "/orchestrator/tasks", "/tasks", "/orchestrator"},
		"a peer of no sort":             {"", proxies, "pipe", []string{"/evil"}, "/tasks", "/tasks", ""},
		"no proxy is trusted":           {"/orchestrator", nil, peer, []string{"/evil"}, "/tasks", "/tasks", "/orchestrator"},
		"said twice":                    {"", proxies, peer, []string{"/a", "/b"}, "/tasks", "/tasks", ""},
		"a list":                        {"", proxies, peer, []string{"/a, /b"}, "/tasks", "/tasks", ""},
		"another host":                  {"", proxies, peer, []string{"//evil.example"}, "/tasks", "/tasks", ""},
		"another host, by a backslash":  {"", proxies, peer, []string{`/\evil.example`}, "/tasks", "/tasks", ""},
		"a URL":                         {"", proxies, peer, []string{"https://evil.example"}, "/tasks", "/tasks", ""},
		"no slash":                      {"", proxies, peer, []string{"orchestrator"}, "/tasks", "/tasks", ""},
		"the folder above":              {"", proxies, peer, []string{"/a/.."}, "/tasks", "/tasks", ""},
		"a line feed":                   {"", proxies, peer, []string{"/a\nX: y"}, "/tasks", "/tasks", ""},
		"an escape":                     {"", proxies, peer, []string{"/a%2Fb"}, "/tasks", "/tasks", ""},
		"a query":                       {"", proxies, peer, []string{"/a?b"}, "/tasks", "/tasks", ""},
		"too long":                      {"", proxies, peer, []string{long}, "/tasks", "/tasks", ""},
		"as long as may be":             {"", proxies, peer, []string{long[1:maxPrefix]}, "/tasks", "/tasks", ""},
		"as long as may be, and a path": {"", proxies, peer, []string{long[:maxPrefix]}, "/tasks", "/tasks", long[:maxPrefix]},
	} {
		door := NewGuard(Options{BasePath: tt.base, TrustedProxies: tt.proxies}).Door(nil)
		r := httptest.NewRequest(http.MethodGet, tt.target, nil)
		r.RemoteAddr, r.Header = tt.peer, http.Header{"X-Forwarded-Prefix": tt.said}
		before := *r.URL
		door.BehindGateway(http.HandlerFunc(func(_ http.ResponseWriter, got *http.Request) {
			if got.URL.EscapedPath() != tt.path || PrefixOf(got) != tt.prefix || got.URL.RawQuery != r.URL.RawQuery {
				t.Errorf("%s: the handler sees %s below %q, want %s below %q", name, got.URL, PrefixOf(got), tt.path, tt.prefix)
			}
		})).ServeHTTP(nil, r)
		if *r.URL != before {
			t.Errorf("%s: the request itself was changed to %s", name, r.URL)
		}
	}
}

func TestIsPathPrefix(t *testing.T) {
	t.Parallel()
	for path, want := range map[string]bool{
		"/orchestrator": true, "/a/b/c": true, "/a.b_c~d-e": true, "/v1.2": true,
		"": false, "/": false, "orchestrator": false, "/orchestrator/": false, "//a": false, "/a//b": false, "/..": false, "/.": false, "/.a": false, "/a/../b": false, "/a b": false, "/ä": false, "/a%20": false, "/a?b": false, "/a#b": false, "/a\n": false,
	} {
		if got := IsPathPrefix(path); got != want {
			t.Errorf("IsPathPrefix(%q) = %t, want %t", path, got, want)
		}
	}
}
