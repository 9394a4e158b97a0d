package e2e

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io/fs"
	"maps"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// plantedValues are values that must be nowhere, by what they are.
type plantedValues map[string]string

// spellings are the ways in which a text could show a value.
func spellings(value string) []string {
	quoted, _ := json.Marshal(value)
	var plain bytes.Buffer
	encoder := json.NewEncoder(&plain)
	encoder.SetEscapeHTML(false)
	_ = encoder.Encode(value)
	return []string{
		value, strings.Trim(string(quoted), `"`), strings.Trim(plain.String(), "\"\n"),
		url.QueryEscape(value), base64.StdEncoding.EncodeToString([]byte(value)),
	}
}

// in names the values that a text shows.
func (p plantedValues) in(text string) []string {
	var found []string
	for what, value := range p {
		if slices.ContainsFunc(spellings(value), func(spelled string) bool { return strings.Contains(text, spelled) }) {
			found = append(found, what)
		}
	}
	return found
}

// sampler looks at all processes of this machine, the lab's too, again and again.
type sampler struct {
	stop   chan struct{}
	done   sync.WaitGroup
	rounds int
	found  map[string]bool
}

func (s *testSite) sample(values plantedValues) *sampler {
	s.t.Helper()
	values = maps.Clone(values) // more are planted meanwhile
	running := &sampler{stop: make(chan struct{}), found: map[string]bool{}}
	running.done.Go(func() {
		ticker := time.NewTicker(50 * time.Millisecond)
		defer ticker.Stop()
		for {
			select {
			case <-running.stop:
				return
			case <-ticker.C:
			}
			running.rounds++
			files, _ := filepath.Glob("/proc/[0-9]*/cmdline")
			for _, file := range files {
				for _, kind := range []string{"cmdline", "environ"} {
					content, err := os.ReadFile(filepath.Join(filepath.Dir(file), kind))
					if err != nil {
						continue // it ended
					}
					for _, what := range values.in(string(content)) {
						running.found[what+" in the "+kind+" of a process"] = true
					}
				}
			}
		}
	})
	return running
}

func (r *sampler) end() (rounds int, found []string) {
	close(r.stop)
	r.done.Wait()
	return r.rounds, slices.Sorted(maps.Keys(r.found))
}

// commands are those that site's help names, with their own.
func (s *testSite) commands(of ...string) []string {
	s.t.Helper()
	help := s.must(append(of, "--help")...).stdout
	_, listed, group := strings.Cut(help, "Available Commands:\n")
	if !group {
		return []string{strings.Join(of, " ")}
	}
	listed, _, _ = strings.Cut(listed, "\n\n")
	var all []string
	for line := range strings.Lines(listed) {
		if fields := strings.Fields(line); len(fields) > 0 {
			all = append(all, s.commands(append(slices.Clone(of), fields[0])...)...)
		}
	}
	return all
}

// leaky adds a component that tells what it knows if it is asked to.
func (s *testSite) leaky(files map[string]string) {
	s.t.Helper()
	folder := filepath.Join("testdata", "leaky")
	all := map[string]string{}
	if err := filepath.WalkDir(folder, func(path string, entry fs.DirEntry, err error) error {
		if err == nil && !entry.IsDir() {
			inside, _ := filepath.Rel(folder, path)
			all[filepath.Join("jobs", "leaky", inside)] = s.read(path)
		}
		return err
	}); err != nil {
		s.t.Fatal(err)
	}
	path, content := s.activate("leaky")
	all[path] = content
	maps.Copy(all, files)
	s.commit("a component that could tell", all)
}

// private writes a file that only we can read, outside of the repository.
func private(t *testing.T, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "value")
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// quick, among exit codes, leaves it at the run with --json.
const quick = -2

// loudCheck refuses every value and says on both outputs what it was given.
const loudCheck = "value=$(cat)\necho \"out $value\"\necho \"refused: $value\" >&2\nexit 1\n"

func TestAPlantedValueIsInNothingThatSiteSaysOrKeeps(t *testing.T) {
	s := newSite(t, platform)
	temp := privateTemp(t)
	begun := time.Now()
	values := plantedValues{
		"the external value": `PLANTED/external+"1&<x>` + fmt.Sprint(begun.UnixNano()),
		"the refused value":  `PLANTED/refused+"2&<x>` + fmt.Sprint(begun.UnixNano()),
	}
	external, refused := private(t, values["the external value"]), private(t, values["the refused value"])
	produced := filepath.Join(t.TempDir(), "produced") // what the failing producer made
	watching := s.sample(values)

	// run runs a command, twice, and looks at all that it says.
	ran := map[string]bool{}
	checked := func(codes []int, args ...string) result {
		t.Helper()
		var last result
		for _, flags := range [][]string{{"--verbose", "--json"}, {"--verbose"}} {
			if flags[len(flags)-1] != "--json" && slices.Contains(codes, quick) {
				continue
			}
			front, behind, dashed := slices.Clone(args), []string(nil), slices.Index(args, "--")
			if dashed >= 0 {
				front, behind = slices.Clone(args[:dashed]), args[dashed:]
			}
			last = s.run(append(append(front, flags...), behind...)...)
			if !slices.Contains(codes, last.code) {
				t.Errorf("want one of the exit codes %v\n%v", codes, last)
			}
			if found := values.in(last.stdout + last.stderr); len(found) > 0 {
				t.Errorf("%s is shown by %s", strings.Join(found, ", "), strings.Join(last.args, " "))
			}
		}
		for length := len(args); length > 0; length-- {
			ran[strings.Join(args[:length], " ")] = true
		}
		return last
	}
	phase := time.Now()
	took := func(what string) {
		t.Logf("%s took %s", what, time.Since(phase).Round(time.Second))
		phase = time.Now()
	}
	good := func(args ...string) result { t.Helper(); return checked([]int{0}, args...) }
	bad := func(args ...string) result { t.Helper(); return checked([]int{1, 2, 3, 4}, args...) }
	bootstrap := "--root-token-file=" + s.tokenFile

	// Commands that know nothing of a site: each once as it is, and with a wrong flag.
	for _, args := range [][]string{
		{"version"}, {"tool", "list"}, {"tool", "which", "nomad"}, {"lab", "status", "--name=none"}, {"init"}, {"operators", "list"},
		{"completion", "bash"}, {"completion", "fish"}, {"completion", "powershell"}, {"completion", "zsh"}, {"help"},
		{"lab", "down", "--name=none"}, {"lab", "kill", "--name=none"}, {"lab", "reboot", "--name=none"}, {"lab", "reset", "--name=none"},
		{"lab", "restore", "none", "--name=none"}, {"lab", "shell", "--name=none"}, {"lab", "snapshot", "none", "--name=none"},
		{"lab", "start", "--name=none"}, {"lab", "up", "none"}, {"debs", "fetch", "none"}, {"debs", "lock", "none"},
		{"tool", "install", "none"}, {"tool", "verify", "none"}, {"tool", "run", "none"}, {"root-token", "new", external},
		{"operators", "add", "else", "--public-key-file=" + external}, {"operators", "remove", "nobody"},
	} {
		checked([]int{0, 1, 2}, args...)
		bad(append(slices.Clone(args), "--wrong")...)
	}

	took("what knows no site")
	s.leaky(map[string]string{
		"jobs/leaky/produce": fmt.Sprintf("umask 077\nhead -c 24 /dev/urandom | base64 | tee %s\ncat %s >&2\nexit 1\n", produced, produced),
	})
	bad("deploy") // its producer fails, and tells
	values["what the failing producer made"] = strings.TrimSpace(s.read(produced))
	if got := s.run("deploy"); got.code != 1 || !strings.Contains(got.stderr, "[redacted]") {
		t.Errorf("the producer's words are not shown at all: this proves nothing\n%v", got)
	}
	s.leaky(nil)
	bad("deploy") // the external secret is missing
	bad("secrets", "import", "leaky.extrenal", "--from-file="+external)
	good("secrets", "import", "leaky.external", "--from-file="+external)
	good("secrets", "import", "leaky.external", "--from-command", "--", "cat", external)
	bad("secrets", "set", "leaky.external") // there is no terminal
	good("deploy")
	for what, name := range map[string]string{
		"the generated value": "leaky.generated", "the produced value": "leaky.produced", "the application's password": "hello.database_password",
	} {
		values[what] = s.must("secrets", "get", name, "--reveal").stdout
		if len(values[what]) < 16 {
			t.Fatalf("%s is %q", what, values[what])
		}
	}
	if shown := s.must("secrets", "get", "leaky.external", "--reveal").stdout; shown != values["the external value"] {
		t.Fatal("the value is another one than was imported: this proves nothing")
	}
	if rounds, found := watching.end(); rounds < 10 || len(found) > 0 {
		t.Errorf("after %d looks at all processes: %v", rounds, found)
	}
	watching = s.sample(values)

	daily := [][]string{
		{"bootstrap-deploy", bootstrap}, {"deploy"}, {"plan"}, {"plan", bootstrap}, {"status"}, {"logs", "hello"}, {"logs", "leaky"},
		{"secrets", "status"}, {"secrets", "get", "leaky.external"}, {"secrets", "verify"}, {"operators", "list"},
		{"secrets", "rotate", "--due"}, {"secrets", "history"},
		{"env", "--", "nomad", "job", "inspect", "leaky"}, {"tunnel", "hello", "--get=/version"},
	}
	took("bringing the values")
	for _, args := range daily {
		good(args...)
	}
	bad("secrets", "get", "leaky.extrenal")
	bad("secrets", "verify", "leaky.extrenal")
	bad("logs", "laeky")
	bad("tunnel", "laeky", "--get=/")
	bad("env", "--", "nomad", "job", "inspect", "laeky")
	bad("plan", "--site=none")
	good("artifacts", "gc", "--dry-run")
	for _, args := range [][]string{ // this site has no store
		{"artifacts", "ls"}, {"artifacts", "push"}, {"provider", "status"}, {"provider", "doctor"},
		{"artifacts", "export", "hello@sha256:" + strings.Repeat("0", 64), filepath.Join(t.TempDir(), "blob")},
		{"provider", "import-admin-pair", "--token-a-file=" + external, "--token-b-file=" + refused},
		{"provider", "rotate-admin-pair"}, {"provider", "rotate-object-storage"},
	} {
		bad(args...)
	}

	took("what goes well")
	t.Run("a check that says what it was given", func(t *testing.T) {
		s.commit("a loud check", map[string]string{"jobs/leaky/check": loudCheck})
		got := bad("secrets", "import", "leaky.external", "--from-file="+refused)
		if !strings.Contains(got.stderr, "refused: [redacted]") {
			t.Errorf("its words are not shown: this proves nothing\n%v", got)
		}
		got = checked([]int{3, quick}, "secrets", "rotate", "leaky.external", "--from-file="+refused)
		if !strings.Contains(got.stderr+got.stdout, "refused: [redacted]") {
			t.Errorf("its words are not shown by a rotation: this proves nothing\n%v", got)
		}
		s.psql("postgres", "ALTER ROLE leaky PASSWORD 'another'")
		got = bad("secrets", "verify")
		if strings.Count(got.stdout, "FAILS") != 2 {
			t.Errorf("want the check and the login to fail\n%v", got)
		}
		s.leaky(nil)
	})

	t.Run("a rollout whose task prints its secret", func(t *testing.T) {
		s.commit("it tells", map[string]string{"jobs/leaky/leaky.nomad.hcl": s.replace("jobs/leaky/leaky.nomad.hcl", `MODE = "serve"`, `MODE = "tell"`)})
		got := checked([]int{3, quick}, "deploy")
		log := strings.Join(s.verdicts(got)["leaky"].LogTail, "\n")
		for _, want := range []string{"stdout: the key is [redacted]", `stderr: {"key":"[redacted]"}`} {
			if !strings.Contains(log, want) {
				t.Errorf("the log's end has no %q\n%v", want, got)
			}
		}
		s.leaky(nil)
		s.must("deploy")
	})

	took("a check and a rollout that tell")
	t.Run("with a wrong key", func(t *testing.T) {
		wrong := filepath.Join(t.TempDir(), "id")
		if out, err := exec.CommandContext(t.Context(), "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", wrong).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		configuration := filepath.Join(s.dir, ".lab", name, "ssh_config")
		usual := s.read(configuration)
		s.write(configuration, strings.ReplaceAll(usual, filepath.Join(s.lab.Dir(), "id"), wrong))
		for _, args := range append(daily, []string{"secrets", "import", "leaky.external", "--from-file=" + external}) {
			if args[0] != "operators" {
				checked([]int{1, quick}, args...)
			}
		}
		s.write(configuration, usual)
	})

	t.Run("with a host that is off", func(t *testing.T) {
		if err := s.lab.Kill(t.Context(), s.host.name); err != nil {
			t.Fatal(err)
		}
		for _, args := range [][]string{
			{"bootstrap-deploy", bootstrap}, {"deploy"}, {"plan"}, {"status"}, {"logs", "hello"},
			{"secrets", "get", "leaky.external"}, {"secrets", "import", "leaky.external", "--from-file=" + external},
		} {
			checked([]int{0, 1, quick}, args...) // for status it is no error
		}
		if err := s.lab.Start(t.Context(), s.host.name); err != nil {
			t.Fatal(err)
		}
		s.waitHealthy("hello")
		s.must("deploy")
	})

	took("what cannot log in")
	for _, command := range s.commands() {
		if !ran[command] {
			t.Errorf("`site %s` was not run: add it above", command)
		}
	}
	if rounds, found := watching.end(); rounds < 100 || len(found) > 0 {
		t.Errorf("after %d looks at all processes: %v", rounds, found)
	}
	s.wantNowhere(values, begun, temp)
	took("looking everywhere")
	s.wantDone()
}

// wantNowhere looks for values in all that is kept: on this machine, on the
// host and in Nomad.
func (s *testSite) wantNowhere(values plantedValues, since time.Time, temp string) {
	s.t.Helper()
	cache := os.Getenv("SITE_CACHE")
	if cache == "" {
		folder, err := os.UserCacheDir()
		if err != nil {
			s.t.Fatal(err)
		}
		cache = filepath.Join(folder, "site")
	}
	looked := 0
	for _, folder := range []string{s.dir, temp, cache} {
		_ = filepath.WalkDir(folder, func(path string, entry fs.DirEntry, err error) error {
			if err != nil || !entry.Type().IsRegular() {
				return nil
			}
			if info, err := entry.Info(); err != nil || info.ModTime().Before(since) {
				return nil
			}
			content, err := os.ReadFile(path)
			if err == nil {
				looked++
				for _, what := range values.in(string(content)) {
					s.t.Errorf("%s is in %s", what, path)
				}
			}
			return nil
		})
	}
	if looked < 10 {
		s.t.Errorf("only %d files were looked at: this proves nothing", looked)
	}

	var patterns strings.Builder
	for _, value := range values {
		for _, spelled := range spellings(value) {
			patterns.WriteString(spelled + "\n")
		}
	}
	journal := s.host.exec("journalctl", "--output=cat", "--no-pager", "--all")
	// What an application prints is in its own log. Its secrets lie in memory.
	found := s.host.shell("cat > /run/patterns <<'END'\n" + patterns.String() + "END\n" + `
		grep -rlaFf /run/patterns /etc /opt /root /home /tmp /run /srv /var --exclude-dir=blobs --exclude-dir=overlay --exclude=patterns 2>/dev/null |
			grep -vE '^/var/lib/nomad/alloc/[0-9a-f-]+/((leaky|hello)/secrets/(external|others|database_password)|alloc/logs/leaky\.(stdout|stderr)\.[0-9]+)$' || true
		rm /run/patterns`)
	if found != "" {
		s.t.Errorf("a value is on the host in\n%s", found)
	}
	for _, what := range values.in(journal) {
		s.t.Errorf("%s is in the journal", what)
	}
	paths := []string{"/v1/vars", "/v1/evaluations", "/v1/allocations", "/v1/deployments", "/v1/acl/policies"}
	for _, job := range []string{"hello", "leaky", "openbao", "postgresql"} {
		paths = append(paths, "/v1/job/"+job, "/v1/job/"+job+"/versions", "/v1/job/"+job+"/allocations")
	}
	for _, path := range paths {
		var document json.RawMessage
		s.nomad(path, &document)
		for _, what := range values.in(string(document)) {
			s.t.Errorf("%s is in Nomad's %s", what, path)
		}
	}
}
