package deploy

import (
	"context"
	"slices"

	"github.com/nomad-site/site/internal/plan"
)

// KindRoot is the plan.Change kind of a root of trust.
const KindRoot = "root of trust"

// rootsOf are the roots of trust that were chosen, in the order of Roots.
func rootsOf(options Options, choice RotateOptions) []string {
	return slices.DeleteFunc(Roots(), func(name string) bool {
		if slices.Contains(choice.Names, name) {
			return false
		}
		// The site root token lies with people: it changes only when they say where to.
		return !choice.Roots || name == rootRootToken && options.NewRootTokenFile == ""
	})
}

// withoutRoots are the names that are not those of roots of trust.
func withoutRoots(names []string) []string {
	return slices.DeleteFunc(slices.Clone(names), func(name string) bool { return slices.Contains(Roots(), name) })
}

// rootSteps rotate what was chosen of the roots of trust, one step for each.
func (r *rotation) rootSteps() []plan.Step {
	var steps []plan.Step
	for _, name := range r.roots {
		steps = append(steps, act{
			title: "rotate " + name,
			plan: func(context.Context) ([]plan.Change, error) {
				return []plan.Change{{Action: plan.Update, Kind: KindRoot, Target: name, Reason: "asked for"}}, nil
			},
			apply: func(ctx context.Context, progress plan.Progress) error {
				if err := r.rotateRoot(ctx, name, progress); err != nil {
					return err
				}
				return r.noteRoot(ctx, name)
			},
		})
	}
	return steps
}

// openRoots opens the newest init material, before anything logs in with it.
func (r *rotation) openRoots(ctx context.Context) error {
	if r.rootToken.IsZero() {
		return nil
	}
	return r.newestMaterial(ctx)
}

// readMaterials opens what roots of trust need: the init material, and for those
// that change hosts the platform's own files.
func (r *rotation) readMaterials(ctx context.Context) error {
	if err := r.readMaterial(); err != nil {
		return err
	}
	if len(r.roots) == 0 {
		return nil
	}
	return r.collectPlatform(ctx)
}
