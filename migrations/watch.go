package migrations

import (
	"context"
	"database/sql"
	"fmt"
	"strings"
	"sync"
	"time"
)

const (
	// watchDelay is how long migrations may take without a word.
	watchDelay = 500 * time.Millisecond
	// watchInterval is how often is looked at what they wait for.
	watchInterval = time.Second
	// watchTimeout bounds one look.
	watchTimeout = 2 * time.Second
)

// watcher looks at what migrations wait for, until it is stopped.
type watcher struct {
	cancel context.CancelFunc
	done   sync.WaitGroup
}

func watch(ctx context.Context, db *sql.DB, waiting func(reason string)) *watcher {
	w := &watcher{}
	if waiting == nil {
		w.cancel = func() {}
		return w
	}
	ctx, w.cancel = context.WithCancel(ctx)
	w.done.Go(func() {
		next := time.NewTimer(watchDelay)
		defer next.Stop()
		told := false
		for {
			select {
			case <-ctx.Done():
				if told {
					waiting("")
				}
				return
			case <-next.C:
			}
			if reason, err := whatFor(ctx, db); ctx.Err() == nil {
				if err != nil { // behind a pooler there may be no connection left for this
					reason = "migrations are being applied"
				}
				waiting(reason)
				told = true
			}
			next.Reset(watchInterval)
		}
	})
	return w
}

// stop returns when nothing is told any more.
func (w *watcher) stop() {
	w.cancel()
	w.done.Wait()
}

// The instance that migrates may be another one. PostgreSQL shows a session's statement to
// its own role and to monitors only, and its number and name to all roles. A number of 0
// stands for prepared transactions.
const blockersSQL = `-- name: what do migrations wait for
WITH holder AS (
    SELECT l.pid FROM pg_locks l JOIN pg_database d ON d.oid = l.database
    WHERE l.locktype = 'advisory' AND l.granted AND l.classid = 0 AND l.objid = $1 AND l.objsubid = 1 AND d.datname = current_database()
), blockers AS (
    SELECT DISTINCT unnest(pg_blocking_pids(m.pid)) AS pid FROM pg_stat_activity m
    WHERE m.datname = current_database() AND starts_with(m.application_name, $2)
)
SELECT b.pid, b.holds, coalesce(a.application_name, ''), coalesce(a.backend_type, ''), coalesce(a.state, ''),
    coalesce(to_char(coalesce(a.xact_start, a.backend_start) AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"'), '')
FROM (SELECT pid, false AS holds FROM blockers UNION ALL SELECT pid, true FROM holder) b
    LEFT JOIN pg_stat_activity a ON a.pid = b.pid
ORDER BY b.holds, b.pid LIMIT 5`

// whatFor says in words what the migrations of this database wait for: sessions by
// number, name, state and since when, but not what they execute.
func whatFor(ctx context.Context, db *sql.DB) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, watchTimeout)
	defer cancel()
	rows, err := db.QueryContext(ctx, blockersSQL, lockKey, namePrefix)
	if err != nil {
		return "", err
	}
	defer func() { _ = rows.Close() }()
	var blockers []string
	holder := ""
	for rows.Next() {
		var (
			pid                      int64
			holds                    bool
			name, kind, state, since string
		)
		if err := rows.Scan(&pid, &holds, &name, &kind, &state, &since); err != nil {
			return "", err
		}
		said := describe(pid, name, kind, state, since)
		switch {
		case !holds:
			blockers = append(blockers, said)
		case !strings.HasPrefix(name, namePrefix): // an older version, or what is left of an instance
			holder = said
		}
	}
	if err := rows.Err(); err != nil {
		return "", err
	}
	switch {
	case blockers != nil:
		return "migrations wait for a lock held by " + strings.Join(blockers, " and by "), nil
	case holder != "":
		return "migrations are being applied by another instance, or wait for it: their lock is held by " + holder, nil
	}
	return "migrations are being applied", nil
}

// describe names a session.
func describe(pid int64, name, kind, state, since string) string {
	if pid == 0 {
		return "a prepared transaction (pg_prepared_xacts lists them)"
	}
	var more []string
	if kind != "" && kind != "client backend" {
		more = append(more, kind)
	}
	if name != "" {
		more = append(more, fmt.Sprintf("application_name %q", name))
	}
	if state != "" {
		more = append(more, "state "+state)
	}
	if since != "" {
		more = append(more, "since "+since)
	}
	session := fmt.Sprintf("session %d", pid)
	if more == nil {
		return session
	}
	return session + " (" + strings.Join(more, ", ") + ")"
}
