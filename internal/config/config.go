// Package config reads the service's settings from the environment.
package config

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"net/url"
	"os"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/kelseyhightower/envconfig"

	"github.com/melodia/orchestrator/internal/task"
)

// Config is every setting. The table of docs/operations.md is its documentation.
type Config struct {
	Port           int            `envconfig:"PORT" default:"8080"`
	BasePath       string         `envconfig:"BASE_PATH"`
	TrustedProxies []netip.Prefix `envconfig:"TRUSTED_PROXIES"`
	// DatabaseURL is where the database is. Load makes it of the five settings below
	// where those are set instead.
	DatabaseURL      string `envconfig:"DATABASE_URL"`
	DatabaseHost     string `envconfig:"DATABASE_HOST"`
	DatabasePort     int    `envconfig:"DATABASE_PORT" default:"5432"`
	DatabaseName     string `envconfig:"DATABASE_NAME"`
	DatabaseUser     string `envconfig:"DATABASE_USER"`
	DatabasePassword string `envconfig:"DATABASE_PASSWORD"`
	MaxConnections   int    `envconfig:"MAX_CONNECTIONS" default:"4096"`
	DatabaseMaxConns int    `envconfig:"DATABASE_MAX_CONNS" default:"10"`
	MigrateOnStart   bool   `envconfig:"MIGRATE_ON_START" default:"true"`

	Auth         []string `envconfig:"AUTH"`
	APIKeys      []string `envconfig:"API_KEYS"`
	OIDCIssuer   string   `envconfig:"OIDC_ISSUER" default:"https://accounts.google.com"`
	OIDCAudience string   `envconfig:"OIDC_AUDIENCE"`
	OIDCAllow    []string `envconfig:"OIDC_ALLOW"`
	// AuthSecret and what follows are of the platform's tokens.
	AuthSecret    string   `envconfig:"AUTH_SECRET"`
	AuthAlgorithm string   `envconfig:"AUTH_ALGORITHM" default:"HS256"`
	AuthJWKSURL   string   `envconfig:"AUTH_JWKS_URL"`
	AuthIssuer    string   `envconfig:"AUTH_ISSUER" default:"auth-service"`
	AuthAudience  string   `envconfig:"AUTH_AUDIENCE"`
	AuthRoles     []string `envconfig:"AUTH_ROLES"`
	// CloudRunService is set by Cloud Run itself.
	CloudRunService string  `envconfig:"K_SERVICE"`
	RateLimit       float64 `envconfig:"RATE_LIMIT" default:"0"`
	RateBurst       int     `envconfig:"RATE_BURST" default:"20"`
	Docs            string  `envconfig:"DOCS" default:"on"`
	ShowPayloads    string  `envconfig:"SHOW_PAYLOADS" default:"off"`

	Dispatch            bool          `envconfig:"DISPATCH" default:"true"`
	DispatchConcurrency int           `envconfig:"DISPATCH_CONCURRENCY" default:"200"`
	HostShare           float64       `envconfig:"HOST_SHARE" default:"0.75"`
	PollInterval        time.Duration `envconfig:"POLL_INTERVAL" default:"1s"`
	LeaseDuration       time.Duration `envconfig:"LEASE_DURATION" default:"15s"`
	ShutdownGrace       time.Duration `envconfig:"SHUTDOWN_GRACE" default:"8s"`

	// PublicURL is without a slash at the end, after Load.
	PublicURL string `envconfig:"PUBLIC_URL"`

	TaskTimeout      time.Duration `envconfig:"TASK_TIMEOUT" default:"30s"`
	RetryMaxAttempts int           `envconfig:"RETRY_MAX_ATTEMPTS" default:"14"`
	RetryMinBackoff  time.Duration `envconfig:"RETRY_MIN_BACKOFF" default:"1s"`
	RetryMaxBackoff  time.Duration `envconfig:"RETRY_MAX_BACKOFF" default:"1h"`
	MaxHops          int           `envconfig:"MAX_HOPS" default:"10"`

	TargetAllowHosts    []string       `envconfig:"TARGET_ALLOW_HOSTS"`
	TargetAllowNetworks []netip.Prefix `envconfig:"TARGET_ALLOW_NETWORKS"`
	TargetRequireHTTPS  bool           `envconfig:"TARGET_REQUIRE_HTTPS" default:"false"`

	OIDCTargetHosts []string `envconfig:"OIDC_TARGET_HOSTS"`
	JWTTargetHosts  []string `envconfig:"JWT_TARGET_HOSTS"`
	JWTRoles        []string `envconfig:"JWT_ROLES" default:"service"`
	SigningSecrets  []string `envconfig:"SIGNING_SECRETS"`
	SecretsDir      string   `envconfig:"SECRETS_DIR"`
	SecretHosts     []string `envconfig:"SECRET_HOSTS"`

	Retention         time.Duration `envconfig:"RETENTION" default:"720h"`
	IdempotencyWindow time.Duration `envconfig:"IDEMPOTENCY_WINDOW" default:"24h"`

	LogLevel  slog.Level `envconfig:"LOG_LEVEL" default:"info"`
	LogFormat string     `envconfig:"LOG_FORMAT" default:"json"`

	DebugPort int `envconfig:"DEBUG_PORT" default:"0"`
}

// Load reads the environment. The error joins one line for each mistake; none
// of them holds a value, since that may be a secret in the wrong place.
func Load() (*Config, error) {
	c := new(Config)
	errs, unread := c.read()
	c.PublicURL = strings.TrimRight(c.PublicURL, "/")
	errs = append(errs, c.check(unread)...)
	if errs = append(errs, c.joinDatabase()...); errs != nil {
		return nil, errors.Join(errs...)
	}
	return c, nil
}

// read sets the fields one by one, because envconfig stops at the first mistake and the
// operator wants to know all of them. unread are the names of settings that could not be
// read. Their fields stay zero.
func (c *Config) read() (errs []error, unread map[string]bool) {
	unread = make(map[string]bool)
	v := reflect.ValueOf(c).Elem()
	for i := range v.NumField() {
		field := v.Type().Field(i)
		one := reflect.New(reflect.StructOf([]reflect.StructField{field}))
		if err := envconfig.Process("", one.Interface()); err != nil { // its text holds the value
			name := field.Tag.Get("envconfig")
			errs = append(errs, fmt.Errorf("%s must be %s", name, kindOf(field)))
			unread[name] = true
			continue
		}
		v.Field(i).Set(one.Elem().Field(0))
	}
	return errs, unread
}

const networksRule = "networks with their prefix length, joined by commas without spaces, like 10.0.0.0/8,fd00::/8"

// kindOf says in words what a field takes.
func kindOf(field reflect.StructField) string {
	switch reflect.New(field.Type).Interface().(type) {
	case *int:
		return "a whole number, like " + field.Tag.Get("default")
	case *float64:
		return "a number, like " + field.Tag.Get("default")
	case *bool:
		return "true or false"
	case *time.Duration:
		return "a duration with its unit, like " + field.Tag.Get("default") + " or 1m30s"
	case *[]netip.Prefix:
		return networksRule
	case *slog.Level:
		return "debug, info, warn or error"
	default:
		return "readable"
	}
}

// check reports values that could be read but cannot be used.
func (c *Config) check(unread map[string]bool) (errs []error) {
	within := func(name string, ok bool, rule string) {
		if !ok && !unread[name] {
			errs = append(errs, fmt.Errorf("%s must be %s", name, rule))
		}
	}
	within("PORT", c.Port >= 0 && c.Port <= 65535, "between 0 and 65535; 0 takes any free port")
	within("MAX_CONNECTIONS", c.MaxConnections >= 16 && c.MaxConnections <= 1e6, "between 16 and 1000000")
	within("DATABASE_PORT", c.DatabasePort >= 1 && c.DatabasePort <= 65535, "between 1 and 65535")
	within("DATABASE_MAX_CONNS", c.DatabaseMaxConns >= 4 && c.DatabaseMaxConns <= 1000, "between 4 and 1000")
	within("RATE_LIMIT", c.RateLimit >= 0 && c.RateLimit <= 1e6, "between 0 and 1000000 requests a second; 0 sets no limit")
	within("RATE_BURST", c.RateBurst >= 1 && c.RateBurst <= 1e6, "between 1 and 1000000")
	within("DOCS", c.Docs == "on" || c.Docs == "off", "on or off")
	within("SHOW_PAYLOADS", c.ShowPayloads == "on" || c.ShowPayloads == "off", "on or off")
	within("DISPATCH_CONCURRENCY", c.DispatchConcurrency >= 1 && c.DispatchConcurrency <= 10000, "between 1 and 10000; to carry out none, set DISPATCH=false")
	within("HOST_SHARE", c.HostShare >= 0.1 && c.HostShare <= 1, "between 0.1 and 1; 1 lets one host have all slots")
	within("POLL_INTERVAL", c.PollInterval >= 10*time.Millisecond && c.PollInterval <= time.Hour, "between 10ms and 1h")
	within("LEASE_DURATION", c.LeaseDuration >= time.Second && c.LeaseDuration <= time.Hour, "between 1s and 1h")
	within("SHUTDOWN_GRACE", c.ShutdownGrace >= 0 && c.ShutdownGrace <= time.Hour, "between 0s and 1h")
	within("TASK_TIMEOUT", c.TaskTimeout >= task.MinTimeout && c.TaskTimeout <= task.MaxTimeout, "between 100ms and 30m")
	within("RETRY_MAX_ATTEMPTS", c.RetryMaxAttempts >= 1 && c.RetryMaxAttempts <= task.MaxAttemptsLimit, "between 1 and 100")
	within("RETRY_MIN_BACKOFF", c.RetryMinBackoff >= task.MinBackoffLimit && c.RetryMinBackoff <= task.MaxBackoffLimit, "between 10ms and 24h")
	within("RETRY_MAX_BACKOFF", c.RetryMaxBackoff >= c.RetryMinBackoff && c.RetryMaxBackoff <= task.MaxBackoffLimit, "between RETRY_MIN_BACKOFF and 24h")
	within("PUBLIC_URL", c.PublicURL == "" || isPublicURL(c.PublicURL), "an http or https URL without query, fragment or user, such as https://tasks.melodia.app")
	within("MAX_HOPS", c.MaxHops >= 0 && c.MaxHops <= 1000, "between 0 and 1000; 0 sets no limit")
	within("TARGET_ALLOW_NETWORKS", !slices.Contains(c.TargetAllowNetworks, netip.Prefix{}), networksRule) // an empty entry is read as one
	within("SECRETS_DIR", len(c.SecretHosts) == 0 || isDir(c.SecretsDir), "a folder, since SECRET_HOSTS is set")
	within("TRUSTED_PROXIES", !slices.Contains(c.TrustedProxies, netip.Prefix{}), networksRule)
	within("RETENTION", c.Retention >= time.Hour, "at least 1h")
	within("IDEMPOTENCY_WINDOW", c.IdempotencyWindow >= time.Second && c.IdempotencyWindow <= 365*24*time.Hour, "between 1s and 8760h")
	within("DEBUG_PORT", c.DebugPort >= 0 && c.DebugPort <= 65535 && (c.DebugPort == 0 || c.DebugPort != c.Port), "between 0 and 65535, and not PORT")
	within("LOG_FORMAT", c.LogFormat == "json" || c.LogFormat == "text", "json or text")
	return errs
}

func isPublicURL(text string) bool {
	u, err := url.Parse(text)
	return err == nil && (u.Scheme == "http" || u.Scheme == "https") && u.Host != "" && u.User == nil && u.RawQuery == "" && !u.ForceQuery &&
		u.Fragment == "" && len(text) <= task.MaxURLBytes && task.IsFieldValue(text)
}

func isDir(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.IsDir()
}

// Defaults are the values for what a task request leaves out.
func (c *Config) Defaults() task.Spec {
	retry := task.DefaultRetryPolicy()
	retry.MaxAttempts = c.RetryMaxAttempts
	retry.MinBackoff = c.RetryMinBackoff
	retry.MaxBackoff = c.RetryMaxBackoff
	return task.Spec{Timeout: c.TaskTimeout, Retry: retry}
}
