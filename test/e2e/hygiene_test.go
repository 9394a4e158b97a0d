package e2e

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/seal"
	"github.com/nomad-site/site/internal/secret"
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

func (s *testSite) wantNoTokens() {
	s.t.Helper()
	for _, where := range s.tokens() {
		s.t.Errorf("a token of OpenBao is in %s", where)
	}
}

// tokens says where on the host there are tokens of OpenBao: files, processes or
// the journal. Only jobs may have some, where Nomad puts them for their tasks,
// and those are left out. The rest are ours, or were.
func (s *testSite) tokens() []string {
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
	var found []string
	for line := range strings.Lines(out) {
		kind, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
		where, token, ok := strings.Cut(rest, " ")
		switch {
		case !ok:
			s.t.Fatalf("cannot read %q", line)
		case kind == "task":
			ofTasks[token] = true
		case ofTasks[token] && kind == "file" && ofTask.MatchString(where):
		case kind == "file" && slices.Contains(ofTasksOnce, where):
		case ofTasks[token] && kind == "process" && strings.HasSuffix(where, "/environ"):
		default:
			found = append(found, where)
		}
	}
	return found
}

// ofTask are the places where Nomad and podman keep what belongs to a task.
var ofTask = regexp.MustCompile(`^(/var/lib/nomad/alloc/[0-9a-f-]+/[a-z-]+/(secrets|private)/vault_token` +
	`|/run/crun/[0-9a-f]+/config.json|/var/lib/containers/storage/overlay-containers/[0-9a-f]+/userdata/config.json)$`)

// ofTasksOnce are the databases of Nomad's client and of podman, for root alone.
// They hold the environment of tasks that ended, too.
var ofTasksOnce = []string{"/var/lib/nomad/client/state.db", "/var/lib/containers/storage/libpod/bolt_state.db"}

// homes are the only places where a secret may lie in plain.
var homes = map[string]string{
	"the gossip key":       "/etc/nomad.d/gossip.hcl",
	"OpenBao's unseal key": "/etc/site/openbao-unseal.key",
}

// hasMaterial: the run came so far that there is an init.age.
func (s *testSite) hasMaterial() bool {
	_, err := os.Stat(filepath.Join(s.dir, "sites", name, "init.age"))
	return err == nil
}

// wantNothingInPlain looks for the site's own secrets on this machine and on the host.
func (s *testSite) wantNothingInPlain() {
	s.t.Helper()
	if !s.hasMaterial() {
		return
	}
	secrets := s.secrets()
	if key := s.material().OpenBaoUnsealKey.Reveal(); key != "" {
		secrets["OpenBao's unseal key"] = key
	}
	if tokens := s.nomadTokens(); len(tokens) > 0 { // the older ones were looked for before
		s.nomad("/v1/acl/token/"+tokens[0].AccessorID, &tokens[0])
		secrets["an operator's token of Nomad"] = tokens[0].SecretID
	}
	s.wantNoSecretsInProcesses(secrets)
	var patterns []string
	for _, secret := range secrets {
		patterns = append(patterns, "-e '"+secret+"'")
	}
	// Nomad's servers keep tokens and keys of their own there, for root alone.
	found := s.host.shell(`{ grep -roaF ` + strings.Join(patterns, " ") +
		` /etc /opt /root /home /tmp /run /srv /var --exclude-dir=blobs --exclude-dir=overlay 2>/dev/null || true; } | { grep -v '^/var/lib/nomad/server/' || true; }`)
	journal := s.host.exec("journalctl", "--output=cat", "--no-pager", "--all")
	for what, secret := range secrets {
		for line := range strings.Lines(found) {
			file, match, _ := strings.Cut(strings.TrimSpace(line), ":")
			if match == secret && file != homes[what] {
				s.t.Errorf("%s is in plain in %s", what, file)
			}
		}
		if strings.Contains(journal, secret) {
			s.t.Errorf("%s is in the journal", what)
		}
	}
}

// nobodyIsLoggedIn insists that no operator's token is good any more, in OpenBao
// and in Nomad.
func (s *testSite) nobodyIsLoggedIn() {
	s.t.Helper()
	if s.material().OpenBaoReady {
		s.onlyJobsAreIn()
	}
	for _, token := range s.nomadTokens() {
		// It cannot be given back: Nomad lets only a management token do that.
		if token.ExpirationTime == nil || time.Until(*token.ExpirationTime) > 30*time.Minute {
			s.t.Errorf("the token %q of Nomad is good until %v", token.Name, token.ExpirationTime)
		}
	}
}

// nomadTokens are those of operators, the newest first; there are none before Nomad is up.
func (s *testSite) nomadTokens() []nomadToken {
	s.t.Helper()
	var tokens []nomadToken
	if err := s.tryNomad("/v1/acl/tokens", &tokens); err != nil {
		return nil
	}
	tokens = slices.DeleteFunc(tokens, func(token nomadToken) bool { return token.Name == "Bootstrap Token" })
	slices.SortFunc(tokens, func(a, b nomadToken) int { return cmp.Compare(b.CreateIndex, a.CreateIndex) })
	return tokens
}

type nomadToken struct {
	Name, AccessorID, SecretID string
	CreateIndex                uint64
	ExpirationTime             *time.Time
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

func TestAFaultBehindEachStepLeavesNoTokenAndTheNextRunGoesOn(t *testing.T) {
	s := newSite(t, platform, bare)
	temp := privateTemp(t)
	steps := s.steps()
	if len(steps) < 10 || !slices.Contains(steps, "openbao") {
		t.Fatalf("these are not the steps of a bootstrap: %v", steps)
	}
	s.faultsBehind(steps, temp, s.bootstrapArgs()...)
	s.bootstrap()
	if says, err := s.answer(); err != nil || says.SHA != s.head() || says.Rows < 1 {
		t.Errorf("the application says %+v, %v", says, err)
	}
	s.wantDone()
	s.nobodyIsLoggedIn()

	s.commit("the sealed init material", nil)
	var daily []string
	for _, event := range s.events(s.must("deploy", "--json")) {
		if event.Type == plan.StepStarted {
			daily = append(daily, event.Step)
		}
	}
	s.faultsBehind(daily, temp, "deploy")
	s.must("deploy")
	s.wantDone()
	s.nobodyIsLoggedIn()
	s.wantNoTokens()
	s.wantNothingInPlain()
	s.wantEmpty(temp)

	// What is looked for would be found.
	s.host.shell(`token=hvs.$(printf 'A%.0s' $(seq 24)); echo $token > /var/tmp/planted; logger "planted $token"; journalctl --flush
		PLANTED=$token setsid sleep 60 >/dev/null 2>&1 &`)
	planted := strings.Join(s.tokens(), " ")
	for _, want := range []string{"/var/tmp/planted", "/environ", "journal"} {
		if !strings.Contains(planted, want) {
			t.Errorf("a token that was planted was found in %q, not in %s: all this proves nothing", planted, want)
		}
	}
}

// faultsBehind has runs of one command end behind each step, one after the other.
func (s *testSite) faultsBehind(steps []string, temp string, args ...string) {
	s.t.Helper()
	for number, step := range steps {
		kinds := faultKinds
		// Before the step "openbao" nobody can be logged in: one kind is enough.
		if os.Getenv(fullVariable) == "" && number < slices.Index(steps, "openbao") {
			kinds = faultKinds[number%len(faultKinds):][:1]
		}
		for _, kind := range kinds {
			s.t.Run(fmt.Sprintf("%s: %s behind %s", args[0], kind, step), func(t *testing.T) {
				s := s.in(t)
				got := s.runWithFault(kind, step, args...)
				s.wantFault(got, kind, step)
				looking := time.Now()
				if kind == faultKill {
					s.endedWith(temp, 30*time.Second) // ssh keeps an idle connection for 20 s
				} else {
					s.wantEmpty(temp)
					if s.hasMaterial() {
						s.nobodyIsLoggedIn()
					}
				}
				s.lockIsFree(10 * time.Second)
				s.wantNoTokens()
				s.wantNothingInPlain()
				t.Logf("the run took %s, the look %s", got.duration.Round(time.Millisecond), time.Since(looking).Round(time.Millisecond))
			})
		}
	}
}

// keepMaterial changes the init material, here or on the host, or both, behind
// the product's back.
func (s *testSite) keepMaterial(here, onHost bool, change func(*seal.Material)) {
	s.t.Helper()
	token, err := seal.ReadRootToken(s.tokenFile)
	if err != nil {
		s.t.Fatal(err)
	}
	material := s.material()
	change(&material)
	sealed, err := seal.Seal(material, token)
	if err != nil {
		s.t.Fatal(err)
	}
	if here {
		s.write(filepath.Join(s.dir, "sites", name, "init.age"), string(sealed))
	}
	if onHost {
		s.host.shell("cat > /etc/site/init.age <<'END'\n" + string(sealed) + "END\n")
	}
}

// forgetOpenBao makes the site one whose OpenBao was never initialised.
func (s *testSite) forgetOpenBao() {
	s.t.Helper()
	s.host.exec("env", "NOMAD_TOKEN="+s.token(), "/opt/site/bin/nomad", "job", "stop", "-detach", "openbao")
	s.until("OpenBao to stop", time.Minute, func() error {
		containers, err := s.tryContainers()
		if err == nil && slices.ContainsFunc(containers, func(one container) bool { return strings.HasPrefix(one.Name, "openbao-") }) {
			err = errors.New("it runs")
		}
		return err
	})
	s.host.shell("find /var/lib/openbao -mindepth 1 -delete; rm -f /etc/site/openbao-unseal.key")
	s.keepMaterial(true, true, func(m *seal.Material) { m.OpenBaoUnsealKey, m.OpenBaoReady = secret.Value{}, false })
}

// cluster tells one initialised OpenBao from another.
func (s *testSite) cluster() string {
	s.t.Helper()
	var health struct {
		Cluster string `json:"cluster_id"`
	}
	s.bao().must("GET", "sys/health", nil, &health)
	if health.Cluster == "" {
		s.t.Fatal("OpenBao does not say which one it is")
	}
	return health.Cluster
}

// rootTokens is how many are good.
func (s *testSite) rootTokens() int {
	s.t.Helper()
	b := s.bao()
	var accessors struct {
		Data struct{ Keys []string } `json:"data"`
	}
	b.must("LIST", "auth/token/accessors", nil, &accessors)
	found := 0
	for _, accessor := range accessors.Data.Keys {
		var token struct {
			Data struct{ Policies []string } `json:"data"`
		}
		b.must("POST", "auth/token/lookup-accessor", map[string]string{"accessor": accessor}, &token)
		if slices.Contains(token.Data.Policies, "root") {
			found++
		}
	}
	return found
}

// slowProxy holds back what site sends to the host once it is told to, so that
// a request can be caught on its way.
type slowProxy struct {
	delay atomic.Int64
	mutex sync.Mutex
	open  []net.Conn
}

func (s *testSite) behindSlowProxy() *slowProxy {
	s.t.Helper()
	listener, err := (&net.ListenConfig{}).Listen(s.t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		s.t.Fatal(err)
	}
	p := &slowProxy{}
	target := net.JoinHostPort(s.host.address, "22")
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			host, err := net.Dial("tcp", target) //nolint:noctx // ends with the listener
			if err != nil {
				_ = client.Close()
				continue
			}
			p.mutex.Lock()
			p.open = append(p.open, client, host)
			p.mutex.Unlock()
			serving.Go(func() { p.carry(host, client, &p.delay) })
			serving.Go(func() { p.carry(client, host, new(atomic.Int64)) })
		}
	})
	s.useSSHConfig("HostName 127.0.0.1", fmt.Sprintf("Port %d", listener.Addr().(*net.TCPAddr).Port), "HostKeyAlias "+s.host.address)
	s.t.Cleanup(func() {
		_ = listener.Close()
		p.cut()
		serving.Wait()
		s.write(filepath.Join(s.dir, ".lab", name, "ssh_config"), s.read(s.lab.SSHConfig()))
	})
	return p
}

func (p *slowProxy) carry(to, from net.Conn, delay *atomic.Int64) {
	defer func() { _, _ = to.Close(), from.Close() }()
	buffer := make([]byte, 32<<10)
	for {
		n, err := from.Read(buffer)
		<-time.After(time.Duration(delay.Load())) // a slow line
		if _, failed := to.Write(buffer[:n]); failed != nil || err != nil {
			return
		}
	}
}

func (p *slowProxy) cut() {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	for _, conn := range p.open {
		_ = conn.Close()
	}
	p.open = nil
}

// cutShort ends a run at a message of its step "openbao", and looks around.
func (s *testSite) cutShort(temp string, args []string, kind, message string) {
	s.t.Helper()
	s.t.Run(kind+" at "+message, func(t *testing.T) {
		s := s.in(t)
		signal := map[string]syscall.Signal{faultKill: syscall.SIGKILL, faultInterrupt: syscall.SIGINT}[kind]
		when := moment{step: "openbao", kind: plan.StepProgress, says: message}
		got := s.runUntil(when, func(process *os.Process) { _ = process.Signal(signal) }, args...)
		if want := map[string]int{faultKill: -1, faultInterrupt: 130}[kind]; got.code != want {
			t.Fatalf("want exit code %d\n%v", want, got)
		}
		if kind == faultKill {
			s.endedWith(temp, 30*time.Second)
		} else {
			s.wantEmpty(temp)
			if strings.Contains(got.stderr, "release") {
				t.Errorf("something temporary was not released\n%v", got)
			}
		}
		s.lockIsFree(10 * time.Second)
		s.wantNoTokens()
		s.wantNothingInPlain()
		t.Logf("the run took %s", got.duration.Round(time.Millisecond))
	})
}

func TestAFaultInsideTheOpenBaoStepLosesNothing(t *testing.T) {
	s := newSite(t, platform)
	temp := privateTemp(t)
	// What ran on the OpenBao that is forgotten here gets a new password.
	args := s.bootstrapArgs("--remake-secret=hello.database_password")
	s.forgetOpenBao()
	for _, message := range []string{"initialising", "sealing the unseal key", "unsealing", "making mounts"} {
		s.cutShort(temp, args, faultKill, message)
		s.cutShort(temp, args, faultInterrupt, message)
	}
	s.must(args...)
	s.nobodyIsLoggedIn()
	s.wantDone()

	t.Run("a first root token that was lost is revoked by the next run", func(t *testing.T) {
		s := s.in(t)
		s.forgetOpenBao()
		p := s.behindSlowProxy()
		at := func(message string) moment { return moment{step: "openbao", kind: plan.StepProgress, says: message} }
		got := s.runWatched(func(process *os.Process, event plan.Event) {
			switch {
			case at("making mounts").is(event):
				p.delay.Store(int64(150 * time.Millisecond))
			case at("revoking the first root token").is(event):
				_ = process.Kill()
				p.cut() // what it still sent never arrives
			}
		}, args...)
		if got.code != -1 {
			t.Fatalf("not killed\n%v", got)
		}
		p.delay.Store(0)
		if found := s.rootTokens(); found != 1 {
			t.Fatalf("%d root tokens are good, want the one that was lost: this proves nothing", found)
		}
		s.lockIsFree(10 * time.Second)
		s.cutShort(temp, args, faultInterrupt, "telling Nomad")
		if !s.material().OpenBaoReady {
			t.Error("OpenBao is not ready")
		}
		s.nobodyIsLoggedIn()
	})

	s.must(args...)
	s.forgetOpenBao()
	s.cutShort(temp, args, faultInterrupt, "revoking the first root token")
	s.cutShort(temp, args, faultKill, "telling Nomad")
	cluster := s.cluster()
	s.must(args...)
	if again := s.cluster(); again != cluster {
		t.Error("an OpenBao that was ready was wiped")
	}
	s.nobodyIsLoggedIn()
	s.wantDone()

	password := s.must("secrets", "get", "hello.database_password", "--reveal").stdout
	newest := s.read(filepath.Join(s.dir, "sites", name, "init.age"))
	for _, test := range []struct {
		what         string
		here, onHost bool
		// lost: even the unseal key is not in it.
		lost    bool
		refused bool
	}{
		{what: "in the work tree, from before it was ready", here: true},
		{what: "in the work tree, from before its unseal key", here: true, lost: true},
		{what: "on the host, from before its unseal key", onHost: true, lost: true},
		{what: "in both places, from before it was ready", here: true, onHost: true},
		{what: "in both places, from before its unseal key", here: true, onHost: true, lost: true, refused: true},
	} {
		t.Run("an older init.age "+test.what+" wipes nothing", func(t *testing.T) {
			s := s.in(t)
			s.keepMaterial(test.here, test.onHost, func(m *seal.Material) {
				m.OpenBaoReady = false
				m.Generation -= 2
				if test.lost {
					m.OpenBaoUnsealKey = secret.Value{}
				}
			})
			if test.refused {
				s.wantRefusal(s.run(s.bootstrapArgs()...), []string{"openbao: ", "init.age", "holds a site's secrets"}, []string{"init.age"})
			} else {
				s.must(s.bootstrapArgs()...)
			}
			if s.cluster() != cluster {
				t.Error("it was wiped")
			}
			if again := s.must("secrets", "get", "hello.database_password", "--reveal").stdout; again != password {
				t.Error("a secret is another one now")
			}
			if err := errors.Join(s.healthy("openbao"), s.healthy("hello")); err != nil {
				t.Error(err)
			}
			s.write(filepath.Join(s.dir, "sites", name, "init.age"), newest)
			s.host.shell("cat > /etc/site/init.age <<'END'\n" + newest + "END\n")
		})
	}
	s.wantDone()
	s.wantEmpty(temp)
}
