package e2e

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/melodia/orchestrator/internal/postgres/pgtest"
)

// While migrations wait the port answers, and says for what.
func TestWaitingMigrations(t *testing.T) {
	t.Parallel()
	database := pgtest.EmptyURL(t)
	conn, err := pgx.Connect(t.Context(), database)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(context.WithoutCancel(t.Context())) })
	for _, sql := range []string{"BEGIN ISOLATION LEVEL REPEATABLE READ", "SET LOCAL application_name = 'nightly dump'", "SELECT 1"} {
		if _, err := conn.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := strconv.Itoa(listener.Addr().(*net.TCPAddr).Port)
	if err := listener.Close(); err != nil {
		t.Fatal(err)
	}
	cmd := newCommand("serve", "DATABASE_URL="+database, "PORT="+port)
	var log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	t.Cleanup(func() { _ = cmd.Process.Kill() }) // it has ended already where all went well
	get := func(method, path, body string) (status int, header http.Header, raw string) {
		r, err := http.NewRequestWithContext(t.Context(), method, "http://127.0.0.1:"+port+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Content-Type", "application/json")
		response, err := http.DefaultClient.Do(r)
		if err != nil {
			return 0, nil, err.Error()
		}
		defer func() { _ = response.Body.Close() }()
		b, err := io.ReadAll(response.Body)
		if err != nil {
			t.Fatal(err)
		}
		return response.StatusCode, response.Header, string(b)
	}
	eventually(t, func() bool {
		status, _, raw := get(http.MethodGet, "/health", "")
		return status == http.StatusServiceUnavailable && strings.Contains(raw, `nightly dump`)
	}, func() string {
		_, _, raw := get(http.MethodGet, "/health", "")
		return "/health does not say what it waits for: " + raw
	})
	for path, want := range map[string]int{"/health/live": 200, "/docs/index.html": 200, "/openapi.json": 200, "/nothing": 404, "/tasks": 503} {
		if status, _, raw := get(http.MethodGet, path, ""); status != want {
			t.Errorf("GET %s = %d %.200s, want %d", path, status, raw, want)
		}
	}
	if status, header, raw := get(http.MethodPost, "/enqueue", `{"url":"https://example.com"}`); status != http.StatusServiceUnavailable || header.Get("Retry-After") == "" {
		t.Errorf("POST /enqueue = %d %s, want 503 with Retry-After", status, raw)
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-ended:
		if err != nil {
			t.Errorf("it ended with %v, want exit code 0", err)
		}
	case <-time.After(patience):
		t.Fatal("it does not end while it waits")
	}
	if !regexp.MustCompile(`"msg":"migrating the database","reason":"migrations wait for a lock held by session \d+ \(application_name \\"nightly dump\\"`).Match(log.Bytes()) {
		t.Errorf("the log does not say what it waited for: %s", log.String())
	}
}

// A process that could call no https target does not start: what kept it from reading
// certificates would have shown at each task instead, and for good.
func TestCertificatesThatCannotBeRead(t *testing.T) {
	t.Parallel()
	for command, want := range map[string]string{
		"serve": "orchestrator: the system's CA certificates cannot be read",
		"check": "FAIL  settings  the system's CA certificates cannot be read",
	} {
		cmd := newCommand(command, "DATABASE_URL=postgres://127.0.0.1:1/x", "SSL_CERT_FILE="+t.TempDir(), "SSL_CERT_DIR="+t.TempDir()+"/none")
		output, _ := cmd.CombinedOutput() // its end is looked at below
		if code := cmd.ProcessState.ExitCode(); code != 1 || !strings.Contains(string(output), want) {
			t.Errorf("%s: exit code %d, want 1, and the output %q without %q", command, code, output, want)
		}
	}
}

// Profiles have a port of their own, which only processes of the machine can reach.
func TestProfiles(t *testing.T) {
	t.Parallel()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := strconv.Itoa(listener.Addr().(*net.TCPAddr).Port)
	if err := listener.Close(); err != nil {
		t.Fatal(err)
	}
	p := start(t, "serve", "DATABASE_URL="+pgtest.URL(t), "DEBUG_PORT="+port)
	if a := p.do(http.MethodGet, "/debug/pprof/", ""); a.status != http.StatusNotFound {
		t.Errorf("profiles on the service's own port: %d, want 404", a.status)
	}
	p.url = "http://127.0.0.1:" + port
	if a := p.do(http.MethodGet, "/debug/pprof/goroutine?debug=1", ""); a.status != http.StatusOK || !strings.Contains(a.raw, "goroutine profile") {
		t.Errorf("GET /debug/pprof/goroutine = %d %.100s, want a profile", a.status, a.raw)
	}
}

// What dev prints works as it is, with the key that it makes where AUTH wants one.
func TestDev(t *testing.T) {
	t.Parallel()
	for _, auth := range []string{"none", "api_key"} {
		t.Run(auth, func(t *testing.T) {
			t.Parallel()
			p := start(t, "dev", "DATABASE_URL="+pgtest.URL(t), "TARGET_ALLOW_NETWORKS=", "AUTH="+auth, "TARGET_ALOW_HOSTS=hunter2")
			eventually(t, func() bool { return p.count("End with Ctrl-C") > 0 }, func() string { return "dev does not say that it is ready" })
			printed := strings.Join(p.lines(), "\n")
			header := http.Header{}
			argument := ""
			if auth == "api_key" {
				key := regexp.MustCompile(`export ORCHESTRATOR_KEY=(ork_\S{43})\n`).FindStringSubmatch(printed)
				if key == nil {
					t.Fatalf("dev prints no key:\n%s", printed)
				}
				header.Set("Authorization", "Bearer "+key[1])
				argument = ` -H "Authorization: Bearer \$ORCHESTRATOR_KEY"`
			}
			commands := regexp.MustCompile(`curl -i -w '\\n' (\S+)`+argument+` -H 'Content-Type: application/json' \\\n\s+-d '([^']*)'`).FindAllStringSubmatch(printed, -1)
			if len(commands) != 2 {
				t.Fatalf("dev prints %d commands, want 2:\n%s", len(commands), printed)
			}
			for _, c := range commands {
				submitted := p.send(http.MethodPost, strings.TrimPrefix(c[1], p.url), c[2], header)
				if submitted.status != http.StatusAccepted {
					t.Fatalf("%s: %d %s", c[0], submitted.status, submitted.raw)
				}
				got := p.send(http.MethodGet, "/tasks/"+submitted.task.ID+"?wait_seconds=30", "", header)
				if got.task.State != "succeeded" {
					t.Errorf("%s: %s", c[0], got.raw)
				}
			}
			for _, want := range []string{"echo target was called", `song_id`, "Your mix is ready", p.url + "/docs", "Ready in ", "echo target", "data ", "TARGET_ALOW_HOSTS", "TARGET_ALLOW_HOSTS"} {
				p.logs(want)
			}
			if p.count("hunter2") > 0 {
				t.Error("the value of a misspelt setting is shown")
			}
			if a := p.do(http.MethodGet, "/docs/index.html", ""); a.status != http.StatusOK || !strings.Contains(a.raw, "swagger-ui") {
				t.Errorf("/docs/index.html = %d", a.status)
			}
			if p.stop(syscall.SIGINT); p.cmd.ProcessState.ExitCode() != 0 {
				t.Errorf("exit code %d after Ctrl-C, want 0", p.cmd.ProcessState.ExitCode())
			}
		})
	}
}
