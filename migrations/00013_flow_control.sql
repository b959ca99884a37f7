-- +goose Up
SET LOCAL lock_timeout = '1s';

-- The settings of a queue. A row comes with the first task that names the queue; a
-- limit that is NULL is none. Keys are the tasks' flow keys.
CREATE TABLE queues (
    name               text             PRIMARY KEY,
    -- Grows whenever the settings are written: microseconds since 1970, or 1 more than
    -- before, so that it also grows where they were deleted in between. 0: they never were.
    version            bigint           NOT NULL DEFAULT 0,
    created_at         timestamptz      NOT NULL DEFAULT now(),
    -- Since when none of its tasks is started; NULL: they are.
    paused_at          timestamptz,
    max_concurrent     integer,
    max_per_second     double precision,
    -- NULL beside a rate: the rate, rounded up.
    burst              integer,
    -- What each key has that queue_keys does not name.
    key_max_concurrent integer,
    key_max_per_second double precision,
    key_burst          integer,
    key_ordered        boolean          NOT NULL DEFAULT false,
    -- {"timeout_seconds": …, "retry": {…}} of tasks that do not say; NULL: none.
    defaults           jsonb,

    CONSTRAINT queues_limits_check CHECK (max_concurrent > 0 AND max_per_second > 0 AND burst > 0
        AND key_max_concurrent > 0 AND key_max_per_second > 0 AND key_burst > 0)
);

-- What holds for one key in place of the queue's key_* settings, all of them.
CREATE TABLE queue_keys (
    queue          text             NOT NULL REFERENCES queues ON DELETE CASCADE,
    key            text             NOT NULL,
    version        bigint           NOT NULL,
    max_concurrent integer,
    max_per_second double precision,
    burst          integer,
    ordered        boolean          NOT NULL DEFAULT false,

    PRIMARY KEY (queue, key),
    CONSTRAINT queue_keys_limits_check CHECK (max_concurrent > 0 AND max_per_second > 0 AND burst > 0)
);

ALTER TABLE tasks
    -- All NULL in a plain task.
    ADD COLUMN queue    text,
    ADD COLUMN flow_key text,
    -- 1 high, 0 normal, -1 low.
    ADD COLUMN priority smallint;

-- +goose Down
ALTER TABLE tasks
    DROP COLUMN queue,
    DROP COLUMN flow_key,
    DROP COLUMN priority;
DROP TABLE queue_keys;
DROP TABLE queues;
