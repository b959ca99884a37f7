package credentials

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"cloud.google.com/go/compute/metadata"

	"github.com/melodia/orchestrator/internal/target"
	"github.com/melodia/orchestrator/internal/task"
)

const (
	// fetchTimeout bounds a request to the metadata server, which is near.
	fetchTimeout = 5 * time.Second
	// renewBefore is how long before its end a token is renewed. It is below the
	// five minutes before which the metadata server returns the same one again.
	renewBefore = 4 * time.Minute
	// freshFor is how long a token counts as just fetched.
	freshFor = 10 * time.Second
	anyAge   = time.Duration(1<<63 - 1)
	// maxTokens bounds the cache: callers may name any audience.
	maxTokens     = 1000
	maxTokenBytes = 16 << 10
)

// Identity fetches ID tokens of the service's own account from the metadata
// server, by a client of its own: the calls of tasks never reach that server. The nil
// Identity allows no token. Any number of goroutines may use it.
type Identity struct {
	hosts  target.Hosts
	server *metadata.Client

	mu       sync.Mutex
	tokens   map[string]*idToken // by audience
	fetching map[string]*fetch   // by audience
	uses     uint64
}

// idToken is a token of the cache.
type idToken struct {
	audience, value  string
	fetched, expires time.Time
	used             uint64 // Identity.uses when it was used last
}

// fetch is a request to the metadata server that is under way. Its result may be
// read when done is closed.
type fetch struct {
	done  chan struct{}
	token *idToken
	err   error
	// abandoned: the call that carried it out ended before the answer.
	abandoned bool
}

// Errors of [Identity.CheckURL]. Their texts complete "auth …".
var (
	errIdentityOff  = errors.New("must not be there: OIDC_TARGET_HOSTS allows no host")
	errIdentityHost = errors.New("must not be there: OIDC_TARGET_HOSTS does not allow the url's host")
	errIdentityHTTP = errors.New("needs a url that begins with https://")
)

// NewIdentity takes the hosts that may be sent a token (see [target.Hosts] for
// their form). Errors number the entries and do not hold them.
func NewIdentity(hosts []string) (*Identity, error) {
	i := &Identity{tokens: make(map[string]*idToken), fetching: make(map[string]*fetch)}
	for n, host := range hosts {
		if err := i.hosts.Add(host); err != nil {
			return nil, errors.New("entry " + strconv.Itoa(n+1) + ": " + err.Error())
		}
	}
	i.server = metadata.NewClient(&http.Client{
		Transport: &http.Transport{
			Proxy:             nil, // a token would go through it in the clear
			DialContext:       (&net.Dialer{Timeout: 2 * time.Second}).DialContext,
			DisableKeepAlives: true, // it is asked once an hour
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	})
	return i, nil
}

// CheckURL returns an error unless an ID token may be sent to rawURL. The
// error's text completes "auth …" and holds nothing that was sent.
func (i *Identity) CheckURL(rawURL string) error {
	u, err := task.ParseURL(rawURL)
	if err != nil {
		return target.ErrNotURL
	}
	return i.check(u)
}

func (i *Identity) check(u *url.URL) error {
	switch {
	case i == nil || i.hosts.Empty():
		return errIdentityOff
	case !i.hosts.Contains(u):
		return errIdentityHost
	case !target.Confidential(u):
		return errIdentityHTTP
	}
	return nil
}

// token returns a token for audience that is valid at now and was fetched at most
// maxAge before. Where none can be fetched, it returns an older one that is still
// valid. It blocks until ctx is done at most. There is one fetch at a time for an
// audience; all calls that wait for it share its result.
func (i *Identity) token(ctx context.Context, audience string, now time.Time, maxAge time.Duration) (*idToken, error) {
	for {
		t, f, mine := i.lookUp(audience, now, maxAge)
		switch {
		case f == nil:
			return t, nil
		case mine:
			i.carryOut(ctx, f, audience, now)
		default:
			select {
			case <-f.done:
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		}
		switch {
		case f.err == nil:
			return f.token, nil
		case f.abandoned && ctx.Err() == nil:
			continue // the other call has ended, this one has not
		case t != nil && now.Before(t.expires):
			return t, nil
		default:
			return nil, f.err
		}
	}
}

// lookUp returns the token that is known for audience, if any. Where that is too old,
// f is the fetch to wait for; where mine is true, the caller must carry it out.
func (i *Identity) lookUp(audience string, now time.Time, maxAge time.Duration) (t *idToken, f *fetch, mine bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	t = i.tokens[audience]
	if t != nil {
		i.uses++
		t.used = i.uses
		if now.Before(t.expires.Add(-renewBefore)) && now.Sub(t.fetched) <= maxAge {
			return t, nil, false
		}
	}
	if f = i.fetching[audience]; f != nil {
		return t, f, false
	}
	f = &fetch{done: make(chan struct{})}
	i.fetching[audience] = f
	return t, f, true
}

// carryOut fetches a token from the metadata server and keeps it.
func (i *Identity) carryOut(ctx context.Context, f *fetch, audience string, now time.Time) {
	f.err, f.abandoned = errors.New("fetch ID token: gave up"), true // in case of a panic
	defer func() {
		i.mu.Lock()
		delete(i.fetching, audience)
		if f.err == nil {
			i.keep(f.token)
		}
		i.mu.Unlock()
		close(f.done)
	}()
	value, expires, err := i.ask(ctx, audience)
	f.token = &idToken{audience: audience, value: value, fetched: now, expires: expires}
	f.err, f.abandoned = err, ctx.Err() != nil
}

// keep adds t to the cache. Where the cache is full it drops the least recently used
// token. i.mu is held.
func (i *Identity) keep(t *idToken) {
	if len(i.tokens) >= maxTokens && i.tokens[t.audience] == nil {
		var oldest *idToken
		for _, other := range i.tokens {
			if oldest == nil || other.used < oldest.used {
				oldest = other
			}
		}
		delete(i.tokens, oldest.audience)
	}
	i.uses++
	t.used = i.uses
	i.tokens[t.audience] = t
}

// ask gets a token from the metadata server, and reads when it expires. Its signature
// is for the target to check.
func (i *Identity) ask(ctx context.Context, audience string) (value string, expires time.Time, err error) {
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	// Without format=full, tokens from Compute Engine lack the account's email.
	value, err = i.server.GetWithContext(ctx, "instance/service-accounts/default/identity?format=full&audience="+url.QueryEscape(audience))
	if err != nil {
		return "", time.Time{}, &Error{text: "no ID token could be had: " + describeMetadata(err), cause: err}
	}
	value = strings.TrimSpace(value)
	parts := strings.Split(value, ".")
	if len(value) > maxTokenBytes || len(parts) != 3 || !task.IsFieldValue(value) || strings.ContainsAny(value, " \t") {
		return "", time.Time{}, errNoToken
	}
	var claims struct {
		Expires float64 `json:"exp"`
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil || json.Unmarshal(payload, &claims) != nil || claims.Expires == 0 {
		return "", time.Time{}, errNoToken
	}
	return value, time.Unix(int64(claims.Expires), 0), nil
}

var errNoToken = &Error{text: "no ID token could be had: what the metadata server answered is none"}

// describeMetadata says in words of its own why a request to the metadata server
// failed: what the server sent must not be stored with the task.
func describeMetadata(err error) string {
	if _, ok := errors.AsType[metadata.NotDefinedError](err); ok {
		return "the metadata server answered 404: the service has no account there"
	}
	if answered, ok := errors.AsType[*metadata.Error](err); ok {
		return "the metadata server answered " + strconv.Itoa(answered.Code)
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return "the metadata server did not answer in time"
	}
	return "the metadata server cannot be reached"
}

// refused takes note that a target answered 401 to t at now. It reports whether
// another token may do better: then t is dropped, and the next token is a new one.
func (i *Identity) refused(t *idToken, now time.Time) bool {
	if now.Sub(t.fetched) <= freshFor {
		return false
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.tokens[t.audience] == t {
		delete(i.tokens, t.audience)
	}
	return true
}
