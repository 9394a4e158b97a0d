package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nomad-site/site/internal/lab"
	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/retry"
	"github.com/nomad-site/site/internal/seal"
	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/site"
	"github.com/nomad-site/site/internal/testneeds"
)

// testSite is an adopter's repository and the host that it describes.
type testSite struct {
	t    *testing.T
	lab  *lab.Lab
	site string // the site binary
	// dir is the repository's work tree.
	dir  string
	host *testHost
	// tokenFile holds the site root token.
	tokenFile string
	// platform: the site has OpenBao and Postgres, and an application that uses both.
	platform bool
	// commits counts, so that each has a date of its own and the same sha in every run.
	commits int
}

// change is one entry of a plan.
type change = plan.Change

// result is what a command did.
type result struct {
	args           []string
	stdout, stderr string
	code           int
	duration       time.Duration
}

func (r result) String() string {
	return fmt.Sprintf("site %s: exit code %d after %s\nstdout:\n%s\nstderr:\n%s",
		strings.Join(r.args, " "), r.code, r.duration.Round(time.Millisecond), r.stdout, r.stderr)
}

// option says what newSite gives.
type option func(*siteOptions)

type siteOptions struct {
	bare, readOnly, platform bool
}

// platform gives a site with OpenBao, Postgres and the application of jobs/hello,
// which reads a password and counts rows. Without it, the application needs neither.
func platform(o *siteOptions) { o.platform = true }

// bare gives a host that nothing was done to.
func bare(o *siteOptions) { o.bare = true }

// bootstrapped, the default, gives a host with a healthy job "hello".
func bootstrapped(o *siteOptions) { o.bare = false }

// readOnly promises that the test changes nothing on the host: then the next
// one need not wait for a restored snapshot.
func readOnly(o *siteOptions) { o.readOnly = true }

// newSite gives a test a fresh repository and a host in a known state.
func newSite(t *testing.T, options ...option) *testSite {
	t.Helper()
	testneeds.Lab(t)
	chosen := siteOptions{}
	for _, each := range options {
		each(&chosen)
	}
	shared.ensure(t)
	status, err := shared.lab.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	s := &testSite{t: t, lab: shared.lab, site: shared.site, dir: filepath.Join(t.TempDir(), "repository"), platform: chosen.platform}
	s.host = &testHost{site: s, name: status.Hosts[0].Name, address: status.Hosts[0].Address}
	s.makeRepository()
	s.tokenFile = filepath.Join(s.dir, ".lab", "root-token")
	sealed := filepath.Join("sites", name, "init.age")
	if chosen.bare {
		shared.beBare(t)
		s.must("root-token", "new", s.tokenFile)
	} else {
		seed := shared.beBootstrapped(t, s.kind(), func() {
			s.must("root-token", "new", s.tokenFile)
			s.must("bootstrap-deploy", "--root-token-file="+s.tokenFile)
			s.keepBootstrapped()
		})
		s.write(s.tokenFile, s.read(filepath.Join(seed, "root-token")))
		s.commit("the sealed init material", map[string]string{sealed: s.read(filepath.Join(seed, "init.age"))})
		s.waitHealthy("hello")
	}
	if !chosen.readOnly {
		shared.state = ""
	}
	return s
}

// keepBootstrapped keeps the hosts, which hold what the first commit says, for
// the tests to come, with what belongs to them. It boots them again.
func (s *testSite) keepBootstrapped() {
	s.t.Helper()
	snapshot, err := shared.snapshotName(s.kind())
	if err != nil {
		s.t.Fatal(err)
	}
	for file, path := range map[string]string{"root-token": s.tokenFile, "init.age": filepath.Join(s.dir, "sites", name, "init.age")} {
		s.write(filepath.Join(shared.folder, snapshot, file), s.read(path))
	}
	start := time.Now()
	if err := shared.lab.Snapshot(s.t.Context(), snapshot); err != nil {
		s.t.Fatal(err)
	}
	s.t.Logf("kept the bootstrapped hosts in %s", time.Since(start).Round(time.Millisecond))
}

// kind tells the snapshots apart.
func (s *testSite) kind() string {
	if !s.platform {
		return "plain"
	}
	if _, _, digest := s.secretsEngine(); digest != "" {
		return "bao" + digest[:5] // a snapshot's name is short
	}
	return "platform"
}

// in is the same site for a subtest, which then ends alone where it fails.
func (s *testSite) in(t *testing.T) *testSite {
	copied := *s
	copied.t = t
	copied.host = &testHost{site: &copied, name: s.host.name, address: s.host.address}
	return &copied
}

// makeRepository makes what an adopter has: a site, a component and its
// application. The first commit has the same sha in every test.
func (s *testSite) makeRepository() {
	s.t.Helper()
	files := map[string]string{
		".gitignore":                             "/.lab/\n",
		"go.mod":                                 "module example.net/adopter\n\ngo 1.26\n",
		filepath.Join("sites", name, "site.hcl"): s.siteHCL(1),
	}
	hello := filepath.Join("testdata", "hello")
	if s.platform {
		// Its application needs modules, which the project's own go.mod pins.
		root := projectRoot(s.t)
		hello = filepath.Join(root, "jobs", "hello")
		files["go.mod"] = strings.Replace(s.read(filepath.Join(root, "go.mod")), "module github.com/nomad-site/site", "module example.net/adopter", 1)
		files["go.sum"] = s.read(filepath.Join(root, "go.sum"))
		own, executable, _ := s.secretsEngine()
		maps.Copy(files, own)
		if executable != "" {
			s.write(filepath.Join(s.dir, enginePath), s.read(executable))
		}
	}
	for _, pattern := range []string{"*.hcl", "app/*.go"} {
		sources, err := filepath.Glob(filepath.Join(hello, pattern))
		if err != nil {
			s.t.Fatal(err)
		}
		for _, source := range sources {
			if inside, err := filepath.Rel(hello, source); err == nil && !strings.HasSuffix(source, "_test.go") {
				files[filepath.Join("jobs", "hello", inside)] = s.read(source)
			}
		}
	}
	if err := os.MkdirAll(s.dir, 0o755); err != nil {
		s.t.Fatal(err)
	}
	s.git("init", "--quiet", "--initial-branch=main")
	for _, file := range []string{"ssh_config", "id.pub"} {
		s.write(filepath.Join(s.dir, ".lab", name, file), s.read(filepath.Join(s.lab.Dir(), file)))
	}
	s.commit("a site with one component", files)
}

// siteHCL describes the first hosts of the lab, with the components named.
func (s *testSite) siteHCL(hosts int, components ...string) string {
	var out strings.Builder
	fmt.Fprintf(&out, "site %q {\n  ssh {\n    config_file = \".lab/%s/ssh_config\"\n  }\n", name, name)
	for number := 1; number <= hosts; number++ {
		fmt.Fprintf(&out, "\n  host \"%s-%d\" {\n    address = \"%s-%d\"\n", name, number, name, number)
		if hosts > 1 {
			out.WriteString("    server = true\n")
		}
		out.WriteString("  }\n")
	}
	fmt.Fprintf(&out, "\n  operator %q {\n    public_key_file = \".lab/%s/id.pub\"\n  }\n", name, name)
	out.WriteString("\n  nomad {\n    fingerprint_denylist = [\"env_aws\", \"env_gce\", \"env_azure\", \"env_digitalocean\"]\n  }\n")
	active := []string{"hello"}
	if s.platform {
		active = []string{site.OpenBaoComponent, site.PostgresComponent, "hello"}
	}
	for _, component := range append(active, components...) {
		fmt.Fprintf(&out, "\n  component %q {}\n", component)
	}
	out.WriteString("}\n")
	return out.String()
}

// activate lists further components in site.hcl, for a commit.
func (s *testSite) activate(components ...string) (path, content string) {
	return filepath.Join("sites", name, "site.hcl"), s.siteHCL(1, components...)
}

func (s *testSite) read(path string) string {
	s.t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		s.t.Fatal(err)
	}
	return string(content)
}

// write writes a private file, with its folder.
func (s *testSite) write(path, content string) {
	s.t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(content), 0o600)); err != nil {
		s.t.Fatal(err)
	}
}

// source reads a file of the repository.
func (s *testSite) source(path string) string {
	s.t.Helper()
	return s.read(filepath.Join(s.dir, path))
}

// replace gives a file of the repository with one piece of text exchanged.
func (s *testSite) replace(path, from, to string) string {
	s.t.Helper()
	content := s.source(path)
	if strings.Count(content, from) != 1 {
		s.t.Fatalf("%s has %q %d times, not once", path, from, strings.Count(content, from))
	}
	return strings.Replace(content, from, to, 1)
}

// git runs git in the repository.
func (s *testSite) git(args ...string) string {
	s.t.Helper()
	command := exec.CommandContext(s.t.Context(), "git", args...)
	command.Dir = s.dir
	date := fmt.Sprintf("2025-01-01T00:%02d:%02dZ", s.commits/60, s.commits%60)
	command.Env = append(s.environment(), "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_NOSYSTEM=1",
		"GIT_AUTHOR_NAME=e2e", "GIT_AUTHOR_EMAIL=e2e@localhost", "GIT_AUTHOR_DATE="+date,
		"GIT_COMMITTER_NAME=e2e", "GIT_COMMITTER_EMAIL=e2e@localhost", "GIT_COMMITTER_DATE="+date)
	out, err := command.CombinedOutput()
	if err != nil {
		s.t.Fatalf("git %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// commit writes files, by path, commits all that is in the work tree, and
// returns the sha.
func (s *testSite) commit(message string, files map[string]string) string {
	s.t.Helper()
	for path, content := range files {
		s.write(filepath.Join(s.dir, path), content)
	}
	s.git("add", "--all")
	s.commits++
	s.git("commit", "--quiet", "--allow-empty", "--message", message)
	return s.head()
}

func (s *testSite) head() string {
	s.t.Helper()
	return s.git("rev-parse", "HEAD")
}

// environment has nothing of the caller's but what finds programs and caches.
func (s *testSite) environment() []string {
	clean := []string{"LANG=C.UTF-8"}
	for _, pair := range os.Environ() {
		key, _, _ := strings.Cut(pair, "=")
		switch {
		case key == "PATH", key == "HOME", key == "TMPDIR", key == "SITE_CACHE", key == "XDG_CACHE_HOME",
			strings.HasPrefix(key, "GO"), key == "http_proxy", key == "https_proxy", key == "no_proxy":
			clean = append(clean, pair)
		}
	}
	return clean
}

// running is a site command that was started.
type running struct {
	s              *testSite
	args           []string
	command        *exec.Cmd
	stdout, stderr bytes.Buffer
	begun          time.Time
	cancel         context.CancelFunc
}

// start starts the real binary in the repository; the caller waits for it.
func (s *testSite) start(args ...string) *running {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), limit)
	r := &running{s: s, args: args, begun: time.Now(), cancel: cancel}
	r.command = exec.CommandContext(ctx, s.site, args...)
	r.command.Dir, r.command.Env = s.dir, s.environment()
	r.command.Stdout, r.command.Stderr = &r.stdout, &r.stderr
	// Its children are ended with it, whatever ends it.
	r.command.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	r.command.Cancel = func() error { return syscall.Kill(-r.command.Process.Pid, syscall.SIGKILL) }
	r.command.WaitDelay = 5 * time.Second
	if err := r.command.Start(); err != nil {
		cancel()
		s.t.Fatal(err)
	}
	return r
}

// signal sends a signal to the site process alone.
func (r *running) signal(sig syscall.Signal) {
	r.s.t.Helper()
	if err := r.command.Process.Signal(sig); err != nil {
		r.s.t.Fatalf("signal %s to site %s: %v", sig, strings.Join(r.args, " "), err)
	}
}

// wait ends when the command does; a killed one has code -1.
func (r *running) wait() result {
	r.s.t.Helper()
	err := r.command.Wait()
	defer r.cancel()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) && !errors.Is(err, exec.ErrWaitDelay) {
		r.s.t.Fatalf("site %s: %v", strings.Join(r.args, " "), err)
	}
	return result{
		args: r.args, stdout: r.stdout.String(), stderr: r.stderr.String(),
		code: r.command.ProcessState.ExitCode(), duration: time.Since(r.begun),
	}
}

// run runs the real binary in the repository.
func (s *testSite) run(args ...string) result {
	s.t.Helper()
	return s.start(args...).wait()
}

// must is run, and fails the test unless it ends with 0.
func (s *testSite) must(args ...string) result {
	s.t.Helper()
	got := s.run(args...)
	if got.code != 0 {
		s.t.Fatal(got)
	}
	return got
}

// bootstrap runs bootstrap-deploy with the root token.
func (s *testSite) bootstrap(args ...string) result {
	s.t.Helper()
	return s.must(append([]string{"bootstrap-deploy", "--root-token-file=" + s.tokenFile}, args...)...)
}

// plan is what a deploy would change.
func (s *testSite) plan(args ...string) []change {
	s.t.Helper()
	return s.changes(s.must(append([]string{"plan", "--json"}, args...)...))
}

// planCheck is `plan --check`: its exit code and the changes.
func (s *testSite) planCheck(args ...string) (int, []change) {
	s.t.Helper()
	got := s.run(append([]string{"plan", "--check", "--json"}, args...)...)
	if got.code != 0 && got.code != 2 {
		s.t.Fatal(got)
	}
	return got.code, s.changes(got)
}

// changes are those of a plan. A step that cannot be looked at before another is
// applied is one of Kind "unknown".
func (s *testSite) changes(got result) []change {
	s.t.Helper()
	var found plan.Result
	if err := json.Unmarshal([]byte(got.stdout), &found); err != nil {
		s.t.Fatalf("not a plan: %v\n%v", err, got)
	}
	var changes []change
	for _, outcome := range found.Outcomes {
		if outcome.Unknown != "" {
			changes = append(changes, change{Action: "wait", Kind: "unknown", Target: outcome.Step, Reason: "until " + outcome.Unknown})
		}
		changes = append(changes, outcome.Changes...)
	}
	return changes
}

// events are the lines that a run with --json printed.
func (s *testSite) events(got result) []plan.Event {
	s.t.Helper()
	var events []plan.Event
	decoder := json.NewDecoder(strings.NewReader(got.stdout))
	for {
		var event plan.Event
		err := decoder.Decode(&event)
		if errors.Is(err, io.EOF) {
			return events
		}
		if err != nil {
			s.t.Fatalf("not an event: %v\n%v", err, got)
		}
		events = append(events, event)
	}
}

// get asks the host for a page from outside, at a port that it listens on.
func (s *testSite) get(port int, path string) (string, error) {
	client := &http.Client{Timeout: 3 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	request, err := http.NewRequestWithContext(s.t.Context(), http.MethodGet, fmt.Sprintf("http://%s:%d%s", s.host.address, port, path), nil)
	if err != nil {
		return "", err
	}
	response, err := client.Do(request)
	if err != nil {
		return "", err
	}
	defer func() { _ = response.Body.Close() }()
	content, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode != http.StatusOK {
		err = fmt.Errorf("GET %s: %s: %s", path, response.Status, content)
	}
	return string(content), err
}

// version is the sha that the application "hello" says it was deployed from.
func (s *testSite) version() string {
	s.t.Helper()
	sha, err := s.tryVersion()
	if err != nil {
		s.t.Fatal(err)
	}
	return sha
}

func (s *testSite) tryVersion() (string, error) {
	content, err := s.get(8080, "/version")
	if err != nil {
		return "", err
	}
	var answer struct{ SHA string }
	if err := json.Unmarshal([]byte(content), &answer); err != nil {
		return "", fmt.Errorf("answer %q: %w", content, err)
	}
	return answer.SHA, nil
}

// until waits for a condition.
func (s *testSite) until(what string, within time.Duration, condition func() error) {
	s.t.Helper()
	if err := retry.Until(s.t.Context(), what, within, func(context.Context) error { return condition() }); err != nil {
		s.t.Fatal(err)
	}
}

// waitHealthy waits until a job's allocations run in podman, by Nomad's word
// and by podman's, and its service checks pass.
func (s *testSite) waitHealthy(job string) {
	s.t.Helper()
	s.until("job "+job+" to be healthy", 2*time.Minute, func() error { return s.healthy(job) })
}

func (s *testSite) healthy(job string) error {
	if job == "hello" { // the cheapest question first
		if _, err := s.tryVersion(); err != nil {
			return err
		}
	}
	var allocations []struct {
		ID, DesiredStatus, ClientStatus string
	}
	if err := s.tryNomad("/v1/job/"+job+"/allocations", &allocations); err != nil {
		return err
	}
	containers, err := s.tryContainers()
	if err != nil {
		return err
	}
	found := 0
	for _, allocation := range allocations {
		if allocation.DesiredStatus != "run" || allocation.ClientStatus == "complete" {
			continue
		}
		found++
		if allocation.ClientStatus != "running" {
			return fmt.Errorf("allocation %s is %s", allocation.ID, allocation.ClientStatus)
		}
		inPodman := false
		for _, each := range containers {
			inPodman = inPodman || strings.Contains(each.Name, allocation.ID)
		}
		if !inPodman {
			return fmt.Errorf("allocation %s has no running container", allocation.ID)
		}
		var checks map[string]struct{ Check, Status, Output string }
		if err := s.tryNomad("/v1/client/allocation/"+allocation.ID+"/checks", &checks); err != nil {
			return err
		}
		for _, check := range checks {
			if check.Status != "success" {
				return fmt.Errorf("check %s is %s: %s", check.Check, check.Status, check.Output)
			}
		}
	}
	if found == 0 {
		return fmt.Errorf("job %s has no allocations", job)
	}
	return nil
}

// nomad asks Nomad's API on the host itself, with the management token.
func (s *testSite) nomad(path string, into any) {
	s.t.Helper()
	if err := s.tryNomad(path, into); err != nil {
		s.t.Fatal(err)
	}
}

func (s *testSite) tryNomad(path string, into any) error {
	token, err := s.managementToken()
	if err != nil {
		return err
	}
	out, err := s.host.tryExec("env", "NOMAD_TOKEN="+token, "/opt/site/bin/nomad", "operator", "api", path)
	if err != nil {
		return fmt.Errorf("nomad %s: %w", path, err)
	}
	if err := json.Unmarshal([]byte(out), into); err != nil {
		return fmt.Errorf("nomad %s: %q: %w", path, out, err)
	}
	return nil
}

func (s *testSite) managementToken() (string, error) {
	token, err := seal.ReadRootToken(s.tokenFile)
	if err != nil {
		return "", err
	}
	path := filepath.Join(s.dir, "sites", name, "init.age")
	sealed, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	material, err := seal.Open(sealed, []secret.Value{token}, name, path)
	return material.NomadManagementToken.Reveal(), err
}

// container is one line of `podman ps` on the host, which lists those that run.
type container struct{ ID, Name, Image string }

// containers are those that run on the host.
func (s *testSite) containers() []container {
	s.t.Helper()
	found, err := s.tryContainers()
	if err != nil {
		s.t.Fatal(err)
	}
	return found
}

func (s *testSite) tryContainers() ([]container, error) {
	out, err := s.host.tryExec("podman", "ps", "--no-trunc", "--format", "{{.ID}}\t{{.Names}}\t{{.Image}}")
	if err != nil {
		return nil, err
	}
	var found []container
	for line := range strings.Lines(out) {
		fields := strings.Split(strings.TrimSpace(line), "\t")
		if len(fields) != 3 {
			return nil, fmt.Errorf("podman ps said %q", line)
		}
		found = append(found, container{fields[0], fields[1], fields[2]})
	}
	return found, nil
}

// testHost is a host, reached without ssh and so behind the product's back.
type testHost struct {
	site          *testSite
	name, address string
}

// exec runs a command on the host and returns its standard output.
func (h *testHost) exec(args ...string) string {
	h.site.t.Helper()
	out, err := h.tryExec(args...)
	if err != nil {
		h.site.t.Fatalf("%s: %s: %v", h.name, strings.Join(args, " "), err)
	}
	return out
}

func (h *testHost) tryExec(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(h.site.t.Context(), time.Minute)
	defer cancel()
	out, err := h.site.lab.Exec(ctx, h.name, args...)
	return string(out), err
}

// shell runs a script on the host; its first failing command ends it.
func (h *testHost) shell(script string) string {
	h.site.t.Helper()
	return h.exec("bash", "-euo", "pipefail", "-c", script)
}

// reboot ends when the host can be logged in to again.
func (h *testHost) reboot() {
	h.site.t.Helper()
	if err := h.site.lab.Reboot(h.site.t.Context(), h.name); err != nil {
		h.site.t.Fatal(err)
	}
}
