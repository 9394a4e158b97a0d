package nomad

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"

	"github.com/hashicorp/nomad/api"

	"github.com/nomad-site/site/internal/secret"
)

const (
	managementType = "management"
	// bootstrapTokenName is what Nomad calls the token that bootstrapped its ACLs.
	bootstrapTokenName = "Bootstrap Token"
)

// NewManagementToken makes another management token, which is known to the
// server that we talk to when this returns.
func (c *Client) NewManagementToken(ctx context.Context, name string) (secret.Value, error) {
	made, _, err := c.api.ACLTokens().Create(&api.ACLToken{Name: name, Type: managementType, Global: true}, c.write(ctx))
	if err != nil {
		return secret.Value{}, describe(err, "make ACL token %s", name)
	}
	token := secret.New(made.SecretID)
	return token, c.tokenArrived(ctx, token)
}

// SweepManagementTokens deletes the token of the bootstrap and those whose
// names have the prefix, but keep; it returns how many. Where keep itself is
// not a management token nothing is deleted: nobody could get in any more.
func (c *Client) SweepManagementTokens(ctx context.Context, keep secret.Value, namePrefix string) (int, error) {
	return c.sweepTokens(ctx, keep, namePrefix, bootstrapTokenName)
}

func (c *Client) sweepTokens(ctx context.Context, keep secret.Value, namePrefix, name string) (int, error) {
	if namePrefix == "" {
		return 0, errors.New("sweep management tokens: the prefix of their names is empty")
	}
	kept, err := c.WithToken(keep)
	if err != nil {
		return 0, err
	}
	defer kept.Close()
	own, _, err := kept.api.ACLTokens().Self(kept.query(ctx))
	if err != nil {
		return 0, describe(err, "sweep management tokens: log in with the one to keep")
	}
	if own.Type != managementType {
		return 0, fmt.Errorf("sweep management tokens: the one to keep is of type %s", own.Type)
	}
	tokens, _, err := kept.api.ACLTokens().List(kept.query(ctx))
	if err != nil {
		return 0, describe(err, "list ACL tokens")
	}
	swept := 0
	for _, token := range tokens {
		ours := token.Name == name || strings.HasPrefix(token.Name, namePrefix)
		if token.Type != managementType || !ours || token.AccessorID == own.AccessorID {
			continue
		}
		if _, err := kept.api.ACLTokens().Delete(token.AccessorID, kept.write(ctx)); err != nil && statusOf(err) != http.StatusNotFound {
			return swept, describe(err, "delete ACL token %s", token.Name)
		}
		swept++
	}
	return swept, nil
}

// Gossip returns on how many servers each gossip key is installed, and how many
// servers there are. Which key they send with Nomad does not tell: primary is
// always empty. It refuses to remove that one.
func (c *Client) Gossip(ctx context.Context) (keys, primary map[string]int, members int, err error) {
	var answer api.KeyringResponse
	// The typed calls take no context.
	if _, err := c.api.Raw().Query("/v1/agent/keyring/list", &answer, c.query(ctx)); err != nil {
		return nil, nil, 0, describe(err, "list gossip keys")
	}
	return answer.Keys, map[string]int{}, answer.NumNodes, nil
}

// InstallGossipKey has all servers accept the key.
func (c *Client) InstallGossipKey(ctx context.Context, key secret.Value) error {
	return c.changeGossip(ctx, "install", key)
}

// UseGossipKey has all servers send with the key.
func (c *Client) UseGossipKey(ctx context.Context, key secret.Value) error {
	return c.changeGossip(ctx, "use", key)
}

// RemoveGossipKey has all servers forget the key. Nomad refuses it for the key
// that they send with.
func (c *Client) RemoveGossipKey(ctx context.Context, key secret.Value) error {
	return c.changeGossip(ctx, "remove", key)
}

func (c *Client) changeGossip(ctx context.Context, operation string, key secret.Value) error {
	var answer api.KeyringResponse
	_, err := c.api.Raw().Write("/v1/agent/keyring/"+operation, &api.KeyringRequest{Key: key.Reveal()}, &answer, c.write(ctx))
	if err == nil {
		return nil
	}
	if strings.Contains(err.Error(), key.Reveal()) {
		return fmt.Errorf("%s a gossip key: nomad answered %d", operation, statusOf(err))
	}
	return describe(err, "%s a gossip key", operation)
}
