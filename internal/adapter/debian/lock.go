// Package debian resolves, fetches and unpacks pinned closures of Debian
// packages, so that a host or a tool root installs them without any network.
package debian

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"regexp"
	"strings"
)

// LockVersion is raised when the meaning of a field changes.
const LockVersion = 1

// The archives that a package can come from. A lock names the archive, never
// the mirror: that is the one which the machine's apt is set up with.
const (
	Main     = "debian"
	Security = "debian-security"
)

// Lock is a closure of packages for one distribution, release and architecture.
type Lock struct {
	Version      int    `json:"version"`
	Distribution string `json:"distribution"`
	Release      string `json:"release"`
	Codename     string `json:"codename"`
	Architecture string `json:"architecture"`
	// Asked holds the packages that the closure is of.
	Asked []string `json:"asked"`
	// Base holds packages that are on every machine, with all they depend on.
	Base []string `json:"base,omitempty"`
	// Provided holds packages that count as there without what they depend on.
	Provided []string `json:"provided,omitempty"`
	// Packages is in the order in which apt would unpack them.
	Packages []Package `json:"packages"`
}

// Package is one pinned .deb.
type Package struct {
	Name         string `json:"name"`
	Version      string `json:"version"`
	Architecture string `json:"architecture"`
	Archive      string `json:"archive"`
	Path         string `json:"path"` // below the archive: pool/…
	Size         int64  `json:"size"`
	SHA256       string `json:"sha256"`
}

var (
	packageName    = regexp.MustCompile(`^[a-z0-9][a-z0-9+.-]+$`)
	packageVersion = regexp.MustCompile(`^[0-9][A-Za-z0-9.+:~-]*$`)
	sha256Digits   = regexp.MustCompile(`^[0-9a-f]{64}$`)
)

// ParseLock reads a lock strictly and reports all that is wrong with it.
func ParseLock(content []byte) (Lock, error) {
	decoder := json.NewDecoder(bytes.NewReader(content))
	decoder.DisallowUnknownFields()
	var lock Lock
	if err := decoder.Decode(&lock); err != nil {
		return Lock{}, fmt.Errorf("parse .deb lock: %w", err)
	}
	if _, err := decoder.Token(); !errors.Is(err, io.EOF) {
		return Lock{}, errors.New("parse .deb lock: there is more after its end")
	}
	if err := lock.validate(); err != nil {
		return Lock{}, fmt.Errorf("parse .deb lock: %w", err)
	}
	return lock, nil
}

func (l Lock) validate() error {
	var problems []error
	problem := func(format string, args ...any) { problems = append(problems, fmt.Errorf(format, args...)) }
	if l.Version != LockVersion {
		return fmt.Errorf("its version is %d, this program reads %d", l.Version, LockVersion)
	}
	for _, field := range []struct{ name, value string }{
		{"distribution", l.Distribution}, {"release", l.Release}, {"codename", l.Codename}, {"architecture", l.Architecture},
	} {
		if field.value == "" {
			problem("%s is empty", field.name)
		}
	}
	if len(l.Asked) == 0 {
		problem("asked is empty")
	}
	if len(l.Packages) == 0 {
		problem("packages is empty")
	}
	seen := map[string]bool{}
	for index, entry := range l.Packages {
		if seen[entry.Name] {
			problem("packages[%d]: %q is there twice", index, entry.Name)
		}
		seen[entry.Name] = true
		if err := entry.validate(l.Architecture); err != nil {
			problem("packages[%d] %q: %w", index, entry.Name, err)
		}
	}
	return errors.Join(problems...)
}

func (p Package) validate(architecture string) error {
	switch {
	case !packageName.MatchString(p.Name):
		return errors.New("not a package name")
	case !packageVersion.MatchString(p.Version):
		return fmt.Errorf("%q is not a version", p.Version)
	case p.Architecture != architecture && p.Architecture != "all":
		return fmt.Errorf("architecture is %q, want %q or all", p.Architecture, architecture)
	case p.Archive != Main && p.Archive != Security:
		return fmt.Errorf("archive %q is unknown", p.Archive)
	case !strings.HasPrefix(p.Path, "pool/") || path.Clean(p.Path) != p.Path || path.Ext(p.Path) != ".deb":
		return fmt.Errorf("path %q is not a .deb below pool/", p.Path)
	case p.Size <= 0:
		return fmt.Errorf("size is %d", p.Size)
	case !sha256Digits.MatchString(p.SHA256):
		return errors.New("sha256 must be 64 lower case hexadecimal digits")
	}
	return nil
}

// Encode renders a lock as it is kept in git.
func (l Lock) Encode() ([]byte, error) {
	var encoded bytes.Buffer
	encoder := json.NewEncoder(&encoded)
	encoder.SetEscapeHTML(false)
	encoder.SetIndent("", "  ")
	if err := encoder.Encode(l); err != nil {
		return nil, err
	}
	return encoded.Bytes(), nil
}

// Request is what the lock was made from, to make it anew.
func (l Lock) Request() Request {
	return Request{
		Distribution: l.Distribution, Release: l.Release, Codename: l.Codename, Architecture: l.Architecture,
		Packages: l.Asked, Base: l.Base, Provided: l.Provided,
	}
}

// Difference is how one package changed between two locks; an empty version
// means that it is not there.
type Difference struct {
	Name string `json:"name"`
	Old  string `json:"old,omitempty"`
	New  string `json:"new,omitempty"`
}

// Compare lists what changed from one lock to the next, in the order of the new
// one, then what went away.
func Compare(old, fresh Lock) []Difference {
	before := map[string]Package{}
	for _, entry := range old.Packages {
		before[entry.Name] = entry
	}
	var differences []Difference
	for _, entry := range fresh.Packages {
		previous, there := before[entry.Name]
		delete(before, entry.Name)
		if !there || previous.Version != entry.Version || previous.SHA256 != entry.SHA256 {
			differences = append(differences, Difference{entry.Name, previous.Version, entry.Version})
		}
	}
	for _, entry := range old.Packages {
		if _, gone := before[entry.Name]; gone {
			differences = append(differences, Difference{entry.Name, entry.Version, ""})
		}
	}
	return differences
}
