package e2e

import (
	"bufio"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/melodia/orchestrator/internal/postgres/pgtest"
)

// A reader that stalls, or goes away, keeps no task from being carried out, nor the
// process from ending in order.
func TestLogThatIsNotRead(t *testing.T) {
	t.Parallel()
	for name, stop := range map[string]func(io.Closer) error{
		"stalls":    func(io.Closer) error { return nil },
		"goes away": io.Closer.Close,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			target := newTarget(t, statusOf)
			cmd := newCommand("serve", "DATABASE_URL="+pgtest.URL(t))
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				_ = cmd.Process.Kill() // it has ended already where all went well
				_ = cmd.Wait()
			})
			p := &process{t: t}
			for lines := bufio.NewReader(out); p.url == ""; {
				line, err := lines.ReadBytes('\n')
				if err != nil {
					t.Fatal(err)
				}
				p.url, _ = servingAt(line)
			}
			if err := stop(out); err != nil {
				t.Fatal(err)
			}

			const tasks = 1000 // their lines are more than a pipe holds, which is 64 KiB
			item := fmt.Sprintf(`{"url":%q}`, target.url+"/200")
			if a := p.do(http.MethodPost, "/tasks/batch", `{"tasks":[`+strings.Repeat(item+",", tasks-1)+item+`]}`); a.status != http.StatusAccepted {
				t.Fatalf("got %d %s", a.status, a.raw)
			}
			eventually(t, func() bool {
				return strings.Contains(p.do(http.MethodGet, "/tasks/counts", "").raw, fmt.Sprintf(`"succeeded":{"count":%d,`, tasks))
			}, func() string { return p.do(http.MethodGet, "/tasks/counts", "").raw })
			if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
			ended := make(chan *os.ProcessState, 1)
			go func() {
				state, err := cmd.Process.Wait() // Wait of cmd would close the pipe
				if err != nil {
					t.Error(err)
				}
				ended <- state
			}()
			select {
			case state := <-ended:
				if !state.Success() {
					t.Errorf("it ended with %v", state)
				}
			case <-time.After(patience):
				t.Errorf("it did not end within %v", patience)
			}
		})
	}
}
