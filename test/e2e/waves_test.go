package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"text/template"
	"time"
)

// holder is a component whose job writes or reads secrets, with its own identity.
type holder struct {
	Name string
	// Mode is what its program does: see testdata/produce.
	Mode string
	Port int
	// Component is what component.hcl says beside the artifact.
	Component string
	// Reads are the paths of secrets that a template reads into /local/value.
	Reads []string
	// Env are lines of HCL.
	Env string
}

var holderFiles = template.Must(template.New("").Parse(`
{{define "component"}}
artifact "produce" {
  go_package = "./produce"
}
{{.Component}}
{{end}}

{{define "job"}}
variable "artifacts" {
  type = map(string)
}

job "{{.Name}}" {
  group "{{.Name}}" {
    network {
      mode = "host"
    }

    update {
      min_healthy_time  = "1s"
      healthy_deadline  = "30s"
      progress_deadline = "1m"
    }

    restart {
      attempts = 1
      interval = "1m"
      delay    = "1s"
      mode     = "fail"
    }

    reschedule {
      attempts  = 0
      unlimited = false
    }

    task "{{.Name}}" {
      driver       = "podman"
      kill_timeout = "1s"

      config {
        image        = var.artifacts["produce"]
        network_mode = "host"
      }

      vault {}

      # Kept in a file too: a test looks whom it lets in.
      identity {
        name = "vault_default"
        aud  = ["vault.io"]
        file = true
        ttl  = "1h"
      }
{{if .Reads}}
      template {
        destination = "local/value"
        data        = <<-EOT
        {{range .Reads}}{{"{{"}} with secret "{{.}}" {{"}}"}}{{"{{"}} .Data.data.value {{"}}"}}{{"{{"}} end {{"}}"}}
        {{end}}EOT
      }
{{end}}
      env {
        MODE = "{{.Mode}}"
        PORT = "{{.Port}}"
        {{.Env}}
      }

      resources {
        cpu    = 20
        memory = 32
      }
    }
  }
}
{{end}}
`))

// commitHolders makes these the components of the site, beside those of the
// platform, and adds further files.
func (s *testSite) commitHolders(message string, further map[string]string, holders ...holder) string {
	s.t.Helper()
	files := map[string]string{filepath.Join("produce", "main.go"): s.read(filepath.Join("testdata", "produce", "main.go"))}
	for path, content := range further {
		files[path] = content
	}
	var names []string
	for _, each := range holders {
		names = append(names, each.Name)
		for template, file := range map[string]string{"component": "component.hcl", "job": each.Name + ".nomad.hcl"} {
			var out strings.Builder
			if err := holderFiles.ExecuteTemplate(&out, template, each); err != nil {
				s.t.Fatal(err)
			}
			files[filepath.Join("jobs", each.Name, file)] = out.String()
		}
	}
	path, content := s.activate(names...)
	files[path] = content
	return s.commit(message, files)
}

// producedBy declares a secret that another component's job writes.
func producedBy(secret, component string) string {
	return fmt.Sprintf("secret %q {\n  produced_by {\n    component = %q\n  }\n}\n", secret, component)
}

// broker writes the secret reader.join_token some time after it was started.
func broker(mode, value string) holder {
	return holder{Name: "broker", Mode: mode, Env: fmt.Sprintf(
		"DELAY = \"5s\"\nSECRET = \"site/data/reader/join_token\"\nVALUE = %q", value)}
}

// reader shows what it reads of its own secrets.
func reader(port int, component string, secrets ...string) holder {
	var paths []string
	for _, secret := range secrets {
		paths = append(paths, "site/data/reader/"+secret)
	}
	return holder{Name: "reader", Mode: "show", Port: port, Component: component, Reads: paths}
}

// written is when OpenBao stored the newest value of a secret.
func (b *bao) written(path string) time.Time {
	b.s.t.Helper()
	var entry struct {
		Data struct {
			Metadata struct {
				CreatedTime time.Time `json:"created_time"`
			} `json:"metadata"`
		} `json:"data"`
	}
	b.must("GET", "site/data/"+path, nil, &entry)
	return entry.Data.Metadata.CreatedTime
}

// begun is when a job's first version was registered, and its first allocation made.
func (s *testSite) begun(job string) (registered, allocated time.Time) {
	s.t.Helper()
	var found struct{ SubmitTime int64 }
	s.nomad("/v1/job/"+job, &found)
	var allocations []struct{ CreateTime int64 }
	s.nomad("/v1/job/"+job+"/allocations", &allocations)
	if len(allocations) == 0 {
		s.t.Fatalf("job %s has no allocation", job)
	}
	first := allocations[0].CreateTime
	for _, each := range allocations {
		first = min(first, each.CreateTime)
	}
	return time.Unix(0, found.SubmitTime), time.Unix(0, first)
}

// registered reports whether Nomad knows a job.
func (s *testSite) registered(job string) bool {
	s.t.Helper()
	var jobs []struct{ ID string }
	s.nomad("/v1/jobs", &jobs)
	return slices.ContainsFunc(jobs, func(one struct{ ID string }) bool { return one.ID == job })
}

func TestAJobWaitsForTheSecretThatAnotherOneProduces(t *testing.T) {
	s := newSite(t, platform)
	const port = 9001
	tokenOfBroker := producedBy("join_token", "broker")

	t.Run("a producer that never writes is not waited for without end", func(t *testing.T) {
		s := s.in(t)
		s.commitHolders("a producer that writes nothing", nil, broker("idle", ""), reader(port, tokenOfBroker, "join_token"))
		got := s.run("deploy", "--timeout=25s")
		s.wantRefusal(got, []string{"secret reader.join_token was not written within", "by job broker, which produces it"}, []string{"site logs broker"})
		if got.duration > soon {
			t.Errorf("it took %s", got.duration)
		}
		if !s.registered("broker") || s.registered("reader") {
			t.Error("not exactly the producer was registered")
		}
		if err := s.healthy("broker"); err != nil {
			t.Errorf("the producer: %v", err)
		}
	})

	t.Run("what reads a secret starts after it was written", func(t *testing.T) {
		s := s.in(t)
		s.commitHolders("a producer that takes its time", nil, broker("produce", "first"), reader(port, tokenOfBroker, "join_token"))
		got := s.must("deploy")
		if !strings.Contains(got.stderr, "waiting for reader.join_token") {
			t.Errorf("it does not say what it waits for: %v", got)
		}
		written := s.bao().written("reader/join_token")
		registered, allocated := s.begun("reader")
		if !written.Before(registered) || !written.Before(allocated) {
			t.Errorf("written at %s, its reader was registered at %s and allocated at %s", written, registered, allocated)
		}
		producerRegistered, _ := s.begun("broker")
		if !producerRegistered.Before(written) {
			t.Errorf("written at %s, its producer was registered at %s", written, producerRegistered)
		}
		t.Logf("producer %s, then the value %s, then the reader",
			written.Sub(producerRegistered).Round(time.Millisecond), registered.Sub(written).Round(time.Millisecond))
		s.shows(port, "first")
		s.unchanged("a second deploy", func() { s.must("deploy") })
	})

	// The commands run on this machine: how often, they leave in a file of this test.
	folder := t.TempDir()
	counter := filepath.Join(folder, "runs")
	mint := func(script string) map[string]string {
		return map[string]string{"tools/mint": "#!/bin/sh\nset -e\necho ran >>" + counter + "\n" + script + "\n", "tools/seed": "committed"}
	}
	runs := func() int {
		content, err := os.ReadFile(counter)
		if err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
		return strings.Count(string(content), "ran\n")
	}
	// Files of a commit are written without leave to run them.
	executable := func(s *testSite, message string) {
		if err := os.Chmod(filepath.Join(s.dir, "tools", "mint"), 0o755); err != nil {
			s.t.Fatal(err)
		}
		s.commit(message, nil)
	}
	serial := tokenOfBroker + "secret \"serial\" {\n  produced_by {\n    command = [\"./tools/mint\"]\n  }\n}\n"

	t.Run("a command that fails is said without what it printed", func(t *testing.T) {
		s := s.in(t)
		s.commitHolders("a failing command", mint("echo "+plantedSecret+"\necho cannot mint "+plantedSecret+" >&2\nexit 7"),
			broker("produce", "first"), reader(port, serial, "join_token", "serial"))
		executable(s, "it can be run")
		s.wantRefusal(s.run("deploy"), []string{"secret reader.serial", "./tools/mint ended with exit code 7", "cannot mint"}, []string{"./tools/mint"})
		if got := s.run("deploy", "--json", "--verbose"); got.code != 1 || strings.Contains(got.stdout+got.stderr, "PLANTED0SECRET") {
			t.Errorf("with --json --verbose: %v", got)
		}
		if runs() != 2 {
			t.Errorf("the command ran %d times, want once a deploy", runs())
		}
	})

	t.Run("what a command of the commit prints becomes the value once", func(t *testing.T) {
		s := s.in(t)
		before := runs()
		s.commitHolders("a command", mint("cat tools/seed\necho\necho"), broker("produce", "first"), reader(port, serial, "join_token", "serial"))
		executable(s, "it can be run")
		s.write(filepath.Join(s.dir, "tools", "seed"), "edited and not committed")
		s.must("plan")
		if runs() != before {
			t.Error("a plan ran the command")
		}
		s.must("deploy")
		if got := s.must("secrets", "get", "reader.serial", "--reveal").stdout; got != "committed" {
			t.Errorf("the value is %q", got)
		}
		s.shows(port, "first\ncommitted")
		s.commit("the seed is another one", nil)
		s.must("deploy")
		if got := runs() - before; got != 1 {
			t.Errorf("the command ran %d times, want once", got)
		}
		if got := s.must("secrets", "get", "reader.serial", "--reveal").stdout; got != "committed" {
			t.Errorf("the value became %q", got)
		}
	})
}

// shows waits until a reader shows what it read.
func (s *testSite) shows(port int, want string) {
	s.t.Helper()
	s.until("the reader to show its secrets", soon, func() error {
		got, err := s.get(port, "/")
		if err == nil && strings.TrimSpace(got) != want {
			err = fmt.Errorf("it shows %q, want %q", got, want)
		}
		return err
	})
}

func TestProducersThatCannotBeAreSaidBeforeAnyHostIsTouched(t *testing.T) {
	for title, test := range map[string]struct {
		components map[string]string // further lines of component.hcl
		reads      map[string]string // the secret that the job's template reads
		says       []string
	}{
		"two that wait for each other": {
			map[string]string{
				"alpha": producedBy("from_beta", "beta"),
				"beta":  producedBy("from_gamma", "gamma"),
				"gamma": producedBy("from_alpha", "alpha"),
			},
			map[string]string{"alpha": "alpha/from_beta", "beta": "beta/from_gamma", "gamma": "gamma/from_alpha"},
			[]string{
				"jobs/alpha/alpha.nomad.hcl:7,",
				"alpha waits for beta (which produces alpha.from_beta) waits for gamma (which produces beta.from_gamma) waits for alpha (which produces gamma.from_alpha)",
			},
		},
		"one that waits by after as well": {
			map[string]string{"alpha": producedBy("from_beta", "beta"), "beta": "after = [\"alpha\"]\n"},
			map[string]string{"alpha": "alpha/from_beta"},
			[]string{"alpha waits for beta (which produces alpha.from_beta) waits for alpha"},
		},
		"one that is not active": {
			map[string]string{"alpha": producedBy("from_beta", "beta")},
			map[string]string{"alpha": "alpha/from_beta"},
			[]string{"jobs/alpha/component.hcl:3,", "alpha waits for beta: alpha.from_beta is produced by beta, which is not active"},
		},
	} {
		t.Run(title, func(t *testing.T) {
			s, it := newLocalSite(t)
			files := map[string]string{}
			active := []string{"openbao", "hello"}
			for component, content := range test.components {
				active = append(active, component)
				files["jobs/"+component+"/component.hcl"] = content
				files["jobs/"+component+"/"+component+".nomad.hcl"] = readingJob(component, test.reads[component])
			}
			files["sites/"+name+"/site.hcl"] = trappedSiteWith(it.port, active...)
			s.commit(title, files)
			s.wantUntouched(it, s.bootstrapArgs(), test.says, []string{"correct and commit the file named above"})
			s.wantUntouched(it, []string{"deploy"}, test.says, nil)
			s.wantUntouched(it, []string{"plan"}, test.says, nil)
		})
	}
}

// wantUntouched runs a command that must be refused before any host is touched.
func (s *testSite) wantUntouched(it *trap, args, says, hints []string) result {
	s.t.Helper()
	got := s.run(args...)
	s.wantRefusal(got, says, hints)
	if calls := it.calls.Load(); calls > 0 {
		s.t.Errorf("the host was connected to %d times", calls)
	}
	return got
}

// trappedSiteWith is a site in the trap with these components.
func trappedSiteWith(port int, components ...string) string {
	slices.Sort(components)
	var active strings.Builder
	for _, component := range components {
		fmt.Fprintf(&active, "  component %q {}\n", component)
	}
	return strings.Replace(trappedSiteHCL(port), "  component \"hello\" {}\n", active.String(), 1)
}

// readingJob is a job that reads a secret, if one is named, on its line 7.
func readingJob(name, secret string) string {
	if secret == "" {
		return strings.ReplaceAll(plainJob, `"hello"`, fmt.Sprintf("%q", name))
	}
	return regexp.MustCompile(`(?s)driver = "podman"\n`).ReplaceAllString(strings.ReplaceAll(plainJob, `"hello"`, fmt.Sprintf("%q", name)),
		"driver = \"podman\"\n      vault {}\n      template {\n        data = \"{{ with secret \\\"site/data/"+secret+"\\\" }}{{ .Data.data.value }}{{ end }}\"\n        destination = \"local/value\"\n      }\n")
}
