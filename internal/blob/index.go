package blob

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"syscall"

	"github.com/klauspost/compress/zstd"
)

// location is where a chunk lies inside of a finished blob.
type location struct {
	blob   Digest
	offset int64
	size   int64
}

// chunkIndex finds chunks inside of finished blobs. It is built from the
// manifests when a writer first needs it: a process that only serves never
// pays for it. It may be stale; every use hashes what it reads.
type chunkIndex struct {
	chunks map[rawDigest]location
	blobs  map[Digest]bool
}

// refresh brings the index up to what is on disk, other processes' work included.
// The caller holds s.mutex.
func (s *Store) refresh() error {
	blobs, err := s.Blobs()
	if err != nil {
		return err
	}
	gone := false
	for known := range s.index.blobs {
		if _, found := slices.BinarySearch(blobs, known); !found {
			gone = true
		}
	}
	if s.index.blobs == nil || gone {
		s.index = chunkIndex{chunks: map[rawDigest]location{}, blobs: map[Digest]bool{}}
	}
	for _, digest := range blobs {
		if s.index.blobs[digest] {
			continue
		}
		s.index.blobs[digest] = true
		// A blob without a readable manifest is served all the same; its
		// chunks only cannot be found.
		if manifest, err := s.Manifest(digest); err == nil {
			s.index.add(manifest)
		}
	}
	return nil
}

func (x *chunkIndex) add(m Manifest) {
	var offset int64
	for _, c := range m.Chunks {
		x.chunks[c.Digest.raw()] = location{blob: m.Digest, offset: offset, size: c.Size}
		offset += c.Size
	}
}

// Missing returns those of chunks that lie neither in a blob nor among what
// has arrived, in their order, each once.
func (s *Store) Missing(chunks []Digest) ([]Digest, error) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	if err := s.refresh(); err != nil {
		return nil, err
	}
	incoming, err := s.openDir(incomingDir)
	if err != nil {
		return nil, err
	}
	defer incoming.Close()
	asked := make(map[rawDigest]bool, len(chunks))
	var missing []Digest
	for _, digest := range chunks {
		if _, err := ParseDigest(string(digest)); err != nil {
			return nil, err
		}
		raw := digest.raw()
		if asked[raw] {
			continue
		}
		asked[raw] = true
		if _, found := s.index.chunks[raw]; found {
			continue
		}
		info, err := incoming.Lstat(digest.Hex())
		switch {
		case errors.Is(err, fs.ErrNotExist):
			missing = append(missing, digest)
		case err != nil:
			return nil, fmt.Errorf("look at %s: %w", s.path(incomingDir, digest.Hex()), err)
		case !info.Mode().IsRegular():
			return nil, &UnsafeEntryError{Path: s.path(incomingDir, digest.Hex())}
		}
	}
	return missing, nil
}

// PutChunk takes a zstd-compressed chunk whose plain bytes have digest. It is
// proven first, then kept as it came until its blob is assembled.
//
// It is not synced: 1,500 syncs for a big image would cost seconds, and what a
// power cut spoils here is caught when Assemble hashes it again.
func (s *Store) PutChunk(digest Digest, compressed []byte) error {
	if _, err := s.openChunk(digest, compressed, nil); err != nil {
		return err
	}
	unlock, err := s.lock(syscall.LOCK_SH)
	if err != nil {
		return err
	}
	defer unlock()
	return s.write(incomingDir, digest.Hex(), false, func(w io.Writer) error {
		_, err := w.Write(compressed)
		return err
	})
}

// openChunk decompresses into buffer and proves the plain bytes.
func (s *Store) openChunk(digest Digest, compressed, buffer []byte) ([]byte, error) {
	if _, err := ParseDigest(string(digest)); err != nil {
		return nil, err
	}
	if len(compressed) > maxCompressedChunk {
		return nil, fmt.Errorf("chunk %s: %d compressed bytes, at most %d are allowed", digest, len(compressed), maxCompressedChunk)
	}
	// The frame states its size, so that a small frame that unpacks to
	// gigabytes is refused before any of it is unpacked.
	var header zstd.Header
	if err := header.Decode(compressed); err != nil {
		return nil, fmt.Errorf("chunk %s: decompress: %w", digest, err)
	}
	if header.Skippable || !header.HasFCS || header.FrameContentSize > MaxChunkSize {
		return nil, fmt.Errorf("chunk %s: decompress: no size, or more than %d bytes", digest, MaxChunkSize)
	}
	plain, err := s.chunks.DecodeAll(compressed, buffer[:0])
	if err != nil {
		return nil, fmt.Errorf("chunk %s: decompress: %w", digest, err)
	}
	if len(plain) > MaxChunkSize {
		return nil, fmt.Errorf("chunk %s: longer than %d bytes", digest, MaxChunkSize)
	}
	if got := DigestOf(plain); got != digest {
		return nil, &MismatchError{What: "chunk", Want: digest, Got: got}
	}
	return plain, nil
}

// readIncoming returns the proven plain bytes of a chunk that has arrived. One
// that does not hash to its name is removed, so that it is asked for again.
func (s *Store) readIncoming(ref ChunkRef, buffer []byte) ([]byte, error) {
	compressed, err := s.readFile(incomingDir, ref.Digest.Hex(), maxCompressedChunk)
	if err != nil {
		return nil, err
	}
	plain, err := s.openChunk(ref.Digest, compressed, buffer)
	if err == nil {
		return plain, ref.checkSize(int64(len(plain)))
	}
	if err := s.removeIncoming(ref.Digest); err != nil {
		return nil, err
	}
	return nil, fmt.Errorf("chunk %s: %w", ref.Digest, fs.ErrNotExist)
}

func (s *Store) removeIncoming(digests ...Digest) error {
	dir, err := s.openDir(incomingDir)
	if err != nil {
		return err
	}
	defer dir.Close()
	for _, digest := range digests {
		if err := dir.Remove(digest.Hex()); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("delete %s: %w", s.path(incomingDir, digest.Hex()), err)
		}
	}
	return nil
}

// checkSize fails where a manifest gives a chunk another length than it has.
func (c ChunkRef) checkSize(size int64) error {
	if size != c.Size {
		return fmt.Errorf("chunk %s is %d bytes long, its manifest says %d", c.Digest, size, c.Size)
	}
	return nil
}

// corruptBlobError says that a finished blob no longer holds what it should.
type corruptBlobError struct {
	blob  Digest
	chunk Digest
}

func (e *corruptBlobError) Error() string {
	return fmt.Sprintf("blob %s in the store is damaged at chunk %s", e.blob, e.chunk)
}

// readIndexed returns the proven plain bytes of a chunk inside of a blob.
// Open files are kept in files, since neighbours mostly share a blob.
func (s *Store) readIndexed(ref ChunkRef, at location, files map[Digest]*os.File, buffer []byte) ([]byte, error) {
	if err := ref.checkSize(at.size); err != nil {
		return nil, err
	}
	file := files[at.blob]
	if file == nil {
		opened, err := s.Open(at.blob)
		if err != nil {
			return nil, err
		}
		const mostOpen = 64
		if len(files) >= mostOpen {
			for digest, old := range files {
				_ = old.Close()
				delete(files, digest)
			}
		}
		files[at.blob], file = opened, opened
	}
	plain := buffer[:ref.Size]
	_, err := file.ReadAt(plain, at.offset)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("read blob %s: %w", at.blob, err)
	}
	if err != nil || DigestOf(plain) != ref.Digest {
		return nil, &corruptBlobError{blob: at.blob, chunk: ref.Digest}
	}
	return plain, nil
}
