package deploy

import (
	"context"
	"fmt"
	"time"

	"github.com/nomad-site/site/internal/plan"
)

// check is a step that has nothing to converge: it reads, and fails or not.
type check struct {
	title string
	run   func(context.Context) error
}

var _ plan.Step = check{}

func (c check) Name() string { return c.title }

func (c check) Plan(ctx context.Context) ([]plan.Change, error) { return nil, c.run(ctx) }

func (c check) Apply(context.Context, []plan.Change, plan.Progress) error { return nil }

// act is a step that finds what is left to do and does it.
type act struct {
	title string
	plan  func(ctx context.Context) ([]plan.Change, error)
	apply func(ctx context.Context, progress plan.Progress) error
}

var _ plan.Step = act{}

func (a act) Name() string { return a.title }

func (a act) Plan(ctx context.Context) ([]plan.Change, error) { return a.plan(ctx) }

func (a act) Apply(ctx context.Context, _ []plan.Change, progress plan.Progress) error {
	return a.apply(ctx, progress)
}

// renamed is a step that a flow has twice, by another name.
type renamed struct {
	plan.Step
	title string
}

func (r renamed) Name() string { return r.title }

// where leaves a step out of a run in which it has nothing to deal with. What
// holds is known once the configuration was read, which is after the steps were listed.
type where struct {
	plan.Step
	holds func() bool
}

func (w where) Plan(ctx context.Context) ([]plan.Change, error) {
	if !w.holds() {
		return nil, nil
	}
	return w.Step.Plan(ctx)
}

// DeadlineError ends a run whose time is over.
type DeadlineError struct{ After time.Duration }

func (e *DeadlineError) Error() string {
	return fmt.Sprintf("the run took longer than its deadline of %s", e.After)
}

// Is tells adapters that time is over, as opposed to an operator's interruption.
func (*DeadlineError) Is(target error) bool { return target == context.DeadlineExceeded }

// Hint implements plan.Hinter.
func (e *DeadlineError) Hint() string {
	return "run it again, it goes on from here; or raise --timeout, or deadline in site.hcl"
}

// bound gives the run its deadline: that of the options or, as soon as the
// configuration is read, that of the site.
func (s *session) bound(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	s.abort = cancel
	start := time.Now()
	arm := func(limit time.Duration) {
		s.deadline = start.Add(limit)
		timer := time.AfterFunc(time.Until(s.deadline), func() { cancel(&DeadlineError{After: limit}) })
		s.onClose(func() { timer.Stop() })
	}
	if s.options.Timeout > 0 {
		arm(s.options.Timeout)
	} else {
		s.armDeadline = arm
	}
	return ctx, func() { cancel(context.Canceled) }
}

// left is how much of the run's time is left.
func (s *session) left() time.Duration {
	if s.deadline.IsZero() {
		return s.site.Deadline
	}
	return max(time.Until(s.deadline), time.Second)
}
