package host_test

import (
	"slices"
	"testing"

	"github.com/nomad-site/site/internal/reconcile/host"
	"github.com/nomad-site/site/internal/site"
)

const relayUnit = "/etc/systemd/system/site-relay.service"

// threeHosts is the input of the host with that name.
func threeHosts(name, firstAddress string, components ...string) host.Input {
	in := input()
	in.Site.Hosts = []site.Host{{Name: "gamma-1", Client: true}, {Name: "gamma-2", Server: true, Client: true}, {Name: "gamma-3", Client: true}}
	in.Host = in.Site.Hosts[slices.IndexFunc(in.Site.Hosts, func(each site.Host) bool { return each.Name == name })]
	in.ServerAddresses = []string{firstAddress}
	for _, component := range components {
		in.Site.Components = append(in.Site.Components, site.Component{Name: component})
	}
	return in
}

func TestTheRelayIsGolden(t *testing.T) {
	both := []string{site.OpenBaoComponent, site.PostgresComponent}
	for name, in := range map[string]host.Input{
		"relay-first-server":             threeHosts("gamma-2", "10.9.0.2", both...),
		"relay-first-server-in-public":   threeHosts("gamma-2", "203.0.113.6", both...),
		"relay-other-host":               threeHosts("gamma-1", "10.9.0.2", both...),
		"relay-other-host-with-ipv6":     threeHosts("gamma-3", "fd00::2", both...),
		"relay-first-server-one-service": threeHosts("gamma-2", "100.64.7.1", site.PostgresComponent),
	} {
		t.Run(name, func(t *testing.T) {
			document := render(t, in)
			unit := file(t, document, relayUnit)
			if unit.Mode != "0644" || unit.Secret {
				t.Errorf("%+v", unit)
			}
			golden(t, name+".service", unit.Content)
			at := slices.IndexFunc(document.Units, func(unit host.Unit) bool { return unit.Name == "site-relay.service" })
			if at < 0 || document.Units[at+1].Name != "nomad.service" {
				t.Fatalf("the agent, which needs the relay, does not come behind it: %v", document.Units)
			}
			// Certificates are read anew for each connection: no restart for them.
			if want := []string{host.SiteHostPath, relayUnit}; !slices.Equal(document.Units[at].RestartOn, want) {
				t.Errorf("it restarts on %v, want %v", document.Units[at].RestartOn, want)
			}
		})
	}
}

func TestThereIsNoRelayWhereNothingIsToBeRelayed(t *testing.T) {
	alone := threeHosts("gamma-2", "10.9.0.2", site.OpenBaoComponent, site.PostgresComponent)
	alone.Site.Hosts = alone.Site.Hosts[1:2]
	for name, in := range map[string]host.Input{
		"one host":                        alone,
		"three hosts without the servers": threeHosts("gamma-2", "10.9.0.2"),
	} {
		t.Run(name, func(t *testing.T) {
			document := render(t, in)
			if document.FileSHA256(relayUnit) != "" {
				t.Error("the unit's file is there")
			}
			if slices.ContainsFunc(document.Units, func(unit host.Unit) bool { return unit.Name == "site-relay.service" }) {
				t.Error("the unit is there")
			}
		})
	}
}
