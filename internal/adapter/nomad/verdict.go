package nomad

import (
	"encoding/json"
	"fmt"
	"regexp"
	"sort"
	"strings"
	"time"

	"github.com/hashicorp/nomad/api"
)

// Class is why a rollout failed. The values are a stable interface.
type Class string

// The classes of verdicts.
const (
	ClassImagePull Class = "image_pull"
	ClassImageAuth Class = "image_auth"
	ClassPlacement Class = "placement"
	ClassPort      Class = "port"
	ClassCheck     Class = "check"
	ClassExit      Class = "exit"
	ClassOOM       Class = "oom"
	ClassSecret    Class = "secret"
	ClassMigration Class = "migration"
	ClassTimeout   Class = "timeout"
	ClassCancelled Class = "cancelled"
)

// Verdict is how a failed rollout of one job ended. Its JSON form is a stable
// interface: fields are added, never renamed.
type Verdict struct {
	Class  Class    `json:"class"`
	Job    string   `json:"job"`
	Group  string   `json:"group,omitempty"`
	Task   string   `json:"task,omitempty"`
	Alloc  string   `json:"alloc,omitempty"`
	Node   string   `json:"node,omitempty"`
	Reason string   `json:"reason"`
	Events []string `json:"events,omitempty"`
	// LogTail is the end of the task's stderr and stdout, redacted.
	LogTail []string `json:"log_tail,omitempty"`
	// Reverted says that Nomad went back to the version before by itself.
	Reverted bool   `json:"reverted"`
	Hint     string `json:"hint"`
}

// RolloutError is a rollout that did not become healthy.
type RolloutError struct {
	Verdict Verdict
	// Err is set where the caller's own deadline ended the wait.
	Err error
}

func (e *RolloutError) Error() string {
	v := e.Verdict
	where := "job " + v.Job
	if v.Task != "" {
		where += fmt.Sprintf(", task %s/%s", v.Group, v.Task)
	} else if v.Group != "" {
		where += ", group " + v.Group
	}
	after := ""
	if v.Reverted {
		after = "; nomad went back to the version before"
	}
	return fmt.Sprintf("rollout of %s failed (%s): %s%s", where, v.Class, v.Reason, after)
}

func (e *RolloutError) Unwrap() error { return e.Err }

// Hint implements plan.Hinter.
func (e *RolloutError) Hint() string { return e.Verdict.Hint }

// WasReverted reports whether the version before runs again.
func (e *RolloutError) WasReverted() bool { return e.Verdict.Reverted }

// killedExitCode is that of a process that was ended by SIGKILL.
const killedExitCode = 128 + 9

// finding is one cause seen at one task; the smaller rank is the nearer to the root.
type finding struct {
	class  Class
	reason string
	rank   int
}

var (
	// Registries and podman say it in several ways.
	authPattern = regexp.MustCompile(`(?i)unauthorized|authentication required|access (to the resource is )?denied|denied: |forbidden|no basic auth credentials|invalid username/password|status 40[13]\b`)
	pullPattern = regexp.MustCompile(`(?i)unable to pull image|failed to pull|error pulling|pulling image|initializing source|failed to create image|image pull|manifest unknown|image couldn't be|image not known|no such image|error while loading image|download image archive`)
	portPattern = regexp.MustCompile(`(?i)address already in use|port is already allocated|bind: .*in use|reserved port collision|cannot listen on .* port`)
	failedCheck = regexp.MustCompile(`(?i)checks? .*(unhealthy|healthy by deadline|passing)|services not healthy|healthcheck|out of \d+ checks`)
)

func classifyEvent(event *api.TaskEvent, migration bool) (finding, bool) {
	said := eventText(event)
	switch event.Type {
	case api.TaskArtifactDownloadFailed:
		if authPattern.MatchString(said) {
			return finding{ClassImageAuth, said, 0}, true
		}
		return finding{ClassImagePull, said, 0}, true
	case api.TaskDriverFailure, api.TaskSetupFailure, api.TaskFailedValidation:
		switch {
		case portPattern.MatchString(said):
			return finding{ClassPort, said, 0}, true
		case pullPattern.MatchString(said) && authPattern.MatchString(said):
			return finding{ClassImageAuth, said, 0}, true
		case pullPattern.MatchString(said):
			return finding{ClassImagePull, said, 0}, true
		case isSecretText(said):
			return finding{ClassSecret, said, 1}, true
		default:
			return finding{ClassExit, said, 3}, true
		}
	case "Template":
		return finding{ClassSecret, said, 2}, true
	case api.TaskKilling:
		if isSecretText(said) {
			return finding{ClassSecret, said, 1}, true
		}
	case api.TaskTerminated:
		exitCode := event.ExitCode
		if code := event.Details["exit_code"]; code != "" {
			_, _ = fmt.Sscanf(code, "%d", &exitCode)
		}
		switch {
		case event.Details["oom_killed"] == "true" || strings.Contains(strings.ToLower(said), "oom killed"):
			return finding{ClassOOM, said, 1}, true
		case exitCode == killedExitCode || event.Signal == 9 || event.Details["signal"] == "9":
			// Podman does not notice the kernel's doing under control groups of
			// version 1, and Nomad announces its own kills.
			return finding{ClassOOM, said + ": the kernel killed the task, most likely at its memory limit", 1}, true
		case exitCode == 0 && event.Signal == 0 && (event.Details["signal"] == "" || event.Details["signal"] == "0"):
			return finding{ClassExit, "the task ended: " + said, 6}, true
		case migration:
			return finding{ClassMigration, said, 2}, true
		default:
			return finding{ClassExit, said, 3}, true
		}
	case api.TaskRestartSignal:
		if failedCheck.MatchString(said) {
			return finding{ClassCheck, said, 2}, true
		}
	case "Alloc Unhealthy":
		switch {
		case failedCheck.MatchString(said):
			return finding{ClassCheck, said, 4}, true
		case strings.Contains(said, "healthy_deadline"):
			// Nomad says the same of a check that fails and of a slow start.
			return finding{ClassTimeout, said, 7}, true
		}
		return finding{ClassExit, said, 8}, true
	}
	return finding{}, false
}

func isSecretText(said string) bool {
	lower := strings.ToLower(said)
	return strings.Contains(lower, "template failed") || strings.Contains(lower, "vault")
}

func eventText(event *api.TaskEvent) string {
	for _, said := range []string{event.DisplayMessage, event.DriverError, event.Message, event.DownloadError, event.SetupError, event.ValidationError} {
		if said != "" {
			return plainText(said)
		}
	}
	return event.Type
}

var (
	// What podman's driver wraps around the words of podman.
	driverWrapping = regexp.MustCompile(`^rpc error: code = \w+ desc = `)
	pullWrapping   = regexp.MustCompile(`failed to create image: \S+: failed to start task, unable to pull image (\S+) ?: (?:image pull report indicates error: )?`)
	jsonAnswer     = regexp.MustCompile(`(?:, status code: \d+)?: (\{"cause":.*\})$`)
)

// plainText takes an event's text out of what plugins wrapped around it.
func plainText(said string) string {
	said = driverWrapping.ReplaceAllString(strings.TrimSpace(said), "")
	said = pullWrapping.ReplaceAllString(said, "unable to pull image $1: ")
	if found := jsonAnswer.FindStringSubmatchIndex(said); found != nil {
		var answer struct{ Message string }
		if json.Unmarshal([]byte(said[found[2]:]), &answer) == nil && answer.Message != "" {
			said = said[:found[0]] + ": " + answer.Message
		}
	}
	return said
}

// culprit is the task of a failed rollout that says most about its cause.
type culprit struct {
	finding
	allocation *api.AllocationListStub
	task       string
}

// findCulprit looks through the tasks of one version. Nil means that no task
// says anything.
func findCulprit(spec *api.Job, allocations []*api.AllocationListStub, checks map[string][]api.AllocCheckStatus) *culprit {
	var best *culprit
	consider := func(found finding, allocation *api.AllocationListStub, task string) {
		if best == nil || found.rank < best.rank ||
			found.rank == best.rank && allocation.CreateIndex > best.allocation.CreateIndex {
			best = &culprit{finding: found, allocation: allocation, task: task}
		}
	}
	for _, allocation := range allocations {
		names := make([]string, 0, len(allocation.TaskStates))
		for name := range allocation.TaskStates {
			names = append(names, name)
		}
		sort.Strings(names)
		for _, name := range names {
			state := allocation.TaskStates[name]
			started, killed := false, false
			// The newest event of each rank counts, and a cause that a later
			// start got over does not.
			var causes []finding
			for _, event := range state.Events {
				switch event.Type {
				case api.TaskStarted:
					started, killed = true, false
					causes = onlyEnded(causes)
					continue
				case api.TaskKilling, api.TaskRestartSignal, api.TaskSiblingFailed:
					killed = true
				case api.TaskTerminated:
					if killed {
						continue // how it ended is Nomad's doing, not the cause
					}
				}
				if found, ok := classifyEvent(event, isMigration(spec, allocation.TaskGroup, name)); ok {
					causes = append(causes, found)
				}
			}
			for i := len(causes) - 1; i >= 0; i-- {
				consider(causes[i], allocation, name)
			}
			if started || state.State == "running" {
				for _, check := range checks[allocation.ID] {
					if check.Task == "" || check.Task == name {
						reason := fmt.Sprintf("check %q of service %q fails: %s", check.Check, check.Service, strings.TrimSpace(check.Output))
						consider(finding{ClassCheck, reason, 4}, allocation, name)
					}
				}
			}
		}
	}
	return best
}

// onlyEnded keeps what a restart does not mend: a task that exits again and again.
func onlyEnded(causes []finding) []finding {
	var kept []finding
	for _, cause := range causes {
		if cause.class == ClassExit || cause.class == ClassOOM || cause.class == ClassMigration || cause.class == ClassCheck {
			kept = append(kept, cause)
		}
	}
	return kept
}

// isMigration: a prestart task that changes a schema says so in its name.
func isMigration(spec *api.Job, group, task string) bool {
	for _, candidate := range spec.TaskGroups {
		if text(candidate.Name) != group {
			continue
		}
		for _, member := range candidate.Tasks {
			if member.Name == task {
				return strings.Contains(task, "migrat") && member.Lifecycle != nil &&
					member.Lifecycle.Hook == api.TaskLifecycleHookPrestart && !member.Lifecycle.Sidecar
			}
		}
	}
	return false
}

func eventLines(allocation *api.AllocationListStub, task string) []string {
	state := allocation.TaskStates[task]
	if state == nil {
		return nil
	}
	lines := make([]string, 0, len(state.Events))
	for _, event := range state.Events {
		at := time.Unix(0, event.Time).UTC().Format("15:04:05")
		lines = append(lines, fmt.Sprintf("%s %s: %s", at, event.Type, eventText(event)))
	}
	return lines
}

// placementReasons says why groups of a job cannot be placed; empty where no
// evaluation is blocked.
func placementReasons(shot snapshot) []string {
	failed := blockedGroups(shot)
	groups := make([]string, 0, len(failed))
	for group := range failed {
		groups = append(groups, group)
	}
	sort.Strings(groups)
	var reasons []string
	for _, group := range groups {
		reasons = append(reasons, fmt.Sprintf("group %s: %s", group, strings.Join(metricReasons(failed[group]), ", ")))
	}
	return reasons
}

// blockedGroups are the groups that blocked evaluations wait to place. The
// metrics are those of the evaluation that was blocked last.
func blockedGroups(shot snapshot) map[string]*api.AllocationMetric {
	blocked := map[string]bool{}
	for _, evaluation := range shot.evaluations {
		if evaluation.Status == "blocked" {
			blocked[evaluation.ID] = true
		}
	}
	groups := map[string]*api.AllocationMetric{}
	indexes := map[string]uint64{}
	for _, evaluation := range shot.evaluations {
		if !blocked[evaluation.ID] && !blocked[evaluation.BlockedEval] {
			continue
		}
		for group, metric := range evaluation.FailedTGAllocs {
			if evaluation.ModifyIndex >= indexes[group] {
				groups[group], indexes[group] = metric, evaluation.ModifyIndex
			}
		}
	}
	return groups
}

func metricReasons(metric *api.AllocationMetric) []string {
	var reasons []string
	if metric.NodesEvaluated == 0 {
		reasons = append(reasons, "no node is eligible")
	}
	reasons = append(reasons, counted(metric.ConstraintFiltered, "excluded by constraint %q (%d nodes)")...)
	reasons = append(reasons, counted(metric.ClassFiltered, "class %q is not eligible (%d nodes)")...)
	reasons = append(reasons, counted(metric.DimensionExhausted, "no room: %q exhausted (%d nodes)")...)
	for _, quota := range metric.QuotaExhausted {
		reasons = append(reasons, fmt.Sprintf("quota exhausted: %s", quota))
	}
	if len(reasons) == 0 {
		reasons = append(reasons, "cannot be placed")
	}
	return reasons
}

func counted(counts map[string]int, format string) []string {
	var lines []string
	for what, count := range counts {
		lines = append(lines, fmt.Sprintf(format, what, count))
	}
	sort.Strings(lines)
	return lines
}

// mayStillAppear reports whether placement waits for a fact that a node finds
// out a little later, such as its driver or the secrets engine.
func mayStillAppear(metric *api.AllocationMetric) bool {
	if metric.NodesEvaluated == 0 {
		return true
	}
	// Nomad says this of every placement on a host where a job with a static
	// port is just being replaced; a port that is really taken is "reserved".
	if metric.DimensionExhausted["network: port collision"] > 0 {
		return true
	}
	for constraint := range metric.ConstraintFiltered {
		lower := strings.ToLower(constraint)
		if strings.Contains(lower, "attr.vault") || strings.Contains(lower, "attr.consul") ||
			strings.Contains(lower, "attr.driver") || strings.Contains(lower, "missing driver") ||
			strings.Contains(lower, "missing network") || strings.Contains(lower, "missing compatible host volumes") {
			return true
		}
	}
	return false
}

func hintFor(verdict Verdict) string {
	logs := fmt.Sprintf("look at the whole log with: site logs %s", verdict.Job)
	switch verdict.Class {
	case ClassImagePull:
		return "check that the artifact was uploaded and that site-host runs on the node, then deploy again"
	case ClassImageAuth:
		return "check the registry's credentials, or let site serve the image from the host"
	case ClassPlacement:
		return "change the job's constraints or resources, or add a host that satisfies them"
	case ClassPort:
		return "another process has the port: choose another one, or stop what listens there"
	case ClassCheck:
		return "the task runs but its check fails: try the check's address on the host; " + logs
	case ClassOOM:
		return "raise the task's memory, or find out what uses it; " + logs
	case ClassSecret:
		return "check that the secret exists and that the job's policy may read it, then deploy again"
	case ClassMigration:
		return "correct the migration and deploy again; " + logs
	case ClassTimeout:
		return "raise the deadline with --timeout if the job only needs longer; " + logs
	case ClassCancelled:
		return "someone else changed the job meanwhile: run the command again"
	default:
		return "correct the task and deploy again; " + logs
	}
}
