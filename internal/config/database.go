package config

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
)

// databaseParts are the settings that name a database together, instead of DATABASE_URL.
// DATABASE_PORT says more of it, and names none alone.
var databaseParts = []string{"DATABASE_HOST", "DATABASE_NAME", "DATABASE_USER", "DATABASE_PASSWORD"}

// defaultDatabasePort is PostgreSQL's.
const defaultDatabasePort = 5432

// NamesDatabase reports whether the environment names a database, rightly or not.
func NamesDatabase() bool { return os.Getenv("DATABASE_URL") != "" || len(setParts()) > 0 }

// setParts returns those of databaseParts that are set and not empty.
func setParts() []string {
	return slices.DeleteFunc(slices.Clone(databaseParts), func(name string) bool { return os.Getenv(name) == "" })
}

// joinDatabase sets DatabaseURL where its parts are set instead.
func (c *Config) joinDatabase() (errs []error) {
	parts := setParts()
	if c.DatabaseURL != "" {
		if c.DatabasePort != 0 && c.DatabasePort != defaultDatabasePort {
			parts = append(parts, "DATABASE_PORT")
		}
		if len(parts) > 0 {
			errs = append(errs, fmt.Errorf("DATABASE_URL must not be set together with %s: the two may name different databases, so remove one of them", strings.Join(parts, ", ")))
		}
		return errs
	}
	if len(parts) == 0 {
		return nil
	}
	for _, name := range databaseParts[:3] { // a password is not always needed
		if !slices.Contains(parts, name) {
			errs = append(errs, fmt.Errorf("%s must be set, since %s is", name, parts[0]))
		}
	}
	c.DatabaseURL = keywords("host", c.DatabaseHost, "port", strconv.Itoa(c.DatabasePort), "user", c.DatabaseUser, "password", c.DatabasePassword, "dbname", c.DatabaseName)
	return errs
}

// keywords writes names and their values as a connection string of libpq in its
// keyword/value form (https://www.postgresql.org/docs/17/libpq-connect.html#LIBPQ-CONNSTRING),
// which holds any value as it is, and a folder as the host.
func keywords(namesAndValues ...string) string {
	escape := strings.NewReplacer(`\`, `\\`, `'`, `\'`)
	var b strings.Builder
	for pair := range slices.Chunk(namesAndValues, 2) {
		fmt.Fprintf(&b, "%s='%s' ", pair[0], escape.Replace(pair[1]))
	}
	return b.String()
}
