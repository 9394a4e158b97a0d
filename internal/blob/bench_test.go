package blob

import (
	"bytes"
	"fmt"
	"io"
	"testing"

	"github.com/klauspost/compress/zstd"
)

const benchSize = 32 << 20

func BenchmarkChunk(b *testing.B) {
	blob := text(benchSize, 1)
	b.SetBytes(benchSize)
	for b.Loop() {
		if _, err := Chunk(bytes.NewReader(blob)); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkCutOnly(b *testing.B) {
	blob := text(benchSize, 1)
	b.SetBytes(benchSize)
	for b.Loop() {
		if err := eachChunk(bytes.NewReader(blob), func([]byte) error { return nil }); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkCompress(b *testing.B) {
	blob := text(benchSize, 1)
	for _, level := range []zstd.EncoderLevel{zstd.SpeedFastest, zstd.SpeedDefault, zstd.SpeedBetterCompression} {
		b.Run(level.String(), func(b *testing.B) {
			encoder, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(level), zstd.WithEncoderConcurrency(1), zstd.WithSingleSegment(true))
			if err != nil {
				b.Fatal(err)
			}
			b.SetBytes(benchSize)
			var packed int
			for b.Loop() {
				packed = 0
				for rest := blob; len(rest) > 0; {
					n := min(AvgChunkSize, len(rest))
					packed += len(encoder.EncodeAll(rest[:n], nil))
					rest = rest[n:]
				}
			}
			b.ReportMetric(float64(packed)/benchSize, "wire/plain")
		})
	}
}

func BenchmarkSend(b *testing.B) {
	before := text(benchSize, 1)
	after := append(append(append([]byte{}, before[:benchSize/2]...), "one more line\n"...), before[benchSize/2:]...)
	for name, known := range map[string][]byte{"everything": nil, "one changed line": before} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(after)))
			var result Result
			for b.Loop() {
				b.StopTimer()
				store := openStore(b)
				if known != nil {
					put(b, store, known)
				}
				offered := source(b, after)
				b.StartTimer()
				var err error
				hostErr := withHost(b, store, nil, func(rw io.ReadWriter) {
					result, err = Send(b.Context(), rw, Offer{Blobs: []Offered{offered}}, SendOptions{})
				})
				if err != nil || hostErr != nil {
					b.Fatal(fmt.Errorf("%w, %w", err, hostErr))
				}
			}
			b.ReportMetric(float64(result.BytesWire), "wire-bytes")
		})
	}
}
