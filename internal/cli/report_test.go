package cli

import (
	"bytes"
	"encoding/json"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/nomad-site/site/internal/plan"
)

// terminal shows what a terminal would after what was written to it: the
// reporter uses no more than carriage return, erase to the end of line, newline.
type terminal struct {
	lines []string
	line  string
}

func (s *terminal) Write(data []byte) (int, error) {
	for text := string(data); text != ""; {
		switch {
		case strings.HasPrefix(text, "\r\x1b[K"):
			s.line, text = "", text[len("\r\x1b[K"):]
		case text[0] == '\n':
			s.lines, s.line, text = append(s.lines, s.line), "", text[1:]
		default:
			s.line, text = s.line+text[:1], text[1:]
		}
	}
	return len(data), nil
}

func (s *terminal) screen() string {
	return strings.Join(append(append([]string(nil), s.lines...), s.line), "\n")
}

// rolloutEvents are those of a run with one step of each kind.
func rolloutEvents() []plan.Event {
	start := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	events := []plan.Event{
		{Type: plan.StepStarted, Step: "host"},
		{Type: plan.StepDone, Step: "host", Seconds: 0.5},
		{Type: plan.StepStarted, Step: "artifacts"},
		{Type: plan.StepPlanned, Step: "artifacts", Changes: []plan.Change{{
			Action: plan.Upload, Kind: "artifact", Host: "gamma-1", Target: "orders", Reason: "missing", Details: []string{"3 chunks"},
		}}},
		{Type: plan.StepProgress, Step: "artifacts", Message: "asking what is there"},
		{Type: plan.StepBytes, Step: "artifacts", Transfer: "orders", Done: 0, Total: 4 << 20},
		{Type: plan.StepBytes, Step: "artifacts", Transfer: "orders", Done: 1 << 20, Total: 4 << 20},
		{Type: plan.StepBytes, Step: "artifacts", Transfer: "orders", Done: 4 << 20, Total: 4 << 20},
		{Type: plan.StepDone, Step: "artifacts", Applied: true, Seconds: 2},
		{Type: plan.StepStarted, Step: "databases"},
		{Type: plan.StepUnknown, Step: "databases", Message: `unknown until "host" is applied`},
		{Type: plan.StepStarted, Step: "jobs"},
		{Type: plan.StepFailed, Step: "jobs", Seconds: 3},
	}
	for i := range events {
		events[i].Time = start.Add(time.Duration(i) * time.Second)
	}
	return events
}

func TestPlainLinesTellARunInALog(t *testing.T) {
	for verbose, want := range map[bool]string{
		false: `host: ok (0.5 s)
artifacts: upload artifact gamma-1: orders (missing)
artifacts: asking what is there
artifacts: orders: 0 B of 4.0 MiB
artifacts: orders: 4.0 MiB of 4.0 MiB, 2.0 MiB/s
artifacts: done in 2.0 s
databases: unknown until "host" is applied
jobs: failed after 3.0 s
`,
		true: `host …
host: ok (0.5 s)
artifacts …
artifacts: upload artifact gamma-1: orders (missing)
artifacts:     3 chunks
artifacts: asking what is there
artifacts: orders: 0 B of 4.0 MiB
artifacts: orders: 4.0 MiB of 4.0 MiB, 2.0 MiB/s
artifacts: done in 2.0 s
databases …
databases: unknown until "host" is applied
jobs …
jobs: failed after 3.0 s
`,
	} {
		var out bytes.Buffer
		// A buffer is no terminal.
		reporter := newReporter(Environment{Err: &out}, &globalFlags{verbose: verbose})
		for _, event := range rolloutEvents() {
			reporter.Report(event)
		}
		if got := out.String(); got != want {
			t.Errorf("verbose %t: got\n%s\nwant\n%s", verbose, got, want)
		}
	}
}

func TestATerminalShowsTheStepUnderWay(t *testing.T) {
	screen := &terminal{}
	reporter := &liveReporter{w: screen}
	var passing []string
	for _, event := range rolloutEvents() {
		reporter.Report(event)
		passing = append(passing, screen.line)
	}
	if got, want := screen.screen(), `✓ host                         ok (0.5 s)
    upload artifact gamma-1: orders (missing)
✓ artifacts                    done in 2.0 s
? databases: unknown until "host" is applied
✗ jobs                         failed after 3.0 s
`; got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	for i, want := range map[int]string{
		0: "… host", 3: "… artifacts", 4: "… artifacts: asking what is there",
		6: "… artifacts: orders: 1.0 MiB of 4.0 MiB, 1.0 MiB/s", 8: "",
	} {
		if passing[i] != want {
			t.Errorf("after event %d the line is %q, want %q", i, passing[i], want)
		}
	}
}

func TestALiveLineFitsOnALine(t *testing.T) {
	screen := &terminal{}
	reporter := &liveReporter{w: screen}
	reporter.Report(plan.Event{Type: plan.StepProgress, Step: "jobs", Message: strings.Repeat("é", 300) + "\nsecond line"})
	if len(screen.lines) != 0 || len([]rune(screen.line)) > 110 || !strings.HasSuffix(screen.line, "é…") {
		t.Errorf("%d lines, then %q", len(screen.lines), screen.line)
	}
}

func TestAReadOnlyRunLeavesNoLineBehind(t *testing.T) {
	screen := &terminal{}
	reporter := &passingReporter{live: liveReporter{w: screen}}
	for _, event := range rolloutEvents() {
		reporter.Report(event)
	}
	if got := screen.screen(); got != "" {
		t.Errorf("left %q", got)
	}
	var out bytes.Buffer
	newQuietReporter(Environment{Err: &out}, &globalFlags{}).Report(rolloutEvents()[0])
	if out.Len() != 0 {
		t.Errorf("a log has %q", out.String())
	}
}

func TestJSONEventsAreOnePerLine(t *testing.T) {
	var out bytes.Buffer
	reporter := newReporter(Environment{Out: &out}, &globalFlags{json: true})
	want := rolloutEvents()
	for _, event := range want {
		event.Schema = plan.EventVersion
		reporter.Report(event)
	}
	lines := strings.Split(strings.TrimSuffix(out.String(), "\n"), "\n")
	if len(lines) != len(want) {
		t.Fatalf("%d lines, want %d", len(lines), len(want))
	}
	for i, line := range lines {
		var got plan.Event
		if err := json.Unmarshal([]byte(line), &got); err != nil || got.Type != want[i].Type || got.Schema != plan.EventVersion {
			t.Errorf("line %d: %v: %s", i, err, line)
		}
	}
}

func TestAPlanSaysWhatItWouldDo(t *testing.T) {
	change := plan.Change{Action: plan.Create, Kind: "job", Target: "orders", Reason: "not there", Details: []string{"+ group web"}}
	stop := plan.Change{Action: plan.Delete, Kind: "job", Target: "old", Reason: "no component declares it"}
	for name, test := range map[string]struct {
		outcomes []plan.Outcome
		verbose  bool
		want     string
	}{
		"nothing":  {[]plan.Outcome{{Step: "jobs"}}, false, "nothing to do\n"},
		"a change": {[]plan.Outcome{{Step: "jobs", Changes: []plan.Change{change}}}, false, "create job orders (not there)\n1 change\n"},
		"details":  {[]plan.Outcome{{Step: "jobs", Changes: []plan.Change{change}}}, true, "create job orders (not there)\n    + group web\n1 change\n"},
		"a bare host": {[]plan.Outcome{{Step: "host", Changes: []plan.Change{stop}}, {Step: "jobs", Unknown: "nomad"}}, false,
			"delete job old (no component declares it)\n? jobs: unknown until \"nomad\" is applied\n2 changes\n"},
	} {
		t.Run(name, func(t *testing.T) {
			var out bytes.Buffer
			printPlan(&out, plan.Result{Outcomes: test.outcomes}, test.verbose)
			if got := out.String(); got != test.want {
				t.Errorf("got\n%s\nwant\n%s", got, test.want)
			}
		})
	}
}

// commit makes folder a repository with one commit.
func commit(t *testing.T, folder string) {
	t.Helper()
	for _, args := range [][]string{
		{"init", "-q"}, {"add", "."},
		{"-c", "user.name=test", "-c", "user.email=test@example.test", "commit", "-q", "-m", "start"},
	} {
		if output, err := exec.CommandContext(t.Context(), "git", append([]string{"-C", folder}, args...)...).CombinedOutput(); err != nil {
			t.Fatalf("git %v: %v: %s", args, err, output)
		}
	}
}
