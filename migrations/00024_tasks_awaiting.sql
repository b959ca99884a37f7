-- +goose NO TRANSACTION
-- +goose Up

-- For finding those whose target fell silent. Other tasks have no entry.
CREATE INDEX CONCURRENTLY IF NOT EXISTS tasks_awaiting ON tasks (completion_until) WHERE state = 'awaiting';
ALTER TABLE tasks VALIDATE CONSTRAINT tasks_state_check;

-- +goose Down
DROP INDEX CONCURRENTLY IF EXISTS tasks_awaiting;
