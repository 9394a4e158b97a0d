package host_test

import (
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/nomad-site/site/bootstrap"
	"github.com/nomad-site/site/internal/reconcile/host"
	"github.com/nomad-site/site/internal/secret"
)

func TestOtherCredentialsChangeNothingElseOfWhatWasApplied(t *testing.T) {
	in := input()
	in.Credentials.Issuer, in.Credentials.Expire = "issuer", time.Unix(1e9, 0).UTC()
	applied := render(t, in).Public()
	// As a site of an older release has it.
	unit := slices.IndexFunc(applied.Units, func(unit host.Unit) bool { return unit.Name == host.NomadUnit })
	applied.Units[unit].RestartOn = append(applied.Units[unit].RestartOn, host.CACertPath)
	applied.Units[unit].ReloadOn = nil

	with := func(credentials host.Credentials) host.Document {
		t.Helper()
		document, err := host.WithCredentials(applied, in.Host, credentials, bootstrap.FS)
		if err != nil {
			t.Fatal(err)
		}
		return document
	}
	expire := time.Unix(2e9, 0).UTC()
	for _, test := range []struct {
		name        string
		credentials host.Credentials
		differ      []string
		issuer      string
		expire      time.Time
	}{
		{"all are the same", host.Credentials{GossipKey: in.Credentials.GossipKey, CACertPEM: in.Credentials.CACertPEM}, nil,
			"issuer", in.Credentials.Expire},
		{"another bundle", host.Credentials{GossipKey: in.Credentials.GossipKey, CACertPEM: "both"}, []string{host.CACertPath},
			"issuer", in.Credentials.Expire},
		{"another gossip key", host.Credentials{GossipKey: secret.New("next"), CACertPEM: in.Credentials.CACertPEM}, []string{host.GossipPath},
			"issuer", in.Credentials.Expire},
		{"another certificate", host.Credentials{
			GossipKey: in.Credentials.GossipKey, CACertPEM: in.Credentials.CACertPEM,
			AgentCertPEM: "certificate", AgentKeyPEM: secret.New("key"), Expire: expire, Issuer: "next",
		}, []string{host.AgentCertPath, host.AgentKeyPath}, "next", expire},
	} {
		t.Run(test.name, func(t *testing.T) {
			document := with(test.credentials)
			var differ []string
			for _, each := range document.Files {
				if each.SHA256 != applied.FileSHA256(each.Path) {
					differ = append(differ, each.Path)
				}
			}
			if !slices.Equal(differ, test.differ) {
				t.Errorf("%v differ, want %v", differ, test.differ)
			}
			if len(document.Files) != len(applied.Files) || document.Issuer() != test.issuer || !document.CredentialsExpire.Equal(test.expire) {
				t.Errorf("%d files, issuer %s, until %s", len(document.Files), document.Issuer(), document.CredentialsExpire)
			}
			agent := document.Units[unit]
			if slices.Contains(agent.RestartOn, host.CACertPath) || !slices.Contains(agent.ReloadOn, host.CACertPath) {
				t.Errorf("the agent would restart for its CA: %+v", agent)
			}
		})
	}
	if !slices.Contains(applied.Units[unit].RestartOn, host.CACertPath) {
		t.Error("what was applied has changed")
	}
	first := with(host.Credentials{CACertPEM: "both"})
	if !reflect.DeepEqual(first.Directories, applied.Directories) || !reflect.DeepEqual(first.Binaries, applied.Binaries) {
		t.Error("more than the secret files differs")
	}
}

func TestACertificateFromBeforeThereWereIssuersIsOfTheCAInItsFile(t *testing.T) {
	document := render(t, input())
	document.CredentialsIssuer = ""
	if got := document.Issuer(); got == "" || got != document.FileSHA256(host.CACertPath) {
		t.Errorf("issuer %q", got)
	}
	var none *host.Document
	if got := none.Issuer(); got != "" {
		t.Errorf("no document has the issuer %q", got)
	}
}
