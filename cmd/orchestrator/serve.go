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
	// databaseWait is how long the database may be away at the start.
	databaseWait = 30 * time.Second
	// drainTime is what the last answers, and the pool, each get at the end.
	// With SHUTDOWN_GRACE, the dispatcher's last writes and the log's it stays
	// below the 10 s after which Cloud Run kills.
	drainTime = 200 * time.Millisecond
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

// serve runs the service until ctx ends, then stops it in order.
func serve(ctx context.Context, c *config.Config, listener net.Listener, log *slog.Logger, t trial) error {
	warnMisspelt(log)
	calls, err := deliverOptions(c)
	if err != nil {
		_ = listener.Close()
		return err
	}
	callers, err := newCallers(c)
	if err != nil {
		_ = listener.Close()
		return err
	}
	defer callers.Close()
	stopDebug, err := serveDebug(ctx, c.DebugPort, log)
	if err != nil {
		_ = listener.Close()
		return err
	}
	defer stopDebug()

	// It answers before it has its database: migrations may wait for hours, and a
	// probe that gets no answer would end the process in their midst.
	api := httpapi.New(httpapi.Options{
		Policy: calls.Policy, Identity: calls.Credentials.Identity, Secrets: calls.Credentials.Secrets,
		Callers: callers, Rate: c.RateLimit, Burst: c.RateBurst, HideDocs: c.Docs == "off", ShowPayloads: c.ShowPayloads == "on",
		Defaults: c.Defaults(), Lease: c.LeaseDuration, MaxHops: c.MaxHops, NewID: newLocalID, Version: version, ExampleURL: t.exampleURL, Log: log,
	})
	server := api.Server()
	served := make(chan error, 1)
	accepting := &acceptor{Listener: listener}
	connections := httpserver.Bound(accepting, maxConnections(c, log), log)
	go func() { served <- connections.Serve(server) }()
	defer func() { _ = server.Close() }()

	opening, stopOpening := context.WithCancel(ctx)
	defer stopOpening()
	opened := make(chan openedStore, 1)
	go func() {
		store, err := openStore(opening, c, log, api.Starting)
		opened <- openedStore{store, err}
	}()
	var o openedStore
	select {
	case o = <-opened:
	case err := <-served:
		stopOpening()
		if o = <-opened; o.store != nil {
			o.store.Close()
		}
		return fmt.Errorf("serve HTTP: %w", err)
	}
	if o.err != nil {
		if ctx.Err() != nil { // as it was told to
			log.Info("stopped before the database was ready")
			return nil
		}
		return o.err
	}
	store := o.store
	deliverer := deliver.New(calls)
	options := dispatchOptions(c, store, log)
	options.LogTargets = t.logTargets
	dispatcher := dispatch.New(options, store, deliverer)
	accepting.dispatcher.Store(dispatcher)
	dispatching, stopDispatching := context.WithCancel(ctx)
	defer stopDispatching()
	dispatched := make(chan struct{})
	go func() {
		defer close(dispatched)
		dispatcher.Run(dispatching)
	}()
	api.Ready(store, dispatcher, store.NewID)
	log.Info("serving", "address", listener.Addr().String(), "version", version)
	if t.ready != nil {
		t.ready()
	}

	var failure error
	select {
	case <-ctx.Done():
	case failure = <-served:
		failure = fmt.Errorf("serve HTTP: %w", failure)
	}
	log.Info("stopping")
	graceEnds := time.Now().Add(c.ShutdownGrace)
	stopDispatching()
	// Requests are served meanwhile: a call may come back to our own /worker-endpoint.
	<-dispatched
	within(max(time.Until(graceEnds), drainTime), func(ctx context.Context) { _ = server.Shutdown(ctx) })
	_ = server.Close()
	within(drainTime, func(context.Context) { store.Close() })
	deliverer.Close()
	log.Info("stopped")
	return failure
}

// openedStore is how opening the store ended.
type openedStore struct {
	store *postgres.Store
	err   error
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
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil || limit.Cur > uint64(c.MaxConnections+others) {
		return c.MaxConnections
	}
	fit := max(int(limit.Cur)-others, int(limit.Cur)/4)
	log.Warn("the process may open too few files for MAX_CONNECTIONS, so that fewer callers can be connected: raise ulimit -n or lower MAX_CONNECTIONS",
		"max_connections", min(fit, c.MaxConnections), "open_files", limit.Cur, "needed", c.MaxConnections+others)
	return min(fit, c.MaxConnections)
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

// within runs f and waits for it, but not for longer than limit.
func within(limit time.Duration, f func(context.Context)) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	done := make(chan struct{})
	go func() {
		defer close(done)
		f(ctx)
	}()
	select {
	case <-done:
	case <-ctx.Done():
	}
	cancel()
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

// openStore migrates the database if it is to, and connects. It waits for a
// database that is just starting, and says for what: to starting, at once, and to the log.
func openStore(ctx context.Context, c *config.Config, log *slog.Logger, starting func(reason string)) (*postgres.Store, error) {
	patience := time.NewTimer(databaseWait) // a migration may take longer
	defer patience.Stop()
	for {
		store, err := tryOpen(ctx, c, log, starting)
		if !errors.Is(err, task.ErrUnavailable) {
			return store, err
		}
		starting("the database is not ready: the log says why")
		if ctx.Err() == nil {
			log.Warn("the database is not there yet, trying again", "error", err)
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("stopped while waiting for the database: %w", err)
		case <-patience.C:
			return nil, fmt.Errorf("gave up after %s: %w", databaseWait, err)
		case <-time.After(time.Second):
		}
	}
}

func tryOpen(ctx context.Context, c *config.Config, log *slog.Logger, starting func(reason string)) (*postgres.Store, error) {
	if c.MigrateOnStart {
		applied, err := postgres.Migrate(ctx, c.DatabaseURL, observeMigrations(log, starting))
		if err != nil {
			return nil, err
		}
		if applied > 0 {
			log.Info("migrated the database", "applied", applied)
		}
	}
	return postgres.Open(ctx, postgres.Options{
		URL: c.DatabaseURL, MaxConns: c.DatabaseMaxConns, Callbacks: c.Defaults(), IdempotencyWindow: c.IdempotencyWindow,
	})
}

// waitingInterval is how often the log says what migrations wait for.
const waitingInterval = 10 * time.Second

// observeMigrations has the log say what migrations wait for: at once, when that
// changes, and every 10 s.
func observeMigrations(log *slog.Logger, starting func(reason string)) postgres.MigrationObserver {
	var last string
	var logged time.Time
	return postgres.MigrationObserver{
		Waiting: func(reason string) {
			if reason == "" {
				return
			}
			starting(reason)
			if reason == last && time.Since(logged) < waitingInterval {
				return
			}
			last, logged = reason, time.Now()
			log.Warn("migrating the database", "reason", reason)
		},
		Rebuilt: func(index string) { log.Info("made an invalid index anew", "index", index) },
	}
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
