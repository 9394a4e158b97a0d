package lab

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
)

// cgroups says how the machine mounts its control groups. The container
// runtime refuses a machine that mixes both versions, and a host's systemd has
// to be told when it is to use the first one.
type cgroups struct {
	// legacy: the controllers are version 1.
	legacy bool
	// unified are mount points of version 2 beside version 1 controllers; they
	// are hidden from the lab.
	unified []string
	// roots are the mount points of all hierarchies, for cleaning up.
	roots []string
}

// parseCgroups reads the text of /proc/self/mountinfo.
func parseCgroups(mountinfo io.Reader) (cgroups, error) {
	var found cgroups
	var version2 []string
	lines := bufio.NewScanner(mountinfo)
	for lines.Scan() {
		// "36 31 0:33 / /sys/fs/cgroup/devices rw,relatime - cgroup cgroup rw,devices":
		// optional fields end at the lone dash.
		before, after, ok := strings.Cut(lines.Text(), " - ")
		fields := strings.Fields(before)
		kind, _, _ := strings.Cut(after, " ")
		if !ok || len(fields) < 5 {
			continue
		}
		point := unescapeMount(fields[4])
		if point != "/sys/fs/cgroup" && !strings.HasPrefix(point, "/sys/fs/cgroup/") {
			continue // somebody else's, such as a chroot's
		}
		switch kind {
		case "cgroup":
			found.legacy = true
			found.roots = append(found.roots, point)
		case "cgroup2":
			version2 = append(version2, point)
			found.roots = append(found.roots, point)
		}
	}
	if err := lines.Err(); err != nil {
		return cgroups{}, fmt.Errorf("read mounts: %w", err)
	}
	if len(found.roots) == 0 {
		return cgroups{}, fmt.Errorf("no control groups are mounted under /sys/fs/cgroup")
	}
	if found.legacy {
		found.unified = version2
	}
	return found, nil
}

// unescapeMount undoes the octal escapes of mountinfo (space is \040).
func unescapeMount(path string) string {
	var out strings.Builder
	for i := 0; i < len(path); i++ {
		if path[i] == '\\' && i+3 < len(path) {
			if code, err := strconv.ParseUint(path[i+1:i+4], 8, 8); err == nil {
				out.WriteByte(byte(code))
				i += 3
				continue
			}
		}
		out.WriteByte(path[i])
	}
	return out.String()
}

func readCgroups() (cgroups, error) {
	file, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return cgroups{}, fmt.Errorf("read mounts: %w", err)
	}
	defer file.Close()
	return parseCgroups(file)
}

// initArguments are what PID 1 of a host is started with.
func (c cgroups) initArguments() []string {
	if !c.legacy {
		return nil
	}
	return []string{"systemd.unified_cgroup_hierarchy=0", "systemd.legacy_systemd_cgroup_controller=1"}
}

// limits are resource limits for a machine whose root may not raise them: the
// defaults of podman are above the machine's and fail.
type limits struct {
	// outer are podman's --ulimit values for a host, inner those for containers
	// on the host, which must fit into the outer ones.
	outer, inner []string
}

const capSysResource = 24

// parseLimits reads the text of /proc/self/status.
func parseLimits(status io.Reader) (limits, error) {
	lines := bufio.NewScanner(status)
	for lines.Scan() {
		value, ok := strings.CutPrefix(lines.Text(), "CapEff:")
		if !ok {
			continue
		}
		effective, err := strconv.ParseUint(strings.TrimSpace(value), 16, 64)
		if err != nil {
			return limits{}, fmt.Errorf("read capabilities: %w", err)
		}
		if effective&(1<<capSysResource) != 0 {
			return limits{}, nil
		}
		// nproc stays under the usual pid_max of 32768.
		return limits{
			outer: []string{"nofile=20000:20000", "nproc=30000:30000"},
			inner: []string{"nofile=10000:10000", "nproc=20000:20000"},
		}, nil
	}
	if err := lines.Err(); err != nil {
		return limits{}, fmt.Errorf("read capabilities: %w", err)
	}
	return limits{}, fmt.Errorf("read capabilities: no CapEff in process status")
}

func readLimits() (limits, error) {
	file, err := os.Open("/proc/self/status")
	if err != nil {
		return limits{}, fmt.Errorf("read capabilities: %w", err)
	}
	defer file.Close()
	return parseLimits(file)
}
