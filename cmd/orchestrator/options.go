package main

import (
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"slices"
	"strings"
	"syscall"

	"github.com/melodia/orchestrator/internal/auth"
	"github.com/melodia/orchestrator/internal/config"
	"github.com/melodia/orchestrator/internal/credentials"
	"github.com/melodia/orchestrator/internal/deliver"
	"github.com/melodia/orchestrator/internal/dispatch"
	"github.com/melodia/orchestrator/internal/httpapi"
	"github.com/melodia/orchestrator/internal/httpserver"
	"github.com/melodia/orchestrator/internal/jwtkey"
	"github.com/melodia/orchestrator/internal/postgres"
	"github.com/melodia/orchestrator/internal/target"
)

// warnMisspelt names what is in the environment and nearly a setting.
func warnMisspelt(log *slog.Logger) {
	misspelt := config.MisspeltHere()
	for _, name := range slices.Sorted(maps.Keys(misspelt)) {
		log.Warn("there is no such setting, and it changes nothing", "name", name, "did_you_mean", misspelt[name])
	}
}

// checkParts returns what is wrong with the settings of the parts that serve builds: one line
// for each mistake.
func checkParts(c *config.Config) error {
	_, err := deliverOptions(c)
	authenticator, authErr := newAuthenticator(c)
	if authErr == nil {
		authenticator.Close()
	}
	return errors.Join(checkBasePath(c), err, authErr)
}

// checkBasePath returns an error where a gateway cannot serve the service under BASE_PATH.
func checkBasePath(c *config.Config) error {
	switch {
	case c.BasePath == "":
		return nil
	case !httpserver.IsPathPrefix(c.BasePath):
		return errors.New("BASE_PATH must be like /orchestrator: letters, digits and - . _ ~ behind each slash, and none at the end")
	case httpapi.New(httpapi.Options{}).Owns(c.BasePath):
		return errors.New("BASE_PATH must not begin with a path of the service's own, like /tasks: requests could not be told apart")
	}
	return nil
}

// idleSettings returns a warning for each setting that changes nothing, since the one that it
// belongs to is off.
func idleSettings(c *config.Config) (warnings []string) {
	names := func(way string) bool { return authNames(c, way) }
	for _, s := range []struct {
		name      string
		set, used bool
		why       string
	}{
		{"API_KEYS", len(c.APIKeys) > 0, names("api_key"), "AUTH does not name api_key"},
		{"OIDC_AUDIENCE", c.OIDCAudience != "", names("oidc"), "AUTH does not name oidc"},
		{"OIDC_ALLOW", len(c.OIDCAllow) > 0, names("oidc"), "AUTH does not name oidc"},
		{"AUTH_ROLES", len(c.AuthRoles) > 0, names("jwt"), "AUTH does not name jwt"},
		{"AUTH_AUDIENCE", c.AuthAudience != "", names("jwt"), "AUTH does not name jwt"},
		{"AUTH_JWKS_URL", c.AuthJWKSURL != "", names("jwt"), "AUTH does not name jwt"},
		{"AUTH_SECRET", c.AuthSecret != "", names("jwt") || len(c.JWTTargetHosts) > 0, "AUTH does not name jwt, and JWT_TARGET_HOSTS is not set"},
		{"JWT_ROLES", os.Getenv("JWT_ROLES") != "", len(c.JWTTargetHosts) > 0, "JWT_TARGET_HOSTS is not set"},
		{"SECRETS_DIR", c.SecretsDir != "", len(c.SecretHosts) > 0, "SECRET_HOSTS is not set"},
	} {
		if s.set && !s.used {
			warnings = append(warnings, s.name+" changes nothing: "+s.why)
		}
	}
	return warnings
}

// authNames reports whether AUTH names a way for callers to prove who they are.
func authNames(c *config.Config, way string) bool {
	return slices.ContainsFunc(c.Auth, func(named string) bool { return strings.TrimSpace(named) == way })
}

// shortSecret returns a warning where AUTH_SECRET is in use and may be guessed; "" otherwise.
func shortSecret(c *config.Config) string {
	inUse := authNames(c, "jwt") || len(c.JWTTargetHosts) > 0
	if !inUse || !jwtkey.IsShort(jwtkey.Algorithm(c.AuthAlgorithm), c.AuthSecret) {
		return ""
	}
	return "AUTH_SECRET has fewer than 32 bytes, the least that HS256 allows: one who has a token of the platform can find it by trying, and make tokens then"
}

// newAuthenticator returns what the settings let in.
func newAuthenticator(c *config.Config) (*auth.Authenticator, error) {
	return auth.New(auth.Options{
		Methods: c.Auth, APIKeys: c.APIKeys, OIDCIssuer: c.OIDCIssuer, OIDCAudience: c.OIDCAudience, OIDCAllow: c.OIDCAllow,
		AuthSecret: c.AuthSecret, AuthSecretSigns: len(c.JWTTargetHosts) > 0, AuthAlgorithm: c.AuthAlgorithm, AuthJWKSURL: c.AuthJWKSURL,
		AuthIssuer: c.AuthIssuer, AuthAudience: c.AuthAudience, AuthRoles: c.AuthRoles,
		OnCloudRun: c.CloudRunService != "", Scopes: httpapi.Scopes(),
	})
}

// maxConnections returns how many callers may be connected: MAX_CONNECTIONS, or fewer if
// the process may not have so many descriptors.
func maxConnections(c *config.Config, log *slog.Logger) int {
	// Each call has a connection, and at most one more to look a name up; there may be more
	// calls than slots while slow hosts hold those. The last 100 are for the log, the
	// profiles, and what libraries open.
	calls := float64(c.DispatchConcurrency) * (2 - c.HostShare)
	others := int(2*calls) + c.DatabaseMaxConns + 100
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return c.MaxConnections
	}
	fit := connectionsWithin(limit.Cur, c.MaxConnections, others)
	if fit < c.MaxConnections {
		log.Warn("the process may open too few files for MAX_CONNECTIONS, so that fewer callers can be connected: raise ulimit -n or lower MAX_CONNECTIONS",
			"max_connections", fit, "open_files", limit.Cur, "needed", c.MaxConnections+others)
	}
	return fit
}

// connectionsWithin returns how many of the wanted connections a limit of descriptors
// leaves room for beside others: a quarter of the limit at least.
func connectionsWithin(limit uint64, wanted, others int) int {
	if limit >= uint64(wanted+others) { //nolint:gosec // neither is negative
		return wanted
	}
	fit := max(int(limit)-others, int(limit)/4, 1) //nolint:gosec // it is less than their sum
	return min(fit, wanted)
}

// deliverOptions returns what the settings say about calls. The error has one line for each
// mistake, which names the setting, or says that the system's certificates cannot be read.
func deliverOptions(c *config.Config) (deliver.Options, error) {
	o := deliver.Options{Version: version, Concurrency: c.DispatchConcurrency, PublicURL: c.PublicURL}
	// crypto/x509 reads them once, and keeps for good that it could not. At the first https call
	// the process may have no file descriptor left; now it has.
	var errs []error
	_, err := x509.SystemCertPool()
	if err != nil {
		errs = append(errs, fmt.Errorf("the system's CA certificates cannot be read, without which no https target can be called (SSL_CERT_FILE and SSL_CERT_DIR say where they are): %w", err))
	}
	if o.Policy, err = target.NewPolicy(c.TargetAllowHosts, c.TargetAllowNetworks, c.TargetRequireHTTPS); err != nil {
		errs = append(errs, fmt.Errorf("TARGET_ALLOW_HOSTS: %w", err))
	}
	if o.Credentials.Identity, err = credentials.NewIdentity(c.OIDCTargetHosts); err != nil {
		errs = append(errs, fmt.Errorf("OIDC_TARGET_HOSTS: %w", err))
	}
	o.Credentials.Issuer, err = credentials.NewIssuer(credentials.IssuerOptions{
		Hosts: c.JWTTargetHosts, Roles: c.JWTRoles, Name: c.AuthIssuer, Algorithm: c.AuthAlgorithm, Secret: c.AuthSecret,
	})
	if err != nil {
		errs = append(errs, err)
	}
	if o.Credentials.Signer, err = credentials.NewSigner(c.SigningSecrets); err != nil {
		errs = append(errs, fmt.Errorf("SIGNING_SECRETS: %w", err))
	}
	if o.Credentials.Secrets, err = credentials.NewSecrets(c.SecretsDir, c.SecretHosts); err != nil {
		errs = append(errs, fmt.Errorf("SECRET_HOSTS: %w", err))
	}
	return o, errors.Join(errs...)
}

// dispatchOptions returns what the settings say about the dispatcher.
func dispatchOptions(c *config.Config, store *postgres.Store, log *slog.Logger) dispatch.Options {
	name, err := os.Hostname()
	if err != nil {
		name = "unknown host"
	}
	o := dispatch.Options{
		Name:         name + " " + version,
		PollInterval: c.PollInterval,
		Lease:        c.LeaseDuration,
		Grace:        c.ShutdownGrace,
		Retention:    c.Retention,
		NewID:        store.NewID,
		Log:          log,
	}
	if c.Dispatch {
		o.Concurrency, o.HostShare = c.DispatchConcurrency, c.HostShare
	}
	return o
}
