package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/nomad-site/site/internal/deploy"
)

// feed is run with something on standard input.
func (s *testSite) feed(input string, args ...string) result {
	s.t.Helper()
	command := exec.CommandContext(s.t.Context(), s.site, args...)
	command.Dir, command.Env, command.Stdin = s.dir, s.environment(), strings.NewReader(input)
	var stdout, stderr bytes.Buffer
	command.Stdout, command.Stderr = &stdout, &stderr
	err := command.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		s.t.Fatalf("site %s: %v", strings.Join(args, " "), err)
	}
	return result{args: args, stdout: stdout.String(), stderr: stderr.String(), code: command.ProcessState.ExitCode()}
}

// says insists on an exit code and on parts of what a command printed.
func (s *testSite) says(got result, code int, parts ...string) {
	s.t.Helper()
	if got.code != code {
		s.t.Errorf("exit code %d, want %d\n%v", got.code, code, got)
	}
	for _, part := range parts {
		if !strings.Contains(got.stdout+got.stderr, part) {
			s.t.Errorf("it does not say %q\n%v", part, got)
		}
	}
}

// readingFiles are those of a probe whose job reads secrets of its own, each
// into the file local/NAME.
func (s *testSite) readingFiles(p probe, catalogue string, secrets ...string) map[string]string {
	s.t.Helper()
	files := p.files(s.t)
	component, job := filepath.Join("jobs", p.Name, "component.hcl"), filepath.Join("jobs", p.Name, p.Name+".nomad.hcl")
	files[component] += catalogue
	if len(secrets) > 0 {
		blocks := "\n      vault {}\n"
		for _, one := range secrets {
			blocks += fmt.Sprintf(`
      template {
        destination = "local/%[2]s"
        change_mode = "noop"
        data        = "{{ with secret \"site/data/%[1]s/%[2]s\" }}{{ .Data.data.value }}{{ end }}"
      }
`, p.Name, one)
		}
		files[job] = strings.Replace(files[job], "\n      env {", blocks+"\n      env {", 1)
	}
	return files
}

// allocations are the ids of a job's allocations that are to run, sorted.
func (s *testSite) allocations(job string) []string {
	s.t.Helper()
	var found []struct{ ID, DesiredStatus, ClientStatus string }
	s.nomad("/v1/job/"+job+"/allocations", &found)
	var ids []string
	for _, each := range found {
		if each.DesiredStatus == "run" && each.ClientStatus != "complete" {
			ids = append(ids, each.ID)
		}
	}
	slices.Sort(ids)
	return ids
}

// rendered is what a job's template wrote into the file local/NAME.
func (s *testSite) rendered(job, file string) string {
	s.t.Helper()
	ids := s.allocations(job)
	if len(ids) != 1 {
		s.t.Fatalf("job %s has the allocations %v, not one", job, ids)
	}
	return s.host.exec("cat", filepath.Join("/var/lib/nomad/alloc", ids[0], job, "local", file))
}

// released are the components of the newest release record, sorted.
func (s *testSite) released() []string {
	s.t.Helper()
	var records []struct{ Components map[string]any }
	text := s.host.exec("/opt/site/bin/site-host", "release", "list", "--dir", "/var/lib/site/releases")
	if err := json.Unmarshal([]byte(text), &records); err != nil || len(records) == 0 {
		s.t.Fatalf("the release records are %q: %v", text, err)
	}
	return slices.Sorted(maps.Keys(records[0].Components))
}

// secretRows is what `secrets status` knows, by name.
func (s *testSite) secretRows() map[string]deploy.SecretRow {
	s.t.Helper()
	got := s.must("secrets", "status", "--json")
	var status deploy.SecretsStatus
	if err := json.Unmarshal([]byte(got.stdout), &status); err != nil || status.Schema != deploy.SecretsVersion {
		s.t.Fatalf("not a status of secrets: %v\n%v", err, got)
	}
	rows := map[string]deploy.SecretRow{}
	for _, row := range status.Secrets {
		rows[row.Name] = row
	}
	return rows
}

// writesNothing runs do and fails the test if OpenBao was written to.
func (s *testSite) writesNothing(what string, do func()) {
	s.t.Helper()
	before := len(s.mutations())
	do()
	if after := s.mutations(); len(after) != before {
		s.t.Errorf("%s wrote to OpenBao: %v", what, after[min(before, len(after)):])
	}
}

const mailerCatalogue = `
secret "api_key" {
  description = "key of the mail provider"
  external {
    check = ["grep", "--quiet", "^live-"]
  }
}

secret "webhook" {
  external {}
}
`

const shopCatalogue = `
secret "token" {
  description = "the courier's token"
  external {
    trailing_newline = "keep"
  }
}
`

// folder makes a folder of secret files with mode 0600.
func (s *testSite) folder(files map[string]string) string {
	s.t.Helper()
	folder := s.t.TempDir()
	for file, content := range files {
		s.write(filepath.Join(folder, file), content)
	}
	return folder
}

func TestMissingExternalSecretsHoldBackOnlyWhoNeedsThem(t *testing.T) {
	s := newSite(t, platform)
	files := map[string]string{filepath.Join("behave", "main.go"): s.read(filepath.Join("testdata", "behave", "main.go"))}
	maps.Copy(files, s.readingFiles(probe{Name: "mailer", Port: 9001}, mailerCatalogue, "api_key", "webhook"))
	maps.Copy(files, s.readingFiles(probe{Name: "shop", Port: 9002}, shopCatalogue, "token"))
	maps.Copy(files, s.readingFiles(probe{Name: "clock", Port: 9003}, ""))
	maps.Copy(files, s.readingFiles(probe{Name: "report", Port: 9004, After: []string{"mailer"}}, ""))
	path, content := s.activate("mailer", "shop", "clock", "report")
	files[path] = content
	s.commit("four components", files)

	t.Run("one error names all that is missing and the rest is deployed", func(t *testing.T) {
		s := s.in(t)
		got := s.run("deploy")
		s.says(got, 1)
		want := `error: external secrets: 3 secrets from outside are missing:
  mailer.api_key (key of the mail provider), needed by mailer: site secrets import mailer.api_key --from-file=FILE
  mailer.webhook, needed by mailer: site secrets import mailer.webhook --from-file=FILE
  shop.token (the courier's token), needed by shop: site secrets import shop.token --from-file=FILE
hint: import each as its line says, then deploy again
`
		if !strings.HasSuffix(got.stderr, want) || strings.Count(got.stderr, "error: ") != 1 {
			t.Errorf("want one error\n%s\n%v", want, got)
		}
		s.waitHealthy("clock")
		s.waitHealthy("hello")
		var jobs []struct{ ID string }
		s.nomad("/v1/jobs", &jobs)
		for _, job := range jobs {
			if slices.Contains([]string{"mailer", "shop", "report"}, job.ID) {
				t.Errorf("job %s is registered without its secrets", job.ID)
			}
		}
		if released := s.released(); !slices.Equal(released, []string{"clock", "hello", "openbao", "postgresql"}) {
			t.Errorf("the release record has %q", released)
		}
		s.planIs("import secret mailer.api_key", "import secret mailer.webhook", "import secret shop.token")
	})

	t.Run("the status says what is missing and who waits for it", func(t *testing.T) {
		s := s.in(t)
		s.says(s.run("secrets", "status", "--check"), 2)
		row := s.secretRows()["mailer.api_key"]
		if row.State != deploy.SecretMissing || row.Generation != 0 || row.Source != "external" || !slices.Equal(row.Consumers, []string{"mailer"}) {
			t.Errorf("the missing secret is %+v", row)
		}
		text := s.must("secrets", "status").stdout
		for _, line := range []string{`shop\.token +missing +external +0 +- +- +- +shop`, `hello\.database_password +ok +generated +1 +.*hello`} {
			if !regexp.MustCompile("(?m)^" + line + "$").MatchString(text) {
				t.Errorf("no line %s in\n%s", line, text)
			}
		}
		s.says(s.run("secrets", "get", "shop.token"), 1, "secret shop.token has no value")
	})

	t.Run("a value that fails its check is refused with all others", func(t *testing.T) {
		s := s.in(t)
		folder := s.folder(map[string]string{"mailer.api_key": "test-1", "mailer.webhook": "w1"})
		s.writesNothing("an import that is refused", func() {
			got := s.run("secrets", "import", "--from-folder="+folder)
			s.wantRefusal(got, []string{"secret mailer.api_key: its check refuses the value"}, []string{"nothing was stored", "--skip-check"})
		})
		if row := s.secretRows()["mailer.webhook"]; row.State != deploy.SecretMissing {
			t.Errorf("the other one was stored: %+v", row)
		}
	})

	const apiKey, webhook, token = "live-4711", "https://hooks.example.net/w1", "courier-token\n"
	t.Run("they are imported and the next deploy finishes", func(t *testing.T) {
		s := s.in(t)
		folder := s.folder(map[string]string{"mailer.api_key": apiKey + "\n", "mailer.webhook": webhook})
		got := s.must("secrets", "import", "--from-folder="+folder)
		s.says(got, 0, "mailer.api_key: stored, generation 1", "mailer.webhook: stored, generation 1",
			"mailer.api_key: the newline at the end was cut off")
		if strings.Contains(got.stderr, "mailer.webhook") {
			t.Errorf("nothing was cut off of the other one\n%v", got)
		}
		got = s.feed(token, "secrets", "import", "shop.token", "--from-file=-")
		s.says(got, 0, "shop.token: stored, generation 1")
		if strings.Contains(got.stderr, "newline") {
			t.Errorf("the newline is to be kept\n%v", got)
		}
		clock, hello := s.traces("clock"), s.traces("hello")
		s.must("deploy")
		for _, job := range []string{"mailer", "shop", "report"} {
			s.waitHealthy(job)
		}
		for what, want := range map[[2]string]string{{"mailer", "api_key"}: apiKey, {"mailer", "webhook"}: webhook, {"shop", "token"}: token} {
			if got := s.rendered(what[0], what[1]); got != want {
				t.Errorf("job %s reads %q, not %q", what[0], got, want)
			}
		}
		if s.traces("clock") != clock || s.traces("hello") != hello {
			t.Error("jobs were touched that had all they need")
		}
		if got := s.must("deploy"); !strings.Contains(got.stdout, "nothing to do") {
			t.Errorf("the second run has something to do\n%v", got)
		}
		s.says(s.run("secrets", "status", "--check"), 0)
		if row := s.secretRows()["shop.token"]; row.State != deploy.SecretOK || row.Generation != 1 || row.Created == nil {
			t.Errorf("the secret is %+v", row)
		}
	})

	t.Run("the same value again is not written", func(t *testing.T) {
		s := s.in(t)
		s.writesNothing("an import of what is there", func() {
			s.says(s.feed(apiKey, "secrets", "import", "mailer.api_key", "--from-file=-"), 0, "mailer.api_key: has this value already, generation 1")
		})
	})

	t.Run("a value is shown only when asked for", func(t *testing.T) {
		s := s.in(t)
		if got := s.must("secrets", "get", "shop.token"); !strings.Contains(got.stdout, "generation 1") || strings.Contains(got.stdout+got.stderr, "courier") {
			t.Errorf("without --reveal: %v", got)
		}
		if got := s.must("secrets", "get", "shop.token", "--reveal"); got.stdout != token {
			t.Errorf("with --reveal: %q, not %q", got.stdout, token)
		}
	})

	t.Run("verify proves what can be proven", func(t *testing.T) {
		s := s.in(t)
		s.says(s.run("secrets", "verify"), 0, "mailer.api_key: works (check)", "hello.database_password: works (database login)",
			"shop.token: has a value, and no way to prove it is declared")
		s.psql("postgres", "ALTER ROLE hello_a PASSWORD 'changed by hand'")
		s.says(s.feed("test-2", "secrets", "import", "mailer.api_key", "--from-file=-", "--skip-check"), 0, "generation 2")
		got := s.run("secrets", "verify")
		s.says(got, 2, "hello.database_password: FAILS: ", "wrong password", "mailer.api_key: FAILS: ")
		if strings.Contains(got.stdout+got.stderr, "test-2") {
			t.Errorf("it repeats a value\n%v", got)
		}
		s.says(s.run("secrets", "verify", "shop.token"), 0)
		s.says(s.feed(apiKey, "secrets", "import", "mailer.api_key", "--from-file=-"), 0, "generation 3")
		s.must("deploy")
		s.says(s.run("secrets", "verify"), 0)
	})
}

func TestWhatIsWrongWithSecretFilesIsSaidAtOnceBeforeAnyHostIsTouched(t *testing.T) {
	s, it := newLocalSite(t)
	s.host = &testHost{site: s} // there is none
	component := "secret \"payment_key\" {\n  external {}\n}\n\nsecret \"signing_key\" {\n  external {}\n}\n\nsecret \"webhook\" {\n  external {}\n}\n"
	s.commit("a catalogue", map[string]string{
		"jobs/hello/component.hcl": component,
		filepath.Join("sites", name, "site.hcl"): strings.Replace(trappedSiteHCL(it.port),
			"component \"hello\" {}", "component \"openbao\" {}\n\n  component \"hello\" {}", 1),
	})
	folder := s.folder(map[string]string{
		"hello.payment_key": plantedSecret, "hello.signing_key": "\n", "hello.webhook": strings.Repeat("x", 2<<20), "hello.pament_key": plantedSecret,
	})
	if err := os.Chmod(filepath.Join(folder, "hello.payment_key"), 0o644); err != nil {
		t.Fatal(err)
	}
	one := filepath.Join(folder, "hello.pament_key")
	for title, test := range map[string]struct {
		args, says, hints []string
	}{
		"several files, all with something wrong": {
			[]string{"--from-folder=" + folder},
			[]string{
				"hello.payment_key has mode 0644: others can read it", "secret hello.signing_key: the value is empty",
				"secret hello.webhook: the value has 2097152 bytes, the most is 524288",
				`no secret "hello.pament_key" in the catalogue; did you mean "hello.payment_key"?`,
			},
			[]string{"chmod 600 ", "a newline alone is none", "object storage", "site secrets status"},
		},
		"an unknown name with a file that others can read": {
			[]string{"hello.webhok", "--from-file=" + filepath.Join(folder, "hello.payment_key")},
			[]string{"0644", `did you mean "hello.webhook"?`}, []string{"chmod 600 "},
		},
		"two sources for one name":     {[]string{"hello.webhook", "--from-file=" + one, "--from-folder=" + folder}, []string{"in one way"}, []string{"--from-file"}},
		"no source":                    {[]string{"hello.webhook"}, []string{"in one way"}, []string{"--from-command"}},
		"a name twice":                 {[]string{"hello.webhook", "hello.webhook", "--from-file=" + one}, []string{"want one name, got 2"}, []string{"command line"}},
		"a folder without files":       {[]string{"--from-folder=" + t.TempDir()}, []string{"holds no files"}, []string{"like its secret"}},
		"a file that is not there":     {[]string{"hello.webhook", "--from-file=" + folder + "/absent"}, []string{"/absent"}, []string{"path of a file"}},
		"a date that is none":          {[]string{"hello.webhook", "--from-file=" + one, "--expires=soon"}, []string{`"soon" is not a date`}, []string{"2027-06-30"}},
		"a value on the command line":  {[]string{"hello.webhook", plantedSecret, "--from-file=" + one}, []string{"want one name"}, []string{"others can read it there"}},
		"a command that ends with one": {[]string{"hello.webhook", "--from-command", "--", "false"}, []string{"run false", "exit status 1"}, []string{"by hand"}},
	} {
		t.Run(title, func(t *testing.T) {
			s := s.in(t)
			before := it.calls.Load()
			s.wantRefusal(s.run(append([]string{"secrets", "import"}, test.args...)...), test.says, test.hints)
			if calls := it.calls.Load() - before; calls > 0 {
				t.Errorf("the host was connected to %d times", calls)
			}
		})
	}
	t.Run("a good file brings one to the host", func(t *testing.T) {
		s := s.in(t)
		got := s.feed("value", "secrets", "import", "hello.webhook", "--from-file=-")
		if it.calls.Load() == 0 {
			t.Errorf("a trap that nobody can reach proves nothing\n%v", got)
		}
	})
}
