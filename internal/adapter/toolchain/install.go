package toolchain

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"syscall"
	"time"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/retry"
)

// lockLimit covers the longest cold builds of other processes before us.
const lockLimit = 40 * time.Minute

// keepOld is how many folders of older pins stay: a process that runs now may
// still read from one.
const keepOld = 1

type silent struct{}

func (silent) Message(string, ...any)     {}
func (silent) Bytes(string, int64, int64) {}

// Install builds, fetches, unpacks or links a tool for a platform, unless it is
// there already, and returns its executable. One install runs at a time on a
// root; what it makes appears at once, by a rename.
func (t *Toolchain) Install(ctx context.Context, name string, platform Platform, progress plan.Progress) (string, error) {
	if progress == nil {
		progress = silent{}
	}
	tool, err := t.Tool(name)
	if err != nil {
		return "", err
	}
	if !tool.supports(platform) {
		return "", fmt.Errorf("tool %q cannot be had for %s", name, platform)
	}
	goVersion := ""
	if tool.Module != nil {
		if goVersion, err = t.goVersion(ctx); err != nil {
			// Whoever has the tool needs no Go to use it.
			if path, err := t.Which(name, platform); err == nil {
				return path, nil
			}
			return "", fmt.Errorf("install tool %q: %w", name, err)
		}
	}
	if path, ok := t.sound(tool, platform, goVersion); ok {
		return path, nil
	}
	unlock, err := t.lock(ctx, progress)
	if err != nil {
		return "", fmt.Errorf("install tool %q: %w", name, err)
	}
	defer unlock()
	// Another process may have installed it while we waited.
	if path, ok := t.sound(tool, platform, goVersion); ok {
		return path, nil
	}
	if err := t.make(ctx, tool, platform, goVersion, progress); err != nil {
		return "", fmt.Errorf("install tool %q for %s: %w", name, platform, err)
	}
	return t.Which(name, platform)
}

// sound says whether what is pinned is installed and untouched, so that Install
// repairs what Verify complains of.
func (t *Toolchain) sound(tool Tool, platform Platform, goVersion string) (string, bool) {
	path, recorded, err := t.resolve(tool.Name, platform)
	if err != nil || recorded.GoVersion != goVersion || tool.linked() {
		return "", false
	}
	details, _, err := t.verifyOne(tool.Name, platform)
	return path, err == nil && len(details) == 0
}

// linked tools can change without their pin changing.
func (t Tool) linked() bool { return t.Anywhere != nil && t.Anywhere.Path != "" }

func (t *Toolchain) make(ctx context.Context, tool Tool, platform Platform, goVersion string, progress plan.Progress) error {
	root := t.Root(platform)
	if err := os.MkdirAll(root, 0o755); err != nil {
		return err
	}
	if err := removeLeftovers(root); err != nil {
		return err
	}
	work, err := os.MkdirTemp(root, ".install-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	staged := filepath.Join(work, "tool")
	if err := os.MkdirAll(filepath.Join(staged, "bin"), 0o755); err != nil {
		return err
	}
	if tool.Module != nil {
		err = t.build(ctx, tool, platform, filepath.Join(work, "module"), staged, goVersion, progress)
	} else {
		source, _ := tool.source(platform)
		err = t.obtain(ctx, tool, source, platform, work, staged, progress)
	}
	if err != nil {
		return err
	}
	files, err := scan(staged)
	if err != nil {
		return err
	}
	pin := tool.pin(platform)
	recorded := manifest{
		Version: 1, Tool: tool.Name, Release: tool.Version, Platform: platform.String(),
		Pin: pin, GoVersion: goVersion, Files: files,
	}
	if err := recorded.write(staged); err != nil {
		return err
	}
	folder := tool.Name + "@" + key(pin, goVersion)
	return publish(root, tool.Name, folder, staged, work)
}

// obtain makes staged from one of the sources that need no build.
func (t *Toolchain) obtain(ctx context.Context, tool Tool, source Source, platform Platform, work, staged string, progress plan.Progress) error {
	executable := filepath.Join(staged, "bin", tool.Executable)
	switch {
	case source.URL != "":
		return fetch(ctx, source, work, executable, progress)
	case source.Path != "":
		return link(source, executable)
	case t.options.Packages == nil:
		return errors.New("this program was given no way to unpack Debian packages")
	case platform != Host():
		return fmt.Errorf("it is unpacked from Debian packages, which is possible for %s only on such a machine", platform)
	default:
		return unpackPython(ctx, tool.Name, t.options.Packages, source.lock, work, staged, progress)
	}
}

func link(source Source, executable string) error {
	info, err := os.Stat(source.Path)
	switch {
	case err != nil:
		return err
	case !info.Mode().IsRegular() || info.Mode().Perm()&0o111 == 0:
		return fmt.Errorf("%s is not an executable file", source.Path)
	}
	if source.SHA256 != "" {
		sum, _, err := digestFile(source.Path)
		if err != nil {
			return err
		}
		if sum != source.SHA256 {
			return fmt.Errorf("%s has sha256 %s, pinned is %s", source.Path, sum, source.SHA256)
		}
	}
	return os.Symlink(source.Path, executable)
}

// publish renames the staged folder to its final name, then switches the link
// of the plain name over to it.
func publish(root, name, folder, staged, work string) error {
	final := filepath.Join(root, folder)
	// A folder of the same key that is there was found broken: resolve or the
	// Go version said so.
	if err := os.RemoveAll(final); err != nil {
		return err
	}
	if err := os.Rename(staged, final); err != nil {
		return err
	}
	fresh := filepath.Join(work, "link")
	if err := os.Symlink(folder, fresh); err != nil {
		return err
	}
	if err := os.Rename(fresh, filepath.Join(root, name)); err != nil {
		return err
	}
	return prune(root, name, folder)
}

// prune removes all but the newest folders of older pins.
func prune(root, name, current string) error {
	folders, err := filepath.Glob(filepath.Join(root, name+"@*"))
	if err != nil {
		return err
	}
	modified := map[string]time.Time{}
	var old []string
	for _, folder := range folders {
		info, err := os.Lstat(folder)
		if err != nil || filepath.Base(folder) == current {
			continue
		}
		modified[folder] = info.ModTime()
		old = append(old, folder)
	}
	sort.Slice(old, func(i, j int) bool { return modified[old[i]].After(modified[old[j]]) })
	for index, folder := range old {
		if index >= keepOld {
			if err := os.RemoveAll(folder); err != nil {
				return err
			}
		}
	}
	return nil
}

// removeLeftovers deletes what killed installs left; the lock is held.
func removeLeftovers(root string) error {
	left, err := filepath.Glob(filepath.Join(root, ".install-*"))
	if err != nil {
		return err
	}
	for _, folder := range left {
		if err := os.RemoveAll(folder); err != nil {
			return err
		}
	}
	return nil
}

// lock takes the root's file lock. The kernel frees it when the process ends,
// however it ends.
func (t *Toolchain) lock(ctx context.Context, progress plan.Progress) (func(), error) {
	if err := os.MkdirAll(t.root, 0o755); err != nil {
		return nil, err
	}
	opened, err := os.OpenFile(filepath.Join(t.root, ".lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	told := false
	err = retry.Until(ctx, "another install of tools to end", lockLimit, func(context.Context) error {
		err := syscall.Flock(int(opened.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		switch {
		case err == nil:
			return nil
		case !errors.Is(err, syscall.EWOULDBLOCK):
			return retry.Permanent(&fs.PathError{Op: "lock", Path: opened.Name(), Err: err})
		}
		if !told {
			progress.Message("waiting for another install of tools to end")
			told = true
		}
		return fmt.Errorf("%s is locked", opened.Name())
	})
	if err != nil {
		return nil, errors.Join(err, opened.Close())
	}
	return func() { _ = opened.Close() }, nil
}
