package bench

import (
	"archive/tar"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"hash"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// picture is an image of two layers, as an application on a distribution's base
// has them. The same picture is the same bytes on every machine and in every run.
type picture struct {
	// base is how many bytes of files the lower layer has: half of them texts,
	// half what compresses to a bit more than half, like machine code.
	base int64
	// assets are the same in the upper layer, beside the program.
	assets int64
	// program is the file that the container runs.
	program string
	// seed other than 0 gives an image that shares nothing with the others.
	seed uint64
	// baseLine and appLine are inserted in a text in the middle of a layer.
	baseLine, appLine string
}

// archive writes the picture as `docker save` would.
func (p picture) archive(path string) (err error) {
	file, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() {
		if closeErr := file.Close(); err == nil {
			err = closeErr
		}
	}()
	program, err := os.ReadFile(p.program)
	if err != nil {
		return err
	}
	layers := []func(*tar.Writer) error{
		func(w *tar.Writer) error { return fill(w, "usr/share", p.base, 1+2*p.seed, p.baseLine) },
		func(w *tar.Writer) error {
			if err := add(w, "app/serve", program, 0o755); err != nil {
				return err
			}
			return fill(w, "app/assets", p.assets, 2+2*p.seed, p.appLine)
		},
	}
	scratch, err := os.MkdirTemp(filepath.Dir(path), "layers-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(scratch) }()
	out := tar.NewWriter(file)
	var names, digests []string
	for i, write := range layers {
		name := filepath.Join(scratch, fmt.Sprint(i))
		digest, err := writeLayer(name, write)
		if err != nil {
			return err
		}
		names, digests = append(names, digest+".tar"), append(digests, "sha256:"+digest)
		if err := addFile(out, digest+".tar", name); err != nil {
			return err
		}
	}
	config, err := json.Marshal(map[string]any{
		"architecture": "amd64", "os": "linux",
		"config": map[string]any{"Entrypoint": []string{"/app/serve"}},
		"rootfs": map[string]any{"type": "layers", "diff_ids": digests},
	})
	if err != nil {
		return err
	}
	sum := sha256.Sum256(config)
	configName := hex.EncodeToString(sum[:]) + ".json"
	manifest, err := json.Marshal([]map[string]any{{"Config": configName, "RepoTags": []string{imageTag}, "Layers": names}})
	if err != nil {
		return err
	}
	if err := add(out, configName, config, 0o644); err != nil {
		return err
	}
	if err := add(out, "manifest.json", manifest, 0o644); err != nil {
		return err
	}
	return out.Close()
}

const imageTag = "localhost/bench:latest"

func writeLayer(path string, write func(*tar.Writer) error) (digest string, err error) {
	file, err := os.Create(path)
	if err != nil {
		return "", err
	}
	defer file.Close()
	hash := sha256.New()
	w := tar.NewWriter(io.MultiWriter(file, hash))
	if err := write(w); err != nil {
		return "", err
	}
	if err := w.Close(); err != nil {
		return "", err
	}
	return hexOf(hash), file.Close()
}

func hexOf(h hash.Hash) string { return hex.EncodeToString(h.Sum(nil)) }

func add(w *tar.Writer, name string, content []byte, mode int64) error {
	header := &tar.Header{Name: name, Mode: mode, Size: int64(len(content)), Typeflag: tar.TypeReg, Format: tar.FormatUSTAR}
	if err := w.WriteHeader(header); err != nil {
		return err
	}
	_, err := w.Write(content)
	return err
}

func addFile(w *tar.Writer, name, path string) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return err
	}
	header := &tar.Header{Name: name, Mode: 0o644, Size: info.Size(), Typeflag: tar.TypeReg, Format: tar.FormatUSTAR}
	if err := w.WriteHeader(header); err != nil {
		return err
	}
	_, err = io.Copy(w, file)
	return err
}

// fill adds size bytes of files to a layer: most small, some of megabytes, by
// turns text and machine code. The text in the middle gets the line.
func fill(w *tar.Writer, folder string, size int64, seed uint64, line string) error {
	random := rand.New(rand.NewPCG(seed, 195))
	words := vocabulary(random)
	middle := false
	for i, left := 0, size; left > 0; i++ {
		length := min(left, 2<<10+random.Int64N(38<<10))
		if i%50 == 49 {
			length = min(left, size/64+random.Int64N(size/64))
		}
		if !middle && left <= size/2 {
			middle = true
			content := text(random, words, 64<<10)
			if line != "" {
				half := strings.LastIndex(content[:len(content)/2], "\n") + 1
				content = content[:half] + line + "\n" + content[half:]
			}
			if err := add(w, folder+"/middle.txt", []byte(content), 0o644); err != nil {
				return err
			}
		}
		var content []byte
		name := fmt.Sprintf("%s/%03d/%05d", folder, i/100, i)
		if i%2 == 0 {
			name, content = name+".txt", []byte(text(random, words, int(length)))
		} else {
			name, content = name+".so", code(random, int(length))
		}
		if err := add(w, name, content, 0o644); err != nil {
			return err
		}
		left -= int64(len(content))
	}
	return nil
}

func vocabulary(random *rand.Rand) []string {
	words := make([]string, 4096)
	for i := range words {
		word := make([]byte, 3+random.IntN(8))
		for j := range word {
			word[j] = 'a' + byte(random.IntN(26))
		}
		words[i] = string(word)
	}
	return words
}

// text has words of which few are frequent, in lines.
func text(random *rand.Rand, words []string, length int) string {
	var out strings.Builder
	for column := 0; out.Len() < length; {
		word := words[int(float64(len(words))*random.Float64()*random.Float64()*random.Float64()*random.Float64())]
		out.WriteString(word)
		if column += len(word) + 1; column > 72 {
			out.WriteByte('\n')
			column = 0
		} else {
			out.WriteByte(' ')
		}
	}
	return out.String()[:length]
}

// code mixes bytes without any order with repetitions of what was shortly before.
func code(random *rand.Rand, length int) []byte {
	out := make([]byte, 0, length+64)
	for len(out) < length {
		run := 4 + random.IntN(28)
		if len(out) > 64 && random.IntN(4) > 0 {
			from := max(0, len(out)-(run+random.IntN(32<<10)))
			out = append(out, out[from:min(from+run, len(out))]...)
			continue
		}
		for range run / 2 {
			out = append(out, byte(random.Uint32()))
		}
	}
	return out[:length]
}

func TestAPictureIsTheSameBytesEveryTime(t *testing.T) {
	program := filepath.Join(t.TempDir(), "program")
	if err := os.WriteFile(program, []byte("program"), 0o755); err != nil {
		t.Fatal(err)
	}
	digest := func(p picture) string {
		path := filepath.Join(t.TempDir(), "image.tar")
		if err := p.archive(path); err != nil {
			t.Fatal(err)
		}
		content, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		sum := sha256.Sum256(content)
		return hex.EncodeToString(sum[:])
	}
	plain := picture{base: 4 << 20, assets: 1 << 20, program: program}
	if first, second := digest(plain), digest(plain); first != second {
		t.Error("two archives of one picture differ")
	}
	// The figures in docs/performance.md are of these bytes.
	const want = "54edbb345ecb4f680d51d3e1b79a6352b2e9dfdcd29fd82eb463d5a328129bcc"
	if got := digest(plain); got != want {
		t.Errorf("the picture has become another one: sha256 %s, want %s", got, want)
	}
	changed := plain
	changed.baseLine = "one more line"
	if digest(plain) == digest(changed) {
		t.Error("a line in the base layer changes nothing")
	}
	changed = plain
	changed.appLine = "one more line"
	if digest(plain) == digest(changed) {
		t.Error("a line in the app layer changes nothing")
	}
}
