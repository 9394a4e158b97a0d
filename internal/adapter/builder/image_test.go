package builder

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/nomad-site/site/internal/site"
)

func tarOf(t *testing.T, files ...string) []byte {
	t.Helper()
	var out bytes.Buffer
	writer := tar.NewWriter(&out)
	for _, file := range files {
		if err := writer.WriteHeader(&tar.Header{Name: file, Mode: 0o644, Size: int64(len(file)), Typeflag: tar.TypeReg}); err != nil {
			t.Fatal(err)
		}
		io.WriteString(writer, file)
	}
	if err := writer.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// sample is an image of two layers whose program is named after its platform.
func sample(t *testing.T, platform v1.Platform, layers ...[]byte) v1.Image {
	t.Helper()
	img := empty.Image
	for _, content := range append(layers, tarOf(t, "bin/"+platform.Architecture)) {
		layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(content)), nil })
		if err != nil {
			t.Fatal(err)
		}
		if img, err = mutate.AppendLayers(img, layer); err != nil {
			t.Fatal(err)
		}
	}
	config, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	config = config.DeepCopy()
	config.OS, config.Architecture, config.Variant = platform.OS, platform.Architecture, platform.Variant
	config.Config.Cmd = []string{"serve"}
	config.Config.Env = []string{"KEPT=yes"}
	if img, err = mutate.ConfigFile(img, config); err != nil {
		t.Fatal(err)
	}
	return img
}

var amd64 = v1.Platform{OS: "linux", Architecture: "amd64"}

// saveDocker writes a `docker save` archive, with the layers plain or gzipped.
func saveDocker(t *testing.T, file string, img v1.Image, plain bool) {
	t.Helper()
	tag, err := name.NewTag("example.org/app:1")
	if err != nil {
		t.Fatal(err)
	}
	if plain {
		layers, err := img.Layers()
		if err != nil {
			t.Fatal(err)
		}
		config, err := img.ConfigFile()
		if err != nil {
			t.Fatal(err)
		}
		rebuilt := empty.Image
		for _, layer := range layers {
			reader, err := layer.Uncompressed()
			if err != nil {
				t.Fatal(err)
			}
			content, err := io.ReadAll(reader)
			if err != nil {
				t.Fatal(err)
			}
			if rebuilt, err = mutate.AppendLayers(rebuilt, static.NewLayer(content, types.DockerUncompressedLayer)); err != nil {
				t.Fatal(err)
			}
		}
		if img, err = mutate.ConfigFile(rebuilt, config); err != nil {
			t.Fatal(err)
		}
	}
	if err := tarball.WriteToFile(file, tag, img); err != nil {
		t.Fatal(err)
	}
}

func TestDockerArchiveBecomesPlainLayers(t *testing.T) {
	shared := tarOf(t, "etc/a", "etc/b")
	img := sample(t, amd64, shared, shared)
	digests := map[string]bool{}
	for form, plain := range map[string]bool{"plain": true, "gzip": false, "gzip as a whole": false} {
		t.Run(form, func(t *testing.T) {
			r := request(t, site.Artifact{Kind: site.Image, DockerArchive: "out/image.tar"})
			file := filepath.Join(r.RepoRoot, "out", "image.tar")
			if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
				t.Fatal(err)
			}
			saveDocker(t, file, img, plain)
			if form == "gzip as a whole" {
				content, _ := os.ReadFile(file)
				os.WriteFile(file, gzipped(t, content), 0o644)
			}
			built := mustBuild(t, r)
			digests[built.Digest] = true
			manifest, config := image(t, built)
			wanted, err := img.RawConfigFile()
			if err != nil {
				t.Fatal(err)
			}
			if kept, _ := os.ReadFile(built.Blobs[len(built.Blobs)-2].Path); !bytes.Equal(kept, wanted) {
				t.Errorf("the config became %s", kept)
			}
			// A layer that is there twice is one blob.
			if len(manifest.Layers) != 3 || len(built.Blobs) != 4 || config.Config.Env[0] != "KEPT=yes" || !built.FromWorkTree {
				t.Errorf("%d layers, built %+v", len(manifest.Layers), built)
			}
			if got := readLayer(t, built.Blobs[1].Path); got["bin/amd64"].content != "bin/amd64" {
				t.Errorf("the layer holds %v", got)
			}

			// As path, and again from the record, it is the same image.
			again := r
			again.Artifact.DockerArchive, again.Artifact.Path = "", "out/image.tar"
			if other := mustBuild(t, again); other.Digest != built.Digest {
				t.Errorf("as a path its digest is %s, not %s", other.Digest, built.Digest)
			}
			if other := mustBuild(t, r); other.Digest != built.Digest || other.Blobs[0].Path != built.Blobs[0].Path {
				t.Errorf("the record says %+v", other)
			}
		})
	}
	if len(digests) != 1 {
		t.Errorf("the packing of layers changes the digest: %v", digests)
	}
}

func gzipped(t *testing.T, content []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	writer := gzip.NewWriter(&out)
	writer.Write(content)
	if err := writer.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func TestOverridesLeaveTheRestOfTheConfig(t *testing.T) {
	r := request(t, site.Artifact{Kind: site.Image, DockerArchive: "image.tar", StopSignal: "SIGINT"})
	saveDocker(t, filepath.Join(r.Tree, "image.tar"), sample(t, amd64), false)
	_, own := image(t, mustBuild(t, r))
	if own.Config.StopSignal != "SIGINT" || len(own.Config.Cmd) == 0 || own.Config.Env[0] != "KEPT=yes" {
		t.Errorf("config is %+v", own.Config)
	}

	r = request(t, site.Artifact{Kind: site.Image, DockerArchive: "image.tar", Entrypoint: []string{"/bin/other", "-v"}})
	saveDocker(t, filepath.Join(r.Tree, "image.tar"), sample(t, amd64), false)
	_, config := image(t, mustBuild(t, r))
	if strings.Join(config.Config.Entrypoint, " ") != "/bin/other -v" || len(config.Config.Cmd) != 0 || config.Config.Env[0] != "KEPT=yes" {
		t.Errorf("config is %+v", config.Config)
	}
}

func TestDamagedArchivesAreRefused(t *testing.T) {
	noise := make([]byte, 1<<20)
	for i := range noise {
		noise[i] = byte(i * i >> 7)
	}
	img := sample(t, amd64, append(tarOf(t, "etc/big"), noise...))
	good := filepath.Join(t.TempDir(), "good.tar")
	saveDocker(t, good, img, true)
	whole, err := os.ReadFile(good)
	if err != nil {
		t.Fatal(err)
	}
	compressed := filepath.Join(t.TempDir(), "compressed.tar")
	saveDocker(t, compressed, img, false)
	packed, err := os.ReadFile(compressed)
	if err != nil {
		t.Fatal(err)
	}
	flipped := bytes.Clone(whole)
	at := bytes.Index(flipped, noise[:1000])
	if at < 0 {
		t.Fatal("the layer is not plain in the archive")
	}
	flipped[at+500] ^= 1
	for name, test := range map[string]struct {
		content []byte
		says    string
	}{
		"cut in a plain layer":     {whole[:at+2000], "unexpected EOF"},
		"cut in a packed layer":    {packed[:len(packed)*2/3], ""},
		"cut before a later layer": {whole[:at-at%512], ""},
		"one bit flipped":          {flipped, "digest"},
		"empty":                    {nil, "manifest.json"},
		"cut when packed whole":    {gzipped(t, whole)[:5000], "unexpected EOF"},
	} {
		t.Run(name, func(t *testing.T) {
			r := request(t, site.Artifact{Kind: site.Image, DockerArchive: "image.tar"})
			if err := os.WriteFile(filepath.Join(r.Tree, "image.tar"), test.content, 0o644); err != nil {
				t.Fatal(err)
			}
			wantError(t, r, true, "image.tar", test.says)
		})
	}

	t.Run("for another platform", func(t *testing.T) {
		r := request(t, site.Artifact{Kind: site.Image, DockerArchive: "image.tar"})
		os.WriteFile(filepath.Join(r.Tree, "image.tar"), whole, 0o644)
		r.Platform = "linux/arm64"
		wantError(t, r, true, "linux/amd64", "linux/arm64")
	})
	t.Run("with another digest than declared", func(t *testing.T) {
		r := request(t, site.Artifact{Kind: site.Image, DockerArchive: "image.tar", SHA256: strings.Repeat("0", 64)})
		os.WriteFile(filepath.Join(r.Tree, "image.tar"), whole, 0o644)
		wantError(t, r, true, "image.tar", strings.Repeat("0", 64), digestOf(whole))
	})
}

func TestLayoutGivesTheImageOfThePlatform(t *testing.T) {
	dir := t.TempDir()
	arm64 := v1.Platform{OS: "linux", Architecture: "arm64"}
	var index v1.ImageIndex = empty.Index
	for _, platform := range []v1.Platform{amd64, arm64, {OS: "unknown", Architecture: "unknown"}} {
		index = mutate.AppendManifests(index, mutate.IndexAddendum{
			Add: sample(t, platform, tarOf(t, "etc/shared")), Descriptor: v1.Descriptor{Platform: &platform},
		})
	}
	// As builders with attestations write it: the index is inside of another.
	if _, err := layout.Write(dir, mutate.AppendManifests(empty.Index, mutate.IndexAddendum{Add: index})); err != nil {
		t.Fatal(err)
	}
	var packed bytes.Buffer
	writer := tar.NewWriter(&packed)
	if err := writer.AddFS(os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	writer.Close()

	digests := map[string]map[string]bool{}
	for _, platform := range []string{"linux/amd64", "linux/arm64"} {
		digests[platform] = map[string]bool{}
		for _, form := range []string{"folder", "tar"} {
			r := request(t, site.Artifact{Kind: site.Image, OCILayout: "layout"})
			r.Platform = platform
			place := filepath.Join(r.RepoRoot, "layout")
			if form == "tar" {
				os.WriteFile(place, packed.Bytes(), 0o644)
			} else if err := os.CopyFS(place, os.DirFS(dir)); err != nil {
				t.Fatal(err)
			}
			built := mustBuild(t, r)
			digests[platform][built.Digest] = true
			_, config := image(t, built)
			if "linux/"+config.Architecture != platform || readLayer(t, built.Blobs[1].Path)["bin/"+config.Architecture].content == "" {
				t.Errorf("for %s the config says %s", platform, config.Architecture)
			}
		}
		if len(digests[platform]) != 1 {
			t.Errorf("folder and tar differ: %v", digests[platform])
		}
	}

	for name, breakIt := range map[string]func(r *Request, place string){
		"no image for the platform": func(r *Request, _ string) { r.Platform = "linux/s390x" },
		"a damaged blob": func(_ *Request, place string) {
			blobs, _ := filepath.Glob(filepath.Join(place, "blobs/sha256/*"))
			for _, blob := range blobs {
				content, _ := os.ReadFile(blob)
				content[len(content)-1] ^= 1
				os.WriteFile(blob, content, 0o644)
			}
		},
		"a missing blob": func(_ *Request, place string) { os.RemoveAll(filepath.Join(place, "blobs")) },
	} {
		t.Run(name, func(t *testing.T) {
			r := request(t, site.Artifact{Kind: site.Image, OCILayout: "layout"})
			place := filepath.Join(r.Tree, "layout")
			if err := os.CopyFS(place, os.DirFS(dir)); err != nil {
				t.Fatal(err)
			}
			breakIt(&r, place)
			wantError(t, r, true, "oci layout layout")
		})
	}
}
