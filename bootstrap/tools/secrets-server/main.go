//go:build ignore

// The secrets-server speaks the OpenBao API for labs and tests: Vault's own
// core (MPL-2.0, the release line that OpenBao forked from) with the few
// plugins that site uses. It takes the configuration file and the command line
// of `bao server`, so that either can be put in the other's place.
//
// This file lies in the tree of another module and is built by its name.
package main

import (
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"time"

	hclog "github.com/hashicorp/go-hclog"
	jwt "github.com/hashicorp/vault-plugin-auth-jwt"
	kv "github.com/hashicorp/vault-plugin-secrets-kv"
	"github.com/hashicorp/vault/audit"
	auditfile "github.com/hashicorp/vault/builtin/audit/file"
	"github.com/hashicorp/vault/command/server"
	vaulthttp "github.com/hashicorp/vault/http"
	"github.com/hashicorp/vault/internalshared/configutil"
	"github.com/hashicorp/vault/physical/raft"
	"github.com/hashicorp/vault/sdk/helper/consts"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/hashicorp/vault/sdk/physical"
	"github.com/hashicorp/vault/sdk/physical/file"
	"github.com/hashicorp/vault/vault"
)

// version is that of Vault's core; the folder's tool.mod pins the same.
const version = "1.14.1"

const (
	shutdownLimit = 15 * time.Second
	headerLimit   = 10 * time.Second
	idleLimit     = 5 * time.Minute
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	// Once stopping has begun, a second signal ends the process at once.
	context.AfterFunc(ctx, stop)
	err := run(ctx, os.Args[1:], os.Stderr)
	switch {
	case errors.Is(err, flag.ErrHelp):
	case err != nil:
		fmt.Fprintf(os.Stderr, "error: %v\n", err)
		os.Exit(1)
	}
}

type options struct {
	config, data, listen, storage, logLevel string
	version                                 bool
}

func parse(arguments []string, usage io.Writer) (options, error) {
	if len(arguments) > 0 && arguments[0] == "version" {
		return options{version: true}, nil
	}
	if len(arguments) > 0 && arguments[0] == "server" {
		arguments = arguments[1:] // as `bao server` is called
	}
	var opts options
	flags := flag.NewFlagSet("secrets-server", flag.ContinueOnError)
	flags.SetOutput(usage)
	flags.StringVar(&opts.config, "config", "", "configuration `file` in the format of bao server (HCL)")
	flags.StringVar(&opts.data, "data", "", "`folder` of the storage, without a configuration file")
	flags.StringVar(&opts.listen, "listen", "127.0.0.1:8200", "`address` to listen on, without a configuration file")
	flags.StringVar(&opts.storage, "storage", "file", "file or raft, without a configuration file")
	flags.StringVar(&opts.logLevel, "log-level", "", "trace, debug, info, warn or error (default info)")
	flags.BoolVar(&opts.version, "version", false, "print the version")
	if err := flags.Parse(arguments); err != nil {
		return options{}, err
	}
	switch {
	case flags.NArg() > 0:
		return options{}, fmt.Errorf("unexpected argument %q", flags.Arg(0))
	case opts.version:
	case (opts.config == "") == (opts.data == ""):
		return options{}, errors.New("want either -config FILE or -data FOLDER")
	}
	return opts, nil
}

// load gives the configuration, from the file or from flags.
func (o options) load() (*server.Config, error) {
	if o.config == "" {
		configuration := server.NewConfig()
		configuration.SharedConfig = &configutil.SharedConfig{
			Listeners: []*configutil.Listener{{Type: "tcp", Address: o.listen, TLSDisable: true}},
		}
		settings := map[string]string{"path": o.data}
		if o.storage == "raft" {
			settings["node_id"] = "secrets-server"
		}
		configuration.Storage = &server.Storage{Type: o.storage, Config: settings}
		return configuration, nil
	}
	configuration, err := server.LoadConfig(o.config)
	if err != nil {
		return nil, fmt.Errorf("read configuration %s: %w", o.config, err)
	}
	return configuration, check(configuration)
}

// check refuses what this server cannot do rather than to leave it out.
func check(configuration *server.Config) error {
	var problems []error
	if configuration.Storage == nil {
		problems = append(problems, errors.New("it has no storage block"))
	}
	if len(configuration.Listeners) == 0 {
		problems = append(problems, errors.New("it has no listener block"))
	}
	for _, listener := range configuration.Listeners {
		if listener.Type != "tcp" {
			problems = append(problems, fmt.Errorf("listener %q: only tcp is built in", listener.Type))
		}
		if !listener.TLSDisable && (listener.TLSCertFile == "" || listener.TLSKeyFile == "") {
			problems = append(problems, fmt.Errorf("listener on %s: want tls_cert_file and tls_key_file, or tls_disable", listener.Address))
		}
	}
	for _, seal := range configuration.Seals {
		if seal.Type != "shamir" && !seal.Disabled {
			problems = append(problems, fmt.Errorf("seal %q: only shamir is built in", seal.Type))
		}
	}
	return errors.Join(problems...)
}

func run(ctx context.Context, arguments []string, logs io.Writer) error {
	opts, err := parse(arguments, logs)
	if err != nil {
		return err
	}
	if opts.version {
		fmt.Println("secrets-server v" + version)
		return nil
	}
	configuration, err := opts.load()
	if err != nil {
		return err
	}
	level := opts.logLevel
	if level == "" {
		level = configuration.LogLevel
	}
	if level == "" {
		level = "info"
	}
	logger := hclog.New(&hclog.LoggerOptions{Level: hclog.LevelFromString(level), Output: logs})

	var listeners []*listener
	defer func() {
		for _, bound := range listeners {
			_ = bound.socket.Close()
		}
	}()
	for _, settings := range configuration.Listeners {
		bound, err := bind(settings)
		if err != nil {
			return err
		}
		listeners = append(listeners, bound)
	}
	core, err := newCore(configuration, listeners[0], logger)
	if err != nil {
		return err
	}
	return serve(ctx, core, listeners, logger)
}

// listener is one bound address.
type listener struct {
	settings *configutil.Listener
	socket   net.Listener
	// pair is the certificate, read again on SIGHUP.
	pair atomic.Pointer[tls.Certificate]
}

func bind(settings *configutil.Listener) (*listener, error) {
	address := settings.Address
	if address == "" {
		address = "127.0.0.1:8200"
	}
	bound := &listener{settings: settings}
	if err := bound.loadPair(); err != nil {
		return nil, err
	}
	socket, err := net.Listen("tcp", address)
	if err != nil {
		return nil, err
	}
	bound.socket = socket
	if !settings.TLSDisable {
		bound.socket = tls.NewListener(socket, &tls.Config{
			MinVersion: tls.VersionTLS12,
			NextProtos: []string{"h2", "http/1.1"},
			GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
				return bound.pair.Load(), nil
			},
		})
	}
	return bound, nil
}

func (l *listener) loadPair() error {
	if l.settings.TLSDisable {
		return nil
	}
	pair, err := tls.LoadX509KeyPair(l.settings.TLSCertFile, l.settings.TLSKeyFile)
	if err != nil {
		return fmt.Errorf("read the certificate of the listener: %w", err)
	}
	l.pair.Store(&pair)
	return nil
}

func (l *listener) url() string {
	if l.settings.TLSDisable {
		return "http://" + l.socket.Addr().String()
	}
	return "https://" + l.socket.Addr().String()
}

func newCore(configuration *server.Config, first *listener, logger hclog.Logger) (*vault.Core, error) {
	settings := &vault.CoreConfig{
		RawConfig:          configuration,
		Logger:             logger,
		StorageType:        configuration.Storage.Type,
		DisableMlock:       true, // pages of a lab's server need not be locked
		RedirectAddr:       firstOf(configuration.APIAddr, configuration.Storage.RedirectAddr, first.url()),
		DefaultLeaseTTL:    configuration.DefaultLeaseTTL,
		MaxLeaseTTL:        configuration.MaxLeaseTTL,
		LogicalBackends:    map[string]logical.Factory{"kv": kv.Factory},
		CredentialBackends: map[string]logical.Factory{"jwt": jwt.Factory},
		AuditBackends:      map[string]audit.Factory{"file": auditfile.Factory},
		BuiltinRegistry:    registry{},
	}
	var err error
	switch kind := configuration.Storage.Type; kind {
	case "file":
		// No cluster address: with one and no cluster listener, unsealing fails.
		settings.Physical, err = file.NewFileBackend(configuration.Storage.Config, logger.Named("storage.file"))
	case "raft":
		settings.ClusterAddr = firstOf(configuration.ClusterAddr, configuration.Storage.ClusterAddr, "https://127.0.0.1:8201")
		if err = os.MkdirAll(filepath.Clean(configuration.Storage.Config["path"]), 0o700); err != nil {
			break
		}
		settings.Physical, err = raft.NewRaftBackend(configuration.Storage.Config, logger.Named("storage.raft"))
		if err == nil {
			settings.HAPhysical, _ = settings.Physical.(physical.HABackend)
		}
	default:
		err = fmt.Errorf("storage %q: only file and raft are built in", kind)
	}
	if err != nil {
		return nil, fmt.Errorf("open the storage: %w", err)
	}
	core, err := vault.NewCore(settings)
	if err != nil {
		return nil, fmt.Errorf("start the core: %w", err)
	}
	if settings.ClusterAddr != "" {
		address, err := clusterListener(first.settings, settings.ClusterAddr)
		if err != nil {
			return nil, errors.Join(err, core.Shutdown())
		}
		core.SetClusterListenerAddrs([]*net.TCPAddr{address})
		core.SetClusterHandler(vaulthttp.Handler.Handler(&vault.HandlerProperties{Core: core, ListenerConfig: first.settings}))
	}
	return core, nil
}

// clusterListener is where raft's peers reach this server.
func clusterListener(settings *configutil.Listener, clusterAddress string) (*net.TCPAddr, error) {
	address := settings.ClusterAddress
	if address == "" {
		parsed, err := url.Parse(clusterAddress)
		if err != nil {
			return nil, fmt.Errorf("cluster address: %w", err)
		}
		address = parsed.Host
	}
	resolved, err := net.ResolveTCPAddr("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("cluster address: %w", err)
	}
	return resolved, nil
}

func firstOf(choices ...string) string {
	for _, choice := range choices {
		if choice != "" {
			return choice
		}
	}
	return ""
}

// serve answers until ctx ends, then lets requests finish and seals.
func serve(ctx context.Context, core *vault.Core, listeners []*listener, logger hclog.Logger) error {
	reload := make(chan os.Signal, 1)
	signal.Notify(reload, syscall.SIGHUP)
	defer signal.Stop(reload)

	failed := make(chan error, len(listeners))
	var servers []*http.Server
	for _, bound := range listeners {
		answering := &http.Server{
			Handler:           vaulthttp.Handler.Handler(&vault.HandlerProperties{Core: core, ListenerConfig: bound.settings}),
			ReadHeaderTimeout: headerLimit,
			IdleTimeout:       idleLimit,
			ErrorLog:          logger.Named("http").StandardLogger(nil),
		}
		servers = append(servers, answering)
		logger.Info("listening", "address", bound.url())
		go func() { failed <- answering.Serve(bound.socket) }()
	}
	var err error
	for running := true; running; {
		select {
		case <-ctx.Done():
			running = false
		case err = <-failed:
			running = false
		case <-reload:
			for _, bound := range listeners {
				if err := bound.loadPair(); err != nil {
					logger.Error("reload", "error", err)
				}
			}
		}
	}
	logger.Info("stopping")
	limited, cancel := context.WithTimeout(context.Background(), shutdownLimit)
	defer cancel()
	for _, answering := range servers {
		err = errors.Join(err, answering.Shutdown(limited))
	}
	return errors.Join(err, core.Shutdown())
}

// registry tells the core which plugins are built in; without one, mounting panics.
type registry struct{}

func (registry) factory(name string, kind consts.PluginType) logical.Factory {
	switch {
	case name == "kv" && kind == consts.PluginTypeSecrets:
		return kv.Factory
	case name == "jwt" && kind == consts.PluginTypeCredential:
		return jwt.Factory
	}
	return nil
}

func (r registry) Contains(name string, kind consts.PluginType) bool {
	return r.factory(name, kind) != nil
}

func (r registry) Get(name string, kind consts.PluginType) (func() (interface{}, error), bool) {
	factory := r.factory(name, kind)
	if factory == nil {
		return nil, false
	}
	return func() (interface{}, error) { return factory, nil }, true
}

func (registry) Keys(kind consts.PluginType) []string {
	switch kind {
	case consts.PluginTypeSecrets:
		return []string{"kv"}
	case consts.PluginTypeCredential:
		return []string{"jwt"}
	}
	return nil
}

func (r registry) DeprecationStatus(name string, kind consts.PluginType) (consts.DeprecationStatus, bool) {
	return consts.Supported, r.factory(name, kind) != nil
}

func (registry) IsBuiltinEntPlugin(string, consts.PluginType) bool { return false }
