package intake

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"

	"github.com/melodia/orchestrator/internal/task"
)

// Request is a request that submits tasks, but for the tasks.
type Request struct {
	Origin
	// IdempotencyKey is the name by which the principal will know the request again,
	// without spaces; empty is none.
	IdempotencyKey string
	// Fingerprint tells a repeat of the request from another one under the same key.
	// nil: it is computed of the tasks.
	Fingerprint []byte
}

// Errors of [Intake.Submit] and [Intake.SubmitBatch] about a request that came before.
var (
	// ErrRepeatGone: what the request stored then is over, and its retention too.
	ErrRepeatGone = errors.New("what was stored under the idempotency key is not kept any more")
	// ErrRepeatUnread: what the request stored then cannot be read at the moment.
	ErrRepeatUnread = errors.New("what was stored under the idempotency key cannot be read at the moment")
)

// BatchError is what is wrong with tasks of a batch.
type BatchError []struct {
	// Index is the task's place in the batch, from 0.
	Index  int
	Errors task.Errors
}

func (e BatchError) Error() string {
	return fmt.Sprintf("task %d of the batch: %v", e[0].Index, e[0].Errors)
}

// Submit stores a task that [Intake.Task] has made of r. It returns the task after the
// commit only. Where the same request came before under its idempotency key, it stores
// nothing and returns the task that was stored then, as it is now; repeated says so.
//
// refusal is nil, or why the door could make no task of r; t is nil then. Rules depend on
// the time and on settings, and what was accepted must not be refused when it is sent
// again: so Submit returns refusal only where r is no repeat.
//
// Other errors are [task.Errors] where the task would expire before its first attempt, a
// [*HopsError], [task.ErrKeyTaken], [ErrRepeatGone], [ErrRepeatUnread] and the store's.
func (in *Intake) Submit(ctx context.Context, r Request, t *task.Task, refusal error) (stored *task.Task, repeated bool, err error) {
	if err := in.CheckHops(r.Hops); err != nil {
		return nil, false, err
	}
	if err = refusal; err == nil {
		err = in.checkDelay(ctx, t)
	}
	if err == nil {
		r.mark(t)
		t.IdempotencyKey, t.Fingerprint = r.identity(t)
		err = in.o.Dispatcher.Submit(ctx, t)
	} else {
		err = in.orRepeated(ctx, r, err)
	}
	if repeat, ok := errors.AsType[*task.RepeatError](err); ok {
		t, err = in.o.Store.Get(ctx, repeat.Tasks[0])
		return t, true, ofRepeat(err)
	}
	return t, false, err
}

// SubmitBatch is [Intake.Submit] of tasks that are stored together, or not at all. Of the
// attempts of tasks that were stored before, the last one is returned alone. Where tasks
// would expire before their first attempts the error is a [BatchError].
func (in *Intake) SubmitBatch(ctx context.Context, r Request, tasks []*task.Task, refusal error) (stored []*task.Task, repeated bool, err error) {
	if err := in.CheckHops(r.Hops); err != nil {
		return nil, false, err
	}
	if err = refusal; err == nil {
		err = in.checkDelays(ctx, tasks)
	}
	if err == nil {
		for _, t := range tasks {
			r.mark(t)
		}
		b := &task.Batch{Tasks: tasks}
		b.IdempotencyKey, b.Fingerprint = r.identity(tasks...)
		err = in.o.Dispatcher.SubmitBatch(ctx, b)
	} else {
		err = in.orRepeated(ctx, r, err)
	}
	if repeat, ok := errors.AsType[*task.RepeatError](err); ok {
		tasks, err = in.o.Store.GetMany(ctx, repeat.Tasks)
		return tasks, true, ofRepeat(err)
	}
	return tasks, false, err
}

// identity returns the key under which r is stored, and what tells a repeat of it from
// another request; nothing where r has no name. A key that was sent holds no space, so
// principals cannot have the same, and none has one that ends in a space.
//
// A task's own call is repeated where its answer was lost or came too late, and a
// target tells a repeat by Orchestrator-Task-Id: so does this service. The fingerprint is
// part of that name, since a proxy may make more of one call.
func (r *Request) identity(tasks ...*task.Task) (key string, fingerprint []byte) {
	if r.IdempotencyKey == "" && !r.IsCall {
		return "", nil
	}
	if fingerprint = r.Fingerprint; fingerprint == nil {
		fingerprint = fingerprintOf(tasks)
	}
	if r.IdempotencyKey == "" {
		return r.Principal + " call of " + r.Parent.String() + " " + hex.EncodeToString(fingerprint) + " ", fingerprint
	}
	return r.Principal + " " + r.IdempotencyKey, fingerprint
}

// orRepeated returns refusal, or a [*task.RepeatError] where r was stored before, or why
// that cannot be told.
func (in *Intake) orRepeated(ctx context.Context, r Request, refusal error) error {
	if r.Fingerprint == nil {
		return refusal
	}
	key, fingerprint := r.identity()
	if key == "" {
		return refusal
	}
	if found := in.o.Store.Repeated(ctx, key, fingerprint); found != nil && !errors.Is(found, task.ErrKeyTaken) {
		return found
	}
	return refusal
}

// ofRepeat is for an error of reading what the first request under a key stored.
func ofRepeat(err error) error {
	switch {
	case errors.Is(err, task.ErrNotFound):
		return ErrRepeatGone
	case errors.Is(err, task.ErrOverloaded), errors.Is(err, task.ErrTooBroad): // whose own words are that nothing is stored
		return ErrRepeatUnread
	}
	return err
}

// checkDelay returns an error where t, which is about to be stored, would expire
// before its first attempt because of its delay.
func (in *Intake) checkDelay(ctx context.Context, t *task.Task) error {
	if !mayExpireInDelay(t) {
		return nil
	}
	now, err := in.o.Store.Now(ctx)
	if err != nil {
		return err
	}
	return t.CheckDelay(now)
}

// checkDelays is checkDelay of the tasks of a batch.
func (in *Intake) checkDelays(ctx context.Context, tasks []*task.Task) error {
	if !slices.ContainsFunc(tasks, mayExpireInDelay) {
		return nil
	}
	now, err := in.o.Store.Now(ctx)
	if err != nil {
		return err
	}
	var wrong BatchError
	for i, t := range tasks {
		if errs, ok := errors.AsType[task.Errors](t.CheckDelay(now)); ok {
			wrong = append(wrong, struct {
				Index  int
				Errors task.Errors
			}{i, errs})
		}
	}
	if wrong != nil {
		return wrong
	}
	return nil
}
