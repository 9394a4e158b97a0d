package builder

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/site"
)

// debs makes an image of unpacked .deb packages. Their install scripts do not
// run: the image holds files, not the effects of configuring them.
func (b *builder) debs(ctx context.Context) (Built, error) {
	artifact := b.Artifact
	switch {
	case artifact.Kind != site.Image:
		return Built{}, fmt.Errorf("deb packages make an image, but the kind is %s", artifact.Kind)
	case artifact.SHA256 != "":
		return Built{}, plan.WithHint(errors.New("a sha256 cannot be set with deb packages"), "each package has its digest in the lock")
	case b.Debs == nil:
		return Built{}, errors.New("no locked deb packages are at hand")
	}
	packages, err := b.Debs(ctx, artifact.DebPackages)
	if err != nil {
		return Built{}, fmt.Errorf("get deb packages %s: %w", strings.Join(artifact.DebPackages, ", "), err)
	}
	if len(packages) == 0 {
		return Built{}, fmt.Errorf("the lock gives no files for deb packages %s", strings.Join(artifact.DebPackages, ", "))
	}
	inputs := []string{scratchVersion()}
	for _, file := range packages {
		digest, err := b.store.fileDigest(ctx, file)
		if err != nil {
			return Built{}, err
		}
		inputs = append(inputs, digest)
	}
	built, err := b.recorded(ctx, "deb packages", inputs, func() (Built, error) { return b.unpackDebs(ctx, packages) })
	built.Source = fmt.Sprintf("%d deb packages (%s)", len(packages), strings.Join(artifact.DebPackages, ", "))
	return built, err
}

func (b *builder) unpackDebs(ctx context.Context, packages []string) (Built, error) {
	spoolFile, err := os.CreateTemp(b.store.scratch(), "debs-")
	if err != nil {
		return Built{}, err
	}
	defer os.Remove(spoolFile.Name())
	defer spoolFile.Close()
	spool := &spool{file: spoolFile, writer: bufio.NewWriterSize(spoolFile, 256<<10)}

	files := newFilesystem()
	if err := b.base(files); err != nil {
		return Built{}, err
	}
	// Every supported Debian has these merged; packages may still use the old names.
	for _, name := range []string{"bin", "sbin", "lib", "lib64"} {
		if err := errors.Join(files.dir("usr/"+name, 0o755), files.symlink(name, "usr/"+name)); err != nil {
			return Built{}, err
		}
	}
	for _, file := range packages {
		if err := unpackDeb(ctx, file, files, spool); err != nil {
			return Built{}, fmt.Errorf("unpack %s: %w", file, err)
		}
	}
	if err := spool.writer.Flush(); err != nil {
		return Built{}, err
	}
	entrypoint := b.Artifact.Entrypoint
	if len(entrypoint) == 0 && b.Artifact.Executable != "" {
		entrypoint = []string{b.Artifact.Executable}
	}
	return b.assemble(ctx, files, entrypoint)
}

// spool keeps the contents of packages one after the other, since the layer is
// written in the order of the paths and a later package may replace a file.
type spool struct {
	file   *os.File
	writer *bufio.Writer
	size   int64
}

func (s *spool) keep(ctx context.Context, content io.Reader) (func() (io.ReadCloser, error), error) {
	offset := s.size
	n, err := copyContext(ctx, s.writer, content)
	s.size += n
	return func() (io.ReadCloser, error) {
		return io.NopCloser(io.NewSectionReader(s.file, offset, n)), nil
	}, err
}

// unpackDeb reads the three members of a package: version, control, data.
func unpackDeb(ctx context.Context, file string, files *filesystem, spool *spool) error {
	opened, err := os.Open(file)
	if err != nil {
		return err
	}
	defer opened.Close()
	members := bufio.NewReaderSize(opened, 128<<10)
	magic := make([]byte, 8)
	if _, err := io.ReadFull(members, magic); err != nil || string(magic) != "!<arch>\n" {
		return errors.New("it is not a deb package")
	}
	control, data := false, false
	for {
		name, content, err := nextMember(members)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		switch {
		case strings.HasPrefix(name, "control.tar"):
			control = true
			err = eachEntry(content, func(header *tar.Header, content io.Reader) error {
				if path.Clean(header.Name) != "control" {
					return nil
				}
				return registerPackage(files, content)
			})
		case strings.HasPrefix(name, "data.tar"):
			data = true
			err = eachEntry(content, func(header *tar.Header, content io.Reader) error {
				return unpackDebEntry(ctx, files, spool, header, content)
			})
		}
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if _, err := io.Copy(io.Discard, content); err != nil {
			return err
		}
		// Members start at even offsets.
		if content.size%2 == 1 {
			if _, err := members.Discard(1); err != nil && !errors.Is(err, io.EOF) {
				return err
			}
		}
	}
	if !control || !data {
		return fmt.Errorf("it has no control or no data part: %w", io.ErrUnexpectedEOF)
	}
	return nil
}

// memberReader reads one member and minds that it is all there.
type memberReader struct {
	reader     io.Reader
	size, left int64
}

func (m *memberReader) Read(data []byte) (int, error) {
	if m.left == 0 {
		return 0, io.EOF
	}
	n, err := m.reader.Read(data[:min(int64(len(data)), m.left)])
	m.left -= int64(n)
	if errors.Is(err, io.EOF) && m.left > 0 {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// nextMember reads one header of an ar archive.
func nextMember(from io.Reader) (string, *memberReader, error) {
	header := make([]byte, 60)
	if _, err := io.ReadFull(from, header); err != nil {
		return "", nil, err
	}
	size, err := strconv.ParseInt(strings.TrimSpace(string(header[48:58])), 10, 64)
	if err != nil || size < 0 || !bytes.Equal(header[58:], []byte("`\n")) {
		return "", nil, errors.New("it has a damaged member header")
	}
	name := strings.TrimSuffix(strings.TrimSpace(string(header[:16])), "/")
	return name, &memberReader{reader: from, size: size, left: size}, nil
}

func eachEntry(packed io.Reader, visit func(*tar.Header, io.Reader) error) error {
	plain, _, err := decompress(packed)
	if err != nil {
		return err
	}
	defer plain.Close()
	reader := tar.NewReader(plain)
	for {
		header, err := reader.Next()
		if errors.Is(err, io.EOF) {
			// The packing has its own checksum behind the last entry.
			_, err := io.Copy(io.Discard, plain)
			return err
		}
		if err != nil {
			return err
		}
		if err := visit(header, reader); err != nil {
			return err
		}
	}
}

var packageField = regexp.MustCompile(`(?m)^Package:[ \t]*([a-z0-9][a-z0-9+.-]+)[ \t]*$`)

// registerPackage records a package where scanners look for it in images
// without a package manager.
func registerPackage(files *filesystem, from io.Reader) error {
	control, err := io.ReadAll(io.LimitReader(from, maxDocument))
	if err != nil {
		return err
	}
	name := packageField.FindSubmatch(control)
	if name == nil {
		return errors.New("the control file names no package")
	}
	return files.bytes("var/lib/dpkg/status.d/"+string(name[1]), 0o644, control)
}

func unpackDebEntry(ctx context.Context, files *filesystem, spool *spool, header *tar.Header, content io.Reader) error {
	node := &inode{header: tar.Header{
		Typeflag: header.Typeflag, Linkname: header.Linkname, Mode: header.Mode & 0o7777,
		Uid: header.Uid, Gid: header.Gid, ModTime: time.Unix(header.ModTime.Unix(), 0),
		Devmajor: header.Devmajor, Devminor: header.Devminor,
	}}
	switch header.Typeflag {
	case tar.TypeReg:
		open, err := spool.keep(ctx, content)
		if err != nil {
			return fmt.Errorf("%s: %w", header.Name, err)
		}
		node.open, node.header.Size = open, header.Size
	case tar.TypeLink:
		return files.link(header.Name, header.Linkname)
	case tar.TypeDir, tar.TypeSymlink, tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
	default:
		return fmt.Errorf("%s has an unexpected type %q", header.Name, header.Typeflag)
	}
	return files.put(header.Name, node)
}
