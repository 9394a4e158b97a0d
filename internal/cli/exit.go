package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"

	"github.com/nomad-site/site/internal/plan"
)

// The exit codes, as in every command's help.
const (
	ExitDone        = 0
	ExitError       = 1
	ExitChanges     = 2
	ExitReverted    = 3
	ExitNotReverted = 4
	ExitLocked      = 5
	ExitInterrupted = 130
)

const exitCodesHelp = `
Exit codes:
  0    done, or nothing to do
  1    error
  2    changes pending (plan --check), or findings
  3    the rollout failed and was reverted
  4    the rollout failed and was not reverted
  5    locked by someone else
  130  interrupted`

// ErrInterrupted is the cause of a context that the operator ended.
var ErrInterrupted = plan.WithHint(errors.New("interrupted"), "run it again: it goes on from where it stopped")

// errChanges makes `plan --check` exit with ExitChanges; it prints nothing.
var errChanges = errors.New("changes pending")

// errDone ends a command that holds something open as long as another runs.
var errDone = errors.New("done")

// childError ends a command that ran another one: its exit code is ours, and it
// has said itself what was wrong.
type childError struct {
	name string
	code int
}

func (e *childError) Error() string { return fmt.Sprintf("%s ended with exit code %d", e.name, e.code) }

// childEnded keeps the exit code of a command that ran and failed; an error that
// kept it from running stays as it is.
func childEnded(name string, err error) error {
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() > 0 {
		return &childError{name: name, code: exit.ExitCode()}
	}
	return err
}

// rolloutFailure is a rollout error that knows whether the old version runs again.
type rolloutFailure interface {
	error
	WasReverted() bool
}

// lockedError is an error of somebody else's lock.
type lockedError interface {
	error
	Locked() bool
}

// ExitCode is the one switch from error to exit code.
func ExitCode(err error) int {
	var rollout rolloutFailure
	var locked lockedError
	var child *childError
	switch {
	case err == nil, errors.Is(err, errDone):
		return ExitDone
	case errors.Is(err, errChanges):
		return ExitChanges
	case errors.As(err, &child):
		return child.code
	case errors.Is(err, ErrInterrupted), errors.Is(err, context.Canceled):
		return ExitInterrupted
	case errors.As(err, &rollout):
		if allReverted(err) {
			return ExitReverted
		}
		return ExitNotReverted
	case errors.As(err, &locked):
		return ExitLocked
	default:
		return ExitError
	}
}

// allReverted looks at every failed rollout: one job that was left broken counts
// more than others that were mended.
func allReverted(err error) bool {
	all := true
	plan.EachError(err, func(one error) bool {
		rollout, ok := one.(rolloutFailure) //nolint:errorlint // each node of the tree is looked at
		all = all && (!ok || rollout.WasReverted())
		return !ok
	})
	return all
}

// PrintError writes the error and, below it, the way out.
func PrintError(w io.Writer, err error) {
	var child *childError
	if errors.Is(err, errChanges) || errors.Is(err, errDone) || errors.As(err, &child) {
		return
	}
	_, _ = fmt.Fprintf(w, "error: %v\n", err)
	for _, hint := range plan.HintsOf(err) {
		_, _ = fmt.Fprintf(w, "hint: %s\n", hint)
	}
}
