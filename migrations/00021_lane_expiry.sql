-- +goose NO TRANSACTION
-- +goose Up

-- Waiting tasks that have expired end without a permit. Plain tasks, and those that never
-- expire, have no entry.
CREATE INDEX CONCURRENTLY IF NOT EXISTS tasks_waiting_expiry ON tasks (expires_at) WHERE state = 'waiting' AND expires_at IS NOT NULL;

-- +goose Down
DROP INDEX CONCURRENTLY IF EXISTS tasks_waiting_expiry;
