package site

import (
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/hashicorp/hcl/v2"
)

// postgresCheck holds databases, roles and grants of all components against each
// other: there is one Postgres.
type postgresCheck struct {
	problems         *problems
	databases, roles map[string]hcl.Range
	secrets          map[string]Secret
	// passwords are the roles by the secret that is their password, in the order of the files.
	passwords map[string][]*roleBlock
	unclear   map[string]bool
	// complete says that every component could be read: what is not declared does not exist.
	complete bool
}

func (l *loader) checkPostgres(site string, placed []placedComponent, active []string) {
	c := &postgresCheck{
		problems: l.problems, databases: map[string]hcl.Range{}, roles: map[string]hcl.Range{},
		secrets: map[string]Secret{}, passwords: map[string][]*roleBlock{},
		unclear: l.unclear(placed, active), complete: true,
	}
	for _, isUnclear := range c.unclear {
		c.complete = c.complete && !isUnclear
	}
	for _, component := range placed {
		for _, secret := range component.Secrets {
			c.secrets[secret.FullName()] = secret
		}
		if component.decoded == nil {
			continue
		}
		for _, block := range component.decoded.Databases {
			c.unique(c.databases, "database", block.Name, block.NameAtRange)
		}
		for _, block := range component.decoded.Roles {
			c.unique(c.roles, "role", block.Name, block.NameAtRange)
			if isSet(block.Body, "password") {
				full := fullSecretName(component.Name, block.Password)
				c.passwords[full] = append(c.passwords[full], block)
			}
		}
	}
	for _, component := range placed {
		if component.decoded == nil {
			continue
		}
		if !slices.Contains(active, PostgresComponent) {
			if first, uses := component.decoded.usesPostgres(); uses {
				l.problems.add(first, "Databases without Postgres", "Component %q declares databases, roles or grants: add component %q {} to %s.",
					component.Name, PostgresComponent, path.Join(sitesFolder, site, siteFileName))
			}
		}
		c.component(component)
	}
	c.checkMemberships(placed)
}

// usesPostgres gives the first place where a component needs Postgres.
func (f *componentFile) usesPostgres() (hcl.Range, bool) {
	switch {
	case len(f.Databases) > 0:
		return f.Databases[0].NameAtRange, true
	case len(f.Roles) > 0:
		return f.Roles[0].NameAtRange, true
	case len(f.Grants) > 0:
		return f.Grants[0].RoleAtRange, true
	}
	return hcl.Range{}, false
}

func (c *postgresCheck) unique(seen map[string]hcl.Range, what, name string, subject hcl.Range) {
	if first, taken := seen[name]; taken {
		c.problems.add(subject, "Duplicate "+what, "A %s named %q is already declared at %s; a site has one Postgres.", what, name, place(first))
		return
	}
	seen[name] = subject
}

// declared reports a reference to a role or database that no component declares.
func (c *postgresCheck) declared(known map[string]hcl.Range, what, name string, subject hcl.Range) {
	if _, exists := known[name]; exists || !c.complete {
		return
	}
	var names []string
	for known := range known {
		names = append(names, known)
	}
	c.problems.add(subject, "Unknown "+what, "No active component declares a %s %q.%s", what, name, didYouMean(name, names, what+"s"))
}

func (c *postgresCheck) component(placed placedComponent) {
	for _, block := range placed.decoded.Databases {
		if isSet(block.Body, "owner") {
			c.declared(c.roles, "role", block.Owner, at(block.Body, "owner"))
		}
	}
	for _, block := range placed.decoded.Roles {
		c.logins(block)
		for i, name := range block.MemberOf {
			c.declared(c.roles, "role", name, atElement(block.Body, "member_of", i))
		}
		if isSet(block.Body, "password") {
			c.password(placed, block)
		}
	}
	for _, block := range placed.decoded.Grants {
		c.declared(c.roles, "role", block.Role, block.RoleAtRange)
		if isSet(block.Body, "database") {
			c.declared(c.databases, "database", block.Database, at(block.Body, "database"))
		}
		if isSet(block.Body, "default_for") {
			c.declared(c.roles, "role", block.DefaultFor, at(block.Body, "default_for"))
		}
	}
}

func (c *postgresCheck) password(placed placedComponent, block *roleBlock) {
	subject, full := at(block.Body, "password"), fullSecretName(placed.Name, block.Password)
	secret, declared := c.secrets[full]
	owner, name, _ := strings.Cut(full, ".")
	switch {
	case !declared && c.unclear[owner]:
	case !declared:
		names := []string{}
		for name := range c.secrets {
			names = append(names, name)
		}
		text := fmt.Sprintf("No active component declares a secret %q.", full)
		if near := nearest(full, names); near != "" {
			text += fmt.Sprintf(" Did you mean %q?", near)
		} else if owner == placed.Name {
			text += fmt.Sprintf(" Declare it in %s: secret %q { generated {} }.", placed.file.Filename, name)
		}
		c.problems.add(subject, "Unknown secret", "%s", text)
	case secret.ProducedBy != nil && secret.ProducedBy.Component != "":
		c.problems.add(subject, "Password produced by a job", "Roles are made before jobs run, and %s is produced by the job %q: use a secret that is generated, external or produced by a command.", full, secret.ProducedBy.Component)
	default:
		c.turns(block, secret)
	}
}

// logins reports a login of an alternating role whose name another role has.
func (c *postgresCheck) logins(block *roleBlock) {
	if !block.Alternating {
		return
	}
	a, b := Role{Name: block.Name}.Logins()
	for _, login := range []string{a, b} {
		if other, taken := c.roles[login]; taken {
			c.problems.add(other, "Duplicate role", "%q is a login of the alternating role %q at %s; choose another name.", login, block.Name, place(block.NameAtRange))
		}
	}
}

// turns holds a password against the roles that have it: a new one reaches
// running tasks without a gap only where the old one works beside it.
func (c *postgresCheck) turns(block *roleBlock, secret Secret) {
	subject, all, full := at(block.Body, "password"), c.passwords[secret.FullName()], secret.FullName()
	if slices.ContainsFunc(all, func(one *roleBlock) bool { return one.Alternating }) {
		if first := all[0]; first.Name != block.Name {
			c.problems.add(subject, "Shared password of an alternating role", "%s is the password of role %q too, at %s, and one of the two is alternating: a user name belongs to the password, so give each a secret of its own.",
				full, first.Name, place(at(first.Body, "password")))
		}
		return
	}
	if secret.Rotation != nil && secret.Rotation.Every > 0 && secret.External == nil {
		c.problems.add(subject, "Password that cannot be rotated", "%s has rotation.every at %s, and role %q has one login, which a new password would lock out of running tasks: add alternating = true to the role, and let its templates read the user name as .Data.data.%s.",
			full, place(secret.Rotation.Range), block.Name, UsernameField)
	}
}

// checkMemberships reports roles that are members of each other, which Postgres refuses.
func (c *postgresCheck) checkMemberships(placed []placedComponent) {
	members, blocks, reported := map[string][]need{}, []*roleBlock{}, map[string]bool{}
	for _, component := range placed {
		if component.decoded == nil {
			continue
		}
		for _, block := range component.decoded.Roles {
			blocks = append(blocks, block)
			for _, name := range block.MemberOf {
				if name != block.Name {
					members[block.Name] = append(members[block.Name], need{component: name})
				}
			}
		}
	}
	for _, block := range blocks {
		if reported[block.Name] {
			continue
		}
		cycle := shortestCycle(block.Name, func(name string) []need { return members[name] })
		if cycle == nil {
			continue
		}
		text := block.Name
		for _, step := range cycle {
			reported[step.component] = true
			text += " is a member of " + step.component
		}
		index := max(0, slices.Index(block.MemberOf, cycle[0].component))
		c.problems.add(atElement(block.Body, "member_of", index), "Roles are members of each other", "%s.", text)
	}
}
