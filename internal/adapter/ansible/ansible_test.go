package ansible

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/reconcile/host"
)

// messages is a plan.Progress that remembers.
type messages []string

func (m *messages) Message(format string, args ...any) {
	*m = append(*m, fmt.Sprintf(format, args...))
}

func (*messages) Bytes(string, int64, int64) {}

// The recordings in testdata were made with the pinned Ansible and the settings
// of Apply.
func TestTheFirstFailureOfARunIsTold(t *testing.T) {
	for _, test := range []struct {
		name, recording, want string
	}{
		{"an item of a loop", "failed-item", `host alpha-1: task "Directories": /proc/nothing/here: There was an issue creating /proc/nothing as requested: [Errno 2] No such file or directory: b'/proc/nothing'`},
		{"a later item of a loop", "failed-second", `host alpha-1: task "Units": false: non-zero return code`},
		{"a command with what it wrote to stderr", "failed-command", `host alpha-1: task "Units": non-zero return code: told on stderr`},
		{"a file", "failed-file", `host alpha-1: task "Files": /proc/nothing/file: Destination directory /proc/nothing does not exist`},
		{"a secret file, of which nothing is known", "failed-secret", `host alpha-1: task "Secret files": failed; what it said is hidden, since it deals with secrets`},
		{"a host that cannot be reached", "unreachable", `host alpha-1: task "Groups": Failed to connect to the host via ssh: ssh: connect to host 127.0.0.1 port 1: Connection refused`},
	} {
		t.Run(test.name, func(t *testing.T) {
			result := parse(recording(t, test.recording), &messages{})
			if result.failure == nil {
				t.Fatal("no failure found")
			}
			if got := result.failure.Error(); got != test.want {
				t.Errorf("got  %s\nwant %s", got, test.want)
			}
			if plan.HintOf(result.failure) == "" {
				t.Error("no hint")
			}
		})
	}
}

func TestAMistakeInThePlaybookIsToldByTheLastLines(t *testing.T) {
	result := parse(recording(t, "syntax-error"), &messages{})
	if result.failure != nil {
		t.Errorf("no task failed: %v", result.failure)
	}
	if tail := strings.Join(result.tail, "\n"); !strings.Contains(tail, "ERROR! this task has extra params") || len(result.tail) > 10 {
		t.Errorf("got %q", tail)
	}
}

func TestTasksAreProgress(t *testing.T) {
	var told messages
	parse(recording(t, "failed-item"), &told)
	if got := strings.Join(told, ", "); got != "groups, directories" {
		t.Errorf("got %q", got)
	}
}

func TestAnErrorHasNothingOfAResultBesidesItsMessage(t *testing.T) {
	const content = "the content of a file"
	for name, line := range map[string]string{
		"an item":             `failed: [alpha-1] (item=/etc/x) => {"item": {"content": "` + content + `"}, "diff": {"after": "` + content + `"}, "msg": "no space left"}`,
		"a task":              `fatal: [alpha-1]: FAILED! => {"invocation": {"module_args": {"content": "` + content + `"}}, "msg": "no space left"}`,
		"stdout of a command": `fatal: [alpha-1]: FAILED! => {"stdout": "` + content + `", "msg": "no space left"}`,
		"a broken result":     `fatal: [alpha-1]: FAILED! => {"content": "` + content + `", "msg": "cut`,
		"a hidden item":       `failed: [alpha-1] (item=None) => {"censored": "` + content + `", "changed": false}`,
	} {
		t.Run(name, func(t *testing.T) {
			result := parse(strings.NewReader("TASK [host : Files] ****\n"+line+"\n"), &messages{})
			if result.failure == nil {
				t.Fatal("no failure found")
			}
			if strings.Contains(result.failure.Error(), content) {
				t.Error(result.failure)
			}
		})
	}
}

func TestOutputThatIsTooLongForALineIsReadToItsEnd(t *testing.T) {
	reader, writer := io.Pipe()
	written := make(chan error, 1)
	go func() {
		chunk := []byte(strings.Repeat("x", 1<<20))
		for range 20 {
			if _, err := writer.Write(chunk); err != nil {
				written <- err
				return
			}
		}
		written <- writer.Close()
	}()
	parse(reader, &messages{})
	if err := <-written; err != nil {
		t.Error(err)
	}
}

// runner runs a shell script in the place of Ansible. The script sees what
// Ansible would: the inventory is $2.
func runner(t *testing.T, script string) Runner {
	t.Helper()
	path := filepath.Join(t.TempDir(), "ansible-playbook")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+script), 0o755); err != nil {
		t.Fatal(err)
	}
	return Runner{Executable: path, Playbook: fstest.MapFS{"host.yml": {Data: []byte("- hosts: all\n")}}}
}

func withSecret() Host {
	return Host{Name: "alpha-1", Document: host.Document{Files: []host.File{
		{Path: "/etc/nomad.d/gossip.hcl", SHA256: "aa", Secret: true, Content: "planted-secret"},
		{Path: "/etc/plain", SHA256: "bb", Content: "planted-plain"},
	}}}
}

func TestContentsLieInPrivateFilesAndNotInTheInventory(t *testing.T) {
	seen := filepath.Join(t.TempDir(), "seen")
	r := runner(t, `work=$(dirname "$2")
grep -c planted "$2" >`+seen+`
stat -c '%a %n' "$work/contents" "$work/contents/aa" | sed "s|$work/||" >>`+seen+`
cat "$work/contents/aa" "$work/playbook/host.yml" >>`+seen+`
echo "$work" >`+seen+`.folder
env | grep -i planted >>`+seen+`
exit 0
`)
	t.Setenv("PLANTED", "an operator's environment stays theirs")
	if err := r.Apply(t.Context(), []Host{withSecret()}, &messages{}); err != nil {
		t.Fatal(err)
	}
	const want = "0\n700 contents\n600 contents/aa\nplanted-secret- hosts: all\n"
	if got, err := os.ReadFile(seen); err != nil || string(got) != want {
		t.Errorf("got %q, %v; want %q", got, err, want)
	}
	folder, err := os.ReadFile(seen + ".folder")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(strings.TrimSpace(string(folder))); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the work folder is left: %v", err)
	}
}

func TestTheErrorOfARunIsThatOfItsTask(t *testing.T) {
	path, err := filepath.Abs(filepath.Join("testdata", "failed-command.txt"))
	if err != nil {
		t.Fatal(err)
	}
	err = runner(t, "cat "+path+"; exit 2\n").Apply(t.Context(), []Host{withSecret()}, &messages{})
	var task *TaskError
	if !errors.As(err, &task) || task.Task != "Units" {
		t.Errorf("got %v", err)
	}
	err = runner(t, "echo 'ERROR! nothing works' >&2; exit 4\n").Apply(t.Context(), []Host{withSecret()}, &messages{})
	if err == nil || !strings.Contains(err.Error(), "exit status 4") || !strings.Contains(err.Error(), "nothing works") {
		t.Errorf("got %v", err)
	}
}

func recording(t *testing.T, name string) io.Reader {
	t.Helper()
	file, err := os.Open(filepath.Join("testdata", name+".txt"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = file.Close() })
	return file
}
