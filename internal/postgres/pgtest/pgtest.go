// Package pgtest gives each test a PostgreSQL database of its own.
//
// A package's tests share one server: the one at TEST_DATABASE_URL (its user
// must be allowed to create databases), or a private one that is started when
// the first test asks. One database is migrated and becomes the template; each
// test gets a clone of it, which takes some milliseconds.
package pgtest

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/melodia/orchestrator/internal/devdb"
	"github.com/melodia/orchestrator/migrations"
)

// setupTimeout bounds what is done to the server around a test.
const setupTimeout = time.Minute

// server is the one of this test binary.
var server struct {
	once     sync.Once
	err      error
	url      string // of a database to give orders from
	template string
	stop     func() error // nil for a server that was there before
}

// Main runs a package's tests and removes what they used. Call it from
// TestMain: os.Exit(pgtest.Main(m)).
func Main(m *testing.M) int {
	code := m.Run()
	if err := shutdown(); err != nil {
		fmt.Fprintln(os.Stderr, "pgtest:", err)
		code = max(code, 1)
	}
	return code
}

// URL returns the connection URL of a new database with the current schema. It
// is removed when the test ends.
func URL(tb testing.TB) string {
	tb.Helper()
	return create(tb, true)
}

// EmptyURL is [URL] without a schema.
func EmptyURL(tb testing.TB) string {
	tb.Helper()
	return create(tb, false)
}

func create(tb testing.TB, migrated bool) string {
	tb.Helper()
	server.once.Do(func() { server.err = start() })
	if server.err != nil {
		tb.Fatalf("pgtest: %v", server.err)
	}
	name := newName()
	sql := "CREATE DATABASE " + name
	if migrated {
		sql += " TEMPLATE " + server.template
	}
	if err := order(sql); err != nil {
		tb.Fatalf("pgtest: %v", err)
	}
	tb.Cleanup(func() {
		// A test may leave a connection behind that it cut off.
		if err := order("DROP DATABASE " + name + " WITH (FORCE)"); err != nil {
			tb.Errorf("pgtest: %v", err)
		}
	})
	return withDatabase(server.url, name)
}

// start finds or starts the server and makes the template.
func start() error {
	ctx, cancel := context.WithTimeout(context.Background(), setupTimeout)
	defer cancel()
	if server.url = os.Getenv("TEST_DATABASE_URL"); server.url == "" {
		private, err := devdb.Start(ctx, devdb.Options{Temporary: true})
		if err != nil {
			return err
		}
		server.url, server.stop = private.URL("postgres"), private.Stop
	}
	name := newName()
	if err := order("CREATE DATABASE " + name); err != nil {
		return err
	}
	server.template = name
	config, err := pgx.ParseConfig(withDatabase(server.url, name))
	if err != nil {
		return fmt.Errorf("read TEST_DATABASE_URL: %w", err)
	}
	if _, err = migrations.Up(ctx, config, migrations.Observer{}); err != nil {
		return err
	}
	// A template must have no connections, and a pooler keeps them.
	return order("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '" + name + "' AND usename = current_user")
}

func shutdown() error {
	if server.stop != nil {
		return server.stop()
	}
	if server.template != "" {
		return order("DROP DATABASE " + server.template)
	}
	return nil
}

// order runs one statement on a connection of its own.
func order(sql string) error {
	ctx, cancel := context.WithTimeout(context.Background(), setupTimeout)
	defer cancel()
	conn, err := pgx.Connect(ctx, server.url)
	if err != nil {
		return fmt.Errorf("connect to the tests' server: %w", err)
	}
	defer func() { _ = conn.Close(ctx) }()
	if _, err := conn.Exec(ctx, sql, pgx.QueryExecModeSimpleProtocol); err != nil {
		return fmt.Errorf("%s: %w", sql, err)
	}
	return nil
}

func newName() string {
	return "test_" + strings.ReplaceAll(uuid.NewString(), "-", "")
}

// withDatabase returns a connection URL that leads to another database of the same server.
func withDatabase(rawURL, name string) string {
	u, err := url.Parse(rawURL)
	if err != nil {
		return rawURL // connecting will say what is wrong with it
	}
	u.Path = "/" + name
	return u.String()
}
