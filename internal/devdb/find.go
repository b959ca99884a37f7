package devdb

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// oldestMajor is the oldest PostgreSQL that the service supports.
const oldestMajor = 14

// installation is a usable PostgreSQL.
type installation struct {
	// bin is the folder of its programs.
	bin   string
	major int
}

// machine is what Start finds around itself.
type machine struct {
	// path is where programs are searched, as in $PATH.
	path []string
	// globs match the folders of PostgreSQL's programs in places that are
	// often not in path.
	globs []string
	// repository is a Maven repository that has PostgreSQL's programs.
	repository string
	freePort   func() (int, error)
}

func thisMachine() machine {
	return machine{
		path: filepath.SplitList(os.Getenv("PATH")),
		globs: []string{
			"/usr/lib/postgresql/*/bin",          // Debian
			"/usr/pgsql-*/bin",                   // PostgreSQL's own RPMs
			"/opt/homebrew/opt/postgresql@*/bin", // Homebrew on ARM
			"/usr/local/opt/postgresql@*/bin",    // Homebrew on Intel
			"/Applications/Postgres.app/Contents/Versions/*/bin",
		},
		repository: "https://repo1.maven.org/maven2",
		freePort:   freePort,
	}
}

// find returns an installed PostgreSQL, or else one that it fetches into dir.
func (m machine) find(ctx context.Context, dir string, log *slog.Logger) (installation, error) {
	as, err := unprivileged()
	if err != nil {
		return installation{}, err
	}
	for _, bin := range m.candidates(ctx) {
		if pg, ok := inspect(ctx, bin, as); ok {
			return pg, nil
		}
	}
	pg, err := m.fetch(ctx, dir, as, log)
	if ctx.Err() != nil {
		return installation{}, fmt.Errorf("find PostgreSQL: %w", context.Cause(ctx))
	}
	if err != nil {
		return installation{}, fmt.Errorf("install PostgreSQL %d or later (apt-get install postgresql, brew install postgresql@17): none was found, and fetching one failed: %w", oldestMajor, err)
	}
	return pg, nil
}

// candidates returns the folders that may hold PostgreSQL's programs, best first.
func (m machine) candidates(ctx context.Context) []string {
	var onPath, configured, known []string
	for _, dir := range m.path {
		if !filepath.IsAbs(dir) {
			continue // as os/exec does: nothing is run because of where we happen to stand
		}
		// A link may stand alone, while initdb is only beside what it points to.
		if file, err := filepath.EvalSymlinks(filepath.Join(dir, "postgres")); err == nil {
			onPath = append(onPath, filepath.Dir(file))
		}
		if bin, err := output(exec.CommandContext(ctx, filepath.Join(dir, "pg_config"), "--bindir")); err == nil {
			configured = append(configured, strings.TrimSpace(bin))
		}
	}
	for _, pattern := range m.globs {
		bins, _ := filepath.Glob(pattern)
		// All versions that count have two digits, so the order of text will do.
		slices.Reverse(bins)
		known = append(known, bins...)
	}
	return slices.Concat(onPath, configured, known)
}

// inspect reports whether bin holds the programs of a PostgreSQL that is new
// enough and that as can run.
func inspect(ctx context.Context, bin string, as account) (installation, bool) {
	if _, err := exec.LookPath(filepath.Join(bin, "initdb")); err != nil {
		return installation{}, false
	}
	cmd := exec.CommandContext(ctx, filepath.Join(bin, "postgres"), "--version")
	isolate(cmd, as)
	version, err := output(cmd)
	if err != nil {
		return installation{}, false
	}
	pg := installation{bin: bin}
	if _, err := fmt.Sscanf(version, "postgres (PostgreSQL) %d", &pg.major); err != nil {
		return installation{}, false
	}
	return pg, pg.major >= oldestMajor
}

func output(cmd *exec.Cmd) (string, error) {
	// A wrapper script's child could hold the pipe beyond the script's end.
	cmd.WaitDelay = time.Second
	out, err := cmd.Output()
	return string(out), err
}

// account is a user of the machine.
type account struct{ uid, gid int }

// unprivileged returns the user that PostgreSQL runs as: ourselves, or in place
// of root, as which it refuses to run, "postgres" or "nobody".
func unprivileged() (account, error) {
	if os.Geteuid() != 0 {
		return account{os.Geteuid(), os.Getegid()}, nil
	}
	u, err := user.Lookup("postgres")
	if err != nil {
		u, err = user.Lookup("nobody")
	}
	if err != nil {
		return account{}, fmt.Errorf("find a user to run PostgreSQL as instead of root: %w", err)
	}
	uid, uidErr := strconv.Atoi(u.Uid)
	gid, gidErr := strconv.Atoi(u.Gid)
	return account{uid, gid}, errors.Join(uidErr, gidErr)
}
