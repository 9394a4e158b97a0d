package role

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/secret"
)

// Statement is one of SQL.
type Statement struct {
	// Database is where it runs; empty for the one of the connection that sees
	// the whole cluster.
	Database string
	// SQL has no secret in it. Verifier, where it is set, follows it as a string.
	SQL      string
	Verifier secret.Value
	// Alone statements can't be part of a transaction.
	Alone bool
	// Reload asks the server to load its configuration files; there is no SQL then.
	Reload bool
	// Change is what the statement makes true.
	Change plan.Change
}

// Secret reports whether Text holds what no log may.
func (s Statement) Secret() bool { return !s.Verifier.IsZero() }

// Text is the complete statement. It never holds a password, but may hold the
// verifier of one.
func (s Statement) Text() string {
	if !s.Secret() {
		return s.SQL
	}
	return s.SQL + " " + literal(s.Verifier.Reveal())
}

// phase orders statements: each can rely on those before it.
type phase int

const (
	phaseReload phase = iota
	phaseRoles
	phaseMemberships
	phaseSessions
	phaseStandDown // logins that end: those that take their place work by now
	phaseCreateDatabases
	phaseCluster // databases' owners, limits and privileges
	phaseGrants
	phaseRevokesOfOthers // what roles with a grant option gave, while they have it
	phaseRevokes
	phaseLeave // memberships
	phaseDropDatabases
	phaseDropRoles
)

// item is a change together with what makes it.
type item struct {
	change     plan.Change
	phase      phase
	statements []Statement
	// password is set where the last statement ends with a verifier of it.
	password secret.Value
}

type itemKey struct {
	action       plan.Action
	kind, target string
}

func keyOf(change plan.Change) itemKey { return itemKey{change.Action, change.Kind, change.Target} }

// Diff is what has to change so that everything declared is there, as declared.
func Diff(want Desired, have Actual) []plan.Change {
	return changesOf(missing(want, have))
}

// Undeclared is what nobody declares: it is reported, and goes only with
// --prune. What came with the server or belongs to an owner is not reported.
func Undeclared(want Desired, have Actual) []plan.Change {
	return changesOf(undeclared(want, have))
}

func changesOf(items []item) []plan.Change {
	var changes []plan.Change
	for _, one := range items {
		changes = append(changes, one.change)
	}
	return changes
}

func missing(want Desired, have Actual) []item {
	items := diffConfiguration(have)
	items = append(items, diffRoles(want, have)...)
	items = append(items, diffMemberships(want, have)...)
	items = append(items, diffSessions(want, have)...)
	items = append(items, diffDatabases(want, have)...)
	return append(items, missingGrants(want, have)...)
}

func undeclared(want Desired, have Actual) []item {
	items := undeclaredGrants(want, have)
	items = append(items, undeclaredMemberships(want, have)...)
	items = append(items, undeclaredDatabases(want, have)...)
	return append(items, undeclaredRoles(want, have)...)
}

// Statements are those that make the given changes of Diff and Undeclared, in
// an order that works. Verifiers are made anew, with salts of their own.
func Statements(want Desired, have Actual, changes []plan.Change) ([]Statement, error) {
	known := map[itemKey]item{}
	for _, one := range append(missing(want, have), undeclared(want, have)...) {
		known[keyOf(one.change)] = one
	}
	var items []item
	for _, change := range changes {
		one, found := known[keyOf(change)]
		if !found {
			return nil, fmt.Errorf("%s: not a change of this state", change)
		}
		items = append(items, one)
	}
	slices.SortStableFunc(items, func(a, b item) int { return cmp.Compare(a.phase, b.phase) })
	var statements []Statement
	for _, one := range items {
		for i, statement := range one.statements {
			statement.Change = one.change
			if i == len(one.statements)-1 && !one.password.IsZero() {
				verifier, err := NewVerifier(one.password)
				if err != nil {
					return nil, fmt.Errorf("%s %s: %w", one.change.Kind, one.change.Target, err)
				}
				statement.SQL, statement.Verifier = statement.SQL+" PASSWORD", verifier
			}
			statements = append(statements, statement)
		}
	}
	return statements, nil
}

func sql(database, format string, args ...any) []Statement {
	return []Statement{{Database: database, SQL: fmt.Sprintf(format, args...)}}
}

func alone(format string, args ...any) []Statement {
	return []Statement{{SQL: fmt.Sprintf(format, args...), Alone: true}}
}
