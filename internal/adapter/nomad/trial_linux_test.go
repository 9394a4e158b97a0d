package nomad

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/reconcile/job"
)

// generation prepares a spec whose templates would read this generation of shop.key.
func generation(t *testing.T, c *Client, spec string, number int) *Prepared {
	t.Helper()
	parsed, err := c.Parse(context.Background(), Jobspec{Path: "jobs/test/test.nomad.hcl", Content: []byte(spec)}, "")
	if err != nil {
		t.Fatal(err)
	}
	prepared, err := Prepare(parsed, Brief{Site: "lab", Component: "test", GitSHA: "abc", Secrets: map[string]int{"shop.key": number}})
	if err != nil {
		t.Fatal(err)
	}
	return prepared
}

func twice(spec string) string {
	return strings.Replace(spec, "network {", "count = 2\n    network {", 1)
}

func observed(t *testing.T, c *Client, prepared *Prepared) job.Actual {
	t.Helper()
	actual, err := c.Observe(context.Background(), prepared)
	if err != nil {
		t.Fatal(err)
	}
	return actual
}

// tasks are the running allocations of one version, with when their task started.
func tasks(t *testing.T, c *Client, id string, has func(*api.AllocationListStub) bool) map[string]string {
	t.Helper()
	shot, err := c.snapshot(context.Background(), id)
	if err != nil {
		t.Fatal(err)
	}
	running := map[string]string{}
	for _, allocation := range shot.allocations {
		if allocation.ClientStatus == api.AllocClientStatusRunning && allocation.DesiredStatus == api.AllocDesiredStatusRun && has(allocation) {
			running[allocation.ID] = allocation.TaskStates["hello"].StartedAt.String()
		}
	}
	return running
}

func every(*api.AllocationListStub) bool { return true }

func wantTasks(t *testing.T, c *Client, id string, want map[string]string) {
	t.Helper()
	if have := tasks(t, c, id, every); fmt.Sprint(have) != fmt.Sprint(want) {
		t.Errorf("running %v, want the very same as before: %v", have, want)
	}
}

func wantInUse(t *testing.T, c *Client, id string, want ...int) {
	t.Helper()
	var have InUse
	waitFor(t, fmt.Sprintf("generations %v in use", want), func() bool {
		var err error
		have, err = c.GenerationsInUse(context.Background(), []string{id})
		return err == nil && slices.Equal(have.Generations["shop.key"], want)
	})
	if len(have.Unready) > 0 {
		t.Errorf("unready nodes %v, want none", have.Unready)
	}
}

func try(t *testing.T, c *Client, prepared *Prepared) (*Trial, error) {
	t.Helper()
	return c.Try(context.Background(), prepared, observed(t, c, prepared), quick, logProgress{t})
}

func TestACanaryThatIsHealthyIsPromotedByALaterRun(t *testing.T) {
	t.Parallel()
	c := client(t)
	ctx := context.Background()
	spec := twice(serveSpec("trial-promoted", "ok", fmt.Sprintf(update, "")))
	old, wanted := generation(t, c, spec, 6), generation(t, c, spec, 7)
	if err := deploy(t, c, old, quick); err != nil {
		t.Fatal(err)
	}
	wantChange(t, c, wanted, "secret shop.key 6 → 7")
	before := tasks(t, c, "trial-promoted", every)
	trial, err := try(t, c, wanted)
	if err != nil {
		t.Fatal(err)
	}
	if !trial.Canaries || trial.Before.Secrets["shop.key"] != 6 {
		t.Errorf("trial %+v, want canaries, and generation 6 before", trial)
	}
	if canaries := tasks(t, c, "trial-promoted", func(a *api.AllocationListStub) bool { return a.DeploymentStatus.Canary }); len(canaries) != 1 {
		t.Errorf("canaries %v, want one", canaries)
	}
	isOld := func(a *api.AllocationListStub) bool { return a.JobVersion == trial.Before.Version }
	if still := tasks(t, c, "trial-promoted", isOld); fmt.Sprint(still) != fmt.Sprint(before) {
		t.Errorf("the old version runs %v, want all of %v", still, before)
	}
	wantInUse(t, c, "trial-promoted", 6, 7)
	waitFor(t, "the job's own deadline, which must not end a trial, to pass", func() bool {
		shot, err := c.snapshot(ctx, "trial-promoted")
		return err == nil && time.Now().After(shot.deployments[0].TaskGroups["web"].RequireProgressBy)
	})

	// Another run knows nothing but what Nomad has.
	have := observed(t, c, wanted)
	if len(have.PlanDiff) > 0 || have.Secrets["shop.key"] != 7 || !have.Health.Waiting {
		t.Errorf("observed %+v, want no difference, and a job that waits", have)
	}
	if none, err := c.FindTrial(ctx, old, observed(t, c, old)); none != nil || err != nil {
		t.Errorf("found the trial of another spec: %+v, %v", none, err)
	}
	found, err := c.FindTrial(ctx, wanted, have)
	if err != nil || found == nil || !found.Canaries || found.Before.Version != trial.Before.Version ||
		found.Before.SpecDigest != old.Desired.SpecDigest || found.Registration.Version != trial.Registration.Version {
		t.Fatalf("found %+v, %v, want the trial %+v", found, err, trial)
	}
	if err := c.AwaitTrial(ctx, found, wanted, quick, logProgress{t}); err != nil {
		t.Fatal(err)
	}
	if err := c.Promote(ctx, found, wanted, quick, logProgress{t}); err != nil {
		t.Fatal(err)
	}
	wantInUse(t, c, "trial-promoted", 7)
	if running := tasks(t, c, "trial-promoted", every); len(running) != 2 {
		t.Errorf("running %v, want two", running)
	}
	wantNothing(t, c, wanted)
	again := observed(t, c, wanted)
	if err := c.Promote(ctx, found, wanted, quick, logProgress{t}); err != nil {
		t.Errorf("promoting what was promoted: %v", err)
	}
	if have := observed(t, c, wanted); have.ModifyIndex != again.ModifyIndex {
		t.Error("a second promotion registered something")
	}

	t.Run("a version that fails later goes back to it, canaries and all", func(t *testing.T) {
		bad := generation(t, c, twice(serveSpec("trial-promoted", "broken", fmt.Sprintf(update, "auto_revert = true"))), 7)
		verdict := wantVerdict(t, deploy(t, c, bad, quick), ClassCheck)
		if !verdict.Reverted {
			t.Error("the verdict must say that nomad went back")
		}
		wantNothing(t, c, wanted)
	})
}

func TestACanaryThatFailsIsAbandoned(t *testing.T) {
	t.Parallel()
	tests := map[string]struct{ id, updates, health string }{
		"while it is healthy":               {"trial-healthy", "", "ok"},
		"because its check fails":           {"trial-check", "", "broken"},
		"where no version was ever stable":  {"trial-unstable", "max_parallel = 0", "broken"},
		"where the author has two canaries": {"trial-two", "canary = 2\n auto_promote = true", "broken"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := client(t)
			ctx := context.Background()
			updates := fmt.Sprintf(update, test.updates)
			old := generation(t, c, twice(serveSpec(test.id, "ok", updates)), 6)
			if err := deploy(t, c, old, quick); err != nil {
				t.Fatal(err)
			}
			before := tasks(t, c, test.id, every)
			trial, err := try(t, c, generation(t, c, twice(serveSpec(test.id, test.health, updates)), 7))
			if trial == nil || !trial.Canaries {
				t.Fatalf("trial %+v, %v, want canaries", trial, err)
			}
			if test.health == "ok" && err != nil {
				t.Fatal(err)
			}
			if test.health != "ok" {
				wantVerdict(t, err, ClassCheck)
			}
			for range 2 { // the second time there is nothing to do any more
				if err := c.Abandon(ctx, trial, quick, logProgress{t}); err != nil {
					t.Fatal(err)
				}
			}
			wantTasks(t, c, test.id, before)
			wantInUse(t, c, test.id, 6)
			wantNothing(t, c, old)
		})
	}
}

func TestAJobWithAStaticPortIsTriedAsAWhole(t *testing.T) {
	t.Parallel()
	c := client(t)
	ctx := context.Background()
	ports, err := freePorts(1)
	if err != nil {
		t.Fatal(err)
	}
	spec := strings.Replace(serveSpec("trial-whole", "ok", fmt.Sprintf(update, "")), `port "http" {}`, fmt.Sprintf("port \"http\" {\n static = %d\n}", ports[0]), 1)
	old, wanted := generation(t, c, spec, 6), generation(t, c, spec, 7)
	if err := deploy(t, c, old, quick); err != nil {
		t.Fatal(err)
	}
	if can, why, err := c.CanCanary(ctx, wanted); can || !strings.Contains(why, "static port") || err != nil {
		t.Errorf("canary %t, %q, %v, want none on the only host", can, why, err)
	}
	for _, promoted := range []bool{false, true} {
		trial, err := try(t, c, wanted)
		if err != nil {
			t.Fatal(err)
		}
		wantInUse(t, c, "trial-whole", 7)
		found, err := c.FindTrial(ctx, wanted, observed(t, c, wanted))
		if err != nil || found == nil || found.Canaries || trial.Canaries || found.Before.SpecDigest != old.Desired.SpecDigest {
			t.Fatalf("found %+v, %v, want the trial %+v", found, err, trial)
		}
		if promoted {
			if err := c.Promote(ctx, found, wanted, quick, logProgress{t}); err != nil {
				t.Fatal(err)
			}
			wantNothing(t, c, wanted)
			continue
		}
		if err := c.Abandon(ctx, found, quick, logProgress{t}); err != nil {
			t.Fatal(err)
		}
		wantInUse(t, c, "trial-whole", 6)
		wantNothing(t, c, old)
	}
}

func TestATrialThatFailedAndStayedIsTriedAgain(t *testing.T) {
	t.Parallel()
	c := client(t)
	ctx := context.Background()
	updates := fmt.Sprintf(update, "max_parallel = 0") // no version becomes stable: nothing to go back to
	old := generation(t, c, serveSpec("trial-again", "ok", updates), 6)
	if err := deploy(t, c, old, quick); err != nil {
		t.Fatal(err)
	}
	before := tasks(t, c, "trial-again", every)
	bad := generation(t, c, serveSpec("trial-again", "broken", updates), 7)
	for range 2 {
		trial, err := try(t, c, bad)
		wantVerdict(t, err, ClassCheck)
		if trial.Before.SpecDigest != old.Desired.SpecDigest {
			t.Fatalf("before the trial: %+v, want the version that works", trial.Before)
		}
		waitFor(t, "nomad to end the trial", func() bool {
			found, err := c.FindTrial(ctx, bad, observed(t, c, bad))
			return err == nil && found == nil
		})
	}
	trial, err := try(t, c, bad)
	wantVerdict(t, err, ClassCheck)
	if err := c.Abandon(ctx, trial, quick, logProgress{t}); err != nil {
		t.Fatal(err)
	}
	wantTasks(t, c, "trial-again", before)
	wantNothing(t, c, old)
}

func TestATrialThatSomebodyReplacedIsNotTakenBack(t *testing.T) {
	t.Parallel()
	c := client(t)
	ctx := context.Background()
	spec := serveSpec("trial-replaced", "ok", fmt.Sprintf(update, ""))
	if err := deploy(t, c, generation(t, c, spec, 6), quick); err != nil {
		t.Fatal(err)
	}
	trial, err := try(t, c, generation(t, c, spec, 7))
	if err != nil {
		t.Fatal(err)
	}
	newer := generation(t, c, spec, 8)
	if err := deploy(t, c, newer, quick); err != nil {
		t.Fatal(err)
	}
	if err := c.Abandon(ctx, trial, quick, nil); err == nil || plan.HintOf(err) == "" {
		t.Errorf("abandoned what somebody else replaced: %v", err)
	}
	var failed *RolloutError
	if err := c.Promote(ctx, trial, newer, quick, nil); !errors.As(err, &failed) || failed.Verdict.Class != ClassCancelled {
		t.Errorf("promoted what somebody else replaced: %v", err)
	}
	wantNothing(t, c, newer)
}

func TestAJobThatDoesNotRunIsTriedAsAWholeAndStoppedAgain(t *testing.T) {
	t.Parallel()
	c := client(t)
	ctx := context.Background()
	prepared := generation(t, c, serveSpec("trial-new", "ok", fmt.Sprintf(update, "")), 7)
	trial, err := try(t, c, prepared)
	if err != nil || trial.Canaries {
		t.Fatalf("trial %+v, %v, want one without canaries", trial, err)
	}
	if err := c.Abandon(ctx, trial, quick, nil); err != nil {
		t.Fatal(err)
	}
	if have := observed(t, c, prepared); !have.Stopped {
		t.Errorf("observed %+v, want a stopped job", have)
	}
}

func TestJobsOfOtherTypesAreTriedAsAWhole(t *testing.T) {
	t.Parallel()
	specs := map[string]func(id, script string) string{
		"system": func(id, script string) string { return shellSpec(id, "system", script, fmt.Sprintf(update, "")) },
		"batch":  batchSpec,
		"a service without deployments that writes to a folder of the host": func(id, script string) string {
			spec := shellSpec(id, "service", script, fmt.Sprintf(update, "max_parallel = 0"))
			return strings.Replace(spec, "restart {", "volume \"data\" {\n type = \"host\"\n source = \"scratch\"\n}\nrestart {", 1)
		},
	}
	for name, spec := range specs {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := client(t)
			ctx := context.Background()
			id, good, bad := "trial-"+strings.Fields(name)[0], "sleep 300", "exit 3"
			if name == "batch" {
				good = "exit 0"
			}
			old := generation(t, c, spec(id, good), 6)
			if err := deploy(t, c, old, quick); err != nil {
				t.Fatal(err)
			}
			if can, why, err := c.CanCanary(ctx, generation(t, c, spec(id, good), 7)); can || why == "" || err != nil {
				t.Errorf("canary %t, %q, %v, want none", can, why, err)
			}
			trial, err := try(t, c, generation(t, c, spec(id, bad), 7))
			wantVerdict(t, err, ClassExit)
			if err := c.Abandon(ctx, trial, quick, logProgress{t}); err != nil {
				t.Fatal(err)
			}
			wantNothing(t, c, old)
			wanted := generation(t, c, spec(id, good), 8)
			if trial, err = try(t, c, wanted); err != nil {
				t.Fatal(err)
			}
			if err := c.Promote(ctx, trial, wanted, quick, logProgress{t}); err != nil {
				t.Fatal(err)
			}
			wantNothing(t, c, wanted)
		})
	}
}
