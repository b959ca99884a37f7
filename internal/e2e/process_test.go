package e2e

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// patience is how long a test waits for what must happen soon, on a machine
// of any speed.
const patience = time.Minute

// process is a running orchestrator.
type process struct {
	t    testing.TB
	cmd  *exec.Cmd
	url  string
	done chan struct{} // closed when it has ended and its output is read

	mu     sync.Mutex
	output []string
}

// start runs a command of the program with settings (NAME=value) on top of
// those that every test wants, and waits until it serves.
func start(t testing.TB, command string, settings ...string) *process {
	t.Helper()
	return startCommand(t, newCommand(command, settings...))
}

// startCommand is start of a command that newCommand made.
func startCommand(t testing.TB, cmd *exec.Cmd) *process {
	t.Helper()
	command := strings.Join(cmd.Args[1:], " ")
	p := &process{t: t, done: make(chan struct{}), cmd: cmd}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	p.cmd.Stderr = p.cmd.Stdout
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = p.cmd.Process.Kill() // it has ended already where all went well
		<-p.done
		if t.Failed() {
			t.Logf("output of %s:\n%s", command, strings.Join(p.lines(), "\n"))
		}
	})
	serving := make(chan string, 1)
	go func() {
		defer close(p.done)
		lines := bufio.NewScanner(out)
		lines.Buffer(nil, 1<<20)
		for lines.Scan() {
			p.mu.Lock()
			p.output = append(p.output, lines.Text())
			p.mu.Unlock()
			if url, ok := servingAt(lines.Bytes()); ok {
				serving <- url
			}
		}
		_ = p.cmd.Wait() // the exit code is in ProcessState
	}()
	select {
	case p.url = <-serving:
	case <-p.done:
		t.Fatalf("%s ended before it served", command)
	case <-time.After(patience):
		t.Fatalf("%s did not serve within %v", command, patience)
	}
	return p
}

// newCommand is a command of the program with the settings that every test wants,
// and more of them.
func newCommand(command string, settings ...string) *exec.Cmd {
	cmd := exec.Command(binary, command)
	cmd.Env = append(os.Environ(), "PORT=0", "AUTH=none", "LOG_FORMAT=json", "LOG_LEVEL=debug", "TARGET_ALLOW_NETWORKS=127.0.0.0/8")
	cmd.Env = append(cmd.Env, settings...)
	return cmd
}

// servingAt returns where a process serves, if this is the line of its log that says so.
func servingAt(line []byte) (url string, ok bool) {
	var entry struct{ Msg, Address string }
	if json.Unmarshal(line, &entry) != nil || entry.Msg != "serving" {
		return "", false
	}
	_, port, _ := strings.Cut(strings.ReplaceAll(entry.Address, "[::]", ""), ":")
	return "http://127.0.0.1:" + port, true
}

func (p *process) lines() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]string(nil), p.output...)
}

// count is how many lines of the output hold text.
func (p *process) count(text string) (n int) {
	for _, line := range p.lines() {
		if strings.Contains(line, text) {
			n++
		}
	}
	return n
}

// stop sends a signal, waits for the end, and returns how long that took.
func (p *process) stop(signal syscall.Signal) time.Duration {
	p.t.Helper()
	begin := time.Now()
	if err := p.cmd.Process.Signal(signal); err != nil {
		p.t.Fatalf("signal: %v", err)
	}
	select {
	case <-p.done:
	case <-time.After(patience):
		p.t.Fatalf("the process did not end within %v", patience)
	}
	return time.Since(begin)
}

// descriptors is how many files and connections the process has open.
func (p *process) descriptors() int {
	p.t.Helper()
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", p.cmd.Process.Pid))
	if err != nil {
		p.t.Fatal(err)
	}
	return len(entries)
}

// wantDescriptors waits until the process has no more descriptors open than before.
func (p *process) wantDescriptors(before int) {
	p.t.Helper()
	eventually(p.t, func() bool { return p.descriptors() <= before },
		func() string {
			return fmt.Sprintf("%d descriptors are open, before there were %d", p.descriptors(), before)
		})
}

// ready waits until the process has opened all connections to its database
// that it needs without load, and returns the number of its descriptors.
func (p *process) ready() int {
	p.t.Helper()
	eventually(p.t, func() bool { return p.do(http.MethodGet, "/health", "").status == http.StatusOK },
		func() string { return "the process is not ready" })
	return p.descriptors()
}

// poolSize is how many connections to the database may have come to stay.
const poolSize = 10

// answer is what the service said.
type answer struct {
	status int
	header http.Header
	raw    string
	task   taskJSON
}

type taskJSON struct {
	ID           string
	State        string
	Reason       *string
	CreatedBy    *string    `json:"created_by"`
	RunAt        time.Time  `json:"run_at"`
	CreatedAt    time.Time  `json:"created_at"`
	FinishedAt   *time.Time `json:"finished_at"`
	AttemptCount int        `json:"attempt_count"`
	Headers      map[string]string
	Attempts     []struct {
		Number            int
		Outcome           string
		StatusCode        *int      `json:"status_code"`
		StartedAt         time.Time `json:"started_at"`
		DurationSeconds   float64   `json:"duration_seconds"`
		Error             *string
		ResponseExcerpt   *string  `json:"response_excerpt"`
		RetryAfterSeconds *float64 `json:"retry_after_seconds"`
	}
}

func (p *process) do(method, path, body string) answer {
	p.t.Helper()
	return p.send(method, path, body, http.Header{})
}

// send is do with headers.
func (p *process) send(method, path, body string, header http.Header) answer {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.t.Context(), patience)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, method, p.url+path, strings.NewReader(body))
	if err != nil {
		p.t.Fatal(err)
	}
	request.Header = header.Clone()
	if body != "" && header["Content-Type"] == nil {
		request.Header.Set("Content-Type", "application/json")
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		p.t.Fatalf("%s %s: %v", method, path, err)
	}
	defer func() { _ = response.Body.Close() }()
	raw, err := io.ReadAll(response.Body)
	if err != nil {
		p.t.Fatalf("%s %s: %v", method, path, err)
	}
	a := answer{status: response.StatusCode, header: response.Header, raw: string(raw)}
	_ = json.Unmarshal(raw, &a.task) // an answer of another shape leaves it empty
	return a
}

// submit posts a task and returns it; the answer must be 202.
func (p *process) submit(path, body string) taskJSON {
	p.t.Helper()
	a := p.do(http.MethodPost, path, body)
	if a.status != http.StatusAccepted {
		p.t.Fatalf("POST %s = %d %s, want 202", path, a.status, a.raw)
	}
	if want := "/tasks/" + a.task.ID; a.header.Get("Location") != want {
		p.t.Errorf("Location = %q, want %q", a.header.Get("Location"), want)
	}
	return a.task
}

// await polls a task until ok says that it is as wanted.
func (p *process) await(id string, ok func(taskJSON) bool) taskJSON {
	p.t.Helper()
	var last answer
	eventually(p.t, func() bool {
		last = p.do(http.MethodGet, "/tasks/"+id, "")
		return last.status == http.StatusOK && ok(last.task)
	}, func() string { return "task is not as wanted: " + last.raw })
	return last.task
}

func ended(t taskJSON) bool { return t.State == "succeeded" || t.State == "failed" }

// eventually asks again and again, for as long as patience lasts.
func eventually(t testing.TB, ok func() bool, complaint func() string) {
	t.Helper()
	deadline := time.After(patience)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-deadline:
			t.Fatal(complaint())
		case <-tick.C:
		}
	}
}

// awaitCount waits until count reaches most, for as long as it rises.
func awaitCount(t testing.TB, count func() int, most int, complaint func() string) {
	t.Helper()
	for n := count(); n < most; n = count() {
		eventually(t, func() bool { return count() > n }, complaint)
	}
}

// openDir returns a temporary folder that PostgreSQL's user can reach.
func openDir(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chmod(filepath.Dir(dir), 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

func compact(t *testing.T, v any) string {
	t.Helper()
	var b bytes.Buffer
	if err := json.NewEncoder(&b).Encode(v); err != nil {
		t.Fatal(err)
	}
	return b.String()
}
