-- +goose NO TRANSACTION
-- +goose Up

-- For finding the tasks of a queue, and of a flow key in any queue. A plain task has no
-- entry. As in 00005, the indexes of new partitions come with those of the whole table.
CREATE INDEX IF NOT EXISTS task_history_queue ON ONLY task_history (queue, id) WHERE queue IS NOT NULL;
CREATE INDEX CONCURRENTLY IF NOT EXISTS task_history_default_queue ON task_history_default (queue, id) WHERE queue IS NOT NULL;
ALTER INDEX task_history_queue ATTACH PARTITION task_history_default_queue;
CREATE INDEX IF NOT EXISTS task_history_flow_key ON ONLY task_history (flow_key, id) WHERE flow_key IS NOT NULL;
CREATE INDEX CONCURRENTLY IF NOT EXISTS task_history_default_flow_key ON task_history_default (flow_key, id) WHERE flow_key IS NOT NULL;
ALTER INDEX task_history_flow_key ATTACH PARTITION task_history_default_flow_key;

-- +goose Down
DROP INDEX task_history_queue;
DROP INDEX task_history_flow_key;
