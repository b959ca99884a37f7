package config

import (
	"log/slog"
	"net/netip"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/melodia/orchestrator/internal/task"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// marker is a part of every wrong value. No error may contain it.
const marker = "s3cr3t"

// setenv makes the environment hold these settings, and none besides.
func setenv(t *testing.T, settings map[string]string) {
	t.Helper()
	typ := reflect.TypeFor[Config]()
	for i := range typ.NumField() {
		name := typ.Field(i).Tag.Get("envconfig")
		if name == "" {
			t.Errorf("the field %s has no name in the environment", typ.Field(i).Name)
		}
		t.Setenv(name, "") // so that it is put back
		if err := os.Unsetenv(name); err != nil {
			t.Fatal(err)
		}
	}
	for name, value := range settings {
		t.Setenv(name, value)
	}
}

// defaults are the contract's.
func defaults() *Config {
	return &Config{
		Port: 8080, DatabasePort: 5432, MaxConnections: 4096, DatabaseMaxConns: 10, MigrateOnStart: true,
		OIDCIssuer: "https://accounts.google.com", AuthAlgorithm: "HS256", AuthIssuer: "auth-service", JWTRoles: []string{"service"}, RateBurst: 20, Docs: "on", ShowPayloads: "off",
		Dispatch: true, DispatchConcurrency: 200, HostShare: 0.75, PollInterval: time.Second, LeaseDuration: 15 * time.Second, ShutdownGrace: 8 * time.Second,
		TaskTimeout: 30 * time.Second, RetryMaxAttempts: 14, RetryMinBackoff: time.Second, RetryMaxBackoff: time.Hour, MaxHops: 10,
		Retention: 720 * time.Hour, IdempotencyWindow: 24 * time.Hour, LogLevel: slog.LevelInfo, LogFormat: "json",
	}
}

var comparePrefixes = cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })

func TestDefaults(t *testing.T) {
	setenv(t, nil)
	got, err := Load()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(defaults(), got, comparePrefixes); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	want := task.Spec{Timeout: 30 * time.Second, Retry: task.DefaultRetryPolicy()}
	if diff := cmp.Diff(want, got.Defaults()); diff != "" {
		t.Errorf("defaults of tasks (-want +got):\n%s", diff)
	}
}

func TestEverySetting(t *testing.T) {
	setenv(t, map[string]string{
		"PORT": "0", "BASE_PATH": "/o", "TRUSTED_PROXIES": "10.9.0.0/16,fd01::/16", "DATABASE_URL": "postgres://u:p@h/d", "MAX_CONNECTIONS": "16", "DATABASE_MAX_CONNS": "4", "MIGRATE_ON_START": "false",
		"AUTH": "api_key,oidc", "API_KEYS": "a:read:00,b:read+submit:01", "OIDC_ISSUER": "https://id.example", "OIDC_AUDIENCE": "https://o.example",
		"OIDC_ALLOW": "a@x.example:read,b@x.example:submit", "AUTH_SECRET": "secret, with a comma", "AUTH_ALGORITHM": "RS256", "AUTH_JWKS_URL": "https://id.example/keys", "AUTH_ISSUER": "id", "AUTH_AUDIENCE": "o", "AUTH_ROLES": "a:read,b:read+submit",
		"K_SERVICE": "orchestrator", "RATE_LIMIT": "0.5", "RATE_BURST": "7", "DOCS": "off", "SHOW_PAYLOADS": "on",
		"DISPATCH": "0", "DISPATCH_CONCURRENCY": "1", "HOST_SHARE": "1", "POLL_INTERVAL": "10ms", "LEASE_DURATION": "1m30s", "SHUTDOWN_GRACE": "0",
		"TASK_TIMEOUT": "100ms", "RETRY_MAX_ATTEMPTS": "100", "RETRY_MIN_BACKOFF": "10ms", "RETRY_MAX_BACKOFF": "24h", "MAX_HOPS": "3",
		"TARGET_ALLOW_HOSTS": "a.example,.b.example", "TARGET_ALLOW_NETWORKS": "10.0.0.0/8,fd00::/8", "TARGET_REQUIRE_HTTPS": "true",
		"OIDC_TARGET_HOSTS": "a.example,.b.example", "JWT_TARGET_HOSTS": "c.example,.d.example", "JWT_ROLES": "admin,user", "SIGNING_SECRETS": "whsec_a,whsec_b", "SECRETS_DIR": ".", "SECRET_HOSTS": "a=a.example,b=.b.example",
		"RETENTION": "1h", "IDEMPOTENCY_WINDOW": "10m", "LOG_LEVEL": "DEBUG", "LOG_FORMAT": "text", "DEBUG_PORT": "6060",
	})
	got, err := Load()
	if err != nil {
		t.Fatal(err)
	}
	want := &Config{
		Port: 0, BasePath: "/o", TrustedProxies: []netip.Prefix{netip.MustParsePrefix("10.9.0.0/16"), netip.MustParsePrefix("fd01::/16")}, DatabasePort: 5432, DatabaseURL: "postgres://u:p@h/d", MaxConnections: 16, DatabaseMaxConns: 4, MigrateOnStart: false,
		Auth: []string{"api_key", "oidc"}, APIKeys: []string{"a:read:00", "b:read+submit:01"}, OIDCIssuer: "https://id.example", OIDCAudience: "https://o.example",
		OIDCAllow: []string{"a@x.example:read", "b@x.example:submit"}, CloudRunService: "orchestrator",
		AuthSecret: "secret, with a comma", AuthAlgorithm: "RS256", AuthJWKSURL: "https://id.example/keys", AuthIssuer: "id", AuthAudience: "o", AuthRoles: []string{"a:read", "b:read+submit"},
		JWTTargetHosts: []string{"c.example", ".d.example"}, JWTRoles: []string{"admin", "user"}, RateLimit: 0.5, RateBurst: 7, Docs: "off", ShowPayloads: "on",
		Dispatch: false, DispatchConcurrency: 1, HostShare: 1, PollInterval: 10 * time.Millisecond, LeaseDuration: 90 * time.Second, ShutdownGrace: 0,
		TaskTimeout: 100 * time.Millisecond, RetryMaxAttempts: 100, RetryMinBackoff: 10 * time.Millisecond, RetryMaxBackoff: 24 * time.Hour, MaxHops: 3,
		TargetAllowHosts:    []string{"a.example", ".b.example"},
		TargetAllowNetworks: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("fd00::/8")}, TargetRequireHTTPS: true,
		OIDCTargetHosts: []string{"a.example", ".b.example"}, SigningSecrets: []string{"whsec_a", "whsec_b"},
		SecretsDir: ".", SecretHosts: []string{"a=a.example", "b=.b.example"},
		Retention: time.Hour, IdempotencyWindow: 10 * time.Minute, LogLevel: slog.LevelDebug, LogFormat: "text", DebugPort: 6060,
	}
	if diff := cmp.Diff(want, got, comparePrefixes); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	retry := task.DefaultRetryPolicy()
	retry.MaxAttempts, retry.MinBackoff, retry.MaxBackoff = 100, 10*time.Millisecond, 24*time.Hour
	if diff := cmp.Diff(task.Spec{Timeout: 100 * time.Millisecond, Retry: retry}, got.Defaults()); diff != "" {
		t.Errorf("defaults of tasks (-want +got):\n%s", diff)
	}
}

// One setting at a time, at both edges of its range and beyond.
func TestRanges(t *testing.T) {
	for _, tt := range []struct {
		name         string
		right, wrong []string
		rule         string
		unreadable   []string
		unreadRule   string
	}{
		{name: "PORT", right: []string{"0", "1", "65535"}, wrong: []string{"-1", "65536"}, rule: "must be between 0 and 65535; 0 takes any free port",
			unreadable: []string{marker, "80.5", "", " 80", "99999999999999999999"}, unreadRule: "must be a whole number, like 8080"},
		{name: "MAX_CONNECTIONS", right: []string{"16", "1000000"}, wrong: []string{"15", "1000001", "-4"}, rule: "must be between 16 and 1000000"},
		{name: "DATABASE_PORT", right: []string{"1", "65535"}, wrong: []string{"0", "65536", "-1"}, rule: "must be between 1 and 65535",
			unreadable: []string{marker, "", "tcp://10.0.0.1:5432"}, unreadRule: "must be a whole number, like 5432"},
		{name: "DATABASE_MAX_CONNS", right: []string{"4", "1000"}, wrong: []string{"3", "1001", "-4"}, rule: "must be between 4 and 1000",
			unreadable: []string{marker, ""}, unreadRule: "must be a whole number, like 10"},
		{name: "MIGRATE_ON_START", right: []string{"true", "false", "1", "0", "T", "F"}, unreadable: []string{marker, "", "yes", "2"}, unreadRule: "must be true or false"},
		// What is in them is for package auth to judge.
		{name: "AUTH", right: []string{"", marker}}, {name: "API_KEYS", right: []string{"", marker}}, {name: "OIDC_ISSUER", right: []string{"", marker}},
		{name: "OIDC_AUDIENCE", right: []string{"", marker}}, {name: "OIDC_ALLOW", right: []string{"", marker}}, {name: "K_SERVICE", right: []string{"", marker}},
		{name: "AUTH_SECRET", right: []string{"", marker}}, {name: "AUTH_ALGORITHM", right: []string{"", marker}}, {name: "AUTH_JWKS_URL", right: []string{"", marker}},
		{name: "AUTH_ISSUER", right: []string{"", marker}}, {name: "AUTH_AUDIENCE", right: []string{"", marker}}, {name: "AUTH_ROLES", right: []string{"", marker}},
		{name: "JWT_TARGET_HOSTS", right: []string{"", marker}}, {name: "JWT_ROLES", right: []string{"", marker}},
		{name: "RATE_LIMIT", right: []string{"0", "0.001", "1000000"}, wrong: []string{"-0.1", "1000001", "NaN", "Inf"}, rule: "must be between 0 and 1000000 requests a second; 0 sets no limit",
			unreadable: []string{marker, "", "10/s"}, unreadRule: "must be a number, like 0"},
		{name: "RATE_BURST", right: []string{"1", "1000000"}, wrong: []string{"0", "1000001"}, rule: "must be between 1 and 1000000",
			unreadable: []string{marker, "0.5"}, unreadRule: "must be a whole number, like 20"},
		{name: "DOCS", right: []string{"on", "off"}, wrong: []string{marker, "", "true"}, rule: "must be on or off"},
		{name: "SHOW_PAYLOADS", right: []string{"on", "off"}, wrong: []string{marker, "", "true"}, rule: "must be on or off"},
		{name: "DISPATCH", right: []string{"true", "false"}, unreadable: []string{marker, "on"}, unreadRule: "must be true or false"},
		{name: "DISPATCH_CONCURRENCY", right: []string{"1", "10000"}, wrong: []string{"0", "10001"}, rule: "must be between 1 and 10000; to carry out none, set DISPATCH=false",
			unreadable: []string{marker, "1e3"}, unreadRule: "must be a whole number, like 200"},
		{name: "HOST_SHARE", right: []string{"0.1", "0.5", "1"}, wrong: []string{"0", "0.09", "1.01", "-1", "NaN"}, rule: "must be between 0.1 and 1; 1 lets one host have all slots",
			unreadable: []string{marker, "", "75%"}, unreadRule: "must be a number, like 0.75"},
		{name: "POLL_INTERVAL", right: []string{"10ms", "1h"}, wrong: []string{"9.999ms", "1h1ns", "-1s", "0"}, rule: "must be between 10ms and 1h",
			unreadable: []string{marker, "5", "", "1d", "1 s"}, unreadRule: "must be a duration with its unit, like 1s or 1m30s"},
		{name: "LEASE_DURATION", right: []string{"1s", "1h"}, wrong: []string{"999ms", "61m"}, rule: "must be between 1s and 1h",
			unreadable: []string{marker}, unreadRule: "must be a duration with its unit, like 15s or 1m30s"},
		{name: "SHUTDOWN_GRACE", right: []string{"0", "1h"}, wrong: []string{"-1ns", "61m"}, rule: "must be between 0s and 1h",
			unreadable: []string{marker}, unreadRule: "must be a duration with its unit, like 8s or 1m30s"},
		{name: "TASK_TIMEOUT", right: []string{"100ms", "30m"}, wrong: []string{"99ms", "30m1ms", "0"}, rule: "must be between 100ms and 30m",
			unreadable: []string{marker}, unreadRule: "must be a duration with its unit, like 30s or 1m30s"},
		{name: "RETRY_MAX_ATTEMPTS", right: []string{"1", "100"}, wrong: []string{"0", "101"}, rule: "must be between 1 and 100",
			unreadable: []string{marker}, unreadRule: "must be a whole number, like 14"},
		{name: "RETRY_MIN_BACKOFF", right: []string{"10ms", "1h"}, wrong: []string{"9ms", "0"}, rule: "must be between 10ms and 24h",
			unreadable: []string{marker}, unreadRule: "must be a duration with its unit, like 1s or 1m30s"},
		{name: "RETRY_MAX_BACKOFF", right: []string{"1s", "24h"}, wrong: []string{"999ms", "24h1s"}, rule: "must be between RETRY_MIN_BACKOFF and 24h",
			unreadable: []string{marker}, unreadRule: "must be a duration with its unit, like 1h or 1m30s"},
		{name: "TARGET_ALLOW_HOSTS", right: []string{"", "a.example"}},
		{name: "TARGET_ALLOW_NETWORKS", right: []string{"", "10.0.0.0/8", "::/0"}, wrong: []string{"10.0.0.0/8,"}, rule: "must be " + networksRule,
			unreadable: []string{marker, "10.0.0.0", "10.0.0.0/33", "10.0.0.0/8, fd00::/8", "10.0.0.0/8;" + marker}, unreadRule: "must be " + networksRule},
		{name: "TARGET_REQUIRE_HTTPS", right: []string{"true", "false"}, unreadable: []string{marker}, unreadRule: "must be true or false"},
		{name: "BASE_PATH", right: []string{"", marker}},
		{name: "TRUSTED_PROXIES", right: []string{"", "10.0.0.0/8", "::/0"}, wrong: []string{"10.0.0.0/8,"}, rule: "must be " + networksRule,
			unreadable: []string{marker, "10.0.0.1"}, unreadRule: "must be " + networksRule},
		{name: "OIDC_TARGET_HOSTS", right: []string{"", "a.example"}},
		{name: "SIGNING_SECRETS", right: []string{"", "whsec_" + marker}},
		{name: "SECRETS_DIR", right: []string{"", ".", marker}},
		{name: "RETENTION", right: []string{"1h", "87600h"}, wrong: []string{"59m59s", "-1h"}, rule: "must be at least 1h",
			unreadable: []string{marker, "30d"}, unreadRule: "must be a duration with its unit, like 720h or 1m30s"},
		{name: "IDEMPOTENCY_WINDOW", right: []string{"1s", "8760h"}, wrong: []string{"999ms", "8761h", "-1h"}, rule: "must be between 1s and 8760h",
			unreadable: []string{marker, "1d"}, unreadRule: "must be a duration with its unit, like 24h or 1m30s"},
		{name: "LOG_LEVEL", right: []string{"debug", "info", "warn", "error", "INFO"}, unreadable: []string{marker, "", "trace"}, unreadRule: "must be debug, info, warn or error"},
		{name: "DEBUG_PORT", right: []string{"0", "6060", "65535"}, wrong: []string{"-1", "65536", "8080"}, rule: "must be between 0 and 65535, and not PORT",
			unreadable: []string{marker, ""}, unreadRule: "must be a whole number, like 0"},
		{name: "LOG_FORMAT", right: []string{"json", "text"}, wrong: []string{marker, "", "JSON"}, rule: "must be json or text"},
		{name: "DATABASE_URL", right: []string{"", "postgres://u:" + marker + "@h/d", marker}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, value := range tt.right {
				setenv(t, map[string]string{tt.name: value})
				if _, err := Load(); err != nil {
					t.Errorf("%q: %v", value, err)
				}
			}
			for rule, values := range map[string][]string{tt.rule: tt.wrong, tt.unreadRule: tt.unreadable} {
				for _, value := range values {
					setenv(t, map[string]string{tt.name: value})
					c, err := Load()
					if want := tt.name + " " + rule; err == nil || err.Error() != want {
						t.Errorf("%q: got %v, want %q", value, err, want)
					}
					if c != nil {
						t.Errorf("%q: got settings with the error", value)
					}
				}
			}
		})
	}
}

// All mistakes are told at once, a line each, and nothing of what was set.
func TestManyMistakes(t *testing.T) {
	setenv(t, map[string]string{
		"DATABASE_URL": "postgres://user:" + marker + "@host/db",
		"PORT":         marker, "DISPATCH": marker, "POLL_INTERVAL": marker, "TARGET_ALLOW_NETWORKS": marker, "LOG_LEVEL": marker,
		"DATABASE_MAX_CONNS": "1", "RETRY_MIN_BACKOFF": marker, "RETRY_MAX_BACKOFF": "25h", "LOG_FORMAT": marker,
	})
	_, err := Load()
	if err == nil {
		t.Fatal("got no error")
	}
	got := strings.Split(err.Error(), "\n")
	want := []string{
		"PORT must be a whole number, like 8080",
		"DISPATCH must be true or false",
		"POLL_INTERVAL must be a duration with its unit, like 1s or 1m30s",
		"RETRY_MIN_BACKOFF must be a duration with its unit, like 1s or 1m30s",
		"TARGET_ALLOW_NETWORKS must be " + networksRule,
		"LOG_LEVEL must be debug, info, warn or error",
		"DATABASE_MAX_CONNS must be between 4 and 1000",
		"RETRY_MAX_BACKOFF must be between RETRY_MIN_BACKOFF and 24h",
		"LOG_FORMAT must be json or text",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if strings.Contains(err.Error(), marker) {
		t.Errorf("the error holds a value: %v", err)
	}
}

// Settings that are right alone and wrong together.
func TestBackoffOrder(t *testing.T) {
	setenv(t, map[string]string{"RETRY_MIN_BACKOFF": "2h"})
	if _, err := Load(); err == nil || err.Error() != "RETRY_MAX_BACKOFF must be between RETRY_MIN_BACKOFF and 24h" {
		t.Errorf("got %v, want a word about RETRY_MAX_BACKOFF", err)
	}
	setenv(t, map[string]string{"RETRY_MIN_BACKOFF": "2h", "RETRY_MAX_BACKOFF": "2h"})
	if _, err := Load(); err != nil {
		t.Error(err)
	}
}

// Secrets for hosts need a folder to be in.
func TestSecretsNeedAFolder(t *testing.T) {
	for dir, want := range map[string]bool{"": false, marker: false, "config.go": false, ".": true} {
		setenv(t, map[string]string{"SECRET_HOSTS": marker + "=a.example", "SECRETS_DIR": dir})
		_, err := Load()
		if want && err != nil || !want && (err == nil || err.Error() != "SECRETS_DIR must be a folder, since SECRET_HOSTS is set") {
			t.Errorf("%q: got %v, want it accepted: %t", dir, err, want)
		}
	}
}

// The ranges are those of the domain: what the settings admit, a task may have.
func TestDefaultsAreLegal(t *testing.T) {
	for _, settings := range []map[string]string{
		nil,
		{"TASK_TIMEOUT": "100ms", "RETRY_MAX_ATTEMPTS": "1", "RETRY_MIN_BACKOFF": "10ms", "RETRY_MAX_BACKOFF": "10ms"},
		{"TASK_TIMEOUT": "30m", "RETRY_MAX_ATTEMPTS": "100", "RETRY_MIN_BACKOFF": "24h", "RETRY_MAX_BACKOFF": "24h"},
	} {
		setenv(t, settings)
		c, err := Load()
		if err != nil {
			t.Fatal(err)
		}
		spec := c.Defaults()
		spec.URL, spec.Method = "https://example.com/", "POST"
		if _, err := task.New(task.ID{1}, spec, task.When{}, time.Now()); err != nil {
			t.Errorf("%v: the defaults make an illegal task: %v", settings, err)
		}
	}
}
