package e2e

import (
	"archive/tar"
	"bytes"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nomad-site/site/internal/seal"
)

// plantedSecret stands in files that hold secrets: no output may repeat it.
const plantedSecret = "AGE-SECRET-KEY-1PLANTED0SECRET0THAT0NOBODY0MAY0SEE"

// trap is where the site's only host would be: it counts who comes there.
type trap struct {
	port  int
	calls atomic.Int64
}

func newTrap(t *testing.T) *trap {
	t.Helper()
	listener, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	it := &trap{port: listener.Addr().(*net.TCPAddr).Port}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			it.calls.Add(1)
			_ = conn.Close()
		}
	})
	t.Cleanup(func() {
		_ = listener.Close()
		serving.Wait()
	})
	return it
}

// localBinary is the site binary for tests without a host: it need not carry
// site-host.
//
// Built once for all tests.
var localBinary struct {
	once sync.Once
	path string
	err  error
}

func localSiteBinary(t *testing.T) string {
	t.Helper()
	if os.Getenv("SITE_TEST_SITE") != "" {
		return siteBinary(t)
	}
	root := projectRoot(t)
	localBinary.once.Do(func() {
		folder, err := os.MkdirTemp("", "site-binary-")
		if err != nil {
			localBinary.err = err
			return
		}
		localBinary.path = filepath.Join(folder, "site")
		command := exec.Command("go", "build", "-buildvcs=false", "-o", localBinary.path, "./cmd/site") //nolint:noctx // serves all tests
		command.Dir = root
		if out, err := command.CombinedOutput(); err != nil {
			localBinary.err = fmt.Errorf("build site: %w\n%s", err, out)
		}
	})
	if localBinary.err != nil {
		t.Fatal(localBinary.err)
	}
	return localBinary.path
}

// newLocalSite is a repository whose host is a trap; its cache is empty.
func newLocalSite(t *testing.T) (*testSite, *trap) {
	t.Helper()
	t.Setenv("SITE_CACHE", t.TempDir())
	it := newTrap(t)
	s := &testSite{t: t, site: localSiteBinary(t), dir: filepath.Join(t.TempDir(), "repository")}
	if err := os.MkdirAll(s.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	s.git("init", "--quiet", "--initial-branch=main")
	s.commit("a site with one component", map[string]string{
		".gitignore":                             "/.lab/\n",
		filepath.Join("sites", name, "site.hcl"): trappedSiteHCL(it.port),
		"jobs/hello/component.hcl":               "",
		"jobs/hello/hello.nomad.hcl":             plainJob,
	})
	s.tokenFile = filepath.Join(s.dir, ".lab", "root-token")
	s.must("root-token", "new", s.tokenFile)
	return s, it
}

func trappedSiteHCL(port int) string {
	return fmt.Sprintf(`site %q {
  host "one" {
    address = "127.0.0.1"
    port    = %d
  }

  component "hello" {}
}
`, name, port)
}

const plainJob = `job "hello" {
  group "hello" {
    task "hello" {
      driver = "podman"
      config {
        image = "127.0.0.1:7380/none"
      }
    }
  }
}
`

// wantRefusal checks the form of every error: exit code 1, "error:" and then
// "hint:" as the last lines, and what both say.
func (s *testSite) wantRefusal(got result, says []string, hints []string) {
	s.t.Helper()
	if got.code != 1 {
		s.t.Errorf("exit code %d, want 1", got.code)
	}
	_, told, found := strings.Cut("\n"+got.stderr, "\nerror: ")
	message, hint, hinted := strings.Cut(told, "\nhint: ")
	if !found || !hinted || strings.TrimSpace(message) == "" || strings.TrimSpace(hint) == "" {
		s.t.Fatalf("want an error: line and below it a hint: line\n%v", got)
	}
	for _, part := range says {
		if !strings.Contains(message, part) {
			s.t.Errorf("the error does not say %q\n%v", part, got)
		}
	}
	for _, part := range hints {
		if !strings.Contains(hint, part) {
			s.t.Errorf("the hint does not say %q\n%v", part, got)
		}
	}
	for _, trace := range []string{"panic:", "goroutine ", "%!"} {
		if strings.Contains(got.stderr, trace) {
			s.t.Errorf("the output holds %q\n%v", trace, got)
		}
	}
	s.wantNoSecret(got)
}

// wantNoSecret fails the test where output repeats a secret.
func (s *testSite) wantNoSecret(got result) {
	s.t.Helper()
	secrets := []string{plantedSecret, "PLANTED0SECRET"}
	if content, err := os.ReadFile(s.tokenFile); err == nil {
		for line := range strings.Lines(string(content)) {
			if line = strings.TrimSpace(line); strings.HasPrefix(line, "AGE-SECRET-KEY") {
				secrets = append(secrets, line)
			}
		}
	}
	for _, secret := range secrets {
		if strings.Contains(got.stdout+got.stderr, secret) {
			s.t.Errorf("the output of site %s holds a secret", strings.Join(got.args, " "))
		}
	}
}

func TestTheTrapIsReachedWithGoodInput(t *testing.T) {
	s, it := newLocalSite(t)
	got := s.run("status")
	if it.calls.Load() == 0 {
		t.Errorf("a trap that nobody can reach proves nothing\n%v", got)
	}
	s.wantRefusal(got, []string{"one", fmt.Sprintf("127.0.0.1:%d", it.port)}, []string{"SSH server"})
}

func TestBadInputIsSaidBeforeAnyHostIsTouched(t *testing.T) {
	token := func(content string, mode os.FileMode) func(*testSite) []string {
		return func(s *testSite) []string {
			s.write(s.tokenFile, content)
			if err := os.Chmod(s.tokenFile, mode); err != nil {
				s.t.Fatal(err)
			}
			return []string{"bootstrap-deploy", "--root-token-file=" + s.tokenFile}
		}
	}
	bootstrap := func(args ...string) func(*testSite) []string {
		return func(s *testSite) []string {
			return append([]string{"bootstrap-deploy", "--root-token-file=" + s.tokenFile}, args...)
		}
	}
	archive := func(component string, content []byte) func(*testSite) []string {
		return func(s *testSite) []string {
			s.commit("an archive", map[string]string{"jobs/hello/component.hcl": component, "images/hello.tar": string(content)})
			return []string{"bootstrap-deploy", "--root-token-file=" + s.tokenFile}
		}
	}
	const fromArchive = "artifact \"hello\" {\n  docker_archive = \"images/hello.tar\"\n}\n"
	whole := imageArchive(t)
	for title, test := range map[string]struct {
		prepare     func(*testSite) []string
		says, hints []string
	}{
		"no token file is given": {
			func(*testSite) []string { return []string{"bootstrap-deploy"} },
			[]string{"--openbao-site-root-token-file"}, []string{"site root-token new"},
		},
		"the token file is missing": {
			func(s *testSite) []string {
				return []string{"bootstrap-deploy", "--root-token-file=" + s.dir + "/absent"}
			},
			[]string{"/absent does not exist"}, []string{"site root-token new"},
		},
		"the token file is readable by others": {
			token(plantedSecret, 0o644), []string{"root-token", "0644", "others can read it"}, []string{"chmod 600"},
		},
		"the token file is empty":      {token("\n", 0o600), []string{"root-token is empty"}, []string{"AGE-SECRET-KEY-1"}},
		"the token file holds garbage": {token(plantedSecret, 0o600), []string{"no age X25519 identity"}, []string{"AGE-SECRET-KEY-1"}},
		"the token file holds two lines": {
			token(plantedSecret+"\n"+plantedSecret, 0o600), []string{"holds 2 lines"}, []string{"one line"},
		},
		"the token file is a folder": {
			func(s *testSite) []string { return []string{"bootstrap-deploy", "--root-token-file=" + s.dir} },
			[]string{"not a regular file"}, []string{"site root-token new"},
		},
		"both flags name a token file": {
			bootstrap("--openbao-site-root-token-file=/elsewhere"),
			[]string{"--root-token-file and --openbao-site-root-token-file"}, []string{"give one"},
		},
		"the token is another site's": {
			func(s *testSite) []string {
				s.commit("sealed elsewhere", map[string]string{"sites/" + name + "/init.age": sealedElsewhere(s.t)})
				return []string{"bootstrap-deploy", "--root-token-file=" + s.tokenFile}
			},
			[]string{"init.age was not sealed to this site root token"}, []string{"give the token file of site"},
		},
		"the site is unknown": {
			bootstrap("--site=e3e"), []string{`no site "e3e"`, "has: " + name, `did you mean "` + name + `"?`}, []string{"committed"},
		},
		"the sha is not in git": {
			bootstrap("--sha=0123456789abcdef0123456789abcdef01234567"),
			[]string{"no commit", "0123456789abcdef"}, []string{"git fetch"},
		},
		"the sha is no sha":        {bootstrap("--sha=--help"), []string{`"--help"`}, []string{"a commit"}},
		"the deadline is negative": {bootstrap("--timeout=-5s"), []string{"--timeout -5s is negative"}, []string{"15m"}},
		"the deadline is no time":  {bootstrap("--timeout=soon"), []string{`"soon"`, "--timeout"}, []string{"--help"}},
		"a component is unknown": {
			func(*testSite) []string { return []string{"deploy", "--only=hallo"} },
			[]string{`component "hallo" is not active`}, []string{"active are: hello"},
		},
		"a command is unknown": {
			func(*testSite) []string { return []string{"bootstrapdeploy"} },
			[]string{`unknown command "bootstrapdeploy"`}, []string{"site bootstrap-deploy"},
		},
		"a flag is unknown":        {bootstrap("--now"), []string{"--now"}, []string{"--help"}},
		"an argument is too many":  {bootstrap("now"), []string{`"now"`}, []string{"--help"}},
		"the tools are not there":  {bootstrap(), []string{"nomad", "nomad-driver-podman", "ansible", "is not installed"}, []string{"site tool install nomad nomad-driver-podman ansible"}},
		"an archive is truncated":  {archive(fromArchive, whole[:len(whole)*2/3]), []string{"component hello", "images/hello.tar", "unexpected EOF"}, []string{"cut short"}},
		"an archive is no archive": {archive(fromArchive, []byte(strings.Repeat("no tar ", 500))), []string{"images/hello.tar", "not a whole tar"}, []string{"build it again"}},
		"an archive has another digest": {
			archive(strings.Replace(fromArchive, "}", fmt.Sprintf("  sha256 = %q\n}", strings.Repeat("ab", 32)), 1), whole),
			[]string{"images/hello.tar has digest sha256:", "sha256:abab"}, []string{"not the one that was declared"},
		},
		"an archive is missing": {
			func(s *testSite) []string {
				s.commit("no archive", map[string]string{"jobs/hello/component.hcl": fromArchive})
				return []string{"bootstrap-deploy", "--root-token-file=" + s.tokenFile}
			},
			[]string{"images/hello.tar", "neither in the commit nor in the work tree"}, []string{"build it first"},
		},
		"the folder is no repository": {
			func(s *testSite) []string { return []string{"deploy", "-C", s.t.TempDir()} },
			[]string{"not in a git repository"}, []string{"git init"},
		},
	} {
		t.Run(title, func(t *testing.T) {
			s, it := newLocalSite(t)
			s.wantRefusal(s.run(test.prepare(s)...), test.says, test.hints)
			if calls := it.calls.Load(); calls > 0 {
				t.Errorf("the host was connected to %d times", calls)
			}
		})
	}
}

func TestAllErrorsOfAllFilesAreReportedAtOnceWithTheirPlaces(t *testing.T) {
	s, it := newLocalSite(t)
	siteFile, componentFile := "sites/"+name+"/site.hcl", "jobs/hello/component.hcl"
	planted := map[string]string{
		siteFile: strings.Replace(trappedSiteHCL(it.port), "}\n\n  component",
			"    colour  = \"red\"\n  }\n\n  component \"ghost\" {}\n  operator \"ann\" {}\n  component", 1),
		componentFile: "artifact \"hello\" {\n  go_package = \"./absent\"\n}\n\nartifact \"hello\" {\n  tool = \"nomad\"\n}\n",
	}
	planted[siteFile] = strings.Replace(planted[siteFile], "  \n", "\n", 1)
	s.commit("five errors", planted)
	got := s.run("bootstrap-deploy", "--root-token-file="+s.tokenFile)
	place := func(file, marker string, after int) string {
		before, _, found := strings.Cut(planted[file][after:], marker)
		if !found {
			t.Fatalf("%s has no %q", file, marker)
		}
		before = planted[file][:after] + before
		return fmt.Sprintf("%s:%d,%d: ", file, strings.Count(before, "\n")+1, len(before)-strings.LastIndex(before, "\n"))
	}
	second := strings.LastIndex(planted[componentFile], "artifact")
	want := []string{
		place(siteFile, "colour", 0) + "Unsupported argument",
		place(siteFile, `"ghost"`, 0) + "Unknown component",
		place(siteFile, "operator", 0),
		place(componentFile, `"./absent"`, 0) + "Missing Go package",
		place(componentFile, `"hello"`, second) + "Duplicate artifact",
	}
	s.wantRefusal(got, want, []string{"5 places"})
	places := regexp.MustCompile(`(?m)^(error: check inputs: )?\S+\.hcl:\d+,\d+: `).FindAllString(got.stderr, -1)
	if len(places) != len(want) {
		t.Errorf("%d places, want %d: %q\n%v", len(places), len(want), places, got)
	}
	if calls := it.calls.Load(); calls > 0 {
		t.Errorf("the host was connected to %d times", calls)
	}
}

// imageArchive is what an image builder writes: one image with one layer.
func imageArchive(t *testing.T) []byte {
	t.Helper()
	layer := tarOf(t, map[string]string{"content": strings.Repeat("some content of a file ", 5000)})
	return tarOf(t, map[string]string{
		"layer.tar":     string(layer),
		"config.json":   `{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":["sha256:` + strings.Repeat("0", 64) + `"]}}`,
		"manifest.json": `[{"Config":"config.json","RepoTags":[],"Layers":["layer.tar"]}]`,
	})
}

func tarOf(t *testing.T, files map[string]string) []byte {
	t.Helper()
	var out bytes.Buffer
	writer := tar.NewWriter(&out)
	// The JSON files first: what is cut off is in the layer.
	for _, name := range []string{"manifest.json", "config.json", "layer.tar", "content"} {
		content, ok := files[name]
		if !ok {
			continue
		}
		if err := writer.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(content))}); err != nil {
			t.Fatal(err)
		}
		if _, err := writer.Write([]byte(content)); err != nil {
			t.Fatal(err)
		}
	}
	if err := writer.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// sealedElsewhere is init material that another root token opens.
func sealedElsewhere(t *testing.T) string {
	t.Helper()
	token, _, err := seal.NewRootToken()
	if err != nil {
		t.Fatal(err)
	}
	material, err := seal.New(name, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	sealed, err := seal.Seal(material, token)
	if err != nil {
		t.Fatal(err)
	}
	return string(sealed)
}
