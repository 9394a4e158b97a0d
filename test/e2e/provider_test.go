package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
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
	// lax has keys write that were made to read.
	lax atomic.Bool
}

// provider serves until the test ends.
func (s *testSite) provider(store *objectStore) *provider {
	s.t.Helper()
	gateway := &cloudflare.Gateway{
		Endpoint: store.root.Endpoint, Region: store.root.Region,
		AccessKeyID: store.root.AccessKeyID, SecretAccessKey: store.root.SecretAccessKey,
	}
	p := &provider{store: store}
	fake, err := cloudflare.Serve(s.t.Context(), "127.0.0.1:0", cloudflare.Options{SettleTime: time.Second,
		Keys: func(id, secret, bucket string, write, remove bool) {
			gateway.Keys(id, secret, bucket, write || p.lax.Load(), remove)
		},
	})
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		if err := errors.Join(fake.Close(), gateway.Err()); err != nil {
			s.t.Error(err)
		}
	})
	p.Fake = fake
	return p
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
	s.isKilled(moment{step: "first keys", kind: plan.StepProgress, says: "minted the keys"}, rotateStore...)
	s.isKilled(moment{step: "first keys", kind: plan.StepProgress, says: "is written"}, rotateStore...)
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
		traffic, hosts := s.storeTraffic(store), 0
		s.until("the host to have keys", 20*time.Second, func() error {
			if hosts = s.hostsStoreKeys(); hosts == 0 {
				return errors.New("it has none")
			}
			return nil
		})
		got := s.must(rotateStore...)
		uploads, pulls := traffic.end()
		if uploads == 0 || pulls == 0 {
			t.Errorf("%d uploads and %d pulls", uploads, pulls)
		}
		t.Logf("%d uploads and %d pulls while it took %s", uploads, pulls, got.duration.Round(100*time.Millisecond))
		if after := p.wantWholeKeys(s); after <= before {
			t.Errorf("generation %d follows %d", after, before)
		}
		if now := s.hostsStoreKeys(); now <= hosts {
			t.Errorf("the host reads with keys of generation %d, and did with %d", now, hosts)
		}
	})
	t.Run("keys that may do more than they should are not taken", func(t *testing.T) {
		s := s.in(t)
		before, ids := p.wantWholeKeys(s), p.TokenNames()
		p.lax.Store(true)
		got := s.run(rotateStore...)
		p.lax.Store(false)
		s.says(got, 1, "the hosts' key should only read")
		if after := p.wantWholeKeys(s); after != before || !slices.Equal(ids, p.TokenNames()) {
			t.Errorf("generation %d follows %d; tokens %q, before %q", after, before, p.TokenNames(), ids)
		}
	})
	t.Run("it is killed wherever something was done, and the next run finishes", func(t *testing.T) {
		for _, when := range []moment{
			{step: "mint", kind: plan.StepProgress, says: "minted the keys"},
			{step: "mint", kind: plan.StepProgress, says: "is written"},
			{step: "mint", kind: plan.StepDone},
			{step: "canaries", kind: plan.StepDone},
			{step: "commit", kind: plan.StepProgress, says: "is active"},
			{step: "commit", kind: plan.StepDone},
			{step: "retire", kind: plan.StepProgress, says: "is retired"},
			{step: "retire", kind: plan.StepDone},
		} {
			t.Run(strings.TrimSpace(when.String()+" "+when.says), func(t *testing.T) {
				s := s.in(t)
				s.isKilled(when, rotateStore...)
				s.must(rotateStore...)
				p.wantWholeKeys(s)
				s.must("artifacts", "push")
			})
		}
	})
	t.Run("each of the admin pair is replaced through the other", func(t *testing.T) {
		s := s.in(t)
		s.isKilled(moment{step: "token a", kind: plan.StepProgress, says: "minted token"}, "provider", "rotate-admin-pair")
		s.isKilled(moment{step: "token b", kind: plan.StepProgress, says: "minted token"}, "provider", "rotate-admin-pair")
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

// isKilled has site end at once, at a moment that must come.
func (s *testSite) isKilled(when moment, args ...string) {
	s.t.Helper()
	if when.kind == plan.StepDone { // behind the step means before the next one
		s.wantFault(s.runWithFault(faultKill, when.step, args...), faultKill, when.step)
	} else {
		s.runUntil(when, func(process *os.Process) { _ = process.Kill() }, args...)
	}
	s.lockIsFree(10 * time.Second)
}

// storeTraffic is what goes on while keys are replaced.
type storeTraffic struct {
	stop           chan struct{}
	done           sync.WaitGroup
	store          *objectStore
	before         int
	uploads, pulls int
}

// hostsStoreKeys is the generation of the keys with which the host reads the store.
func (s *testSite) hostsStoreKeys() int {
	s.t.Helper()
	var status struct {
		KeyGeneration int `json:"key_generation"`
	}
	if err := json.Unmarshal([]byte(s.host.exec("/opt/site/bin/site-host", "store", "status")), &status); err != nil {
		s.t.Fatal(err)
	}
	return status.KeyGeneration
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
	digest := strings.TrimPrefix(one.Digest, "sha256:")
	traffic := &storeTraffic{stop: make(chan struct{}), store: store, before: len(store.keys(name + "/packs/"))}
	dial := s.tunnel("127.0.0.1:7380")
	host := &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true, DialContext: func(context.Context, string, string) (net.Conn, error) { return dial(), nil },
	}}
	traffic.again(s, &traffic.pulls, func() error {
		if _, err := s.host.tryExec("rm", "-f", "/var/lib/site/store/blobs/sha256/"+digest); err != nil {
			return err
		}
		return fetches(host, "http://127.0.0.1:7380/v2/"+name+"/"+one.Artifact+"/manifests/sha256:"+digest)
	})
	source, said := "jobs/hello/app/main.go", `"well"`
	traffic.again(s, &traffic.uploads, func() error {
		next := fmt.Sprintf("%q", "well, for the time no. "+strconv.Itoa(traffic.uploads+1))
		s.commit("again another greeting", map[string]string{source: s.replace(source, said, next)})
		said = next
		if got := s.run("artifacts", "push"); got.code != 0 {
			return fmt.Errorf("%v", got)
		}
		return nil
	})
	return traffic
}

// again does something until the end, or until it fails.
func (t *storeTraffic) again(s *testSite, count *int, do func() error) {
	t.done.Go(func() {
		for {
			select {
			case <-t.stop:
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

func fetches(client *http.Client, url string) error {
	response, err := client.Get(url)
	if err != nil {
		return err
	}
	body, err := io.ReadAll(response.Body)
	if err := errors.Join(err, response.Body.Close()); err != nil {
		return err
	}
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", response.Status, body)
	}
	return nil
}

// end gives the uploads that brought something to the store, and the pulls.
func (t *storeTraffic) end() (uploads, pulls int) {
	close(t.stop)
	t.done.Wait()
	return min(t.uploads, len(t.store.keys(name+"/packs/"))-t.before), t.pulls
}
