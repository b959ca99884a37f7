package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/melodia/orchestrator/internal/postgres/pgtest"
)

// submitMany submits n equal tasks in batches, and returns their ids.
func (p *process) submitMany(n int, request string) (ids []string) {
	p.t.Helper()
	for n > 0 {
		some := min(n, 500)
		n -= some
		a := p.do(http.MethodPost, "/tasks/batch", `{"tasks":[`+strings.TrimSuffix(strings.Repeat(request+",", some), ",")+`]}`)
		if a.status != http.StatusAccepted {
			p.t.Fatalf("a batch of %d tasks: %d %.500s", some, a.status, a.raw)
		}
		var batch struct{ Tasks []taskJSON }
		if err := json.Unmarshal([]byte(a.raw), &batch); err != nil {
			p.t.Fatal(err)
		}
		for _, task := range batch.Tasks {
			ids = append(ids, task.ID)
		}
	}
	return ids
}

// hanging is a target that answers no call to it before release is called, or the test ends.
type hanging struct {
	*target

	release func()
	under   atomic.Int64 // calls under way
	most    atomic.Int64 // that ever were
}

func newHanging(t *testing.T) *hanging {
	t.Helper()
	released := make(chan struct{})
	h := &hanging{release: sync.OnceFunc(func() { close(released) })}
	h.target = newTarget(t, func(w http.ResponseWriter, r *http.Request, _ int) {
		n := h.under.Add(1)
		for most := h.most.Load(); n > most && !h.most.CompareAndSwap(most, n); most = h.most.Load() {
		}
		defer h.under.Add(-1)
		select {
		case <-released:
		case <-r.Context().Done():
		}
	})
	t.Cleanup(h.release) // before the server is closed, which waits for its calls
	return h
}

// called waits until a path of a target was called n times.
func (t *target) called(tb testing.TB, path string, n int) {
	tb.Helper()
	eventually(tb, func() bool { return len(t.got(path)) >= n },
		func() string { return fmt.Sprintf("%s was called %d times, want %d", path, len(t.got(path)), n) })
}

// F9: with the defaults and nothing configured, a task for a healthy host is called though
// many tasks of a host that never answers were due before it. Each would keep its slot for
// half an hour.
func TestF9FastHostBehindASlowOne(t *testing.T) {
	t.Parallel()
	p := start(t, "serve", "DATABASE_URL="+pgtest.URL(t), "LOG_LEVEL=info")
	slow, fast := newHanging(t), newTarget(t, statusOf)
	p.submitMany(2000, `{"url":"`+slow.url+`/slow","timeout_seconds":1800}`)
	p.await(p.submit("/enqueue", `{"url":"`+fast.url+`/200"}`).ID, ended)
	// F10: one slow host alone has all slots.
	eventually(t, func() bool { return slow.under.Load() >= 200 }, func() string {
		return fmt.Sprintf("a slow host alone has %d calls, want one for each of 200 slots", slow.under.Load())
	})
	for range 50 {
		p.await(p.submit("/enqueue", `{"url":"`+fast.url+`/200"}`).ID, ended)
	}
	p.submitMany(500, `{"url":"`+fast.url+`/200/many"}`)
	fast.called(t, "/200/many", 500)
	if got := slow.most.Load(); got > 200 {
		t.Errorf("the slow host had %d calls at a time, and there are 200 slots", got)
	}
}

// A host that was fast, has every slot, and hangs all of a sudden.
func TestHostThatHangsAllOfASudden(t *testing.T) {
	t.Parallel()
	p := start(t, "serve", "DATABASE_URL="+pgtest.URL(t), "LOG_LEVEL=info", "DISPATCH_CONCURRENCY=20")
	var hangs atomic.Bool
	slow, fast := newHanging(t), newTarget(t, statusOf)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if hangs.Load() {
			slow.under.Add(1)
			<-r.Context().Done()
		}
	}))
	t.Cleanup(server.Close)
	t.Cleanup(server.CloseClientConnections)
	p.submitMany(500, `{"url":"`+server.URL+`/","timeout_seconds":1800}`)
	hangs.Store(true)
	p.submitMany(500, `{"url":"`+server.URL+`/","timeout_seconds":1800}`)
	eventually(t, func() bool { return slow.under.Load() >= 15 }, func() string { return "the target is not called" })
	for range 20 {
		p.await(p.submit("/enqueue", `{"url":"`+fast.url+`/200"}`).ID, ended)
	}
}

// Several hosts that hang leave something to others.
func TestSeveralHostsThatHang(t *testing.T) {
	t.Parallel()
	p := start(t, "serve", "DATABASE_URL="+pgtest.URL(t), "LOG_LEVEL=info", "DISPATCH_CONCURRENCY=50")
	for range 3 {
		slow := newHanging(t)
		p.submitMany(100, `{"url":"`+slow.url+`/slow","timeout_seconds":1800}`)
		slow.called(t, "/slow", 1)
	}
	fast := newTarget(t, statusOf)
	p.submitMany(100, `{"url":"`+fast.url+`/200"}`)
	fast.called(t, "/200", 100)
}

// A target that serves 10 calls in a window and refuses all others with Retry-After gets 1.3
// calls at most for each that it serves, from two instances, and no task dies of that.
func TestRateLimitedTarget(t *testing.T) {
	t.Parallel()
	const tasks, window, perWindow = 150, 500 * time.Millisecond, 10
	database := pgtest.URL(t)
	instances := startFleet(t, 2, "DATABASE_URL="+database, "LOG_LEVEL=info")
	var mu sync.Mutex
	var since time.Time
	var in, served, refused, early int
	var first time.Time // refused
	limited := newTarget(t, func(w http.ResponseWriter, _ *http.Request, _ int) {
		mu.Lock()
		defer mu.Unlock()
		if now := time.Now(); now.Sub(since) >= window {
			since, in = now, 0
		}
		if in++; in <= perWindow {
			served++
			return
		}
		if refused++; refused == 1 {
			first = time.Now()
		}
		if time.Since(first) < 2*time.Second {
			early++ // how many begin before both instances know of the limit follows from how fast the machine is
		}
		w.Header().Set("Retry-After", "1")
		w.WriteHeader(http.StatusTooManyRequests)
	})
	p := instances.instances[0]
	ids := p.submitMany(tasks, `{"url":"`+limited.url+`/limited","retry":{"max_attempts":5,"min_backoff_seconds":0.1,"max_backoff_seconds":1}}`)
	for _, id := range ids {
		if got := p.await(id, ended); got.State != "succeeded" {
			t.Fatalf("a task died at a target that only asked for patience: %s", compact(t, got))
		}
	}
	mu.Lock()
	defer mu.Unlock()
	t.Logf("%d calls served, %d refused, %d of them at first: %.2f for each", served, refused, early, float64(served+refused)/float64(served))
	if served != tasks || refused-early > tasks*3/10 {
		t.Errorf("%d of %d calls were served and %d refused after the slow starts, want 0.3 for each at most", served, tasks, refused-early)
	}
}

// hosts returns the names of the hosts that are stored as unhealthy.
func hostsIn(t testing.TB, database string) (names []string) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), database)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close(context.WithoutCancel(t.Context())) }()
	rows, err := conn.Query(t.Context(), "SELECT name FROM hosts ORDER BY name")
	if err != nil {
		t.Fatal(err)
	}
	if names, err = pgx.CollectRows(rows, pgx.RowTo[string]); err != nil {
		t.Fatal(err)
	}
	return names
}

// F4: tasks of a host that nothing listens at wait for its breaker without attempts, on all
// instances, and are carried out when it was closed by hand.
func TestBrokenHost(t *testing.T) {
	t.Parallel()
	database := pgtest.URL(t)
	p := start(t, "serve", "DATABASE_URL="+database, "LOG_LEVEL=info")
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := listener.Addr().String()
	_ = listener.Close()
	host := "http://" + address
	request := `{"url":"` + host + `/","retry":{"max_attempts":3,"min_backoff_seconds":0.01,"max_backoff_seconds":0.01}}`
	first := p.submitMany(20, request)
	eventually(t, func() bool { return len(hostsIn(t, database)) == 1 }, func() string { return "the breaker does not open" })
	if got := p.do(http.MethodGet, "/hosts", ""); !strings.Contains(got.raw, host) || !strings.Contains(got.raw, `"status":"broken"`) || !strings.Contains(got.raw, "connection refused") {
		t.Errorf("GET /hosts = %s, want %s broken, and why", got.raw, host)
	}
	eventually(t, func() bool { return p.count("tasks of a host wait") == 1 }, func() string { return "no log line tells of it" })
	// An instance that starts knows of it before its first claim.
	other := start(t, "serve", "DATABASE_URL="+database, "LOG_LEVEL=info")
	waiting := append(p.submitMany(50, request), other.submitMany(50, request)...)
	for range 20 {
		waiting = append(waiting, other.submit("/enqueue", request).ID)
	}
	if listener, err = net.Listen("tcp", address); err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}), ReadHeaderTimeout: patience}
	go func() { _ = server.Serve(listener) }()
	t.Cleanup(func() { _ = server.Close() })
	closeHost(p, host)
	probes := 0 // that were made before the host listened, if that took 30 s
	for _, id := range waiting {
		got := p.await(id, ended)
		if probes += got.AttemptCount - 1; got.State != "succeeded" || probes > 2 {
			t.Fatalf("after the breaker was closed: %s, want a success at the first attempt", compact(t, got))
		}
	}
	for _, id := range first {
		p.await(id, ended)
	}
}

// closeHost makes a host healthy by hand.
func closeHost(p *process, host string) {
	p.t.Helper()
	if a := p.do(http.MethodPost, "/hosts/"+url.PathEscape(host)+"/close", ""); a.status != http.StatusNoContent && a.status != http.StatusNotFound {
		p.t.Fatalf("close %s: %d %s", host, a.status, a.raw)
	}
}

// Tasks whose calls come to this service and wait for other tasks leave slots to those.
func TestTasksThatWaitForTasks(t *testing.T) {
	t.Parallel()
	for _, concurrency := range []int{1, 8} {
		t.Run(fmt.Sprint("concurrency=", concurrency), func(t *testing.T) {
			t.Parallel()
			p := start(t, "serve", "DATABASE_URL="+pgtest.URL(t), "LOG_LEVEL=info", fmt.Sprint("DISPATCH_CONCURRENCY=", concurrency))
			other := newTarget(t, statusOf)
			// The awaited tasks are due behind those that wait for them.
			var awaited, waiting []string
			for range 2 * concurrency {
				awaited = append(awaited, p.submit("/schedule", `{"url":"`+other.url+`/200","delay_seconds":3}`).ID)
			}
			for _, id := range awaited {
				waiting = append(waiting, p.submit("/enqueue", `{"url":"`+p.url+`/tasks/`+id+`?wait_seconds=60","method":"GET","timeout_seconds":100}`).ID)
			}
			for _, id := range append(awaited, waiting...) {
				got := p.await(id, ended)
				if got.State != "succeeded" {
					t.Fatalf("%s, want succeeded", compact(t, got))
				}
				if a := got.Attempts[len(got.Attempts)-1]; a.DurationSeconds > 50 {
					t.Errorf("a call waited in vain: %s", compact(t, got))
				}
			}
		})
	}
}
