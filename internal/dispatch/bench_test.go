package dispatch

import (
	"context"
	"fmt"
	"log/slog"
	"sync/atomic"
	"testing"
	"time"

	"github.com/melodia/orchestrator/internal/task"
)

// plenty is a store that costs nothing and has b.N tasks due.
type plenty struct {
	memory
	claims   []task.Claim
	next     int // used by the claim loop alone
	finished atomic.Int64
	done     chan struct{}
}

func (p *plenty) Register(context.Context, task.ID, string, int) error { return nil }
func (p *plenty) Heartbeat(context.Context, task.ID) (bool, error)     { return true, nil }

func (p *plenty) Cancelled(context.Context, task.ID) (map[task.ID]int64, error) { return nil, nil }
func (p *plenty) Unregister(context.Context, task.ID) error                     { return nil }
func (p *plenty) Expire(context.Context, int) (int, error)                      { return 0, nil }
func (p *plenty) KeepHistory(context.Context, time.Duration, int) error         { return nil }
func (p *plenty) NextDue(context.Context) (time.Duration, bool, error) {
	return 0, p.next < len(p.claims), nil
}
func (p *plenty) Reap(context.Context, task.ID, []task.ID, time.Duration) ([]task.ID, error) {
	return nil, nil
}

func (p *plenty) Hosts(context.Context) ([]task.Host, error)                    { return nil, nil }
func (p *plenty) Lanes(context.Context, task.Lane, int) ([]task.LaneDue, error) { return nil, nil }

func (p *plenty) Claim(_ context.Context, _ task.ID, limit int) ([]*task.Claim, error) {
	claims := make([]*task.Claim, 0, limit)
	for len(claims) < limit && p.next < len(p.claims) {
		claims = append(claims, &p.claims[p.next])
		p.next++
	}
	return claims, nil
}

func (p *plenty) Finish(_ *task.Claim, _ task.Decision, then func(matched, calledBack bool, err error)) {
	then(true, false, nil)
	if p.finished.Add(1) == int64(len(p.claims)) {
		close(p.done)
	}
}

// BenchmarkTask is what the dispatcher itself costs a task that succeeds at
// its first attempt.
func BenchmarkTask(b *testing.B) {
	for _, concurrency := range []int{1, 10, 200} {
		b.Run(fmt.Sprintf("concurrency=%d", concurrency), func(b *testing.B) {
			p := &plenty{claims: make([]task.Claim, b.N), done: make(chan struct{})}
			t := &task.Task{Spec: task.Spec{URL: "https://plays.melodia.app/plays", Retry: task.DefaultRetryPolicy()}}
			for i := range p.claims {
				p.claims[i] = task.Claim{Task: t, Number: 1}
			}
			o := options()
			o.Concurrency = concurrency
			o.NewID = func() task.ID { return newID('w', 1) }
			o.Log = slog.New(slog.DiscardHandler)
			d := New(o, p, deliverFunc(func(context.Context, task.Call) task.Outcome { return succeeded }))
			ctx, stop := context.WithCancel(b.Context())
			ended := make(chan struct{})
			b.ReportAllocs()
			b.ResetTimer()
			go func() {
				defer close(ended)
				d.Run(ctx)
			}()
			<-p.done
			b.StopTimer()
			stop()
			<-ended
		})
	}
}
