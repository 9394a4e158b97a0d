package blob

import (
	"fmt"

	"github.com/klauspost/compress/zstd"
)

// MaxPackedChunk bounds a compressed chunk; PutChunk takes no longer one.
const MaxPackedChunk = maxCompressedChunk

// Packer compresses chunks as Send does, in the one form that PutChunk takes: a
// zstd frame that states its size. It may be used by several goroutines at once.
type Packer struct{ encoder *zstd.Encoder }

// NewPacker makes one that compresses up to workers chunks at the same time.
func NewPacker(workers int) (*Packer, error) {
	// A window beyond a chunk finds nothing more, and each worker has two of them.
	encoder, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(workers), zstd.WithSingleSegment(true), zstd.WithWindowSize(MaxChunkSize))
	if err != nil {
		return nil, fmt.Errorf("compressor for chunks: %w", err)
	}
	return &Packer{encoder: encoder}, nil
}

// Pack proves that plain is the chunk with digest, and appends its compressed
// form to out.
func (p *Packer) Pack(digest Digest, plain, out []byte) ([]byte, error) {
	if err := digest.Check(plain); err != nil {
		return out, err
	}
	return p.encoder.EncodeAll(plain, out), nil
}

// Close frees what the packer holds.
func (p *Packer) Close() { _ = p.encoder.Close() }
