package e2e

import (
	"bufio"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/melodia/orchestrator/internal/postgres/pgtest"
)

// SIGTERM with a call in flight: the process is gone in time, the attempt is
// not counted, and another process carries the task out.
func TestShutdownGivesRunningTasksBack(t *testing.T) {
	t.Parallel()
	database := "DATABASE_URL=" + pgtest.URL(t)
	release := make(chan struct{})
	arrived := make(chan struct{}, 1)
	target := newTarget(t, func(w http.ResponseWriter, r *http.Request, nth int) {
		if nth == 1 {
			arrived <- struct{}{}
			select {
			case <-release:
			case <-r.Context().Done():
			}
		}
	})
	t.Cleanup(func() { close(release) })

	first := start(t, "serve", database, "SHUTDOWN_GRACE=1s")
	submitted := first.submit("/enqueue", `{"url":"`+target.url+`/slow"}`)
	<-arrived
	first.stop(syscall.SIGTERM)
	if code := first.cmd.ProcessState.ExitCode(); code != 0 {
		t.Errorf("exit code %d, want 0", code)
	}

	reader := start(t, "serve", database, "DISPATCH=false")
	got := reader.do(http.MethodGet, "/tasks/"+submitted.ID, "").task
	if got.State != "pending" || got.AttemptCount != 0 || len(got.Attempts) != 1 || got.Attempts[0].Outcome != "interrupted" {
		t.Errorf("after the stop: %s, want pending, no attempt counted, one interrupted", compact(t, got))
	}
	second := start(t, "serve", database)
	got = second.await(submitted.ID, ended)
	if got.State != "succeeded" || got.AttemptCount != 1 || got.Attempts[len(got.Attempts)-1].Number != 1 {
		t.Errorf("at the end: %s, want succeeded by attempt number 1", compact(t, got))
	}
	if n := len(target.got("/slow")); n != 2 {
		t.Errorf("the target was called %d times, want 2", n)
	}
}

func TestShutdownLetsQuickCallsEnd(t *testing.T) {
	t.Parallel()
	arrived, release := make(chan struct{}), make(chan struct{})
	target := newTarget(t, func(http.ResponseWriter, *http.Request, int) {
		close(arrived)
		<-release
	})
	database := "DATABASE_URL=" + pgtest.URL(t)
	p := start(t, "serve", database, "SHUTDOWN_GRACE=1m")
	submitted := p.submit("/enqueue", `{"url":"`+target.url+`/quick"}`)
	<-arrived
	var stopping sync.WaitGroup
	stopping.Go(func() { p.stop(syscall.SIGTERM) })
	// It serves until its calls have ended, and says that it is not ready.
	eventually(t, func() bool { return p.do(http.MethodGet, "/health", "").status == http.StatusServiceUnavailable },
		func() string { return "/health does not say 503 while stopping" })
	if a := p.do(http.MethodGet, "/health/live", ""); a.status != http.StatusOK {
		t.Errorf("/health/live = %d while stopping, want 200", a.status)
	}
	close(release)
	stopping.Wait()
	reader := start(t, "serve", database, "DISPATCH=false")
	if got := reader.do(http.MethodGet, "/tasks/"+submitted.ID, "").task; got.State != "succeeded" || len(got.Attempts) != 1 {
		t.Errorf("task is %s, want succeeded", compact(t, got))
	}
}

// A call that /worker-endpoint makes without storing it has the same grace; what
// is cut off is answered all the same.
func TestShutdownWithCallsOfTheWorkerEndpoint(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		grace  string
		ends   bool // the target answers in time
		status int
	}{
		"ends within the grace": {"1m", true, http.StatusOK},
		"is cut off":            {"100ms", false, http.StatusServiceUnavailable},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			arrived, release := make(chan struct{}), make(chan struct{})
			target := newTarget(t, func(_ http.ResponseWriter, r *http.Request, _ int) {
				close(arrived)
				select {
				case <-release:
				case <-r.Context().Done():
				}
			})
			p := start(t, "serve", "DATABASE_URL="+pgtest.URL(t), "SHUTDOWN_GRACE="+tt.grace)
			var calling sync.WaitGroup
			calling.Go(func() {
				if a := p.do(http.MethodPost, "/worker-endpoint", `{"url":"`+target.url+`/adhoc"}`); a.status != tt.status {
					t.Errorf("answer = %d %s, want %d", a.status, a.raw, tt.status)
				}
			})
			<-arrived
			calling.Go(func() { p.stop(syscall.SIGTERM) })
			if tt.ends {
				eventually(t, func() bool { return strings.Contains(strings.Join(p.lines(), "\n"), `"msg":"stopping"`) },
					func() string { return "the process does not stop" })
				close(release)
			}
			calling.Wait()
			if code := p.cmd.ProcessState.ExitCode(); code != 0 {
				t.Errorf("exit code %d, want 0", code)
			}
		})
	}
}

// A request that has arrived before SIGTERM is answered, however late the process gets to
// read it: on a connection that was used before, and on one that is not even accepted.
func TestShutdownAnswersWhatHasArrived(t *testing.T) {
	t.Parallel()
	p := start(t, "serve", "DATABASE_URL="+pgtest.URL(t))
	submitted := p.submit("/schedule", `{"url":"http://127.0.0.1:9/","delay_seconds":3600}`)
	request := "GET /tasks/" + submitted.ID + "?wait_seconds=60 HTTP/1.1\r\nHost: x\r\n\r\n"
	dial := func() net.Conn {
		conn, err := net.Dial("tcp", strings.TrimPrefix(p.url, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		return conn
	}
	// ask reads the answer to a request, which says that the task is pending.
	ask := func(what string, conn net.Conn) {
		_ = conn.SetReadDeadline(time.Now().Add(patience))
		response, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Errorf("%s: %v, want an answer", what, err)
			return
		}
		defer func() { _ = response.Body.Close() }()
		var got taskJSON
		if err := json.NewDecoder(response.Body).Decode(&got); err != nil || response.StatusCode != http.StatusOK || got.State != "pending" {
			t.Errorf("%s: answer = %d %s (%v), want 200 and a pending task", what, response.StatusCode, got.State, err)
		}
	}
	const connections = 100
	var used, waiting []net.Conn
	for range connections {
		conn := dial()
		if _, err := io.WriteString(conn, strings.Replace(request, "=60", "=0", 1)); err != nil {
			t.Fatal(err)
		}
		ask("before", conn)
		used = append(used, conn)
	}
	if err := p.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	for range connections {
		waiting = append(waiting, dial()) // the system has made the connection
	}
	for _, conn := range slices.Concat(used, waiting) {
		if _, err := io.WriteString(conn, request); err != nil {
			t.Fatal(err)
		}
	}
	for _, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGCONT} {
		if err := p.cmd.Process.Signal(signal); err != nil {
			t.Fatal(err)
		}
	}
	for _, conn := range used {
		ask("a connection that was used before", conn)
	}
	for _, conn := range waiting {
		ask("a new connection", conn)
	}
	<-p.done
	if code := p.cmd.ProcessState.ExitCode(); code != 0 {
		t.Errorf("exit code %d, want 0", code)
	}
}
