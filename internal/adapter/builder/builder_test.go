package builder

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/retry"
	"github.com/nomad-site/site/internal/site"
)

func write(t *testing.T, dir string, files map[string]string) {
	t.Helper()
	for name, content := range files {
		file := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(content), 0o755); err != nil {
			t.Fatal(err)
		}
	}
}

func digestOf(content []byte) string {
	sum := sha256.Sum256(content)
	return "sha256:" + hex.EncodeToString(sum[:])
}

func request(t *testing.T, artifact site.Artifact) Request {
	t.Helper()
	if artifact.Name == "" {
		artifact.Name = "hello"
	}
	return Request{
		Site: "lab", RepoRoot: t.TempDir(), Tree: t.TempDir(), CacheDir: t.TempDir(),
		Artifact: artifact, ComponentFolder: "jobs/hello", Platform: "linux/amd64",
	}
}

// mustBuild builds and proves that every blob is what its name says.
func mustBuild(t *testing.T, request Request) Built {
	t.Helper()
	built, err := Build(t.Context(), request)
	if err != nil {
		t.Fatalf("%v (hint: %s)", err, plan.HintOf(err))
	}
	var size int64
	for _, blob := range built.Blobs {
		content, err := os.ReadFile(blob.Path)
		if err != nil {
			t.Fatal(err)
		}
		if digestOf(content) != blob.Digest || int64(len(content)) != blob.Size {
			t.Errorf("blob %s holds %s of %d bytes", blob.Digest, digestOf(content), len(content))
		}
		if want := filepath.Join(request.CacheDir, "blobs", "sha256", strings.TrimPrefix(blob.Digest, "sha256:")); blob.Path != want {
			t.Errorf("blob %s is at %s", blob.Digest, blob.Path)
		}
		size += blob.Size
	}
	if size != built.Size || built.Name != request.Artifact.Name || built.Kind != request.Artifact.Kind || built.Source == "" {
		t.Errorf("built is %+v", built)
	}
	if last := built.Blobs[len(built.Blobs)-1]; last.Digest != built.Digest {
		t.Errorf("digest is %s, the last blob %s", built.Digest, last.Digest)
	}
	noLeftovers(t, request.CacheDir)
	return built
}

func noLeftovers(t *testing.T, cache string) {
	t.Helper()
	for _, pattern := range []string{"*/.incoming-*", "*/*/.incoming-*", "tmp/*"} {
		if left, _ := filepath.Glob(filepath.Join(cache, pattern)); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
	}
}

// image reads a built image back.
func image(t *testing.T, built Built) (v1.Manifest, v1.ConfigFile) {
	t.Helper()
	var manifest v1.Manifest
	var config v1.ConfigFile
	for blob, into := range map[int]any{1: &manifest, 2: &config} {
		content, err := os.ReadFile(built.Blobs[len(built.Blobs)-blob].Path)
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(content, into); err != nil {
			t.Fatal(err)
		}
	}
	if string(manifest.MediaType) != MediaTypeManifest || manifest.Config.Digest.String() != built.Blobs[len(built.Blobs)-2].Digest {
		t.Errorf("manifest is %+v", manifest)
	}
	for i, layer := range manifest.Layers {
		if layer.Digest != config.RootFS.DiffIDs[i] || string(layer.MediaType) != MediaTypeLayer {
			t.Errorf("layer %d is %+v, its diff id %s", i, layer, config.RootFS.DiffIDs[i])
		}
	}
	return manifest, config
}

type entry struct {
	tar.Header
	content string
}

func readLayer(t *testing.T, file string) map[string]entry {
	t.Helper()
	opened, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer opened.Close()
	entries := map[string]entry{}
	reader := tar.NewReader(opened)
	for {
		header, err := reader.Next()
		if errors.Is(err, io.EOF) {
			return entries
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(reader)
		if err != nil {
			t.Fatal(err)
		}
		if _, twice := entries[header.Name]; twice {
			t.Errorf("%s is in the layer twice", header.Name)
		}
		entries[header.Name] = entry{*header, string(content)}
	}
}

func wantError(t *testing.T, request Request, hinted bool, parts ...string) {
	t.Helper()
	built, err := Build(t.Context(), request)
	if err == nil {
		t.Fatalf("it was built: %+v", built)
	}
	for _, part := range append(parts, fmt.Sprintf("artifact %q", request.Artifact.Name)) {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("the error does not say %q: %v", part, err)
		}
	}
	if hinted && plan.HintOf(err) == "" {
		t.Errorf("no hint with: %v", err)
	}
	noLeftovers(t, request.CacheDir)
}

func TestPlainFileIsReadFromTheCommitBeforeTheWorkTree(t *testing.T) {
	r := request(t, site.Artifact{Kind: site.File, Path: "conf/app.toml"})
	write(t, r.RepoRoot, map[string]string{"conf/app.toml": "edited"})
	write(t, r.Tree, map[string]string{"conf/app.toml": "committed"})
	if built := mustBuild(t, r); built.Digest != digestOf([]byte("committed")) || built.FromWorkTree {
		t.Errorf("built %+v", built)
	}

	r = request(t, site.Artifact{Kind: site.File, Path: "out/program"})
	write(t, r.RepoRoot, map[string]string{"out/program": "made"})
	built := mustBuild(t, r)
	if built.Digest != digestOf([]byte("made")) || !built.FromWorkTree || !strings.Contains(built.Source, "not in the commit") {
		t.Errorf("built %+v", built)
	}

	r = request(t, site.Artifact{Kind: site.File, Path: "app.toml"})
	write(t, r.Tree, map[string]string{"jobs/hello/app.toml": "in the component"})
	if built := mustBuild(t, r); built.Digest != digestOf([]byte("in the component")) {
		t.Errorf("built %+v", built)
	}
}

func TestFileDigestNoticesEveryChange(t *testing.T) {
	r := request(t, site.Artifact{Kind: site.File, Path: "f"})
	file := filepath.Join(r.RepoRoot, "f")
	for i := range 20 {
		content := fmt.Sprintf("version %02d", i)
		write(t, r.RepoRoot, map[string]string{"f": content})
		// As reproducible builders do: neither size nor time tells.
		if err := os.Chtimes(file, time.Unix(1, 0), time.Unix(1, 0)); err != nil {
			t.Fatal(err)
		}
		if built := mustBuild(t, r); built.Digest != digestOf([]byte(content)) {
			t.Fatalf("%s has digest %s", content, built.Digest)
		}
	}
}

func TestIdentityTellsARewrittenFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "f")
	state := func(content string) string {
		write(t, filepath.Dir(file), map[string]string{"f": content})
		if err := os.Chtimes(file, time.Unix(1, 0), time.Unix(1, 0)); err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(file)
		if err != nil {
			t.Fatal(err)
		}
		text, _, ok := identity(info)
		if !ok {
			t.Skip("files have no known identity on this system")
		}
		return text
	}
	first := state("one")
	if err := retry.Until(t.Context(), "the clock of the file system", 10*time.Second, func(context.Context) error {
		if state("two") == first {
			return errors.New("the identity is the same")
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
}

func TestDigestIsRememberedOfASettledFileOnly(t *testing.T) {
	store := blobStore{cacheDir: t.TempDir()}
	if err := store.prepare(); err != nil {
		t.Fatal(err)
	}
	fresh := filepath.Join(t.TempDir(), "fresh")
	write(t, filepath.Dir(fresh), map[string]string{"fresh": "x"})
	if _, err := store.fileDigest(t.Context(), fresh); err != nil {
		t.Fatal(err)
	}
	if kept, _ := os.ReadDir(store.stats()); len(kept) != 0 {
		t.Errorf("a file of just now is remembered: %v", kept)
	}
	settled, err := exec.LookPath("git")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := store.fileDigest(t.Context(), settled); err != nil {
		t.Fatal(err)
	}
	kept, _ := os.ReadDir(store.stats())
	if len(kept) != 1 {
		t.Fatalf("a settled file is not remembered: %v", kept)
	}
	// A digest that only the memory can give.
	memory := filepath.Join(store.stats(), kept[0].Name())
	var content map[string]string
	if err := readJSON(memory, &content); err != nil {
		t.Fatal(err)
	}
	content["Digest"] = digestOf(nil)
	if err := store.writeJSON(memory, content); err != nil {
		t.Fatal(err)
	}
	if digest, err := store.fileDigest(t.Context(), settled); err != nil || digest != digestOf(nil) {
		t.Errorf("it was hashed again: %s, %v", digest, err)
	}
}

func TestWhatCannotBeBuiltSaysWhy(t *testing.T) {
	outside := t.TempDir()
	write(t, outside, map[string]string{"secret": "x"})
	other := digestOf([]byte("other"))
	for name, test := range map[string]struct {
		artifact site.Artifact
		hinted   bool
		says     []string
	}{
		"a missing file":            {site.Artifact{Kind: site.File, Path: "no/such"}, true, []string{"no/such", "neither in the commit"}},
		"a parent path":             {site.Artifact{Kind: site.File, Path: "../secret"}, true, []string{"../secret"}},
		"an absolute path":          {site.Artifact{Kind: site.File, Path: filepath.Join(outside, "secret")}, true, []string{"not inside"}},
		"a link out of the commit":  {site.Artifact{Kind: site.File, Path: "leaving"}, false, []string{"leaving", "leaves the commit"}},
		"a wrong digest":            {site.Artifact{Kind: site.File, Path: "file", SHA256: other}, true, []string{"file", other, digestOf([]byte("content"))}},
		"not a digest":              {site.Artifact{Kind: site.File, Path: "file", SHA256: "abc"}, false, []string{"abc"}},
		"a folder as a file":        {site.Artifact{Kind: site.File, Path: "dir"}, false, []string{"dir", "not a regular file"}},
		"two sources":               {site.Artifact{Kind: site.File, Path: "file", Tool: "t"}, false, []string{"2 sources"}},
		"no source":                 {site.Artifact{Kind: site.File}, false, []string{"0 sources"}},
		"no kind":                   {site.Artifact{Path: "file"}, false, []string{"kind"}},
		"a name that is a path":     {site.Artifact{Name: "../x", Kind: site.File, Path: "file"}, false, []string{"name"}},
		"an archive that is a file": {site.Artifact{Kind: site.Image, DockerArchive: "file"}, false, []string{"file"}},
		"a layout that is not one":  {site.Artifact{Kind: site.Image, OCILayout: "dir"}, false, []string{"dir"}},
		"an archive of kind file":   {site.Artifact{Kind: site.File, DockerArchive: "file"}, true, []string{"kind"}},
		"a url without digest":      {site.Artifact{Kind: site.File, URL: "http://example.org/x"}, true, []string{"sha256"}},
		"a url of a local file":     {site.Artifact{Kind: site.File, URL: "file:///etc/passwd", SHA256: other}, false, []string{"http"}},
		"a user by name":            {site.Artifact{Kind: site.Image, Tool: "t", Executable: "run", User: "root"}, false, []string{"root", "numeric"}},
		"a tool's missing file":     {site.Artifact{Kind: site.File, Tool: "t", Executable: "nope"}, true, []string{"nope", `"t"`}},
		"a tool's parent":           {site.Artifact{Kind: site.File, Tool: "t", Executable: "../x"}, false, []string{"leaves"}},
	} {
		t.Run(name, func(t *testing.T) {
			r := request(t, test.artifact)
			write(t, r.Tree, map[string]string{"file": "content", "dir/x": "x"})
			if err := os.Symlink(filepath.Join(outside, "secret"), filepath.Join(r.Tree, "leaving")); err != nil {
				t.Fatal(err)
			}
			tool := t.TempDir()
			write(t, tool, map[string]string{"bin/run": "x"})
			r.Tool = func(context.Context, string) (string, error) { return tool, nil }
			wantError(t, r, test.hinted, test.says...)
		})
	}
}

func TestToolIsServedAsFileOrOnScratch(t *testing.T) {
	tool := t.TempDir()
	write(t, tool, map[string]string{"bin/run": "#!program"})
	var asked string
	get := func(_ context.Context, name string) (string, error) { asked = name; return tool, nil }

	r := request(t, site.Artifact{Kind: site.File, Tool: "thing", Executable: "bin/run"})
	r.Tool = get
	if built := mustBuild(t, r); built.Digest != digestOf([]byte("#!program")) || asked != "thing" {
		t.Errorf("built %+v of %q", built, asked)
	}

	r = request(t, site.Artifact{Kind: site.Image, Tool: "thing", Executable: "run", User: "999", Entrypoint: []string{"/app/hello", "serve"}})
	r.Tool = get
	built := mustBuild(t, r)
	_, config := image(t, built)
	if config.Config.User != "999:999" || strings.Join(config.Config.Entrypoint, " ") != "/app/hello serve" {
		t.Errorf("config is %+v", config.Config)
	}
	layer := readLayer(t, built.Blobs[0].Path)
	if layer["app/hello"].content != "#!program" || !strings.Contains(layer["etc/passwd"].content, ":999:999:") {
		t.Errorf("layer holds %+v", layer)
	}
}

const program = `package main

import "fmt"

func main() { fmt.Println("committed") }
`

func TestGoPackageRunsFromScratchAndIsReproducible(t *testing.T) {
	files := map[string]string{
		"go.mod":             "module example.org/hello\n\ngo 1.24\n",
		"cmd/hello/main.go":  program,
		"nested/go.mod":      "module example.org/nested\n\ngo 1.24\n",
		"nested/app/main.go": program,
		"library/library.go": "package library\n",
		"broken/main.go":     "package main\n\nfunc main() { undefined() }\n",
	}
	digests := map[string]bool{}
	var built Built
	for range 2 {
		r := request(t, site.Artifact{Kind: site.Image, GoPackage: "./cmd/hello"})
		write(t, r.Tree, files)
		// What is in the work tree does not count.
		write(t, r.RepoRoot, map[string]string{"go.mod": files["go.mod"], "cmd/hello/main.go": strings.Replace(program, "committed", "edited", 1)})
		built = mustBuild(t, r)
		digests[built.Digest] = true
	}
	if len(digests) != 1 {
		t.Errorf("built in two folders it has the digests %v", digests)
	}
	_, config := image(t, built)
	if config.Architecture != "amd64" || config.OS != "linux" || config.Config.User != DefaultUser ||
		len(config.Config.Entrypoint) != 1 || config.Config.Entrypoint[0] != "/app/hello" || !config.Created.Equal(time.Unix(0, 0)) {
		t.Errorf("config is %+v", config)
	}
	layer := readLayer(t, built.Blobs[0].Path)
	for name, mode := range map[string]int64{"app/hello": 0o755, "tmp/": 0o1777, rootsPath: 0o644, "etc/passwd": 0o644, "etc/group": 0o644, "app/": 0o755} {
		if got, there := layer[name]; !there || got.Mode != mode || got.ModTime.Unix() != 0 || got.Uid != 0 {
			t.Errorf("%s is %+v", name, got.Header)
		}
	}
	if !strings.Contains(layer["etc/passwd"].content, "nonroot:x:65532:65532:") || strings.Count(layer[rootsPath].content, "BEGIN CERTIFICATE") < 50 {
		t.Error("the user or the certificate roots are missing")
	}
	executable := filepath.Join(t.TempDir(), "hello")
	if err := os.WriteFile(executable, []byte(layer["app/hello"].content), 0o755); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(executable).CombinedOutput(); err != nil || string(out) != "committed\n" {
		t.Errorf("it says %q, %v", out, err)
	}

	tree := t.TempDir()
	write(t, tree, files)
	for name, test := range map[string]struct {
		artifact site.Artifact
		platform string
		magic    string
	}{
		"as a file":               {site.Artifact{Kind: site.File, GoPackage: "./cmd/hello"}, "linux/amd64", "\x7fELF\x02"},
		"without ./":              {site.Artifact{Kind: site.File, GoPackage: "cmd/hello"}, "linux/amd64", "\x7fELF\x02"},
		"by import path":          {site.Artifact{Kind: site.File, GoPackage: "example.org/hello/cmd/hello"}, "linux/amd64", "\x7fELF\x02"},
		"in a module of its own":  {site.Artifact{Kind: site.File, GoPackage: "./nested/app"}, "linux/amd64", "\x7fELF\x02"},
		"for another processor":   {site.Artifact{Kind: site.File, GoPackage: "./cmd/hello"}, "linux/arm64", "\x7fELF\x02"},
		"a library":               {site.Artifact{Kind: site.File, GoPackage: "./library"}, "linux/amd64", ""},
		"what does not compile":   {site.Artifact{Kind: site.File, GoPackage: "./broken"}, "linux/amd64", ""},
		"what is not there":       {site.Artifact{Kind: site.File, GoPackage: "./nowhere"}, "linux/amd64", ""},
		"what leaves the commit":  {site.Artifact{Kind: site.File, GoPackage: "./../x"}, "linux/amd64", ""},
		"what looks like an flag": {site.Artifact{Kind: site.File, GoPackage: "-toolexec=x"}, "linux/amd64", ""},
	} {
		t.Run(name, func(t *testing.T) {
			r := request(t, test.artifact)
			r.Tree, r.Platform = tree, test.platform
			if test.magic == "" {
				wantError(t, r, false, strings.TrimPrefix(test.artifact.GoPackage, "./"))
				return
			}
			head, err := readHead(mustBuild(t, r).Blobs[0].Path, 5)
			if err != nil || string(head) != test.magic {
				t.Errorf("it starts with %q, %v", head, err)
			}
		})
	}
}

func TestGoPackageOfAKnownTreeIsNotCompiledAgain(t *testing.T) {
	r := request(t, site.Artifact{Kind: site.Image, GoPackage: "./cmd/hello"})
	r.Tree = filepath.Join(r.CacheDir, "trees", "0123abcd")
	write(t, r.Tree, map[string]string{"go.mod": "module example.org/hello\n\ngo 1.24\n", "cmd/hello/main.go": program})
	first := mustBuild(t, r)
	// Only a record can answer now.
	write(t, r.Tree, map[string]string{"cmd/hello/main.go": "does not compile"})
	if second := mustBuild(t, r); second.Digest != first.Digest {
		t.Errorf("digests are %s and %s", first.Digest, second.Digest)
	}
	os.Remove(first.Blobs[0].Path)
	wantError(t, r, false, "compile")
}

func TestCancelEndsTheCompilersToo(t *testing.T) {
	fake := t.TempDir()
	pidFile := filepath.Join(t.TempDir(), "pid")
	script := "#!/bin/sh\nif [ \"$1\" = env ]; then echo go1; exit; fi\nsleep 300 &\necho $! > " + pidFile + ".new; mv " + pidFile + ".new " + pidFile + "\nwait\n"
	write(t, fake, map[string]string{"go": script})
	t.Setenv("PATH", fake+":"+os.Getenv("PATH"))
	r := request(t, site.Artifact{Kind: site.File, GoPackage: "./app"})
	write(t, r.Tree, map[string]string{"go.mod": "module x.org/x\n", "app/main.go": program})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		_, err := Build(ctx, r)
		done <- err
	}()
	var pid int
	if err := retry.Until(t.Context(), "the compiler to start", 10*time.Second, func(context.Context) error {
		content, err := os.ReadFile(pidFile)
		if err == nil {
			_, err = fmt.Sscan(string(content), &pid)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("build ended with %v", err)
	}
	if err := retry.Until(t.Context(), "the compiler to end", 10*time.Second, func(context.Context) error {
		// A killed process may linger as a zombie where nobody reaps orphans.
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil || bytes.Contains(stat, []byte(") Z ")) || errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) {
			return nil
		}
		return errors.New("it still runs")
	}); err != nil {
		t.Error(err)
	}
	noLeftovers(t, r.CacheDir)
}

func TestDownload(t *testing.T) {
	content := []byte("downloaded bytes")
	var hits atomic.Int32
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		hit := hits.Add(1)
		switch r.URL.Path {
		case "/good":
			w.Write(content)
		case "/flaky":
			if hit == 1 {
				http.Error(w, "later", http.StatusServiceUnavailable)
				return
			}
			w.Write(content)
		case "/cut":
			w.Header().Set("Content-Length", "1000")
			w.Write(content)
		default:
			http.NotFound(w, r)
		}
	}))
	defer server.Close()
	for name, test := range map[string]struct {
		path  string
		hits  int32
		limit int64
		says  string // empty: it works
	}{
		"a file comes once":          {path: "/good", hits: 1},
		"a busy server is asked on":  {path: "/flaky", hits: 2},
		"a missing file fails":       {path: "/missing", hits: 1, says: "404"},
		"a cut connection fails":     {path: "/cut", hits: downloadAttempts, says: "unexpected EOF"},
		"a file too large fails":     {path: "/good", hits: 1, limit: 5, says: "larger than the limit of 5"},
		"a file as large as allowed": {path: "/good", hits: 1, limit: int64(len(content))},
	} {
		t.Run(name, func(t *testing.T) {
			hits.Store(0)
			r := request(t, site.Artifact{Kind: site.File, URL: server.URL + test.path, SHA256: digestOf(content)})
			r.MaxDownload = test.limit
			if test.says != "" {
				wantError(t, r, false, test.path, test.says)
			} else {
				mustBuild(t, r)
				mustBuild(t, r)
			}
			if hits.Load() != test.hits {
				t.Errorf("the server was asked %d times, want %d", hits.Load(), test.hits)
			}
		})
	}
	r := request(t, site.Artifact{Kind: site.File, URL: server.URL + "/good", SHA256: digestOf([]byte("other"))})
	wantError(t, r, true, digestOf([]byte("other")), digestOf(content))
}
