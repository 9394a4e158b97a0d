package site

import (
	"encoding/json"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
)

const (
	account = "0123456789abcdef0123456789abcdef"
	// Its lines begin with the 8th of the site.
	bucketSite = "site \"one\" {\n  host \"h-1\" {\n    address = \"10.0.0.1\"\n  }\n" +
		"  component \"openbao\" {}\n  component \"object-storage-service\" {\n    variables = { memory = 256 }\n  }\n"
	plainStore = "object_store {\nbucket = \"gamma\"\nendpoint = \"https://s3.example.net\"\n}\n"
)

// storeSite is a site with an object store, and the components that come with site.
func storeSite(t *testing.T, document string) (fstest.MapFS, LoadOptions) {
	t.Helper()
	platform := stores()
	for _, name := range []string{"component.hcl", "object-storage-service.nomad.hcl"} {
		file := "jobs/object-storage-service/" + name
		content, err := os.ReadFile("../../" + file)
		if err != nil {
			t.Fatal(err)
		}
		platform[file] = &fstest.MapFile{Data: content}
	}
	return repository(map[string]string{"sites/one/site.hcl": document}), LoadOptions{Platform: platform}
}

func loadStore(t *testing.T, block string) *Site {
	t.Helper()
	files, options := storeSite(t, bucketSite+block+"}\n")
	s, err := Load(files, "one", options)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestAnObjectStoreHasDefaults(t *testing.T) {
	cloudflare := func(store, provider string) string {
		return "object_store {\nbucket = \"gamma\"\n" + store + "\ncloudflare {\naccount_id = \"" + account + "\"\n" + provider + "\n}\n}\n"
	}
	for _, tt := range []struct {
		name, block string
		want        ObjectStore
		provider    *Cloudflare
	}{
		{"any S3", plainStore, ObjectStore{Endpoint: "https://s3.example.net", Region: "us-east-1", Bucket: "gamma", PathStyle: true}, nil},
		{
			"any S3 with all that can be said",
			"object_store {\nbucket = \"a.b-c\"\nendpoint = \"http://192.168.7.1:7070/\"\nregion = \"eu-1\"\npath_style = true\nservice_url = \"https://uploads.example.net/s3/\"\n}\n",
			ObjectStore{Endpoint: "http://192.168.7.1:7070", Region: "eu-1", Bucket: "a.b-c", PathStyle: true, ServiceURL: "https://uploads.example.net/s3"}, nil,
		},
		{"Cloudflare", cloudflare("", ""), ObjectStore{Endpoint: "https://" + account + ".r2.cloudflarestorage.com", Region: "auto", Bucket: "gamma", PathStyle: true}, &Cloudflare{AccountID: account}},
		{
			"Cloudflare in a jurisdiction", cloudflare("path_style = false", "jurisdiction = \"eu\""),
			ObjectStore{Endpoint: "https://" + account + ".eu.r2.cloudflarestorage.com", Region: "auto", Bucket: "gamma"}, &Cloudflare{AccountID: account, Jurisdiction: "eu"},
		},
		{
			"Cloudflare elsewhere, as in a lab", cloudflare("endpoint = \"http://[fd00::1]:7070\"\nregion = \"us-east-1\"", "api = \"http://127.0.0.1:7071/client/v4\""),
			ObjectStore{Endpoint: "http://[fd00::1]:7070", Region: "us-east-1", Bucket: "gamma", PathStyle: true}, &Cloudflare{AccountID: account, API: "http://127.0.0.1:7071/client/v4"},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := *loadStore(t, tt.block).ObjectStore
			provider := got.Cloudflare
			got.Cloudflare, got.Range = nil, tt.want.Range
			if got != tt.want {
				t.Errorf("got %+v", got)
			}
			if (provider == nil) != (tt.provider == nil) || provider != nil && *provider != *tt.provider {
				t.Errorf("got %+v", provider)
			}
		})
	}
	files, options := storeSite(t, "site \"one\" {\n  host \"h-1\" {\n    address = \"10.0.0.1\"\n  }\n}\n")
	if s, err := Load(files, "one", options); err != nil || s.ObjectStore != nil {
		t.Errorf("a site without a store: %+v, %v", s, err)
	}
}

func TestTheServicesJobFollowsFromTheStore(t *testing.T) {
	component := loadStore(t, plainStore).Component(ObjectStorageComponent)
	want := map[string]any{
		"store_endpoint": "https://s3.example.net", "store_region": "us-east-1", "store_bucket": "gamma", "store_path_style": true, "memory": 256.0,
	}
	for name, value := range want {
		var got any
		if err := json.Unmarshal([]byte(component.Variables[name]), &got); err != nil || got != value {
			t.Errorf("%s = %s, %v", name, component.Variables[name], err)
		}
	}
	if len(component.Variables) != len(want) {
		t.Errorf("variables %v", component.Variables)
	}
	if component.Platform || !component.BySSH() {
		t.Error("it reads secrets and so is not the platform's; its artifact travels by SSH all the same")
	}
	if names := namesOfReads(component); !slices.Equal(names, []string{"object-storage-service.r2.admin_access_key_id", "object-storage-service.r2.admin_secret_access_key"}) {
		t.Errorf("the job reads %q", names)
	}
	if a := component.Artifacts; len(a) != 1 || a[0].Embedded != ObjectStorageComponent || a[0].Kind != Image || a[0].User != "65532:65532" {
		t.Errorf("artifacts %+v", a)
	}
	if (Component{Name: "shop"}).BySSH() || !(Component{Name: "openbao", Platform: true}).BySSH() {
		t.Error("all that is the platform's travels by SSH, and nothing of the adopter's must")
	}
}

func TestWhoMakesTheKeysFollowsFromTheProvider(t *testing.T) {
	keys := []string{StoreAdminID, StoreAdminSecret, StoreProxyID, StoreProxySecret}
	sourceOf := func(s *Site, name string) string {
		secret := s.Secret(ObjectStorageComponent + "." + name)
		switch {
		case secret == nil:
			return "none"
		case secret.ProducedBy != nil && secret.External == nil:
			return secret.ProducedBy.Provider
		case secret.External != nil && secret.External.Optional:
			return "optional"
		}
		return "external"
	}
	for _, tt := range []struct {
		name, block, keys, tokens string
	}{
		{"any S3", plainStore, "external", "none"},
		{"Cloudflare", "object_store {\nbucket = \"gamma\"\ncloudflare {\naccount_id = \"" + account + "\"\n}\n}\n", CloudflareProvider, "optional"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := loadStore(t, tt.block)
			for _, name := range keys {
				if got := sourceOf(s, name); got != tt.keys {
					t.Errorf("%s is %s", name, got)
				}
			}
			for _, name := range []string{ProviderTokenA, ProviderTokenB} {
				if got := sourceOf(s, name); got != tt.tokens {
					t.Errorf("%s is %s", name, got)
				}
			}
		})
	}
}

// TestFaultsOfTheObjectStore plants one fault at a time and expects that one line alone.
func TestFaultsOfTheObjectStore(t *testing.T) {
	store := func(lines string) string { return bucketSite + "object_store {\n" + lines + "\n}\n}\n" }
	// The lines under test begin with the 12th of the site.
	plain := func(lines string) string {
		return store("bucket = \"gamma\"\nendpoint = \"https://s3.example.net\"\n" + lines)
	}
	endpoint := func(text string) string { return store("bucket = \"gamma\"\nendpoint = \"" + text + "\"") }
	cloudflare := func(lines string) string { return store("bucket = \"gamma\"\ncloudflare {\n" + lines + "\n}") }
	bucket := func(name string) string { return plainBucket(name, "") }
	const place = "sites/one/site.hcl:"
	for _, tt := range []struct{ name, document, want string }{
		{"no bucket", store("endpoint = \"https://s3.example.net\""), place + "9,14: Missing required argument"},
		{"unknown field", plain("prefix = \"x\""), place + "12,1: Unsupported argument"},
		{"two stores", bucketSite + plainStore + plainStore + "}\n", place + "13,1: Duplicate object_store block"},
		{"bucket in capitals", store(bucket("Gamma")), place + "10,10: Invalid bucket; \"Gamma\" is not a bucket's name"},
		{"bucket that is too short", store(bucket("ab")), place + "10,10: Invalid bucket"},
		{"bucket that is too long", store(bucket(strings.Repeat("a", 64))), place + "10,10: Invalid bucket"},
		{"bucket like an address", store(bucket("10.10.10.10")), place + "10,10: Invalid bucket"},
		{"bucket like a path", store(bucket("../other")), place + "10,10: Invalid bucket"},
		{"bucket with a dot in a host name", store(plainBucket("a1.b2", "path_style = false")), place + "10,10: Invalid bucket; \"a1.b2\" has a dot: as part of a host name no certificate would fit it"},
		{"bucket with a dot at Cloudflare", store("bucket = \"a1.b2\"\ncloudflare {\n account_id = \"" + account + "\"\n}"), place + "10,10: Invalid bucket; \"a1.b2\" has a dot, which R2 takes"},
		{"no endpoint", store("bucket = \"gamma\""), place + "9,1: Object store without an endpoint; Set endpoint"},
		{"endpoint that is no URL", endpoint("s3.example.net"), place + "11,12: Invalid endpoint"},
		{"endpoint with credentials", endpoint("https://id:key@s3.example.net"), place + "11,12: Invalid endpoint; a URL in git must not hold credentials"},
		{"endpoint with the bucket", endpoint("https://s3.example.net/gamma"), place + "11,12: Invalid endpoint; \"https://s3.example.net/gamma\" has a path"},
		{"endpoint with a query", endpoint("https://s3.example.net/?x=1"), place + "11,12: Invalid endpoint; \"https://s3.example.net/?x=1\" has a query"},
		{"endpoint without a host", endpoint("https://:7070"), place + "11,12: Invalid endpoint"},
		{"endpoint in the clear", endpoint("http://s3.example.net"), place + "11,12: Invalid endpoint; \"http://s3.example.net\" is not https: plain http is only for an IP address that is private, link-local or loopback"},
		{"endpoint in the clear at a public address", endpoint("http://203.0.113.9"), place + "11,12: Invalid endpoint"},
		{"endpoint in the clear at a public address in other words", endpoint("http://[::ffff:203.0.113.9]"), place + "11,12: Invalid endpoint"},
		{"region with a space", plain("region = \"eu 1\""), place + "12,10: Invalid region"},
		{"service in the clear", plain("service_url = \"http://127.0.0.1:1\""), place + "12,15: Invalid service_url; \"http://127.0.0.1:1\" is not https: operators' tokens are sent there"},
		{"no account", cloudflare(""), place + "11,12: Missing required argument"},
		{"account that is none", cloudflare("account_id = \"gamma\""), place + "12,14: Invalid account"},
		{"jurisdiction that is none", cloudflare("account_id = \"" + account + "\"\njurisdiction = \"moon\""), place + "13,16: Invalid jurisdiction; \"moon\" is none of eu, fedramp"},
		{"API in the clear", cloudflare("account_id = \"" + account + "\"\napi = \"http://api.example.net\""), place + "13,7: Invalid API"},
		{"a store without its service", strings.Replace(bucketSite, "  component \"object-storage-service\" {\n    variables = { memory = 256 }\n  }\n", "", 1) + plainStore + "}\n", place + "6,1: Object store without its service; Nothing could be uploaded to it: add component \"object-storage-service\" {} to the site"},
		{"a service without its store", bucketSite + "}\n", place + "6,13: Service without an object store; It has no bucket: add object_store"},
		{"a service without OpenBao", strings.Replace(bucketSite, "  component \"openbao\" {}\n", "\n", 1) + plainStore + "}\n", "jobs/object-storage-service/component.hcl:11,8: Secrets without OpenBao"},
		{"a variable that follows from the store", strings.Replace(bucketSite, "memory = 256", "store_bucket = \"x\"", 1) + plainStore + "}\n", place + "7,19: Reserved variable; \"store_bucket\" follows from object_store"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			files, options := storeSite(t, tt.document)
			_, err := Load(files, "one", options)
			got := problemsOf(t, err)
			if len(got) != 1 || !strings.HasPrefix(got[0], tt.want) {
				t.Errorf("got:\n%s\nwant:\n%s", strings.Join(got, "\n"), tt.want)
			}
		})
	}
}

func plainBucket(name, more string) string {
	return "bucket = \"" + name + "\"\nendpoint = \"https://s3.example.net\"\n" + more
}

func TestADotGroupsSecretsOfAComponent(t *testing.T) {
	// Of the component "shop", and not of one named "r2".
	files := withStores(map[string]string{
		"jobs/shop/component.hcl":  shopFile + "secret \"r2.key\" {\n  generated {}\n}\n",
		"jobs/shop/shop.nomad.hcl": jobWith(`{{ with secret "site/data/shop/r2.key?version=previous" }}{{ end }}`),
		"jobs/broker/component.hcl": brokerFile + "reads = [\"shop.r2.key\"]\n" +
			"role \"broker\" {\n  login = true\n  password = \"broker.pg.password\"\n}\nsecret \"pg.password\" {\n  generated {}\n}\n",
	})
	s, err := Load(files, "one", LoadOptions{Platform: stores()})
	if err != nil {
		t.Fatal(err)
	}
	secret := s.Secret("shop.r2.key")
	if secret == nil || secret.Component != "shop" || secret.KVPath() != "shop/r2.key" {
		t.Fatalf("got %+v", secret)
	}
	if got := s.Consumers("shop.r2.key"); !slices.Equal(got, []string{"broker", "shop"}) {
		t.Errorf("it is read by %q", got)
	}
	if got := s.Consumers("broker.pg.password"); !slices.Equal(got, []string{"broker"}) {
		t.Errorf("the role's password is needed by %q", got)
	}
	if err := s.CheckSecretNames([]string{"shop.r2.key"}); err != nil {
		t.Error(err)
	}
	pinned, err := PinTemplate(`{{ with secret "site/data/shop/r2.key" }}{{ end }}`, "", "", func(name string, _ bool) (Pinned, bool) {
		return Pinned{Literal: "4"}, name == "shop.r2.key"
	})
	if want := `{{ with secret "site/data/shop/r2.key?version=4" }}{{ end }}`; err != nil || pinned != want {
		t.Errorf("pinned %s, %v", pinned, err)
	}
}

func TestDotsThatGroupNothingAreRefused(t *testing.T) {
	for _, name := range []string{".", "..", ".a", "a.", "a..b", "a.b.c", "a.1b", "a.b/c", "a.B"} {
		if isSecretName(name) {
			t.Errorf("%q is a secret's name", name)
		}
		files := withStores(map[string]string{"jobs/shop/shop.nomad.hcl": jobWith(`{{ with secret "site/data/shop/` + name + `" }}{{ end }}`)})
		_, err := Load(files, "one", LoadOptions{Platform: stores()})
		if got := problemsOf(t, err); len(got) != 1 || !strings.Contains(got[0], "Secret outside of the catalogue") {
			t.Errorf("%q: %v", name, got)
		}
	}
	for _, path := range []string{"site/data/shop.x/key", "site/data/../key", "site/data//key"} {
		if _, _, problem := secretOfPath(path); problem == "" {
			t.Errorf("%q names a secret", path)
		}
	}
	if isSecretName("a." + strings.Repeat("b", 62)) {
		t.Error("a name of 64 characters")
	}
}

func TestAnOwnNameWithADotIsFoundOut(t *testing.T) {
	files := withStores(map[string]string{"jobs/shop/component.hcl": strings.Replace(shopFile, "[", "[\"r2.key\", ", 1) + "secret \"r2.key\" {\n  generated {}\n}\n"})
	_, err := Load(files, "one", LoadOptions{Platform: stores()})
	if got := problemsOf(t, err); len(got) != 1 || !strings.HasPrefix(got[0], `jobs/shop/component.hcl:1,10: Unknown secret in reads; No active component declares a secret "r2.key". Did you mean "shop.r2.key"?`) {
		t.Errorf("got %v", got)
	}
}
