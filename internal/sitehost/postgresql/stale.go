package postgresql

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/retry"
)

// lock takes the cluster for this process and what it becomes. The server's own
// guard, a process id in a file, cannot do that for containers: the server is
// process 1 in each of them, and takes the other's file for its own.
func (c Cluster) lock(ctx context.Context) error {
	path := c.Data + ".lock"
	// Without close-on-exec, which os.OpenFile would set.
	descriptor, err := unix.Open(path, unix.O_RDWR|unix.O_CREAT|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return fmt.Errorf("lock the cluster: %w", &fs.PathError{Op: "open", Path: path, Err: err})
	}
	said := false
	err = retry.Until(ctx, "the server that still runs on "+c.Data, lockLimit, func(context.Context) error {
		err := unix.Flock(descriptor, unix.LOCK_EX|unix.LOCK_NB)
		if errors.Is(err, unix.EWOULDBLOCK) {
			if !said {
				said = true
				_, _ = fmt.Fprintf(c.Errors, "another server still runs on %s; waiting for its end\n", c.Data)
			}
			return errors.New("it holds " + path)
		}
		if err != nil {
			return retry.Permanent(err)
		}
		return nil
	})
	if err != nil {
		_ = unix.Close(descriptor)
		return plan.WithHint(fmt.Errorf("lock the cluster: %w", err), "does another container run on the same folder?")
	}
	return nil
}

// removeStale removes lock files that would keep the server from starting,
// although the server that wrote them is gone. The server copes by itself with
// an id that nobody has, and with its own one; not with an id that another
// program got since, nor with a file that a power cut left empty.
func (c Cluster) removeStale() error {
	files := []string{filepath.Join(c.Data, "postmaster.pid")}
	sockets, err := filepath.Glob(filepath.Join(c.Sockets, ".s.PGSQL.*.lock"))
	if err != nil {
		return fmt.Errorf("look for lock files: %w", err)
	}
	for _, path := range append(files, sockets...) {
		stale, err := c.stale(path)
		if err != nil {
			return fmt.Errorf("look at lock file %s: %w", path, err)
		}
		if !stale {
			continue
		}
		_, _ = fmt.Fprintf(c.Errors, "removing %s: the server that wrote it is gone\n", path)
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove stale lock file: %w", err)
		}
	}
	return nil
}

// stale is true only where it is proven: nobody of this container is the
// server that the file tells of. We hold the cluster's lock, so nobody of
// another one is.
func (c Cluster) stale(path string) (bool, error) {
	content, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	lines := strings.Split(string(content), "\n")
	process, err := strconv.Atoi(strings.TrimSpace(lines[0]))
	// A standalone backend writes its id negated.
	process = max(process, -process)
	unreadable := err != nil || process == 0
	switch {
	case !unreadable && process == os.Getpid():
		return false, nil // the server takes it for its own
	case !unreadable && len(lines) > 1 && lines[1] != c.Data:
		return false, nil // of another cluster
	case !unreadable && !alive(process):
		return false, nil // the server sees that too, and looks for orphans
	}
	running, err := c.running()
	return !running, err
}

func alive(process int) bool {
	err := unix.Kill(process, 0)
	return err == nil || errors.Is(err, unix.EPERM)
}

// running reports whether any process that we can see works in the cluster's
// folder, as the server and all its children do.
func (c Cluster) running() (bool, error) {
	data, err := filepath.EvalSymlinks(c.Data)
	if err != nil {
		return false, err
	}
	links, err := filepath.Glob("/proc/[0-9]*/cwd")
	if err != nil || len(links) == 0 {
		return true, err // without /proc nothing is proven
	}
	for _, link := range links {
		// What belongs to another user cannot be looked at, and cannot be our server.
		if folder, err := os.Readlink(link); err == nil && folder == data && filepath.Dir(link) != fmt.Sprintf("/proc/%d", os.Getpid()) {
			return true, nil
		}
	}
	return false, nil
}
