package toolchain

import (
	"flag"
	"os"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/nomad-site/site/bootstrap"
)

const wrapperMod = "module example.test/wrapper\n\ngo 1.26\n\nrequire example.test/greeter v1.2.3\n"

// catalogueOf is a catalogue's file system with one wrapper module and one lock.
func catalogueOf(text string) fstest.MapFS {
	return fstest.MapFS{
		"tools/catalogue.hcl":    {Data: []byte(text)},
		"tools/greeter/tool.mod": {Data: []byte(wrapperMod)},
		"tools/greeter/tool.sum": {Data: []byte("")},
		"tools/greeter/main.go":  {Data: []byte("//go:build ignore\n\npackage main\n\nfunc main() { println(\"hello\") }\n")},
		"debs/some.lock.json":    {Data: []byte("{}")},
	}
}

func TestTheShippedCatalogueIsSound(t *testing.T) {
	tools, err := ParseCatalogue(bootstrap.FS)
	if err != nil {
		t.Fatal(err)
	}
	names := map[string]bool{}
	for _, tool := range tools {
		names[tool.Name] = true
	}
	for _, name := range []string{"nomad", "nomad-driver-podman", "secrets-server", "versitygw", "ansible", "golangci-lint", "gazelle", "buildifier"} {
		if !names[name] {
			t.Errorf("the catalogue lacks %s", name)
		}
	}
}

var update = flag.Bool("update", false, "write the generated files anew")

func TestTheCatalogueTableIsCurrent(t *testing.T) {
	tools, err := ParseCatalogue(bootstrap.FS)
	if err != nil {
		t.Fatal(err)
	}
	const path = "../../../bootstrap/tools/README.md"
	readme, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	const begin, end = "<!-- catalogue: begin -->\n", "<!-- catalogue: end -->\n"
	before, rest, found := strings.Cut(string(readme), begin)
	kept, after, ended := strings.Cut(rest, end)
	if !found || !ended {
		t.Fatalf("%s lacks the lines %q and %q", path, begin, end)
	}
	table := Table(tools)
	if kept == table {
		return
	}
	if *update {
		if err := os.WriteFile(path, []byte(before+begin+table+end+after), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	t.Errorf("the table in %s is not what the pins say; run `make generate`", path)
}

func TestParseCatalogueReportsAllMistakesWithTheirPlaces(t *testing.T) {
	_, err := ParseCatalogue(catalogueOf(`
tool "greeter" {
  version     = "1.2.4"
  description = "pinned by tool.mod to another version"
  module      = "greeter"
  package     = "example.test/greeter/cmd"
}

tool "none" {
  version     = "1"
  description = "no source"
}

tool "both" {
  version     = "1"
  description = "two sources"
  module      = "greeter"
  platform "linux/amd64" { path = "/bin/true" }
}

tool "unpinned" {
  version     = "1"
  description = "url without digest, wrong platform, two sources in one"
  platform "linux/amd64" { url = "https://example.test/x" }
  platform "linux" { path = "/bin/true" }
  platform "linux/arm64" {
    path = "/bin/true"
    debs = "some.lock.json"
  }
  platform "darwin/arm64" { debs = "missing.lock.json" }
}

tool "unpinned" {
  version     = "1"
  description = "again"
  executable  = "../evil"
  surprise    = true
  platform "linux/amd64" { path = "relative" }
}
`))
	if err == nil {
		t.Fatal("want mistakes reported")
	}
	for _, want := range []string{
		`tools/catalogue.hcl:2,1: tool "greeter": version "1.2.4", but its tool.mod pins v1.2.3`,
		`tools/catalogue.hcl:9,1: tool "none" has no source`,
		`tools/catalogue.hcl:14,1: tool "both" has both a module and platform blocks`,
		`tools/catalogue.hcl:24,3: tool "unpinned", platform linux/amd64: url needs sha256`,
		`tools/catalogue.hcl:25,3: tool "unpinned": platform "linux" is not of the form`,
		`tools/catalogue.hcl:26,3: tool "unpinned", platform linux/arm64: want exactly one`,
		`tools/catalogue.hcl:30,3: tool "unpinned": open debs/missing.lock.json`,
		`tools/catalogue.hcl:33,1: tool "unpinned" is there twice`,
		`executable "../evil" must be a plain file name`,
		`tools/catalogue.hcl:37,3: Unsupported argument`,
		`path "relative" must be absolute`,
	} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("want %q in:\n%v", want, err)
		}
	}
}

func TestThePinChangesWithEverythingThatDecidesTheBytes(t *testing.T) {
	base := func() Tool {
		return Tool{
			Name: "greeter", Version: "1.2.3", Executable: "greeter",
			Module: &Module{Folder: "greeter", Package: "main.go", Variables: map[string]string{"main.a": "1", "main.b": "2"}},
			files:  map[string][]byte{"tool.mod": []byte("m"), "tool.sum": []byte("s"), "main.go": []byte("g")},
		}
	}
	amd64 := Platform{"linux", "amd64"}
	reference := base().pin(amd64)
	for range 20 {
		if base().pin(amd64) != reference {
			t.Fatal("the same tool has two pins")
		}
	}
	for name, change := range map[string]func(*Tool){
		"tool.mod":         func(tool *Tool) { tool.files["tool.mod"] = []byte("x") },
		"tool.sum":         func(tool *Tool) { tool.files["tool.sum"] = []byte("x") },
		"a Go file":        func(tool *Tool) { tool.files["main.go"] = []byte("x") },
		"another Go file":  func(tool *Tool) { tool.files["more.go"] = []byte("x") },
		"the version":      func(tool *Tool) { tool.Version = "1.2.4" },
		"the package":      func(tool *Tool) { tool.Module.Package = "other.go" },
		"a variable":       func(tool *Tool) { tool.Module.Variables["main.b"] = "3" },
		"a tag":            func(tool *Tool) { tool.Module.Tags = []string{"ui"} },
		"the executable":   func(tool *Tool) { tool.Executable = "hello" },
		"an override":      func(tool *Tool) { tool.Module, tool.Anywhere = nil, &Source{Path: "/bin/true"} },
		"another override": func(tool *Tool) { tool.Module, tool.Anywhere = nil, &Source{Path: "/bin/false"} },
	} {
		changed := base()
		change(&changed)
		if changed.pin(amd64) == reference {
			t.Errorf("%s changes nothing in the pin", name)
		}
	}
	if base().pin(Platform{"linux", "arm64"}) == reference {
		t.Error("the platform changes nothing in the pin")
	}
	if key(reference, "go1.26.8") == key(reference, "go1.26.9") {
		t.Error("the version of Go changes nothing in the key")
	}
	if base().pin(amd64) != reference {
		t.Error("the cases above changed the reference")
	}
}

func TestAToolSeesOnlyBasicsAndWhatTheCatalogueLetsItSee(t *testing.T) {
	all := []string{"HOME=/root", "AWS_CA_BUNDLE=/x", "NOMAD_ADDR=http://127.0.0.1:1", "PATH=/evil", "LC_ALL=C"}
	got := strings.Join(environment([]string{"NOMAD_*"}, all), " ")
	if want := "HOME=/root NOMAD_ADDR=http://127.0.0.1:1 LC_ALL=C PATH=" + basicPath; got != want {
		t.Errorf("got %s\nwant %s", got, want)
	}
	got = strings.Join(environment([]string{"PATH"}, all), " ")
	if want := "HOME=/root PATH=/evil LC_ALL=C"; got != want {
		t.Errorf("got %s\nwant %s", got, want)
	}
}
