//go:build faults

package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/melodia/orchestrator/internal/postgres"
	"github.com/melodia/orchestrator/internal/postgres/pgtest"
)

// databaseRig is an instance under load whose database can be taken away.
type databaseRig struct {
	t        *testing.T
	database string // the direct way to it
	proxy    *proxy
	journal  *journal
	service  *process
	stopLoad func()

	hold atomic.Pointer[chan struct{}] // while it is set, the target answers when that closes
	held atomic.Int32                  // calls that wait for it

	idle int // descriptors that the service has open without load

	// Of all outages so far.
	away, cpu        time.Duration
	lines            int
	connections      int             // that the service began with the database
	requests         int             // submissions and health checks
	results          int             // of calls that ended meanwhile
	noticed          []time.Duration // from the fault to /health 503
	healthy, working []time.Duration // from its end to /health 200 and to the first new task at the target
}

// rigPoll is the rig's POLL_INTERVAL.
const rigPoll = 100 * time.Millisecond

// newDatabaseRig migrates a database and puts a service with its clients before it.
func newDatabaseRig(t *testing.T, database string, lease time.Duration) *databaseRig {
	t.Helper()
	if _, err := postgres.Migrate(t.Context(), database, postgres.MigrationObserver{}); err != nil {
		t.Fatal(err)
	}
	r := &databaseRig{t: t, database: database, proxy: newProxy(t, database), journal: newJournal(t)}
	r.journal.audit(database)
	r.journal.answer = func(w http.ResponseWriter, request *http.Request, _ int) {
		if hold := r.hold.Load(); hold != nil {
			r.held.Add(1)
			select {
			case <-*hold:
			case <-request.Context().Done():
			}
		}
		if cut := request.Header.Get("X-Cut"); cut != "" {
			_, _ = fmt.Fprintf(w, "result-%s.", cut)
		}
	}
	r.service = start(t, "serve", "DATABASE_URL="+r.proxy.url, "LEASE_DURATION="+lease.String(),
		"POLL_INTERVAL="+rigPoll.String(), "LOG_LEVEL=info")
	r.idle = r.service.ready()
	r.load(func() string { return r.service.url })
	return r
}

// load submits tasks until stopLoad is called.
func (r *databaseRig) load(serviceURL func() string) {
	ctx, cancel := context.WithCancel(r.t.Context())
	var submitting sync.WaitGroup
	submitting.Go(func() {
		for ctx.Err() == nil {
			r.journal.load(ctx, 1000, 8, 100, serviceURL, `"retry":{"max_attempts":100}`)
		}
	})
	r.stopLoad = func() { cancel(); submitting.Wait() }
	r.t.Cleanup(r.stopLoad)
}

// outage has the database go away with some calls under way, which end in the
// meantime, and come back when the service was seen to cope and enough says so.
func (r *databaseRig) outage(begin, end func(), enough func() bool) {
	r.t.Helper()
	r.awaitProgress(10)
	hold := make(chan struct{})
	release := sync.OnceFunc(func() { r.hold.Store(nil); close(hold) })
	defer release()
	r.held.Store(0)
	r.hold.Store(&hold)
	eventually(r.t, func() bool { return r.held.Load() >= 5 }, func() string { return "no calls are under way" })

	cpu, lines := r.cpuTime(), r.service.count("")
	connections, requests, calls := r.proxy.begun.Load(), r.journal.submitted(), r.journal.called()-int(r.held.Load())
	began := time.Now()
	begin()
	release()
	noticed, refused := time.Duration(0), false
	eventually(r.t, func() bool {
		if a := r.service.do(http.MethodGet, "/health/live", ""); a.status != http.StatusOK {
			r.t.Fatalf("GET /health/live = %d %s while the database was away, want 200", a.status, a.raw)
		}
		r.requests++
		if a := r.service.do(http.MethodGet, "/health", ""); a.status == http.StatusServiceUnavailable && noticed == 0 {
			noticed = time.Since(began)
		}
		refused = refused || r.journal.submit(r.t.Context(), r.service.url, "") == http.StatusServiceUnavailable
		return noticed > 0 && refused && (enough == nil || enough())
	}, func() string {
		return fmt.Sprintf("the outage did not show: health 503 after %v, a submission answered with 503: %t", noticed, refused)
	})
	tasks := r.journal.called()
	end()
	back := time.Now()
	r.cpu += r.cpuTime() - cpu
	r.lines += r.service.count("") - lines
	r.connections += int(r.proxy.begun.Load() - connections)
	r.requests += r.journal.submitted() - requests
	r.results += tasks - calls
	r.away += back.Sub(began)
	eventually(r.t, func() bool { return r.service.do(http.MethodGet, "/health", "").status == http.StatusOK },
		func() string { return "the service is not healthy again" })
	healthy := time.Since(back)
	eventually(r.t, func() bool { return r.journal.called() > tasks }, func() string { return "no tasks are carried out any more" })
	r.noticed = append(r.noticed, noticed)
	r.healthy = append(r.healthy, healthy)
	r.working = append(r.working, time.Since(back))
}

// turnsAway reports, when it is called, whether n submissions more were answered with 503.
func (r *databaseRig) turnsAway(n int) func() bool {
	count := func() int { return r.journal.answered(http.StatusServiceUnavailable) }
	before := count()
	return func() bool { return count() >= before+n }
}

// awaitProgress waits until so many tasks more have reached the target.
func (r *databaseRig) awaitProgress(more int) {
	r.t.Helper()
	tasks := r.journal.called()
	eventually(r.t, func() bool { return r.journal.called() >= tasks+more }, func() string { return "no tasks are carried out" })
}

// check ends the load and checks what all saw.
func (r *databaseRig) check() figures {
	r.t.Helper()
	r.stopLoad()
	f := r.journal.check(r.database)
	if f.accepted == 0 {
		r.t.Error("nothing was accepted")
	}
	if f.failed > 0 {
		r.t.Errorf("%d tasks failed, though the target refused none", f.failed)
	}
	r.journal.client.CloseIdleConnections()
	r.service.wantDescriptors(r.idle + poolSize)
	if len(r.noticed) == 0 {
		return f
	}
	r.t.Logf("%d outages, %.1f s in all: %.2f s of CPU, %d lines logged, %d connections for %d requests and %d results; health 503 after %s; after the end health 200 within %s, the next task at work within %s",
		len(r.noticed), r.away.Seconds(), r.cpu.Seconds(), r.lines, r.connections, r.requests, r.results, spread(r.noticed), spread(r.healthy), spread(r.working))
	// A loop that does not wait connects again and again. Each submission and each health
	// check may need a connection, and so may each claim, each look for due tasks and each
	// heartbeat, and each try to write a result: at once, then after 50 ms, 100 ms … 1 s, less
	// a fifth. Each outage meets up to 8 submissions and some more results under way, and
	// waits that begin short.
	tries := 6 + int(r.away/time.Duration(len(r.noticed))/(800*time.Millisecond))
	if most := r.requests + 3*int(r.away/rigPoll) + tries*r.results + 30*len(r.noticed); r.connections > most {
		r.t.Errorf("%d connections in outages of %v, want %d at most", r.connections, r.away, most)
	}
	// One line for each look for due tasks, each heartbeat, each second of requests
	// and of health checks, and some that were under way.
	if most := 3*int(r.away/rigPoll) + 50*len(r.noticed); r.lines > most {
		r.t.Errorf("%d lines logged in outages of %v, want %d at most", r.lines, r.away, most)
	}
	return f
}

// checkKept fails the test where a result was not kept until it could be
// written: its task was then called again.
func (r *databaseRig) checkKept(f figures) {
	r.t.Helper()
	if tasks := r.journal.called(); f.calls != tasks {
		r.t.Errorf("%d tasks were called %d times, want once each: results were not kept", tasks, f.calls)
	}
}

// cpuTime is what the service has used (proc(5), /proc/pid/stat).
func (r *databaseRig) cpuTime() time.Duration {
	r.t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", r.service.cmd.Process.Pid))
	if err != nil {
		r.t.Fatal(err)
	}
	fields := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:])) // from the third on
	user, errUser := strconv.Atoi(fields[14-3])
	system, errSystem := strconv.Atoi(fields[15-3])
	if err := errors.Join(errUser, errSystem); err != nil {
		r.t.Fatal(err)
	}
	const tick = time.Second / 100 // USER_HZ
	return time.Duration(user+system) * tick
}

// exec runs statements over a connection of its own, around the proxy.
func (r *databaseRig) exec(statements ...string) {
	r.t.Helper()
	conn, err := pgx.Connect(r.t.Context(), r.database)
	if err != nil {
		r.t.Fatal(err)
	}
	defer func() { _ = conn.Close(r.t.Context()) }()
	for _, sql := range statements {
		if _, err := conn.Exec(r.t.Context(), sql, pgx.QueryExecModeSimpleProtocol); err != nil {
			r.t.Fatalf("%s: %v", sql, err)
		}
	}
}

func spread(times []time.Duration) string {
	times = slices.Sorted(slices.Values(times))
	return fmt.Sprintf("%.2f s (median), %.2f s (worst)", times[len(times)/2].Seconds(), times[len(times)-1].Seconds())
}

// pg_ctl -m immediate, 20 times under load.
func TestDatabaseThatCrashes(t *testing.T) {
	database := startCluster(t, openDir(t))
	r := newDatabaseRig(t, database.url(), 15*time.Second)
	for range 20 {
		r.outage(database.crash, func() {
			database.start()
			r.proxy.lead(database.url())
		}, nil)
	}
	r.database = database.url()
	r.checkKept(r.check())
}

const terminateSQL = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"

// All connections are ended by the server, again and again.
func TestConnectionsThatAreTerminated(t *testing.T) {
	t.Parallel()
	r := newDatabaseRig(t, pgtest.URL(t), 15*time.Second)
	var working []time.Duration
	for range 50 {
		r.awaitProgress(10)
		r.exec(terminateSQL)
		terminated := time.Now()
		r.awaitProgress(1)
		working = append(working, time.Since(terminated))
	}
	t.Logf("the next task at work within %s", spread(working))
	r.checkKept(r.check())
}

// All connections are reset, new ones too.
func TestConnectionsThatAreReset(t *testing.T) {
	t.Parallel()
	r := newDatabaseRig(t, pgtest.URL(t), 15*time.Second)
	for range 5 {
		r.outage(func() { r.proxy.set(modeReset) }, func() { r.proxy.set(modePass) }, r.turnsAway(100))
	}
	r.checkKept(r.check())
}

// A database that accepts everything and says nothing for longer than a call
// may take, and then goes on. The lease holds, since no other instance is there to take over.
func TestDatabaseThatHangs(t *testing.T) {
	t.Parallel()
	r := newDatabaseRig(t, pgtest.URL(t), 15*time.Second)
	for range 2 {
		r.outage(func() { r.proxy.set(modeHang) }, func() { r.proxy.set(modePass) }, nil)
	}
	r.checkKept(r.check())
}

// The connections of one instance lead nowhere for longer than its lease, and
// those will never do again. Another instance finishes what it holds.
func TestDatabaseThatHangsForLongerThanTheLease(t *testing.T) {
	t.Parallel()
	const lease = 2 * time.Second
	r := newDatabaseRig(t, pgtest.URL(t), lease)
	other := start(t, "serve", "DATABASE_URL="+r.database, "LEASE_DURATION="+lease.String(), "POLL_INTERVAL="+rigPoll.String(), "LOG_LEVEL=info")
	registered := r.service.count(`"msg":"registered"`)
	r.outage(func() { r.proxy.set(modeDrop) }, func() { r.proxy.set(modePass) },
		func() bool { return other.count("took over lost tasks") > 0 })
	eventually(t, func() bool { return r.service.count(`"msg":"registered"`) > registered },
		func() string { return "the instance did not register anew" })
	other.stop(syscall.SIGTERM)
	r.awaitProgress(10)
	f := r.check()
	if f.repeated == 0 {
		t.Error("no task was taken over: the fault hit nothing")
	}
	r.journal.checkTakeovers(f, lease, rigPoll)
}

// The connection is cut at the very moment of a commit: before it, or between
// it and its answer.
func TestCommitThatIsCut(t *testing.T) {
	t.Parallel()
	r := newDatabaseRig(t, pgtest.URL(t), 15*time.Second)
	await := func(cut <-chan struct{}) {
		t.Helper()
		select {
		case <-cut:
		case <-time.After(patience):
			t.Fatal("nothing passed that was to be cut")
		}
	}
	for i := range 40 {
		through, want := false, 0
		if i%2 == 0 {
			through, want = true, 1
		}
		cut := r.proxy.cutAt(fmt.Sprintf("submission-%d.", i), through)
		status := r.journal.submit(t.Context(), r.service.url, fmt.Sprintf(`"labels":{"cut":"submission-%d."}`, i))
		await(cut)
		if stored := r.stored(i); status != http.StatusServiceUnavailable || stored != want {
			t.Errorf("a submission, committed %t: answered with %d, stored %d times; want 503, %d", through, status, stored, want)
		}
		// The result has the target's answer in it.
		cut = r.proxy.cutAt(fmt.Sprintf("result-%d.", i), through)
		if status := r.journal.submit(t.Context(), r.service.url, fmt.Sprintf(`"headers":{"X-Cut":"%d"}`, i)); status != http.StatusAccepted {
			t.Errorf("a submission while nothing is cut: answered with %d, want 202", status)
		}
		await(cut)
	}
	r.checkKept(r.check())
}

// stored is how many tasks there are of submission i of TestCommitThatIsCut.
func (r *databaseRig) stored(i int) (n int) {
	r.t.Helper()
	conn, err := pgx.Connect(r.t.Context(), r.database)
	if err != nil {
		r.t.Fatal(err)
	}
	defer func() { _ = conn.Close(r.t.Context()) }()
	err = conn.QueryRow(r.t.Context(), `SELECT count(*) FROM (SELECT labels FROM tasks UNION ALL SELECT labels FROM task_history) t
		WHERE labels->>'cut' = $1`, fmt.Sprintf("submission-%d.", i)).Scan(&n)
	if err != nil {
		r.t.Fatal(err)
	}
	return n
}

// The database takes no writes for a while, as after a failover to a standby
// that is promoted late.
func TestDatabaseThatIsReadOnly(t *testing.T) {
	t.Parallel()
	r := newDatabaseRig(t, pgtest.URL(t), 5*time.Second)
	config, err := pgx.ParseConfig(r.database)
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		r.outage(func() {
			r.exec("ALTER DATABASE "+config.Database+" SET default_transaction_read_only = on", terminateSQL)
		}, func() {
			r.exec("SET default_transaction_read_only = off", "ALTER DATABASE "+config.Database+" RESET default_transaction_read_only")
		}, r.turnsAway(100))
	}
	r.checkKept(r.check())
}

// The database's disk is full. PostgreSQL refuses what needs room, then crashes
// when its log needs some.
func TestDatabaseWithFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("this test mounts a file system and so must run as root")
	}
	dir := openDir(t)
	if out, err := exec.CommandContext(t.Context(), "mount", "-t", "tmpfs", "-o", "size=128m,mode=0755", "orchestrator-test", dir).CombinedOutput(); err != nil {
		t.Fatalf("mount a small file system: %v: %s", err, out)
	}
	t.Cleanup(func() {
		if out, err := exec.CommandContext(context.WithoutCancel(t.Context()), "umount", dir).CombinedOutput(); err != nil {
			t.Errorf("umount: %v: %s", err, out)
		}
	})
	database := startCluster(t, dir)
	r := newDatabaseRig(t, database.url(), 5*time.Second)
	filler := filepath.Join(dir, "filler")
	for _, crash := range []bool{false, true, false, true} {
		r.outage(func() {
			fill(t, filler)
			if crash {
				r.fillLog()
			}
		}, func() {
			if err := os.Remove(filler); err != nil {
				t.Fatal(err)
			}
			if !database.answers() {
				database.crash()
				database.start()
				r.proxy.lead(database.url())
				r.database = database.url()
			}
		}, r.turnsAway(100))
	}
	r.checkKept(r.check())
}

// fillLog has PostgreSQL begin new segments of its log until it crashes for
// want of room.
func (r *databaseRig) fillLog() {
	r.t.Helper()
	conn, err := pgx.Connect(r.t.Context(), r.database)
	if err != nil {
		r.t.Fatal(err)
	}
	eventually(r.t, func() bool {
		_, err := conn.Exec(r.t.Context(), "SELECT pg_logical_emit_message(true, '', ''), pg_switch_wal()", pgx.QueryExecModeSimpleProtocol)
		return err != nil && conn.IsClosed()
	}, func() string { return "PostgreSQL finds room for its log" })
}

// fill takes all the room that is left on a file's disk.
func fill(t *testing.T, name string) {
	t.Helper()
	file, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = file.Close() }()
	zeros := make([]byte, 1<<20)
	for size := len(zeros); size > 0; {
		if _, err := file.Write(zeros[:size]); errors.Is(err, syscall.ENOSPC) {
			size /= 2
		} else if err != nil {
			t.Fatal(err)
		}
	}
}
