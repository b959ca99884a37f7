package config

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"
	"pgregory.net/rapid"
)

// Whatever stands in the parts of a database's address comes out as it is.
func TestDatabaseParts(t *testing.T) {
	noNUL := rapid.String().Filter(func(s string) bool { return !strings.Contains(s, "\x00") })
	rapid.Check(t, func(r *rapid.T) {
		host := rapid.SampledFrom([]string{"db", "10.0.0.1", "::1", "/cloudsql/p:europe-west1:i", `/run/it's here\`}).Draw(r, "host")
		user, name := noNUL.Filter(func(s string) bool { return s != "" }), noNUL.Filter(func(s string) bool { return s != "" })
		settings := map[string]string{
			"DATABASE_HOST": host, "DATABASE_USER": user.Draw(r, "user"), "DATABASE_PASSWORD": noNUL.Draw(r, "password"), "DATABASE_NAME": name.Draw(r, "name"), "DATABASE_PORT": "6432",
		}
		setenv(t, settings)
		c, err := Load()
		if err != nil {
			r.Fatal(err)
		}
		got, err := pgx.ParseConfig(c.DatabaseURL)
		if err != nil {
			r.Fatal(err)
		}
		if got.Host != host || got.Port != 6432 || got.User != settings["DATABASE_USER"] || got.Password != settings["DATABASE_PASSWORD"] || got.Database != settings["DATABASE_NAME"] {
			r.Errorf("%q leads to host %q, port %d, user %q, password %q, database %q", settings, got.Host, got.Port, got.User, got.Password, got.Database)
		}
	})
}

func TestDatabasePartsThatDoNotFit(t *testing.T) {
	const both, remove = "DATABASE_URL must not be set together with ", ": the two may name different databases, so remove one of them"
	for name, tt := range map[string]struct {
		settings map[string]string
		want     []string
	}{
		"a URL and a host":          {map[string]string{"DATABASE_URL": "postgres://u:" + marker + "@h/d", "DATABASE_HOST": marker}, []string{both + "DATABASE_HOST" + remove}},
		"a URL and a password":      {map[string]string{"DATABASE_URL": "postgres://u@h/d", "DATABASE_PASSWORD": marker}, []string{both + "DATABASE_PASSWORD" + remove}},
		"a URL and everything":      {map[string]string{"DATABASE_URL": "x", "DATABASE_HOST": "x", "DATABASE_NAME": "x", "DATABASE_USER": "x", "DATABASE_PASSWORD": marker, "DATABASE_PORT": "1"}, []string{both + "DATABASE_HOST, DATABASE_NAME, DATABASE_USER, DATABASE_PASSWORD, DATABASE_PORT" + remove}},
		"a URL and a port":          {map[string]string{"DATABASE_URL": "x", "DATABASE_PORT": "6432"}, []string{both + "DATABASE_PORT" + remove}},
		"a URL and the port":        {map[string]string{"DATABASE_URL": "x", "DATABASE_PORT": "5432", "DATABASE_HOST": ""}, nil},
		"a URL and an unread port":  {map[string]string{"DATABASE_URL": "x", "DATABASE_PORT": marker}, []string{"DATABASE_PORT must be a whole number, like 5432"}},
		"a password alone":          {map[string]string{"DATABASE_PASSWORD": marker}, []string{"DATABASE_HOST must be set, since DATABASE_PASSWORD is", "DATABASE_NAME must be set, since DATABASE_PASSWORD is", "DATABASE_USER must be set, since DATABASE_PASSWORD is"}},
		"no user, and another slip": {map[string]string{"DATABASE_HOST": "x", "DATABASE_NAME": "x", "PORT": "x"}, []string{"PORT must be a whole number, like 8080", "DATABASE_USER must be set, since DATABASE_HOST is"}},
		"no password":               {map[string]string{"DATABASE_HOST": "x", "DATABASE_NAME": "x", "DATABASE_USER": "x"}, nil},
		"a port alone":              {map[string]string{"DATABASE_PORT": "1"}, nil},
		"a port out of range":       {map[string]string{"DATABASE_HOST": "x", "DATABASE_NAME": "x", "DATABASE_USER": "x", "DATABASE_PORT": "0"}, []string{"DATABASE_PORT must be between 1 and 65535"}},
	} {
		t.Run(name, func(t *testing.T) {
			setenv(t, tt.settings)
			var got []string
			if _, err := Load(); err != nil {
				got = strings.Split(err.Error(), "\n")
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}
