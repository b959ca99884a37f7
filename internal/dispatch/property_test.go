package dispatch

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/melodia/orchestrator/internal/task"
)

// script is everything that a run of the property test leaves to chance, but
// for the dispatcher's own jitter. Times are milliseconds from the start.
type script struct {
	concurrency int
	instances   int
	tasks       []scriptedTask
	outages     []outage // of the store, for every instance
	restart     int      // when the first instance ends; 0 is never
	crash       bool     // it is cut off from the store for good, instead of being stopped
}

type scriptedTask struct {
	arrives, delay int
	submitted      bool // through an instance; else it appears in the store
	maxAttempts    int
	expires        int // after its run_at; 0 is never
	answers        []string
	takes          int
	acts           []act
}

// act is what somebody does to a task, through an instance or past them all.
type act struct {
	at      int
	redrive bool // else it is cancelled
	here    bool
}

type outage struct {
	from, length int
	kind         string
}

func drawScript(t *rapid.T) script {
	return script{
		concurrency: rapid.IntRange(1, 5).Draw(t, "concurrency"),
		instances:   rapid.IntRange(1, 2).Draw(t, "instances"),
		tasks: rapid.SliceOfN(rapid.Custom(func(t *rapid.T) scriptedTask {
			return scriptedTask{
				arrives:     rapid.IntRange(0, 60_000).Draw(t, "arrives"),
				delay:       rapid.SampledFrom([]int{0, 0, 0, 400, 5_000, 90_000}).Draw(t, "delay"),
				submitted:   rapid.Bool().Draw(t, "submitted"),
				maxAttempts: rapid.IntRange(1, 4).Draw(t, "max attempts"),
				expires:     rapid.SampledFrom([]int{0, 0, 0, 1_000, 30_000}).Draw(t, "expires"),
				answers:     rapid.SliceOfN(rapid.SampledFrom([]string{"good", "good", "broken", "permanent", "panic"}), 1, 4).Draw(t, "answers"),
				takes:       rapid.SampledFrom([]int{0, 20, 700, 3_000, 20_000}).Draw(t, "takes"),
				acts: rapid.SliceOfN(rapid.Custom(func(t *rapid.T) act {
					return act{
						at:      rapid.IntRange(0, 90_000).Draw(t, "at"),
						redrive: rapid.Bool().Draw(t, "redrive"),
						here:    rapid.Bool().Draw(t, "here"),
					}
				}), 0, 3).Draw(t, "acts"),
			}
		}), 1, 25).Draw(t, "tasks"),
		outages: rapid.SliceOfN(rapid.Custom(func(t *rapid.T) outage {
			return outage{
				from:   rapid.IntRange(0, 60_000).Draw(t, "from"),
				length: rapid.SampledFrom([]int{10, 1_000, 10_000, 40_000}).Draw(t, "length"),
				kind:   rapid.SampledFrom([]string{"fails", "hangs", "loses answers", "is slow"}).Draw(t, "kind"),
			}
		}), 0, 3).Draw(t, "outages"),
		restart: rapid.SampledFrom([]int{0, 0, 5_000, 20_000, 61_000}).Draw(t, "restart"),
		crash:   rapid.Bool().Draw(t, "crash"),
	}
}

const slowness = 2 * time.Second

func (o outage) around() around {
	return func(ctx context.Context, _ string, do func()) error {
		switch o.kind {
		case "fails":
			return errStoreAway
		case "hangs":
			return hang(ctx)
		case "loses answers":
			do()
			return errStoreAway
		}
		do()
		select {
		case <-time.After(slowness):
			return nil
		case <-ctx.Done():
			return hang(ctx)
		}
	}
}

// trial plays a script and notes which invariants it saw broken.
type trial struct {
	script
	m *memory // for the trial itself: no fault stands in between

	mu       sync.Mutex
	out      *outage // the outage under way
	problems []string
	calls    map[task.ID]int
	good     map[task.ID]int // calls that the target answered well
	live     []*rig
}

func (tr *trial) breaks(format string, args ...any) {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	tr.problems = append(tr.problems, fmt.Sprintf(format, args...))
}

func ms(n int) time.Duration { return time.Duration(n) * time.Millisecond }

// start adds an instance with its own way to the store; cut ends that way.
func (tr *trial) start(t *testing.T) (r *rig, cut chan struct{}) {
	cut = make(chan struct{})
	view := tr.m.open()
	view.fault = func(ctx context.Context, op string, do func()) error {
		select {
		case <-cut:
			return hang(ctx)
		default:
		}
		tr.mu.Lock()
		out := tr.out
		tr.mu.Unlock()
		if out != nil {
			return out.around()(ctx, op, do)
		}
		do()
		return nil
	}
	o := options()
	o.Concurrency = tr.concurrency
	tr.mu.Lock()
	number := len(tr.live)
	var sessions int
	tr.mu.Unlock()
	o.NewID = func() task.ID { // called by one goroutine after the other
		sessions++
		return newID('w', 1000*number+sessions)
	}
	r = newRig(t, o, view, func(ctx context.Context, c task.Call) task.Outcome { return tr.answer(ctx, c, cut) })
	tr.mu.Lock()
	tr.live = append(tr.live, r)
	tr.mu.Unlock()
	r.run()
	return r, cut
}

// answer is the target, and the witness of what it is called for.
func (tr *trial) answer(ctx context.Context, c task.Call, cut chan struct{}) task.Outcome {
	now := time.Now()
	tr.m.mu.Lock()
	stored := *tr.m.rows[c.Task.ID]
	claim := tr.m.claimed[c.Task]
	tr.m.mu.Unlock()
	if now.Before(c.Task.RunAt) {
		tr.breaks("task %s is called %v before its run_at", c.Task.ID, c.Task.RunAt.Sub(now))
	}
	if e := c.Task.ExpiresAt; !e.IsZero() && now.After(e.Add(slowness)) {
		tr.breaks("task %s is called %v after it expired", c.Task.ID, now.Sub(e))
	}
	if c.Attempt > c.Task.Retry.MaxAttempts {
		tr.breaks("task %s: attempt %d of %d", c.Task.ID, c.Attempt, c.Task.Retry.MaxAttempts)
	}
	isCut := false
	select {
	case <-cut:
		isCut = true
	default:
	}
	if !isCut && (stored.State != task.Running || stored.claim != claim) && ctx.Err() == nil {
		tr.breaks("task %s is called under claim %d while it is %s under claim %d", c.Task.ID, claim, stored.State, stored.claim)
	}
	tr.mu.Lock()
	script := tr.tasks[int(c.Task.ID[14])<<8|int(c.Task.ID[15])]
	answer := script.answers[tr.calls[c.Task.ID]%len(script.answers)]
	tr.calls[c.Task.ID]++
	tr.mu.Unlock()

	outcome := succeeded
	switch answer {
	case "broken":
		outcome = broken
	case "permanent":
		outcome = task.Outcome{Kind: task.OutcomePermanent, StatusCode: 404}
	}
	outcome = takes(ms(script.takes), outcome)(ctx, c)
	if answer == "panic" {
		panic("by the script")
	}
	if outcome.Kind == task.OutcomeSucceeded {
		tr.mu.Lock()
		tr.good[c.Task.ID]++
		tr.mu.Unlock()
	}
	return outcome
}

func (tr *trial) play(t *testing.T) {
	var wg sync.WaitGroup
	defer wg.Wait()
	first, cut := tr.start(t)
	if tr.instances > 1 {
		tr.start(t)
	}
	for n, s := range tr.tasks {
		wg.Go(func() {
			time.Sleep(ms(s.arrives))
			finish := func(t *task.Task) {
				t.Retry.MaxAttempts, t.Retry.MaxBackoff = s.maxAttempts, 4*time.Second
				if s.expires > 0 {
					t.ExpiresAt = time.Now().Add(ms(s.delay + s.expires))
				}
			}
			if s.submitted {
				tr.mu.Lock()
				r := tr.live[len(tr.live)-1]
				tr.mu.Unlock()
				t := newTask(n, ms(s.delay))
				finish(t)
				if err := r.Submit(context.Background(), t); err == nil || tr.m.has(t.ID) {
					return
				}
			}
			tr.m.store(n, ms(s.delay), finish) // by another instance
		})
		for _, a := range s.acts {
			wg.Go(func() {
				time.Sleep(ms(a.at))
				tr.mu.Lock()
				r := tr.live[len(tr.live)-1]
				tr.mu.Unlock()
				switch {
				case a.redrive:
					if tr.m.redrive(taskID(n)) && a.here {
						r.Wake()
					}
				default:
					if claim := tr.m.cancel(taskID(n)); claim > 0 && a.here {
						r.CutOff(map[task.ID]int64{taskID(n): claim})
					}
				}
			})
		}
	}
	for _, o := range tr.outages {
		wg.Go(func() {
			time.Sleep(ms(o.from))
			tr.mu.Lock()
			tr.out = &o
			tr.mu.Unlock()
			time.Sleep(ms(o.length))
			tr.mu.Lock()
			if tr.out == &o { // a later one may have taken its place
				tr.out = nil
			}
			tr.mu.Unlock()
		})
	}
	if tr.restart > 0 {
		wg.Go(func() {
			time.Sleep(ms(tr.restart))
			if tr.crash {
				close(cut)
			} else if took, limit := first.stop(), options().Grace+2*flushTimeout; took > limit {
				tr.breaks("Run took %v to stop, want at most %v", took, limit)
			}
			tr.start(t)
		})
	}
	wg.Wait()
	for end := time.Now().Add(20 * time.Minute); !tr.allEnded() && time.Now().Before(end); {
		time.Sleep(10 * time.Second)
	}
	for _, r := range tr.live {
		if took, limit := r.stop(), options().Grace+2*flushTimeout; took > limit {
			tr.breaks("Run took %v to stop, want at most %v", took, limit)
		}
		if r.most > tr.concurrency {
			tr.breaks("%d calls were under way at a time in one instance, want at most %d", r.most, tr.concurrency)
		}
	}
}

func (tr *trial) allEnded() bool {
	tr.m.mu.Lock()
	defer tr.m.mu.Unlock()
	for _, r := range tr.m.rows {
		if !r.State.Terminal() {
			return false
		}
	}
	return true
}

// check looks at what is left: each task's story must explain all that was
// done for it.
func (tr *trial) check() {
	for n := range tr.tasks {
		id := taskID(n)
		r := tr.m.row(id)
		counted, lost := 0, 0
		for i, a := range r.Attempts {
			if a.Outcome != task.OutcomeInterrupted && i >= r.told {
				counted++
			}
			if a.Outcome == task.OutcomeLost {
				lost++
			}
		}
		if !r.State.Terminal() {
			tr.breaks("task %s is %s in the end, after %v", id, r.State, r.Attempts)
		}
		if r.AttemptCount > r.Retry.MaxAttempts || r.AttemptCount != min(counted, r.Retry.MaxAttempts) {
			tr.breaks("task %s counts %d attempts of %d; its story has %v", id, r.AttemptCount, r.Retry.MaxAttempts, r.Attempts)
		}
		// A claim ends in an attempt of whatever kind, is given back untouched, or ends the task without one.
		if r.claims != r.returned+len(r.Attempts) {
			tr.breaks("task %s was claimed %d times and is %s; its story has %v", id, r.claims, r.State, r.Attempts)
		}
		if tr.calls[id] > len(r.Attempts) {
			tr.breaks("task %s was called %d times; its story has %v", id, tr.calls[id], r.Attempts)
		}
		succeeded := 0
		if r.State == task.Succeeded {
			succeeded = 1
		}
		if cancelled := slices.ContainsFunc(tr.tasks[n].acts, func(a act) bool { return !a.redrive }); r.State == task.Cancelled && !cancelled {
			tr.breaks("task %s is cancelled, and nobody wanted that", id)
		}
		if got := tr.good[id]; got < succeeded || got > succeeded+lost {
			tr.breaks("task %s was done %d times and is %s; %d attempts were lost", id, got, r.State, lost)
		}
		if undisturbed := len(tr.outages) == 0 && !(tr.crash && tr.restart > 0); undisturbed && lost > 0 {
			tr.breaks("task %s lost %d attempts although nothing went wrong", id, lost)
		}
	}
	if crashed := tr.crash && tr.restart > 0; !crashed && len(tr.outages) == 0 && len(tr.m.workers) > 0 {
		tr.breaks("%d workers are still registered", len(tr.m.workers))
	}
}

func TestAnyArrivalsAndFaults(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(rt *rapid.T) {
		tr := &trial{script: drawScript(rt), m: newMemory(), calls: make(map[task.ID]int), good: make(map[task.ID]int)}
		synctest.Test(t, tr.play)
		tr.check()
		if len(tr.problems) > 0 {
			rt.Fatalf("%d invariants broken: %q", len(tr.problems), tr.problems)
		}
	})
}
