package devdb

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	embeddedpostgres "github.com/fergusstrange/embedded-postgres"
)

const (
	fetchedVersion = embeddedpostgres.V17
	fetchTimeout   = 5 * time.Minute
)

// fetch returns the PostgreSQL in dir that an earlier call fetched, or fetches it.
func (m machine) fetch(ctx context.Context, dir string, as account, log *slog.Logger) (installation, error) {
	home := filepath.Join(dir, "postgresql-"+string(fetchedVersion))
	if pg, ok := inspect(ctx, filepath.Join(home, "bin"), as); ok {
		return pg, nil
	}
	log.InfoContext(ctx, "no postgresql found, fetching one", "version", string(fetchedVersion), "from", m.repository)

	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	partial, err := os.MkdirTemp(dir, "fetch-")
	if err != nil {
		return installation{}, err
	}
	defer func() { _ = os.RemoveAll(partial) }()
	if err := os.Chmod(partial, 0o755); err != nil {
		return installation{}, err
	}
	if err := fetchInto(ctx, partial, m.repository); err != nil {
		return installation{}, fmt.Errorf("get it from %s: %w", m.repository, err)
	}
	// Where another process was faster, its result will do.
	if err := os.Rename(partial, home); err != nil && !errors.Is(err, fs.ErrExist) {
		return installation{}, err
	}
	pg, ok := inspect(ctx, filepath.Join(home, "bin"), as)
	if !ok {
		return installation{}, fmt.Errorf("what came from %s does not run on this machine", m.repository)
	}
	return pg, nil
}

// fetchInto downloads PostgreSQL from repository and unpacks it in dir.
func fetchInto(ctx context.Context, dir, repository string) error {
	near, failed, stop, err := relay(ctx, repository)
	if err != nil {
		return err
	}
	defer stop()
	// The library knows only how to start a server, and tries that as root too.
	// A folder below a file, which cannot be made, stops it once it has
	// unpacked everything.
	err = embeddedpostgres.NewDatabase(embeddedpostgres.DefaultConfig().
		Version(fetchedVersion).
		BinaryRepositoryURL(near).
		CachePath(dir).
		BinariesPath(dir).
		RuntimePath(filepath.Join(dir, "bin", "postgres", "none")).
		Port(0).
		Logger(io.Discard)).
		Start()
	if err == nil || strings.HasPrefix(err.Error(), "unable to create runtime directory") {
		return nil
	}
	select {
	case cause := <-failed:
		return cause
	default:
		return err
	}
}

// relay serves the content of repository on a loopback URL until stop is
// called or ctx ends. The library's own requests would end with neither.
// failed holds the first error in reaching repository.
func relay(ctx context.Context, repository string) (near string, failed <-chan error, stop func(), err error) {
	target, err := url.Parse(repository)
	if err != nil {
		return "", nil, nil, err
	}
	listener, err := net.Listen("tcp", net.JoinHostPort(loopback, "0"))
	if err != nil {
		return "", nil, nil, err
	}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	failures := make(chan error, 1)
	server := &http.Server{
		BaseContext: func(net.Listener) context.Context { return ctx },
		Handler: &httputil.ReverseProxy{
			Rewrite:   func(r *httputil.ProxyRequest) { r.SetURL(target) },
			Transport: transport,
			ErrorHandler: func(w http.ResponseWriter, _ *http.Request, err error) {
				select {
				case failures <- err:
				default:
				}
				w.WriteHeader(http.StatusBadGateway)
			},
			ErrorLog: slog.NewLogLogger(slog.DiscardHandler, 0),
		},
		ErrorLog: slog.NewLogLogger(slog.DiscardHandler, 0),
	}
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = server.Serve(listener)
	}()
	return "http://" + listener.Addr().String(), failures, func() {
		_ = server.Close()
		<-served
		transport.CloseIdleConnections()
	}, nil
}
