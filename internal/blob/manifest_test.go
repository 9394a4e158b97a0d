package blob

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"strings"
	"testing"
)

var (
	digestA = DigestOf([]byte("a"))
	digestB = DigestOf([]byte("b"))
)

func TestParseDigest(t *testing.T) {
	digits := strings.Repeat("0a", 32)
	for name, test := range map[string]struct {
		text string
		ok   bool
	}{
		"the canonical form is accepted":  {"sha256:" + digits, true},
		"upper case is refused":           {"sha256:" + strings.ToUpper(digits), false},
		"another algorithm is refused":    {"sha512:" + digits, false},
		"a missing algorithm is refused":  {digits, false},
		"one digit too few is refused":    {"sha256:" + digits[1:], false},
		"one digit too many is refused":   {"sha256:" + digits + "0", false},
		"a path is refused":               {"sha256:../" + digits[3:], false},
		"a trailing new line is refused":  {"sha256:" + digits[1:] + "\n", false},
		"the empty string is refused":     {"", false},
		"a letter after f is refused":     {"sha256:" + digits[1:] + "g", false},
		"a space before it is refused":    {" sha256:" + digits, false},
		"an upper-case prefix is refused": {"SHA256:" + digits, false},
	} {
		t.Run(name, func(t *testing.T) {
			digest, err := ParseDigest(test.text)
			if (err == nil) != test.ok {
				t.Fatalf("got %q, %v", digest, err)
			}
			if test.ok && (digest.Hex() != digits || digest.raw().digest() != digest) {
				t.Fatalf("got %q, hex %q", digest, digest.Hex())
			}
		})
	}
}

func TestParseManifest(t *testing.T) {
	good := fmt.Sprintf(`{"version":1,"digest":"%s","size":3,"chunks":[{"digest":"%s","size":1},{"digest":"%s","size":2}]}`, digestA, digestA, digestB)
	for name, test := range map[string]struct {
		data string
		ok   bool
	}{
		"the canonical form is accepted":       {good, true},
		"an empty blob has no chunks":          {fmt.Sprintf(`{"version":1,"digest":"%s","size":0,"chunks":[]}`, DigestOf(nil)), true},
		"trailing data is refused":             {good + "{}", false},
		"a trailing new line is refused":       {good + "\n", false},
		"an unknown key is refused":            {strings.Replace(good, `"size":3`, `"size":3,"x":1`, 1), false},
		"a repeated key is refused":            {strings.Replace(good, `"size":3`, `"size":3,"size":3`, 1), false},
		"another spelling of a key is refused": {strings.Replace(good, `"size":3`, `"Size":3`, 1), false},
		"a wrong sum is refused":               {strings.Replace(good, `"size":3`, `"size":4`, 1), false},
		"another version is refused":           {strings.Replace(good, `"version":1`, `"version":2`, 1), false},
		"an empty chunk is refused":            {strings.Replace(good, `"size":1`, `"size":0`, 1), false},
		"a negative chunk is refused":          {strings.Replace(strings.Replace(good, `"size":1`, `"size":-1`, 1), `"size":3`, `"size":1`, 1), false},
		"a chunk over the limit is refused":    {strings.Replace(strings.Replace(good, `"size":2`, `"size":524289`, 1), `"size":3`, `"size":524290`, 1), false},
		"one chunk with two sizes is refused":  {strings.ReplaceAll(good, string(digestB), string(digestA)), false},
		"a bad digest is refused":              {strings.Replace(good, "sha256", "sha512", 1), false},
		"null chunks are refused":              {fmt.Sprintf(`{"version":1,"digest":"%s","size":0,"chunks":null}`, DigestOf(nil)), false},
		"a fraction is refused":                {strings.Replace(good, `"size":3`, `"size":3.5`, 1), false},
		"an overflow is refused":               {strings.Replace(good, `"size":3`, `"size":99999999999999999999`, 1), false},
	} {
		t.Run(name, func(t *testing.T) {
			manifest, err := ParseManifest([]byte(test.data))
			if (err == nil) != test.ok {
				t.Fatalf("got %+v, %v", manifest, err)
			}
		})
	}
}

func TestChunksRejoinToTheBlob(t *testing.T) {
	for _, size := range []int{0, 1, MinChunkSize - 1, MinChunkSize, MinChunkSize + 1, AvgChunkSize, MaxChunkSize, MaxChunkSize + 1, 3 << 20} {
		t.Run(fmt.Sprintf("%d bytes", size), func(t *testing.T) {
			blob := text(size, uint64(size))
			for kind, r := range map[string]io.Reader{"at once": bytes.NewReader(blob), "byte by byte": oneByte{bytes.NewReader(blob)}} {
				manifest, err := Chunk(r)
				if err != nil {
					t.Fatal(err)
				}
				checkRejoins(t, manifest, blob, kind)
			}
		})
	}
}

type oneByte struct{ io.Reader }

func (o oneByte) Read(p []byte) (int, error) { return o.Reader.Read(p[:min(1, len(p))]) }

func checkRejoins(t *testing.T, manifest Manifest, blob []byte, kind string) {
	t.Helper()
	if err := manifest.Validate(); err != nil {
		t.Fatal(kind, err)
	}
	if manifest.Digest != DigestOf(blob) || manifest.Size != int64(len(blob)) {
		t.Fatalf("%s: got %s, %d bytes", kind, manifest.Digest, manifest.Size)
	}
	for i, c := range manifest.Chunks {
		if err := c.Digest.Check(blob[:c.Size]); err != nil {
			t.Fatalf("%s: chunk %d: %v", kind, i, err)
		}
		blob = blob[c.Size:]
	}
}

// The cut points are a promise: stores in the field dedupe against them.
func TestCutPointsNeverChange(t *testing.T) {
	manifest := mustChunk(t, text(4<<20, 1))
	encoded, err := manifest.Encode()
	if err != nil {
		t.Fatal(err)
	}
	const want = "sha256:4ee5377792f0c1e8a6e7c33d8bae1aa2797d171526b09ca3a92cf07922357313"
	if got := DigestOf(encoded); got != want {
		t.Fatalf("the manifest of the same bytes is now %s (%d chunks)", got, len(manifest.Chunks))
	}
}

func TestOneLineInTheMiddleChangesFewChunks(t *testing.T) {
	before := text(48<<20, 2)
	middle := len(before) / 2
	after := append(append(append([]byte{}, before[:middle]...), "one more line\n"...), before[middle:]...)
	known := map[Digest]bool{}
	for _, c := range mustChunk(t, before).Chunks {
		known[c.Digest] = true
	}
	fresh := 0
	for _, c := range mustChunk(t, after).Chunks {
		if !known[c.Digest] {
			fresh++
		}
	}
	if fresh == 0 || fresh > 3 {
		t.Fatalf("%d chunks changed", fresh)
	}
}

type endless struct {
	random *rand.ChaCha8
	left   int64
	peak   uint64
}

func (e *endless) Read(p []byte) (int, error) {
	if e.left == 0 {
		return 0, io.EOF
	}
	if e.left%(32<<20) < int64(len(p)) {
		runtime.GC()
		var stats runtime.MemStats
		runtime.ReadMemStats(&stats)
		e.peak = max(e.peak, stats.HeapAlloc)
	}
	n := int(min(e.left, int64(len(p))))
	_, _ = e.random.Read(p[:n])
	e.left -= int64(n)
	return n, nil
}

func TestChunkingKeepsMemoryFlat(t *testing.T) {
	r := &endless{random: rand.NewChaCha8([32]byte{}), left: 512 << 20}
	if _, err := Chunk(r); err != nil {
		t.Fatal(err)
	}
	const limit = 16 << 20
	if r.peak == 0 || r.peak > limit {
		t.Fatalf("%d bytes live while 512 MiB were chunked", r.peak)
	}
}
