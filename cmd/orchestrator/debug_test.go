package main

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/melodia/orchestrator/internal/httpapi"
)

// A page whose name was made to lead to the loopback address reads no profile.
func TestProfilesRefuseOtherHosts(t *testing.T) {
	t.Parallel()
	reached := 0
	server := httptest.NewServer(onlyLoopback(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { reached++ })))
	t.Cleanup(server.Close)
	for host, want := range map[string]int{
		"127.0.0.1": 200, "127.0.0.1:6060": 200, "localhost": 200, "localhost:1": 200, "LocalHost:80": 200, "[::1]": 200, "[::1]:6060": 200,
		"evil.example": 421, "evil.example:6060": 421, "localhost.evil.example": 421, "127.0.0.1.evil.example": 421, "evil.example#localhost": 421,
		"127.0.0.2": 421, "0.0.0.0:6060": 421, "[::]": 421, "[::ffff:127.0.0.1]:6060": 421, "127.1": 421, "169.254.169.254": 421, "localhost.": 421,
		"localhost,evil.example": 421,
	} {
		for _, path := range []string{"/debug/pprof/", "/debug/pprof/heap", "/"} {
			r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, server.URL+path, http.NoBody)
			if err != nil {
				t.Fatal(err)
			}
			r.Host = host
			reached = 0
			response, err := http.DefaultClient.Do(r)
			if err != nil {
				t.Fatalf("%s: %v", host, err)
			}
			var p httpapi.Problem
			if want == http.StatusMisdirectedRequest {
				if err := json.NewDecoder(response.Body).Decode(&p); err != nil || p.Status != want || p.Instance == "" || response.Header.Get("Content-Type") != "application/problem+json" {
					t.Errorf("Host: %s answers %+v, %v, want a problem", host, p, err)
				}
			}
			response.Body.Close()
			if response.StatusCode != want || (reached == 1) != (want == http.StatusOK) {
				t.Errorf("Host: %s: %s = %d, reached %d, want %d", host, path, response.StatusCode, reached, want)
			}
		}
	}
}
