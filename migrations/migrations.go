// Package migrations holds the schema and brings a database up to it.
//
// During a rolling deploy the old and the new version work on one database,
// so a migration only expands: new tables, new columns with defaults, new
// indexes. What the old version still reads is dropped one release later.
package migrations

import (
	"context"
	"database/sql"
	"embed"
	"fmt"
	"log/slog"

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

// lock takes the advisory lock inside a transaction of its own: unlike a
// session's lock it works behind a pooler, and it ends with the connection.
func lock(ctx context.Context, db *sql.DB) (unlock func(), err error) {
	tx, err := db.BeginTx(ctx, nil)
	if err != nil {
		return nil, fmt.Errorf("connect for migrations: %w", err)
	}
	unlock = func() { _ = tx.Rollback() }
	for _, query := range []string{
		// The transaction idles while the migrations run on another connection.
		"SET LOCAL idle_in_transaction_session_timeout = 0",
		"SET LOCAL statement_timeout = 0",
		fmt.Sprintf("SELECT pg_advisory_xact_lock(%d)", lockKey),
	} {
		if _, err := tx.ExecContext(ctx, query); err != nil {
			unlock()
			return nil, fmt.Errorf("take the migrations' lock: %w", err)
		}
	}
	return unlock, nil
}
