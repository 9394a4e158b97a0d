package command

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/nomad-site/site/internal/blob"
	"github.com/nomad-site/site/internal/sitehost/pull/pulltest"
)

// BenchmarkPullOfAGibibyte pulls in a process of its own, with the limits of the
// service, and reports how much memory that took at most.
func BenchmarkPullOfAGibibyte(b *testing.B) {
	executable := b.TempDir() + "/site-host"
	if output, err := exec.Command("go", "build", "-o", executable, "../../../cmd/site-host").CombinedOutput(); err != nil {
		b.Fatalf("%v: %s", err, output)
	}
	p := newPulling(b)
	name := p.bucket.Publish(b, "tool", blob.KindFile, pulltest.Random(1, 1<<30))
	for b.Loop() {
		if err := os.RemoveAll(p.path("store")); err != nil {
			b.Fatal(err)
		}
		wants, err := json.Marshal([]map[string]string{{"artifact": name.Artifact, "digest": string(name.Digest)}})
		if err != nil {
			b.Fatal(err)
		}
		command := exec.Command(executable, append([]string{"pull"}, p.flags()...)...)
		command.Env = append(os.Environ(), "GOMEMLIMIT=96MiB")
		command.Stdin = bytes.NewReader(wants)
		start := time.Now()
		var output bytes.Buffer
		command.Stdout, command.Stderr = &output, &output
		if err := command.Start(); err != nil {
			b.Fatal(err)
		}
		most := watchMemory(command.Process.Pid)
		if err := command.Wait(); err != nil {
			b.Fatalf("%v: %s", err, lastLine(output.String()))
		}
		b.ReportMetric(<-most, "MiB-resident")
		b.ReportMetric(1024/time.Since(start).Seconds(), "MiB/s")
		b.ReportMetric(command.ProcessState.UserTime().Seconds()+command.ProcessState.SystemTime().Seconds(), "cpu-s")
	}
}

// watchMemory gives the most MiB that a process ever had, once it has ended. What
// wait(2) says counts also the process that it was forked from.
func watchMemory(pid int) <-chan float64 {
	most := make(chan float64, 1)
	go func() {
		var last float64
		for range time.Tick(20 * time.Millisecond) {
			status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
			_, rest, found := strings.Cut(string(status), "VmHWM:")
			if err != nil || !found {
				most <- last
				return
			}
			var kibibytes float64
			_, _ = fmt.Sscan(rest, &kibibytes)
			last = kibibytes / 1024
		}
	}()
	return most
}
