package site

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

func TestReadsOfATemplateArePinned(t *testing.T) {
	// Generation 7 of shop.key and 3 of shop.token are active, and shop.live is in a variable.
	generation := func(fullName string, previous bool) (Pinned, bool) {
		numbers := map[string]int{"shop.key": 7, "shop.token": 3}
		number, known := numbers[fullName]
		switch {
		case fullName == "shop.live" && previous:
			return Pinned{Expression: "(before)"}, true
		case fullName == "shop.live":
			return Pinned{Expression: "(live)"}, true
		case previous:
			number--
		}
		return Pinned{Literal: fmt.Sprint(number)}, known
	}
	for _, tt := range []struct{ name, text, want string }{
		{"no template at all", "key = value", "key = value"},
		{"no secret", `{{ with nomadVar "a" }}{{ .b }}{{ end }}`, `{{ with nomadVar "a" }}{{ .b }}{{ end }}`},
		{"a text of somebody else without secrets", "{{ if }}", "{{ if }}"},
		{"with", `a {{ with secret "site/data/shop/key" }}{{ .Data.data.value }}{{ end }} z`, `a {{ with secret "site/data/shop/key?version=7" }}{{ .Data.data.value }}{{ end }} z`},
		{"the previous one", `{{ with secret "site/data/shop/key?version=previous" }}{{ end }}`, `{{ with secret "site/data/shop/key?version=6" }}{{ end }}`},
		{"two on a line, and again", "{{ secret \"site/data/shop/key\" }}{{ secret \"site/data/shop/token\" }}\n{{ secret \"site/data/shop/key\" }}", "{{ secret \"site/data/shop/key?version=7\" }}{{ secret \"site/data/shop/token?version=3\" }}\n{{ secret \"site/data/shop/key?version=7\" }}"},
		{"in parentheses, with a field", `{{ (secret ("site/data/shop/key")).Data.data.value }}`, `{{ (secret ("site/data/shop/key?version=7")).Data.data.value }}`},
		{"from a pipe", `{{ with "site/data/shop/key" | secret }}{{ end }}`, `{{ with "site/data/shop/key?version=7" | secret }}{{ end }}`},
		{"raw, with slashes and spaces", "{{ secret ` /site/data/shop/key/ ` }}", `{{ secret "site/data/shop/key?version=7" }}`},
		{"escaped", `{{ secret "site/data/shop/k\x65y" }}`, `{{ secret "site/data/shop/key?version=7" }}`},
		{"behind letters of several bytes", `ä€𝄞 {{- secret "site/data/shop/key" -}} ä`, `ä€𝄞 {{- secret "site/data/shop/key?version=7" -}} ä`},
		{"in branches", `{{ if true }}{{ else if secret "site/data/shop/key" }}{{ else }}{{ secret "site/data/shop/token" }}{{ end }}`, `{{ if true }}{{ else if secret "site/data/shop/key?version=7" }}{{ else }}{{ secret "site/data/shop/token?version=3" }}{{ end }}`},
		{"in a defined template", `{{ define "x" }}{{ secret "site/data/shop/key" }}{{ end }}{{ template "x" (secret "site/data/shop/token") }}`, `{{ define "x" }}{{ secret "site/data/shop/key?version=7" }}{{ end }}{{ template "x" (secret "site/data/shop/token?version=3") }}`},
		{"of a variable", `{{ $s := secret "site/data/shop/key" }}{{ $s.Data }}`, `{{ $s := secret "site/data/shop/key?version=7" }}{{ $s.Data }}`},
		{"by an expression", `{{ with secret "site/data/shop/live" }}{{ end }}`, `{{ with secret (printf "site/data/shop/live?version=%v" (live)) }}{{ end }}`},
		{"by an expression, the previous one, from a pipe", `{{ "site/data/shop/live?version=previous" | secret }}`, `{{ (printf "site/data/shop/live?version=%v" (before)) | secret }}`},
		{"what is not known stays", `{{ secret "site/data/shop/other" }}{{ secret "site/data/shop/key" }}`, `{{ secret "site/data/shop/other" }}{{ secret "site/data/shop/key?version=7" }}`},
		{"the previous one of what is not known is the newest", `{{ secret "site/data/shop/other?version=previous" }}`, `{{ secret "site/data/shop/other" }}`},
		{"a path that names a version stays", `{{ secret "site/data/shop/key?version=2" }}`, `{{ secret "site/data/shop/key?version=2" }}`},
		{"a computed path stays", `{{ secret (printf "site/data/shop/%s" "key") }}`, `{{ secret (printf "site/data/shop/%s" "key") }}`},
		{"another mount stays", `{{ secret "kv/data/shop/key" }}{{ secret "site/metadata/shop/key" }}`, `{{ secret "kv/data/shop/key" }}{{ secret "site/metadata/shop/key" }}`},
		{"another function stays", `{{ range secrets "site/data/shop/key" }}{{ end }}{{ printf "site/data/shop/key" }}`, `{{ range secrets "site/data/shop/key" }}{{ end }}{{ printf "site/data/shop/key" }}`},
		{"a write stays", `{{ secret "site/data/shop/key" "value=x" }}`, `{{ secret "site/data/shop/key" "value=x" }}`},
		{"a comment stays", `{{/* secret "site/data/shop/key" */}}{{ secret "site/data/shop/key" }}`, `{{/* secret "site/data/shop/key" */}}{{ secret "site/data/shop/key?version=7" }}`},
		{"plain text stays", `secret "site/data/shop/key"`, `secret "site/data/shop/key"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := PinTemplate(tt.text, "", "", generation)
			if err != nil || got != tt.want {
				t.Fatalf("got (%v)\n%s\nwant\n%s", err, got, tt.want)
			}
			if again, err := PinTemplate(got, "", "", generation); tt.name != "the previous one of what is not known is the newest" && (err != nil || again != got) {
				t.Errorf("pinned again (%v):\n%s", err, again)
			}
		})
	}
	t.Run("with other delimiters", func(t *testing.T) {
		const text = `[[ secret "site/data/shop/key" ]] {{ secret "site/data/shop/key" }}`
		got, err := PinTemplate(text, "[[", "]]", generation)
		if want := `[[ secret "site/data/shop/key?version=7" ]] {{ secret "site/data/shop/key" }}`; err != nil || got != want {
			t.Errorf("got (%v) %s, want %s", err, got, want)
		}
	})
}

func TestATemplateThatCannotBePinnedIsRefused(t *testing.T) {
	always := func(pinned Pinned) func(string, bool) (Pinned, bool) {
		return func(string, bool) (Pinned, bool) { return pinned, true }
	}
	for _, tt := range []struct {
		name, text string
		pinned     Pinned
		want       string
	}{
		{"a text that is no template", "\n{{ with secret }}", Pinned{Literal: "7"}, "read a template: template:2: unexpected EOF"},
		{"a variable where none is known", `{{ $g := 7 }}{{ define "x" }}{{ secret "site/data/shop/key" }}{{ end }}`, Pinned{Expression: "$g"}, "pin the reads of a template: an expression cannot stand there"},
		{"no generation", `{{ secret "site/data/shop/key" }}`, Pinned{}, "no generation of shop.key is given"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := PinTemplate(tt.text, "", "", always(tt.pinned))
			if err == nil || !strings.Contains(err.Error(), tt.want) || got != "" {
				t.Errorf("got %q and %v, want %q", got, err, tt.want)
			}
			if tt.name == "a text that is no template" {
				if _, err := SecretReadsOf(tt.text, "", ""); err == nil {
					t.Error("its reads were found all the same")
				}
			}
		})
	}
}

func TestTheReadsOfATemplateAreListed(t *testing.T) {
	got, err := SecretReadsOf(`{{ secret "site/data/shop/key" }}{{ secret "site/data/shop/key?version=previous" }}{{ secret "site/data/broker/token" }}{{ "site/data/shop/key" | secret }}{{ secret $x }}{{ $x := 1 }}`, "", "")
	if err == nil {
		t.Errorf("a variable before its declaration: got %v", got)
	}
	got, err = SecretReadsOf(`{{ secret "site/data/shop/key" }}{{ secret "site/data/shop/key?version=previous" }}{{ secret "site/data/broker/token" }}{{ "site/data/shop/key" | secret }}{{ secret (env "X") }}`, "", "")
	if want := []string{"broker.token", "shop.key", "shop.key?version=previous"}; err != nil || !slices.Equal(got, want) {
		t.Errorf("got %v (%v), want %v", got, err, want)
	}
}
