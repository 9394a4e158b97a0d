package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nomad-site/site/internal/deploy"
	cloudflare "github.com/nomad-site/site/internal/lab/cloudflare"
	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/reconcile/bucket"
	"github.com/nomad-site/site/internal/site"
)

// rotateStore replaces the store's keys without waiting for the drain.
var rotateStore = []string{"provider", "rotate-object-storage", "--drain=0s"}

// provider is the provider's API, whose keys are good at the lab's store.
type provider struct {
	*cloudflare.Fake
	store *objectStore
}

// provider serves until the test ends.
func (s *testSite) provider(store *objectStore) *provider {
	s.t.Helper()
	gateway := &cloudflare.Gateway{
		Endpoint: store.root.Endpoint, Region: store.root.Region,
		AccessKeyID: store.root.AccessKeyID, SecretAccessKey: store.root.SecretAccessKey,
	}
	fake, err := cloudflare.Serve(s.t.Context(), "127.0.0.1:0", cloudflare.Options{Keys: gateway.Keys, SettleTime: time.Second})
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		if err := errors.Join(fake.Close(), gateway.Err()); err != nil {
			s.t.Error(err)
		}
	})
	return &provider{Fake: fake, store: store}
}

// hcl is the block that names the provider.
func (p *provider) hcl() string {
	return fmt.Sprintf("    cloudflare {\n      account_id = %q\n      api = %q\n    }\n", cloudflare.AccountID, p.URL())
}

// tokenFiles writes tokens where import-admin-pair reads them.
func (s *testSite) tokenFiles(a, b string) []string {
	folder := s.folder(map[string]string{"a": a, "b": b + "\n"})
	return []string{"provider", "import-admin-pair", "--token-a-file=" + filepath.Join(folder, "a"), "--token-b-file=" + filepath.Join(folder, "b")}
}

// hasNoToken insists that nothing of the admin pair is stored.
func (s *testSite) hasNoToken() {
	s.t.Helper()
	rows := s.secretRows()
	for _, name := range []string{site.ProviderTokenA, site.ProviderTokenB} {
		if row := rows[storeSecret(name)]; row.State != deploy.SecretMissing {
			s.t.Errorf("%s is stored: %+v", name, row)
		}
	}
}

// storeKeyIDs are the access keys in use, admin's and the hosts'.
func (s *testSite) storeKeyIDs() (admin, proxy string) {
	s.t.Helper()
	get := func(name string) string { return s.must("secrets", "get", storeSecret(name), "--reveal").stdout }
	return strings.TrimSpace(get(site.StoreAdminID)), strings.TrimSpace(get(site.StoreProxyID))
}

// wantWholeKeys insists that the four keys are of one generation, each half fits the
// other, and that nothing else is left at the provider.
func (p *provider) wantWholeKeys(s *testSite) (generation int) {
	s.t.Helper()
	admin, proxy := s.storeKeyIDs()
	generations := map[string]int{}
	for _, tokenName := range p.TokenNames() {
		_, role, number, ours := bucket.ParseTokenName(tokenName)
		if !ours || strings.HasPrefix(role, "admin-") {
			continue
		}
		if _, twice := generations[role]; twice {
			s.t.Errorf("there are several keys of %s: %q", role, p.TokenNames())
		}
		generations[role] = number
	}
	if len(generations) != 2 || generations["admin"] != generations["proxy"] {
		s.t.Errorf("the provider has %v", p.TokenNames())
	}
	good := map[string]string{}
	for _, key := range p.Keys() {
		good[key.ID] = key.Secret
	}
	for id, name := range map[string]string{admin: site.StoreAdminSecret, proxy: site.StoreProxySecret} {
		if secret := strings.TrimSpace(s.must("secrets", "get", storeSecret(name), "--reveal").stdout); secret == "" || good[id] != secret {
			s.t.Errorf("%s does not belong to key %s", name, id)
		}
	}
	return generations["admin"]
}

func TestTheProviderMakesAndRotatesTheKeysOfTheStore(t *testing.T) {
	s := newSite(t, platform)
	store := s.emptyStore()
	p := s.provider(store)
	s.withStore(store, p.hcl())

	t.Run("without keys all else is deployed, and the error names the two commands", func(t *testing.T) {
		s := s.in(t)
		s.says(s.run("deploy"), 1, storeSecret(site.StoreAdminID), storeSecret(site.StoreProxySecret),
			"site provider import-admin-pair", "site provider rotate-object-storage")
		s.waitHealthy("hello")
	})
	idA, a := p.Admin("a person's token A")
	idB, b := p.Admin("a person's token B")
	t.Run("a pair that cannot do its work is refused as a whole", func(t *testing.T) {
		s := s.in(t)
		_, weak := p.Make("a token that may only look", p.Allow("Workers R2 Storage Read"))
		s.says(s.run(s.tokenFiles(a, a)...), 1, "same token")
		s.says(s.run(s.tokenFiles(a, weak)...), 1, "token B", "Workers R2 Storage Write", cloudflare.AccountID, "nothing was stored")
		s.says(s.run(s.tokenFiles("no token of anybody", b)...), 1, "token A")
		s.hasNoToken()
	})
	got := s.must(s.tokenFiles(a, b)...)
	for _, token := range []string{a, b} {
		if strings.Contains(got.stdout+got.stderr, token) {
			t.Error("a token is shown")
		}
	}
	s.must(rotateStore...)
	p.wantWholeKeys(s)
	s.must("deploy")
	s.waitHealthy(site.ObjectStorageComponent)
	s.wantDone()
	s.must("provider", "doctor")

	t.Run("the keys are replaced while artifacts go up and come down", func(t *testing.T) {
		s := s.in(t)
		before := p.wantWholeKeys(s)
		s.commit("another greeting", map[string]string{"jobs/hello/app/main.go": s.replace("jobs/hello/app/main.go", `"ok"`, `"well"`)})
		s.must("deploy")
		traffic := s.storeTraffic(store)
		got := s.must(rotateStore...)
		uploads, pulls := traffic.end()
		t.Logf("%d uploads and %d pulls while it took %s", uploads, pulls, got.duration.Round(100*time.Millisecond))
		if after := p.wantWholeKeys(s); after <= before {
			t.Errorf("generation %d follows %d", after, before)
		}
	})
	t.Run("it is killed behind each step, and the next run finishes", func(t *testing.T) {
		s := s.in(t)
		var steps []string
		for _, event := range s.events(s.must(append(rotateStore, "--json")...)) {
			if event.Type == plan.StepStarted {
				steps = append(steps, event.Step)
			}
		}
		for _, step := range steps[slices.Index(steps, "mint"):] {
			t.Run("behind "+step, func(t *testing.T) {
				s := s.in(t)
				s.wantFault(s.runWithFault(faultKill, step, rotateStore...), faultKill, step)
				s.lockIsFree(10 * time.Second)
				s.must(rotateStore...)
				p.wantWholeKeys(s)
				s.must("artifacts", "push")
			})
		}
	})
	t.Run("each of the admin pair is replaced through the other", func(t *testing.T) {
		s := s.in(t)
		s.must("provider", "rotate-admin-pair")
		for _, tokenName := range p.TokenNames() {
			if strings.HasPrefix(tokenName, "a person's token") {
				t.Errorf("%s is still good (ids %s, %s)", tokenName, idA, idB)
			}
		}
		s.must("provider", "doctor")
		s.must(rotateStore...)
		p.wantWholeKeys(s)
	})
}

// storeTraffic is what goes on while keys are replaced.
type storeTraffic struct {
	stop           chan struct{}
	done           sync.WaitGroup
	uploads, pulls int
}

// storeTraffic uploads something new again and again, and has the host pull a blob
// that it has not, again and again. A single failure fails the test.
func (s *testSite) storeTraffic(store *objectStore) *storeTraffic {
	s.t.Helper()
	var listing struct {
		Artifacts []struct {
			Artifact, Digest string
			Blobs            []string
		}
	}
	if got := s.must("artifacts", "ls", "--json"); json.Unmarshal([]byte(got.stdout), &listing) != nil || len(listing.Artifacts) == 0 {
		s.t.Fatal(got)
	}
	one := listing.Artifacts[0]
	traffic := &storeTraffic{stop: make(chan struct{})}
	again := func(count *int, do func() error) {
		traffic.done.Go(func() {
			for {
				select {
				case <-traffic.stop:
					return
				default:
				}
				if err := do(); err != nil {
					s.t.Error(err)
					return
				}
				*count++
			}
		})
	}
	digest := strings.TrimPrefix(one.Digest, "sha256:")
	again(&traffic.pulls, func() error {
		_, err := s.host.tryExec("sh", "-c", "rm -f /var/lib/site/store/blobs/sha256/"+digest+
			" && curl --fail --silent --show-error --output /dev/null http://127.0.0.1:7380/v2/"+name+"/"+one.Artifact+"/manifests/sha256:"+digest)
		return err
	})
	again(&traffic.uploads, func() error {
		for _, key := range store.keys(name + "/") {
			if strings.HasPrefix(key, name+"/names/") {
				store.remove(key) // so that the next push has something to do
			}
		}
		if got := s.run("artifacts", "push"); got.code != 0 {
			return fmt.Errorf("%v", got)
		}
		return nil
	})
	return traffic
}

func (t *storeTraffic) end() (uploads, pulls int) {
	close(t.stop)
	t.done.Wait()
	return t.uploads, t.pulls
}
