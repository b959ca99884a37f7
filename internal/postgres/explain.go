package postgres

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/melodia/orchestrator/internal/task"
)

func explainSQL(l columns) string {
	return `-- name: explain a task
WITH t AS (
    SELECT ` + l.shownOf(live) + `, worker_id, claimed_at FROM tasks WHERE id = $1
    UNION ALL
    SELECT ` + l.shownOf(history) + `, NULL, NULL FROM task_history WHERE id = $1
), dispatcher AS (
    SELECT *, heartbeat_at >= now() - make_interval(secs => $2) AS alive FROM workers WHERE concurrency IS DISTINCT FROM 0
)
SELECT t.*, now(), w.name, w.heartbeat_at,
    (SELECT count(*) FROM dispatcher WHERE alive),
    (SELECT CASE WHEN bool_and(concurrency IS NOT NULL) THEN sum(concurrency) END FROM dispatcher WHERE alive),
    (SELECT max(heartbeat_at) FROM dispatcher),
    (SELECT count(*) FROM tasks WHERE state = 'running'),
    CASE WHEN t.state = 'pending' AND t.run_at <= now() THEN (SELECT count(*) FROM (
        SELECT FROM tasks a WHERE a.state = 'pending' AND (a.run_at, a.id) < (t.run_at, t.id) LIMIT $3) ahead) END,
    f.*
FROM t LEFT JOIN workers w ON w.id = t.worker_id
LEFT JOIN LATERAL (` + flowFacts + `) f ON t.state = 'waiting'`
}

// flowFacts is a [task.Flow] of t, in the order of flowRow. What a claim reads of lanes and
// limits is in queueLimitsSQL and keyLimitsSQL.
var flowFacts = `
    SELECT q.paused_at, q.max_concurrent, q.max_per_second, q.burst,
        (SELECT count(*) FROM (SELECT FROM tasks a WHERE ` + runningIn(`l.queue_row`, `t.queue || '0'`) + ` LIMIT $3) r) AS queue_running,
        ` + burstUsed(`ql`, `q.max_per_second`) + ` AS queue_used,
        k.max_concurrent AS key_max_concurrent, k.max_per_second AS key_max_per_second, k.burst AS key_burst, k.ordered,
        (SELECT count(*) FROM (SELECT FROM tasks a WHERE t.flow_key IS NOT NULL AND ` + runningIn(`l.key_row`, `l.key_row || '!'`) + ` LIMIT $3) r) AS key_running,
        ` + burstUsed(`kl`, `k.max_per_second`) + ` AS key_used,
        h.id AS first_id, h.run_at AS first_at,
        o.*,
        (SELECT count(*) FROM (SELECT FROM tasks a
            WHERE l.host <> '' AND split_part(a.lane, ' ', 2) = l.host AND strpos(a.lane, ' ') > 0 AND a.claimed_at IS NOT NULL LIMIT $3) r) AS host_running,
        CASE WHEN q.paused_at IS NOT NULL OR q.max_concurrent > 0 OR q.max_per_second > 0 THEN (` + aheadInQueue + `) END AS ahead_in_queue,
        (SELECT count(*) FROM (SELECT FROM (` + aheadInLane(`t.lane`, `= 1`) + ` UNION ALL ` + aheadInLane(`t.lane`, `= 0`) + ` UNION ALL ` +
	aheadInLane(`t.lane`, `= -1`) + ` UNION ALL ` + aheadInLane(`t.lane`, `IS NULL`) + `) a LIMIT $3) a) AS ahead_in_lane
    FROM (SELECT t.queue || '/' AS queue_row, split_part(t.lane, ' ', 1) AS key_row, split_part(t.lane, ' ', 2) AS host) l
    LEFT JOIN queues q ON q.name = t.queue
    LEFT JOIN queue_keys own ON own.queue = t.queue AND own.key = t.flow_key
    LEFT JOIN LATERAL (
        SELECT own.max_concurrent, own.max_per_second, own.burst, own.ordered WHERE own.key IS NOT NULL
        UNION ALL
        SELECT q.key_max_concurrent, q.key_max_per_second, q.key_burst, q.key_ordered WHERE own.key IS NULL
    ) k ON t.flow_key IS NOT NULL
    LEFT JOIN lanes ql ON ql.name = l.queue_row
    LEFT JOIN lanes kl ON kl.name = l.key_row AND t.flow_key IS NOT NULL
    LEFT JOIN tasks h ON h.id = kl.head AND h.id <> t.id AND h.claimed_at IS NULL AND split_part(h.lane, ' ', 1) = l.key_row
    LEFT JOIN LATERAL (SELECT ` + hostColumns + ` FROM hosts WHERE name = l.host) o ON true`

// runningIn is the running tasks, as a, of lanes from one up to another.
func runningIn(from, behind string) string {
	return `a.claimed_at IS NOT NULL AND a.lane IS NOT NULL AND a.lane >= ` + from + ` AND a.lane < ` + behind
}

// burstUsed is how much of the burst of a lane's row is used up.
func burstUsed(lane, rate string) string {
	return `COALESCE(CASE WHEN ` + lane + `.claimed_at <= now() THEN
            GREATEST(` + lane + `.burst_used - EXTRACT(EPOCH FROM now() - ` + lane + `.claimed_at)::float8 * ` + rate + `, 0) END, 0)`
}

// aheadInQueue is how many tasks of t's queue come before t, which is of interest where the
// queue itself lets it wait. Each step goes to the next lane, as in lanesSQL: of a lane no task
// is read but those that count.
var aheadInQueue = `
            WITH RECURSIVE lane AS (
                (SELECT a.lane AS name FROM tasks a WHERE a.state = 'waiting' AND a.lane >= l.queue_row AND a.lane < t.queue || '0' ORDER BY a.lane LIMIT 1)
                UNION ALL
                SELECT (SELECT a.lane FROM tasks a WHERE a.state = 'waiting' AND a.lane > lane.name AND a.lane < t.queue || '0' ORDER BY a.lane LIMIT 1)
                FROM lane WHERE lane.name IS NOT NULL
            )
            SELECT count(*) FROM (SELECT FROM lane, LATERAL (` + aheadInLane(`lane.name`, `= 1`) + ` UNION ALL ` + aheadInLane(`lane.name`, `= 0`) + ` UNION ALL ` + aheadInLane(`lane.name`, `= -1`) + `) a LIMIT $3) a`

// aheadInLane is the tasks of a lane that have a priority and come before t.
func aheadInLane(lane, priority string) string {
	return `(SELECT FROM tasks a WHERE a.state = 'waiting' AND a.lane = ` + lane + ` AND a.priority ` + priority + `
            AND (a.run_at, a.id) < (t.run_at + COALESCE(` + strings.NewReplacer("IS NULL", "0", "= ", "").Replace(priority) + ` - t.priority, 0) * interval '15 min', t.id) LIMIT $3)`
}

// flowRow is flowFacts as they are read.
type flowRow struct {
	pausedAt, firstAt, since                            *time.Time
	queue, key                                          limitsRow
	queueRunning, keyRunning, hostRunning               *int
	queueUsed, keyUsed, congested, held, open           *float64
	ordered                                             *bool
	first                                               *[16]byte
	host, why                                           *string
	version                                             *int64
	opened, allowed, doubled, aheadInQueue, aheadInLane *int
}

func (r *flowRow) dests() []any {
	dests := append([]any{&r.pausedAt}, r.queue.dests()...)
	dests = append(append(dests, &r.queueRunning, &r.queueUsed), r.key.dests()...)
	return append(dests, &r.ordered, &r.keyRunning, &r.keyUsed, &r.first, &r.firstAt,
		&r.host, &r.version, &r.since, &r.opened, &r.allowed, &r.doubled, &r.why, &r.congested, &r.held, &r.open,
		&r.hostRunning, &r.aheadInQueue, &r.aheadInLane)
}

func (r *flowRow) flow() task.Flow {
	left := func(seconds *float64) time.Duration { return duration(max(zeroNull(seconds), 0)) }
	return task.Flow{
		InLane:   r.aheadInLane != nil,
		PausedAt: zeroNull(r.pausedAt),
		Queue:    task.Permits{Limits: r.queue.limits(), Running: zeroNull(r.queueRunning), Used: zeroNull(r.queueUsed)},
		Key:      task.Permits{Limits: r.key.limits(), Running: zeroNull(r.keyRunning), Used: zeroNull(r.keyUsed)},
		Ordered:  zeroNull(r.ordered), First: zeroNull(r.first), FirstAt: zeroNull(r.firstAt),
		Host: task.Host{
			Name: zeroNull(r.host), Version: zeroNull(r.version), Since: zeroNull(r.since), Opened: zeroNull(r.opened), Allowed: zeroNull(r.allowed),
			Doubled: zeroNull(r.doubled), Why: zeroNull(r.why), CongestedFor: left(r.congested), HeldFor: left(r.held), OpenFor: left(r.open),
		},
		HostRunning: zeroNull(r.hostRunning), AheadInQueue: zeroNull(r.aheadInQueue), AheadInLane: zeroNull(r.aheadInLane),
	}
}

// Explain returns a task, or [task.ErrNotFound], and the facts around it.
// Workers that were silent for lease do not count. It is bounded like Find.
func (s *Store) Explain(ctx context.Context, id task.ID, lease time.Duration) (*task.Task, task.Facts, error) {
	var t *task.Task
	f := task.Facts{Lease: lease}
	err := s.search(ctx, func(ctx context.Context, tx pgx.Tx) error {
		rows, err := tx.Query(ctx, s.sql.explain, searchMode, [16]byte(id), seconds(lease), task.MaxAhead)
		if err != nil {
			return err
		}
		t, err = pgx.CollectExactlyOneRow(rows, func(row pgx.CollectableRow) (*task.Task, error) {
			var (
				worker                            *[16]byte
				holder                            *string
				claimedAt, holderSeen, anyoneSeen *time.Time
				slots, ahead                      *int
				flow                              flowRow
			)
			more := []any{&worker, &claimedAt, &f.Now, &holder, &holderSeen, &f.Instances, &slots, &anyoneSeen, &f.Running, &ahead}
			t, err := s.sql.shown.reader(append(more, flow.dests()...)...).read(row)
			f.ClaimedAt, f.HolderSeenAt, f.InstanceSeenAt = zeroNull(claimedAt), zeroNull(holderSeen), zeroNull(anyoneSeen)
			f.Holder, f.Slots, f.Ahead, f.Flow = zeroNull(holder), zeroNull(slots), zeroNull(ahead), flow.flow()
			return t, err
		})
		return err
	})
	if errors.Is(err, pgx.ErrNoRows) {
		err = task.ErrNotFound
	}
	if err != nil {
		return nil, task.Facts{}, fmt.Errorf("explain task %s: %w", id, err)
	}
	return t, f, nil
}

const unfinishedSQL = `-- name: which tasks are not over
SELECT id FROM tasks WHERE id = ANY ($1)`

// Unfinished returns which of some tasks are not over.
func (s *Store) Unfinished(ctx context.Context, ids []task.ID) ([]task.ID, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	wanted := make([][16]byte, len(ids))
	for i, id := range ids {
		wanted[i] = id
	}
	rows, err := s.pool.Query(ctx, unfinishedSQL, wanted)
	if err != nil {
		return nil, fmt.Errorf("ask for %d tasks: %w", len(ids), classify(err))
	}
	unfinished, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (id task.ID, err error) {
		err = row.Scan((*[16]byte)(&id))
		return id, err
	})
	if err != nil {
		return nil, fmt.Errorf("ask for %d tasks: %w", len(ids), classify(err))
	}
	return unfinished, nil
}
