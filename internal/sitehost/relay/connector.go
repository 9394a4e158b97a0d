package relay

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/nomad-site/site/internal/plan"
)

// ConnectorOptions say where services are wanted, and where they are.
type ConnectorOptions struct {
	Common
	// To is the server's private address and port, ServerName the name of its
	// host: no other host of the site can pass for it.
	To, ServerName string
	// Locals are where services are to be on this host.
	Locals []Service
}

// Connector is the end where services are wanted.
type Connector struct {
	options    ConnectorOptions
	listeners  map[string]net.Listener
	identities *identities
	states     *states
}

// NewConnector binds all local addresses. The server need not be up.
func NewConnector(ctx context.Context, options ConnectorOptions) (*Connector, error) {
	if _, err := netip.ParseAddrPort(options.To); err != nil {
		return nil, plan.WithHint(fmt.Errorf("relay to %q: not an address and port", options.To), "such as 10.0.0.1:%d", DefaultPort)
	}
	if options.ServerName == "" {
		return nil, plan.WithHint(errors.New("relay: the server has no name"), "give --server-name, which its certificate must have")
	}
	connector := &Connector{options: options, states: newStates(options.Log), listeners: map[string]net.Listener{}}
	var err error
	if connector.identities, err = newIdentities(options.Files, connector.states); err != nil {
		return nil, err
	}
	for _, local := range options.Locals {
		if !local.Address.Addr().Unmap().IsLoopback() {
			err = &NotLoopbackError{Service: local.Name, Address: local.Address.String()}
		} else {
			connector.listeners[local.Name], err = listen(ctx, local.Address)
		}
		if err != nil {
			delete(connector.listeners, local.Name)
			connector.close()
			return nil, err
		}
	}
	return connector, nil
}

func (c *Connector) close() {
	for _, listener := range c.listeners {
		_ = listener.Close()
	}
}

// Address is where a service is on this host.
func (c *Connector) Address(service string) string { return c.listeners[service].Addr().String() }

// Run relays until ctx ends, which ends all connections too.
func (c *Connector) Run(ctx context.Context) error {
	c.options.notify("READY=1")
	group, ctx := errgroup.WithContext(ctx)
	for name, listener := range c.listeners {
		c.options.Log.Info("relaying from this host", "service", name, "address", listener.Addr().String(), "to", c.options.To)
		group.Go(func() error {
			return accept(ctx, listener, c.states, func(ctx context.Context, plain *net.TCPConn) { c.handle(ctx, name, plain) })
		})
	}
	err := group.Wait()
	c.options.notify("STOPPING=1")
	return err
}

func (c *Connector) handle(ctx context.Context, service string, plain *net.TCPConn) {
	far, err := c.open(ctx, service)
	if err != nil {
		if ctx.Err() == nil {
			c.states.fails("service "+service, err)
		}
		cut(plain, nil)
		return
	}
	c.states.works("service " + service)
	splice(ctx, plain, far)
}

// open ends with a connection to the service itself.
func (c *Connector) open(ctx context.Context, service string) (*tls.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, openLimit)
	defer cancel()
	dialer := net.Dialer{KeepAliveConfig: keepAlive()}
	plain, err := dialer.DialContext(ctx, "tcp", c.options.To)
	if err != nil {
		return nil, err
	}
	now := c.identities.now()
	connection := tls.Client(&wire{TCPConn: plain.(*net.TCPConn)}, &tls.Config{
		MinVersion: tls.VersionTLS13, ServerName: c.options.ServerName, RootCAs: now.authorities,
		NextProtos: []string{protocolPrefix + service},
		// Given whatever CA the server asks for, so that it can say what is wrong with it.
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &now.certificate, nil },
	})
	if err := connection.HandshakeContext(ctx); err != nil {
		_ = plain.Close()
		return nil, err
	}
	if err := c.awaitOpened(ctx, connection); err != nil {
		_ = plain.Close()
		return nil, err
	}
	return connection, nil
}

// awaitOpened ends when the server has accepted this host, and reached the service.
func (c *Connector) awaitOpened(ctx context.Context, connection *tls.Conn) error {
	deadline, _ := ctx.Deadline()
	if err := connection.SetReadDeadline(deadline); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = connection.NetConn().Close() })
	defer stop()
	var said [1]byte
	_, err := io.ReadFull(connection, said[:])
	switch {
	case errors.Is(err, io.EOF):
		return fmt.Errorf("%s cannot reach the service", c.options.ServerName)
	case err != nil:
		return err
	case said[0] != opened:
		return fmt.Errorf("%s speaks another protocol", c.options.ServerName)
	}
	return connection.SetReadDeadline(time.Time{})
}
