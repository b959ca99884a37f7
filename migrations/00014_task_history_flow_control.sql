-- +goose Up
SET LOCAL lock_timeout = '1s';
ALTER TABLE task_history
    ADD COLUMN queue    text,
    ADD COLUMN flow_key text,
    ADD COLUMN priority smallint;

-- +goose Down
ALTER TABLE task_history
    DROP COLUMN queue,
    DROP COLUMN flow_key,
    DROP COLUMN priority;
