package debian

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"github.com/nomad-site/site/internal/plan"
)

// Request says what closure to resolve.
type Request struct {
	Distribution string // debian
	Release      string // 12
	Codename     string // bookworm
	Architecture string // amd64
	// Packages are the packages to have.
	Packages []string
	// BaseStatus is the dpkg status of a clean machine. Where it is empty, the
	// base is every required package, Base, and what they depend on.
	BaseStatus []byte
	Base       []string
	// Provided count as there, alone. With them, no base is assumed.
	Provided []string
	// Mirrors are the archives' addresses; empty: as the machine's apt has them.
	Mirrors Mirrors
}

// Resolve has apt resolve the closure in a state folder of its own, with fresh
// package lists. The machine's own packages play no part.
func Resolve(ctx context.Context, request Request, progress plan.Progress) (Lock, error) {
	if progress == nil {
		progress = silent{}
	}
	if _, err := exec.LookPath("apt-get"); err != nil {
		return Lock{}, plan.WithHint(fmt.Errorf("resolve .deb packages: %w", err), "locks are made on a Debian machine or in a Debian container")
	}
	var err error
	if len(request.Mirrors) == 0 {
		if request.Mirrors, err = AptMirrors(ctx, request.Codename); err != nil {
			return Lock{}, err
		}
	}
	folder, err := os.MkdirTemp("", "site-apt-")
	if err != nil {
		return Lock{}, err
	}
	defer os.RemoveAll(folder)
	state := &aptState{folder: folder, request: request}
	lock, err := state.resolve(ctx, progress)
	if err != nil {
		return Lock{}, fmt.Errorf("resolve .deb packages for %s %s %s: %w", request.Distribution, request.Release, request.Architecture, err)
	}
	return lock, nil
}

// aptState is a private world for apt.
type aptState struct {
	folder  string
	request Request
	index   map[string]map[string]indexed // name → version
	newest  map[string]string
}

type indexed struct {
	stanza  paragraph
	archive string
}

func (s *aptState) resolve(ctx context.Context, progress plan.Progress) (Lock, error) {
	if err := s.prepare(); err != nil {
		return Lock{}, err
	}
	progress.Message("reading the package lists of %s", s.request.Codename)
	if _, err := s.apt(ctx, "update", "-q"); err != nil {
		return Lock{}, err
	}
	if err := s.readIndexes(ctx); err != nil {
		return Lock{}, err
	}
	status, err := s.baseStatus(ctx)
	if err != nil {
		return Lock{}, err
	}
	if err := os.WriteFile(s.status(), status, 0o644); err != nil {
		return Lock{}, err
	}
	progress.Message("resolving %s", strings.Join(s.request.Packages, ", "))
	planned, err := s.simulate(ctx, s.request.Packages)
	if err != nil {
		return Lock{}, err
	}
	lock := Lock{
		Version: LockVersion, Distribution: s.request.Distribution, Release: s.request.Release, Codename: s.request.Codename,
		Architecture: s.request.Architecture, Asked: s.request.Packages, Base: s.request.Base, Provided: s.request.Provided,
	}
	for _, name := range planned {
		entry, err := s.entry(name)
		if err != nil {
			return Lock{}, err
		}
		lock.Packages = append(lock.Packages, entry)
	}
	return lock, lock.validate()
}

func (s *aptState) status() string { return filepath.Join(s.folder, "status") }

func (s *aptState) prepare() error {
	for _, folder := range []string{"lists/partial", "cache/archives/partial", "parts"} {
		if err := os.MkdirAll(filepath.Join(s.folder, folder), 0o755); err != nil {
			return err
		}
	}
	// apt drops its rights while it fetches and must still reach the lists.
	if err := os.Chmod(s.folder, 0o755); err != nil {
		return err
	}
	var sources strings.Builder
	architecture, codename := s.request.Architecture, s.request.Codename
	fmt.Fprintf(&sources, "deb [arch=%s] %s %s main\n", architecture, s.request.Mirrors[Main], codename)
	fmt.Fprintf(&sources, "deb [arch=%s] %s %s-updates main\n", architecture, s.request.Mirrors[Main], codename)
	fmt.Fprintf(&sources, "deb [arch=%s] %s %s-security main\n", architecture, s.request.Mirrors[Security], codename)
	return errors.Join(
		os.WriteFile(filepath.Join(s.folder, "sources.list"), []byte(sources.String()), 0o644),
		os.WriteFile(s.status(), nil, 0o644),
	)
}

// apt runs apt-get on our state only.
func (s *aptState) apt(ctx context.Context, arguments ...string) ([]byte, error) {
	in := func(name string) string { return filepath.Join(s.folder, name) }
	settings := []string{
		"Dir::State::lists=" + in("lists"), "Dir::State::status=" + s.status(), "Dir::Cache=" + in("cache"),
		"Dir::Etc::sourcelist=" + in("sources.list"), "Dir::Etc::sourceparts=" + in("parts"),
		"Dir::Etc::preferences=" + in("none"), "Dir::Etc::preferencesparts=" + in("parts"),
		"Dir::State::extended_states=" + in("extended_states"),
		"APT::Architecture=" + s.request.Architecture, "APT::Architectures=" + s.request.Architecture,
		"APT::Install-Recommends=false", "APT::Install-Suggests=false", "APT::Get::AutomaticRemove=false",
		"Acquire::Languages=none", "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false",
		"APT::Update::Error-Mode=any",
	}
	var all []string
	for _, setting := range settings {
		all = append(all, "-o", setting)
	}
	command := exec.CommandContext(ctx, "apt-get", append(all, arguments...)...)
	command.Env = append(os.Environ(), "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive")
	var complaints bytes.Buffer
	command.Stderr = &complaints
	output, err := command.Output()
	if err != nil {
		return nil, fmt.Errorf("apt-get %s: %w: %s", arguments[0], err, lastLines(output, complaints.Bytes()))
	}
	return output, nil
}

const shownLines = 12

func lastLines(parts ...[]byte) string {
	lines := strings.Split(strings.TrimSpace(string(bytes.Join(parts, []byte("\n")))), "\n")
	return strings.Join(lines[max(0, len(lines)-shownLines):], "\n")
}

// readIndexes reads the package records: apt's own simulation gives no hashes.
func (s *aptState) readIndexes(ctx context.Context) error {
	output, err := s.apt(ctx, "indextargets", "--format", "$(FILENAME)\t$(RELEASE)", "Created-By: Packages")
	if err != nil {
		return err
	}
	s.index, s.newest = map[string]map[string]indexed{}, map[string]string{}
	for _, line := range strings.Split(strings.TrimSpace(string(output)), "\n") {
		name, release, found := strings.Cut(line, "\t")
		if !found {
			return fmt.Errorf("unexpected line of apt-get indextargets: %q", line)
		}
		content, err := exec.CommandContext(ctx, "/usr/lib/apt/apt-helper", "cat-file", name).Output()
		if err != nil {
			return fmt.Errorf("read package list %s: %w", filepath.Base(name), err)
		}
		archive := archiveOf(release)
		err = readParagraphs(bytes.NewReader(content), func(stanza paragraph) error {
			versions := s.index[stanza["Package"]]
			if versions == nil {
				versions = map[string]indexed{}
				s.index[stanza["Package"]] = versions
			}
			// Two archives may carry one version; the main one keeps it longer.
			if _, there := versions[stanza["Version"]]; !there || archive == Main {
				versions[stanza["Version"]] = indexed{stanza, archive}
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("parse package list %s: %w", filepath.Base(name), err)
		}
	}
	return nil
}

func archiveOf(release string) string {
	if strings.HasSuffix(strings.TrimSuffix(release, "/updates"), "-security") {
		return Security
	}
	return Main
}

// chosen is a package and the version that apt would install.
type chosen struct{ name, version string }

// inst matches apt's simulation: Inst NAME[:ARCH] [OLD] (NEW ORIGIN [ARCH]) …
var inst = regexp.MustCompile(`^Inst ([^ :]+)(?::[a-z0-9]+)? (?:\[([^\]]*)\] )?\(([^ ]+) `)

func parseSimulation(output []byte) ([]chosen, error) {
	var planned []chosen
	scanner := bufio.NewScanner(bytes.NewReader(output))
	for scanner.Scan() {
		line := scanner.Text()
		if strings.HasPrefix(line, "Remv ") {
			return nil, fmt.Errorf("apt would remove a package of the base: %s", line)
		}
		if !strings.HasPrefix(line, "Inst ") {
			continue
		}
		match := inst.FindStringSubmatch(line)
		if match == nil {
			return nil, fmt.Errorf("unexpected line of apt-get: %q", line)
		}
		if match[2] == match[3] {
			continue // apt would only install the same version again
		}
		planned = append(planned, chosen{match[1], match[3]})
	}
	return planned, scanner.Err()
}

func (s *aptState) simulate(ctx context.Context, packages []string) ([]chosen, error) {
	output, err := s.apt(ctx, append([]string{"install", "--simulate", "-q"}, packages...)...)
	if err != nil {
		return nil, err
	}
	return parseSimulation(output)
}

func (s *aptState) record(selected chosen) (indexed, error) {
	found, ok := s.index[selected.name][selected.version]
	if !ok {
		return indexed{}, fmt.Errorf("no package list has %s %s", selected.name, selected.version)
	}
	return found, nil
}

func (s *aptState) entry(selected chosen) (Package, error) {
	found, err := s.record(selected)
	if err != nil {
		return Package{}, err
	}
	size, err := strconv.ParseInt(found.stanza["Size"], 10, 64)
	if err != nil {
		return Package{}, fmt.Errorf("size of %s: %w", selected.name, err)
	}
	return Package{
		Name: selected.name, Version: selected.version, Architecture: found.stanza["Architecture"], Archive: found.archive,
		Path: found.stanza["Filename"], Size: size, SHA256: found.stanza["SHA256"],
	}, nil
}

// baseStatus renders the machine that the closure is resolved against.
func (s *aptState) baseStatus(ctx context.Context) ([]byte, error) {
	if len(s.request.BaseStatus) > 0 {
		if _, err := Installed(s.request.BaseStatus); err != nil {
			return nil, err
		}
		return s.request.BaseStatus, nil
	}
	var status bytes.Buffer
	if len(s.request.Provided) > 0 {
		// The newest version is what apt would take.
		planned, err := s.simulate(ctx, s.request.Provided)
		if err != nil {
			return nil, err
		}
		provided := map[string]bool{}
		for _, name := range s.request.Provided {
			provided[name] = true
		}
		for _, selected := range planned {
			if !provided[selected.name] {
				continue
			}
			found, err := s.record(selected)
			if err != nil {
				return nil, err
			}
			status.WriteString(providedStanza(found.stanza))
		}
		return status.Bytes(), nil
	}
	names := append([]string{"apt"}, s.request.Base...)
	for name, versions := range s.index {
		for _, found := range versions {
			if found.stanza["Essential"] == "yes" || found.stanza["Priority"] == "required" {
				names = append(names, name)
				break
			}
		}
	}
	planned, err := s.simulate(ctx, names)
	if err != nil {
		return nil, fmt.Errorf("resolve the base: %w", err)
	}
	for _, selected := range planned {
		found, err := s.record(selected)
		if err != nil {
			return nil, err
		}
		status.WriteString(installedStanza(found.stanza))
	}
	return status.Bytes(), nil
}
