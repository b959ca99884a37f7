// Package e2e holds the tests of the whole process: each starts the program that is
// built from cmd/orchestrator, beside a PostgreSQL and targets of its own, and knows it
// only through HTTP, its log, its exit code and its tables. With the build tag faults it
// also kills, stalls and cuts off whatever the process depends on, and measures its speed.
package e2e

import (
	"cmp"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/melodia/orchestrator/internal/postgres/pgtest"
)

// repository is the folder of go.mod, seen from this package.
var repository = filepath.Join("..", "..")

// binary is the program under test.
var binary string

func TestMain(m *testing.M) {
	os.Exit(buildAndRun(m))
}

func buildAndRun(m *testing.M) int {
	dir, err := os.MkdirTemp("", "orchestrator-test-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer func() { _ = os.RemoveAll(dir) }()
	binary = filepath.Join(dir, "orchestrator")
	build := buildCommand(binary)
	build.Stdout, build.Stderr = os.Stderr, os.Stderr
	if err := cmp.Or(build.Run(), readSources()); err != nil {
		fmt.Fprintln(os.Stderr, "build the program under test:", err)
		return 1
	}
	code := pgtest.Main(m)
	http.DefaultClient.CloseIdleConnections()
	if err := goleak.Find(); code == 0 && err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	return code
}

// buildCommand returns the command that builds the program under test as output.
func buildCommand(output string, flags ...string) *exec.Cmd {
	build := exec.Command("go", append(append([]string{"build", "-o", output}, flags...), "./cmd/orchestrator")...)
	build.Dir = repository
	return build
}

// readSources opens every folder of the repository. The go command keeps a passed test's
// result until a file changes that the test binary was compiled from or has opened, and
// it does not see what buildCommand compiles.
func readSources() error {
	return filepath.WalkDir(repository, func(path string, entry fs.DirEntry, err error) error {
		if err == nil && entry.IsDir() && path != repository && strings.HasPrefix(entry.Name(), ".") {
			return fs.SkipDir
		}
		return err
	})
}
