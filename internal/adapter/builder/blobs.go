package builder

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// blobStore is the local side of the content-addressed store.
type blobStore struct{ cacheDir string }

func (s blobStore) blobs() string   { return filepath.Join(s.cacheDir, "blobs", "sha256") }
func (s blobStore) scratch() string { return filepath.Join(s.cacheDir, "tmp") }
func (s blobStore) records() string { return filepath.Join(s.cacheDir, "builds") }
func (s blobStore) stats() string   { return filepath.Join(s.cacheDir, "digests") }

func (s blobStore) prepare() error {
	if s.cacheDir == "" {
		return errors.New("no cache folder is set")
	}
	for _, dir := range []string{s.blobs(), s.scratch(), s.records(), s.stats()} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return fmt.Errorf("prepare the cache: %w", err)
		}
	}
	return nil
}

func (s blobStore) path(digest string) string {
	return filepath.Join(s.blobs(), strings.TrimPrefix(digest, "sha256:"))
}

// find returns a blob that is already there. Its bytes were proven when it got
// its name; whoever receives it hashes it again.
func (s blobStore) find(digest, mediaType string) (LocalBlob, bool) {
	info, err := os.Stat(s.path(digest))
	if err != nil || !info.Mode().IsRegular() {
		return LocalBlob{}, false
	}
	return LocalBlob{Digest: digest, Size: info.Size(), Path: s.path(digest), MediaType: mediaType}, true
}

// pending is a blob being written: hashed on the way to a temporary file.
type pending struct {
	store  blobStore
	file   *os.File
	buffer *bufio.Writer
	hash   hash.Hash
	size   int64
}

func (s blobStore) create() (*pending, error) {
	file, err := os.CreateTemp(s.blobs(), ".incoming-")
	if err != nil {
		return nil, err
	}
	return &pending{store: s, file: file, buffer: bufio.NewWriterSize(file, 256<<10), hash: sha256.New()}, nil
}

func (p *pending) Write(data []byte) (int, error) {
	p.hash.Write(data)
	p.size += int64(len(data))
	return p.buffer.Write(data)
}

func (p *pending) discard() {
	_ = p.file.Close()
	_ = os.Remove(p.file.Name())
}

func (p *pending) digest() string { return "sha256:" + hex.EncodeToString(p.hash.Sum(nil)) }

// commit gives the blob its name; after an error discard is still due.
func (p *pending) commit(mediaType string) (LocalBlob, error) {
	digest := p.digest()
	final := p.store.path(digest)
	if blob, found := p.store.find(digest, mediaType); found && blob.Size == p.size {
		p.discard()
		return blob, nil
	}
	if err := p.buffer.Flush(); err != nil {
		return LocalBlob{}, err
	}
	if err := p.file.Sync(); err != nil {
		return LocalBlob{}, err
	}
	if err := p.file.Close(); err != nil {
		return LocalBlob{}, err
	}
	if err := os.Rename(p.file.Name(), final); err != nil {
		return LocalBlob{}, err
	}
	return LocalBlob{Digest: digest, Size: p.size, Path: final, MediaType: mediaType}, nil
}

// add streams into a new blob.
func (s blobStore) add(mediaType string, write func(*pending) error) (LocalBlob, error) {
	blob, err := s.create()
	if err != nil {
		return LocalBlob{}, err
	}
	if err := write(blob); err != nil {
		blob.discard()
		return LocalBlob{}, err
	}
	done, err := blob.commit(mediaType)
	if err != nil {
		blob.discard()
	}
	return done, err
}

func (s blobStore) addBytes(mediaType string, content []byte) (LocalBlob, error) {
	return s.add(mediaType, func(w *pending) error {
		_, err := w.Write(content)
		return err
	})
}

func (s blobStore) addFile(ctx context.Context, file, mediaType string) (LocalBlob, error) {
	return s.add(mediaType, func(w *pending) error { return copyFile(ctx, w, file) })
}

func copyFile(ctx context.Context, w io.Writer, file string) error {
	source, err := os.Open(file)
	if err != nil {
		return err
	}
	defer source.Close()
	if _, err := copyContext(ctx, w, source); err != nil {
		return fmt.Errorf("read %s: %w", file, err)
	}
	return nil
}

// fileDigest hashes a file, or recalls its digest while its identity, times
// and size are those of the last time.
func (s blobStore) fileDigest(ctx context.Context, file string) (string, error) {
	real, err := filepath.EvalSymlinks(file)
	if err != nil {
		return "", err
	}
	info, err := os.Stat(real)
	if err != nil {
		return "", err
	}
	if !info.Mode().IsRegular() {
		return "", fmt.Errorf("%s is not a regular file", file)
	}
	type remembered struct{ Identity, Digest string }
	name := sha256.Sum256([]byte(real))
	memory := filepath.Join(s.stats(), hex.EncodeToString(name[:16])+".json")
	current, changed, usable := identity(info)
	if usable {
		var last remembered
		if readJSON(memory, &last) == nil && last.Identity == current {
			if digest, err := parseDigest(last.Digest); err == nil {
				return digest, nil
			}
		}
	}
	// A file changed just now may change again within the clock's grain.
	settled := time.Since(changed) > 2*time.Second
	sum := sha256.New()
	if err := copyFile(ctx, sum, real); err != nil {
		return "", err
	}
	digest := "sha256:" + hex.EncodeToString(sum.Sum(nil))
	if err := unchanged(real, info); err != nil {
		return "", err
	}
	if usable && settled {
		if err := s.writeJSON(memory, remembered{current, digest}); err != nil {
			return "", err
		}
	}
	return digest, nil
}

// unchanged compares a file with what it was when reading began.
func unchanged(file string, before fs.FileInfo) error {
	after, err := os.Stat(file)
	if err != nil {
		return err
	}
	if !os.SameFile(before, after) || before.Size() != after.Size() || !before.ModTime().Equal(after.ModTime()) {
		return changedError(file)
	}
	return nil
}

// recordVersion is part of every record's key: raise it when the same input
// makes other bytes.
const recordVersion = 1

// recorded returns the result of an earlier build of the same inputs, or makes
// and records it.
func (b *builder) recorded(ctx context.Context, source string, inputs []string, work func() (Built, error)) (Built, error) {
	if err := ctx.Err(); err != nil {
		return Built{}, context.Cause(ctx)
	}
	artifact := b.Artifact
	key, err := json.Marshal(map[string]any{
		"version": recordVersion, "source": source, "inputs": inputs, "platform": b.Platform,
		"name": artifact.Name, "kind": artifact.Kind, "entrypoint": artifact.Entrypoint,
		"executable": artifact.Executable, "user": artifact.User, "stop_signal": artifact.StopSignal,
	})
	if err != nil {
		return Built{}, err
	}
	name := sha256.Sum256(key)
	file := filepath.Join(b.store.records(), hex.EncodeToString(name[:])+".json")
	if built, found := b.recall(file); found {
		return built, nil
	}
	built, err := work()
	if err != nil {
		return Built{}, err
	}
	return built, b.store.writeJSON(file, built)
}

func (b *builder) recall(file string) (Built, bool) {
	var built Built
	if readJSON(file, &built) != nil || len(built.Blobs) == 0 {
		return Built{}, false
	}
	for i, wanted := range built.Blobs {
		blob, found := b.store.find(wanted.Digest, wanted.MediaType)
		if !found || blob.Size != wanted.Size {
			return Built{}, false
		}
		built.Blobs[i] = blob
	}
	return built, true
}

func readJSON(file string, into any) error {
	content, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	return json.Unmarshal(content, into)
}

func (s blobStore) writeJSON(file string, value any) error {
	content, err := json.Marshal(value)
	if err != nil {
		return err
	}
	temporary, err := os.CreateTemp(filepath.Dir(file), ".incoming-")
	if err != nil {
		return err
	}
	defer os.Remove(temporary.Name())
	_, err = temporary.Write(content)
	if err := errors.Join(err, temporary.Close()); err != nil {
		return err
	}
	return os.Rename(temporary.Name(), file)
}

// contextReader ends a long copy when its context ends.
type contextReader struct {
	ctx    context.Context
	reader io.Reader
}

func (r contextReader) Read(data []byte) (int, error) {
	if r.ctx.Err() != nil {
		return 0, context.Cause(r.ctx)
	}
	return r.reader.Read(data)
}

func copyContext(ctx context.Context, w io.Writer, r io.Reader) (int64, error) {
	return io.CopyBuffer(w, contextReader{ctx, r}, make([]byte, 256<<10))
}
