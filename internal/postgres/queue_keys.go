package postgres

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/melodia/orchestrator/internal/task"
)

// queueKeyColumns are those of a [task.QueueKey], in the order of scanQueueKey.
const queueKeyColumns = `queue, key, version, max_concurrent, max_per_second, burst, ordered`

func scanQueueKey(row pgx.CollectableRow) (k task.QueueKey, err error) {
	var limits limitsRow
	dests := append([]any{&k.Queue, &k.Key, &k.Version}, limits.dests()...)
	err = row.Scan(append(dests, &k.Ordered)...)
	k.Limits = limits.limits()
	return k, err
}

// A key that has no limits of its own has the version 0.
const putQueueKeySQL = `-- name: write the limits of a flow key
INSERT INTO queue_keys AS k (queue, key, version, max_concurrent, max_per_second, burst, ordered)
SELECT $1, $2, ` + nextVersion + `, $4::int, $5::float8, $6::int, $7::bool
WHERE $3::bigint = 0 OR EXISTS (SELECT FROM queue_keys WHERE queue = $1 AND key = $2)
ON CONFLICT (queue, key) DO UPDATE SET version = GREATEST(k.version + 1, excluded.version),
    max_concurrent = excluded.max_concurrent, max_per_second = excluded.max_per_second, burst = excluded.burst, ordered = excluded.ordered
WHERE k.version = $3
RETURNING ` + queueKeyColumns

// PutQueueKey writes the limits of one flow key, which need not have any, and returns
// them. As with [Store.PutQueue], it returns [task.ErrQueueChanged] where the Version is
// another one by now; and [task.ErrQueueNotFound].
func (s *Store) PutQueueKey(ctx context.Context, k task.QueueKey) (task.QueueKey, error) {
	args := append([]any{k.Queue, k.Key, k.Version}, limitArguments(k.Limits)...)
	written, err := managed(ctx, s, putQueueKeySQL, scanQueueKey, append(args, k.Ordered)...)
	var pgErr *pgconn.PgError
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		err = task.ErrQueueChanged
	case errors.As(err, &pgErr) && pgErr.Code == "23503": // foreign key violation
		err = task.ErrQueueNotFound
	}
	if err != nil {
		return task.QueueKey{}, fmt.Errorf("write the limits of a key of queue %s: %w", k.Queue, err)
	}
	return written, nil
}

const getQueueKeySQL = `-- name: get the limits of a flow key
SELECT ` + queueKeyColumns + ` FROM queue_keys WHERE queue = $1 AND key = $2`

// QueueKey returns the limits of one flow key, or [task.ErrQueueKeyNotFound].
func (s *Store) QueueKey(ctx context.Context, queue, key string) (task.QueueKey, error) {
	return s.oneQueueKey(ctx, "get", getQueueKeySQL, queue, key)
}

const deleteQueueKeySQL = `-- name: delete the limits of a flow key
DELETE FROM queue_keys WHERE queue = $1 AND key = $2 AND ($3::bigint = 0 OR version = $3)
RETURNING ` + queueKeyColumns

// DeleteQueueKey makes a flow key obey the limits that all keys of its queue have. It
// returns [task.ErrQueueKeyNotFound] where the key has none of its own; and, where version
// is not zero and the limits have another one by now, [task.ErrQueueChanged].
func (s *Store) DeleteQueueKey(ctx context.Context, queue, key string, version int64) error {
	_, err := s.oneQueueKey(ctx, "delete", deleteQueueKeySQL, queue, key, version)
	if version != 0 && errors.Is(err, task.ErrQueueKeyNotFound) {
		if _, found := s.QueueKey(ctx, queue, key); !errors.Is(found, task.ErrQueueKeyNotFound) {
			return errors.Join(task.ErrQueueChanged, found)
		}
	}
	return err
}

func (s *Store) oneQueueKey(ctx context.Context, what, sql, queue, key string, more ...any) (task.QueueKey, error) {
	k, err := managed(ctx, s, sql, scanQueueKey, append([]any{queue, key}, more...)...)
	if errors.Is(err, pgx.ErrNoRows) {
		err = task.ErrQueueKeyNotFound
	}
	if err != nil {
		return task.QueueKey{}, fmt.Errorf("%s the limits of a key of queue %s: %w", what, queue, err)
	}
	return k, nil
}

const queueKeysSQL = `-- name: list flow keys with limits of their own
SELECT ` + queueKeyColumns + ` FROM queue_keys WHERE queue = $1 AND key COLLATE "C" > $2 ORDER BY key COLLATE "C" LIMIT $3`

// QueueKeys returns up to limit flow keys of a queue that have limits of their own, in
// the order of their bytes, from behind a key on.
func (s *Store) QueueKeys(ctx context.Context, queue, behind string, limit int) ([]task.QueueKey, error) {
	var found []task.QueueKey
	err := s.search(ctx, func(ctx context.Context, tx pgx.Tx) error {
		rows, err := tx.Query(ctx, queueKeysSQL, queue, behind, limit)
		if err != nil {
			return err
		}
		found, err = pgx.CollectRows(rows, scanQueueKey)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list the keys of queue %s: %w", queue, err)
	}
	return found, nil
}
