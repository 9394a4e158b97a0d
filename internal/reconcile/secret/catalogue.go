package secret

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/site"
)

// Kind is the plan.Change kind of every change to the catalogue.
const Kind = "secret"

// Import is the action of a change that a person has to make.
const Import = plan.Action("import")

// EntryState is what the engine knows about one secret, without its value; the
// zero value is one that was never there.
type EntryState struct {
	Exists bool
	// Deleted: the active version has no value any more, what is known about
	// the secret is still there.
	Deleted bool
	// Version is the newest one, which a write insists on; it need not be the active.
	Version int
	// Created is when the active version was written.
	Created        time.Time
	CustomMetadata map[string]string
	// Versions are those that the engine still knows.
	Versions map[int]VersionState
}

// VersionState is what the engine knows about one version of an entry.
type VersionState struct {
	Created time.Time
	// Gone: its value cannot be read any more.
	Gone bool
}

// HasValue reports whether a job that reads the secret gets one.
func (e EntryState) HasValue() bool { return e.Exists && !e.Deleted }

// DiffOptions are facts that the catalogue itself does not know.
type DiffOptions struct {
	// InUse gives the jobs that run on a secret; nil where nothing runs yet.
	InUse func(fullName string) []string
	// Remake names generated secrets for which a lost value may be replaced.
	Remake map[string]bool
	// Waiting gives the components that cannot start without a secret, by its
	// full name (see Readers). Default: the component that owns it.
	Waiting map[string][]string
	// Site is named in the commands of errors; empty: they name none.
	Site string
}

// Findings are what a deploy cannot mend by itself.
type Findings struct {
	// Missing are secrets without a value that a person has to see to: external ones,
	// and those that a provider makes.
	Missing []MissingSecret
	// Lost are generated ones whose value is gone while jobs run on it.
	Lost []LostSecret
	// Awaited are those without a value that a component's job produces.
	Awaited []AwaitedSecret

	site string
}

// MissingError gives one *MissingError for all missing secrets, or nil.
func (f Findings) MissingError() error {
	if len(f.Missing) == 0 {
		return nil
	}
	return &MissingError{Missing: f.Missing, Site: f.site}
}

// LostError gives one *LostError for all lost secrets, or nil.
func (f Findings) LostError() error {
	if len(f.Lost) == 0 {
		return nil
	}
	return &LostError{Lost: f.Lost}
}

// MissingSecret is a secret without a value that comes from outside.
type MissingSecret struct {
	Name        string
	Description string
	// Provider is whose API makes the value, when a person asks for it; empty for
	// what is imported.
	Provider string
	// Components wait for it, sorted.
	Components []string
}

// LostSecret is a generated secret whose value is gone.
type LostSecret struct {
	Name string
	// Deleted: its value was deleted, and not all that is known about it.
	Deleted bool
	// Jobs run on the value, sorted.
	Jobs []string
}

// AwaitedSecret is a secret that a job will produce.
type AwaitedSecret struct {
	Name     string
	Producer string
}

// Diff compares the catalogue with what the engine has.
func Diff(entries []site.Secret, have map[string]EntryState, options DiffOptions) ([]plan.Change, Findings) {
	var changes []plan.Change
	findings := Findings{site: options.Site}
	for _, entry := range sortedEntries(entries) {
		name := entry.FullName()
		state := have[name]
		if state.HasValue() {
			continue
		}
		change := plan.Change{Action: plan.Create, Kind: Kind, Target: name, Precondition: Precondition(state.Version)}
		switch {
		case entry.Generated != nil:
			jobs := options.jobsOn(name)
			switch {
			case len(jobs) > 0 && !options.Remake[name]:
				findings.Lost = append(findings.Lost, LostSecret{Name: name, Deleted: state.Exists, Jobs: jobs})
				continue
			case len(jobs) > 0:
				change.Reason = "generated anew as asked, the value was lost"
			case state.Exists:
				change.Reason = "generated, the value was deleted and no job runs on it"
			default:
				change.Reason = "generated, made once"
			}
		case entry.External != nil && entry.External.Optional:
			continue
		case entry.External != nil:
			missing := options.missing(entry)
			findings.Missing = append(findings.Missing, missing)
			change.Action, change.Reason = Import, "missing, needed by "+strings.Join(missing.Components, ", ")
		case entry.ProducedBy != nil && entry.ProducedBy.Provider != "":
			missing := options.missing(entry)
			findings.Missing = append(findings.Missing, missing)
			change.Action, change.Reason = Import, "missing, made by "+missing.Provider+", needed by "+strings.Join(missing.Components, ", ")
		case entry.ProducedBy != nil && len(entry.ProducedBy.Command) > 0:
			change.Reason = "missing, printed by " + entry.ProducedBy.Command[0]
		case entry.ProducedBy != nil:
			findings.Awaited = append(findings.Awaited, AwaitedSecret{Name: name, Producer: entry.ProducedBy.Component})
			continue
		default:
			continue
		}
		changes = append(changes, change)
	}
	return changes, findings
}

// Precondition is the version that a write insists on.
func Precondition(version int) string { return fmt.Sprintf("version %d", version) }

// Undeclared names, sorted, the entries in the engine that no catalogue declares.
func Undeclared(entries []site.Secret, have map[string]EntryState) []string {
	declared := map[string]bool{}
	for _, entry := range entries {
		declared[entry.FullName()] = true
	}
	var names []string
	for _, name := range sortedKeys(have) {
		if !declared[name] && have[name].Exists {
			names = append(names, name)
		}
	}
	return names
}

// Readers gives, by the full name of a secret, the components that need it: their
// jobs read it, or a Postgres role of theirs has it as password. One that
// nobody needs belongs to its own component.
func Readers(s *site.Site) map[string][]string {
	readers := map[string][]string{}
	for _, entry := range s.Secrets() {
		name := entry.FullName()
		if readers[name] = s.Consumers(name); len(readers[name]) == 0 {
			readers[name] = []string{entry.Component}
		}
	}
	return readers
}

func (o DiffOptions) jobsOn(name string) []string {
	if o.InUse == nil {
		return nil
	}
	return sortedUnique(o.InUse(name))
}

func (o DiffOptions) missing(entry site.Secret) MissingSecret {
	missing := MissingSecret{Name: entry.FullName(), Description: entry.Description, Components: o.waitingFor(entry)}
	if entry.ProducedBy != nil {
		missing.Provider = entry.ProducedBy.Provider
	}
	return missing
}

func (o DiffOptions) waitingFor(entry site.Secret) []string {
	if components := o.Waiting[entry.FullName()]; len(components) > 0 {
		return sortedUnique(components)
	}
	return []string{entry.Component}
}

func sortedEntries(entries []site.Secret) []site.Secret {
	return slices.SortedFunc(slices.Values(entries), func(a, b site.Secret) int {
		return strings.Compare(a.FullName(), b.FullName())
	})
}
