package blob

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
)

// Limits of what a manifest may claim; a hostile one must not exhaust a host.
const (
	ManifestVersion  = 1
	MaxBlobSize      = 64 << 30
	MaxChunks        = 1 << 20
	MaxManifestBytes = 128 << 20
)

// ChunkRef is one chunk of a blob: the digest and length of its plain bytes.
type ChunkRef struct {
	Digest Digest `json:"digest"`
	Size   int64  `json:"size"`
}

// Manifest lists the chunks of one blob in order.
type Manifest struct {
	Version int        `json:"version"`
	Digest  Digest     `json:"digest"`
	Size    int64      `json:"size"`
	Chunks  []ChunkRef `json:"chunks"`
}

// Encode returns the one JSON form that ParseManifest accepts.
func (m Manifest) Encode() ([]byte, error) {
	if err := m.Validate(); err != nil {
		return nil, err
	}
	return m.canonical()
}

func (m Manifest) canonical() ([]byte, error) {
	if m.Chunks == nil {
		m.Chunks = []ChunkRef{}
	}
	encoded, err := json.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("encode manifest: %w", err)
	}
	return encoded, nil
}

// ParseManifest decodes a manifest strictly: only the canonical form is
// accepted, so an unknown or repeated key, another spelling of a key, or
// anything after the document is an error.
func ParseManifest(data []byte) (Manifest, error) {
	if len(data) > MaxManifestBytes {
		return Manifest{}, fmt.Errorf("parse manifest: longer than %d bytes", MaxManifestBytes)
	}
	var m Manifest
	if err := json.Unmarshal(data, &m); err != nil {
		return Manifest{}, fmt.Errorf("parse manifest: %w", err)
	}
	if err := m.Validate(); err != nil {
		return Manifest{}, fmt.Errorf("parse manifest: %w", err)
	}
	canonical, err := m.canonical()
	if err != nil {
		return Manifest{}, err
	}
	if !bytes.Equal(canonical, data) {
		return Manifest{}, errors.New("parse manifest: not in canonical form")
	}
	return m, nil
}

// Validate checks limits, and that the chunks add up to the blob.
func (m Manifest) Validate() error {
	if m.Version != ManifestVersion {
		return fmt.Errorf("manifest version %d, want %d", m.Version, ManifestVersion)
	}
	if _, err := ParseDigest(string(m.Digest)); err != nil {
		return err
	}
	if m.Size < 0 || m.Size > MaxBlobSize {
		return fmt.Errorf("manifest of %s: size %d is out of range", m.Digest, m.Size)
	}
	if len(m.Chunks) > MaxChunks {
		return fmt.Errorf("manifest of %s: %d chunks, at most %d are allowed", m.Digest, len(m.Chunks), MaxChunks)
	}
	var total int64
	for i, c := range m.Chunks {
		if _, err := ParseDigest(string(c.Digest)); err != nil {
			return fmt.Errorf("manifest of %s: chunk %d: %w", m.Digest, i, err)
		}
		if c.Size <= 0 || c.Size > MaxChunkSize {
			return fmt.Errorf("manifest of %s: chunk %d: size %d is out of range", m.Digest, i, c.Size)
		}
		total += c.Size
	}
	if total != m.Size {
		return fmt.Errorf("manifest of %s: chunks add up to %d bytes, want %d", m.Digest, total, m.Size)
	}
	return m.checkSizesAgree()
}

// checkSizesAgree refuses one chunk digest with two lengths: one of them lies.
func (m Manifest) checkSizesAgree() error {
	sizes := make(map[Digest]int64, len(m.Chunks))
	for _, c := range m.Chunks {
		if size, seen := sizes[c.Digest]; seen && size != c.Size {
			return fmt.Errorf("manifest of %s: chunk %s has two sizes, %d and %d", m.Digest, c.Digest, size, c.Size)
		}
		sizes[c.Digest] = c.Size
	}
	return nil
}
