package e2e

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/nomad-site/site/internal/deploy"
	"github.com/nomad-site/site/internal/plan"
)

// A keeper is a component whose application keeps a secret. Its job's port is
// free to be chosen unless one is given, so that a canary finds a place.
type keeper struct {
	name      string
	port      int
	catalogue string
	// group and config are lines of HCL.
	group, config string
	// templates are the lines of each template of its task.
	templates []string
}

// reads are the lines of a template that reads a secret, with a query or without.
func reads(path, file string, more ...string) string {
	return fmt.Sprintf("destination = %q\ndata = \"{{ with secret \\\"site/data/%s\\\" }}{{ .Data.data.value }}{{ end }}\"\n", "local/"+file, path) +
		strings.Join(more, "\n")
}

// keepers are an external secret whose check is declared, in a job of two
// allocations; the same in a job that cannot run twice; a generated one whose
// job accepts the value before, too; and one whose job is never restarted, which
// borrows another.
var keepers = []keeper{
	{
		name: "mailer", group: "count = 2", templates: []string{reads("mailer/api_key", "key")},
		catalogue: "secret \"api_key\" {\n  external {\n    check = [\"grep\", \"--quiet\", \"^live-\"]\n  }\n}\n",
	},
	{
		name: "billing", port: 9004, templates: []string{reads("billing/token", "key")},
		catalogue: "secret \"token\" {\n  external {\n    check = [\"grep\", \"--quiet\", \"^live-\"]\n  }\n}\n",
	},
	{
		name: "checker", config: `volumes = ["/srv/keeper:/srv/keeper:ro"]`,
		templates: []string{reads("checker/token", "key"), reads("checker/token?version=previous", "key_before")},
		catalogue: "directory \"/srv/keeper\" {}\n\nsecret \"token\" {\n  generated {}\n\n  rotation {\n    every = \"1h\"\n    drain = \"1h\"\n  }\n}\n",
	},
	{
		name: "clock", catalogue: "reads = [\"billing.token\"]\n\nsecret \"key\" {\n  generated {}\n}\n",
		templates: []string{reads("clock/key", "key", bySignal...), reads("billing/token", "key_of_billing", bySignal...)},
	},
}

// bySignal are the lines of a template that restarts nothing.
var bySignal = []string{`change_mode = "signal"`, `change_signal = "SIGHUP"`}

func (k keeper) files(t *testing.T) map[string]string {
	t.Helper()
	files := probe{Name: k.name, Mode: "serve", Port: k.port, Constraint: k.group, Config: k.config}.files(t)
	component, job := filepath.Join("jobs", k.name, "component.hcl"), filepath.Join("jobs", k.name, k.name+".nomad.hcl")
	files[component] = strings.Replace(files[component], `"./behave"`, `"./keeper"`, 1) + k.catalogue
	blocks := "\n      vault {}\n"
	for _, template := range k.templates {
		blocks += "\n      template {\n" + template + "\n}\n"
	}
	files[job] = strings.Replace(files[job], "\n      env {", blocks+"\n      env {", 1)
	return files
}

// withKeepers deploys the keepers, and the application at a port that is free to
// be chosen: of all but one of these jobs a canary can run beside what is there.
func (s *testSite) withKeepers() {
	s.t.Helper()
	files := map[string]string{filepath.Join("keeper", "main.go"): s.read(filepath.Join("testdata", "keeper", "main.go"))}
	var names []string
	for _, each := range keepers {
		names = append(names, each.name)
		maps.Copy(files, each.files(s.t))
	}
	path, content := s.activate(names...)
	files[path] = strings.Replace(content, `component "hello" {}`, "component \"hello\" {\n    variables = {\n      port = 0\n    }\n  }", 1)
	s.commit("those who keep secrets", files)
	s.feed("live-1", "secrets", "import", "mailer.api_key", "--from-file=-")
	s.feed("live-1", "secrets", "import", "billing.token", "--from-file=-")
	s.must("deploy")
	s.planIs()
}

// instance is a running allocation of a job, as Nomad's services know it.
type instance struct {
	AllocID, Address string
	Port             int
}

func (s *testSite) instances(job string) []instance {
	s.t.Helper()
	var found []instance
	s.nomad("/v1/service/"+job, &found)
	return found
}

// serves insists that the application answers, with its database.
func (s *testSite) serves() {
	s.t.Helper()
	s.until("the application to answer", 5*time.Second, func() error {
		problem := errors.New("it is nowhere")
		for _, each := range s.instances("hello") {
			text, err := s.get(each.Port, "/version")
			var says answer
			if err == nil {
				err = json.Unmarshal([]byte(text), &says)
			}
			if err == nil && says.Rows < 1 {
				err = fmt.Errorf("it says %q", text)
			}
			if err == nil {
				return nil
			}
			problem = err
		}
		return problem
	})
}

// running are a job's allocations that run, with what a restart would change.
func (s *testSite) running(job string) []string {
	s.t.Helper()
	var found []struct {
		ID, DesiredStatus, ClientStatus string
		TaskStates                      map[string]struct {
			Restarts  int
			StartedAt time.Time
		}
	}
	s.nomad("/v1/job/"+job+"/allocations", &found)
	var lines []string
	for _, each := range found {
		if each.DesiredStatus == "run" && each.ClientStatus == "running" {
			lines = append(lines, fmt.Sprintf("%s %+v", each.ID, each.TaskStates))
		}
	}
	slices.Sort(lines)
	return lines
}

// stays runs do and insists that these jobs' allocations are the very same
// afterwards, and were never restarted.
func (s *testSite) stays(jobs []string, do func()) {
	s.t.Helper()
	before := map[string][]string{}
	for _, job := range jobs {
		before[job] = s.running(job)
	}
	do()
	for _, job := range jobs {
		if after := s.running(job); len(after) == 0 || !slices.Equal(before[job], after) {
			s.t.Errorf("the allocations of %s were\n%s\nand are\n%s", job, strings.Join(before[job], "\n"), strings.Join(after, "\n"))
		}
	}
}

// accepted is by how many of a job's instances a value is accepted, and of how many.
func (s *testSite) accepted(job, value string) (by, of int) {
	s.t.Helper()
	sum := sha256.Sum256([]byte(value))
	found := s.instances(job)
	for _, each := range found {
		_, err := s.get(each.Port, "/accepts/"+hex.EncodeToString(sum[:]))
		switch {
		case err == nil:
			by++
		case !strings.Contains(err.Error(), http.StatusText(http.StatusForbidden)):
			s.t.Errorf("%s at port %d: %v", job, each.Port, err)
		}
	}
	return by, len(found)
}

// wantAccepted insists that soon all of a job's instances accept a value, or none:
// nobody waits for templates that went back.
func (s *testSite) wantAccepted(job, what, value string, all bool) {
	s.t.Helper()
	s.until("an answer of "+job+" to "+what, 10*time.Second, func() error {
		if by, of := s.accepted(job, value); of == 0 || by != map[bool]int{true: of}[all] {
			return fmt.Errorf("%d of %d accept it", by, of)
		}
		return nil
	})
}

// value is one generation of a secret, empty if it is gone.
func (b *bao) value(secret string, generation int) string {
	b.s.t.Helper()
	var entry struct {
		Data struct{ Data struct{ Value string } }
	}
	component, short, _ := strings.Cut(secret, ".")
	var status *statusError
	err := b.try(b.s.t.Context(), "GET", fmt.Sprintf("site/data/%s/%s?version=%d", component, short, generation), nil, &entry)
	if err != nil && (!errors.As(err, &status) || status.status != http.StatusNotFound) {
		b.s.t.Fatal(err)
	}
	return entry.Data.Data.Value
}

// generationsOf are the newest generation of a secret, and those that are gone for good.
func (b *bao) generationsOf(secret string) (newest int, destroyed []int) {
	b.s.t.Helper()
	var metadata struct {
		Data struct {
			CurrentVersion int `json:"current_version"`
			Versions       map[int]struct{ Destroyed bool }
		}
	}
	component, short, _ := strings.Cut(secret, ".")
	b.must("GET", "site/metadata/"+component+"/"+short, nil, &metadata)
	for number, version := range metadata.Data.Versions {
		if version.Destroyed {
			destroyed = append(destroyed, number)
		}
	}
	slices.Sort(destroyed)
	return metadata.Data.CurrentVersion, destroyed
}

// history is what the journal says of one generation of a secret.
func (s *testSite) history(secret string, generation int) []string {
	s.t.Helper()
	var history deploy.History
	got := s.must("secrets", "history", secret, "--json")
	if err := json.Unmarshal([]byte(got.stdout), &history); err != nil || history.Schema != deploy.HistoryVersion {
		s.t.Fatalf("not a history: %v\n%v", err, got)
	}
	var what []string
	for _, event := range history.Events {
		if event.Name != secret || event.By == "" || event.Time.IsZero() {
			s.t.Errorf("the history of %s has %+v", secret, event)
		}
		if event.Generation == generation {
			what = append(what, event.What)
		}
	}
	return slices.Compact(what)
}

func (s *testSite) wantHistory(secret string, generation int, want ...string) {
	s.t.Helper()
	if what := s.history(secret, generation); !slices.Equal(what, want) {
		s.t.Errorf("the history of generation %d of %s is %q, not %q", generation, secret, what, want)
	}
}

// rotatePassword rotates the password of the application, without a drain.
var rotatePassword = []string{"secrets", "rotate", ownPassword, "--drain=0s"}

// passwordRotation watches one rotation of the application's password.
type passwordRotation struct {
	*testSite
	bao *bao
	// old is the generation that was active when it began, next the one after it.
	old  generation
	next int
	// steps are those of a run, by the product's own list.
	steps []string
}

func (s *testSite) watchRotation(steps []string) *passwordRotation {
	s.t.Helper()
	r := &passwordRotation{testSite: s, bao: s.bao(), steps: steps}
	row := s.secretRows()[ownPassword]
	r.old = r.bao.generation(row.Generation)
	newest, _ := r.bao.generationsOf(ownPassword)
	r.next = newest + 1
	if row.Candidate > 0 {
		r.next = row.Candidate
	}
	return r
}

// is reports whether a step is behind another one, or it.
func (r *passwordRotation) is(step, behind string) bool {
	return slices.Index(r.steps, step) >= slices.Index(r.steps, behind)
}

// wantCredentials insists that a generation may log in, or may not.
func (r *passwordRotation) wantCredentials(one generation, good bool) {
	r.t.Helper()
	err := r.logsIn(one)
	var refused *pgconn.PgError
	switch {
	case good && err != nil:
		r.t.Errorf("generation %d, login %s: %v", one.number, one.login, err)
	case !good && err == nil:
		r.t.Errorf("generation %d logs %s in", one.number, one.login)
	case !good && (!errors.As(err, &refused) || !strings.HasPrefix(refused.Code, "28")):
		r.t.Errorf("generation %d was not refused, but: %v", one.number, err)
	}
}

// wantCutShort insists that, after a run that was killed behind a step, the
// application goes on and the status tells the truth.
func (r *passwordRotation) wantCutShort(step string) {
	r.t.Helper()
	r.serves()
	row := r.secretRows()[ownPassword]
	want := deploy.SecretRow{State: deploy.SecretOK, Generation: r.old.number}
	switch {
	case r.is(step, "retire"):
		want.Generation = r.next
	case r.is(step, "commit"):
		want.State, want.Generation, want.Retiring = deploy.SecretRetiring, r.next, r.old.number
	case r.is(step, "mint"):
		want.State, want.Candidate = deploy.SecretRotating, r.next
	}
	if row.State != want.State || row.Generation != want.Generation || row.Candidate != want.Candidate || row.Retiring != want.Retiring {
		r.t.Errorf("the status is %+v, not %+v", row, want)
	}
	r.wantCredentials(r.old, !r.is(step, "retire"))
	r.wantCredentials(r.bao.generation(row.Generation), true)
}

// wantFinished insists that the next generation is all that is left.
func (r *passwordRotation) wantFinished() {
	r.t.Helper()
	r.serves()
	row := r.secretRows()[ownPassword]
	if row.State != deploy.SecretOK || row.Generation != r.next || row.Candidate+row.Retiring > 0 {
		r.t.Errorf("the status is %+v, not that of generation %d", row, r.next)
	}
	r.wantCredentials(r.old, false)
	now := r.bao.generation(r.next)
	r.wantCredentials(now, true)
	if may := r.psql("postgres", `SELECT string_agg(rolname, ' ') FROM pg_authid WHERE rolcanlogin AND rolname ~ '^hello'`); may != now.login || may == r.old.login {
		r.t.Errorf("%q may log in, not just %q after %q", may, now.login, r.old.login)
	}
	if left := r.psql("postgres", `SELECT count(*) FROM pg_stat_activity WHERE usename = '`+r.old.login+`'`); left != "0" {
		r.t.Errorf("%s has %s sessions", r.old.login, left)
	}
	if _, gone := r.bao.generationsOf(ownPassword); !slices.Contains(gone, r.old.number) || slices.Contains(gone, r.next) {
		r.t.Errorf("the generations %v are destroyed, after that from %d to %d", gone, r.old.number, r.next)
	}
	r.wantHistory(ownPassword, r.next, "minted", "canaries healthy", "promoted")
	if what := r.history(ownPassword, r.old.number); len(what) == 0 || what[len(what)-1] != "retired" {
		r.t.Errorf("the history of the generation before is %q", what)
	}
	r.planIs()
}

func TestARotationIsFinishedOrTakenBackWhateverHappens(t *testing.T) {
	s := newSite(t, platform)
	privateTemp(t)
	s.withKeepers()
	for _, each := range []struct {
		name string
		do   func(*testSite)
	}{
		{"a rotation that is killed behind any step is finished by the next", (*testSite).killsBehindEachStep},
		{"a rotation that is killed within its canaries", (*testSite).killWithinCanaries},
		{"a deploy after a rotation that was killed", (*testSite).deployGoesOn},
		{"a value that its consumer refuses", (*testSite).refusedByConsumer},
		{"a value that its check refuses", (*testSite).refusedByCheck},
		{"a generated value that a consumer ends with", (*testSite).consumerEnds},
		{"who follows without a restart", (*testSite).followsBySignal},
		{"who accepts the value before", (*testSite).acceptsBoth},
		{"what is not due costs one command", (*testSite).nothingIsDue},
		{"an external secret without its next value", (*testSite).noValue},
	} {
		t.Run(each.name, func(t *testing.T) { each.do(s.in(t)) })
	}
}

func (s *testSite) killsBehindEachStep() {
	first := s.watchRotation(nil)
	got := s.must(append(rotatePassword, "--json")...)
	for _, event := range s.events(got) {
		if event.Type == plan.StepStarted {
			first.steps = append(first.steps, event.Step)
		}
	}
	first.wantFinished()
	s.t.Logf("without a fault it took %s", got.duration.Round(100*time.Millisecond))
	for _, step := range []string{"mint", "canaries", "commit", "retire"} {
		if !slices.Contains(first.steps, step) {
			s.t.Fatalf("these are not the steps of a rotation: %v", first.steps)
		}
	}
	for _, step := range first.steps {
		s.t.Run("behind "+step, func(t *testing.T) {
			r := s.in(t).watchRotation(first.steps)
			killed := r.runWithFault(faultKill, step, rotatePassword...)
			r.wantFault(killed, faultKill, step)
			r.lockIsFree(10 * time.Second)
			r.wantCutShort(step)
			switch {
			case r.is(step, "retire"): // there is nothing left to finish
				if again := r.must("secrets", "rotate", "--due"); again.stdout != "nothing is due\n" {
					t.Errorf("there is something left to do\n%v", again)
				}
			case !r.is(step, "mint"): // nothing has begun; the next kill is the next run
				return
			default:
				again := r.must(rotatePassword...)
				r.says(again, 0, "finishing the rotation that was begun")
				t.Logf("killed after %s, finished in %s", killed.duration.Round(100*time.Millisecond), again.duration.Round(100*time.Millisecond))
			}
			r.wantFinished()
		})
	}
}

func (s *testSite) killWithinCanaries() {
	r := s.watchRotation([]string{"canaries"})
	when := moment{step: "canaries", kind: plan.StepProgress, says: "job hello: "}
	s.runUntil(when, func(process *os.Process) { _ = process.Kill() }, rotatePassword...)
	s.lockIsFree(10 * time.Second)
	s.serves()
	r.wantCredentials(r.old, true)
	s.says(s.must("secrets", "rotate", "--due", "--drain=0s"), 0, "finishing the rotation that was begun")
	r.wantFinished()
}

// deployGoesOn has a deploy come next, on both sides of the point of no return.
func (s *testSite) deployGoesOn() {
	for _, test := range []struct {
		name, kill string
		when       *moment
	}{
		{name: "within its canaries", when: &moment{step: "canaries", kind: plan.StepProgress, says: "job hello: "}},
		{name: "behind its canaries", kill: "canaries"},
		{name: "behind the commit", kill: "commit"},
	} {
		s.t.Run(test.name, func(t *testing.T) {
			s := s.in(t)
			r := s.watchRotation([]string{"mint", "canaries", "commit", "retire"})
			step := "canaries"
			if test.when != nil {
				s.runUntil(*test.when, func(process *os.Process) { _ = process.Kill() }, rotatePassword...)
			} else {
				step = test.kill
				s.wantFault(s.runWithFault(faultKill, step, rotatePassword...), faultKill, step)
			}
			s.lockIsFree(10 * time.Second)
			got := s.must("deploy")
			t.Logf("the deploy took %s", got.duration.Round(100*time.Millisecond))
			r.wantCutShort(step)
			if found := s.running("hello"); len(found) != 1 {
				t.Errorf("after the deploy these run:\n%s", strings.Join(found, "\n"))
			}
			s.planIs()
			s.must(rotatePassword...)
			r.wantFinished()
		})
	}
}

// allJobs are those that read secrets.
var allJobs = []string{"hello", "mailer", "billing", "checker", "clock"}

// fails has a rotation of one secret fail, and insists that its generation was
// given up and is gone for good, and that all else is as it was.
func (s *testSite) fails(secret, because string, rotate func() result) {
	s.t.Helper()
	before := s.secretRows()
	b := s.bao()
	failed, _ := b.generationsOf(secret)
	if before[secret].Candidate == 0 {
		failed++ // none is on its way yet
	}
	got := rotate()
	s.says(got, 3, "error: ", "hint: ", "the next generation of ", secret, "every consumer runs on the generation that it had")
	for name, row := range s.secretRows() {
		if row.State != deploy.SecretOK || row.Generation != before[name].Generation || row.Candidate+row.Retiring > 0 {
			s.t.Errorf("of %s the status is %+v", name, row)
		}
		if name == secret && row.Failed != failed || name != secret && row.Failed != before[name].Failed {
			s.t.Errorf("of %s generation %d failed, says the status", name, row.Failed)
		}
	}
	if what := s.history(secret, failed); what[len(what)-1] != "failed" {
		s.t.Errorf("the history of generation %d is %q", failed, what)
	}
	s.says(s.must("secrets", "history", secret), 0, because)
	if newest, gone := b.generationsOf(secret); newest != failed+1 || !slices.Contains(gone, failed) || slices.Contains(gone, before[secret].Generation) {
		s.t.Errorf("of %d generations %v are destroyed", newest, gone)
	}
	if job, _, _ := strings.Cut(secret, "."); job != "hello" {
		s.wantAccepted(job, "the value that it had", b.value(secret, before[secret].Generation), true)
	}
	s.planIs()
}

// feedsNext brings a good value, and insists that everybody follows.
func (s *testSite) feedsNext(secret, value string) {
	s.t.Helper()
	newest, _ := s.bao().generationsOf(secret)
	s.says(s.feed(value, "secrets", "rotate", secret, "--from-file=-", "--drain=0s"), 0)
	job, _, _ := strings.Cut(secret, ".")
	s.wantAccepted(job, "the next value", value, true)
	if row := s.secretRows()[secret]; row.State != deploy.SecretOK || row.Generation != newest+1 || row.Candidate+row.Retiring > 0 {
		s.t.Errorf("the status is %+v", row)
	}
	s.wantHistory(secret, newest+1, "minted", "canaries healthy", "promoted")
	s.planIs()
}

func (s *testSite) refusedByConsumer() {
	const secret, planted = "mailer.api_key", "live-but-refused-4711"
	s.stays(allJobs, func() {
		s.fails(secret, "its canary failed", func() result {
			got := s.feed(planted, "secrets", "rotate", secret, "--from-file=-", "--drain=0s")
			if strings.Contains(got.stdout+got.stderr, planted) || !strings.Contains(got.stderr, "the provider says no to [") {
				s.t.Errorf("it shows the value, or no log\n%v", got)
			}
			return got
		})
	})
	s.feedsNext(secret, "live-2")
}

func (s *testSite) refusedByCheck() {
	s.stays(allJobs, func() {
		s.fails("mailer.api_key", "its check failed", func() result {
			return s.feed("test-1", "secrets", "rotate", "mailer.api_key", "--from-file=-", "--drain=0s")
		})
	})
	s.feedsNext("mailer.api_key", "live-3")

	s.t.Run("of a job that cannot run twice, by the run after one that was killed", func(t *testing.T) {
		s := s.in(t)
		const planted = "live-but-withdrawn"
		file := filepath.Join(s.folder(map[string]string{"value": planted}), "value")
		args := []string{"secrets", "rotate", "billing.token", "--from-file=" + file, "--drain=0s"}
		s.wantFault(s.runWithFault(faultKill, "canaries", args...), faultKill, "canaries")
		s.lockIsFree(10 * time.Second)
		s.wantAccepted("billing", "what is tried", planted, true)
		s.wantAccepted("clock", "what is tried", planted, true)
		catalogue := filepath.Join("jobs", "billing", "component.hcl")
		s.commit("a stricter check", map[string]string{catalogue: s.replace(catalogue, `"^live-"`, `"^live-[0-9]"`)})
		s.stays([]string{"hello", "mailer", "checker", "clock"}, func() {
			s.fails("billing.token", "its check failed", func() result { return s.run("secrets", "rotate", "--due") })
		})
		s.wantAccepted("clock", "the value that it had", "live-1", true)
		s.feedsNext("billing.token", "live-2")
	})
}

func (s *testSite) consumerEnds() {
	generated := []string{"checker.token", "clock.key", ownPassword}
	before := s.secretRows()
	b := s.bao()
	sum := sha256.Sum256([]byte(b.value("checker.token", before["checker.token"].Generation)))
	s.host.shell("echo -n " + hex.EncodeToString(sum[:]) + " > /srv/keeper/lives-with")
	s.stays([]string{"hello", "mailer", "billing", "clock"}, func() {
		got := s.run("secrets", "rotate", "--all", "--drain=0s")
		s.says(got, 3, "job checker: exit on ", "every consumer runs on the generation that it had")
		s.planIs()
	})
	after := s.secretRows()
	for _, secret := range generated { // those of healthy canaries too
		row, newest := after[secret], 0
		if newest, _ = b.generationsOf(secret); row.State != deploy.SecretOK || row.Generation != before[secret].Generation || row.Failed != newest-1 {
			s.t.Errorf("the status is %+v", row)
		}
		if what := s.history(secret, row.Failed); !slices.Equal(what, []string{"minted", "failed"}) {
			s.t.Errorf("the history of generation %d of %s is %q", row.Failed, secret, what)
		}
	}
	if may := s.psql("postgres", `SELECT count(*) FROM pg_authid WHERE rolcanlogin AND rolname ~ '^hello'`); may != "1" {
		s.t.Errorf("%s logins of the application are open", may)
	}
	s.serves()
	s.wantAccepted("checker", "what it did not live with", b.value("checker.token", after["checker.token"].Failed), false)
	s.wantAccepted("checker", "the value that it had", b.value("checker.token", before["checker.token"].Generation), true)

	s.host.exec("rm", "/srv/keeper/lives-with")
	s.stays([]string{"mailer", "billing", "clock"}, func() { s.must("secrets", "rotate", "--all", "--drain=0s") })
	for _, secret := range generated {
		row := s.secretRows()[secret]
		if row.State != deploy.SecretOK || row.Generation != after[secret].Failed+2 {
			s.t.Errorf("the status is %+v", row)
		}
		if job, _, _ := strings.Cut(secret, "."); job != "hello" {
			s.wantAccepted(job, "the next value", b.value(secret, row.Generation), true)
		}
	}
	s.serves()
	s.planIs()
}

func (s *testSite) followsBySignal() {
	const secret = "clock.key"
	b := s.bao()
	old := s.secretRows()[secret].Generation
	value := b.value(secret, old)
	next, _ := b.generationsOf(secret)
	next++
	s.stays(allJobs, func() { s.must("secrets", "rotate", secret, "--drain=0s") })
	s.wantAccepted("clock", "the old value", value, false)
	s.wantAccepted("clock", "the next value", b.value(secret, next), true)
	s.wantHistory(secret, next, "minted", "canaries healthy", "promoted")
	s.planIs()
}

func (s *testSite) acceptsBoth() {
	const secret = "checker.token"
	b := s.bao()
	generation := s.secretRows()[secret].Generation
	old := b.value(secret, generation)
	number, _ := b.generationsOf(secret)
	number++
	rotate := []string{"secrets", "rotate", secret, "--detach"}

	s.wantFault(s.runWithFault(faultKill, "canaries", rotate...), faultKill, "canaries")
	next := b.value(secret, number)
	s.wantAccepted("checker", "the old value", old, true)
	if by, of := s.accepted("checker", next); by != 2 || of != 2 {
		s.t.Errorf("%d of %d accept the value that is tried, not the canary and who was there before", by, of)
	}
	s.lockIsFree(10 * time.Second)

	s.must(rotate...)
	s.wantAccepted("checker", "the old value", old, true)
	s.wantAccepted("checker", "the next value", next, true)
	row := s.secretRows()[secret]
	if row.State != deploy.SecretRetiring || row.Generation != number || row.Retiring != generation {
		s.t.Errorf("the status is %+v", row)
	}
	s.planIs()
	s.t.Run("while it drains nothing is due", func(t *testing.T) { s.in(t).nothingIsDue() })

	s.must("secrets", "rotate", "--due", "--drain=0s")
	s.wantAccepted("checker", "the old value", old, false)
	s.wantAccepted("checker", "the next value", next, true)
	if b.value(secret, generation) != "" || b.value(secret, number) != next {
		s.t.Error("the old value is not gone, or the new one is")
	}
	if what := s.history(secret, generation); what[len(what)-1] != "retired" {
		s.t.Errorf("the history of the old generation is %q", what)
	}
	s.planIs()
}

// commandsOverSSH are what is run on the host over SSH while do runs.
func (s *testSite) commandsOverSSH(do func()) []string {
	s.t.Helper()
	const config = "/etc/ssh/sshd_config.d/00-test.conf"
	s.host.shell("echo 'LogLevel VERBOSE' > " + config + "; systemctl reload ssh")
	defer s.host.shell("rm " + config + "; systemctl reload ssh")
	seen := func() (lines []string) {
		for line := range strings.Lines(s.host.shell("journalctl --sync; journalctl --unit=ssh --output=cat --no-pager")) {
			if strings.Contains(line, "Starting session: ") {
				lines = append(lines, line)
			}
		}
		return lines
	}
	before := len(seen())
	do()
	return seen()[before:]
}

func (s *testSite) nothingIsDue() {
	s.writesNothing("--due", func() {
		if commands := s.commandsOverSSH(func() {
			if got := s.must("secrets", "rotate", "--due"); got.stdout != "nothing is due\n" {
				s.t.Errorf("something is due\n%v", got)
			}
		}); len(commands) != 1 {
			s.t.Errorf("it ran this on the host, not one command: %q", commands)
		}
	})
	if commands := s.commandsOverSSH(func() { s.must("secrets", "status") }); len(commands) == 0 {
		s.t.Error("no commands are seen at all: this proves nothing")
	}
}

func (s *testSite) noValue() {
	s.stays(allJobs, func() {
		s.writesNothing("a rotation without a value", func() {
			s.wantRefusal(s.run("secrets", "rotate", "mailer.api_key"), []string{"mailer.api_key is external", "must be brought"},
				[]string{"site secrets rotate mailer.api_key --from-file=FILE"})
			s.wantRefusal(s.run("secrets", "rotate", "mailer.api_key", "clock.key"), []string{"mailer.api_key is external"}, []string{"--from-file"})
		})
	})
	s.lockIsFree(time.Second)
}

func TestWhatCannotRotateIsSaidBeforeAnyHostIsTouched(t *testing.T) {
	s, it := newLocalSite(t)
	s.host = &testHost{site: s} // there is none
	component := `
secret "key" {
  generated {}
}

secret "password" {
  generated {}
}

secret "ticket" {
  produced_by {
    component = "maker"
  }
}

secret "payment_key" {
  external {}
}

role "hello" {
  login    = true
  password = "password"
}
`
	s.commit("a catalogue", map[string]string{
		"jobs/hello/component.hcl":   component,
		"jobs/maker/component.hcl":   "",
		"jobs/maker/maker.nomad.hcl": strings.ReplaceAll(plainJob, `"hello"`, `"maker"`),
		filepath.Join("sites", name, "site.hcl"): strings.Replace(trappedSiteHCL(it.port), "component \"hello\" {}",
			"component \"openbao\" {}\n\n  component \"postgresql\" {}\n\n  component \"maker\" {}\n\n  component \"hello\" {}", 1),
	})
	value := filepath.Join(s.folder(map[string]string{"value": plantedSecret}), "value")
	for title, test := range map[string]struct{ args, says, hints []string }{
		"nothing":                           {nil, []string{"say what to rotate"}, []string{"--due"}},
		"an unknown name":                   {[]string{"hello.kei"}, []string{`no secret "hello.kei"`, `"hello.key"?`}, []string{"site secrets status"}},
		"all, and a name":                   {[]string{"--all", "hello.key"}, []string{"--all"}, []string{"one of them"}},
		"what is due, and a name":           {[]string{"--due", "hello.key"}, []string{"--due"}, []string{"one of them"}},
		"a password with one login":         {[]string{"hello.password"}, []string{"hello.password", `role "hello"`, "one login"}, []string{"alternating = true"}},
		"what a component produces":         {[]string{"hello.ticket"}, []string{"hello.ticket is produced by component maker"}, []string{"write a new value"}},
		"a value for what is generated":     {[]string{"hello.key", "--from-file=" + value}, []string{"hello.key is generated"}, []string{"--from-file"}},
		"one value for two":                 {[]string{"hello.key", "hello.payment_key", "--from-file=" + value}, []string{"want one name, got 2"}, []string{"command line"}},
		"a value in a folder":               {[]string{"hello.payment_key", "--from-file=" + filepath.Dir(value)}, []string{"not a regular file"}, []string{"--from-file=-"}},
		"roots that are due":                {[]string{"--due", "--roots"}, []string{"never due"}, []string{"--roots"}},
		"a root without the token":          {[]string{"gossip"}, []string{"gossip", "init.age"}, []string{"--root-token-file"}},
		"a drain that is none":              {[]string{"hello.key", "--drain=long"}, []string{`--drain "long"`}, []string{"10m"}},
		"a drain that is over":              {[]string{"hello.key", "--drain=-1s"}, []string{`--drain "-1s"`}, []string{"10m"}},
		"a host that there is not":          {[]string{"hello.key", "--retire-without-host=two"}, []string{`no host "two"`}, []string{"site status"}},
		"several at once, all of them said": {[]string{"hello.kei", "hello.password", "hello.ticket"}, []string{"hello.kei", "hello.password", "hello.ticket"}, []string{"alternating"}},
	} {
		t.Run(title, func(t *testing.T) {
			s := s.in(t)
			before := it.calls.Load()
			s.wantRefusal(s.run(append([]string{"secrets", "rotate"}, test.args...)...), test.says, test.hints)
			if calls := it.calls.Load() - before; calls > 0 {
				t.Errorf("the host was connected to %d times", calls)
			}
		})
	}
	t.Run("what can rotate brings one to the host", func(t *testing.T) {
		s := s.in(t)
		got := s.run("secrets", "rotate", "hello.key")
		if it.calls.Load() == 0 {
			t.Errorf("a trap that nobody can reach proves nothing\n%v", got)
		}
	})
}
