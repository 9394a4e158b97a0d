package serve

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nomad-site/site/internal/blob"
)

// fixture is a store with one file "lab/tool" and one image "lab/hello".
type fixture struct {
	root                         string
	log                          bytes.Buffer
	handler                      *handler
	file, manifest, config, tail string // hex digests; tail is a blob that no name lists
	content                      []byte
}

func newFixture(t *testing.T) *fixture {
	t.Helper()
	f := &fixture{root: t.TempDir(), content: bytes.Repeat([]byte("0123456789"), 100_000)}
	f.file = f.blob(t, f.content)
	f.config = f.blob(t, []byte(`{"architecture":"amd64"}`))
	f.tail = f.blob(t, []byte("nobody's"))
	f.manifest = f.blob(t, []byte(`{"schemaVersion":2,"config":{"digest":"sha256:`+f.config+`"},"layers":[]}`))
	f.name(t, "lab/tool", blob.Name{Kind: blob.KindFile, Digest: digest(f.file), Blobs: []blob.Digest{digest(f.file)}})
	f.name(t, "lab/hello", blob.Name{Kind: blob.KindImage, Digest: digest(f.manifest), Blobs: []blob.Digest{digest(f.manifest), digest(f.config)}})
	store := reader{root: f.root}
	f.handler = &handler{
		store: store, verifier: newVerifier(store), metrics: newMetrics(f.root, "test"),
		log: slog.New(slog.NewTextHandler(&f.log, nil)),
	}
	return f
}

func (f *fixture) write(t *testing.T, relative string, content []byte) {
	t.Helper()
	path := filepath.Join(f.root, relative)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
}

func digest(hex string) blob.Digest { return blob.Digest("sha256:" + hex) }

func (f *fixture) blob(t *testing.T, content []byte) string {
	t.Helper()
	sum := sha256.Sum256(content)
	digest := hex.EncodeToString(sum[:])
	f.write(t, blobPath(digest), content)
	return digest
}

func (f *fixture) name(t *testing.T, name string, named blob.Name) {
	t.Helper()
	content, err := json.Marshal(named)
	if err != nil {
		t.Fatal(err)
	}
	f.write(t, "names/"+name+"/"+named.Digest.Hex()+".json", content)
}

func (f *fixture) ask(method, target string, header ...string) *httptest.ResponseRecorder {
	request := httptest.NewRequest(method, "/", nil)
	request.Host = "127.0.0.1:7380"
	request.URL.Path, request.URL.RawPath = target, ""
	if strings.Contains(target, "%") {
		request = httptest.NewRequest(method, target, nil)
		request.Host = "127.0.0.1:7380"
	}
	for index := 0; index+1 < len(header); index += 2 {
		request.Header.Set(header[index], header[index+1])
		if header[index] == "Host" {
			request.Host = header[index+1]
		}
	}
	recorder := httptest.NewRecorder()
	f.handler.ServeHTTP(recorder, request)
	return recorder
}

func (f *fixture) filePath() string { return "/artifacts/lab/tool@sha256:" + f.file }

func TestAFileIsServedWithItsLengthAndETag(t *testing.T) {
	f := newFixture(t)
	for _, path := range []string{f.filePath(), strings.NewReplacer(":", "%3A", "@", "%40").Replace(f.filePath())} {
		got := f.ask(http.MethodGet, path)
		if got.Code != http.StatusOK || !bytes.Equal(got.Body.Bytes(), f.content) {
			t.Fatalf("%s: %d, %d bytes", path, got.Code, got.Body.Len())
		}
		if got.Header().Get("Content-Length") != "1000000" || got.Header().Get("ETag") != `"sha256:`+f.file+`"` {
			t.Errorf("headers %v", got.Header())
		}
	}
	head := f.ask(http.MethodHead, f.filePath())
	if head.Code != http.StatusOK || head.Body.Len() != 0 || head.Header().Get("Content-Length") != "1000000" {
		t.Errorf("HEAD: %d, %d bytes, %v", head.Code, head.Body.Len(), head.Header())
	}
	part := f.ask(http.MethodGet, f.filePath(), "Range", "bytes=999995-")
	if part.Code != http.StatusPartialContent || part.Body.String() != "56789" || part.Header().Get("Content-Range") != "bytes 999995-999999/1000000" {
		t.Errorf("Range: %d %q %v", part.Code, part.Body, part.Header())
	}
	if got := f.ask(http.MethodGet, f.filePath(), "If-None-Match", `"sha256:`+f.file+`"`); got.Code != http.StatusNotModified {
		t.Errorf("If-None-Match: %d", got.Code)
	}
}

func TestAnImageIsPulledByDigest(t *testing.T) {
	f := newFixture(t)
	if got := f.ask(http.MethodGet, "/v2/"); got.Code != http.StatusOK {
		t.Errorf("/v2/: %d", got.Code)
	}
	got := f.ask(http.MethodGet, "/v2/lab/hello/manifests/sha256:"+f.manifest)
	if got.Code != http.StatusOK || got.Header().Get("Docker-Content-Digest") != "sha256:"+f.manifest ||
		got.Header().Get("Content-Type") != "application/vnd.oci.image.manifest.v1+json" {
		t.Errorf("manifest: %d %v", got.Code, got.Header())
	}
	if got := f.ask(http.MethodGet, "/v2/lab/hello/blobs/sha256:"+f.config); got.Code != http.StatusOK || got.Body.String() != `{"architecture":"amd64"}` {
		t.Errorf("config: %d %q", got.Code, got.Body)
	}
}

func TestTheMediaTypeComesFromTheManifest(t *testing.T) {
	for content, want := range map[string]string{
		`{"schemaVersion":2,"mediaType":"application/vnd.docker.distribution.manifest.v2+json"}`: "application/vnd.docker.distribution.manifest.v2+json",
		`{"schemaVersion":2,"manifests":[]}`:                                                     "application/vnd.oci.image.index.v1+json",
		`{"schemaVersion":2}`:                                                                    "application/vnd.oci.image.manifest.v1+json",
		`{"schemaVersion":1}`:                                                                    "",
		`#!/bin/sh`:                                                                              "",
	} {
		if _, got, err := manifest(strings.NewReader(content), int64(len(content))); got != want || (err == nil) != (want != "") {
			t.Errorf("%s: %q, %v", content, got, err)
		}
	}
}

func TestOCIRefusalsAreOCIErrors(t *testing.T) {
	f := newFixture(t)
	absent := strings.Repeat("0", 64)
	for path, code := range map[string]string{
		"/v2/lab/hello/manifests/latest":               "MANIFEST_UNKNOWN",
		"/v2/lab/hello/manifests/sha256:" + absent:     "MANIFEST_UNKNOWN",
		"/v2/lab/hello/manifests/sha256:" + f.tail:     "MANIFEST_UNKNOWN",
		"/v2/lab/hello/manifests/sha256:" + f.config:   "MANIFEST_UNKNOWN", // listed, but no manifest
		"/v2/lab/tool/manifests/sha256:" + f.file:      "MANIFEST_UNKNOWN", // a file is no image
		"/v2/lab/other/manifests/sha256:" + f.manifest: "MANIFEST_UNKNOWN",
		"/v2/lab/hello/blobs/sha256:" + f.tail:         "BLOB_UNKNOWN",
		"/v2/lab/hello/blobs/sha256:" + f.file:         "BLOB_UNKNOWN", // listed under another name
		"/v2/lab/tool/blobs/sha256:" + f.file:          "BLOB_UNKNOWN", // a file is no image
		"/v2/lab/hello/tags/list":                      "NAME_UNKNOWN",
		"/v2/_catalog":                                 "UNSUPPORTED",
	} {
		got := f.ask(http.MethodGet, path)
		var body struct{ Errors []struct{ Code string } }
		if err := json.Unmarshal(got.Body.Bytes(), &body); err != nil || got.Code != http.StatusNotFound || len(body.Errors) != 1 || body.Errors[0].Code != code {
			t.Errorf("%s: %d %s", path, got.Code, got.Body)
		}
	}
}

func TestHostilePathsFindNothing(t *testing.T) {
	f := newFixture(t)
	f.write(t, "secret", []byte("secret"))
	f.write(t, "blobs/sha256/secret", []byte("secret"))
	if err := os.WriteFile(filepath.Join(filepath.Dir(f.root), "outside"), []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	digest := "@sha256:" + f.file
	for _, path := range []string{
		"/", "", "*", "//", "/artifacts", "/artifacts/", "/artifacts/lab", "/artifacts/lab/", "/artifacts/lab/tool",
		"/artifacts/lab/tool@", "/artifacts/lab/tool@sha256:", "/artifacts/lab/tool" + digest + "0",
		"/artifacts/lab/tool" + digest[:len(digest)-1], "/artifacts/lab/tool" + digest + "/", "/artifacts/lab/tool" + digest + "\n",
		"/artifacts/lab/tool" + strings.ToUpper(digest), "/artifacts/lab/tool@sha512:" + f.file, "/artifacts/LAB/tool" + digest,
		"/artifacts/lab/../lab/tool" + digest, "/artifacts/lab/./tool" + digest, "/artifacts//lab/tool" + digest, "/artifacts/lab//tool" + digest,
		"/artifacts/../artifacts/lab/tool" + digest, "/../../../../etc/passwd", "/artifacts/../../etc/passwd", "/artifacts/lab/../../secret",
		"/artifacts/lab/tool" + digest + "/../../../../secret", "/artifacts/lab\x00/tool" + digest, `/artifacts/lab\tool` + digest,
		"/artifacts/.lab/tool" + digest, "/artifacts/lab/.tool" + digest, "/artifacts/lab/tool." + digest, "/artifacts/lab/to..ol" + digest,
		"/artifacts/lab/tool@sha256:../../../secret", "/artifacts/lab/tool@sha256:" + strings.Repeat(".", 64), "/artifacts/lab/tool@sha256:" + strings.Repeat("/", 64),
		"/artifacts/lab/ tool" + digest, "/artifacts/lab/tøol" + digest, "/artifacts/lab/tool;x" + digest,
		"/artifacts/lab/tool/tool" + digest, "/artifacts/" + strings.Repeat("a", 5000) + "/tool" + digest,
		"/artifacts/lab%2Ftool" + digest, "/artifacts/lab/%2e%2e/lab/tool" + digest, "/artifacts/lab/%2e%2e%2f%2e%2e%2fsecret", "/artifacts/lab/to%6fl" + digest,
		"/artifacts/lab/%5ctool" + digest, "/artifacts/lab/tool%00" + digest, "/artifacts/lab/tool%2540sha256:" + f.file, "/%2e%2e/secret",
		"/v2/lab/hello/blobs/sha256:../../secret", "/v2/../v2/lab/hello/blobs/sha256:" + f.config, "/v2/lab/hello/blobs/../blobs/sha256:" + f.config,
		"/v2/lab/hello/blobs/uploads/", "/v2/hello/blobs/sha256:" + f.config, "/v2//", "/v2/lab/hello/manifests/../manifests/sha256:" + f.manifest,
		"/v2/lab/hello/blobs/secret", "/v2/..", "/healthz/", "/healthz/..", "/metrics/../secret", "/debug/pprof/", "/secret", "/blobs/sha256/" + f.file,
		"/names/lab/tool/" + f.file + ".json", "/artifacts/lab/tool/" + f.file + ".json",
	} {
		got := f.ask(http.MethodGet, path)
		if got.Code != http.StatusNotFound || strings.Contains(got.Body.String(), "secret\n") || bytes.Contains(got.Body.Bytes(), f.content[:100]) {
			t.Errorf("%q: %d %.60q", path, got.Code, got.Body)
		}
		if got.Header().Get("Location") != "" {
			t.Errorf("%q is redirected", path)
		}
	}
}

func TestOtherMethodsAreRefusedOnEveryPath(t *testing.T) {
	f := newFixture(t)
	for _, method := range []string{"POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "PROPFIND", "get"} {
		for _, path := range []string{f.filePath(), "/v2/lab/hello/blobs/uploads/", "/v2/lab/hello/manifests/sha256:" + f.manifest, "/healthz", "/metrics", "/x"} {
			got := f.ask(method, path)
			if got.Code != http.StatusMethodNotAllowed || got.Header().Get("Allow") != "GET, HEAD" {
				t.Errorf("%s %s: %d, Allow %q", method, path, got.Code, got.Header().Get("Allow"))
			}
		}
	}
}

func TestOnlyLoopbackHostNamesAreAnswered(t *testing.T) {
	f := newFixture(t)
	for host, want := range map[string]int{
		"127.0.0.1:7380": 200, "127.0.0.1": 200, "localhost:7380": 200, "LOCALHOST": 200, "[::1]:7380": 200, "[::1]": 200, "127.9.9.9": 200,
		"evil.example": 421, "evil.example:7380": 421, "10.0.0.1:7380": 421, "localhost.evil.example": 421, "127.0.0.1.evil.example": 421, "0.0.0.0": 421, " ": 421, "::": 421,
	} {
		if got := f.ask(http.MethodGet, f.filePath(), "Host", host); got.Code != want {
			t.Errorf("Host %q: %d, want %d", host, got.Code, want)
		}
	}
}

func TestSymlinksInTheStoreAreNotFollowed(t *testing.T) {
	outside := filepath.Join(t.TempDir(), "outside")
	for name, plant := range map[string]func(f *fixture) (link, target string){
		"the blob":            func(f *fixture) (string, string) { return blobPath(f.file), "" },
		"the folder of blobs": func(*fixture) (string, string) { return "blobs/sha256", "" },
		"all blobs":           func(*fixture) (string, string) { return "blobs", "" },
		"the name's entry":    func(f *fixture) (string, string) { return "names/lab/tool/" + f.file + ".json", "" },
		"the name's folder":   func(*fixture) (string, string) { return "names/lab/tool", "" },
		"the site's folder":   func(*fixture) (string, string) { return "names/lab", "" },
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t)
			relative, _ := plant(f)
			path, moved := filepath.Join(f.root, relative), outside+strings.ReplaceAll(name, " ", "-")
			if got := f.ask(http.MethodGet, f.filePath()); got.Code != http.StatusOK { // and the proof is cached
				t.Fatalf("before: %d", got.Code)
			}
			if err := os.Rename(path, moved); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink(moved, path); err != nil {
				t.Fatal(err)
			}
			if got := f.ask(http.MethodGet, f.filePath()); got.Code != http.StatusNotFound || bytes.Contains(got.Body.Bytes(), f.content[:100]) {
				t.Errorf("followed: %d", got.Code)
			}
		})
	}
}

func TestAFolderOrFIFOInABlobsPlaceIsNotServed(t *testing.T) {
	f := newFixture(t)
	path := filepath.Join(f.root, blobPath(f.file))
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	for kind, plant := range map[string]func() error{
		"a folder": func() error { return os.Mkdir(path, 0o700) },
		"a FIFO":   func() error { return unix.Mkfifo(path, 0o600) },
	} {
		if err := plant(); err != nil {
			t.Fatal(err)
		}
		if got := f.ask(http.MethodGet, f.filePath()); got.Code != http.StatusNotFound {
			t.Errorf("%s: %d", kind, got.Code)
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
}

func TestACorruptBlobIsNeverServed(t *testing.T) {
	corruptions := map[string]func(f *fixture) error{
		"from the start": func(f *fixture) error {
			return os.WriteFile(filepath.Join(f.root, blobPath(f.file)), append([]byte("X"), f.content[1:]...), 0o600)
		},
		"after it was served": func(f *fixture) error {
			path := filepath.Join(f.root, blobPath(f.file))
			info, err := os.Stat(path)
			if err != nil {
				return err
			}
			if got := f.ask(http.MethodGet, f.filePath()); got.Code != http.StatusOK {
				return fmt.Errorf("before: %d", got.Code)
			}
			file, err := os.OpenFile(path, os.O_WRONLY, 0)
			if err != nil {
				return err
			}
			_, err = file.WriteAt([]byte("X"), 500)
			// Same size, and the time set back: only the change time tells.
			return errors.Join(err, file.Close(), os.Chtimes(path, info.ModTime(), info.ModTime()))
		},
		"cut short": func(f *fixture) error { return os.Truncate(filepath.Join(f.root, blobPath(f.file)), 10) },
		"emptied":   func(f *fixture) error { return os.Truncate(filepath.Join(f.root, blobPath(f.file)), 0) },
	}
	for name, corrupt := range corruptions {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t)
			if err := corrupt(f); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				for _, header := range [][]string{nil, {"Range", "bytes=0-9"}} {
					got := f.ask(http.MethodGet, f.filePath(), header...)
					if got.Code != http.StatusInternalServerError || bytes.Contains(got.Body.Bytes(), []byte("0123")) {
						t.Errorf("%d %.60q", got.Code, got.Body)
					}
				}
			}
			if !strings.Contains(f.log.String(), "corrupt") || !strings.Contains(f.log.String(), f.file) {
				t.Errorf("log: %s", &f.log)
			}
			if err := os.Remove(filepath.Join(f.root, blobPath(f.file))); err != nil {
				t.Fatal(err)
			}
			f.blob(t, f.content)
			if got := f.ask(http.MethodGet, f.filePath()); got.Code != http.StatusOK {
				t.Errorf("after the repair: %d", got.Code)
			}
		})
	}
}

func TestOtherThanLoopbackAddressesAreRefused(t *testing.T) {
	for _, listen := range []string{"0.0.0.0:0", "[::]:0", ":0", "10.0.0.1:0", "192.168.1.1:7380", "[fe80::1%lo]:0", "localhost:0", "example.com:80", "127.0.0.1", "", "[::ffff:10.0.0.1]:0"} {
		server, err := New(t.Context(), Options{Store: t.TempDir(), Listen: listen, Log: slog.New(slog.DiscardHandler)})
		var refused *NotLoopbackError
		if !errors.As(err, &refused) {
			t.Errorf("%q: %v, %v", listen, server, err)
		}
	}
}

func TestAThousandReadersAreServedAndTheServerStopsGracefully(t *testing.T) {
	f := newFixture(t)
	var states []string
	server, err := New(t.Context(), Options{
		Store: f.root, Listen: "127.0.0.1:0", Version: "test", Log: slog.New(slog.DiscardHandler),
		Notify: func(state string) error { states = append(states, state); return nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- server.Run(ctx) }()

	ctxReaders, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	transport := &http.Transport{DisableKeepAlives: true}
	defer transport.CloseIdleConnections()
	start := make(chan struct{})
	var group sync.WaitGroup
	for range 1000 {
		group.Go(func() {
			<-start
			request, err := http.NewRequestWithContext(ctxReaders, http.MethodGet, "http://"+server.Address()+f.filePath(), nil)
			if err != nil {
				t.Error(err)
				return
			}
			response, err := transport.RoundTrip(request)
			if err != nil {
				t.Error(err)
				return
			}
			defer func() { _ = response.Body.Close() }()
			hash := sha256.New()
			if _, err := io.Copy(hash, response.Body); err != nil || hex.EncodeToString(hash.Sum(nil)) != f.file {
				t.Errorf("%d: %v", response.StatusCode, err)
			}
		})
	}
	close(start)
	group.Wait()

	response, err := http.Get("http://" + server.Address() + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(response.Body)
	_ = response.Body.Close()
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		`site_host_requests_total{code="200",dialect="file"} 1000`, `site_host_response_bytes_total{dialect="file"} 1e+09`,
		"site_host_store_blobs 4", "site_host_store_bytes 1.0001",
	} {
		if !strings.Contains(string(text), want) {
			t.Errorf("no %q in the metrics:\n%s", want, text)
		}
	}
	stop()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if strings.Join(states, ",") != "READY=1,STOPPING=1" {
		t.Errorf("notified %v", states)
	}
}

func TestSystemdIsNotifiedOnItsSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify")
	listener, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = listener.Close() }()
	if err := SystemdNotify(path)("READY=1"); err != nil {
		t.Fatal(err)
	}
	buffer := make([]byte, 64)
	if n, err := listener.Read(buffer); err != nil || string(buffer[:n]) != "READY=1" {
		t.Errorf("got %q, %v", buffer[:n], err)
	}
	if SystemdNotify("") != nil {
		t.Error("there is nobody to notify")
	}
}
