package postgres

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/melodia/orchestrator/internal/task"
)

// A claim from lanes is a transaction of two messages. The first one locks the rows of the queues
// and hosts that it asks, unless another claim has them, and reads what their limits are, what
// runs, and which tasks are due. [choose] then decides what is claimed. The second message claims
// that and ends the transaction.
//
// A permit is a running row: nothing has to be given back. What keeps limits exact is the order of
// the first message. Each of its statements has a snapshot of its own. Those that count what
// runs begin when the locks are held, and so they see all that was claimed under these locks before.
//
// A claim waits for no row of another claim, so claims cannot deadlock. An instance that stalls
// between the two messages loses its locks after callTimeout.
//
// The shapes are for the planner, which knows nothing about how many lanes are asked, and whose
// plan is kept: nothing is joined by name, and subqueries end in LIMIT so that they stay what they are.
const (
	beginSQL    = `BEGIN ISOLATION LEVEL READ COMMITTED`
	commitSQL   = `COMMIT`
	rollbackSQL = `ROLLBACK`

	// The keys of a queue need no locks of their own: who claims from them has that of the queue.
	lockLanesSQL = `-- name: lock the queues and hosts of lanes
SELECT now(), ARRAY(` + lockedQueues + `), ARRAY(SELECT name FROM lanes WHERE name = ANY ($2::text[]) FOR UPDATE SKIP LOCKED),
    set_config('idle_in_transaction_session_timeout', $3, true)`

	lockedQueues = `SELECT name FROM queues WHERE name = ANY ($1::text[]) FOR NO KEY UPDATE SKIP LOCKED`
)

// queueLimitsSQL reads from queues as a claim has locked them. queueRow is the row of the queue a.name.
func queueLimitsSQL(queueRow string) string {
	return `-- name: limits of queues
SELECT a.place - 1, q.paused_at IS NOT NULL, q.max_concurrent, q.max_per_second, q.burst, l.burst_used, l.claimed_at, r.count, r.oldest
FROM unnest($1::text[], $2::timestamptz[]) WITH ORDINALITY a (name, running_from, place) CROSS JOIN LATERAL (` + queueRow + `) q
LEFT JOIN LATERAL (SELECT claimed_at, burst_used FROM lanes l WHERE q.max_per_second > 0 AND l.name = q.name || '/' LIMIT 1) l ON true
CROSS JOIN LATERAL ` + runningOf(`q.max_concurrent`, `t.lane = a.name || '/'`, `t.lane > a.name || '/' AND t.lane < a.name || '0'`)
}

const queueRow = `SELECT * FROM queues WHERE queues.name = a.name LIMIT 1`

// runningOf is how many tasks run under some conditions, as far as that matters to a limit, and when the
// first of them was claimed. None of them was claimed before a.running_from, unless the clock was
// set back. The conditions tell one lane, for which the index leads to that moment, from others.
func runningOf(limit string, conditions ...string) string {
	for i, condition := range conditions {
		conditions[i] = `(SELECT claimed_at FROM tasks t
        WHERE ` + limit + ` > 0 AND ` + condition + `
            AND t.claimed_at >= CASE WHEN a.running_from < now() THEN a.running_from ELSE 'epoch' END
        LIMIT ` + limit + `)`
	}
	return `(SELECT count(*) AS count, min(claimed_at) AS oldest FROM (
    SELECT claimed_at FROM (
        ` + strings.Join(conditions, `
        UNION ALL
        `) + `) running
    LIMIT ` + limit + `) running) r`
}

// The first task of an ordered key is the one that was claimed last, until that has ended.
var keyLimitsSQL = `-- name: limits of flow keys
SELECT a.place - 1, k.ordered, k.max_concurrent, k.max_per_second, k.burst, l.burst_used, l.claimed_at, r.count, r.oldest,
    h.id, h.lane, h.state, h.run_at, COALESCE(EXTRACT(EPOCH FROM h.run_at - now()), 0)::float8, COALESCE(h.priority, 0), ` + hostNotWell(`$4`, `h.url`) + `
FROM unnest($1::text[], $2::text[], $3::timestamptz[]) WITH ORDINALITY a (queue, key, running_from, place) CROSS JOIN LATERAL (
    SELECT ordered, CASE WHEN ordered THEN 1 ELSE max_concurrent END AS max_concurrent, max_per_second, burst FROM (
        SELECT ordered, max_concurrent, max_per_second, burst FROM queue_keys own WHERE own.queue = a.queue AND own.key = a.key
        UNION ALL
        SELECT key_ordered, key_max_concurrent, key_max_per_second, key_burst FROM queues q WHERE q.name = a.queue
        LIMIT 1) k
    WHERE ordered OR max_concurrent > 0 OR max_per_second > 0
    LIMIT 1) k
LEFT JOIN LATERAL (SELECT claimed_at, burst_used, head FROM lanes l WHERE (k.ordered OR k.max_per_second > 0) AND l.name = a.queue || '/' || a.key LIMIT 1) l ON true
CROSS JOIN LATERAL ` + runningOf(`k.max_concurrent`, `t.lane = a.queue || '/' || a.key`, `t.lane > a.queue || '/' || a.key AND t.lane < a.queue || '/' || a.key || '!'`) + `
LEFT JOIN LATERAL (SELECT * FROM tasks t WHERE k.ordered AND t.id = COALESCE(
    (SELECT id FROM tasks t WHERE t.id = l.head AND t.claimed_at IS NULL AND split_part(t.lane, ' ', 1) = a.queue || '/' || a.key),
    (` + firstOfKey + `)) LIMIT 1) h ON true`

// firstOfKey is the task of an ordered key that comes first, in whichever of its lanes it
// waits: the due ones before the others. Each step goes to the next lane, as in lanesSQL.
var firstOfKey = `
        WITH RECURSIVE lane AS (
            (SELECT t.lane AS name FROM tasks t WHERE t.state = 'waiting' AND t.lane >= a.queue || '/' || a.key AND t.lane < a.queue || '/' || a.key || '!' ORDER BY t.lane LIMIT 1)
            UNION ALL
            SELECT (SELECT t.lane FROM tasks t WHERE t.state = 'waiting' AND t.lane > lane.name AND t.lane < a.queue || '/' || a.key || '!' ORDER BY t.lane LIMIT 1)
            FROM lane WHERE lane.name IS NOT NULL
        )
        SELECT t.id FROM lane, LATERAL (` + firstOfLaneAs("1") + ` UNION ALL ` + firstOfLaneAs("0") + ` UNION ALL ` + firstOfLaneAs("-1") + `) t
        ORDER BY t.run_at > now(), t.run_at - t.priority * interval '15 min', t.id LIMIT 1`

// firstOfLaneAs is the first waiting task of the lane name that has a priority.
func firstOfLaneAs(priority string) string {
	return `(SELECT t.id, t.run_at, t.priority FROM tasks t WHERE t.state = 'waiting' AND t.lane = lane.name AND t.priority = ` + priority + ` ORDER BY t.run_at, t.id LIMIT 1)`
}

var hostLimitsSQL = `-- name: running tasks of hosts
SELECT a.place - 1, EXISTS (SELECT FROM lanes l WHERE l.name = ' ' || a.host), r.count, r.oldest
FROM unnest($1::text[], $2::int[], $3::timestamptz[]) WITH ORDINALITY a (host, most, running_from, place),
LATERAL ` + runningOf(`a.most`, `split_part(t.lane, ' ', 2) = a.host AND strpos(t.lane, ' ') > 0`)

// hostNotWell is the host among those of a parameter to which a URL leads; NULL is none.
func hostNotWell(hosts, url string) string {
	return `CASE WHEN ` + hosts + `::text[] IS NOT NULL THEN ` + strings.ReplaceAll(hostOfURL(url), "$1", hosts) + ` END`
}

// waitingInLanesSQL reads the first tasks of each lane, by their priority: one more than is asked
// for, so that it shows whether more are due.
var waitingInLanesSQL = `-- name: look into lanes
SELECT a.place - 1, c.id, c.run_at, EXTRACT(EPOCH FROM c.run_at - now())::float8, c.priority, c.host
FROM unnest($1::text[], $2::int[], $3::timestamptz[], $4::timestamptz[], $5::timestamptz[]) WITH ORDINALITY a (lane, most, low_from, normal_from, high_from, place),
LATERAL (
    ` + waitingOf(`left(a.lane, 1) <> ' '`, `1`, `= 1`, `high_from`) + `
    UNION ALL
    ` + waitingOf(`left(a.lane, 1) <> ' '`, `0`, `= 0`, `normal_from`) + `
    UNION ALL
    ` + waitingOf(`left(a.lane, 1) <> ' '`, `-1`, `= -1`, `low_from`) + `
    UNION ALL
    ` + waitingOf(`left(a.lane, 1) = ' '`, `0`, `IS NULL`, `normal_from`) + `
) c`

// waitingOf is the first tasks of a lane that have a priority.
func waitingOf(condition, priority, is, from string) string {
	return `(SELECT t.id, t.run_at, ` + priority + ` AS priority, CASE WHEN strpos(a.lane, ' ') = 0 THEN ` + hostNotWell(`$6`, `t.url`) + ` END AS host FROM tasks t
        WHERE ` + condition + ` AND t.state = 'waiting' AND t.lane = a.lane AND t.priority ` + is + ` AND t.run_at >= a.` + from + `
        ORDER BY t.run_at, t.id LIMIT a.most + 1)`
}

// claimLanesSQL claims tasks by their ids, each as far as it still waits in the lane in which it was
// seen. They were not locked since.
func claimLanesSQL(l columns) string {
	return `-- name: claim from lanes
WITH locked AS MATERIALIZED (` + lockWaiting(`$2`, `$3`) + ` AND EXISTS (SELECT FROM workers WHERE id = $1)
)
UPDATE tasks t SET state = 'running', claim = t.claim + 1, worker_id = $1,
    claimed_at = now(), first_claimed_at = COALESCE(t.first_claimed_at, now())
WHERE t.ctid = ANY (ARRAY(SELECT tid FROM locked))
RETURNING ` + claimedColumns(l) + `, t.lane`
}

// lockWaiting is the places of tasks that are due in the lanes given beside their ids, and
// that no other transaction has locked: they are locked. BETWEEN keeps the planner from going through a
// lane for each of its tasks.
func lockWaiting(ids, lanes string) string {
	return `
    SELECT t.tid FROM unnest(` + ids + `::uuid[], ` + lanes + `::text[]) c (id, lane), LATERAL (
        SELECT t.ctid AS tid FROM tasks t WHERE t.id = c.id AND t.lane = c.lane AND t.state BETWEEN 'waiting' AND 'waiting' AND t.run_at <= now() LIMIT 1 FOR UPDATE SKIP LOCKED) t
    WHERE true`
}

var (
	// holdBackClaimedSQL moves tasks that a claim found to the lanes of their hosts.
	holdBackClaimedSQL = `-- name: move tasks that are not claimed to the lanes of their hosts
WITH locked AS MATERIALIZED (` + lockWaiting(`$2`, `$3`) + `
)
UPDATE tasks t SET lane = t.lane || ' ' || ` + hostOfURL("t.url") + `
WHERE t.ctid = ANY (ARRAY(SELECT tid FROM locked)) AND ` + hostOfURL("t.url") + ` IS NOT NULL`

	// keepLanesSQL keeps what is used up of rates, and the heads of ordered keys. Only who has the lock of the
	// queue writes to these rows; the sweep does not wait. A head that was changed meanwhile is none: it may be
	// due much later.
	keepLanesSQL = `-- name: keep what is left of rates
INSERT INTO lanes AS l (name, claimed_at, burst_used, head)
SELECT * FROM unnest($2::text[], $3::timestamptz[], $4::float8[], $5::uuid[]) k (name, claimed_at, burst_used, head)
WHERE EXISTS (SELECT FROM workers WHERE id = $1) AND (k.head IS NULL OR EXISTS (SELECT FROM tasks t WHERE t.id = k.head AND t.worker_id = $1))
ORDER BY 1
ON CONFLICT (name) DO UPDATE SET claimed_at = excluded.claimed_at, burst_used = excluded.burst_used, head = excluded.head`

	// makeLanesSQL makes the rows of hosts whose limits are needed for the first time. It is a
	// statement of its own: it waits for another one that makes the same row, which a claim that holds
	// locks must not do. Two of these wait in the order of the names.
	makeLanesSQL = `-- name: make lanes
INSERT INTO lanes (name) SELECT DISTINCT n.name FROM unnest($1::text[]) n (name)
ORDER BY n.name
ON CONFLICT DO NOTHING`
)

// ClaimLanes takes up to limit due tasks from some lanes, 256 at most, for worker: as many
// of each as the limits of its queue, its key and its host allow, and the lane's Most at
// most. Within a lane the longest due come first, and those of a higher priority count as
// due earlier; the lanes have turns. Of an ordered key the task that was claimed last comes
// first until it has ended. It also returns what is left in each lane.
//
// Tasks of unhealthy hosts are not claimed, unless they wait in the lane of their host: they are
// moved there, and use up no limit.
//
// The tasks come as from [Store.Claim], with their lanes.
func (s *Store) ClaimLanes(ctx context.Context, worker task.ID, asks []task.LaneAsk, unhealthy []string, limit int) ([]*task.Claim, []task.LaneState, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	c := s.newLaneClaim(worker, asks[:min(len(asks), maxBatch)], unhealthy, min(limit, maxBatch))
	err := s.claimFrom(ctx, c)
	if err != nil {
		return nil, nil, fmt.Errorf("claim tasks from %d lanes: %w", len(asks), classify(err))
	}
	states := make([]task.LaneState, len(c.lanes))
	for i, l := range c.lanes {
		states[i] = l.state()
	}
	if len(c.unmade) > 0 {
		// An error must not hide what was claimed: the next claim reports the rows again.
		if _, err := s.pool.Exec(ctx, makeLanesSQL, c.unmade); err != nil && len(c.claims) == 0 {
			return nil, nil, fmt.Errorf("make %d lanes: %w", len(c.unmade), classify(err))
		}
	}
	return c.claims, states, nil
}

// laneClaim is one claim from lanes.
type laneClaim struct {
	worker    task.ID
	unhealthy []string
	limit     int
	began     time.Time // by a monotonic clock
	now       time.Time // by the database's clock

	lanes []*askedLane
	// locked is the rows of queues and hosts that the claim has locked.
	locked map[string]bool
	// queues, keys and hosts are those of the lanes that may have limits, each once.
	queues, keys, hosts []*limited

	claims []*task.Claim
	// unmade are the rows of hosts that are missing.
	unmade []string
}

// limited is a queue, a flow key or a host of lanes that are asked.
type limited struct {
	row   string // its name in lanes: "queue/", "queue/key" or " host"
	lanes []*askedLane
	most  int // of a host: how many tasks may run

	// permits is nil where it has no limits.
	permits *permits
	at      time.Time // to which burst_used belongs
	ordered bool
}

func (s *Store) newLaneClaim(worker task.ID, asks []task.LaneAsk, unhealthy []string, limit int) *laneClaim {
	c := &laneClaim{worker: worker, unhealthy: unhealthy, limit: limit, lanes: make([]*askedLane, len(asks))}
	rows := make(map[string]*limited)
	of := func(list *[]*limited, row string, l *askedLane) *limited {
		one := rows[row]
		if one == nil {
			one = &limited{row: row}
			rows[row] = one
			*list = append(*list, one)
		}
		one.lanes = append(one.lanes, l)
		return one
	}
	for i, ask := range asks {
		l := &askedLane{LaneAsk: ask, next: -1}
		c.lanes[i] = l
		queue, key, host := ask.Lane.Queue(), ask.Lane.Key(), ask.Lane.Host()
		if queue != "" {
			of(&c.queues, queue+"/", l)
		}
		if key != "" {
			of(&c.keys, string(ask.Lane.At("")), l)
		}
		if host != "" && ask.Running > 0 {
			one := of(&c.hosts, " "+host, l)
			one.most = max(one.most, ask.Running)
		}
	}
	return c
}

// claimFrom makes a claim.
func (s *Store) claimFrom(ctx context.Context, c *laneClaim) error {
	conn, err := s.pool.Acquire(ctx)
	if err != nil {
		return err
	}
	defer conn.Release() // which closes it where the transaction is still open
	c.began = time.Now() //nolint:forbidigo // how long ago, not when
	if err := s.look(ctx, conn, c); err != nil {
		return err
	}
	looked := time.Now() //nolint:forbidigo // how long ago, not when
	choose(c.lanes, c.limit)
	if !slices.ContainsFunc(c.lanes, func(l *askedLane) bool { return len(l.chosen)+len(l.held) > 0 }) {
		_, err = conn.Exec(ctx, rollbackSQL) // there is nothing to wait for
	} else {
		err = s.claimChosen(ctx, conn, c)
	}
	if err != nil {
		return err
	}
	for _, l := range c.lanes {
		if l.ordered {
			continue
		}
		s.laneMarks.waited(string(l.Lane), l.from, l.seen(c.now), looked.Sub(c.began), looked)
	}
	return nil
}

// look begins the transaction, locks what the lanes have in common, and reads what there is to know.
func (s *Store) look(ctx context.Context, conn *pgxpool.Conn, c *laneClaim) error {
	known := make(map[*limited]bool)
	b := &pgx.Batch{}
	b.Queue(beginSQL)
	queues, queuesFrom := s.running(c, c.queues, func(row string) string { return strings.TrimSuffix(row, "/") })
	hosts, hostsFrom := s.running(c, c.hosts, func(row string) string { return row[1:] })
	hostRows, hostsMost := make([]string, len(c.hosts)), make([]int32, len(c.hosts))
	for i, h := range c.hosts {
		hostRows[i], hostsMost[i] = h.row, int32(min(h.most, 1<<30)) //nolint:gosec // bounded
	}
	b.Queue(s.sql.lockLanes, queues, hostRows, strconv.Itoa(int(callTimeout.Milliseconds()))).QueryRow(func(row pgx.Row) error {
		var lockedQueues, lockedHosts []string
		if err := row.Scan(&c.now, &lockedQueues, &lockedHosts, nil); err != nil {
			return err
		}
		c.locked = make(map[string]bool, len(lockedQueues)+len(lockedHosts))
		for _, queue := range lockedQueues {
			c.locked[queue+"/"] = true
		}
		for _, row := range lockedHosts {
			c.locked[row] = true
		}
		return nil
	})
	if len(queues) > 0 {
		b.Queue(s.sql.queueLimits, queues, queuesFrom).Query(func(rows pgx.Rows) error {
			var r limitedRow
			var place int
			var paused bool
			_, err := pgx.ForEachRow(rows, append([]any{&place, &paused}, r.dests()...), func() error {
				q := c.queues[place]
				known[q] = true
				for _, l := range q.lanes {
					l.paused = paused
				}
				s.limit(c, q, q.row, &r)
				return nil
			})
			return err
		})
	}
	if len(c.keys) > 0 {
		s.lookAtKeys(b, c)
	}
	if len(c.hosts) > 0 {
		b.Queue(hostLimitsSQL, hosts, hostsMost, hostsFrom).Query(func(rows pgx.Rows) error {
			var r limitedRow
			var place int
			var made bool
			_, err := pgx.ForEachRow(rows, []any{&place, &made, &r.running, &r.oldest}, func() error {
				h := c.hosts[place]
				r.maxConcurrent = &h.most
				s.limit(c, h, h.row, &r)
				if !made {
					c.unmade = append(c.unmade, h.row)
				}
				return nil
			})
			return err
		})
	}
	s.lookIntoLanes(b, c)
	if err := conn.SendBatch(ctx, b).Close(); err != nil {
		return err
	}
	// A queue that has no row was deleted while its task came: it has no limits.
	for _, q := range c.queues {
		others := known[q] && !c.locked[q.row]
		for _, l := range q.lanes {
			l.queue, l.others = q.permits, others
		}
	}
	for _, k := range c.keys {
		for _, l := range k.lanes {
			l.key = k.permits
		}
	}
	for _, h := range c.hosts {
		for _, l := range h.lanes {
			l.host, l.others = h.permits, l.others || !c.locked[h.row]
		}
	}
	for _, l := range c.lanes {
		if !l.ordered {
			for _, w := range l.waiting {
				l.add(w.candidate, w.wait)
			}
		}
	}
	return nil
}

// running returns the names of what has limits, as name makes them of its row, and where the
// counts of what runs begin.
func (s *Store) running(c *laneClaim, list []*limited, name func(row string) string) (names []string, from []time.Time) {
	names, from = make([]string, len(list)), make([]time.Time, len(list))
	for i, one := range list {
		names[i], from[i] = name(one.row), s.laneMarks.runningFrom(one.row, c.began)
	}
	return names, from
}

// limitedRow is the limits of a queue, key or host, and what is used of them.
type limitedRow struct {
	limitsRow
	used       *float64
	at, oldest *time.Time
	running    int
}

func (r *limitedRow) dests() []any {
	return append(r.limitsRow.dests(), &r.used, &r.at, &r.running, &r.oldest)
}

// limit notes the limits that one has, and which row claims of its tasks lock. Without that lock a claim may be
// under way since long ago whose tasks were not counted.
func (s *Store) limit(c *laneClaim, one *limited, lock string, r *limitedRow) {
	limits := r.limits()
	if limits.MaxConcurrent == 0 && limits.MaxPerSecond == 0 {
		return
	}
	one.at = zeroNull(r.at)
	one.permits = newPermits(limits, r.running, zeroNull(r.used), one.at, c.now)
	if c.locked[lock] && r.running < limits.MaxConcurrent { // all of them were counted
		s.laneMarks.ran(one.row, zeroNull(r.oldest), c.now, c.began)
	}
}

// lookAtKeys has the limits of flow keys read, and the first tasks of ordered ones.
func (s *Store) lookAtKeys(b *pgx.Batch, c *laneClaim) {
	rows, from := s.running(c, c.keys, func(row string) string { return row })
	queues, keys := make([]string, len(rows)), make([]string, len(rows))
	for i, row := range rows {
		queues[i], keys[i], _ = strings.Cut(row, "/")
	}
	b.Queue(keyLimitsSQL, queues, keys, from, c.unhealthy).Query(func(rows pgx.Rows) error {
		var (
			r           limitedRow
			place       int
			ordered     bool
			id          *[16]byte
			lane, state *string
			runAt       *time.Time
			wait        float64
			first       candidate
			host        *string
		)
		_, err := pgx.ForEachRow(rows, append(append([]any{&place, &ordered}, r.dests()...), &id, &lane, &state, &runAt, &wait, &first.priority, &host), func() error {
			k := c.keys[place]
			k.ordered = ordered
			s.limit(c, k, queues[place]+"/", &r)
			if !ordered {
				return nil
			}
			for _, l := range k.lanes {
				l.ordered = true
				switch {
				case id == nil:
				case zeroNull(lane) == string(l.Lane) && zeroNull(state) == string(waiting):
					first.id, first.runAt, first.host = *id, *runAt, zeroNull(host)
					l.add(first, duration(wait))
				default:
					l.blocked = true
				}
			}
			return nil
		})
		return err
	})
}

// lookIntoLanes has the first tasks of the lanes read.
func (s *Store) lookIntoLanes(b *pgx.Batch, c *laneClaim) {
	n := len(c.lanes)
	lanes, most := make([]string, n), make([]int32, n)
	var from [3][]time.Time
	for i, l := range c.lanes {
		lanes[i], most[i] = string(l.Lane), int32(min(l.Most, maxBatch)) //nolint:gosec // bounded
		l.from = s.laneMarks.waitingFrom(lanes[i], c.began)
		for p := range from {
			from[p] = append(from[p], l.from[p])
		}
	}
	b.Queue(s.sql.waitingInLanes, lanes, most, from[0], from[1], from[2], c.unhealthy).Query(func(rows pgx.Rows) error {
		var (
			place int
			w     waitingTask
			wait  float64
			host  *string
		)
		_, err := pgx.ForEachRow(rows, []any{&place, &w.id, &w.runAt, &wait, &w.priority, &host}, func() error {
			l := c.lanes[place]
			w.wait, w.host = duration(wait), zeroNull(host)
			l.waiting = append(l.waiting, w)
			return nil
		})
		return err
	})
}

// claimChosen claims what was chosen and commits. Some of it may have been changed meanwhile.
func (s *Store) claimChosen(ctx context.Context, conn *pgxpool.Conn, c *laneClaim) error {
	var ids, heldIDs [][16]byte
	var lanes, heldLanes []string
	byName := make(map[task.Lane]*askedLane, len(c.lanes))
	for _, l := range c.lanes {
		byName[l.Lane] = l
		for _, t := range l.chosen {
			ids, lanes = append(ids, t.id), append(lanes, string(l.Lane))
		}
		for _, t := range l.held {
			heldIDs, heldLanes = append(heldIDs, t.id), append(heldLanes, string(l.Lane))
		}
	}
	b := &pgx.Batch{}
	if len(ids) > 0 {
		b.Queue(s.sql.claimLanes, [16]byte(c.worker), ids, lanes).Query(func(rows pgx.Rows) (err error) {
			c.claims, err = pgx.AppendRows(make([]*task.Claim, 0, len(ids)), rows, s.scanClaimWithLane())
			return err
		})
	}
	if len(heldIDs) > 0 {
		b.Queue(holdBackClaimedSQL, c.unhealthy, heldIDs, heldLanes)
	}
	c.keep(b)
	b.Queue(commitSQL).Exec(func(tag pgconn.CommandTag) error {
		if tag.String() != commitSQL {
			return fmt.Errorf("%w: the claim was rolled back", task.ErrUnavailable)
		}
		return nil
	})
	if err := conn.SendBatch(ctx, b).Close(); err != nil {
		c.claims = nil
		return err
	}
	for _, one := range c.claims {
		byName[one.Task.Lane()].claimed++
	}
	for _, l := range c.lanes {
		l.take(l.claimed - len(l.chosen))
	}
	return nil
}

// keep has noted what is used up of rates, and which tasks of ordered keys come first now.
func (c *laneClaim) keep(b *pgx.Batch) {
	var names []string
	var at []time.Time
	var used []float64
	var heads []*[16]byte
	for _, list := range [...][]*limited{c.queues, c.keys} {
		for _, one := range list {
			p := one.permits
			if p == nil || p.taken == 0 || p.rate == 0 && !one.ordered {
				continue
			}
			var head *[16]byte
			if one.ordered {
				for _, l := range one.lanes {
					if len(l.chosen) > 0 {
						head = &l.chosen[0].id
					}
				}
			}
			names, at = append(names, one.row), append(at, claimedAt(one.at, c.now))
			heads = append(heads, head)
			if p.rate > 0 {
				used = append(used, p.used+float64(p.taken))
			} else {
				used = append(used, 0)
			}
		}
	}
	if len(names) > 0 {
		b.Queue(keepLanesSQL, [16]byte(c.worker), names, at, used, heads)
	}
}
