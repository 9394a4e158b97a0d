package toolchain

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/fstest"

	"github.com/nomad-site/site/internal/plan"
)

// buildable is a catalogue with a wrapper module that needs no network: it
// requires a module that nothing imports.
func buildable(program string) fstest.MapFS {
	files := catalogueOf(`
tool "greeter" {
  version        = "1.2.3"
  version_module = "example.test/greeter"
  description    = "says hello"
  module         = "greeter"
  package        = "main.go"
  variables      = { "main.greeting" = "good_morning" }
}
`)
	files["tools/greeter/tool.mod"] = &fstest.MapFile{Data: []byte(wrapperMod + "\nreplace example.test/greeter => ./none\n")}
	files["tools/greeter/main.go"] = &fstest.MapFile{Data: []byte(program)}
	return files
}

const greeterProgram = `//go:build ignore

package main

import ("fmt"; "os")

var greeting = "hello"

func main() { fmt.Println(greeting, os.Getenv("SECRET_OF_THE_SHELL"), os.Args[1:]) }
`

func open(t *testing.T, files fstest.MapFS, root string, overrides map[string]Override) *Toolchain {
	t.Helper()
	builder, err := exec.LookPath("go")
	if err != nil {
		t.Fatal(err)
	}
	// Found before a test empties PATH.
	if builder, err = filepath.EvalSymlinks(builder); err != nil {
		t.Fatal(err)
	}
	tools, err := Open(files, root, Options{Overrides: overrides, GoRoot: filepath.Dir(filepath.Dir(builder))})
	if err != nil {
		t.Fatal(err)
	}
	return tools
}

func TestABuiltToolIsFoundAndRunsWithAnEmptyPath(t *testing.T) {
	if testing.Short() {
		t.Skip("builds a Go program")
	}
	ctx, root := context.Background(), t.TempDir()
	tools := open(t, buildable(greeterProgram), root, nil)

	_, err := tools.Which("greeter", Host())
	var missing *NotInstalledError
	if !errors.As(err, &missing) || plan.HintOf(err) != "run: site tool install greeter" {
		t.Fatalf("before the install: got %v, hint %q", err, plan.HintOf(err))
	}
	path, err := tools.Install(ctx, "greeter", Host(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if want := filepath.Join(tools.Root(Host()), "greeter", "bin", "greeter"); path != want {
		t.Errorf("installed at %s, want %s", path, want)
	}

	t.Setenv("PATH", "")
	t.Setenv("GOROOT", "")
	t.Setenv("SECRET_OF_THE_SHELL", "leaked")
	elsewhere, err := Open(buildable(greeterProgram), root, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if found, err := elsewhere.Which("greeter", Host()); err != nil || found != path {
		t.Errorf("with an empty PATH: got %q, %v", found, err)
	}
	if found, err := elsewhere.Install(ctx, "greeter", Host(), nil); err != nil || found != path {
		t.Errorf("an installed tool needs no Go to be installed again: got %q, %v", found, err)
	}
	var output bytes.Buffer
	if err := elsewhere.Run(ctx, "greeter", []string{"a", "b"}, Streams{Out: &output}); err != nil {
		t.Fatal(err)
	}
	if got := output.String(); got != "good_morning  [a b]\n" {
		t.Errorf("the tool printed %q", got)
	}

	changed, err := Open(buildable(greeterProgram+"// changed\n"), root, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := changed.Which("greeter", Host()); !errors.As(err, &missing) {
		t.Errorf("a tool of another pin resolves: %v", err)
	}
	if _, err := changed.Install(ctx, "greeter", Host(), nil); err == nil || !strings.Contains(plan.HintOf(err), "install Go") {
		t.Errorf("without Go: got %v, hint %q", err, plan.HintOf(err))
	}
	leftovers, err := filepath.Glob(filepath.Join(tools.Root(Host()), ".install-*"))
	if err != nil || len(leftovers) > 0 {
		t.Errorf("left behind: %v, %v", leftovers, err)
	}
}

func TestABuildThatFailsShowsWhyAndInstallsNothing(t *testing.T) {
	if testing.Short() {
		t.Skip("builds a Go program")
	}
	tools := open(t, buildable("//go:build ignore\n\npackage main\n\nfunc main() { undefinedFunction() }\n"), t.TempDir(), nil)
	_, err := tools.Install(context.Background(), "greeter", Host(), nil)
	if err == nil || !strings.Contains(err.Error(), "undefinedFunction") {
		t.Fatalf("got %v", err)
	}
	var missing *NotInstalledError
	if _, err := tools.Which("greeter", Host()); !errors.As(err, &missing) {
		t.Errorf("after the failure: %v", err)
	}
}

// script is an executable to link to or to serve.
const script = "#!/bin/sh\necho from the script\n"

func linkedTool(t *testing.T) (*Toolchain, string) {
	t.Helper()
	original := filepath.Join(t.TempDir(), "original")
	if err := os.WriteFile(original, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	tools := open(t, catalogueOf(""), t.TempDir(), map[string]Override{
		"bao": {Version: "2.6.0", Source: Source{Path: original, SHA256: digestOf([]byte(script))}},
	})
	if _, err := tools.Install(context.Background(), "bao", Host(), nil); err != nil {
		t.Fatal(err)
	}
	return tools, original
}

func TestVerifyNamesEveryFileThatDiffers(t *testing.T) {
	tools, original := linkedTool(t)
	ctx := context.Background()
	if differences, err := tools.Verify(ctx, nil); err != nil || len(differences) > 0 {
		t.Fatalf("untouched: %v, %v", differences, err)
	}
	if err := os.WriteFile(original, []byte(script+"# changed\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	folder := filepath.Join(tools.Root(Host()), "bao")
	if err := os.WriteFile(filepath.Join(folder, "bin", "extra"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	differences, err := tools.Verify(ctx, []string{"bao"})
	if err != nil || len(differences) != 1 {
		t.Fatalf("got %v, %v", differences, err)
	}
	details := strings.Join(differences[0].Details, "\n")
	for _, want := range []string{"bin/bao has sha256", "bin/extra was not there at install"} {
		if !strings.Contains(details, want) {
			t.Errorf("want %q in:\n%s", want, details)
		}
	}
	if _, err := tools.Install(ctx, "bao", Host(), nil); err == nil || !strings.Contains(err.Error(), "pinned is") {
		t.Errorf("a path with another digest than pinned is linked: %v", err)
	}
}

func archiveWith(t *testing.T, name, content string) []byte {
	t.Helper()
	var packed bytes.Buffer
	compressor := gzip.NewWriter(&packed)
	writer := tar.NewWriter(compressor)
	if err := writer.WriteHeader(&tar.Header{Name: name, Mode: 0o755, Size: int64(len(content)), Typeflag: tar.TypeReg}); err != nil {
		t.Fatal(err)
	}
	if _, err := writer.Write([]byte(content)); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(writer.Close(), compressor.Close()); err != nil {
		t.Fatal(err)
	}
	return packed.Bytes()
}

func TestAFetchedToolIsProvenAndRepairedByInstall(t *testing.T) {
	archive := archiveWith(t, "./bao", script)
	server := httptest.NewServer(http.HandlerFunc(func(response http.ResponseWriter, _ *http.Request) {
		_, _ = response.Write(archive)
	}))
	defer server.Close()
	source := Source{URL: server.URL + "/bao.tar.gz", SHA256: digestOf(archive), Member: "bao"}
	tools := open(t, catalogueOf(""), t.TempDir(), map[string]Override{"bao": {Source: source}})
	ctx := context.Background()

	var group sync.WaitGroup
	for range 4 { // several processes may install at once
		group.Go(func() {
			if _, err := tools.Install(ctx, "bao", Host(), nil); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	path, err := tools.Which("bao", Host())
	if err != nil {
		t.Fatal(err)
	}
	if sum, err := tools.Digest("bao", Host()); err != nil || sum != digestOf([]byte(script)) {
		t.Errorf("digest %s, %v", sum, err)
	}
	if err := os.WriteFile(path, []byte("#!/bin/sh\necho evil\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if differences, err := tools.Verify(ctx, nil); err != nil || len(differences) != 1 {
		t.Fatalf("tampered: %v, %v", differences, err)
	}
	if _, err := tools.Install(ctx, "bao", Host(), nil); err != nil {
		t.Fatal(err)
	}
	if differences, err := tools.Verify(ctx, nil); err != nil || len(differences) != 0 {
		t.Errorf("after another install: %v, %v", differences, err)
	}

	source.SHA256 = strings.Repeat("0", 64)
	wrong := open(t, catalogueOf(""), t.TempDir(), map[string]Override{"bao": {Source: source}})
	if _, err := wrong.Install(ctx, "bao", Host(), nil); err == nil || !strings.Contains(err.Error(), "sha256 is "+digestOf(archive)) {
		t.Errorf("a file with another digest is installed: %v", err)
	}
	source.SHA256, source.Member = digestOf(archive), "other"
	absent := open(t, catalogueOf(""), t.TempDir(), map[string]Override{"bao": {Source: source}})
	if _, err := absent.Install(ctx, "bao", Host(), nil); err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("an archive without the file: %v", err)
	}
}

func TestUnknownAndUnsupportedToolsAreNamed(t *testing.T) {
	tools := open(t, catalogueOf(`
tool "only-arm" {
  version     = "1"
  description = "for one platform"
  platform "linux/arm64" { path = "/bin/true" }
}
`), t.TempDir(), nil)
	if _, err := tools.Which("nope", Host()); err == nil || plan.HintOf(err) != "the catalogue has: only-arm" {
		t.Errorf("got %v, hint %q", err, plan.HintOf(err))
	}
	if _, err := tools.Which("only-arm", Platform{"linux", "amd64"}); err == nil || !strings.Contains(err.Error(), "cannot be had for linux/amd64") {
		t.Errorf("got %v", err)
	}
}
