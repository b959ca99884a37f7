// Package auth authenticates requests: by API key, by ID token, by a token of the
// platform, or by what Cloud Run has checked already. It knows no operations; which scope one of them needs is the
// door's to say.
package auth

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/melodia/orchestrator/internal/jwtkey"
)

// Options are the settings of the same names, in capitals.
type Options struct {
	// Methods is AUTH: none or iam, or some of api_key, oidc and jwt.
	Methods []string
	// APIKeys is API_KEYS, entries name:scopes:sha256 with scopes joined by + and
	// the SHA-256 of the key in hexadecimal digits.
	APIKeys []string
	// OIDCIssuer is the URL of the issuer of ID tokens.
	OIDCIssuer string
	// OIDCAudience is what ID tokens must be made for.
	OIDCAudience string
	// OIDCAllow are entries email:scopes.
	OIDCAllow []string
	// AuthSecret is the secret of HS256, or a key in PEM, for tokens of the platform.
	AuthSecret string
	// AuthSecretSigns is whether AuthSecret signs tokens for targets, too.
	AuthSecretSigns bool
	// AuthAlgorithm is HS256, RS256 or ES256.
	AuthAlgorithm string
	// AuthJWKSURL is where public keys are, instead of one in AuthSecret.
	AuthJWKSURL string
	// AuthIssuer is what tokens of the platform have as iss.
	AuthIssuer string
	// AuthAudience is what they have among aud; "" demands that they have no aud.
	AuthAudience string
	// AuthRoles are entries role:scopes.
	AuthRoles []string
	// OnCloudRun is whether K_SERVICE is set.
	OnCloudRun bool

	// Scopes are all that there are.
	Scopes []string
}

// Authenticator tells which principal makes a request. Make one with [New].
type Authenticator struct {
	// open says that no request is checked; iam, that Cloud Run has checked them all.
	// Otherwise there are keys or tokens.
	open, iam bool
	keys      []apiKey
	tokens    *tokenVerifier // nil: ID tokens are not taken
	jwt       *jwtVerifier   // nil: tokens of the platform are not taken
	scopes    []string
}

// New returns an Authenticator. The error joins one line for each mistake in
// the settings; none of them holds a value.
func New(o Options) (*Authenticator, error) {
	a := &Authenticator{scopes: o.Scopes}
	var errs []error
	mistake := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	apiKeys, tokens, jwt := false, false, false
	for _, method := range o.Methods {
		switch strings.TrimSpace(method) {
		case "none":
			a.open = true
		case "iam":
			a.iam = true
		case "api_key":
			apiKeys = true
		case "oidc":
			tokens = true
		case "jwt":
			jwt = true
		default:
			mistake("AUTH must be none, iam, or one or more of api_key, oidc and jwt, joined by commas")
		}
	}
	if len(o.Methods) == 0 {
		mistake("AUTH is not set: it says how callers prove who they are, and must be api_key, oidc, jwt, several of these joined by commas, or iam; none lets everybody in who reaches the port (to try the service: orchestrator dev)")
	}
	if len(o.Methods) > 1 && (a.open || a.iam) {
		mistake("AUTH: none and iam stand alone, since they would open the door beside every other way")
	}
	if a.open && o.OnCloudRun {
		mistake("AUTH must not be none on Cloud Run (K_SERVICE is set): everybody could have calls made")
	}
	if a.iam && !o.OnCloudRun {
		mistake("AUTH must not be iam outside of Cloud Run (K_SERVICE is not set): the service would believe any token")
	}
	if apiKeys {
		var err error
		if a.keys, err = parseKeys(o.APIKeys, o.Scopes); err != nil {
			errs = append(errs, err)
		}
	}
	if tokens {
		var err error
		if a.tokens, err = newTokenVerifier(o); err != nil {
			errs = append(errs, err)
		}
	}
	if jwt {
		var err error
		if a.jwt, err = newJWTVerifier(o); err != nil {
			errs = append(errs, err)
		}
		if tokens && o.AuthIssuer == o.OIDCIssuer {
			mistake("AUTH_ISSUER and OIDC_ISSUER must not be the same: a token is told by its issuer")
		}
	}
	return a, errors.Join(errs...)
}

// Close closes idle connections to the issuer.
func (a *Authenticator) Close() {
	if a.tokens != nil {
		a.tokens.client.CloseIdleConnections()
	}
	if a.jwt != nil && a.jwt.client != nil {
		a.jwt.client.CloseIdleConnections()
	}
}

// What is wrong with the credentials of a request, as the end of a sentence for the caller.
var (
	errNone     = errors.New("no credentials came; send a key or token as Authorization: Bearer …, or a key as X-Api-Key")
	errSeveral  = errors.New("more than one credential came; send one, in one header")
	errScheme   = errors.New("the Authorization header must be Bearer, a space, and an API key or token")
	errKey      = errors.New("the API key is not one of this service's")
	errStripped = errors.New("the ID token's signature has been removed; only a service behind Cloud Run's IAM with AUTH=iam takes such a token")
	errToken    = errors.New("the ID token is not valid here; it must be signed by the issuer, and made for this service's audience")
	errExpired  = errors.New("the ID token has expired; fetch a new one")
	errEmail    = errors.New("the ID token must hold a verified email")
	errTaken    = errors.New("the token's claim sub is the name of another caller of this service, an API key's or an email of OIDC_ALLOW")
	errOwn      = errors.New("the token's claim sub is this service's own name: it does not take the tokens that it makes for targets")
	errIAM      = errors.New("the request has not come through Cloud Run's IAM; call the service's public URL with an ID token")
)

// Authenticate returns the principal that makes a request with these headers, and its
// scopes. The principal is empty with AUTH=none. The error is [task.ErrUnavailable] where
// the issuer of tokens cannot be asked; otherwise its text is for the caller to read
// and holds nothing that was sent. Authenticate blocks for five seconds at most.
func (a *Authenticator) Authenticate(ctx context.Context, header http.Header) (principal string, scopes []string, err error) {
	switch {
	case a.open:
		return "", a.scopes, nil
	case a.iam:
		if principal, err = emailFromIAM(header); err != nil {
			return "", nil, err
		}
		return principal, a.scopes, nil
	}
	keys := header["X-Api-Key"]
	if len(keys) == 0 {
		credential, err := bearer(header["Authorization"])
		switch {
		case err != nil:
			return "", nil, err
		case strings.HasSuffix(credential, stripped):
			return "", nil, errStripped
		case a.keys != nil && strings.HasPrefix(credential, keyPrefix):
			return a.byKey(credential)
		}
		return a.byToken(ctx, credential)
	}
	if len(keys)+len(header["Authorization"]) > 1 {
		return "", nil, errSeveral
	}
	return a.byKey(keys[0])
}

// byToken finds who a token is of. Without a way to check tokens it is no key either.
func (a *Authenticator) byToken(ctx context.Context, token string) (principal string, scopes []string, err error) {
	switch {
	case a.jwt != nil && (a.tokens == nil || a.jwt.issues(token)):
		principal, scopes, err = a.jwt.identify(ctx, token)
		switch {
		case err != nil:
			return "", nil, err
		case principal == jwtkey.Subject:
			return "", nil, errOwn // else a target could call as the service, with the token of a call
		case a.isNamed(principal):
			return "", nil, errTaken
		}
		return principal, scopes, nil
	case a.tokens != nil:
		return a.tokens.identify(ctx, token)
	}
	return a.byKey(token)
}

// isNamed reports whether the settings give the name to the owner of a key, or to an
// account: a subject that an issuer of other tokens gives must not be taken for them.
func (a *Authenticator) isNamed(name string) bool {
	return slices.ContainsFunc(a.keys, func(k apiKey) bool { return k.name == name }) ||
		a.tokens != nil && a.tokens.allow[name] != nil
}

// payloadOf returns the middle part of a token, decoded and unproved; nil where there is none.
func payloadOf(token string) []byte {
	_, rest, _ := strings.Cut(token, ".")
	payload, _, _ := strings.Cut(rest, ".")
	text, err := base64.RawURLEncoding.DecodeString(payload)
	if err != nil {
		return nil
	}
	return text
}

// bearer returns the credential in the values of a header.
func bearer(values []string) (string, error) {
	switch {
	case len(values) == 0:
		return "", errNone
	case len(values) > 1:
		return "", errSeveral
	}
	scheme, credential, _ := strings.Cut(values[0], " ")
	credential = strings.TrimSpace(credential)
	if !strings.EqualFold(scheme, "Bearer") || credential == "" {
		return "", errScheme
	}
	return credential, nil
}

// stripped stands where Cloud Run has checked a token's signature and taken it
// away, so that the service cannot use the token elsewhere.
const stripped = ".SIGNATURE_REMOVED_BY_GOOGLE"

// emailFromIAM returns the email of the account that Cloud Run has let in. It believes a
// token without a signature, since Cloud Run has decided already: the email is only
// recorded.
func emailFromIAM(header http.Header) (string, error) {
	// Where both headers are there, Cloud Run checks X-Serverless-Authorization, and passes
	// the other on unchecked.
	values := header["X-Serverless-Authorization"]
	if len(values) == 0 {
		values = header["Authorization"]
	}
	token, err := bearer(values)
	if err != nil {
		return "", err
	}
	unsigned, ok := strings.CutSuffix(token, stripped)
	if !ok {
		return "", errIAM
	}
	claims, err := parseIDClaims(payloadOf(unsigned))
	if err != nil {
		return "", errIAM
	}
	var name string
	if !claims.read("email", &name) || name == "" { // a token that was asked for without it
		claims.read("sub", &name)
	}
	if !storable(name) {
		return "", errIAM
	}
	return name, nil
}

// storable reports whether a name from outside can be stored and shown as it is.
func storable(name string) bool {
	const longest = 254 // of an email, RFC 5321 §4.5.3.1.3
	return name != "" && len(name) <= longest && utf8.ValidString(name) &&
		!strings.ContainsFunc(name, func(r rune) bool { return !unicode.IsGraphic(r) || unicode.IsSpace(r) })
}

// parseScopes reads scopes that are joined by +.
func parseScopes(text string, known []string) ([]string, error) {
	scopes := strings.Split(text, "+")
	for i, scope := range scopes {
		if !slices.Contains(known, scope) || slices.Contains(scopes[:i], scope) {
			return nil, fmt.Errorf("scopes must be of %s, joined by +", strings.Join(known, ", "))
		}
	}
	return scopes, nil
}
