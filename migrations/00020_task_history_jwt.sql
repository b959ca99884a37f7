-- +goose Up
SET LOCAL lock_timeout = '1s';
ALTER TABLE task_history
    ADD COLUMN IF NOT EXISTS jwt jsonb;

-- +goose Down
ALTER TABLE task_history
    DROP COLUMN jwt;
