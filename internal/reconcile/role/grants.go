package role

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/site"
)

// claim is one privilege of one role on one place.
type claim struct {
	Place
	role, privilege string
}

// claims are what the declared grants come to on the objects that there are.
type claims struct {
	required map[claim]bool
	// allowed is held by right without being required: what a new table got
	// from declared default privileges.
	allowed map[claim]bool
	// waiting names what is declared and does not exist.
	waiting []string
	objects map[Place]*Object
}

func claimsOf(want Desired, have Actual) *claims {
	c := &claims{required: map[claim]bool{}, allowed: map[claim]bool{}, objects: objectsOf(want, have)}
	places := map[Place][]Place{} // by database, schema and kind
	for place := range c.objects {
		if place.DefaultFor == "" {
			group := Place{Database: place.Database, Schema: place.Schema, Kind: place.Kind}
			places[group] = append(places[group], place)
		}
	}
	for _, grant := range want.Grants {
		privileges := make([]string, 0, len(grant.Privileges))
		for _, privilege := range grant.Privileges {
			privileges = append(privileges, canonicalPrivilege(privilege))
		}
		c.add(grant, privileges, places[Place{Database: grant.Database, Schema: grant.Schema, Kind: grant.Object}])
	}
	slices.Sort(c.waiting)
	c.waiting = slices.Compact(c.waiting)
	return c
}

// objectsOf are the objects as they are once the databases are as declared.
func objectsOf(want Desired, have Actual) map[Place]*Object {
	objects := map[Place]*Object{}
	for i := range have.Objects {
		objects[have.Objects[i].Place] = &have.Objects[i]
	}
	for _, database := range want.Databases {
		place := Place{Database: database.Name, Kind: site.OnDatabase}
		state, exists := have.Databases[database.Name]
		switch {
		case !exists:
			// What CREATE DATABASE makes.
			created := &Object{Place: place, Owner: database.Owner}
			for _, privilege := range knownPrivileges(site.OnDatabase) {
				created.Held = append(created.Held, Privilege{Role: database.Owner, Name: privilege, Initial: true})
			}
			objects[place] = created
			public := Place{Database: database.Name, Kind: site.OnSchema, Schema: "public"}
			objects[public] = &Object{Place: public}
		case state.Owner != database.Owner && objects[place] != nil:
			// A new owner takes over what the old one holds.
			changed := *objects[place]
			changed.Owner, changed.Held = database.Owner, slices.Clone(changed.Held)
			for i := range changed.Held {
				if changed.Held[i].Role == state.Owner {
					changed.Held[i].Role = database.Owner
				}
			}
			objects[place] = &changed
		}
	}
	return objects
}

func (c *claims) add(grant site.Grant, privileges []string, places []Place) {
	require := func(place Place) {
		for _, privilege := range privileges {
			c.required[claim{place, grant.Role, privilege}] = true
		}
	}
	container := Place{Database: grant.Database, Kind: site.OnSchema, Schema: grant.Schema}
	if grant.Object == site.OnDatabase {
		container = Place{Database: grant.Database, Kind: site.OnDatabase}
	}
	if c.objects[container] == nil {
		c.waiting = append(c.waiting, container.String())
		return
	}
	if grant.Object == site.OnDatabase || grant.Object == site.OnSchema {
		require(container)
		return
	}
	found := map[string]bool{}
	for _, place := range places {
		found[place.Name] = true
		if covers(grant, place.Name) {
			require(place)
		}
		if grant.DefaultFor != "" && c.objects[place].Owner == grant.DefaultFor {
			for _, privilege := range privileges {
				c.allowed[claim{place, grant.Role, privilege}] = true
			}
		}
	}
	for _, name := range grant.Names {
		if name = canonicalName(grant.Object, name); name != "*" && !found[name] {
			c.waiting = append(c.waiting, Place{Database: grant.Database, Kind: grant.Object, Schema: grant.Schema, Name: name}.String())
		}
	}
	if grant.DefaultFor != "" {
		require(Place{Database: grant.Database, Kind: grant.Object, Schema: grant.Schema, DefaultFor: grant.DefaultFor})
	}
}

func covers(grant site.Grant, name string) bool {
	return slices.ContainsFunc(grant.Names, func(declared string) bool {
		return declared == "*" || canonicalName(grant.Object, declared) == name
	})
}

// Waiting names what grants are declared on and does not exist yet, such as
// tables before the first migration. It is no difference: there is nothing to
// grant on.
func Waiting(want Desired, have Actual) []string { return claimsOf(want, have).waiting }

// holding groups privileges that one role has, or lacks, on one place.
type holding struct {
	place      Place
	role       string
	privileges []string
}

func (h holding) change(action plan.Action, reason string) plan.Change {
	kind := KindGrant
	if h.place.DefaultFor != "" {
		kind = KindDefaultPrivilege
	}
	return plan.Change{Action: action, Kind: kind, Target: fmt.Sprintf("%s on %s", display(h.role), h.place), Reason: reason}
}

func missingGrants(want Desired, have Actual) []item {
	c := claimsOf(want, have)
	lacking := map[claim]bool{}
	maps.Copy(lacking, c.required)
	for _, object := range c.objects {
		for _, held := range object.Held {
			delete(lacking, claim{object.Place, held.Role, held.Name})
		}
	}
	var items []item
	for _, missing := range group(lacking) {
		items = append(items, item{
			change: missing.change(plan.Create, "missing "+strings.Join(missing.privileges, ", ")),
			phase:  phaseOfGrant(missing.place), statements: grantSQL(missing, c.objects[missing.place]),
		})
	}
	return items
}

func phaseOfGrant(place Place) phase {
	if place.Kind == site.OnDatabase {
		return phaseCluster
	}
	return phaseGrants
}

func phaseOfRevoke(h holding, object *Object, grantors map[claim][]string) phase {
	for _, privilege := range h.privileges {
		for _, grantor := range grantors[claim{h.place, h.role, privilege}] {
			if h.place.DefaultFor == "" && grantor != object.Owner {
				return phaseRevokesOfOthers
			}
		}
	}
	return phaseRevokes
}

func undeclaredGrants(want Desired, have Actual) []item {
	c := claimsOf(want, have)
	extra, options := map[claim]bool{}, map[claim]bool{}
	grantors := map[claim][]string{}
	for place, object := range c.objects {
		if !slices.ContainsFunc(want.Databases, func(d site.Database) bool { return d.Name == place.Database }) {
			continue
		}
		for _, held := range object.Held {
			if held.Initial || held.Role == object.Owner || have.Roles[held.Role].System {
				continue
			}
			one := claim{place, held.Role, held.Name}
			declared := c.required[one] || c.allowed[one]
			switch {
			case !declared:
				extra[one] = true
			case held.Grantable:
				options[one] = true
			default:
				continue
			}
			grantors[one] = append(grantors[one], held.Grantor)
		}
	}
	var items []item
	for _, found := range group(extra) {
		items = append(items, item{
			change:     found.change(plan.Delete, "nobody declares "+strings.Join(found.privileges, ", ")),
			phase:      phaseOfRevoke(found, c.objects[found.place], grantors),
			statements: revokeSQL(found, c.objects[found.place], "", grantors),
		})
	}
	for _, found := range group(options) {
		change := found.change(plan.Delete, "nobody declares the grant option of "+strings.Join(found.privileges, ", "))
		change.Target += ", grant option"
		items = append(items, item{
			change: change, phase: phaseOfRevoke(found, c.objects[found.place], grantors),
			statements: revokeSQL(found, c.objects[found.place], "GRANT OPTION FOR ", grantors),
		})
	}
	return items
}

// group sorts claims by place and role.
func group(all map[claim]bool) []holding {
	sorted := slices.SortedFunc(maps.Keys(all), func(a, b claim) int {
		return cmp.Or(comparePlaces(a.Place, b.Place), cmp.Compare(a.role, b.role), cmp.Compare(a.privilege, b.privilege))
	})
	var groups []holding
	for _, one := range sorted {
		if last := len(groups) - 1; last >= 0 && groups[last].place == one.Place && groups[last].role == one.role {
			groups[last].privileges = append(groups[last].privileges, one.privilege)
			continue
		}
		groups = append(groups, holding{one.Place, one.role, []string{one.privilege}})
	}
	return groups
}

func comparePlaces(a, b Place) int {
	return cmp.Or(
		cmp.Compare(a.Database, b.Database), cmp.Compare(a.Schema, b.Schema), cmp.Compare(rank(a.Kind), rank(b.Kind)),
		cmp.Compare(a.Name, b.Name), cmp.Compare(a.Column, b.Column), cmp.Compare(a.DefaultFor, b.DefaultFor),
	)
}

func rank(kind site.GrantObject) int {
	return slices.Index([]site.GrantObject{site.OnDatabase, site.OnSchema, site.OnTables, onColumn, site.OnSequences, site.OnFunctions, onTypes, onSchemas}, kind)
}
