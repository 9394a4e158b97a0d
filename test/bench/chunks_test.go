package bench

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	chunkers "github.com/PlakarKorp/go-cdc-chunkers"
	_ "github.com/PlakarKorp/go-cdc-chunkers/chunkers/fastcdc"
	_ "github.com/PlakarKorp/go-cdc-chunkers/chunkers/fixed"
	_ "github.com/PlakarKorp/go-cdc-chunkers/chunkers/jc"
	_ "github.com/PlakarKorp/go-cdc-chunkers/chunkers/ultracdc"
	"github.com/klauspost/compress/zstd"

	"github.com/nomad-site/site/internal/blob"
)

// cutting is one way to cut a blob into chunks.
type cutting struct {
	algorithm string
	average   int
}

// cut is a layer cut into chunks.
type cut struct {
	manifest blob.Manifest
	seconds  float64
}

// layers are the layers of a picture, as they are sent.
func layers(b *testing.B, p picture) [][]byte {
	b.Helper()
	path := filepath.Join(b.TempDir(), "image.tar")
	if err := p.archive(path); err != nil {
		b.Fatal(err)
	}
	file, err := os.Open(path)
	if err != nil {
		b.Fatal(err)
	}
	defer file.Close()
	var found [][]byte
	for reader := tar.NewReader(file); ; {
		header, err := reader.Next()
		if errors.Is(err, io.EOF) {
			return found
		}
		if err != nil {
			b.Fatal(err)
		}
		if strings.HasSuffix(header.Name, ".tar") {
			content, err := io.ReadAll(reader)
			if err != nil {
				b.Fatal(err)
			}
			found = append(found, content)
		}
	}
}

func (c cutting) cut(b *testing.B, layer []byte, each func(digest blob.Digest, content []byte)) cut {
	b.Helper()
	done := cut{manifest: blob.Manifest{Version: blob.ManifestVersion}}
	start := time.Now()
	chunker, err := chunkers.NewChunker(c.algorithm, bytes.NewReader(layer), &chunkers.ChunkerOpts{
		MinSize: c.average / 4, NormalSize: c.average, MaxSize: c.average * 4,
	})
	if err != nil {
		b.Fatal(err)
	}
	for {
		content, err := chunker.Next()
		if err != nil && !errors.Is(err, io.EOF) {
			b.Fatal(err)
		}
		if len(content) > 0 {
			digest := blob.Digest(fmt.Sprintf("sha256:%x", sha256.Sum256(content)))
			done.manifest.Chunks = append(done.manifest.Chunks, blob.ChunkRef{Digest: digest, Size: int64(len(content))})
			done.manifest.Size += int64(len(content))
			each(digest, content)
		}
		if err != nil {
			break
		}
	}
	done.seconds = time.Since(start).Seconds()
	done.manifest.Digest = blob.Digest(fmt.Sprintf("sha256:%x", sha256.Sum256(layer)))
	return done
}

// BenchmarkChunking is what docs/decisions/0001-chunks.md was decided by. It
// needs neither root nor a lab.
func BenchmarkChunking(b *testing.B) {
	f := &fixture{temp: b.TempDir(), programs: map[string]string{}}
	image := func(answer string, p picture) [][]byte {
		program, err := f.program(answer)
		if err != nil {
			b.Fatal(err)
		}
		p.base, p.assets, p.program = 180e6, 9e6, program
		return layers(b, p)
	}
	before := image("", picture{})
	after := []struct {
		name   string
		layers [][]byte
	}{
		{"base line", image("", picture{baseLine: "one more line"})[:1]},
		{"app line", image("", picture{appLine: "one more line"})[1:]},
		{"program", image("another answer", picture{})[1:]},
	}
	encoder, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1))
	if err != nil {
		b.Fatal(err)
	}
	defer encoder.Close()

	report.table("Bytes to send after a change of the 195 MB image, by how layers are cut: chunks + chunk list, compressed", "algorithm", "average", "chunks", "cut and hash", after[0].name, after[1].name, after[2].name, "all three")
	for _, way := range []cutting{
		{"fastcdc-v1.0.0", 32 << 10}, {"fastcdc-v1.0.0", 64 << 10}, {"fastcdc-v1.0.0", blob.AvgChunkSize},
		{"fastcdc-v1.0.0", 256 << 10}, {"fastcdc-v1.0.0", 1 << 20},
		{"jc-v1.1.0", blob.AvgChunkSize}, {"ultracdc-v1.0.0", blob.AvgChunkSize}, {"fixed-v1.0.0", blob.AvgChunkSize},
	} {
		known := map[blob.Digest]bool{}
		chunks, size, spent := 0, 0, 0.0
		for _, layer := range before {
			done := way.cut(b, layer, func(digest blob.Digest, _ []byte) { known[digest] = true })
			chunks, size, spent = chunks+len(done.manifest.Chunks), size+len(layer), spent+done.seconds
		}
		cells := []string{way.algorithm, fmt.Sprintf("%d KiB", way.average>>10), fmt.Sprint(chunks), fmt.Sprintf("%.0f MB/s", float64(size)/1e6/spent)}
		var total int64
		for _, changed := range after {
			var content, list int64
			for _, layer := range changed.layers {
				done := way.cut(b, layer, func(digest blob.Digest, plain []byte) {
					if !known[digest] {
						content += int64(len(encoder.EncodeAll(plain, nil)))
					}
				})
				// Not Encode: it refuses chunks larger than ours.
				encoded := fmt.Appendf(nil, "%+v", done.manifest)
				list += int64(len(encoder.EncodeAll(encoded, nil)))
			}
			total += content + list
			cells = append(cells, inBytes(content)+" + "+inBytes(list))
		}
		report.row(append(cells, inBytes(total))...)
		b.ReportMetric(float64(total), fmt.Sprintf("bytes-%s-%dKiB", way.algorithm, way.average>>10))
	}

	report.table("The chunks of the whole 195 MB image, by compression", "level", "bytes on the wire", "of the plain bytes", "on one processor")
	for _, level := range []zstd.EncoderLevel{zstd.SpeedFastest, zstd.SpeedDefault, zstd.SpeedBetterCompression, zstd.SpeedBestCompression} {
		encoder, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(level), zstd.WithSingleSegment(true))
		if err != nil {
			b.Fatal(err)
		}
		var packed []byte
		var plain, wire int64
		var spent time.Duration
		for _, layer := range before {
			cutting{"fastcdc-v1.0.0", blob.AvgChunkSize}.cut(b, layer, func(_ blob.Digest, content []byte) {
				start := time.Now()
				packed = encoder.EncodeAll(content, packed[:0])
				spent += time.Since(start)
				plain, wire = plain+int64(len(content)), wire+int64(len(packed))
			})
		}
		encoder.Close()
		report.row("zstd "+level.String(), inBytes(wire), fmt.Sprintf("%.1f %%", 100*float64(wire)/float64(plain)), fmt.Sprintf("%.0f MB/s", float64(plain)/1e6/spent.Seconds()))
	}
}
