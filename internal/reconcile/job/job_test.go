package job

import (
	"errors"
	"reflect"
	"testing"

	"github.com/nomad-site/site/internal/plan"
)

func wanted(mutate ...func(*Desired)) Desired {
	want := Desired{
		Site: "lab", Component: "hello", JobID: "hello", SpecDigest: "sha256:new", GitSHA: "abc",
		Artifacts: map[string]string{"hello": "sha256:a", "page": "sha256:p"},
	}
	for _, change := range mutate {
		change(&want)
	}
	return want
}

func running(mutate ...func(*Actual)) Actual {
	have := Actual{
		Exists: true, Version: 3, ModifyIndex: 12, Site: "lab", Component: "hello",
		SpecDigest: "sha256:new", GitSHA: "abc", Health: Health{Healthy: true},
		Artifacts: map[string]string{"hello": "sha256:a", "page": "sha256:p"},
	}
	for _, change := range mutate {
		change(&have)
	}
	return have
}

func TestDiff(t *testing.T) {
	tests := map[string]struct {
		want Desired
		have Actual
		// action is empty where nothing differs
		action       plan.Action
		reason       string
		precondition string
	}{
		"a healthy job with the same digest is left alone": {
			want: wanted(), have: running(),
		},
		"another git sha alone is no change": {
			want: wanted(func(d *Desired) { d.GitSHA = "def" }), have: running(),
		},
		"a job that was never registered is created where none exists": {
			want: wanted(), have: Actual{},
			action: plan.Create, reason: "not registered", precondition: "not registered",
		},
		"another digest without another artifact is a changed spec": {
			want: wanted(), have: running(func(a *Actual) { a.SpecDigest = "sha256:old" }),
			action: plan.Update, reason: "spec changed", precondition: "modify index 12",
		},
		"a changed artifact is named": {
			want: wanted(), have: running(func(a *Actual) {
				a.SpecDigest = "sha256:old"
				a.Artifacts = map[string]string{"hello": "sha256:b", "page": "sha256:p"}
			}),
			action: plan.Update, reason: "artifact hello changed", precondition: "modify index 12",
		},
		"two changed artifacts are named in order": {
			want: wanted(), have: running(func(a *Actual) {
				a.SpecDigest = "sha256:old"
				a.Artifacts = map[string]string{"page": "sha256:q", "hello": "sha256:b"}
			}),
			action: plan.Update, reason: "artifacts hello, page changed", precondition: "modify index 12",
		},
		"a secret of which another generation is read is named": {
			want: wanted(func(d *Desired) { d.Secrets = map[string]int{"shop.key": 7, "shop.new": 1, "shop.same": 3} }),
			have: running(func(a *Actual) {
				a.SpecDigest = "sha256:old"
				a.Secrets = map[string]int{"shop.key": 6, "shop.same": 3, "shop.gone": 2}
			}),
			action: plan.Update, reason: "secret shop.key 6 → 7", precondition: "modify index 12",
		},
		"secrets are named after artifacts, in order": {
			want: wanted(func(d *Desired) { d.Secrets = map[string]int{"shop.key": 7, "api.key": 2} }),
			have: running(func(a *Actual) {
				a.SpecDigest = "sha256:old"
				a.Artifacts = map[string]string{"hello": "sha256:b", "page": "sha256:p"}
				a.Secrets = map[string]int{"shop.key": 6, "api.key": 1}
			}),
			action: plan.Update, reason: "artifact hello changed, secret api.key 1 → 2, secret shop.key 6 → 7", precondition: "modify index 12",
		},
		"the same digest after a failed deployment is tried again": {
			want: wanted(), have: running(func(a *Actual) { a.Health = Health{Reason: "last deployment failed"} }),
			action: plan.Restart, reason: "last deployment failed", precondition: "modify index 12",
		},
		"a missing allocation is a change": {
			want: wanted(), have: running(func(a *Actual) { a.Health = Health{Reason: "2 of 3 allocations running"} }),
			action: plan.Restart, reason: "2 of 3 allocations running", precondition: "modify index 12",
		},
		"a stopped job is started": {
			want: wanted(), have: running(func(a *Actual) {
				a.Stopped, a.Dead = true, true
				a.Health = Health{Reason: "0 of 1 allocations running"}
			}),
			action: plan.Start, reason: "job was stopped", precondition: "modify index 12",
		},
		"a job that was edited by hand and kept our digest is put back": {
			want: wanted(), have: running(func(a *Actual) { a.PlanDiff = []string{"~ Group \"web\" Count: 3 => 1"} }),
			action: plan.Update, reason: "job was changed by hand", precondition: "modify index 12",
		},
		"a job that waits is waited for": {
			want: wanted(), have: running(func(a *Actual) { a.Health = Health{Waiting: true, Reason: "deployment is running"} }),
			action: plan.Start, reason: "waiting: deployment is running", precondition: "modify index 12",
		},
		"an adopted job of others is updated": {
			want: wanted(func(d *Desired) { d.Adopt = true }), have: Actual{Exists: true, ModifyIndex: 4},
			action: plan.Update, reason: "adopted", precondition: "modify index 4",
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			changes := Diff([]Desired{test.want}, map[string]Actual{"hello": test.have})
			if test.action == "" {
				if len(changes) > 0 {
					t.Fatalf("got %v, want nothing", changes)
				}
				return
			}
			if len(changes) != 1 {
				t.Fatalf("got %d changes, want one", len(changes))
			}
			got := changes[0]
			if got.Action != test.action || got.Reason != test.reason || got.Precondition != test.precondition {
				t.Errorf("got %s with %q, want %s (%s) with %q", got, got.Precondition, test.action, test.reason, test.precondition)
			}
			if !reflect.DeepEqual(got.Details, test.have.PlanDiff) {
				t.Errorf("details %v, want the server's diff %v", got.Details, test.have.PlanDiff)
			}
		})
	}
}

func TestRefuse(t *testing.T) {
	tests := map[string]struct {
		want    Desired
		have    Actual
		refused bool
	}{
		"our own job is accepted":              {wanted(), running(), false},
		"a job that does not exist":            {wanted(), Actual{}, false},
		"a job without our meta is refused":    {wanted(), Actual{Exists: true}, true},
		"a job of another site is refused":     {wanted(), running(func(a *Actual) { a.Site = "prod" }), true},
		"an adopted job of others is accepted": {wanted(func(d *Desired) { d.Adopt = true }), Actual{Exists: true}, false},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			err := Refuse([]Desired{test.want}, map[string]Actual{"hello": test.have})
			var foreign *ForeignError
			if errors.As(err, &foreign) != test.refused {
				t.Fatalf("got %v, want refusal %t", err, test.refused)
			}
			if test.refused && plan.HintOf(err) == "" {
				t.Error("a refusal must say what to do")
			}
		})
	}
}

func TestOrphansAreOnlyOurRunningUndeclaredJobs(t *testing.T) {
	actual := map[string]Actual{
		"hello":   running(),
		"old":     running(),
		"stopped": running(func(a *Actual) { a.Stopped = true }),
		"foreign": {Exists: true},
		"other":   running(func(a *Actual) { a.Site = "prod" }),
	}
	changes := DiffOrphans("lab", []Desired{wanted()}, actual)
	if len(changes) != 1 || changes[0].Target != "old" || changes[0].Action != plan.Delete {
		t.Fatalf("got %v, want only old to be deleted", changes)
	}
}

func TestSpecDigest(t *testing.T) {
	base := `{"ID":"hello","Meta":{"site_name":"lab","site_git_sha":"abc"},"TaskGroups":[{"Count":1}]}`
	tests := map[string]struct {
		spec string
		same bool
	}{
		"key order does not matter":          {`{"TaskGroups":[{"Count":1}],"Meta":{"site_git_sha":"abc","site_name":"lab"},"ID":"hello"}`, true},
		"the git sha is left out":            {`{"ID":"hello","Meta":{"site_name":"lab","site_git_sha":"def"},"TaskGroups":[{"Count":1}]}`, true},
		"the deploy id is left out":          {`{"ID":"hello","Meta":{"site_name":"lab","site_deploy_id":"9"},"TaskGroups":[{"Count":1}]}`, true},
		"the mark of a trial is left out":    {`{"ID":"hello","Meta":{"site_name":"lab","site_trial":"canary"},"TaskGroups":[{"Count":1}]}`, true},
		"the generation of a secret matters": {`{"ID":"hello","Meta":{"site_name":"lab","site_secrets":"{\"shop.key\":7}"},"TaskGroups":[{"Count":1}]}`, false},
		"the digest itself is out":           {`{"ID":"hello","Meta":{"site_name":"lab","site_spec_digest":"x"},"TaskGroups":[{"Count":1}]}`, true},
		"the server's fields are out":        {`{"ID":"hello","Version":3,"Stop":false,"ModifyIndex":9,"Meta":{"site_name":"lab"},"TaskGroups":[{"Count":1}]}`, true},
		"a null says nothing":                {`{"ID":"hello","Multiregion":null,"Meta":{"site_name":"lab"},"TaskGroups":[{"Count":1,"Scaling":null}]}`, true},
		"a count matters":                    {`{"ID":"hello","Meta":{"site_name":"lab"},"TaskGroups":[{"Count":2}]}`, false},
		"other meta matters":                 {`{"ID":"hello","Meta":{"site_name":"lab","colour":"red"},"TaskGroups":[{"Count":1}]}`, false},
		"an artifact's digest matters":       {`{"ID":"hello","Meta":{"site_name":"lab","site_artifacts":"{}"},"TaskGroups":[{"Count":1}]}`, false},
	}
	want, err := SpecDigest([]byte(base))
	if err != nil {
		t.Fatal(err)
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			got, err := SpecDigest([]byte(test.spec))
			if err != nil {
				t.Fatal(err)
			}
			if (got == want) != test.same {
				t.Errorf("got %s, base %s, want same %t", got, want, test.same)
			}
		})
	}
}

func TestCanonicalJSONKeepsBigNumbersAndMarkup(t *testing.T) {
	got, err := CanonicalJSON([]byte(`{"b":1800000000000000001,"a":"<&>","n":null}`))
	if err != nil {
		t.Fatal(err)
	}
	if want := `{"a":"<&>","b":1800000000000000001}`; string(got) != want {
		t.Errorf("got %s, want %s", got, want)
	}
}
