package site

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/zclconf/go-cty/cty"
	ctyjson "github.com/zclconf/go-cty/cty/json"
)

// literal is a variable's value as JSON, and where it is written.
type literal struct {
	json  string
	place hcl.Range
}

// literals reads an object of literal values. Expressions with variables or
// functions are an error: configuration says, it does not compute.
func literals(attr *hcl.Attribute, p *problems) map[string]literal {
	if attr == nil {
		return nil
	}
	pairs, diags := hcl.ExprMap(attr.Expr)
	if diags.HasErrors() {
		p.add(attr.Expr.Range(), "Invalid variables", "Write an object of literal values such as { count = 2 }.")
		return nil
	}
	values := map[string]literal{}
	for _, pair := range pairs {
		key, diags := pair.Key.Value(nil)
		if diags.HasErrors() || key.IsNull() || !key.IsKnown() || key.Type() != cty.String || !hclsyntax.ValidIdentifier(key.AsString()) {
			p.add(pair.Key.Range(), "Invalid variable name", "A variable's name is an identifier, without an expression.")
			continue
		}
		name := key.AsString()
		if first, taken := values[name]; taken {
			p.add(pair.Key.Range(), "Duplicate variable", "%q is already set at %s.", name, place(first.place))
			continue
		}
		value, diags := pair.Value.Value(nil)
		if diags.HasErrors() || !value.IsWhollyKnown() {
			p.add(pair.Value.Range(), "Not a literal", "The value of variable %q must be literal: no variables, no functions.", name)
			continue
		}
		text, err := ctyjson.Marshal(value, value.Type())
		if err != nil {
			p.add(pair.Value.Range(), "Invalid value", "Variable %q: %s.", name, err)
			continue
		}
		values[name] = literal{json: string(text), place: pair.Key.Range()}
	}
	return values
}

// mergeVariables lets the site's values win, each as a whole.
func mergeVariables(sets ...map[string]literal) map[string]string {
	merged := map[string]string{}
	for _, set := range sets {
		for name, value := range set {
			merged[name] = value.json
		}
	}
	return merged
}

// VariablesHCL writes the variable file that goes with a jobspec to the
// server's parse: the values (JSON by name) of declared variables only, sorted.
func VariablesHCL(declared []string, values map[string]string) (string, error) {
	var out strings.Builder
	for _, name := range slices.Compact(slices.Sorted(slices.Values(declared))) {
		text, given := values[name]
		if !given {
			continue
		}
		if !hclsyntax.ValidIdentifier(name) {
			return "", fmt.Errorf("write variable %q: not an identifier", name)
		}
		decoder := json.NewDecoder(bytes.NewReader([]byte(text)))
		decoder.UseNumber()
		var value any
		if err := decoder.Decode(&value); err != nil {
			return "", fmt.Errorf("write variable %q: its value is not JSON: %w", name, err)
		}
		if _, err := decoder.Token(); err != io.EOF {
			return "", fmt.Errorf("write variable %q: more than one JSON value", name)
		}
		out.WriteString(name + " = ")
		writeHCL(&out, value)
		out.WriteByte('\n')
	}
	return out.String(), nil
}

// writeHCL writes a decoded JSON value. Keys are always quoted: a bare "for"
// or "null" would mean something else.
func writeHCL(out *strings.Builder, value any) {
	switch value := value.(type) {
	case nil:
		out.WriteString("null")
	case bool:
		out.WriteString(strconv.FormatBool(value))
	case json.Number:
		out.WriteString(value.String())
	case string:
		out.WriteString(quoteHCL(value))
	case []any:
		out.WriteByte('[')
		for i, element := range value {
			if i > 0 {
				out.WriteString(", ")
			}
			writeHCL(out, element)
		}
		out.WriteByte(']')
	case map[string]any:
		out.WriteByte('{')
		for i, key := range slices.Sorted(maps.Keys(value)) {
			if i > 0 {
				out.WriteString(", ")
			}
			out.WriteString(quoteHCL(key) + " = ")
			writeHCL(out, value[key])
		}
		out.WriteByte('}')
	}
}

// quoteHCL writes a quoted string in which nothing is a template: "$" and "%"
// always as an escape, since "${" and "%{" would start one.
func quoteHCL(text string) string {
	var out strings.Builder
	out.WriteByte('"')
	for _, r := range text {
		switch {
		case r == '"' || r == '\\':
			out.WriteByte('\\')
			out.WriteRune(r)
		case r == '\n':
			out.WriteString(`\n`)
		case r == '\r':
			out.WriteString(`\r`)
		case r == '\t':
			out.WriteString(`\t`)
		case r == '$' || r == '%' || !unicode.IsPrint(r) && r <= 0xffff:
			fmt.Fprintf(&out, `\u%04x`, r)
		case !unicode.IsPrint(r):
			fmt.Fprintf(&out, `\U%08x`, r)
		default:
			out.WriteRune(r)
		}
	}
	out.WriteByte('"')
	return out.String()
}
