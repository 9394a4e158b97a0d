// Package bench compares site with the tools that people use instead, in one
// run on one machine. It prints figures and ratios and asserts no times: see
// docs/performance.md. `make bench` runs it.
package bench

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nomad-site/site/internal/lab"
)

const (
	labName   = "bench"
	host      = labName + "-1"
	component = "app"
	// limit bounds each single thing that is measured.
	limit = 10 * time.Minute
)

func TestMain(m *testing.M) {
	if os.Getenv(childVariable) != "" {
		os.Exit(runChild())
	}
	code := m.Run()
	if shared.made != nil {
		if err := shared.made.close(); err != nil {
			fmt.Fprintln(os.Stderr, "bench:", err)
			code = 1
		}
	}
	report.print(os.Stdout)
	os.Exit(code)
}

// shared is the one lab of a run: every benchmark goes on from the state that
// the one before left.
var shared struct {
	once sync.Once
	made *fixture
	err  error
}

// fixture is a lab with one host and an adopter's repository.
type fixture struct {
	site   string // the program that is measured
	folder string // the repository, and beside it nothing
	temp   string
	cache  string
	lab    *lab.Lab
	// address is the host's.
	address string
	// bootstrap is what the first deploy of all took.
	bootstrap run
	programs  map[string]string
}

// use returns the fixture; without a lab the benchmark is skipped, but never in CI.
func use(b *testing.B) *fixture {
	b.Helper()
	if os.Getenv("SITE_TEST_LAB") == "" {
		if os.Getenv("CI") != "" {
			b.Fatal("SITE_TEST_LAB is not set: the benchmarks must not be skipped in CI")
		}
		b.Skip("set SITE_TEST_LAB=1 and SITE_TEST_SITE (as root), or run `make bench`")
	}
	shared.once.Do(func() {
		shared.made = &fixture{programs: map[string]string{}}
		shared.err = shared.made.open(b)
	})
	if shared.err != nil {
		b.Fatal(shared.err)
	}
	return shared.made
}

// repetitions of each measurement; the median counts.
func repetitions() int {
	if n, err := strconv.Atoi(os.Getenv("SITE_BENCH_REPETITIONS")); err == nil && n > 0 {
		return n
	}
	return 3
}

func (f *fixture) open(b *testing.B) error {
	var err error
	if f.site, err = filepath.Abs(os.Getenv("SITE_TEST_SITE")); err != nil {
		return err
	}
	if _, err := os.Stat(f.site); err != nil {
		return fmt.Errorf("SITE_TEST_SITE must name the program: %w", err)
	}
	if f.temp, err = os.MkdirTemp(os.Getenv("SITE_BENCH_FOLDER"), "site-bench-"); err != nil {
		return err
	}
	f.folder = filepath.Join(f.temp, "repository")
	if err := os.Mkdir(f.folder, 0o755); err != nil {
		return err
	}
	if err := f.borrowCache(); err != nil {
		return err
	}
	if f.lab, err = lab.Open(f.folder, labName); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	if err := f.lab.Up(ctx, lab.Options{}); err != nil {
		return err
	}
	status, err := f.lab.Status(ctx)
	if err != nil {
		return err
	}
	f.address = status.Hosts[0].Address
	return f.bootstrapSite(b)
}

// borrowCache uses the tools of the machine's cache, and keeps the images of
// the benchmarks out of it.
func (f *fixture) borrowCache() error {
	real := os.Getenv("SITE_CACHE")
	if real == "" {
		user, err := os.UserCacheDir()
		if err != nil {
			return err
		}
		real = filepath.Join(user, "site")
	}
	f.cache = filepath.Join(f.temp, "cache")
	if err := os.Mkdir(f.cache, 0o755); err != nil {
		return err
	}
	for _, kept := range []string{"tools", "debs"} {
		if err := os.Symlink(filepath.Join(real, kept), filepath.Join(f.cache, kept)); err != nil {
			return err
		}
	}
	return nil
}

const jobspec = `variable "artifacts" {
  type = map(string)
}

job "%[1]s" {
  group "app" {
    network {
      mode = "host"
      port "http" {
        static = %[2]d
      }
    }

    update {
      min_healthy_time = "1s"
      healthy_deadline = "2m"
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

    task "app" {
      driver = "podman"

      config {
        image        = var.artifacts["app"]
        network_mode = "host"
      }

      env {
        CHANGE = "%[3]s"
      }

      resources {
        cpu    = 100
        memory = 128
      }
    }
  }
}
`

func (f *fixture) bootstrapSite(b *testing.B) error {
	for _, command := range [][]string{
		{"git", "init", "--quiet", "."},
		{f.site, "init", "--site", labName, "--host", host, "--ssh-config", ".lab/bench/ssh_config", "--operator-key", ".lab/bench/id.pub", "--component", component},
		{f.site, "root-token", "new", "site.root-token"},
	} {
		if _, err := f.do(command...); err != nil {
			return err
		}
	}
	if err := os.WriteFile(f.path("jobs", component, "component.hcl"), []byte("artifact \"app\" {\n  docker_archive = \"app.tar\"\n}\n"), 0o644); err != nil {
		return err
	}
	if err := f.commitJob("none"); err != nil {
		return err
	}
	if err := f.draw(b, picture{}); err != nil {
		return err
	}
	// Warm caches, as docs/performance.md says: all is built, nothing is sent.
	if _, err := f.runSite("plan", "--site", labName, "--root-token-file", "site.root-token"); err != nil {
		return err
	}
	// What was written here must not have to be written while site waits for its own.
	if _, err := f.do("sync"); err != nil {
		return err
	}
	var err error
	f.bootstrap, err = f.runSite("bootstrap-deploy", "--site", labName, "--root-token-file", "site.root-token", "--json")
	return err
}

// draw writes app.tar; what is not given is as in the 195 MB image.
func (f *fixture) draw(b *testing.B, p picture) error {
	b.Helper()
	if p.base == 0 {
		p.base, p.assets = 180e6, 9e6
	}
	if p.program == "" {
		var err error
		if p.program, err = f.program(""); err != nil {
			return err
		}
	}
	if err := p.archive(f.path("app.tar.new")); err != nil {
		return err
	}
	return os.Rename(f.path("app.tar.new"), f.path("app.tar"))
}

// program builds the application, with one line of its source changed where
// answer says what it shall answer.
func (f *fixture) program(answer string) (string, error) {
	if f.programs[answer] != "" {
		return f.programs[answer], nil
	}
	root, err := filepath.Abs("../..")
	if err != nil {
		return "", err
	}
	path := filepath.Join(f.temp, fmt.Sprintf("program-%d", len(f.programs)))
	arguments := []string{"build", "-C", root, "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", path}
	if answer != "" {
		source := filepath.Join(root, "test/e2e/testdata/hello/app/main.go")
		content, err := os.ReadFile(source)
		if err != nil {
			return "", err
		}
		changed := bytes.Replace(content, []byte(`Fprintln(w, "ok")`), []byte(`Fprintln(w, "`+answer+`")`), 1)
		if bytes.Equal(changed, content) {
			return "", errors.New("the application has no line to change")
		}
		overlay := path + ".json"
		if err := errors.Join(
			os.WriteFile(path+".go", changed, 0o644),
			os.WriteFile(overlay, fmt.Appendf(nil, `{"Replace": {%q: %q}}`, source, path+".go"), 0o644),
		); err != nil {
			return "", err
		}
		arguments = append(arguments, "-overlay", overlay)
	}
	build := exec.Command("go", append(arguments, "./test/e2e/testdata/hello/app")...)
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64")
	if output, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the application: %w: %s", err, output)
	}
	f.programs[answer] = path
	return path, nil
}

const (
	sitePort  = 8080
	nomadPort = 8081
	rivalPort = 8082
)

// commitJob commits the jobspec with a change.
func (f *fixture) commitJob(change string) error {
	if err := os.WriteFile(f.path("jobs", component, component+".nomad.hcl"), fmt.Appendf(nil, jobspec, component, sitePort, change), 0o644); err != nil {
		return err
	}
	if _, err := f.do("git", "add", "README.md", "sites", "jobs"); err != nil {
		return err
	}
	_, err := f.do("git", "-c", "user.name=bench", "-c", "user.email=bench@localhost", "commit", "--quiet", "--message", change)
	return err
}

// activate lists components in site.hcl that it does not list yet, and adds a block.
func (f *fixture) activate(block string, components ...string) error {
	const first = "component \"" + component + "\" {}"
	path := f.path("sites", labName, "site.hcl")
	described, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	text := string(described)
	if !strings.Contains(text, first) {
		return fmt.Errorf("%s has no line %s", path, first)
	}
	for _, name := range components {
		if listed := fmt.Sprintf("component %q {}", name); !strings.Contains(text, listed) {
			block += listed + "\n\n"
		}
	}
	return os.WriteFile(path, []byte(strings.Replace(text, first, block+first, 1)), 0o644)
}

func (f *fixture) path(elements ...string) string {
	return filepath.Join(append([]string{f.folder}, elements...)...)
}

func (f *fixture) close() error {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	var err error
	if f.lab != nil {
		err = f.lab.Down(ctx)
	}
	// podman mounts its storage onto itself, and leaves it so.
	// That it is not mounted is no error.
	_ = exec.CommandContext(ctx, "umount", "--quiet", filepath.Join(f.temp, "podman", "root", "overlay")).Run()
	if f.temp != "" && err == nil {
		err = os.RemoveAll(f.temp)
	}
	return err
}

// onHost runs a script on the host through podman: it makes no traffic.
func (f *fixture) onHost(script string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	output, err := f.lab.Exec(ctx, host, "sh", "-c", script)
	return strings.TrimSpace(string(output)), err
}

// traffic is all that the host's network card has carried, both ways.
func (f *fixture) traffic() (int64, error) {
	text, err := f.onHost("cat /sys/class/net/eth0/statistics/rx_bytes /sys/class/net/eth0/statistics/tx_bytes")
	if err != nil {
		return 0, err
	}
	var received, sent int64
	if _, err := fmt.Sscan(text, &received, &sent); err != nil {
		return 0, fmt.Errorf("read the host's counters %q: %w", text, err)
	}
	return received + sent, nil
}
