// Package job holds the pure half of converging Nomad jobs: the plain states,
// the digest that decides a no-op, and the diff.
package job

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/nomad-site/site/internal/plan"
)

// Kind is the plan.Change kind of every change to a job.
const Kind = "job"

// The keys of the job meta by which a job is known as ours. Tasks see them as
// NOMAD_META_<key>.
const (
	MetaSite       = "site_name"
	MetaComponent  = "site_component"
	MetaGitSHA     = "site_git_sha"
	MetaSpecDigest = "site_spec_digest"
	MetaArtifacts  = "site_artifacts"
	// MetaSecrets is JSON of the generations that the job's templates read.
	MetaSecrets = "site_secrets"
	// MetaSecretsEngine is what counts those generations. One that was initialised
	// anew begins at 1 again: without this, a job that reads generation 1 would
	// look up to date, and hold the value of the one before.
	MetaSecretsEngine = "site_secrets_engine"
	// MetaTrial is set only on a job that was registered to be tried first, to one
	// of the two values below: its update blocks are not those of the spec.
	MetaTrial = "site_trial"
	// MetaDeployID is set only where a failed rollout of the same spec is
	// retried: Nomad starts nothing for a version whose deployment failed.
	MetaDeployID = "site_deploy_id"
)

// How a job is tried.
const (
	// TrialCanary is a job of which a canary of each group was started at first.
	TrialCanary = "canary"
	// TrialWhole is a job that cannot have canaries, and that goes back by itself.
	TrialWhole = "whole"
)

// Desired is one job as the site wants it.
type Desired struct {
	Site      string
	Component string
	JobID     string
	Type      string
	// Spec is the whole job, meta included, as canonical JSON that can be
	// registered again later.
	Spec       []byte
	SpecDigest string
	// Artifacts maps names to digests ("sha256:…").
	Artifacts map[string]string
	// Secrets maps full names ("shop.key") to the generations that templates read.
	Secrets map[string]int
	GitSHA  string
	// Adopt allows taking over a job that was registered by others.
	Adopt bool
}

// Actual is one job as Nomad has it; the zero value is a job that was never registered.
type Actual struct {
	Exists bool
	// Stopped is what `nomad job stop` leaves; Dead is a job without anything
	// left to run, which is what a finished batch job is too.
	Stopped bool
	Dead    bool

	Version     uint64
	ModifyIndex uint64
	Type        string

	// From the job's meta; empty for jobs of others.
	Site       string
	Component  string
	SpecDigest string
	GitSHA     string
	DeployID   string
	Artifacts  map[string]string
	Secrets    map[string]int
	// SecretsEngine counts them; empty for jobs that read none.
	SecretsEngine string
	// Trial is TrialCanary, TrialWhole, or empty for a job that was registered as its spec says.
	Trial string

	Health Health
	// PlanDiff is the server's own diff against the desired spec, one readable
	// line each; empty where registering would change nothing.
	PlanDiff []string
}

// Health says whether a job does what its spec says.
type Health struct {
	Healthy bool `json:"healthy"`
	// Waiting is a job that is not healthy yet but has not failed either:
	// its deployment runs, or an evaluation is blocked.
	Waiting bool   `json:"waiting,omitempty"`
	Reason  string `json:"reason,omitempty"`
}

// Ours reports whether the job carries our meta for the site.
func (a Actual) Ours(site string) bool { return a.Exists && a.Site == site }

// ForeignError is a job that exists and was registered by someone else.
type ForeignError struct {
	JobID string
	// Site is set where the job belongs to another site.
	Site string
}

func (e *ForeignError) Error() string {
	if e.Site != "" {
		return fmt.Sprintf("job %q belongs to site %q", e.JobID, e.Site)
	}
	return fmt.Sprintf("job %q was registered by someone else", e.JobID)
}

// Hint implements plan.Hinter.
func (e *ForeignError) Hint() string {
	return fmt.Sprintf("rename the component's job, adopt it with: site adopt %s, or stop it with: nomad job stop -purge %s", e.JobID, e.JobID)
}

// Refuse returns a *ForeignError for each desired job that is someone else's
// and was not adopted; nothing may be written where it returns an error. A
// stopped job of others counts too: its history is not ours.
func Refuse(desired []Desired, actual map[string]Actual) error {
	var errs []error
	for _, want := range desired {
		have := actual[want.JobID]
		if have.Exists && have.Site != want.Site && !want.Adopt {
			errs = append(errs, &ForeignError{JobID: want.JobID, Site: have.Site})
		}
	}
	return errors.Join(errs...)
}

// Diff compares the jobs in the order given. Call Refuse first: Diff reports a
// job of others as one to be adopted.
func Diff(desired []Desired, actual map[string]Actual) []plan.Change {
	var changes []plan.Change
	for _, want := range desired {
		if change, differs := diffOne(want, actual[want.JobID]); differs {
			changes = append(changes, change)
		}
	}
	return changes
}

func diffOne(want Desired, have Actual) (plan.Change, bool) {
	change := plan.Change{
		Kind:         Kind,
		Target:       want.JobID,
		Precondition: Precondition(have.ModifyIndex),
		Details:      have.PlanDiff,
	}
	switch {
	case !have.Exists:
		change.Action, change.Reason = plan.Create, "not registered"
		change.Precondition = Precondition(0)
	case have.Site != want.Site:
		change.Action, change.Reason = plan.Update, "adopted"
	case have.SpecDigest != want.SpecDigest:
		change.Action, change.Reason = plan.Update, specReason(want, have)
	case have.Stopped:
		change.Action, change.Reason = plan.Start, "job was stopped"
	case len(have.PlanDiff) > 0:
		// Same digest, and yet the server sees a difference: someone scaled or
		// edited the job and kept our meta.
		change.Action, change.Reason = plan.Update, "job was changed by hand"
	case !have.Health.Healthy && have.Health.Waiting:
		change.Action, change.Reason = plan.Start, "waiting: "+have.Health.Reason
	case !have.Health.Healthy:
		change.Action, change.Reason = plan.Restart, have.Health.Reason
	default:
		return plan.Change{}, false
	}
	return change, true
}

// OnlyWaits reports whether a job that differs was registered as wanted and is
// on its way: it is waited for, not registered again.
func OnlyWaits(want Desired, have Actual) bool {
	_, differs := diffOne(want, have)
	return differs && have.Ours(want.Site) && have.SpecDigest == want.SpecDigest &&
		!have.Stopped && len(have.PlanDiff) == 0 && have.Health.Waiting
}

func specReason(want Desired, have Actual) string {
	var names []string
	for name, digest := range want.Artifacts {
		if old, known := have.Artifacts[name]; known && old != digest {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	var reasons []string
	switch len(names) {
	case 0:
	case 1:
		reasons = append(reasons, fmt.Sprintf("artifact %s changed", names[0]))
	default:
		reasons = append(reasons, fmt.Sprintf("artifacts %s changed", strings.Join(names, ", ")))
	}
	if reasons = append(reasons, secretReasons(want.Secrets, have.Secrets)...); len(reasons) == 0 {
		return "spec changed"
	}
	return strings.Join(reasons, ", ")
}

// secretReasons names the secrets of which a job is to read another generation.
func secretReasons(want, have map[string]int) []string {
	var reasons []string
	for _, name := range slices.Sorted(maps.Keys(want)) {
		if old, known := have[name]; known && old != want[name] {
			reasons = append(reasons, fmt.Sprintf("secret %s %d → %d", name, old, want[name]))
		}
	}
	return reasons
}

// Precondition is the state of a job that a register insists on.
func Precondition(modifyIndex uint64) string {
	if modifyIndex == 0 {
		return "not registered"
	}
	return fmt.Sprintf("modify index %d", modifyIndex)
}

// Orphans returns, sorted, the jobs of the site that are running and that no
// component declares. They are stopped only when the user asks for it.
func Orphans(site string, desired []Desired, actual map[string]Actual) []string {
	declared := map[string]bool{}
	for _, want := range desired {
		declared[want.JobID] = true
	}
	var orphans []string
	for id, have := range actual {
		if !declared[id] && have.Ours(site) && !have.Stopped {
			orphans = append(orphans, id)
		}
	}
	slices.Sort(orphans)
	return orphans
}

// DiffOrphans is what --prune adds to a plan.
func DiffOrphans(site string, desired []Desired, actual map[string]Actual) []plan.Change {
	var changes []plan.Change
	for _, id := range Orphans(site, desired, actual) {
		changes = append(changes, plan.Change{
			Action: plan.Delete, Kind: Kind, Target: id,
			Reason:       "no component declares it",
			Precondition: Precondition(actual[id].ModifyIndex),
		})
	}
	return changes
}

// CanonicalJSON is raw with sorted keys and without nulls, so that a field
// which a newer client library knows and nobody sets changes no digest.
func CanonicalJSON(raw []byte) ([]byte, error) {
	decoder := json.NewDecoder(bytes.NewReader(raw))
	decoder.UseNumber()
	var document any
	if err := decoder.Decode(&document); err != nil {
		return nil, fmt.Errorf("decode job: %w", err)
	}
	var buffer bytes.Buffer
	encoder := json.NewEncoder(&buffer)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(withoutNulls(document)); err != nil {
		return nil, fmt.Errorf("encode job: %w", err)
	}
	return bytes.TrimSpace(buffer.Bytes()), nil
}

func withoutNulls(value any) any {
	switch value := value.(type) {
	case map[string]any:
		for key, member := range value {
			if member == nil {
				delete(value, key)
				continue
			}
			value[key] = withoutNulls(member)
		}
	case []any:
		for i := range value {
			value[i] = withoutNulls(value[i])
		}
	}
	return value
}

// serverFields are set by the server at registration and no part of a spec.
var serverFields = []string{
	"CreateIndex", "ModifyIndex", "JobModifyIndex", "Version", "Status",
	"StatusDescription", "Stable", "SubmitTime", "Stop", "NomadTokenID", "VersionTag",
}

// SpecDigest names what a job runs. The git sha, the deploy id and the digest
// itself are left out: a commit that changes nothing of a job is a no-op.
func SpecDigest(spec []byte) (string, error) {
	var document map[string]any
	decoder := json.NewDecoder(bytes.NewReader(spec))
	decoder.UseNumber()
	if err := decoder.Decode(&document); err != nil {
		return "", fmt.Errorf("decode job: %w", err)
	}
	for _, field := range serverFields {
		delete(document, field)
	}
	if meta, ok := document["Meta"].(map[string]any); ok {
		for _, key := range []string{MetaGitSHA, MetaDeployID, MetaSpecDigest, MetaTrial} {
			delete(meta, key)
		}
	}
	raw, err := json.Marshal(document)
	if err != nil {
		return "", fmt.Errorf("encode job: %w", err)
	}
	canonical, err := CanonicalJSON(raw)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(canonical)
	return "sha256:" + hex.EncodeToString(sum[:]), nil
}
