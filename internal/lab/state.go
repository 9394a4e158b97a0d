package lab

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
	"time"

	"github.com/nomad-site/site/internal/retry"
)

// state is what a lab keeps between commands. What runs is never recorded: it
// is looked up.
type state struct {
	Subnet    netip.Prefix         `json:"subnet"`
	Hosts     []*hostState         `json:"hosts"`
	Snapshots map[string]*snapshot `json:"snapshots"`
	// NextDisk is the number of the next folder under disks/.
	NextDisk int `json:"next_disk"`
	// Versitygw is the object store's program, empty without a store.
	Versitygw string `json:"versitygw,omitempty"`
}

// hostState is one host and its current disk.
type hostState struct {
	Name    string     `json:"name"`
	Address netip.Addr `json:"address"`
	// Disk is the folder that the host writes to.
	Disk int `json:"disk"`
	stack
}

// stack is what lies below a host's writable layer.
type stack struct {
	// Base is the key of the cached root file system.
	Base string `json:"base"`
	// Layers are frozen disks, the newest first.
	Layers []int `json:"layers,omitempty"`
}

// snapshot is one frozen state of all hosts.
type snapshot struct {
	Taken time.Time         `json:"taken"`
	Hosts map[string]*stack `json:"hosts"`
	// Copies is the folder with each host's containers, under snapshots/.
	Copies string `json:"copies"`
}

// usedDisks are all folders under disks/ that something still needs.
func (s *state) usedDisks() map[int]bool {
	used := map[int]bool{}
	for _, host := range s.Hosts {
		used[host.Disk] = true
		for _, layer := range host.Layers {
			used[layer] = true
		}
	}
	for _, each := range s.Snapshots {
		for _, host := range each.Hosts {
			for _, layer := range host.Layers {
				used[layer] = true
			}
		}
	}
	return used
}

func (s *state) host(name string) (*hostState, error) {
	for _, host := range s.Hosts {
		if host.Name == name {
			return host, nil
		}
	}
	return nil, fmt.Errorf("the lab has no host %q", name)
}

func (s *state) newDisk() int {
	s.NextDisk++
	return s.NextDisk
}

// errNoLab is a lab that was never started, or was taken down.
var errNoLab = errors.New("the lab is not up")

func (l *Lab) load() (*state, error) {
	content, err := os.ReadFile(l.path("state.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errNoLab
	}
	if err != nil {
		return nil, fmt.Errorf("read lab %s: %w", l.name, err)
	}
	found := &state{Snapshots: map[string]*snapshot{}}
	if err := json.Unmarshal(content, found); err != nil {
		return nil, fmt.Errorf("read lab %s: %w", l.name, err)
	}
	return found, nil
}

func (l *Lab) save(current *state) error {
	content, err := json.MarshalIndent(current, "", "  ")
	if err != nil {
		return fmt.Errorf("write lab %s: %w", l.name, err)
	}
	return writeFile(l.path("state.json"), append(content, '\n'), 0o600)
}

// lock keeps two commands from changing the lab at once. The file lies beside
// the lab's folder, since Down removes that.
func (l *Lab) lock(ctx context.Context) (unlock func(), err error) {
	if err := os.MkdirAll(filepath.Dir(l.dir), 0o755); err != nil {
		return nil, fmt.Errorf("lock lab %s: %w", l.name, err)
	}
	return lockFile(ctx, l.dir+".lock", "another command to finish with lab "+l.name)
}

func lockFile(ctx context.Context, path, what string) (func(), error) {
	var file *os.File
	err := retry.Until(ctx, what, 30*time.Minute, func(context.Context) error {
		opened, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			return retry.Permanent(fmt.Errorf("lock: %w", err))
		}
		if err := syscall.Flock(int(opened.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
			_ = opened.Close()
			if !errors.Is(err, syscall.EWOULDBLOCK) && !errors.Is(err, syscall.EINTR) {
				return retry.Permanent(fmt.Errorf("lock %s: %w", path, err))
			}
			return err
		}
		// Whoever held it may have removed it meanwhile: then this one guards nothing.
		ours, errOurs := opened.Stat()
		there, errThere := os.Stat(path)
		if errOurs != nil || errThere != nil || !os.SameFile(ours, there) {
			_ = opened.Close()
			return errors.New("the lock was removed")
		}
		file = opened
		return nil
	})
	if err != nil {
		return nil, err
	}
	return func() { _ = file.Close() }, nil
}

// identity is short and the same for the same folder: it names what the lab
// has outside of it, such as its bridge.
func identity(dir string) string {
	sum := sha256.Sum256([]byte(dir))
	return hex.EncodeToString(sum[:4])
}

// unusedDisks are the folders under disks/ that nothing needs.
func (l *Lab) unusedDisks(current *state) ([]string, error) {
	entries, err := os.ReadDir(l.path("disks"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list disks: %w", err)
	}
	used := current.usedDisks()
	var unused []string
	for _, entry := range entries {
		number, err := strconv.Atoi(entry.Name())
		if err != nil || !used[number] {
			unused = append(unused, l.path("disks", entry.Name()))
		}
	}
	copies := map[string]bool{}
	for _, each := range current.Snapshots {
		copies[each.Copies] = true
	}
	entries, err = os.ReadDir(l.path("snapshots"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list snapshots: %w", err)
	}
	for _, entry := range entries {
		if !copies[entry.Name()] {
			unused = append(unused, l.path("snapshots", entry.Name()))
		}
	}
	slices.Sort(unused)
	return unused, nil
}

// sweep removes what nothing needs any more.
func (l *Lab) sweep(current *state) error {
	unused, err := l.unusedDisks(current)
	if err != nil {
		return err
	}
	var failed []error
	for _, path := range unused {
		failed = append(failed, os.RemoveAll(path))
	}
	return errors.Join(failed...)
}
