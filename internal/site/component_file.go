package site

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"

	"github.com/hashicorp/hcl/v2"
)

// The shape of jobs/<name>/component.hcl. jobs/example/component.hcl documents it.

type componentFile struct {
	After       []string          `hcl:"after,optional"`
	Jobspec     string            `hcl:"jobspec,optional"`
	Variables   *hcl.Attribute    `hcl:"variables,optional"`
	Artifacts   []*artifactBlock  `hcl:"artifact,block"`
	Directories []*directoryBlock `hcl:"directory,block"`
	Reads       []string          `hcl:"reads,optional"`
	Secrets     []*secretBlock    `hcl:"secret,block"`
	Databases   []*databaseBlock  `hcl:"database,block"`
	Roles       []*roleBlock      `hcl:"role,block"`
	Grants      []*grantBlock     `hcl:"grant,block"`
	Body        hcl.Body          `hcl:",body"`
}

type artifactBlock struct {
	Name          string    `hcl:"name,label"`
	Kind          string    `hcl:"kind,optional"`
	GoPackage     string    `hcl:"go_package,optional"`
	DockerArchive string    `hcl:"docker_archive,optional"`
	OCILayout     string    `hcl:"oci_layout,optional"`
	Path          string    `hcl:"path,optional"`
	URL           string    `hcl:"url,optional"`
	Tool          string    `hcl:"tool,optional"`
	DebPackages   []string  `hcl:"deb_packages,optional"`
	Embedded      string    `hcl:"embedded,optional"`
	SHA256        string    `hcl:"sha256,optional"`
	Executable    string    `hcl:"executable,optional"`
	Entrypoint    []string  `hcl:"entrypoint,optional"`
	StopSignal    string    `hcl:"stop_signal,optional"`
	User          string    `hcl:"user,optional"`
	Body          hcl.Body  `hcl:",body"`
	Range         hcl.Range `hcl:",def_range"`
	NameAtRange   hcl.Range `hcl:"name,label_range"`
}

type directoryBlock struct {
	Path        string    `hcl:"path,label"`
	Owner       string    `hcl:"owner,optional"`
	Group       string    `hcl:"group,optional"`
	Mode        string    `hcl:"mode,optional"`
	Body        hcl.Body  `hcl:",body"`
	Range       hcl.Range `hcl:",def_range"`
	PathAtRange hcl.Range `hcl:"path,label_range"`
}

const (
	defaultImageUser     = "65532:65532"
	defaultDirectoryMode = "0755"
	rootAccount          = "root"
)

// artifactSources are the attributes of which an artifact has exactly one.
var artifactSources = []string{"go_package", "docker_archive", "oci_layout", "path", "url", "tool", "deb_packages", "embedded"}

// embeddedPrograms are the executables that site carries for images.
var embeddedPrograms = []string{ObjectStorageComponent}

// component reads one active component; nil where it cannot be read.
func (l *loader) component(use *useBlock) (*placedComponent, error) {
	p := l.problems
	if !namePattern.MatchString(use.Name) {
		p.add(use.NameAtRange, "Invalid component name", "%s", nameRule)
		return nil, nil
	}
	folder := path.Join(jobsFolder, use.Name)
	file := path.Join(folder, componentName)
	content, err := l.read(file)
	if errors.Is(err, fs.ErrNotExist) {
		p.add(use.NameAtRange, "Unknown component", "There is no %s.%s", file, didYouMean(use.Name, l.knownComponents(), "components"))
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	c := Component{
		Name: use.Name, Folder: folder, Platform: l.isPlatform(use.Name), Range: use.Range,
		JobspecPath: path.Join(folder, use.Name+".nomad.hcl"),
	}
	placed := &placedComponent{Component: c, file: fileStart(file)}
	var decoded componentFile
	if !l.decode(content, file, &decoded) {
		// The jobspec can still be read where its usual name holds it.
		if jobspec, err := l.read(c.JobspecPath); err == nil {
			l.jobspecFacts(jobspec, &c)
		}
		return placed, nil
	}
	placed.body, placed.decoded = decoded.Body, &decoded
	c.After = decoded.After
	c.Artifacts = decoded.artifacts(p)
	l.checkGoPackages(c, decoded.Artifacts)
	c.Directories = decoded.directories(p)
	c.Secrets = l.secrets(c, decoded.Secrets)
	c.Databases, c.Roles, c.Grants = decoded.databases(p), decoded.roles(c.Name, p), decoded.grants(p)
	facts, err := l.jobspec(&c, &decoded)
	if err != nil {
		return nil, err
	}
	defaults, overrides := literals(decoded.Variables, p), literals(use.Variables, p)
	c.Variables = mergeVariables(defaults, overrides)
	if err := l.giveStore(&c, defaults, overrides); err != nil {
		return nil, err
	}
	if facts != nil {
		facts.checkVariables(c, use, p, defaults, overrides)
		facts.checkArtifacts(c, p)
		facts.templates = facts.findTemplates(c.Jobspec, c.Variables)
	}
	placed.facts = facts
	placed.Component = c
	return placed, nil
}

func (l *loader) jobspec(c *Component, decoded *componentFile) (*jobspecFacts, error) {
	p := l.problems
	if isSet(decoded.Body, "jobspec") {
		if !fs.ValidPath(decoded.Jobspec) || decoded.Jobspec == "." {
			p.add(at(decoded.Body, "jobspec"), "Invalid path", "%q is not a file below %s.", decoded.Jobspec, c.Folder)
			return nil, nil
		}
		c.JobspecPath = path.Join(c.Folder, decoded.Jobspec)
	}
	content, err := l.read(c.JobspecPath)
	if errors.Is(err, fs.ErrNotExist) {
		p.add(at(decoded.Body, "jobspec"), "Missing jobspec", "There is no %s.", c.JobspecPath)
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	c.Jobspec = content
	return l.jobspecFacts(content, c), nil
}

func (f *componentFile) artifacts(p *problems) []Artifact {
	var artifacts []Artifact
	names := map[string]hcl.Range{}
	for _, block := range f.Artifacts {
		if block.Body == nil {
			continue
		}
		if first, taken := names[block.Name]; taken {
			p.add(block.NameAtRange, "Duplicate artifact", "An artifact named %q is already declared at %s.", block.Name, place(first))
			continue
		}
		names[block.Name] = block.NameAtRange
		artifacts = append(artifacts, block.artifact(p))
	}
	return artifacts
}

func (b *artifactBlock) artifact(p *problems) Artifact {
	a := Artifact{
		Name: b.Name, Kind: Image, GoPackage: b.GoPackage, URL: b.URL, Tool: b.Tool, DebPackages: b.DebPackages, Embedded: b.Embedded,
		Executable: b.Executable, Entrypoint: b.Entrypoint, StopSignal: b.StopSignal, User: b.User, Range: b.Range,
	}
	if len(b.Name) > 63 || !artifactPattern.MatchString(b.Name) {
		p.add(b.NameAtRange, "Invalid artifact name", "A name is 1 to 63 lower-case letters and digits, with single . _ or - between them.")
	}
	if isSet(b.Body, "kind") {
		a.Kind = ArtifactKind(b.Kind)
		if a.Kind != Image && a.Kind != File {
			p.add(at(b.Body, "kind"), "Invalid kind", "%q is neither \"image\" nor \"file\".", b.Kind)
		}
	}
	var sources []string
	for _, source := range artifactSources {
		if isSet(b.Body, source) {
			sources = append(sources, source)
		}
	}
	switch len(sources) {
	case 1:
		b.checkSource(sources[0], &a, p)
	case 0:
		p.add(b.Range, "Artifact without a source", "Artifact %q must have one of: %s.", b.Name, strings.Join(artifactSources, ", "))
	default:
		p.add(b.Range, "Artifact with several sources", "Artifact %q has %s; exactly one is allowed.", b.Name, strings.Join(sources, " and "))
	}
	if isSet(b.Body, "sha256") {
		hex, err := normalDigest(b.SHA256)
		if err != nil {
			p.add(at(b.Body, "sha256"), "Invalid sha256", "%s.", err)
		}
		a.SHA256 = hex
	}
	if isSet(b.Body, "entrypoint") && len(b.Entrypoint) == 0 {
		p.add(at(b.Body, "entrypoint"), "Empty entrypoint", "Leave it out to keep the image's own.")
	}
	if isSet(b.Body, "stop_signal") && !signalPattern.MatchString(b.StopSignal) {
		p.add(at(b.Body, "stop_signal"), "Invalid signal", "%q is not the name of a signal, such as SIGINT.", b.StopSignal)
	}
	if isSet(b.Body, "user") {
		if err := checkImageUser(b.User); err != nil {
			p.add(at(b.Body, "user"), "Invalid user", "%s.", err)
		}
	}
	if a.Kind == File {
		for _, name := range []string{"entrypoint", "stop_signal", "user"} {
			if isSet(b.Body, name) {
				p.add(at(b.Body, name), "Attribute of an image", "A file has no %s.", name)
			}
		}
	}
	return a
}

// checkSource holds the rules of one source, and what may stand beside it.
func (b *artifactBlock) checkSource(source string, a *Artifact, p *problems) {
	assembled, digestible := true, false
	subject := at(b.Body, source)
	repositoryPath := func(text string) string {
		clean, err := checkRepositoryPath(text)
		if err != nil {
			p.add(subject, "Invalid path", "%s.", err)
		}
		return clean
	}
	switch source {
	case "go_package":
		if err := checkGoPackage(b.GoPackage); err != nil {
			p.add(subject, "Invalid Go package", "%s.", err)
		}
	case "docker_archive":
		a.DockerArchive, assembled, digestible = repositoryPath(b.DockerArchive), false, true
	case "oci_layout":
		a.OCILayout, assembled, digestible = repositoryPath(b.OCILayout), false, true
	case "path":
		a.Path, digestible = repositoryPath(b.Path), true
	case "url":
		digestible = true
		if err := checkURL(b.URL); err != nil {
			p.add(subject, "Invalid URL", "%s.", err)
		}
		if !isSet(b.Body, "sha256") {
			p.add(subject, "Missing sha256", "A url needs the sha256 of what it must deliver.")
		}
	case "tool":
		if !artifactPattern.MatchString(b.Tool) {
			p.add(subject, "Invalid tool", "%q is not the name of a pinned tool.", b.Tool)
		}
		if a.Executable == "" {
			a.Executable = b.Tool
		}
	case "deb_packages":
		b.checkDebPackages(p)
	case "embedded":
		if !slices.Contains(embeddedPrograms, b.Embedded) {
			p.add(subject, "Unknown program", "%q is no program that site carries.%s", b.Embedded, didYouMean(b.Embedded, embeddedPrograms, "programs"))
		}
	}
	if a.Kind == File && (!assembled || source == "deb_packages" || source == "embedded") {
		p.add(at(b.Body, "kind"), "Wrong kind", "%s always is an image.", source)
	}
	if assembled && a.Kind == Image && a.User == "" {
		a.User = defaultImageUser
	}
	if isSet(b.Body, "sha256") && !digestible {
		p.add(at(b.Body, "sha256"), "Unexpected sha256", "%s is built here: only docker_archive, oci_layout, path and url have a sha256.", source)
	}
	switch {
	case !isSet(b.Body, "executable") && source != "tool":
	case source != "tool" && (source != "path" && source != "url" || a.Kind != Image):
		p.add(at(b.Body, "executable"), "Unexpected executable", "Only an artifact with tool, or an image from path or url, has it.")
	case a.Executable != path.Base(a.Executable) || a.Executable == "." || a.Executable == "..":
		p.add(at(b.Body, "executable"), "Invalid executable", "%q is not a plain file name.", a.Executable)
	}
}

func (b *artifactBlock) checkDebPackages(p *problems) {
	if len(b.DebPackages) == 0 {
		p.add(at(b.Body, "deb_packages"), "Empty list", "Name at least one package.")
	}
	for i, name := range b.DebPackages {
		switch {
		case !packagePattern.MatchString(name):
			p.add(atElement(b.Body, "deb_packages", i), "Invalid package", "%q is not the name of a Debian package.", name)
		case slices.Index(b.DebPackages, name) < i:
			p.add(atElement(b.Body, "deb_packages", i), "Duplicate package", "%q is already in the list.", name)
		}
	}
}

// checkGoPackage accepts "./path" below the repository's root, or an import path.
func checkGoPackage(text string) error {
	if strings.HasPrefix(text, "./") {
		_, err := checkRepositoryPath(text)
		return err
	}
	if !importPattern.MatchString(text) || !strings.Contains(strings.SplitN(text, "/", 2)[0], ".") || strings.Contains(text, "..") {
		return fmt.Errorf("%q is neither an import path nor a path that starts with ./", text)
	}
	return nil
}

// checkGoPackages insists that a package of this repository is in the commit.
func (l *loader) checkGoPackages(c Component, blocks []*artifactBlock) {
	if c.Platform {
		return // built from the program's own source
	}
	for _, block := range blocks {
		if block.Body == nil || !strings.HasPrefix(block.GoPackage, "./") || checkGoPackage(block.GoPackage) != nil {
			continue
		}
		folder := path.Clean(block.GoPackage)
		if info, err := fs.Stat(l.repository, folder); err != nil || !info.IsDir() {
			l.problems.add(at(block.Body, "go_package"), "Missing Go package", "There is no folder %s in the commit.", folder)
		}
	}
}

func (f *componentFile) directories(p *problems) []Directory {
	var directories []Directory
	paths := map[string]hcl.Range{}
	for _, block := range f.Directories {
		if block.Body == nil {
			continue
		}
		if first, taken := paths[block.Path]; taken {
			p.add(block.PathAtRange, "Duplicate directory", "%s is already declared at %s.", block.Path, place(first))
			continue
		}
		paths[block.Path] = block.PathAtRange
		directories = append(directories, block.directory(p))
	}
	return directories
}

func (b *directoryBlock) directory(p *problems) Directory {
	d := Directory{Path: b.Path, Owner: rootAccount, Group: rootAccount, Mode: defaultDirectoryMode, Range: b.Range}
	if err := checkDirectoryPath(b.Path); err != nil {
		p.add(b.PathAtRange, "Invalid directory", "%s.", err)
	}
	account := func(name, value string, target *string) {
		if !isSet(b.Body, name) {
			return
		}
		if err := checkAccount(value); err != nil {
			p.add(at(b.Body, name), "Invalid "+name, "%s.", err)
		}
		*target = value
	}
	account("owner", b.Owner, &d.Owner)
	account("group", b.Group, &d.Group)
	if isSet(b.Body, "mode") {
		mode, err := normalMode(b.Mode)
		if err != nil {
			p.add(at(b.Body, "mode"), "Invalid mode", "%s.", err)
		}
		d.Mode = mode
	}
	return d
}
