package httpapi

import (
	"context"
	"log/slog"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/melodia/orchestrator/internal/task"
)

// A request of a common size.
const benchBody = `{"url":"https://plays.melodia.example/v1/plays","payload":{"song_id":4211,"user_id":77120,"at":"2026-11-24T12:00:00Z","tags":["rock","live"],"device":{"kind":"phone","app":"5.11.2"}},"headers":{"X-Tenant":"melodia"},"labels":{"kind":"play"},"timeout_seconds":10,"retry":{"max_attempts":5,"min_backoff_seconds":0.5}}`

type quickStore struct{ fakeStore }

func (*quickStore) Insert(_ context.Context, t *task.Task) error {
	t.RunAt, t.CreatedAt = storedAt, storedAt
	return nil
}

type quickDispatcher struct{ fakeDispatcher }

func (*quickDispatcher) Notify(time.Duration) {}

// quickWriter is a response writer that keeps nothing.
type quickWriter struct {
	header http.Header
	status int
}

func (w *quickWriter) Header() http.Header         { return w.header }
func (w *quickWriter) WriteHeader(status int)      { w.status = status }
func (w *quickWriter) Write(b []byte) (int, error) { return len(b), nil }

func (w *quickWriter) SetReadDeadline(time.Time) error { return nil }

type body struct{ strings.Reader }

func (*body) Close() error { return nil }

// BenchmarkEnqueue is the way of POST /enqueue through the whole router, with
// a store that does nothing.
func BenchmarkEnqueue(b *testing.B) {
	ids := countingIDs()
	api := New(Options{
		Store: &quickStore{}, Dispatcher: &quickDispatcher{}, Policy: fakePolicy(nil),
		Defaults: task.Spec{Timeout: 30 * time.Second, Retry: task.DefaultRetryPolicy()},
		NewID:    ids, Version: "1", ExampleURL: target, Log: slog.New(slog.DiscardHandler),
	})
	r, err := http.NewRequestWithContext(b.Context(), http.MethodPost, "/enqueue", http.NoBody)
	if err != nil {
		b.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("Accept", "*/*")
	r.ContentLength = int64(len(benchBody))
	b.ReportAllocs()
	b.SetBytes(int64(len(benchBody)))
	for b.Loop() {
		one := *r
		in := new(body)
		in.Reset(benchBody)
		one.Body = in
		w := &quickWriter{header: make(http.Header, 8)}
		api.ServeHTTP(w, &one)
		if w.status != http.StatusAccepted {
			b.Fatalf("got status %d, want 202", w.status)
		}
	}
}

// BenchmarkDecode is what huma does with a body: once to validate it, once to fill in the type.
func BenchmarkDecode(b *testing.B) {
	for name, text := range map[string]string{
		"small":  `{"url":"https://plays.melodia.example/v1/plays","payload":{"song_id":42}}`,
		"common": benchBody,
		"64KiB":  `{"url":"https://plays.melodia.example/v1/plays","payload":[` + strings.Repeat(`{"song_id":4211,"at":"2026-11-24T12:00:00Z"},`, 1400) + `{}]}`,
	} {
		b.Run(name, func(b *testing.B) {
			data := []byte(text)
			b.ReportAllocs()
			b.SetBytes(int64(len(data)))
			for b.Loop() {
				var tree any
				var request TaskRequest
				if err := decode(data, &tree); err != nil {
					b.Fatal(err)
				}
				if err := decode(data, &request); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
