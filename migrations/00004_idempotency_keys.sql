-- +goose Up

-- What was handed in under an Idempotency-Key, for as long as the key counts.
CREATE TABLE idempotency_keys (
    key         text        PRIMARY KEY,
    -- SHA-256 of the request, to tell a repeat from another request.
    fingerprint bytea       NOT NULL,
    -- One task, or those of a batch in their order.
    task_ids    uuid[]      NOT NULL,
    expires_at  timestamptz NOT NULL
);
-- For sweeping.
CREATE INDEX idempotency_keys_expired ON idempotency_keys (expires_at);

-- +goose Down
DROP TABLE idempotency_keys;
