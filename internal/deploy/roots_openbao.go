package deploy

import (
	"context"
	"errors"
	"slices"
	"sync"

	"github.com/nomad-site/site/internal/adapter/openbao"
	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/reconcile/host"
	catalogue "github.com/nomad-site/site/internal/reconcile/secret"
	"github.com/nomad-site/site/internal/seal"
	"github.com/nomad-site/site/internal/secret"
)

// rotateUnsealKey gives OpenBao another unseal key. From before it counts until
// the old one does not, init.age and the host hold both: site-host tries both.
func (s *session) rotateUnsealKey(ctx context.Context, progress plan.Progress) error {
	if !s.hasOpenBao() {
		progress.Message("the site has no secrets engine")
		return nil
	}
	if err := s.haveOpenBao(ctx); err != nil {
		return err
	}
	health, err := s.bao.Health(ctx)
	if err != nil {
		return err
	}
	// One that runs since before it knew two keys would take neither.
	if err := s.restartSiteHost(ctx, progress); err != nil {
		return err
	}
	rekeyer := s.bao.Rekeyer(health)
	if err := rekeyer.Cancel(ctx); err != nil {
		return err
	}
	current, next, nonce, err := s.beginRekey(ctx, rekeyer)
	if err != nil {
		return err
	}
	err = s.changeMaterial(ctx, func(m *seal.Material) { m.OpenBaoUnsealKey, m.NextUnsealKey = current, next })
	if err == nil {
		err = s.putUnsealKey(ctx)
	}
	if err == nil {
		err = s.reached(ctx, rootUnsealKey, "both keys are kept", progress)
	}
	if err == nil {
		err = rekeyer.Confirm(ctx, next, nonce)
	}
	if err != nil {
		return errors.Join(err, rekeyer.Cancel(context.WithoutCancel(ctx)))
	}
	if err := s.reached(ctx, rootUnsealKey, "the new key is in force", progress); err != nil {
		return err
	}
	if err := s.changeMaterial(ctx, func(m *seal.Material) { m.OpenBaoUnsealKey, m.NextUnsealKey = next, secret.Value{} }); err != nil {
		return err
	}
	if err := s.putUnsealKey(ctx); err != nil {
		return err
	}
	return s.reached(ctx, rootUnsealKey, "the old key is forgotten", progress)
}

// beginRekey finds out which key is in force: after a rotation that was cut short
// it may be the one that was to follow.
func (s *session) beginRekey(ctx context.Context, rekeyer openbao.Rekeyer) (current, next secret.Value, nonce string, err error) {
	current, err = s.withUnsealKey(func(key secret.Value) (err error) {
		next, nonce, err = rekeyer.Begin(ctx, key)
		return err
	})
	return current, next, nonce, err
}

// withUnsealKey does something with the unseal key, and returns which that is. In
// the middle of its rotation either of two may be in force.
func (s *session) withUnsealKey(do func(key secret.Value) error) (secret.Value, error) {
	key := s.material.OpenBaoUnsealKey
	err := do(key)
	var wrong *openbao.WrongKeyError
	if next := s.material.NextUnsealKey; !next.IsZero() && errors.As(err, &wrong) {
		key, err = next, do(next)
	}
	return key, err
}

// unsealKeys is what lies on the host: the key that OpenBao is opened with and,
// while it rotates, the one that is to follow, a line each.
func (s *session) unsealKeys() []byte {
	keys := s.material.OpenBaoUnsealKey.Reveal()
	if !s.material.NextUnsealKey.IsZero() {
		keys += "\n" + s.material.NextUnsealKey.Reveal()
	}
	return []byte(keys)
}

// restartSiteHost restarts site-host where it runs since before its executable changed.
func (s *session) restartSiteHost(ctx context.Context, progress plan.Progress) error {
	render := func(h *remoteHost) (host.Document, error) {
		if h.applied == nil {
			return host.Document{}, &host.NeedsCredentialsError{Host: h.Name, Path: host.AppliedPath}
		}
		return *h.applied, nil
	}
	for _, h := range s.hosts {
		h.observed = nil
	}
	keep := func(change plan.Change) bool { return change.Target == host.SiteHostUnit }
	return runStep(ctx, s.hostStep("site-host", render, keep, s.applyDocuments), progress)
}

// haveOpenBao logs in, where this run is not.
func (s *session) haveOpenBao(ctx context.Context) error {
	if s.bao != nil {
		return nil
	}
	return s.openOpenBao(ctx)
}

// rotateHostKeys gives every host another key to log in to OpenBao with. OpenBao
// takes both from before the first host switches until after the last has.
func (s *session) rotateHostKeys(ctx context.Context, progress plan.Progress) error {
	if !s.hasOpenBao() {
		progress.Message("the site has no secrets engine")
		return nil
	}
	if err := s.haveOpenBao(ctx); err != nil {
		return err
	}
	if _, err := s.askHostKeys(ctx, "ensure"); err != nil {
		return err
	}
	for _, phase := range []struct{ verb, point string }{
		{"next", "OpenBao takes the new keys beside the old"},
		{"switch", "OpenBao takes the new keys alone"},
	} {
		if _, err := s.askHostKeys(ctx, phase.verb); err != nil {
			return err
		}
		if err := s.reached(ctx, rootHostKeys, "the hosts' keys: "+phase.verb, progress); err != nil {
			return err
		}
		if err := s.registerHostKeys(ctx, progress); err != nil {
			return err
		}
		if err := s.reached(ctx, rootHostKeys, phase.point, progress); err != nil {
			return err
		}
	}
	return nil
}

// registerHostKeys has OpenBao take the keys that the hosts have, and changes
// nothing else of it.
func (s *session) registerHostKeys(ctx context.Context, progress plan.Progress) error {
	desired, err := s.desiredEngine(ctx)
	if err != nil {
		return err
	}
	state, err := s.bao.ObserveEngine(ctx, desired)
	if err != nil {
		return err
	}
	changes := slices.DeleteFunc(catalogue.DiffEngine(desired, state), func(change plan.Change) bool {
		return change.Target != catalogue.HostsMount
	})
	return s.bao.ApplyEngine(ctx, desired, state, changes, progress)
}

// askHostKeys has every host do something with its key. It returns the public
// halves of all keys that it has then.
func (s *session) askHostKeys(ctx context.Context, verb string) ([]string, error) {
	var mutex sync.Mutex
	var keys []string
	err := s.each(ctx, s.hosts, func(ctx context.Context, h *remoteHost) error {
		var answer struct {
			PublicKeyPEM     string `json:"public_key_pem"`
			NextPublicKeyPEM string `json:"next_public_key_pem"`
		}
		err := h.siteHost(ctx, nil, &answer, "host-key", verb)
		mutex.Lock()
		defer mutex.Unlock()
		keys = append(keys, answer.PublicKeyPEM)
		if answer.NextPublicKeyPEM != "" {
			keys = append(keys, answer.NextPublicKeyPEM)
		}
		return err
	})
	return keys, err
}
