package site

import (
	"fmt"
	"slices"
	"sort"
	"strings"

	"github.com/agext/levenshtein"
	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
)

// ConfigError holds every problem found in a site's files.
type ConfigError struct {
	// Diagnostics is sorted by file, then place.
	Diagnostics hcl.Diagnostics
	// Files are the parsed sources by path, for a renderer that shows excerpts.
	Files map[string]*hcl.File
}

// Error prints one problem per line as "file:line,col: summary; detail".
func (e *ConfigError) Error() string {
	lines := make([]string, 0, len(e.Diagnostics))
	for _, diag := range e.Diagnostics {
		lines = append(lines, problemLine(diag))
	}
	return strings.Join(lines, "\n")
}

// Hint says where the reference is.
func (e *ConfigError) Hint() string {
	if len(e.Diagnostics) == 1 {
		return "correct and commit the file named above; sites/example and jobs/example of the site repository document every field"
	}
	return fmt.Sprintf("correct and commit the %d places named above; sites/example and jobs/example of the site repository document every field", len(e.Diagnostics))
}

func problemLine(diag *hcl.Diagnostic) string {
	text := strings.TrimSuffix(diag.Summary, ".")
	if diag.Detail != "" {
		text += "; " + strings.TrimSuffix(diag.Detail, ".")
	}
	if diag.Subject == nil {
		return text
	}
	return fmt.Sprintf("%s:%d,%d: %s", diag.Subject.Filename, diag.Subject.Start.Line, diag.Subject.Start.Column, text)
}

// problems collects diagnostics over all files of a site.
type problems struct {
	decode hcl.Diagnostics // from the HCL parser and decoder
	rules  hcl.Diagnostics // from our own rules
	files  map[string]*hcl.File
}

func newProblems() *problems { return &problems{files: map[string]*hcl.File{}} }

// add records a broken rule.
func (p *problems) add(subject hcl.Range, summary, format string, args ...any) {
	p.rules = append(p.rules, &hcl.Diagnostic{
		Severity: hcl.DiagError,
		Summary:  summary,
		Detail:   fmt.Sprintf(format, args...),
		Subject:  &subject,
	})
}

// decoded records what the HCL library found.
func (p *problems) decoded(diags hcl.Diagnostics) {
	for _, diag := range diags {
		// The decoder reports an expression that it could not evaluate a second
		// time, as a value that is not known.
		if diag.Severity != hcl.DiagError || strings.HasSuffix(diag.Detail, "value must be known") {
			continue
		}
		p.decode = append(p.decode, diag)
	}
}

// err returns nil where nothing was found.
func (p *problems) err() error {
	all := append(hcl.Diagnostics{}, p.decode...)
	for _, diag := range p.rules {
		// A value that did not decode is empty; a rule broken by that emptiness is no second problem.
		if !overlapsAny(diag, p.decode) {
			all = append(all, diag)
		}
	}
	if len(all) == 0 {
		return nil
	}
	sort.SliceStable(all, func(i, j int) bool { return before(all[i], all[j]) })
	unique := all[:1]
	for _, diag := range all[1:] {
		if problemLine(diag) != problemLine(unique[len(unique)-1]) {
			unique = append(unique, diag)
		}
	}
	return &ConfigError{Diagnostics: unique, Files: p.files}
}

func overlapsAny(diag *hcl.Diagnostic, others hcl.Diagnostics) bool {
	for _, other := range others {
		if diag.Subject == nil || other.Subject == nil || diag.Subject.Filename != other.Subject.Filename {
			continue
		}
		if diag.Subject.Overlaps(*other.Subject) {
			return true
		}
	}
	return false
}

func before(a, b *hcl.Diagnostic) bool {
	if a.Subject == nil || b.Subject == nil {
		return a.Subject == nil && b.Subject != nil
	}
	if a.Subject.Filename != b.Subject.Filename {
		return a.Subject.Filename < b.Subject.Filename
	}
	if a.Subject.Start.Line != b.Subject.Start.Line {
		return a.Subject.Start.Line < b.Subject.Start.Line
	}
	if a.Subject.Start.Column != b.Subject.Start.Column {
		return a.Subject.Start.Column < b.Subject.Start.Column
	}
	return problemLine(a) < problemLine(b)
}

// isSet reports whether an attribute is written in body, with whatever value.
func isSet(body hcl.Body, name string) bool {
	syntax, ok := body.(*hclsyntax.Body)
	if !ok {
		return false
	}
	_, ok = syntax.Attributes[name]
	return ok
}

// hasBlock reports whether a block is written in body, however often.
func hasBlock(body hcl.Body, kind string) bool {
	syntax, ok := body.(*hclsyntax.Body)
	return ok && slices.ContainsFunc(syntax.Blocks, func(block *hclsyntax.Block) bool { return block.Type == kind })
}

// at is the place of an attribute's value, or of the block where it would stand.
func at(body hcl.Body, name string) hcl.Range {
	if syntax, ok := body.(*hclsyntax.Body); ok {
		if attr, ok := syntax.Attributes[name]; ok {
			return attr.Expr.Range()
		}
	}
	if body == nil {
		return hcl.Range{}
	}
	return body.MissingItemRange()
}

// atElement is the place of one element of a list attribute.
func atElement(body hcl.Body, name string, index int) hcl.Range {
	if syntax, ok := body.(*hclsyntax.Body); ok {
		if attr, ok := syntax.Attributes[name]; ok {
			if list, ok := attr.Expr.(*hclsyntax.TupleConsExpr); ok && index < len(list.Exprs) {
				return list.Exprs[index].Range()
			}
		}
	}
	return at(body, name)
}

// nearest returns the candidate that the user may have meant, or "".
func nearest(name string, candidates []string) string {
	best, limit := "", max(2, len(name)/3)
	for _, candidate := range candidates {
		if distance := levenshtein.Distance(name, candidate, nil); distance <= limit && candidate != name {
			best, limit = candidate, distance-1
		}
	}
	return best
}

// didYouMean ends a detail with the nearest candidate, or with all of them.
func didYouMean(name string, candidates []string, what string) string {
	if near := nearest(name, candidates); near != "" {
		return fmt.Sprintf(" Did you mean %q?", near)
	}
	if len(candidates) == 0 {
		return fmt.Sprintf(" There are no %s.", what)
	}
	sorted := append([]string{}, candidates...)
	sort.Strings(sorted)
	return fmt.Sprintf(" There are these %s: %s.", what, strings.Join(sorted, ", "))
}
