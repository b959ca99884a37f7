// Package devdb starts and stops a private PostgreSQL: the kept one of
// `orchestrator dev` and the throw-away ones of tests.
//
// It runs an installed PostgreSQL, or fetches one. Each cluster has a folder,
// named after the major version, and each running server one of its own: where
// pg17 is in use, the next is pg17-2. In it:
//
//	orchestrator.lock  locked by the process that uses the folder; also the sign that the folder is ours
//	log                what initdb and the server printed since the last start, locked as long as one of them lives
//	password           of the superuser
//	data               the cluster, complete from the moment it bears this name
//	data.new           a cluster in the making; one that is found there was interrupted, and is removed
//
// Locks end with the processes that hold them, so a run that was killed leaves
// nothing that the next one cannot put right.
//
// The server listens on 127.0.0.1 and wants a password there, because other
// users of the machine reach that address too, and PostgreSQL's superuser can
// run any program as the user that the server runs as.
package devdb

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"
)

// Options says which cluster [Start] uses.
type Options struct {
	// Dir holds the clusters' folders; it is made where it is missing. Empty is
	// "orchestrator" in the user's cache folder; for root that is in XDG_CACHE_HOME, or
	// else /var/cache/orchestrator. When root starts the server it runs as another user, who must be
	// able to reach Dir.
	Dir string
	// Temporary asks for a new cluster that [Server.Stop] removes and that does
	// not outlast a crash of the machine: fsync, synchronous_commit and
	// full_page_writes are off. Otherwise the data is kept for the next Start,
	// with PostgreSQL's own settings.
	Temporary bool
	// Fresh removes the data of the folder that is used before the start. It is one of
	// ours that no process uses: nothing else is ever removed.
	Fresh bool
	// Log hears what takes time or is out of the ordinary; it may be nil.
	Log *slog.Logger
}

// Server is a running PostgreSQL.
type Server struct {
	port     int
	password string
	folder   string
	stop     func() error
}

// Start returns a server that accepts connections. The caller stops it with
// [Server.Stop]. A server that an earlier, killed run left in the same folder
// is stopped first.
//
// ctx bounds the start only. When Start fails, it has stopped whatever it
// started; the error carries the end of PostgreSQL's log, or says in one line
// what to install.
func Start(ctx context.Context, o Options) (*Server, error) {
	return start(ctx, o, thisMachine())
}

// URL returns the connection URL of a database for the superuser "postgres".
// A new cluster has the database "postgres". The URL holds the password.
func (s *Server) URL(database string) string {
	u := url.URL{
		Scheme:   "postgres",
		User:     url.UserPassword("postgres", s.password),
		Host:     net.JoinHostPort(loopback, strconv.Itoa(s.port)),
		Path:     "/" + database,
		RawQuery: "sslmode=disable",
	}
	return u.String()
}

// Folder is where the data and the log are.
func (s *Server) Folder() string { return s.folder }

// Stop ends all connections and the server, and waits until it is gone: some
// tenths of a second as a rule, 20 seconds at most. Then it removes the data of
// a temporary cluster. It may be called again, from any goroutine; every call
// returns the same error.
func (s *Server) Stop() error { return s.stop() }

const loopback = "127.0.0.1"

func start(ctx context.Context, o Options, m machine) (_ *Server, err error) {
	log := o.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	dir, err := makeDir(o.Dir)
	if err != nil {
		return nil, fmt.Errorf("make a folder for PostgreSQL's data: %w", err)
	}
	pg, err := m.find(ctx, dir, log)
	if err != nil {
		return nil, err
	}
	c, err := claim(dir, pg, o.Temporary)
	if err != nil {
		return nil, fmt.Errorf("find a free folder for a cluster in %s: %w", dir, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.release())
		}
	}()

	began := time.Now()
	if err := c.takeOver(ctx, log); err != nil {
		return nil, err
	}
	if o.Fresh {
		if err := os.RemoveAll(c.data()); err != nil {
			return nil, fmt.Errorf("remove the data of an earlier run: %w", err)
		}
	}
	password, err := c.prepare(ctx)
	if err != nil {
		return nil, err
	}
	port, server, err := c.serve(ctx, m.freePort)
	if err != nil {
		return nil, err
	}
	log.InfoContext(ctx, "postgresql started",
		"version", pg.major, "folder", c.folder, "port", port, "duration", time.Since(began))

	return &Server{port: port, password: password, folder: c.folder, stop: sync.OnceValue(func() error {
		return errors.Join(server.end(context.WithoutCancel(ctx)), c.release())
	})}, nil
}

// makeDir makes the folder for all clusters and returns its absolute path.
func makeDir(dir string) (string, error) {
	if dir == "" {
		cache := "/var/cache"
		// Root's own cache folder is closed to the user that PostgreSQL runs as.
		if os.Geteuid() != 0 || os.Getenv("XDG_CACHE_HOME") != "" {
			var err error
			if cache, err = os.UserCacheDir(); err != nil {
				return "", err
			}
		}
		dir = filepath.Join(cache, "orchestrator")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		return dir, err
	}
	// A strict umask must not close it to that user either.
	return dir, errors.Join(os.MkdirAll(dir, 0o755), os.Chmod(dir, 0o755))
}

// freePort returns a port of the loopback address that was free a moment ago.
func freePort() (int, error) {
	l, err := net.Listen("tcp", net.JoinHostPort(loopback, "0"))
	if err != nil {
		return 0, fmt.Errorf("find a free port: %w", err)
	}
	return l.Addr().(*net.TCPAddr).Port, l.Close()
}

// shutDown ends a PostgreSQL by ever harder means. gone waits for its end or
// that of its context, and reports whether it has ended.
func shutDown(ctx context.Context, signal func(syscall.Signal), gone func(context.Context) bool) error {
	for _, step := range []struct {
		signal   syscall.Signal
		patience time.Duration
	}{
		// https://www.postgresql.org/docs/current/server-shutdown.html
		{syscall.SIGINT, 10 * time.Second}, // fast: cuts connections, leaves clean data
		{syscall.SIGQUIT, 5 * time.Second}, // immediate: the next start recovers
		{syscall.SIGKILL, 5 * time.Second},
	} {
		signal(step.signal)
		waiting, cancel := context.WithTimeout(ctx, step.patience)
		ended := gone(waiting)
		cancel()
		if ended {
			return nil
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
	return errors.New("it does not end, not even by force")
}
