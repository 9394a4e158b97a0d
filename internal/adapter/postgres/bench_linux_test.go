package postgres

import (
	"context"
	"fmt"
	"net"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/nomad-site/site/internal/reconcile/role"
)

// roundTrip is that of the connection under measurement, such as to a host in
// the same country.
const roundTrip = 20 * time.Millisecond

// BenchmarkSecondReconcile looks at 100 roles that are as they should be: as site
// does it, and as a plain loop that asks for each role and tries its password.
// The first must find nothing to write.
func BenchmarkSecondReconcile(b *testing.B) {
	s := start(b)
	want := manyRoles(100)
	s.converge(b, want)
	const versions = "SELECT string_agg(xmin::text, ',' ORDER BY oid) FROM pg_authid"
	before := s.sql(b, "postgres", versions)
	counted := &counter{}
	client := New(Options{Socket: s.socket(), Dial: counted.far})
	for name, look := range map[string]func(context.Context) error{
		"site": func(ctx context.Context) error {
			have, err := client.Observe(ctx, want)
			if err != nil {
				return err
			}
			if changes := role.Diff(want, have); len(changes) > 0 {
				return fmt.Errorf("not converged: %v", changes)
			}
			return nil
		},
		"one by one": func(ctx context.Context) error {
			config, err := pgx.ParseConfig("host=" + s.folder + " user=postgres dbname=postgres")
			if err != nil {
				return err
			}
			config.Port = uint16(s.port)
			config.DialFunc = counted.far
			connection, err := pgx.ConnectConfig(ctx, config)
			if err != nil {
				return err
			}
			defer func() { _ = connection.Close(ctx) }()
			for _, one := range want.Roles {
				var login bool
				var limit int
				row := connection.QueryRow(ctx, "SELECT rolcanlogin, rolconnlimit FROM pg_roles WHERE rolname = $1", one.Name)
				if err := row.Scan(&login, &limit); err != nil {
					return err
				}
				var connects bool
				row = connection.QueryRow(ctx, "SELECT has_database_privilege($1, 'shop', 'CONNECT')", one.Name)
				if err := row.Scan(&connects); err != nil {
					return err
				}
				if err := client.Login(ctx, s.address(), "shop", one.Name, want.Passwords[one.Name]); err != nil {
					return err
				}
			}
			return nil
		},
	} {
		b.Run(name, func(b *testing.B) {
			counted.reset()
			for b.Loop() {
				if err := look(b.Context()); err != nil {
					b.Fatal(err)
				}
			}
			connections, trips := counted.reset()
			b.ReportMetric(float64(connections)/float64(b.N), "connections/op")
			b.ReportMetric(float64(trips)/float64(b.N), "roundtrips/op")
		})
	}
	if after := s.sql(b, "postgres", versions); after != before {
		b.Error("looking wrote a role")
	}
}

// far dials as if the server were a round trip away.
func (c *counter) far(ctx context.Context, network, address string) (net.Conn, error) {
	connection, err := c.dial(ctx, network, address)
	if err != nil {
		return nil, err
	}
	return farConnection{connection}, nil
}

type farConnection struct{ net.Conn }

func (c farConnection) Write(content []byte) (int, error) {
	<-time.After(roundTrip) // the answer is that much later
	return c.Conn.Write(content)
}
