package toolchain

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sort"
	"strings"

	"github.com/nomad-site/site/internal/plan"
)

// loaders are the machine's own dynamic loaders. Only they and libc are taken
// from the machine: everything else comes out of the packages.
var loaders = map[string]string{
	"amd64": "/lib64/ld-linux-x86-64.so.2",
	"arm64": "/lib/ld-linux-aarch64.so.1",
}

// interpreter is bin/python3. The loader is called by name so that the library
// path is Python's alone: as a variable it would reach ssh and every other
// child. By --argv0 Python finds its modules beside this script and calls
// itself by it again. -I shuts out the user's and the machine's modules, -B
// keeps the folder as it was recorded.
const interpreter = `#!/bin/sh
root=$(CDPATH= cd -- "${0%/*}/.." && pwd -P)
exec @loader@ --library-path "$root/lib/@triplet@" --argv0 "$root/bin/python3" "$root/libexec/@python@" -I -B "$@"
`

// launcher starts one of the application's scripts. Ansible insists on a UTF-8
// locale, and must not find settings or collections of the machine unless the
// caller says so.
const launcher = `#!/bin/sh
root=$(CDPATH= cd -- "${0%/*}/.." && pwd -P)
export LC_ALL=C.UTF-8
export PATH="${PATH:-@path@}"
export ANSIBLE_CONFIG="${ANSIBLE_CONFIG:-$root/etc/ansible.cfg}"
export ANSIBLE_COLLECTIONS_PATH="${ANSIBLE_COLLECTIONS_PATH:-$root/share/collections}"
export ANSIBLE_LIBRARY="${ANSIBLE_LIBRARY:-$root/share/modules}"
exec @loader@ --library-path "$root/lib/@triplet@" --argv0 "$root/bin/python3" "$root/libexec/@python@" -I -B "$root/libexec/${0##*/}" "$@"
`

// pythonTree is an application of Debian packages being laid out to run from
// any folder.
type pythonTree struct {
	packages string // as dpkg would lay them out on a machine
	staged   string
	loader   string
	triplet  string
	python   string
}

// unpackPython lays a Python application out of Debian packages: its own
// interpreter, libraries and modules, launchers for the scripts whose names
// begin with the tool's, and all modules compiled.
func unpackPython(ctx context.Context, name string, packages Packages, lock []byte, work, staged string, progress plan.Progress) error {
	tree := &pythonTree{packages: filepath.Join(work, "packages"), staged: staged, loader: loaders[runtime.GOARCH]}
	if _, err := os.Stat(tree.loader); err != nil {
		return fmt.Errorf("this machine has no glibc loader: %w", err)
	}
	if err := os.MkdirAll(tree.packages, 0o755); err != nil {
		return err
	}
	if err := packages.Unpack(ctx, lock, tree.packages, progress); err != nil {
		return err
	}
	for _, stage := range []func() error{tree.resolveLinks, tree.moveLibraries, tree.movePython, func() error { return tree.writeLaunchers(name) }} {
		if err := stage(); err != nil {
			return fmt.Errorf("lay out the packages of %s: %w", name, err)
		}
	}
	progress.Message("compiling the modules of %s", name)
	return tree.compile(ctx)
}

// resolveLinks replaces links to absolute paths, which would lead out of the
// tree, by what they mean inside of it; those that lead nowhere go away.
func (t *pythonTree) resolveLinks() error {
	return filepath.WalkDir(t.packages, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.Type()&fs.ModeSymlink == 0 {
			return err
		}
		target := path
		for hops := 0; hops < 8; hops++ {
			next, err := os.Readlink(target)
			if err != nil {
				break // not a link any more, or nothing there
			}
			if filepath.IsAbs(next) {
				target = filepath.Join(t.packages, next)
			} else {
				target = filepath.Join(filepath.Dir(target), next)
			}
		}
		content, err := os.ReadFile(target)
		if err != nil {
			return os.Remove(path)
		}
		if direct, err := os.Readlink(path); err != nil || !filepath.IsAbs(direct) {
			return err
		}
		return writeFile(path, content, 0o644)
	})
}

// moveLibraries joins /lib and /usr/lib in lib.
func (t *pythonTree) moveLibraries() error {
	found, err := filepath.Glob(filepath.Join(t.packages, "usr/lib/*-linux-gnu"))
	if err != nil {
		return err
	}
	if len(found) != 1 {
		return fmt.Errorf("want one folder of libraries, found %d", len(found))
	}
	t.triplet = filepath.Base(found[0])
	modules, err := filepath.Glob(filepath.Join(t.packages, "usr/lib/python3*"))
	if err != nil {
		return err
	}
	for _, folder := range append(modules, found[0], filepath.Join(t.packages, "lib", t.triplet)) {
		if err := merge(folder, filepath.Join(t.staged, "lib", filepath.Base(folder))); err != nil {
			return err
		}
	}
	return nil
}

// merge moves the content of one folder into another.
func merge(from, to string) error {
	if err := os.MkdirAll(to, 0o755); err != nil {
		return err
	}
	entries, err := os.ReadDir(from)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, entry := range entries {
		source, target := filepath.Join(from, entry.Name()), filepath.Join(to, entry.Name())
		if _, err := os.Lstat(target); err == nil && entry.IsDir() {
			err = merge(source, target)
			if err != nil {
				return err
			}
			continue
		}
		if err := os.Rename(source, target); err != nil {
			return err
		}
	}
	return nil
}

func (t *pythonTree) movePython() error {
	found, err := filepath.Glob(filepath.Join(t.packages, "usr/bin/python3.*"))
	if err != nil {
		return err
	}
	if len(found) != 1 {
		return fmt.Errorf("want one Python, found %d", len(found))
	}
	t.python = filepath.Base(found[0])
	if err := os.MkdirAll(filepath.Join(t.staged, "libexec"), 0o755); err != nil {
		return err
	}
	return os.Rename(found[0], filepath.Join(t.staged, "libexec", t.python))
}

func (t *pythonTree) writeLaunchers(name string) error {
	scripts, err := filepath.Glob(filepath.Join(t.packages, "usr/bin", name+"*"))
	if err != nil {
		return err
	}
	sort.Strings(scripts)
	write := func(name, text string) error {
		content := strings.NewReplacer("@loader@", t.loader, "@triplet@", t.triplet, "@python@", t.python, "@path@", basicPath).Replace(text)
		return writeFile(filepath.Join(t.staged, "bin", name), []byte(content), 0o755)
	}
	for _, script := range scripts {
		line, err := shebang(script)
		if err != nil {
			return err
		}
		if !strings.Contains(line, "python3") {
			continue
		}
		base := filepath.Base(script)
		if err := os.Rename(script, filepath.Join(t.staged, "libexec", base)); err != nil {
			return err
		}
		if err := write(base, launcher); err != nil {
			return err
		}
	}
	for _, folder := range []string{"etc", "share/collections", "share/modules"} {
		if err := os.MkdirAll(filepath.Join(t.staged, folder), 0o755); err != nil {
			return err
		}
	}
	settings := "# Taken where the caller names no other file: nothing of the machine applies.\n[defaults]\n"
	return errors.Join(
		writeFile(filepath.Join(t.staged, "etc/ansible.cfg"), []byte(settings), 0o644),
		write("python3", interpreter),
	)
}

// compile makes every .pyc at install, since none is written at run time. They
// hold no time stamps and no path of this machine.
func (t *pythonTree) compile(ctx context.Context) error {
	command := exec.CommandContext(ctx, filepath.Join(t.staged, "bin/python3"),
		"-m", "compileall", "-qq", "-j", "0", "--invalidation-mode", "unchecked-hash", "-s", t.staged, filepath.Join(t.staged, "lib"))
	command.Env = []string{"PATH=" + basicPath}
	var complaints bytes.Buffer
	command.Stderr = &complaints
	err := command.Run()
	// Exit 1 says that some file does not compile: a few test files of Python's
	// own are not meant to.
	var failed *exec.ExitError
	expected := errors.As(err, &failed) && failed.ExitCode() == 1 && complaints.Len() == 0
	if err != nil && !expected {
		return fmt.Errorf("compile the modules: %w: %s", err, complaints.String())
	}
	return nil
}
