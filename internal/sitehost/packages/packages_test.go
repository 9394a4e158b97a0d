package packages

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

type exitCode int

func (e exitCode) Error() string { return fmt.Sprintf("exit status %d", int(e)) }
func (e exitCode) ExitCode() int { return int(e) }

// machine is a fake dpkg with single-digit versions.
type machine struct {
	states  map[string]string // name → version and status
	changes []string
	// fails are the outputs of the next changes, in order; "" succeeds.
	fails []string
	files []string // what apt-get was given
}

func (m *machine) query(_ context.Context, name string, arguments ...string) ([]byte, error) {
	if name == "dpkg" {
		if arguments[1] < arguments[3] {
			return nil, nil
		}
		return nil, exitCode(1)
	}
	var lines []string
	for name, state := range m.states {
		version, status, _ := strings.Cut(state, " ")
		lines = append(lines, name+"\t"+version+"\tamd64\t"+status+"\n")
	}
	return []byte(strings.Join(lines, "")), nil
}

func (m *machine) change(_ context.Context, name string, arguments ...string) ([]byte, error) {
	m.changes = append(m.changes, name)
	if len(m.fails) > 0 {
		output := m.fails[0]
		m.fails = m.fails[1:]
		if output != "" {
			return []byte(output), exitCode(100)
		}
	}
	if name == "dpkg" {
		for each, state := range m.states {
			m.states[each] = strings.Replace(state, "half-configured", "installed", 1)
		}
		return nil, nil
	}
	for _, argument := range arguments {
		if !strings.HasSuffix(argument, ".deb") {
			continue
		}
		if _, err := os.Stat(argument); err != nil || !filepath.IsAbs(argument) {
			return nil, fmt.Errorf("no such file: %s", argument)
		}
		parts := strings.Split(filepath.Base(argument), "_")
		m.files = append(m.files, filepath.Base(argument))
		m.states[parts[0]] = parts[1] + " installed"
	}
	return nil, nil
}

func setUp(t *testing.T, states map[string]string) (*machine, Installer, func(name, version string) Package) {
	t.Helper()
	root := t.TempDir()
	store := filepath.Join(root, "store")
	if err := os.MkdirAll(filepath.Join(store, "blobs", "sha256"), 0o700); err != nil {
		t.Fatal(err)
	}
	m := &machine{states: states}
	add := func(name, version string) Package {
		sum := sha256.Sum256([]byte(name + version))
		digest := hex.EncodeToString(sum[:])
		if err := os.WriteFile(filepath.Join(store, "blobs", "sha256", digest), []byte(name+version), 0o600); err != nil {
			t.Fatal(err)
		}
		return Package{Name: name, Version: version, Architecture: "amd64", SHA256: digest}
	}
	t.Cleanup(func() {
		if entries, _ := os.ReadDir(root); len(entries) != 1 {
			t.Errorf("left behind: %v", entries)
		}
	})
	return m, Installer{Store: store, Query: m.query, Change: m.change, Updates: filepath.Join(root, "none"), LockWait: 2 * time.Second}, add
}

func TestOnlyWhatLacksOrIsOlderIsInstalled(t *testing.T) {
	m, installer, add := setUp(t, map[string]string{"same": "3 installed", "newer": "5 installed", "older": "1 installed", "removed": "3 config-files"})
	// What a killed installation left is swept away; the clean-up of setUp checks it.
	left, long := filepath.Join(filepath.Dir(installer.Store), ".packages-1"), time.Now().Add(-time.Hour)
	if err := errors.Join(os.Mkdir(left, 0o700), os.Chtimes(left, long, long)); err != nil {
		t.Fatal(err)
	}
	result, err := installer.Install(t.Context(), []Package{add("same", "3"), add("newer", "3"), add("older", "3"), add("removed", "3"), add("absent", "3")})
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(m.files, []string{"older_3_amd64.deb", "removed_3_amd64.deb", "absent_3_amd64.deb"}) {
		t.Errorf("apt got %v", m.files)
	}
	if !slices.Equal(result.Kept, []string{"same=3", "newer=5"}) || len(result.Installed) != 3 || result.Resumed {
		t.Errorf("result %+v", result)
	}
	m.changes = nil
	if _, err := installer.Install(t.Context(), []Package{add("same", "3"), add("absent", "3")}); err != nil || len(m.changes) != 0 {
		t.Errorf("the second run changed something: %v, %v", m.changes, err)
	}
}

func TestAnInterruptedDpkgIsCompletedFirstAndItsLockWaitedFor(t *testing.T) {
	m, installer, add := setUp(t, map[string]string{"podman": "3 half-configured"})
	m.fails = []string{"dpkg: error: dpkg frontend lock was locked by another process with pid 7"}
	result, err := installer.Install(t.Context(), []Package{add("podman", "3")})
	if err != nil || !result.Resumed || !slices.Equal(m.changes, []string{"dpkg", "dpkg"}) {
		t.Errorf("%+v, %v, %v", result, m.changes, err)
	}
}

func TestAFailedResumeStillLetsAptMendIt(t *testing.T) {
	m, installer, add := setUp(t, map[string]string{"podman": "3 half-configured"})
	m.fails = []string{"dpkg: dependency problems prevent configuration of podman"}
	result, err := installer.Install(t.Context(), []Package{add("conmon", "2"), add("podman", "3")})
	if err != nil || len(result.Installed) != 2 || !slices.Equal(m.changes, []string{"dpkg", "apt-get"}) {
		t.Errorf("%+v, %v, %v", result, m.changes, err)
	}
}

func TestTheEndOfAptsOutputIsInTheError(t *testing.T) {
	m, installer, add := setUp(t, map[string]string{})
	m.fails = []string{strings.Repeat("noise\n", 100) + "E: broken\n"}
	_, err := installer.Install(t.Context(), []Package{add("podman", "3")})
	var failed *ProgramError
	if !errors.As(err, &failed) || !strings.Contains(err.Error(), "E: broken") || strings.Count(err.Error(), "noise") != tailLines-1 || strings.Contains(err.Error(), "\n") {
		t.Errorf("got %v", err)
	}
}

func TestACorruptOrMissingBlobIsNeverGivenToApt(t *testing.T) {
	m, installer, add := setUp(t, map[string]string{})
	bad := add("podman", "3")
	path := filepath.Join(installer.Store, "blobs", "sha256", bad.SHA256)
	if err := os.WriteFile(path, []byte("other"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := installer.Install(t.Context(), []Package{bad}); err == nil || !strings.Contains(err.Error(), "corrupt") {
		t.Errorf("got %v", err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if _, err := installer.Install(t.Context(), []Package{bad}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v", err)
	}
	if len(m.changes) != 0 {
		t.Errorf("changed %v", m.changes)
	}
}

func TestBundlesAreChecked(t *testing.T) {
	digest := strings.Repeat("a", 64)
	valid := `{"name":"libc6","version":"1:2.36-9+deb12u1~x","architecture":"amd64","sha256":"` + digest + `"}`
	bundle, err := Decode(strings.NewReader("[" + valid + "]"))
	if err != nil || bundle[0].SHA256 != digest {
		t.Fatalf("%v, %v", bundle, err)
	}
	if bundle, err := Decode(strings.NewReader("[" + strings.Replace(valid, digest, "sha256:"+digest, 1) + "]")); err != nil || bundle[0].SHA256 != digest {
		t.Errorf("a digest with its kind: %v, %v", bundle, err)
	}
	for name, text := range map[string]string{
		"a name that climbs":        strings.Replace(valid, "libc6", "../libc6", 1),
		"a name that is an option":  strings.Replace(valid, "libc6", "--libc6", 1),
		"a version with a slash":    strings.Replace(valid, "2.36", "2/36", 1),
		"an architecture with dots": strings.Replace(valid, "amd64", "..", 1),
		"a short digest":            strings.Replace(valid, digest, "aa", 1),
		"an unknown field":          strings.Replace(valid, `"name"`, `"x":1,"name"`, 1),
		"the same twice":            valid + "," + valid,
	} {
		if _, err := Decode(strings.NewReader("[" + text + "]")); err == nil {
			t.Errorf("%s was accepted", name)
		}
	}
}
