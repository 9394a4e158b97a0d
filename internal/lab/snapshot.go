package lab

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/nomad-site/site/internal/plan"
)

// A snapshot freezes what each host has written so far: its writable layer
// becomes one more layer to read from, and the host goes on with an empty one.
// Nothing is copied but /var/lib/containers, which cannot be in layers.

// HasSnapshot reports whether the lab has a snapshot of that name.
func (l *Lab) HasSnapshot(name string) (bool, error) {
	current, err := l.load()
	if errors.Is(err, errNoLab) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return current.Snapshots[name] != nil, nil
}

// Snapshot shuts all hosts down, freezes their disks under the name, replacing
// a snapshot of that name, and boots them again. The object store is not in it.
func (l *Lab) Snapshot(ctx context.Context, name string) error {
	if !validName.MatchString(name) {
		return plan.WithHint(fmt.Errorf("take snapshot %q: not a name for a snapshot", name), "use up to 20 lower case letters, digits and dashes, starting with a letter")
	}
	unlock, err := l.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	current, err := l.load()
	if err != nil {
		return fmt.Errorf("take snapshot %s: %w", name, err)
	}
	pod, err := l.find()
	if err != nil {
		return fmt.Errorf("take snapshot %s: %w", name, err)
	}
	if err := l.sweep(current); err != nil { // what a snapshot that was cut off left
		return fmt.Errorf("take snapshot %s: %w", name, err)
	}
	taken := &snapshot{Taken: time.Now().UTC(), Hosts: map[string]*stack{}, Copies: strconv.Itoa(current.newDisk())}
	if err := each(ctx, current.Hosts, func(ctx context.Context, host *hostState) error {
		if err := pod.shutDown(ctx, host); err != nil {
			return err
		}
		if err := pod.remove(ctx, host); err != nil {
			return err
		}
		return copyTree(ctx, l.disk(host.Disk, "containers"), l.path("snapshots", taken.Copies, host.Name))
	}); err != nil {
		return fmt.Errorf("take snapshot %s: %w", name, err)
	}
	for _, host := range current.Hosts {
		old := host.Disk
		host.Layers = append([]int{old}, host.Layers...)
		host.Disk = current.newDisk()
		taken.Hosts[host.Name] = &stack{Base: host.Base, Layers: slices.Clone(host.Layers)}
		if err := os.MkdirAll(l.disk(host.Disk), 0o755); err != nil {
			return fmt.Errorf("take snapshot %s: %w", name, err)
		}
		if err := copyTree(ctx, l.path("snapshots", taken.Copies, host.Name), l.disk(host.Disk, "containers")); err != nil {
			return fmt.Errorf("take snapshot %s: %w", name, err)
		}
	}
	current.Snapshots[name] = taken
	// Until here a cut-off command leaves the old state, whose disks are whole.
	if err := l.save(current); err != nil {
		return err
	}
	return l.boot(ctx, current, func(string) {})
}

// Restore puts all hosts back to what they were at the snapshot and waits until
// they can be logged in to. Hosts that were added later become bare.
func (l *Lab) Restore(ctx context.Context, name string) error {
	return l.rewind(ctx, func(current *state) (*snapshot, error) {
		if found := current.Snapshots[name]; found != nil {
			return found, nil
		}
		names := slices.Sorted(maps.Keys(current.Snapshots))
		return nil, plan.WithHint(fmt.Errorf("restore snapshot %q: there is none of that name", name), "snapshots: %s", strings.Join(names, ", "))
	})
}

// Reset puts all hosts back to bare and waits until they can be logged in to.
// Snapshots, keys, addresses and the object store are kept.
func (l *Lab) Reset(ctx context.Context) error {
	return l.rewind(ctx, func(*state) (*snapshot, error) { return &snapshot{}, nil })
}

func (l *Lab) rewind(ctx context.Context, choose func(*state) (*snapshot, error)) error {
	unlock, err := l.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	current, err := l.load()
	if err != nil {
		return err
	}
	target, err := choose(current)
	if err != nil {
		return err
	}
	base := ""
	for _, host := range current.Hosts {
		if target.Hosts[host.Name] == nil {
			if base, err = l.ensureBase(ctx, "", func(string) {}); err != nil {
				return err
			}
		}
	}
	pod, err := l.enter(ctx, current)
	if err != nil {
		return err
	}
	if err := l.sweep(current); err != nil { // what a restore that was cut off left
		return fmt.Errorf("rewind lab %s: %w", l.name, err)
	}
	for _, host := range current.Hosts {
		host.Disk = current.newDisk()
		host.stack = stack{Base: base}
		if frozen := target.Hosts[host.Name]; frozen != nil {
			host.stack = stack{Base: frozen.Base, Layers: slices.Clone(frozen.Layers)}
		}
	}
	if err := each(ctx, current.Hosts, func(ctx context.Context, host *hostState) error {
		if err := pod.remove(ctx, host); err != nil {
			return err
		}
		if target.Hosts[host.Name] == nil {
			return nil
		}
		if err := os.MkdirAll(l.disk(host.Disk), 0o755); err != nil {
			return fmt.Errorf("make disk of %s: %w", host.Name, err)
		}
		return copyTree(ctx, l.path("snapshots", target.Copies, host.Name), l.disk(host.Disk, "containers"))
	}); err != nil {
		return fmt.Errorf("rewind lab %s: %w", l.name, err)
	}
	if err := l.save(current); err != nil {
		return err
	}
	return l.boot(ctx, current, func(string) {})
}

// each runs do for all hosts at once.
func each(ctx context.Context, hosts []*hostState, do func(context.Context, *hostState) error) error {
	group, ctx := errgroup.WithContext(ctx)
	for _, host := range hosts {
		group.Go(func() error { return do(ctx, host) })
	}
	return group.Wait()
}

// copyTree copies a folder with owners, modes, links and extended attributes,
// sharing the bytes where the file system can.
func copyTree(ctx context.Context, from, to string) error {
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return fmt.Errorf("copy %s: %w", from, err)
	}
	out, err := exec.CommandContext(ctx, "cp", "--archive", "--reflink=auto", "--no-target-directory", from, to).CombinedOutput()
	if err != nil {
		return fmt.Errorf("copy %s: %w: %s", from, err, strings.TrimSpace(string(out)))
	}
	return nil
}
