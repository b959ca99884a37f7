package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/melodia/orchestrator/internal/auth"
	"github.com/melodia/orchestrator/internal/config"
	"github.com/melodia/orchestrator/internal/devdb"
	"github.com/melodia/orchestrator/internal/httpapi"
	"github.com/melodia/orchestrator/internal/logging"
)

// echoPort is where the echo target of dev listens.
const echoPort = 8081

// devCommand runs the whole service with nothing set up: a private PostgreSQL
// that keeps its data, loopback targets allowed, and an echo target to call.
func devCommand(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	began := time.Now()
	flags := flag.NewFlagSet("dev", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	port := flags.Int("port", -1, "")
	fresh := flags.Bool("fresh", false, "")
	if err := flags.Parse(args); err != nil {
		return fmt.Errorf("%w: %s", errUsage, flagMistake(err))
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("%w: dev takes nothing but --port and --fresh", errUsage)
	}
	c, err := config.Load()
	if err != nil {
		return err
	}
	fixed := os.Getenv("PORT") != ""
	if *port != -1 {
		if *port < 0 || *port > 65535 {
			return errors.New("--port must be between 0 and 65535; 0 takes any free port")
		}
		c.Port, fixed = *port, true
	}
	if *fresh && c.DatabaseURL != "" {
		return errors.New("--fresh empties dev's own PostgreSQL, and the settings name another (DATABASE_URL or DATABASE_HOST is set): remove one of them")
	}
	authorization, err := devAuth(c)
	if err != nil {
		return err
	}
	log, lines := devLog(c, stdout)
	defer lines.Flush()
	listener, err := devListen(ctx, c.Port, fixed, stderr)
	if err != nil {
		return err
	}
	defer func() { _ = listener.Close() }()
	if c.PublicURL == "" {
		c.PublicURL = "http://" + listener.Addr().String()
	}
	data := "in the database of the settings, instead of a private one"
	if c.DatabaseURL == "" {
		server, err := devdb.Start(ctx, devdb.Options{Log: log, Fresh: *fresh})
		if err != nil {
			return fmt.Errorf("start a private PostgreSQL: %w", err)
		}
		defer func() {
			if err := server.Stop(); err != nil {
				log.Error("the private PostgreSQL did not stop", "error", err)
			}
		}()
		c.DatabaseURL = server.URL("postgres")
		data = server.Folder() + " (kept; --fresh begins with an empty one)"
	}
	c.TargetAllowNetworks = append(c.TargetAllowNetworks,
		netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("::1/128"))
	// The same port each time where it can be: tasks of the last run may wait for it.
	target, err := listenLoopback(ctx, echoPort)
	if err != nil {
		target, err = listenLoopback(ctx, 0)
	}
	if err != nil {
		return err
	}
	echoing := serveEcho(target, log)
	defer echoing()
	targetURL := "http://" + target.Addr().String()
	return serve(ctx, c, listener, log, trial{exampleURL: targetURL + "/plays", logTargets: true, ready: func() {
		fmt.Fprint(lines, strings.NewReplacer(
			"TOOK", time.Since(began).Round(time.Millisecond).String(), "SERVICE", "http://"+listener.Addr().String(),
			"TARGET", targetURL, "DATA", data, "KEY", authorization.export, "AUTH", authorization.argument,
		).Replace(readyText))
	}})
}

// flagMistake says which flag is wrong. The texts of package flag hold the value too.
func flagMistake(err error) string {
	if name, ok := strings.CutPrefix(err.Error(), "flag provided but not defined: -"); ok {
		return "dev has no flag --" + name
	}
	return "--port takes a whole number, and --fresh takes nothing"
}

// devLog returns dev's log. Without LOG_FORMAT it has short lines on a terminal, and
// text elsewhere.
func devLog(c *config.Config, stdout io.Writer) (*slog.Logger, *logging.DroppingWriter) {
	if os.Getenv("LOG_FORMAT") == "" {
		c.LogFormat = "text"
	}
	log, lines := logging.New(stdout, c.LogFormat, c.LogLevel)
	if os.Getenv("LOG_FORMAT") == "" && isTerminal(stdout) {
		log = slog.New(&console{w: lines, color: wantsColor(os.Getenv), level: c.LogLevel})
	}
	return log, lines
}

// authorization is what the commands to paste need where AUTH is set: a line that sets
// ORCHESTRATOR_KEY, and an argument for curl.
type authorization struct{ export, argument string }

// devAuth returns what callers need to prove who they are. If AUTH wants keys and
// API_KEYS has none, it makes a key for this run. Of a key in API_KEYS only the hash is
// known, so that its owner has to fill it in.
func devAuth(c *config.Config) (a authorization, err error) {
	if c.Auth == nil {
		c.Auth = []string{"none"} // it listens on loopback only
	}
	if !authNames(c, "api_key") && !authNames(c, "oidc") && !authNames(c, "jwt") {
		return a, nil
	}
	a.argument = ` -H "Authorization: Bearer $ORCHESTRATOR_KEY"`
	if !slices.Contains(c.Auth, "api_key") || len(c.APIKeys) > 0 {
		a.export = "\n  your key first, since AUTH is set:\n    export ORCHESTRATOR_KEY=…\n"
		return a, nil
	}
	key, entry, err := auth.NewKey("dev", strings.Join(httpapi.Scopes(), "+"), httpapi.Scopes())
	if err != nil {
		return a, err
	}
	c.APIKeys = []string{entry}
	a.export = "\n  the key of this run first, since AUTH is set:\n    export ORCHESTRATOR_KEY=" + key + "\n"
	return a, nil
}

// devListen takes the port on loopback only: a caller of this instance can have it call
// anything on this machine. If the port is in use (by a second dev, for example) and not
// fixed, it takes any free one.
func devListen(ctx context.Context, port int, fixed bool, stderr io.Writer) (net.Listener, error) {
	listener, err := listenLoopback(ctx, port)
	if err == nil || fixed {
		return listener, err
	}
	fmt.Fprintf(stderr, "orchestrator: port %d is in use, taking another\n", port)
	return listenLoopback(ctx, 0)
}

func listenLoopback(ctx context.Context, port int) (net.Listener, error) {
	var lc net.ListenConfig
	listener, err := lc.Listen(ctx, "tcp", fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		return nil, fmt.Errorf("PORT: %w", err)
	}
	return listener, nil
}

// readyText ends the start: where everything is, and what to paste into another terminal.
const readyText = `
Ready in TOOK.
  service      SERVICE
  try it out   SERVICE/docs
  echo target  TARGET (also /status/503, /delay/2, /fail/2: twice 503, then 200)
  data         DATA

Paste into another terminal:
KEY
  a call now:
    curl -i -w '\n' SERVICE/enqueueAUTH -H 'Content-Type: application/json' \
      -d '{"url":"TARGET/plays","payload":{"song_id":42,"user_id":7}}'

  a call in five seconds:
    curl -i -w '\n' SERVICE/scheduleAUTH -H 'Content-Type: application/json' \
      -d '{"url":"TARGET/plays","delay_seconds":5,"payload":{"text":"Your mix is ready"}}'

  its result: GET SERVICE followed by the answer's Location

Calls appear below. End with Ctrl-C.

`

// echoCommand runs the echo target alone, on PORT, for compose.yml and for trials.
func echoCommand(ctx context.Context, stdout io.Writer) error {
	c, err := config.Load()
	if err != nil {
		return err
	}
	listener, err := listen(ctx, c.Port)
	if err != nil {
		return err
	}
	log, lines := logging.New(stdout, c.LogFormat, c.LogLevel)
	defer lines.Flush()
	log.Info("echoing", "address", listener.Addr().String())
	stop := serveEcho(listener, log)
	<-ctx.Done()
	stop()
	return nil
}
