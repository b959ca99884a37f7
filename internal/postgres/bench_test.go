package postgres_test

import (
	"context"
	"fmt"
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

// One operation is one task, claimed in batches of 100 from lanes whose queue or keys have a limit.
func BenchmarkClaimLanes(b *testing.B) {
	for name, bb := range map[string]struct{ queues, keys, most int }{
		"10 queues":       {10, 0, 10},
		"50 keys, 2 each": {1, 50, 2},
	} {
		b.Run(name, func(b *testing.B) {
			s, worker := openForBenchmark(b)
			queue := func(n int) string { return fmt.Sprint("q", n%bb.queues) }
			key := func(n int) string {
				if bb.keys == 0 {
					return ""
				}
				return fmt.Sprint(n / bb.most)
			}
			for n := range bb.queues {
				q := task.Queue{Name: queue(n)}
				q.MaxConcurrent, q.PerKey.MaxConcurrent = 1_000_000, bb.most
				if _, err := s.PutQueue(b.Context(), q); err != nil {
					b.Fatal(err)
				}
			}
			for first := 0; first < b.N; first += 500 {
				var some task.Batch
				for n := first; n < min(first+500, b.N); n++ {
					some.Tasks = append(some.Tasks, newTask(inQueue(queue(n), key(n), task.Normal)))
				}
				if err := s.InsertBatch(b.Context(), &some); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportAllocs()
			b.ResetTimer()
			for claimed := 0; claimed < b.N; {
				var asks []task.LaneAsk
				for n := range max(bb.keys, bb.queues) {
					asks = append(asks, task.LaneAsk{Lane: task.LaneOf(queue(n), key(claimed+n*bb.most), ""), Most: bb.most})
				}
				claims, _, err := s.ClaimLanes(b.Context(), worker, asks, nil, 100)
				if err != nil || len(claims) == 0 {
					b.Fatalf("ClaimLanes = %d tasks, %v, after %d", len(claims), err, claimed)
				}
				claimed += len(claims)
			}
		})
	}
}
