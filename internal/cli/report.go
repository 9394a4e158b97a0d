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
		for _, change := range event.Changes {
			r.line("%s: %s", event.Step, change)
			if r.verbose {
				for _, detail := range change.Details {
					r.line("    %s", detail)
				}
			}
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
	what    string
}

const clearLine = "\r\x1b[K"

func (r *liveReporter) Report(event plan.Event) {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	switch event.Type {
	case plan.StepStarted:
		r.current("… %s", event.Step)
	case plan.StepPlanned:
		for _, change := range event.Changes {
			r.finished("    %s", change)
			if r.verbose {
				for _, detail := range change.Details {
					r.finished("        %s", detail)
				}
			}
		}
		r.current("… %s", event.Step)
	case plan.StepUnknown:
		r.finished("? %s: %s", event.Step, event.Message)
	case plan.StepProgress:
		r.current("… %s: %s", event.Step, event.Message)
	case plan.StepBytes:
		if r.what != event.Transfer {
			r.what, r.speed = event.Transfer, rate{start: event.Time}
		}
		r.current("… %s: %s: %s", event.Step, event.Transfer, r.speed.String(event))
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
