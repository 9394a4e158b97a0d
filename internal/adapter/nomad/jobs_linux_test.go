package nomad

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/reconcile/job"
	"github.com/nomad-site/site/internal/retry"
	"github.com/nomad-site/site/internal/site"
)

var quick = WaitOptions{Limit: time.Minute, PlacementGrace: 2 * time.Second, Settle: 2 * time.Second}

const update = `update {
    min_healthy_time  = "1s"
    healthy_deadline  = "8s"
    progress_deadline = "9s"
    %s
  }`

// serveSpec is a service that answers its check, or not.
func serveSpec(id, health, updateBlock string) string {
	self, _ := os.Executable()
	return fmt.Sprintf(`job %q {
  %s
  group "web" {
    network {
      port "http" {}
    }
    restart {
      attempts = 0
      mode     = "fail"
    }
    service {
      name     = %q
      port     = "http"
      provider = "nomad"
      check {
        type     = "http"
        name     = "answers"
        path     = "/healthz"
        interval = "1s"
        timeout  = "1s"
      }
    }
    task "hello" {
      driver = "raw_exec"
      config {
        command = %q
      }
      env {
        SITE_TEST_TASK = "serve"
        HEALTH         = %q
      }
      resources {
        cpu    = 50
        memory = 32
      }
    }
  }
}`, id, updateBlock, id, self, health)
}

func shellSpec(id, kind, script, extra string) string {
	return fmt.Sprintf(`job %q {
  type = %q
  %s
  group "web" {
    restart {
      attempts = 0
      mode     = "fail"
    }
    task "hello" {
      driver = "raw_exec"
      config {
        command = "/bin/sh"
        args    = ["-c", %q]
      }
      resources {
        cpu    = 50
        memory = 32
      }
    }
  }
}`, id, kind, extra, script)
}

func batchSpec(id, script string) string {
	return shellSpec(id, "batch", script, `reschedule {
    attempts  = 0
    unlimited = false
  }`)
}

func prepare(t *testing.T, c *Client, spec, sha string) *Prepared {
	t.Helper()
	parsed, err := c.Parse(context.Background(), Jobspec{Path: "jobs/test/test.nomad.hcl", Content: []byte(spec)}, "")
	if err != nil {
		t.Fatal(err)
	}
	prepared, err := Prepare(parsed, Brief{Site: "lab", Component: "test", GitSHA: sha, Artifacts: map[string]string{"hello": "sha256:aa"}})
	if err != nil {
		t.Fatal(err)
	}
	return prepared
}

type logProgress struct{ t *testing.T }

func (p logProgress) Message(format string, args ...any) { p.t.Logf(format, args...) }
func (p logProgress) Bytes(string, int64, int64)         {}

// deploy does what a step does: observe, register, wait.
func deploy(t *testing.T, c *Client, prepared *Prepared, options WaitOptions) error {
	t.Helper()
	ctx := context.Background()
	actual, err := c.Observe(ctx, prepared)
	if err != nil {
		t.Fatal(err)
	}
	registered, err := c.Register(ctx, prepared, actual.ModifyIndex)
	if err != nil {
		return err
	}
	t.Cleanup(func() { _ = c.Stop(context.Background(), prepared.Desired.JobID) })
	return c.Wait(ctx, prepared, registered, options, logProgress{t})
}

func changesOf(t *testing.T, c *Client, prepared *Prepared) []plan.Change {
	t.Helper()
	actual, err := c.Observe(context.Background(), prepared)
	if err != nil {
		t.Fatal(err)
	}
	return job.Diff([]job.Desired{prepared.Desired}, map[string]job.Actual{prepared.Desired.JobID: actual})
}

func wantChange(t *testing.T, c *Client, prepared *Prepared, reason string) plan.Change {
	t.Helper()
	changes := changesOf(t, c, prepared)
	if len(changes) != 1 || !strings.HasPrefix(changes[0].Reason, reason) {
		t.Fatalf("plan %v, want one change because %q", changes, reason)
	}
	return changes[0]
}

func wantNothing(t *testing.T, c *Client, prepared *Prepared) {
	t.Helper()
	if changes := changesOf(t, c, prepared); len(changes) > 0 {
		t.Fatalf("plan %v %q, want nothing", changes, changes[0].Details)
	}
}

func wantVerdict(t *testing.T, err error, class Class) Verdict {
	t.Helper()
	var failed *RolloutError
	if !errors.As(err, &failed) {
		t.Fatalf("got %v, want a verdict", err)
	}
	t.Logf("verdict: %v\nhint: %s\nevents: %s\nlog: %s", err, failed.Hint(), strings.Join(failed.Verdict.Events, "\n  "), strings.Join(failed.Verdict.LogTail, "\n  "))
	if failed.Verdict.Class != class {
		t.Fatalf("class %s, want %s: %v", failed.Verdict.Class, class, err)
	}
	if failed.Hint() == "" {
		t.Error("a verdict must have a hint")
	}
	return failed.Verdict
}

func TestAHealthyServiceIsANoOpAfterwards(t *testing.T) {
	t.Parallel()
	c := client(t)
	ctx := context.Background()
	prepared := prepare(t, c, serveSpec("healthy", "ok", fmt.Sprintf(update, "")), "abc")
	wantChange(t, c, prepared, "not registered")
	if err := deploy(t, c, prepared, quick); err != nil {
		t.Fatal(err)
	}
	wantNothing(t, c, prepared)
	wantNothing(t, c, prepare(t, c, serveSpec("healthy", "ok", fmt.Sprintf(update, "")), "another-sha"))

	rows, err := c.Status(ctx, "lab")
	if err != nil {
		t.Fatal(err)
	}
	found := false
	for _, row := range rows {
		if row.Job == "healthy" {
			found = row.Healthy && row.GitSHA == "abc" && row.Running == 1 && row.Wanted == 1 && row.Component == "test"
		}
	}
	if !found {
		t.Errorf("status %+v lacks the healthy job", rows)
	}

	var log bytes.Buffer
	if err := c.Logs(ctx, LogOptions{Job: "healthy", Stream: Stderr}, &log); err != nil || !strings.Contains(log.String(), "listening, sha abc") {
		t.Errorf("log %q, %v", log.String(), err)
	}
	following, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	log.Reset()
	if err := c.Logs(following, LogOptions{Job: "healthy", Task: "hello", Follow: true}, &log); err != nil || !strings.Contains(log.String(), "listening, sha abc") {
		t.Errorf("followed log %q, %v", log.String(), err)
	}

	t.Run("scaled by hand it is put back", func(t *testing.T) {
		two := 2
		if _, _, err := c.api.Jobs().Scale("healthy", "web", &two, "by hand", false, nil, c.write(ctx)); err != nil {
			t.Fatal(err)
		}
		waitFor(t, "the second allocation", func() bool {
			shot, err := c.snapshot(ctx, "healthy")
			return err == nil && healthOf(shot).Healthy
		})
		change := wantChange(t, c, prepared, "job was changed by hand")
		if len(change.Details) == 0 || !strings.Contains(change.Details[0], `Count: "2" => "1"`) {
			t.Errorf("details %q, want the count", change.Details)
		}
		if err := deploy(t, c, prepared, quick); err != nil {
			t.Fatal(err)
		}
		wantNothing(t, c, prepared)
	})
	t.Run("stopped by hand it is started", func(t *testing.T) {
		if err := c.Stop(ctx, "healthy"); err != nil {
			t.Fatal(err)
		}
		wantChange(t, c, prepared, "job was stopped")
		if registered, stable, err := c.Standing(ctx, "healthy"); registered || stable || err != nil {
			t.Errorf("a stopped job stands: %t, %t, %v", registered, stable, err)
		}
		if err := deploy(t, c, prepared, quick); err != nil {
			t.Fatal(err)
		}
		wantNothing(t, c, prepared)
		if registered, stable, err := c.Standing(ctx, "healthy"); !registered || !stable || err != nil {
			t.Errorf("a healthy job does not stand: %t, %t, %v", registered, stable, err)
		}
	})
	t.Run("registered against an old index it is a conflict", func(t *testing.T) {
		before, err := c.Observe(ctx, prepared)
		if err != nil {
			t.Fatal(err)
		}
		for _, index := range []uint64{0, 1} {
			_, err := c.Register(ctx, prepared, index)
			var conflict *ConflictError
			if !errors.As(err, &conflict) || plan.HintOf(err) == "" {
				t.Fatalf("index %d: %v, want a ConflictError with a hint", index, err)
			}
			t.Log(err)
		}
		after, err := c.Observe(ctx, prepared)
		if err != nil || after.ModifyIndex != before.ModifyIndex {
			t.Errorf("modify index %d, was %d, %v", after.ModifyIndex, before.ModifyIndex, err)
		}
	})
	t.Run("the spec of a release can be registered again", func(t *testing.T) {
		newer := prepare(t, c, serveSpec("healthy", "ok", fmt.Sprintf(update, "max_parallel = 2")), "def")
		if err := deploy(t, c, newer, quick); err != nil {
			t.Fatal(err)
		}
		older, err := PreparedFromSpec(prepared.Desired.Spec)
		if err != nil {
			t.Fatal(err)
		}
		change := wantChange(t, c, older, "spec changed")
		t.Log(change.Details)
		if err := deploy(t, c, older, quick); err != nil {
			t.Fatal(err)
		}
		wantNothing(t, c, prepared)
	})
}

func waitFor(t *testing.T, what string, is func() bool) {
	t.Helper()
	if err := retry.Until(t.Context(), what, 30*time.Second, func(context.Context) error {
		if !is() {
			return errors.New("not yet")
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

func TestATaskThatExitsAtOnceEndsInAVerdictAndIsRetried(t *testing.T) {
	t.Parallel()
	c := client(t)
	prepared := prepare(t, c, strings.Replace(shellSpec("exits", "service", "echo to stdout; echo password=hunter2 >&2; exit 3", fmt.Sprintf(update, "")), `"9s"`, `"0s"`, 1), "abc")
	options := quick
	options.Redact = func(line string) string { return strings.ReplaceAll(line, "hunter2", "[redacted]") }
	for range 2 {
		verdict := wantVerdict(t, deploy(t, c, prepared, options), ClassExit)
		if verdict.Task != "hello" || verdict.Group != "web" || verdict.Alloc == "" || verdict.Node == "" || len(verdict.Events) == 0 || verdict.Reverted {
			t.Errorf("verdict lacks something: %+v", verdict)
		}
		log := strings.Join(verdict.LogTail, "\n")
		if log != "stderr: password=[redacted]\nstdout: to stdout" {
			t.Errorf("log tail %q", log)
		}
		// The same digests after a failure are no no-op, and the second try is a real one.
		wantChange(t, c, prepared, "last deployment failed")
	}
	actual, err := c.Observe(context.Background(), prepared)
	if err != nil || actual.Version != 1 {
		t.Errorf("version %d, %v, want a second version by the retry", actual.Version, err)
	}
	fixed := prepare(t, c, shellSpec("exits", "service", "sleep 300", fmt.Sprintf(update, "")), "def")
	if err := deploy(t, c, fixed, quick); err != nil {
		t.Fatal(err)
	}
	wantNothing(t, c, fixed)
}

func TestAFailingCheckEndsInAVerdict(t *testing.T) {
	t.Parallel()
	c := client(t)
	prepared := prepare(t, c, serveSpec("failing-check", "broken", fmt.Sprintf(update, "")), "abc")
	verdict := wantVerdict(t, deploy(t, c, prepared, quick), ClassCheck)
	if len(verdict.LogTail) == 0 || verdict.Reverted {
		t.Errorf("verdict %+v", verdict)
	}
	wantChange(t, c, prepared, "last deployment failed")
}

func TestAutoRevertIsAFailureThatWasReverted(t *testing.T) {
	t.Parallel()
	c := client(t)
	good := prepare(t, c, serveSpec("reverts", "ok", fmt.Sprintf(update, "auto_revert = true")), "good")
	if err := deploy(t, c, good, quick); err != nil {
		t.Fatal(err)
	}
	bad := prepare(t, c, serveSpec("reverts", "broken", fmt.Sprintf(update, "auto_revert = true")), "bad")
	verdict := wantVerdict(t, deploy(t, c, bad, quick), ClassCheck)
	if !verdict.Reverted {
		t.Error("the verdict must say that nomad went back")
	}
	wantNothing(t, c, good)
	wantChange(t, c, bad, "spec changed")
}

func TestAJobThatCannotBePlacedEndsInAVerdictWithinSeconds(t *testing.T) {
	t.Parallel()
	c := client(t)
	tests := map[string]struct {
		spec   string
		class  Class
		reason string
	}{
		"a constraint": {shellSpec("unplaced-constraint", "service", "sleep 300", `constraint {
    attribute = "${attr.kernel.name}"
    value     = "plan9"
  }`), ClassPlacement, "kernel.name"},
		"memory":               {strings.Replace(shellSpec("unplaced-memory", "service", "sleep 300", ""), "memory = 32", "memory = 99000000", 1), ClassPlacement, "memory"},
		"a batch job's memory": {strings.Replace(batchSpec("unplaced-batch", "exit 0"), "memory = 32", "memory = 99000000", 1), ClassPlacement, "memory"},
		"a system job": {shellSpec("unplaced-system", "system", "sleep 300", `constraint {
    attribute = "${attr.kernel.name}"
    value     = "plan9"
  }`), ClassPlacement, ""},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			start := time.Now()
			prepared := prepare(t, c, test.spec, "abc")
			verdict := wantVerdict(t, deploy(t, c, prepared, quick), test.class)
			if !strings.Contains(verdict.Reason, test.reason) {
				t.Errorf("reason %q, want %q in it", verdict.Reason, test.reason)
			}
			if took := time.Since(start); took > 20*time.Second {
				t.Errorf("took %s", took)
			}
			if changes := changesOf(t, c, prepared); len(changes) != 1 {
				t.Errorf("a job without a place is no no-op: %v", changes)
			}
		})
	}
}

func TestATakenPortIsAVerdictOfItsOwn(t *testing.T) {
	t.Parallel()
	c := client(t)
	ports, err := freePorts(1)
	if err != nil {
		t.Fatal(err)
	}
	static := func(id string) string {
		return strings.Replace(serveSpec(id, "ok", fmt.Sprintf(update, "")), `port "http" {}`, fmt.Sprintf(`port "http" { static = %d }`, ports[0]), 1)
	}
	if err := deploy(t, c, prepare(t, c, static("port-first"), "abc"), quick); err != nil {
		t.Fatal(err)
	}
	wantVerdict(t, deploy(t, c, prepare(t, c, static("port-second"), "abc"), quick), ClassPort)
}

func TestBatchJobs(t *testing.T) {
	t.Parallel()
	c := client(t)
	good := prepare(t, c, batchSpec("batch-good", "sleep 1; exit 0"), "abc")
	if err := deploy(t, c, good, quick); err != nil {
		t.Fatal(err)
	}
	wantNothing(t, c, good)
	bad := prepare(t, c, batchSpec("batch-bad", "echo no >&2; exit 4"), "abc")
	verdict := wantVerdict(t, deploy(t, c, bad, quick), ClassExit)
	if !strings.Contains(verdict.Reason, "4") {
		t.Errorf("reason %q lacks the exit code", verdict.Reason)
	}
	wantChange(t, c, bad, "last run failed")
	system := prepare(t, c, shellSpec("sysbatch", "sysbatch", "exit 0", ""), "abc")
	if err := deploy(t, c, system, quick); err != nil {
		t.Fatal(err)
	}
	wantNothing(t, c, system)
	periodic := prepare(t, c, shellSpec("periodic", "batch", "exit 0", `periodic { crons = ["0 0 1 1 *"] }`), "abc")
	if err := deploy(t, c, periodic, quick); err != nil {
		t.Fatal(err)
	}
	wantNothing(t, c, periodic)
}

func TestSystemJobs(t *testing.T) {
	t.Parallel()
	c := client(t)
	good := prepare(t, c, shellSpec("system-good", "system", "sleep 300", ""), "abc")
	if err := deploy(t, c, good, quick); err != nil {
		t.Fatal(err)
	}
	wantNothing(t, c, good)
	bad := prepare(t, c, shellSpec("system-bad", "system", "exit 5", ""), "abc")
	wantVerdict(t, deploy(t, c, bad, quick), ClassExit)
	if changes := changesOf(t, c, bad); len(changes) != 1 {
		t.Errorf("plan %v, want one change", changes)
	}
}

func TestServicesWithoutUpdates(t *testing.T) {
	t.Parallel()
	c := client(t)
	none := `update { max_parallel = 0 }`
	good := prepare(t, c, shellSpec("no-update-good", "service", "sleep 300", none), "abc")
	if err := deploy(t, c, good, quick); err != nil {
		t.Fatal(err)
	}
	wantNothing(t, c, good)
	bad := prepare(t, c, shellSpec("no-update-bad", "service", "sleep 1; exit 6", none), "abc")
	wantVerdict(t, deploy(t, c, bad, quick), ClassExit)
	if changes := changesOf(t, c, bad); len(changes) != 1 {
		t.Errorf("plan %v, want one change", changes)
	}
}

func TestADeadlineAndACancelEndAWait(t *testing.T) {
	t.Parallel()
	c := client(t)
	spec := strings.NewReplacer(`"8s"`, `"5m"`, `"9s"`, `"10m"`).Replace(serveSpec("slow", "broken", fmt.Sprintf(update, "")))
	prepared := prepare(t, c, spec, "abc")
	options := quick
	options.Limit = 6 * time.Second
	err := deploy(t, c, prepared, options)
	wantVerdict(t, err, ClassCheck) // it was slow because of its check
	wantChange(t, c, prepared, "waiting: deployment is running")

	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	actual, err := c.Observe(ctx, prepared)
	if err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(time.Second, cancel)
	err = c.Wait(ctx, prepared, &Registration{JobID: "slow", Version: actual.Version, ModifyIndex: actual.ModifyIndex}, quick, nil)
	if !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want the caller's cancel", err)
	}
}

func TestParseErrorsNamePathAndLine(t *testing.T) {
	c := client(t)
	tests := map[string]struct{ spec, variables, want string }{
		"an unknown argument": {"job \"x\" {\n  group \"g\" {\n    colour = 3\n  }\n}", "", "jobs/x/x.nomad.hcl:3,"},
		"broken syntax":       {"job \"x\" {\n  group = \n}", "", "jobs/x/x.nomad.hcl:2,"},
		"a missing variable":  {"variable \"v\" { type = string }\njob \"x\" {}", "", "jobs/x/x.nomad.hcl:1,"},
		"an empty jobspec":    {"", "", "jobs/x/x.nomad.hcl: "},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			_, err := c.Parse(context.Background(), Jobspec{Path: "jobs/x/x.nomad.hcl", Content: []byte(test.spec)}, test.variables)
			var refused *SpecError
			if !errors.As(err, &refused) || !strings.Contains(err.Error(), test.want) {
				t.Fatalf("got %v, want a SpecError with %s", err, test.want)
			}
			t.Log(err)
		})
	}
}

func TestVariablesReachTheJobspec(t *testing.T) {
	c := client(t)
	spec := `variable "artifacts" { type = map(string) }
variable "count" { type = number }
job "x" {
  meta { address = var.artifacts["hello"] }
  group "g" {
    count = var.count
    task "t" { driver = "raw_exec" }
  }
}`
	names, diagnostics := site.JobspecVariables([]byte(spec), "x.nomad.hcl")
	if diagnostics.HasErrors() || strings.Join(names, " ") != "artifacts count" {
		t.Fatalf("declared %v, %v", names, diagnostics)
	}
	values, err := site.VariablesHCL(names, map[string]string{"artifacts": `{"hello":"a${b}%{c}\n\"q\""}`, "count": "3"})
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := c.Parse(context.Background(), Jobspec{Path: "x.nomad.hcl", Content: []byte(spec)}, values)
	if err != nil {
		t.Fatal(err)
	}
	if got := parsed.Meta["address"]; got != "a${b}%{c}\n\"q\"" || *parsed.TaskGroups[0].Count != 3 {
		t.Errorf("got %q and %d", got, *parsed.TaskGroups[0].Count)
	}
}

func TestJobsOfOthersAndOfNoComponentAreSeen(t *testing.T) {
	t.Parallel()
	c := client(t)
	ctx := context.Background()
	prepared := prepare(t, c, batchSpec("foreign", "exit 0"), "abc")
	foreign, err := cloneJob(prepared.Job)
	if err != nil {
		t.Fatal(err)
	}
	foreign.Meta = nil
	if _, _, err := c.api.Jobs().Register(foreign, c.write(ctx)); err != nil {
		t.Fatal(err)
	}
	actual, err := c.Observe(ctx, prepared)
	if err != nil {
		t.Fatal(err)
	}
	var refused *job.ForeignError
	if err := job.Refuse([]job.Desired{prepared.Desired}, map[string]job.Actual{"foreign": actual}); !errors.As(err, &refused) {
		t.Errorf("got %v, want a ForeignError", err)
	}
	orphan := prepare(t, c, shellSpec("orphan", "service", "sleep 300", fmt.Sprintf(update, "")), "abc")
	if err := deploy(t, c, orphan, quick); err != nil {
		t.Fatal(err)
	}
	all, err := c.ObserveSite(ctx, "lab")
	if err != nil {
		t.Fatal(err)
	}
	if _, known := all["foreign"]; known {
		t.Error("a job of others counts as ours")
	}
	if !strings.Contains(strings.Join(job.Orphans("lab", nil, all), " "), "orphan") {
		t.Errorf("orphans of %v lack the job", all)
	}
	if other, err := c.ObserveSite(ctx, "prod"); err != nil || len(other) > 0 {
		t.Errorf("another site sees %v, %v", other, err)
	}
}

func TestReleaseVariable(t *testing.T) {
	c := client(t)
	ctx := context.Background()
	if have, err := c.GetReleaseVariable(ctx, "site/lab/none"); err != nil || have != nil {
		t.Fatalf("got %q, %v", have, err)
	}
	for range 2 {
		if err := c.PutReleaseVariable(ctx, "site/lab/mirror", []byte(`{"sha":"abc"}`)); err != nil {
			t.Fatal(err)
		}
	}
	have, err := c.GetReleaseVariable(ctx, "site/lab/mirror")
	if err != nil || string(have) != `{"sha":"abc"}` {
		t.Fatalf("got %q, %v", have, err)
	}
	metadata, _, err := c.api.Variables().PrefixList("site/lab/mirror", c.query(ctx))
	if err != nil || len(metadata) != 1 || metadata[0].CreateIndex != metadata[0].ModifyIndex {
		t.Errorf("an equal record was written again: %v, %v", metadata, err)
	}
}
