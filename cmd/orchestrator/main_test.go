package main

import (
	"bytes"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/melodia/orchestrator/internal/postgres/pgtest"
)

func TestMain(m *testing.M) {
	code := pgtest.Main(m)
	http.DefaultClient.CloseIdleConnections()
	if err := goleak.Find(); code == 0 && err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func TestBadSettings(t *testing.T) {
	t.Setenv("DATABASE_URL", "postgres://u:hunter2@127.0.0.1:1/db?sslmode=nonsense")
	t.Setenv("PORT", "0")
	t.Setenv("AUTH", "none")
	for name, tt := range map[string]struct {
		env  map[string]string
		want []string
	}{
		"no database":              {map[string]string{"DATABASE_URL": "", "PORT": "x"}, []string{"DATABASE_URL is not set", "PORT must be a whole number"}},
		"nothing set":              {map[string]string{"DATABASE_URL": "", "AUTH": ""}, []string{"DATABASE_URL is not set", "AUTH is not set"}},
		"several mistakes":         {map[string]string{"PORT": "x", "POLL_INTERVAL": "1"}, []string{"PORT must be a whole number", "POLL_INTERVAL must be a duration"}},
		"nobody said who may call": {map[string]string{"AUTH": ""}, []string{"AUTH is not set", "api_key", "orchestrator dev"}},
		"open to the world":        {map[string]string{"K_SERVICE": "orchestrator"}, []string{"AUTH must not be none on Cloud Run"}},
		"IAM that is not there":    {map[string]string{"AUTH": "iam"}, []string{"AUTH must not be iam outside of Cloud Run"}},
		"keys without entries":     {map[string]string{"AUTH": "api_key"}, []string{"API_KEYS is not set", "orchestrator key NAME SCOPES"}},
		"a key in the wrong place": {map[string]string{"AUTH": "api_key", "API_KEYS": "hunter2"}, []string{"API_KEYS, entry 1: it must be name:scopes:sha256"}},
		"a URL of no sort":         {nil, []string{"DATABASE_URL is not valid"}},
		"a host that is a URL":     {map[string]string{"TARGET_ALLOW_HOSTS": "https://x:1/"}, []string{"TARGET_ALLOW_HOSTS"}},
		"a host for tokens":        {map[string]string{"OIDC_TARGET_HOSTS": "plays.melodia.app,https://hunter2"}, []string{"OIDC_TARGET_HOSTS: entry 2"}},
		"a signing secret":         {map[string]string{"SIGNING_SECRETS": "hunter2"}, []string{"SIGNING_SECRETS: entry 1: must be whsec_"}},
		"roles without a secret":   {map[string]string{"AUTH": "jwt", "AUTH_ROLES": "hunter2"}, []string{"AUTH_SECRET is not set, and AUTH names jwt", "AUTH_ROLES, entry 1: scopes must be"}},
		"a secret without roles":   {map[string]string{"AUTH": "jwt", "AUTH_SECRET": "hunter2", "AUTH_ALGORITHM": "HS265"}, []string{"AUTH_ALGORITHM must be HS256, RS256 or ES256", "AUTH_ROLES is not set"}},
		"a secret that is no key":  {map[string]string{"JWT_TARGET_HOSTS": "https://hunter2", "AUTH_SECRET": "hunter2", "AUTH_ALGORITHM": "ES256", "JWT_ROLES": "a b", "SIGNING_SECRETS": "hunter2", "API_KEYS": "hunter2", "AUTH": "api_key"}, []string{"JWT_TARGET_HOSTS: entry 1", "JWT_ROLES: entry 1", "JWT_TARGET_HOSTS: AUTH_SECRET must be a key of the curve P-256", "SIGNING_SECRETS: entry 1", "API_KEYS, entry 1"}},
		"a path that is none":      {map[string]string{"BASE_PATH": "hunter2/", "AUTH": ""}, []string{"BASE_PATH must be like /orchestrator", "AUTH is not set"}},
		"a path of its own":        {map[string]string{"BASE_PATH": "/tasks"}, []string{"BASE_PATH must not begin with a path of the service's own"}},
		"no folder":                {map[string]string{"SECRET_HOSTS": "hunter2=.melodia.app"}, []string{"SECRETS_DIR must be a folder, since SECRET_HOSTS is set"}},
		"a host for secrets":       {map[string]string{"SECRET_HOSTS": "hunter2", "SECRETS_DIR": t.TempDir()}, []string{"SECRET_HOSTS: entry 1"}},
	} {
		t.Run(name, func(t *testing.T) {
			for key, value := range tt.env {
				t.Setenv(key, value)
			}
			var stdout, stderr bytes.Buffer
			if code := run(t.Context(), []string{"serve"}, &stdout, &stderr); code != 1 {
				t.Errorf("exit code %d, want 1", code)
			}
			for _, want := range tt.want {
				if !strings.Contains(stderr.String(), want) {
					t.Errorf("stderr = %q, want a line with %q", stderr.String(), want)
				}
			}
			if strings.Contains(stderr.String()+stdout.String(), "hunter2") {
				t.Errorf("the password is shown: %s%s", stdout.String(), stderr.String())
			}
		})
	}
}

func TestCommands(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		args   []string
		code   int
		stdout string
		stderr string
	}{
		"version":              {[]string{"version"}, 0, "dev\n", ""},
		"help":                 {[]string{"help"}, 0, usage, ""},
		"help as a flag":       {[]string{"--help"}, 0, usage, ""},
		"an unknown command":   {[]string{"srve"}, 2, "", "orchestrator: there is no command srve\n" + usage},
		"a key without scopes": {[]string{"key", "plays"}, 2, "", "orchestrator: there is no command key with so many arguments\n" + usage},
		"a key for nothing":    {[]string{"key", "plays", "write"}, 1, "", "orchestrator: scopes must be of submit, read, manage, internal, joined by +\n"},
		"too many arguments":   {[]string{"version", "now"}, 2, "", "orchestrator: there is no command version with so many arguments\n" + usage},
	} {
		var stdout, stderr bytes.Buffer
		if code := run(t.Context(), tt.args, &stdout, &stderr); code != tt.code || stdout.String() != tt.stdout || stderr.String() != tt.stderr {
			t.Errorf("%s: %d, %q, %q; want %d, %q, %q", name, code, stdout.String(), stderr.String(), tt.code, tt.stdout, tt.stderr)
		}
	}
}

func TestMigrate(t *testing.T) {
	t.Setenv("DATABASE_URL", pgtest.EmptyURL(t))
	files, err := filepath.Glob("../../migrations/*.sql")
	if err != nil {
		t.Fatal(err)
	}
	for _, applied := range []int{len(files), 0} {
		want := fmt.Sprintf("migrations applied: %d\n", applied)
		var stdout, stderr bytes.Buffer
		if code := run(t.Context(), []string{"migrate"}, &stdout, &stderr); code != 0 || stdout.String() != want {
			t.Errorf("migrate: %d, %q, %q; want 0, %q", code, stdout.String(), stderr.String(), want)
		}
	}
}

func TestCommittedDocumentIsFresh(t *testing.T) {
	t.Parallel()
	committed, err := os.ReadFile("../../api/openapi.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var stdout, stderr bytes.Buffer
	if code := run(t.Context(), []string{"openapi"}, &stdout, &stderr); code != 0 {
		t.Fatalf("openapi: exit code %d: %s", code, stderr.String())
	}
	if diff := cmp.Diff(string(committed), stdout.String()); diff != "" {
		t.Errorf("api/openapi.yaml is stale; run: go run ./cmd/orchestrator openapi > api/openapi.yaml\n%s", diff)
	}
}

func TestDevRefusesArguments(t *testing.T) {
	t.Setenv("DATABASE_URL", "postgres://127.0.0.1:1/x")
	for name, tt := range map[string]struct {
		args []string
		code int
		want string
	}{
		"an unknown flag":              {[]string{"dev", "--prot", "1"}, 2, "orchestrator: dev has no flag --prot\n" + usage},
		"a port that is no number":     {[]string{"dev", "--port", "hunter2"}, 2, "orchestrator: --port takes a whole number, and --fresh takes nothing\n" + usage},
		"an argument":                  {[]string{"dev", "now"}, 2, "orchestrator: dev takes nothing but --port and --fresh\n" + usage},
		"no port":                      {[]string{"dev", "--port", "70000"}, 1, "--port must be between 0 and 65535"},
		"fresh, with another database": {[]string{"dev", "--fresh"}, 1, "DATABASE_URL or DATABASE_HOST is set"},
	} {
		var stdout, stderr bytes.Buffer
		if code := run(t.Context(), tt.args, &stdout, &stderr); code != tt.code || !strings.Contains(stderr.String(), tt.want) {
			t.Errorf("%s: %d, %q, want %d and %q", name, code, stderr.String(), tt.code, tt.want)
		}
	}
}
