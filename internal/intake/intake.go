// Package intake is what every door does to submit a task. A door reads a request in
// its own format and says what it means in the domain's terms. The intake applies the
// settings' defaults and the rules about targets and credentials, recognizes a request
// that came before, and has the tasks stored.
//
// Its errors are the domain's: [task.Errors] name the fields of a [task.Spec] as the
// domain does, and a door says where in its own format they stand.
package intake

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/melodia/orchestrator/internal/task"
)

// store is where tasks are kept.
type store interface {
	// Get returns a task without its body.
	Get(ctx context.Context, id task.ID) (*task.Task, error)
	// GetMany returns tasks in the order of their ids, or [task.ErrNotFound] where
	// one is not there.
	GetMany(ctx context.Context, ids []task.ID) ([]*task.Task, error)
	// Repeated returns a [*task.RepeatError] where the request of this fingerprint was
	// stored under an idempotency key, [task.ErrKeyTaken] where another one was, and
	// nil where none was.
	Repeated(ctx context.Context, key string, fingerprint []byte) error
	// Change writes a task that was changed since it was read, or returns
	// [task.ErrChanged] where others were faster. A nil content stays as it is.
	Change(ctx context.Context, t *task.Task, content *task.Content) (*task.Task, error)
	// Redrive makes a task pending again, at least hops into its chain.
	Redrive(ctx context.Context, id task.ID, hops int) (*task.Task, error)
	// RedriveMany makes the first task due after wait, each further one apart later.
	RedriveMany(ctx context.Context, ids []task.ID, wait, apart time.Duration, hops int) (count int, err error)
	// QueueDefaults returns what tasks of a queue have that do not say.
	QueueDefaults(ctx context.Context, queue string) (task.QueueDefaults, error)
	// Now returns the moment by the store's clock.
	Now(ctx context.Context) (time.Time, error)
}

// dispatcher stores new tasks and has them carried out.
type dispatcher interface {
	// Submit stores a task, sets its RunAt and CreatedAt, and returns nil after
	// the commit only. Where its idempotency key is taken, it returns a
	// [*task.RepeatError] or [task.ErrKeyTaken].
	Submit(ctx context.Context, t *task.Task) error
	// SubmitBatch is Submit of tasks that are stored together, or not at all.
	SubmitBatch(ctx context.Context, b *task.Batch) error
	// Wake says that a stored task may be due earlier than before.
	Wake()
}

// targetPolicy says which targets may be called. The error's text completes
// "url …" and does not hold the URL.
type targetPolicy interface {
	CheckURL(rawURL string) error
}

// identityPolicy says to which targets an ID token may be sent. The error's text
// completes "auth …" and does not hold the URL.
type identityPolicy interface {
	CheckURL(rawURL string) error
}

// tokenPolicy says to which targets a token of the platform may be sent, and with which
// role. The error's text completes "auth …" and holds neither.
type tokenPolicy interface {
	Check(rawURL, role string) error
}

// secretPolicy says which secrets there are, and to which targets they may be
// sent. The error is a [task.Shortage] where that cannot be told at the moment; else its
// text completes "headers.X …" and holds neither name nor URL.
type secretPolicy interface {
	Check(name, rawURL string) error
}

// Options are what an [Intake] works with.
type Options struct {
	Store      store
	Dispatcher dispatcher
	Policy     targetPolicy
	Identity   identityPolicy
	Issuer     tokenPolicy
	Secrets    secretPolicy
	// Defaults are the settings' values for what a request leaves out: Timeout and Retry.
	Defaults task.Spec
	// Completes: targets can reach this service, and report the ends of tasks.
	Completes bool
	// MaxHops is how many calls may have led to a request that stores, redrives or
	// carries out tasks; 0: any number.
	MaxHops int
	// NewID makes the ids of tasks.
	NewID func() task.ID
}

// Intake takes tasks in. Make one with [New]; any number of goroutines may use it.
type Intake struct{ o Options }

// New returns an Intake. All of o must be there.
func New(o Options) *Intake {
	o.Defaults.Method = "POST"
	return &Intake{o}
}

// Defaults returns the values of what a request leaves out: Method, Timeout and Retry.
// All else is zero.
func (in *Intake) Defaults() task.Spec { return in.o.Defaults }

// DefaultsOf is [Intake.Defaults] for a task of a queue and flow key, which may be empty:
// those of the queue come first. The error is the store's.
func (in *Intake) DefaultsOf(ctx context.Context, queue, flowKey string) (task.Spec, error) {
	if queue == "" && flowKey != "" {
		queue = task.DefaultQueue
	}
	if !task.IsQueueName(queue) { // none, or one that Task refuses
		return in.o.Defaults, nil
	}
	d, err := in.o.Store.QueueDefaults(ctx, queue)
	if err != nil {
		return task.Spec{}, err
	}
	return d.In(in.o.Defaults), nil
}

// Task makes a task of what a request asks for, by the domain's rules and the settings'
// rules about targets, tokens and secrets. The error is [task.Errors] with every rule
// that it breaks, or a [task.Shortage] where the instance could not find that out.
func (in *Intake) Task(spec task.Spec, when task.When) (*task.Task, error) {
	t, err := task.New(in.o.NewID(), spec, when, time.Now())
	if err != nil {
		return nil, err
	}
	errs, err := in.checkTarget(spec.URL, spec.Headers)
	if spec.Completion != nil && !in.o.Completes {
		errs = append(errs, task.FieldError{Path: []string{"completion"}, Kind: "unavailable",
			Message: "needs the service's setting PUBLIC_URL: where targets report the ends of tasks"})
	}
	callback := func(field string, c *task.Callback) {
		if c == nil || err != nil {
			return
		}
		var found task.Errors
		found, err = in.checkTarget(c.URL, c.Headers, field)
		errs = append(errs, found...)
	}
	callback("on_success", spec.OnSuccess)
	callback("on_failure", spec.OnFailure)
	if err != nil {
		return nil, err
	}
	if len(errs) == 0 {
		var err error
		switch {
		case spec.JWT != nil:
			err = in.o.Issuer.Check(spec.URL, spec.JWT.Role)
		case spec.OIDCAudience != "":
			err = in.o.Identity.CheckURL(spec.URL)
		}
		if err != nil {
			errs = append(errs, task.FieldError{Path: []string{"auth"}, Message: err.Error(), Kind: "target_refused"})
		}
	}
	if errs != nil {
		return nil, errs
	}
	return t, nil
}

// Unstored prepares a task that [Intake.Task] has made to be carried out at once, with one
// attempt, and not to be stored. The error is a [*HopsError], [task.Errors] where the task
// has expired, or that of the store's clock.
func (in *Intake) Unstored(ctx context.Context, from Origin, t *task.Task) error {
	if err := in.CheckHops(from.Hops); err != nil {
		return err
	}
	t.Retry.MaxAttempts = 1
	t.Hops = from.Hops
	t.RunAt = time.Now() // for the target's information; what has expired is the store's to say
	if t.ExpiresAt.IsZero() {
		return nil
	}
	now, err := in.o.Store.Now(ctx)
	if err != nil {
		return err
	}
	if t.RunAt = now; t.ExpiresAt.Before(now) {
		return task.Errors{{Path: []string{"expires_at"}, Message: "has passed", Kind: "expired"}}
	}
	return nil
}

// checkTarget reports what the settings do not allow about a call: its target, and
// the secrets that would be sent there. path leads to the object that holds url and
// headers, which the domain has found legal. err is a [task.Shortage].
func (in *Intake) checkTarget(url string, headers map[string]string, path ...string) (errs task.Errors, err error) {
	add := func(err error, kind string, rest ...string) {
		errs = append(errs, task.FieldError{Path: slices.Concat(path, rest), Message: err.Error(), Kind: kind})
	}
	if err := in.o.Policy.CheckURL(url); err != nil {
		add(err, "target_refused", "url")
		return errs, nil
	}
	for header, value := range headers {
		for _, name, rest, found := task.CutSecret(value); found; _, name, rest, found = task.CutSecret(rest) {
			if err := in.o.Secrets.Check(name, url); err != nil {
				if lacking, ok := errors.AsType[task.Shortage](err); ok {
					return nil, lacking
				}
				add(err, "secret_refused", "headers", header)
				break // one word per header
			}
		}
	}
	slices.SortFunc(errs, func(a, b task.FieldError) int { return slices.Compare(a.Path, b.Path) })
	return errs, nil
}

// mayExpireInDelay reports whether only the store's clock can say that t would expire
// before its first attempt. It is asked for those tasks alone.
func mayExpireInDelay(t *task.Task) bool { return t.Delay > 0 && !t.ExpiresAt.IsZero() }
