package collect

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nomad-site/site/internal/blob"
)

const (
	// youngest is the age below which a name stays: a deploy may be under way that
	// brought it and has not released yet.
	youngest = time.Hour
	// abandoned is the age from which a blob without a name, and a chunk of an
	// unfinished one, belongs to nothing that is still under way.
	abandoned = 24 * time.Hour
	// spare stays free for what else writes on the disk.
	spare = 64 << 20
)

// Options say what to remove.
type Options struct {
	Store *blob.Store
	// List is the path of the list of what is kept.
	List   string
	DryRun bool
	// MaxBytes: it stops once the blobs take no more; 0: it removes all that is not kept.
	MaxBytes int64
	// NeedFree: it stops once so many bytes of the disk are free; 0: as above.
	NeedFree int64
}

// Artifact is a name in the store, and its fate.
type Artifact struct {
	Site     string      `json:"site"`
	Artifact string      `json:"artifact"`
	Digest   blob.Digest `json:"digest"`
	Size     int64       `json:"size"`
	Removed  bool        `json:"removed"`
	Reason   string      `json:"reason"`
}

// Name is "site/artifact@sha256:…".
func (a Artifact) Name() string { return a.Site + "/" + a.Artifact + "@" + string(a.Digest) }

// Result is what was removed, or would be.
type Result struct {
	DryRun bool `json:"dry_run"`
	// Refused says why nothing was removed.
	Refused    string     `json:"refused,omitempty"`
	Artifacts  []Artifact `json:"artifacts"`
	Images     []Image    `json:"images"`
	Blobs      int        `json:"blobs_removed"`
	BytesFreed int64      `json:"bytes_freed"`
}

// noList is why nothing is removed.
const noList = "there is no list of what is kept: the next deploy writes one"

// collection is one run.
type collection struct {
	options Options
	kept    map[string]bool
	names   []aged
	// uses counts the names that list a blob.
	uses   map[blob.Digest]int
	total  int64
	result Result
}

type aged struct {
	blob.Name
	published time.Time
}

// Run removes names that are not kept, oldest first, and the blobs that no other
// name lists.
func Run(ctx context.Context, options Options) (Result, error) {
	c := &collection{
		options: options, uses: map[blob.Digest]int{},
		result: Result{DryRun: options.DryRun, Artifacts: []Artifact{}, Images: []Image{}},
	}
	kept, there, err := ReadList(options.List)
	if err != nil {
		return c.result, err
	}
	c.kept = kept
	if !there {
		c.result.Refused = noList
	}
	if err := c.look(); err != nil {
		return c.result, err
	}
	if there {
		err = c.abandonedBlobs(ctx)
	}
	for _, name := range c.names {
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return c.result, err
		}
		err = c.decide(name)
	}
	return c.result, err
}

// look reads what there is.
func (c *collection) look() error {
	names, err := c.options.Store.Names()
	if err != nil {
		return err
	}
	for _, name := range names {
		for _, digest := range unique(name.Blobs) {
			c.uses[digest]++
		}
		file := filepath.Join(c.options.Store.Dir(), "names", name.Site, name.Artifact, name.Digest.Hex()+".json")
		info, err := os.Lstat(file)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("look at %s: %w", name, err)
		}
		c.names = append(c.names, aged{name, info.ModTime()})
	}
	slices.SortStableFunc(c.names, func(a, b aged) int {
		return cmp.Or(a.published.Compare(b.published), cmp.Compare(a.String(), b.String()))
	})
	blobs, err := c.options.Store.Blobs()
	if err != nil {
		return err
	}
	for _, digest := range blobs {
		size, err := c.options.Store.Size(digest)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		c.total += size
	}
	return nil
}

func unique(digests []blob.Digest) []blob.Digest {
	sorted := slices.Sorted(slices.Values(digests))
	return slices.Compact(sorted)
}

// decide gives one name its fate.
func (c *collection) decide(name aged) error {
	fate := Artifact{Site: name.Site, Artifact: name.Artifact, Digest: name.Digest, Size: name.Size}
	enough, err := c.enough()
	if err != nil {
		return err
	}
	switch {
	case c.kept[name.String()]:
		fate.Reason = "kept by the site"
	case name.Platform:
		fate.Reason = "platform"
	case c.result.Refused != "":
		fate.Reason = c.result.Refused
	case time.Since(name.published) < youngest:
		fate.Reason = "younger than an hour"
	case enough:
		fate.Reason = "not kept, but there is room enough"
	default:
		fate.Reason, fate.Removed = "no kept release has it", true
		err = c.remove(name.Name)
	}
	c.result.Artifacts = append(c.result.Artifacts, fate)
	return err
}

// enough reports whether nothing more has to go.
func (c *collection) enough() (bool, error) {
	if c.options.MaxBytes == 0 && c.options.NeedFree == 0 {
		return false, nil
	}
	if c.options.MaxBytes > 0 && c.total > c.options.MaxBytes {
		return false, nil
	}
	if c.options.NeedFree == 0 {
		return true, nil
	}
	free, err := Free(c.options.Store.Dir())
	if c.options.DryRun {
		free += c.result.BytesFreed
	}
	return free >= c.options.NeedFree, err
}

func (c *collection) remove(name blob.Name) error {
	if !c.options.DryRun {
		if err := c.options.Store.DeleteName(name.Site, name.Artifact, name.Digest); err != nil {
			return err
		}
	}
	for _, digest := range unique(name.Blobs) {
		if c.uses[digest]--; c.uses[digest] > 0 {
			continue
		}
		if err := c.removeBlob(digest); err != nil {
			return err
		}
	}
	return nil
}

func (c *collection) removeBlob(digest blob.Digest) error {
	size, err := c.options.Store.Size(digest)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil && !c.options.DryRun {
		err = c.options.Store.Delete(digest)
	}
	var used *blob.InUseError
	if errors.As(err, &used) { // published meanwhile
		return nil
	}
	if err != nil {
		return err
	}
	c.result.Blobs++
	c.result.BytesFreed += size
	c.total -= size
	return nil
}

// abandonedBlobs removes what an unfinished transfer left.
func (c *collection) abandonedBlobs(ctx context.Context) error {
	blobs, err := c.options.Store.Blobs()
	if err != nil {
		return err
	}
	for _, digest := range blobs {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if c.uses[digest] > 0 {
			continue
		}
		info, err := os.Lstat(filepath.Join(c.options.Store.Dir(), "blobs", "sha256", digest.Hex()))
		if err != nil || time.Since(info.ModTime()) < abandoned {
			continue
		}
		if err := c.removeBlob(digest); err != nil {
			return err
		}
	}
	if c.options.DryRun {
		return nil
	}
	freed, err := c.options.Store.Sweep(abandoned)
	c.result.BytesFreed += freed
	return err
}

// Free is how many bytes of the disk may still be taken.
func Free(folder string) (int64, error) {
	var status unix.Statfs_t
	if err := unix.Statfs(folder, &status); err != nil {
		return 0, fmt.Errorf("look at the disk under %s: %w", folder, err)
	}
	return int64(status.Bavail) * int64(status.Bsize), nil //nolint:unconvert // types differ by platform
}

// Room gives a function for pull.Options.MakeRoom: it removes only where the disk
// would not do.
func Room(store *blob.Store) func(ctx context.Context, need int64) error {
	return func(ctx context.Context, need int64) error {
		free, err := Free(store.Dir())
		if err != nil || free >= need+spare {
			return err
		}
		if _, err := Run(ctx, Options{Store: store, List: ListPath(store.Dir()), NeedFree: need + spare}); err != nil {
			return fmt.Errorf("make room: %w", err)
		}
		if free, err = Free(store.Dir()); err != nil || free >= need {
			return err
		}
		return &blob.NoSpaceError{Path: store.Dir(), Err: fmt.Errorf("%d bytes are needed and %d are free", need, free)}
	}
}
