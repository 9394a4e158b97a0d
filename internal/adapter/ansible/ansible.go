// Package ansible applies host documents with the pinned Ansible over SSH.
package ansible

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/reconcile/host"
)

// Host is one machine of a run.
type Host struct {
	Name string
	// SSHConfig is the path of an OpenSSH client configuration that knows Name.
	SSHConfig string
	Sudo      bool
	Document  host.Document
	// Targets are the paths and names that differ, Restart the units to restart,
	// Reload those to reload.
	Targets []string
	Restart []string
	Reload  []string
}

// Runner runs the embedded playbook.
type Runner struct {
	// Executable is the pinned ansible-playbook.
	Executable string
	// Playbook holds host.yml and roles/.
	Playbook fs.FS
	// Agent is SSH_AUTH_SOCK for Ansible's own SSH, or empty.
	Agent string
}

// vars are the host variables that the role reads.
type vars struct {
	SSHArgs     string        `json:"ansible_ssh_common_args"`
	Interpreter string        `json:"ansible_python_interpreter"`
	Become      bool          `json:"ansible_become"`
	Document    host.Document `json:"site_document"`
	Applied     host.Document `json:"site_applied"`
	Contents    string        `json:"site_contents"`
	Targets     []string      `json:"site_targets"`
	Restart     []string      `json:"site_restart"`
	Reload      []string      `json:"site_reload"`
}

// TaskError is a task that failed on a host.
type TaskError struct{ Host, Task, Message string }

func (e *TaskError) Error() string {
	return fmt.Sprintf("host %s: task %q: %s", e.Host, e.Task, e.Message)
}

// Hint implements plan.Hinter.
func (e *TaskError) Hint() string {
	return "mend it on the host and run the same command again: what was done already is skipped"
}

var (
	taskLine  = regexp.MustCompile(`^TASK \[(?:host : )?(.+?)\] \*`)
	fatalLine = regexp.MustCompile(`^(?:fatal|failed): \[([^\]]+)\]: ?.*?(?:FAILED!|UNREACHABLE!) => (\{.*)$`)
	itemLine  = regexp.MustCompile(`^failed: \[([^\]]+)\] \(item=(.*?)\) => (\{.*)$`)
)

// Apply makes hosts what their documents say.
func (r Runner) Apply(ctx context.Context, hosts []Host, progress plan.Progress) error {
	folder, release, err := WorkFolder()
	if err != nil {
		return err
	}
	defer release()
	control := filepath.Join(folder, "cp")
	defer func() { endConnections(context.WithoutCancel(ctx), control) }()
	if err := os.CopyFS(filepath.Join(folder, "playbook"), r.Playbook); err != nil {
		return fmt.Errorf("unpack the host playbook: %w", err)
	}
	contents := filepath.Join(folder, "contents")
	if err := writeContents(contents, hosts); err != nil {
		return err
	}
	inventory := map[string]any{}
	hostVars := map[string]vars{}
	for _, h := range hosts {
		hostVars[h.Name] = vars{
			SSHArgs: "-F " + h.SSHConfig, Interpreter: "/usr/bin/python3", Become: h.Sudo,
			Document: h.Document.Public(), Applied: h.Document.Public(), Contents: contents,
			Targets: notNil(h.Targets), Restart: notNil(h.Restart), Reload: notNil(h.Reload),
		}
	}
	inventory["all"] = map[string]any{"hosts": hostVars}
	content, err := json.Marshal(inventory)
	if err != nil {
		return fmt.Errorf("ansible inventory: %w", err)
	}
	// Ansible reads JSON as YAML.
	inventoryPath := filepath.Join(folder, "inventory.yml")
	if err := os.WriteFile(inventoryPath, content, 0o600); err != nil {
		return fmt.Errorf("ansible inventory: %w", err)
	}

	command := exec.CommandContext(ctx, r.Executable, "--inventory", inventoryPath, filepath.Join(folder, "playbook", "host.yml"))
	command.Dir = folder
	command.Env = []string{
		"HOME=" + folder, "LANG=C.UTF-8", "LC_ALL=C.UTF-8", "PATH=/usr/bin:/bin",
		"ANSIBLE_HOST_KEY_CHECKING=True", "ANSIBLE_PIPELINING=True", "ANSIBLE_NOCOLOR=True", "ANSIBLE_FORKS=10",
		"ANSIBLE_RETRY_FILES_ENABLED=False", "ANSIBLE_LOCAL_TEMP=" + filepath.Join(folder, "tmp"),
		"ANSIBLE_SSH_CONTROL_PATH_DIR=" + control, "ANSIBLE_DISPLAY_SKIPPED_HOSTS=False",
		"ANSIBLE_TIMEOUT=20", "ANSIBLE_SSH_ARGS=-C -o ControlMaster=auto -o ControlPersist=" + controlPersist,
	}
	if r.Agent != "" {
		command.Env = append(command.Env, "SSH_AUTH_SOCK="+r.Agent)
	}
	command.Cancel = func() error { return syscall.Kill(-command.Process.Pid, syscall.SIGTERM) }
	command.WaitDelay = 5 * time.Second
	output, writer := io.Pipe()
	command.Stdout, command.Stderr = writer, writer

	parsed := make(chan outcome, 1)
	go func() { parsed <- parse(output, progress) }()
	err = run(command)
	_ = writer.Close()
	result := <-parsed
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case result.failure != nil:
		return result.failure
	default:
		return fmt.Errorf("ansible-playbook: %w: %s", err, strings.Join(result.tail, " | "))
	}
}

// controlPersist bounds how long a connection outlives a run that was killed; it
// must outlast the pause between two tasks.
const controlPersist = "20s"

// endConnections ends the connections that ssh keeps open in the background.
func endConnections(ctx context.Context, folder string) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	sockets, _ := filepath.Glob(filepath.Join(folder, "*"))
	for _, socket := range sockets {
		_ = exec.CommandContext(ctx, "ssh", "-F", "/dev/null", "-o", "ControlPath="+socket, "-O", "exit", "host").Run()
	}
}

type outcome struct {
	failure *TaskError
	tail    []string
}

// parse follows the output of Ansible's default callback.
func parse(output io.Reader, progress plan.Progress) outcome {
	var result outcome
	task := ""
	scanner := bufio.NewScanner(output)
	scanner.Buffer(nil, 16<<20)
	for scanner.Scan() {
		line := scanner.Text()
		if m := taskLine.FindStringSubmatch(line); m != nil {
			task = m[1]
			progress.Message("%s", strings.ToLower(task))
			continue
		}
		if result.failure == nil {
			if m := itemLine.FindStringSubmatch(line); m != nil {
				result.failure = &TaskError{Host: m[1], Task: task, Message: failureMessage(m[3])}
				if m[2] != "None" { // the label of an item that no_log hides
					result.failure.Message = m[2] + ": " + result.failure.Message
				}
			} else if m := fatalLine.FindStringSubmatch(line); m != nil {
				result.failure = &TaskError{Host: m[1], Task: task, Message: failureMessage(m[2])}
			}
		}
		if strings.TrimSpace(line) != "" {
			result.tail = append(result.tail, line)
			if len(result.tail) > 10 {
				result.tail = result.tail[1:]
			}
		}
	}
	_, _ = io.Copy(io.Discard, output) // an overlong line must not block Ansible
	return result
}

// failureMessage takes only msg and stderr out of a result, which can hold
// whole files.
func failureMessage(text string) string {
	var result struct{ Msg, Stderr, Censored string }
	err := json.Unmarshal([]byte(text), &result)
	switch {
	case err == nil && result.Censored != "":
		return "failed; what it said is hidden, since it deals with secrets"
	case err != nil || result.Msg == "":
		return "failed"
	}
	if result.Stderr != "" {
		return result.Msg + ": " + strings.TrimSpace(result.Stderr)
	}
	return result.Msg
}

// writeContents keeps the contents of all files, by digest, private from the
// first byte: there are secrets among them.
func writeContents(folder string, hosts []Host) error {
	if err := os.Mkdir(folder, 0o700); err != nil {
		return fmt.Errorf("ansible work folder: %w", err)
	}
	for _, h := range hosts {
		for _, file := range h.Document.Files {
			if err := os.WriteFile(filepath.Join(folder, file.SHA256), []byte(file.Content), 0o600); err != nil {
				return fmt.Errorf("content of %s: %w", file.Path, err)
			}
		}
	}
	return nil
}

func notNil(list []string) []string {
	if list == nil {
		return []string{}
	}
	return list
}
