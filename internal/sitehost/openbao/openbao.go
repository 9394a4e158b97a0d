// Package openbao guards OpenBao's storage on a host. Storage without the
// marker holds nothing that anyone has relied on yet: an initialization that
// was cut off before its keys were kept. With the marker it is never removed.
package openbao

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/nomad-site/site/internal/sitehost/atomicfile"
)

// DefaultFolder is where the storage lies on a host.
const DefaultFolder = "/var/lib/openbao"

const (
	marker = ".site-ready"
	// leaving begins the name of a folder whose content is being removed.
	leaving = ".site-wiped-"
)

// ReadyError says that storage which is in use was to be wiped.
type ReadyError struct{ Folder string }

func (e *ReadyError) Error() string {
	return fmt.Sprintf("refuse to wipe %s: it holds a site's secrets", e.Folder)
}

// Hint implements plan.Hinter.
func (e *ReadyError) Hint() string {
	return "nothing was changed; whoever means to lose all secrets removes " + filepath.Join(e.Folder, marker) + " by hand first"
}

// Storage is a folder.
type Storage string

// Status is what is known of a storage.
type Status struct {
	// Ready is set once the site's keys to it are safe.
	Ready bool `json:"ready"`
	// Data is set where there is anything else.
	Data bool `json:"data"`
}

// Status looks at the storage; a missing folder is an empty one.
func (s Storage) Status() (Status, error) {
	ready, err := s.ready()
	if err != nil {
		return Status{}, err
	}
	content, err := s.content()
	if err != nil {
		return Status{}, err
	}
	return Status{Ready: ready, Data: len(content) > 0}, nil
}

func (s Storage) ready() (bool, error) {
	// Whatever has the marker's name counts: when in doubt, nothing is removed.
	_, err := os.Lstat(filepath.Join(string(s), marker))
	if err == nil {
		return true, nil
	}
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return false, fmt.Errorf("look at the storage: %w", err)
}

func (s Storage) content() ([]string, error) {
	entries, err := os.ReadDir(string(s))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("look at the storage: %w", err)
	}
	var names []string
	for _, entry := range entries {
		name := entry.Name()
		if name != marker && name != "lost+found" && !strings.HasPrefix(name, leaving) && !strings.HasPrefix(name, "."+marker+".") {
			names = append(names, name)
		}
	}
	return names, nil
}

// Mark makes the storage one that is never wiped.
func (s Storage) Mark() error {
	const content = "The site's keys to this storage are safe. As long as this file is here, site never wipes it.\n"
	if err := atomicfile.Write(filepath.Join(string(s), marker), strings.NewReader(content), atomicfile.Options{Mode: 0o600}); err != nil {
		return fmt.Errorf("mark the storage: %w", err)
	}
	return nil
}

// Wipe removes the content of storage without the marker. The server must not
// run on it. All of it goes away under its names before the first byte does, so
// that a wipe that was cut off leaves no half storage.
func (s Storage) Wipe() error {
	ready, err := s.ready()
	if err != nil {
		return err
	}
	if ready {
		return &ReadyError{Folder: string(s)}
	}
	names, err := s.content()
	if err != nil {
		return err
	}
	if len(names) > 0 {
		aside, err := os.MkdirTemp(string(s), leaving+"*")
		if err != nil {
			return fmt.Errorf("wipe the storage: %w", err)
		}
		for _, name := range names {
			if err := os.Rename(filepath.Join(string(s), name), filepath.Join(aside, name)); err != nil {
				return fmt.Errorf("wipe the storage: %w", err)
			}
		}
		if err := atomicfile.SyncFolder(string(s)); err != nil {
			return fmt.Errorf("wipe the storage: %w", err)
		}
	}
	// Also what an earlier wipe left.
	left, err := filepath.Glob(filepath.Join(string(s), leaving+"*"))
	for _, each := range left {
		err = errors.Join(err, os.RemoveAll(each))
	}
	if err != nil {
		return fmt.Errorf("wipe the storage: %w", err)
	}
	return nil
}
