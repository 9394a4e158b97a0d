// Package blob moves and keeps content-addressed bytes: it cuts blobs into
// chunks, keeps whole blobs in a store, and sends only the chunks that a store
// lacks. Whoever receives hashes again; nothing is visible under a digest
// before its bytes were proven.
package blob

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"

	chunkers "github.com/PlakarKorp/go-cdc-chunkers"
	_ "github.com/PlakarKorp/go-cdc-chunkers/chunkers/fastcdc" // registers the algorithm named below
)

// The cut points must be the same in every version of the program, or nothing
// would dedupe after an update: never change these. They were measured, see
// docs/decisions/0001-chunks.md: around 128 KiB new chunks and the chunk list
// are the fewest bytes together.
const (
	chunkAlgorithm = "fastcdc-v1.0.0"
	MinChunkSize   = 32 << 10
	AvgChunkSize   = 128 << 10
	MaxChunkSize   = 512 << 10
)

// Chunk reads r to its end and returns its manifest. Memory is a small buffer
// and about 80 bytes for each chunk.
func Chunk(r io.Reader) (Manifest, error) {
	manifest := Manifest{Version: ManifestVersion, Chunks: []ChunkRef{}}
	whole := sha256.New()
	err := eachChunk(r, func(content []byte) error {
		if len(manifest.Chunks) == MaxChunks || manifest.Size+int64(len(content)) > MaxBlobSize {
			return fmt.Errorf("larger than %d bytes", int64(MaxBlobSize))
		}
		whole.Write(content)
		manifest.Size += int64(len(content))
		manifest.Chunks = append(manifest.Chunks, ChunkRef{Digest: DigestOf(content), Size: int64(len(content))})
		return nil
	})
	if err != nil {
		return Manifest{}, fmt.Errorf("chunk: %w", err)
	}
	manifest.Digest = digestOfSum(sum(whole.Sum(nil)))
	return manifest, nil
}

// ChunkSource chunks source and insists on its digest and size.
func ChunkSource(source Source) (Manifest, error) {
	reader, err := source.Open()
	if err != nil {
		return Manifest{}, err
	}
	defer reader.Close()
	manifest, err := Chunk(io.NewSectionReader(reader, 0, MaxBlobSize+1))
	if err != nil {
		return Manifest{}, fmt.Errorf("%s: %w", source.Name(), err)
	}
	if manifest.Digest != source.Digest() {
		return Manifest{}, &MismatchError{What: source.Name(), Want: source.Digest(), Got: manifest.Digest}
	}
	return manifest, nil
}

// eachChunk calls use with each chunk of r; the slice is only valid during the call.
func eachChunk(r io.Reader, use func([]byte) error) error {
	chunker, err := chunkers.NewChunker(chunkAlgorithm, r, &chunkers.ChunkerOpts{
		MinSize: MinChunkSize, NormalSize: AvgChunkSize, MaxSize: MaxChunkSize,
	})
	if err != nil {
		return err
	}
	for {
		content, err := chunker.Next()
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		if len(content) > 0 {
			if err := use(content); err != nil {
				return err
			}
		}
		if err != nil {
			return nil
		}
	}
}
