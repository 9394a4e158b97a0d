package nomad

import (
	"context"
	"fmt"
	"sort"
	"strings"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/nomad-site/site/internal/reconcile/job"
)

// snapshot is what Nomad knows about one job at about one moment.
type snapshot struct {
	job         *api.Job
	evaluations []*api.Evaluation
	// deployments are those of this job, the newest first.
	deployments []*api.Deployment
	allocations []*api.AllocationListStub
	// allocationIndex lets the next read block until an allocation changes.
	allocationIndex uint64
	// checks are the failing checks of running allocations, by allocation.
	checks map[string][]api.AllocCheckStatus
}

func (c *Client) snapshot(ctx context.Context, id string) (snapshot, error) {
	return c.snapshotAfter(ctx, id, 0, 0)
}

// snapshotAfter blocks, at most for wait, until an allocation changed after index.
func (c *Client) snapshotAfter(ctx context.Context, id string, index uint64, wait time.Duration) (snapshot, error) {
	var shot snapshot
	query := c.query(ctx)
	query.WaitIndex, query.WaitTime = index, wait
	allocations, meta, err := c.api.Jobs().Allocations(id, false, query)
	if err != nil {
		return shot, describe(err, "list allocations of job %s", id)
	}
	shot.allocations, shot.allocationIndex = allocations, meta.LastIndex
	if shot.job, err = c.job(ctx, id); err != nil || shot.job == nil {
		return shot, err
	}
	if shot.evaluations, _, err = c.api.Jobs().Evaluations(id, c.query(ctx)); err != nil {
		return shot, describe(err, "list evaluations of job %s", id)
	}
	if shot.deployments, _, err = c.api.Jobs().Deployments(id, false, c.query(ctx)); err != nil {
		return shot, describe(err, "list deployments of job %s", id)
	}
	sort.Slice(shot.deployments, func(i, j int) bool {
		return shot.deployments[i].CreateIndex > shot.deployments[j].CreateIndex
	})
	if hasNomadChecks(shot.job) {
		shot.checks, err = c.failingChecks(ctx, shot.allocations)
	}
	return shot, err
}

func hasNomadChecks(spec *api.Job) bool {
	for _, group := range spec.TaskGroups {
		services := append([]*api.Service{}, group.Services...)
		for _, task := range group.Tasks {
			services = append(services, task.Services...)
		}
		for _, service := range services {
			if service.Provider == "nomad" && len(service.Checks) > 0 {
				return true
			}
		}
	}
	return false
}

func (c *Client) failingChecks(ctx context.Context, allocations []*api.AllocationListStub) (map[string][]api.AllocCheckStatus, error) {
	failing := map[string][]api.AllocCheckStatus{}
	for _, allocation := range allocations {
		if allocation.ClientStatus != api.AllocClientStatusRunning || allocation.DesiredStatus != api.AllocDesiredStatusRun {
			continue
		}
		var checks api.AllocCheckStatuses
		// Through the server: a node's own address cannot be reached from here.
		if _, err := c.api.Raw().Query("/v1/client/allocation/"+allocation.ID+"/checks", &checks, c.query(ctx)); err != nil {
			if ctx.Err() != nil {
				return nil, describe(err, "read checks of allocation %s", short(allocation.ID))
			}
			// An allocation that ends just now, or whose node is away: its status says so.
			continue
		}
		for _, check := range checks {
			if check.Status == "failure" {
				failing[allocation.ID] = append(failing[allocation.ID], check)
			}
		}
		sort.Slice(failing[allocation.ID], func(i, j int) bool {
			return failing[allocation.ID][i].Check < failing[allocation.ID][j].Check
		})
	}
	return failing, nil
}

// Observe reads one job and lets the server compare it with what is desired.
func (c *Client) Observe(ctx context.Context, prepared *Prepared) (job.Actual, error) {
	shot, err := c.snapshot(ctx, prepared.Desired.JobID)
	if err != nil || shot.job == nil {
		return job.Actual{}, err
	}
	actual := actualOf(shot)
	actual.PlanDiff, err = c.planDiff(ctx, prepared, shot.job)
	return actual, err
}

// Standing reports whether a job is registered and meant to run, and whether the
// version that is registered was healthy ever.
func (c *Client) Standing(ctx context.Context, id string) (registered, stable bool, err error) {
	found, err := c.job(ctx, id)
	if err != nil || found == nil || flag(found.Stop) {
		return false, false, err
	}
	return true, flag(found.Stable), nil
}

// ObserveSite reads all jobs of a site, declared or not, without comparing specs.
func (c *Client) ObserveSite(ctx context.Context, site string) (map[string]job.Actual, error) {
	stubs, err := c.jobsOf(ctx, site)
	if err != nil {
		return nil, err
	}
	jobs := map[string]job.Actual{}
	for _, stub := range stubs {
		shot, err := c.snapshot(ctx, stub.ID)
		if err != nil {
			return nil, err
		}
		if shot.job != nil {
			jobs[stub.ID] = actualOf(shot)
		}
	}
	return jobs, nil
}

// jobsOf lists a site's jobs, without children of periodic and parameterized ones.
func (c *Client) jobsOf(ctx context.Context, site string) ([]*api.JobListStub, error) {
	stubs, _, err := c.api.Jobs().ListOptions(&api.JobListOptions{Fields: &api.JobListFields{Meta: true}}, c.query(ctx))
	if err != nil {
		return nil, describe(err, "list jobs")
	}
	var ours []*api.JobListStub
	for _, stub := range stubs {
		if stub.Meta[job.MetaSite] == site && stub.ParentID == "" {
			ours = append(ours, stub)
		}
	}
	return ours, nil
}

func actualOf(shot snapshot) job.Actual {
	live := shot.job
	return job.Actual{
		Exists:        true,
		Stopped:       flag(live.Stop),
		Dead:          text(live.Status) == "dead",
		Version:       number(live.Version),
		ModifyIndex:   number(live.JobModifyIndex),
		Type:          text(live.Type),
		Site:          live.Meta[job.MetaSite],
		Component:     live.Meta[job.MetaComponent],
		SpecDigest:    live.Meta[job.MetaSpecDigest],
		GitSHA:        live.Meta[job.MetaGitSHA],
		DeployID:      live.Meta[job.MetaDeployID],
		Artifacts:     artifactsOf(live.Meta),
		Secrets:       secretsOf(live.Meta),
		SecretsEngine: live.Meta[job.MetaSecretsEngine],
		Trial:         live.Meta[job.MetaTrial],
		Health:        healthOf(shot),
	}
}

// healthOf judges the live version of a job.
func healthOf(shot snapshot) job.Health {
	live := shot.job
	version := number(live.Version)
	if flag(live.Stop) {
		return job.Health{Reason: "job was stopped"}
	}
	if live.IsPeriodic() || live.IsParameterized() {
		return job.Health{Healthy: true}
	}
	if deployment := deploymentOf(shot, version); deployment != nil {
		switch deployment.Status {
		case api.DeploymentStatusFailed:
			return job.Health{Reason: "last deployment failed: " + deployment.StatusDescription}
		case api.DeploymentStatusSuccessful, api.DeploymentStatusCancelled:
		default:
			return job.Health{Waiting: true, Reason: "deployment is " + deployment.Status}
		}
	}
	if reasons := placementReasons(shot); len(reasons) > 0 {
		return job.Health{Waiting: true, Reason: "blocked evaluation: " + strings.Join(reasons, "; ")}
	}
	count := countAllocations(shot, version)
	switch text(live.Type) {
	case api.JobTypeBatch, api.JobTypeSysbatch:
		switch {
		case count.failed > 0:
			return job.Health{Reason: "last run failed"}
		case count.total == 0 && text(live.Status) == "dead":
			// Garbage collection removed what a finished run left.
			return job.Health{Healthy: true}
		case count.complete >= count.wanted && count.total > 0:
			return job.Health{Healthy: true}
		default:
			return job.Health{Waiting: true, Reason: fmt.Sprintf("%d of %d allocations complete", count.complete, count.wanted)}
		}
	}
	if count.running < count.wanted || count.total == 0 && isPerNode(live) {
		return job.Health{
			// What is pending may still come up by itself.
			Waiting: count.pending > 0 && count.running+count.pending >= count.wanted,
			Reason:  fmt.Sprintf("%d of %d allocations running", count.running, count.wanted),
		}
	}
	for _, allocation := range shot.allocations {
		for _, check := range shot.checks[allocation.ID] {
			return job.Health{Reason: fmt.Sprintf("check %q of service %q fails", check.Check, check.Service)}
		}
	}
	return job.Health{Healthy: true}
}

// deploymentOf is the newest deployment of one version of the live job.
func deploymentOf(shot snapshot, version uint64) *api.Deployment {
	for _, deployment := range shot.deployments {
		if deployment.JobVersion == version && deployment.JobCreateIndex == number(shot.job.CreateIndex) {
			return deployment
		}
	}
	return nil
}

type allocationCount struct {
	wanted, total                      int
	running, pending, complete, failed int
	// youngest is when the last task of the running allocations started.
	youngest time.Time
}

// countAllocations counts the newest allocation of each place of one version.
func countAllocations(shot snapshot, version uint64) allocationCount {
	var count allocationCount
	perNode := isPerNode(shot.job)
	for _, allocation := range current(shot, version) {
		if perNode && allocation.DesiredStatus != api.AllocDesiredStatusRun && allocation.ClientStatus != api.AllocClientStatusComplete {
			continue // its node is no longer eligible
		}
		count.total++
		switch allocation.ClientStatus {
		case api.AllocClientStatusRunning:
			if allocation.DesiredStatus != api.AllocDesiredStatusRun {
				continue
			}
			count.running++
			for _, state := range allocation.TaskStates {
				if state.State == "running" && state.StartedAt.After(count.youngest) {
					count.youngest = state.StartedAt
				}
			}
		case api.AllocClientStatusPending:
			count.pending++
		case api.AllocClientStatusComplete:
			count.complete++
		case api.AllocClientStatusFailed, api.AllocClientStatusLost:
			count.failed++
		}
	}
	if perNode {
		count.wanted = count.total
		return count
	}
	for _, group := range shot.job.TaskGroups {
		count.wanted += number(group.Count)
	}
	return count
}

func isPerNode(spec *api.Job) bool {
	return text(spec.Type) == api.JobTypeSystem || text(spec.Type) == api.JobTypeSysbatch
}

// current is the newest allocation of each place (a name, or a node for system
// jobs) of one version, ordered by name.
func current(shot snapshot, version uint64) []*api.AllocationListStub {
	newest := map[string]*api.AllocationListStub{}
	for _, allocation := range shot.allocations {
		if allocation.JobVersion != version {
			continue
		}
		place := allocation.Name
		if isPerNode(shot.job) {
			place = allocation.TaskGroup + " " + allocation.NodeID
		}
		if have := newest[place]; have == nil || have.CreateIndex < allocation.CreateIndex {
			newest[place] = allocation
		}
	}
	result := make([]*api.AllocationListStub, 0, len(newest))
	for _, allocation := range newest {
		result = append(result, allocation)
	}
	sort.Slice(result, func(i, j int) bool {
		if result[i].Name != result[j].Name {
			return result[i].Name < result[j].Name
		}
		return result[i].NodeName < result[j].NodeName
	})
	return result
}

// planDiff is the server's own diff from the live job to the desired one. The
// git sha and deploy id of the live job are put in first: they decide nothing.
// A job that is, or once was, on trial is compared with what the desired one is on trial.
func (c *Client) planDiff(ctx context.Context, prepared *Prepared, live *api.Job) ([]string, error) {
	submitted, err := trialOf(prepared.Job, live.Meta[job.MetaTrial])
	if err != nil {
		return nil, err
	}
	for _, key := range []string{job.MetaGitSHA, job.MetaDeployID} {
		delete(submitted.Meta, key)
		if value, ok := live.Meta[key]; ok {
			submitted.Meta[key] = value
		}
	}
	answer, _, err := c.api.Jobs().Plan(submitted, true, c.write(ctx))
	if err != nil {
		return nil, describe(err, "plan job %s", prepared.Desired.JobID)
	}
	if flag(live.Stop) {
		// The server compares a stopped job with nothing at all: all lines would be additions.
		return nil, nil
	}
	return diffLines(answer.Diff), nil
}

func diffLines(diff *api.JobDiff) []string {
	if diff == nil || diff.Type == "None" {
		return nil
	}
	var lines []string
	lines = append(lines, fieldLines("", diff.Fields)...)
	lines = append(lines, objectLines("", diff.Objects)...)
	for _, group := range diff.TaskGroups {
		if group.Type == "None" {
			continue
		}
		where := fmt.Sprintf("group %q ", group.Name)
		if group.Type != "Edited" {
			lines = append(lines, sign(group.Type)+" "+strings.TrimSpace(where))
			continue
		}
		lines = append(lines, fieldLines(where, group.Fields)...)
		lines = append(lines, objectLines(where, group.Objects)...)
		for _, task := range group.Tasks {
			if task.Type == "None" {
				continue
			}
			where := fmt.Sprintf("%stask %q ", where, task.Name)
			if task.Type != "Edited" {
				lines = append(lines, sign(task.Type)+" "+strings.TrimSpace(where))
				continue
			}
			lines = append(lines, fieldLines(where, task.Fields)...)
			lines = append(lines, objectLines(where, task.Objects)...)
		}
	}
	if len(lines) == 0 {
		lines = []string{"~ job"}
	}
	return lines
}

func objectLines(where string, objects []*api.ObjectDiff) []string {
	var lines []string
	for _, object := range objects {
		if object.Type == "None" {
			continue
		}
		lines = append(lines, fieldLines(where+object.Name+" ", object.Fields)...)
		lines = append(lines, objectLines(where+object.Name+" ", object.Objects)...)
	}
	return lines
}

func fieldLines(where string, fields []*api.FieldDiff) []string {
	var lines []string
	for _, field := range fields {
		// The meta of ours says in other words what changed.
		if field.Type == "None" || isOurMeta(field.Name) {
			continue
		}
		switch field.Type {
		case "Added":
			lines = append(lines, fmt.Sprintf("+ %s%s: %q", where, field.Name, field.New))
		case "Deleted":
			lines = append(lines, fmt.Sprintf("- %s%s: %q", where, field.Name, field.Old))
		default:
			lines = append(lines, fmt.Sprintf("~ %s%s: %q => %q", where, field.Name, field.Old, field.New))
		}
	}
	return lines
}

func isOurMeta(field string) bool {
	switch strings.TrimSuffix(strings.TrimPrefix(field, "Meta["), "]") {
	case job.MetaArtifacts, job.MetaSpecDigest, job.MetaGitSHA, job.MetaDeployID, job.MetaSecrets, job.MetaSecretsEngine, job.MetaTrial:
		return true
	}
	return false
}

func sign(diffType string) string {
	switch diffType {
	case "Added":
		return "+"
	case "Deleted":
		return "-"
	default:
		return "~"
	}
}

// short is how allocations and evaluations are called in messages, as in
// Nomad's own command line.
func short(id string) string {
	if len(id) > 8 {
		return id[:8]
	}
	return id
}
