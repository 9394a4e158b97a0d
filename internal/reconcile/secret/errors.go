package secret

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// MissingError names every secret from outside that has no value, so that all of
// them can be brought at once.
type MissingError struct {
	Missing []MissingSecret
	// Site is named in the commands, unless it is empty.
	Site string
}

func (e *MissingError) Error() string {
	var text strings.Builder
	if len(e.Missing) == 1 {
		text.WriteString("1 secret from outside is missing:")
	} else {
		fmt.Fprintf(&text, "%d secrets from outside are missing:", len(e.Missing))
	}
	for _, one := range e.Missing {
		what := ""
		if one.Description != "" {
			what = " (" + one.Description + ")"
		}
		fmt.Fprintf(&text, "\n  %s%s, needed by %s: %s", one.Name, what, strings.Join(one.Components, ", "), e.command(one))
	}
	return text.String()
}

func (e *MissingError) command(one MissingSecret) string {
	if one.Provider != "" {
		return rotateStoreCommand(e.Site)
	}
	return importCommand(one.Name)
}

// Hint implements plan.Hinter.
func (e *MissingError) Hint() string {
	imported := slices.DeleteFunc(slices.Clone(e.Missing), func(one MissingSecret) bool { return one.Provider != "" })
	var hints []string
	switch {
	case len(imported) == 1 && len(e.Missing) == 1:
		return "import it as the line says, then deploy again"
	case len(imported) == len(e.Missing):
		return "import each as its line says, then deploy again"
	case len(imported) > 0:
		hints = append(hints, "import what is imported as its line says")
	}
	hints = append(hints,
		"have the object store's keys made: "+importPairCommand(e.Site)+", once; then: "+rotateStoreCommand(e.Site),
		"then deploy again")
	return strings.Join(hints, "\n")
}

func importPairCommand(name string) string {
	return "site provider import-admin-pair" + siteFlag(name) + " --token-a-file=A --token-b-file=B"
}

func rotateStoreCommand(name string) string {
	return "site provider rotate-object-storage" + siteFlag(name)
}

func siteFlag(name string) string {
	if name == "" {
		return ""
	}
	return " --site=" + name
}

func importCommand(name string) string { return "site secrets import " + name + " --from-file=FILE" }

// LostError names generated secrets whose value is gone while jobs run on it:
// a new value would cut those off from what they protect with the old one.
type LostError struct{ Lost []LostSecret }

func (e *LostError) Error() string {
	lines := make([]string, len(e.Lost))
	for i, one := range e.Lost {
		how := "is gone"
		if one.Deleted {
			how = "was deleted"
		}
		runs := "runs"
		if len(one.Jobs) > 1 {
			runs = "run"
		}
		lines[i] = fmt.Sprintf("the value of generated secret %s %s while %s %s on it", one.Name, how, strings.Join(one.Jobs, ", "), runs)
	}
	return strings.Join(lines, "\n")
}

// Hint implements plan.Hinter.
func (e *LostError) Hint() string {
	hints := make([]string, len(e.Lost))
	for i, one := range e.Lost {
		hints[i] = fmt.Sprintf("put the value back with: site secrets set %s, or: %s; or let a new one be made with: --remake-secret=%s",
			one.Name, importCommand(one.Name), one.Name)
	}
	return strings.Join(hints, "\n")
}

// AwaitedError names secrets that jobs were to write and did not in time.
type AwaitedError struct {
	Awaited []AwaitedSecret
	After   time.Duration
}

func (e *AwaitedError) Error() string {
	lines := make([]string, len(e.Awaited))
	for i, one := range e.Awaited {
		lines[i] = fmt.Sprintf("secret %s was not written within %s by job %s, which produces it", one.Name, e.After.Round(time.Second), one.Producer)
	}
	return strings.Join(lines, "\n")
}

// Names are those of the secrets, in one line.
func (e *AwaitedError) Names() string {
	names := make([]string, len(e.Awaited))
	for i, one := range e.Awaited {
		names[i] = one.Name
	}
	return strings.Join(names, ", ")
}

// Hint implements plan.Hinter.
func (e *AwaitedError) Hint() string {
	var hints []string
	for _, one := range e.Awaited {
		if hint := "the job is healthy and should have written the secret; see: site logs " + one.Producer; !slices.Contains(hints, hint) {
			hints = append(hints, hint)
		}
	}
	return strings.Join(hints, "\n")
}
