// Package journal keeps the host's own record of rotations: what happened, one
// event per line, and what is known of each secret's generation, so that a look
// at what is due costs one round trip. It never holds a value.
package journal

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/nomad-site/site/internal/sitehost/atomicfile"
)

// DefaultDir is where the journal lies on a host.
const DefaultDir = "/var/lib/site/journal"

const (
	eventsFile  = "rotations.jsonl"
	oldFile     = "rotations.1.jsonl"
	summaryFile = "secrets.json"

	// maxEvents bounds the file of events, in bytes; the one before is kept too.
	maxEvents = 4 << 20
	// maxInput bounds one event and the summary.
	maxInput = 4 << 20
)

// Event is one thing that a rotation did.
type Event struct {
	Time time.Time `json:"time"`
	// What is "minted", "canaries healthy", "promoted", "retired", "failed", …
	What string `json:"what"`
	// Name is that of the secret, or of what else was rotated, such as "ca".
	Name string `json:"name"`
	// Generation is zero where there is none.
	Generation int    `json:"generation,omitempty"`
	By         string `json:"by,omitempty"`
	Detail     string `json:"detail,omitempty"`
}

// Dir is the journal's folder.
type Dir string

// Append adds events durably.
func (d Dir) Append(events []Event) error {
	if err := os.MkdirAll(string(d), 0o700); err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	path := filepath.Join(string(d), eventsFile)
	if info, err := os.Stat(path); err == nil && info.Size() > maxEvents {
		if err := os.Rename(path, filepath.Join(string(d), oldFile)); err != nil {
			return fmt.Errorf("journal: %w", err)
		}
	}
	var lines bytes.Buffer
	// A line that a power cut left unfinished stays one line of its own.
	if torn(path) {
		lines.WriteByte('\n')
	}
	encoder := json.NewEncoder(&lines)
	for _, event := range events {
		if err := encoder.Encode(event); err != nil {
			return fmt.Errorf("journal: %w", err)
		}
	}
	file, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	_, err = file.Write(lines.Bytes())
	if err := errors.Join(err, file.Sync(), file.Close()); err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	return atomicfile.SyncFolder(string(d))
}

func torn(path string) bool {
	file, err := os.Open(path)
	if err != nil {
		return false
	}
	defer file.Close()
	last := make([]byte, 1)
	if _, err := file.Seek(-1, io.SeekEnd); err != nil {
		return false // empty
	}
	_, err = file.Read(last)
	return err == nil && last[0] != '\n'
}

// List gives the latest events, the oldest of them first; limit 0 is all. Lines
// that are no events are left out: a power cut may leave one.
func (d Dir) List(limit int) ([]Event, error) {
	events := []Event{}
	for _, name := range []string{oldFile, eventsFile} {
		content, err := os.ReadFile(filepath.Join(string(d), name))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("journal: %w", err)
		}
		lines := bufio.NewScanner(bytes.NewReader(content))
		lines.Buffer(nil, maxInput)
		for lines.Scan() {
			var event Event
			if json.Unmarshal(lines.Bytes(), &event) == nil && event.Name != "" {
				events = append(events, event)
			}
		}
	}
	if limit > 0 && len(events) > limit {
		events = events[len(events)-limit:]
	}
	return events, nil
}

// Keep replaces the summary by a JSON document.
func (d Dir) Keep(input io.Reader) error {
	content, err := io.ReadAll(io.LimitReader(input, maxInput+1))
	switch {
	case err != nil:
		return fmt.Errorf("journal: %w", err)
	case len(content) > maxInput || !json.Valid(content):
		return errors.New("journal: the summary is no JSON document, or too long")
	}
	if err := os.MkdirAll(string(d), 0o700); err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	return atomicfile.Write(filepath.Join(string(d), summaryFile), bytes.NewReader(content), atomicfile.Options{Mode: 0o600})
}

// Summary gives what Keep kept last; an empty object before that.
func (d Dir) Summary() (json.RawMessage, error) {
	content, err := os.ReadFile(filepath.Join(string(d), summaryFile))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return json.RawMessage("{}"), nil
	case err != nil:
		return nil, fmt.Errorf("journal: %w", err)
	case !json.Valid(content):
		return json.RawMessage("{}"), nil // it is only a shortcut: it is made anew
	}
	return content, nil
}
