package postgres_test

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/melodia/orchestrator/internal/postgres"
	"github.com/melodia/orchestrator/internal/postgres/pgtest"
	"github.com/melodia/orchestrator/internal/task"
)

func TestInstancesThatMigrateTogether(t *testing.T) {
	t.Parallel()
	url := pgtest.EmptyURL(t)
	var (
		instances sync.WaitGroup
		mu        sync.Mutex
		total     int
	)
	for range 5 {
		instances.Go(func() {
			applied, err := postgres.Migrate(t.Context(), url, postgres.MigrationObserver{})
			if err != nil {
				t.Errorf("Migrate: %v", err)
			}
			mu.Lock()
			defer mu.Unlock()
			total += applied
		})
	}
	instances.Wait()
	files, err := filepath.Glob("../../migrations/*.sql")
	if err != nil || total != len(files) {
		t.Errorf("%d migrations were applied in all, want each once: %d (%v)", total, len(files), err)
	}
	if applied, err := postgres.Migrate(t.Context(), url, postgres.MigrationObserver{}); applied != 0 || err != nil {
		t.Errorf("Migrate again = %d, %v, want 0", applied, err)
	}
}

func TestUnreachableDatabase(t *testing.T) {
	t.Parallel()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := listener.Addr().String()
	if err := listener.Close(); err != nil {
		t.Fatal(err)
	}
	url := "postgres://someone:hunter2@" + address + "/db?sslmode=disable"
	_, errOpen := postgres.Open(t.Context(), postgres.Options{URL: url})
	_, errMigrate := postgres.Migrate(t.Context(), url, postgres.MigrationObserver{})
	for name, err := range map[string]error{"Open": errOpen, "Migrate": errMigrate} {
		if !errors.Is(err, task.ErrUnavailable) {
			t.Errorf("%s: %v, want ErrUnavailable", name, err)
		}
		if err != nil && strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: the error holds the password: %v", name, err)
		}
	}
}

func TestURLsThatCannotBeRead(t *testing.T) {
	t.Parallel()
	for _, url := range []string{"postgres://u:hunter2@host:port/db", "hunter2", "postgres://u:hunter2@h/db?sslmode=hunter2"} {
		_, err := postgres.Open(t.Context(), postgres.Options{URL: url})
		if err == nil || errors.Is(err, task.ErrUnavailable) {
			t.Errorf("Open(%q) = %v, want an error that trying again does not mend", url, err)
		}
		if err != nil && strings.Contains(err.Error(), "hunter2") {
			t.Errorf("Open(%q): the error holds the password: %v", url, err)
		}
	}
}

// What the database refuses for a while is the database's fault, not the task's.
func TestReadOnlyDatabaseIsUnavailable(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	database := query[string](t, pool, "SELECT current_database()")
	// Orders are given from elsewhere, since a pooler may share out the connection that they come by.
	_, elsewhere := newStore(t)
	exec(t, elsewhere, "ALTER DATABASE "+database+" SET default_transaction_read_only = on")
	exec(t, elsewhere, "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = $1", database)
	err := insertRetrying(t, s)
	if !errors.Is(err, task.ErrUnavailable) || !strings.Contains(err.Error(), "read-only") {
		t.Errorf("Insert = %v, want ErrUnavailable for a read-only database", err)
	}
	if _, err := s.Heartbeat(t.Context(), newID()); !errors.Is(err, task.ErrUnavailable) {
		t.Errorf("Heartbeat over a read-only connection: %v, want ErrUnavailable", err)
	}
	// Its connections stay read-only when it takes writes again; the heartbeat
	// that every instance sends finds that out.
	exec(t, elsewhere, "ALTER DATABASE "+database+" RESET default_transaction_read_only")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for err != nil && ctx.Err() == nil {
		_, _ = s.Heartbeat(ctx, newID())
		err = s.Insert(ctx, newTask())
	}
	if err != nil {
		t.Errorf("Insert after the database takes writes again: %v", err)
	}
}

// A password's rotation must not make tasks fail.
func TestRefusedLoginIsUnavailable(t *testing.T) {
	t.Parallel()
	_, pool := newStore(t)
	url := pgtest.URL(t)
	role := "test_" + strings.ReplaceAll(newID().String(), "-", "")
	exec(t, pool, "CREATE ROLE "+role+" NOLOGIN")
	t.Cleanup(func() { _, _ = pool.Exec(context.WithoutCancel(t.Context()), "DROP ROLE "+role) })
	at := strings.Index(url, "//")
	_, err := postgres.Open(t.Context(), postgres.Options{URL: url[:at+2] + role + url[strings.Index(url, "@"):]})
	if !errors.Is(err, task.ErrUnavailable) {
		t.Errorf("Open as a role that may not log in: %v, want ErrUnavailable", err)
	}
}

// insertRetrying inserts until the answer comes over a connection that was
// made after the old ones were cut.
func insertRetrying(t *testing.T, s *postgres.Store) error {
	t.Helper()
	var err error
	for range 20 {
		err = s.Insert(t.Context(), newTask())
		if err == nil || strings.Contains(err.Error(), "read-only") {
			return err
		}
		if !errors.Is(err, task.ErrUnavailable) {
			t.Fatalf("Insert over a cut connection: %v, want ErrUnavailable", err)
		}
	}
	return err
}

func TestConnectionsCutUnderneath(t *testing.T) {
	t.Parallel()
	s, pool := newStore(t)
	for range 5 {
		exec(t, pool, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()")
		for {
			err := s.Insert(t.Context(), newTask())
			if err == nil {
				break // it heals by itself
			}
			if !errors.Is(err, task.ErrUnavailable) {
				t.Fatalf("Insert over a cut connection: %v, want ErrUnavailable", err)
			}
		}
	}
}

func TestCallsEndWithTheirContext(t *testing.T) {
	t.Parallel()
	s, _ := newStore(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Insert(ctx, newTask()); !errors.Is(err, context.Canceled) {
		t.Errorf("Insert = %v, want context.Canceled", err)
	}
	if _, err := s.Get(ctx, newID()); !errors.Is(err, context.Canceled) {
		t.Errorf("Get = %v, want context.Canceled", err)
	}
}
