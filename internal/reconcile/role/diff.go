package role

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/site"
)

const nobodyDeclares = "nobody declares it"

func diffConfiguration(have Actual) []item {
	var items []item
	for _, file := range []struct {
		name  string
		stale bool
	}{{"pg_hba.conf", have.HbaStale}, {"pg_ident.conf", have.IdentStale}} {
		if file.stale {
			items = append(items, item{
				change: plan.Change{Action: plan.Update, Kind: KindConfiguration, Target: file.name,
					Reason: "the server has not loaded the file as it is"},
				phase: phaseReload, statements: []Statement{{Reload: true}},
			})
		}
	}
	return items
}

// attribute is one property of a role, as the server has it and as it should be.
type attribute struct {
	name       string
	have, want string
	sql        string
}

func attributesOf(want account, have State) []attribute {
	if want.loginUnknown {
		want.Login = have.Login
	}
	option := func(name, word string, have, want bool) attribute {
		if !want {
			word = "NO" + word
		}
		return attribute{name, strconv.FormatBool(have), strconv.FormatBool(want), word}
	}
	validUntil := attribute{"valid until", "for ever", "for ever", "VALID UNTIL 'infinity'"}
	if have.ValidUntil != "" {
		validUntil.have = have.ValidUntil
	}
	return []attribute{
		option("login", "LOGIN", have.Login, want.Login),
		option("superuser", "SUPERUSER", have.Superuser, false),
		option("create databases", "CREATEDB", have.CreateDB, false),
		option("create roles", "CREATEROLE", have.CreateRole, false),
		option("inherit", "INHERIT", have.Inherit, true),
		option("replication", "REPLICATION", have.Replication, want.Replication),
		option("bypass row security", "BYPASSRLS", have.BypassRLS, false),
		{"connection limit", limit(have.ConnectionLimit), limit(want.ConnectionLimit), fmt.Sprintf("CONNECTION LIMIT %d", want.ConnectionLimit)},
		validUntil,
	}
}

func limit(connections int) string {
	if connections < 0 {
		return "none"
	}
	return strconv.Itoa(connections)
}

func diffRoles(want Desired, have Actual) []item {
	var items []item
	for _, role := range accountsOf(want) {
		state, exists := have.Roles[role.Name]
		if !exists {
			items = append(items, createRole(role))
			continue
		}
		items = append(items, updateRole(role, state)...)
		items = append(items, updatePassword(role, state)...)
	}
	return items
}

func updateRole(role account, state State) []item {
	var reasons, words []string
	for _, attribute := range attributesOf(role, state) {
		if attribute.have != attribute.want {
			reasons = append(reasons, fmt.Sprintf("%s: %s → %s", attribute.name, attribute.have, attribute.want))
			words = append(words, attribute.sql)
		}
	}
	if len(reasons) == 0 {
		return nil
	}
	one := item{
		change: plan.Change{Action: plan.Update, Kind: KindRole, Target: display(role.Name), Reason: strings.Join(reasons, ", ")},
		phase:  phaseRoles, statements: sql("", "ALTER ROLE %s WITH %s", quote(role.Name), strings.Join(words, " ")),
	}
	if state.Login && !role.Login && !role.loginUnknown {
		one.phase = phaseStandDown
	}
	return []item{one}
}

func updatePassword(role account, state State) []item {
	reason := role.passwordReason(state.Verifier)
	if reason == "" {
		return nil
	}
	one := item{
		change: plan.Change{Action: plan.Update, Kind: KindPassword, Target: display(role.Name), Reason: reason},
		phase:  phaseRoles, password: role.password, statements: sql("", "ALTER ROLE %s", quote(role.Name)),
	}
	if role.password.IsZero() {
		one.statements[0].SQL += " PASSWORD NULL"
		one.phase = phaseStandDown
	}
	return []item{one}
}

func createRole(role account) item {
	var words, details []string
	fresh := State{Inherit: true, ConnectionLimit: -1}
	for _, attribute := range attributesOf(role, fresh) {
		if attribute.have != attribute.want {
			details = append(details, attribute.name+": "+attribute.want)
		}
		words = append(words, attribute.sql)
	}
	words = words[:len(words)-1] // a new role never expires
	if !role.password.IsZero() {
		details = append(details, "with a password")
	}
	return item{
		change: plan.Change{Action: plan.Create, Kind: KindRole, Target: display(role.Name), Reason: "no such role", Details: details},
		phase:  phaseRoles, password: role.password,
		statements: sql("", "CREATE ROLE %s WITH %s", quote(role.Name), strings.Join(words, " ")),
	}
}

func membershipTarget(group, member string) string {
	return fmt.Sprintf("%s in %s", display(member), display(group))
}

func diffMemberships(want Desired, have Actual) []item {
	held := map[Membership]bool{}
	for _, membership := range have.Memberships {
		held[Membership{Role: membership.Role, Member: membership.Member}] = true
	}
	var items []item
	for _, role := range accountsOf(want) {
		for _, group := range role.MemberOf {
			if held[Membership{Role: group, Member: role.Name}] {
				continue
			}
			items = append(items, item{
				change: plan.Change{Action: plan.Create, Kind: KindMembership, Target: membershipTarget(group, role.Name), Reason: "not a member"},
				phase:  phaseMemberships, statements: sql("", "GRANT %s TO %s", quote(group), quote(role.Name)),
			})
		}
	}
	return items
}

func undeclaredMemberships(want Desired, have Actual) []item {
	declared := map[Membership]bool{}
	for _, role := range accountsOf(want) {
		for _, group := range role.MemberOf {
			declared[Membership{Role: group, Member: role.Name}] = true
		}
	}
	var items []item
	for _, membership := range have.Memberships {
		if have.Roles[membership.Member].System {
			continue
		}
		wanted := declared[Membership{Role: membership.Role, Member: membership.Member}]
		if wanted && !membership.Admin {
			continue
		}
		reason, option := nobodyDeclares, ""
		if wanted {
			reason, option = "nobody declares its admin option", "ADMIN OPTION FOR "
		}
		items = append(items, item{
			change: plan.Change{Action: plan.Delete, Kind: KindMembership, Target: membershipTarget(membership.Role, membership.Member), Reason: reason},
			phase:  phaseLeave, statements: sql("", "REVOKE %s%s FROM %s", option, quote(membership.Role), quote(membership.Member)),
		})
	}
	return items
}

func diffDatabases(want Desired, have Actual) []item {
	var items []item
	for _, database := range want.Databases {
		change := plan.Change{Kind: KindDatabase, Target: display(database.Name)}
		state, exists := have.Databases[database.Name]
		if !exists {
			change.Action, change.Reason = plan.Create, "no such database"
			change.Details = []string{"owner: " + display(database.Owner), "connection limit: " + limit(database.ConnectionLimit)}
			items = append(items, item{change: change, phase: phaseCreateDatabases,
				statements: alone("CREATE DATABASE %s OWNER %s CONNECTION LIMIT %d", quote(database.Name), quote(database.Owner), database.ConnectionLimit)})
			continue
		}
		var reasons []string
		var statements []Statement
		if state.Owner != database.Owner {
			reasons = append(reasons, fmt.Sprintf("owner: %s → %s", display(state.Owner), display(database.Owner)))
			statements = append(statements, sql("", "ALTER DATABASE %s OWNER TO %s", quote(database.Name), quote(database.Owner))...)
		}
		if state.ConnectionLimit != database.ConnectionLimit {
			reasons = append(reasons, fmt.Sprintf("connection limit: %s → %s", limit(state.ConnectionLimit), limit(database.ConnectionLimit)))
			statements = append(statements, sql("", "ALTER DATABASE %s CONNECTION LIMIT %d", quote(database.Name), database.ConnectionLimit)...)
		}
		if len(reasons) > 0 {
			change.Action, change.Reason = plan.Update, strings.Join(reasons, ", ")
			items = append(items, item{change: change, phase: phaseCluster, statements: statements})
		}
	}
	return items
}

func undeclaredDatabases(want Desired, have Actual) []item {
	var items []item
	for _, name := range slices.Sorted(maps.Keys(have.Databases)) {
		state := have.Databases[name]
		if state.System || slices.ContainsFunc(want.Databases, func(d site.Database) bool { return d.Name == name }) {
			continue
		}
		details := []string{"owner: " + display(state.Owner)}
		if state.Sessions > 0 {
			details = append(details, fmt.Sprintf("connected sessions: %d", state.Sessions))
		}
		items = append(items, item{
			change: plan.Change{Action: plan.Delete, Kind: KindDatabase, Target: display(name), Reason: nobodyDeclares,
				Precondition: "nobody is connected", Details: details},
			phase: phaseDropDatabases, statements: alone("DROP DATABASE %s", quote(name)),
		})
	}
	return items
}

func undeclaredRoles(want Desired, have Actual) []item {
	accounts := accountsOf(want)
	var items []item
	for _, name := range slices.Sorted(maps.Keys(have.Roles)) {
		if have.Roles[name].System || slices.ContainsFunc(accounts, func(one account) bool { return one.Name == name }) {
			continue
		}
		items = append(items, item{
			change: plan.Change{Action: plan.Delete, Kind: KindRole, Target: display(name), Reason: nobodyDeclares, Details: belongings(name, have)},
			phase:  phaseDropRoles, statements: alone("DROP ROLE %s", quote(name)),
		})
	}
	return items
}

// belongings are what a role owns, which keeps it from being dropped.
func belongings(role string, have Actual) []string {
	var lines []string
	for _, name := range slices.Sorted(maps.Keys(have.Databases)) {
		if have.Databases[name].Owner == role {
			lines = append(lines, "owns database "+display(name))
		}
	}
	owned := map[string]int{}
	for _, object := range have.Objects {
		if object.Owner == role && object.DefaultFor == "" && object.Kind != site.OnDatabase && object.Kind != onColumn {
			owned[object.Database]++
		}
	}
	for _, database := range slices.Sorted(maps.Keys(owned)) {
		lines = append(lines, fmt.Sprintf("owns objects in database %s: %d", display(database), owned[database]))
	}
	return lines
}
