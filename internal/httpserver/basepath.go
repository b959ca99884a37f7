package httpserver

import (
	"context"
	"net/http"
	"net/netip"
	"net/url"
	"regexp"
	"strings"
)

// pathPrefix is what a gateway may serve the service under. In a link nothing of it can be
// read as another host, and nothing as the folder above.
var pathPrefix = regexp.MustCompile(`^(/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)+$`)

// maxPrefix bounds a prefix, in bytes.
const maxPrefix = 200

// IsPathPrefix reports whether a gateway may serve the service under a path: segments of
// letters, digits and - . _ ~, each behind a slash, without one at the end.
func IsPathPrefix(path string) bool {
	return len(path) <= maxPrefix && pathPrefix.MatchString(path)
}

// prefixKey is that of the prefix in a request's context.
type prefixKey struct{}

// PrefixOf returns the path under which the caller of r reaches the service: what links
// in answers begin with. It is mostly empty.
func PrefixOf(r *http.Request) string {
	prefix, _ := r.Context().Value(prefixKey{}).(string)
	return prefix
}

// BehindGateway serves requests with or without [Options].BasePath before their path, and
// tells handlers by [PrefixOf] what links begin with: BasePath, or what a trusted proxy
// says in X-Forwarded-Prefix that it has taken away.
func (d *Door) BehindGateway(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if d.o.BasePath == "" && len(d.o.TrustedProxies) == 0 {
			next.ServeHTTP(w, r)
			return
		}
		prefix := d.o.BasePath
		if said, ok := d.forwardedPrefix(r); ok {
			prefix = said
		}
		r = r.WithContext(context.WithValue(r.Context(), prefixKey{}, prefix))
		if path, ok := withoutPrefix(r.URL.Path, d.o.BasePath); ok {
			if raw, ok := withoutPrefix(r.URL.RawPath, d.o.BasePath); ok || r.URL.RawPath == "" {
				u := new(url.URL)
				*u = *r.URL
				u.Path, u.RawPath = path, raw
				r.URL = u // r is a copy already
			}
		}
		next.ServeHTTP(w, r)
	})
}

// withoutPrefix returns a path below prefix as it is without it.
func withoutPrefix(path, prefix string) (rest string, ok bool) {
	rest, ok = strings.CutPrefix(path, prefix)
	switch {
	case !ok || prefix == "":
		return path, false
	case rest == "":
		return "/", true
	case rest[0] != '/':
		return path, false // another name, which begins alike
	}
	return rest, true
}

// forwardedPrefix returns what X-Forwarded-Prefix says, if a trusted proxy says it once and
// a link may begin with it. Anyone else could have links lead elsewhere.
func (d *Door) forwardedPrefix(r *http.Request) (prefix string, ok bool) {
	said := r.Header["X-Forwarded-Prefix"]
	if len(said) != 1 || len(d.o.TrustedProxies) == 0 {
		return "", false
	}
	peer, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return "", false
	}
	address := peer.Addr().Unmap().WithZone("")
	for _, network := range d.o.TrustedProxies {
		if network.Contains(address) {
			prefix = strings.TrimSuffix(said[0], "/")
			return prefix, prefix == "" || IsPathPrefix(prefix)
		}
	}
	return "", false
}
