// Package authtest is an issuer of ID tokens for tests. It is as honest as the
// tests want it to be.
package authtest

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"math/big"
	"net/http"
	"sync"
	"testing"
	"time"
)

// Issuer is an OpenID Connect provider, as far as checking ID tokens needs one.
// Serve it at its URL.
type Issuer struct {
	t testing.TB
	// URL is what it calls itself; set it before it is used.
	URL string

	mu      sync.Mutex
	key     *rsa.PrivateKey
	id      int // of the key
	away    bool
	fetches int
}

// New returns an issuer with a key of its own.
func New(t testing.TB) *Issuer {
	t.Helper()
	i := &Issuer{t: t}
	i.Rotate()
	return i
}

// Rotate replaces the key.
func (i *Issuer) Rotate() {
	i.t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		i.t.Fatal(err)
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	i.key, i.id = key, i.id+1
}

// SetAway makes it answer 500 to everything, or no more.
func (i *Issuer) SetAway(away bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.away = away
}

// Fetches returns how many requests there were.
func (i *Issuer) Fetches() int {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.fetches
}

// PublicKey returns the public half of its key.
func (i *Issuer) PublicKey() *rsa.PublicKey {
	i.mu.Lock()
	defer i.mu.Unlock()
	return &i.key.PublicKey
}

// ServeHTTP serves its configuration and its keys.
func (i *Issuer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.fetches++
	var answer any
	switch {
	case i.away:
		http.Error(w, "away", http.StatusInternalServerError)
		return
	case r.URL.Path == "/.well-known/openid-configuration":
		// An attacker's favourites are in the list, and must not matter.
		answer = map[string]any{"issuer": i.URL, "jwks_uri": i.URL + "/keys", "id_token_signing_alg_values_supported": []string{"none", "HS256", "RS256"}}
	case r.URL.Path == "/keys":
		answer = map[string]any{"keys": []any{map[string]any{
			"kty": "RSA", "use": "sig", "alg": "RS256", "kid": i.keyID(), "n": encode(i.key.N.Bytes()), "e": encode(big.NewInt(int64(i.key.E)).Bytes()),
		}}}
	default:
		http.NotFound(w, r)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	if err := json.NewEncoder(w).Encode(answer); err != nil {
		i.t.Errorf("answer %s: %v", r.URL.Path, err)
	}
}

func (i *Issuer) keyID() string { return fmt.Sprint("key-", i.id) }

// Claims returns those of a right token: verified, and good for an hour.
func (i *Issuer) Claims(email, audience string) map[string]any {
	now := time.Now()
	return map[string]any{
		"iss": i.URL, "aud": audience, "sub": "1234567890", "email": email, "email_verified": true,
		"iat": now.Unix(), "exp": now.Add(time.Hour).Unix(),
	}
}

// Token signs claims, which are encoded as JSON, with RS256 by its key.
func (i *Issuer) Token(claims any) string {
	i.t.Helper()
	i.mu.Lock()
	defer i.mu.Unlock()
	return Token(i.t, map[string]any{"alg": "RS256", "typ": "JWT", "kid": i.keyID()}, claims, func(input []byte) []byte {
		sum := sha256.Sum256(input)
		signature, err := rsa.SignPKCS1v15(nil, i.key, crypto.SHA256, sum[:])
		if err != nil {
			i.t.Fatal(err)
		}
		return signature
	})
}

// Token returns a token with any header and claims, signed in any way.
func Token(t testing.TB, header, claims any, sign func(input []byte) []byte) string {
	t.Helper()
	part := func(v any) string {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return encode(b)
	}
	input := part(header) + "." + part(claims)
	return input + "." + encode(sign([]byte(input)))
}

func encode(b []byte) string { return base64.RawURLEncoding.EncodeToString(b) }
