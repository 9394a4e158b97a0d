package builder

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/bzip2"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
)

// maxDocument bounds what of an archive is read into memory: its JSON files.
const maxDocument = 16 << 20

// archive gives access by name to the files of an image archive.
type archive interface {
	open(name string) (io.ReadCloser, error)
	io.Closer
}

// tarArchive reads members of a tar in place: the index is made in one pass
// that skips over the contents.
type tarArchive struct {
	file    *os.File
	members map[string]member
}

type member struct {
	offset, size int64
	link         string
}

var (
	_ archive = (*tarArchive)(nil)
	_ archive = folderArchive{}
)

// openArchive opens a folder or a tar, which may be compressed as a whole.
func (b *builder) openArchive(ctx context.Context, at place) (archive, error) {
	if at.dir {
		return folderArchive{dir: at.path, within: at.within}, nil
	}
	file, err := os.Open(at.path)
	if err != nil {
		return nil, err
	}
	opened, err := b.indexTar(ctx, file)
	if err != nil {
		_ = file.Close()
		return nil, err
	}
	return opened, nil
}

func (b *builder) indexTar(ctx context.Context, file *os.File) (archive, error) {
	plain, kind, err := decompress(file)
	if err != nil {
		return nil, err
	}
	defer plain.Close()
	if kind == "" {
		if _, err := file.Seek(0, io.SeekStart); err != nil {
			return nil, err
		}
		members, err := indexMembers(ctx, file)
		return &tarArchive{file: file, members: members}, err
	}
	// Members of a compressed tar cannot be found again without reading all.
	unpacked, err := os.CreateTemp(b.store.scratch(), "archive-")
	if err != nil {
		return nil, err
	}
	// Unlinked at once: the open file is all that is needed.
	_ = os.Remove(unpacked.Name())
	if _, err = copyContext(ctx, unpacked, plain); err == nil {
		_, err = unpacked.Seek(0, io.SeekStart)
	}
	var members map[string]member
	if err == nil {
		members, err = indexMembers(ctx, unpacked)
	}
	if err != nil {
		_ = unpacked.Close()
		return nil, err
	}
	_ = file.Close()
	return &tarArchive{file: unpacked, members: members}, nil
}

func indexMembers(ctx context.Context, file *os.File) (map[string]member, error) {
	members := map[string]member{}
	reader := tar.NewReader(file)
	for {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		header, err := reader.Next()
		if errors.Is(err, io.EOF) {
			return members, nil
		}
		if err != nil {
			return nil, fmt.Errorf("not a whole tar: %w", err)
		}
		name := path.Clean(header.Name)
		switch header.Typeflag {
		case tar.TypeReg:
			// The reader has just read the header and nothing beyond it.
			offset, err := file.Seek(0, io.SeekCurrent)
			if err != nil {
				return nil, err
			}
			members[name] = member{offset: offset, size: header.Size}
		case tar.TypeSymlink:
			members[name] = member{link: path.Join(path.Dir(name), header.Linkname)}
		case tar.TypeLink:
			members[name] = member{link: path.Clean(header.Linkname)}
		}
	}
}

func (a *tarArchive) open(name string) (io.ReadCloser, error) {
	name = path.Clean(name)
	for range 10 {
		found, ok := a.members[name]
		if !ok {
			return nil, fmt.Errorf("%s is not in the archive: %w", name, fs.ErrNotExist)
		}
		if found.link == "" {
			return io.NopCloser(io.NewSectionReader(a.file, found.offset, found.size)), nil
		}
		name = found.link
	}
	return nil, fmt.Errorf("%s is a link to itself", name)
}

func (a *tarArchive) Close() error { return a.file.Close() }

// folderArchive is an image layout laid out in a folder.
type folderArchive struct{ dir, within string }

func (a folderArchive) open(name string) (io.ReadCloser, error) {
	if !filepath.IsLocal(filepath.FromSlash(name)) {
		return nil, fmt.Errorf("%q leaves the image layout", name)
	}
	file := filepath.Join(a.dir, filepath.FromSlash(name))
	if err := inside(a.within, file); err != nil {
		return nil, err
	}
	return os.Open(file)
}

func (a folderArchive) Close() error { return nil }

func readDocument(from archive, name string) ([]byte, error) {
	file, err := from.open(name)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	content, err := io.ReadAll(io.LimitReader(file, maxDocument+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	if len(content) > maxDocument {
		return nil, fmt.Errorf("%s is larger than %d bytes", name, maxDocument)
	}
	return content, nil
}

func decodeDocument(from archive, name string, into any) error {
	content, err := readDocument(from, name)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(content, into); err != nil {
		return fmt.Errorf("read %s: %w", name, err)
	}
	return nil
}

// decompress looks at the first bytes for what a stream is packed with; kind
// is empty for a plain one. Names and media types are not to be trusted in
// this: archives with mixed layers exist.
func decompress(from io.Reader) (plain io.ReadCloser, kind string, err error) {
	buffered := bufio.NewReaderSize(from, 128<<10)
	head, err := buffered.Peek(6)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, "", err
	}
	switch {
	case bytes.HasPrefix(head, []byte{0x1f, 0x8b}):
		reader, err := gzip.NewReader(buffered)
		return reader, "gzip", err
	case bytes.HasPrefix(head, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		reader, err := zstd.NewReader(buffered, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(128<<20))
		if err != nil {
			return nil, "", err
		}
		return reader.IOReadCloser(), "zstd", nil
	case bytes.HasPrefix(head, []byte{0xfd, '7', 'z', 'X', 'Z', 0}):
		reader, err := xz.NewReader(buffered)
		return io.NopCloser(reader), "xz", err
	case bytes.HasPrefix(head, []byte("BZh")):
		return io.NopCloser(bzip2.NewReader(buffered)), "bzip2", nil
	}
	return io.NopCloser(buffered), "", nil
}

func readHead(file string, size int) ([]byte, error) {
	opened, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer opened.Close()
	head := make([]byte, size)
	n, err := io.ReadFull(opened, head)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
		return nil, err
	}
	return head[:n], nil
}
