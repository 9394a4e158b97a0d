package blob

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"
)

const jsonSuffix = ".json"

func trimJSON(name string) string { return strings.TrimSuffix(name, jsonSuffix) }

// Has reports whether the whole blob is there.
func (s *Store) Has(digest Digest) (bool, error) {
	_, err := s.Size(digest)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// Size is the length of a blob; an fs.ErrNotExist error where it is not there.
func (s *Store) Size(digest Digest) (int64, error) {
	if _, err := ParseDigest(string(digest)); err != nil {
		return 0, err
	}
	info, err := s.lstat(blobsDir, digest.Hex())
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}

// Open opens a blob for reading and seeking; an fs.ErrNotExist error where it
// is not there, an *UnsafeEntryError where it is a symlink.
func (s *Store) Open(digest Digest) (*os.File, error) {
	if _, err := ParseDigest(string(digest)); err != nil {
		return nil, err
	}
	file, _, err := s.openFile(blobsDir, digest.Hex())
	return file, err
}

// Manifest is the chunk list of a blob in the store.
func (s *Store) Manifest(digest Digest) (Manifest, error) {
	if _, err := ParseDigest(string(digest)); err != nil {
		return Manifest{}, err
	}
	data, err := s.readFile(manifestsDir, digest.Hex()+jsonSuffix, MaxManifestBytes)
	if err != nil {
		return Manifest{}, err
	}
	manifest, err := ParseManifest(data)
	if err != nil {
		return Manifest{}, fmt.Errorf("blob %s: %w", digest, err)
	}
	if manifest.Digest != digest {
		return Manifest{}, &MismatchError{What: "manifest of " + string(digest), Want: digest, Got: manifest.Digest}
	}
	return manifest, nil
}

// Verify hashes a blob again; a *MismatchError says that it is damaged.
func (s *Store) Verify(digest Digest) error {
	file, err := s.Open(digest)
	if err != nil {
		return err
	}
	defer file.Close()
	got, _, err := DigestReader(file)
	if err != nil {
		return fmt.Errorf("verify blob %s: %w", digest, err)
	}
	if got != digest {
		return &MismatchError{What: s.path(blobsDir, digest.Hex()), Want: digest, Got: got}
	}
	return nil
}

// Blobs lists the blobs in the store, sorted.
func (s *Store) Blobs() ([]Digest, error) {
	var out []Digest
	err := s.eachFile(blobsDir, func(_ *os.Root, name string) error {
		if digest, err := ParseDigest(digestPrefix + name); err == nil {
			out = append(out, digest)
		}
		return nil
	})
	return out, err
}

// Delete removes a blob; an *InUseError where a name lists it.
func (s *Store) Delete(digest Digest) error {
	if _, err := ParseDigest(string(digest)); err != nil {
		return err
	}
	unlock, err := s.lock(syscall.LOCK_EX)
	if err != nil {
		return err
	}
	defer unlock()
	names, err := s.Names()
	if err != nil {
		return err
	}
	for _, name := range names {
		if slices.Contains(name.Blobs, digest) {
			return &InUseError{Blob: digest, Name: name.String()}
		}
	}
	return s.removeBlob(digest)
}

// removeBlob removes the blob before its manifest: a manifest alone means
// nothing, a blob is always one that can be listed. The caller holds the lock alone.
func (s *Store) removeBlob(digest Digest) error {
	if err := s.removeFile(blobsDir, digest.Hex()); err != nil {
		return err
	}
	return s.removeFile(manifestsDir, digest.Hex()+jsonSuffix)
}

// removeFile removes a file; one that is not there is removed already.
func (s *Store) removeFile(where, name string) error {
	dir, err := s.openDir(where)
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := dir.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("delete %s: %w", s.path(where, name), err)
	}
	return nil
}

// Sweep deletes chunks that arrived longer than age ago for blobs that were
// never finished, and returns how many bytes that freed.
func (s *Store) Sweep(age time.Duration) (int64, error) {
	unlock, err := s.lock(syscall.LOCK_EX)
	if err != nil {
		return 0, err
	}
	defer unlock()
	var freed int64
	err = s.eachFile(incomingDir, func(dir *os.Root, name string) error {
		info, err := dir.Lstat(name)
		if err != nil || time.Since(info.ModTime()) < age {
			return err
		}
		freed += info.Size()
		return dir.Remove(name)
	})
	return freed, err
}
