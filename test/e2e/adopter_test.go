package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nomad-site/site/internal/adapter/toolchain"
	"github.com/nomad-site/site/internal/deploy"
	"github.com/nomad-site/site/internal/testneeds"
)

// adopter is a new user on a machine with podman, git and the site binary.
type adopter struct {
	*testSite
	// bin is the only folder of their own in PATH.
	bin string
	// apps holds the source of their application.
	apps string
}

func newAdopter(t *testing.T) *adopter {
	t.Helper()
	its := newSite(t, bare)
	home := t.TempDir()
	a := &adopter{testSite: &testSite{t: t, lab: its.lab, site: its.site, dir: filepath.Join(home, "shop-site")}, bin: filepath.Join(home, "bin"), apps: filepath.Join(home, "shop")}
	a.host = &testHost{site: a.testSite, name: its.host.name, address: its.host.address}
	for _, folder := range []string{a.dir, a.bin, a.apps} {
		if err := os.MkdirAll(folder, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(a.site, filepath.Join(a.bin, "site")); err != nil {
		t.Fatal(err)
	}
	// The machine's own images are none of the test's business. Podman insists on
	// a short path.
	images, err := os.MkdirTemp("", "images-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(images) })
	a.write(filepath.Join(a.bin, "podman"), fmt.Sprintf("#!/bin/sh\nexec /usr/bin/podman --root %s/root --runroot %s/run --storage-driver vfs --cgroup-manager cgroupfs \"$@\"\n", images, images))
	if err := os.Chmod(filepath.Join(a.bin, "podman"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{"ssh_config", "id.pub"} {
		a.write(filepath.Join(a.dir, ".lab", name, file), a.read(filepath.Join(a.lab.Dir(), file)))
	}
	return a
}

// shell runs a script as the adopter would type it.
func (a *adopter) shell(folder, script string) string {
	a.t.Helper()
	command := exec.CommandContext(a.t.Context(), "sh", "-ec", script)
	command.Dir = folder
	command.Env = append(a.environment(), "PATH="+a.bin+":"+os.Getenv("PATH"), "CGO_ENABLED=0",
		"GIT_AUTHOR_NAME=e2e", "GIT_AUTHOR_EMAIL=e2e@localhost", "GIT_COMMITTER_NAME=e2e", "GIT_COMMITTER_EMAIL=e2e@localhost")
	command.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	command.Cancel = func() error { return syscall.Kill(-command.Process.Pid, syscall.SIGKILL) }
	command.WaitDelay = 5 * time.Second
	var stdout, stderr bytes.Buffer
	command.Stdout, command.Stderr = &stdout, &stderr
	if err := command.Run(); err != nil {
		a.t.Fatalf("%s: %v\n%s%s", script, err, stdout.String(), stderr.String())
	}
	return stdout.String()
}

// compile builds the application, static.
func (a *adopter) compile(edition string) {
	a.t.Helper()
	a.write(filepath.Join(a.apps, "main.go"), a.read(filepath.Join("testdata", "shop", "main.go")))
	a.write(filepath.Join(a.apps, "go.mod"), "module example.net/shop\n\ngo 1.26\n")
	a.shell(a.apps, "go build -buildvcs=false -ldflags='-X main.edition="+edition+"' -o shop .")
}

// commandsIn are the lines to type of a text for people: those that are indented
// and no comments.
func commandsIn(text string) []string {
	var commands []string
	for line := range strings.Lines(text) {
		command, indented := strings.CutPrefix(line, "  ")
		if command = strings.TrimSpace(command); indented && command != "" && !strings.HasPrefix(command, "#") {
			commands = append(commands, command)
		}
	}
	return commands
}

func TestANewUserGoesFromAnEmptyFolderToTheirOwnJob(t *testing.T) {
	a := newAdopter(t)
	a.compile("first")
	a.write(filepath.Join(a.apps, "Containerfile"), "FROM scratch\nCOPY shop /shop\nENTRYPOINT [\"/shop\"]\n")
	a.shell(a.apps, "podman build --quiet --tag shop .")

	answers := []string{"init", "--site=corner", "--component=shop", "--host=" + a.host.name, "--ssh-config=.lab/" + name + "/ssh_config", "--operator-key=.lab/" + name + "/id.pub"}
	said := a.must(answers...).stdout
	steps := commandsIn(said)
	if len(steps) < 6 {
		t.Fatalf("init does not say what to do next:\n%s", said)
	}
	start := time.Now()
	for _, step := range steps {
		t.Log("$ " + step)
		a.shell(a.dir, strings.ReplaceAll(step, "IMAGE", "localhost/shop"))
	}
	t.Logf("what init says to do took %s", time.Since(start).Round(100*time.Millisecond))

	if page, err := a.get(8080, "/"); err != nil || page != "first edition" {
		t.Errorf("the shop answers %q, %v", page, err)
	}
	tracked := a.shell(a.dir, "git ls-files; git status --porcelain")
	for _, file := range []string{"sites/corner/site.hcl", "sites/corner/init.age", "jobs/shop/component.hcl"} {
		if !strings.Contains(tracked, file+"\n") {
			t.Errorf("%s is not in git:\n%s", file, tracked)
		}
	}
	for _, never := range []string{"root-token", ".lab", "images/"} {
		if strings.Contains(tracked, never) {
			t.Errorf("%s must not be in git:\n%s", never, tracked)
		}
	}
	a.checkDailyCommands()
	a.checkSecondImage()
	a.checkSecondInit(answers)
}

// checkDailyCommands runs what the README names.
func (a *adopter) checkDailyCommands() {
	t := a.t
	t.Helper()
	readme := a.read(filepath.Join(a.dir, "README.md"))
	for _, mentioned := range regexp.MustCompile("`site ([a-z-]+)").FindAllStringSubmatch(readme, -1) {
		a.must(mentioned[1], "--help")
	}
	var status deploy.Status
	if err := json.Unmarshal([]byte(a.must("status", "--json").stdout), &status); err != nil {
		t.Fatal(err)
	}
	head := strings.TrimSpace(a.shell(a.dir, "git rev-parse HEAD~1")) // the last commit added init.age
	switch {
	case status.Schema != deploy.StatusVersion || status.Site != "corner" || len(status.Hosts) != 1 || len(status.Jobs) != 1:
		t.Errorf("status: %+v", status)
	case !status.Jobs[0].Healthy || status.Jobs[0].GitSHA != head || status.Release == nil || status.Release.GitSHA != head:
		t.Errorf("status: %+v, want commit %s", status, head)
	}
	if said := a.must("status").stdout; !regexp.MustCompile(`(?m)^shop +healthy +1 of 1 +` + head[:12]).MatchString(said) {
		t.Errorf("status says:\n%s", said)
	}
	if said := a.must("logs", "shop").stdout; said != "the shop opens\n" {
		t.Errorf("the log is %q", said)
	}
	// No nomad is in PATH: the pinned one is.
	for _, command := range [][]string{{"nomad", "job", "status"}, {"sh", "-c", "nomad job status"}} {
		if said := a.must(append([]string{"env", "--"}, command...)...).stdout; !regexp.MustCompile(`(?m)^shop +service +\d+ +running`).MatchString(said) {
			t.Errorf("site env -- %v says:\n%s", command, said)
		}
	}
	if failed := a.run("env", "--", "no-such-command"); failed.code != 1 || !strings.Contains(failed.stderr, "hint: ") {
		t.Errorf("a command that is not there: %v", failed)
	}
	if said := a.must("version").stdout; !strings.HasPrefix(said, "site ") {
		t.Errorf("the version is %q", said)
	}
	a.write(filepath.Join(a.bin, "completion"), a.must("completion", "bash").stdout)
	a.shell(a.dir, "bash -n "+filepath.Join(a.bin, "completion"))
	a.checkTunnel()
}

// checkTunnel opens the job at a local address.
func (a *adopter) checkTunnel() {
	t := a.t
	t.Helper()
	command := exec.CommandContext(t.Context(), a.site, "tunnel", "shop")
	command.Dir, command.Env = a.dir, a.environment()
	out, err := command.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	line := make([]byte, 200)
	n, err := out.Read(line)
	if err != nil {
		t.Fatal(err)
	}
	address := strings.TrimSpace(string(line[:n]))
	response, err := (&http.Client{Timeout: 10 * time.Second}).Get(address)
	if err != nil {
		t.Fatal(err)
	}
	page, err := io.ReadAll(response.Body)
	if _ = response.Body.Close(); err != nil || string(page) != "first edition" {
		t.Errorf("through the tunnel: %q, %v", page, err)
	}
	if err := command.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	var exit *exec.ExitError
	if err := command.Wait(); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	if code := command.ProcessState.ExitCode(); code != 0 {
		t.Errorf("an interrupt is how a tunnel ends, not a failure: exit code %d", code)
	}
}

// checkSecondImage deploys what `podman import` made of a plain tar, with a
// digest in the commit.
func (a *adopter) checkSecondImage() {
	t := a.t
	t.Helper()
	a.compile("second")
	a.shell(a.apps, `tar -cf root.tar shop && podman import --quiet --change 'ENTRYPOINT ["/shop"]' root.tar shop:second`)
	a.shell(a.dir, "rm images/shop.tar && podman save --quiet --output images/shop.tar localhost/shop:second")
	got := a.must("deploy")
	if !strings.Contains(got.stderr, "warning: artifact shop of component shop is built from docker archive images/shop.tar (from the work tree: not in the commit)") {
		t.Errorf("it does not say that the image is not the commit's: %v", got)
	}
	if page, err := a.get(8080, "/"); err != nil || page != "second edition" {
		t.Errorf("the shop answers %q, %v", page, err)
	}

	component := filepath.Join(a.dir, "jobs", "shop", "component.hcl")
	sum := strings.Fields(a.shell(a.dir, "sha256sum images/shop.tar"))[0]
	a.write(component, strings.Replace(a.read(component), `# sha256 = "…"`, fmt.Sprintf("sha256 = %q", sum), 1))
	a.shell(a.dir, "git commit --quiet --all --message 'bind the image'")
	if got := a.must("deploy"); strings.Contains(got.stderr, "warning") || !strings.Contains(got.stdout, "nothing to do") {
		t.Errorf("the same image, bound to the commit: %v", got)
	}
	a.write(filepath.Join(a.dir, "images", "shop.tar"), "something else")
	if got := a.run("deploy"); got.code != 1 || !strings.Contains(got.stderr, sum) || !strings.Contains(got.stderr, "hint: ") {
		t.Errorf("another file in its place: %v", got)
	}
}

func (a *adopter) checkSecondInit(answers []string) {
	a.t.Helper()
	file := filepath.Join(a.dir, "sites", "corner", "site.hcl")
	before := a.read(file) + "# edited\n"
	a.write(file, before)
	again := a.run(answers...)
	if again.code != 1 || !strings.Contains(again.stderr, "already there: sites/corner/site.hcl") || !strings.Contains(again.stderr, "--force") || a.read(file) != before {
		a.t.Errorf("init again: %v", again)
	}
	a.must(append(answers, "--force")...)
	if strings.Contains(a.read(file), "# edited") {
		a.t.Error("--force did not overwrite")
	}
}

func TestPinnedToolsNeedNeitherPathNorNetwork(t *testing.T) {
	testneeds.Lab(t) // which is where the tools are installed, and where root is
	site, tool := siteBinary(t), "versitygw"
	installed := where(t, site, tool)
	cache := t.TempDir()
	there := filepath.Join(cache, "tools", "linux_"+toolchain.Host().Architecture, tool)
	if err := os.CopyFS(there, os.DirFS(filepath.Dir(filepath.Dir(installed)))); err != nil {
		t.Fatal(err)
	}
	alone := func(environment []string, args ...string) result {
		t.Helper()
		command := exec.CommandContext(t.Context(), site, args...)
		command.Env = append([]string{"SITE_CACHE=" + cache, "HOME=" + t.TempDir()}, environment...)
		command.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
		return finished(t, command, args)
	}
	for _, environment := range [][]string{nil, {"PATH="}} {
		if got := alone(environment, "tool", "which", tool); strings.TrimSpace(got.stdout) != filepath.Join(there, "bin", tool) {
			t.Errorf("with %q: %v", environment, got)
		}
		if got := alone(environment, "tool", "run", "--which", tool); strings.TrimSpace(got.stdout) != filepath.Join(there, "bin", tool) {
			t.Errorf("with %q: %v", environment, got)
		}
		if got := alone(environment, "tool", "run", tool, "--", "--version"); got.code != 0 || !strings.Contains(got.stdout, "1.8.0") {
			t.Errorf("with %q: %v", environment, got)
		}
		if got := alone(environment, "tool", "verify", tool); got.code != 0 {
			t.Errorf("with %q: %v", environment, got)
		}
	}

	// One more byte: found, and named.
	executable := filepath.Join(there, "bin", tool)
	file, err := os.OpenFile(executable, os.O_WRONLY|os.O_APPEND, 0)
	if err == nil {
		_, err = file.WriteString("x")
		err = errors.Join(err, file.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"tool", "verify"}, {"tool", "verify", tool}, {"tool", "run", "--verify", tool}} {
		if got := alone(nil, args...); got.code != 1 || !strings.Contains(got.stderr, "bin/"+tool+" has sha256") || !strings.Contains(got.stderr, "hint: ") {
			t.Errorf("a tool that was changed: %v", got)
		}
	}

	// Gone: another of the same name in PATH is not asked.
	decoys := t.TempDir()
	if err := errors.Join(os.RemoveAll(there), os.WriteFile(filepath.Join(decoys, tool), []byte("#!/bin/sh\necho decoy\n"), 0o755)); err != nil {
		t.Fatal(err)
	}
	if got := alone([]string{"PATH=" + decoys}, "tool", "run", tool); got.code != 1 || strings.Contains(got.stdout, "decoy") || !strings.Contains(got.stderr, "hint: run: site tool install "+tool) {
		t.Errorf("a tool that is not installed: %v", got)
	}
}

// where is the installed executable of a tool.
func where(t *testing.T, site, tool string) string {
	t.Helper()
	command := exec.CommandContext(t.Context(), site, "tool", "which", tool)
	got := finished(t, command, []string{"tool", "which", tool})
	if got.code != 0 {
		t.Fatalf("run `make tools` first: %v", got)
	}
	return strings.TrimSpace(got.stdout)
}

// finished runs a prepared command to its end.
func finished(t *testing.T, command *exec.Cmd, args []string) result {
	t.Helper()
	var stdout, stderr bytes.Buffer
	command.Stdout, command.Stderr = &stdout, &stderr
	start := time.Now()
	var exit *exec.ExitError
	if err := command.Run(); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return result{args: args, stdout: stdout.String(), stderr: stderr.String(), code: command.ProcessState.ExitCode(), duration: time.Since(start)}
}
