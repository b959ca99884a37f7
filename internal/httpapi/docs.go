package httpapi

import (
	"io"
	"io/fs"
	"net/http"
	"strings"
	"sync"
	"time"

	swaggerfiles "github.com/swaggo/files/v2"
)

func redirectToDocs(w http.ResponseWriter, r *http.Request) {
	http.Redirect(w, r, "/docs/index.html", http.StatusMovedPermanently)
}

// docsPolicy is what the page may do: run the scripts and styles that come from
// here, show images of its own (those in its style are data), and call this
// service. Whoever puts a script into a text that it shows gets nothing out of it.
const docsPolicy = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; " +
	"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

// initializer stands in for the file of the same name that comes with Swagger
// UI, and shows our document. Credentials that are typed in last until the page
// is left.
const (
	initializerName = "swagger-initializer.js"
	initializer     = `window.onload = function() {
  window.ui = SwaggerUIBundle({
    url: "/openapi.json",
    dom_id: "#swagger-ui",
    deepLinking: true,
    displayRequestDuration: true,
    persistAuthorization: false,
    validatorUrl: null,
    presets: [SwaggerUIBundle.presets.apis],
    layout: "BaseLayout"
  });
};
`
)

// docs serves Swagger UI; all its assets are in the binary.
func (a *API) docs(w http.ResponseWriter, r *http.Request) {
	name := strings.TrimPrefix(r.URL.Path, "/docs/")
	asset, err := openAsset(name)
	if err != nil {
		a.notFound(w, r)
		return
	}
	w.Header().Set("Cache-Control", "no-cache")
	w.Header().Set("Content-Security-Policy", docsPolicy)
	http.ServeContent(w, r, name, time.Time{}, asset)
}

// openAsset opens a file of Swagger UI. It needs no closing.
func openAsset(name string) (io.ReadSeeker, error) {
	if name == initializerName {
		return strings.NewReader(initializer), nil
	}
	file, err := swaggerfiles.FS.Open(name)
	if err != nil {
		return nil, err
	}
	asset, ok := file.(io.ReadSeeker)
	if !ok {
		return nil, fs.ErrNotExist // a folder
	}
	return asset, nil
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
