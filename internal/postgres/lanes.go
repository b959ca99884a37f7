package postgres

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/melodia/orchestrator/internal/task"
)

// A task with a lane waits in the state waiting, which callers see as pending. So plain
// tasks keep their claim and their index, and a claim from lanes looks at nothing else.

// waiting is the state in the table of a pending task that has a lane.
const waiting task.State = "waiting"

// maxAsked is how many lanes one claim asks.
const maxAsked = 100

// waitingState is the state in the table of a pending task whose lane is NULL, or not.
func waitingState(lane string) string {
	return `CASE WHEN ` + lane + ` IS NULL THEN 'pending' ELSE 'waiting' END`
}

// flowLane is [task.LaneOf] the columns queue and flow_key; NULL is none.
const flowLane = `queue || '/' || COALESCE(flow_key, '')`

// laneAt is [task.Lane.At] of a lane that may be NULL, and a host.
func laneAt(lane, host string) string {
	return `COALESCE(split_part(` + lane + `, ' ', 1), '') || ' ' || ` + host
}

// setLane sets what a lane says about its task.
func setLane(t *task.Task, lane string) {
	l := task.Lane(lane)
	t.Queue, t.FlowKey, t.HeldHost = l.Queue(), l.Key(), l.Host()
}

// laneFence is what keeps limits exact. A lane's row is locked in its newest version, but
// what runs is counted as it was when the statement began: where another claim was
// committed in between, the lane is left for the next time.
const laneFence = `AND version = SEEN`

// claimUnderWay is how long before this moment a claim may have begun, of which a count
// that is made now knows nothing yet: its tasks have the claimed_at of its beginning.
var claimUnderWay = fmt.Sprintf(`interval '%d s'`, (callTimeout+time.Second)/time.Second)

// A claim asks up to maxAsked lanes. Of each it knows the queue, the key and the host, as
// far as there are any: their rows in lanes are locked unless another claim has them, what
// runs is counted, and the permits that are left bound what is taken. A permit is a running
// row: nothing else has to be given back.
//
// A row that is not there is reported as missing, and its lane waits: makeLanesSQL makes
// it. A claim waits for no lock, so claims cannot deadlock.
//
// The shape is for the planner, which knows nothing about how many lanes are asked, and
// whose plan is kept: nothing is joined by name, subqueries end in LIMIT so that they stay
// what they are, and generate_series says 100.
//
// The rate is a bucket that leaks: burst_used at claimed_at, less what flowed out since. A
// clock that was set back by more than a statement takes finds it empty.
func claimLanesSQL(l columns, fence string) string {
	// gate is the row of a queue, key or host that is locked, with the permits it has left.
	gate := func(name, seen, max, rate, running string) string {
		slots, used := `NULL::bigint`, `NULL::float8`
		if max != "" {
			slots = max + ` - r.count`
		}
		if rate != "" {
			used = `CASE WHEN ` + rate + ` IS NULL THEN NULL WHEN l.claimed_at > now() + interval '5 s' THEN 0
            ELSE GREATEST(l.burst_used - GREATEST(EXTRACT(EPOCH FROM now() - l.claimed_at)::float8, 0) * ` + rate + `, 0) END`
		}
		return `SELECT l.tid, l.head, r.oldest, ` + slots + ` AS slots, ` + used + ` AS used
        FROM (SELECT ctid AS tid, * FROM lanes WHERE name = ` + name + ` ` + strings.ReplaceAll(fence, "SEEN", seen) + ` FOR UPDATE SKIP LOCKED) l,
            LATERAL (SELECT count(*) AS count, min(claimed_at) AS oldest FROM (
                SELECT claimed_at FROM tasks t
                WHERE ` + max + ` > 0 AND ` + running + `
                    AND t.claimed_at >= CASE WHEN l.running_from < now() THEN l.running_from ELSE 'epoch' END
                LIMIT ` + max + `) running) r`
	}
	inRange := func(from, behind string) string { return `t.lane >= ` + from + ` AND t.lane < ` + behind }
	queue := gate(`a.queue_row`, `a.queue_seen`, `a.max_concurrent`, `a.max_per_second`, inRange(`a.queue_row`, `a.queue || '0'`))
	key := gate(`a.key_row`, `a.key_seen`, `a.key_max_concurrent`, `a.key_max_per_second`, inRange(`a.key_row`, `a.key_row || '!'`))
	host := gate(`a.host_row`, `a.host_seen`, `a.running`, ``, `split_part(t.lane, ' ', 2) = a.host AND strpos(t.lane, ' ') > 0`)
	// waitingOf is the first tasks of a lane that have a priority.
	waitingOf := func(condition, priority, is string) string {
		return `(SELECT t.ctid AS tid, t.id, t.run_at, ` + priority + ` AS priority FROM tasks t
            WHERE ` + condition + ` AND t.state = 'waiting' AND t.lane = a.lane AND t.priority ` + is + `
            ORDER BY t.run_at, t.id LIMIT a.most + 1)`
	}
	noClaim := l.with(useClaim).exprs(func(c column) string { return "NULL::" + c.sqlType })
	return `-- name: claim from lanes
WITH asked AS MATERIALIZED (
    SELECT a.*, q.paused_at IS NOT NULL AS paused, q.max_concurrent, q.max_per_second, COALESCE(q.burst, ceil(q.max_per_second)) AS burst,
        COALESCE(k.ordered, q.key_ordered, false) AS ordered,
        CASE WHEN COALESCE(k.ordered, q.key_ordered) THEN 1 WHEN k.key IS NULL THEN q.key_max_concurrent ELSE k.max_concurrent END AS key_max_concurrent,
        CASE WHEN k.key IS NULL THEN q.key_max_per_second ELSE k.max_per_second END AS key_max_per_second,
        CASE WHEN k.key IS NULL THEN COALESCE(q.key_burst, ceil(q.key_max_per_second)) ELSE COALESCE(k.burst, ceil(k.max_per_second)) END AS key_burst
    FROM (
        SELECT place, lane, queue, key, host, ($6::int[])[place] AS most, ($7::int[])[place] AS running,
            row_number() OVER (PARTITION BY queue ORDER BY place) AS nth_of_queue,
            row_number() OVER (PARTITION BY queue, key ORDER BY place) AS nth_of_key,
            row_number() OVER (PARTITION BY host ORDER BY place) AS nth_of_host
        FROM (SELECT place, ($2::text[])[place] AS lane, ($3::text[])[place] AS queue, ($4::text[])[place] AS key, ($5::text[])[place] AS host
            FROM generate_series(1, 100) place) a
        WHERE lane IS NOT NULL) a
    LEFT JOIN LATERAL (SELECT * FROM queues q WHERE q.name = a.queue LIMIT 1) q ON true
    LEFT JOIN LATERAL (SELECT * FROM queue_keys k WHERE k.queue = a.queue AND k.key = a.key LIMIT 1) k ON true
), wanted AS MATERIALIZED (
    SELECT a.*,
        (SELECT version FROM lanes WHERE name = queue_row AND nth_of_queue = 1) AS queue_seen,
        (SELECT version FROM lanes WHERE name = key_row AND nth_of_key = 1) AS key_seen,
        (SELECT version FROM lanes WHERE name = host_row AND nth_of_host = 1) AS host_seen
    FROM (SELECT *,
            CASE WHEN queue <> '' AND NOT paused THEN queue || '/' END AS queue_row,
            CASE WHEN key <> '' AND NOT paused AND (key_max_concurrent > 0 OR key_max_per_second > 0) THEN queue || '/' || key END AS key_row,
            CASE WHEN host <> '' AND NOT paused THEN ' ' || host END AS host_row
        FROM asked) a
), gated AS MATERIALIZED (
    SELECT a.*, q.tid AS queue_tid, q.used AS queue_used, q.oldest AS queue_oldest, q.slots AS queue_slots,
        k.tid AS key_tid, k.head, k.used AS key_used, k.oldest AS key_oldest, k.slots AS key_slots,
        h.tid AS host_tid, h.oldest AS host_oldest, h.slots AS host_slots
    FROM wanted a LEFT JOIN LATERAL (
        ` + queue + `
    ) q ON a.queue_seen IS NOT NULL LEFT JOIN LATERAL (
        ` + key + `
    ) k ON a.key_seen IS NOT NULL LEFT JOIN LATERAL (
        ` + host + `
    ) h ON a.host_seen IS NOT NULL
), free AS MATERIALIZED (
    SELECT *, queue_row IS NOT NULL AND whole_queue IS NULL OR key_row IS NOT NULL AND key_tid IS NULL OR host_row IS NOT NULL AND whole_host IS NULL AS others,
        LEAST(all_queue_slots, floor(burst - all_queue_used)::bigint) AS queue_free,
        LEAST(key_slots, floor(key_burst - key_used)::bigint) AS key_free, all_host_slots AS host_free,
        CASE WHEN ordered THEN COALESCE((SELECT id FROM tasks t WHERE t.id = a.head AND t.worker_id IS NULL AND split_part(t.lane, ' ', 1) = key_row),
            CASE WHEN key_tid IS NOT NULL THEN (` + firstOfKey + `) END) END AS next_head
    FROM (SELECT *,
            first_value(queue_tid) OVER of_queue AS whole_queue, first_value(queue_slots) OVER of_queue AS all_queue_slots, first_value(queue_used) OVER of_queue AS all_queue_used,
            first_value(host_tid) OVER of_host AS whole_host, first_value(host_slots) OVER of_host AS all_host_slots
        FROM gated WINDOW of_queue AS (PARTITION BY queue ORDER BY place), of_host AS (PARTITION BY host ORDER BY place)) a
), candidate AS MATERIALIZED (
    SELECT a.place, a.most, a.queue, a.queue_free, a.host, a.host_free, c.tid, c.id, c.run_at,
        row_number() OVER (PARTITION BY a.place, c.run_at <= now() ORDER BY c.run_at - c.priority * interval '15 min', c.id) AS nth
    FROM (
        SELECT place, lane, queue, queue_free, host, host_free, LEAST(most, queue_free, key_free, host_free) AS most, next_head AS head
        FROM free a WHERE NOT paused AND NOT others AND (nth_of_queue > queue_free) IS NOT TRUE AND (nth_of_host > host_free) IS NOT TRUE
    ) a, LATERAL (
        (SELECT t.ctid AS tid, t.id, t.run_at, 0 AS priority FROM tasks t WHERE t.id = a.head AND t.state = 'waiting' AND t.lane = a.lane)
        UNION ALL
        ` + waitingOf(`a.queue <> '' AND a.head IS NULL`, `1`, `= 1`) + `
        UNION ALL
        ` + waitingOf(`a.queue <> '' AND a.head IS NULL`, `0`, `= 0`) + `
        UNION ALL
        ` + waitingOf(`a.queue <> '' AND a.head IS NULL`, `-1`, `= -1`) + `
        UNION ALL
        ` + waitingOf(`a.queue = ''`, `0`, `IS NULL`) + `
    ) c WHERE a.most > 0
), chosen AS MATERIALIZED (
    SELECT tid, place FROM (
        SELECT *, row_number() OVER (PARTITION BY queue ORDER BY nth, place) AS in_queue FROM (
            SELECT *, row_number() OVER (PARTITION BY host ORDER BY nth, place) AS in_host FROM candidate WHERE run_at <= now() AND nth <= most
        ) c WHERE (in_host <= host_free) IS NOT FALSE
    ) c WHERE (in_queue <= queue_free) IS NOT FALSE
    ORDER BY nth, place LIMIT $8
), locked AS MATERIALIZED (
    SELECT ctid AS tid, id FROM tasks
    WHERE ctid = ANY (ARRAY(SELECT tid FROM chosen)) AND state = 'waiting' AND EXISTS (SELECT FROM workers WHERE id = $1)
    FOR UPDATE SKIP LOCKED
), taken AS MATERIALIZED (
    SELECT l.tid, l.id, c.place FROM locked l JOIN chosen c ON c.tid = l.tid
), claimed AS (
    UPDATE tasks t SET state = 'running', claim = t.claim + 1, worker_id = $1,
        claimed_at = now(), first_claimed_at = COALESCE(t.first_claimed_at, now())
    WHERE t.ctid = ANY (ARRAY(SELECT tid FROM taken))
    RETURNING ` + claimedColumns(l) + `, t.lane
), result AS MATERIALIZED (
    SELECT *, COALESCE(sum(count) OVER (PARTITION BY queue), 0)::bigint AS of_queue, COALESCE(sum(count) OVER (PARTITION BY host), 0)::bigint AS of_host
    FROM (
        SELECT a.*, COALESCE(t.count, 0) AS count, t.ids, d.due, d.next,
            t.count IS NULL AND (EXISTS (SELECT FROM chosen c WHERE c.place = a.place) OR NOT EXISTS (SELECT FROM taken)) AS missed
        FROM free a
        LEFT JOIN (SELECT place, count(*) AS count, array_agg(id) AS ids FROM taken GROUP BY place) t ON t.place = a.place
        LEFT JOIN (SELECT place, count(*) FILTER (WHERE run_at <= now()) AS due, min(run_at) FILTER (WHERE run_at > now()) AS next
            FROM candidate GROUP BY place) d ON d.place = a.place) r
), noted AS (
    UPDATE lanes l SET version = l.version + 1, burst_used = COALESCE(g.used + g.count, 0),
        claimed_at = CASE WHEN l.claimed_at > now() + interval '5 s' THEN now() ELSE GREATEST(l.claimed_at, now()) END,
        running_from = COALESCE(LEAST(g.oldest, now()) - ` + claimUnderWay + `, 'epoch'), head = g.head
    FROM (
        SELECT queue_tid AS tid, queue_used AS used, of_queue AS count, CASE WHEN max_concurrent > 0 THEN COALESCE(queue_oldest, now()) END AS oldest, NULL::uuid AS head
        FROM result WHERE queue_tid IS NOT NULL AND of_queue > 0
        UNION ALL
        SELECT key_tid, key_used, count, CASE WHEN key_max_concurrent > 0 THEN COALESCE(key_oldest, now()) END, ids[1]
        FROM result WHERE key_tid IS NOT NULL AND count > 0
        UNION ALL
        SELECT host_tid, NULL, of_host, CASE WHEN running > 0 THEN COALESCE(host_oldest, now()) END, NULL
        FROM result WHERE host_tid IS NOT NULL AND of_host > 0
    ) g WHERE l.ctid = g.tid
)
SELECT *, NULL::text AS blocked, NULL::float8 AS wait, NULL::text[] AS missing FROM claimed
UNION ALL
SELECT ` + noClaim + `, NULL, NULL, lane,
    CASE WHEN paused THEN 'paused' WHEN others THEN 'others' WHEN queue_free <= of_queue THEN 'queue' WHEN key_free <= count OR due IS NULL AND next_head IS NOT NULL THEN 'key'
        WHEN host_free <= of_host THEN 'host'
        WHEN missed AND (due > 0 OR nth_of_queue > queue_free OR nth_of_host > host_free) THEN 'others' ELSE '' END,
    CASE WHEN paused OR others THEN NULL
        WHEN queue_free <= of_queue THEN CASE WHEN (all_queue_slots <= of_queue) IS NOT TRUE THEN (all_queue_used + of_queue + 1 - burst) / max_per_second END
        WHEN key_free <= count THEN CASE WHEN (key_slots <= count) IS NOT TRUE THEN (key_used + count + 1 - key_burst) / key_max_per_second END
        WHEN host_free <= of_host THEN NULL
        WHEN due > count OR nth_of_queue > queue_free OR nth_of_host > host_free THEN CASE WHEN NOT missed THEN 0 END
        ELSE EXTRACT(EPOCH FROM next - now())::float8 END,
    NULLIF(array_remove(ARRAY[CASE WHEN nth_of_queue = 1 AND queue_seen IS NULL THEN queue_row END,
        CASE WHEN nth_of_key = 1 AND key_seen IS NULL THEN key_row END, CASE WHEN nth_of_host = 1 AND host_seen IS NULL THEN host_row END], NULL), '{}')
FROM result`
}

// firstOfKey is the task of an ordered key that comes first, in whichever of its lanes it
// waits: the due ones before the others. Each step goes to the next lane, as in lanesSQL.
var firstOfKey = `
                WITH RECURSIVE lane AS (
                    (SELECT t.lane AS name FROM tasks t WHERE t.state = 'waiting' AND t.lane >= a.key_row AND t.lane < a.key_row || '!' ORDER BY t.lane LIMIT 1)
                    UNION ALL
                    SELECT (SELECT t.lane FROM tasks t WHERE t.state = 'waiting' AND t.lane > lane.name AND t.lane < a.key_row || '!' ORDER BY t.lane LIMIT 1)
                    FROM lane WHERE lane.name IS NOT NULL
                )
                SELECT t.id FROM lane, LATERAL (` + firstOfLaneAs("1") + ` UNION ALL ` + firstOfLaneAs("0") + ` UNION ALL ` + firstOfLaneAs("-1") + `) t
                ORDER BY t.run_at > now(), t.run_at - t.priority * interval '15 min', t.id LIMIT 1`

// firstOfLaneAs is the first waiting task of the lane name that has a priority.
func firstOfLaneAs(priority string) string {
	return `(SELECT t.id, t.run_at, t.priority FROM tasks t WHERE t.state = 'waiting' AND t.lane = lane.name AND t.priority = ` + priority + ` ORDER BY t.run_at, t.id LIMIT 1)`
}

// A statement of its own: a row that another claim changes or makes is waited for, which a
// claim that holds rows itself must not do. Two of these wait in the order of the names.
const makeLanesSQL = `-- name: make lanes
INSERT INTO lanes (name) SELECT DISTINCT n.name FROM unnest($1::text[]) n (name)
WHERE NOT EXISTS (SELECT FROM lanes l WHERE l.name = n.name)
ORDER BY n.name
ON CONFLICT DO NOTHING`

// ClaimLanes takes up to limit due tasks from some lanes, 100 at most, for worker: as many
// of each as the limits of its queue, its key and its host allow, and the lane's Most at
// most. Within a lane the longest due come first, and those of a higher priority count as
// due earlier; the lanes have turns. Of an ordered key the task that was claimed last comes
// first until it has ended. It also returns what is left in each lane.
//
// The tasks come as from [Store.Claim], with their lanes.
func (s *Store) ClaimLanes(ctx context.Context, worker task.ID, asks []task.LaneAsk, limit int) ([]*task.Claim, []task.LaneState, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	asks = asks[:min(len(asks), maxAsked)]
	n := len(asks)
	lanes, queues, keys, hosts := make([]string, n), make([]string, n), make([]string, n), make([]string, n)
	most, running := make([]int32, n), make([]*int32, n)
	for i, a := range asks {
		lanes[i], queues[i], keys[i], hosts[i] = string(a.Lane), a.Lane.Queue(), a.Lane.Key(), a.Lane.Host()
		most[i] = int32(min(a.Most, maxBatch))          //nolint:gosec // bounded
		running[i] = null(int32(min(a.Running, 1<<30))) //nolint:gosec // bounded
	}
	var (
		lane, blocked   *string
		wait            *float64
		missing, unmade []string
		states          = make([]task.LaneState, 0, n)
	)
	rows, err := s.pool.Query(ctx, s.sql.claimLanes, [16]byte(worker), lanes, queues, keys, hosts, most, running, min(limit, maxBatch))
	if err != nil {
		return nil, nil, fmt.Errorf("claim tasks from %d lanes: %w", n, classify(err))
	}
	scan := s.scanClaim(&lane, &blocked, &wait, &missing)
	stateAt := len(s.sql.claimed) + 2
	stateOnly := make([]any, stateAt+4) // nil: not scanned
	stateOnly[stateAt], stateOnly[stateAt+1], stateOnly[stateAt+2], stateOnly[stateAt+3] = &lane, &blocked, &wait, &missing
	claims, err := pgx.AppendRows(make([]*task.Claim, 0, limit), rows, func(row pgx.CollectableRow) (*task.Claim, error) {
		if row.RawValues()[0] != nil {
			c, err := scan(row)
			if err == nil {
				setLane(c.Task, zeroNull(lane))
			}
			return c, err
		}
		if err := row.Scan(stateOnly...); err != nil {
			return nil, err
		}
		states = append(states, task.LaneState{Lane: task.Lane(zeroNull(lane)), Blocked: task.Blocked(zeroNull(blocked)), Wait: waitOf(wait)})
		unmade = append(unmade, missing...)
		return nil, nil
	})
	if err != nil {
		return nil, nil, fmt.Errorf("claim tasks from %d lanes: %w", n, classify(err))
	}
	claims = slices.DeleteFunc(claims, func(c *task.Claim) bool { return c == nil })
	if len(unmade) > 0 {
		// An error must not hide what was claimed: the next claim reports the rows again.
		if _, err := s.pool.Exec(ctx, makeLanesSQL, unmade); err != nil && len(claims) == 0 {
			return nil, nil, fmt.Errorf("make %d lanes: %w", len(unmade), classify(err))
		}
	}
	return claims, states, nil
}

// waitOf is a wait of which NULL says that it is not known.
func waitOf(seconds *float64) time.Duration {
	if seconds == nil {
		return -1
	}
	return max(duration(*seconds), 0)
}

// Each step goes to the next lane: tasks of the lanes between are not read.
const lanesSQL = `-- name: look for lanes
WITH RECURSIVE lane AS (
    (SELECT lane AS name FROM tasks WHERE state = 'waiting' AND lane > $1 ORDER BY lane LIMIT 1)
    UNION ALL
    SELECT (SELECT t.lane FROM tasks t WHERE t.state = 'waiting' AND t.lane > lane.name ORDER BY t.lane LIMIT 1) FROM lane WHERE lane.name IS NOT NULL
), page AS MATERIALIZED (SELECT name FROM lane WHERE name IS NOT NULL LIMIT $2)
SELECT name, EXTRACT(EPOCH FROM LEAST(
    (SELECT run_at FROM tasks t WHERE t.state = 'waiting' AND t.lane = name AND t.priority = 1 ORDER BY t.run_at, t.id LIMIT 1),
    (SELECT run_at FROM tasks t WHERE t.state = 'waiting' AND t.lane = name AND t.priority = 0 ORDER BY t.run_at, t.id LIMIT 1),
    (SELECT run_at FROM tasks t WHERE t.state = 'waiting' AND t.lane = name AND t.priority = -1 ORDER BY t.run_at, t.id LIMIT 1),
    (SELECT run_at FROM tasks t WHERE t.state = 'waiting' AND t.lane = name AND t.priority IS NULL ORDER BY t.run_at, t.id LIMIT 1)) - now())::float8
FROM page`

// Lanes returns up to limit lanes in which tasks wait, in their order, from behind a
// lane on.
func (s *Store) Lanes(ctx context.Context, behind task.Lane, limit int) ([]task.LaneDue, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	rows, err := s.pool.Query(ctx, lanesSQL, string(behind), limit)
	if err != nil {
		return nil, fmt.Errorf("look for lanes: %w", classify(err))
	}
	lanes, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (due task.LaneDue, err error) {
		var wait *float64
		if err := row.Scan((*string)(&due.Lane), &wait); err != nil || wait == nil { // its tasks were claimed meanwhile
			return due, err
		}
		due.Wait = duration(*wait)
		return due, nil
	})
	if err != nil {
		return nil, fmt.Errorf("look for lanes: %w", classify(err))
	}
	return lanes, nil
}

// A row may go an hour after the last claim, once the lowest rate that there is, 0.001 a
// second, has filled its burst up again, and where no task of an ordered key has to know
// which was before it.
const (
	sweepLanesSQL = `-- name: sweep lanes
DELETE FROM lanes WHERE name = ANY (ARRAY(
    SELECT name FROM lanes l WHERE ` + unusedLane + ` AND NOT EXISTS (
        SELECT FROM tasks t WHERE t.state = 'waiting' AND t.lane >= l.name AND t.lane < l.name || '!')
    ORDER BY name LIMIT 10000 FOR UPDATE SKIP LOCKED)) AND ` + unusedLane

	unusedLane = `claimed_at < now() - interval '1 hour' - make_interval(secs => burst_used * 1000)`
)
