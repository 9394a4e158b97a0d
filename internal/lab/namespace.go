package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/retry"
)

// namespace is where everything of a running lab lives: a private mount
// namespace, so that the machine's own mounts stay untouched, and a process
// namespace of its own, so that killing its first process (the holder) ends
// every process of the lab at once, and with them all their mounts. It has a
// /run of its own, with all that podman and its helpers know: when the holder is
// gone, whatever the reason, they have forgotten all containers and addresses
// too and nothing stale can be met.
type namespace struct {
	// pid of the holder, as the machine sees it.
	pid int
	// started is its start time in clock ticks, since process ids are reused.
	started string
}

// holderMark is in the holder's command line, before the lab's folder.
const holderMark = "site-lab-holder"

// holderScript is the first process of the namespace. It also reaps what the
// hosts leave behind, and ignores every signal but KILL, as such processes do.
const holderScript = `set -e
mount --make-rprivate /
mount -t proc proc /proc
printf '%s' "$2" | while IFS= read -r point; do umount "$point"; done
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t tmpfs -o mode=755 tmpfs /run
echo ready
exec </dev/null >/dev/null 2>&1
while :; do sleep infinity & wait $!; done
`

// findNamespace looks for the holder of the lab in dir among the machine's
// processes: no record of ours can be stale then. It returns nil if there is none.
func findNamespace(dir string) (*namespace, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	for _, entry := range entries {
		pid, err := strconv.Atoi(entry.Name())
		if err != nil {
			continue
		}
		line, err := os.ReadFile(filepath.Join("/proc", entry.Name(), "cmdline"))
		if err != nil || !isHolder(line, dir) {
			continue // processes come and go
		}
		status, err := os.ReadFile(filepath.Join("/proc", entry.Name(), "status"))
		if err != nil || !firstOfNamespace(status) {
			continue // a child of the holder that has not called exec yet
		}
		started, err := startTime(pid)
		if err != nil {
			continue
		}
		return &namespace{pid: pid, started: started}, nil
	}
	return nil, nil
}

// isHolder recognises "sh -c SCRIPT site-lab-holder DIR …".
func isHolder(cmdline []byte, dir string) bool {
	args := bytes.Split(cmdline, []byte{0})
	return len(args) > 4 && string(args[1]) == "-c" && string(args[3]) == holderMark && string(args[4]) == dir
}

// firstOfNamespace reads /proc/PID/status: "NSpid: 4904 1".
func firstOfNamespace(status []byte) bool {
	for line := range strings.Lines(string(status)) {
		if value, ok := strings.CutPrefix(line, "NSpid:"); ok {
			ids := strings.Fields(value)
			return len(ids) > 1 && ids[len(ids)-1] == "1"
		}
	}
	return false
}

func startTime(pid int) (string, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return "", err
	}
	// The name in parentheses may hold anything; what follows may not.
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	const stateField, startField = 0, 19
	if len(fields) <= startField || fields[stateField] == "Z" {
		return "", errors.New("process has ended")
	}
	return fields[startField], nil
}

func (n *namespace) alive() bool {
	started, err := startTime(n.pid)
	return err == nil && started == n.started
}

// newNamespace starts a holder that outlives this process.
func newNamespace(ctx context.Context, dir, log string, groups cgroups) (*namespace, error) {
	logFile, err := os.Create(log)
	if err != nil {
		return nil, fmt.Errorf("start lab: %w", err)
	}
	defer logFile.Close()
	reader, writer, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("start lab: %w", err)
	}
	defer reader.Close()
	var unified strings.Builder
	for _, point := range groups.unified {
		unified.WriteString(point + "\n")
	}
	// Not bound to ctx: the holder is to outlive it.
	holder := exec.Command("/bin/sh", "-c", holderScript, holderMark, dir, unified.String())
	holder.Env = cleanEnvironment()
	holder.Dir = "/"
	holder.Stdout, holder.Stderr = writer, logFile
	holder.SysProcAttr = holderAttributes()
	err = holder.Start()
	_ = writer.Close()
	if err != nil {
		return nil, plan.WithHint(fmt.Errorf("make the lab's namespaces: %w", err), "run as root on a machine that allows new mount and process namespaces")
	}
	stop := context.AfterFunc(ctx, func() { _ = holder.Process.Kill() })
	defer stop()
	said, _ := io.ReadAll(reader)
	if strings.TrimSpace(string(said)) != "ready" {
		_ = holder.Process.Kill()
		_ = holder.Wait()
		if ctx.Err() != nil {
			return nil, fmt.Errorf("start lab: %w", context.Cause(ctx))
		}
		reason, _ := os.ReadFile(log)
		return nil, fmt.Errorf("set up the lab's mounts: %s", lastLine(reason))
	}
	pid := holder.Process.Pid
	started, err := startTime(pid)
	if err != nil {
		return nil, fmt.Errorf("start lab: the holder ended: %w", err)
	}
	return &namespace{pid: pid, started: started}, holder.Process.Release()
}

// end kills every process of the lab and waits until they are gone.
func (n *namespace) end(ctx context.Context) error {
	if !n.alive() {
		return nil
	}
	if err := syscall.Kill(n.pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("end the lab's processes: %w", err)
	}
	err := retry.Until(ctx, "the lab's processes to end", 30*time.Second, func(context.Context) error {
		if n.alive() {
			return fmt.Errorf("process %d is still there", n.pid)
		}
		return nil
	})
	// If it was a child of this very process, it waits to be collected.
	var status syscall.WaitStatus
	_, _ = syscall.Wait4(n.pid, &status, syscall.WNOHANG, nil)
	return err
}

// inside is how a path of the lab's namespace is named from outside.
func (n *namespace) inside(path string) string {
	return fmt.Sprintf("/proc/%d/root%s", n.pid, path)
}

// run runs a command in the namespace and returns its standard output.
func (n *namespace) run(ctx context.Context, environment []string, args ...string) ([]byte, error) {
	enter := []string{"--mount", "--pid", "--target", strconv.Itoa(n.pid), "--"}
	command := exec.CommandContext(ctx, "nsenter", append(enter, args...)...)
	command.Env = append(cleanEnvironment(), environment...)
	command.Dir = "/"
	// nsenter does not pass signals on: cancel the whole group.
	command.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	command.Cancel = func() error { return syscall.Kill(-command.Process.Pid, syscall.SIGKILL) }
	command.WaitDelay = 5 * time.Second
	var stdout, stderr bytes.Buffer
	command.Stdout, command.Stderr = &stdout, &stderr
	if err := command.Run(); err != nil {
		if ctx.Err() != nil {
			return stdout.Bytes(), fmt.Errorf("%s: %w", args[0], context.Cause(ctx))
		}
		return stdout.Bytes(), &CommandError{Command: args, Err: err, Stderr: strings.TrimSpace(stderr.String())}
	}
	return stdout.Bytes(), nil
}

// CommandError is a command of the lab that failed.
type CommandError struct {
	Command []string
	Err     error
	Stderr  string
}

func (e *CommandError) Error() string {
	name := filepath.Base(e.Command[0])
	if e.Stderr == "" {
		return fmt.Sprintf("%s: %v", name, e.Err)
	}
	return fmt.Sprintf("%s: %v: %s", name, e.Err, e.Stderr)
}

func (e *CommandError) Unwrap() error { return e.Err }

// cleanEnvironment keeps the caller's settings (such as CONTAINERS_CONF or
// proxies) out of the lab.
func cleanEnvironment() []string {
	return []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LANG=C.UTF-8"}
}

func lastLine(text []byte) string {
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	return lines[len(lines)-1]
}
