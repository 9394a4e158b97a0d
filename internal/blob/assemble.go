package blob

import (
	"crypto/sha256"
	"errors"
	"io"
	"io/fs"
	"os"
	"syscall"
)

// Assemble makes a blob visible: its chunks are taken from what has arrived
// and from other blobs, each is hashed, the whole is hashed, and only then it
// is renamed into its place. Its arrived chunks are deleted afterwards.
//
// A *MissingChunksError lists what has to be sent. Where a chunk was only to be
// had from a blob that turned out to be damaged, that blob is removed (it must
// not be visible under a digest that it does not have) and the chunk is missing.
func (s *Store) Assemble(manifest Manifest) error {
	if err := manifest.Validate(); err != nil {
		return err
	}
	unlock, err := s.lock(syscall.LOCK_EX)
	if err != nil {
		return err
	}
	defer unlock()
	s.mutex.Lock()
	defer s.mutex.Unlock()
	present, err := s.Has(manifest.Digest)
	if err != nil {
		return err
	}
	if !present {
		if err := s.build(manifest); err != nil {
			return err
		}
	}
	digests := make([]Digest, len(manifest.Chunks))
	for i, c := range manifest.Chunks {
		digests[i] = c.Digest
	}
	return s.removeIncoming(digests...)
}

func (s *Store) build(manifest Manifest) error {
	for {
		if err := s.refresh(); err != nil {
			return err
		}
		err := s.write(blobsDir, manifest.Digest.Hex(), true, func(w io.Writer) error {
			if err := s.join(w, manifest); err != nil {
				return err
			}
			// The manifest comes first: without its blob it means nothing,
			// and a blob is never without one.
			return s.writeManifest(manifest)
		})
		var corrupt *corruptBlobError
		if !errors.As(err, &corrupt) {
			return err
		}
		// Each turn removes one damaged blob or manifest, so this ends.
		if err := s.removeCorrupt(corrupt.blob); err != nil {
			return err
		}
	}
}

// removeCorrupt removes a blob that is not what its digest promises; where the
// blob is right, it was its manifest that is damaged, and that goes alone.
func (s *Store) removeCorrupt(digest Digest) error {
	s.index = chunkIndex{}
	err := s.Verify(digest)
	var mismatch *MismatchError
	if errors.As(err, &mismatch) {
		return s.removeBlob(digest)
	}
	if err != nil {
		return err
	}
	return s.removeFile(manifestsDir, digest.Hex()+jsonSuffix)
}

// join writes the plain bytes of a blob to w and proves them.
func (s *Store) join(w io.Writer, manifest Manifest) error {
	files := map[Digest]*os.File{}
	defer func() {
		for _, file := range files {
			_ = file.Close()
		}
	}()
	buffer := make([]byte, MaxChunkSize)
	whole := sha256.New()
	seen := map[rawDigest]bool{}
	var missing []Digest
	for _, ref := range manifest.Chunks {
		plain, err := s.readIncoming(ref, buffer)
		if errors.Is(err, fs.ErrNotExist) {
			if at, found := s.index.chunks[ref.Digest.raw()]; found {
				plain, err = s.readIndexed(ref, at, files, buffer)
			}
		}
		if errors.Is(err, fs.ErrNotExist) {
			if !seen[ref.Digest.raw()] {
				seen[ref.Digest.raw()] = true
				missing = append(missing, ref.Digest)
			}
			continue
		}
		if err != nil {
			return err
		}
		if len(missing) > 0 {
			continue
		}
		whole.Write(plain)
		if _, err := w.Write(plain); err != nil {
			return err
		}
	}
	if len(missing) > 0 {
		return &MissingChunksError{Blob: manifest.Digest, Chunks: missing}
	}
	if got := digestOfSum(sum(whole.Sum(nil))); got != manifest.Digest {
		return &MismatchError{What: "assembled blob", Want: manifest.Digest, Got: got}
	}
	return nil
}

func (s *Store) writeManifest(manifest Manifest) error {
	encoded, err := manifest.Encode()
	if err != nil {
		return err
	}
	return s.write(manifestsDir, manifest.Digest.Hex()+jsonSuffix, true, func(w io.Writer) error {
		_, err := w.Write(encoded)
		return err
	})
}
