package e2e

import (
	"archive/tar"
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	reference "github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/nomad-site/site/internal/plan"
)

func TestOnlyWhatChangedIsTouched(t *testing.T) {
	s := newSite(t)
	words := newWords(8 << 20)
	s.addWorker(`artifact "worker" {
  docker_archive = "images/worker.tar"
}
`, nil)
	s.archive("images/worker.tar", words)
	s.commit("a worker with an archive", nil)
	first := s.sent(s.must("deploy", "--json"))
	t.Logf("the first image: %+v", first)
	s.runsInPodman("worker")
	if first.wire < 3<<20 {
		t.Errorf("only %d bytes travelled for 8 MiB of random digits", first.wire)
	}

	t.Run("one line of a large layer: few chunks", func(t *testing.T) {
		s := s.in(t)
		hello := s.traces("hello")
		middle := len(words) / 2
		words = slices.Concat(words[:middle], []byte("one more line\n"), words[middle:])
		s.archive("images/worker.tar", words)
		sha := s.commit("one line", nil)
		s.planIs("update job worker", "upload artifact "+name+"/worker")
		got := s.must("deploy", "--json")
		second := s.sent(got)
		t.Logf("one line of the layer: %+v in %s", second, got.duration)
		// The chunks around the line, and image config and manifest.
		if second.chunks > 8 || second.wire > first.wire/10 {
			t.Errorf("%+v travelled for one line, %+v for the whole image", second, first)
		}
		if got := s.meta("worker")["site_git_sha"]; got != sha {
			t.Errorf("the worker is of %s, not %s", got, sha)
		}
		if now := s.traces("hello"); now != hello {
			t.Errorf("the other job was touched: %s, now %s", hello, now)
		}
	})

	t.Run("one line of a program: the new commit answers, the other job stays", func(t *testing.T) {
		s := s.in(t)
		worker := s.traces("worker")
		sha := s.commit("another greeting", map[string]string{mainGo: s.replace(mainGo, "hello from %s", "howdy from %s")})
		s.planIs("update job hello", "upload artifact "+name+"/hello")
		got := s.must("deploy", "--json")
		t.Logf("one line of a program: %+v in %s", s.sent(got), got.duration)
		if version := s.version(); version != sha {
			t.Errorf("the application says it is %s, deployed was %s", version, sha)
		}
		if page, err := s.get(8080, "/"); err != nil || page != "howdy from "+sha+"\n" {
			t.Errorf("the application answers %q, %v", page, err)
		}
		if now := s.traces("worker"); now != worker {
			t.Errorf("the other job was touched: %s, now %s", worker, now)
		}
	})

	t.Run("a jobspec alone: nothing is sent, and another operator is kept out meanwhile", func(t *testing.T) {
		s := s.in(t)
		worker := s.traces("worker")
		spec := "jobs/hello/hello.nomad.hcl"
		content := s.replace(spec, "memory = 64", "memory = 72")
		// Long enough healthy for a second deploy to come in between.
		content = strings.Replace(content, `min_healthy_time  = "1s"`, `min_healthy_time  = "6s"`, 1)
		sha := s.commit("more memory", map[string]string{spec: content})
		s.planIs("update job hello")
		one := s.start("deploy", "--json")
		s.until("the first deploy to hold the lock", 30*time.Second, func() error {
			_, err := s.host.tryExec("test", "-e", "/var/lib/site/lock.json")
			return err
		})
		two := s.run("deploy")
		if got := one.wait(); got.code != 0 {
			t.Fatal(got)
		} else if len(s.transfers(got)) > 0 {
			t.Errorf("something was sent: %v", got)
		}
		if two.code != 5 || !regexp.MustCompile(`error: .*locked by \S+@\S+ .*\(deploy\)`).MatchString(two.stderr) {
			t.Errorf("the second deploy was not told who holds the lock: %v", two)
		}
		if version := s.version(); version != sha {
			t.Errorf("the application says it is %s, deployed was %s", version, sha)
		}
		if now := s.traces("worker"); now != worker {
			t.Errorf("the other job was touched: %s, now %s", worker, now)
		}
		s.must("deploy") // the lock is free again
	})
}

// addWorker writes a second component beside hello, on port 8081.
func (s *testSite) addWorker(component string, edit func(jobspec string) string) {
	s.t.Helper()
	spec := strings.ReplaceAll(s.source("jobs/hello/hello.nomad.hcl"), "hello", "worker")
	spec = strings.Replace(spec, "default = 8080", "default = 8081", 1)
	if edit != nil {
		spec = edit(spec)
	}
	s.write(filepath.Join(s.dir, "jobs/worker/worker.nomad.hcl"), spec)
	s.write(filepath.Join(s.dir, "jobs/worker/component.hcl"), component)
	path, content := s.activate("worker")
	s.write(filepath.Join(s.dir, path), content)
}

// newWords makes lines of random digits, the same in every run.
func newWords(size int) []byte {
	random := rand.NewChaCha8([32]byte{1})
	var out bytes.Buffer
	line := make([]byte, 40)
	for out.Len() < size {
		_, _ = random.Read(line)
		out.WriteString(hex.EncodeToString(line) + "\n")
	}
	return out.Bytes()
}

// archive writes, as `docker save` does, an image with a large layer below the
// application.
func (s *testSite) archive(path string, words []byte) {
	s.t.Helper()
	t := s.t
	program := filepath.Join(t.TempDir(), "worker")
	build := exec.CommandContext(t.Context(), "go", "build", "-buildvcs=false", "-trimpath", "-o", program, "./jobs/hello/app")
	build.Dir, build.Env = s.dir, append(s.environment(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the worker: %v\n%s", err, out)
	}
	image := mutate.MediaType(empty.Image, "application/vnd.docker.distribution.manifest.v2+json")
	for _, file := range []struct {
		name    string
		mode    int64
		content []byte
	}{{"words", 0o644, words}, {"worker", 0o755, []byte(s.read(program))}} {
		var layer bytes.Buffer
		writer := tar.NewWriter(&layer)
		if err := writer.WriteHeader(&tar.Header{Name: file.name, Mode: file.mode, Size: int64(len(file.content)), Typeflag: tar.TypeReg}); err != nil {
			t.Fatal(err)
		}
		if _, err := writer.Write(file.content); err != nil {
			t.Fatal(err)
		}
		if err := writer.Close(); err != nil {
			t.Fatal(err)
		}
		one, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(layer.Bytes())), nil })
		if err != nil {
			t.Fatal(err)
		}
		if image, err = mutate.AppendLayers(image, one); err != nil {
			t.Fatal(err)
		}
	}
	config, err := image.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	config = config.DeepCopy()
	config.Architecture, config.OS = "amd64", "linux"
	config.Config = v1.Config{Entrypoint: []string{"/worker"}, User: "65532:65532"}
	if image, err = mutate.ConfigFile(image, config); err != nil {
		t.Fatal(err)
	}
	tag, err := reference.NewTag("worker:latest")
	if err != nil {
		t.Fatal(err)
	}
	full := filepath.Join(s.dir, path)
	if err := os.MkdirAll(filepath.Dir(full), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := tarball.WriteToFile(full, tag, image); err != nil {
		t.Fatal(err)
	}
}

// sending is what a run says about a transfer to the host.
type sending struct{ chunks, of, wire int }

var sentLine = regexp.MustCompile(`sent (\d+) of (\d+) chunks, (\d+) bytes on the wire`)

// sent reads the one transfer of a run with --json.
func (s *testSite) sent(got result) sending {
	s.t.Helper()
	all := s.transfers(got)
	if len(all) != 1 {
		s.t.Fatalf("%d transfers, not one: %v", len(all), got)
	}
	return all[0]
}

func (s *testSite) transfers(got result) []sending {
	s.t.Helper()
	var all []sending
	for _, event := range s.events(got) {
		if match := sentLine.FindStringSubmatch(event.Message); event.Type == plan.StepProgress && match != nil {
			var numbers [3]int
			for i := range numbers {
				numbers[i], _ = strconv.Atoi(match[i+1])
			}
			all = append(all, sending{numbers[0], numbers[1], numbers[2]})
		}
	}
	return all
}

// words of changes, sorted, without those that a release record always brings.
func (s *testSite) words(changes []change) []string {
	var found []string
	for _, each := range changes {
		if each.Kind != "release" {
			target, _, _ := strings.Cut(each.Target, "@") // an artifact's digest
			found = append(found, fmt.Sprintf("%s %s %s", each.Action, each.Kind, target))
		}
	}
	slices.Sort(found)
	return found
}

// planIs insists that `plan --check` finds exactly these changes.
func (s *testSite) planIs(want ...string) {
	s.t.Helper()
	code, changes := s.planCheck()
	found := s.words(changes)
	slices.Sort(want)
	if !slices.Equal(found, want) {
		s.t.Errorf("plan --check finds %q, not %q: %v", found, want, changes)
	}
	if wantCode := map[bool]int{true: 2, false: 0}[len(want) > 0]; code != wantCode {
		s.t.Errorf("plan --check ends with %d, not %d", code, wantCode)
	}
}

// traces is what changes whenever a job is touched.
func (s *testSite) traces(job string) string {
	s.t.Helper()
	var registered struct{ Version, JobModifyIndex uint64 }
	s.nomad("/v1/job/"+job, &registered)
	var containers []string
	for _, each := range s.containers() {
		if strings.HasPrefix(each.Name, job+"-") {
			containers = append(containers, each.ID)
		}
	}
	encoded, err := json.Marshal(registered)
	if err != nil {
		s.t.Fatal(err)
	}
	return fmt.Sprintf("%s %v", encoded, containers)
}

func (s *testSite) meta(job string) map[string]string {
	s.t.Helper()
	var registered struct{ Meta map[string]string }
	s.nomad("/v1/job/"+job, &registered)
	return registered.Meta
}
