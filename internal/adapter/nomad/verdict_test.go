package nomad

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/nomad/api"
)

func ref[T any](value T) *T { return &value }

func event(kind, said string) *api.TaskEvent {
	return &api.TaskEvent{Type: kind, DisplayMessage: said, Details: map[string]string{}}
}

func exited(code, said string) *api.TaskEvent {
	return &api.TaskEvent{Type: api.TaskTerminated, DisplayMessage: said, Details: map[string]string{"exit_code": code}}
}

func TestCausesAreClassified(t *testing.T) {
	const image = "127.0.0.1:7380/lab/hello@sha256:0123"
	const pull = "rpc error: code = Unknown desc = failed to create image: " + image + ": failed to start task, unable to pull image " + image +
		" : image pull report indicates error: initializing source docker://" + image + ": "
	started := event(api.TaskStarted, "Task started by client")
	unhealthy := event("Alloc Unhealthy", "Unhealthy because of failed task")
	killed := &api.TaskEvent{Type: api.TaskTerminated, DisplayMessage: "Exit Code: 137", ExitCode: 137, Details: map[string]string{"exit_code": "137", "signal": "0", "oom_killed": "false"}}
	tests := map[string]struct {
		task   string
		events []*api.TaskEvent
		check  string
		class  Class
		reason string
	}{
		// What podman 4.3.1 and its driver 0.6.5 say.
		"an image that the registry lacks": {events: []*api.TaskEvent{
			event("Driver", "Pulling image "+image),
			event(api.TaskDriverFailure, pull+"reading manifest sha256:0123 in 127.0.0.1:7380/lab/hello: manifest unknown: lab/hello@sha256:0123: not found"),
			event(api.TaskNotRestarting, "Policy allows no restarts"), unhealthy,
		}, class: ClassImagePull, reason: "unable to pull image " + image + ": initializing source docker://" + image + ": reading manifest sha256:0123 in 127.0.0.1:7380/lab/hello: manifest unknown"},
		"a registry that nobody listens at": {events: []*api.TaskEvent{
			event(api.TaskDriverFailure, pull+`pinging container registry 127.0.0.1:7380: Get "http://127.0.0.1:7380/v2/": dial tcp 127.0.0.1:7380: connect: connection refused`), unhealthy,
		}, class: ClassImagePull, reason: "connection refused"},
		"an image that needs a login": {events: []*api.TaskEvent{
			event(api.TaskDriverFailure, pull+"reading manifest sha256:0123 in 127.0.0.1:7380/lab/hello: unauthorized"), unhealthy,
		}, class: ClassImageAuth, reason: "unauthorized"},
		"a registry that refuses": {events: []*api.TaskEvent{
			event(api.TaskDriverFailure, pull+"pinging container registry 127.0.0.1:7380: invalid status code from registry 403 (Forbidden)"), unhealthy,
		}, class: ClassImageAuth, reason: "403 (Forbidden)"},
		"a command that the image lacks": {events: []*api.TaskEvent{
			event(api.TaskDriverFailure, "rpc error: code = Unknown desc = failed to start task, could not start container: cannot start container, status code: 500: {\"cause\":\"OCI runtime attempted to invoke a command that was not found\",\"message\":\"crun: executable file `/nothere` not found in $PATH: No such file or directory: OCI runtime attempted to invoke a command that was not found\",\"response\":500}\n"), unhealthy,
		}, class: ClassExit, reason: "failed to start task, could not start container: cannot start container: crun: executable file `/nothere` not found in $PATH"},
		"a bind mount of nothing": {events: []*api.TaskEvent{
			event(api.TaskDriverFailure, `rpc error: code = Unknown desc = failed to start task, could not create container: cannot create container, status code: 500: {"cause":"no such file or directory","message":"statfs /srv/nothere: no such file or directory","response":500}`+"\n"), unhealthy,
		}, class: ClassExit, reason: "cannot create container: statfs /srv/nothere: no such file or directory"},
		"a task that the kernel killed at its memory limit": {events: []*api.TaskEvent{
			started, killed, event(api.TaskRestarting, "Task restarting in 1.102520286s"), started, killed,
			event(api.TaskNotRestarting, `Exceeded allowed attempts 1 in interval 1m0s and mode is "fail"`),
			event("Alloc Unhealthy", "Task not running for min_healthy_time of 1s by healthy_deadline of 10s"),
		}, class: ClassOOM, reason: "memory limit"},
		"a task that nomad had to kill did not run out of memory": {events: []*api.TaskEvent{
			started, event(api.TaskKilling, "Sent interrupt. Waiting 2s before force killing"), killed,
		}, check: "broken on purpose", class: ClassCheck, reason: "broken on purpose"},
		"an artifact that cannot be fetched": {events: []*api.TaskEvent{
			event(api.TaskArtifactDownloadFailed, `failed to download artifact "http://127.0.0.1:7380/artifacts/lab/page@sha256:01": bad response code: 404`),
		}, class: ClassImagePull, reason: "404"},
		"a port that a process has": {events: []*api.TaskEvent{
			event(api.TaskDriverFailure, "rpc error: code = Unknown desc = failed to start task, could not start container: cannot listen on the TCP port: listen tcp4 10.0.0.1:80: bind: address already in use"),
		}, class: ClassPort, reason: "already in use"},
		"a task that exits": {events: []*api.TaskEvent{started, exited("3", "Exit Code: 3"), event("Alloc Unhealthy", "Unhealthy because of failed task")},
			class: ClassExit, reason: "Exit Code: 3"},
		"a task that ends although it should stay": {events: []*api.TaskEvent{started, exited("0", "Exit Code: 0"), event("Alloc Unhealthy", "Unhealthy because of dead task")},
			class: ClassExit, reason: "the task ended: Exit Code: 0"},
		"a task that ran out of memory": {events: []*api.TaskEvent{started, {Type: api.TaskTerminated, DisplayMessage: `Exit Code: 137, Exit Message: "OOM killed"`, Details: map[string]string{"exit_code": "137", "oom_killed": "true"}}},
			class: ClassOOM, reason: "137"},
		"a secret that is not there": {events: []*api.TaskEvent{event("Template", "Missing: vault.read(secret/data/hello)")},
			class: ClassSecret, reason: "vault.read"},
		"a secret that may not be read": {events: []*api.TaskEvent{event(api.TaskKilling, "Template failed: vault.read(secret/data/hello): permission denied"), exited("0", "Exit Code: 0")},
			class: ClassSecret, reason: "permission denied"},
		"a missing secret that came later is not the cause": {events: []*api.TaskEvent{event("Template", "Missing: vault.read(x)"), started, exited("1", "Exit Code: 1")},
			class: ClassExit, reason: "Exit Code: 1"},
		"a migration that fails": {task: "migrate", events: []*api.TaskEvent{started, exited("1", "Exit Code: 1")},
			class: ClassMigration, reason: "Exit Code: 1"},
		"a check that fails while the task runs": {events: []*api.TaskEvent{started}, check: "broken on purpose",
			class: ClassCheck, reason: "broken on purpose"},
		"a task that nomad killed for its check did not exit by itself": {
			events: []*api.TaskEvent{started, event(api.TaskRestartSignal, `healthcheck: check "answers" unhealthy`), exited("143", "Exit Code: 143"), event("Alloc Unhealthy", "Unhealthy because of failed task")},
			class:  ClassCheck, reason: "unhealthy"},
		"a task that was stopped when nomad took the version back": {
			events: []*api.TaskEvent{started, event(api.TaskKilling, "Sent interrupt. Waiting 5s before force killing"), exited("130", "Exit Code: 130")}, check: "broken on purpose",
			class: ClassCheck, reason: "broken on purpose"},
		"a start that is too slow": {events: []*api.TaskEvent{started, event("Alloc Unhealthy", "Task not running for min_healthy_time of 10s by healthy_deadline of 5m0s")},
			class: ClassTimeout, reason: "healthy_deadline"},
	}
	spec := &api.Job{TaskGroups: []*api.TaskGroup{{Name: ref("web"), Tasks: []*api.Task{
		{Name: "hello"}, {Name: "migrate", Lifecycle: &api.TaskLifecycle{Hook: api.TaskLifecycleHookPrestart}},
	}}}}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			task := test.task
			if task == "" {
				task = "hello"
			}
			allocation := &api.AllocationListStub{ID: "a", TaskGroup: "web", TaskStates: map[string]*api.TaskState{task: {Events: test.events}}}
			checks := map[string][]api.AllocCheckStatus{}
			if test.check != "" {
				checks["a"] = []api.AllocCheckStatus{{Check: "answers", Service: "hello", Output: test.check}}
			}
			guilty := findCulprit(spec, []*api.AllocationListStub{allocation}, checks)
			if guilty == nil {
				t.Fatal("no cause found")
			}
			if guilty.class != test.class || !strings.Contains(guilty.reason, test.reason) {
				t.Errorf("got %s: %s, want %s: …%s…", guilty.class, guilty.reason, test.class, test.reason)
			}
		})
	}
}

func TestAVerdictHasAStableJSONForm(t *testing.T) {
	encoded, err := json.Marshal(Verdict{
		Class: ClassExit, Job: "hello", Group: "web", Task: "hello", Alloc: "a", Node: "lab-1",
		Reason: "r", Events: []string{"e"}, LogTail: []string{"l"}, Reverted: true, Hint: "h",
	})
	if err != nil {
		t.Fatal(err)
	}
	want := `{"class":"exit","job":"hello","group":"web","task":"hello","alloc":"a","node":"lab-1","reason":"r","events":["e"],"log_tail":["l"],"reverted":true,"hint":"h"}`
	if string(encoded) != want {
		t.Errorf("got %s\nwant %s", encoded, want)
	}
}

func serviceShot(change func(*snapshot)) snapshot {
	shot := snapshot{job: &api.Job{
		ID: ref("hello"), Type: ref("service"), Version: ref(uint64(2)), CreateIndex: ref(uint64(1)), Status: ref("running"),
		TaskGroups: []*api.TaskGroup{{Name: ref("web"), Count: ref(1)}},
	}}
	if change != nil {
		change(&shot)
	}
	return shot
}

func runningFor(age time.Duration, version uint64) *api.AllocationListStub {
	return &api.AllocationListStub{
		ID: "a", Name: "hello.web[0]", TaskGroup: "web", JobVersion: version, ClientStatus: "running", DesiredStatus: "run",
		TaskStates: map[string]*api.TaskState{"hello": {State: "running", StartedAt: time.Now().Add(-age)}},
	}
}

func deploymentAt(version uint64, status, description string) *api.Deployment {
	return &api.Deployment{JobVersion: version, JobCreateIndex: 1, Status: status, StatusDescription: description}
}

func blockedOn(metric *api.AllocationMetric) []*api.Evaluation {
	return []*api.Evaluation{
		{ID: "e", Status: "complete", BlockedEval: "b", FailedTGAllocs: map[string]*api.AllocationMetric{"web": metric}},
		{ID: "b", Status: "blocked"},
	}
}

func TestAWaitIsJudged(t *testing.T) {
	const version = 2
	noMemory := &api.AllocationMetric{NodesEvaluated: 1, DimensionExhausted: map[string]int{"memory": 1}}
	noVault := &api.AllocationMetric{NodesEvaluated: 1, ConstraintFiltered: map[string]int{"${attr.vault.version} semver >= 0.6.1": 1}}
	portTaken := &api.AllocationMetric{NodesEvaluated: 1, DimensionExhausted: map[string]int{"network: reserved port collision http=80": 1}}
	tests := map[string]struct {
		shot func(*snapshot)
		// after is how long the same was seen already.
		after   time.Duration
		done    bool
		class   Class
		reverts bool
		waiting string
	}{
		"without allocations it waits": {waiting: "0 of 1 allocations running"},
		"an evaluation that is pending": {shot: func(s *snapshot) {
			s.evaluations = []*api.Evaluation{{ID: "e", Status: "pending"}}
		}, waiting: "waiting for its evaluation"},
		"a running deployment": {shot: func(s *snapshot) {
			s.deployments = []*api.Deployment{deploymentAt(version, "running", "")}
			s.allocations = []*api.AllocationListStub{runningFor(time.Hour, version)}
		}, waiting: "deployment is running"},
		"the deployment of an older version says nothing": {shot: func(s *snapshot) {
			s.deployments = []*api.Deployment{deploymentAt(version-1, "successful", "")}
			s.allocations = []*api.AllocationListStub{runningFor(time.Hour, version-1)}
		}, waiting: "0 of 1 allocations running"},
		"a deployment of a job of the same name that was purged says nothing": {shot: func(s *snapshot) {
			s.deployments = []*api.Deployment{{JobVersion: version, JobCreateIndex: 7, Status: "successful"}}
		}, waiting: "0 of 1 allocations running"},
		"an allocation that just started, before its deployment appears": {shot: func(s *snapshot) {
			s.allocations = []*api.AllocationListStub{runningFor(time.Second, version)}
		}, waiting: "for 10s at least"},
		"an allocation that ran for a while, without a deployment": {shot: func(s *snapshot) {
			s.allocations = []*api.AllocationListStub{runningFor(time.Minute, version)}
		}, done: true},
		"a successful deployment": {shot: func(s *snapshot) {
			s.deployments = []*api.Deployment{deploymentAt(version, "successful", "")}
			s.allocations = []*api.AllocationListStub{runningFor(time.Second, version)}
		}, done: true},
		"a failed deployment": {shot: func(s *snapshot) {
			s.deployments = []*api.Deployment{deploymentAt(version, "failed", "Failed due to unhealthy allocations")}
		}, class: ClassTimeout},
		"a failed deployment that nomad takes back": {shot: func(s *snapshot) {
			s.deployments = []*api.Deployment{deploymentAt(version, "failed", "Failed due to unhealthy allocations - rolling back to job version 1")}
		}, class: ClassTimeout, reverts: true},
		"a failed deployment that was taken back already": {shot: func(s *snapshot) {
			s.job.Version = ref(uint64(3))
			s.deployments = []*api.Deployment{deploymentAt(3, "successful", ""), deploymentAt(version, "failed", "Failed due to progress deadline")}
			s.allocations = []*api.AllocationListStub{runningFor(time.Minute, 3)}
		}, class: ClassTimeout, reverts: true},
		"someone registered a newer version": {shot: func(s *snapshot) { s.job.Version = ref(uint64(3)) }, class: ClassCancelled},
		"someone stopped the job":            {shot: func(s *snapshot) { s.job.Stop = ref(true) }, class: ClassCancelled},
		"someone purged the job":             {shot: func(s *snapshot) { s.job = nil }, class: ClassCancelled},
		"no place, just seen":                {shot: func(s *snapshot) { s.evaluations = blockedOn(noMemory) }, waiting: "waiting for a place"},
		"no place after the grace":           {shot: func(s *snapshot) { s.evaluations = blockedOn(noMemory) }, after: 11 * time.Second, class: ClassPlacement},
		"a port that another job has":        {shot: func(s *snapshot) { s.evaluations = blockedOn(portTaken) }, after: 11 * time.Second, class: ClassPort},
		"a node that has not found the secrets engine yet is waited for longer": {
			shot: func(s *snapshot) { s.evaluations = blockedOn(noVault) }, after: 60 * time.Second, waiting: "attr.vault.version"},
		"but not for ever": {shot: func(s *snapshot) { s.evaluations = blockedOn(noVault) }, after: 91 * time.Second, class: ClassPlacement},
		"a second allocation without a place, while the first runs": {shot: func(s *snapshot) {
			s.job.TaskGroups[0].Count = ref(2)
			s.evaluations = blockedOn(noMemory)
			s.allocations = []*api.AllocationListStub{runningFor(time.Minute, version)}
		}, after: time.Minute, waiting: "1 of 2 allocations running"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			judge := &judge{registered: Registration{JobID: "hello", EvalID: "e", Version: version}, options: WaitOptions{}.withDefaults()}
			shot := serviceShot(test.shot)
			now := time.Now()
			if test.after > 0 {
				if early := judge.look(shot, now.Add(-test.after)); early.failure != nil {
					t.Fatalf("failed at once: %+v", early.failure)
				}
			}
			got := judge.look(shot, now)
			switch {
			case got.done != test.done:
				t.Errorf("done %t, want %t (%+v)", got.done, test.done, got)
			case test.class != "" && (got.failure == nil || got.failure.class != test.class || got.failure.reverting != test.reverts):
				t.Errorf("got %+v (%+v), want %s, reverting %t", got, got.failure, test.class, test.reverts)
			case test.class == "" && got.failure != nil:
				t.Errorf("failed with %+v, want none", got.failure)
			case !strings.Contains(got.waiting, test.waiting):
				t.Errorf("waits for %q, want %q", got.waiting, test.waiting)
			}
		})
	}
}

func TestHealthOfTheLiveVersion(t *testing.T) {
	const version = 2
	tests := map[string]struct {
		shot             func(*snapshot)
		healthy, waiting bool
		reason           string
	}{
		"running":                   {shot: func(s *snapshot) { s.allocations = []*api.AllocationListStub{runningFor(time.Hour, version)} }, healthy: true},
		"a group scaled to nothing": {shot: func(s *snapshot) { s.job.TaskGroups[0].Count = ref(0) }, healthy: true},
		"one of three": {shot: func(s *snapshot) {
			s.job.TaskGroups[0].Count = ref(3)
			s.allocations = []*api.AllocationListStub{runningFor(time.Hour, version)}
		}, reason: "1 of 3 allocations running"},
		"a failed deployment with everything running": {shot: func(s *snapshot) {
			s.deployments = []*api.Deployment{deploymentAt(version, "failed", "by user")}
			s.allocations = []*api.AllocationListStub{runningFor(time.Hour, version)}
		}, reason: "last deployment failed: by user"},
		"a paused deployment": {shot: func(s *snapshot) {
			s.deployments = []*api.Deployment{deploymentAt(version, "paused", "")}
		}, waiting: true, reason: "deployment is paused"},
		"a failing check": {shot: func(s *snapshot) {
			s.allocations = []*api.AllocationListStub{runningFor(time.Hour, version)}
			s.checks = map[string][]api.AllocCheckStatus{"a": {{Check: "answers", Service: "hello"}}}
		}, reason: `check "answers" of service "hello" fails`},
		"a batch job whose traces were collected": {shot: func(s *snapshot) {
			s.job.Type, s.job.Status = ref("batch"), ref("dead")
		}, healthy: true},
		"a batch job that runs": {shot: func(s *snapshot) {
			s.job.Type = ref("batch")
			s.allocations = []*api.AllocationListStub{runningFor(time.Hour, version)}
		}, waiting: true, reason: "0 of 1 allocations complete"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			got := healthOf(serviceShot(test.shot))
			if got.Healthy != test.healthy || got.Waiting != test.waiting || got.Reason != test.reason {
				t.Errorf("got %+v, want healthy %t, waiting %t, %q", got, test.healthy, test.waiting, test.reason)
			}
		})
	}
}

func TestNodesThatAreNotReadySayWhy(t *testing.T) {
	podman := map[string]*api.DriverInfo{"podman": {Detected: true, Healthy: true}}
	tests := map[string]struct {
		nodes []*api.NodeListStub
		want  string
	}{
		"ready":       {[]*api.NodeListStub{{Name: "a", Status: "ready", SchedulingEligibility: "eligible", Drivers: podman}}, ""},
		"none":        {nil, "0 of 1 nodes ready: no other node registered"},
		"down":        {[]*api.NodeListStub{{Name: "a", Status: "down"}}, "node a is down"},
		"no driver":   {[]*api.NodeListStub{{Name: "a", Status: "ready", SchedulingEligibility: "eligible"}}, "node a has no podman driver yet"},
		"sick driver": {[]*api.NodeListStub{{Name: "a", Status: "ready", SchedulingEligibility: "eligible", Drivers: map[string]*api.DriverInfo{"podman": {Detected: true, HealthDescription: "no socket"}}}}, "not healthy: no socket"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			err := judgeNodes(test.nodes, ReadyOptions{Nodes: 1, Driver: "podman"})
			if test.want == "" && err != nil || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
				t.Errorf("got %v, want %q", err, test.want)
			}
		})
	}
}

func TestOnlyADeploymentWithAllHealthyIsAFormality(t *testing.T) {
	tests := map[string]struct {
		status, description string
		healthy             int
		want                bool
	}{
		"all are healthy":                 {status: api.DeploymentStatusRunning, healthy: 2, want: true},
		"one is not healthy yet":          {status: api.DeploymentStatusRunning, healthy: 1},
		"someone has to promote canaries": {status: api.DeploymentStatusRunning, description: "Deployment is running but requires manual promotion", healthy: 2},
		"it is paused":                    {status: api.DeploymentStatusPaused, healthy: 2},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			deployment := &api.Deployment{
				Status: test.status, StatusDescription: test.description,
				TaskGroups: map[string]*api.DeploymentState{"web": {DesiredTotal: 2, HealthyAllocs: test.healthy}},
			}
			if got := allHealthy(deployment); got != test.want {
				t.Errorf("allHealthy = %v, want %v", got, test.want)
			}
		})
	}
}
