package toolchain

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
)

const manifestFile = "manifest.json"

// manifest records what was installed; Verify holds the disk against it.
type manifest struct {
	Version   int    `json:"version"`
	Tool      string `json:"tool"`
	Release   string `json:"release"`
	Platform  string `json:"platform"`
	Pin       string `json:"pin"`
	GoVersion string `json:"go_version,omitempty"`
	Files     []file `json:"files"`
}

type file struct {
	Path string `json:"path"`
	// Link is a symbolic link's target; such a file has no digest.
	Link   string `json:"link,omitempty"`
	SHA256 string `json:"sha256,omitempty"`
	Size   int64  `json:"size,omitempty"`
	Mode   string `json:"mode,omitempty"`
}

func readManifest(folder string) (manifest, error) {
	content, err := os.ReadFile(filepath.Join(folder, manifestFile))
	if err != nil {
		return manifest{}, err
	}
	var recorded manifest
	if err := json.Unmarshal(content, &recorded); err != nil {
		return manifest{}, fmt.Errorf("read %s: %w", filepath.Join(folder, manifestFile), err)
	}
	return recorded, nil
}

func (m manifest) write(folder string) error {
	content, err := json.MarshalIndent(m, "", " ")
	if err != nil {
		return err
	}
	return writeFile(filepath.Join(folder, manifestFile), append(content, '\n'), 0o644)
}

// scan lists everything below folder but the manifest, sorted by path.
func scan(folder string) ([]file, error) {
	var files []file
	err := filepath.WalkDir(folder, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		relative, err := filepath.Rel(folder, path)
		if err != nil || relative == manifestFile {
			return err
		}
		found, err := describe(path, entry)
		found.Path = filepath.ToSlash(relative)
		files = append(files, found)
		return err
	})
	sort.Slice(files, func(i, j int) bool { return files[i].Path < files[j].Path })
	return files, err
}

func describe(path string, entry fs.DirEntry) (file, error) {
	if entry.Type()&fs.ModeSymlink != 0 {
		target, err := os.Readlink(path)
		if err != nil || !filepath.IsAbs(target) {
			return file{Link: target}, err
		}
		// A tool given by path is a link out of the root: its bytes count.
		sum, size, err := digestFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
		return file{Link: target, SHA256: sum, Size: size}, err
	}
	if !entry.Type().IsRegular() {
		return file{}, fmt.Errorf("%s is neither a file nor a link", path)
	}
	info, err := entry.Info()
	if err != nil {
		return file{}, err
	}
	sum, size, err := digestFile(path)
	return file{SHA256: sum, Size: size, Mode: fmt.Sprintf("%04o", info.Mode().Perm())}, err
}

func digestFile(path string) (string, int64, error) {
	opened, err := os.Open(path)
	if err != nil {
		return "", 0, err
	}
	defer opened.Close()
	hash := sha256.New()
	size, err := io.Copy(hash, opened)
	if err != nil {
		return "", 0, fmt.Errorf("read %s: %w", path, err)
	}
	return hex.EncodeToString(hash.Sum(nil)), size, nil
}

// compare says in words how the disk differs from what was recorded.
func (m manifest) compare(actual []file) []string {
	there := map[string]file{}
	for _, found := range actual {
		there[found.Path] = found
	}
	var differences []string
	for _, want := range m.Files {
		found, ok := there[want.Path]
		delete(there, want.Path)
		switch {
		case !ok:
			differences = append(differences, want.Path+" is missing")
		case found.Link != want.Link:
			differences = append(differences, fmt.Sprintf("%s links to %q, recorded %q", want.Path, found.Link, want.Link))
		case found.SHA256 != want.SHA256:
			differences = append(differences, fmt.Sprintf("%s has sha256 %s, recorded %s", want.Path, orNone(found.SHA256), want.SHA256))
		case found.Mode != want.Mode:
			differences = append(differences, fmt.Sprintf("%s has mode %s, recorded %s", want.Path, found.Mode, want.Mode))
		}
	}
	for path := range there {
		differences = append(differences, path+" was not there at install")
	}
	sort.Strings(differences)
	return differences
}

func orNone(text string) string {
	if text == "" {
		return "none"
	}
	return text
}

// writeFile makes a file that is either whole or not there.
func writeFile(path string, content []byte, mode fs.FileMode) error {
	temporary, err := os.CreateTemp(filepath.Dir(path), ".new-*")
	if err != nil {
		return err
	}
	defer os.Remove(temporary.Name())
	_, err = temporary.Write(content)
	err = errors.Join(err, temporary.Chmod(mode), temporary.Sync(), temporary.Close())
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return os.Rename(temporary.Name(), path)
}
