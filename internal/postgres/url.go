package postgres

import (
	"errors"
	"regexp"
	"strings"
)

var (
	// urlStart is the scheme of a URL. SQLAlchemy's has the driver's name behind a plus sign
	// (https://docs.sqlalchemy.org/en/20/core/engines.html#database-urls).
	urlStart = regexp.MustCompile(`^(?i:postgres|postgresql)(?:\+(\w+))?://`)
	// keywordStart is how libpq's other form of a connection string begins: host=…
	keywordStart = regexp.MustCompile(`^\s*\w+\s*=`)
	// asyncpgSSL is what asyncpg calls sslmode, with the same values
	// (https://magicstack.github.io/asyncpg/current/api/index.html#connection).
	asyncpgSSL = regexp.MustCompile(`([?&])ssl=`)
)

// errBadURL holds nothing of the setting, which has a password.
var errBadURL = errors.New("DATABASE_URL is not valid: it must be like postgres://user:password@host:5432/database, with / @ and % in the password percent-encoded (%2F %40 %25), or DATABASE_USER, DATABASE_PASSWORD, DATABASE_HOST and DATABASE_NAME instead, which are taken as they are")

// connString returns what pgx understands of DATABASE_URL. pgx itself takes a string that
// does not begin with postgres:// or postgresql:// for a list of keywords, so of
// postgresql+psycopg://u@h/d?sslmode=disable it would read one unknown keyword, and
// connect to this machine.
func connString(databaseURL string) (string, error) {
	start := urlStart.FindStringSubmatch(databaseURL)
	if start == nil {
		if keywordStart.MatchString(databaseURL) {
			return databaseURL, nil
		}
		return "", errBadURL
	}
	rest, driver := databaseURL[len(start[0]):], start[1]
	if driver == "asyncpg" {
		rest = asyncpgSSL.ReplaceAllString(rest, "${1}sslmode=")
	}
	if hasStrayAt(rest) {
		return "", errBadURL
	}
	return "postgres://" + rest, nil
}

// hasStrayAt reports whether an @ stands in the host or the database of a URL, without its
// scheme: it was meant to end a password that has a / or @ itself, of which pgx
// would take a part for the name of a host or database, and show it in its errors.
func hasStrayAt(rest string) bool {
	if at := strings.IndexByte(rest, '@'); at >= 0 && !strings.Contains(rest[:at], "/") {
		rest = rest[at+1:]
	}
	address, _, _ := strings.Cut(rest, "?")
	return strings.Contains(address, "@")
}
