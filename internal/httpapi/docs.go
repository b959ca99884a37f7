package httpapi

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"io/fs"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"sync"

	swaggerfiles "github.com/swaggo/files/v2"
	httpswagger "github.com/swaggo/http-swagger/v2"
)

func redirectToDocs(w http.ResponseWriter, r *http.Request) {
	http.Redirect(w, r, "/docs/index.html", http.StatusMovedPermanently)
}

// docsPolicy is what the page may do: run the scripts and styles that come from
// here, show images of its own (those in its style are data), and call this
// service. Whoever puts a script into a text that it shows gets nothing out of
// it: what stands in the page itself is named by its hash (CSP level 3, §2.3.1).
func docsPolicy(page []byte) string {
	return "default-src 'none'; script-src 'self'" + hashes(inlineScript, page) +
		"; style-src 'self' 'unsafe-hashes'" + hashes(inlineStyle, page) + hashes(styleAttribute, page) +
		"; img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
}

var (
	inlineScript   = regexp.MustCompile(`(?s)<script>(.*?)</script>`)
	inlineStyle    = regexp.MustCompile(`(?s)<style>(.*?)</style>`)
	styleAttribute = regexp.MustCompile(`\sstyle="([^"]*)"`)
)

// hashes are the sources that admit what the pattern's group finds in page.
func hashes(pattern *regexp.Regexp, page []byte) string {
	var sources strings.Builder
	for _, match := range pattern.FindAllSubmatch(page, -1) {
		sum := sha256.Sum256(match[1])
		sources.WriteString(" 'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'")
	}
	return sources.String()
}

// docs serves Swagger UI; all its assets are in the binary. Credentials that are
// typed in last until the page is left.
func (a *API) docs() http.HandlerFunc {
	ui := httpswagger.Handler(
		httpswagger.URL("/openapi.json"),
		httpswagger.Layout(httpswagger.BaseLayout),
		httpswagger.PersistAuthorization(false),
		httpswagger.UIConfig(map[string]string{"displayRequestDuration": "true", "defaultModelsExpandDepth": "0"}),
	)
	// The handler takes the name from RequestURI, where a query or an encoded
	// letter leads it astray, and answers nothing but GET.
	serve := func(w http.ResponseWriter, r *http.Request, name string) {
		asset := r.WithContext(r.Context())
		asset.Method, asset.RequestURI = http.MethodGet, "/docs/"+name
		ui(w, asset)
	}
	page := &pageWriter{header: http.Header{}}
	serve(page, &http.Request{URL: new(url.URL)}, "index.html")
	policy := docsPolicy(page.text.Bytes())
	return func(w http.ResponseWriter, r *http.Request) {
		name := strings.TrimPrefix(r.URL.Path, "/docs/")
		// Left to itself the handler lists folders and has errors of its own.
		if info, err := fs.Stat(swaggerfiles.FS, name); err != nil || info.IsDir() {
			a.notFound(w, r)
			return
		}
		defer a.release(assetAnswer)
		if !a.reserve(assetAnswer) {
			a.write(w, r, tooManyAnswers())
			return
		}
		w.Header().Set("Cache-Control", "no-cache")
		w.Header().Set("Content-Security-Policy", policy)
		serve(w, r, name)
	}
}

// pageWriter keeps a page, so that its policy can be made.
type pageWriter struct {
	header http.Header
	text   bytes.Buffer
}

// Header is part of http.ResponseWriter.
func (p *pageWriter) Header() http.Header { return p.header }

// WriteHeader is part of http.ResponseWriter.
func (*pageWriter) WriteHeader(int) {}

func (p *pageWriter) Write(b []byte) (int, error) { return p.text.Write(b) }

// serveDocument serves what encode returns. It is called once, when the
// document is complete.
func serveDocument(contentType string, encode func() ([]byte, error)) http.HandlerFunc {
	document := sync.OnceValues(encode)
	return func(w http.ResponseWriter, r *http.Request) {
		b, err := document()
		if err != nil {
			panic(err) // the API's own declarations do not encode
		}
		w.Header().Set("Content-Type", contentType)
		_, _ = w.Write(b) // the caller is gone
	}
}
