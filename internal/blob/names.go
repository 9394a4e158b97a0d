package blob

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"regexp"
	"slices"
	"syscall"
	"time"
)

// The kinds of a Name.
const (
	KindImage = "image"
	KindFile  = "file"
)

const maxNameBytes = 1 << 20

// Name publishes a blob: only blobs listed under a name are served for it.
type Name struct {
	Site     string `json:"-"`
	Artifact string `json:"-"`

	// Kind is KindImage (Digest is an image manifest) or KindFile.
	Kind   string `json:"kind"`
	Digest Digest `json:"digest"`
	// Size is the length of a file, or of all blobs of an image together.
	Size int64 `json:"size"`
	// Platform artifacts are never evicted.
	Platform bool      `json:"platform"`
	Created  time.Time `json:"created"`
	// Blobs are all that is served under the name, Digest included.
	Blobs []Digest `json:"blobs"`
}

func (n Name) String() string { return n.Site + "/" + n.Artifact + "@" + string(n.Digest) }

// namePart is what the registry dialect allows as one part of a repository
// name: no leading dot, no "..", no slash.
var namePart = regexp.MustCompile(`^[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*$`)

func checkNamePart(kind, text string) error {
	const longest = 100
	if len(text) > longest || !namePart.MatchString(text) {
		return fmt.Errorf("%s name %.120q: want lower-case letters and digits, joined by . _ or -", kind, text)
	}
	return nil
}

// Validate checks all of a name but whether its blobs are there.
func (n Name) Validate() error {
	if err := errors.Join(checkNamePart("site", n.Site), checkNamePart("artifact", n.Artifact)); err != nil {
		return err
	}
	if n.Kind != KindImage && n.Kind != KindFile {
		return fmt.Errorf("name %s: kind %.20q is neither image nor file", n, n.Kind)
	}
	const mostBlobs = 4096
	if n.Size < 0 || len(n.Blobs) > mostBlobs {
		return fmt.Errorf("name %s: size %d or %d blobs out of range", n, n.Size, len(n.Blobs))
	}
	for _, digest := range append([]Digest{n.Digest}, n.Blobs...) {
		if _, err := ParseDigest(string(digest)); err != nil {
			return fmt.Errorf("name %s: %w", n, err)
		}
	}
	if !slices.Contains(n.Blobs, n.Digest) {
		return fmt.Errorf("name %s: its own digest is not among its blobs", n)
	}
	return nil
}

// same ignores when a name was made.
func (n Name) same(other Name) bool {
	return n.Site == other.Site && n.Artifact == other.Artifact && n.Kind == other.Kind &&
		n.Digest == other.Digest && n.Size == other.Size && n.Platform == other.Platform &&
		slices.Equal(n.Blobs, other.Blobs)
}

// PutName publishes name; every blob of it must be there. An equal name is left
// as it is, so that publishing twice writes nothing.
func (s *Store) PutName(name Name) error {
	if err := name.Validate(); err != nil {
		return err
	}
	unlock, err := s.lock(syscall.LOCK_SH)
	if err != nil {
		return err
	}
	defer unlock()
	for _, digest := range name.Blobs {
		present, err := s.Has(digest)
		if err != nil {
			return err
		}
		if !present {
			return fmt.Errorf("publish %s: blob %s: %w", name, digest, fs.ErrNotExist)
		}
	}
	if published, err := s.publishedAs(name); err != nil || published {
		return err
	}
	if name.Created.IsZero() {
		name.Created = time.Now().UTC()
	}
	encoded, err := json.Marshal(name)
	if err != nil {
		return fmt.Errorf("publish %s: %w", name, err)
	}
	site := path.Join(namesDir, name.Site)
	artifact := path.Join(site, name.Artifact)
	for _, dir := range []string{site, artifact} {
		if err := s.makeDir(dir); err != nil {
			return err
		}
		if err := s.syncDir(path.Dir(dir)); err != nil {
			return err
		}
	}
	return s.write(artifact, name.Digest.Hex()+jsonSuffix, true, func(w io.Writer) error {
		_, err := w.Write(encoded)
		return err
	})
}

// publishedAs reports whether exactly this name is published.
func (s *Store) publishedAs(name Name) (bool, error) {
	old, err := s.Name(name.Site, name.Artifact, name.Digest)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	var unreadable *nameError
	if errors.As(err, &unreadable) {
		return false, nil
	}
	return err == nil && old.same(name), err
}

// nameError says that a name's file cannot be understood; it is written anew.
type nameError struct{ err error }

func (e *nameError) Error() string { return e.err.Error() }
func (e *nameError) Unwrap() error { return e.err }

// Name finds what is published; an fs.ErrNotExist error where nothing is.
func (s *Store) Name(site, artifact string, digest Digest) (Name, error) {
	if err := errors.Join(checkNamePart("site", site), checkNamePart("artifact", artifact)); err != nil {
		return Name{}, err
	}
	if _, err := ParseDigest(string(digest)); err != nil {
		return Name{}, err
	}
	data, err := s.readFile(path.Join(namesDir, site, artifact), digest.Hex()+jsonSuffix, maxNameBytes)
	if err != nil {
		return Name{}, err
	}
	decoder := json.NewDecoder(bytes.NewReader(data))
	decoder.DisallowUnknownFields()
	name := Name{Site: site, Artifact: artifact}
	if err := decoder.Decode(&name); err != nil {
		return Name{}, &nameError{fmt.Errorf("name %s/%s@%s: %w", site, artifact, digest, err)}
	}
	if err := name.Validate(); err != nil {
		return Name{}, &nameError{err}
	}
	if name.Digest != digest {
		return Name{}, &nameError{fmt.Errorf("name %s/%s@%s: holds %s", site, artifact, digest, name.Digest)}
	}
	return name, nil
}

// Names lists all that is published, by site, artifact and digest. A file that
// cannot be understood is left out: it serves nothing.
func (s *Store) Names() ([]Name, error) {
	var out []Name
	sites, err := s.subdirs(namesDir)
	if err != nil {
		return nil, err
	}
	for _, site := range sites {
		artifacts, err := s.subdirs(path.Join(namesDir, site))
		if err != nil {
			return nil, err
		}
		for _, artifact := range artifacts {
			names, err := s.ArtifactNames(site, artifact)
			if err != nil {
				return nil, err
			}
			out = append(out, names...)
		}
	}
	return out, nil
}

// ArtifactNames lists what is published of one artifact, sorted by digest.
func (s *Store) ArtifactNames(site, artifact string) ([]Name, error) {
	if err := errors.Join(checkNamePart("site", site), checkNamePart("artifact", artifact)); err != nil {
		return nil, err
	}
	var out []Name
	err := s.eachFile(path.Join(namesDir, site, artifact), func(_ *os.Root, file string) error {
		digest, err := ParseDigest(digestPrefix + trimJSON(file))
		if err != nil {
			return nil
		}
		name, err := s.Name(site, artifact, digest)
		var unreadable *nameError
		if errors.As(err, &unreadable) {
			return nil
		}
		if err == nil {
			out = append(out, name)
		}
		return err
	})
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return out, err
}

// DeleteName unpublishes; its blobs stay. Deleting what is not there is done already.
func (s *Store) DeleteName(site, artifact string, digest Digest) error {
	if err := errors.Join(checkNamePart("site", site), checkNamePart("artifact", artifact)); err != nil {
		return err
	}
	if _, err := ParseDigest(string(digest)); err != nil {
		return err
	}
	unlock, err := s.lock(syscall.LOCK_EX)
	if err != nil {
		return err
	}
	defer unlock()
	where := path.Join(namesDir, site, artifact)
	dir, err := s.openDir(where)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := dir.Remove(digest.Hex() + jsonSuffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("delete %s: %w", s.path(where, digest.Hex()+jsonSuffix), err)
	}
	return s.syncDir(where)
}

func (s *Store) subdirs(dir string) ([]string, error) {
	folder, err := s.openDir(dir)
	if err != nil {
		return nil, err
	}
	defer folder.Close()
	entries, err := fs.ReadDir(folder.FS(), ".")
	if err != nil {
		return nil, fmt.Errorf("list %s: %w", s.path(dir), err)
	}
	var out []string
	for _, entry := range entries {
		if !entry.IsDir() {
			return nil, &UnsafeEntryError{Path: s.path(dir, entry.Name())}
		}
		if namePart.MatchString(entry.Name()) {
			out = append(out, entry.Name())
		}
	}
	return out, nil
}
