package httpapi

import (
	"net/http"

	"github.com/danielgtaylor/huma/v2"
	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

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
			a.fail(w, r, httpserver.TooManyAnswers())
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

// answerOptions have text that is not UTF-8 written with U+FFFD in it: an answer that breaks
// off in its middle would be worse. For the same reason they let names be there twice, which
// those of one map are only where they were not UTF-8: that need not be looked for.
var answerOptions = json.JoinOptions(jsontext.AllowInvalidUTF8(true), jsontext.AllowDuplicateNames(true))

func encode(v any) ([]byte, error) { return json.Marshal(v, answerOptions) }

// answer writes v as JSON. Where answers take too much memory, one to a request that only
// reads is not made but refused.
func (a *API) answer(w http.ResponseWriter, r *http.Request, status int, v any) error {
	body := a.Guard.NewAnswer(!onlyReads(r))
	defer body.Release()
	if err := json.MarshalWrite(body, v, answerOptions); err != nil {
		w.Header().Del("ETag")
		return err
	}
	a.send(w, r, status, body.Bytes())
	return nil
}

// send writes an answer in JSON.
func (a *API) send(w http.ResponseWriter, r *http.Request, status int, b []byte) {
	httpserver.RenewWriteDeadline(w, r)
	w.Header()["Content-Type"] = []string{"application/json"}
	w.WriteHeader(status)
	_, _ = w.Write(b) // the caller is gone
}

// fail answers with the problem that an error is.
func (a *API) fail(w http.ResponseWriter, r *http.Request, err error) {
	p := problemOf(err)
	p.Instance = a.Guard.Report(r.Context(), p.Status, err)
	httpserver.RenewWriteDeadline(w, r)
	for name, values := range p.header {
		w.Header()[name] = values
	}
	b, err := encode(p)
	if err != nil {
		panic(err) // it has no value that does not encode
	}
	w.Header()["Content-Type"] = []string{"application/problem+json"}
	w.WriteHeader(p.Status)
	_, _ = w.Write(b) // the caller is gone
}

func (a *API) notFound(w http.ResponseWriter, r *http.Request) {
	detail := "There is nothing at this path."
	if !a.HideDocs {
		detail += " GET /docs lists what there is."
	}
	a.fail(w, r, newProblem(http.StatusNotFound, detail))
}
