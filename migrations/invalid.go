package migrations

import (
	"context"
	"database/sql"
	"fmt"
	"io/fs"
	"regexp"
	"strings"
)

// concurrentIndex matches a statement that makes an index CONCURRENTLY: its name,
// and its table.
var concurrentIndex = regexp.MustCompile(`(?m)^CREATE (?:UNIQUE )?INDEX CONCURRENTLY IF NOT EXISTS (\w+) ON (\w+)\b[^;]*;`)

// concurrentIndexes returns the statements that make indexes CONCURRENTLY, by the
// index.
func concurrentIndexes() (map[string]string, error) {
	names, err := fs.Glob(files, "*.sql")
	if err != nil {
		return nil, err
	}
	statements := map[string]string{}
	for _, name := range names {
		b, err := fs.ReadFile(files, name)
		if err != nil {
			return nil, err
		}
		up, _, _ := strings.Cut(string(b), "-- +goose Down")
		for _, m := range concurrentIndex.FindAllStringSubmatch(up, -1) {
			statements[m[1]] = m[0]
		}
	}
	return statements, nil
}

// invalidIndex is one that PostgreSQL neither uses nor finishes.
type invalidIndex struct {
	name, table string
	// parent is the partitioned index that it is attached to, if it is.
	parent string
	// create is the statement that makes it, empty for what REINDEX CONCURRENTLY
	// leaves when it is broken off (name_ccnew, name_ccold).
	create string
}

// invalidSQL lists those that the role may mend.
const invalidSQL = `-- name: find invalid indexes
SELECT c.relname, t.relname, coalesce(p.relname, '')
FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_class t ON t.oid = i.indrelid
    LEFT JOIN pg_inherits h ON h.inhrelid = c.oid LEFT JOIN pg_class p ON p.oid = h.inhparent
WHERE NOT (i.indisvalid AND i.indisready) AND c.relkind = 'i'
    AND c.relnamespace = to_regnamespace(quote_ident(current_schema()))
    AND regexp_replace(c.relname, '_cc(new|old)[0-9]*$', '') = ANY (string_to_array($1, ' '))
    AND pg_has_role(t.relowner, 'USAGE')
ORDER BY c.relname`

type querier interface {
	QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error)
}

// findInvalid returns the invalid ones among the indexes that migrations make
// CONCURRENTLY: what is left of a statement that was broken off. IF NOT EXISTS takes
// such an index for done.
func findInvalid(ctx context.Context, db querier) (found []invalidIndex, err error) {
	statements, err := concurrentIndexes()
	if err != nil {
		return nil, err
	}
	names := make([]string, 0, len(statements))
	for name := range statements {
		names = append(names, name)
	}
	rows, err := db.QueryContext(ctx, invalidSQL, strings.Join(names, " "))
	if err != nil {
		return nil, err
	}
	defer func() { _ = rows.Close() }()
	for rows.Next() {
		var i invalidIndex
		if err := rows.Scan(&i.name, &i.table, &i.parent); err != nil {
			return nil, err
		}
		i.create = statements[i.name]
		found = append(found, i)
	}
	return found, rows.Err()
}

// rebuildInvalid makes invalid indexes anew.
func rebuildInvalid(ctx context.Context, db *sql.DB, rebuilt func(index string)) error {
	found, err := findInvalid(ctx, db)
	if err != nil || found == nil {
		return err
	}
	for _, i := range found {
		if still, err := isStillInvalid(ctx, db, i); err != nil {
			return fmt.Errorf("%s: %w", i.name, err)
		} else if !still {
			continue
		}
		steps := []string{"DROP INDEX CONCURRENTLY IF EXISTS " + i.name, i.create}
		if i.parent != "" {
			// It cannot be dropped alone. Attaching it again has the parent look whether
			// all its partitions have a valid one now.
			steps = []string{"REINDEX INDEX CONCURRENTLY " + i.name, "ALTER INDEX " + i.parent + " ATTACH PARTITION " + i.name}
		}
		for _, statement := range steps {
			if statement == "" {
				continue
			}
			if _, err := db.ExecContext(ctx, statement); err != nil {
				return fmt.Errorf("%s: %w", i.name, err)
			}
		}
		if rebuilt != nil && i.create != "" {
			rebuilt(i.name)
		}
	}
	return nil
}

// isStillInvalid looks again when no session makes an index of the table any more:
// that of an instance that was killed goes on for a while.
func isStillInvalid(ctx context.Context, db *sql.DB, i invalidIndex) (bool, error) {
	tx, err := db.BeginTx(ctx, &sql.TxOptions{Isolation: sql.LevelReadCommitted})
	if err != nil {
		return false, err
	}
	defer func() { _ = tx.Rollback() }()
	// CREATE INDEX CONCURRENTLY holds this lock for its session's time.
	if _, err := tx.ExecContext(ctx, "LOCK TABLE "+i.table+" IN SHARE UPDATE EXCLUSIVE MODE"); err != nil {
		return false, err
	}
	found, err := findInvalid(ctx, tx)
	for _, other := range found {
		if other.name == i.name {
			return true, nil
		}
	}
	return false, err
}
