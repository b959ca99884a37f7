-- +goose NO TRANSACTION
-- +goose Up

-- For finding who handed in what. The index of the table as a whole is made at
-- once, and those of new partitions come with it.
CREATE INDEX IF NOT EXISTS task_history_created_by ON ONLY task_history (created_by, id) WHERE created_by IS NOT NULL;
CREATE INDEX CONCURRENTLY IF NOT EXISTS task_history_default_created_by ON task_history_default (created_by, id) WHERE created_by IS NOT NULL;
ALTER INDEX task_history_created_by ATTACH PARTITION task_history_default_created_by;

-- +goose Down
DROP INDEX task_history_created_by;
