package host

import (
	"net"
	"net/netip"
	"strconv"

	"github.com/nomad-site/site/internal/site"
)

const (
	relayUnit     = "site-relay.service"
	relayUnitPath = "/etc/systemd/system/" + relayUnit
	// relayPort is where the first server's relay listens.
	relayPort = 7381
	// privateNetworks are those of RFC 1918, RFC 6598 and RFC 4193.
	privateNetworks = "10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 100.64.0.0/10 fc00::/7"
)

// relayServices are what jobs of every host expect on loopback, and only the
// first server has.
func relayServices(in Input) []string {
	var services []string
	if len(in.Site.Hosts) < 2 || len(in.ServerAddresses) == 0 {
		return nil
	}
	for _, service := range []struct{ component, address string }{
		{site.OpenBaoComponent, "127.0.0.1:8200"},
		{site.PostgresComponent, "127.0.0.1:5432"},
	} {
		if in.Site.Component(service.component) != nil {
			services = append(services, service.component+"="+service.address)
		}
	}
	return services
}

// relayFile makes the unit that takes services from the first server to the
// others; nil where there is nothing to take, or nowhere to take it.
func relayFile(in Input) (*File, error) {
	services := relayServices(in)
	if services == nil {
		return nil, nil
	}
	first := in.Site.FirstServer()
	serves := in.Host.Name == first
	values := map[string]any{
		"RelayServes": serves, "RelayServer": first, "RelayServices": services,
		"RelayAddress": net.JoinHostPort(in.ServerAddresses[0], strconv.Itoa(relayPort)),
		"RelayPeers":   relayPeers(serves, in.ServerAddresses[0]),
		"CACertPath":   CACertPath, "AgentCertPath": AgentCertPath, "AgentKeyPath": AgentKeyPath,
	}
	content, err := render(in.Templates, "units/"+relayUnit+".tmpl", values)
	if err != nil {
		return nil, err
	}
	file := newFile(relayUnitPath, "0644", content)
	return &file, nil
}

// relayPeers is who the relay has to do with. A server with a private address is
// asked from such ones; who asks one with a public address cannot be known.
func relayPeers(serves bool, first string) string {
	if !serves {
		return first
	}
	shared := netip.MustParsePrefix("100.64.0.0/10")
	if address, err := netip.ParseAddr(first); err == nil && (address.IsPrivate() || shared.Contains(address)) {
		return privateNetworks
	}
	return ""
}
