-- +goose NO TRANSACTION
-- +goose Up

-- What a plain task does without is NULL.
ALTER TABLE tasks
    -- How many calls led to the request that handed it in; NULL: none.
    ADD COLUMN IF NOT EXISTS hops         smallint,
    -- The task whose call led to it, or whose end it tells, and the first one of
    -- that chain. Neither need be there any more.
    ADD COLUMN IF NOT EXISTS parent_id    uuid,
    ADD COLUMN IF NOT EXISTS root_id      uuid,
    -- 1 more than the number of redrives; NULL: 1.
    ADD COLUMN IF NOT EXISTS round        integer,
    -- How many attempts of the round were snoozed; NULL: none.
    ADD COLUMN IF NOT EXISTS snooze_count smallint;

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
ALTER TABLE tasks
    DROP COLUMN hops,
    DROP COLUMN parent_id,
    DROP COLUMN root_id,
    DROP COLUMN round,
    DROP COLUMN snooze_count;
