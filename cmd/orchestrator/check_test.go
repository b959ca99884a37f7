package main

import (
	"bytes"
	"context"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/melodia/orchestrator/internal/postgres/pgtest"
)

func TestCheck(t *testing.T) {
	t.Setenv("AUTH", "none")
	t.Setenv("PORT", "0")
	t.Setenv("TARGET_ALOW_HOSTS", "hunter2")
	migrated, empty := pgtest.URL(t), pgtest.EmptyURL(t)
	for name, tt := range map[string]struct {
		env  map[string]string
		code int
		want string // regular expression for all of stdout
	}{
		"fine":            {map[string]string{"DATABASE_URL": migrated}, 0, `^warn .*TARGET_ALLOW_HOSTS\?\nok +settings .*\nok +database +PostgreSQL .*\n(warn +database +synchronous_commit.*\n)?ok +rights .*\nok +schema +version \d+ .*nothing to migrate\n$`},
		"empty":           {map[string]string{"DATABASE_URL": empty}, 0, `ok +schema +version 0 .*the next start does\n$`},
		"not migrated":    {map[string]string{"DATABASE_URL": empty, "MIGRATE_ON_START": "false"}, 1, `FAIL +schema .*orchestrator migrate"\n$`},
		"no database":     {map[string]string{"DATABASE_URL": "postgres://u:hunter2@127.0.0.1:1/x"}, 1, `ok +settings .*\nFAIL +database .*connection refused[^\n]*\n$`},
		"wrong settings":  {map[string]string{"DATABASE_URL": migrated, "PORT": "x", "AUTH": ""}, 1, `FAIL +settings +PORT must be a whole number[^\n]*\n$`},
		"no database URL": {map[string]string{"DATABASE_URL": "", "AUTH": "", "TARGET_ALLOW_HOSTS": "http://x"}, 1, `FAIL +settings +DATABASE_URL is not set[^\n]*\nFAIL +settings +TARGET_ALLOW_HOSTS: [^\n]*\nFAIL +settings +AUTH is not set[^\n]*\n$`},
		"tokens":          {map[string]string{"DATABASE_URL": migrated, "AUTH": "jwt,api_key", "API_KEYS": "a:read:" + strings.Repeat("0", 64), "AUTH_SECRET": "hunter2-of-32-bytes-or-more-here", "AUTH_ROLES": "admin:read", "JWT_TARGET_HOSTS": ".melodia.app"}, 0, `^warn .*TARGET_ALLOW_HOSTS\?\nok +settings +valid; AUTH is jwt,api_key\nok +database`},
		"idle settings": {map[string]string{
			"DATABASE_URL": migrated, "API_KEYS": "hunter2", "OIDC_AUDIENCE": "hunter2", "OIDC_ALLOW": "hunter2", "AUTH_ROLES": "hunter2", "AUTH_AUDIENCE": "hunter2",
			"AUTH_JWKS_URL": "hunter2", "AUTH_SECRET": "hunter2", "JWT_ROLES": "hunter2", "SECRETS_DIR": "hunter2",
		}, 0, `(?s)warn +settings +API_KEYS changes nothing: AUTH does not name api_key\n.* OIDC_AUDIENCE .* OIDC_ALLOW .* AUTH_ROLES .* AUTH_AUDIENCE .* AUTH_JWKS_URL .* AUTH_SECRET changes nothing: AUTH does not name jwt, and JWT_TARGET_HOSTS is not set\nwarn +settings +JWT_ROLES changes nothing: JWT_TARGET_HOSTS is not set\nwarn +settings +SECRETS_DIR changes nothing: SECRET_HOSTS is not set\nok +settings`},
		"a weak secret": {map[string]string{"DATABASE_URL": migrated, "AUTH_SECRET": "hunter2", "JWT_TARGET_HOSTS": ".melodia.app"}, 0, `warn +settings +AUTH_SECRET has fewer than 32 bytes`},
		"no fit":        {map[string]string{"DATABASE_URL": migrated, "AUTH": "jwt", "AUTH_SECRET": "hunter2", "AUTH_ALGORITHM": "HS256", "AUTH_JWKS_URL": "https://id.example/hunter2", "JWT_TARGET_HOSTS": "x:1", "JWT_ROLES": ""}, 1, `\?\nFAIL +settings +JWT_TARGET_HOSTS: entry 1[^\n]*\nFAIL +settings +JWT_ROLES must name a role[^\n]*\nFAIL +settings +AUTH_JWKS_URL has public keys[^\n]*\nFAIL +settings +AUTH_ROLES is not set`},
		"no caller":     {map[string]string{"DATABASE_URL": migrated, "AUTH": ""}, 1, `FAIL +settings +AUTH is not set.*\nok +database`},
	} {
		t.Run(name, func(t *testing.T) {
			for key, value := range tt.env {
				t.Setenv(key, value)
			}
			var stdout, stderr bytes.Buffer
			if code := run(t.Context(), []string{"check"}, &stdout, &stderr); code != tt.code || !regexp.MustCompile(tt.want).MatchString(stdout.String()) {
				t.Errorf("check: %d\n%s%s\nwant %d and %s", code, stdout.String(), stderr.String(), tt.code, tt.want)
			}
			if strings.Contains(stdout.String()+stderr.String(), "hunter2") {
				t.Errorf("a secret is shown: %s%s", stdout.String(), stderr.String())
			}
		})
	}
}

// The settings' parts of the address lead to the database: with a password of all
// special characters, and through a folder of sockets as Cloud SQL has it.
func TestDatabaseOfParts(t *testing.T) {
	password := ""
	for r := ' '; r < 0x7f; r++ {
		password += string(r)
	}
	password += "ñ☃"
	admin, err := pgx.ParseConfig(pgtest.URL(t))
	if err != nil {
		t.Fatal(err)
	}
	conn, err := pgx.ConnectConfig(t.Context(), admin)
	if err != nil {
		t.Fatal(err)
	}
	role := admin.Database + `_d'o"e`
	quoted := pgx.Identifier{role}.Sanitize()
	exec := func(sql string) {
		t.Helper()
		if _, err := conn.Exec(t.Context(), sql, pgx.QueryExecModeSimpleProtocol); err != nil {
			t.Errorf("%s: %v", sql, err)
		}
	}
	exec("CREATE ROLE " + quoted + " LOGIN PASSWORD '" + strings.ReplaceAll(password, "'", "''") + "'")
	exec("GRANT ALL ON ALL TABLES IN SCHEMA public TO " + quoted)
	t.Cleanup(func() {
		ctx := context.WithoutCancel(t.Context())
		for _, sql := range []string{"DROP OWNED BY " + quoted, "DROP ROLE " + quoted} {
			if _, err := conn.Exec(ctx, sql, pgx.QueryExecModeSimpleProtocol); err != nil {
				t.Errorf("%s: %v", sql, err)
			}
		}
		_ = conn.Close(ctx)
	})

	t.Setenv("AUTH", "none")
	t.Setenv("DATABASE_NAME", admin.Database)
	t.Setenv("DATABASE_USER", role)
	t.Setenv("DATABASE_PASSWORD", password)
	for name, address := range map[string]struct{ host, port string }{
		"a host":   {admin.Host, strconv.Itoa(int(admin.Port))},
		"a folder": {sockets(t, net.JoinHostPort(admin.Host, strconv.Itoa(int(admin.Port)))), ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv("DATABASE_HOST", address.host)
			if address.port != "" {
				t.Setenv("DATABASE_PORT", address.port)
			}
			for _, command := range []string{"check", "migrate"} {
				var out bytes.Buffer
				if code := run(t.Context(), []string{command}, &out, &out); code != 0 {
					t.Errorf("%s: %d\n%s", command, code, out.String())
				}
				if command == "check" && !strings.Contains(out.String(), "database "+strconv.Quote(admin.Database)+" as role "+strconv.Quote(role)) {
					t.Errorf("check looked at another database:\n%s", out.String())
				}
			}
		})
	}
	t.Run("a wrong password", func(t *testing.T) {
		t.Setenv("DATABASE_HOST", admin.Host)
		t.Setenv("DATABASE_PORT", strconv.Itoa(int(admin.Port)))
		t.Setenv("DATABASE_PASSWORD", "hunter2")
		var out bytes.Buffer
		if code := run(t.Context(), []string{"check"}, &out, &out); code != 1 || !strings.Contains(out.String(), "password authentication failed") || strings.Contains(out.String(), "hunter2") {
			t.Errorf("check: %d\n%s", code, out.String())
		}
	})
}

// sockets returns a folder like Cloud SQL's, whose socket leads to a server.
func sockets(t *testing.T, server string) (folder string) {
	t.Helper()
	short, err := os.MkdirTemp("", "") //nolint:usetesting // the path of a socket has at most 107 bytes, and t.TempDir is long
	if err != nil {
		t.Fatal(err)
	}
	folder = filepath.Join(short, "melodia:europe-west1:db")
	if err := os.Mkdir(folder, 0o700); err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("unix", filepath.Join(folder, ".s.PGSQL.5432"))
	if err != nil {
		t.Fatal(err)
	}
	var copies sync.WaitGroup
	copies.Go(func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			upstream, err := net.Dial("tcp", server)
			if err != nil {
				t.Error(err)
				_ = client.Close()
				continue
			}
			for _, way := range [][2]net.Conn{{client, upstream}, {upstream, client}} {
				copies.Go(func() {
					_, _ = io.Copy(way[0], way[1]) // ends with the connection
					_ = way[0].Close()
				})
			}
		}
	})
	t.Cleanup(func() {
		_ = listener.Close()
		copies.Wait()
		_ = os.RemoveAll(short)
	})
	return folder
}
