// Package relay takes services of one host to the loopback of all others, by
// mutual TLS with the site's own certificates. A service has one name at both
// ends; what goes through is not looked at.
package relay

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/nomad-site/site/internal/plan"
)

// DefaultPort is where the first server is asked.
const DefaultPort = 7381

// protocolPrefix and a service's name are what ALPN (RFC 7301) agrees on.
const protocolPrefix = "site-relay/"

const (
	// openLimit bounds all that comes before the first byte of a service: the
	// connection, the handshake and the service's own connection.
	openLimit = 10 * time.Second
	// serviceLimit is the service's part of it: it is on the same host.
	serviceLimit = 5 * time.Second
	// maxConnections keeps a client that opens too many from starving the host.
	maxConnections = 1024
	// acceptPause is waited where the system has no descriptor left.
	acceptPause = 100 * time.Millisecond
)

// opened is what the serving end sends once the service is connected. Under TLS
// 1.3 a client's handshake ends before the server has judged its certificate:
// without this, refusal would look like a service that says nothing.
const opened = 1

var validName = regexp.MustCompile(`^[a-z][a-z0-9-]{0,62}$`)

// Service is one by its name, and where it is on this host's loopback: the real
// one where it is served, the relay's own address elsewhere.
type Service struct {
	Name    string
	Address netip.AddrPort
}

// ParseService reads NAME=ADDRESS. A host name could resolve to anything, so the
// address is one by number.
func ParseService(text string) (Service, error) {
	name, address, found := strings.Cut(text, "=")
	if !found || !validName.MatchString(name) {
		return Service{}, plan.WithHint(fmt.Errorf("relay %q: want a name and an address", text), "such as openbao=127.0.0.1:8200")
	}
	parsed, err := netip.ParseAddrPort(address)
	if err != nil || !parsed.Addr().Unmap().IsLoopback() || parsed.Addr().Zone() != "" {
		return Service{}, &NotLoopbackError{Service: name, Address: address}
	}
	return Service{Name: name, Address: parsed}, nil
}

// ParseServices reads several, each name once.
func ParseServices(texts []string) ([]Service, error) {
	var services []Service
	known := map[string]bool{}
	for _, text := range texts {
		service, err := ParseService(text)
		if err != nil {
			return nil, err
		}
		if known[service.Name] {
			return nil, fmt.Errorf("relay %q: %s is named twice", text, service.Name)
		}
		known[service.Name] = true
		services = append(services, service)
	}
	if len(services) == 0 {
		return nil, plan.WithHint(errors.New("relay: no service is named"), "such as openbao=127.0.0.1:8200")
	}
	return services, nil
}

// NotLoopbackError says that a service was to be where others could reach it, or
// is not on this host. Services have no wall but loopback.
type NotLoopbackError struct{ Service, Address string }

func (e *NotLoopbackError) Error() string {
	return fmt.Sprintf("refuse %s at %q: it is not a loopback address", e.Service, e.Address)
}

// Hint implements plan.Hinter.
func (e *NotLoopbackError) Hint() string { return "want an address and port such as 127.0.0.1:8200" }

// Common is what both ends are told.
type Common struct {
	Files Files
	Log   *slog.Logger
	// Notify tells the service manager about states ("READY=1"); may be nil.
	Notify func(state string) error
}

func (c Common) notify(state string) {
	if c.Notify == nil {
		return
	}
	if err := c.Notify(state); err != nil {
		c.Log.Warn("cannot notify the service manager", "state", state, "error", err)
	}
}

// keepAlive finds within a minute that the other host is gone, which would
// otherwise keep a connection to the service for ever.
func keepAlive() net.KeepAliveConfig {
	return net.KeepAliveConfig{Enable: true, Idle: 30 * time.Second, Interval: 10 * time.Second, Count: 3}
}

// listen binds an address.
func listen(ctx context.Context, address netip.AddrPort) (net.Listener, error) {
	config := net.ListenConfig{KeepAliveConfig: keepAlive()}
	listener, err := config.Listen(ctx, "tcp", address.String())
	if err != nil {
		return nil, fmt.Errorf("relay: %w", err)
	}
	return listener, nil
}

// accept gives each connection to handle, which ends it when ctx ends. Then the
// listener is closed, and accept returns when no connection is left.
func accept(ctx context.Context, listener net.Listener, states *states, handle func(context.Context, *net.TCPConn)) error {
	ctx, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = listener.Close() })
	defer stop()
	free := make(chan struct{}, maxConnections)
	what := "accepting at " + listener.Addr().String()
	states.expect(what)
	for {
		connection, err := listener.Accept()
		switch {
		case ctx.Err() != nil:
			if connection != nil {
				_ = connection.Close()
			}
			return nil
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("relay: %w", err)
		case err != nil:
			states.fails(what, err)
			select {
			case <-ctx.Done():
			case <-time.After(acceptPause):
			}
			continue
		}
		select {
		case free <- struct{}{}:
		default:
			states.fails(what, fmt.Errorf("%d connections are open", maxConnections))
			_ = connection.Close()
			continue
		}
		states.works(what)
		running.Go(func() {
			defer func() { <-free }()
			handle(ctx, connection.(*net.TCPConn))
		})
	}
}
