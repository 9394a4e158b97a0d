package writesession

import (
	"bytes"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/nomad-site/site/internal/blob"
)

func sampleRecord() Record {
	one, two := blob.DigestOf([]byte("one")), blob.DigestOf([]byte("two"))
	return Record{
		Version: RecordVersion,
		Manifest: blob.Manifest{
			Version: blob.ManifestVersion, Digest: blob.DigestOf([]byte("onetwoone")), Size: 9,
			Chunks: []blob.ChunkRef{{Digest: one, Size: 3}, {Digest: two, Size: 3}, {Digest: one, Size: 3}},
		},
		Packs:  []blob.Digest{blob.DigestOf([]byte("pack a")), blob.DigestOf([]byte("pack b"))},
		Places: []Place{{Pack: 0, Offset: 0, Length: 12}, {Pack: 1, Offset: 40, Length: 12}, {Pack: 0, Offset: 0, Length: 12}},
	}
}

func compressed(t testing.TB, plain []byte) []byte {
	t.Helper()
	encoder, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithSingleSegment(true))
	if err != nil {
		t.Fatal(err)
	}
	defer encoder.Close()
	return encoder.EncodeAll(plain, nil)
}

func TestARecordIsReadAsItWasWritten(t *testing.T) {
	empty := Record{Version: RecordVersion, Manifest: blob.Manifest{Version: blob.ManifestVersion, Digest: blob.DigestOf(nil)}}
	for name, record := range map[string]Record{"two packs": sampleRecord(), "an empty blob": empty} {
		t.Run(name, func(t *testing.T) {
			stored, err := record.Encode()
			if err != nil {
				t.Fatal(err)
			}
			again, err := record.Encode()
			if err != nil || !bytes.Equal(stored, again) {
				t.Errorf("encoded twice: other bytes, or %v", err)
			}
			got, err := ParseRecord(stored)
			if err != nil {
				t.Fatal(err)
			}
			if got.Manifest.Digest != record.Manifest.Digest || len(got.Places) != len(record.Places) {
				t.Errorf("got %+v", got)
			}
			if len(record.Places) > 0 && !reflect.DeepEqual(got, record) {
				t.Errorf("got %+v, want %+v", got, record)
			}
		})
	}
}

func TestARecordThatIsNotWholeIsRefused(t *testing.T) {
	for _, test := range []struct {
		name, want string
		change     func(*Record)
	}{
		{"another version", "record version", func(r *Record) { r.Version = 2 }},
		{"a manifest that does not add up", "add up", func(r *Record) { r.Manifest.Size++ }},
		{"a chunk without a place", "2 places for 3 chunks", func(r *Record) { r.Places = r.Places[:2] }},
		{"a pack that is no digest", "no digest", func(r *Record) { r.Packs[0] = "sha256:../../etc" }},
		{"a pack that is there twice", "there twice", func(r *Record) { r.Packs[1] = r.Packs[0] }},
		{"a pack that nothing is in", "hold none", func(r *Record) { r.Places[1].Pack = 0 }},
		{"a place in no pack", "in pack 2 of 2", func(r *Record) { r.Places[1].Pack = 2 }},
		{"a place in a negative pack", "in pack -1", func(r *Record) { r.Places[1].Pack = -1 }},
		{"a place before the pack", "out of range", func(r *Record) { r.Places[0].Offset = -1 }},
		{"a place behind the pack", "out of range", func(r *Record) { r.Places[0].Offset = MaxPackSize - 11 }},
		{"a place without bytes", "out of range", func(r *Record) { r.Places[0].Length = 0 }},
		{"a place longer than a chunk can be", "out of range", func(r *Record) { r.Places[0].Length = MaxPackedChunk + 1 }},
		{"a place whose end does not fit a number", "out of range", func(r *Record) { r.Places[0].Offset = 1<<63 - 1 }},
	} {
		t.Run(test.name, func(t *testing.T) {
			record := sampleRecord()
			test.change(&record)
			if err := record.Validate(); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, want %q", err, test.want)
			}
			if _, err := record.Encode(); err == nil {
				t.Error("it is encoded")
			}
		})
	}
}

func TestStoredBytesThatAreNoRecordAreRefused(t *testing.T) {
	whole, err := sampleRecord().Encode()
	if err != nil {
		t.Fatal(err)
	}
	bomb := compressed(t, bytes.Repeat([]byte{' '}, MaxRecordBytes+1))
	for name, stored := range map[string][]byte{
		"nothing":                {},
		"text":                   []byte("{}"),
		"cut short":              whole[:len(whole)-4],
		"an empty document":      compressed(t, []byte("{}")),
		"an unknown key":         compressed(t, []byte(`{"version":1,"more":2}`)),
		"something behind it":    compressed(t, []byte(`{"version":1} {}`)),
		"a small frame of much":  bomb,
		"two frames":             append(append([]byte{}, whole...), whole...),
		"a frame to be left out": {0x50, 0x2a, 0x4d, 0x18, 0, 0, 0, 0},
	} {
		t.Run(name, func(t *testing.T) {
			if record, err := ParseRecord(stored); err == nil {
				t.Errorf("read as %+v", record)
			}
		})
	}
}

func FuzzParseRecord(f *testing.F) {
	seeds, err := filepath.Glob("testdata/records/*.json")
	if err != nil || len(seeds) == 0 {
		f.Fatalf("no seeds: %v", err)
	}
	for _, seed := range seeds {
		plain, err := os.ReadFile(seed)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(plain)
	}
	f.Fuzz(func(t *testing.T, plain []byte) {
		for _, stored := range [][]byte{plain, compressed(t, plain)} {
			record, err := ParseRecord(stored)
			if err != nil {
				continue
			}
			again, err := record.Encode()
			if err != nil {
				t.Fatalf("read, but cannot be written: %v", err)
			}
			if _, err := ParseRecord(again); err != nil {
				t.Fatalf("written, but cannot be read: %v", err)
			}
		}
	})
}
