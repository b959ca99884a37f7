package intake

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/melodia/orchestrator/internal/task"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// target is a URL that every rule allows.
const target = "https://example.com/plays"

// storedAt is the fake database's clock.
var storedAt = time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)

var errDatabase = errors.New("no database")

// fakes are a store and a dispatcher that keep what they are told. What a test does not
// give them they do not have.
type fakes struct {
	stored  []*task.Task
	batches []*task.Batch
	// refuse is what a submission fails with.
	refuse error
	// tasks are those that can be read; unread is what reading fails with.
	tasks  map[task.ID]*task.Task
	unread error
	// repeated answers for a key, and looked has the keys that were looked up.
	repeated error
	looked   []string
	// clockless is what asking for the moment fails with, asked how often that was done.
	clockless error
	asked     int
	// change answers for Change.
	change  func(*task.Task) (*task.Task, error)
	redrive func(hops int) error
	// queues are the defaults of queues.
	queues map[string]task.QueueDefaults
	woken  int
}

func (f *fakes) Submit(_ context.Context, t *task.Task) error {
	if f.refuse == nil {
		f.stored = append(f.stored, t)
	}
	return f.refuse
}

func (f *fakes) SubmitBatch(_ context.Context, b *task.Batch) error {
	if f.refuse == nil {
		f.batches = append(f.batches, b)
		f.stored = append(f.stored, b.Tasks...)
	}
	return f.refuse
}

func (f *fakes) Wake() { f.woken++ }

func (f *fakes) Get(_ context.Context, id task.ID) (*task.Task, error) {
	if f.unread != nil {
		return nil, f.unread
	}
	t := f.tasks[id]
	if t == nil {
		return nil, task.ErrNotFound
	}
	now := *t
	return &now, nil
}

func (f *fakes) GetMany(ctx context.Context, ids []task.ID) (tasks []*task.Task, err error) {
	for _, id := range ids {
		t, err := f.Get(ctx, id)
		if err != nil {
			return nil, err
		}
		tasks = append(tasks, t)
	}
	return tasks, nil
}

func (f *fakes) Repeated(_ context.Context, key string, _ []byte) error {
	f.looked = append(f.looked, key)
	return f.repeated
}

func (f *fakes) Change(_ context.Context, t *task.Task, _ *task.Content) (*task.Task, error) {
	return f.change(t)
}

func (f *fakes) Redrive(_ context.Context, id task.ID, hops int) (*task.Task, error) {
	return &task.Task{ID: id, State: task.Pending}, f.redrive(hops)
}

func (f *fakes) RedriveMany(_ context.Context, ids []task.ID, _, _ time.Duration, hops int) (int, error) {
	return len(ids), f.redrive(hops)
}

func (f *fakes) QueueDefaults(_ context.Context, queue string) (task.QueueDefaults, error) {
	return f.queues[queue], f.unread
}

func (f *fakes) Now(context.Context) (time.Time, error) {
	f.asked++
	return storedAt, f.clockless
}

type fakePolicy func(string) error

func (p fakePolicy) CheckURL(rawURL string) error {
	if p == nil {
		return nil
	}
	return p(rawURL)
}

// fakeIssuer allows every role and target where it is nil.
type fakeIssuer func(rawURL, role string) error

func (f fakeIssuer) Check(rawURL, role string) error {
	if f == nil {
		return nil
	}
	return f(rawURL, role)
}

type fakeSecrets func(name, rawURL string) error

func (f fakeSecrets) Check(name, rawURL string) error {
	if f == nil {
		return nil
	}
	return f(name, rawURL)
}

// newIntake returns an Intake on f after change, if any.
func newIntake(f *fakes, change ...func(*Options)) *Intake {
	var n atomic.Uint64
	o := Options{
		Store: f, Dispatcher: f, Policy: fakePolicy(nil), Identity: fakePolicy(nil), Issuer: fakeIssuer(nil), Secrets: fakeSecrets(nil),
		Defaults: task.Spec{Timeout: 7 * time.Second, Retry: task.DefaultRetryPolicy()},
		NewID:    func() task.ID { return task.ID{15: byte(n.Add(1))} },
	}
	for _, c := range change {
		c(&o)
	}
	return New(o)
}

// asked returns what a request asks for that leaves all but the target out.
func asked(in *Intake, change ...func(*task.Spec)) task.Spec {
	s := in.Defaults()
	s.URL = target
	for _, c := range change {
		c(&s)
	}
	return s
}

// legal makes a task that breaks no rule.
func legal(t *testing.T, in *Intake, when task.When, change ...func(*task.Spec)) *task.Task {
	t.Helper()
	made, err := in.Task(asked(in, change...), when)
	if err != nil {
		t.Fatal(err)
	}
	return made
}
