package intake

import (
	"context"
	"errors"
	"time"

	"github.com/melodia/orchestrator/internal/task"
)

// changeTries is how often a change is made to what was read anew, where others
// change the same task.
const changeTries = 3

// Change changes a pending task, which must obey all rules for new ones then, and returns
// it as it is stored. allow, unless it is nil, is shown the task as it is, and its error
// is returned. Other errors are those of [Intake.Task], [task.ErrChanged] where others changed the
// task again and again, those of [task.Task.Change], and the store's.
func (in *Intake) Change(ctx context.Context, id task.ID, change task.Change, allow func(*task.Task) error) (t *task.Task, err error) {
	for range changeTries {
		if t, err = in.tryChange(ctx, id, change, allow); !errors.Is(err, task.ErrChanged) {
			break
		}
	}
	if err != nil {
		return nil, err
	}
	in.o.Dispatcher.Wake()
	return t, nil
}

func (in *Intake) tryChange(ctx context.Context, id task.ID, change task.Change, allow func(*task.Task) error) (*task.Task, error) {
	t, err := in.o.Store.Get(ctx, id)
	if err != nil {
		return nil, err
	}
	if allow != nil {
		if err := allow(t); err != nil {
			return nil, err
		}
	}
	changed, err := t.Change(change, time.Now())
	if err != nil {
		return nil, err
	}
	if err := in.checkDelay(ctx, changed); err != nil {
		return nil, err
	}
	// A header may refer to a secret that the target may not have.
	switch errs, err := in.checkTarget(changed.URL, changed.Headers); {
	case err != nil:
		return nil, err
	case errs != nil:
		return nil, errs
	}
	return in.o.Store.Change(ctx, changed, change.Content)
}

// Redrive makes a failed or cancelled task pending again, due at once, and returns it. Its
// calls are at least as many hops into their chain as the request is. The error is a
// [*HopsError] or the store's.
func (in *Intake) Redrive(ctx context.Context, from Origin, id task.ID) (*task.Task, error) {
	if err := in.CheckHops(from.Hops); err != nil {
		return nil, err
	}
	t, err := in.o.Store.Redrive(ctx, id, from.Hops)
	if err != nil {
		return nil, err
	}
	in.o.Dispatcher.Wake()
	return t, nil
}

// RedriveMany is [Intake.Redrive] of some hundred tasks. Those that cannot be redriven are
// left out; it returns how many were. The first is due after wait, each further one apart later.
func (in *Intake) RedriveMany(ctx context.Context, from Origin, ids []task.ID, wait, apart time.Duration) (int, error) {
	if err := in.CheckHops(from.Hops); err != nil {
		return 0, err
	}
	count, err := in.o.Store.RedriveMany(ctx, ids, wait, apart, from.Hops)
	in.o.Dispatcher.Wake()
	return count, err
}
