-- +goose Up
SET LOCAL lock_timeout = '1s';
ALTER TABLE tasks
    ADD COLUMN IF NOT EXISTS jwt jsonb;

-- +goose Down
ALTER TABLE tasks
    DROP COLUMN jwt;
