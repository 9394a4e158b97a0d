package blob

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"runtime"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sync/errgroup"
)

// maxRounds bounds how often damaged chunks are asked for again.
const maxRounds = 4

// Receive is the host's side of one transfer into store. It tells the sender
// about an error before it returns it. The caller closes rw afterwards: that is
// what wakes a sender who is still writing. Where rw is an io.Closer, it is
// closed when ctx ends.
func Receive(ctx context.Context, rw io.ReadWriter, store *Store) error {
	w, release := newWire(ctx, rw)
	defer release()
	err := receive(ctx, w, store)
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return fmt.Errorf("receive: %w", context.Cause(ctx))
	}
	var remote *RemoteError
	if !errors.As(err, &remote) && !errors.Is(err, io.ErrUnexpectedEOF) {
		// The sender may be gone; then there is nobody to tell.
		_ = w.send(frameError, remoteOf(err), nil)
	}
	return fmt.Errorf("receive: %w", err)
}

// reception is what one transfer has agreed on so far.
type reception struct {
	wire      *wire
	store     *Store
	offer     offerMessage
	lack      lackMessage
	manifests []Manifest
	sizes     map[rawDigest]int64
	chunks    int
}

func receive(ctx context.Context, w *wire, store *Store) error {
	mode, err := greet(w)
	if err != nil {
		return err
	}
	r := &reception{wire: w, store: store, sizes: map[rawDigest]int64{}}
	if err := r.readOffer(); err != nil {
		return err
	}
	if err := r.readManifests(); err != nil {
		return err
	}
	need, err := r.missing()
	if err != nil {
		return err
	}
	if mode == modeProbe {
		return w.send(frameNeed, nil, packDigests(need))
	}
	for round := 0; ; round++ {
		if round == maxRounds {
			return fmt.Errorf("chunks are still missing after %d rounds: the disk under %s is failing", round, store.Dir())
		}
		if err := w.send(frameNeed, nil, packDigests(need)); err != nil {
			return err
		}
		if err := r.readChunks(ctx, need); err != nil {
			return err
		}
		if need, err = r.assemble(ctx); err != nil {
			return err
		}
		if len(need) == 0 {
			break
		}
	}
	if err := r.publish(); err != nil {
		return err
	}
	return w.send(frameDone, doneMessage{Blobs: len(r.manifests), Chunks: r.chunks, Names: len(r.lack.Names)}, nil)
}

func greet(w *wire) (mode string, err error) {
	if err := w.readMagic(); err != nil {
		return "", cutShort(err)
	}
	f, err := w.expect(frameHello)
	if err != nil {
		return "", err
	}
	var hello helloMessage
	if err := f.decode(&hello); err != nil {
		return "", err
	}
	if err := w.writeMagic(); err != nil {
		return "", err
	}
	if err := w.send(frameHello, helloMessage{Protocol: protocolVersion}, nil); err != nil {
		return "", err
	}
	if hello.Protocol != protocolVersion {
		return "", &VersionError{Host: protocolVersion, Sender: hello.Protocol}
	}
	if hello.Mode != modeSend && hello.Mode != modeProbe {
		return "", violation("unknown mode %q", hello.Mode)
	}
	return hello.Mode, nil
}

func (r *reception) readOffer() error {
	f, err := r.wire.expect(frameOffer)
	if err != nil {
		return err
	}
	if err := strictJSON(f.payload, &r.offer); err != nil {
		return err
	}
	if len(r.offer.Blobs) > mostOffered || len(r.offer.Names) > mostOffered {
		return violation("%d blobs and %d names are too many", len(r.offer.Blobs), len(r.offer.Names))
	}
	r.lack = lackMessage{Blobs: []int{}, Names: []int{}}
	seen := map[Digest]bool{}
	for i, b := range r.offer.Blobs {
		if !b.Digest.Valid() || b.Size < 0 || b.Size > MaxBlobSize || seen[b.Digest] {
			return violation("blob %.100q of %d bytes cannot be offered", b.Digest, b.Size)
		}
		seen[b.Digest] = true
		present, err := r.store.Has(b.Digest)
		if err != nil {
			return &locatedError{err: err, blob: b.Digest}
		}
		if !present {
			r.lack.Blobs = append(r.lack.Blobs, i)
		}
	}
	for i := range r.offer.Names {
		name := r.name(i)
		if err := name.Validate(); err != nil {
			return violation("%v", err)
		}
		published, err := r.store.publishedAs(name)
		if err != nil {
			return &locatedError{err: err, name: name.String()}
		}
		if !published {
			r.lack.Names = append(r.lack.Names, i)
		}
	}
	payload, err := json.Marshal(r.lack)
	if err != nil {
		return err
	}
	return r.wire.send(frameLack, nil, payload)
}

func (r *reception) name(i int) Name {
	offered := r.offer.Names[i]
	name := offered.Name
	name.Site, name.Artifact = offered.Site, offered.Artifact
	return name
}

func (r *reception) readManifests() error {
	decoder, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1),
		zstd.WithDecoderMaxMemory(MaxManifestBytes), zstd.WithDecoderMaxWindow(MaxManifestBytes))
	if err != nil {
		return err
	}
	defer decoder.Close()
	for _, i := range r.lack.Blobs {
		want := r.offer.Blobs[i]
		f, err := r.wire.expect(frameManifest)
		if err != nil {
			return err
		}
		plain, err := decoder.DecodeAll(f.payload, nil)
		if err != nil {
			return &locatedError{err: violation("manifest: decompress: %v", err), blob: want.Digest}
		}
		manifest, err := ParseManifest(plain)
		if err != nil {
			return &locatedError{err: violation("%v", err), blob: want.Digest}
		}
		if manifest.Digest != want.Digest || manifest.Size != want.Size {
			return &locatedError{err: violation("the manifest is of %s, %d bytes", manifest.Digest, manifest.Size), blob: want.Digest}
		}
		for _, c := range manifest.Chunks {
			raw := c.Digest.raw()
			if size, known := r.sizes[raw]; known && size != c.Size {
				return &locatedError{err: violation("chunk %s has two sizes", c.Digest), blob: want.Digest}
			}
			r.sizes[raw] = c.Size
		}
		r.manifests = append(r.manifests, manifest)
	}
	_, err = r.wire.expect(frameReady)
	return err
}

func (r *reception) missing() ([]Digest, error) {
	var all []Digest
	for _, manifest := range r.manifests {
		for _, c := range manifest.Chunks {
			all = append(all, c.Digest)
		}
	}
	return r.store.Missing(all)
}

// readChunks takes exactly the chunks of need, in any order.
func (r *reception) readChunks(ctx context.Context, need []Digest) error {
	awaited := make(map[rawDigest]bool, len(need))
	for _, digest := range need {
		awaited[digest.raw()] = true
	}
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(min(4, runtime.GOMAXPROCS(0)))
	err := r.spreadChunks(ctx, group, awaited)
	// A worker's error is the cause where both failed.
	if workerErr := group.Wait(); workerErr != nil {
		return workerErr
	}
	return err
}

func (r *reception) spreadChunks(ctx context.Context, group *errgroup.Group, awaited map[rawDigest]bool) error {
	for {
		f, err := r.wire.next()
		if err != nil {
			return err
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if f.kind == frameEnd {
			break
		}
		if f.kind != frameChunk {
			return violation("got message %d, want a chunk", f.kind)
		}
		var header chunkMessage
		if err := f.decode(&header); err != nil {
			return err
		}
		if !header.Digest.Valid() || !awaited[header.Digest.raw()] {
			return violation("chunk %.100q was not asked for", header.Digest)
		}
		delete(awaited, header.Digest.raw())
		r.chunks++
		group.Go(func() error {
			if err := r.store.PutChunk(header.Digest, f.payload); err != nil {
				return &locatedError{err: err, blob: r.blobOf(header.Digest), chunk: header.Digest}
			}
			return nil
		})
	}
	if len(awaited) > 0 {
		return violation("%d chunks were asked for and did not come", len(awaited))
	}
	return nil
}

// blobOf finds a blob to which a chunk belongs, for a message.
func (r *reception) blobOf(chunk Digest) Digest {
	for _, manifest := range r.manifests {
		for _, c := range manifest.Chunks {
			if c.Digest == chunk {
				return manifest.Digest
			}
		}
	}
	return ""
}

// assemble finishes the blobs and returns the chunks that have to be sent again.
func (r *reception) assemble(ctx context.Context) ([]Digest, error) {
	again := false
	for _, manifest := range r.manifests {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		err := r.store.Assemble(manifest)
		var missing *MissingChunksError
		switch {
		case errors.As(err, &missing):
			again = true
		case err != nil:
			return nil, &locatedError{err: err, blob: manifest.Digest}
		}
	}
	if !again {
		return nil, nil
	}
	need, err := r.missing()
	if err == nil && len(need) == 0 {
		err = fmt.Errorf("a chunk was damaged and is there again: another process changes %s", r.store.Dir())
	}
	return need, err
}

func (r *reception) publish() error {
	for _, i := range r.lack.Names {
		name := r.name(i)
		if err := r.store.PutName(name); err != nil {
			return &locatedError{err: err, name: name.Site + "/" + name.Artifact}
		}
	}
	return nil
}
