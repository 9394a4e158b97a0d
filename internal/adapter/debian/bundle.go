package debian

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/retry"
)

const (
	parallelFetches = 6
	// fetchLimit bounds one package with its retries.
	fetchLimit = 5 * time.Minute
)

// Deb is a verified package file on this machine.
type Deb struct {
	Name         string
	Version      string
	Architecture string
	SHA256       string
	Path         string
	Size         int64
}

// Store keeps .deb files by their digest.
type Store struct {
	// Folder is the cache, such as <cache>/debs.
	Folder string
	// Mirrors are the archives; empty: as this machine's apt is set up, which
	// is asked only when something lacks.
	Mirrors Mirrors
	// Client fetches; nil: the default.
	Client *http.Client
}

// Bundle fetches what the cache lacks of a lock and returns all its packages in
// the lock's order, each proven against its digest.
func Bundle(ctx context.Context, lock Lock, cacheDir string, progress plan.Progress) ([]Deb, error) {
	return (&Store{Folder: cacheDir}).Bundle(ctx, lock, progress)
}

// Bundle is the same with a store's own settings.
func (s *Store) Bundle(ctx context.Context, lock Lock, progress plan.Progress) ([]Deb, error) {
	if progress == nil {
		progress = silent{}
	}
	if err := os.MkdirAll(s.Folder, 0o755); err != nil {
		return nil, fmt.Errorf("make the .deb cache: %w", err)
	}
	debs := make([]Deb, len(lock.Packages))
	var lacking []Package
	var total int64
	for index, entry := range lock.Packages {
		path := s.path(entry)
		debs[index] = Deb{entry.Name, entry.Version, entry.Architecture, entry.SHA256, path, entry.Size}
		whole, err := verify(path, entry)
		if err != nil {
			return nil, fmt.Errorf("check package %s in the cache: %w", entry.Name, err)
		}
		if !whole {
			lacking = append(lacking, entry)
			total += entry.Size
		}
	}
	if len(lacking) == 0 {
		return debs, nil
	}
	mirrors := s.Mirrors
	if len(mirrors) == 0 {
		var err error
		if mirrors, err = AptMirrors(ctx, lock.Codename); err != nil {
			return nil, err
		}
	}
	transfer := &transfer{store: s, mirrors: mirrors, progress: progress, total: total,
		what: fmt.Sprintf("%d .deb packages", len(lacking))}
	group, groupContext := errgroup.WithContext(ctx)
	group.SetLimit(parallelFetches)
	for _, entry := range lacking {
		group.Go(func() error { return transfer.fetch(groupContext, entry) })
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	return debs, nil
}

func (s *Store) path(entry Package) string {
	return filepath.Join(s.Folder, entry.SHA256+".deb")
}

// verify says whether the cache holds the package whole; a damaged file counts
// as missing and is replaced.
func verify(path string, entry Package) (bool, error) {
	opened, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer opened.Close()
	hash := sha256.New()
	if _, err := io.Copy(hash, opened); err != nil {
		return false, err
	}
	return hex.EncodeToString(hash.Sum(nil)) == entry.SHA256, nil
}

// transfer is one Bundle's fetching.
type transfer struct {
	store    *Store
	mirrors  Mirrors
	progress plan.Progress
	what     string
	total    int64

	mutex sync.Mutex
	done  int64
}

func (t *transfer) moved(count int64) {
	t.mutex.Lock()
	defer t.mutex.Unlock()
	t.done += count
	t.progress.Bytes(t.what, t.done, t.total)
}

// SupersededError says that the mirror no longer has a pinned package.
type SupersededError struct {
	Package Package
	Status  string
}

func (e *SupersededError) Error() string {
	return fmt.Sprintf("package %s %s (%s) is not on the mirror any more: %s", e.Package.Name, e.Package.Version, e.Package.Architecture, e.Status)
}

// Hint implements plan.Hinter.
func (e *SupersededError) Hint() string {
	return "a newer version has replaced it; refresh the lock: site debs lock"
}

func (t *transfer) fetch(ctx context.Context, entry Package) error {
	base, ok := t.mirrors[entry.Archive]
	if !ok {
		return fmt.Errorf("fetch package %s: apt is set up with no %s archive", entry.Name, entry.Archive)
	}
	err := retry.Until(ctx, "package "+entry.Name, fetchLimit, func(ctx context.Context) error {
		return t.attempt(ctx, base+entry.Path, entry)
	})
	if err != nil {
		return fmt.Errorf("fetch package %s %s: %w", entry.Name, entry.Version, err)
	}
	return nil
}

// attempt fetches once. What more tries cannot mend is permanent.
func (t *transfer) attempt(ctx context.Context, address string, entry Package) (err error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return retry.Permanent(err)
	}
	client := t.store.Client
	if client == nil {
		client = http.DefaultClient
	}
	response, err := client.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	switch {
	case response.StatusCode == http.StatusNotFound || response.StatusCode == http.StatusGone:
		return retry.Permanent(&SupersededError{entry, response.Status})
	case response.StatusCode >= 400 && response.StatusCode < 500 && response.StatusCode != http.StatusTooManyRequests:
		return retry.Permanent(fmt.Errorf("the mirror answers %s", response.Status))
	case response.StatusCode != http.StatusOK:
		return fmt.Errorf("the mirror answers %s", response.Status)
	}
	temporary, err := os.CreateTemp(t.store.Folder, ".new-*")
	if err != nil {
		return retry.Permanent(err)
	}
	defer os.Remove(temporary.Name())
	hash := sha256.New()
	// One byte more than expected is enough to know that it is wrong.
	count, err := io.Copy(io.MultiWriter(temporary, hash), io.LimitReader(&counted{response.Body, t.moved}, entry.Size+1))
	err = errors.Join(err, temporary.Chmod(0o644), temporary.Sync(), temporary.Close())
	if err != nil {
		t.moved(-count)
		return err
	}
	if sum := hex.EncodeToString(hash.Sum(nil)); sum != entry.SHA256 || count != entry.Size {
		t.moved(-count)
		return retry.Permanent(plan.WithHint(
			fmt.Errorf("the mirror sent %d bytes with sha256 %s, locked are %d with %s", count, sum, entry.Size, entry.SHA256),
			"nothing was kept; a proxy in between may alter files, or the mirror is damaged"))
	}
	return os.Rename(temporary.Name(), t.store.path(entry))
}

type counted struct {
	reader io.Reader
	moved  func(int64)
}

func (c *counted) Read(buffer []byte) (int, error) {
	count, err := c.reader.Read(buffer)
	c.moved(int64(count))
	return count, err
}

// Unpack fetches a lock's packages and lays their files out below a folder. No
// script of theirs runs.
func (s *Store) Unpack(ctx context.Context, lock []byte, into string, progress plan.Progress) error {
	parsed, err := ParseLock(lock)
	if err != nil {
		return err
	}
	debs, err := s.Bundle(ctx, parsed, progress)
	if err != nil {
		return err
	}
	if _, err := exec.LookPath("dpkg-deb"); err != nil {
		return plan.WithHint(fmt.Errorf("unpack .deb packages: %w", err), "this needs a Debian machine, or one that has dpkg")
	}
	for _, deb := range debs {
		output, err := exec.CommandContext(ctx, "dpkg-deb", "--extract", deb.Path, into).CombinedOutput()
		if err != nil {
			return fmt.Errorf("unpack package %s: %w: %s", deb.Name, err, lastLines(output))
		}
	}
	return nil
}
