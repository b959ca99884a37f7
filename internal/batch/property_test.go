package batch_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/melodia/orchestrator/internal/batch"
)

// script is everything that a run of the property test leaves to chance.
type script struct {
	options batch.Options
	calls   []scriptedCall
	flushes []scriptedFlush // used in turn, over and over
}

type scriptedCall struct {
	gap    int // ms after the previous call
	giveUp int // ms after its own start; 0 is never
	bad    bool
}

type scriptedFlush struct {
	takes int // ms
	kind  string
}

var errBored = errors.New("bored")

func drawScript(t *rapid.T) script {
	return script{
		options: batch.Options{
			MaxSize:    rapid.IntRange(1, 9).Draw(t, "max size"),
			MaxFlushes: rapid.IntRange(1, 3).Draw(t, "max flushes"),
			Isolate:    isRow,
		},
		calls: rapid.SliceOfN(rapid.Custom(func(t *rapid.T) scriptedCall {
			return scriptedCall{
				gap:    rapid.SampledFrom([]int{0, 0, 0, 1, 5, 40}).Draw(t, "gap"),
				giveUp: rapid.SampledFrom([]int{0, 0, 0, 3, 12, 60}).Draw(t, "give up after"),
				bad:    rapid.IntRange(0, 9).Draw(t, "bad one in ten") == 0,
			}
		}), 1, 60).Draw(t, "calls"),
		flushes: rapid.SliceOfN(rapid.Custom(func(t *rapid.T) scriptedFlush {
			return scriptedFlush{
				takes: rapid.IntRange(0, 20).Draw(t, "takes"),
				kind:  rapid.SampledFrom([]string{"good", "good", "good", "gone", "panic", "short"}).Draw(t, "kind"),
			}
		}), 1, 20).Draw(t, "flushes"),
	}
}

// trial runs a script and notes everything that breaks the promises of a
// Batcher. Its rules are the model: what each caller may get follows from the
// flushes that its input was in.
type trial struct {
	script
	mu       sync.Mutex
	flushed  int
	under    int
	fates    map[int]string       // of an input that a flush has decided: good, row, gone, panic, short
	begun    map[int]time.Time    // when an input was first in a flush
	given    map[int]time.Time    // when its caller gave up
	waiting  map[int]bool         // requested, and in no flush yet
	results  map[int]result       // what Do returned
	problems []string             // what broke the rules
	isolated map[int]map[int]bool // of an input: those it may still be flushed with
}

func (tr *trial) breaks(format string, args ...any) {
	tr.problems = append(tr.problems, fmt.Sprintf(format, args...))
}

func (tr *trial) flush(ctx context.Context, inputs []int) ([]string, error) {
	tr.mu.Lock()
	f := tr.flushes[tr.flushed%len(tr.flushes)]
	tr.flushed++
	tr.under++
	if tr.under > tr.options.MaxFlushes {
		tr.breaks("%d flushes at a time, want at most %d", tr.under, tr.options.MaxFlushes)
	}
	if len(inputs) == 0 || len(inputs) > tr.options.MaxSize {
		tr.breaks("a flush of %d inputs, want 1 to %d", len(inputs), tr.options.MaxSize)
	}
	if !slices.IsSorted(inputs) {
		tr.breaks("a flush of %v is not in the order of arrival", inputs)
	}
	bad := false
	for _, in := range inputs {
		bad = bad || tr.calls[in].bad
		if fate, ok := tr.fates[in]; ok {
			tr.breaks("input %d is flushed again after its fate was %s", in, fate)
		}
		if _, ok := tr.begun[in]; !ok {
			if at, gaveUp := tr.given[in]; gaveUp && at.Before(time.Now()) {
				tr.breaks("input %d is flushed although its caller gave up before", in)
			}
			tr.begun[in] = time.Now()
			delete(tr.waiting, in)
			continue
		}
		for _, other := range inputs {
			if !tr.isolated[in][other] {
				tr.breaks("inputs %d and %d are together in a half although they were not in the whole", in, other)
			}
		}
	}
	tr.mu.Unlock()

	time.Sleep(time.Duration(f.takes) * time.Millisecond)

	tr.mu.Lock()
	defer tr.mu.Unlock()
	tr.under--
	if ctx.Err() != nil {
		tr.breaks("the context of a flush ended: %v", ctx.Err())
	}
	fate := f.kind
	if fate == "good" && bad {
		fate = "row"
		if len(inputs) > 1 {
			together := make(map[int]bool)
			for _, in := range inputs {
				together[in] = true
				tr.isolated[in] = together
			}
			return nil, errRow
		}
	}
	for _, in := range inputs {
		tr.fates[in] = fate
	}
	switch fate {
	case "row":
		return nil, errRow
	case "gone":
		return nil, errGone
	case "panic":
		panic("by the script")
	case "short":
		return answers(inputs[1:]), nil
	}
	return answers(inputs), nil
}

// checkBusy holds whenever nothing moves: no request waits while no flush runs, and
// not a whole batch while another could.
func (tr *trial) checkBusy() {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	if len(tr.waiting) > 0 && (tr.under == 0 || tr.under < tr.options.MaxFlushes && len(tr.waiting) >= max(tr.options.MaxSize, 1)) {
		tr.breaks("%d callers wait while %d of %d flushes run", len(tr.waiting), tr.under, tr.options.MaxFlushes)
	}
}

func (tr *trial) call(b *batch.Batcher[int, string], ctx context.Context, in int) {
	tr.mu.Lock()
	tr.waiting[in] = true
	tr.mu.Unlock()
	if ms := tr.calls[in].giveUp; ms > 0 {
		// Half a millisecond off, so that a flush never begins at the same moment.
		limit := time.Duration(ms)*time.Millisecond + 500*time.Microsecond
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, limit, errBored)
		defer cancel()
	}
	out, err := b.Do(ctx, in)
	tr.mu.Lock()
	defer tr.mu.Unlock()
	tr.results[in] = result{out: out, err: err}
	if errors.Is(err, errBored) {
		tr.given[in] = time.Now()
		delete(tr.waiting, in)
	}
}

// checkResults compares what every caller got with what its flushes decided.
func (tr *trial) checkResults() {
	for in := range tr.calls {
		got, returned := tr.results[in]
		fate, decided := tr.fates[in]
		if !returned {
			tr.breaks("Do(%d) has not returned", in)
			continue
		}
		if errors.Is(got.err, errBored) {
			if _, begun := tr.begun[in]; begun && !decided {
				tr.breaks("input %d was under way when its caller gave up, and then dropped", in)
			}
			continue
		}
		ok := false
		switch fate {
		case "good":
			ok = got.err == nil && got.out == answer(in)
		case "row":
			ok = errors.Is(got.err, errRow) && tr.calls[in].bad
		case "gone":
			ok = errors.Is(got.err, errGone)
		case "panic", "short":
			ok = got.err != nil && !errors.Is(got.err, errRow) && !errors.Is(got.err, errGone)
		}
		if !ok || !decided {
			tr.breaks("Do(%d) = %q, %v, but its fate was %q (decided: %t)", in, got.out, got.err, fate, decided)
		}
	}
}

func TestAnyArrivalsAndFailures(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(rt *rapid.T) {
		tr := &trial{
			script:   drawScript(rt),
			fates:    make(map[int]string),
			begun:    make(map[int]time.Time),
			given:    make(map[int]time.Time),
			waiting:  make(map[int]bool),
			results:  make(map[int]result),
			isolated: make(map[int]map[int]bool),
		}
		synctest.Test(t, func(t *testing.T) {
			b := batch.New(tr.options, tr.flush)
			var wg sync.WaitGroup
			for in, c := range tr.calls {
				time.Sleep(time.Duration(c.gap) * time.Millisecond)
				wg.Go(func() { tr.call(b, t.Context(), in) })
				synctest.Wait()
				tr.checkBusy()
			}
			b.Close() // by itself waits for all
			if tr.under != 0 || len(tr.waiting) != 0 {
				tr.breaks("after Close %d flushes run and %d callers wait", tr.under, len(tr.waiting))
			}
			wg.Wait()
		})
		tr.checkResults()
		if len(tr.problems) > 0 {
			rt.Fatalf("%d rules broken: %q", len(tr.problems), tr.problems)
		}
	})
}
