package nomad

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/nomad-site/site/internal/plan"
)

// WaitOptions bound a wait; zero values take the defaults named here.
type WaitOptions struct {
	// Limit is how long the job may take. Default 15 min; the context may end it earlier.
	Limit time.Duration
	// PlacementGrace is how long a group may have no place. Default 10 s.
	PlacementGrace time.Duration
	// FactGrace is the same where a node may still find out what is missing,
	// such as a driver or the secrets engine. Default 90 s.
	FactGrace time.Duration
	// Settle is how long tasks must run where neither a deployment nor the
	// job's own min_healthy_time says so. Default 10 s.
	Settle time.Duration
	// Redact is applied to every line that comes from tasks.
	Redact func(string) string
}

func (o WaitOptions) withDefaults() WaitOptions {
	set := func(value *time.Duration, standard time.Duration) {
		if *value == 0 {
			*value = standard
		}
	}
	set(&o.Limit, 15*time.Minute)
	set(&o.PlacementGrace, 10*time.Second)
	set(&o.FactGrace, 90*time.Second)
	set(&o.Settle, 10*time.Second)
	if o.Redact == nil {
		o.Redact = func(line string) string { return line }
	}
	return o
}

const (
	// pollWait bounds each blocking query: deployments and evaluations change
	// without an allocation changing.
	pollWait = time.Second
	// revertWait bounds how long a version that Nomad went back to is followed.
	revertWait = 2 * time.Minute
)

// Wait follows a registration until the job is healthy: evaluation →
// deployment → allocations → checks → running image digests. Anything else
// ends in a *RolloutError, or the context's error if the caller cancelled.
func (c *Client) Wait(ctx context.Context, prepared *Prepared, registered *Registration, options WaitOptions, progress plan.Progress) error {
	return c.await(ctx, prepared, &judge{registered: *registered, options: options.withDefaults(), started: time.Now()}, progress)
}

// await follows the registration that a judge decides about.
func (c *Client) await(ctx context.Context, prepared *Prepared, judge *judge, progress plan.Progress) error {
	registered, options := judge.registered, judge.options
	limited, cancel := context.WithTimeout(ctx, options.Limit)
	defer cancel()
	var last snapshot
	var index uint64
	var transient error
	said := ""
	for {
		shot, err := c.snapshotAfter(limited, registered.JobID, index, pollWait)
		switch {
		case ctx.Err() != nil && !errors.Is(context.Cause(ctx), context.DeadlineExceeded):
			return fmt.Errorf("wait for job %s: %w", registered.JobID, context.Cause(ctx))
		case limited.Err() != nil:
			failed := judge.timedOut(last, transient)
			return c.fail(ctx, last, failed, judge, context.Cause(limited))
		case err != nil && statusOf(err) != 0 && statusOf(err) < 500:
			return err
		case err != nil:
			// A tunnel or a leader that is away for a moment is no verdict.
			transient = err
			message(progress, "job %s: nomad does not answer, still trying: %v", registered.JobID, err)
			if err := pause(limited, pollWait); err != nil {
				continue
			}
			continue
		}
		last, index, transient = shot, shot.allocationIndex, nil
		outcome := judge.look(shot, time.Now())
		if outcome.formality != nil {
			c.deploymentAfter(limited, outcome.formality, pollWait)
			index = 0
		}
		if outcome.promotable != nil {
			if err := c.promote(limited, outcome.promotable); err != nil {
				transient = err // the canaries may just have changed: the next look tells
				_ = pause(limited, pollWait)
			}
			index = 0
		}
		switch {
		case outcome.failure != nil:
			return c.fail(ctx, shot, *outcome.failure, judge, nil)
		case outcome.done:
			if err := c.verifyImages(limited, prepared, shot, registered.Version); err != nil {
				return err
			}
			message(progress, "job %s: healthy (version %d)", registered.JobID, registered.Version)
			return nil
		case outcome.waiting != said:
			said = outcome.waiting
			message(progress, "job %s: %s", registered.JobID, options.Redact(said))
		}
	}
}

// deploymentAfter blocks, at most for wait, until a deployment changes. Whatever
// goes wrong with this, the next snapshot tells.
func (c *Client) deploymentAfter(ctx context.Context, deployment *api.Deployment, wait time.Duration) {
	query := c.query(ctx)
	query.WaitIndex, query.WaitTime = deployment.ModifyIndex, wait
	if _, _, err := c.api.Deployments().Info(deployment.ID, query); err != nil {
		_ = pause(ctx, wait)
	}
}

func pause(ctx context.Context, wait time.Duration) error {
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}

// failure is a verdict before its events and logs are fetched.
type failure struct {
	class  Class
	group  string
	reason string
	// reverting says that Nomad goes back to an older version.
	reverting bool
	// byTasks says that a task's own events may tell a nearer cause.
	byTasks bool
}

type outcome struct {
	done    bool
	waiting string
	// formality is the deployment where all is healthy, and Nomad only has to
	// call it successful: that changes no allocation.
	formality *api.Deployment
	// promotable is a deployment that waits for its canaries to be promoted, and
	// that nobody but us can be meant to promote.
	promotable *api.Deployment
	failure    *failure
}

// judge decides about one registration, snapshot by snapshot.
type judge struct {
	registered Registration
	options    WaitOptions
	started    time.Time
	// canaries says that the wait ends where the canaries are healthy.
	canaries bool
	// unplacedSince is when each group was first seen without a place; the
	// empty name stands for a system job that no node takes.
	unplacedSince map[string]time.Time
	// checks are the last failing checks of each allocation: once it was
	// stopped, nobody can ask for them any more.
	checks map[string][]api.AllocCheckStatus
}

func (j *judge) remember(shot snapshot) {
	if j.checks == nil {
		j.checks = map[string][]api.AllocCheckStatus{}
	}
	for _, allocation := range shot.allocations {
		if allocation.ClientStatus == api.AllocClientStatusRunning && allocation.DesiredStatus == api.AllocDesiredStatusRun {
			j.checks[allocation.ID] = shot.checks[allocation.ID]
		}
	}
}

func (j *judge) look(shot snapshot, now time.Time) outcome {
	version := j.registered.Version
	if shot.job == nil {
		return outcome{failure: &failure{class: ClassCancelled, reason: "the job was purged meanwhile"}}
	}
	if shot.job.IsPeriodic() || shot.job.IsParameterized() {
		return outcome{done: true}
	}
	j.remember(shot)
	deployment := deploymentOf(shot, version)
	if deployment != nil && deployment.Status == api.DeploymentStatusFailed {
		return outcome{failure: &failure{
			class: ClassTimeout, reason: deployment.StatusDescription, byTasks: true,
			reverting: strings.Contains(deployment.StatusDescription, "rolling back to job version") || number(shot.job.Version) > version,
		}}
	}
	if number(shot.job.Version) != version {
		return outcome{failure: &failure{class: ClassCancelled, reason: fmt.Sprintf("version %d of the job was registered meanwhile", number(shot.job.Version))}}
	}
	if flag(shot.job.Stop) {
		return outcome{failure: &failure{class: ClassCancelled, reason: "the job was stopped meanwhile"}}
	}
	if failed := j.unplaced(shot, now); failed != nil {
		return outcome{failure: failed}
	}
	evaluation := evaluationOf(shot, j.registered.EvalID)
	if evaluation != nil {
		switch evaluation.Status {
		case "pending":
			return outcome{waiting: "waiting for its evaluation"}
		case "failed":
			if evaluation.NextEval == "" {
				return outcome{failure: &failure{class: ClassPlacement, reason: "the evaluation failed: " + evaluation.StatusDescription}}
			}
		}
	}
	if j.canaries {
		return lookCanaries(shot, deployment, version)
	}
	switch text(shot.job.Type) {
	case api.JobTypeBatch, api.JobTypeSysbatch:
		return j.lookBatch(shot)
	}
	if deployment != nil && deployment.Status != api.DeploymentStatusSuccessful {
		waiting := outcome{waiting: describeDeployment(deployment, shot, version)}
		switch {
		case allHealthy(deployment):
			waiting.formality = deployment
		case onTrial(shot.job) && promotable(deployment):
			waiting.promotable = deployment
		}
		return waiting
	}
	return j.lookRunning(shot, deployment != nil, now)
}

// unplaced turns a blocked evaluation into a verdict once its grace is over. A
// group of which something runs already is waited for until the deadline.
func (j *judge) unplaced(shot snapshot, now time.Time) *failure {
	blocked := blockedGroups(shot)
	since := map[string]time.Time{}
	for group, metric := range blocked {
		first, known := j.unplacedSince[group]
		if !known {
			first = now
		}
		since[group] = first
		grace := j.options.PlacementGrace
		if mayStillAppear(metric) {
			grace = j.options.FactGrace
		}
		if now.Sub(first) >= grace && !groupRuns(shot, group, j.registered.Version) {
			j.unplacedSince = since
			return &failure{class: classOfMetric(metric), group: group, reason: strings.Join(metricReasons(metric), ", ")}
		}
	}
	if isPerNode(shot.job) && len(blocked) == 0 && countAllocations(shot, j.registered.Version).total == 0 && !openEvaluations(shot) {
		// The scheduler just leaves out the nodes that a system job cannot run
		// on, and blocks nothing.
		first, known := j.unplacedSince[""]
		if !known {
			first = now
		}
		since[""] = first
		if now.Sub(first) >= j.options.PlacementGrace {
			j.unplacedSince = since
			return &failure{class: ClassPlacement, reason: "no eligible node satisfies the job's constraints and datacenters"}
		}
	}
	j.unplacedSince = since
	return nil
}

func classOfMetric(metric *api.AllocationMetric) Class {
	for dimension := range metric.DimensionExhausted {
		if strings.Contains(dimension, "reserved port collision") {
			return ClassPort
		}
	}
	return ClassPlacement
}

func groupRuns(shot snapshot, group string, version uint64) bool {
	for _, allocation := range current(shot, version) {
		if allocation.TaskGroup == group && (allocation.ClientStatus == api.AllocClientStatusRunning || allocation.ClientStatus == api.AllocClientStatusPending) {
			return true
		}
	}
	return false
}

func evaluationOf(shot snapshot, id string) *api.Evaluation {
	for _, evaluation := range shot.evaluations {
		if evaluation.ID == id {
			return evaluation
		}
	}
	return nil
}

func (j *judge) lookBatch(shot snapshot) outcome {
	count := countAllocations(shot, j.registered.Version)
	if count.failed > 0 && !willRetry(shot, j.registered.Version) {
		return outcome{failure: &failure{class: ClassExit, reason: fmt.Sprintf("%d of %d allocations failed", count.failed, count.wanted), byTasks: true}}
	}
	if count.total > 0 && count.complete >= count.wanted {
		return outcome{done: true}
	}
	return outcome{waiting: j.describeWait(shot, fmt.Sprintf("%d of %d allocations complete", count.complete, count.wanted))}
}

// willRetry reports whether Nomad starts failed allocations again by itself.
func willRetry(shot snapshot, version uint64) bool {
	for _, allocation := range current(shot, version) {
		if allocation.ClientStatus == api.AllocClientStatusFailed && allocation.FollowupEvalID == "" && allocation.NextAllocation == "" {
			// The scheduler may not have looked at it yet.
			if !openEvaluations(shot) {
				return false
			}
		}
	}
	return true
}

func openEvaluations(shot snapshot) bool {
	for _, evaluation := range shot.evaluations {
		if evaluation.Status == "pending" {
			return true
		}
	}
	return false
}

// lookRunning judges jobs whose deployment succeeded, or that have none:
// system jobs, services without updates, and changes that move no allocation.
func (j *judge) lookRunning(shot snapshot, deployed bool, now time.Time) outcome {
	count := countAllocations(shot, j.registered.Version)
	if !deployed && count.failed > 0 {
		return outcome{failure: &failure{class: ClassExit, reason: fmt.Sprintf("%d of %d allocations failed", count.failed, count.wanted), byTasks: true}}
	}
	if count.total == 0 && count.wanted > 0 || count.running < count.wanted || count.total == 0 && isPerNode(shot.job) {
		return outcome{waiting: j.describeWait(shot, fmt.Sprintf("%d of %d allocations running", count.running, count.wanted))}
	}
	if deployed {
		return outcome{done: true}
	}
	for _, checks := range shot.checks {
		for _, check := range checks {
			return outcome{waiting: fmt.Sprintf("check %q of service %q fails", check.Check, check.Service)}
		}
	}
	if settle := j.settle(shot.job); now.Sub(count.youngest) < settle {
		return outcome{waiting: fmt.Sprintf("%d of %d allocations running, for %s at least", count.running, count.wanted, settle)}
	}
	return outcome{done: true}
}

func (j *judge) settle(spec *api.Job) time.Duration {
	longest := time.Duration(0)
	for _, group := range spec.TaskGroups {
		if group.Update != nil && group.Update.MinHealthyTime != nil {
			longest = max(longest, *group.Update.MinHealthyTime)
		}
	}
	if longest == 0 {
		return j.options.Settle
	}
	return longest
}

func (j *judge) describeWait(shot snapshot, state string) string {
	if reasons := placementReasons(shot); len(reasons) > 0 {
		return state + "; waiting for a place: " + strings.Join(reasons, "; ")
	}
	return state + latestEvent(shot, j.registered.Version)
}

// allHealthy reports whether each group of a running deployment is complete.
func allHealthy(deployment *api.Deployment) bool {
	for _, state := range deployment.TaskGroups {
		if state.HealthyAllocs < state.DesiredTotal {
			return false
		}
	}
	return deployment.Status == api.DeploymentStatusRunning && !strings.Contains(deployment.StatusDescription, "manual promotion")
}

func describeDeployment(deployment *api.Deployment, shot snapshot, version uint64) string {
	healthy, wanted := 0, 0
	for _, state := range deployment.TaskGroups {
		healthy += state.HealthyAllocs
		wanted += state.DesiredTotal
	}
	state := fmt.Sprintf("deployment is %s, %d of %d allocations healthy", deployment.Status, healthy, wanted)
	if strings.Contains(deployment.StatusDescription, "requires manual promotion") {
		state += "; it waits for someone to promote its canaries"
	}
	if reasons := placementReasons(shot); len(reasons) > 0 {
		return state + "; waiting for a place: " + strings.Join(reasons, "; ")
	}
	return state + latestEvent(shot, version)
}

// latestEvent is the newest thing that happened to a task of the version.
func latestEvent(shot snapshot, version uint64) string {
	var newest *api.TaskEvent
	where := ""
	for _, allocation := range current(shot, version) {
		for name, state := range allocation.TaskStates {
			if len(state.Events) == 0 {
				continue
			}
			event := state.Events[len(state.Events)-1]
			if newest == nil || event.Time > newest.Time {
				newest, where = event, name
			}
		}
	}
	if newest == nil {
		return ""
	}
	return fmt.Sprintf("; task %s: %s", where, eventText(newest))
}

func (j *judge) timedOut(shot snapshot, transient error) failure {
	failed := failure{class: ClassTimeout, reason: fmt.Sprintf("not healthy after %s", time.Since(j.started).Round(time.Second))}
	switch {
	case transient != nil:
		failed.reason += ": " + transient.Error()
	case shot.job == nil:
		failed.reason += ": nomad did not answer"
	default:
		if blocked := blockedGroups(shot); len(blocked) > 0 {
			failed.class = ClassPlacement
			failed.reason += ": " + strings.Join(placementReasons(shot), "; ")
			return failed
		}
		failed.byTasks = true
		if state := j.look(shot, time.Now()).waiting; state != "" {
			failed.reason += ": " + state
		}
	}
	return failed
}

// fail completes a failure to a verdict. It may outlive the caller's deadline
// by some seconds: a verdict without events and logs helps nobody.
func (c *Client) fail(ctx context.Context, shot snapshot, failed failure, judged *judge, cause error) error {
	registered, options := judged.registered, judged.options
	detached := context.WithoutCancel(ctx)
	verdict := Verdict{Class: failed.class, Job: registered.JobID, Group: failed.group, Reason: failed.reason}
	if failed.byTasks && shot.job != nil {
		evidence, cancel := context.WithTimeout(detached, 10*time.Second)
		defer cancel()
		// Not only the newest of each place: a replacement that has not failed
		// yet must not hide why it was needed.
		ours := ofVersion(shot, registered.Version)
		if guilty := findCulprit(c.specOf(evidence, shot, registered), ours, judged.checks); guilty != nil {
			c.accuse(evidence, &verdict, guilty)
		} else if allocation, task := newestTask(ours); allocation != nil {
			c.quote(evidence, &verdict, allocation, task)
		}
	}
	if failed.reverting {
		verdict.Reverted = c.followRevert(ctx, registered, options)
	}
	verdict.Reason = options.Redact(verdict.Reason)
	for i, line := range verdict.Events {
		verdict.Events[i] = options.Redact(line)
	}
	for i, line := range verdict.LogTail {
		verdict.LogTail[i] = options.Redact(line)
	}
	verdict.Hint = hintFor(verdict)
	return &RolloutError{Verdict: verdict, Err: cause}
}

// specOf is the job as it was rolled out; the live one may be another already.
func (c *Client) specOf(ctx context.Context, shot snapshot, registered Registration) *api.Job {
	if number(shot.job.Version) == registered.Version {
		return shot.job
	}
	versions, _, _, err := c.api.Jobs().Versions(registered.JobID, false, c.query(ctx))
	if err == nil {
		for _, version := range versions {
			if number(version.Version) == registered.Version {
				return version
			}
		}
	}
	return shot.job
}

func ofVersion(shot snapshot, version uint64) []*api.AllocationListStub {
	var result []*api.AllocationListStub
	for _, allocation := range shot.allocations {
		if allocation.JobVersion == version {
			result = append(result, allocation)
		}
	}
	return result
}

func (c *Client) accuse(ctx context.Context, verdict *Verdict, guilty *culprit) {
	verdict.Class = guilty.class
	verdict.Reason = guilty.reason + " (" + verdict.Reason + ")"
	c.quote(ctx, verdict, guilty.allocation, guilty.task)
}

// newestTask is what to look at where no task is to blame, such as a slow start.
func newestTask(allocations []*api.AllocationListStub) (*api.AllocationListStub, string) {
	var newest *api.AllocationListStub
	for _, allocation := range allocations {
		if len(allocation.TaskStates) > 0 && (newest == nil || newest.CreateIndex < allocation.CreateIndex) {
			newest = allocation
		}
	}
	if newest == nil {
		return nil, ""
	}
	return newest, slices.Min(slices.Collect(maps.Keys(newest.TaskStates)))
}

// quote adds what a task went through and what it said.
func (c *Client) quote(ctx context.Context, verdict *Verdict, allocation *api.AllocationListStub, task string) {
	verdict.Group = allocation.TaskGroup
	verdict.Task = task
	verdict.Alloc = allocation.ID
	verdict.Node = allocation.NodeName
	verdict.Events = eventLines(allocation, task)
	for _, stream := range []Stream{Stderr, Stdout} {
		lines, err := c.logTail(ctx, allocation.ID, task, stream, tailLines)
		if err != nil {
			continue // a task that never started has no logs
		}
		for _, line := range lines {
			verdict.LogTail = append(verdict.LogTail, string(line.stream)+": "+line.text)
			if verdict.Class == ClassExit && portPattern.MatchString(line.text) {
				// Only the task itself knows why it ended.
				verdict.Class, verdict.Reason = ClassPort, line.text+" ("+verdict.Reason+")"
			}
		}
	}
}

// followRevert waits until the version that Nomad went back to is healthy.
func (c *Client) followRevert(ctx context.Context, registered Registration, options WaitOptions) bool {
	limited, cancel := context.WithTimeout(context.WithoutCancel(ctx), min(revertWait, options.Limit))
	defer cancel()
	stop := context.AfterFunc(ctx, func() {
		// Interrupted: what is known by then is the answer. A deadline that
		// passes meanwhile still leaves the bounded wait.
		if !errors.Is(context.Cause(ctx), context.DeadlineExceeded) {
			cancel()
		}
	})
	defer stop()
	var index uint64
	for limited.Err() == nil {
		shot, err := c.snapshotAfter(limited, registered.JobID, index, pollWait)
		if err != nil {
			if pause(limited, pollWait) != nil {
				return false
			}
			continue
		}
		index = shot.allocationIndex
		if shot.job == nil || flag(shot.job.Stop) {
			return false
		}
		if number(shot.job.Version) == registered.Version {
			continue // the rollback is not registered yet
		}
		deployment := deploymentOf(shot, number(shot.job.Version))
		if onTrial(shot.job) && promotable(deployment) && c.promote(limited, deployment) != nil {
			_ = pause(limited, pollWait)
		}
		if health := healthOf(shot); health.Healthy {
			return true
		}
		if deployment != nil && deployment.Status == api.DeploymentStatusFailed {
			return false
		}
	}
	return false
}

// ImageError is an allocation that runs another image than the one desired.
type ImageError struct {
	Job, Alloc, Task string
	Want, Have       string
}

func (e *ImageError) Error() string {
	return fmt.Sprintf("job %s: allocation %s runs task %s with image %q, want %q", e.Job, short(e.Alloc), e.Task, e.Have, e.Want)
}

// verifyImages compares the image of each running task with the desired one.
func (c *Client) verifyImages(ctx context.Context, prepared *Prepared, shot snapshot, version uint64) error {
	want := imagesOf(prepared.Job)
	if len(want) == 0 {
		return nil
	}
	for _, stub := range current(shot, version) {
		if stub.ClientStatus != api.AllocClientStatusRunning {
			continue
		}
		allocation, _, err := c.api.Allocations().Info(stub.ID, c.query(ctx))
		if err != nil {
			return describe(err, "read allocation %s of job %s", short(stub.ID), prepared.Desired.JobID)
		}
		have := imagesOf(allocation.Job)
		for task, image := range want {
			if !strings.HasPrefix(task, stub.TaskGroup+"/") {
				continue
			}
			if have[task] != image {
				return &ImageError{Job: prepared.Desired.JobID, Alloc: stub.ID, Task: task, Want: image, Have: have[task]}
			}
		}
	}
	return nil
}

// imagesOf are the images of a job's tasks by group/task.
func imagesOf(spec *api.Job) map[string]string {
	images := map[string]string{}
	if spec == nil {
		return images
	}
	for _, group := range spec.TaskGroups {
		for _, task := range group.Tasks {
			if image, ok := task.Config["image"].(string); ok {
				images[text(group.Name)+"/"+task.Name] = image
			}
		}
	}
	return images
}

var _ plan.Hinter = (*RolloutError)(nil)
