package observe

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/nomad-site/site/internal/reconcile/host"
)

// machine fills in what the host is, apart from the document.
func (o Observer) machine(observation *host.Observation) error {
	var err error
	if observation.Hostname, err = os.Hostname(); err != nil {
		return err
	}
	release, err := os.ReadFile(o.path("etc/os-release"))
	if err != nil {
		return err
	}
	observation.OS, observation.OSVersion = parseRelease(string(release))
	observation.CPUs = runtime.NumCPU()
	memory, err := os.ReadFile(o.path("proc/meminfo"))
	if err != nil {
		return err
	}
	if observation.MemoryBytes, err = parseMemory(string(memory)); err != nil {
		return err
	}
	if observation.FreeBytes, err = o.free(); err != nil {
		return err
	}
	routes, err := os.ReadFile(o.path("proc/net/route"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	observation.Addresses, err = addresses(defaultInterface(string(routes)))
	return err
}

func parseRelease(text string) (id, version string) {
	for line := range strings.Lines(text) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		value = strings.Trim(value, `"'`)
		switch name {
		case "ID":
			id = value
		case "VERSION_ID":
			version = value
		}
	}
	return id, version
}

func parseMemory(text string) (int64, error) {
	for line := range strings.Lines(text) {
		var kibibytes int64
		if _, err := fmt.Sscanf(line, "MemTotal: %d kB", &kibibytes); err == nil {
			return kibibytes << 10, nil
		}
	}
	return 0, errors.New("meminfo names no MemTotal")
}

// free is the room where the store lies, or will lie.
func (o Observer) free() (int64, error) {
	for folder := o.path(o.Store); ; folder = filepath.Dir(folder) {
		var status unix.Statfs_t
		err := unix.Statfs(folder, &status)
		if errors.Is(err, fs.ErrNotExist) && folder != filepath.Dir(folder) {
			continue
		}
		if err != nil {
			return 0, fmt.Errorf("free space of %s: %w", folder, err)
		}
		return int64(status.Bavail) * int64(status.Bsize), nil //nolint:unconvert // the types differ by platform
	}
}

// defaultInterface finds the interface of the default route with the lowest metric.
func defaultInterface(routes string) string {
	best, lowest := "", -1
	for line := range strings.Lines(routes) {
		fields := strings.Fields(line)
		if len(fields) < 8 {
			continue
		}
		destination, err := hex.DecodeString(fields[1])
		if err != nil || len(destination) != 4 || binary.NativeEndian.Uint32(destination) != 0 || fields[7] != "00000000" {
			continue
		}
		var flags, metric int
		if _, err := fmt.Sscanf(fields[3], "%x", &flags); err != nil || flags&unix.RTF_UP == 0 {
			continue
		}
		if _, err := fmt.Sscanf(fields[6], "%d", &metric); err != nil {
			continue
		}
		if lowest < 0 || metric < lowest {
			best, lowest = fields[0], metric
		}
	}
	return best
}

// addresses lists the global unicast addresses, those of the first interface first.
func addresses(first string) ([]string, error) {
	interfaces, err := net.Interfaces()
	if err != nil {
		return nil, err
	}
	slices.SortStableFunc(interfaces, func(a, b net.Interface) int {
		switch {
		case a.Name == first && b.Name != first:
			return -1
		case b.Name == first && a.Name != first:
			return 1
		}
		return a.Index - b.Index
	})
	found := []string{}
	for _, each := range interfaces {
		if each.Flags&net.FlagUp == 0 || each.Flags&net.FlagLoopback != 0 {
			continue
		}
		bound, err := each.Addrs()
		if err != nil {
			return nil, fmt.Errorf("addresses of %s: %w", each.Name, err)
		}
		var four, six []string
		for _, address := range bound {
			prefix, err := netip.ParsePrefix(address.String())
			if err != nil || !prefix.Addr().IsGlobalUnicast() {
				continue
			}
			if prefix.Addr().Is4() {
				four = append(four, prefix.Addr().String())
			} else {
				six = append(six, prefix.Addr().String())
			}
		}
		found = append(append(found, four...), six...)
	}
	return found, nil
}
