// Orchestrator takes HTTP tasks from other services and carries them out, now
// or later, with retries and timeouts.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"
	_ "time/tzdata" // time zones of requests, where the machine has none

	"github.com/melodia/orchestrator/internal/auth"
	"github.com/melodia/orchestrator/internal/config"
	"github.com/melodia/orchestrator/internal/httpapi"
	"github.com/melodia/orchestrator/internal/logging"
	"github.com/melodia/orchestrator/internal/postgres"
	"github.com/melodia/orchestrator/internal/task"
)

// version is set by the linker: -X main.version=1.2.3.
var version = "dev"

const usage = `Usage: orchestrator [command]

  serve     take tasks and carry them out (the default); needs a database and AUTH
  dev       the same with a private PostgreSQL and an echo target: nothing to set up
            --port N: listen there; --fresh: begin with an empty database
  migrate   bring the database up to date
  check     look at settings, database, rights and schema, and say what to do
  key       make an API key: orchestrator key NAME SCOPES (submit, read, manage, internal; joined by +)
  openapi   print the OpenAPI document
  echo      a target for trials: answers 200 and logs every call
  version   print the version

Settings are read from the environment; docs/operations.md has the table.
`

func main() {
	// net/http writes to this log what a target sends out of turn. The service passes its own log as an argument.
	log.SetOutput(io.Discard)
	tuneCollector()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	// A second signal ends the process at once.
	context.AfterFunc(ctx, stop)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// tuneCollector trades memory for time. Little of the heap is live, so that Go's default
// (GOGC=100) would collect often and free little. Near the memory limit it collects more
// often: the limit is soft, and fits into the 512 MiB that Cloud Run gives by default.
// Go's own variables GOGC and GOMEMLIMIT take precedence.
func tuneCollector() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(300)
	}
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(400 << 20)
	}
}

// errUsage is returned for arguments that a command does not take. An error that wraps it
// says which.
var errUsage = errors.New("wrong arguments")

// run carries out one command and returns the process's exit code: 0, 1 when
// it failed, 2 when it was called wrongly.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	command := "serve"
	if len(args) > 0 {
		command, args = args[0], args[1:]
	}
	err := runCommand(ctx, command, args, stdout, stderr)
	if errors.Is(err, errUsage) {
		fmt.Fprintf(stderr, "orchestrator: %s\n%s", strings.TrimPrefix(err.Error(), errUsage.Error()+": "), usage)
		return 2
	}
	if err != nil {
		for line := range strings.Lines(err.Error()) {
			fmt.Fprintln(stderr, "orchestrator:", strings.TrimSpace(line))
		}
		return 1
	}
	return 0
}

// runCommand carries out one command with its arguments. It returns an error that wraps
// errUsage where there is no such command, or where it does not take such arguments.
func runCommand(ctx context.Context, command string, args []string, stdout, stderr io.Writer) error {
	takes := map[string]int{"key": 2}[command]
	if command != "dev" && len(args) != takes { // dev reads flags
		return fmt.Errorf("%w: there is no command %s with so many arguments", errUsage, command)
	}
	switch command {
	case "serve":
		return serveCommand(ctx, stdout)
	case "dev":
		return devCommand(ctx, args, stdout, stderr)
	case "migrate":
		return migrateCommand(ctx, stdout, stderr)
	case "check":
		return checkCommand(ctx, stdout)
	case "key":
		return keyCommand(args[0], args[1], stdout)
	case "openapi":
		return openapiCommand(stdout)
	case "echo":
		return echoCommand(ctx, stdout)
	case "version":
		_, err := fmt.Fprintln(stdout, version)
		return err
	case "help", "-h", "--help":
		_, err := fmt.Fprint(stdout, usage)
		return err
	default:
		return fmt.Errorf("%w: there is no command %s", errUsage, command)
	}
}

func serveCommand(ctx context.Context, stdout io.Writer) error {
	c, err := load()
	if err != nil {
		if c != nil {
			err = errors.Join(err, checkParts(c)) // all mistakes at once
		}
		return err
	}
	listener, err := listen(ctx, c.Port)
	if err != nil {
		return err
	}
	defer func() { _ = listener.Close() }()
	log, lines := logging.New(stdout, c.LogFormat, c.LogLevel)
	defer lines.Flush()
	return serve(ctx, c, listener, log, trial{exampleURL: exampleURL})
}

// keyCommand prints a new API key, which is shown this once, and the entry of API_KEYS
// that lets it in.
func keyCommand(name, scopes string, stdout io.Writer) error {
	key, entry, err := auth.NewKey(name, scopes, httpapi.Scopes())
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(stdout, "key, for the caller; it is shown this once:\n  %s\nentry to add to API_KEYS:\n  %s\n", key, entry)
	return err
}

func migrateCommand(ctx context.Context, stdout, stderr io.Writer) error {
	c, err := load()
	if err != nil {
		return err
	}
	log, lines := logging.New(stderr, "text", c.LogLevel)
	defer lines.Flush()
	warnMisspelt(log)
	applied, err := postgres.Migrate(ctx, c.DatabaseURL, observeMigrations(log, func(string) {}))
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(stdout, "migrations applied: %d\n", applied)
	return err
}

func openapiCommand(stdout io.Writer) error {
	// The document shows the settings' defaults.
	defaults := task.Spec{Timeout: defaultTimeout, Retry: task.DefaultRetryPolicy()}
	return httpapi.New(httpapi.Options{Defaults: defaults, Version: version, ExampleURL: exampleURL}).WriteDocument(stdout)
}

var errNoDatabase = errors.New("DATABASE_URL is not set: it must be like postgres://user:password@host:5432/database, or set DATABASE_HOST, DATABASE_NAME, DATABASE_USER and DATABASE_PASSWORD instead (to try the service without a database: orchestrator dev)")

// load reads the settings for commands that need a database. The error has one line for
// each mistake. The settings are nil unless the missing database is the only one.
func load() (*config.Config, error) {
	c, err := config.Load()
	if !config.NamesDatabase() {
		err = errors.Join(err, errNoDatabase)
	}
	return c, err
}
