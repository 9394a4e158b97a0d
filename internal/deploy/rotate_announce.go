package deploy

import (
	"context"
	"slices"
	"strings"

	"github.com/nomad-site/site/internal/adapter/nomad"
	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/reconcile/job"
	"github.com/nomad-site/site/internal/sitehost/release"
)

// announce lets whoever checks a value accept the next generation before anybody
// sends it: those jobs read the candidate by `?version=previous`, and follow as a
// whole. Without that the first canary that sends the new value would be refused
// by every allocation that does not know it yet, its own siblings included.
func (r *rotation) announce() plan.Step {
	var behind []*consumer
	return act{
		title: "announce",
		plan: func(ctx context.Context) ([]plan.Change, error) {
			behind = nil
			checkers, err := r.checkers(ctx)
			if err != nil {
				return nil, err
			}
			var changes []plan.Change
			for _, name := range checkers.names {
				one, err := r.observeConsumer(ctx, name, checkers.recorded[name], r.announcing())
				if err != nil {
					return nil, err
				}
				next, err := r.observeConsumer(ctx, name, checkers.recorded[name], r.pins(r.entries, true))
				if err != nil {
					return nil, err
				}
				if one == nil || next == nil {
					continue
				}
				// What an earlier run brought further than this does not go back.
				one.moves, one.signalled = one.moves && next.moves, one.signalled && next.signalled
				if !one.moves && !one.signalled && one.trial == nil {
					continue
				}
				behind = append(behind, one)
				changes = append(changes, plan.Change{
					Action: plan.Update, Kind: job.Kind, Target: name, Reason: "it accepts the next generation beside the active one",
					Precondition: job.Precondition(one.have.ModifyIndex),
				})
			}
			return changes, nil
		},
		apply: func(ctx context.Context, progress plan.Progress) error {
			for _, one := range behind {
				if err := r.moveWholly(ctx, one, progress); err != nil {
					r.consumers = []*consumer{one}
					return r.giveUp(ctx, err)
				}
			}
			return nil
		},
	}
}

// checkersOf are jobs that accept two generations, as the last release recorded them.
type checkersOf struct {
	names    []string
	recorded map[string]release.Component
}

// checkers are those of secrets that have a candidate.
func (r *rotation) checkers(ctx context.Context) (checkersOf, error) {
	if r.committed() {
		return checkersOf{}, nil
	}
	latest, err := r.latestRelease(ctx)
	if err != nil || latest == nil {
		return checkersOf{}, err
	}
	found := checkersOf{recorded: latest.Components}
	for _, component := range r.site.Components {
		reads := slices.ContainsFunc(r.secrets, func(one *rotating) bool {
			return one.state.Candidate > 0 && slices.Contains(r.site.Consumers(one.FullName()), component.Name)
		})
		if reads && strings.Contains(latest.Components[component.Name].Jobspec, previousGeneration) {
			found.names = append(found.names, component.Name)
		}
	}
	return found, nil
}

// announcing are the generations of jobs that accept a candidate, and do not use it yet.
func (r *rotation) announcing() nomad.Pins {
	pins := r.pins(r.entries, false)
	for _, one := range r.secrets {
		if one.state.Candidate > 0 {
			pins.Previous[one.FullName()] = one.state.Candidate
		}
	}
	return pins
}

// moveWholly brings all of a job to what it is to read, its canary first.
func (r *rotation) moveWholly(ctx context.Context, one *consumer, progress plan.Progress) error {
	if one.signalled {
		if err := r.signal(ctx, one, progress); err != nil {
			return err
		}
	}
	switch {
	case one.trial != nil:
		if err := r.nomad.AwaitTrial(ctx, one.trial, one.next.Prepared, r.waitOptions(ctx, one), progress); err != nil {
			return err
		}
	case one.moves:
		if err := r.tryOne(ctx, one, progress); err != nil {
			return err
		}
	default:
		return nil
	}
	return r.nomad.Promote(ctx, one.trial, one.next.Prepared, r.waitOptions(ctx, one), progress)
}

// withdraw takes candidates away from those who accept them: they are given up.
func (r *rotation) withdraw(ctx context.Context, progress plan.Progress) error {
	checkers, err := r.checkers(ctx)
	if err != nil {
		return err
	}
	for _, name := range checkers.names {
		one, err := r.observeConsumer(ctx, name, checkers.recorded[name], r.pins(r.entries, false))
		if err != nil {
			return err
		}
		if one == nil {
			continue
		}
		if err := r.moveWholly(ctx, one, progress); err != nil {
			return err
		}
	}
	return nil
}
