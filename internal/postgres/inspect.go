package postgres

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/melodia/orchestrator/internal/task"
	"github.com/melodia/orchestrator/migrations"
)

// Inspection is what a database says of itself, and of the role that asks.
type Inspection struct {
	Server, Database, Role string
	// Schema is the one that new tables are made in, empty where search_path (Path)
	// names none that the role may use.
	Schema, Path string
	Encoding     string
	// Isolation and SynchronousCommit are the role's defaults.
	Isolation, SynchronousCommit string
	// InRecovery is whether it is a standby. ReadOnly is whether it takes no writes, for
	// that or any other reason.
	InRecovery, ReadOnly bool
	// Pooled is whether a pooler stands between.
	Pooled bool
	// Lacks are the rights that the service needs and the role has not, as in GRANT:
	// "INSERT, DELETE ON tasks".
	Lacks []string
	// Elsewhere is the schema in which the tables are, where the search_path does not
	// lead to it.
	Elsewhere string
	// Version is the newest migration that was applied, 0 where none was. Pending is how
	// many this version of the service knows that were not.
	Version int64
	Pending int
	// Owner is whether the role may migrate, and make and drop history partitions.
	Owner bool
	// Invalid are indexes that PostgreSQL does not use, because making them was broken off.
	Invalid []string
}

// Inspect connects, looks, and changes nothing. Where it cannot connect, the error wraps
// [task.ErrUnavailable]. No error holds the password.
func Inspect(ctx context.Context, databaseURL string) (*Inspection, error) {
	config, err := parse(Options{URL: databaseURL})
	if err != nil {
		return nil, err
	}
	pool, err := connect(ctx, config)
	if err != nil {
		return nil, err
	}
	defer pool.Close()
	return inspect(ctx, pool)
}

// LacksError says that the database's role lacks rights without which the service
// cannot work.
type LacksError struct {
	Role  string
	Lacks []string
}

// Error is one line.
func (e *LacksError) Error() string {
	return fmt.Sprintf("the database role %q lacks rights: %s (docs/operations.md lists all that it needs)", e.Role, strings.Join(e.Lacks, "; "))
}

// errPathMissesTables says so of Inspection.Elsewhere.
func errPathMissesTables(i *Inspection) error {
	return fmt.Errorf("the tables are in schema %[1]s, which the search_path of the role %[2]q (%[3]s) does not lead to: ALTER ROLE %[4]s SET search_path = %[1]s",
		i.Elsewhere, i.Role, i.Path, pgx.Identifier{i.Role}.Sanitize())
}

// Err returns why the service cannot work with the database as it is: a
// [*LacksError], or one that wraps [task.ErrUnavailable] where migrations are missing.
func (i *Inspection) Err() error {
	switch {
	case i.Elsewhere != "":
		return errPathMissesTables(i)
	case len(i.Lacks) > 0:
		return &LacksError{Role: i.Role, Lacks: i.Lacks}
	case i.Pending > 0:
		return fmt.Errorf("%w: the schema is at version %d and lacks %d migrations of this version: run \"orchestrator migrate\", or set MIGRATE_ON_START=true", task.ErrUnavailable, i.Version, i.Pending)
	}
	return nil
}

// checkReady returns why the service cannot work with the database.
func checkReady(ctx context.Context, p *pool) error {
	i, err := inspect(ctx, p)
	if err != nil {
		return err
	}
	return i.Err()
}

// needed are the rights that the service needs, by table.
var needed = map[string][]string{
	"tasks":                {"SELECT", "INSERT", "UPDATE", "DELETE"},
	"task_history":         {"SELECT", "INSERT", "UPDATE", "DELETE"},
	"task_history_default": {"SELECT", "DELETE"},
	"workers":              {"SELECT", "INSERT", "UPDATE", "DELETE"},
	"idempotency_keys":     {"SELECT", "INSERT", "UPDATE", "DELETE"},
	"queues":               {"SELECT", "INSERT", "UPDATE", "DELETE"},
	"queue_keys":           {"SELECT", "INSERT", "UPDATE", "DELETE"},
	"lanes":                {"SELECT", "INSERT", "UPDATE", "DELETE"},
	"hosts":                {"SELECT", "INSERT", "UPDATE", "DELETE"},
	versionTable:           {"SELECT"},
}

// versionTable is goose's record of the migrations that were applied.
const versionTable = "goose_db_version"

// Where a table is in no schema of the search_path, elsewhere is one that has it.
const inspectSQL = `-- name: inspect the database
SELECT current_setting('server_version'), current_database(), current_user,
    coalesce(current_schema(), ''), current_setting('search_path'), current_setting('server_encoding'),
    current_setting('default_transaction_isolation'), current_setting('synchronous_commit'),
    pg_is_in_recovery(), current_setting('transaction_read_only')::bool,
    coalesce((SELECT pg_has_role(relowner, 'USAGE') FROM pg_class WHERE oid = to_regclass('task_history')), true)
        AND coalesce(has_schema_privilege(current_schema(), 'CREATE'), false),
    CASE WHEN to_regclass('tasks') IS NULL THEN coalesce((SELECT n.nspname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE c.relname = 'task_history' AND c.relkind = 'p' LIMIT 1), '') ELSE '' END`

const rightsSQL = `-- name: rights of the role
SELECT n.relation || ':' || n.operation FROM unnest($1::text[], $2::text[]) n (relation, operation)
WHERE NOT has_table_privilege(to_regclass(n.relation), n.operation)`

const schemaRightSQL = `-- name: right to a schema
SELECT has_schema_privilege($1, 'USAGE')`

// The last word on a version counts: migrations can be undone.
const versionsSQL = `-- name: migrations that were applied
SELECT version_id FROM (SELECT DISTINCT ON (version_id) version_id, is_applied FROM goose_db_version ORDER BY version_id, id DESC) v
WHERE is_applied AND version_id > 0`

const invalidSQL = `-- name: indexes that are invalid
SELECT c.relname FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
WHERE NOT i.indisvalid AND c.relnamespace = to_regnamespace(quote_ident(current_schema()))
    AND i.indrelid IN (SELECT oid FROM pg_class WHERE relname ~ '^(tasks|task_history.*|workers|idempotency_keys|queues|queue_keys|lanes|hosts)$')
ORDER BY c.relname`

func inspect(ctx context.Context, p *pool) (*Inspection, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	i := &Inspection{Pooled: p.pooled}
	err := p.QueryRow(ctx, inspectSQL).Scan(&i.Server, &i.Database, &i.Role, &i.Schema, &i.Path, &i.Encoding,
		&i.Isolation, &i.SynchronousCommit, &i.InRecovery, &i.ReadOnly, &i.Owner, &i.Elsewhere)
	if err == nil {
		err = i.lookAtRights(ctx, p)
	}
	if err == nil {
		err = i.lookAtSchema(ctx, p)
	}
	if err != nil {
		return nil, fmt.Errorf("inspect the database: %w", classify(err))
	}
	return i, nil
}

// lookAtRights fills in what the role lacks. Of a table that is not there it lacks nothing.
func (i *Inspection) lookAtRights(ctx context.Context, p *pool) error {
	if i.Elsewhere != "" {
		var usage bool
		if err := p.QueryRow(ctx, schemaRightSQL, i.Elsewhere).Scan(&usage); err != nil {
			return err
		}
		if !usage {
			i.Lacks = append(i.Lacks, "USAGE ON SCHEMA "+i.Elsewhere)
			i.Elsewhere = ""
		}
		return nil
	}
	var relations, operations []string
	for relation, all := range needed {
		for _, operation := range all {
			relations, operations = append(relations, relation), append(operations, operation)
		}
	}
	missing, err := list[string](ctx, p, rightsSQL, relations, operations)
	if err != nil {
		return err
	}
	lacks := map[string][]string{}
	for _, m := range missing {
		relation, operation, _ := strings.Cut(m, ":")
		lacks[relation] = append(lacks[relation], operation)
	}
	for relation, all := range lacks {
		slices.SortFunc(all, func(a, b string) int {
			return slices.Index(needed["tasks"], a) - slices.Index(needed["tasks"], b)
		})
		i.Lacks = append(i.Lacks, strings.Join(all, ", ")+" ON "+relation)
	}
	slices.Sort(i.Lacks)
	return nil
}

// lookAtSchema fills in which migrations were applied, as far as the role may know.
func (i *Inspection) lookAtSchema(ctx context.Context, p *pool) error {
	known, err := migrations.Versions()
	if err != nil {
		return err
	}
	if len(i.Lacks) > 0 || i.Elsewhere != "" {
		return nil
	}
	applied, err := list[int64](ctx, p, versionsSQL)
	if err != nil && !isUndefinedTable(err) {
		return err
	}
	for _, version := range applied {
		i.Version = max(i.Version, version)
	}
	for _, version := range known {
		if !slices.Contains(applied, version) {
			i.Pending++
		}
	}
	i.Invalid, err = list[string](ctx, p, invalidSQL)
	return err
}

func list[T any](ctx context.Context, p *pool, sql string, args ...any) ([]T, error) {
	rows, err := p.Query(ctx, sql, args...)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowTo[T])
}

func isUndefinedTable(err error) bool {
	var pgErr *pgconn.PgError
	return errors.As(err, &pgErr) && pgErr.Code == "42P01"
}
