package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/nomad-site/site/internal/adapter/objectstore"
	"github.com/nomad-site/site/internal/blob"
	"github.com/nomad-site/site/internal/retry"
	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/testneeds"
	"github.com/nomad-site/site/internal/writesession/client"
)

const operatorToken = "s.operator"

// lockedBuffer takes the log while a test reads it.
type lockedBuffer struct {
	mutex sync.Mutex
	text  bytes.Buffer
}

func (b *lockedBuffer) Write(content []byte) (int, error) {
	b.mutex.Lock()
	defer b.mutex.Unlock()
	return b.text.Write(content)
}

func (b *lockedBuffer) String() string {
	b.mutex.Lock()
	defer b.mutex.Unlock()
	return b.text.String()
}

// running is the service with a store and an engine of its own.
type running struct {
	values map[string]string
	key    string
	log    *lockedBuffer
}

func newRunning(t *testing.T) *running {
	t.Helper()
	bao := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("X-Vault-Token") != operatorToken {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		_, _ = io.WriteString(w, `{"data":{"meta":{"operator":"anna"},"policies":["site-operator"]}}`)
	}))
	t.Cleanup(bao.Close)
	folder := t.TempDir()
	made := &running{key: rand.Text(), log: &lockedBuffer{}, values: map[string]string{
		varSite: "gamma", varListen: "127.0.0.1:0", varEndpoint: "http://" + freeAddress(t), varRegion: "us-east-1", varBucket: "gamma-artifacts",
		varKeys: filepath.Join(folder, "store_keys"), varOpenBao: bao.URL, varJWKS: bao.URL,
	}}
	if err := os.WriteFile(made.values[varKeys], []byte("gamma-admin\n"+made.key+"\n"), 0o400); err != nil {
		t.Fatal(err)
	}
	return made
}

func freeAddress(t *testing.T) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	return listener.Addr().String()
}

// startStore starts the store, which ends with the test.
func (r *running) startStore(t *testing.T) {
	t.Helper()
	folder := t.TempDir()
	for _, part := range []string{"data", "sidecar"} {
		if err := os.Mkdir(filepath.Join(folder, part), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	command := exec.Command(testneeds.Tool(t, "versitygw"), "--port", strings.TrimPrefix(r.values[varEndpoint], "http://"),
		"--region", r.values[varRegion], "--quiet", "posix", "--sidecar", filepath.Join(folder, "sidecar"), filepath.Join(folder, "data"))
	command.Env = append(os.Environ(), "ROOT_ACCESS_KEY=gamma-admin", "ROOT_SECRET_KEY="+r.key)
	command.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = command.Process.Kill(), command.Wait() })
	bucket, err := objectstore.New(objectstore.Options{
		Endpoint: r.values[varEndpoint], Region: r.values[varRegion], Bucket: r.values[varBucket], PathStyle: true,
		Keys: func(context.Context, bool) (string, secret.Value, error) {
			return "gamma-admin", secret.New(r.key), nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := retry.Until(t.Context(), "the store", 20*time.Second, bucket.MakeBucket); err != nil {
		t.Fatal(err)
	}
}

// start runs the service until stop, which gives its exit code.
func (r *running) start(t *testing.T) (address string, stop func() int) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	listening, ended := make(chan net.Addr, 1), make(chan int, 1)
	go func() {
		ended <- start(ctx, nil, environmentOf(r.values), io.Discard, r.log, func(at net.Addr) { listening <- at })
	}()
	select {
	case at := <-listening:
		return "http://" + at.String(), func() int { cancel(); return <-ended }
	case code := <-ended:
		cancel()
		t.Fatalf("code %d: %s", code, r.log)
		return "", nil
	}
}

func newClient(t *testing.T, address string) *client.Client {
	t.Helper()
	made, err := client.New(client.Options{
		BaseURL: address, Site: "gamma", HTTP: http.DefaultClient, Store: http.DefaultClient,
		Token: func(context.Context) (secret.Value, error) { return secret.New(operatorToken), nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	return made
}

func health(t *testing.T, address string) (store string, enforces bool) {
	t.Helper()
	response, err := http.Get(address + "/healthz")
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	var body struct {
		Store    string `json:"store"`
		Enforces bool   `json:"store_enforces_hashes"`
	}
	if err := json.NewDecoder(response.Body).Decode(&body); err != nil || response.StatusCode != http.StatusOK {
		t.Errorf("status %d, %v", response.StatusCode, err)
	}
	return body.Store, body.Enforces
}

func TestAnArtifactIsPushedThroughTheProgramIntoARealStore(t *testing.T) {
	r := newRunning(t)
	r.startStore(t)
	address, stop := r.start(t)
	content := make([]byte, 12<<20)
	_, _ = rand.Read(content)
	source := blob.BytesSource("shop", content)
	offer := blob.Offer{Blobs: []blob.Offered{{Source: source}}, Names: []blob.Name{{
		Site: "gamma", Artifact: "shop", Kind: blob.KindFile, Digest: source.Digest(), Size: source.Size(), Blobs: []blob.Digest{source.Digest()},
	}}}
	pusher := newClient(t, address)
	first, err := pusher.Push(t.Context(), offer, client.PushOptions{})
	if err != nil || first.Names != 1 || first.Packs < 2 {
		t.Fatalf("%+v, %v", first, err)
	}
	second, err := pusher.Push(t.Context(), offer, client.PushOptions{})
	if err != nil || second.Packs != 0 || second.BytesPlain != 0 {
		t.Errorf("again: %+v, %v", second, err)
	}
	listing, err := pusher.List(t.Context())
	if err != nil || len(listing.Artifacts) != 1 || listing.Artifacts[0].Digest != source.Digest() || listing.Packs != first.Packs {
		t.Errorf("%+v, %v", listing, err)
	}
	err = retry.Until(t.Context(), "the probe", 20*time.Second, func(context.Context) error {
		if _, enforces := health(t, address); !enforces {
			return context.DeadlineExceeded
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	if code := stop(); code != 0 {
		t.Errorf("code %d", code)
	}
	for _, hidden := range []string{"X-Amz-Signature", r.key, operatorToken} {
		if strings.Contains(r.log.String(), hidden) {
			t.Errorf("the log has %s: %s", hidden, r.log)
		}
	}
	if !strings.Contains(r.log.String(), "a write session is complete") {
		t.Errorf("the log: %s", r.log)
	}
}

func TestItRunsWhileTheStoreIsAwayAndWithoutKeys(t *testing.T) {
	r := newRunning(t)
	if err := os.Remove(r.values[varKeys]); err != nil {
		t.Fatal(err)
	}
	address, stop := r.start(t)
	until := func(want string) {
		t.Helper()
		err := retry.Until(t.Context(), "the state of the store", 20*time.Second, func(context.Context) error {
			if store, _ := health(t, address); !strings.Contains(store, want) {
				return &net.AddrError{Err: store, Addr: address}
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	}
	until("NoKeys")
	if code := stop(); code != 0 {
		t.Errorf("code %d", code)
	}
}
