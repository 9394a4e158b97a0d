package collect

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nomad-site/site/internal/blob"
	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/sitehost/pull"
	"github.com/nomad-site/site/internal/sitehost/pull/pulltest"
	"github.com/nomad-site/site/internal/sitehost/serve"
	"github.com/nomad-site/site/internal/testneeds"
)

type oneKey struct{}

func (oneKey) Keys(context.Context, bool) (string, secret.Value, int, error) {
	return "id-1", secret.New("key-1"), 1, nil
}

// publishImage has an image of one file in the bucket.
func publishImage(t *testing.T, bucket *pulltest.Bucket, artifact, content string) blob.Name {
	t.Helper()
	var layer bytes.Buffer
	archive := tar.NewWriter(&layer)
	must(t, archive.WriteHeader(&tar.Header{Name: "hello", Mode: 0o644, Size: int64(len(content))}))
	_, err := archive.Write([]byte(content))
	must(t, err)
	must(t, archive.Close())
	config := fmt.Appendf(nil, `{"architecture":"amd64","os":"linux","config":{"Cmd":["/hello"]},"rootfs":{"type":"layers","diff_ids":[%q]}}`, blob.DigestOf(layer.Bytes()))
	manifest := fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json",`+
		`"config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":%q,"size":%d},`+
		`"layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":%q,"size":%d}]}`,
		blob.DigestOf(config), len(config), blob.DigestOf(layer.Bytes()), layer.Len())
	return bucket.Publish(t, artifact, blob.KindImage, manifest, config, layer.Bytes())
}

// TestPodmansCopiesGoWithTheirArtifacts has the real podman pull images that the
// host lacks through the host's own server.
func TestPodmansCopiesGoWithTheirArtifacts(t *testing.T) {
	testneeds.Root(t)
	podman := testneeds.Program(t, "podman")
	f := newFixture(t)
	bucket := pulltest.NewBucket(t)
	puller, err := pull.New(pull.Options{Config: bucket.Config(), Store: f.store, Keys: oneKey{}, MakeRoom: Room(f.store)})
	must(t, err)
	t.Cleanup(puller.Close)
	server, err := serve.New(t.Context(), serve.Options{
		Store: f.store.Dir(), Listen: "127.0.0.1:0", Log: slog.New(slog.DiscardHandler),
		Puller: func() (serve.Puller, error) { return puller, nil },
	})
	must(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- server.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		must(t, <-ended)
	})

	folder, err := os.MkdirTemp("", "podman") // podman takes no long path
	must(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(folder) })
	p := Podman{
		Command:  []string{podman, "--root=" + filepath.Join(folder, "root"), "--runroot=" + filepath.Join(folder, "run"), "--storage-driver=vfs"},
		Registry: server.Address(),
	}
	kept, gone, used, named := publishImage(t, bucket, "kept", "1"), publishImage(t, bucket, "gone", "2"),
		publishImage(t, bucket, "used", "3"), publishImage(t, bucket, "named", "4")
	for _, name := range []blob.Name{kept, gone, used, named} {
		p.must(t, "pull", "--quiet", "--tls-verify=false", p.Registry+"/"+name.String())
	}
	p.must(t, "create", "--name=user", "--network=none", p.Registry+"/"+used.String())
	t.Cleanup(func() { _, _ = p.run(context.Background(), "rm", "--force", "user") })
	p.must(t, "tag", p.Registry+"/"+named.String(), "localhost/mine:1")
	f.keep(t, kept)
	for _, name := range []blob.Name{gone, used, named} {
		f.age(t, filepath.Join("names/lab", name.Artifact, name.Digest.Hex()+".json"), 2*time.Hour)
	}
	for _, dry := range []bool{true, false} {
		result, err := Run(t.Context(), Options{Store: f.store, List: f.list, DryRun: dry})
		must(t, err)
		must(t, p.Images(t.Context(), &result, f.list))
		fates := map[string]string{}
		for _, one := range result.Images {
			fates[one.Name] = fmt.Sprint(one.Removed, ": ", one.Reason)
		}
		want := map[string]string{
			kept.String(): "false: the host keeps the artifact", gone.String(): "true: the host has the artifact no more",
			used.String(): "false: a container uses it",
		}
		if fmt.Sprint(fates) != fmt.Sprint(want) {
			t.Errorf("dry run %v: got %v", dry, fates)
		}
	}
	for name, want := range map[blob.Digest]bool{kept.Digest: true, gone.Digest: false, used.Digest: true, named.Digest: true} {
		images := p.must(t, "image", "ls", "--digests", "--format", "{{.Digest}}")
		if got := strings.Contains(images, string(name)); got != want {
			t.Errorf("%s is there: %v", name, got)
		}
	}
}

func (p Podman) must(t *testing.T, arguments ...string) string {
	t.Helper()
	output, err := p.run(t.Context(), arguments...)
	if err != nil {
		t.Fatal(err)
	}
	return string(output)
}
