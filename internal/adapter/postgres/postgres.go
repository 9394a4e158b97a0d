// Package postgres talks to a site's Postgres over its Unix socket: it waits
// for it, reads roles, databases and privileges, and changes them.
package postgres

import (
	"context"
	"net"
)

// The defaults of Options.
const (
	DefaultSocket = "/run/postgresql/.s.PGSQL.5432"
	DefaultUser   = "postgres"
	// clusterDatabase is where what belongs to no database is read and changed.
	clusterDatabase = "postgres"
)

// Options say how to reach the server.
type Options struct {
	// Dial opens each connection, such as through SSH; nil dials directly. It
	// is asked for ("unix", Socket), and by Login for ("tcp", address).
	Dial func(ctx context.Context, network, addr string) (net.Conn, error)
	// Socket as seen from where Dial ends. Default DefaultSocket.
	Socket string
	// User is the superuser that the peer map gives us. Default DefaultUser.
	User string
}

// Client reaches one server. It is safe for concurrent use; its connections
// live as long as a call.
type Client struct{ options Options }

// New makes a client; it connects to nothing yet. Environment variables such
// as PGHOST, PGPASSWORD and PGSERVICE do not matter.
func New(options Options) *Client {
	if options.Dial == nil {
		options.Dial = (&net.Dialer{}).DialContext
	}
	if options.Socket == "" {
		options.Socket = DefaultSocket
	}
	if options.User == "" {
		options.User = DefaultUser
	}
	return &Client{options: options}
}
