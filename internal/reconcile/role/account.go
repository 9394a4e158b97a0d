package role

import (
	"fmt"
	"maps"
	"slices"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/site"
)

// account is a role of the server as it should be: a declared one, or one of
// the two logins of a declared one that alternates.
type account struct {
	site.Role
	// actsAs is the role that its sessions have the rights of, and in whose name
	// they create; empty where that is the role's own affair.
	actsAs string
	// turns is of an alternating role: who may log in depends on the time.
	turns bool
	// loginUnknown and passwordUnknown are neither compared nor changed.
	loginUnknown, passwordUnknown bool
	password                      secret.Value
}

func accountsOf(want Desired) []account {
	var accounts []account
	for _, role := range want.Roles {
		if role.Alternating {
			accounts = append(accounts, alternatingAccounts(role, want.Logins)...)
			continue
		}
		one := account{Role: role}
		if role.Password != "" {
			password, known := want.Passwords[role.Name]
			one.password, one.passwordUnknown = password, !known
		}
		accounts = append(accounts, one)
	}
	return accounts
}

// alternatingAccounts are the role that owns things and its two logins, which
// are members of it. All that they create is the role's: no login ever owns
// what would keep the other from it.
func alternatingAccounts(role site.Role, allLogins map[string][]Login) []account {
	logins, known := allLogins[role.Name]
	a, b := role.Logins()
	accounts := make([]account, 0, 3)
	for _, name := range []string{role.Name, a, b} {
		one := account{Role: role, turns: true, loginUnknown: !known, passwordUnknown: !known}
		if name != role.Name {
			one.Name, one.actsAs, one.MemberOf, one.Replication = name, role.Name, []string{role.Name}, false
		}
		at := slices.IndexFunc(logins, func(login Login) bool { return login.Name == name })
		if one.Login = at >= 0; one.Login {
			one.password = logins[at].Password
		}
		accounts = append(accounts, one)
	}
	return accounts
}

// passwordReason says how a password differs; empty where it does not, and
// where it is declared but not known here.
func (a account) passwordReason(verifier secret.Value) string {
	switch {
	case a.passwordUnknown, a.password.IsZero() && verifier.IsZero():
		return ""
	case a.password.IsZero() && a.turns:
		return "it has a password and may not log in now"
	case a.password.IsZero():
		return "it has a password that nobody declares"
	case verifier.IsZero():
		return "it has no password"
	case !isScram(verifier):
		return "the password is not stored as " + scramMechanism
	case !Verify(verifier, a.password):
		return "password differs"
	}
	return ""
}

// diffSessions finds logins whose sessions do not become the role that they are
// logins of, in a database or in all.
func diffSessions(want Desired, have Actual) []item {
	var items []item
	for _, one := range accountsOf(want) {
		if one.actsAs == "" {
			continue
		}
		reason, statements := actsAs(one, have.Roles[one.Name].ActsAs)
		if reason != "" {
			items = append(items, item{
				change: plan.Change{Action: plan.Update, Kind: KindSession, Target: display(one.Name), Reason: reason},
				phase:  phaseSessions, statements: statements,
			})
		}
	}
	return items
}

func actsAs(one account, have map[string]string) (reason string, statements []Statement) {
	describe := func(role string) string {
		if role == "" {
			return "itself"
		}
		return display(role)
	}
	if have[""] != one.actsAs {
		reason = fmt.Sprintf("acts as: %s → %s", describe(have[""]), display(one.actsAs))
		statements = sql("", "ALTER ROLE %s SET role = %s", quote(one.Name), literal(one.actsAs))
	}
	// What is set for one database goes before what is set for all.
	for _, database := range slices.Sorted(maps.Keys(have)) {
		if database == "" || have[database] == one.actsAs {
			continue
		}
		if reason != "" {
			reason += ", "
		}
		reason += fmt.Sprintf("acts in database %s as: %s → %s", display(database), describe(have[database]), display(one.actsAs))
		statements = append(statements, sql("", "ALTER ROLE %s IN DATABASE %s RESET role", quote(one.Name), quote(database))...)
	}
	return reason, statements
}

// checkLogins refuses logins that are nobody's, and names that two roles would share.
func (want Desired) checkLogins() []error {
	var problems []error
	turns := map[string]bool{}
	for _, one := range accountsOf(want) {
		if before, twice := turns[one.Name]; twice && (before || one.turns) {
			problems = append(problems, fmt.Errorf("role %q is declared, and needed for an alternating role too", one.Name))
		}
		turns[one.Name] = one.turns
	}
	for _, name := range slices.Sorted(maps.Keys(want.Logins)) {
		at := slices.IndexFunc(want.Roles, func(role site.Role) bool { return role.Name == name && role.Alternating })
		if at < 0 {
			problems = append(problems, fmt.Errorf("logins of %q: there is no alternating role of this name", name))
			continue
		}
		problems = append(problems, checkLoginsOf(want.Roles[at], want.Logins[name])...)
	}
	return problems
}

func checkLoginsOf(role site.Role, logins []Login) []error {
	var problems []error
	a, b := role.Logins()
	seen := map[string]bool{}
	for _, login := range logins {
		if !slices.Contains([]string{role.Name, a, b}, login.Name) {
			problems = append(problems, fmt.Errorf("login %q: the logins of role %q are %q and %q", login.Name, role.Name, a, b))
		}
		if seen[login.Name] {
			problems = append(problems, fmt.Errorf("login %q of role %q: given twice", login.Name, role.Name))
		}
		seen[login.Name] = true
		if err := CheckPassword(login.Password); err != nil {
			err = fmt.Errorf("password of login %q, secret %s: %w", login.Name, role.Password, err)
			problems = append(problems, plan.WithHint(err, "rotate it with: site secrets rotate %s", role.Password))
		}
	}
	return problems
}
