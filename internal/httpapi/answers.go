package httpapi

import (
	"net/http"

	"github.com/danielgtaylor/huma/v2"

	"github.com/melodia/orchestrator/internal/httpserver"
)

// assetAnswer is what net/http takes to write a file, however large it is.
const assetAnswer = 40 << 10

// awaitAnswers refuses what would change something while answers take too much,
// before it does; one who changed something is answered in any case.
func (a *API) awaitAnswers(operation *huma.Operation, next http.Handler) http.Handler {
	if smallAnswers[operation.Path] {
		return next
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !onlyReads(r) && a.Guard.Answers().Exceeded() {
			a.write(w, r, httpserver.TooManyAnswers())
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
