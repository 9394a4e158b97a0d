package blob

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/nomad-site/site/internal/retry"
	"github.com/nomad-site/site/internal/testneeds"
)

func TestAssembledBlobIsServedAndItsChunksAreGone(t *testing.T) {
	store := openStore(t)
	want := text(3<<20, 1)
	manifest := put(t, store, want)
	if !bytes.Equal(content(t, store, manifest.Digest), want) {
		t.Fatal("other bytes")
	}
	incoming, err := os.ReadDir(filepath.Join(store.Dir(), incomingDir))
	if err != nil || len(incoming) != 0 {
		t.Fatalf("incoming: %v, %v", incoming, err)
	}
	again, err := store.Manifest(manifest.Digest)
	if err != nil || again.Size != manifest.Size {
		t.Fatalf("manifest: %+v, %v", again, err)
	}
	onlyProven(t, store)
}

func TestAssembleTakesChunksOfOtherBlobs(t *testing.T) {
	store := openStore(t)
	first := text(3<<20, 1)
	put(t, store, first)
	second := append([]byte("another beginning"), first...)
	manifest := mustChunk(t, second)
	missing, err := store.Missing(digestsOf(manifest))
	if err != nil || len(missing) == 0 || len(missing) > 3 {
		t.Fatalf("missing %d, %v", len(missing), err)
	}
	var incomplete *MissingChunksError
	if err := store.Assemble(manifest); !errors.As(err, &incomplete) || len(incomplete.Chunks) != len(missing) {
		t.Fatalf("got %v", err)
	}
	putOnly(t, store, manifest, second, missing)
	if err := store.Assemble(manifest); err != nil {
		t.Fatal(err)
	}
	onlyProven(t, store)
}

func digestsOf(m Manifest) []Digest {
	var out []Digest
	for _, c := range m.Chunks {
		out = append(out, c.Digest)
	}
	return out
}

func putOnly(t testing.TB, store *Store, manifest Manifest, content []byte, only []Digest) {
	t.Helper()
	wanted := map[Digest]bool{}
	for _, digest := range only {
		wanted[digest] = true
	}
	for _, c := range manifest.Chunks {
		if wanted[c.Digest] {
			if err := store.PutChunk(c.Digest, compress(t, content[:c.Size])); err != nil {
				t.Fatal(err)
			}
		}
		content = content[c.Size:]
	}
}

func TestPutChunkRefuses(t *testing.T) {
	good := []byte("hello, chunk")
	for name, compressed := range map[string][]byte{
		"other bytes":               compress(t, []byte("hello, chunk?")),
		"what is not zstd":          []byte("hello"),
		"nothing":                   {},
		"a bomb":                    compress(t, make([]byte, MaxChunkSize+1)),
		"two frames":                append(compress(t, good), compress(t, good)...),
		"a cut frame":               compress(t, good)[:10],
		"more than a chunk may be":  make([]byte, maxCompressedChunk+1),
		"trailing bytes":            append(compress(t, good), 'x'),
		"a frame without its bytes": compress(t, nil),
	} {
		t.Run(name, func(t *testing.T) {
			store := openStore(t)
			if err := store.PutChunk(DigestOf(good), compressed); err == nil {
				t.Fatal("accepted")
			}
			missing, err := store.Missing([]Digest{DigestOf(good)})
			if err != nil || len(missing) != 1 {
				t.Fatalf("missing %v, %v", missing, err)
			}
		})
	}
}

func TestManifestOfOtherBytesPublishesNothing(t *testing.T) {
	store := openStore(t)
	blob := text(1<<20, 3)
	manifest := mustChunk(t, blob)
	putChunks(t, store, manifest, blob)
	lie := manifest
	lie.Digest = digestA
	var mismatch *MismatchError
	if err := store.Assemble(lie); !errors.As(err, &mismatch) {
		t.Fatalf("got %v", err)
	}
	if present, err := store.Has(digestA); present || err != nil {
		t.Fatalf("has %t, %v", present, err)
	}
	if err := store.Assemble(manifest); err != nil {
		t.Fatalf("the honest manifest: %v", err)
	}
	onlyProven(t, store)
}

// A manifest that lies about a chunk's length must not cost the blob that holds the chunk.
func TestManifestWithAnotherChunkSizeHarmsNobody(t *testing.T) {
	store := openStore(t)
	manifest := put(t, store, text(1<<20, 3))
	lie := Manifest{Version: 1, Digest: digestA, Size: 5, Chunks: []ChunkRef{{Digest: manifest.Chunks[0].Digest, Size: 5}}}
	if err := store.Assemble(lie); err == nil {
		t.Fatal("accepted")
	}
	if err := store.Verify(manifest.Digest); err != nil {
		t.Fatal(err)
	}
	if _, err := store.Manifest(manifest.Digest); err != nil {
		t.Fatalf("the other blob lost its manifest: %v", err)
	}
}

func flip(t testing.TB, path string, at int64) {
	t.Helper()
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	var b [1]byte
	if _, err := file.ReadAt(b[:], at); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 1
	if _, err := file.WriteAt(b[:], at); err != nil {
		t.Fatal(err)
	}
}

func TestFlippedBitInTheStore(t *testing.T) {
	first := text(2<<20, 4)
	second := append([]byte("x"), first...)
	t.Run("is found by Verify", func(t *testing.T) {
		store := openStore(t)
		manifest := put(t, store, first)
		flip(t, store.path(blobsDir, manifest.Digest.Hex()), 1<<20)
		var mismatch *MismatchError
		if err := store.Verify(manifest.Digest); !errors.As(err, &mismatch) {
			t.Fatalf("got %v", err)
		}
	})
	t.Run("never spreads to another blob, and the damaged one disappears", func(t *testing.T) {
		store := openStore(t)
		damaged := put(t, store, first)
		flip(t, store.path(blobsDir, damaged.Digest.Hex()), 1<<20)
		manifest := mustChunk(t, second)
		missing, err := store.Missing(digestsOf(manifest))
		if err != nil {
			t.Fatal(err)
		}
		putOnly(t, store, manifest, second, missing)
		var incomplete *MissingChunksError
		if err := store.Assemble(manifest); !errors.As(err, &incomplete) {
			t.Fatalf("got %v", err)
		}
		onlyProven(t, store)
		if present, _ := store.Has(damaged.Digest); present {
			t.Fatal("the damaged blob is still there")
		}
		missing, err = store.Missing(digestsOf(manifest))
		if err != nil || len(missing) == 0 {
			t.Fatalf("missing %d, %v", len(missing), err)
		}
		putOnly(t, store, manifest, second, missing)
		if err := store.Assemble(manifest); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("in a manifest costs the manifest, not the blob", func(t *testing.T) {
		store := openStore(t)
		kept := put(t, store, first)
		wrong := kept
		wrong.Chunks = append([]ChunkRef{}, kept.Chunks...)
		other := mustChunk(t, second)
		wrong.Chunks[0].Digest = other.Chunks[0].Digest
		lie := Manifest{Version: 1, Digest: other.Chunks[0].Digest, Size: wrong.Chunks[0].Size, Chunks: wrong.Chunks[:1]}
		if err := store.writeManifest(wrong); err != nil {
			t.Fatal(err)
		}
		var incomplete *MissingChunksError
		if err := store.Assemble(lie); !errors.As(err, &incomplete) {
			t.Fatalf("got %v", err)
		}
		if err := store.Verify(kept.Digest); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("in a chunk that has arrived makes it missing again", func(t *testing.T) {
		store := openStore(t)
		manifest := mustChunk(t, first)
		putChunks(t, store, manifest, first)
		spoilt := manifest.Chunks[1].Digest
		flip(t, store.path(incomingDir, spoilt.Hex()), 1000)
		var incomplete *MissingChunksError
		if err := store.Assemble(manifest); !errors.As(err, &incomplete) {
			t.Fatalf("got %v", err)
		}
		missing, err := store.Missing(digestsOf(manifest))
		if err != nil || len(missing) != 1 || missing[0] != spoilt {
			t.Fatalf("missing %v, %v", missing, err)
		}
	})
}

func TestSymlinkIsRefused(t *testing.T) {
	for name, plant := range map[string]func(t *testing.T, store *Store, m Manifest) error{
		"as a blob": func(t *testing.T, store *Store, m Manifest) error {
			link := store.path(blobsDir, digestA.Hex())
			if err := os.Symlink(m.Digest.Hex(), link); err != nil {
				t.Fatal(err)
			}
			_, err := store.Open(digestA)
			return err
		},
		"as a folder that stays inside": func(t *testing.T, store *Store, m Manifest) error {
			replaceBySymlink(t, store.path("blobs", "sha256"), "elsewhere")
			_, err := store.Open(m.Digest)
			return err
		},
		"as the folder of blobs, at open": func(t *testing.T, store *Store, _ Manifest) error {
			replaceBySymlink(t, store.path("blobs"), "elsewhere")
			_, err := OpenStore(store.Dir())
			return err
		},
		"as an arrived chunk": func(t *testing.T, store *Store, _ Manifest) error {
			if err := os.Symlink("/etc/passwd", store.path(incomingDir, digestA.Hex())); err != nil {
				t.Fatal(err)
			}
			_, err := store.Missing([]Digest{digestA})
			return err
		},
		"as the lock": func(t *testing.T, store *Store, _ Manifest) error {
			if err := errors.Join(os.Remove(store.path(lockFile)), os.Symlink("tmp/x", store.path(lockFile))); err != nil {
				t.Fatal(err)
			}
			_, err := OpenStore(store.Dir())
			return err
		},
		"as the folder of an artifact": func(t *testing.T, store *Store, m Manifest) error {
			publish(t, store, m)
			replaceBySymlink(t, store.path(namesDir, "lab", "hello"), "elsewhere")
			_, err := store.Name("lab", "hello", m.Digest)
			return err
		},
		"as the store itself": func(t *testing.T, store *Store, _ Manifest) error {
			link := filepath.Join(t.TempDir(), "link")
			if err := os.Symlink(store.Dir(), link); err != nil {
				t.Fatal(err)
			}
			_, err := OpenStore(link)
			return err
		},
		"where new files go": func(t *testing.T, store *Store, _ Manifest) error {
			replaceBySymlink(t, store.path(incomingDir), "elsewhere")
			return store.PutChunk(digestA, compress(t, []byte("a")))
		},
	} {
		t.Run(name, func(t *testing.T) {
			store := openStore(t)
			err := plant(t, store, put(t, store, text(1000, 1)))
			var unsafe *UnsafeEntryError
			if !errors.As(err, &unsafe) {
				t.Fatalf("got %v", err)
			}
		})
	}
}

func replaceBySymlink(t *testing.T, path, name string) {
	t.Helper()
	moved := filepath.Join(filepath.Dir(path), name)
	if err := errors.Join(os.Rename(path, moved), os.Symlink(name, path)); err != nil {
		t.Fatal(err)
	}
}

func publish(t testing.TB, store *Store, m Manifest) Name {
	t.Helper()
	name := Name{Site: "lab", Artifact: "hello", Kind: KindFile, Digest: m.Digest, Size: m.Size, Blobs: []Digest{m.Digest}}
	if err := store.PutName(name); err != nil {
		t.Fatal(err)
	}
	return name
}

func TestNames(t *testing.T) {
	store := openStore(t)
	manifest := put(t, store, text(1000, 1))
	name := publish(t, store, manifest)

	t.Run("a published name is found and listed", func(t *testing.T) {
		got, err := store.Name("lab", "hello", manifest.Digest)
		if err != nil || !got.same(name) || got.Created.IsZero() {
			t.Fatalf("got %+v, %v", got, err)
		}
		all, err := store.Names()
		if err != nil || len(all) != 1 || !all[0].same(name) {
			t.Fatalf("got %+v, %v", all, err)
		}
	})
	t.Run("publishing an equal name writes nothing", func(t *testing.T) {
		path := store.path(namesDir, "lab", "hello", manifest.Digest.Hex()+jsonSuffix)
		before, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		publish(t, store, manifest)
		after, err := os.Stat(path)
		if err != nil || !os.SameFile(before, after) || !before.ModTime().Equal(after.ModTime()) {
			t.Fatalf("written again: %v", err)
		}
	})
	t.Run("a name without its blob is refused", func(t *testing.T) {
		lacking := name
		lacking.Blobs = []Digest{manifest.Digest, digestA}
		if err := store.PutName(lacking); !errors.Is(err, fs.ErrNotExist) {
			t.Fatalf("got %v", err)
		}
	})
	t.Run("a listed blob is not deleted", func(t *testing.T) {
		var inUse *InUseError
		if err := store.Delete(manifest.Digest); !errors.As(err, &inUse) {
			t.Fatalf("got %v", err)
		}
	})
	for title, part := range map[string]string{
		"a parent folder": "..", "a hidden file": ".x", "an absolute path": "/etc", "a path": "a/b",
		"nothing": "", "upper case": "A", "a NUL": "a\x00", "a trailing dash": "a-", "two dots inside": "a..b",
	} {
		t.Run(title+" is no name", func(t *testing.T) {
			for _, hostile := range []Name{{Site: part, Artifact: "hello"}, {Site: "lab", Artifact: part}} {
				hostile.Kind, hostile.Digest, hostile.Blobs = KindFile, manifest.Digest, []Digest{manifest.Digest}
				if err := store.PutName(hostile); err == nil {
					t.Error("published")
				}
				if _, err := store.Name(hostile.Site, hostile.Artifact, manifest.Digest); err == nil {
					t.Error("found")
				}
			}
		})
	}
	t.Run("a deleted name is gone, and then its blob may go", func(t *testing.T) {
		for range 2 {
			if err := store.DeleteName("lab", "hello", manifest.Digest); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := store.Name("lab", "hello", manifest.Digest); !errors.Is(err, fs.ErrNotExist) {
			t.Fatalf("got %v", err)
		}
		if err := store.Delete(manifest.Digest); err != nil {
			t.Fatal(err)
		}
		if present, err := store.Has(manifest.Digest); present || err != nil {
			t.Fatalf("has %t, %v", present, err)
		}
	})
}

func TestOpenCleansWhatAKilledWriterLeft(t *testing.T) {
	store := openStore(t)
	manifest := put(t, store, text(1000, 1))
	orphan := store.path(manifestsDir, digestA.Hex()+jsonSuffix)
	temp := store.path(tempDir, "half")
	for _, path := range []string{orphan, temp} {
		if err := os.WriteFile(path, []byte("half"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	unlock, err := store.lock(syscall.LOCK_SH)
	if err != nil {
		t.Fatal(err)
	}
	reopen(t, store)
	if _, err := os.Stat(temp); err != nil {
		t.Fatalf("taken from a living writer: %v", err)
	}
	unlock()
	reopen(t, store)
	for _, path := range []string{orphan, temp} {
		if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is left: %v", path, err)
		}
	}
	if err := store.Verify(manifest.Digest); err != nil {
		t.Fatal(err)
	}
}

func reopen(t *testing.T, store *Store) {
	t.Helper()
	again, err := OpenStore(store.Dir())
	if err != nil {
		t.Fatal(err)
	}
	again.Close()
}

func TestSweepForgetsOnlyOldChunks(t *testing.T) {
	store := openStore(t)
	if err := store.PutChunk(digestA, compress(t, []byte("a"))); err != nil {
		t.Fatal(err)
	}
	if freed, err := store.Sweep(time.Hour); freed != 0 || err != nil {
		t.Fatalf("freed %d, %v", freed, err)
	}
	if freed, err := store.Sweep(0); freed == 0 || err != nil {
		t.Fatalf("freed %d, %v", freed, err)
	}
}

func TestSeveralWritersAtOnce(t *testing.T) {
	first := openStore(t)
	second, err := OpenStore(first.Dir())
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	blob := text(2<<20, 9)
	manifest := mustChunk(t, blob)
	var group sync.WaitGroup
	for i := range 6 {
		store := []*Store{first, second}[i%2]
		group.Go(func() {
			putChunks(t, store, manifest, blob)
			if err := store.Assemble(manifest); err != nil {
				t.Error(err)
			}
			publish(t, store, manifest)
		})
	}
	group.Wait()
	onlyProven(t, first)
}

// The child fills a store until it is killed; what it leaves must be proven.
func TestKilledWriterLeavesOnlyProvenBlobs(t *testing.T) {
	const variable = "SITE_BLOB_TEST_CHILD_STORE"
	if dir := os.Getenv(variable); dir != "" {
		store, err := OpenStore(dir)
		if err != nil {
			t.Fatal(err)
		}
		for seed := uint64(0); ; seed++ {
			put(t, store, text(2<<20, seed))
		}
	}
	dir := filepath.Join(t.TempDir(), "store")
	for round := range 5 {
		child := exec.Command(os.Args[0], "-test.run=^TestKilledWriterLeavesOnlyProvenBlobs$")
		child.Env = append(os.Environ(), variable+"="+dir)
		if err := child.Start(); err != nil {
			t.Fatal(err)
		}
		err := retry.Until(t.Context(), "the child's next blob", 20*time.Second, func(_ context.Context) error {
			blobs, _ := os.ReadDir(filepath.Join(dir, blobsDir))
			if len(blobs) <= round {
				return fmt.Errorf("%d blobs", len(blobs))
			}
			return nil
		})
		_ = child.Process.Kill()
		_ = child.Wait()
		if err != nil {
			t.Fatal(err)
		}
		store, err := OpenStore(dir)
		if err != nil {
			t.Fatal(err)
		}
		onlyProven(t, store)
		store.Close()
	}
}

// A full disk needs a small file system of its own, and so needs root.
func TestFullDiskIsNamed(t *testing.T) {
	testneeds.Root(t)
	small := t.TempDir()
	if err := mountSmall(small); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = syscall.Unmount(small, 0) })
	store, err := OpenStore(filepath.Join(small, "store"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.Close() })
	blob := text(12<<20, 5)
	_, err = send(t, store, Offer{Blobs: []Offered{source(t, blob)}})
	var full *NoSpaceError
	if !errors.As(err, &full) || full.Path == "" {
		t.Fatalf("got %v", err)
	}
	onlyProven(t, store)
	if err := growSmall(small); err != nil {
		t.Fatal(err)
	}
	result, err := send(t, store, Offer{Blobs: []Offered{source(t, blob)}})
	if err != nil || result.ChunksDeduped == 0 {
		t.Fatalf("after making room: %+v, %v", result, err)
	}
	onlyProven(t, store)
}

func TestOpenForgetsTheChunksOfFinishedBlobsOnly(t *testing.T) {
	store := openStore(t)
	finished, unfinished := text(1<<20, 1), text(1<<20, 2)
	put(t, store, finished)
	// As if the writer was killed between the rename of the blob and the clean-up.
	putChunks(t, store, mustChunk(t, finished), finished)
	waiting := mustChunk(t, unfinished)
	putChunks(t, store, waiting, unfinished)
	reopened, err := OpenStore(store.Dir())
	if err != nil {
		t.Fatal(err)
	}
	defer reopened.Close()
	left, err := os.ReadDir(filepath.Join(store.Dir(), incomingDir))
	if err != nil || len(left) != len(waiting.Chunks) {
		t.Errorf("%d chunks are left, want %d, %v", len(left), len(waiting.Chunks), err)
	}
	if missing, err := reopened.Missing([]Digest{waiting.Chunks[0].Digest}); err != nil || len(missing) > 0 {
		t.Errorf("a chunk that waits for its blob is gone: %v", err)
	}
}
