package serve

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nomad-site/site/internal/blob"
	"github.com/nomad-site/site/internal/retry"
	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/sitehost/pull"
	"github.com/nomad-site/site/internal/sitehost/pull/pulltest"
)

type testKeys struct{ err error }

func (k *testKeys) Keys(context.Context, bool) (string, secret.Value, int, error) {
	return "id-1", secret.New("key-1"), 1, k.err
}

// reading is a server whose store is empty, and an object store.
type reading struct {
	bucket *pulltest.Bucket
	keys   *testKeys
	store  *blob.Store
	puller *pull.Puller
	server *httptest.Server
	log    bytes.Buffer
}

func newReading(t *testing.T) *reading {
	t.Helper()
	r := &reading{bucket: pulltest.NewBucket(t), keys: &testKeys{}}
	folder := filepath.Join(t.TempDir(), "store")
	store, err := blob.OpenStore(folder)
	if err != nil {
		t.Fatal(err)
	}
	r.store = store
	if r.puller, err = pull.New(pull.Options{Config: r.bucket.Config(), Store: store, Keys: r.keys}); err != nil {
		t.Fatal(err)
	}
	files := reader{root: folder}
	r.server = httptest.NewServer(&handler{
		store: files, verifier: newVerifier(files), metrics: newMetrics(folder, "test", r.puller), log: slog.New(slog.NewTextHandler(&r.log, nil)),
		puller: func() (Puller, error) { return r.puller, nil },
	})
	t.Cleanup(func() {
		r.server.Close()
		r.puller.Close()
		_ = store.Close()
	})
	return r
}

type got struct {
	status int
	header http.Header
	body   []byte
}

func (r *reading) get(t *testing.T, path string) got {
	t.Helper()
	request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, r.server.URL+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return got{response.StatusCode, response.Header, body}
}

func filePath(name blob.Name) string {
	return "/artifacts/lab/" + name.Artifact + "@" + string(name.Digest)
}

func imagePath(name blob.Name, kind string, part int) string {
	return "/v2/lab/" + name.Artifact + "/" + kind + "/" + string(name.Blobs[part])
}

func TestAFileThatLacksIsPulledFirst(t *testing.T) {
	r := newReading(t)
	content := pulltest.Random(1, 3<<20)
	name := r.bucket.Publish(t, "tool", blob.KindFile, content)
	var group sync.WaitGroup
	for range 8 {
		group.Go(func() {
			if got := r.get(t, filePath(name)); got.status != http.StatusOK || !bytes.Equal(got.body, content) {
				t.Errorf("%d, %d bytes", got.status, len(got.body))
			}
		})
	}
	group.Wait()
	if sent := r.bucket.Sent(); sent > 3<<20+1<<17 {
		t.Errorf("%d bytes came for one file", sent)
	}
	if _, err := r.store.Name("lab", "tool", name.Digest); err != nil {
		t.Errorf("its name is not published: %v", err)
	}
	// From now on the object store is not needed.
	r.bucket.Close()
	if got := r.get(t, filePath(name)); got.status != http.StatusOK {
		t.Errorf("%d with the store away", got.status)
	}
}

func TestAnImageThatLacksIsPulledPartByPart(t *testing.T) {
	r := newReading(t)
	config, layer := []byte(`{"architecture":"amd64"}`), pulltest.Random(2, 2<<20)
	manifest := fmt.Appendf(nil, `{"schemaVersion":2,"config":{"digest":%q},"layers":[{"digest":%q}]}`, blob.DigestOf(config), blob.DigestOf(layer))
	name := r.bucket.Publish(t, "hello", blob.KindImage, manifest, config, layer)
	// A blob alone says nothing of the artifact to which it belongs.
	if got := r.get(t, imagePath(name, "blobs", 1)); got.status != http.StatusNotFound {
		t.Errorf("a blob before its manifest: %d", got.status)
	}
	if got := r.get(t, imagePath(name, "manifests", 0)); got.status != http.StatusOK || !bytes.Equal(got.body, manifest) {
		t.Fatalf("%d: %s", got.status, got.body)
	}
	for part, content := range [][]byte{manifest, config, layer} {
		if got := r.get(t, imagePath(name, "blobs", part)); got.status != http.StatusOK || !bytes.Equal(got.body, content) {
			t.Errorf("part %d: %d", part, got.status)
		}
	}
	// What nobody asked for follows, and the name with it.
	err := retry.Until(t.Context(), "the name to be published", 10*time.Second, func(context.Context) error {
		_, err := r.store.Name("lab", "hello", name.Digest)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if r.puller.Pending("hello", name.Digest) {
		t.Error("it is pending still")
	}
}

func TestWhatTheObjectStoreDoesNotHaveIsNotThere(t *testing.T) {
	r := newReading(t)
	tool := r.bucket.Publish(t, "tool", blob.KindFile, []byte("a tool"))
	image := r.bucket.Publish(t, "hello", blob.KindImage, []byte(`{"schemaVersion":2}`))
	none := strings.Repeat("0", 64)
	for _, path := range []string{
		"/artifacts/lab/tool@sha256:" + none,
		"/artifacts/other/tool@" + string(tool.Digest), // another site
		"/artifacts/lab/hello@" + string(image.Digest), // not a file
		"/v2/lab/tool/manifests/" + string(tool.Digest),
		"/v2/lab/hello/manifests/sha256:" + none,
		"/v2/lab/hello/blobs/sha256:" + none,
		"/v2/other/hello/manifests/" + string(image.Digest),
		"/artifacts/lab/" + strings.Repeat("a", 300) + "@sha256:" + none,
	} {
		if got := r.get(t, path); got.status != http.StatusNotFound {
			t.Errorf("%s: %d, %s", path, got.status, got.body)
		}
	}
}

func TestAMissSaysWhyItCannotBePulledNow(t *testing.T) {
	for _, test := range []struct {
		name   string
		spoil  func(r *reading, name blob.Name)
		status int
		says   string
	}{
		{"no keys", func(r *reading, _ blob.Name) { r.keys.err = &pull.NoKeysError{Err: errors.New("OpenBao is sealed")} },
			http.StatusServiceUnavailable, "no keys to the object store: OpenBao is sealed"},
		{"refused keys", func(r *reading, _ blob.Name) { r.bucket.Keys = nil },
			http.StatusServiceUnavailable, "refuses the host's keys (generation 1): InvalidAccessKeyId"},
		{"a wrong byte", func(r *reading, _ blob.Name) {
			for key, content := range r.bucket.Objects {
				if strings.Contains(key, "/packs/") {
					content[len(content)/2] ^= 1
				}
			}
		}, http.StatusBadGateway, "holds something else"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			r := newReading(t)
			file := r.bucket.Publish(t, "tool", blob.KindFile, pulltest.Random(1, 100_000))
			image := r.bucket.Publish(t, "hello", blob.KindImage, fmt.Appendf(nil, `{"schemaVersion":2,"x":"%x"}`, pulltest.Random(2, 1000)))
			test.spoil(r, file)
			for _, path := range []string{filePath(file), imagePath(image, "manifests", 0)} {
				got := r.get(t, path)
				if got.status != test.status || !strings.Contains(string(got.body), test.says) {
					t.Errorf("%s: %d, %s", path, got.status, got.body)
				}
				if again := got.header.Get("Retry-After"); (again != "") != (test.status == http.StatusServiceUnavailable) {
					t.Errorf("%s: Retry-After %q", path, again)
				}
				if strings.HasPrefix(path, "/v2/") && !strings.HasPrefix(string(got.body), `{"errors":[{"code":"`) {
					t.Errorf("%s: no error of the registry's dialect: %s", path, got.body)
				}
			}
			if health := r.get(t, "/healthz"); health.status != http.StatusOK {
				t.Errorf("healthz: %d", health.status)
			}
		})
	}
}

func TestTheMetricsCountPulls(t *testing.T) {
	r := newReading(t)
	name := r.bucket.Publish(t, "tool", blob.KindFile, pulltest.Random(1, 100_000))
	r.get(t, filePath(name))
	r.get(t, "/artifacts/lab/tool@sha256:"+strings.Repeat("0", 64))
	metrics := string(r.get(t, "/metrics").body)
	for _, want := range []string{
		"site_host_pulled_blobs_total 1\n", "site_host_pulled_plain_bytes_total 100000\n", "site_host_pull_errors_total{reason=\"not_found\"} 1\n",
		"site_host_object_store_requests_total 4\n",
	} {
		if !strings.Contains(metrics, want) {
			t.Errorf("no %q", want)
		}
	}
}
