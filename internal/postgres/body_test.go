package postgres_test

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/melodia/orchestrator/internal/postgres"
	"github.com/melodia/orchestrator/internal/postgres/pgtest"
	"github.com/melodia/orchestrator/internal/task"
)

// countBytes returns a URL by which the database is reached through a relay, and
// the bytes that have passed it in either direction.
func countBytes(t *testing.T, databaseURL string) (relayURL string, passed *atomic.Int64) {
	t.Helper()
	config, err := pgconn.ParseConfig(databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	passed = new(atomic.Int64)
	var relays sync.WaitGroup
	relays.Go(func() {
		for {
			near, err := listener.Accept()
			if err != nil {
				return
			}
			network, address := pgconn.NetworkAddress(config.Host, config.Port)
			far, err := net.Dial(network, address)
			if err != nil {
				_ = near.Close()
				continue
			}
			for _, pair := range [][2]net.Conn{{near, far}, {far, near}} {
				relays.Go(func() {
					_, _ = io.Copy(counting{pair[1], passed}, pair[0])
					_ = near.Close()
					_ = far.Close()
				})
			}
		}
	})
	t.Cleanup(func() { _ = listener.Close(); relays.Wait() })
	u := url.URL{Scheme: "postgres", User: url.UserPassword(config.User, config.Password), Host: listener.Addr().String(), Path: "/" + config.Database, RawQuery: "sslmode=disable"}
	return u.String(), passed
}

type counting struct {
	io.Writer
	passed *atomic.Int64
}

func (c counting) Write(p []byte) (int, error) {
	c.passed.Add(int64(len(p)))
	return c.Writer.Write(p)
}

// Of what reads a task, or does something to it, nothing but what shows the body or
// makes the call has it sent; and nothing writes it that does not change it.
func TestBodiesStayInTheDatabase(t *testing.T) {
	t.Parallel()
	databaseURL := pgtest.URL(t)
	relayURL, passed := countBytes(t, databaseURL)
	s, err := postgres.Open(t.Context(), postgres.Options{URL: relayURL, MaxConns: 4, Callbacks: callbackRules, IdempotencyWindow: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	pool, err := pgxpool.New(t.Context(), databaseURL) // not through the relay
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	worker := register(t, s)

	body := make([]byte, 1<<20) // that cannot be compressed
	random := rand.NewChaCha8([32]byte{1})
	_, _ = random.Read(body)
	stored := func() *task.Task {
		tk := newTask(func(tk *task.Task) { tk.Body, tk.Delay = body, time.Hour })
		insert(t, s, tk)
		return tk
	}
	pending, running, failed, cancelled := stored(), stored(), stored(), stored()
	must := func(_ any, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	claimIt := func(id task.ID) *task.Claim {
		t.Helper()
		c, err := s.ClaimOne(t.Context(), worker, id)
		must(c, err)
		return c
	}
	claimIt(running.ID)
	c := claimIt(failed.ID)
	if !finish(t, s, c, task.Decision{State: task.Failed, Reason: task.ClientError, Counted: true, Attempt: failedOnce(c).Attempt}) {
		t.Fatal("it was not finished")
	}
	// chunks are the ids under which the database keeps bodies apart from their rows.
	toast := query[string](t, pool, "SELECT reltoastrelid::regclass::text FROM pg_class WHERE oid = 'tasks'::regclass")
	chunks := func() []uint32 {
		return query[[]uint32](t, pool, "SELECT array_agg(DISTINCT chunk_id ORDER BY chunk_id) FROM "+toast)
	}

	const little = 64 << 10
	type operation struct {
		name string
		do   func() (*task.Task, error)
	}
	one := func(tasks []*task.Task, err error) (*task.Task, error) {
		if err != nil || len(tasks) == 0 {
			return nil, err
		}
		return tasks[0], nil
	}
	none := func(err error) (*task.Task, error) { return nil, err }
	operations := []operation{
		{"Get", func() (*task.Task, error) { return s.Get(t.Context(), pending.ID) }},
		{"Get of a failed task", func() (*task.Task, error) { return s.Get(t.Context(), failed.ID) }},
		{"GetMany", func() (*task.Task, error) { return one(s.GetMany(t.Context(), []task.ID{pending.ID, failed.ID})) }},
		{"Find", func() (*task.Task, error) { return one(s.Find(t.Context(), &task.Filter{}, task.Position{}, 10)) }},
		{"Match", func() (*task.Task, error) { _, err := s.Match(t.Context(), &task.Filter{}, 10); return none(err) }},
		{"Explain", func() (*task.Task, error) { tk, _, err := s.Explain(t.Context(), pending.ID, lease); return tk, err }},
		{"Explain of a failed task", func() (*task.Task, error) { tk, _, err := s.Explain(t.Context(), failed.ID, lease); return tk, err }},
		{"ClaimOne of a running task", func() (*task.Task, error) {
			_, err := s.ClaimOne(t.Context(), worker, running.ID)
			if errors.Is(err, task.ErrNotPending) {
				err = nil
			}
			return none(err)
		}},
		{"Unfinished", func() (*task.Task, error) {
			_, err := s.Unfinished(t.Context(), []task.ID{pending.ID, failed.ID})
			return none(err)
		}},
		{"MakeDue", func() (*task.Task, error) { return s.MakeDue(t.Context(), pending.ID) }},
		{"MakeDue of a due task", func() (*task.Task, error) { return s.MakeDue(t.Context(), pending.ID) }},
		{"MakeDue of a failed task", func() (*task.Task, error) {
			_, err := s.MakeDue(t.Context(), failed.ID)
			if errors.Is(err, task.ErrNotPending) {
				err = nil
			}
			return none(err)
		}},
		{"Change", func() (*task.Task, error) {
			tk, err := s.Get(t.Context(), pending.ID)
			must(tk, err)
			tk.Labels = map[string]string{"changed": "yes"}
			return s.Change(t.Context(), tk, nil)
		}},
		{"Cancel of a running task", func() (*task.Task, error) { return s.Cancel(t.Context(), running.ID) }},
		{"Cancel", func() (*task.Task, error) { return s.Cancel(t.Context(), cancelled.ID) }},
		{"Redrive", func() (*task.Task, error) { return s.Redrive(t.Context(), cancelled.ID, 0) }},
		{"CancelMany", func() (*task.Task, error) {
			_, _, err := s.CancelMany(t.Context(), []task.ID{cancelled.ID})
			return none(err)
		}},
		{"RedriveMany", func() (*task.Task, error) {
			_, err := s.RedriveMany(t.Context(), []task.ID{cancelled.ID}, 0, 0, 0)
			return none(err)
		}},
	}
	for _, o := range operations {
		before, kept := passed.Load(), chunks()
		got, err := o.do()
		if err != nil {
			t.Fatalf("%s: %v", o.name, err)
		}
		if n := passed.Load() - before; n > little {
			t.Errorf("%s has %d bytes sent, want at most %d", o.name, n, little)
		}
		if got != nil && (got.Body != nil || got.BodyBytes != len(body)) {
			t.Errorf("%s returns a task with a body of %d bytes, and says %d; want none, and %d", o.name, len(got.Body), got.BodyBytes, len(body))
		}
		if moves := strings.HasPrefix(o.name, "Cancel") || strings.HasPrefix(o.name, "Redrive"); !moves && !slices.Equal(kept, chunks()) {
			t.Errorf("%s writes the body anew", o.name)
		}
	}

	// What is counted is counted; and the body is still there.
	before := passed.Load()
	for _, tk := range []*task.Task{pending, running, failed, cancelled} {
		if got := get(t, s, tk.ID); !bytes.Equal(got.Body, body) {
			t.Errorf("a body of %d bytes reads back as another, of %d bytes", len(body), len(got.Body))
		}
	}
	if n := passed.Load() - before; n < 4*int64(len(body)) {
		t.Errorf("four bodies were read, and %d bytes sent", n)
	}
	if _, err := s.GetWithBody(t.Context(), newID()); !errors.Is(err, task.ErrNotFound) {
		t.Errorf("GetWithBody of an unknown task: %v, want ErrNotFound", err)
	}
}
