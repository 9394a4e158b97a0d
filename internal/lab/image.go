package lab

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/nomad-site/site/internal/plan"
)

// The recipe of a lab host's root file system: what a fresh server has, and
// nothing that `site` is to install itself.
const (
	recipeVersion = 1 // raise it when buildBase changes
	suite         = "bookworm"
	packages      = "systemd,systemd-sysv,dbus,openssh-server,ca-certificates,iproute2,procps"
)

// baseKey names the cached root file system of this recipe.
func baseKey() string {
	sum := sha256.Sum256(fmt.Appendf(nil, "%d %s %s %s", recipeVersion, suite, packages, runtime.GOARCH))
	return hex.EncodeToString(sum[:8])
}

// cacheDir is where downloads and builds are kept between labs.
func cacheDir() (string, error) {
	if dir := os.Getenv("SITE_CACHE"); dir != "" {
		return filepath.Abs(dir)
	}
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", plan.WithHint(fmt.Errorf("find cache folder: %w", err), "set SITE_CACHE")
	}
	return filepath.Join(dir, "site"), nil
}

func (l *Lab) basePath(key string) string { return filepath.Join(l.cache, "lab", "base", key) }

// ensureBase builds the root file system unless the cache has it.
func (l *Lab) ensureBase(ctx context.Context, mirror string, progress func(string)) (string, error) {
	key := baseKey()
	path := l.basePath(key)
	if _, err := os.Stat(path); err == nil {
		return key, nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return "", fmt.Errorf("make cache folder: %w", err)
	}
	unlock, err := lockFile(ctx, path+".lock", "another command to build the lab's host image")
	if err != nil {
		return "", err
	}
	defer unlock()
	if _, err := os.Stat(path); err == nil {
		return key, nil
	}
	if mirror == "" {
		if mirror, err = aptMirror(ctx); err != nil {
			return "", err
		}
	}
	// Under the lock a leftover can only be of a build that was cut off.
	temp := path + ".partial"
	if err := os.RemoveAll(temp); err != nil {
		return "", fmt.Errorf("remove unfinished host image: %w", err)
	}
	progress("building the lab's host image (about a minute, once)")
	if err := buildBase(ctx, temp, mirror, progress); err != nil {
		return "", fmt.Errorf("build the lab's host image: %w", err)
	}
	if err := os.Rename(temp, path); err != nil {
		return "", fmt.Errorf("keep the lab's host image: %w", err)
	}
	return key, nil
}

// aptMirror asks the machine's own apt which mirror it is set up with.
func aptMirror(ctx context.Context) (string, error) {
	const hint = "set up apt with a Debian 12 source on this machine, or name a mirror"
	out, err := exec.CommandContext(ctx, "apt-get", "indextargets", "--format", "$(REPO_URI)",
		"Created-By: Packages", "Codename: "+suite).Output()
	if err != nil {
		return "", plan.WithHint(fmt.Errorf("ask apt for its mirror: %w", err), hint)
	}
	mirror, _, _ := strings.Cut(strings.TrimSpace(string(out)), "\n")
	if mirror == "" {
		return "", plan.WithHint(fmt.Errorf("ask apt for its mirror: it knows none for %s", suite), hint)
	}
	return mirror, nil
}

// buildBase runs debootstrap in namespaces of its own: it mounts in the target,
// and nothing of that stays behind wherever it is cut off.
func buildBase(ctx context.Context, dir, mirror string, progress func(string)) error {
	command := exec.CommandContext(ctx, "unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--mount-proc",
		"debootstrap", "--variant=minbase", "--include="+packages, suite, dir, mirror)
	command.Env = cleanEnvironment()
	for _, name := range []string{"http_proxy", "https_proxy", "no_proxy"} {
		if value, ok := os.LookupEnv(name); ok {
			command.Env = append(command.Env, name+"="+value)
		}
	}
	command.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	command.Cancel = func() error { return syscall.Kill(-command.Process.Pid, syscall.SIGKILL) }
	command.WaitDelay = 10 * time.Second
	reader, writer := io.Pipe()
	command.Stdout, command.Stderr = writer, writer
	tail := make(chan string)
	go func() {
		last := ""
		lines := bufio.NewScanner(reader)
		for lines.Scan() {
			// "I: Retrieving libc6 …", "W: …", "E: …"
			if last = strings.TrimSpace(lines.Text()); strings.HasPrefix(last, "I: ") {
				progress("host image: " + strings.TrimPrefix(last, "I: "))
			}
		}
		_, _ = io.Copy(io.Discard, reader)
		tail <- last
	}()
	err := command.Run()
	_ = writer.Close()
	last := <-tail
	if err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return plan.WithHint(fmt.Errorf("debootstrap: %w: %s", err, last), "its log is %s", filepath.Join(dir, "debootstrap", "debootstrap.log"))
	}
	return cleanBase(dir)
}

// cleanBase removes what no two hosts may share and what a build leaves.
func cleanBase(dir string) error {
	var failed []error
	for _, pattern := range []string{
		"etc/ssh/ssh_host_*", "var/lib/apt/lists/*_*", "var/cache/apt/*.bin", "var/cache/apt/archives/*.deb", "var/cache/debconf/*-old",
		"var/lib/dpkg/*-old", "var/log/*.log", "var/log/apt", "etc/hostname", "etc/resolv.conf", "etc/hosts", "root/.ssh",
	} {
		paths, err := filepath.Glob(filepath.Join(dir, pattern))
		failed = append(failed, err)
		for _, path := range paths {
			failed = append(failed, os.RemoveAll(path))
		}
	}
	failed = append(failed,
		// Empty: made at the first boot of each host.
		os.WriteFile(filepath.Join(dir, "etc/machine-id"), nil, 0o444),
		os.WriteFile(filepath.Join(dir, "etc/apt/sources.list"), []byte("# A lab host reaches no mirror.\n"), 0o644),
		os.MkdirAll(filepath.Join(dir, "var/lib/containers"), 0o755),
	)
	if err := os.Remove(filepath.Join(dir, "var/lib/dbus/machine-id")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		failed = append(failed, err)
	}
	return errors.Join(failed...)
}
