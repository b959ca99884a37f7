-- +goose Up
SET LOCAL lock_timeout = '1s';
ALTER TABLE tasks
    -- {"timeout_seconds", "heartbeat_seconds"}: the target may take the task and report its
    -- end later. All of these are NULL in other tasks.
    ADD COLUMN completion         jsonb,
    -- SHA-256 of each attempt's token, the latest last.
    ADD COLUMN completion_tokens  bytea,
    -- When the target must have reported something again, and when it must be done.
    ADD COLUMN completion_until   timestamptz,
    ADD COLUMN completion_ends_at timestamptz,
    -- {"progress", "note", "at"} of the latest report.
    ADD COLUMN completion_report  jsonb,
    -- JSON as the bytes that came: jsonb would rewrite numbers and refuse \u0000.
    ADD COLUMN result             bytea,
    -- 'awaiting': the target has taken it, and no instance holds it. Its queue and key count
    -- it by claimed_at.
    DROP CONSTRAINT IF EXISTS tasks_state_check,
    ADD CONSTRAINT tasks_state_check CHECK (
        CASE WHEN worker_id IS NULL THEN
            claim >= 0 AND (claimed_at IS NULL AND (state = 'pending' OR state = 'waiting' AND lane IS NOT NULL) OR claimed_at IS NOT NULL AND state = 'awaiting')
        ELSE
            claimed_at IS NOT NULL AND claim > 0 AND state = 'running'
        END) NOT VALID;

-- +goose Down
UPDATE tasks SET state = CASE WHEN lane IS NULL THEN 'pending' ELSE 'waiting' END, claimed_at = NULL WHERE state = 'awaiting';
ALTER TABLE tasks
    DROP COLUMN completion,
    DROP COLUMN completion_tokens,
    DROP CONSTRAINT IF EXISTS tasks_state_check,
    DROP COLUMN completion_until,
    DROP COLUMN completion_ends_at,
    DROP COLUMN completion_report,
    DROP COLUMN result,
    ADD CONSTRAINT tasks_state_check CHECK (
        CASE WHEN worker_id IS NULL THEN
            claimed_at IS NULL AND claim >= 0 AND (state = 'pending' OR state = 'waiting' AND lane IS NOT NULL)
        ELSE
            claimed_at IS NOT NULL AND claim > 0 AND state = 'running'
        END);
