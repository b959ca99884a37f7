package batch_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/melodia/orchestrator/internal/batch"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	errRow  = errors.New("one of the rows is bad")
	errGone = errors.New("the other side is gone")
)

func isRow(err error) bool { return errors.Is(err, errRow) }

// answer is what a good flush returns for an input.
func answer(in int) string { return fmt.Sprintf("answer to %d", in) }

// recorder is the other side of a Batcher: it notes what it is asked.
type recorder struct {
	// respond decides a flush; nil answers at once.
	respond func(ctx context.Context, inputs []int) ([]string, error)

	mu      sync.Mutex
	batches [][]int
	under   int // flushes under way
	most    int // the most that ever were
}

func (r *recorder) flush(ctx context.Context, inputs []int) ([]string, error) {
	r.mu.Lock()
	r.batches = append(r.batches, slices.Clone(inputs))
	r.under++
	r.most = max(r.most, r.under)
	r.mu.Unlock()
	defer func() {
		r.mu.Lock()
		r.under--
		r.mu.Unlock()
	}()
	if r.respond == nil {
		return answers(inputs), nil
	}
	return r.respond(ctx, inputs)
}

// seen returns the batches so far, in the order in which they began.
func (r *recorder) seen() [][]int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.batches)
}

func answers(inputs []int) []string {
	out := make([]string, len(inputs))
	for i, in := range inputs {
		out[i] = answer(in)
	}
	return out
}

// after answers well, but only after d.
func after(d time.Duration) func(context.Context, []int) ([]string, error) {
	return func(_ context.Context, inputs []int) ([]string, error) {
		time.Sleep(d) // a bubble's time
		return answers(inputs), nil
	}
}

// result is what a caller of Do got, and when, counted from the test's start.
type result struct {
	out string
	err error
	at  time.Duration
}

// callers calls Do for each input in a goroutine of its own, in order, and
// returns when all of them wait for their result.
type callers struct {
	b       *batch.Batcher[int, string]
	start   time.Time
	wg      sync.WaitGroup
	mu      sync.Mutex
	results map[int]result
}

func newCallers(b *batch.Batcher[int, string]) *callers {
	return &callers{b: b, start: time.Now(), results: make(map[int]result)}
}

func (c *callers) call(ctx context.Context, inputs ...int) {
	for _, in := range inputs {
		c.wg.Go(func() {
			out, err := c.b.Do(ctx, in)
			c.mu.Lock()
			defer c.mu.Unlock()
			c.results[in] = result{out: out, err: err, at: time.Since(c.start)}
		})
		synctest.Wait()
	}
}

// wait returns every caller's result.
func (c *callers) wait() map[int]result {
	c.wg.Wait()
	return c.results
}

func wantAnswers(t *testing.T, results map[int]result, inputs ...int) {
	t.Helper()
	for _, in := range inputs {
		got, ok := results[in]
		if !ok || got.err != nil || got.out != answer(in) {
			t.Errorf("Do(%d) = %q, %v (returned: %t), want %q, nil", in, got.out, got.err, ok, answer(in))
		}
	}
}

func wantBatches(t *testing.T, r *recorder, want ...[]int) {
	t.Helper()
	if diff := cmp.Diff(want, r.seen()); diff != "" {
		t.Errorf("batches (-want +got):\n%s", diff)
	}
}

func upTo(n int) []int {
	inputs := make([]int, n)
	for i := range inputs {
		inputs[i] = i
	}
	return inputs
}

func TestAloneIsServedAtOnceAndAlone(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := &recorder{}
		b := batch.New(batch.Options{MaxSize: 100, MaxFlushes: 1}, r.flush)
		start := time.Now()
		for in := range 3 {
			out, err := b.Do(t.Context(), in)
			if err != nil || out != answer(in) {
				t.Errorf("Do(%d) = %q, %v, want %q, nil", in, out, err, answer(in))
			}
		}
		if waited := time.Since(start); waited != 0 {
			t.Errorf("waited %v for flushes that take no time, want 0", waited)
		}
		wantBatches(t, r, []int{0}, []int{1}, []int{2})
	})
}

func TestLargeBatchesGatherTheNext(t *testing.T) {
	t.Parallel()
	const flush, gather, gatherSlow = 10 * time.Millisecond, time.Millisecond, 20 * time.Millisecond
	for name, test := range map[string]struct {
		flush  time.Duration // what each takes
		first  int           // how many call at once
		second []int         // who calls while their batch is flushed
		third  []int         // who calls half a gathering later
		begins time.Duration // when the flush of the second begins
		want   []int         // who is in it
	}{
		"after many":             {flush, 9, []int{9}, []int{10, 11}, 2*flush + gather, []int{9, 10, 11}},
		"not after few":          {flush, 8, []int{8}, []int{9, 10}, 2 * flush, []int{8}},
		"not when full":          {flush, 33, upTo(65)[33:], []int{65}, 2 * flush, upTo(65)[33:]},
		"who comes only then":    {flush, 9, nil, []int{9}, 2*flush + gather, []int{9}},
		"longer when slow":       {6 * gatherSlow / 4, 9, []int{9}, []int{10}, 2*6*gatherSlow/4 + 3*gatherSlow/4, []int{9, 10}},
		"not for long when slow": {4 * gatherSlow, 9, []int{9}, []int{10}, 8*gatherSlow + gatherSlow, []int{9, 10}},
		"not when slow and few":  {4 * gatherSlow, 8, []int{8}, []int{9}, 8 * gatherSlow, []int{8}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r := &recorder{respond: after(test.flush)}
				b := batch.New(batch.Options{MaxSize: 32, MaxFlushes: 1, Gather: gather, GatherSlow: gatherSlow}, r.flush)
				c := newCallers(b)
				c.call(t.Context(), upTo(test.first)...) // the first alone, then the rest
				time.Sleep(test.flush + test.flush/2)
				c.call(t.Context(), test.second...)
				time.Sleep(test.flush/2 + gather/2)
				c.call(t.Context(), test.third...)
				results := c.wait()
				batches := r.seen()
				if diff := cmp.Diff(test.want, batches[2]); diff != "" {
					t.Errorf("third batch (-want +got):\n%s", diff)
				}
				if got := results[test.want[0]].at; got != test.begins+test.flush {
					t.Errorf("the third flush began after %v, want %v", got-test.flush, test.begins)
				}
			})
		})
	}
}

func TestCallersRideTogether(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		options batch.Options
		calls   int
		want    [][]int
		flushes int
		last    time.Duration
	}{
		"one flush at a time": {
			options: batch.Options{MaxSize: 4, MaxFlushes: 1}, calls: 11,
			want:    [][]int{{0}, {1, 2, 3, 4}, {5, 6, 7, 8}, {9, 10}},
			flushes: 1, last: 4 * time.Second,
		},
		"no limit that matters": {
			options: batch.Options{MaxSize: 100, MaxFlushes: 1}, calls: 11,
			want:    [][]int{{0}, {1, 2, 3, 4, 5, 6, 7, 8, 9, 10}},
			flushes: 1, last: 2 * time.Second,
		},
		"several flushes at a time": {
			options: batch.Options{MaxSize: 3, MaxFlushes: 2}, calls: 8,
			want:    [][]int{{0}, {1, 2, 3}, {4, 5, 6}, {7}},
			flushes: 2, last: 2 * time.Second,
		},
		"limits that were left out are one": {
			calls: 3, want: [][]int{{0}, {1}, {2}},
			flushes: 1, last: 3 * time.Second,
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r := &recorder{respond: after(time.Second)}
				c := newCallers(batch.New(test.options, r.flush))
				c.call(t.Context(), upTo(test.calls)...)
				results := c.wait()

				wantAnswers(t, results, upTo(test.calls)...)
				got := r.seen()
				slices.SortFunc(got, func(a, b []int) int { return a[0] - b[0] }) // two begin at the same moment
				if diff := cmp.Diff(test.want, got); diff != "" {
					t.Errorf("batches (-want +got):\n%s", diff)
				}
				if r.most != test.flushes {
					t.Errorf("%d flushes ran at a time, want %d", r.most, test.flushes)
				}
				if got := results[test.calls-1].at; got != test.last {
					t.Errorf("the last caller had its result after %v, want %v", got, test.last)
				}
			})
		})
	}
}

func TestIsolate(t *testing.T) {
	t.Parallel()
	const n = 16
	tests := map[string]struct {
		bad     []int
		flushes int // of the batch of n
	}{
		// Each halving on the way to a guilty one costs two flushes.
		"none":           {bad: nil, flushes: 1},
		"the first":      {bad: []int{0}, flushes: 1 + 2*4},
		"the last":       {bad: []int{n - 1}, flushes: 1 + 2*4},
		"one in between": {bad: []int{6}, flushes: 1 + 2*4},
		"two neighbours": {bad: []int{6, 7}, flushes: 1 + 2*4},
		"far apart":      {bad: []int{0, n - 1}, flushes: 1 + 2 + 2*6},
		"all":            {bad: upTo(n), flushes: 2*n - 1},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r := &recorder{respond: func(_ context.Context, inputs []int) ([]string, error) {
					time.Sleep(time.Second)
					for _, in := range inputs {
						if slices.Contains(test.bad, in) {
							return nil, fmt.Errorf("%w: %d", errRow, in)
						}
					}
					return answers(inputs), nil
				}}
				c := newCallers(batch.New(batch.Options{MaxSize: n, MaxFlushes: 1, Isolate: isRow}, r.flush))
				c.call(t.Context(), -1) // keeps the others waiting until they are a batch
				c.call(t.Context(), upTo(n)...)
				results := c.wait()

				for in := range n {
					if !slices.Contains(test.bad, in) {
						wantAnswers(t, results, in)
						continue
					}
					// Its own error, not a neighbour's.
					if got, want := results[in].err, fmt.Sprintf("%v: %d", errRow, in); !isRow(got) || got.Error() != want {
						t.Errorf("Do(%d) returned the error %v, want %s", in, got, want)
					}
				}
				if got := len(r.seen()) - 1; got != test.flushes {
					t.Errorf("%d flushes, want %d: %v", got, test.flushes, r.seen())
				}
			})
		})
	}
}

// Neighbours in a half that went well do not wait for the search in the other.
func TestIsolatedNeighboursDoNotWait(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := &recorder{respond: func(_ context.Context, inputs []int) ([]string, error) {
			time.Sleep(time.Second)
			if slices.Contains(inputs, 7) {
				return nil, errRow
			}
			return answers(inputs), nil
		}}
		c := newCallers(batch.New(batch.Options{MaxSize: 8, MaxFlushes: 1, Isolate: isRow}, r.flush))
		c.call(t.Context(), -1)
		c.call(t.Context(), upTo(8)...)
		results := c.wait()
		// 1 s for the first caller, 1 s for all eight, then 0 to 3, 4 to 7, 4 and 5, …
		for in, want := range []time.Duration{3, 3, 3, 3, 5, 5, 7, 8} {
			if got := results[in].at; got != want*time.Second {
				t.Errorf("Do(%d) returned after %v, want %v", in, got, want*time.Second)
			}
		}
	})
}

func TestErrorReachesAll(t *testing.T) {
	t.Parallel()
	tests := map[string]func(error) bool{
		"not the fault of one": isRow,
		"nothing is isolated":  nil,
	}
	for name, isolate := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r := &recorder{respond: func(context.Context, []int) ([]string, error) {
					time.Sleep(time.Second)
					return nil, errGone
				}}
				c := newCallers(batch.New(batch.Options{MaxSize: 8, MaxFlushes: 1, Isolate: isolate}, r.flush))
				c.call(t.Context(), upTo(9)...)
				for in, got := range c.wait() {
					if !errors.Is(got.err, errGone) || got.out != "" {
						t.Errorf("Do(%d) = %q, %v, want nothing and %v", in, got.out, got.err, errGone)
					}
				}
				wantBatches(t, r, []int{0}, []int{1, 2, 3, 4, 5, 6, 7, 8})
			})
		})
	}
}

// The other side goes away while a guilty row is looked for.
func TestErrorWhileIsolating(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := &recorder{respond: func(_ context.Context, inputs []int) ([]string, error) {
			time.Sleep(time.Second)
			switch {
			case len(inputs) == 4:
				return nil, errRow
			case slices.Contains(inputs, 2):
				return nil, errGone
			}
			return answers(inputs), nil
		}}
		c := newCallers(batch.New(batch.Options{MaxSize: 4, MaxFlushes: 1, Isolate: isRow}, r.flush))
		c.call(t.Context(), -1)
		c.call(t.Context(), upTo(4)...)
		results := c.wait()
		wantAnswers(t, results, 0, 1)
		for _, in := range []int{2, 3} {
			if got := results[in].err; !errors.Is(got, errGone) {
				t.Errorf("Do(%d) returned the error %v, want %v", in, got, errGone)
			}
		}
		wantBatches(t, r, []int{-1}, []int{0, 1, 2, 3}, []int{0, 1}, []int{2, 3})
	})
}

func TestGivingUpBeforeTheFlush(t *testing.T) {
	t.Parallel()
	errBored := errors.New("bored")
	synctest.Test(t, func(t *testing.T) {
		r := &recorder{respond: after(time.Second)}
		c := newCallers(batch.New(batch.Options{MaxSize: 8, MaxFlushes: 1}, r.flush))
		impatient, giveUp := context.WithCancelCause(t.Context())
		c.call(t.Context(), 0, 1)
		c.call(impatient, 2)
		c.call(t.Context(), 3)
		c.call(impatient, 4)
		giveUp(errBored)
		c.call(t.Context(), 5)
		results := c.wait()

		wantAnswers(t, results, 0, 1, 3, 5)
		for _, in := range []int{2, 4} {
			if got := results[in]; !errors.Is(got.err, errBored) || got.at != 0 {
				t.Errorf("Do(%d) returned %v after %v, want %v at once", in, got.err, got.at, errBored)
			}
		}
		wantBatches(t, r, []int{0}, []int{1, 3, 5})
	})
}

// When all who waited gave up there is nothing to flush, and the next caller
// is served as if nothing had been.
func TestAllGiveUp(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := &recorder{respond: after(time.Second)}
		b := batch.New(batch.Options{MaxSize: 8, MaxFlushes: 1}, r.flush)
		c := newCallers(b)
		impatient, giveUp := context.WithCancel(t.Context())
		c.call(t.Context(), 0)
		c.call(impatient, 1, 2, 3)
		giveUp()
		c.wait()
		c.call(t.Context(), 4)
		wantAnswers(t, c.wait(), 0, 4)
		wantBatches(t, r, []int{0}, []int{4})
	})
}

// MaxWaiting requests wait. The next one gets ErrFull at once, until a waiting request
// has given up or its flush has begun.
func TestFull(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := &recorder{respond: after(time.Second)}
		c := newCallers(batch.New(batch.Options{MaxSize: 2, MaxFlushes: 1, MaxWaiting: 3}, r.flush))
		impatient, giveUp := context.WithCancel(t.Context())
		c.call(t.Context(), 0, 1, 2)
		c.call(impatient, 3)
		c.call(t.Context(), 4) // while 0 is served and 1, 2, 3 wait
		giveUp()
		synctest.Wait()
		c.call(t.Context(), 5, 6)
		time.Sleep(time.Second)
		synctest.Wait() // 5 alone waits
		c.call(t.Context(), 7, 8, 9)
		results := c.wait()

		wantAnswers(t, results, 0, 1, 2, 5, 7, 8)
		for in, at := range map[int]time.Duration{4: 0, 6: 0, 9: time.Second} {
			if got := results[in]; !errors.Is(got.err, batch.ErrFull) || got.at != at {
				t.Errorf("Do(%d) returned %v after %v, want %v after %v", in, got.err, got.at, batch.ErrFull, at)
			}
		}
		wantBatches(t, r, []int{0}, []int{1, 2}, []int{5, 7}, []int{8})
	})
}

func TestGivingUpDuringTheFlush(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := &recorder{respond: func(ctx context.Context, inputs []int) ([]string, error) {
			select {
			case <-ctx.Done():
				return nil, ctx.Err()
			case <-time.After(time.Second):
				return answers(inputs), nil
			}
		}}
		c := newCallers(batch.New(batch.Options{MaxSize: 8, MaxFlushes: 1}, r.flush))
		impatient, giveUp := context.WithCancel(t.Context())
		c.call(impatient, 0) // its call starts the goroutine that flushes for the others too
		c.call(impatient, 1)
		c.call(t.Context(), 2)
		time.Sleep(1500 * time.Millisecond) // 1 and 2 are under way
		giveUp()
		results := c.wait()

		wantAnswers(t, results, 0, 2)
		if got := results[1]; !errors.Is(got.err, context.Canceled) || got.at != 1500*time.Millisecond {
			t.Errorf("Do(1) returned %v after %v, want %v after 1.5 s", got.err, got.at, context.Canceled)
		}
		wantBatches(t, r, []int{0}, []int{1, 2})
	})
}

func TestContextThatHasEnded(t *testing.T) {
	t.Parallel()
	r := &recorder{}
	b := batch.New(batch.Options{}, r.flush)
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errGone)
	for in := range 100 {
		if out, err := b.Do(ctx, in); !errors.Is(err, errGone) || out != "" {
			t.Errorf("Do = %q, %v, want nothing and %v", out, err, errGone)
		}
	}
	b.Close()
	wantBatches(t, r)
}

func TestPanicIsTheErrorOfItsCallersOnly(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := &recorder{respond: func(_ context.Context, inputs []int) ([]string, error) {
			time.Sleep(time.Second)
			if slices.Contains(inputs, 2) {
				panic("out of order")
			}
			return answers(inputs), nil
		}}
		b := batch.New(batch.Options{MaxSize: 2, MaxFlushes: 1, Isolate: isRow}, r.flush)
		c := newCallers(b)
		c.call(t.Context(), upTo(5)...)
		results := c.wait()

		wantAnswers(t, results, 0, 3, 4)
		for _, in := range []int{1, 2} {
			if got := results[in].err; got == nil || !strings.Contains(got.Error(), "panicked: out of order") {
				t.Errorf("Do(%d) returned the error %v, want one that tells of the panic", in, got)
			}
		}
		b.Close()
	})
}

func TestWrongNumberOfOutputs(t *testing.T) {
	t.Parallel()
	tests := map[string][]string{
		"none":     nil,
		"too few":  {"a"},
		"too many": {"a", "b", "c"},
	}
	for name, outputs := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r := &recorder{respond: func(_ context.Context, inputs []int) ([]string, error) {
					time.Sleep(time.Second)
					if len(inputs) == 2 {
						return outputs, nil
					}
					return answers(inputs), nil
				}}
				c := newCallers(batch.New(batch.Options{MaxSize: 2, MaxFlushes: 1}, r.flush))
				c.call(t.Context(), 0, 1, 2, 3)
				results := c.wait()
				wantAnswers(t, results, 0, 3)
				want := fmt.Sprintf("flush returned %d outputs for 2 inputs", len(outputs))
				for _, in := range []int{1, 2} {
					if got := results[in].err; got == nil || !strings.Contains(got.Error(), want) {
						t.Errorf("Do(%d) returned the error %v, want one with %q", in, got, want)
					}
				}
			})
		})
	}
}

// Who waited for too long leaves: out of the queue, or from a flush, which goes on.
func TestTimeout(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := &recorder{respond: after(3 * time.Second)}
		c := newCallers(batch.New(batch.Options{MaxSize: 1, MaxFlushes: 1, Timeout: 4 * time.Second}, r.flush))
		c.call(t.Context(), 0, 1, 2)
		results := c.wait()
		wantAnswers(t, results, 0)
		for _, in := range []int{1, 2} {
			if got := results[in]; !errors.Is(got.err, context.DeadlineExceeded) || got.at != 4*time.Second {
				t.Errorf("Do(%d) returned %v after %v, want %v after 4 s", in, got.err, got.at, context.DeadlineExceeded)
			}
		}
		// The next ones have all the time again, with the same timers.
		time.Sleep(2 * time.Second)
		c.call(t.Context(), 3)
		wantAnswers(t, c.wait(), 3)
		wantBatches(t, r, []int{0}, []int{1}, []int{3})
	})
}

func TestClose(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := &recorder{respond: after(time.Second)}
		b := batch.New(batch.Options{MaxSize: 2, MaxFlushes: 1}, r.flush)
		c := newCallers(b)
		c.call(t.Context(), 0, 1, 2, 3)

		start := time.Now()
		closed := make(chan struct{})
		go func() {
			defer close(closed)
			b.Close()
		}()
		synctest.Wait()
		if _, err := b.Do(t.Context(), 4); !errors.Is(err, batch.ErrClosed) {
			t.Errorf("Do while closing returned the error %v, want %v", err, batch.ErrClosed)
		}
		<-closed
		if got, want := time.Since(start), 3*time.Second; got != want {
			t.Errorf("Close waited %v, want %v, for three flushes", got, want)
		}
		wantAnswers(t, c.wait(), 0, 1, 2, 3)

		b.Close()
		if _, err := b.Do(t.Context(), 5); !errors.Is(err, batch.ErrClosed) {
			t.Errorf("Do after Close returned the error %v, want %v", err, batch.ErrClosed)
		}
		wantBatches(t, r, []int{0}, []int{1, 2}, []int{3})
	})
}

// An input of Start shares a flush with the rest, and gets its own result.
func TestStart(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := &recorder{respond: func(_ context.Context, inputs []int) ([]string, error) {
			time.Sleep(time.Second)
			if slices.Contains(inputs, 97) {
				return nil, errRow
			}
			return answers(inputs), nil
		}}
		b := batch.New(batch.Options{MaxSize: 4, MaxFlushes: 1, MaxWaiting: 3, Isolate: isRow}, r.flush)
		outs, errs := make(map[int]string), make(map[int]error)
		start := func(in int) error {
			return b.Start(in, func(out string, err error) { outs[in], errs[in] = out, err })
		}
		c := newCallers(b)
		began := time.Now()
		for _, in := range []int{0, 1, 97} {
			if err := start(in); err != nil {
				t.Errorf("Start(%d): %v", in, err)
			}
			synctest.Wait()
		}
		if took := time.Since(began); took != 0 {
			t.Errorf("Start blocked for %v", took)
		}
		c.call(t.Context(), 3)
		synctest.Wait()
		if err := start(4); !errors.Is(err, batch.ErrFull) {
			t.Errorf("Start with three waiting returned %v, want %v", err, batch.ErrFull)
		}
		b.Close()
		if err := start(5); !errors.Is(err, batch.ErrClosed) {
			t.Errorf("Start after Close returned %v, want %v", err, batch.ErrClosed)
		}
		wantAnswers(t, c.wait(), 3)
		if want := map[int]string{0: answer(0), 1: answer(1), 97: ""}; !maps.Equal(outs, want) {
			t.Errorf("Start brought %v, want %v", outs, want)
		}
		if errs[0] != nil || errs[1] != nil || !isRow(errs[97]) {
			t.Errorf("Start brought the errors %v, want one for 97 alone", errs)
		}
		wantBatches(t, r, []int{0}, []int{1, 97, 3}, []int{1}, []int{97, 3}, []int{97}, []int{3})
	})
}

type contextKey struct{}

// What a caller's context carries and when it ends is that caller's business
// alone, even when its call made the flushes start.
func TestFlushContextIsNoRequests(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := &recorder{respond: func(ctx context.Context, inputs []int) ([]string, error) {
			time.Sleep(time.Second)
			if got := ctx.Value(contextKey{}); got != nil {
				t.Errorf("the flush of %v sees the value %v of a caller's context", inputs, got)
			}
			if _, ok := ctx.Deadline(); ok || ctx.Err() != nil {
				t.Errorf("the flush of %v has a deadline (%t) or has ended (%v)", inputs, ok, ctx.Err())
			}
			// Contexts made from it must work as usual.
			bounded, cancel := context.WithTimeoutCause(ctx, time.Second, errGone)
			defer cancel()
			<-bounded.Done()
			if got := context.Cause(bounded); !errors.Is(got, errGone) {
				t.Errorf("a context made from the flush's ended with %v, want %v", got, errGone)
			}
			return answers(inputs), nil
		}}
		c := newCallers(batch.New(batch.Options{MaxSize: 8, MaxFlushes: 1}, r.flush))
		first, cancel := context.WithTimeout(context.WithValue(t.Context(), contextKey{}, "mine"), 100*time.Millisecond)
		defer cancel()
		c.call(first, 0)
		c.call(t.Context(), 1, 2)
		wantAnswers(t, c.wait(), 1, 2)
		wantBatches(t, r, []int{0}, []int{1, 2})
	})
}

// Real goroutines and real time, for the race detector.
func TestManyAtOnce(t *testing.T) {
	t.Parallel()
	const callers, calls, size, flushes = 32, 200, 7, 3
	r := &recorder{respond: func(_ context.Context, inputs []int) ([]string, error) {
		if slices.ContainsFunc(inputs, func(in int) bool { return in%97 == 0 }) {
			return nil, errRow
		}
		return answers(inputs), nil
	}}
	b := batch.New(batch.Options{MaxSize: size, MaxFlushes: flushes, Isolate: isRow}, r.flush)
	var wg sync.WaitGroup
	for i := range callers {
		wg.Go(func() {
			for j := range calls {
				in := i*calls + j
				var out string
				var err error
				if j%2 == 0 {
					out, err = b.Do(t.Context(), in)
				} else {
					done := make(chan struct{})
					if e := b.Start(in, func(o string, e error) { out, err = o, e; close(done) }); e != nil {
						t.Errorf("Start(%d): %v", in, e)
						continue
					}
					<-done
				}
				if bad := in%97 == 0; bad != isRow(err) || !bad && out != answer(in) {
					t.Errorf("%d = %q, %v", in, out, err)
				}
			}
		})
	}
	wg.Wait()
	b.Close()
	if r.most > flushes {
		t.Errorf("%d flushes ran at a time, want at most %d", r.most, flushes)
	}
	for _, inputs := range r.seen() {
		if len(inputs) > size {
			t.Errorf("a flush had %d inputs, want at most %d", len(inputs), size)
		}
	}
}

func BenchmarkDo(b *testing.B) {
	for _, goroutines := range []int{1, 8, 64} {
		b.Run(fmt.Sprintf("goroutines=%d", goroutines), func(b *testing.B) {
			var flushes atomic.Int64
			batcher := batch.New(batch.Options{MaxSize: 256, MaxFlushes: 2}, func(_ context.Context, inputs []int) ([]int, error) {
				flushes.Add(1)
				return inputs, nil
			})
			defer batcher.Close()
			b.ReportAllocs()
			b.ResetTimer()
			var next atomic.Int64
			var wg sync.WaitGroup
			for range goroutines {
				wg.Go(func() {
					for next.Add(1) <= int64(b.N) {
						if _, err := batcher.Do(b.Context(), 1); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
			b.ReportMetric(float64(b.N)/float64(flushes.Load()), "calls/flush")
		})
	}
}
