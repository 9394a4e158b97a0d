package ssh

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/testneeds"
)

func digestOf(content []byte) string {
	sum := sha256.Sum256(content)
	return hex.EncodeToString(sum[:])
}

func leftovers(t *testing.T, folder string) []string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(folder, "*.put.*"))
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func TestPutBinary(t *testing.T) {
	s := newServer(t, nil)
	conn := s.connect()
	content := make([]byte, 3<<20)
	_, _ = rand.Read(content)
	put := func(content []byte, digest, target string, progress func(int64, int64)) (bool, error) {
		return PutBinary(t.Context(), conn, bytes.NewReader(content), int64(len(content)), digest, target, 0o755, progress)
	}

	t.Run("a file is put, found again, and replaced", func(t *testing.T) {
		folder := filepath.Join(t.TempDir(), "opt", "it's a site")
		target := filepath.Join(folder, "site-host")
		var last, total int64
		sent, err := put(content, digestOf(content), target, func(done, all int64) { last, total = done, all })
		if err != nil || !sent || last != int64(len(content)) || total != last {
			t.Fatalf("sent %t, %d of %d, %v", sent, last, total, err)
		}
		for path, mode := range map[string]os.FileMode{target: 0o755, folder: 0o755} {
			if info, err := os.Stat(path); err != nil || info.Mode().Perm() != mode {
				t.Errorf("%s: %v %v", path, info.Mode(), err)
			}
		}
		if digest, err := conn.Digest(t.Context(), target); err != nil || digest != digestOf(content) {
			t.Errorf("%s %v", digest, err)
		}
		before, _ := os.Stat(target)
		if sent, err := put(content, digestOf(content), target, nil); err != nil || sent {
			t.Errorf("sent again: %t %v", sent, err)
		}
		if after, _ := os.Stat(target); !os.SameFile(before, after) {
			t.Error("the file was replaced by itself")
		}
		if err := os.Chmod(target, 0o600); err != nil {
			t.Fatal(err)
		}
		if sent, err := put(content, digestOf(content), target, nil); err != nil || sent {
			t.Errorf("sent for a mode: %t %v", sent, err)
		}
		if info, _ := os.Stat(target); info.Mode().Perm() != 0o755 {
			t.Errorf("mode %v", info.Mode())
		}
		// A stale file of a process that is gone, and one of a process that lives.
		stale, live := target+".put.999999999", target+".put."+count(os.Getpid())
		for _, file := range []string{stale, live} {
			if err := os.WriteFile(file, []byte("half"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if sent, err := put([]byte("new"), digestOf([]byte("new")), target, nil); err != nil || !sent {
			t.Errorf("%t %v", sent, err)
		}
		if got, _ := os.ReadFile(target); string(got) != "new" {
			t.Errorf("%q", got)
		}
		if left := leftovers(t, folder); len(left) != 1 || left[0] != live {
			t.Errorf("left over: %v", left)
		}
	})
	t.Run("wrong bytes never get the name", func(t *testing.T) {
		target := filepath.Join(t.TempDir(), "site-host")
		if err := os.WriteFile(target, []byte("old"), 0o755); err != nil {
			t.Fatal(err)
		}
		_, err := put(content, digestOf([]byte("other")), target, nil)
		wrong := mustBe[*DigestError](t, err)
		if !wrong.AtSource || wrong.Got != digestOf(content) {
			t.Errorf("%+v", wrong)
		}
		if got, _ := os.ReadFile(target); string(got) != "old" {
			t.Errorf("%q", got)
		}
		if left := leftovers(t, filepath.Dir(target)); len(left) != 0 {
			t.Errorf("left over: %v", left)
		}
	})
	t.Run("a folder is not a target", func(t *testing.T) {
		folder := t.TempDir()
		if _, err := put(content, digestOf(content), folder, nil); err == nil {
			t.Error("no error")
		}
	})
	t.Run("a file that is not there has no digest", func(t *testing.T) {
		if digest, err := conn.Digest(t.Context(), "/nowhere/at all"); err != nil || digest != "" {
			t.Errorf("%q %v", digest, err)
		}
	})
	t.Run("a cancelled upload leaves nothing", func(t *testing.T) {
		target := filepath.Join(t.TempDir(), "site-host")
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		reader, writer := io.Pipe()
		go func() { _, _ = writer.Write(content); cancel() }()
		err := within(t, 10*time.Second, "put", func() error {
			_, err := PutBinary(ctx, conn, reader, 1<<30, digestOf(content), target, 0o755, nil)
			return err
		})
		if !errors.Is(err, context.Canceled) {
			t.Errorf("%v", err)
		}
		_ = writer.Close()
		mustHaveNoLeftovers(t, target)
	})
	t.Run("a cut connection leaves nothing", func(t *testing.T) {
		s := s.in(t)
		between := s.proxy()
		through := s.target()
		through.Port = between.port
		conn := s.dial(through, Options{})
		target := filepath.Join(t.TempDir(), "site-host")
		reader, writer := io.Pipe()
		go func() {
			_, _ = writer.Write(content)
			between.cut()
			_, _ = writer.Write(content)
			_ = writer.Close()
		}()
		err := within(t, 10*time.Second, "put", func() error {
			_, err := PutBinary(t.Context(), conn, reader, 1<<30, digestOf(content), target, 0o755, nil)
			return err
		})
		_ = reader.Close()
		if !errors.Is(err, ErrConnectionLost) {
			t.Errorf("%v", err)
		}
		mustHaveNoLeftovers(t, target)
	})
}

func mustHaveNoLeftovers(t *testing.T, target string) {
	t.Helper()
	for _, left := range leftovers(t, filepath.Dir(target)) {
		mustVanish(t, left)
	}
	if _, err := os.Stat(target); err == nil {
		t.Error("half a file has the name")
	}
}

func TestPutBinaryOnAFullDisk(t *testing.T) {
	testneeds.Root(t)
	s := newServer(t, nil)
	folder := t.TempDir()
	if output, err := exec.Command("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder).CombinedOutput(); err != nil {
		t.Fatalf("mount: %v: %s", err, output)
	}
	t.Cleanup(func() { _ = exec.Command("umount", "-l", folder).Run() })
	content := make([]byte, 3<<20)
	_, _ = rand.Read(content)
	target := filepath.Join(folder, "site-host")
	_, err := PutBinary(t.Context(), s.connect(), bytes.NewReader(content), int64(len(content)), digestOf(content), target, 0o755, nil)
	full := mustBe[*DiskFullError](t, err)
	mustContain(t, full.Error(), target, "3145728")
	mustContain(t, plan.HintOf(err), "make room")
	mustHaveNoLeftovers(t, target)
}

func TestPutBinaryWithoutGzip(t *testing.T) {
	bin := t.TempDir()
	for _, tool := range []string{"sh", "id", "uname", "mkdir", "cat", "sha256sum", "chmod", "mv", "rm", "stat", "sync"} {
		path, err := exec.LookPath(tool)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(path, filepath.Join(bin, tool)); err != nil {
			t.Fatal(err)
		}
	}
	s := newServer(t, nil, "SetEnv PATH="+bin)
	content := []byte(strings.Repeat("static ", 1<<16))
	target := filepath.Join(t.TempDir(), "site-host")
	sent, err := PutBinary(t.Context(), s.connect(), bytes.NewReader(content), int64(len(content)), digestOf(content), target, 0o755, nil)
	if got, readErr := os.ReadFile(target); err != nil || !sent || readErr != nil || !bytes.Equal(got, content) {
		t.Errorf("sent %t, %v, %v", sent, err, readErr)
	}
}
