-- +goose Up
SET LOCAL lock_timeout = '1s';
ALTER TABLE task_history
    ADD COLUMN completion        jsonb,
    ADD COLUMN completion_tokens bytea,
    ADD COLUMN result            bytea;

-- +goose Down
ALTER TABLE task_history
    DROP COLUMN completion,
    DROP COLUMN completion_tokens,
    DROP COLUMN result;
