package site

import (
	"crypto/ed25519"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"golang.org/x/crypto/ssh"
)

// testKey makes the same key from the same seed, always.
func testKey(t testing.TB, seed byte) string {
	t.Helper()
	private := ed25519.NewKeyFromSeed([]byte(strings.Repeat(string(rune(seed)), ed25519.SeedSize)))
	key, err := ssh.NewPublicKey(private.Public())
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(ssh.MarshalAuthorizedKey(key)))
}

const (
	plainSite      = "site \"one\" {\n  host \"h-1\" {\n    address = \"10.0.0.1\"\n  }\n  component \"web\" {}\n}\n"
	plainComponent = "artifact \"web\" {\n  docker_archive = \"web.tar\"\n}\n"
	plainJob       = "variable \"artifacts\" {}\njob \"web\" {\n  group \"g\" {\n    task \"t\" {\n      driver = \"podman\"\n      config {\n        image = var.artifacts[\"web\"]\n      }\n    }\n  }\n}\n"
)

func repository(files map[string]string) fstest.MapFS {
	fsys := fstest.MapFS{}
	for name, content := range files {
		fsys[name] = &fstest.MapFile{Data: []byte(content)}
	}
	return fsys
}

// plain is a site without a fault, with some files replaced.
func plain(replace map[string]string) fstest.MapFS {
	files := map[string]string{
		"sites/one/site.hcl":     plainSite,
		"jobs/web/component.hcl": plainComponent,
		"jobs/web/web.nomad.hcl": plainJob,
	}
	for name, content := range replace {
		files[name] = content
	}
	return repository(files)
}

// problemsOf returns the lines of the ConfigError.
func problemsOf(t *testing.T, err error) []string {
	t.Helper()
	if err == nil {
		return nil
	}
	var config *ConfigError
	if !errors.As(err, &config) {
		t.Fatalf("not a ConfigError: %v", err)
	}
	if config.Hint() == "" {
		t.Error("no hint")
	}
	return strings.Split(err.Error(), "\n")
}

func TestDefaults(t *testing.T) {
	s, err := Load(plain(nil), "one", LoadOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if s.Deadline != 15*time.Minute || s.KeepReleases != 5 || s.Datacenter != "dc1" || s.Region != "global" {
		t.Errorf("site defaults: %+v", s)
	}
	if len(s.Hosts) != 1 || !s.Hosts[0].Server || !s.Hosts[0].Client {
		t.Errorf("the only host must be server and client: %+v", s.Hosts)
	}
	c := s.Components[0]
	if c.Name != "web" || c.Folder != "jobs/web" || c.JobspecPath != "jobs/web/web.nomad.hcl" || string(c.Jobspec) != plainJob || c.Platform {
		t.Errorf("component: %+v", c)
	}
	if a := c.Artifacts[0]; a.Kind != Image || a.DockerArchive != "web.tar" || a.User != "" {
		t.Errorf("artifact: %+v", a)
	}
}

func TestFivePlantedErrorsInTwoFilesAreAllReported(t *testing.T) {
	fsys := plain(map[string]string{
		"sites/one/site.hcl": `site "one" {
  deadline = "soon"
  host "h-1" {
    usr     = "root"
    address = "10.0.0.300"
  }
  component "web" {}
}
`,
		"jobs/web/component.hcl": `after = ["wbe"]
artifact "web" {
  docker_archive = "web.tar"
  path           = "web"
}
`,
	})
	got := problemsOf(t, func() error { _, err := Load(fsys, "one", LoadOptions{}); return err }())
	want := []string{
		`jobs/web/component.hcl:1,10: Unknown component in after; No component "wbe" is active on this site. There are no other components`,
		`jobs/web/component.hcl:2,1: Artifact with several sources; Artifact "web" has docker_archive and path; exactly one is allowed`,
		`sites/one/site.hcl:2,14: Invalid duration; "soon" is not a duration between 1s and 24h such as "15m"`,
		`sites/one/site.hcl:4,5: Unsupported argument; An argument named "usr" is not expected here. Did you mean "user"?`,
		`sites/one/site.hcl:5,15: Invalid address; "10.0.0.300" is not an IP address`,
	}
	if !slices.Equal(got, want) {
		t.Errorf("got:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// TestProblems plants one fault at a time and expects that one line alone.
func TestProblems(t *testing.T) {
	key, other := testKey(t, 'a'), testKey(t, 'b')
	inSite := func(lines string) map[string]string {
		return map[string]string{"sites/one/site.hcl": "site \"one\" {\n" + lines + "\n}\n"}
	}
	host := "host \"h-1\" { address = \"10.0.0.1\" }\n"
	inHost := func(line string) map[string]string {
		return inSite("host \"h-1\" {\n address = \"10.0.0.1\"\n" + line + "\n}")
	}
	inComponent := func(text string) map[string]string {
		return map[string]string{"jobs/web/component.hcl": plainComponent + text}
	}
	artifact := func(lines string) map[string]string {
		return inComponent("artifact \"b\" {\n" + lines + "\n}\n")
	}
	inJob := func(old, replacement string) map[string]string {
		return map[string]string{"jobs/web/web.nomad.hcl": strings.Replace(plainJob, old, replacement, 1)}
	}
	order := func(afters map[string]string) map[string]string {
		files, site := map[string]string{}, host
		for _, name := range []string{"a", "b", "c"} {
			site += fmt.Sprintf("component %q {}\n", name)
			files["jobs/"+name+"/component.hcl"] = "after = [" + afters[name] + "]\n"
			files["jobs/"+name+"/"+name+".nomad.hcl"] = fmt.Sprintf("job %q {}\n", name)
		}
		files["sites/one/site.hcl"] = "site \"one\" {\n" + site + "}\n"
		return files
	}
	for _, tt := range []struct {
		name  string
		files map[string]string
		want  string // start of the line
	}{
		{"syntax error in site.hcl", map[string]string{"sites/one/site.hcl": "site \"one\" {\n  host = = 1\n}"}, "sites/one/site.hcl:2,10: Invalid expression"},
		{"no site block", map[string]string{"sites/one/site.hcl": ""}, "sites/one/site.hcl:1,1: Missing site block"},
		{"two site blocks", map[string]string{"sites/one/site.hcl": plainSite + "site \"two\" {}\n"}, "sites/one/site.hcl:7,1: Duplicate site block"},
		{"site named otherwise than its folder", map[string]string{"sites/one/site.hcl": strings.Replace(plainSite, "one", "two", 1)}, "sites/one/site.hcl:1,6: Wrong site name"},
		{"unknown block", inSite(host + "hots \"x\" {}"), "sites/one/site.hcl:3,1: Unsupported block type; Blocks of type \"hots\" are not expected here. Did you mean \"host\"?"},
		{"attribute set twice", inSite(host + "region = \"eu\"\nregion = \"us\""), "sites/one/site.hcl:4,1: Attribute redefined"},
		{"wrong type", inSite(host + "keep_releases = \"many\""), "sites/one/site.hcl:3,18: Unsuitable value type"},
		{"variable in a value", inSite(host + "region = where"), "sites/one/site.hcl:3,10: Variables not allowed"},
		{"a number without bounds", inSite(host + "keep_releases = 1e999999"), "sites/one/site.hcl:3,17: Number out of range"},
		{"no releases kept", inSite(host + "keep_releases = 0"), "sites/one/site.hcl:3,17: Invalid number of releases"},
		{"negative deadline", inSite(host + "deadline = \"-1m\""), "sites/one/site.hcl:3,12: Invalid duration"},
		{"ssh configuration outside", inSite(host + "ssh {\n config_file = \"../x\"\n}"), "sites/one/site.hcl:4,16: Invalid path"},
		{"no host", inSite(""), "sites/one/site.hcl:1,1: Missing host block"},
		{"no address", inSite("host \"h-1\" {}"), "sites/one/site.hcl:2,12: Missing required argument"},
		{"port in the address", inSite("host \"h-1\" { address = \"h:22\" }"), "sites/one/site.hcl:2,24: Invalid address; \"h:22\" holds a port; write address = \"h\" and port = 22"},
		{"port out of range", inHost("port = 70000"), "sites/one/site.hcl:4,8: Invalid port"},
		{"loopback as private address", inHost("private_address = \"127.0.0.1\""), "sites/one/site.hcl:4,19: Invalid private address"},
		{"host key that is none", inHost("host_keys = [\"" + key + "\", \"ssh-ed25519 AAAA\"]"), fmt.Sprintf("sites/one/site.hcl:4,%d: Invalid host key", len(key)+18)},
		{"the only host is no server", inHost("server = false"), "sites/one/site.hcl:1,1: No server host"},
		{"no client", inHost("client = false"), "sites/one/site.hcl:1,1: No client host"},
		{"two servers", inSite("host \"a\" {\n address = \"a\"\n server = true\n}\nhost \"b\" {\n address = \"b\"\n server = true\n}"), "sites/one/site.hcl:1,1: Wrong number of server hosts; 2 hosts"},
		{"several hosts without a server", inSite("host \"a\" { address = \"a\" }\nhost \"b\" { address = \"b\" }"), "sites/one/site.hcl:1,1: No server host"},
		{"host declared twice", inSite(host + "host \"h-1\" {\n address = \"b\"\n server = true\n}"), "sites/one/site.hcl:3,6: Duplicate host; A host named \"h-1\" is already declared at sites/one/site.hcl:2,6"},
		{"two hosts with one address", inSite(host + "host \"h-2\" {\n address = \"10.0.0.1\"\n server = true\n}"), "sites/one/site.hcl:4,12: Duplicate address"},
		{"operator without a key", inSite(host + "operator \"o\" {}"), "sites/one/site.hcl:3,1: Operator needs one key"},
		{"operator's key file missing", inSite(host + "operator \"o\" {\n public_key_file = \"x.pub\"\n}"), "sites/one/site.hcl:4,20: Unreadable key file; x.pub does not exist"},
		{"operator with a private key", inSite(host + "operator \"o\" {\n public_key = \"-----BEGIN OPENSSH PRIVATE KEY-----\"\n}"), "sites/one/site.hcl:4,15: Invalid public key; this is a private key"},
		{"operator with rights that are none", inSite(host + "operator \"o\" {\n public_key = \"" + other + "\"\n rights = \"read\"\n}"), "sites/one/site.hcl:5,11: Invalid rights; \"read\" is neither \"deploy\" nor \"rotate\""},
		{"operator with no rights", inSite(host + "operator \"o\" {\n public_key = \"" + other + "\"\n rights = null\n}"), "sites/one/site.hcl:5,11: Unsuitable value type"},
		{"operators who can only rotate", inSite(host + "operator \"o\" {\n public_key = \"" + other + "\"\n rights = \"rotate\"\n}"), "sites/one/site.hcl:5,11: Nobody can deploy; Every operator has rights = \"rotate\": at least one must be left without it"},
		{"two operators with one key", inSite(host + "operator \"o\" {\n public_key = \"" + other + "\"\n}\noperator \"p\" {\n public_key = \"" + other + "\"\n}"), "sites/one/site.hcl:7,15: Duplicate key"},
		{"component active twice", inSite(host + "component \"web\" {}\ncomponent \"web\" {}"), "sites/one/site.hcl:4,11: Duplicate component"},
		{"component that is nowhere", inSite(host + "component \"wbe\" {}"), "sites/one/site.hcl:3,11: Unknown component; There is no jobs/wbe/component.hcl. Did you mean \"web\"?"},
		{"component outside of jobs", inSite(host + "component \"../web\" {}"), "sites/one/site.hcl:3,11: Invalid component name"},
		{"variable that is no literal", inSite(host + "component \"web\" {\n variables = { a = b }\n}"), "sites/one/site.hcl:4,20: Not a literal"},
		{"variable that the jobspec lacks", inSite(host + "component \"web\" {\n variables = { cuont = 1 }\n}"), "sites/one/site.hcl:4,16: Unknown variable"},
		{"variable that is given", inSite(host + "component \"web\" {\n variables = { artifacts = {} }\n}"), "sites/one/site.hcl:4,16: Reserved variable"},

		{"syntax error in component.hcl", inComponent("artifact {"), "jobs/web/component.hcl:4,"},
		{"artifact without a source", artifact(""), "jobs/web/component.hcl:4,1: Artifact without a source"},
		{"artifact declared twice", inComponent(plainComponent), "jobs/web/component.hcl:4,10: Duplicate artifact"},
		{"url without sha256", artifact("url = \"https://example.net/x\""), "jobs/web/component.hcl:5,7: Missing sha256"},
		{"url with a password", artifact("url = \"https://a:b@example.net/x\"\nsha256 = \"" + strings.Repeat("0", 64) + "\""), "jobs/web/component.hcl:5,7: Invalid URL"},
		{"sha256 too short", artifact("path = \"x\"\nsha256 = \"abc\""), "jobs/web/component.hcl:6,10: Invalid sha256"},
		{"sha256 of what is built here", artifact("tool = \"nomad\"\nsha256 = \"" + strings.Repeat("0", 64) + "\""), "jobs/web/component.hcl:6,10: Unexpected sha256"},
		{"kind that is none", artifact("path = \"x\"\nkind = \"tar\""), "jobs/web/component.hcl:6,8: Invalid kind"},
		{"archive as a file", artifact("docker_archive = \"x\"\nkind = \"file\""), "jobs/web/component.hcl:6,8: Wrong kind"},
		{"user of a file", artifact("path = \"x\"\nkind = \"file\"\nuser = \"1\""), "jobs/web/component.hcl:7,8: Attribute of an image"},
		{"signal by number", artifact("path = \"x\"\nstop_signal = \"2\""), "jobs/web/component.hcl:6,15: Invalid signal"},
		{"user by name", artifact("path = \"x\"\nuser = \"root\""), "jobs/web/component.hcl:6,8: Invalid user"},
		{"path outside", artifact("path = \"../x\""), "jobs/web/component.hcl:5,8: Invalid path"},
		{"executable of an archive", artifact("docker_archive = \"x\"\nexecutable = \"y\""), "jobs/web/component.hcl:6,14: Unexpected executable"},
		{"executable of a plain file", artifact("path = \"x\"\nkind = \"file\"\nexecutable = \"y\""), "jobs/web/component.hcl:7,14: Unexpected executable"},
		{"executable that is a path", artifact("path = \"x\"\nexecutable = \"bin/y\""), "jobs/web/component.hcl:6,14: Invalid executable"},
		{"executable without a name", artifact("tool = \"x\"\nexecutable = \"..\""), "jobs/web/component.hcl:6,14: Invalid executable"},
		{"Go package that is not there", artifact("go_package = \"./cmd/x\""), "jobs/web/component.hcl:5,14: Missing Go package"},
		{"package named badly", artifact("deb_packages = [\"bash\", \"Bad Name\"]"), "jobs/web/component.hcl:5,25: Invalid package"},
		{"root as a directory", inComponent("directory \"/\" {}"), "jobs/web/component.hcl:4,11: Invalid directory"},
		{"directory of the system", inComponent("directory \"/etc/web\" {}"), "jobs/web/component.hcl:4,11: Invalid directory"},
		{"directory of site", inComponent("directory \"/var/lib/site/x\" {}"), "jobs/web/component.hcl:4,11: Invalid directory"},
		{"relative directory", inComponent("directory \"srv\" {}"), "jobs/web/component.hcl:4,11: Invalid directory"},
		{"directory with dots", inComponent("directory \"/srv/../etc\" {}"), "jobs/web/component.hcl:4,11: Invalid directory"},
		{"mode that is none", inComponent("directory \"/srv/x\" {\n mode = \"rwx\"\n}"), "jobs/web/component.hcl:5,9: Invalid mode"},
		{"owner that is none", inComponent("directory \"/srv/x\" {\n owner = \"a b\"\n}"), "jobs/web/component.hcl:5,10: Invalid owner"},
		{"jobspec that is not there", inComponent("jobspec = \"x.nomad.hcl\""), "jobs/web/component.hcl:4,11: Missing jobspec"},
		{"jobspec outside", inComponent("jobspec = \"../x\""), "jobs/web/component.hcl:4,11: Invalid path"},

		{"syntax error in the jobspec", inJob("group", "group ="), "jobs/web/web.nomad.hcl:3,15: Missing newline"},
		{"job named otherwise", inJob("job \"web\"", "job \"wbe\""), "jobs/web/web.nomad.hcl:2,5: Wrong job name"},
		{"no job", map[string]string{"jobs/web/web.nomad.hcl": ""}, "jobs/web/web.nomad.hcl:1,1: Missing job block"},
		{"another driver", inJob("podman", "docker"), "jobs/web/web.nomad.hcl:5,16: Wrong driver"},
		{"artifact that is not declared", inJob("[\"web\"]", "[\"wbe\"]"), "jobs/web/web.nomad.hcl:7,17: Unknown artifact; Component \"web\" declares no artifact \"wbe\". Did you mean \"web\"?"},
		{"variable that is not declared", inJob("var.artifacts", "var.artefacts"), "jobs/web/web.nomad.hcl:7,17: Undeclared variable; The jobspec declares no variable \"artefacts\". Did you mean \"artifacts\"?"},
		{"variable without a value", inJob("job", "variable \"count\" {}\njob"), "sites/one/site.hcl:5,3: Missing variable"},

		{"after names nothing", order(map[string]string{"a": `"bb"`}), "jobs/a/component.hcl:1,10: Unknown component in after; No component \"bb\" is active on this site. Did you mean \"b\"?"},
		{"a component waits for itself", order(map[string]string{"a": `"a"`}), "jobs/a/component.hcl:1,10: Components wait for each other; a waits for a"},
		{"a cycle of three", order(map[string]string{"a": `"b"`, "b": `"c"`, "c": `"a"`}), "jobs/a/component.hcl:1,10: Components wait for each other; a waits for b waits for c waits for a"},
		{"two components share a folder and disagree", func() map[string]string {
			files := order(nil)
			files["jobs/a/component.hcl"] = "directory \"/srv/x\" {}\n"
			files["jobs/b/component.hcl"] = "directory \"/srv/x\" {\n mode = \"0700\"\n}\n"
			return files
		}(), "jobs/b/component.hcl:1,1: Conflicting directory"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Load(plain(tt.files), "one", LoadOptions{WorkDir: t.TempDir()})
			got := problemsOf(t, err)
			if len(got) != 1 || !strings.HasPrefix(got[0], tt.want) {
				t.Errorf("got:\n%s\nwant the one line:\n%s", strings.Join(got, "\n"), tt.want)
			}
		})
	}
}

func TestAComponentThatIsBrokenCanStillBeReferredTo(t *testing.T) {
	_, err := Load(plain(map[string]string{
		"sites/one/site.hcl":     strings.Replace(plainSite, "component", "component \"db\" {}\n  component", 1),
		"jobs/db/component.hcl":  "artifact {",
		"jobs/db/db.nomad.hcl":   "job \"db\" {}",
		"jobs/web/component.hcl": "after = [\"db\"]\n" + plainComponent,
	}), "one", LoadOptions{})
	for _, line := range problemsOf(t, err) {
		if !strings.HasPrefix(line, "jobs/db/component.hcl:") {
			t.Errorf("no problem of its own: %s", line)
		}
	}
}

func TestUnknownSite(t *testing.T) {
	for _, tt := range []struct {
		name, site, want string
		fsys             fs.FS
	}{
		{"the nearest is proposed", "on", `no site "on"; the commit has: one (did you mean "one"?)`, plain(nil)},
		{"all are listed", "production", `no site "production"; the commit has: one`, plain(nil)},
		{"a path is no name", "../sites/one", `no site "../sites/one"; the commit has: one`, plain(nil)},
		{"there are none", "one", `no site "one": the commit has no sites/*/site.hcl at all`, repository(nil)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Load(tt.fsys, tt.site, LoadOptions{})
			var unknown *UnknownSiteError
			if !errors.As(err, &unknown) || err.Error() != tt.want || unknown.Hint() == "" {
				t.Errorf("got %v, want %s", err, tt.want)
			}
		})
	}
}

func TestVariablesOfTheSiteWin(t *testing.T) {
	s, err := Load(plain(map[string]string{
		"sites/one/site.hcl":     strings.Replace(plainSite, `"web" {}`, `"web" { variables = { count = 3, list = ["a"] } }`, 1),
		"jobs/web/component.hcl": "variables = {\n  count = 1\n  name = \"x\"\n}\n" + plainComponent,
		"jobs/web/web.nomad.hcl": "variable \"count\" {}\nvariable \"name\" {}\nvariables {\n  list = []\n}\n" + plainJob,
	}), "one", LoadOptions{})
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{"count": "3", "name": `"x"`, "list": `["a"]`}
	if got := s.Components[0].Variables; !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestPlatformComponents(t *testing.T) {
	platform := repository(map[string]string{"jobs/db/component.hcl": "", "jobs/db/db.nomad.hcl": "job \"db\" {}\n"})
	withDB := map[string]string{"sites/one/site.hcl": strings.Replace(plainSite, "component", "component \"db\" {}\n  component", 1)}
	t.Run("come from the program", func(t *testing.T) {
		s, err := Load(plain(withDB), "one", LoadOptions{Platform: platform})
		if err != nil {
			t.Fatal(err)
		}
		if !s.Components[0].Platform || s.Components[1].Platform {
			t.Errorf("only db is of the platform: %+v", s.Components)
		}
	})
	t.Run("can be overridden by file", func(t *testing.T) {
		fsys := plain(withDB)
		fsys["jobs/db/db.nomad.hcl"] = &fstest.MapFile{Data: []byte("job \"db\" {} # ours\n")}
		s, err := Load(fsys, "one", LoadOptions{Platform: platform})
		if err != nil {
			t.Fatal(err)
		}
		if c := s.Components[0]; !c.Platform || !strings.Contains(string(c.Jobspec), "ours") {
			t.Errorf("got %+v", c)
		}
	})
}

// projectRoot is this repository.
func projectRoot(t testing.TB) string {
	t.Helper()
	root, err := filepath.Abs(filepath.Join("..", ".."))
	if err != nil {
		t.Fatal(err)
	}
	return root
}

func TestTheLabOfThisRepository(t *testing.T) {
	work := t.TempDir()
	if err := os.MkdirAll(filepath.Join(work, ".lab", "lab"), 0o755); err != nil {
		t.Fatal(err)
	}
	key := testKey(t, 'l')
	if err := os.WriteFile(filepath.Join(work, ".lab", "lab", "id.pub"), []byte(key+" comment\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	s, err := Load(os.DirFS(projectRoot(t)), "lab", LoadOptions{WorkDir: work, Platform: stores()})
	if err != nil {
		t.Fatal(err)
	}
	if s.SSHConfigFile != ".lab/lab/ssh_config" || s.Hosts[0].Name != "lab-1" || s.Operators[0].PublicKey != key || len(s.FingerprintDenylist) != 4 {
		t.Errorf("got %+v", s)
	}
	if c := s.Component("hello"); c == nil || c.Artifacts[0].GoPackage != "./jobs/hello/app" || c.Artifacts[0].User != "65532:65532" {
		t.Errorf("got %+v", s.Components)
	}
}
