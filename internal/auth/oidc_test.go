package auth

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/melodia/orchestrator/internal/auth/authtest"
	"github.com/melodia/orchestrator/internal/task"
)

const (
	audience  = "https://orchestrator.example"
	issuerURL = "https://id.example"
)

// wire is an issuer without a network, so that a bubble of synctest holds it.
type wire func(*http.Request) (*http.Response, error)

func (w wire) RoundTrip(r *http.Request) (*http.Response, error) { return w(r) }

func serve(h http.Handler) wire {
	return func(r *http.Request) (*http.Response, error) {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		return w.Result(), nil
	}
}

// withIssuer runs f in a bubble with an issuer, and with an Authenticator that
// reaches it on a wire; without one, directly.
func withIssuer(t *testing.T, f func(t *testing.T, issuer *authtest.Issuer, a *Authenticator), on ...wire) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		issuer := authtest.New(t)
		issuer.URL = issuerURL
		a := newAuthenticator(t, Options{Methods: []string{"oidc"}, OIDCIssuer: issuerURL, OIDCAudience: audience, OIDCAllow: []string{"plays@x.example:submit+read"}})
		through := serve(issuer)
		if len(on) > 0 {
			through = on[0]
		}
		a.tokens.client = newIssuerClient(through)
		f(t, issuer, a)
		synctest.Wait()
	})
}

func bearing(token string) http.Header { return http.Header{"Authorization": {"Bearer " + token}} }

func TestTokens(t *testing.T) {
	t.Parallel()
	withIssuer(t, func(t *testing.T, issuer *authtest.Issuer, a *Authenticator) {
		claims := func(change func(map[string]any)) map[string]any {
			c := issuer.Claims("plays@x.example", audience)
			change(c)
			return c
		}
		set := func(name string, value any) string {
			return issuer.Token(claims(func(c map[string]any) {
				if c[name] = value; value == nil {
					delete(c, name)
				}
			}))
		}
		right := issuer.Token(issuer.Claims("plays@x.example", audience))
		parts := strings.Split(right, ".")
		stranger := authtest.New(t)
		stranger.URL = issuerURL
		publicKey, err := x509.MarshalPKIXPublicKey(issuer.PublicKey())
		if err != nil {
			t.Fatal(err)
		}
		asSecret := func(secret []byte) func([]byte) []byte {
			return func(input []byte) []byte {
				mac := hmac.New(sha256.New, secret)
				_, _ = mac.Write(input)
				return mac.Sum(nil)
			}
		}
		plain := claims(func(map[string]any) {})
		symmetric := map[string]any{"alg": "HS256", "kid": "key-1"}
		for name, tt := range map[string]struct{ token, want string }{
			"right":                       {right, "plays@x.example[submit read]"},
			"another account":             {set("email", "other@x.example"), "other@x.example[]"},
			"an account in other letters": {set("email", "Plays@x.example"), "Plays@x.example[]"},
			"expired":                     {set("exp", time.Now().Add(-time.Second).Unix()), errExpired.Error()},
			"without an end":              {set("exp", nil), errExpired.Error()},
			"not valid yet":               {set("nbf", time.Now().Add(time.Hour).Unix()), errToken.Error()},
			"another audience":            {set("aud", "https://other.example"), errToken.Error()},
			"audience with a slash":       {set("aud", audience+"/"), errToken.Error()},
			"no audience":                 {set("aud", nil), errToken.Error()},
			"several audiences":           {set("aud", []string{audience, "https://other.example"}), errToken.Error()},
			"audience as a list":          {set("aud", []string{audience}), "plays@x.example[submit read]"},
			"another issuer":              {set("iss", "https://evil.example"), errToken.Error()},
			"no issuer":                   {set("iss", nil), errToken.Error()},
			"unverified":                  {set("email_verified", false), errEmail.Error()},
			"verified in a string":        {set("email_verified", "true"), errEmail.Error()},
			"verified by nobody":          {set("email_verified", nil), errEmail.Error()},
			"no email":                    {set("email", nil), errEmail.Error()},
			"another's key":               {stranger.Token(stranger.Claims("plays@x.example", audience)), errToken.Error()},
			"other claims":                {parts[0] + "." + strings.Split(set("email", "root@x.example"), ".")[1] + "." + parts[2], errToken.Error()},
			"no signature":                {parts[0] + "." + parts[1] + ".", errToken.Error()},
			"two parts":                   {parts[0] + "." + parts[1], errToken.Error()},
			"no token":                    {marker, errToken.Error()},
			"stripped":                    {parts[0] + "." + parts[1] + stripped, errStripped.Error()},
			"alg none":                    {authtest.Token(t, map[string]any{"alg": "none"}, plain, func([]byte) []byte { return nil }), errToken.Error()},
			"alg None":                    {authtest.Token(t, map[string]any{"alg": "None"}, plain, func([]byte) []byte { return nil }), errToken.Error()},
			"HS256 with the public key":   {authtest.Token(t, symmetric, plain, asSecret(publicKey)), errToken.Error()},
			"HS256 with the public key in PEM": {authtest.Token(t, symmetric, plain, asSecret(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: publicKey}))),
				errToken.Error()},
			"an API key": {keyPrefix + "x", errToken.Error()},
		} {
			if got := identity(a, bearing(tt.token)); got != tt.want {
				t.Errorf("%s: got %q, want %q", name, got, tt.want)
			}
		}
		want(t, a, http.Header{"X-Api-Key": {right}}, errKey.Error())
	})
}

// Both ways beside each other: a key is never taken for a token.
func TestKeysBesideTokens(t *testing.T) {
	t.Parallel()
	withIssuer(t, func(t *testing.T, issuer *authtest.Issuer, a *Authenticator) {
		key, entry := newKey(t, "plays", "submit")
		client := a.tokens.client
		a = newAuthenticator(t, Options{Methods: []string{"api_key", "oidc"}, APIKeys: []string{entry}, OIDCIssuer: issuerURL, OIDCAudience: audience, OIDCAllow: []string{"plays@x.example:read"}})
		a.tokens.client = client
		want(t, a, bearing(key), "plays[submit]")
		want(t, a, bearing(key+"x"), errKey.Error())
		want(t, a, http.Header{"X-Api-Key": {key}}, "plays[submit]")
		if n := issuer.Fetches(); n > 0 {
			t.Errorf("the issuer was asked %d times because of keys", n)
		}
		want(t, a, bearing(issuer.Token(issuer.Claims("plays@x.example", audience))), "plays@x.example[read]")
	})
}

// The keys are fetched once, and again when a token names one that is not
// known; a flood of such tokens asks no more often than one of them.
func TestKeysAreCachedAndRotate(t *testing.T) {
	t.Parallel()
	withIssuer(t, func(t *testing.T, issuer *authtest.Issuer, a *Authenticator) {
		token := func() string { return issuer.Token(issuer.Claims("plays@x.example", audience)) }
		fetches := func(want int) {
			t.Helper()
			if got := issuer.Fetches(); got != want {
				t.Errorf("the issuer was asked %d times, want %d", got, want)
			}
		}
		const here = "plays@x.example[submit read]"
		for range 100 {
			want(t, a, bearing(token()), here)
		}
		fetches(2) // where the keys are, and the keys
		old := token()
		issuer.Rotate()
		time.Sleep(freshFor + time.Nanosecond)
		want(t, a, bearing(old), here) // its keys are kept
		fetches(2)
		want(t, a, bearing(token()), here)
		fetches(3)
		want(t, a, bearing(old), errToken.Error())
		fetches(3)

		stranger := authtest.New(t)
		stranger.Rotate()
		stranger.Rotate()
		flood := stranger.Token(stranger.Claims("plays@x.example", audience))
		for range 20 {
			time.Sleep(freshFor / 10)
			var callers sync.WaitGroup
			for range 10 {
				callers.Go(func() { want(t, a, bearing(flood), errToken.Error()) })
			}
			callers.Wait()
			want(t, a, bearing(token()), here) // whom it does not disturb
		}
		if got := issuer.Fetches(); got > 3+2 {
			t.Errorf("a flood of two fetches' length made %d", got-3)
		}
	})
}

// Nobody comes in while the issuer is away, but those whose keys are known;
// and it is not asked by each of them.
func TestIssuerAway(t *testing.T) {
	t.Parallel()
	withIssuer(t, func(t *testing.T, issuer *authtest.Issuer, a *Authenticator) {
		token := issuer.Token(issuer.Claims("plays@x.example", audience))
		wantAway := func(token string) {
			t.Helper()
			if name, _, err := a.Authenticate(t.Context(), bearing(token)); !errors.Is(err, task.ErrUnavailable) || name != "" {
				t.Errorf("got %q and %v, want that it is unavailable", name, err)
			}
		}
		issuer.SetAway(true)
		for range 10 {
			wantAway(token)
		}
		if n := issuer.Fetches(); n != 1 {
			t.Errorf("asked %d times within a second, want once", n)
		}
		// What needs no keys to be found wrong is wrong.
		want(t, a, bearing(marker), errToken.Error())

		issuer.SetAway(false)
		time.Sleep(failedFor + time.Nanosecond)
		want(t, a, bearing(token), "plays@x.example[submit read]")
		issuer.SetAway(true)
		issuer.Rotate()
		time.Sleep(freshFor + time.Nanosecond)
		want(t, a, bearing(token), "plays@x.example[submit read]")
		wantAway(issuer.Token(issuer.Claims("plays@x.example", audience)))
		issuer.SetAway(false)
		time.Sleep(failedFor + time.Nanosecond)
		want(t, a, bearing(issuer.Token(issuer.Claims("plays@x.example", audience))), "plays@x.example[submit read]")
	})
}

// While the issuer is slow, whoever has a token with a known key does not
// notice; and those who send others cause one question, not one each.
func TestSlowIssuerKeepsNobodyWaiting(t *testing.T) {
	t.Parallel()
	var issuer *authtest.Issuer
	var slow atomic.Bool
	var asked atomic.Int64
	withIssuer(t, func(t *testing.T, i *authtest.Issuer, a *Authenticator) {
		issuer = i
		token := issuer.Token(issuer.Claims("plays@x.example", audience))
		want(t, a, bearing(token), "plays@x.example[submit read]")
		stranger := authtest.New(t)
		stranger.Rotate()
		flood := stranger.Token(stranger.Claims("plays@x.example", audience))
		time.Sleep(freshFor + time.Nanosecond)
		asked.Store(0)
		slow.Store(true)
		var strangers sync.WaitGroup
		for range 100 {
			strangers.Go(func() {
				if name, _, err := a.Authenticate(t.Context(), bearing(flood)); !errors.Is(err, task.ErrUnavailable) || name != "" {
					t.Errorf("a stranger: got %q and %v, want that it is unavailable", name, err)
				}
			})
		}
		synctest.Wait() // for the issuer, all of them
		begin := time.Now()
		for range 10 {
			want(t, a, bearing(token), "plays@x.example[submit read]")
		}
		if waited := time.Since(begin); waited > 0 {
			t.Errorf("a known key waits %v for the issuer", waited)
		}
		strangers.Wait()
		if n := asked.Load(); n != 1 {
			t.Errorf("the issuer was asked %d times, want once", n)
		}
	}, func(r *http.Request) (*http.Response, error) {
		asked.Add(1)
		if slow.Load() {
			<-r.Context().Done()
			return nil, r.Context().Err()
		}
		return serve(issuer)(r)
	})
}

// However the issuer fails, it is not the caller's fault, and takes five seconds at most.
func TestIssuerFails(t *testing.T) {
	t.Parallel()
	answer := func(status int, body string) wire {
		return func(*http.Request) (*http.Response, error) {
			return &http.Response{StatusCode: status, Header: http.Header{"Location": {"https://evil.example"}}, Body: io.NopCloser(strings.NewReader(body))}, nil
		}
	}
	for name, tt := range map[string]struct {
		wire wire
		took time.Duration
	}{
		"no connection": {func(*http.Request) (*http.Response, error) { return nil, errors.New("no route to host") }, 0},
		"no answer": {func(r *http.Request) (*http.Response, error) {
			<-r.Context().Done()
			return nil, r.Context().Err()
		}, issuerTimeout},
		"a page":            {answer(200, "<html>log in</html>"), 0},
		"a redirect":        {answer(302, ""), 0},
		"not found":         {answer(404, "{}"), 0},
		"half an answer":    {answer(200, `{"issuer":`), 0},
		"another's answer":  {answer(200, `{"issuer":"https://evil.example","jwks_uri":"https://evil.example/keys"}`), 0},
		"keys without TLS":  {answer(200, `{"issuer":"`+issuerURL+`","jwks_uri":"http://id.example/keys"}`), 0},
		"an endless answer": {answer(200, strings.Repeat(" ", 2*maxIssuerAnswer)+"{}"), 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			withIssuer(t, func(t *testing.T, issuer *authtest.Issuer, a *Authenticator) {
				token := issuer.Token(issuer.Claims("plays@x.example", audience))
				begin := time.Now()
				_, _, err := a.Authenticate(t.Context(), bearing(token))
				if !errors.Is(err, task.ErrUnavailable) {
					t.Errorf("got %v, want that it is unavailable", err)
				}
				if took := time.Since(begin); took != tt.took {
					t.Errorf("took %v, want %v", took, tt.took)
				}
				if strings.Contains(err.Error(), token) {
					t.Errorf("the token is in the error: %v", err)
				}
			}, tt.wire)
		})
	}
}

// Who gives up does not spoil the answer for the others.
func TestCallerGivesUp(t *testing.T) {
	t.Parallel()
	var issuer *authtest.Issuer
	slow := func(r *http.Request) (*http.Response, error) {
		select {
		case <-time.After(time.Second):
			return serve(issuer)(r)
		case <-r.Context().Done():
			return nil, r.Context().Err()
		}
	}
	withIssuer(t, func(t *testing.T, i *authtest.Issuer, a *Authenticator) {
		issuer = i
		token := issuer.Token(issuer.Claims("plays@x.example", audience))
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		var hasty sync.WaitGroup
		hasty.Go(func() {
			if name, _, err := a.Authenticate(ctx, bearing(token)); err == nil {
				t.Errorf("the one who gave up is %s", name)
			}
		})
		synctest.Wait()
		want(t, a, bearing(token), "plays@x.example[submit read]")
		hasty.Wait()
	}, slow)
}
