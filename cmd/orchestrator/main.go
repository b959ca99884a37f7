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

  serve     take tasks and carry them out (the default); needs DATABASE_URL and AUTH
  dev       the same with a private PostgreSQL and an echo target: nothing to set up
            --port N: listen there; --fresh: begin with an empty database
  migrate   bring the database at DATABASE_URL up to date
  check     look at settings, database, rights and schema, and say what to do
  key       make an API key: orchestrator key NAME SCOPES (submit, read, manage, internal; joined by +)
  openapi   print the OpenAPI document
  echo      a target for trials: answers 200 and logs every call
  version   print the version

Settings are read from the environment; the README has the table.
`

func main() {
	// net/http prints here what a target sends out of turn; our own log is handed around.
	log.SetOutput(io.Discard)
	collectSeldom()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	// A second signal ends the process at once.
	context.AfterFunc(ctx, stop)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// collectSeldom trades memory for time: little of it is live at a time, so the
// garbage collector would run often for little. The limit is soft and fits into
// the 512 MiB that Cloud Run gives by default; near it memory counts more.
// Go's own variables GOGC and GOMEMLIMIT take precedence.
func collectSeldom() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(300)
	}
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(400 << 20)
	}
}

// errUsage is returned for arguments that a command does not take.
var errUsage = errors.New("wrong arguments")

// run carries out one command and returns the process's exit code: 0, 1 when
// it failed, 2 when it was called wrongly.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	command := "serve"
	if len(args) > 0 {
		command = args[0]
	}
	commands := map[string]func(context.Context, io.Writer, io.Writer) error{
		"serve": serveCommand,
		"dev": func(ctx context.Context, stdout, stderr io.Writer) error {
			return devCommand(ctx, args[1:], stdout, stderr)
		},
		"migrate": migrateCommand,
		"check":   checkCommand,
		"key": func(context.Context, io.Writer, io.Writer) error {
			return keyCommand(args[1], args[2], stdout)
		},
		"openapi": openapiCommand,
		"echo":    echoCommand,
		"version": func(context.Context, io.Writer, io.Writer) error {
			_, err := fmt.Fprintln(stdout, version)
			return err
		},
		"help": func(context.Context, io.Writer, io.Writer) error {
			_, err := fmt.Fprint(stdout, usage)
			return err
		},
	}
	if command == "-h" || command == "--help" {
		command = "help"
	}
	carryOut, ok := commands[command]
	arguments := map[string]int{"key": 2}[command]
	if !ok || command != "dev" && max(len(args), 1) != 1+arguments {
		fmt.Fprint(stderr, usage)
		return 2
	}
	err := carryOut(ctx, stdout, stderr)
	if errors.Is(err, errUsage) {
		fmt.Fprint(stderr, usage)
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

func serveCommand(ctx context.Context, stdout, _ io.Writer) error {
	c, err := load()
	if err != nil {
		return err
	}
	listener, err := listen(ctx, c.Port)
	if err != nil {
		return err
	}
	log, lines := logging.New(stdout, c.LogFormat, c.LogLevel)
	defer lines.Flush()
	return serve(ctx, c, listener, log, trial{exampleURL: exampleURL})
}

// keyCommand prints a new API key, which nothing shows again, and what the
// service is to know of it.
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

func openapiCommand(_ context.Context, stdout, _ io.Writer) error {
	// What the settings would change is shown with its defaults.
	defaults := task.Spec{Timeout: defaultTimeout, Retry: task.DefaultRetryPolicy()}
	return httpapi.New(httpapi.Options{Defaults: defaults, Version: version, ExampleURL: exampleURL}).WriteDocument(stdout)
}

// load reads the settings for commands that need a database.
func load() (*config.Config, error) {
	c, err := config.Load()
	if err == nil && c.DatabaseURL == "" {
		err = errors.New("DATABASE_URL is not set: it must be like postgres://user:password@host:5432/database (to try the service without one: orchestrator dev)")
	}
	return c, err
}
