package httpserver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/melodia/orchestrator/internal/task"
)

// authenticator tells which principal makes a request.
type authenticator interface {
	// Authenticate returns the principal's name, empty where principals are not known,
	// and its scopes. An error is [task.ErrUnavailable] where that cannot be told at
	// the moment; otherwise its text says what is wrong with the credentials, completes
	// a sentence, and holds nothing that was sent.
	Authenticate(ctx context.Context, header http.Header) (principal string, scopes []string, err error)
}

// Need is what a request needs to be let through.
type Need struct {
	// Scopes are those each of which lets it through alone; the first is named to callers
	// that have none of them.
	Scopes []string
	// Purpose completes "the scope X, which …".
	Purpose string
}

// Challenge is the WWW-Authenticate of an answer of 401.
const Challenge = `Bearer realm="orchestrator"`

type principalKey struct{}

// Principal returns the name of the principal that makes a request, from the request's
// context; empty where principals are not known, or the request needed no scope.
func Principal(ctx context.Context) string {
	name, _ := ctx.Value(principalKey{}).(string)
	return name
}

// Authorize lets a request through whose principal has a scope that it needs, and has not
// made too many requests of late. [Principal] returns its name from then on.
func (d *Door) Authorize(need func(*http.Request) Need, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		principal, err := d.authorize(r, need(r))
		if err != nil {
			d.fail(w, r, err)
			return
		}
		if principal != "" {
			r = r.WithContext(context.WithValue(r.Context(), principalKey{}, principal))
		}
		next.ServeHTTP(w, r)
	})
}

func (g *Guard) authorize(r *http.Request, need Need) (principal string, err error) {
	principal, scopes, err := g.o.Authenticator.Authenticate(r.Context(), r.Header)
	switch {
	case errors.Is(err, task.ErrUnavailable):
		return "", fmt.Errorf("%w: %w", &Refusal{Status: http.StatusServiceUnavailable, Header: RetryLater(),
			Detail: "The service cannot reach the issuer of tokens at the moment, so that it cannot tell who calls. Nothing was stored or carried out."}, err)
	case err != nil:
		return "", &Refusal{Status: http.StatusUnauthorized, Header: http.Header{"Www-Authenticate": {Challenge}},
			Detail: "The service cannot tell who calls: " + err.Error() + "."}
	case !slices.ContainsFunc(need.Scopes, func(scope string) bool { return slices.Contains(scopes, scope) }):
		scope := need.Scopes[0]
		return "", &Refusal{Status: http.StatusForbidden,
			Header: http.Header{"Www-Authenticate": {Challenge + `, error="insufficient_scope", scope="` + scope + `"`}},
			Detail: "The caller lacks the scope " + scope + ", which " + need.Purpose + "; it has " + cmp.Or(strings.Join(scopes, ", "), "none") + "."}
	}
	// After that: requests without credentials use up nothing of principals.
	if wait := g.rates.take(principal, r.RemoteAddr, time.Now()); wait > 0 {
		return "", fmt.Errorf("%w (caller %q)", &Refusal{Status: http.StatusTooManyRequests,
			Header: http.Header{"Retry-After": {strconv.Itoa(int(math.Ceil(wait.Seconds())))}},
			Detail: "This caller sends more requests than it may. Nothing was stored or carried out; try again after the time in Retry-After."}, principal)
	}
	return principal, nil
}
