package toolchain

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"regexp"
	"slices"
	"sort"
	"strings"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/gohcl"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"golang.org/x/mod/modfile"
)

// CatalogueFile is the catalogue's name inside the catalogue's file system.
const CatalogueFile = "tools/catalogue.hcl"

// Platform names an operating system and an architecture as Go does.
type Platform struct{ OS, Architecture string }

func (p Platform) String() string { return p.OS + "/" + p.Architecture }

// ParsePlatform reads "linux/amd64".
func ParsePlatform(text string) (Platform, error) {
	system, architecture, found := strings.Cut(text, "/")
	if !found || system == "" || architecture == "" || strings.Contains(architecture, "/") {
		return Platform{}, fmt.Errorf("platform %q is not of the form os/architecture", text)
	}
	return Platform{system, architecture}, nil
}

// Tool is one entry of the catalogue.
type Tool struct {
	Name        string
	Version     string
	Description string
	// Executable is the file in bin/ that the tool is called by.
	Executable string
	// Environment lists the variables, with *, that the running tool may see.
	Environment []string
	// Module is set where the tool is built from a wrapper module.
	Module *Module
	// Sources are the other kinds, by platform.
	Sources map[Platform]Source
	// Anywhere is an override that serves every platform.
	Anywhere *Source

	files map[string][]byte // pinning files of the module
}

// Module is a wrapper Go module under bootstrap/tools.
type Module struct {
	Folder    string
	Package   string // import path, or a file of the folder
	Tags      []string
	Variables map[string]string // linker's -X
	Platforms []Platform        // empty: any
}

// Source says where an executable comes from; exactly one of URL, Path and
// Debs is set.
type Source struct {
	URL    string
	SHA256 string
	// Member is the file to take out of an archive.
	Member string
	Path   string
	Debs   string // a file of bootstrap/debs

	lock []byte
}

// Override replaces a tool's source by what a site declares.
type Override struct {
	Version string // empty: the catalogue's own
	Source  Source // URL with SHA256, or Path
}

type catalogueFile struct {
	Tools []toolBlock `hcl:"tool,block"`
}

type toolBlock struct {
	Name          string            `hcl:"name,label"`
	Version       string            `hcl:"version"`
	VersionModule string            `hcl:"version_module,optional"`
	Description   string            `hcl:"description"`
	Executable    string            `hcl:"executable,optional"`
	Module        string            `hcl:"module,optional"`
	Package       string            `hcl:"package,optional"`
	Tags          []string          `hcl:"tags,optional"`
	Variables     map[string]string `hcl:"variables,optional"`
	Platforms     []string          `hcl:"platforms,optional"`
	Environment   []string          `hcl:"environment,optional"`
	Sources       []platformBlock   `hcl:"platform,block"`
	Range         hcl.Range         `hcl:",def_range"`
}

type platformBlock struct {
	Platform string    `hcl:"platform,label"`
	URL      string    `hcl:"url,optional"`
	SHA256   string    `hcl:"sha256,optional"`
	Member   string    `hcl:"file,optional"`
	Path     string    `hcl:"path,optional"`
	Debs     string    `hcl:"debs,optional"`
	Range    hcl.Range `hcl:",def_range"`
}

var (
	namePattern   = regexp.MustCompile(`^[a-z0-9][a-z0-9.-]*$`)
	digestPattern = regexp.MustCompile(`^[0-9a-f]{64}$`)
)

// ParseCatalogue reads the catalogue and everything that it pins. It reports
// all mistakes at once, each with its place.
func ParseCatalogue(files fs.FS) ([]Tool, error) {
	content, err := fs.ReadFile(files, CatalogueFile)
	if err != nil {
		return nil, fmt.Errorf("read the tool catalogue: %w", err)
	}
	parsed, diagnostics := hclsyntax.ParseConfig(content, CatalogueFile, hcl.InitialPos)
	var decoded catalogueFile
	if !diagnostics.HasErrors() {
		diagnostics = append(diagnostics, gohcl.DecodeBody(parsed.Body, nil, &decoded)...)
	}
	reader := &catalogueReader{files: files}
	for _, diagnostic := range diagnostics {
		reader.problem(diagnostic.Subject, "%s; %s", diagnostic.Summary, diagnostic.Detail)
	}
	seen := map[string]bool{}
	var tools []Tool
	for _, block := range decoded.Tools {
		if block.Name == "" {
			continue // gohcl has reported why
		}
		if seen[block.Name] {
			reader.problem(&block.Range, "tool %q is there twice", block.Name)
		}
		seen[block.Name] = true
		tools = append(tools, reader.tool(block))
	}
	if len(reader.problems) > 0 {
		return nil, errors.Join(reader.problems...)
	}
	sort.Slice(tools, func(i, j int) bool { return tools[i].Name < tools[j].Name })
	return tools, nil
}

type catalogueReader struct {
	files    fs.FS
	problems []error
}

func (r *catalogueReader) problem(place *hcl.Range, format string, args ...any) {
	where := CatalogueFile
	if place != nil {
		where = fmt.Sprintf("%s:%d,%d", place.Filename, place.Start.Line, place.Start.Column)
	}
	r.problems = append(r.problems, fmt.Errorf("%s: %s", where, fmt.Sprintf(format, args...)))
}

func (r *catalogueReader) tool(block toolBlock) Tool {
	tool := Tool{
		Name: block.Name, Version: block.Version, Description: block.Description,
		Executable: block.Executable, Environment: block.Environment,
	}
	if tool.Executable == "" {
		tool.Executable = block.Name
	}
	if !namePattern.MatchString(block.Name) {
		r.problem(&block.Range, "tool name %q: want lower case letters, digits, . and -", block.Name)
	}
	if path.Base(tool.Executable) != tool.Executable {
		r.problem(&block.Range, "tool %q: executable %q must be a plain file name", block.Name, tool.Executable)
	}
	for _, pattern := range block.Environment {
		if _, err := path.Match(pattern, ""); err != nil {
			r.problem(&block.Range, "tool %q: environment %q: %v", block.Name, pattern, err)
		}
	}
	switch {
	case block.Module != "" && len(block.Sources) > 0:
		r.problem(&block.Range, "tool %q has both a module and platform blocks", block.Name)
	case block.Module == "" && len(block.Sources) == 0:
		r.problem(&block.Range, "tool %q has no source: neither module nor platform block", block.Name)
	case block.Module != "":
		r.module(&tool, block)
	default:
		r.sources(&tool, block)
	}
	return tool
}

func (r *catalogueReader) module(tool *Tool, block toolBlock) {
	tool.Module = &Module{Folder: block.Module, Package: block.Package, Tags: block.Tags, Variables: block.Variables}
	for _, text := range block.Platforms {
		platform, err := ParsePlatform(text)
		if err != nil {
			r.problem(&block.Range, "tool %q: %v", block.Name, err)
			continue
		}
		tool.Module.Platforms = append(tool.Module.Platforms, platform)
	}
	if block.Package == "" {
		r.problem(&block.Range, "tool %q has a module but no package", block.Name)
		return
	}
	var err error
	if tool.files, err = moduleFiles(r.files, block.Module); err != nil {
		r.problem(&block.Range, "tool %q: %v", block.Name, err)
		return
	}
	pinned, err := pinnedVersion(tool.files["tool.mod"], block.Package, block.VersionModule)
	if err != nil {
		r.problem(&block.Range, "tool %q: %v", block.Name, err)
	} else if pinned != "v"+block.Version {
		r.problem(&block.Range, "tool %q: version %q, but its tool.mod pins %s", block.Name, block.Version, pinned)
	}
}

// moduleFiles reads a wrapper module: tool.mod, tool.sum and Go files.
func moduleFiles(files fs.FS, folder string) (map[string][]byte, error) {
	root := path.Join(path.Dir(CatalogueFile), folder)
	entries, err := fs.ReadDir(files, root)
	if err != nil {
		return nil, err
	}
	found := map[string][]byte{}
	for _, entry := range entries {
		name := entry.Name()
		if name != "tool.mod" && name != "tool.sum" && path.Ext(name) != ".go" {
			continue
		}
		if found[name], err = fs.ReadFile(files, path.Join(root, name)); err != nil {
			return nil, err
		}
	}
	for _, name := range []string{"tool.mod", "tool.sum"} {
		if _, ok := found[name]; !ok {
			return nil, fmt.Errorf("%s lacks %s", root, name)
		}
	}
	return found, nil
}

// pinnedVersion is what tool.mod requires of the module that holds pkg.
func pinnedVersion(toolMod []byte, pkg, module string) (string, error) {
	parsed, err := modfile.Parse("tool.mod", toolMod, nil)
	if err != nil {
		return "", err
	}
	found, version := "", ""
	for _, require := range parsed.Require {
		candidate := require.Mod.Path
		holds := candidate == module
		if module == "" {
			holds = pkg == candidate || strings.HasPrefix(pkg, candidate+"/")
		}
		if holds && len(candidate) > len(found) {
			found, version = candidate, require.Mod.Version
		}
	}
	if found == "" {
		if module == "" {
			module = pkg
		}
		return "", fmt.Errorf("tool.mod requires no module that holds %s", module)
	}
	return version, nil
}

func (r *catalogueReader) sources(tool *Tool, block toolBlock) {
	for _, attribute := range []struct {
		name string
		set  bool
	}{
		{"package", block.Package != ""}, {"version_module", block.VersionModule != ""},
		{"tags", len(block.Tags) > 0}, {"variables", len(block.Variables) > 0}, {"platforms", len(block.Platforms) > 0},
	} {
		if attribute.set {
			r.problem(&block.Range, "tool %q: %s goes with module only", block.Name, attribute.name)
		}
	}
	tool.Sources = map[Platform]Source{}
	for _, source := range block.Sources {
		platform, err := ParsePlatform(source.Platform)
		if err != nil {
			r.problem(&source.Range, "tool %q: %v", block.Name, err)
			continue
		}
		if _, twice := tool.Sources[platform]; twice {
			r.problem(&source.Range, "tool %q has platform %s twice", block.Name, platform)
		}
		entry := Source{URL: source.URL, SHA256: source.SHA256, Member: source.Member, Path: source.Path, Debs: source.Debs}
		if err := entry.validate(); err != nil {
			r.problem(&source.Range, "tool %q, platform %s: %v", block.Name, platform, err)
		}
		if entry.Debs != "" {
			if entry.lock, err = fs.ReadFile(r.files, path.Join("debs", entry.Debs)); err != nil {
				r.problem(&source.Range, "tool %q: %v", block.Name, err)
			}
		}
		tool.Sources[platform] = entry
	}
}

func (s Source) validate() error {
	given := 0
	for _, text := range []string{s.URL, s.Path, s.Debs} {
		if text != "" {
			given++
		}
	}
	switch {
	case given != 1:
		return errors.New("want exactly one of url, path and debs")
	case s.URL != "" && !digestPattern.MatchString(s.SHA256):
		return errors.New("url needs sha256 as 64 lower case hexadecimal digits")
	case s.Debs != "" && s.SHA256 != "":
		return errors.New("debs has its digests in the lock; sha256 does not go with it")
	case s.SHA256 != "" && !digestPattern.MatchString(s.SHA256):
		return errors.New("sha256 must be 64 lower case hexadecimal digits")
	case s.URL == "" && s.Member != "":
		return errors.New("file goes with url only")
	case s.Path != "" && !path.IsAbs(s.Path):
		return fmt.Errorf("path %q must be absolute", s.Path)
	}
	return nil
}

// supports says whether the tool can be had for a platform.
func (t Tool) supports(platform Platform) bool {
	if t.Anywhere != nil {
		return true
	}
	if t.Module != nil {
		return len(t.Module.Platforms) == 0 || slices.Contains(t.Module.Platforms, platform)
	}
	_, ok := t.Sources[platform]
	return ok
}

// source is the non-module source for a platform.
func (t Tool) source(platform Platform) (Source, bool) {
	if t.Anywhere != nil {
		return *t.Anywhere, true
	}
	source, ok := t.Sources[platform]
	return source, ok
}
