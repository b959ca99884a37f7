package migrations

import (
	"context"
	"database/sql"
	"fmt"
	"strings"
)

// RightsError says that the database's role may not migrate, and what it lacks.
type RightsError struct {
	// Role is the one that the connection has.
	Role string
	// Lacks is what it lacks, in words: "CREATE on schema public".
	Lacks []string
}

// Error is one line that says what to do.
func (e *RightsError) Error() string {
	return fmt.Sprintf("the database role %q may not migrate, it lacks %s: run \"orchestrator migrate\" with the role that owns the tables, or grant this one what it lacks",
		e.Role, strings.Join(e.Lacks, ", "))
}

const rightsSQL = `-- name: rights to migrate
SELECT current_user, coalesce(current_schema(), ''), current_setting('search_path'),
    coalesce(has_schema_privilege(current_schema(), 'CREATE'), false),
    coalesce((SELECT string_agg(c.relname, ' ' ORDER BY c.relname) FROM pg_class c
        WHERE c.relnamespace = to_regnamespace(quote_ident(current_schema())) AND c.relkind IN ('r', 'p')
            AND c.relname IN ('tasks', 'task_history', 'workers', 'idempotency_keys', 'queues', 'queue_keys', 'lanes', 'hosts', 'goose_db_version')
            AND NOT pg_has_role(c.relowner, 'USAGE')), '')`

// checkRights returns a [*RightsError] unless the role may create tables and alter
// those that are there.
func checkRights(ctx context.Context, db *sql.DB) error {
	var (
		role, schema, path, foreign string
		create                      bool
	)
	if err := db.QueryRowContext(ctx, rightsSQL).Scan(&role, &schema, &path, &create, &foreign); err != nil {
		return fmt.Errorf("look at the rights to migrate: %w", err)
	}
	e := &RightsError{Role: role}
	switch {
	case schema == "":
		e.Lacks = append(e.Lacks, fmt.Sprintf("a schema that it may use (its search_path is %q)", path))
	case !create:
		e.Lacks = append(e.Lacks, "CREATE on schema "+schema)
	}
	for _, table := range strings.Fields(foreign) {
		e.Lacks = append(e.Lacks, "the ownership of "+table)
	}
	if e.Lacks == nil {
		return nil
	}
	return e
}
