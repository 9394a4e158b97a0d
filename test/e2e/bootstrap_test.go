package e2e

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

const mainGo = "jobs/hello/app/main.go"

func TestABareHostBecomesAHealthyJob(t *testing.T) {
	s := newSite(t, bare)
	if out, err := s.host.tryExec("sh", "-c", "command -v python3 podman sudo nomad"); err == nil {
		t.Fatalf("the host is not bare: it has %s", out)
	}
	if routes := s.host.exec("ip", "route", "show", "default"); routes != "" {
		t.Fatalf("the host could fetch things itself: it has the route %s", routes)
	}

	older := s.head()
	newer := s.commit("another greeting", map[string]string{mainGo: s.replace(mainGo, "hello from %s", "good morning from %s")})
	// What is not committed would not even compile.
	s.write(filepath.Join(s.dir, mainGo), "no Go at all")
	s.write(filepath.Join(s.dir, "jobs/hello/app/forgotten.go"), "nor is this")

	got := s.bootstrap("--sha=" + older)
	t.Logf("bootstrap-deploy took %s\n%s", got.duration, got.stdout)
	if sha := s.version(); sha != older {
		t.Errorf("the application says it is %s, deployed was %s", sha, older)
	}
	if page, err := s.get(8080, "/"); err != nil || page != "hello from "+older+"\n" {
		t.Errorf("the application answers %q, %v: not what the commit's content says", page, err)
	}
	for _, path := range []string{mainGo, "jobs/hello/app/forgotten.go"} {
		if !regexp.MustCompile(`(?m)^warning: uncommitted changes .*` + regexp.QuoteMeta(path)).MatchString(got.stderr) {
			t.Errorf("no warning names the uncommitted %s:\n%s", path, got.stderr)
		}
	}
	for _, step := range []string{"connect", "site-host", "init material", "platform artifacts", "packages", "host", "nomad", "artifacts", "jobs", "release"} {
		if !regexp.MustCompile(`(?m)^ +` + step + ` +\d+ +\d+\.\d *$`).MatchString(got.stdout) {
			t.Errorf("the table has no step %q with its changes and seconds:\n%s", step, got.stdout)
		}
	}
	if info, err := os.Stat(filepath.Join(s.dir, "sites", name, "init.age")); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the sealed init material: %v, %v", info, err)
	}
	if !strings.Contains(got.stderr, "warning: commit sites/"+name+"/init.age") {
		t.Errorf("nothing says that the init material must be committed:\n%s", got.stderr)
	}

	s.runsInPodman("hello")
	if routes := s.host.exec("ip", "route", "show", "default"); routes != "" {
		t.Errorf("the host got the route %s", routes)
	}

	// From now on the operator's SSH key is enough, also while the host boots.
	s.keepBootstrapped()
	s.must("deploy")
	if sha := s.version(); sha != newer {
		t.Errorf("after a deploy of %s the application says it is %s", newer, sha)
	}
	if page, err := s.get(8080, "/"); err != nil || page != "good morning from "+newer+"\n" {
		t.Errorf("after the deploy the application answers %q, %v", page, err)
	}
}

// runsInPodman holds a job against what Nomad and podman say on the host.
func (s *testSite) runsInPodman(job string) {
	s.t.Helper()
	s.waitHealthy(job)
	found := 0
	image := regexp.MustCompile(`^127\.0\.0\.1:7380/` + name + `/` + job + `@sha256:[0-9a-f]{64}$`)
	for _, each := range s.containers() {
		if strings.HasPrefix(each.Name, job+"-") {
			found++
			if !image.MatchString(each.Image) {
				s.t.Errorf("podman runs the image %q", each.Image)
			}
		}
	}
	if found != 1 {
		s.t.Errorf("podman runs %d containers of job %s: %v", found, job, s.containers())
	}
	var registered struct {
		TaskGroups []struct{ Tasks []struct{ Driver string } }
	}
	s.nomad("/v1/job/"+job, &registered)
	if driver := registered.TaskGroups[0].Tasks[0].Driver; driver != "podman" {
		s.t.Errorf("the task's driver is %q", driver)
	}
}

func TestARunThatFindsNothingToDoWritesNothing(t *testing.T) {
	s := newSite(t, bootstrapped, readOnly)
	bootstrapDeploy := []string{"bootstrap-deploy", "--root-token-file=" + s.tokenFile}
	for _, args := range [][]string{{"deploy"}, bootstrapDeploy, {"plan"}} {
		s.unchanged(args[0], func() {
			got := s.must(args...)
			if !strings.Contains(got.stdout, "nothing to do") {
				t.Errorf("it does not say that there is nothing to do: %v", got)
			}
			t.Logf("%s without anything to do took %s", args[0], got.duration)
		})
	}
	if code, changes := s.planCheck(); code != 0 || len(changes) > 0 {
		t.Errorf("plan --check ended with %d and %v", code, changes)
	}
	// A commit that changes nothing of any job is nothing to do either.
	before := s.version()
	s.commit("words", map[string]string{"README.md": "# A site\n"})
	s.unchanged("deploy of a commit without effect", func() { s.must("deploy") })
	if sha := s.version(); sha != before {
		t.Errorf("a commit without effect restarted the job: it is %s", sha)
	}
}

func TestAnOperatorLooksAround(t *testing.T) {
	s := newSite(t, bootstrapped, readOnly)
	s.unchanged("looking around", func() {
		for _, look := range []struct {
			args []string
			want string
		}{
			{[]string{"status"}, `(?m)^hello +healthy +1 of 1 +[0-9a-f]{12}`},
			{[]string{"status", "--json"}, `"schema": "site\.status/v1"`},
			{[]string{"logs", "hello"}, `hello listens`},
			{[]string{"env", "--", "sh", "-c", `test -n "$NOMAD_TOKEN" && echo "at $NOMAD_ADDR"`}, `^at http://127\.0\.0\.1:\d+\n$`},
		} {
			if got := s.must(look.args...); !regexp.MustCompile(look.want).MatchString(got.stdout) {
				t.Errorf("no %s in: %v", look.want, got)
			}
		}
	})
}
