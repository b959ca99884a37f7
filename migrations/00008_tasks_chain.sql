-- +goose Up
SET LOCAL lock_timeout = '1s';

-- What a plain task does without is NULL.
ALTER TABLE tasks
    -- How many calls led to the request that submitted it; NULL: none.
    ADD COLUMN hops         smallint,
    -- The task whose call submitted it, or whose end it tells, and the first task of
    -- that chain. Their retention may be over.
    ADD COLUMN parent_id    uuid,
    ADD COLUMN root_id      uuid,
    -- 1 more than the number of redrives; NULL: 1.
    ADD COLUMN round        integer,
    -- How many attempts of the round were snoozed; NULL: none.
    ADD COLUMN snooze_count smallint;

-- +goose Down
ALTER TABLE tasks
    DROP COLUMN hops,
    DROP COLUMN parent_id,
    DROP COLUMN root_id,
    DROP COLUMN round,
    DROP COLUMN snooze_count;
