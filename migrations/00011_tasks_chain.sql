-- +goose Up
SET LOCAL lock_timeout = '1s';

-- What a plain task does without is NULL. IF NOT EXISTS: builds before the first
-- release added these columns under another number.
ALTER TABLE tasks
    -- How many calls led to the request that submitted it; NULL: none.
    ADD COLUMN IF NOT EXISTS hops         smallint,
    -- The task whose call submitted it, or whose end it tells, and the first task of
    -- that chain. Their retention may be over.
    ADD COLUMN IF NOT EXISTS parent_id    uuid,
    ADD COLUMN IF NOT EXISTS root_id      uuid,
    -- 1 more than the number of redrives; NULL: 1.
    ADD COLUMN IF NOT EXISTS round        integer,
    -- How many attempts of the round were snoozed; NULL: none.
    ADD COLUMN IF NOT EXISTS snooze_count smallint;

-- +goose Down
ALTER TABLE tasks
    DROP COLUMN hops,
    DROP COLUMN parent_id,
    DROP COLUMN root_id,
    DROP COLUMN round,
    DROP COLUMN snooze_count;
