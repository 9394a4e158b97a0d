package lab

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/retry"
)

// pod is podman in the lab's namespace, with storage, locks and networks of
// its own: it neither sees nor disturbs the machine's containers or another lab's.
type pod struct {
	lab    *Lab
	space  *namespace
	groups cgroups
	limits limits
}

var errNotRunning = errors.New("the lab is not running")

// find returns the lab's podman if the lab's processes are there.
func (l *Lab) find() (*pod, error) {
	space, err := findNamespace(l.dir)
	if err != nil {
		return nil, err
	}
	if space == nil {
		return nil, plan.WithHint(fmt.Errorf("lab %s: %w", l.name, errNotRunning), "site lab up")
	}
	return l.podIn(space)
}

func (l *Lab) podIn(space *namespace) (*pod, error) {
	groups, err := readCgroups()
	if err != nil {
		return nil, err
	}
	allowed, err := readLimits()
	if err != nil {
		return nil, err
	}
	return &pod{lab: l, space: space, groups: groups, limits: allowed}, nil
}

// enter is find, after starting the lab's namespace and network if they are gone.
func (l *Lab) enter(ctx context.Context, current *state) (*pod, error) {
	found, err := l.find()
	if err == nil {
		return found, ensureBridge(ctx, l.bridge(), current.Subnet)
	}
	if !errors.Is(err, errNotRunning) {
		return nil, err
	}
	used, err := usedNetworks(ctx, l.bridge())
	if err != nil {
		return nil, err
	}
	if overlapsAny(current.Subnet, used) {
		return nil, plan.WithHint(fmt.Errorf("start lab %s: its network %s is now used by something else on this machine", l.name, current.Subnet),
			"take the lab down and up again: it chooses another network")
	}
	document, err := networkDocument(identity(l.dir), l.name, l.bridge(), current.Subnet)
	if err != nil {
		return nil, fmt.Errorf("describe lab network: %w", err)
	}
	if err := writeFile(l.path("podman", "networks", networkName+".json"), document, 0o644); err != nil {
		return nil, err
	}
	const settings = "[engine]\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"none\"\n[network]\nnetwork_backend = \"netavark\"\n"
	if err := writeFile(l.path("podman", "containers.conf"), []byte(settings), 0o644); err != nil {
		return nil, err
	}
	if err := ensureBridge(ctx, l.bridge(), current.Subnet); err != nil {
		return nil, err
	}
	groups, err := readCgroups()
	if err != nil {
		return nil, err
	}
	space, err := newNamespace(ctx, l.dir, l.path("holder.log"), groups)
	if err != nil {
		return nil, err
	}
	return l.podIn(space)
}

func (p *pod) podman(ctx context.Context, args ...string) ([]byte, error) {
	return p.podmanWith(ctx, nil, args...)
}

func (p *pod) podmanWith(ctx context.Context, environment []string, args ...string) ([]byte, error) {
	// On the namespace's own /run; podman takes no longer path than 50 characters.
	global := []string{"podman", "--root", "/run/lab/storage", "--runroot", "/run/lab/root", "--tmpdir", "/run/lab/tmp",
		"--network-config-dir", p.lab.path("podman", "networks"), "--storage-driver", "vfs"}
	environment = append([]string{"CONTAINERS_CONF=" + p.lab.path("podman", "containers.conf")}, environment...)
	return p.space.run(ctx, environment, append(global, args...)...)
}

type containerState int

const (
	absent containerState = iota
	stopped
	running
)

// list finds the lab's containers by their label.
func (p *pod) list(ctx context.Context) (map[string]containerState, error) {
	out, err := p.podman(ctx, "ps", "--all", "--filter", "label="+label+"="+p.lab.name, "--format", "json")
	if err != nil {
		return nil, fmt.Errorf("list containers: %w", err)
	}
	var containers []struct {
		Names []string
		State string
	}
	if err := json.Unmarshal(out, &containers); err != nil {
		return nil, fmt.Errorf("list containers: %w", err)
	}
	found := map[string]containerState{}
	for _, each := range containers {
		for _, name := range each.Names {
			found[name] = stopped
			if each.State == "running" {
				found[name] = running
			}
		}
	}
	return found, nil
}

// rootOf is where a host's file system is mounted, in the lab's namespace only.
func (l *Lab) rootOf(host *hostState) string { return l.path("hosts", host.Name, "root") }

func (l *Lab) disk(number int, elements ...string) string {
	return l.path(append([]string{"disks", strconv.Itoa(number)}, elements...)...)
}

// mountOptions are those of a host's overlay; its lowest layer is the shared base.
func (l *Lab) mountOptions(host *hostState) (string, error) {
	var lower []string
	for _, layer := range host.Layers {
		lower = append(lower, l.disk(layer, "upper"))
	}
	lower = append(lower, l.basePath(host.Base))
	options := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s,redirect_dir=on,index=off,metacopy=off",
		strings.Join(lower, ":"), l.disk(host.Disk, "upper"), l.disk(host.Disk, "work"))
	if len(options) > 4000 { // the kernel takes one page
		return "", plan.WithHint(fmt.Errorf("mount disk of %s: too many snapshots upon each other", host.Name), "reset the lab, or restore an older snapshot")
	}
	return options, nil
}

// startHost boots a host that does not run.
func (l *Lab) startHost(ctx context.Context, pod *pod, current *state, host *hostState, now containerState) error {
	if now == stopped {
		_, err := pod.podman(ctx, "start", host.Name)
		return err
	}
	// The marker is written last: a start that was cut off furnishes again.
	furnished := l.disk(host.Disk, "furnished")
	_, missing := os.Stat(furnished)
	bare := missing != nil && len(host.Layers) == 0
	for _, folder := range []string{l.disk(host.Disk, "upper"), l.disk(host.Disk, "work"), l.disk(host.Disk, "containers"), l.rootOf(host)} {
		if err := os.MkdirAll(folder, 0o755); err != nil {
			return fmt.Errorf("make disk of %s: %w", host.Name, err)
		}
	}
	if err := pod.mount(ctx, host); err != nil {
		return err
	}
	if err := l.furnish(pod, current, host, bare); err != nil {
		return err
	}
	if err := os.WriteFile(furnished, nil, 0o600); err != nil {
		return fmt.Errorf("furnish disk of %s: %w", host.Name, err)
	}
	_, err := pod.podman(ctx, runArguments(l, pod, host)...)
	return err
}

func (p *pod) mount(ctx context.Context, host *hostState) error {
	options, err := p.lab.mountOptions(host)
	if err != nil {
		return err
	}
	if err := p.unmount(ctx, host); err != nil {
		return err
	}
	if _, err := p.space.run(ctx, nil, "mount", "-t", "overlay", "overlay", "-o", options, p.lab.rootOf(host)); err != nil {
		return plan.WithHint(fmt.Errorf("mount disk of %s: %w", host.Name, err),
			"the lab's folder must lie on a file system that overlayfs can write to, such as ext4 or xfs: not in a container's own root")
	}
	return nil
}

func (p *pod) unmount(ctx context.Context, host *hostState) error {
	return retry.Until(ctx, "the disk of "+host.Name+" to be free", 10*time.Second, func(ctx context.Context) error {
		if _, err := p.space.run(ctx, nil, "mountpoint", "-q", p.lab.rootOf(host)); err != nil {
			return nil
		}
		_, err := p.space.run(ctx, nil, "umount", p.lab.rootOf(host))
		return err
	})
}

// runArguments are podman's for a host that boots.
func runArguments(l *Lab, p *pod, host *hostState) []string {
	args := []string{"run", "--detach", "--name", host.Name, "--hostname", host.Name, "--label", label + "=" + l.name,
		"--privileged", "--systemd=always", "--cgroup-parent", l.cgroupParent(), "--log-driver", "none",
		// A real host reboots when told to, also from inside.
		"--restart", "always",
		// The files in /etc are the host's own, as on any server.
		"--no-hosts", "--dns", "none",
		"--network", networkName, "--ip", host.Address.String(), "--mac-address", macOf(host.Address),
		// Containers on the host need a file system that is no overlay itself.
		"--volume", l.disk(host.Disk, "containers") + ":/var/lib/containers"}
	for _, limit := range p.limits.outer {
		args = append(args, "--ulimit", limit)
	}
	args = append(args, "--rootfs", l.rootOf(host), "/sbin/init")
	return append(args, p.groups.initArguments()...)
}

// furnish writes what makes a root file system this host. What a bare server
// has at the start is written to a bare disk only; the host key always, so that
// it fits known_hosts whatever snapshot is restored.
func (l *Lab) furnish(p *pod, current *state, host *hostState, bare bool) error {
	root := p.space.inside(l.rootOf(host))
	var failed []error
	put := func(path, content string, mode fs.FileMode) {
		failed = append(failed, writeFile(filepath.Join(root, path), []byte(content), mode))
	}
	for suffix, mode := range map[string]fs.FileMode{"": 0o600, ".pub": 0o644} {
		content, err := os.ReadFile(l.hostKey(host.Name) + suffix)
		failed = append(failed, err)
		put("etc/ssh/ssh_host_ed25519_key"+suffix, string(content), mode)
	}
	if bare {
		key, err := os.ReadFile(l.path("id.pub"))
		failed = append(failed, err, os.MkdirAll(filepath.Join(root, "root/.ssh"), 0o700), os.Chmod(filepath.Join(root, "root/.ssh"), 0o700))
		put("root/.ssh/authorized_keys", string(key), 0o600)
		put("etc/hostname", host.Name+"\n", 0o644)
		put("etc/hosts", l.renderHosts(current), 0o644)
		put("etc/resolv.conf", "# A lab host has no name server: see /etc/hosts.\n", 0o644)
		put("etc/containers/containers.conf", renderContainersConf(p.limits), 0o644)
	}
	if err := errors.Join(failed...); err != nil {
		return fmt.Errorf("furnish disk of %s: %w", host.Name, err)
	}
	return nil
}

// renderHosts also names hosts that may be added later.
func (l *Lab) renderHosts(current *state) string {
	var out strings.Builder
	out.WriteString("127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n")
	for number := range maxHosts {
		fmt.Fprintf(&out, "%s %s-%d\n", addressOf(current.Subnet, firstHostNumber+number), l.name, number+1)
	}
	fmt.Fprintf(&out, "%s %s\n", addressOf(current.Subnet, storeNumber), l.storeName())
	return out.String()
}

// renderContainersConf holds for containers on the host; only a lab needs it.
func renderContainersConf(allowed limits) string {
	out := "# Written by the lab: a host in a container needs these, a real one does not.\n"
	if len(allowed.inner) > 0 {
		out += fmt.Sprintf("[containers]\ndefault_ulimits = [\"%s\"]\n", strings.Join(allowed.inner, `", "`))
	}
	return out + "[engine]\ncgroup_manager = \"cgroupfs\"\n"
}

const bootLimit = 60 * time.Second

// ready waits until the host has booted, can be logged in to and is cut off
// from everything but the lab.
func (p *pod) ready(ctx context.Context, host *hostState) error {
	err := retry.Until(ctx, host.Name+" to boot", bootLimit, func(ctx context.Context) error {
		out, err := p.podman(ctx, "exec", host.Name, "systemctl", "is-system-running", "--wait")
		switch state := strings.TrimSpace(string(out)); state {
		case "running", "degraded":
			return nil
		case "":
			return err
		default:
			return fmt.Errorf("systemd is %s", state)
		}
	})
	if err != nil {
		return err
	}
	err = retry.Until(ctx, "ssh on "+host.Name, bootLimit, func(ctx context.Context) error { return greets(ctx, host.Address.String()+":22") })
	if err != nil {
		return err
	}
	return p.isolated(ctx, host)
}

// greets reads the first line of an ssh server.
func greets(ctx context.Context, address string) error {
	dialer := net.Dialer{Timeout: 2 * time.Second}
	conn, err := dialer.DialContext(ctx, "tcp", address)
	if err != nil {
		return err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
	line, err := bufio.NewReader(conn).ReadString('\n')
	if err != nil {
		return err
	}
	if !strings.HasPrefix(line, "SSH-2.0-") {
		return fmt.Errorf("%s is no ssh server", address)
	}
	return nil
}

// isolated proves that a host has routes to the lab's network only.
func (p *pod) isolated(ctx context.Context, host *hostState) error {
	for _, family := range []string{"-4", "-6"} {
		out, err := p.podman(ctx, "exec", host.Name, "ip", family, "route", "show", "default")
		if err != nil {
			return fmt.Errorf("list routes of %s: %w", host.Name, err)
		}
		if route := strings.TrimSpace(string(out)); route != "" {
			return fmt.Errorf("%s is not cut off from the world: it has the route %q", host.Name, route)
		}
	}
	return nil
}

func waitForPort(ctx context.Context, what, address string) error {
	return retry.Until(ctx, what, bootLimit, func(ctx context.Context) error {
		dialer := net.Dialer{Timeout: 2 * time.Second}
		conn, err := dialer.DialContext(ctx, "tcp", address)
		if err != nil {
			return err
		}
		return conn.Close()
	})
}
