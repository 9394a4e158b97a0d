// Package atomicfile replaces small files so that a reader, a crash or a power
// cut sees either the old content or the new one.
package atomicfile

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// Options say who may read the file. The owner is left alone unless Chown is set.
type Options struct {
	Mode  fs.FileMode
	Chown bool
	UID   int
	GID   int
}

// Write replaces path by what content holds. The temporary file beside it is
// private from its first byte, whatever the umask; it gets its final mode
// before it becomes visible under path.
func Write(path string, content io.Reader, options Options) error {
	folder := filepath.Dir(path)
	temporary, err := os.CreateTemp(folder, "."+filepath.Base(path)+".*") // 0600
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	err = errors.Join(fill(temporary, content, options), temporary.Close())
	if err == nil {
		err = os.Rename(temporary.Name(), path)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("write %s: %w", path, err), os.Remove(temporary.Name()))
	}
	if err := SyncFolder(folder); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}

func fill(file *os.File, content io.Reader, options Options) error {
	if _, err := io.Copy(file, content); err != nil {
		return err
	}
	if options.Chown {
		if err := file.Chown(options.UID, options.GID); err != nil {
			return err
		}
	}
	if err := file.Chmod(options.Mode); err != nil {
		return err
	}
	return file.Sync()
}

// SyncFolder makes renames and removals in folder durable.
func SyncFolder(folder string) error {
	handle, err := os.Open(folder)
	if err != nil {
		return fmt.Errorf("sync folder: %w", err)
	}
	return errors.Join(handle.Sync(), handle.Close())
}

// Remove removes path durably; a missing file is no error.
func Remove(path string) error {
	if err := os.Remove(path); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return fmt.Errorf("remove: %w", err)
	}
	return SyncFolder(filepath.Dir(path))
}
