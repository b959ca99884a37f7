package httpapi

import (
	"crypto/sha256"
	"errors"
	"net/http"

	"github.com/danielgtaylor/huma/v2"

	"github.com/melodia/orchestrator/internal/httpserver"
	"github.com/melodia/orchestrator/internal/intake"
)

// idempotencyInput is the name by which the caller will recognize a submission.
type idempotencyInput struct {
	IdempotencyKey string `header:"Idempotency-Key" pattern:"^[!-~]{1,255}$" patternDescription:"1 to 255 visible ASCII characters" example:"play-42-7" doc:"Names this request, for the time that the service's settings say (24 hours by default): when the same request comes again under the key, nothing is stored, and the answer is 200 with Idempotent-Replayed and the first task, as it is by then. The same means: to the same path, with the same bytes as its body; another request under the key is refused with 409. Each caller has keys of their own. Cancelling a task releases its key; the key of a batch stays. 1 to 255 visible ASCII characters."`
}

// submission is what the tasks of a request's body are submitted as, or an error where
// the request may not submit any.
//
// The same request means the same bytes to the same path: the fingerprint is of these.
func (a *API) submission(r *http.Request) (intake.Request, error) {
	var named idempotencyInput
	from, err := a.origin(r)
	if err == nil {
		err = a.readParams(r, &named)
	}
	in := intake.Request{Origin: from, IdempotencyKey: named.IdempotencyKey}
	if in.IdempotencyKey != "" || in.IsCall {
		h := sha256.New()
		h.Write([]byte(r.URL.Path + "\n"))
		h.Write(httpserver.Body(r))
		in.Fingerprint = h.Sum(nil)
	}
	return in, err
}

// submitParameters document what submission reads.
func (a *API) submitParameters() []*huma.Param {
	return append(linkParameters(), a.parameters(idempotencyInput{})...)
}

// stored documents the answers to a submission: to the first one, and to a repeat.
func (a *API) stored(v any, headers ...header) map[string]*huma.Response {
	replayed := header{"Idempotent-Replayed", "true", "true: the same request came before under the Idempotency-Key, and this is what it stored, as it is now."}
	responses := a.responses(http.StatusAccepted, v, headers...)
	responses["202"].Description = "It is stored."
	repeat := a.responses(http.StatusOK, v, append(headers, replayed)...)["200"]
	repeat.Description = "It was stored before, under the same Idempotency-Key."
	responses["200"] = repeat
	return responses
}

// statusOf says that a submission was stored, or that it was before.
func statusOf(w http.ResponseWriter, repeated bool) int {
	if !repeated {
		return http.StatusAccepted
	}
	w.Header()["Idempotent-Replayed"] = []string{"true"}
	return http.StatusOK
}

// isRefusal reports whether err says that a body breaks rules, which depend on the time
// and on settings: what was answered 202 must not be answered 422 when it is sent again.
func isRefusal(err error) bool {
	p, ok := errors.AsType[*Problem](err)
	return !ok || p.Status == http.StatusUnprocessableEntity
}

// submitErrors are the statuses that a submission can be answered with, besides 422 and 500.
var submitErrors = append([]int{http.StatusConflict, http.StatusLoopDetected}, bodyErrors...)
