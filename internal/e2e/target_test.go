package e2e

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// target is a server that the tasks of a test call.
type target struct {
	url string

	mu    sync.Mutex
	calls map[string][]call // by path
}

type call struct {
	at     time.Time
	method string
	header http.Header
	body   string
}

// newTarget answers the nth call (from 1) of a path with handle.
func newTarget(t *testing.T, handle func(w http.ResponseWriter, r *http.Request, nth int)) *target {
	t.Helper()
	target := &target{calls: map[string][]call{}}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		target.mu.Lock()
		target.calls[r.URL.Path] = append(target.calls[r.URL.Path], call{time.Now(), r.Method, r.Header, string(body)})
		nth := len(target.calls[r.URL.Path])
		target.mu.Unlock()
		handle(w, r, nth)
	}))
	t.Cleanup(server.Close)
	target.url = server.URL
	return target
}

func (t *target) got(path string) []call {
	t.mu.Lock()
	defer t.mu.Unlock()
	return append([]call(nil), t.calls[path]...)
}

// statusOf lets a path say what is answered: /200, /503/name.
func statusOf(w http.ResponseWriter, r *http.Request, _ int) {
	code, err := strconv.Atoi(strings.Split(r.URL.Path, "/")[1])
	if err != nil {
		code = http.StatusOK
	}
	w.WriteHeader(code)
	fmt.Fprintf(w, "answered %d", code)
}
