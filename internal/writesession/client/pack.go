package client

import (
	"context"
	"errors"
	"io"
	"runtime"

	"golang.org/x/sync/errgroup"

	"github.com/nomad-site/site/internal/blob"
	"github.com/nomad-site/site/internal/writesession"
)

// PackSize is what a pack grows to. It was measured, see docs/decisions: larger
// ones save no request that matters, and cost memory and what a retry sends again.
const PackSize = 8 << 20

// job is one chunk on its way from the source into a pack.
type job struct {
	part   part
	plain  []byte
	packed []byte
	ready  chan struct{}
}

// pack is a pack that is filled or uploaded.
type pack struct {
	content []byte
	chunks  []writesession.PackedChunk
	plain   int64
	// number is its place among the packs of the session.
	number int
}

// pipeline reads chunks in order, proves and compresses them on several workers,
// lays them into packs in order, and uploads those. What is in memory is a few
// chunks for each worker, and one pack for each upload and one that is filled.
type pipeline struct {
	*pushing
	packer *blob.Packer
	// jobs and packs that nobody uses.
	free  chan *job
	empty chan *pack
	// work is to be compressed, ordered has the same in the order of the packs.
	work, ordered chan *job
	full          chan *pack
	// room is what a pack needs at first.
	room int
}

// upload brings all chunks that the store lacks into packs of the session. The
// same chunks give the same packs, so that a Push that was cut off finds its own.
func (p *pushing) upload(ctx context.Context) error {
	if len(p.parts.need) == 0 {
		return nil
	}
	compressors := min(4, runtime.GOMAXPROCS(0))
	packer, err := blob.NewPacker(compressors)
	if err != nil {
		return err
	}
	defer packer.Close()
	group, ctx := errgroup.WithContext(ctx)
	line := newPipeline(p, packer, compressors)
	group.Go(func() error { return line.read(ctx) })
	for range compressors {
		group.Go(line.compress)
	}
	group.Go(func() error { return line.lay(ctx) })
	for range p.workers {
		group.Go(func() error { return line.send(ctx) })
	}
	return group.Wait()
}

func newPipeline(p *pushing, packer *blob.Packer, compressors int) *pipeline {
	line := &pipeline{
		pushing: p, packer: packer,
		free: make(chan *job, 3*compressors), empty: make(chan *pack, p.workers+1),
		work: make(chan *job, 3*compressors), ordered: make(chan *job, 3*compressors),
		full: make(chan *pack),
	}
	var plain int64
	for _, one := range p.parts.need {
		plain += one.size
	}
	line.room = int(min(int64(p.client.packSize), plain))
	for range cap(line.free) {
		line.free <- &job{}
	}
	for range cap(line.empty) {
		line.empty <- &pack{}
	}
	return line
}

func (l *pipeline) read(ctx context.Context) error {
	defer close(l.work)
	defer close(l.ordered)
	opened := -1
	var reader blob.SourceReader
	defer func() {
		if reader != nil {
			_ = reader.Close()
		}
	}()
	for _, one := range l.parts.need {
		var j *job
		select {
		case j = <-l.free:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		if one.blob != opened {
			if reader != nil {
				_ = reader.Close()
			}
			var err error
			if reader, err = one.source.Open(); err != nil {
				return localError("open", one.source.Name(), err)
			}
			opened = one.blob
		}
		if int64(cap(j.plain)) < one.size {
			j.plain = make([]byte, blob.MaxChunkSize)
		}
		j.part, j.plain, j.ready = one, j.plain[:one.size], make(chan struct{})
		if n, err := reader.ReadAt(j.plain, one.offset); n < len(j.plain) {
			if errors.Is(err, io.EOF) {
				return changed(one, io.ErrUnexpectedEOF)
			}
			return localError("read", one.source.Name(), err)
		}
		// Both channels hold all jobs there are: neither send blocks.
		l.work <- j
		l.ordered <- j
	}
	return nil
}

func changed(one part, err error) error {
	return &blob.SourceChangedError{Source: one.source.Name(), Blob: one.source.Digest(), Chunk: one.digest, Err: err}
}

func (l *pipeline) compress() error {
	for j := range l.work {
		var err error
		if j.packed, err = l.packer.Pack(j.part.digest, j.plain, j.packed[:0]); err != nil {
			return changed(j.part, err)
		}
		close(j.ready)
	}
	return nil
}

// lay fills packs, and hands each on when the next chunk would make it too large.
func (l *pipeline) lay(ctx context.Context) error {
	defer close(l.full)
	var filling *pack
	number := 0
	for j := range l.ordered {
		select {
		case <-j.ready:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		if filling != nil && len(filling.content)+len(j.packed) > l.client.packSize {
			if err := l.hand(ctx, filling); err != nil {
				return err
			}
			filling = nil
		}
		if filling == nil {
			select {
			case filling = <-l.empty:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
			filling.reset(number, l.room)
			number++
		}
		filling.add(j)
		l.free <- j
	}
	if filling == nil {
		return nil
	}
	return l.hand(ctx, filling)
}

func (l *pipeline) hand(ctx context.Context, filled *pack) error {
	select {
	case l.full <- filled:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (p *pack) reset(number, room int) {
	if p.content == nil {
		p.content = make([]byte, 0, room) // growing would take twice the memory
	}
	p.content, p.chunks, p.plain, p.number = p.content[:0], nil, 0, number
}

func (p *pack) add(j *job) {
	p.chunks = append(p.chunks, writesession.PackedChunk{
		Digest: j.part.digest, Size: j.part.size, Offset: int64(len(p.content)), Length: int64(len(j.packed)),
	})
	p.content = append(p.content, j.packed...)
	p.plain += j.part.size
}

// send uploads packs until there are no more.
func (l *pipeline) send(ctx context.Context) error {
	for filled := range l.full {
		digest := blob.DigestOf(filled.content)
		if err := l.bring(ctx, filled, digest); err != nil {
			return err
		}
		l.keep(filled, digest)
		l.empty <- filled
	}
	return nil
}

// keep notes what is in an uploaded pack, for the request that completes.
func (l *pipeline) keep(filled *pack, digest blob.Digest) {
	l.count.change(func(*PushResult) {
		for len(l.packs) <= filled.number {
			l.packs = append(l.packs, writesession.Pack{})
		}
		l.packs[filled.number] = writesession.Pack{Digest: digest, Size: int64(len(filled.content)), Chunks: filled.chunks}
	})
}
