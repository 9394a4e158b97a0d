package deploy

import (
	"context"
	"errors"
	"fmt"

	"github.com/nomad-site/site/internal/adapter/nomad"
	"github.com/nomad-site/site/internal/plan"
	"github.com/nomad-site/site/internal/seal"
	"github.com/nomad-site/site/internal/secret"
)

// managementPrefix begins the names of all management tokens that follow the one
// of the ACL bootstrap.
const managementPrefix = "site management "

// managementNomad is Nomad with the site's own management token.
func (s *session) managementNomad(ctx context.Context) (*nomad.Client, error) {
	if err := s.dialNomad(ctx); err != nil {
		return nil, err
	}
	client, err := s.nomad.WithToken(s.material.NomadManagementToken)
	if err != nil {
		return nil, err
	}
	s.nomad = client
	return client, nil
}

// rotateNomadACL makes another management token and deletes all before it. A token
// whose making was cut short is swept with them: nobody ever saw it.
func (s *session) rotateNomadACL(ctx context.Context, progress plan.Progress) error {
	client, err := s.managementNomad(ctx)
	if err != nil {
		return err
	}
	token, err := client.NewManagementToken(ctx, fmt.Sprintf("%s%d", managementPrefix, s.material.Generation+1))
	if err != nil {
		return err
	}
	if err := s.reached(ctx, rootNomadACL, "made", progress); err != nil {
		return err
	}
	if err := s.changeMaterial(ctx, func(m *seal.Material) { m.NomadManagementToken = token }); err != nil {
		return err
	}
	if err := s.reached(ctx, rootNomadACL, "sealed", progress); err != nil {
		return err
	}
	if client, err = s.managementNomad(ctx); err != nil {
		return err
	}
	swept, err := client.SweepManagementTokens(ctx, token, managementPrefix)
	if err != nil {
		return err
	}
	progress.Message("deleted %d older management tokens", swept)
	return s.reached(ctx, rootNomadACL, "the old ones are deleted", progress)
}

// rotateGossip gives the servers another key for what they tell each other. They
// accept both until all send with the new one.
func (s *session) rotateGossip(ctx context.Context, progress plan.Progress) error {
	client, err := s.managementNomad(ctx)
	if err != nil {
		return err
	}
	installed, err := s.gossipKeys(ctx, client)
	if err != nil {
		return err
	}
	// Where the material has no next key and servers accept two, an earlier run had
	// come as far as sending with the one that counts now.
	if cut := s.material.NextGossipKey.IsZero() && len(installed) > 1; !cut {
		if err := s.switchGossip(ctx, client, progress); err != nil {
			return err
		}
	}
	if err := s.convergeCredentials(ctx, s.usualRules(), progress); err != nil {
		return err
	}
	if err := s.reached(ctx, rootGossip, "the new key is on all hosts", progress); err != nil {
		return err
	}
	// Asked again: nobody may have gone since, who would come back with the old key.
	if installed, err = s.gossipKeys(ctx, client); err != nil {
		return err
	}
	if installed[s.material.GossipKey.Reveal()] < len(s.servers()) {
		return errors.New("not all servers accept the new gossip key; the old one stays")
	}
	for key := range installed {
		if key == s.material.GossipKey.Reveal() {
			continue
		}
		if err := client.RemoveGossipKey(ctx, secret.New(key)); err != nil {
			return err
		}
	}
	return s.reached(ctx, rootGossip, "the old key is removed", progress)
}

// switchGossip ends with all servers sending with a new key.
func (s *session) switchGossip(ctx context.Context, client *nomad.Client, progress plan.Progress) error {
	if s.material.NextGossipKey.IsZero() {
		if err := s.changeMaterial(ctx, func(m *seal.Material) { m.NextGossipKey = seal.NewGossipKey() }); err != nil {
			return err
		}
		if err := s.reached(ctx, rootGossip, "the new key is sealed", progress); err != nil {
			return err
		}
	}
	next := s.material.NextGossipKey
	if err := client.InstallGossipKey(ctx, next); err != nil {
		return err
	}
	if err := s.reached(ctx, rootGossip, "all servers accept the new key", progress); err != nil {
		return err
	}
	if err := client.UseGossipKey(ctx, next); err != nil {
		return err
	}
	if err := s.reached(ctx, rootGossip, "all servers send with the new key", progress); err != nil {
		return err
	}
	return s.changeMaterial(ctx, func(m *seal.Material) { m.GossipKey, m.NextGossipKey = next, secret.Value{} })
}

// gossipKeys tells on how many servers each key is, if all servers answer: one
// that is away would come back with keys that nobody else has any more.
func (s *session) gossipKeys(ctx context.Context, client *nomad.Client) (map[string]int, error) {
	keys, _, members, err := client.Gossip(ctx)
	if err != nil {
		return nil, err
	}
	if want := len(s.servers()); members != want {
		return nil, plan.WithHint(fmt.Errorf("%d servers gossip, and site.hcl has %d", members, want),
			"a server that is away would come back with a key that nobody has: see `nomad server members`, and run this again")
	}
	return keys, nil
}
