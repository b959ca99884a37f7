package postgres_test

import (
	"context"
	"sync"
	"testing"

	"github.com/melodia/orchestrator/internal/postgres"
	"github.com/melodia/orchestrator/internal/postgres/pgtest"
	"github.com/melodia/orchestrator/internal/task"
)

func openForBenchmark(b *testing.B) (*postgres.Store, task.ID) {
	b.Helper()
	s, err := postgres.Open(b.Context(), postgres.Options{URL: pgtest.URL(b), MaxConns: 10})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(s.Close)
	worker := newID()
	if err := s.Register(b.Context(), worker, b.Name(), 200); err != nil {
		b.Fatal(err)
	}
	return s, worker
}

// insertMany stores n tasks by as many callers as a busy service has.
func insertMany(b *testing.B, s *postgres.Store, n int) {
	b.Helper()
	const callers = 64
	var inserting sync.WaitGroup
	for caller := range callers {
		inserting.Go(func() {
			for i := caller; i < n; i += callers {
				if err := s.Insert(b.Context(), newTask()); err != nil {
					b.Error(err)
				}
			}
		})
	}
	inserting.Wait()
}

// One operation is one task, stored by one of 64 callers.
func BenchmarkInsert(b *testing.B) {
	s, _ := openForBenchmark(b)
	b.ReportAllocs()
	b.ResetTimer()
	insertMany(b, s, b.N)
}

// One operation is one task, claimed in a batch of 100.
func BenchmarkClaim(b *testing.B) {
	s, worker := openForBenchmark(b)
	insertMany(b, s, b.N)
	b.ReportAllocs()
	b.ResetTimer()
	for left := b.N; left > 0; {
		claims, err := s.Claim(b.Context(), worker, 100)
		if err != nil || len(claims) == 0 {
			b.Fatalf("Claim = %d tasks, %v", len(claims), err)
		}
		left -= len(claims)
	}
}

// One operation is one task that succeeds, with 200 callers that finish at once.
func BenchmarkFinish(b *testing.B) {
	s, worker := openForBenchmark(b)
	insertMany(b, s, b.N)
	if err := s.KeepHistory(b.Context(), retention, 7); err != nil {
		b.Fatal(err)
	}
	var all []*task.Claim
	for len(all) < b.N {
		claims, err := s.Claim(b.Context(), worker, 256)
		if err != nil || len(claims) == 0 {
			b.Fatalf("Claim = %d tasks, %v", len(claims), err)
		}
		all = append(all, claims...)
	}
	b.ReportAllocs()
	b.ResetTimer()
	finishAll(b.Context(), b, s, all)
}

func finishAll(ctx context.Context, b *testing.B, s *postgres.Store, claims []*task.Claim) {
	b.Helper()
	const callers = 200
	var finishing sync.WaitGroup
	for caller := range callers {
		finishing.Go(func() {
			for i := caller; i < len(claims); i += callers {
				if matched, _, err := write(s, claims[i], succeeded(claims[i])); err != nil || !matched {
					b.Errorf("Finish = %v, %v", matched, err)
				}
			}
		})
	}
	finishing.Wait()
}
