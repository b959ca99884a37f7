package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/melodia/orchestrator/internal/auth"
	"github.com/melodia/orchestrator/internal/config"
	"github.com/melodia/orchestrator/internal/credentials"
	"github.com/melodia/orchestrator/internal/deliver"
	"github.com/melodia/orchestrator/internal/dispatch"
	"github.com/melodia/orchestrator/internal/httpapi"
	"github.com/melodia/orchestrator/internal/httpserver"
	"github.com/melodia/orchestrator/internal/postgres"
	targets "github.com/melodia/orchestrator/internal/target" // the tests have a type of that name
	"github.com/melodia/orchestrator/internal/task"
)

const (
	// exampleURL is the target in the examples of the OpenAPI document: a name
	// reserved for documentation (RFC 2606 §3).
	exampleURL     = "https://example.com/plays"
	defaultTimeout = 30 * time.Second
	// dispatchTime is what the dispatcher gets after SHUTDOWN_GRACE: about a second for
	// its last writes and for signing off.
	dispatchTime = 1200 * time.Millisecond
)

// trial is what differs when the service is tried out by dev.
type trial struct {
	// exampleURL is the target in the examples of the OpenAPI document.
	exampleURL string
	// ready is called when the service has its database; nil: nothing is.
	ready func()
	// logTargets has the log say where calls went.
	logTargets bool
}

// serve runs the service until ctx ends, then stops it in order. The listener is closed
// where it began to serve; the caller closes it otherwise.
func serve(ctx context.Context, c *config.Config, listener net.Listener, log *slog.Logger, t trial) error {
	warnMisspelt(log)
	calls, err := deliverOptions(c)
	if err != nil {
		return err
	}
	down := teardown{log: log}
	defer down.run() // where the start fails halfway

	callers, err := newCallers(c)
	if err != nil {
		return err
	}
	down.push("callers", 0, func(context.Context) { callers.Close() })
	stopDebug, err := serveDebug(ctx, c.DebugPort, log)
	if err != nil {
		return err
	}
	down.push("profiles", 0, func(context.Context) { stopDebug() })
	deliverer := deliver.New(calls)
	down.push("deliverer", 0, func(context.Context) { deliverer.Close() })

	api := httpapi.New(httpapi.Options{
		Policy: calls.Policy, Identity: calls.Credentials.Identity, Secrets: calls.Credentials.Secrets,
		Callers: callers, Rate: c.RateLimit, Burst: c.RateBurst, HideDocs: c.Docs == "off", ShowPayloads: c.ShowPayloads == "on",
		Defaults: c.Defaults(), Lease: c.LeaseDuration, MaxHops: c.MaxHops, NewID: newLocalID, Version: version, ExampleURL: t.exampleURL, Log: log,
	})
	opening := startOpening(ctx, c, log, api.Starting)
	down.push("database", 0, opening.close)

	// The service answers before it has its database: migrations may wait for hours, and
	// a probe that gets no answer would end the process in their midst.
	server := api.Server()
	accepting := &acceptor{Listener: listener}
	connections := httpserver.Bound(accepting, maxConnections(c, log), log)
	served := make(chan error, 1)
	go func() { served <- connections.Serve(server) }()
	down.push("connections", 0, func(context.Context) { _ = server.Close() })
	// Requests are served until the dispatcher has stopped: a call may come back to our own /worker-endpoint.
	down.push("HTTP server", c.ShutdownGrace, func(ctx context.Context) { _ = server.Shutdown(ctx) })

	select {
	case <-opening.done:
		err = opening.err
	case err = <-served:
		err = fmt.Errorf("serve HTTP: %w", err)
	}
	if err != nil {
		_ = server.Close()    // no request can be answered but with 503
		if ctx.Err() != nil { // as it was told to
			log.Info("stopped before the database was ready")
			return nil
		}
		return err
	}
	store := opening.store
	options := dispatchOptions(c, store, log)
	options.LogTargets = t.logTargets
	dispatcher := dispatch.New(options, store, deliverer)
	accepting.dispatcher.Store(dispatcher)
	dispatching, stopDispatching := context.WithCancel(ctx)
	dispatched := make(chan struct{})
	go func() {
		defer close(dispatched)
		dispatcher.Run(dispatching)
	}()
	down.push("dispatcher", c.ShutdownGrace+dispatchTime, func(context.Context) {
		stopDispatching()
		<-dispatched
	})
	api.Ready(store, dispatcher, store.NewID)
	log.Info("serving", "address", listener.Addr().String(), "version", version)
	if t.ready != nil {
		t.ready()
	}

	select {
	case <-ctx.Done():
	case err = <-served:
		err = fmt.Errorf("serve HTTP: %w", err)
	}
	log.Info("stopping")
	down.run()
	log.Info("stopped")
	return err
}

// warnMisspelt names what is in the environment and nearly a setting.
func warnMisspelt(log *slog.Logger) {
	misspelt := config.MisspeltHere()
	for _, name := range slices.Sorted(maps.Keys(misspelt)) {
		log.Warn("there is no such setting, and it changes nothing", "name", name, "did_you_mean", misspelt[name])
	}
}

// newLocalID makes ids of problems while there is no store whose clock counts.
func newLocalID() task.ID { return task.NewID(time.Now(), rand.Uint64()) }

// newCallers reads what the settings say about callers.
func newCallers(c *config.Config) (*auth.Authenticator, error) {
	return auth.New(auth.Options{
		Ways: c.Auth, APIKeys: c.APIKeys, OIDCIssuer: c.OIDCIssuer, OIDCAudience: c.OIDCAudience, OIDCAllow: c.OIDCAllow,
		OnCloudRun: c.CloudRunService != "", Scopes: httpapi.Scopes(),
	})
}

// maxConnections returns how many callers may be connected: what the settings say,
// or less where the process may not have so many descriptors.
func maxConnections(c *config.Config, log *slog.Logger) int {
	// Each call has a connection, and looks up a name at most; the rest is for the
	// log, the profiles, and whatever libraries open.
	others := 2*c.DispatchConcurrency + c.DatabaseMaxConns + 100
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return c.MaxConnections
	}
	fit := connectionsWithin(limit.Cur, c.MaxConnections, others)
	if fit < c.MaxConnections {
		log.Warn("the process may open too few files for MAX_CONNECTIONS, so that fewer callers can be connected: raise ulimit -n or lower MAX_CONNECTIONS",
			"max_connections", fit, "open_files", limit.Cur, "needed", c.MaxConnections+others)
	}
	return fit
}

// connectionsWithin returns how many of the wanted connections a limit of descriptors
// leaves room for beside others: a quarter of the limit at least.
func connectionsWithin(limit uint64, wanted, others int) int {
	if limit >= uint64(wanted+others) { //nolint:gosec // neither is negative
		return wanted
	}
	fit := max(int(limit)-others, int(limit)/4, 1) //nolint:gosec // it is less than their sum
	return min(fit, wanted)
}

// acceptor tells where connections of callers cannot be accepted for lack of descriptors, so
// that calls leave some to them. net/http tries again by itself.
type acceptor struct {
	net.Listener

	dispatcher atomic.Pointer[dispatch.Dispatcher] // nil at the start
}

func (a *acceptor) Accept() (net.Conn, error) {
	conn, err := a.Listener.Accept()
	if errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) {
		if d := a.dispatcher.Load(); d != nil {
			d.Lacks(task.ShortageDescriptors)
		}
	}
	return conn, err
}

// deliverOptions reads what the settings say about calls.
func deliverOptions(c *config.Config) (deliver.Options, error) {
	o := deliver.Options{Version: version, Concurrency: c.DispatchConcurrency}
	var err error
	if o.Policy, err = targets.NewPolicy(c.TargetAllowHosts, c.TargetAllowNetworks, c.TargetRequireHTTPS); err != nil {
		return o, fmt.Errorf("TARGET_ALLOW_HOSTS: %w", err)
	}
	if o.Credentials.Identity, err = credentials.NewIdentity(c.OIDCTargetHosts); err != nil {
		return o, fmt.Errorf("OIDC_TARGET_HOSTS: %w", err)
	}
	if o.Credentials.Signer, err = credentials.NewSigner(c.SigningSecrets); err != nil {
		return o, fmt.Errorf("SIGNING_SECRETS: %w", err)
	}
	if o.Credentials.Secrets, err = credentials.NewSecrets(c.SecretsDir, c.SecretHosts); err != nil {
		return o, fmt.Errorf("SECRET_HOSTS: %w", err)
	}
	return o, nil
}

func dispatchOptions(c *config.Config, store *postgres.Store, log *slog.Logger) dispatch.Options {
	name, err := os.Hostname()
	if err != nil {
		name = "unknown host"
	}
	o := dispatch.Options{
		Name:         name + " " + version,
		PollInterval: c.PollInterval,
		Lease:        c.LeaseDuration,
		Grace:        c.ShutdownGrace,
		Retention:    c.Retention,
		NewID:        store.NewID,
		Log:          log,
	}
	if c.Dispatch {
		o.Concurrency = c.DispatchConcurrency
	}
	return o
}

// listen takes the port before anything else is set up: that it is taken
// already is the likeliest mistake.
func listen(ctx context.Context, port int) (net.Listener, error) {
	var config net.ListenConfig
	listener, err := config.Listen(ctx, "tcp", ":"+strconv.Itoa(port))
	if err != nil {
		return nil, fmt.Errorf("PORT: %w", err)
	}
	return listener, nil
}
