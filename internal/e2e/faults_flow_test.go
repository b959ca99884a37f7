//go:build faults

package e2e

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/melodia/orchestrator/internal/postgres"
	"github.com/melodia/orchestrator/internal/postgres/pgtest"
)

// sickHosts is a journal whose target is four hosts: one is well, one answers slowly, one
// serves few calls a second and refuses the others with Retry-After, and one is away at first.
type sickHosts struct {
	*journal

	limited, broken string

	mu     sync.Mutex
	since  time.Time
	in     int // calls to the limited one since then
	failed int // calls to the broken one
}

func newSickHosts(t *testing.T) *sickHosts {
	t.Helper()
	const perSecond, away = 20, 30
	h := &sickHosts{journal: newJournal(t)}
	slow := h.alsoAt("127.0.0.2")
	h.limited, h.broken = h.alsoAt("127.0.0.3"), h.alsoAt("127.0.0.4")
	h.urls = []string{h.url, slow, h.limited, h.broken, h.url}
	h.answer = func(w http.ResponseWriter, r *http.Request, nth int) {
		switch "http://" + r.Host {
		case slow:
			select {
			case <-time.After(time.Second):
			case <-r.Context().Done():
			}
		case h.limited:
			if h.refuses(perSecond) {
				w.Header().Set("Retry-After", "1")
				w.WriteHeader(http.StatusTooManyRequests)
			}
		case h.broken:
			h.mu.Lock()
			h.failed++
			fails := h.failed <= away
			h.mu.Unlock()
			if fails {
				w.WriteHeader(http.StatusBadGateway)
			}
		default:
			afterAMoment(w, r, nth)
		}
	}
	return h
}

func (h *sickHosts) refuses(perSecond int) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if now := time.Now(); now.Sub(h.since) >= time.Second {
		h.since, h.in = now, 0
	}
	h.in++
	return h.in > perSecond
}

// retries lets no task die of what the hosts do.
const retries = `"retry":{"max_attempts":100,"min_backoff_seconds":0.1,"max_backoff_seconds":2}`

// throughFaults submits tasks for sick hosts to three instances, which reach the database at
// serviceURL, while fault is called again and again. Then it checks the invariants: no task is
// forgotten in a lane, and none is called twice without a reason.
func throughFaults(t *testing.T, database func() string, serviceURL string, faults int, fault func(f *fleet, n int)) figures {
	t.Helper()
	const tasks, lease, poll = 1000, time.Second, 100 * time.Millisecond
	h := newSickHosts(t)
	h.insists = true
	h.audit(database())
	f := startFleet(t, 3, "DATABASE_URL="+serviceURL, "LEASE_DURATION="+lease.String(), "POLL_INTERVAL="+poll.String(), "LOG_LEVEL=info", "DISPATCH_CONCURRENCY=20")
	var submitting sync.WaitGroup
	submitting.Go(func() {
		for left := tasks; left > 0; left = tasks - h.answered(http.StatusAccepted) - h.answered(http.StatusOK) {
			h.load(t.Context(), left, 16, 0, f.url, retries)
		}
	})
	for n := range faults {
		eventually(t, func() bool { return h.called() > tasks*(n+1)/(2*faults+2) }, func() string { return "calls do not get on" })
		fault(f, n)
	}
	submitting.Wait()
	// It is well again, and its breaker need not be waited for.
	for _, host := range hostsIn(t, database()) {
		if host == h.broken {
			closeHost(f.instances[0], host)
		}
	}
	got := h.check(database())
	if got.failed > 0 {
		t.Errorf("%d tasks failed, though each may be tried 100 times", got.failed)
	}
	return got
}

// on is a database that stays where it is.
func on(database string) (func() string, string) { return func() string { return database }, database }

// F6, F7: kill -9 of instances that hold tasks of sick hosts.
func TestF6SickHostsWhileInstancesAreKilled(t *testing.T) {
	database, url := on(pgtest.URL(t))
	got := throughFaults(t, database, url, 5, func(f *fleet, n int) { f.replace(n%3, syscall.SIGKILL) })
	if got.lostAttempts == 0 {
		t.Error("no attempt was lost: the kills hit nothing")
	}
}

// Instances that stall for longer than their lease.
func TestF6SickHostsWhileInstancesStall(t *testing.T) {
	database, url := on(pgtest.URL(t))
	throughFaults(t, database, url, 4, func(f *fleet, n int) {
		victim := f.instances[n%3]
		registrations := victim.count(`"msg":"registered"`)
		if err := victim.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		time.AfterFunc(3*time.Second, func() { _ = victim.cmd.Process.Signal(syscall.SIGCONT) })
		eventually(t, func() bool { return victim.count(`"msg":"registered"`) > registrations }, func() string { return "a stopped instance did not register anew" })
	})
}

// F12: a rolling restart: what is known of hosts is handed on, and no attempt is lost.
func TestF12SickHostsThroughARollingRestart(t *testing.T) {
	database, url := on(pgtest.URL(t))
	got := throughFaults(t, database, url, 3, func(f *fleet, n int) {
		if old, _ := f.replace(n%3, syscall.SIGTERM); old.cmd.ProcessState.ExitCode() != 0 {
			t.Errorf("an instance ended with code %d", old.cmd.ProcessState.ExitCode())
		}
	})
	if got.lostAttempts > 0 {
		t.Errorf("%d attempts were lost, though every instance ended in order", got.lostAttempts)
	}
}

// The database crashes, and comes back with what is known of hosts.
func TestF6SickHostsThroughDatabaseCrashes(t *testing.T) {
	c := startCluster(t, openDir(t))
	if _, err := postgres.Migrate(t.Context(), c.url(), postgres.MigrationObserver{}); err != nil {
		t.Fatal(err)
	}
	p := newProxy(t, c.url())
	throughFaults(t, c.url, p.url, 3, func(*fleet, int) {
		c.crash()
		c.start()
		p.lead(c.url())
	})
}

// backlogSQL stores many plain tasks that are due, for one URL.
const backlogSQL = `INSERT INTO tasks (id, run_at, created_at, timeout_seconds, max_retry_duration_seconds, min_backoff_seconds, max_backoff_seconds,
    max_attempts, max_doublings, retry_client_errors, method, url, content_type, headers, labels, queue, lane, state)
SELECT gen_random_uuid(), now() - interval '1 minute', now(), 1800, 0, 1, 3600, 10, 16, false, 'POST', $1, '', '{}', '{}',
    NULLIF($3, ''), CASE WHEN $3 <> '' THEN $3 || '/' END, CASE WHEN $3 <> '' THEN 'waiting' ELSE 'pending' END
FROM generate_series(1, $2)`

// F9: a fast host behind 100,000 tasks of a slow one. The figure is logged.
func TestF9FastHostBehindManyTasks(t *testing.T) {
	database := pgtest.URL(t)
	slow, fast := newHanging(t), newTarget(t, statusOf)
	execute(t, database, backlogSQL, slow.url+"/slow", 100_000, "")
	p := start(t, "serve", "DATABASE_URL="+database, "LOG_LEVEL=info")
	began := time.Now()
	p.submit("/enqueue", `{"url":"`+fast.url+`/200/first"}`)
	fast.called(t, "/200/first", 1)
	t.Logf("a fast host behind 100,000 tasks of a slow one was called after %.2f s", time.Since(began).Seconds())
	// Now it is known that the other one is slow.
	t.Logf("and then %.0f ms after the submission (median of 20)", latency(p, fast, 20).Seconds()*1000)
}

// A million due tasks in a paused queue delay no task elsewhere. The figure is logged.
func TestManyTasksInAPausedQueue(t *testing.T) {
	database := pgtest.URL(t)
	fast := newTarget(t, statusOf)
	execute(t, database, "INSERT INTO queues (name, paused_at) VALUES ('paused', now())")
	execute(t, database, backlogSQL, fast.url+"/paused", 1_000_000, "paused")
	p := start(t, "serve", "DATABASE_URL="+database, "LOG_LEVEL=info")
	t.Logf("a fresh task elsewhere was called %.0f ms after its submission (median of 20)", latency(p, fast, 20).Seconds()*1000)
	if n := len(fast.got("/paused")); n > 0 {
		t.Errorf("%d tasks of a paused queue were called", n)
	}
}

func execute(t *testing.T, database, sql string, arguments ...any) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), database)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close(context.WithoutCancel(t.Context())) }()
	if _, err := conn.Exec(t.Context(), sql, arguments...); err != nil {
		t.Fatal(err)
	}
}

// latency is the median of the times from the submission of a task to its call.
func latency(p *process, target *target, n int) time.Duration {
	p.t.Helper()
	var times []time.Duration
	for i := range n {
		path := fmt.Sprint("/200/", i)
		began := time.Now()
		p.submit("/enqueue", `{"url":"`+target.url+path+`"}`)
		target.called(p.t, path, 1)
		times = append(times, target.got(path)[0].at.Sub(began))
	}
	slices.Sort(times)
	return times[n/2]
}
