package hostkey

import (
	"crypto/ed25519"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"testing"
)

func TestAKeyIsMadeOnceAndStays(t *testing.T) {
	path := filepath.Join(t.TempDir(), "etc", "host.key")
	if _, err := Public(path); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("before: %v", err)
	}
	// Whoever comes at the same time gets the same key.
	var group sync.WaitGroup
	answers := make(chan string, 20)
	for range cap(answers) {
		group.Go(func() {
			public, err := Ensure(path)
			if err != nil {
				t.Error(err)
			}
			answers <- public
		})
	}
	group.Wait()
	close(answers)
	first := <-answers
	for other := range answers {
		if other != first {
			t.Error("there was more than one key")
		}
	}
	block, _ := pem.Decode([]byte(first))
	if block == nil || block.Type != "PUBLIC KEY" {
		t.Fatalf("got %q", first)
	}
	if key, err := x509.ParsePKIXPublicKey(block.Bytes); err != nil {
		t.Error(err)
	} else if _, ok := key.(ed25519.PublicKey); !ok {
		t.Errorf("a %T", key)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil || len(entries) != 1 {
		t.Errorf("left in the folder: %v, %v", entries, err)
	}
	if again, err := Public(path); err != nil || again != first {
		t.Errorf("%q, %v", again, err)
	}
}

func TestAKeyThatIsNoneIsNeverReplaced(t *testing.T) {
	for name, test := range map[string]struct {
		content string
		mode    os.FileMode
	}{
		"an empty file":                {"", 0o600},
		"a file without a key":         {"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", 0o600},
		"a file that others can read":  {"whatever", 0o640},
		"a file that others can write": {"whatever", 0o602},
	} {
		path := filepath.Join(t.TempDir(), "host.key")
		if err := os.WriteFile(path, []byte(test.content), test.mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, test.mode); err != nil {
			t.Fatal(err)
		}
		if _, err := Ensure(path); err == nil {
			t.Errorf("%s is taken", name)
		}
		if got, _ := os.ReadFile(path); string(got) != test.content {
			t.Errorf("%s became %q", name, got)
		}
	}
}
