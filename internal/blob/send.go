package blob

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/klauspost/compress/zstd"
)

// Offer is what a host shall have.
type Offer struct {
	Blobs []Offered
	// Names are published when all blobs are there. Their blobs are offered
	// too, or are on the host already.
	Names []Name
}

// Offered is one blob of an offer.
type Offered struct {
	Source Source
	// Manifest gives the chunk list, where the caller keeps it. It is only
	// called for a blob that the host lacks. Nil: the source is chunked.
	Manifest func() (Manifest, error)
}

// SendOptions may be left zero.
type SendOptions struct {
	// Progress is called with plain bytes, from one goroutine.
	Progress func(done, total int64)
	// Workers compress at the same time; 0 is one for each processor, at most 4.
	Workers int
}

// Result says what a Send has done.
type Result struct {
	// Blobs is how many the host lacked, Names how many were published.
	Blobs, Names int
	// Chunks were sent; ChunksDeduped of the lacking blobs were on the host already.
	Chunks, ChunksDeduped int
	// BytesPlain is the length of the chunks sent, before compression;
	// BytesDeduped of those that did not have to be sent.
	BytesPlain, BytesDeduped int64
	// BytesWire is all that was written, manifests and framing included.
	BytesWire int64
}

// Report says what a Send would do.
type Report struct {
	// Blobs are lacking, Names are not published as offered.
	Blobs []Digest
	Names []Name
	// Chunks would travel: BytesToSend before compression, of BytesTotal that
	// the lacking blobs hold.
	Chunks      int
	BytesToSend int64
	BytesTotal  int64
	// BytesOf says how much of BytesToSend is for which lacking blob. A chunk
	// that several have counts for the first.
	BytesOf map[Digest]int64
}

// Empty reports that the host has all of the offer.
func (r Report) Empty() bool { return len(r.Blobs) == 0 && len(r.Names) == 0 }

// Send brings the offer to the host that runs Receive behind rw. Where rw is an
// io.Closer, it is closed on an error or when ctx ends, since nothing else
// wakes a blocked read. What a cut connection has carried is kept by the host:
// calling Send again goes on from there.
func Send(ctx context.Context, rw io.ReadWriter, offer Offer, options SendOptions) (Result, error) {
	s, finish, err := begin(ctx, rw, offer, modeSend)
	if err != nil {
		return Result{}, finish(err)
	}
	result, err := s.transfer(ctx, options)
	return result, finish(err)
}

// Missing asks the host what of the offer it lacks; it writes nothing there.
func Missing(ctx context.Context, rw io.ReadWriter, offer Offer) (Report, error) {
	s, finish, err := begin(ctx, rw, offer, modeProbe)
	if err != nil {
		return Report{}, finish(err)
	}
	need, err := s.receiveNeed(ctx)
	if err != nil {
		return Report{}, finish(err)
	}
	report := Report{Chunks: len(need), BytesTotal: s.total, BytesOf: map[Digest]int64{}}
	for _, i := range s.lack.Blobs {
		report.Blobs = append(report.Blobs, s.offer.Blobs[i].Source.Digest())
	}
	for _, i := range s.lack.Names {
		report.Names = append(report.Names, s.offer.Names[i])
	}
	for _, raw := range need {
		at := s.chunks[raw]
		report.BytesToSend += at.size
		report.BytesOf[s.offer.Blobs[at.blob].Source.Digest()] += at.size
	}
	return report, finish(nil)
}

// sourceChunk is where the sender finds a chunk.
type sourceChunk struct {
	blob   int
	offset int64
	size   int64
}

// manifestWindow is ample for lists of digests, in which nothing comes twice.
const manifestWindow = 256 << 10

type sending struct {
	wire   *wire
	offer  Offer
	lack   lackMessage
	chunks map[rawDigest]sourceChunk
	// total and count are the plain bytes and the chunks of all lacking blobs.
	total int64
	count int

	frames chan frame
	// failed is closed after failure was set: the host will say nothing more.
	failed  chan struct{}
	failure error
	// quit ends listen where nobody awaits its messages any more.
	quit chan struct{}
}

// begin opens the conversation up to the point where the host says what chunks
// it needs. The caller calls finish exactly once, with the error it ended with.
func begin(ctx context.Context, rw io.ReadWriter, offer Offer, mode string) (*sending, func(error) error, error) {
	w, release := newWire(ctx, rw)
	offer.Blobs = distinct(offer.Blobs)
	s := &sending{
		wire: w, offer: offer, chunks: map[rawDigest]sourceChunk{},
		frames: make(chan frame, 1), failed: make(chan struct{}), quit: make(chan struct{}),
	}
	go s.listen(mode)
	finish := func(err error) error {
		defer release()
		defer close(s.quit)
		if err == nil {
			return nil
		}
		return s.explain(ctx, err)
	}
	return s, finish, s.open(ctx, mode)
}

func distinct(blobs []Offered) []Offered {
	seen := map[Digest]bool{}
	var out []Offered
	for _, b := range blobs {
		if !seen[b.Source.Digest()] {
			seen[b.Source.Digest()] = true
			out = append(out, b)
		}
	}
	return out
}

// listen owns the reading side until the last message of the host or an error.
func (s *sending) listen(mode string) {
	defer close(s.failed)
	if s.failure = cutShort(s.wire.readMagic()); s.failure != nil {
		return
	}
	for {
		f, err := s.wire.next()
		if err != nil {
			s.failure = err
			return
		}
		select {
		case s.frames <- f:
		case <-s.quit:
			return
		}
		if f.kind == frameDone || (mode == modeProbe && f.kind == frameNeed) {
			s.failure = violation("the host has ended the transfer")
			return
		}
	}
}

// explain chooses what to tell: the host's own words say more than a broken
// pipe, and a cancelled context more than a closed stream.
func (s *sending) explain(ctx context.Context, err error) error {
	var changed *SourceChangedError
	var remote *RemoteError
	var local *localError
	var version *VersionError
	switch {
	case ctx.Err() != nil, errors.As(err, &version):
	case errors.As(err, &changed), errors.As(err, &local):
		_ = s.wire.send(frameError, remoteOf(err), nil)
	case errors.As(err, &remote):
	default:
		// Writing failed: the host mostly said why before it went away.
		const patience = 5 * time.Second
		timer := time.NewTimer(patience)
		defer timer.Stop()
		select {
		case <-s.failed:
			if errors.As(s.failure, &remote) {
				err = remote
			}
		case <-ctx.Done():
		case <-timer.C:
		}
	}
	s.wire.close()
	if ctx.Err() != nil {
		return fmt.Errorf("send: %w", context.Cause(ctx))
	}
	return fmt.Errorf("send: %w", err)
}

// localError is the sender's own trouble, which the host cannot know.
type localError struct{ err error }

func (e *localError) Error() string { return e.err.Error() }
func (e *localError) Unwrap() error { return e.err }

// await returns the next message of the host, which must be of one of the given kinds.
func (s *sending) await(ctx context.Context, kinds ...frameType) (frame, error) {
	var f frame
	select {
	case f = <-s.frames:
	case <-ctx.Done():
		return frame{}, ctx.Err()
	case <-s.failed:
		// The last message may have come together with the end.
		select {
		case f = <-s.frames:
		default:
			return frame{}, s.failure
		}
	}
	if !slices.Contains(kinds, f.kind) {
		return frame{}, violation("got message %d, want one of %d", f.kind, kinds)
	}
	return f, nil
}

func (s *sending) open(ctx context.Context, mode string) error {
	message := offerMessage{Blobs: []offeredBlob{}, Names: []offeredName{}}
	for _, b := range s.offer.Blobs {
		message.Blobs = append(message.Blobs, offeredBlob{Digest: b.Source.Digest(), Size: b.Source.Size()})
	}
	for _, name := range s.offer.Names {
		if err := name.Validate(); err != nil {
			return &localError{err}
		}
		message.Names = append(message.Names, offeredName{Site: name.Site, Artifact: name.Artifact, Name: name})
	}
	payload, err := json.Marshal(message)
	if err != nil {
		return &localError{err}
	}
	if err := s.wire.writeMagic(); err != nil {
		return err
	}
	if err := s.wire.write(frameHello, helloMessage{Protocol: protocolVersion, Mode: mode}, nil); err != nil {
		return err
	}
	if err := s.wire.send(frameOffer, nil, payload); err != nil {
		return err
	}
	if err := s.awaitHello(ctx); err != nil {
		return err
	}
	if err := s.receiveLack(ctx); err != nil {
		return err
	}
	return s.sendManifests()
}

func (s *sending) awaitHello(ctx context.Context) error {
	f, err := s.await(ctx, frameHello)
	if err != nil {
		return err
	}
	var hello helloMessage
	if err := f.decode(&hello); err != nil {
		return err
	}
	if hello.Protocol != protocolVersion {
		return &VersionError{Host: hello.Protocol, Sender: protocolVersion}
	}
	return nil
}

func (s *sending) receiveLack(ctx context.Context) error {
	f, err := s.await(ctx, frameLack)
	if err != nil {
		return err
	}
	if err := strictJSON(f.payload, &s.lack); err != nil {
		return err
	}
	if !increasing(s.lack.Blobs, len(s.offer.Blobs)) || !increasing(s.lack.Names, len(s.offer.Names)) {
		return violation("the host lacks what was not offered")
	}
	return nil
}

func increasing(positions []int, limit int) bool {
	last := -1
	for _, p := range positions {
		if p <= last || p >= limit {
			return false
		}
		last = p
	}
	return true
}

func (s *sending) sendManifests() error {
	encoder, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(manifestWindow))
	if err != nil {
		return &localError{err}
	}
	defer encoder.Close()
	for _, i := range s.lack.Blobs {
		manifest, err := s.manifest(s.offer.Blobs[i])
		if err != nil {
			return &localError{err}
		}
		encoded, err := manifest.Encode()
		if err != nil {
			return &localError{err}
		}
		s.add(i, manifest)
		if err := s.wire.write(frameManifest, nil, encoder.EncodeAll(encoded, nil)); err != nil {
			return err
		}
	}
	return s.wire.send(frameReady, nil, nil)
}

func (s *sending) manifest(b Offered) (Manifest, error) {
	if b.Manifest == nil {
		return ChunkSource(b.Source)
	}
	manifest, err := b.Manifest()
	if err != nil {
		return Manifest{}, fmt.Errorf("manifest of %s: %w", b.Source.Name(), err)
	}
	if manifest.Digest != b.Source.Digest() || manifest.Size != b.Source.Size() {
		return Manifest{}, fmt.Errorf("manifest of %s: is of %s with %d bytes, want %s with %d",
			b.Source.Name(), manifest.Digest, manifest.Size, b.Source.Digest(), b.Source.Size())
	}
	return manifest, nil
}

func (s *sending) add(blob int, manifest Manifest) {
	var offset int64
	for _, c := range manifest.Chunks {
		raw := c.Digest.raw()
		if _, known := s.chunks[raw]; !known {
			s.chunks[raw] = sourceChunk{blob: blob, offset: offset, size: c.Size}
		}
		offset += c.Size
	}
	s.total += manifest.Size
	s.count += len(manifest.Chunks)
}
