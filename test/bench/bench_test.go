package bench

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nomad-site/site/ansible"
	ansiblerun "github.com/nomad-site/site/internal/adapter/ansible"
	"github.com/nomad-site/site/internal/plan"
	hostdocument "github.com/nomad-site/site/internal/reconcile/host"
)

func BenchmarkBareHostToHealthyJob(b *testing.B) {
	f := use(b)
	report.table("A bare host to a healthy job, with the 195 MB image", "step", "time")
	for _, event := range f.bootstrap.events {
		if event.Type == plan.StepDone {
			report.row(event.Step, inSeconds(event.Seconds))
		}
	}
	report.row("all, with the start of the program", inSeconds(f.bootstrap.seconds))
	report.row("bytes on the wire", inBytes(f.bootstrap.wire))
	b.ReportMetric(f.bootstrap.seconds, "s/bootstrap")
}

// change is one way in which the image changes from deploy to deploy.
type change struct {
	name string
	make func(f *fixture, p *picture, line string) error
	// rivals that do not care what has changed are measured once.
	rivals []rival
}

func BenchmarkChangedImage(b *testing.B) {
	f := use(b)
	if err := f.installRsync(); err != nil {
		b.Fatal(err)
	}
	everybody := []rival{rsync, scp, saveLoad}
	changes := []change{
		{"a line in a text of the 180 MB base layer", func(_ *fixture, p *picture, line string) error { p.baseLine = line; return nil }, everybody},
		{"a line in a text of the 15 MB app layer", func(_ *fixture, p *picture, line string) error { p.appLine = line; return nil }, everybody[:1]},
		{"a line in the source of the 6 MB Go program", func(f *fixture, p *picture, line string) (err error) {
			p.program, err = f.program(line)
			return err
		}, everybody[:1]},
	}
	// Each has deployed an image of its own before: none finds the others' layers.
	last := map[string]*picture{"site": {}}
	for _, one := range everybody {
		last[one.name] = &picture{appLine: "the first image of " + one.name, baseLine: "the first image of " + one.name}
		if err := f.prepare(b, one, *last[one.name]); err != nil {
			b.Fatal(err)
		}
		if _, _, err := f.deploy(one); err != nil {
			b.Fatal(err)
		}
	}
	for _, each := range changes {
		transfers, runs := map[string][]run{}, map[string][]run{}
		for repetition := range repetitions() {
			// The lines differ in length, so that what follows them moves.
			p := last["site"]
			if err := each.make(f, p, "site makes a change"+strings.Repeat(", again", repetition)); err != nil {
				b.Fatal(err)
			}
			if err := f.prepare(b, rival{}, *p); err != nil {
				b.Fatal(err)
			}
			done, err := f.runSite("deploy", "--site", labName, "--json")
			if err != nil {
				b.Fatal(err)
			}
			runs["site"] = append(runs["site"], done)
			transfers["site"] = append(transfers["site"], run{seconds: done.step("artifacts"), wire: done.wire})
			for _, one := range each.rivals {
				p := last[one.name]
				if err := each.make(f, p, one.name+" makes a change"+strings.Repeat(", again", repetition)); err != nil {
					b.Fatal(err)
				}
				if err := f.prepare(b, one, *p); err != nil {
					b.Fatal(err)
				}
				transfer, running, err := f.deploy(one)
				if err != nil {
					b.Fatal(err)
				}
				transfers[one.name], runs[one.name] = append(transfers[one.name], transfer), append(runs[one.name], running)
			}
		}
		report.table("The 195 MB image after "+each.name, "", "bytes on the wire", "times site's", "transfer", "times site's", "until the container runs", "times site's")
		ourBytes, ourTransfer, ourTime := median(runs["site"], wire), median(transfers["site"], seconds), median(runs["site"], seconds)
		report.row("site deploy", inBytes(ourBytes), "1", inSeconds(ourTransfer), "1", inSeconds(ourTime), "1")
		var rows [][]string
		for _, one := range each.rivals {
			bytes, transfer, time := median(transfers[one.name], wire), median(transfers[one.name], seconds), median(runs[one.name], seconds)
			rows = append(rows, []string{one.name, inBytes(bytes), times(float64(bytes), float64(ourBytes)), inSeconds(transfer), times(transfer, ourTransfer), inSeconds(time), times(time, ourTime)})
		}
		report.row("of it: chunk lists and chunks", inBytes(median(runs["site"], run.sent)), "", "", "", "", "")
		for _, name := range []string{"check inputs", "artifacts", "jobs"} {
			report.row("of it: the step "+name, "", "", "", "", inSeconds(median(runs["site"], func(r run) float64 { return r.step(name) })), "")
		}
		for _, row := range rows {
			report.row(row...)
		}
		b.ReportMetric(float64(median(transfers[rsync.name], wire))/float64(ourBytes), "rsync/site-bytes-"+strings.Fields(each.name)[len(strings.Fields(each.name))-2])
	}
	if err := f.forget(); err != nil {
		b.Fatal(err)
	}
}

// prepare writes the image and waits until the disk is idle again.
func (f *fixture) prepare(b *testing.B, one rival, p picture) error {
	if err := f.draw(b, p); err != nil {
		return err
	}
	if one.stored { // it would have been built there
		if _, err := f.do(f.podman("load", "-q", "-i", f.path("app.tar"))...); err != nil {
			return err
		}
	}
	_, err := f.do("sync")
	return err
}

func BenchmarkNothingToDo(b *testing.B) {
	f := use(b)
	if _, err := f.runSite("deploy", "--site", labName); err != nil { // the image may be another one by now
		b.Fatal(err)
	}
	runner, target, err := f.sameRole()
	if err != nil {
		b.Fatal(err)
	}
	var ours, theirs []run
	for range repetitions() {
		done, err := f.runSite("deploy", "--site", labName, "--json")
		if err != nil {
			b.Fatal(err)
		}
		for _, event := range done.events {
			if event.Applied {
				b.Fatalf("step %s wrote something: %+v", event.Step, event)
			}
		}
		ours = append(ours, done)
		played, err := f.counted(func() error { return runner.Apply(b.Context(), []ansiblerun.Host{target}, quiet{}) })
		if err != nil {
			b.Fatal(err)
		}
		theirs = append(theirs, played)
	}
	mine, other := median(ours, seconds), median(theirs, seconds)
	report.table("Nothing to do", "", "time", "times site's", "bytes on the wire")
	report.row("site deploy: packages, host, artifacts and jobs", inSeconds(mine), "1", inBytes(median(ours, wire)))
	report.row("ansible-playbook: the role for the host alone", inSeconds(other), times(other, mine), inBytes(median(theirs, wire)))
	b.ReportMetric(other/mine, "ansible/site-time")
}

// quiet is a progress that nobody reads.
type quiet struct{}

func (quiet) Message(string, ...any)     {}
func (quiet) Bytes(string, int64, int64) {}

// sameRole is the playbook with all that was applied to the host, secret files too.
func (f *fixture) sameRole() (ansiblerun.Runner, ansiblerun.Host, error) {
	runner := ansiblerun.Runner{Playbook: ansible.FS}
	target := ansiblerun.Host{Name: host, SSHConfig: f.lab.SSHConfig()}
	found, err := f.do(f.site, "tool", "which", "ansible")
	if err != nil {
		return runner, target, err
	}
	runner.Executable = strings.TrimSpace(found.output)
	applied, err := f.onHost("cat " + hostdocument.AppliedPath)
	if err != nil {
		return runner, target, err
	}
	if err := json.Unmarshal([]byte(applied), &target.Document); err != nil {
		return runner, target, fmt.Errorf("read what was applied: %w", err)
	}
	for i, file := range target.Document.Files {
		copied := filepath.Join(f.temp, "content")
		if _, err := f.do("scp", "-q", "-F", f.lab.SSHConfig(), host+":"+file.Path, copied); err != nil {
			return runner, target, err
		}
		content, err := os.ReadFile(copied)
		if err != nil {
			return runner, target, err
		}
		target.Document.Files[i].Content = string(content)
	}
	return runner, target, nil
}

func BenchmarkOneJob(b *testing.B) {
	f := use(b)
	found, err := f.do(f.site, "tool", "which", "nomad")
	if err != nil {
		b.Fatal(err)
	}
	nomad := strings.TrimSpace(found.output)
	// The image that the last deploy brought, by name and digest.
	image, err := f.onHost("podman ps --filter name=^app- --format '{{.Image}}'")
	if err != nil || image == "" {
		b.Fatalf("find the image of the job: %q, %v", image, err)
	}
	file := filepath.Join(f.temp, "rival.nomad.hcl")
	byHand := func(change string) (run, error) {
		if err := os.WriteFile(file, fmt.Appendf(nil, jobspec, "by-hand", nomadPort, change), 0o644); err != nil {
			return run{}, err
		}
		return f.runSite("env", "--site", labName, "--", nomad, "job", "run", "-var", fmt.Sprintf(`artifacts={"app"=%q}`, image), file)
	}
	if _, err := byHand("none"); err != nil {
		b.Fatal(err)
	}
	var ours, theirs, tunnels []run
	for repetition := range repetitions() {
		change := fmt.Sprintf("number %d at %d", repetition, time.Now().UnixNano())
		if err := f.commitJob(change); err != nil {
			b.Fatal(err)
		}
		done, err := f.runSite("deploy", "--site", labName, "--json")
		if err != nil {
			b.Fatal(err)
		}
		ours = append(ours, done)
		if done, err = byHand(change); err != nil {
			b.Fatal(err)
		}
		theirs = append(theirs, done)
		if done, err = f.runSite("env", "--site", labName, "--", "true"); err != nil {
			b.Fatal(err)
		}
		tunnels = append(tunnels, done)
	}
	mine, other := median(ours, seconds), median(theirs, seconds)
	report.table("One job's environment changed, until it is healthy", "", "time", "times site's", "bytes on the wire")
	report.row("site deploy", inSeconds(mine), "1", inBytes(median(ours, wire)))
	report.row("of it: the step jobs", inSeconds(median(ours, func(r run) float64 { return r.step("jobs") })), "", "")
	report.row("site env -- nomad job run", inSeconds(other), times(other, mine), inBytes(median(theirs, wire)))
	report.row("of it: tunnel and login", inSeconds(median(tunnels, seconds)), "", "")
	b.ReportMetric(other/mine, "nomad/site-time")
	if _, err := f.runSite("env", "--site", labName, "--", nomad, "job", "stop", "-purge", "by-hand"); err != nil {
		b.Fatal(err)
	}
}

func BenchmarkMemory(b *testing.B) {
	f := use(b)
	report.table("Memory while an image is sent whole", "image", "site, peak", "times that of 50 MB", "site-host serve, resident after", "site-host serve, peak so far")
	var first int64
	for i, size := range []int64{50, 195, 400} {
		if err := f.prepare(b, rival{}, picture{base: (size - 15) * 1e6, assets: 9e6, seed: uint64(100 + i)}); err != nil {
			b.Fatal(err)
		}
		done, err := f.runSite("deploy", "--site", labName, "--json")
		if err != nil {
			b.Fatal(err)
		}
		if sent := done.wire; sent < size*1e6/5 {
			b.Fatalf("only %d bytes went to the host: the image of %d MB was not sent", sent, size)
		}
		resident, highest, err := f.siteHostMemory()
		if err != nil {
			b.Fatal(err)
		}
		if first == 0 {
			first = done.peak
		}
		report.row(fmt.Sprintf("%d MB", size), inBytes(done.peak), times(float64(done.peak), float64(first)), inBytes(resident), inBytes(highest))
		b.ReportMetric(float64(done.peak)/float64(first), fmt.Sprintf("peak-%dMB/50MB", size))
	}
}

// siteHostMemory is what the artifact server holds now, and held at most.
func (f *fixture) siteHostMemory() (resident, highest int64, err error) {
	text, err := f.onHost(`sed -n 's/^VmRSS:\s*\([0-9]*\) kB/\1/p;s/^VmHWM:\s*\([0-9]*\) kB/\1/p' /proc/$(systemctl show --property MainPID --value site-host.service)/status`)
	if err != nil {
		return 0, 0, err
	}
	// The kernel writes VmHWM before VmRSS.
	if _, err := fmt.Sscan(text, &highest, &resident); err != nil {
		return 0, 0, fmt.Errorf("read the memory of site-host %q: %w", text, err)
	}
	return resident << 10, highest << 10, nil
}
