//go:build faults

package e2e

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/melodia/orchestrator/internal/devdb"
)

// cluster is a PostgreSQL of one test's own, as durable as PostgreSQL is by
// itself. It can crash and come back with its data, on another port.
type cluster struct {
	t   testing.TB
	dir string

	mu     sync.Mutex
	server *devdb.Server
}

// startCluster starts one with its data in dir, which PostgreSQL's user must be
// able to reach. It is stopped when the test ends.
func startCluster(t testing.TB, dir string) *cluster {
	t.Helper()
	c := &cluster{t: t, dir: dir}
	c.start()
	t.Cleanup(func() {
		if err := c.server.Stop(); err != nil {
			t.Error(err)
		}
	})
	return c
}

func (c *cluster) start() {
	c.t.Helper()
	server, err := devdb.Start(c.t.Context(), devdb.Options{Dir: c.dir})
	if err != nil {
		c.t.Fatal(err)
	}
	c.mu.Lock()
	c.server = server
	c.mu.Unlock()
}

func (c *cluster) url() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.server.URL("postgres")
}

// crash is `pg_ctl -m immediate stop`: the next start has to recover. A server
// that has ended by itself is buried.
func (c *cluster) crash() {
	c.t.Helper()
	if pid := c.pid(); pid > 0 {
		_ = syscall.Kill(pid, syscall.SIGQUIT) // it fails where the server has ended already
		eventually(c.t, func() bool { return errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) },
			func() string { return "PostgreSQL did not end" })
	}
	if err := c.server.Stop(); err != nil {
		c.t.Fatal(err)
	}
}

// pid is that of the server, 0 when it has none.
func (c *cluster) pid() int {
	files, _ := filepath.Glob(filepath.Join(c.dir, "pg*", "data", "postmaster.pid"))
	if len(files) != 1 {
		return 0
	}
	b, _ := os.ReadFile(files[0])
	line, _, _ := strings.Cut(string(b), "\n")
	pid, _ := strconv.Atoi(line)
	return pid
}

// answers waits until the server takes connections, and reports false when it
// has ended instead.
func (c *cluster) answers() (ok bool) {
	c.t.Helper()
	eventually(c.t, func() bool {
		conn, err := pgx.Connect(c.t.Context(), c.url())
		if ok = err == nil; ok {
			_ = conn.Close(c.t.Context())
		}
		pid := c.pid()
		return ok || pid == 0 || errors.Is(syscall.Kill(pid, 0), syscall.ESRCH)
	}, func() string { return "PostgreSQL neither recovers nor ends" })
	return ok
}
