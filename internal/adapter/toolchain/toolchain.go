// Package toolchain resolves, installs, verifies and runs pinned tools.
//
// A tool of a platform lies at <root>/<os>_<architecture>/<name>/bin/, where
// <name> is a link to the folder <name>@<key> of its pin. Nothing else is ever
// looked at: no PATH, and no download but by Install.
package toolchain

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sort"
	"strings"

	"github.com/nomad-site/site/internal/plan"
)

// Packages unpacks the Debian packages of a lock file into a folder.
type Packages interface {
	Unpack(ctx context.Context, lock []byte, into string, progress plan.Progress) error
}

// Options are what Open can do without.
type Options struct {
	// Overrides replaces sources, by tool name. A name that the catalogue
	// lacks adds a tool.
	Overrides map[string]Override
	// Packages is needed to install tools that are made of .deb packages.
	Packages Packages
	// GoRoot says where the builder's Go is; empty: $GOROOT, then $PATH.
	GoRoot string
}

// Toolchain is a catalogue bound to a root folder.
type Toolchain struct {
	root    string
	tools   map[string]Tool
	options Options
}

// Host is the platform that this program runs on.
func Host() Platform { return Platform{runtime.GOOS, runtime.GOARCH} }

// Open reads the catalogue. It touches nothing below root.
func Open(catalogue fs.FS, root string, options Options) (*Toolchain, error) {
	tools, err := ParseCatalogue(catalogue)
	if err != nil {
		return nil, err
	}
	if root, err = filepath.Abs(root); err != nil {
		return nil, fmt.Errorf("open the tool root: %w", err)
	}
	opened := &Toolchain{root: root, tools: map[string]Tool{}, options: options}
	for _, tool := range tools {
		opened.tools[tool.Name] = tool
	}
	var problems []error
	for _, name := range sortedKeys(options.Overrides) {
		override := options.Overrides[name]
		if err := override.Source.validate(); err != nil {
			problems = append(problems, fmt.Errorf("override of tool %q: %w", name, err))
			continue
		}
		if override.Source.Debs != "" {
			problems = append(problems, fmt.Errorf("override of tool %q: debs can be given by the catalogue only", name))
			continue
		}
		opened.override(name, override)
	}
	return opened, errors.Join(problems...)
}

func (t *Toolchain) override(name string, override Override) {
	tool, known := t.tools[name]
	if !known {
		tool = Tool{Name: name, Executable: name, Description: "given by the site"}
	}
	tool.Module, tool.Sources, tool.files = nil, nil, nil
	tool.Anywhere = &override.Source
	if override.Version != "" {
		tool.Version = override.Version
	}
	t.tools[name] = tool
}

func sortedKeys[V any](values map[string]V) []string {
	names := make([]string, 0, len(values))
	for name := range values {
		names = append(names, name)
	}
	sort.Strings(names)
	return names
}

// Names lists the catalogue's tools in order.
func (t *Toolchain) Names() []string { return sortedKeys(t.tools) }

// Tool looks an entry up.
func (t *Toolchain) Tool(name string) (Tool, error) {
	tool, ok := t.tools[name]
	if !ok {
		return Tool{}, plan.WithHint(fmt.Errorf("tool %q is not in the catalogue", name),
			"the catalogue has: %s", strings.Join(t.Names(), ", "))
	}
	return tool, nil
}

// NotInstalledError says that a tool must be installed before it can be used.
type NotInstalledError struct {
	Name     string
	Platform Platform
	Reason   string
}

func (e *NotInstalledError) Error() string {
	return fmt.Sprintf("tool %q for %s %s", e.Name, e.Platform, e.Reason)
}

// Hint implements plan.Hinter.
func (e *NotInstalledError) Hint() string {
	if e.Platform != Host() {
		return fmt.Sprintf("run: site tool install --platform %s %s", e.Platform, e.Name)
	}
	return "run: site tool install " + e.Name
}

// Root is the folder of a platform's tools: <Root>/<name>/bin/<executable>.
func (t *Toolchain) Root(platform Platform) string {
	return filepath.Join(t.root, platform.OS+"_"+platform.Architecture)
}

// Which resolves a tool's executable, with its digest as recorded at install.
// A tool of an older pin counts as not installed.
func (t *Toolchain) Which(name string, platform Platform) (string, error) {
	path, _, err := t.resolve(name, platform)
	return path, err
}

// Digest is the recorded sha256 of a tool's executable.
func (t *Toolchain) Digest(name string, platform Platform) (string, error) {
	_, recorded, err := t.resolve(name, platform)
	if err != nil {
		return "", err
	}
	for _, found := range recorded.Files {
		if found.Path == "bin/"+t.tools[name].Executable {
			return found.SHA256, nil
		}
	}
	return "", fmt.Errorf("tool %q: its manifest names no executable", name)
}

func (t *Toolchain) resolve(name string, platform Platform) (string, manifest, error) {
	tool, err := t.Tool(name)
	if err != nil {
		return "", manifest{}, err
	}
	if !tool.supports(platform) {
		return "", manifest{}, fmt.Errorf("tool %q cannot be had for %s", name, platform)
	}
	missing := func(reason string) (string, manifest, error) {
		return "", manifest{}, &NotInstalledError{Name: name, Platform: platform, Reason: reason}
	}
	folder := filepath.Join(t.Root(platform), name)
	recorded, err := readManifest(folder)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return missing("is not installed")
	case err != nil:
		return "", manifest{}, fmt.Errorf("tool %q: %w", name, err)
	case recorded.Pin != tool.pin(platform):
		return missing(fmt.Sprintf("is installed for another pin (release %s, pinned is %s)", recorded.Release, tool.Version))
	}
	path := filepath.Join(folder, "bin", tool.Executable)
	info, err := os.Stat(path)
	if err != nil || !info.Mode().IsRegular() || info.Mode().Perm()&0o111 == 0 {
		return missing("has lost its executable")
	}
	return path, recorded, nil
}

// Difference is what Verify found wrong with one installed tool.
type Difference struct {
	Tool     string   `json:"tool"`
	Platform string   `json:"platform"`
	Details  []string `json:"details"`
}

// Verify holds every file of the named tools against the sha256 recorded at
// install, on each platform that they are installed for; no names means every
// installed tool. A named tool that is not installed is a difference.
func (t *Toolchain) Verify(ctx context.Context, names []string) ([]Difference, error) {
	platforms, err := t.platforms()
	if err != nil {
		return nil, err
	}
	wanted := names
	if len(wanted) == 0 {
		wanted = t.Names()
	}
	var differences []Difference
	for _, name := range wanted {
		if _, err := t.Tool(name); err != nil {
			return nil, err
		}
		installed := false
		for _, platform := range platforms {
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			details, there, err := t.verifyOne(name, platform)
			if err != nil {
				return nil, fmt.Errorf("verify tool %q for %s: %w", name, platform, err)
			}
			installed = installed || there
			if len(details) > 0 {
				differences = append(differences, Difference{name, platform.String(), details})
			}
		}
		if !installed && len(names) > 0 {
			differences = append(differences, Difference{name, Host().String(), []string{"is not installed"}})
		}
	}
	return differences, nil
}

func (t *Toolchain) verifyOne(name string, platform Platform) (details []string, installed bool, err error) {
	folder := filepath.Join(t.Root(platform), name)
	if _, err := os.Lstat(folder); errors.Is(err, fs.ErrNotExist) {
		return nil, false, nil
	}
	recorded, err := readManifest(folder)
	if err != nil {
		return []string{err.Error()}, true, nil
	}
	real, err := filepath.EvalSymlinks(folder)
	if err != nil {
		return nil, true, err
	}
	actual, err := scan(real)
	if err != nil {
		return nil, true, err
	}
	details = recorded.compare(actual)
	if pinned := t.tools[name].pin(platform); recorded.Pin != pinned {
		details = append(details, fmt.Sprintf("is installed as %s, which is not what is pinned (%s)", recorded.Release, t.tools[name].Version))
	}
	return details, true, nil
}

// platforms lists those that something was installed for, this machine's first.
func (t *Toolchain) platforms() ([]Platform, error) {
	entries, err := os.ReadDir(t.root)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("read the tool root: %w", err)
	}
	platforms := []Platform{Host()}
	for _, entry := range entries {
		platform, err := ParsePlatform(strings.Replace(entry.Name(), "_", "/", 1))
		if err == nil && entry.IsDir() && !slices.Contains(platforms, platform) {
			platforms = append(platforms, platform)
		}
	}
	return platforms, nil
}
