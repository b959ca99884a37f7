package httpapi

import (
	"context"
	"log/slog"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/melodia/orchestrator/internal/auth"
	"github.com/melodia/orchestrator/internal/httpserver"
	"github.com/melodia/orchestrator/internal/task"
)

// A request of a common size.
const benchBody = `{"url":"https://plays.melodia.example/v1/plays","payload":{"song_id":4211,"user_id":77120,"at":"2026-11-24T12:00:00Z","tags":["rock","live"],"device":{"kind":"phone","app":"5.11.2"}},"headers":{"X-Tenant":"melodia"},"labels":{"kind":"play"},"timeout_seconds":10,"retry":{"max_attempts":5,"min_backoff_seconds":0.5}}`

type quickDispatcher struct{ fakeDispatcher }

func (*quickDispatcher) Submit(_ context.Context, t *task.Task) error {
	t.RunAt, t.CreatedAt = storedAt, storedAt
	return nil
}

func (*quickDispatcher) SubmitBatch(_ context.Context, b *task.Batch) error {
	for _, t := range b.Tasks {
		t.RunAt, t.CreatedAt = storedAt, storedAt
	}
	return nil
}

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

func newQuickAPI(by interface {
	Authenticate(ctx context.Context, header http.Header) (principal string, scopes []string, err error)
}) *API {
	o := settings{Options: Options{
		Store: &fakeStore{}, Dispatcher: &quickDispatcher{},
		Defaults: task.Spec{Timeout: 30 * time.Second, Retry: task.DefaultRetryPolicy()},
		Version:  "1", ExampleURL: target, Log: slog.New(slog.DiscardHandler),
	}, NewID: countingIDs()}
	o.Intake = o.newIntake(&fakeStore{}, &quickDispatcher{})
	o.Guard = httpserver.NewGuard(httpserver.Options{Authenticator: by, NewID: o.NewID, Log: o.Log})
	return New(o.Options)
}

// benchmarkPost is the way of one request through the whole router, with a store
// that does nothing.
func benchmarkPost(b *testing.B, api *API, path, key, text string) {
	b.Helper()
	r, err := http.NewRequestWithContext(b.Context(), http.MethodPost, path, http.NoBody)
	if err != nil {
		b.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("Accept", "*/*")
	r.Header.Set("Authorization", "Bearer "+key)
	r.ContentLength = int64(len(text))
	b.ReportAllocs()
	b.SetBytes(int64(len(text)))
	for b.Loop() {
		one := *r
		in := new(body)
		in.Reset(text)
		one.Body = in
		w := &quickWriter{header: make(http.Header, 8)}
		api.ServeHTTP(w, &one)
		if w.status != http.StatusAccepted {
			b.Fatalf("got status %d, want 202", w.status)
		}
	}
}

// One operation is a batch of 1000 tasks, each as in BenchmarkEnqueue.
func BenchmarkBatch(b *testing.B) {
	items := make([]string, task.MaxBatch)
	for i := range items {
		items[i] = benchBody
	}
	benchmarkPost(b, newQuickAPI(new(fakeCallers)), "/tasks/batch", "", batchOf(items...))
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/task.MaxBatch, "ns/task")
}

func BenchmarkEnqueue(b *testing.B) {
	key, entry, err := auth.NewKey("plays", "submit", Scopes())
	if err != nil {
		b.Fatal(err)
	}
	for name, o := range map[string]auth.Options{"none": {Methods: []string{"none"}}, "api_key": {Methods: []string{"api_key"}, APIKeys: []string{entry}}} {
		b.Run(name, func(b *testing.B) {
			o.Scopes = Scopes()
			by, err := auth.New(o)
			if err != nil {
				b.Fatal(err)
			}
			benchmarkPost(b, newQuickAPI(by), "/enqueue", key, benchBody)
		})
	}
}

// BenchmarkRead is how a body becomes a task.
func BenchmarkRead(b *testing.B) {
	api := newQuickAPI(new(fakeCallers))
	for name, text := range map[string]string{
		"small":  `{"url":"https://plays.melodia.example/v1/plays","payload":{"song_id":42}}`,
		"common": benchBody,
		"64KiB":  `{"url":"https://plays.melodia.example/v1/plays","payload":[` + strings.Repeat(`{"song_id":4211,"at":"2026-11-24T12:00:00Z"},`, 1400) + `{}]}`,
	} {
		b.Run(name, func(b *testing.B) {
			body := []byte(text)
			b.ReportAllocs()
			b.SetBytes(int64(len(body)))
			for b.Loop() {
				asked := new(TaskRequest)
				if found, err := api.parseText(body, asked, Loc{"body"}); err != nil || found != nil {
					b.Fatal(found, err)
				}
				if _, err := api.newTask(b.Context(), asked, nil); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
