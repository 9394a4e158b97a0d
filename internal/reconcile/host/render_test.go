package host_test

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/nomad-site/site/bootstrap"
	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/reconcile/host"
	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/site"
)

var update = flag.Bool("update", false, "write the golden files anew")

const nomadConfig = "/etc/nomad.d/nomad.hcl"

func input() host.Input {
	return host.Input{
		Site: &site.Site{
			Name: "gamma", Region: "global", Datacenter: "dc1",
			Components: []site.Component{{Name: "orders", Directories: []site.Directory{
				{Path: "/run/orders", Owner: "3000", Group: "3000", Mode: "0750"},
			}}},
		},
		Host:    site.Host{Name: "gamma-1", Server: true, Client: true},
		Address: "203.0.113.5", ServerAddresses: []string{"203.0.113.5"},
		Packages:      []host.Package{{Name: "podman", Version: "4.3.1"}, {Name: "crun", Version: "1.8"}},
		OperatorsJWKS: `{"keys":[]}`, SiteHostSHA256: "5e", NomadSHA256: "a0", DriverSHA256: "d0",
		Credentials: &host.Credentials{
			GossipKey: secret.New("planted-gossip"), CACertPEM: "planted-ca", AgentCertPEM: "planted-certificate", AgentKeyPEM: secret.New("planted-key"),
		},
		Templates: bootstrap.FS,
	}
}

func render(t *testing.T, in host.Input) host.Document {
	t.Helper()
	document, err := host.Render(in)
	if err != nil {
		t.Fatal(err)
	}
	return document
}

func file(t *testing.T, document host.Document, path string) host.File {
	t.Helper()
	at := slices.IndexFunc(document.Files, func(file host.File) bool { return file.Path == path })
	if at < 0 {
		t.Fatalf("no %s", path)
	}
	return document.Files[at]
}

func TestTheAgentsConfigurationIsGolden(t *testing.T) {
	for name, change := range map[string]func(*host.Input){
		"one-host": func(*host.Input) {},
		"one-host-with-openbao": func(in *host.Input) {
			in.Site.Components = append(in.Site.Components, site.Component{Name: site.OpenBaoComponent})
		},
		"one-of-three-servers": func(in *host.Input) {
			in.Host.Client = false
			in.ServerAddresses = []string{"203.0.113.5", "203.0.113.6", "203.0.113.7"}
		},
		"client-only": func(in *host.Input) {
			in.Host = site.Host{Name: "gamma-4", Client: true}
			in.Address = "203.0.113.8"
			in.ServerAddresses = []string{"203.0.113.5", "203.0.113.6", "203.0.113.7"}
			in.Site.FingerprintDenylist = []string{"env_aws", "env_gce"}
		},
	} {
		t.Run(name, func(t *testing.T) {
			in := input()
			change(&in)
			golden(t, name+".nomad.hcl", file(t, render(t, in), nomadConfig).Content)
		})
	}
}

// golden compares with a file of testdata, or writes it.
func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s is not what is rendered; if that is meant, run `make generate`. Rendered:\n%s", path, got)
	}
}

func TestTheSameInputGivesTheSameDocument(t *testing.T) {
	first := render(t, input())
	other := input()
	slices.Reverse(other.Packages)
	if !reflect.DeepEqual(first, render(t, other)) {
		t.Error("two documents of one input differ")
	}
}

func TestWhatAHostMustHave(t *testing.T) {
	document := render(t, input())
	if document.Packages[0].Name != "crun" || document.Packages[1].Name != "podman" {
		t.Errorf("packages %v", document.Packages)
	}
	folder := host.Directory{Path: "/run/orders", Owner: "3000", Group: "3000", Mode: "0750"}
	if !slices.Contains(document.Directories, folder) {
		t.Errorf("the component's folder is missing: %v", document.Directories)
	}
	// /run is empty after a boot.
	if got := file(t, document, "/etc/tmpfiles.d/site.conf").Content; !strings.Contains(got, "d /run/orders 0750 3000 3000 -\n") {
		t.Errorf("got %s", got)
	}
	if got := file(t, document, host.OperatorsJWKSPath); got.Content != `{"keys":[]}` || got.Mode != "0644" {
		t.Errorf("operators' keys %+v", got)
	}
	binaries := []host.Binary{{Path: host.NomadPath, SHA256: "a0", Mode: "0755"}, {Path: host.DriverPath, SHA256: "d0", Mode: "0755"}}
	if !reflect.DeepEqual(document.Binaries, binaries) {
		t.Errorf("binaries %v", document.Binaries)
	}
	var units []string
	for _, unit := range document.Units {
		units = append(units, unit.Name)
	}
	// The agent is last: it needs both others.
	if want := []string{"podman.socket", "site-host.service", "nomad.service"}; !slices.Equal(units, want) {
		t.Errorf("units %v, want %v", units, want)
	}
	agent := document.Units[2]
	for _, path := range []string{nomadConfig, host.NomadPath, host.DriverPath} {
		if !slices.Contains(agent.RestartOn, path) || slices.Contains(agent.ReloadOn, path) {
			t.Errorf("the agent does not restart when %s changes", path)
		}
	}
	for _, path := range []string{host.CACertPath, host.AgentCertPath, host.AgentKeyPath} {
		if !slices.Contains(agent.ReloadOn, path) || slices.Contains(agent.RestartOn, path) {
			t.Errorf("the agent does not reload when %s changes, or restarts", path)
		}
	}
}

func TestSecretFilesArePrivate(t *testing.T) {
	document := render(t, input())
	for _, path := range host.CredentialPaths() {
		if got := file(t, document, path); !got.Secret || got.Mode != "0600" || got.Owner != "root" || got.SHA256 == "" {
			t.Errorf("%+v", got)
		}
	}
	if got := file(t, document, host.GossipPath).Content; !strings.Contains(got, `encrypt = "planted-gossip"`) {
		t.Errorf("gossip file %q", got)
	}
	if got := file(t, document, host.AgentKeyPath).Content; got != "planted-key" {
		t.Errorf("key file %q", got)
	}
}

func TestNoContentIsInThePublicDocument(t *testing.T) {
	document := render(t, input())
	encoded, err := json.Marshal(document.Public())
	if err != nil {
		t.Fatal(err)
	}
	for _, planted := range []string{"planted", "content", "encrypt"} {
		if strings.Contains(string(encoded), planted) {
			t.Errorf("%q is in %s", planted, encoded)
		}
	}
	if file(t, document, host.AgentKeyPath).Content == "" {
		t.Error("making it public changed the document itself")
	}
	for i, public := range document.Public().Files {
		if public.SHA256 == "" || public.SHA256 != document.Files[i].SHA256 {
			t.Errorf("%s lost its digest", public.Path)
		}
	}
}

func TestInputAndItsSecretsPrintAsRedacted(t *testing.T) {
	in := input()
	for _, printed := range []string{fmt.Sprintf("%+v", *in.Credentials), fmt.Sprintf("%#v", *in.Credentials)} {
		if strings.Contains(printed, "planted-gossip") || strings.Contains(printed, "planted-key") {
			t.Errorf("got %s", printed)
		}
	}
}

func TestAClientHasNoGossipKey(t *testing.T) {
	in := input()
	in.Host.Server = false
	if got := file(t, render(t, in), host.GossipPath); strings.Contains(got.Content, "planted") || strings.Contains(got.Content, "encrypt") {
		t.Errorf("got %+v", got)
	}
}

func TestCredentialsStayWhereNoneAreGiven(t *testing.T) {
	applied := render(t, input()).Public()
	in := input()
	in.Credentials, in.Applied = nil, &applied
	document := render(t, in)
	for _, path := range host.CredentialPaths() {
		if got, want := file(t, document, path), file(t, applied, path); got != want || got.Content != "" {
			t.Errorf("got %+v, want %+v", got, want)
		}
	}
	if got := document.FileSHA256(host.AgentKeyPath); got == "" || got != applied.FileSHA256(host.AgentKeyPath) {
		t.Errorf("digest %q", got)
	}
	if file(t, document, nomadConfig).Content == "" {
		t.Error("all other files have contents")
	}
}

func TestABareHostNeedsCredentials(t *testing.T) {
	partly := render(t, input()).Public()
	partly.Files = slices.DeleteFunc(partly.Files, func(file host.File) bool { return file.Path == host.AgentCertPath })
	for name, test := range map[string]struct {
		applied *host.Document
		path    string
	}{
		"nothing was applied":      {nil, host.GossipPath},
		"one of them is not there": {&partly, host.AgentCertPath},
	} {
		t.Run(name, func(t *testing.T) {
			in := input()
			in.Credentials, in.Applied = nil, test.applied
			_, err := host.Render(in)
			var needs *host.NeedsCredentialsError
			if !errors.As(err, &needs) || needs.Host != "gamma-1" || needs.Path != test.path {
				t.Fatalf("got %v", err)
			}
			if hint := plan.HintOf(err); !strings.Contains(hint, "--root-token-file") {
				t.Errorf("hint %q", hint)
			}
		})
	}
}
