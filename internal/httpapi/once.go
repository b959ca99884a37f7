package httpapi

import (
	"context"
	"crypto/sha256"
	"errors"
	"net/http"
	"slices"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/adapters/humachi"

	"github.com/melodia/orchestrator/internal/intake"
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

// request is what the body's tasks are submitted as.
//
// The same request means the same bytes to the same path: the fingerprint is of these.
func (in *onceInput) request(ctx context.Context, path string) intake.Request {
	r := intake.Request{Origin: originOf(ctx), IdempotencyKey: in.IdempotencyKey}
	if r.IdempotencyKey != "" || r.IsCall {
		h := sha256.New()
		h.Write([]byte(path + "\n"))
		h.Write(in.RawBody)
		r.Fingerprint = h.Sum(nil)
	}
	return r
}

// isRefusal reports whether err says that a body breaks rules, which depend on the time
// and on settings: what was answered 202 must not be answered 422 when it is sent again.
func isRefusal(err error) bool {
	p, ok := errors.AsType[*Problem](err)
	return !ok || p.Status == http.StatusUnprocessableEntity
}

// onceErrors are the statuses that a submission can be answered with, besides 422 and 500.
// Huma appends to them, which must not be in room that all operations share.
var onceErrors = slices.Clip(append([]int{http.StatusConflict, http.StatusLoopDetected}, submitErrors...))

const storedDetail = "This was handed in before and is stored. What became of it cannot be read at the moment: send the same again after Retry-After."

const goneDetail = "What was handed in under this Idempotency-Key is over, and its retention too. Nothing was stored; use another key for something new."
