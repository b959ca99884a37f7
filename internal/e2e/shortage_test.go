package e2e

import (
	"net/http"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/melodia/orchestrator/internal/postgres/pgtest"
)

// TestDescriptorsRunOut has an instance with far fewer file descriptors than calls to make, all of
// which are under way at a time as the target answers none before they have run out.
func TestDescriptorsRunOut(t *testing.T) {
	t.Parallel()
	const tasks, descriptors = 200, "72"
	release := make(chan struct{})
	let := sync.OnceFunc(func() { close(release) })
	target := newTarget(t, func(http.ResponseWriter, *http.Request, int) { <-release })
	t.Cleanup(let)
	cmd := newCommand("serve", "DATABASE_URL="+pgtest.URL(t), "DISPATCH_CONCURRENCY=200")
	limited := exec.Command("sh", "-c", `ulimit -n `+descriptors+` && exec "$0" "$@"`, cmd.Path, "serve")
	limited.Env = cmd.Env
	p := startCommand(t, limited)

	eventually(t, func() bool { return p.count(`"max_connections":18,"open_files":72`) > 0 }, func() string { return "no line says that fewer callers can be connected" })

	began := time.Now()
	one := `{"url":"` + target.url + `/held","payload":1,"retry":{"max_attempts":1}},`
	if a := p.do(http.MethodPost, "/tasks/batch", `{"tasks":[`+strings.TrimSuffix(strings.Repeat(one, tasks), ",")+`]}`); a.status != http.StatusAccepted {
		t.Fatalf("POST /tasks/batch = %d %s, want 202", a.status, a.raw)
	}
	const line = `"msg":"the instance lacks something and claims less"`
	eventually(t, func() bool { return p.count(line) > 0 }, func() string { return "no line says that descriptors ran out" })
	let()
	eventually(t, func() bool {
		a := p.do(http.MethodGet, "/tasks?state=pending,running&limit=1", "")
		return a.status == http.StatusOK && strings.Contains(a.raw, `"tasks":[]`)
	}, func() string { return "tasks are left" })
	if lines, most := p.count(line), int(time.Since(began)/time.Second)+1; lines > most {
		t.Errorf("%d lines say that descriptors ran out, want %d at most", lines, most)
	}
	if a := p.do(http.MethodGet, "/tasks?state=failed&limit=1", ""); !strings.Contains(a.raw, `"tasks":[]`) {
		t.Errorf("tasks failed: %s", a.raw)
	}
	if got := len(target.got("/held")); got != tasks {
		t.Errorf("the target got %d calls, want %d", got, tasks)
	}
}
