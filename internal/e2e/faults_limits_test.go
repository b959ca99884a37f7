//go:build faults

package e2e

import (
	"cmp"
	"context"
	"fmt"
	"math"
	"net/http"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/melodia/orchestrator/internal/postgres"
	"github.com/melodia/orchestrator/internal/postgres/pgtest"
)

// limitedQueues are the queues of these tests, with the calls at a time that each may have,
// and that each of its keys may have; 0 is any number.
var limitedQueues = map[string]struct {
	settings      string
	queue, key    int
	perSecond     float64
	burst         int
	keys, perLane int // how many there are, and tasks of each
}{
	"narrow":  {settings: `{"max_concurrent":4,"per_key":{"max_concurrent":2}}`, queue: 4, key: 2, keys: 3, perLane: 150},
	"ordered": {settings: `{"per_key":{"ordered":true}}`, key: 1, keys: 4, perLane: 50},
	"rated":   {settings: `{"max_per_second":40,"burst":5}`, perSecond: 40, burst: 5, keys: 2, perLane: 100},
}

// span is a call at the target: of a lane, from its beginning to its end.
type span struct {
	lane     string
	attempt  string // of which task
	from, to time.Time
}

// limitsRig is a journal whose target notes the calls of each lane, and a database of which
// snapshots are taken all the time.
type limitsRig struct {
	*journal

	mu    sync.Mutex
	spans []span
}

func newLimitsRig(t *testing.T) *limitsRig {
	r := &limitsRig{journal: newJournal(t)}
	r.insists = true
	r.answer = func(w http.ResponseWriter, request *http.Request, nth int) {
		one := span{
			lane:    request.Header.Get("X-Lane"),
			attempt: request.Header.Get("Orchestrator-Task-Id") + " " + request.Header.Get("Orchestrator-Attempt"), from: time.Now(),
		}
		afterAMoment(w, request, nth)
		one.to = time.Now()
		r.mu.Lock()
		r.spans = append(r.spans, one)
		r.mu.Unlock()
	}
	return r
}

// submitAll submits the tasks of all queues, and returns when all are accepted.
func (r *limitsRig) submitAll(url func() string) {
	var submitting sync.WaitGroup
	for name, q := range limitedQueues {
		for k := range q.keys {
			lane := fmt.Sprintf("%s/k%d", name, k)
			extra := fmt.Sprintf(`"queue":%q,"flow_key":"k%d","headers":{"X-Lane":%q},"retry":{"max_attempts":100,"min_backoff_seconds":0.1,"max_backoff_seconds":1}`, name, k, lane)
			submitting.Go(func() { r.load(r.t.Context(), q.perLane, 4, 0, url, extra) })
		}
	}
	submitting.Wait()
}

// runningSQL is what runs in one snapshot, by queue and key.
const runningSQL = `SELECT split_part(lane, '/', 1), split_part(split_part(lane, ' ', 1), '/', 2), count(*)
FROM tasks WHERE state = 'running' AND lane IS NOT NULL GROUP BY 1, 2`

// watch takes snapshots of the database until stop is called, which returns how many there
// were. Each must keep the limits. While the database is away there are none.
func (r *limitsRig) watch(database func() string) (stop func() (snapshots int)) {
	ctx, cancel := context.WithCancel(r.t.Context())
	var watching sync.WaitGroup
	snapshots := 0
	look := func(conn *pgx.Conn) error {
		rows, err := conn.Query(ctx, runningSQL)
		if err != nil {
			return err
		}
		ofQueue := map[string]int{}
		var queue, key string
		var n int
		if _, err := pgx.ForEachRow(rows, []any{&queue, &key, &n}, func() error {
			ofQueue[queue] += n
			if most := limitedQueues[queue].key; most > 0 && n > most {
				r.t.Errorf("a snapshot has %d running tasks of key %s of queue %s, which may have %d", n, key, queue, most)
			}
			return nil
		}); err != nil {
			return err
		}
		for queue, n := range ofQueue {
			if most := limitedQueues[queue].queue; most > 0 && n > most {
				r.t.Errorf("a snapshot has %d running tasks of queue %s, which may have %d", n, queue, most)
			}
		}
		snapshots++
		return nil
	}
	watching.Go(func() {
		tick := time.NewTicker(2 * time.Millisecond)
		defer tick.Stop()
		for ctx.Err() == nil {
			conn, err := pgx.Connect(ctx, database())
			for err == nil {
				err = look(conn)
				select {
				case <-tick.C:
				case <-ctx.Done():
					err = ctx.Err()
				}
			}
			if conn != nil {
				_ = conn.Close(context.WithoutCancel(ctx))
			}
			select {
			case <-tick.C:
			case <-ctx.Done():
			}
		}
	})
	return func() int { cancel(); watching.Wait(); return snapshots }
}

// checkTarget looks at the calls as the target saw them. besides are attempts that do not count.
func (r *limitsRig) checkTarget(besides map[string]bool) {
	r.t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	type edge struct {
		at   time.Time
		by   int
		lane string
	}
	var edges []edge
	for _, s := range r.spans {
		if !besides[s.attempt] {
			edges = append(edges, edge{s.from, 1, s.lane}, edge{s.to, -1, s.lane})
		}
	}
	slices.SortFunc(edges, func(a, b edge) int { return cmp.Or(a.at.Compare(b.at), a.by-b.by) })
	now, most := map[string]int{}, map[string]int{}
	for _, e := range edges {
		queue, _, _ := strings.Cut(e.lane, "/")
		for _, name := range []string{queue, e.lane} {
			now[name] += e.by
			most[name] = max(most[name], now[name])
		}
	}
	r.t.Logf("calls at a time at the target: %v", most)
	for name, n := range most {
		queue, _, isKey := strings.Cut(name, "/")
		limit := limitedQueues[queue].queue
		if isKey {
			limit = limitedQueues[queue].key
		}
		if limit > 0 && n > limit {
			r.t.Errorf("the target had %d calls at a time of %s, which may have %d", n, name, limit)
		}
	}
}

const (
	startsSQL = `SELECT claimed_at FROM audit WHERE became = 'running' AND was IS DISTINCT FROM 'running' AND lane LIKE $1 || '/%' ORDER BY claimed_at`
	lostSQL   = `SELECT h.id || ' ' || (a->>'number') FROM task_history h, jsonb_array_elements(h.attempts) a WHERE a->>'outcome' = 'lost'`
)

// checkStarts wants at most burst + rate × w starts of a queue in any window w: what comes in
// at the rate and may be as much as the burst ahead. Of two claims, the one that began first
// may come to the queue's row last; so one more start may seem to be early.
func checkStarts(t *testing.T, conn *pgx.Conn, queue string) {
	t.Helper()
	rows, err := conn.Query(t.Context(), startsSQL, queue)
	if err != nil {
		t.Fatal(err)
	}
	starts, err := pgx.CollectRows(rows, pgx.RowTo[time.Time])
	if err != nil {
		t.Fatal(err)
	}
	q := limitedQueues[queue]
	level, most := 0.0, 0.0
	for i, at := range starts {
		if i > 0 {
			level = math.Max(level-q.perSecond*at.Sub(starts[i-1]).Seconds(), 0)
		}
		level++
		most = max(most, level)
	}
	over := starts[len(starts)-1].Sub(starts[0])
	t.Logf("%d starts of queue %s in %.2f s, allowed %.0f; at most %.2f of a burst of %d ahead", len(starts), queue, over.Seconds(), float64(q.burst)+q.perSecond*over.Seconds(), most, q.burst)
	if most > float64(q.burst)+1 {
		t.Errorf("starts of queue %s were %.2f ahead of its rate, its burst is %d", queue, most, q.burst)
	}
}

// F1, F2, F6 in processes: limits hold over three instances whatever happens to them or to the
// database, permits come back, and every task ends.
func TestF1LimitsThroughFaults(t *testing.T) {
	const lease, poll = time.Second, 100 * time.Millisecond
	for name, tt := range map[string]struct {
		faults int
		// cluster has the test crash a database of its own.
		cluster bool
		fault   func(t *testing.T, f *fleet, c *cluster, n int)
		// lost attempts may come of the fault: an instance may have no call at the moment.
		lost bool
		// late: a call may begin after its instance has lost it, of which the target cannot know.
		late bool
	}{
		"kill -9": {faults: 5, lost: true, fault: func(_ *testing.T, f *fleet, _ *cluster, n int) { f.replace(n%3, syscall.SIGKILL) }},
		"SIGSTOP and SIGCONT": {faults: 3, lost: true, late: true, fault: func(t *testing.T, f *fleet, _ *cluster, n int) {
			victim := f.instances[n%3]
			registrations := victim.count(`"msg":"registered"`)
			if err := victim.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
				t.Fatal(err)
			}
			time.AfterFunc(3*lease, func() { _ = victim.cmd.Process.Signal(syscall.SIGCONT) })
			eventually(t, func() bool { return victim.count(`"msg":"registered"`) > registrations }, func() string { return "a stopped instance did not register anew" })
		}},
		"the database crashes": {faults: 3, cluster: true, late: true, fault: func(_ *testing.T, _ *fleet, c *cluster, _ int) { c.crash(); c.start() }},
		"a rolling restart": {faults: 3, fault: func(t *testing.T, f *fleet, _ *cluster, n int) {
			if old, _ := f.replace(n%3, syscall.SIGTERM); old.cmd.ProcessState.ExitCode() != 0 {
				t.Errorf("an instance ended with code %d", old.cmd.ProcessState.ExitCode())
			}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			var c *cluster
			var database func() string
			var serviceURL string
			fault := tt.fault
			if tt.cluster {
				c = startCluster(t, openDir(t))
				if _, err := postgres.Migrate(t.Context(), c.url(), postgres.MigrationObserver{}); err != nil {
					t.Fatal(err)
				}
				p := newProxy(t, c.url())
				database, serviceURL = c.url, p.url
				fault = func(t *testing.T, f *fleet, c *cluster, n int) {
					tt.fault(t, f, c, n)
					p.lead(c.url())
				}
			} else {
				database, serviceURL = on(pgtest.URL(t))
			}
			r := newLimitsRig(t)
			r.audit(database())
			f := startFleet(t, 3, "DATABASE_URL="+serviceURL, "LEASE_DURATION="+lease.String(), "POLL_INTERVAL="+poll.String(), "LOG_LEVEL=info", "DISPATCH_CONCURRENCY=20")
			tasks := 0
			for name, q := range limitedQueues {
				tasks += q.keys * q.perLane
				if a := f.instances[0].do(http.MethodPut, "/queues/"+name, q.settings); a.status != http.StatusOK {
					t.Fatalf("PUT /queues/%s = %d %s", name, a.status, a.raw)
				}
			}
			stopWatching := r.watch(database)
			var submitting sync.WaitGroup
			submitting.Go(func() { r.submitAll(f.url) })
			for n := range tt.faults {
				eventually(t, func() bool { return r.called() > tasks*(n+1)/(tt.faults+3) }, func() string { return "calls do not get on" })
				fault(t, f, c, n)
			}
			submitting.Wait()
			got := r.check(database())
			t.Logf("%d snapshots", stopWatching())
			if got.failed > 0 {
				t.Errorf("%d tasks failed, though each may be tried 100 times", got.failed)
			}
			if !tt.lost && !tt.cluster && got.lostAttempts > 0 {
				t.Errorf("%d attempts were lost, want none", got.lostAttempts)
			}
			conn, err := pgx.Connect(t.Context(), database())
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = conn.Close(context.WithoutCancel(t.Context())) }()
			checkStarts(t, conn, "rated")
			besides := map[string]bool{}
			if tt.late {
				rows, err := conn.Query(t.Context(), lostSQL)
				if err != nil {
					t.Fatal(err)
				}
				lost, err := pgx.CollectRows(rows, pgx.RowTo[string])
				if err != nil {
					t.Fatal(err)
				}
				for _, attempt := range lost {
					besides[attempt] = true
				}
			}
			r.checkTarget(besides)
		})
	}
}

// F6: the permits of an instance that is killed are back after its lease and a reap.
func TestF6PermitsOfAKilledInstance(t *testing.T) {
	const lease, poll = time.Second, 100 * time.Millisecond
	database := "DATABASE_URL=" + pgtest.URL(t)
	settings := []string{database, "LEASE_DURATION=" + lease.String(), "POLL_INTERVAL=" + poll.String(), "LOG_LEVEL=info"}
	target := newHanging(t)
	first := start(t, "serve", settings...)
	if a := first.do(http.MethodPut, "/queues/mail", `{"max_concurrent":2}`); a.status != http.StatusOK {
		t.Fatalf("PUT /queues/mail = %d %s", a.status, a.raw)
	}
	held := first.submitMany(2, `{"url":"`+target.url+`/held","queue":"mail","timeout_seconds":1800}`)
	target.called(t, "/held", 2) // it has all permits
	second := start(t, "serve", settings...)
	next := second.submitMany(2, `{"url":"`+target.url+`/next","queue":"mail"}`)
	eventually(t, func() bool { return second.count(`"msg":"registered"`) > 0 }, func() string { return "the second instance did not register" })
	if n := len(target.got("/next")); n > 0 {
		t.Errorf("%d calls in spite of the limit", n)
	}
	first.stop(syscall.SIGKILL)
	killed := time.Now()
	eventually(t, func() bool { return len(target.got("/held"))+len(target.got("/next")) >= 4 }, func() string { return "the permits of a killed instance do not come back" })
	t.Logf("permits were used again %.2f s after the kill, promised %.2f s", time.Since(killed).Seconds(), (lease + lease*2/5 + poll).Seconds())
	if n := target.under.Load(); n > 2 {
		t.Errorf("%d calls are under way, want 2", n)
	}
	target.release()
	for _, id := range append(held, next...) {
		second.await(id, ended)
	}
}
