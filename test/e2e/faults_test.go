package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
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

// watcher sees each event of a run with --json as it is printed.
type watcher struct {
	seen    func(plan.Event)
	partial []byte
	all     bytes.Buffer
}

func (w *watcher) Write(data []byte) (int, error) {
	w.all.Write(data)
	w.partial = append(w.partial, data...)
	for {
		line, rest, whole := bytes.Cut(w.partial, []byte("\n"))
		if !whole {
			return len(data), nil
		}
		w.partial = rest
		var event plan.Event
		if json.Unmarshal(line, &event) == nil {
			w.seen(event)
		}
	}
}

// runWatched runs site with --json; seen is called with its process and each
// event, before the next one is read.
func (s *testSite) runWatched(seen func(*os.Process, plan.Event), args ...string) result {
	s.t.Helper()
	args = append(args, "--json")
	command := exec.CommandContext(s.t.Context(), s.site, args...)
	command.Dir, command.Env = s.dir, s.environment()
	command.WaitDelay = 5 * time.Second
	out := &watcher{seen: func(event plan.Event) { seen(command.Process, event) }}
	var stderr bytes.Buffer
	command.Stdout, command.Stderr = out, &stderr
	begun := time.Now()
	err := command.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		s.t.Fatalf("site %s: %v", strings.Join(args, " "), err)
	}
	return result{
		args: args, stdout: out.all.String(), stderr: stderr.String(),
		code: command.ProcessState.ExitCode(), duration: time.Since(begun),
	}
}

// moment is a point of a run.
type moment struct {
	step string
	kind plan.EventType
	// says is a part of the message, or empty.
	says string
	// share is how much of a transfer is done, at least.
	share float64
}

func (m moment) String() string { return fmt.Sprintf("%s in %s", m.kind, m.step) }

func (m moment) is(event plan.Event) bool {
	return event.Step == m.step && event.Type == m.kind && strings.Contains(event.Message, m.says) &&
		float64(event.Done) >= m.share*float64(event.Total)
}

// runUntil runs site and calls do once, at a moment that must come.
func (s *testSite) runUntil(when moment, do func(*os.Process), args ...string) result {
	s.t.Helper()
	came := false
	got := s.runWatched(func(process *os.Process, event plan.Event) {
		if !came && when.is(event) {
			came = true
			do(process)
		}
	}, args...)
	if !came {
		s.t.Fatalf("the run never came to %s\n%v", when, got)
	}
	return got
}

func (s *testSite) bootstrapArgs(args ...string) []string {
	return append([]string{"bootstrap-deploy", "--root-token-file=" + s.tokenFile}, args...)
}

// lockIsFree waits until nobody holds the site's lock.
func (s *testSite) lockIsFree(within time.Duration) {
	s.t.Helper()
	s.until("the lock to be free", within, func() error {
		if _, err := s.host.tryExec("test", "-e", "/var/lib/site/lock.json"); err == nil {
			return errors.New("it is held")
		}
		return nil
	})
}

// privateTemp gives the commands of a test a temporary folder of their own,
// short enough for sockets in it.
func privateTemp(t *testing.T) string {
	t.Helper()
	folder, err := os.MkdirTemp("/tmp", "e2e")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(folder) })
	t.Setenv("TMPDIR", folder)
	return folder
}

// wantEmpty fails the test where anything is in a folder of this machine.
func (s *testSite) wantEmpty(folder string) {
	s.t.Helper()
	var left []string
	if err := filepath.WalkDir(folder, func(path string, _ fs.DirEntry, err error) error {
		if path != folder {
			left = append(left, path)
		}
		return err
	}); err != nil || len(left) > 0 {
		s.t.Errorf("left on this machine: %s, %v", strings.Join(left, ", "), err)
	}
}

// processes gives the command lines of this machine's processes, those in the
// lab included, and their environments.
func processes(t *testing.T) (commands, environments []string) {
	t.Helper()
	for kind, into := range map[string]*[]string{"cmdline": &commands, "environ": &environments} {
		files, err := filepath.Glob("/proc/[0-9]*/" + kind)
		if err != nil || len(files) == 0 {
			t.Fatalf("no processes: %v", err)
		}
		for _, file := range files {
			if content, err := os.ReadFile(file); err == nil && len(content) > 0 { // it may have ended
				*into = append(*into, strings.ReplaceAll(string(content), "\x00", " "))
			}
		}
	}
	return commands, environments
}

// endedWith waits until no process has text in its command line.
func (s *testSite) endedWith(text string, within time.Duration) {
	s.t.Helper()
	s.until("the children of site to end", within, func() error {
		commands, _ := processes(s.t)
		for _, command := range commands {
			if strings.Contains(command, text) {
				return fmt.Errorf("there is still: %.200s", command)
			}
		}
		return nil
	})
}

// wantWholeStore fails the test where the host shows bytes under a digest that
// is not theirs, or a name for bytes that are not there.
func (s *testSite) wantWholeStore() {
	s.t.Helper()
	if bad := s.host.shell(`cd /var/lib/site/store 2>/dev/null || exit 0
		if [ -d blobs/sha256 ]; then cd blobs/sha256; find . -type f -exec sha256sum {} + | sed -nE '/^([0-9a-f]+)  \.\/\1$/!p'; cd ../..; fi
		if [ -d names ]; then { grep -rhoE 'sha256:[0-9a-f]{64}' names || true; } | sort -u | while read -r d; do
			[ -e "blobs/sha256/${d#sha256:}" ] || echo "$d has a name and no bytes"; done; fi`); bad != "" {
		s.t.Errorf("the store is half written:\n%s", bad)
	}
}

// wantNoLeftovers looks for anything temporary in our folders on the host.
func (s *testSite) wantNoLeftovers() {
	s.t.Helper()
	left := s.host.shell(`find /opt/site /etc/site /etc/nomad.d /var/lib/site \( -name '.*' -o -name '*.tmp' -o -name '*.new' \)
		find /var/lib/site/store/incoming /var/lib/site/store/tmp -mindepth 1
		find /tmp /root /var/tmp -maxdepth 2 -iname '*ansible*' ! -name .ansible
		find /root -path '*/.ansible/*' -type f
		ls -d /var/lib/site/lock.json 2>/dev/null || true`)
	if left != "" {
		s.t.Errorf("left on the host:\n%s", left)
	}
}

// secrets are the texts that must be nowhere in plain.
func (s *testSite) secrets() map[string]string {
	s.t.Helper()
	token, err := seal.ReadRootToken(s.tokenFile)
	if err != nil {
		s.t.Fatal(err)
	}
	path := filepath.Join(s.dir, "sites", name, "init.age")
	material, err := seal.Open([]byte(s.read(path)), []secret.Value{token}, name, path)
	if err != nil {
		s.t.Fatal(err)
	}
	return map[string]string{
		"the site root token":        token.Reveal(),
		"Nomad's management token":   material.NomadManagementToken.Reveal(),
		"the gossip key":             material.GossipKey.Reveal(),
		"the site CA's private key":  strings.Split(material.CAKeyPEM.Reveal(), "\n")[1],
		"its second line, if folded": strings.Split(material.CAKeyPEM.Reveal(), "\n")[2],
	}
}

// wantNoSecretsInProcesses looks at all processes as they are now.
func (s *testSite) wantNoSecretsInProcesses(secrets map[string]string) {
	s.t.Helper()
	commands, environments := processes(s.t)
	for what, secret := range secrets {
		for _, command := range commands {
			if strings.Contains(command, secret) {
				s.t.Errorf("%s is in a command line: %.60s…", what, command)
			}
		}
		for _, environment := range environments {
			if strings.Contains(environment, secret) {
				s.t.Errorf("%s is in the environment of a process", what)
			}
		}
	}
}

// wantNoSecretsOnHost looks into the files and the journal of the host.
func (s *testSite) wantNoSecretsOnHost(secrets map[string]string) {
	s.t.Helper()
	journal := s.host.exec("journalctl", "--output=cat", "--no-pager", "--all")
	if !strings.Contains(journal, "site-host") {
		s.t.Error("the journal says nothing: this proves nothing")
	}
	for what, secret := range secrets {
		if strings.Contains(journal, secret) {
			s.t.Errorf("%s is in the journal", what)
		}
		// Nomad keeps its own in /var/lib/nomad, for root alone.
		found := s.host.shell(`grep -rlF --binary-files=text -e ` + "'" + secret + "'" +
			` /etc /opt /root /home /tmp /run /srv /var --exclude-dir=nomad --exclude-dir=containers 2>/dev/null || true`)
		var wrong []string
		for file := range strings.Lines(found) {
			if file = strings.TrimSpace(file); file != "/etc/nomad.d/gossip.hcl" || what != "the gossip key" {
				wrong = append(wrong, file)
			}
		}
		if len(wrong) > 0 {
			s.t.Errorf("%s is in plain in %s", what, strings.Join(wrong, ", "))
		}
		if what == "the gossip key" && found == "" {
			s.t.Error("the gossip key is not even where Nomad reads it: this proves nothing")
		}
	}
	for _, path := range []string{"/etc/nomad.d/gossip.hcl", "/etc/site/init.age", "/var/lib/nomad", "/var/lib/site"} {
		if mode := strings.TrimSpace(s.host.exec("stat", "-c", "%A %U", path)); !strings.HasSuffix(mode, "------ root") {
			s.t.Errorf("%s is %s: others can look into it", path, mode)
		}
	}
}

// wantDone ends a test of faults: all is as if there had been none.
func (s *testSite) wantDone() {
	s.t.Helper()
	if got := s.run("plan", "--check"); got.code != 0 {
		s.t.Errorf("there is something left to do\n%v", got)
	}
	s.waitHealthy("hello")
	s.wantWholeStore()
	s.wantNoLeftovers()
}

func TestSiteIsKilledAtEachStepOfABootstrapAndTheNextRunGoesOn(t *testing.T) {
	s := newSite(t, bare)
	temp := privateTemp(t)
	reached := []string{}
	for _, when := range []moment{
		{step: "site-host", kind: plan.StepPlanned},
		{step: "site-host", kind: plan.StepBytes, share: 0.5},
		{step: "init material", kind: plan.StepStarted},
		{step: "platform artifacts", kind: plan.StepPlanned},
		{step: "platform artifacts", kind: plan.StepBytes, share: 0.4},
		{step: "packages", kind: plan.StepProgress, says: "installing"},
		{step: "host", kind: plan.StepPlanned},
		{step: "host", kind: plan.StepProgress, says: "files"},
		{step: "nomad", kind: plan.StepProgress, says: "bootstrapping"},
		{step: "artifacts", kind: plan.StepPlanned},
		{step: "artifacts", kind: plan.StepBytes, share: 0.3},
		{step: "jobs", kind: plan.StepPlanned},
		{step: "jobs", kind: plan.StepProgress, says: "deployment is running"},
		{step: "release", kind: plan.StepStarted},
	} {
		got := s.runUntil(when, func(process *os.Process) {
			_ = process.Signal(syscall.SIGSTOP) // it stays here while we look
			if _, err := os.Stat(filepath.Join(s.dir, "sites", name, "init.age")); err == nil {
				s.wantNoSecretsInProcesses(s.secrets())
			}
			_ = process.Kill()
		}, s.bootstrapArgs()...)
		// The last step takes milliseconds: it may be over before the signal comes.
		if got.code != -1 && (when.step != "release" || got.code != 0) {
			t.Fatalf("not killed at %s\n%v", when, got)
		}
		reached = append(reached, when.String())
		s.endedWith(temp, 30*time.Second) // ssh keeps an idle connection for 20 s
		s.lockIsFree(10 * time.Second)
		s.wantWholeStore()
	}
	t.Logf("killed at: %s", strings.Join(reached, ", "))
	s.bootstrap()
	if version := s.version(); version != s.head() {
		t.Errorf("version %s, want %s", version, s.head())
	}
	s.wantDone()
	secrets := s.secrets()
	s.wantNoSecretsInProcesses(secrets)
	s.wantNoSecretsOnHost(secrets)
	s.wantEmpty(temp)
	found, err := filepath.Glob(filepath.Join(s.dir, "sites", name, ".*"))
	if err != nil || len(found) > 0 {
		t.Errorf("left in the repository: %v, %v", found, err)
	}
}

func TestAnInterruptEndsTheStepAndGivesTheLockBack(t *testing.T) {
	s := newSite(t)
	temp := privateTemp(t)
	s.host.shell("echo '# edited' >> /etc/nomad.d/nomad.hcl")
	got := s.runUntil(moment{step: "host", kind: plan.StepProgress}, func(process *os.Process) {
		if commands, _ := processes(t); !strings.Contains(strings.Join(commands, "\n"), temp) {
			t.Error("Ansible does not run: this proves nothing")
		}
		if err := process.Signal(syscall.SIGINT); err != nil {
			t.Error(err)
		}
	}, "deploy")
	if got.code != 130 || !strings.Contains(got.stderr, "error: host: interrupted\nhint: run it again") {
		t.Errorf("want exit code 130 and the way on\n%v", got)
	}
	if commands, _ := processes(t); strings.Contains(strings.Join(commands, "\n"), temp) {
		t.Error("children outlive the command")
	}
	s.wantEmpty(temp)
	if out, err := s.host.tryExec("cat", "/var/lib/site/lock.json"); err == nil {
		t.Errorf("the lock is still held: %s", out)
	}
	s.must("deploy")
	s.wantDone()
}

func TestAFullDiskIsSaidAndTheNextRunGoesOn(t *testing.T) {
	s := newSite(t, bare)
	s.host.shell("mkdir -p -m 700 /var/lib/site/store && mount -t tmpfs -o size=48m,mode=700 tmpfs /var/lib/site/store")
	got := s.run(s.bootstrapArgs()...)
	s.wantRefusal(got, []string{"platform artifacts", s.host.name, "/var/lib/site/store", "no space left"}, []string{"free some space on " + s.host.name})
	s.lockIsFree(10 * time.Second)
	s.wantWholeStore()
	before := s.host.shell("ls /var/lib/site/store/blobs/sha256 | wc -l; ls /var/lib/site/store/incoming | wc -l")
	s.host.exec("mount", "-o", "remount,size=1g", "/var/lib/site/store")
	got = s.must(s.bootstrapArgs("--json")...)
	first := s.transfers(got)[0]
	if first.chunks >= first.of {
		t.Errorf("all %d chunks were sent again, although there were blobs and chunks there: %s", first.of, before)
	}
	s.wantDone()
}

// proxy stands between site and a host. It counts, cuts and falls silent.
type proxy struct {
	listener net.Listener
	target   string
	// limit is after how many bytes to the host all connections are cut; 0: never.
	limit  atomic.Int64
	toHost atomic.Int64
	silent atomic.Bool

	mutex sync.Mutex
	open  map[net.Conn]bool
}

// behindProxy makes the repository reach its host through a proxy.
func (s *testSite) behindProxy() *proxy {
	s.t.Helper()
	listener, err := (&net.ListenConfig{}).Listen(s.t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		s.t.Fatal(err)
	}
	p := &proxy{listener: listener, target: net.JoinHostPort(s.host.address, "22"), open: map[net.Conn]bool{}}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			serving.Go(func() { p.serve(conn) })
		}
	})
	s.t.Cleanup(func() {
		_ = listener.Close()
		p.cut()
		serving.Wait()
	})
	s.useSSHConfig("HostName 127.0.0.1", fmt.Sprintf("Port %d", listener.Addr().(*net.TCPAddr).Port), "HostKeyAlias "+s.host.address)
	return p
}

// useSSHConfig puts settings before those of the lab: the first one counts.
func (s *testSite) useSSHConfig(settings ...string) {
	s.t.Helper()
	s.write(filepath.Join(s.dir, ".lab", name, "ssh_config"),
		"Host "+s.host.name+"\n    "+strings.Join(settings, "\n    ")+"\n\n"+s.read(s.lab.SSHConfig()))
}

func (p *proxy) serve(client net.Conn) {
	host, err := net.Dial("tcp", p.target) //nolint:noctx // ends with the listener
	if err != nil {
		_ = client.Close()
		return
	}
	p.mutex.Lock()
	p.open[client], p.open[host] = true, true
	p.mutex.Unlock()
	var copying sync.WaitGroup
	for _, way := range []struct {
		to, from net.Conn
		counted  bool
	}{{host, client, true}, {client, host, false}} {
		copying.Go(func() {
			defer func() {
				if !p.silent.Load() { // else nobody hears of the end either
					_, _ = way.to.Close(), way.from.Close()
				}
			}()
			buffer := make([]byte, 32<<10)
			for {
				n, err := way.from.Read(buffer)
				if p.silent.Load() && n > 0 {
					continue // lost on the way; nobody is told
				}
				if way.counted {
					if sum := p.toHost.Add(int64(n)); p.limit.Load() > 0 && sum > p.limit.Load() {
						p.cut()
						return
					}
				}
				if _, failed := way.to.Write(buffer[:n]); failed != nil || err != nil {
					return
				}
			}
		})
	}
	copying.Wait()
}

// cut ends all connections.
func (p *proxy) cut() {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	for conn := range p.open {
		_ = conn.Close()
	}
	clear(p.open)
}

func TestAConnectionIsCutAndTheNextRunSendsOnlyTheRest(t *testing.T) {
	s := newSite(t, bare)
	p := s.behindProxy()
	const cutAt = 40 << 20
	p.limit.Store(cutAt)
	got := s.run(s.bootstrapArgs()...)
	s.wantRefusal(got, []string{"platform artifacts: ", s.host.name, "ssh connection lost"}, []string{"run the same command again", "goes on from where it stopped"})
	s.lockIsFree(10 * time.Second)
	s.wantWholeStore()

	p.limit.Store(0)
	p.toHost.Store(0)
	got = s.must(s.bootstrapArgs("--json")...)
	rest := s.transfers(got)[0]
	if rest.chunks >= rest.of || rest.chunks == 0 {
		t.Errorf("sent %d of %d chunks: the run did not go on from where it was cut", rest.chunks, rest.of)
	}
	s.wantDone()

	// What all of it costs, for comparison: the same to a host without anything.
	s.host.shell("systemctl stop site-host.service && rm -rf /var/lib/site/store/*")
	whole := s.transfers(s.must(s.bootstrapArgs("--json")...))[0]
	t.Logf("the whole is %d bytes on the wire, the rest was %d", whole.wire, rest.wire)
	if saved := whole.wire - rest.wire; saved < cutAt/2 {
		t.Errorf("after a cut at %d bytes only %d bytes of %d were saved", cutAt, saved, whole.wire)
	}
}

func TestASilentNetworkEndsTheRunAndFreesTheLock(t *testing.T) {
	s := newSite(t)
	p := s.behindProxy()
	s.commit("more memory", map[string]string{"jobs/hello/hello.nomad.hcl": s.replace("jobs/hello/hello.nomad.hcl", "memory = 64", "memory = 72")})
	var silent time.Time
	got := s.runUntil(moment{step: "jobs", kind: plan.StepProgress}, func(*os.Process) {
		silent = time.Now()
		p.silent.Store(true)
	}, "deploy")
	s.wantRefusal(got, []string{"jobs: ", s.host.name, "ssh connection lost", "no answer for"}, []string{"run the same command again"})
	if took := time.Since(silent); took > 40*time.Second {
		t.Errorf("silence was noticed after %s", took)
	}
	// The host hears nothing either, no end: only the missing heartbeat tells it.
	s.lockIsFree(time.Until(silent.Add(50 * time.Second)))
	p.cut()
	p.silent.Store(false)
	s.must("deploy")
	if version := s.version(); version != s.head() {
		t.Errorf("version %s, want %s", version, s.head())
	}
	s.wantDone()
}

func TestAHostLosesItsPowerMidDeployAndTheNextRunFinishes(t *testing.T) {
	s := newSite(t)
	s.commit("another application", map[string]string{
		"jobs/hello/app/main.go": s.source("jobs/hello/app/main.go") + "\nvar _ = \"changed\"\n",
		// Enough to be sent that the power goes in the middle of it.
		"jobs/hello/component.hcl": "artifact \"hello\" {\n  go_package = \"./jobs/hello/app\"\n}\n\nartifact \"words\" {\n  kind = \"file\"\n  path = \"words\"\n}\n",
		"words":                    string(newWords(24 << 20)),
	})
	var off time.Time
	got := s.runUntil(moment{step: "artifacts", kind: plan.StepBytes, share: 0.2}, func(*os.Process) {
		off = time.Now()
		if err := s.lab.Kill(t.Context(), s.host.name); err != nil {
			t.Error(err)
		}
	}, "deploy")
	s.wantRefusal(got, []string{"artifacts: ", s.host.name, "ssh connection lost"}, []string{"run the same command again"})
	if took := time.Since(off); took > 30*time.Second {
		t.Errorf("the loss of power was noticed after %s", took)
	}
	off = time.Now()
	s.wantRefusal(s.run("deploy"), []string{"connect: ", s.host.name}, []string{"is the host up"})
	t.Logf("a host without power is reported after %s", time.Since(off).Round(time.Millisecond))
	if err := s.lab.Start(t.Context(), s.host.name); err != nil {
		t.Fatal(err)
	}
	s.must("deploy") // its lock died with the process that held it
	if version := s.version(); version != s.head() {
		t.Errorf("version %s, want %s", version, s.head())
	}
	s.wantDone()
}
