package pull

import (
	"bytes"
	"encoding/json"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/nomad-site/site/internal/blob"
	"github.com/nomad-site/site/internal/writesession"
)

// FuzzARecordIsRefusedOrHarmless holds whatever a record says against what the
// requests that are made of it may be.
func FuzzARecordIsRefusedOrHarmless(f *testing.F) {
	content := bytes.Repeat([]byte("0123456789"), 30_000)
	manifest, err := blob.Chunk(bytes.NewReader(content))
	if err != nil {
		f.Fatal(err)
	}
	record := writesession.Record{Version: writesession.RecordVersion, Manifest: manifest, Packs: []blob.Digest{blob.DigestOf(nil)}}
	var at int64
	for range manifest.Chunks {
		record.Places = append(record.Places, writesession.Place{Offset: at, Length: 1000})
		at += 1000
	}
	plain, err := json.Marshal(record)
	if err != nil {
		f.Fatal(err)
	}
	encoder, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithSingleSegment(true))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(plain, uint8(0))
	f.Add(plain[:len(plain)/2], uint8(1))
	f.Add(bytes.ReplaceAll(plain, []byte(`"o":1000,`), []byte(`"o":33554431,`)), uint8(0))
	f.Add(bytes.ReplaceAll(plain, []byte(`"l":1000`), []byte(`"l":-1`)), uint8(3))
	f.Add([]byte("{}"), uint8(0))
	f.Fuzz(func(t *testing.T, plain []byte, skip uint8) {
		// The frame around it is fuzzed where records are parsed.
		record, err := parseRecord(encoder.EncodeAll(plain, nil), manifest.Digest)
		if err != nil {
			return
		}
		var missing []blob.Digest
		for i, chunk := range record.Manifest.Chunks {
			if i%(int(skip)+1) == 0 {
				missing = append(missing, chunk.Digest)
			}
		}
		spans, err := spansOf(record, missing, 8)
		if err != nil {
			t.Fatal(err)
		}
		asked := map[blob.Digest]int{}
		for _, span := range spans {
			end := int64(0)
			for _, piece := range span.pieces {
				asked[piece.digest]++
				if piece.offset < end || piece.length <= 0 || piece.length > writesession.MaxPackedChunk {
					t.Errorf("piece %+v behind %d", piece, end)
				}
				end = piece.offset + piece.length
			}
			if end != span.end() || end > writesession.MaxPackSize || len(span.pieces) > 1 && end-span.pieces[0].offset > longestSpan {
				t.Errorf("span %d to %d", span.pieces[0].offset, end)
			}
		}
		for _, digest := range missing {
			if asked[digest] != 1 {
				t.Errorf("chunk %s is asked for %d times", digest, asked[digest])
			}
		}
	})
}
