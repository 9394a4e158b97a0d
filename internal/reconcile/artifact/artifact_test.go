package artifact_test

import (
	"testing"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/reconcile/artifact"
)

func TestDiffNamesWhatHasToTravel(t *testing.T) {
	want := artifact.Desired{Name: "gamma/orders", Digest: "sha256:aa", Size: 1000}
	for _, test := range []struct {
		name   string
		actual artifact.Actual
		reason string
		bytes  int64
	}{
		{"it is served", artifact.Actual{Published: true}, "", 0},
		{"nothing of it is there", artifact.Actual{MissingBlobs: 3, MissingBytes: 1000}, "missing", 1000},
		{"a part of it is there", artifact.Actual{MissingBlobs: 1, MissingBytes: 40}, "40 of 1000 bytes missing", 40},
		{"only its name is missing", artifact.Actual{}, "its bytes are there, its name is not", 0},
		{"it is named and lost a blob", artifact.Actual{Published: true, MissingBlobs: 1, MissingBytes: 40}, "40 of 1000 bytes missing", 40},
	} {
		t.Run(test.name, func(t *testing.T) {
			got := artifact.Diff("gamma-1", []artifact.Desired{want}, []artifact.Actual{test.actual})
			if test.reason == "" {
				if len(got) != 0 {
					t.Errorf("got %v, want nothing", got)
				}
				return
			}
			if len(got) != 1 {
				t.Fatalf("got %d changes", len(got))
			}
			change := got[0]
			if change.Action != plan.Upload || change.Kind != artifact.Kind || change.Host != "gamma-1" ||
				change.Target != "gamma/orders@sha256:aa" || change.Reason != test.reason || change.Bytes != test.bytes {
				t.Errorf("got %+v", change)
			}
		})
	}
}

func TestDiffKeepsTheOrderAndLeavesOutWhatIsServed(t *testing.T) {
	desired := []artifact.Desired{{Name: "a", Digest: "1", Size: 1}, {Name: "b", Digest: "2", Size: 1}, {Name: "c", Digest: "3", Size: 1}}
	actual := []artifact.Actual{{MissingBlobs: 1, MissingBytes: 1}, {Published: true}, {MissingBlobs: 1, MissingBytes: 1}}
	got := artifact.Diff("h", desired, actual)
	if len(got) != 2 || got[0].Target != "a@1" || got[1].Target != "c@3" {
		t.Errorf("got %v", got)
	}
	if got := artifact.Diff("h", nil, nil); len(got) != 0 {
		t.Errorf("nothing is desired, got %v", got)
	}
}
