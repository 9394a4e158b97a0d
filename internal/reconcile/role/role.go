// Package role holds the pure half of converging Postgres: the plain states of
// databases, roles, memberships and privileges, their diff, and the statements
// that make it true.
package role

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/site"
)

// The plan.Change kinds.
const (
	KindRole             = "role"
	KindPassword         = "role password"
	KindMembership       = "role membership"
	KindSession          = "role session"
	KindDatabase         = "database"
	KindGrant            = "grant"
	KindDefaultPrivilege = "default privilege"
	KindConfiguration    = "postgres configuration"
)

// Public is the grantee that stands for every role; no role can have the name.
const Public = "public"

// Desired is what a site wants of Postgres.
type Desired struct {
	Databases []site.Database
	Roles     []site.Role
	Grants    []site.Grant
	// Passwords are by role name. The password of a role that declares one and
	// is not in here is neither compared nor changed. Those of alternating roles
	// are in Logins.
	Passwords map[string]secret.Value
	// Logins are by the name of an alternating role: which of its two logins may
	// log in now, and with what; the others may not. It may hold the role itself,
	// for as long as what ran before it alternated still logs in as it. An
	// alternating role that is not in here has logins, but who of them may log in
	// is neither compared nor changed.
	Logins map[string][]Login
}

// Login may log in with its password.
type Login struct {
	Name     string
	Password secret.Value
}

// DesiredOf collects what all active components declare, sorted by name;
// without passwords.
func DesiredOf(s *site.Site) Desired {
	var want Desired
	for _, component := range s.Components {
		want.Databases = append(want.Databases, component.Databases...)
		want.Roles = append(want.Roles, component.Roles...)
		want.Grants = append(want.Grants, component.Grants...)
	}
	slices.SortFunc(want.Databases, func(a, b site.Database) int { return strings.Compare(a.Name, b.Name) })
	slices.SortFunc(want.Roles, func(a, b site.Role) int { return strings.Compare(a.Name, b.Name) })
	slices.SortStableFunc(want.Grants, func(a, b site.Grant) int { return strings.Compare(a.Role, b.Role) })
	return want
}

// Actual is what a Postgres server has.
type Actual struct {
	Roles       map[string]State
	Memberships []Membership
	Databases   map[string]Database
	// Objects are the databases, and of the declared ones all that privileges
	// can be on; default privileges are objects too.
	Objects []Object
	// IdentStale and HbaStale say that pg_ident.conf and pg_hba.conf are newer
	// than what the server has loaded.
	IdentStale, HbaStale bool
}

// State is one role of the server.
type State struct {
	// System roles came with the server.
	System          bool
	Login           bool
	Superuser       bool
	CreateDB        bool
	CreateRole      bool
	Inherit         bool
	Replication     bool
	BypassRLS       bool
	ConnectionLimit int
	// ValidUntil is empty where the role never expires.
	ValidUntil string
	// Verifier is what the server keeps of the password; empty for none.
	Verifier secret.Value
	// ActsAs is the role that its sessions become, by database; that of the empty
	// name is for all databases that are not in here.
	ActsAs map[string]string
}

// Membership is one role's in another.
type Membership struct {
	Role, Member string
	// Admin members may let others in.
	Admin bool
}

// Database is one of the server's databases.
type Database struct {
	System          bool
	Owner           string
	ConnectionLimit int
	// Sessions is how many are connected.
	Sessions int
}

// Further kinds of objects, which components can't declare grants on.
const (
	onColumn  site.GrantObject = "column"
	onSchemas site.GrantObject = "schemas" // as default privilege
	onTypes   site.GrantObject = "type"
)

// Place names what privileges are on.
type Place struct {
	Database string
	Kind     site.GrantObject
	Schema   string // empty for the database itself, and for default privileges of every schema
	Name     string // of a table, sequence or function with its argument types
	Column   string
	// DefaultFor is set for default privileges: those on what the role creates.
	DefaultFor string
}

// Object is a place that exists.
type Object struct {
	Place
	Owner string
	// Signature is how the server writes a function in SQL, quoted by it.
	Signature string
	Held      []Privilege
}

// Privilege is held by a role.
type Privilege struct {
	Role string // Public for everyone
	Name string // "SELECT"
	// Grantor gave it; Grantable is with the grant option.
	Grantor   string
	Grantable bool
	// Initial came with the object and was granted by nobody.
	Initial bool
}

// Check refuses names and values that Postgres would truncate, reserve or
// normalise, since they never settle. All problems are in one error.
func (want Desired) Check() error {
	var problems []error
	name := func(what, name string) {
		if err := checkName(name); err != nil {
			problems = append(problems, fmt.Errorf("%s %q: %w", what, name, err))
		}
	}
	for _, database := range want.Databases {
		name("database", database.Name)
		name("owner of database "+display(database.Name), database.Owner)
		if slices.Contains([]string{"postgres", "template0", "template1"}, database.Name) {
			problems = append(problems, fmt.Errorf("database %q belongs to the server", database.Name))
		}
	}
	for _, role := range accountsOf(want) {
		name("role", role.Name)
		if strings.HasPrefix(role.Name, "pg_") || slices.Contains([]string{"postgres", Public, "none"}, role.Name) {
			problems = append(problems, fmt.Errorf("role %q: the name is reserved by the server", role.Name))
		}
		for _, group := range role.MemberOf {
			name("group of role "+display(role.Name), group)
		}
		if password, known := want.Passwords[role.Name]; known && !role.turns {
			if err := CheckPassword(password); err != nil {
				problems = append(problems, plan.WithHint(fmt.Errorf("password of role %q, secret %s: %w", role.Name, role.Password, err),
					"set it again with: site secrets set %s", role.Password))
			}
		}
	}
	for _, grant := range want.Grants {
		name("role of a grant", grant.Role)
		name("database of a grant", grant.Database)
		known := knownPrivileges(grant.Object)
		if known == nil {
			problems = append(problems, fmt.Errorf("grant to role %q: nothing is granted on a %q", grant.Role, grant.Object))
			continue
		}
		for _, privilege := range grant.Privileges {
			if !slices.Contains(known, canonicalPrivilege(privilege)) {
				problems = append(problems, fmt.Errorf("grant to role %q: there is no privilege %q on a %s", grant.Role, privilege, grant.Object))
			}
		}
	}
	return errors.Join(append(problems, want.checkLogins()...)...)
}

// longestName is NAMEDATALEN - 1; the server cuts longer names without an error.
const longestName = 63

func checkName(name string) error {
	switch {
	case name == "":
		return errors.New("a name is missing")
	case len(name) > longestName:
		return fmt.Errorf("%d bytes; a name has at most %d", len(name), longestName)
	case strings.ContainsRune(name, 0) || !utf8.ValidString(name):
		return errors.New("not a text that Postgres can hold")
	}
	return nil
}

// knownPrivileges are those of PostgreSQL 15 and later; nil for what nothing is granted on.
func knownPrivileges(object site.GrantObject) []string {
	switch object {
	case site.OnDatabase:
		return []string{"CREATE", "TEMPORARY", "CONNECT"}
	case site.OnSchema, onSchemas:
		return []string{"USAGE", "CREATE"}
	case site.OnTables, onColumn:
		return []string{"SELECT", "INSERT", "UPDATE", "DELETE", "TRUNCATE", "REFERENCES", "TRIGGER", "MAINTAIN"}
	case site.OnSequences:
		return []string{"USAGE", "SELECT", "UPDATE"}
	case site.OnFunctions:
		return []string{"EXECUTE"}
	case onTypes:
		return []string{"USAGE"}
	}
	return nil
}

func canonicalPrivilege(name string) string {
	name = strings.ToUpper(strings.TrimSpace(name))
	if name == "TEMP" {
		return "TEMPORARY"
	}
	return name
}
