package server

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sync/errgroup"

	"github.com/nomad-site/site/internal/blob"
	"github.com/nomad-site/site/internal/writesession"
)

// proof is a pack whose bytes were read back and are what the request says.
type proof struct {
	pack writesession.Pack
	// from is where it was read, and etag which version of that. Empty for one
	// whose chunks were all proven before.
	from, etag string
}

// prove reads back the packs of a request. What is wrong with them are problems;
// an error is that nobody can tell.
func (s *Server) prove(ctx context.Context, id string, packs []writesession.Pack) ([]proof, []writesession.ObjectProblem, error) {
	proofs := make([]proof, len(packs))
	problems := make([]*writesession.ObjectProblem, len(packs))
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(parallelPacks)
	for i, pack := range packs {
		group.Go(func() error {
			if err := s.proving.Acquire(ctx, 1); err != nil {
				return err
			}
			defer s.proving.Release(1)
			proven, wrong, err := s.provePack(ctx, id, pack)
			if err != nil {
				return err
			}
			if wrong != "" {
				problems[i] = &writesession.ObjectProblem{Name: string(pack.Digest), Detail: wrong}
			}
			proofs[i] = proven
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return nil, nil, err
	}
	var found []writesession.ObjectProblem
	for _, problem := range problems {
		if problem != nil {
			found = append(found, *problem)
		}
	}
	return proofs, found, nil
}

// provePack says what is wrong with one pack; empty where it is proven.
func (s *Server) provePack(ctx context.Context, id string, pack writesession.Pack) (proof, string, error) {
	if s.provenBefore(pack) {
		return proof{pack: pack}, "", nil
	}
	keys := []string{s.layout.Staged(id, pack.Digest)}
	if _, there := s.index.pack(pack.Digest); there {
		keys = append([]string{s.layout.Pack(pack.Digest)}, keys...)
	}
	wrong := "it was not uploaded"
	for _, key := range keys {
		checked, err := s.readBack(ctx, key, pack)
		if errors.Is(err, writesession.ErrNotFound) {
			continue
		}
		if err != nil {
			return proof{}, "", err
		}
		if checked.stored == "" && checked.claim == "" {
			return proof{pack: pack, from: key, etag: checked.etag}, "", nil
		}
		if checked.stored == "" { // these are the bytes, and the request is wrong about them
			return proof{}, checked.claim, nil
		}
		// Nobody needs an object that is not what its key says: it is in the way of the next try.
		wrong = checked.stored
		s.log.Warn("stored bytes are not what they should be; removing them", "key", key, "wrong", wrong)
		if err := s.bucket.Delete(ctx, key); err != nil {
			return proof{}, "", err
		}
	}
	return proof{}, wrong, nil
}

// provenBefore: all chunks are known to lie exactly there.
func (s *Server) provenBefore(pack writesession.Pack) bool {
	size, there := s.index.pack(pack.Digest)
	if !there || size != pack.Size {
		return false
	}
	for _, chunk := range pack.Chunks {
		at, known := s.index.chunk(chunk.Digest)
		if !known || at != (place{pack: pack.Digest, offset: chunk.Offset, length: chunk.Length, size: chunk.Size}) {
			return false
		}
	}
	return true
}

// checked is what reading an object back found.
type checked struct {
	etag string
	// stored says why the object is not what its key says; claim why it does not
	// hold the chunks that the request says it holds.
	stored, claim string
}

// readBack reads an object, once more where the stream broke.
func (s *Server) readBack(ctx context.Context, key string, pack writesession.Pack) (checked, error) {
	found, err := s.readBackOnce(ctx, key, pack)
	var unavailable *writesession.UnavailableError
	if errors.As(err, &unavailable) && ctx.Err() == nil {
		found, err = s.readBackOnce(ctx, key, pack)
	}
	return found, err
}

func (s *Server) readBackOnce(ctx context.Context, key string, pack writesession.Pack) (checked, error) {
	reader, info, err := s.bucket.Get(ctx, key, 0, 0)
	if err != nil {
		return checked{}, err
	}
	defer reader.Close()
	if info.Size != pack.Size {
		return checked{stored: fmt.Sprintf("%d bytes are stored, and not %d", info.Size, pack.Size)}, nil
	}
	opener, err := newChunkOpener()
	if err != nil {
		return checked{}, err
	}
	defer opener.close()
	digest, claim, err := opener.check(reader, pack)
	if err != nil {
		return checked{}, broken("read "+key, err)
	}
	s.metrics.readBack.Add(float64(pack.Size))
	out := checked{etag: info.ETag, claim: claim}
	if digest != pack.Digest {
		out.stored = fmt.Sprintf("the stored bytes have digest %s", digest)
	}
	return out, nil
}

// chunkOpener unpacks one chunk after the other in two buffers.
type chunkOpener struct {
	decoder       *zstd.Decoder
	packed, plain []byte
}

func newChunkOpener() (*chunkOpener, error) {
	decoder, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
		zstd.WithDecoderMaxMemory(blob.MaxChunkSize))
	if err != nil {
		return nil, fmt.Errorf("make a decompressor: %w", err)
	}
	return &chunkOpener{decoder: decoder}, nil
}

func (o *chunkOpener) close() { o.decoder.Close() }

// check reads all of a pack whose chunks fill it. claim says which chunk is not
// what it should be; the digest is of all bytes in any case.
func (o *chunkOpener) check(reader io.Reader, pack writesession.Pack) (digest blob.Digest, claim string, err error) {
	stored := sha256.New()
	for i, chunk := range pack.Chunks {
		if int64(cap(o.packed)) < chunk.Length {
			o.packed = make([]byte, writesession.MaxPackedChunk)
		}
		o.packed = o.packed[:chunk.Length]
		if _, err := io.ReadFull(reader, o.packed); err != nil {
			return "", "", fmt.Errorf("chunk %d: %w", i, err)
		}
		stored.Write(o.packed)
		if claim != "" {
			continue
		}
		if err := o.open(chunk); err != nil {
			claim = fmt.Sprintf("chunk %d, %s: %s", i, chunk.Digest, err)
		}
	}
	if more, err := io.Copy(stored, reader); err != nil || more > 0 {
		return "", "", errors.Join(fmt.Errorf("%d bytes behind its end", more), err)
	}
	return sumOf(stored), claim, nil
}

func sumOf(stored hash.Hash) blob.Digest { return raw(stored.Sum(nil)).digest() }

// open proves one chunk by the rules of blob's store, which will get it from here.
func (o *chunkOpener) open(chunk writesession.PackedChunk) error {
	var header zstd.Header
	if err := header.Decode(o.packed); err != nil {
		return fmt.Errorf("decompress: %w", err)
	}
	if header.Skippable || !header.HasFCS || header.FrameContentSize != uint64(chunk.Size) {
		return fmt.Errorf("decompress: the frame does not state %d bytes", chunk.Size)
	}
	plain, err := o.decoder.DecodeAll(o.packed, o.plain[:0])
	if err != nil {
		return fmt.Errorf("decompress: %w", err)
	}
	o.plain = plain
	if int64(len(plain)) != chunk.Size {
		return fmt.Errorf("it has %d bytes, and not %d", len(plain), chunk.Size)
	}
	return chunk.Digest.Check(plain)
}
