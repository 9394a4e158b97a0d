// Package collect removes from a host what its site needs no more: names that are
// not on the list of what is kept, and blobs that no name lists. Without a list
// nothing is removed.
package collect

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	"github.com/nomad-site/site/internal/blob"
	"github.com/nomad-site/site/internal/sitehost/atomicfile"
)

// maxList bounds the list.
const maxList = 16 << 20

// ListPath is where the list for a store lies: beside it, out of reach of who
// only serves from there.
func ListPath(store string) string { return strings.TrimSuffix(store, "/") + "-keep.json" }

// list is its content: names as "site/artifact@sha256:…".
type list struct {
	Names []string `json:"names"`
}

// WriteList replaces the list by what input holds, once all of it was understood.
func WriteList(path string, input io.Reader) (names int, err error) {
	content, err := io.ReadAll(io.LimitReader(input, maxList+1))
	if err != nil {
		return 0, fmt.Errorf("read the list of what is kept: %w", err)
	}
	parsed, err := parseList(content)
	if err != nil {
		return 0, err
	}
	if err := atomicfile.Write(path, bytes.NewReader(content), atomicfile.Options{Mode: 0o600}); err != nil {
		return 0, fmt.Errorf("keep the list of what is kept: %w", err)
	}
	return len(parsed), nil
}

// ReadList reads the list; there is false where there is none.
func ReadList(path string) (kept map[string]bool, there bool, err error) {
	content, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, fmt.Errorf("read the list of what is kept: %w", err)
	}
	kept, err = parseList(content)
	return kept, err == nil, err
}

func parseList(content []byte) (map[string]bool, error) {
	if len(content) > maxList {
		return nil, fmt.Errorf("list of what is kept: more than %d bytes", maxList)
	}
	decoder := json.NewDecoder(bytes.NewReader(content))
	decoder.DisallowUnknownFields()
	var parsed list
	if err := decoder.Decode(&parsed); err != nil {
		return nil, fmt.Errorf("list of what is kept: %w", err)
	}
	if _, err := decoder.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("list of what is kept: something follows it")
	}
	if parsed.Names == nil {
		return nil, errors.New("list of what is kept: it has no names; an empty list is []")
	}
	kept := make(map[string]bool, len(parsed.Names))
	for _, name := range parsed.Names {
		if _, _, _, err := splitName(name); err != nil {
			return nil, err
		}
		kept[name] = true
	}
	return kept, nil
}

func splitName(name string) (site, artifact string, digest blob.Digest, err error) {
	before, after, found := strings.Cut(name, "@")
	site, artifact, parts := strings.Cut(before, "/")
	digest, err = blob.ParseDigest(after)
	if err != nil || !found || !parts || site == "" || artifact == "" || strings.Contains(artifact, "/") {
		return "", "", "", fmt.Errorf("name %.200q: want site/artifact@sha256:…", name)
	}
	return site, artifact, digest, nil
}
