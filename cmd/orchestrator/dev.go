package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"

	"github.com/melodia/orchestrator/internal/config"
	"github.com/melodia/orchestrator/internal/devdb"
	"github.com/melodia/orchestrator/internal/logging"
)

// echoPort is where the echo target of dev listens.
const echoPort = 8081

// devCommand runs the whole service with nothing set up: a private PostgreSQL
// that keeps its data, loopback targets allowed, and an echo target to call.
func devCommand(ctx context.Context, stdout, stderr io.Writer) error {
	c, err := config.Load()
	if err != nil {
		return err
	}
	if c.Auth == nil {
		c.Auth = []string{"none"} // it listens on loopback only
	}
	if os.Getenv("LOG_FORMAT") == "" {
		c.LogFormat = "text"
	}
	log, lines := logging.New(stdout, c.LogFormat, c.LogLevel)
	defer lines.Flush()
	listener, err := devListen(ctx, c.Port, stderr)
	if err != nil {
		return err
	}
	defer func() { _ = listener.Close() }()

	if c.DatabaseURL == "" {
		server, err := devdb.Start(ctx, devdb.Options{Log: log})
		if err != nil {
			return fmt.Errorf("start a private PostgreSQL: %w", err)
		}
		defer func() {
			if err := server.Stop(); err != nil {
				log.Error("the private PostgreSQL did not stop", "error", err)
			}
		}()
		c.DatabaseURL = server.URL("postgres")
	} else {
		log.Warn("using the database at DATABASE_URL instead of a private one")
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

	targetURL := "http://" + target.Addr().String() + "/plays"
	fmt.Fprint(lines, firstCalls("http://"+listener.Addr().String(), targetURL))
	return serve(ctx, c, listener, log, targetURL, nil)
}

// devListen takes the port, on loopback only: whoever reaches this instance can
// make it call anything on this machine. Where the usual port is in use, by a
// second dev for example, any other will do.
func devListen(ctx context.Context, port int, stderr io.Writer) (net.Listener, error) {
	listener, err := listenLoopback(ctx, port)
	if err == nil || os.Getenv("PORT") != "" {
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

// firstCalls is what to paste into another terminal.
func firstCalls(serviceURL, targetURL string) string {
	return strings.NewReplacer("SERVICE", serviceURL, "TARGET", targetURL).Replace(`
The Orchestrator is starting. Paste into another terminal:

  a call now:
    curl -i -w '\n' SERVICE/enqueue -H 'Content-Type: application/json' \
      -d '{"url":"TARGET","payload":{"song_id":42,"user_id":7}}'

  a call in five seconds:
    curl -i -w '\n' SERVICE/schedule -H 'Content-Type: application/json' \
      -d '{"url":"TARGET","delay_seconds":5,"payload":{"text":"Your mix is ready"}}'

  what became of it: GET SERVICE followed by the answer's Location
  all there is:      SERVICE/docs

The echo target answers 200, or what its path asks for (/status/503: watch the
retries); its calls appear below. End with Ctrl-C.

`)
}

// echoCommand runs the echo target alone, on PORT, for compose.yml and for trials.
func echoCommand(ctx context.Context, stdout, _ io.Writer) error {
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
