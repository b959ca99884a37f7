package credentials

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strconv"
	"time"

	"github.com/melodia/orchestrator/internal/jwtkey"
	"github.com/melodia/orchestrator/internal/target"
	"github.com/melodia/orchestrator/internal/task"
)

const (
	// validFor is how long such a token counts. It is made for one call, whose
	// target checks it when the call begins.
	validFor = 5 * time.Minute
	// backdated is how long before the call a token says that it was made: the target's
	// clock may be behind, and some libraries (PyJWT 2.6, jwx 3.4) refuse an iat in the future.
	backdated = 30 * time.Second
)

// Issuer makes tokens by which services of the platform know each other: JSON Web
// Tokens that are signed as the platform's auth service signs its own. The nil Issuer
// makes none. Any number of goroutines may use it.
type Issuer struct {
	name  string
	hosts target.Hosts
	roles []string
	key   *jwtkey.Key
}

// IssuerOptions are the settings of tokens for the platform.
type IssuerOptions struct {
	// Hosts may be sent tokens (see [target.Hosts] for their form).
	Hosts []string
	// Roles are what a task may ask for; the first is that of a task that asks for none.
	Roles []string
	// Name is what tokens have as iss.
	Name string
	// Algorithm and Secret are what they are signed with (see [jwtkey.New]).
	Algorithm, Secret string
}

// Errors of [Issuer.Check]. Their texts complete "auth …" and "auth.role …".
var (
	errIssuerOff  = errors.New("must not be there: JWT_TARGET_HOSTS allows no host")
	errIssuerHost = errors.New("must not be there: JWT_TARGET_HOSTS does not allow the url's host")
	errIssuerHTTP = errors.New("needs a url that begins with https://")
	errIssuerRole = errors.New("has a role that JWT_ROLES does not allow")
)

// NewIssuer returns nil where no host is given. The error joins one line for each
// mistake, which begins with the setting's name and has no value.
func NewIssuer(o IssuerOptions) (*Issuer, error) {
	if len(o.Hosts) == 0 {
		return nil, nil
	}
	i := &Issuer{name: o.Name, roles: o.Roles}
	var errs []error
	for n, host := range o.Hosts {
		if err := i.hosts.Add(host); err != nil {
			errs = append(errs, fmt.Errorf("JWT_TARGET_HOSTS: entry %d: %w", n+1, err))
		}
	}
	for n, role := range o.Roles {
		if !task.IsRole(role) || slices.Contains(o.Roles[:n], role) {
			errs = append(errs, errors.New("JWT_ROLES: entry "+strconv.Itoa(n+1)+": must be a role of at most 64 bytes without spaces, which no earlier entry is"))
		}
	}
	if len(o.Roles) == 0 {
		errs = append(errs, errors.New("JWT_ROLES must name a role, since JWT_TARGET_HOSTS is set"))
	}
	if o.Name == "" {
		errs = append(errs, errors.New("JWT_TARGET_HOSTS: AUTH_ISSUER must be what tokens have as iss"))
	}
	var err error
	if i.key, err = signingKey(o); err != nil {
		errs = append(errs, fmt.Errorf("JWT_TARGET_HOSTS: %w", err))
	}
	return i, errors.Join(errs...)
}

func signingKey(o IssuerOptions) (*jwtkey.Key, error) {
	algorithm, err := jwtkey.ParseAlgorithm(o.Algorithm)
	if err != nil {
		return nil, err
	}
	if o.Secret == "" {
		return nil, errors.New("AUTH_SECRET must be what tokens are signed with: the secret of HS256, or a private key in PEM")
	}
	key, err := jwtkey.New(algorithm, o.Secret)
	if err == nil && !key.CanSign() {
		err = errors.New("AUTH_SECRET must be a private key in PEM (BEGIN PRIVATE KEY): a public one signs no tokens")
	}
	return key, err
}

// Check returns an error unless a token with the role may be sent to rawURL; the role ""
// is the settings' first. The error's text completes "auth …" and holds nothing that was sent.
func (i *Issuer) Check(rawURL, role string) error {
	u, err := task.ParseURL(rawURL)
	if err != nil {
		return target.ErrNotURL
	}
	return i.check(u, role)
}

func (i *Issuer) check(u *url.URL, role string) error {
	switch {
	case i == nil:
		return errIssuerOff
	case !i.hosts.Contains(u):
		return errIssuerHost
	case !target.Confidential(u):
		return errIssuerHTTP
	case role != "" && !slices.Contains(i.roles, role):
		return errIssuerRole
	}
	return nil
}

// platformClaims are what a token says. The role is a claim of the platform's own.
type platformClaims struct {
	Issuer   string `json:"iss"`
	Subject  string `json:"sub"`
	Role     string `json:"role"`
	Audience string `json:"aud,omitempty"` // some libraries refuse one that they do not expect
	IssuedAt int64  `json:"iat"`
	Expires  int64  `json:"exp"`
}

// token makes one for a call at a moment.
func (i *Issuer) token(want *task.JWT, at time.Time) (string, error) {
	c := platformClaims{
		Issuer: i.name, Subject: jwtkey.Subject, Role: want.Role, Audience: want.Audience,
		IssuedAt: at.Add(-backdated).Unix(), Expires: at.Add(validFor).Unix(),
	}
	if c.Role == "" {
		c.Role = i.roles[0]
	}
	text, err := json.Marshal(c)
	if err != nil {
		return "", fmt.Errorf("encode claims: %w", err)
	}
	return i.key.Sign(text)
}
