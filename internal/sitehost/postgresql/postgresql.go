// Package postgresql is the first process of the database's container: it makes
// the cluster once and then becomes the server, which so gets all signals itself.
package postgresql

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/sitehost/atomicfile"
)

const (
	// stopGrace is how long initdb may take to go when we are told to.
	stopGrace = 5 * time.Second
	// stoppedPoll is how often the stopped file is looked for.
	stoppedPoll = time.Second
	// lockLimit is how long the server before us may take to go.
	lockLimit = 2 * time.Minute
)

// Cluster is a database cluster on this machine.
type Cluster struct {
	// Data is the cluster's folder. It is made beside itself, as Data.new.
	Data string
	// Programs is the folder of postgres and initdb.
	Programs string
	// Superuser is the one of a new cluster.
	Superuser string
	// Sockets is where the server puts its Unix sockets.
	Sockets string
	// StoppedFile keeps the server down while it is there; empty: none does.
	StoppedFile string
	// Output and Errors are what initdb writes to; the server inherits the process's own.
	Output, Errors io.Writer
}

// ForeignDataError says that the folder holds something that is no cluster.
type ForeignDataError struct {
	Path  string
	Found []string
}

func (e *ForeignDataError) Error() string {
	return fmt.Sprintf("%s is no cluster and not empty: it has %s", e.Path, strings.Join(e.Found, ", "))
}

// Hint implements plan.Hinter.
func (e *ForeignDataError) Hint() string {
	return "nothing was changed; restore the cluster there, or move what is there away to begin with an empty one"
}

// VersionError says that the cluster is of another major version.
type VersionError struct{ Path, Cluster, Server string }

func (e *VersionError) Error() string {
	return fmt.Sprintf("the cluster in %s is of PostgreSQL %s, the server of %s", e.Path, e.Cluster, e.Server)
}

// Hint implements plan.Hinter.
func (e *VersionError) Hint() string {
	return fmt.Sprintf("run an image with PostgreSQL %s, or move the data with pg_upgrade or pg_dump", e.Cluster)
}

// Run makes the cluster where there is none and becomes the server: it returns
// only with an error.
func (c Cluster) Run(ctx context.Context, arguments []string) error {
	if err := c.awaitStart(ctx); err != nil {
		return err
	}
	// The descriptor stays open in the server and its children, and so the lock
	// is held until the last of them is gone.
	if err := c.lock(ctx); err != nil {
		return err
	}
	if err := c.ensure(ctx); err != nil {
		return err
	}
	if err := c.removeStale(); err != nil {
		return err
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	program := filepath.Join(c.Programs, "postgres")
	err := syscall.Exec(program, append([]string{program, "-D", c.Data}, arguments...), os.Environ())
	return fmt.Errorf("run %s: %w", program, err)
}

// awaitStart waits while someone keeps the server down, such as for a restore.
func (c Cluster) awaitStart(ctx context.Context) error {
	if c.StoppedFile == "" {
		return nil
	}
	ticker := time.NewTicker(stoppedPoll)
	defer ticker.Stop()
	for said := false; ; said = true {
		_, err := os.Lstat(c.StoppedFile)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("look for the file that keeps the server down: %w", err)
		}
		if !said {
			_, _ = fmt.Fprintf(c.Errors, "the server is kept down by %s\n", c.StoppedFile)
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-ticker.C:
		}
	}
}

// ensure makes the cluster unless it is there.
func (c Cluster) ensure(ctx context.Context) error {
	content, err := os.ReadFile(filepath.Join(c.Data, "PG_VERSION"))
	if err == nil {
		return c.checkVersion(ctx, strings.TrimSpace(string(content)))
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("look at the cluster: %w", err)
	}
	if err := c.refuseForeign(); err != nil {
		return err
	}
	attempt := c.Data + ".new"
	// What is there was never finished: the last act of making it is its rename.
	if err := os.RemoveAll(attempt); err != nil {
		return fmt.Errorf("remove an interrupted attempt: %w", err)
	}
	// initdb writes all of it to disk before it ends.
	if err := c.initialize(ctx, attempt); err != nil {
		return err
	}
	// rename(2) replaces an empty folder, which os.Rename refuses to do.
	if err := syscall.Rename(attempt, c.Data); err != nil {
		return fmt.Errorf("put the new cluster in place: %w", err)
	}
	return atomicfile.SyncFolder(filepath.Dir(c.Data))
}

func (c Cluster) refuseForeign() error {
	entries, err := os.ReadDir(c.Data)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("look at the cluster: %w", err)
	}
	var found []string
	for _, entry := range entries {
		found = append(found, entry.Name())
	}
	const shown = 5
	if len(found) > shown {
		found = append(found[:shown], "…")
	}
	if len(found) > 0 {
		return &ForeignDataError{Path: c.Data, Found: found}
	}
	return nil
}

func (c Cluster) initialize(ctx context.Context, folder string) error {
	program := filepath.Join(c.Programs, "initdb")
	command := exec.CommandContext(ctx, program,
		"--pgdata", folder, "--username", c.Superuser, "--encoding=UTF8", "--locale=C.UTF-8",
		"--auth-local=peer", "--auth-host=scram-sha-256", "--data-checksums", "--no-instructions")
	command.Stdout = c.Output
	var said bytes.Buffer
	command.Stderr = io.MultiWriter(c.Errors, &said)
	command.Cancel = func() error { return command.Process.Signal(syscall.SIGTERM) }
	command.WaitDelay = stopGrace
	err := command.Run()
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("make the cluster: %w", context.Cause(ctx))
	case errors.Is(err, fs.ErrNotExist):
		return plan.WithHint(fmt.Errorf("make the cluster: %w", err), "--bin names the folder of the server's programs")
	case err != nil:
		return fmt.Errorf("make the cluster: initdb: %w: %s", err, bytes.TrimSpace(said.Bytes()))
	}
	return nil
}

// checkVersion compares major versions, which alone decide about the files.
func (c Cluster) checkVersion(ctx context.Context, cluster string) error {
	program := filepath.Join(c.Programs, "postgres")
	output, err := exec.CommandContext(ctx, program, "--version").Output()
	if err != nil {
		return fmt.Errorf("ask for the server's version: %w", err)
	}
	_, version, found := strings.Cut(string(output), "(PostgreSQL) ")
	if !found {
		return fmt.Errorf("ask for the server's version: unexpected answer %q", output)
	}
	major := version
	if end := strings.IndexFunc(version, func(r rune) bool { return r < '0' || r > '9' }); end >= 0 {
		major = version[:end]
	}
	if cluster != major {
		return &VersionError{Path: c.Data, Cluster: cluster, Server: major}
	}
	return nil
}
