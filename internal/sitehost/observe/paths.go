package observe

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"runtime"
	"strconv"
	"sync"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/nomad-site/site/internal/reconcile/host"
)

// paths looks at the document's folders, files and binaries.
func (o Observer) paths(ctx context.Context, document host.Document, known accounts, observation *host.Observation) error {
	observation.Directories, observation.Files, observation.Binaries = map[string]host.ObservedPath{}, map[string]host.ObservedPath{}, map[string]host.ObservedPath{}
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(runtime.NumCPU()) // binaries are large and hashing takes a processor each
	var mutex sync.Mutex
	look := func(into map[string]host.ObservedPath, path string, hash bool) {
		group.Go(func() error {
			if err := ctx.Err(); err != nil {
				return err
			}
			found, err := o.lookAt(path, known, hash)
			if err != nil {
				return err
			}
			mutex.Lock()
			defer mutex.Unlock()
			into[path] = found
			return nil
		})
	}
	for _, binary := range document.Binaries { // the largest first
		look(observation.Binaries, binary.Path, true)
	}
	for _, file := range document.Files {
		look(observation.Files, file.Path, true)
	}
	for _, directory := range document.Directories {
		look(observation.Directories, directory.Path, false)
	}
	return group.Wait()
}

func (o Observer) lookAt(path string, known accounts, hash bool) (host.ObservedPath, error) {
	var status unix.Stat_t
	err := unix.Lstat(o.path(path), &status)
	if isAbsent(err) {
		return host.ObservedPath{}, nil
	}
	if err != nil {
		return host.ObservedPath{}, fmt.Errorf("look at %s: %w", path, err)
	}
	found := describe(status, known)
	if !hash || found.Kind != "file" {
		return found, nil
	}
	file, err := os.OpenFile(o.path(path), os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if isAbsent(err) { // removed meanwhile
		return host.ObservedPath{}, nil
	}
	if err != nil {
		return host.ObservedPath{}, fmt.Errorf("hash %s: %w", path, err)
	}
	defer func() { _ = file.Close() }()
	digest := sha256.New()
	if _, err := io.CopyBuffer(digest, struct{ io.Reader }{file}, make([]byte, 256<<10)); err != nil {
		return host.ObservedPath{}, fmt.Errorf("hash %s: %w", path, err)
	}
	found.SHA256 = hex.EncodeToString(digest.Sum(nil))
	return found, nil
}

func describe(status unix.Stat_t, known accounts) host.ObservedPath {
	owner, group := strconv.FormatUint(uint64(status.Uid), 10), strconv.FormatUint(uint64(status.Gid), 10)
	found := host.ObservedPath{
		Exists: true, Kind: "other", OwnerID: owner, GroupID: group,
		Owner: nameOf(known.userNames, owner), Group: nameOf(known.groupNames, group),
		Mode: fmt.Sprintf("%04o", status.Mode&0o7777),
	}
	switch status.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		found.Kind = "file"
	case unix.S_IFDIR:
		found.Kind = "directory"
	case unix.S_IFLNK:
		found.Kind = "symlink"
	}
	return found
}

// isAbsent also covers a file where a folder of the path should be: the diff
// names that folder itself.
func isAbsent(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR)
}
