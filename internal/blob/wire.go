package blob

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"
)

// The protocol, in order. S is the sender, H the host.
//
//	S,H  the magic line, then hello: protocol version; S: send or probe
//	S    offer: digests and sizes of blobs; names to publish
//	H    lack: which blobs and names it lacks
//	S    manifest, one for each lacking blob; ready
//	H    need: raw digests of the chunks it lacks (a probe ends here)
//	S    chunk …; end
//	H    need again, where chunks it had turned out to be damaged; else done
//
// Either side may send error instead, and is then done. There is no round trip
// for a chunk: the stream's own flow control bounds what is under way.
const (
	protocolVersion = 1
	magic           = "site-blob/1\n"

	// maxCompressedChunk leaves room for a chunk that cannot be compressed.
	maxCompressedChunk = MaxChunkSize + 64<<10
	maxOffer           = 16 << 20
	maxHeader          = 16 << 10
	mostOffered        = 100_000
)

type frameType byte

const (
	frameHello frameType = iota + 1
	frameOffer
	frameLack
	frameManifest
	frameReady
	frameNeed
	frameChunk
	frameEnd
	frameDone
	frameError
)

// payloadLimit is how long the binary part of a frame may be.
func payloadLimit(kind frameType) int {
	switch kind {
	case frameOffer, frameLack:
		return maxOffer
	case frameManifest:
		return MaxManifestBytes
	case frameNeed:
		return MaxChunks * len(rawDigest{})
	case frameChunk:
		return maxCompressedChunk
	default:
		return 0
	}
}

type frame struct {
	kind    frameType
	header  []byte
	payload []byte
}

func (f frame) decode(into any) error { return strictJSON(f.header, into) }

func strictJSON(data []byte, into any) error {
	decoder := json.NewDecoder(bytes.NewReader(data))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(into); err != nil {
		return violation("decode: %v", err)
	}
	if _, err := decoder.Token(); !errors.Is(err, io.EOF) {
		return violation("decode: something follows the document")
	}
	return nil
}

// The headers and payloads.
type (
	helloMessage struct {
		Protocol int    `json:"protocol"`
		Mode     string `json:"mode,omitempty"`
	}
	offeredBlob struct {
		Digest Digest `json:"digest"`
		Size   int64  `json:"size"`
	}
	offeredName struct {
		Site     string `json:"site"`
		Artifact string `json:"artifact"`
		Name     Name   `json:"name"`
	}
	offerMessage struct {
		Blobs []offeredBlob `json:"blobs"`
		Names []offeredName `json:"names"`
	}
	// lackMessage refers to the offer by position.
	lackMessage struct {
		Blobs []int `json:"blobs"`
		Names []int `json:"names"`
	}
	chunkMessage struct {
		Digest Digest `json:"digest"`
	}
	doneMessage struct {
		Blobs  int `json:"blobs"`
		Chunks int `json:"chunks"`
		Names  int `json:"names"`
	}
)

const (
	modeSend  = "send"
	modeProbe = "probe"
)

// wire frames messages on a stream. Reading and writing may happen at once,
// but each by one goroutine.
type wire struct {
	in      *bufio.Reader
	out     *bufio.Writer
	close   func()
	read    int64
	written int64
}

// newWire closes rw, where that can be done, when ctx ends: nothing else wakes
// a blocked read.
func newWire(ctx context.Context, rw io.ReadWriter) (w *wire, release func()) {
	w = &wire{in: bufio.NewReaderSize(rw, 64<<10), out: bufio.NewWriterSize(rw, 256<<10), close: func() {}}
	if closer, ok := rw.(io.Closer); ok {
		w.close = sync.OnceFunc(func() { _ = closer.Close() })
	}
	stop := context.AfterFunc(ctx, w.close)
	return w, func() { stop() }
}

func (w *wire) writeMagic() error {
	_, err := w.out.WriteString(magic)
	return err
}

func (w *wire) readMagic() error {
	got := make([]byte, len(magic))
	n, err := io.ReadFull(w.in, got)
	if n > 0 && !bytes.HasPrefix([]byte(magic), got[:n]) {
		// A shell that greets, or a missing program, speaks here.
		more, _ := w.in.Peek(min(w.in.Buffered(), 200))
		return violation("unexpected answer %q", append(got[:n], more...))
	}
	return err
}

// write buffers one frame; flush sends it.
func (w *wire) write(kind frameType, header any, payload []byte) error {
	var encoded []byte
	if header != nil {
		var err error
		if encoded, err = json.Marshal(header); err != nil {
			return fmt.Errorf("encode frame: %w", err)
		}
	}
	if len(encoded) > maxHeader || len(payload) > payloadLimit(kind) {
		return violation("message %d is too long to send: %d and %d bytes", kind, len(encoded), len(payload))
	}
	var prefix [9]byte
	prefix[0] = byte(kind)
	binary.BigEndian.PutUint32(prefix[1:], uint32(len(encoded)))
	binary.BigEndian.PutUint32(prefix[5:], uint32(len(payload)))
	for _, part := range [][]byte{prefix[:], encoded, payload} {
		if _, err := w.out.Write(part); err != nil {
			return err
		}
		w.written += int64(len(part))
	}
	return nil
}

func (w *wire) send(kind frameType, header any, payload []byte) error {
	if err := w.write(kind, header, payload); err != nil {
		return err
	}
	return w.out.Flush()
}

// next reads a frame; a peer's error comes as *RemoteError.
func (w *wire) next() (frame, error) {
	var prefix [9]byte
	if _, err := io.ReadFull(w.in, prefix[:]); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return frame{}, err
	}
	f := frame{kind: frameType(prefix[0])}
	headerSize, payloadSize := binary.BigEndian.Uint32(prefix[1:]), binary.BigEndian.Uint32(prefix[5:])
	if f.kind < frameHello || f.kind > frameError {
		return frame{}, violation("unknown message type %d", f.kind)
	}
	if headerSize > maxHeader || int64(payloadSize) > int64(payloadLimit(f.kind)) {
		return frame{}, violation("message %d is too long: %d and %d bytes", f.kind, headerSize, payloadSize)
	}
	var err error
	if f.header, err = w.take(int(headerSize)); err != nil {
		return frame{}, err
	}
	if f.payload, err = w.take(int(payloadSize)); err != nil {
		return frame{}, err
	}
	w.read += int64(len(prefix)) + int64(headerSize) + int64(payloadSize)
	if f.kind == frameError {
		remote := &RemoteError{}
		if err := f.decode(remote); err != nil {
			return frame{}, err
		}
		return frame{}, remote
	}
	return f, nil
}

// take reads size bytes. A claimed size costs memory only as bytes arrive.
func (w *wire) take(size int) ([]byte, error) {
	if size == 0 {
		return nil, nil
	}
	const trusted = 1 << 20
	if size <= trusted {
		out := make([]byte, size)
		_, err := io.ReadFull(w.in, out)
		return out, cutShort(err)
	}
	var out bytes.Buffer
	_, err := io.CopyN(&out, w.in, int64(size))
	return out.Bytes(), cutShort(err)
}

func cutShort(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// expect reads a frame of one kind.
func (w *wire) expect(kind frameType) (frame, error) {
	f, err := w.next()
	if err == nil && f.kind != kind {
		err = violation("got message %d, want %d", f.kind, kind)
	}
	return f, err
}

func packDigests(digests []Digest) []byte {
	out := make([]byte, 0, len(digests)*len(rawDigest{}))
	for _, d := range digests {
		raw := d.raw()
		out = append(out, raw[:]...)
	}
	return out
}

func unpackDigests(packed []byte) ([]rawDigest, error) {
	const size = len(rawDigest{})
	if len(packed)%size != 0 {
		return nil, violation("digest list of %d bytes", len(packed))
	}
	out := make([]rawDigest, 0, len(packed)/size)
	for ; len(packed) > 0; packed = packed[size:] {
		out = append(out, sum(packed[:size]))
	}
	return out, nil
}
