//go:build unix

package devdb

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"go.uber.org/goleak"
)

// victimDir makes the test program a run that starts a server and gets killed.
const victimDir = "DEVDB_TEST_VICTIM_DIR"

func TestMain(m *testing.M) {
	if dir := os.Getenv(victimDir); dir != "" {
		s, err := Start(context.Background(), Options{Dir: dir})
		fmt.Println(s, err)
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(1)
	}
	goleak.VerifyTestMain(m)
}

func TestStartAndStop(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name      string
		temporary bool
		fsync     string
	}{
		{name: "kept", temporary: false, fsync: "on"},
		{name: "temporary", temporary: true, fsync: "off"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			dir := newDir(t)
			s := mustStart(t, Options{Dir: dir, Temporary: tt.temporary})
			for setting, want := range map[string]string{
				"fsync": tt.fsync, "synchronous_commit": tt.fsync, "full_page_writes": tt.fsync,
				"server_encoding": "UTF8", "lc_collate": "C", "TimeZone": "UTC",
				"max_connections": "200", "listen_addresses": "127.0.0.1", "unix_socket_directories": "",
			} {
				if got := query(t, s, fmt.Sprintf("SELECT current_setting('%s')", setting)); got != want {
					t.Errorf("%s = %q, want %q", setting, got, want)
				}
			}

			if err := s.Stop(); err != nil {
				t.Fatalf("Stop() = %v", err)
			}
			if err := s.Stop(); err != nil {
				t.Errorf("second Stop() = %v", err)
			}
			if conn, err := pgx.Connect(t.Context(), s.URL("postgres")); err == nil {
				conn.Close(t.Context())
				t.Error("the server still answers after Stop")
			}
			clusters, err := filepath.Glob(filepath.Join(dir, "*", "data"))
			if kept := len(clusters) == 1; err != nil || kept == tt.temporary {
				t.Errorf("clusters after Stop = %q, %v; temporary is %t", clusters, err, tt.temporary)
			}
		})
	}
}

func TestPasswordIsWanted(t *testing.T) {
	t.Parallel()
	s := mustStart(t, Options{Dir: newDir(t), Temporary: true})
	config, err := pgx.ParseConfig(s.URL("postgres"))
	if err != nil {
		t.Fatal(err)
	}
	config.Password = "guessed"
	conn, err := pgx.ConnectConfig(t.Context(), config)
	if err == nil {
		conn.Close(t.Context())
	}
	const invalidPassword = "28P01"
	if pgErr, ok := errors.AsType[*pgconn.PgError](err); !ok || pgErr.Code != invalidPassword {
		t.Errorf("with a wrong password: %v, want SQLSTATE %s", err, invalidPassword)
	}
}

func TestDataSurvivesRestart(t *testing.T) {
	t.Parallel()
	o := Options{Dir: newDir(t)}
	s := mustStart(t, o)
	query(t, s, "CREATE TABLE kept AS SELECT 'still here' AS note")
	if err := s.Stop(); err != nil {
		t.Fatal(err)
	}
	s = mustStart(t, o)
	if got := query(t, s, "SELECT note FROM kept"); got != "still here" {
		t.Errorf("after a restart: %q, want %q", got, "still here")
	}
}

func TestFresh(t *testing.T) {
	t.Parallel()
	dir := newDir(t)
	first := mustStart(t, Options{Dir: dir})
	query(t, first, "CREATE TABLE kept (n int)")
	// What another process uses stays as it is.
	other := mustStart(t, Options{Dir: dir, Fresh: true})
	if other.Folder() == first.Folder() {
		t.Errorf("both use %s", first.Folder())
	}
	stop(t, other)
	if got := query(t, first, "SELECT count(*)::text FROM kept"); got != "0" {
		t.Errorf("the table in use has %s rows, want 0", got)
	}
	stop(t, first)
	fresh := mustStart(t, Options{Dir: dir, Fresh: true})
	if got := query(t, fresh, "SELECT coalesce(to_regclass('kept')::text, 'gone')"); fresh.Folder() != first.Folder() || got != "gone" {
		t.Errorf("in %s the table is %s, want it gone from %s", fresh.Folder(), got, first.Folder())
	}
	stop(t, fresh)
}

func TestCacheFolderOfRoot(t *testing.T) {
	cache := filepath.Join(newDir(t), "cache")
	t.Setenv("XDG_CACHE_HOME", cache)
	if got, err := makeDir(""); err != nil || got != filepath.Join(cache, "orchestrator") {
		t.Errorf("makeDir() = %q, %v, want it in XDG_CACHE_HOME", got, err)
	}
}

func TestTwoAtOnce(t *testing.T) {
	t.Parallel()
	for _, temporary := range []bool{false, true} {
		t.Run(fmt.Sprintf("temporary=%t", temporary), func(t *testing.T) {
			t.Parallel()
			o := Options{Dir: newDir(t), Temporary: temporary}
			servers := make([]*Server, 2)
			var starting sync.WaitGroup
			for i := range servers {
				starting.Go(func() { servers[i] = tryStart(t, o) })
			}
			starting.Wait()
			if t.Failed() {
				return
			}
			var folders []string
			for i, s := range servers {
				query(t, s, fmt.Sprintf("CREATE TABLE own AS SELECT 'server %d' AS note", i))
				folders = append(folders, query(t, s, "SHOW data_directory"))
			}
			for i, s := range servers {
				if got, want := query(t, s, "SELECT note FROM own"), fmt.Sprintf("server %d", i); got != want {
					t.Errorf("got %q, want %q", got, want)
				}
			}
			slices.Sort(folders) // "-2/data" comes before "/data"
			if want := filepath.Dir(folders[1]) + "-2/data"; folders[0] != want {
				t.Errorf("folders = %q, want %q for the second", folders, want)
			}

			// The freed folder is taken again, so their number stays small.
			if err := servers[0].Stop(); err != nil {
				t.Fatal(err)
			}
			if got := query(t, mustStart(t, o), "SHOW data_directory"); !slices.Contains(folders, got) {
				t.Errorf("after a Stop a new folder %s is used, want one of %q", got, folders)
			}
		})
	}
}

// abandon makes a server one that a killed run left behind, running.
func abandon(t *testing.T, c *cluster) {
	t.Helper()
	if err := errors.Join(c.log.Close(), c.lock.Close()); err != nil {
		t.Fatal(err)
	}
}

// serveAlone starts a kept server in dir without a Server that cares for it.
func serveAlone(t *testing.T, dir string) (*cluster, *process, *Server) {
	t.Helper()
	silent := slog.New(slog.DiscardHandler)
	pg, err := thisMachine().find(t.Context(), dir, silent)
	if err != nil {
		t.Fatal(err)
	}
	c, err := claim(dir, pg, false)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.takeOver(t.Context(), silent); err != nil {
		t.Fatal(err)
	}
	password, err := c.prepare(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	port, p, err := c.serve(t.Context(), freePort)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = p.cmd.Process.Signal(syscall.SIGQUIT)
		<-p.exited
	})
	return c, p, &Server{port: port, password: password}
}

func TestOrphanIsStopped(t *testing.T) {
	t.Parallel()
	dir := newDir(t)
	c, p, orphan := serveAlone(t, dir)
	query(t, orphan, "CREATE TABLE kept AS SELECT 'still here' AS note")
	abandon(t, c)

	var log bytes.Buffer
	s := mustStart(t, Options{Dir: dir, Log: slog.New(slog.NewTextHandler(&log, nil))})
	<-p.exited // the orphan ended, or this test hangs
	if got := query(t, s, "SELECT note FROM kept"); got != "still here" {
		t.Errorf("after the orphan: %q, want %q", got, "still here")
	}
	if got, want := query(t, s, "SHOW data_directory"), c.data(); got != want {
		t.Errorf("runs in %s, want the orphan's folder %s", got, want)
	}
	if !strings.Contains(log.String(), "earlier run") {
		t.Errorf("log = %q, want a word about the earlier run", log.String())
	}
}

// TestCtrlC checks that the terminal's signals, which go to the process group
// in the foreground, do not reach the server.
func TestCtrlC(t *testing.T) {
	t.Parallel()
	c, p, _ := serveAlone(t, newDir(t))
	defer abandon(t, c)
	group, err := syscall.Getpgid(p.cmd.Process.Pid)
	if err != nil || group == syscall.Getpgrp() {
		t.Errorf("the server's process group is %d, %v; want another than ours", group, err)
	}
}

func TestKilledServer(t *testing.T) {
	t.Parallel()
	dir := newDir(t)
	c, p, killed := serveAlone(t, dir)
	query(t, killed, "CREATE TABLE kept AS SELECT 'still here' AS note")
	if err := p.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-p.exited
	abandon(t, c)
	awaitUnlocked(t, c.log.Name())
	// The number in the stale file may be anybody's by now: here that of a
	// process which the server's user could signal, and PostgreSQL respects.
	bystander := startBystander(t, c)
	b, err := os.ReadFile(c.pidFile())
	if err != nil {
		t.Fatalf("a killed server leaves its file: %v", err)
	}
	_, rest, _ := bytes.Cut(b, []byte("\n"))
	if err := os.WriteFile(c.pidFile(), append([]byte(strconv.Itoa(bystander.cmd.Process.Pid)+"\n"), rest...), 0o600); err != nil {
		t.Fatal(err)
	}

	s := mustStart(t, Options{Dir: dir})
	if got := query(t, s, "SELECT note FROM kept"); got != "still here" {
		t.Errorf("after a kill: %q, want %q", got, "still here")
	}
	select {
	case <-bystander.exited:
		t.Errorf("a process that is none of ours was ended: %s", bystander.cmd.ProcessState)
	default:
	}
}

// awaitUnlocked waits for the children of a killed server: they hold the lock
// on its log until they notice.
func awaitUnlocked(t *testing.T, name string) {
	t.Helper()
	log, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for {
		if free, err := tryLock(log); err != nil || free {
			return
		}
		select {
		case <-tick.C:
		case <-t.Context().Done():
			t.Fatal("the children of a killed server hold its log")
		}
	}
}

// startBystander runs a process of the server's user that only waits.
func startBystander(t *testing.T, c *cluster) *process {
	t.Helper()
	owner, err := c.owner()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sleep", "3600")
	isolate(cmd, owner)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan struct{})
	go func() {
		defer close(exited)
		_ = cmd.Wait()
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-exited
	})
	return &process{cmd: cmd, exited: exited}
}

// TestKilledRun kills a whole process that uses the package.
func TestKilledRun(t *testing.T) {
	t.Parallel()
	dir := newDir(t)
	run := exec.Command(os.Args[0])
	run.Env = append(os.Environ(), victimDir+"="+dir)
	stdin, err := run.StdinPipe() // were we to die, its end would tell the run
	if err != nil {
		t.Fatal(err)
	}
	defer stdin.Close()
	stdout, err := run.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := run.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if !strings.HasSuffix(line, " <nil>\n") {
		t.Errorf("the run's Start: %q, %v", line, err)
	}
	_ = run.Process.Kill()
	_ = run.Wait()

	if runtime.GOOS == "linux" {
		waitForEnd(t, dir) // the server ends by itself
		logs, _ := filepath.Glob(filepath.Join(dir, "*", "log"))
		b, err := os.ReadFile(logs[0])
		if err != nil || !bytes.Contains(b, []byte("received fast shutdown request")) {
			t.Errorf("the server's log: %s, %v; want an orderly end", b, err)
		}
	}
	s := mustStart(t, Options{Dir: dir})
	if got := query(t, s, "SELECT 1::text"); got != "1" {
		t.Errorf("SELECT 1 = %q", got)
	}
}

func TestUnfinishedClusterIsMadeAnew(t *testing.T) {
	t.Parallel()
	dir := newDir(t)
	// Up to the moment before it would have got its name.
	c, p, _ := serveAlone(t, dir)
	if err := p.end(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Rename(c.data(), c.newData()), os.Remove(filepath.Join(c.newData(), "PG_VERSION"))); err != nil {
		t.Fatal(err)
	}
	abandon(t, c)

	s := mustStart(t, Options{Dir: dir})
	if got := query(t, s, "SHOW data_directory"); got != c.data() {
		t.Errorf("data_directory = %s, want %s", got, c.data())
	}
	if _, err := os.Stat(c.newData()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s: %v, want it removed", c.newData(), err)
	}
}

func TestStrangersAreNotTouched(t *testing.T) {
	t.Parallel()
	dir := newDir(t)
	pg, err := thisMachine().find(t.Context(), dir, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	name := fmt.Sprintf("pg%d", pg.major)
	// Where the first cluster would go is a folder of another program, then a file, then an
	// empty folder, which may be used.
	stranger := filepath.Join(dir, name, "data", "PG_VERSION")
	if err := errors.Join(
		os.MkdirAll(filepath.Dir(stranger), 0o755),
		os.WriteFile(stranger, []byte("theirs"), 0o644),
		os.WriteFile(filepath.Join(dir, name+"-2"), []byte("theirs"), 0o644),
		os.Mkdir(filepath.Join(dir, name+"-3"), 0o755),
	); err != nil {
		t.Fatal(err)
	}
	s := mustStart(t, Options{Dir: dir})
	if got, want := query(t, s, "SHOW data_directory"), filepath.Join(dir, name+"-3", "data"); got != want {
		t.Errorf("data_directory = %s, want %s", got, want)
	}
	if err := s.Stop(); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{stranger, filepath.Join(dir, name+"-2")} {
		if b, err := os.ReadFile(path); err != nil || string(b) != "theirs" {
			t.Errorf("%s = %q, %v; want it untouched", path, b, err)
		}
	}
	if entries, err := os.ReadDir(filepath.Join(dir, name)); err != nil || len(entries) != 1 {
		t.Errorf("the stranger's folder has %v, %v; want what was there", entries, err)
	}
}

func TestTakenPortIsGivenUp(t *testing.T) {
	t.Parallel()
	other, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	m := thisMachine()
	asked := 0
	m.freePort = func() (int, error) {
		if asked++; asked == 1 {
			return other.Addr().(*net.TCPAddr).Port, nil
		}
		return freePort()
	}
	s, err := start(t.Context(), Options{Dir: newDir(t), Temporary: true}, m)
	if err != nil {
		t.Fatal(err)
	}
	defer stop(t, s)
	if got := query(t, s, "SELECT 1::text"); got != "1" || asked != 2 {
		t.Errorf("SELECT 1 = %q after %d ports, want 1 after 2", got, asked)
	}
}

func TestFailedStartShowsTheLog(t *testing.T) {
	t.Parallel()
	dir := newDir(t)
	c, p, _ := serveAlone(t, dir)
	if err := p.end(t.Context()); err != nil {
		t.Fatal(err)
	}
	abandon(t, c)
	if err := os.WriteFile(filepath.Join(c.data(), "postgresql.conf"), []byte("no_such_setting = 1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := Start(t.Context(), Options{Dir: dir})
	if err == nil || !strings.Contains(err.Error(), "no_such_setting") {
		t.Errorf("Start() = %v, want the end of the log", err)
	}
	if _, err := os.Stat(c.data()); err != nil {
		t.Errorf("the data is gone after a failed start: %v", err)
	}
}

func TestCancelInInitdb(t *testing.T) { // not in parallel: see find_test.go
	dir := newDir(t)
	bin := filepath.Join(dir, "bin")
	writeProgram(t, filepath.Join(bin, "postgres"), "echo 'postgres (PostgreSQL) 17.5'")
	writeProgram(t, filepath.Join(bin, "initdb"), "echo begun; sleep 3600")
	ctx, cancel := context.WithCancelCause(t.Context())
	enough := errors.New("enough")
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		for range tick.C {
			if b, _ := os.ReadFile(filepath.Join(dir, "pg17", "log")); len(b) > 0 {
				cancel(enough)
				return
			}
		}
	}()
	_, err := start(ctx, Options{Dir: dir}, machine{path: []string{bin}})
	if !errors.Is(err, enough) {
		t.Errorf("Start() = %v, want %v", err, enough)
	}
	<-watched
	waitForEnd(t, dir)
}

func TestCancelInPostgres(t *testing.T) {
	t.Parallel()
	dir := newDir(t)
	ctx, cancel := context.WithCancelCause(t.Context())
	enough := errors.New("enough")
	m := thisMachine()
	m.freePort = func() (int, error) { // the last thing before the server starts
		cancel(enough)
		return freePort()
	}
	_, err := start(ctx, Options{Dir: dir}, m)
	if !errors.Is(err, enough) {
		t.Errorf("Start() = %v, want %v", err, enough)
	}
	waitForEnd(t, dir)
}

// waitForEnd waits until no process of the only cluster in dir is left. It
// hangs while there is one.
func waitForEnd(t *testing.T, dir string) {
	t.Helper()
	logs, err := filepath.Glob(filepath.Join(dir, "*", "log"))
	if err != nil || len(logs) != 1 {
		t.Fatalf("logs = %q, %v; want one", logs, err)
	}
	log, err := os.Open(logs[0])
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	if err := syscall.Flock(int(log.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}
}

// newDir returns a folder that other users can reach, unlike t.TempDir's.
func newDir(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chmod(filepath.Dir(dir), 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

func mustStart(t *testing.T, o Options) *Server {
	t.Helper()
	s := tryStart(t, o)
	if s == nil {
		t.FailNow()
	}
	return s
}

// tryStart may be called from any goroutine.
func tryStart(t *testing.T, o Options) *Server {
	t.Helper()
	s, err := Start(t.Context(), o)
	if err != nil {
		t.Errorf("Start(%+v) = %v", o, err)
		return nil
	}
	t.Cleanup(func() { stop(t, s) })
	return s
}

func stop(t *testing.T, s *Server) {
	t.Helper()
	if err := s.Stop(); err != nil {
		t.Errorf("Stop() = %v", err)
	}
}

// query returns the text in the first row of the result, if there is any.
func query(t *testing.T, s *Server, sql string) string {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), s.URL("postgres"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	rows, err := conn.Query(t.Context(), sql)
	if err != nil {
		t.Fatal(err)
	}
	texts, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return strings.Join(texts, "\n")
}
