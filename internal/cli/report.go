package cli

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"github.com/dustin/go-humanize"

	"github.com/nomad-site/site/internal/plan"
)

// newReporter chooses how a run is told: JSON events on stdout, live lines on
// a terminal, plain lines elsewhere.
func newReporter(env Environment, flags *globalFlags) plan.Reporter {
	switch {
	case flags.json:
		return &jsonReporter{encoder: json.NewEncoder(env.Out)}
	case isTerminal(env.Err):
		return &liveReporter{w: env.Err, verbose: flags.verbose}
	default:
		return &plainReporter{w: env.Err, verbose: flags.verbose, rates: map[string]*rate{}}
	}
}

type jsonReporter struct {
	mutex   sync.Mutex
	encoder *json.Encoder
}

func (r *jsonReporter) Report(event plan.Event) {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	_ = r.encoder.Encode(event)
}

// rate is the speed of one transfer.
type rate struct {
	start time.Time
	next  time.Time
}

func (r *rate) String(event plan.Event) string {
	elapsed := event.Time.Sub(r.start).Seconds()
	text := humanize.IBytes(uint64(event.Done)) + " of " + humanize.IBytes(uint64(event.Total))
	if elapsed > 0.1 {
		text += fmt.Sprintf(", %s/s", humanize.IBytes(uint64(float64(event.Done)/elapsed)))
	}
	return text
}

// fewChanges is how many changes of one kind on one host are told one by one.
const fewChanges = 8

// changeLines tells changes to a person: many of one kind on one host become one
// line, unless details are asked for.
func changeLines(changes []plan.Change, verbose bool) []string {
	type group struct {
		action     plan.Action
		kind, host string
	}
	sizes := map[group]int{}
	for _, change := range changes {
		sizes[group{change.Action, change.Kind, change.Host}]++
	}
	var lines []string
	told := map[group]bool{}
	for _, change := range changes {
		of := group{change.Action, change.Kind, change.Host}
		switch {
		case verbose:
			lines = append(lines, change.String())
			for _, detail := range change.Details {
				lines = append(lines, "    "+detail)
			}
		case sizes[of] <= fewChanges:
			lines = append(lines, change.String())
		case !told[of]:
			told[of] = true
			lines = append(lines, fmt.Sprintf("%s %d × %s on %s", of.action, sizes[of], of.kind, of.host))
		}
	}
	return lines
}

// plainReporter prints lines that read well in a log.
type plainReporter struct {
	mutex   sync.Mutex
	w       io.Writer
	verbose bool
	rates   map[string]*rate
}

func (r *plainReporter) Report(event plan.Event) {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	switch event.Type {
	case plan.StepStarted:
		if r.verbose {
			r.line("%s …", event.Step)
		}
	case plan.StepPlanned:
		for _, line := range changeLines(event.Changes, r.verbose) {
			r.line("%s: %s", event.Step, line)
		}
	case plan.StepUnknown:
		r.line("%s: %s", event.Step, event.Message)
	case plan.StepProgress:
		r.line("%s: %s", event.Step, event.Message)
	case plan.StepBytes:
		key := event.Step + "\x00" + event.Transfer
		speed := r.rates[key]
		if speed == nil {
			speed = &rate{start: event.Time}
			r.rates[key] = speed
		}
		if event.Time.After(speed.next) || event.Done == event.Total {
			speed.next = event.Time.Add(5 * time.Second)
			r.line("%s: %s: %s", event.Step, event.Transfer, speed.String(event))
		}
	case plan.StepDone:
		r.line("%s: %s", event.Step, doneWords(event))
	case plan.StepFailed:
		r.line("%s: failed after %.1f s", event.Step, event.Seconds)
	}
}

func (r *plainReporter) line(format string, args ...any) {
	_, _ = fmt.Fprintf(r.w, format+"\n", args...)
}

func doneWords(event plan.Event) string {
	if event.Applied {
		return fmt.Sprintf("done in %.1f s", event.Seconds)
	}
	return fmt.Sprintf("ok (%.1f s)", event.Seconds)
}

// liveReporter keeps the current step on one line that it rewrites.
type liveReporter struct {
	mutex   sync.Mutex
	w       io.Writer
	verbose bool
	speed   rate
	// moving holds the last event of each transfer of the step under way.
	moving map[string]plan.Event
}

const clearLine = "\r\x1b[K"

func (r *liveReporter) Report(event plan.Event) {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	switch event.Type {
	case plan.StepStarted:
		r.moving = nil
		r.current("… %s", event.Step)
	case plan.StepPlanned:
		for _, line := range changeLines(event.Changes, r.verbose) {
			r.finished("    %s", line)
		}
		r.current("… %s", event.Step)
	case plan.StepUnknown:
		r.finished("? %s: %s", event.Step, event.Message)
	case plan.StepProgress:
		r.current("… %s: %s", event.Step, event.Message)
	case plan.StepBytes:
		if len(r.moving) == 0 {
			r.moving, r.speed = map[string]plan.Event{}, rate{start: event.Time}
		}
		r.moving[event.Transfer] = event
		sum := plan.Event{Time: event.Time}
		for _, one := range r.moving {
			sum.Done += one.Done
			sum.Total += one.Total
		}
		what := event.Transfer
		if len(r.moving) > 1 {
			what = fmt.Sprintf("%d transfers", len(r.moving))
		}
		r.current("… %s: %s: %s", event.Step, what, r.speed.String(sum))
	case plan.StepDone:
		r.finished("✓ %-28s %s", event.Step, doneWords(event))
	case plan.StepFailed:
		r.finished("✗ %-28s failed after %.1f s", event.Step, event.Seconds)
	}
}

func (r *liveReporter) current(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	if first, _, more := strings.Cut(text, "\n"); more {
		text = first
	}
	if runes := []rune(text); len(runes) > 110 {
		text = string(runes[:109]) + "…"
	}
	_, _ = fmt.Fprint(r.w, clearLine+text)
}

func (r *liveReporter) finished(format string, args ...any) {
	_, _ = fmt.Fprintf(r.w, clearLine+format+"\n", args...)
}
