package unseal

import (
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
)

const maxKey = 4 << 10

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

func readKey(path string) (string, error) {
	file, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return "", fmt.Errorf("unseal key: %w", err)
	}
	defer func() { _ = file.Close() }()
	info, err := file.Stat()
	if err != nil {
		return "", fmt.Errorf("unseal key: %w", err)
	}
	if err := fit(path, info); err != nil {
		return "", err
	}
	content, err := io.ReadAll(io.LimitReader(file, maxKey))
	if err != nil {
		return "", fmt.Errorf("unseal key: %w", err)
	}
	defer clear(content)
	key := strings.TrimSpace(string(content))
	if key == "" {
		return "", &KeyFileError{path, "it is empty"}
	}
	return key, nil
}
