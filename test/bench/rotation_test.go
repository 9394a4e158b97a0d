package bench

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/site"
)

const (
	// keeper is a component with secrets that rotate; the one by hand is equal to
	// it and has secrets of its own, so that nothing of site's moves it.
	keeper       = "keeper"
	keeperByHand = "keeper-by-hand"
	keys         = 10
	// drain is longer than an old allocation takes to end: while one reads it, the
	// old generation stays, and is left to the next run.
	drain = 15 * time.Second
)

const keeperJob = `variable "artifacts" {
  type = map(string)
}

job "%[1]s" {
  group "%[1]s" {
    network {
      mode = "host"
      port "http" {}
    }

    update {
      min_healthy_time = "1s"
      healthy_deadline = "2m"
      %[2]s
    }

    service {
      name     = "%[1]s"
      provider = "nomad"
      port     = "http"

      check {
        type     = "http"
        path     = "/healthz"
        interval = "1s"
        timeout  = "1s"
      }
    }

    task "%[1]s" {
      driver = "podman"

      config {
        image        = var.artifacts["keeper"]
        network_mode = "host"
      }

      vault {
        role = "%[1]s"
      }

      template {
        destination = "${NOMAD_SECRETS_DIR}/keys"
        data        = <<-EOT
          %[3]s
        EOT
      }

      env {
        HELLO_LISTEN = ":${NOMAD_PORT_http}"
        CHANGE       = "%[4]s"
      }

      resources {
        cpu    = 50
        memory = 64
      }
    }
  }
}
`

// keyNames are the full names of a component's first secrets.
func keyNames(component string, count int) []string {
	names := make([]string, count)
	for i := range names {
		names[i] = fmt.Sprintf("%s.key_%d", component, i)
	}
	return names
}

// keeperSpec is the jobspec of a keeper; more are lines of its update block.
func keeperSpec(component, more, change string) []byte {
	var reads strings.Builder
	for _, name := range keyNames(component, keys) {
		fmt.Fprintf(&reads, "{{ with secret \"site/data/%s\" }}{{ .Data.data.value }}{{ end }} ", strings.Replace(name, ".", "/", 1))
	}
	return fmt.Appendf(nil, keeperJob, component, more, reads.String(), change)
}

// addKeepers gives the site OpenBao and the two keepers.
func (f *fixture) addKeepers() error {
	root, err := filepath.Abs("../..")
	if err != nil {
		return err
	}
	program, err := os.ReadFile(filepath.Join(root, "test/e2e/testdata/hello/app/main.go"))
	if err != nil {
		return err
	}
	files := map[string][]byte{
		"go.mod":                           []byte("module example.net/adopter\n\ngo 1.26\n"),
		filepath.Join("keeper", "main.go"): program,
	}
	for _, name := range []string{keeper, keeperByHand} {
		declared := "artifact \"keeper\" {\n  go_package = \"./keeper\"\n}\n"
		for _, key := range keyNames(name, keys) {
			declared += fmt.Sprintf("\nsecret %q {\n  generated {}\n\n  rotation {\n    every = \"30d\"\n    drain = %q\n  }\n}\n", strings.TrimPrefix(key, name+"."), drain)
		}
		files[filepath.Join("jobs", name, "component.hcl")] = []byte(declared)
		files[filepath.Join("jobs", name, name+".nomad.hcl")] = keeperSpec(name, "", "none")
	}
	for path, content := range files {
		if err := os.MkdirAll(filepath.Dir(f.path(path)), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(f.path(path), content, 0o644); err != nil {
			return err
		}
	}
	if err := f.activate("", site.OpenBaoComponent, keeper, keeperByHand); err != nil {
		return err
	}
	if _, err := f.do("git", "add", "go.mod", "keeper"); err != nil {
		return err
	}
	if err := f.commitJob("keepers"); err != nil {
		return err
	}
	_, err = f.runSite("deploy", "--site", labName, "--root-token-file", "site.root-token")
	return err
}

// rotated is one run, and what it asked of others.
type rotated struct {
	run
	// requests are those in OpenBao's audit log; tasks' are the ones of Nomad's
	// templates, and not among them.
	requests, tasks int
	// commands were run on the host over SSH.
	commands int
	// versions of the job that came into being.
	versions int
	// canary is the time from its placement until Nomad called it healthy, stop
	// that from the order to stop until Nomad knew that the old allocation had ended.
	canary, stop float64
}

// above is the time that neither the drain nor the canary can account for.
func (r rotated) above() float64 { return r.seconds - drain.Seconds() - r.canary }

// watched counts what a run of site asks of OpenBao and of the host's sshd.
func (f *fixture) watched(arguments ...string) (rotated, error) {
	before, err := f.commandsOverSSH()
	if err != nil {
		return rotated{}, err
	}
	from, err := f.onHost("stat --format=%s " + auditLog)
	if err != nil {
		return rotated{}, err
	}
	var done rotated
	if done.run, err = f.runSite(arguments...); err != nil {
		return done, err
	}
	after, err := f.commandsOverSSH()
	if err != nil {
		return done, err
	}
	done.commands = after - before
	return done, f.readAudit(from, &done)
}

const auditLog = "/var/log/openbao/audit.log"

// readAudit counts the requests behind an offset of the audit log.
func (f *fixture) readAudit(from string, into *rotated) error {
	offset, err := strconv.Atoi(from)
	if err != nil {
		return err
	}
	text, err := f.onHost(fmt.Sprintf("tail --bytes=+%d %s", offset+1, auditLog))
	if err != nil {
		return err
	}
	for line := range strings.Lines(text) {
		var entry struct {
			Type string
			Auth struct {
				DisplayName string `json:"display_name"`
			}
			Request struct{ Path string }
		}
		if err := json.Unmarshal([]byte(line), &entry); err != nil {
			return fmt.Errorf("the audit log has %q: %w", line, err)
		}
		switch {
		case entry.Type != "request":
		case strings.HasPrefix(entry.Auth.DisplayName, "jwt-nomad"), entry.Request.Path == "auth/jwt-nomad/login":
			into.tasks++
		default:
			into.requests++
		}
	}
	return nil
}

// commandsOverSSH are those that the host's sshd has told of; countCommands has it do so.
func (f *fixture) commandsOverSSH() (int, error) {
	text, err := f.onHost("journalctl --sync; journalctl --unit=ssh --output=cat --no-pager | grep -c '^Starting session: ' || true")
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(text)
}

func (f *fixture) countCommands(b *testing.B) error {
	const config = "/etc/ssh/sshd_config.d/00-bench.conf"
	b.Cleanup(func() {
		if _, err := f.onHost("rm -f " + config + "; systemctl reload ssh"); err != nil {
			b.Error(err)
		}
	})
	_, err := f.onHost("echo 'LogLevel VERBOSE' > " + config + " && systemctl reload ssh")
	return err
}

// nomad is a `nomad` command in the environment that site gives.
func (f *fixture) nomad(arguments ...string) (run, error) {
	found, err := f.do(f.site, "tool", "which", "nomad")
	if err != nil {
		return run{}, err
	}
	return f.runSite(append([]string{"env", "--site", labName, "--", strings.TrimSpace(found.output)}, arguments...)...)
}

func (f *fixture) nomadAPI(path string, into any) error {
	answer, err := f.nomad("operator", "api", path)
	if err != nil {
		return err
	}
	return json.Unmarshal([]byte(answer.output), into)
}

// allocation is what Nomad knows of one of a job.
type allocation struct {
	CreateTime       int64
	ModifyTime       int64
	JobVersion       int
	DeploymentStatus *struct{ Timestamp time.Time }
	TaskStates       map[string]struct {
		Events []struct {
			Type string
			Time int64
		}
	}
}

// allocations of a job, the newest first.
func (f *fixture) allocations(job string) ([]allocation, error) {
	var found []allocation
	err := f.nomadAPI("/v1/job/"+job+"/allocations", &found)
	slices.SortFunc(found, func(a, b allocation) int { return int(b.CreateTime - a.CreateTime) })
	if err == nil && (len(found) == 0 || found[0].DeploymentStatus == nil) {
		err = fmt.Errorf("job %s has no allocation whose health is known", job)
	}
	return found, err
}

// rotate measures a rotation of secrets of the keeper, and insists that they moved at once.
func (f *fixture) rotate(names []string) (rotated, error) {
	before, err := f.allocations(keeper)
	if err != nil {
		return rotated{}, err
	}
	done, err := f.watched(append([]string{"secrets", "rotate", "--site", labName, "--json"}, names...)...)
	if err != nil {
		return done, err
	}
	for _, name := range []string{"mint", "canaries", "commit", "roll", "retire"} {
		if !slices.ContainsFunc(done.events, func(event plan.Event) bool { return event.Type == plan.StepDone && event.Step == name && event.Applied }) {
			return done, fmt.Errorf("rotate %v: the step %s did nothing: %s", names, name, done.said)
		}
	}
	after, err := f.allocations(keeper)
	if err != nil {
		return done, err
	}
	done.versions = after[0].JobVersion - before[0].JobVersion
	done.canary = after[0].DeploymentStatus.Timestamp.Sub(time.Unix(0, after[0].CreateTime)).Seconds()
	for _, event := range after[1].TaskStates[keeper].Events {
		if event.Type == "Killing" {
			done.stop = time.Duration(after[1].ModifyTime - event.Time).Seconds()
		}
	}
	if done.versions != 1 {
		return done, fmt.Errorf("rotate %v: the job moved %d times", names, done.versions)
	}
	return done, nil
}

// updateByHand is what a rotation has Nomad do, without one: a canary, and its promotion.
func (f *fixture) updateByHand(image, change string) (run, error) {
	file := filepath.Join(f.temp, keeperByHand+".nomad.hcl")
	if err := os.WriteFile(file, keeperSpec(keeperByHand, "canary = 1\n      auto_promote = true", change), 0o644); err != nil {
		return run{}, err
	}
	return f.nomad("job", "run", "-var", fmt.Sprintf(`artifacts={"keeper"=%q}`, image), file)
}

func BenchmarkRotation(b *testing.B) {
	f := use(b)
	if err := f.addKeepers(); err != nil {
		b.Fatal(err)
	}
	if err := f.countCommands(b); err != nil {
		b.Fatal(err)
	}
	image, err := f.onHost("podman ps --filter name=^" + keeperByHand + "- --format '{{.Image}}'")
	if err != nil || image == "" {
		b.Fatalf("find the image of the job: %q, %v", image, err)
	}
	var one, many, due, status []rotated
	var byHand []run
	for repetition := range repetitions() {
		for _, each := range []struct {
			count int
			into  *[]rotated
		}{{1, &one}, {keys, &many}} {
			done, err := f.rotate(keyNames(keeper, each.count))
			if err != nil {
				b.Fatal(err)
			}
			*each.into = append(*each.into, done)
		}
		updated, err := f.updateByHand(image, fmt.Sprintf("number %d at %d", repetition, time.Now().UnixNano()))
		if err != nil {
			b.Fatal(err)
		}
		byHand = append(byHand, updated)
		idle, err := f.watched("secrets", "rotate", "--due", "--site", labName)
		if err != nil || idle.output != "nothing is due\n" {
			b.Fatalf("rotate --due says %q, %v", idle.output, err)
		}
		due = append(due, idle)
		looked, err := f.watched("secrets", "status", "--site", labName)
		if err != nil {
			b.Fatal(err)
		}
		status = append(status, looked)
	}
	reportRotations(b, one, many, byHand)
	reportIdle(b, due, status)
	// What is not site's would stop its next deploy.
	if _, err := f.nomad("job", "stop", "-purge", keeperByHand); err != nil {
		b.Fatal(err)
	}
}

func elapsed(r rotated) float64 { return r.seconds }

func reportRotations(b *testing.B, one, many []rotated, byHand []run) {
	peer := median(byHand, seconds)
	report.table(fmt.Sprintf("Generated secrets of one job get their next generation; their drain is %s", drain),
		"", "time", "without the drain, times nomad job run", "above the floor: drain, canary", "that for each secret",
		"requests to OpenBao", "those of the job's templates", "commands over SSH", "moves of the job")
	for _, each := range []struct {
		name  string
		count int
		runs  []rotated
	}{{"site secrets rotate, 1 secret", 1, one}, {fmt.Sprintf("site secrets rotate, %d secrets", keys), keys, many}} {
		whole, above := median(each.runs, elapsed), median(each.runs, rotated.above)
		report.row(each.name, inSeconds(whole), times(whole-drain.Seconds(), peer), inSeconds(above), inSeconds(above/float64(each.count)),
			strconv.Itoa(median(each.runs, func(r rotated) int { return r.requests })), strconv.Itoa(median(each.runs, func(r rotated) int { return r.tasks })),
			strconv.Itoa(median(each.runs, func(r rotated) int { return r.commands })), strconv.Itoa(median(each.runs, func(r rotated) int { return r.versions })))
		b.ReportMetric(above/float64(each.count), fmt.Sprintf("s/secret-of-%d", each.count))
	}
	report.row("site env -- nomad job run, with a canary that is promoted by itself", inSeconds(peer), "1", "", "", "", "", "", "1")

	report.table("Where the time of a rotation goes", "", "1 secret", fmt.Sprintf("%d secrets", keys))
	line := func(name string, figure func(rotated) float64) {
		report.row(name, inSeconds(median(one, figure)), inSeconds(median(many, figure)))
	}
	line("all", elapsed)
	for _, event := range one[0].events {
		if event.Type == plan.StepDone {
			line("the step "+event.Step, func(r rotated) float64 { return r.step(event.Step) })
		}
	}
	line("of canaries: from its placement until Nomad calls it healthy", func(r rotated) float64 { return r.canary })
	line("of the drain: from the order to stop until the old allocation has ended", func(r rotated) float64 { return r.stop })
	b.ReportMetric((median(one, elapsed)-drain.Seconds())/peer, "rotate/nomad-time")
}

func reportIdle(b *testing.B, due, status []rotated) {
	quick := median(due, elapsed)
	report.table(fmt.Sprintf("A look at %d secrets, none of which is due", 2*keys), "", "time", "times the first", "bytes on the wire", "requests to OpenBao", "commands over SSH")
	for _, each := range []struct {
		name string
		runs []rotated
	}{{"site secrets rotate --due", due}, {"site secrets status", status}} {
		whole := median(each.runs, elapsed)
		report.row(each.name, inSeconds(whole), times(whole, quick), inBytes(median(each.runs, func(r rotated) int64 { return r.wire })),
			strconv.Itoa(median(each.runs, func(r rotated) int { return r.requests })), strconv.Itoa(median(each.runs, func(r rotated) int { return r.commands })))
	}
	b.ReportMetric(median(status, elapsed)/quick, "status/due-time")
}
