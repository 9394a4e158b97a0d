package cli

import "github.com/nomad-site/site/internal/plan"

// newQuietReporter shows a read-only run: on a terminal the step under way,
// elsewhere nothing. Its result is printed at the end.
func newQuietReporter(env Environment, flags *globalFlags) plan.Reporter {
	if isTerminal(env.Err) && !flags.json {
		return &passingReporter{live: liveReporter{w: env.Err}}
	}
	return silentReporter{}
}

type silentReporter struct{}

func (silentReporter) Report(plan.Event) {}

// passingReporter leaves no line behind.
type passingReporter struct{ live liveReporter }

func (r *passingReporter) Report(event plan.Event) {
	r.live.mutex.Lock()
	defer r.live.mutex.Unlock()
	switch event.Type {
	case plan.StepStarted:
		r.live.current("… %s", event.Step)
	case plan.StepDone, plan.StepFailed:
		r.live.current("")
	}
}
