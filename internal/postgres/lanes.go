package postgres

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"

	"github.com/melodia/orchestrator/internal/task"
)

// A task with a lane waits in the state waiting, which callers see as pending. So plain
// tasks keep their claim and their index, and a claim from lanes looks at nothing else.

// waiting is the state in the table of a pending task that has a lane.
const waiting task.State = "waiting"

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
// second, has filled its burst up again, and where the task that was claimed last under an
// ordered key is over. A statement looks at the next rows from a name on, so that rows which stay
// are looked at once.
const (
	sweepLanesSQL = `-- name: sweep lanes
WITH page AS MATERIALIZED (
    SELECT name FROM lanes WHERE name > $1 ORDER BY name LIMIT 10000
), locked AS MATERIALIZED (
    SELECT name FROM lanes l WHERE name = ANY (ARRAY(SELECT name FROM page)) AND ` + unusedLane + ` FOR UPDATE SKIP LOCKED
), swept AS (
    DELETE FROM lanes l WHERE name = ANY (ARRAY(SELECT name FROM locked)) AND ` + unusedLane + `
)
SELECT max(name) FROM page`

	unusedLane = `claimed_at < now() - interval '1 hour' - make_interval(secs => burst_used * 1000)
        AND (head IS NULL OR NOT EXISTS (SELECT FROM tasks t WHERE t.id = l.head))`
)

// sweepLanes deletes the rows of lanes that are not needed any more.
func (s *Store) sweepLanes(ctx context.Context) error {
	for last := ""; ; {
		next, err := s.sweepLanesFrom(ctx, last)
		if err != nil {
			return fmt.Errorf("sweep the lanes: %w", err)
		}
		if next == nil {
			return nil
		}
		last = *next
	}
}

func (s *Store) sweepLanesFrom(ctx context.Context, behind string) (last *string, err error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	err = s.pool.QueryRow(ctx, sweepLanesSQL, behind).Scan(&last)
	return last, classify(err)
}
