package postgres

import (
	"slices"
	"strings"
	"testing"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/reconcile/role"
	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/site"
)

const (
	shopPassword  = "correct-horse-1"
	statsPassword = `it's "quoted" \ $tuff`
)

func wanted() role.Desired {
	return role.Desired{
		Databases: []site.Database{{Name: "shop", Owner: "shop", ConnectionLimit: 50}, {Name: "stats", Owner: "stats", ConnectionLimit: -1}},
		Roles: []site.Role{
			{Name: "backup", Login: true, Replication: true, Peers: []string{"backup"}, ConnectionLimit: 2},
			{Name: "readers", ConnectionLimit: -1},
			{Name: "shop", Login: true, Password: "shop.password", ConnectionLimit: 20},
			{Name: "stats", Login: true, Password: "stats.password", ConnectionLimit: -1, MemberOf: []string{"readers", "pg_read_all_stats"}},
		},
		Grants: []site.Grant{
			{Role: "readers", Database: "shop", Object: site.OnDatabase, Privileges: []string{"CONNECT"}},
			{Role: "stats", Database: "shop", Object: site.OnDatabase, Privileges: []string{"TEMPORARY"}},
			{Role: "readers", Database: "shop", Schema: "public", Object: site.OnSchema, Privileges: []string{"USAGE"}},
			{Role: "shop", Database: "shop", Schema: "public", Object: site.OnSchema, Privileges: []string{"CREATE", "USAGE"}},
			{Role: "readers", Database: "shop", Schema: "public", Object: site.OnTables, Names: []string{"*"}, Privileges: []string{"SELECT"}, DefaultFor: "shop"},
			{Role: "readers", Database: "shop", Schema: "public", Object: site.OnSequences, Names: []string{"*"}, Privileges: []string{"SELECT", "USAGE"}, DefaultFor: "shop"},
			{Role: "stats", Database: "shop", Schema: "public", Object: site.OnTables, Names: []string{"orders"}, Privileges: []string{"INSERT", "UPDATE"}},
			{Role: "stats", Database: "shop", Schema: "public", Object: site.OnFunctions, Names: []string{"total(int)"}, Privileges: []string{"EXECUTE"}},
		},
		Passwords: map[string]secret.Value{"shop": secret.New(shopPassword), "stats": secret.New(statsPassword)},
	}
}

// migration is what an application makes of its database.
const migration = `SET ROLE shop; SET search_path = public;
CREATE TABLE orders (id bigserial PRIMARY KEY, total int);
CREATE TABLE "od""d; DROP TABLE orders; --" (id int);
CREATE FUNCTION total(since int) RETURNS int LANGUAGE sql AS 'SELECT 1';
REVOKE EXECUTE ON FUNCTION total(int) FROM PUBLIC;
GRANT SELECT (id) ON orders TO shop;
RESET ROLE;`

func (s *server) diff(t testing.TB, want role.Desired) (role.Actual, []plan.Change) {
	t.Helper()
	have, err := s.Observe(t.Context(), want)
	if err != nil {
		t.Fatal(err)
	}
	return have, role.Diff(want, have)
}

func (s *server) apply(t testing.TB, want role.Desired, have role.Actual, changes []plan.Change) {
	t.Helper()
	if err := s.Apply(t.Context(), want, have, changes, quietProgress{}); err != nil {
		t.Fatal(err)
	}
}

// converge makes it as wanted, and proves that it is.
func (s *server) converge(t testing.TB, want role.Desired) {
	t.Helper()
	have, changes := s.diff(t, want)
	s.apply(t, want, have, changes)
	if _, left := s.diff(t, want); len(left) > 0 {
		t.Fatalf("still different after apply: %v", left)
	}
}

// catalog is everything that a reconcile may touch. With versions it shows rows
// that were rewritten too, and the verifiers.
func (s *server) catalog(t testing.TB, versions bool) string {
	t.Helper()
	version, password := "''", "rolpassword IS NULL"
	if versions {
		version, password = "xmin", "rolpassword"
	}
	list := func(acl string) string {
		return "(SELECT string_agg(e::text, ' ' ORDER BY e::text) FROM unnest(" + acl + ") AS e)"
	}
	all := []string{
		s.sql(t, "postgres", "SELECT rolname, rolsuper, rolinherit, rolcreaterole, rolcreatedb, rolcanlogin, rolreplication, rolbypassrls, rolconnlimit, coalesce(nullif(rolvaliduntil, 'infinity')::text, ''), "+password+", "+version+" FROM pg_authid ORDER BY 1"),
		s.sql(t, "postgres", "SELECT datname, pg_get_userbyid(datdba), datconnlimit, "+list("datacl")+", "+version+" FROM pg_database ORDER BY 1"),
		s.sql(t, "postgres", "SELECT pg_get_userbyid(roleid), pg_get_userbyid(member), admin_option, "+version+" FROM pg_auth_members ORDER BY 1, 2"),
	}
	for _, database := range []string{"shop", "stats"} {
		all = append(all,
			s.sql(t, database, "SELECT nspname, "+list("nspacl")+", "+version+" FROM pg_namespace ORDER BY 1"),
			s.sql(t, database, "SELECT relname, "+list("relacl")+", "+version+" FROM pg_class WHERE oid >= 16384 ORDER BY 1"),
			s.sql(t, database, "SELECT proname, "+list("proacl")+", "+version+" FROM pg_proc WHERE oid >= 16384 ORDER BY 1"),
			s.sql(t, database, "SELECT attname, "+list("attacl")+", "+version+" FROM pg_attribute WHERE attrelid >= 16384 ORDER BY attrelid, attnum"),
			s.sql(t, database, "SELECT pg_get_userbyid(defaclrole), defaclnamespace, defaclobjtype, "+list("defaclacl")+", "+version+" FROM pg_default_acl ORDER BY 1, 2, 3"),
		)
	}
	return strings.Join(all, "\n\n")
}

func lines(changes []plan.Change) []string {
	var lines []string
	for _, change := range changes {
		lines = append(lines, change.String())
	}
	return lines
}

func expect(t *testing.T, what string, changes []plan.Change, want ...string) {
	t.Helper()
	if got := lines(changes); !slices.Equal(got, want) {
		t.Errorf("%s:\n\t%s\nwant\n\t%s", what, strings.Join(got, "\n\t"), strings.Join(want, "\n\t"))
	}
}

func TestEverythingIsMadeOnceAndTheSecondRunWritesNothing(t *testing.T) {
	t.Parallel()
	s := start(t)
	want := wanted()
	have, changes := s.diff(t, want)
	expect(t, "on an empty server", changes,
		"create role backup (no such role)",
		"create role readers (no such role)",
		"create role shop (no such role)",
		"create role stats (no such role)",
		"create role membership stats in readers (not a member)",
		"create role membership stats in pg_read_all_stats (not a member)",
		"create database shop (no such database)",
		"create database stats (no such database)",
		"create grant readers on database shop (missing CONNECT)",
		"create grant stats on database shop (missing TEMPORARY)",
		"create grant readers on schema shop.public (missing USAGE)",
		"create grant shop on schema shop.public (missing CREATE, USAGE)",
		"create default privilege readers on tables that shop creates in schema shop.public (missing SELECT)",
		"create default privilege readers on sequences that shop creates in schema shop.public (missing SELECT, USAGE)",
	)
	if waiting := role.Waiting(want, have); !slices.Equal(waiting, []string{"function shop.public.total(integer)", "table shop.public.orders"}) {
		t.Errorf("waiting for %q", waiting)
	}
	s.apply(t, want, have, changes)
	have, changes = s.diff(t, want)
	expect(t, "at once afterwards", changes)
	expect(t, "undeclared at once afterwards", role.Undeclared(want, have))

	s.sql(t, "shop", migration)
	have, changes = s.diff(t, want)
	expect(t, "after the first migration", changes,
		"create grant stats on table shop.public.orders (missing INSERT, UPDATE)",
		"create grant stats on function shop.public.total(integer) (missing EXECUTE)",
	)
	expect(t, "undeclared after the first migration", role.Undeclared(want, have))
	s.apply(t, want, have, changes)

	before := s.catalog(t, true)
	have, changes = s.diff(t, want)
	expect(t, "in the end", changes)
	expect(t, "undeclared in the end", role.Undeclared(want, have))
	s.apply(t, want, have, changes)
	if after := s.catalog(t, true); after != before {
		t.Errorf("a run without changes wrote: before\n%s\nafter\n%s", before, after)
	}
	for _, login := range []struct {
		database, user string
		password       string
	}{{"shop", "shop", shopPassword}, {"stats", "stats", statsPassword}, {"shop", "stats", statsPassword}} {
		if err := s.Login(t.Context(), s.address(), login.database, login.user, secret.New(login.password)); err != nil {
			t.Error(err)
		}
	}
}

func TestWhatIsBrokenByHandIsFoundAndRepairedExactly(t *testing.T) {
	t.Parallel()
	s := start(t)
	want := wanted()
	s.converge(t, want)
	s.sql(t, "shop", migration)
	s.converge(t, want)
	intact := s.catalog(t, false)

	for _, test := range []struct {
		name, database, sql string
		changes             []string
	}{
		{"a role is dropped", "shop", "DROP OWNED BY readers; DROP ROLE readers", []string{
			"create role readers (no such role)",
			"create role membership stats in readers (not a member)",
			"create grant readers on database shop (missing CONNECT)",
			"create grant readers on schema shop.public (missing USAGE)",
			"create default privilege readers on tables that shop creates in schema shop.public (missing SELECT)",
			`create grant readers on table shop.public."od\"d; DROP TABLE orders; --" (missing SELECT)`,
			"create grant readers on table shop.public.orders (missing SELECT)",
			"create default privilege readers on sequences that shop creates in schema shop.public (missing SELECT, USAGE)",
			"create grant readers on sequence shop.public.orders_id_seq (missing SELECT, USAGE)",
		}},
		{"the owner of a database is changed", "postgres", "ALTER DATABASE shop OWNER TO stats", []string{
			"update database shop (owner: stats → shop)",
			// What the owner of the moment was granted becomes the next one's.
			"create grant stats on database shop (missing TEMPORARY)",
		}},
		{"a password is changed", "postgres", "ALTER ROLE shop PASSWORD 'another'", []string{"update role password shop (password differs)"}},
		{"a password is changed in a server that stores MD5", "postgres", "SET password_encryption = md5; ALTER ROLE shop PASSWORD '" + shopPassword + "'", []string{"update role password shop (the password is not stored as SCRAM-SHA-256)"}},
		{"a password is removed", "postgres", "ALTER ROLE stats PASSWORD NULL", []string{"update role password stats (it has no password)"}},
		{"a role without a declared password gets one", "postgres", "ALTER ROLE backup PASSWORD 'door'", []string{"update role password backup (it has a password that nobody declares)"}},
		{"a grant on a database is revoked", "postgres", "REVOKE CONNECT ON DATABASE shop FROM readers", []string{"create grant readers on database shop (missing CONNECT)"}},
		{"a grant on a schema is revoked", "shop", "REVOKE USAGE ON SCHEMA public FROM readers", []string{"create grant readers on schema shop.public (missing USAGE)"}},
		{"one privilege of two on a table is revoked", "shop", "REVOKE UPDATE ON public.orders FROM stats", []string{"create grant stats on table shop.public.orders (missing UPDATE)"}},
		{"a grant on a sequence is revoked", "shop", "REVOKE SELECT ON SEQUENCE public.orders_id_seq FROM readers", []string{"create grant readers on sequence shop.public.orders_id_seq (missing SELECT)"}},
		{"a grant on a function is revoked", "shop", "REVOKE EXECUTE ON FUNCTION public.total(int) FROM stats", []string{"create grant stats on function shop.public.total(integer) (missing EXECUTE)"}},
		{"a grant on a table with a hostile name is revoked", "shop", `REVOKE SELECT ON public."od""d; DROP TABLE orders; --" FROM readers`, []string{`create grant readers on table shop.public."od\"d; DROP TABLE orders; --" (missing SELECT)`}},
		{"the limit of a role is changed", "postgres", "ALTER ROLE shop CONNECTION LIMIT 3", []string{"update role shop (connection limit: 3 → 20)"}},
		{"the limit of a database is lifted", "postgres", "ALTER DATABASE shop CONNECTION LIMIT -1", []string{"update database shop (connection limit: none → 50)"}},
		{"a membership is revoked", "postgres", "REVOKE readers FROM stats", []string{"create role membership stats in readers (not a member)"}},
		{"a default privilege is revoked", "shop", "ALTER DEFAULT PRIVILEGES FOR ROLE shop IN SCHEMA public REVOKE SELECT ON TABLES FROM readers", []string{"create default privilege readers on tables that shop creates in schema shop.public (missing SELECT)"}},
		{"a login is taken away", "postgres", "ALTER ROLE shop NOLOGIN", []string{"update role shop (login: false → true)"}},
		{"a declared role becomes a superuser", "postgres", "ALTER ROLE shop SUPERUSER", []string{"update role shop (superuser: true → false)"}},
		{"every other attribute is turned around", "postgres", "ALTER ROLE backup NOREPLICATION NOINHERIT CREATEDB CREATEROLE BYPASSRLS VALID UNTIL '2001-01-01 UTC'", []string{
			"update role backup (create databases: true → false, create roles: true → false, inherit: false → true, replication: false → true, bypass row security: true → false, valid until: 2001-01-01 00:00:00+00 → for ever)"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			s.sql(t, test.database, test.sql)
			have, changes := s.diff(t, want)
			expect(t, "found", changes, test.changes...)
			expect(t, "undeclared", role.Undeclared(want, have))
			s.apply(t, want, have, changes)
			_, left := s.diff(t, want)
			expect(t, "left", left)
			if after := s.catalog(t, false); after != intact {
				t.Errorf("repaired to\n%s\nwant\n%s", after, intact)
			}
		})
	}
}

func TestWhatNobodyDeclaresIsReportedAndGoesOnlyWithPrune(t *testing.T) {
	t.Parallel()
	s := start(t)
	want := wanted()
	s.converge(t, want)
	s.sql(t, "shop", migration)
	s.converge(t, want)
	intact := s.catalog(t, false)

	s.sql(t, "postgres", `CREATE ROLE "st""ray" LOGIN; CREATE ROLE lender; GRANT "st""ray" TO shop; GRANT readers TO stats WITH ADMIN OPTION`)
	s.sql(t, "postgres", `CREATE DATABASE "old shop" OWNER "st""ray"`)
	s.sql(t, "shop", `SET search_path = public;
		GRANT CREATE ON DATABASE shop TO stats;
		GRANT DELETE ON orders TO stats;
		GRANT SELECT ON orders TO readers WITH GRANT OPTION;
		GRANT SELECT (total) ON orders TO "st""ray";
		GRANT TRUNCATE, SELECT ON orders TO lender WITH GRANT OPTION;
		SET ROLE lender; GRANT TRUNCATE ON orders TO "st""ray"; GRANT SELECT (id) ON orders TO "st""ray"; RESET ROLE;
		GRANT INSERT ON orders TO PUBLIC;
		ALTER DEFAULT PRIVILEGES FOR ROLE shop IN SCHEMA public GRANT DELETE ON TABLES TO "st""ray";
		ALTER DEFAULT PRIVILEGES FOR ROLE shop GRANT USAGE ON TYPES TO "st""ray";
		ALTER DEFAULT PRIVILEGES FOR ROLE shop GRANT CREATE ON SCHEMAS TO "st""ray"`)
	strayed := s.catalog(t, true)
	have, changes := s.diff(t, want)
	expect(t, "missing", changes)
	undeclared := role.Undeclared(want, have)
	expect(t, "undeclared", undeclared,
		"delete grant stats on database shop (nobody declares CREATE)",
		`delete default privilege "st\"ray" on types that shop creates in database shop (nobody declares USAGE)`,
		`delete default privilege "st\"ray" on schemas that shop creates in database shop (nobody declares CREATE)`,
		`delete default privilege "st\"ray" on tables that shop creates in schema shop.public (nobody declares DELETE)`,
		"delete grant lender on table shop.public.orders (nobody declares SELECT, TRUNCATE)",
		"delete grant public on table shop.public.orders (nobody declares INSERT)",
		`delete grant "st\"ray" on table shop.public.orders (nobody declares TRUNCATE)`,
		"delete grant stats on table shop.public.orders (nobody declares DELETE)",
		`delete grant "st\"ray" on column shop.public.orders.id (nobody declares SELECT)`,
		`delete grant "st\"ray" on column shop.public.orders.total (nobody declares SELECT)`,
		"delete grant readers on table shop.public.orders, grant option (nobody declares the grant option of SELECT)",
		"delete role membership stats in readers (nobody declares its admin option)",
		`delete role membership shop in "st\"ray" (nobody declares it)`,
		`delete database "old shop" (nobody declares it)`,
		"delete role lender (nobody declares it)",
		`delete role "st\"ray" (nobody declares it)`,
	)
	s.apply(t, want, have, changes)
	if after := s.catalog(t, true); after != strayed {
		t.Error("without prune, something undeclared was changed")
	}

	t.Run("one change alone takes back what another role gave", func(t *testing.T) {
		at := slices.IndexFunc(undeclared, func(change plan.Change) bool { return change.Target == `"st\"ray" on table shop.public.orders` })
		s.apply(t, want, have, undeclared[at:at+1])
		have, _ := s.diff(t, want)
		undeclared = slices.Delete(undeclared, at, at+1)
		expect(t, "left", role.Undeclared(want, have), lines(undeclared)...)
	})
	t.Run("a database in use and what hangs on it stay, and all else goes", func(t *testing.T) {
		session, err := s.connect(t.Context(), "old shop")
		if err != nil {
			t.Fatal(err)
		}
		defer disconnect(session)
		err = s.Apply(t.Context(), want, have, undeclared, quietProgress{})
		if err == nil || !strings.Contains(err.Error(), `delete database "old shop"`) || !strings.Contains(plan.HintOf(err), "end the sessions") {
			t.Fatalf("got %v, hint %q", err, plan.HintOf(err))
		}
		have, _ := s.diff(t, want)
		left := role.Undeclared(want, have)
		expect(t, "left", left, `delete database "old shop" (nobody declares it)`, `delete role "st\"ray" (nobody declares it)`)
		if want := []string{`owner: "st\"ray"`, "connected sessions: 1"}; len(left) > 0 && !slices.Equal(left[0].Details, want) {
			t.Errorf("details %q, want %q", left[0].Details, want)
		}
	})
	have, _ = s.diff(t, want)
	s.apply(t, want, have, role.Undeclared(want, have))
	have, changes = s.diff(t, want)
	expect(t, "undeclared after prune", role.Undeclared(want, have))
	expect(t, "missing after prune", changes)
	if after := s.catalog(t, false); after != intact {
		t.Errorf("pruned to\n%s\nwant\n%s", after, intact)
	}
}

func TestARoleThatOwnsSomethingIsNotDropped(t *testing.T) {
	t.Parallel()
	s := start(t)
	want := wanted()
	s.converge(t, want)
	s.sql(t, "stats", `CREATE ROLE hoarder; CREATE ROLE idle; CREATE TABLE public.hoard (); ALTER TABLE public.hoard OWNER TO hoarder`)
	have, _ := s.diff(t, want)
	undeclared := role.Undeclared(want, have)
	expect(t, "undeclared", undeclared, "delete role hoarder (nobody declares it)", "delete role idle (nobody declares it)")
	if want := []string{"owns objects in database stats: 1"}; !slices.Equal(undeclared[0].Details, want) {
		t.Errorf("details %q, want %q", undeclared[0].Details, want)
	}
	err := s.Apply(t.Context(), want, have, undeclared, quietProgress{})
	if err == nil || !strings.Contains(err.Error(), "delete role hoarder: ") || !strings.Contains(err.Error(), "1 object in database stats") || !strings.Contains(plan.HintOf(err), "REASSIGN OWNED") {
		t.Errorf("got %v, hint %q", err, plan.HintOf(err))
	}
	have, _ = s.diff(t, want)
	expect(t, "left", role.Undeclared(want, have), "delete role hoarder (nobody declares it)")
}

func TestADatabaseThatTakesNoConnectionsIsAnErrorWithAHint(t *testing.T) {
	t.Parallel()
	s := start(t)
	want := wanted()
	s.converge(t, want)
	s.sql(t, "postgres", "ALTER DATABASE stats ALLOW_CONNECTIONS false")
	_, err := s.Observe(t.Context(), want)
	if err == nil || !strings.Contains(plan.HintOf(err), "ALTER DATABASE stats ALLOW_CONNECTIONS true") {
		t.Errorf("got %v, hint %q", err, plan.HintOf(err))
	}
}
