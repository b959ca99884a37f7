-- +goose NO TRANSACTION
-- +goose Up

-- For heartbeats: the tasks that a worker is to break off. Only a request to
-- cancel writes to it.
CREATE INDEX CONCURRENTLY IF NOT EXISTS tasks_cancel_requested ON tasks (worker_id) WHERE cancel_requested_at IS NOT NULL;

-- +goose Down
DROP INDEX CONCURRENTLY IF EXISTS tasks_cancel_requested;
