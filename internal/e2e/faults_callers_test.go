//go:build faults

package e2e

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"

	"github.com/melodia/orchestrator/internal/postgres/pgtest"
)

// dial opens a connection to the process.
func (p *process) dial() net.Conn {
	p.t.Helper()
	u, err := url.Parse(p.url)
	if err != nil {
		p.t.Fatal(err)
	}
	conn, err := net.DialTimeout("tcp", u.Host, patience)
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// prober asks for /health, again and again.
type prober struct {
	t    testing.TB
	well atomic.Int64 // answers that say that all is well
	took []time.Duration
	end  context.CancelFunc
	done chan struct{}
}

// probe begins to ask for /health. Each request has to be answered.
func (p *process) probe() *prober {
	ctx, end := context.WithCancel(p.t.Context())
	pr := &prober{t: p.t, end: end, done: make(chan struct{})}
	client := &http.Client{Timeout: patience}
	go func() {
		defer close(pr.done)
		defer client.CloseIdleConnections()
		for ctx.Err() == nil {
			begin := time.Now()
			r, err := http.NewRequestWithContext(ctx, http.MethodGet, p.url+"/health", nil)
			if err != nil {
				p.t.Error(err)
				return
			}
			response, err := client.Do(r)
			if ctx.Err() != nil {
				return
			}
			if err != nil {
				p.t.Errorf("/health: %v", err)
				return
			}
			_, _ = io.Copy(io.Discard, response.Body)
			_ = response.Body.Close()
			pr.took = append(pr.took, time.Since(begin))
			if response.StatusCode == http.StatusOK {
				pr.well.Add(1)
			}
			select {
			case <-time.After(20 * time.Millisecond):
			case <-ctx.Done():
			}
		}
	}()
	return pr
}

// awaitWell waits for an answer to a request that begins from now on which says that
// all is well.
func (pr *prober) awaitWell() {
	pr.t.Helper()
	before := pr.well.Load()
	eventually(pr.t, func() bool { return pr.well.Load() >= before+2 }, func() string { return "/health does not say any more that all is well" })
}

// stop ends the asking and logs how long the answers took, which the machine has a
// part in.
func (pr *prober) stop() {
	pr.t.Helper()
	pr.end()
	<-pr.done
	if pr.well.Load() == 0 {
		pr.t.Fatalf("none of %d answers of /health says that all is well", len(pr.took))
	}
	slices.Sort(pr.took)
	pr.t.Logf("/health answered %d times, %d times well, median %.3f s, worst %.3f s",
		len(pr.took), pr.well.Load(), pr.took[len(pr.took)/2].Seconds(), pr.took[len(pr.took)-1].Seconds())
}

// Callers that drip their headers or their bodies, or never read what they are
// answered, are cut off, and other callers do not wait for them.
func TestSlowloris(t *testing.T) {
	const drippers, deaf = 400, 50
	database := pgtest.URL(t)
	p := start(t, "serve", "DATABASE_URL="+database, "LOG_LEVEL=info")
	j := newJournal(t)
	j.audit(database)
	before := p.ready()
	prober := p.probe()

	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	begin := time.Now()
	for range deaf {
		// Far more than all buffers on the way hold.
		if _, err := io.WriteString(p.dial(), strings.Repeat("GET /docs/swagger-ui-bundle.js HTTP/1.1\r\nHost: x\r\n\r\n", 50)); err != nil {
			t.Fatal(err)
		}
	}
	var cut sync.WaitGroup
	var worst, gone atomic.Int64
	for i := range drippers {
		head, drop := "GET /health HTTP/1.1\r\nHost: x\r\nX-Slow: ", "x"
		if i%2 == 0 {
			head, drop = "POST /enqueue HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000000\r\n\r\n{", " "
		}
		conn := p.dial()
		if _, err := io.WriteString(conn, head); err != nil {
			t.Fatal(err)
		}
		go func() { // ends with the connection
			for tick := time.NewTicker(500 * time.Millisecond); ; {
				select {
				case <-tick.C:
				case <-ctx.Done():
					tick.Stop()
					return
				}
				if _, err := io.WriteString(conn, drop); err != nil {
					tick.Stop()
					return
				}
			}
		}()
		cut.Go(func() {
			_ = conn.SetReadDeadline(time.Now().Add(patience))
			answer, err := io.ReadAll(conn)
			gone.Add(1)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("a slow caller was not cut off within %v", patience)
			}
			if took := int64(time.Since(begin)); took > worst.Load() {
				worst.Store(took)
			}
			if i%2 == 0 && err == nil && !strings.HasPrefix(string(answer), "HTTP/1.1 408 ") {
				t.Errorf("a slow body was answered with %.200q, want 408", answer)
			}
		})
	}
	prober.awaitWell()
	if gone.Load() == drippers {
		t.Error("others are answered only after the slow callers were cut off")
	}
	j.load(t.Context(), 500, 8, 0, func() string { return p.url }, "")
	cut.Wait()
	prober.stop()
	stop()
	t.Logf("%d slow callers were cut off within %.1f s", drippers, time.Duration(worst.Load()).Seconds())
	if f := j.check(database); f.accepted != f.submitted {
		t.Errorf("%d of %d tasks were accepted beside slow callers, want all", f.accepted, f.submitted)
	}
	j.client.CloseIdleConnections()
	p.wantDescriptors(before + poolSize)
	t.Logf("%d callers that never read were cut off within %.1f s", deaf, time.Since(begin).Seconds())
}

// Who waits for the end of a task, looks at it or finds it holds nothing of what its
// call carries.
func TestWaitersHoldNoBodies(t *testing.T) {
	const tasks, waiters = 20, 1500
	most := withinReason(150 << 20)
	p := start(t, "serve", "DATABASE_URL="+pgtest.URL(t), "LOG_LEVEL=info")
	body := strings.Repeat("x", 1000<<10)
	ids := make([]string, tasks)
	for i := range ids {
		ids[i] = p.submit("/schedule", `{"url":"http://127.0.0.1:1/","delay_seconds":3600,"payload":"`+body+`"}`).ID
	}
	before := p.memory("VmHWM") // what submitting took
	conns := make([]net.Conn, waiters)
	for i := range conns {
		conns[i] = p.dial()
		defer conns[i].Close()
		if _, err := fmt.Fprintf(conns[i], "GET /tasks/%s?wait_seconds=2 HTTP/1.1\r\nHost: x\r\n\r\n", ids[i%tasks]); err != nil {
			t.Fatal(err)
		}
	}
	for _, conn := range conns {
		response, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil || response.StatusCode != http.StatusOK {
			t.Fatalf("a waiter got %v, want 200", err)
		}
		_ = response.Body.Close()
	}
	for _, path := range []string{"/tasks?limit=200", "/tasks/" + ids[0], "/tasks/" + ids[0] + "/explain"} {
		if a := p.do(http.MethodGet, path, ""); a.status != http.StatusOK || len(a.raw) > 100<<10 {
			t.Errorf("GET %s: got %d with %d bytes", path, a.status, len(a.raw))
		}
	}
	worst := p.memory("VmHWM")
	t.Logf("%d wait for %d tasks of 1 MB: %d MiB at the most, %d MiB before", waiters, tasks, worst>>20, before>>20)
	if worst > max(most, before) {
		t.Errorf("the process took %d MiB, want at most %d", worst>>20, max(most, before)>>20)
	}
}

// Strangers with heads that they do not finish take little, and others are answered
// meanwhile.
func TestHeadsOfStrangers(t *testing.T) {
	const strangers = 3000
	most := withinReason(200 << 20)
	const begin = "POST /enqueue HTTP/1.1\r\nHost: x\r\n"
	for name, head := range map[string]string{
		"long":              begin + "X: " + strings.Repeat("x", 15<<10),
		"of many lines":     begin + strings.Repeat("a:\r\n", 95),
		"of too many lines": begin + strings.Repeat("a:\r\n", 8000),
	} {
		t.Run(name, func(t *testing.T) {
			p := start(t, "serve", "DATABASE_URL="+pgtest.URL(t), "LOG_LEVEL=info")
			p.ready()
			prober := p.probe()
			for range strangers {
				_, _ = io.WriteString(p.dial(), head) // it may have been cut off already
			}
			prober.awaitWell()
			prober.stop()
			worst := p.memory("VmHWM")
			t.Logf("%d strangers: %d MiB at the most", strangers, worst>>20)
			if worst > most {
				t.Errorf("the process took %d MiB, want at most %d", worst>>20, most>>20)
			}
		})
	}
}

// Answers that their callers do not read take a bounded part of the memory; then large ones are
// answered 503, and the rest goes on.
func TestAnswersThatNobodyReads(t *testing.T) {
	const waves, size = 25, 12
	most := withinReason(450 << 20)
	p := start(t, "serve", "DATABASE_URL="+pgtest.URL(t), "LOG_LEVEL=info")
	// Each byte of what is kept of this answer takes six in an answer of ours. All of
	// them are far more than the system takes by itself.
	target := newTarget(t, func(w http.ResponseWriter, _ *http.Request, _ int) {
		w.WriteHeader(http.StatusNotFound)
		_, _ = w.Write(bytes.Repeat([]byte{1}, 4<<10))
	})
	var headers []string
	for i := range 50 {
		headers = append(headers, fmt.Sprintf(`"H%d":%q`, i, strings.Repeat("y", 155)))
	}
	one := `{"url":"` + target.url + `/` + strings.Repeat("u", 1900) + `","headers":{` + strings.Join(headers, ",") + `}},`
	for range 4 {
		if a := p.do(http.MethodPost, "/tasks/batch", `{"tasks":[`+strings.TrimSuffix(strings.Repeat(one, 50), ",")+`]}`); a.status != http.StatusAccepted {
			t.Fatalf("POST /tasks/batch = %d %.300s, want 202", a.status, a.raw)
		}
	}
	eventually(t, func() bool {
		return strings.Contains(p.do(http.MethodGet, "/tasks?state=pending,running", "").raw, `"tasks":[]`)
	},
		func() string { return "tasks are left" })
	length := len(p.do(http.MethodGet, "/tasks?limit=200", "").raw)
	ask := func() {
		for range size {
			conn := p.dial()
			_ = conn.(*net.TCPConn).SetReadBuffer(4 << 10)
			if _, err := io.WriteString(conn, "GET /tasks?limit=200 HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
				t.Fatal(err)
			}
		}
	}
	for range waves {
		ask()
		p.do(http.MethodGet, "/tasks?limit=200", "") // searches take turns: those before this one are over
	}
	var last answer
	eventually(t, func() bool { // 429 while others wait for their turn
		ask()
		last = p.do(http.MethodGet, "/tasks?limit=200", "")
		return last.status == http.StatusServiceUnavailable && last.header.Get("Retry-After") != ""
	}, func() string {
		return fmt.Sprintf("GET /tasks = %d %.300s, want 503 with Retry-After", last.status, last.raw)
	})
	if a := p.do(http.MethodGet, "/health", ""); a.status != http.StatusOK {
		t.Errorf("/health = %d %s, want 200", a.status, a.raw)
	}
	p.submit("/enqueue", `{"url":"http://127.0.0.1:1/"}`)
	worst := p.memory("VmHWM")
	t.Logf("%d answers of %d KiB that nobody reads: %d MiB at the most", waves*size, length>>10, worst>>20)
	if worst > most {
		t.Errorf("the process took %d MiB, want at most %d", worst>>20, most>>20)
	}
}

// Idle connections cost little, and a stop does not wait for them.
func TestIdleConnections(t *testing.T) {
	const n = 5000
	var limit syscall.Rlimit // Go has raised the soft one to the hard one, here and in the process
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil || limit.Max < n+1500 {
		t.Fatalf("the process may open %d files (ulimit -Hn), this test needs %d: %v", limit.Max, n+1500, err)
	}
	database := pgtest.URL(t)
	p := start(t, "serve", "DATABASE_URL="+database, "LOG_LEVEL=info", "SHUTDOWN_GRACE=10m", fmt.Sprint("MAX_CONNECTIONS=", n+500))
	j := newJournal(t)
	j.audit(database)
	before, memory := p.ready(), p.memory("VmRSS")
	conns := make([]net.Conn, n)
	open := func() {
		for i := range conns {
			conns[i] = p.dial()
			if i%2 == 0 { // the others never say a word
				continue
			}
			if _, err := io.WriteString(conns[i], "GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
				t.Fatal(err)
			}
			response, err := http.ReadResponse(bufio.NewReader(conns[i]), nil)
			if err != nil || response.StatusCode != http.StatusOK {
				t.Fatalf("connection %d: %v, want 200", i, err)
			}
			_ = response.Body.Close()
		}
	}
	open()
	if got := p.descriptors(); got < before+n {
		t.Errorf("%d descriptors are open, want %d more than %d", got, n, before)
	}
	prober := p.probe()
	j.load(t.Context(), 500, 8, 0, func() string { return p.url }, "")
	prober.awaitWell()
	prober.stop()
	t.Logf("%d idle connections: %d KiB each", n, (p.memory("VmRSS")-memory)/n>>10)
	if f := j.check(database); f.accepted != f.submitted {
		t.Errorf("%d of %d tasks were accepted beside idle connections, want all", f.accepted, f.submitted)
	}
	for _, conn := range conns {
		_ = conn.Close()
	}
	j.client.CloseIdleConnections()
	p.wantDescriptors(before + poolSize)

	open()
	// One that waited for them would wait for all of its grace.
	took := p.stop(syscall.SIGTERM)
	if code := p.cmd.ProcessState.ExitCode(); code != 0 {
		t.Errorf("with %d idle connections it ended with code %d, want 0", n, code)
	}
	t.Logf("stopped with %d idle connections within %.1f s", n, took.Seconds())
}

// lock keeps tasks from being written until the returned function is called.
func lock(t *testing.T, databaseURL string) (unlock func()) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(context.WithoutCancel(t.Context())) })
	if _, err := conn.Exec(t.Context(), "BEGIN; LOCK TABLE tasks IN EXCLUSIVE MODE", pgx.QueryExecModeSimpleProtocol); err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := conn.Close(t.Context()); err != nil {
			t.Errorf("unlock: %v", err)
		}
	}
}

// More tasks are submitted than can be stored, and for a moment none can: the surplus is
// refused, an acknowledged task is carried out, a refused one is not stored (the checker),
// and /health goes on answering.
func TestFlood(t *testing.T) {
	const tasks, callers = 10_000, 3500 // more callers than may wait
	database := pgtest.URL(t)
	p := start(t, "serve", "DATABASE_URL="+database, "LOG_LEVEL=info")
	j := newJournal(t)
	j.client.Transport.(*http.Transport).MaxIdleConnsPerHost = callers
	j.audit(database)
	before := p.ready()
	prober := p.probe()
	begin := time.Now()
	var flooding sync.WaitGroup
	flooding.Go(func() { j.load(t.Context(), tasks, callers, 0, func() string { return p.url }, "") })
	eventually(t, func() bool { return j.submitted() > tasks/10 }, func() string { return "submissions do not get on" })
	unlock := lock(t, database)
	// With 429 where enough callers come within 5 s, after which those that wait get 503.
	refused := func() int { return j.answered(http.StatusTooManyRequests) + j.answered(http.StatusServiceUnavailable) }
	awaitCount(t, refused, 100, func() string { return "no caller is turned away" })
	prober.awaitWell()
	unlock()
	flooding.Wait()
	took := time.Since(begin)
	prober.stop()
	f := j.check(database)
	t.Logf("%d tasks from %d callers within %.1f s: %d stored and acknowledged, %d turned away with 429, %d with 503 or without an answer; memory %d MiB at its worst",
		f.submitted, callers, took.Seconds(), f.accepted, f.refused, f.unanswered, p.memory("VmHWM")>>20)
	if lines := p.count("requests turned away"); lines == 0 || lines > int(took.Seconds())+2 {
		t.Errorf("%d lines of the log count who was turned away within %v, want one a second", lines, took)
	}
	j.client.CloseIdleConnections()
	p.wantDescriptors(before + poolSize)
}

// Bodies of 1 MiB while nothing can be stored: what they take of the memory is
// bounded.
func TestFloodOfLargeBodies(t *testing.T) {
	const callers = 300
	most := withinReason(450 << 20) // as docs/operations.md has it
	database := pgtest.URL(t)
	p := start(t, "serve", "DATABASE_URL="+database, "DISPATCH=false", "LOG_LEVEL=info")
	before := p.ready()
	unlock := lock(t, database)
	filler := strings.Repeat("x", 1<<20-200)
	client := &http.Client{Timeout: patience, Transport: &http.Transport{}}
	var accepted []string
	var mu sync.Mutex
	statuses := map[int]int{}
	var flooding sync.WaitGroup
	for i := range callers {
		flooding.Go(func() {
			target := fmt.Sprintf("http://127.0.0.1:9/%04d", i)
			r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, p.url+"/enqueue", strings.NewReader(`{"url":"`+target+`","payload":"`+filler+`"}`))
			if err != nil {
				t.Error(err)
				return
			}
			r.Header.Set("Content-Type", "application/json")
			status := 0 // the connection is closed on who goes on sending
			if response, err := client.Do(r); err == nil {
				status = response.StatusCode
				_, _ = io.Copy(io.Discard, response.Body)
				_ = response.Body.Close()
			}
			mu.Lock()
			defer mu.Unlock()
			statuses[status]++
			if status == http.StatusAccepted {
				accepted = append(accepted, target)
			}
		})
	}
	refused := func() int {
		mu.Lock()
		defer mu.Unlock()
		return statuses[http.StatusTooManyRequests] + statuses[http.StatusServiceUnavailable] + statuses[0]
	}
	awaitCount(t, refused, callers/3, func() string { return "no caller is turned away" })
	unlock()
	flooding.Wait()
	for status := range statuses {
		if !slices.Contains([]int{0, http.StatusAccepted, http.StatusRequestTimeout, http.StatusTooManyRequests, http.StatusServiceUnavailable}, status) {
			t.Errorf("a large task was answered with %d", status)
		}
	}
	slices.Sort(accepted)
	got := stored(t, database)
	if unavailable := statuses[http.StatusServiceUnavailable]; unavailable == 0 { // those may be stored or not
		if diff := cmp.Diff(accepted, got); diff != "" {
			t.Errorf("stored tasks (-acknowledged +stored):\n%s", diff)
		}
	}
	worst := p.memory("VmHWM")
	t.Logf("%d bodies of 1 MiB at once, by status: %v; memory %d MiB at its worst", callers, statuses, worst>>20)
	if worst > most {
		t.Errorf("the process took %d MiB, want at most %d MiB", worst>>20, most>>20)
	}
	client.CloseIdleConnections()
	p.wantDescriptors(before + poolSize)
}

// The same at /worker-endpoint, which holds what it was sent for as long as the
// call takes.
func TestFloodOfLargeBodiesAtTheWorkerEndpoint(t *testing.T) {
	const callers, size = 1500, 1<<20 - 200
	most := withinReason(480 << 20) // it must fit into 512 MiB; from 400 on Go spares memory
	p := start(t, "serve", "DATABASE_URL="+pgtest.URL(t), "LOG_LEVEL=info")
	before := p.ready()
	release := make(chan struct{})
	target := newTarget(t, func(http.ResponseWriter, *http.Request, int) { <-release })
	body := `{"url":"` + target.url + `/","timeout_seconds":1800,"payload":"` + strings.Repeat("x", size) + `"}`
	const fit = 32 << 20 / size // bodies
	client := &http.Client{Transport: &http.Transport{}}
	var mu sync.Mutex
	statuses := map[int]int{}
	var flooding sync.WaitGroup
	for range callers {
		flooding.Go(func() {
			r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, p.url+"/worker-endpoint", strings.NewReader(body))
			if err != nil {
				t.Error(err)
				return
			}
			status := 0 // the connection is closed on who goes on sending
			if response, err := client.Do(r); err == nil {
				status = response.StatusCode
				_, _ = io.Copy(io.Discard, response.Body)
				_ = response.Body.Close()
			}
			mu.Lock()
			defer mu.Unlock()
			statuses[status]++
		})
	}
	refused := func() (n int) { // in time or, where the machine is too slow for that, with 408
		mu.Lock()
		defer mu.Unlock()
		for _, callers := range statuses {
			n += callers
		}
		return n
	}
	awaitCount(t, refused, callers-fit, func() string { return "too many calls are under way" })
	close(release)
	flooding.Wait()
	if calls := len(target.got("/")); calls == 0 || calls > fit || statuses[http.StatusOK] != calls {
		t.Errorf("%d calls were made, want some and at most %d, each answered with 200; answers by status: %v", calls, fit, statuses)
	}
	worst := p.memory("VmHWM")
	t.Logf("%d bodies of 1 MiB at once, by status: %v; memory %d MiB at its worst", callers, statuses, worst>>20)
	if worst > most {
		t.Errorf("the process took %d MiB, want at most %d MiB", worst>>20, most>>20)
	}
	client.CloseIdleConnections()
	p.wantDescriptors(before + poolSize)
}

// Calls of every kind that hang in the database, far more than it has
// connections for, do not keep an instance from saying that it is alive.
func TestFloodWhileTheDatabaseIsLocked(t *testing.T) {
	const callers = 150 // of each kind
	database := pgtest.URL(t)
	p := start(t, "serve", "DATABASE_URL="+database, "LOG_LEVEL=info")
	p.ready()
	target := newTarget(t, statusOf)
	later := p.submit("/schedule", `{"url":"`+target.url+`/200","delay_seconds":3600}`)
	conn, err := pgx.Connect(t.Context(), database)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close(context.WithoutCancel(t.Context())) }()
	heartbeat := func() (at time.Time) {
		if err := conn.QueryRow(t.Context(), "SELECT max(heartbeat_at) FROM workers").Scan(&at); err != nil {
			t.Fatal(err)
		}
		return at
	}
	if _, err := conn.Exec(t.Context(), "BEGIN; LOCK TABLE tasks", pgx.QueryExecModeSimpleProtocol); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 4 * callers}}
	var unavailable atomic.Int64
	var flooding sync.WaitGroup
	defer flooding.Wait()
	defer stop()
	for _, r := range []struct{ method, path, body string }{
		{http.MethodPost, "/enqueue", `{"url":"` + target.url + `/200"}`},
		{http.MethodPost, "/tasks/batch", `{"tasks":[{"url":"` + target.url + `/200"}]}`},
		{http.MethodGet, "/tasks/" + later.ID, ""},
		{http.MethodPost, "/worker-endpoint", `{"task_id":"` + later.ID + `"}`},
		{http.MethodPost, "/worker-endpoint", `{"url":"` + target.url + `/200","expires_at":"2100-01-01T00:00:00Z"}`},
	} {
		for range callers {
			flooding.Go(func() {
				for ctx.Err() == nil {
					request, err := http.NewRequestWithContext(ctx, r.method, p.url+r.path, strings.NewReader(r.body))
					if err != nil {
						t.Error(err)
						return
					}
					request.Header.Set("Content-Type", "application/json")
					if response, err := client.Do(request); err == nil {
						_, _ = io.Copy(io.Discard, response.Body)
						_ = response.Body.Close()
						if response.StatusCode == http.StatusServiceUnavailable {
							unavailable.Add(1)
						}
					}
				}
			})
		}
	}
	// Heartbeats come every 3 s. A call gives up after 5 s.
	for range 3 {
		last := heartbeat()
		eventually(t, func() bool { return heartbeat().After(last) }, func() string { return "no heartbeat came" })
	}
	eventually(t, func() bool { return unavailable.Load() > callers }, func() string { return "the calls do not hang" })
	if p.count("lease lost") > 0 {
		t.Error("the instance lost its lease")
	}
	stop()
	flooding.Wait()
	client.CloseIdleConnections()
}
