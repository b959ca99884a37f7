package auth

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"

	"github.com/melodia/orchestrator/internal/task"
)

const (
	// issuerTimeout bounds how long a request waits for the issuer.
	issuerTimeout = 5 * time.Second
	// freshFor is for how long an answer of the issuer is used again. A token that is
	// signed by an unknown key needs a new answer: however many of them come, the
	// issuer is asked once in freshFor.
	freshFor = 10 * time.Second
	// failedFor is the same for a request to the issuer that failed.
	failedFor = time.Second
	// maxIssuerAnswer is far more than the keys of any issuer.
	maxIssuerAnswer = 1 << 20
)

// algorithms are the asymmetric ones, whatever the issuer lists and the token says.
var algorithms = []string{oidc.RS256, oidc.RS384, oidc.RS512, oidc.PS256, oidc.PS384, oidc.PS512, oidc.ES256, oidc.ES384, oidc.ES512, oidc.EdDSA}

// tokenVerifier checks the ID tokens of one issuer.
type tokenVerifier struct {
	issuer string
	config oidc.Config
	allow  map[string][]string // scopes by email
	client *http.Client

	mu   sync.Mutex
	keys oidc.KeySet // nil until the issuer has said where they are
}

func newTokenVerifier(o Options) (*tokenVerifier, error) {
	v := &tokenVerifier{
		issuer: o.OIDCIssuer,
		config: oidc.Config{ClientID: o.OIDCAudience, SupportedSigningAlgs: algorithms},
		allow:  make(map[string][]string),
		client: newIssuerClient(newIssuerTransport()),
	}
	var errs []error
	if !trustworthy(o.OIDCIssuer) {
		errs = append(errs, errors.New("OIDC_ISSUER must be an https URL (http on the loopback address)"))
	}
	if o.OIDCAudience == "" {
		errs = append(errs, errors.New("OIDC_AUDIENCE is not set, and AUTH names oidc: it must be what callers ask tokens for, like this service's URL"))
	}
	if len(o.OIDCAllow) == 0 {
		errs = append(errs, errors.New("OIDC_ALLOW is not set, and AUTH names oidc: it must have entries email:scopes, joined by commas"))
	}
	for i, entry := range o.OIDCAllow {
		email, list, _ := strings.Cut(strings.TrimSpace(entry), ":")
		scopes, err := parseScopes(list, o.Scopes)
		if err == nil && (!storable(email) || !strings.Contains(email, "@") || v.allow[email] != nil) {
			err = errors.New("it must be email:scopes, with an email that no earlier entry has")
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("OIDC_ALLOW, entry %d: %w", i+1, err))
		}
		v.allow[email] = scopes
	}
	return v, errors.Join(errs...)
}

// trustworthy reports whether what is at a URL cannot be changed on its way here.
func trustworthy(rawURL string) bool {
	u, err := url.Parse(rawURL)
	if err != nil || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return false
	}
	ip, _ := netip.ParseAddr(u.Hostname())
	return u.Scheme == "https" || u.Scheme == "http" && ip.IsLoopback()
}

// identify checks an ID token and finds its email's scopes: none where the
// email is not listed.
func (v *tokenVerifier) identify(ctx context.Context, rawToken string) (email string, scopes []string, err error) {
	ctx, cancel := context.WithTimeout(ctx, issuerTimeout)
	defer cancel()
	keys := &keyRequest{verifier: v}
	token, err := oidc.NewVerifier(v.issuer, keys, &v.config).Verify(ctx, rawToken)
	if _, ok := errors.AsType[*oidc.TokenExpiredError](err); ok {
		return "", nil, errExpired
	}
	if err != nil {
		if errors.Is(keys.err, task.ErrUnavailable) {
			return "", nil, keys.err
		}
		return "", nil, errToken
	}
	// One for several audiences could come from any of the others.
	if !slices.Equal(token.Audience, []string{v.config.ClientID}) {
		return "", nil, errToken
	}
	var payload json.RawMessage
	if err := token.Claims(&payload); err != nil {
		return "", nil, errToken
	}
	claims, err := parseIDClaims(payload)
	if err != nil {
		return "", nil, errToken
	}
	var verified bool
	if !claims.read("email", &email) || !claims.read("email_verified", &verified) || !verified || email == "" {
		return "", nil, errEmail
	}
	return email, v.allow[email], nil
}

// keyRequest is the issuer's keys for one token. It keeps the error, which
// go-oidc passes on as text only.
type keyRequest struct {
	verifier *tokenVerifier
	err      error
}

// VerifySignature is oidc.KeySet.
func (k *keyRequest) VerifySignature(ctx context.Context, rawToken string) (payload []byte, err error) {
	var keys oidc.KeySet
	if keys, k.err = k.verifier.discover(ctx); k.err != nil {
		return nil, k.err
	}
	payload, k.err = keys.VerifySignature(ctx, rawToken)
	if errors.Is(k.err, context.DeadlineExceeded) {
		k.err = unavailable(k.err)
	}
	return payload, k.err
}

// discover returns the issuer's keys, after it has been asked once where they are.
func (v *tokenVerifier) discover(ctx context.Context) (oidc.KeySet, error) {
	v.mu.Lock()
	keys := v.keys
	v.mu.Unlock()
	if keys != nil {
		return keys, nil
	}
	ctx = oidc.ClientContext(ctx, v.client)
	provider, err := oidc.NewProvider(ctx, v.issuer)
	if err != nil {
		return nil, unavailable(err)
	}
	var claims struct {
		JWKSURI string `json:"jwks_uri"`
	}
	if err := provider.Claims(&claims); err != nil {
		return nil, unavailable(err)
	}
	if !trustworthy(claims.JWKSURI) {
		return nil, unavailable(errors.New("its jwks_uri is not an https URL"))
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.keys == nil {
		v.keys = oidc.NewRemoteKeySet(ctx, claims.JWKSURI) // it takes the client from ctx, and not its end
	}
	return v.keys, nil
}

// issuerError says why the issuer could not be asked. It is [task.ErrUnavailable]
// without the text of that error, which speaks of the store.
type issuerError struct{ error }

func unavailable(err error) error {
	if errors.Is(err, task.ErrUnavailable) { // it came from issuerTransport
		return err
	}
	return issuerError{fmt.Errorf("ask the issuer of tokens: %w", err)}
}

// Is is what errors.Is looks for.
func (issuerError) Is(target error) bool { return target == task.ErrUnavailable }

func (e issuerError) Unwrap() error { return e.error }

// issuerTransport makes go-oidc's requests to the issuer one at a time, and none of them again
// within freshFor. go-oidc itself asks for the keys whenever a signature fits none that it has.
type issuerTransport struct {
	next    http.RoundTripper
	lock    chan struct{} // holds one element while answers is used
	answers map[string]issuerAnswer
}

type issuerAnswer struct {
	until time.Time
	body  []byte
	err   error
}

// newIssuerTransport has no proxy from the environment, as all other calls have none.
func newIssuerTransport() *http.Transport {
	return &http.Transport{MaxIdleConns: 2, IdleConnTimeout: time.Minute}
}

// newIssuerClient has no timeout of its own: fetch has, and keeps its error whole.
func newIssuerClient(next http.RoundTripper) *http.Client {
	return &http.Client{Transport: &issuerTransport{next: next, lock: make(chan struct{}, 1), answers: make(map[string]issuerAnswer)}}
}

// RoundTrip is http.RoundTripper. Its answers are 200 with JSON; everything
// else is an error that is [task.ErrUnavailable].
func (t *issuerTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	select {
	case t.lock <- struct{}{}:
		defer func() { <-t.lock }()
	case <-r.Context().Done():
		return nil, unavailable(r.Context().Err())
	}
	answer, ok := t.answers[r.URL.String()]
	if !ok || time.Now().After(answer.until) {
		answer.body, answer.err = t.fetch(r)
		answer.until = time.Now().Add(freshFor)
		if answer.err != nil {
			answer.until = time.Now().Add(failedFor)
		}
		t.answers[r.URL.String()] = answer
	}
	if answer.err != nil {
		return nil, answer.err
	}
	return &http.Response{
		Status: "200 OK", StatusCode: http.StatusOK, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, Request: r,
		Header: http.Header{"Content-Type": {"application/json"}}, Body: io.NopCloser(bytes.NewReader(answer.body)),
	}, nil
}

// fetch goes on where the first request for the answer ends: other requests wait for it too.
func (t *issuerTransport) fetch(r *http.Request) ([]byte, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), issuerTimeout)
	defer cancel()
	response, err := t.next.RoundTrip(r.WithContext(ctx))
	if err != nil {
		return nil, unavailable(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, maxIssuerAnswer))
	switch {
	case err != nil:
		return nil, unavailable(err)
	case response.StatusCode != http.StatusOK:
		return nil, unavailable(fmt.Errorf("it answered %d", response.StatusCode))
	case !json.Valid(body):
		return nil, unavailable(errors.New("its answer is not JSON"))
	}
	return body, nil
}

// CloseIdleConnections is what http.Client looks for.
func (t *issuerTransport) CloseIdleConnections() {
	if transport, ok := t.next.(*http.Transport); ok {
		transport.CloseIdleConnections()
	}
}
