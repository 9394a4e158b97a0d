package site

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"testing/fstest"
)

// FuzzLoad insists that whatever is in the files ends in a site or in an error with places.
func FuzzLoad(f *testing.F) {
	f.Add(plainSite, plainComponent, plainJob)
	f.Add("site {\n", "artifact \"a\" {", "job \"web\" { group \"g\" { task \"t\" { driver = null } } }")
	f.Add("site \"one\" {\n host \"h\" {\n address = null\n host_keys = [null]\n }\n component \"web\" { variables = { (null) = 1 } }\n}", "after = [null, 1]\nvariables = null", "variable {}\njob {}")
	f.Add("site \"one\" {\n nomad {\n fingerprint_denylist = null\n }\n deadline = 1/0\n}", "directory \"\" {}\nartifact \"\" {\n deb_packages = null\n tool = \"\"\n}", "x = var[1]")
	f.Add("site \"one\" {\n host \"h\" {\n address = \"a\"\n }\n operator \"o\" {\n rights = null\n }\n operator \"p\" {\n rights = \"rotate\"\n }\n component \"web\" {}\n}",
		"secret \"a\" {\n generated {}\n rotation {\n every = \"99999d\"\n drain = null\n }\n}\nsecret \"b\" {\n rotation {\n every = 1\n }\n rotation {}\n}\n"+
			"role \"x\" {\n login = true\n password = \"a\"\n alternating = true\n peers = [null]\n}\nrole \"x_a\" {\n password = \"a\"\n alternating = null\n}",
		"job \"web\" {\n task \"t\" {\n vault {}\n template {\n data = \"{{ secret \\\"site/data/web/a?version=previous\\\" }}{{ secret \\\"site/data/web/a?\\\" }}\"\n }\n }\n}")
	root := filepath.Join("..", "..")
	read := func(name string) string {
		content, err := os.ReadFile(filepath.Join(root, filepath.FromSlash(name)))
		if err != nil {
			f.Fatal(err)
		}
		return string(content)
	}
	f.Add(read("sites/example/site.hcl"), read("jobs/example/component.hcl"), read("jobs/example/example.nomad.hcl"))
	f.Fuzz(func(t *testing.T, site, component, job string) {
		fsys := fstest.MapFS{
			"sites/one/site.hcl":     {Data: []byte(site)},
			"jobs/web/component.hcl": {Data: []byte(component)},
			"jobs/web/web.nomad.hcl": {Data: []byte(job)},
		}
		_, err := Load(fsys, "one", LoadOptions{})
		var config *ConfigError
		if err != nil && (!errors.As(err, &config) || len(config.Diagnostics) == 0 || config.Error() == "") {
			t.Fatalf("an error without places: %v", err)
		}
	})
}

// FuzzPinTemplate insists that a pinned template reads the same secrets, that it
// parses, and that it cannot be pinned any further.
func FuzzPinTemplate(f *testing.F) {
	for _, delimiters := range [][2]string{{"", ""}, {"[[", "]]"}, {"(", ")"}, {"\"", "\""}} {
		for _, text := range []string{
			`{{ with secret "site/data/shop/key" }}{{ .Data.data.value }}{{ end }}`,
			"[[ (secret (`/site/data/shop/key?version=previous`)).Data ]]",
			`{{ define "x" }}{{ "site/data/shop/key" | secret }}{{ end }}{{- template "x" -}}`,
			`{{ range secrets "site" }}{{ secret "site/data/shop/key" "a=b" }}{{ else }}{{ secret $x }}{{ end }}`,
			"(secret \"site/data/shop/key\")", "\"secret `site/data/shop/key`\"",
		} {
			f.Add(text, delimiters[0], delimiters[1], true)
			f.Add(text, delimiters[0], delimiters[1], false)
		}
	}
	f.Fuzz(func(t *testing.T, text, left, right string, literal bool) {
		before, err := SecretReadsOf(text, left, right)
		if err != nil {
			return
		}
		asked := 0
		generation := func(_ string, previous bool) (Pinned, bool) {
			asked++
			if !literal {
				return Pinned{Expression: `(or (and (nomadVar "a") (index (nomadVar "a") "key").Value) "0")`}, true
			}
			if previous {
				return Pinned{Literal: "6"}, true
			}
			return Pinned{Literal: "7"}, true
		}
		pinned, err := PinTemplate(text, left, right, generation)
		if err != nil {
			return // with delimiters that end within an expression
		}
		if asked < len(before) || (asked == 0) != (pinned == text) {
			t.Fatalf("%d reads, asked for %d: %q became %q", len(before), asked, text, pinned)
		}
		asked = 0
		if again, err := PinTemplate(pinned, left, right, generation); err != nil || again != pinned || asked > 0 {
			t.Fatalf("%q, pinned again (%v, asked for %d): %q", pinned, err, asked, again)
		}
	})
}
