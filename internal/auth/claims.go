package auth

import (
	"bytes"
	"encoding/json"
	"errors"
	"strings"
	"unicode"
)

// claims are what a token says, by their names.
type claims map[string]json.RawMessage

var errClaims = errors.New("the token's claims must be one JSON object in which each name stands once")

// parseClaims reads the payload of a token. Names are compared byte by byte, as
// RFC 7519 §10.1.1 says; a name that comes twice is refused (§4 demands that they
// are unique).
func parseClaims(payload []byte) (claims, error) {
	d := json.NewDecoder(bytes.NewReader(payload))
	if first, err := d.Token(); err != nil || first != json.Delim('{') {
		return nil, errClaims
	}
	c := make(claims)
	for d.More() {
		token, err := d.Token()
		name, _ := token.(string)
		var value json.RawMessage
		if err != nil || d.Decode(&value) != nil || c[name] != nil {
			return nil, errClaims
		}
		c[name] = value
	}
	if _, err := d.Token(); err != nil || d.InputOffset() != int64(len(bytes.TrimRight(payload, " \t\r\n"))) {
		return nil, errClaims
	}
	return c, nil
}

// parseIDClaims is parseClaims of an ID token, which go-oidc reads before. encoding/json,
// which go-oidc uses, compares names without regard to case, and of two values takes the
// last, so it could read another claim than the issuer meant. So parseIDClaims refuses
// claims where the two could differ: two names that differ in their case only, or another
// spelling of a name that go-oidc or this package reads.
func parseIDClaims(payload []byte) (claims, error) {
	c, err := parseClaims(payload)
	if err != nil {
		return nil, err
	}
	names := make(map[string]bool, len(c))
	for name := range c {
		folded := fold(name)
		if names[folded] || readClaims[folded] != "" && readClaims[folded] != name {
			return nil, errClaims
		}
		names[folded] = true
	}
	return c, nil
}

// readClaims are the names of the claims that go-oidc or this package reads, by
// their folded spelling.
var readClaims = foldAll("iss", "sub", "aud", "exp", "nbf", "iat", "nonce", "at_hash", "_claim_names", "_claim_sources", "email", "email_verified")

func foldAll(names ...string) map[string]string {
	folded := make(map[string]string, len(names))
	for _, name := range names {
		folded[fold(name)] = name
	}
	return folded
}

// fold returns the same for two names that encoding/json takes for one: all
// spellings under Unicode's simple folding, which has ſ for s.
func fold(name string) string {
	return strings.Map(func(r rune) rune {
		for {
			next := unicode.SimpleFold(r)
			if next <= r { // around: the largest comes before the smallest
				return next
			}
			r = next
		}
	}, name)
}

// read puts the claim of a name into v, and reports whether it is there and fits.
func (c claims) read(name string, v any) bool {
	value, ok := c[name]
	return ok && json.Unmarshal(value, v) == nil
}
