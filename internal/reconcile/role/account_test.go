package role

import (
	"slices"
	"strings"
	"testing"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/site"
)

const (
	firstPassword  = "first-horse"
	secondPassword = "second-horse"
)

// alternatingShop is the role shop with logins that take turns.
func alternatingShop(logins ...Login) Desired {
	return Desired{
		Roles:  []site.Role{{Name: "shop", Login: true, Password: "shop.password", ConnectionLimit: 20, MemberOf: []string{"readers"}, Alternating: true}},
		Logins: map[string][]Login{"shop": logins},
	}
}

func login(name, password string) Login { return Login{Name: name, Password: secret.New(password)} }

func verifierOf(t *testing.T, password string) secret.Value {
	t.Helper()
	verifier, err := NewVerifier(secret.New(password))
	if err != nil {
		t.Fatal(err)
	}
	return verifier
}

// stateOfShop is a server on which shop_a may log in, and all is as it should be.
func stateOfShop(t *testing.T) Actual {
	t.Helper()
	actsAs := map[string]string{"": "shop"}
	return Actual{
		Roles: map[string]State{
			"shop":   {Inherit: true, ConnectionLimit: 20},
			"shop_a": {Inherit: true, ConnectionLimit: 20, Login: true, Verifier: verifierOf(t, firstPassword), ActsAs: actsAs},
			"shop_b": {Inherit: true, ConnectionLimit: 20, ActsAs: actsAs},
		},
		Memberships: []Membership{{Role: "readers", Member: "shop"}, {Role: "shop", Member: "shop_a"}, {Role: "shop", Member: "shop_b"}},
	}
}

// texts are the statements that make the changes, without their verifiers.
func texts(t *testing.T, want Desired, have Actual, changes []plan.Change) []string {
	t.Helper()
	statements, err := Statements(want, have, changes)
	if err != nil {
		t.Fatal(err)
	}
	var lines []string
	for _, statement := range statements {
		line := statement.SQL
		if statement.Secret() {
			line += " '…'"
		}
		lines = append(lines, line)
	}
	return lines
}

func expectLines(t *testing.T, what string, got []string, want ...string) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("%s:\n\t%s\nwant\n\t%s", what, strings.Join(got, "\n\t"), strings.Join(want, "\n\t"))
	}
}

func linesOf(changes []plan.Change) []string {
	var lines []string
	for _, change := range changes {
		lines = append(lines, change.String())
	}
	return lines
}

func TestTheLoginsOfAnAlternatingRoleTakeTurns(t *testing.T) {
	a, b := login("shop_a", firstPassword), login("shop_b", secondPassword)
	bothWork := stateOfShop(t)
	second := bothWork.Roles["shop_b"]
	second.Login, second.Verifier = true, verifierOf(t, secondPassword)
	bothWork.Roles["shop_b"] = second
	with := func(name string, change func(*State)) Actual {
		have := stateOfShop(t)
		state := have.Roles[name]
		change(&state)
		have.Roles[name] = state
		return have
	}
	unknown := alternatingShop()
	unknown.Logins = nil
	for _, test := range []struct {
		name    string
		want    Desired
		have    Actual
		changes []string
	}{
		{"nothing is left to do while the first has its turn", alternatingShop(a), stateOfShop(t), nil},
		{"nothing is left to do while both work", alternatingShop(b, a), bothWork, nil},
		{"the second gets its turn besides the first", alternatingShop(a, b), stateOfShop(t), []string{
			"update role shop_b (login: false → true)", "update role password shop_b (it has no password)"}},
		{"the first is retired", alternatingShop(b), bothWork, []string{
			"update role shop_a (login: true → false)", "update role password shop_a (it has a password and may not log in now)"}},
		{"nobody may log in", alternatingShop(), stateOfShop(t), []string{
			"update role shop_a (login: true → false)", "update role password shop_a (it has a password and may not log in now)"}},
		{"the one that has its turn has another password", alternatingShop(login("shop_a", "third-horse")), stateOfShop(t), []string{
			"update role password shop_a (password differs)"}},
		{"whose turn it is is not known here", unknown, bothWork, nil},
		{"whose turn it is is not known here, and another attribute was changed", unknown,
			with("shop_a", func(s *State) { s.Superuser = true }), []string{"update role shop_a (superuser: true → false)"}},
		{"it was a role with a login of its own, and whose turn it is is not known here", unknown,
			with("shop", func(s *State) { s.Login, s.Verifier = true, secret.New("md5") }), nil},
		{"somebody gave the role a login", alternatingShop(a), with("shop", func(s *State) { s.Login, s.Verifier = true, secret.New("md5") }), []string{
			"update role shop (login: true → false)", "update role password shop (it has a password and may not log in now)"}},
		{"a login acts as itself", alternatingShop(a), with("shop_b", func(s *State) { s.ActsAs = nil }), []string{
			"update role session shop_b (acts as: itself → shop)"}},
		{"a login acts as another, and as yet another in one database", alternatingShop(a),
			with("shop_a", func(s *State) { s.ActsAs = map[string]string{"": "readers", "books": "none", "shop": "shop"} }), []string{
				"update role session shop_a (acts as: readers → shop, acts in database books as: none → shop)"}},
		{"a login has another limit", alternatingShop(a), with("shop_b", func(s *State) { s.ConnectionLimit = 3 }), []string{
			"update role shop_b (connection limit: 3 → 20)"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			if err := test.want.Check(); err != nil {
				t.Fatal(err)
			}
			expectLines(t, "changes", linesOf(Diff(test.want, test.have)), test.changes...)
			expectLines(t, "undeclared", linesOf(Undeclared(test.want, test.have)))
		})
	}
}

func TestALoginWorksBeforeTheRoleLosesItsOwn(t *testing.T) {
	want := alternatingShop(login("shop_a", firstPassword))
	have := Actual{
		Roles:       map[string]State{"shop": {Inherit: true, ConnectionLimit: 20, Login: true, Verifier: verifierOf(t, "old-horse")}},
		Memberships: []Membership{{Role: "readers", Member: "shop"}},
	}
	changes := Diff(want, have)
	slices.Reverse(changes)
	expectLines(t, "statements", texts(t, want, have, changes),
		`CREATE ROLE "shop_b" WITH NOLOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE INHERIT NOREPLICATION NOBYPASSRLS CONNECTION LIMIT 20`,
		`CREATE ROLE "shop_a" WITH LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE INHERIT NOREPLICATION NOBYPASSRLS CONNECTION LIMIT 20 PASSWORD '…'`,
		`GRANT "shop" TO "shop_b"`,
		`GRANT "shop" TO "shop_a"`,
		`ALTER ROLE "shop_b" SET role = 'shop'`,
		`ALTER ROLE "shop_a" SET role = 'shop'`,
		`ALTER ROLE "shop" PASSWORD NULL`,
		`ALTER ROLE "shop" WITH NOLOGIN`,
	)
}

func TestTheRoleKeepsItsOwnLoginWhileItIsOneOfTheLogins(t *testing.T) {
	want := alternatingShop(login("shop_a", firstPassword), login("shop", "old-horse"))
	have := stateOfShop(t)
	have.Roles["shop"] = State{Inherit: true, ConnectionLimit: 20, Login: true, Verifier: verifierOf(t, "old-horse")}
	if err := want.Check(); err != nil {
		t.Fatal(err)
	}
	expectLines(t, "changes", linesOf(Diff(want, have)))
}

func TestLoginsAreMadeEvenIfWhoMayLogInIsNotKnown(t *testing.T) {
	want := alternatingShop()
	want.Logins = nil
	expectLines(t, "statements", texts(t, want, Actual{}, Diff(want, Actual{}))[:3],
		`CREATE ROLE "shop" WITH NOLOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE INHERIT NOREPLICATION NOBYPASSRLS CONNECTION LIMIT 20`,
		`CREATE ROLE "shop_a" WITH NOLOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE INHERIT NOREPLICATION NOBYPASSRLS CONNECTION LIMIT 20`,
		`CREATE ROLE "shop_b" WITH NOLOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE INHERIT NOREPLICATION NOBYPASSRLS CONNECTION LIMIT 20`,
	)
}

func TestLoginsOfARoleThatAlternatesNoMoreAreUndeclared(t *testing.T) {
	want := alternatingShop()
	want.Roles[0].Alternating, want.Logins = false, nil
	want.Passwords = map[string]secret.Value{"shop": secret.New(firstPassword)}
	have := stateOfShop(t)
	expectLines(t, "changes", linesOf(Diff(want, have)),
		"update role shop (login: false → true)", "update role password shop (it has no password)")
	expectLines(t, "undeclared", linesOf(Undeclared(want, have)),
		"delete role membership shop_a in shop (nobody declares it)", "delete role membership shop_b in shop (nobody declares it)",
		"delete role shop_a (nobody declares it)", "delete role shop_b (nobody declares it)")
}

func TestAnAdminOptionOfALoginIsUndeclared(t *testing.T) {
	want, have := alternatingShop(login("shop_a", firstPassword)), stateOfShop(t)
	have.Memberships[1].Admin = true
	expectLines(t, "undeclared", linesOf(Undeclared(want, have)),
		"delete role membership shop_a in shop (nobody declares its admin option)")
}

func TestSessionsAreSetWithQuotedNames(t *testing.T) {
	hostile := `Sh"op'; --`
	want := Desired{Roles: []site.Role{{Name: hostile, Login: true, Password: "a.b", ConnectionLimit: -1, Alternating: true}}}
	have := Actual{Roles: map[string]State{hostile + "_a": {ActsAs: map[string]string{`d"b`: "x"}}}}
	changes := diffSessions(want, have)
	expectLines(t, "statements", texts(t, want, have, changesOf(changes)),
		`ALTER ROLE "Sh""op'; --_a" SET role = 'Sh"op''; --'`,
		`ALTER ROLE "Sh""op'; --_a" IN DATABASE "d""b" RESET role`,
		`ALTER ROLE "Sh""op'; --_b" SET role = 'Sh"op''; --'`,
	)
}

func TestCheckRefusesLoginsThatAreNobodys(t *testing.T) {
	want := alternatingShop(login("shop_c", "x"), login("shop_a", "hidden\n"), login("shop_a", "y"), Login{Name: "shop_b"})
	want.Roles = append(want.Roles, site.Role{Name: "shop_b"}, site.Role{Name: "plain"},
		site.Role{Name: strings.Repeat("x", 62), Alternating: true})
	want.Logins["plain"] = nil
	err := want.Check()
	if err == nil {
		t.Fatal("no error")
	}
	for _, problem := range []string{
		`login "shop_c": the logins of role "shop" are "shop_a" and "shop_b"`, `login "shop_a" of role "shop": given twice`,
		`password of login "shop_a", secret shop.password: it holds other characters`, `password of login "shop_b", secret shop.password: it is empty`,
		`logins of "plain": there is no alternating role of this name`, `role "shop_b" is declared, and needed for an alternating role too`,
		"64 bytes; a name has at most 63",
	} {
		if !strings.Contains(err.Error(), problem) {
			t.Errorf("%q is not in\n%v", problem, err)
		}
	}
	if strings.Contains(err.Error(), "hidden") {
		t.Errorf("the error shows a password: %v", err)
	}
	if hint := plan.HintOf(err); hint != "rotate it with: site secrets rotate shop.password" {
		t.Errorf("hint %q", hint)
	}
}
