package postgres

import (
	"context"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"

	"github.com/nomad-site/site/internal/reconcile/role"
	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/site"
)

// talkative makes a server log all that it can, in all the places where that can be said.
var talkative = []string{
	"log_statement=all", "log_min_duration_statement=0", "log_duration=on", "log_transaction_sample_rate=1",
	"debug_print_parse=on", "debug_print_rewritten=on", "debug_print_plan=on", "log_error_verbosity=verbose",
	"log_min_error_statement=debug5", "log_statement_stats=on",
	"shared_preload_libraries=pg_stat_statements", "pg_stat_statements.track=all", "pg_stat_statements.track_utility=on",
}

func TestNoPasswordAndNoVerifierReachesTheLogOfATalkativeServer(t *testing.T) {
	t.Parallel()
	s := start(t, talkative...)
	s.sql(t, "postgres", "CREATE EXTENSION pg_stat_statements SCHEMA public")
	s.sql(t, "postgres", "ALTER ROLE postgres SET log_statement = 'all'; ALTER ROLE postgres SET log_min_error_statement = 'debug5'")
	s.sql(t, "postgres", "ALTER DATABASE postgres SET log_min_duration_statement = 0")

	want := wanted()
	have, changes := s.diff(t, want)
	s.apply(t, want, have, changes)
	changed := want
	changed.Passwords = map[string]secret.Value{"shop": secret.New("another-horse-2"), "stats": secret.New(statsPassword)}
	later, changesLater := s.diff(t, changed)
	s.apply(t, changed, later, changesLater)

	// The plan of the empty server fails now, with verifiers in it.
	err := s.Apply(t.Context(), want, have, changes, quietProgress{})
	if err == nil || !strings.Contains(err.Error(), `create role backup: role "backup" already exists`) {
		t.Fatalf("got %v", err)
	}
	// And once where the statement with the verifier is the one that fails.
	only := want
	only.Roles = want.Roles[2:3]
	only.Grants, only.Databases = nil, nil
	err = s.Apply(t.Context(), only, role.Actual{}, role.Diff(only, role.Actual{}), quietProgress{})
	if err == nil || !strings.Contains(err.Error(), `create role shop: role "shop" already exists`) {
		t.Fatalf("got %v", err)
	}

	// A session of somebody else shows that the server does log.
	plainSession(t, s, "SELECT 'a known thing'")
	log := s.log(t)
	if strings.Count(log, "a known thing") < 2 {
		t.Fatalf("the server is not talkative:\n%s", log)
	}
	seen := s.sql(t, "postgres", "SELECT query FROM public.pg_stat_statements")
	if !strings.Contains(seen, "SELECT $1") {
		t.Errorf("pg_stat_statements has not seen the plain session: %s", seen)
	}
	shown := fmt.Sprintf("%v %+v", err, changes)
	for what, text := range map[string]string{"the log": log, "pg_stat_statements": seen, "what we show": shown} {
		for _, forbidden := range []string{shopPassword, statsPassword, "another-horse-2", "SCRAM-SHA-256$", "4096:"} {
			if strings.Contains(text, forbidden) {
				t.Errorf("%s holds %q:\n%s", what, forbidden, text)
			}
		}
	}
}

// TestAHundredRolesAreObservedInFewRoundTrips counts what a slow line would feel.
func TestAHundredRolesAreObservedInFewRoundTrips(t *testing.T) {
	t.Parallel()
	s := start(t)
	want := manyRoles(100)
	counted := &counter{}
	client := New(Options{Socket: s.socket(), Dial: counted.dial})
	have, err := client.Observe(t.Context(), want)
	if err != nil {
		t.Fatal(err)
	}
	changes := role.Diff(want, have)
	counted.reset()
	if err := client.Apply(t.Context(), want, have, changes, quietProgress{}); err != nil {
		t.Fatal(err)
	}
	// The roles, the database, and its privileges: each a connection and a message.
	if connections, trips := counted.reset(); connections != 3 || trips > 6 {
		t.Errorf("%d changes took %d connections and %d round trips", len(changes), connections, trips)
	}
	if have, err = client.Observe(t.Context(), want); err != nil {
		t.Fatal(err)
	}
	if connections, trips := counted.reset(); connections != 2 || trips > 4 {
		t.Errorf("observing took %d connections and %d round trips", connections, trips)
	}
	if left := role.Diff(want, have); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// manyRoles are roles of one database, each with a password.
func manyRoles(count int) role.Desired {
	want := role.Desired{
		Databases: []site.Database{{Name: "shop", Owner: "role00", ConnectionLimit: -1}},
		Passwords: map[string]secret.Value{},
	}
	for i := range count {
		name := fmt.Sprintf("role%02d", i)
		want.Roles = append(want.Roles, site.Role{Name: name, Login: true, ConnectionLimit: 5, Password: "shop." + name})
		want.Passwords[name] = secret.New("password-of-" + name)
		want.Grants = append(want.Grants, site.Grant{Role: name, Database: "shop", Object: site.OnDatabase, Privileges: []string{"CONNECT"}})
	}
	return want
}

// counter counts connections, and reads that wait for an answer to a write.
type counter struct {
	mutex              sync.Mutex
	connections, trips int
}

func (c *counter) dial(ctx context.Context, network, address string) (net.Conn, error) {
	connection, err := (&net.Dialer{}).DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	c.mutex.Lock()
	defer c.mutex.Unlock()
	c.connections++
	return &countedConn{Conn: connection, counter: c}, nil
}

func (c *counter) reset() (connections, trips int) {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	connections, trips = c.connections, c.trips
	c.connections, c.trips = 0, 0
	return connections, trips
}

type countedConn struct {
	net.Conn
	counter *counter
	wrote   bool
}

func (c *countedConn) Write(data []byte) (int, error) {
	c.counter.mutex.Lock()
	c.wrote = true
	c.counter.mutex.Unlock()
	return c.Conn.Write(data)
}

func (c *countedConn) Read(buffer []byte) (int, error) {
	c.counter.mutex.Lock()
	if c.wrote {
		c.wrote = false
		c.counter.trips++
	}
	c.counter.mutex.Unlock()
	return c.Conn.Read(buffer)
}

func TestHostileNamesAreOnlyNames(t *testing.T) {
	t.Parallel()
	s := start(t)
	evil := `x"; DROP DATABASE shop; --`
	want := role.Desired{
		Databases: []site.Database{{Name: "shop", Owner: evil, ConnectionLimit: -1}, {Name: `da'ta"base $1 \`, Owner: "Ünïcode ☃", ConnectionLimit: 7}},
		Roles: []site.Role{
			{Name: evil, Login: true, Password: "a.b", ConnectionLimit: -1, MemberOf: []string{"Ünïcode ☃"}},
			{Name: "Ünïcode ☃", ConnectionLimit: -1}, {Name: "a\nb\tc", ConnectionLimit: -1}, {Name: "SELECT", ConnectionLimit: -1},
		},
		Passwords: map[string]secret.Value{evil: secret.New(`'; DROP ROLE "SELECT"; --`)},
	}
	for _, database := range want.Databases {
		for _, one := range want.Roles {
			want.Grants = append(want.Grants,
				site.Grant{Role: one.Name, Database: database.Name, Object: site.OnDatabase, Privileges: []string{"CONNECT", "CREATE", "TEMPORARY"}},
				site.Grant{Role: one.Name, Database: database.Name, Schema: "public", Object: site.OnTables, Names: []string{"*"}, Privileges: []string{"SELECT"}, DefaultFor: evil},
				site.Grant{Role: one.Name, Database: database.Name, Schema: "public", Object: site.OnFunctions, Names: []string{"*"}, Privileges: []string{"EXECUTE"}, DefaultFor: evil},
			)
		}
	}
	s.converge(t, want)
	// What we run as the superuser must not find an owner's own operators.
	s.sql(t, "shop", `SET search_path = public;
		CREATE FUNCTION trap(oid, int) RETURNS bool LANGUAGE plpgsql AS 'BEGIN RAISE ''trapped''; END';
		CREATE OPERATOR public.= (LEFTARG = oid, RIGHTARG = int, FUNCTION = trap);
		CREATE OPERATOR public.>= (LEFTARG = oid, RIGHTARG = int, FUNCTION = trap)`)
	s.sql(t, "shop", `SET search_path = public; CREATE TABLE "t""; DROP TABLE u; --" ("c""" int); CREATE TABLE u (); CREATE TYPE "ty""pe" AS ENUM ();
		CREATE FUNCTION "f""(int)"("ty""pe", int) RETURNS int LANGUAGE sql AS 'SELECT 1';
		CREATE PROCEDURE "p"(int) LANGUAGE sql AS 'SELECT 1';
		CREATE AGGREGATE total(int) (SFUNC = int4pl, STYPE = int);
		GRANT INSERT ("c""") ON "t""; DROP TABLE u; --" TO "SELECT"; GRANT DELETE ON "t""; DROP TABLE u; --" TO "a
b	c"`)
	s.converge(t, want)
	have, _ := s.diff(t, want)
	undeclared := role.Undeclared(want, have)
	expect(t, "undeclared", undeclared,
		`delete grant "a\nb\tc" on table shop.public."t\"; DROP TABLE u; --" (nobody declares DELETE)`,
		`delete grant SELECT on column shop.public."t\"; DROP TABLE u; --"."c\"" (nobody declares INSERT)`)
	s.apply(t, want, have, undeclared)
	have, changes := s.diff(t, want)
	expect(t, "missing after the prune", changes)
	expect(t, "undeclared after the prune", role.Undeclared(want, have))
	if err := s.Login(t.Context(), s.address(), "shop", evil, want.Passwords[evil]); err != nil {
		t.Error(err)
	}
	everything := role.Desired{}
	have, _ = s.diff(t, everything)
	s.apply(t, everything, have, role.Undeclared(everything, have))
	have, _ = s.diff(t, everything)
	expect(t, "after everything was pruned", role.Undeclared(everything, have))
}
