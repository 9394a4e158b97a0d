package client_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nomad-site/site/internal/blob"
	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/writesession"
	"github.com/nomad-site/site/internal/writesession/client"
	"github.com/nomad-site/site/internal/writesession/server"
	"github.com/nomad-site/site/internal/writesession/storetest"
)

const site = "gamma"

type everybody struct{}

func (everybody) Authorize(context.Context, secret.Value) (server.Identity, error) {
	return server.Identity{Subject: "operator", Kind: server.KindOperator}, nil
}

// start runs the real service on a store in memory.
func start(t *testing.T, enforces bool) (*client.Client, *storetest.Store) {
	t.Helper()
	store := storetest.New(t, storetest.Options{Enforces: enforces, OneWritePerSecond: true})
	service, err := server.New(server.Options{
		Site: site, Bucket: store, Authorizer: everybody{}, Log: slog.New(slog.DiscardHandler), Enforces: func() bool { return enforces },
	})
	if err != nil {
		t.Fatal(err)
	}
	listener := httptest.NewServer(service.Handler())
	t.Cleanup(listener.Close)
	c, err := client.New(client.Options{
		BaseURL: listener.URL, Site: site,
		Token: func(context.Context) (secret.Value, error) { return secret.New("token"), nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	return c, store
}

// noise does not compress, so that a few packs need few bytes.
func noise(size int, seed byte) []byte {
	out := make([]byte, size)
	_, _ = rand.NewChaCha8([32]byte{seed}).Read(out)
	return out
}

func offered(artifact string, contents ...[]byte) blob.Offer {
	name := blob.Name{Site: site, Artifact: artifact, Kind: blob.KindImage}
	var offer blob.Offer
	for i, content := range contents {
		source := blob.BytesSource(fmt.Sprintf("layer %d", i), content)
		offer.Blobs = append(offer.Blobs, blob.Offered{Source: source})
		name.Blobs = append(name.Blobs, source.Digest())
		name.Size += source.Size()
		name.Digest = source.Digest()
	}
	offer.Names = []blob.Name{name}
	return offer
}

// packs counts the objects that are visible.
func packs(store *storetest.Store) int {
	prefix := writesession.Layout{Site: site}.Packs()
	n := 0
	for _, key := range store.Keys() {
		if strings.HasPrefix(key, prefix) {
			n++
		}
	}
	return n
}

func TestTheServiceTakesWhatTheClientBrings(t *testing.T) {
	for _, enforces := range []bool{true, false} {
		t.Run(fmt.Sprintf("the store enforces hashes %v", enforces), func(t *testing.T) {
			c, store := start(t, enforces)
			base := noise(10<<20, 1)
			offer := offered("hello", base, []byte("a config"), nil)
			result, err := c.Push(t.Context(), offer, client.PushOptions{})
			if err != nil || result.Blobs != 3 || result.Names != 1 || result.Packs != packs(store) || result.Packs < 2 {
				t.Fatalf("%+v with %d packs, %v", result, packs(store), err)
			}
			if report, err := c.Missing(t.Context(), offer); err != nil || !report.Empty() {
				t.Errorf("missing %+v, %v", report, err)
			}
			changed := append(append(bytes.Clone(base[:5<<20]), "a line\n"...), base[5<<20:]...)
			again, err := c.Push(t.Context(), offered("hello", changed, []byte("a config")), client.PushOptions{})
			if err != nil || again.Packs != 1 || again.Chunks > 3 {
				t.Errorf("%+v, %v", again, err)
			}
			listing, err := c.List(t.Context())
			if err != nil || len(listing.Artifacts) != 2 || listing.Packs != packs(store) || listing.OpenSessions != 0 {
				t.Errorf("%+v, %v", listing, err)
			}
			sessions, err := c.Sessions(t.Context())
			if err != nil || len(sessions) != 2 || sessions[0].State != writesession.Complete {
				t.Errorf("%+v, %v", sessions, err)
			}
			collected, err := c.Collect(t.Context(), writesession.CollectRequest{
				DryRun: true, Keep: []writesession.Kept{{Artifact: "nobody", Digest: blob.DigestOf([]byte("nobody's"))}},
			})
			if err != nil || len(collected.Artifacts) != 2 || !collected.DryRun {
				t.Errorf("%+v, %v", collected, err)
			}
			if err := c.Healthy(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestAnUploadThatArrivesDamagedIsMended(t *testing.T) {
	c, store := start(t, false)
	var spoiled atomic.Bool
	store.FailAfter(func(operation, key string) error {
		if operation == storetest.Upload && spoiled.CompareAndSwap(false, true) {
			store.Corrupt(key)
		}
		return nil
	})
	result, err := c.Push(t.Context(), offered("hello", noise(1<<20, 2)), client.PushOptions{})
	if err != nil || result.Names != 1 || !spoiled.Load() {
		t.Errorf("%+v, %v", result, err)
	}
}

func TestAnInterruptedPushLeavesNothingBehind(t *testing.T) {
	c, store := start(t, true)
	ctx, cancel := context.WithCancel(t.Context())
	var uploads atomic.Int64
	store.FailAfter(func(operation, _ string) error {
		if operation == storetest.Upload && uploads.Add(1) == 2 {
			cancel()
		}
		return nil
	})
	offer := offered("hello", noise(20<<20, 3))
	if _, err := c.Push(ctx, offer, client.PushOptions{Workers: 1}); !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v", err)
	}
	for _, key := range store.Keys() {
		if !strings.HasSuffix(key, "/session.json") && !strings.HasSuffix(key, "/end.json") {
			t.Errorf("%s is left", key)
		}
	}
	if result, err := c.Push(t.Context(), offer, client.PushOptions{}); err != nil || result.Names != 1 {
		t.Errorf("%+v, %v", result, err)
	}
}

func TestOperatorsMayPushTheSameAtOnce(t *testing.T) {
	c, _ := start(t, true)
	base := noise(3<<20, 4)
	var group sync.WaitGroup
	for i := range 3 {
		group.Go(func() {
			if _, err := c.Push(t.Context(), offered(fmt.Sprintf("hello-%d", i/2), base), client.PushOptions{}); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	if listing, err := c.List(t.Context()); err != nil || len(listing.Artifacts) != 2 {
		t.Errorf("%+v, %v", listing, err)
	}
}

func TestANameThatSaysSomethingElseIsWrittenAnew(t *testing.T) {
	c, store := start(t, true)
	offer := offered("hello", noise(100<<10, 7))
	other := offered("hello", noise(100<<10, 8), noise(100<<10, 7))
	for _, each := range []blob.Offer{other, offer} {
		if _, err := c.Push(t.Context(), each, client.PushOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	key := writesession.Layout{Site: site}.Name("hello", offer.Names[0].Digest)
	good := store.Content(key)
	for what, content := range map[string]string{"damaged": "{", "of other blobs": strings.Replace(string(good), `"blobs":["`, `"blobs":["`+string(other.Names[0].Blobs[0])+`","`, 1)} {
		store.Set(key, []byte(content))
		store.Age(key, -time.Minute) // a store tells another content by its time
		report, err := c.Missing(t.Context(), offer)
		if err != nil || len(report.Names) != 1 {
			t.Errorf("%s: missing %+v, %v", what, report, err)
		}
		store.Age(key, 2*time.Minute)
		if _, err := c.Push(t.Context(), offer, client.PushOptions{}); err != nil {
			t.Errorf("%s: %v", what, err)
		}
		if report, err := c.Missing(t.Context(), offer); err != nil || !report.Empty() {
			t.Errorf("%s: afterwards missing %+v, %v", what, report, err)
		}
	}
}
