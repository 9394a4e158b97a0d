package site

import (
	"encoding/json"
	"reflect"
	"regexp"
	"slices"
	"testing"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/zclconf/go-cty/cty"
	ctyjson "github.com/zclconf/go-cty/cty/json"
)

func TestVariablesHCL(t *testing.T) {
	for _, tt := range []struct {
		name     string
		declared []string
		values   map[string]string
		want     string
	}{
		{"only what is declared, sorted", []string{"b", "a"}, map[string]string{"b": "1", "a": "true", "c": "2"}, "a = true\nb = 1\n"},
		{"what has no value is left out", []string{"a"}, nil, ""},
		{"objects have quoted, sorted keys", []string{"a"}, map[string]string{"a": `{"for":1,"b c":[null,"x"]}`}, "a = {\"b c\" = [null, \"x\"], \"for\" = 1}\n"},
		{"nothing becomes a template", []string{"a"}, map[string]string{"a": `"${x} %{y}"`}, "a = \"\\u0024{x} \\u0025{y}\"\n"},
		{"numbers keep their digits", []string{"a"}, map[string]string{"a": "12345678901234567890.5"}, "a = 12345678901234567890.5\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := VariablesHCL(tt.declared, tt.values)
			if err != nil || got != tt.want {
				t.Errorf("got %q, %v, want %q", got, err, tt.want)
			}
		})
	}
}

func TestVariablesHCLRefusesWhatIsNotOneJSONValue(t *testing.T) {
	for _, text := range []string{"", "{", "1 2", "a", "1\nb = 2"} {
		if got, err := VariablesHCL([]string{"a"}, map[string]string{"a": text}); err == nil {
			t.Errorf("%q became %q", text, got)
		}
	}
}

var absurdExponent = regexp.MustCompile(`[eE][+-]?[0-9]{4}`)

// FuzzVariablesHCL reads back as HCL what was written, and compares.
func FuzzVariablesHCL(f *testing.F) {
	for _, seed := range []string{`"a"`, `"${a}$${b}%%{c}\\u0000\ud83d\ude00"`, `{"a b":[1,-2.5e3,true,null]}`, `"\u2028\b\f\/"`} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		if absurdExponent.MatchString(text) {
			t.Skip() // takes minutes to write out; the loader refuses it
		}
		var want any
		if json.Unmarshal([]byte(text), &want) != nil {
			return
		}
		written, err := VariablesHCL([]string{"a"}, map[string]string{"a": text})
		if err != nil {
			t.Skip() // such as a number that is out of range
		}
		parsed, diags := hclsyntax.ParseConfig([]byte(written), "x", hcl.InitialPos)
		if diags.HasErrors() {
			t.Fatalf("%s → %s: %s", text, written, diags)
		}
		attrs, _ := parsed.Body.JustAttributes()
		value, diags := attrs["a"].Expr.Value(nil)
		if diags.HasErrors() {
			t.Fatalf("%s → %s: %s", text, written, diags)
		}
		back, err := ctyjson.Marshal(value, value.Type())
		if err != nil {
			t.Fatal(err)
		}
		var got any
		if err := json.Unmarshal(back, &got); err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(normalised(got), normalised(want)) {
			t.Errorf("%s → %s → %s", text, written, back)
		}
	})
}

// normalised applies the one thing that HCL does to strings: Unicode NFC.
func normalised(value any) any {
	switch value := value.(type) {
	case string:
		return cty.NormalizeString(value)
	case []any:
		for i := range value {
			value[i] = normalised(value[i])
		}
	case map[string]any:
		out := map[string]any{}
		for key, element := range value {
			out[cty.NormalizeString(key)] = normalised(element)
		}
		return out
	}
	return value
}

func TestJobspecVariables(t *testing.T) {
	names, diags := JobspecVariables([]byte("variable \"b\" {}\nvariable \"a\" {\n default = 1\n}\nvariables {\n c = 2\n}\njob \"x\" {}\n"), "x.nomad.hcl")
	if diags.HasErrors() || !slices.Equal(names, []string{"a", "b", "c"}) {
		t.Errorf("got %v, %v", names, diags)
	}
	if _, diags := JobspecVariables([]byte("job {"), "x.nomad.hcl"); !diags.HasErrors() || diags[0].Subject.Filename != "x.nomad.hcl" {
		t.Errorf("no place: %v", diags)
	}
}
