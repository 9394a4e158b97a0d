package host_test

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"github.com/nomad-site/site/internal/reconcile/host"
	"github.com/nomad-site/site/internal/site"
)

const siteHostUnit = "/etc/systemd/system/site-host.service"

// withStore is the input of a host whose site has an object store.
func withStore() host.Input {
	in := input()
	in.Site.ObjectStore = &site.ObjectStore{
		Endpoint: "https://s3.example.net", Region: "eu-1", Bucket: "gamma-artifacts", PathStyle: true,
		ServiceURL: "https://uploads.example.net", Cloudflare: &site.Cloudflare{AccountID: "0123456789abcdef0123456789abcdef"},
	}
	return in
}

// restarts are the paths for which site-host restarts.
func restarts(t *testing.T, document host.Document) []string {
	t.Helper()
	at := slices.IndexFunc(document.Units, func(unit host.Unit) bool { return unit.Name == host.SiteHostUnit })
	if at < 0 {
		t.Fatal("there is no site-host")
	}
	return document.Units[at].RestartOn
}

func TestTheUnitOfSiteHostIsGolden(t *testing.T) {
	for name, in := range map[string]host.Input{"site-host": input(), "site-host-with-object-store": withStore()} {
		t.Run(name, func(t *testing.T) {
			golden(t, name+".service", file(t, render(t, in), siteHostUnit).Content)
		})
	}
}

func TestWithoutAnObjectStoreNothingButLoopbackGetsThrough(t *testing.T) {
	document := render(t, input())
	if document.FileSHA256(host.ObjectStorePath) != "" {
		t.Error("the file is there")
	}
	unit := file(t, document, siteHostUnit).Content
	for _, wanted := range []string{"IPAddressDeny=any\n", "IPAddressAllow=localhost\n", "ProtectSystem=strict\n"} {
		if !strings.Contains(unit, wanted) {
			t.Errorf("no %s", wanted)
		}
	}
	for _, unwanted := range []string{"ReadWritePaths", "object-store"} {
		if strings.Contains(unit, unwanted) {
			t.Errorf("%s is there", unwanted)
		}
	}
	if got := restarts(t, document); !slices.Equal(got, []string{host.SiteHostPath, siteHostUnit}) {
		t.Errorf("it restarts on %v", got)
	}
}

func TestSiteHostKnowsFromWhereItPulls(t *testing.T) {
	document := render(t, withStore())
	written := file(t, document, host.ObjectStorePath)
	if written.Mode != "0644" || written.Secret {
		t.Errorf("%+v", written)
	}
	decoder := json.NewDecoder(strings.NewReader(written.Content))
	decoder.DisallowUnknownFields()
	var got host.ObjectStore
	if err := decoder.Decode(&got); err != nil {
		t.Fatal(err)
	}
	want := host.ObjectStore{
		Site: "gamma", Host: "gamma-1", Endpoint: "https://s3.example.net", Region: "eu-1", Bucket: "gamma-artifacts", PathStyle: true,
	}
	if got != want {
		t.Errorf("got %+v", got)
	}
	unit := file(t, document, siteHostUnit).Content
	for _, wanted := range []string{
		" --listen 127.0.0.1:7380 --object-store /etc/site/object-store.json\n", "ReadWritePaths=/var/lib/site/store\n", "ProtectSystem=strict\n",
	} {
		if !strings.Contains(unit, wanted) {
			t.Errorf("no %s", wanted)
		}
	}
	if strings.Contains(unit, "IPAddress") {
		t.Error("it cannot reach the store")
	}
	if got := restarts(t, document); !slices.Equal(got, []string{host.SiteHostPath, siteHostUnit, host.ObjectStorePath}) {
		t.Errorf("it restarts on %v", got)
	}
}
