-- +goose Up
SET LOCAL lock_timeout = '1s';

-- What the limits of queues, flow keys and hosts are kept with. A claim locks the row
-- before it counts what runs. Rows come with use, and go some time after it.
CREATE TABLE lanes (
    -- "queue/" is the queue, "queue/key" a flow key that has limits, " host" a host: see task.Lane.
    name         text COLLATE "C" PRIMARY KEY,
    -- How often tasks were claimed under it.
    version      bigint           NOT NULL DEFAULT 0,
    -- When tasks were claimed last, and how much of the burst was used up then.
    claimed_at   timestamptz      NOT NULL DEFAULT now(),
    burst_used   double precision NOT NULL DEFAULT 0,
    -- None of its running tasks was claimed before.
    running_from timestamptz      NOT NULL DEFAULT 'epoch',
    -- The task that was claimed last. Of an ordered key no other one is, until that has ended.
    head         uuid
) WITH (
    fillfactor = 50,
    autovacuum_vacuum_scale_factor = 0.0,
    autovacuum_vacuum_threshold = 2000,
    autovacuum_vacuum_cost_delay = 0
);

ALTER TABLE tasks
    -- Where it waits, and what it counts for while it runs; NULL: it is a plain task, for
    -- which there are no limits.
    ADD COLUMN lane text COLLATE "C",
    -- A task of a lane is 'waiting' where a plain one is 'pending'. The shape is for speed:
    -- every statement that writes tasks parses the check anew, a byte of a text at a time.
    DROP CONSTRAINT IF EXISTS tasks_state_check,
    ADD CONSTRAINT tasks_state_check CHECK (
        CASE WHEN worker_id IS NULL THEN
            claimed_at IS NULL AND claim >= 0 AND (state = 'pending' OR state = 'waiting' AND lane IS NOT NULL)
        ELSE
            claimed_at IS NOT NULL AND claim > 0 AND state = 'running'
        END) NOT VALID;

-- +goose Down
UPDATE tasks SET state = 'pending' WHERE state = 'waiting';
ALTER TABLE tasks
    DROP COLUMN lane,
    DROP CONSTRAINT IF EXISTS tasks_state_check,
    ADD CONSTRAINT tasks_state_check CHECK (
        CASE state
            WHEN 'pending' THEN worker_id IS NULL AND claimed_at IS NULL AND claim >= 0
            WHEN 'running' THEN worker_id IS NOT NULL AND claimed_at IS NOT NULL AND claim > 0
            ELSE false
        END);
DROP TABLE lanes;
