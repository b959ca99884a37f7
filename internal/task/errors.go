package task

import "errors"

// Errors that packages around the domain wrap, so that others can tell them apart.
var (
	// ErrNotFound: no task has this id, or its retention is over.
	ErrNotFound = errors.New("task not found")
	// ErrNotPending: the task is running or has ended.
	ErrNotPending = errors.New("task is not pending")
	// ErrEnded: the task has ended.
	ErrEnded = errors.New("task has ended")
	// ErrTokenUnknown: no attempt of the task has, or had, the completion token.
	ErrTokenUnknown = errors.New("unknown completion token")
	// ErrTokenOld: the completion token is of an attempt that is over.
	ErrTokenOld = errors.New("completion token of an attempt that is over")
	// ErrCancelRequested: a caller asked before that the running task be cancelled.
	ErrCancelRequested = errors.New("task is being cancelled")
	// ErrNotRedrivable: the task has neither failed nor been cancelled.
	ErrNotRedrivable = errors.New("task has neither failed nor been cancelled")
	// ErrChanged: another caller or instance changed the task at the same moment. Nothing was
	// written.
	ErrChanged = errors.New("task was changed meanwhile")
	// ErrKeyTaken: another request came before under the same idempotency key.
	// Nothing was stored.
	ErrKeyTaken = errors.New("idempotency key belongs to another request")
	// ErrQueueNotFound: no task has named this queue, and its settings were not written,
	// since it was deleted last.
	ErrQueueNotFound = errors.New("queue not found")
	// ErrQueueKeyNotFound: the flow key has no limits of its own.
	ErrQueueKeyNotFound = errors.New("flow key without limits of its own")
	// ErrQueueInUse: tasks of the queue are pending or running.
	ErrQueueInUse = errors.New("queue has pending or running tasks")
	// ErrQueueChanged: another caller wrote the same settings at the same moment. Nothing
	// was written.
	ErrQueueChanged = errors.New("queue was changed meanwhile")
	// ErrUnavailable: the store could not be asked, or did not answer. What was
	// to be written may or may not have been.
	ErrUnavailable = errors.New("task store unavailable")
	// ErrOverloaded: too much is under way at the moment. Nothing was begun, so
	// the same may be tried again a little later.
	ErrOverloaded = errors.New("overloaded")
	// ErrTooBroad: too much would have to be looked through for too little that
	// matches. A filter that asks for less may get an answer.
	ErrTooBroad = errors.New("the search took too long")
)

// RepeatError says that the same request came before under the same idempotency
// key. Nothing was stored.
type RepeatError struct {
	// Tasks are those that were stored then, in the order of the request.
	Tasks []ID
}

// Error does not say which tasks: an [ID] is for those who ask for it.
func (*RepeatError) Error() string { return "request was made before" }
