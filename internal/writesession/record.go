package writesession

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"

	"github.com/nomad-site/site/internal/blob"
)

// RecordVersion is that of the form below.
const RecordVersion = 1

// MaxRecordBytes bounds a record, as it lies in the store and when it is read.
const MaxRecordBytes = 256 << 20

// MaxPackedChunk is how long a compressed chunk may be: a little more than a plain
// one, for what cannot be compressed.
const MaxPackedChunk = blob.MaxPackedChunk

// recordWindow lets the compressor find a chunk that comes again much later.
const recordWindow = 1 << 20

// Record is what makes a blob visible: its chunks, and where they lie.
type Record struct {
	Version  int           `json:"version"`
	Manifest blob.Manifest `json:"manifest"`
	// Packs are those of Places, each once.
	Packs []blob.Digest `json:"packs"`
	// Places has one entry for each chunk of the manifest, in its order.
	Places []Place `json:"places"`
}

// Place is where a chunk lies: Length bytes from Offset of Packs[Pack].
type Place struct {
	Pack   int   `json:"p"`
	Offset int64 `json:"o"`
	Length int64 `json:"l"`
}

// Validate checks that each chunk has a place that can be, and that no pack is
// named without need.
func (r Record) Validate() error {
	if r.Version != RecordVersion {
		return fmt.Errorf("record version %d, want %d", r.Version, RecordVersion)
	}
	if err := r.Manifest.Validate(); err != nil {
		return err
	}
	if len(r.Places) != len(r.Manifest.Chunks) {
		return fmt.Errorf("record of %s: %d places for %d chunks", r.Manifest.Digest, len(r.Places), len(r.Manifest.Chunks))
	}
	seen := make(map[blob.Digest]bool, len(r.Packs))
	for _, pack := range r.Packs {
		if !pack.Valid() || seen[pack] {
			return fmt.Errorf("record of %s: pack %.80q is no digest, or is there twice", r.Manifest.Digest, pack)
		}
		seen[pack] = true
	}
	return r.checkPlaces()
}

func (r Record) checkPlaces() error {
	used, count := make([]bool, len(r.Packs)), 0
	for i, place := range r.Places {
		if place.Pack < 0 || place.Pack >= len(r.Packs) {
			return fmt.Errorf("record of %s: chunk %d is in pack %d of %d", r.Manifest.Digest, i, place.Pack, len(r.Packs))
		}
		if place.Offset < 0 || place.Length <= 0 || place.Length > MaxPackedChunk || place.Offset > MaxPackSize-place.Length {
			return fmt.Errorf("record of %s: chunk %d: %d bytes from %d are out of range", r.Manifest.Digest, i, place.Length, place.Offset)
		}
		if !used[place.Pack] {
			used[place.Pack] = true
			count++
		}
	}
	if count != len(r.Packs) {
		return fmt.Errorf("record of %s: %d packs, of which %d hold none of its chunks", r.Manifest.Digest, len(r.Packs), len(r.Packs)-count)
	}
	return nil
}

// Encode gives the stored form: zstd of JSON.
func (r Record) Encode() ([]byte, error) {
	if err := r.Validate(); err != nil {
		return nil, err
	}
	if r.Packs == nil {
		r.Packs = []blob.Digest{}
	}
	if r.Places == nil {
		r.Places = []Place{}
	}
	if r.Manifest.Chunks == nil {
		r.Manifest.Chunks = []blob.ChunkRef{}
	}
	plain, err := json.Marshal(r)
	if err != nil {
		return nil, fmt.Errorf("encode record of %s: %w", r.Manifest.Digest, err)
	}
	if len(plain) > MaxRecordBytes {
		return nil, fmt.Errorf("encode record of %s: longer than %d bytes", r.Manifest.Digest, MaxRecordBytes)
	}
	encoder, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(recordWindow), zstd.WithSingleSegment(true))
	if err != nil {
		return nil, fmt.Errorf("encode record of %s: %w", r.Manifest.Digest, err)
	}
	defer encoder.Close()
	return encoder.EncodeAll(plain, nil), nil
}

// ParseRecord reads the stored form, and insists that it is whole.
func ParseRecord(stored []byte) (Record, error) {
	plain, err := unpackRecord(stored)
	if err != nil {
		return Record{}, fmt.Errorf("parse record: %w", err)
	}
	decoder := json.NewDecoder(bytes.NewReader(plain))
	decoder.DisallowUnknownFields()
	var record Record
	if err := decoder.Decode(&record); err != nil {
		return Record{}, fmt.Errorf("parse record: %w", err)
	}
	if _, err := decoder.Token(); !errors.Is(err, io.EOF) {
		return Record{}, errors.New("parse record: something follows it")
	}
	if err := record.Validate(); err != nil {
		return Record{}, fmt.Errorf("parse record: %w", err)
	}
	return record, nil
}

// unpackRecord takes one frame that states its size, so that a small one that
// unpacks to gigabytes is refused before any of it is unpacked.
func unpackRecord(stored []byte) ([]byte, error) {
	if len(stored) > MaxRecordBytes {
		return nil, fmt.Errorf("longer than %d bytes", MaxRecordBytes)
	}
	var header zstd.Header
	if err := header.Decode(stored); err != nil {
		return nil, fmt.Errorf("decompress: %w", err)
	}
	if header.Skippable || !header.HasFCS || header.FrameContentSize > MaxRecordBytes {
		return nil, fmt.Errorf("decompress: no size, or more than %d bytes", MaxRecordBytes)
	}
	decoder, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(MaxRecordBytes))
	if err != nil {
		return nil, fmt.Errorf("decompress: %w", err)
	}
	defer decoder.Close()
	plain, err := decoder.DecodeAll(stored, nil)
	if err != nil {
		return nil, fmt.Errorf("decompress: %w", err)
	}
	return plain, nil
}
