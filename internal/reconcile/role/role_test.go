package role

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/site"
)

func TestDesiredOfCollectsAllComponentsInOrder(t *testing.T) {
	want := DesiredOf(&site.Site{Components: []site.Component{
		{Databases: []site.Database{{Name: "shop"}}, Roles: []site.Role{{Name: "shop"}, {Name: "readers"}}, Grants: []site.Grant{{Role: "readers"}}},
		{Databases: []site.Database{{Name: "books"}}, Roles: []site.Role{{Name: "books"}}, Grants: []site.Grant{{Role: "books"}}},
	}})
	var names []string
	for _, database := range want.Databases {
		names = append(names, database.Name)
	}
	for _, role := range want.Roles {
		names = append(names, role.Name)
	}
	for _, grant := range want.Grants {
		names = append(names, grant.Role)
	}
	if got := strings.Join(names, " "); got != "books shop books readers shop books readers" {
		t.Errorf("got %s", got)
	}
}

func TestCheckRefusesWhatWouldNeverSettle(t *testing.T) {
	err := Desired{
		Databases: []site.Database{{Name: "template1", Owner: "shop"}, {Name: "a\x00b", Owner: ""}},
		Roles: []site.Role{
			{Name: strings.Repeat("x", 64)}, {Name: "pg_mine"}, {Name: "postgres"}, {Name: "public"}, {Name: "\xff"},
			{Name: "shop", Password: "shop.password", MemberOf: []string{""}},
		},
		Grants: []site.Grant{
			{Role: "shop", Database: "shop", Object: site.OnTables, Privileges: []string{"SELECT; DROP TABLE x", "EXECUTE", "select"}},
			{Role: "shop", Database: "shop", Object: "planet", Privileges: []string{"SELECT"}},
		},
		Passwords: map[string]secret.Value{"shop": secret.New("hidden\n")},
	}.Check()
	if err == nil {
		t.Fatal("no error")
	}
	for _, want := range []string{
		`database "template1" belongs to the server`, `database "a\x00b": not a text`, "64 bytes; a name has at most 63",
		`role "pg_mine": the name is reserved`, `role "postgres": the name is reserved`, `role "public": the name is reserved`, `role "\xff": not a text`,
		`group of role shop "": a name is missing`, `no privilege "SELECT; DROP TABLE x" on a table`, `no privilege "EXECUTE" on a table`,
		`nothing is granted on a "planet"`, `password of role "shop", secret shop.password: it holds other characters`,
	} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q is not in\n%v", want, err)
		}
	}
	if strings.Contains(err.Error(), "hidden") || strings.Contains(err.Error(), `"select"`) {
		t.Errorf("got %v", err)
	}
	if hint := plan.HintOf(err); hint != "set it again with: site secrets set shop.password" {
		t.Errorf("hint %q", hint)
	}
	if err := (Desired{}).Check(); err != nil {
		t.Error(err)
	}
}

func TestNoStatementAndNoChangeShowsAPassword(t *testing.T) {
	want := Desired{
		Roles:     []site.Role{{Name: "shop", Login: true, Password: "shop.password", ConnectionLimit: -1}, {Name: "books", Password: "a.b", ConnectionLimit: -1}},
		Passwords: map[string]secret.Value{"shop": secret.New("hidden-password"), "books": secret.New("hidden-password")},
	}
	have := Actual{Roles: map[string]State{"books": {Inherit: true, ConnectionLimit: -1}}}
	changes := Diff(want, have)
	statements, err := Statements(want, have, changes)
	if err != nil {
		t.Fatal(err)
	}
	if len(statements) != 2 || !statements[0].Secret() || !statements[1].Secret() {
		t.Fatalf("got %v", statements)
	}
	for _, statement := range statements {
		if text := statement.Text(); strings.Contains(text, "hidden") || !strings.Contains(text, " PASSWORD 'SCRAM-SHA-256$4096:") {
			t.Errorf("got %s", text)
		}
	}
	if shown := fmt.Sprintf("%v %+v %#v %v", statements, statements, want, changes); strings.Contains(shown, "SCRAM") || strings.Contains(shown, "hidden") {
		t.Errorf("shown: %s", shown)
	}
}

func TestAPasswordThatIsNotKnownHereIsLeftAlone(t *testing.T) {
	want := Desired{Roles: []site.Role{{Name: "shop", Password: "shop.password", ConnectionLimit: -1}}}
	have := Actual{Roles: map[string]State{"shop": {Inherit: true, ConnectionLimit: -1, Verifier: secret.New("md5")}}}
	if changes := Diff(want, have); len(changes) > 0 {
		t.Errorf("got %v", changes)
	}
}

func TestStatementsComeInAnOrderThatWorks(t *testing.T) {
	want := Desired{
		Databases: []site.Database{{Name: "shop", Owner: "shop", ConnectionLimit: -1}, {Name: "books", Owner: "shop", ConnectionLimit: 3}},
		Roles:     []site.Role{{Name: "shop", ConnectionLimit: -1, MemberOf: []string{"zeta"}}, {Name: "zeta", ConnectionLimit: -1}},
		Grants: []site.Grant{
			{Role: "zeta", Database: "shop", Schema: "public", Object: site.OnSchema, Privileges: []string{"USAGE"}},
			{Role: "zeta", Database: "shop", Object: site.OnDatabase, Privileges: []string{"TEMP"}},
			{Role: "public", Database: "books", Schema: "public", Object: site.OnSchema, Privileges: []string{"USAGE"}},
			{Role: "zeta", Database: "books", Schema: "later", Object: site.OnTables, Names: []string{"*"}, Privileges: []string{"SELECT"}},
		},
	}
	have := Actual{
		HbaStale: true, IdentStale: true,
		Roles:       map[string]State{"old": {}, "postgres": {System: true}},
		Memberships: []Membership{{Role: "postgres", Member: "old"}, {Role: "pg_monitor", Member: "postgres"}},
		Databases:   map[string]Database{"books": {Owner: "old", ConnectionLimit: 3}, "gone": {Owner: "old"}, "template0": {System: true}},
		Objects: []Object{
			{Place: Place{Database: "books", Kind: site.OnDatabase}, Owner: "old", Held: []Privilege{{Role: "old", Name: "CONNECT", Grantor: "old"}}},
			{Place: Place{Database: "books", Kind: site.OnSchema, Schema: "public"}, Owner: "postgres", Held: []Privilege{{Role: "old", Name: "CREATE", Grantor: "postgres"}}},
		},
	}
	changes := append(Undeclared(want, have), Diff(want, have)...)
	slices.Reverse(changes)
	statements, err := Statements(want, have, changes)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, statement := range statements {
		line := statement.Database + ": " + statement.Text()
		if statement.Alone {
			line = "alone: " + statement.Text()
		}
		if statement.Reload {
			line = "reload"
		}
		got = append(got, line)
	}
	expected := []string{
		"reload", "reload",
		`: CREATE ROLE "zeta" WITH NOLOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE INHERIT NOREPLICATION NOBYPASSRLS CONNECTION LIMIT -1`,
		`: CREATE ROLE "shop" WITH NOLOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE INHERIT NOREPLICATION NOBYPASSRLS CONNECTION LIMIT -1`,
		`: GRANT "zeta" TO "shop"`,
		`alone: CREATE DATABASE "shop" OWNER "shop" CONNECTION LIMIT -1`,
		`: GRANT TEMPORARY ON DATABASE "shop" TO "zeta"`,
		`: ALTER DATABASE "books" OWNER TO "shop"`,
		`shop: GRANT USAGE ON SCHEMA "public" TO "zeta"`,
		`books: GRANT USAGE ON SCHEMA "public" TO PUBLIC`,
		`books: REVOKE CREATE ON SCHEMA "public" FROM "old" CASCADE`,
		`: REVOKE "postgres" FROM "old"`,
		`alone: DROP DATABASE "gone"`,
		`alone: DROP ROLE "old"`,
	}
	if !slices.Equal(got, expected) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(expected, "\n"))
	}
	if waiting := Waiting(want, have); !slices.Equal(waiting, []string{"schema books.later"}) {
		t.Errorf("waiting for %v", waiting)
	}
	if _, err := Statements(want, have, []plan.Change{{Action: plan.Create, Kind: KindRole, Target: "nobody"}}); err == nil {
		t.Error("a change of another state was accepted")
	}
}

func TestWhatComesByDeclaredDefaultPrivilegesIsDeclared(t *testing.T) {
	want := Desired{
		Databases: []site.Database{{Name: "shop", Owner: "shop"}},
		Grants: []site.Grant{{Role: "readers", Database: "shop", Schema: "public", Object: site.OnTables,
			Names: []string{"orders"}, Privileges: []string{"SELECT"}, DefaultFor: "shop"}},
	}
	select1 := []Privilege{{Role: "readers", Name: "SELECT", Grantor: "shop"}}
	table := func(name, owner string) Object {
		return Object{Place: Place{Database: "shop", Kind: site.OnTables, Schema: "public", Name: name}, Owner: owner, Held: select1}
	}
	have := Actual{
		Databases: map[string]Database{"shop": {Owner: "shop"}},
		Objects: []Object{
			{Place: Place{Database: "shop", Kind: site.OnSchema, Schema: "public"}},
			table("orders", "shop"), table("later", "shop"), table("others", "somebody"),
			{Place: Place{Database: "shop", Kind: site.OnTables, Schema: "public", DefaultFor: "shop"}, Owner: "shop", Held: select1},
		},
	}
	if changes := Diff(want, have); len(changes) > 0 {
		t.Errorf("missing: %v", changes)
	}
	changes := Undeclared(want, have)
	if len(changes) != 1 || changes[0].Target != "readers on table shop.public.others" {
		t.Errorf("undeclared: %v", changes)
	}
}

func TestFunctionsAreKnownByTheServersNamesOfTypes(t *testing.T) {
	for declared, want := range map[string]string{
		"f()":                      "f()",
		"f( )":                     "f()",
		"f(int,  TEXT[])":          "f(integer, text[])",
		"f(int8[],timestamptz)":    "f(bigint[], timestamp with time zone)",
		"f(Double   Precision)":    "f(double precision)",
		"Mixed(app.kind, varchar)": "Mixed(app.kind, character varying)",
		"not a function":           "not a function",
	} {
		if got := canonicalName(site.OnFunctions, declared); got != want {
			t.Errorf("%s: got %s, want %s", declared, got, want)
		}
	}
}

// scan reads a quoted word as the server's lexer does, and gives what follows it.
func scan(text string, mark byte) (word, rest string, ok bool) {
	if text == "" || text[0] != mark {
		return "", text, false
	}
	var b strings.Builder
	for i := 1; i < len(text); i++ {
		switch {
		case text[i] != mark:
			b.WriteByte(text[i])
		case i+1 < len(text) && text[i+1] == mark:
			b.WriteByte(mark)
			i++
		default:
			return b.String(), text[i+1:], true
		}
	}
	return "", "", false
}

func FuzzQuotedNamesAreOneWord(f *testing.F) {
	for _, name := range []string{`plain`, `"`, `""`, `a"; DROP ROLE b; --`, `\"`, "a\nb", `'`, `$$`, "ünï"} {
		f.Add(name)
	}
	f.Fuzz(func(t *testing.T, name string) {
		if word, rest, ok := scan(quote(name), '"'); !ok || word != name || rest != "" {
			t.Errorf("identifier %q is read as %q, and then %q", name, word, rest)
		}
		if word, rest, ok := scan(literal(name), '\''); !ok || word != name || rest != "" {
			t.Errorf("literal %q is read as %q, and then %q", name, word, rest)
		}
		if shown := display(name); strings.ContainsAny(shown, "\n\r\x1b") {
			t.Errorf("%q is shown as %q", name, shown)
		}
	})
}
