package deploy

import (
	"context"
	"fmt"
	"slices"

	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/reconcile/role"
	"github.com/nomad-site/site/internal/site"
)

// desiredLogins are the alternating roles of the secrets that this run moves,
// with who may log in for each; a retired generation may not.
func (r *rotation) desiredLogins(ctx context.Context, retired *rotating) (role.Desired, error) {
	desired := role.Desired{Logins: map[string][]role.Login{}}
	for _, one := range r.secrets {
		of := r.site.AlternatingRole(one.FullName())
		if of == nil {
			continue
		}
		state := one.state
		if one == retired {
			state.Retiring = 0
		}
		logins, err := r.loginsOf(ctx, *of, state)
		if err != nil {
			return desired, err
		}
		desired.Roles = append(desired.Roles, *of)
		desired.Logins[of.Name] = logins
	}
	return desired, nil
}

// observeLogins compares them with what Postgres has.
func (r *rotation) observeLogins(ctx context.Context, retired *rotating, progress plan.Progress) (desired role.Desired, actual role.Actual, err error) {
	if desired, err = r.desiredLogins(ctx, retired); err != nil || len(desired.Roles) == 0 {
		return desired, actual, err
	}
	if err = r.dialPostgres(ctx, progress); err != nil {
		return desired, actual, err
	}
	actual, err = r.databases.Observe(ctx, desired)
	return desired, actual, err
}

func (r *rotation) loginChanges(ctx context.Context) ([]plan.Change, error) {
	desired, actual, err := r.observeLogins(ctx, nil, observing{r.options.Reporter, "database logins"})
	if err != nil {
		return nil, err
	}
	return role.Diff(desired, actual), nil
}

func (r *rotation) convergeLogins(ctx context.Context, retired *rotating, progress plan.Progress) error {
	desired, actual, err := r.observeLogins(ctx, retired, progress)
	if err != nil || len(desired.Roles) == 0 {
		return err
	}
	return r.databases.Apply(ctx, desired, actual, role.Diff(desired, actual), progress)
}

// settleLogins takes the login of a generation back that was given up.
func (r *rotation) settleLogins(ctx context.Context, progress plan.Progress) error {
	if err := r.convergeLogins(ctx, nil, progress); err != nil {
		return err
	}
	for _, one := range r.secrets {
		if of := r.site.AlternatingRole(one.FullName()); of != nil && one.state.Retiring == 0 {
			if err := r.endIdle(ctx, one, *of, progress); err != nil {
				return err
			}
		}
	}
	return nil
}

// endLogin takes the old generation's login away, and the sessions that it has.
func (r *rotation) endLogin(ctx context.Context, one *rotating, of site.Role, progress plan.Progress) error {
	if err := r.convergeLogins(ctx, one, progress); err != nil {
		return err
	}
	return r.endIdle(ctx, one, of, progress)
}

// endIdle ends the sessions of the login that is not the active one.
func (r *rotation) endIdle(ctx context.Context, one *rotating, of site.Role, progress plan.Progress) error {
	active, _, err := r.bao.ReadActive(ctx, one.Secret)
	if err != nil {
		return err
	}
	first, second := of.Logins()
	idle := slices.DeleteFunc([]string{first, second}, func(login string) bool { return login == active.Username })
	ended, err := r.databases.EndSessions(ctx, idle)
	if err != nil {
		return fmt.Errorf("end the sessions of %v: %w", idle, err)
	}
	if ended > 0 {
		progress.Message("ended %d sessions of %v", ended, idle)
	}
	return nil
}
