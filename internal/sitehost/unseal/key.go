package unseal

import (
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
)

const (
	maxKey = 4 << 10
	// maxKeys are the one in force, and one that is to follow it.
	maxKeys = 2
)

// KeyFileError says why a key file is not used.
type KeyFileError struct{ Path, Problem string }

func (e *KeyFileError) Error() string { return fmt.Sprintf("unseal key %s: %s", e.Path, e.Problem) }

// checkKeyFile looks at the file without reading it.
func checkKeyFile(path string) error {
	info, err := os.Lstat(path)
	if err != nil {
		return fmt.Errorf("unseal key: %w", err)
	}
	return fit(path, info)
}

// fit refuses what someone else could have read or written.
func fit(path string, info os.FileInfo) error {
	owner, known := info.Sys().(*syscall.Stat_t)
	switch {
	case !info.Mode().IsRegular():
		return &KeyFileError{path, "it is not a plain file"}
	case info.Mode().Perm()&0o077 != 0:
		return &KeyFileError{path, fmt.Sprintf("others may use it (mode %04o), want 0600", info.Mode().Perm())}
	case known && int(owner.Uid) != os.Geteuid():
		return &KeyFileError{path, fmt.Sprintf("it belongs to user %d", owner.Uid)}
	case info.Size() > maxKey:
		return &KeyFileError{path, fmt.Sprintf("it has %d bytes", info.Size())}
	}
	return nil
}

// readKeys reads the file's keys, one a line. While the key rotates there are two,
// and either may be the one that is in force.
func readKeys(path string) ([]string, error) {
	file, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("unseal key: %w", err)
	}
	defer func() { _ = file.Close() }()
	info, err := file.Stat()
	if err != nil {
		return nil, fmt.Errorf("unseal key: %w", err)
	}
	if err := fit(path, info); err != nil {
		return nil, err
	}
	content, err := io.ReadAll(io.LimitReader(file, maxKey))
	if err != nil {
		return nil, fmt.Errorf("unseal key: %w", err)
	}
	defer clear(content)
	var keys []string
	for line := range strings.Lines(string(content)) {
		if key := strings.TrimSpace(line); key != "" {
			keys = append(keys, key)
		}
	}
	switch {
	case len(keys) == 0:
		return nil, &KeyFileError{path, "it is empty"}
	case len(keys) > maxKeys:
		return nil, &KeyFileError{path, fmt.Sprintf("it has %d lines, want one key a line and at most %d", len(keys), maxKeys)}
	}
	return keys, nil
}
