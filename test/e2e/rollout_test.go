package e2e

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"text/template"
	"time"

	"github.com/nomad-site/site/internal/adapter/nomad"
	"github.com/nomad-site/site/internal/plan"
)

// probe is a component whose application behaves as it is told.
type probe struct {
	Name string
	Mode string
	Port int
	// Type is the job's; empty for a service.
	Type string
	// Image replaces the image of the artifact, by an HCL expression.
	Image string
	// Config, Constraint and Update are lines of HCL.
	Config, Constraint, Update string
	// Memory in MiB; 32 where it is not set.
	Memory int
	After  []string
}

// quickUpdate lets a broken rollout be told within seconds.
const quickUpdate = `update {
      min_healthy_time  = "1s"
      healthy_deadline  = "10s"
      progress_deadline = "20s"
      auto_revert       = true
    }`

var probeFiles = template.Must(template.New("").Parse(`
{{define "component"}}
after = [{{range .After}}"{{.}}", {{end}}]

artifact "behave" {
  go_package = "./behave"
}
{{end}}

{{define "job"}}
variable "artifacts" {
  type = map(string)
}

job "{{.Name}}" {
  type = "{{.Type}}"

  group "{{.Name}}" {
    {{.Constraint}}

    network {
      mode = "host"
      port "http" {
        static = {{.Port}}
      }
    }

    {{.Update}}

    restart {
      attempts = {{if eq .Type "batch"}}0{{else}}1{{end}}
      interval = "1m"
      delay    = "1s"
      mode     = "fail"
    }
{{if ne .Type "system"}}
    reschedule {
      attempts  = 0
      unlimited = false
    }
{{end}}
{{if ne .Type "batch"}}
    service {
      name     = "{{.Name}}"
      provider = "nomad"
      port     = "http"

      check {
        name     = "answers"
        type     = "http"
        path     = "/healthz"
        interval = "1s"
        timeout  = "1s"
      }
    }
{{end}}
    task "{{.Name}}" {
      driver       = "podman"
      kill_timeout = "2s"

      config {
        image        = {{.Image}}
        network_mode = "host"
        {{.Config}}
      }

      env {
        MODE = "{{.Mode}}"
        PORT = "{{.Port}}"
      }

      resources {
        cpu    = 20
        memory = {{.Memory}}
      }
    }
  }
}
{{end}}
`))

// files are those of the component.
func (p probe) files(t *testing.T) map[string]string {
	t.Helper()
	if p.Type == "" {
		p.Type = "service"
	}
	if p.Memory == 0 {
		p.Memory = 32
	}
	if p.Image == "" {
		p.Image = `var.artifacts["behave"]`
	}
	if p.Update == "" && p.Type == "service" {
		p.Update = quickUpdate
	}
	files := map[string]string{}
	for template, file := range map[string]string{"component": "component.hcl", "job": p.Name + ".nomad.hcl"} {
		var out strings.Builder
		if err := probeFiles.ExecuteTemplate(&out, template, p); err != nil {
			t.Fatal(err)
		}
		files[filepath.Join("jobs", p.Name, file)] = out.String()
	}
	return files
}

// commitProbes makes these the components of the site, beside "hello".
func (s *testSite) commitProbes(message string, probes ...probe) string {
	s.t.Helper()
	files := map[string]string{filepath.Join("behave", "main.go"): s.read(filepath.Join("testdata", "behave", "main.go"))}
	var names []string
	for _, each := range probes {
		names = append(names, each.Name)
		for path, content := range each.files(s.t) {
			files[path] = content
		}
	}
	path, content := s.activate(names...)
	files[path] = content
	return s.commit(message, files)
}

// verdicts are what a run with --json says of each job that failed.
func (s *testSite) verdicts(got result) map[string]nomad.Verdict {
	s.t.Helper()
	found := map[string]nomad.Verdict{}
	for line := range strings.Lines(got.stdout) {
		var event struct {
			plan.Event
			Verdict nomad.Verdict
		}
		if err := json.Unmarshal([]byte(line), &event); err != nil {
			s.t.Fatalf("not an event: %v\n%s", err, line)
		}
		if event.Type == "rollout_failed" {
			found[event.Verdict.Job] = event.Verdict
		}
	}
	return found
}

// jobIndex is the job's modify index: it changes with every registration.
func (s *testSite) jobIndex(job string) (modifyIndex, version uint64) {
	s.t.Helper()
	var found struct{ JobModifyIndex, Version uint64 }
	s.nomad("/v1/job/"+job, &found)
	return found.JobModifyIndex, found.Version
}

// soon is how long a verdict on a job like these may take.
const soon = time.Minute

func TestABrokenRolloutSaysWhyAndIsMended(t *testing.T) {
	s := newSite(t)
	const port = 9001
	good := probe{Name: "probe", Mode: "serve", Port: port}
	for _, test := range []struct {
		name   string
		broken func(*probe)
		says   []string
	}{
		{"an image that exits at once", func(p *probe) { p.Mode = "exit" }, []string{
			"job probe: exit on " + s.host.name, "Exit Code: 3", "events:", "Started: Task started by client",
			"log:", "stdout: mode is exit\n", "stderr: no configuration found\n", "hint: ", "site logs probe",
		}},
		{"a failing check", func(p *probe) { p.Mode = "sick" }, []string{
			"job probe: check on " + s.host.name, `check "answers" of service "probe" fails: the database does not answer`,
			"events:", "Alloc Unhealthy", "stdout: mode is sick\n", "hint: ",
		}},
		{"a job that cannot be placed", func(p *probe) { p.Memory = 4 << 20 }, []string{
			"job probe: placement", `no room: "memory" exhausted (1 nodes)`, "hint: change the job's constraints or resources",
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			broken := good
			test.broken(&broken)
			s.commitProbes(test.name, broken)
			first := s.run("deploy")
			if first.code != 4 || first.duration > soon {
				t.Fatalf("want exit code 4 within %s: %v", soon, first)
			}
			for _, text := range append(test.says, "error: jobs: rollout of job probe") {
				if !strings.Contains(first.stderr, text) {
					t.Errorf("it does not say %q: %v", text, first)
				}
			}
			t.Logf("the verdict took %s", first.duration.Round(100*time.Millisecond))

			// The digests are the same, but it is not what was wanted.
			before, _ := s.jobIndex("probe")
			if code, changes := s.planCheck(); code != 2 || !slices.ContainsFunc(changes, func(c change) bool { return c.Kind == "job" && c.Target == "probe" }) {
				t.Errorf("plan --check ended with %d and %v: the job is broken", code, changes)
			}
			second := s.run("deploy")
			if second.code != 4 {
				t.Errorf("the second run with the same commit: %v", second)
			}
			// One that waits for a place has not failed: it is only waited for.
			if after, _ := s.jobIndex("probe"); after == before && broken.Mode != "serve" {
				t.Error("the same digests were not tried again")
			}

			sha := s.commitProbes("mended: "+test.name, good)
			s.must("deploy")
			s.waitHealthy("probe")
			if got, err := s.get(port, "/version"); err != nil || got != sha {
				t.Errorf("the mended job answers %q, %v, want %s", got, err, sha)
			}
			if got := s.plan(); len(got) > 0 {
				t.Errorf("after it was mended there is still %v", got)
			}
			// The next one is new as well, and has nothing to go back to.
			s.host.exec("env", "NOMAD_TOKEN="+s.token(), "/opt/site/bin/nomad", "job", "stop", "-purge", "probe")
		})
	}
}

// token is Nomad's management token.
func (s *testSite) token() string {
	s.t.Helper()
	token, err := s.managementToken()
	if err != nil {
		s.t.Fatal(err)
	}
	return token
}

const noDigest = "sha256:0000000000000000000000000000000000000000000000000000000000000000"

func TestAllFailuresAreInOneReport(t *testing.T) {
	s := newSite(t)
	// A registry that wants a login, which no artifact of ours ever does.
	s.host.shell(`
cat > /etc/containers/registries.conf.d/50-test.conf <<-END
	[[registry]]
	location = "127.0.0.1:7999"
	insecure = true
END
cat > /root/registry.py <<END
import http.server
class Registry(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(401)
        self.send_header("WWW-Authenticate", 'Basic realm="test"')
        self.end_headers()
    do_HEAD = do_GET
http.server.HTTPServer(("127.0.0.1", 7999), Registry).serve_forever()
END
systemd-run --quiet python3 /root/registry.py
systemctl stop podman.service`)
	image := func(address string) string { return fmt.Sprintf("%q", address+"@"+noDigest) }
	wants := []struct {
		probe  probe
		class  nomad.Class
		reason string
		log    string
	}{
		{probe{Mode: "exit"}, nomad.ClassExit, "Exit Code: 3", "stderr: no configuration found"},
		{probe{Mode: "sick"}, nomad.ClassCheck, "the database does not answer", "stdout: mode is sick"},
		{probe{Mode: "memory"}, nomad.ClassOOM, "memory limit", "stdout: mode is memory"},
		{probe{Memory: 4 << 20}, nomad.ClassPlacement, `"memory" exhausted`, ""},
		{probe{Constraint: "constraint {\n attribute = \"${attr.kernel.name}\"\n value = \"plan9\"\n}"}, nomad.ClassPlacement, "= plan9", ""},
		{probe{Image: image("127.0.0.1:7380/" + name + "/behave")}, nomad.ClassImagePull, "manifest unknown", ""},
		{probe{Image: image("127.0.0.1:7999/elsewhere")}, nomad.ClassImageAuth, "unauthorized", ""},
		{probe{Image: image("127.0.0.1:7998/nobody")}, nomad.ClassImagePull, "connection refused", ""},
		{probe{Port: 8080}, nomad.ClassPort, "reserved port collision http=8080", ""},
		{probe{Port: 7380}, nomad.ClassPort, "address already in use", "address already in use"},
		{probe{Config: `entrypoint = ["/nothing"]`}, nomad.ClassExit, "executable file `/nothing` not found", ""},
		{probe{Config: `volumes = ["/srv/nothing:/data"]`}, nomad.ClassExit, "statfs /srv/nothing: no such file or directory", ""},
	}
	probes := []probe{{Name: "fine", Mode: "serve", Port: 9100}}
	for i := range wants {
		wants[i].probe.Name = fmt.Sprintf("broken-%02d", i+1)
		if wants[i].probe.Port == 0 {
			wants[i].probe.Port = 9101 + i
		}
		probes = append(probes, wants[i].probe)
	}
	s.commitProbes("one job that is fine and many that are not", probes...)
	got := s.run("deploy", "--json")
	if got.code != 4 || got.duration > soon {
		t.Errorf("want exit code 4 within %s: code %d after %s", soon, got.code, got.duration)
	}
	t.Logf("%d verdicts took %s", len(wants), got.duration.Round(100*time.Millisecond))
	verdicts := s.verdicts(got)
	if len(verdicts) != len(wants) {
		t.Errorf("%d verdicts, want %d: %v", len(verdicts), len(wants), got)
	}
	for _, want := range wants {
		verdict := verdicts[want.probe.Name]
		if verdict.Class != want.class || !strings.Contains(verdict.Reason, want.reason) {
			t.Errorf("%s: got %s: %s\nwant %s: …%s…", want.probe.Name, verdict.Class, verdict.Reason, want.class, want.reason)
		}
		if verdict.Hint == "" || verdict.Reverted {
			t.Errorf("%s: hint %q, reverted %t", want.probe.Name, verdict.Hint, verdict.Reverted)
		}
		if !strings.Contains(strings.Join(verdict.LogTail, "\n"), want.log) {
			t.Errorf("%s: the log lacks %q: %q", want.probe.Name, want.log, verdict.LogTail)
		}
		if verdict.Task != "" && (len(verdict.Events) == 0 || verdict.Node != s.host.name || verdict.Alloc == "") {
			t.Errorf("%s: incomplete: %+v", want.probe.Name, verdict)
		}
		if !strings.Contains(got.stderr, "rollout of job "+want.probe.Name) {
			t.Errorf("%s is not in the report for people", want.probe.Name)
		}
	}
	if !strings.Contains(got.stdout, "job fine: healthy") {
		t.Error("the job that is fine is not reported")
	}
	s.waitHealthy("fine")
}

func TestABrokenUpdateIsReverted(t *testing.T) {
	s := newSite(t)
	const port = 9001
	good := probe{Name: "probe", Mode: "serve", Port: port}
	old := s.commitProbes("it serves", good)
	s.must("deploy")
	releases := s.host.exec("ls", "/var/lib/site/releases")

	broken := good
	broken.Mode = "exit"
	s.commitProbes("it exits", broken)
	got := s.run("deploy", "--json")
	if got.code != 3 || got.duration > soon {
		t.Fatalf("want exit code 3 within %s: %v", soon, got)
	}
	t.Logf("the verdict and the way back took %s", got.duration.Round(100*time.Millisecond))
	if verdict := s.verdicts(got)["probe"]; !verdict.Reverted || verdict.Class != nomad.ClassExit {
		t.Errorf("got %+v", verdict)
	}
	if !strings.Contains(got.stderr, "nomad went back to the version before") {
		t.Errorf("it does not say that it was reverted: %v", got)
	}
	if answer, err := s.get(port, "/version"); err != nil || answer != old {
		t.Errorf("the version before answers %q, %v, want %s", answer, err, old)
	}
	if now := s.host.exec("ls", "/var/lib/site/releases"); now != releases {
		t.Errorf("a failed rollout left a release: %s, before %s", now, releases)
	}

	// What runs is not what is wanted: the same commit is tried again.
	if again := s.run("deploy"); again.code != 3 {
		t.Errorf("the same commit again: %v", again)
	}
	// One job that was mended does not hide one that is still broken.
	s.commitProbes("another one is broken too", broken, probe{Name: "other", Mode: "exit", Port: 9002})
	if both := s.run("deploy"); both.code != 4 {
		t.Errorf("one reverted and one not: %v", both)
	}
	sha := s.commitProbes("it serves again", good)
	s.must("deploy")
	if answer, err := s.get(port, "/version"); err != nil || answer != sha {
		// The spec is that of the version before: nothing had to move.
		if answer != old {
			t.Errorf("the mended job answers %q, %v, want %s or %s", answer, err, sha, old)
		}
	}
}

func TestJobsOfEveryKindAreDeployed(t *testing.T) {
	s := newSite(t)
	const first, second = "z-first", "a-second"
	s.commitProbes("jobs of every kind",
		probe{Name: "once", Mode: "done", Port: 9001, Type: "batch"},
		probe{Name: "everywhere", Mode: "serve", Port: 9002, Type: "system"},
		probe{Name: "plain", Mode: "serve", Port: 9003, Update: "update {\n max_parallel = 0\n}"},
		probe{Name: first, Mode: "serve", Port: 9004},
		probe{Name: second, Mode: "serve", Port: 9005, After: []string{first}},
	)
	got := s.must("deploy")
	t.Logf("it took %s", got.duration.Round(100*time.Millisecond))
	for _, job := range []string{"once", "everywhere", "plain", first, second} {
		if !strings.Contains(got.stderr, "job "+job+": healthy") {
			t.Errorf("job %s is not reported healthy: %v", job, got)
		}
	}
	for _, job := range []string{"everywhere", "plain", first, second} {
		if err := s.healthy(job); err != nil {
			t.Errorf("job %s: %v", job, err)
		}
	}
	var batch []struct{ ClientStatus string }
	s.nomad("/v1/job/once/allocations", &batch)
	if len(batch) != 1 || batch[0].ClientStatus != "complete" {
		t.Errorf("the batch job's allocations: %+v", batch)
	}
	s.afterInTime(first, second)
	s.unchanged("a second deploy", func() {
		if again := s.must("deploy"); !strings.Contains(again.stdout, "nothing to do") {
			t.Errorf("again: %v", again)
		}
	})

	s.commitProbes("a batch job that fails", probe{Name: "once", Mode: "exit", Port: 9001, Type: "batch"})
	failed := s.run("deploy", "--json", "--only=once")
	if verdict := s.verdicts(failed)["once"]; failed.code != 4 || verdict.Class != nomad.ClassExit || !strings.Contains(verdict.Reason, "Exit Code: 3") {
		t.Errorf("got %+v of %v", verdict, failed)
	}
}

// afterInTime insists that one job was healthy before another was registered.
func (s *testSite) afterInTime(first, second string) {
	s.t.Helper()
	var deployments []struct {
		Status      string
		ModifyIndex uint64
	}
	s.nomad("/v1/job/"+first+"/deployments", &deployments)
	var after struct{ CreateIndex uint64 }
	s.nomad("/v1/job/"+second, &after)
	if len(deployments) != 1 || deployments[0].Status != "successful" || deployments[0].ModifyIndex > after.CreateIndex {
		s.t.Errorf("%s came at %d, %s was deployed as %+v", second, after.CreateIndex, first, deployments)
	}
}

// slowUpdate needs half a minute to be healthy.
const slowUpdate = `update {
      min_healthy_time  = "30s"
      healthy_deadline  = "2m"
      progress_deadline = "3m"
    }`

func TestAJobOnItsWayIsWaitedForAndNotRegisteredAgain(t *testing.T) {
	s := newSite(t)
	s.commitProbes("a slow job", probe{Name: "slow", Mode: "serve", Port: 9001, Update: slowUpdate})

	got := s.run("deploy", "--json", "--timeout=12s")
	verdict := s.verdicts(got)["slow"]
	if got.code != 4 || verdict.Class != nomad.ClassTimeout || !strings.Contains(verdict.Hint, "--timeout") || got.duration > soon/2 {
		t.Fatalf("a deadline of 12 s: got %+v of %v", verdict, got)
	}
	if len(verdict.Events) == 0 || !slices.Contains(verdict.LogTail, "stdout: mode is serve") {
		t.Errorf("the verdict tells neither events nor log: %+v", verdict)
	}
	before, version := s.jobIndex("slow")

	interrupted := s.start("deploy")
	s.until("the run to have the lock", soon, func() error {
		_, err := s.host.tryExec("test", "-e", "/var/lib/site/lock.json")
		return err
	})
	interrupted.signal(syscall.SIGINT)
	if ended := interrupted.wait(); ended.code != 130 {
		t.Errorf("interrupted: %v", ended)
	}

	s.until("the plan to wait", soon, func() error {
		for _, each := range s.plan() {
			if each.Target == "slow" && strings.HasPrefix(each.Reason, "waiting: ") {
				return nil
			}
		}
		return fmt.Errorf("the plan is %v", s.plan())
	})
	s.must("deploy")
	if after, now := s.jobIndex("slow"); after != before || now != version {
		t.Errorf("it was registered again: modify index %d then %d, version %d then %d", before, after, version, now)
	}
	if changes := s.plan(); len(changes) > 0 {
		t.Errorf("left over: %v", changes)
	}
}
