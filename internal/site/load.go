package site

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/gohcl"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/zclconf/go-cty/cty"
)

const (
	sitesFolder   = "sites"
	jobsFolder    = "jobs"
	siteFileName  = "site.hcl"
	componentName = "component.hcl"
)

// LoadOptions says what else a load may read.
type LoadOptions struct {
	// WorkDir is the repository's work tree, for files that are not in git such
	// as an operator's public_key_file. Empty: such attributes are an error.
	WorkDir string
	// Platform holds the components that come with the program, under jobs/ as in
	// a repository. The repository's own file of the same path wins. May be nil.
	Platform fs.FS
}

// UnknownSiteError says that the repository has no such site.
type UnknownSiteError struct {
	Name string
	// Known are the sites there are.
	Known []string
}

func (e *UnknownSiteError) Error() string {
	if len(e.Known) == 0 {
		return fmt.Sprintf("no site %q: the commit has no sites/*/site.hcl at all", e.Name)
	}
	text := fmt.Sprintf("no site %q; the commit has: %s", e.Name, strings.Join(e.Known, ", "))
	if near := nearest(e.Name, e.Known); near != "" {
		text += fmt.Sprintf(" (did you mean %q?)", near)
	}
	return text
}

// Hint says how a site comes to be.
func (e *UnknownSiteError) Hint() string {
	if len(e.Known) == 0 {
		return "`site init` writes a first site; a site is read from the commit, so commit it"
	}
	return "a site is the folder sites/NAME with a site.hcl, read from the commit: a new one must be committed first"
}

// Names lists the sites of a repository, sorted.
func Names(fsys fs.FS) ([]string, error) {
	files, err := fs.Glob(fsys, path.Join(sitesFolder, "*", siteFileName))
	if err != nil {
		return nil, fmt.Errorf("list sites: %w", err)
	}
	names := make([]string, 0, len(files))
	for _, file := range files {
		names = append(names, path.Base(path.Dir(file)))
	}
	slices.Sort(names)
	return names, nil
}

// Load reads and validates one site. fsys is the repository's content at the
// commit that is deployed. Everything wrong in the files is in one *ConfigError.
func Load(fsys fs.FS, name string, opts LoadOptions) (*Site, error) {
	known, err := Names(fsys)
	if err != nil {
		return nil, err
	}
	if !slices.Contains(known, name) {
		return nil, &UnknownSiteError{Name: name, Known: known}
	}
	l := &loader{repository: fsys, opts: opts, problems: newProblems()}
	loaded, err := l.load(name)
	if err != nil {
		return nil, fmt.Errorf("read site %q: %w", name, err)
	}
	if err := l.problems.err(); err != nil {
		return nil, err
	}
	return loaded, nil
}

// loader reads the files of one site.
type loader struct {
	repository fs.FS
	opts       LoadOptions
	problems   *problems
	// store is the site's, nil where it has none.
	store *ObjectStore
}

func (l *loader) load(name string) (*Site, error) {
	block, err := l.siteFile(name)
	if err != nil || block == nil {
		return nil, err
	}
	s := block.site(name, l.problems, l.opts.WorkDir)
	l.store = s.ObjectStore
	l.checkObjectStore(block)
	var placed []placedComponent
	for _, use := range block.uniqueComponents(l.problems) {
		found, err := l.component(use)
		if err != nil {
			return nil, err
		}
		if found != nil {
			placed = append(placed, *found)
		}
	}
	active := activeNames(block.Components)
	l.catalogue(name, placed, active)
	l.checkPostgres(name, placed, active)
	for _, c := range placed {
		s.Components = append(s.Components, c.Component)
	}
	checkOrder(s, placed, active, l.problems)
	checkShared(placed, l.problems)
	return s, nil
}

// read looks in the repository, then among the platform's own components.
func (l *loader) read(file string) ([]byte, error) {
	content, err := fs.ReadFile(l.repository, file)
	if err != nil && errors.Is(err, fs.ErrNotExist) && l.opts.Platform != nil {
		return fs.ReadFile(l.opts.Platform, file)
	}
	return content, err
}

// isPlatform reports whether the program itself brings the component, and it comes
// before all that needs secrets; a repository that overrides some of its files does
// not change that.
func (l *loader) isPlatform(component string) bool {
	if l.opts.Platform == nil || component == ObjectStorageComponent {
		return false
	}
	_, err := fs.Stat(l.opts.Platform, path.Join(jobsFolder, component, componentName))
	return err == nil
}

// knownComponents lists the folders under jobs/ that are components.
func (l *loader) knownComponents() []string {
	var names []string
	for _, fsys := range []fs.FS{l.repository, l.opts.Platform} {
		if fsys == nil {
			continue
		}
		// The pattern is a constant and correct: Glob has no other error.
		files, _ := fs.Glob(fsys, path.Join(jobsFolder, "*", componentName))
		for _, file := range files {
			names = append(names, path.Base(path.Dir(file)))
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// decode parses content strictly into target; false means that target is not usable.
func (l *loader) decode(content []byte, file string, target any) bool {
	body := l.parse(content, file)
	if body == nil {
		return false
	}
	l.problems.decoded(gohcl.DecodeBody(body, nil, target))
	return true
}

// parse returns nil after a syntax error, when what follows it means nothing.
func (l *loader) parse(content []byte, file string) *hclsyntax.Body {
	parsed, diags := hclsyntax.ParseConfig(content, file, hcl.InitialPos)
	l.problems.files[file] = parsed
	l.problems.decoded(diags)
	for _, diag := range diags {
		// A twice-set attribute leaves a complete tree.
		if diag.Severity == hcl.DiagError && diag.Summary != "Attribute redefined" {
			return nil
		}
	}
	body, ok := parsed.Body.(*hclsyntax.Body)
	if !ok || hasAbsurdNumber(body, l.problems) {
		return nil
	}
	return body
}

// hasAbsurdNumber finds numbers such as 1e999999999, which take gigabytes as text.
func hasAbsurdNumber(body *hclsyntax.Body, p *problems) bool {
	found := false
	_ = hclsyntax.VisitAll(body, func(node hclsyntax.Node) hcl.Diagnostics {
		literal, ok := node.(*hclsyntax.LiteralValueExpr)
		if !ok || literal.Val.IsNull() || literal.Val.Type() != cty.Number {
			return nil
		}
		number := literal.Val.AsBigFloat()
		if exponent := number.MantExp(nil); number.IsInf() || exponent > 1100 || exponent < -1100 {
			found = true
			p.decode = append(p.decode, &hcl.Diagnostic{
				Severity: hcl.DiagError, Summary: "Number out of range",
				Detail:  "The number does not fit a floating point number of 64 bits.",
				Subject: literal.SrcRange.Ptr(),
			})
		}
		return nil
	})
	return found
}

func fileStart(file string) hcl.Range {
	return hcl.Range{Filename: file, Start: hcl.InitialPos, End: hcl.InitialPos}
}
