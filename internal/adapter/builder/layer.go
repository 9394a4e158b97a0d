package builder

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"slices"
	"strings"
	"time"
)

// filesystem collects what one layer holds. It is written in the order of the
// paths, so that the same content is the same bytes.
type filesystem struct{ nodes map[string]*inode }

// inode is a file, a folder or a symlink; hard links share one.
type inode struct {
	header  tar.Header
	implied bool // a parent nobody described
	open    func() (io.ReadCloser, error)
}

func newFilesystem() *filesystem { return &filesystem{nodes: map[string]*inode{}} }

// put places an entry, adds its missing parents, and follows symlinked parents
// as unpacking onto a disk would: a package's /lib/x lands in /usr/lib/x where
// /lib is a link.
func (f *filesystem) put(name string, node *inode) error {
	name, err := f.resolveParent(name)
	if err != nil {
		return err
	}
	if name == "." {
		return nil
	}
	if existing := f.nodes[name]; existing != nil && node.header.Typeflag == tar.TypeDir {
		// An unpacked folder keeps what is there, also a symlink to a folder.
		if existing.header.Typeflag == tar.TypeSymlink || (existing.header.Typeflag == tar.TypeDir && !existing.implied) {
			return nil
		}
	} else if existing != nil && existing.header.Typeflag == tar.TypeDir {
		return fmt.Errorf("%s is a folder in one place and not in another", name)
	}
	f.nodes[name] = node
	for parent := path.Dir(name); parent != "."; parent = path.Dir(parent) {
		if f.nodes[parent] == nil {
			f.nodes[parent] = &inode{implied: true, header: tar.Header{Typeflag: tar.TypeDir, Mode: 0o755, ModTime: time.Unix(0, 0)}}
		} else if f.nodes[parent].header.Typeflag != tar.TypeDir {
			return fmt.Errorf("%s is below %s, which is not a folder", name, parent)
		}
	}
	return nil
}

// link gives an existing file another name.
func (f *filesystem) link(name, target string) error {
	target, err := f.resolveParent(target)
	if err != nil {
		return err
	}
	node := f.nodes[target]
	if node == nil || node.header.Typeflag == tar.TypeDir {
		return fmt.Errorf("%s is a hard link to %s, which is not there", name, target)
	}
	return f.put(name, node)
}

// resolveParent replaces symlinked folders in a path. It cannot leave the root.
func (f *filesystem) resolveParent(name string) (string, error) {
	rest := strings.Split(strings.Trim(path.Clean("/"+name), "/"), "/")
	resolved := ""
	for links := 0; len(rest) > 1; {
		next := path.Join(resolved, rest[0])
		rest = rest[1:]
		node := f.nodes[next]
		if node == nil || node.header.Typeflag != tar.TypeSymlink {
			resolved = next
			continue
		}
		if links++; links > 40 {
			return "", fmt.Errorf("%s has too many symlinks above it", name)
		}
		target := node.header.Linkname
		if !path.IsAbs(target) {
			target = path.Join("/", path.Dir(next), target)
		}
		if target = strings.Trim(path.Clean(target), "/"); target != "" {
			rest = append(strings.Split(target, "/"), rest...)
		}
		resolved = ""
	}
	last := path.Clean(path.Join(resolved, rest[0]))
	if last == "" {
		last = "."
	}
	return last, nil
}

func (f *filesystem) dir(name string, mode int64) error {
	return f.put(name, &inode{header: tar.Header{Typeflag: tar.TypeDir, Mode: mode, ModTime: time.Unix(0, 0)}})
}

func (f *filesystem) symlink(name, target string) error {
	return f.put(name, &inode{header: tar.Header{Typeflag: tar.TypeSymlink, Linkname: target, Mode: 0o777, ModTime: time.Unix(0, 0)}})
}

func (f *filesystem) bytes(name string, mode int64, content []byte) error {
	return f.put(name, &inode{
		header: tar.Header{Typeflag: tar.TypeReg, Mode: mode, Size: int64(len(content)), ModTime: time.Unix(0, 0)},
		open:   func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(content)), nil },
	})
}

func (f *filesystem) file(name string, mode int64, source string) error {
	info, err := os.Stat(source)
	if err != nil {
		return err
	}
	return f.put(name, &inode{
		header: tar.Header{Typeflag: tar.TypeReg, Mode: mode, Size: info.Size(), ModTime: time.Unix(0, 0)},
		open:   func() (io.ReadCloser, error) { return os.Open(source) },
	})
}

// write streams the layer's tar.
func (f *filesystem) write(ctx context.Context, w io.Writer) error {
	archive := tar.NewWriter(w)
	first := map[*inode]string{}
	for _, name := range slices.Sorted(maps.Keys(f.nodes)) {
		node := f.nodes[name]
		header := node.header
		header.Name = name
		if header.Typeflag == tar.TypeDir {
			header.Name += "/"
		}
		earlier, again := first[node]
		if again {
			header.Typeflag, header.Linkname, header.Size = tar.TypeLink, earlier, 0
		}
		first[node] = name
		if err := archive.WriteHeader(&header); err != nil {
			return fmt.Errorf("write %s: %w", name, err)
		}
		if node.open == nil || again {
			continue
		}
		if err := copyNode(ctx, archive, node); err != nil {
			return fmt.Errorf("write %s: %w", name, err)
		}
	}
	return archive.Close()
}

func copyNode(ctx context.Context, w io.Writer, node *inode) error {
	content, err := node.open()
	if err != nil {
		return err
	}
	defer content.Close()
	_, err = copyContext(ctx, w, content)
	return err
}
