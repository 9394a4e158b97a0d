package pull

import (
	"bytes"
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nomad-site/site/internal/blob"
	"github.com/nomad-site/site/internal/retry"
	"github.com/nomad-site/site/internal/sitehost/pull/pulltest"
	"github.com/nomad-site/site/internal/testneeds"
)

// startGateway serves the objects of a bucket by a real S3 server.
func startGateway(t *testing.T, f *fixture) (stop func()) {
	t.Helper()
	data := t.TempDir()
	for key, content := range f.bucket.Objects {
		file := filepath.Join(data, f.puller.options.Config.Bucket, filepath.FromSlash(key))
		must(t, os.MkdirAll(filepath.Dir(file), 0o700))
		must(t, os.WriteFile(file, content, 0o600))
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	address := listener.Addr().String()
	must(t, listener.Close())
	var logs bytes.Buffer
	command := exec.Command(testneeds.Tool(t, "versitygw"), "--port", address, "--region", f.puller.options.Config.Region, "--quiet",
		"posix", "--sidecar", t.TempDir(), data)
	command.Env = append(os.Environ(), "ROOT_ACCESS_KEY=id-1", "ROOT_SECRET_KEY=key-1")
	command.Stdout, command.Stderr = &logs, &logs
	command.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	must(t, command.Start())
	stop = func() {
		_ = command.Process.Kill()
		_ = command.Wait()
	}
	err = retry.Until(t.Context(), "versitygw", 20*time.Second, func(ctx context.Context) error {
		connection, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
		if err != nil {
			return err
		}
		return connection.Close()
	})
	if err != nil {
		stop()
		t.Fatalf("%v: %s", err, logs.String())
	}
	t.Cleanup(stop)
	f.puller.bucket.base.Host = address
	return stop
}

func TestARealStoreIsPulledFrom(t *testing.T) {
	f := newFixture(t)
	manifest, layer := []byte(`{"schemaVersion":2}`), pulltest.Random(1, 8<<20)
	image := f.bucket.Publish(t, "hello", blob.KindImage, manifest, layer)
	tool := f.bucket.Publish(t, "tool", blob.KindFile, pulltest.Random(2, 1<<20))
	spoilt := f.bucket.Publish(t, "spoilt", blob.KindFile, pulltest.Random(3, 1<<20))
	record, err := parseRecord(f.bucket.Objects[f.puller.layout.Blob(spoilt.Digest)], spoilt.Digest)
	must(t, err)
	f.bucket.Objects[f.puller.layout.Pack(record.Packs[0])][1000] ^= 1
	stop := startGateway(t, f)
	must(t, f.puller.Fetch(t.Context(), wants(image), nil))
	f.holds(t, image, manifest, layer)

	f.puller.bucket.patience = 300 * time.Millisecond
	none := tool
	none.Digest = blob.DigestOf(nil)
	fails := func(name blob.Name, code, says string) {
		t.Helper()
		if err := f.puller.Fetch(t.Context(), wants(name), nil); Code(err) != code || !strings.Contains(err.Error(), says) {
			t.Errorf("want %s, got %s: %v", code, Code(err), err)
		}
	}
	fails(none, CodeNotFound, "does not have it")
	fails(spoilt, CodeCorrupt, "holds something else")
	f.keys.key = "another"
	fails(tool, CodeDenied, "SignatureDoesNotMatch")
	f.keys.id = "nobody"
	fails(tool, CodeDenied, "refuses the host's keys")
	f.keys.id, f.keys.key = "id-1", "key-1"
	base := f.puller.bucket.base
	f.puller.bucket.base = base.JoinPath("..", "elsewhere")
	fails(tool, CodeUnreachable, "NoSuchBucket")
	f.puller.bucket.base = base
	must(t, f.puller.Fetch(t.Context(), wants(tool), nil))
	f.holds(t, tool, pulltest.Random(2, 1<<20))
	stop()
	fails(spoilt, CodeUnreachable, "connection refused")
	must(t, f.puller.Fetch(t.Context(), wants(image, tool), nil)) // of what is there
}
