package postgres

import (
	"context"
	"fmt"
	"time"
)

// How long a task has waited for a permit, a resume or its host says nothing about the
// service. So this looks at the queues without limits. Each step goes to the next lane, as in
// lanesSQL, and past all lanes of a queue with limits.
var overdueInLanesSQL = `-- name: oldest due task of queues without limits
WITH RECURSIVE step AS (
    (SELECT lane AS name FROM tasks WHERE state = 'waiting' AND lane > '!' ORDER BY lane LIMIT 1)
    UNION ALL
    SELECT (SELECT t.lane FROM tasks t WHERE t.state = 'waiting'
        AND t.lane > CASE WHEN ` + limitedQueue + ` THEN split_part(step.name, '/', 1) || '0' ELSE step.name END ORDER BY t.lane LIMIT 1)
    FROM step WHERE step.name IS NOT NULL
), lane AS MATERIALIZED (SELECT name FROM (SELECT name, ` + limitedQueue + ` AS limited FROM step WHERE name IS NOT NULL LIMIT 1000) step
    WHERE NOT limited AND strpos(name, ' ') = 0
        AND NOT EXISTS (SELECT FROM queue_keys k WHERE k.queue = split_part(step.name, '/', 1) AND k.key = split_part(step.name, '/', 2)))
SELECT COALESCE(EXTRACT(EPOCH FROM now() - min(LEAST(` + firstOfLane(`= 1`) + `, ` + firstOfLane(`= 0`) + `, ` + firstOfLane(`= -1`) + `)))::float8, 0) FROM lane`

// limitedQueue is that the queue of the lane step.name is paused or has a limit, if only for keys.
const limitedQueue = `EXISTS (SELECT FROM queues q WHERE q.name = split_part(step.name, '/', 1) AND (q.paused_at IS NOT NULL OR q.max_concurrent IS NOT NULL
        OR q.max_per_second IS NOT NULL OR q.key_max_concurrent IS NOT NULL OR q.key_max_per_second IS NOT NULL OR q.key_ordered))`

// overdue returns for how long the longest waiting task has been due that waits for nothing
// but a slot: a plain one, or one of a queue without limits, as far as those are among the
// first 1,000 lanes. It is zero where none is due.
func (s *Store) overdue(ctx context.Context) (time.Duration, error) {
	wait, pending, err := s.NextDue(ctx)
	if err != nil {
		return 0, err
	}
	var inLanes float64
	if err := s.pool.QueryRow(ctx, overdueInLanesSQL).Scan(&inLanes); err != nil {
		return 0, fmt.Errorf("ask for the oldest due task: %w", classify(err))
	}
	overdue := duration(inLanes)
	if pending {
		overdue = max(overdue, -wait)
	}
	return max(overdue, 0), nil
}
