// Package e2e runs the real site binary against real hosts of a lab, the way a
// user does: a repository of their own, a commit, a command, and then a look at
// the host behind the product's back.
package e2e

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/nomad-site/site/internal/lab"
	"github.com/nomad-site/site/internal/testneeds"
)

// name is that of the lab, of the site and, with a number, of its hosts.
const name = "e2e"

func TestMain(m *testing.M) { os.Exit(runTests(m)) }

// shared is the lab of this run of the tests.
// There is one for all tests: booting it is what takes long.
var shared sharedLab

func runTests(m *testing.M) int {
	interrupts := make(chan os.Signal, 1)
	signal.Notify(interrupts, os.Interrupt, syscall.SIGTERM)
	go func() {
		<-interrupts
		_ = shared.down()
		os.Exit(130)
	}()
	code := m.Run()
	if localBinary.path != "" {
		_ = os.RemoveAll(filepath.Dir(localBinary.path))
	}
	if err := shared.down(); err != nil {
		fmt.Fprintln(os.Stderr, "take the lab down:", err)
		return max(code, 1)
	}
	return code
}

// sharedLab is a lab that comes up when the first test needs it. Tests with it
// run one after the other.
type sharedLab struct {
	mutex sync.Mutex
	// folder is the lab's working folder; kept says not to remove it at the end.
	folder string
	kept   bool
	lock   *os.File
	lab    *lab.Lab
	site   string // the site binary
	// state is what the hosts are known to be: "", bareState or a snapshot.
	state string
}

const (
	bareState = "bare"
	limit     = 10 * time.Minute
	// folderPattern is what runs that were killed are found by.
	folderPattern = "site-e2e-"
)

// ensure brings the lab up.
func (s *sharedLab) ensure(t *testing.T) {
	t.Helper()
	s.mutex.Lock()
	defer s.mutex.Unlock()
	if s.lab != nil {
		return
	}
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	if s.site == "" {
		s.site = siteBinary(t)
	}
	if err := s.open(ctx); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	// Set first: what comes up half is taken down too.
	it, err := lab.Open(s.folder, name)
	if err != nil {
		t.Fatal(err)
	}
	s.lab = it
	if err := it.Up(ctx, lab.Options{Hosts: 1, Versitygw: testneeds.Tool(t, "versitygw"), Progress: func(line string) { t.Log("lab: " + line) }}); err != nil {
		t.Fatal(err)
	}
	t.Logf("the lab was up after %s", time.Since(start).Round(time.Millisecond))
	if !s.kept {
		s.state = bareState
	}
}

// open makes this run's folder and clears up after runs that were killed. With
// SITE_TEST_LAB_DIR the lab lies there and outlives the run: whoever works on
// these tests need not wait for a bootstrap each time.
func (s *sharedLab) open(ctx context.Context) error {
	var err error
	if s.folder = os.Getenv("SITE_TEST_LAB_DIR"); s.folder != "" {
		s.kept = true
		if err := os.MkdirAll(s.folder, 0o755); err != nil {
			return err
		}
	} else {
		if err := removeLeftovers(ctx); err != nil {
			return err
		}
		if s.folder, err = os.MkdirTemp("", folderPattern); err != nil {
			return err
		}
	}
	s.lock, err = lockFolder(s.folder)
	if err != nil {
		return fmt.Errorf("%s is in use by another run: %w", s.folder, err)
	}
	return nil
}

// lockFolder holds a folder as long as this process lives.
func lockFolder(folder string) (*os.File, error) {
	file, err := os.OpenFile(filepath.Join(folder, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return file, nil
}

// removeLeftovers takes down the labs of runs that ended without doing so.
func removeLeftovers(ctx context.Context) error {
	folders, err := filepath.Glob(filepath.Join(os.TempDir(), folderPattern+"*"))
	if err != nil {
		return err
	}
	for _, folder := range folders {
		lock, err := lockFolder(folder)
		if err != nil {
			continue // another run's, alive
		}
		it, err := lab.Open(folder, name)
		if err == nil {
			err = it.Down(ctx)
		}
		if err == nil {
			err = os.RemoveAll(folder)
		}
		if err := errors.Join(err, lock.Close()); err != nil {
			return fmt.Errorf("clear up %s: %w", folder, err)
		}
	}
	return nil
}

// down ends the lab unless it is to be kept.
func (s *sharedLab) down() error {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	if s.lab == nil || s.kept {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	err := s.lab.Down(ctx)
	s.lab = nil
	return errors.Join(err, os.RemoveAll(s.folder), s.lock.Close())
}

// projectRoot is the folder of the project whose tests these are.
func projectRoot(t *testing.T) string {
	t.Helper()
	root, err := filepath.Abs(filepath.Join("..", ".."))
	if err != nil {
		t.Fatal(err)
	}
	return root
}

// siteBinary is SITE_TEST_SITE or, where that is not set, built here.
func siteBinary(t *testing.T) string {
	t.Helper()
	if path := os.Getenv("SITE_TEST_SITE"); path != "" {
		if !filepath.IsAbs(path) {
			t.Fatalf("SITE_TEST_SITE=%s is not an absolute path", path)
		}
		return path
	}
	root := projectRoot(t)
	if found, _ := filepath.Glob(filepath.Join(root, "internal", "hostbinary", "site-host-linux-*")); len(found) == 0 {
		t.Fatal("there is no site-host executable to carry: run `make build` first, or set SITE_TEST_SITE")
	}
	folder, err := os.MkdirTemp("", "site-binary-")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(folder, "site")
	command := exec.CommandContext(t.Context(), "go", "build", "-buildvcs=false", "-trimpath", "-tags", "embed_site_host", "-o", path, "./cmd/site")
	command.Dir = root
	if out, err := command.CombinedOutput(); err != nil {
		t.Fatalf("build site: %v\n%s", err, out)
	}
	return path
}

// snapshotName changes with the site binary: what another one bootstrapped is
// not what this one wants.
func (s *sharedLab) snapshotName(kind string) (string, error) {
	content, err := os.ReadFile(s.site)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(content)
	return kind + "-" + hex.EncodeToString(sum[:5]), nil
}

// beBare makes the hosts bare.
func (s *sharedLab) beBare(t *testing.T) {
	t.Helper()
	if s.state == bareState {
		return
	}
	s.state = ""
	if err := s.lab.Reset(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.state = bareState
}

// beBootstrapped makes the hosts those of the repository in seed, which the
// first caller bootstraps and keeps.
func (s *sharedLab) beBootstrapped(t *testing.T, kind string, bootstrap func()) (seed string) {
	t.Helper()
	snapshot, err := s.snapshotName(kind)
	if err != nil {
		t.Fatal(err)
	}
	seed = filepath.Join(s.folder, snapshot)
	if s.state == snapshot {
		return seed
	}
	has, err := s.lab.HasSnapshot(snapshot)
	if err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	if has {
		s.state = ""
		if err := s.lab.Restore(t.Context(), snapshot); err != nil {
			t.Fatal(err)
		}
		t.Logf("restored the snapshot in %s", time.Since(start).Round(time.Millisecond))
	} else {
		s.beBare(t)
		s.state = ""
		bootstrap()
	}
	s.state = snapshot
	return seed
}
