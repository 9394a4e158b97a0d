//go:build linux

package bench

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nomad-site/site/internal/adapter/objectstore"
	reconcile "github.com/nomad-site/site/internal/reconcile/secret"
	"github.com/nomad-site/site/internal/retry"
	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/testneeds"
)

// programs are built once for all benchmarks that run them on this machine.
type programs struct{ folder string }

// build gives the executable of one of the project's programs, as it is released.
func (p programs) build(b *testing.B, name string) string {
	b.Helper()
	root, err := filepath.Abs("../..")
	if err != nil {
		b.Fatal(err)
	}
	path := filepath.Join(p.folder, name)
	if _, err := os.Stat(path); err == nil {
		return path
	}
	command := exec.Command("go", "build", "-C", root, "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", path, "./cmd/"+name)
	command.Env = append(os.Environ(), "CGO_ENABLED=0")
	if output, err := command.CombinedOutput(); err != nil {
		b.Fatalf("build %s: %v: %s", name, err, output)
	}
	return path
}

// bigFolder is one where some GB may be written; it goes with the benchmark.
func bigFolder(b *testing.B) string {
	b.Helper()
	folder, err := os.MkdirTemp(os.Getenv("SITE_BENCH_FOLDER"), "site-bench-")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := os.RemoveAll(folder); err != nil {
			b.Error(err)
		}
	})
	return folder
}

// uploads is an object store on this machine, and the service that lets others
// write to it, each a process. Nobody else uses them.
type uploads struct {
	folder, log            string
	endpoint, id, key, api string
	store, service         *exec.Cmd
	said                   *os.File
}

// startUploads starts both with nothing in them, below folder.
func startUploads(b *testing.B, folder string, built programs) *uploads {
	b.Helper()
	made, err := os.MkdirTemp(folder, "store-")
	if err != nil {
		b.Fatal(err)
	}
	u := &uploads{folder: made, log: filepath.Join(made, "access.log"), id: "BENCH" + rand.Text(), key: rand.Text()}
	b.Cleanup(u.stop)
	if err := errors.Join(u.startStore(testneeds.Tool(b, "versitygw")), u.startService(b, built.build(b, "object-storage-service"))); err != nil {
		b.Fatal(err)
	}
	return u
}

func (u *uploads) startStore(program string) error {
	address, err := freeAddress()
	if err != nil {
		return err
	}
	u.endpoint = "http://" + address
	data := filepath.Join(u.folder, "data")
	if err := os.Mkdir(data, 0o700); err != nil {
		return err
	}
	u.store = exec.Command(program, "--port", address, "--region", storeRegion, "--quiet", "--access-log", u.log, "posix", data)
	u.store.Env = append(os.Environ(), "ROOT_ACCESS_KEY="+u.id, "ROOT_SECRET_KEY="+u.key)
	u.store.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := u.store.Start(); err != nil {
		return err
	}
	bucket, err := u.bucket()
	if err != nil {
		return err
	}
	return retry.Until(context.Background(), "the object store", 20*time.Second, bucket.MakeBucket)
}

func (u *uploads) bucket() (*objectstore.Bucket, error) {
	return objectstore.New(objectstore.Options{
		Endpoint: u.endpoint, Region: storeRegion, Bucket: benchBucket, PathStyle: true,
		Keys: func(context.Context, bool) (string, secret.Value, error) { return u.id, secret.New(u.key), nil },
	})
}

// startService runs the service; an OpenBao of the benchmark knows its one token.
func (u *uploads) startService(b *testing.B, program string) error {
	bao := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("X-Vault-Token") != benchToken {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		_, _ = fmt.Fprintf(w, `{"data":{"meta":{"operator":"bench"},"policies":[%q]}}`, reconcile.UploaderPolicy)
	}))
	b.Cleanup(bao.Close)
	address, err := freeAddress()
	if err != nil {
		return err
	}
	keys := filepath.Join(u.folder, "store_keys")
	if err := os.WriteFile(keys, []byte(u.id+"\n"+u.key+"\n"), 0o400); err != nil {
		return err
	}
	if u.said, err = os.Create(filepath.Join(u.folder, "service.log")); err != nil {
		return err
	}
	u.api = "http://" + address
	u.service = exec.Command(program)
	u.service.Env = []string{
		"SITE_NAME=" + labName, "LISTEN=" + address, "STORE_ENDPOINT=" + u.endpoint, "STORE_REGION=" + storeRegion, "STORE_BUCKET=" + benchBucket,
		"STORE_KEYS_FILE=" + keys, "OPENBAO_ADDR=" + bao.URL, "NOMAD_JWKS_URL=" + bao.URL,
	}
	u.service.Stdout, u.service.Stderr = u.said, u.said
	u.service.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := u.service.Start(); err != nil {
		return err
	}
	// Its probe of the store is over, too: nothing of it falls into what is measured.
	if err := retry.Until(context.Background(), "the service", 30*time.Second, u.healthy); err != nil {
		said, _ := os.ReadFile(u.said.Name())
		return fmt.Errorf("%w: %s", err, lastLines(string(said)))
	}
	return nil
}

func (u *uploads) healthy(ctx context.Context) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, u.api+"/healthz", nil)
	if err != nil {
		return err
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	var said struct {
		Store    string `json:"store"`
		Enforces bool   `json:"store_enforces_hashes"`
	}
	if err := json.NewDecoder(response.Body).Decode(&said); err != nil {
		return err
	}
	if said.Store != "ok" || !said.Enforces {
		return fmt.Errorf("the service says %+v", said)
	}
	return nil
}

// stop ends both; that they have ended already is no error.
func (u *uploads) stop() {
	for _, process := range []*exec.Cmd{u.service, u.store} {
		if process != nil && process.Process != nil {
			_ = process.Process.Kill()
			_ = process.Wait()
		}
	}
	if u.said != nil {
		_ = u.said.Close()
	}
	u.service, u.store, u.said = nil, nil, nil
}

// drop ends both and removes what they stored.
func (u *uploads) drop() error {
	u.stop()
	return os.RemoveAll(u.folder)
}

// requests are those that the store has answered since it was started.
func (u *uploads) requests() (int, error) {
	file, err := os.Open(u.log)
	if err != nil {
		return 0, err
	}
	defer file.Close()
	lines := 0
	for reader := bufio.NewReader(file); ; {
		_, err := reader.ReadString('\n')
		if errors.Is(err, io.EOF) {
			return lines, nil
		}
		if err != nil {
			return 0, err
		}
		lines++
	}
}

func freeAddress() (string, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return listener.Addr().String(), listener.Close()
}

// peakOf is the largest resident memory that a running process has had.
func peakOf(process *exec.Cmd) (int64, error) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", process.Process.Pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(status)) {
		var kilobytes int64
		if _, err := fmt.Sscanf(line, "VmHWM: %d kB", &kilobytes); err == nil {
			return kilobytes << 10, nil
		}
	}
	return 0, fmt.Errorf("process %d has no VmHWM", process.Process.Pid)
}
