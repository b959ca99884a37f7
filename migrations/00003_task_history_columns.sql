-- +goose Up
SET LOCAL lock_timeout = '1s';
ALTER TABLE task_history
    ADD COLUMN callbacks       jsonb,
    ADD COLUMN oidc_audience   text,
    ADD COLUMN created_by      text,
    ADD COLUMN idempotency_key text;

-- +goose Down
ALTER TABLE task_history
    DROP COLUMN callbacks,
    DROP COLUMN oidc_audience,
    DROP COLUMN created_by,
    DROP COLUMN idempotency_key;
