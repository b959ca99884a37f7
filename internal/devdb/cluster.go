package devdb

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// pollInterval is how often the start and the end of a server are looked for.
const pollInterval = 10 * time.Millisecond

// cluster is a folder that this process holds the lock of.
type cluster struct {
	installation
	folder    string
	temporary bool
	lock      *os.File
	// log is locked by us first. PostgreSQL's processes inherit the open file
	// and with it the lock, which so outlives us exactly as long as they do.
	log *os.File
}

func (c *cluster) data() string     { return filepath.Join(c.folder, "data") }
func (c *cluster) newData() string  { return filepath.Join(c.folder, "data.new") }
func (c *cluster) password() string { return filepath.Join(c.folder, "password") }
func (c *cluster) pidFile() string  { return filepath.Join(c.data(), "postmaster.pid") }

// claim takes the first folder for pg in dir that no process uses. Folders
// that exist without being ours are left alone.
func claim(dir string, pg installation, temporary bool) (*cluster, error) {
	name := "pg" + strconv.Itoa(pg.major)
	if temporary {
		name += "-test"
	}
	for n := 1; ; n++ {
		folder := filepath.Join(dir, name)
		if n > 1 {
			folder += "-" + strconv.Itoa(n)
		}
		lock, err := lockFolder(folder)
		if err != nil {
			return nil, err
		}
		if lock == nil {
			continue
		}
		log, err := os.OpenFile(filepath.Join(folder, "log"), os.O_CREATE|os.O_RDWR|os.O_APPEND, 0o600)
		if err != nil {
			return nil, errors.Join(err, lock.Close())
		}
		return &cluster{installation: pg, folder: folder, temporary: temporary, lock: lock, log: log}, nil
	}
}

// lockFolder makes folder where it is missing and locks it. It returns nil when
// the folder is in use or not ours.
func lockFolder(folder string) (*os.File, error) {
	err := os.Mkdir(folder, 0o755)
	ours := err == nil
	switch {
	case ours:
		// The umask may have closed it to the user that PostgreSQL runs as.
		if err := os.Chmod(folder, 0o755); err != nil {
			return nil, err
		}
	case errors.Is(err, fs.ErrExist):
		// Empty is what a run leaves that was killed right here.
		entries, err := os.ReadDir(folder)
		ours = err == nil && len(entries) == 0
	default:
		return nil, err
	}
	flags := os.O_RDWR
	if ours {
		flags |= os.O_CREATE
	}
	lock, err := os.OpenFile(filepath.Join(folder, "orchestrator.lock"), flags, 0o600)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	locked, err := tryLock(lock)
	if !locked {
		return nil, errors.Join(err, lock.Close())
	}
	return lock, nil
}

// release gives the folder back, without the data of a temporary cluster. Our
// own server must have ended; an earlier run's that could not be stopped keeps
// its data.
func (c *cluster) release() error {
	var errs []error
	if free, err := tryLock(c.log); c.temporary && free && err == nil {
		// The folder and its lock stay: another process may be waiting at them.
		for _, path := range []string{c.data(), c.newData(), c.password(), c.log.Name()} {
			errs = append(errs, os.RemoveAll(path))
		}
	}
	return errors.Join(append(errs, c.log.Close(), c.lock.Close())...)
}

// takeOver stops what an earlier run, killed, left running in the folder, and
// removes what it left unfinished.
func (c *cluster) takeOver(ctx context.Context, log *slog.Logger) error {
	free, err := tryLock(c.log)
	if err != nil {
		return fmt.Errorf("lock %s: %w", c.log.Name(), err)
	}
	if !free {
		log.WarnContext(ctx, "stopping a postgresql that an earlier run left behind", "folder", c.folder)
		err := shutDown(ctx, func(s syscall.Signal) {
			// While the log is locked the number in the file is its writer's, or that
			// of a writer who has just died and whose children are about to notice.
			if pid, _ := c.postmaster(); pid > 1 {
				if p, err := os.FindProcess(pid); err == nil {
					_ = p.Signal(s)
				}
			}
		}, func(ctx context.Context) bool {
			tick := time.NewTicker(pollInterval)
			defer tick.Stop()
			for {
				if free, err := tryLock(c.log); free && err == nil {
					return true
				}
				select {
				case <-tick.C:
				case <-ctx.Done():
					return false
				}
			}
		})
		if err != nil {
			return fmt.Errorf("stop the PostgreSQL that an earlier run left in %s: %w", c.folder, err)
		}
	}

	// No server is left, so the file is stale. PostgreSQL would believe it if
	// its number were by now that of another process.
	stale := []string{c.newData(), c.pidFile()}
	if c.temporary {
		stale = append(stale, c.data())
	}
	for _, path := range stale {
		if err := os.RemoveAll(path); err != nil {
			return fmt.Errorf("remove what an earlier run left: %w", err)
		}
	}
	return nil
}

// prepare makes the cluster where there is none, and returns its password.
func (c *cluster) prepare(ctx context.Context) (password string, err error) {
	_, err = os.Stat(c.data())
	if errors.Is(err, fs.ErrNotExist) {
		err = c.initialise(ctx)
	}
	if err != nil {
		return "", fmt.Errorf("make a PostgreSQL cluster in %s: %w", c.folder, err)
	}
	b, err := os.ReadFile(c.password())
	if err != nil {
		return "", fmt.Errorf("read the password of the PostgreSQL cluster: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}

func (c *cluster) initialise(ctx context.Context) error {
	owner, err := c.owner()
	if err != nil {
		return err
	}
	if err := os.WriteFile(c.password(), []byte(rand.Text()+"\n"), 0o600); err != nil {
		return err
	}
	if err := os.Mkdir(c.newData(), 0o700); err != nil {
		return err
	}
	for _, path := range []string{c.password(), c.newData()} {
		if err := os.Chown(path, owner.uid, owner.gid); err != nil {
			return err
		}
	}
	args := []string{
		"--pgdata=" + c.newData(),
		"--username=postgres", "--auth=scram-sha-256", "--pwfile=" + c.password(),
		"--encoding=UTF8", "--locale=C", "--no-instructions",
	}
	if c.temporary {
		args = append(args, "--no-sync")
	}
	initdb, err := c.run(owner, "initdb", args...)
	if err != nil {
		return err
	}
	select {
	case <-initdb.exited:
	case <-ctx.Done():
		killGroup(initdb.cmd.Process)
		<-initdb.exited
		return context.Cause(ctx)
	}
	if !initdb.cmd.ProcessState.Success() {
		return c.failure(initdb)
	}
	return os.Rename(c.newData(), c.data())
}

// owner returns the user that PostgreSQL runs as: whom the data belongs to,
// where there is some.
func (c *cluster) owner() (account, error) {
	if info, err := os.Stat(c.data()); err == nil {
		return ownerOf(info), nil
	}
	return unprivileged()
}

// serve starts the server on a free port and waits until it accepts connections.
func (c *cluster) serve(ctx context.Context, freePort func() (int, error)) (port int, server *process, err error) {
	owner, err := c.owner()
	if err != nil {
		return 0, nil, err
	}
	for range 5 {
		if port, err = freePort(); err != nil {
			return 0, nil, err
		}
		if server, err = c.serveOn(ctx, owner, port); err == nil {
			return port, server, nil
		}
		if !errors.Is(err, errPortTaken) {
			break
		}
	}
	return 0, nil, fmt.Errorf("start PostgreSQL in %s: %w", c.folder, err)
}

var errPortTaken = errors.New("the port is taken")

func (c *cluster) serveOn(ctx context.Context, owner account, port int) (*process, error) {
	args := []string{
		"-D", c.data(), "-p", strconv.Itoa(port),
		"-c", "listen_addresses=" + loopback,
		"-c", "unix_socket_directories=",
		"-c", "max_connections=200",
		// A collector would close the log that our processes hold the lock by.
		"-c", "logging_collector=off",
	}
	if c.temporary {
		args = append(args, "-c", "fsync=off", "-c", "synchronous_commit=off", "-c", "full_page_writes=off")
	}
	server, err := c.run(owner, "postgres", args...)
	if err != nil {
		return nil, err
	}
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			// The server's own file says so. A connection could reach another
			// process that has the port.
			if pid, ready := c.postmaster(); ready && pid == server.cmd.Process.Pid {
				return server, nil
			}
		case <-server.exited:
			err := c.failure(server)
			if strings.Contains(err.Error(), "could not bind") {
				err = fmt.Errorf("%w: %w", errPortTaken, err)
			}
			return nil, err
		case <-ctx.Done():
			return nil, errors.Join(context.Cause(ctx), server.end(context.WithoutCancel(ctx)))
		}
	}
}

// postmaster returns what the server's process file says: its number, zero
// when there is none, and whether it accepts connections.
func (c *cluster) postmaster() (pid int, ready bool) {
	b, err := os.ReadFile(c.pidFile())
	if err != nil {
		return 0, false
	}
	// The lines' meaning is that of PostgreSQL's src/include/utils/pidfile.h.
	lines := strings.Split(string(b), "\n")
	if pid, err = strconv.Atoi(lines[0]); err != nil {
		return 0, false
	}
	return pid, len(lines) > 7 && strings.TrimSpace(lines[7]) == "ready"
}

// failure says how a program ended, with the end of the log.
func (c *cluster) failure(p *process) error {
	const most = 2 << 10
	b, err := os.ReadFile(c.log.Name())
	if err != nil {
		return fmt.Errorf("%s: %s, and its log cannot be read: %w", filepath.Base(p.cmd.Path), p.cmd.ProcessState, err)
	}
	b = bytes.TrimSpace(b[max(0, len(b)-most):])
	return fmt.Errorf("%s: %s; its last words: %s", filepath.Base(p.cmd.Path), p.cmd.ProcessState, b)
}

// process is a program of PostgreSQL that was started.
type process struct {
	cmd *exec.Cmd
	// exited is closed once it has ended; cmd.ProcessState is set then.
	exited <-chan struct{}
}

// run starts one of PostgreSQL's programs. It writes to the log, which begins anew.
func (c *cluster) run(as account, program string, args ...string) (*process, error) {
	if err := c.log.Truncate(0); err != nil {
		return nil, err
	}
	cmd := exec.Command(filepath.Join(c.bin, program), args...)
	cmd.Dir = "/" // the other user may have no access to where we are
	// The same messages, sort order and days on every machine.
	cmd.Env = append(os.Environ(), "LC_ALL=C", "TZ=UTC")
	cmd.Stdout, cmd.Stderr = c.log, c.log
	isolate(cmd, as)
	dieWithParent(cmd)

	started := make(chan error)
	exited := make(chan struct{})
	go func() {
		defer close(exited)
		// "Parent" is the thread that forks: it has to live as long as the child.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // its error is in cmd.ProcessState too
		}
		// A caller that loses the Server must not lose the locks by garbage collection.
		runtime.KeepAlive(c)
	}()
	return &process{cmd: cmd, exited: exited}, <-started
}

// end stops a server and waits until it is gone.
func (p *process) end(ctx context.Context) error {
	err := shutDown(ctx, func(s syscall.Signal) {
		_ = p.cmd.Process.Signal(s) // it fails when the server has ended already
	}, func(ctx context.Context) bool {
		select {
		case <-p.exited:
			return true
		case <-ctx.Done():
			return false
		}
	})
	if err != nil {
		return fmt.Errorf("stop PostgreSQL: %w", err)
	}
	return nil
}
