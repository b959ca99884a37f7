package postgres

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"

	"github.com/melodia/orchestrator/internal/task"
)

// hostColumns are those of a [task.Host], in the order of scanHost.
const hostColumns = `name, version, since, opened, allowed, doubled, why,
    COALESCE(EXTRACT(EPOCH FROM congested_until - now()), 0)::float8,
    COALESCE(EXTRACT(EPOCH FROM held_until - now()), 0)::float8,
    COALESCE(EXTRACT(EPOCH FROM open_until - now()), 0)::float8`

func scanHost(row pgx.CollectableRow) (h task.Host, err error) {
	var congested, held, open float64
	err = row.Scan(&h.Name, &h.Version, &h.Since, &h.Opened, &h.Allowed, &h.Doubled, &h.Why, &congested, &held, &open)
	h.CongestedFor, h.HeldFor, h.OpenFor = duration(max(congested, 0)), duration(max(held, 0)), duration(max(open, 0))
	return h, err
}

// hostOver is a host that is healthy by now, or to which nothing happened for 10 minutes
// since its calls might start again.
const hostOver = `(h.allowed = 0 AND COALESCE(GREATEST(h.congested_until, h.held_until, h.open_until), h.changed_at) <= now()
    OR GREATEST(h.congested_until, h.held_until, h.open_until, h.changed_at) < now() - interval '10 minutes')`

const (
	hostsSQL = `-- name: list unhealthy hosts
SELECT ` + hostColumns + ` FROM hosts h WHERE NOT ` + hostOver + ` ORDER BY name`

	someHostsSQL = `-- name: list some unhealthy hosts
SELECT ` + hostColumns + ` FROM hosts h WHERE name COLLATE "C" > $1 AND NOT ` + hostOver + ` ORDER BY name COLLATE "C" LIMIT $2`
)

// Hosts returns all hosts that are not healthy, in the order of their names.
func (s *Store) Hosts(ctx context.Context) ([]task.Host, error) { return s.listHosts(ctx, hostsSQL) }

// SomeHosts returns up to limit hosts that are not healthy, in the order of the bytes of
// their names, from behind a name on.
func (s *Store) SomeHosts(ctx context.Context, behind string, limit int) ([]task.Host, error) {
	return s.listHosts(ctx, someHostsSQL, behind, limit)
}

func (s *Store) listHosts(ctx context.Context, sql string, args ...any) ([]task.Host, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	rows, err := s.pool.Query(ctx, sql, args...)
	if err != nil {
		return nil, fmt.Errorf("list unhealthy hosts: %w", classify(err))
	}
	hosts, err := pgx.CollectRows(rows, scanHost)
	if err != nil {
		return nil, fmt.Errorf("list unhealthy hosts: %w", classify(err))
	}
	return hosts, nil
}

// A moment is written as what is left of it; one that has passed as NULL. Rows of
// hosts that are over go along, unless another instance has them locked.
const (
	hostMoments = `CASE WHEN $2::float8 > 0 THEN now() + make_interval(secs => $2) END,
    CASE WHEN $3::float8 > 0 THEN now() + make_interval(secs => $3) END,
    CASE WHEN $4::float8 > 0 THEN now() + make_interval(secs => $4) END`

	insertHostSQL = `-- name: note an unhealthy host
WITH over AS (
    DELETE FROM hosts WHERE name = ANY (ARRAY(SELECT name FROM hosts h WHERE ` + hostOver + ` AND name <> $1 FOR UPDATE SKIP LOCKED))
)
INSERT INTO hosts AS h (name, congested_until, held_until, open_until, opened, allowed, doubled, why)
VALUES ($1, ` + hostMoments + `, $5, $6, $7, $8)
ON CONFLICT (name) DO UPDATE SET version = h.version + 1, since = now(), changed_at = now(), congested_until = excluded.congested_until,
    held_until = excluded.held_until, open_until = excluded.open_until, opened = excluded.opened,
    allowed = excluded.allowed, doubled = excluded.doubled, why = excluded.why
WHERE ` + hostOver + `
RETURNING ` + hostColumns

	updateHostSQL = `-- name: change an unhealthy host
UPDATE hosts SET version = version + 1, changed_at = now(), (congested_until, held_until, open_until) = ROW (` + hostMoments + `),
    opened = $5, allowed = $6, doubled = $7, why = $8
WHERE name = $1 AND version = $9
RETURNING ` + hostColumns

	deleteHostSQL = `-- name: a host is healthy
DELETE FROM hosts WHERE name = $1 AND version = $2`

	hostSQL = `-- name: get an unhealthy host
SELECT ` + hostColumns + ` FROM hosts WHERE name = $1`
)

// SaveHost stores the state of a host that was changed from the version it names: the row is
// deleted where the host is healthy. It returns the state as it is stored. saved is false
// where another instance was first: then nothing was written, and the state is that of the
// other; a host that is not stored has the Version 0.
func (s *Store) SaveHost(ctx context.Context, h task.Host) (stored task.Host, saved bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	stored, saved, err = s.saveHost(ctx, h)
	if err != nil {
		return task.Host{}, false, fmt.Errorf("save the state of a host: %w", classify(err))
	}
	return stored, saved, nil
}

func (s *Store) saveHost(ctx context.Context, h task.Host) (stored task.Host, saved bool, err error) {
	values := []any{h.Name, seconds(h.CongestedFor), seconds(h.HeldFor), seconds(h.OpenFor), h.Opened, h.Allowed, h.Doubled, h.Why}
	status, _ := h.Status()
	switch {
	case status == task.HostHealthy:
		tag, err := s.pool.Exec(ctx, deleteHostSQL, h.Name, h.Version)
		if err != nil {
			return task.Host{}, false, err
		}
		if h.Version == 0 || tag.RowsAffected() > 0 {
			return task.Host{Name: h.Name}, true, nil
		}
	case h.Version == 0:
		stored, err = s.oneHost(ctx, insertHostSQL, values...)
	default:
		stored, err = s.oneHost(ctx, updateHostSQL, append(values, h.Version)...)
	}
	if err == nil && stored.Version > 0 {
		return stored, true, nil
	}
	if err == nil || errors.Is(err, pgx.ErrNoRows) {
		stored, err = s.oneHost(ctx, hostSQL, h.Name)
		if errors.Is(err, pgx.ErrNoRows) {
			return task.Host{Name: h.Name}, false, nil
		}
	}
	return stored, false, err
}

func (s *Store) oneHost(ctx context.Context, sql string, values ...any) (task.Host, error) {
	rows, err := s.pool.Query(ctx, sql, values...)
	if err != nil {
		return task.Host{}, err
	}
	return pgx.CollectExactlyOneRow(rows, scanHost)
}

const closeHostSQL = `-- name: close a host by hand
DELETE FROM hosts WHERE name = $1`

// CloseHost makes a host healthy: its breaker is closed, and no Retry-After holds it back
// any more. Each instance learns of it within its POLL_INTERVAL. It returns
// [task.ErrNotFound] where the host is healthy.
func (s *Store) CloseHost(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	tag, err := s.pool.Exec(ctx, closeHostSQL, name)
	if err != nil {
		return fmt.Errorf("close a host: %w", classify(err))
	}
	if tag.RowsAffected() == 0 {
		return task.ErrNotFound
	}
	return nil
}

// maxHeldBack is how many due tasks one statement looks at: about 30 ms, in which the rows
// that it moves are locked.
const maxHeldBack = 5000

// hostOfURL is the host among $1 to which a URL leads. It knows hosts only as [task.HostOf]
// writes them: the rare task that writes its host otherwise is moved when it is claimed.
// The subquery becomes a hash table: 5,000 tasks are asked about 1,000 hosts.
func hostOfURL(url string) string {
	host := `split_part(` + url + `, '/', 1) || '//' || split_part(split_part(` + url + `, '/', 3), '?', 1)`
	return `CASE WHEN ` + host + ` IN (SELECT unnest($1::text[])) THEN ` + host + ` END`
}

// movedByHost is how many tasks were moved to the lanes of each host, as JSON.
const movedByHost = `(SELECT COALESCE(jsonb_object_agg(host, n), '{}') FROM (SELECT split_part(lane, ' ', 2) AS host, count(*) AS n FROM moved GROUP BY 1) m)`

// Rows are found by their place: they were read in this statement, and one that changes
// meanwhile is left for the next time.
var holdBackSQL = `-- name: move tasks to the lanes of their hosts
WITH due AS MATERIALIZED (
    SELECT ctid AS tid, url FROM tasks
    WHERE state = 'pending' AND run_at >= $2 AND run_at <= now()
    ORDER BY run_at, id
    LIMIT $3
), locked AS MATERIALIZED (
    SELECT ctid AS tid FROM tasks
    WHERE ctid = ANY (ARRAY(SELECT tid FROM due WHERE ` + hostOfURL("due.url") + ` IS NOT NULL)) AND state = 'pending'
    FOR UPDATE SKIP LOCKED
), moved AS (
    UPDATE tasks t SET state = 'waiting', lane = ` + laneAt("t.lane", hostOfURL("t.url")) + `
    WHERE t.ctid = ANY (ARRAY(SELECT tid FROM locked))
    RETURNING t.lane
)
SELECT ` + movedByHost + `, (SELECT count(*) FROM due)`

// HoldBack moves due tasks that wait for no limit to the lanes of these hosts, as far as
// they are the host's, the longest due first: those without a lane, and those that are run
// by request, which go back to their queue. moved is how many tasks of each host were moved. It looks at
// some thousand tasks at a time: more reports that there may be others. A task that is about to be claimed stays where it is.
func (s *Store) HoldBack(ctx context.Context, hosts []string) (moved map[string]int, more bool, err error) {
	if len(hosts) == 0 {
		return nil, false, nil
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	var looked int
	err = s.pool.QueryRow(ctx, holdBackSQL, hosts, s.lowWater.current(), maxHeldBack).Scan(&moved, &looked)
	if err != nil {
		return nil, false, fmt.Errorf("move tasks to the lanes of %d hosts: %w", len(hosts), classify(err))
	}
	return moved, looked == maxHeldBack && len(moved) > 0, nil
}

// firstInLane is the first tasks of the lane $2 that have a priority.
func firstInLane(priority string) string {
	return `(SELECT ctid AS tid, url, run_at, id, priority FROM tasks WHERE state = 'waiting' AND lane = $2 AND priority = ` + priority + ` ORDER BY run_at, id LIMIT $5)`
}

// The tasks of an ordered key stay where they are: the key waits with its first one.
var holdBackInLaneSQL = `-- name: move tasks of a lane to those of their hosts
WITH waiting AS MATERIALIZED (
    SELECT tid, url FROM (
        ` + firstInLane("1") + `
        UNION ALL
        ` + firstInLane("0") + `
        UNION ALL
        ` + firstInLane("-1") + `
    ) t
    WHERE NOT ($4::text <> '' AND COALESCE((SELECT ordered FROM queue_keys WHERE queue = $3 AND key = $4), (SELECT key_ordered FROM queues WHERE name = $3), false))
    ORDER BY run_at - priority * interval '15 min', id
    LIMIT $5
), locked AS MATERIALIZED (
    SELECT ctid AS tid FROM tasks
    WHERE ctid = ANY (ARRAY(SELECT tid FROM waiting WHERE ` + hostOfURL("waiting.url") + ` IS NOT NULL)) AND state = 'waiting' AND lane = $2
    FOR UPDATE SKIP LOCKED
), moved AS (
    UPDATE tasks t SET lane = t.lane || ' ' || ` + hostOfURL("t.url") + `
    WHERE t.ctid = ANY (ARRAY(SELECT tid FROM locked))
    RETURNING t.lane
)
SELECT ` + movedByHost + `, (SELECT count(*) FROM waiting)`

// HoldBackInLane is HoldBack of the tasks that wait in a lane without a host, due or not, in the
// order in which they would be claimed.
func (s *Store) HoldBackInLane(ctx context.Context, lane task.Lane, hosts []string) (moved map[string]int, more bool, err error) {
	if len(hosts) == 0 {
		return nil, false, nil
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	var looked int
	err = s.pool.QueryRow(ctx, holdBackInLaneSQL, hosts, string(lane), lane.Queue(), lane.Key(), maxHeldBack).Scan(&moved, &looked)
	if err != nil {
		return nil, false, fmt.Errorf("move tasks of a lane to those of %d hosts: %w", len(hosts), classify(err))
	}
	return moved, looked == maxHeldBack && len(moved) > 0, nil
}
