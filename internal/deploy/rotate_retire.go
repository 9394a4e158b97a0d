package deploy

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/retry"
	"github.com/nomad-site/site/internal/site"
)

// KindRetired is the plan.Change kind of an old generation that goes.
const KindRetired = "old generation"

// previousGeneration is how a template asks for the generation before.
const previousGeneration = "?version=previous"

// drainMargin is the part of a run's time that is left for retiring.
const drainMargin = 30 * time.Second

// drain gives those who still hold the old value the declared time.
func (r *rotation) drain() plan.Step {
	return check{title: "drain", run: func(ctx context.Context) error {
		until := time.Time{}
		for _, one := range r.secrets {
			if one.state.Retiring == 0 {
				continue
			}
			if after := r.retireAfter(one); !after.Equal(one.state.RetireAfter) {
				one.state.RetireAfter = after
				if err := r.bao.SetRotation(ctx, one.Secret, one.state); err != nil {
					return err
				}
			}
			if one.state.RetireAfter.After(until) {
				until = one.state.RetireAfter
			}
		}
		wait := time.Until(until)
		if wait <= 0 || r.choice.Detach || wait > r.left()-drainMargin {
			return nil
		}
		observing{r.options.Reporter, "drain"}.Message("the old generation works for another %s; this may be interrupted, the next run goes on", wait.Round(time.Second))
		return retry.Pause(ctx, wait)
	}}
}

// retireAfter is when the old generation has drained: the time runs from when
// the last consumer had moved.
func (r *rotation) retireAfter(one *rotating) time.Time {
	switch rolled := time.Now().Add(r.drainOf(one)); {
	case r.moved(one) && rolled.After(one.state.RetireAfter):
		return rolled
	case r.choice.Drain >= 0: // asked for now, whatever was said when it began
		return one.state.Rotated.Add(r.choice.Drain)
	}
	return one.state.RetireAfter
}

// moved reports whether this run moved a consumer of the secret.
func (r *rotation) moved(one *rotating) bool {
	return slices.ContainsFunc(r.consumers, func(c *consumer) bool {
		// An earlier run may have begun it.
		return (c.moves || c.signalled || c.trial != nil) && slices.Contains(r.site.Consumers(one.FullName()), c.name)
	})
}

// retire ends old generations that have drained and that nobody uses, on every host.
func (r *rotation) retire() plan.Step {
	var ready []*rotating
	return act{
		title: "retire",
		plan: func(ctx context.Context) ([]plan.Change, error) {
			ready = nil
			var changes []plan.Change
			for _, one := range r.secrets {
				if one.state.Retiring == 0 {
					continue
				}
				why, err := r.stillNeeded(ctx, one)
				if err != nil {
					return nil, err
				}
				if why != "" {
					r.options.Warn(fmt.Sprintf("secret %s: generation %d stays, %s; `site secrets rotate --due` retires it later", one.FullName(), one.state.Retiring, why))
					continue
				}
				ready = append(ready, one)
				changes = append(changes, plan.Change{
					Action: plan.Delete, Kind: KindRetired, Target: one.FullName(),
					Reason: fmt.Sprintf("generation %d has drained and nobody reads it", one.state.Retiring),
				})
			}
			return changes, nil
		},
		apply: func(ctx context.Context, progress plan.Progress) error {
			if err := r.forgetPrevious(ctx, ready, progress); err != nil {
				return err
			}
			for _, one := range ready {
				if err := r.retireOne(ctx, one, progress); err != nil {
					return err
				}
			}
			return r.look(ctx)
		},
	}
}

// stillNeeded says why an old generation may not go yet.
func (r *rotation) stillNeeded(ctx context.Context, one *rotating) (string, error) {
	if left := time.Until(one.state.RetireAfter); left > 0 {
		return fmt.Sprintf("it drains for another %s", left.Round(time.Second)), nil
	}
	away, err := r.nomad.NodesNotReady(ctx)
	if err != nil {
		return "", err
	}
	without := slices.Clone(r.choice.WithoutHosts)
	for _, node := range away { // Nomad remembers hosts for a day that are no longer declared
		if !slices.ContainsFunc(r.site.Hosts, func(h site.Host) bool { return h.Name == node }) {
			without = append(without, node)
		}
	}
	for _, h := range r.site.Hosts {
		if !slices.ContainsFunc(r.hosts, func(known *remoteHost) bool { return known.Name == h.Name }) && !slices.Contains(away, h.Name) {
			away = append(away, h.Name)
		}
	}
	if away = slices.DeleteFunc(away, func(host string) bool { return slices.Contains(without, host) }); len(away) > 0 {
		return fmt.Sprintf("host %s is away (or give --retire-without-host)", strings.Join(away, ", ")), nil
	}
	if behind, err := r.hostsBehind(ctx, one); err != nil || behind != "" {
		return behind, err
	}
	return r.stillRead(ctx, one, without)
}

// endingLimit is how long allocations that were replaced are waited for: more than
// the longest kill_timeout that Nomad is given.
const endingLimit = 150 * time.Second

// stillRead says who reads an old generation, once those are gone that are just ending.
func (r *rotation) stillRead(ctx context.Context, one *rotating, without []string) (why string, err error) {
	limit := max(min(endingLimit, r.left()-drainMargin), time.Second)
	err = retry.Until(ctx, "old allocations to end", limit, func(ctx context.Context) error {
		inUse, err := r.nomad.GenerationsInUse(ctx, r.jobsOf(one), without...)
		if err != nil {
			return retry.Permanent(err)
		}
		if len(inUse.Unready) > 0 {
			why = "allocations on " + strings.Join(inUse.Unready, ", ") + " have not reported"
			return nil
		}
		why = ""
		for _, generation := range inUse.Generations[one.FullName()] {
			if generation != one.state.Active {
				why = fmt.Sprintf("an allocation still reads generation %d", generation)
				return errors.New(why)
			}
		}
		return nil
	})
	var late *retry.TimeoutError
	if errors.As(err, &late) && why != "" {
		err = nil
	}
	return why, err
}

// jobsOf are the deployed jobs that read a secret.
func (r *rotation) jobsOf(one *rotating) []string {
	var ids []string
	for _, c := range r.consumers {
		if slices.Contains(r.site.Consumers(one.FullName()), c.name) {
			ids = append(ids, c.next.Desired.JobID)
		}
	}
	return ids
}

// forgetPrevious rolls the jobs once more that accept the generation before, so
// that they do no longer.
func (r *rotation) forgetPrevious(ctx context.Context, ready []*rotating, progress plan.Progress) error {
	latest, err := r.latestRelease(ctx)
	if err != nil || latest == nil {
		return err
	}
	pins := r.pins(r.entries, false)
	for _, one := range ready {
		pins.Previous[one.FullName()] = pins.Active[one.FullName()]
	}
	wrote := false
	for _, c := range r.consumers {
		recorded := latest.Components[c.name]
		if !strings.Contains(recorded.Jobspec, previousGeneration) {
			continue
		}
		next, err := r.observeConsumer(ctx, c.name, recorded, pins)
		if err != nil {
			return err
		}
		if next == nil || !next.moves && !next.signalled {
			continue
		}
		progress.Message("job %s: forgets the generation before", c.name)
		if err := r.moveWholly(ctx, next, progress); err != nil {
			return err
		}
		latest.Components[c.name] = next.next.component()
		wrote = true
	}
	if !wrote {
		return nil
	}
	return r.putRelease(ctx, latest.GitSHA, latest.Components)
}

// retireOne ends a generation: the login, its sessions, and the value itself.
func (r *rotation) retireOne(ctx context.Context, one *rotating, progress plan.Progress) error {
	old := one.state.Retiring
	if role := r.site.AlternatingRole(one.FullName()); role != nil && r.hasPostgres() {
		if err := r.endLogin(ctx, one, *role, progress); err != nil {
			return err
		}
	}
	var gone []int
	for _, version := range slices.Sorted(maps.Keys(one.entry.Versions)) {
		if version < one.state.Active && !one.entry.Versions[version].Gone {
			gone = append(gone, version)
		}
	}
	if err := r.bao.Destroy(ctx, one.Secret, gone); err != nil {
		return err
	}
	one.state.Retiring, one.state.RetireAfter, one.state.Since = 0, time.Time{}, time.Time{}
	if err := r.bao.SetRotation(ctx, one.Secret, one.state); err != nil {
		return err
	}
	progress.Message("%s: generation %d is retired", one.FullName(), old)
	r.note("retired", one, old, "")
	return nil
}
