package serve

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"regexp"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/nomad-site/site/internal/blob"
)

// maxName bounds one file of names/: it lists a few digests.
const maxName = 1 << 20

var nameFile = regexp.MustCompile(`^[0-9a-f]{64}\.json$`)

// reader opens the store's files. It is not a blob.Store, since the server has
// no right to write: opening that one cleans up and takes a lock. Every part of a path is opened without
// following symlinks, so that nothing outside of the store can ever be served.
type reader struct{ root string }

// open opens a regular file or a folder below the store.
func (r reader) open(relative string) (*os.File, error) {
	// The store itself may lie behind a symlink: that is the operator's choice.
	folder, err := unix.Open(r.root, unix.O_DIRECTORY|unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: r.root, Err: err}
	}
	parts := strings.Split(relative, "/")
	for number, part := range parts {
		if part == "" || part == "." || part == ".." {
			_ = unix.Close(folder)
			return nil, &fs.PathError{Op: "open", Path: relative, Err: fs.ErrInvalid}
		}
		flags := unix.O_RDONLY | unix.O_NOFOLLOW | unix.O_CLOEXEC | unix.O_NONBLOCK // a FIFO must not block
		if number < len(parts)-1 {
			flags |= unix.O_DIRECTORY
		}
		next, err := unix.Openat(folder, part, flags, 0)
		_ = unix.Close(folder)
		if err != nil {
			return nil, &fs.PathError{Op: "open", Path: path.Join(parts[:number+1]...), Err: err}
		}
		folder = next
	}
	return os.NewFile(uintptr(folder), path.Join(r.root, relative)), nil
}

// openFile opens a regular file below the store.
func (r reader) openFile(relative string) (*os.File, identity, error) {
	file, err := r.open(relative)
	if err != nil {
		return nil, identity{}, err
	}
	var status unix.Stat_t
	err = unix.Fstat(int(file.Fd()), &status)
	if err == nil && status.Mode&unix.S_IFMT != unix.S_IFREG {
		err = fs.ErrInvalid
	}
	if err != nil {
		_ = file.Close()
		return nil, identity{}, &fs.PathError{Op: "open", Path: relative, Err: err}
	}
	return file, identityOf(status), nil
}

func blobPath(hex string) string { return "blobs/sha256/" + hex }

// name returns what is published as site/artifact at that digest.
func (r reader) name(site, artifact, hex string) (blob.Name, error) {
	relative := path.Join("names", site, artifact, hex+".json")
	file, _, err := r.openFile(relative)
	if err != nil {
		return blob.Name{}, err
	}
	defer func() { _ = file.Close() }()
	content, err := io.ReadAll(io.LimitReader(file, maxName))
	if err != nil {
		return blob.Name{}, fmt.Errorf("read %s: %w", relative, err)
	}
	name := blob.Name{Site: site, Artifact: artifact}
	if err := json.Unmarshal(content, &name); err != nil {
		return blob.Name{}, fmt.Errorf("read %s: %w", relative, err)
	}
	if err := name.Validate(); err != nil {
		return blob.Name{}, fmt.Errorf("read %s: %w", relative, err)
	}
	if name.Digest.Hex() != hex {
		return blob.Name{}, fmt.Errorf("read %s: it names %s", relative, name.Digest)
	}
	return name, nil
}

// lists reports whether any image of that name consists of the digest.
func (r reader) lists(site, artifact, hex string) (bool, error) {
	folder, err := r.open(path.Join("names", site, artifact))
	if err != nil {
		return false, err
	}
	defer func() { _ = folder.Close() }()
	files, err := folder.Readdirnames(-1)
	if err != nil {
		return false, fmt.Errorf("list %s: %w", folder.Name(), err)
	}
	digest := blob.Digest("sha256:" + hex)
	var broken error
	for _, file := range files {
		if !nameFile.MatchString(file) {
			continue
		}
		name, err := r.name(site, artifact, strings.TrimSuffix(file, ".json"))
		if err != nil { // one broken name must not hide the others
			broken = errors.Join(broken, err)
			continue
		}
		if name.Kind == blob.KindImage && slices.Contains(name.Blobs, digest) {
			return true, nil
		}
	}
	return false, broken
}
