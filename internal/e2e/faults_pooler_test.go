//go:build faults

package e2e

import (
	"bytes"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/melodia/orchestrator/internal/devdb"
)

const (
	// flowControlTests are those of lanes, limits and hosts, and of the contract of stores.
	flowControlTests = "F[0-9]+|Lane|Queue|Limit|Rate|Host|Order|Permit|Expire|StoreContract"
	// otherTests say nothing of the connection to the database: they are about documents, callers,
	// logs and the start, plan statements by themselves, or have roles of their own, of which pgbouncer knows nothing.
	otherTests = "^Test(Plans|FindPlans|ClaimAmongAMillion|DocumentedCommands|DocumentedPython|DocumentsLinks|GeneratedClients|ThreatModelNamesTests|" +
		"Attackers|BehindIAM|IssuerAway|LogThatIsNotRead|DescriptorsRunOut|CertificatesThatCannotBeRead|Profiles|Dev|DatabaseOfParts)$"
)

// What the normal suite says of the store and of the whole process holds behind
// pgbouncer in transaction mode too.
func TestSuiteBehindPgbouncer(t *testing.T) {
	behindPgbouncer(t, "-skip="+otherTests+"|"+flowControlTests)
}

// F11: so does what it says of queues, limits and hosts.
func TestF11FlowControlBehindPgbouncer(t *testing.T) {
	behindPgbouncer(t, "-run="+flowControlTests, "-skip="+otherTests)
}

// behindPgbouncer runs the normal suite behind pgbouncer.
func behindPgbouncer(t *testing.T, flags ...string) {
	t.Helper()
	server, err := devdb.Start(t.Context(), devdb.Options{Temporary: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Stop(); err != nil {
			t.Error(err)
		}
	})
	for range 3 {
		url, stop := startPgbouncer(t, server.URL("postgres"))
		// Without the tag, wherever it came from: this test must not run itself.
		// One package at a time: in each database they share four connections to the server.
		args := append([]string{"test", "-tags=", "-count=1", "-timeout=20m", "-p=1", "-parallel=4"}, flags...)
		suite := exec.CommandContext(t.Context(), "go", append(args, "./internal/postgres/...", "./internal/e2e", "./cmd/orchestrator")...)
		suite.Dir = repository
		suite.Env = append(os.Environ(), "TEST_DATABASE_URL="+url)
		output, err := suite.CombinedOutput()
		log := stop()
		if err == nil {
			t.Logf("%s", output)
			return
		}
		if !strings.Contains(log, endsItself) {
			t.Fatalf("%v\n%s\npgbouncer:\n%s", err, output, log)
		}
		t.Log("pgbouncer ended itself, once more")
	}
	t.Fatal("pgbouncer ended itself each time")
}

// endsItself is the last word of a pgbouncer below 1.19.1 (Debian 12 has 1.18), which
// ends itself now and then when a client that had a statement cancelled is gone before
// that is done: https://github.com/pgbouncer/pgbouncer/issues/801. What the suite says
// then is not about the service.
const endsItself = "in function disconnect_client(): bad client state: 0"

// startPgbouncer puts a pgbouncer in transaction mode before a server. It returns
// the URL that leads through it, and what ends it and returns its log.
func startPgbouncer(t *testing.T, serverURL string) (pooledURL string, stop func() (log string)) {
	t.Helper()
	u, err := url.Parse(serverURL)
	if err != nil {
		t.Fatal(err)
	}
	password, _ := u.User.Password()
	port, dir := freePort(t), t.TempDir()
	write := func(name, format string, args ...any) string {
		t.Helper()
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, fmt.Appendf(nil, format, args...), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	users := write("users.txt", "%q %q\n", u.User.Username(), password)
	// Each database has a pool, smaller than the service's own. Connections are
	// renewed soon: one that was made while the database took no writes takes none.
	// After a refused login, as when the server has no connection left for a moment,
	// pgbouncer refuses all clients for 15 s by default, which is as long as a lease.
	ini := write("pgbouncer.ini", `[databases]
* = host=%s port=%s
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = %d
unix_socket_dir =
auth_type = scram-sha-256
auth_file = %s
pool_mode = transaction
default_pool_size = 4
max_client_conn = 2000
server_lifetime = 5
server_login_retry = 1
log_connections = 0
log_disconnections = 0
`, u.Hostname(), u.Port(), port, users)

	args := []string{ini}
	if os.Geteuid() == 0 { // which it refuses to run as
		args = append(args, "-u", "nobody")
	}
	path, err := exec.LookPath("pgbouncer")
	if err != nil {
		path = "/usr/sbin/pgbouncer" // Debian's place, which is not in a user's PATH
	}
	pgbouncer := exec.CommandContext(t.Context(), path, args...)
	var log bytes.Buffer
	pgbouncer.Stdout, pgbouncer.Stderr = &log, &log
	if err := pgbouncer.Start(); err != nil {
		t.Fatalf("apt-get install pgbouncer: %v", err)
	}
	stop = sync.OnceValue(func() string {
		_ = pgbouncer.Process.Kill() // it may have ended
		_ = pgbouncer.Wait()
		return log.String()
	})
	t.Cleanup(func() { stop() })

	u.Host = net.JoinHostPort("127.0.0.1", strconv.Itoa(port))
	// For the tests' own connections: the service finds out by itself.
	u.RawQuery += "&default_query_exec_mode=cache_describe"
	eventually(t, func() bool {
		conn, err := pgx.Connect(t.Context(), u.String())
		if err != nil {
			return false
		}
		return conn.Close(t.Context()) == nil
	}, func() string { return "pgbouncer does not answer" })
	return u.String(), stop
}

// freePort returns a port of the loopback address that was free a moment ago.
func freePort(t *testing.T) int {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = listener.Close() }()
	return listener.Addr().(*net.TCPAddr).Port
}
