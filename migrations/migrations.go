// Package migrations holds the schema and brings a database up to it.
//
// During a rolling deploy the version before works on the migrated database, and
// so do its instances that start meanwhile. So a migration only expands: new
// tables, columns that are nullable or have a default, indexes that are made
// CONCURRENTLY, wider checks. A constraint on an old table is added NOT VALID
// and validated later. A transaction alters one old table, once: it must not
// wait, or read a whole table, while it holds a lock that all others wait for.
//
// What nothing needs any more is removed by a later release, by a migration that
// says so: "-- contract: <what needs it no more> since <version>". A migration
// that was released is never changed. The test of this package holds these rules.
package migrations

import (
	"context"
	"database/sql"
	"embed"
	"fmt"
	"log/slog"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/pressly/goose/v3"
)

//go:embed *.sql
var files embed.FS

// lockKey is the key of the advisory lock. It is the service's own choice and
// must stay the same over all versions.
const lockKey = 0x6f726368 // "orch"

// Up applies the migrations that the database lacks and returns how many those
// were. Instances that start together wait for each other. It may be called on
// a database that a newer version has migrated already.
func Up(ctx context.Context, config *pgx.ConnConfig) (applied int, err error) {
	config = config.Copy()
	// Each migration is parsed once: nothing is gained by preparing it, and a
	// pooler in transaction mode would be confused by it.
	config.DefaultQueryExecMode = pgx.QueryExecModeExec
	db := stdlib.OpenDB(*config)
	defer func() { _ = db.Close() }()

	unlock, err := lock(ctx, db)
	if err != nil {
		return 0, err
	}
	defer unlock()

	provider, err := goose.NewProvider(goose.DialectPostgres, db, files,
		goose.WithSlog(slog.New(slog.DiscardHandler)), goose.WithDisableGlobalRegistry(true))
	if err != nil {
		return 0, fmt.Errorf("read migrations: %w", err)
	}
	results, err := provider.Up(ctx)
	if err != nil {
		return 0, fmt.Errorf("apply migrations: %w", err)
	}
	return len(results), nil
}

// lockInterval is how often the advisory lock is asked for.
const lockInterval = 100 * time.Millisecond

// lock waits for the advisory lock. Whoever waits holds no connection: behind a
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
	tx, err := db.BeginTx(ctx, nil)
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
