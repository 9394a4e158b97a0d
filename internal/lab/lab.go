// Package lab runs a site's hosts on one machine: real Debian systems, booted
// by their own systemd in podman containers and reached by ssh only, with an
// object store beside them.
package lab

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/nomad-site/site/internal/plan"
)

// Lab is one lab; several can be up side by side.
type Lab struct {
	name string
	// dir is <workDir>/.lab/<name>, absolute.
	dir   string
	cache string
}

// Options say what Up brings up.
type Options struct {
	// Hosts is how many hosts there are to be; 0 means 1, or those there are already.
	Hosts int
	// Progress receives one line at a time; nil for none.
	Progress func(string)
	// Versitygw is the path of the object store's static binary; without it no
	// store is started, but one that the lab has already is kept.
	Versitygw string
	// Mirror is where the host image is built from; empty: what apt uses here.
	Mirror string
}

// label marks every container and network of a lab, with its name as value.
const label = "site.lab"

var validName = regexp.MustCompile(`^[a-z][a-z0-9-]{0,19}$`)

// Open names the lab; it need not exist.
func Open(workDir, name string) (*Lab, error) {
	if !validName.MatchString(name) {
		return nil, plan.WithHint(fmt.Errorf("open lab %q: not a name for a lab", name), "use up to 20 lower case letters, digits and dashes, starting with a letter")
	}
	dir, err := filepath.Abs(filepath.Join(workDir, ".lab", name))
	if err != nil {
		return nil, fmt.Errorf("open lab %s: %w", name, err)
	}
	// They separate the options of mount and of podman.
	if strings.ContainsAny(dir, ":,\\\n\"") {
		return nil, plan.WithHint(fmt.Errorf("open lab %s: a lab cannot lie in %q", name, dir), "use a folder without colons, commas, quotes and backslashes in its path")
	}
	cache, err := cacheDir()
	if err != nil {
		return nil, err
	}
	for _, folder := range []string{dir, cache} {
		// The lab has a /run and a /dev/shm of its own.
		if strings.HasPrefix(folder, "/run/") || strings.HasPrefix(folder, "/dev/") {
			return nil, plan.WithHint(fmt.Errorf("open lab %s: a lab cannot use %q", name, folder), "use a folder on a disk")
		}
	}
	return &Lab{name: name, dir: dir, cache: cache}, nil
}

// List names the labs of workDir, up or not.
func List(workDir string) ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(workDir, ".lab"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list labs: %w", err)
	}
	var names []string
	for _, entry := range entries {
		if _, err := os.Stat(filepath.Join(workDir, ".lab", entry.Name(), "state.json")); err == nil {
			names = append(names, entry.Name())
		}
	}
	return names, nil
}

// Name is the lab's name.
func (l *Lab) Name() string { return l.name }

// Dir is the folder with the lab's state.
func (l *Lab) Dir() string { return l.dir }

// SSHConfig is the path of the file that `ssh -F` takes.
func (l *Lab) SSHConfig() string { return l.path("ssh_config") }

// SSHCommand is how a host is logged in to, as program and arguments.
func (l *Lab) SSHCommand(host string) []string {
	return []string{"ssh", "-F", l.SSHConfig(), host}
}

func (l *Lab) path(elements ...string) string {
	return filepath.Join(append([]string{l.dir}, elements...)...)
}

// bridge is at most 15 characters, with the letter for its anchor.
func (l *Lab) bridge() string { return "site" + identity(l.dir) }

// cgroupParent holds the lab's control groups, so that Down can find them.
func (l *Lab) cgroupParent() string { return "/site-lab-" + identity(l.dir) }

// Up brings the lab up: it makes what is missing, starts what does not run and
// waits until every host can be logged in to. Hosts keep their disks.
func (l *Lab) Up(ctx context.Context, options Options) error {
	if err := checkMachine(); err != nil {
		return err
	}
	if options.Hosts > maxHosts {
		return fmt.Errorf("start lab %s: %d hosts are more than the %d that a lab can have", l.name, options.Hosts, maxHosts)
	}
	unlock, err := l.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	progress := options.Progress
	if progress == nil {
		progress = func(string) {}
	}
	current, err := l.load()
	if errors.Is(err, errNoLab) {
		current, err = l.create(ctx)
	}
	if err != nil {
		return err
	}
	if err := l.addHosts(ctx, current, options, progress); err != nil {
		return err
	}
	if options.Versitygw != "" {
		if current.Versitygw, err = filepath.Abs(options.Versitygw); err != nil {
			return fmt.Errorf("start lab %s: %w", l.name, err)
		}
		if err := l.save(current); err != nil {
			return err
		}
	}
	if err := l.writeClientFiles(current); err != nil {
		return err
	}
	return l.boot(ctx, current, progress)
}

// create makes the state of a new lab.
func (l *Lab) create(ctx context.Context) (*state, error) {
	used, err := usedNetworks(ctx, l.bridge())
	if err != nil {
		return nil, err
	}
	subnet, err := chooseSubnet(l.dir, used)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(l.dir, 0o755); err != nil {
		return nil, fmt.Errorf("make lab %s: %w", l.name, err)
	}
	current := &state{Subnet: subnet, Snapshots: map[string]*snapshot{}}
	return current, l.save(current)
}

func (l *Lab) addHosts(ctx context.Context, current *state, options Options, progress func(string)) error {
	wanted := max(options.Hosts, len(current.Hosts), 1)
	if wanted == len(current.Hosts) {
		for _, host := range current.Hosts {
			if _, err := os.Stat(l.basePath(host.Base)); err != nil {
				return plan.WithHint(fmt.Errorf("start host %s: its root file system is gone from the cache: %w", host.Name, err),
					"reset the lab, or take it down and up again")
			}
		}
		return nil
	}
	base, err := l.ensureBase(ctx, options.Mirror, progress)
	if err != nil {
		return err
	}
	for len(current.Hosts) < wanted {
		number := len(current.Hosts) + 1
		host := &hostState{
			Name:    fmt.Sprintf("%s-%d", l.name, number),
			Address: addressOf(current.Subnet, firstHostNumber+number-1),
			Disk:    current.newDisk(),
			stack:   stack{Base: base},
		}
		if err := ensureKey(l.hostKey(host.Name), host.Name, false); err != nil {
			return err
		}
		current.Hosts = append(current.Hosts, host)
	}
	return l.save(current)
}

func (l *Lab) hostKey(host string) string { return l.path("hosts", host, "ssh_host_ed25519_key") }

// writeClientFiles writes what an ssh client needs.
func (l *Lab) writeClientFiles(current *state) error {
	if err := ensureKey(l.path("id"), "lab-"+l.name, false); err != nil {
		return err
	}
	var hosts []sshHost
	for _, host := range current.Hosts {
		public, err := os.ReadFile(l.hostKey(host.Name) + ".pub")
		if err != nil {
			return fmt.Errorf("read host key of %s: %w", host.Name, err)
		}
		hosts = append(hosts, sshHost{name: host.Name, address: host.Address.String(), publicKey: string(public)})
	}
	if err := writeFile(l.path("known_hosts"), []byte(renderKnownHosts(hosts)), 0o644); err != nil {
		return err
	}
	return writeFile(l.SSHConfig(), []byte(renderSSHConfig(l.dir, hosts)), 0o644)
}

// boot starts whatever of the lab does not run and waits for it.
func (l *Lab) boot(ctx context.Context, current *state, progress func(string)) error {
	pod, err := l.enter(ctx, current)
	if err != nil {
		return err
	}
	containers, err := pod.list(ctx)
	if err != nil {
		return err
	}
	group, groupCtx := errgroup.WithContext(ctx)
	// One podman command at a time: they wait for each other's locks anyway.
	for _, host := range current.Hosts {
		if containers[host.Name] == running {
			continue
		}
		progress("booting " + host.Name)
		if err := l.startHost(ctx, pod, current, host, containers[host.Name]); err != nil {
			_ = group.Wait()
			return fmt.Errorf("boot %s: %w", host.Name, err)
		}
		group.Go(func() error { return pod.ready(groupCtx, host) })
	}
	if current.Versitygw != "" && containers[l.storeName()] != running {
		progress("starting the object store")
		if err := l.startStore(ctx, pod, current, containers[l.storeName()]); err != nil {
			_ = group.Wait()
			return fmt.Errorf("start object store: %w", err)
		}
		group.Go(func() error { return waitForPort(groupCtx, "the object store", l.storeAddress(current)) })
	}
	group.Go(func() error { return l.sweep(current) })
	return group.Wait()
}

// Down ends everything of the lab and removes its state. It needs none of that
// state, so it also clears up what was killed or half removed.
func (l *Lab) Down(ctx context.Context) error {
	if found := Check(); len(found) > 0 && os.Geteuid() != 0 {
		return checkMachine()
	}
	unlock, err := l.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	space, err := findNamespace(l.dir)
	if err != nil {
		return err
	}
	if space != nil {
		if err := space.end(ctx); err != nil {
			return fmt.Errorf("end lab %s: %w", l.name, err)
		}
	}
	if err := removeBridge(ctx, l.bridge()); err != nil {
		return fmt.Errorf("end lab %s: %w", l.name, err)
	}
	if err := removeCgroups(ctx, l.cgroupParent()); err != nil {
		return fmt.Errorf("end lab %s: %w", l.name, err)
	}
	if err := os.RemoveAll(l.dir); err != nil {
		return fmt.Errorf("remove lab %s: %w", l.name, err)
	}
	// Last, and while it is held: who waits for it sees that it is gone.
	return os.Remove(l.dir + ".lock")
}

// Status is what is there of a lab.
type Status struct {
	Name string `json:"name"`
	// Exists: there is state. Up: its processes are there.
	Exists    bool             `json:"exists"`
	Up        bool             `json:"up"`
	Network   string           `json:"network,omitempty"`
	SSHConfig string           `json:"ssh_config,omitempty"`
	Hosts     []HostStatus     `json:"hosts,omitempty"`
	Snapshots []SnapshotStatus `json:"snapshots,omitempty"`
	Store     *StoreStatus     `json:"store,omitempty"`
}

// HostStatus is one host; it is logged in to as root at Address and Port.
type HostStatus struct {
	Name    string `json:"name"`
	Address string `json:"address"`
	Port    int    `json:"port"`
	Running bool   `json:"running"`
}

// SnapshotStatus is one snapshot.
type SnapshotStatus struct {
	Name  string    `json:"name"`
	Taken time.Time `json:"taken"`
	Hosts []string  `json:"hosts"`
}

// Status looks; it starts and changes nothing.
func (l *Lab) Status(ctx context.Context) (Status, error) {
	found := Status{Name: l.name}
	current, err := l.load()
	if errors.Is(err, errNoLab) {
		return found, nil
	}
	if err != nil {
		return found, err
	}
	found.Exists = true
	found.Network = current.Subnet.String()
	found.SSHConfig = l.SSHConfig()
	pod, err := l.find()
	if err != nil && !errors.Is(err, errNotRunning) {
		return found, err
	}
	containers := map[string]containerState{}
	if err == nil {
		found.Up = true
		if containers, err = pod.list(ctx); err != nil {
			return found, err
		}
	}
	for _, host := range current.Hosts {
		up := containers[host.Name] == running
		found.Hosts = append(found.Hosts, HostStatus{Name: host.Name, Address: host.Address.String(), Port: 22, Running: up})
		found.Up = found.Up && up
	}
	for name, each := range current.Snapshots {
		status := SnapshotStatus{Name: name, Taken: each.Taken}
		for host := range each.Hosts {
			status.Hosts = append(status.Hosts, host)
		}
		slices.Sort(status.Hosts)
		found.Snapshots = append(found.Snapshots, status)
	}
	slices.SortFunc(found.Snapshots, func(a, b SnapshotStatus) int { return a.Taken.Compare(b.Taken) })
	if current.Versitygw != "" {
		found.Store = &StoreStatus{
			Endpoint:    "http://" + l.storeAddress(current),
			Credentials: l.storeFile(),
			Running:     containers[l.storeName()] == running,
		}
	}
	return found, nil
}
