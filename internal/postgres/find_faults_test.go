//go:build faults

package postgres_test

import (
	"maps"
	"slices"
	"testing"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/melodia/orchestrator/internal/postgres"
	"github.com/melodia/orchestrator/internal/postgres/pgtest"
	"github.com/melodia/orchestrator/internal/task"
)

// One operation is the first page of a search over 1 million live and 5 million
// ended tasks of 30 days, which take two minutes to store.
func BenchmarkFindAmongMillions(b *testing.B) {
	url := pgtest.URL(b)
	s, err := postgres.Open(b.Context(), postgres.Options{URL: url, MaxConns: 10})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(s.Close)
	pool, err := pgxpool.New(b.Context(), url)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(pool.Close)
	const days = 30
	fill(b, pool, filling{live: 1_000_000, ended: 5_000_000, failed: 33, cancelled: 100, days: days})
	now, err := s.Now(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	common, others := searches(now, days)
	for _, kind := range []map[string]task.Filter{common, others} {
		for _, name := range slices.Sorted(maps.Keys(kind)) {
			f := kind[name]
			b.Run(name, func(b *testing.B) {
				for b.Loop() {
					if _, err := s.Find(b.Context(), &f, task.Position{}, 51); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
	b.Run("counts", func(b *testing.B) {
		for b.Loop() {
			if _, _, err := s.Counts(b.Context()); err != nil {
				b.Fatal(err)
			}
		}
	})
	first, err := s.Find(b.Context(), &task.Filter{States: []task.State{task.Pending}}, task.Position{}, 1)
	if err != nil || len(first) != 1 {
		b.Fatal(first, err)
	}
	b.Run("explain", func(b *testing.B) {
		for b.Loop() {
			if _, _, err := s.Explain(b.Context(), first[0].ID, lease); err != nil {
				b.Fatal(err)
			}
		}
	})
}
