package httpapi

import (
	"net/http"

	"github.com/danielgtaylor/huma/v2"
)

const (
	// maxAnswers bounds all answers that are being written. One is for as long as
	// its caller does not read it, up to the server's WriteTimeout.
	maxAnswers = 64 << 20
	// smallAnswer is what is written whatever the others take. So much of each of
	// the connections that there may be fits into the service's memory.
	smallAnswer = 16 << 10
	// assetAnswer is what net/http takes to write a file, however large it is.
	assetAnswer = 40 << 10
)

func tooManyAnswers() *Problem {
	return newProblem(http.StatusServiceUnavailable, "Callers have not read their answers, which take 64 MiB already. Nothing was changed; try again after the time in Retry-After.").retryLater()
}

// reserve counts n bytes of an answer, and reports whether they may be written.
// Either way they count until they are given to release.
func (a *API) reserve(n int) bool {
	return a.answers.Add(int64(n)) <= maxAnswers || n <= smallAnswer
}

func (a *API) release(n int) { a.answers.Add(-int64(n)) }

// awaitAnswers refuses what would change something while answers take too much,
// before it does; one who changed something is answered in any case.
func (a *API) awaitAnswers(operation *huma.Operation, next http.Handler) http.Handler {
	if smallAnswers[operation.Path] {
		return next
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !onlyReads(r) && a.answers.Load() > maxAnswers {
			a.write(w, r, tooManyAnswers())
			return
		}
		next.ServeHTTP(w, r)
	})
}

func onlyReads(r *http.Request) bool {
	return r.Method == http.MethodGet || r.Method == http.MethodHead
}

// smallAnswers are operations whose answers do not grow with what is stored.
var smallAnswers = map[string]bool{"/enqueue": true, "/schedule": true, "/worker-endpoint": true}
