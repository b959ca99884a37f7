-- +goose Up
SET LOCAL lock_timeout = '1s';
ALTER TABLE task_history
    ADD COLUMN IF NOT EXISTS hops      smallint,
    ADD COLUMN IF NOT EXISTS parent_id uuid,
    ADD COLUMN IF NOT EXISTS root_id   uuid,
    ADD COLUMN IF NOT EXISTS round     integer;

-- +goose Down
ALTER TABLE task_history
    DROP COLUMN hops,
    DROP COLUMN parent_id,
    DROP COLUMN root_id,
    DROP COLUMN round;
