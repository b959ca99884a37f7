package httpapi

import (
	"bytes"
	"embed"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/danielgtaylor/huma/v2"
	httpswagger "github.com/swaggo/http-swagger/v2"

	"github.com/melodia/orchestrator/internal/httpserver"
)

func redirectToDocs(w http.ResponseWriter, r *http.Request) {
	http.Redirect(w, r, httpserver.PrefixOf(r)+"/docs/index.html", http.StatusMovedPermanently)
}

// docsPolicy is what the page of /docs may do (CSP level 3): run the scripts
// and styles that come from here, show images of its own (those in Swagger UI's
// style sheet are data), and call this service. A script in a text that the
// page shows does not run.
const docsPolicy = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; " +
	"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

// docsPage is the page of /docs, and the script that starts Swagger UI in it.
//
//go:embed docs/index.html docs/start.js
var docsPage embed.FS

// docsAssets are the files of swaggo/files that the page refers to.
var docsAssets = map[string]bool{"swagger-ui.css": true, "index.css": true, "swagger-ui-bundle.js": true, "favicon-32x32.png": true}

// docs serves the page of /docs and what it refers to, all of it from the binary.
func (a *API) docs() http.HandlerFunc {
	assets := httpswagger.Handler()
	return func(w http.ResponseWriter, r *http.Request) {
		name := strings.TrimPrefix(r.URL.Path, "/docs/")
		page, err := docsPage.ReadFile("docs/" + name)
		if err != nil && !docsAssets[name] {
			a.notFound(w, r)
			return
		}
		answers := a.Guard.Answers()
		defer answers.Release(assetAnswer)
		if !answers.Reserve(assetAnswer, assetAnswer) {
			a.fail(w, r, httpserver.TooManyAnswers())
			return
		}
		w.Header().Set("Cache-Control", "no-cache")
		w.Header().Set("Content-Security-Policy", docsPolicy)
		if err == nil {
			http.ServeContent(w, r, name, time.Time{}, bytes.NewReader(page))
			return
		}
		// The handler takes the name from RequestURI, where a query or an encoded
		// letter leads it astray, and answers nothing but GET.
		asset := r.WithContext(r.Context())
		asset.Method, asset.RequestURI = http.MethodGet, "/docs/"+name
		assets(w, asset)
	}
}

// maxDocuments bounds the documents that are kept: the settings know one prefix, but a
// gateway may say any.
const maxDocuments = 16

// serveDocument serves the document, encoded, with the address under which the caller reaches
// the service as its server. It is made once for each prefix.
func (a *API) serveDocument(contentType string, encode func(*huma.OpenAPI) ([]byte, error)) http.HandlerFunc {
	var mu sync.Mutex
	made := make(map[string][]byte) // by prefix
	document := func(prefix string) []byte {
		mu.Lock()
		defer mu.Unlock()
		if b := made[prefix]; b != nil {
			return b
		}
		d := *a.document
		if prefix != "" {
			server := *d.Servers[0]
			server.URL = prefix
			d.Servers = []*huma.Server{&server}
		}
		b, err := encode(&d)
		if err != nil {
			panic(err) // the API's own declarations do not encode
		}
		if len(made) >= maxDocuments {
			clear(made)
		}
		made[prefix] = b
		return b
	}
	return func(w http.ResponseWriter, r *http.Request) {
		b := document(httpserver.PrefixOf(r))
		w.Header().Set("Content-Type", contentType)
		_, _ = w.Write(b) // the caller is gone
	}
}
