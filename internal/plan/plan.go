// Package plan is the vocabulary of every flow: a Step observes, diffs, applies
// and verifies; a Change is one atomic difference; Run walks a list of steps.
package plan

import (
	"context"
	"fmt"
	"slices"
	"strings"
)

// Action says what a change does to its target.
type Action string

// The actions, in the words that users read.
const (
	Create  Action = "create"
	Update  Action = "update"
	Delete  Action = "delete"
	Upload  Action = "upload"
	Start   Action = "start"
	Restart Action = "restart"
	Reload  Action = "reload"
	Execute Action = "run"
)

// Change is one atomic difference between desired and actual state. It is
// printable data: it never holds a secret.
type Change struct {
	Action Action `json:"action"`
	// Kind is what is changed: "file", "directory", "unit", "package", "artifact", "job", …
	Kind string `json:"kind"`
	// Host is empty for what belongs to the site as a whole.
	Host   string `json:"host,omitempty"`
	Target string `json:"target"`
	Reason string `json:"reason"`
	// Precondition is the state that apply insists on, such as "modify index 12".
	Precondition string `json:"precondition,omitempty"`
	// Bytes is how many bytes applying sends, where that is known.
	Bytes int64 `json:"bytes,omitempty"`
	// Details are further lines for a reader, such as a server's own diff.
	Details []string `json:"details,omitempty"`
}

func (c Change) String() string {
	where := c.Target
	if c.Host != "" {
		where = c.Host + ": " + where
	}
	return fmt.Sprintf("%s %s %s (%s)", c.Action, c.Kind, where, c.Reason)
}

// UnknownError says that a step cannot be observed before another was applied.
type UnknownError struct{ Until string }

func (e *UnknownError) Error() string {
	return fmt.Sprintf("unknown until %q is applied", e.Until)
}

// Step is one bound reconciler of a flow.
type Step interface {
	// Name is how reports call the step.
	Name() string
	// Plan observes and diffs; it writes nothing. An *UnknownError says that
	// there is nothing to observe yet.
	Plan(ctx context.Context) ([]Change, error)
	// Apply makes the changes of the last Plan and verifies them.
	Apply(ctx context.Context, changes []Change, progress Progress) error
}

// Progress receives how far an Apply has come. Implementations are safe for
// concurrent use.
type Progress interface {
	// Message is one line about what is being done or waited for.
	Message(format string, args ...any)
	// Bytes reports bytes moved so far and in total for one named transfer.
	Bytes(what string, done, total int64)
}

// Reconciler binds the four verbs to one kind of thing. D and A are the plain
// state types of a reconcile package.
type Reconciler[D, A any] struct {
	Title string
	// Desire renders the desired state; no remote reads.
	Desire func(ctx context.Context) (D, error)
	// Observe reads the actual state; no writes.
	Observe func(ctx context.Context, desired D) (A, error)
	// Diff is pure.
	Diff func(desired D, actual A) []Change
	// Converge makes the changes.
	Converge func(ctx context.Context, desired D, actual A, changes []Change, progress Progress) error
	// Settled, where set, replaces the default check after Converge (observe
	// and diff once more: it must find nothing).
	Settled func(ctx context.Context, desired D) error

	desired D
	actual  A
}

var _ Step = (*Reconciler[int, int])(nil)

// Name implements Step.
func (r *Reconciler[D, A]) Name() string { return r.Title }

// Plan implements Step.
func (r *Reconciler[D, A]) Plan(ctx context.Context) ([]Change, error) {
	var err error
	if r.desired, err = r.Desire(ctx); err != nil {
		return nil, err
	}
	if r.actual, err = r.Observe(ctx, r.desired); err != nil {
		return nil, err
	}
	return r.Diff(r.desired, r.actual), nil
}

// Apply implements Step.
func (r *Reconciler[D, A]) Apply(ctx context.Context, changes []Change, progress Progress) error {
	if err := r.Converge(ctx, r.desired, r.actual, changes, progress); err != nil {
		return err
	}
	if r.Settled != nil {
		return r.Settled(ctx, r.desired)
	}
	actual, err := r.Observe(ctx, r.desired)
	if err != nil {
		return fmt.Errorf("verify: %w", err)
	}
	if left := r.Diff(r.desired, actual); len(left) > 0 {
		return &NotSettledError{Left: left}
	}
	return nil
}

// NotSettledError names what still differs after an apply.
type NotSettledError struct{ Left []Change }

func (e *NotSettledError) Error() string {
	return fmt.Sprintf("still different after apply: %s%s", e.Left[0], more(len(e.Left)-1))
}

func more(n int) string {
	if n == 0 {
		return ""
	}
	return fmt.Sprintf(" and %d more", n)
}

// Hinter is an error that knows what the user can do about it.
type Hinter interface{ Hint() string }

// HintError adds the way out to an error.
type HintError struct {
	Err error
	Fix string
}

func (e *HintError) Error() string { return e.Err.Error() }
func (e *HintError) Unwrap() error { return e.Err }

// Hint implements Hinter.
func (e *HintError) Hint() string { return e.Fix }

// WithHint adds the way out to err; nil stays nil.
func WithHint(err error, format string, args ...any) error {
	if err == nil {
		return nil
	}
	return &HintError{Err: err, Fix: fmt.Sprintf(format, args...)}
}

// HintOf is the nearest hint in err's chain; of joined errors, those of each.
func HintOf(err error) string { return strings.Join(HintsOf(err), "; ") }

// HintsOf finds the nearest hint in err's chain, and where errors are joined the
// nearest of each, without repetition.
func HintsOf(err error) []string {
	var hints []string
	EachError(err, func(one error) bool {
		hinter, ok := one.(Hinter) // each node of the tree is looked at
		if !ok || hinter.Hint() == "" {
			return true
		}
		if hint := hinter.Hint(); !slices.Contains(hints, hint) {
			hints = append(hints, hint)
		}
		return false
	})
	return hints
}

// EachError shows every error of a tree of wrapped and joined errors to visit,
// parents first. What is below one for which visit returns false is left out.
func EachError(err error, visit func(error) (descend bool)) {
	if err == nil || !visit(err) {
		return
	}
	switch wrapped := err.(type) { //nolint:errorlint // each node of the tree is looked at
	case interface{ Unwrap() error }:
		EachError(wrapped.Unwrap(), visit)
	case interface{ Unwrap() []error }:
		for _, inner := range wrapped.Unwrap() {
			EachError(inner, visit)
		}
	}
}
