// Package serve is the loopback artifact server: read-only, over the host's
// content-addressed store, in two dialects. It is the one address of every
// artifact, whatever way the bytes came to the host.
package serve

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// The defaults of a host.
const (
	DefaultStore  = "/var/lib/site/store"
	DefaultListen = "127.0.0.1:7380"
)

const (
	// sendTimeout bounds one answer: a gigabyte to a slow reader on loopback.
	sendTimeout     = 15 * time.Minute
	shutdownTimeout = 10 * time.Second
)

// NotLoopbackError says that the server was asked to listen where others could
// reach it. The store has no access control: loopback is its only wall.
type NotLoopbackError struct{ Address string }

func (e *NotLoopbackError) Error() string {
	return fmt.Sprintf("refuse to listen on %q: it is not a loopback address", e.Address)
}

// Hint implements plan.Hinter.
func (e *NotLoopbackError) Hint() string { return "listen on " + DefaultListen }

// Options say what to serve and where.
type Options struct {
	Store   string
	Listen  string
	Version string
	// Operators is a JWKS file with the operators' public keys, which Nomad
	// reads at /operators.jwks; empty: none is served.
	Operators string
	Log       *slog.Logger
	// Notify tells the service manager about states ("READY=1"); may be nil.
	Notify func(state string) error
	// Puller gives what brings the artifacts that the store lacks. It is called for
	// each, and may fail for a while; nil: nothing does.
	Puller func() (Puller, error)
	// Refresh has the keys of the object store read anew; nil: there are none.
	Refresh func(context.Context) error
	// Collectors are metrics of what else runs in this process.
	Collectors []prometheus.Collector
}

// Server is a bound artifact server.
type Server struct {
	listener net.Listener
	http     *http.Server
	options  Options
}

// New binds the address; it refuses any but a loopback IP address and port.
func New(ctx context.Context, options Options) (*Server, error) {
	address, err := netip.ParseAddrPort(options.Listen)
	if err != nil || !address.Addr().Unmap().IsLoopback() || address.Addr().Zone() != "" {
		// A name could resolve to anything, so it counts as not loopback too.
		return nil, &NotLoopbackError{Address: options.Listen}
	}
	// A host that has received nothing yet may have no store: it serves nothing,
	// and whatever comes later without a restart.
	if info, err := os.Stat(options.Store); err == nil && !info.IsDir() {
		return nil, fmt.Errorf("serve the store: %s is not a folder", options.Store)
	}
	var config net.ListenConfig
	listener, err := config.Listen(ctx, "tcp", address.String())
	if err != nil {
		return nil, fmt.Errorf("serve the store: %w", err)
	}
	store := reader{root: options.Store}
	return &Server{
		listener: listener, options: options,
		http: &http.Server{
			Handler: &handler{
				store: store, verifier: newVerifier(store),
				metrics: newMetrics(options.Store, options.Version, options.Collectors...), log: options.Log, operators: options.Operators,
				puller: options.Puller, refresh: options.Refresh,
			},
			ReadHeaderTimeout: 5 * time.Second,
			ReadTimeout:       10 * time.Second,
			WriteTimeout:      sendTimeout,
			IdleTimeout:       time.Minute,
			MaxHeaderBytes:    8 << 10,
			ErrorLog:          slog.NewLogLogger(options.Log.Handler(), slog.LevelDebug),
		},
	}, nil
}

// Address is where the server listens.
func (s *Server) Address() string { return s.listener.Addr().String() }

// Run serves until ctx ends, then lets running answers finish for a while.
func (s *Server) Run(ctx context.Context) error {
	served := make(chan error, 1)
	go func() { served <- s.http.Serve(s.listener) }()
	s.notify("READY=1")
	s.options.Log.Info("serving artifacts", "address", s.Address(), "store", s.options.Store)
	select {
	case err := <-served:
		return fmt.Errorf("serve artifacts: %w", err)
	case <-ctx.Done():
	}
	s.notify("STOPPING=1")
	ctxShutdown, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownTimeout)
	defer cancel()
	err := s.http.Shutdown(ctxShutdown)
	if errors.Is(err, context.DeadlineExceeded) {
		s.options.Log.Warn("cut running downloads to stop in time")
		err = s.http.Close()
	}
	if serveErr := <-served; !errors.Is(serveErr, http.ErrServerClosed) {
		err = errors.Join(err, serveErr)
	}
	if err != nil {
		return fmt.Errorf("stop serving artifacts: %w", err)
	}
	return nil
}

func (s *Server) notify(state string) {
	if s.options.Notify == nil {
		return
	}
	if err := s.options.Notify(state); err != nil {
		s.options.Log.Warn("cannot notify the service manager", "state", state, "error", err)
	}
}

// SystemdNotify returns the function for Options.Notify that speaks the
// sd_notify protocol to socket, the value of NOTIFY_SOCKET; nil where it is empty.
func SystemdNotify(socket string) func(state string) error {
	if socket == "" {
		return nil
	}
	return func(state string) error {
		// Go takes a leading @ for an abstract socket, as systemd does.
		connection, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: socket, Net: "unixgram"})
		if err != nil {
			return fmt.Errorf("notify: %w", err)
		}
		_, err = connection.Write([]byte(state))
		return errors.Join(err, connection.Close())
	}
}
