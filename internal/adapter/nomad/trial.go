package nomad

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/reconcile/job"
)

// Trial is a new version of a job that was registered to be tried: it is
// promoted or abandoned.
type Trial struct {
	JobID        string
	Registration Registration
	// Before is the job as it was. Of a trial that was found again, its health is not known.
	Before job.Actual
	// Canaries says that all of the old version still runs beside the canaries;
	// without, the whole job was rolled over.
	Canaries bool
}

// trialOf is a copy of a job as it is registered to be tried in one of the two
// ways; with neither it is the job as it is.
func trialOf(original *api.Job, way string) (*api.Job, error) {
	tried, err := cloneJob(original)
	if err != nil || way == "" {
		return tried, err
	}
	tried.Meta[job.MetaTrial] = way
	for _, group := range tried.TaskGroups {
		update := group.Update
		if update == nil {
			continue // jobs of a type that has no deployments
		}
		yes, no := true, false
		if way == job.TrialCanary {
			canaries := max(1, number(update.Canary))
			update.Canary, update.AutoPromote, update.AutoRevert = &canaries, &no, &yes
			if number(update.MaxParallel) == 0 {
				// That means all at once, and no deployment: canaries need one.
				all := max(1, number(group.Count))
				update.MaxParallel = &all
			}
			if hasStaticPort(group) {
				// On a node with several addresses Nomad gives the port away twice.
				group.Constraints = append(group.Constraints, api.NewConstraint("", api.ConstraintDistinctHosts, "true"))
			}
			continue
		}
		none := 0
		update.Canary, update.AutoPromote = &none, &no
		if number(update.MaxParallel) > 0 {
			update.AutoRevert = &yes
		}
	}
	return tried, nil
}

func hasStaticPort(group *api.TaskGroup) bool {
	networks := slices.Clone(group.Networks)
	for _, task := range group.Tasks {
		if task.Resources != nil {
			networks = append(networks, task.Resources.Networks...)
		}
	}
	return slices.ContainsFunc(networks, func(network *api.NetworkResource) bool { return len(network.ReservedPorts) > 0 })
}

func onTrial(live *api.Job) bool { return live != nil && live.Meta[job.MetaTrial] != "" }

// CanCanary reports whether one allocation of each group can run beside those
// of the job as it is, and if not, why.
func (c *Client) CanCanary(ctx context.Context, prepared *Prepared) (bool, string, error) {
	live, err := c.job(ctx, prepared.Desired.JobID)
	if err != nil {
		return false, "", err
	}
	if why := whyNoCanary(prepared.Job, live); why != "" {
		return false, why, nil
	}
	tried, err := trialOf(prepared.Job, job.TrialCanary)
	if err != nil {
		return false, "", err
	}
	answer, _, err := c.api.Jobs().PlanOpts(tried, &api.PlanOptions{}, c.write(ctx))
	if err != nil {
		return false, "", describe(err, "plan a canary of job %s", prepared.Desired.JobID)
	}
	why := whyNotPlaced(tried, answer)
	return why == "", why, nil
}

// whyNoCanary is what the two jobs themselves say against a canary.
func whyNoCanary(wanted, live *api.Job) string {
	switch {
	case text(wanted.Type) != api.JobTypeService:
		return fmt.Sprintf("it is a %s job", text(wanted.Type))
	case live == nil || flag(live.Stop) || text(live.Status) == "dead":
		return "nothing of it runs yet"
	}
	for _, group := range wanted.TaskGroups {
		if group.Update != nil && number(group.Update.Canary) > 0 {
			continue // whoever wrote the job runs two versions at once anyway
		}
		if storage := writesTo(group); storage != "" {
			return fmt.Sprintf("group %s writes to %s, which two versions would share", text(group.Name), storage)
		}
	}
	return ""
}

// writesTo names storage outside of its allocation that a group writes to.
func writesTo(group *api.TaskGroup) string {
	for name, volume := range group.Volumes {
		if !volume.ReadOnly && !volume.PerAlloc {
			return "volume " + name
		}
	}
	for _, task := range group.Tasks {
		mounts, _ := task.Config["volumes"].([]any)
		for _, mount := range mounts {
			parts := strings.Split(fmt.Sprint(mount), ":")
			// Others than absolute paths lie in the allocation's own folder.
			if strings.HasPrefix(parts[0], "/") && (len(parts) < 3 || !slices.Contains(strings.Split(parts[2], ","), "ro")) {
				return "the host's " + parts[0]
			}
		}
	}
	return ""
}

// whyNotPlaced is what the server's plan says against a canary.
func whyNotPlaced(tried *api.Job, answer *api.JobPlanResponse) string {
	if groups := slices.Sorted(maps.Keys(answer.FailedTGAllocs)); len(groups) > 0 {
		if slices.ContainsFunc(tried.TaskGroups, func(group *api.TaskGroup) bool { return text(group.Name) == groups[0] && hasStaticPort(group) }) {
			return fmt.Sprintf("group %s has a static port, and no other host is free to give it", groups[0])
		}
		return fmt.Sprintf("group %s has no place for a canary: %s", groups[0], strings.Join(metricReasons(answer.FailedTGAllocs[groups[0]]), ", "))
	}
	if answer.Annotations != nil {
		for _, updates := range answer.Annotations.DesiredTGUpdates {
			if updates.Canary > 0 {
				return ""
			}
		}
	}
	return "nothing of it would be replaced"
}

// Try registers the job so that only canaries of each group are started, and
// waits until they are healthy. A job that cannot have canaries is rolled over
// as a whole, and Nomad goes back by itself where that fails. With an error,
// the trial is still returned if it was registered: Abandon it.
func (c *Client) Try(ctx context.Context, prepared *Prepared, have job.Actual, options WaitOptions, progress plan.Progress) (*Trial, error) {
	id := prepared.Desired.JobID
	canaries, why, err := c.CanCanary(ctx, prepared)
	if err != nil {
		return nil, err
	}
	way := job.TrialCanary
	if !canaries {
		way = job.TrialWhole
		message(progress, "job %s: no canary, all of it is rolled over: %s", id, why)
	}
	before, err := c.beforeTrial(ctx, prepared, have)
	if err != nil {
		return nil, err
	}
	tried, err := trialOf(prepared.Job, way)
	if err != nil {
		return nil, err
	}
	registered, err := c.register(ctx, tried, have.ModifyIndex)
	if err != nil {
		return nil, err
	}
	trial := &Trial{JobID: id, Registration: *registered, Before: before, Canaries: canaries}
	return trial, c.awaitTrial(ctx, trial, prepared, options, progress)
}

// awaitTrial waits until a trial is what Try makes of it.
func (c *Client) awaitTrial(ctx context.Context, trial *Trial, prepared *Prepared, options WaitOptions, progress plan.Progress) error {
	judge := &judge{registered: trial.Registration, options: options.withDefaults(), started: time.Now(), canaries: trial.Canaries}
	return c.await(ctx, prepared, judge, progress)
}

// beforeTrial is what to go back to: the job as it is, unless that is an
// earlier trial of the same spec.
func (c *Client) beforeTrial(ctx context.Context, prepared *Prepared, have job.Actual) (job.Actual, error) {
	if !have.Exists || have.Trial == "" || have.SpecDigest != prepared.Desired.SpecDigest {
		return have, nil
	}
	return c.versionBefore(ctx, prepared.Desired.JobID, have)
}

// versionBefore is the newest older version of a job that has another spec; the
// zero value where there is none.
func (c *Client) versionBefore(ctx context.Context, id string, have job.Actual) (job.Actual, error) {
	versions, _, _, err := c.api.Jobs().Versions(id, false, c.query(ctx))
	if err != nil {
		return job.Actual{}, describe(err, "read versions of job %s", id)
	}
	var before job.Actual
	for _, version := range versions {
		older := actualOf(snapshot{job: version})
		if older.Version < have.Version && older.SpecDigest != have.SpecDigest && (!before.Exists || older.Version > before.Version) {
			older.Health = job.Health{}
			before = older
		}
	}
	return before, nil
}

// FindTrial returns the trial of this very spec that an earlier run left, done
// or not; nil if the live job is none, or Nomad ended it as failed.
func (c *Client) FindTrial(ctx context.Context, prepared *Prepared, have job.Actual) (*Trial, error) {
	if !have.Exists || have.Stopped || have.Trial == "" || have.SpecDigest != prepared.Desired.SpecDigest || len(have.PlanDiff) > 0 {
		return nil, nil
	}
	shot, err := c.snapshot(ctx, prepared.Desired.JobID)
	if err != nil || shot.job == nil || number(shot.job.JobModifyIndex) != have.ModifyIndex {
		return nil, err
	}
	deployment := deploymentOf(shot, have.Version)
	if deployment != nil && (deployment.Status == api.DeploymentStatusFailed || deployment.Status == api.DeploymentStatusCancelled) {
		return nil, nil
	}
	before, err := c.versionBefore(ctx, prepared.Desired.JobID, have)
	if err != nil {
		return nil, err
	}
	return &Trial{
		JobID:        prepared.Desired.JobID,
		Registration: Registration{JobID: prepared.Desired.JobID, Version: have.Version, ModifyIndex: have.ModifyIndex},
		Before:       before,
		Canaries:     have.Trial == job.TrialCanary,
	}, nil
}

// AwaitTrial waits until a trial that was found again is where Try leaves one:
// its canaries are healthy, or all of a job without canaries.
func (c *Client) AwaitTrial(ctx context.Context, trial *Trial, prepared *Prepared, options WaitOptions, progress plan.Progress) error {
	return c.awaitTrial(ctx, trial, prepared, options, progress)
}

// Promote lets the trial take over, and waits until all of it is healthy.
func (c *Client) Promote(ctx context.Context, trial *Trial, prepared *Prepared, options WaitOptions, progress plan.Progress) error {
	// Whether canaries wait to be promoted is seen while waiting.
	return c.Wait(ctx, prepared, &trial.Registration, options, progress)
}

func (c *Client) promote(ctx context.Context, deployment *api.Deployment) error {
	if _, _, err := c.api.Deployments().PromoteAll(deployment.ID, c.write(ctx)); err != nil {
		return describe(err, "promote the canaries of job %s", deployment.JobID)
	}
	return nil
}

// promotable reports whether a deployment only waits for its canaries, all of
// them healthy, to be promoted.
func promotable(deployment *api.Deployment) bool {
	if deployment == nil || deployment.Status != api.DeploymentStatusRunning {
		return false
	}
	waits := false
	for _, state := range deployment.TaskGroups {
		if state.DesiredCanaries > 0 && !state.Promoted {
			waits = true
			if state.HealthyAllocs < state.DesiredCanaries {
				return false
			}
		}
	}
	return waits
}

// lookCanaries judges a trial until its canaries are healthy. One that Nomad
// calls unhealthy ends it: what is on trial gets no second chance.
func lookCanaries(shot snapshot, deployment *api.Deployment, version uint64) outcome {
	if deployment == nil {
		return outcome{waiting: "waiting for its deployment"}
	}
	ours := ofVersion(shot, version)
	if !promotable(deployment) && deployment.Status != api.DeploymentStatusSuccessful && !allPromoted(deployment) {
		for _, allocation := range ours {
			if status := allocation.DeploymentStatus; status != nil && status.Healthy != nil && !*status.Healthy {
				return outcome{failure: &failure{class: ClassTimeout, group: allocation.TaskGroup, reason: "a canary did not become healthy", byTasks: true}}
			}
		}
		return outcome{waiting: describeDeployment(deployment, shot, version)}
	}
	for _, allocation := range ours {
		for _, check := range shot.checks[allocation.ID] {
			return outcome{waiting: fmt.Sprintf("check %q of service %q fails", check.Check, check.Service)}
		}
	}
	return outcome{done: true}
}

// allPromoted reports whether a deployment has canaries that were promoted.
func allPromoted(deployment *api.Deployment) bool {
	promoted := false
	for _, state := range deployment.TaskGroups {
		if state.DesiredCanaries > 0 {
			if !state.Promoted {
				return false
			}
			promoted = true
		}
	}
	return promoted
}

// revertTries bounds how often an abandoned trial is looked at anew, because
// Nomad went back by itself at the same moment.
const revertTries = 4

// Abandon ends a trial and waits until the job is healthy as it was before.
// Where Nomad went back already there is nothing to end.
func (c *Client) Abandon(ctx context.Context, trial *Trial, options WaitOptions, progress plan.Progress) error {
	switch {
	case !trial.Before.Exists && trial.Registration.Version > 0:
		return plan.WithHint(fmt.Errorf("abandon the trial of job %s: Nomad does not know any more what ran before it", trial.JobID), deployInstead)
	case !trial.Before.Exists || trial.Before.Stopped:
		message(progress, "job %s: did not run before the trial, it is stopped", trial.JobID)
		return c.Stop(ctx, trial.JobID)
	}
	var failed error
	for tries := 0; tries < revertTries; {
		live, err := c.job(ctx, trial.JobID)
		if err != nil {
			return err
		}
		if live == nil || flag(live.Stop) {
			return fmt.Errorf("abandon the trial of job %s: it was stopped meanwhile", trial.JobID)
		}
		if number(live.Version) != trial.Registration.Version {
			return c.awaitBefore(ctx, trial, live, options, progress)
		}
		if failed = c.revert(ctx, trial, number(live.JobModifyIndex)); failed == nil {
			message(progress, "job %s: going back to version %d", trial.JobID, trial.Before.Version)
			continue
		}
		tries++
		if err := pause(ctx, pollWait); err != nil {
			return fmt.Errorf("abandon the trial of job %s: %w", trial.JobID, err)
		}
	}
	return plan.WithHint(failed, deployInstead)
}

const deployInstead = "run `site deploy`: it registers what the site declares, with the secrets' active generations"

// revert goes back by hand, and not by failing the deployment: that would lead
// to the last version that a deployment made stable, which may be an older one.
// It is registered anew, since Nomad's own revert repeats an implied constraint,
// which its plan tells from the original ever after, and gives no name to.
func (c *Client) revert(ctx context.Context, trial *Trial, modifyIndex uint64) error {
	versions, _, _, err := c.api.Jobs().Versions(trial.JobID, false, c.query(ctx))
	if err != nil {
		return describe(err, "read versions of job %s", trial.JobID)
	}
	at := slices.IndexFunc(versions, func(version *api.Job) bool { return number(version.Version) == trial.Before.Version })
	if at < 0 {
		return fmt.Errorf("take job %s back to version %d: Nomad does not know it any more", trial.JobID, trial.Before.Version)
	}
	before, stable := versions[at], false
	before.Stable, before.VersionTag = &stable, nil
	withoutImplied(before)
	_, _, err = c.api.Jobs().RegisterOpts(before, &api.RegisterOptions{EnforceIndex: true, ModifyIndex: modifyIndex}, c.write(ctx))
	return describe(err, "take job %s back to version %d", trial.JobID, trial.Before.Version)
}

// withoutImplied takes out the constraint that the server puts into each group
// whose tasks have identities, there already or not.
func withoutImplied(registered *api.Job) {
	implied := api.Constraint{LTarget: "${attr.nomad.version}", RTarget: ">= 1.7.0-a", Operand: "semver"}
	for _, group := range registered.TaskGroups {
		if !slices.ContainsFunc(group.Tasks, func(task *api.Task) bool { return len(task.Identities) > 0 }) {
			continue
		}
		for i, constraint := range slices.Backward(group.Constraints) {
			if *constraint == implied {
				group.Constraints = slices.Delete(group.Constraints, i, i+1)
				break
			}
		}
	}
}

// awaitBefore waits for a live job that should be the one before the trial.
func (c *Client) awaitBefore(ctx context.Context, trial *Trial, live *api.Job, options WaitOptions, progress plan.Progress) error {
	if live.Meta[job.MetaSpecDigest] != trial.Before.SpecDigest {
		return plan.WithHint(fmt.Errorf("abandon the trial of job %s: version %d, which is neither the trial nor what ran before it, was registered meanwhile",
			trial.JobID, number(live.Version)), "see `site status`, then run the command again")
	}
	before := &Prepared{Job: live, Desired: job.Desired{JobID: trial.JobID, Component: live.Meta[job.MetaComponent]}}
	registered := &Registration{JobID: trial.JobID, Version: number(live.Version), ModifyIndex: number(live.JobModifyIndex)}
	if err := c.Wait(ctx, before, registered, options, progress); err != nil {
		return fmt.Errorf("after the trial of job %s was abandoned: %w", trial.JobID, err)
	}
	return nil
}
