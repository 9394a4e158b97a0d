package deploy

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/nomad-site/site/internal/adapter/builder"
	"github.com/nomad-site/site/internal/adapter/nomad"
	"github.com/nomad-site/site/internal/adapter/openbao"
	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/reconcile/job"
	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/site"
)

// loopback is the one address of every artifact.
const loopback = "127.0.0.1:7380"

// The steps that run jobs.
const (
	platformStep = "platform jobs"
	jobsStep     = "jobs"
)

// waves runs jobs in the order in which they need each other. The waves are
// known once the configuration is read, which is when the step begins.
type waves struct {
	s     *session
	title string
	// picks says which components are this step's.
	picks      func(site.Component) bool
	components [][]site.Component
	steps      []*plan.Reconciler[[]*nomad.Prepared, map[string]job.Actual]
	plans      [][]plan.Change
}

var _ plan.Step = (*waves)(nil)

// runPlatformJobs runs what other jobs need: it has no secrets and waits for none.
func (s *session) runPlatformJobs() plan.Step {
	isPlatform := func(c site.Component) bool { return c.Platform }
	return where{
		&waves{s: s, title: platformStep, picks: isPlatform},
		func() bool { return slices.ContainsFunc(s.activeComponents(), isPlatform) },
	}
}

// runWaves runs the site's own jobs, but for those that wait for a secret which
// nobody gave yet.
func (s *session) runWaves() plan.Step {
	return &waves{s: s, title: jobsStep, picks: func(c site.Component) bool { return !c.Platform && s.blocked[c.Name] == "" }}
}

func (w *waves) Name() string { return w.title }

// Plan looks at every wave at once: what a later wave changes does not depend
// on whether an earlier one ran.
func (w *waves) Plan(ctx context.Context) ([]plan.Change, error) {
	if w.s.nomad == nil {
		return nil, &plan.UnknownError{Until: "nomad"}
	}
	w.components, w.steps, w.plans = nil, nil, nil
	mine := slices.DeleteFunc(w.s.activeComponents(), func(c site.Component) bool { return !w.picks(c) })
	var all []plan.Change
	for _, components := range job.Waves(mine, w.s.site.WaitsFor) {
		step := w.s.waveStep(components)
		changes, err := step.Plan(ctx)
		if err != nil {
			return nil, err
		}
		w.components, w.steps, w.plans = append(w.components, components), append(w.steps, step), append(w.plans, changes)
		all = append(all, changes...)
	}
	if w.title == platformStep {
		w.s.platformPending = len(all) > 0
		return all, nil
	}
	orphans, err := w.s.orphans(ctx)
	if err != nil {
		return nil, err
	}
	if w.s.options.Prune {
		return append(all, orphans...), nil
	}
	for _, orphan := range orphans {
		w.s.options.Warn(fmt.Sprintf("job %s belongs to this site and no component declares it: stop it with --prune", orphan.Target))
	}
	return all, nil
}

func (w *waves) Apply(ctx context.Context, changes []plan.Change, progress plan.Progress) error {
	if err := w.s.clientsReady(ctx, progress); err != nil {
		return err
	}
	for i, step := range w.steps {
		if len(w.plans[i]) > 0 {
			if err := step.Apply(ctx, w.plans[i], progress); err != nil {
				return err
			}
		}
		if i < len(w.steps)-1 { // somebody may wait for what this wave produces
			if err := w.s.awaitProduced(ctx, w.components[i], progress); err != nil {
				return err
			}
		}
	}
	for _, change := range changes {
		if change.Action == plan.Delete {
			if err := w.s.nomad.Stop(ctx, change.Target); err != nil {
				return err
			}
		}
	}
	return nil
}

func (s *session) activeComponents() []site.Component {
	return slices.DeleteFunc(slices.Clone(s.site.Components), func(c site.Component) bool { return !s.active(c.Name) })
}

// orphans are the jobs of this site that no component declares, as deletions.
func (s *session) orphans(ctx context.Context) ([]plan.Change, error) {
	if len(s.options.Only) > 0 {
		return nil, nil
	}
	actual, err := s.nomad.ObserveSite(ctx, s.site.Name)
	if err != nil {
		return nil, err
	}
	var desired []job.Desired
	for _, prepared := range s.jobs {
		desired = append(desired, prepared.Desired)
	}
	for name := range s.blocked { // declared, though not prepared by this run
		desired = append(desired, job.Desired{JobID: name})
	}
	return job.DiffOrphans(s.site.Name, desired, actual), nil
}

// waveStep converges the jobs that can start together.
func (s *session) waveStep(components []site.Component) *plan.Reconciler[[]*nomad.Prepared, map[string]job.Actual] {
	return &plan.Reconciler[[]*nomad.Prepared, map[string]job.Actual]{
		Title: "jobs",
		Desire: func(ctx context.Context) ([]*nomad.Prepared, error) {
			var prepared []*nomad.Prepared
			var problems []error
			for _, component := range components {
				one, err := s.prepare(ctx, component)
				if err != nil {
					problems = append(problems, err)
					continue
				}
				s.jobs[component.Name] = one
				prepared = append(prepared, one)
			}
			return prepared, errors.Join(problems...)
		},
		Observe: func(ctx context.Context, desired []*nomad.Prepared) (map[string]job.Actual, error) {
			actual := map[string]job.Actual{}
			for _, one := range desired {
				found, err := s.nomad.Observe(ctx, one)
				if err != nil {
					return nil, err
				}
				actual[one.Desired.JobID] = found
			}
			if err := job.Refuse(states(desired), actual); err != nil {
				return nil, err
			}
			return actual, s.observeLive(ctx, desired)
		},
		Diff: func(desired []*nomad.Prepared, actual map[string]job.Actual) []plan.Change {
			return append(job.Diff(states(desired), actual), s.diffLive(desired)...)
		},
		Converge: func(ctx context.Context, desired []*nomad.Prepared, actual map[string]job.Actual, changes []plan.Change, progress plan.Progress) error {
			return s.rollOut(ctx, desired, actual, changes, progress)
		},
		// Wait has seen each job healthy with the digests asked for.
		Settled: func(context.Context, []*nomad.Prepared) error { return nil },
	}
}

func states(prepared []*nomad.Prepared) []job.Desired {
	desired := make([]job.Desired, len(prepared))
	for i, one := range prepared {
		desired[i] = one.Desired
	}
	return desired
}

// kindLive is the plan.Change kind of the generations that templates read which
// restart nothing.
const kindLive = "secret generations"

// observeLive finds the jobs whose templates read other generations through
// their Nomad variable.
func (s *session) observeLive(ctx context.Context, desired []*nomad.Prepared) error {
	for _, one := range desired {
		pinned := s.pinned[one.Desired.Component]
		differs, err := s.liveDiffers(ctx, pinned.live)
		if err != nil {
			return err
		}
		pinned.stale = differs
	}
	return nil
}

func (s *session) diffLive(desired []*nomad.Prepared) []plan.Change {
	var changes []plan.Change
	for _, one := range desired {
		if s.pinned[one.Desired.Component].stale {
			changes = append(changes, plan.Change{
				Action: plan.Update, Kind: kindLive, Target: one.Desired.JobID, Reason: "its templates follow without a restart",
			})
		}
	}
	return changes
}

// prepare has Nomad parse a component's jobspec, with the addresses of its artifacts.
func (s *session) prepare(ctx context.Context, component site.Component) (*nomad.Prepared, error) {
	declared, diagnostics := site.JobspecVariables(component.Jobspec, component.JobspecPath)
	if diagnostics.HasErrors() {
		return nil, diagnostics
	}
	addresses, digests := map[string]string{}, map[string]string{}
	for _, built := range s.built[component.Name] {
		addresses[built.Name] = s.artifactAddress(built)
		digests[built.Name] = built.Digest
	}
	encoded, err := json.Marshal(addresses)
	if err != nil {
		return nil, fmt.Errorf("component %s: %w", component.Name, err)
	}
	name, err := json.Marshal(s.site.Name)
	if err != nil {
		return nil, fmt.Errorf("component %s: %w", component.Name, err)
	}
	values := maps.Clone(component.Variables)
	if values == nil {
		values = map[string]string{}
	}
	values[site.ArtifactsVariable] = string(encoded)
	values[site.SiteVariable] = string(name)
	values[site.ServerVariable] = strconv.Quote(s.site.FirstServer())
	variables, err := site.VariablesHCL(declared, values)
	if err != nil {
		return nil, fmt.Errorf("component %s: %w", component.Name, err)
	}
	parsed, err := s.nomad.Parse(ctx, nomad.Jobspec{Path: component.JobspecPath, Content: component.Jobspec}, variables)
	if err != nil {
		return nil, err
	}
	pins, err := s.pinsFor(component)
	if err != nil {
		return nil, err
	}
	pinned, err := pin(parsed, nomad.Brief{Site: s.site.Name, Component: component.Name, GitSHA: s.sha, Artifacts: digests}, pins)
	if err != nil {
		return nil, err
	}
	s.pinned[component.Name] = pinned
	return pinned.Prepared, nil
}

func (s *session) artifactAddress(built builder.Built) string {
	if built.Kind == site.Image {
		return fmt.Sprintf("%s/%s/%s@%s", loopback, s.site.Name, built.Name, built.Digest)
	}
	return fmt.Sprintf("http://%s/artifacts/%s/%s@%s", loopback, s.site.Name, built.Name, built.Digest)
}

// rollOut registers the jobs that differ, at the state that the plan saw, and
// waits until all are healthy. All failures are reported, not only the first.
func (s *session) rollOut(ctx context.Context, desired []*nomad.Prepared, actual map[string]job.Actual, changes []plan.Change, progress plan.Progress) error {
	var mutex sync.Mutex
	var problems []error
	var group errgroup.Group
	for _, one := range desired {
		id := one.Desired.JobID
		if !slices.ContainsFunc(changes, func(change plan.Change) bool { return change.Target == id }) {
			continue
		}
		moves := slices.ContainsFunc(changes, func(change plan.Change) bool { return change.Target == id && change.Kind == job.Kind })
		group.Go(func() error {
			// New tasks find their generations there.
			err := s.nomad.PutLive(ctx, s.pinned[one.Desired.Component].live)
			if err == nil && moves {
				err = s.rollOutOne(ctx, one, actual[id], progress)
			}
			if err != nil {
				mutex.Lock()
				defer mutex.Unlock()
				problems = append(problems, err)
			}
			return nil
		})
	}
	_ = group.Wait()
	slices.SortFunc(problems, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
	if len(problems) == 1 {
		return problems[0]
	}
	return errors.Join(problems...)
}

func (s *session) rollOutOne(ctx context.Context, one *nomad.Prepared, have job.Actual, progress plan.Progress) error {
	registered := &nomad.Registration{JobID: one.Desired.JobID, Version: have.Version, ModifyIndex: have.ModifyIndex}
	if !job.OnlyWaits(one.Desired, have) {
		var err error
		if registered, err = s.nomad.Register(ctx, one, have.ModifyIndex); err != nil {
			return err
		}
	}
	for _, warning := range registered.Warnings {
		s.options.Warn(fmt.Sprintf("job %s: %s", one.Desired.JobID, warning))
	}
	return s.nomad.Wait(ctx, one, registered, nomad.WaitOptions{Limit: s.left(), Redact: s.redactor(ctx, one.Desired.Component)}, progress)
}

// redactor blacks the values of a component's secrets out of what its tasks say.
// It reads them when there is something to look through, and not before.
func (s *session) redactor(ctx context.Context, component string) func(string) string {
	mask := sync.OnceValues(func() (func(string) string, error) {
		// What is to be shown may be why ctx ended.
		limited, cancel := context.WithTimeout(context.WithoutCancel(ctx), releaseLimit)
		defer cancel()
		return s.maskOf(limited, component)
	})
	return func(line string) string {
		masked, err := mask()
		switch {
		case err == nil:
			return masked(line)
		case strings.HasPrefix(line, string(nomad.Stdout)+": "), strings.HasPrefix(line, string(nomad.Stderr)+": "):
			return "[not shown: the secrets of " + component + " could not be read, to black them out]"
		}
		return line // Nomad's own words
	}
}

func (s *session) maskOf(ctx context.Context, component string) (func(string) string, error) {
	var values []secret.Value
	for _, one := range s.site.Secrets() {
		if !slices.Contains(s.site.Consumers(one.FullName()), component) && !slices.ContainsFunc(s.site.Produces(component),
			func(produced site.Secret) bool { return produced.FullName() == one.FullName() }) {
			continue
		}
		if s.bao == nil {
			return nil, errors.New("not logged in to OpenBao")
		}
		states, err := s.bao.ObserveEntries(ctx, []site.Secret{one})
		if err != nil {
			return nil, err
		}
		// During a rotation allocations read other generations than the active one.
		rotation := states[one.FullName()].Rotation()
		for _, generation := range []int{rotation.Active, rotation.Candidate, rotation.Retiring} {
			if generation == 0 {
				continue
			}
			fields, err := s.bao.ReadGeneration(ctx, one, generation)
			var none *openbao.NoValueError
			if err != nil && !errors.As(err, &none) {
				return nil, err
			}
			values = append(values, fields.Value)
		}
	}
	return secret.Mask(values...), nil
}
