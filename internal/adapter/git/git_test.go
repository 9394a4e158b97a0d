package git

import (
	"archive/tar"
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/nomad-site/site/internal/plan"
)

func newRepository(t *testing.T, files map[string]string) (dir string, git func(args ...string) string) {
	t.Helper()
	dir = t.TempDir()
	git = func(args ...string) string {
		t.Helper()
		command := exec.Command("git", append([]string{"-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"}, args...)...)
		command.Dir = dir
		command.Env = environment(os.Environ())
		out, err := command.CombinedOutput()
		if err != nil {
			t.Fatalf("git %v: %v\n%s", args, err, out)
		}
		return strings.TrimSpace(string(out))
	}
	git("init", "-q", "-b", "main")
	write(t, dir, files)
	git("add", "-A")
	git("commit", "-q", "--allow-empty", "-m", "first")
	return dir, git
}

func write(t *testing.T, dir string, files map[string]string) {
	t.Helper()
	for name, content := range files {
		file := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func TestOpen(t *testing.T) {
	dir, _ := newRepository(t, map[string]string{"a/b": "x"})
	// A hook's environment must not redirect us to another repository.
	t.Setenv("GIT_DIR", "/nonexistent")
	repository, err := Open(t.Context(), filepath.Join(dir, "a"))
	if err != nil {
		t.Fatal(err)
	}
	want, _ := filepath.EvalSymlinks(dir)
	if got, _ := filepath.EvalSymlinks(repository.Root()); got != want {
		t.Errorf("root is %s, want %s", got, want)
	}

	_, err = Open(t.Context(), t.TempDir())
	if err == nil || !strings.Contains(err.Error(), "not in a git repository") || plan.HintOf(err) == "" {
		t.Errorf("a plain folder gives %v (hint %q)", err, plan.HintOf(err))
	}
	t.Setenv("PATH", t.TempDir())
	if _, err = Open(t.Context(), dir); err == nil || !strings.Contains(plan.HintOf(err), "install git") {
		t.Errorf("without git the error is %v", err)
	}
}

func TestResolve(t *testing.T) {
	dir, git := newRepository(t, nil)
	head := git("rev-parse", "HEAD")
	git("tag", "-a", "v1", "-m", "v1")
	repository, err := Open(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, rev := range []string{"", "HEAD", "main", head, head[:10], "v1"} {
		if sha, err := repository.Resolve(t.Context(), rev); err != nil || sha != head {
			t.Errorf("Resolve(%q) = %q, %v", rev, sha, err)
		}
	}
	for _, rev := range []string{strings.Repeat("ab", 20), "no-such-branch", "--all", "HEAD:x"} {
		sha, err := repository.Resolve(t.Context(), rev)
		if err == nil {
			t.Errorf("Resolve(%q) = %q, want an error", rev, sha)
		} else if !strings.Contains(err.Error(), rev) || (rev != "--all" && plan.HintOf(err) == "") {
			t.Errorf("Resolve(%q): %v (hint %q)", rev, err, plan.HintOf(err))
		}
	}
	empty := t.TempDir()
	if out, err := exec.Command("git", "init", "-q", empty).CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	if repository, err = Open(t.Context(), empty); err != nil {
		t.Fatal(err)
	}
	if _, err := repository.Resolve(t.Context(), ""); err == nil || !strings.Contains(err.Error(), "no commit yet") {
		t.Errorf("a repository without commits gives %v", err)
	}
}

func TestDirtyNamesEveryUncommittedPath(t *testing.T) {
	dir, git := newRepository(t, map[string]string{"kept": "1", "changed": "1", "gone": "1", "moved from": "long enough to be a rename", ".gitignore": "*.out\n"})
	repository, err := Open(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	if paths, err := repository.Dirty(t.Context()); err != nil || len(paths) != 0 {
		t.Fatalf("a clean repository has %q, %v", paths, err)
	}
	write(t, dir, map[string]string{"changed": "2", "new/dir/ü file": "1", "ignored.out": "1"})
	os.Remove(filepath.Join(dir, "gone"))
	git("mv", "moved from", "moved to")
	paths, err := repository.Dirty(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(paths)
	want := []string{"changed", "gone", "moved from", "moved to", "new/dir/ü file"}
	if !slices.Equal(paths, want) {
		t.Errorf("dirty paths are %q, want %q", paths, want)
	}
}

func TestTracked(t *testing.T) {
	dir, _ := newRepository(t, map[string]string{"dir/file": "1"})
	write(t, dir, map[string]string{"dir/new": "1"})
	repository, err := Open(t.Context(), filepath.Join(dir, "dir"))
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]bool{"dir/file": true, "./dir/file": true, "dir": true, "dir/": true, "dir/new": false, "dir/fil": false, "file": false} {
		if got, err := repository.Tracked(t.Context(), "HEAD", name); err != nil || got != want {
			t.Errorf("Tracked(%q) = %v, %v", name, got, err)
		}
	}
}

func TestExportHoldsTheCommitAndNothingElse(t *testing.T) {
	files := map[string]string{"a/file": "committed", "secret": "left out of archives", "run.sh": "#!/bin/sh\n", ".gitattributes": "secret export-ignore\n"}
	dir, git := newRepository(t, files)
	if err := os.Symlink("a/file", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(dir, "run.sh"), 0o755); err != nil {
		t.Fatal(err)
	}
	git("add", "-A")
	git("commit", "-q", "-m", "second")
	write(t, dir, map[string]string{"a/file": "not committed", "untracked": "x"})

	repository, err := Open(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	cache := t.TempDir()
	tree, err := repository.Export(t.Context(), "HEAD", cache)
	if err != nil {
		t.Fatal(err)
	}
	if want := filepath.Join(cache, "trees", git("rev-parse", "HEAD^{tree}")); tree != want {
		t.Errorf("exported to %s, want %s", tree, want)
	}
	for name, want := range map[string]string{"a/file": "committed", "link": "committed", "secret": files["secret"]} {
		if got, err := os.ReadFile(filepath.Join(tree, name)); err != nil || string(got) != want {
			t.Errorf("%s holds %q, %v; want %q", name, got, err, want)
		}
	}
	if info, err := os.Stat(filepath.Join(tree, "run.sh")); err != nil || info.Mode().Perm() != 0o755 {
		t.Errorf("run.sh: %v, %v", info, err)
	}
	if _, err := os.Stat(filepath.Join(tree, "untracked")); err == nil {
		t.Error("an untracked file was exported")
	}
	entries, _ := os.ReadDir(filepath.Join(cache, "trees"))
	if len(entries) != 1 {
		t.Errorf("left behind: %v", entries)
	}

	// The same files under another commit are the same tree: nothing is written.
	git("checkout", "-q", "--", ".")
	git("commit", "-q", "--allow-empty", "-m", "third")
	os.WriteFile(filepath.Join(tree, "marker"), nil, 0o644)
	again, err := repository.Export(t.Context(), "HEAD", cache)
	if err != nil || again != tree {
		t.Errorf("exported again to %s, %v", again, err)
	}
	if _, err := os.Stat(filepath.Join(tree, "marker")); err != nil {
		t.Error("an existing tree was written again")
	}
}

func TestUnpackNeverLeavesTheFolder(t *testing.T) {
	for name, entries := range map[string][]tar.Header{
		"a parent path":               {{Typeflag: tar.TypeReg, Name: "../evil"}},
		"an absolute path":            {{Typeflag: tar.TypeReg, Name: "/evil"}},
		"a write through a symlink":   {{Typeflag: tar.TypeSymlink, Name: "out", Linkname: ".."}, {Typeflag: tar.TypeReg, Name: "out/evil"}},
		"a device":                    {{Typeflag: tar.TypeChar, Name: "null"}},
		"a hidden parent in the path": {{Typeflag: tar.TypeReg, Name: "a/../../evil"}},
	} {
		t.Run(name, func(t *testing.T) {
			var archive bytes.Buffer
			writer := tar.NewWriter(&archive)
			for _, entry := range entries {
				if err := writer.WriteHeader(&entry); err != nil {
					t.Fatal(err)
				}
			}
			writer.Close()
			parent := t.TempDir()
			if err := os.Mkdir(filepath.Join(parent, "inside"), 0o755); err != nil {
				t.Fatal(err)
			}
			root, err := os.OpenRoot(filepath.Join(parent, "inside"))
			if err != nil {
				t.Fatal(err)
			}
			defer root.Close()
			if err := unpack(root, &archive); err == nil {
				t.Error("it was unpacked")
			}
			if left, _ := os.ReadDir(parent); len(left) != 1 {
				t.Errorf("it wrote outside: %v", left)
			}
		})
	}
}
