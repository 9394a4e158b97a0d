package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nomad-site/site/internal/plan"
)

// The kinds of faults that the product can be told to have behind a step.
const (
	faultError     = "error"
	faultInterrupt = "interrupt"
	faultKill      = "kill"
)

var faultKinds = []string{faultError, faultInterrupt, faultKill}

// fullVariable asks for every kind of fault behind every step, instead of one.
const fullVariable = "SITE_TEST_FULL"

// runWithFault runs site with a fault behind a step.
func (s *testSite) runWithFault(kind, step string, args ...string) result {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), limit)
	defer cancel()
	command := exec.CommandContext(ctx, s.site, args...)
	command.Dir, command.Env = s.dir, append(s.environment(), "SITE_TEST_FAULT="+kind+"@"+step)
	command.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	command.Cancel = func() error { return syscall.Kill(-command.Process.Pid, syscall.SIGKILL) }
	command.WaitDelay = 5 * time.Second
	var stdout, stderr strings.Builder
	command.Stdout, command.Stderr = &stdout, &stderr
	begun := time.Now()
	_ = command.Run() // its exit code says it
	return result{
		args: append([]string{kind + "@" + step + ":"}, args...), stdout: stdout.String(), stderr: stderr.String(),
		code: command.ProcessState.ExitCode(), duration: time.Since(begun),
	}
}

// wantFault insists that a run ended at its fault, and said so.
func (s *testSite) wantFault(got result, kind, step string) {
	s.t.Helper()
	code, says := 1, []string{"error: " + step + ": a fault was injected behind"}
	switch kind {
	case faultInterrupt:
		code, says = 130, []string{"error: " + step + ": interrupted\n", "hint: run it again"}
	case faultKill:
		code, says = -1, nil
	}
	if got.code != code {
		s.t.Fatalf("want exit code %d\n%v", code, got)
	}
	for _, each := range says {
		if !strings.Contains(got.stderr, each) {
			s.t.Errorf("it does not say %q\n%v", each, got)
		}
	}
	if strings.Contains(got.stderr, "warning: release") {
		s.t.Errorf("something temporary was not released\n%v", got)
	}
}

// tokenPattern is what tokens of OpenBao and of Vault look like.
const tokenPattern = `(hv[sbr]\.[A-Za-z0-9_-]{20,}|\bs\.[A-Za-z0-9]{24}\b)`

// wantNoTokens looks for tokens of OpenBao on the host: in files, processes and
// the journal. Only jobs have some, where Nomad puts them for their tasks. The
// rest are ours, or were.
func (s *testSite) wantNoTokens() {
	s.t.Helper()
	out := s.host.shell(`
		tasks() { find /var/lib/nomad/alloc -path '*/secrets/vault_token' -o -path '*/private/vault_token' 2>/dev/null; }
		pattern='` + tokenPattern + `'
		for file in $(tasks); do echo "task $file $(cat $file)"; done
		grep -roaE "$pattern" /etc /opt /root /home /tmp /run /srv /var --exclude-dir=blobs --exclude-dir=overlay 2>/dev/null | sed -E 's/^(.*):([^:]*)$/file \1 \2/' | sort -u || true
		for process in /proc/[0-9]*; do for kind in cmdline environ; do
			{ grep -oaE "$pattern" $process/$kind 2>/dev/null || true; } | while read -r token; do echo "process $process/$kind $token"; done
		done; done
		{ journalctl --output=cat --no-pager --all | grep -oaE "$pattern" || true; } | sort -u | while read -r token; do echo "journal journal $token"; done`)
	ofTasks := map[string]bool{}
	for line := range strings.Lines(out) {
		kind, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
		where, token, ok := strings.Cut(rest, " ")
		switch {
		case !ok:
			s.t.Fatalf("cannot read %q", line)
		case kind == "task":
			ofTasks[token] = true
		case ofTasks[token] && kind == "file" && ofTask.MatchString(where):
		case ofTasks[token] && kind == "process" && strings.HasSuffix(where, "/environ"):
		default:
			s.t.Errorf("the token %.9s… is in %s", token, where)
		}
	}
}

// ofTask is where Nomad and podman keep what belongs to a task.
var ofTask = regexp.MustCompile(`^/var/lib/nomad/alloc/[0-9a-f-]+/[a-z]+/(secrets|private)/vault_token$`)

// clean insists that a run left nothing behind but what it was meant to make.
func (s *testSite) clean(temp string) {
	s.t.Helper()
	s.wantEmpty(temp)
	secrets := s.temporarySecrets()
	s.wantNoSecretsInProcesses(secrets)
	for what, secret := range secrets {
		if what == "the unseal key" {
			delete(secrets, what)
			found := s.host.shell(`grep -rlF --binary-files=text -e '` + secret + `' /etc /opt /root /home /tmp /run /srv /var --exclude-dir=containers 2>/dev/null || true`)
			if found != "/etc/site/openbao-unseal.key\n" && found != "" {
				s.t.Errorf("%s is in plain in %q", what, found)
			}
		}
	}
	s.wantNoTokens()
}

func (s *testSite) temporarySecrets() map[string]string {
	return nil
}

// steps are those of a bootstrap, by the product's own list.
func (s *testSite) steps() []string {
	s.t.Helper()
	var found plan.Result
	got := s.must("plan", "--json", "--root-token-file="+s.tokenFile)
	if err := json.Unmarshal([]byte(got.stdout), &found); err != nil {
		s.t.Fatal(err)
	}
	var steps []string
	for _, outcome := range found.Outcomes {
		steps = append(steps, outcome.Step)
	}
	return steps
}

func TestScratch(t *testing.T) {
	s := newSite(t, platform, readOnly)
	t.Log(s.steps())
	out, err := os.ReadFile("/tmp/hyg/scan.sh")
	if err != nil {
		t.Fatal(err)
	}
	got, err := s.host.tryExec("bash", "-c", string(out))
	t.Log(got, err)
	_ = slices.Contains[[]string]
	_ = fmt.Sprint
}
