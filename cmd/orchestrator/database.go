package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/melodia/orchestrator/internal/config"
	"github.com/melodia/orchestrator/internal/postgres"
	"github.com/melodia/orchestrator/internal/task"
)

// databaseWait is how long the database may be away at the start.
const databaseWait = 30 * time.Second

// opening is a store that is being opened.
type opening struct {
	cancel context.CancelFunc
	done   chan struct{} // closed when the store is open, or cannot be opened
	store  *postgres.Store
	err    error
}

// startOpening opens the store in the background, as [openStore] says.
func startOpening(ctx context.Context, c *config.Config, log *slog.Logger, starting func(reason string)) *opening {
	ctx, cancel := context.WithCancel(ctx)
	o := &opening{cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(o.done)
		o.store, o.err = openStore(ctx, c, log, starting)
	}()
	return o
}

// close gives the opening up and closes the store. It returns when nothing of it is left.
func (o *opening) close(context.Context) {
	o.cancel()
	<-o.done
	if o.store != nil {
		o.store.Close()
	}
}

// openStore migrates the database if it is to, and connects. It waits for a
// database that is just starting, and says for what: to starting, at once, and to the log.
func openStore(ctx context.Context, c *config.Config, log *slog.Logger, starting func(reason string)) (*postgres.Store, error) {
	deadline := time.NewTimer(databaseWait) // a migration may take longer
	defer deadline.Stop()
	for {
		store, err := tryOpen(ctx, c, log, starting)
		if !errors.Is(err, task.ErrUnavailable) {
			return store, err
		}
		starting("the database is not ready: the log says why")
		if ctx.Err() == nil {
			log.Warn("the database is not there yet, trying again", "error", err)
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("stopped while waiting for the database: %w", err)
		case <-deadline.C:
			return nil, fmt.Errorf("gave up after %s: %w", databaseWait, err)
		case <-time.After(time.Second):
		}
	}
}

func tryOpen(ctx context.Context, c *config.Config, log *slog.Logger, starting func(reason string)) (*postgres.Store, error) {
	if c.MigrateOnStart {
		applied, err := postgres.Migrate(ctx, c.DatabaseURL, observeMigrations(log, starting))
		if err != nil {
			return nil, err
		}
		if applied > 0 {
			log.Info("migrated the database", "applied", applied)
		}
	}
	return postgres.Open(ctx, postgres.Options{
		URL: c.DatabaseURL, MaxConns: c.DatabaseMaxConns, Callbacks: c.Defaults(), IdempotencyWindow: c.IdempotencyWindow,
	})
}

// waitingInterval is how often the log says what migrations wait for.
const waitingInterval = 10 * time.Second

// observeMigrations has the log say what migrations wait for: at once, when that
// changes, and every 10 s.
func observeMigrations(log *slog.Logger, starting func(reason string)) postgres.MigrationObserver {
	var last string
	var logged time.Time
	return postgres.MigrationObserver{
		Waiting: func(reason string) {
			if reason == "" {
				return
			}
			starting(reason)
			if reason == last && time.Since(logged) < waitingInterval {
				return
			}
			last, logged = reason, time.Now()
			log.Warn("migrating the database", "reason", reason)
		},
		Rebuilt: func(index string) { log.Info("made an invalid index anew", "index", index) },
	}
}
