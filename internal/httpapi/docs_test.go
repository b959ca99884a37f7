package httpapi

import (
	"bufio"
	"encoding/json"
	"io"
	"mime"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

func TestDocsRedirect(t *testing.T) {
	t.Parallel()
	s := newService(t)
	for _, path := range []string{"/docs", "/docs/", "/docs?x=y"} {
		for _, method := range []string{http.MethodGet, http.MethodHead} {
			a := s.do(method, path, "")
			if got := a.header.Get("Location"); a.status != http.StatusMovedPermanently || got != "/docs/index.html" {
				t.Errorf("%s %s: got %d to %q, want 301 to /docs/index.html", method, path, a.status, got)
			}
		}
	}
}

var (
	references = regexp.MustCompile(`(?i)(?:src|href|action|data|poster)\s*=\s*["']?([^"'\s>]+)`)
	styleURLs  = regexp.MustCompile(`(?i)(?:url\(|@import)\s*["']?([^"')\s]+)`)
)

// The page and all it refers to come from the binary.
func TestDocsPage(t *testing.T) {
	t.Parallel()
	s := newService(t)
	page := s.get("/docs/index.html")
	if page.status != http.StatusOK || page.header.Get("Content-Type") != "text/html; charset=utf-8" {
		t.Fatalf("got %d %s, want 200 text/html", page.status, page.header.Get("Content-Type"))
	}
	script := s.get("/docs/start.js")
	for _, want := range []string{`url: "../openapi.json"`, "validatorUrl: null", "persistAuthorization: false"} {
		if !strings.Contains(script.text, want) {
			t.Errorf("the page's script does not contain %q", want)
		}
	}
	types := map[string]string{".css": "text/css", ".js": "javascript", ".png": "image/png"}
	found := map[string]bool{}
	for _, match := range references.FindAllStringSubmatch(page.text, -1) {
		name := match[1]
		if strings.Contains(name, ":") || strings.HasPrefix(name, "//") {
			t.Errorf("the page refers to %s", name)
			continue
		}
		asset := s.get("/docs/" + strings.TrimPrefix(name, "./"))
		mediaType, _, _ := mime.ParseMediaType(asset.header.Get("Content-Type"))
		if asset.status != http.StatusOK || len(asset.text) < 100 || !strings.Contains(mediaType, types[path.Ext(name)]) {
			t.Errorf("%s: got %d, %d bytes of %q", name, asset.status, len(asset.text), mediaType)
		}
		for header, want := range map[string]string{"Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff", "Content-Security-Policy": docsPolicy} {
			if got := asset.header.Get(header); got != want {
				t.Errorf("%s: got %s %q, want %q", name, header, got, want)
			}
		}
		found[path.Ext(name)] = true
		if path.Ext(name) != ".css" {
			continue
		}
		for _, match := range styleURLs.FindAllStringSubmatch(asset.text, -1) {
			if !strings.HasPrefix(match[1], "data:") {
				t.Errorf("%s refers to %s", name, match[1])
			}
		}
	}
	for extension := range types {
		if !found[extension] {
			t.Errorf("the page refers to no %s", extension)
		}
	}
}

// The policy admits no script and no style that stands in a page, and the page
// has none. What Swagger UI's own scripts do is for a browser to show.
func TestDocsPolicy(t *testing.T) {
	t.Parallel()
	s := newService(t)
	page := s.get("/docs/index.html")
	policy := page.header.Get("Content-Security-Policy")
	for _, directive := range []string{"default-src 'none'", "script-src 'self'", "style-src 'self'", "connect-src 'self'", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"} {
		if !slices.Contains(strings.Split(policy, "; "), directive) {
			t.Errorf("the policy lacks %s: %s", directive, policy)
		}
	}
	for _, forbidden := range []string{"unsafe-", "sha256-", "*", "http:", "https:"} {
		if strings.Contains(policy, forbidden) {
			t.Errorf("the policy admits %s: %s", forbidden, policy)
		}
	}
	inline := regexp.MustCompile(`(?is)<script(?:\s[^>]*)?>\s*[^\s<]|<style|\sstyle=|\son\w+=`).FindAllString(page.text, -1)
	if len(inline) > 0 {
		t.Errorf("the policy stops what the page contains: %q", inline)
	}
	// A page with a script in it, and megabytes that no page asks for.
	for _, name := range []string{"oauth2-redirect.html", "swagger-initializer.js", "swagger-ui-bundle.js.map", "swagger-ui-es-bundle.js"} {
		if a := s.get("/docs/" + name); a.status != http.StatusNotFound {
			t.Errorf("GET /docs/%s: got %d, want 404", name, a.status)
		}
	}
}

// DOCS=off leaves nothing of it.
func TestDocsCanBeHidden(t *testing.T) {
	t.Parallel()
	s := newService(t, func(o *settings) { o.HideDocs = true })
	for _, path := range []string{"/docs", "/docs/", "/docs/index.html", "/docs/swagger-ui.css", "/openapi.json", "/openapi.yaml"} {
		if a := s.get(path); a.status != http.StatusNotFound || strings.Contains(a.text, "/docs") {
			t.Errorf("GET %s: got %d %s, want 404 without a word of /docs", path, a.status, a.text)
		}
	}
	if a := s.get("/health"); a.status != http.StatusOK {
		t.Errorf("GET /health: got %d, want 200", a.status)
	}
}

// However a name is written, it leads to the same asset, and to nothing else.
func TestDocsNames(t *testing.T) {
	t.Parallel()
	s := newService(t)
	page, style := s.get("/docs/index.html").text, s.get("/docs/swagger-ui.css").text
	for request, want := range map[string]string{
		"/docs/index.html?x=/y":                     page,
		"/docs/index.html?a=swagger-ui.css":         page,
		"/docs/index.html?/swagger-ui.css":          page,
		"/docs/index.html?":                         page,
		"/docs/%69ndex.html":                        page,
		"/docs/swagger-ui.css?/index.html":          style,
		"/docs/swagger%2Dui.css":                    style,
		"http://elsewhere.example/docs/index.html":  page,
		"http://elsewhere.example/docs/index.html?": page,
	} {
		if a := s.request(http.MethodGet, request); a.status != http.StatusOK || a.text != want {
			t.Errorf("GET %s: got %d and %d bytes, want 200 and %d", request, a.status, len(a.text), len(want))
		}
		if a := s.request(http.MethodHead, request); a.status != http.StatusOK || a.text != "" {
			t.Errorf("HEAD %s: got %d and %d bytes, want 200 and none", request, a.status, len(a.text))
		}
	}
	for _, request := range []string{
		"/docs/" + marker, "/docs/doc.json", "/docs/index.html/", "/docs/index.htm", "/docs/.", "/docs/..", "/docs/../docs", "/docs/../index.html",
		"/docs/%2e%2e/index.html", "/docs/..%2findex.html", "/docs/%2findex.html", "/docs//index.html", "/docs/./index.html", "/docs/dist/index.html",
		"/docs/%00", "/docs/%0a", "/docs/index.html%0a", "/docs/%ff", "/docs/?", "/docs/%3f", "/docs/index.html%3f", "/docs/swagger-ui.css/x",
		"/docs/C:%5cindex.html", "/docs/a?b/index.html", "http://elsewhere.example/docs/nothing", "http://elsewhere.example", "http://elsewhere.example?docs/index.html",
		"/docs/" + strings.Repeat("../", 100) + "etc/passwd", "/docs/" + strings.Repeat("a", 5000),
	} {
		a := s.request(http.MethodGet, request)
		if request == "/docs/?" {
			if a.status != http.StatusMovedPermanently {
				t.Errorf("GET %s: got %d, want 301", request, a.status)
			}
			continue
		}
		s.refused(a, http.StatusNotFound)
	}
	if strings.Contains(s.log.String(), "panic") {
		t.Errorf("something panicked: %s", clipped(s.log.String()))
	}
}

// request sends a request line as it is.
func (s *service) request(method, uri string) *answer {
	s.t.Helper()
	conn, err := net.Dial("tcp", s.server().Listener.Addr().String())
	if err != nil {
		s.t.Fatal(err)
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, method+" "+uri+" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"); err != nil {
		s.t.Fatal(err)
	}
	r, err := http.NewRequestWithContext(s.t.Context(), method, "/nowhere", nil)
	if err != nil {
		s.t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), r)
	if err != nil {
		s.t.Fatal(err)
	}
	defer resp.Body.Close()
	return s.read(r, resp)
}

// Behind a gateway everything that leads elsewhere begins with its path.
func TestLinksBehindAGateway(t *testing.T) {
	t.Parallel()
	const proxy = "10.0.0.7:1"
	s := newService(t, func(o *settings) {
		o.BasePath, o.TrustedProxies = "/orchestrator", []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}
	})
	for name, tt := range map[string]struct {
		peer, said, below string
		want              string
	}{
		"by the setting, stripped": {"192.0.2.1:1", "", "", "/orchestrator"},
		"by the setting":           {"192.0.2.1:1", "/evil", "/orchestrator", "/orchestrator"},
		"by the proxy":             {proxy, "/v2/orchestrator", "", "/v2/orchestrator"},
		"by the proxy, at root":    {proxy, "/", "", ""},
	} {
		do := func(method, path, body string) *httptest.ResponseRecorder {
			r := httptest.NewRequest(method, tt.below+path, strings.NewReader(body))
			r.RemoteAddr = tt.peer
			if tt.said != "" {
				r.Header.Set("X-Forwarded-Prefix", tt.said)
			}
			if body != "" {
				r.Header.Set("Content-Type", "application/json")
			}
			w := httptest.NewRecorder()
			s.API.ServeHTTP(w, r)
			return w
		}
		for path, body := range map[string]string{"/enqueue": `{"url":"` + target + `"}`, "/schedule": `{"url":"` + target + `","delay_seconds":1}`} {
			w := do(http.MethodPost, path, body)
			if location := w.Header().Get("Location"); w.Code != http.StatusAccepted || !regexp.MustCompile(`^`+tt.want+`/tasks/[0-9a-f-]{36}$`).MatchString(location) {
				t.Errorf("%s: POST %s: %d with Location %q, want it below %q", name, path, w.Code, location, tt.want)
			}
		}
		if w := do(http.MethodGet, "/docs", ""); w.Code != http.StatusMovedPermanently || w.Header().Get("Location") != tt.want+"/docs/index.html" {
			t.Errorf("%s: /docs leads to %q with %d, want it below %q", name, w.Header().Get("Location"), w.Code, tt.want)
		}
		server := tt.want
		if server == "" {
			server = "/"
		}
		for range 2 { // the second is the one that is kept
			var document struct{ Servers []struct{ URL string } }
			w := do(http.MethodGet, "/openapi.json", "")
			if err := json.Unmarshal(w.Body.Bytes(), &document); err != nil || len(document.Servers) != 1 || document.Servers[0].URL != server {
				t.Errorf("%s: the document has the servers %v (%v), want %s", name, document.Servers, err, server)
			}
			if w = do(http.MethodGet, "/openapi.yaml", ""); !strings.Contains(w.Body.String(), "url: "+server+"\n") {
				t.Errorf("%s: the document in YAML does not have the server %s", name, server)
			}
		}
		if w := do(http.MethodPatch, "/enqueue", "{}"); w.Code != http.StatusMethodNotAllowed || w.Header().Get("Allow") != "POST" {
			t.Errorf("%s: PATCH /enqueue: %d, allowed %q", name, w.Code, w.Header().Get("Allow"))
		}
	}
	for i := range 2 * maxDocuments { // a gateway may say anything
		r := httptest.NewRequest(http.MethodGet, "/openapi.json", nil)
		r.RemoteAddr = proxy
		r.Header.Set("X-Forwarded-Prefix", "/p"+strconv.Itoa(i))
		w := httptest.NewRecorder()
		if s.API.ServeHTTP(w, r); !strings.Contains(w.Body.String(), `"url":"/p`+strconv.Itoa(i)+`"`) {
			t.Errorf("prefix %d: the document has another server", i)
		}
	}
	for path, want := range map[string]bool{"/orchestrator": false, "/task": false, "/tasks": true, "/tasks/x": true, "/docs": true, "/openapi.json/x": true, "/health": true, "/worker-endpoint": true, "/queues": true} {
		if got := s.Owns(path); got != want {
			t.Errorf("Owns(%s) = %t, want %t", path, got, want)
		}
	}
}
