package command

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nomad-site/site/internal/blob"
	"github.com/nomad-site/site/internal/retry"
	"github.com/nomad-site/site/internal/site"
	"github.com/nomad-site/site/internal/sitehost/hostkey"
	"github.com/nomad-site/site/internal/sitehost/pull/pulltest"
)

// pulling is a host with an empty store, whose site has an object store.
type pulling struct {
	bucket  *pulltest.Bucket
	openBao *pulltest.OpenBao
	folder  string
}

func newPulling(t testing.TB) *pulling {
	t.Helper()
	p := &pulling{bucket: pulltest.NewBucket(t), folder: t.TempDir()}
	public, err := hostkey.Ensure(p.path("host.key"))
	if err != nil {
		t.Fatal(err)
	}
	p.openBao = pulltest.NewOpenBao(t, public)
	p.openBao.Values[site.StoreProxyID+" v1"], p.openBao.Values[site.StoreProxySecret+" v1"] = "id-1", "key-1"
	p.openBao.Values[site.StoreProxyID+" v2"], p.openBao.Values[site.StoreProxySecret+" v2"] = "id-2", "key-2"
	config, err := json.Marshal(p.bucket.Config())
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(p.path("object-store.json"), config, 0o600); err != nil {
		t.Fatal(err)
	}
	return p
}

func (p *pulling) path(name string) string { return filepath.Join(p.folder, name) }

func (p *pulling) pull(t *testing.T, names ...blob.Name) answer {
	t.Helper()
	var wants []map[string]string
	for _, name := range names {
		wants = append(wants, map[string]string{"artifact": name.Artifact, "digest": string(name.Digest)})
	}
	stdin, err := json.Marshal(wants)
	if err != nil {
		t.Fatal(err)
	}
	return run(t.Context(), "", string(stdin), append([]string{"pull"}, p.flags()...)...)
}

func (p *pulling) flags() []string {
	return []string{
		"--store=" + p.path("store"), "--object-store=" + p.path("object-store.json"), "--host-key=" + p.path("host.key"), "--openbao=" + p.openBao.URL,
	}
}

func lastLine(text string) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return lines[len(lines)-1]
}

func TestPullBringsArtifactsAndSaysHowFarItIs(t *testing.T) {
	p := newPulling(t)
	tool := p.bucket.Publish(t, "tool", blob.KindFile, pulltest.Random(1, 1<<20))
	image := p.bucket.Publish(t, "hello", blob.KindImage, []byte(`{"schemaVersion":2}`), pulltest.Random(2, 1<<20))
	got := p.pull(t, tool, image)
	total := tool.Size + image.Size
	if got.code != 0 || !strings.HasPrefix(got.stdout, fmt.Sprintf(`{"done":0,"total":%d}`, total)) ||
		!strings.Contains(got.stdout, fmt.Sprintf(`{"done":%d,"total":%d}`, total, total)) ||
		!strings.HasPrefix(lastLine(got.stdout), `{"result":{"names":2,`) || !strings.HasSuffix(lastLine(got.stdout), `"key_generation":1}}`) {
		t.Errorf("%+v", got)
	}
	again := p.pull(t, tool, image)
	if want := `{"result":{"names":2,"requests":0,"bytes_received":0,"key_generation":0}}`; again.code != 0 || lastLine(again.stdout) != want {
		t.Errorf("again: %+v", again)
	}
	var status storeStatus
	answered := run(t.Context(), "", "", "store", "status", "--store="+p.path("store"), "--server=127.0.0.1:1")
	if err := json.Unmarshal([]byte(answered.stdout), &status); err != nil || len(status.Names) != 2 || status.Blobs != 3 || status.Bytes != total || status.Serving {
		t.Errorf("status: %+v, %v", answered, err)
	}
}

func TestPullSaysWhyItFailed(t *testing.T) {
	p := newPulling(t)
	tool := p.bucket.Publish(t, "tool", blob.KindFile, pulltest.Random(1, 1000))
	other := tool
	other.Artifact = "other"
	check := func(got answer, code string) {
		t.Helper()
		if got.code != ExitError || !strings.HasPrefix(lastLine(got.stdout), `{"error":{"code":"`+code+`","message":"`) || !strings.Contains(lastLine(got.stdout), `"hint":"`) ||
			!strings.HasPrefix(got.stderr, "error: ") || strings.Contains(got.stdout+got.stderr, "key-1") {
			t.Errorf("want %s, got %+v", code, got)
		}
	}
	check(p.pull(t, other), "not_found")
	p.openBao.Set(func() { p.openBao.Sealed = true })
	check(p.pull(t, tool), "no_keys")
	p.openBao.Set(func() { p.openBao.Sealed = false })
	p.bucket.Keys = map[string]string{"id-2": "key-2"}
	check(p.pull(t, tool), "denied")
	if got := run(t.Context(), "", `[{"artifact":"tool","digest":"latest"}]`, append([]string{"pull"}, p.flags()...)...); got.code != ExitError {
		t.Errorf("a tag: %+v", got)
	}
}

func TestKeepAndCollectSpeakOfTheSameNames(t *testing.T) {
	p := newPulling(t)
	kept := p.bucket.Publish(t, "tool", blob.KindFile, []byte("kept"))
	gone := p.bucket.Publish(t, "tool", blob.KindFile, []byte("gone"))
	if got := p.pull(t, kept, gone); got.code != 0 {
		t.Fatal(got)
	}
	old := time.Now().Add(-2 * time.Hour)
	for _, name := range []blob.Name{kept, gone} {
		if err := os.Chtimes(filepath.Join(p.path("store"), "names/lab/tool", name.Digest.Hex()+".json"), old, old); err != nil {
			t.Fatal(err)
		}
	}
	store := "--store=" + p.path("store")
	// podman of this machine is not asked: no image is there of what is not kept.
	t.Setenv("PATH", t.TempDir())
	if got := run(t.Context(), "", "", "store", "collect", store); !strings.Contains(got.stdout, `"refused":"there is no list`) || strings.Contains(got.stdout, `"removed":true`) {
		t.Errorf("without a list: %+v", got)
	}
	if got := run(t.Context(), "", `{"names":["`+kept.String()+`"]}`, "store", "keep", store); got.code != 0 || got.stdout != "{\"names\":1}\n" {
		t.Errorf("keep: %+v", got)
	}
	for _, arguments := range [][]string{{"store", "collect", store, "--dry-run"}, {"store", "collect", store}} {
		got := run(t.Context(), "", "", arguments...)
		var result struct {
			Artifacts []struct {
				Digest  blob.Digest
				Removed bool
				Reason  string
			}
			BytesFreed int64 `json:"bytes_freed"`
		}
		err := json.Unmarshal([]byte(got.stdout), &result)
		if err != nil || got.code != 0 || len(result.Artifacts) != 2 || result.BytesFreed != 4 {
			t.Fatalf("%v: %+v", arguments, got)
		}
		for _, one := range result.Artifacts {
			if one.Removed != (one.Digest == gone.Digest) || one.Reason == "" {
				t.Errorf("%v: %+v", arguments, one)
			}
		}
	}
	if got := p.pull(t, gone); got.code != 0 { // it comes back where it is asked for
		t.Error(got)
	}
}

// serving runs the server of a host until the test ends.
func (p *pulling) serving(t *testing.T) (address string, stop func()) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address = listener.Addr().String()
	_ = listener.Close()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan answer, 1)
	go func() {
		ended <- run(ctx, "", "", append([]string{"serve", "--listen=" + address, "--unseal-key=" + p.path("none")}, p.flags()...)...)
	}()
	err = retry.Until(t.Context(), "the server to serve", 10*time.Second, func(context.Context) error {
		if _, status := fetchFrom(t, "http://"+address+"/healthz"); status != http.StatusOK {
			return fmt.Errorf("it answers with %d", status)
		}
		return nil
	})
	if err != nil {
		cancel()
		t.Fatalf("%v: %+v", err, <-ended)
	}
	stop = func() {
		cancel()
		if got := <-ended; got.code != 0 {
			t.Errorf("it ended with %+v", got)
		}
	}
	return address, stop
}

func fetchFrom(t *testing.T, url string) (string, int) {
	t.Helper()
	request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return "", 0
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Error(err)
	}
	return string(body), response.StatusCode
}

func TestTheServerPullsWhatLacksAndReportsItsKeys(t *testing.T) {
	p := newPulling(t)
	content := pulltest.Random(1, 100_000)
	tool := p.bucket.Publish(t, "tool", blob.KindFile, content)
	address, stop := p.serving(t)
	defer stop()
	body, status := fetchFrom(t, "http://"+address+"/artifacts/lab/tool@"+string(tool.Digest))
	if status != http.StatusOK || body != string(content) {
		t.Errorf("%d, %d bytes", status, len(body))
	}
	got := run(t.Context(), "", "", "store", "status", "--store="+p.path("store"), "--server="+address)
	var said storeStatus
	if err := json.Unmarshal([]byte(got.stdout), &said); err != nil || !said.Serving || said.KeyGeneration != 1 {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestTheServerTakesNewKeysWhenItIsTold(t *testing.T) {
	p := newPulling(t)
	tool := p.bucket.Publish(t, "tool", blob.KindFile, []byte("content"))
	address, stop := p.serving(t)
	defer stop()
	fetchFrom(t, "http://"+address+"/artifacts/lab/tool@"+string(tool.Digest))
	p.openBao.Set(func() { p.openBao.Newest = map[string]int{site.StoreProxyID: 2, site.StoreProxySecret: 2} })
	// Keys that were read a moment ago are not read again.
	err := retry.Until(t.Context(), "the new keys", 10*time.Second, func(context.Context) error {
		if got := run(t.Context(), "", "", "store", "refresh", "--server="+address); got.code != 0 {
			return retry.Permanent(fmt.Errorf("%+v", got))
		}
		if generation, err := keyGeneration(t.Context(), address); err != nil || generation != 2 {
			return fmt.Errorf("generation %d, %w", generation, err)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	p.openBao.Set(func() { p.openBao.Sealed = true })
	err = retry.Until(t.Context(), "it to say so", 10*time.Second, func(context.Context) error {
		got := run(t.Context(), "", "", "store", "refresh", "--server="+address)
		if got.code == 0 || !strings.Contains(got.stderr, "OpenBao is sealed") {
			return fmt.Errorf("%+v", got)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	if generation, err := keyGeneration(t.Context(), address); err != nil || generation != 2 {
		t.Errorf("generation %d, %v", generation, err)
	}
}

func TestTheServerServesWhateverItsObjectStoreIs(t *testing.T) {
	for name, spoil := range map[string]func(p *pulling) error{
		"no file":       func(p *pulling) error { return os.Remove(p.path("object-store.json")) },
		"a broken file": func(p *pulling) error { return os.WriteFile(p.path("object-store.json"), []byte("{"), 0o600) },
		"no host key":   func(p *pulling) error { return os.Remove(p.path("host.key")) },
		"no OpenBao":    func(p *pulling) error { p.openBao.Close(); return nil },
		"no bucket":     func(p *pulling) error { p.bucket.Keys = nil; return nil },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newPulling(t)
			here, lacks := p.bucket.Publish(t, "tool", blob.KindFile, []byte("here")), p.bucket.Publish(t, "tool", blob.KindFile, []byte("lacks"))
			if got := p.pull(t, here); got.code != 0 {
				t.Fatal(got)
			}
			if err := spoil(p); err != nil {
				t.Fatal(err)
			}
			address, stop := p.serving(t)
			defer stop()
			if body, status := fetchFrom(t, "http://"+address+"/artifacts/lab/tool@"+string(here.Digest)); status != http.StatusOK || body != "here" {
				t.Errorf("what is there: %d", status)
			}
			want := http.StatusServiceUnavailable
			if name == "no file" {
				want = http.StatusNotFound
			}
			if body, status := fetchFrom(t, "http://"+address+"/artifacts/lab/tool@"+string(lacks.Digest)); status != want {
				t.Errorf("what lacks: %d, %s", status, body)
			}
		})
	}
}
