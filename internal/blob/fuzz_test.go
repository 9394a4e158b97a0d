package blob

import (
	"bytes"
	"io"
	"path/filepath"
	"testing"
)

func FuzzParseManifest(f *testing.F) {
	for _, blob := range [][]byte{nil, []byte("a"), text(600<<10, 1)} {
		encoded, err := mustChunk(f, blob).Encode()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(encoded)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		manifest, err := ParseManifest(data)
		if err != nil {
			return
		}
		encoded, err := manifest.Encode()
		if err != nil || !bytes.Equal(encoded, data) {
			t.Fatalf("accepted %q, which encodes as %q, %v", data, encoded, err)
		}
	})
}

func FuzzChunkRoundTrip(f *testing.F) {
	f.Add([]byte{}, 1)
	f.Add([]byte("a short one"), 1)
	f.Add(text(9<<10, 1), 100)
	f.Fuzz(func(t *testing.T, seed []byte, times int) {
		if times < 0 || times > 64 || len(seed) > 64<<10 {
			return
		}
		blob := bytes.Repeat(seed, times)
		manifest := mustChunk(t, blob)
		checkRejoins(t, manifest, blob, "fuzz")
		encoded, err := manifest.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ParseManifest(encoded); err != nil {
			t.Fatal(err)
		}
		store := openStore(t)
		if put(t, store, blob); !bytes.Equal(content(t, store, manifest.Digest), blob) {
			t.Fatal("the store holds other bytes")
		}
	})
}

// recorded is what an honest sender says for blob.
func recorded(f *testing.F, blob []byte) []byte {
	store, err := OpenStore(filepath.Join(f.TempDir(), "store"))
	if err != nil {
		f.Fatal(err)
	}
	defer store.Close()
	var said bytes.Buffer
	src := BytesSource("blob", blob)
	offer := Offer{Blobs: []Offered{{Source: src}}, Names: []Name{{
		Site: "lab", Artifact: "hello", Kind: KindFile, Digest: src.Digest(), Size: src.Size(), Blobs: []Digest{src.Digest()},
	}}}
	var sendErr error
	hostErr := withHost(f, store, func(rw io.ReadWriteCloser) io.ReadWriter {
		return struct {
			io.Reader
			io.Writer
		}{rw, io.MultiWriter(&said, rw)}
	}, func(rw io.ReadWriter) { _, sendErr = Send(f.Context(), rw, offer, SendOptions{}) })
	if sendErr != nil || hostErr != nil {
		f.Fatal(sendErr, hostErr)
	}
	return said.Bytes()
}

// Whatever a sender says, only proven bytes become visible.
func FuzzReceive(f *testing.F) {
	honest := recorded(f, []byte("hello, host"))
	f.Add(honest)
	f.Add(honest[:len(honest)-9])
	f.Add([]byte(magic))
	f.Add(append(bytes.Clone(honest), honest...))
	f.Fuzz(func(t *testing.T, said []byte) {
		store := openStore(t)
		_ = Receive(t.Context(), struct {
			io.Reader
			io.Writer
		}{bytes.NewReader(said), io.Discard}, store)
		onlyProven(t, store)
	})
}
