// Package packages installs a pinned closure of .deb files out of the store,
// with no package source and no network. It never downgrades and never removes.
package packages

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/nomad-site/site/internal/blob"
	"github.com/nomad-site/site/internal/retry"
	"github.com/nomad-site/site/internal/sitehost/observe"
)

const (
	// lockWait is how long another dpkg, such as unattended upgrades, may take.
	lockWait = 5 * time.Minute
	// installLimit bounds the installation of one bundle.
	installLimit = 10 * time.Minute
	// tailLines of apt's output are told in an error.
	tailLines = 20
)

// Package is one .deb file of a bundle.
type Package struct {
	Name         string `json:"name"`
	Version      string `json:"version"`
	Architecture string `json:"architecture"`
	// SHA256 is the file's digest in hex, and its name in the store.
	SHA256 string `json:"sha256"`
}

// Result says what was done.
type Result struct {
	Installed []string `json:"installed"` // name=version
	// Kept were there at the same or a newer version.
	Kept []string `json:"kept"`
	// Resumed says that an interrupted dpkg was completed first.
	Resumed bool `json:"resumed"`
}

// What becomes part of a file name or of a command line is checked.
var (
	nameGrammar         = regexp.MustCompile(`^[a-z0-9][a-z0-9+.-]+$`)
	versionGrammar      = regexp.MustCompile(`^([0-9]+:)?[A-Za-z0-9][A-Za-z0-9.+~-]*$`)
	architectureGrammar = regexp.MustCompile(`^[a-z0-9][a-z0-9-]*$`)
)

// Decode reads a bundle: a JSON list of packages.
func Decode(input io.Reader) ([]Package, error) {
	decoder := json.NewDecoder(io.LimitReader(input, 4<<20))
	decoder.DisallowUnknownFields()
	var bundle []Package
	if err := decoder.Decode(&bundle); err != nil {
		return nil, fmt.Errorf("read package bundle: %w", err)
	}
	seen := map[string]bool{}
	for index, each := range bundle {
		digest, err := blob.ParseDigest("sha256:" + strings.TrimPrefix(each.SHA256, "sha256:"))
		switch {
		case err != nil:
			return nil, fmt.Errorf("package bundle: %s: %w", each.Name, err)
		case !nameGrammar.MatchString(each.Name), !versionGrammar.MatchString(each.Version), !architectureGrammar.MatchString(each.Architecture):
			return nil, fmt.Errorf("package bundle: bad package %q %q %q", each.Name, each.Version, each.Architecture)
		case seen[each.Name]:
			return nil, fmt.Errorf("package bundle: %s is named twice", each.Name)
		}
		seen[each.Name] = true
		bundle[index].SHA256 = digest.Hex()
	}
	return bundle, nil
}

// Installer installs bundles on one machine.
type Installer struct {
	// Store is the store's folder; its blobs are read only.
	Store string
	// Query asks dpkg-query and dpkg --compare-versions.
	Query observe.Runner
	// Change runs a program that changes the machine; its output is both streams.
	Change observe.Runner
	// Updates is dpkg's journal, not empty where it was interrupted.
	Updates string
	// LockWait bounds the wait for dpkg's lock.
	LockWait time.Duration
}

// New installs on this machine.
func New(store string) Installer {
	return Installer{Store: store, Query: observe.Exec, Change: change, Updates: "/var/lib/dpkg/updates", LockWait: lockWait}
}

// Install brings the machine to the bundle's versions or newer ones. Where all
// are there already it changes nothing.
func (i Installer) Install(ctx context.Context, bundle []Package) (Result, error) {
	result := Result{Installed: []string{}, Kept: []string{}}
	installed, err := observe.Packages(ctx, i.Query)
	if err != nil {
		return Result{}, err
	}
	var resumeErr error
	if i.interrupted(installed) {
		// It may fail because what the broken package needs is in this very
		// bundle: then apt, given the whole bundle, still mends it.
		if resumeErr = i.resume(ctx); resumeErr == nil {
			result.Resumed = true
		}
		if installed, err = observe.Packages(ctx, i.Query); err != nil {
			return Result{}, err
		}
	}
	var lacking []Package
	for _, each := range bundle {
		found := installed[each.Name]
		old := !found.Complete
		if !old {
			if old, err = observe.Older(ctx, i.Query, found.Version, each.Version); err != nil {
				return Result{}, err
			}
		}
		if old {
			lacking = append(lacking, each)
		} else {
			result.Kept = append(result.Kept, each.Name+"="+found.Version)
		}
	}
	if len(lacking) == 0 {
		return result, resumeErr
	}
	if err := i.install(ctx, lacking); err != nil {
		return Result{}, errors.Join(err, resumeErr)
	}
	for _, each := range lacking {
		result.Installed = append(result.Installed, each.Name+"="+each.Version)
	}
	return result, i.verify(ctx, lacking)
}

func (i Installer) interrupted(installed map[string]observe.Installed) bool {
	for _, each := range installed {
		if each.Interrupted {
			return true
		}
	}
	journal, err := os.ReadDir(i.Updates)
	return err == nil && slices.ContainsFunc(journal, func(entry os.DirEntry) bool {
		return strings.Trim(entry.Name(), "0123456789") == "" // as dpkg names its journal
	})
}

// resume completes what an interrupted dpkg left.
func (i Installer) resume(ctx context.Context) error {
	// dpkg itself does not wait for its lock.
	return retry.Until(ctx, "the lock of dpkg", i.LockWait, func(ctx context.Context) error {
		output, err := i.Change(ctx, "dpkg", "--configure", "-a", "--force-confdef", "--force-confold")
		if err == nil {
			return nil
		}
		err = &ProgramError{Program: "dpkg --configure -a", Err: err, Tail: tail(output)}
		if strings.Contains(string(output), "lock") && strings.Contains(string(output), "another process") {
			return err
		}
		return retry.Permanent(err)
	})
}

// install gives apt the files of all packages at once: it knows the order, which
// several passes of dpkg do not find.
func (i Installer) install(ctx context.Context, lacking []Package) (err error) {
	// Beside the store, so that the files can be linked and not copied.
	parent := filepath.Dir(filepath.Clean(i.Store))
	if err := sweep(parent); err != nil {
		return err
	}
	folder, err := os.MkdirTemp(parent, folderPrefix)
	if err != nil {
		return fmt.Errorf("install packages: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(folder)) }()
	arguments := []string{
		"install", "--no-install-recommends", "--no-remove", "-y", "-q",
		"-o", "Dir::Etc::sourcelist=/dev/null", "-o", "Dir::Etc::sourceparts=/dev/null",
		"-o", "APT::Get::AllowUnauthenticated=true", "-o", "APT::Sandbox::User=root",
		"-o", fmt.Sprintf("DPkg::Lock::Timeout=%d", int(i.LockWait.Seconds())),
		"-o", "Dpkg::Options::=--force-confdef", "-o", "Dpkg::Options::=--force-confold",
		"-o", "Dpkg::Use-Pty=0",
	}
	for _, each := range lacking {
		path, err := i.link(folder, each)
		if err != nil {
			return err
		}
		arguments = append(arguments, path)
	}
	ctx, cancel := context.WithTimeout(ctx, i.LockWait+installLimit)
	defer cancel()
	if output, err := i.Change(ctx, "apt-get", arguments...); err != nil {
		return &ProgramError{Program: fmt.Sprintf("apt-get install of %d packages", len(lacking)), Err: err, Tail: tail(output)}
	}
	return nil
}

const folderPrefix = ".packages-"

// sweep removes what a killed installation left; none runs for so long.
func sweep(parent string) error {
	left, err := filepath.Glob(filepath.Join(parent, folderPrefix+"*"))
	if err != nil {
		return fmt.Errorf("sweep package folders: %w", err)
	}
	for _, folder := range left {
		if info, err := os.Lstat(folder); err == nil && time.Since(info.ModTime()) > lockWait+installLimit {
			if err := os.RemoveAll(folder); err != nil {
				return fmt.Errorf("sweep package folders: %w", err)
			}
		}
	}
	return nil
}

// link puts a blob under the name that apt expects, proved once more.
func (i Installer) link(folder string, each Package) (string, error) {
	source := filepath.Join(i.Store, "blobs", "sha256", each.SHA256)
	file, err := os.OpenFile(source, os.O_RDONLY|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return "", fmt.Errorf("package %s is not in the store: %w", each.Name, err)
	}
	defer func() { _ = file.Close() }()
	_, version, hasEpoch := strings.Cut(each.Version, ":")
	if !hasEpoch {
		version = each.Version
	}
	path := filepath.Join(folder, fmt.Sprintf("%s_%s_%s.deb", each.Name, version, each.Architecture))
	digest := sha256.New()
	if os.Link(source, path) == nil { // a hard link to the blob itself
		_, err = io.Copy(digest, file)
	} else { // another file system
		var copied *os.File
		if copied, err = os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600); err == nil {
			_, err = io.Copy(io.MultiWriter(digest, copied), file)
			err = errors.Join(err, copied.Close())
		}
	}
	if err != nil {
		return "", fmt.Errorf("prepare package %s: %w", each.Name, err)
	}
	if actual := hex.EncodeToString(digest.Sum(nil)); actual != each.SHA256 {
		return "", fmt.Errorf("package %s: the blob sha256:%s is corrupt: its bytes have the digest sha256:%s", each.Name, each.SHA256, actual)
	}
	return path, nil
}

func (i Installer) verify(ctx context.Context, wanted []Package) error {
	installed, err := observe.Packages(ctx, i.Query)
	if err != nil {
		return err
	}
	for _, each := range wanted {
		if found := installed[each.Name]; !found.Complete || found.Version != each.Version {
			return fmt.Errorf("install packages: %s is %q after apt-get ended well, want %s", each.Name, found.Version, each.Version)
		}
	}
	return nil
}

// ProgramError is a failed apt-get or dpkg with the end of what it printed.
type ProgramError struct {
	Program string
	Err     error
	Tail    string
}

func (e *ProgramError) Error() string { return fmt.Sprintf("%s: %v: %s", e.Program, e.Err, e.Tail) }
func (e *ProgramError) Unwrap() error { return e.Err }

// tail keeps the last lines, joined to one.
func tail(output []byte) string {
	lines := strings.FieldsFunc(string(output), func(r rune) bool { return r == '\n' || r == '\r' })
	return strings.Join(lines[max(0, len(lines)-tailLines):], " | ")
}

// change runs a program that changes the machine. A signal to site-host, or the
// end of its connection, must not tear dpkg apart: the program has a session of
// its own, is asked to end and gets time for that.
func change(ctx context.Context, name string, arguments ...string) ([]byte, error) {
	command := exec.CommandContext(ctx, name, arguments...)
	command.Env = []string{
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LC_ALL=C",
		"DEBIAN_FRONTEND=noninteractive", "DEBCONF_NONINTERACTIVE_SEEN=true", "APT_LISTCHANGES_FRONTEND=none",
		"NEEDRESTART_MODE=l", "NEEDRESTART_SUSPEND=1",
	}
	command.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	command.Cancel = func() error { return command.Process.Signal(syscall.SIGTERM) }
	command.WaitDelay = time.Minute
	var output bytes.Buffer
	command.Stdout, command.Stderr = &output, &output
	err := command.Run()
	return output.Bytes(), err
}
