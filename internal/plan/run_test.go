package plan_test

import (
	"context"
	"errors"
	"testing"

	"github.com/nomad-site/site/internal/plan"
)

// thing is the smallest reconciled state: a number that should be another.
type thing struct{ actual, desired, writes int }

func (t *thing) step(until string) plan.Step {
	return &plan.Reconciler[int, int]{
		Title:  "thing",
		Desire: func(context.Context) (int, error) { return t.desired, nil },
		Observe: func(context.Context, int) (int, error) {
			if until != "" {
				return 0, &plan.UnknownError{Until: until}
			}
			return t.actual, nil
		},
		Diff: func(desired, actual int) []plan.Change {
			if desired == actual {
				return nil
			}
			return []plan.Change{{Action: plan.Update, Kind: "thing", Target: "it", Reason: "differs"}}
		},
		Converge: func(_ context.Context, desired, _ int, _ []plan.Change, _ plan.Progress) error {
			t.writes++
			if desired != 13 { // 13 never takes effect
				t.actual = desired
			}
			return nil
		},
	}
}

type events []plan.Event

func (e *events) Report(event plan.Event) { *e = append(*e, event) }

func TestRunAppliesOnceAndThenFindsNothing(t *testing.T) {
	it := &thing{actual: 1, desired: 2}
	for round, wantWrites := range []int{1, 1} {
		result, err := plan.Run(t.Context(), []plan.Step{it.step("")}, plan.Apply, &events{})
		if err != nil {
			t.Fatal(err)
		}
		if it.writes != wantWrites {
			t.Errorf("round %d: %d writes, want %d", round, it.writes, wantWrites)
		}
		if want := 1 - round; result.Pending() != want {
			t.Errorf("round %d: %d changes, want %d", round, result.Pending(), want)
		}
	}
}

func TestDryRunWritesNothing(t *testing.T) {
	it := &thing{actual: 1, desired: 2}
	result, err := plan.Run(t.Context(), []plan.Step{it.step("")}, plan.DryRun, &events{})
	if err != nil || it.writes != 0 || result.Pending() != 1 {
		t.Fatalf("err %v, %d writes, %d pending", err, it.writes, result.Pending())
	}
}

func TestDryRunReportsUnknownAndApplyFailsOnIt(t *testing.T) {
	it := &thing{actual: 1, desired: 2}
	result, err := plan.Run(t.Context(), []plan.Step{it.step("host")}, plan.DryRun, &events{})
	if err != nil || result.Pending() != 1 || result.Outcomes[0].Unknown != "host" {
		t.Fatalf("err %v, %+v", err, result)
	}
	var unknown *plan.UnknownError
	if _, err = plan.Run(t.Context(), []plan.Step{it.step("host")}, plan.Apply, &events{}); !errors.As(err, &unknown) {
		t.Fatalf("got %v, want an UnknownError", err)
	}
}

func TestApplyThatDoesNotTakeEffectIsAnError(t *testing.T) {
	it := &thing{actual: 1, desired: 13}
	var left *plan.NotSettledError
	if _, err := plan.Run(t.Context(), []plan.Step{it.step("")}, plan.Apply, &events{}); !errors.As(err, &left) {
		t.Fatalf("got %v, want a NotSettledError", err)
	}
}

func TestACancelledRunStopsBeforeTheNextStepWithItsCause(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	cause := errors.New("operator pressed Ctrl-C")
	cancel(cause)
	it := &thing{actual: 1, desired: 2}
	if _, err := plan.Run(ctx, []plan.Step{it.step("")}, plan.Apply, &events{}); !errors.Is(err, cause) {
		t.Fatalf("got %v, want %v", err, cause)
	}
	if it.writes != 0 {
		t.Error("a cancelled run wrote")
	}
}
