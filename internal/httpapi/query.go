package httpapi

import (
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"github.com/danielgtaylor/huma/v2"
)

// checkParameters refuses a request whose query holds a parameter that its operation
// does not declare, so that a misspelt one is not silently ignored (a dry_run in
// the query of a cancel), or holds one twice that the operation reads once.
func (a *API) checkParameters(operation *huma.Operation, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.RawQuery != "" {
			if found := queryMistakes(operation, r.URL.RawQuery); found != nil {
				a.write(w, r, invalid(found))
				return
			}
		}
		next.ServeHTTP(w, r)
	})
}

// queryMistakes returns what is wrong with the names in a query; nil is nothing.
func queryMistakes(operation *huma.Operation, rawQuery string) (found []FieldProblem) {
	query, err := url.ParseQuery(rawQuery)
	if err != nil {
		return []FieldProblem{{Loc: Loc{"query"}, Msg: "must be percent-encoded: % is written %25, and ; is written %3B", Type: "invalid"}}
	}
	for _, name := range slices.Sorted(maps.Keys(query)) {
		switch known, several := declared(operation, name); {
		case !known:
			found = append(found, FieldProblem{Loc: Loc{"query", clipName(name)}, Msg: "is not a parameter of this request; look for a spelling mistake", Type: "extra_forbidden"})
		case len(query[name]) > 1 && !several:
			found = append(found, FieldProblem{Loc: Loc{"query", clipName(name)}, Msg: "must not be there twice", Type: "duplicate"})
		}
	}
	return found
}

// labelPrefix begins the parameters that stand for the members of labels.
const labelPrefix = "label."

// declared reports whether an operation has a query parameter of this name, and
// whether it may be given several times.
func declared(operation *huma.Operation, name string) (known, several bool) {
	for _, p := range operation.Parameters {
		switch {
		case p.In != "query":
		case p.Schema.Type == huma.TypeObject:
			if strings.HasPrefix(name, labelPrefix) {
				return true, false
			}
		case p.Name == name:
			return true, p.Explode != nil && *p.Explode
		}
	}
	return false, false
}

// clipName keeps the answer to a query smaller than the query.
func clipName(name string) string {
	const most = 64
	return strings.ToValidUTF8(name[:min(len(name), most)], "")
}
