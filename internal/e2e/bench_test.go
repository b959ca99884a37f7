//go:build faults

package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// The figures of docs/performance.md. PostgreSQL is as durable as
// it is by itself; each instance is a process of its own; the callers, over 64
// connections to each, and the target are this one. One operation is one task, where
// nothing else is said, and -benchtime has to say how many, like 30000x. What comes
// before the first of them counts for no figure but ns/op.
func BenchmarkService(b *testing.B) {
	c := startCluster(b, openDir(b))
	for _, m := range []struct {
		name      string
		run       func(*bench)
		instances []int
	}{
		{"ceiling", (*bench).ceiling, []int{0}},
		{"accept", (*bench).accept, []int{1}},
		{"drain", (*bench).drain, []int{1, 2, 4}},
		{"both", (*bench).both, []int{1, 2, 4}},
		{"latency", (*bench).latency, []int{1}},
		{"lateness", (*bench).lateness, []int{1}},
		{"steady", (*bench).steady, []int{1}},
		{"start", (*bench).start, []int{1}},
		{"idle", (*bench).idle, []int{1}},
	} {
		for _, n := range m.instances {
			b.Run(fmt.Sprintf("%s/instances=%d", m.name, n), func(b *testing.B) { m.run(newBench(b, c, n)) })
		}
	}
}

var steadyRate = flag.Int("steady", 4000, "how many tasks a second BenchmarkService/steady submits")

const benchConnections = 64

// bench is one benchmark: a database, instances on it, a target and callers.
type bench struct {
	*testing.B
	name      string // of the database
	database  string // its URL
	conn      *pgx.Conn
	instances int
	client    *http.Client
	target    string

	hits   atomic.Int64
	wanted atomic.Int64
	all    chan struct{} // closed when wanted calls have come
	mu     sync.Mutex
	first  time.Time       // when the first call came
	late   []time.Duration // of each call, after the moment that its body names
}

func newBench(b *testing.B, c *cluster, instances int) *bench {
	b.Helper()
	name := fmt.Sprintf("b%d", rand.Int64())
	conn, err := pgx.Connect(b.Context(), c.url())
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		ctx := context.WithoutCancel(b.Context())
		if _, err := conn.Exec(ctx, "DROP DATABASE "+name+" WITH (FORCE)"); err != nil {
			b.Error(err)
		}
		_ = conn.Close(ctx)
	})
	for _, sql := range []string{"CREATE DATABASE " + name, "CHECKPOINT"} {
		if _, err := conn.Exec(b.Context(), sql); err != nil {
			b.Fatal(err)
		}
	}
	x := &bench{
		B: b, name: name, database: c.server.URL(name), conn: conn, instances: instances, all: make(chan struct{}),
		client: &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: benchConnections, MaxConnsPerHost: benchConnections}},
	}
	server := httptest.NewServer(http.HandlerFunc(x.serve))
	b.Cleanup(server.Close)
	b.Cleanup(x.client.CloseIdleConnections)
	x.target = server.URL
	return x
}

// serve is the target.
func (x *bench) serve(w http.ResponseWriter, r *http.Request) {
	now := time.Now()
	var payload struct{ T int64 }
	if err := json.NewDecoder(r.Body).Decode(&payload); err != nil {
		x.Errorf("the target got a body that is not the task's: %v", err)
	}
	x.mu.Lock()
	if x.late == nil {
		x.first = now
	}
	x.late = append(x.late, now.Sub(time.Unix(0, payload.T)))
	x.mu.Unlock()
	w.WriteHeader(http.StatusNoContent)
	if x.hits.Add(1) == x.wanted.Load() {
		close(x.all)
	}
}

// up starts the instances.
func (x *bench) up(settings ...string) (instances []*process) {
	settings = append(settings, "DATABASE_URL="+x.database, "LOG_LEVEL=info", "RATE_LIMIT=0")
	for range x.instances {
		p := start(x.B, "serve", settings...)
		p.ready()
		instances = append(instances, p)
	}
	return instances
}

// submit posts n bodies, perSecond of them, or as fast as they are answered
// where that is zero, to the instances in turn.
func (x *bench) submit(instances []*process, path string, n, perSecond int, body func() string) {
	var next atomic.Int64
	var callers sync.WaitGroup
	begin := time.Now()
	for range benchConnections * len(instances) {
		callers.Go(func() {
			for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
				if perSecond > 0 {
					<-time.After(time.Until(begin.Add(time.Duration(i) * time.Second / time.Duration(perSecond))))
				}
				x.post(instances[i%len(instances)].url+path, body())
			}
		})
	}
	callers.Wait()
}

func (x *bench) post(url, body string) {
	r, err := http.NewRequestWithContext(x.Context(), http.MethodPost, url, bytes.NewReader([]byte(body)))
	if err != nil {
		x.Error(err)
		return
	}
	r.Header.Set("Content-Type", "application/json")
	answer, err := x.client.Do(r)
	if err != nil {
		x.Error(err)
		return
	}
	text, _ := io.ReadAll(answer.Body)
	_ = answer.Body.Close()
	if answer.StatusCode/100 != 2 {
		x.Errorf("POST %s = %d %s", url, answer.StatusCode, text)
	}
}

// task is one that is due now.
func (x *bench) task() string {
	return fmt.Sprintf(`{"url":"%s/hit","payload":{"t":%d}}`, x.target, time.Now().UnixNano())
}

// await waits until the target has had n calls.
func (x *bench) await(n int) {
	x.Helper()
	x.wanted.Store(int64(n))
	if x.hits.Load() < int64(n) { // else the last one has passed by
		select {
		case <-x.all:
		case <-time.After(2 * patience):
			x.Fatalf("%d of %d calls came", x.hits.Load(), n)
		}
	}
	if got := x.hits.Load(); got != int64(n) {
		x.Errorf("%d calls came for %d tasks", got, n)
	}
}

func (x *bench) reportRate(took time.Duration) {
	x.ReportMetric(float64(x.N)/took.Seconds(), "tasks/s")
}

func (x *bench) reportLate() {
	slices.Sort(x.late)
	for _, q := range []float64{0.5, 0.99} {
		x.ReportMetric(x.late[int(q*float64(len(x.late)-1))].Seconds()*1000, fmt.Sprintf("ms-p%.0f", q*100))
	}
}

func (x *bench) ceiling() {
	begin := time.Now()
	x.submit([]*process{{url: x.target}}, "/hit", x.N, 0, func() string { return `{"t":0}` })
	x.reportRate(time.Since(begin))
}

func (x *bench) accept() {
	instances := x.up("DISPATCH=false")
	begin := time.Now()
	x.submit(instances, "/enqueue", x.N, 0, x.task)
	x.reportRate(time.Since(begin))
}

func (x *bench) drain() {
	keeper := start(x.B, "serve", "DATABASE_URL="+x.database, "LOG_LEVEL=info", "RATE_LIMIT=0", "DISPATCH=false")
	x.submit([]*process{keeper}, "/enqueue", x.N, 0, x.task)
	keeper.stop(syscall.SIGTERM)
	waits := x.watchWaits()
	instances := x.up()
	x.await(x.N)
	x.reportRate(time.Since(x.first))
	waits()
	x.ReportMetric(float64(instances[0].memory("VmHWM")>>20), "MiB")
}

func (x *bench) both() {
	instances := x.up()
	waits := x.watchWaits()
	begin := time.Now()
	x.submit(instances, "/enqueue", x.N, 0, x.task)
	x.await(x.N)
	x.reportRate(time.Since(begin))
	waits()
	for _, p := range instances {
		p.stop(syscall.SIGTERM) // which brings the server's count up to date
	}
	x.ReportMetric(float64(x.transactions())/float64(x.N), "transactions/task")
	x.reportLate()
}

// latency is from a caller's POST to the target's call, at 200 tasks a second.
func (x *bench) latency() {
	x.submit(x.up(), "/enqueue", x.N, 200, x.task)
	x.await(x.N)
	x.reportLate()
}

// lateness is of tasks that are scheduled for moments within 9 seconds.
func (x *bench) lateness() {
	x.submit(x.up(), "/schedule", x.N, 0, func() string {
		due := time.Now().Add(time.Second + rand.N(8*time.Second))
		return fmt.Sprintf(`{"url":"%s/hit","run_at":"%s","payload":{"t":%d}}`, x.target, due.UTC().Format(time.RFC3339Nano), due.UnixNano())
	})
	x.await(x.N)
	x.reportLate()
}

// start is from the start of the process to the first 200 of /health, with the
// schema up to date.
func (x *bench) start() {
	x.up()[0].stop(syscall.SIGTERM)
	var took []time.Duration
	for range min(x.N, 20) {
		begin := time.Now()
		p := x.up()[0]
		took = append(took, time.Since(begin))
		p.stop(syscall.SIGTERM)
	}
	slices.Sort(took)
	x.ReportMetric(took[len(took)/2].Seconds()*1000, "ms-p50")
}

// idle is what an instance costs that has nothing to do, for at most 20 seconds.
func (x *bench) idle() {
	p := x.up()[0]
	<-time.After(5 * time.Second) // what it does once is over, and the server's count is up to date
	seconds := float64(min(x.N, 20))
	cpu, before := p.cpu(), x.transactions()
	<-time.After(time.Duration(seconds) * time.Second)
	x.ReportMetric((p.cpu()-cpu).Seconds()/seconds*100, "%cpu")
	x.ReportMetric(float64(x.transactions()-before)/seconds, "transactions/s") // those of autovacuum among them
}

// cpu is the time that the process has had of the processors.
func (p *process) cpu() time.Duration {
	p.t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.cmd.Process.Pid))
	if err != nil {
		p.t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(stat), ") ")
	fields := strings.Fields(rest) // from the third on: proc_pid_stat(5)
	user, _ := strconv.Atoi(fields[14-3])
	system, _ := strconv.Atoi(fields[15-3])
	return time.Duration(user+system) * time.Second / 100 // USER_HZ
}

// transactions is how many the database has had: each statement is one.
func (x *bench) transactions() (n int) {
	x.query("SELECT xact_commit FROM pg_stat_database WHERE datname = $1", &n)
	return n
}

// query asks for one row about the database, whose name is its parameter. The
// connection leads to another one, so that asking does not count.
func (x *bench) query(sql string, into ...any) {
	x.Helper()
	if err := x.conn.QueryRow(x.Context(), sql, x.name).Scan(into...); err != nil {
		x.Fatal(err)
	}
}

// watchWaits looks again and again at what the statements under way wait for. What
// it returns reports which part of them waited for a lock that another one has, on
// a row, a table or a transaction, and which for one of the server's own.
func (x *bench) watchWaits() (report func()) {
	ctx, stop := context.WithCancel(x.Context())
	done := make(chan struct{})
	events := map[string]float64{}
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			rows, _ := x.conn.Query(x.Context(), `SELECT COALESCE(wait_event_type || ':' || wait_event, 'none')
				FROM pg_stat_activity WHERE datname = $1 AND state = 'active'`, x.name)
			found, err := pgx.CollectRows(rows, pgx.RowTo[string])
			if err != nil {
				x.Error(err)
				return
			}
			for _, event := range found {
				events[event]++
			}
			select {
			case <-ctx.Done():
			case <-time.After(5 * time.Millisecond):
			}
		}
	}()
	return func() {
		stop()
		<-done
		var all, locks, internal float64
		for event, n := range events {
			all += n
			switch kind, _, _ := strings.Cut(event, ":"); kind {
			case "Lock":
				locks += n
			case "LWLock":
				internal += n
			}
		}
		x.Logf("what statements wait for, of %.0f that were seen: %v", all, events)
		x.ReportMetric(locks/max(all, 1)*100, "%lock")
		x.ReportMetric(internal/max(all, 1)*100, "%lwlock")
	}
}

// steady submits tasks at a constant rate. Reported are how many were carried out in
// the first and in the last sixth of the time, and the most that the table of live
// tasks grew to.
func (x *bench) steady() {
	instances := x.up()
	inside, err := pgx.Connect(x.Context(), x.database)
	if err != nil {
		x.Fatal(err)
	}
	defer func() { _ = inside.Close(x.Context()) }()
	loaded := make(chan struct{})
	go func() {
		defer close(loaded)
		x.submit(instances, "/enqueue", x.N, *steadyRate, x.task)
	}()
	const samples = 60
	var hits []int64
	var size, dead, mostSize, mostDead int
	tick := time.NewTicker(time.Duration(x.N) * time.Second / time.Duration(*steadyRate) / samples)
	defer tick.Stop()
	for under := true; under; {
		select {
		case <-tick.C:
			hits = append(hits, x.hits.Load())
			if err := inside.QueryRow(x.Context(), `SELECT pg_total_relation_size('tasks'), n_dead_tup
				FROM pg_stat_user_tables WHERE relname = 'tasks'`).Scan(&size, &dead); err != nil {
				x.Fatal(err)
			}
			mostSize, mostDead = max(mostSize, size), max(mostDead, dead)
			if len(hits)%(samples/6) == 0 {
				x.Logf("%d tasks so far; live tasks take %d MiB, with %d dead rows", x.hits.Load(), size>>20, dead)
			}
		case <-loaded:
			under = false
		}
	}
	x.await(x.N)
	if len(hits) >= samples-1 { // not in the trial run
		sixth := samples / 6
		x.ReportMetric(float64(hits[sixth-1]), "first")
		x.ReportMetric(float64(hits[len(hits)-1]-hits[len(hits)-1-sixth]), "last")
	}
	x.ReportMetric(float64(mostSize>>20), "MiB-tasks")
	x.ReportMetric(float64(mostDead), "dead-rows")
	x.ReportMetric(float64(instances[0].memory("VmHWM")>>20), "MiB")
	x.reportLate()
}
