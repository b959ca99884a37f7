package postgres

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/melodia/orchestrator/internal/task"
)

// refusalCounts is for how long a task that the database had no room for makes
// Health complain, unless another is inserted before.
const refusalCounts = 10 * time.Second

var (
	errReadOnly = errors.New("the database is read-only")
	errNoRoom   = errors.New("the database had no room for a task (disk, memory or connections)")
)

// Health returns for how long the longest waiting task has been due that waits for no
// limit, zero when none is. An error, which wraps [task.ErrUnavailable], says that the database
// does not answer or takes no tasks: it is read-only, or refused one lately
// because its disk was full. However many ask at once, one query is under way.
func (s *Store) Health(ctx context.Context) (overdue time.Duration, err error) {
	overdue, err = s.probes.Do(ctx, struct{}{})
	if err != nil {
		return 0, fmt.Errorf("probe the database: %w", classify(err))
	}
	return overdue, nil
}

const readOnlySQL = `-- name: is the database read-only
SELECT current_setting('transaction_read_only')::bool`

// probe is the flush of Health.
func (s *Store) probe(ctx context.Context, askers []struct{}) ([]time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	var readOnly bool
	if err := s.pool.QueryRow(ctx, readOnlySQL).Scan(&readOnly); err != nil {
		return nil, err
	}
	if readOnly {
		return nil, fmt.Errorf("%w: %w", task.ErrUnavailable, errReadOnly)
	}
	if at := s.noRoom.Load(); at != nil && time.Since(*at) < refusalCounts { //nolint:forbidigo // how long ago, not when
		return nil, fmt.Errorf("%w: %w", task.ErrUnavailable, errNoRoom)
	}
	overdue, err := s.overdue(ctx)
	if err != nil {
		return nil, err
	}
	return slices.Repeat([]time.Duration{overdue}, len(askers)), nil
}

// noteRoom remembers whether the database had room for tasks.
func (s *Store) noteRoom(insertErr error) {
	switch {
	case errorClass(insertErr) == "53":
		now := time.Now() //nolint:forbidigo // how long ago, not when
		s.noRoom.Store(&now)
	case insertErr == nil && s.noRoom.Load() != nil:
		s.noRoom.Store(nil)
	}
}
