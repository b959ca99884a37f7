package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/melodia/orchestrator/internal/config"
	"github.com/melodia/orchestrator/internal/postgres"
)

// checkTimeout bounds the look at the database.
const checkTimeout = 15 * time.Second

// checklist writes one line for each check.
type checklist struct {
	w      io.Writer
	failed int
}

func (l *checklist) line(verdict, topic, text string) {
	fmt.Fprintf(l.w, "%-5s %-9s %s\n", verdict, topic, text)
}

func (l *checklist) ok(topic, text string)   { l.line("ok", topic, text) }
func (l *checklist) warn(topic, text string) { l.line("warn", topic, text) }
func (l *checklist) fail(topic string, err error) {
	l.failed++
	l.line("FAIL", topic, strings.Join(strings.Fields(err.Error()), " "))
}

// failSettings writes a line for each mistake of the settings: each line of the error.
func (l *checklist) failSettings(err error) {
	for line := range strings.Lines(err.Error()) {
		l.fail("settings", errors.New(line))
	}
}

// checkCommand checks what serve would start with, changes nothing, and writes what to
// do. It returns an error if serve would not start.
func checkCommand(ctx context.Context, stdout io.Writer) error {
	l := &checklist{w: stdout}
	misspelt := config.MisspeltHere()
	for _, name := range slices.Sorted(maps.Keys(misspelt)) {
		l.warn("settings", name+" is no setting and changes nothing; did you mean "+misspelt[name]+"?")
	}
	if c := l.settings(); c != nil {
		l.database(ctx, c)
	}
	if l.failed > 0 {
		return errors.New("it would not work like this, see FAIL")
	}
	return nil
}

// settings checks the settings. It returns nil if they do not lead to a database.
func (l *checklist) settings() *config.Config {
	before := l.failed
	c, err := load()
	if err != nil {
		l.failSettings(err)
	}
	if c == nil {
		return nil
	}
	if err := checkParts(c); err != nil {
		l.failSettings(err)
	}
	if text := shortSecret(c); text != "" {
		l.warn("settings", text)
	}
	for _, text := range idleSettings(c) {
		l.warn("settings", text)
	}
	if l.failed == before {
		l.ok("settings", "valid; AUTH is "+strings.Join(c.Auth, ","))
	}
	if c.DatabaseURL == "" {
		return nil
	}
	return c
}

func (l *checklist) database(ctx context.Context, c *config.Config) {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	began := time.Now()
	i, err := postgres.Inspect(ctx, c.DatabaseURL)
	if err != nil {
		l.fail("database", err)
		return
	}
	by := ""
	if i.Pooled {
		by = " through a pooler"
	}
	l.ok("database", fmt.Sprintf("PostgreSQL %s, database %q as role %q%s, in %s", i.Server, i.Database, i.Role, by, time.Since(began).Round(time.Millisecond)))
	switch {
	case i.InRecovery:
		l.fail("database", errors.New("it is a standby and takes no writes: point DATABASE_URL or DATABASE_HOST at the primary (target_session_attrs=read-write with several hosts)"))
	case i.ReadOnly:
		l.fail("database", errors.New("it takes no writes: default_transaction_read_only is on for the role, the database or the server; find out why (some providers set it when the disk is full), then RESET it"))
	}
	if i.Encoding != "UTF8" {
		l.fail("database", fmt.Errorf("its encoding is %s, which cannot hold all texts: create it with ENCODING 'UTF8'", i.Encoding))
	}
	if i.SynchronousCommit == "off" {
		l.warn("database", "synchronous_commit is off: a crash of the database can lose tasks that were answered with 202")
	}
	l.schema(c, i)
}

func (l *checklist) schema(c *config.Config, i *postgres.Inspection) {
	if len(i.Lacks) > 0 || i.Elsewhere != "" {
		l.fail("rights", i.Err())
		return
	}
	migrates := "it may migrate"
	if !i.Owner {
		migrates = "it may not migrate, nor make history partitions: ended tasks are kept in the default one"
	}
	switch {
	case i.Pending == 0:
		l.ok("rights", fmt.Sprintf("role %q has what the service needs; %s", i.Role, migrates))
		l.ok("schema", fmt.Sprintf("version %d in schema %s, nothing to migrate", i.Version, i.Schema))
	case !i.Owner:
		l.fail("schema", fmt.Errorf("version %d, %d migrations to apply, and role %q may not: run \"orchestrator migrate\" with the role that owns the tables (or may CREATE in schema %q)", i.Version, i.Pending, i.Role, i.Schema))
	case !c.MigrateOnStart:
		l.fail("schema", fmt.Errorf("version %d, %d migrations to apply, and MIGRATE_ON_START is false: run \"orchestrator migrate\"", i.Version, i.Pending))
	default:
		l.ok("schema", fmt.Sprintf("version %d in schema %s, %d migrations to apply: the next start does", i.Version, i.Schema, i.Pending))
	}
	if len(i.Invalid) > 0 {
		l.warn("schema", "invalid indexes: "+strings.Join(i.Invalid, ", ")+": \"orchestrator migrate\" makes them anew")
	}
}
