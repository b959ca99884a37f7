package postgres

import (
	"bytes"
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"

	"github.com/melodia/orchestrator/internal/task"
)

// insertTries is how often an insert is tried where its idempotency key is
// released at the very moment.
const insertTries = 3

// A statement that loses a key to another one waits for its commit. So that two
// do not wait for each other, each takes its keys in their order; of equal keys
// in one statement the first counts. A key that has expired is taken over. The
// row of one that has not is locked and stays as it is.
func insertOnceSQL(l columns) insertion {
	return newInsertion(l, "insert tasks once", func(p *parameters) string {
		return `taken AS (
    INSERT INTO idempotency_keys (key, fingerprint, task_ids, expires_at)
    SELECT DISTINCT ON (key) key, fingerprint, ARRAY[id], now() + make_interval(secs => ` + p.of("key_seconds") + `)
    FROM unnest(` + p.of("id") + `::uuid[], ` + p.of("idempotency_key") + `::text[], ` + p.of("fingerprints") + `::bytea[])
        WITH ORDINALITY AS k (id, key, fingerprint, place)
    WHERE key IS NOT NULL
    ORDER BY key, place
    ` + takeExpired + `
    RETURNING task_ids[1] AS id
)`
	}, `
WHERE t.idempotency_key IS NULL OR t.id IN (SELECT id FROM taken)`)
}

// As insertOnceSQL, with one key for all tasks.
func insertBatchOnceSQL(l columns) insertion {
	return newInsertion(l, "insert batch once", func(p *parameters) string {
		return `taken AS (
    INSERT INTO idempotency_keys (key, fingerprint, task_ids, expires_at)
    VALUES (` + p.of("key") + `, ` + p.of("key_fingerprint") + `, ` + p.of("id") + `::uuid[], now() + make_interval(secs => ` + p.of("key_seconds") + `))
    ` + takeExpired + `
    RETURNING key
)`
	}, `
WHERE EXISTS (SELECT FROM taken)`)
}

const takeExpired = `ON CONFLICT (key) DO UPDATE
        SET fingerprint = excluded.fingerprint, task_ids = excluded.task_ids, expires_at = excluded.expires_at
        WHERE idempotency_keys.expires_at <= now()`

var errKeyReleased = fmt.Errorf("%w: the idempotency key was released at the same moment", task.ErrUnavailable)

// insertOnce is insert where tasks have idempotency keys: it stores those whose
// keys are free, and says of the others why not.
func (s *Store) insertOnce(ctx context.Context, tasks []newTask) ([]inserted, error) {
	fingerprints := make([][]byte, len(tasks))
	for i, t := range tasks {
		fingerprints[i] = t.Fingerprint
	}
	out, err := s.insertRows(ctx, s.sql.insertOnce, tasks, map[string]any{"fingerprints": fingerprints, "key_seconds": seconds(s.keyWindow)})
	if err != nil {
		return nil, err
	}
	var keys []string
	for i, in := range out {
		if in.createdAt.IsZero() {
			keys = append(keys, tasks[i].IdempotencyKey)
		}
	}
	if keys == nil {
		return out, nil
	}
	// The other tasks are stored: an error from here on is not theirs.
	first, err := s.firstRequests(ctx, keys)
	for i := range out {
		if out[i].createdAt.IsZero() {
			if out[i].err = err; err == nil {
				out[i].err = first[tasks[i].IdempotencyKey].repeated(tasks[i].Fingerprint)
			}
		}
	}
	return out, nil
}

// insertBatchOnce inserts a batch under its idempotency key, unless that is taken.
func (s *Store) insertBatchOnce(ctx context.Context, b *task.Batch, tasks []newTask) ([]inserted, error) {
	out, err := s.insertRows(ctx, s.sql.insertBatchOnce, tasks, map[string]any{
		"key": b.IdempotencyKey, "key_fingerprint": b.Fingerprint, "key_seconds": seconds(s.keyWindow),
	})
	if err != nil || !out[0].createdAt.IsZero() {
		return out, err
	}
	first, err := s.firstRequests(ctx, []string{b.IdempotencyKey})
	if err != nil {
		return nil, err
	}
	return nil, first[b.IdempotencyKey].repeated(b.Fingerprint)
}

// firstRequest is what came first under an idempotency key.
type firstRequest struct {
	fingerprint []byte
	tasks       []task.ID
}

// repeated returns the error for a request that came later.
func (f firstRequest) repeated(fingerprint []byte) error {
	switch {
	case f.tasks == nil: // it is not there any more
		return errKeyReleased
	case !bytes.Equal(f.fingerprint, fingerprint):
		return task.ErrKeyTaken
	default:
		return &task.RepeatError{Tasks: f.tasks}
	}
}

// Repeated says what was stored under an idempotency key: it returns a
// [*task.RepeatError] where it was the request of this fingerprint, and
// [task.ErrKeyTaken] where it was another one. nil is nothing. A key whose window
// has ended counts until it is trimmed.
func (s *Store) Repeated(ctx context.Context, key string, fingerprint []byte) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	first, err := s.firstRequests(ctx, []string{key})
	if found, ok := first[key]; ok && err == nil {
		err = found.repeated(fingerprint)
	}
	if err != nil {
		return fmt.Errorf("look up an idempotency key: %w", err)
	}
	return nil
}

// A statement of its own: what made the other one find a key taken may have
// been committed after that had begun.
const firstRequestsSQL = `-- name: find first requests
SELECT key, fingerprint, task_ids FROM idempotency_keys WHERE key = ANY ($1)`

// firstRequests looks up what came first under keys.
func (s *Store) firstRequests(ctx context.Context, keys []string) (map[string]firstRequest, error) {
	rows, err := s.pool.Query(ctx, firstRequestsSQL, keys)
	if err != nil {
		return nil, classify(err)
	}
	found := make(map[string]firstRequest, len(keys))
	var key string
	var fingerprint []byte
	var ids [][16]byte
	_, err = pgx.ForEachRow(rows, []any{&key, &fingerprint, &ids}, func() error {
		first := firstRequest{bytes.Clone(fingerprint), make([]task.ID, len(ids))}
		for i, id := range ids {
			first.tasks[i] = id
		}
		found[key] = first
		return nil
	})
	return found, classify(err)
}

// A key whose row is locked is being taken over, and counts again.
const trimKeysSQL = `-- name: trim idempotency keys
DELETE FROM idempotency_keys WHERE ctid = ANY (ARRAY(
    SELECT ctid FROM idempotency_keys WHERE expires_at <= now() ORDER BY expires_at LIMIT 10000 FOR UPDATE SKIP LOCKED))`
