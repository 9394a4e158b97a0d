package site

import (
	"regexp"
	"slices"
	"strings"

	"github.com/hashicorp/hcl/v2"
)

// What component.hcl says of Postgres.

type databaseBlock struct {
	Name            string    `hcl:"name,label"`
	Owner           string    `hcl:"owner"`
	ConnectionLimit int       `hcl:"connection_limit,optional"`
	Body            hcl.Body  `hcl:",body"`
	Range           hcl.Range `hcl:",def_range"`
	NameAtRange     hcl.Range `hcl:"name,label_range"`
}

type roleBlock struct {
	Name            string    `hcl:"name,label"`
	Login           bool      `hcl:"login,optional"`
	Password        string    `hcl:"password,optional"`
	ConnectionLimit int       `hcl:"connection_limit,optional"`
	MemberOf        []string  `hcl:"member_of,optional"`
	Replication     bool      `hcl:"replication,optional"`
	Peers           []string  `hcl:"peers,optional"`
	Alternating     bool      `hcl:"alternating,optional"`
	Body            hcl.Body  `hcl:",body"`
	Range           hcl.Range `hcl:",def_range"`
	NameAtRange     hcl.Range `hcl:"name,label_range"`
}

type grantBlock struct {
	Role        string    `hcl:"role,label"`
	Database    string    `hcl:"database"`
	Schema      string    `hcl:"schema,optional"`
	Tables      []string  `hcl:"tables,optional"`
	Sequences   []string  `hcl:"sequences,optional"`
	Functions   []string  `hcl:"functions,optional"`
	Privileges  []string  `hcl:"privileges"`
	DefaultFor  string    `hcl:"default_for,optional"`
	Body        hcl.Body  `hcl:",body"`
	Range       hcl.Range `hcl:",def_range"`
	RoleAtRange hcl.Range `hcl:"role,label_range"`
}

const (
	unlimited           = -1
	mostConnections     = 10000
	longestAlternating  = 61
	everything          = "*"
	allPrivileges       = "ALL"
	temporaryPrivilege  = "TEMPORARY"
	postgresNameRule    = "1 to 63 lower-case letters, digits and underscores, with no digit first"
	postgresReservation = "belongs to Postgres itself"
)

var (
	postgresNamePattern = regexp.MustCompile(`^[a-z_][a-z0-9_]{0,62}$`)
	relationPattern     = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_$-]{0,62}$`)
	functionPattern     = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_$]{0,62}\([A-Za-z0-9_ ,.\[\]]*\)$`)
	// postgresNames are databases and role names that Postgres has or refuses.
	postgresNames = []string{"postgres", "template0", "template1", "public", "none"}
	// privileges are those of Postgres 15, by what they are on.
	privileges = map[GrantObject][]string{
		OnDatabase:  {"CONNECT", "CREATE", temporaryPrivilege},
		OnSchema:    {"CREATE", "USAGE"},
		OnTables:    {"DELETE", "INSERT", "REFERENCES", "SELECT", "TRIGGER", "TRUNCATE", "UPDATE"},
		OnSequences: {"SELECT", "UPDATE", "USAGE"},
		OnFunctions: {"EXECUTE"},
	}
)

func checkPostgresName(p *problems, what, name string, subject hcl.Range) {
	switch {
	case !postgresNamePattern.MatchString(name):
		p.add(subject, "Invalid "+what+" name", "%q must be %s.", name, postgresNameRule)
	case slices.Contains(postgresNames, name) || strings.HasPrefix(name, "pg_"):
		p.add(subject, "Reserved "+what+" name", "%q %s; choose another name.", name, postgresReservation)
	}
}

func connectionLimit(p *problems, body hcl.Body, value int) int {
	if !isSet(body, "connection_limit") {
		return unlimited
	}
	if value < unlimited || value > mostConnections {
		p.add(at(body, "connection_limit"), "Invalid connection limit", "%d is not between 0 and %d, or -1 for none.", value, mostConnections)
	}
	return value
}

func (f *componentFile) databases(p *problems) []Database {
	var databases []Database
	for _, block := range f.Databases {
		if block.Body == nil {
			continue
		}
		checkPostgresName(p, "database", block.Name, block.NameAtRange)
		databases = append(databases, Database{
			Name: block.Name, Owner: block.Owner, Range: block.Range,
			ConnectionLimit: connectionLimit(p, block.Body, block.ConnectionLimit),
		})
	}
	return databases
}

func (f *componentFile) roles(component string, p *problems) []Role {
	var roles []Role
	for _, block := range f.Roles {
		if block.Body != nil {
			roles = append(roles, block.role(component, p))
		}
	}
	return roles
}

func (b *roleBlock) role(component string, p *problems) Role {
	role := Role{
		Name: b.Name, Login: b.Login, MemberOf: b.MemberOf, Replication: b.Replication, Peers: b.Peers,
		Alternating: b.Alternating, Range: b.Range,
		ConnectionLimit: connectionLimit(p, b.Body, b.ConnectionLimit),
	}
	checkPostgresName(p, "role", b.Name, b.NameAtRange)
	if isSet(b.Body, "password") {
		role.Password = fullSecretName(component, b.Password)
	}
	if b.Alternating {
		b.checkAlternating(p)
	} else {
		b.checkLogin(p)
	}
	b.checkLists(p)
	return role
}

// checkLogin holds what a role says of its login against each other.
func (b *roleBlock) checkLogin(p *problems) {
	if isSet(b.Body, "password") && !b.Login {
		p.add(at(b.Body, "password"), "Password of a role without login", "Add login = true to role %q, or leave the password out.", b.Name)
	}
	if len(b.Peers) > 0 && !b.Login {
		p.add(at(b.Body, "peers"), "Peers of a role without login", "Add login = true to role %q, or leave peers out.", b.Name)
	}
	if b.Login && !isSet(b.Body, "password") && len(b.Peers) == 0 {
		p.add(b.Range, "Nobody can log in", "Role %q has login = true and neither a password nor peers: give it one of them, or leave login out.", b.Name)
	}
}

// checkAlternating insists on what two logins that take turns can have.
func (b *roleBlock) checkAlternating(p *problems) {
	const summary = "Unsuitable alternating role"
	subject := at(b.Body, "alternating")
	switch {
	case !b.Login:
		p.add(subject, summary, "Two logins take turns for role %q: add login = true to it, or leave alternating out.", b.Name)
	case !isSet(b.Body, "password"):
		p.add(subject, summary, "Two logins take turns for role %q, each with its password: add password = \"SECRET\" to it, or leave alternating out.", b.Name)
	}
	if len(b.Peers) > 0 {
		p.add(at(b.Body, "peers"), summary, "Role %q itself cannot log in, by a peer neither: declare another role for the peers.", b.Name)
	}
	if b.Replication {
		p.add(at(b.Body, "replication"), summary, "The logins of role %q would not inherit the privilege to stream the log: declare another role for it.", b.Name)
	}
	if len(b.Name) > longestAlternating && len(b.Name) <= longestAlternating+len(firstLogin) {
		p.add(b.NameAtRange, "Invalid role name", "The name of an alternating role has at most %d characters, since its logins are named with %s and %s behind it.", longestAlternating, firstLogin, secondLogin)
	}
}

// checkLists finds what peers and member_of cannot name.
func (b *roleBlock) checkLists(p *problems) {
	for i, peer := range b.Peers {
		switch {
		case !accountPattern.MatchString(peer):
			p.add(atElement(b.Body, "peers", i), "Invalid peer", "%q is not the name of a system user.", peer)
		case slices.Index(b.Peers, peer) < i:
			p.add(atElement(b.Body, "peers", i), "Duplicate peer", "%q is already in peers.", peer)
		}
	}
	for i, name := range b.MemberOf {
		switch {
		case slices.Index(b.MemberOf, name) < i:
			p.add(atElement(b.Body, "member_of", i), "Duplicate reference", "%q is already in member_of.", name)
		case name == b.Name:
			p.add(atElement(b.Body, "member_of", i), "Member of itself", "Role %q cannot be a member of itself.", name)
		}
	}
}

func (f *componentFile) grants(p *problems) []Grant {
	var grants []Grant
	for _, block := range f.Grants {
		if block.Body != nil {
			grants = append(grants, block.grant(p))
		}
	}
	return grants
}

func (b *grantBlock) grant(p *problems) Grant {
	grant := Grant{Role: b.Role, Database: b.Database, Schema: b.Schema, DefaultFor: b.DefaultFor, Range: b.Range, Object: OnDatabase}
	if isSet(b.Body, "schema") {
		grant.Object = OnSchema
		if !relationPattern.MatchString(b.Schema) {
			p.add(at(b.Body, "schema"), "Invalid schema", "%q is not the name of a schema.", b.Schema)
		}
	}
	var named []string
	for _, kind := range []struct {
		attribute string
		object    GrantObject
		names     []string
	}{{"tables", OnTables, b.Tables}, {"sequences", OnSequences, b.Sequences}, {"functions", OnFunctions, b.Functions}} {
		if isSet(b.Body, kind.attribute) {
			named = append(named, kind.attribute)
			grant.Object, grant.Names = kind.object, kind.names
			b.checkNames(kind.attribute, kind.names, p)
		}
	}
	if len(named) > 1 {
		p.add(b.Range, "Grant on several kinds", "The grant has %s; write one block for each.", strings.Join(named, " and "))
		return grant // which privileges there are depends on the kind
	}
	if len(named) == 1 && !isSet(b.Body, "schema") {
		p.add(at(b.Body, named[0]), "Grant without a schema", "Name the schema of the %s, such as schema = \"public\".", named[0])
	}
	if isSet(b.Body, "default_for") && len(named) == 0 {
		p.add(at(b.Body, "default_for"), "Unexpected default_for", "Only a grant on tables, sequences or functions has it.")
	}
	grant.Privileges = b.privileges(grant.Object, p)
	return grant
}

func (b *grantBlock) checkNames(attribute string, names []string, p *problems) {
	if len(names) == 0 {
		p.add(at(b.Body, attribute), "Empty list", "Name at least one, or \"*\" for all that there are.")
	}
	for i, name := range names {
		subject := atElement(b.Body, attribute, i)
		switch {
		case name == everything && len(names) > 1:
			p.add(subject, "Needless name", "\"*\" is all of them and stands alone.")
		case slices.Index(names, name) < i:
			p.add(subject, "Duplicate name", "%q is already in %s.", name, attribute)
		case name == everything:
		case attribute == "functions" && !functionPattern.MatchString(name):
			p.add(subject, "Invalid function", "%q must be a function of the schema with the types of its arguments, such as \"refresh(integer, text)\" or \"refresh()\".", name)
		case attribute != "functions" && !relationPattern.MatchString(name):
			p.add(subject, "Invalid name", "%q must be a name of the schema's %s, without the schema.", name, attribute)
		}
	}
}

// privileges spells ALL out, and sorts.
func (b *grantBlock) privileges(object GrantObject, p *problems) []string {
	allowed := privileges[object]
	if len(b.Privileges) == 0 {
		p.add(at(b.Body, "privileges"), "Empty list", "Name at least one privilege: %s, or ALL.", strings.Join(allowed, ", "))
	}
	var names []string
	for i, name := range b.Privileges {
		subject := atElement(b.Body, "privileges", i)
		upper := strings.ToUpper(name)
		switch {
		case name == allPrivileges && len(b.Privileges) > 1:
			p.add(subject, "Needless privilege", "ALL is every privilege and stands alone.")
		case name == allPrivileges:
			names = append(names, allowed...)
		case name == "TEMP" && object == OnDatabase:
			p.add(subject, "Abbreviated privilege", "Write %s.", temporaryPrivilege)
		case upper != name && (upper == allPrivileges || slices.Contains(allowed, upper)):
			p.add(subject, "Privilege in lower case", "Write %q.", upper)
		case !slices.Contains(allowed, name):
			p.add(subject, "Unknown privilege", "A %s has no privilege %q; it has %s, or ALL.", object, name, strings.Join(allowed, ", "))
		case slices.Contains(names, name):
			p.add(subject, "Duplicate privilege", "%q is already in privileges.", name)
		default:
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}
