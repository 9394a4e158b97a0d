package pull

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"syscall"

	"golang.org/x/sync/errgroup"

	"github.com/klauspost/compress/zstd"

	"github.com/nomad-site/site/internal/blob"
	"github.com/nomad-site/site/internal/writesession"
)

// maxRecord is the longest record that a host takes, unpacked: of a blob of about
// 30 GiB. Larger ones travel by SSH.
const maxRecord = 32 << 20

// pullBlob brings one blob that the store lacks.
func (p *Puller) pullBlob(ctx context.Context, digest blob.Digest) error {
	// Who waited for another flight of the same finds it done.
	if present, err := p.options.Store.Has(digest); err != nil || present {
		return err
	}
	record, err := p.record(ctx, digest)
	if err != nil {
		return err
	}
	for range maxRounds {
		if err := p.pullChunks(ctx, record); err != nil {
			return err
		}
		err := p.options.Store.Assemble(record.Manifest)
		var missing *blob.MissingChunksError
		switch {
		case err == nil:
			return nil
		case errors.As(err, &missing):
		case isDiskError(err):
			return err
		default: // chunks that are proven make another blob than the record says
			return &CorruptError{What: "blob " + string(digest), Err: err}
		}
	}
	return fmt.Errorf("blob %s: chunks are still missing after %d rounds: another process removes them, or the disk under %s is failing",
		digest, maxRounds, p.options.Store.Dir())
}

// record reads where a blob's chunks lie.
func (p *Puller) record(ctx context.Context, digest blob.Digest) (writesession.Record, error) {
	p.mutex.Lock()
	record, known := p.records[digest]
	delete(p.records, digest)
	p.mutex.Unlock()
	if known {
		return record, nil
	}
	what := "blob " + string(digest)
	// One at a time: they may be long.
	p.reading.Lock()
	defer p.reading.Unlock()
	stored, err := p.bucket.get(ctx, what, p.layout.Blob(digest), maxRecord)
	if err != nil {
		return writesession.Record{}, err
	}
	if record, err = parseRecord(stored, digest); err != nil {
		return writesession.Record{}, &CorruptError{What: what, Err: err}
	}
	return record, nil
}

// parseRecord refuses also what would be too long for a host.
func parseRecord(stored []byte, digest blob.Digest) (writesession.Record, error) {
	var header zstd.Header
	if err := header.Decode(stored); err != nil {
		return writesession.Record{}, fmt.Errorf("decompress: %w", err)
	}
	if !header.HasFCS || header.FrameContentSize > maxRecord {
		return writesession.Record{}, fmt.Errorf("its record is longer than the %d bytes that a host takes", maxRecord)
	}
	record, err := writesession.ParseRecord(stored)
	if err == nil && record.Manifest.Digest != digest {
		err = fmt.Errorf("its record is of %s", record.Manifest.Digest)
	}
	return record, err
}

func (p *Puller) missing(record writesession.Record) ([]blob.Digest, error) {
	all := make([]blob.Digest, len(record.Manifest.Chunks))
	for i, chunk := range record.Manifest.Chunks {
		all[i] = chunk.Digest
	}
	return p.options.Store.Missing(all)
}

// pullChunks brings those chunks of a blob that are nowhere in the store.
func (p *Puller) pullChunks(ctx context.Context, record writesession.Record) error {
	if err := p.makeRoom(ctx, record); err != nil {
		return err
	}
	// After room was made: chunks may have gone with it.
	missing, err := p.missing(record)
	if err != nil {
		return err
	}
	spans, err := spansOf(record, missing, p.options.Parallel)
	if err != nil {
		return &CorruptError{What: "blob " + string(record.Manifest.Digest), Err: err}
	}
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(p.options.Parallel)
	for _, each := range spans {
		if ctx.Err() != nil {
			break
		}
		group.Go(func() error { return p.pullSpan(ctx, record.Manifest.Digest, each) })
	}
	return group.Wait()
}

// makeRoom asks for what the blob takes while its chunks lie beside it.
func (p *Puller) makeRoom(ctx context.Context, record writesession.Record) error {
	if p.options.MakeRoom == nil {
		return nil
	}
	missing, err := p.missing(record)
	if err != nil {
		return err
	}
	return p.options.MakeRoom(ctx, record.Manifest.Size+compressedSize(record, missing))
}

func compressedSize(record writesession.Record, chunks []blob.Digest) int64 {
	wanted := make(map[blob.Digest]bool, len(chunks))
	for _, digest := range chunks {
		wanted[digest] = true
	}
	var sum int64
	for i, chunk := range record.Manifest.Chunks {
		if wanted[chunk.Digest] {
			delete(wanted, chunk.Digest)
			sum += record.Places[i].Length
		}
	}
	return sum
}

// pullSpan proves and keeps chunk by chunk, as they come. What was kept is not
// asked for again where the connection breaks.
func (p *Puller) pullSpan(ctx context.Context, of blob.Digest, span span) error {
	rest := span.pieces
	what := fmt.Sprintf("blob %s, pack %s", of, span.pack)
	next := func() (offset, length int64) {
		if len(rest) == 0 {
			return span.end(), 0
		}
		return rest[0].offset, span.end() - rest[0].offset
	}
	buffer := make([]byte, 0, writesession.MaxPackedChunk)
	err := p.bucket.read(ctx, what, p.layout.Pack(span.pack), next, func(body io.Reader) error {
		at := rest[0].offset
		for len(rest) > 0 {
			chunk := rest[0]
			if _, err := io.CopyN(io.Discard, body, chunk.offset-at); err != nil {
				return cutShort(err)
			}
			buffer = buffer[:chunk.length]
			if _, err := io.ReadFull(body, buffer); err != nil {
				return cutShort(err)
			}
			at = chunk.offset + chunk.length
			if err := p.keep(what, chunk, buffer); err != nil {
				return err
			}
			rest = rest[1:]
		}
		return nil
	})
	var gone *NotFoundError
	if errors.As(err, &gone) {
		// A blob whose pack is gone is not merely absent.
		return &CorruptError{What: what, Err: errors.New("the pack is gone")}
	}
	return err
}

func cutShort(err error) error {
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return &answerError{err: err}
}

// keep proves one chunk.
func (p *Puller) keep(what string, chunk piece, compressed []byte) error {
	err := p.options.Store.PutChunk(chunk.digest, compressed)
	switch {
	case err == nil:
		p.arrived(chunk)
		return nil
	case isDiskError(err):
		return err
	}
	return &CorruptError{What: what, Err: err}
}

// isDiskError tells what went wrong on the host from what came wrong.
func isDiskError(err error) bool {
	var full *blob.NoSpaceError
	var unsafe *blob.UnsafeEntryError
	var path *fs.PathError
	var link *os.LinkError
	var errno syscall.Errno
	return errors.As(err, &full) || errors.As(err, &unsafe) || errors.As(err, &path) || errors.As(err, &link) || errors.As(err, &errno)
}
