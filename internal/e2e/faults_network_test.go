//go:build faults

package e2e

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/melodia/orchestrator/internal/postgres/pgtest"
)

// insideNetwork marks the process that [inOwnNetwork] starts.
const insideNetwork = "ORCHESTRATOR_TEST_NETWORK"

// inOwnNetwork runs the calling test once more in a network namespace of its own,
// where it may change what the system allows, and reports whether this is that run.
// It needs root. PostgreSQL is in there too.
func inOwnNetwork(t *testing.T) bool {
	t.Helper()
	if os.Getenv(insideNetwork) != "" {
		return true
	}
	again := exec.CommandContext(t.Context(), "unshare", "--net", "sh", "-c", `ip link set lo up && exec "$0" "$@"`,
		os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
	again.Env = append(os.Environ(), insideNetwork+"=1", "TEST_DATABASE_URL=")
	output, err := again.CombinedOutput()
	if err != nil {
		t.Fatalf("in a network namespace of its own: %v\n%s", err, output)
	}
	t.Logf("%s", output)
	return false
}

// set writes a setting of the kernel, of this network namespace.
func set(t *testing.T, name, value string) {
	t.Helper()
	if err := os.WriteFile("/proc/sys/net/ipv4/"+name, []byte(value), 0o600); err != nil {
		t.Fatal(err)
	}
}

// An instance with far fewer local ports than calls to make to one target uses up
// no attempts for that.
func TestPortsRunOut(t *testing.T) {
	if !inOwnNetwork(t) {
		return
	}
	const tasks = 300
	release := make(chan struct{})
	let := sync.OnceFunc(func() { close(release) })
	target := newTarget(t, func(http.ResponseWriter, *http.Request, int) { <-release })
	t.Cleanup(let)
	p := start(t, "serve", "DATABASE_URL="+pgtest.URL(t), "LOG_LEVEL=info")
	set(t, "ip_local_port_range", "45000 45119")
	one := `{"url":"` + target.url + `/held","payload":1,"retry":{"max_attempts":1}},`
	if a := p.do(http.MethodPost, "/tasks/batch", `{"tasks":[`+strings.TrimSuffix(strings.Repeat(one, tasks), ",")+`]}`); a.status != http.StatusAccepted {
		t.Fatalf("POST /tasks/batch = %d %s, want 202", a.status, a.raw)
	}
	eventually(t, func() bool { return p.count("no local port is free") > 0 }, func() string { return "no line says that ports ran out" })
	if a := p.do(http.MethodGet, "/health", ""); a.status != http.StatusOK || !strings.Contains(a.raw, `"status":"short"`) {
		t.Errorf("/health = %d %s, want 200 and that the instance is short of something", a.status, a.raw)
	}
	let()
	eventually(t, func() bool {
		a := p.do(http.MethodGet, "/tasks?state=pending,running&limit=1", "")
		return a.status == http.StatusOK && strings.Contains(a.raw, `"tasks":[]`)
	}, func() string { return "tasks are left" })
	if a := p.do(http.MethodGet, "/tasks?state=failed&limit=1", ""); !strings.Contains(a.raw, `"tasks":[]`) {
		t.Errorf("tasks failed: %s", a.raw)
	}
	if got := len(target.got("/held")); got != tasks {
		t.Errorf("the target got %d calls, want %d", got, tasks)
	}
}

// A target that answers at once and reads on slowly gets the whole body also where
// the system takes little of it at a time, as over a real network.
func TestEarlyAnswerWithSmallBuffers(t *testing.T) {
	if !inOwnNetwork(t) {
		return
	}
	set(t, "tcp_wmem", "4096 16384 65536")
	set(t, "tcp_rmem", "4096 65536 131072")
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	got := make(chan int64, 1)
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			serving.Go(func() {
				defer func() { _ = conn.Close() }()
				r, err := http.ReadRequest(bufio.NewReader(conn))
				if err != nil {
					return
				}
				_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
				var n int64
				for {
					read, err := io.CopyN(io.Discard, r.Body, 64<<10)
					if n += read; err != nil {
						break
					}
					<-time.After(5 * time.Millisecond)
				}
				got <- n
			})
		}
	})
	t.Cleanup(func() {
		_ = listener.Close()
		serving.Wait()
	})
	p := start(t, "serve", "DATABASE_URL="+pgtest.URL(t))
	for _, size := range []int{33 << 10, 100 << 10, 300 << 10, 900 << 10} {
		id := p.submit("/enqueue", fmt.Sprintf(`{"url":"http://%s/","body":%q,"retry":{"max_attempts":1}}`, listener.Addr(), strings.Repeat("x", size))).ID
		if got := <-got; got != int64(size) {
			t.Errorf("the target got %d of %d bytes", got, size)
		}
		if task := p.await(id, ended); task.State != "succeeded" || task.Attempts[0].Error != nil {
			t.Errorf("%d bytes: %s", size, compact(t, task))
		}
	}
}
