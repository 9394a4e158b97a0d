package site

import (
	"bytes"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"text/template"
)

//go:embed templates/*.tmpl
var initTemplates embed.FS

// InitOptions answers what a new repository must know.
type InitOptions struct {
	Site        string
	HostAddress string
	// User logs in by SSH; empty: what the ssh configuration says.
	User string
	// OperatorName defaults to "operator". Without OperatorPublicKey (in
	// authorized_keys form) the site has no operator yet.
	OperatorName      string
	OperatorPublicKey string
	// SSHConfigFile is relative to the repository; empty: the user's own.
	SSHConfigFile string
	// Component is the first component's name. Default "app".
	Component string
	// Force overwrites the files of an earlier Init.
	Force bool
}

// ExistsError names what an Init would overwrite.
type ExistsError struct{ Files []string }

func (e *ExistsError) Error() string {
	return "already there: " + strings.Join(e.Files, ", ")
}

// Hint says that these files are the truth once they are written.
func (e *ExistsError) Hint() string {
	return "a site is written once and then edited by hand; --force overwrites these files"
}

// initFile is one file that Init writes.
type initFile struct {
	path, template string
	// kept files belong to the repository, not to the site: one that exists stays.
	kept bool
}

// Init writes the start of an adopter's repository into dir, and returns what it
// wrote, relative to dir.
func Init(dir string, answers InitOptions) ([]string, error) {
	if answers.Component == "" {
		answers.Component = "app"
	}
	if answers.OperatorName == "" {
		answers.OperatorName = "operator"
	}
	answers.OperatorPublicKey = strings.TrimSpace(answers.OperatorPublicKey)
	// Names become paths: they are checked before anything else is done with them.
	for _, name := range []string{answers.Site, answers.Component} {
		if !namePattern.MatchString(name) {
			return nil, fmt.Errorf("name %q is not usable: %s", name, strings.TrimSuffix(nameRule, "."))
		}
	}
	files := []initFile{
		{path: path.Join(sitesFolder, answers.Site, siteFileName), template: "site.hcl.tmpl"},
		{path: path.Join(jobsFolder, answers.Component, componentName), template: "component.hcl.tmpl"},
		{path: path.Join(jobsFolder, answers.Component, answers.Component+".nomad.hcl"), template: "job.nomad.hcl.tmpl"},
		{path: "README.md", template: "README.md.tmpl", kept: true},
		{path: ".gitignore", template: "gitignore.tmpl", kept: true},
	}
	contents, err := renderInit(files, answers)
	if err != nil {
		return nil, err
	}
	if err := provesToLoad(files, contents, answers.Site); err != nil {
		return nil, err
	}
	return writeInit(dir, files, contents, answers.Force)
}

func renderInit(files []initFile, answers InitOptions) (map[string][]byte, error) {
	templates, err := template.New("init").Funcs(template.FuncMap{"quote": quoteHCL}).ParseFS(initTemplates, "templates/*.tmpl")
	if err != nil {
		return nil, fmt.Errorf("parse templates of init: %w", err)
	}
	data := struct {
		InitOptions
		HostName, Archive string
	}{answers, hostName(answers.Site), path.Join("images", answers.Component+".tar")}
	contents := map[string][]byte{}
	for _, file := range files {
		var out bytes.Buffer
		if err := templates.ExecuteTemplate(&out, file.template, data); err != nil {
			return nil, fmt.Errorf("write %s: %w", file.path, err)
		}
		contents[file.path] = out.Bytes()
	}
	return contents, nil
}

// hostName leaves room for the number within a name's 63 characters.
func hostName(site string) string {
	return strings.TrimRight(site[:min(len(site), 60)], "-") + "-1"
}

// provesToLoad writes to a folder of its own first, so that a bad answer leaves
// nothing behind in the adopter's.
func provesToLoad(files []initFile, contents map[string][]byte, name string) error {
	stage, err := os.MkdirTemp("", "site-init-")
	if err != nil {
		return fmt.Errorf("check the new site: %w", err)
	}
	defer func() { _ = os.RemoveAll(stage) }()
	if _, err := writeInit(stage, files, contents, false); err != nil {
		return err
	}
	_, err = Load(os.DirFS(stage), name, LoadOptions{WorkDir: stage})
	var config *ConfigError
	if errors.As(err, &config) {
		// The places are in files that the user never sees: say what is wrong.
		var wrong []string
		for _, diag := range config.Diagnostics {
			wrong = append(wrong, strings.TrimSuffix(diag.Detail, "."))
		}
		return fmt.Errorf("answers for site %q are not usable: %s", name, strings.Join(wrong, "; "))
	}
	return err
}

func writeInit(dir string, files []initFile, contents map[string][]byte, force bool) ([]string, error) {
	exists := map[string]bool{}
	var blocking []string
	for _, file := range files {
		_, err := os.Lstat(filepath.Join(dir, filepath.FromSlash(file.path)))
		switch {
		case err == nil:
			exists[file.path] = true
			if !file.kept {
				blocking = append(blocking, file.path)
			}
		case !errors.Is(err, fs.ErrNotExist):
			return nil, fmt.Errorf("look at %s: %w", file.path, err)
		}
	}
	if len(blocking) > 0 && !force {
		return nil, &ExistsError{Files: blocking}
	}
	var written []string
	for _, file := range files {
		if file.kept && exists[file.path] {
			continue
		}
		target := filepath.Join(dir, filepath.FromSlash(file.path))
		if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
			return written, fmt.Errorf("make the folder of %s: %w", file.path, err)
		}
		if err := os.WriteFile(target, contents[file.path], 0o644); err != nil {
			return written, fmt.Errorf("write %s: %w", file.path, err)
		}
		written = append(written, file.path)
	}
	return written, nil
}
