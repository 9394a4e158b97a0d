package e2e

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/nomad-site/site/internal/deploy"
	"github.com/nomad-site/site/internal/reconcile/host"
)

// shopPlatform has one of each kind of thing that is kept in OpenBao and Postgres.
const shopPlatform = `
secret "password" {
  generated {}
}

secret "token" {
  description = "the courier's token"
  external {}
}

database "shop" {
  owner            = "shop"
  connection_limit = 40
}

role "shop" {
  login            = true
  password         = "password"
  connection_limit = 20
  member_of        = ["clerks"]
}

role "clerks" {}

role "readers" {}

grant "readers" {
  database   = "shop"
  privileges = ["CONNECT"]
}

grant "readers" {
  database   = "shop"
  schema     = "public"
  privileges = ["USAGE"]
}

grant "readers" {
  database    = "shop"
  schema      = "public"
  tables      = ["*"]
  privileges  = ["SELECT"]
  default_for = "shop"
}

grant "clerks" {
  database   = "shop"
  schema     = "public"
  sequences  = ["orders_id_seq"]
  privileges = ["USAGE"]
}

grant "clerks" {
  database   = "shop"
  schema     = "public"
  functions  = ["total(integer)"]
  privileges = ["EXECUTE"]
}
`

// shopTables are what the application itself would make.
const shopTables = `SET ROLE shop; CREATE TABLE orders (id bigserial PRIMARY KEY);
	CREATE FUNCTION total(integer) RETURNS integer LANGUAGE sql AS 'SELECT $1'`

// withShop deploys a second component, which has a role, a database and a grant
// of each kind.
func (s *testSite) withShop() {
	s.t.Helper()
	files := map[string]string{filepath.Join("behave", "main.go"): s.read(filepath.Join("testdata", "behave", "main.go"))}
	maps.Copy(files, s.readingFiles(probe{Name: "shop", Port: 9002}, shopPlatform, "token"))
	path, content := s.activate("shop")
	files[path] = content
	s.commit("a shop", files)
	s.feed("courier-1", "secrets", "import", "shop.token", "--from-file=-")
	got := s.must("deploy")
	s.says(got, 0, "granted once it exists: sequence shop.public.orders_id_seq", "granted once it exists: function shop.public.total(integer)")
	s.psql("shop", shopTables)
	s.must("deploy")
	s.waitHealthy("shop")
	s.planIs()
}

// databaseState is all that a repair in Postgres must bring back, passwords aside.
func (s *testSite) databaseState() state {
	s.t.Helper()
	var lines state
	ask := func(database string, queries ...string) {
		for line := range strings.Lines(s.psql(database, strings.Join(queries, "; "))) {
			lines = append(lines, database+" "+strings.TrimSpace(line))
		}
	}
	// In any order: a list of privileges keeps the order in which they were granted.
	acl := func(list string) string {
		return "(SELECT string_agg(a::text, ' ' ORDER BY a::text) FROM unnest(" + list + ") AS a)"
	}
	ask("postgres",
		`SELECT 'role', rolname, rolsuper, rolinherit, rolcreaterole, rolcreatedb, rolcanlogin, rolreplication, rolbypassrls, rolconnlimit, rolpassword IS NOT NULL FROM pg_authid`,
		"SELECT 'member', roleid::regrole, member::regrole, admin_option FROM pg_auth_members",
		"SELECT 'database', datname, datdba::regrole, datconnlimit, "+acl("datacl")+" FROM pg_database")
	ask("shop",
		"SELECT 'schema', nspname, nspowner::regrole, "+acl("nspacl")+" FROM pg_namespace WHERE nspname = 'public'",
		"SELECT relname, relowner::regrole, "+acl("relacl")+" FROM pg_class WHERE relnamespace = 'public'::regnamespace",
		"SELECT proname, proowner::regrole, "+acl("proacl")+" FROM pg_proc WHERE pronamespace = 'public'::regnamespace",
		"SELECT 'default', defaclrole::regrole, defaclnamespace::regnamespace, defaclobjtype, "+acl("defaclacl")+" FROM pg_default_acl")
	slices.Sort(lines)
	return lines
}

// deployDoes insists that a deploy makes exactly these changes.
func (s *testSite) deployDoes(want []string, args ...string) {
	s.t.Helper()
	got := s.must(append([]string{"deploy", "--json"}, args...)...)
	var done []change
	for _, event := range s.events(got) {
		done = append(done, event.Changes...)
	}
	if found := s.words(done); !slices.Equal(found, slices.Sorted(slices.Values(want))) {
		s.t.Errorf("deploy changes %q, not %q", found, want)
	}
}

// countsRows insists that the application is up with its database.
func (s *testSite) countsRows() {
	s.t.Helper()
	if says, err := s.answer(); err != nil || says.Rows < 1 {
		s.t.Errorf("the application says %+v, %v", says, err)
	}
}

func TestWhatIsBrokenByHandInOpenBaoAndPostgresIsNamedAndRepaired(t *testing.T) {
	s := newSite(t, platform)
	s.withShop()
	t.Run("an external secret that was deleted is asked for", func(t *testing.T) { s.in(t).externalIsAskedFor() })
	t.Run("in Postgres", func(t *testing.T) { s.in(t).postgresIsRepaired() })
	t.Run("in OpenBao", func(t *testing.T) { s.in(t).openBaoIsRepaired() })
	t.Run("the unseal key on the host", func(t *testing.T) { s.in(t).unsealKeyIsRepaired() })
	t.Run("a generated secret that was deleted is not made again", func(t *testing.T) { s.in(t).generatedIsKept() })
	t.Run("a lost secret is made anew when asked", func(t *testing.T) { s.in(t).generatedIsRemade() })
	t.Run("a new value reaches its job with the next deploy", func(t *testing.T) { s.in(t).newValueIsDeployed() })
	t.Run("what nobody declares is reported and pruned when asked", func(t *testing.T) { s.in(t).undeclaredIsPruned() })
}

func (s *testSite) postgresIsRepaired() {
	before, jobs := s.databaseState(), s.traces("hello")+s.traces("shop")
	if len(before) < 20 { // else no difference proves nothing
		s.t.Fatalf("Postgres says little: %q", before)
	}
	for _, each := range []struct {
		name, database, sql string
		want                []string
	}{
		{
			"a role is dropped", "shop", "DROP OWNED BY readers; DROP ROLE readers",
			[]string{
				"create role readers", "create grant readers on database shop", "create grant readers on schema shop.public",
				"create grant readers on table shop.public.orders",
				"create default privilege readers on tables that shop creates in schema shop.public",
			},
		},
		{"a database has another owner", "postgres", "ALTER DATABASE shop OWNER TO clerks", []string{"update database shop"}},
		{"a password is another", "postgres", "ALTER ROLE hello_a PASSWORD 'changed by hand'", []string{"update role password hello_a"}},
		{"the login that is not in turn may log in", "postgres", "ALTER ROLE hello_b LOGIN", []string{"update role hello_b"}},
		{"a login makes things of its own", "postgres", "ALTER ROLE hello_a RESET role", []string{"update role session hello_a"}},
		{"a password is gone", "postgres", "ALTER ROLE shop PASSWORD NULL", []string{"update role password shop"}},
		{"a role may do everything", "postgres", "ALTER ROLE shop SUPERUSER CREATEROLE", []string{"update role shop"}},
		{"a role has another connection limit", "postgres", "ALTER ROLE shop CONNECTION LIMIT 2", []string{"update role shop"}},
		{"a database has another connection limit", "postgres", "ALTER DATABASE shop CONNECTION LIMIT 2", []string{"update database shop"}},
		{"a membership is revoked", "postgres", "REVOKE clerks FROM shop", []string{"create role membership shop in clerks"}},
		{"a grant on a database is revoked", "postgres", "REVOKE CONNECT ON DATABASE shop FROM readers", []string{"create grant readers on database shop"}},
		{"a grant on a schema is revoked", "shop", "REVOKE USAGE ON SCHEMA public FROM readers", []string{"create grant readers on schema shop.public"}},
		{"a grant on a table is revoked", "shop", "REVOKE SELECT ON orders FROM readers", []string{"create grant readers on table shop.public.orders"}},
		{"a grant on a sequence is revoked", "shop", "REVOKE USAGE ON SEQUENCE orders_id_seq FROM clerks", []string{"create grant clerks on sequence shop.public.orders_id_seq"}},
		{"a grant on a function is revoked", "shop", "REVOKE EXECUTE ON FUNCTION total(integer) FROM clerks", []string{"create grant clerks on function shop.public.total(integer)"}},
		{
			"a default privilege is revoked", "shop", "ALTER DEFAULT PRIVILEGES FOR ROLE shop IN SCHEMA public REVOKE SELECT ON TABLES FROM readers",
			[]string{"create default privilege readers on tables that shop creates in schema shop.public"},
		},
	} {
		s.t.Run(each.name, func(t *testing.T) {
			s := s.in(t)
			s.psql(each.database, each.sql)
			s.planIs(each.want...)
			s.writesNothing("a repair of Postgres", func() { s.deployDoes(each.want) })
			if lines := before.diff(s.databaseState()); len(lines) > 0 {
				t.Errorf("after the repair Postgres is not as before:\n%s", strings.Join(lines, "\n"))
			}
			if strings.Contains(each.sql, "PASSWORD") {
				s.says(s.run("secrets", "verify", "hello.database_password", "shop.password"), 0)
			}
			s.planIs()
			s.countsRows()
			if after := s.traces("hello") + s.traces("shop"); after != jobs {
				t.Errorf("the jobs were touched: %s, now %s", jobs, after)
			}
		})
	}
}

func (s *testSite) openBaoIsRepaired() {
	b := s.bao()
	jobs := s.traces("hello") + s.traces("shop")
	// with reads a document, changes it and writes it back.
	with := func(path, field string, change func(any) any) func() {
		return func() {
			var document struct{ Data map[string]any }
			b.must("GET", path, nil, &document)
			document.Data[field] = change(document.Data[field])
			b.must("POST", path, document.Data, nil)
		}
	}
	constant := func(value any) func(any) any { return func(any) any { return value } }
	for _, each := range []struct {
		name   string
		broken func()
		want   []string
	}{
		{"a policy is edited", with("sys/policies/acl/job-hello", "policy", func(text any) any {
			return text.(string) + "\npath \"site/data/shop/*\" { capabilities = [\"read\"] }\n"
		}), []string{"update policy job-hello"}},
		{"the operators' policy is edited", with("sys/policies/acl/site-operator", "policy", func(text any) any {
			return text.(string) + "\npath \"sys/policies/*\" { capabilities = [\"update\"] }\n"
		}), []string{"update policy site-operator"}},
		{"a job's role is deleted", func() { b.must("DELETE", "auth/jwt-nomad/role/hello", nil, nil) }, []string{"create identity role jwt-nomad/hello"}},
		{"a job's role has another policy", with("auth/jwt-nomad/role/hello", "token_policies", constant([]string{"job-hello", "job-shop"})), []string{"update identity role jwt-nomad/hello"}},
		{"a job's role is open to other jobs", with("auth/jwt-nomad/role/hello", "bound_claims", constant(map[string]string{"nomad_namespace": "default"})), []string{"update identity role jwt-nomad/hello"}},
		{"somebody's key is added to the operators", with("auth/operators/config", "jwt_validation_pubkeys", func(keys any) any {
			return append(keys.([]any), strangersKey(s.t))
		}), []string{"update auth method operators"}},
		{"the engine keeps fewer versions", func() { b.must("POST", "site/config", map[string]any{"max_versions": 3}, nil) }, []string{"update mount site"}},
		{"a mount is tuned", func() {
			b.must("POST", "sys/mounts/site/tune", map[string]any{"audit_non_hmac_request_keys": []string{"value"}}, nil)
		}, []string{"update mount site"}},
	} {
		s.t.Run(each.name, func(t *testing.T) {
			s := s.in(t)
			b.s = s
			each.broken()
			s.planIs(each.want...)
			s.deployDoes(each.want)
			s.planIs()
			s.countsRows()
			if after := s.traces("hello") + s.traces("shop"); after != jobs {
				t.Errorf("the jobs were touched: %s, now %s", jobs, after)
			}
		})
	}
	s.t.Run("the audit device is disabled", func(t *testing.T) {
		s := s.in(t)
		b.s = s
		var refused *statusError
		switch err := b.try(t.Context(), http.MethodDelete, "sys/audit/file", nil, nil); {
		case errors.As(err, &refused) && refused.status == http.StatusBadRequest:
			s.planIs() // a product that has them in its configuration
			return
		case err != nil:
			t.Fatal(err)
		}
		s.planIs("create audit device file")
		s.deployDoes([]string{"create audit device file"})
		s.planIs()
		s.wantsMutations("sys/policies/acl/job-scratch", func() {
			b.must("POST", "sys/policies/acl/job-scratch", map[string]string{"policy": "# nothing"}, nil)
			b.must("DELETE", "sys/policies/acl/job-scratch", nil, nil)
		})
	})
}

// strangersKey is the public key of nobody that the site knows.
func strangersKey(t *testing.T) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	encoded, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: encoded}))
}

// wantsMutations insists that the audit log tells of what do wrote.
func (s *testSite) wantsMutations(path string, do func()) {
	s.t.Helper()
	before := len(s.mutations())
	do()
	if after := s.mutations()[before:]; !slices.ContainsFunc(after, func(line string) bool { return strings.HasSuffix(line, path) }) {
		s.t.Errorf("the audit log says %q, and nothing of %s", after, path)
	}
}

func (s *testSite) unsealKeyIsRepaired() {
	root := "--root-token-file=" + s.tokenFile
	s.host.exec("rm", host.UnsealKeyPath)
	got := s.must("plan", "--check")
	s.says(got, 0, "warning: "+host.UnsealKeyPath+" is missing", "bootstrap-deploy")
	code, changes := s.planCheck(root)
	if want := []string{"create file " + host.UnsealKeyPath}; code != 2 || !slices.Equal(s.words(changes), want) {
		s.t.Errorf("with the root token it finds %q and ends with %d, not %q and 2", s.words(changes), code, want)
	}
	s.bootstrap()
	if mode := strings.TrimSpace(s.host.exec("stat", "-c", "%a %U", host.UnsealKeyPath)); mode != "600 root" {
		s.t.Errorf("the key is back with mode and owner %s", mode)
	}
	if code, changes := s.planCheck(root); code != 0 || len(changes) > 0 {
		s.t.Errorf("after the repair there is %v to do", changes)
	}
	if got := s.must("plan", "--check"); strings.Contains(got.stderr, "warning: "+host.UnsealKeyPath) {
		s.t.Errorf("after the repair: %v", got)
	}
}

func (s *testSite) externalIsAskedFor() {
	b := s.bao()
	b.must("DELETE", "site/data/shop/token", nil, nil)
	sha := s.commit("another greeting", map[string]string{mainGo: s.replace(mainGo, "hello from %s", "good morning from %s")})
	shop := s.traces("shop")
	s.planIs("import secret shop.token", "upload artifact e2e/hello", "update job hello")
	got := s.run("deploy")
	want := `error: external secrets: 1 secret from outside is missing:
  shop.token (the courier's token), needed by shop: site secrets import shop.token --from-file=FILE
hint: import it as the line says, then deploy again
`
	if got.code != 1 || !strings.HasSuffix(got.stderr, want) || strings.Count(got.stderr, "error: ") != 1 {
		s.t.Errorf("want one error\n%s\n%v", want, got)
	}
	if version := s.version(); version != sha {
		s.t.Errorf("what needs no such secret is at %s, not at %s", version, sha)
	}
	if row := s.secretRows()["shop.token"]; row.State != deploy.SecretDeleted {
		s.t.Errorf("the status is %+v", row)
	}
	s.says(s.feed("courier-2", "secrets", "import", "shop.token", "--from-file=-"), 0, "shop.token: stored, generation 2")
	if after := s.traces("shop"); after != shop {
		s.t.Errorf("the job that runs on it was touched: %s, now %s", shop, after)
	}
	s.deployDoes([]string{"update secret generations shop"})
	s.planIs()
}

const ownPassword = "hello.database_password"

// isNotRemade insists that a deploy refuses to make a lost value anew.
func (s *testSite) isNotRemade(how string) {
	s.t.Helper()
	s.planIs("import secret " + ownPassword)
	before := s.traces("hello")
	s.writesNothing("a deploy without a secret that was lost", func() {
		s.wantRefusal(s.run("deploy"), []string{"the value of generated secret " + ownPassword + " " + how + " while hello runs on it"},
			[]string{"put the value back", "site secrets import " + ownPassword, "--remake-secret=" + ownPassword})
	})
	s.countsRows()
	if after := s.traces("hello"); after != before {
		s.t.Errorf("the job was touched: %s, now %s", before, after)
	}
}

func (s *testSite) generatedIsKept() {
	b := s.bao()
	value := s.must("secrets", "get", ownPassword, "--reveal").stdout
	putBack := func(generation int) {
		s.t.Helper()
		s.says(s.feed(value, "secrets", "import", ownPassword, "--from-file=-"), 0, fmt.Sprintf("stored, generation %d", generation))
		// The job reads the generation that is lost, until this brings it the new one.
		s.deployDoes([]string{"update job hello"})
		s.planIs()
		s.says(s.run("secrets", "verify", ownPassword), 0)
		s.countsRows()
	}
	b.must("DELETE", "site/data/hello/database_password", nil, nil)
	s.isNotRemade("was deleted")
	putBack(2)
	s.says(s.feed("another", "secrets", "import", ownPassword, "--from-file=-"), 1, "is generated and has a value")

	// All that was ever known of it: operators cannot, unless they give themselves the right.
	b.refused("DELETE", "site/metadata/hello/database_password", nil)
	var policy struct{ Data struct{ Policy string } }
	b.must("GET", "sys/policies/acl/site-operator", nil, &policy)
	b.must("POST", "sys/policies/acl/site-operator", map[string]string{
		"policy": strings.Replace(policy.Data.Policy, `path "site/metadata/*" { capabilities = [`, `path "site/metadata/*" { capabilities = ["delete", `, 1),
	}, nil)
	b.must("DELETE", "site/metadata/hello/database_password", nil, nil)
	b.must("POST", "sys/policies/acl/site-operator", map[string]string{"policy": policy.Data.Policy}, nil)
	s.isNotRemade("is gone")
	putBack(1)
}

func (s *testSite) generatedIsRemade() {
	value := s.must("secrets", "get", ownPassword, "--reveal").stdout
	s.bao().must("DELETE", "site/data/hello/database_password", nil, nil)
	s.isNotRemade("was deleted")
	s.deployDoes([]string{
		"create secret " + ownPassword, "update role password hello_a", "update job hello",
	}, "--remake-secret="+ownPassword)
	s.says(s.run("secrets", "verify", ownPassword), 0, "works (database login)")
	if got := s.must("secrets", "get", ownPassword, "--reveal").stdout; got == value || len(got) < 40 {
		s.t.Error("the value is the same as before, or short")
	}
	s.planIs()
}

func (s *testSite) newValueIsDeployed() {
	shop := s.traces("shop")
	s.says(s.feed("courier-3", "secrets", "import", "shop.token", "--from-file=-"), 0, "stored, generation 3")
	s.planIs("update secret generations shop")
	if after := s.traces("shop"); after != shop || s.rendered("shop", "token") != "courier-2" {
		s.t.Errorf("the job was touched before a deploy: %s, now %s", shop, after)
	}
	s.must("deploy")
	s.until("the shop to have its new token", limit, func() error {
		if got := s.rendered("shop", "token"); got != "courier-3" {
			return fmt.Errorf("it has %q", got)
		}
		return nil
	})
	if after := s.traces("shop"); after != shop {
		s.t.Errorf("it was started again for what its template follows without: %s, now %s", shop, after)
	}
	s.waitHealthy("hello")
	s.planIs()
}

func (s *testSite) undeclaredIsPruned() {
	b := s.bao()
	s.psql("postgres", "CREATE ROLE stray LOGIN")
	s.psql("postgres", "CREATE DATABASE stray OWNER stray")
	s.psql("shop", "GRANT INSERT ON orders TO readers")
	s.psql("postgres", "GRANT readers TO shop")
	b.must("POST", "sys/policies/acl/job-stray", map[string]string{"policy": `path "site/data/*" { capabilities = ["read"] }`}, nil)
	b.must("POST", "auth/jwt-nomad/role/stray", map[string]any{
		"role_type": "jwt", "user_claim": "nomad_job_id", "bound_audiences": []string{"vault.io"}, "bound_claims": map[string]string{"nomad_job_id": "stray"},
	}, nil)
	things := []string{
		"role stray", "database stray", "grant readers on table shop.public.orders", "role membership shop in readers",
		"policy job-stray", "identity role jwt-nomad/stray",
	}
	s.writesNothing("a deploy that finds what nobody declares", func() {
		got := s.must("deploy")
		s.says(got, 0, "nothing to do")
		for _, thing := range things {
			s.says(got, 0, "warning: "+thing+" in ", "--prune")
		}
		if count := strings.Count(got.stderr, "warning: "); count != len(things) {
			s.t.Errorf("%d warnings, not %d\n%v", count, len(things), got)
		}
	})
	if got := s.psql("postgres", "SELECT count(*) FROM pg_database WHERE datname = 'stray'"); got != "1" {
		s.t.Error("the database was removed without --prune")
	}
	s.planIs()
	var want []string
	for _, thing := range things {
		want = append(want, "delete "+thing)
	}
	s.deployDoes(want, "--prune")
	if got := s.must("deploy", "--prune"); !strings.Contains(got.stdout, "nothing to do") || strings.Contains(got.stderr, "warning: ") {
		s.t.Errorf("after --prune: %v", got)
	}
	var missing *statusError
	if err := b.try(context.WithoutCancel(s.t.Context()), "GET", "sys/policies/acl/job-stray", nil, nil); !errors.As(err, &missing) || missing.status != http.StatusNotFound {
		s.t.Errorf("the policy is still there: %v", err)
	}
}
