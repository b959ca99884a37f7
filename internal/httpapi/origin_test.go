package httpapi

import (
	"net/http"
	"testing"
)

// A page that somebody's browser shows must not be able to have calls made.
func TestOtherSitesAreRefused(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		header []string
		want   int
	}{
		"a service":             {nil, http.StatusAccepted},
		"Swagger UI":            {[]string{"Sec-Fetch-Site", "same-origin"}, http.StatusAccepted},
		"typed by the user":     {[]string{"Sec-Fetch-Site", "none"}, http.StatusAccepted},
		"another site":          {[]string{"Sec-Fetch-Site", "cross-site"}, http.StatusForbidden},
		"another host, same IP": {[]string{"Sec-Fetch-Site", "same-site"}, http.StatusForbidden},
		"an older browser":      {[]string{"Origin", "https://evil.example"}, http.StatusForbidden},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newService(t)
			if a := s.post("/enqueue", with("payload", "1"), tt.header...); a.status != tt.want {
				t.Errorf("got %d %s, want %d", a.status, a.text, tt.want)
			}
		})
	}
}
