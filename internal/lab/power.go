package lab

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/nomad-site/site/internal/retry"
)

// shutdownLimit is how long a host may take to shut down in good order.
const shutdownLimit = 20 * time.Second

// withHost runs do for one host of a running lab, under the lab's lock.
func (l *Lab) withHost(ctx context.Context, name string, do func(*pod, *state, *hostState) error) error {
	unlock, err := l.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	pod, current, host, err := l.lookUp(name)
	if err != nil {
		return err
	}
	return do(pod, current, host)
}

func (l *Lab) lookUp(name string) (*pod, *state, *hostState, error) {
	current, err := l.load()
	if err != nil {
		return nil, nil, nil, err
	}
	host, err := current.host(name)
	if err != nil {
		return nil, nil, nil, err
	}
	pod, err := l.find()
	return pod, current, host, err
}

// Reboot shuts the host down in good order and boots it again; it returns when
// the host can be logged in to. Disks are kept, /run and /tmp are empty.
func (l *Lab) Reboot(ctx context.Context, name string) error {
	return l.withHost(ctx, name, func(pod *pod, _ *state, host *hostState) error {
		if err := pod.shutDown(ctx, host); err != nil {
			return fmt.Errorf("reboot %s: %w", name, err)
		}
		if _, err := pod.podman(ctx, "start", name); err != nil {
			return fmt.Errorf("reboot %s: %w", name, err)
		}
		return pod.ready(ctx, host)
	})
}

// Kill cuts the host's power; Start brings it back.
func (l *Lab) Kill(ctx context.Context, name string) error {
	return l.withHost(ctx, name, func(pod *pod, _ *state, host *hostState) error {
		if err := pod.cut(ctx, host); err != nil {
			return fmt.Errorf("kill %s: %w", name, err)
		}
		return nil
	})
}

// Start boots a host that is off and waits until it can be logged in to.
func (l *Lab) Start(ctx context.Context, name string) error {
	return l.withHost(ctx, name, func(pod *pod, current *state, host *hostState) error {
		containers, err := pod.list(ctx)
		if err != nil {
			return fmt.Errorf("start %s: %w", name, err)
		}
		if containers[name] != running {
			if err := l.startHost(ctx, pod, current, host, containers[name]); err != nil {
				return fmt.Errorf("start %s: %w", name, err)
			}
		}
		return pod.ready(ctx, host)
	})
}

// Exec runs a command on the host without ssh, for tests that look behind the
// product's back, and returns its standard output.
func (l *Lab) Exec(ctx context.Context, host string, args ...string) ([]byte, error) {
	pod, _, _, err := l.lookUp(host)
	if err != nil {
		return nil, err
	}
	return pod.podman(ctx, append([]string{"exec", host}, args...)...)
}

// NewHostKey gives the host another ssh key, as if somebody had put another
// machine in its place. known_hosts keeps the old one until the next Up.
func (l *Lab) NewHostKey(ctx context.Context, name string) error {
	return l.withHost(ctx, name, func(pod *pod, current *state, host *hostState) error {
		if err := ensureKey(l.hostKey(name), name, true); err != nil {
			return err
		}
		if err := l.furnish(pod, current, host, false); err != nil {
			return err
		}
		if _, err := pod.podman(ctx, "exec", name, "systemctl", "restart", "ssh"); err != nil {
			return fmt.Errorf("restart ssh on %s: %w", name, err)
		}
		return pod.ready(ctx, host)
	})
}

// shutDown stops a host the way its own systemd does.
func (p *pod) shutDown(ctx context.Context, host *hostState) error {
	_, err := p.podman(ctx, "stop", "--ignore", "--time", strconv.Itoa(int(shutdownLimit.Seconds())), host.Name)
	return err
}

// cut stops a host at once.
func (p *pod) cut(ctx context.Context, host *hostState) error {
	_, err := p.podman(ctx, "stop", "--ignore", "--time", "0", host.Name)
	return err
}

// remove takes a host's container away and frees its disk.
func (p *pod) remove(ctx context.Context, host *hostState) error {
	if _, err := p.podman(ctx, "rm", "--force", "--ignore", "--time", "0", host.Name); err != nil {
		return err
	}
	return p.unmount(ctx, host)
}

// removeCgroups removes the empty groups that killed hosts leave.
func removeCgroups(ctx context.Context, parent string) error {
	groups, err := readCgroups()
	if err != nil {
		return err
	}
	for _, root := range groups.roots {
		top := filepath.Join(root, parent)
		err := retry.Until(ctx, "control groups to be empty", 10*time.Second, func(context.Context) error { return removeTree(top) })
		if err != nil {
			return fmt.Errorf("remove control groups: %w", err)
		}
	}
	if groups.legacy {
		// A host's podman makes its groups at the top of systemd's hierarchy,
		// which is not split by container. Only empty groups can be removed, so
		// those of anything that runs are safe.
		stray, _ := filepath.Glob("/sys/fs/cgroup/systemd/libpod_parent/*")
		for _, path := range stray {
			_ = removeTree(path)
		}
		_ = os.Remove("/sys/fs/cgroup/systemd/libpod_parent")
	}
	return nil
}

// removeTree removes folders only: the files of a control group go with it.
func removeTree(path string) error {
	entries, err := os.ReadDir(path)
	if os.IsNotExist(err) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, entry := range entries {
		if entry.IsDir() {
			if err := removeTree(filepath.Join(path, entry.Name())); err != nil {
				return err
			}
		}
	}
	if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
		return err
	}
	return nil
}
