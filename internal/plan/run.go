package plan

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

// EventVersion names the schema of Event; it is raised when a field changes meaning.
const EventVersion = "site.event/v1"

// EventType says what happened.
type EventType string

// The events of one run, in the order in which a step can emit them.
const (
	StepStarted  EventType = "step_started"
	StepPlanned  EventType = "step_planned"
	StepUnknown  EventType = "step_unknown"
	StepProgress EventType = "step_progress"
	StepBytes    EventType = "step_bytes"
	StepDone     EventType = "step_done"
	StepFailed   EventType = "step_failed"
)

// Event is one line of a run for a reporter; with --json it is printed as it is.
type Event struct {
	Schema  string    `json:"schema"`
	Time    time.Time `json:"time"`
	Type    EventType `json:"type"`
	Step    string    `json:"step"`
	Message string    `json:"message,omitempty"`
	Changes []Change  `json:"changes,omitempty"`
	// Applied is set on step_done: whether the step wrote anything.
	Applied bool `json:"applied,omitempty"`
	// Seconds the step took, on step_done and step_failed.
	Seconds float64 `json:"seconds,omitempty"`
	// Transfer, Done and Total belong to step_bytes; the latter two are bytes.
	Transfer string `json:"transfer,omitempty"`
	Done     int64  `json:"done,omitempty"`
	Total    int64  `json:"total,omitempty"`
	Error    string `json:"error,omitempty"`
	Hint     string `json:"hint,omitempty"`
}

// Reporter receives the events of a run. Calls may come from several goroutines.
type Reporter interface{ Report(Event) }

// Outcome is what Run did with one step.
type Outcome struct {
	Step     string        `json:"step"`
	Changes  []Change      `json:"changes"`
	Unknown  string        `json:"unknown,omitempty"`
	Applied  bool          `json:"applied"`
	Duration time.Duration `json:"-"`
	Seconds  float64       `json:"seconds"`
}

// Result is what one run found and did.
type Result struct {
	Schema   string    `json:"schema"`
	Outcomes []Outcome `json:"steps"`
}

// ResultVersion names the schema of Result.
const ResultVersion = "site.plan/v1"

// Pending counts the changes that were found and, in a dry run, left alone;
// a step that cannot be observed yet counts as one.
func (r Result) Pending() int {
	pending := 0
	for _, outcome := range r.Outcomes {
		pending += len(outcome.Changes)
		if outcome.Unknown != "" {
			pending++
		}
	}
	return pending
}

// StepError says in which step a run ended.
type StepError struct {
	Step string
	Err  error
}

func (e *StepError) Error() string { return fmt.Sprintf("%s: %v", e.Step, e.Err) }
func (e *StepError) Unwrap() error { return e.Err }

// Mode says how far Run goes.
type Mode int

// A dry run plans every step and applies none.
const (
	Apply Mode = iota
	DryRun
)

// Run walks steps in order: plan, and unless it is a dry run or nothing
// differs, apply. The first error ends it. After each step it looks whether ctx
// was cancelled.
func Run(ctx context.Context, steps []Step, mode Mode, reporter Reporter) (Result, error) {
	result := Result{Schema: ResultVersion}
	for _, step := range steps {
		if ctx.Err() != nil {
			return result, &StepError{Step: step.Name(), Err: context.Cause(ctx)}
		}
		outcome, err := runStep(ctx, step, mode, reporter)
		result.Outcomes = append(result.Outcomes, outcome)
		if err != nil {
			return result, &StepError{Step: step.Name(), Err: err}
		}
	}
	return result, nil
}

func runStep(ctx context.Context, step Step, mode Mode, reporter Reporter) (Outcome, error) {
	start := time.Now()
	outcome := Outcome{Step: step.Name(), Changes: []Change{}}
	report := &stepReporter{reporter: reporter, step: step.Name()}
	report.emit(Event{Type: StepStarted})
	fail := func(err error) (Outcome, error) {
		if cause := context.Cause(ctx); cause != nil && errors.Is(err, ctx.Err()) {
			err = cause
		}
		outcome.Duration = time.Since(start)
		outcome.Seconds = outcome.Duration.Seconds()
		report.emit(Event{Type: StepFailed, Seconds: outcome.Seconds, Error: err.Error(), Hint: HintOf(err)})
		return outcome, err
	}

	changes, err := step.Plan(ctx)
	var unknown *UnknownError
	switch {
	case errors.As(err, &unknown):
		outcome.Unknown = unknown.Until
		if mode == Apply {
			return fail(err)
		}
		report.emit(Event{Type: StepUnknown, Message: unknown.Error()})
	case err != nil:
		return fail(err)
	default:
		outcome.Changes = append(outcome.Changes, changes...)
		report.emit(Event{Type: StepPlanned, Changes: changes})
	}
	if mode == Apply && len(changes) > 0 {
		outcome.Applied = true
		if err := step.Apply(ctx, changes, report); err != nil {
			return fail(err)
		}
	}
	outcome.Duration = time.Since(start)
	outcome.Seconds = outcome.Duration.Seconds()
	report.emit(Event{Type: StepDone, Applied: outcome.Applied, Seconds: outcome.Seconds})
	return outcome, nil
}

// stepReporter stamps events with their step; it is the Progress of an Apply.
type stepReporter struct {
	mutex    sync.Mutex
	reporter Reporter
	step     string
	// next is when each transfer may be reported again.
	next map[string]time.Time
}

// bytesInterval is how often one transfer is reported: it moves many times a second.
const bytesInterval = 200 * time.Millisecond

var _ Progress = (*stepReporter)(nil)

func (r *stepReporter) emit(event Event) {
	event.Schema, event.Step, event.Time = EventVersion, r.step, time.Now().UTC()
	r.mutex.Lock()
	defer r.mutex.Unlock()
	r.reporter.Report(event)
}

func (r *stepReporter) due(what string) bool {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	now := time.Now()
	if now.Before(r.next[what]) {
		return false
	}
	if r.next == nil {
		r.next = map[string]time.Time{}
	}
	r.next[what] = now.Add(bytesInterval)
	return true
}

func (r *stepReporter) Message(format string, args ...any) {
	r.emit(Event{Type: StepProgress, Message: fmt.Sprintf(format, args...)})
}

func (r *stepReporter) Bytes(what string, done, total int64) {
	if done < total && !r.due(what) {
		return
	}
	r.emit(Event{Type: StepBytes, Transfer: what, Done: done, Total: total})
}
