package site

import (
	"encoding/json"
	"strings"
	"unicode/utf8"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/zclconf/go-cty/cty"
	"github.com/zclconf/go-cty/cty/convert"
)

// taskTemplates are the templates of one task, and whether it has an identity
// that OpenBao knows.
type taskTemplates struct {
	task      string
	place     hcl.Range
	hasVault  bool
	templates []*templateText
}

// templateText is what can be known of a template block's data.
type templateText struct {
	source      []byte // of the jobspec
	left, right string // delimiters, empty for the usual ones
	text        strings.Builder
	pieces      []templatePiece
	// partial text misses something that only the server can evaluate.
	partial bool
	// depth ends references between locals that go round.
	depth int
}

// templatePiece says where a part of the text is written.
type templatePiece struct {
	offset int
	place  hcl.Range
}

const (
	// interpolated stands for what is not literal. It is an identifier, so that it
	// can stand wherever an expression can.
	interpolated = "interpolated_by_the_jobspec"
	// deepestReference bounds chains of locals.
	deepestReference = 8
	vaultBlock       = "vault"
)

// findTemplates walks groups and tasks; a vault block of an outer level counts
// for all within.
func (f *jobspecFacts) findTemplates(content []byte, values map[string]string) []taskTemplates {
	var found []taskTemplates
	var walk func(body *hclsyntax.Body, vault bool)
	walk = func(body *hclsyntax.Body, vault bool) {
		vault = vault || len(blocksOf(body, vaultBlock)) > 0
		for _, group := range blocksOf(body, "group") {
			walk(group.Body, vault)
		}
		for _, task := range blocksOf(body, "task") {
			t := taskTemplates{place: task.DefRange(), hasVault: vault || len(blocksOf(task.Body, vaultBlock)) > 0}
			if len(task.Labels) > 0 {
				t.task = task.Labels[0]
			}
			for _, block := range blocksOf(task.Body, "template") {
				if data, written := block.Body.Attributes["data"]; written {
					text := &templateText{source: content, left: literalText(block.Body, "left_delimiter"), right: literalText(block.Body, "right_delimiter")}
					text.add(data.Expr, f.lookup(values))
					t.templates = append(t.templates, text)
				}
			}
			found = append(found, t)
		}
	}
	for _, job := range f.jobs {
		walk(job.Body, false)
	}
	return found
}

// vaultBlocks are the places of all vault blocks of the jobs.
func (f *jobspecFacts) vaultBlocks() []hcl.Range {
	var places []hcl.Range
	var walk func(body *hclsyntax.Body)
	walk = func(body *hclsyntax.Body) {
		for _, block := range blocksOf(body, vaultBlock) {
			places = append(places, block.DefRange())
		}
		for _, kind := range []string{"group", "task"} {
			for _, block := range blocksOf(body, kind) {
				walk(block.Body)
			}
		}
	}
	for _, job := range f.jobs {
		walk(job.Body)
	}
	return places
}

// blocksOf lists the blocks of one type, those that a dynamic block makes included.
func blocksOf(body *hclsyntax.Body, kind string) []*hclsyntax.Block {
	var blocks []*hclsyntax.Block
	for _, block := range body.Blocks {
		switch {
		case block.Type == kind:
			blocks = append(blocks, block)
		case block.Type == "dynamic" && len(block.Labels) > 0 && block.Labels[0] == kind:
			blocks = append(blocks, blocksOf(block.Body, "content")...)
		}
	}
	return blocks
}

func literalText(body *hclsyntax.Body, name string) string {
	attr, ok := body.Attributes[name]
	if !ok {
		return ""
	}
	text, _ := textOf(attr.Expr)
	return text
}

// textOf evaluates an expression without variables and functions.
func textOf(expression hclsyntax.Expression) (string, bool) {
	value, diags := expression.Value(nil)
	if diags.HasErrors() || value.IsNull() || !value.IsKnown() {
		return "", false
	}
	text, err := convert.Convert(value, cty.String)
	if err != nil || text.IsNull() || !text.IsKnown() {
		return "", false
	}
	return text.AsString(), true
}

// lookup resolves local.NAME and var.NAME: to an expression of the jobspec, or
// to a value that the configuration gives.
func (f *jobspecFacts) lookup(values map[string]string) func(hcl.Traversal) (hclsyntax.Expression, string, bool) {
	return func(traversal hcl.Traversal) (hclsyntax.Expression, string, bool) {
		if len(traversal) != 2 {
			return nil, "", false
		}
		name, ok := stepName(traversal[1])
		if !ok {
			return nil, "", false
		}
		switch traversal.RootName() {
		case "local":
			expression, ok := f.locals[name]
			return expression, "", ok
		case "var":
			if encoded, set := values[name]; set {
				var text string
				err := json.Unmarshal([]byte(encoded), &text)
				return nil, text, err == nil
			}
			expression, ok := f.defaults[name]
			return expression, "", ok
		}
		return nil, "", false
	}
}

type lookupFunc = func(hcl.Traversal) (hclsyntax.Expression, string, bool)

// add appends what is literal in an expression.
func (t *templateText) add(expression hclsyntax.Expression, lookup lookupFunc) {
	t.depth++
	defer func() { t.depth-- }()
	switch e := expression.(type) {
	case *hclsyntax.TemplateExpr:
		for _, part := range e.Parts {
			if literal, ok := part.(*hclsyntax.LiteralValueExpr); ok {
				t.add(literal, lookup)
			} else {
				t.interpolate(part, lookup)
			}
		}
	case *hclsyntax.TemplateWrapExpr:
		t.add(e.Wrapped, lookup)
	case *hclsyntax.ParenthesesExpr:
		t.add(e.Expression, lookup)
	case *hclsyntax.LiteralValueExpr:
		if text, ok := textOf(e); ok {
			t.write(text, e.SrcRange)
		}
	case *hclsyntax.ScopeTraversalExpr:
		target, text, found := lookup(e.Traversal)
		switch {
		case !found || t.depth > deepestReference:
			t.unknown(e.SrcRange)
		case target != nil:
			t.add(target, lookup)
		default:
			t.write(text, e.SrcRange)
		}
	default:
		t.addParts(expression, lookup)
	}
}

// addParts takes what is literal in an expression that only the server can
// evaluate: of both branches, and of the arguments of a function.
func (t *templateText) addParts(expression hclsyntax.Expression, lookup lookupFunc) {
	t.partial = true
	switch e := expression.(type) {
	case *hclsyntax.ConditionalExpr:
		t.add(e.TrueResult, lookup)
		t.add(e.FalseResult, lookup)
	case *hclsyntax.TemplateJoinExpr:
		t.add(e.Tuple, lookup)
	case *hclsyntax.ForExpr:
		t.add(e.ValExpr, lookup)
	case *hclsyntax.FunctionCallExpr:
		for _, argument := range e.Args {
			t.add(argument, lookup)
		}
	case *hclsyntax.TupleConsExpr:
		for _, element := range e.Exprs {
			t.add(element, lookup)
		}
	case *hclsyntax.ObjectConsExpr:
		for _, item := range e.Items {
			t.add(item.ValueExpr, lookup)
		}
	default:
		t.unknown(expression.Range())
	}
}

// interpolate adds what ${…} inserts: a fragment of a template that is literal
// itself counts, any other value is not one of the template's literals.
func (t *templateText) interpolate(expression hclsyntax.Expression, lookup lookupFunc) {
	fragment := &templateText{depth: t.depth}
	fragment.add(expression, lookup)
	open := t.left
	if open == "" {
		open = "{{"
	}
	if !strings.Contains(fragment.text.String(), open) {
		t.unknown(expression.Range())
		return
	}
	t.add(expression, lookup)
}

func (t *templateText) unknown(place hcl.Range) {
	t.partial = true
	t.write(interpolated, place)
}

func (t *templateText) write(text string, place hcl.Range) {
	t.pieces = append(t.pieces, templatePiece{t.text.Len(), place})
	t.text.WriteString(text)
}

// place is where the text at an offset is written: the exact line, and the
// column of word where that line holds it.
func (t *templateText) place(offset int, word string) hcl.Range {
	if len(t.pieces) == 0 {
		return hcl.Range{}
	}
	piece := t.pieces[0]
	for _, candidate := range t.pieces[1:] {
		if candidate.offset <= offset {
			piece = candidate
		}
	}
	found := piece.place
	line := found.Start.Line + strings.Count(t.text.String()[piece.offset:max(piece.offset, min(offset, t.text.Len()))], "\n")
	// An escape such as \n in a quoted string is no line of the source.
	line = min(line, max(found.End.Line, found.Start.Line))
	start, text := sourceLine(t.source, line)
	column := strings.Index(text, word)
	if column < 0 || word == "" {
		if line == found.Start.Line {
			return found
		}
		column, word = 0, text
	}
	from := hcl.Pos{Line: line, Column: utf8.RuneCountInString(text[:column]) + 1, Byte: start + column}
	to := hcl.Pos{Line: line, Column: from.Column + utf8.RuneCountInString(word), Byte: from.Byte + len(word)}
	return hcl.Range{Filename: found.Filename, Start: from, End: to}
}

// sourceLine gives a line, counted from one, and the offset at which it begins.
func sourceLine(source []byte, line int) (int, string) {
	rest, start := string(source), 0
	for ; line > 1; line-- {
		end := strings.IndexByte(rest, '\n')
		if end < 0 {
			return start, rest
		}
		start, rest = start+end+1, rest[end+1:]
	}
	text, _, _ := strings.Cut(rest, "\n")
	return start, text
}
