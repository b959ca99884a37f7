package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/melodia/orchestrator/internal/config"
	"github.com/melodia/orchestrator/internal/deliver"
	"github.com/melodia/orchestrator/internal/dispatch"
	"github.com/melodia/orchestrator/internal/httpapi"
	"github.com/melodia/orchestrator/internal/httpserver"
	"github.com/melodia/orchestrator/internal/intake"
	"github.com/melodia/orchestrator/internal/task"
)

const (
	// exampleURL is the target in the examples of the OpenAPI document: a name
	// reserved for documentation (RFC 2606 §3).
	exampleURL = "https://example.com/plays"
	// defaultTimeout is the default of TASK_TIMEOUT.
	defaultTimeout = 30 * time.Second
	// dispatchTime is what the dispatcher gets after SHUTDOWN_GRACE: about a second for
	// its last writes and for signing off.
	dispatchTime = 1200 * time.Millisecond
)

// trial is what differs when the service is tried out by dev.
type trial struct {
	// exampleURL is the target in the examples of the OpenAPI document.
	exampleURL string
	// ready, if not nil, is called when the service has its database.
	ready func()
	// logTargets has the log name the target of each call.
	logTargets bool
}

// serve runs the service until ctx ends, then stops it in order: what it started last
// stops first. The caller closes listener; it may be closed already.
func serve(ctx context.Context, c *config.Config, listener net.Listener, log *slog.Logger, t trial) error {
	warnMisspelt(log)
	calls, err := deliverOptions(c)
	authenticator, authErr := newAuthenticator(c)
	if err := errors.Join(checkBasePath(c), err, authErr); err != nil {
		return err
	}
	if reason := shortSecret(c); reason != "" {
		log.Warn("a setting is weak", "reason", reason)
	}
	down := teardown{log: log}
	defer down.run() // if the start fails halfway

	down.push("authenticator", 0, func(context.Context) { authenticator.Close() })
	stopDebug, err := serveDebug(ctx, c.DebugPort, log)
	if err != nil {
		return err
	}
	down.push("profiles", 0, func(context.Context) { stopDebug() })
	deliverer := deliver.New(calls)
	down.push("deliverer", 0, func(context.Context) { deliverer.Close() })

	guard := httpserver.NewGuard(httpserver.Options{BasePath: c.BasePath, TrustedProxies: c.TrustedProxies, Authenticator: authenticator, Rate: c.RateLimit, Burst: c.RateBurst, NewID: newRequestID, Log: log})
	api := httpapi.New(httpapi.Options{
		Guard: guard, HideDocs: c.Docs == "off", ShowPayloads: c.ShowPayloads == "on",
		Defaults: c.Defaults(), Lease: c.LeaseDuration, Version: version, ExampleURL: t.exampleURL, Log: log,
	})
	opening := startOpening(ctx, c, log, api.Starting)
	down.push("database", 0, opening.close)

	// The service answers before it has its database: migrations may wait for hours, and
	// a probe that gets no answer would end the process in their midst.
	server := httpserver.NewServer(api, log)
	accepting := &acceptor{Listener: listener}
	connections := httpserver.Bound(accepting, maxConnections(c, log), log)
	served := make(chan error, 1)
	go func() { served <- connections.Serve(server) }()
	down.push("connections", 0, func(context.Context) { _ = server.Close() })
	// Requests are served until the dispatcher has stopped: a call may come back to our own /worker-endpoint.
	down.push("HTTP server", c.ShutdownGrace, func(ctx context.Context) {
		connections.Drain(ctx)
		_ = server.Shutdown(ctx)
	})

	select {
	case <-opening.done:
		err = opening.err
	case err = <-served:
		err = fmt.Errorf("serve HTTP: %w", err)
	}
	if err != nil {
		_ = server.Close() // no request can be answered but with 503
		if ctx.Err() != nil {
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
	submissions := intake.New(intake.Options{
		Store: store, Dispatcher: dispatcher, Policy: calls.Policy, Identity: calls.Credentials.Identity, Issuer: calls.Credentials.Issuer, Secrets: calls.Credentials.Secrets,
		Defaults: c.Defaults(), MaxHops: c.MaxHops, Completes: c.PublicURL != "", NewID: store.NewID,
	})
	api.Ready(store, dispatcher, submissions)
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

// newRequestID makes the ids of requests that the log has, by this machine's clock.
func newRequestID() task.ID { return task.NewID(time.Now(), rand.Uint64()) }

// acceptor tells the dispatcher when a caller's connection cannot be accepted for lack of
// descriptors, so that calls leave some to callers. net/http accepts again by itself.
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

// SyscallConn is part of syscall.Conn, by which [httpserver.Listener.Drain] looks for
// connections that wait to be accepted.
func (a *acceptor) SyscallConn() (syscall.RawConn, error) {
	if c, ok := a.Listener.(syscall.Conn); ok {
		return c.SyscallConn()
	}
	return nil, errors.ErrUnsupported
}

// listen takes the port. Commands call it before they set anything else up: that another
// process has the port is the likeliest mistake.
func listen(ctx context.Context, port int) (net.Listener, error) {
	var config net.ListenConfig
	listener, err := config.Listen(ctx, "tcp", ":"+strconv.Itoa(port))
	if err != nil {
		return nil, fmt.Errorf("PORT: %w", err)
	}
	return listener, nil
}
