package pull

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nomad-site/site/internal/retry"
	"github.com/nomad-site/site/internal/site"
	"github.com/nomad-site/site/internal/sitehost/hostkey"
	"github.com/nomad-site/site/internal/sitehost/pull/pulltest"
)

func newOpenBao(t *testing.T) (*pulltest.OpenBao, *OpenBao) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "host.key")
	public, err := hostkey.Ensure(path)
	must(t, err)
	b := pulltest.NewOpenBao(t, public)
	keys, err := NewOpenBao(OpenBaoOptions{Address: b.URL, HostKey: path, Host: "lab-1"})
	must(t, err)
	return b, keys
}

// later makes keys that were just read old enough to be read again.
func later(o *OpenBao) {
	o.mutex.Lock()
	defer o.mutex.Unlock()
	o.tried = time.Time{}
}

func wantKeys(t *testing.T, o *OpenBao, refresh bool, id, key, generation int) {
	t.Helper()
	later(o)
	gotID, gotKey, got, err := o.Keys(t.Context(), refresh)
	wantID, wantKey := fmt.Sprintf("r2.proxy_access_key_id v%d", id), fmt.Sprintf("r2.proxy_secret_access_key v%d", key)
	if err != nil || gotID != wantID || gotKey.Reveal() != wantKey || got != generation {
		t.Errorf("got %q, %q of generation %d, %v", gotID, gotKey.Reveal(), got, err)
	}
}

func TestAHostReadsTheActiveKeysByItsOwnLogin(t *testing.T) {
	b, o := newOpenBao(t)
	wantKeys(t, o, false, 1, 1, 1)
	asked := b.Asked
	wantKeys(t, o, false, 1, 1, 1)
	if b.Asked != asked {
		t.Error("OpenBao was asked for keys that are in memory")
	}
	b.Set(func() { // a candidate is no active one
		b.Newest = map[string]int{site.StoreProxyID: 2, site.StoreProxySecret: 2}
		b.Active = map[string]int{site.StoreProxyID: 1, site.StoreProxySecret: 1}
	})
	wantKeys(t, o, true, 1, 1, 1)
	b.Set(func() { b.Active = map[string]int{site.StoreProxyID: 2, site.StoreProxySecret: 2} })
	wantKeys(t, o, true, 2, 2, 2)
	if b.Logins != 1 {
		t.Errorf("%d logins", b.Logins)
	}
	b.Set(func() { b.Token = "revoked" })
	b.Set(func() { b.Active = map[string]int{site.StoreProxyID: 1, site.StoreProxySecret: 1} })
	wantKeys(t, o, true, 1, 1, 1)
}

func TestTheKeysInMemoryOutliveOpenBao(t *testing.T) {
	b, o := newOpenBao(t)
	b.Set(func() { b.Sealed = true })
	if _, _, _, err := o.Keys(t.Context(), false); Code(err) != CodeNoKeys || !strings.Contains(err.Error(), "OpenBao is sealed") {
		t.Errorf("sealed: %v", err)
	}
	b.Set(func() { b.Sealed = false })
	wantKeys(t, o, false, 1, 1, 1)
	b.Set(func() { b.Sealed = true })
	wantKeys(t, o, true, 1, 1, 1)
	b.Close()
	wantKeys(t, o, true, 1, 1, 1)
}

func TestKeysThatAreNotThereYetAreSaidToBe(t *testing.T) {
	b, o := newOpenBao(t)
	b.Newest = nil
	_, _, _, err := o.Keys(t.Context(), false)
	if Code(err) != CodeNoKeys || !strings.Contains(err.Error(), "OpenBao has nothing at /v1/site/metadata/object-storage-service/r2.proxy_access_key_id") {
		t.Errorf("got %v", err)
	}
	if o.Generation() != 0 {
		t.Errorf("generation %d", o.Generation())
	}
}

// An id of one generation with the key of another opens nothing.
func TestAPairThatIsHalfSwitchedIsNotTaken(t *testing.T) {
	b, o := newOpenBao(t)
	look := func() {
		t.Helper()
		later(o)
		must(t, o.refresh(t.Context(), false))
	}
	look()
	b.Set(func() { b.Newest[site.StoreProxyID] = 2 })
	look()
	wantKeys(t, o, false, 1, 1, 1)
	b.Set(func() { b.Newest[site.StoreProxySecret] = 2 })
	look()
	wantKeys(t, o, false, 2, 2, 2)
	// By hand one may be put more often than the other.
	b.Set(func() { b.Newest[site.StoreProxySecret] = 3 })
	look()
	wantKeys(t, o, false, 2, 2, 2)
	look()
	wantKeys(t, o, false, 2, 3, 2)
}

func TestManyRefusedRequestsAskOnce(t *testing.T) {
	b, o := newOpenBao(t)
	wantKeys(t, o, false, 1, 1, 1)
	later(o)
	asked := b.Asked
	var group sync.WaitGroup
	for range 16 {
		group.Go(func() { _, _, _, _ = o.Keys(t.Context(), true) })
	}
	group.Wait()
	_, _, _, _ = o.Keys(t.Context(), true) // a little later
	if b.Asked-asked != 2 {                // the metadata of both
		t.Errorf("%d requests", b.Asked-asked)
	}
}

func TestOnlyLoopbackIsLoggedInAt(t *testing.T) {
	for _, address := range []string{"http://10.0.0.1:8200", "https://127.0.0.1:8200", "http://localhost:8200", "http://user@127.0.0.1:8200", "127.0.0.1:8200", "::"} {
		if _, err := NewOpenBao(OpenBaoOptions{Address: address}); err == nil {
			t.Errorf("%s was taken", address)
		}
	}
}

func TestTheKeysAreAskedForAgainAndAgain(t *testing.T) {
	b, o := newOpenBao(t)
	o.options.Interval = time.Millisecond
	go o.Run(t.Context())
	wantGeneration(t, o, 1)
	b.Set(func() { b.Newest = map[string]int{site.StoreProxyID: 7, site.StoreProxySecret: 7} })
	wantGeneration(t, o, 7)
}

// wantGeneration waits until the keys of a generation are in memory.
func wantGeneration(t *testing.T, o *OpenBao, want int) {
	t.Helper()
	err := retry.Until(t.Context(), "the next keys", 10*time.Second, func(context.Context) error {
		if got := o.Generation(); got != want {
			later(o)
			return fmt.Errorf("they are of generation %d, not %d", got, want)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
