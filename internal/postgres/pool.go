package postgres

import (
	"context"
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// pool is a pool of connections whose statements run READ COMMITTED, as all of them
// expect: with more isolation, two that write to the same row would fail.
type pool struct {
	*pgxpool.Pool
	// pooled is whether a pooler stands between.
	pooled bool
	// wrapped is whether each statement needs a transaction to say so: behind a
	// pooler, where the default is another.
	wrapped bool
}

// sessionSettings are the isolation that the statements expect, whatever the default
// of the role or the database is; the server's own deadlines, in case ours cannot
// reach it; and no statement reads a whole table: a plan that was made while tasks
// was empty, when that looked cheap, would be kept for the whole backlog. The cost
// that forbids it would set off the compiler for statements that have no index
// to go by (reap), which costs 100 ms and more each time. No value makes
// another plan better, so none is planned twice.
var sessionSettings = map[string]string{
	"default_transaction_isolation":       readCommitted,
	"statement_timeout":                   "30s",
	"lock_timeout":                        "0",
	"idle_in_transaction_session_timeout": "30s",
	"enable_seqscan":                      "off",
	"jit":                                 "off",
	"plan_cache_mode":                     "force_generic_plan",
}

const readCommitted = "read committed"

// connect opens the pool and checks that the database answers. A pooler that
// does not know a startup parameter says so at once, and another ignores it; then
// the settings are left out, and statements are not prepared, since it may give the
// next one to another connection. (They are planned anew each time, so no plan gets old.)
func connect(ctx context.Context, config *pgxpool.Config) (*pool, error) {
	direct := config.Copy()
	for name, value := range sessionSettings {
		direct.ConnConfig.RuntimeParams[name] = value
	}
	p, settings, err := open(ctx, direct)
	switch {
	case err != nil && !strings.Contains(err.Error(), "unsupported startup parameter"):
		return nil, err
	case err == nil && settings.isolation == readCommitted && settings.plans == sessionSettings["plan_cache_mode"]:
		return &pool{Pool: p}, nil
	case err == nil:
		p.Close()
	}
	config.ConnConfig.DefaultQueryExecMode = pgx.QueryExecModeCacheDescribe
	p, settings, err = open(ctx, config)
	if err != nil {
		return nil, err
	}
	return &pool{Pool: p, pooled: true, wrapped: settings.isolation != readCommitted}, nil
}

// settings are those of a connection.
type settings struct{ isolation, plans string }

const settingsSQL = `-- name: settings of the session
SELECT current_setting('default_transaction_isolation'), current_setting('plan_cache_mode')`

func open(ctx context.Context, config *pgxpool.Config) (p *pgxpool.Pool, s settings, err error) {
	p, err = pgxpool.NewWithConfig(ctx, config)
	if err != nil {
		return nil, s, fmt.Errorf("set up the connection pool: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	// It is not prepared: where a pooler ignores the settings, that is not known yet.
	if err := p.QueryRow(ctx, settingsSQL, pgx.QueryExecModeExec).Scan(&s.isolation, &s.plans); err != nil {
		p.Close()
		return nil, s, fmt.Errorf("connect to the database: %w", classify(err))
	}
	return p, s, nil
}

// alone returns a pool of one connection to the same database.
func (p *pool) alone(ctx context.Context) (*pool, error) {
	config := p.Config()
	config.MaxConns = 1
	one, err := pgxpool.NewWithConfig(ctx, config)
	if err != nil {
		return nil, err
	}
	return &pool{Pool: one, pooled: p.pooled, wrapped: p.wrapped}, nil
}

// Exec is that of [pgxpool.Pool].
func (p *pool) Exec(ctx context.Context, sql string, args ...any) (tag pgconn.CommandTag, err error) {
	if !p.wrapped {
		return p.Pool.Exec(ctx, sql, args...)
	}
	err = pgx.BeginTxFunc(ctx, p.Pool, pgx.TxOptions{IsoLevel: pgx.ReadCommitted}, func(tx pgx.Tx) error {
		tag, err = tx.Exec(ctx, sql, args...)
		return err
	})
	return tag, err
}

// Query is that of [pgxpool.Pool].
func (p *pool) Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error) {
	if !p.wrapped {
		return p.Pool.Query(ctx, sql, args...)
	}
	tx, err := p.BeginTx(ctx, pgx.TxOptions{IsoLevel: pgx.ReadCommitted})
	if err != nil {
		return nil, err
	}
	rows, err := tx.Query(ctx, sql, args...)
	if err != nil {
		_ = tx.Rollback(ctx) // the other error says why
		return nil, err
	}
	return &rowsInTx{Rows: rows, end: func(failure error) error {
		if failure != nil {
			_ = tx.Rollback(ctx) // the failure says why
			return failure
		}
		return tx.Commit(ctx)
	}}, nil
}

// QueryRow is that of [pgxpool.Pool].
func (p *pool) QueryRow(ctx context.Context, sql string, args ...any) pgx.Row {
	if !p.wrapped {
		return p.Pool.QueryRow(ctx, sql, args...)
	}
	rows, err := p.Query(ctx, sql, args...)
	return &rowInTx{rows, err}
}

// rowsInTx end their transaction when they are read or closed.
type rowsInTx struct {
	pgx.Rows
	end   func(failure error) error
	ended bool
	err   error
}

// Next is part of [pgx.Rows].
func (r *rowsInTx) Next() bool {
	if r.Rows.Next() {
		return true
	}
	r.Close()
	return false
}

// Close is part of [pgx.Rows].
func (r *rowsInTx) Close() {
	r.Rows.Close()
	if !r.ended {
		r.ended = true
		r.err = r.end(r.Rows.Err())
	}
}

// Err is part of [pgx.Rows]. It holds the commit's error too.
func (r *rowsInTx) Err() error {
	if r.ended {
		return r.err
	}
	return r.Rows.Err()
}

// rowInTx is the only row of rowsInTx.
type rowInTx struct {
	rows pgx.Rows
	err  error
}

// Scan is part of [pgx.Row].
func (r *rowInTx) Scan(dest ...any) error {
	if r.err != nil {
		return r.err
	}
	defer r.rows.Close()
	if !r.rows.Next() {
		if err := r.rows.Err(); err != nil {
			return err
		}
		return pgx.ErrNoRows
	}
	if err := r.rows.Scan(dest...); err != nil {
		return err
	}
	r.rows.Close()
	return r.rows.Err()
}
