// Package migrations holds the schema and brings a database up to it.
//
// During a rolling deploy the version before works on the migrated database, and
// so do its instances that start meanwhile. So a migration only expands: new
// tables, columns that are nullable or have a default, indexes that are made
// CONCURRENTLY, wider checks. A constraint on an old table is added NOT VALID
// and validated later. A transaction alters one old table, once: it must not
// wait, or read a whole table, while it holds a lock that all others wait for. It
// begins with SET LOCAL lock_timeout = '1s': while it queues for its lock, every
// statement on that table queues behind it. [Up] tries it again.
//
// What nothing needs any more is removed by a later release, by a migration that
// says so: "-- contract: <what needs it no more> since <version>". A migration
// that was released is never changed. The test of this package holds these rules.
package migrations

import (
	"context"
	"crypto/rand"
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/pressly/goose/v3"
)

//go:embed *.sql
var files embed.FS

// lockKey is the key of the advisory lock. It is the service's own choice and
// must stay the same over all versions.
const lockKey = 0x6f726368 // "orch"

// Observer hears how migrations get on. Each function may be nil, and must not block.
type Observer struct {
	// Waiting is told once a second what keeps the migrations, and "" when nothing
	// does any more. It is not called for migrations that take less than half a second.
	Waiting func(reason string)
	// Rebuilt is told the name of an index that was found invalid and made anew.
	Rebuilt func(index string)
}

// Up applies the migrations that the database lacks and returns how many those
// were. Instances that start together wait for each other. It may be called on
// a database that a newer version has migrated already.
//
// An index that was left invalid, because making it CONCURRENTLY was broken off, is
// made anew. Where nothing is to be done, Up only reads: a role without the rights
// to migrate can call it. Where something is, and the role may not, the error is a
// [*RightsError].
//
// Up has no time limit but ctx. When that ends, its statements are cancelled.
func Up(ctx context.Context, config *pgx.ConnConfig, observer Observer) (applied int, err error) {
	name := namePrefix + rand.Text()[:6]
	db, err := connect(ctx, config, name)
	if err != nil {
		return 0, fmt.Errorf("connect for migrations: %w", err)
	}
	defer func() { _ = db.Close() }()
	provider, err := goose.NewProvider(goose.DialectPostgres, db, files,
		goose.WithSlog(slog.New(slog.DiscardHandler)), goose.WithDisableGlobalRegistry(true))
	if err != nil {
		return 0, fmt.Errorf("read migrations: %w", err)
	}
	if needed, err := isNeeded(ctx, db, provider); err != nil || !needed {
		return 0, err
	}
	watching := watch(ctx, db, observer.Waiting)
	defer watching.stop()
	unlock, err := lock(ctx, db)
	if err != nil {
		return 0, err
	}
	defer unlock()
	defer func() {
		if ctx.Err() != nil {
			cancelStatements(context.WithoutCancel(ctx), db, name)
		}
	}()
	if err := rebuildInvalid(ctx, db, observer.Rebuilt); err != nil {
		return 0, fmt.Errorf("make invalid indexes anew: %w", err)
	}
	for {
		results, err := provider.Up(ctx)
		applied += len(results)
		var partial *goose.PartialError
		if errors.As(err, &partial) {
			applied += len(partial.Applied)
		}
		if err == nil {
			return applied, nil
		}
		if !isLockTimeout(err) {
			return applied, fmt.Errorf("apply migrations: %w", err)
		}
		// It made way for those that queued behind it.
		select {
		case <-ctx.Done():
			return applied, fmt.Errorf("apply migrations: %w", context.Cause(ctx))
		case <-time.After(lockPause):
		}
	}
}

// Versions returns those of all migrations, in their order.
func Versions() ([]int64, error) {
	names, err := fs.Glob(files, "*.sql")
	if err != nil {
		return nil, fmt.Errorf("list migrations: %w", err)
	}
	versions := make([]int64, len(names))
	for i, name := range names {
		if versions[i], err = goose.NumericComponent(name); err != nil {
			return nil, fmt.Errorf("read the version of migration %s: %w", name, err)
		}
	}
	return versions, nil
}

const (
	// namePrefix begins the application_name of connections that migrate.
	namePrefix = "orchestrator migrations "
	// lockPause is how long a migration that did not get its lock stays away.
	lockPause = 4 * time.Second
)

// connect opens a pool whose connections wait as long as it takes, whatever the
// role's or the database's defaults are. A pooler that refuses these settings
// gets none.
func connect(ctx context.Context, config *pgx.ConnConfig, name string) (*sql.DB, error) {
	config = config.Copy()
	// Each migration is parsed once: nothing is gained by preparing it, and a
	// pooler in transaction mode would be confused by it.
	config.DefaultQueryExecMode = pgx.QueryExecModeExec
	config.RuntimeParams["application_name"] = name
	pooled := config.Copy()
	for setting, value := range map[string]string{
		"default_transaction_isolation":       "read committed",
		"statement_timeout":                   "0",
		"lock_timeout":                        "0",
		"idle_in_transaction_session_timeout": "0",
	} {
		config.RuntimeParams[setting] = value
	}
	db := stdlib.OpenDB(*config)
	err := db.PingContext(ctx)
	if err != nil && strings.Contains(err.Error(), "unsupported startup parameter") {
		_ = db.Close()
		db = stdlib.OpenDB(*pooled)
		err = db.PingContext(ctx)
	}
	if err != nil {
		_ = db.Close()
		return nil, err
	}
	return db, nil
}

// isNeeded reports whether there is something to do, and returns a [*RightsError]
// where the role may not do it.
func isNeeded(ctx context.Context, db *sql.DB, provider *goose.Provider) (bool, error) {
	// To look for what is pending, goose would make its table.
	var known bool
	if err := db.QueryRowContext(ctx, "SELECT to_regclass('"+goose.DefaultTablename+"') IS NOT NULL").Scan(&known); err != nil {
		return false, fmt.Errorf("look for migrations that were applied: %w", err)
	}
	if !known {
		return true, checkRights(ctx, db)
	}
	pending, err := provider.HasPending(ctx)
	if err != nil {
		return false, fmt.Errorf("look for migrations to apply: %w", err)
	}
	if pending {
		return true, checkRights(ctx, db)
	}
	invalid, err := findInvalid(ctx, db)
	if err != nil {
		return false, fmt.Errorf("look for invalid indexes: %w", err)
	}
	return len(invalid) > 0, nil
}

func isLockTimeout(err error) bool {
	var pgErr *pgconn.PgError
	return errors.As(err, &pgErr) && pgErr.Code == "55P03"
}

// cancelStatements ends what the server is still at for connections of this name:
// it does not notice that a client is gone while it waits for a lock.
func cancelStatements(ctx context.Context, db *sql.DB, name string) {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	_, _ = db.ExecContext(ctx, `SELECT pg_cancel_backend(pid) FROM pg_stat_activity
		WHERE application_name = $1 AND state = 'active' AND pid <> pg_backend_pid()`, name) // we are leaving anyway
}

// lockInterval is how often the advisory lock is asked for.
const lockInterval = 100 * time.Millisecond

// lock waits for the advisory lock. An instance that waits holds no connection: behind a
// pooler those that wait would leave none for the one that migrates.
func lock(ctx context.Context, db *sql.DB) (unlock func(), err error) {
	for {
		unlock, err := tryLock(ctx, db)
		if unlock != nil || err != nil {
			return unlock, err
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for the migrations' lock: %w", context.Cause(ctx))
		case <-time.After(lockInterval):
		}
	}
}

// tryLock takes the advisory lock inside a transaction of its own: unlike a
// session's lock it works behind a pooler, and it ends with the connection.
// unlock is nil when another instance holds the lock.
func tryLock(ctx context.Context, db *sql.DB) (unlock func(), err error) {
	// With any other isolation a transaction keeps its first snapshot, and an index
	// that is made CONCURRENTLY waits for the end of that.
	tx, err := db.BeginTx(ctx, &sql.TxOptions{Isolation: sql.LevelReadCommitted})
	if err != nil {
		return nil, fmt.Errorf("connect for migrations: %w", err)
	}
	var locked bool
	err = tx.QueryRowContext(ctx, "SELECT pg_try_advisory_xact_lock($1)", lockKey).Scan(&locked)
	if err == nil {
		// The transaction idles while the migrations run on another connection. This
		// comes last: a SELECT keeps its snapshot until the next statement, and an
		// index that is made CONCURRENTLY would wait for the end of that.
		_, err = tx.ExecContext(ctx, "SET LOCAL idle_in_transaction_session_timeout = 0")
	}
	if err != nil {
		err = fmt.Errorf("take the migrations' lock: %w", err)
	}
	if err != nil || !locked {
		_ = tx.Rollback()
		return nil, err
	}
	return func() { _ = tx.Rollback() }, nil
}
