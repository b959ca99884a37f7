-- +goose Up
SET LOCAL lock_timeout = '1s';
ALTER TABLE tasks
    -- Somebody wants the running task stopped and not tried again.
    ADD COLUMN cancel_requested_at timestamptz,
    -- {"on_success": {"url": …, "headers": {…}}, "on_failure": {…}}; NULL where there is neither.
    ADD COLUMN callbacks           jsonb,
    -- For whom an ID token goes with the call; NULL: none does.
    ADD COLUMN oidc_audience       text,
    -- Who handed it in, as far as callers are known.
    ADD COLUMN created_by          text,
    -- The key of idempotency_keys that a cancellation releases.
    ADD COLUMN idempotency_key     text;

-- +goose Down
ALTER TABLE tasks
    DROP COLUMN cancel_requested_at,
    DROP COLUMN callbacks,
    DROP COLUMN oidc_audience,
    DROP COLUMN created_by,
    DROP COLUMN idempotency_key;
