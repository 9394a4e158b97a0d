package blob

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"sync/atomic"
	"testing"

	"github.com/nomad-site/site/internal/plan"
)

func TestSendBringsBlobsAndNames(t *testing.T) {
	store := openStore(t)
	layer := source(t, text(3<<20, 1))
	config := BytesSource("config", []byte(`{"os":"linux"}`))
	empty := BytesSource("empty", nil)
	offer := Offer{
		Blobs: []Offered{layer, {Source: config}, {Source: empty}, layer},
		Names: []Name{{
			Site: "lab", Artifact: "hello", Kind: KindImage, Digest: config.Digest(), Size: layer.Source.Size() + config.Size(),
			Blobs: []Digest{config.Digest(), layer.Source.Digest()},
		}},
	}
	var lastDone, lastTotal int64
	var result Result
	var err error
	hostErr := withHost(t, store, nil, func(rw io.ReadWriter) {
		result, err = Send(t.Context(), rw, offer, SendOptions{Progress: func(done, total int64) { lastDone, lastTotal = done, total }})
	})
	if err != nil || hostErr != nil {
		t.Fatal(err, hostErr)
	}
	total := layer.Source.Size() + config.Size()
	if result.Blobs != 3 || result.Names != 1 || result.BytesPlain != total || lastDone != total || lastTotal != total {
		t.Errorf("got %+v, progress %d of %d", result, lastDone, lastTotal)
	}
	if result.BytesWire == 0 || result.BytesWire >= total {
		t.Errorf("%d bytes on the wire for %d", result.BytesWire, total)
	}
	onlyProven(t, store)
	if _, err := store.Name("lab", "hello", config.Digest()); err != nil {
		t.Error(err)
	}

	again, err := send(t, store, offer)
	if err != nil || again.Blobs != 0 || again.Chunks != 0 || again.Names != 0 {
		t.Errorf("a second run did something: %+v, %v", again, err)
	}
}

func TestMissingOnlyAsks(t *testing.T) {
	store := openStore(t)
	before := text(4<<20, 2)
	put(t, store, before)
	after := append(append(append([]byte{}, before[:2<<20]...), "one more line\n"...), before[2<<20:]...)
	src := source(t, after)
	offer := Offer{Blobs: []Offered{src}, Names: []Name{{
		Site: "lab", Artifact: "hello", Kind: KindFile, Digest: src.Source.Digest(), Size: src.Source.Size(), Blobs: []Digest{src.Source.Digest()},
	}}}
	listing := func() (out []string) {
		_ = filepath.WalkDir(store.Dir(), func(path string, _ os.DirEntry, _ error) error {
			out = append(out, path)
			return nil
		})
		return out
	}
	untouched := listing()
	var report Report
	var err error
	hostErr := withHost(t, store, nil, func(rw io.ReadWriter) { report, err = Missing(t.Context(), rw, offer) })
	if err != nil || hostErr != nil {
		t.Fatal(err, hostErr)
	}
	if len(report.Blobs) != 1 || len(report.Names) != 1 || report.Chunks == 0 || report.Chunks > 3 || report.Empty() {
		t.Errorf("got %+v", report)
	}
	if len(report.BytesOf) != 1 || report.BytesOf[src.Source.Digest()] != report.BytesToSend {
		t.Errorf("bytes of each blob are %v, want all %d for the only one", report.BytesOf, report.BytesToSend)
	}
	if now := listing(); len(now) != len(untouched) {
		t.Errorf("the store changed: %v", now)
	}
	result, err := send(t, store, offer)
	if err != nil || result.BytesPlain != report.BytesToSend || result.Chunks != report.Chunks {
		t.Errorf("the send was another than foretold: %+v, %v", result, err)
	}
	_ = withHost(t, store, nil, func(rw io.ReadWriter) { report, err = Missing(t.Context(), rw, offer) })
	if err != nil || !report.Empty() {
		t.Errorf("got %+v, %v", report, err)
	}
}

func TestManifestIsOnlyAskedForALackingBlob(t *testing.T) {
	store := openStore(t)
	blob := text(1<<20, 3)
	put(t, store, blob)
	offered := source(t, blob)
	offered.Manifest = func() (Manifest, error) { return Manifest{}, errors.New("asked") }
	if _, err := send(t, store, Offer{Blobs: []Offered{offered}}); err != nil {
		t.Fatal(err)
	}
	other := source(t, text(1<<20, 4))
	other.Manifest = func() (Manifest, error) { return mustChunk(t, blob), nil }
	if _, err := send(t, store, Offer{Blobs: []Offered{other}}); err == nil {
		t.Fatal("the manifest of another blob was accepted")
	}
}

func TestChangedSourceAbortsAndIsNamed(t *testing.T) {
	for name, change := range map[string]func(path string) error{
		"one bit flipped": func(path string) error { flip(t, path, 1<<20); return nil },
		"truncated":       func(path string) error { return os.Truncate(path, 1<<20) },
	} {
		t.Run(name, func(t *testing.T) {
			store := openStore(t)
			blob := text(3<<20, 5)
			path := fileOf(t, blob)
			src, err := FileSource(path, DigestOf(blob))
			if err != nil {
				t.Fatal(err)
			}
			manifest := mustChunk(t, blob)
			if err := change(path); err != nil {
				t.Fatal(err)
			}
			offer := Offer{Blobs: []Offered{{Source: src, Manifest: func() (Manifest, error) { return manifest, nil }}}}
			var sendErr error
			hostErr := withHost(t, store, nil, func(rw io.ReadWriter) {
				_, sendErr = Send(t.Context(), rw, offer, SendOptions{})
			})
			var changed *SourceChangedError
			if !errors.As(sendErr, &changed) || changed.Source != path || changed.Blob != src.Digest() || plan.HintOf(sendErr) == "" {
				t.Fatalf("got %v", sendErr)
			}
			var told *RemoteError
			if !errors.As(hostErr, &told) || told.Code != CodeSource {
				t.Fatalf("the host got %v", hostErr)
			}
			if present, _ := store.Has(src.Digest()); present {
				t.Fatal("published")
			}
		})
	}
}

// flipper flips one bit of the stream after some bytes.
type flipper struct {
	io.ReadWriteCloser
	after int
}

func (f *flipper) Write(p []byte) (int, error) {
	if f.after >= 0 && f.after < len(p) {
		p = bytes.Clone(p)
		p[f.after] ^= 1
	}
	f.after -= len(p)
	return f.ReadWriteCloser.Write(p)
}

func TestBitFlippedOnTheWireNeverBecomesVisible(t *testing.T) {
	blob := text(2<<20, 6)
	src := source(t, blob)
	refused := 0
	for after := 0; after < 600_000; after += 41_777 {
		store := openStore(t)
		var err error
		_ = withHost(t, store, func(rw io.ReadWriteCloser) io.ReadWriter { return &flipper{rw, after} }, func(rw io.ReadWriter) {
			_, err = Send(t.Context(), rw, Offer{Blobs: []Offered{src}}, SendOptions{})
		})
		if err != nil {
			refused++
		}
		onlyProven(t, store)
	}
	if refused < 10 {
		t.Fatalf("only %d flips were noticed", refused)
	}
}

func TestFlippedChunkNamesBlobAndChunk(t *testing.T) {
	store := openStore(t)
	src := source(t, text(2<<20, 6))
	var err error
	_ = withHost(t, store, func(rw io.ReadWriteCloser) io.ReadWriter { return &flipper{rw, 300_000} }, func(rw io.ReadWriter) {
		_, err = Send(t.Context(), rw, Offer{Blobs: []Offered{src}}, SendOptions{})
	})
	var remote *RemoteError
	if !errors.As(err, &remote) || remote.Blob != src.Source.Digest() || remote.Chunk == "" {
		t.Fatalf("got %v", err)
	}
}

// cutter closes the connection after some bytes.
type cutter struct {
	io.ReadWriteCloser
	left int
}

func (c *cutter) Write(p []byte) (int, error) {
	if len(p) > c.left {
		n, _ := c.ReadWriteCloser.Write(p[:c.left])
		c.Close()
		return n, io.ErrClosedPipe
	}
	c.left -= len(p)
	return c.ReadWriteCloser.Write(p)
}

func TestCutConnectionResumes(t *testing.T) {
	store := openStore(t)
	src := source(t, text(8<<20, 7))
	offer := Offer{Blobs: []Offered{src}}
	var err error
	hostErr := withHost(t, store, func(rw io.ReadWriteCloser) io.ReadWriter { return &cutter{rw, 1_500_000} }, func(rw io.ReadWriter) {
		_, err = Send(t.Context(), rw, offer, SendOptions{})
	})
	if err == nil || hostErr == nil {
		t.Fatalf("nobody noticed: %v, %v", err, hostErr)
	}
	if present, _ := store.Has(src.Source.Digest()); present {
		t.Fatal("visible already")
	}
	result, err := send(t, store, offer)
	if err != nil {
		t.Fatal(err)
	}
	if result.BytesDeduped < 2<<20 || result.BytesPlain+result.BytesDeduped != src.Source.Size() {
		t.Errorf("got %+v", result)
	}
	onlyProven(t, store)
}

func TestDamagedBlobOnTheHostIsReplacedWithinOneSend(t *testing.T) {
	store := openStore(t)
	before := text(4<<20, 8)
	damaged := put(t, store, before)
	flip(t, store.path(blobsDir, damaged.Digest.Hex()), 1<<20)
	src := source(t, append([]byte("x"), before...))
	result, err := send(t, store, Offer{Blobs: []Offered{src}})
	if err != nil {
		t.Fatal(err)
	}
	if result.BytesPlain < 1<<20 {
		t.Errorf("got %+v", result)
	}
	onlyProven(t, store)
}

func TestCancelledSendReturnsAtOnce(t *testing.T) {
	mine, host := net.Pipe()
	defer host.Close()
	go io.Copy(io.Discard, host)
	ctx, cancel := context.WithCancelCause(context.Background())
	reason := errors.New("interrupted")
	ended := make(chan error, 1)
	go func() {
		_, err := Send(ctx, mine, Offer{}, SendOptions{})
		ended <- err
	}()
	cancel(reason)
	if err := <-ended; !errors.Is(err, reason) {
		t.Fatalf("got %v", err)
	}
}

func TestPeerThatDoesNotSpeakTheProtocol(t *testing.T) {
	for name, answer := range map[string]string{
		"a shell that greets":      "bash: site-host: command not found\n",
		"nothing":                  "",
		"half a magic line":        magic[:4],
		"an unknown message":       magic + "\xff\x00\x00\x00\x00\x00\x00\x00\x00",
		"a message that is huge":   magic + "\x01\xff\xff\xff\xff\xff\xff\xff\xff",
		"another version":          magic + "\x01\x00\x00\x00\x0e\x00\x00\x00\x00" + `{"protocol":9}`,
		"done before it began":     magic + "\x09\x00\x00\x00\x02\x00\x00\x00\x00{}",
		"lacks what is not there":  magic + "\x01\x00\x00\x00\x0e\x00\x00\x00\x00" + `{"protocol":1}` + "\x03\x00\x00\x00\x00\x00\x00\x00\x18" + `{"blobs":[7],"names":[]}`,
		"a header that is no JSON": magic + "\x01\x00\x00\x00\x01\x00\x00\x00\x00{",
	} {
		t.Run(name, func(t *testing.T) {
			mine, host := net.Pipe()
			go func() {
				go io.Copy(io.Discard, host)
				_, _ = io.WriteString(host, answer)
				host.Close()
			}()
			if _, err := Send(t.Context(), mine, Offer{}, SendOptions{}); err == nil {
				t.Fatal("no error")
			}
		})
	}
}

// A host that asks for what was not offered, a sender that sends what was not
// asked for: neither gets its way.
func TestHostRefusesChunksItDidNotAskFor(t *testing.T) {
	store := openStore(t)
	var remote *RemoteError
	_ = withHost(t, store, nil, func(rw io.ReadWriter) {
		w, release := newWire(t.Context(), rw)
		defer release()
		_ = w.writeMagic()
		_ = w.write(frameHello, helloMessage{Protocol: 1, Mode: modeSend}, nil)
		_ = w.send(frameOffer, nil, []byte(`{"blobs":[],"names":[]}`))
		_ = w.readMagic()
		_, _ = w.expect(frameHello)
		_, _ = w.expect(frameLack)
		_ = w.send(frameReady, nil, nil)
		_, _ = w.expect(frameNeed)
		_ = w.send(frameChunk, chunkMessage{Digest: digestA}, compress(t, []byte("a")))
		_, err := w.next()
		errors.As(err, &remote)
	})
	if remote == nil || remote.Code != CodeProtocol {
		t.Fatalf("got %v", remote)
	}
	if missing, err := store.Missing([]Digest{digestA}); err != nil || len(missing) != 1 {
		t.Fatalf("kept: %v, %v", missing, err)
	}
}

func TestHostRefusesTheManifestOfAnotherBlob(t *testing.T) {
	store := openStore(t)
	encoded, err := mustChunk(t, []byte("b")).Encode()
	if err != nil {
		t.Fatal(err)
	}
	var remote *RemoteError
	_ = withHost(t, store, nil, func(rw io.ReadWriter) {
		w, release := newWire(t.Context(), rw)
		defer release()
		_ = w.writeMagic()
		_ = w.write(frameHello, helloMessage{Protocol: 1, Mode: modeProbe}, nil)
		_ = w.send(frameOffer, nil, []byte(`{"blobs":[{"digest":"`+string(digestA)+`","size":1}],"names":[]}`))
		_ = w.readMagic()
		_, _ = w.expect(frameHello)
		_, _ = w.expect(frameLack)
		_ = w.write(frameManifest, nil, compress(t, encoded))
		// The host may have refused already, and then does not read this.
		go func() { _ = w.send(frameReady, nil, nil) }()
		_, err := w.next()
		errors.As(err, &remote)
	})
	if remote == nil || remote.Code != CodeProtocol || remote.Blob != digestA {
		t.Fatalf("got %v", remote)
	}
}

func TestNameWithoutItsBlobIsReportedByName(t *testing.T) {
	store := openStore(t)
	name := Name{Site: "lab", Artifact: "hello", Kind: KindFile, Digest: digestA, Size: 1, Blobs: []Digest{digestA}}
	_, err := send(t, store, Offer{Names: []Name{name}})
	var remote *RemoteError
	if !errors.As(err, &remote) || remote.Name != "lab/hello" {
		t.Fatalf("got %v", err)
	}
}

// endlessSource is a blob that is made up as it is read.
type endlessSource struct {
	manifest Manifest
}

const block = 1 << 20

func blockAt(i int64, p []byte) {
	var seed [32]byte
	seed[0], seed[1] = byte(i), byte(i>>8)
	_, _ = rand.NewChaCha8(seed).Read(p)
}

func (e *endlessSource) Name() string                { return "made up" }
func (e *endlessSource) Digest() Digest              { return e.manifest.Digest }
func (e *endlessSource) Size() int64                 { return e.manifest.Size }
func (e *endlessSource) Open() (SourceReader, error) { return blocks{}, nil }

type blocks struct{}

func (blocks) Close() error { return nil }

func (blocks) ReadAt(p []byte, at int64) (int, error) {
	var whole [block]byte
	for n := 0; n < len(p); {
		blockAt((at+int64(n))/block, whole[:])
		n += copy(p[n:], whole[(at+int64(n))%block:])
	}
	return len(p), nil
}

func TestTransferKeepsMemoryFlat(t *testing.T) {
	peak := func(size int64) uint64 {
		store := openStore(t)
		manifest, err := Chunk(io.NewSectionReader(blocks{}, 0, size))
		if err != nil {
			t.Fatal(err)
		}
		var highest atomic.Uint64
		offer := Offer{Blobs: []Offered{{Source: &endlessSource{manifest}, Manifest: func() (Manifest, error) { return manifest, nil }}}}
		err = withHost(t, store, nil, func(rw io.ReadWriter) {
			var sampled int64
			_, err = Send(t.Context(), rw, offer, SendOptions{Progress: func(done, _ int64) {
				if done-sampled > 8<<20 {
					sampled = done
					runtime.GC()
					var stats runtime.MemStats
					runtime.ReadMemStats(&stats)
					highest.Store(max(highest.Load(), stats.HeapAlloc))
				}
			}})
		})
		if err != nil {
			t.Fatal(err)
		}
		return highest.Load()
	}
	small, large := peak(32<<20), peak(256<<20)
	t.Logf("live: %d KiB for 32 MiB, %d KiB for 256 MiB", small>>10, large>>10)
	if large > small+12<<20 {
		t.Fatalf("%d bytes live for 32 MiB, %d for 256 MiB", small, large)
	}
}
