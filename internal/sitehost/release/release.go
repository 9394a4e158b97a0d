// Package release keeps the records of what was deployed: one JSON file per
// release on the first server host. They are the authority for a rollback; the
// Nomad variable only mirrors them.
package release

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/nomad-site/site/internal/sitehost/atomicfile"
)

// DefaultDir is where the records lie on a host.
const DefaultDir = "/var/lib/site/releases"

// Schema names the meaning of the fields.
const Schema = "site.release/v1"

// MaxSize bounds one record.
const MaxSize = 16 << 20

// Record is one release of a site.
type Record struct {
	Schema     string               `json:"schema"`
	ID         string               `json:"id"`
	Site       string               `json:"site"`
	GitSHA     string               `json:"git_sha"`
	Created    time.Time            `json:"created"`
	Components map[string]Component `json:"components"`
	// Status is the client's word for how far the rollout came.
	Status string `json:"status"`
}

// Component is what a release put there for one component.
type Component struct {
	SpecDigest string `json:"spec_digest"`
	// Jobspec is the full job as JSON text, so that a rollback needs no git. Its
	// templates name no generation of a secret: those are of the day.
	Jobspec string `json:"jobspec,omitempty"`
	// Secrets are the generations that the job's templates read, by full name.
	Secrets   map[string]int    `json:"secrets,omitempty"`
	Artifacts map[string]string `json:"artifacts"`
	GitSHA    string            `json:"git_sha"`
}

// An id is a file name: no dot in front, no separator.
var idGrammar = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$`)

// Decode reads and checks one record.
func Decode(input io.Reader) (Record, error) {
	content, err := io.ReadAll(io.LimitReader(input, MaxSize+1))
	if err != nil {
		return Record{}, fmt.Errorf("read release record: %w", err)
	}
	if len(content) > MaxSize {
		return Record{}, fmt.Errorf("read release record: longer than %d bytes", MaxSize)
	}
	var record Record
	decoder := json.NewDecoder(bytes.NewReader(content))
	decoder.DisallowUnknownFields() // a newer client's field must not be lost silently
	if err := decoder.Decode(&record); err != nil {
		return Record{}, fmt.Errorf("read release record: %w", err)
	}
	if _, err := decoder.Token(); !errors.Is(err, io.EOF) {
		return Record{}, errors.New("read release record: more than one JSON value")
	}
	switch {
	case record.Schema != Schema:
		return Record{}, fmt.Errorf("release record: schema %q, want %q", record.Schema, Schema)
	case !idGrammar.MatchString(record.ID):
		return Record{}, fmt.Errorf("release record: bad id %q", record.ID)
	case record.Site == "":
		return Record{}, fmt.Errorf("release record %s: no site", record.ID)
	case record.Created.IsZero():
		return Record{}, fmt.Errorf("release record %s: no creation time", record.ID)
	}
	return record, nil
}

// Dir is a folder of records.
type Dir string

// Put stores a record under its id, replacing an earlier state of it.
func (d Dir) Put(record Record) error {
	content, err := json.Marshal(record)
	if err != nil {
		return fmt.Errorf("store release record %s: %w", record.ID, err)
	}
	if err := os.MkdirAll(string(d), 0o700); err != nil {
		return fmt.Errorf("store release record %s: %w", record.ID, err)
	}
	return atomicfile.Write(d.path(record.ID), bytes.NewReader(append(content, '\n')), atomicfile.Options{Mode: 0o600})
}

// Show returns one record; errors.Is(err, fs.ErrNotExist) where there is none.
func (d Dir) Show(id string) (Record, error) {
	if !idGrammar.MatchString(id) {
		return Record{}, fmt.Errorf("show release record: bad id %q", id)
	}
	file, err := os.Open(d.path(id))
	if err != nil {
		return Record{}, fmt.Errorf("show release record: %w", err)
	}
	defer func() { _ = file.Close() }()
	record, err := Decode(file)
	if err != nil {
		return Record{}, fmt.Errorf("%s: %w", file.Name(), err)
	}
	if record.ID != id {
		return Record{}, fmt.Errorf("%s: holds the release %q", file.Name(), record.ID)
	}
	return record, nil
}

// List returns all records, newest first.
func (d Dir) List() ([]Record, error) {
	entries, err := os.ReadDir(string(d))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list release records: %w", err)
	}
	records := []Record{}
	for _, entry := range entries {
		id, isRecord := strings.CutSuffix(entry.Name(), ".json")
		if !isRecord || strings.HasPrefix(id, ".") { // the temporary file of a write
			continue
		}
		record, err := d.Show(id)
		if err != nil {
			return nil, err
		}
		records = append(records, record)
	}
	slices.SortFunc(records, func(a, b Record) int {
		if order := b.Created.Compare(a.Created); order != 0 {
			return order
		}
		return strings.Compare(b.ID, a.ID)
	})
	return records, nil
}

func (d Dir) path(id string) string { return filepath.Join(string(d), id+".json") }
