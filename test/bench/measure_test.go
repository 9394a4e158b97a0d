package bench

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nomad-site/site/internal/plan"
)

// run is one thing that was measured.
type run struct {
	seconds float64
	// wire is what the host's network card carried, both ways, all included.
	wire int64
	// peak is the largest resident memory of the program, in bytes.
	peak int64
	// events of site, where it was asked for --json.
	events []plan.Event
	output string
	// said is what it wrote for people to read, beside its output.
	said string
}

// step is the time that one step of site took.
func (r run) step(name string) float64 {
	for _, event := range r.events {
		if event.Step == name && event.Type == plan.StepDone {
			return event.Seconds
		}
	}
	return 0
}

var sentMessage = regexp.MustCompile(`([0-9]+) bytes on the wire`)

// sent is what site says that its transfer of the artifacts has written.
func (r run) sent() int64 {
	var total int64
	for _, event := range r.events {
		if found := sentMessage.FindStringSubmatch(event.Message); found != nil && event.Step == "artifacts" {
			bytes, _ := strconv.ParseInt(found[1], 10, 64)
			total += bytes
		}
	}
	return total
}

// do runs a command in the repository; its output comes back, or is in the error.
func (f *fixture) do(command ...string) (run, error) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	child := exec.CommandContext(ctx, command[0], command[1:]...)
	child.Dir = f.folder
	child.Env = append(os.Environ(), "SITE_CACHE="+f.cache)
	return measured(child)
}

// measured runs a command; its output comes back, or is in the error.
func measured(child *exec.Cmd) (run, error) {
	command := strings.Join(child.Args, " ")
	var stdout, stderr bytes.Buffer
	child.Stdout, child.Stderr = &stdout, &stderr
	start := time.Now()
	if err := child.Start(); err != nil {
		return run{}, fmt.Errorf("%s: %w", command, err)
	}
	ended := make(chan struct{})
	highest := make(chan int64, 1)
	go func() { highest <- watchMemory(child.Process.Pid, ended) }()
	err := child.Wait()
	close(ended)
	done := run{seconds: time.Since(start).Seconds(), output: stdout.String(), said: stderr.String(), peak: <-highest}
	if err != nil {
		return done, fmt.Errorf("%s: %w: %s%s", command, err, lastLines(stdout.String()), lastLines(stderr.String()))
	}
	return done, nil
}

// watchMemory asks the kernel for the peak of a process until it has ended. Its
// resource usage would not do: that begins with the peak of this process, of
// which the child was a copy before it became another program.
func watchMemory(pid int, ended <-chan struct{}) int64 {
	var highest int64
	ticker := time.NewTicker(10 * time.Millisecond)
	defer ticker.Stop()
	for {
		select {
		case <-ended:
			return highest
		case <-ticker.C:
		}
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(status)) {
			var kilobytes int64
			if _, err := fmt.Sscanf(line, "VmHWM: %d kB", &kilobytes); err == nil {
				highest = max(highest, kilobytes<<10)
			}
		}
	}
}

func lastLines(text string) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(lines[max(0, len(lines)-12):], "\n")
}

// runSite runs site, and reads its events if there are any.
func (f *fixture) runSite(arguments ...string) (run, error) {
	before, err := f.traffic()
	if err != nil {
		return run{}, err
	}
	done, err := f.do(append([]string{f.site}, arguments...)...)
	if err != nil {
		return done, err
	}
	after, err := f.traffic()
	done.wire = after - before
	if err != nil || !slices.Contains(arguments, "--json") {
		return done, err
	}
	decoder := json.NewDecoder(strings.NewReader(done.output))
	for {
		var event plan.Event
		err := decoder.Decode(&event)
		if errors.Is(err, io.EOF) {
			return done, nil
		}
		if err != nil {
			return done, fmt.Errorf("read the events of site: %w", err)
		}
		done.events = append(done.events, event)
	}
}

// counted measures what script does, from here, in time and traffic.
func (f *fixture) counted(do func() error) (run, error) {
	before, err := f.traffic()
	if err != nil {
		return run{}, err
	}
	start := time.Now()
	if err := do(); err != nil {
		return run{}, err
	}
	done := run{seconds: time.Since(start).Seconds()}
	after, err := f.traffic()
	done.wire = after - before
	return done, err
}

// median of a figure over runs.
func median[R any, T cmp.Ordered](runs []R, figure func(R) T) T {
	values := make([]T, len(runs))
	for i, one := range runs {
		values[i] = figure(one)
	}
	slices.Sort(values)
	return values[len(values)/2]
}

// highest is what counts of memory: a limit is one for all runs.
func highest[R any, T cmp.Ordered](runs []R, figure func(R) T) T {
	value := figure(runs[0])
	for _, one := range runs[1:] {
		value = max(value, figure(one))
	}
	return value
}

func seconds(r run) float64 { return r.seconds }
func wire(r run) int64      { return r.wire }

// report collects tables for the end of the run: between the lines of
// `go test` nobody would find them.
var report tables

type tables struct {
	mutex sync.Mutex
	lines []string
}

func (t *tables) table(title string, columns ...string) {
	t.mutex.Lock()
	defer t.mutex.Unlock()
	t.lines = append(t.lines, "", "### "+title, "", "| "+strings.Join(columns, " | ")+" |", "|"+strings.Repeat("---|", len(columns)))
}

func (t *tables) row(cells ...string) {
	t.mutex.Lock()
	defer t.mutex.Unlock()
	t.lines = append(t.lines, "| "+strings.Join(cells, " | ")+" |")
}

func (t *tables) print(w io.Writer) {
	if len(t.lines) > 0 {
		_, _ = fmt.Fprintln(w, strings.Join(t.lines, "\n"))
	}
}

func inSeconds(s float64) string { return fmt.Sprintf("%.2f s", s) }

func inBytes(n int64) string {
	switch {
	case n < 10e3:
		return fmt.Sprintf("%d B", n)
	case n < 10e6:
		return fmt.Sprintf("%.0f kB", float64(n)/1e3)
	default:
		return fmt.Sprintf("%.1f MB", float64(n)/1e6)
	}
}

func inMiB(n int64) float64 { return float64(n) / (1 << 20) }

// times is how often a holds b.
func times(a, b float64) string {
	if b == 0 {
		return "-"
	}
	return fmt.Sprintf("%.2f", a/b)
}
