//go:build faults

package postgres_test

import (
	"maps"
	"slices"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/melodia/orchestrator/internal/postgres"
	"github.com/melodia/orchestrator/internal/postgres/pgtest"
	"github.com/melodia/orchestrator/internal/task"
)

const historyDays = 30

// openAmongMillions is openForBenchmark with 1 million live and 5 million ended
// tasks, which take two minutes to store.
func openAmongMillions(b *testing.B) *postgres.Store {
	b.Helper()
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
	fill(b, pool, filling{live: 1_000_000, ended: 5_000_000, failed: 33, cancelled: 100, days: historyDays})
	return s
}

// One operation is 5,000 tasks on their way through an empty database and through
// a full one, in turn. Told are the microseconds that each step takes per task,
// and how much more of them among millions.
func BenchmarkWayAmongMillions(b *testing.B) {
	const tasks = 5000
	full := openAmongMillions(b)
	empty, emptyWorker := openForBenchmark(b)
	fullWorker := newID()
	if err := full.Register(b.Context(), fullWorker, b.Name(), 200); err != nil {
		b.Fatal(err)
	}
	if err := empty.KeepHistory(b.Context(), retention, 7); err != nil {
		b.Fatal(err)
	}
	way := func(s *postgres.Store, worker task.ID) (took [3]time.Duration) {
		took[0] = lasting(func() { insertMany(b, s, tasks) })
		var all []*task.Claim
		took[1] = lasting(func() {
			for len(all) < tasks {
				claims, err := s.Claim(b.Context(), worker, min(100, tasks-len(all)))
				if err != nil || len(claims) == 0 {
					b.Fatalf("Claim = %d tasks, %v", len(claims), err)
				}
				all = append(all, claims...)
			}
		})
		took[2] = lasting(func() { finishAll(b.Context(), b, s, all) })
		return took
	}
	way(full, fullWorker) // carries out what was overdue
	way(empty, emptyWorker)
	var inEmpty, inFull [3][]float64
	for b.Loop() {
		e, f := way(empty, emptyWorker), way(full, fullWorker)
		for i := range e {
			inEmpty[i] = append(inEmpty[i], e[i].Seconds()*1e6/tasks)
			inFull[i] = append(inFull[i], f[i].Seconds()*1e6/tasks)
		}
	}
	for i, step := range []string{"insert", "claim", "finish"} {
		slices.Sort(inEmpty[i])
		slices.Sort(inFull[i])
		e, f := inEmpty[i][len(inEmpty[i])/2], inFull[i][len(inFull[i])/2]
		b.ReportMetric(e, step+"-µs")
		b.ReportMetric((f/e-1)*100, step+"-%more")
	}
}

func lasting(f func()) time.Duration {
	begin := time.Now() //nolint:forbidigo // how long, not when
	f()
	return time.Since(begin) //nolint:forbidigo // how long, not when
}

// One operation is the first page of a search over 1 million live and 5 million
// ended tasks of 30 days.
func BenchmarkFindAmongMillions(b *testing.B) {
	s := openAmongMillions(b)
	now, err := s.Now(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	common, others := searches(now, historyDays)
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
