// Package auth authenticates requests: by API key, by ID token, or by what Cloud Run
// has checked already. It knows no operations; which scope one of them needs is the
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
)

// Options are the settings of the same names, in capitals.
type Options struct {
	// Methods is AUTH: none or iam, or api_key and oidc, or one of these.
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
	scopes    []string
}

// New returns an Authenticator. The error joins one line for each mistake in
// the settings; none of them holds a value.
func New(o Options) (*Authenticator, error) {
	a := &Authenticator{scopes: o.Scopes}
	var errs []error
	mistake := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	apiKeys, tokens := false, false
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
		default:
			mistake("AUTH must be none, iam, api_key, oidc, or api_key,oidc")
		}
	}
	if len(o.Methods) == 0 {
		mistake("AUTH is not set: it says how callers prove who they are, and must be api_key, oidc, api_key,oidc, or iam; none lets everybody in who reaches the port (to try the service: orchestrator dev)")
	}
	if len(o.Methods) > 1 && (a.open || a.iam) {
		mistake("AUTH: none and iam stand alone, since they would open the door beside every other way")
	}
	if a.open && o.OnCloudRun {
		mistake("AUTH must not be none on Cloud Run (K_SERVICE is set): everybody could have calls made")
	}
	if a.iam && !o.OnCloudRun {
		mistake("AUTH must not be iam outside of Cloud Run (K_SERVICE is not set): nobody has checked the callers")
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
	return a, errors.Join(errs...)
}

// Close closes idle connections to the issuer.
func (a *Authenticator) Close() {
	if a.tokens != nil {
		a.tokens.client.CloseIdleConnections()
	}
}

// What is wrong with the credentials of a request, as the end of a sentence for the caller.
var (
	errNone     = errors.New("no credentials came; send one of them as Authorization: Bearer …, an API key also as X-Api-Key")
	errSeveral  = errors.New("more than one credential came; send one, in one header")
	errScheme   = errors.New("the Authorization header must be Bearer, a space, and an API key or ID token")
	errKey      = errors.New("the API key is not one of this service's")
	errStripped = errors.New("the ID token's signature has been removed; only a service behind Cloud Run's IAM with AUTH=iam takes such a token")
	errToken    = errors.New("the ID token is not valid here; it must be signed by the issuer, and made for this service's audience")
	errExpired  = errors.New("the ID token has expired; fetch a new one")
	errEmail    = errors.New("the ID token must hold a verified email")
	errIAM      = errors.New("the request has not come through Cloud Run's IAM; call the service's public URL with an ID token")
)

// Authenticate returns the principal that makes a request with these headers, and its
// scopes. The principal is empty with AUTH=none. The error is [task.ErrUnavailable] where
// the issuer of ID tokens cannot be asked; otherwise its text is for the caller to read
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
		case a.tokens != nil && (a.keys == nil || !strings.HasPrefix(credential, keyPrefix)):
			return a.tokens.identify(ctx, credential)
		}
		return a.byKey(credential)
	}
	if len(keys)+len(header["Authorization"]) > 1 {
		return "", nil, errSeveral
	}
	return a.byKey(keys[0])
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
	_, payload, _ := strings.Cut(unsigned, ".")
	text, err := base64.RawURLEncoding.DecodeString(payload)
	if !ok || err != nil {
		return "", errIAM
	}
	claims, err := parseClaims(text)
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
