package blob

import (
	"bytes"
	"fmt"
	"io"
	"os"
)

// Source is where the bytes of a blob can be read again, in any order.
type Source interface {
	// Name is what errors call it, such as a path.
	Name() string
	Digest() Digest
	Size() int64
	Open() (SourceReader, error)
}

// SourceReader is an open source.
type SourceReader interface {
	io.ReaderAt
	io.Closer
}

type fileSource struct {
	path   string
	digest Digest
	size   int64
}

// FileSource is the file at path, whose digest the caller knows. Sending
// checks it again.
func FileSource(path string, digest Digest) (Source, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s: not a regular file", path)
	}
	if !digest.Valid() {
		_, err := ParseDigest(string(digest))
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return &fileSource{path: path, digest: digest, size: info.Size()}, nil
}

// HashFile is FileSource for a file whose digest is not known yet.
func HashFile(path string) (Source, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	digest, _, err := DigestReader(file)
	if err != nil {
		return nil, fmt.Errorf("hash %s: %w", path, err)
	}
	return FileSource(path, digest)
}

func (f *fileSource) Name() string   { return f.path }
func (f *fileSource) Digest() Digest { return f.digest }
func (f *fileSource) Size() int64    { return f.size }

func (f *fileSource) Open() (SourceReader, error) { return os.Open(f.path) }

type bytesSource struct {
	name    string
	digest  Digest
	content []byte
}

// BytesSource is content in memory, such as an image config; errors call it name.
func BytesSource(name string, content []byte) Source {
	return &bytesSource{name: name, digest: DigestOf(content), content: content}
}

func (b *bytesSource) Name() string   { return b.name }
func (b *bytesSource) Digest() Digest { return b.digest }
func (b *bytesSource) Size() int64    { return int64(len(b.content)) }

func (b *bytesSource) Open() (SourceReader, error) {
	return struct {
		io.ReaderAt
		io.Closer
	}{bytes.NewReader(b.content), io.NopCloser(nil)}, nil
}
