package dispatch

import (
	"bytes"
	"context"
	"encoding/json"
	"log/slog"
	"slices"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/melodia/orchestrator/internal/task"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// rig is a Dispatcher that runs in a test's bubble, against a store in memory
// and a target that the test plays.
type rig struct {
	*Dispatcher
	t      *testing.T
	store  *memory
	log    *logs
	cancel context.CancelFunc
	ended  chan struct{}
	began  time.Time

	mu      sync.Mutex
	calls   []delivered
	under   int // calls under way that the claim loop began
	most    int // the most that ever were
	workers int
}

// delivered is one call that the dispatcher had made.
type delivered struct {
	task.Call
	after time.Duration // since the rig was started
}

// target plays the target; the rig notes the calls.
type target func(ctx context.Context, c task.Call) task.Outcome

var (
	succeeded = task.Outcome{Kind: task.OutcomeSucceeded, StatusCode: 200}
	broken    = task.Outcome{Kind: task.OutcomeRetryable, StatusCode: 500, Error: "the target answered 500"}
)

// takes is a target whose answers take d.
func takes(d time.Duration, o task.Outcome) target {
	return func(ctx context.Context, _ task.Call) task.Outcome {
		start := time.Now()
		select {
		case <-time.After(d):
			o := o
			o.Duration = time.Since(start)
			return o
		case <-ctx.Done():
			return task.Outcome{Kind: task.OutcomeInterrupted, Error: "called off", Duration: time.Since(start)}
		}
	}
}

// options are the settings' defaults, but for a Concurrency that fits into one claim.
func options() Options {
	return Options{
		Name:         "test",
		Concurrency:  10,
		PollInterval: time.Second,
		Lease:        15 * time.Second,
		Grace:        8 * time.Second,
		Retention:    720 * time.Hour,
	}
}

// newRig makes a Dispatcher that does not run yet.
func newRig(t *testing.T, o Options, m *memory, answer target) *rig {
	t.Helper()
	r := &rig{t: t, store: m, log: &logs{}, ended: make(chan struct{})}
	if o.NewID == nil {
		o.NewID = func() task.ID {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.workers++
			return newID('w', r.workers)
		}
	}
	o.Log = slog.New(slog.NewJSONHandler(r.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	r.Dispatcher = New(o, m, deliverFunc(func(ctx context.Context, c task.Call) task.Outcome {
		r.mu.Lock()
		r.calls = append(r.calls, delivered{Call: c, after: time.Since(r.began)})
		if !c.ViaWorkerEndpoint {
			r.under++
			r.most = max(r.most, r.under)
		}
		r.mu.Unlock()
		defer func() {
			r.mu.Lock()
			defer r.mu.Unlock()
			if !c.ViaWorkerEndpoint {
				r.under--
			}
		}()
		return answer(ctx, c)
	}))
	return r
}

type deliverFunc func(ctx context.Context, c task.Call) task.Outcome

func (f deliverFunc) Deliver(ctx context.Context, c task.Call) task.Outcome { return f(ctx, c) }

// start runs a Dispatcher until the test ends or stops it.
func start(t *testing.T, o Options, m *memory, answer target) *rig {
	t.Helper()
	r := newRig(t, o, m, answer)
	r.run()
	return r
}

// targetHost is where the calls of newTask's tasks go.
const targetHost = "https://target.example"

// knows ends the slow start of targetHost before it begins.
func (r *rig) knows() {
	r.hosts.mu.Lock()
	defer r.hosts.mu.Unlock()
	for one := r.hosts.get(targetHost); one.start.Allowed() < r.hosts.slots; {
		one.start.Waited()
	}
}

func (r *rig) run() {
	r.began = time.Now()
	ctx, cancel := context.WithCancel(r.t.Context())
	r.cancel = cancel
	go func() {
		defer close(r.ended)
		r.Run(ctx)
	}()
	r.t.Cleanup(func() {
		r.stop()
		r.results.writing.Wait() // closing the real store waits for that
		r.hosts.mu.Lock()
		defer r.hosts.mu.Unlock()
		if r.hosts.total != 0 || r.hosts.busy != nil {
			r.t.Errorf("hosts hold %d slots in the end, want none", r.hosts.total)
		}
	})
}

// stop tells Run to stop, waits for it and returns how long that took.
func (r *rig) stop() time.Duration {
	start := time.Now()
	r.cancel()
	<-r.ended
	return time.Since(start)
}

func (r *rig) delivered() []delivered {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.calls)
}

// wantDelivered checks when calls were made.
func (r *rig) wantDelivered(want ...time.Duration) {
	r.t.Helper()
	var got []time.Duration
	for _, c := range r.delivered() {
		got = append(got, c.after)
	}
	if !slices.Equal(got, want) {
		r.t.Errorf("calls were made after %v, want %v", got, want)
	}
}

func (r *rig) wantState(id task.ID, want task.State, reason task.Reason, attempts int) {
	r.t.Helper()
	got := r.store.row(id)
	if got.State != want || got.Reason != reason || got.AttemptCount != attempts {
		r.t.Errorf("task %s is %s (%q) after %d attempts, want %s (%q) after %d",
			id, got.State, got.Reason, got.AttemptCount, want, reason, attempts)
	}
}

// logs keeps the lines that were logged.
type logs struct {
	mu    sync.Mutex
	bytes bytes.Buffer
}

func (l *logs) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.bytes.Write(p)
}

func (l *logs) text() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.bytes.String()
}

// lines returns the lines with the given message.
func (l *logs) lines(t *testing.T, message string) []map[string]any {
	t.Helper()
	var found []map[string]any
	decoder := json.NewDecoder(bytes.NewBufferString(l.text()))
	for decoder.More() {
		var line map[string]any
		if err := decoder.Decode(&line); err != nil {
			t.Fatalf("a log line is not JSON: %v", err)
		}
		if line["msg"] == message {
			found = append(found, line)
		}
	}
	return found
}

// wantLine checks that exactly one line has the message, and its level.
func (r *rig) wantLine(message, level string) map[string]any {
	r.t.Helper()
	lines := r.log.lines(r.t, message)
	if len(lines) != 1 || lines[0]["level"] != level {
		r.t.Errorf("lines with %q: %v, want one at level %s; all:\n%s", message, lines, level, r.log.text())
		return nil
	}
	return lines[0]
}
