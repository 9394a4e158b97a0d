package blob

import (
	"bytes"
	"context"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/klauspost/compress/zstd"
)

// text is content that compresses like source code does: random words.
func text(size int, seed uint64) []byte {
	random := rand.New(rand.NewPCG(seed, 7))
	words := make([][]byte, 4096)
	for i := range words {
		word := make([]byte, 2+random.IntN(9))
		for j := range word {
			word[j] = byte('a' + random.IntN(26))
		}
		words[i] = word
	}
	out := make([]byte, 0, size+16)
	for len(out) < size {
		out = append(append(out, words[random.IntN(len(words))]...), ' ')
	}
	return out[:size]
}

func openStore(t testing.TB) *Store {
	t.Helper()
	store, err := OpenStore(filepath.Join(t.TempDir(), "store"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.Close() })
	return store
}

func mustChunk(t testing.TB, content []byte) Manifest {
	t.Helper()
	manifest, err := Chunk(bytes.NewReader(content))
	if err != nil {
		t.Fatal(err)
	}
	return manifest
}

func compress(t testing.TB, content []byte) []byte {
	t.Helper()
	encoder, err := zstd.NewWriter(nil, zstd.WithSingleSegment(true))
	if err != nil {
		t.Fatal(err)
	}
	defer encoder.Close()
	return encoder.EncodeAll(content, nil)
}

// put brings content into store without the protocol.
func put(t testing.TB, store *Store, content []byte) Manifest {
	t.Helper()
	manifest := mustChunk(t, content)
	putChunks(t, store, manifest, content)
	if err := store.Assemble(manifest); err != nil {
		t.Fatal(err)
	}
	return manifest
}

func putChunks(t testing.TB, store *Store, manifest Manifest, content []byte) {
	t.Helper()
	for _, c := range manifest.Chunks {
		if err := store.PutChunk(c.Digest, compress(t, content[:c.Size])); err != nil {
			t.Fatal(err)
		}
		content = content[c.Size:]
	}
}

func fileOf(t testing.TB, content []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "layer.tar")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func source(t testing.TB, content []byte) Offered {
	t.Helper()
	src, err := HashFile(fileOf(t, content))
	if err != nil {
		t.Fatal(err)
	}
	return Offered{Source: src}
}

// withHost runs Receive into store at the other end of a pipe while use runs,
// and returns what Receive returned.
func withHost(t testing.TB, store *Store, wrap func(io.ReadWriteCloser) io.ReadWriter, use func(io.ReadWriter)) error {
	t.Helper()
	mine, host := net.Pipe()
	ended := make(chan error, 1)
	go func() {
		err := Receive(t.Context(), host, store)
		host.Close()
		ended <- err
	}()
	var rw io.ReadWriter = mine
	if wrap != nil {
		rw = wrap(mine)
	}
	use(rw)
	mine.Close()
	return <-ended
}

func send(t testing.TB, store *Store, offer Offer) (Result, error) {
	t.Helper()
	var result Result
	var err error
	_ = withHost(t, store, nil, func(rw io.ReadWriter) {
		result, err = Send(context.Background(), rw, offer, SendOptions{})
	})
	return result, err
}

func content(t testing.TB, store *Store, digest Digest) []byte {
	t.Helper()
	file, err := store.Open(digest)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	out, err := io.ReadAll(file)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// onlyProven fails where anything under a digest is not its digest, or where
// temporary files are left.
func onlyProven(t testing.TB, store *Store) {
	t.Helper()
	blobs, err := store.Blobs()
	if err != nil {
		t.Fatal(err)
	}
	for _, digest := range blobs {
		if err := store.Verify(digest); err != nil {
			t.Error(err)
		}
	}
	temps, err := os.ReadDir(filepath.Join(store.Dir(), tempDir))
	if err != nil || len(temps) > 0 {
		t.Errorf("temporary files: %v, %v", temps, err)
	}
}
