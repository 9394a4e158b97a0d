package deploy

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/nomad-site/site/internal/adapter/nomad"
	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/reconcile/job"
	"github.com/nomad-site/site/internal/retry"
	"github.com/nomad-site/site/internal/sitehost/release"
)

// consumer is a job that reads secrets which this run moves, as the last
// release recorded it: a rotation brings no new code.
type consumer struct {
	name string
	// next reads the candidates where there are some, and the active ones elsewhere.
	next *pinnedJob
	have job.Actual
	// moves: the live job is not next; signalled: templates that restart
	// nothing read other generations.
	moves, signalled bool
	trial            *nomad.Trial
}

// signalSettle is how long a job must stay healthy after its templates were
// rendered anew without a restart.
const signalSettle = 5 * time.Second

// findConsumers reads the jobs of the last release, with the generations that
// they are to read.
func (r *rotation) findConsumers(ctx context.Context) error {
	r.consumers = nil
	if len(r.secrets) == 0 {
		return nil
	}
	latest, err := r.latestRelease(ctx)
	if err != nil || latest == nil {
		return err
	}
	pins := r.pins(r.entries, true)
	var problems []error
	for _, wave := range job.Waves(r.site.Components, r.site.WaitsFor) {
		for _, component := range wave {
			recorded, deployed := latest.Components[component.Name]
			reads := slices.ContainsFunc(r.secrets, func(one *rotating) bool { return slices.Contains(r.site.Consumers(one.FullName()), component.Name) })
			if !deployed || !reads {
				continue
			}
			one, err := r.observeConsumer(ctx, component.Name, recorded, pins)
			problems = append(problems, err)
			if one != nil {
				r.consumers = append(r.consumers, one)
			}
		}
	}
	slices.SortStableFunc(r.consumers, func(a, b *consumer) int { return r.ownsFirst(a.name, b.name) })
	return errors.Join(problems...)
}

// ownsFirst puts those who declare a secret before those who borrow it: who
// checks a value learns the new one first.
func (r *rotation) ownsFirst(a, b string) int {
	owns := func(name string) int {
		if slices.ContainsFunc(r.secrets, func(one *rotating) bool { return one.Component == name }) {
			return 0
		}
		return 1
	}
	return owns(a) - owns(b)
}

func (r *rotation) observeConsumer(ctx context.Context, name string, recorded release.Component, pins nomad.Pins) (*consumer, error) {
	next, err := r.repin(name, recorded, pins)
	if err != nil {
		return nil, err
	}
	one := &consumer{name: name, next: next}
	if one.have, err = r.nomad.Observe(ctx, next.Prepared); err != nil {
		return nil, err
	}
	if !one.have.Exists || one.have.Stopped {
		return nil, nil // nobody reads anything
	}
	// Of a trial that came to its end nothing is left but its mark. One of a
	// candidate has not: it may yet have to go back.
	if !one.have.Health.Healthy || r.readsCandidate(next) {
		if one.trial, err = r.nomad.FindTrial(ctx, next.Prepared, one.have); err != nil {
			return nil, err
		}
	}
	if one.signalled, err = r.liveDiffers(ctx, next.live); err != nil {
		return nil, err
	}
	one.moves = one.have.SpecDigest != next.Desired.SpecDigest
	if !one.moves || one.trial != nil {
		return one, nil
	}
	return one, r.checkIsReleased(name, recorded, one.have)
}

// readsCandidate reports whether a job is started with a generation that is not the active one yet.
func (r *rotation) readsCandidate(next *pinnedJob) bool {
	return slices.ContainsFunc(r.secrets, func(one *rotating) bool {
		return one.state.Candidate > 0 && next.Desired.Secrets[one.FullName()] == one.state.Candidate
	})
}

// checkIsReleased refuses to move a job that runs something else than the last
// release: that would be a rollback.
func (r *rotation) checkIsReleased(name string, recorded release.Component, have job.Actual) error {
	if have.SpecDigest == recorded.SpecDigest {
		return nil
	}
	for _, pins := range []nomad.Pins{r.pins(r.entries, false), r.announcing(), r.pins(r.entries, true)} {
		known, err := r.repin(name, recorded, pins)
		if err != nil {
			return err
		}
		if known.Desired.SpecDigest == have.SpecDigest {
			return nil
		}
	}
	// A deploy that wrote new values and a rotation differ in generations alone.
	if pinned, err := r.repin(name, recorded, nomad.Pins{Engine: have.SecretsEngine, Active: have.Secrets, Previous: have.Secrets}); err == nil && pinned.Desired.SpecDigest == have.SpecDigest {
		return nil
	}
	return plan.WithHint(fmt.Errorf("job %s is not what the last release put there", name),
		"run `site deploy --site=%s` first: a rotation would take it back", r.site.Name)
}

// tryCanaries gives one allocation of each consumer the next generation. Until
// all of them are healthy, every other allocation stays as it is.
func (r *rotation) tryCanaries() plan.Step {
	return act{
		title: "canaries",
		plan: func(ctx context.Context) ([]plan.Change, error) {
			if err := r.findConsumers(ctx); err != nil {
				return nil, err
			}
			var changes []plan.Change
			for _, one := range r.consumers {
				if one.moves {
					changes = append(changes, plan.Change{
						Action: plan.Update, Kind: job.Kind, Target: one.name, Reason: "one allocation tries the next generation",
						Precondition: job.Precondition(one.have.ModifyIndex),
					})
				}
				if one.trial != nil {
					changes = append(changes, plan.Change{Action: plan.Start, Kind: job.Kind, Target: one.name, Reason: "an earlier run started its canary"})
				}
				if one.signalled {
					changes = append(changes, plan.Change{Action: plan.Update, Kind: kindLive, Target: one.name, Reason: "its templates follow without a restart"})
				}
			}
			return changes, nil
		},
		apply: func(ctx context.Context, progress plan.Progress) error {
			if err := r.try(ctx, progress); err != nil {
				return r.giveUp(ctx, err)
			}
			for _, one := range r.secrets {
				if one.state.Candidate > 0 {
					r.note("canaries healthy", one, one.state.Candidate, strings.Join(r.consumerNames(), ", "))
				}
			}
			return r.look(ctx)
		},
	}
}

func (r *rotation) consumerNames() []string {
	names := make([]string, len(r.consumers))
	for i, one := range r.consumers {
		names[i] = one.name
	}
	return names
}

// try starts canaries at the same time; a job that cannot have any is rolled as
// a whole, after those, one by one.
func (r *rotation) try(ctx context.Context, progress plan.Progress) error {
	var whole []*consumer
	var mutex sync.Mutex
	var problems []error
	var group errgroup.Group
	beside := func(do func() error) {
		group.Go(func() error {
			err := do()
			mutex.Lock()
			defer mutex.Unlock()
			problems = append(problems, err)
			return nil
		})
	}
	for _, one := range r.consumers {
		switch {
		case one.trial != nil:
			beside(func() error {
				return r.nomad.AwaitTrial(ctx, one.trial, one.next.Prepared, r.waitOptions(ctx, one), progress)
			})
			continue
		case !one.moves:
			continue
		}
		can, _, err := r.nomad.CanCanary(ctx, one.next.Prepared)
		switch {
		case err != nil:
			beside(func() error { return err })
		case can:
			beside(func() error { return r.tryOne(ctx, one, progress) })
		default: // Try says why
			whole = append(whole, one)
		}
	}
	_ = group.Wait()
	for _, one := range r.consumers {
		if one.signalled && errors.Join(problems...) == nil {
			problems = append(problems, r.signal(ctx, one, progress))
		}
	}
	for _, one := range whole {
		if errors.Join(problems...) == nil {
			problems = append(problems, r.tryOne(ctx, one, progress))
		}
	}
	return errors.Join(problems...)
}

func (r *rotation) tryOne(ctx context.Context, one *consumer, progress plan.Progress) error {
	trial, err := r.nomad.Try(ctx, one.next.Prepared, one.have, r.waitOptions(ctx, one), progress)
	one.trial = trial
	return err
}

func (r *rotation) waitOptions(ctx context.Context, one *consumer) nomad.WaitOptions {
	return nomad.WaitOptions{Limit: r.left(), Redact: r.redactor(ctx, one.name)}
}

// signal lets templates follow that restart nothing. They have no canary: all
// allocations of the job follow at once, and go back if it does not stay healthy.
func (r *rotation) signal(ctx context.Context, one *consumer, progress plan.Progress) error {
	progress.Message("job %s: its templates follow without a restart", one.name)
	if err := r.nomad.PutLive(ctx, one.next.live); err != nil {
		return err
	}
	healthySince := time.Now()
	return retry.Until(ctx, "job "+one.name+" to stay healthy", min(signalLimit, r.left()), func(ctx context.Context) error {
		have, err := r.nomad.Observe(ctx, one.next.Prepared)
		switch {
		case err != nil:
			return err
		case !have.Health.Healthy:
			healthySince = time.Now()
			return errors.New(have.Health.Reason)
		case time.Since(healthySince) < signalSettle:
			return fmt.Errorf("it must stay healthy for %s", signalSettle)
		}
		return nil
	})
}

// signalLimit bounds how long a job may take to be healthy after a signal.
const signalLimit = time.Minute

// RotationError says that a generation did not prove itself.
type RotationError struct {
	Err error
	// Names are the secrets whose generation was given up.
	Names []string
	// Reverted: every consumer runs on the generation that it had.
	Reverted bool
}

func (e *RotationError) Error() string {
	state := "every consumer runs on the generation that it had"
	if !e.Reverted {
		state = "not every consumer is back on the generation that it had"
	}
	return fmt.Sprintf("the next generation of %s failed: %v; %s", strings.Join(e.Names, ", "), e.Err, state)
}

func (e *RotationError) Unwrap() error { return e.Err }

// WasReverted decides about the exit code.
func (e *RotationError) WasReverted() bool { return e.Reverted }

// giveUp takes everything back that this rotation did, and marks the
// generations as failed. An interrupted run leaves things as they are instead:
// the next one goes on. culprits are the secrets that are known to be at fault.
func (r *rotation) giveUp(ctx context.Context, cause error, culprits ...string) error {
	if ctx.Err() != nil || r.committed() {
		return cause
	}
	failed := &RotationError{Err: cause, Reverted: true}
	progress := observing{r.options.Reporter, "canaries"}
	var problems []error
	for _, one := range r.consumers {
		if one.trial != nil {
			if err := r.nomad.Abandon(ctx, one.trial, r.waitOptions(ctx, one), progress); err != nil {
				problems = append(problems, fmt.Errorf("job %s: go back: %w", one.name, err))
			}
		}
	}
	problems = append(problems, r.unsignal(ctx, progress))
	if errors.Join(problems...) == nil {
		problems = append(problems, r.withdraw(ctx, progress))
	}
	for _, one := range r.secrets {
		if one.state.Candidate == 0 {
			continue
		}
		failed.Names = append(failed.Names, one.FullName())
		reason := "its canary failed"
		if slices.Contains(culprits, one.FullName()) {
			reason = "its check failed"
		}
		if len(problems) == 0 || errors.Join(problems...) == nil {
			problems = append(problems, r.dropCandidate(ctx, one, reason))
		}
	}
	if err := errors.Join(problems...); err != nil {
		failed.Reverted = false
		failed.Err = errors.Join(cause, err)
	} else if r.hasPostgres() {
		if err := r.settleLogins(ctx, progress); err != nil {
			failed.Err = errors.Join(cause, err)
		}
	}
	return failed
}

// committed reports whether nothing is a candidate any more: then there is no way back.
func (r *rotation) committed() bool {
	return !slices.ContainsFunc(r.secrets, func(one *rotating) bool { return one.state.Candidate > 0 })
}

// unsignal brings templates back that restart nothing.
func (r *rotation) unsignal(ctx context.Context, progress plan.Progress) error {
	latest, err := r.latestRelease(ctx)
	if err != nil || latest == nil {
		return err
	}
	for _, one := range r.consumers {
		if len(one.next.live) == 0 { // others may have been signalled by an earlier run
			continue
		}
		before, err := r.repin(one.name, latest.Components[one.name], r.pins(r.entries, false))
		if err != nil {
			return err
		}
		switch differs, err := r.liveDiffers(ctx, before.live); {
		case err != nil:
			return err
		case !differs:
			continue
		}
		progress.Message("job %s: its templates go back", one.name)
		if err := r.nomad.PutLive(ctx, before.live); err != nil {
			return err
		}
	}
	return nil
}

// dropCandidate makes the newest version one that works again, for whoever asks
// without a generation, and destroys the one that failed.
func (r *rotation) dropCandidate(ctx context.Context, one *rotating, reason string) error {
	candidate := one.state.Candidate
	if one.candidateWritten() {
		active, _, err := r.bao.ReadActive(ctx, one.Secret)
		if err != nil {
			return err
		}
		if one.entry.Version == candidate {
			// The active generation is named before: this copy must not become it.
			if one.entry.Version, err = r.bao.WriteGeneration(ctx, one.Secret, active, candidate); err != nil {
				return err
			}
		}
		if err := r.bao.Destroy(ctx, one.Secret, []int{candidate}); err != nil {
			return err
		}
	}
	one.state.Candidate, one.state.Failed, one.state.FailedBecause = 0, candidate, reason
	if err := r.bao.SetRotation(ctx, one.Secret, one.state); err != nil {
		return err
	}
	r.note("failed", one, candidate, reason)
	return r.look(ctx)
}

// roll lets the rest of each consumer follow, one consumer at a time.
func (r *rotation) roll() plan.Step {
	return act{
		title: "roll",
		plan: func(context.Context) ([]plan.Change, error) {
			var changes []plan.Change
			for _, one := range r.consumers {
				if one.trial != nil && one.trial.Canaries {
					changes = append(changes, plan.Change{Action: plan.Update, Kind: job.Kind, Target: one.name, Reason: "the rest follows its canary"})
				}
			}
			return changes, nil
		},
		apply: func(ctx context.Context, progress plan.Progress) error {
			for _, one := range r.consumers {
				if one.trial == nil || !one.trial.Canaries {
					continue
				}
				if err := r.nomad.Promote(ctx, one.trial, one.next.Prepared, r.waitOptions(ctx, one), progress); err != nil {
					return plan.WithHint(err, "the new generation is the active one and the old still works: mend the job and run `site secrets rotate --due`, or `site deploy`")
				}
			}
			return nil
		},
	}
}

// recordRotation writes a release that says which generations run now.
func (r *rotation) recordRotation() plan.Step {
	return act{
		title: "release",
		plan: func(ctx context.Context) ([]plan.Change, error) {
			latest, err := r.latestRelease(ctx)
			if err != nil || latest == nil {
				return nil, err
			}
			for _, one := range r.consumers {
				if latest.Components[one.name].SpecDigest != one.next.Desired.SpecDigest {
					return []plan.Change{{Action: plan.Create, Kind: "release", Target: short(latest.GitSHA), Reason: "other generations of secrets run"}}, nil
				}
			}
			return nil, nil
		},
		apply: func(ctx context.Context, _ plan.Progress) error {
			latest, err := r.latestRelease(ctx)
			if err != nil {
				return err
			}
			for _, one := range r.consumers {
				latest.Components[one.name] = one.next.component()
			}
			return r.putRelease(ctx, latest.GitSHA, latest.Components)
		},
	}
}
