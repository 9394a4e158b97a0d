package relay

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/nomad-site/site/internal/plan"
)

// ServerOptions say what is served and where.
type ServerOptions struct {
	Common
	// Listen is the host's private address and port.
	Listen string
	// Targets are the services of this host.
	Targets []Service
}

// Server is the end where the services are.
type Server struct {
	options    ServerOptions
	listener   net.Listener
	identities *identities
	states     *states
	protocols  []string
	targets    map[string]Service
}

// NewServer binds the address. It refuses one that stands for all of the host's:
// strangers need not even see that there is something.
func NewServer(ctx context.Context, options ServerOptions) (*Server, error) {
	address, err := netip.ParseAddrPort(options.Listen)
	if err != nil || address.Addr().IsUnspecified() || address.Addr().IsMulticast() {
		return nil, plan.WithHint(fmt.Errorf("refuse to listen on %q: it is not one address of this host", options.Listen),
			"want the host's private address and a port, such as 10.0.0.1:%d", DefaultPort)
	}
	server := &Server{options: options, states: newStates(options.Log), targets: map[string]Service{}}
	for _, target := range options.Targets {
		server.protocols = append(server.protocols, protocolPrefix+target.Name)
		server.targets[target.Name] = target
	}
	if server.identities, err = newIdentities(options.Files, server.states); err != nil {
		return nil, err
	}
	if server.listener, err = listen(ctx, address); err != nil {
		return nil, err
	}
	return server, nil
}

// Address is where the server listens.
func (s *Server) Address() string { return s.listener.Addr().String() }

// Run serves until ctx ends, which ends all connections too.
func (s *Server) Run(ctx context.Context) error {
	s.options.notify("READY=1")
	s.options.Log.Info("relaying to this host's services", "address", s.Address(), "services", strings.Join(s.protocols, " "))
	err := accept(ctx, s.listener, s.states, s.handle)
	s.options.notify("STOPPING=1")
	return err
}

func (s *Server) handle(ctx context.Context, plain *net.TCPConn) {
	connection := tls.Server(&wire{TCPConn: plain}, &tls.Config{MinVersion: tls.VersionTLS13, GetConfigForClient: s.config})
	client := "client " + address(plain.RemoteAddr())
	service, err := s.admit(ctx, connection)
	if err != nil {
		if ctx.Err() == nil {
			s.states.fails(client, err)
		}
		_ = plain.Close() // an alert said why
		return
	}
	s.states.works(client, "certificate", connection.ConnectionState().PeerCertificates[0].Subject.CommonName)

	target, err := s.open(ctx, connection, service)
	if err != nil {
		if ctx.Err() == nil {
			s.states.fails("service "+service.Name, err)
		}
		_ = connection.Close()
		return
	}
	s.states.works("service " + service.Name)
	splice(ctx, target, connection)
}

// config holds for one handshake.
func (s *Server) config(*tls.ClientHelloInfo) (*tls.Config, error) {
	now := s.identities.now()
	return &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{now.certificate},
		ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: now.authorities, NextProtos: s.protocols,
		// Who comes back is judged anew.
		SessionTicketsDisabled: true,
	}, nil
}

// admit ends with a client of this site that has named a service.
func (s *Server) admit(ctx context.Context, connection *tls.Conn) (Service, error) {
	ctx, cancel := context.WithTimeout(ctx, openLimit)
	defer cancel()
	if err := connection.HandshakeContext(ctx); err != nil {
		return Service{}, err
	}
	name, _ := strings.CutPrefix(connection.ConnectionState().NegotiatedProtocol, protocolPrefix)
	service, known := s.targets[name]
	if !known { // a client that names none at all: any other was refused by TLS
		return Service{}, errors.New("it names no service")
	}
	return service, nil
}

// open connects to the service, and tells the client so.
func (s *Server) open(ctx context.Context, client *tls.Conn, service Service) (*net.TCPConn, error) {
	dialer := net.Dialer{Timeout: serviceLimit}
	connection, err := dialer.DialContext(ctx, "tcp", service.Address.String())
	if err != nil {
		return nil, err
	}
	err = errors.Join(client.SetWriteDeadline(time.Now().Add(serviceLimit)), write(client, opened), client.SetWriteDeadline(time.Time{}))
	if err != nil {
		_ = connection.Close()
		return nil, fmt.Errorf("tell the client: %w", err)
	}
	return connection.(*net.TCPConn), nil
}

func write(connection net.Conn, what byte) error {
	_, err := connection.Write([]byte{what})
	return err
}

// address is one without its port.
func address(of net.Addr) string {
	if parsed, err := netip.ParseAddrPort(of.String()); err == nil {
		return parsed.Addr().Unmap().String()
	}
	return of.String()
}
