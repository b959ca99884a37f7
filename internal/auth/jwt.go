package auth

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"

	"github.com/melodia/orchestrator/internal/jwtkey"
)

// clockSkew is how far the clock that made a token may be ahead of this machine's.
const clockSkew = 30 * time.Second

// jwtVerifier checks the tokens of the platform.
type jwtVerifier struct {
	issuer, audience string
	scopes           map[string][]string // by role
	algorithm        jwtkey.Algorithm
	key              *jwtkey.Key // nil: the keys are at keysURL

	keysURL string
	client  *http.Client
	once    sync.Once
	keys    oidc.KeySet // set once
}

// newJWTVerifier returns a verifier, and an error that joins one line for each mistake.
func newJWTVerifier(o Options) (*jwtVerifier, error) {
	v := &jwtVerifier{issuer: o.AuthIssuer, audience: o.AuthAudience, scopes: make(map[string][]string)}
	var errs []error
	mistake := func(text string) { errs = append(errs, errors.New(text)) }
	if o.AuthIssuer == "" {
		mistake("AUTH_ISSUER must be what tokens have as iss, since AUTH names jwt")
	}
	var err error
	switch v.algorithm, err = jwtkey.ParseAlgorithm(o.AuthAlgorithm); {
	case err != nil:
		errs = append(errs, err)
	case o.AuthJWKSURL != "" && v.algorithm == jwtkey.HS256:
		mistake("AUTH_JWKS_URL has public keys, which AUTH_ALGORITHM=HS256 cannot use: it must be RS256 or ES256")
	case o.AuthJWKSURL != "" && o.AuthSecret != "" && !o.AuthSecretSigns:
		mistake("AUTH_SECRET and AUTH_JWKS_URL must not both be set: either says whose tokens are let in (beside AUTH_JWKS_URL, AUTH_SECRET is a private key for JWT_TARGET_HOSTS)")
	case o.AuthJWKSURL != "":
		if !trustworthy(o.AuthJWKSURL) {
			mistake("AUTH_JWKS_URL must be an https URL (http on the loopback address)")
		}
		v.keysURL, v.client = o.AuthJWKSURL, newIssuerClient(newIssuerTransport())
	case o.AuthSecret == "":
		mistake("AUTH_SECRET is not set, and AUTH names jwt: it must be what the platform's tokens are signed with (HS256), or the public key in PEM (RS256, ES256), unless AUTH_JWKS_URL is set")
	default:
		if v.key, err = jwtkey.New(v.algorithm, o.AuthSecret); err != nil {
			errs = append(errs, err)
		}
	}
	if len(o.AuthRoles) == 0 {
		mistake("AUTH_ROLES is not set, and AUTH names jwt: it must have entries role:scopes, joined by commas, like admin:submit+read+manage")
	}
	for i, entry := range o.AuthRoles {
		entry = strings.TrimSpace(entry)
		colon := max(strings.LastIndex(entry, ":"), 0) // a role may have some itself
		role := entry[:colon]
		scopes, err := parseScopes(strings.TrimPrefix(entry[colon:], ":"), o.Scopes)
		if err == nil && (!storable(role) || v.scopes[role] != nil) {
			err = errors.New("it must be role:scopes, with a role that no earlier entry has")
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("AUTH_ROLES, entry %d: %w", i+1, err))
		}
		v.scopes[role] = scopes
	}
	return v, errors.Join(errs...)
}

// issues reports whether a token says, unproved, that it is of the verifier's issuer.
func (v *jwtVerifier) issues(token string) bool {
	claims, err := parseClaims(payloadOf(token))
	var issuer string
	return err == nil && claims.read("iss", &issuer) && issuer == v.issuer
}

// identify checks a token, and returns its subject and the scopes of its roles: none
// where no role is in the settings. The error says what is wrong, of a claim
// by its name; it is [task.ErrUnavailable] where the keys cannot be had.
func (v *jwtVerifier) identify(ctx context.Context, token string) (subject string, scopes []string, err error) {
	payload, err := v.verify(ctx, token)
	if err != nil {
		return "", nil, err
	}
	claims, err := parseClaims(payload)
	if err != nil {
		return "", nil, err
	}
	if err := v.check(claims, time.Now()); err != nil {
		return "", nil, err
	}
	if subject, err = claims.subject(); err != nil {
		return "", nil, err
	}
	roles, err := claims.roles()
	if err != nil {
		return "", nil, err
	}
	for _, role := range roles {
		for _, scope := range v.scopes[role] {
			if !slices.Contains(scopes, scope) {
				scopes = append(scopes, scope)
			}
		}
	}
	return subject, scopes, nil
}

// verify returns what a token says after its signature was checked.
func (v *jwtVerifier) verify(ctx context.Context, token string) (payload []byte, err error) {
	if v.key != nil {
		return v.key.Verify(token)
	}
	if _, err := v.algorithm.Parse(token); err != nil {
		return nil, err // no key is asked for because of it
	}
	ctx, cancel := context.WithTimeout(ctx, issuerTimeout)
	defer cancel()
	v.once.Do(func() { v.keys = oidc.NewRemoteKeySet(oidc.ClientContext(ctx, v.client), v.keysURL) }) // the set keeps the client of ctx, and not its end
	payload, err = v.keys.VerifySignature(ctx, token)
	switch {
	case err == nil:
		return payload, nil
	case errors.Unwrap(err) != nil: // go-oidc wraps why it has no keys, and nothing else
		return nil, unavailable(err)
	}
	return nil, jwtkey.ErrSignature
}

// check judges when a token counts, who made it, and for whom (RFC 7519 §4.1).
func (v *jwtVerifier) check(c claims, now time.Time) error {
	var issuer string
	if !c.read("iss", &issuer) || issuer != v.issuer {
		return claimError("iss", "must be the issuer that this service knows")
	}
	expires, there, err := c.moment("exp")
	switch {
	case err != nil:
		return err
	case !there:
		return claimError("exp", "must be there: a token that never ends is not taken")
	case !now.Before(expires):
		return claimError("exp", "has passed; ask for a new token")
	}
	for _, name := range []string{"nbf", "iat"} {
		switch begins, _, err := c.moment(name); {
		case err != nil:
			return err
		case begins.After(now.Add(clockSkew)):
			return claimError(name, "is in the future: the token does not count yet, or the clocks differ")
		}
	}
	// A token that is for others must not be taken (RFC 7519 §4.1.3).
	audiences, there, err := c.texts("aud")
	switch {
	case err != nil:
		return err
	case there && v.audience == "":
		return claimError("aud", "must not be there: the token is for others, or AUTH_AUDIENCE of this service is to be set")
	case v.audience != "" && !slices.Contains(audiences, v.audience):
		return claimError("aud", "must name this service")
	}
	return nil
}

// claimError says what is wrong with a claim.
func claimError(name, wrong string) error {
	return errors.New("the token's claim " + name + " " + wrong)
}

var wholeNumber = regexp.MustCompile(`^(0|-?[1-9][0-9]*)$`)

// subject returns the claim sub: a text or, as some issuers have it, a whole number.
func (c claims) subject() (subject string, err error) {
	if number := c["sub"]; wholeNumber.Match(number) && len(number) < 40 {
		return string(number), nil
	}
	if !c.read("sub", &subject) || !storable(subject) {
		return "", claimError("sub", "must be a text of 1 to 254 bytes without spaces, or a whole number")
	}
	return subject, nil
}

// roles returns what the claims role and roles name; either may be one text or a list.
func (c claims) roles() (roles []string, err error) {
	for _, name := range []string{"role", "roles"} {
		named, _, err := c.texts(name)
		if err != nil {
			return nil, err
		}
		roles = append(roles, named...)
	}
	return roles, nil
}

// texts returns a claim that is one text or a list of them. null is as if it were not there.
func (c claims) texts(name string) (texts []string, there bool, err error) {
	var one *string
	if c.read(name, &one) {
		if one == nil {
			return nil, false, nil
		}
		return []string{*one}, true, nil
	}
	if _, there = c[name]; there && !c.read(name, &texts) {
		return nil, true, claimError(name, "must be a text or a list of texts")
	}
	return texts, there, nil
}

// moment returns a claim that is a NumericDate: seconds since 1970, perhaps with a
// fraction (RFC 7519 §2).
func (c claims) moment(name string) (at time.Time, there bool, err error) {
	value, there := c[name]
	if !there {
		return at, false, nil
	}
	var seconds *float64
	const most = 1 << 40 // 34,000 years
	if json.Unmarshal(value, &seconds) != nil || seconds == nil || math.Abs(*seconds) > most {
		return at, true, claimError(name, "must be a number of seconds since 1970")
	}
	whole, fraction := math.Modf(*seconds)
	return time.Unix(int64(whole), int64(fraction*1e9)), true, nil
}
