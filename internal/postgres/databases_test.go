package postgres_test

import (
	"context"
	"errors"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/melodia/orchestrator/internal/postgres"
	"github.com/melodia/orchestrator/internal/postgres/pgtest"
	"github.com/melodia/orchestrator/internal/task"
	"github.com/melodia/orchestrator/migrations"
)

// openPool opens a pool to look behind a store's back.
func openPool(t *testing.T, rawURL string) *pgxpool.Pool {
	t.Helper()
	pool, err := pgxpool.New(t.Context(), rawURL)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	return pool
}

func openStore(t *testing.T, rawURL string) *postgres.Store {
	t.Helper()
	s, err := postgres.Open(t.Context(), postgres.Options{URL: rawURL, MaxConns: 10, IdempotencyWindow: time.Hour})
	if err != nil {
		t.Fatalf("Open: %v", err)
	}
	t.Cleanup(s.Close)
	return s
}

// Whatever the defaults of the database, instances migrate it and work side by side.
func TestDefaultsOfTheDatabase(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		settings []string
		wrap     bool
		direct   bool // a pooler keeps the service from setting its own value
	}{
		"serializable":                  {settings: []string{"default_transaction_isolation = 'serializable'"}},
		"repeatable read":               {settings: []string{"default_transaction_isolation = 'repeatable read'"}},
		"serializable, behind a pooler": {settings: []string{"default_transaction_isolation = 'serializable'"}, wrap: true},
		"short timeouts":                {settings: []string{"statement_timeout = '1ms'", "lock_timeout = '1ms'", "idle_in_transaction_session_timeout = '1ms'"}, direct: true},
		"synchronous_commit off":        {settings: []string{"synchronous_commit = off", "row_security = off", "TimeZone = 'Asia/Kathmandu'", "DateStyle = 'German'", "IntervalStyle = 'sql_standard'", "bytea_output = 'escape'", "extra_float_digits = -15"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			rawURL := pgtest.EmptyURL(t)
			if tt.direct && strings.Contains(rawURL, "exec_mode") {
				return // behind pgbouncer
			}
			plain := openPool(t, rawURL)
			database := query[string](t, plain, "SELECT current_database()")
			for _, setting := range tt.settings {
				exec(t, plain, "ALTER DATABASE "+database+" SET "+setting)
			}
			// A pooler keeps connections that were made before.
			_, elsewhere := newStore(t)
			exec(t, elsewhere, "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = $1", database)
			if _, err := postgres.Migrate(t.Context(), rawURL, postgres.MigrationObserver{}); err != nil {
				t.Fatalf("Migrate: %v", err)
			}
			var work sync.WaitGroup
			for range 2 {
				s := openStore(t, rawURL)
				lookBack(s)
				if tt.wrap {
					s.Wrap()
				}
				worker := register(t, s)
				for range 3 {
					work.Go(func() {
						for range 20 {
							if err := s.Insert(t.Context(), newTask()); err != nil {
								t.Errorf("Insert: %v", err)
							}
							claims, err := s.Claim(t.Context(), worker, 5)
							if err != nil {
								t.Errorf("Claim: %v", err)
							}
							for _, c := range claims {
								if matched, _, err := write(s, c, task.Decision{State: task.Succeeded}); !matched || err != nil {
									t.Errorf("Finish = %v, %v", matched, err)
								}
							}
							if known, err := s.Heartbeat(t.Context(), worker); !known || err != nil {
								t.Errorf("Heartbeat = %v, %v", known, err)
							}
						}
					})
				}
			}
			work.Wait()
		})
	}
}

// observed gathers what a migration waited for.
type observed struct {
	mu      sync.Mutex
	reasons []string
	rebuilt []string
}

func (o *observed) observer() postgres.MigrationObserver {
	return postgres.MigrationObserver{
		Waiting: func(reason string) { o.mu.Lock(); defer o.mu.Unlock(); o.reasons = append(o.reasons, reason) },
		Rebuilt: func(index string) { o.mu.Lock(); defer o.mu.Unlock(); o.rebuilt = append(o.rebuilt, index) },
	}
}

func (o *observed) await(t *testing.T, pattern string) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) { //nolint:forbidigo // another process' time
		o.mu.Lock()
		all := strings.Join(o.reasons, "\n")
		o.mu.Unlock()
		if regexp.MustCompile(pattern).MatchString(all) {
			return
		}
	}
	t.Fatalf("migrations do not say that they wait for %s", pattern)
}

func TestMigrationsSayWhatTheyWaitFor(t *testing.T) {
	t.Parallel()
	rawURL := pgtest.EmptyURL(t)
	pool := openPool(t, rawURL)
	holder, err := pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = holder.Rollback(context.WithoutCancel(t.Context())) }()
	for _, sql := range []string{"SET TRANSACTION ISOLATION LEVEL REPEATABLE READ", "SET LOCAL application_name = 'nightly dump'", "SELECT 'hunter2'"} {
		if _, err := holder.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	const waits = `^(.*\n)*migrations wait for a lock held by session \d+ \(application_name "nightly dump", state idle in transaction, since 20\d\d-[-0-9T:]+Z\)`

	// What stops in the middle leaves nothing behind at the server.
	ctx, cancel := context.WithCancel(t.Context())
	var first, second observed
	ended := make(chan error)
	migrate := func(ctx context.Context, o *observed) {
		_, err := postgres.Migrate(ctx, rawURL, o.observer())
		ended <- err
	}
	go migrate(ctx, &first)
	first.await(t, waits)
	// Another instance waits for the first one, and knows what that one waits for.
	go migrate(t.Context(), &second)
	second.await(t, waits)
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("Migrate that was stopped = %v, want context.Canceled", err)
	}
	if err := holder.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err != nil {
		t.Errorf("Migrate when nothing is in its way any more: %v", err)
	}
	for _, o := range []*observed{&first, &second} {
		if o.reasons[len(o.reasons)-1] != "" {
			t.Errorf("the last reason is %q, want none", o.reasons[len(o.reasons)-1])
		}
		if strings.Contains(strings.Join(o.reasons, ""), "hunter2") {
			t.Errorf("a statement is shown: %q", o.reasons)
		}
	}
	if n := query[int](t, pool, "SELECT count(*) FROM pg_index WHERE NOT indisvalid"); n != 0 {
		t.Errorf("%d invalid indexes are left", n)
	}
}

// A migration that cannot have its lock makes way for what queues behind it.
func TestMigrationMakesWay(t *testing.T) {
	t.Parallel()
	rawURL := pgtest.EmptyURL(t)
	pool := openPool(t, rawURL)
	begin := func(name, sql string) pgx.Tx {
		t.Helper()
		tx, err := pool.BeginTx(t.Context(), pgx.TxOptions{IsoLevel: pgx.RepeatableRead})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = tx.Rollback(context.WithoutCancel(t.Context())) })
		for _, statement := range []string{"SET LOCAL application_name = '" + name + "'", sql} {
			if _, err := tx.Exec(t.Context(), statement); err != nil {
				t.Fatal(err)
			}
		}
		return tx
	}
	// An index that is made CONCURRENTLY waits for it, when the tables are there.
	dump := begin("dump", "SELECT 1")
	var o observed
	ended := make(chan error)
	go func() {
		_, err := postgres.Migrate(t.Context(), rawURL, o.observer())
		ended <- err
	}()
	o.await(t, `wait for a lock held by session \d+ \(application_name "dump"`)
	reader := begin("reader", "LOCK TABLE workers IN ACCESS SHARE MODE")
	if err := dump.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	o.await(t, `wait for a lock held by session \d+ \(application_name "reader"`)
	// It would queue behind the migration until the reader ends, which it never would.
	exec(t, pool, "SELECT count(*) FROM workers")
	if err := reader.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err != nil {
		t.Errorf("Migrate after the reader ended: %v", err)
	}
	exec(t, pool, "SELECT concurrency FROM workers")
}

// Making an index CONCURRENTLY that is broken off leaves an invalid one.
func TestInvalidIndexesAreMadeAnew(t *testing.T) {
	t.Parallel()
	rawURL := pgtest.URL(t)
	pool := openPool(t, rawURL)
	exec(t, pool, "CREATE INDEX tasks_cancel_requested_ccnew ON tasks (id)") // as REINDEX leaves it
	exec(t, pool, "CREATE INDEX of_the_operator ON tasks (url)")
	broken := []string{"tasks_cancel_requested", "task_history_default_created_by"}
	exec(t, pool, "UPDATE pg_index SET indisvalid = false WHERE indexrelid::regclass::text = ANY ($1)",
		append([]string{"of_the_operator", "tasks_cancel_requested_ccnew", "task_history_created_by"}, broken...))
	var o observed
	if _, err := postgres.Migrate(t.Context(), rawURL, o.observer()); err != nil {
		t.Fatalf("Migrate: %v", err)
	}
	if diff := cmp.Diff([]string{"task_history_default_created_by", "tasks_cancel_requested"}, o.rebuilt); diff != "" {
		t.Errorf("made anew (-want +got):\n%s", diff)
	}
	left := query[[]string](t, pool, "SELECT coalesce(array_agg(indexrelid::regclass::text), '{}') FROM pg_index WHERE NOT indisvalid")
	if diff := cmp.Diff([]string{"of_the_operator"}, left); diff != "" {
		t.Errorf("invalid afterwards (-want +got):\n%s", diff)
	}
	if n := query[int](t, pool, "SELECT count(*) FROM pg_class WHERE relname = 'tasks_cancel_requested_ccnew'"); n != 0 {
		t.Error("what REINDEX left is still there")
	}
}

// documentedRights are the statements that docs/operations.md gives for a role
// without the right to migrate.
func documentedRights(t *testing.T, role, database string) string {
	t.Helper()
	operations, err := os.ReadFile("../../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	block := regexp.MustCompile("(?s)```sql\n(CREATE ROLE.*?)```").FindStringSubmatch(string(operations))
	if block == nil {
		t.Fatal("docs/operations.md has no SQL for the rights")
	}
	return strings.NewReplacer("orchestrator_app", role, "DATABASE orchestrator", "DATABASE "+database).Replace(block[1])
}

func TestRoleWithoutTheRightToMigrate(t *testing.T) {
	t.Parallel()
	rawURL, emptyURL := pgtest.URL(t), pgtest.EmptyURL(t)
	if strings.Contains(rawURL, "exec_mode") {
		return // pgbouncer knows the tests' own role alone
	}
	pool := openPool(t, rawURL)
	role := "test_" + strings.ReplaceAll(newID().String(), "-", "")
	for statement := range strings.SplitSeq(documentedRights(t, role, query[string](t, pool, "SELECT current_database()")), ";") {
		if strings.TrimSpace(statement) != "" {
			exec(t, pool, statement)
		}
	}
	t.Cleanup(func() {
		ctx := context.WithoutCancel(t.Context())
		_, _ = pool.Exec(ctx, "DROP OWNED BY "+role)
		_, _ = pool.Exec(ctx, "DROP ROLE "+role)
	})
	exec(t, pool, "ALTER ROLE "+role+" PASSWORD 'hunter2'")
	as := func(rawURL string) string {
		u, err := url.Parse(rawURL)
		if err != nil {
			t.Fatal(err)
		}
		u.User = url.UserPassword(role, "hunter2")
		return u.String()
	}

	if applied, err := postgres.Migrate(t.Context(), as(rawURL), postgres.MigrationObserver{}); applied != 0 || err != nil {
		t.Errorf("Migrate with nothing to do = %d, %v, want 0, nil", applied, err)
	}
	s := openStore(t, as(rawURL))
	worker := register(t, s)
	insert(t, s, newTask())
	finish(t, s, claimOne(t, s, worker), task.Decision{State: task.Succeeded})
	exec(t, pool, "UPDATE task_history SET finished_at = now() - interval '3 days'")
	if err := s.KeepHistory(t.Context(), 48*time.Hour, 3); err != nil {
		t.Errorf("KeepHistory: %v", err)
	}
	if n := query[int](t, pool, "SELECT count(*) FROM task_history"); n != 0 {
		t.Errorf("%d tasks outlive their retention", n)
	}

	exec(t, pool, "REVOKE INSERT, DELETE ON tasks FROM "+role)
	exec(t, pool, "REVOKE SELECT ON goose_db_version FROM "+role)
	_, err := postgres.Open(t.Context(), postgres.Options{URL: as(rawURL)})
	var lacks *postgres.LacksError
	if !errors.As(err, &lacks) || errors.Is(err, task.ErrUnavailable) || strings.ContainsAny(err.Error(), "\n") {
		t.Fatalf("Open = %v, want one line of rights that are lacking", err)
	}
	if diff := cmp.Diff([]string{"INSERT, DELETE ON tasks", "SELECT ON goose_db_version"}, lacks.Lacks); diff != "" {
		t.Errorf("lacks (-want +got):\n%s", diff)
	}
	_, err = postgres.Migrate(t.Context(), as(emptyURL), postgres.MigrationObserver{})
	var rights *migrations.RightsError
	if !errors.As(err, &rights) || len(rights.Lacks) != 1 || rights.Lacks[0] != "CREATE on schema public" {
		t.Errorf("Migrate of an empty database = %v, want that it lacks CREATE on schema public", err)
	}
}

// A database that an earlier build has migrated gets what it lacks.
func TestDatabasesOfEarlierBuilds(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		undo    []string
		applied int
	}{
		"before chains": {[]string{
			"ALTER TABLE tasks DROP COLUMN hops, DROP COLUMN parent_id, DROP COLUMN root_id, DROP COLUMN round, DROP COLUMN snooze_count",
			"ALTER TABLE task_history DROP COLUMN hops, DROP COLUMN parent_id, DROP COLUMN root_id, DROP COLUMN round",
			"DELETE FROM goose_db_version WHERE version_id > 10",
		}, 2},
		"with the same columns under other numbers": {[]string{"UPDATE goose_db_version SET version_id = version_id - 3 WHERE version_id >= 10"}, 3},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			rawURL := pgtest.URL(t)
			pool := openPool(t, rawURL)
			want := tt.applied + undoMigrations(t, pool, 13)
			for _, statement := range tt.undo {
				exec(t, pool, statement)
			}
			if applied, err := postgres.Migrate(t.Context(), rawURL, postgres.MigrationObserver{}); applied != want || err != nil {
				t.Fatalf("Migrate = %d, %v, want %d", applied, err, want)
			}
			insert(t, openStore(t, rawURL), newTask())
		})
	}
}

// undoMigrations undoes all migrations from a version on, and returns their number.
func undoMigrations(t *testing.T, pool *pgxpool.Pool, version int) (count int) {
	t.Helper()
	names, err := filepath.Glob("../../migrations/*.sql")
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(names)
	for _, name := range slices.Backward(names) {
		number, _, _ := strings.Cut(filepath.Base(name), "_")
		if n, err := strconv.Atoi(number); err != nil || n < version {
			break
		}
		text, err := os.ReadFile(name) //nolint:gosec // a file of the project
		if err != nil {
			t.Fatal(err)
		}
		_, down, _ := strings.Cut(string(text), "-- +goose Down")
		for statement := range strings.SplitSeq(down, ";") {
			exec(t, pool, statement)
		}
		count++
	}
	exec(t, pool, "DELETE FROM goose_db_version WHERE version_id >= $1", version)
	return count
}

func TestSchemaThatIsBehind(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		url  string
		want string
	}{
		"no tables": {pgtest.EmptyURL(t), "version 0"},
	} {
		_, err := postgres.Open(t.Context(), postgres.Options{URL: tt.url})
		if !errors.Is(err, task.ErrUnavailable) || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), "orchestrator migrate") {
			t.Errorf("%s: Open = %v, want %q and what to do", name, err, tt.want)
		}
	}
	rawURL := pgtest.URL(t)
	pool := openPool(t, rawURL)
	exec(t, pool, "CREATE SCHEMA elsewhere")
	exec(t, pool, "ALTER TABLE tasks SET SCHEMA elsewhere")
	exec(t, pool, "ALTER TABLE task_history SET SCHEMA elsewhere")
	_, err := postgres.Open(t.Context(), postgres.Options{URL: rawURL})
	if err == nil || !strings.Contains(err.Error(), "the tables are in schema elsewhere") {
		t.Errorf("tables in another schema: Open = %v, want where they are", err)
	}
}
