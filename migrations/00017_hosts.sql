-- +goose Up

-- What all instances know about hosts that are congested, broken or held back: a host that
-- is healthy has no row, so the table is empty as a rule. Every instance reads all of it
-- once in POLL_INTERVAL.
CREATE TABLE hosts (
    -- Scheme, name and port: see task.HostOf.
    name            text        PRIMARY KEY,
    -- One more with each write. It begins with the microseconds since 1970, so that a row
    -- which is deleted and comes back has none that another had.
    version         bigint      NOT NULL DEFAULT EXTRACT(EPOCH FROM clock_timestamp()) * 1000000,
    since           timestamptz NOT NULL DEFAULT now(),
    changed_at      timestamptz NOT NULL DEFAULT now(),
    congested_until timestamptz,
    -- No call starts before: a Retry-After, and the breaker.
    held_until      timestamptz,
    open_until      timestamptz,
    -- How often the breaker opened without a recovery in between.
    opened          integer     NOT NULL DEFAULT 0,
    -- Calls at a time of all instances, and up to how many that doubles; 0: no limit.
    allowed         integer     NOT NULL DEFAULT 0,
    doubled         integer     NOT NULL DEFAULT 0,
    -- One sentence for people.
    why             text        NOT NULL DEFAULT ''
);

-- +goose Down
DROP TABLE hosts;
