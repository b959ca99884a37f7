-- +goose Up
SET LOCAL lock_timeout = '1s';

-- How many tasks it carries out at a time; 0: it takes none by itself. NULL: an
-- instance of an older version, which did not say.
ALTER TABLE workers ADD COLUMN concurrency integer;

-- +goose Down
ALTER TABLE workers DROP COLUMN concurrency;
