package deploy

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/nomad-site/site/internal/adapter/openbao"
	"github.com/nomad-site/site/internal/adapter/ssh"
	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/reconcile/host"
	catalogue "github.com/nomad-site/site/internal/reconcile/secret"
	"github.com/nomad-site/site/internal/retry"
	"github.com/nomad-site/site/internal/seal"
	"github.com/nomad-site/site/internal/secret"
	"github.com/nomad-site/site/internal/site"
)

// initialiseOpenBao makes OpenBao ours. Whatever cuts it short, the next run can
// do it again: nothing of value is in there before operators can log in, which
// is when the material says ready.
func (s *session) initialiseOpenBao(ctx context.Context, desired catalogue.Engine, progress plan.Progress) error {
	client, _, err := s.dialOpenBao(ctx)
	if err != nil {
		return err
	}
	progress.Message("initialising")
	unsealKey, rootToken, err := client.Initialize(ctx)
	if err != nil {
		return err
	}
	root, err := client.WithToken(rootToken)
	if err != nil {
		return err
	}
	held := s.temporary.hold("OpenBao's first root token", func(ctx context.Context) error { return s.revokeRoot(ctx, root, unsealKey) })
	progress.Message("sealing the unseal key")
	if err := s.changeMaterial(ctx, func(m *seal.Material) { m.OpenBaoUnsealKey, m.OpenBaoReady = unsealKey, false }); err != nil {
		return err
	}
	if err := s.putUnsealKey(ctx); err != nil {
		return err
	}
	progress.Message("unsealing")
	if err := client.Unseal(ctx, unsealKey); err != nil {
		return err
	}
	progress.Message("making mounts, login methods and policies")
	if err := convergeEngine(ctx, root, desired, progress); err != nil {
		return err
	}
	// Nobody is locked out: the operator's login works before the root token goes.
	if err := s.logInToOpenBao(ctx, client, purposeDeploy); err != nil {
		return err
	}
	progress.Message("revoking the first root token")
	if err := held.let(ctx); err != nil {
		return err
	}
	return s.openBaoIsReady(ctx, progress)
}

// convergeEngine makes what the site owns in OpenBao from whatever is there, with
// the rights of client.
func convergeEngine(ctx context.Context, client *openbao.Client, desired catalogue.Engine, progress plan.Progress) error {
	state, err := client.ObserveEngine(ctx, desired)
	if err != nil {
		return err
	}
	return client.ApplyEngine(ctx, desired, state, catalogue.DiffEngine(desired, state), progress)
}

// revokeRoot revokes a root token; where OpenBao is still sealed it must
// be opened for that.
func (s *session) revokeRoot(ctx context.Context, root *openbao.Client, unsealKey secret.Value) error {
	health, err := root.Health(ctx)
	if err != nil {
		return err
	}
	if health.Sealed {
		if err := root.Unseal(ctx, unsealKey); err != nil {
			return err
		}
	}
	if err := root.RevokeSelf(ctx); err != nil {
		return err
	}
	if gone, err := root.Revoked(ctx); err != nil || !gone {
		return errors.Join(errors.New("OpenBao still accepts it"), err)
	}
	return nil
}

// readmitOperators mends an OpenBao that lets no operator in, as after its login
// method was changed by hand: with a root token made from the unseal key.
func (s *session) readmitOperators(ctx context.Context, desired catalogue.Engine, progress plan.Progress) error {
	client, _, err := s.dialOpenBao(ctx)
	if err != nil {
		return err
	}
	progress.Message("making a root token from the unseal key")
	var token secret.Value
	unsealKey, err := s.withUnsealKey(func(key secret.Value) (err error) {
		token, err = client.GenerateRoot(ctx, key)
		return err
	})
	if err != nil {
		return err
	}
	root, err := client.WithToken(token)
	if err != nil {
		return err
	}
	held := s.temporary.hold("a root token of OpenBao", func(ctx context.Context) error {
		return s.revokeRoot(ctx, root, unsealKey)
	})
	if err := convergeEngine(ctx, root, desired, progress); err != nil {
		return err
	}
	if err := s.logInToOpenBao(ctx, client, purposeDeploy); err != nil {
		return err
	}
	// Whoever was an operator before may be logged in still.
	if _, err := s.bao.RevokeOperators(ctx, s.operatorNames()); err != nil {
		return err
	}
	progress.Message("revoking the root token")
	return held.let(ctx)
}

// openBaoIsReady ends an initialisation, from when on OpenBao's data is never wiped.
func (s *session) openBaoIsReady(ctx context.Context, progress plan.Progress) error {
	if err := s.openBaoHost().siteHost(ctx, nil, nil, "openbao", "mark"); err != nil {
		return err
	}
	if err := s.changeMaterial(ctx, func(m *seal.Material) { m.OpenBaoReady = true }); err != nil {
		return err
	}
	// Nomad looks for OpenBao rarely; told to read its configuration, it looks at once.
	progress.Message("telling Nomad")
	return s.each(ctx, s.hosts, func(ctx context.Context, h *remoteHost) error {
		_, err := h.conn.Run(ctx, ssh.Command{Args: []string{"systemctl", "reload", "nomad.service"}})
		return err
	})
}

// resumeOpenBao goes on after an initialisation that was cut short. If the
// operator can log in, it had come so far that only the end is missing; if not,
// there is nothing in it yet, and it begins again.
func (s *session) resumeOpenBao(ctx context.Context, desired catalogue.Engine, actual openBaoState, progress plan.Progress) error {
	client, _, err := s.dialOpenBao(ctx)
	if err != nil {
		return err
	}
	if err := s.reopenOpenBao(ctx, client, actual, progress); err != nil {
		if ctx.Err() != nil {
			return err
		}
		progress.Message("beginning again: %v", err)
		if err := s.wipeOpenBao(ctx, progress); err != nil {
			return err
		}
		return s.initialiseOpenBao(ctx, desired, progress)
	}
	if err := convergeEngine(ctx, s.bao, desired, progress); err != nil {
		return err
	}
	// The first root token of the run that was cut short may still be good.
	revoked, err := s.bao.Sweep(ctx, openbao.SweepOptions{Purpose: purposeDeploy, Thorough: true})
	if err != nil {
		return err
	}
	if revoked > 0 {
		progress.Message("revoked %d tokens that an earlier run had left", revoked)
	}
	return s.openBaoIsReady(ctx, progress)
}

func (s *session) reopenOpenBao(ctx context.Context, client *openbao.Client, actual openBaoState, progress plan.Progress) error {
	if s.material.OpenBaoUnsealKey.IsZero() {
		return errors.New("its unseal key was never kept")
	}
	if err := s.putUnsealKey(ctx); err != nil {
		return err
	}
	if actual.health.Sealed {
		progress.Message("unsealing")
		if err := client.Unseal(ctx, s.material.OpenBaoUnsealKey); err != nil {
			return err
		}
	}
	return s.logInToOpenBao(ctx, client, purposeDeploy)
}

// wipeOpenBao throws away the data of an initialisation that was cut short. The
// host refuses where it was ever finished.
func (s *session) wipeOpenBao(ctx context.Context, progress plan.Progress) error {
	prepared := s.jobs[site.OpenBaoComponent]
	if prepared == nil {
		return fmt.Errorf("component %s is not part of this run", site.OpenBaoComponent)
	}
	// Asked before OpenBao is stopped: the host refuses to wipe what was ever finished.
	var storage struct {
		Ready bool `json:"ready"`
	}
	if err := s.openBaoHost().siteHost(ctx, nil, &storage, "openbao", "status"); err != nil {
		return err
	}
	if storage.Ready {
		return plan.WithHint(fmt.Errorf("OpenBao on %s holds a site's secrets, and %s is from before they were there", s.openBaoHost().Name, s.initPath()),
			"nothing was wiped; take the newest %s out of git, such as with `git log -- %s`", s.initPath(), s.initPath())
	}
	progress.Message("wiping what was never finished")
	if err := s.nomad.Stop(ctx, prepared.Desired.JobID); err != nil {
		return err
	}
	err := retry.Until(ctx, "OpenBao to stop", min(openBaoLimit, s.left()), func(ctx context.Context) error {
		output, err := s.openBaoHost().conn.Run(ctx, ssh.Command{Args: []string{
			"podman", "ps", "--quiet", "--filter", "name=^" + site.OpenBaoComponent + "-",
		}})
		if err == nil && len(strings.TrimSpace(string(output))) > 0 {
			err = errors.New("its container runs")
		}
		return err
	})
	if err != nil {
		return err
	}
	if err := s.openBaoHost().siteHost(ctx, nil, nil, "openbao", "wipe"); err != nil {
		return err
	}
	have, err := s.nomad.Observe(ctx, prepared)
	if err != nil {
		return err
	}
	return s.rollOutOne(ctx, prepared, have, progress)
}

func (s *session) putUnsealKey(ctx context.Context) error {
	return s.openBaoHost().siteHost(ctx, s.unsealKeys(), nil, "file", "put", host.UnsealKeyPath, "--mode", "0600")
}
