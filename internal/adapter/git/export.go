package git

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"
)

// Export lays the files of a commit out in <cacheDir>/trees/<tree id> and
// returns that folder. A tree that is already there is not written again; one
// that is visible is whole.
func (r *Repository) Export(ctx context.Context, sha, cacheDir string) (string, error) {
	treeID, err := r.TreeID(ctx, sha)
	if err != nil {
		return "", err
	}
	trees := filepath.Join(cacheDir, "trees")
	final := filepath.Join(trees, treeID)
	if _, err := os.Stat(final); err == nil {
		return final, nil
	}
	if err := os.MkdirAll(trees, 0o700); err != nil {
		return "", fmt.Errorf("export commit %s: %w", sha, err)
	}
	temporary, err := os.MkdirTemp(trees, ".incoming-")
	if err != nil {
		return "", fmt.Errorf("export commit %s: %w", sha, err)
	}
	defer os.RemoveAll(temporary)
	if err := r.exportTo(ctx, treeID, temporary); err != nil {
		return "", fmt.Errorf("export commit %s: %w", sha, err)
	}
	if err := os.Rename(temporary, final); err != nil {
		// Another export of the same tree may have been faster.
		if _, statErr := os.Stat(final); statErr == nil {
			return final, nil
		}
		return "", fmt.Errorf("export commit %s: %w", sha, err)
	}
	return final, nil
}

func (r *Repository) exportTo(ctx context.Context, treeID, dir string) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	command := newCommand(ctx, r.root, "-c", "core.autocrlf=false", "archive", "--format=tar", treeID)
	var stderr bytes.Buffer
	command.Stderr = &stderr
	stdout, err := command.StdoutPipe()
	if err != nil {
		return err
	}
	if err := command.Start(); err != nil {
		return explain(ctx, "archive", "", err)
	}
	unpackErr := unpack(root, stdout)
	// What is left in the pipe would keep git from ending.
	_, drainErr := io.Copy(io.Discard, stdout)
	if err := command.Wait(); err != nil {
		return explain(ctx, "archive", stderr.String(), err)
	}
	if err := errors.Join(unpackErr, drainErr); err != nil {
		return err
	}
	return r.addOmitted(ctx, root, treeID)
}

// addOmitted writes the files that the export-ignore attribute keeps out of an
// archive: they are committed, so they count.
func (r *Repository) addOmitted(ctx context.Context, root *os.Root, treeID string) error {
	listing, err := run(ctx, r.root, "ls-tree", "-r", "-z", "--full-tree", treeID)
	if err != nil {
		return err
	}
	for entry := range strings.SplitSeq(string(listing), "\x00") {
		description, name, found := strings.Cut(entry, "\t")
		fields := strings.Fields(description)
		if !found || len(fields) != 3 || fields[1] != "blob" {
			continue
		}
		if _, err := root.Lstat(filepath.FromSlash(name)); err == nil {
			continue
		}
		content, err := run(ctx, r.root, "cat-file", "blob", fields[2])
		if err != nil {
			return err
		}
		header := &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644}
		switch fields[0] {
		case "120000":
			header.Typeflag, header.Linkname = tar.TypeSymlink, string(content)
		case "100755":
			header.Mode = 0o755
		}
		if err := unpackEntry(root, header, bytes.NewReader(content)); err != nil {
			return err
		}
	}
	return nil
}

func unpack(root *os.Root, archive io.Reader) error {
	reader := tar.NewReader(archive)
	for {
		header, err := reader.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read the archive: %w", err)
		}
		if err := unpackEntry(root, header, reader); err != nil {
			return err
		}
	}
}

// unpackEntry writes one entry below root. os.Root refuses paths that leave
// it, also by way of a symlink that an earlier entry made.
func unpackEntry(root *os.Root, header *tar.Header, content io.Reader) error {
	if header.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	name := path.Clean(strings.TrimSuffix(header.Name, "/"))
	if !filepath.IsLocal(filepath.FromSlash(name)) {
		return fmt.Errorf("the path %q leaves the repository", header.Name)
	}
	name = filepath.FromSlash(name)
	if parent := filepath.Dir(name); parent != "." {
		if err := root.MkdirAll(parent, 0o755); err != nil {
			return err
		}
	}
	switch header.Typeflag {
	case tar.TypeDir:
		return root.MkdirAll(name, 0o755)
	case tar.TypeSymlink:
		return root.Symlink(header.Linkname, name)
	case tar.TypeReg:
		// Git knows one bit of mode; the umask of an archive is not content.
		mode := fs.FileMode(0o644)
		if header.Mode&0o100 != 0 {
			mode = 0o755
		}
		file, err := root.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, mode)
		if err != nil {
			return err
		}
		_, err = io.Copy(file, content)
		if err := errors.Join(err, file.Close()); err != nil {
			return fmt.Errorf("write %s: %w", name, err)
		}
		if err := root.Chmod(name, mode); err != nil {
			return err
		}
		return root.Chtimes(name, time.Unix(0, 0), time.Unix(0, 0))
	default:
		return fmt.Errorf("%s has an unexpected type %q", header.Name, header.Typeflag)
	}
}
