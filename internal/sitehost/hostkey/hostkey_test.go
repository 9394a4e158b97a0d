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

func TestANextKeyIsMadeOnceAndTakesThePlaceOfTheFirst(t *testing.T) {
	path := filepath.Join(t.TempDir(), "host.key")
	for name, attempt := range map[string]func(string) (Keys, error){"next": EnsureNext, "switch": Switch, "read": Read} {
		if _, err := attempt(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s without a key: %v", name, err)
		}
	}
	first, err := Ensure(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Switch(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("switched to nothing: %v", err)
	}
	if keys, err := Read(path); err != nil || keys != (Keys{Current: first}) {
		t.Errorf("alone: %+v, %v", keys, err)
	}
	both, err := EnsureNext(path)
	if err != nil || both.Current != first || both.Next == "" || both.Next == first {
		t.Fatalf("both: %+v, %v", both, err)
	}
	if again, err := EnsureNext(path); err != nil || again != both {
		t.Errorf("a second call made another key: %+v, %v", again, err)
	}
	if keys, err := Read(path); err != nil || keys != both {
		t.Errorf("read: %+v, %v", keys, err)
	}
	switched, err := Switch(path)
	if err != nil || switched != (Keys{Current: both.Next}) {
		t.Errorf("switched: %+v, %v", switched, err)
	}
	if current, err := Ensure(path); err != nil || current != both.Next {
		t.Errorf("the key in use: %q, %v", current, err)
	}
	if entries, err := os.ReadDir(filepath.Dir(path)); err != nil || len(entries) != 1 {
		t.Errorf("left in the folder: %v, %v", entries, err)
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
