package postgres

import (
	"context"
	"fmt"
)

// A pending task with a lane is one that is carried out in spite of limits, as after MakeDue.
const expireSQL = `-- name: expire waiting tasks
WITH expired AS MATERIALIZED (
    SELECT ctid FROM tasks WHERE state = 'waiting' AND expires_at < now() ORDER BY expires_at LIMIT $1 FOR UPDATE SKIP LOCKED
)
UPDATE tasks SET state = 'pending', run_at = now(), claim = claim + 1 WHERE ctid = ANY (ARRAY(SELECT ctid FROM expired))`

// Expire has up to limit tasks that have expired while they waited for limits, a pause or
// their host claimed as plain ones are: the claim ends them without a call. It returns
// how many there were. Any instance may call it at any time.
func (s *Store) Expire(ctx context.Context, limit int) (n int, err error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	tag, err := s.pool.Exec(ctx, expireSQL, limit)
	if err != nil {
		return 0, fmt.Errorf("expire waiting tasks: %w", classify(err))
	}
	return int(tag.RowsAffected()), nil
}
