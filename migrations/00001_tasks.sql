-- +goose Up

-- Who dispatches. A row is an instance's lease on every task it runs.
CREATE TABLE workers (
    id           uuid        PRIMARY KEY,
    started_at   timestamptz NOT NULL DEFAULT now(),
    heartbeat_at timestamptz NOT NULL DEFAULT now(),
    name         text        NOT NULL
);

-- What is not over. Rows are short-lived: each is inserted, claimed once or a
-- few times, and deleted when its task ends. Durations are seconds.
CREATE TABLE tasks (
    id                         uuid             PRIMARY KEY,
    run_at                     timestamptz      NOT NULL,
    created_at                 timestamptz      NOT NULL,
    expires_at                 timestamptz,
    claimed_at                 timestamptz,
    first_claimed_at           timestamptz,
    worker_id                  uuid,
    claim                      bigint           NOT NULL DEFAULT 0,
    timeout_seconds            double precision NOT NULL,
    max_retry_duration_seconds double precision NOT NULL,
    min_backoff_seconds        double precision NOT NULL,
    max_backoff_seconds        double precision NOT NULL,
    max_attempts               integer          NOT NULL,
    max_doublings              integer          NOT NULL,
    attempt_count              integer          NOT NULL DEFAULT 0,
    retry_client_errors        boolean          NOT NULL,
    state                      text             NOT NULL DEFAULT 'pending',
    method                     text             NOT NULL,
    url                        text             NOT NULL,
    content_type               text             NOT NULL,
    headers                    jsonb            NOT NULL,
    labels                     jsonb            NOT NULL,
    attempts                   jsonb            NOT NULL DEFAULT '[]',
    -- The bytes as they came: jsonb would rewrite numbers and refuse \u0000.
    body                       bytea,

    -- Few and cheap: every statement prepares them, and every row goes through them.
    CONSTRAINT tasks_state_check CHECK (
        CASE state
            WHEN 'pending' THEN worker_id IS NULL AND claimed_at IS NULL AND claim >= 0
            WHEN 'running' THEN worker_id IS NOT NULL AND claimed_at IS NOT NULL AND claim > 0
            ELSE false
        END),
    CONSTRAINT tasks_attempt_count_check CHECK (attempt_count BETWEEN 0 AND max_attempts),
    CONSTRAINT tasks_attempts_is_array CHECK (jsonb_typeof(attempts) = 'array')
) WITH (
    -- Every claim and every end leaves a dead row: vacuum early, by count and
    -- not by share, and do not nap.
    fillfactor = 80,
    autovacuum_vacuum_scale_factor = 0.0,
    autovacuum_vacuum_threshold = 5000,
    autovacuum_vacuum_insert_scale_factor = 0.0,
    autovacuum_vacuum_insert_threshold = 100000,
    autovacuum_analyze_scale_factor = 0.0,
    autovacuum_analyze_threshold = 20000,
    autovacuum_vacuum_cost_delay = 0
);

-- Exactly the claim's WHERE and ORDER BY.
CREATE INDEX tasks_due ON tasks (run_at, id) WHERE state = 'pending';
-- For reaping: the tasks of a worker that fell silent.
CREATE INDEX tasks_running ON tasks (worker_id) WHERE state = 'running';

-- What is over, by the day it ended (UTC). The service creates the partitions
-- ahead of time and drops them whole when their retention ends; the default
-- one is there so that an insert can never fail.
CREATE TABLE task_history (
    id                         uuid             NOT NULL,
    run_at                     timestamptz      NOT NULL,
    created_at                 timestamptz      NOT NULL,
    finished_at                timestamptz      NOT NULL,
    expires_at                 timestamptz,
    claim                      bigint           NOT NULL,
    timeout_seconds            double precision NOT NULL,
    max_retry_duration_seconds double precision NOT NULL,
    min_backoff_seconds        double precision NOT NULL,
    max_backoff_seconds        double precision NOT NULL,
    max_attempts               integer          NOT NULL,
    max_doublings              integer          NOT NULL,
    attempt_count              integer          NOT NULL,
    retry_client_errors        boolean          NOT NULL,
    state                      text             NOT NULL,
    reason                     text             NOT NULL,
    method                     text             NOT NULL,
    url                        text             NOT NULL,
    content_type               text             NOT NULL,
    headers                    jsonb            NOT NULL,
    labels                     jsonb            NOT NULL,
    attempts                   jsonb            NOT NULL,
    body                       bytea,

    -- A unique key of a partitioned table must contain the partition's key.
    PRIMARY KEY (id, finished_at),
    CONSTRAINT task_history_state_check CHECK (
        CASE state
            WHEN 'succeeded' THEN reason = ''
            WHEN 'failed' THEN reason IN ('attempts_exhausted', 'retry_duration_exhausted', 'client_error', 'expired', 'target_refused')
            WHEN 'cancelled' THEN reason = ''
            ELSE false
        END),
    CONSTRAINT task_history_attempt_count_check CHECK (attempt_count BETWEEN 0 AND max_attempts)
) PARTITION BY RANGE (finished_at);

CREATE TABLE task_history_default PARTITION OF task_history DEFAULT;

-- For finding. These four every ended task pays for, the last one if it has
-- labels; together they take some three microseconds of it.
CREATE INDEX task_history_finished ON task_history (finished_at, id);
CREATE INDEX task_history_run ON task_history (run_at, id);
CREATE INDEX task_history_url ON task_history (url text_pattern_ops);
-- What waits to be sorted in is read by each search, and by one task in the end.
CREATE INDEX task_history_labels ON task_history USING gin (labels jsonb_path_ops)
    WITH (gin_pending_list_limit = 256) WHERE labels <> '{}';
-- These a task that succeeds at once does not touch. Of the first two the
-- number of entries is known without counting.
CREATE INDEX task_history_failed ON task_history (id) WHERE state = 'failed';
CREATE INDEX task_history_cancelled ON task_history (id) WHERE state = 'cancelled';
CREATE INDEX task_history_reason ON task_history (reason, id) WHERE state = 'failed';
CREATE INDEX task_history_retried ON task_history (attempt_count, id) WHERE attempt_count > 1;

-- +goose Down
DROP TABLE task_history;
DROP TABLE tasks;
DROP TABLE workers;
