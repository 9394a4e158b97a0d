package lab

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"

	"github.com/nomad-site/site/internal/plan"
)

// The lab's network is internal: hosts get no default route, and the machine
// publishes no ports for it (podman cannot on an internal network, and so
// leaves no packet-filter rules behind). The machine itself is on the bridge,
// so a host's own address is dialled, from the machine and from other hosts alike.
const (
	storeNumber     = 2  // last octet of the object store
	firstHostNumber = 11 // last octet of host 1
	maxHosts        = 9
)

// chooseSubnet picks a private /24 that overlaps none in use. Different seeds
// start at different places, so that labs seldom ask for the same.
func chooseSubnet(seed string, used []netip.Prefix) (netip.Prefix, error) {
	sum := sha256.Sum256([]byte(seed))
	const choices = 8 * 256 // 10.224.0.0 to 10.231.255.0, which few networks use
	start := int(sum[0])<<8 | int(sum[1])
	for i := range choices {
		n := (start + i) % choices
		subnet := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(224 + n/256), byte(n % 256), 0}), 24)
		if !overlapsAny(subnet, used) {
			return subnet, nil
		}
	}
	return netip.Prefix{}, errors.New("choose lab network: every candidate is in use")
}

func overlapsAny(subnet netip.Prefix, used []netip.Prefix) bool {
	for _, other := range used {
		if other.Bits() > 0 && subnet.Overlaps(other) {
			return true
		}
	}
	return false
}

// usedNetworks are the networks that the machine has addresses in or routes
// to, apart from those through the interface except.
func usedNetworks(ctx context.Context, except string) ([]netip.Prefix, error) {
	interfaces, err := net.Interfaces()
	if err != nil {
		return nil, fmt.Errorf("list network interfaces: %w", err)
	}
	var used []netip.Prefix
	for _, each := range interfaces {
		if each.Name == except {
			continue
		}
		addresses, err := each.Addrs()
		if err != nil {
			continue // it went away meanwhile
		}
		for _, address := range addresses {
			if prefix, err := netip.ParsePrefix(address.String()); err == nil {
				used = append(used, prefix.Masked())
			}
		}
	}
	out, err := exec.CommandContext(ctx, "ip", "-4", "-j", "route", "show", "table", "all").Output()
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	var routes []struct{ Dst, Dev string }
	if err := json.Unmarshal(out, &routes); err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	for _, route := range routes {
		if route.Dev == except {
			continue
		}
		if prefix, err := netip.ParsePrefix(route.Dst); err == nil {
			used = append(used, prefix.Masked())
		} else if address, err := netip.ParseAddr(route.Dst); err == nil {
			used = append(used, netip.PrefixFrom(address, address.BitLen()))
		}
	}
	return used, nil
}

// addressOf is the address with this last octet.
func addressOf(subnet netip.Prefix, number int) netip.Addr {
	bytes := subnet.Addr().As4()
	bytes[3] = byte(number)
	return netip.AddrFrom4(bytes)
}

// macOf is fixed for an address: a host that is booted anew is reached at once,
// where a new random one would wait for neighbour caches to expire.
func macOf(address netip.Addr) string {
	bytes := address.As4()
	return fmt.Sprintf("02:51:%02x:%02x:%02x:%02x", bytes[0], bytes[1], bytes[2], bytes[3])
}

// networkDocument is podman's own network file; its command line cannot set the
// name of the bridge in the versions that are around.
func networkDocument(id, lab, bridge string, subnet netip.Prefix) ([]byte, error) {
	sum := sha256.Sum256([]byte("network " + id))
	return json.MarshalIndent(map[string]any{
		"name":              networkName,
		"id":                hex.EncodeToString(sum[:]),
		"driver":            "bridge",
		"network_interface": bridge,
		"created":           "2026-01-01T00:00:00Z",
		"subnets": []map[string]string{{
			"subnet":  subnet.String(),
			"gateway": addressOf(subnet, 1).String(),
		}},
		"ipv6_enabled": false,
		"internal":     true,
		"dns_enabled":  false,
		"labels":       map[string]string{label: lab},
		"ipam_options": map[string]string{"driver": "host-local"},
	}, "", "  ")
}

const networkName = "lab"

// ensureBridge makes the lab's bridge and anchors it with a link of its own.
// Without the anchor the bridge would go whenever the last host stops, and
// traffic meant for the lab would leave by the machine's default route.
func ensureBridge(ctx context.Context, bridge string, subnet netip.Prefix) error {
	anchor, peer := bridge+"a", bridge+"b"
	steps := [][]string{
		{"link", "add", bridge, "type", "bridge"},
		{"addr", "replace", netip.PrefixFrom(addressOf(subnet, 1), subnet.Bits()).String(), "dev", bridge},
		{"link", "add", anchor, "type", "veth", "peer", "name", peer},
		{"link", "set", anchor, "master", bridge, "up"},
		{"link", "set", peer, "up"},
		{"link", "set", bridge, "up"},
	}
	for _, step := range steps {
		if step[1] == "add" && linkExists(step[2]) && step[0] == "link" {
			continue
		}
		if err := ip(ctx, step...); err != nil {
			return err
		}
	}
	return nil
}

func removeBridge(ctx context.Context, bridge string) error {
	var failed []error
	for _, link := range []string{bridge + "a", bridge} {
		if linkExists(link) {
			failed = append(failed, ip(ctx, "link", "del", link))
		}
	}
	return errors.Join(failed...)
}

func linkExists(name string) bool {
	_, err := os.Lstat("/sys/class/net/" + name)
	return err == nil
}

func ip(ctx context.Context, args ...string) error {
	out, err := exec.CommandContext(ctx, "ip", args...).CombinedOutput()
	if err != nil {
		return plan.WithHint(fmt.Errorf("ip %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(out))),
			"the lab needs to make a network bridge: run as root, with the kernel's bridge and veth support")
	}
	return nil
}
