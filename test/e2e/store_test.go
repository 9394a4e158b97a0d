package e2e

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"

	"github.com/nomad-site/site/internal/lab"
	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/site"
	"github.com/nomad-site/site/internal/testneeds"
)

// storeAccount is one user of the lab's object store.
type storeAccount struct{ id, key string }

// objectStore is a bucket of the lab's store, with what a site needs of it.
type objectStore struct {
	s            *testSite
	root         lab.StoreCredentials
	bucket       string
	admin, proxy storeAccount
	client       *s3.Client
}

func newStoreAccount(role string) storeAccount {
	return storeAccount{id: role + rand.Text()[:8], key: rand.Text()}
}

// objectStore makes a bucket that admin may write and proxy may read.
func (s *testSite) objectStore() *objectStore {
	s.t.Helper()
	o := s.emptyStore()
	o.admin, o.proxy = newStoreAccount("admin"), newStoreAccount("proxy")
	o.makeBucket()
	o.allow(o.admin)
	o.allow(o.proxy)
	o.grant([]string{o.admin.id}, []string{o.proxy.id})
	return o
}

// emptyStore is the lab's store, and the name of a bucket that is not there yet.
func (s *testSite) emptyStore() *objectStore {
	s.t.Helper()
	status, err := s.lab.Status(s.t.Context())
	if err != nil {
		s.t.Fatal(err)
	}
	o := &objectStore{s: s, bucket: strings.ToLower("e2e-" + rand.Text()[:10])}
	if err := json.Unmarshal([]byte(s.read(status.Store.Credentials)), &o.root); err != nil {
		s.t.Fatal(err)
	}
	o.client = s3.New(s3.Options{
		BaseEndpoint: &o.root.Endpoint, Region: o.root.Region, UsePathStyle: true,
		Credentials: credentials.NewStaticCredentialsProvider(o.root.AccessKeyID, o.root.SecretAccessKey, ""),
	})
	return o
}

func (o *objectStore) makeBucket() {
	o.s.t.Helper()
	if _, err := o.client.CreateBucket(o.s.t.Context(), &s3.CreateBucketInput{Bucket: &o.bucket}); err != nil {
		o.s.t.Fatal(err)
	}
}

// gateway runs a command of the store's own administration.
func (o *objectStore) gateway(args ...string) {
	o.s.t.Helper()
	command := exec.CommandContext(o.s.t.Context(), testneeds.Tool(o.s.t, "versitygw"), append([]string{"admin", "--endpoint-url", o.root.Endpoint}, args...)...)
	command.Env = append(o.s.environment(), "ADMIN_ACCESS_KEY="+o.root.AccessKeyID, "ADMIN_SECRET_KEY="+o.root.SecretAccessKey)
	if out, err := command.CombinedOutput(); err != nil {
		o.s.t.Fatalf("versitygw admin %s: %v\n%s", args[0], err, out)
	}
}

func (o *objectStore) allow(account storeAccount) {
	o.s.t.Helper()
	o.gateway("create-user", "--access", account.id, "--secret", account.key, "--role", "user")
}

// setKey gives an account another secret key. It is made anew: what the gateway
// (1.8.0) remembers of an account that it updates is a piece of a request's memory,
// which others write over.
func (o *objectStore) setKey(account storeAccount) {
	o.s.t.Helper()
	o.gateway("delete-user", "--access", account.id)
	o.allow(account)
}

// grant says who may write and who may only read; nobody else may anything.
func (o *objectStore) grant(writers, readers []string) {
	o.s.t.Helper()
	if err := o.tryGrant(o.s.t.Context(), writers, readers); err != nil {
		o.s.t.Fatal(err)
	}
}

func (o *objectStore) tryGrant(ctx context.Context, writers, readers []string) error {
	statement := func(who []string, resource string, actions ...string) string {
		names, _ := json.Marshal(who)
		what, _ := json.Marshal(actions)
		return fmt.Sprintf(`{"Effect":"Allow","Principal":{"AWS":%s},"Action":%s,"Resource":"arn:aws:s3:::%s"}`, names, what, o.bucket+resource)
	}
	var statements []string
	if len(writers) > 0 {
		statements = append(statements, statement(writers, "/*", "s3:GetObject", "s3:PutObject", "s3:DeleteObject"), statement(writers, "", "s3:ListBucket"))
	}
	if len(readers) > 0 {
		statements = append(statements, statement(readers, "/*", "s3:GetObject"), statement(readers, "", "s3:ListBucket"))
	}
	if len(statements) == 0 {
		_, err := o.client.DeleteBucketPolicy(ctx, &s3.DeleteBucketPolicyInput{Bucket: &o.bucket})
		return err
	}
	policy := `{"Version":"2012-10-17","Statement":[` + strings.Join(statements, ",") + `]}`
	_, err := o.client.PutBucketPolicy(ctx, &s3.PutBucketPolicyInput{Bucket: &o.bucket, Policy: &policy})
	return err
}

// keys are the keys of the bucket's objects, sorted.
func (o *objectStore) keys(prefix string) []string {
	o.s.t.Helper()
	var keys []string
	pages := s3.NewListObjectsV2Paginator(o.client, &s3.ListObjectsV2Input{Bucket: &o.bucket, Prefix: &prefix})
	for pages.HasMorePages() {
		page, err := pages.NextPage(o.s.t.Context())
		if err != nil {
			o.s.t.Fatal(err)
		}
		for _, object := range page.Contents {
			keys = append(keys, *object.Key)
		}
	}
	slices.Sort(keys)
	return keys
}

// remove deletes all objects below a prefix.
func (o *objectStore) remove(prefix string) {
	o.s.t.Helper()
	for _, key := range o.keys(prefix) {
		if _, err := o.client.DeleteObjects(o.s.t.Context(), &s3.DeleteObjectsInput{
			Bucket: &o.bucket, Delete: &types.Delete{Objects: []types.ObjectIdentifier{{Key: aws.String(key)}}},
		}); err != nil {
			o.s.t.Fatal(err)
		}
	}
}

// hcl is the block of site.hcl; more stands in it.
func (o *objectStore) hcl(more string) string {
	return fmt.Sprintf("\n  object_store {\n    endpoint = %q\n    region   = %q\n    bucket   = %q\n%s  }\n", o.root.Endpoint, o.root.Region, o.bucket, more)
}

// withStore has the site declare the store, and the service that hands out uploads.
func (s *testSite) withStore(o *objectStore, more string) string {
	s.t.Helper()
	path, content := s.activate(site.ObjectStorageComponent)
	content = strings.TrimSuffix(content, "}\n") + o.hcl(more) + "}\n"
	return s.commit("an object store", map[string]string{path: content})
}

// storeSecret is the full name of one of the store's secrets.
func storeSecret(name string) string { return site.ObjectStorageComponent + "." + name }

// importKeys brings the keys of a store that has no provider.
func (s *testSite) importKeys(o *objectStore) {
	s.t.Helper()
	s.must("secrets", "import", "--from-folder", s.folder(map[string]string{
		storeSecret(site.StoreAdminID): o.admin.id, storeSecret(site.StoreAdminSecret): o.admin.key,
		storeSecret(site.StoreProxyID): o.proxy.id, storeSecret(site.StoreProxySecret): o.proxy.key,
	}))
}

// pushed is what a run says of its upload to the store.
type pushed struct{ chunks, of, packs, wire int }

var pushedLine = regexp.MustCompile(`sent (\d+) of (\d+) chunks in (\d+) packs, (\d+) bytes on the wire`)

func (s *testSite) pushes(got result) []pushed {
	s.t.Helper()
	var all []pushed
	for _, event := range s.events(got) {
		if match := pushedLine.FindStringSubmatch(event.Message); event.Type == plan.StepProgress && match != nil {
			var n [4]int
			for i := range n {
				n[i], _ = strconv.Atoi(match[i+1])
			}
			all = append(all, pushed{n[0], n[1], n[2], n[3]})
		}
	}
	return all
}

// jobspec is a job as Nomad has it, without what the release alone changes.
func (s *testSite) jobspec(job string) string {
	s.t.Helper()
	var registered map[string]any
	s.nomad("/v1/job/"+job, &registered)
	for _, moving := range []string{"Version", "JobModifyIndex", "ModifyIndex", "SubmitTime", "Status", "StatusDescription", "Stable", "CreateIndex"} {
		delete(registered, moving)
	}
	encoded, err := json.MarshalIndent(registered, "", " ")
	if err != nil {
		s.t.Fatal(err)
	}
	return string(encoded)
}

// forgetOnHost makes the host as one that never had the component's artifacts.
func (s *testSite) forgetOnHost(artifact string) {
	s.t.Helper()
	s.host.shell("rm -rf /var/lib/site/store/names/" + name + "/" + artifact + " /var/lib/site/store/blobs/sha256/* /var/lib/site/store/incoming/* /var/lib/site/store/manifests/*")
	s.host.shell("podman ps --all --quiet --filter name='^" + artifact + "-' | xargs --no-run-if-empty podman rm --force >/dev/null; " +
		"podman images --quiet --filter reference='127.0.0.1:7380/" + name + "/" + artifact + "' | xargs --no-run-if-empty podman rmi --force >/dev/null")
}

func TestArtifactsTravelThroughTheObjectStore(t *testing.T) {
	s := newSite(t, platform)
	spec := s.jobspec("hello")
	store := s.objectStore()
	s.withStore(store, "")

	t.Run("without keys all else is deployed, and the error says what lacks", func(t *testing.T) {
		s := s.in(t)
		got := s.run("deploy")
		s.says(got, 1, storeSecret(site.StoreAdminID), storeSecret(site.StoreAdminSecret), storeSecret(site.StoreProxyID),
			storeSecret(site.StoreProxySecret), "site secrets import")
		if strings.Contains(got.stderr, "provider.admin_token") {
			t.Errorf("it asks for tokens of a provider that there is none of\n%v", got)
		}
		s.waitHealthy("hello")
		if s.registered(site.ObjectStorageComponent) {
			t.Error("the service is registered without its keys")
		}
	})
	s.importKeys(store)
	s.must("deploy")
	s.waitHealthy(site.ObjectStorageComponent)
	if keys := store.keys(name + "/blobs/"); len(keys) == 0 {
		t.Error("the run that brought the service up left the store empty")
	}
	s.wantDone()

	t.Run("a change goes to the store once, and the host pulls it", func(t *testing.T) {
		s := s.in(t)
		sha := s.greeting("ok", "well")
		got := s.must("deploy", "--json")
		uploads := s.pushes(got)
		if len(uploads) != 1 || uploads[0].packs == 0 || len(s.transfers(got)) != 0 {
			t.Errorf("uploads %+v, transfers over SSH %+v\n%v", uploads, s.transfers(got), got)
		}
		t.Logf("the first upload: %+v in %s", uploads, got.duration)
		if version := s.version(); version != sha {
			t.Errorf("the application says %s, not %s", version, sha)
		}
		s.wantDone()
	})
	t.Run("a second deploy uploads nothing, and no way of transport shows in a jobspec", func(t *testing.T) {
		s := s.in(t)
		before, registered := store.keys(name+"/"), s.jobspec("hello")
		for _, via := range []string{"--via=store", "--via=ssh", "--via=store"} {
			s.deployDoes(nil, via)
		}
		if after := store.keys(name + "/"); !slices.Equal(before, after) {
			t.Errorf("the store has %q, and had %q", after, before)
		}
		if now := s.jobspec("hello"); now != registered {
			t.Errorf("another jobspec:\n%s\nand before:\n%s", now, registered)
		}
		for _, word := range []string{store.bucket, store.root.Endpoint, "X-Amz", store.admin.id} {
			if strings.Contains(registered, word) || strings.Contains(spec, word) {
				t.Errorf("the jobspec has %q", word)
			}
		}
	})
	t.Run("a host that has nothing pulls a release whose sessions are over", func(t *testing.T) {
		s := s.in(t)
		store := store.in(s)
		store.remove(name + "/sessions/")
		sha := s.version()
		s.forgetOnHost("hello")
		s.until("the application to run from what the host pulled", time.Minute, func() error {
			version, err := s.tryVersion()
			if err == nil && version != sha {
				err = fmt.Errorf("it says %s", version)
			}
			return err
		})
		s.runsInPodman("hello")
		s.must("deploy", "--via=ssh") // what else was forgotten
		s.wantDone()
	})
	t.Run("keys that the store refuses stop a deploy before any job is touched", func(t *testing.T) {
		s := s.in(t)
		store := store.in(s)
		sha := s.version()
		newer := s.greeting("well", "fine")
		store.setKey(storeAccount{store.admin.id, rand.Text()})
		got := s.run("deploy")
		s.says(got, 1, "refuses", "--via=ssh")
		if version := s.version(); version != sha {
			t.Errorf("the application says %s, not %s", version, sha)
		}
		s.must("deploy", "--via=ssh")
		if version := s.version(); version != newer {
			t.Errorf("the application says %s, not %s", version, newer)
		}
		store.setKey(store.admin)
		s.must("artifacts", "push")
	})
	t.Run("the service is killed between look and upload, and the deploy goes on", func(t *testing.T) {
		s := s.in(t)
		sha := s.greeting("fine", "back")
		got := s.runUntil(moment{step: "uploads", kind: plan.StepPlanned}, func(*os.Process) {
			s.host.shell("podman ps --quiet --filter name='^" + site.ObjectStorageComponent + "-' | xargs podman kill >/dev/null")
		}, "deploy")
		if got.code != 0 {
			t.Fatal(got)
		}
		if version := s.version(); version != sha {
			t.Errorf("the application says %s, not %s", version, sha)
		}
	})
	t.Run("a bucket that goes away between look and upload stops the deploy before any job is touched", func(t *testing.T) {
		s := s.in(t)
		store := store.in(s)
		sha := s.version()
		newer := s.greeting("back", "better")
		got := s.runUntil(moment{step: "uploads", kind: plan.StepPlanned}, func(*os.Process) { store.grant(nil, nil) }, "deploy")
		s.says(got, 1, "refuses", "--via=ssh")
		if version := s.version(); version != sha {
			t.Errorf("the application says %s, not %s", version, sha)
		}
		s.must("deploy", "--via=ssh")
		if version := s.version(); version != newer {
			t.Errorf("the application says %s, not %s", version, newer)
		}
		store.grant([]string{store.admin.id}, []string{store.proxy.id})
		s.must("deploy")
		s.wantDone()
	})
	t.Run("each blob of an artifact is exported as it was", func(t *testing.T) {
		s := s.in(t)
		var listing struct {
			Artifacts []struct {
				Artifact, Digest string
				Blobs            []string
			}
		}
		if got := s.must("artifacts", "ls", "--json"); json.Unmarshal([]byte(got.stdout), &listing) != nil || len(listing.Artifacts) == 0 {
			t.Fatal(got)
		}
		one := listing.Artifacts[0]
		for _, digest := range one.Blobs {
			file := filepath.Join(t.TempDir(), "blob")
			s.must("artifacts", "export", one.Artifact+"@"+digest, file)
			if sum := sha256.Sum256([]byte(s.read(file))); "sha256:"+hex.EncodeToString(sum[:]) != digest {
				t.Errorf("%s was exported with other bytes", digest)
			}
		}
		s.says(s.run("artifacts", "export", one.Artifact+"@sha256:"+strings.Repeat("0", 64), filepath.Join(t.TempDir(), "none")), 1, "has no artifact", "site artifacts ls")
	})
	t.Run("gc gives its reasons, and keeps what runs", func(t *testing.T) {
		s := s.in(t)
		s.collects(store.in(s))
	})
}

// greeting commits another answer of the application's health page.
func (s *testSite) greeting(from, to string) string {
	s.t.Helper()
	return s.commit("it says "+to, map[string]string{"jobs/hello/app/main.go": s.replace("jobs/hello/app/main.go", `"`+from+`"`, `"`+to+`"`)})
}

// in is the same store for a subtest.
func (o *objectStore) in(s *testSite) *objectStore {
	copied := *o
	copied.s = s
	return &copied
}

// collects removes what no release names.
func (s *testSite) collects(store *objectStore) {
	s.t.Helper()
	before := store.keys(name + "/")
	dry := s.must("artifacts", "gc", "--dry-run", "--json")
	if after := store.keys(name + "/"); !slices.Equal(before, after) {
		s.t.Errorf("a dry run changed the store: %q, before %q", after, before)
	}
	var said struct {
		DryRun bool `json:"dry_run"`
		Store  struct {
			Artifacts []struct {
				Artifact, Reason string
				Removed          bool
			}
		}
	}
	if err := json.Unmarshal([]byte(dry.stdout), &said); err != nil || !said.DryRun || len(said.Store.Artifacts) == 0 {
		s.t.Fatalf("not a dry run: %v\n%v", err, dry)
	}
	for _, one := range said.Store.Artifacts {
		if one.Reason == "" || one.Removed {
			s.t.Errorf("%+v: everything is of a kept release", one)
		}
	}
	s.must("artifacts", "gc")
	s.wantDone()
}
