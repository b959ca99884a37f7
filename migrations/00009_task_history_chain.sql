-- +goose Up
SET LOCAL lock_timeout = '1s';
ALTER TABLE task_history
    ADD COLUMN hops      smallint,
    ADD COLUMN parent_id uuid,
    ADD COLUMN root_id   uuid,
    ADD COLUMN round     integer;

-- +goose Down
ALTER TABLE task_history
    DROP COLUMN hops,
    DROP COLUMN parent_id,
    DROP COLUMN root_id,
    DROP COLUMN round;
