package toolchain

import (
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// lay writes a small tree; a value that begins with "-> " is a link.
func lay(t *testing.T, root string, files map[string]string) {
	t.Helper()
	for name, content := range files {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		var err error
		if target, isLink := strings.CutPrefix(content, "-> "); isLink {
			err = os.Symlink(target, path)
		} else {
			err = os.WriteFile(path, []byte(content), 0o755)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

func TestAPythonApplicationIsLaidOutToRunFromAnyFolder(t *testing.T) {
	packages, staged := t.TempDir(), t.TempDir()
	lay(t, packages, map[string]string{
		"usr/bin/python3.11":                        "ELF",
		"usr/bin/ansible-playbook":                  "#! /usr/bin/python3\nimport ansible\n",
		"usr/bin/ansible-shell":                     "#!/bin/sh\n",
		"usr/bin/pdb3":                              "#! /usr/bin/python3\n",
		"usr/lib/python3.11/os.py":                  "",
		"usr/lib/python3.11/sitecustomize.py":       "-> /etc/python3.11/none.py",
		"usr/lib/python3/dist-packages/data.txt":    "-> /var/lib/data.txt",
		"var/lib/data.txt":                          "-> /usr/share/data.txt",
		"usr/share/data.txt":                        "data",
		"usr/lib/x86_64-linux-gnu/libssl.so.3":      "ssl",
		"usr/lib/x86_64-linux-gnu/engines/one.so":   "one",
		"lib/x86_64-linux-gnu/libz.so.1":            "-> libz.so.1.2",
		"lib/x86_64-linux-gnu/libz.so.1.2":          "z",
		"lib/x86_64-linux-gnu/engines/another.so":   "another",
		"usr/share/doc/something/copyright":         "left behind",
		"usr/lib/valgrind/something-not-needed.sup": "left behind",
	})
	if err := os.MkdirAll(filepath.Join(staged, "bin"), 0o755); err != nil {
		t.Fatal(err)
	}
	tree := &pythonTree{packages: packages, staged: staged, loader: "/lib64/loader"}
	for _, stage := range []func() error{
		tree.resolveLinks, tree.moveLibraries, tree.movePython, func() error { return tree.writeLaunchers("ansible") },
	} {
		if err := stage(); err != nil {
			t.Fatal(err)
		}
	}
	var got []string
	err := filepath.WalkDir(staged, func(path string, entry fs.DirEntry, err error) error {
		if err == nil && !entry.IsDir() {
			relative, _ := filepath.Rel(staged, path)
			got = append(got, relative)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		"bin/ansible-playbook", "bin/python3", "etc/ansible.cfg",
		"lib/python3/dist-packages/data.txt", "lib/python3.11/os.py",
		"lib/x86_64-linux-gnu/engines/another.so", "lib/x86_64-linux-gnu/engines/one.so", "lib/x86_64-linux-gnu/libssl.so.3",
		"lib/x86_64-linux-gnu/libz.so.1", "lib/x86_64-linux-gnu/libz.so.1.2",
		"libexec/ansible-playbook", "libexec/python3.11",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got  %v\nwant %v", got, want)
	}
	if content, err := os.ReadFile(filepath.Join(staged, "lib/python3/dist-packages/data.txt")); err != nil || string(content) != "data" {
		t.Errorf("a link out of the tree became %q, %v", content, err)
	}
	launched, err := os.ReadFile(filepath.Join(staged, "bin/ansible-playbook"))
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{staged, packages, "@"} {
		if strings.Contains(strings.ReplaceAll(string(launched), `"$@"`, ""), text) {
			t.Errorf("the launcher has %q in it:\n%s", text, launched)
		}
	}
}
