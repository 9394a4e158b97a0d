package blob

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path"
	"path/filepath"
	"slices"
	"sync"
	"syscall"

	"github.com/klauspost/compress/zstd"
)

// The folders of a store.
const (
	blobsDir     = "blobs/sha256"
	manifestsDir = "manifests"
	incomingDir  = "incoming"
	namesDir     = "names"
	tempDir      = "tmp"
	lockFile     = "lock"
)

// Store keeps whole blobs, their manifests, the chunks of unfinished blobs and
// the names under which blobs are served, in one directory.
//
// Several processes may have it open. Readers need no lock: everything visible
// came there by an atomic rename of proven bytes. Writers hold the lock file
// shared while they have temporary files; whoever deletes or assembles holds
// it alone, so that clean-up never takes a file from under a writer.
type Store struct {
	dir  string
	root *os.Root

	chunks *zstd.Decoder

	// mutex guards index.
	mutex sync.Mutex
	index chunkIndex
}

// OpenStore opens the store at dir and makes its folders where they lack. What
// a killed writer left is removed, unless another process is writing now.
func OpenStore(dir string) (*Store, error) {
	absolute, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	if err := os.MkdirAll(absolute, 0o700); err != nil {
		return nil, diskError("make store folder", absolute, err)
	}
	info, err := os.Lstat(absolute)
	if err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	if !info.IsDir() {
		return nil, &UnsafeEntryError{Path: absolute}
	}
	root, err := os.OpenRoot(absolute)
	if err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	decoder, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(0),
		zstd.WithDecoderMaxMemory(MaxChunkSize))
	if err != nil {
		_ = root.Close()
		return nil, fmt.Errorf("open store: %w", err)
	}
	s := &Store{dir: absolute, root: root, chunks: decoder}
	if err := s.prepare(); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// Close releases the store. Open blobs stay readable.
func (s *Store) Close() error {
	s.chunks.Close()
	return s.root.Close()
}

// Dir is where the store is.
func (s *Store) Dir() string { return s.dir }

func (s *Store) prepare() error {
	for _, dir := range []string{"blobs", blobsDir, manifestsDir, incomingDir, namesDir, tempDir} {
		if err := s.makeDir(dir); err != nil {
			return err
		}
	}
	unlock, err := s.lock(syscall.LOCK_EX | syscall.LOCK_NB)
	if errors.Is(err, syscall.EWOULDBLOCK) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unlock()
	return s.clean()
}

// clean removes temporary files and manifests without a blob. The caller holds
// the lock alone, so no living writer owns any of them.
func (s *Store) clean() error {
	err := s.eachFile(tempDir, func(dir *os.Root, name string) error { return dir.Remove(name) })
	if err != nil {
		return err
	}
	blobs, err := s.openDir(blobsDir)
	if err != nil {
		return err
	}
	defer blobs.Close()
	err = s.eachFile(manifestsDir, func(dir *os.Root, name string) error {
		_, err := blobs.Lstat(trimJSON(name))
		if errors.Is(err, fs.ErrNotExist) {
			return dir.Remove(name)
		}
		return err
	})
	if err != nil {
		return err
	}
	return s.cleanIncoming()
}

// cleanIncoming removes the chunks of finished blobs: whoever was killed after
// the last rename of an assembly left them. Others wait for a transfer to go on.
func (s *Store) cleanIncoming() error {
	var arrived []Digest
	err := s.eachFile(incomingDir, func(_ *os.Root, name string) error {
		if digest := Digest("sha256:" + name); digest.Valid() {
			arrived = append(arrived, digest)
		}
		return nil
	})
	if err != nil || len(arrived) == 0 {
		return err
	}
	s.mutex.Lock()
	defer s.mutex.Unlock()
	if err := s.refresh(); err != nil {
		return err
	}
	return s.removeIncoming(slices.DeleteFunc(arrived, func(digest Digest) bool {
		_, finished := s.index.chunks[digest.raw()]
		return !finished
	})...)
}

// makeDir makes one folder of the store; its parent is there already.
func (s *Store) makeDir(name string) error {
	err := s.root.Mkdir(name, 0o700)
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return diskError("make folder", s.path(name), err)
	}
	dir, err := s.openDir(name)
	if err != nil {
		return err
	}
	return dir.Close()
}

// openDir opens a folder of the store without following a symlink at any level.
func (s *Store) openDir(name string) (*os.Root, error) {
	current, err := s.root.OpenRoot(".")
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", s.path(name), err)
	}
	for rest := name; rest != ""; {
		var part string
		part, rest = cutPath(rest)
		next, err := openPlainDir(current, part)
		_ = current.Close()
		if err != nil {
			var unsafe *UnsafeEntryError
			if errors.As(err, &unsafe) {
				return nil, &UnsafeEntryError{Path: s.path(name)}
			}
			return nil, fmt.Errorf("open %s: %w", s.path(name), err)
		}
		current = next
	}
	return current, nil
}

// openPlainDir opens a folder and makes sure that it is the entry that was
// looked at: os.Root follows symlinks that stay inside of it.
func openPlainDir(parent *os.Root, name string) (*os.Root, error) {
	entry, err := parent.Lstat(name)
	if err != nil {
		return nil, err
	}
	if !entry.IsDir() {
		return nil, &UnsafeEntryError{Path: name}
	}
	dir, err := parent.OpenRoot(name)
	if err != nil {
		return nil, err
	}
	opened, err := dir.Stat(".")
	if err == nil && !os.SameFile(entry, opened) {
		err = &UnsafeEntryError{Path: name}
	}
	if err != nil {
		_ = dir.Close()
		return nil, err
	}
	return dir, nil
}

// openFile opens a plain file of the store for reading.
func (s *Store) openFile(dir, name string) (*os.File, fs.FileInfo, error) {
	folder, err := s.openDir(dir)
	if err != nil {
		return nil, nil, err
	}
	defer folder.Close()
	entry, err := folder.Lstat(name)
	if err != nil {
		return nil, nil, fmt.Errorf("open %s: %w", s.path(dir, name), err)
	}
	if !entry.Mode().IsRegular() {
		return nil, nil, &UnsafeEntryError{Path: s.path(dir, name)}
	}
	file, err := folder.OpenFile(name, os.O_RDONLY|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("open %s: %w", s.path(dir, name), err)
	}
	opened, err := file.Stat()
	if err == nil && !os.SameFile(entry, opened) {
		err = &UnsafeEntryError{Path: s.path(dir, name)}
	}
	if err != nil {
		_ = file.Close()
		return nil, nil, err
	}
	return file, opened, nil
}

func (s *Store) readFile(dir, name string, limit int64) ([]byte, error) {
	file, info, err := s.openFile(dir, name)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	if info.Size() > limit {
		return nil, fmt.Errorf("read %s: longer than %d bytes", s.path(dir, name), limit)
	}
	content, err := io.ReadAll(io.LimitReader(file, limit))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", s.path(dir, name), err)
	}
	return content, nil
}

// lstat looks at a plain file; fs.ErrNotExist where it is not there.
func (s *Store) lstat(dir, name string) (fs.FileInfo, error) {
	folder, err := s.openDir(dir)
	if err != nil {
		return nil, err
	}
	defer folder.Close()
	info, err := folder.Lstat(name)
	if err != nil {
		return nil, fmt.Errorf("look at %s: %w", s.path(dir, name), err)
	}
	if !info.Mode().IsRegular() {
		return nil, &UnsafeEntryError{Path: s.path(dir, name)}
	}
	return info, nil
}

// eachFile visits the plain files of a folder in the order of their names.
func (s *Store) eachFile(dir string, visit func(dir *os.Root, name string) error) error {
	folder, err := s.openDir(dir)
	if err != nil {
		return err
	}
	defer folder.Close()
	entries, err := fs.ReadDir(folder.FS(), ".")
	if err != nil {
		return fmt.Errorf("list %s: %w", s.path(dir), err)
	}
	for _, entry := range entries {
		if !entry.Type().IsRegular() {
			return &UnsafeEntryError{Path: s.path(dir, entry.Name())}
		}
		if err := visit(folder, entry.Name()); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("%s: %w", s.path(dir, entry.Name()), err)
		}
	}
	return nil
}

// lock takes the lock file in the given flock mode. Each call opens the file
// anew, so that it also works between goroutines of one process.
func (s *Store) lock(how int) (unlock func(), err error) {
	if info, err := s.root.Lstat(lockFile); err == nil && !info.Mode().IsRegular() {
		return nil, &UnsafeEntryError{Path: s.path(lockFile)}
	}
	file, err := s.root.OpenFile(lockFile, os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, diskError("open", s.path(lockFile), err)
	}
	for {
		err = syscall.Flock(int(file.Fd()), how)
		if !errors.Is(err, syscall.EINTR) {
			break
		}
	}
	if err != nil {
		_ = file.Close()
		return nil, fmt.Errorf("lock %s: %w", s.path(lockFile), err)
	}
	return func() { _ = file.Close() }, nil
}

// write puts content at dir/name: temporary file, rename. Durable files are
// also synced, and so is their folder. The caller holds the lock.
func (s *Store) write(dir, name string, durable bool, fill func(io.Writer) error) error {
	temps, err := s.openDir(tempDir)
	if err != nil {
		return err
	}
	defer temps.Close()
	// Renaming follows folders by name: make sure that the target is a plain one.
	target, err := s.openDir(dir)
	if err != nil {
		return err
	}
	_ = target.Close()
	temp := fmt.Sprintf("%s.%016x", name, rand.Uint64()) //nolint:gosec // O_EXCL, not luck, keeps writers apart
	file, err := temps.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return diskError("create", s.path(tempDir, temp), err)
	}
	err = fill(file)
	if err == nil && durable {
		err = file.Sync()
	}
	err = errors.Join(err, file.Close())
	if err == nil {
		err = s.root.Rename(path.Join(tempDir, temp), path.Join(dir, name))
	}
	if err != nil {
		_ = temps.Remove(temp)
		var mine *MismatchError
		var missing *MissingChunksError
		var corrupt *corruptBlobError
		if errors.As(err, &mine) || errors.As(err, &missing) || errors.As(err, &corrupt) {
			return err
		}
		return diskError("write", s.path(dir, name), err)
	}
	if durable {
		return s.syncDir(dir)
	}
	return nil
}

func (s *Store) syncDir(dir string) error {
	folder, err := s.root.Open(dir)
	if err != nil {
		return fmt.Errorf("sync %s: %w", s.path(dir), err)
	}
	defer folder.Close()
	return diskError("sync", s.path(dir), folder.Sync())
}

func (s *Store) path(parts ...string) string {
	return filepath.Join(append([]string{s.dir}, parts...)...)
}

func cutPath(name string) (first, rest string) {
	for i := range len(name) {
		if name[i] == '/' {
			return name[:i], name[i+1:]
		}
	}
	return name, ""
}
