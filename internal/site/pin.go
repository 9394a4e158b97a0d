package site

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// Pinned is what stands behind "?version=" in the path of a read. One of the two is set.
type Pinned struct {
	// Literal is the generation itself, such as "7".
	Literal string
	// Expression is a template expression in parentheses that gives the generation.
	// It stands within defined templates too, where no variable of another is known,
	// and must give something while its own parts are not fetched yet: the store
	// takes "0" for the newest.
	Expression string
}

// templateRead is a read of the catalogue in a template's text.
type templateRead struct {
	fullName string
	previous bool
	// path is without the query.
	path string
	// start and end are those of the argument with its quotes.
	start, end int
}

// PinTemplate gives the literal paths of a template's reads the generation that
// they are to read. generation says by full name, and by whether the template
// asked for the previous one, what that is; where it answers false, the read
// stays one of the newest. All else in the text stays as it is, and so do reads
// whose path is computed or names a version already.
func PinTemplate(text, left, right string, generation func(fullName string, previous bool) (Pinned, bool)) (string, error) {
	reads, err := templateReads(text, left, right)
	if err != nil {
		return "", err
	}
	var pinned strings.Builder
	done := 0
	for _, read := range reads {
		argument, err := read.argument(generation)
		if err != nil {
			return "", err
		}
		if argument != "" {
			pinned.WriteString(text[done:read.start] + argument)
			done = read.end
		}
	}
	if done == 0 {
		return text, nil
	}
	pinned.WriteString(text[done:])
	if _, err := secretCalls(pinned.String(), left, right); err != nil {
		return "", fmt.Errorf("pin the reads of a template: an expression cannot stand there: %w", err)
	}
	return pinned.String(), nil
}

// SecretReadsOf lists what a final template text reads of the catalogue: full
// names, those of the previous generation as "shop.key?version=previous". Sorted,
// each once.
func SecretReadsOf(text, left, right string) ([]string, error) {
	reads, err := templateReads(text, left, right)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, read := range reads {
		name := read.fullName
		if read.previous {
			name += "?" + previousQuery
		}
		names = append(names, name)
	}
	slices.Sort(names)
	return slices.Compact(names), nil
}

// argument is what replaces the read's own; "" leaves it alone.
func (r templateRead) argument(generation func(fullName string, previous bool) (Pinned, bool)) (string, error) {
	pinned, known := generation(r.fullName, r.previous)
	switch {
	case !known && r.previous:
		// The store knows no version of that name.
		return strconv.Quote(r.path), nil
	case !known:
		return "", nil
	case pinned.Expression != "":
		return fmt.Sprintf("(printf %s %s)", strconv.Quote(r.path+"?version=%v"), pinned.Expression), nil
	case pinned.Literal != "":
		return strconv.Quote(r.path + "?version=" + pinned.Literal), nil
	}
	return "", fmt.Errorf("pin the reads of a template: no generation of %s is given", r.fullName)
}

// templateReads finds the reads that can be pinned, in the order of the text.
func templateReads(text, left, right string) ([]templateRead, error) {
	if !strings.Contains(text, "secret") {
		return nil, nil // also where a text is a template to somebody else
	}
	calls, err := secretCalls(text, left, right)
	if err != nil {
		return nil, fmt.Errorf("read a template: %s", strings.TrimPrefix(err.Error(), "template: "))
	}
	var reads []templateRead
	for _, call := range calls {
		if call.function != "secret" || call.writes || !call.literal {
			continue
		}
		full, previous, problem := secretOfPath(call.path)
		if problem != "" {
			continue
		}
		start := int(call.argument.Position())
		end := start + len(call.argument.Quoted)
		if end > len(text) || text[start:end] != call.argument.Quoted {
			return nil, fmt.Errorf("read a template: the path of %s is not where it was found", full)
		}
		owner, name, _ := strings.Cut(full, ".")
		reads = append(reads, templateRead{fullName: full, previous: previous, path: SecretMount + "/data/" + owner + "/" + name, start: start, end: end})
	}
	return reads, nil
}
