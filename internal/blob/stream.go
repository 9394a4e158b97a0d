package blob

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"

	"golang.org/x/sync/errgroup"
)

// receiveNeed reads which chunks the host asks for.
func (s *sending) receiveNeed(ctx context.Context) ([]rawDigest, error) {
	f, err := s.await(ctx, frameNeed)
	if err != nil {
		return nil, err
	}
	return s.parseNeed(f)
}

func (s *sending) parseNeed(f frame) ([]rawDigest, error) {
	need, err := unpackDigests(f.payload)
	if err != nil {
		return nil, err
	}
	for _, raw := range need {
		if _, known := s.chunks[raw]; !known {
			return nil, violation("the host asks for chunk %s, which is in no offered blob", raw.digest())
		}
	}
	return need, nil
}

// transfer sends what the host asks for until it says done.
func (s *sending) transfer(ctx context.Context, options SendOptions) (Result, error) {
	var result Result
	for first := true; ; first = false {
		f, err := s.await(ctx, frameNeed, frameDone)
		if err != nil {
			return s.counted(result), err
		}
		if f.kind == frameDone {
			var done doneMessage
			if err := f.decode(&done); err != nil {
				return s.counted(result), err
			}
			result.Blobs, result.Names = done.Blobs, done.Names
			return s.counted(result), nil
		}
		need, err := s.parseNeed(f)
		if err != nil {
			return s.counted(result), err
		}
		total := result.BytesPlain
		for _, raw := range need {
			total += s.chunks[raw].size
		}
		if first {
			result.ChunksDeduped, result.BytesDeduped = s.count-len(need), s.total-total
		}
		if err := s.stream(ctx, need, &result, total, options); err != nil {
			return s.counted(result), err
		}
	}
}

func (s *sending) counted(result Result) Result {
	result.BytesWire = s.wire.written
	return result
}

// job is one chunk on its way from the source to the wire.
type job struct {
	digest rawDigest
	at     sourceChunk
	plain  []byte
	packed []byte
	ready  chan struct{}
}

// stream reads chunks in order, proves and compresses them on several workers,
// and writes them in order. At most a few chunks for each worker are in memory.
func (s *sending) stream(ctx context.Context, need []rawDigest, result *Result, total int64, options SendOptions) error {
	workers := options.Workers
	if workers <= 0 {
		workers = min(4, runtime.GOMAXPROCS(0))
	}
	packer, err := NewPacker(workers)
	if err != nil {
		return &localError{err}
	}
	defer packer.Close()

	group, ctx := errgroup.WithContext(ctx)
	free := make(chan *job, 3*workers)
	for range cap(free) {
		free <- &job{}
	}
	work := make(chan *job, cap(free))
	ordered := make(chan *job, cap(free))
	group.Go(func() error {
		defer close(work)
		defer close(ordered)
		return s.readSources(ctx, need, free, work, ordered)
	})
	for range workers {
		group.Go(func() error {
			for j := range work {
				if err := s.pack(packer, j); err != nil {
					return err
				}
			}
			return nil
		})
	}
	group.Go(func() error { return s.writeChunks(ctx, ordered, free, result, total, options.Progress) })
	if err := group.Wait(); err != nil {
		return err
	}
	return s.wire.send(frameEnd, nil, nil)
}

func (s *sending) readSources(ctx context.Context, need []rawDigest, free, work, ordered chan *job) error {
	opened := -1
	var reader SourceReader
	defer func() {
		if reader != nil {
			_ = reader.Close()
		}
	}()
	for _, raw := range need {
		var j *job
		select {
		case j = <-free:
		case <-ctx.Done():
			return ctx.Err()
		}
		at := s.chunks[raw]
		source := s.offer.Blobs[at.blob].Source
		if at.blob != opened {
			if reader != nil {
				_ = reader.Close()
			}
			var err error
			if reader, err = source.Open(); err != nil {
				return &localError{fmt.Errorf("open %s: %w", source.Name(), err)}
			}
			opened = at.blob
		}
		if int64(cap(j.plain)) < at.size {
			j.plain = make([]byte, MaxChunkSize)
		}
		j.digest, j.at, j.plain, j.ready = raw, at, j.plain[:at.size], make(chan struct{})
		n, err := reader.ReadAt(j.plain, at.offset)
		if n < len(j.plain) {
			if errors.Is(err, io.EOF) {
				return s.changed(j, io.ErrUnexpectedEOF)
			}
			return &localError{fmt.Errorf("read %s: %w", source.Name(), err)}
		}
		// Both channels hold all jobs there are: neither send blocks.
		work <- j
		ordered <- j
	}
	return nil
}

func (s *sending) changed(j *job, err error) error {
	source := s.offer.Blobs[j.at.blob].Source
	return &SourceChangedError{Source: source.Name(), Blob: source.Digest(), Chunk: j.digest.digest(), Err: err}
}

// pack proves a chunk before it compresses it.
func (s *sending) pack(packer *Packer, j *job) error {
	var err error
	if j.packed, err = packer.Pack(j.digest.digest(), j.plain, j.packed[:0]); err != nil {
		return s.changed(j, err)
	}
	close(j.ready)
	return nil
}

func (s *sending) writeChunks(ctx context.Context, ordered, free chan *job, result *Result, total int64, progress func(done, total int64)) error {
	if progress != nil {
		progress(result.BytesPlain, total)
	}
	for j := range ordered {
		select {
		case <-j.ready:
		case <-s.failed:
			return s.failure
		case <-ctx.Done():
			return ctx.Err()
		}
		// The host may have given up while this side was writing.
		select {
		case <-s.failed:
			return s.failure
		default:
		}
		if err := s.wire.write(frameChunk, chunkMessage{Digest: j.digest.digest()}, j.packed); err != nil {
			return err
		}
		result.Chunks++
		result.BytesPlain += j.at.size
		free <- j
		if progress != nil {
			progress(result.BytesPlain, total)
		}
	}
	return nil
}
