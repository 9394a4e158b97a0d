package testneeds

import (
	"os"
	"path/filepath"
	"runtime"
	"testing"
)

// recorder is a test whose end is recorded.
type recorder struct {
	testing.TB
	ended string
}

func (r *recorder) Helper() {}

func (r *recorder) Skip(...any) { r.end("skipped") }

func (r *recorder) Skipf(string, ...any) { r.end("skipped") }

func (r *recorder) Fatal(...any) { r.end("failed") }

func (r *recorder) Fatalf(string, ...any) { r.end("failed") }

func (r *recorder) end(how string) {
	r.ended = how
	runtime.Goexit()
}

// ending runs need in a goroutine, since a skip or failure ends that.
func ending(t *testing.T, need func(testing.TB)) string {
	r := &recorder{TB: t, ended: "went on"}
	done := make(chan struct{})
	go func() {
		defer close(done)
		need(r)
	}()
	<-done
	return r.ended
}

func TestWhatIsMissingIsAFailureUnlessItWasLeftOut(t *testing.T) {
	program := func(t testing.TB) { Program(t, "no-such-program") }
	tool := func(t testing.TB) { Tool(t, "no-such-tool") }
	for _, test := range []struct {
		name, unit, lab, ci string
		need                func(testing.TB)
		want                string
	}{
		{"a missing program fails", "", "", "", program, "failed"},
		{"in CI, too", "", "", "true", program, "failed"},
		{"it is left out of unit tests", "1", "", "", program, "skipped"},
		{"also of those in CI", "1", "", "true", program, "skipped"},
		{"a tool without a site binary fails", "", "", "", tool, "failed"},
		{"a tool is left out of unit tests", "1", "", "", tool, "skipped"},
		{"a lab is not booted unasked", "", "", "", func(t testing.TB) { Lab(t) }, "skipped"},
		{"in CI it must be", "", "", "true", func(t testing.TB) { Lab(t) }, "failed"},
		{"a lab is left out of unit tests", "1", "1", "true", func(t testing.TB) { Lab(t) }, "skipped"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Setenv(unitVariable, test.unit)
			t.Setenv(labVariable, test.lab)
			t.Setenv("CI", test.ci)
			t.Setenv(siteVariable, filepath.Join(t.TempDir(), "absent"))
			if got := ending(t, test.need); got != test.want {
				t.Errorf("%s, want %s", got, test.want)
			}
		})
	}
}

func TestAToolIsWhatTheSiteBinarySaysOrWhatTheEnvironmentNames(t *testing.T) {
	t.Setenv(unitVariable, "")
	site := filepath.Join(t.TempDir(), "site")
	if err := os.WriteFile(site, []byte("#!/bin/sh\necho \"/tools/$3\"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv(siteVariable, site)
	if got := Tool(t, "nomad"); got != "/tools/nomad" {
		t.Errorf("got %q", got)
	}
	t.Setenv("SITE_TEST_NOMAD_DRIVER_PODMAN", "/other")
	if got := Tool(t, "nomad-driver-podman"); got != "/other" {
		t.Errorf("got %q", got)
	}
}

func TestTheModulesRootIsFound(t *testing.T) {
	if _, err := os.Stat(filepath.Join(moduleRoot(t), "internal", "testneeds", "testneeds.go")); err != nil {
		t.Error(err)
	}
}
