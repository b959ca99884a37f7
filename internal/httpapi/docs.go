package httpapi

import (
	"io/fs"
	"net/http"
	"strings"
	"sync"

	swaggerfiles "github.com/swaggo/files/v2"
	httpswagger "github.com/swaggo/http-swagger/v2"
)

func redirectToDocs(w http.ResponseWriter, r *http.Request) {
	http.Redirect(w, r, "/docs/index.html", http.StatusMovedPermanently)
}

// docs serves Swagger UI; all its assets are in the binary.
func (a *API) docs() http.HandlerFunc {
	ui := httpswagger.Handler(
		httpswagger.URL("/openapi.json"),
		httpswagger.Layout(httpswagger.BaseLayout),
		httpswagger.UIConfig(map[string]string{"displayRequestDuration": "true"}),
	)
	return func(w http.ResponseWriter, r *http.Request) {
		name := strings.TrimPrefix(r.URL.Path, "/docs/")
		// Left to itself the handler lists folders and has errors of its own.
		if info, err := fs.Stat(swaggerfiles.FS, name); err != nil || info.IsDir() {
			a.notFound(w, r)
			return
		}
		w.Header().Set("Cache-Control", "no-cache")
		// The handler takes the name from RequestURI, where a query or an
		// encoded letter leads it astray, and answers nothing but GET.
		asset := r.WithContext(r.Context())
		asset.Method, asset.RequestURI = http.MethodGet, "/docs/"+name
		ui(w, asset)
	}
}

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
