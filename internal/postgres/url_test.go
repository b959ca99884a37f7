package postgres

import (
	"fmt"
	"net"
	"strings"
	"testing"
)

// A URL of SQLAlchemy means the database that it names, whatever its driver.
func TestDatabaseURL(t *testing.T) {
	const password = `p%40:s%2Fw%3Fo%23r%25d+%20$&'"\` // @:/?#% and a space
	for url, want := range map[string]string{
		"postgres://u:pw@db.example:6432/d":                                 "db.example 6432 u pw d tls optional",
		"postgresql://u:pw@db.example/d?sslmode=disable":                    "db.example 5432 u pw d plain",
		"postgresql+psycopg://u:pw@db.example:6432/d":                       "db.example 6432 u pw d tls optional",
		"postgresql+psycopg://u:pw@db.example:6432/d?sslmode=disable":       "db.example 6432 u pw d plain",
		"postgresql+psycopg2://u:pw@db.example/d?sslmode=disable":           "db.example 5432 u pw d plain",
		"postgresql+asyncpg://u:pw@db.example/d?ssl=disable":                "db.example 5432 u pw d plain",
		"postgresql+asyncpg://u:pw@db.example/d?host=h.example&ssl=require": "h.example 5432 u pw d tls",
		"postgresql+psycopg_async://u:pw@db.example/d?sslmode=disable":      "db.example 5432 u pw d plain",
		"postgres+pg8000://u:pw@db.example/d?sslmode=disable":               "db.example 5432 u pw d plain",
		"PostgreSQL+Psycopg://u:pw@db.example/d?sslmode=disable":            "db.example 5432 u pw d plain",
		"postgresql+psycopg://u:" + password + "@db.example/d":              `db.example 5432 u p@:s/w?o#r%d+ $&'"\ d tls optional`,
		"postgresql+psycopg2://u:pw@/d?host=/cloudsql/p:europe-west1:i":     "/cloudsql/p:europe-west1:i 5432 u pw d plain",
		"postgresql+psycopg://u:p#?w@db.example/d?sslmode=disable":          "db.example 5432 u p#?w d plain", // SQLAlchemy takes them as they are too
		"host=db.example user=u password='p w' dbname=d sslmode=disable":    "db.example 5432 u p w d plain",
		" host = db.example user=u password=ssl=x dbname=d":                 "db.example 5432 u ssl=x d tls optional",
	} {
		config, err := parse(Options{URL: url})
		if err != nil {
			t.Errorf("%s: %v", url, err)
			continue
		}
		c := config.ConnConfig
		tls := "plain"
		if c.TLSConfig != nil {
			tls = "tls"
			if len(c.Fallbacks) > 0 {
				tls = "tls optional"
			}
		}
		if got := fmt.Sprint(c.Host, " ", c.Port, " ", c.User, " ", c.Password, " ", c.Database, " ", tls); got != want {
			t.Errorf("%s\ngot  %s\nwant %s", url, got, want)
		}
		if len(c.RuntimeParams) != 1 || c.RuntimeParams["application_name"] == "" {
			t.Errorf("%s: the server would be sent %v, want its application_name alone", url, c.RuntimeParams)
		}
	}
}

// What names no database of PostgreSQL is refused, and not read as a list of
// keywords, which would lead to this machine.
func TestDatabaseURLOfNoSort(t *testing.T) {
	const marker = "s3cr3t"
	for _, url := range []string{
		"mysql://u:" + marker + "@h/d?sslmode=disable", "postgresql+://u:" + marker + "@h/d?sslmode=disable", "postgresql+psycopg+x://u:" + marker + "@h/d?a=b",
		"postgresqlx://u:" + marker + "@h/d?a=b", "postgres:/u:" + marker + "@h/d?a=b", "//u:" + marker + "@h/d?a=b", marker, "h/d?password=" + marker,
		`"postgres://u:` + marker + `@h/d?sslmode=disable"`, " postgres://u:" + marker + "@h/d?sslmode=disable", "DATABASE_URL", "=" + marker,
		"postgresql+psycopg://u:" + marker + "@h:port/d", "postgres://u:x@" + marker + "@h/d", "postgres://u:x@x/" + marker + "@h/d?a=b", "postgres://u:x?@" + marker + "@h/d", "postgresql+psycopg://u:/" + marker + "@h/d", "postgresql+asyncpg://u:" + marker + "@h/d?ssl=" + marker,
	} {
		config, err := parse(Options{URL: url})
		if err == nil {
			t.Errorf("%s leads to %s, want an error", url, net.JoinHostPort(config.ConnConfig.Host, fmt.Sprint(config.ConnConfig.Port)))
		} else if strings.Contains(err.Error(), marker) {
			t.Errorf("%s: the error holds the password: %v", url, err)
		}
	}
}
