package builder

import (
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/nomad-site/site/internal/plan"
)

// place is where a declared path was found.
type place struct {
	path         string // absolute
	name         string // slash-separated, relative to the repository root
	within       string // what symlinks may not leave; empty in the work tree
	fromWorkTree bool
	dir          bool
}

func (p place) describe(what string) string {
	if p.fromWorkTree {
		return what + p.name + " (from the work tree: not in the commit)"
	}
	return what + p.name
}

// locate finds a declared path: what the commit holds is read from the commit,
// so that local edits never count; build outputs are read from the work tree.
func (b *builder) locate(name string) (place, error) {
	clean := path.Clean(name)
	if !filepath.IsLocal(filepath.FromSlash(clean)) {
		return place{}, plan.WithHint(fmt.Errorf("path %q is not inside the repository", name),
			"write it relative to the root of the repository, without ..")
	}
	names := []string{clean}
	if b.ComponentFolder != "" {
		names = append(names, path.Join(path.Clean(b.ComponentFolder), clean))
	}
	for _, candidate := range names {
		if b.Tree == "" {
			break
		}
		file := filepath.Join(b.Tree, filepath.FromSlash(candidate))
		if _, err := os.Lstat(file); err != nil {
			continue
		}
		if err := inside(b.Tree, file); err != nil {
			return place{}, err
		}
		info, err := os.Stat(file)
		if err != nil {
			return place{}, err
		}
		return place{path: file, name: candidate, within: b.Tree, dir: info.IsDir()}, nil
	}
	for _, candidate := range names {
		// Build systems keep their outputs elsewhere and leave a symlink here.
		file := filepath.Join(b.RepoRoot, filepath.FromSlash(candidate))
		if info, err := os.Stat(file); err == nil {
			return place{path: file, name: candidate, fromWorkTree: true, dir: info.IsDir()}, nil
		}
	}
	return place{}, plan.WithHint(fmt.Errorf("%s is neither in the commit nor in the work tree %s", strings.Join(names, " or "), b.RepoRoot),
		"build it first, or correct the path: it is relative to the root of the repository")
}

// inside refuses a file of the commit that is a symlink to somewhere else.
func inside(folder, file string) error {
	if folder == "" {
		return nil
	}
	root, err := filepath.EvalSymlinks(folder)
	if err != nil {
		return err
	}
	real, err := filepath.EvalSymlinks(file)
	if err != nil {
		return err
	}
	relative, err := filepath.Rel(root, real)
	if err != nil || !filepath.IsLocal(relative) {
		return fmt.Errorf("%s is a symlink that leaves the commit", file)
	}
	return nil
}
