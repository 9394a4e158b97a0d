// Package testneeds is the one rule by which a test decides what happens when
// this machine lacks something: SITE_TEST_UNIT=1 leaves out what needs root, a
// server or a lab. Without it, what is missing is a failure and never a skip.
package testneeds

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

// The variables that choose the tests.
const (
	unitVariable = "SITE_TEST_UNIT"
	labVariable  = "SITE_TEST_LAB"
	siteVariable = "SITE_TEST_SITE"
)

// Root is for tests that mount, change owners or boot something.
func Root(t testing.TB) {
	t.Helper()
	leaveOut(t, "root")
	if runtime.GOOS != "linux" || os.Geteuid() != 0 {
		missing(t, "root on Linux")
	}
}

// Program gives the path of a program of this machine, such as sshd.
func Program(t testing.TB, name string) string {
	t.Helper()
	leaveOut(t, name)
	for _, path := range []string{name, "/usr/sbin/" + name} {
		if found, err := exec.LookPath(path); err == nil {
			return found
		}
	}
	missing(t, name)
	return ""
}

// Tool gives the executable of a pinned tool. It asks the site binary that
// SITE_TEST_SITE names, by default bin/site; SITE_TEST_<TOOL> names another executable.
func Tool(t testing.TB, name string) string {
	t.Helper()
	leaveOut(t, "the pinned "+name)
	override := "SITE_TEST_" + strings.ToUpper(strings.ReplaceAll(name, "-", "_"))
	if path := os.Getenv(override); path != "" {
		return path
	}
	var said strings.Builder
	command := exec.CommandContext(t.Context(), Site(t), "tool", "which", name)
	command.Stderr = &said
	path, err := command.Output()
	if err != nil {
		missing(t, fmt.Sprintf("the pinned %s (`site tool which`: %v: %s)", name, err, strings.TrimSpace(said.String())))
	}
	return strings.TrimSpace(string(path))
}

// Site gives the path of the site binary.
func Site(t testing.TB) string {
	t.Helper()
	leaveOut(t, "the site binary")
	path := os.Getenv(siteVariable)
	if path == "" {
		path = filepath.Join(moduleRoot(t), "bin", "site")
	}
	if _, err := os.Stat(path); err != nil {
		missing(t, "the site binary of `make build`: "+err.Error())
	}
	return path
}

// Lab is for tests that boot hosts, which takes minutes: outside of CI they
// run only when asked for.
func Lab(t testing.TB) {
	t.Helper()
	leaveOut(t, "a lab")
	switch {
	case os.Getenv(labVariable) != "":
		Root(t)
	case os.Getenv("CI") != "":
		missing(t, "a lab, so set "+labVariable+"=1")
	default:
		t.Skip("boots a lab, as root: set " + labVariable + "=1")
	}
}

func leaveOut(t testing.TB, what string) {
	t.Helper()
	if os.Getenv(unitVariable) != "" {
		t.Skipf("needs %s, and %s leaves that out", what, unitVariable)
	}
}

func missing(t testing.TB, what string) {
	t.Helper()
	t.Fatalf("needs %s; set %s=1 to leave such tests out", what, unitVariable)
}

func moduleRoot(t testing.TB) string {
	t.Helper()
	folder, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for {
		if _, err := os.Stat(filepath.Join(folder, "go.mod")); err == nil {
			return folder
		}
		parent := filepath.Dir(folder)
		if parent == folder {
			t.Fatal("no go.mod above the test's folder")
		}
		folder = parent
	}
}
