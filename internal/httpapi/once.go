package httpapi

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"net/http"
	"slices"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/adapters/humachi"

	"github.com/melodia/orchestrator/internal/task"
)

// onceInput is a body that asks for something to be stored, and the name by
// which the caller will know the request again.
type onceInput struct {
	IdempotencyKey string `header:"Idempotency-Key" pattern:"^[!-~]{1,255}$" patternDescription:"1 to 255 visible ASCII characters" example:"play-42-7" doc:"Names this request, for the time that the service's settings say (24 hours by default): when the same request comes again under the key, nothing is stored, and the first one's outcome is answered, as it is then, with 200 and Idempotent-Replayed. The same means: to the same path, with the same bytes as its body; another request under the key is refused with 409. Each caller has keys of their own. A key is free again when its task was cancelled; that of a batch is not. 1 to 255 visible ASCII characters."`
	// As in submitInput.
	ContentType string `header:"Content-Type" hidden:"true"`
	RawBody     []byte
}

func (in *onceInput) body() *submitInput { return &submitInput{in.ContentType, in.RawBody} }

const keyHeader = "Idempotency-Key"

// Resolve is huma.Resolver: it reports what huma takes for no header at all, or
// for one.
func (*onceInput) Resolve(ctx huma.Context) []error {
	r, _ := humachi.Unwrap(ctx)
	values := r.Header[keyHeader]
	var message string
	switch {
	case len(values) > 1:
		message = "must not be there twice"
	case len(values) == 1 && values[0] == "":
		message = "expected length >= 1"
	default:
		return nil
	}
	return []error{&huma.ErrorDetail{Location: "header." + keyHeader, Message: message}}
}

// name returns the key under which the request is stored, and what tells a
// repeat of it from another request to path; nothing where the caller gave it
// no name. A key that was sent holds no space, so callers cannot have the same, and
// none has one that ends in a space.
//
// A task's own call is repeated where its answer was lost or came too late, and a
// target tells a repeat by Orchestrator-Task-Id: so does this one. The bytes are
// part of that name, since a proxy may make more of one call.
func (in *onceInput) name(ctx context.Context, path string) (key string, fingerprint []byte) {
	l := linkOf(ctx)
	if in.IdempotencyKey == "" && !l.isCall {
		return "", nil
	}
	h := sha256.New()
	h.Write([]byte(path + "\n"))
	h.Write(in.RawBody)
	fingerprint = h.Sum(nil)
	if in.IdempotencyKey == "" {
		return caller(ctx) + " call of " + l.parent.String() + " " + hex.EncodeToString(fingerprint) + " ", fingerprint
	}
	return caller(ctx) + " " + in.IdempotencyKey, fingerprint
}

// orRepeated returns what a submission that was refused with err is answered: the
// outcome of the same request where that was stored under the key before. Rules
// depend on the time and on settings, and what was answered 202 must not be
// answered 422 when a caller sends it again.
func (a *API) orRepeated(ctx context.Context, err error, key string, fingerprint []byte) error {
	if key == "" {
		return err
	}
	if p, ok := errors.AsType[*Problem](err); ok && p.Status != http.StatusUnprocessableEntity {
		return err
	}
	if found := a.Store.Repeated(ctx, key, fingerprint); found != nil && !errors.Is(found, task.ErrKeyTaken) {
		return found
	}
	return err
}

// onceErrors are the statuses that a submission can be answered with, besides 422 and 500.
// Huma appends to them, which must not be in room that all operations share.
var onceErrors = slices.Clip(append([]int{http.StatusConflict, http.StatusLoopDetected}, submitErrors...))

// ofRepeat is for an error of reading what the first request under a key stored.
func ofRepeat(err error) error {
	switch {
	case errors.Is(err, task.ErrNotFound):
		return newProblem(http.StatusConflict, goneDetail)
	case errors.Is(err, task.ErrOverloaded), errors.Is(err, task.ErrTooBroad): // whose own words are that nothing is stored
		return newProblem(http.StatusServiceUnavailable, storedDetail).retryLater()
	}
	return err
}

const storedDetail = "This was handed in before and is stored. What became of it cannot be read at the moment: send the same again after Retry-After."

const goneDetail = "What was handed in under this Idempotency-Key is over, and its retention too. Nothing was stored; use another key for something new."
