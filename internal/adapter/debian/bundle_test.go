package debian

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/nomad-site/site/internal/plan"
)

// mirror serves packages and counts how often it was asked.
type mirror struct {
	*httptest.Server
	asked atomic.Int64
	// broken answers are given first, this many.
	broken atomic.Int64
}

func newMirror(t *testing.T, files map[string]string) *mirror {
	serving := &mirror{}
	serving.Server = httptest.NewServer(http.HandlerFunc(func(response http.ResponseWriter, request *http.Request) {
		serving.asked.Add(1)
		if serving.broken.Add(-1) >= 0 {
			http.Error(response, "later", http.StatusBadGateway)
			return
		}
		content, there := files[request.URL.Path]
		if !there {
			http.NotFound(response, request)
			return
		}
		_, _ = response.Write([]byte(content))
	}))
	t.Cleanup(serving.Close)
	return serving
}

func (m *mirror) store(t *testing.T) *Store {
	return &Store{Folder: t.TempDir(), Mirrors: Mirrors{Main: m.URL + "/debian/", Security: m.URL + "/debian-security/"}}
}

func lockOf(contents map[string]string, archives map[string]string) Lock {
	lock := sampleLock()
	lock.Packages = nil
	for name, content := range contents {
		sum := sha256.Sum256([]byte(content))
		lock.Packages = append(lock.Packages, Package{
			Name: name, Version: "1", Architecture: "all", Archive: archives[name], Path: "pool/" + name + ".deb",
			Size: int64(len(content)), SHA256: hex.EncodeToString(sum[:]),
		})
	}
	return lock
}

func TestBundleFetchesOnlyWhatLacksAndProvesIt(t *testing.T) {
	lock := lockOf(map[string]string{"one": "first", "two": "second"}, map[string]string{"one": Main, "two": Security})
	serving := newMirror(t, map[string]string{"/debian/pool/one.deb": "first", "/debian-security/pool/two.deb": "second"})
	serving.broken.Store(1) // a passing failure is tried again
	store, ctx := serving.store(t), context.Background()
	debs, err := store.Bundle(ctx, lock, nil)
	if err != nil {
		t.Fatal(err)
	}
	for index, deb := range debs {
		if deb.Name != lock.Packages[index].Name {
			t.Errorf("package %d is %s, the lock has %s", index, deb.Name, lock.Packages[index].Name)
		}
		content, err := os.ReadFile(deb.Path)
		if err != nil || int64(len(content)) != deb.Size {
			t.Errorf("%s: %d bytes, %v", deb.Name, len(content), err)
		}
	}
	asked := serving.asked.Load()
	if _, err := store.Bundle(ctx, lock, nil); err != nil || serving.asked.Load() != asked {
		t.Errorf("a full cache asked the mirror %d times, %v", serving.asked.Load()-asked, err)
	}
	if err := os.WriteFile(debs[0].Path, []byte("damaged"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := store.Bundle(ctx, lock, nil); err != nil || serving.asked.Load() != asked+1 {
		t.Errorf("a damaged file: asked %d times, %v", serving.asked.Load()-asked, err)
	}
}

func TestBundleNamesASupersededPackage(t *testing.T) {
	lock := lockOf(map[string]string{"one": "first"}, map[string]string{"one": Main})
	serving := newMirror(t, nil)
	_, err := serving.store(t).Bundle(context.Background(), lock, nil)
	var superseded *SupersededError
	if !errors.As(err, &superseded) || superseded.Package.Name != "one" || !strings.Contains(plan.HintOf(err), "site debs lock") {
		t.Errorf("got %v, hint %q", err, plan.HintOf(err))
	}
	if serving.asked.Load() != 1 {
		t.Errorf("asked %d times for what is gone", serving.asked.Load())
	}
}

func TestBundleKeepsNothingThatDiffersFromTheLock(t *testing.T) {
	for name, sent := range map[string]string{"other bytes": "wrong", "too few": "fir", "too many": "first and more"} {
		t.Run(name, func(t *testing.T) {
			lock := lockOf(map[string]string{"one": "first"}, map[string]string{"one": Main})
			store := newMirror(t, map[string]string{"/debian/pool/one.deb": sent}).store(t)
			if _, err := store.Bundle(context.Background(), lock, nil); err == nil || !strings.Contains(err.Error(), "one") {
				t.Errorf("got %v", err)
			}
			left, err := filepath.Glob(filepath.Join(store.Folder, "*"))
			hidden, _ := filepath.Glob(filepath.Join(store.Folder, ".*"))
			if err != nil || len(left)+len(hidden) != 0 {
				t.Errorf("the cache keeps %v %v, %v", left, hidden, err)
			}
		})
	}
}
