package httpapi

import (
	"net/http"

	"github.com/melodia/orchestrator/internal/intake"
)

// startingReason is why an API without a store is not ready, as long as nothing else
// is known.
const startingReason = "the service is starting"

// Starting says why the API is not ready yet: what /health answers as the reason. Until
// [API.Ready] the operations that need the store are answered 503 with Retry-After; the
// documentation and /health/live are served.
func (a *API) Starting(reason string) { a.notReady.Store(&reason) }

// Ready gives an API that was made without a store what it works with. It is called
// once.
func (a *API) Ready(store store, dispatcher dispatcher, intake *intake.Intake) {
	a.Store, a.Dispatcher, a.Intake = store, dispatcher, intake
	a.notReady.Store(nil) // after the fields: requests look at it before they use them
}

// awaitReady refuses requests before the store is there.
func (a *API) awaitReady(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if a.notReady.Load() != nil {
			a.fail(w, r, newProblem(http.StatusServiceUnavailable, "The service is starting and waits for its database; /health says for what. Nothing was stored or carried out.").retryLater())
			return
		}
		next.ServeHTTP(w, r)
	})
}
